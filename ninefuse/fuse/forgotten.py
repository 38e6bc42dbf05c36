"""What the kernel asks for by number after it has forgotten it: LOOKUP of `.` and `..`.

A file handle of the kernel (open_by_handle_at(2), NFS) is a nodeid and its generation. Where it has
forgotten the nodeid it looks up `.` in it, and compares generations. Above a directory that it
knows no name of it looks up `..`, and finds the names by itself, from the root down.

A nodeid of the source's own device is an inode's number, by which the file is found again
(inodes.py). All other nodeids are stale.

Locks touched: the fid table's.
"""

from __future__ import annotations

import errno
import os

from ninefuse import ops
from ninefuse.calls import blocking
from ninefuse.errors import error
from ninefuse.fuse.handles import attributes_of
from ninefuse.linux.syscalls import Attributes, stat_descriptor
from ninefuse.ops.walk import found
from ninefuse.tree.nodes import Node
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session, check_directory
from ninefuse.tree.table import Fid


async def find(session: Session, nodeid: int) -> tuple[Fid, Attributes]:
    """The fid of a nodeid, a lookup counted, and its file's attributes.

    Args:
        session: the conversation.
        nodeid: as the kernel has it in a file handle, which may be anybody's invention.

    Raises:
        OSError: ESTALE, there is no such file, or it was removed, or is not to be found by its
            number; ENFILE; the errors of open_by_handle_at(2).
    """
    try:
        # Forgetting is told of a little later than it is done.
        _, fid = await ops.walk(session, nodeid, session.kernel.intern)
    except OSError as e:
        if e.errno != errno.ESTALE:
            raise
        root = session.fids.get(ROOT_NODEID)
        try:
            node, attributes = await blocking(nodeid, _find, session, root.node, nodeid)
        finally:
            session.fids.put(root)
        fid = _intern(session, node)
    else:
        assert fid is not None
        attributes = await attributes_of(session, fid)
    if fid.number != nodeid or not attributes.nlink:
        session.kernel.forget([(fid.number, 1)])
        raise error(errno.ESTALE)
    return fid, attributes


async def find_parent(session: Session, nodeid: int) -> tuple[Fid, Attributes]:
    """The fid of the directory above a directory, a lookup counted, and its attributes.

    Raises:
        OSError: unknown nodeid; ENOTDIR; ESTALE, it is the root of a mount, or on another one than
            the source's; ENFILE; the errors of open(2).
    """
    async with session.using(nodeid) as use:
        check_directory(use.node)
        node, attributes = await blocking(nodeid, _find_parent, session, use.node)
    return _intern(session, node), attributes


def _intern(session: Session, node: Node) -> Fid:
    try:
        return session.kernel.intern(node)
    finally:
        session.fids.unpin(node)


def _find(session: Session, root: Node, nodeid: int) -> tuple[Node, Attributes]:
    """The node of an inode, pinned, and its attributes. Blocks."""
    session.descriptors.make_room(root)
    return _node(session, session.fids.devices.open_number(nodeid))


def _find_parent(session: Session, directory: Node) -> tuple[Node, Attributes]:
    """The node of the directory above, pinned, and its attributes. Blocks."""
    below = stat_descriptor(directory.fd)
    # Above the root of a mount is another mount, or what the source is not to show.
    if below.is_mount_root or below.mount_id != session.fids.devices.mounts.own:
        raise error(errno.ESTALE)
    session.descriptors.make_room(directory)
    return _node(session, session.open_step(directory.fd, b".."))


def _node(session: Session, fd: int) -> tuple[Node, Attributes]:
    try:
        attributes = stat_descriptor(fd)
        mark = session.fids.devices.mark(attributes, fd)
    except OSError:
        os.close(fd)
        raise
    return found(session, None, fd, attributes, mark), attributes
