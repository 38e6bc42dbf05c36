"""A directory that a server exports, and the guest's mount of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest.machine import HOST, Guest, Job
from guest.servers import Server

MSIZE = 256 * 1024
CACHES = ("none", "mmap", "loose")  # v9fs's ways to cache

_numbers = itertools.count()


def mount_options(server: Server, cache: str = "none", *options: str) -> str:
    """Return the options of a mount of what a server exports, whatever the transport."""
    who = ("version=9p2000.L", "uname=root", f"aname={server.aname}")
    return ",".join((*who, f"msize={MSIZE}", f"cache={cache}", *options))


@dataclass
class Export:
    """A directory that a server exports and the guest has mounted.

    source: the directory, on the host. where: the mount, in the guest.
    """

    guest: Guest
    server: Server
    source: Path
    where: str = ""

    def mount(self, cache: str = "none", *options: str, trans: str = "tcp") -> None:
        """Mount it in the guest, at a new place."""
        where = f"/tmp/mnt{next(_numbers)}"
        text = mount_options(self.server, cache, *options)
        if trans == "fd":
            self.guest.call("mount_by_descriptor", HOST, self.server.port, where, text)
        else:
            self.guest.call("mount", HOST, where, f"trans=tcp,port={self.server.port},{text}")
        self.where = where

    def unmount(self) -> None:
        self.guest.call("unmount", self.where)
        self.where = ""

    def settle(self) -> None:
        """Have the guest write what it holds back (cache=loose does)."""
        self.guest.call("write_back")

    def path(self, name: str) -> str:
        """Return the path of a name, in the guest."""
        return f"{self.where}/{name}"

    def call(self, function: str, name: str, *arguments: object, seconds: float = 60.0) -> Any:
        """Call a function in the guest on a name of the export."""
        return self.guest.call(function, self.path(name), *arguments, seconds=seconds)

    def begin(self, function: str, name: str, *arguments: object) -> Job:
        return self.guest.begin(function, self.path(name), *arguments)
