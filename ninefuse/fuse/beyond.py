"""What a kernel asks of open files and of file systems, and 9P has no message for.

fallocate, lseek, copy_file_range, ioctl, syncfs. Each is answered as the source answers it, in the
name of whoever the source would see: what takes blocks in that of who opened the file, what an
ioctl sets in that of who asks.

What changes a file tells the kernel that its attributes are old, also where it fails: some of it
may have been done. The kernel believes an answer from before otherwise, if that comes late.

Locks touched: none of its own; the order of changes of the same bytes (tree/order.py).
"""

from __future__ import annotations

import errno
import os
import stat
import time

from ninefuse.calls import Behind, blocking
from ninefuse.errors import error
from ninefuse.linux import ioctls, syscalls
from ninefuse.linux.callers import Caller
from ninefuse.linux.filesystems import file_system_of
from ninefuse.linux.syscalls import proc_path, stat_descriptor
from ninefuse.ops.opening import mark_again
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import OpenDirectory, OpenFile
from ninefuse.tree.order import END
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session, check_offset
from ninefuse.tree.table import open_file_of

_OPENABLE = stat.S_IFREG, stat.S_IFDIR  # without doing something by that
_MOVES_ALL = syscalls.FALLOC_FL_COLLAPSE_RANGE | syscalls.FALLOC_FL_INSERT_RANGE

# One call copies so much at most, and others follow it for so long: the kernel keeps everybody
# from writing to the target meanwhile. (A multiple of what file systems share blocks by.)
_PIECE = 64 << 20  # bytes
_A_WHILE = 1.0  # seconds


async def fallocate(session: Session, handle: int, mode: int, offset: int, length: int) -> None:
    """Reserve, free or zero a part of an open file.

    Args:
        session: the conversation.
        handle: open for writing.
        mode: of fallocate(2).
        offset: where the part begins, in bytes.
        length: of the part, in bytes.

    Raises:
        OSError: EROFS; EBADF, not open for writing; EINVAL, unopened, or no such part; EFBIG;
            EOPNOTSUPP, a mode that the source does not have; the other errors of fallocate(2).

    Source: fallocate(2); Linux fs/fuse/file.c, fuse_file_fallocate.
    """
    session.writable()
    use = session.fids.get(handle)
    try:
        file = open_file_of(use)
        if not file.writable:
            raise error(errno.EBADF)
        check_offset(offset, length, length - 1)
        if mode >> 31:
            raise error(errno.EOPNOTSUPP)
        on = use.node.number
        end = END if mode & _MOVES_ALL else offset + length
        async with session.ranges.changing(on, offset, end):
            await mark_again(session, on, file)
            try:
                await blocking(on, _fallocate, file, mode, offset, length)
            finally:
                session.attributes_changed(on)
    finally:
        session.fids.put(use)


async def lseek(session: Session, handle: int, offset: int, whence: int) -> int:
    """Where data begins, or a hole, from an offset on.

    Nobody uses the position of the handle's own descriptor, which this moves: reads and writes say
    theirs. Only a stream is read without one, and that has none to be moved.

    Args:
        session: the conversation.
        handle: open.
        offset: from where, in bytes.
        whence: os.SEEK_DATA or os.SEEK_HOLE; the others are the kernel's own business.

    Raises:
        OSError: EINVAL, unopened, or another whence; ENXIO, nothing from there on; the other
            errors of lseek(2).

    Source: lseek(2); Linux fs/fuse/file.c, fuse_lseek.
    """
    use = session.fids.get(handle)
    try:
        file = open_file_of(use)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise error(errno.EINVAL)
        if not 0 <= offset < END:
            raise error(errno.ENXIO)
        on = use.node.number
        if on in session.ranges:
            await session.ranges.settled(on, offset, END)
        return await blocking(on, os.lseek, file.fd, offset, whence)
    finally:
        session.fids.put(use)


async def copy_file_range(
    session: Session,
    source: int,
    source_offset: int,
    target: int,
    target_offset: int,
    length: int,
) -> int:
    """Copy a part of an open file to another, or within it; blocks are shared where they can be.

    Args:
        session: the conversation.
        source: open for reading.
        source_offset: where what is copied begins, in bytes.
        target: open for writing.
        target_offset: where it goes, in bytes.
        length: how much, in bytes.

    Returns:
        How much was copied. Less at the source's end, after a second or so, and where an error
        came after some was copied.

    Raises:
        OSError: EROFS; EBADF, not open for reading or for writing, or the target for appending;
            EINVAL, unopened, or no such parts; EXDEV, EOPNOTSUPP and the other errors of
            copy_file_range(2), if nothing was copied.

    Source: copy_file_range(2); Linux fs/fuse/file.c, __fuse_copy_file_range.
    """
    session.writable()
    giving = session.fids.get(source)
    try:
        taking = session.fids.get(target)
        try:
            from_file, to_file = open_file_of(giving), open_file_of(taking)
            if not from_file.readable or not to_file.writable:
                raise error(errno.EBADF)
            check_offset(source_offset, target_offset, length)
            read, written = giving.node.number, taking.node.number
            # Before this one begins, so that nobody waits in a circle.
            before = session.ranges.look(read, source_offset, source_offset + length)
            async with session.ranges.changing(written, target_offset, target_offset + length):
                if before is not None:
                    await Behind(before)
                await mark_again(session, written, to_file)
                try:
                    return await _copy_pieces(
                        written, from_file.fd, source_offset, to_file, target_offset, length
                    )
                finally:
                    session.attributes_changed(written)
                    if read != written and not session.noatime:
                        session.attributes_changed(read)  # it was read, which leaves its time
        finally:
            session.fids.put(taking)
    finally:
        session.fids.put(giving)


async def ioctl(
    session: Session,
    handle: int,
    command: int,
    data: bytes,
    room: int,
    caller: Caller | None = None,
) -> bytes:
    """An ioctl on an open file or directory, if it is one of `ioctls.ALLOWED`.

    The kernel itself asks so for chattr(1) and lsattr(1), by a handle that it opens for this.

    Args:
        session: the conversation.
        handle: open.
        command: its number, as programs of this machine's own word size have it.
        data: what the caller gives: as many bytes as the number says, or as are moved.
        room: how many bytes the caller takes.
        caller: who asks; None: the daemon.

    Returns:
        What the caller gets.

    Raises:
        OSError: ENOTTY, one that is not passed on, or that the source does not have; EINVAL,
            unopened, or fewer bytes than are moved; EROFS; the errors of the ioctl, EPERM among
            them.

    Source: ioctl(2), ioctl_iflags(2); Linux fs/fuse/ioctl.c.
    """
    passed = ioctls.ALLOWED.get(command)
    if passed is None:
        raise error(errno.ENOTTY)
    use = session.fids.get(handle)
    try:
        opened, node = use.opened, use.node
        if not isinstance(opened, OpenFile | OpenDirectory):
            raise error(errno.EINVAL)
        if (len(data) if passed.sets else room) < passed.moves:
            raise error(errno.EINVAL)
        if not passed.sets:
            return await blocking(node.number, ioctls.ask, opened.fd, command)
        session.writable()
        given = data[: passed.moves]
        await blocking(node.number, ioctls.tell, opened.fd, command, given, caller)
        session.attributes_changed(_nodeid_of(session, node))
        return b""
    finally:
        session.fids.put(use)


def look_again(session: Session, handle: int) -> None:
    """A lock has been taken: have the kernel look at the file before it reads from its cache.

    Who takes a lock wants what others have written before they gave theirs back. They may have
    written to the source, of which the kernel would hear a second later, or a day. The attributes
    that it asks for tell it whether its pages are old.

    Args:
        session: the conversation.
        handle: open.
    """
    use = session.fids.get(handle)
    try:
        session.attributes_changed(_nodeid_of(session, use.node))
    finally:
        session.fids.put(use)


async def syncfs(session: Session, nodeid: int) -> None:
    """Make all of the file system durable that a file lies on.

    A kernel asks so of the root, and means all that it shows. So what is mounted in the source goes
    with that, as far as anybody has come there. But not a FUSE server, which may ask back.

    Raises:
        OSError: unknown fid; the errors of syncfs(2), and of opening a file for it.

    Source: syncfs(2); Linux fs/fuse/inode.c, fuse_sync_fs.
    """
    async with session.using(nodeid) as use, session.using_node(_openable(use.node)) as node:
        await blocking(node.number, _sync, session, node.fd, nodeid == ROOT_NODEID)


def _fallocate(file: OpenFile, mode: int, offset: int, length: int) -> None:
    file.spend(syscalls.fallocate, file.fd, mode, offset, length)


async def _copy_pieces(
    on: int, source: int, source_offset: int, target: OpenFile, target_offset: int, length: int
) -> int:
    done, until = 0, time.monotonic() + _A_WHILE
    while True:
        places = source_offset + done, target_offset + done
        try:
            some = await blocking(on, _copy, source, target, min(length - done, _PIECE), *places)
        except OSError:
            if not done:
                raise
            return done  # the error comes back when the rest is asked for
        done += some
        if not some or done >= length or time.monotonic() > until:
            return done


def _copy(source: int, target: OpenFile, count: int, source_offset: int, target_offset: int) -> int:
    places = source_offset, target_offset
    return target.spend(os.copy_file_range, source, target.fd, count, *places)


def _nodeid_of(session: Session, node: Node) -> int:
    root = session.fids.get(ROOT_NODEID)
    try:
        return ROOT_NODEID if node is root.node else node.number
    finally:
        session.fids.put(root)


def _openable(node: Node) -> Node:
    """A node itself, or the directory that a special file or a symlink is in."""
    return node if node.kind in _OPENABLE or node.place is None else node.place[0]


def _sync(session: Session, fd: int, all_below: bool) -> None:
    failures: list[OSError] = []
    done: set[int] = set()
    _sync_one(fd, done, failures)
    for path in session.fids.devices.mounts.met() if all_below else ():
        try:
            mounted = _reach(session, fd, path)
        except OSError:
            continue  # it has gone, or leads into the mount itself
        try:
            if not file_system_of(mounted).is_fuse:
                _sync_one(mounted, done, failures)
        finally:
            os.close(mounted)
    if failures:
        raise failures[0]


def _sync_one(fd: int, done: set[int], failures: list[OSError]) -> None:
    """Sync the file system of a file or directory, O_PATH will do; once each."""
    try:
        attributes = stat_descriptor(fd)
        if attributes.dev in done or attributes.kind not in _OPENABLE:
            return
        done.add(attributes.dev)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        readable = os.open(proc_path(fd), flags)
        try:
            syscalls.sync_file_system(readable)
        finally:
            os.close(readable)
    except OSError as e:
        failures.append(e)


def _reach(session: Session, fd: int, path: bytes) -> int:
    """An O_PATH descriptor of what is below a directory; symlinks are not followed."""
    at = os.dup(fd)
    for name in path.split(b"/"):
        try:
            step = session.open_step(at, name)
        finally:
            os.close(at)
        at = step
    return at
