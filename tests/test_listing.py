"""The entries of an open directory, by cookie (ninefuse/listing.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_systems import mounted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_helpers import fails, in_threads, read_entries
from ops_helpers import leak_free as leak_free

from ninefuse import listing as listing_module
from ninefuse.fids import OpenDirectory
from ninefuse.listing import Listing
from ninefuse.syscalls import DirectoryEntry, read_records

pytestmark = pytest.mark.usefixtures("leak_free")

ALL = 1 << 30
MANY = 1000  # entries of one piece at most


@pytest.fixture
def directory(leak_free: None, tmp_path: Path) -> Iterator[int]:
    """A descriptor of a directory of 200 entries, dot and dot-dot among them."""
    for number in range(198):
        (tmp_path / f"{number:03d}{'x' * (number % 50)}").touch()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def everything(directory: int) -> list[DirectoryEntry]:
    """Its entries, as one reading gives them."""
    entries = []
    while piece := read_entries(directory, 1 << 16):
        entries += piece
    os.lseek(directory, 0, os.SEEK_SET)
    assert len(entries) == 200
    return entries


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for few entries at a time."""
    monkeypatch.setattr(listing_module, "_PIECE", 512)


def test_all_entries_in_one_reply(directory: int, everything: list[DirectoryEntry]) -> None:
    """And the end behind the last, however often it is asked for."""
    listing = Listing(directory)
    assert listing.read(0, ALL) == everything
    for _ in range(3):
        assert listing.read(everything[-1].offset, ALL) == []
        assert listing.read(everything[-1].offset, 0) == []


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_a_number_of_entries(directory: int, everything: list[DirectoryEntry], most: int) -> None:
    """No more than were asked for, and all of them in the end."""
    listing = Listing(directory)
    found: list[DirectoryEntry] = []
    offset = 0
    while reply := listing.read(offset, ALL, most):
        assert len(reply) <= most
        found += reply
        offset = reply[-1].offset
    assert found == everything


@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_read_in_order_and_kept_one_at_a_time(
    directory: int, everything: list[DirectoryEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long directory is not held in memory, and no piece is read twice without need."""
    sizes: list[int] = []

    def reading(fd: int, size: int) -> bytes:
        records = read_records(fd, size)
        sizes.append(len(records))
        return records

    monkeypatch.setattr(listing_module, "read_records", reading)
    listing = Listing(directory)
    offset, found = 0, 0
    while reply := listing.read(offset, 120):
        assert len(listing._piece) == sizes[-1] <= 512
        found += len(reply)
        offset = reply[-1].offset
    assert found == len(everything)
    assert sizes[-1] == 0
    assert len(sizes) > 10


@pytest.mark.usefixtures("small_pieces")
def test_a_step_back_within_a_piece_needs_no_call(
    directory: int, everything: list[DirectoryEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply had no room for all that was given: the rest comes again."""
    listing = Listing(directory)
    first = listing.read(0, ALL, MANY)
    assert 3 < len(first) < len(everything)

    def calling(*args: object) -> None:
        raise AssertionError(args)

    with monkeypatch.context() as patch:
        patch.setattr(listing_module, "read_records", calling)
        patch.setattr(os, "lseek", calling)
        for fit in range(len(first) - 1, 0, -1):
            assert listing.read(first[fit - 1].offset, ALL, MANY) == first[fit:]
    assert listing.read(first[-1].offset, ALL, MANY)[0] == everything[len(first)]


@pytest.mark.usefixtures("small_pieces")
def test_a_step_back_over_pieces(directory: int, everything: list[DirectoryEntry]) -> None:
    """To the last entry of an earlier piece, and to the beginning."""
    listing = Listing(directory)
    first = listing.read(0, ALL, MANY)
    second = listing.read(first[-1].offset, ALL, MANY)
    third = listing.read(second[-1].offset, ALL, MANY)
    assert first + second + third == everything[: len(first + second + third)]
    assert listing.read(first[-1].offset, ALL, MANY)[0] == second[0]
    assert listing.read(first[0].offset, ALL, MANY)[0] == first[1]
    assert listing.read(0, ALL, MANY) == first


def test_an_open_directory_takes_less_than_4_kb(tmp_path: Path) -> None:
    """Anybody may have thousands open. Beside what it answered last, which it need not keep."""
    for number in range(1500):
        (tmp_path / f"{number:04d}{'x' * (number % 200)}").touch()
    fds = [os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY) for _ in range(50)]
    try:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        opened = [OpenDirectory(fd) for fd in fds]
        for directory in opened:
            offset = 0
            for _ in range(20):
                reply = directory.listing.read(offset, ALL, 24)
                offset = reply[-1].offset
        del reply
        each = (tracemalloc.get_traced_memory()[0] - before) / len(fds)
    finally:
        tracemalloc.stop()
        for fd in fds:
            os.close(fd)
    assert each < 4096


@pytest.mark.parametrize("where", ["tmpfs", "here"])
def test_changes_meanwhile_lose_and_double_nothing(tmp_path: Path, where: str) -> None:
    """Whatever is there from the beginning to the end is listed once."""
    with contextlib.ExitStack() as stack:
        top = tmp_path
        if where == "tmpfs":
            if os.geteuid():
                pytest.skip("only root may mount file systems")
            top = stack.enter_context(mounted("tmpfs", "tmpfs", tmp_path / "memory"))
        for number in range(2000):
            (top / f"stays {number}").touch()
            (top / f"goes {number}").touch()
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        try:
            listing, found, offset, step = Listing(fd), Counter[bytes](), 0, 0
            while reply := listing.read(offset, ALL, 1 + step * 7 % 50):
                fit = 1 + step * 5 % len(reply)  # the rest found no room, and comes again
                found.update(entry.name for entry in reply[:fit])
                offset = reply[fit - 1].offset
                for number in range(step * 10, min(step * 10 + 10, 2000)):
                    (top / f"goes {number}").unlink()
                    (top / f"comes {number}").touch()
                step += 1
        finally:
            os.close(fd)
    assert max(found.values()) == 1
    assert {b"stays %d" % number for number in range(2000)} <= found.keys()


def test_an_entry_too_large_is_not_consumed(
    directory: int, everything: list[DirectoryEntry]
) -> None:
    """EINVAL; with more room it comes."""
    listing = Listing(directory)
    with fails(errno.EINVAL):
        listing.read(0, 24)
    offset = everything[9].offset
    listing.read(offset, ALL)
    with fails(errno.EINVAL):
        listing.read(offset, 24 + len(everything[10].name) - 1)
    assert listing.read(offset, 24 + len(everything[10].name)) == [everything[10]]


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, -(1 << 63) - 1, -2])
def test_an_offset_that_cannot_be(
    directory: int, everything: list[DirectoryEntry], offset: int
) -> None:
    """EINVAL, and the listing goes on where it was."""
    listing = Listing(directory)
    reply = listing.read(0, 300)
    with fails(errno.EINVAL):
        listing.read(offset, ALL)
    assert listing.read(reply[-1].offset, ALL) == everything[len(reply) :]


def test_a_directory_that_cannot_be_read_is_read_later(
    directory: int, everything: list[DirectoryEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error loses no entry."""

    def broken(fd: int, size: int) -> bytes:
        raise OSError(errno.EIO, "broken")

    offset = everything[50].offset
    for at in (0, offset):
        listing = Listing(directory)
        with monkeypatch.context() as patch:
            patch.setattr(listing_module, "read_records", broken)
            with fails(errno.EIO):
                listing.read(at, ALL)
        assert listing.read(at, ALL) == everything[51 if at else 0 :]


@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 1500), st.integers(1, 40)), max_size=30)
)
@pytest.mark.usefixtures("small_pieces")
def test_any_order_of_readings(
    directory: int, everything: list[DirectoryEntry], readings: list[tuple[int, int, int]]
) -> None:
    """Whatever was read before, an offset is followed by the entries that follow it."""
    listing = Listing(directory)
    for at, count, most in readings:
        rest = everything[at:]
        offset = everything[at - 1].offset if at else 0
        if rest and 24 + len(rest[0].name) > count:
            with fails(errno.EINVAL):
                listing.read(offset, count, most)
            continue
        reply = listing.read(offset, count, most)
        assert reply == rest[: len(reply)]
        assert bool(reply) == bool(rest)
        assert len(reply) <= most
        assert sum(24 + len(entry.name) for entry in reply) <= count


@pytest.mark.usefixtures("small_pieces")
def test_readers_on_several_threads(directory: int, everything: list[DirectoryEntry]) -> None:
    """Each finds every entry once, in the directory's order."""
    listing = Listing(directory)

    def read(count: int) -> None:
        found: list[DirectoryEntry] = []
        offset = 0
        while reply := listing.read(offset, count):
            found += reply
            offset = reply[-1].offset
        assert found == everything

    in_threads(*(lambda count=count: read(count) for count in (90, 200, 700, ALL)))
