"""Directory streams, as C programs use them (opendir(3))."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.readdir.restype = ctypes.c_void_p
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.seekdir.restype = None
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.rewinddir.restype = None
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]


class Directory:
    """A directory stream, as C programs use it (opendir(3))."""

    def __init__(self, path: Path) -> None:
        self._stream = _libc.opendir(bytes(path))
        assert self._stream, os.strerror(ctypes.get_errno())

    def read(self) -> bytes | None:
        """The next name; None at the end."""
        entry = _libc.readdir(self._stream)
        if not entry:
            return None
        (length,) = struct.unpack("16xH", ctypes.string_at(entry, 18))
        return ctypes.string_at(entry, length)[19:].partition(b"\0")[0]

    def rest(self) -> list[bytes]:
        return list(iter(self.read, None))

    def tell(self) -> int:
        position: int = _libc.telldir(self._stream)
        return position

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        _libc.closedir(self._stream)


@contextmanager
def directory(path: Path) -> Iterator[Directory]:
    stream = Directory(path)
    try:
        yield stream
    finally:
        stream.close()
