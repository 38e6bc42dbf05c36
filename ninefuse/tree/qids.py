"""qids: the numbers by which 9P, and the users of the mount, tell files apart.

A qid path stands for one file of the source. It is the file's own inode number
wherever that is possible, since `EntryAttributes.st_ino` of pyfuse3 is both the FUSE
nodeid and the inode number that users see. Files of other devices mounted below the
source, and those whose number is taken, are mapped apart: into the numbers from 2**52 to
2**53, since some programs (node.js) keep them in a double and others (borg, tar -g) take a
file for another when its number has changed.

    0 and 51 bits  a file of another device: what is hashed from its file system, plus its own
                   inode number. So it stays the same over mounts and boots, in whatever order
                   files are looked at.
    10 and 50 bits  a file of the source's own device whose number would be one of these, or 1;
                   a directory that a bind mount shows at a second place
    11 and 50 bits  a name of which no more is known than the number it is listed with

Two files meet at one number next to never. One is then given another, for as long as it is
known: the only ones that are remembered.

Locks touched: none; the numbers given one by one are guarded by a mutex of their own.
"""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from typing import NamedTuple

from ninefuse.linux.syscalls import Attributes
from ninefuse.tree.identity import Device, Devices
from ninefuse.tree.places import hashed

ROOT_NODEID = 1  # FUSE's fixed number for the root of a mount

_GIVEN_BITS = 52
_FOREIGN_BITS = 51
_FEW_BITS = 50
_FOREIGN = 1 << _GIVEN_BITS
_OWN = _FOREIGN | 1 << _FOREIGN_BITS
_UNKNOWN = _OWN | 1 << _FEW_BITS
_MANY = 10_000  # numbers given one by one, of which an emptied dictionary is worth making anew


class Qid(NamedTuple):
    """What 9P says a file is (Plan 9 manual, section 5, intro)."""

    type: int  # QT*
    version: int  # changes when the data does
    path: int


QTDIR = 0x80
QTSYMLINK = 0x02
QTFILE = 0x00


def is_on_own_device(path: int | None) -> bool:
    """Whether a qid path is of a file on the source's own device; not so if it is unknown."""
    if path is None:
        return False
    return path >> _GIVEN_BITS != 1 or path >> _FEW_BITS == _OWN >> _FEW_BITS


def qid_of(path: int, attributes: Attributes) -> Qid:
    """The qid of a file whose path is known already."""
    kind = attributes.kind
    qtype = QTDIR if kind == stat.S_IFDIR else QTSYMLINK if kind == stat.S_IFLNK else QTFILE
    version = (attributes.mtime_ns ^ attributes.size << 8) & 0xFFFFFFFF
    return Qid(qtype, version, path)


class QidPaths:
    """The mapping of (device, inode) to qid paths, for one source directory.

    Args:
        root: the attributes of the source directory.
        devices: what is known of devices.
    """

    def __init__(self, root: Attributes, devices: Devices) -> None:
        self._main = (root.dev_major, root.dev_minor)
        self._devices = devices
        self._mutex = threading.Lock()
        # (device, inode, what tells it from the same at another place) -> number
        self._apart: dict[tuple[tuple[int, int], int, int], int] = {}
        self._most = 0  # of these, since the dictionary was made

    def path(self, a: Attributes) -> int:
        """The qid path of a file: the same for the same (file system, inode), always."""
        number, aside = (a.dev_major, a.dev_minor), self._devices.aside(a)
        if number == self._main and not aside and a.ino > ROOT_NODEID and a.ino >> _GIVEN_BITS != 1:
            if self._apart and (given := self._apart.get((number, a.ino, 0))):
                return given
            return a.ino
        return self.path_of(self._devices.of(a), a.ino, aside)

    def path_of(self, device: Device, inode: int, aside: int = 0) -> int:
        """As `path`, of a file on a device, `Devices.aside` of it given."""
        if self._apart and (given := self._apart.get((device.number, inode, aside))):
            return given
        if device.number == self._main:
            if aside:
                return _OWN | _mixed(aside, inode) >> 64 - _FEW_BITS
            if inode > ROOT_NODEID and inode >> _GIVEN_BITS != 1:
                return inode
            return _OWN | _mixed(inode) >> 64 - _FEW_BITS
        if inode >> _FOREIGN_BITS:
            mixed = _mixed(device.base, inode, aside) if aside else _mixed(device.base, inode)
            return _FOREIGN | mixed >> 64 - _FOREIGN_BITS
        return _FOREIGN | (device.base + aside + inode) & (1 << _FOREIGN_BITS) - 1

    def apart(self, device: Device, inode: int, aside: int, is_free: Callable[[int], bool]) -> int:
        """Give a file whose number is another's one of its own, until it is given `back`."""
        first, bits = (_FOREIGN, _FOREIGN_BITS)
        if device.number == self._main:
            first, bits = (_OWN, _FEW_BITS)
        tries = 0
        while True:
            mixed = _mixed(device.base + aside, inode, *device.number, tries)
            number = first | mixed >> 64 - bits
            if is_free(number):
                break
            tries += 1
        with self._mutex:
            self._apart[device.number, inode, aside] = number
            self._most = max(self._most, len(self._apart))
        return number

    def back(self, device: Device, inode: int, aside: int, number: int) -> None:
        """A file is known by a number no more, which may have been given to it alone."""
        if not self._apart:
            return
        key = (device.number, inode, aside)
        with self._mutex:
            if self._apart.get(key) != number:
                return
            del self._apart[key]
            if not self._apart or len(self._apart) < self._most // 4 and self._most > _MANY:
                self._apart = dict(self._apart)
                self._most = len(self._apart)

    def clear(self) -> None:
        """No file is known any more."""
        with self._mutex:
            self._apart, self._most = {}, 0

    def unknown(self, device: Device, inode: int) -> int:
        """A number to show a name with of which nothing but an inode number is known.

        No file that is known has it, and nothing is remembered of it.
        """
        return _UNKNOWN | _mixed(device.base, inode) >> 64 - _FEW_BITS


def _mixed(*numbers: int) -> int:
    return hashed(b" ".join(b"%x" % number for number in numbers))
