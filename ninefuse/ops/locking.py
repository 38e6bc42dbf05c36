"""Locks of files: lock, getlock, and what 9P has no message for: flock, and waiting.

A lock belongs to an owner, where the client names one, else to the open fid by which it was
taken. filelocks.py has the table of owners and their descriptors. What an owner does with one
file is done in turn; no wait is longer than a call there. Who waits for another's lock tries
again and again, on no thread, and is woken when something is given back (`Later`).

An owner's own description of a file is opened from the fid's descriptor, by the daemon: what the
client may lock is decided by how the fid is open. It is open for what the fid is open for, so that
a lock has no other effect on the source: by a lock to read no file of an overlayfs is copied up,
and none that is executed is held open for writing.

Locks touched: none of ours; the mutex of `FileLocks`, through filelocks.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Awaitable, Callable, Hashable
from enum import IntEnum
from typing import TypeVar

from ninefuse.calls import Begin, Call, Later, blocking, brief
from ninefuse.errors import error
from ninefuse.linux.syscalls import proc_path
from ninefuse.tree.filelocks import Holder, Kind, Waiter, Where, where
from ninefuse.tree.lockranges import ALL, Held, packed, unpacked
from ninefuse.tree.lockranges import LockRange as LockRange
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import OpenFile
from ninefuse.tree.order import END
from ninefuse.tree.session import Session, check_offset
from ninefuse.tree.table import open_file_of

T = TypeVar("T")


class LockStatus(IntEnum):
    """The answer to a lock request (9P2000.L)."""

    SUCCESS = 0
    BLOCKED = 1
    ERROR = 2
    GRACE = 3


_LOCK_FLAGS = 3  # P9_LOCK_FLAGS_BLOCK, P9_LOCK_FLAGS_RECLAIM
_TYPES = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)
# flock(2)'s operations, by the types that fcntl(2) has.
FLOCK_OPERATIONS = dict(zip(_TYPES, (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN), strict=True))
_TYPE_OF = {operation: kind for kind, operation in FLOCK_OPERATIONS.items()}
_OPENING = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


async def lock(
    session: Session, fid: int, flags: int, wanted: LockRange, owner: Hashable = None
) -> LockStatus:
    """Set or clear a byte-range lock; never waits for another's.

    Args:
        session: the conversation.
        fid: open for what the lock is to keep others from: for reading, or for writing.
        flags: P9_LOCK_FLAGS_*; they change nothing here.
        wanted: what to lock or unlock; its `pid` is whom `getlock` names.
        owner: whose lock it is, the same for all fids of the file; None: the fid's own. With the
            last fid by which he has taken locks of the file an owner's locks end.

    Returns:
        BLOCKED where another owner's lock, or one on the source, is in the way: the client asks
        again.

    Raises:
        OSError: EINVAL, unopened fid, unknown flags or type; EBADF, the fid is not open for it;
            ENOLCK, no descriptor is to be had; the errors of fcntl(2).

    Source: Tlock of 9P2000.L. Open-file-description locks (fcntl(2), F_OFD_SETLK).
    """
    if session.announces:
        await Begin("lock", fid)
    check_offset(wanted.start, wanted.length)
    if flags & ~_LOCK_FLAGS or wanted.type not in _TYPES:
        raise error(errno.EINVAL)
    use = session.fids.get(fid)
    try:
        file = open_file_of(use)
        if (wanted.type == fcntl.F_RDLCK and not file.readable) or (
            wanted.type == fcntl.F_WRLCK and not file.writable
        ):
            raise error(errno.EBADF)
        is_set = await _set(session, use.node, file, Kind.RECORDS, owner, wanted)
        return LockStatus.SUCCESS if is_set else LockStatus.BLOCKED
    finally:
        session.fids.put(use)


async def getlock(
    session: Session, fid: int, wanted: LockRange, owner: Hashable = None
) -> LockRange:
    """Which lock is in the way of ``wanted``; type F_UNLCK if none is.

    Args:
        session: the conversation.
        fid: open, in any mode.
        wanted: the lock that would be set.
        owner: who would set it, as for `lock`.

    Returns:
        One that is in the way, with the pid of whoever has it: of a process that works on the
        source, or the `pid` of the request by which it was set here; 0 where neither is known
        (an open-file-description lock on the source).

    Raises:
        OSError: EINVAL, unopened; the errors of fcntl(2).

    Source: Tgetlock of 9P2000.L.
    """
    if session.announces:
        await Begin("getlock", fid)
    check_offset(wanted.start, wanted.length)
    use = session.fids.get(fid)
    try:
        file = open_file_of(use)
        owner, at = file if owner is None else owner, where(Kind.RECORDS, use.node)
        async with session.file_locks.turn(at, owner):
            found = await _in_the_way(session, use.node, file, owner, wanted)
        if found.type == fcntl.F_UNLCK:
            return wanted._replace(type=fcntl.F_UNLCK)
        pid = found.pid
        if pid <= 0:
            pid = session.file_locks.pid_of(at, owner, found, wanted)
        return found._replace(pid=pid)
    finally:
        session.fids.put(use)


async def flock(session: Session, fid: int, operation: int) -> bool:
    """Set or clear the lock of a whole file that belongs to an open fid; never waits.

    Args:
        session: the conversation.
        fid: open, in any mode.
        operation: fcntl.LOCK_SH, LOCK_EX or LOCK_UN.

    Returns:
        False where another open file has a lock in the way. One that this had is gone then
        (flock(2): a conversion is not atomic).

    Raises:
        OSError: EINVAL, unopened, or another operation; the errors of flock(2).

    Source: flock(2); 9P has no message for it.
    """
    if operation not in _TYPE_OF:
        raise error(errno.EINVAL)
    use = session.fids.get(fid)
    try:
        wanted = LockRange(_TYPE_OF[operation], 0, 0)
        return await _set(session, use.node, open_file_of(use), Kind.WHOLE, None, wanted)
    finally:
        session.fids.put(use)


async def lock_in_time(
    session: Session, fid: int, wanted: LockRange, owner: Hashable = None
) -> None:
    """Set a byte-range lock, however long another's is in the way. No thread waits for it.

    Under none the wait is no different: the body is put aside, and other requests are served
    meanwhile, one of which may give the lock back. Two that wait for each other do so until one is
    withdrawn: there is no EDEADLK, as for all locks of open file descriptions.

    Args:
        session: the conversation.
        fid: as for `lock`.
        wanted: as for `lock`.
        owner: as for `lock`.

    Raises:
        OSError: EINTR, the request was withdrawn, and the lock is not set; ENOLCK, another's is in
            the way, and as many wait for locks as may; as for `lock`.

    Source: fcntl(2), F_SETLKW.
    """

    async def ask() -> bool:
        return await lock(session, fid, 0, wanted, owner) is LockStatus.SUCCESS

    await _in_time(session, fid, Kind.RECORDS, owner, wanted, ask)


async def flock_in_time(session: Session, fid: int, operation: int) -> None:
    """Set the lock of a whole file, however long another's is in the way; as `lock_in_time`.

    Raises:
        OSError: EINTR, the request was withdrawn, or ENOLCK, as many wait as may, and no lock is
            set; as for `flock`.

    Source: flock(2) without LOCK_NB.
    """
    wanted = LockRange(_TYPE_OF.get(operation, fcntl.F_UNLCK), 0, 0)

    async def ask() -> bool:
        return await flock(session, fid, operation)

    await _in_time(session, fid, Kind.WHOLE, None, wanted, ask)


async def drop_locks(session: Session, fid: int, owner: Hashable) -> None:
    """Give back all byte-range locks that an owner has of a fid's file.

    Raises:
        OSError: EINVAL, unopened; the errors of fcntl(2).
    """
    use = session.fids.get(fid)
    try:
        file = open_file_of(use)
        if session.file_locks.has(where(Kind.RECORDS, use.node), owner):
            await _set(session, use.node, file, Kind.RECORDS, owner, ALL)
    finally:
        session.fids.put(use)


async def end_locks(session: Session, node: Node, file: OpenFile) -> None:
    """Give back all locks that end with an open file, which is about to be closed."""
    for holder in list(file.holders or ()):
        if holder.files == {file}:
            # Else they go when its descriptor is closed, or the owner's own.
            with contextlib.suppress(OSError):
                await _set(session, node, file, holder.where[0], holder.owner, ALL)


async def _in_time(
    session: Session,
    fid: int,
    kind: Kind,
    owner: Hashable,
    wanted: LockRange,
    ask: Callable[[], Awaitable[bool]],
) -> None:
    use = session.fids.get(fid)
    try:
        at = where(kind, use.node)
        owner = open_file_of(use) if owner is None else owner
        with session.file_locks.waiting(at, owner, wanted) as waiter:
            await _until_asked(waiter, ask)
    finally:
        session.fids.put(use)


async def _until_asked(waiter: Waiter, ask: Callable[[], Awaitable[bool]]) -> None:
    tries = 0
    while True:
        waiter.tries()
        if await ask():
            return
        try:
            await Later(waiter, tries)
        except BlockingIOError:  # as many wait as may
            raise error(errno.ENOLCK) from None
        tries += 1


async def _set(
    session: Session, node: Node, file: OpenFile, kind: Kind, owner: Hashable, wanted: LockRange
) -> bool:
    """Set or clear a lock; False where another is in the way."""
    locks = session.file_locks
    owner = file if owner is None else owner
    at = where(kind, node)
    async with locks.turn(at, owner):
        holder = locks.enter(at, owner)
        try:
            if holder.fd < 0 and wanted.type == fcntl.F_UNLCK:
                return True
            if holder.fd < 0 and owner is not file:
                is_set = await _set_first(session, node, file, holder, wanted)
            else:
                if holder.fd < 0:
                    holder.fd = file.fd
                elif wanted.type == fcntl.F_WRLCK and holder.access == os.O_RDONLY:
                    await _open_to_write(session, node, file, holder)
                is_set = await _call(session, node, at, _try, kind, holder.fd, wanted)
            if is_set:
                locks.set(holder, wanted, file)
            elif kind is Kind.WHOLE:
                locks.set(holder, ALL, file)  # the one that it had went first
            return is_set
        finally:
            if locks.leave(holder):
                session.defer(holder.end, session.fids.close_open)


async def _set_first(
    session: Session, node: Node, file: OpenFile, holder: Holder, wanted: LockRange
) -> bool:
    """Set an owner's first lock of a file. He has a descriptor only while he has a lock."""
    await _claim(session, node, file)
    opened = None
    try:
        opened = await blocking(node.number, _open_and_try, file, wanted)
    finally:
        if opened is None:
            session.fids.unclaim(file.owner)
    if opened is not None:
        holder.fd, holder.access = opened
        holder.is_own, holder.claimed_for = True, file.owner
    return opened is not None


async def _open_to_write(session: Session, node: Node, file: OpenFile, holder: Holder) -> None:
    """Have an owner's description open for writing, which so far is for reading.

    So all that he has are locks to read, and these do not keep each other out: a second
    description has taken them on before the first one goes.
    """
    await _claim(session, node, file)
    fd = -1
    try:
        fd = await blocking(node.number, _open_instead, file.fd, list(holder.held))
    finally:
        if fd < 0:
            session.fids.unclaim(file.owner)
    old, holder.fd, holder.access = holder.fd, fd, os.O_RDWR
    owner, holder.claimed_for = holder.claimed_for, file.owner
    try:
        # At once: they are in the way of what he wants.
        await brief(node.number, _try, Kind.RECORDS, old, ALL)
    finally:
        session.defer(session.fids.close_open, old, owner)


async def _in_the_way(
    session: Session, node: Node, file: OpenFile, owner: Hashable, wanted: LockRange
) -> LockRange:
    locks, at = session.file_locks, where(Kind.RECORDS, node)
    holder = locks.enter(at, owner)
    try:
        # Whoever asks by a descriptor does not see the locks that belong to it.
        if holder.fd < 0 and locks.has(at, file):
            return await blocking(node.number, _ask_apart, file, wanted)
        fd = file.fd if holder.fd < 0 else holder.fd
        return await _call(session, node, at, _ask, fd, wanted)
    finally:
        if locks.leave(holder):
            session.defer(holder.end, session.fids.close_open)


async def _claim(session: Session, node: Node, file: OpenFile) -> None:
    try:
        await session.claim_descriptor(node, file.owner)
    except OSError as e:
        if e.errno != errno.ENFILE:
            raise
        raise error(errno.ENOLCK) from None  # fcntl(2): there is no room for another lock


def _call(
    session: Session, node: Node, at: Where, function: Callable[..., T], *args: object
) -> Call[T]:
    """A call about a lock: a brief one, unless the kernel has many to go through."""
    ask = blocking if session.file_locks.has_many(at) else brief
    return ask(node.number, function, *args)


def _try(kind: Kind, fd: int, wanted: LockRange) -> bool:
    """Set or clear a lock of a descriptor; False where another is in the way."""
    try:
        if kind is Kind.WHOLE:
            fcntl.flock(fd, FLOCK_OPERATIONS[wanted.type] | fcntl.LOCK_NB)
        else:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, packed(wanted))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _open_and_try(file: OpenFile, wanted: LockRange) -> tuple[int, int] | None:
    """A new description with a lock, and what it is open for; None if another is in the way."""
    if file.writable:
        least = os.O_RDONLY if wanted.type == fcntl.F_RDLCK else os.O_WRONLY
        fd, access = _open_again(file.fd, os.O_RDWR, least)
    else:
        fd, access = _open_again(file.fd, os.O_RDONLY)
    is_set = False
    try:
        is_set = _try(Kind.RECORDS, fd, wanted)
    finally:
        if not is_set:
            os.close(fd)
    return (fd, access) if is_set else None


def _open_instead(fd: int, held: list[Held]) -> int:
    """A new description, open for writing too, with the same locks to read as another has."""
    new, _ = _open_again(fd, os.O_RDWR)
    try:
        for start, end, kind, _pid in held:
            part = LockRange(kind, start, 0 if end == END else end - start)
            if not _try(Kind.RECORDS, new, part):
                raise error(errno.ENOLCK)
    except BaseException:
        os.close(new)
        raise
    return new


def _open_again(fd: int, *accesses: int) -> tuple[int, int]:
    """A new description of an open file, open for the first of these that is allowed."""
    for access in accesses[:-1]:
        with contextlib.suppress(OSError):
            return os.open(proc_path(fd), access | _OPENING), access
    return os.open(proc_path(fd), accesses[-1] | _OPENING), accesses[-1]


def _ask(fd: int, wanted: LockRange) -> LockRange:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, packed(wanted))
    assert isinstance(answer, bytes)
    return unpacked(answer)


def _ask_apart(file: OpenFile, wanted: LockRange) -> LockRange:
    fd, _ = _open_again(file.fd, os.O_RDONLY if file.readable else os.O_WRONLY)
    try:
        return _ask(fd, wanted)
    finally:
        os.close(fd)
