"""The mount table: what is mounted below a directory, kept up to date; a descriptor's mount.

A bind mount may show a daemon's own mount inside its source. Were it to ask there for anything,
it would wait for itself: for ever, where the dispatcher makes the call, or where the request
holds a lock that the one behind it waits for.

Locks touched: a mutex of its own, held while the table is asked and read, with no other lock
outside it but the rename lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from ninefuse.errors import error
from ninefuse.linux.syscalls import PollFd, device_behind, is_ready, stat_descriptor

_MOUNTINFO = "/proc/self/mountinfo"

OURS = "fuse.ninefuse"  # the type of our mounts, unless one has a subtype= of its own


class MountLine(NamedTuple):
    """A line of mountinfo, as far as we need it (proc(5))."""

    device: bytes  # major:minor
    point: bytes
    kind: bytes  # of file system
    options: bytes  # of the file system itself, separated by commas
    number: bytes = b""  # the mount's
    root: bytes = b"/"  # what of the file system it shows
    flags: bytes = b""  # options of the mount, separated by commas
    parent: bytes = b""  # the number of the mount that it is mounted on
    source: bytes = b""  # what is mounted, as its maker says


def lines_of(table: bytes) -> Iterator[MountLine]:
    """The lines of mountinfo; of several on one mount point the last is on top."""
    for line in table.split(b"\n")[:-1]:
        mount, _, file_system = line.partition(b" - ")
        number, parent, device, root, point, flags = (mount.split(b" ", 6) + [b""] * 6)[:6]
        kind, source, options = (file_system.split(b" ") + [b""] * 3)[:3]
        root, point, source = map(_unescaped, (root, point, source))
        yield MountLine(device, point, kind, options, number, root, flags, parent, source)


def lines() -> Iterator[MountLine]:
    """The lines of the mount table of this process's mount namespace, as it is now."""
    with open(_MOUNTINFO, "rb") as file:
        return lines_of(file.read())


def _unescaped(path: bytes) -> bytes:
    if b"\\" not in path:
        return path
    return path.decode("unicode_escape").encode("latin-1")


def on_top(path: str) -> MountLine | None:
    """What is mounted on top at a real path; None where nothing is."""
    top = None
    for line in lines():
        if line.point == os.fsencode(path):
            top = line
    return top


def kind_at(path: str) -> str:
    """The type of what is mounted on top at a real path; "" where nothing is."""
    line = on_top(path)
    return os.fsdecode(line.kind) if line else ""


def connection_at(path: str) -> int | None:
    """The number of the FUSE connection that is mounted on top at a real path; None: nothing is.

    It is the device's minor number. The mount is not asked, which may be the caller's own.
    """
    line = on_top(path)
    return int(line.device.partition(b":")[2]) if line else None


def of_file(fd: int) -> MountLine | None:
    """The mount that an open file was reached by; None where the table does not show it.

    It is found by its number: names and devices may be ambiguous (bind mounts, mounts on top of
    each other).
    """
    number = _told_of(fd, b"mnt_id")
    return next((line for line in lines() if line.number == number), None)


def _told_of(fd: int, what: bytes) -> bytes:
    """A number that the kernel tells of an open file (proc(5), fdinfo); empty: it does not."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        found = re.search(rb"^%s:\t(\d+)$" % what, file.read(), re.M)
    return found[1] if found else b""


def shows_all(directory: int) -> bool:
    """Whether an open directory is the root of its mount, and that shows all of a file system."""
    line = of_file(directory)
    return line is not None and line.root == b"/" and stat_descriptor(directory).is_mount_root


def connection_of(fd: int) -> int | None:
    """The number of the FUSE connection that an open device has.

    None where the kernel does not say (6.18 does, old ones do not), or there is none.
    """
    try:
        number = _told_of(fd, b"fuse_connection")
    except OSError:
        return None
    return int(number) if number else None


def of_device(fd: int) -> tuple[str, frozenset[str]] | None:
    """Mount point and options of the file system that an open FUSE device serves.

    None where the table does not show it, as in another mount namespace, or the kernel does not
    say which it is, or it is no FUSE device.
    """
    number = connection_of(fd)
    if number is None:
        return None
    for line in lines():
        if line.device == b"0:%d" % number:
            return os.fsdecode(line.point), frozenset(os.fsdecode(line.options).split(","))
    return None


def place_of(fd: int, device: tuple[int, int], source: bytes) -> bytes:
    """Where in a source the file system of an open file is mounted: the same after each boot.

    Args:
        fd: a file of it.
        device: the device that the file is on (major, minor).
        source: the path of the source directory.

    Returns:
        The path below the source, of several that of the mount which shows most, or the first in
        order; empty where it is mounted at the source or above. If the device is one of several
        that a single mount shows, as of an overlayfs's layers, their distance from the mount's
        own is added.
    """
    table = list(lines())
    prefix = source.rstrip(b"/") + b"/"
    distance = 0
    points = [(line.root, line.point) for line in table if line.device == b"%d:%d" % device]
    if not points:
        number = _told_of(fd, b"mnt_id")
        for line in table:
            if line.number == number:
                distance = device[1] - int(line.device.partition(b":")[2])
                points = [(one.root, one.point) for one in table if one.device == line.device]
    below = [(len(root), point) for root, point in points if point.startswith(prefix)]
    _, point = min(below, default=(0, b""))
    return b"%s +%d" % (point.removeprefix(prefix), distance)


def _all_of(table: int) -> bytes:
    found = b""
    while part := os.pread(table, 1 << 16, len(found)):
        found += part
    return found


class MountTable:
    """The mount table, read again when it has changed. One thread at a time may ask.

    Attributes:
        close: ends it.
        version: how often it was read.
    """

    def __init__(self) -> None:
        # Kept open: a change of the table makes it ready for POLLPRI, until it is read.
        self._table = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._table)
        self._pollfd = PollFd(self._table, select.POLLPRI, 0)
        self._address = ctypes.byref(self._pollfd)
        self.version = 0
        self._lines = self._read()

    def lines(self) -> dict[int, MountLine]:
        """Its lines, by the mount's number."""
        if is_ready(self._address):
            self._lines = self._read()
        return self._lines

    def _read(self) -> dict[int, MountLine]:
        self.version += 1
        return {int(line.number): line for line in lines_of(_all_of(self._table))}


def _nothing() -> None:
    pass


class MountsBelow:
    """Knows what is mounted below a directory, by asking when that has changed.

    Attributes:
        on_change: called when the table was read anew, by whoever noticed; it may not wait.

    Args:
        directory: an absolute path. Where it cannot be followed in the table (it was moved,
            or is reached through another mount namespace), this knows nothing of it.
    """

    def __init__(self, directory: str) -> None:
        real = os.fsencode(os.path.realpath(directory))
        self._prefix = real if real.endswith(b"/") else real + b"/"
        self._table = MountTable()
        self._version = 0  # of the table, that was looked at
        # Asking tells of a change once: whoever asks next waits for what was read then.
        self._lock = threading.Lock()
        self._writable: frozenset[bytes] = frozenset()
        self._flags: dict[bytes, frozenset[bytes]] = {}
        self.on_change: Callable[[], None] = _nothing
        self._devices: frozenset[bytes] = frozenset()
        self._now()

    def has(self, device: bytes) -> bool:
        """Whether a file system of this device (major:minor) is below it. Costs a microsecond."""
        return device in self._now()

    def is_writable(self, device: bytes) -> bool:
        """Whether a file system of this device is mounted, anywhere, not read-only itself."""
        self._now()
        return device in self._writable

    def flags_of(self, device: bytes) -> frozenset[bytes]:
        """The flags that all mounts of a device had when the table was read last."""
        return self._flags.get(device, frozenset())

    def _now(self) -> frozenset[bytes]:
        with self._lock:
            table = self._table.lines()
            if self._version != self._table.version:
                self._version = self._table.version
                self._look(table.values())
            return self._devices

    def _look(self, table: Collection[MountLine]) -> None:
        self._writable = frozenset(a.device for a in table if a.options.split(b",")[0] == b"rw")
        self._flags = {}
        for line in table:
            words = frozenset(line.flags.split(b","))
            self._flags[line.device] = words & self._flags.get(line.device, words)
        self._devices = frozenset(a.device for a in table if a.point.startswith(self._prefix))
        self.on_change()


class OwnMount:
    """Keeps a daemon out of its own mount.

    Args:
        below: what is mounted in the source.
        minor: the number of the mount's device; its major one is 0, as of all FUSE mounts.
    """

    def __init__(self, below: MountsBelow, minor: int) -> None:
        self._below = below
        self._device = 0, minor
        self._text = b"0:%d" % minor

    def refuse(self, directory: int, name: bytes) -> None:
        """Raise ELOOP if a name in the source leads into the mount; the mount is not asked.

        The errno is overlayfs's for a layer that is found inside itself. EDEADLK would do,
        but programs know it from locks alone.
        """
        if self._below.has(self._text) and device_behind(directory, name) == self._device:
            raise error(errno.ELOOP)
