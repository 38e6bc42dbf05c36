"""The engine that makes calls through io_uring, beneath the second model."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from helpers_executor import answer, drive
from helpers_executor import engine as engine
from mounting import Mount, wait_until
from ops_helpers import needs_root

from ninefuse import executor, ops
from ninefuse.calls import Call, Fsync, FunctionCall, Pread, Pwrite, blocking
from ninefuse.driving import uring
from ninefuse.driving.uring import PLACES, Refused, Uring
from ninefuse.executor import Executor, Request, SecondModel
from ninefuse.fuse import callbacks
from ninefuse.linux import capabilities, credentials, transfer
from ninefuse.linux.callers import Caller
from ninefuse.tree.qids import is_on_own_device
from ninefuse.tree.session import Session

T = TypeVar("T")

ME = Caller(os.geteuid(), os.getegid())
SOMEBODY = Caller(12345, 23456)


def would_wait(*args: object) -> bytes:
    """In the place of `transfer.read_now`: nothing is in the page cache."""
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


async def body_of(call: Call[T]) -> T:
    """A body of one call."""
    return await call


def through(
    engine: Uring, source: Path, scenario: Callable[[SecondModel, Session], Any]
) -> SecondModel:
    """Run a scenario on a session of a directory, whose calls the engine makes; the driver."""
    drivers = []

    async def run(driver: Executor) -> None:
        assert isinstance(driver, SecondModel)
        driver.is_near, driver.uring = is_on_own_device, engine
        session = Session(driver)
        drivers.append(driver)
        root = os.open(source, os.O_PATH | os.O_DIRECTORY)
        try:
            await answer(driver, "attach", ops.attach(session, 1, root))
            await scenario(driver, session)
        finally:
            session.fids.clear()
            os.close(root)

    drive("second", 2, run)
    return drivers[0]


async def create(
    driver: SecondModel, session: Session, name: bytes, flags: int = 0, caller: Caller = ME
) -> int:
    body = callbacks.create(session, 1, name, os.O_RDWR | flags, 0o600, caller)
    handle, _, _ = await answer(driver, "create", body)
    return handle.number


def test_reads_writes_and_syncs_do_what_they_do_on_workers(
    engine: Uring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of random reads and writes, beside one in memory; no thread is crossed."""
    rng = random.Random(4)
    model = bytearray()

    monkeypatch.setattr(transfer, "read_now", would_wait)
    monkeypatch.setattr(executor, "STUCK", 60)  # on no machine does a worker take over

    async def scenario(driver: SecondModel, session: Session) -> None:
        handle = await create(driver, session, b"file", os.O_DSYNC)
        for number in range(200):
            offset, size = rng.randrange(20_000), rng.randrange(1, 9000)
            if number % 2:
                data = rng.randbytes(size)
                if offset > len(model):
                    model.extend(bytes(offset - len(model)))
                model[offset : offset + size] = data
                write = ops.write(session, handle, offset, data)
                assert await answer(driver, "write", write) == size
            else:
                read = ops.read(session, handle, offset, size)
                assert await answer(driver, "read", read) == model[offset : offset + size]
        await answer(driver, "fsync", ops.fsync(session, handle, datasync=False))
        await answer(driver, "fsync", ops.fsync(session, handle, datasync=True))
        for name in ("read", "write", "fsync"):
            answered = driver.answered[name]
            assert answered.on_dispatcher == answered.count, name

    before = engine.count
    through(engine, tmp_path, scenario)
    assert (tmp_path / "file").read_bytes() == model
    assert engine.count - before >= 202


def test_many_at_once(engine: Uring, tmp_path: Path) -> None:
    """More than the queue has entries; each gets its own answer."""

    async def scenario(driver: SecondModel, session: Session) -> None:
        handle = await create(driver, session, b"file")

        async def write(number: int) -> None:
            data = b"%07d\n" % number
            body = ops.write(session, handle, 8 * number, data)
            assert await answer(driver, "write", body) == 8

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(write, number)

    through(engine, tmp_path, scenario)
    lines = (tmp_path / "file").read_bytes().split()
    assert lines == [b"%07d" % number for number in range(1000)]


@pytest.mark.parametrize(
    ("kind", "arguments"), [(Pread, (10, 0)), (Pwrite, (b"x", 0)), (Fsync, ())]
)
def test_errors_come_back_as_they_are(
    engine: Uring,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[..., Call[Any]],
    arguments: tuple[Any, ...],
) -> None:
    monkeypatch.setattr(transfer, "read_now", would_wait)

    async def scenario(driver: SecondModel, session: Session) -> None:
        fd = os.open(tmp_path, os.O_PATH)  # which can do none of it
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                await answer(driver, "call", body_of(kind(7, fd, *arguments)))
        finally:
            os.close(fd)

    before = engine.count
    through(engine, tmp_path, scenario)
    assert engine.count == before + 1


class Sly:
    """An engine whose calls are done after a look at it, and before that is drained."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._queued: list[Request] = []
        self._done: list[Request] = []

    def takes(self, call: Call[Any]) -> bool:
        return isinstance(call, Fsync)

    def start(self, request: Request) -> bool:
        self._queued.append(request)
        os.eventfd_write(self.fd, 1)
        return True

    def drain(self) -> None:
        for request in self._queued:
            request.call = None
        self._done, self._queued = self._queued, []
        os.eventfd_read(self.fd)

    def done(self) -> list[Request]:
        done, self._done = self._done, []
        return done

    def submit(self) -> None:
        pass

    def has_waiting(self) -> bool:
        return False

    def close(self) -> None:
        os.close(self.fd)


def test_what_is_done_between_the_look_and_the_draining_is_seen() -> None:
    """Nothing else would wake the dispatcher for it."""

    async def scenario(driver: Executor) -> None:
        assert isinstance(driver, SecondModel)
        driver.is_near, driver.uring = is_on_own_device, Sly()  # type: ignore[assignment]
        for _ in range(3):
            await answer(driver, "fsync", body_of(Fsync(7, 3)))

    drive("second", 1, scenario)


def test_calls_on_other_devices_go_to_workers(engine: Uring, tmp_path: Path) -> None:
    """So do those that have no form for it."""

    async def scenario(driver: SecondModel, session: Session) -> None:
        fd = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
        try:
            foreign = 1 << 52 | 7
            await answer(driver, "foreign", body_of(Fsync(foreign, fd)))
            await answer(driver, "other", body_of(blocking(7, os.fstat, fd)))
        finally:
            os.close(fd)
        for name in ("foreign", "other"):
            assert driver.answered[name].crossings == 2

    before = engine.count
    through(engine, tmp_path, scenario)
    assert engine.count == before


# Writes for a caller


def rights() -> list[str]:
    """The ids, groups and capabilities of the calling thread."""
    with open("/proc/thread-self/status") as status:
        return [line for line in status if line.startswith(("Uid", "Gid", "Groups", "Cap"))]


@pytest.fixture
def settled() -> Iterator[None]:
    """As a daemon: without the right to keep set-id bits."""
    before = capabilities.get_capabilities()
    capabilities.settle()
    settled = rights()
    yield
    assert rights() == settled
    capabilities.set_capabilities(before)


@needs_root
@pytest.mark.parametrize("flags", [0, os.O_SYNC, os.O_APPEND])
@pytest.mark.usefixtures("settled")
def test_a_write_for_a_caller_takes_no_worker(engine: Uring, tmp_path: Path, flags: int) -> None:
    """And the thread's own rights are what they were."""
    tmp_path.chmod(0o777)

    async def scenario(driver: SecondModel, session: Session) -> None:
        handle = await create(driver, session, b"file", flags, SOMEBODY)
        for number in range(5):
            assert await answer(driver, "write", ops.write(session, handle, number, b"x")) == 1
        answered = driver.answered["write"]
        assert answered.on_dispatcher == answered.count == 5

    before = engine.count
    through(engine, tmp_path, scenario)
    assert engine.count == before + 5
    assert (tmp_path / "file").read_bytes() == b"xxxxx"


@needs_root
@pytest.mark.parametrize(
    ("mode", "caller", "left"),
    [
        (0o6777, SOMEBODY, 0o777),
        # A mark stays when one of the file's group writes, and only then.
        (0o2646, Caller(12345, 777), 0o2646),
        (0o2646, SOMEBODY, 0o646),
        (0o2646, Caller(12345, 0), 0o646),
    ],
)
@pytest.mark.usefixtures("settled")
def test_set_id_bits_are_as_after_the_callers_own_write(
    engine: Uring, tmp_path: Path, mode: int, caller: Caller, left: int
) -> None:
    path = tmp_path / "file"

    def make() -> None:
        path.touch()
        os.chown(path, caller.uid, 777)
        with credentials.acting_as(None, bits=True):
            path.chmod(mode)

    async def scenario(driver: SecondModel, session: Session) -> None:
        await answer(driver, "walk", ops.walk(session, 1, 7, [b"file"]))
        await answer(driver, "lopen", ops.lopen(session, 7, os.O_WRONLY, caller))
        assert await answer(driver, "write", ops.write(session, 7, 0, b"new")) == 3

    make()
    with credentials.acting_as(caller):  # what the kernel does for its own write
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"new")
        os.close(fd)
    assert path.stat().st_mode & 0o7777 == left
    path.unlink()
    make()
    before = engine.count
    through(engine, tmp_path, scenario)
    assert engine.count == before + 1
    assert path.stat().st_mode & 0o7777 == left


@needs_root
@pytest.mark.usefixtures("settled")
def test_few_personalities_are_kept(
    engine: Uring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may go while a write with it is queued and the kernel has not heard of it yet."""
    monkeypatch.setattr(uring, "PERSONALITIES", 2)
    tmp_path.chmod(0o777)
    users = [Caller(1000 + number, 2000) for number in range(6)]

    async def scenario(driver: SecondModel, session: Session) -> None:
        handles = []
        for user in users:
            name = str(user.uid).encode()
            handles.append(await create(driver, session, name, 0, user))
            (tmp_path / str(user.uid)).chmod(0o4777)

        async def write(handle: int) -> None:
            for number in range(4):
                assert await answer(driver, "write", ops.write(session, handle, number, b"x")) == 1

        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(write, handle)
        answered = driver.answered["write"]
        assert answered.on_dispatcher == answered.count == 4 * len(users)

    through(engine, tmp_path, scenario)
    assert len(engine._personalities) == 2
    for user in users:
        assert (tmp_path / str(user.uid)).read_bytes() == b"xxxx"
        assert not (tmp_path / str(user.uid)).stat().st_mode & 0o4000


@needs_root
@pytest.mark.usefixtures("settled")
def test_where_the_kernel_keeps_no_rights_a_worker_writes(engine: Uring, tmp_path: Path) -> None:
    """Never with others."""
    tmp_path.chmod(0o777)

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def register_personality(self) -> int:
            raise OSError(errno.ENOSPC, "no room")

    async def scenario(driver: SecondModel, session: Session) -> None:
        handle = await create(driver, session, b"file", 0, SOMEBODY)
        assert await answer(driver, "write", ops.write(session, handle, 0, b"x")) == 1
        assert driver.answered["write"].crossings == 2

    real = engine._ring
    engine._ring = Refusing()  # type: ignore[assignment]
    try:
        through(engine, tmp_path, scenario)
    finally:
        engine._ring = real
    assert (tmp_path / "file").read_bytes() == b"x"


@needs_root
def test_what_waited_for_a_place_and_is_refused_rights_is_left_to_a_worker(
    engine: Uring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uring, "PLACES", 1)
    first, second = writing(None), writing(None)
    second.call = Pwrite(7, 3, b"x", 0, False, SOMEBODY)
    real, engine._ring = engine._ring, FakeRing(1)  # type: ignore[assignment]
    try:
        assert engine.start(first)
        assert engine.start(second)
        assert engine.has_waiting()
        monkeypatch.setattr(uring, "registered_as", fail)
        assert engine.done() == [first, second]
    finally:
        engine._ring = real
    assert first.call is None
    assert second.call is not None, "a worker is to make it"


def fail(*_: object) -> int:
    raise OSError(errno.ENOMEM, "no memory")


# Results that leave something to do


class FakeRing:
    """A ring whose completions a test makes up."""

    def __init__(self, result: int, data: bytes | None = None) -> None:
        self.in_flight = 1
        self._completion = (result, data)
        self._token: object = None

    def read(self, token: object, *rest: object) -> None:
        self._token = token

    write = fsync = read

    def register_personality(self) -> int:
        return 1

    def reap(self) -> list[tuple[object, int, bytes | None]]:
        self.in_flight = 0
        return [(self._token, *self._completion)]


@pytest.mark.parametrize(
    ("kind", "arguments", "result", "data", "expected"),
    [
        # Nothing was done: a worker does it.
        *(
            (Pwrite, (b"12345", 0), -code, None, None)
            for code in (errno.EAGAIN, errno.EINTR, errno.ECANCELED, errno.ENOMEM)
        ),
        (Fsync, (), -errno.ECANCELED, None, None),
        # It may not be done with a caller's rights here, or the kernel does not know them.
        *(
            (Pwrite, (b"12345", 0, durable, ME), -code, None, None)
            for code in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EAGAIN)
            for durable in (False, True)
        ),
        # Too little was done, though there is more.
        (Pwrite, (b"12345", 0), 3, None, None),
        (Pwrite, (b"12345", 0), 0, None, None),
        (Pwrite, (b"12345", 0, False, ME), 3, None, None),
        (Pread, (5, 0), 3, b"hel", None),
        (Pread, (5, 3), 0, b"", None),
        # All of it.
        (Pwrite, (b"12345", 0), 5, None, 5),
        (Pwrite, (b"12345", 0, False, ME), 5, None, 5),
        (Pread, (5, 0), 5, b"hello", b"hello"),
        # The end of the file.
        (Pread, (9, 3), 7, b"lo world", b"lo world"),
        (Pread, (9, 10), 0, b"", b""),
        (Fsync, (), 0, None, "None"),
    ],
)
def test_what_a_short_result_means(
    engine: Uring,
    tmp_path: Path,
    kind: Callable[..., Call[Any]],
    arguments: tuple[Any, ...],
    result: int,
    data: bytes | None,
    expected: object,
) -> None:
    """The kernel takes a short read for the end of the file, so it must be that."""
    path = tmp_path / "file"
    path.write_bytes(b"helloworld")
    with open(path, "rb") as file:
        request = Request(1, "call", ops.clunk(Session(SecondModel(1)), 1))
        request.call = kind(7, file.fileno(), *arguments)
        real, engine._ring = engine._ring, FakeRing(result, data)  # type: ignore[assignment]
        try:
            engine.start(request)
            assert engine.done() == [request]
        finally:
            engine._ring = real
    left = request.call is not None
    assert left == (expected is None), "a worker is to make it again"
    if not left:
        assert request.result() == (None if expected == "None" else expected)
    request.body.close()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Fsync, ()),
        (partial(Fsync, data_only=True), ()),
        (Pwrite, (b"12345", 0, True)),
        (Pwrite, (b"12345", 0, True, ME)),
    ],
)
def test_what_a_sync_says_is_said_once_and_not_asked_again(
    engine: Uring, tmp_path: Path, kind: Callable[..., Call[Any]], arguments: tuple[Any, ...]
) -> None:
    """ENOMEM of writing back, say: a worker that syncs again would be told that all is well."""
    with open(tmp_path / "file", "wb") as file:
        request = Request(1, "call", ops.clunk(Session(SecondModel(1)), 1))
        request.call = kind(7, file.fileno(), *arguments)
        real, engine._ring = engine._ring, FakeRing(-errno.ENOMEM)  # type: ignore[assignment]
        try:
            engine.start(request)
            assert engine.done() == [request]
        finally:
            engine._ring = real
    left = request.call is not None
    assert not left, "a worker is to make it again"
    with pytest.raises(OSError, match="Cannot allocate memory"):
        request.result()
    request.body.close()


@pytest.mark.parametrize("flags", [0, os.O_APPEND])
@pytest.mark.parametrize("done", [0, 2, 4])
@pytest.mark.parametrize("caller", [None, SOMEBODY])
def test_after_a_short_write_only_the_rest_is_written(
    engine: Uring,
    tmp_path: Path,
    done: int,
    flags: int,
    caller: Caller | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once more from the start would append what is there already. It is the caller's, too."""
    path = tmp_path / "file"
    spent = []

    def spend(writer: Caller, group: int | None, function: Callable[..., Any], *args: Any) -> Any:
        spent.append((writer, group))
        return function(*args)

    def spend_once(writer: Caller, group: int | None, *args: Any) -> Any:
        return spend(writer, group, os.pwrite, *args)

    monkeypatch.setattr(transfer, "spending_as", spend)
    monkeypatch.setattr(transfer, "pwrite_as", spend_once)
    monkeypatch.setattr(uring, "registered_as", lambda writer, group, register: register())
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | flags, 0o600)
    try:
        os.write(fd, b"12345"[:done])  # what the kernel did
        request = Request(1, "write", ops.clunk(Session(SecondModel(1)), 1))
        rights = () if caller is None else (caller, 5)
        request.call = Pwrite(7, fd, b"12345", 0, False, *rights)
        real, engine._ring = engine._ring, FakeRing(done)  # type: ignore[assignment]
        try:
            engine.start(request)
            assert engine.done() == [request]
        finally:
            engine._ring = real
        request.perform()  # as a worker does
        assert request.result() == 5
        assert spent == ([] if caller is None else [(caller, 5)])
    finally:
        os.close(fd)
    assert path.read_bytes() == b"12345"
    request.body.close()


# Where there is none


def test_without_the_module_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninefuse.driving._ring", None)
    with pytest.raises(Refused, match="built without"):
        Uring()


WITHOUT = (
    sys.executable,
    "-c",
    "import sys; sys.modules['ninefuse.driving._ring'] = None\n"
    "from ninefuse.command import cli; sys.exit(cli.main())",
)


def test_a_mount_without_it_uses_workers_and_says_so_once(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "handover=request", command=WITHOUT)
    (mount.path / "file").write_bytes(b"x")
    assert mount.log.text().count("no io_uring, workers instead: ninefuse was built without") == 1


def test_a_mount_that_insists_on_it_is_refused(new_mount: Callable[..., Mount]) -> None:
    with pytest.raises(AssertionError, match="ended with 2:\n.*--engine uring: ninefuse was built"):
        new_mount("--engine", "uring", command=WITHOUT)


def test_with_it_synchronous_writes_cross_no_threads(
    engine: Uring, new_mount: Callable[..., Mount]
) -> None:
    mount = new_mount("--engine", "uring")
    fd = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY | os.O_DSYNC, 0o600)
    try:
        for _ in range(50):
            os.write(fd, b"x" * 4096)
    finally:
        os.close(fd)
    found = json.loads(os.getxattr(mount.path, "user.ninefuse.stats"))
    assert found["operations"]["write"] | {"errors": {}, "latency_us": {}} == {
        "count": 50,
        "on_dispatcher": 50,
        "crossings": 0,
        "errors": {},
        "latency_us": {},
    }
    assert (mount.source / "file").stat().st_size == 50 * 4096


# Shares


class HoldingRing:
    """A ring whose calls come back when a test lets them.

    Attributes:
        lacks: what the kernel has none of, as an error; None: it takes all.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.tokens: list[object] = []
        self.back: list[tuple[object, int, bytes | None]] = []
        self.cancelled = 0
        self.submitted = 0
        self.lacks: Exception | None = None

    def submit(self) -> None:
        if self.lacks is not None:
            raise self.lacks
        self.submitted = len(self.tokens)

    def cancel_writes(self) -> None:
        self.cancelled += 1
        self.submit()

    def write(self, token: object, *rest: object) -> None:
        if isinstance(self.lacks, MemoryError):
            raise self.lacks
        self.tokens.append(token)
        self.in_flight += 1

    def reap(self) -> list[tuple[object, int, bytes | None]]:
        back, self.back = self.back, []
        self.in_flight -= len(back)
        return back

    read = fsync = write

    def let_go(self, request: Request, result: int = 1, data: bytes | None = None) -> None:
        self.tokens.remove(request)
        self.back.append((request, result, data))

    def close(self) -> None:
        pass


@pytest.fixture
def holding() -> tuple[Uring, HoldingRing]:
    try:
        engine = Uring(by_user=True)
    except Refused as reason:
        pytest.skip(f"no io_uring here: {reason}")
    engine._ring.close()
    ring = HoldingRing()
    engine._ring = ring  # type: ignore[assignment]
    return engine, ring


def asking(call: Call[Any], user: int | None) -> Request:
    """A request that asks for a call."""
    body = ops.clunk(Session(SecondModel(1)), 1)
    body.close()
    request = Request(1, "any", body, user)
    request.call = call
    return request


def writing(user: int | None) -> Request:
    """A request that is about to write."""
    return asking(Pwrite(7, 3, b"x", 0), user)


def syncing(user: int | None) -> Request:
    """A request that is about to sync."""
    return asking(Fsync(7, 3), user)


def test_a_user_has_at_most_half_of_the_places(holding: tuple[Uring, HoldingRing]) -> None:
    """What exceeds it waits, and is left to the workers when nothing of his comes back."""
    engine, ring = holding
    stuck = [syncing(1001) for _ in range(PLACES)]
    assert all(engine.start(request) for request in stuck)
    assert len(ring.tokens) == PLACES // 2
    assert engine.has_waiting()
    other = syncing(1002)
    assert engine.start(other)
    assert other in ring.tokens
    # The other's come back, his do not.
    assert engine.overdue() == stuck[PLACES // 2 :]
    assert not engine.has_waiting()
    assert not engine.start(syncing(1001)), "his are stuck: a worker makes it"
    ring.let_go(other, 0)
    assert engine.done() == [other]
    # One of his does, so there is hope again.
    ring.let_go(stuck[0])
    assert engine.done() == [stuck[0]]
    late, later = syncing(1001), syncing(1001)
    assert engine.start(late)
    assert late in ring.tokens
    assert engine.start(later)
    assert later not in ring.tokens
    ring.let_go(stuck[1])
    engine.done()
    assert later in ring.tokens, "the place that came free is its own"
    for request in list(ring.tokens):
        assert isinstance(request, Request)
        ring.let_go(request)
    engine.done()
    assert not engine._users, "nothing is kept of who asks for nothing"
    assert engine._under_way == 0


@pytest.mark.parametrize("is_begun", [False, True])
def test_what_waits_for_a_place_is_withdrawn_at_once(
    holding: tuple[Uring, HoldingRing], is_begun: bool
) -> None:
    """If its first call has not begun: EINTR, though nothing comes back. Else it goes on."""
    engine, ring = holding
    driver = SecondModel(1)
    driver.is_near, driver.uring = lambda _: True, engine
    ended: list[Request] = []

    async def body() -> None:
        if is_begun:
            await FunctionCall(7, str, (), str)
        await Fsync(7, 3)

    try:
        stuck = [driver.start("stuck", body(), ended.append) for _ in range(PLACES)]
        withdrawn, other = [driver.start("waits", body(), ended.append) for _ in range(2)]
        assert ring.tokens == stuck
        driver.withdraw(withdrawn)
        driver.after_wait()
        assert ended == ([] if is_begun else [withdrawn])
        ring.let_go(stuck[0], 0)
        driver.after_wait()
        assert ring.tokens == [*stuck[1:], withdrawn if is_begun else other]
        while ring.tokens:
            request = ring.tokens[0]
            assert isinstance(request, Request)
            ring.let_go(request, 0)
            driver.after_wait()
        assert sorted(request.tag for request in ended) == list(range(1, PLACES + 3))
        if not is_begun:
            with pytest.raises(InterruptedError):
                withdrawn.result()
        assert not engine._users
    finally:
        driver.close()


def test_root_may_have_all_places_and_others_wait_only_for_a_while(
    holding: tuple[Uring, HoldingRing],
) -> None:
    engine, ring = holding
    for _ in range(PLACES):
        assert engine.start(syncing(0))
    assert len(ring.tokens) == PLACES
    other = syncing(1002)
    assert engine.start(other)
    assert other not in ring.tokens
    assert engine.overdue() == [other]


def test_what_moves_is_waited_for(holding: tuple[Uring, HoldingRing]) -> None:
    engine, ring = holding
    requests = [syncing(1001) for _ in range(PLACES)]
    for request in requests:
        engine.start(request)
    for request in requests[: PLACES // 2]:
        ring.let_go(request)
        engine.done()
        assert engine.overdue() == []
    assert not engine.has_waiting()


def test_the_writes_in_the_ring_are_those_of_one_user_at_a_time(
    holding: tuple[Uring, HoldingRing],
) -> None:
    """The kernel may have one wait for another, to another file."""
    engine, ring = holding
    first = writing(1001)
    assert engine.start(first)
    assert not engine.start(writing(1002)), "a worker makes it"
    assert not engine.start(writing(0))
    sync = syncing(1002)
    assert engine.start(sync)
    assert sync in ring.tokens, "of what is no write many are made at once"
    ring.let_go(first)
    assert engine.done() == [first]
    assert engine.start(writing(1002))
    assert not engine.start(writing(1001))


def test_what_waits_for_a_place_may_not_write_beside_others_either(
    holding: tuple[Uring, HoldingRing],
) -> None:
    engine, ring = holding
    syncs = [syncing(0) for _ in range(PLACES)]
    assert all(engine.start(request) for request in syncs)
    waiting = [writing(1001), writing(1002)]
    assert all(engine.start(request) for request in waiting)
    ring.let_go(syncs[0], 0)
    ring.let_go(syncs[1], 0)
    assert engine.done() == [*syncs[:2], waiting[1]]
    assert waiting[0] in ring.tokens
    assert waiting[1].call is not None, "a worker makes it"


def test_writes_behind_a_stuck_one_are_asked_back(holding: tuple[Uring, HoldingRing]) -> None:
    """What the kernel has not begun comes back, for a worker; and so do later ones, for now."""
    engine, ring = holding
    stuck, behind = writing(1001), writing(1001)
    assert engine.start(stuck)
    assert engine.start(behind)
    assert engine.has_waiting()
    assert engine.overdue() == []
    assert ring.cancelled == 1
    ring.let_go(behind, -errno.ECANCELED)
    assert engine.done() == [behind]
    assert behind.call is not None
    assert not engine.start(writing(1001))
    ring.let_go(stuck)
    engine.done()
    assert not engine.has_waiting()
    assert engine.start(writing(1001)), "nothing is in its way any more"


def test_writes_that_move_are_not_asked_back(holding: tuple[Uring, HoldingRing]) -> None:
    engine, ring = holding
    requests = [writing(1001) for _ in range(4)]
    for request in requests:
        assert engine.start(request)
    for request in requests:
        ring.let_go(request)
        engine.done()
        engine.overdue()
    assert ring.cancelled == 0


# What goes wrong in the ring ends no mount


NO_MEMORY = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_what_the_kernel_does_not_take_is_submitted_again(
    holding: tuple[Uring, HoldingRing],
) -> None:
    """The dispatcher is woken for that, though nothing else comes; meanwhile workers make calls."""
    engine, ring = holding
    driver = SecondModel(1)
    driver.is_near, driver.uring = lambda _: True, engine
    woken = threading.Event()
    driver.dispatcher.wake = woken.set
    ended: list[Request] = []

    async def body() -> str:
        await Fsync(7, 3)
        return "synced"

    try:
        request = driver.start("sync", body(), ended.append)
        ring.lacks = NO_MEMORY
        for _ in range(2):
            driver.before_wait(sleeps=True)
            assert not engine.start(syncing(1001)), "a worker makes it"
            wait_until(woken.is_set, "the dispatcher is woken")
            woken.clear()
            driver.after_wait()
        assert (ring.submitted, ended) == (0, [])
        ring.lacks = None
        driver.before_wait(sleeps=True)
        assert ring.submitted == 1
        assert engine.start(syncing(1001))
        for token in list(ring.tokens):
            assert isinstance(token, Request)
            ring.let_go(token, 0)
        assert engine.done()[0] is request
        assert not engine.has_waiting()
        driver._go_on(request)
        assert [one.result() for one in ended] == ["synced"]
    finally:
        driver.close()


def test_what_cannot_be_asked_back_for_want_of_memory_is_so_later(
    holding: tuple[Uring, HoldingRing],
) -> None:
    engine, ring = holding
    assert engine.start(writing(1001))
    ring.lacks = NO_MEMORY
    for _ in range(3):
        assert engine.overdue() == []
        assert engine.has_waiting()
    assert ring.cancelled == 1, "nothing more is queued behind what the kernel does not take"
    ring.lacks = None
    assert engine.submit()
    engine.overdue()
    assert ring.cancelled == 2


def test_without_memory_for_a_call_a_worker_makes_it(holding: tuple[Uring, HoldingRing]) -> None:
    engine, ring = holding
    ring.lacks = MemoryError()
    assert not engine.start(asking(Pread(7, 3, 10, 0), 1001))
    assert engine._under_way == 0


def test_an_error_in_looking_at_a_result_is_that_request_s(
    holding: tuple[Uring, HoldingRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fstat(2) on a file system that was shut down. Others that are done are not lost."""
    engine, ring = holding
    short, other = asking(Pread(7, 3, 10, 0), 1001), syncing(1001)
    assert engine.start(short)
    assert engine.start(other)
    ring.let_go(short, 0, b"")
    ring.let_go(other, 0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fail)
        assert engine.done() == [short, other]
    assert short.call is None
    with pytest.raises(OSError, match="no memory"):
        short.result()
    assert (other.call, other.result()) == (None, None)


def fill(fd: int) -> None:
    """Write to a pipe until it takes no more."""
    with contextlib.suppress(BlockingIOError):
        while os.write(fd, bytes(1 << 16)):
            pass


def test_writes_that_are_stuck_keep_no_place_from_other_files(
    engine: Uring, tmp_path: Path
) -> None:
    """A pipe that nobody reads keeps its writers; others' go on, by the workers in the end."""
    pipes = [os.pipe() for _ in range(PLACES)]
    for _, fd in pipes:
        os.set_blocking(fd, False)
        fill(fd)
        os.set_blocking(fd, True)

    async def stuck(fd: int) -> None:
        with contextlib.suppress(OSError):  # ESPIPE: asked back, and made by a worker
            await Pwrite(7, fd, b"x", 0)

    async def scenario(driver: SecondModel, session: Session) -> None:
        async with trio.open_nursery() as nursery:
            for _, fd in pipes:
                nursery.start_soon(answer, driver, "stuck", stuck(fd))
            await trio.testing.wait_all_tasks_blocked()
            handle = await create(driver, session, b"file")
            for number in range(5):
                assert await answer(driver, "write", ops.write(session, handle, number, b"x")) == 1
            for fd, _ in pipes:
                os.read(fd, 1 << 16)

    try:
        through(engine, tmp_path, scenario)
    finally:
        for ends in pipes:
            for fd in ends:
                os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"xxxxx"
