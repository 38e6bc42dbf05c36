"""Bodies that try again after a while, and files on which somebody holds a lease."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
from helpers_executor import PATIENCE, answer, begin, drive, passed, until
from mounting import Child, Mount, errno_of, wait_until
from ops_helpers import ROOT, fails

from ninefuse import ops
from ninefuse.calls import Later
from ninefuse.driving import clock, patience
from ninefuse.driving import driver as driver_module
from ninefuse.driving.clock import Clock
from ninefuse.driving.patience import TICK, Patience, Ticket
from ninefuse.executor import Executor
from ninefuse.fuse import callbacks
from ninefuse.linux.callers import Caller
from ninefuse.tree import session
from ninefuse.tree.qids import is_on_own_device
from ninefuse.tree.session import Session, patiently
from ninefuse.tree.table import Fid

ME = Caller(os.geteuid(), os.getegid())


def test_what_waits_goes_on_and_the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SPARE_TIME", 0.1)
    waiting, events = Patience(Clock()), [threading.Event() for _ in range(3)]
    before = threading.active_count()
    for event in events:
        waiting.wait(event.set, 1001)
    for event in events:
        passed(event)
    deadline = time.monotonic() + PATIENCE
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(waiting) == 0
    again = threading.Event()
    waiting.wait(again.set, None)
    passed(again)


def test_a_user_with_many_keeps_no_other_waiting() -> None:
    """Few of each are let go on in a tick, in turn."""
    waiting, order, over = Patience(Clock()), [], threading.Event()

    def note(user: int) -> Callable[[], None]:
        def resumed() -> None:
            order.append(user)
            if len(order) == 102:
                over.set()

        return resumed

    for _ in range(100):
        waiting.wait(note(1001), 1001)
    for _ in range(2):
        waiting.wait(note(1002), 1002)
    passed(over)
    first = Counter(order[: patience._AT_ONCE + 2])
    assert first == {1001: patience._AT_ONCE, 1002: 2}


def test_without_a_thread_the_next_that_waits_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, first, second = Patience(Clock()), threading.Event(), threading.Event()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        waiting.wait(first.set, None)
    assert not first.wait(2 * patience.TICK)
    waiting.wait(second.set, None)
    passed(first)
    passed(second)


def test_without_a_thread_deferred_calls_are_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the next ones in their time."""
    start = threading.Thread.start
    closed: list[int] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "clock":
            raise RuntimeError("can't start new thread")
        start(thread)

    async def deferring(executor: Executor, number: int) -> None:
        executor.defer(closed.append, number)

    async def scenario(executor: Executor) -> None:
        executor.is_near = is_on_own_device  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            await answer(executor, "release", deferring(executor, 1))
            await until(lambda: closed == [1])
        await answer(executor, "release", deferring(executor, 2))
        await until(lambda: closed == [1, 2])

    drive("second", 1, scenario)


def test_at_the_end_all_goes_on_at_once() -> None:
    ticking = Clock()
    waiting, left = Patience(ticking), list[int]()
    before = threading.active_count()
    for number in range(100):
        waiting.wait(partial(left.append, number), 1001)
    waiting.close()
    ticking.close()
    assert sorted(left) == list(range(100))
    assert threading.active_count() == before


def test_where_it_is_worth_trying_all_go_on_soon() -> None:
    """Twice as many each time, as long as some need not come again."""
    waiting, left, over = Patience(Clock()), [5000], threading.Event()

    def resumed() -> None:
        waiting.ended(1001)
        left[0] -= 1
        if not left[0]:
            over.set()

    since = time.monotonic()
    for _ in range(5000):
        waiting.wait(resumed, 1001)
    passed(over)
    assert time.monotonic() - since < 100 * patience.TICK, "eight at a time would take 31 s"


def test_what_is_taken_is_not_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what ends early is resumed once; neither keeps the ticking going."""
    ticking = Clock()
    waiting, resumed, over = Patience(ticking), list[int](), threading.Event()
    tickets = [Ticket(partial(resumed.append, number), 1001) for number in range(20)]
    for ticket in tickets:
        assert waiting.queue(ticket, 10 * TICK if ticket in tickets[10:] else TICK)
    assert len(waiting) == 20
    for ticket in tickets[::2]:
        assert waiting.take(ticket)
        assert not waiting.take(ticket)
    for ticket in tickets[1::2]:
        waiting.end(ticket)
        waiting.end(ticket)
        assert not waiting.take(ticket)
    assert resumed == list(range(1, 20, 2))
    assert len(waiting) == 0
    waiting.wait(over.set, 1001)
    passed(over)
    deadline = time.monotonic() + PATIENCE
    while waiting._is_ticking:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ticking.close()
    assert len(resumed) == 10


def test_what_has_ended_before_it_waits_does_not_wait() -> None:
    waiting, resumed = Patience(Clock()), list[int]()
    ticket = Ticket(partial(resumed.append, 1), None)
    assert not waiting.take(ticket)
    waiting.end(ticket)
    assert not waiting.queue(ticket, TICK)
    waiting.close()
    assert not resumed


def test_pauses_grow_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for what nobody tells of asks seldom, but four times a second."""
    pauses: list[float] = []
    queue = Patience.queue

    def noted(waiting: Patience, ticket: Ticket, pause: float) -> bool:
        pauses.append(pause)
        return queue(waiting, ticket, 0)

    monkeypatch.setattr(Patience, "queue", noted)

    async def body() -> None:
        for tries in (*range(6), 10_000):
            await Later(tries=tries)

    async def scenario(executor: Executor) -> None:
        await answer(executor, "open", body())

    drive("second", 1, scenario)
    assert pauses == [0.05, 0.1, 0.2, 0.25, 0.25, 0.25, 0.25]


def test_what_waits_for_longer_is_not_resumed_before() -> None:
    waiting, long, short = Patience(Clock()), threading.Event(), threading.Event()
    since = time.monotonic()
    waiting.queue(Ticket(long.set, None), 6 * TICK)
    waiting.queue(Ticket(short.set, None), TICK)
    passed(short)
    assert not long.is_set()
    passed(long)
    assert time.monotonic() - since >= 6 * TICK


@pytest.mark.parametrize("model", ["none", "first", "second"])
def test_a_body_tries_until_it_succeeds(model: str) -> None:
    """And, under a threading model, keeps no thread meanwhile."""
    tries = [0]

    async def ask() -> str:
        tries[0] += 1
        if tries[0] < 4:
            raise BlockingIOError(errno.EAGAIN, "a lease")
        return "done"

    async def scenario(executor: Executor) -> None:
        assert await answer(executor, "open", patiently(ask)) == "done"

    drive(model, 1, scenario)
    assert tries == [4]


def test_it_gives_up_where_nobody_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server below the source may answer EAGAIN for ever."""
    monkeypatch.setattr(session, "_GRACE", 0.2)
    monkeypatch.setattr(session, "_break_time", 0)

    async def ask() -> None:
        raise BlockingIOError(errno.EAGAIN, "for ever")

    async def scenario(executor: Executor) -> None:
        with fails(errno.EAGAIN):
            await answer(executor, "open", patiently(ask))

    drive("second", 1, scenario)


def test_a_request_that_waits_says_so() -> None:
    gate = [False]

    async def waiter() -> None:
        while not gate[0]:
            await Later()

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            await begin(nursery, executor, "open", waiter())
            assert any("waits for another try" in line for line in executor.slow_requests(0))
            gate[0] = True

    drive("second", 1, scenario)


@pytest.mark.parametrize("model", ["first", "second"])
def test_so_many_may_wait(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a user, and in all; beyond, EAGAIN. Who has done something already waits all the same."""
    monkeypatch.setattr(driver_module, "MOST_REQUESTS", 2)
    monkeypatch.setattr(driver_module, "MOST_WAITS", 4)
    gate = [False]

    async def waiter(is_withdrawable: bool = True) -> str:
        while not gate[0]:
            await Later(is_withdrawable=is_withdrawable)
        return "went on"

    async def scenario(executor: Executor) -> None:
        outcomes: list[object] = []

        async def one(user: int, is_withdrawable: bool = True) -> None:
            try:
                body = waiter(is_withdrawable)
                outcomes.append(await answer(executor, "waiter", body, user))
            except BlockingIOError as refused:
                outcomes.append(refused.errno)

        async with trio.open_nursery() as nursery:
            for number in range(1, 3):
                nursery.start_soon(one, 1001)
                await until(lambda: executor.waiting == number)  # noqa: B023
            await one(1001)
            assert outcomes == [errno.EAGAIN]
            assert not executor.has_too_many(1001), "they are counted apart"
            nursery.start_soon(one, 1001, False)
            await until(lambda: executor.waiting == 3)
            nursery.start_soon(one, 1002)
            await until(lambda: executor.waiting == 4)
            for user in (1002, 0):
                await one(user)
            assert outcomes == [errno.EAGAIN] * 3
            gate[0] = True
        assert outcomes[3:] == ["went on"] * 4
        assert executor.waiting == 0
        assert not executor._users
        assert not executor._waits

    drive(model, 2, scenario)


# Leases


class Leased:
    """A file on which this process holds a lease."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"data")
        self._fd = os.open(path, os.O_RDWR)
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def give_back(self) -> None:
        # Children that were forked meanwhile have the descriptor, too.
        if self._fd >= 0:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.close(self._fd)
            self._fd = -1


@pytest.fixture
def lease() -> Iterator[Callable[[Path], Leased]]:
    """Makes files with leases; who wants one of them is heard of, and left waiting."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    made: list[Leased] = []

    def make(path: Path) -> Leased:
        made.append(Leased(path))
        return made[-1]

    yield make
    for leased in made:
        leased.give_back()
    signal.signal(signal.SIGIO, before)


async def looked_up(executor: Executor, model: str, top: Path) -> tuple[Session, Fid]:
    """A session on a directory, and the fid of the file in it."""
    if model == "second-local":
        executor.is_near = is_on_own_device  # type: ignore[attr-defined]
    session = Session(executor)
    await answer(executor, "attach", ops.attach(session, ROOT, str(top)))
    fid, _ = await answer(executor, "lookup", callbacks.lookup(session, ROOT, b"file"))
    return session, fid


@pytest.mark.parametrize("model", ["first", "second", "second-local"])
@pytest.mark.parametrize("what", ["open", "open to empty", "truncate"])
def test_a_lease_keeps_no_worker(
    lease: Callable[[Path], Leased], tmp_path: Path, model: str, what: str
) -> None:
    """Nor anybody but who wants the file, on a pool of one thread; he has it in the end."""

    leased = lease(tmp_path / "file")

    async def scenario(executor: Executor) -> None:
        session, fid = await looked_up(executor, model, tmp_path)
        if what == "truncate":
            changes = ops.Changes(size=0)
            body = callbacks.setattr(session, fid.number, None, changes)
        else:
            flags = os.O_RDWR | (os.O_TRUNC if "empty" in what else 0)
            body = callbacks.open(session, fid.number, flags, ME)  # type: ignore[assignment]
        async with trio.open_nursery() as nursery:
            opening = await begin(nursery, executor, "open", body)
            for _ in range(20):
                await answer(executor, "getattr", ops.getattr(session, ROOT))
                await answer(executor, "mkdir", ops.mkdir(session, ROOT, b"d%d" % _, 0o755))
            assert not opening.over
            leased.give_back()
            await until(lambda: opening.over)
            assert opening.error is None
        session.fids.clear()

    drive(model.partition("-")[0], 1, scenario)


@pytest.mark.parametrize("model", ["first", "second", "second-local"])
@pytest.mark.parametrize("what", ["open", "open to empty", "truncate", "chmod and truncate"])
def test_who_waits_for_a_lease_may_be_withdrawn(
    lease: Callable[[Path], Leased], tmp_path: Path, model: str, what: str
) -> None:
    """EINTR, and nothing is left of it; not where a part has been done already."""
    leased = lease(tmp_path / "file")

    async def scenario(executor: Executor) -> None:
        session, fid = await looked_up(executor, model, tmp_path)
        before = len(session.fids)
        if "truncate" in what:
            changes = ops.Changes(mode=0o600 if "chmod" in what else None, size=0)
            body = ops.setattr(session, fid.number, changes)
        else:
            flags = os.O_RDWR | (os.O_TRUNC if "empty" in what else 0)
            body = callbacks.open(session, fid.number, flags, ME)  # type: ignore[assignment]
        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "waiter", body)
            request = next(r for r in executor.requests.values() if r.name == "waiter")
            await until(lambda: request.waits is not None)
            executor.withdraw(request)
            if "chmod" in what:
                await trio.sleep(3 * TICK)
                assert not outcome.over
                leased.give_back()
            await until(lambda: outcome.over)
        leased.give_back()
        assert isinstance(outcome.error, InterruptedError) == ("chmod" not in what)
        assert leased.path.read_bytes() == (b"" if "chmod" in what else b"data")
        assert len(session.fids) == before
        await until(lambda: not session.fids.open_descriptors)
        session.fids.clear()

    drive(model.partition("-")[0], 1, scenario)


def test_who_opens_a_leased_file_without_waiting_is_told(
    new_mount: Callable[..., Mount], lease: Callable[[Path], Leased]
) -> None:
    """EAGAIN at once (open(2), O_NONBLOCK); and the lease is being broken, as on the source."""
    mount = new_mount()
    path = mount.path / "file"
    leased = lease(mount.source / "file")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
        with Child(errno_of, os.open, path, flags | os.O_NONBLOCK) as opening:
            assert opening.result() == errno.EAGAIN
    leased.give_back()
    with Child(path.read_bytes) as reading:
        assert reading.result() == b"data"


def test_opening_leased_files_on_a_mount_stops_nobody(
    new_mount: Callable[..., Mount], lease: Callable[[Path], Leased]
) -> None:
    """More of them than there are workers; and each is opened when its lease is given back."""
    mount = new_mount("--threads", "2")
    held = [lease(mount.source / f"leased{number}") for number in range(8)]
    with ExitStack() as stack:
        children = [
            stack.enter_context(Child((mount.path / leased.path.name).read_bytes))
            for leased in held
        ]
        wait_until(lambda: mount.counters().under_way >= 8, "eight opens under way")
        for number in range(20):
            (mount.path / f"new{number}").write_bytes(b"new")
            assert (mount.source / f"new{number}").read_bytes() == b"new"
        assert not any(child.done() for child in children)
        for leased in held:
            leased.give_back()
        assert [child.result() for child in children] == [b"data"] * 8
