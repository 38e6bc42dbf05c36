"""Who waits for a lock of a file, over a socket in place of the device: he is in nobody's way.

However many wait, what they wait for is read and served; and beyond a number it is refused to wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import wait_until
from ops_helpers import source as source
from test_patience import Leased
from test_patience import lease as lease
from wire_kernel import Kernel, serving
from wire_messages import pack, request

from ninefuse.driving import driver as driver_module
from ninefuse.fuse import native
from ninefuse.fuse.opcodes import LK_FLOCK, Opcode

MODELS = ["none", "first", "second", "role", "uring"]
READ, WRITE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
LAST = (1 << 63) - 1
USER, OTHER, ROOT = 1001, 1002, 0

models = pytest.mark.parametrize("model", MODELS)


class Locks:
    """Open handles of one file, and lock requests by them: the owner's number is the handle's.

    Args:
        kernel: that asks.
        source: the directory that is served.
        count: of handles.
        flags: of the requests: LK_FLOCK, or 0 for byte ranges.
    """

    def __init__(self, kernel: Kernel, source: Path, count: int, flags: int = 0) -> None:
        (source / "file").write_bytes(bytes(100))
        self.kernel = kernel
        self.flags = flags
        kernel.init()
        self.nodeid = _number(kernel.get(Opcode.LOOKUP, b"file\0"))
        self.handles = [self.open() for _ in range(count)]

    def open(self) -> int:
        return _number(self.kernel.get(Opcode.OPEN, pack("open_in", os.O_RDWR, 0), self.nodeid))

    def begin(self, opcode: int, body: bytes, uid: int = ROOT) -> int:
        """Make a request of a user's; its number."""
        unique = self.kernel.new_unique()
        self.kernel.send(request(opcode, body, unique=unique, nodeid=self.nodeid, uid=uid))
        return unique

    def told(self, opcode: int, body: bytes, uid: int = ROOT) -> int:
        """Make a request, and wait for its answer: the errno."""
        return self.kernel.answer(self.begin(opcode, body, uid))[0]

    def body(self, which: int, kind: int, first: int = 0, last: int = LAST) -> bytes:
        handle = self.handles[which]
        return pack("lk_in", handle, handle, first, last, kind, 1, self.flags, 0)

    def take(self, which: int, uid: int = ROOT) -> None:
        assert self.told(Opcode.SETLK, self.body(which, WRITE), uid) == 0

    def give(self, which: int, uid: int = ROOT) -> None:
        assert self.told(Opcode.SETLK, self.body(which, NONE), uid) == 0

    def wait(self, *which: int, uid: int = ROOT) -> list[int]:
        """Have owners wait for all of the file, each after the ones before."""
        uniques = []
        for one in which:
            uniques.append(self.begin(Opcode.SETLKW, self.body(one, WRITE), uid))
            self.until_waiting(uniques[-1])
        return uniques

    def until_waiting(self, unique: int) -> None:
        def is_waiting() -> bool:
            request = self.kernel.front._asked.get(unique)
            return request is not None and "waits for another's lock" in request.describe()

        wait_until(is_waiting, "a request waits for a lock")

    def end(self) -> None:
        """Close the handles; then nothing is counted any more."""
        for handle in self.handles:
            self.kernel.get(Opcode.RELEASE, pack("release_in", handle, 0, 0, 0), self.nodeid)
        driver = self.kernel.driver
        self.kernel.settle()
        assert driver.waiting == 0
        assert not driver._users
        assert not driver._waits
        assert not self.kernel.front._asked
        self.kernel.check_silence()


def _number(body: bytes) -> int:
    return int(struct.unpack_from("=Q", body)[0])


@pytest.fixture(params=[0, LK_FLOCK], ids=["fcntl", "flock"])
def flags(request: pytest.FixtureRequest) -> int:
    """Both kinds of locks."""
    flags: int = request.param
    return flags


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is woken, and does not try besides: who does may come before his turn."""
    monkeypatch.setattr(driver_module, "TICK", 1000.0)
    monkeypatch.setattr(driver_module, "LONGEST", 1000.0)


in_turn = pytest.mark.usefixtures("woken")


# The device is read on


@models
@in_turn
def test_what_is_given_back_is_read_however_many_wait(
    source: Path, monkeypatch: pytest.MonkeyPatch, model: str, flags: int
) -> None:
    """Three times as many as may be under way; each has the lock in his turn."""
    monkeypatch.setattr(native, "_MOST_REQUESTS", 4)
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 13, flags)
        locks.take(0)
        waiting = locks.wait(*range(1, 13))
        for number, unique in enumerate(waiting):
            locks.give(number)
            assert kernel.answer(unique) == (0, b"")
        locks.end()


@pytest.mark.parametrize("model", ["first", "second", "role", "uring"])
def test_who_waits_for_a_lease_keeps_nobody_from_being_heard(
    source: Path,
    lease: Callable[[Path], Leased],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    """(Under none the one thread waits for a lease.)"""
    monkeypatch.setattr(native, "_MOST_REQUESTS", 4)
    leased = lease(source / "leased")
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 1)
        nodeid = _number(kernel.get(Opcode.LOOKUP, b"leased\0"))
        body = pack("open_in", os.O_RDWR, 0)
        opens = []
        for count in range(1, 13):
            unique = kernel.new_unique()
            kernel.send(request(Opcode.OPEN, body, unique=unique, nodeid=nodeid, uid=ROOT))
            wait_until(lambda: kernel.driver.waiting == count, "an open waits")  # noqa: B023
            opens.append(unique)
        locks.take(0)
        leased.give_back()
        for unique in opens:
            error, said = kernel.answer(unique)
            assert error == 0
            kernel.get(Opcode.RELEASE, pack("release_in", _number(said), 0, 0, 0), nodeid)
        locks.end()


@models
@in_turn
def test_a_signal_ends_a_wait_among_many(source: Path, model: str) -> None:
    """EINTR for the one that is meant; what is answered already is not looked for."""
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 6)
        locks.take(0)
        waiting = locks.wait(*range(1, 6))
        interrupted = waiting.pop(2)
        for _ in range(2):
            kernel.send(
                request(Opcode.INTERRUPT, pack("interrupt_in", interrupted), unique=interrupted | 1)
            )
        assert kernel.answer(interrupted)[0] == errno.EINTR
        assert all(map(kernel.front._asked.__contains__, waiting))
        for number, unique in zip((0, 1, 2, 4), waiting, strict=True):
            locks.give(number)
            assert kernel.answer(unique) == (0, b"")
        locks.end()


@models
@in_turn
def test_a_signal_ends_nothing_where_its_request_cannot_be_looked_at(
    source: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """The mount, above all. Who waits goes on waiting, and has the lock in his turn."""

    def fail(_: int) -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(native, "is_being_killed", fail)
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 2)
        locks.take(0)
        (waiting,) = locks.wait(1)
        kernel.send(request(Opcode.INTERRUPT, pack("interrupt_in", waiting), unique=waiting | 1))
        locks.give(0)
        assert kernel.answer(waiting) == (0, b"")
        locks.end()


# How many may wait


@models
@in_turn
def test_beyond_a_number_nobody_more_waits(
    source: Path, monkeypatch: pytest.MonkeyPatch, model: str, flags: int
) -> None:
    """ENOLCK at once; a lock that nobody has is given all the same."""
    monkeypatch.setattr(driver_module, "MOST_WAITS", 3)
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 6, flags)
        locks.take(0)
        waiting = locks.wait(1, 2, 3)
        for uid in (ROOT, USER):
            assert locks.told(Opcode.SETLKW, locks.body(4, WRITE), uid) == errno.ENOLCK
        # The other kind of lock is in nobody's way.
        locks.flags ^= LK_FLOCK
        for kind in (WRITE, NONE):
            assert locks.told(Opcode.SETLKW, locks.body(5, kind)) == 0
        locks.flags ^= LK_FLOCK
        locks.give(0)
        assert kernel.answer(waiting[0]) == (0, b"")
        waiting += locks.wait(4)
        for number, unique in zip((1, 2, 3), waiting[1:], strict=True):
            locks.give(number)
            assert kernel.answer(unique) == (0, b"")
        locks.end()


@models
@in_turn
def test_a_users_waits_are_counted_apart(
    source: Path, monkeypatch: pytest.MonkeyPatch, model: str, flags: int
) -> None:
    """Who has the lock may be the user who waits: what he does before he gives it back is served.

    And others wait as they like.
    """
    monkeypatch.setattr(driver_module, "MOST_REQUESTS", 3)
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 7, flags)
        locks.take(0, USER)
        waiting = locks.wait(1, 2, 3, uid=USER)
        assert locks.told(Opcode.SETLKW, locks.body(4, WRITE), USER) == errno.ENOLCK
        assert locks.told(Opcode.GETATTR, pack("getattr_in", 0, 0, 0), USER) == 0
        assert locks.told(Opcode.SETLK, locks.body(4, WRITE), USER) == errno.EAGAIN
        waiting += locks.wait(5, uid=OTHER) + locks.wait(6, uid=ROOT)
        for number, unique in zip((0, 1, 2, 3, 5), waiting, strict=True):
            locks.give(number, USER)
            assert kernel.answer(unique) == (0, b"")
        locks.end()


# Who has too many requests under way


@models
@in_turn
def test_what_gives_back_is_never_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch, model: str, flags: int
) -> None:
    """However many requests a user has: unlocks, and a close, which gives back, too."""
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 5, flags)
        handle = locks.handles[2]
        closing = (Opcode.FLUSH, pack("flush_in", handle, 0, 0, handle))
        if flags:
            closing = (Opcode.RELEASE, pack("release_in", handle, 0, 0, handle))
        locks.take(0, USER)
        waiting = locks.wait(1, 2, 3, uid=USER)
        monkeypatch.setattr(driver_module, "MOST_REQUESTS", 0)
        attributes = (Opcode.GETATTR, pack("getattr_in", 0, 0, 0), USER)
        assert locks.told(*attributes) == errno.EAGAIN
        gives = (
            (Opcode.SETLK, locks.body(0, NONE)),
            (Opcode.SETLKW, locks.body(1, NONE)),
            closing,
        )
        for unique, (opcode, body) in zip(waiting, gives, strict=True):
            assert locks.told(opcode, body, USER) == 0
            assert kernel.answer(unique) == (0, b"")
        if flags:
            locks.handles.pop(2)
        monkeypatch.undo()
        locks.end()


@models
@pytest.mark.parametrize("opcode", [Opcode.SETLK, Opcode.SETLKW])
@pytest.mark.parametrize("kind", [READ, WRITE])
def test_a_lock_is_refused_by_its_own_errno(
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    flags: int,
    opcode: Opcode,
    kind: int,
) -> None:
    """EAGAIN would say that another has it."""
    monkeypatch.setattr(driver_module, "MOST_REQUESTS", 0)
    with serving(source, model) as kernel:
        locks = Locks(kernel, source, 1, flags)
        assert locks.told(opcode, locks.body(0, kind), USER) == errno.ENOLCK
        assert locks.told(opcode, locks.body(0, kind), ROOT) == 0
        locks.end()
