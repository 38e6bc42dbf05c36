"""Reading and writing a file's bytes: all that were asked for, or those that are at hand.

Locks touched: none. The kernel takes an inode's.
"""

from __future__ import annotations

import errno
import os


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
        OSError: of preadv(2); EOPNOTSUPP, the file system cannot tell.
    """
    buffer = bytearray(count)
    got = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    if got == count:
        return bytes(buffer)
    # A short read is the end of the file to whoever asked.
    if offset + got < os.fstat(fd).st_size:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return bytes(memoryview(buffer)[:got])


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
