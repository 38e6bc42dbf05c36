"""The native session's table: for each opcode, what it asks, and how that is answered.

A row has the callback's name, what makes its body (callbacks.py) of a request's arguments, what
encodes its result, and what takes back a result that nobody is told of (replies.py). pyfuse3's
session has adapter.py in its place.

Locks touched: none.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from ninefuse import ops
from ninefuse.calls import Body, Call, Fsync, Pread, Pwrite
from ninefuse.errors import error
from ninefuse.fuse import callbacks
from ninefuse.fuse import opcodes as op
from ninefuse.fuse._message import Message
from ninefuse.fuse.answers import Opens, is_statistics, refuse_statistics
from ninefuse.fuse.entries import EntryPlus
from ninefuse.fuse.handles import Files, Handle, Made
from ninefuse.fuse.opcodes import Opcode
from ninefuse.fuse.replies import LAST_BYTE, Found, Replies
from ninefuse.linux.callers import Caller
from ninefuse.linux.records import DirectoryEntry
from ninefuse.linux.syscalls import Attributes, SetTime
from ninefuse.ops.locking import FLOCK_OPERATIONS, LockRange
from ninefuse.settings import Settings
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.session import Session

_BILLION = 1_000_000_000
_LAYOUT_IS_ANOTHER = op.IOCTL_COMPAT | op.IOCTL_UNRESTRICTED | op.IOCTL_32BIT | op.IOCTL_COMPAT_X32

_SAYS_HOW = op.WRITE_CACHE | op.WRITE_KILL_SUIDGID
# By these two flags, and whether the caller's descriptor appends, as fcntl(2) may have changed it.
# Written back it is in nobody's name, and says nothing of set-id bits.
_WRITING = {
    flags | appends: ops.Writing(
        is_writeback=bool(flags & op.WRITE_CACHE), keeps_bits=not flags, appends=bool(appends)
    )
    for flags in (0, op.WRITE_KILL_SUIDGID, op.WRITE_CACHE, _SAYS_HOW)
    for appends in (0, os.O_APPEND)
}


class Rows:
    """What is asked: each makes a callback's body of what a request says. On the dispatcher.

    Args:
        session: the conversation.
        settings: of the mount.
        files: what opens files, makes and closes them.

    Attributes:
        statistics: what says the value of the attribute `STATISTICS`.
        knows_groups: whether requests that make something say the caller's group that counts.
    """

    def __init__(self, session: Session, settings: Settings, files: Files = callbacks) -> None:
        self.session = session
        self.files = files
        self.opens = Opens(settings)
        self.statistics: Callable[[], bytes] = bytes
        self.knows_groups = False
        # Called with the kernel's number of a handle that is about to be closed.
        self.closes: Callable[[int], None] = _nothing
        self._xattr = settings.xattr

    # Names

    def lookup(self, m: Message) -> Body[Found]:
        return callbacks.lookup(self.session, m.nodeid, m.args[0])

    def forget(self, m: Message) -> Body[int]:
        return callbacks.forget(self.session, m.args)

    def mknod(self, m: Message) -> Body[Found]:
        name, mode, rdev, umask = m.args
        device = os.makedev(rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00)
        return callbacks.mknod(self.session, m.nodeid, name, mode, device, self._maker(m, umask))

    def mkdir(self, m: Message) -> Body[Found]:
        name, mode, umask = m.args
        return callbacks.mkdir(self.session, m.nodeid, name, mode, self._maker(m, umask))

    def symlink(self, m: Message) -> Body[Found]:
        name, target = m.args
        return callbacks.symlink(self.session, m.nodeid, name, target, self._maker(m, None))

    def link(self, m: Message) -> Body[Found]:
        name, nodeid = m.args
        return callbacks.link(self.session, nodeid, m.nodeid, name, _caller(m))

    def unlink(self, m: Message) -> Body[None]:
        return callbacks.unlink(self.session, m.nodeid, m.args[0], _caller(m))

    def rmdir(self, m: Message) -> Body[None]:
        return callbacks.rmdir(self.session, m.nodeid, m.args[0], _caller(m))

    def rename(self, m: Message) -> Body[None]:
        old, new, directory, flags = m.args
        return callbacks.rename(self.session, m.nodeid, old, directory, new, flags, _caller(m))

    # Attributes

    def getattr(self, m: Message) -> Body[Attributes]:
        return callbacks.getattr(self.session, m.nodeid)

    def setattr(self, m: Message) -> Body[Attributes]:
        valid, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = m.args
        changes = ops.Changes(
            mode=stat.S_IMODE(mode) if valid & op.FATTR_MODE else None,
            uid=uid if valid & op.FATTR_UID else None,
            gid=gid if valid & op.FATTR_GID else None,
            size=size if valid & op.FATTR_SIZE else None,
            atime=_time(valid, op.FATTR_ATIME, op.FATTR_ATIME_NOW, atime, atime_ns),
            mtime=_time(valid, op.FATTR_MTIME, op.FATTR_MTIME_NOW, mtime, mtime_ns),
            ctime=bool(valid & op.FATTR_CTIME),
        )
        handle = FIRST_HANDLE + fh if valid & op.FATTR_FH else None
        return callbacks.setattr(self.session, m.nodeid, handle, changes, _caller(m), says_all=True)

    def readlink(self, m: Message) -> Body[bytes]:
        return callbacks.readlink(self.session, m.nodeid)

    def statfs(self, m: Message) -> Body[os.statvfs_result]:
        return callbacks.statfs(self.session, m.nodeid)

    # Files

    def open(self, m: Message) -> Body[Handle]:
        return self.files.open(self.session, m.nodeid, self.opens.kept(m.args[0]), _caller(m))

    def create(self, m: Message) -> Body[Made]:
        name, flags, mode, umask, _ = m.args
        kept = self.opens.kept(flags)
        return self.files.create(self.session, m.nodeid, name, kept, mode, self._maker(m, umask))

    def tmpfile(self, m: Message) -> Body[Made]:
        _, flags, mode, umask, _ = m.args
        kept = self.opens.kept(flags)
        return self.files.tmpfile(self.session, m.nodeid, kept, mode, self._maker(m, umask))

    def read(self, m: Message) -> Body[bytes]:
        fh, offset, size = m.args[:3]
        return callbacks.read(self.session, FIRST_HANDLE + fh, offset, size)

    def write(self, m: Message) -> Body[int]:
        fh, offset, data, flags, _, opened = m.args
        how = _WRITING[flags & _SAYS_HOW | opened & os.O_APPEND]
        return callbacks.write(self.session, FIRST_HANDLE + fh, offset, data, how)

    def flush(self, m: Message) -> Body[None]:
        fh, owner = m.args
        return callbacks.flush(self.session, FIRST_HANDLE + fh, owner)

    def fsync(self, m: Message) -> Body[None]:
        fh, flags = m.args
        datasync = bool(flags & op.FSYNC_FDATASYNC)
        return callbacks.fsync(self.session, FIRST_HANDLE + fh, datasync)

    def release(self, m: Message) -> Body[None]:
        self.closes(m.args[0])
        return self.files.release(self.session, FIRST_HANDLE + m.args[0])

    def getlk(self, m: Message) -> Body[LockRange]:
        fh, owner, start, end, kind, pid, _ = m.args
        wanted = _range(kind, start, end, pid)
        return callbacks.getlk(self.session, FIRST_HANDLE + fh, wanted, owner)

    def setlk(self, m: Message) -> Body[None]:
        fh, owner, start, end, kind, pid, _ = m.args
        wanted = _range(kind, start, end, pid)
        waits = m.opcode == Opcode.SETLKW
        return callbacks.setlk(self.session, FIRST_HANDLE + fh, owner, wanted, waits)

    def flock(self, m: Message) -> Body[None]:
        fh, kind = m.args[0], m.args[4]
        if kind not in FLOCK_OPERATIONS:
            raise error(errno.EINVAL)
        waits = m.opcode == Opcode.SETLKW
        return callbacks.flock(self.session, FIRST_HANDLE + fh, FLOCK_OPERATIONS[kind], waits)

    def fallocate(self, m: Message) -> Body[None]:
        fh, offset, length, mode = m.args
        return callbacks.fallocate(self.session, FIRST_HANDLE + fh, mode, offset, length)

    def lseek(self, m: Message) -> Body[int]:
        fh, offset, whence = m.args
        return callbacks.lseek(self.session, FIRST_HANDLE + fh, offset, whence)

    def copy_file_range(self, m: Message) -> Body[int]:
        source, source_offset, _, target, target_offset, length, flags = m.args
        if flags:
            raise error(errno.EINVAL)
        return callbacks.copy_file_range(
            self.session,
            FIRST_HANDLE + source,
            source_offset,
            FIRST_HANDLE + target,
            target_offset,
            length,
        )

    def ioctl(self, m: Message) -> Body[bytes]:
        fh, flags, command, data, room = m.args
        if flags & _LAYOUT_IS_ANOTHER:
            raise error(errno.ENOTTY)
        return callbacks.ioctl(self.session, FIRST_HANDLE + fh, command, data, room, _caller(m))

    def syncfs(self, m: Message) -> Body[None]:
        return callbacks.syncfs(self.session, m.nodeid)

    # Directories

    def opendir(self, m: Message) -> Body[int]:
        return callbacks.opendir(self.session, m.nodeid, _caller(m))

    def readdir(self, m: Message) -> Body[list[DirectoryEntry]]:
        fh, offset, size = m.args[:3]
        return callbacks.readdir(self.session, FIRST_HANDLE + fh, offset, size)

    def readdirplus(self, m: Message) -> Body[list[EntryPlus]]:
        fh, offset = m.args[:2]
        return callbacks.readdirplus(self.session, FIRST_HANDLE + fh, offset)

    def fsyncdir(self, m: Message) -> Body[None]:
        fh, flags = m.args
        datasync = bool(flags & op.FSYNC_FDATASYNC)
        return callbacks.fsyncdir(self.session, FIRST_HANDLE + fh, datasync)

    def releasedir(self, m: Message) -> Body[None]:
        return callbacks.releasedir(self.session, FIRST_HANDLE + m.args[0])

    # Extended attributes

    def getxattr(self, m: Message) -> Body[bytes] | Known:
        self._need_xattr()
        name = m.args[0]
        if is_statistics(m.nodeid, name):
            return Known(self.statistics())
        return callbacks.getxattr(self.session, m.nodeid, name, _caller(m))

    def listxattr(self, m: Message) -> Body[list[bytes]]:
        self._need_xattr()
        return callbacks.listxattr(self.session, m.nodeid, _caller(m))

    def setxattr(self, m: Message) -> Body[None]:
        self._need_xattr()
        name, value, flags, _ = m.args
        refuse_statistics(m.nodeid, name)
        return callbacks.setxattr(self.session, m.nodeid, name, value, _caller(m), flags)

    def removexattr(self, m: Message) -> Body[None]:
        self._need_xattr()
        name = m.args[0]
        refuse_statistics(m.nodeid, name)
        return callbacks.removexattr(self.session, m.nodeid, name, _caller(m))

    # Helpers

    def _maker(self, m: Message, umask: int | None) -> Caller:
        """Who makes a file: its mode comes as it was given, with the umask beside it."""
        return Caller(m.uid, m.gid, umask, m.pid, m.groups if self.knows_groups else None)

    def _need_xattr(self) -> None:
        if not self._xattr:
            # The one ENOSYS that is meant: the kernel does not ask again, which saves a
            # request before each write.
            raise NotServed


class Known(NamedTuple):
    """A result for which no body is to run."""

    result: Any


class NotServed(Exception):
    """The kernel is not to ask for this again."""


class Row(NamedTuple):
    """What is done with requests of one opcode.

    name: of the callback. asks: makes its body, or has the result. answers: encodes and sends its
    result; whether anybody took it. undo: takes back a result that nobody took. plain: as of a
    `Request`: its result is answered as `Role` does.
    """

    name: str
    asks: Callable[[Message], Body[Any] | Known]
    answers: Callable[[Message, Any], bool]
    undo: Callable[[Message, Any], None] | None = None
    plain: type[Call[Any]] | None = None


def table(rows: Rows, replies: Replies) -> dict[int, Row]:
    """The rows by opcode."""
    r, a = rows, replies
    nothing = a.nothing
    return {
        Opcode.LOOKUP: Row("lookup", r.lookup, a.entry, a.undo_entry),
        Opcode.FORGET: Row("forget", r.forget, a.no_reply),
        Opcode.BATCH_FORGET: Row("forget", r.forget, a.no_reply),
        Opcode.GETATTR: Row("getattr", r.getattr, a.attributes),
        Opcode.STATX: Row("getattr", r.getattr, a.statx),
        Opcode.SETATTR: Row("setattr", r.setattr, a.attributes),
        Opcode.READLINK: Row("readlink", r.readlink, a.data),
        Opcode.MKNOD: Row("mknod", r.mknod, a.entry, a.undo_entry),
        Opcode.MKDIR: Row("mkdir", r.mkdir, a.entry, a.undo_entry),
        Opcode.SYMLINK: Row("symlink", r.symlink, a.entry, a.undo_entry),
        Opcode.UNLINK: Row("unlink", r.unlink, nothing),
        Opcode.RMDIR: Row("rmdir", r.rmdir, nothing),
        Opcode.RENAME: Row("rename", r.rename, nothing),
        Opcode.RENAME2: Row("rename", r.rename, nothing),
        Opcode.LINK: Row("link", r.link, a.entry, a.undo_entry),
        Opcode.OPEN: Row("open", r.open, a.open, a.undo_open),
        Opcode.CREATE: Row("create", r.create, a.create, a.undo_create),
        Opcode.TMPFILE: Row("tmpfile", r.tmpfile, a.create, a.undo_create),
        Opcode.READ: Row("read", r.read, a.data, plain=Pread),
        Opcode.WRITE: Row("write", r.write, a.count, plain=Pwrite),
        Opcode.FLUSH: Row("flush", r.flush, nothing),
        Opcode.FSYNC: Row("fsync", r.fsync, nothing, plain=Fsync),
        Opcode.FSYNCDIR: Row("fsyncdir", r.fsyncdir, nothing, plain=Fsync),
        Opcode.RELEASE: Row("release", r.release, nothing),
        Opcode.RELEASEDIR: Row("releasedir", r.releasedir, nothing),
        Opcode.OPENDIR: Row("opendir", r.opendir, a.opendir, a.undo_opendir),
        Opcode.READDIR: Row("readdir", r.readdir, a.readdir),
        Opcode.READDIRPLUS: Row("readdirplus", r.readdirplus, a.readdirplus),
        Opcode.STATFS: Row("statfs", r.statfs, a.statfs),
        Opcode.GETXATTR: Row("getxattr", r.getxattr, a.value),
        Opcode.LISTXATTR: Row("listxattr", r.listxattr, a.names),
        Opcode.SETXATTR: Row("setxattr", r.setxattr, nothing),
        Opcode.REMOVEXATTR: Row("removexattr", r.removexattr, nothing),
        Opcode.GETLK: Row("getlk", r.getlk, a.lock),
        Opcode.FALLOCATE: Row("fallocate", r.fallocate, nothing),
        Opcode.LSEEK: Row("lseek", r.lseek, a.number),
        Opcode.COPY_FILE_RANGE: Row("copy_file_range", r.copy_file_range, a.count),
        Opcode.COPY_FILE_RANGE_64: Row("copy_file_range", r.copy_file_range, a.number),
        Opcode.IOCTL: Row("ioctl", r.ioctl, a.ioctl),
        Opcode.SYNCFS: Row("syncfs", r.syncfs, nothing),
    }


def lock_rows(rows: Rows, replies: Replies) -> tuple[Row, Row]:
    """The rows of SETLK and SETLKW, by whether flock(2) was called (LK_FLOCK)."""
    setlk = Row("setlk", rows.setlk, replies.nothing)
    return setlk, Row("flock", rows.flock, replies.nothing)


def _caller(m: Message) -> Caller:
    return Caller(m.uid, m.gid, None, m.pid)


def _time(valid: int, field: int, now: int, seconds: int, nanoseconds: int) -> int | SetTime | None:
    if not valid & field:
        return None
    return SetTime.NOW if valid & now else seconds * _BILLION + nanoseconds


def _range(kind: int, start: int, end: int, pid: int) -> LockRange:
    """A lock as 9P has it: a length, and 0 for one to the end of the file."""
    if kind not in FLOCK_OPERATIONS or end < start:
        raise error(errno.EINVAL)
    return LockRange(kind, start, 0 if end >= LAST_BYTE else end - start + 1, pid)


def _nothing(handle: int) -> None:
    """Nobody wants to know of handles."""
