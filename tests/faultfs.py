"""A FUSE file system in memory that fails, or answers short, when told.

    python faultfs.py MNT

What to do is said on stdin, which is a socket: each line is a JSON object and gets one in
answer, on the same socket, once it is obeyed. (A file or an attribute of its own would not do:
after one ENOSYS the kernel answers some requests by itself, for good.) stdout says `ready`.

    {"operation": "fsync", "errno": 5, "short": null, "skip": 0, "times": 1}

arms a fault beside those that are armed: the operation (`*`: any of `STEPS`), after `skip` of
them, fails with the errno, or reads and writes so many bytes at most; `times`, or always if that
is null. `{"clear": true}` takes all faults away; `{"direct": true}` has files that are opened
from then on read and written without the kernel's cache; `{}` does nothing. Each answer says how
often the faults that were armed have met something: `{"met": 1}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pyfuse3
import trio
from memoryfs import MemoryFS, serve

# What a request to the source is made of; that something is over, the kernel says at its leisure.
ENDS = ("release", "releasedir")
STEPS = (
    *("lookup", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "readlink"),
    *("getattr", "setattr", "getxattr", "setxattr", "listxattr", "removexattr", "statfs"),
    *("create", "open", "read", "write", "fsync", "flush", "opendir", "readdir", "fsyncdir"),
)


@dataclass
class Fault:
    operation: str
    errno: int | None = None
    short: int | None = None
    skip: int = 0
    times: int | None = None
    met: int = 0

    def meets(self, operation: str) -> bool:
        """Whether this operation is its victim."""
        if self.operation != operation and (self.operation != "*" or operation not in STEPS):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times == self.met:
            return False
        self.met += 1
        return True


class FaultFS(MemoryFS):
    def __init__(self) -> None:
        # Nothing is believed, so that each operation comes here.
        super().__init__(0.0, keep_cache=False)
        self.faults: list[Fault] = []
        self.direct = False

    def meet(self, operation: str) -> int:
        """Fail as told, or say how many bytes this operation may read or write."""
        for fault in self.faults:
            if fault.meets(operation):
                if fault.errno is not None:
                    raise pyfuse3.FUSEError(fault.errno)
                if fault.short is not None:
                    return fault.short
        return sys.maxsize

    def open_as(self, number: int) -> pyfuse3.FileInfo:
        info = super().open_as(number)
        info.direct_io = self.direct
        return info

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await super().read(fh, off, min(size, self.meet("read")))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await super().write(fh, off, buf[: self.meet("write")])

    def command(self, words: dict[str, Any]) -> dict[str, int]:
        met = sum(fault.met for fault in self.faults)
        if "operation" in words:
            self.faults.append(Fault(**words))
        elif "direct" in words:
            self.direct = words["direct"]
        elif "clear" in words:
            self.faults.clear()
        return {"met": met}

    async def obey(self) -> None:
        buffer = b""
        async with trio.lowlevel.FdStream(os.dup(0)) as stream:
            async for part in stream:
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    answer = self.command(json.loads(line))
                    await stream.send_all(json.dumps(answer).encode() + b"\n")


def _failing(operation: str) -> Callable[..., Awaitable[Any]]:
    """A callback that meets the faults before it does what it does."""
    function: Callable[..., Awaitable[Any]] = getattr(MemoryFS, operation)

    async def callback(self: FaultFS, *args: Any) -> Any:
        self.meet(operation)
        return await function(self, *args)

    return callback


for _name in {*STEPS, *ENDS} - {"read", "write"}:
    setattr(FaultFS, _name, _failing(_name))


async def _main(mountpoint: str) -> None:
    file_system = FaultFS()
    await serve(file_system, mountpoint, "faultfs", file_system.obey)


if __name__ == "__main__":
    trio.run(_main, sys.argv[1])
