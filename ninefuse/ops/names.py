"""Making, moving and removing names: mkdir, mknod, symlink, link, rename, unlinkat.

Locks touched: the rename lock, written by rename and renameat, before a name is moved and
after. Never around a call.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable
from functools import partial

from ninefuse.calls import Begin, blocking
from ninefuse.errors import error
from ninefuse.linux.callers import ENTER, OWN, PASS, TAKE, Caller
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.making import make_as
from ninefuse.linux.syscalls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    Attributes,
    proc_path,
    stat_name,
)
from ninefuse.linux.syscalls import rename as rename_names
from ninefuse.tree.nodes import Named, Node
from ninefuse.tree.qids import Qid
from ninefuse.tree.session import (
    PERMISSIONS,
    Session,
    check_component,
    check_directory,
    check_new_name,
)
from ninefuse.tree.table import Fid

_UNKNOWN = -1  # how often names had been moved

AT_REMOVEDIR = 0x200  # unlinkat's only flag

# What renameat2(2) takes.
_RENAME_FLAGS = frozenset(
    (0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT, RENAME_WHITEOUT | RENAME_NOREPLACE)
)


async def mkdir(
    session: Session, dirfid: int, name: bytes, mode: int, caller: Caller | None = None
) -> Qid:
    """Make a directory.

    Args:
        session: the conversation.
        dirfid: where.
        name: the new directory's.
        mode: permission bits; the caller's umask is yet to be applied.
        caller: whose it is to be; None: the daemon's.

    Raises:
        OSError: EEXIST; ENOTDIR; EROFS; the errors of mkdir(2).

    Source: Tmkdir of 9P2000.L.
    """
    if session.announces:
        await Begin("mkdir", dirfid)
    return await _make(session, dirfid, name, _mkdir, mode & PERMISSIONS, caller)


async def mknod(
    session: Session,
    dirfid: int,
    name: bytes,
    mode: int,
    rdev: int = 0,
    caller: Caller | None = None,
) -> Qid:
    """Make a file, FIFO, socket or device node.

    Args:
        session: the conversation.
        dirfid: where.
        name: the new node's.
        mode: type and permission bits; the caller's umask is yet to be applied.
        rdev: the device a device node stands for.
        caller: whose it is to be; None: the daemon's.

    Raises:
        OSError: EEXIST; ENOTDIR; EROFS; the errors of mknod(2).

    Source: Tmknod of 9P2000.L.
    """
    if session.announces:
        await Begin("mknod", dirfid)
    return await _make(session, dirfid, name, _mknod, mode & 0xFFFF, rdev, caller)


async def symlink(
    session: Session, dirfid: int, name: bytes, target: bytes, caller: Caller | None = None
) -> Qid:
    """Make a symlink to ``target``, which is not looked at.

    Raises:
        OSError: EEXIST; EINVAL, a zero byte in the target; ENOTDIR; EROFS; the errors of
            symlink(2).

    Source: Tsymlink of 9P2000.L.
    """
    if session.announces:
        await Begin("symlink", dirfid)
    if b"\0" in target:
        raise error(errno.EINVAL)
    return await _make(session, dirfid, name, _symlink, target, caller)


async def link(
    session: Session,
    dirfid: int,
    fid: int,
    name: bytes,
    caller: Caller | None = None,
) -> None:
    """Give a file another name. Its node goes on remembering the one that it was seen at.

    Args:
        session: the conversation.
        dirfid: where.
        fid: the file.
        name: its new name.
        caller: who asks; None: the daemon.

    Raises:
        OSError: EEXIST; ENOENT, the file has no name left; EPERM, a directory; EXDEV;
            EROFS; the errors of link(2).

    Source: Tlink of 9P2000.L.
    """
    if session.announces:
        await Begin("link", dirfid)
    check_new_name(name)
    session.writable()
    async with session.using(dirfid) as directory, session.using(fid) as file:
        check_directory(directory.node)
        if file.node.kind == stat.S_IFDIR:
            raise error(errno.EPERM)
        await blocking(directory.node.number, _link, file.fd, directory.fd, name, caller)
        await session.settle(directory.node)


async def rename(
    session: Session, fid: int, dirfid: int | None, name: bytes, caller: Caller | None = None
) -> None:
    """Move a fid's file to another place; the fid goes on naming the file.

    Args:
        session: the conversation.
        fid: the file.
        dirfid: where it goes; None: it stays in its directory.
        name: its new name; a file that has it is replaced.
        caller: who asks; None: the daemon.

    Raises:
        OSError: EINVAL, a name that is none; EBUSY, the root; ESTALE, the file is not
            where it was last seen; EROFS; the errors of rename(2).

    Locks: the rename lock, written.

    Source: Trename of 9P2000.L.
    """
    if session.announces:
        await Begin("rename", fid)
    _check_moved_name(name)
    session.writable()
    async with session.using(fid) as file:
        if dirfid is None:
            await _move_node(session, file.fid, file.node, None, name, caller)
            return
        async with session.using(dirfid) as directory:
            await _move_node(session, file.fid, file.node, directory.node, name, caller)


async def renameat(
    session: Session,
    olddirfid: int,
    oldname: bytes,
    newdirfid: int,
    newname: bytes,
    flags: int = 0,
    caller: Caller | None = None,
) -> None:
    """Move a name to another place.

    Args:
        session: the conversation.
        olddirfid: where it is.
        oldname: the name.
        newdirfid: where it goes.
        newname: its new name.
        flags: 0, RENAME_NOREPLACE, RENAME_EXCHANGE, or RENAME_WHITEOUT with or without
            RENAME_NOREPLACE (an extension to 9P). overlayfs leaves a whiteout in the old place,
            a character device 0:0, where the name is to hide one of a layer below.
        caller: who asks; None: the daemon.

    Raises:
        OSError: EINVAL, other flags, or a name that is none; EROFS; the errors of
            renameat2(2).

    Locks: the rename lock, written.

    Source: Trenameat of 9P2000.L.
    """
    if session.announces:
        await Begin("renameat", olddirfid)
    if flags not in _RENAME_FLAGS:
        raise error(errno.EINVAL)
    _check_moved_name(oldname)
    _check_moved_name(newname)
    session.writable()
    async with session.using(olddirfid) as old, session.using(newdirfid) as new:
        await _move_name(session, old.node, oldname, new.node, newname, flags, caller)


async def unlinkat(
    session: Session, dirfid: int, name: bytes, flags: int = 0, caller: Caller | None = None
) -> None:
    """Remove a name. An open directory fid will do: clients list and remove with one.

    Args:
        session: the conversation.
        dirfid: where.
        name: which.
        flags: 0, or AT_REMOVEDIR for a directory.
        caller: who asks; None: the daemon.

    Raises:
        OSError: EINVAL, other flags or ``.``; ENOTEMPTY, ``..``; EROFS; the errors of
            unlink(2) and rmdir(2).

    Source: Tunlinkat of 9P2000.L.
    """
    if session.announces:
        await Begin("unlinkat", dirfid)
    if flags & ~AT_REMOVEDIR:
        raise error(errno.EINVAL)
    check_component(name)
    if name == b".":
        raise error(errno.EINVAL)
    if name == b"..":
        raise error(errno.ENOTEMPTY)
    session.writable()
    async with session.using(dirfid) as use:
        directory = use.node
        check_directory(directory)
        async with (
            session.names.taking(directory.number, name),
            session.keeping(directory, name),
        ):
            await blocking(directory.number, _remove, directory.fd, name, bool(flags), caller)
        await session.settle(directory)


def _check_moved_name(name: bytes) -> None:
    check_component(name)
    if name in (b".", b".."):
        raise error(errno.EINVAL)


async def _make(
    session: Session, dirfid: int, name: bytes, make: Callable[..., Attributes], *args: object
) -> Qid:
    check_new_name(name)
    session.writable()
    async with session.using(dirfid) as use:
        check_directory(use.node)
        attributes = await blocking(use.node.number, make, use.fd, name, *args)
        await session.settle(use.node)
    return session.fids.qid_of(attributes)


async def at_its_name(
    session: Session,
    node: Node,
    named: Named | None,
    act: Callable[[Node, bytes], Awaitable[None]],
) -> None:
    """Await what is done at the name of a file.

    Args:
        session: the conversation.
        node: the file.
        named: the name that a fid has come by, if the file has several. None: it is done where the
            file was last seen, and so it is if that name may have been moved.
        act: ``act(parent, name)``; ESTALE or ENOENT where it is not that file's.

    Raises:
        OSError: EBUSY, it is the root; what ``act`` raises.
    """

    async def act_at(above: Node, name: bytes) -> None:
        async with session.using_node(above) as parent:
            await act(parent, name)

    async def attempt() -> None:
        seen = node.place
        if named is not None:
            if seen is None or named.moves == session.rename_lock.moves:
                return await act_at(*named.place)
            try:
                return await act_at(*named.place)
            except OSError as e:
                if e.errno not in (errno.ESTALE, errno.ENOENT):
                    raise
        if seen is None:
            raise error(errno.EBUSY)
        return await act_at(*seen)

    await session.unless_moved(attempt)


async def _move_node(
    session: Session,
    fid: Fid,
    node: Node,
    directory: Node | None,
    name: bytes,
    caller: Caller | None,
) -> None:
    named = session.fids.name_of(fid)

    async def move(parent: Node, oldname: bytes) -> None:
        new = parent if directory is None else directory
        await _move_name(session, parent, oldname, new, name, 0, caller, node)
        if named is not None:
            session.fids.called(fid, Named((new, name), _UNKNOWN))

    await at_its_name(session, node, named, move)


async def _move_name(
    session: Session,
    old: Node,
    oldname: bytes,
    new: Node,
    newname: bytes,
    flags: int,
    caller: Caller | None = None,
    node: Node | None = None,
) -> None:
    """Move a name, and tell the nodes of what was moved: those that the kernel knows, and one.

    If that one is given, the name is moved only if it is its file's, else it is ESTALE.
    """
    check_directory(old)
    check_directory(new)
    lock = session.rename_lock
    # Both keep their descriptors, so that nobody needs their places while these are in doubt.
    async with (
        session.names.taking_both((old.number, oldname), (new.number, newname)),
        session.keeping(old, oldname) as moved,
        session.keeping(new, newname) as replaced,
    ):
        if node is not None and not node.shows(
            await blocking(old.number, session.stat_name, old.fd, oldname)
        ):
            raise error(errno.ESTALE)
        async with lock.writing:
            lock.moves += 1
        await blocking(old.number, _rename, old.fd, oldname, new.fd, newname, flags, caller)
        async with lock.writing:
            lock.moves += 1
            for one in (moved, node):
                if one is not None and one.place is not None:
                    one.place = new, newname
            if flags & RENAME_EXCHANGE and replaced is not None and replaced.place is not None:
                replaced.place = old, oldname
    await session.settle(old)
    if new is not old:
        await session.settle(new)


def _mkdir(directory: int, name: bytes, mode: int, caller: Caller | None) -> Attributes:
    make_as(caller, directory, mode, partial(os.mkdir, name, mode, dir_fd=directory))
    return stat_name(directory, name)


def _mknod(directory: int, name: bytes, mode: int, rdev: int, caller: Caller | None) -> Attributes:
    make_as(caller, directory, mode, partial(os.mknod, name, mode, rdev, dir_fd=directory))
    return stat_name(directory, name)


def _symlink(directory: int, name: bytes, target: bytes, caller: Caller | None) -> Attributes:
    make_as(caller, directory, 0, partial(os.symlink, target, name, dir_fd=directory))
    return stat_name(directory, name)


def _link(file: int, directory: int, name: bytes, caller: Caller | None) -> None:
    # The file's owner may link it, or who may read and write it (protected_hardlinks, proc(5)).
    with acting_as(caller, (ENTER, directory, b""), (ENTER | OWN, file, b"")):
        os.link(proc_path(file), name, dst_dir_fd=directory, follow_symlinks=True)


def _rename(
    old: int, oldname: bytes, new: int, newname: bytes, flags: int, caller: Caller | None
) -> None:
    over = [(ENTER, old, b""), (TAKE, old, oldname), (ENTER, new, b""), (TAKE, new, newname)]
    if old != new:  # a directory that moves has its ".." written
        over.append((PASS, old, oldname))
        if flags == RENAME_EXCHANGE:
            over.append((PASS, new, newname))
    with acting_as(caller, *over):
        rename_names(old, oldname, new, newname, flags)


def remove_if_same(
    session: Session, directory: int, name: bytes, node: Node, caller: Caller | None
) -> None:
    """Remove a name, if it is a node's file's; else ESTALE. Blocks."""
    if not node.shows(session.stat_name(directory, name)):
        raise error(errno.ESTALE)
    _remove(directory, name, node.kind == stat.S_IFDIR, caller)


def _remove(directory: int, name: bytes, is_directory: bool, caller: Caller | None) -> None:
    with acting_as(caller, (ENTER, directory, b""), (TAKE, directory, name)):
        if is_directory:
            os.rmdir(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
