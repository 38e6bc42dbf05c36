"""The order of requests on the same bytes: by itself, and under each driver."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers_executor import answer, begin, bounded, drive, until
from helpers_executor import engine as engine
from ops_helpers import ROOT, Client, Stepper
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.calls import Behind, Body, Call, FunctionCall, Pwrite, blocking
from ninefuse.driving.uring import Uring
from ninefuse.executor import Executor, Request, SecondModel
from ninefuse.linux import transfer
from ninefuse.tree.order import END, Ranges
from ninefuse.tree.qids import is_on_own_device
from ninefuse.tree.session import Session

FILE = 7


class Requester:
    """A body that asks for a turn, stepped by hand."""

    def __init__(
        self,
        ranges: Ranges,
        start: int,
        end: int,
        *,
        reads: bool,
        path: int = FILE,
        source: tuple[int, int, int] | None = None,  # of a copy: path, start, end
    ):
        self.start, self.end, self.reads, self.path = start, end, reads, path
        self.source = source
        self.runs = False  # it has its turn
        self.resumed = 0
        self.over = False
        if source is not None:
            self._body = self._copies(ranges, source)
        else:
            self._body = self._reads(ranges) if reads else self._changes(ranges)
        self._step()

    def __repr__(self) -> str:
        kind = "read" if self.reads else "change"
        return f"<{kind} of {self.path}: {self.start}-{self.end}>"

    async def _changes(self, ranges: Ranges) -> None:
        async with ranges.changing(self.path, self.start, self.end):
            self.runs = True
            await blocking(None, int)

    async def _copies(self, ranges: Ranges, source: tuple[int, int, int]) -> None:
        before = ranges.look(*source)
        async with ranges.changing(self.path, self.start, self.end):
            if before is not None:
                await Behind(before)
            self.runs = True
            await blocking(None, int)

    async def _reads(self, ranges: Ranges) -> None:
        if self.path in ranges:
            await ranges.settled(self.path, self.start, self.end)
        self.runs = True
        await blocking(None, int)

    def _step(self) -> None:
        command = self._body.send(None)
        while type(command) is Behind:
            if not command.turn.has_come(self._resume):
                return
            command = self._body.send(None)
        assert type(command) is FunctionCall

    def _resume(self) -> None:
        self.resumed += 1
        self._step()

    def end_it(self) -> None:
        """Its call is over, and it with it."""
        with pytest.raises(StopIteration):
            self._body.send(None)
        self.over = True

    def is_before(self, later: Requester) -> bool:
        """Whether a later one has to wait for it."""
        asked = [(later.path, later.start, later.end)]
        if later.source is not None:
            asked.append(later.source)
        return not self.reads and any(
            self.path == path and self.start < end and start < self.end
            for path, start, end in asked
        )


def test_bytes_that_nobody_changes_are_waited_for_by_nobody() -> None:
    """Reads beside reads, and beside changes of other bytes and of other files."""
    ranges = Ranges()
    reads = [Requester(ranges, 0, 10, reads=True) for _ in range(3)]
    changes = [Requester(ranges, 0, 10, reads=False), Requester(ranges, 10, 20, reads=False)]
    changes.append(Requester(ranges, 0, END, reads=False, path=FILE + 1))
    reads.append(Requester(ranges, 20, END, reads=True))
    assert all(body.runs and not body.resumed for body in reads + changes)
    assert FILE in ranges
    for body in reads + changes:
        body.end_it()
    assert not len(ranges)
    assert FILE not in ranges


def test_a_read_waits_for_the_changes_before_it_and_for_no_others() -> None:
    ranges = Ranges()
    first, second = (Requester(ranges, n, n + 10, reads=False) for n in (0, 100))
    read = Requester(ranges, 5, 105, reads=True)
    third = Requester(ranges, 50, 60, reads=False)  # comes later, and does not wait for the read
    assert (read.runs, third.runs) == (False, True)
    first.end_it()
    assert not read.runs
    second.end_it()
    assert (read.runs, read.resumed) == (True, 1)
    read.end_it()
    third.end_it()
    assert not len(ranges)


def test_changes_of_the_same_bytes_come_one_after_the_other() -> None:
    """In the order in which they came; what cuts a file off is behind whatever it may cut."""
    ranges = Ranges()
    bodies = [
        Requester(ranges, *where, reads=False) for where in ((0, 10), (5, END), (0, 8), (6, 7))
    ]
    for n, body in enumerate(bodies):
        assert [b.runs for b in bodies] == [m <= n for m in range(len(bodies))]
        body.end_it()
    assert not len(ranges)


@pytest.mark.parametrize("seed", range(20))
def test_random_turns(seed: int) -> None:
    """Whoever runs has nobody left before him, and is let go on as soon as that is so.

    Copies among them, which read some bytes and change others.
    """
    pick = random.Random(seed)
    ranges, bodies = Ranges(), list[Requester]()
    for _ in range(600):
        if len(bodies) < 30 and pick.random() < 0.55:
            start = pick.choice((0, pick.randrange(100), pick.randrange(100)))
            end = pick.choice((start + pick.randrange(30), start + 1, END))
            path = pick.choice((FILE, FILE, FILE + 1))
            kind = pick.choice(("read", "change", "copy"))
            source = (pick.choice((FILE, FILE + 1)), at := pick.randrange(100), at + 30)
            bodies.append(
                Requester(
                    *(ranges, start, end),
                    reads=kind == "read",
                    path=path,
                    source=source if kind == "copy" else None,
                )
            )
        elif running := [body for body in bodies if body.runs]:
            body = pick.choice(running)
            bodies.remove(body)
            body.end_it()
        for n, body in enumerate(bodies):
            assert body.runs == (not any(b.is_before(body) for b in bodies[:n])), bodies
            assert body.resumed <= (1 if body.source is None else 2)
    while bodies:
        body = next(body for body in bodies if body.runs)
        bodies.remove(body)
        body.end_it()
    assert not len(ranges)


def test_turns_that_end_on_other_threads() -> None:
    """None is lost, and no two have the same bytes, while threads end what others wait for."""
    ranges, pick = Ranges(), random.Random(1)
    inside = [0] * 8  # changes of each byte
    jobs: list[Callable[[], None]] = []
    go_on, left = threading.Semaphore(0), threading.Semaphore(0)
    wrong: list[str] = []

    async def body(start: int, end: int, reads: bool) -> None:
        if reads:
            if FILE in ranges:
                await ranges.settled(FILE, start, end)
            await blocking(None, int)
            return
        async with ranges.changing(FILE, start, end):
            for n in range(start, end):
                inside[n] += 1
                if inside[n] > 1:
                    wrong.append(f"byte {n} is changed twice at once")
            await blocking(None, int)
            for n in range(start, end):
                inside[n] -= 1

    def advance(coroutine: Body[None]) -> None:
        try:
            command = coroutine.send(None)
            while type(command) is Behind:
                if not command.turn.has_come(lambda: put(coroutine)):
                    return
                command = coroutine.send(None)
            put(coroutine)
        except StopIteration:
            left.release()

    def put(coroutine: Body[None]) -> None:
        jobs.append(lambda: advance(coroutine))
        go_on.release()

    def work() -> None:
        while True:
            go_on.acquire()
            job = jobs.pop()
            job()

    def scenario() -> None:
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        count = 3000
        for _ in range(count):
            start = pick.randrange(8)
            advance(body(start, pick.randrange(start, 8) + 1, pick.random() < 0.5))
        for _ in range(count):
            left.acquire()

    bounded(scenario)
    assert not wrong
    assert not len(ranges)


# Operations


def test_what_waits_says_so(client: Client) -> None:
    fid = client.create("f", b"old")
    change = Stepper(ops.write(client.session, fid, 0, b"new"))
    change.before("Pwrite")
    read = Stepper(ops.read(client.session, fid, 1, 10))
    read.to_lock()
    request = Request(1, "read", ops.read(client.session, fid, 1, 10))
    command = request.body.send(None)
    assert isinstance(command, Behind)
    request.waits = command
    path = client.node(fid).number
    assert f"waits for earlier changes of inode {path} from byte 1 to 11" in request.describe()
    change.finish()
    assert read.finish() == b"ew"
    request.waits = None
    with pytest.raises(StopIteration):
        request.body.send(request.body.send(None).quick and b"")
    client.do(ops.clunk, fid)


CHANGES: dict[str, tuple[Callable[[Session, int, int], Body[Any]], str, bytes]] = {
    "write": (lambda s, fid, _: ops.write(s, fid, 0, b"new"), "Pwrite", b"new345678"),
    "truncate by the open file": (
        lambda s, fid, _: ops.setattr(s, fid, ops.Changes(size=3)),
        "_ftruncate",
        b"012",
    ),
    "truncate": (
        lambda s, _, other: ops.setattr(s, other, ops.Changes(size=3)),
        "_truncate",
        b"012",
    ),
    "open with O_TRUNC": (
        lambda s, _, other: ops.lopen(s, other, os.O_WRONLY | os.O_TRUNC),
        "_open_file",
        b"",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_read_is_answered_after_a_change_that_came_before(client: Client, name: str) -> None:
    make, call, expected = CHANGES[name]
    fid, other = client.create("f", b"0123456789"), client.walk("f")
    beside = client.create("g", b"beside")
    change = Stepper(make(client.session, fid, other))
    change.before(call)
    read = Stepper(ops.read(client.session, fid, 0, 9))
    read.to_lock()
    assert client.do(ops.read, beside, 0, 10) == b"beside"
    change.finish()
    assert read.finish() == expected
    for number in (fid, other, beside):
        client.do(ops.clunk, number)


def test_reads_of_other_bytes_do_not_wait(client: Client) -> None:
    """Beside a write, a truncation further on, and an append."""
    fid = client.create("f", b"0123456789")
    appending = client.open("f", flags=os.O_WRONLY | os.O_APPEND)
    changes = [
        ops.write(client.session, fid, 4, b"x"),
        ops.setattr(client.session, fid, ops.Changes(size=8)),
        ops.write(client.session, appending, 10, b"more"),
    ]
    for body, call in zip(changes, ("Pwrite", "_ftruncate", "Pwrite"), strict=True):
        change = Stepper(body)
        change.before(call)
        assert client.do(ops.read, fid, 0, 4) == b"0123"
        change.finish()
    assert client.do(ops.read, fid, 0, 20) == b"0123x567more"
    for number in (fid, appending):
        client.do(ops.clunk, number)


def test_a_change_that_fails_is_over(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(5, "no disk")

    fid = client.create("f", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "write_fully", fail)
        with pytest.raises(OSError, match="no disk"):
            client.do(ops.write, fid, 0, b"new")
    assert client.do(ops.read, fid, 0, 10) == b"old"
    client.do(ops.clunk, fid)


def test_who_waits_for_a_lease_keeps_nobody_waiting(client: Client) -> None:
    """A truncation that is put aside to be tried again has no turn meanwhile."""
    fid, other = client.create("f", b"old"), client.walk("f")
    command = _until_later(ops.setattr(client.session, other, ops.Changes(size=0)))
    assert command == "Later"
    assert not len(client.session.ranges)
    for number in (fid, other):
        client.do(ops.clunk, number)


def _until_later(body: Body[None]) -> str:
    """Let a body meet a lease at its call; the command that follows."""
    command = body.send(None)
    assert isinstance(command, Call)
    command = body.throw(BlockingIOError(11, "a lease"))
    with pytest.raises(OSError, match="enough"):
        body.throw(OSError(5, "enough"))
    return type(command).__name__


# Drivers


class Late:
    """Writes that are made when they are told to."""

    def __init__(self) -> None:
        self.begun = 0
        self.go_on = threading.Event()
        self.write = transfer.write_fully

    def __call__(self, fd: int, data: bytes, offset: int, done: int = 0) -> int:
        self.begun += 1
        self.go_on.wait(10)
        return self.write(fd, data, offset, done)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    it = Late()
    monkeypatch.setattr(transfer, "write_fully", it)
    yield it
    it.go_on.set()


async def _session(executor: Executor, source: Path) -> Session:
    session = Session(executor)
    await answer(executor, "attach", ops.attach(session, ROOT, str(source)))
    for fid, name, flags in ((2, b"f", os.O_RDWR), (3, b"g", os.O_RDWR)):
        (source / os.fsdecode(name)).write_bytes(b"0123456789")
        await answer(executor, "walk", ops.walk(session, ROOT, fid, [name]))
        await answer(executor, "lopen", ops.lopen(session, fid, flags))
    return session


async def _overtake(
    executor: Executor,
    source: Path,
    begun: Callable[[], int],
    go_on: Callable[[], None],
    *,
    has_room: bool = True,
) -> None:
    """A late write, and what comes after it; ``has_room``: for calls beside it in its file."""
    session = await _session(executor, source)
    try:
        async with trio.open_nursery() as nursery:
            try:
                write = await begin(nursery, executor, "write", ops.write(session, 2, 2, b"new"))
                await until(lambda: begun() == 1)
                later = [
                    await begin(nursery, executor, "write", ops.write(session, 2, 4, b"NEW")),
                    *[
                        await begin(nursery, executor, "read", ops.read(session, 2, 0, 4))
                        for _ in range(20)
                    ],
                    await begin(
                        nursery, executor, "setattr", ops.setattr(session, 2, ops.Changes(size=6))
                    ),
                ]
                # Other bytes and other files are not kept waiting.
                if has_room:
                    assert await answer(executor, "read", ops.read(session, 2, 0, 2)) == b"01"
                assert await answer(executor, "read", ops.read(session, 3, 0, 10)) == b"0123456789"
                await trio.sleep(0.05)
                assert not any(one.over for one in (write, *later))
                assert begun() == 1
            finally:
                go_on()
        assert [one.error for one in later] == [None] * len(later)
        assert (write.value, later[0].value) == (3, 3)
        assert {read.value for read in later[1:-1]} == {b"01ne"}
        assert not len(session.ranges)
        assert (source / "f").read_bytes() == b"01neNE"
    finally:
        session.fids.clear()


@pytest.mark.parametrize(
    ("model", "is_local", "threads"),
    [
        *[("first", False, threads) for threads in (2, 8)],
        *[("second", False, threads) for threads in (2, 8)],
        *[("second", True, threads) for threads in (1, 2, 8)],
    ],
)
def test_no_read_overtakes_a_write(
    model: str, is_local: bool, threads: int, source: Path, late: Late
) -> None:
    """Nor does a write, or a truncation."""

    async def scenario(executor: Executor) -> None:
        if isinstance(executor, SecondModel):
            executor.is_near = is_on_own_device if is_local else None
        has_room = is_local or threads > 2  # half of the threads are for one file
        await _overtake(executor, source, lambda: late.begun, late.go_on.set, has_room=has_room)

    drive(model, threads, scenario)


def test_no_read_overtakes_a_write_in_the_engine(
    engine: Uring, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both made by io_uring, or the read by the dispatcher."""
    queued: list[tuple[Request, Call[Any]]] = []
    start = engine._starts[Pwrite]
    monkeypatch.setitem(engine._starts, Pwrite, lambda *what: queued.append(what))

    def go_on() -> None:
        monkeypatch.setitem(engine._starts, Pwrite, start)
        start(*queued.pop())
        engine.submit()

    async def scenario(executor: Executor) -> None:
        assert isinstance(executor, SecondModel)
        executor.is_near, executor.uring = is_on_own_device, engine
        count = len(queued)
        await _overtake(executor, source, lambda: len(queued) - count, go_on)
        executor.uring = None

    drive("second", 2, scenario)
