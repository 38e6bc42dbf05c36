"""Descriptors that are taken away and opened again while others use them (session.py, counts.py).

First in order: between any two steps of one who uses, looks for, removes or reclaims a file,
somebody else does one of these, or changes the source. Then at random, on threads.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers_executor import PATIENCE, at_once, eager_switches
from lock_order import COUNTS, watching
from mounting import SOAK, wait_until
from ops_helpers import ROOT, Client, client_of, fails, module_of
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.errors import error
from ninefuse.tree.descriptors import Descriptors, _Look
from ninefuse.tree.nodes import Node
from ninefuse.tree.session import Session

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("leak_free")]


class Tree:
    """d/e/f and d/e/g, known to the kernel, none of which has its descriptor."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.session = client.session
        source = client.source
        (source / "d" / "e").mkdir(parents=True)
        (source / "d" / "e" / "f").write_bytes(b"data")
        (source / "d" / "e" / "g").write_bytes(b"other data")
        self.d = client.know("d")
        self.e = client.know("e", start=self.d.number)
        self.f = client.know("f", start=self.e.number)
        self.g = client.know("g", start=self.e.number)
        self.reclaim()
        wait_until(self.has_none, "all can be closed that is in use for a moment at most")

    # What one does, and others meanwhile

    def has_none(self) -> bool:
        """Whether only the root has a descriptor; else what can be closed is."""
        if self.session.fids.descriptors > 1:
            self.reclaim()
        return self.session.fids.descriptors == 1

    def reclaim(self) -> None:
        """Close all that can be closed, of open files too."""
        for fid in self.session.fids._fids.values():
            fid.node.recent = False
        self.session.descriptors._lend_or_close(sys.maxsize)

    def use(self) -> None:
        """Ask for the attributes of a file, and of the directories above."""
        assert self.client.do(ops.getattr, self.f.number).ino == self.f.number
        assert self.client.do(ops.getattr, self.e.number).ino == self.e.number
        assert self.client.do(ops.getattr, self.d.number).ino == self.d.number

    def open(self) -> None:
        """Open a file, of which nothing but its fid is known, and read and close it."""
        handle = self.client.walk(start=self.f.number)
        try:
            self.client.do(ops.lopen, handle, os.O_RDONLY)
            self.session.fids.lend(sys.maxsize)
            assert self.client.do(ops.getattr, self.f.number).ino == self.f.number
            assert self.client.do(ops.read, handle, 0, 100) == b"data"
        finally:
            self.client.do(ops.clunk, handle)

    def look_up(self) -> None:
        body = ops.walk(self.session, ROOT, self.session.kernel.intern, [b"d", b"e", b"f"])
        _, found = self.client.run(body)
        if found is None:
            raise error(errno.ENOENT)
        assert found in (self.f, self.g), "g may have been renamed to it"
        self.client.forget(found)

    def climb(self) -> None:
        """Up from a directory that has none."""
        self.client.do(ops.clunk, self.client.walk("..", "..", start=self.e.number))

    def remove(self) -> None:
        self.client.do(ops.unlinkat, self.e.number, b"f")

    def replace(self) -> None:
        """By renaming another over it."""
        self.client.do(ops.renameat, self.e.number, b"g", self.e.number, b"f")

    def move(self) -> None:
        self.client.do(ops.renameat, self.e.number, b"f", self.d.number, b"h")

    def move_above(self) -> None:
        """The directory that it is in."""
        self.client.do(ops.renameat, self.d.number, b"e", ROOT, b"m")

    def move_back(self) -> None:
        self.move_above()
        self.client.do(ops.renameat, ROOT, b"m", self.d.number, b"e")

    # Afterwards

    def check(self) -> None:
        """All files can be used as before, also if they lose their descriptors once more."""
        for _ in range(2):
            for fid in (self.d, self.e, self.f, self.g):
                attributes = self.client.do(ops.getattr, fid.number)
                assert attributes.ino == fid.number
                assert fid.generation == 0
            self.reclaim()
        self.client.rest()
        self.client.check_idle()


class Between:
    """Has something done before one of the steps that a session makes: the n-th from now on."""

    STEPS = ("open_step", "stat_descriptor", "stat_name")
    STEPS_OF_TABLE = (
        *("close_lent", "drop", "give_descriptor", "known", "lend", "pin", "seen"),
        *("take_descriptor", "unpin"),
    )

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock = session.fids.lock
        self.steps = 0
        self.when = 0
        self.what: Callable[[], object] | None = None
        for user in (Session, Descriptors, ops.walk, ops.renameat):
            module = module_of(user)
            for name in self.STEPS:
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, self.around(getattr(module, name)))
        for name in self.STEPS_OF_TABLE:
            monkeypatch.setattr(session.fids, name, self.around(getattr(session.fids, name)))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            table = self.lock.statistics()
            if not (table.readers or table.writing):  # nobody comes in between there
                self.steps += 1
                if self.steps == self.when and self.what is not None:
                    what, self.what = self.what, None
                    what()
            return function(*args, **kwargs)

        return step

    def at(self, when: int, what: Callable[[], object]) -> None:
        self.steps, self.when, self.what = 0, when, what


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: hundreds of trees are made in it."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else tmp_path) as path:
        yield Path(path)


@contextmanager
def tree_of(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Tree, Between]]:
    """A tree in a new directory, and who comes in between."""
    directory.mkdir()
    with (
        client_of(directory, most_descriptors=1000) as client,
        monkeypatch.context() as patch,
    ):
        tree = Tree(client)
        yield tree, Between(client.session, patch)


OTHER = [Tree.use, Tree.open, Tree.look_up, Tree.climb, Tree.reclaim, Tree.remove, Tree.replace]
ONE = [*OTHER, Tree.move]
# They take the rename lock to write: beside one who has it to read they would wait.
WRITERS = [Tree.replace, Tree.move, Tree.move_above, Tree.move_back]


def is_beside(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether the lock lets the other in before each step of the one."""
    takes_no_lock = one is Tree.reclaim
    if one is other is Tree.remove:
        return False  # of one name: who comes later waits until it is gone
    return takes_no_lock or not {one, other} & set(WRITERS) or other is Tree.reclaim


PAIRS = [
    (one, other)
    for one in [*ONE, Tree.move_above, Tree.move_back]
    for other in [*OTHER, Tree.move, Tree.move_above, Tree.move_back]
    if is_beside(one, other) and (SOAK or Tree.reclaim in (one, other) or Tree.remove is other)
]


@pytest.mark.parametrize(
    ("one", "other", "has"),
    # Where nothing has its descriptor, nothing can be reclaimed.
    [(*pair, has) for pair in PAIRS for has in (False, True) if has or pair[0] is not Tree.reclaim],
)
def test_two_at_once(
    quick: Path,
    monkeypatch: pytest.MonkeyPatch,
    one: Callable[[Tree], None],
    other: Callable[[Tree], None],
    has: bool,
) -> None:
    """Each gets through but for names that are gone; both leave all files as they were."""
    when = 0
    while True:
        when += 1
        with tree_of(quick / str(when), monkeypatch) as (tree, between):
            if has:
                for fid in (tree.d, tree.e, tree.f, tree.g):
                    tree.client.do(ops.getattr, fid.number)
            between.at(when, partial(through, other, tree))
            through(one, tree)
            if between.what is not None:
                break  # it has fewer steps than that
            tree.check()
    assert when > 3


def through(what: Callable[[Tree], None], tree: Tree) -> None:
    """Do something; what removes or looks for a name may find that it is gone."""
    try:
        what(tree)
    except OSError as failure:
        by_name = what not in (Tree.use, Tree.open, Tree.climb, Tree.reclaim)
        if not (by_name and failure.errno == errno.ENOENT):
            raise


def test_what_is_used_while_it_is_looked_at_is_not_reclaimed(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may have been taken away, and another file been given it, since the look."""
    with client_of(source, most_descriptors=1000) as client:
        tree = Tree(client)
        tree.use()
        looks = _Look.leads_back
        fd = tree.f.node.fd

        def looking(look: _Look, node: Node) -> bool:
            answer = looks(look, node)
            if node is tree.f.node:
                tree.remove()
                (source / "d" / "e" / "f").write_bytes(b"another file")
            return answer

        monkeypatch.setattr(_Look, "leads_back", looking)
        tree.reclaim()
        assert tree.f.node.fd == fd
        assert client.do(ops.getattr, tree.f.number).nlink == 0


# By somebody else's hand, in the source


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_another_file_behind_a_reclaimed_fid_is_stale(source: Path, depth: int) -> None:
    """Made anew under the same name, many times over, so that some have the inode number too."""
    numbers = set()
    with client_of(source, most_descriptors=1000) as client:
        tree = Tree(client)
        fid = [tree.f, tree.e, tree.d][depth]
        path = source.joinpath(*["d", "e", "f"][: 3 - depth])
        for _ in range(20):
            time.sleep(0.005)  # births have a clock that ticks every few milliseconds
            subprocess.run(["rm", "-r", path], check=True)
            if depth:
                path.mkdir()
            else:
                path.touch()
            numbers.add(path.stat().st_ino)
            for _ in range(2):
                with fails(errno.ESTALE):
                    client.do(ops.getattr, tree.f.number)
                with fails(errno.ESTALE):
                    client.do(ops.getattr, fid.number)
        # Looked up, it is found; and has another generation if it has the old one's number.
        found = client.know(*path.relative_to(source).parts)
        assert client.do(ops.getattr, found.number).ino == path.stat().st_ino
        assert found is not fid or found.generation == 1
        client.check_idle()


@pytest.mark.parametrize("ancestor", ["d", "d/e"])
def test_a_directory_above_a_reclaimed_fid_is_renamed(source: Path, ancestor: str) -> None:
    """By us, its files are found; by somebody else they are stale until they are looked up."""
    with client_of(source, most_descriptors=1000) as client:
        tree = Tree(client)
        (source / ancestor).rename(source / "elsewhere")
        for fid in (tree.f, tree.g):
            with fails(errno.ESTALE):
                client.do(ops.getattr, fid.number)
        # Name by name, as the kernel looks them up.
        assert client.know("elsewhere") is (tree.d if ancestor == "d" else tree.e)
        assert client.do(ops.getattr, tree.f.number).size == 4
        if ancestor == "d/e":
            (source / "d").rename(source / "d2")
            assert client.know("d2") is tree.d
        tree.reclaim()
        client.do(ops.renameat, ROOT, b"elsewhere", ROOT, b"here")
        tree.reclaim()
        tree.check()


# Deep trees

DEPTH = 2000


@pytest.fixture
def deep(quick: Path) -> Iterator[Path]:
    """A directory with two thousand below each other in it, all called d."""
    top = quick / "deep"
    top.mkdir()
    at = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=at)
        above, at = at, os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(above)
    yield top
    # From below: pytest, and rm too, have their trouble with so many.
    while os.fstat(at).st_ino != top.stat().st_ino:
        below, at = at, os.open("..", os.O_RDONLY, dir_fd=at)
        os.close(below)
        for name in os.listdir(at):
            os.rmdir(name, dir_fd=at)
    os.close(at)


def test_reopening_climbs_a_deep_tree(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without recursion, and with two descriptors at a time; behind a name that is new, too."""
    most = 0
    real = module_of(Session).open_step

    def counting(directory: int, name: bytes) -> int:
        nonlocal most
        fd: int = real(directory, name)
        most = max(most, len(os.listdir("/proc/self/fd")))
        return fd

    with client_of(deep, most_descriptors=256) as client:
        fids = [client.fid(ROOT)]
        for _ in range(DEPTH):
            fids.append(client.know("d", start=fids[-1].number))
        assert client.session.fids.descriptors <= 256 + 2
        for fid in fids:
            fid.node.recent = False
        client.session.descriptors._close_coldest(sys.maxsize)
        assert client.session.fids.descriptors == 1
        client.do(ops.renameat, ROOT, b"d", ROOT, b"other")

        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(module_of(Session), "open_step", counting)
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(300)
        try:
            for number in (fids[-1].number, fids[DEPTH // 2].number):
                assert client.do(ops.getattr, number).ino == number
        finally:
            sys.setrecursionlimit(limit)
        assert most <= before + 3, "besides the two, the node that was opened first keeps its own"
        client.check_idle()


# On threads


def test_users_and_reclaimers_on_threads(source: Path) -> None:
    """Who has pinned a file has its descriptor, and nobody else's."""
    with watching() as watch, client_of(source, most_descriptors=1000) as client:
        tree = Tree(client)
        fids, session = client.session.fids, client.session
        begun = time.monotonic()
        uses = reopened = 0

        def goes_on() -> bool:
            """Half a second; more where the machine has other things to do meanwhile."""
            passed = time.monotonic() - begun
            is_enough = reopened > 20 and watch.taken[COUNTS] > 1000
            return passed < 0.5 or (passed < PATIENCE / 2 and not is_enough)

        def use(seed: int) -> None:
            nonlocal uses, reopened
            rng = random.Random(seed)
            while goes_on():
                fid = fids.get(rng.choice([tree.d, tree.e, tree.f, tree.g]).number)
                node = fid.node
                if not fids.pin(node):
                    session.descriptors.reopen(node)
                    reopened += 1
                for _ in range(3):
                    assert os.fstat(node.fd).st_ino == node.inode
                uses += 1
                fids.unpin(node)
                fids.put(fid)

        def reclaim() -> None:
            while goes_on():
                tree.reclaim()

        with eager_switches():
            at_once(*(partial(use, seed) for seed in range(4)), reclaim, reclaim)
        tree.check()
        assert reopened > 20, f"{reopened} of {uses}: this tested little"
        assert watch.taken[COUNTS] > 1000
