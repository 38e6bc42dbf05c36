"""The FUSE callbacks, as sequences of 9P messages: the table of docs/operations.md.

One coroutine for each callback, in the order of the table and by its names; a callback that is one
message is that message itself. Each is an operation body: whatever threading model runs it runs
all of its messages as one request. What else the kernel wants stands beside it: changes.py
(setattr), entries.py (readdir), labels.py (attributes with names), beyond.py (what 9P has no
message for). Nothing here knows of pyfuse3.

What changes attributes besides those that it answers with ends by saying so
(`Session.attributes_changed`). After most calls the kernel knows by itself which of its
attributes are old, but believes them again if an answer from before comes late; and of
some (docs/caching.md) it does not know.

Locks touched: those of the messages; the rename lock, read, by link, which remembers a name.
None is held from one message to the next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Sequence

from ninefuse import ops
from ninefuse.calls import Begin, blocking
from ninefuse.errors import error
from ninefuse.fuse import beyond, changes, entries, forgotten, labels, linking
from ninefuse.fuse.handles import (
    Handle,
    attributes_of,
    clone_of,
    create_in,
    create_nameless_in,
    handle_of,
    or_clunk,
)
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import Attributes
from ninefuse.ops import locking
from ninefuse.ops.names import AT_REMOVEDIR
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid, open_file_of

# In the flags of an open: the file is opened to be executed (FMODE_EXEC in include/linux/fs.h).
# No program can ask for it.
_EXECUTES = 0x20

_AT_ONCE = 200  # nodeids to be forgotten, which takes a millisecond, …
_PAUSE = 0.0005  # … and seconds until the next ones are


async def lookup(session: Session, parent: int, name: bytes) -> tuple[Fid, Attributes]:
    """walkgetattr of one name to the kernel's fid."""
    if name in (b".", b"..") and session.fids.devices.inodes is not None:
        find = forgotten.find if name == b"." else forgotten.find_parent
        return await find(session, parent)
    return await ops.walkgetattr(session, parent, session.kernel.intern, name)


async def forget(session: Session, forgets: Sequence[tuple[int, int]]) -> int:
    """clunk each fid whose lookups have all been taken back; how many these were.

    Of many, most are left to be done later: whoever runs this has others wait.
    """
    if len(forgets) > _AT_ONCE:
        session.defer(_forget_gently, session, forgets[_AT_ONCE:])
    gone = session.kernel.forget(forgets[:_AT_ONCE])
    if session.announces:
        for _ in range(gone):
            await Begin("clunk")
    return gone


def _forget_gently(session: Session, forgets: Sequence[tuple[int, int]]) -> None:
    """Forget many, and let others have the interpreter's lock in between."""
    for at in range(0, len(forgets), _AT_ONCE):
        session.kernel.forget(forgets[at : at + _AT_ONCE])
        time.sleep(_PAUSE)


getattr = ops.getattr


async def setattr(
    session: Session,
    nodeid: int,
    handle: int | None,
    wanted: ops.Changes,
    caller: Caller | None = None,
    *,
    says_all: bool = False,
) -> Attributes:
    """setattr on the open fid if there is one, getattr.

    Args:
        session, nodeid, handle, wanted, caller: as of the messages.
        says_all: whether what is wanted is all that the kernel said; else see changes.py.
    """
    if wanted == ops.Changes():
        wanted = wanted._replace(ctime=True)  # a chown to nobody: it moves that at least
    if not says_all:
        return await changes.change(session, nodeid, handle, wanted, caller)
    return await changes.change_exactly(session, nodeid, handle, wanted, caller)


readlink = ops.readlink


async def mknod(
    session: Session, parent: int, name: bytes, mode: int, rdev: int, caller: Caller | None = None
) -> tuple[Fid, Attributes]:
    """mknod, walkgetattr."""
    await ops.mknod(session, parent, name, mode, rdev, caller)
    session.attributes_changed(parent)
    return await lookup(session, parent, name)


async def mkdir(
    session: Session, parent: int, name: bytes, mode: int, caller: Caller | None = None
) -> tuple[Fid, Attributes]:
    """mkdir, walkgetattr."""
    await ops.mkdir(session, parent, name, mode, caller)
    session.attributes_changed(parent)
    return await lookup(session, parent, name)


async def symlink(
    session: Session, parent: int, name: bytes, target: bytes, caller: Caller | None = None
) -> tuple[Fid, Attributes]:
    """symlink, walkgetattr."""
    await ops.symlink(session, parent, name, target, caller)
    session.attributes_changed(parent)
    return await lookup(session, parent, name)


async def unlink(session: Session, parent: int, name: bytes, caller: Caller | None = None) -> None:
    """unlinkat."""
    await ops.unlinkat(session, parent, name, 0, caller)
    session.attributes_changed(parent)


async def rmdir(session: Session, parent: int, name: bytes, caller: Caller | None = None) -> None:
    """unlinkat."""
    await ops.unlinkat(session, parent, name, AT_REMOVEDIR, caller)
    session.attributes_changed(parent)


async def rename(
    session: Session,
    old: int,
    oldname: bytes,
    new: int,
    newname: bytes,
    flags: int,
    caller: Caller | None = None,
) -> None:
    """renameat."""
    await ops.renameat(session, old, oldname, new, newname, flags, caller)
    session.attributes_changed(old)
    if new != old:
        session.attributes_changed(new)


async def link(
    session: Session, nodeid: int, parent: int, name: bytes, caller: Caller | None = None
) -> tuple[Fid, Attributes]:
    """link, walk from the file to itself (a lookup is counted), getattr."""
    try:
        await ops.link(session, parent, nodeid, name, caller)
    except OSError as e:
        if e.errno == errno.EXDEV and linking.is_worth_a_look(session, nodeid, parent):
            raise error(errno.ESTALE) from None
        raise
    await linking.remember(session, nodeid, parent, name)
    session.attributes_changed(parent)
    session.attributes_changed(nodeid)
    _, fid = await ops.walk(session, nodeid, session.kernel.intern)
    assert fid is not None
    return fid, await attributes_of(session, fid)


async def open(session: Session, nodeid: int, flags: int, caller: Caller | None = None) -> Handle:
    """walk to a clone, lopen it; its number is the file handle."""
    clone = await clone_of(session, nodeid)
    executes = bool(flags & _EXECUTES)
    opening = ops.lopen(session, clone.number, flags, caller, executes=executes)
    await or_clunk(session, clone, opening)
    return handle_of(clone)


async def create(
    session: Session, parent: int, name: bytes, flags: int, mode: int, caller: Caller | None = None
) -> tuple[Handle, Fid, Attributes]:
    """walk to a clone of the directory, lcreate, walk to the kernel's fid, getattr.

    The second walk starts from the file just made, not from its name: whatever has the
    name by then is none of its business.
    """
    clone = await clone_of(session, parent)
    made = await or_clunk(session, clone, create_in(session, clone, name, flags, mode, caller))
    session.attributes_changed(parent)
    return made


async def tmpfile(
    session: Session, parent: int, flags: int, mode: int, caller: Caller | None = None
) -> tuple[Handle, Fid, Attributes]:
    """walk to a clone of the directory, which becomes the file; walk to the kernel's fid, getattr.

    No message makes a file without a name. A link to it is a link as any.
    """
    clone = await clone_of(session, parent)
    making = create_nameless_in(session, clone, flags, mode, caller)
    return await or_clunk(session, clone, making)


read = ops.read


async def write(
    session: Session, handle: int, offset: int, data: bytes, how: ops.Writing = ops.UNKNOWN_WRITE
) -> int:
    """write, which takes set-id bits away; the kernel does not know from whom."""
    try:
        return await ops.write(session, handle, offset, data, how)
    finally:
        if session.fids.set_id:
            await changes.note_lost_bits(session, handle)


getlk = ops.getlock


async def setlk(
    session: Session, handle: int, owner: int, wanted: ops.LockRange, waits: bool
) -> None:
    """lock; again, while another is in the way, if it waits (FUSE_SETLKW).

    Raises:
        OSError: EAGAIN, another is in the way; EINTR, the request was withdrawn.
    """
    if waits:
        await locking.lock_in_time(session, handle, wanted, owner)
    elif await ops.lock(session, handle, 0, wanted, owner) is not ops.LockStatus.SUCCESS:
        raise error(errno.EAGAIN)
    if wanted.type != fcntl.F_UNLCK:
        beyond.look_again(session, handle)


async def flock(session: Session, handle: int, operation: int, waits: bool) -> None:
    """No message: 9P knows no lock of whole files.

    Raises:
        OSError: EAGAIN, another is in the way; EINTR, the request was withdrawn.
    """
    if waits:
        await locking.flock_in_time(session, handle, operation)
    elif not await locking.flock(session, handle, operation):
        raise error(errno.EAGAIN)
    if operation != fcntl.LOCK_UN:
        beyond.look_again(session, handle)


async def flush(session: Session, handle: int, owner: int | None = None) -> None:
    """Nearly no message: what a close(2) of one descriptor does to a file that stays open.

    Some file systems (NFS, say) tell only at close(2) that a write failed. Closing a duplicate
    tells it, too; it is left out where nothing can come of it. And a process that closes any
    descriptor of a file loses its byte-range locks of that (fcntl(2)): the kernel sends no other
    notice.

    Args:
        session: the conversation.
        handle: the open file.
        owner: of locks, who closes it; None: there are none.

    Raises:
        OSError: EINVAL, unopened; the errors of close(2).
    """
    if owner is not None:
        await locking.drop_locks(session, handle, owner)
    use = session.fids.get(handle)
    try:
        file = open_file_of(use)
        found = use.node.device.file_system
        if file.writable and (found is None or not found.is_silent_at_close):
            await blocking(use.node.number, _close_duplicate, file.fd)
    finally:
        session.fids.put(use)


fsync = fsyncdir = ops.fsync
# The locks go that end with the handle. Which these are is known here: the kernel says whether
# flock(2) was used (RELEASE's FUSE_RELEASE_FLOCK_UNLOCK), and nothing of locks by F_OFD_SETLK.
release = releasedir = ops.clunk


async def opendir(session: Session, nodeid: int, caller: Caller | None = None) -> int:
    """walk to a clone, lopen it; its number is the file handle."""
    clone = await clone_of(session, nodeid)
    await or_clunk(session, clone, ops.lopen(session, clone.number, os.O_DIRECTORY, caller))
    return clone.number


readdir = entries.readdir
readdirplus = entries.readdirplus  # readdir; walk and getattr of each entry
statfs = ops.statfs
# No messages.
syncfs = beyond.syncfs
fallocate = beyond.fallocate
lseek = beyond.lseek
copy_file_range = beyond.copy_file_range
ioctl = beyond.ioctl


async def getxattr(
    session: Session, nodeid: int, name: bytes, caller: Caller | None = None
) -> bytes:
    """xattrwalk to a fid of its own, read, clunk."""
    if name == labels.CAPABILITY:
        return await labels.read_capability(session, nodeid)
    return await labels.read(session, nodeid, name, caller)


async def listxattr(session: Session, nodeid: int, caller: Caller | None = None) -> list[bytes]:
    """xattrwalk without a name, read, clunk."""
    names = (await labels.read(session, nodeid, b"", caller)).split(b"\0")[:-1]
    return labels.without_hidden(session, nodeid, names)


async def setxattr(
    session: Session,
    nodeid: int,
    name: bytes,
    value: bytes,
    caller: Caller | None = None,
    flags: int = 0,
) -> None:
    """walk to a clone, xattrcreate, write, clunk: which sets it."""
    clone = await clone_of(session, nodeid)
    caller = labels.setter(name, caller)
    filling = labels.fill(session, clone.number, name, value, caller, flags)
    await or_clunk(session, clone, filling)
    await ops.clunk(session, clone.number)
    session.attributes_changed(nodeid)


async def removexattr(
    session: Session, nodeid: int, name: bytes, caller: Caller | None = None
) -> None:
    """walk to a clone, xattrcreate to remove, clunk: which removes it."""
    clone = await clone_of(session, nodeid)
    caller = labels.remover(name, caller)
    removing = ops.xattrcreate(session, clone.number, name, 0, remove=True, caller=caller)
    await or_clunk(session, clone, removing)
    await ops.clunk(session, clone.number)
    session.attributes_changed(nodeid)


def _close_duplicate(fd: int) -> None:
    try:
        duplicate = os.dup(fd)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            return  # that is no failure of the file's, and its data is safe
        raise
    os.close(duplicate)
