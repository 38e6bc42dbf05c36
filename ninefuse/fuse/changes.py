"""What the kernel asks for on somebody's behalf, and what it does not say: setattr, set-id bits.

A kernel's setattr is more than 9P's. It takes set-id bits away before a write by whoever makes
it; it sends the mode that a file has without them along with an owner or a size; and it says
"now" by the time that it was when the request was made.

Locks touched: those of the messages.
"""

from __future__ import annotations

import os
import stat
import time

from ninefuse import ops
from ninefuse.calls import blocking
from ninefuse.linux.callers import ENTER, Caller
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.syscalls import Attributes, SetTime, may_write, proc_path, stat_descriptor
from ninefuse.tree.session import MOST_TRIES, SET_ID, Session

_A_SECOND = 1_000_000_000  # nanoseconds
_NOW = ops.Changes(atime=SetTime.NOW, mtime=SetTime.NOW)


async def change(
    session: Session,
    nodeid: int,
    handle: int | None,
    changes: ops.Changes,
    caller: Caller | None = None,
) -> Attributes:
    """setattr on the open fid if there is one, getattr.

    With an owner or a size the kernel sends the mode that a file has without its set-id bits,
    too. The source takes them away itself, from whom it would. Any other mode (a server in the
    kernel sends all changes at once) is set after.
    """
    fid = nodeid if handle is None else handle
    mode = changes.mode
    if mode is None or (changes.uid, changes.gid, changes.size) == (None, None, None):
        await _set(session, fid, changes, caller)
        return await ops.getattr(session, nodeid)
    await _set(session, fid, changes._replace(mode=None), caller)
    attributes = await ops.getattr(session, nodeid)
    decided = 0 if attributes.kind == stat.S_IFDIR else SET_ID
    if (mode ^ stat.S_IMODE(attributes.mode)) & ~decided:
        await _set(session, fid, ops.Changes(mode=mode), caller)
        attributes = await ops.getattr(session, nodeid)
    return attributes


async def change_exactly(
    session: Session,
    nodeid: int,
    handle: int | None,
    changes: ops.Changes,
    caller: Caller | None = None,
) -> Attributes:
    """As `change`, where the kernel leaves set-id bits to the source and says when now is meant.

    (FUSE_HANDLE_KILLPRIV_V2.) What is left to guess is who wants nothing but a new change time:
    the kernel asks for that before a write that takes set-id bits away.
    """
    fid = nodeid if handle is None else handle
    for tries in range(MOST_TRIES, 0, -1):
        try:
            await ops.setattr(session, fid, changes, caller)
            break
        except PermissionError:
            if caller is None or changes != ops.Changes(ctime=True):
                raise
            async with session.using(fid) as use:
                if not await blocking(use.node.number, _has_bits, use.fd):
                    # Somebody's write took them since, or something else is in the way.
                    if tries == 1:
                        raise
                    continue
                if not await blocking(use.node.number, _may_write_as, caller, use.fd):
                    raise
            break
    return await ops.getattr(session, nodeid)


async def note_lost_bits(session: Session, handle: int) -> None:
    """After a write: have the kernel ask for the attributes of a file that had set-id bits."""
    try:
        fid = session.fids.get(handle)
    except OSError:  # it was answered before, and is closed by now
        return
    nodeid = fid.node.number
    session.fids.put(fid)
    if nodeid in session.fids.set_id:
        session.fids.set_id.discard(nodeid)
        # Not by the dispatcher: mapped pages are written back without anybody holding the file.
        await blocking(nodeid, session.attributes_changed, nodeid)


async def _set(session: Session, fid: int, changes: ops.Changes, caller: Caller | None) -> None:
    if not _are_now(changes):
        await _set_for_write(session, fid, changes, caller)
        return
    others = changes._replace(atime=None, mtime=None)
    if others != ops.Changes():
        await _set_for_write(session, fid, others, caller)
    times = ops.Changes(atime=changes.atime, mtime=changes.mtime)
    try:
        await ops.setattr(session, fid, times, caller)
    except PermissionError:
        # Who may write but is not the owner may set both times to now and to nothing else.
        if not _are_now(times):
            raise
        await ops.setattr(session, fid, _NOW, caller)


def _are_now(changes: ops.Changes) -> bool:
    now = time.time_ns()
    both = changes.atime, changes.mtime
    return all(isinstance(t, int) and abs(now - t) < _A_SECOND for t in both)


async def _set_for_write(
    session: Session, fid: int, changes: ops.Changes, caller: Caller | None
) -> None:
    """setattr, which is not refused where the kernel asks for it before somebody's write."""
    try:
        await ops.setattr(session, fid, changes, caller)
    except PermissionError:
        if caller is None or changes not in (
            ops.Changes(mode=changes.mode),
            ops.Changes(ctime=True),
        ):
            raise
        async with session.using(fid) as use:
            if not await blocking(use.node.number, _is_for_write, use.fd, changes.mode, caller):
                raise


def _has_bits(fd: int) -> bool:
    """Whether a file has set-id bits, which a write by whoever may write takes away. Blocks."""
    return bool(stat_descriptor(fd).mode & SET_ID)


def _may_write_as(caller: Caller, fd: int) -> bool:
    with acting_as(caller, (ENTER, fd, b"")):
        return may_write(fd)


def _is_for_write(fd: int, mode: int | None, caller: Caller) -> bool:
    """Whether what was refused to a caller is asked for by the kernel; then it is done. Blocks.

    Before a write by somebody who is not the owner, the kernel asks for it itself, and does not
    say so: the bits go that the write would cost the file anyway. A set-group-id bit without
    group execution it leaves to the write, and asks for nothing to be changed.

    The mode itself is not set: its owner may have changed it since. A chown(2) to nobody takes
    the same bits from the mode that there is, in one step (chown_common in fs/open.c).
    """
    now = stat.S_IMODE(stat_descriptor(fd).mode)
    if mode is None:
        return bool(now & SET_ID)
    taken = SET_ID if now & stat.S_IXGRP else stat.S_ISUID
    if not now & SET_ID or mode != now & ~taken:
        return False
    # Who may not write, nor could have the bits taken by that, asks by himself: the kernel
    # believes him to be the owner still.
    if not _may_write_as(caller, fd):
        return False
    with acting_as(None, bits=True):
        os.chown(proc_path(fd), -1, -1)
    return True
