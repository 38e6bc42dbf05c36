"""What the tests of the operations share: a client without a mount, and the search for leaks.

A `Client` calls operations directly, under the none model, on the thread of the test. A
`Stepper` runs one operation call by call, so that others can come in between.

Every test that uses the fixture `leak_free` fails if it leaves a descriptor open, or if
ninefuse logs a warning meanwhile (a descriptor closed twice shows as one).
"""

from __future__ import annotations

import ast
import contextlib
import errno
import gc
import inspect
import logging
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import pytest
from helpers_executor import at_once, eager_switches

from ninefuse import ops
from ninefuse.calls import Acquire, Behind, Body, Call, FunctionCall, Release
from ninefuse.executor import NoThreading
from ninefuse.fuse import callbacks
from ninefuse.linux import ioctls
from ninefuse.linux.records import DirectoryEntry, next_entry, read_records
from ninefuse.linux.syscalls import Attributes
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import OpenDirectory, OpenFile
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid

P = ParamSpec("P")
T = TypeVar("T")

ROOT = ROOT_NODEID
UNKNOWN_NODEID = (1 << 63) + 12345
ILLEGAL_NAMES = [b"", b"/", b"a/b", b"a/", b"../a", b"a\0", b"\0"]


def bound_callbacks() -> list[str]:
    """The names of all callbacks, in the order in which callbacks.py defines or binds them."""
    found = []
    for node in ast.parse(inspect.getsource(callbacks)).body:
        if isinstance(node, ast.AsyncFunctionDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in found if not name.startswith("_")]


async def nothing(session: Session) -> None:
    """An operation that asks for nothing. What was left to be done is done after it."""


# Leaks


def descriptors() -> dict[int, str]:
    """The open descriptors of this process, and what each is of."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if the block leaves a descriptor open or has ninefuse complain."""
    complaints = _Complaints()
    logger = logging.getLogger("ninefuse")
    logger.addHandler(complaints)
    before = descriptors()
    try:
        yield
    finally:
        logger.removeHandler(complaints)
    left = descriptors().items() - before.items()
    if left:
        gc.collect()
        left = descriptors().items() - before.items()
    assert not left, "descriptors left open"
    assert not complaints.heard


@pytest.fixture
def leak_free() -> Iterator[None]:
    """Around a test: no descriptor is left open, none is closed twice."""
    with no_leaks():
        yield


# A client


class Client:
    """A 9P client that calls the operations directly; ``ROOT`` is its source directory."""

    def __init__(self, source: Path, **options: Any) -> None:
        self.source = source
        self.executor = NoThreading()
        self.session = Session(self.executor, **options)
        self.do(ops.attach, ROOT, str(source))

    def run(self, body: Body[T]) -> T:
        """Run an operation body to its end on this thread."""
        return self.executor.run_here(body)

    def do(
        self,
        operation: Callable[Concatenate[Session, P], Body[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call an operation of this client's session."""
        return self.run(operation(self.session, *args, **kwargs))

    # Shorthands for what most tests need before they come to their point

    def new(self) -> int:
        """A fid number that is free."""
        return self.session.kernel.new_number()

    def walk(self, *names: bytes | str, start: int = ROOT) -> int:
        """A new fid for what names lead to."""
        newfid = self.new()
        qids, _ = self.do(ops.walk, start, newfid, [os.fsencode(name) for name in names])
        assert len(qids) == len(names), "the walk ended early"
        return newfid

    def know(self, *names: bytes | str, start: int = ROOT) -> Fid:
        """The kernel's fid for what names lead to, a lookup counted."""
        _, fid = self.do(
            ops.walk, start, self.session.kernel.intern, [os.fsencode(name) for name in names]
        )
        assert fid is not None, "the walk ended early"
        return fid

    def open(self, *names: bytes | str, flags: int = os.O_RDONLY) -> int:
        """A new open fid."""
        fid = self.walk(*names)
        self.do(ops.lopen, fid, flags)
        return fid

    def create(self, name: bytes | str, data: bytes = b"", start: int = ROOT) -> int:
        """A new file, with this in it, and an open fid for it."""
        fid = self.walk(start=start)
        self.do(ops.lcreate, fid, os.fsencode(name), os.O_RDWR | os.O_EXCL, 0o644)
        assert self.do(ops.write, fid, 0, data) == len(data)
        return fid

    def forget(self, fid: Fid, count: int = 1) -> None:
        """Take lookups back."""
        self.session.kernel.forget([(fid.number, count)])
        self.rest()

    def rest(self) -> None:
        """Let everything deferred happen."""
        self.do(nothing)

    # Looking inside

    def fid(self, number: int) -> Fid:
        """What is behind a fid number."""
        return self.session.fids._fids[number]

    def node(self, number: int) -> Node:
        """The node that a fid stands on."""
        return self.fid(number).node

    def has(self, number: int) -> bool:
        """Whether a fid number is in use."""
        return number in self.session.fids._fids

    def descriptor(self, number: int) -> int:
        """The descriptor of an open fid."""
        opened = self.fid(number).opened
        assert isinstance(opened, OpenFile | OpenDirectory)
        return opened.fd

    def place(self, number: int) -> tuple[int, bytes]:
        """The qid path of the parent, and the name, that a fid's node remembers."""
        place = self.node(number).place
        assert place is not None
        return place[0].number, place[1]

    def lose_descriptor(self, fid: Fid) -> None:
        """Have the reclaimer close the descriptor of a node, as if it were the coldest."""
        fid.node.recent = False
        for node in self.session.fids.coldest(sys.maxsize):
            if node is not fid.node:
                node.recent = True
            elif (fd := self.session.fids.take_descriptor(node, node.uses)) >= 0:
                self.session.fids.close_node(fd)
            self.session.fids.unpin(node)
        assert fid.node.fd == -1

    def check_idle(self) -> None:
        """Nothing is under way: no lock is held, nobody but the table refers to a fid."""
        assert not self.executor.requests
        for lock in (self.session.rename_lock, self.session.fids.lock):
            s = lock.statistics()
            assert (s.readers, s.writing, s.waiting) == (0, False, 0)
        assert not len(self.session.ranges), "a change has not been ended"
        assert not len(self.session.names), "a name is still being taken away"
        locks = self.session.file_locks
        assert not len(locks.turns), "an operation on a lock has not been ended"
        assert not any(file.waiting for file in locks._files.values()), "somebody waits for a lock"
        table = self.session.fids
        fids = table._fids
        for number, fid in fids.items():
            assert fid.number == number
            assert fid.refs == 1, f"{fid!r} is still referenced"
        standing = Counter(fid.node for fid in fids.values())
        for node, count in standing.items():
            assert node.pins == 0, f"{node!r} is still pinned"
            assert node.refs == count, f"{node!r} is still referenced"
        with_own = {node for node in standing if node.fd >= 0 and node not in table._lent}
        assert table.descriptors == len(with_own), "a node outside the table has one"
        assert table._clock.keys() == with_own
        opened = sum(isinstance(fid.opened, OpenFile | OpenDirectory) for fid in fids.values())
        opened += locks.descriptors
        assert table.open_descriptors == opened, "one is claimed, or not counted off"
        assert all(node.fd == lender.fd for node, lender in table._lent.items())
        open_ones = {fid.opened for fid in fids.values() if fid.opened and fid.opened.fd >= 0}
        assert table._open.keys() | set(table._lent.values()) == open_ones
        assert not table._open.keys() & set(table._lent.values())

    def close(self) -> None:
        """End the session; nothing may be left of it."""
        self.rest()
        self.check_idle()
        self.session.fids.clear()
        self.executor.close()
        assert len(self.session.fids) == 0
        assert self.session.fids.descriptors == 0
        assert self.session.fids.open_descriptors == 0
        assert len(self.session.file_locks) == 0, "a lock has outlived its fid"


@contextlib.contextmanager
def daemon_umask() -> Iterator[None]:
    """The umask that the daemon has: callers' modes come with theirs applied."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def client_of(source: Path, **options: Any) -> Iterator[Client]:
    """A client of a source directory, for a ``with`` block."""
    with daemon_umask():
        client = Client(source, **options)
        try:
            yield client
        except BaseException:
            client.session.fids.clear()  # the test has failed: nothing more is looked at
            client.executor.close()
            raise
        client.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty source directory."""
    directory = tmp_path / "source"
    directory.mkdir()
    return directory


@pytest.fixture
def client(leak_free: None, source: Path) -> Iterator[Client]:
    """A client of an empty source directory. After the test nothing may be in use."""
    with client_of(source) as it:
        yield it


def module_of(operation: Callable[..., Any]) -> ModuleType:
    """The module of an operation, to replace something in it; ninefuse.ops hides it."""
    return sys.modules[operation.__module__]


@contextlib.contextmanager
def fails(*codes: int) -> Iterator[None]:
    """The block raises an OSError of one of these errnos."""
    with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared below
        yield
    wanted = " or ".join(errno.errorcode[code] for code in codes)
    assert info.value.errno in codes, f"{info.value!r} instead of {wanted}"


def outcome(function: Callable[[], T]) -> T | str:
    """What a function returns, or the name of its errno."""
    try:
        return function()
    except OSError as failure:
        return errno.errorcode[failure.errno or 0]


# One operation, call by call


def _name_of(call: Call[Any]) -> str:
    """The function that it calls, by name; Pread, Pwrite or Fsync."""
    return str(call.function.__name__ if isinstance(call, FunctionCall) else type(call).__name__)


class Stepper(Generic[T]):
    """Runs an operation body on this thread and stops before blocking calls."""

    def __init__(self, body: Body[T]) -> None:
        self._body = body
        self._value: Any = None
        self._error: BaseException | None = None
        self._call: Call[Any] | None = None
        self._granted = True
        self._result: T
        self.over = False
        self.calls: list[str] = []  # names of the functions that it called

    @property
    def waiting(self) -> bool:
        """Whether it waits for a lock."""
        return not self._granted

    def before(self, function: str) -> None:
        """Go on until it is about to call a function of this name."""
        while self._advance():
            assert self._call is not None
            if _name_of(self._call) == function:
                return
            self._perform()
        pytest.fail(f"it has ended, or waits, without a call of {function}")

    def after(self, function: str) -> None:
        """Go on until it has called a function of this name, but not taken note of it."""
        self.before(function)
        self._perform()

    def to_lock(self) -> None:
        """Go on until it waits for a lock."""
        while self._advance():
            self._perform()
        assert self.waiting

    def go(self) -> None:
        """Go on to its end, or until it waits for a lock."""
        while self._advance():
            self._perform()

    def finish(self) -> T:
        """Go on to its end."""
        while self._advance():
            self._perform()
        assert self.over, "it waits for a lock that nobody lets go"
        return self._result

    def _grant(self) -> None:
        self._granted = True

    def _perform(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        self.calls.append(_name_of(call))
        try:
            self._value = call.make()
        except OSError as failure:
            self._error = failure

    def _advance(self) -> bool:
        """Run it to its next call (true), or to its end or to a lock that it must wait for."""
        while self._call is None:
            if self.over or not self._granted:
                return False
            value, self._value = self._value, None
            failure, self._error = self._error, None
            try:
                body = self._body
                command = body.send(value) if failure is None else body.throw(failure)
            except StopIteration as stop:
                self._result = stop.value
                self.over = True
                return False
            finally:
                del failure
            if isinstance(command, Call):
                self._call = command
            elif isinstance(command, Acquire):
                self._granted = command.lock.acquire(command.mode, self._grant)
            elif isinstance(command, Release):
                command.taken.lock.release(command.taken.mode)
            elif isinstance(command, Behind):
                self._granted = command.turn.has_come(self._grant)
            else:
                raise TypeError(command)
        return True


def read_entries(fd: int, size: int) -> list[DirectoryEntry]:
    """The next entries of an open directory, of so many bytes of records at most."""
    records = read_records(fd, size)
    entries, at = [], 0
    while at < len(records):
        entry, at = next_entry(records, at)
        entries.append(entry)
    return entries


# Made-up files


def made_up(
    ino: int,
    *,
    device: tuple[int, int] = (8, 1),
    birth: int = 1,
    kind: int = stat.S_IFREG,
    mtime: int = 0,
    size: int = 0,
) -> Attributes:
    """The attributes of a file that does not exist."""
    return Attributes(
        mask=0xFFF,
        blksize=4096,
        flags=0,
        nlink=1,
        uid=0,
        gid=0,
        mode=kind | 0o644,
        ino=ino,
        size=size,
        blocks=0,
        flags_mask=0,
        atime_seconds=0,
        atime_nanoseconds=0,
        btime_seconds=0,
        btime_nanoseconds=birth,
        ctime_seconds=0,
        ctime_nanoseconds=0,
        mtime_seconds=0,
        mtime_nanoseconds=mtime,
        rdev_major=0,
        rdev_minor=0,
        dev_major=device[0],
        dev_minor=device[1],
    )


# Threads


def in_threads(*functions: Callable[[], object]) -> None:
    """Call each function on a thread of its own, and change threads as often as can be."""
    with eager_switches():
        at_once(*functions)


# What the machine offers


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may give files to others and drop capabilities"
)


def need_devices(directory: Path) -> None:
    """Skip the test where no device node can be made."""
    probe = directory / "device-probe"
    try:
        os.mknod(probe, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making device nodes is not permitted here")
    probe.unlink()


def need_flags(directory: Path) -> None:
    """Skip the test where files have no flags such as chattr(1) sets."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        ioctls.ask(fd, ioctls.FS_IOC_GETFLAGS)
    except OSError as failure:
        if failure.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise
        pytest.skip("the file system of tmp_path has no flags of files")
    finally:
        os.close(fd)


def need_attributes(directory: Path) -> None:
    """Skip the test where the file system has no extended attributes for users."""
    probe = directory / "attribute-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.probe", b"1")
    except OSError as failure:
        if failure.errno != errno.ENOTSUP:
            raise
        pytest.skip("the file system of tmp_path has no user attributes")
    finally:
        probe.unlink()
