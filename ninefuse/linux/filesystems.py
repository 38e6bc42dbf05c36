"""File systems: what kind one is, what follows from that, what tells one from another.

Each call may block; none takes a lock.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import NamedTuple

from ninefuse.linux.libc import AT_EMPTY_PATH, function
from ninefuse.linux.syscalls import proc_path

# The types of file systems in statfs(2).
_OVERLAYFS = 0x794C7630
_EXT4 = 0xEF53  # and ext2, ext3
_XFS = 0x58465342
_BTRFS = 0x9123683E
# Where a file is found again by its inode's number (inodes.py).
_OPENS_NUMBERS = frozenset((_EXT4, _XFS, _BTRFS))
# File handles of these have the inode's number and its generation, or a server's own lasting
# name for the file. (A FUSE server's have a number that is forgotten with the inode.)
_LASTING_HANDLES = frozenset(
    (
        _EXT4,
        _XFS,
        0xF2F52010,  # f2fs
        0x3153464A,  # jfs
        0x6969,  # nfs
    )
)
_LOCAL = frozenset(
    (
        _EXT4,
        _XFS,
        _BTRFS,
        0xF2F52010,  # f2fs
        0x3434,  # nilfs
        0x2FC12FC1,  # zfs
        0xCA451A4E,  # bcachefs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
    )
)

# These have nothing to say at close(2): none of their files has a flush operation (struct
# file_operations in the kernel). Errors of theirs come with the write, or with a sync.
_SILENT_AT_CLOSE = frozenset(
    (
        _EXT4,
        _XFS,
        _BTRFS,
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

_FUSE = 0x65735546

# Each mount of these has an id of its own, another's, or none.
_MADE_ANEW = frozenset(
    (
        _OVERLAYFS,  # which may have that of its upper layer
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x958458F6,  # hugetlbfs
        _FUSE,
    )
)

# struct fsuuid2: the length, and the UUID.
_UUID_SIZE = 17
_FS_IOC_GETFSUUID = 2 << 30 | _UUID_SIZE << 16 | 0x15 << 8  # _IOR(0x15, 0, struct fsuuid2)

_fstatfs = function("fstatfs", ctypes.c_int, ctypes.c_void_p)
_name_to_handle_at = function(
    "name_to_handle_at",
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)

HANDLE_HEADER = struct.Struct("=Ii")  # handle_bytes, handle_type; the handle follows
_MAX_HANDLE = 128  # bytes


class FileSystem(NamedTuple):
    """What statfs(2) says of the file system that a file lies on."""

    kind: int  # f_type
    id: int  # f_fsid; 0: none

    @property
    def is_overlay(self) -> bool:
        """Whether it is an overlayfs."""
        return self.kind == _OVERLAYFS

    @property
    def is_fuse(self) -> bool:
        """Whether a program serves it, by FUSE."""
        return self.kind == _FUSE

    @property
    def has_lasting_handles(self) -> bool:
        """Whether a file's handle stays the same for as long as the file exists."""
        return self.kind in _LASTING_HANDLES

    @property
    def opens_numbers(self) -> bool:
        """Whether its files can be found by their inodes' numbers (`inodes.Inodes`)."""
        return self.kind in _OPENS_NUMBERS

    @property
    def is_xfs(self) -> bool:
        """Whether it is xfs."""
        return self.kind == _XFS

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
    def is_silent_at_close(self) -> bool:
        """Whether close(2) of a file is known to report no error."""
        return self.kind in _SILENT_AT_CLOSE

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
        readable = os.open(proc_path(fd), flags)
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
    buffer = ctypes.create_string_buffer(HANDLE_HEADER.size + _MAX_HANDLE)
    HANDLE_HEADER.pack_into(buffer, 0, _MAX_HANDLE, 0)
    mount_id = ctypes.c_int()
    flags = 0 if name else AT_EMPTY_PATH
    _name_to_handle_at(file, name, buffer, ctypes.byref(mount_id), flags)
    size, _ = HANDLE_HEADER.unpack_from(buffer)
    return buffer.raw[: HANDLE_HEADER.size + size]
