"""What tells a file from a later one that was given its inode number.

A file system gives the number of a removed file to a new one, ext4 to the very next. So
beside (device, inode) a node keeps a *mark* of its file: the birth time where the file
system keeps one; else, where handles outlive everything but the file, the file handle,
which has the inode's generation in it. On an overlayfs neither will do: the first change
of a file of a lower layer copies the file up, and the copy is born anew. Nothing is known
of a file there, and on file systems that keep neither, beyond its number.

While somebody has a file open its number is its own, so marks matter only for files that
the daemon has no descriptor of.

A file is reached by a mount, which may forbid something (mountflags.py); a mount is known by
its number, as statx(2) has it. That is learned where devices are.

Locks touched: none; the dictionaries of devices and mounts are added to in one step.
"""

from __future__ import annotations

from enum import Enum

from ninefuse import mountflags
from ninefuse.syscalls import Attributes, file_handle, file_handles_last, is_overlayfs

Mark = int | bytes | None  # birth time in nanoseconds; file handle; nothing known


class _By(Enum):
    BIRTH = "birth time"
    HANDLE = "file handle"
    NOTHING = "nothing"


class Device:
    """A device of the source: its number, and what tells its files apart."""

    __slots__ = ("by", "number")

    def __init__(self, number: tuple[int, int], by: _By) -> None:
        self.number = number  # major, minor; one tuple for all nodes of the device
        self.by = by


class Mount:
    """A mount of the source, or in it: what it forbids now."""

    __slots__ = ("forbids",)

    def __init__(self, forbids: int) -> None:
        self.forbids = forbids


_UNKNOWN = Mount(mountflags.HIDEABLE)


class Devices:
    """The devices and mounts that were met below one source directory.

    Attributes:
        hides: what is not to be shown where a mount forbids it (`mountflags.HIDEABLE`).
    """

    def __init__(self) -> None:
        self.hides = 0
        self._known: dict[tuple[int, int], Device] = {}
        self._mounts: dict[int, Mount] = {}

    def of(self, a: Attributes) -> Device:
        """The device of a file; files of one that was not `learn`-ed have no marks."""
        number = (a.dev_major, a.dev_minor)
        device = self._known.get(number)
        return Device(number, _By.NOTHING) if device is None else device

    def mount_of(self, a: Attributes) -> Mount:
        """The mount that a file was reached by; one that was not `learn`-ed forbids all."""
        return self._mounts.get(a.mount_id, _UNKNOWN)

    def shown(self, a: Attributes) -> Attributes:
        """A file's attributes as they are to be shown."""
        hidden = self.hides and self.hides & self.mount_of(a).forbids
        return mountflags.shown(a, hidden) if hidden else a

    def learn(self, fd: int, a: Attributes) -> None:
        """Find out what tells the files of a device apart, and what its mount forbids. Blocks.

        To be called where a device or a mount may have come to lie: at the source directory, at
        each step to another device, and at each to the root of a mount. Numbers of both are
        given again, too, and mounts come to forbid other things.

        Args:
            fd: any file of the device, O_PATH will do.
            a: its attributes.
        """
        forbids = mountflags.flags_of(fd)
        mount = self._mounts.get(a.mount_id)
        if mount is None:
            self._mounts[a.mount_id] = Mount(forbids)
        elif not a.mount_id:  # which is all of them, where the kernel does not tell
            mount.forbids |= forbids
        else:
            mount.forbids = forbids
        if is_overlayfs(fd):
            by = _By.NOTHING
        elif a.has_birth:
            by = _By.BIRTH
        elif file_handles_last(fd):
            by = _By.HANDLE
        else:
            by = _By.NOTHING
        number = (a.dev_major, a.dev_minor)
        known = self._known.get(number)
        if known is None or known.by is not by:
            self._known[number] = Device(number, by)

    def has_births(self, a: Attributes) -> bool:
        """Whether the files of this file's device are told apart by their birth."""
        return self.of(a).by is _By.BIRTH

    def mark(self, a: Attributes, file: int, name: bytes = b"") -> Mark:
        """The mark of a file. Blocks, where marks are file handles.

        Args:
            a: the file's attributes.
            file: a descriptor of the file, or of the directory that ``name`` is in.
            name: a name in that directory; a symlink is not followed.
        """
        by = self.of(a).by
        if by is _By.BIRTH:
            return a.birth
        if by is _By.HANDLE:
            return file_handle(file, name)
        return None
