"""Fids, nodes and their table; numbers of files; descriptors that come and go (session.py)."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import (
    ROOT,
    Client,
    Stepper,
    client_of,
    fails,
    in_threads,
    made_up,
    module_of,
    needs_root,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.descriptors import Descriptors
from ninefuse.fids import FIRST_HANDLE, Fid, FidTable, Node, OpenFile
from ninefuse.ops.directory import fitted, readdirplus
from ninefuse.qids import QTDIR, QTFILE, QTSYMLINK, ROOT_NODEID, QidPaths, qid_of
from ninefuse.syscalls import Attributes

pytestmark = pytest.mark.usefixtures("leak_free")

THE_ROOT = made_up(2, kind=stat.S_IFDIR)
OTHER_DEVICE = (9, 1)


class Table(FidTable):
    """A table of made-up files, whose descriptors are never really closed."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.closed: list[int] = []
        self.set_root(THE_ROOT)

    def note(self, function: Callable[..., object], *args: Any) -> None:
        """Take note of what is deferred; for what a node had, a descriptor of ours is closed."""
        self.closed.extend(args)
        if function == self.close_node:
            self.close_node(os.open(os.devnull, os.O_PATH))
        else:
            assert function in (os.close, self.close_open)

    def found(self, a: Attributes, fd: int = -1, parent: Node | None = None) -> Node:
        """A node that a walk found, marked by its birth."""
        return self.new_node(a, fd, None if parent is None else (parent, b"name"), a.birth)

    def looked_up(self, a: Attributes, fd: int = -1, parent: Node | None = None) -> Fid:
        """The kernel's fid of a file that was looked up just now."""
        node = self.found(a, fd, parent)
        try:
            return self.intern(node)
        finally:
            self.drop(node)


@pytest.fixture
def table() -> Table:
    """An empty table."""
    return Table()


# Numbers


def test_a_file_of_the_source_has_its_own_number(table: Table) -> None:
    """Its inode number, which the users of the mount see."""
    for ino in (3, 12345, (1 << 48) + 7, (0xFFFF << 48) - 1):
        assert table.path_of(made_up(ino)) == ino
        assert table.looked_up(made_up(ino)).number == ino


def test_the_root_is_nodeid_1(table: Table) -> None:
    """Its path is its inode number, by which users see it."""
    assert table.path_of(THE_ROOT) == 2
    assert table.looked_up(THE_ROOT).number == ROOT_NODEID


def test_inode_1_is_not_the_root(table: Table) -> None:
    """A file that has FUSE's number of the root gets another."""
    root, other = table.looked_up(THE_ROOT), table.looked_up(made_up(1))
    assert root.number == ROOT_NODEID != other.number
    assert table.looked_up(made_up(1)) is other


def test_a_source_whose_root_is_inode_1() -> None:
    """It keeps the number, and nobody else gets it."""
    table = Table()
    root = made_up(1, kind=stat.S_IFDIR, device=(7, 7))
    table.set_root(root)
    assert (table.path_of(root), table.looked_up(root).number) == (1, ROOT_NODEID)
    assert table.looked_up(made_up(1, device=OTHER_DEVICE)).number != ROOT_NODEID


def test_other_devices_have_numbers_apart(table: Table) -> None:
    """The same inode number on three devices: three files, each the same every time."""
    devices = [(8, 1), (9, 1), (9, 2)]
    first = [table.looked_up(made_up(77, device=device)).number for device in devices]
    assert first[0] == 77
    assert len(set(first)) == 3
    for device, number in reversed(list(zip(devices, first, strict=True))):
        assert table.looked_up(made_up(77, device=device)).number == number
        table.forget([(number, 2)])
    again = [table.looked_up(made_up(77, device=device)).number for device in reversed(devices)]
    assert again == first[::-1], "forgotten and found again"


@pytest.mark.parametrize("ino", [1 << 48, (1 << 64) - 1])
def test_large_numbers_of_other_devices(table: Table, ino: int) -> None:
    """What leaves no bits to tell the device by is numbered one by one."""
    numbers = [
        table.looked_up(made_up(ino - less, device=device)).number
        for less in (0, 1)
        for device in ((9, 1), (9, 2), (9, 3))
    ]
    assert len(set(numbers)) == 6
    assert table.looked_up(made_up(ino, device=(9, 2))).number == numbers[1]


@pytest.mark.parametrize("source_first", [True, False])
def test_a_number_that_is_taken_is_not_given_again(table: Table, source_first: bool) -> None:
    """A file of the source has the number that another device's would get."""
    foreign = made_up(5, device=OTHER_DEVICE)
    own = made_up(table.path_of(foreign))
    files = [own, foreign] if source_first else [foreign, own]
    first, second = (table.looked_up(a) for a in files)
    assert first.number == own.ino
    assert second.number != first.number
    assert second.node.path == second.number
    for _ in range(2):
        assert [table.looked_up(a) for a in files] == [first, second]
        assert [table.path_of(a) for a in files] == [first.number, second.number]
    table.forget([(second.number, 99)])
    assert table.looked_up(files[1]).number == second.number


def test_numbers_given_one_by_one_are_nobodys_own(table: Table) -> None:
    """A file of the source whose inode number lies among them is given one, too."""
    own = table.looked_up(made_up(0xFFFF << 48))
    assert table.looked_up(made_up(1)) is not own
    assert table.looked_up(made_up(0xFFFF << 48)) is own
    assert own.generation == 0


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(8, 1), (9, 1), (9, 2), (253, 0)]),
            st.one_of(
                st.integers(1, 40),
                st.integers((1 << 48) - 5, (1 << 48) + 5),
                st.builds(lambda high, low: high << 48 | low, st.integers(0xFFFC, 0xFFFF),
                          st.integers(0, 10)),
            ),
        ),
        max_size=40,
    )
)  # fmt: skip
def test_no_two_files_share_a_number(files: list[tuple[tuple[int, int], int]]) -> None:
    """And each file has one number, in whatever order they are met."""
    table = Table()
    numbers: dict[tuple[tuple[int, int], int], int] = {}
    for device, ino in files:
        fid = table.looked_up(made_up(ino, device=device, kind=stat.S_IFDIR))
        assert numbers.setdefault((device, ino), fid.number) == fid.number
        assert fid.generation == 0
    assert len(set(numbers.values())) == len(numbers)
    assert len(table) == len(numbers)


def test_there_are_numbers_for_32767_other_devices() -> None:
    """One more is ENFILE; those that have theirs go on."""
    paths = QidPaths(THE_ROOT)
    numbers = {paths.path(made_up(5, device=(1000, minor))) for minor in range(32767)}
    assert len(numbers) == 32767
    with fails(errno.ENFILE):
        paths.path(made_up(5, device=(1001, 0)))
    assert paths.path(made_up(5, device=(1000, 0))) in numbers
    assert paths.path(made_up(5)) == 5
    assert min(numbers) >= 1 << 63


def test_handles_are_never_given_twice(table: Table) -> None:
    """From 2**64 up, which no nodeid reaches, on whatever thread."""
    taken: list[list[int]] = [[] for _ in range(4)]

    def take(mine: list[int]) -> None:
        mine.extend(table.new_number() for _ in range(2000))

    in_threads(*(lambda mine=mine: take(mine) for mine in taken))
    numbers = [number for mine in taken for number in mine]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) == FIRST_HANDLE


def test_a_qid_says_type_and_version() -> None:
    """The version differs once the file's data does; the type is one of three."""
    kinds = {stat.S_IFDIR: QTDIR, stat.S_IFLNK: QTSYMLINK, stat.S_IFREG: QTFILE}
    kinds |= dict.fromkeys((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK), QTFILE)
    for kind, qtype in kinds.items():
        assert qid_of(9, made_up(9, kind=kind)) == (qtype, 0, 9)
    versions = {
        qid_of(9, made_up(9, mtime=mtime, size=size)).version
        for mtime in (0, 1, 123_456_789)
        for size in (0, 1, 4096)
    }
    assert len(versions) == 9
    assert all(0 <= version < 1 << 32 for version in versions)


# References


def test_a_fid_that_is_not_there(table: Table) -> None:
    """ESTALE for a nodeid, EBADF for a handle."""
    for number, code in ((5, errno.ESTALE), (FIRST_HANDLE, errno.EBADF)):
        with fails(code):
            table.get(number)
        with fails(code):
            table.remove(number)


def test_a_taken_number_is_refused(table: Table) -> None:
    """EINVAL, and the node is referenced by its first fid only."""
    node = table.found(made_up(3), 30)
    first = table.add(FIRST_HANDLE, node)
    with fails(errno.EINVAL):
        table.add(FIRST_HANDLE, node)
    table.drop(node)
    assert node.refs == 1
    assert table.get(FIRST_HANDLE) is first
    table.put(first)
    assert table.closed == []


def test_the_last_reference_closes(table: Table) -> None:
    """Of a fid its open file, of a node its descriptor; each once, and not before."""
    node = table.found(made_up(3), 30)
    table.add(FIRST_HANDLE, node, OpenFile(31, os.O_RDONLY))
    table.add(FIRST_HANDLE + 1, node)
    table.drop(node)
    using, also = table.get(FIRST_HANDLE), table.get(FIRST_HANDLE)
    gone = table.remove(FIRST_HANDLE)
    assert gone is using is also
    table.put(gone)
    table.put(using)
    assert table.closed == []
    table.put(also)
    assert table.closed == [31]
    table.put(table.remove(FIRST_HANDLE + 1))
    assert table.closed == [31, 30]
    assert (len(table), table.descriptors) == (0, 0)


def test_a_fid_moves_to_another_node(table: Table) -> None:
    """What it stood on is let go, unless somebody uses it."""
    first, second, third = (table.found(made_up(ino), 10 * ino) for ino in (3, 4, 5))
    fid = table.add(FIRST_HANDLE, first)
    for node in (first, second, third):
        table.drop(node) if node is first else None
    table.move(fid, second)
    assert table.closed == [30]
    table.pin(second)
    table.drop(second)
    table.open(fid, OpenFile(41, os.O_RDONLY), third)
    assert table.closed == [30]
    table.unpin(second)
    assert table.closed == [30, 40]
    with fails(errno.EINVAL):
        table.open(fid, OpenFile(42, os.O_RDONLY))
    table.drop(third)
    table.clear()
    assert table.closed == [30, 40, 41, 50]


def test_of_two_descriptors_for_a_node_the_second_is_closed(table: Table) -> None:
    """And one that comes for a node which nobody uses any more."""
    node = table.found(made_up(3), 30)
    table.give_descriptor(node, 31)
    assert (node.fd, table.closed) == (30, [31])
    table.drop(node)
    table.give_descriptor(node, 32)
    assert (node.fd, table.closed) == (-1, [31, 30, 32])
    assert table.descriptors == 0


def test_counts_of_a_table(table: Table) -> None:
    """Fids, open ones, open files, nodes with a descriptor."""
    node = table.found(made_up(3), 30)
    table.add(FIRST_HANDLE, node)
    table.add(FIRST_HANDLE + 1, node, OpenFile(31, os.O_RDONLY))
    table.looked_up(made_up(4))
    assert table.statistics() == (3, 1, 1, 1)


# Lookups


def test_lookups_are_taken_back(table: Table) -> None:
    """At none the nodeid leaves; more than there were does no harm, nor an unknown one."""
    fids = [table.looked_up(made_up(ino), 10 * ino) for ino in (3, 4, 5)]
    table.looked_up(made_up(3))
    table.forget([(3, 1), (4, 1), (99, 5), (FIRST_HANDLE, 1)])
    assert [fid.lookups for fid in fids] == [1, 0, 1]
    with fails(errno.ESTALE):
        table.get(4)
    table.forget([(3, 10**9), (4, 1), (5, 1), (5, 1)])
    assert len(table) == 0
    assert sorted(table.closed) == [30, 40, 50]


def test_the_root_is_never_forgotten(table: Table) -> None:
    """The kernel does not count its lookups, and uses it to the end."""
    root = table.looked_up(THE_ROOT, 20)
    table.forget([(ROOT_NODEID, 10)])
    fid = table.get(ROOT_NODEID)
    assert fid is root
    table.put(fid)


def test_a_forgotten_fid_in_use_ends_with_its_last_use(table: Table) -> None:
    """A lookup meanwhile makes a new one and leaves the old alone."""
    old = table.looked_up(made_up(3), 30)
    table.get(3)
    table.forget([(3, 1)])
    new = table.looked_up(made_up(3), 31)
    assert new is not old
    assert table.closed == []
    table.put(old)
    assert table.closed == [30]
    assert table.get(3) is new
    table.put(new)


def test_a_node_found_again_gives_its_descriptor_away(table: Table) -> None:
    """To the node that is known, if that has none; else it is closed."""
    known = table.looked_up(made_up(3))
    table.looked_up(made_up(3), 31)
    assert known.node.fd == 31
    table.looked_up(made_up(3), 32)
    assert (known.node.fd, table.closed) == (31, [32])
    assert (known.lookups, table.descriptors) == (3, 1)


def test_a_descriptor_in_use_is_not_given_away(table: Table) -> None:
    """The node that was found has a fid of its own besides."""
    known = table.looked_up(made_up(3))
    node = table.found(made_up(3), 31)
    table.add(FIRST_HANDLE, node)
    table.intern(node)
    table.drop(node)
    assert (known.node.fd, node.fd) == (-1, 31)
    table.put(table.remove(FIRST_HANDLE))
    assert table.closed == [31]


def test_a_file_found_elsewhere_is_there_from_now_on(table: Table) -> None:
    """Its node remembers the parent and name that were used last."""
    root = table.looked_up(THE_ROOT)
    directory = table.looked_up(made_up(7, kind=stat.S_IFDIR), parent=root.node)
    file = table.looked_up(made_up(3), parent=root.node)
    table.looked_up(made_up(3), parent=directory.node)
    assert file.node.place == (directory.node, b"name")
    table.seen(made_up(3), root.node, b"moved")
    assert file.node.place == (root.node, b"moved")
    table.seen(made_up(3, birth=9), root.node, b"another")
    table.seen(made_up(4), root.node, b"unknown")
    assert file.node.place == (root.node, b"moved")


def test_the_root_has_no_place(table: Table) -> None:
    """Though it may be mounted below itself, and be found there."""
    root = table.looked_up(THE_ROOT, 20)
    below = table.looked_up(made_up(7, kind=stat.S_IFDIR), parent=root.node)
    assert table.looked_up(THE_ROOT, parent=below.node) is root
    assert root.node.place is None
    table.seen(THE_ROOT, below.node, b"name")
    assert root.node.place is None


def test_known_files_are_found_by_their_attributes(table: Table) -> None:
    """The node is referenced; another file of the number is not known."""
    fid = table.looked_up(made_up(3), 30)
    node = table.known(made_up(3))
    assert node is fid.node
    table.forget([(3, 1)])
    assert table.closed == []
    table.drop(fid.node)
    assert table.closed == [30]
    table.looked_up(made_up(4))
    for other in (made_up(3), made_up(4, birth=2), made_up(4, kind=stat.S_IFDIR)):
        assert table.known(other) is None


# Numbers that pass to another file


@pytest.mark.parametrize("change", [{"birth": 2}, {"kind": stat.S_IFDIR}])
def test_a_recycled_number_gets_a_new_generation(table: Table, change: dict[str, int]) -> None:
    """A later file has the inode number: born later, or of another kind."""
    old = table.looked_up(made_up(3), 30)
    node = old.node
    new = table.looked_up(made_up(3, **change), 31)  # type: ignore[arg-type]
    assert new is old
    assert (new.generation, new.lookups) == (1, 2)
    assert new.node is not node
    assert (new.node.fd, table.closed) == (31, [30])
    assert table.looked_up(made_up(3, **change)).generation == 1  # type: ignore[arg-type]
    assert table.looked_up(made_up(3)).generation == 2


def test_a_number_that_passes_on_leaves_users_of_the_old_file_alone(table: Table) -> None:
    """Its descriptor is closed when the last of them has ended."""
    old = table.looked_up(made_up(3), 30)
    table.pin(old.node)
    node = old.node
    table.looked_up(made_up(3, birth=2), 31)
    assert (node.fd, table.closed) == (30, [])
    table.unpin(node)
    assert table.closed == [30]


@pytest.mark.parametrize("mark", [7, b"handle"])
def test_a_mark_that_was_not_known_is_learned(table: Table, mark: int | bytes) -> None:
    """Where nothing is known, the number speaks for itself; what comes to be known is kept."""
    a = made_up(3, birth=7)
    node = table.new_node(a, -1, None)
    fid = table.intern(node)
    assert node.shows(made_up(3, birth=8))
    again = table.new_node(a, -1, None, mark)
    assert table.intern(again) is fid
    assert (fid.generation, fid.node.mark) == (0, mark)
    assert table.looked_up(made_up(3, kind=stat.S_IFDIR)).generation == 1
    table.drop(node)
    table.drop(again)


def test_a_later_file_has_another_handle(table: Table) -> None:
    """Where files are not told apart by their birth."""
    a = made_up(3)
    first = table.new_node(a, -1, None, b"one")
    fid = table.intern(first)
    assert first.shows(a), "the number is the file's as long as its node has a descriptor"
    assert first.shows(a, b"one")
    assert not first.shows(a, b"two")
    second = table.new_node(a, -1, None, b"two")
    assert table.intern(second) is fid
    assert (fid.generation, fid.node) == (1, second)
    table.drop(first)
    table.drop(second)


# Threads


def test_lookups_race_forgets(table: Table) -> None:
    """A lookup that was counted keeps its nodeid usable until it is taken back."""

    def come_and_go(fd: int) -> None:
        for _ in range(400):
            fid = table.looked_up(made_up(3), fd)
            assert table.get(fid.number) is fid
            assert fid.lookups >= 1
            table.put(fid)
            table.forget([(3, 1)])

    in_threads(*(lambda fd=fd: come_and_go(fd) for fd in range(100, 104)))
    assert len(table) == 0
    assert table.descriptors == 0
    assert len(table.closed) == 4 * 400, "each descriptor is closed once"


def test_uses_race_a_clunk(table: Table) -> None:
    """The open file is closed once, after the last use, whoever that is."""
    for number in range(60):
        handle = table.new_number()
        node = table.found(made_up(3))
        table.add(handle, node, OpenFile(1000 + number, os.O_RDONLY))
        table.drop(node)
        used: list[int] = []

        def use(handle: int = handle, used: list[int] = used) -> None:
            while True:
                try:
                    fid = table.get(handle)
                except OSError:
                    return
                assert fid.opened is not None
                used.append(fid.opened.fd)
                assert fid.opened.fd not in table.closed
                table.put(fid)

        def clunk(handle: int = handle) -> None:
            table.put(table.remove(handle))

        in_threads(use, use, clunk)
        assert table.closed.count(1000 + number) == 1
    assert sorted(table.closed) == list(range(1000, 1060))


def test_opens_race_each_other(table: Table) -> None:
    """Of many that open one fid, one wins; the others are told."""
    for number in range(40):
        handle = table.new_number()
        node = table.found(made_up(3))
        fid = table.add(handle, node)
        table.drop(node)
        lost: list[int] = []

        def opening(fd: int, fid: Fid = fid, lost: list[int] = lost) -> None:
            try:
                table.open(fid, OpenFile(fd, os.O_RDONLY))
            except OSError as failure:
                assert failure.errno == errno.EINVAL  # noqa: PT017
                lost.append(fd)

        fds = [4 * number + n for n in range(4)]
        in_threads(*(lambda fd=fd: opening(fd) for fd in fds))
        assert fid.opened is not None
        assert sorted([*lost, fid.opened.fd]) == fds


# Descriptors that come and go


@contextmanager
def few_descriptors(source: Path, most: int) -> Iterator[Client]:
    """A client whose nodes may keep so many descriptors."""
    with client_of(source, most_descriptors=most) as client:
        yield client


def look_up_all(client: Client, directory: int = ROOT) -> list[Fid]:
    """Look all entries of a directory up, one by one."""
    clone = client.walk(start=directory)
    client.do(ops.lopen, clone, os.O_RDONLY)
    names = [entry.name for entry in client.do(ops.readdir, clone, 0, 1 << 20)]
    client.do(ops.clunk, clone)
    return [client.know(n, start=directory) for n in sorted(names) if n not in (b".", b"..")]


def reclaim(client: Client, fid: Fid) -> None:
    """Take the descriptor of a node away, if the session would."""
    for other in client.session.fids._fids.values():
        other.node.recent = other is not fid
    client.session.descriptors._close_coldest(1)


def make_files(directory: Path, count: int) -> None:
    for number in range(count):
        (directory / f"{number:04d}").write_bytes(b"x" * number)


@pytest.mark.parametrize("threads", [1, 17])
@pytest.mark.parametrize("limit", [256, 1024, 20_000])
def test_nodes_have_what_open_files_leave(client: Client, limit: int, threads: int) -> None:
    """At least a few, 16,384 at most; a part of the limit is left for calls under way."""
    fids = client.session.fids
    cache = Descriptors(
        fids, client.executor.in_background, most=16384, threads=threads, limit=limit
    )
    room = limit - 40 - 3 * threads
    few = min(64, room // 4)
    assert cache.for_nodes == min(room, 16384)
    for opened in range(1, room - few + 1):
        cache.claim()
        assert cache.for_nodes == min(16384, room - opened)
        assert cache.for_nodes + opened + 3 * threads < limit
    with fails(errno.ENFILE):
        cache.claim()
    assert cache.for_nodes == few
    fids.open_descriptors = 0


def test_many_files_are_known_with_few_descriptors(source: Path) -> None:
    """Each is opened again when it is used, and the others pay for it."""
    make_files(source, 200)
    with few_descriptors(source, 20) as client:
        fids = look_up_all(client)
        assert client.session.fids.descriptors <= 21
        random.Random(3).shuffle(fids)
        for fid in fids:
            assert fid.node.place is not None
            assert client.do(ops.getattr, fid.number).size == int(fid.node.place[1])
            assert client.session.fids.descriptors <= 21
        assert client.session.fids.descriptors >= 10


def test_files_that_a_listing_found_take_few_descriptors_too(source: Path) -> None:
    """They get theirs at their first use, and the coldest lose theirs then as well."""
    make_files(source, 300)
    with few_descriptors(source, 16) as client:
        fid, offset = client.open(), 0
        found: list[int] = []
        while reply := client.do(readdirplus, fid, offset):
            fitted(client.session, fid, reply, len(reply))
            found += [entry.fid.number for entry in reply if entry.fid is not None]
            offset = reply[-1].offset
        for number in found:
            client.do(ops.getattr, number)
        assert len(found) == 300
        assert client.session.fids.descriptors <= 17


def test_files_that_were_made_take_few_descriptors_too(source: Path) -> None:
    """Making a file is one of the moments at which the coldest lose theirs."""
    with few_descriptors(source, 16) as client:
        for number in range(100):
            handle = client.create(b"%d" % number)
            client.know(start=handle)
            client.do(ops.clunk, handle)
            assert client.session.fids.descriptors <= 18
        assert len(client.session.fids) == 101


def test_a_deep_tree_takes_few_descriptors(source: Path) -> None:
    """Directories below each other: none is needed to let go of another."""
    depth = 150
    source.joinpath(*["d"] * depth).mkdir(parents=True)
    with few_descriptors(source, 16) as client:
        fids = [client.fid(ROOT)]
        for _ in range(depth):
            fids.append(client.know("d", start=fids[-1].number))
            assert client.session.fids.descriptors <= 18
        inodes = [client.do(ops.getattr, fid.number).ino for fid in reversed(fids)]
        assert len(set(inodes)) == depth + 1
        assert client.session.fids.descriptors <= 18
        assert client.do(ops.getattr, client.walk("..", start=fids[-1].number)).ino == inodes[1]


def test_what_is_in_use_keeps_its_descriptor(source: Path) -> None:
    """The root, open files, fids of clients, and what an operation is at."""
    make_files(source, 6)
    with few_descriptors(source, 1000) as client:
        opened, cloned, asked, idle, *_ = look_up_all(client)
        client.do(ops.lopen, client.walk(start=opened.number), os.O_RDONLY)
        client.walk(start=cloned.number)
        asking = Stepper(ops.getattr(client.session, asked.number))
        asking.before("stat_descriptor")
        for fid in (client.fid(ROOT), opened, cloned, asked, idle):
            reclaim(client, fid)
        assert [fid.node.fd >= 0 for fid in (client.fid(ROOT), opened, cloned, asked)] == [True] * 4
        assert idle.node.fd == -1
        asking.finish()


def test_a_node_used_since_the_last_round_is_passed_over_once(source: Path) -> None:
    """The coldest go first."""
    make_files(source, 4)
    with few_descriptors(source, 1000) as client:
        fids = look_up_all(client)
        for fid in fids:
            fid.node.recent = False
        client.do(ops.getattr, fids[0].number)
        client.session.descriptors._close_coldest(2)
        assert [fid.node.fd >= 0 for fid in fids] == [True, False, False, True]


def test_no_more_are_reclaimed_than_wanted(source: Path) -> None:
    """None at all if others have let go meanwhile."""
    make_files(source, 4)
    with few_descriptors(source, 1000) as client:
        for fid in look_up_all(client):
            fid.node.recent = False
        for most in (0, -3):
            assert client.session.fids.coldest(most) == []
            client.session.descriptors._close_coldest(most)
        assert client.session.fids.descriptors == 5


def test_a_reclaimed_file_is_found_where_it_was_renamed_to(source: Path) -> None:
    """By us: it is opened again at its new name, and below a directory's new name."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        for fid in (file, directory):
            reclaim(client, fid)
            assert fid.node.fd == -1
        client.do(ops.renameat, ROOT, b"d", ROOT, b"e")
        client.do(ops.renameat, client.walk("e"), b"file", ROOT, b"g")
        assert client.do(ops.getattr, file.number).size == 4
        assert client.do(ops.getattr, directory.number).kind == stat.S_IFDIR


@pytest.mark.parametrize("how", ["unlinked", "moved", "replaced", "directory moved"])
def test_what_its_name_does_not_lead_back_to_keeps_its_descriptor(source: Path, how: str) -> None:
    """It could not be opened again."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        if how == "unlinked":
            client.do(ops.unlinkat, directory.number, b"file")
        elif how == "moved":
            (source / "d" / "file").rename(source / "file")
        elif how == "replaced":
            (source / "new").touch()
            (source / "new").rename(source / "d" / "file")
        else:
            reclaim(client, directory)
            (source / "d").rename(source / "e")
        reclaim(client, file)
        assert file.node.fd >= 0
        assert client.do(ops.getattr, file.number).size == 4


def test_a_name_that_cannot_be_looked_at_keeps_the_descriptor(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error says nothing about where the name leads."""
    make_files(source, 1)

    def broken(fd: int, name: bytes) -> Attributes:
        raise OSError(errno.EIO, "broken")

    with few_descriptors(source, 1000) as client:
        (fid,) = look_up_all(client)
        monkeypatch.setattr(module_of(Descriptors), "stat_name", broken)
        reclaim(client, fid)
        assert fid.node.fd >= 0


@pytest.mark.parametrize("how", ["unlinked", "replaced", "directory", "parent gone", "parent file"])
def test_a_reclaimed_file_that_has_gone_is_stale(source: Path, how: str) -> None:
    """By somebody else's hand: ESTALE, for then the kernel walks the path again."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        reclaim(client, file)
        reclaim(client, directory)
        assert client.session.fids.descriptors == 1
        (source / "d" / "file").rename(source / "kept")  # its inode number stays taken
        if how == "replaced":
            (source / "d" / "file").write_bytes(b"other")
        elif how == "directory":
            (source / "d" / "file").mkdir()
        elif how in ("parent gone", "parent file"):
            (source / "d").rmdir()
            if how == "parent file":
                (source / "d").touch()
        for _ in range(2):
            with fails(errno.ESTALE):
                client.do(ops.getattr, file.number)
        client.do(ops.getattr, ROOT)
        if how in ("replaced", "directory"):
            again = client.know("file", start=directory.number)
            assert again is not file
            assert client.do(ops.getattr, again.number).size != 4


def test_errors_of_opening_again_are_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not taken for a file that has gone; and the next try may do."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        module = module_of(Descriptors)
        for name in ("open_step", "stat_descriptor"):
            real = getattr(module, name)
            for good in range(2):
                reclaim(client, file)
                reclaim(client, directory)
                calls: list[Any] = []

                def breaking(
                    *args: Any, real: Any = real, good: int = good, calls: list[Any] = calls
                ) -> Any:
                    calls.append(args)
                    if len(calls) > good:
                        raise OSError(errno.EMFILE, "no more")
                    return real(*args)

                with monkeypatch.context() as patch:
                    patch.setattr(module, name, breaking)
                    with fails(errno.EMFILE):
                        client.do(ops.getattr, file.number)
                assert len(calls) == good + 1
                client.check_idle()
        assert client.do(ops.getattr, file.number).size == 4


def test_of_two_who_open_a_node_again_the_second_closes(source: Path) -> None:
    """Both have opened the file; the node keeps one descriptor (leak_free counts)."""
    make_files(source, 1)
    with few_descriptors(source, 1000) as client:
        (fid,) = look_up_all(client)
        reclaim(client, fid)
        assert fid.node.fd == -1
        first = Stepper(ops.getattr(client.session, fid.number))
        second = Stepper(ops.statfs(client.session, fid.number))
        first.before("reopen")
        second.before("reopen")
        second.finish()
        kept = fid.node.fd
        assert kept >= 0
        first.finish()
        assert fid.node.fd == kept
        client.rest()
        assert client.session.fids.descriptors == 2


def test_opening_again_waits_for_a_rename(source: Path) -> None:
    """Between the two names there would be nothing to open."""
    make_files(source, 2)
    with few_descriptors(source, 1000) as client:
        fid, _ = look_up_all(client)
        reclaim(client, fid)
        moving = Stepper(ops.renameat(client.session, ROOT, b"0000", ROOT, b"0001"))
        moving.after("_rename")
        asking = Stepper(ops.getattr(client.session, fid.number))
        asking.to_lock()
        moving.finish()
        assert asking.finish().size == 0
        assert client.place(fid.number)[1] == b"0001"


def test_reclaiming_waits_for_nobody_who_uses_names(source: Path) -> None:
    """A walk that is stuck in a slow directory must not hold it up, and all names behind it."""
    make_files(source, 40)
    with few_descriptors(source, 1000) as client:
        fids = look_up_all(client)
        walking = Stepper(ops.walk(client.session, ROOT, client.new(), [b"0000"]))
        walking.before("_step")
        for fid in fids:
            fid.node.recent = False
        client.session.descriptors.most = 16
        Stepper(client.session.descriptors._reclaim()).finish()
        assert client.session.fids.descriptors == 12
        walking.finish()


def test_a_name_that_is_going_away_keeps_its_nodes_descriptor(source: Path) -> None:
    """Between the look at the name and its removal nobody may reclaim it."""
    make_files(source, 40)
    with few_descriptors(source, 1000) as client:
        fids = look_up_all(client)
        removing = Stepper(ops.unlinkat(client.session, ROOT, b"0003"))
        removing.before("_remove")
        for fid in fids:
            fid.node.recent = False
        client.session.descriptors.most = 8
        Stepper(client.session.descriptors._reclaim()).finish()
        removing.finish()
        (gone,) = [fid for fid in fids if fid.node.place and fid.node.place[1] == b"0003"]
        assert gone.node.fd >= 0
        assert client.do(ops.getattr, gone.number).nlink == 0


def test_what_cannot_be_reclaimed_is_not_looked_at_for_every_lookup(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are open: the next look comes when an eighth more have been found."""
    make_files(source, 64)
    with few_descriptors(source, 32) as client:
        for name in sorted(os.listdir(source))[:40]:
            client.open(name)
        looks: list[int] = []
        real = client.session.fids.coldest

        def counting(most: int, *where: Any) -> list[Node]:
            looks.append(most)
            return real(most, *where)

        monkeypatch.setattr(client.session.fids, "coldest", counting)
        for name in sorted(os.listdir(source))[40:]:
            client.open(name)
        assert len(looks) <= 24 // (32 // 8) + 1


def test_directories_below_each_other_are_stale_rather_than_endless(source: Path) -> None:
    """One that was mounted below itself is remembered below itself."""
    (source / "a" / "b").mkdir(parents=True)
    with few_descriptors(source, 1000) as client:
        a = client.know("a")
        b = client.know("b", start=a.number)
        for fid in (b, a):
            reclaim(client, fid)
        a.node.place = b.node, b"a"
        for fid in (a, b):
            with fails(errno.ESTALE):
                client.do(ops.getattr, fid.number)
        assert client.know("a") is a
        assert client.do(ops.getattr, b.number).kind == stat.S_IFDIR


@needs_root
def test_a_root_that_is_mounted_below_itself(source: Path) -> None:
    """It is fid 1 there, too; going up from it stays there, and it is not removed."""
    (source / "below").mkdir()
    (source / "file").touch()
    try:
        subprocess.run(["mount", "--bind", source, source / "below"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    try:
        with few_descriptors(source, 1000) as client:
            assert client.know("below") is client.fid(ROOT)
            assert client.node(ROOT).place is None
            assert client.know("..") is client.fid(ROOT)
            with fails(errno.EBUSY):
                client.do(ops.remove, client.walk(start=ROOT))
            assert client.know("below", "file") is client.know("file")
    finally:
        subprocess.run(["umount", source / "below"], check=True)


@needs_root
def test_a_file_that_overlayfs_copies_up_is_the_same_file(tmp_path: Path) -> None:
    """Its birth changes with the first write; its fid, its generation and its use do not."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "d").mkdir()
    (tmp_path / "lower" / "d" / "file").write_bytes(b"low")
    layers = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    try:
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, tmp_path / "merged"],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("overlayfs cannot be mounted here")
    try:
        with few_descriptors(tmp_path / "merged", 1000) as client:
            directory = client.know("d")
            file = client.know("file", start=directory.number)
            born = client.do(ops.getattr, file.number).birth
            writing = client.walk(start=file.number)
            client.do(ops.lopen, writing, os.O_WRONLY | os.O_APPEND)
            client.do(ops.write, writing, 0, b"up")
            assert client.do(ops.getattr, file.number).birth != born
            client.do(ops.clunk, writing)
            assert client.know("d") is directory
            assert client.know("d", "file") is file
            assert (directory.generation, file.generation) == (0, 0)
            reclaim(client, file)
            assert file.node.fd == -1
            assert client.do(ops.getattr, file.number).size == 5
            client.do(ops.rename, file.number, ROOT, b"moved")
            client.do(ops.remove, client.walk("moved"))
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)


# What stays after many files


def test_files_made_and_unlinked_leave_nothing(client: Client) -> None:
    """Neither fids nor descriptors, nor room in the reclaimer's list."""
    for number in range(1500):
        name = b"%d" % number
        handle = client.create(name)
        fid = client.know(start=handle)
        client.do(ops.clunk, handle)
        client.do(ops.unlinkat, ROOT, name)
        client.forget(fid)
    assert set(client.session.fids._fids) == {ROOT}
    assert client.session.fids.descriptors == 1
    assert len(client.session.fids._clock) <= 100


def test_a_descriptor_that_comes_and_goes_takes_no_room(source: Path) -> None:
    """One file is all that can be reclaimed, and is used again each time."""
    make_files(source, 8)
    with few_descriptors(source, 6) as client:
        *held, thrashed = look_up_all(client)
        for fid in held:
            client.do(ops.lopen, client.walk(start=fid.number), os.O_RDONLY)
        losses: Counter[bool] = Counter()
        for _ in range(400):
            client.do(ops.getattr, thrashed.number)
            client.session.descriptors.note()
            client.rest()
            losses[thrashed.node.fd == -1] += 1
        assert losses[True] > 100, "it was not reclaimed again and again"
        assert len(client.session.fids._clock) <= 100
        assert len(client.session.fids) == 1 + 8 + 7
