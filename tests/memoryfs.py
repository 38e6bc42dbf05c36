"""A small FUSE file system in memory: what slowfs.py and faultfs.py do their harm to.

It does what a source needs, as far as its kernel asks for it; it keeps no access times and
never gives a number again.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import pyfuse3
import trio


class File:
    """A file of any type.

    Args:
        number: its inode number.
        mode: type and permission bits.
        size: how long it seems; its data is what was written.
        timeout: for how many seconds the kernel may believe in its name and attributes.
    """

    def __init__(self, number: int, mode: int, size: int, timeout: float) -> None:
        self.attributes = pyfuse3.EntryAttributes()
        self.attributes.st_ino = number
        self.attributes.st_mode = mode
        self.attributes.st_nlink = 1
        self.attributes.st_uid = os.geteuid()
        self.attributes.st_gid = os.getegid()
        self.attributes.st_size = size
        self.attributes.st_blksize = 4096
        self.attributes.attr_timeout = timeout
        self.attributes.entry_timeout = timeout
        now = time.time_ns()
        self.attributes.st_atime_ns = now
        self.attributes.st_mtime_ns = now
        self.attributes.st_ctime_ns = now
        self.data = bytearray()
        self.target = b""  # of a symlink
        self.xattrs: dict[bytes, bytes] = {}

    def resize(self, size: int) -> None:
        """Cut it, or add zeros."""
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.changed()

    def changed(self) -> None:
        """Its data has changed."""
        self.attributes.st_size = len(self.data)
        self.attributes.st_blocks = -(-len(self.data) // 512)
        self.attributes.st_mtime_ns = self.attributes.st_ctime_ns = time.time_ns()


class Name(NamedTuple):
    """What a name leads to, and its place in the listing of its directory."""

    number: int
    place: int


class MemoryFS(pyfuse3.Operations):
    """The file system.

    Args:
        timeout: see `File`.
        keep_cache: whether the kernel keeps the data it has of a file when that is opened.
    """

    def __init__(self, timeout: float, keep_cache: bool) -> None:
        super().__init__()
        self._timeout = timeout
        self._keep_cache = keep_cache
        self._places = itertools.count(1)
        self.files: dict[int, File] = {}
        self.names: dict[tuple[int, bytes], Name] = {}  # (parent, name)
        self.add(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755)

    def add(self, number: int, mode: int, size: int = 0) -> File:
        self.files[number] = File(number, mode, size, self._timeout)
        return self.files[number]

    def give_name(self, parent: int, name: bytes, file: File) -> None:
        self.names[parent, name] = Name(file.attributes.st_ino, next(self._places))

    def make(self, parent: int, name: bytes, mode: int) -> File:
        if (parent, name) in self.names:
            raise pyfuse3.FUSEError(errno.EEXIST)
        file = self.add(max(self.files) + 1, mode)
        self.give_name(parent, name, file)
        return file

    def find(self, parent: int, name: bytes) -> File:
        if (parent, name) not in self.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.files[self.names[parent, name].number]

    def opened(self, fh: int) -> File:
        """The file behind a handle, which is its number."""
        if fh not in self.files:
            raise pyfuse3.FUSEError(errno.EBADF)  # the kernel's own, if it was told ENOSYS
        return self.files[fh]

    def open_as(self, number: int) -> pyfuse3.FileInfo:
        """What an open is answered."""
        return pyfuse3.FileInfo(fh=number, keep_cache=self._keep_cache)

    # Names

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self.find(parent_inode, name).attributes

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self.make(parent_inode, name, mode).attributes

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self.make(parent_inode, name, mode | stat.S_IFDIR).attributes

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        file = self.make(parent_inode, name, stat.S_IFLNK | 0o777)
        file.target = target
        file.attributes.st_size = len(target)
        return file.attributes

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        file = self.files[inode]
        if (new_parent_inode, new_name) in self.names:
            raise pyfuse3.FUSEError(errno.EEXIST)
        self.give_name(new_parent_inode, new_name, file)
        file.attributes.st_nlink += 1
        return file.attributes

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.find(parent_inode, name).attributes.st_nlink -= 1
        del self.names[parent_inode, name]

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        number = self.find(parent_inode, name).attributes.st_ino
        if any(parent == number for parent, _ in self.names):
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        await self.unlink(parent_inode, name, ctx)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        file = self.find(parent_inode_old, name_old)
        old = self.names.get((parent_inode_new, name_new))
        if old is not None and self.files[old.number] is not file:
            remove = self.rmdir if stat.S_ISDIR(file.attributes.st_mode) else self.unlink
            await remove(parent_inode_new, name_new, ctx)
        place = self.names.pop((parent_inode_old, name_old))
        self.names[parent_inode_new, name_new] = place

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.files[inode].target

    # Attributes

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
        now = file.attributes
        now.st_ctime_ns = time.time_ns()
        if fields.update_size:
            file.resize(attr.st_size)
        if fields.update_mode:
            now.st_mode = attr.st_mode
        if fields.update_uid:
            now.st_uid = attr.st_uid
        if fields.update_gid:
            now.st_gid = attr.st_gid
        if fields.update_atime:
            now.st_atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            now.st_mtime_ns = attr.st_mtime_ns
        return now

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name not in self.files[inode].xattrs:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return self.files[inode].xattrs[name]

    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self.files[inode].xattrs[name] = value

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return list(self.files[inode].xattrs)

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if self.files[inode].xattrs.pop(name, None) is None:
            raise pyfuse3.FUSEError(errno.ENODATA)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1 << 20
        data.f_files = data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 255
        return data

    # Files

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        file = self.make(parent_inode, name, mode)
        return self.open_as(file.attributes.st_ino), file.attributes

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return self.open_as(inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return bytes(self.opened(fh).data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self.opened(fh)
        file.data.extend(bytes(max(0, off - len(file.data))))
        file.data[off : off + len(buf)] = buf
        file.changed()
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass

    # Directories

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        self.opened(fh)
        # In the order in which they were made, which a change of the directory does not touch.
        entries = [
            (place, name, number)
            for (parent, name), (number, place) in self.names.items()
            if parent == fh and place > start_id
        ]
        for place, name, number in sorted(entries):
            if not pyfuse3.readdir_reply(token, name, self.files[number].attributes, place):
                break

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    async def releasedir(self, fh: int) -> None:
        pass


async def serve(
    file_system: MemoryFS, mountpoint: str, name: str, obey: Callable[[], Awaitable[None]]
) -> None:
    """Mount a file system, say `ready` on stdout, and serve it and its master until its end."""
    # default_permissions: the kernel asks neither us nor anybody else.
    pyfuse3.init(file_system, mountpoint, {f"fsname={name}", "default_permissions"})
    print("ready", flush=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey)
            await pyfuse3.main(min_tasks=4, max_tasks=1000)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)
