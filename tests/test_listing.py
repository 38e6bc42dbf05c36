"""The entries of an open directory, by cookie (ninefuse/tree/listing.py)."""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from file_systems import image, mounted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import SOAK
from ops_helpers import fails, in_threads, read_entries
from ops_helpers import leak_free as leak_free

from ninefuse.linux.filesystems import FileSystem, file_system_of
from ninefuse.linux.records import DirectoryEntry, read_records
from ninefuse.tree import listing as listing_module
from ninefuse.tree.listing import Listing
from ninefuse.tree.opened import OpenDirectory

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
    raw = []
    while piece := read_entries(directory, 1 << 16):
        raw += piece
    entries = Listing(directory).read(0, ALL)
    os.lseek(directory, 0, os.SEEK_SET)
    assert len(entries) == 200
    assert [entry._replace(offset=0) for entry in entries] == [e._replace(offset=0) for e in raw]
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


# Small cookies, of directories that are ordered by hash (ext4)

BEYOND = (1 << 63) - 1  # the last entry's cookie there
GROUP = 1 << 35  # places that share all bits of a small cookie but three
SMALL = 1 << 31


class Hashed:
    """Stands for ext4: names at places of 63 bits, and the calls that list them.

    Attributes: at: the names by their places. seeks, readings: how many there were.
    """

    def __init__(self) -> None:
        self.at: dict[int, bytes] = {0: b".", 1 << 32: b".."}
        self._places: dict[int, int] = {}
        self.seeks = self.readings = 0

    def open(self) -> int:
        fd = 1_000_000 + len(self._places)
        self._places[fd] = 0
        return fd

    def lseek(self, fd: int, offset: int, how: int) -> int:
        assert how == os.SEEK_SET
        if offset < 0:
            raise OSError(errno.EINVAL, "below 0")
        if offset >= 1 << 63:
            raise OverflowError
        self.seeks += 1
        self._places[fd] = offset
        return offset

    def read(self, fd: int, size: int) -> bytes:
        self.readings += 1
        records = b""
        places = sorted(self.at)
        for at in range(bisect.bisect_left(places, self._places[fd]), len(places)):
            name = self.at[places[at]]
            beyond = places[at + 1] if at + 1 < len(places) else BEYOND
            length = -(-(19 + len(name) + 1) // 8) * 8
            if len(records) + length > size:
                break
            record = struct.pack("=QqHB", 1 + at, beyond, length, 8) + name
            records += record.ljust(length, b"\0")
            self._places[fd] = beyond
        return records


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    fake = Hashed()
    monkeypatch.setattr(listing_module, "read_records", fake.read)
    monkeypatch.setattr(os, "lseek", fake.lseek)
    monkeypatch.setattr(listing_module, "file_system_of", lambda fd: FileSystem(0xEF53, 1))
    return fake


def listed(listing: Listing, offset: int = 0, most: int = MANY) -> list[DirectoryEntry]:
    """All entries from a cookie on."""
    found: list[DirectoryEntry] = []
    while reply := listing.read(offset, ALL, most):
        found += reply
        offset = reply[-1].offset
    return found


def names_of(entries: list[DirectoryEntry]) -> list[bytes]:
    return [entry.name for entry in entries]


def in_order(fake: Hashed) -> list[bytes]:
    return [fake.at[place] for place in sorted(fake.at)]


def test_cookies_of_ext4_are_small(tmp_path: Path) -> None:
    """So programs of 32 bits can list it (EOVERFLOW otherwise). Each leads back, in any listing."""
    with contextlib.ExitStack() as stack:
        top = tmp_path
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        is_ext4 = file_system_of(fd).orders_by_hash
        os.close(fd)
        if not is_ext4:
            if os.geteuid():
                pytest.skip("needs root to mount an ext4, or one")
            top = stack.enter_context(image("ext4", tmp_path, size=32 << 20))
        for number in range(3000):
            (top / f"{number}").touch()
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert max(entry.offset for entry in read_entries(fd, 4096)) > SMALL
            entries = listed(Listing(fd), most=50)
            assert len({entry.name for entry in entries}) == len(entries) > 3000
            assert len({entry.offset for entry in entries}) == len(entries)
            assert all(0 < entry.offset < SMALL for entry in entries)
            for listing in (Listing(fd), Listing(fd)):
                for at in (2999, 1500, 0, 1, 2, 700, 2500, 3001):
                    assert listed(listing, entries[at].offset) == entries[at + 1 :]
        finally:
            os.close(fd)


def test_cookies_that_are_small_anyway_or_of_others_are_left_alone(
    hashed: Hashed, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed.at = {number: b"%d" % number for number in range(100)}
    small = dict(hashed.at)
    del hashed.at[99]
    hashed.at[SMALL - 2] = b"last"  # and its cookie is beyond
    assert [e.offset for e in listed(Listing(hashed.open()))][:-1] == [*range(1, 99), SMALL - 2]
    # A file system that may have anything for a cookie, of which no other can be made up.
    hashed.at = {number << 40: name for number, name in small.items()}
    monkeypatch.setattr(listing_module, "file_system_of", lambda fd: FileSystem(0x6969, 1))
    listing = Listing(hashed.open())
    assert [e.offset for e in listed(listing)] == [*sorted(hashed.at)[1:], BEYOND]
    assert names_of(listed(listing, 50 << 40)) == [b"%d" % number for number in range(50, 100)]


@pytest.mark.parametrize("known", [False, True])
def test_names_that_are_close_have_cookies_of_their_own(hashed: Hashed, known: bool) -> None:
    """Which lead back exactly, also where they are remembered no more."""
    for group in range(3, 63, 3):
        for number in range(group // 8 + 1):  # up to 8
            hashed.at[group * GROUP + number * 12345] = b"%d-%d" % (group, number)
    fd = hashed.open()
    listing = Listing(fd)
    entries = listed(listing, most=7)
    assert names_of(entries) == in_order(hashed)
    assert len({entry.offset for entry in entries}) == len(entries)
    assert all(0 < entry.offset < SMALL for entry in entries)
    ranked = [entry for entry in entries if entry.offset & 7]
    assert len(ranked) > 2 * listing_module._MARKS
    for at, entry in reversed(list(enumerate(entries))):
        again = listing if known else Listing(fd)
        assert listed(again, entry.offset, 5) == entries[at + 1 :]
    for most in range(1, 12):
        assert listed(listing, most=most) == entries


def test_what_has_no_small_cookie_has_the_directorys_own(hashed: Hashed) -> None:
    for number in range(20):
        hashed.at[9 * GROUP + number] = b"%d" % number
    hashed.at[10 * GROUP] = b"next"
    listing = Listing(hashed.open())
    entries = listed(listing, most=3)
    assert names_of(entries) == in_order(hashed)
    large = [entry for entry in entries if entry.offset >= SMALL]
    assert len(large) == 12
    assert len({entry.offset for entry in entries}) == len(entries)
    for at, entry in reversed(list(enumerate(entries))):
        assert names_of(listed(listing, entry.offset)) == names_of(entries)[at + 1 :]
    # Where only large ones are known of a group, its later ones are large.
    assert listing.read(large[0].offset, ALL, 1)[0].offset == large[1].offset
    assert listed(listing)[-1].offset == entries[-1].offset


def test_a_place_whose_entry_is_gone_leads_to_what_came_after(hashed: Hashed) -> None:
    for number in range(100):
        hashed.at[number * 5 * GROUP + GROUP] = b"%d" % number
    listing = Listing(hashed.open())
    entries = listed(listing)
    for number in range(40, 60):
        del hashed.at[number * 5 * GROUP + GROUP]
    assert names_of(listed(listing, entries[45].offset)) == [b"%d" % n for n in range(60, 100)]
    hashed.at[50 * 5 * GROUP + GROUP + 1] = b"new"
    again = names_of(listed(listing, entries[45].offset))
    assert again == [b"new", *(b"%d" % n for n in range(60, 100))]


def test_a_failure_on_the_way_to_a_place_is_made_good(
    hashed: Hashed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for group in range(1, 60):
        for number in range(3):
            hashed.at[group * GROUP + number] = b"%d-%d" % (group, number)
    listing = Listing(hashed.open())
    entries = listed(listing)
    reply = listing.read(0, ALL, 20)
    forgotten = next(entry for entry in entries[30:] if entry.offset & 7 == 2)

    def broken(fd: int, size: int) -> bytes:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(listing_module, "read_records", broken)
        with fails(errno.EIO):
            listing.read(forgotten.offset, ALL)
    assert listed(listing, reply[-1].offset) == entries[20:]
    assert listed(listing, forgotten.offset) == entries[entries.index(forgotten) + 1 :]


class Reader:
    """Reads a directory while it changes, and returns to earlier places now and then."""

    def __init__(self, listing: Listing, choose: Random) -> None:
        self.listing = listing
        self._choose = choose
        self.seen: Counter[bytes] = Counter()
        self.offset = 0
        self._places: list[tuple[int, Counter[bytes]]] = []
        self.ended = False

    def step(self) -> None:
        choose = self._choose
        if self.ended or choose.random() < 0.05:
            if choose.random() < 0.2 or not self._places:
                self.offset, self.seen, self._places = 0, Counter(), []  # rewinddir
            else:
                self.offset, seen = choose.choice(self._places)  # seekdir
                self.seen = Counter(seen)
            self.ended = False
        reply = self.listing.read(self.offset, ALL, choose.randint(1, 40))
        fit = choose.randint(1, len(reply)) if reply else 0
        for entry in reply[:fit]:
            self.seen[entry.name] += 1
            self.offset = entry.offset
            if choose.random() < 0.2:
                self._places.append((entry.offset, Counter(self.seen)))  # telldir
        self.ended = not reply


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(6 if SOAK else 2))
def test_three_readers_beside_changes(hashed: Hashed, seed: int, shared: bool) -> None:
    """What stays is seen once by each, from wherever it goes on; nothing twice."""
    choose = Random(seed)
    close = seed % 2  # some names in one group, which are remembered
    stays = []
    for number in range(300):
        place = choose.randrange(2 * GROUP, BEYOND)
        hashed.at[place] = name = b"stays %d" % number
        stays.append(name)
        if close and number < 5:
            hashed.at[place ^ 1 << 33] = name = b"close %d" % number
            stays.append(name)
    others = {b"goes %d" % number: choose.randrange(2 * GROUP, BEYOND) for number in range(200)}
    hashed.at.update({place: name for name, place in others.items()})
    one = Listing(hashed.open())  # which processes may share
    readers = [Reader(one if shared else Listing(hashed.open()), choose) for _ in range(3)]
    whole = 0
    for turn in range(6000):
        reader = choose.choice(readers)
        reader.step()
        assert not [name for name, count in reader.seen.items() if count > 1]
        if reader.ended:
            missing = {b".", b"..", *stays} - reader.seen.keys()
            assert not missing
            whole += 1
        for _ in range(choose.randrange(3)):
            if others and choose.random() < 0.5:
                del hashed.at[others.pop(choose.choice(list(others)))]
            else:
                place = choose.randrange(2 * GROUP, BEYOND)
                if close and choose.random() < 0.1:
                    place = choose.choice(list(hashed.at)) ^ 1 << 32
                if place > 1 << 33 and place not in hashed.at:
                    name = b"comes %d-%d" % (turn, place)
                    hashed.at[place], others[name] = name, place
    assert whole > 15


def test_what_is_remembered_counts_as_kept(hashed: Hashed) -> None:
    """The bound of an open directory holds in one with very many names in common groups."""
    for group in range(1, 400):
        for number in range(3):
            hashed.at[group * GROUP + number] = b"%d-%d%s" % (group, number, b"x" * (group % 100))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        opened = [OpenDirectory(hashed.open()) for _ in range(30)]
        for directory in opened:
            offset = 0
            for _ in range(30):
                offset = directory.listing.read(offset, ALL, 24)[-1].offset
        each = (tracemalloc.get_traced_memory()[0] - before) / len(opened)
    finally:
        tracemalloc.stop()
    marks = opened[0].listing._hashed
    assert marks is not None
    assert marks.marks is not None
    assert len(marks.marks) == 2 * listing_module._MARKS
    assert each < 4096


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="takes a minute: make soak")
def test_a_million_names_have_a_million_small_cookies(tmp_path: Path) -> None:
    """On a real ext4. Each one that is tried leads back, remembered or not."""
    with image("ext4", tmp_path, "-i", "1024", "-I", "128", size=2 << 30) as top:
        for number in range(1_000_000):
            os.mknod(top / f"{number}")
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        try:
            listing = Listing(fd)
            entries = listed(listing)
            assert len(entries) == len({entry.name for entry in entries}) == 1_000_003
            assert len({entry.offset for entry in entries}) == len(entries)
            assert all(0 < entry.offset < SMALL for entry in entries)
            ranked = [at for at, entry in enumerate(entries) if entry.offset & 7]
            print(f"{len(ranked)} of them are not the first of their group")
            choose = Random(1)
            for at in [*choose.sample(range(len(entries)), 2000), *ranked]:
                assert listing.read(entries[at].offset, ALL, 3) == entries[at + 1 : at + 4]
        finally:
            os.close(fd)
