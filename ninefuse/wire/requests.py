"""Every T-message as the operation that it asks for, and the values of its R-message.

One coroutine for each message, by its name. Each is an operation body, which whatever threading
model runs. Its arguments are the conversation, who asks, and the message's fields; fids among
them are numbers of the session's table already. What it returns are the values of the answer.

Flags and bits of attributes are 9P2000.L's (diod's protocol.md; Linux include/net/9p/9p.h), which
are Linux's on x86 and need not be this machine's.

Locks touched: those of the operations.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from ninefuse import ops
from ninefuse.calls import blocking
from ninefuse.errors import error
from ninefuse.linux import mountflags
from ninefuse.linux.callers import Caller
from ninefuse.linux.records import DirectoryEntry
from ninefuse.linux.syscalls import Attributes, SetTime
from ninefuse.ops.directory import readdir_numbered
from ninefuse.ops.locking import lock_in_time
from ninefuse.tree.qids import QTDIR, QTFILE, QTSYMLINK, Qid
from ninefuse.tree.session import Session
from ninefuse.wire.codec import Values
from ninefuse.wire.messages import NOFID, NONUNAME, NUMBER_OF

READ_HEADER = 11  # bytes of an Rread or Rreaddir besides the data
_IO_HEADER = 24  # that clients leave for the header of a Twrite (P9_IOHDRSZ)
_PAGE = 4096
_V9FS_MAGIC = 0x01021997  # what Linux calls the file system (statfs(2))
_MOST_OF_DEVICE = 0xFFFFF  # what a number of a device can be in Linux, the minor one (dev_t)
_BILLION = 1_000_000_000
_U64 = (1 << 64) - 1

_ACCESS = {0: os.O_RDONLY, 1: os.O_WRONLY, 2: os.O_RDWR}
_OPEN_FLAGS = (  # P9_DOTL_*; those left out say nothing to a server
    (0o200, os.O_EXCL),
    (0o1000, os.O_TRUNC),
    (0o2000, os.O_APPEND),
    (0o4000, os.O_NONBLOCK),
    (0o10000, os.O_DSYNC),
    (0o200000, os.O_DIRECTORY),
    (0o1000000, os.O_NOATIME),
    (0o4000000, os.O_SYNC),
)
_STATS_BASIC, _STATS_BTIME = 0x7FF, 0x800  # P9_STATS_*
# P9_ATTR_*: what a setattr is to set
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _CTIME = 1, 2, 4, 8, 0x10, 0x20, 0x40
_ATIME_SET, _MTIME_SET = 0x80, 0x100
LOCK_BLOCK = 1  # P9_LOCK_FLAGS_BLOCK
_LOCK_TYPES = {0: fcntl.F_RDLCK, 1: fcntl.F_WRLCK, 2: fcntl.F_UNLCK}
_LONG_NAME = 64  # bytes of a client_id; in Linux it is the machine's name, which has no more
_LOCK_NUMBERS = {kind: number for number, kind in _LOCK_TYPES.items()}
_ENTRY = struct.Struct("<BIQQBH")  # qid[13] offset[8] type[1] and the name's length
_DT_DIR, _DT_LNK = 4, 10


class Users(Protocol):
    """What is asked of users.py."""

    def caller(self, peer: Any, uname: bytes, n_uname: int) -> Caller | None: ...

    def in_group(self, peer: Any, caller: Caller, gid: int, directory: Attributes) -> Caller: ...


class Conversation(Protocol):
    """What a message has to know of the conversation that it is of."""

    session: Session
    number: int
    msize: int  # bytes
    root: int  # the fid of the exported directory, which is no client's
    exports: tuple[bytes, ...]  # by which names that is known
    users: Users
    peer: Any

    def attached(self, fid: int, caller: Caller | None) -> None:
        """Note as whom a fid's requests are to be made."""


async def attach(
    c: Conversation, _: Caller | None, fid: int, afid: int, uname: bytes, aname: bytes, n_uname: int
) -> Values:
    """getattr of the server's own fid, and a walk from it, as who the client says that he is.

    attach is for the server: it begins a session.
    """
    if afid != NOFID:
        raise error(errno.EPERM)  # nobody has authenticated himself by that
    if aname not in c.exports:
        raise error(errno.ENOENT)
    caller = await blocking(None, c.users.caller, c.peer, uname, n_uname)
    attributes = await ops.getattr(c.session, c.root)
    # At last, since nobody ends the fid of an attach that fails.
    await ops.walk(c.session, c.root, fid)
    c.attached(fid, caller)
    return (c.session.fids.qid_of(attributes),)


async def walk(
    c: Conversation, caller: Caller | None, fid: int, newfid: int, names: tuple[bytes, ...]
) -> Values:
    """walk. Nobody looks whether a root that may do all may search: the server is no less."""
    if caller is not None and caller.uid == 0:
        caller = None
    qids, _ = await ops.walk(c.session, fid, newfid, names, caller)
    return (qids,)


async def clunk(c: Conversation, _: Caller | None, fid: int) -> Values:
    """clunk."""
    await ops.clunk(c.session, fid)
    return ()


async def remove(c: Conversation, caller: Caller | None, fid: int) -> Values:
    """remove."""
    await ops.remove(c.session, fid, caller)
    return ()


async def statfs(c: Conversation, _: Caller | None, fid: int) -> Values:
    """statfs."""
    s = await ops.statfs(c.session, fid)
    sizes = s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree
    return (_V9FS_MAGIC, *sizes, s.f_fsid & _U64, s.f_namemax)


async def lopen(c: Conversation, caller: Caller | None, fid: int, flags: int) -> Values:
    """lopen."""
    return await ops.lopen(c.session, fid, _open_flags(flags), caller), _iounit(c)


async def lcreate(
    c: Conversation, caller: Caller | None, fid: int, name: bytes, flags: int, mode: int, gid: int
) -> Values:
    """lcreate."""
    caller = await _maker(c, caller, fid, gid)
    qid = await ops.lcreate(c.session, fid, name, _open_flags(flags), mode, caller)
    return qid, _iounit(c)


async def symlink(
    c: Conversation, caller: Caller | None, fid: int, name: bytes, target: bytes, gid: int
) -> Values:
    """symlink."""
    caller = await _maker(c, caller, fid, gid)
    return (await ops.symlink(c.session, fid, name, target, caller),)


async def mknod(
    c: Conversation,
    caller: Caller | None,
    fid: int,
    name: bytes,
    mode: int,
    major: int,
    minor: int,
    gid: int,
) -> Values:
    """mknod."""
    if max(major, minor) > _MOST_OF_DEVICE:
        raise error(errno.EINVAL)
    caller = await _maker(c, caller, fid, gid)
    rdev = os.makedev(major, minor)
    return (await ops.mknod(c.session, fid, name, mode, rdev, caller),)


async def mkdir(
    c: Conversation, caller: Caller | None, fid: int, name: bytes, mode: int, gid: int
) -> Values:
    """mkdir."""
    caller = await _maker(c, caller, fid, gid)
    return (await ops.mkdir(c.session, fid, name, mode, caller),)


async def rename(
    c: Conversation, caller: Caller | None, fid: int, dirfid: int | None, name: bytes
) -> Values:
    """rename; None: in its directory."""
    await ops.rename(c.session, fid, dirfid, name, caller)
    return ()


async def renameat(
    c: Conversation, caller: Caller | None, old: int, oldname: bytes, new: int, newname: bytes
) -> Values:
    """renameat."""
    await ops.renameat(c.session, old, oldname, new, newname, 0, caller)
    return ()


async def unlinkat(
    c: Conversation, caller: Caller | None, fid: int, name: bytes, flags: int
) -> Values:
    """unlinkat."""
    await ops.unlinkat(c.session, fid, name, flags, caller)
    return ()


async def link(
    c: Conversation, caller: Caller | None, dirfid: int, fid: int, name: bytes
) -> Values:
    """link."""
    await ops.link(c.session, dirfid, fid, name, caller)
    return ()


async def readlink(c: Conversation, _: Caller | None, fid: int) -> Values:
    """readlink."""
    return (await ops.readlink(c.session, fid),)


async def getattr(c: Conversation, _: Caller | None, fid: int, mask: int) -> Values:
    """getattr."""
    found = await ops.getattr(c.session, fid)
    # What is not to be honoured in the source is not to be honoured by whoever mounts this.
    hidden = mountflags.HIDEABLE & c.session.fids.devices.mount_of(found).forbids
    a = mountflags.shown(found, hidden) if hidden else found
    valid = mask & (_STATS_BASIC | (_STATS_BTIME if a.has_birth else 0))
    owner = a.mode, a.uid, a.gid, a.nlink, a.rdev
    times = (
        *(a.atime_seconds & _U64, a.atime_nanoseconds),
        *(a.mtime_seconds & _U64, a.mtime_nanoseconds),
        *(a.ctime_seconds & _U64, a.ctime_nanoseconds),
        *(a.btime_seconds & _U64, a.btime_nanoseconds),
    )
    qid = c.session.fids.qid_of(a)
    return (valid, qid, *owner, a.size, a.blksize, a.blocks, *times, 0, 0)


async def setattr(
    c: Conversation,
    caller: Caller | None,
    fid: int,
    valid: int,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    atime_s: int,
    atime_ns: int,
    mtime_s: int,
    mtime_ns: int,
) -> Values:
    """setattr."""
    sizes = bool(valid & _SIZE)
    atime = _time(atime_s, atime_ns) if valid & _ATIME_SET else SetTime.NOW
    mtime = _time(mtime_s, mtime_ns) if valid & _MTIME_SET else SetTime.NOW
    # A change of the size moves that time by itself. Who is not the owner may not ask for it.
    moves_mtime = valid & _MTIME and (valid & _MTIME_SET or not sizes)
    changes = ops.Changes(
        mode=mode if valid & _MODE else None,
        uid=uid if valid & _UID and uid != NONUNAME else None,
        gid=gid if valid & _GID and gid != NONUNAME else None,
        size=size if sizes else None,
        atime=atime if valid & _ATIME else None,
        mtime=mtime if moves_mtime else None,
        ctime=valid & (_CTIME | _MODE | _SIZE) == _CTIME,
    )
    await ops.setattr(c.session, fid, changes, caller)
    return ()


async def xattrwalk(
    c: Conversation, caller: Caller | None, fid: int, newfid: int, name: bytes
) -> Values:
    """xattrwalk."""
    return (await ops.xattrwalk(c.session, fid, newfid, name, caller),)


async def xattrcreate(
    c: Conversation, caller: Caller | None, fid: int, name: bytes, size: int, flags: int
) -> Values:
    """xattrcreate; no bytes mean that the attribute is to go, unless it is to be a new one."""
    removes = not size and not flags & os.XATTR_CREATE
    await ops.xattrcreate(c.session, fid, name, size, flags, remove=removes, caller=caller)
    return ()


async def readdir(c: Conversation, _: Caller | None, fid: int, offset: int, count: int) -> Values:
    """readdir: as many entries as have room."""
    room = min(count, c.msize - READ_HEADER)
    entries = await readdir_numbered(c.session, fid, offset, room, leaves=False)
    return (b"".join(map(_packed_entry, entries)),)


async def read(c: Conversation, _: Caller | None, fid: int, offset: int, count: int) -> Values:
    """read: no more than has room."""
    return (await ops.read(c.session, fid, offset, min(count, c.msize - READ_HEADER)),)


async def write(c: Conversation, _: Caller | None, fid: int, offset: int, data: bytes) -> Values:
    """write."""
    return (await ops.write(c.session, fid, offset, data),)


async def fsync(c: Conversation, _: Caller | None, fid: int, datasync: int) -> Values:
    """fsync."""
    await ops.fsync(c.session, fid, bool(datasync))
    return ()


async def lock(
    c: Conversation,
    _: Caller | None,
    fid: int,
    kind: int,
    flags: int,
    start: int,
    length: int,
    proc_id: int,
    client_id: bytes,
) -> Values:
    """lock, for a process of the client's; again, while another is in the way, if it would wait.

    The protocol has the client ask again, which Linux does twice a minute.
    """
    wanted = ops.LockRange(_lock_type(kind), start, length, proc_id)
    owner = _lock_owner(c, client_id, proc_id)
    status = await ops.lock(c.session, fid, flags, wanted, owner)
    if status is ops.LockStatus.BLOCKED and flags & LOCK_BLOCK:
        await lock_in_time(c.session, fid, wanted, owner)
        status = ops.LockStatus.SUCCESS
    return (int(status),)


async def getlock(
    c: Conversation,
    _: Caller | None,
    fid: int,
    kind: int,
    start: int,
    length: int,
    proc_id: int,
    client_id: bytes,
) -> Values:
    """getlock. Whose lock is in the way is told by the number of the process alone."""
    wanted = ops.LockRange(_lock_type(kind), start, length, proc_id)
    found = await ops.getlock(c.session, fid, wanted, _lock_owner(c, client_id, proc_id))
    is_free = found.type == fcntl.F_UNLCK
    whose = (proc_id, client_id) if is_free else (found.pid & NOFID, b"")
    return (_LOCK_NUMBERS[found.type], found.start, found.length, *whose)


# What is asked by each type of message. version, auth and flush are the conversation's own.
ROWS: dict[int, Callable[..., Coroutine[Any, Any, Values]]] = {
    NUMBER_OF[f"T{row.__name__}"]: row
    for row in (
        *(attach, walk, clunk, remove, statfs, lopen, lcreate, symlink, mknod, mkdir, rename),
        *(renameat, unlinkat, link, readlink, getattr, setattr, xattrwalk, xattrcreate),
        *(readdir, read, write, fsync, lock, getlock),
    )
}


async def _maker(c: Conversation, caller: Caller | None, dirfid: int, gid: int) -> Caller | None:
    """Who makes something in a directory that is to be of a group."""
    if caller is None or gid in (NONUNAME, caller.gid):
        return caller
    return c.users.in_group(c.peer, caller, gid, await ops.getattr(c.session, dirfid))


def _open_flags(flags: int) -> int:
    access = _ACCESS.get(flags & 3)
    if access is None:
        raise error(errno.EINVAL)
    for theirs, ours in _OPEN_FLAGS:
        if flags & theirs:
            access |= ours
    return access


def _iounit(c: Conversation) -> int:
    """Bytes that a client is to ask for at a time: whole pages, as many as a message has."""
    return (c.msize - _IO_HEADER) // _PAGE * _PAGE


def _lock_owner(c: Conversation, client_id: bytes, proc_id: int) -> tuple[int, bytes, int]:
    """Whose locks they are. A name that is long is kept as its digest: each lock keeps one."""
    if len(client_id) > _LONG_NAME:
        client_id = hashlib.blake2b(client_id, digest_size=_LONG_NAME).digest()
    return c.number, client_id, proc_id


def _lock_type(kind: int) -> int:
    found = _LOCK_TYPES.get(kind)
    if found is None:
        raise error(errno.EINVAL)
    return found


def _time(seconds: int, nanoseconds: int) -> int:
    """A moment in nanoseconds since 1970; seconds before that come as the upper half of 64 bits.

    Raises:
        OSError: EINVAL, there are more nanoseconds than a second has.
    """
    if nanoseconds >= _BILLION:
        raise error(errno.EINVAL)
    if seconds >> 63:
        seconds -= 1 << 64
    return seconds * _BILLION + nanoseconds


def _packed_entry(entry: DirectoryEntry) -> bytes:
    kind = QTDIR if entry.type == _DT_DIR else QTSYMLINK if entry.type == _DT_LNK else QTFILE
    qid = Qid(kind, 0, entry.ino)
    return _ENTRY.pack(*qid, entry.offset, entry.type, len(entry.name)) + entry.name
