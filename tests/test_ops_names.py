"""mkdir, mknod, symlink, link, rename, renameat and unlinkat."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ops_helpers import (
    ILLEGAL_NAMES,
    ROOT,
    Client,
    Stepper,
    client_of,
    fails,
    module_of,
    need_devices,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.fuse.entries import readdirplus
from ninefuse.linux.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, rename
from ninefuse.ops import Changes
from ninefuse.ops.names import AT_REMOVEDIR
from ninefuse.tree.qids import QTDIR, QTFILE, QTSYMLINK, Qid
from ninefuse.tree.session import MOST_TRIES
from ninefuse.tree.table import Fid

pytestmark = pytest.mark.usefixtures("leak_free")


@pytest.fixture
def tree(client: Client) -> Client:
    """Files one, two and d/inner; empty directory e; symlink link; FIFO fifo."""
    source = client.source
    (source / "one").write_bytes(b"1")
    (source / "two").write_bytes(b"22")
    (source / "d").mkdir()
    (source / "d" / "inner").write_bytes(b"inner")
    (source / "e").mkdir()
    (source / "link").symlink_to("one")
    os.mkfifo(source / "fifo")
    return client


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def without_descriptor(client: Client, *path: str) -> Fid:
    """The kernel's fid of a file that only a listing has found: it has no descriptor."""
    directory = client.open(*path[:-1])
    found = {e.name: e.fid for e in client.do(readdirplus, directory, 0)}
    client.do(ops.clunk, directory)
    fid = found[os.fsencode(path[-1])]
    assert fid is not None
    assert fid.node.fd == -1
    return fid


# What everything that makes a name has in common

Maker = Callable[[Client, int, bytes], Any]

MAKERS: dict[str, Maker] = {
    "mkdir": lambda c, dirfid, name: c.do(ops.mkdir, dirfid, name, 0o755),
    "mknod": lambda c, dirfid, name: c.do(ops.mknod, dirfid, name, stat.S_IFREG | 0o644),
    "symlink": lambda c, dirfid, name: c.do(ops.symlink, dirfid, name, b"target"),
    "link": lambda c, dirfid, name: c.do(ops.link, dirfid, c.walk("one"), name),
}
makers = pytest.mark.parametrize("maker", MAKERS)


@makers
def test_a_name_is_made_and_no_fid(tree: Client, maker: str) -> None:
    """In the directory of an unopened fid or of an open one, whose qid is answered."""
    unopened, opened = tree.walk("d"), tree.open("d")
    expected = {tree.walk("one"), *tree.session.fids._fids} if maker == "link" else None
    for dirfid, name in ((unopened, b"new"), (opened, b"\xffnew")):
        fids = set(tree.session.fids._fids)
        qid = MAKERS[maker](tree, dirfid, name)
        if expected is None:
            assert set(tree.session.fids._fids) == fids
            found = tree.do(ops.getattr, tree.walk("d", name))
            assert qid == tree.session.fids.qid_of(found)
            types = {"mkdir": QTDIR, "mknod": QTFILE, "symlink": QTSYMLINK}
            assert qid.type == types[maker]
        else:
            assert qid is None
    assert len(names(tree.source / "d")) == 3


@makers
def test_a_name_that_is_taken_stays(tree: Client, maker: str) -> None:
    """EEXIST, whatever has it; EEXIST for dot and dot-dot as well."""
    for name in (b"one", b"d", b"link", b"fifo", b".", b".."):
        path = os.fsencode(tree.source) + b"/" + name
        before = os.lstat(path)
        with fails(errno.EEXIST):
            MAKERS[maker](tree, ROOT, name)
        after = os.lstat(path)
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


@makers
def test_what_is_not_a_name_is_not_made(tree: Client, maker: str) -> None:
    """EINVAL; ENAMETOOLONG over 255 bytes; 255 are fine."""
    before = names(tree.source)
    for name in ILLEGAL_NAMES:
        with fails(errno.EINVAL):
            MAKERS[maker](tree, ROOT, name)
    with fails(errno.ENAMETOOLONG):
        MAKERS[maker](tree, ROOT, b"x" * 256)
    assert names(tree.source) == before
    MAKERS[maker](tree, ROOT, b"x" * 255)
    assert set(names(tree.source)) - set(before) == {"x" * 255}


@makers
def test_names_are_made_in_directories_only(tree: Client, maker: str) -> None:
    """ENOTDIR in anything else; ENOENT in a directory that was removed."""
    for other in ("one", "link", "fifo"):
        with fails(errno.ENOTDIR):
            MAKERS[maker](tree, tree.walk(other), b"new")
    removed = tree.walk("e")
    (tree.source / "e").rmdir()
    with fails(errno.ENOENT):
        MAKERS[maker](tree, removed, b"new")


@makers
def test_nothing_is_made_on_a_read_only_session(source: Path, maker: str) -> None:
    """EROFS."""
    (source / "one").touch()
    with client_of(source, read_only=True) as client, fails(errno.EROFS):
        MAKERS[maker](client, ROOT, b"new")
    assert names(source) == ["one"]


@makers
def test_a_new_name_is_made_durable_where_the_mount_asks(
    source: Path, monkeypatch: pytest.MonkeyPatch, maker: str
) -> None:
    """sync and dirsync: the directory is synced before the answer; its error is the answer."""
    (source / "one").touch()
    (source / "d").mkdir()
    with client_of(source, sync_directories=True) as client:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
        MAKERS[maker](client, client.walk("d"), b"new")
        assert synced == [(source / "d").stat().st_ino]

        def broken(fd: int) -> None:
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(os, "fsync", broken)
        with fails(errno.EIO):
            MAKERS[maker](client, client.walk("d"), b"more")


# mkdir, mknod, symlink


@pytest.mark.parametrize("mode", [0o777, 0o700, 0o000, 0o1755])
def test_a_directory_has_the_mode_asked_for(client: Client, mode: int) -> None:
    """Exactly; type bits say nothing. It can be used at once."""
    client.do(ops.mkdir, ROOT, b"new", stat.S_IFREG | mode)
    assert (client.source / "new").stat().st_mode == stat.S_IFDIR | mode
    if os.geteuid() == 0 or mode & 0o700 == 0o700:
        client.create("inner", start=client.walk("new"))


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK])
def test_nodes_of_each_kind_are_made(client: Client, kind: int) -> None:
    """With exactly the mode asked for; none is opened by that."""
    qid = client.do(ops.mknod, ROOT, b"new", kind | 0o4621)
    assert (client.source / "new").lstat().st_mode == kind | 0o4621
    assert qid.type == QTFILE


def test_devices_are_made(client: Client) -> None:
    """With their numbers."""
    need_devices(client.source)
    device = os.makedev(300, 70_000)
    client.do(ops.mknod, ROOT, b"new", stat.S_IFCHR | 0o600, device)
    made = (client.source / "new").lstat()
    assert (made.st_rdev, stat.S_IFMT(made.st_mode)) == (device, stat.S_IFCHR)


def test_a_directory_is_not_made_by_mknod(client: Client) -> None:
    """EPERM, as mknod says; mode bits that there are not are EINVAL or dropped."""
    with fails(errno.EPERM):
        client.do(ops.mknod, ROOT, b"new", stat.S_IFDIR | 0o755)
    with fails(errno.EINVAL):
        client.do(ops.mknod, ROOT, b"new", 0xFFFF_FFFF)
    assert names(client.source) == []


@pytest.mark.parametrize("target", [b"nowhere", b"/etc", b"\xff", b"new", b"t" * 4095])
def test_a_symlink_is_made_as_it_is_said(client: Client, target: bytes) -> None:
    """Its target is not looked at."""
    client.do(ops.symlink, ROOT, b"new", target)
    assert os.readlink(os.fsencode(client.source) + b"/new") == target


def test_targets_that_no_symlink_has(client: Client) -> None:
    """ENOENT for none, ENAMETOOLONG for 4096 bytes, EINVAL with a zero byte."""
    for target, code in (
        (b"", errno.ENOENT),
        (b"t" * 4096, errno.ENAMETOOLONG),
        (b"a\0b", errno.EINVAL),
    ):
        with fails(code):
            client.do(ops.symlink, ROOT, b"new", target)
    assert names(client.source) == []


# link


@pytest.mark.parametrize("name", ["one", "link", "fifo"])
def test_a_link_is_another_name_of_the_same_file(tree: Client, name: str) -> None:
    """A symlink is linked itself, not what it leads to."""
    tree.do(ops.link, tree.walk("d"), tree.walk(name), b"new")
    old, new = (tree.source / name).lstat(), (tree.source / "d" / "new").lstat()
    assert (old.st_ino, old.st_mode, old.st_nlink) == (new.st_ino, new.st_mode, 2)
    first, second = tree.know(name), tree.know("d", "new")
    assert first is second


def test_what_cannot_be_linked(tree: Client) -> None:
    """EPERM for a directory, ENOENT for a file that has no name left."""
    for directory in (tree.walk("e"), ROOT):
        with fails(errno.EPERM):
            tree.do(ops.link, ROOT, directory, b"new")
    fid = tree.open("one")
    (tree.source / "one").unlink()
    with fails(errno.ENOENT):
        tree.do(ops.link, ROOT, fid, b"new")
    assert "new" not in names(tree.source)


def test_a_link_is_of_the_file_that_was_found(tree: Client) -> None:
    """Whatever has its name by now."""
    fid = tree.walk("one")
    (tree.source / "one").rename(tree.source / "moved")
    (tree.source / "one").write_bytes(b"another")
    tree.do(ops.link, ROOT, fid, b"new")
    assert (tree.source / "new").read_bytes() == b"1"


# rename


def test_a_renamed_fid_goes_on_naming_its_file(tree: Client) -> None:
    """Open or not, and again after another rename; a file in the way is replaced."""
    fid, other = tree.walk("one"), tree.open("one", flags=os.O_RDWR)
    tree.do(ops.rename, fid, tree.walk("d"), b"moved")
    assert tree.place(fid) == (tree.do(ops.getattr, tree.walk("d")).ino, b"moved")
    tree.do(ops.rename, fid, ROOT, b"two")
    assert (tree.source / "two").read_bytes() == b"1"
    assert names(tree.source / "d") == ["inner"]
    assert tree.do(ops.getattr, fid).size == 1
    assert tree.do(ops.read, other, 0, 9) == b"1"
    tree.do(ops.remove, fid)
    assert "two" not in names(tree.source)


def test_an_open_fid_is_renamed(tree: Client) -> None:
    """It stays open."""
    fid = tree.open("one", flags=os.O_RDWR)
    tree.do(ops.rename, fid, tree.walk("d"), b"moved")
    assert tree.do(ops.write, fid, 0, b"x") == 1
    assert (tree.source / "d" / "moved").read_bytes() == b"x"


def test_the_root_is_not_renamed(tree: Client) -> None:
    """EBUSY, through any fid."""
    for fid in (ROOT, tree.walk("d", "..")):
        with fails(errno.EBUSY):
            tree.do(ops.rename, fid, tree.walk("d"), b"new")


def test_a_file_that_is_elsewhere_is_not_renamed(tree: Client) -> None:
    """ENOENT where its name has gone, ESTALE where it is another's, which stays."""
    fid = tree.walk("one")
    (tree.source / "one").rename(tree.source / "moved")
    with fails(errno.ENOENT):
        tree.do(ops.rename, fid, ROOT, b"new")
    (tree.source / "two").rename(tree.source / "one")
    with fails(errno.ESTALE):
        tree.do(ops.rename, fid, ROOT, b"new")
    assert (tree.source / "one").read_bytes() == b"22"


def test_renames_that_the_kernel_refuses_change_nothing(tree: Client) -> None:
    """A directory below itself, a file over a directory, a target that is no directory."""
    before = names(tree.source), names(tree.source / "d")
    (tree.source / "e" / "below").mkdir()
    fid = tree.walk("e")
    place = tree.place(fid)
    with fails(errno.EINVAL):
        tree.do(ops.rename, fid, tree.walk("e", "below"), b"new")
    with fails(errno.EISDIR):
        tree.do(ops.rename, tree.walk("one"), ROOT, b"d")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        tree.do(ops.rename, fid, ROOT, b"d")
    with fails(errno.ENOTDIR):
        tree.do(ops.rename, fid, ROOT, b"one")
    for other in ("one", "link", "fifo"):
        with fails(errno.ENOTDIR):
            tree.do(ops.rename, fid, tree.walk(other), b"new")
    assert tree.place(fid) == place
    assert (names(tree.source), names(tree.source / "d")) == before


# What renames have in common


def test_renames_take_names_only(tree: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL for what is none, for dot and for dot-dot, and nobody looks at those."""
    (tree.source / "d" / "deep").mkdir()
    directory, fid = tree.walk("d"), tree.walk("one")
    before = names(tree.source), names(tree.source / "d")

    def looked(fd: int, name: bytes) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(module_of(type(tree.session)), "stat_name", looked)
    monkeypatch.setattr(module_of(ops.rename), "stat_name", looked)
    for name in (*ILLEGAL_NAMES, b".", b".."):
        with fails(errno.EINVAL):
            tree.do(ops.rename, fid, directory, name)
        with fails(errno.EINVAL):
            tree.do(ops.renameat, ROOT, name, directory, b"new")
        with fails(errno.EINVAL):
            tree.do(ops.renameat, ROOT, b"one", directory, name)
    with fails(errno.ENAMETOOLONG):
        tree.do(ops.rename, fid, directory, b"x" * 256)
    with fails(errno.ENAMETOOLONG):
        tree.do(ops.renameat, ROOT, b"x" * 256, directory, b"new")
    with fails(errno.ENAMETOOLONG):
        tree.do(ops.renameat, ROOT, b"one", directory, b"x" * 256)
    assert (names(tree.source), names(tree.source / "d")) == before


def test_nothing_moves_or_goes_on_a_read_only_session(source: Path) -> None:
    """EROFS for rename, renameat and unlinkat."""
    (source / "one").touch()
    (source / "d").mkdir()
    with client_of(source, read_only=True) as client:
        with fails(errno.EROFS):
            client.do(ops.rename, client.walk("one"), client.walk("d"), b"new")
        for flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            with fails(errno.EROFS):
                client.do(ops.renameat, ROOT, b"one", ROOT, b"new", flags)
        with fails(errno.EROFS):
            client.do(ops.unlinkat, ROOT, b"one")
        with fails(errno.EROFS):
            client.do(ops.unlinkat, ROOT, b"d", AT_REMOVEDIR)
    assert names(source) == ["d", "one"]


def test_moves_and_removals_are_made_durable_where_the_mount_asks(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each directory that lost or got a name is synced before the answer."""
    for name in ("one", "two", "three"):
        (source / name).touch()
    (source / "d").mkdir()
    root, d = source.stat().st_ino, (source / "d").stat().st_ino
    synced: list[int] = []
    with client_of(source, sync_directories=True) as client:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
        directory = client.walk("d")
        client.do(ops.renameat, ROOT, b"one", directory, b"one")
        assert sorted(synced) == sorted([root, d])
        synced.clear()
        client.do(ops.renameat, ROOT, b"two", ROOT, b"four")
        assert synced == [root]
        synced.clear()
        client.do(ops.rename, client.walk("three"), directory, b"three")
        assert sorted(synced) == sorted([root, d])
        synced.clear()
        client.do(ops.unlinkat, directory, b"one")
        client.do(ops.remove, client.walk("d", "three"))
        assert synced == [d, d]


def test_nothing_is_synced_where_the_mount_does_not_ask(
    tree: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would cost every change of a directory a wait for the disk."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for maker in MAKERS.values():
        maker(tree, ROOT, b"new")
        tree.do(ops.renameat, ROOT, b"new", ROOT, b"newer")
        tree.do(ops.remove, tree.walk("newer"))
    tree.do(ops.lcreate, tree.walk(), b"new", os.O_RDWR, 0o600)
    tree.do(ops.unlinkat, ROOT, b"new")
    assert synced == []


# renameat


def test_renameat_moves_a_name(tree: Client) -> None:
    """From one directory to another, over what was there; open directory fids will do."""
    opened = tree.open("d")
    tree.do(ops.renameat, ROOT, b"one", opened, b"new")
    tree.do(ops.renameat, opened, b"inner", ROOT, b"two")
    assert names(tree.source / "d") == ["new"]
    assert (tree.source / "two").read_bytes() == b"inner"


def test_renameat_to_the_same_name_does_nothing(tree: Client) -> None:
    """Also from one hard link to another of the same file: both stay."""
    os.link(tree.source / "one", tree.source / "same")
    before = names(tree.source)
    tree.do(ops.renameat, ROOT, b"one", ROOT, b"one")
    tree.do(ops.renameat, ROOT, b"one", ROOT, b"same")
    assert names(tree.source) == before


def test_noreplace_replaces_nothing(tree: Client) -> None:
    """EEXIST, and both files are where they were; else the same as without."""
    for name in (b"two", b"d", b"link", b"one"):
        with fails(errno.EEXIST):
            tree.do(ops.renameat, ROOT, b"one", ROOT, name, RENAME_NOREPLACE)
    assert (tree.source / "two").read_bytes() == b"22"
    tree.do(ops.renameat, ROOT, b"one", ROOT, b"new", RENAME_NOREPLACE)
    assert (tree.source / "new").read_bytes() == b"1"
    assert "one" not in names(tree.source)


def test_exchange_swaps_two_names(tree: Client) -> None:
    """Of any kinds, in any directories; both must be there."""
    tree.do(ops.renameat, ROOT, b"one", tree.walk("d"), b"inner", RENAME_EXCHANGE)
    assert (tree.source / "one").read_bytes() == b"inner"
    assert (tree.source / "d" / "inner").read_bytes() == b"1"
    tree.do(ops.renameat, ROOT, b"d", ROOT, b"two", RENAME_EXCHANGE)
    assert (tree.source / "two" / "inner").read_bytes() == b"1"
    assert (tree.source / "d").read_bytes() == b"22"
    with fails(errno.ENOENT):
        tree.do(ops.renameat, ROOT, b"one", ROOT, b"none", RENAME_EXCHANGE)


@pytest.mark.parametrize("flags", [RENAME_WHITEOUT, RENAME_WHITEOUT | RENAME_NOREPLACE])
def test_a_whiteout_is_left_in_the_old_place(tree: Client, flags: int) -> None:
    """overlayfs's: a device 0:0. The node that was moved is found at its new place."""
    (tree.source / "probe").touch()
    there = os.open(tree.source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        rename(there, b"probe", there, b"probed", RENAME_WHITEOUT)
    except OSError as e:
        pytest.skip(f"no whiteouts in the source: {e.strerror}")
    finally:
        os.close(there)
    one = tree.know("one")
    tree.do(ops.renameat, ROOT, b"one", tree.walk("d"), b"new", flags)
    assert (tree.source / "d" / "new").read_bytes() == b"1"
    left = (tree.source / "one").lstat()
    assert stat.S_ISCHR(left.st_mode)
    assert left.st_rdev == 0
    assert one.node.place is not None
    assert one.node.place[1] == b"new"
    assert stat.S_ISCHR(tree.do(ops.getattr, tree.walk("one")).mode)
    if flags & RENAME_NOREPLACE:
        with fails(errno.EEXIST):
            tree.do(ops.renameat, ROOT, b"two", ROOT, b"one", flags)
    else:
        tree.do(ops.renameat, ROOT, b"two", ROOT, b"one", flags)
        assert (tree.source / "one").read_bytes() == b"22"


@pytest.mark.parametrize("flags", [3, 6, 7, 8, 1 << 31, -1])
def test_other_flags_of_renameat_are_refused(tree: Client, flags: int) -> None:
    """EINVAL, as renameat2(2) has it: to exchange excludes the others."""
    before = names(tree.source)
    with fails(errno.EINVAL):
        tree.do(ops.renameat, ROOT, b"one", ROOT, b"new", flags)
    assert names(tree.source) == before


def test_renameat_between_what_are_no_directories(tree: Client) -> None:
    """ENOTDIR on either side; ENOENT for a name that is not there."""
    for other in ("one", "link", "fifo"):
        fid = tree.walk(other)
        with fails(errno.ENOTDIR):
            tree.do(ops.renameat, fid, b"x", ROOT, b"new")
        with fails(errno.ENOTDIR):
            tree.do(ops.renameat, ROOT, b"two", fid, b"new")
    with fails(errno.ENOENT):
        tree.do(ops.renameat, ROOT, b"none", ROOT, b"new")


# Fids and renames


def test_fids_below_a_renamed_directory_stay_valid(tree: Client) -> None:
    """Open files are read and written, directories listed and filled, names walked."""
    below = tree.source / "d" / "below"
    below.mkdir()
    (below / "deep").write_bytes(b"deep")
    directory, listing = tree.walk("d", "below"), tree.open("d", "below")
    file, unopened = tree.open("d", "below", "deep", flags=os.O_RDWR), tree.walk("d", "inner")
    tree.do(ops.renameat, ROOT, b"d", tree.walk("e"), b"moved")
    assert tree.do(ops.read, file, 0, 9) == b"deep"
    assert tree.do(ops.write, file, 0, b"DEEP") == 4
    assert tree.do(ops.getattr, unopened).size == 5
    assert [e.name for e in tree.do(ops.readdir, listing, 0, 4096) if e.name == b"deep"]
    assert tree.do(ops.getattr, tree.walk("deep", start=directory)).size == 4
    tree.create("new", start=directory)
    assert names(tree.source / "e" / "moved" / "below") == ["deep", "new"]
    assert (tree.source / "e" / "moved" / "below" / "deep").read_bytes() == b"DEEP"


def test_files_below_a_renamed_directory_are_found_again(tree: Client) -> None:
    """Nodes without descriptor are opened through where the directory is now."""
    directory = tree.know("d")
    inner = tree.know("inner", start=directory.number)
    tree.lose_descriptor(inner)
    tree.lose_descriptor(directory)
    tree.do(ops.renameat, ROOT, b"d", tree.walk("e"), b"moved")
    assert tree.do(ops.getattr, inner.number).size == 5
    up = tree.walk("..", start=directory.number)
    assert tree.do(ops.getattr, up).ino == (tree.source / "e").stat().st_ino


def test_a_moved_files_node_learns_its_new_place(tree: Client) -> None:
    """Whether the fid is named or its name; both of two that were exchanged."""
    one, two, d = tree.know("one"), tree.know("two"), tree.know("d")
    root, d_path = tree.do(ops.getattr, ROOT).ino, d.node.number
    tree.do(ops.renameat, ROOT, b"one", d.number, b"new")
    assert tree.place(one.number) == (d_path, b"new")
    tree.do(ops.renameat, d.number, b"new", ROOT, b"two", RENAME_EXCHANGE)
    assert tree.place(one.number) == (root, b"two")
    assert tree.place(two.number) == (d_path, b"new")
    clone = tree.walk(start=two.number)
    tree.do(ops.rename, clone, ROOT, b"three")
    tree.do(ops.clunk, clone)
    assert tree.place(two.number) == (root, b"three")
    for fid, size in ((one, 1), (two, 2)):
        tree.lose_descriptor(fid)
        assert tree.do(ops.getattr, fid.number).size == size


def test_a_failed_rename_leaves_places_as_they_are(tree: Client) -> None:
    """And the file can be opened again by its name."""
    one = tree.know("one")
    place = tree.place(one.number)
    with fails(errno.EEXIST):
        tree.do(ops.renameat, ROOT, b"one", ROOT, b"two", RENAME_NOREPLACE)
    with fails(errno.EISDIR):
        tree.do(ops.renameat, ROOT, b"one", ROOT, b"d")
    assert tree.place(one.number) == place
    tree.lose_descriptor(one)
    assert tree.do(ops.getattr, one.number).size == 1


@pytest.mark.parametrize("how", ["renameat", "rename"])
def test_a_file_that_is_renamed_over_stays_usable(tree: Client, how: str) -> None:
    """It has no name any more; its node gets a descriptor before it is too late."""
    known = without_descriptor(tree, "two")
    opened = tree.open("two", flags=os.O_RDWR)
    if how == "renameat":
        tree.do(ops.renameat, ROOT, b"one", ROOT, b"two")
    else:
        tree.do(ops.rename, tree.walk("one"), ROOT, b"two")
    a = tree.do(ops.getattr, known.number)
    assert (a.nlink, a.size) == (0, 2)
    assert tree.do(ops.read, opened, 0, 9) == b"22"
    tree.do(ops.setattr, known.number, Changes(size=1))
    again = tree.walk(start=known.number)
    tree.do(ops.lopen, again, os.O_RDONLY)
    assert tree.do(ops.read, again, 0, 9) == b"2"
    assert (tree.source / "two").read_bytes() == b"1"


def test_an_empty_directory_that_is_renamed_over_stays_usable(tree: Client) -> None:
    """As far as a removed directory can be used."""
    known = without_descriptor(tree, "e")
    tree.do(ops.renameat, ROOT, b"d", ROOT, b"e")
    assert tree.do(ops.getattr, known.number).nlink == 0
    with fails(errno.ENOENT):
        tree.do(ops.mkdir, known.number, b"new", 0o755)
    assert names(tree.source / "e") == ["inner"]


def test_a_rename_under_way_keeps_nobody_waiting(tree: Client) -> None:
    """It may be stuck in its directory for ever."""
    moving = Stepper(ops.renameat(tree.session, ROOT, b"d", ROOT, b"moved"))
    moving.before("_rename")
    _, found = tree.do(ops.walk, ROOT, tree.new(), [b"d", b"inner"])
    assert found is not None
    tree.do(ops.mkdir, ROOT, b"new", 0o755)
    tree.do(ops.renameat, ROOT, b"one", ROOT, b"1")
    moving.finish()
    assert names(tree.source) == ["1", "e", "fifo", "link", "moved", "new", "two"]


@pytest.mark.parametrize("is_told", [False, True])
def test_who_saw_a_name_before_it_moved_looks_again(tree: Client, is_told: bool) -> None:
    """Whether the rename has only been begun, or is over: its new place is remembered."""
    one = tree.know("one")
    tree.know("d")
    moving = Stepper(ops.renameat(tree.session, ROOT, b"one", tree.know("d").number, b"1"))
    moving.before("_rename")
    # By a name that goes at the source, to the file that is being moved.
    os.link(tree.source / "one", tree.source / "other")
    walking = Stepper(ops.walk(tree.session, ROOT, tree.session.kernel.intern, [b"other"]))
    walking.after("_step")
    if is_told:
        moving.finish()
    else:
        moving.after("_rename")
    os.unlink(tree.source / "other")
    if is_told:
        with fails(errno.ENOENT):
            walking.finish()
    else:
        assert walking.finish()[1] is one
        moving.finish()
    assert one.node.place is not None
    assert one.node.place[1] == b"1"


def _move_another(client: Client, times: int) -> None:
    """Rename a file that nobody looks for, there and back again."""
    ways = [(b"two", b"2"), (b"2", b"two")]
    client.do(ops.renameat, ROOT, ways[times % 2][0], ROOT, ways[times % 2][1])


def test_a_place_is_right_though_names_move_all_the_time(tree: Client) -> None:
    """The last look is believed: the file may not be moved between it and the note."""
    one = tree.know("one")
    walking = Stepper(ops.walk(tree.session, ROOT, tree.session.kernel.intern, [b"one"]))
    for times in range(MOST_TRIES):
        walking.after("_step")
        _move_another(tree, times)
    moving = Stepper(ops.renameat(tree.session, ROOT, b"one", ROOT, b"1"))
    moving.go()
    assert walking.finish()[1] is one
    moving.finish()
    assert one.node.place is not None
    assert one.node.place[1] == b"1"


def test_a_listed_place_is_right_though_names_move_all_the_time(tree: Client) -> None:
    """As for a lookup."""
    inner = tree.know("d", "inner")
    directory = tree.know("d").number
    handle = tree.open("d")
    listing = Stepper(readdirplus(tree.session, handle, 0))
    for times in range(MOST_TRIES):
        listing.after("_stat_entry")
        _move_another(tree, times)
    moving = Stepper(ops.renameat(tree.session, directory, b"inner", directory, b"moved"))
    moving.go()
    listing.finish()
    moving.finish()
    assert inner.node.place is not None
    assert inner.node.place[1] == b"moved"


def test_a_rename_does_not_hold_up_data(tree: Client) -> None:
    """Reads, writes, syncs and attributes of what is open go on meanwhile."""
    fid = tree.open("one", flags=os.O_RDWR)
    directory = tree.open("d")
    moving = Stepper(ops.renameat(tree.session, ROOT, b"one", ROOT, b"new"))
    moving.before("_rename")
    assert tree.do(ops.read, fid, 0, 1) == b"1"
    assert tree.do(ops.write, fid, 0, b"x") == 1
    tree.do(ops.fsync, fid)
    tree.do(ops.setattr, fid, Changes(mtime=1))
    assert tree.do(ops.getattr, fid).size == 1
    assert tree.do(ops.readdir, directory, 0, 4096)
    tree.do(ops.lopen, tree.walk(start=fid), os.O_RDONLY)
    tree.do(ops.clunk, directory)
    moving.finish()


# unlinkat


@pytest.mark.parametrize("name", [b"one", b"link", b"fifo"])
def test_unlinkat_removes_a_name(tree: Client, name: bytes) -> None:
    """A symlink's own, not that of its target."""
    tree.do(ops.unlinkat, ROOT, name)
    assert os.fsdecode(name) not in names(tree.source)
    assert len(names(tree.source)) == 5


def test_unlinkat_through_an_open_directory(tree: Client) -> None:
    """Clients list a directory and remove with the same fid; it is not clunked."""
    directory = tree.open("d")
    tree.do(ops.unlinkat, directory, b"inner")
    assert names(tree.source / "d") == []
    assert {e.name for e in tree.do(ops.readdir, directory, 0, 4096)} <= {b".", b"..", b"inner"}


def test_directories_need_the_flag_and_files_must_not_have_it(tree: Client) -> None:
    """EISDIR without, ENOTDIR with; ENOTEMPTY where something is left."""
    with fails(errno.EISDIR):
        tree.do(ops.unlinkat, ROOT, b"e")
    for name in (b"one", b"link", b"fifo"):
        with fails(errno.ENOTDIR):
            tree.do(ops.unlinkat, ROOT, name, AT_REMOVEDIR)
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        tree.do(ops.unlinkat, ROOT, b"d", AT_REMOVEDIR)
    tree.do(ops.unlinkat, ROOT, b"e", AT_REMOVEDIR)
    assert names(tree.source) == ["d", "fifo", "link", "one", "two"]


@pytest.mark.parametrize("flags", [1, 0x100, 0x201, 0x400, -1])
def test_other_flags_of_unlinkat_are_refused(tree: Client, flags: int) -> None:
    """EINVAL."""
    with fails(errno.EINVAL):
        tree.do(ops.unlinkat, ROOT, b"one", flags)
    assert "one" in names(tree.source)


def test_unlinkat_of_what_is_no_name(tree: Client) -> None:
    """EINVAL, for dot too; ENOTEMPTY for dot-dot; ENOENT; ENOTDIR below a file."""
    for flags in (0, AT_REMOVEDIR):
        for name in (*ILLEGAL_NAMES, b"."):
            with fails(errno.EINVAL):
                tree.do(ops.unlinkat, ROOT, name, flags)
        with fails(errno.ENOTEMPTY):
            tree.do(ops.unlinkat, tree.walk("e"), b"..", flags)
        with fails(errno.ENAMETOOLONG):
            tree.do(ops.unlinkat, ROOT, b"x" * 256, flags)
        with fails(errno.ENOENT):
            tree.do(ops.unlinkat, ROOT, b"none", flags)
        for other in ("one", "link", "fifo"):
            with fails(errno.ENOTDIR):
                tree.do(ops.unlinkat, tree.walk(other), b"x", flags)
    assert len(names(tree.source)) == 6


def test_an_unlinked_file_is_used_until_its_fids_end(tree: Client) -> None:
    """Unopened and open ones; a new file of the same name is another file."""
    unopened, opened = tree.walk("one"), tree.open("one", flags=os.O_RDWR)
    tree.do(ops.unlinkat, ROOT, b"one")
    tree.create("one", b"new one")
    for fid in (unopened, opened):
        a = tree.do(ops.getattr, fid)
        assert (a.nlink, a.size) == (0, 1)
    tree.do(ops.setattr, unopened, Changes(mode=0o600))
    assert tree.do(ops.write, opened, 1, b"2") == 1
    tree.do(ops.lopen, unopened, os.O_RDONLY)
    assert tree.do(ops.read, unopened, 0, 9) == b"12"


@pytest.mark.parametrize(
    ("path", "flags"), [(("one",), 0), (("d", "inner"), 0), (("e",), AT_REMOVEDIR), (("link",), 0)]
)
def test_a_node_without_descriptor_gets_one_before_its_name_goes(
    tree: Client, path: tuple[str, ...], flags: int
) -> None:
    """After that it could not be opened any more."""
    known = without_descriptor(tree, *path)
    tree.do(ops.unlinkat, tree.walk(*path[:-1]), os.fsencode(path[-1]), flags)
    assert known.node.fd >= 0
    assert tree.do(ops.getattr, known.number).nlink == 0


def test_a_node_gets_no_descriptor_of_another_file(tree: Client) -> None:
    """Its name leads to another one by the time it is opened."""
    known = without_descriptor(tree, "one")
    unlinking = Stepper(ops.unlinkat(tree.session, ROOT, b"one"))
    unlinking.before("open_named")
    (tree.source / "one").rename(tree.source / "moved")
    (tree.source / "one").write_bytes(b"another")
    unlinking.finish()
    assert known.node.fd == -1
    with fails(errno.ESTALE):
        tree.do(ops.getattr, known.number)
    assert tree.know("moved") is known
    assert tree.do(ops.getattr, known.number).size == 1


def test_an_unlink_that_fails_needs_no_name_afterwards(tree: Client) -> None:
    """The node has its descriptor or its name, as before."""
    known = without_descriptor(tree, "d")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        tree.do(ops.unlinkat, ROOT, b"d", AT_REMOVEDIR)
    assert tree.do(ops.getattr, known.number).ino == (tree.source / "d").stat().st_ino


def test_one_of_two_names_is_unlinked(tree: Client) -> None:
    """The file is still found by the other, and by a node that remembers the one."""
    os.link(tree.source / "one", tree.source / "same")
    known = tree.know("one")
    tree.lose_descriptor(known)
    tree.do(ops.unlinkat, ROOT, b"one")
    assert tree.do(ops.getattr, known.number).nlink == 1
    assert tree.know("same") is known


def test_a_name_that_is_made_again_is_another_file(tree: Client) -> None:
    """Same path means same file: while the old one is in use, the number differs."""
    first = tree.know("one")
    old: Qid = tree.session.fids.qid_of(tree.do(ops.getattr, first.number))
    tree.do(ops.unlinkat, ROOT, b"one")
    tree.create("one")
    second = tree.know("one")
    assert second is not first
    assert tree.session.fids.qid_of(tree.do(ops.getattr, second.number)).path != old.path
