"""Types of the optional extension ninefuse.linux._transfer; _transfer.pyx says what it does."""

from collections.abc import Callable

from typing_extensions import Buffer

def read_cached(fd: int, count: int, offset: int) -> bytes: ...
def write_as(
    fd: int, data: Buffer, offset: int, uid: int, gid: int, end: Callable[[], object]
) -> int: ...
