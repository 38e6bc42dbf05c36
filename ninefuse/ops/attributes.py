"""Attributes of files and of the file system: getattr, setattr, readlink, statfs.

Locks touched: none, but for opening a node again whose descriptor was reclaimed.
"""

from __future__ import annotations

import errno
import os
import stat as st
from typing import NamedTuple

from ninefuse.calls import Begin, blocking, brief
from ninefuse.errors import error
from ninefuse.linux.callers import CHANGE, ENTER, OWN, Caller
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.syscalls import Attributes, SetTime, proc_path, set_times, stat_descriptor
from ninefuse.tree.opened import OpenFile
from ninefuse.tree.order import END
from ninefuse.tree.session import PERMISSIONS, SET_ID, Session, Use, check_offset, patiently


class Changes(NamedTuple):
    """What setattr is to change; None leaves a field alone."""

    mode: int | None = None  # permission bits
    uid: int | None = None
    gid: int | None = None
    size: int | None = None  # bytes
    atime: int | SetTime | None = None  # nanoseconds since 1970
    mtime: int | SetTime | None = None
    ctime: bool = False  # move the change time to now, whatever else


async def getattr(session: Session, fid: int, on: int | None = None) -> Attributes:
    """The attributes of a fid's file; works after it was unlinked, too.

    Args:
        session: the conversation.
        fid: the file.
        on: the inode whose share of the workers the call takes; by default the file's.

    Raises:
        OSError: unknown fid; the errors of statx(2).

    Source: Tgetattr of 9P2000.L.
    """
    if session.announces:
        await Begin("getattr", fid)
    async with session.using(fid, looking=True) as use:
        on = use.node.number if on is None else on
        attributes = await brief(on, stat_descriptor, use.fd)
        session.fids.note_rights(attributes, use.node)
        return attributes


async def setattr(
    session: Session, fid: int, changes: Changes, caller: Caller | None = None
) -> None:
    """Change attributes, in this order: mode, owner, size, times.

    The size comes before the times, since it moves them. Steps done before one that
    fails stay done, as with the system calls they are.

    Args:
        session: the conversation.
        fid: the file; an open fid changes the file it has open.
        changes: what to change.
        caller: who asks; None: the daemon.

    Raises:
        OSError: EROFS; unknown fid; the errors of chmod(2), chown(2), truncate(2) and
            utimensat(2).

    Source: Tsetattr of 9P2000.L.
    """
    if session.announces:
        await Begin("setattr", fid)
    session.writable()
    async with session.using(fid) as use:
        on = use.node.number
        if changes.mode is not None:
            await blocking(on, _chmod, use.fd, changes.mode & PERMISSIONS, caller)
        if changes.uid is not None or changes.gid is not None or changes.ctime:
            uid = -1 if changes.uid is None else changes.uid
            gid = -1 if changes.gid is None else changes.gid
            await blocking(on, _chown, use.fd, uid, gid, caller)
        if changes.size is not None:
            check_offset(changes.size)
            size = changes.size
            if isinstance(use.fid.opened, OpenFile) and use.fid.opened.writable:
                async with session.ranges.changing(on, size, END):
                    await blocking(on, _ftruncate, use.fid.opened.fd, size, caller)
            else:
                if use.node.kind != st.S_IFREG:
                    raise error(errno.EISDIR if use.node.kind == st.S_IFDIR else errno.EINVAL)
                # Who has changed something must not be told that he was interrupted.
                is_first = changes._replace(size=None, atime=None, mtime=None) == Changes()
                await patiently(
                    lambda: _truncate_in_turn(session, use, size, caller), is_withdrawable=is_first
                )
        if changes.atime is not None or changes.mtime is not None:
            atime = SetTime.OMIT if changes.atime is None else changes.atime
            mtime = SetTime.OMIT if changes.mtime is None else changes.mtime
            await blocking(on, _set_times, use.fd, atime, mtime, caller)


async def readlink(session: Session, fid: int) -> bytes:
    """The target of a symlink.

    Raises:
        OSError: EINVAL, not a symlink; the errors of readlink(2).

    Source: Treadlink of 9P2000.L.
    """
    if session.announces:
        await Begin("readlink", fid)
    async with session.using(fid) as use:
        if use.node.kind != st.S_IFLNK:
            raise error(errno.EINVAL)
        return await blocking(use.node.number, _readlink, use.fd)


async def statfs(session: Session, fid: int) -> os.statvfs_result:
    """Sizes and limits of the file system that a fid's file lies on.

    Raises:
        OSError: unknown fid; the errors of statvfs(3).

    Source: Tstatfs of 9P2000.L.
    """
    if session.announces:
        await Begin("statfs", fid)
    async with session.using(fid) as use:
        return await blocking(use.node.number, os.statvfs, use.fd)


def _chmod(fd: int, mode: int, caller: Caller | None) -> None:
    with acting_as(caller, (CHANGE, fd, b""), bits=True):
        os.chmod(proc_path(fd), mode)


def _chown(fd: int, uid: int, gid: int, caller: Caller | None) -> None:
    with acting_as(caller, (CHANGE, fd, b""), bits=True):
        os.chown(proc_path(fd), uid, gid)


async def _truncate_in_turn(session: Session, use: Use, size: int, caller: Caller | None) -> None:
    async with session.ranges.changing(use.node.number, size, END):
        await blocking(use.node.number, _truncate, use.fd, size, caller)


def _truncate(fd: int, size: int, caller: Caller | None) -> None:
    # truncate(2) would wait for whoever holds a lease on the file (fcntl(2), F_SETLEASE).
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    with acting_as(caller, (ENTER, fd, b""), bits=caller is not None):
        opened = os.open(proc_path(fd), flags)
        try:
            os.ftruncate(opened, size)
        finally:
            os.close(opened)


def _ftruncate(fd: int, size: int, caller: Caller | None) -> None:
    # The descriptor is all the right that is needed, but to keep set-id bits.
    if caller is not None and not stat_descriptor(fd).mode & SET_ID:
        caller = None
    with acting_as(caller, bits=caller is not None):
        os.ftruncate(fd, size)


def _set_times(fd: int, atime: int | SetTime, mtime: int | SetTime, caller: Caller | None) -> None:
    with acting_as(caller, (ENTER | OWN, fd, b"")):
        set_times(fd, atime, mtime)


def _readlink(fd: int) -> bytes:
    # The empty name means the descriptor's own symlink (readlinkat(2)).
    return os.readlink(b"", dir_fd=fd)
