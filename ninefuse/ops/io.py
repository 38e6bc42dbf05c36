"""What is in files: read, write, fsync.

Locks touched: none: a file whose data is slow holds up nothing else.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import NamedTuple

from ninefuse.calls import Begin, Call, Fsync, Pread, Pwrite, blocking
from ninefuse.errors import error
from ninefuse.linux import transfer
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.syscalls import proc_path
from ninefuse.ops.opening import mark_again
from ninefuse.tree.opened import AttributeRead, AttributeWrite, OpenDirectory, OpenFile
from ninefuse.tree.order import END
from ninefuse.tree.session import Session, check_offset
from ninefuse.tree.table import open_file_of

_RWF_NOAPPEND = 0x20  # pwritev2(2), since Linux 6.9


async def read(session: Session, fid: int, offset: int, count: int) -> bytes:
    """Read from an open file or from an extended attribute (xattrwalk).

    Args:
        session: the conversation.
        fid: open for reading.
        offset: where, in bytes.
        count: how many bytes; fewer come back only at the end, or of a live file.

    Raises:
        OSError: EINVAL, unopened; EISDIR; EBADF, not open for reading; the errors of
            pread(2).

    Source: read(5) of Plan 9.
    """
    if session.announces:
        await Begin("read", fid)
    use = session.fids.get(fid)
    try:
        opened = use.opened
        if isinstance(opened, AttributeRead):
            return opened.value[offset : offset + count]
        if isinstance(opened, OpenDirectory):
            raise error(errno.EISDIR)
        file = open_file_of(use)
        if not file.readable:
            raise error(errno.EBADF)
        check_offset(offset)
        on = use.node.number
        if file.live:
            return await blocking(on, _read_once, file.fd, count, offset)
        if on in session.ranges:
            await session.ranges.settled(on, offset, offset + count)
        return await Pread(on, file.fd, count, offset)
    finally:
        session.fids.put(use)


class Writing(NamedTuple):
    """What a client says of a write beside 9P's message, if it does.

    Attributes:
        is_writeback: whether it is of pages that were changed in mapped memory; None: it may be.
        keeps_bits: whether set-user-id and set-group-id bits are to stay, where nobody but root
            has the file open.
        appends: whether the writer's descriptor appends by now; None: as it was opened.
    """

    is_writeback: bool | None = False
    keeps_bits: bool = False
    appends: bool | None = None


UNKNOWN_WRITE = Writing(is_writeback=None)


async def write(
    session: Session, fid: int, offset: int, data: bytes, how: Writing = UNKNOWN_WRITE
) -> int:
    """Write to an open file, or add to an extended attribute (xattrcreate).

    Args:
        session: the conversation.
        fid: open for writing.
        offset: where, in bytes; ignored if the file was opened with O_APPEND, but of pages that
            were changed in mapped memory, and if the client says otherwise.
        data: what.
        how: what else the client says.

    Returns:
        How many bytes were written: fewer only if an error came after some were.

    Raises:
        OSError: EINVAL, unopened; EBADF, not open for writing; ENOSPC, more than the
            size declared for an attribute; the errors of pwrite(2), also after some was
            written where these may be pages that were changed in mapped memory.

    Source: read(5) of Plan 9.
    """
    if session.announces:
        await Begin("write", fid)
    use = session.fids.get(fid)
    try:
        opened = use.opened
        if isinstance(opened, AttributeWrite):
            return _write_attribute(opened, offset, data)
        file = open_file_of(use)
        if not file.writable:
            raise error(errno.EBADF)
        check_offset(offset)
        on = use.node.number
        # What is appended begins where the file ends: nobody but the source knows where that is.
        appends = _appends(file, how)
        end = END if appends else offset + len(data)
        async with session.ranges.changing(on, offset, end):
            had_bits = session.fids.set_id and await mark_again(session, on, file)
            keeps_bits = bool(had_bits) and how.keeps_bits and file.writer is None
            written = await _writing(on, file, data, offset, how, keeps_bits)
            while written < len(data) and _is_writeback(file, offset, how):
                # Of such a write the kernel heeds the error alone: a short count would be a loss
                # that no msync or fsync tells of.
                rest = data[written:]
                more = await _writing(on, file, rest, offset + written, how, keeps_bits)
                if not more:
                    raise error(errno.EIO)
                written += more
        return written
    finally:
        session.fids.put(use)


async def fsync(session: Session, fid: int, datasync: bool = False) -> None:
    """Make what was written to an open file or directory durable.

    Args:
        session: the conversation.
        fid: open.
        datasync: leave out what is not needed to read the data back (fdatasync(2)).

    Raises:
        OSError: EINVAL, unopened; the errors of fsync(2).

    Source: Tfsync of 9P2000.L.
    """
    if session.announces:
        await Begin("fsync", fid)
    use = session.fids.get(fid)
    try:
        if not isinstance(use.opened, OpenFile | OpenDirectory):
            raise error(errno.EINVAL)
        await Fsync(use.node.number, use.opened.fd, data_only=datasync)
    finally:
        session.fids.put(use)


def _read_once(fd: int, count: int, offset: int) -> bytes:
    """One read: a second might wait for what is yet to come."""
    try:
        return os.pread(fd, count, offset)
    except OSError as e:
        if e.errno != errno.ESPIPE:
            raise
    return os.read(fd, count)  # a stream, such as tracefs has


def _write_once(fd: int, data: bytes, offset: int) -> int:
    """One write, which is one order."""
    try:
        return os.pwrite(fd, data, offset)
    except OSError as e:
        if e.errno != errno.ESPIPE:
            raise
    return os.write(fd, data)


def _writing(
    on: int, file: OpenFile, data: bytes, offset: int, how: Writing, keeps_bits: bool
) -> Call[int]:
    """The call that writes."""
    if file.live:
        return blocking(on, _write_live, file, data, offset)
    appends = _appends(file, how)
    if appends != bool(file.flags & os.O_APPEND):
        return blocking(on, _write_otherwise, file, data, offset, appends, keeps_bits)
    if keeps_bits:
        return blocking(on, _write_keeping_bits, file.fd, data, offset)
    durable = bool(file.flags & os.O_DSYNC)
    return Pwrite(on, file.fd, data, offset, durable, file.writer, file.group)


def _appends(file: OpenFile, how: Writing) -> bool:
    """Whether a write goes to the file's end: pages go back by any handle there is."""
    if how.is_writeback:
        return False
    return bool(file.flags & os.O_APPEND) if how.appends is None else how.appends


def _is_writeback(file: OpenFile, offset: int, how: Writing) -> bool:
    """Whether a write is of mapped pages, or may be, where that is not said.

    A file can be mapped shared and writable only if it is open for both and not direct.
    """
    if how.is_writeback is not None:
        return how.is_writeback
    is_cached = file.flags & (os.O_ACCMODE | os.O_APPEND | os.O_DSYNC) == os.O_RDWR
    return is_cached and not file.live and offset % mmap.PAGESIZE == 0


def _write_live(file: OpenFile, data: bytes, offset: int) -> int:
    return file.spend(_write_once, file.fd, data, offset)


def _write_otherwise(
    file: OpenFile, data: bytes, offset: int, appends: bool, keeps_bits: bool
) -> int:
    """Append, or write where it says, by a descriptor that would do the other."""
    if keeps_bits:
        with acting_as(None, bits=True):
            return _write_flagged(file, data, offset, appends)
    return file.spend(_write_flagged, file, data, offset, appends)


def _write_flagged(file: OpenFile, data: bytes, offset: int, appends: bool) -> int:
    flag = os.RWF_APPEND if appends else _RWF_NOAPPEND
    try:
        return os.pwritev(file.fd, [data], offset, flag)
    except OSError as e:
        if appends or e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # before Linux 6.9
            raise
    how = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | file.flags & os.O_SYNC
    in_place = os.open(proc_path(file.fd), how)
    try:
        return os.pwrite(in_place, data, offset)
    finally:
        os.close(in_place)


def _write_keeping_bits(fd: int, data: bytes, offset: int) -> int:
    with acting_as(None, bits=True):
        return transfer.write_fully(fd, data, offset)


def _write_attribute(new: AttributeWrite, offset: int, data: bytes) -> int:
    if offset != len(new.data):
        raise error(errno.EINVAL)
    if offset + len(data) > new.size:
        raise error(errno.ENOSPC)
    new.data += data
    return len(data)
