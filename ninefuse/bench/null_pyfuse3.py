"""The null server on pyfuse3's session: every callback that the benchmark's workloads lead to."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
)

from ninefuse.bench.null_tree import BLOCK, NAME_MAX, PLENTY, TIMEOUT, Node, Tree, is_direct


class NullOperations(pyfuse3.Operations):
    """The callbacks."""

    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self._tree = Tree()

    def _attributes(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(node.inode)
        entry.st_mode = ModeT(node.mode)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = self._tree.uid, self._tree.gid
        entry.st_size = node.size
        entry.st_blksize = BLOCK
        entry.st_blocks = (node.size + 511) // 512
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._tree.now
        entry.attr_timeout = entry.entry_timeout = TIMEOUT
        return entry

    def _entry(self, node: Node) -> EntryAttributes:
        node.lookups += 1
        return self._attributes(node)

    def _created(self, parent: int, name: bytes, mode: int) -> Node:
        try:
            return self._tree.create(parent, name, mode)
        except OSError as e:
            raise _refused(e) from None

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._tree.find(parent_inode, name)
        if node is not None:
            return self._entry(node)
        missing = EntryAttributes()
        missing.st_ino = InodeT(0)
        missing.entry_timeout = TIMEOUT
        return missing

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        self._tree.forget(inode_list)

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._created(parent_inode, name, stat.S_IFDIR | mode & ~ctx.umask))

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        try:
            self._tree.unlink(parent_inode, name)
        except OSError as e:
            raise _refused(e) from None

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        try:
            self._tree.rmdir(parent_inode, name)
        except OSError as e:
            raise _refused(e) from None

    # Attributes.

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._tree.nodes[inode])

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._tree.nodes[inode]
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_size:
            node.size = attr.st_size
        return self._attributes(node)

    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        # Not ENOSYS, after which the kernel would ask no more: the others are asked at each write.
        raise FUSEError(pyfuse3.ENOATTR)

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        return True

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK
        data.f_blocks = data.f_bfree = data.f_bavail = PLENTY
        data.f_files = data.f_ffree = data.f_favail = PLENTY
        data.f_namemax = NAME_MAX
        return data

    # Data.

    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_TRUNC:  # libfuse has the kernel leave that to open
            self._tree.nodes[inode].size = 0
        return _opened(inode, flags)

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node = self._created(parent_inode, name, stat.S_IFREG | mode & ~ctx.umask)
        return _opened(node.inode, flags), self._entry(node)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self._tree.read(fh, off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return self._tree.write(fh, off, len(buf))

    async def flush(self, fh: FileHandleT) -> None:
        pass

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        pass

    async def release(self, fh: FileHandleT) -> None:
        pass

    # Directories.

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        for following, node in self._tree.listing(fh, start_id):
            entry = self._attributes(node)
            if not pyfuse3.readdir_reply(token, FileNameT(node.name), entry, following):
                self._tree.drop(node)
                break
            node.lookups += 1

    async def releasedir(self, fh: FileHandleT) -> None:
        pass


def _refused(failure: OSError) -> FUSEError:
    return FUSEError(failure.errno or errno.EIO)


def _opened(inode: int, flags: int) -> FileInfo:
    return FileInfo(fh=FileHandleT(inode), direct_io=is_direct(flags))


def serve(mountpoint: str) -> None:
    """Mount, and serve until unmounted."""
    options = {*pyfuse3.default_options, "fsname=null", "subtype=null"}
    pyfuse3.init(NullOperations(), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    except BaseException:
        pyfuse3.close(unmount=False)
        raise
    pyfuse3.close()
