"""A small FUSE file system in memory, some of whose answers come only when told.

    python slowfs.py MNT

The file `slow` in its root is as long as anyone needs and reads as `slow_bytes` says, but reads
of it are withheld; so are lookups of names that begin with `stuck`. Each line on stdout says
what is withheld now: `read OFFSET`, `lookup NAME`; the first line is `ready`. The line `release`
on stdin answers all that is withheld, and from then on nothing is.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Sequence

import pyfuse3
import trio

SLOW = b"slow"
SLOW_INODE = 2
STUCK = b"stuck"
SLOW_SIZE = 1 << 30
_FOREVER = 86400.0


def slow_bytes(offset: int, size: int) -> bytes:
    """What the slow file holds from an offset on: the number of each MiB, over and over."""
    return bytes((offset + n >> 20) & 0xFF for n in range(size))


class File:
    def __init__(self, number: int, mode: int, size: int = 0) -> None:
        self.attributes = pyfuse3.EntryAttributes()
        self.attributes.st_ino = number
        self.attributes.st_mode = mode
        self.attributes.st_nlink = 1
        self.attributes.st_uid = os.geteuid()
        self.attributes.st_gid = os.getegid()
        self.attributes.st_size = size
        self.attributes.st_blksize = 4096
        self.attributes.attr_timeout = _FOREVER
        self.attributes.entry_timeout = _FOREVER
        now = time.time_ns()
        self.attributes.st_atime_ns = now
        self.attributes.st_mtime_ns = now
        self.attributes.st_ctime_ns = now
        self.data = bytearray()


class SlowFS(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.files = {
            pyfuse3.ROOT_INODE: File(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755),
            SLOW_INODE: File(SLOW_INODE, stat.S_IFREG | 0o644, SLOW_SIZE),
        }
        self.names = {(pyfuse3.ROOT_INODE, SLOW): SLOW_INODE}  # (parent, name) -> number
        self.released = trio.Event()

    async def withhold(self, what: str) -> None:
        if not self.released.is_set():
            print(what, flush=True)
            await self.released.wait()

    def find(self, parent: int, name: bytes) -> File:
        if (parent, name) not in self.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.files[self.names[parent, name]]

    def make(self, parent: int, name: bytes, mode: int) -> File:
        if (parent, name) in self.names:
            raise pyfuse3.FUSEError(errno.EEXIST)
        number = max(self.files) + 1
        self.files[number] = File(number, mode)
        self.names[parent, name] = number
        return self.files[number]

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name.startswith(STUCK):
            await self.withhold(f"lookup {os.fsdecode(name)}")
        return self.find(parent_inode, name).attributes

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self.files[inode].attributes

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        file = self.files[inode]
        if fields.update_size:
            del file.data[attr.st_size :]
            file.data.extend(bytes(attr.st_size - len(file.data)))
            file.attributes.st_size = attr.st_size
        if fields.update_mode:
            file.attributes.st_mode = attr.st_mode
        return file.attributes

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        file = self.make(parent_inode, name, mode)
        return pyfuse3.FileInfo(fh=file.attributes.st_ino, keep_cache=True), file.attributes

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self.make(parent_inode, name, mode | stat.S_IFDIR).attributes

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.find(parent_inode, name)
        del self.names[parent_inode, name]

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self.find(parent_inode_old, name_old)
        number = self.names.pop((parent_inode_old, name_old))
        self.names[parent_inode_new, name_new] = number

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        # keep_cache: else an open waits, in the kernel, for the reads that are withheld.
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh == SLOW_INODE:
            await self.withhold(f"read {off}")
            return slow_bytes(off, min(size, SLOW_SIZE - off))
        return bytes(self.files[fh].data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self.files[fh]
        file.data.extend(bytes(max(0, off - len(file.data))))
        file.data[off : off + len(buf)] = buf
        file.attributes.st_size = len(file.data)
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        # In the order of their numbers, which a change of the directory does not touch.
        entries = sorted((n, name) for (parent, name), n in self.names.items() if parent == fh)
        for number, name in entries:
            if number > start_id:
                attributes = self.files[number].attributes
                if not pyfuse3.readdir_reply(token, name, attributes, number):
                    break

    async def releasedir(self, fh: int) -> None:
        pass

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1 << 20
        data.f_files = data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 255
        return data


async def _obey(file_system: SlowFS) -> None:
    buffer = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
        async for part in stdin:
            buffer += part
            if b"release\n" in buffer:
                break
    file_system.released.set()


async def _main(mountpoint: str) -> None:
    file_system = SlowFS()
    # default_permissions: the kernel asks neither us nor anybody else.
    pyfuse3.init(file_system, mountpoint, {"fsname=slowfs", "default_permissions"})
    print("ready", flush=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, file_system)
            await pyfuse3.main(min_tasks=4, max_tasks=1000)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    trio.run(_main, sys.argv[1])
