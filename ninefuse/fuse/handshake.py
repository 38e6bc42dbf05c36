"""INIT: what kernel and daemon agree on at the start of a connection.

A reply may have no flag that the kernel has not offered. docs/operations.md says of each flag what
it is for, and why the others are not asked for.

Source: Linux include/uapi/linux/fuse.h; fs/fuse/inode.c, process_init_reply.

Locks touched: none.
"""

from __future__ import annotations

import errno
import struct
from enum import IntFlag
from typing import NamedTuple

from ninefuse.errors import error

MAJOR, MINOR = 7, 45  # of the protocol; what is older has fewer flags
_OLDEST_MINOR = 12  # FUSE_DONT_MASK, batched forgets a little later: Linux 2.6.31

# Bytes of one read or write, and pages: the kernel's own bound.
MAX_TRANSFER = 1 << 20
_MAX_PAGES = 256
# Of a request: its data, and what comes before it.
BUFFER_SIZE = MAX_TRANSFER + 8192

# Requests in the background; the kernel's defaults are 12 and 9. They are counted for the whole
# mount: at 12 a dozen reads stuck in one file would stop the buffered reads of all others. Well
# below what the session lets run at once. Who is not root gets what the kernel lets users have.
MAX_BACKGROUND = 16_000
CONGESTION_THRESHOLD = 12_000

_REPLY = struct.Struct("=IIIIHHIIHHIIH11H")


class Flags(IntFlag):
    """What can be agreed on, as far as it concerns a passthrough."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    CREATE_SUPP_GROUP = 1 << 34
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38


_WANTED = (
    Flags.ASYNC_READ
    | Flags.POSIX_LOCKS
    | Flags.ATOMIC_O_TRUNC
    | Flags.BIG_WRITES
    | Flags.DONT_MASK
    | Flags.FLOCK_LOCKS
    | Flags.AUTO_INVAL_DATA
    | Flags.DO_READDIRPLUS
    | Flags.READDIRPLUS_AUTO
    | Flags.ASYNC_DIO
    | Flags.PARALLEL_DIROPS
    | Flags.ABORT_ERROR
    | Flags.MAX_PAGES
    | Flags.HANDLE_KILLPRIV_V2
    | Flags.SETXATTR_EXT
    | Flags.INIT_EXT
    | Flags.CREATE_SUPP_GROUP
    | Flags.DIRECT_IO_ALLOW_MMAP
)


class Agreed(NamedTuple):
    """What a connection is by."""

    minor: int
    flags: Flags


def agree(
    major: int, minor: int, offered: int, *, acl: bool, exports: bool, passes: bool = False
) -> Agreed:
    """What to agree on.

    Args:
        major, minor: the kernel's version of the protocol.
        offered: its flags, 64 bits.
        acl: whether the kernel is to evaluate ACLs.
        exports: whether files are found that the kernel has forgotten.
        passes: whether it is to read and write files itself.

    Raises:
        OSError: EPROTO, the kernel is too old.
    """
    if major != MAJOR or minor < _OLDEST_MINOR:
        raise error(errno.EPROTO)
    wanted = _WANTED | (Flags.EXPORT_SUPPORT if exports else Flags.NO_EXPORT_SUPPORT)
    if acl:
        wanted |= Flags.POSIX_ACL
    if passes:
        wanted |= Flags.PASSTHROUGH
    return Agreed(min(minor, MINOR), Flags(wanted & offered))


def reply(agreed: Agreed, readahead: int) -> bytes:
    """The body of the reply.

    Args:
        agreed: of `agree`.
        readahead: bytes that the kernel reads ahead, which stay as they are.
    """
    flags = int(agreed.flags)
    has_pages = Flags.MAX_PAGES in agreed.flags
    data = _REPLY.pack(
        MAJOR,
        agreed.minor,
        readahead,
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        MAX_TRANSFER,
        1,  # nanosecond: the source's times as they are
        _MAX_PAGES if has_pages else 0,
        0,  # map alignment
        flags >> 32,
        # Of files that the kernel reads itself: they lie on no other file system, so that an
        # overlay can lie on the mount. (The kernel bears two that do.)
        int(Flags.PASSTHROUGH in agreed.flags),  # stack depth
        0,  # request timeout: none
        *[0] * 11,
    )
    # Older kernels take a shorter one and no other (FUSE_COMPAT_22_INIT_OUT_SIZE).
    return data[:24] if agreed.minor < 23 else data
