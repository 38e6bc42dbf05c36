"""Which calls the second model's dispatcher makes itself."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from helpers_executor import begin, drive, passed, until

from ninefuse import ops, pace, sequences
from ninefuse.commands import Call, blocking, blocking_unless
from ninefuse.executor import Executor, SecondModel
from ninefuse.ops import io
from ninefuse.pace import Pace
from ninefuse.session import Session
from ninefuse.syscalls import is_local

MS = 1_000_000  # nanoseconds
US = 1_000
INODE = 7
FOREIGN = 1 << 52 | INODE


def alone_in_it(sole: bool = True) -> Pace:
    """A pace for a local source with nothing mounted in it, at the first request."""
    tested = Pace(lambda: sole)
    tested.arrived(alone=True)
    return tested


def crowd(tested: Pace) -> None:
    tested.arrived(alone=False)


def call(function: Callable[..., object] = os.pwrite, on: int | None = INODE) -> Call:
    return Call(on, function, ())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic time, in seconds, to be changed at will."""
    now = [1000.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def learn(tested: Pace, one: Call, nanoseconds: int, times: int = 8) -> None:
    for _ in range(times):
        assert not tested.is_here(one)
        tested.took_there(one, nanoseconds)


def test_a_kind_is_tried_here_once_workers_have_shown_that_it_is_short(
    clock: list[float],
) -> None:
    tested, one = alone_in_it(), call()
    learn(tested, one, 20 * US)
    assert tested.is_here(one)
    assert not tested.is_here(call(os.fsync)), "of which nothing is known"


def test_the_interpreters_lock_does_not_hide_a_short_call(clock: list[float]) -> None:
    """One of eight that had not to wait for it is enough."""
    tested, one = alone_in_it(), call()
    crowd(tested)
    learn(tested, one, 2 * MS, 7)
    learn(tested, one, 20 * US, 1)
    assert tested.is_here(one)


def nobody() -> bool:
    return False


def somebody() -> bool:
    return True


@pytest.mark.parametrize(
    ("nanoseconds", "alone", "crowded"),
    [(90 * US, True, True), (300 * US, True, False), (2 * MS, False, False)],
)
def test_what_takes_longer_is_made_here_for_a_lone_client_only(
    clock: list[float], nanoseconds: int, alone: bool, crowded: bool
) -> None:
    """What it takes here is learned from one call, whoever waits."""
    tested, one = alone_in_it(), call()
    learn(tested, one, 100 * US)
    assert tested.is_here(one)
    tested.took_here(one, nanoseconds, nobody)
    assert tested.is_here(one) == alone
    crowd(tested)
    assert tested.is_here(one) == crowded


def test_what_takes_long_on_workers_is_not_even_tried(clock: list[float]) -> None:
    tested, one = alone_in_it(), call()
    learn(tested, one, 2 * MS, 100)
    assert not tested.is_here(one)


def test_a_client_is_alone_when_nothing_else_came_for_a_while(clock: list[float]) -> None:
    tested, one = alone_in_it(), call()
    learn(tested, one, 300 * US)
    assert tested.is_here(one)
    tested.took_here(one, 300 * US, nobody)
    assert tested.is_here(one)
    tested.took_here(one, 300 * US, somebody)
    for _ in range(15):
        tested.arrived(alone=True)
        assert not tested.is_here(one)
    tested.arrived(alone=True)
    assert tested.is_here(one)


def test_calls_on_other_devices_and_on_unknown_inodes_are_never_made_here(
    clock: list[float],
) -> None:
    tested = alone_in_it()
    learn(tested, call(), 1 * US)
    assert tested.is_here(call())
    assert not tested.is_here(call(on=FOREIGN))
    assert not tested.is_here(call(on=None))


def test_nothing_is_made_here_while_something_is_mounted_in_the_source(
    clock: list[float],
) -> None:
    """A name may lead there, and the server may not answer."""
    sole = [True]
    tested = Pace(lambda: sole[0])
    tested.arrived(alone=True)
    learn(tested, call(), 1 * US)
    assert tested.is_here(call())
    sole[0] = False
    tested.arrived(alone=True)
    assert not tested.is_here(call())
    assert not tested.is_local(call())
    sole[0] = True
    tested.arrived(alone=True)
    assert tested.is_here(call())


def test_what_others_may_keep_waiting_is_never_made_here(clock: list[float]) -> None:
    """And fast calls on other devices say nothing of those on the source's own."""
    tested = alone_in_it()
    patient = Call(INODE, os.open, (), may_be_here=False)
    learn(tested, patient, 1 * US, 20)
    assert tested.is_here(call(os.open))
    learn(tested, call(on=FOREIGN), 1 * US, 20)
    assert not tested.is_here(call())


def test_one_stall_sends_a_kind_to_the_workers(clock: list[float]) -> None:
    """For a second, then for twice as long; other kinds stay."""
    tested, one, other = alone_in_it(), call(), call(os.fsync)
    learn(tested, one, 20 * US)
    learn(tested, other, 20 * US)
    tested.is_here(other)
    tested.took_here(other, 20 * US, nobody)
    for number, seconds in enumerate((1, 2, 4), 1):
        assert tested.is_here(one)
        tested.took_here(one, 30 * MS, somebody)
        assert tested.demotions == number
        assert not tested.is_here(one)
        assert tested.is_here(other)
        learn(tested, one, 20 * US)
        clock[0] += seconds - 0.01
        assert not tested.is_here(one)
        clock[0] += 0.02
    assert tested.longest_stall == 0.03
    clock[0] += 1000
    assert tested.is_here(one)
    tested.took_here(one, 30 * MS, somebody)
    clock[0] += 1.01
    learn(tested, one, 20 * US)
    assert tested.is_here(one), "after a good time it is a first offence again"


def test_a_stall_that_nobody_waited_for_is_none_unless_it_is_long(clock: list[float]) -> None:
    tested, one = alone_in_it(), call()
    learn(tested, one, 20 * US)
    assert tested.is_here(one)
    tested.took_here(one, 20 * US, nobody)
    tested.took_here(one, 11 * MS, nobody)
    assert tested.demotions == 0
    tested.took_here(one, 101 * MS, nobody)
    assert tested.demotions == 1
    assert tested.longest_stall == 0.101


def test_a_kind_that_gets_slower_leaves_the_dispatcher(clock: list[float]) -> None:
    tested, one = alone_in_it(), call()
    learn(tested, one, 20 * US)
    count = 0
    while tested.is_here(one):
        tested.took_here(one, 5 * MS, nobody)
        count += 1
    assert count < 8
    assert tested.demotions == 0
    for _ in range(200):
        tested.took_there(one, 20 * US)
    assert tested.is_here(one), "and comes back when it is fast again"


def test_handing_over_to_the_engine_costs_less(clock: list[float]) -> None:
    tested, one = alone_in_it(), call()
    learn(tested, one, 20 * US)
    assert tested.is_here(one)
    tested.took_here(one, 60 * US, nobody)
    assert tested.is_here(one, engine=True), "of a lone client"
    crowd(tested)
    assert tested.is_here(one)
    assert not tested.is_here(one, engine=True)


def test_a_call_that_waits_in_a_crowd_sends_its_kind_away_for_as_long_as_is_fair(
    clock: list[float],
) -> None:
    """So stalls take one part in 33 of the time at most, however short each is."""
    tested, one = alone_in_it(), call()
    learn(tested, one, 20 * US)
    for number in range(1, 4):
        assert tested.is_here(one)
        tested.took_here(one, 20 * US, nobody)
        crowd(tested)
        tested.took_here(one, 5 * MS, somebody)
        assert tested.demotions == number
        learn(tested, one, 20 * US)
        clock[0] += 0.159
        assert not tested.is_here(one)
        clock[0] += 0.002


class Usage(SimpleNamespace):
    ru_nvcsw = 7
    ru_utime = ru_stime = 1.0


def test_a_dispatcher_kept_off_the_cpu_by_its_clients_is_not_stalled(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker would be kept off it as well; what counts is how long it had it."""
    usage = Usage()
    tested, one, busy = alone_in_it(), call(), call(os.fsync)
    monkeypatch.setattr(pace, "_usage", lambda: Usage(**vars(usage)))

    def made(which: Call, takes: int, on_cpu: int) -> None:
        assert tested.is_here(which)
        tested.begins()
        usage.ru_utime += on_cpu / 1e9
        tested.took_here(which, takes, somebody)

    learn(tested, one, 20 * US)
    learn(tested, busy, 20 * US)
    crowd(tested)
    for number in range(100):
        made(one, 20 * MS if number % 2 else 20 * US, 20 * US)
    assert tested.demotions == 0
    assert tested.longest_stall == 0.02
    made(busy, 20 * MS, 150 * US)
    assert not tested.is_here(busy), "handing it over costs no more"
    made(one, 20 * MS, 2 * MS)
    assert tested.demotions == 1
    assert not tested.is_here(one)


def test_what_a_thread_has_waited_for_shows_in_its_figures() -> None:
    tested, one = alone_in_it(), call()
    for wait in (False, True):
        for _ in range(8):
            tested.took_there(one, 20 * US)
        assert tested.is_here(one)
        tested.took_here(one, 20 * US, nobody)
        crowd(tested)
        tested.begins()
        if wait:
            time.sleep(0.001)
        tested.took_here(one, 900 * MS, somebody)
        assert tested.demotions == wait


def test_a_method_is_one_kind_whatever_it_is_bound_to(clock: list[float]) -> None:
    class Listing:
        def read(self) -> None:
            pass

    tested = alone_in_it()
    for _ in range(100):
        tested.took_there(call(Listing().read), 10 * US)
    assert len(tested._kinds) == 1
    assert tested.is_here(call(Listing().read))


# In the driver


def second(scenario: Callable[[SecondModel], object], waiting: bool = False) -> None:
    """Run a scenario under the second model with a pace."""

    async def run(executor: Executor) -> None:
        assert isinstance(executor, SecondModel)
        executor.pace = alone_in_it()
        executor.has_waiting = lambda: waiting
        await scenario(executor)  # type: ignore[misc]

    drive("second", 4, run)


async def threads_of(executor: Executor, function: Callable[[], object], on: int) -> list[int]:
    """The threads on which a body found itself after each of two calls."""
    seen: list[int] = []

    async def body() -> None:
        for _ in range(2):
            await blocking(on, function)
            seen.append(threading.get_ident())

    await executor.run("body", body())
    return seen


def test_the_dispatcher_makes_what_is_short_and_hands_over_at_the_first_that_is_not() -> None:
    def short() -> None:
        pass

    def slow() -> None:
        time.sleep(0.02)

    async def scenario(executor: SecondModel) -> None:
        here = threading.get_ident()
        for _ in range(5):
            await threads_of(executor, short, INODE)
            await threads_of(executor, slow, INODE)
        assert await threads_of(executor, short, INODE) == [here, here]
        assert here not in await threads_of(executor, short, FOREIGN)
        assert here not in await threads_of(executor, slow, INODE)

        async def both() -> list[int]:
            seen = []
            for function in (short, slow, short):
                await blocking(INODE, function)
                seen.append(threading.get_ident())
            return seen

        first, then, last = await executor.run("both", both())
        assert first == here
        assert then == last != here, "the rest of a request stays with its worker"
        assert executor.answered["both"].crossings == 2

    second(scenario)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_waiting_request_tells_that_a_client_is_not_alone(waiting: bool) -> None:
    """Which is asked after a call that took long enough to matter."""

    def medium() -> None:
        time.sleep(0.0002)

    async def scenario(executor: SecondModel) -> None:
        here = threading.get_ident()
        stayed = 0
        for _ in range(60):
            stayed += (await threads_of(executor, medium, INODE)).count(here)
        if waiting:
            assert 1 <= stayed < 12, "one in a while"
        else:
            assert stayed > 80

    second(scenario, waiting)


def test_a_short_deferred_call_is_made_by_the_dispatcher_once_it_is_known_to_be_short() -> None:
    """Until then, and where a worker runs the body, it is left to workers."""
    seen: list[int] = []

    def short() -> None:
        seen.append(threading.get_ident())

    async def scenario(executor: SecondModel) -> None:
        here = threading.get_ident()

        async def body(at: int | None) -> None:
            await blocking(at, time.sleep, 0)
            count = len(seen)
            executor.defer_short(Call(INODE, short, ()))
            if at is not None and threading.get_ident() == here and count > 8:
                assert len(seen) == count + 1, "at once"

        for _ in range(9):
            await executor.run("body", body(INODE))
            await until(lambda: not executor._cleanups)
        assert here not in seen[:8]
        for _ in range(20):
            await executor.run("body", body(INODE))
        assert set(seen[-10:]) == {here}
        await executor.run("body", body(None))
        await until(lambda: seen[-1] != here)

    second(scenario)


def test_deferred_calls_wait_for_a_few_more_but_not_for_long() -> None:
    """A worker for each would cost more than the calls do."""
    seen: list[int] = []

    async def scenario(executor: SecondModel) -> None:
        here = threading.get_ident()

        async def leave() -> None:
            executor.defer(lambda: seen.append(threading.get_ident()))

        for _ in range(6):
            await executor.run("leave", leave())
        assert len(executor._cleanups) == 6
        assert not seen
        await until(lambda: len(seen) == 6)
        await until(lambda: not executor._batching)
        for _ in range(7):
            await executor.run("leave", leave())
        assert here not in seen
        await until(lambda: len(seen) == 13)

        await executor.run("leave", leave())

    second(scenario)
    assert len(seen) == 14, "what is left at the end is done, too"


@pytest.mark.parametrize(
    ("flags", "emptied", "stays"),
    [
        (os.O_RDONLY, False, True),
        (os.O_WRONLY, False, False),
        (os.O_RDONLY, True, False),
    ],
)
def test_closing_a_file_needs_no_worker_if_nothing_comes_of_it(
    tmp_path: Path, flags: int, emptied: bool, stays: bool
) -> None:
    """The last close may free blocks; one of a file written anew may write it to the disk."""
    (tmp_path / "file").touch()

    async def scenario(executor: SecondModel) -> None:
        session = Session(executor)
        await executor.run("attach", ops.attach(session, 1, str(tmp_path)))
        fid, _ = await executor.run("lookup", sequences.lookup(session, 1, b"file"))
        if emptied:
            truncation = sequences.setattr(session, fid.number, None, ops.Changes(size=0))
            await executor.run("setattr", truncation)
        await until(lambda: not executor._cleanups)
        left = 0
        for _ in range(40):
            handle = await executor.run("open", sequences.open_fid(session, fid.number, flags))
            await executor.run("release", ops.clunk(session, handle))
            left += bool(executor._cleanups)
            await until(lambda: not executor._cleanups)
        assert (left <= 8) == stays
        session.fids.clear()

    second(scenario)


def test_what_is_under_way_tells_it_too() -> None:
    gate = threading.Event()

    def medium() -> None:
        time.sleep(0.0002)

    async def stuck() -> None:
        await blocking(None, passed, gate)

    async def scenario(executor: SecondModel) -> None:
        async with trio.open_nursery() as nursery:
            await begin(nursery, executor, "stuck", stuck())
            for _ in range(30):
                await threads_of(executor, medium, INODE)
            gate.set()
        assert executor.answered["body"].on_dispatcher == 0

    second(scenario)


def test_the_form_that_never_blocks_is_tried_first() -> None:
    """Where it would block, a worker makes the call; another error is the answer."""
    calls: list[tuple[str, bool]] = []

    def would(code: int) -> int:
        calls.append(("quick", threading.get_ident() == here[0]))
        if code:
            raise OSError(code, os.strerror(code))
        return 1

    def does(code: int) -> int:
        calls.append(("blocking", threading.get_ident() == here[0]))
        return 2

    here: list[int] = []

    async def body(code: int) -> int:
        return await blocking_unless(FOREIGN, would, does, code)

    async def scenario(executor: SecondModel) -> None:
        here.append(threading.get_ident())
        assert await executor.run("body", body(0)) == 1
        assert calls == [("quick", True)]
        for code in (errno.EAGAIN, errno.EOPNOTSUPP):
            calls.clear()
            assert await executor.run("body", body(code)) == 2
            assert calls == [("quick", True), ("blocking", False)]
        with pytest.raises(OSError, match="Input/output error"):
            await executor.run("body", body(errno.EIO))

    second(scenario)


# Reads that do not block


def drop_from_cache(fd: int, offset: int, length: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize(
    ("offset", "count", "expected"),
    [(0, 100, 100), (8000, 4096, 192), (8192, 10, 0), (1 << 40, 10, 0), (0, 1 << 20, 8192)],
)
def test_a_read_of_what_is_cached_never_blocks(
    tmp_path: Path, offset: int, count: int, expected: int
) -> None:
    """To the end of the file, and beyond it."""
    content = os.urandom(8192)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        assert file.read() == content
        try:
            data = io._read_now(file.fileno(), count, offset)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                pytest.skip("the file system of the tests has no non-blocking reads")
            raise
    assert data == content[offset : offset + count]
    assert len(data) == expected


def test_a_read_of_what_is_cached_in_part_is_no_short_read(tmp_path: Path) -> None:
    """The kernel would take it for the end of the file."""
    size = 4 << 20
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        drop_from_cache(fd, size // 2, size // 2)
        try:
            os.preadv(fd, [bytearray(10)], size - 10, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                pytest.skip(f"the file system of the tests answers {error.strerror}")
        else:
            pytest.skip("the file system of the tests keeps all in memory")
        with pytest.raises(BlockingIOError):
            io._read_now(fd, size, 0)
        assert io._read_fully(fd, size, 0) == b"x" * size
    finally:
        os.close(fd)


def test_a_fuse_file_system_is_not_local_and_the_tests_own_is(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert is_local(fd)
    finally:
        os.close(fd)
    fd = os.open("/proc", os.O_PATH)
    try:
        assert not is_local(fd)
    finally:
        os.close(fd)
