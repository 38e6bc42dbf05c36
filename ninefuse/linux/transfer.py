"""Reading and writing a file's bytes: all that were asked for, or those that are at hand.

Locks touched: none. The kernel takes an inode's.
"""

from __future__ import annotations

import errno
import os
import threading

from ninefuse.errors import error
from ninefuse.linux.callers import Caller
from ninefuse.linux.credentials import pwrite_as, spending_as


def read_fully(fd: int, count: int, offset: int) -> bytes:
    """Read ``count`` bytes from ``offset``; fewer at the file's end only. Blocks.

    Raises:
        OSError: of pread(2).
    """
    data = os.pread(fd, count, offset)
    # A short read is the end of the file to whoever asked; make sure that it is.
    while data and len(data) < count:
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def read_now(fd: int, count: int, offset: int) -> bytes:
    """As `read_fully`, of what the page cache holds.

    Raises:
        BlockingIOError: it does not hold all of it.
        OSError: of preadv2(2); EOPNOTSUPP, the file system cannot tell.
    """
    data = read_cached(fd, count, offset)
    # A short read is the end of the file to whoever asked.
    if len(data) < count and offset + len(data) < os.fstat(fd).st_size:
        raise error(errno.EAGAIN)
    return data


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
    from ninefuse.linux._transfer import read_cached as read_cached
except ImportError:  # it was not built
    read_cached = _read_cached


def write_fully(fd: int, data: bytes, offset: int, done: int = 0) -> int:
    """Write data at ``offset``; how much of it is written in all. Blocks.

    Args:
        fd: where.
        data: what.
        offset: where its first byte goes.
        done: how much of it was written before.

    Raises:
        OSError: of pwrite(2), if nothing of it is written.
    """
    done = done or os.pwrite(fd, data, offset)
    while done < len(data):
        try:
            more = os.pwrite(fd, memoryview(data)[done:], offset + done)
        except OSError:
            return done  # the error comes back with the write of the rest
        if not more:
            break
        done += more
    return done


def write_for(
    writer: Caller, group: int | None, fd: int, data: bytes, offset: int, done: int = 0
) -> int:
    """As `write_fully`, with the rights of a caller (`spending_as`).

    Args:
        writer: for whom.
        group: a further group, or None.
        fd, data, offset, done: as of `write_fully`.

    Raises:
        OSError: of `pwrite_as`, if nothing of it is written.
    """
    done = done or pwrite_as(writer, group, fd, data, offset)
    if done < len(data):
        return spending_as(writer, group, write_fully, fd, data, offset, done)
    return done
