"""A FUSE file system in memory, some of whose answers come only when told.

    python slowfs.py MNT

The file `slow` in its root is as long as anyone needs and reads as `slow_bytes` says, but reads
of it are withheld; so are lookups of names that begin with `stuck`. Each line on stdout says
what is withheld now: `read OFFSET`, `lookup NAME`; the first line is `ready`. The line `release`
on stdin answers all that is withheld, and from then on nothing is.
"""

from __future__ import annotations

import os
import stat
import sys

import pyfuse3
import trio
from memoryfs import MemoryFS, serve

SLOW = b"slow"
SLOW_INODE = 2
STUCK = b"stuck"
SLOW_SIZE = 1 << 30
_FOREVER = 86400.0


def slow_bytes(offset: int, size: int) -> bytes:
    """What the slow file holds from an offset on: the number of each MiB, over and over."""
    return bytes((offset + n >> 20) & 0xFF for n in range(size))


class SlowFS(MemoryFS):
    def __init__(self) -> None:
        # keep_cache: else an open waits, in the kernel, for the reads that are withheld.
        super().__init__(_FOREVER, keep_cache=True)
        slow = self.add(SLOW_INODE, stat.S_IFREG | 0o644, SLOW_SIZE)
        self.give_name(pyfuse3.ROOT_INODE, SLOW, slow)
        self.released = trio.Event()

    async def withhold(self, what: str) -> None:
        if not self.released.is_set():
            print(what, flush=True)
            await self.released.wait()

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name.startswith(STUCK):
            await self.withhold(f"lookup {os.fsdecode(name)}")
        return await super().lookup(parent_inode, name, ctx)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh == SLOW_INODE:
            await self.withhold(f"read {off}")
            return slow_bytes(off, min(size, SLOW_SIZE - off))
        return await super().read(fh, off, size)

    async def obey(self) -> None:
        buffer = b""
        async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
            async for part in stdin:
                buffer += part
                if b"release\n" in buffer:
                    break
        self.released.set()


async def _main(mountpoint: str) -> None:
    file_system = SlowFS()
    await serve(file_system, mountpoint, "slowfs", file_system.obey)


if __name__ == "__main__":
    trio.run(_main, sys.argv[1])
