"""Extended attributes: xattrwalk, xattrcreate.

9P reaches attributes through fids: xattrwalk makes a fid that reads as the value (or as
the list of names), xattrcreate turns a fid into one that is written to and takes effect
at its clunk.

Locks touched: none, but for opening a node again whose descriptor was reclaimed.
"""

from __future__ import annotations

import errno
import os

from ninefuse.calls import Begin, blocking
from ninefuse.errors import error
from ninefuse.linux.callers import ENTER, Caller, may_see_trusted
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.syscalls import proc_path
from ninefuse.tree.opened import AttributeRead, AttributeWrite
from ninefuse.tree.session import Session

XATTR_SIZE_MAX = 65536  # bytes


async def xattrwalk(
    session: Session, fid: int, newfid: int, name: bytes = b"", caller: Caller | None = None
) -> int:
    """Make ``newfid`` read as an attribute of a fid's file, as it is now.

    Args:
        session: the conversation.
        fid: the file.
        newfid: a new fid.
        name: the attribute; empty for the list of names, each ended by a zero byte.
        caller: who asks; None: the daemon.

    Returns:
        How many bytes there are to read.

    Raises:
        OSError: EINVAL, newfid is taken or the name has a zero byte; the errors of
            getxattr(2) and listxattr(2).

    Source: Txattrwalk of 9P2000.L.
    """
    if session.announces:
        await Begin("xattrwalk", fid)
    async with session.using(fid) as use:
        if b"\0" in name:
            raise error(errno.EINVAL)
        if name:
            value = await blocking(use.node.number, _getxattr, use.fd, name, caller)
        else:
            value = await blocking(use.node.number, _list, use.fd, caller)
        session.fids.add(newfid, use.node, AttributeRead(value))
    return len(value)


async def xattrcreate(
    session: Session,
    fid: int,
    name: bytes,
    size: int,
    flags: int = 0,
    *,
    remove: bool = False,
    caller: Caller | None = None,
) -> None:
    """Turn a fid into one that writes an attribute of its file, at its clunk.

    Args:
        session: the conversation.
        fid: unopened; clients clone one for this.
        name: the attribute.
        size: how many bytes will be written.
        flags: 0, os.XATTR_CREATE or os.XATTR_REPLACE.
        remove: remove the attribute instead. (9P says that with a size of 0, and so
            cannot set an empty value, which Linux has.)
        caller: who sets it; None: the daemon.

    Raises:
        OSError: E2BIG, more than 64 KiB; EINVAL, unknown flags, a name that is none, or
            the fid is open; EROFS.

    Source: Txattrcreate of 9P2000.L.
    """
    if session.announces:
        await Begin("xattrcreate", fid)
    if size > XATTR_SIZE_MAX:
        raise error(errno.E2BIG)
    if size < 0 or not name or b"\0" in name or flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
        raise error(errno.EINVAL)
    session.writable()
    use = session.fids.get(fid)
    try:
        session.fids.open(use, AttributeWrite(name, size, flags, remove, caller))
    finally:
        session.fids.put(use)


def _getxattr(fd: int, name: bytes, caller: Caller | None) -> bytes:
    # Of the first the file's permission bits are looked at, the second are root's (xattr(7)).
    asks = caller if name.startswith((b"user.", b"trusted.")) else None
    with acting_as(asks, (ENTER, fd, b"")):
        return os.getxattr(proc_path(fd), name)


def _list(fd: int, caller: Caller | None) -> bytes:
    names = list(map(os.fsencode, os.listxattr(proc_path(fd))))
    # A daemon of root sees all; the source shows these to those who have CAP_SYS_ADMIN.
    trusted = any(name.startswith(b"trusted.") for name in names)
    if trusted and caller is not None and not may_see_trusted(caller):
        names = [name for name in names if not name.startswith(b"trusted.")]
    return b"".join(name + b"\0" for name in names)
