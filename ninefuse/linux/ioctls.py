"""The ioctls that are passed on to a file of the source, with what each really moves.

An ioctl can do anything, and what it reads and writes is known to itself alone. So only those
stand here that are about the file they are called on, move a structure without pointers, and take
no other right than a caller can be given: the attributes of chattr(1) and of xfs_io(8), project
numbers among them.

Numbers are as most architectures have them (include/uapi/asm-generic/ioctl.h); on alpha, mips,
powerpc and sparc nothing is known by these.

Each call may block; none takes a lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

from ninefuse.errors import error
from ninefuse.linux.callers import OWN, Caller, may_change_projects
from ninefuse.linux.credentials import acting_as

_OUT, _IN = 2, 1  # of the kernel; into it
_SHIFT_DIRECTION, _SHIFT_SIZE, _SHIFT_KIND = 30, 16, 8
_MOST_SIZE = (1 << 14) - 1  # bytes, that a number can tell

_LONG = struct.calcsize("l")
_FLAGS = struct.Struct("=I")  # which the numbers below call a long
_FSXATTR = struct.Struct("=IIIII8x")  # flags, extsize, nextents, projid, cowextsize
_LABEL_SIZE = 256

# That a directory hands its project on, in either set of flags (include/uapi/linux/fs.h).
_PROJINHERIT_FLAG = 0x20000000
_PROJINHERIT_XFLAG = 0x200


def _number(direction: int, kind: int, number: int, size: int) -> int:
    return direction << _SHIFT_DIRECTION | size << _SHIFT_SIZE | kind << _SHIFT_KIND | number


FS_IOC_GETFLAGS = _number(_OUT, ord("f"), 1, _LONG)
FS_IOC_SETFLAGS = _number(_IN, ord("f"), 2, _LONG)
FS_IOC_GETVERSION = _number(_OUT, ord("v"), 1, _LONG)
FS_IOC_FSGETXATTR = _number(_OUT, ord("X"), 31, _FSXATTR.size)
FS_IOC_FSSETXATTR = _number(_IN, ord("X"), 32, _FSXATTR.size)
FS_IOC_GETFSLABEL = _number(_OUT, 0x94, 49, _LABEL_SIZE)


class Ioctl(NamedTuple):
    """An ioctl that is passed on."""

    moves: int  # bytes, whatever its number says
    sets: bool  # it takes these bytes, and changes the file; else it gives them


ALLOWED = {
    FS_IOC_GETFLAGS: Ioctl(_FLAGS.size, sets=False),
    FS_IOC_SETFLAGS: Ioctl(_FLAGS.size, sets=True),
    FS_IOC_GETVERSION: Ioctl(_FLAGS.size, sets=False),
    FS_IOC_FSGETXATTR: Ioctl(_FSXATTR.size, sets=False),
    FS_IOC_FSSETXATTR: Ioctl(_FSXATTR.size, sets=True),
    FS_IOC_GETFSLABEL: Ioctl(_LABEL_SIZE, sets=False),
}


def ask(fd: int, command: int) -> bytes:
    """What one of them that gives something gives (ioctl(2)). Blocks.

    Args:
        fd: open, for whatever.
        command: its number, which is in `ALLOWED`.

    Raises:
        OSError: ENOTTY, the file system has no such ioctl; its other errors.
    """
    # A server's file system goes by the number, and gives as much as that says.
    size = command >> _SHIFT_SIZE & _MOST_SIZE
    return fcntl.ioctl(fd, command, bytes(size))[: ALLOWED[command].moves]


def tell(fd: int, command: int, data: bytes, caller: Caller | None) -> None:
    """Make one of them that sets something, with the rights of a caller (ioctl(2)). Blocks.

    What the source checks by the thread's own ids is that it owns the file, and CAP_LINUX_IMMUTABLE
    (fs/file_attr.c). Two things it could not see, since it sees the daemon: kernels before 5.13
    leave all checks to a file system, and did not make these either.

    * A daemon that is not root owns what it may change. Of what is another caller's it does not.
    * Project numbers, which are what project quotas go by, are not for a process in a user
      namespace of its own.

    Args:
        fd: open, for whatever.
        command: its number, which is in `ALLOWED`.
        data: as many bytes as it moves.
        caller: who asks; None: the daemon.

    Raises:
        OSError: EPERM, the file is not the caller's; EINVAL, a project that the caller may not
            change; ENOTTY, the file system has no such ioctl; its other errors.
    """
    if caller is not None:
        if os.geteuid() != 0 and caller.uid not in (0, os.fstat(fd).st_uid):
            raise error(errno.EPERM)
        if _changes_project(fd, command, data) and not may_change_projects(caller):
            raise error(errno.EINVAL)
    size = command >> _SHIFT_SIZE & _MOST_SIZE
    with acting_as(caller, (OWN, fd, b"")):
        fcntl.ioctl(fd, command, data.ljust(size, b"\0"))


def _changes_project(fd: int, command: int, data: bytes) -> bool:
    if command == FS_IOC_SETFLAGS:
        (old,), (new,) = _FLAGS.unpack(ask(fd, FS_IOC_GETFLAGS)), _FLAGS.unpack(data)
        return bool((old ^ new) & _PROJINHERIT_FLAG)
    old, _, _, old_project, _ = _FSXATTR.unpack(ask(fd, FS_IOC_FSGETXATTR))
    new, _, _, new_project, _ = _FSXATTR.unpack(data)
    return bool((old ^ new) & _PROJINHERIT_XFLAG) or old_project != new_project
