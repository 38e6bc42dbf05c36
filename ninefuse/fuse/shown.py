"""What the kernel is shown of a file: its number, its attributes, how long it may believe them.

Locks touched: none.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from ninefuse.linux.syscalls import Attributes
from ninefuse.settings import Settings
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import SET_ID, Session
from ninefuse.tree.table import Fid

_HIDDEN = 1 << 31  # the highest bit of a generation: a device whose number is not shown


class ShownEntry(NamedTuple):
    """A file that was looked up or made, in the order in which a reply has it."""

    nodeid: int
    generation: int
    entry_valid: float  # seconds for which the name may be believed
    attr_valid: float  # seconds for which the attributes may be
    ino: int
    attributes: Attributes


class Shown:
    """How one mount shows files.

    Args:
        session: the conversation.
        settings: of the mount.

    Attributes:
        attr_valid, entry_valid: seconds for which attributes and names may be believed.
    """

    def __init__(self, session: Session, settings: Settings) -> None:
        self._session = session
        self.attr_valid = settings.attr_timeout
        self.entry_valid = settings.entry_timeout

    def attributes(self, nodeid: int, a: Attributes) -> tuple[int, Attributes]:
        """The inode number to show, and the attributes."""
        fids = self._session.fids
        if fids.devices.hides:
            a = fids.devices.shown(a)
        if a.mode & SET_ID and stat.S_ISREG(a.mode):
            fids.note_set_id(nodeid)
        # Of the root the kernel knows the nodeid alone.
        return (a.ino if nodeid == ROOT_NODEID else nodeid), a

    def believed(self, nodeid: int) -> float:
        """Seconds for which a file's attributes may be believed."""
        return 0.0 if nodeid in self._session.fids.passed else self.attr_valid

    def entry(self, fid: Fid, seen: Attributes) -> ShownEntry:
        """What the kernel is told of a file, by its fid."""
        ino, a = self.attributes(fid.number, seen)
        generation = fid.generation
        if a is not seen and a.rdev != seen.rdev:
            # The kernel keeps the number that it was told first, but of another file.
            generation ^= _HIDDEN
        if not fid.node.may_be_believed(seen):
            return ShownEntry(fid.number, generation, 0.0, 0.0, ino, a)
        attr_valid = self.believed(fid.number)
        return ShownEntry(fid.number, generation, self.entry_valid, attr_valid, ino, a)
