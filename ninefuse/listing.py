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

from ninefuse.syscalls import DirectoryEntry, read_entries

_PIECE = 32 * 1024  # bytes of the kernel's records read at a time
_RECORD = 24  # bytes of a 9P directory entry besides its name


class Listing:
    """Reads the directory open at ``fd``, which stays its owner's."""

    __slots__ = ("_at", "_entries", "_fd", "_mutex", "_offset")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mutex = threading.Lock()
        self._entries: list[DirectoryEntry] = []
        self._at = 0  # index of the next entry
        self._offset = -1  # its cookie

    def read(self, offset: int, count: int, most: int = sys.maxsize) -> list[DirectoryEntry]:
        """The entries from a cookie on. May block.

        Args:
            offset: the cookie of an earlier entry, or 0 to begin (again) at the start.
            count: bytes of 9P records (24 and the name) to fill at most.
            most: entries to return at most.

        Returns:
            As many entries as fit, an empty list at the end of the directory.

        Raises:
            OSError: EINVAL, there are entries but not even one fits.
        """
        with self._mutex:
            self._seek(offset)
            if self._at == len(self._entries):
                self._entries = read_entries(self._fd, _PIECE)
                self._at = 0
            first = self._at
            for entry in self._entries[first : first + most]:
                count -= _RECORD + len(entry.name)
                if count < 0:
                    break
                self._at += 1
                self._offset = entry.offset
            if self._at == first and self._entries:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self._entries[first : self._at]

    def _seek(self, offset: int) -> None:
        if offset and offset == self._offset:
            return
        # A step back within the piece: the reply had no room for all we had given.
        if offset:
            for at in range(self._at - 1, -1, -1):
                if self._entries[at].offset == offset:
                    self._at = at + 1
                    self._offset = offset
                    return
        try:
            os.lseek(self._fd, offset, os.SEEK_SET)
        except OverflowError:  # 9P has cookies of 64 bits, lseek(2) of 63
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        self._entries = []
        self._at = 0
        self._offset = offset
