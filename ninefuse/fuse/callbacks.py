"""FUSE callbacks as sequences of 9P messages.

One coroutine for each callback that takes more than one message (docs/operations.md has
the whole table). Each is itself an operation body: whatever threading model runs it
runs all of its messages as one request. Nothing here knows of pyfuse3.

What changes attributes besides those that it answers with ends by saying so
(`Session.attributes_changed`). After most calls the kernel knows by itself which of its
attributes are old, but believes them again if an answer from before comes late; and of
some (docs/caching.md) it does not know.

Locks touched: those of the messages. None is held from one message to the next.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from ninefuse import ops
from ninefuse.calls import blocking
from ninefuse.errors import error
from ninefuse.linux.credentials import Caller
from ninefuse.linux.mountflags import NOSUID
from ninefuse.linux.syscalls import Attributes
from ninefuse.ops.io import report_close
from ninefuse.ops.walk import KERNEL
from ninefuse.tree.nodes import Node
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid

T = TypeVar("T")

_CAPABILITY = b"security.capability"


async def lookup(session: Session, parent: int, name: bytes) -> tuple[Fid, Attributes]:
    """walkgetattr of one name to the kernel's fid."""
    return await ops.walkgetattr(session, parent, KERNEL, name)


async def forget(session: Session, forgets: Sequence[tuple[int, int]]) -> int:
    """clunk each fid whose lookups have all been taken back; how many these were."""
    return session.kernel.forget(forgets)


async def setattr(
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
        await ops.setattr(session, fid, changes, caller)
        return await ops.getattr(session, nodeid)
    await ops.setattr(session, fid, changes._replace(mode=None), caller)
    attributes = await ops.getattr(session, nodeid)
    decided = 0 if attributes.kind == stat.S_IFDIR else stat.S_ISUID | stat.S_ISGID
    if (mode ^ stat.S_IMODE(attributes.mode)) & ~decided:
        await ops.setattr(session, fid, ops.Changes(mode=mode), caller)
        attributes = await ops.getattr(session, nodeid)
    return attributes


async def mkdir(
    session: Session, parent: int, name: bytes, mode: int, caller: Caller
) -> tuple[Fid, Attributes]:
    """mkdir, walkgetattr."""
    await ops.mkdir(session, parent, name, mode, caller)
    session.attributes_changed(parent)
    return await lookup(session, parent, name)


async def mknod(
    session: Session, parent: int, name: bytes, mode: int, rdev: int, caller: Caller
) -> tuple[Fid, Attributes]:
    """mknod, walkgetattr."""
    await ops.mknod(session, parent, name, mode, rdev, caller)
    session.attributes_changed(parent)
    return await lookup(session, parent, name)


async def symlink(
    session: Session, parent: int, name: bytes, target: bytes, caller: Caller
) -> tuple[Fid, Attributes]:
    """symlink, walkgetattr."""
    await ops.symlink(session, parent, name, target, caller)
    session.attributes_changed(parent)
    return await lookup(session, parent, name)


async def link(
    session: Session, nodeid: int, parent: int, name: bytes, caller: Caller | None = None
) -> tuple[Fid, Attributes]:
    """link, walk from the file to itself (a lookup is counted), getattr."""
    try:
        await ops.link(session, parent, nodeid, name, caller, remember=True)
    except OSError as e:
        if e.errno == errno.EXDEV and _is_worth_a_look(session, nodeid, parent):
            raise error(errno.ESTALE) from None
        raise
    session.attributes_changed(parent)
    session.attributes_changed(nodeid)
    _, fid = await ops.walk(session, nodeid, KERNEL)
    assert fid is not None
    return fid, await _attributes(session, fid)


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


async def unlink(
    session: Session, parent: int, name: bytes, flags: int, caller: Caller | None = None
) -> None:
    """unlinkat."""
    await ops.unlinkat(session, parent, name, flags, caller)
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


async def open_fid(session: Session, nodeid: int, flags: int, caller: Caller | None = None) -> int:
    """walk to a clone, lopen it; its number is the file handle."""
    handle = session.kernel.new_number()
    await ops.walk(session, nodeid, handle)
    return await _or_clunk(session, handle, _lopen(session, handle, flags, caller))


async def create(
    session: Session, parent: int, name: bytes, flags: int, mode: int, caller: Caller
) -> tuple[int, Fid, Attributes]:
    """walk to a clone of the directory, lcreate, walk to the kernel's fid, getattr.

    The second walk starts from the file just made, not from its name: whatever has the
    name by then is none of its business.
    """
    handle = session.kernel.new_number()
    await ops.walk(session, parent, handle)
    made = await _or_clunk(session, handle, _lcreate(session, handle, name, flags, mode, caller))
    session.attributes_changed(parent)
    return made


async def write(session: Session, handle: int, offset: int, data: bytes) -> int:
    """write, which takes set-id bits away; the kernel does not know from whom."""
    try:
        return await ops.write(session, handle, offset, data)
    finally:
        if session.fids.set_id:
            await _note_lost_bits(session, handle)


async def flush(session: Session, handle: int) -> None:
    """No message: the errors that a close reports, fetched before the clunk."""
    await report_close(session, handle)


async def statfs(session: Session) -> os.statvfs_result:
    """statfs of the root: pyfuse3 does not say which file was asked for."""
    return await ops.statfs(session, ROOT_NODEID)


async def getxattr(
    session: Session, nodeid: int, name: bytes, caller: Caller | None = None
) -> bytes:
    """xattrwalk to a fid of its own, read, clunk."""
    if name == _CAPABILITY:
        return await _read_capability(session, nodeid)
    return await _read_attribute(session, nodeid, name, caller)


async def _read_capability(session: Session, nodeid: int) -> bytes:
    """As getxattr, but that there is none is believed for as long as other attributes.

    The kernel asks before each cached write, in case there is one to take away. And there is none
    where the source's mount gives nobody what it would give.
    """
    fid = session.fids.get(nodeid)
    try:
        node = fid.node
        if _hides_capability(session, node):
            raise error(errno.ENODATA)
        if not session.attr_timeout:
            return await _read_attribute(session, nodeid, _CAPABILITY)
        now = time.monotonic()
        if node.bare > now:
            raise error(errno.ENODATA)
        node.bare = -now
        try:
            return await _read_attribute(session, nodeid, _CAPABILITY)
        except OSError as e:
            # Unless somebody has set one meanwhile, or asks as well.
            if e.errno == errno.ENODATA and node.bare == -now:
                node.bare = now + session.attr_timeout
            raise
    finally:
        session.fids.put(fid)


async def listxattr(session: Session, nodeid: int, caller: Caller | None = None) -> list[bytes]:
    """xattrwalk without a name, read, clunk."""
    names = (await _read_attribute(session, nodeid, b"", caller)).split(b"\0")[:-1]
    if _CAPABILITY in names:
        fid = session.fids.get(nodeid)
        if _hides_capability(session, fid.node):
            names.remove(_CAPABILITY)
        session.fids.put(fid)
    return names


def _hides_capability(session: Session, node: Node) -> bool:
    return bool(session.fids.devices.hides & node.mount.forbids & NOSUID)


async def setxattr(
    session: Session, nodeid: int, name: bytes, value: bytes, caller: Caller | None = None
) -> None:
    """walk to a clone, xattrcreate, write, clunk: which sets it."""
    clone = session.kernel.new_number()
    await ops.walk(session, nodeid, clone)
    await _or_clunk(session, clone, _fill_attribute(session, clone, name, value, caller))
    await ops.clunk(session, clone)
    session.attributes_changed(nodeid)


async def removexattr(
    session: Session, nodeid: int, name: bytes, caller: Caller | None = None
) -> None:
    """walk to a clone, xattrcreate to remove, clunk: which removes it."""
    clone = session.kernel.new_number()
    await ops.walk(session, nodeid, clone)
    removing = ops.xattrcreate(session, clone, name, 0, remove=True, caller=caller)
    await _or_clunk(session, clone, removing)
    await ops.clunk(session, clone)
    session.attributes_changed(nodeid)


async def _lopen(session: Session, handle: int, flags: int, caller: Caller | None) -> int:
    await ops.lopen(session, handle, flags, caller)
    return handle


async def _lcreate(
    session: Session, handle: int, name: bytes, flags: int, mode: int, caller: Caller
) -> tuple[int, Fid, Attributes]:
    await ops.lcreate(session, handle, name, flags, mode, caller)
    _, fid = await ops.walk(session, handle, KERNEL)
    assert fid is not None
    return handle, fid, await _attributes(session, fid)


async def _note_lost_bits(session: Session, handle: int) -> None:
    fid = session.fids.get(handle)
    nodeid = fid.node.path
    session.fids.put(fid)
    if nodeid in session.fids.set_id:
        session.fids.set_id.discard(nodeid)
        # Not by the dispatcher: mapped pages are written back without anybody holding the file.
        await blocking(nodeid, session.attributes_changed, nodeid)


async def _read_attribute(
    session: Session, nodeid: int, name: bytes, caller: Caller | None = None
) -> bytes:
    attribute = session.kernel.new_number()
    size = await ops.xattrwalk(session, nodeid, attribute, name, caller)
    try:
        return await ops.read(session, attribute, 0, size)
    finally:
        await ops.clunk(session, attribute)


async def _fill_attribute(
    session: Session, clone: int, name: bytes, value: bytes, caller: Caller | None
) -> None:
    await ops.xattrcreate(session, clone, name, len(value), caller=caller)
    if value and await ops.write(session, clone, 0, value) != len(value):
        raise error(errno.EIO)


async def _or_clunk(session: Session, fid: int, message: Awaitable[T]) -> T:
    """Await a message; where it fails, clunk the fid that it was for."""
    try:
        return await message
    except BaseException:
        await ops.clunk(session, fid)
        raise


async def _attributes(session: Session, fid: Fid) -> Attributes:
    """getattr of what was just found; if it fails, take back the lookup nobody hears of.

    The kernel keeps a directory locked for its names' requests. So this goes on the
    directory's share of the workers: in the file's own it might queue behind reads that
    are stuck, and every other name of the directory with it.
    """
    place = fid.node.place
    try:
        return await ops.getattr(session, fid.number, on=place[0].path if place else None)
    except BaseException:
        session.kernel.forget([(fid.number, 1)])
        raise
