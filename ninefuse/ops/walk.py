"""Getting from fid to fid, and giving fids back: walk, walkgetattr, clunk, remove.

Locks touched: the rename lock, read, by a walk of names, where it notes what it has found.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext

from ninefuse.calls import Begin, blocking, blocking_unless
from ninefuse.errors import error
from ninefuse.linux.callers import ENTER, LABEL, Caller
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.syscalls import (
    Attributes,
    open_cached,
    open_step,
    proc_path,
    stat_descriptor,
    stat_name,
)
from ninefuse.ops.locking import end_locks
from ninefuse.ops.names import at_its_name, remove_if_same
from ninefuse.tree.identity import Mark
from ninefuse.tree.nodes import Named, Node
from ninefuse.tree.opened import AttributeWrite, OpenFile
from ninefuse.tree.qids import Qid, qid_of
from ninefuse.tree.session import MOST_TRIES, Session, Use, check_component, check_directory
from ninefuse.tree.table import Fid

MAXWELEM = 16  # names in one walk
_NOT_ALONE = nullcontext()  # others may move the name meanwhile
# Gives what a walk has arrived at its fid, where the client leaves the number to us: the node, and
# the place that it was found at, if by its name. It notes that place, and waits for nobody.
Numbering = Callable[[Node, tuple[Node, bytes] | None], Fid]


async def walk(
    session: Session,
    fid: int,
    newfid: int | Numbering,
    names: list[bytes] | tuple[bytes, ...] = (),
    caller: Caller | None = None,
) -> tuple[list[Qid], Fid | None]:
    """Make ``newfid`` stand for what the names lead to, starting from ``fid``.

    No names: a clone of ``fid``, an open one too (the clone is unopened).

    Args:
        session: the conversation.
        fid: where to start.
        newfid: a new fid, or ``fid`` itself if that is unopened; or what makes the fid, for a
            client that leaves its number to us.
        names: up to 16 path components; ``..`` of the root is the root.
        caller: who asks, who must be allowed to search each directory on the way; None: the
            daemon. (A kernel has looked whether its caller is.)

    Returns:
        The qids of the files passed, and the fid if all names led somewhere (it is not
        referenced). Fewer qids than names: the walk ended there, and nothing changed.

    Raises:
        OSError: the first name's error, ENOENT mostly; EINVAL, more than 16 names,
            ``newfid`` is taken, or ``fid`` is open and walks to itself; ENOTDIR, names
            from a file.

    Locks: the rename lock, read, if there are names.

    Source: walk(5) of Plan 9; QEMU hw/9pfs/9p.c, v9fs_walk.
    """
    if session.announces:
        await Begin("walk", fid)
    if len(names) > MAXWELEM:
        raise error(errno.EINVAL)
    if not names:
        start = session.fids.get(fid)
        try:
            clone = _arrive(session, start, newfid, start.node)
            session.fids.called(clone, session.fids.name_of(start))
            return [], clone
        finally:
            session.fids.put(start)
    qids, found, _ = await _walk_names(session, fid, newfid, names, caller)
    return qids, found


async def walkgetattr(
    session: Session, fid: int, newfid: int | Numbering, name: bytes
) -> tuple[Fid, Attributes]:
    """A walk of one name, and the attributes that it saw: one call less than asking again.

    Args:
        session: the conversation.
        fid: where to start.
        newfid: as for `walk`.
        name: a path component.

    Returns:
        The fid, not referenced, and its file's attributes.

    Raises:
        OSError: as `walk`.

    Locks: the rename lock, read.

    Source: Twalkgetattr, gVisor's addition to 9P2000.L.
    """
    if session.announces:
        await Begin("walkgetattr", fid)
    _, found, attributes = await _walk_names(session, fid, newfid, (name,))
    assert found is not None  # a walk of one name succeeds or raises
    assert attributes is not None
    return found, attributes


async def _walk_names(
    session: Session,
    fid: int,
    newfid: int | Numbering,
    names: list[bytes] | tuple[bytes, ...],
    caller: Caller | None = None,
) -> tuple[list[Qid], Fid | None, Attributes | None]:
    """A walk of one name or more, and the attributes of what they lead to."""
    for name in names:
        check_component(name, illegal=errno.ENOENT)
    async with session.using(fid) as use:
        check_directory(use.node)
        if newfid == fid and use.fid.opened is not None:
            raise error(errno.EINVAL)
        return await _steps(session, use, newfid, names, caller)


async def _steps(
    session: Session,
    use: Use,
    newfid: int | Numbering,
    names: list[bytes] | tuple[bytes, ...],
    caller: Caller | None,
) -> tuple[list[Qid], Fid | None, Attributes | None]:
    fids = session.fids
    qids: list[Qid] = []
    node = use.node
    fid: Fid | None = None
    attributes: Attributes | None = None
    fids.pin(node)
    try:
        for count, name in enumerate(names, 1):
            # What it arrives at: a walk that does not get to the last name makes no fid.
            start = use.fid if count == len(names) else None
            found = await _look(session, node, name, start, newfid, caller, is_first=not qids)
            if found is None:
                return qids, None, None
            fids.unpin(node)
            node, fid, attributes = found
            qids.append(qid_of(node.number, attributes))
        return qids, fid, attributes
    finally:
        fids.unpin(node)


async def look(session: Session, node: Node, name: bytes) -> tuple[Node, Attributes]:
    """The node behind a name of a directory, pinned (`Counts.unpin` it), and its attributes.

    Raises:
        OSError: as the first step of a walk.

    Locks: the rename lock, read.
    """
    found = await _look(session, node, name, None, 0, None, is_first=True)
    assert found is not None
    below, _, attributes = found
    return below, attributes


async def _look(
    session: Session,
    node: Node,
    name: bytes,
    start: Fid | None,
    newfid: int | Numbering,
    caller: Caller | None,
    *,
    is_first: bool,
) -> tuple[Node, Fid | None, Attributes] | None:
    """One step of a walk: the node below, pinned, its fid if ``start`` is given, its attributes.

    None where there is no way on from any but the first.
    """
    fids, lock = session.fids, session.rename_lock

    async def ask() -> tuple[Node, Attributes]:
        return await blocking_unless(node.number, _step_now, _step, session, node, name, caller)

    for tries in range(MOST_TRIES, 0, -1):
        # Names are being moved all the time? While it is taken, this one is not.
        async with session.names.taking(node.number, name) if tries == 1 else _NOT_ALONE:
            moves = lock.moves
            try:
                below, attributes = await session.unless_moved(ask)
            except OSError:
                if is_first:
                    raise
                return None
            try:
                async with lock.reading:
                    # Else something was moved since it was seen: perhaps this.
                    if moves == lock.moves or tries == 1:
                        place = None if name in (b".", b"..") else (node, name)
                        if start is not None and not isinstance(newfid, int):
                            return below, newfid(below, place), attributes
                        if place is not None:
                            fids.seen(attributes, node, name)
                        if start is None:
                            return below, None, attributes
                        fid = _arrive(session, start, newfid, below)
                        has_several = attributes.nlink > 1 and below.kind != stat.S_IFDIR
                        named = Named(place, moves) if place and has_several else None
                        fids.called(fid, named)
                        return below, fid, attributes
            except BaseException:
                fids.unpin(below)
                raise
            fids.unpin(below)
    raise AssertionError("the last look is believed")


def _step_now(
    session: Session, node: Node, name: bytes, caller: Caller | None
) -> tuple[Node, Attributes]:
    """`_step`, if the source's file system has the name in memory and nobody has to be asked.

    Raises:
        OSError: EAGAIN, it has not, or more has to be done; ENOENT and the like, it has.
    """
    fids = session.fids
    check_directory(node)
    if caller is not None:
        _check_search(node, caller)
    if name in (b".", b".."):
        there = node.place[0] if name == b".." and node.place is not None else node
        try:
            if not fids.pin(there):
                raise error(errno.EAGAIN)
            return there, stat_descriptor(there.fd)
        except BaseException:
            fids.unpin(there)
            raise
    if not session.descriptors.have_room:
        raise error(errno.EAGAIN)
    fd = open_cached(node.fd, name)
    known = None
    try:
        attributes = stat_descriptor(fd)
        known = fids.known(attributes, allowing=True)
        is_here = known is not None and known.mount is fids.devices.mount_of(attributes)
        if known is not None and fids.pin(known) and is_here:
            # That one's descriptor keeps the file, so closing this one frees nothing.
            os.close(fd)
            fids.drop(known)
            return known, attributes
        if not fids.devices.has_births(attributes):
            raise error(errno.EAGAIN)
        mark = fids.devices.mark(attributes, fd)
    except BaseException:
        if known is not None:
            fids.unpin(known)
            fids.drop(known)
        session.defer(os.close, fd)  # the last of a removed file takes its time
        raise
    if known is not None:
        fids.unpin(known)
        fids.drop(known)
    return found(session, (node, name), fd, attributes, mark), attributes


def _step(
    session: Session, node: Node, name: bytes, caller: Caller | None
) -> tuple[Node, Attributes]:
    """One step of a walk, blocking: the node below, pinned, and its attributes."""
    fids = session.fids
    check_directory(node)
    if caller is not None:
        _check_search(node, caller)
    if name in (b".", b".."):
        # Never asked of the source: its parent of the root lies outside.
        place = node.place if name == b".." else None
        there = node if place is None else place[0]
        try:
            if not fids.pin(there):
                session.descriptors.reopen(there)
            return there, stat_descriptor(there.fd)
        except BaseException:
            fids.unpin(there)
            raise
    # A file that the kernel knows needs no new descriptor, only its name checked. (Where something
    # is mounted, what it forbids may have changed, and is asked of the mount that is there now.)
    attributes = session.stat_name(node.fd, name)
    known = None if attributes.is_mount_root else fids.known(attributes, allowing=True)
    if known is not None:
        # One by another mount will not do: it keeps that busy, and forbids what that does.
        has = fids.pin(known) and known.mount is fids.devices.mount_of(attributes)
        fids.drop(known)
        if has:
            return known, attributes
        fids.unpin(known)
    session.descriptors.make_room(node)
    fd = open_step(node.fd, name)
    try:
        attributes = stat_descriptor(fd)
        other = (attributes.dev_major, attributes.dev_minor) != node.device
        if other or attributes.is_mount_root:
            fids.devices.learn(fd, attributes)
        mark = fids.devices.mark(attributes, fd)
    except OSError:
        os.close(fd)
        raise
    return found(session, (node, name), fd, attributes, mark), attributes


def _check_search(directory: Node, caller: Caller) -> None:
    """Refuse whom a directory does not let search it, with EACCES."""
    with acting_as(caller, (ENTER, directory.fd, b"")):
        stat_name(directory.fd, b".")


def found(
    session: Session,
    place: tuple[Node, bytes] | None,
    fd: int,
    attributes: Attributes,
    mark: Mark,
) -> Node:
    """A node for what was found, pinned; the descriptor is its own from now on.

    Args:
        session: the conversation.
        place: the parent and name that it was found at; None: it was found by neither.
        fd, attributes, mark: an O_PATH descriptor, and what is known by that.
    """
    fids = session.fids
    node = fids.new_node(attributes, fd, place, mark)
    fids.pin(node)
    fids.drop(node)
    session.descriptors.note()
    return node


def _arrive(session: Session, start: Fid, newfid: int | Numbering, node: Node) -> Fid:
    """Give the node its fid."""
    if not isinstance(newfid, int):
        return newfid(node, None)
    if newfid == start.number:
        session.fids.move(start, node)
        return start
    return session.fids.add(newfid, node)


async def clunk(session: Session, fid: int, *, commits: bool = True) -> None:
    """End a fid; it is gone even if this fails.

    An extended attribute that was being written (xattrcreate) is set or removed now. Locks that end
    with the fid are given back.

    Args:
        session: the conversation.
        fid: it.
        commits: whether the client has asked for it. Where it has gone without, no attribute is
            set or removed.

    Raises:
        OSError: unknown fid; for an attribute, EINVAL if less was written than was
            declared, and the errors of setxattr(2) and removexattr(2).

    Source: clunk(5) of Plan 9; QEMU hw/9pfs/9p.c, v9fs_xattr_fid_clunk.
    """
    if session.announces:
        await Begin("clunk", fid)
    gone = session.fids.remove(fid)
    try:
        if isinstance(gone.opened, AttributeWrite) and commits:
            await _commit(session, gone, gone.opened)
        elif isinstance(gone.opened, OpenFile) and gone.opened.holders:
            await end_locks(session, gone.node, gone.opened)
    finally:
        session.fids.put(gone)


async def _commit(session: Session, fid: Fid, new: AttributeWrite) -> None:
    if len(new.data) != new.size:
        raise error(errno.EINVAL)
    async with session.using_node(fid.node) as node:
        try:
            await blocking(node.number, _removexattr if new.remove else _setxattr, node.fd, new)
        finally:
            # At the end: who asked meanwhile may have been told of before.
            if node.rare is not None:
                node.rare.bare_until = node.rare.bare_asked = 0.0


def _setxattr(fd: int, new: AttributeWrite) -> None:
    # Setting a list changes the mode, too.
    bits = new.caller is not None and new.name == b"system.posix_acl_access"
    with acting_as(new.caller, (LABEL, fd, b""), bits=bits):
        os.setxattr(proc_path(fd), new.name, new.data, new.flags)


def _removexattr(fd: int, new: AttributeWrite) -> None:
    with acting_as(new.caller, (LABEL, fd, b"")):
        os.removexattr(proc_path(fd), new.name)


async def remove(session: Session, fid: int, caller: Caller | None = None) -> None:
    """Remove the file of a fid, and end the fid even if that fails.

    Locks that end with the fid are given back afterwards.

    Args:
        session: the conversation.
        fid: it.
        caller: who asks; None: the daemon.

    Raises:
        OSError: EROFS; EBUSY for the root; ESTALE, the file is not where it was last
            seen; the errors of unlink(2) and rmdir(2).

    Source: remove(5) of Plan 9.
    """
    if session.announces:
        await Begin("remove", fid)
    use = session.fids.get(fid)
    named = session.fids.name_of(use)
    session.fids.put(use)
    gone = session.fids.remove(fid)

    async def take(parent: Node, name: bytes) -> None:
        # Nobody else takes the name away between the look at whose it is and its end. (Another
        # node of the file may be the one that the kernel knows it by.)
        async with session.names.taking(parent.number, name), session.keeping(parent, name):
            how = session, parent.fd, name, gone.node, caller
            await blocking(parent.number, remove_if_same, *how)
        await session.settle(parent)

    try:
        try:
            session.writable()
            async with session.using_node(gone.node):
                await at_its_name(session, gone.node, named, take)
        finally:
            # Only now: whoever gets a lock next is to see that the name has gone.
            if isinstance(gone.opened, OpenFile) and gone.opened.holders:
                await end_locks(session, gone.node, gone.opened)
    finally:
        session.fids.put(gone)
