"""Types of the optional extension ninefuse.linux._statx; _statx.pyx says what it does."""

from typing import TypeVar

T = TypeVar("T", bound=tuple[int, ...])

def statx(cls: type[T], fd: int, name: bytes, flags: int, mask: int) -> T: ...
def open_in_memory(directory: int, name: bytes, flags: int, resolve: int) -> int: ...
