"""Open files: lopen, lcreate, read, write, fsync, lock, getlock.

Locks touched: none: a file whose data is slow holds up nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from enum import IntEnum
from typing import NamedTuple

from ninefuse.commands import blocking, blocking_unless, brief
from ninefuse.credentials import (
    ENTER,
    MAKE,
    OWN,
    Caller,
    acting_as,
    keeps_mark,
    needs_acting,
    pwrite_as,
    spending_as,
)
from ninefuse.fids import (
    AttributeRead,
    AttributeWrite,
    Fid,
    Node,
    OpenDirectory,
    OpenFile,
    error,
)
from ninefuse.identity import Mark
from ninefuse.order import END
from ninefuse.qids import Qid
from ninefuse.session import (
    PERMISSIONS,
    Session,
    check_directory,
    check_new_name,
    check_offset,
    path_of,
    patiently,
)
from ninefuse.syscalls import Attributes, check_execution, read_cached, stat_descriptor

# What a server keeps of a client's flags. Creating has been decided already; O_NOFOLLOW
# would refuse the way through /proc; O_DIRECT asks for an alignment that buffers here
# do not have.
_KEPT_FLAGS = (
    os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_NOATIME | os.O_SYNC | os.O_DSYNC
)
# The kernel's own: the file is opened to be executed, for which it need not be readable
# (FMODE_EXEC in include/linux/fs.h). No program can ask for it.
_EXECUTE = 0x20


async def lopen(session: Session, fid: int, flags: int, caller: Caller | None = None) -> Qid:
    """Open a fid's file or directory; the fid is an open one from then on.

    Args:
        session: the conversation.
        fid: unopened.
        flags: Linux open(2) flags; those that make no sense here are dropped.
        caller: who opens it, as whom the fid is to write, and whose share of the descriptors it
            takes; None: the daemon.

    Raises:
        OSError: EINVAL, the fid is open already; EROFS; EISDIR, a directory for
            writing; ENXIO, neither file nor directory (a device of the server is not
            the client's); the errors of open(2).

    Source: Tlopen of 9P2000.L; CVE-2023-2861.
    """
    async with session.using(fid) as use:
        if use.fid.opened is not None:
            raise error(errno.EINVAL)
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            session.writable()
        on, kind = use.node.path, use.node.kind
        if kind == stat.S_IFDIR and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise error(errno.EISDIR)
        if kind == stat.S_IFREG and flags & os.O_DIRECTORY:
            raise error(errno.ENOTDIR)
        if kind not in (stat.S_IFDIR, stat.S_IFREG):
            raise error(errno.ENXIO)
        owner = None if caller is None else caller.uid
        await session.claim_descriptor(use.node, owner)
        opened: OpenFile | OpenDirectory
        try:
            if kind == stat.S_IFDIR:
                quiet = session.noatime or session.nodiratime
                fd = await brief(on, _open_directory, use.fd, caller, quiet)
                opened = OpenDirectory(fd, owner)
            else:
                kept = flags & (_KEPT_FLAGS | _EXECUTE)
                fd = await _opened(session, on, use.fd, kept, caller)
                opened = OpenFile(fd, kept, _writer(kept, caller), owner)
        except BaseException:
            session.fids.unclaim(owner)
            raise
        try:
            attributes = await brief(on, stat_descriptor, use.fd)
            if isinstance(opened, OpenFile):
                opened.live = _is_live(use.node, attributes, flags)
                if opened.writable:
                    opened.opener = caller
                    if _has_mark(attributes.mode):
                        await blocking(on, _keep_mark, opened)
            session.fids.open(use.fid, opened)
        except BaseException:
            await blocking(on, session.fids.close_open, opened.fd, owner)
            raise
    return session.fids.qid_of(attributes)


async def lcreate(
    session: Session, fid: int, name: bytes, flags: int, mode: int, caller: Caller | None = None
) -> Qid:
    """Create a file in a fid's directory; the fid becomes the open file.

    If this fails the fid is still the unopened directory.

    Args:
        session: the conversation.
        fid: an unopened directory.
        name: the new file's.
        flags: Linux open(2) flags.
        mode: permission bits; the caller's umask is yet to be applied.
        caller: whose file it is to be; None: the daemon's.

    Raises:
        OSError: EINVAL, the fid is open; ENOTDIR; EEXIST, with O_EXCL or for ``.`` and
            ``..``; ESTALE, the file exists and O_EXCL was not asked for: the client
            looked and found none, so it must look again and open what is there, with
            the checks that opening takes (the kernel does so by itself); EROFS; the
            errors of open(2).

    Source: Tlcreate of 9P2000.L.
    """
    check_new_name(name)
    session.writable()
    async with session.using(fid) as use:
        if use.fid.opened is not None:
            raise error(errno.EINVAL)
        check_directory(use.node)
        on = use.node.path
        kept = flags & _KEPT_FLAGS
        exclusive = bool(flags & os.O_EXCL)
        mode &= PERMISSIONS
        owner = None if caller is None else caller.uid
        await session.claim_descriptor(use.node, owner)
        try:
            fd = await blocking(on, _create_file, use.fd, name, kept, mode, caller, exclusive)
        except BaseException:
            session.fids.unclaim(owner)
            raise
        try:
            await session.settle(use.node)
            path_fd, attributes, mark = await blocking(on, _path_descriptor, session, fd)
            node = session.fids.new_node(attributes, path_fd, (use.node, name), mark)
            try:
                live = _is_live(node, attributes, os.O_RDWR)
                opened = OpenFile(fd, kept, _writer(kept, caller), owner, live)
                opened.opener = caller
                if opened.writable and _has_mark(attributes.mode):
                    await blocking(on, _keep_mark, opened)
                session.fids.open(use.fid, opened, node)
            finally:
                session.fids.drop(node)
        except BaseException:
            # The file stays: it may be somebody's by now.
            await blocking(on, session.fids.close_open, fd, owner)
            raise
    session.descriptors.note()
    return session.fids.qid_of(attributes)


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
    use = session.fids.get(fid)
    try:
        opened = use.opened
        if isinstance(opened, AttributeRead):
            return opened.value[offset : offset + count]
        if isinstance(opened, OpenDirectory):
            raise error(errno.EISDIR)
        file = _open_file_of(use)
        if not file.readable:
            raise error(errno.EBADF)
        check_offset(offset)
        on = use.node.path
        if file.live:
            return await blocking(on, _read_once, file.fd, count, offset)
        if on in session.ranges:
            await session.ranges.settled(on, offset, offset + count)
        return await blocking_unless(on, _read_now, _read_fully, file.fd, count, offset)
    finally:
        session.fids.put(use)


async def write(session: Session, fid: int, offset: int, data: bytes) -> int:
    """Write to an open file, or add to an extended attribute (xattrcreate).

    Args:
        session: the conversation.
        fid: open for writing.
        offset: where, in bytes; ignored if the file was opened with O_APPEND.
        data: what.

    Returns:
        How many bytes were written: fewer only if an error came after some were.

    Raises:
        OSError: EINVAL, unopened; EBADF, not open for writing; ENOSPC, more than the
            size declared for an attribute; the errors of pwrite(2), also after some was
            written where these may be pages that were changed in mapped memory.

    Source: read(5) of Plan 9.
    """
    use = session.fids.get(fid)
    try:
        opened = use.opened
        if isinstance(opened, AttributeWrite):
            return _write_attribute(opened, offset, data)
        file = _open_file_of(use)
        if not file.writable:
            raise error(errno.EBADF)
        check_offset(offset)
        on = use.node.path
        # What is appended begins where the file ends: nobody but the source knows where that is.
        end = END if file.flags & os.O_APPEND else offset + len(data)
        async with session.ranges.changing(on, offset, end):
            if session.fids.set_id and on in session.fids.set_id and file.group is None:
                await blocking(on, _keep_mark, file)  # it may have come after the open
            written = await _write(on, file, data, offset)
            while written < len(data) and _may_be_written_back(file, offset):
                # Of such a write the kernel heeds the error alone: a short count would be a loss
                # that no msync or fsync tells of.
                more = await _write(on, file, data[written:], offset + written)
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
    use = session.fids.get(fid)
    try:
        if not isinstance(use.opened, OpenFile | OpenDirectory):
            raise error(errno.EINVAL)
        sync = os.fdatasync if datasync else os.fsync
        await blocking(use.node.path, sync, use.opened.fd)
    finally:
        session.fids.put(use)


async def report_close(session: Session, fid: int) -> None:
    """Fetch the errors that closing an open file reports, and keep it open.

    Some file systems (NFS, quotas) say only at close(2) that a write failed. 9P has no
    message for it; closing a duplicate is what FUSE's flush stands for.

    Raises:
        OSError: EINVAL, unopened; the errors of close(2).
    """
    use = session.fids.get(fid)
    try:
        file = _open_file_of(use)
        if file.writable:
            await blocking(use.node.path, _close_duplicate, file.fd)
    finally:
        session.fids.put(use)


def is_live(session: Session, fid: int) -> bool:
    """Whether an open file is to be read and written past all caches; see `OpenFile`."""
    use = session.fids.get(fid)
    try:
        return isinstance(use.opened, OpenFile) and use.opened.live
    finally:
        session.fids.put(use)


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
    if flags & ~_LOCK_FLAGS:
        raise error(errno.EINVAL)
    use = session.fids.get(fid)
    try:
        file = _open_file_of(use)
        request = _flock(wanted)
        try:
            await blocking(use.node.path, fcntl.fcntl, file.fd, fcntl.F_OFD_SETLK, request)
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
    use = session.fids.get(fid)
    try:
        file = _open_file_of(use)
        request = _flock(wanted)
        answer = await blocking(use.node.path, fcntl.fcntl, file.fd, fcntl.F_OFD_GETLK, request)
        assert isinstance(answer, bytes)
        kind, _whence, start, length, pid = _FLOCK.unpack(answer)
        return (
            LockRange(kind, start, length, pid)
            if kind != fcntl.F_UNLCK
            else LockRange(fcntl.F_UNLCK, wanted.start, wanted.length, wanted.pid)
        )
    finally:
        session.fids.put(use)


def sync_path(fd: int, kind: int) -> None:
    """Make the file or directory of an O_PATH descriptor durable. Blocks."""
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return  # nothing else has data to sync, and opening it might do something
    readable = os.open(path_of(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(readable)
    finally:
        os.close(readable)


def _open_file_of(fid: Fid) -> OpenFile:
    if isinstance(fid.opened, OpenFile):
        return fid.opened
    raise error(errno.EISDIR if isinstance(fid.opened, OpenDirectory) else errno.EINVAL)


def _open_directory(fd: int, caller: Caller | None, quiet: bool) -> int:
    # Not "." in it, for which one would need the right to search it as well.
    with acting_as(caller, (ENTER, fd, b"")):
        opened = os.open(path_of(fd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if quiet:
        _leave_access_time(opened)
    return opened


async def _opened(session: Session, on: int, fd: int, flags: int, caller: Caller | None) -> int:
    how = fd, flags, caller, session.noatime

    async def ask() -> int:
        if not flags & os.O_TRUNC:
            return await blocking_unless(on, _open_file_now, _open_file, *how)
        # In its turn for as long as it is tried, but not while somebody has a lease on the file.
        async with session.ranges.changing(on, 0, END):
            return await blocking(on, _open_file, *how)

    # Who opens it without waiting is told of a lease, as on the source.
    return await (ask() if flags & os.O_NONBLOCK else patiently(ask))


def _open_file_now(fd: int, flags: int, caller: Caller | None, quiet: bool) -> int:
    """`_open_file`, unless it may take its time."""
    if flags & os.O_TRUNC:
        raise error(errno.EAGAIN)
    return _open_file(fd, flags, caller, quiet)


def _open_file(fd: int, flags: int, caller: Caller | None, quiet: bool) -> int:
    """Open a file; EAGAIN if somebody's lease on it keeps openers waiting (fcntl(2))."""
    opened = _open_at_once(fd, flags, caller)
    if not flags & os.O_NONBLOCK:
        os.set_blocking(opened, True)
    if quiet:
        _leave_access_time(opened)
    return opened


def _leave_access_time(fd: int) -> None:
    """Have reads by a descriptor leave the access time alone, if the file is the daemon's.

    Or if the daemon is root. It is not asked of open(2), which is made with the caller's rights:
    the caller may own nothing of it.
    """
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NOATIME)


def _open_at_once(fd: int, flags: int, caller: Caller | None) -> int:
    path = path_of(fd)
    opening = flags & _KEPT_FLAGS | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    truncates = caller is not None and bool(flags & os.O_TRUNC)
    with acting_as(caller, (ENTER | OWN, fd, b""), bits=truncates):
        if not flags & _EXECUTE:
            try:
                return os.open(path, opening)
            except PermissionError:
                # O_NOATIME is for owners only; a daemon that is not the owner, and acts for
                # nobody else, reads without.
                if not flags & os.O_NOATIME or (caller is not None and os.geteuid() == 0):
                    raise
                return os.open(path, opening & ~os.O_NOATIME)
        check_execution(fd)
    return os.open(path, opening)  # the kernel reads what it executes; its caller need not


def _create_file(
    directory: int, name: bytes, flags: int, mode: int, caller: Caller | None, exclusive: bool
) -> int:
    flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
    bits = caller is not None and bool(mode & stat.S_ISGID)
    with acting_as(caller, (MAKE, directory, b""), bits=bits, making=True):
        try:
            return os.open(name, flags & ~os.O_TRUNC, mode, dir_fd=directory)
        except FileExistsError:
            if exclusive:
                raise
            raise error(errno.ESTALE) from None


def _path_descriptor(session: Session, fd: int) -> tuple[int, Attributes, Mark]:
    """An O_PATH descriptor of the very file that is open, whatever its name says by now."""
    if session.noatime:
        _leave_access_time(fd)
    path_fd = os.open(path_of(fd), os.O_PATH | os.O_CLOEXEC)
    try:
        attributes = stat_descriptor(path_fd)
        return path_fd, attributes, session.fids.devices.mark(attributes, path_fd)
    except OSError:
        os.close(path_fd)
        raise


def _is_live(node: Node, a: Attributes, flags: int) -> bool:
    """Whether a file is to be read past all caches, since its size tells nothing of its content.

    So it is in /proc and its like. A server (FUSE, 9P) may have such files, too: there one
    that is opened for reading, and says that it is empty, is asked. (Not one that is opened for
    writing: it may be mapped, and that needs the cache.)
    """
    found = node.device.file_system
    if found is None:
        return False
    is_read = flags & os.O_ACCMODE == os.O_RDONLY
    return found.is_live or (is_read and not a.size and not found.is_local)


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


def _read_fully(fd: int, count: int, offset: int) -> bytes:
    data = os.pread(fd, count, offset)
    # A short read is the end of the file to whoever asked; make sure that it is.
    while data and len(data) < count:
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _read_now(fd: int, count: int, offset: int) -> bytes:
    """Read what the page cache holds, if that is all there is to read."""
    data = read_cached(fd, count, offset)
    # A short read is the end of the file to whoever asked.
    if len(data) < count and offset + len(data) < os.fstat(fd).st_size:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return data


def _writer(flags: int, caller: Caller | None) -> Caller | None:
    """As whom to write: the blocks that a file system reserves for root are for root only."""
    if flags & os.O_ACCMODE == os.O_RDONLY or caller is None or not needs_acting(caller):
        return None
    return caller


def _has_mark(mode: int) -> bool:
    """Whether a set-group-id bit gives nobody anything (once: that locks are mandatory)."""
    return mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID


def _keep_mark(file: OpenFile) -> None:
    """Have a file's set-group-id bit stay when it is written to, for whom the source leaves it."""
    if file.opener is not None and os.geteuid() == 0:
        a = os.fstat(file.fd)
        if _has_mark(a.st_mode) and keeps_mark(file.opener, a.st_gid):
            file.writer, file.group = file.opener, a.st_gid


async def _write(on: int, file: OpenFile, data: bytes, offset: int) -> int:
    if file.live:
        return await blocking(on, _write_live, file, data, offset)
    # Two kinds of each: one waits for the disk.
    waits = file.flags & os.O_DSYNC
    if file.writer is not None:
        pwrite_as = write_durably_as if waits else write_as
        return await blocking(on, pwrite_as, file.fd, data, offset, file.writer, file.group)
    pwrite = _write_durably if waits else _write_fully
    return await blocking(on, pwrite, file.fd, data, offset)


def _may_be_written_back(file: OpenFile, offset: int) -> bool:
    """Whether a write may be of mapped pages; FUSE says so, but pyfuse3 does not pass it on.

    A file can be mapped shared and writable only if it is open for both and not direct.
    """
    is_cached = file.flags & (os.O_ACCMODE | os.O_APPEND | os.O_DSYNC) == os.O_RDWR
    return is_cached and not file.live and offset % mmap.PAGESIZE == 0


def write_as(fd: int, data: bytes, offset: int, writer: Caller, group: int | None) -> int:
    """Write for a caller (`spending_as`); how many bytes are written. Blocks."""
    written = pwrite_as(writer, group, fd, data, offset)
    if written == len(data):
        return written
    return write_rest_as(fd, data, offset, writer, group, written)


def write_durably_as(fd: int, data: bytes, offset: int, writer: Caller, group: int | None) -> int:
    """As `write_as`, to a file whose writes wait for the disk."""
    return write_as(fd, data, offset, writer, group)


def write_rest_as(
    fd: int, data: bytes, offset: int, writer: Caller, group: int | None, written: int
) -> int:
    """As `write_rest`, for a caller."""
    return spending_as(writer, group, write_rest, fd, data, offset, written)


def _write_live(file: OpenFile, data: bytes, offset: int) -> int:
    if file.writer is None:
        return _write_once(file.fd, data, offset)
    return spending_as(file.writer, file.group, _write_once, file.fd, data, offset)


def _write_durably(fd: int, data: bytes, offset: int) -> int:
    return _write_fully(fd, data, offset)


def _write_fully(fd: int, data: bytes, offset: int) -> int:
    written = os.pwrite(fd, data, offset)
    return written if written == len(data) else write_rest(fd, data, offset, written)


def write_rest(fd: int, data: bytes, offset: int, written: int) -> int:
    """Write what is left of data after so many bytes; how many are written in all. Blocks."""
    while written < len(data):
        try:
            more = os.pwrite(fd, memoryview(data)[written:], offset + written)
        except OSError:
            return written  # the error comes back with the write of the rest
        if not more:
            break
        written += more
    return written


def _close_duplicate(fd: int) -> None:
    try:
        duplicate = os.dup(fd)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            return  # that is no failure of the file's, and its data is safe
        raise
    os.close(duplicate)


def _write_attribute(new: AttributeWrite, offset: int, data: bytes) -> int:
    if offset != len(new.data):
        raise error(errno.EINVAL)
    if offset + len(data) > new.size:
        raise error(errno.ENOSPC)
    new.data += data
    return len(data)


def _flock(wanted: LockRange) -> bytes:
    check_offset(wanted.start, wanted.length)
    return _FLOCK.pack(wanted.type, os.SEEK_SET, wanted.start, wanted.length, 0)
