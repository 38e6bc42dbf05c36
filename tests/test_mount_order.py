"""Requests that overtake each other on a mount: none is answered from before an earlier change."""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from multiprocessing import RawArray, RawValue
from pathlib import Path
from typing import Any

import pytest
from mounting import Child, Mount
from test_mount_durable import SERVERS
from test_mount_faults import options_of

PAGE = mmap.PAGESIZE
PAGES = 16
_SECONDS = 2.0  # of each storm

# The command, whose writes are late: a worker makes them late, or the engine is given them late.
LATE = (
    sys.executable,
    "-c",
    """
import sys, time, trio
from ninefuse import cli, uring
from ninefuse.ops import io

def late(*args, write=io._write_fully):
    time.sleep(0.5)
    return write(*args)

def late_start(self, request, call, start=uring.Uring._write):
    async def begin():
        await trio.sleep(0.5)
        start(self, request, call)
    trio.lowlevel.spawn_system_task(begin)

io._write_fully = late
uring.Uring._write = late_start
sys.exit(cli.main())
""",
)


def _write(path: Path, *pages: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    for page in pages:
        os.pwrite(fd, page, 0)
    os.close(fd)


@pytest.mark.parametrize("how", ["pread", "mmap"])
@pytest.mark.parametrize("cache", ["auto", "loose", "none"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_page_that_is_dropped_during_a_write_is_read_as_written(
    new_mount: Callable[..., Mount], server: str, cache: str, how: str
) -> None:
    """What write(2) has put into the cache is what whoever reads it sees, then and later.

    The first write makes the kernel ask for attributes, which then show it that the file has
    changed: so it drops the page, while the second write of it is on its way.
    """
    mount = new_mount("-o", f"cache={cache}", *options_of(server), command=LATE)
    path = mount.path / "file"
    (mount.source / "file").write_bytes(b"0" * PAGE)
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, PAGE, prot=mmap.PROT_READ)

    def seen() -> bytes:
        return os.pread(fd, PAGE, 0) if how == "pread" else mapped[:]

    try:
        assert seen() == b"0" * PAGE
        _write(path, b"1" * PAGE)
        with Child(_write, path, b"2" * PAGE) as writer:
            time.sleep(0.2)  # it is on its way
            os.stat(path)
            during = seen()
            writer.result()
        assert (during, seen()) == (b"2" * PAGE, b"2" * PAGE)
        os.stat(path)
        assert seen() == b"2" * PAGE
    finally:
        mapped.close()
        os.close(fd)


@pytest.mark.parametrize("disturb", ["stat", "open"])
@pytest.mark.parametrize("server", SERVERS)
def test_readers_of_mapped_memory_see_what_write_has_finished(
    new_mount: Callable[..., Mount], server: str, disturb: str
) -> None:
    """One process writes, another one looks at the file or opens it, and one reads its mapping."""
    mount = new_mount(*options_of(server))
    path = mount.path / "file"
    path.write_bytes(bytes(PAGES * PAGE))
    finished, over = RawArray("q", PAGES), RawValue("i", 0)
    with (
        Child(_read_mapped, path, finished, over) as reading,
        Child(_disturb, path, over, disturb) as disturbing,
    ):
        fd = os.open(path, os.O_RDWR)
        end, count = time.monotonic() + _SECONDS, 0
        while time.monotonic() < end:
            count += 1
            os.pwrite(fd, struct.pack("q", count) * (PAGE // 8), count % PAGES * PAGE)
            finished[count % PAGES] = count
        os.close(fd)
        over.value = 1
        assert reading.result() == (0, 0)
        disturbing.result()
    assert count > PAGES


def _read_mapped(path: Path, finished: Any, over: Any) -> tuple[int, int]:
    """How often a page was older than what had been written, and how many are afterwards."""
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, PAGES * PAGE, prot=mmap.PROT_READ)

    def is_old(page: int) -> bool:
        wanted: int = finished[page]
        seen: int = struct.unpack_from("q", mapped, page * PAGE)[0]
        return seen < wanted

    old = 0
    while not over.value:
        old += sum(map(is_old, range(PAGES)))
    return old, sum(map(is_old, range(PAGES)))


def _disturb(path: Path, over: Any, how: str) -> None:
    while not over.value:
        if how == "stat":
            os.stat(path)
        else:
            os.close(os.open(path, os.O_RDONLY))
        time.sleep(0.0005)
