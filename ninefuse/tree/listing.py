"""The entries of an open directory, read in pieces, by cookie.

Cookies are the directory's own (getdents64's d_off), so that telldir and seekdir work
and nothing is lost or doubled when the directory changes meanwhile, as far as the file
system itself can promise. Only one piece is kept, never the whole directory.

ext4 has cookies of two kinds: 31 bits of a name's hash for programs of 32 bits, which can
take no more, and 63 bits for others. It goes by the call, and ours has 64 bits; of who reads
a FUSE mount nothing is known. So ext4's cookies are made small for all (`_Hashed`).

Locks touched: each listing has a mutex of its own, since two requests may read one
handle; it is held across the system calls that read the directory.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from array import array

from ninefuse.errors import error
from ninefuse.linux.filesystems import file_system_of
from ninefuse.linux.records import (
    DirectoryEntry,
    next_entry,
    next_record,
    place_after,
    read_records,
)

# Bytes of the kernel's records read at a time. With what else an open directory takes it is
# less than 4 KB. More would save calls, but they are few: a record has some 40 bytes.
_PIECE = 3 * 1024
_ONE = 512  # bytes in which the largest record finds room, and more
_RECORD = 24  # bytes of a 9P directory entry besides its name

# A place in a directory that is ordered by hash is a hash of 63 bits. Places are the same
# group if their first 28 bits are. Two of a million entries seldom are, nine never.
_GROUP = 35  # bits of the place in the group
_RANK = 3  # bits of a small cookie that count the places of a group
_MOST_RANK = (1 << _RANK) - 1
_SMALL = 1 << 31  # what is less fits the 32 bits of an off_t
_MARKS = 24  # places that are remembered, two numbers each


class _Hashed:
    """Small cookies for a directory that is ordered by hash, which ext4's are.

    A place there is the hash of the name that comes next. Its small cookie is the group of that,
    and how many entries of the same group come before. So a cookie of rank 0, as nearly all
    are, leads back to the beginning of its group, whatever was added and removed meanwhile. Of
    the others the last few are remembered exactly. One that is not leads behind so many
    entries of the group as there are now; it would be wrong only if among these few, of a
    directory of more than a hundred thousand, one came or went.

    What has no small cookie, for want of ranks, has the directory's own.

    Attributes:
        group, rank: of the place that the reader has come to.
        marks: cookies and places by turns.
    """

    __slots__ = ("group", "marks", "rank")

    def __init__(self) -> None:
        self.group = self.rank = 0
        self.marks: array[int] | None = None

    def move(self, place: int) -> int:
        """Go on to the place behind the next entry; its cookie."""
        group = place >> _GROUP
        if group != self.group:
            self.group = group
            self.rank = 0
            return group << _RANK
        self.rank += 1
        if self.rank > _MOST_RANK and place >= _SMALL:
            return place
        cookie = group << _RANK | min(self.rank, _MOST_RANK)
        if cookie > 1:  # that is behind ".", which stays the first
            self._remember(cookie, place)
        return cookie

    def place_of(self, cookie: int) -> int:
        """The place that a cookie was given for; -1 if it is not known any more."""
        if not cookie & _MOST_RANK:
            return cookie >> _RANK << _GROUP
        at = self._find(cookie)
        return -1 if self.marks is None or at < 0 else self.marks[at + 1]

    def _find(self, cookie: int) -> int:
        if self.marks is not None:
            for at in range(0, len(self.marks), 2):
                if self.marks[at] == cookie:
                    return at
        return -1

    def _remember(self, cookie: int, place: int) -> None:
        if self.marks is None:
            self.marks = array("Q")
        at = self._find(cookie)
        if at >= 0:
            self.marks[at + 1] = place
            return
        if len(self.marks) == 2 * _MARKS:
            del self.marks[:2]
        self.marks.extend((cookie, place))


class Listing:
    """Reads the directory open at ``fd``, which stays its owner's."""

    __slots__ = ("_at", "_before", "_fd", "_hashed", "_is_known", "_mutex", "_offset", "_piece")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mutex = threading.Lock()
        self._piece = b""  # records
        self._at = 0  # where the next one begins
        self._offset = -1  # the cookie of the one before
        self._is_known = False  # whether the directory is ordered by hash
        self._hashed: _Hashed | None = None  # if it is
        self._before = 0, 0  # group and rank of the place before the piece

    def read(self, offset: int, count: int, most: int = sys.maxsize) -> list[DirectoryEntry]:
        """The entries from a cookie on. May block.

        Args:
            offset: the cookie of an earlier entry, or 0 to begin (again) at the start.
            count: bytes of 9P records (24 and the name) to fill at most.
            most: entries to return at most. Who sets it may come back for those that found no
                room after all: they are not from beyond the piece that is kept.

        Returns:
            As many entries as fit, an empty list at the end of the directory.

        Raises:
            OSError: EINVAL, there are entries but not even one fits; the errors of getdents64(2)
                where they come before the first entry.
        """
        found: list[DirectoryEntry] = []
        with self._mutex:
            self._seek(offset)
            while self._fill(found, most):
                piece, at, end = self._piece, self._at, len(self._piece)
                hashed = self._hashed
                while at < end and len(found) < most:
                    ino, cookie, kind, name, after = next_record(piece, at)
                    count -= _RECORD + len(name)
                    if count < 0:
                        break
                    if hashed is not None:
                        cookie = hashed.move(cookie)
                    found.append(DirectoryEntry(ino, cookie, kind, name))
                    at = after
                if not found:
                    raise error(errno.EINVAL)
                self._at, self._offset = at, found[-1].offset
                if at < end:
                    break
        return found

    def _fill(self, found: list[DirectoryEntry], most: int) -> bool:
        """See that there is a record to take; False at the end, and where enough was found."""
        if self._at < len(self._piece):
            return True
        if found and most < sys.maxsize:
            return False
        try:
            self._read_piece()
        except OSError:
            if found:
                return False  # it comes back with the next reading
            raise
        return len(self._piece) > 0

    def _read_piece(self) -> None:
        hashed, size = self._hashed, _PIECE
        if hashed is not None and hashed.marks is not None:
            size -= len(hashed.marks) * hashed.marks.itemsize  # part of what may be kept
        self._piece = read_records(self._fd, size)
        self._at = 0
        if hashed is not None:
            self._before = hashed.group, hashed.rank
        if not self._is_known:
            self._learn(self._piece)

    def _learn(self, beginning: bytes) -> None:
        """See from the directory's first record whether it is ordered by hash.

        If it is, "." comes first, and ".." by the hash 1, which is the upper half of its place.
        """
        self._is_known = True
        is_large = bool(beginning) and next_entry(beginning, 0)[0].offset >= _SMALL
        if is_large and file_system_of(self._fd).orders_by_hash:
            self._hashed = _Hashed()

    def _seek(self, offset: int) -> None:
        if offset and offset == self._offset:
            return
        if offset and not self._is_known:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._learn(read_records(self._fd, _PIECE))
        hashed = self._hashed
        # A step back within the piece: the reply had no room for all we had given.
        if offset:
            if hashed is not None:
                after = self._place_after(hashed, offset)
            else:
                after = place_after(self._piece, offset, self._at)
            if after >= 0:
                self._at, self._offset = after, offset
                return
        if hashed is not None and 0 < offset < _SMALL:
            self._seek_hashed(hashed, offset)
        else:
            self._seek_place(offset)
            if hashed is not None:
                # How many of its group come before it is not known: no small one until the next.
                hashed.group, hashed.rank = offset >> _GROUP, offset and _MOST_RANK
        self._offset = offset

    def _seek_place(self, place: int) -> None:
        """Go to a place of the directory's own."""
        try:
            os.lseek(self._fd, place, os.SEEK_SET)
        except OverflowError:  # 9P has cookies of 64 bits, lseek(2) of 63
            raise error(errno.EINVAL) from None
        self._piece = b""
        self._at = 0

    def _place_after(self, hashed: _Hashed, offset: int) -> int:
        """`place_after` for small cookies, which are counted from the piece's beginning."""
        was = hashed.group, hashed.rank
        hashed.group, hashed.rank = self._before
        at = 0
        while at < self._at:
            entry, at = next_entry(self._piece, at)
            if hashed.move(entry.offset) == offset:
                return at
        hashed.group, hashed.rank = was
        return -1

    def _seek_hashed(self, hashed: _Hashed, cookie: int) -> None:
        """Go to where a small cookie leads."""
        group, rank = cookie >> _RANK, cookie & _MOST_RANK
        place = hashed.place_of(cookie)
        if place >= 0:
            self._seek_place(place)
            hashed.group, hashed.rank = group, rank
            return
        self._offset = -1  # in case that something fails here
        # Behind so many of the group's entries, or all of them: what comes then?
        self._seek_place(min((group + 1) << _GROUP, (1 << 63) - 1))
        beyond = read_records(self._fd, _ONE)
        end = next_entry(beyond, 0)[0].name if beyond else None
        self._seek_place(group << _GROUP)
        for _ in range(rank):
            if self._at == len(self._piece):
                self._read_piece()
                if not self._piece:
                    break
            entry, after = next_entry(self._piece, self._at)
            if entry.name == end:
                break
            self._at = after
        # What is kept begins here.
        self._piece, self._at = self._piece[self._at :], 0
        hashed.group, hashed.rank = self._before = group, rank
