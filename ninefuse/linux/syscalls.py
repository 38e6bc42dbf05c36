"""System calls that Python's os module lacks, or offers without what is needed here.

All take descriptors and single names, never paths that are walked. Each may block; none
takes a lock. A call that a signal interrupts is made again, as Python does for its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from enum import Enum
from typing import Any, NamedTuple

from ninefuse.errors import error
from ninefuse.linux.libc import AT_EMPTY_PATH, function

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_STATX_DONT_SYNC = 0x4000
_BY_NAME = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
_STATX_WANTED = 0x1FFF  # the basic ones, the creation time, the mount
_STATX_NLINK = 0x4
_STATX_BTIME = 0x800
_STATX_ATTR_MOUNT_ROOT = 0x2000

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_UTIME_NOW = 0x3FFFFFFF
_UTIME_OMIT = 0x3FFFFFFE

_BILLION = 1_000_000_000


_statx = function(
    "statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
)
_renameat2 = function(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)
_utimensat = function("utimensat", ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_mount = function(
    "mount",
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_setns = function("setns", ctypes.c_int, ctypes.c_int)
_syncfs = function("syncfs", ctypes.c_int)
_umount2 = function("umount2", ctypes.c_char_p, ctypes.c_int)
_STATX = struct.Struct("=IIQIIIHxxQQQQqIxxxxqIxxxxqIxxxxqIxxxxIIIIQ")
_StatxBuffer = ctypes.c_char * 256
_Timespecs = struct.Struct("=qqqq")


class PollFd(ctypes.Structure):
    """struct pollfd (poll(2))."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


_poll = ctypes.PyDLL(None).poll


def is_ready(pollfd: Any) -> bool:
    """Whether what a `PollFd` (by ctypes.byref) waits for is there; does not wait.

    Unlike select.poll it keeps the interpreter's lock, so no other thread is woken by it.
    """
    return bool(_poll(pollfd, 1, 0) > 0)


class Attributes(NamedTuple):
    """What statx(2) says of a file, in the order in which the kernel lays it out."""

    mask: int
    blksize: int
    flags: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int  # of 512 bytes
    flags_mask: int
    atime_seconds: int
    atime_nanoseconds: int
    btime_seconds: int
    btime_nanoseconds: int
    ctime_seconds: int
    ctime_nanoseconds: int
    mtime_seconds: int
    mtime_nanoseconds: int
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int
    mount_id: int = 0  # 0: the kernel does not say (before Linux 5.8)

    @property
    def is_mount_root(self) -> bool:
        """Whether something is mounted here, and this is its root."""
        return bool(self.flags & _STATX_ATTR_MOUNT_ROOT)

    @property
    def kind(self) -> int:
        """The file type: the S_IFMT bits of the mode."""
        return stat.S_IFMT(self.mode)

    @property
    def dev(self) -> int:
        """The device that the file lies on."""
        return os.makedev(self.dev_major, self.dev_minor)

    @property
    def rdev(self) -> int:
        """The device that a special file stands for."""
        return os.makedev(self.rdev_major, self.rdev_minor)

    @property
    def atime_ns(self) -> int:
        """Last access, nanoseconds since 1970."""
        return self.atime_seconds * _BILLION + self.atime_nanoseconds

    @property
    def mtime_ns(self) -> int:
        """Last change of the data, nanoseconds since 1970."""
        return self.mtime_seconds * _BILLION + self.mtime_nanoseconds

    @property
    def ctime_ns(self) -> int:
        """Last change of the inode, nanoseconds since 1970."""
        return self.ctime_seconds * _BILLION + self.ctime_nanoseconds

    @property
    def has_birth(self) -> bool:
        """Whether the file system keeps a creation time."""
        return bool(self.mask & _STATX_BTIME)

    @property
    def birth(self) -> int:
        """Creation time in nanoseconds, 0 where the file system does not keep it."""
        return self.btime_seconds * _BILLION + self.btime_nanoseconds


def proc_path(fd: int) -> str:
    """The path by which calls that take no descriptor reach an open file (proc(5))."""
    return f"/proc/self/fd/{fd}"


_SYS_OPENAT2 = 437  # on every architecture
_RESOLVE_NO_XDEV, _RESOLVE_CACHED = 0x01, 0x20
_OPEN_HOW = struct.Struct("=QQQ")
_OPEN_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_openat2 = ctypes.CDLL(None, use_errno=True).syscall
_openat2.argtypes = (
    *(ctypes.c_long, ctypes.c_long),
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),
)
_openat2.restype = ctypes.c_long


def _look(cls: type[Attributes], fd: int, name: bytes, flags: int, mask: int) -> Attributes:
    """`statx` without the extension."""
    buffer = _StatxBuffer()
    _statx(fd, name, flags, mask, buffer)
    return cls._make(_STATX.unpack_from(buffer))


def _open(directory: int, name: bytes, flags: int, resolve: int) -> int:
    """`open_in_memory` without the extension."""
    how = _OPEN_HOW.pack(flags, 0, resolve)
    fd = int(_openat2(_SYS_OPENAT2, directory, name, how, len(how)))
    return fd if fd >= 0 else -ctypes.get_errno()


try:
    from ninefuse.linux._statx import open_in_memory as open_in_memory
    from ninefuse.linux._statx import statx as statx
except ImportError:  # it was not built
    open_in_memory = _open
    statx = _look  # type: ignore[assignment]


def stat_descriptor(fd: int) -> Attributes:
    """The attributes of an open file, O_PATH ones included (statx(2))."""
    return statx(Attributes, fd, b"", AT_EMPTY_PATH, _STATX_WANTED)


def stat_name(directory: int, name: bytes) -> Attributes:
    """The attributes of a name in a directory; a symlink is not followed (statx(2))."""
    return statx(Attributes, directory, name, _BY_NAME, _STATX_WANTED)


def open_step(directory: int, name: bytes) -> int:
    """An O_PATH descriptor of a name in a directory; a symlink is not followed."""
    return os.open(name, _OPEN_STEP, dir_fd=directory)


def open_cached(directory: int, name: bytes) -> int:
    """`open_step`, if the kernel has the name in memory and nothing is mounted on it.

    It waits for nobody, not even for the directory's lock (openat2(2) with RESOLVE_CACHED,
    since Linux 5.12).

    Raises:
        OSError: EAGAIN, it would have to wait, or cannot say; ENOENT and the like.
    """
    fd = open_in_memory(directory, name, _OPEN_STEP, _RESOLVE_NO_XDEV | _RESOLVE_CACHED)
    if fd >= 0:
        return fd
    code = -fd
    if code in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EINTR):
        code = errno.EAGAIN  # a mount point, an older kernel, or a container's rules
    raise error(code)


def device_behind(directory: int, name: bytes) -> tuple[int, int]:
    """The device (major, minor) that a name in a directory leads to, or with no name a descriptor.

    Where something is mounted on the name, the server of that is not asked (statx(2) with
    AT_STATX_DONT_SYNC, for no field at all).
    """
    flags = _BY_NAME | _AT_STATX_DONT_SYNC
    if not name:
        flags |= AT_EMPTY_PATH
    found = statx(Attributes, directory, name, flags, 0)
    return found.dev_major, found.dev_minor


def has_names(fd: int) -> bool:
    """Whether an open file has a name left, as far as is known without asking a server."""
    how = AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    return statx(Attributes, fd, b"", how, _STATX_NLINK).nlink > 0


def rename(old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int) -> None:
    """renameat2(2)."""
    _renameat2(old_dir, old_name, new_dir, new_name, flags)


# Of 64 bits everywhere, unlike fallocate of C libraries that know the other for 32-bit programs.
_fallocate = function(
    "fallocate64" if hasattr(ctypes.CDLL(None), "fallocate64") else "fallocate",
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
)

# Modes of fallocate(2) that move what comes after, too (include/uapi/linux/falloc.h).
FALLOC_FL_COLLAPSE_RANGE = 0x08
FALLOC_FL_INSERT_RANGE = 0x20


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Reserve, free or zero a part of an open file (fallocate(2)).

    Args:
        fd: open for writing.
        mode: 0, or FALLOC_FL_*; 31 bits.
        offset: where the part begins, in bytes; 63 bits.
        length: of the part, in bytes; 63 bits.

    Raises:
        OSError: the errors of fallocate(2).
    """
    _fallocate(fd, mode, offset, length)


def sync_file_system(fd: int) -> None:
    """Make all of the file system durable that an open file lies on (syncfs(2)).

    Args:
        fd: the file; O_PATH will not do.

    Raises:
        OSError: the errors of syncfs(2), those of writing back among them.
    """
    _syncfs(fd)


class SetTime(Enum):
    """What else than a moment a file's time can be set to."""

    NOW = (0, _UTIME_NOW)
    OMIT = (0, _UTIME_OMIT)  # leave it as it is


def set_times(fd: int, atime_ns: int | SetTime, mtime_ns: int | SetTime) -> None:
    """Set the times of an open file, O_PATH ones and symlinks included (utimensat(2)).

    Args:
        fd: the file.
        atime_ns: last access, nanoseconds since 1970, or a `SetTime`.
        mtime_ns: last change, likewise.

    Raises:
        OSError: EINVAL, further from 1970 than 64 bits of seconds reach; the errors of
            utimensat(2).
    """
    try:
        times = _Timespecs.pack(*_timespec(atime_ns), *_timespec(mtime_ns))
    except struct.error:
        raise error(errno.EINVAL) from None
    _utimensat(_AT_FDCWD, b"/proc/self/fd/%d" % fd, times, 0)


def _timespec(ns: int | SetTime) -> tuple[int, int]:
    if isinstance(ns, SetTime):
        return ns.value
    return divmod(ns, _BILLION)


_MNT_DETACH = 2


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """mount(2); ``data`` is what the file system itself reads of the options."""
    _mount(os.fsencode(source), os.fsencode(target), os.fsencode(kind), flags, os.fsencode(data))


def detach(target: str) -> None:
    """Take what is mounted on a path away from it; it ends with its last use (umount2(2))."""
    _umount2(os.fsencode(target), _MNT_DETACH)


_CLONE_NEWNS = 0x20000


def enter_mount_namespace(fd: int) -> None:
    """Change this process, which must have one thread only, to another's mounts (setns(2))."""
    _setns(fd, _CLONE_NEWNS)


# Numbers and values of the mount calls, which glibc has had only since 2.36. They are
# the same on every architecture (include/uapi/asm-generic/unistd.h).
_SYS_OPEN_TREE, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 430, 431, 432
_OPEN_TREE_CLONE = 1
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6

_syscall = function("syscall")


def detached_mount(kind: bytes) -> int:
    """Mount a file system that needs no source, visible to nobody else.

    Args:
        kind: its type, as in mount(8)'s -t.

    Returns:
        A descriptor of its root; closing it ends the mount (fsmount(2)).
    """
    context = _syscall(
        ctypes.c_long(_SYS_FSOPEN), ctypes.c_char_p(kind), ctypes.c_long(_FSOPEN_CLOEXEC)
    )
    try:
        _syscall(
            ctypes.c_long(_SYS_FSCONFIG),
            ctypes.c_long(context),
            ctypes.c_long(_FSCONFIG_CMD_CREATE),
            ctypes.c_void_p(),
            ctypes.c_void_p(),
            ctypes.c_long(0),
        )
        return _syscall(
            ctypes.c_long(_SYS_FSMOUNT),
            ctypes.c_long(context),
            ctypes.c_long(_FSMOUNT_CLOEXEC),
            ctypes.c_long(0),
        )
    finally:
        os.close(context)


_SYS_FACCESSAT2 = 439
_AT_EACCESS = 0x200


def check_execution(fd: int) -> None:
    """Raise what execve(2) would for want of permission: the thread's effective one.

    A kernel without faccessat2(2), before 5.8, is not asked.

    Args:
        fd: the file, O_PATH will do.

    Raises:
        OSError: EACCES, also where the file lies on what was mounted noexec.
    """
    _check_access(fd, os.X_OK)


def may_write(fd: int) -> bool:
    """Whether this thread, with its effective rights, may write to a file.

    Args:
        fd: the file, O_PATH will do.
    """
    try:
        _check_access(fd, os.W_OK)
    except OSError:
        return False
    return True


def _check_access(fd: int, mode: int) -> None:
    try:
        _syscall(
            ctypes.c_long(_SYS_FACCESSAT2),
            ctypes.c_long(fd),
            ctypes.c_char_p(b""),
            ctypes.c_long(mode),
            ctypes.c_long(_AT_EACCESS | AT_EMPTY_PATH),
        )
    except OSError as e:
        if e.errno != errno.ENOSYS:
            raise


def without_mounts(directory: int) -> int:
    """A descriptor of the same directory, in which nothing is or will be mounted (open_tree(2)).

    What a mount there has covered is seen instead. Takes CAP_SYS_ADMIN.
    """
    return _syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_long(directory),
        ctypes.c_char_p(b""),
        ctypes.c_long(_OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH),
    )
