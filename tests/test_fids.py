"""Fids, nodes and their table; numbers of files; descriptors that come and go (session.py)."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
import threading
import time
import tracemalloc
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
from ninefuse.linux.syscalls import Attributes
from ninefuse.tree.identity import Device, Devices, _By
from ninefuse.tree.kernel import FIRST_HANDLE, KernelTable
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import OpenDirectory, OpenFile
from ninefuse.tree.places import hashed
from ninefuse.tree.qids import (
    QTDIR,
    QTFILE,
    QTSYMLINK,
    ROOT_NODEID,
    QidPaths,
    is_on_own_device,
    qid_of,
)
from ninefuse.tree.table import Fid

pytestmark = pytest.mark.usefixtures("leak_free")

THE_ROOT = made_up(2, kind=stat.S_IFDIR)
OTHER_DEVICE = (9, 1)
EXACT = 1 << 53  # whole numbers below it are apart in a double, too


class Table(KernelTable):
    """A table of made-up files, whose descriptors are never really closed."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.closed: list[int] = []
        self.set_root(THE_ROOT)

    def note(self, function: Callable[..., object], *args: Any) -> None:
        """Take note of what is deferred; for what a node had, a descriptor of ours is closed."""
        self.closed.append(args[0])
        if function == self.close_node:
            self.close_node(os.open(os.devnull, os.O_PATH))
        else:
            assert function in (os.close, self.close_open)

    def copies(self, *numbers: tuple[int, int]) -> list[Device]:
        """Have devices known that hold copies of one file system."""
        devices = [Device(number, _By.BIRTH, b"a copy") for number in numbers]
        for device in devices:
            self.devices._known[device.number] = device
        return devices

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
    for ino in (3, 12345, (1 << 48) + 7, (1 << 52) - 1, EXACT, 1 << 63 | 5, (1 << 64) - 1):
        assert table.number_of(made_up(ino)) == ino
        assert table.looked_up(made_up(ino)).number == ino


def test_the_root_is_nodeid_1(table: Table) -> None:
    """Its path is its inode number, by which users see it."""
    assert table.number_of(THE_ROOT) == 2
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
    assert (table.number_of(root), table.looked_up(root).number) == (1, ROOT_NODEID)
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


def test_numbers_that_are_given_can_be_kept_in_a_double(table: Table) -> None:
    """As node.js does; npm takes files for links of one another where two fall together."""
    own = [made_up(ino) for ino in (0, 1, 1 << 52, (1 << 52) + 1, EXACT - 1)]
    foreign = [
        made_up(ino, device=device)
        for ino in (0, 1, 2, 77, 1 << 32, 1 << 48, (1 << 52) + 1, EXACT, (1 << 64) - 1)
        for device in ((9, 1), (9, 2), (0, 55))
    ]
    numbers = [table.looked_up(a).number for a in own + foreign]
    numbers += [table.number_apart(table.devices.of(a), a.ino) for a in own + foreign]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < EXACT
    assert min(numbers) > ROOT_NODEID


def test_numbers_of_a_file_system_are_the_same_for_ever() -> None:
    """Whatever its device is called, and whatever was looked at before: backups rely on it."""
    for number in ((9, 1), (0, 77)):
        paths = QidPaths(THE_ROOT, Devices())
        device = Device(number, _By.BIRTH, b"id ef53 1234")
        assert paths.path_of(device, 12) == 5270298345406088
        assert paths.path_of(device, 13) == 5270298345406089
        assert paths.path_of(device, 1 << 60) == 5381474442403174
        assert paths.unknown(device, 12) == 8650587266742501
    assert paths.path(made_up(1)) == 7841652639956712


def test_numbers_at_a_second_place_are_the_same_for_ever() -> None:
    paths, aside = QidPaths(THE_ROOT, Devices()), hashed(b"place ftp/pub")
    own = Device((THE_ROOT.dev_major, THE_ROOT.dev_minor), _By.BIRTH, b"id ef53 1")
    foreign = Device((9, 1), _By.BIRTH, b"id ef53 1234")
    assert paths.path_of(own, 12, aside) == 7714134542978943
    assert is_on_own_device(7714134542978943)
    assert paths.path_of(foreign, 12, aside) == 6339268855533258
    assert paths.path_of(foreign, 1 << 60, aside) == 5986705281157055
    assert not is_on_own_device(6339268855533258)


def test_whether_a_number_is_of_the_sources_own_device_can_be_told(table: Table) -> None:
    """Exactly: the dispatcher makes calls itself on those alone."""
    for ino in (1, 2, 5, 1 << 40, (1 << 52) - 1, 1 << 52, EXACT - 1, EXACT, (1 << 64) - 1):
        assert is_on_own_device(table.looked_up(made_up(ino)).node.number)
        foreign = table.looked_up(made_up(ino, device=OTHER_DEVICE)).node
        assert not is_on_own_device(foreign.number)
        assert not is_on_own_device(table.number_apart(foreign.device, ino))
    one, other = table.copies((9, 8), (9, 9))
    for device in (one, other):
        assert not is_on_own_device(table.looked_up(made_up(5, device=device.number)).node.number)
    assert not is_on_own_device(None)


def test_a_number_that_is_taken_is_not_given_again(table: Table) -> None:
    """Two copies of a file system lie below the source: each of their files has two numbers."""
    copies = table.copies((9, 8), (9, 9), (9, 10))
    files = [made_up(5, device=copy.number) for copy in copies]
    fids = [table.looked_up(a) for a in files]
    numbers = [fid.number for fid in fids]
    assert len(set(numbers)) == 3
    assert max(numbers) < EXACT
    assert [fid.node.number for fid in fids] == numbers
    for _ in range(2):
        assert [table.looked_up(a) for a in files] == fids
        assert [table.number_of(a) for a in files] == numbers
    table.forget([(numbers[1], 99)])
    assert table.looked_up(files[1]).number == numbers[1]


def test_numbers_given_one_by_one_end_with_what_they_are_for(table: Table) -> None:
    """By a forget, a clunk, or the end of the session; what is under way meanwhile is right."""
    copies = table.copies((9, 8), (9, 9))
    first, second = (made_up(5, device=copy.number) for copy in copies)
    fid, apart = table.looked_up(first), table.looked_up(second)
    found = table.found(second)  # by a walk that has not told the table yet
    assert found.number == apart.number != fid.number
    table.forget([(fid.number, 1), (apart.number, 1)])
    assert not table._paths._apart  # type: ignore[union-attr]
    again = table.intern(found)
    assert again.number == found.number == fid.number, "nobody else has it now"
    table.drop(found)
    table.looked_up(first)
    assert len(table._paths._apart) == 1  # type: ignore[union-attr]
    table.clear()
    assert not table._paths._apart  # type: ignore[union-attr]
    for ends in (table.remove, lambda number: table.forget([(number, 1)])):
        kept = [table.looked_up(made_up(n, device=copies[0].number)) for n in range(12_000)]
        given = [table.looked_up(made_up(n, device=copies[1].number)) for n in range(12_000)]
        assert len(table._paths._apart) == 12_000  # type: ignore[union-attr]
        for fid in given[10:]:
            ends(fid.number)
        assert sys.getsizeof(table._paths._apart) < 200_000  # type: ignore[union-attr]
        for fid in kept + given[:10]:
            ends(fid.number)
        table.clear()


def test_of_what_only_a_number_is_known_nothing_is_remembered(table: Table) -> None:
    """A user can have any number of such names."""
    device = table.devices.of(made_up(5, device=OTHER_DEVICE))
    table.number_apart(device, 0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        numbers = {table.number_apart(device, number) for number in range(5000)}
        assert len(numbers) == 5000
        del numbers
        assert tracemalloc.get_traced_memory()[0] - before < 1000
    finally:
        tracemalloc.stop()


def test_any_number_of_devices_may_come_and_go(table: Table) -> None:
    """Nobody who mounts and unmounts uses anything up; of those that went little is kept."""
    numbers = set()
    for minor in range(40_000):
        table.devices._known[0, minor] = device = Device((0, minor), _By.BIRTH, b"%d" % minor)
        table.devices._recent.append(device)
        fid = table.looked_up(made_up(5, device=(0, minor)))
        numbers.add(fid.number)
        table.forget([(fid.number, 1)])
    del device, fid
    assert len(numbers) == 40_000
    assert len(table.devices._known) <= 1000
    assert table.looked_up(made_up(5)).number == 5


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(8, 1), (9, 1), (9, 2), (253, 0)]),
            st.one_of(
                st.integers(1, 40),
                st.integers((1 << 51) - 5, (1 << 51) + 5),
                st.builds(lambda high, low: high << 50 | low, st.integers(3, 9),
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
    with fails(errno.EINVAL):
        table.move(fid, first)
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
    table.open(table._fids[FIRST_HANDLE], OpenDirectory(32))
    table.open(table._fids[4], OpenFile(33, os.O_RDONLY))
    assert table.statistics() == (3, 3, 2, 1)
    with fails(errno.EINVAL):
        table.add(FIRST_HANDLE, node, OpenFile(34, os.O_RDONLY))
    table.put(table.remove(FIRST_HANDLE + 1))
    table.forget([(4, 1)])
    assert table.statistics() == (1, 1, 0, 1)
    going = table.add(FIRST_HANDLE + 2, node)
    table.get(FIRST_HANDLE + 2)
    table.put(table.remove(FIRST_HANDLE + 2))
    table.open(going, OpenFile(35, os.O_RDONLY))
    table.put(going)
    assert table.statistics() == (1, 1, 0, 1)
    table.clear()
    assert table.statistics() == (0, 0, 0, 1), "the caller has the node"
    table.drop(node)


def test_the_counts_are_had_though_somebody_is_at_the_table(table: Table) -> None:
    """Anybody may ask, of however many fids; nobody waits for it."""
    with table.lock.writing:
        assert table.statistics().fids == 0


def test_much_at_once_is_done_in_pieces(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller may have the kernel forget, or look for descriptors, by the ten thousand."""
    held: list[int] = []
    release = table.lock.release

    def releasing(mode: str) -> None:
        held.append(len(table) - sum(node.pins for node in table._clock))
        release(mode)

    fids = [table.looked_up(made_up(n), 10 * n) for n in range(3, 4003)]
    for fid in fids:
        fid.node.recent, fid.node.place = False, (fids[0].node, b"name")
    monkeypatch.setattr(table.lock, "release", releasing)
    held.append(4000)
    cold = table.coldest(3000)
    assert len(cold) == 3000
    for node in cold:
        table.unpin(node)
    held.append(4000)
    table.forget([(fid.number, 1) for fid in fids])
    assert len(table) == 0
    assert max(before - after for before, after in itertools.pairwise(held)) <= 256


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


def test_a_fid_is_found_while_somebody_is_at_the_table(table: Table) -> None:
    """Nobody who uses one waits for who changes others."""
    fid = table.looked_up(made_up(3))
    with table.lock.writing:
        assert table.get(fid.number) is fid
    table.put(fid)


def test_a_fid_that_is_moved_in_the_table_is_there(table: Table) -> None:
    """As `next_idle` moves one to the end: it is missing for a moment."""
    fid = table.looked_up(made_up(3))
    found: list[Fid] = []
    is_missing = threading.Event()

    def move() -> None:
        with table.lock.writing:
            del table._fids[fid.number]
            is_missing.set()
            while not table.lock.statistics().waiting:
                time.sleep(0.001)
            assert not found
            table._fids[fid.number] = fid

    def use() -> None:
        is_missing.wait(20)
        found.append(table.get(fid.number))

    in_threads(move, use)
    assert found == [fid]
    table.put(fid)


@pytest.mark.parametrize("again", [False, True])
def test_a_fid_that_ends_while_it_is_looked_for_is_not_given(table: Table, again: bool) -> None:
    """But the next one of that number is."""
    handle = table.new_number()
    node = table.found(made_up(3))
    old = table.add(handle, node, OpenFile(1000, os.O_RDONLY))

    class Late(dict[int, Fid]):
        def get(self, number: int, default: Any = None) -> Any:
            found = super().get(number, default)
            if found is old:
                table.put(table.remove(handle))
                if again:
                    table.add(handle, node)
            return found

    table._fids = Late(table._fids)
    if again:
        new = table.get(handle)
        assert new is not old
        table.put(new)
    else:
        with fails(errno.EBADF):
            table.get(handle)
    assert old.refs == 0
    assert table.closed.count(1000) == 1
    table.drop(node)


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
