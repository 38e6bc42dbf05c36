"""The ranges of bytes that locks are of: as they are asked for, as the kernel has them, as held.

Locks touched: none.
"""

from __future__ import annotations

import fcntl
import struct
from bisect import bisect_left, bisect_right
from operator import attrgetter
from os import SEEK_SET
from typing import NamedTuple

from ninefuse.tree.order import END

_start = attrgetter("start")
_end = attrgetter("end")
_STRUCT_FLOCK = struct.Struct("@hhqqi4x")


class LockRange(NamedTuple):
    """A byte-range lock: what kind, where, whose."""

    type: int  # fcntl.F_RDLCK, F_WRLCK, F_UNLCK
    start: int  # bytes
    length: int  # bytes; 0: to the end of the file, however it grows
    pid: int = 0  # for which process; 0: it is not known

    @property
    def end(self) -> int:
        """The byte behind the last."""
        return self.start + self.length if self.length else END


ALL = LockRange(fcntl.F_UNLCK, 0, 0)  # all locks of a file given back


def packed(wanted: LockRange) -> bytes:
    """A lock as fcntl(2) takes it (struct flock)."""
    return _STRUCT_FLOCK.pack(wanted.type, SEEK_SET, wanted.start, wanted.length, 0)


def unpacked(answer: bytes) -> LockRange:
    """A lock as fcntl(2) answers it."""
    kind, _whence, start, length, pid = _STRUCT_FLOCK.unpack(answer)
    return LockRange(kind, start, length, pid)


class Held(NamedTuple):
    """A part of a file that is locked."""

    start: int
    end: int  # the byte behind the last
    type: int
    pid: int

    def meets(self, start: int, end: int) -> bool:
        """Whether it has a byte in common with these."""
        return self.start < end and start < self.end


def set_part(held: list[Held], new: Held) -> tuple[int, int] | None:
    """Have a part locked, or not, as fcntl(2) does it: what was there before is replaced.

    Args:
        held: what one owner has locked, by starts; no two have a byte in common. It is changed.
        new: the part; of the type F_UNLCK it is locked no more.

    Returns:
        From where to where something was given back, which others may want; None: nothing was.
    """
    # With those that only touch it: they may be joined.
    first = bisect_left(held, new.start, key=_end)
    last = bisect_right(held, new.end, first, key=_start)
    near = held[first:last]
    before = [one._replace(end=new.start) for one in near if one.start < new.start]
    after = [one._replace(start=new.end) for one in near if one.end > new.end]
    given = [
        one
        for one in near
        if one.meets(new.start, new.end)
        and (new.type == fcntl.F_UNLCK or (one.type, new.type) == (fcntl.F_WRLCK, fcntl.F_RDLCK))
    ]
    span = (max(new.start, given[0].start), min(new.end, given[-1].end)) if given else None
    middle = []
    if new.type != fcntl.F_UNLCK:
        if before and before[-1][2:] == new[2:]:
            new = new._replace(start=before.pop().start)
        if after and after[0][2:] == new[2:]:
            new = new._replace(end=after.pop(0).end)
        middle = [new]
    held[first:last] = before + middle + after
    return span
