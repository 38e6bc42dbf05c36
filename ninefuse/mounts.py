"""The mount table: what is mounted below a directory, kept up to date; a descriptor's mount.

Locks touched: none.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
from collections.abc import Iterator

from ninefuse.syscalls import PollFd, is_ready

_MOUNTINFO = "/proc/self/mountinfo"


def fields_of(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Device (major:minor) and mount point of each line of mountinfo (proc(5))."""
    for line in table.split(b"\n")[:-1]:
        fields = line.split(b" ", 5)
        yield fields[2], fields[4].decode("unicode_escape").encode("latin-1")


def mounts_below(directory: str) -> list[bytes]:
    """The mount points below a directory, as its path is in the mount table."""
    prefix = os.fsencode(directory).rstrip(b"/") + b"/"
    with open(_MOUNTINFO, "rb") as table:
        return [point for _, point in fields_of(table.read()) if point.startswith(prefix)]


def kind_at(path: str) -> str:
    """The type of what is mounted on top at a real path; "" where nothing is."""
    with open(_MOUNTINFO, "rb") as file:
        table = file.read()
    kind = b""
    for line in table.splitlines(keepends=True):
        ((_, point),) = fields_of(line)
        if point == os.fsencode(path):
            kind = line.partition(b" - ")[2].split()[0]
    return os.fsdecode(kind)


def of_device(fd: int) -> tuple[str, frozenset[str]] | None:
    """Mount point and options of the file system that an open FUSE device serves.

    None where the table does not show it, as in another mount namespace, or the kernel does not
    say which it is (6.18 does, old ones do not), or it is no FUSE device.
    """
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            found = re.search(rb"^fuse_connection:\t(\d+)$", file.read(), re.M)
        with open(_MOUNTINFO, "rb") as file:
            table = file.read()
    except OSError:
        return None
    for line in table.splitlines(keepends=True):
        ((device, point),) = fields_of(line)
        if found is not None and device == b"0:" + found[1]:
            options = line.partition(b" - ")[2].split()[2]
            return os.fsdecode(point), frozenset(os.fsdecode(options).split(","))
    return None


class MountsBelow:
    """Knows whether anything is mounted below a directory, by asking when that has changed.

    Args:
        directory: an absolute path. Where it cannot be followed in the table (it was moved,
            or is reached through another mount namespace), this knows nothing of it.
    """

    def __init__(self, directory: str) -> None:
        real = os.fsencode(os.path.realpath(directory))
        self._prefix = real if real.endswith(b"/") else real + b"/"
        # Kept open: a change of the table makes it ready for POLLPRI, until it is read.
        self._table = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._pollfd = PollFd(self._table, select.POLLPRI, 0)
        self._address = ctypes.byref(self._pollfd)
        self._none = self._look()

    def none(self) -> bool:
        """Whether nothing is mounted below it. Costs a microsecond."""
        if is_ready(self._address):
            self._none = self._look()
        return self._none

    def _look(self) -> bool:
        table = b""
        while part := os.pread(self._table, 1 << 16, len(table)):
            table += part
        return not any(point.startswith(self._prefix) for _, point in fields_of(table))
