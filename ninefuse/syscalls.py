"""System calls that Python's os module lacks, or offers without what is needed here.

All take descriptors and single names, never paths that are walked. Each may block; none
takes a lock. A call that a signal interrupts is made again, as Python does for its own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_WANTED = 0x1FFF  # the basic ones, the creation time, the mount
_STATX_NLINK = 0x4
_STATX_BTIME = 0x800
_STATX_ATTR_MOUNT_ROOT = 0x2000

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_UTIME_NOW = 0x3FFFFFFF
_UTIME_OMIT = 0x3FFFFFFE

# The types of file systems in statfs(2).
_OVERLAYFS = 0x794C7630
_EXT4 = 0xEF53  # and ext2, ext3
# File handles of these have the inode's number and its generation, or a server's own lasting
# name for the file. (A FUSE server's have a number that is forgotten with the inode.)
_LASTING_HANDLES = frozenset(
    (
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0xF2F52010,  # f2fs
        0x3153464A,  # jfs
        0x6969,  # nfs
    )
)
_LOCAL = frozenset(
    (
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0xF2F52010,  # f2fs
        0x3434,  # nilfs
        0x2FC12FC1,  # zfs
        0xCA451A4E,  # bcachefs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
    )
)

# What these show is made when it is read, whatever size they tell, and what is written to them
# is an order.
_LIVE = frozenset(
    (
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x27E0EB,  # cgroup
        0x63677270,  # cgroup2
        0x7655821,  # resctrl
        0x74726163,  # tracefs
        0x64626720,  # debugfs
        0x62656570,  # configfs
        0xDE5E81E4,  # efivarfs
        0x6165676C,  # pstore
        0x73636673,  # securityfs
        0xF97CFF8C,  # selinuxfs
        0x43415D53,  # smackfs
        0x5A3C69F0,  # apparmorfs
        0xCAFE4A11,  # bpf
        0x42494E4D,  # binfmt_misc
        0x65735543,  # fusectl
        0x6E667364,  # nfsd
        0x67596969,  # rpc_pipefs
        0x19800202,  # mqueue
        0x9FA1,  # openpromfs
        0xABBA1974,  # xenfs
    )
)

# Each mount of these has an id of its own, another's, or none.
_MADE_ANEW = frozenset(
    (
        _OVERLAYFS,  # which may have that of its upper layer
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x958458F6,  # hugetlbfs
        0x65735546,  # FUSE
    )
)

# struct fsuuid2: the length, and the UUID.
_UUID_SIZE = 17
_FS_IOC_GETFSUUID = 2 << 30 | _UUID_SIZE << 16 | 0x15 << 8  # _IOR(0x15, 0, struct fsuuid2)

_BILLION = 1_000_000_000


def _function(name: str, *argtypes: Any) -> Callable[..., int]:
    function = getattr(_libc, name)
    if argtypes:
        function.argtypes = argtypes

    def call(*args: Any) -> int:
        while True:
            result: int = function(*args)
            if result >= 0:
                return result
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    return call


_statx = _function(
    "statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
)
_renameat2 = _function(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)
_utimensat = _function("utimensat", ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_mount = _function(
    "mount",
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_setns = _function("setns", ctypes.c_int, ctypes.c_int)
_umount2 = _function("umount2", ctypes.c_char_p, ctypes.c_int)
_fstatfs = _function("fstatfs", ctypes.c_int, ctypes.c_void_p)
_getdents64 = _function("getdents64", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)

_name_to_handle_at = _function(
    "name_to_handle_at",
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)

_STATX = struct.Struct("=IIQIIIHxxQQQQqIxxxxqIxxxxqIxxxxqIxxxxIIIIQ")
_StatxBuffer = ctypes.c_char * 256
_Timespecs = struct.Struct("=qqqq")
_HANDLE = struct.Struct("=Ii")  # handle_bytes, handle_type; the handle follows
_MAX_HANDLE = 128  # bytes
_DIRENT = struct.Struct("=QqHB")  # d_ino, d_off, d_reclen, d_type; the name follows


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


def stat_descriptor(fd: int) -> Attributes:
    """The attributes of an open file, O_PATH ones included (statx(2))."""
    buffer = _StatxBuffer()
    _statx(fd, b"", _AT_EMPTY_PATH, _STATX_WANTED, buffer)
    return Attributes._make(_STATX.unpack_from(buffer))


def stat_name(directory: int, name: bytes) -> Attributes:
    """The attributes of a name in a directory; a symlink is not followed (statx(2))."""
    buffer = _StatxBuffer()
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    _statx(directory, name, flags, _STATX_WANTED, buffer)
    return Attributes._make(_STATX.unpack_from(buffer))


def open_step(directory: int, name: bytes) -> int:
    """An O_PATH descriptor of a name in a directory; a symlink is not followed."""
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


_SYS_OPENAT2 = 437  # on every architecture
_RESOLVE_NO_XDEV, _RESOLVE_CACHED = 0x01, 0x20
_OPEN_STEP = struct.pack(
    "=QQQ", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_XDEV | _RESOLVE_CACHED
)
_openat2 = ctypes.CDLL(None, use_errno=True).syscall
_openat2.argtypes = (
    *(ctypes.c_long, ctypes.c_long),
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),
)
_openat2.restype = ctypes.c_long


def open_cached(directory: int, name: bytes) -> int:
    """`open_step`, if the kernel has the name in memory and nothing is mounted on it.

    It waits for nobody, not even for the directory's lock (openat2(2) with RESOLVE_CACHED,
    since Linux 5.12).

    Raises:
        OSError: EAGAIN, it would have to wait, or cannot say; ENOENT and the like.
    """
    fd = int(_openat2(_SYS_OPENAT2, directory, name, _OPEN_STEP, len(_OPEN_STEP)))
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EINTR):
        code = errno.EAGAIN  # a mount point, an older kernel, or a container's rules
    raise OSError(code, os.strerror(code))


def device_behind(directory: int, name: bytes) -> tuple[int, int]:
    """The device (major, minor) that a name in a directory leads to, or with no name a descriptor.

    Where something is mounted on the name, the server of that is not asked (statx(2) with
    AT_STATX_DONT_SYNC, for no field at all).
    """
    buffer = _StatxBuffer()
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    if not name:
        flags |= _AT_EMPTY_PATH
    _statx(directory, name, flags, 0, buffer)
    found = Attributes._make(_STATX.unpack_from(buffer))
    return found.dev_major, found.dev_minor


def has_names(fd: int) -> bool:
    """Whether an open file has a name left, as far as is known without asking a server."""
    buffer = _StatxBuffer()
    _statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_NLINK, buffer)
    return Attributes._make(_STATX.unpack_from(buffer)).nlink > 0


class FileSystem(NamedTuple):
    """What statfs(2) says of the file system that a file lies on."""

    kind: int  # f_type
    id: int  # f_fsid; 0: none

    @property
    def is_overlay(self) -> bool:
        """Whether it is an overlayfs."""
        return self.kind == _OVERLAYFS

    @property
    def has_lasting_handles(self) -> bool:
        """Whether a file's handle stays the same for as long as the file exists."""
        return self.kind in _LASTING_HANDLES

    @property
    def orders_by_hash(self) -> bool:
        """Whether a cookie of more than 31 bits is the hash of the name that comes next.

        Of an overlayfs it is a layer's.
        """
        return self.kind in (_EXT4, _OVERLAYFS)

    @property
    def is_live(self) -> bool:
        """Whether its files show what there is at the moment, as those of /proc do."""
        return self.kind in _LIVE

    @property
    def is_local(self) -> bool:
        """Whether it is known to need no server to answer; not for what its layers may be."""
        return self.kind in _LOCAL

    @property
    def is_made_anew(self) -> bool:
        """Whether its id is of this mount of it only, or of something else beneath it."""
        return self.kind in _MADE_ANEW


def file_system_of(fd: int) -> FileSystem:
    """The file system of an open file; O_PATH will do (fstatfs(2))."""
    buffer = (ctypes.c_long * 32)()  # struct statfs is smaller; the type comes first
    _fstatfs(fd, buffer)
    # Seven numbers, each of a word as a rule, and two of 32 bits.
    low, high = struct.unpack_from("=II", buffer, 7 * ctypes.sizeof(ctypes.c_long))
    return FileSystem(int(buffer[0]) & 0xFFFFFFFF, high << 32 | low)


def uuid_of_file_system(fd: int) -> bytes:
    """The UUID of the file system of a file or directory; empty where there is none to be had.

    The file is opened for reading for it (ioctl_getfsuuid, from Linux 6.9 on).
    """
    buffer = bytearray(_UUID_SIZE)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        readable = os.open(f"/proc/self/fd/{fd}", flags)
        try:
            fcntl.ioctl(readable, _FS_IOC_GETFSUUID, buffer)
        finally:
            os.close(readable)
    except OSError:
        return b""
    return bytes(buffer[1 : 1 + buffer[0]])


def file_handle(file: int, name: bytes = b"") -> bytes:
    """What stands for a file of a file system whatever its name (name_to_handle_at(2)).

    Args:
        file: a descriptor of the file, O_PATH will do, or of the directory ``name`` is in.
        name: a name in that directory; a symlink is not followed.
    """
    buffer = ctypes.create_string_buffer(_HANDLE.size + _MAX_HANDLE)
    _HANDLE.pack_into(buffer, 0, _MAX_HANDLE, 0)
    mount_id = ctypes.c_int()
    flags = 0 if name else _AT_EMPTY_PATH
    _name_to_handle_at(file, name, buffer, ctypes.byref(mount_id), flags)
    size, _ = _HANDLE.unpack_from(buffer)
    return buffer.raw[: _HANDLE.size + size]


def is_local(fd: int) -> bool:
    """Whether an open file lies on a file system that needs no server to answer.

    One that is not known is taken for one that does; so is overlayfs, whose layers may be
    anything.
    """
    return file_system_of(fd).is_local


def rename(old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int) -> None:
    """renameat2(2)."""
    _renameat2(old_dir, old_name, new_dir, new_name, flags)


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
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
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


class DirectoryEntry(NamedTuple):
    """An entry as getdents64(2) gives it."""

    ino: int
    offset: int  # the cookie of the entry after this one
    type: int  # DT_*, which is the S_IFMT bits shifted right by 12
    name: bytes


def _read_cached(fd: int, count: int, offset: int) -> bytes:
    """`read_cached` without the extension: by way of a buffer that the thread keeps.

    A new one for each read would be filled with zeros first, and a large one is the system's again
    as soon as it is let go, so that each of its pages would be made anew.
    """
    buffer: memoryview | None = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < count:
        buffer = memoryview(bytearray(count))
        if count <= _LARGEST_KEPT:
            _thread.buffer = buffer
    return bytes(buffer[: os.preadv(fd, [buffer[:count]], offset, os.RWF_NOWAIT)])


_thread = threading.local()  # buffer: of `_read_cached`
_LARGEST_KEPT = 1 << 20  # bytes; FUSE asks for no more at once

try:
    from ninefuse._ring import read_cached as read_cached
except ImportError:  # it was not built
    read_cached = _read_cached


def read_records(fd: int, size: int) -> bytes:
    """The next records of an open directory; none at its end (getdents64(2)).

    Args:
        fd: the directory, open for reading; its offset moves.
        size: how many bytes of records to take at most.
    """
    buffer = ctypes.create_string_buffer(size)
    filled = _getdents64(fd, buffer, size)
    return ctypes.string_at(buffer, filled)


def next_record(records: bytes, at: int) -> tuple[int, int, int, bytes, int]:
    """What is in the record at a place among some (`DirectoryEntry`), and the place behind it."""
    ino, offset, length, kind = _DIRENT.unpack_from(records, at)
    name = at + _DIRENT.size
    return ino, offset, kind, records[name : records.index(0, name)], at + length


def next_entry(records: bytes, at: int) -> tuple[DirectoryEntry, int]:
    """The entry of the record at a place among some, and the place behind it."""
    ino, offset, kind, name, after = next_record(records, at)
    return DirectoryEntry(ino, offset, kind, name), after


def place_after(records: bytes, offset: int, before: int) -> int:
    """The place behind the record that has a cookie; -1 if there is none before another place."""
    at = 0
    while at < before:
        _, found, length, _ = _DIRENT.unpack_from(records, at)
        at += int(length)
        if found == offset:
            return at
    return -1


# Numbers and values of the mount calls, which glibc has had only since 2.36. They are
# the same on every architecture (include/uapi/asm-generic/unistd.h).
_SYS_OPEN_TREE, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 430, 431, 432
_OPEN_TREE_CLONE = 1
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6

_syscall = _function("syscall")


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
            ctypes.c_long(_AT_EACCESS | _AT_EMPTY_PATH),
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
        ctypes.c_long(_OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH),
    )
