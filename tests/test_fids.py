"""Fids, nodes and their table; numbers of files; descriptors that come and go (session.py)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import (
    ROOT,
    Client,
    fails,
    in_threads,
    made_up,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.fids import FIRST_HANDLE, Fid, FidTable, Node, OpenFile
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
