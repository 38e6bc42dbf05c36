"""qids: the numbers by which 9P, and the users of the mount, tell files apart.

A qid path stands for one file of the source. It is the file's own inode number
wherever that is possible, since `EntryAttributes.st_ino` of pyfuse3 is both the FUSE
nodeid and the inode number that users see. Files of other devices mounted below the
source, and those whose number is taken, are mapped apart.

Locks touched: none; the mapping is guarded by a mutex of its own.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import NamedTuple

from ninefuse.syscalls import Attributes

ROOT_NODEID = 1  # FUSE's fixed number for the root of a mount

_INODE_BITS = 48
_FIRST_FOREIGN = 0xFFFE  # high 16 bits for the second device; the third has one less, …
_LAST_FOREIGN = 0x8000
_APART = 0xFFFF << _INODE_BITS  # numbers given one by one


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
    return path is not None and not path >> _INODE_BITS


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
    """

    def __init__(self, root: Attributes) -> None:
        self._main = (root.dev_major, root.dev_minor)
        self._mutex = threading.Lock()
        self._foreign: dict[tuple[int, int], int] = {}  # device -> its high bits
        self._apart: dict[tuple[tuple[int, int], int], int] = {}  # (device, inode) -> number

    def path(self, a: Attributes) -> int:
        """The qid path of a file: the same for the same (device, inode), always.

        Raises:
            OSError: ENFILE, more than 32,767 devices below the source.
        """
        device = (a.dev_major, a.dev_minor)
        if self._apart and (number := self._apart.get((device, a.ino))):
            return number
        if device == self._main and a.ino != ROOT_NODEID and a.ino < _APART:
            return a.ino
        if device == self._main or a.ino >> _INODE_BITS:
            return self.apart(device, a.ino)
        with self._mutex:
            high = self._foreign.get(device)
            if high is None:
                high = _FIRST_FOREIGN - len(self._foreign)
                if high < _LAST_FOREIGN:
                    raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
                self._foreign[device] = high
        return high << _INODE_BITS | a.ino

    def apart(self, device: tuple[int, int], inode: int) -> int:
        """A number of its own for a file whose natural number is another's."""
        with self._mutex:
            return self._apart.setdefault((device, inode), _APART + len(self._apart))
