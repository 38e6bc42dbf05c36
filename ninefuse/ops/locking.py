"""Byte-range locks: lock, getlock.

Locks touched: none of ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import IntEnum
from typing import NamedTuple

from ninefuse.calls import Begin, blocking
from ninefuse.errors import error
from ninefuse.tree.session import Session, check_offset
from ninefuse.tree.table import open_file_of


class LockStatus(IntEnum):
    """The answer to a lock request (9P2000.L)."""

    SUCCESS = 0
    BLOCKED = 1
    ERROR = 2
    GRACE = 3


class LockRange(NamedTuple):
    """A byte-range lock: what kind, where, whose."""

    type: int  # fcntl.F_RDLCK, F_WRLCK, F_UNLCK
    start: int  # bytes
    length: int  # bytes; 0: to the end of the file, however it grows
    pid: int = 0


_LOCK_FLAGS = 3  # P9_LOCK_FLAGS_BLOCK, P9_LOCK_FLAGS_RECLAIM
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock


async def lock(session: Session, fid: int, flags: int, wanted: LockRange) -> LockStatus:
    """Set or clear a byte-range lock that belongs to an open fid; never waits.

    Returns:
        BLOCKED where another open file holds a lock in the way: the client asks again.

    Raises:
        OSError: EINVAL, unopened fid or unknown flags; the errors of fcntl(2).

    Source: Tlock of 9P2000.L. Open-file-description locks, which end with the fid.
    """
    if session.announces:
        await Begin("lock", fid)
    if flags & ~_LOCK_FLAGS:
        raise error(errno.EINVAL)
    use = session.fids.get(fid)
    try:
        file = open_file_of(use)
        request = _flock(wanted)
        try:
            await blocking(use.node.number, fcntl.fcntl, file.fd, fcntl.F_OFD_SETLK, request)
        except (BlockingIOError, PermissionError):
            return LockStatus.BLOCKED
        return LockStatus.SUCCESS
    finally:
        session.fids.put(use)


async def getlock(session: Session, fid: int, wanted: LockRange) -> LockRange:
    """Which lock is in the way of ``wanted``; type F_UNLCK if none is.

    Raises:
        OSError: EINVAL, unopened; the errors of fcntl(2).

    Source: Tgetlock of 9P2000.L.
    """
    if session.announces:
        await Begin("getlock", fid)
    use = session.fids.get(fid)
    try:
        file = open_file_of(use)
        request = _flock(wanted)
        answer = await blocking(use.node.number, fcntl.fcntl, file.fd, fcntl.F_OFD_GETLK, request)
        assert isinstance(answer, bytes)
        kind, _whence, start, length, pid = _FLOCK.unpack(answer)
        return (
            LockRange(kind, start, length, pid)
            if kind != fcntl.F_UNLCK
            else LockRange(fcntl.F_UNLCK, wanted.start, wanted.length, wanted.pid)
        )
    finally:
        session.fids.put(use)


def _flock(wanted: LockRange) -> bytes:
    check_offset(wanted.start, wanted.length)
    return _FLOCK.pack(wanted.type, os.SEEK_SET, wanted.start, wanted.length, 0)
