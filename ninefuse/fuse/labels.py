"""Extended attributes, as a kernel asks for them: by their names, each a fid of its own.

The kernel has asked already for the right to what is trusted, and asks for
security.capability before each cached write; what is known of that is remembered here.

Locks touched: those of the messages.
"""

from __future__ import annotations

import errno
import time

from ninefuse import ops
from ninefuse.errors import error
from ninefuse.linux.callers import Caller
from ninefuse.linux.mountflags import NOSUID
from ninefuse.tree.nodes import Node
from ninefuse.tree.session import Session

CAPABILITY = b"security.capability"


async def read(session: Session, nodeid: int, name: bytes, caller: Caller | None = None) -> bytes:
    """xattrwalk to a fid of its own, read, clunk; without a name the list of names."""
    attribute = session.kernel.new_number()
    size = await ops.xattrwalk(session, nodeid, attribute, name, caller)
    try:
        return await ops.read(session, attribute, 0, size)
    finally:
        await ops.clunk(session, attribute)


async def read_capability(session: Session, nodeid: int) -> bytes:
    """As `read`, but that there is none is believed for as long as other attributes.

    The kernel asks before each cached write, in case there is one to take away. And there is none
    where the source's mount gives nobody what it would give.
    """
    fid = session.fids.get(nodeid)
    try:
        node = fid.node
        if _hides_capability(session, node):
            raise error(errno.ENODATA)
        if not session.attr_timeout:
            return await read(session, nodeid, CAPABILITY)
        now = time.monotonic()
        rare = node.with_rare
        if rare.bare_until > now:
            raise error(errno.ENODATA)
        rare.bare_asked = now
        try:
            return await read(session, nodeid, CAPABILITY)
        except OSError as e:
            # Unless somebody has set one meanwhile, or asks as well.
            if e.errno == errno.ENODATA and rare.bare_asked == now:
                rare.bare_until = now + session.attr_timeout
            raise
    finally:
        session.fids.put(fid)


def without_hidden(session: Session, nodeid: int, names: list[bytes]) -> list[bytes]:
    """The names of a file's attributes, but for what its mount gives nobody."""
    if CAPABILITY in names:
        fid = session.fids.get(nodeid)
        if _hides_capability(session, fid.node):
            names.remove(CAPABILITY)
        session.fids.put(fid)
    return names


async def fill(
    session: Session, clone: int, name: bytes, value: bytes, caller: Caller | None, flags: int
) -> None:
    """xattrcreate, write; the clunk that follows sets it."""
    await ops.xattrcreate(session, clone, name, len(value), flags, caller=caller)
    if value and await ops.write(session, clone, 0, value) != len(value):
        raise error(errno.EIO)


def setter(name: bytes, caller: Caller | None) -> Caller | None:
    """As whom to set an attribute.

    The trusted ones take CAP_SYS_ADMIN, which the kernel has asked for, and which is no matter
    of inodes: its answer was no older than the request. The caller's process need not have it:
    overlayfs asks with the rights of who mounted it, and root in a container has fewer.
    """
    return None if name.startswith(b"trusted.") else caller


def remover(name: bytes, caller: Caller | None) -> Caller | None:
    """As whom to remove an attribute.

    A file's capabilities are taken away by the kernel, before a write by anybody. To others it
    does not leave the removal before it has seen that they may, by no attributes.
    """
    return None if name == CAPABILITY else setter(name, caller)


def _hides_capability(session: Session, node: Node) -> bool:
    return bool(session.fids.devices.hides & node.mount.forbids & NOSUID)
