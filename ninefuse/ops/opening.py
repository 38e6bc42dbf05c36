"""Opening files and directories, and creating files: lopen, lcreate.

Locks touched: the rename lock, read, by lcreate of a name that is taken.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from functools import partial

from ninefuse.calls import Begin, blocking, brief
from ninefuse.errors import error
from ninefuse.linux.callers import ENTER, OWN, Caller, keeps_mark, needs_acting
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.making import make_as
from ninefuse.linux.syscalls import Attributes, check_execution, proc_path, stat_descriptor
from ninefuse.ops.walk import look
from ninefuse.tree.identity import Mark
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import OpenDirectory, OpenFile
from ninefuse.tree.order import END
from ninefuse.tree.qids import Qid
from ninefuse.tree.session import (
    MOST_TRIES,
    PERMISSIONS,
    Session,
    Use,
    check_directory,
    check_new_name,
    patiently,
)

# What a server keeps of a client's flags. Creating has been decided already; O_NOFOLLOW
# would refuse the way through /proc; O_DIRECT asks for an alignment that buffers here
# do not have.
_KEPT_FLAGS = (
    os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_NOATIME | os.O_SYNC | os.O_DSYNC
)
_EXECUTES = 0x20  # beside them: it is opened to be executed. open(2) has no such flag.


async def lopen(
    session: Session,
    fid: int,
    flags: int,
    caller: Caller | None = None,
    *,
    executes: bool = False,
) -> Qid:
    """Open a fid's file or directory; the fid is an open one from then on.

    Args:
        session: the conversation.
        fid: unopened.
        flags: Linux open(2) flags; those that make no sense here are dropped.
        caller: who opens it, as whom the fid is to write, and whose share of the descriptors it
            takes; None: the daemon.
        executes: whether it is opened to be executed. The caller then needs the right to execute
            it, and need not have that to read it.

    Raises:
        OSError: EINVAL, the fid is open already, or walks elsewhere meanwhile; EROFS; EISDIR, a
            directory for writing; ENXIO, neither file nor directory (a device of the server is not
            the client's); the errors of open(2).

    Source: Tlopen of 9P2000.L; CVE-2023-2861.
    """
    if session.announces:
        await Begin("lopen", fid)
    async with session.using(fid) as use:
        return await _open(session, use, use.node, flags, caller, executes)


async def _open(
    session: Session,
    use: Use,
    node: Node,
    flags: int,
    caller: Caller | None,
    executes: bool = False,
) -> Qid:
    """Open a node, which is pinned; the fid is an open one on it from then on."""
    if use.fid.opened is not None:
        raise error(errno.EINVAL)
    if flags & (os.O_ACCMODE | os.O_TRUNC):
        session.writable()
    on, kind = node.number, node.kind
    if kind == stat.S_IFDIR and flags & (os.O_ACCMODE | os.O_TRUNC):
        raise error(errno.EISDIR)
    if kind == stat.S_IFREG and flags & os.O_DIRECTORY:
        raise error(errno.ENOTDIR)
    if kind not in (stat.S_IFDIR, stat.S_IFREG):
        raise error(errno.ENXIO)
    owner = None if caller is None else caller.uid
    await session.claim_descriptor(node, owner)
    session.look_at_mount()
    opened: OpenFile | OpenDirectory
    try:
        if kind == stat.S_IFDIR:
            quiet = session.noatime or session.nodiratime
            fd = await brief(on, _open_directory, node.fd, caller, quiet)
            opened = OpenDirectory(fd, owner)
        else:
            kept = flags & _KEPT_FLAGS | (_EXECUTES if executes else 0)
            fd = await _opened(session, on, node.fd, kept, caller)
            opened = OpenFile(fd, kept, _writer(kept, caller), owner)
    except BaseException:
        session.fids.unclaim(owner)
        raise
    try:
        attributes = await brief(on, stat_descriptor, node.fd)
        if isinstance(opened, OpenFile):
            opened.live = _is_live(node, attributes, flags)
            if opened.writable:
                opened.opener = caller
                if has_mark(attributes.mode):
                    await blocking(on, keep_mark, opened)
        session.fids.open(use.fid, opened, node, use.node)
    except BaseException:
        await blocking(on, session.fids.close_open, opened.fd, owner)
        raise
    return session.fids.qid_of(attributes)


async def lcreate(
    session: Session, fid: int, name: bytes, flags: int, mode: int, caller: Caller | None = None
) -> Qid:
    """Create a file in a fid's directory; the fid becomes the open file.

    If this fails the fid is still the unopened directory.

    Args:
        session: the conversation.
        fid: an unopened directory.
        name: the new file's.
        flags: Linux open(2) flags.
        mode: permission bits; the caller's umask is yet to be applied.
        caller: whose file it is to be; None: the daemon's.

    Raises:
        OSError: EINVAL, the fid is open, or walks elsewhere meanwhile; ENOTDIR; EEXIST, with
            O_EXCL or for ``.`` and ``..``; EROFS; the errors of open(2), and of lopen where the
            file exists: then without O_EXCL it is opened, as lopen does it.

    Locks: the rename lock, read, if the file exists.

    Source: Tlcreate of 9P2000.L; QEMU hw/9pfs/9p.c, v9fs_lcreate.
    """
    if session.announces:
        await Begin("lcreate", fid)
    check_new_name(name)
    session.writable()
    async with session.using(fid) as use:
        if use.fid.opened is not None:
            raise error(errno.EINVAL)
        check_directory(use.node)
        for tries in range(MOST_TRIES, 0, -1):
            try:
                return await _create(session, use, name, flags, mode, caller)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
            try:
                return await _open_existing(session, use, name, flags, caller)
            except FileNotFoundError:
                if tries == 1:
                    raise
    raise AssertionError


async def create_nameless(
    session: Session, fid: int, flags: int, mode: int, caller: Caller | None = None
) -> Qid:
    """Create a file without a name in a fid's directory; the fid becomes the open file.

    No message of 9P, and so none here: it is for fuse/. If it fails the fid is still the
    unopened directory.

    Args:
        session: the conversation.
        fid: an unopened directory.
        flags: Linux open(2) flags; with O_EXCL the file can never be given a name.
        mode: permission bits; the caller's umask is yet to be applied.
        caller: whose file it is to be; None: the daemon's.

    Raises:
        OSError: EINVAL, the fid is open, or flags do not ask to write; ENOTDIR; EROFS; the errors
            of open(2) with O_TMPFILE, EOPNOTSUPP among them.

    Source: open(2), O_TMPFILE; Linux fs/namei.c, vfs_tmpfile.
    """
    session.writable()
    async with session.using(fid) as use:
        if use.fid.opened is not None:
            raise error(errno.EINVAL)
        check_directory(use.node)
        return await _create(session, use, None, flags, mode, caller)


async def _create(
    session: Session, use: Use, name: bytes | None, flags: int, mode: int, caller: Caller | None
) -> Qid:
    """Create a file that does not exist; None: one without a name."""
    on = use.node.number
    kept = flags & _KEPT_FLAGS
    mode &= PERMISSIONS
    owner = None if caller is None else caller.uid
    await session.claim_descriptor(use.node, owner)
    try:
        if name is None:
            how = kept | flags & os.O_EXCL
            fd = await blocking(on, _create_nameless_file, use.fd, how, mode, caller)
        else:
            fd = await blocking(on, _create_file, use.fd, name, kept, mode, caller)
    except BaseException:
        session.fids.unclaim(owner)
        raise
    try:
        if name is not None:
            await session.settle(use.node)
        path_fd, attributes, mark = await blocking(on, _path_descriptor, session, fd)
        place = None if name is None else (use.node, name)
        node = session.fids.new_node(attributes, path_fd, place, mark)
        try:
            live = _is_live(node, attributes, os.O_RDWR)
            opened = OpenFile(fd, kept, _writer(kept, caller), owner, live)
            opened.opener = caller
            if opened.writable and has_mark(attributes.mode):
                await blocking(on, keep_mark, opened)
            session.fids.open(use.fid, opened, node, use.node)
        finally:
            session.fids.drop(node)
    except BaseException:
        # The file stays: it may be somebody's by now.
        await blocking(on, session.fids.close_open, fd, owner)
        raise
    session.descriptors.note()
    return session.fids.qid_of(attributes)


async def _open_existing(
    session: Session, use: Use, name: bytes, flags: int, caller: Caller | None
) -> Qid:
    node, _ = await look(session, use.node, name)
    try:
        if node.kind == stat.S_IFDIR:
            raise error(errno.EISDIR)
        return await _open(session, use, node, flags, caller)
    finally:
        session.fids.unpin(node)


def _open_directory(fd: int, caller: Caller | None, quiet: bool) -> int:
    # Not "." in it, for which one would need the right to search it as well.
    with acting_as(caller, (ENTER, fd, b"")):
        opened = os.open(proc_path(fd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if quiet:
        _leave_access_time(opened)
    return opened


async def _opened(session: Session, on: int, fd: int, flags: int, caller: Caller | None) -> int:
    how = fd, flags, caller, session.noatime

    async def ask() -> int:
        if not flags & os.O_TRUNC:
            return await brief(on, _open_file, *how)  # which is asked not to wait
        # In its turn for as long as it is tried, but not while somebody has a lease on the file.
        async with session.ranges.changing(on, 0, END):
            return await blocking(on, _open_file, *how)

    # Who opens it without waiting is told of a lease, as on the source.
    return await (ask() if flags & os.O_NONBLOCK else patiently(ask))


def _open_file(fd: int, flags: int, caller: Caller | None, quiet: bool) -> int:
    """Open a file; EAGAIN if somebody's lease on it keeps openers waiting (fcntl(2))."""
    opened = _open_at_once(fd, flags, caller)
    if not flags & os.O_NONBLOCK:
        os.set_blocking(opened, True)
    if quiet:
        _leave_access_time(opened)
    return opened


def _leave_access_time(fd: int) -> None:
    """Have reads by a descriptor leave the access time alone, if the file is the daemon's.

    Or if the daemon is root. It is not asked of open(2), which is made with the caller's rights:
    the caller may own nothing of it.
    """
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NOATIME)


def _open_at_once(fd: int, flags: int, caller: Caller | None) -> int:
    path = proc_path(fd)
    opening = flags & _KEPT_FLAGS | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    truncates = caller is not None and bool(flags & os.O_TRUNC)
    with acting_as(caller, (ENTER | OWN, fd, b""), bits=truncates):
        if not flags & _EXECUTES:
            try:
                return os.open(path, opening)
            except PermissionError:
                # O_NOATIME is for owners only; a daemon that is not the owner, and acts for
                # nobody else, reads without.
                if not flags & os.O_NOATIME or (caller is not None and os.geteuid() == 0):
                    raise
                return os.open(path, opening & ~os.O_NOATIME)
        check_execution(fd)
    return os.open(path, opening)  # the kernel reads what it executes; its caller need not


def _create_file(directory: int, name: bytes, flags: int, mode: int, caller: Caller | None) -> int:
    flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return _make_file(directory, name, flags, mode, caller)


def _create_nameless_file(directory: int, flags: int, mode: int, caller: Caller | None) -> int:
    return _make_file(directory, b".", flags | os.O_TMPFILE, mode, caller)


def _make_file(directory: int, name: bytes, flags: int, mode: int, caller: Caller | None) -> int:
    flags = flags & ~os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY
    make = partial(os.open, name, flags, mode, dir_fd=directory)
    return make_as(caller, directory, mode, make)


def _path_descriptor(session: Session, fd: int) -> tuple[int, Attributes, Mark]:
    """An O_PATH descriptor of the very file that is open, whatever its name says by now."""
    if session.noatime:
        _leave_access_time(fd)
    path_fd = os.open(proc_path(fd), os.O_PATH | os.O_CLOEXEC)
    try:
        attributes = stat_descriptor(path_fd)
        return path_fd, attributes, session.fids.devices.mark(attributes, path_fd)
    except OSError:
        os.close(path_fd)
        raise


def _is_live(node: Node, a: Attributes, flags: int) -> bool:
    """Whether a file is to be read past all caches, since its size tells nothing of its content.

    So it is in /proc and its like. A server (FUSE, 9P) may have such files, too: there one
    that is opened for reading, and says that it is empty, is asked. (Not one that is opened for
    writing: it may be mapped, and that needs the cache.)
    """
    found = node.device.file_system
    if found is None:
        return False
    is_read = flags & os.O_ACCMODE == os.O_RDONLY
    return found.is_live or (is_read and not a.size and not found.is_local)


def _writer(flags: int, caller: Caller | None) -> Caller | None:
    """As whom to write: the blocks that a file system reserves for root are for root only."""
    if flags & os.O_ACCMODE == os.O_RDONLY or caller is None or not needs_acting(caller):
        return None
    return caller


def has_mark(mode: int) -> bool:
    """Whether a set-group-id bit gives nobody anything (once: that locks are mandatory)."""
    return mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID


async def mark_again(session: Session, on: int, file: OpenFile) -> bool:
    """`keep_mark` before a change of a file's data: a set-id bit may have come after the open.

    Args:
        session: the conversation.
        on: the file's qid path.
        file: it, open for writing.

    Returns:
        Whether the file was shown with set-id bits, and had to be looked at.
    """
    if on not in session.fids.set_id or file.group is not None:
        return False
    await blocking(on, keep_mark, file)
    return True


def keep_mark(file: OpenFile) -> None:
    """Have a file's set-group-id bit stay when it is written to, for whom the source leaves it."""
    if file.opener is not None and os.geteuid() == 0:
        a = os.fstat(file.fd)
        if has_mark(a.st_mode) and keeps_mark(file.opener, a.st_gid):
            file.writer, file.group = file.opener, a.st_gid
