"""pyfuse3's callbacks: what the kernel asks, put to the 9P operations.

The only module that deals in pyfuse3's types. It makes no file system call of its own:
each builds the body of its callback (callbacks.py) and has the threading model run it.

Only FUSEError may leave a callback, or pyfuse3 ends the mount for everybody; so every
body is run through `_answer`, which makes an errno of whatever comes.

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyfuse3
import trio

from ninefuse import ops
from ninefuse.awaiting import Awaiting
from ninefuse.calls import Body
from ninefuse.fuse import callbacks
from ninefuse.fuse.answers import (
    NOT_REFUSED,
    Opens,
    errno_for_kernel,
    errno_of,
    is_statistics,
    refuse_statistics,
    share_of,
    shortened,
    without_statistics,
)
from ninefuse.fuse.entries import fitted
from ninefuse.fuse.handles import Handle
from ninefuse.fuse.shown import Shown
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import Attributes
from ninefuse.settings import Settings
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid

log = logging.getLogger(__name__)

T = TypeVar("T")


class Adapter(pyfuse3.Operations):
    """The callbacks of one mount.

    Attributes:
        errors: how many there were, by callback and errno.
        started: set once the kernel has begun to talk to us.
        statistics: what says the value of the attribute `STATISTICS`.
        unmasked: whether the kernel leaves it to us to apply callers' umasks.

    Args:
        session: with the root attached as fid 1.
        awaiting: runs what is asked, by the threading model's driver.
        settings: timeouts and switches of the mount.
    """

    # A lookup of "." or ".." on a forgotten nodeid is for NFS export, which needs file
    # handles that outlive the daemon.
    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        session: Session,
        awaiting: Awaiting,
        settings: Settings,
    ) -> None:
        super().__init__()
        self._session = session
        self._awaiting = awaiting
        self.started = trio.Event()
        self._shown = Shown(session, settings)
        self._negative_timeout = settings.negative_timeout
        self._keep_cache = settings.keep_cache
        self._opens = Opens(settings)
        self._xattr = settings.xattr
        self.enable_acl = settings.acl
        self._debug = log.isEnabledFor(logging.DEBUG)  # asked once, not for each request
        self.errors: Counter[tuple[str, int]] = Counter()
        self.statistics: Callable[[], bytes] = bytes
        self.unmasked = False
        # Who opened a fid: pyfuse3 does not say whose a read is, and the kernel writes back in
        # nobody's name.
        self._opener_of = session.fids.owner_of

    def init(self) -> None:
        self.started.set()

    # Names

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            body = callbacks.lookup(self._session, parent_inode, name)
            fid, attributes = await self._answer("lookup", body, ctx.uid)
        except pyfuse3.FUSEError as e:
            if e.errno != errno.ENOENT or not self._negative_timeout:
                raise
            absent = pyfuse3.EntryAttributes()  # st_ino 0: no such name, and remember it
            absent.entry_timeout = self._negative_timeout
            return absent
        return self._entry(fid, attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        with contextlib.suppress(pyfuse3.FUSEError):  # there is nobody to tell
            await self._answer("forget", callbacks.forget(self._session, inode_list))

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        body = callbacks.mknod(self._session, parent_inode, name, mode, rdev, self._caller(ctx))
        return self._entry(*await self._answer("mknod", body, ctx.uid))

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        body = callbacks.mkdir(self._session, parent_inode, name, mode, self._caller(ctx))
        return self._entry(*await self._answer("mkdir", body, ctx.uid))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        body = callbacks.symlink(self._session, parent_inode, name, target, self._caller(ctx))
        return self._entry(*await self._answer("symlink", body, ctx.uid))

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        caller = self._caller(ctx)
        body = callbacks.link(self._session, inode, new_parent_inode, new_name, caller)
        return self._entry(*await self._answer("link", body, ctx.uid))

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        body = callbacks.unlink(self._session, parent_inode, name, self._caller(ctx))
        await self._answer("unlink", body, ctx.uid)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        body = callbacks.rmdir(self._session, parent_inode, name, self._caller(ctx))
        await self._answer("rmdir", body, ctx.uid)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        body = callbacks.rename(
            self._session,
            parent_inode_old,
            name_old,
            parent_inode_new,
            name_new,
            flags,
            self._caller(ctx),
        )
        await self._answer("rename", body, ctx.uid)

    # Attributes

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        body = callbacks.getattr(self._session, inode)
        return self._attributes(inode, await self._answer("getattr", body, ctx.uid))

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
        handle = None if fh is None else FIRST_HANDLE + fh
        body = callbacks.setattr(self._session, inode, handle, changes, self._caller(ctx))
        return self._attributes(inode, await self._answer("setattr", body, ctx.uid))

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._answer("readlink", callbacks.readlink(self._session, inode), ctx.uid)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        # pyfuse3 does not say of which file it is asked.
        found = await self._answer("statfs", callbacks.statfs(self._session, ROOT_NODEID), ctx.uid)
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
        body = callbacks.open(self._session, inode, self._opens.kept(flags), self._caller(ctx))
        return self._opened(await self._answer("open", body, ctx.uid), flags)

    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        kept = self._opens.kept(flags)
        body = callbacks.create(self._session, parent_inode, name, kept, mode, self._caller(ctx))
        handle, fid, attributes = await self._answer("create", body, ctx.uid)
        return self._opened(handle, flags), self._entry(fid, attributes)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        fid = FIRST_HANDLE + fh
        body = callbacks.read(self._session, fid, off, size)
        return await self._answer("read", body, self._opener_of(fid))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        fid = FIRST_HANDLE + fh
        body = callbacks.write(self._session, fid, off, buf)
        return await self._answer("write", body, self._opener_of(fid))

    async def flush(self, fh: int) -> None:
        fid = FIRST_HANDLE + fh
        body = callbacks.flush(self._session, fid)
        await self._answer("flush", body, self._opener_of(fid))

    async def fsync(self, fh: int, datasync: bool) -> None:
        fid = FIRST_HANDLE + fh
        body = callbacks.fsync(self._session, fid, datasync)
        await self._answer("fsync", body, self._opener_of(fid))

    async def release(self, fh: int) -> None:
        await self._answer("release", callbacks.release(self._session, FIRST_HANDLE + fh))

    # Directories

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        body = callbacks.opendir(self._session, inode, self._caller(ctx))
        return _handle(await self._answer("opendir", body, ctx.uid))

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = FIRST_HANDLE + fh
        body = callbacks.readdirplus(self._session, directory, start_id)
        entries = await self._answer("readdirplus", body, self._opener_of(directory))
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
        fid = FIRST_HANDLE + fh
        body = callbacks.fsyncdir(self._session, fid, datasync)
        await self._answer("fsyncdir", body, self._opener_of(fid))

    async def releasedir(self, fh: int) -> None:
        await self._answer("releasedir", callbacks.releasedir(self._session, FIRST_HANDLE + fh))

    # Extended attributes

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        self._need_xattr()
        if is_statistics(inode, name):
            return self._statistics()
        body = callbacks.getxattr(self._session, inode, name, self._caller(ctx))
        return await self._answer("getxattr", body, ctx.uid)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        self._need_xattr()
        body = callbacks.listxattr(self._session, inode, self._caller(ctx))
        return without_statistics(inode, await self._answer("listxattr", body, ctx.uid))

    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._need_xattr()
        _refuse(inode, name)
        body = callbacks.setxattr(self._session, inode, name, value, self._caller(ctx))
        await self._answer("setxattr", body, ctx.uid)

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._need_xattr()
        _refuse(inode, name)
        body = callbacks.removexattr(self._session, inode, name, self._caller(ctx))
        await self._answer("removexattr", body, ctx.uid)

    # What all callbacks share

    async def _answer(self, callback: str, body: Body[T], user: int | None = None) -> T:
        """Run a body; raise nothing but FUSEError.

        Args:
            callback: its name.
            body: of the operation.
            user: whose request it is, a uid; None: nobody's, who has no share.
        """
        if callback not in NOT_REFUSED and self._awaiting.driver.has_too_many(user):
            body.close()
            raise self._failed(callback, errno.EAGAIN)
        try:
            result = await self._awaiting.run(callback, body, share_of(callback, user))
            if self._debug:
                log.debug("%s: %s", callback, shortened(result))
            return result
        except OSError as e:
            code = errno_for_kernel(e)
        except Exception:
            log.exception("%s failed", callback)
            code = errno.EIO
        raise self._failed(callback, code)

    def _failed(self, callback: str, code: int) -> pyfuse3.FUSEError:
        """What a callback raises that has failed."""
        code = errno_of(callback, code)
        self.errors[callback, code] += 1
        if self._debug:
            log.debug("%s: %s", callback, errno.errorcode.get(code, code))
        return pyfuse3.FUSEError(code)

    def _caller(self, ctx: pyfuse3.RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, ctx.umask if self.unmasked else None, ctx.pid)

    def _statistics(self) -> bytes:
        try:
            return self.statistics()
        except OSError as e:
            raise pyfuse3.FUSEError(errno_for_kernel(e)) from None
        except Exception:
            log.exception("the counters cannot be had")
            raise pyfuse3.FUSEError(errno.EIO) from None

    def _need_xattr(self) -> None:
        if not self._xattr:
            # The one ENOSYS that is meant: the kernel does not ask again, which saves a
            # request before each write.
            raise pyfuse3.FUSEError(errno.ENOSYS)

    def _entry(self, fid: Fid, attributes: Attributes) -> pyfuse3.EntryAttributes:
        shown = self._shown.entry(fid, attributes)
        entry = _laid_out(shown.ino, shown.attributes)
        entry.generation = shown.generation
        entry.entry_timeout = shown.entry_valid
        entry.attr_timeout = shown.attr_valid
        return entry

    def _attributes(self, nodeid: int, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = _laid_out(*self._shown.attributes(nodeid, attributes))
        entry.attr_timeout = self._shown.attr_valid
        return entry

    def _opened(self, handle: Handle, flags: int) -> pyfuse3.FileInfo:
        direct = self._opens.are_direct(flags) or handle.is_live
        return pyfuse3.FileInfo(
            fh=_handle(handle.number), direct_io=direct, keep_cache=self._keep_cache
        )


def _refuse(inode: int, name: bytes) -> None:
    try:
        refuse_statistics(inode, name)
    except OSError as e:
        raise pyfuse3.FUSEError(errno_for_kernel(e)) from None


def _laid_out(ino: int, a: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes in pyfuse3's form, in which number and nodeid are one."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = ino
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


def _handle(fid: int) -> int:
    return fid - FIRST_HANDLE
