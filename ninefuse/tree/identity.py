"""What tells a file from a later one that was given its inode number.

A file system gives the number of a removed file to a new one, ext4 to the very next. So
beside (device, inode) a node keeps a *mark* of its file: the birth time where the file
system keeps one; else, where handles outlive everything but the file, the file handle,
which has the inode's generation in it. On an overlayfs neither will do: the first change
of a file of a lower layer copies the file up, and the copy is born anew. Nothing is known
of a file there, and on file systems that keep neither, beyond its number.

While somebody has a file open its number is its own, so marks matter only for files that
the daemon has no descriptor of.

A file is reached by a mount, which may forbid something, and may show what another shows as
well (places.py); a mount is known by its number, as statx(2) has it. That is learned where
devices are.

Locks touched: that of `Mounts`; the dictionary of devices is added to in one step.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from enum import Enum
from typing import NamedTuple
from weakref import WeakValueDictionary

from ninefuse.errors import error
from ninefuse.linux import mountflags
from ninefuse.linux.filesystems import FileSystem, file_handle, file_system_of, uuid_of_file_system
from ninefuse.linux.inodes import Inodes
from ninefuse.linux.mountinfo import place_of
from ninefuse.linux.syscalls import Attributes, open_step, stat_descriptor
from ninefuse.tree.places import Mount, Mounts, hashed

_MANY = 1000  # devices, or rights, that are kept at hand though nothing may need them


class Rights(NamedTuple):
    """Whose a file is and what it allows, as it was seen last: its mark for want of a better."""

    uid: int
    gid: int
    mode: int  # with the type


class Born(NamedTuple):
    """When an inode was born, and which of those it is that have had its number."""

    birth: int  # in nanoseconds
    generation: int


# Birth time in nanoseconds; file handle; rights. None: it was not asked for.
Mark = int | Born | bytes | Rights | None


class _By(Enum):
    BIRTH = "birth time"
    HANDLE = "file handle"
    NOTHING = "nothing"


class Device:
    """A device of the source: its number, and what tells its files apart.

    Attributes:
        number: major, minor; one tuple for all nodes of the device.
        by: what tells its files apart.
        base: what numbers of its files begin from, wherever the device is not the source's own.
        file_system: what lay on it when it was learned.
    """

    __slots__ = ("__weakref__", "base", "by", "file_system", "number")

    def __init__(
        self,
        number: tuple[int, int],
        by: _By,
        identity: bytes,
        file_system: FileSystem | None = None,
    ) -> None:
        self.number = number
        self.by = by
        self.base = hashed(identity)
        self.file_system = file_system

    def __eq__(self, other: object) -> bool:
        return self.number == (other.number if isinstance(other, Device) else other)

    def __hash__(self) -> int:
        return hash(self.number)


class Devices:
    """The devices and mounts that were met below one source directory.

    A device is known for as long as nodes refer to it, and a while longer.

    Attributes:
        hides: what is not to be shown where a mount forbids it (`mountflags.HIDEABLE`).
        inodes: what finds files of the source's device that the client asks for after it has
            forgotten them; None: it does not ask.
        own: the source's device, which is asked for most; None before `begin`.
    """

    def __init__(self) -> None:
        self.hides = 0
        self.inodes: Inodes | None = None
        self._source = b"/"
        self._known: WeakValueDictionary[tuple[int, int], Device] = WeakValueDictionary()
        self.own: Device | None = None
        self._recent: deque[Device] = deque(maxlen=_MANY)  # keeps those just learned
        self._rights: dict[Rights, Rights] = {}  # one object for all nodes with the same
        self.mounts = Mounts()

    def begin(self, fd: int, a: Attributes) -> None:
        """Learn of the source directory, and of its device. Blocks.

        Args:
            fd: the directory, O_PATH will do.
            a: its attributes.
        """
        self._source = os.readlink(b"/proc/self/fd/%d" % fd)
        self.mounts.begin(self._source, a.mount_id)
        self.own = self.learn(fd, a)

    def of(self, a: Attributes) -> Device:
        """The device of a file; of one that was not `learn`-ed nothing but the number."""
        number = (a.dev_major, a.dev_minor)
        device = self._get(number)
        return Device(number, _By.NOTHING, b"%d:%d" % number) if device is None else device

    def mount_of(self, a: Attributes) -> Mount:
        """The mount that a file was reached by; one that was not `learn`-ed forbids all."""
        return self.mounts.get(a.mount_id)

    def aside(self, a: Attributes) -> int:
        """What tells a file from the same one at another place, 0 at the first (places.py)."""
        if a.mount_id == self.mounts.own:
            return 0
        mount = self.mounts.get(a.mount_id)
        return mount.directories if a.kind == stat.S_IFDIR else mount.files

    def shown(self, a: Attributes) -> Attributes:
        """A file's attributes as they are to be shown."""
        hidden = self.hides and self.hides & self.mount_of(a).forbids
        return mountflags.shown(a, hidden) if hidden else a

    def learn(self, fd: int, a: Attributes) -> Device:
        """Find out what tells the files of a device apart, and what its mount forbids. Blocks.

        To be called where a device or a mount may have come to lie: at the source directory, at
        each step to another device, and at each to the root of a mount. Numbers of both are
        given again, too, and mounts come to forbid other things.

        Args:
            fd: any file of the device, O_PATH will do.
            a: its attributes.
        """
        self.mounts.learn(a.mount_id, mountflags.flags_of(fd))
        found = file_system_of(fd)
        if found.is_overlay:
            by = _By.NOTHING
        elif a.has_birth:
            by = _By.BIRTH
        elif found.has_lasting_handles:
            by = _By.HANDLE
        else:
            by = _By.NOTHING
        number = (a.dev_major, a.dev_minor)
        known = self._get(number)
        if known is None or known.by is not by or known.file_system != found:
            known = Device(number, by, _identity(fd, a, found, self._source), found)
            self._known[number] = known
            self._recent.append(known)
            if self.own is not None and self.own.number == number:
                self.own = known
        return known

    def has_births(self, a: Attributes) -> bool:
        """Whether the files of this file's device are told apart by their birth."""
        return self.of(a).by is _By.BIRTH

    def mark(self, a: Attributes, file: int, name: bytes = b"") -> Mark:
        """The mark of a file. Blocks, where marks are file handles, or have to be by a name.

        Args:
            a: the file's attributes.
            file: a descriptor of the file, or of the directory that ``name`` is in.
            name: a name in that directory; a symlink is not followed.
        """
        device = self._get((a.dev_major, a.dev_minor))
        if device is None:
            device = self._meet(a, file, name)
        if device.by is _By.BIRTH:
            if self.inodes is not None and device is self.own:
                return Born(a.birth, self.inodes.generation(a.ino, file, name))
            return a.birth
        if device.by is _By.HANDLE:
            return file_handle(file, name)
        return self.rights(a)

    def open_number(self, inode: int, generation: int | None = None) -> int:
        """An O_PATH descriptor of a file of the source's device, by its inode's number. Blocks.

        While a mount covers a part of the source nobody can tell whether that shows the inode: then
        none is opened.

        Args:
            inode: its number.
            generation: that it must have; None: any.

        Raises:
            OSError: ESTALE, there is none, or it is not looked for; as `Inodes.open`.
        """
        if self.inodes is None or self.mounts.cover_own():
            raise error(errno.ESTALE)
        return self.inodes.open(inode, generation)

    def rights(self, a: Attributes) -> Rights:
        """The rights that attributes tell of."""
        rights = Rights(a.uid, a.gid, a.mode)
        known = self._rights.get(rights)
        if known is None:
            if len(self._rights) >= _MANY:
                self._rights = {}
            known = self._rights.setdefault(rights, rights)
        return known

    def _get(self, number: tuple[int, int]) -> Device | None:
        own = self.own
        if own is not None and own.number == number:
            return own
        return self._known.get(number)

    def _meet(self, a: Attributes, file: int, name: bytes) -> Device:
        """Learn a file's device, where no step led to it: it was seen in a listing, or made."""
        if not name:
            return self.learn(file, a)
        fd = open_step(file, name)
        try:
            now = stat_descriptor(fd)
            if (now.dev_major, now.dev_minor) == (a.dev_major, a.dev_minor):
                return self.learn(fd, now)
        finally:
            os.close(fd)
        return self.of(a)  # something else is there by now


def _identity(fd: int, a: Attributes, found: FileSystem, source: bytes) -> bytes:
    """What a file system is known by from one mount to the next. Blocks."""
    if not found.is_made_anew:
        # Some have their device's number for an id, which is another after the next boot.
        major, minor = a.dev_major, a.dev_minor
        if found.id not in (0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12):
            return b"id %x %x" % found
        if a.kind in (stat.S_IFDIR, stat.S_IFREG) and (uuid := uuid_of_file_system(fd)):
            return b"uuid " + uuid
    return b"at " + place_of(fd, (a.dev_major, a.dev_minor), source)
