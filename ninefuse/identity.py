"""What tells a file from a later one that was given its inode number.

A file system gives the number of a removed file to a new one, ext4 to the very next. So
beside (device, inode) a node keeps a *mark* of its file: the birth time where the file
system keeps one; else, where handles outlive everything but the file, the file handle,
which has the inode's generation in it. On an overlayfs neither will do: the first change
of a file of a lower layer copies the file up, and the copy is born anew. Nothing is known
of a file there, and on file systems that keep neither, beyond its number.

While somebody has a file open its number is its own, so marks matter only for files that
the daemon has no descriptor of.

Locks touched: none; the dictionary of devices is added to in one step.
"""

from __future__ import annotations

from enum import Enum

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


class Devices:
    """The devices that were met below one source directory."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Device] = {}

    def of(self, a: Attributes) -> Device:
        """The device of a file; files of one that was not `learn`-ed have no marks."""
        number = (a.dev_major, a.dev_minor)
        device = self._known.get(number)
        return Device(number, _By.NOTHING) if device is None else device

    def learn(self, fd: int, a: Attributes) -> None:
        """Find out what tells the files of a device apart. Blocks.

        To be called where a device may have come to lie: at the source directory, and at
        each step to another device. Numbers of devices are given again, too.

        Args:
            fd: any file of the device, O_PATH will do.
            a: its attributes.
        """
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
