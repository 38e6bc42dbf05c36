"""Reading and writing a file's bytes (ninefuse/linux/transfer.py)."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ops_helpers import fails

from ninefuse.linux import transfer

# Reading what is cached

Reader = Callable[[int, int, int], bytes]
compiled: Reader | None
try:
    from ninefuse.linux._transfer import read_cached as compiled
except ImportError:
    compiled = None
READERS: list[Reader] = [transfer._read_cached, *(() if compiled is None else (compiled,))]


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[int]:
    """A file of 3 MiB, all of it in the page cache; skipped where nothing tells that."""
    path = tmp_path / "cached"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system does not say what is cached")
    yield fd
    os.close(fd)


CONTENT = bytes(range(251)) * (3 * (1 << 20) // 251 + 1)


def test_the_compiled_reader_is_used_where_there_is_one() -> None:
    assert transfer.read_cached is READERS[-1]


@pytest.mark.parametrize("read", READERS)
def test_cached_bytes_are_read(cached: int, read: Reader) -> None:
    """Of any number, in any order; what was read before stays as it was."""
    size = len(CONTENT)
    places = [
        (0, 0), (0, 1), (1, 4096), (7, 1 << 20), (0, 1 << 20), (100, 2 << 20), (0, size),
        (size - 5, 5), (size - 5, 100), (size - 5, 3 << 20), (size, 10), (size + 9, 10),
        (1 << 62, 10), (5, 3),
    ]  # fmt: skip
    found = [read(cached, count, offset) for offset, count in places]
    for data, (offset, count) in zip(found, places, strict=True):
        assert type(data) is bytes
        assert data == CONTENT[offset : offset + count]


@pytest.mark.parametrize("read", READERS)
def test_what_is_not_cached_is_not_waited_for(tmp_path: Path, read: Reader) -> None:
    path = tmp_path / "cold"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with fails(errno.EAGAIN, errno.EOPNOTSUPP):
            read(fd, 1 << 20, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("read", READERS)
def test_errors_of_reading_what_is_cached(tmp_path: Path, read: Reader) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with fails(errno.EBADF):
            read(fd, 10, 0)
    finally:
        os.close(fd)
    with fails(errno.EBADF):
        read(-1, 10, 0)


@pytest.mark.skipif(compiled is None, reason="the extension is not built")
@pytest.mark.parametrize(
    ("count", "offset"),
    [(-1, 0), (1 << 31, 0), (1 << 62, 0), (1, -1), (1 << 63, 0), (1, 1 << 63)],
)
def test_what_compiled_code_is_asked_is_looked_at(cached: int, count: int, offset: int) -> None:
    assert compiled is not None
    with pytest.raises((ValueError, OverflowError)):
        compiled(cached, count, offset)


@pytest.mark.parametrize("read", READERS)
def test_threads_read_each_for_itself(cached: int, read: Reader) -> None:
    wrong: list[int] = []

    def look(start: int) -> None:
        for number in range(200):
            offset = start + 1000 * number
            if read(cached, 70_000, offset) != CONTENT[offset : offset + 70_000]:
                wrong.append(offset)

    threads = [threading.Thread(target=look, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_keeps_no_more_than_a_request_of_fuse(cached: int) -> None:
    """And gives none of it away."""
    data = transfer._read_cached(cached, 3 << 20, 0)
    assert data == CONTENT[: 3 << 20]
    assert len(getattr(transfer._thread, "buffer", b"")) <= 1 << 20
    small = transfer._read_cached(cached, 10, 0)
    transfer._read_cached(cached, 10, 100)
    assert small == CONTENT[:10]
