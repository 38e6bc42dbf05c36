"""readdir, readdirplus, and taking back what found no room."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections import Counter
from pathlib import Path

import pytest
from ops_helpers import (
    ROOT,
    Client,
    Stepper,
    client_of,
    fails,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.fuse.entries import EntryPlus, fitted, readdirplus
from ninefuse.linux.records import DirectoryEntry
from ninefuse.tree.opened import OpenDirectory

pytestmark = pytest.mark.usefixtures("leak_free")

BIG = 1 << 20


def size_of(entry: DirectoryEntry) -> int:
    """Bytes of a 9P record: qid 13, offset 8, type 1, length 2, and the name."""
    return 24 + len(entry.name)


def fill(directory: Path, count: int, length: int = 0) -> set[bytes]:
    """Files in a directory, with names of a certain length; what a listing of it holds."""
    made = {f"{number:05d}".ljust(length, "x") for number in range(count)}
    for name in made:
        (directory / name).touch()
    return {os.fsencode(name) for name in made} | {b".", b".."}


def read_all(client: Client, fid: int, count: int, offset: int = 0) -> list[DirectoryEntry]:
    """All entries from an offset on, in replies of so many bytes."""
    entries: list[DirectoryEntry] = []
    while reply := client.do(ops.readdir, fid, offset, count):
        assert sum(map(size_of, reply)) <= count
        entries += reply
        offset = reply[-1].offset
    return entries


def read_plus(client: Client, fid: int, room: int = 10**6, offset: int = 0) -> list[EntryPlus]:
    """All entries with attributes, in replies that have room for so many."""
    entries: list[EntryPlus] = []
    while reply := client.do(readdirplus, fid, offset):
        fit = min(len(reply), room)
        fitted(client.session, fid, reply, fit)
        entries += reply[:fit]
        offset = reply[fit - 1].offset
    return entries


def once_each(names: list[bytes]) -> set[bytes]:
    """The names, which may not be doubled."""
    assert len(names) == len(set(names))
    return set(names)


# readdir


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_a_listing_has_every_entry_once(client: Client, count: int) -> None:
    """Dot and dot-dot among them, with number and type."""
    expected = fill(client.source, count)
    entries = read_all(client, client.open(), BIG)
    assert once_each([entry.name for entry in entries]) == expected
    for entry in entries:
        found = os.lstat(os.fsencode(client.source) + b"/" + entry.name)
        assert entry.type == stat.S_IFMT(found.st_mode) >> 12
        if entry.name != b"..":
            assert entry.ino == found.st_ino


def test_types_are_those_of_the_entries(client: Client) -> None:
    """Directories, symlinks, FIFOs and files."""
    (client.source / "directory").mkdir()
    (client.source / "symlink").symlink_to("directory")
    os.mkfifo(client.source / "fifo")
    (client.source / "file").touch()
    types = {entry.name: entry.type for entry in read_all(client, client.open(), BIG)}
    assert types == {
        b".": stat.S_IFDIR >> 12,
        b"..": stat.S_IFDIR >> 12,
        b"directory": stat.S_IFDIR >> 12,
        b"symlink": stat.S_IFLNK >> 12,
        b"fifo": stat.S_IFIFO >> 12,
        b"file": stat.S_IFREG >> 12,
    }


@pytest.mark.parametrize("count", [24 + 5, 24 + 6, 60, 24 * 4, 500, 4096])
def test_small_replies_lose_and_double_nothing(client: Client, count: int) -> None:
    """Replies with room for one entry, or a few, or not quite for two."""
    expected = fill(client.source, 50)
    entries = read_all(client, client.open(), count)
    assert once_each([entry.name for entry in entries]) == expected


def test_a_reply_is_as_full_as_it_can_be(client: Client) -> None:
    """The entry that did not fit is the first of the next reply."""
    fill(client.source, 50)
    fid = client.open()
    everything = read_all(client, fid, BIG)
    offset, at = 0, 0
    while reply := client.do(ops.readdir, fid, offset, 200):
        assert reply == everything[at : at + len(reply)]
        at += len(reply)
        offset = reply[-1].offset
        if at < len(everything):
            assert sum(map(size_of, reply)) + size_of(everything[at]) > 200
    assert at == len(everything)


def test_a_reply_too_small_for_one_entry(client: Client) -> None:
    """EINVAL, nothing is lost by that; at the end of the directory it is the end."""
    name = "x" * 255
    (client.source / name).touch()
    fid = client.open()
    everything = read_all(client, fid, BIG)
    offset = 0
    for entry in everything:
        for count in (0, 1, size_of(entry) - 1):
            with fails(errno.EINVAL):
                client.do(ops.readdir, fid, offset, count)
        assert client.do(ops.readdir, fid, offset, size_of(entry)) == [entry]
        offset = entry.offset
    assert client.do(ops.readdir, fid, offset, 0) == []


def test_a_listing_begins_again_at_offset_0(client: Client) -> None:
    """From anywhere in it, and it sees what has changed since."""
    expected = fill(client.source, 20)
    fid = client.open()
    for count in (60, 500, BIG):
        assert client.do(ops.readdir, fid, 0, count)
        assert {e.name for e in read_all(client, fid, count)} == expected
    (client.source / "new").touch()
    (client.source / "00000").unlink()
    expected = (expected | {b"new"}) - {b"00000"}
    assert {e.name for e in read_all(client, fid, BIG)} == expected


def test_a_listing_goes_on_from_any_cookie(client: Client) -> None:
    """The rest is the same in whatever order the cookies are used; telldir and seekdir."""
    fill(client.source, 300)
    fid = client.open()
    everything = read_all(client, fid, BIG)
    assert len({entry.offset for entry in everything}) == len(everything)
    order = list(range(len(everything)))
    random.Random(1).shuffle(order)
    for at in order[:60]:
        offset = everything[at].offset
        expected = everything[at + 1 : at + 4]
        reply = client.do(ops.readdir, fid, offset, 3 * 29)
        assert [e.name for e in reply] == [e.name for e in expected][: len(reply)]
        assert reply or not expected


def test_cookies_are_good_for_another_open_fid(client: Client) -> None:
    """They are the directory's own, not those of one listing."""
    fill(client.source, 100)
    first, second = client.open(), client.open()
    everything = read_all(client, first, 500)
    for at in (0, 3, 50, 99, len(everything) - 1):
        rest = read_all(client, second, 500, everything[at].offset)
        assert rest == everything[at + 1 :]


def test_two_readers_of_one_fid_do_not_disturb_each_other(client: Client) -> None:
    """Each goes on at its own offset."""
    fill(client.source, 60)
    fid = client.open()
    everything = read_all(client, fid, BIG)
    offsets = [0, 0]
    found: tuple[list[DirectoryEntry], ...] = ([], [])
    for turn in range(2 * len(everything)):
        who = turn % 2
        reply = client.do(ops.readdir, fid, offsets[who], 29 + 40 * who)
        found[who].extend(reply)
        if reply:
            offsets[who] = reply[-1].offset
    assert list(found[0]) == everything
    assert list(found[1]) == everything


def test_a_directory_of_many_pieces(client: Client) -> None:
    """More than the kernel gives at once: 3,000 entries of 60 bytes."""
    expected = fill(client.source, 3000, 60)
    for count in (8192, BIG):
        fid = client.open()
        assert once_each([e.name for e in read_all(client, fid, count)]) == expected
        client.do(ops.clunk, fid)


@pytest.mark.parametrize("count", [90, 2000])
def test_changes_meanwhile_cost_no_other_entry(client: Client, count: int) -> None:
    """Who stays the whole time is listed once; who comes or goes, once at most."""
    expected = fill(client.source, 1500, 40)
    chance = random.Random(2)
    staying = {name for name in expected if not name.endswith(b"x") or chance.random() < 0.5}
    going = sorted(expected - staying)
    fid = client.open()
    seen: list[bytes] = []
    offset, new = 0, 0
    while reply := client.do(ops.readdir, fid, offset, count):
        seen += [entry.name for entry in reply]
        offset = reply[-1].offset
        if going:
            (client.source / os.fsdecode(going.pop(chance.randrange(len(going))))).unlink()
        if new < 200:
            new += 1
            (client.source / f"new-{new}").touch()
    names = once_each(seen)
    assert staying <= names
    assert all(name in expected or name.startswith(b"new-") for name in names)


def test_removing_what_was_listed_empties_a_directory(client: Client) -> None:
    """rm -rf: read some, remove them, go on; nothing is left out."""
    fill(client.source, 500)
    fid = client.open()
    offset = 0
    while reply := client.do(ops.readdir, fid, offset, 700):
        for entry in reply:
            if entry.name not in (b".", b".."):
                client.do(ops.unlinkat, fid, entry.name)
        offset = reply[-1].offset
    assert os.listdir(client.source) == []


def test_a_removed_directory_has_no_entries(client: Client) -> None:
    """ENOENT, as getdents says; the C library takes that for the end."""
    (client.source / "d").mkdir()
    fid = client.open("d")
    (client.source / "d").rmdir()
    with fails(errno.ENOENT):
        client.do(ops.readdir, fid, 0, BIG)
    with fails(errno.ENOENT):
        client.do(readdirplus, fid, 0)


def test_what_cannot_be_listed(client: Client) -> None:
    """EINVAL unopened, ENOTDIR for an open file or attribute."""
    (client.source / "file").touch()
    attribute = client.new()
    client.do(ops.xattrwalk, ROOT, attribute)
    for fid, code in (
        (client.walk(), errno.EINVAL),
        (client.walk("file"), errno.EINVAL),
        (client.open("file"), errno.ENOTDIR),
        (attribute, errno.ENOTDIR),
    ):
        with fails(code):
            client.do(ops.readdir, fid, 0, BIG)
        with fails(code):
            client.do(readdirplus, fid, 0)


def test_offsets_that_no_directory_has(client: Client) -> None:
    """EINVAL for what the kernel cannot seek to, and the listing goes on."""
    expected = fill(client.source, 5)
    fid = client.open()
    for offset in (1 << 63, (1 << 64) - 1):
        with fails(errno.EINVAL):
            client.do(ops.readdir, fid, offset, BIG)
        with fails(errno.EINVAL):
            client.do(readdirplus, fid, offset)
    assert {e.name for e in read_all(client, fid, BIG)} == expected


# readdirplus


def test_entries_come_with_attributes_and_fids(client: Client) -> None:
    """As walk and getattr would say; none for dot-dot, no fid for dot."""
    fill(client.source, 10)
    (client.source / "directory").mkdir()
    (client.source / "link").symlink_to("directory")
    entries = {entry.name: entry for entry in read_plus(client, client.open())}
    assert len(entries) == 14
    dotdot = entries.pop(b"..")
    assert (dotdot.attributes, dotdot.fid) == (None, None)
    dot = entries.pop(b".")
    assert dot.fid is None
    assert dot.attributes == client.do(ops.getattr, ROOT)
    for name, entry in entries.items():
        assert entry.fid is not None
        assert entry.fid.lookups == 1
        assert entry.attributes == client.do(ops.getattr, client.walk(name))
        assert entry.attributes.kind >> 12 == entry.type
        assert client.know(name) is entry.fid


def test_entries_have_no_descriptor_until_they_are_used(client: Client) -> None:
    """A listing of a large directory does not eat up the limit on open files."""
    fill(client.source, 200)
    fid = client.open()
    entries = read_plus(client, fid)
    assert client.session.fids.descriptors == 1
    (entry,) = [e for e in entries if e.name == b"00100"]
    assert entry.fid is not None
    assert client.do(ops.getattr, entry.fid.number) == entry.attributes
    assert client.session.fids.descriptors == 2


def test_an_entry_that_is_known_keeps_its_fid(client: Client) -> None:
    """A lookup is added to it; it moves to the name that was listed."""
    (client.source / "d").mkdir()
    (client.source / "file").touch()
    os.link(client.source / "file", client.source / "d" / "second")
    known = client.know("file")
    (entry,) = [e for e in read_plus(client, client.open("d")) if e.name == b"second"]
    assert entry.fid is known
    assert known.lookups == 2
    assert client.place(known.number)[1] == b"second"
    assert client.session.fids.descriptors == 3, "the root's, d's and the file's"


@pytest.mark.parametrize("room", [1, 2, 7, 24, 1000])
def test_lookups_are_counted_for_what_found_room(client: Client, room: int) -> None:
    """Once for each entry that the reply held; the rest comes again with the next one."""
    expected = fill(client.source, 120)
    fid = client.open()
    entries = read_plus(client, fid, room)
    assert once_each([entry.name for entry in entries]) == expected
    for entry in entries:
        assert entry.fid is None or entry.fid.lookups == 1
    client.session.kernel.forget([(e.fid.number, 1) for e in entries if e.fid is not None])
    assert set(client.session.fids._fids) == {ROOT, fid}


@pytest.mark.parametrize("fit", [0, 1, 5])
def test_lookups_are_taken_back_for_what_found_no_room(client: Client, fit: int) -> None:
    """Those files leave the table again, unless somebody else knows them."""
    fill(client.source, 10)
    known = client.know("00003")
    fid = client.open()
    reply = client.do(readdirplus, fid, 0)
    assert len(reply) == 12
    fitted(client.session, fid, reply, fit)
    kept = {e.fid.number for e in reply[:fit] if e.fid is not None}
    assert set(client.session.fids._fids) == {ROOT, fid, known.number} | kept
    assert known.lookups == 1 + (known.number in kept)


def test_replies_grow_to_what_finds_room(client: Client) -> None:
    """And shrink to it; the last reply of a directory says nothing about room."""
    fill(client.source, 1000)
    fid = client.open()
    opened = client.fid(fid).opened
    assert isinstance(opened, OpenDirectory)
    first = client.do(readdirplus, fid, 0)
    fitted(client.session, fid, first, len(first))
    second = client.do(readdirplus, fid, first[-1].offset)
    assert len(second) == 2 * len(first)
    fitted(client.session, fid, second, 30)
    third = client.do(readdirplus, fid, second[29].offset)
    assert len(third) == 30
    fitted(client.session, fid, third, 0)
    assert len(client.do(readdirplus, fid, second[29].offset)) == 30
    while reply := client.do(readdirplus, fid, third[-1].offset):
        third = reply[:30]
        fitted(client.session, fid, reply, len(third))
    assert len(client.do(readdirplus, fid, 0)) >= 30


@pytest.mark.parametrize("room", [3, 10, 1000])
def test_long_names_are_listed_like_short_ones(client: Client, room: int) -> None:
    """A reply may hold few of them, and none is too long for it."""
    expected = fill(client.source, 100, 255)
    fid = client.open()
    for _ in range(2):
        entries = read_plus(client, fid, room)
        assert once_each([entry.name for entry in entries]) == expected
    fill(client.source, 1)
    assert len(read_plus(client, fid, room)) == 103


def test_an_entry_that_vanished_is_left_out(client: Client) -> None:
    """It was read from the directory, and removed before its attributes were."""
    expected = fill(client.source, 20)
    fid = client.open()
    listing = Stepper(readdirplus(client.session, fid, 0))
    listing.after("read")
    for name in ("00003", "00004", "00019"):
        (client.source / name).unlink()
    (client.source / "00003").mkdir()
    entries = listing.finish()
    names = once_each([entry.name for entry in entries])
    assert names == expected - {b"00004", b"00019"}
    (entry,) = [e for e in entries if e.name == b"00003"]
    assert entry.type == stat.S_IFDIR >> 12


def test_the_end_is_where_the_directory_ends(client: Client) -> None:
    """A reply whose entries have all vanished is not it: an empty one would end the listing."""
    expected = fill(client.source, 500)
    fid = client.open()
    first = client.do(readdirplus, fid, 0)
    fitted(client.session, fid, first, len(first))
    shown = {entry.name for entry in first}
    order = [entry.name for entry in read_all(client, client.open(), BIG)]
    vanishing = [name for name in order if name not in shown][: 4 * len(first)]
    for name in vanishing:
        (client.source / os.fsdecode(name)).unlink()
    rest = read_plus(client, fid, offset=first[-1].offset)
    names = once_each([entry.name for entry in first + rest])
    assert names == expected - set(vanishing)


def test_an_entry_that_tells_nothing_of_itself_is_listed_all_the_same(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead mount in the source, say: it must not hide the others, and counts no lookup."""
    fill(client.source, 20)
    real = client.session.stat_name

    def breaking(fd: int, name: bytes) -> object:
        if name == b"00007":
            raise OSError(errno.ENOTCONN, "dead")
        return real(fd, name)

    fid = client.open()
    with monkeypatch.context() as patch:
        patch.setattr(client.session, "stat_name", breaking)
        entries = read_plus(client, fid)
    assert len(entries) == 22
    (dead,) = [e for e in entries if e.name == b"00007"]
    assert dead.attributes is None
    assert dead.fid is None
    assert dead.ino not in client.session.fids._fids


def test_taking_back_after_the_listing_was_closed(client: Client) -> None:
    """The lookups are taken back though the open fid has gone."""
    fill(client.source, 5)
    fid = client.open()
    reply = client.do(readdirplus, fid, 0)
    client.do(ops.clunk, fid)
    fitted(client.session, fid, reply, 0)
    assert set(client.session.fids._fids) == {ROOT}


def test_a_listing_closed_meanwhile_ends_well(client: Client) -> None:
    """The descriptor stays open until the last entry has been looked at."""
    fill(client.source, 5)
    fid = client.open()
    listing = Stepper(readdirplus(client.session, fid, 0))
    listing.after("read")
    client.do(ops.clunk, fid)
    assert len(listing.finish()) == 7


def test_hard_links_in_one_directory_are_one_fid(client: Client) -> None:
    """With a lookup for each of the names."""
    (client.source / "a").touch()
    os.link(client.source / "a", client.source / "b")
    os.link(client.source / "a", client.source / "c")
    fids = Counter(entry.fid for entry in read_plus(client, client.open()))
    del fids[None]
    ((fid, times),) = fids.items()
    assert fid is not None
    assert (times, fid.lookups) == (3, 3)


def test_a_file_below_a_listed_directory_is_reached(client: Client) -> None:
    """Nodes without descriptor are opened one from the other, down from the root."""
    deep = client.source / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    number = ROOT
    for name in (b"a", b"b", b"c", b"file"):
        clone = client.walk(start=number)
        client.do(ops.lopen, clone, os.O_RDONLY)
        (entry,) = [e for e in read_plus(client, clone) if e.name == name]
        client.do(ops.clunk, clone)
        assert entry.fid is not None
        number = entry.fid.number
    assert client.do(ops.getattr, number).size == 4


def test_a_read_only_session_is_listed(source: Path) -> None:
    """With and without attributes."""
    expected = fill(source, 5)
    with client_of(source, read_only=True) as client:
        fid = client.open()
        assert {e.name for e in read_all(client, fid, BIG)} == expected
        assert {e.name for e in read_plus(client, fid)} == expected
