"""Any sequence of system calls does through a mount what it does on a plain directory.

The same steps are made twice, by the same code: in a directory of the source's file system,
and in one on the mount. What each step returns, and the trees that are left, must be the same;
and the mount must show the tree that is in its source, to the nanosecond.

A child makes the calls, and is given so many seconds: a call that hangs fails the test.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import random
import shutil
import stat
import struct
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mounting import PATIENCE, SESSION, SOAK, Child, Mount, become
from servers import SERVERS, need_engine

from ninefuse.linux import capabilities, syscalls

pytestmark = pytest.mark.soak

# What a failure tells, to have it again.
SEED = int(os.environ.get("NINEFUSE_SEED", random.SystemRandom().getrandbits(32) if SOAK else 0))
COUNT = int(os.environ.get("NINEFUSE_SEQUENCES", 2000 if SOAK else 30))
# Of more at a time hypothesis would make most by copying parts of one to another place.
ROUND = 10
AS_ROOT = os.geteuid() == 0
NOBODY = 65534


CASES = [(server, "oneself") for server in SERVERS]
CASES += [(s, "another") for s in (SERVERS if SOAK else ("none", "second, uring"))]

# So many directories above that of a sequence: what climbs out of it by ".." is still among
# things of its own.
NEST = "/".join(["nest"] * 4)

A_DAY = 86_400 * 1_000_000_000  # nanoseconds
PLANTED = 1_234_567_890_123_456_789  # the times of what is there at first
PAGE = mmap.PAGESIZE
TOO_FAR = 1 << 62

_libc = ctypes.CDLL(None, use_errno=True)
_AT_SYMLINK_NOFOLLOW = 0x100
_UTIME_NOW = 0x3FFFFFFF
_UTIME_OMIT = 0x3FFFFFFE


def set_times(path: bytes, atime: int, mtime: int, follow: bool) -> None:
    """utimensat(2); a time is nanoseconds since 1970, or one of its special values."""
    times = b"".join(
        struct.pack("=qq", 0, t) if t in (_UTIME_NOW, _UTIME_OMIT)
        else struct.pack("=qq", *divmod(t, 1_000_000_000))
        for t in (atime, mtime)
    )  # fmt: skip
    if _libc.utimensat(-100, path, times, 0 if follow else _AT_SYMLINK_NOFOLLOW):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def content(kind: int, size: int) -> bytes:
    """Data that tells who wrote it."""
    return (b"%d" % (kind % 10) * 63 + b"\n") * (size // 64) + b"%d" % (kind % 10) * (size % 64)


# The steps


class Place(NamedTuple):
    """A path, and what it starts from."""

    start: int  # 0: the directory of the sequence; else one of those that are open then
    path: bytes


ANY = 100
Target = Place | int  # a path, or one of the descriptors that are open then


class Step(NamedTuple):
    """A call: the name of a method of `Client`, and its arguments."""

    call: str
    arguments: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"{self.call}{self.arguments!r}"


class Opened(NamedTuple):
    """A descriptor of a sequence."""

    fd: int
    flags: int
    kind: int  # S_IFMT
    identity: tuple[int, int]


class Client:
    """Makes the steps of one sequence in one of the two directories.

    Here is all that is known to differ between the two, and why; everything else must not.

    * What is open for writing with O_SYNC or O_DSYNC, or with O_RDWR and O_APPEND, cannot be
      mapped shared through a mount (docs/limitations.md): `map` looks that it cannot be.
    * The data of a FIFO never reaches the daemon, so the FIFO's times in the source do not
      move: `shown` leaves them out.
    * The size of a directory, and the positions in it, are the file system's own affair:
      `shown` and `lseek` leave them out.
    * What root writes to keeps its set-user-id bit, but a daemon has laid down the capability for
      that (docs/rights.md): so does the child that makes the calls, if it is root's.
    * A page of a shared mapping is written back by the daemon, with a write like any other, which
      takes set-user-id and set-group-id bits away; a write to a mapping of a plain file does
      not. `map` leaves alone what has such a bit.
    * How big a file may be, the client's kernel does not know: it takes set-user-id and
      set-group-id bits away before the source answers EFBIG, which checks first. `truncate` and
      `pwrite` leave that out for files with such bits; and `lseek` is not taken so far, which
      a plain file system refuses.
    """

    def __init__(self, top: int, mounted: bool) -> None:
        self._top = top
        self._mounted = mounted
        self._mask = 0o022
        self._opened: list[Opened] = []
        for path, flags in ((b"a", os.O_DIRECTORY), (b"b", os.O_RDWR), (b"a/a", os.O_RDWR)):
            with suppress(OSError):
                self.open(Place(0, path), flags, 0)

    def make(self, step: Step) -> object:
        """What comes of a step: what it returns, or the name of its errno."""
        try:
            return getattr(self, step.call)(*step.arguments)
        except OSError as e:
            return errno.errorcode[e.errno or 0]

    def end(self) -> None:
        for opened in self._opened:
            os.close(opened.fd)

    def _live(self, n: int) -> Opened:
        """One of the files that are open for data, if there are any; from ANY on, of all."""
        able = [o for o in self._opened if o.kind == stat.S_IFREG and not o.flags & os.O_PATH]
        if n >= ANY or not able:
            able = self._opened
        if not able:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return able[-1 - n % len(able)]

    def _start(self, place: Place) -> int:
        directories = [o.fd for o in self._opened if o.kind == stat.S_IFDIR]
        if not place.start or not directories:
            return self._top
        return directories[-place.start % len(directories)]

    def _path(self, place: Place) -> bytes:
        return b"/proc/self/fd/%d/%s" % (self._start(place), place.path)

    def _target(self, target: Target) -> bytes | int:
        return self._path(target) if isinstance(target, Place) else self._live(target).fd

    def shown(self, s: os.stat_result) -> tuple[object, ...]:
        kind = stat.S_IFMT(s.st_mode)
        same = tuple(n for n, o in enumerate(self._opened) if o.identity == (s.st_dev, s.st_ino))
        return (
            stat.filemode(s.st_mode),
            s.st_nlink,
            s.st_uid,
            s.st_gid,
            None if kind == stat.S_IFDIR else s.st_size,
            None if kind == stat.S_IFIFO else moment(s.st_mtime_ns),
            same,
        )

    # Descriptors

    def open(self, place: Place, flags: int, mode: int) -> object:
        # A FIFO is not waited for.
        fd = os.open(place.path, flags | os.O_NONBLOCK, mode, dir_fd=self._start(place))
        s = os.fstat(fd)
        kind = stat.S_IFMT(s.st_mode)
        self._opened.append(Opened(fd, flags, kind, (s.st_dev, s.st_ino)))
        shown = self.shown(s)
        if len(self._opened) > 8:
            os.close(self._opened.pop(3).fd)
        return shown

    def close(self, n: int) -> None:
        opened = self._live(n)
        self._opened.remove(opened)  # which is equal to no other
        os.close(opened.fd)

    def read(self, n: int, size: int) -> bytes:
        return os.read(self._live(n).fd, size)

    def pread(self, n: int, size: int, offset: int) -> bytes:
        return os.pread(self._live(n).fd, size, offset)

    def write(self, n: int, kind: int, size: int) -> int:
        return os.write(self._live(n).fd, content(kind, size))

    def pwrite(self, n: int, kind: int, size: int, offset: int) -> int:
        fd = self._live(n).fd
        if offset >= TOO_FAR and is_privileged(os.fstat(fd)):
            return 0
        return os.pwrite(fd, content(kind, size), offset)

    def lseek(self, n: int, offset: int, whence: int) -> object:
        opened = self._live(n)
        if opened.kind == stat.S_IFDIR:
            return None
        return os.lseek(opened.fd, offset, whence)

    def fsync(self, n: int) -> None:
        os.fsync(self._live(n).fd)

    def fdatasync(self, n: int) -> None:
        os.fdatasync(self._live(n).fd)

    def map(self, n: int, kind: int, offset: int, size: int, flush: bool) -> object:
        """Write to a shared mapping of the first pages."""
        opened = self._live(n)
        s = os.fstat(opened.fd)
        there = min(s.st_size, 3 * PAGE)
        if not there or is_privileged(s):
            return None
        writes = opened.flags & os.O_ACCMODE == os.O_RDWR
        is_direct = opened.flags & (os.O_SYNC | os.O_DSYNC | os.O_APPEND)
        if writes and is_direct and SESSION == "pyfuse3":
            if self._mounted and opened.kind == stat.S_IFREG and not opened.flags & os.O_PATH:
                with pytest.raises(OSError, match="No such device"):
                    mmap.mmap(opened.fd, there)
            return None
        with mmap.mmap(opened.fd, there) as mapping:
            offset %= there
            before = mapping[offset : offset + 100]
            new = content(kind, min(size, there - offset))
            mapping[offset : offset + len(new)] = new
            if flush:
                mapping.flush()
        return before

    # Attributes

    def truncate(self, target: Target, size: int) -> None:
        file = self._target(target)
        if size < TOO_FAR or not is_privileged(os.stat(file)):
            os.truncate(file, size)

    def stat(self, target: Target) -> object:
        return self.shown(os.stat(self._target(target)))

    def lstat(self, place: Place) -> object:
        return self.shown(os.lstat(self._path(place)))

    def chmod(self, target: Target, mode: int) -> None:
        os.chmod(self._target(target), mode)

    def chown(self, place: Place, uid: int, gid: int, follow: bool) -> None:
        os.chown(self._path(place), uid, gid, follow_symlinks=follow)

    def fchown(self, n: int, uid: int, gid: int) -> None:
        os.fchown(self._live(n).fd, uid, gid)

    def utime(self, place: Place, atime: int, mtime: int, follow: bool) -> object:
        """Set times, and see that they are what they were set to."""
        path = self._path(place)
        set_times(path, atime, mtime, follow)
        s = os.stat(path, follow_symlinks=follow)
        # Only the new one: what has been read since is not the same on both sides, since a
        # mount reads from its cache.
        return None if atime == _UTIME_OMIT else moment(s.st_atime_ns), self.shown(s)

    def access(self, place: Place, mode: int) -> bool:
        return os.access(self._path(place), mode)

    def statvfs(self, target: Target) -> object:
        s = os.statvfs(self._target(target))
        return s.f_bsize, s.f_frsize, s.f_blocks, s.f_files, s.f_namemax

    def umask(self, mask: int) -> int:
        self._mask = mask
        return os.umask(mask)

    # Extended attributes

    def setxattr(self, target: Target, name: bytes, value: bytes, flags: int) -> None:
        os.setxattr(self._target(target), name, value, flags)

    def getxattr(self, target: Target, name: bytes) -> bytes:
        return os.getxattr(self._target(target), name)

    def listxattr(self, target: Target) -> list[str]:
        return sorted(os.listxattr(self._target(target)))

    def removexattr(self, target: Target, name: bytes) -> None:
        os.removexattr(self._target(target), name)

    # Names

    def mkdir(self, place: Place, mode: int) -> None:
        os.mkdir(place.path, mode, dir_fd=self._start(place))

    def rmdir(self, place: Place) -> None:
        os.rmdir(place.path, dir_fd=self._start(place))

    def mknod(self, place: Place, mode: int) -> None:
        os.mknod(place.path, mode, dir_fd=self._start(place))

    def symlink(self, target: bytes, place: Place) -> None:
        os.symlink(target, place.path, dir_fd=self._start(place))

    def readlink(self, place: Place) -> bytes:
        return os.readlink(place.path, dir_fd=self._start(place))

    def unlink(self, place: Place) -> None:
        os.unlink(place.path, dir_fd=self._start(place))

    def link(self, old: Place, new: Place, follow: bool) -> None:
        os.link(old.path, new.path, src_dir_fd=self._start(old), dst_dir_fd=self._start(new),
                follow_symlinks=follow)  # fmt: skip

    def rename(self, old: Place, new: Place, flags: int) -> None:
        syscalls.rename(self._start(old), old.path, self._start(new), new.path, flags)

    def listdir(self, target: Target) -> object:
        with os.scandir(self._target(target)) as entries:
            return sorted(
                (os.fsencode(e.name), e.is_dir(follow_symlinks=False), e.is_symlink())
                for e in entries
            )


def is_privileged(s: os.stat_result) -> bool:
    """Whether a file has one of the bits that a change of its data takes away."""
    return bool(s.st_mode & (stat.S_ISUID | stat.S_ISGID))


def moment(ns: int) -> object:
    """A time that somebody has set; that of a change on the way is another on either side."""
    return "now" if abs(time.time_ns() - ns) < A_DAY else ns


def mostly(good: list[Any], bad: list[Any]) -> st.SearchStrategy[Any]:
    """Nine times out of ten a good one."""
    return st.sampled_from(good * (-(-9 * len(bad) // len(good))) + bad)


# Few, so that they meet.
names = mostly([b"a", b"a", b"b", b"b", b"c", b"\xff"], [b".", b"..", b"x" * 255, b"x" * 256])
paths = st.one_of(
    names,
    names,
    st.lists(names, min_size=2, max_size=3).map(b"/".join),
    st.lists(names, min_size=1, max_size=2).map(b"/".join),
    mostly([b"a", b"b"], [b"a/", b"c/", b"c/.", b""]),
)
places = st.builds(Place, st.sampled_from([0, 0, 0, 1, 2, 3]), paths)
descriptors = mostly([0, 0, 1, 2, 3], [ANY + n for n in range(8)])
targets = st.one_of(places, places, descriptors)
files = st.one_of(descriptors, descriptors, descriptors, places)
kinds = st.integers(0, 9)
sizes = st.sampled_from([0, 1, 3, 100, 4095, 4096, 5000, 20_000])
offsets = mostly([0, 1, 90, 4096, 4090, 10_000, 70_000], [-1, TOO_FAR])
lengths = mostly([0, 1, 50, 4096, 5000, 30_000], [-1, TOO_FAR])
seeks = st.sampled_from([0, 0, 1, 50, -1, -50, 4096, 20_000, 70_000])
modes = st.sampled_from([0o644, 0o644, 0o755, 0o777, 0o600, 0, 0o444, 0o500, 0o300, 0o6755, 0o7777,
                         0o2775, 0o1777, 0o4711])  # fmt: skip
accesses = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR])
creating = st.sampled_from([0, 0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL])
others = st.sampled_from(
    [0, 0, 0, 0, os.O_TRUNC, os.O_TRUNC, os.O_APPEND, os.O_APPEND, os.O_NOFOLLOW, os.O_SYNC,
     os.O_DSYNC, os.O_DIRECTORY, os.O_PATH, os.O_PATH | os.O_NOFOLLOW]
)  # fmt: skip
flags = st.builds(lambda *parts: parts[0] | parts[1] | parts[2] | parts[3],
                  accesses, creating, others, others)  # fmt: skip
for_directories = st.sampled_from([os.O_DIRECTORY, os.O_DIRECTORY | os.O_PATH])
owners = st.sampled_from([-1, -1, NOBODY, os.geteuid(), 1])
times = st.sampled_from([_UTIME_NOW, _UTIME_OMIT, PLANTED + 1, 0, -5_123_456_789, 10**19, 2**31])
attributes = mostly([b"user.a", b"user.b", b"trusted.a"], [b"user.", b"bad", b"user." + b"x" * 300])
values = st.sampled_from([b"", b"1", b"22", b"3" * 100, b"4" * 3000, b"5" * 5000, b"6" * 70_000])
node_kinds = st.sampled_from([0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFIFO, stat.S_IFSOCK,
                              stat.S_IFDIR])  # fmt: skip
links = mostly([b"a", b"b", b"c", b"a/b"], [b"..", b".", b"../a", b"a/", b"", b"x" * 300])
follow = st.booleans()


def step(call: Callable[..., object], *arguments: st.SearchStrategy[Any]) -> Any:
    """A call and arguments for it."""
    return st.builds(Step, st.just(call.__name__), st.tuples(*arguments))


steps = st.one_of(
    *6 * [step(Client.open, places, flags, modes)],
    *2 * [step(Client.open, places, for_directories, st.just(0))],
    step(Client.close, descriptors),
    *2 * [step(Client.read, descriptors, sizes)],
    *2 * [step(Client.pread, descriptors, sizes, offsets)],
    *3 * [step(Client.write, descriptors, kinds, sizes)],
    *3 * [step(Client.pwrite, descriptors, kinds, sizes, offsets)],
    step(Client.lseek, descriptors, seeks,
         st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])),
    step(Client.fsync, descriptors),
    step(Client.fdatasync, descriptors),
    *2 * [step(Client.map, descriptors, kinds, offsets, sizes, st.booleans())],
    *2 * [step(Client.truncate, files, lengths)],
    *2 * [step(Client.stat, targets)],
    step(Client.lstat, places),
    *2 * [step(Client.chmod, targets, modes)],
    step(Client.chown, places, owners, owners, follow),
    step(Client.fchown, descriptors, owners, owners),
    *2 * [step(Client.utime, places, times, times, follow)],
    step(Client.access, places, st.integers(0, 7)),
    step(Client.statvfs, targets),
    step(Client.umask, st.sampled_from([0, 0o22, 0o77, 0o777])),
    *2 * [step(Client.setxattr, targets, attributes, values,
               st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]))],
    step(Client.getxattr, targets, attributes),
    step(Client.listxattr, targets),
    step(Client.removexattr, targets, attributes),
    *2 * [step(Client.mkdir, places, modes)],
    *2 * [step(Client.rmdir, places)],
    *2 * [step(Client.mknod, places, st.builds(int.__or__, node_kinds, modes))],
    *2 * [step(Client.symlink, links, places)],
    step(Client.readlink, places),
    *3 * [step(Client.unlink, places)],
    *3 * [step(Client.link, places, places, follow)],
    *4 * [step(Client.rename, places, places, st.just(0))],
    *3 * [step(Client.rename, places, places, st.sampled_from([1, 2, 2, 3]))],
    *2 * [step(Client.listdir, targets)],
)  # fmt: skip
# Lists of lists: hypothesis makes these longer, and one alone would not get shorter than its
# least size.
sequences = st.lists(st.lists(steps, min_size=1, max_size=9), min_size=1, max_size=15).map(
    lambda parts: [step for part in parts for step in part]
)


# Trees


class Facts(NamedTuple):
    """What there is to say of one file of a tree."""

    shown: tuple[object, ...]  # as of a step
    first_name: bytes  # of all its names
    data: object
    attributes: object
    # What another tree has otherwise, and the same tree must not.
    number: int
    size: int
    mtime: int
    ctime: int


def tree(directory: int) -> dict[bytes, Facts]:
    """Everything below a directory, by descriptors: paths may be longer than calls take."""
    found: dict[bytes, Facts] = {}
    first_names: dict[int, bytes] = {}
    shown = Client(-1, mounted=False).shown

    def look(fd: int, above: bytes) -> None:
        for name in sorted(map(os.fsencode, os.listdir(fd))):
            path = above + b"/" + name
            s = os.lstat(name, dir_fd=fd)
            through = b"/proc/self/fd/%d/%s" % (fd, name)
            fifo = stat.S_ISFIFO(s.st_mode)
            found[path] = Facts(
                shown(s),
                first_names.setdefault(s.st_ino, path),
                refused_or(_data, fd, name, s.st_mode),
                refused_or(_attributes, through),
                s.st_ino,
                s.st_size,
                0 if fifo else s.st_mtime_ns,
                0 if fifo else s.st_ctime_ns,
            )
            if stat.S_ISDIR(s.st_mode):
                with suppress(PermissionError):
                    below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
                    try:
                        look(below, path)
                    finally:
                        os.close(below)

    look(directory, b"")
    return found


def refused_or(function: Callable[..., object], *arguments: object) -> object:
    try:
        return function(*arguments)
    except PermissionError:  # tests that are not root's
        return "refused"


def _data(directory: int, name: bytes, mode: int) -> object:
    if stat.S_ISLNK(mode):
        return os.readlink(name, dir_fd=directory)
    if not stat.S_ISREG(mode):
        return None
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _attributes(path: bytes) -> list[tuple[str, bytes]]:
    listed = os.listxattr(path, follow_symlinks=False)
    return sorted((n, os.getxattr(path, n, follow_symlinks=False)) for n in listed)


# The two sides


def plant(top: Path, uid: int) -> None:
    """What a sequence finds: with another user, some of it is that user's."""
    top.mkdir(parents=True)
    (top / "a").mkdir()
    (top / "a" / "a").write_bytes(content(7, 5000))
    (top / "b").write_bytes(content(8, 100))
    (top / "a" / "b").mkdir()
    (top / "c").symlink_to("a")
    if uid:
        (top / "b").chmod(0o646)
        for path in (top, top / "a", top / "a" / "a"):
            os.chown(path, uid, uid)
    for path in (top / "a" / "a", top / "a" / "b", top / "a", top / "b", top / "c", top):
        os.utime(path, ns=(PLANTED, PLANTED), follow_symlinks=False)


def remove(top: Path) -> None:
    """Remove a tree, whatever modes its directories have."""
    top.chmod(0o700)
    for directory, below, _ in os.walk(top):
        for name in below:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(top)


def remove_below(directory: int) -> None:
    """Remove the tree in a directory, through the descriptor."""
    remove(Path(f"/proc/self/fd/{directory}") / NEST.partition("/")[0])


class Worker:
    """A child that makes calls for as long as there are any, below the same few directories."""

    def __init__(self, bases: dict[str, Path], uid: int) -> None:
        self._connection, theirs = Pipe()
        self._child = Child(_serve, theirs, bases, uid)
        theirs.close()  # so that the child's end is the end

    def ask(self, function: Callable[..., Any], base: str, path: str, *arguments: object) -> Any:
        """Call a function with a descriptor of a directory."""
        self._connection.send((function, base, path, arguments))
        if not self._connection.poll(PATIENCE):
            raise Hung(f"{function.__name__} is not over within {PATIENCE:g} s on {base}")
        try:
            succeeded, value = self._connection.recv()
        except EOFError:
            raise Hung(f"{function.__name__}, on {base}: exit {self._child.wait()}") from None
        if not succeeded:
            raise AssertionError(f"in the child:\n{value}")
        return value

    def close(self) -> None:
        self._child.kill()
        self._connection.close()


class Hung(BaseException):
    """No Exception, which hypothesis would try to have again with fewer steps."""


def _serve(connection: Connection[Any, Any], bases: dict[str, Path], uid: int) -> None:
    there = {name: os.open(path, os.O_PATH | os.O_DIRECTORY) for name, path in bases.items()}
    if uid:
        become(uid)
    elif AS_ROOT:
        capabilities.settle()
    while True:
        function, base, path, arguments = connection.recv()
        try:
            directory = os.open(path, os.O_PATH | os.O_DIRECTORY, dir_fd=there[base])
            try:
                answer = True, function(directory, *arguments)
            finally:
                os.close(directory)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)


def make_all(top: int, steps: list[Step], mounted: bool) -> list[object]:
    """What comes of each step of a sequence."""
    os.umask(0o022)
    client = Client(top, mounted)
    try:
        return [client.make(step) for step in steps]
    finally:
        client.end()
        os.umask(0o022)


def tree_of(directory: int) -> dict[bytes, Facts]:
    readable = os.open(f"/proc/self/fd/{directory}", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return tree(readable)
    finally:
        os.close(readable)


class Sides:
    """A plain directory, and a mount; each sequence has a new directory in both."""

    def __init__(self, mount: Mount, plain: Path, uid: int) -> None:
        self._bases = {"plain": plain, "source": mount.source, "mount": mount.path}
        self._uid = uid
        self._number = 0
        self.looker = Worker(self._bases, 0)
        self.maker = Worker(self._bases, uid) if uid else self.looker
        self.under_way: list[Step] = []

    def close(self) -> None:
        self.maker.close()
        self.looker.close()

    def compare(self, steps: list[Step]) -> None:
        self.under_way = steps
        self._number += 1
        name = str(self._number)
        for base in ("plain", "source"):
            plant(self._bases[base] / name / NEST, self._uid)
        here = self.maker.ask(make_all, "plain", f"{name}/{NEST}", steps, False)
        there = self.maker.ask(make_all, "mount", f"{name}/{NEST}", steps, True)
        told = ""
        for step, plain, mounted in zip(steps, here, there, strict=True):
            told += f"{step!r}\n    {plain!r:.300}\n"
            assert mounted == plain, f"{told}through the mount:\n    {mounted!r:.300}"
        shown = self.looker.ask(tree_of, "mount", name)
        source = self.looker.ask(tree_of, "source", name)
        plain = self.looker.ask(tree_of, "plain", name)
        assert shown == source, f"{told}not what is in the source:\n{difference(source, shown)}"
        alike = [{path: facts[:4] for path, facts in t.items()} for t in (plain, shown)]
        assert alike[0] == alike[1], f"{told}other trees:\n{difference(*alike)}"
        if self._number % 4 == 0:
            self.looker.ask(remove_below, "mount", name)
        # The others without the kernel's knowledge, which may go on to believe in them: their
        # inode numbers will be those of new files.
        for base in ("plain", "source"):
            remove(self._bases[base] / name)


def difference(one: dict[bytes, Any], other: dict[bytes, Any]) -> str:
    return "\n".join(
        f"{path!r:.100}\n    {one.get(path)!r:.1000}\n    {other.get(path)!r:.1000}"
        for path in sorted(one.keys() | other.keys())
        if one.get(path) != other.get(path)
    )


@pytest.mark.limit(4 * 3600 if SOAK else 300)
@pytest.mark.parametrize(("server", "who"), CASES)
def test_any_calls_do_what_they_do_on_a_plain_directory(
    new_mount: Callable[..., Mount], tmp_path: Path, server: str, who: str
) -> None:
    """Thirty sequences of each, fewer of another user; `make soak`, two thousand of each."""
    need_engine(server)
    if who == "another" and not AS_ROOT:
        pytest.skip("needs root: acts as another user")
    options = ("-o", "allow_other") if who == "another" else ()
    mount = new_mount(*SERVERS[server], *options)
    plain = tmp_path / "plain"
    plain.mkdir()
    own = 10 * list(SERVERS).index(server) + len(who)
    sides = Sides(mount, plain, NOBODY if who == "another" else 0)
    try:
        for n in range(COUNT // (ROUND if who == "oneself" or SOAK else 3 * ROUND)):
            check_some(sides, SEED + n, own)
    except Hung as e:
        pytest.fail(f"{e}\n{sides.under_way}")
    finally:
        sides.close()


def check_some(sides: Sides, of_round: int, own: int) -> None:
    """A round of sequences; no two servers have the same."""

    @seed(of_round * 100 + own)
    @settings(
        max_examples=ROUND,
        derandomize=not SOAK,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
    @given(steps=sequences)
    def check(steps: list[Step]) -> None:
        sides.compare(steps)

    try:
        check()
    except AssertionError as e:
        raise AssertionError(
            f"to have it again: NINEFUSE_SEED={of_round} NINEFUSE_SEQUENCES={ROUND}\n{e}"
        ) from None
