"""Leader and followers on the native session: no request is lost, none waits for another's call.

test_mount_slow.py and test_mount_callers.py have those who are stuck; test_mount_order.py the
order of requests on the same bytes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_executor import bounded
from leaders import SIZE, StuckMkdir, count_of, led_in_turn, reading, syncing, writing
from leaders import driver as driver
from mounting import SOAK, wait_until
from wire_kernel import Kernel
from wire_messages import pack, request

from ninefuse.calls import Fsync, Pread, Pwrite
from ninefuse.executor import LeadingModel
from ninefuse.fuse import leading
from ninefuse.fuse._role import Role
from ninefuse.fuse._wire import Device
from ninefuse.fuse.leading import Leading
from ninefuse.fuse.opcodes import Opcode
from ninefuse.settings import LEADERS

FILES = 4
LIMIT = 1 << 20  # bytes that a file may have, in some of these tests


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A session whose threads lead in turn, on a directory with some files."""
    files = {f"file{number}": b"%d" % number * SIZE for number in range(FILES)}
    with led_in_turn(tmp_path, files) as kernel:
        yield kernel


@pytest.fixture
def handles(kernel: Kernel) -> list[int]:
    """Of the files, open for reading and writing."""
    found = []
    for number in range(FILES):
        entry = kernel.get(Opcode.LOOKUP, b"file%d\0" % number)
        nodeid = int.from_bytes(entry[:8], "little")
        said = kernel.get(Opcode.OPEN, pack("open_in", os.O_RDWR, 0), nodeid)
        found.append(int.from_bytes(said[:8], "little"))
    return found


def test_a_lone_client_s_requests_change_threads_never(
    kernel: Kernel, driver: LeadingModel, handles: list[int]
) -> None:
    for _ in range(50):
        kernel.get(Opcode.WRITE, writing(handles[0], b"x" * SIZE))
        kernel.get(Opcode.FSYNC, syncing(handles[0]))
        kernel.get(Opcode.MKDIR, pack("mkdir_in", 0o755, 0) + b"d\0")
        kernel.get(Opcode.RMDIR, b"d\0")
    kernel.settle()
    for name in ("write", "fsync", "mkdir", "rmdir"):
        counted = driver.answered[name]
        assert (counted.count, counted.crossings, counted.on_dispatcher) == (50, 0, 50), name


def test_what_plain_calls_answer_is_what_the_file_has(
    kernel: Kernel, handles: list[int], tmp_path: Path
) -> None:
    """Whoever makes them: the leader, hands, the dispatcher of cached reads."""
    data = bytes(range(256)) * 64
    assert kernel.get(Opcode.WRITE, writing(handles[1], data, 100)) == len(data).to_bytes(
        8, "little"
    )
    whole = b"1" * 100 + data
    assert (tmp_path / "file1").read_bytes() == whole
    assert kernel.get(Opcode.READ, reading(handles[1], 1 << 20)) == whole
    assert kernel.get(Opcode.READ, reading(handles[1], 10, len(whole) - 3)) == whole[-3:]
    assert kernel.get(Opcode.READ, reading(handles[1], 10, len(whole))) == b""
    assert kernel.get(Opcode.FSYNC, syncing(handles[1])) == b""


@pytest.fixture
def limited() -> Iterator[None]:
    """Files may have so many bytes; who writes beyond is told EFBIG, or how much there was room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("count", [1, 12])
def test_errors_and_short_writes_go_on_in_the_body(
    kernel: Kernel, handles: list[int], count: int
) -> None:
    """One at a time, which the leader makes, or so many at once that hands do."""
    short: list[int] = []
    beyond: list[int] = []
    for number in range(count):
        handle = handles[number % FILES]
        for found, offset in ((short, LIMIT - 10), (beyond, LIMIT)):
            unique = kernel.new_unique()
            kernel.send(request(Opcode.WRITE, writing(handle, b"x" * 20, offset), unique=unique))
            found.append(unique)
    for unique in short:
        assert kernel.answer(unique) == (0, count_of(10))
    for unique in beyond:
        assert kernel.answer(unique) == (errno.EFBIG, b"")
    kernel.settle()


def in_a_storm(n: int, handle: int) -> tuple[Opcode, bytes, bytes | None]:
    """A request, and its answer; None: it is any."""
    kind = n * 7 % 11 % 4
    if kind == 0:
        return Opcode.WRITE, writing(handle, b"x" * SIZE), count_of(SIZE)
    if kind == 1:
        return Opcode.FSYNC, syncing(handle), b""
    if kind == 2:
        return Opcode.LOOKUP, b"absent%d\0" % n, None
    return Opcode.WRITE, writing(handle, b"y" * n, SIZE), count_of(n)


def test_no_request_of_a_storm_is_lost(
    kernel: Kernel, driver: LeadingModel, handles: list[int]
) -> None:
    """Plain calls and others, more at a time than there are threads; each answer is its own."""
    rounds = 50_000 if SOAK else 4_000
    under_way: list[tuple[int, bytes | None]] = []

    def answered() -> None:
        unique, expected = under_way.pop(0)
        error, said = kernel.answer(unique)
        assert error == 0
        assert expected is None or said == expected

    for n in range(rounds):
        opcode, body, expected = in_a_storm(n % 5000, handles[n % FILES])
        unique = kernel.new_unique()
        kernel.send(request(opcode, body, unique=unique, nodeid=1))
        under_way.append((unique, expected))
        if len(under_way) > 24:
            answered()
    while under_way:
        answered()
    kernel.settle()
    assert driver.pool.statistics().queued == 0
    assert sum(one.count for one in driver.answered.values()) >= rounds


def test_somebody_leads_while_all_others_are_in_calls(
    kernel: Kernel, handles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that do not come back: of those who lead, and of workers."""
    stuck = StuckMkdir(monkeypatch)
    made = []
    try:
        for number in range(3):
            unique = kernel.new_unique()
            body = pack("mkdir_in", 0o755, 0) + b"d%d\0" % number
            kernel.send(request(Opcode.MKDIR, body, unique=unique, nodeid=1, uid=os.geteuid()))
            made.append(unique)
            kernel.get(Opcode.WRITE, writing(handles[0], b"x"))
            kernel.get(Opcode.FSYNC, syncing(handles[1]))
        stuck.wait_until_begun(2)
        for number in range(20):
            kernel.get(Opcode.WRITE, writing(handles[number % FILES], b"x"))
            kernel.get(Opcode.LOOKUP, b"file0\0")
    finally:
        stuck.goes_on.set()
    for unique in made:
        assert kernel.answer(unique)[0] == 0
    kernel.settle()


# The role itself


class Finished:
    """What has become of plain calls."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[Any, Any, bool, bool]] = []

    def __call__(self, request: Any, *outcome: Any) -> None:
        self.outcomes.append((request, *outcome))


@pytest.fixture
def finished() -> Finished:
    return Finished()


@pytest.fixture
def role(finished: Finished) -> Iterator[Role]:
    """One whose answers nobody reads."""
    wake = os.eventfd(0)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        role = Role(Device(here.fileno(), SIZE), wake, finished, os.abort)
        yield role
        role.close()
    os.close(wake)


def asks(call: Any, user: int | None = None) -> Any:
    return SimpleNamespace(call=call, user=user)


def test_the_last_one_does_not_pass_the_role_on(role: Role) -> None:
    role.joins(1)
    assert not role.pass_on()
    role.joins(1)
    assert role.pass_on()
    assert not role.pass_on()
    role.came_back()
    assert role.pass_on()


def test_places_are_bounded_for_users_and_inodes(role: Role) -> None:
    one = asks(Fsync(7, 0), 1000)
    other = asks(Fsync(8, 0), 1000)
    assert role.reserve(one, 2, 1)
    assert not role.reserve(one, 2, 1)  # the inode
    assert role.reserve(other, 2, 1)
    assert not role.reserve(asks(Fsync(9, 0), 1000), 2, 1)  # the user
    assert role.reserve(asks(Fsync(9, 0), 1001), 2, 1)
    role.free(1000, 7)
    assert role.reserve(one, 2, 1)


def test_what_no_hand_has_begun_is_taken_back(role: Role, finished: Finished) -> None:
    wanted, others = asks(Fsync(1, -1)), [asks(Fsync(n, -1)) for n in range(3)]
    for one in (others[0], wanted, *others[1:]):
        role.hand(one, 2)
    assert role.take_back(wanted) == [wanted]
    assert role.take_back(wanted) == []
    assert (role.handed, role.queued) == (3, 3)
    role.hires(1)
    hand = threading.Thread(target=role.work, daemon=True)
    hand.start()
    wait_until(lambda: len(finished.outcomes) == 3, "the other calls")
    assert finished.outcomes == [(one, -errno.EBADF, False, True) for one in others]
    role.end()
    bounded(hand.join)
    assert (role.handed, role.queued, role.hands) == (0, 0, 0)


def test_hands_finish_what_they_were_given(role: Role, finished: Finished, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR, 0o600)
    calls = [Pwrite(1, fd, b"abc", 0), Fsync(1, fd, data_only=True)]
    for call in calls:
        role.hand(asks(call), 2)
    role.end()
    role.hires(1)
    hand = threading.Thread(target=role.work, daemon=True)
    hand.start()
    bounded(hand.join)
    role.hand(asks(Pread(1, fd, 10, 1)), 2)
    role.hires(1)
    bounded(threading.Thread(target=role.work, daemon=True).run)
    assert [outcome[1:] for outcome in finished.outcomes] == [
        (3, True, True),
        (0, True, True),
        (b"bc", True, True),
    ]
    os.close(fd)


def test_the_body_goes_on_at_once_where_nobody_runs_python(
    role: Role, finished: Finished, tmp_path: Path
) -> None:
    """Else it would wait for the next request."""
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR, 0o600)
    role.joins(2)
    role.enter()
    assert role.pass_on()
    assert role.make(asks(Pwrite(1, fd, b"abc", 0)), 2) is None
    assert [outcome[1:] for outcome in finished.outcomes] == [(3, True, False)]
    role.leave()
    os.close(fd)


def test_an_end_that_is_asked_for_ends_it(kernel: Kernel) -> None:
    kernel.front.end()
    kernel.ended()


def test_messages_that_are_none_are_passed_over(kernel: Kernel) -> None:
    kernel.send(b"short")
    kernel.get(Opcode.LOOKUP, b"file0\0")
    assert kernel.serves


def test_more_threads_lead_where_one_is_stuck(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while: a call that takes long is no reason by itself."""
    # Each in a directory of its own: in one they would wait for places.
    made, nodeids = pack("mkdir_in", 0o755, 0), []
    for number in range(2 * LEADERS):
        said = kernel.get(Opcode.MKDIR, made + b"d%d\0" % number)
        nodeids.append(int.from_bytes(said[:8], "little"))
    kernel.settle()
    wait_until(lambda: LEADERS <= _leading(kernel) == _leaders(), "all take part")
    monkeypatch.setattr(leading, "STUCK", 0.0)
    count = _leading(kernel)  # on a busy machine they may be more by now
    stuck = StuckMkdir(monkeypatch)
    uniques = [kernel.new_unique() for _ in range(count - 1)]
    sent: list[int] = []
    try:
        for unique, nodeid in zip(uniques, nodeids, strict=False):
            body = made + b"below\0"
            kernel.send(request(Opcode.MKDIR, body, unique=unique, nodeid=nodeid, uid=os.geteuid()))
            sent.append(unique)
            stuck.wait_until_begun(len(sent))
        kernel.get(Opcode.SYMLINK, b"link\0target\0", nodeids[-1])
        wait_until(lambda: _leaders() > count, "one more leads")
    finally:
        stuck.goes_on.set()
    for unique in uniques:
        assert kernel.answer(unique)[0] == 0
    kernel.settle()


def _leading(kernel: Kernel) -> int:
    """How many threads take part in leading, as far as the role knows."""
    assert kernel.role is not None
    return kernel.role.threads


def _leaders() -> int:
    return sum(one.name.startswith("leader") for one in threading.enumerate())


class LookedAt:
    """In the place of a `Role` with one hand, and of the clock: a look comes just before a call.

    Attributes:
        due: looks that are still to come.
    """

    threads, in_calls, handed, idle, hands = 2, 1, 1, 0, 1

    def __init__(self) -> None:
        self.queued = self.finished = 0
        self.due: list[Callable[[], None]] = []

    def call_later(self, _: float, function: Callable[[], None]) -> bool:
        self.due.append(function)
        return True

    def hand(self, *_: object) -> None:
        self.finished += 1  # so the hand is not stuck, as yet
        due, self.due = self.due, []
        for look in due:
            look()
        self.queued += 1


def test_a_call_that_is_queued_during_a_look_is_looked_at_later() -> None:
    """If the hand gets stuck then, nobody else would send it to the workers."""
    role = LookedAt()
    driver = SimpleNamespace(pool=SimpleNamespace(threads=1), clock=role)
    crew = Leading(driver, SimpleNamespace())  # type: ignore[arg-type]
    crew._role = role  # type: ignore[assignment]
    assert crew.hand(asks(Fsync(7, 3)))
    assert (role.queued, len(role.due)) == (1, 1)


def test_whoever_leads_makes_no_deferred_call(
    kernel: Kernel, driver: LeadingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close may wait for long, and whoever makes it would count as one that may lead."""
    makers: list[str] = []

    def note() -> None:
        makers.append(threading.current_thread().name)

    def made(*args: Any, mkdir: Any = os.mkdir, **how: Any) -> None:
        driver.defer(note)
        mkdir(*args, **how)

    monkeypatch.setattr(os, "mkdir", made)
    for number in range(8):
        kernel.get(Opcode.MKDIR, pack("mkdir_in", 0o755, 0) + b"d%d\0" % number)
    wait_until(lambda: len(makers) == 8, "the deferred calls")
    assert not [name for name in makers if name.startswith("leader")]


def test_a_read_that_fails_on_its_way_is_no_short_one(role: Role, finished: Finished) -> None:
    """The kernel would take that for the end of the file."""
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    assert libc.munmap(ctypes.c_void_p(start + 2 * mmap.PAGESIZE), mmap.PAGESIZE) == 0
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    role.joins(2)
    role.enter()
    assert role.pass_on()
    assert len(os.pread(fd, 3 * mmap.PAGESIZE, start)) == 2 * mmap.PAGESIZE
    role.make(asks(Pread(1, fd, 3 * mmap.PAGESIZE, start)), 2)
    assert [outcome[1:] for outcome in finished.outcomes] == [(-errno.EIO, False, False)]
    role.leave()
    os.close(fd)
