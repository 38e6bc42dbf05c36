"""A pyfuse3 server that answers every request from memory: the floor under any other. A program.

    python -m ninefuse.bench.null_server MNT

Nothing needs to be made in it: a name such as `file-4096-x` is a file of that size, full of
zeros, and `dir-300-x` a directory that lists so many files (`dir-x`: none). What is created is
remembered by name, what is written only counted. Timeouts and the answer to an O_SYNC open are
ninefuse's; nothing else of ninefuse is in it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

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

TIMEOUT = 1.0  # seconds: for attributes and for names, found or not

_FILE = re.compile(rb"file-(\d+)-")
_DIRECTORY = re.compile(rb"dir-(?:(\d+)-)?")
_ZEROS = bytes(1 << 20)


@dataclass
class Node:
    """A file or directory that the kernel knows of, or that was created.

    parent, name: where it is. listed: how many files a directory lists out of thin air.
    lookups: the kernel's count. created: whether it is remembered when the kernel forgets it.
    children: by name, those that were created.
    """

    inode: InodeT
    parent: InodeT
    name: bytes
    mode: int
    size: int = 0
    listed: int = 0
    lookups: int = 0
    created: bool = False
    children: dict[bytes, InodeT] = field(default_factory=dict)


class NullOperations(pyfuse3.Operations):
    """Every callback that the benchmark's workloads lead to."""

    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        root = Node(pyfuse3.ROOT_INODE, pyfuse3.ROOT_INODE, b"", stat.S_IFDIR | 0o777, created=True)
        self._nodes = {root.inode: root}
        self._known: dict[tuple[InodeT, bytes], InodeT] = {}
        self._last = int(root.inode)
        self._owner = (os.getuid(), os.getgid())
        self._now = time.time_ns()

    # Names.

    def _add(self, parent: InodeT, name: bytes, mode: int) -> Node:
        self._last += 1
        node = Node(InodeT(self._last), parent, name, mode)
        self._nodes[node.inode] = node
        self._known[parent, name] = node.inode
        return node

    def _find(self, parent: InodeT, name: bytes) -> Node | None:
        inode = self._known.get((parent, name))
        if inode is not None:
            return self._nodes[inode]
        if match := _FILE.match(name):
            node = self._add(parent, name, stat.S_IFREG | 0o644)
            node.size = int(match[1])
            return node
        if match := _DIRECTORY.match(name):
            node = self._add(parent, name, stat.S_IFDIR | 0o755)
            node.listed = int(match[1] or 0)
            return node
        return None

    def _create(self, parent: InodeT, name: bytes, mode: int) -> Node:
        if self._find(parent, name) is not None:
            raise FUSEError(errno.EEXIST)
        node = self._add(parent, name, mode)
        node.created = True
        self._nodes[parent].children[name] = node.inode
        return node

    def _drop(self, node: Node) -> None:
        """Forget the node unless somebody still needs it."""
        if node.lookups <= 0 and not node.created:
            self._nodes.pop(node.inode, None)
            if self._known.get((node.parent, node.name)) == node.inode:
                del self._known[node.parent, node.name]

    def _attributes(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.inode
        entry.st_mode = ModeT(node.mode)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = self._owner
        entry.st_size = node.size
        entry.st_blksize = 4096
        entry.st_blocks = (node.size + 511) // 512
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._now
        entry.attr_timeout = entry.entry_timeout = TIMEOUT
        return entry

    def _entry(self, node: Node) -> EntryAttributes:
        node.lookups += 1
        return self._attributes(node)

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._find(parent_inode, name)
        if node is not None:
            return self._entry(node)
        missing = EntryAttributes()
        missing.st_ino = InodeT(0)
        missing.entry_timeout = TIMEOUT
        return missing

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            node = self._nodes.get(inode)
            if node is not None:
                node.lookups -= count
                self._drop(node)

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._create(parent_inode, name, stat.S_IFDIR | mode & ~ctx.umask))

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        node = self._find(parent_inode, name)
        if node is None:
            raise FUSEError(errno.ENOENT)
        self._nodes[parent_inode].children.pop(name, None)
        self._known.pop((parent_inode, name), None)
        node.created = False
        self._drop(node)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        node = self._find(parent_inode, name)
        if node is not None and node.children:
            raise FUSEError(errno.ENOTEMPTY)
        await self.unlink(parent_inode, name, ctx)

    # Attributes.

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._nodes[inode])

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._nodes[inode]
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
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1 << 30
        data.f_files = data.f_ffree = data.f_favail = 1 << 30
        data.f_namemax = 255
        return data

    # Data.

    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_TRUNC:  # libfuse has the kernel leave that to open
            self._nodes[inode].size = 0
        return _opened(inode, flags)

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node = self._create(parent_inode, name, stat.S_IFREG | mode & ~ctx.umask)
        return _opened(node.inode, flags), self._entry(node)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        length = max(0, min(size, self._nodes[InodeT(fh)].size - off))
        return _ZEROS[:length] if length <= len(_ZEROS) else bytes(length)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        node = self._nodes[InodeT(fh)]
        node.size = max(node.size, off + len(buf))
        return len(buf)

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
        directory = self._nodes[InodeT(fh)]
        names = [b"file-0-%d" % number for number in range(directory.listed)]
        names += directory.children
        for position in range(start_id, len(names)):
            node = self._find(directory.inode, names[position])
            assert node is not None
            entry = self._attributes(node)
            if not pyfuse3.readdir_reply(token, FileNameT(names[position]), entry, position + 1):
                self._drop(node)
                break
            node.lookups += 1

    async def releasedir(self, fh: FileHandleT) -> None:
        pass


def _opened(inode: InodeT, flags: int) -> FileInfo:
    # As ninefuse does: one request for each synchronous write.
    return FileInfo(fh=inode, direct_io=bool(flags & os.O_DSYNC))


def main() -> int:
    """Serve until unmounted. Returns 0, or 2 if not called with one mount point."""
    if len(sys.argv) != 2:
        print("usage: python -m ninefuse.bench.null_server MNT", file=sys.stderr)
        return 2
    options = {*pyfuse3.default_options, "fsname=null", "subtype=null"}
    pyfuse3.init(NullOperations(), sys.argv[1], options)
    try:
        trio.run(pyfuse3.main)
    except BaseException:
        pyfuse3.close(unmount=False)
        raise
    pyfuse3.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
