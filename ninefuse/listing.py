"""The entries of an open directory, read in pieces, by cookie.

Cookies are the directory's own (getdents64's d_off), so that telldir and seekdir work
and nothing is lost or doubled when the directory changes meanwhile, as far as the file
system itself can promise. Only one piece is kept, never the whole directory.

Locks touched: each listing has a mutex of its own, since two requests may read one
handle; it is held across the system calls that read the directory.
"""

from __future__ import annotations

import errno
import os
import sys
import threading

from ninefuse.syscalls import DirectoryEntry, next_entry, place_after, read_records

# Bytes of the kernel's records read at a time. With what else an open directory takes it is
# less than 4 KB. More would save calls, but they are few: a record has some 40 bytes.
_PIECE = 3 * 1024
_RECORD = 24  # bytes of a 9P directory entry besides its name


class Listing:
    """Reads the directory open at ``fd``, which stays its owner's."""

    __slots__ = ("_at", "_fd", "_mutex", "_offset", "_piece")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mutex = threading.Lock()
        self._piece = b""  # records
        self._at = 0  # where the next one begins
        self._offset = -1  # the cookie of the one before

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
                while at < end and len(found) < most:
                    entry, after = next_entry(piece, at)
                    count -= _RECORD + len(entry.name)
                    if count < 0:
                        break
                    found.append(entry)
                    at = after
                if not found:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
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
            self._piece = read_records(self._fd, _PIECE)
        except OSError:
            if found:
                return False  # it comes back with the next reading
            raise
        self._at = 0
        return len(self._piece) > 0

    def _seek(self, offset: int) -> None:
        if offset and offset == self._offset:
            return
        # A step back within the piece: the reply had no room for all we had given.
        if offset:
            after = place_after(self._piece, offset, self._at)
            if after >= 0:
                self._at, self._offset = after, offset
                return
        try:
            os.lseek(self._fd, offset, os.SEEK_SET)
        except OverflowError:  # 9P has cookies of 64 bits, lseek(2) of 63
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        self._piece = b""
        self._at = 0
        self._offset = offset
