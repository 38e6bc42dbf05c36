"""The FUSE callbacks, as sequences of 9P messages: the table of docs/operations.md.

One coroutine for each callback, in the order of the table and by its names. Each is itself
an operation body: whatever threading model runs it runs all of its messages as one request.
What else the kernel wants stands beside it: changes.py (setattr), entries.py (readdir),
labels.py (attributes with names). Nothing here knows of pyfuse3.

What changes attributes besides those that it answers with ends by saying so
(`Session.attributes_changed`). After most calls the kernel knows by itself which of its
attributes are old, but believes them again if an answer from before comes late; and of
some (docs/caching.md) it does not know.

Locks touched: those of the messages; the rename lock, read, by link, which remembers a name.
None is held from one message to the next.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Sequence
from typing import NamedTuple, TypeVar

from ninefuse import ops
from ninefuse.calls import Begin, blocking
from ninefuse.errors import error
from ninefuse.fuse import changes, entries, labels
from ninefuse.fuse.entries import EntryPlus
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import Attributes
from ninefuse.ops.names import AT_REMOVEDIR
from ninefuse.tree.opened import OpenFile
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid, open_file_of

T = TypeVar("T")

# In the flags of an open: the file is opened to be executed (FMODE_EXEC in include/linux/fs.h).
# No program can ask for it.
_EXECUTES = 0x20


class Handle(NamedTuple):
    """A file that was opened."""

    number: int  # of its fid
    is_live: bool  # to be read and written past all caches; see `OpenFile`


async def lookup(session: Session, parent: int, name: bytes) -> tuple[Fid, Attributes]:
    """walkgetattr of one name to the kernel's fid."""
    return await ops.walkgetattr(session, parent, session.kernel.intern, name)


async def forget(session: Session, forgets: Sequence[tuple[int, int]]) -> int:
    """clunk each fid whose lookups have all been taken back; how many these were."""
    gone = session.kernel.forget(forgets)
    if session.announces:
        for _ in range(gone):
            await Begin("clunk")
    return gone


async def getattr(session: Session, nodeid: int) -> Attributes:
    """getattr."""
    return await ops.getattr(session, nodeid)


async def setattr(
    session: Session,
    nodeid: int,
    handle: int | None,
    wanted: ops.Changes,
    caller: Caller | None = None,
) -> Attributes:
    """setattr on the open fid if there is one, getattr."""
    return await changes.change(session, nodeid, handle, wanted, caller)


async def readlink(session: Session, nodeid: int) -> bytes:
    """readlink."""
    return await ops.readlink(session, nodeid)


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
        if e.errno == errno.EXDEV and _is_worth_a_look(session, nodeid, parent):
            raise error(errno.ESTALE) from None
        raise
    await _remember(session, nodeid, parent, name)
    session.attributes_changed(parent)
    session.attributes_changed(nodeid)
    _, fid = await ops.walk(session, nodeid, session.kernel.intern)
    assert fid is not None
    return fid, await _attributes(session, fid)


async def open(session: Session, nodeid: int, flags: int, caller: Caller | None = None) -> Handle:
    """walk to a clone, lopen it; its number is the file handle."""
    clone = await _clone(session, nodeid)
    executes = bool(flags & _EXECUTES)
    opening = ops.lopen(session, clone.number, flags, caller, executes=executes)
    await _or_clunk(session, clone, opening)
    return _handle(clone)


async def create(
    session: Session, parent: int, name: bytes, flags: int, mode: int, caller: Caller | None = None
) -> tuple[Handle, Fid, Attributes]:
    """walk to a clone of the directory, lcreate, walk to the kernel's fid, getattr.

    The second walk starts from the file just made, not from its name: whatever has the
    name by then is none of its business.
    """
    clone = await _clone(session, parent)
    made = await _or_clunk(session, clone, _lcreate(session, clone, name, flags, mode, caller))
    session.attributes_changed(parent)
    return made


async def read(session: Session, handle: int, offset: int, count: int) -> bytes:
    """read."""
    return await ops.read(session, handle, offset, count)


async def write(session: Session, handle: int, offset: int, data: bytes) -> int:
    """write, which takes set-id bits away; the kernel does not know from whom."""
    try:
        return await ops.write(session, handle, offset, data)
    finally:
        if session.fids.set_id:
            await changes.note_lost_bits(session, handle)


async def flush(session: Session, handle: int) -> None:
    """No message: the errors that closing an open file reports, which stays open.

    Some file systems (NFS, quotas) say only at close(2) that a write failed. Closing a duplicate
    says it, too.

    Raises:
        OSError: EINVAL, unopened; the errors of close(2).
    """
    use = session.fids.get(handle)
    try:
        file = open_file_of(use)
        if file.writable:
            await blocking(use.node.number, _close_duplicate, file.fd)
    finally:
        session.fids.put(use)


async def fsync(session: Session, handle: int, datasync: bool) -> None:
    """fsync."""
    await ops.fsync(session, handle, datasync)


async def fsyncdir(session: Session, handle: int, datasync: bool) -> None:
    """fsync."""
    await ops.fsync(session, handle, datasync)


async def release(session: Session, handle: int) -> None:
    """clunk."""
    await ops.clunk(session, handle)


async def releasedir(session: Session, handle: int) -> None:
    """clunk."""
    await ops.clunk(session, handle)


async def opendir(session: Session, nodeid: int, caller: Caller | None = None) -> int:
    """walk to a clone, lopen it; its number is the file handle."""
    clone = await _clone(session, nodeid)
    await _or_clunk(session, clone, ops.lopen(session, clone.number, os.O_DIRECTORY, caller))
    return clone.number


async def readdir(session: Session, handle: int, offset: int) -> list[EntryPlus]:
    """readdir; walk and getattr of each entry. `entries.fitted` ends it."""
    return await entries.readdirplus(session, handle, offset)


async def statfs(session: Session) -> os.statvfs_result:
    """statfs of the root: pyfuse3 does not say which file was asked for."""
    return await ops.statfs(session, ROOT_NODEID)


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
    session: Session, nodeid: int, name: bytes, value: bytes, caller: Caller | None = None
) -> None:
    """walk to a clone, xattrcreate, write, clunk: which sets it."""
    clone = await _clone(session, nodeid)
    caller = labels.setter(name, caller)
    await _or_clunk(session, clone, labels.fill(session, clone.number, name, value, caller))
    await ops.clunk(session, clone.number)
    session.attributes_changed(nodeid)


async def removexattr(
    session: Session, nodeid: int, name: bytes, caller: Caller | None = None
) -> None:
    """walk to a clone, xattrcreate to remove, clunk: which removes it."""
    clone = await _clone(session, nodeid)
    caller = labels.remover(name, caller)
    removing = ops.xattrcreate(session, clone.number, name, 0, remove=True, caller=caller)
    await _or_clunk(session, clone, removing)
    await ops.clunk(session, clone.number)
    session.attributes_changed(nodeid)


async def _clone(session: Session, fid: int) -> Fid:
    """walk of no names to a new handle."""
    _, clone = await ops.walk(session, fid, session.kernel.new_number())
    assert clone is not None
    return clone


def _handle(fid: Fid) -> Handle:
    return Handle(fid.number, isinstance(fid.opened, OpenFile) and fid.opened.live)


async def _or_clunk(session: Session, fid: Fid, message: Awaitable[T]) -> T:
    """Await a message; where it fails, clunk the fid that it was for."""
    try:
        return await message
    except BaseException:
        await ops.clunk(session, fid.number)
        raise


async def _lcreate(
    session: Session, clone: Fid, name: bytes, flags: int, mode: int, caller: Caller | None
) -> tuple[Handle, Fid, Attributes]:
    try:
        await ops.lcreate(session, clone.number, name, flags | os.O_EXCL, mode, caller)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        # The kernel looked and found none. It looks again by itself, and opens what is there with
        # the checks that opening takes.
        raise error(errno.ESTALE) from None
    _, fid = await ops.walk(session, clone.number, session.kernel.intern)
    assert fid is not None
    return _handle(clone), fid, await _attributes(session, fid)


async def _attributes(session: Session, fid: Fid) -> Attributes:
    """getattr of what was just found; if it fails, take back the lookup nobody hears of.

    The kernel keeps a directory locked for its names' requests. So this goes on the
    directory's share of the workers: in the file's own it might queue behind reads that
    are stuck, and every other name of the directory with it.
    """
    place = fid.node.place
    try:
        return await ops.getattr(session, fid.number, on=place[0].number if place else None)
    except BaseException:
        session.kernel.forget([(fid.number, 1)])
        raise


async def _remember(session: Session, nodeid: int, parent: int, name: bytes) -> None:
    """Find a file by its new name from now on.

    Mail and git link, and remove the name that they began with.
    """
    file = session.fids.get(nodeid)
    try:
        directory = session.fids.get(parent)
        try:
            await session.remember(file.node, directory.node, name)
        finally:
            session.fids.put(directory)
    finally:
        session.fids.put(file)


def _is_worth_a_look(session: Session, nodeid: int, parent: int) -> bool:
    """Whether a file that cannot be linked to may have been found at another place since.

    What the kernel has in memory it does not look up, and at another place of the directory the
    file is the same. ESTALE has it look at the file's name again, once; where it is found by that
    is where it was meant.
    """
    file = session.fids.get(nodeid)
    try:
        directory = session.fids.get(parent)
        node, there = file.node, directory.node
        session.fids.put(directory)
        asked, node.asked = node.asked, None
        if node.device.number != there.device.number or asked is node.mount:
            return False  # it was looked up, and found at the same place
        node.asked = node.mount
        return True
    finally:
        session.fids.put(file)


def _close_duplicate(fd: int) -> None:
    try:
        duplicate = os.dup(fd)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            return  # that is no failure of the file's, and its data is safe
        raise
    os.close(duplicate)
