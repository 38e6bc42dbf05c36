"""pyfuse3's callbacks: what the kernel asks, put to the 9P operations.

The only module that deals in pyfuse3's types. It makes no file system call of its own:
each callback builds an operation body (sequences.py, ops/) and has the threading model
run it.

Only FUSEError may leave a callback, or pyfuse3 ends the mount for everybody; so every
body is run through `_answer`, which makes an errno of whatever comes.

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyfuse3

from ninefuse import ops, sequences
from ninefuse.commands import Body
from ninefuse.credentials import Caller, may_see_trusted
from ninefuse.executor import Executor
from ninefuse.fids import FIRST_HANDLE, Fid
from ninefuse.ops.directory import fitted
from ninefuse.ops.names import AT_REMOVEDIR
from ninefuse.options import Settings
from ninefuse.qids import ROOT_NODEID
from ninefuse.session import Session
from ninefuse.stats import ATTRIBUTE
from ninefuse.syscalls import Attributes

log = logging.getLogger(__name__)

T = TypeVar("T")

_SYNC = os.O_SYNC | os.O_DSYNC
_MAX_ERRNO = 4095  # the kernel takes nothing above for an error


# An extended attribute of the root that the source knows nothing of: counters, as JSON.
STATISTICS = os.fsencode(ATTRIBUTE)


class Adapter(pyfuse3.Operations):
    """The callbacks of one mount.

    Attributes:
        errors: how many there were, by callback and errno.
        statistics: what says the value of the attribute `STATISTICS`.
        unmasked: whether the kernel leaves it to us to apply callers' umasks.

    Args:
        session: with the root attached as fid 1.
        executor: the threading model.
        settings: timeouts and switches of the mount.
        started: called once the kernel has begun to talk to us.
    """

    # A lookup of "." or ".." on a forgotten nodeid is for NFS export, which needs file
    # handles that outlive the daemon.
    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        session: Session,
        executor: Executor,
        settings: Settings,
        started: Callable[[], None],
    ) -> None:
        super().__init__()
        self._session = session
        self._executor = executor
        self._started = started
        self._attr_timeout = settings.attr_timeout
        self._entry_timeout = settings.entry_timeout
        self._negative_timeout = settings.negative_timeout
        self._keep_cache = settings.keep_cache
        self._direct_sync = settings.direct_sync
        self._sync = settings.sync
        self._xattr = settings.xattr
        self.enable_acl = settings.acl
        self._debug = log.isEnabledFor(logging.DEBUG)  # asked once, not for each request
        self.errors: Counter[tuple[str, int]] = Counter()
        self.statistics: Callable[[], bytes] = bytes
        self.unmasked = False

    def init(self) -> None:
        self._started()

    # Names

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            fid, attributes = await self._answer(
                "lookup", sequences.lookup(self._session, parent_inode, name)
            )
        except pyfuse3.FUSEError as e:
            if e.errno != errno.ENOENT or not self._negative_timeout:
                raise
            absent = pyfuse3.EntryAttributes()  # st_ino 0: no such name, and remember it
            absent.entry_timeout = self._negative_timeout
            return absent
        return self._entry(fid, attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        with contextlib.suppress(pyfuse3.FUSEError):  # there is nobody to tell
            await self._answer("forget", sequences.forget(self._session, inode_list))

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        body = sequences.mknod(self._session, parent_inode, name, mode, rdev, self._caller(ctx))
        return self._entry(*await self._answer("mknod", body))

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        body = sequences.mkdir(self._session, parent_inode, name, mode, self._caller(ctx))
        return self._entry(*await self._answer("mkdir", body))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        body = sequences.symlink(self._session, parent_inode, name, target, self._caller(ctx))
        return self._entry(*await self._answer("symlink", body))

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        caller = self._caller(ctx)
        body = sequences.link(self._session, inode, new_parent_inode, new_name, caller)
        return self._entry(*await self._answer("link", body))

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._answer("unlink", ops.unlinkat(self._session, parent_inode, name))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._answer("rmdir", ops.unlinkat(self._session, parent_inode, name, AT_REMOVEDIR))

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        body = ops.renameat(
            self._session,
            parent_inode_old,
            name_old,
            parent_inode_new,
            name_new,
            flags,
            self._caller(ctx),
        )
        await self._answer("rename", body)

    # Attributes

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        attributes = await self._answer("getattr", ops.getattr(self._session, inode))
        return self._attributes(inode, attributes)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = ops.Changes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
            ctime=fields.update_ctime,
        )
        if changes == ops.Changes():
            changes = changes._replace(ctime=True)  # a chown to nobody: it moves that at least
        handle = None if fh is None else _fid(fh)
        body = sequences.setattr(self._session, inode, handle, changes)
        return self._attributes(inode, await self._answer("setattr", body))

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._answer("readlink", ops.readlink(self._session, inode))

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = await self._answer("statfs", sequences.statfs(self._session))
        data = pyfuse3.StatvfsData()
        data.f_bsize = found.f_bsize
        data.f_frsize = found.f_frsize
        data.f_blocks = found.f_blocks
        data.f_bfree = found.f_bfree
        data.f_bavail = found.f_bavail
        data.f_files = found.f_files
        data.f_ffree = found.f_ffree
        data.f_favail = found.f_favail
        data.f_namemax = found.f_namemax
        return data

    # Files

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        body = sequences.open_fid(self._session, inode, self._kept(flags), self._caller(ctx))
        return self._opened(await self._answer("open", body), flags)

    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        kept = self._kept(flags)
        body = sequences.create(self._session, parent_inode, name, kept, mode, self._caller(ctx))
        handle, fid, attributes = await self._answer("create", body)
        return self._opened(handle, flags), self._entry(fid, attributes)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._answer("read", ops.read(self._session, _fid(fh), off, size))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._answer("write", ops.write(self._session, _fid(fh), off, buf))

    async def flush(self, fh: int) -> None:
        await self._answer("flush", sequences.flush(self._session, _fid(fh)))

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._answer("fsync", ops.fsync(self._session, _fid(fh), datasync))

    async def release(self, fh: int) -> None:
        await self._answer("release", ops.clunk(self._session, _fid(fh)))

    # Directories

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        body = sequences.open_fid(self._session, inode, os.O_DIRECTORY)
        return _handle(await self._answer("opendir", body))

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = _fid(fh)
        body = ops.readdirplus(self._session, directory, start_id)
        entries = await self._answer("readdir", body)
        fit = 0
        try:
            for entry in entries:
                if entry.attributes is None:
                    shown = pyfuse3.EntryAttributes()
                    shown.st_ino = entry.ino
                    shown.st_mode = entry.type << 12
                    shown.entry_timeout = shown.attr_timeout = 0  # looked up when it is used
                elif entry.fid is None:
                    shown = self._attributes(entry.ino, entry.attributes)
                else:
                    shown = self._entry(entry.fid, entry.attributes)
                if not pyfuse3.readdir_reply(token, entry.name, shown, entry.offset):
                    break
                fit += 1
        finally:
            fitted(self._session, directory, entries, fit)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._answer("fsyncdir", ops.fsync(self._session, _fid(fh), datasync))

    async def releasedir(self, fh: int) -> None:
        await self._answer("releasedir", ops.clunk(self._session, _fid(fh)))

    # Extended attributes

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        self._need_xattr()
        if inode == ROOT_NODEID and name == STATISTICS:
            return self._statistics()
        return await self._answer("getxattr", sequences.getxattr(self._session, inode, name))

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        self._need_xattr()
        names = await self._answer("listxattr", sequences.listxattr(self._session, inode))
        if inode == ROOT_NODEID:
            # Where the source has an attribute of that name it cannot be reached.
            names = [name for name in names if name != STATISTICS]
        others = [name for name in names if not name.startswith(b"trusted.")]
        # A daemon of root sees all; the source shows these to those who have CAP_SYS_ADMIN.
        if len(others) == len(names) or may_see_trusted(self._caller(ctx)):
            return names
        return others

    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._need_xattr()
        _refuse_statistics(inode, name)
        body = sequences.setxattr(self._session, inode, name, value, self._caller(ctx))
        await self._answer("setxattr", body)

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._need_xattr()
        _refuse_statistics(inode, name)
        await self._answer("removexattr", sequences.removexattr(self._session, inode, name))

    # What all callbacks share

    async def _answer(self, callback: str, body: Body[T]) -> T:
        """Run a body; raise nothing but FUSEError."""
        try:
            result = await self._executor.run(callback, body)
            if self._debug:
                log.debug("%s: %s", callback, _shortened(result))
            return result
        except OSError as e:
            code = _errno_for_kernel(e)
        except Exception:
            log.exception("%s failed", callback)
            code = errno.EIO
        self.errors[callback, code] += 1
        if self._debug:
            log.debug("%s: %s", callback, errno.errorcode.get(code, code))
        raise pyfuse3.FUSEError(code)

    def _caller(self, ctx: pyfuse3.RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, ctx.umask if self.unmasked else None, ctx.pid)

    def _statistics(self) -> bytes:
        try:
            return self.statistics()
        except OSError as e:
            raise pyfuse3.FUSEError(_errno_for_kernel(e)) from None
        except Exception:
            log.exception("the counters cannot be had")
            raise pyfuse3.FUSEError(errno.EIO) from None

    def _need_xattr(self) -> None:
        if not self._xattr:
            # The one ENOSYS that is meant: the kernel does not ask again, which saves a
            # request before each write.
            raise pyfuse3.FUSEError(errno.ENOSYS)

    def _entry(self, fid: Fid, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = self._attributes(fid.number, attributes)
        entry.generation = fid.generation
        entry.entry_timeout = self._entry_timeout
        if not fid.node.may_be_believed(attributes):
            entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _attributes(self, nodeid: int, a: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        # Number and nodeid are one in pyfuse3. Of the root the kernel knows the nodeid.
        entry.st_ino = a.ino if nodeid == ROOT_NODEID else nodeid
        entry.attr_timeout = self._attr_timeout
        entry.st_mode = a.mode
        entry.st_nlink = a.nlink
        entry.st_uid = a.uid
        entry.st_gid = a.gid
        entry.st_rdev = a.rdev
        entry.st_size = a.size
        entry.st_blksize = a.blksize
        entry.st_blocks = a.blocks
        entry.st_atime_ns = a.atime_ns
        entry.st_mtime_ns = a.mtime_ns
        entry.st_ctime_ns = a.ctime_ns
        return entry

    def _is_direct(self, flags: int) -> bool:
        """Whether an open goes past the kernel's page cache."""
        access = flags & os.O_ACCMODE
        # Past the cache a synchronous write is one request, and our descriptor makes it
        # durable; through it, it is three (an xattr, the write, an fsync).
        syncs = self._direct_sync and flags & _SYNC and access != os.O_RDONLY
        # Mapped pages of a file open for reading and appending would be appended, not
        # written in place, when the kernel writes them back through such a descriptor:
        # a direct one cannot be mapped shared (ENODEV), which is the honest answer.
        appends = flags & os.O_APPEND and access == os.O_RDWR
        return bool(syncs or appends)

    def _kept(self, flags: int) -> int:
        """The flags for our own descriptor of a file."""
        if not self._is_direct(flags):
            # The kernel sends an fsync after each write to a cached synchronous open: a
            # descriptor that syncs as well would do it twice.
            return flags & ~_SYNC
        # It sends none for a direct one, nor for a mount with -o sync.
        return flags | os.O_SYNC if self._sync else flags

    def _opened(self, handle: int, flags: int) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(
            fh=_handle(handle), direct_io=self._is_direct(flags), keep_cache=self._keep_cache
        )


def _refuse_statistics(inode: int, name: bytes) -> None:
    if inode == ROOT_NODEID and name == STATISTICS:
        raise pyfuse3.FUSEError(errno.EPERM)


def _shortened(result: object) -> str:
    """A result for the debug log: data by its size."""
    if isinstance(result, bytes):
        return f"{len(result)} bytes"
    if isinstance(result, list):
        return f"{len(result)} entries"
    return "done" if result is None else str(result)


def _fid(handle: int) -> int:
    """The fid behind the kernel's 64-bit file handle."""
    return FIRST_HANDLE + handle


def _handle(fid: int) -> int:
    return fid - FIRST_HANDLE


def _errno_for_kernel(failure: OSError) -> int:
    code = failure.errno
    if code == errno.ENOSYS:
        # From a callback it would switch the operation off for the whole mount: an
        # ENOSYS on one fsync would silently end durability.
        return errno.EOPNOTSUPP
    if not code or not 0 < code <= _MAX_ERRNO:
        log.error("an error without a usable errno: %r", failure)
        return errno.EIO
    return code
