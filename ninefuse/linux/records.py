"""Directories: the records of getdents64(2). `read_records` may block; nothing takes a lock."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from ninefuse.linux.libc import function

_getdents64 = function("getdents64", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)

_DIRENT = struct.Struct("=QqHB")  # d_ino, d_off, d_reclen, d_type; the name follows


class DirectoryEntry(NamedTuple):
    """An entry as getdents64(2) gives it."""

    ino: int
    offset: int  # the cookie of the entry after this one
    type: int  # DT_*, which is the S_IFMT bits shifted right by 12
    name: bytes


def read_records(fd: int, size: int) -> bytes:
    """The next records of an open directory; none at its end (getdents64(2)).

    Args:
        fd: the directory, open for reading; its offset moves.
        size: how many bytes of records to take at most.
    """
    buffer = ctypes.create_string_buffer(size)
    filled = _getdents64(fd, buffer, size)
    return ctypes.string_at(buffer, filled)


def next_record(records: bytes, at: int) -> tuple[int, int, int, bytes, int]:
    """What is in the record at a place among some (`DirectoryEntry`), and the place behind it."""
    ino, offset, length, kind = _DIRENT.unpack_from(records, at)
    name = at + _DIRENT.size
    return ino, offset, kind, records[name : records.index(0, name)], at + length


def next_entry(records: bytes, at: int) -> tuple[DirectoryEntry, int]:
    """The entry of the record at a place among some, and the place behind it."""
    ino, offset, kind, name, after = next_record(records, at)
    return DirectoryEntry(ino, offset, kind, name), after


def place_after(records: bytes, offset: int, before: int) -> int:
    """The place behind the record that has a cookie; -1 if there is none before another place."""
    at = 0
    while at < before:
        _, found, length, _ = _DIRENT.unpack_from(records, at)
        at += int(length)
        if found == offset:
            return at
    return -1
