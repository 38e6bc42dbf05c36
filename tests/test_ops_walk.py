"""walk, walkgetattr, clunk, remove, and the conversation around them: version, attach, flush."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ops_helpers import (
    ILLEGAL_NAMES,
    ROOT,
    UNKNOWN_NODEID,
    Client,
    Stepper,
    client_of,
    fails,
    made_up,
    module_of,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.fuse import callbacks
from ninefuse.fuse.entries import readdirplus
from ninefuse.linux.mountinfo import OwnMount
from ninefuse.ops.walk import MAXWELEM
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.qids import QTDIR, QTFILE, QTSYMLINK
from ninefuse.tree.session import Session

pytestmark = pytest.mark.usefixtures("leak_free")


@pytest.fixture
def tree(client: Client) -> Client:
    """Files a/b/c/file and top, a symlink to each kind of thing, a FIFO."""
    source = client.source
    (source / "a" / "b" / "c").mkdir(parents=True)
    (source / "a" / "b" / "c" / "file").write_bytes(b"deep")
    (source / "top").write_bytes(b"top")
    (source / "to-a").symlink_to("a")
    (source / "dangling").symlink_to("nowhere")
    os.mkfifo(source / "fifo")
    return client


# Every operation, on a fid that is not there

EVERY_OPERATION: dict[str, Callable[[Session, int], Any]] = {
    "walk": lambda s, fid: ops.walk(s, fid, FIRST_HANDLE + 999, [b"a"]),
    "clone": lambda s, fid: ops.walk(s, fid, FIRST_HANDLE + 999),
    "walkgetattr": lambda s, fid: ops.walkgetattr(s, fid, FIRST_HANDLE + 999, b"a"),
    "clunk": ops.clunk,
    "remove": ops.remove,
    "getattr": ops.getattr,
    "setattr": lambda s, fid: ops.setattr(s, fid, ops.Changes(mode=0o600)),
    "readlink": ops.readlink,
    "statfs": ops.statfs,
    "lopen": lambda s, fid: ops.lopen(s, fid, os.O_RDONLY),
    "lcreate": lambda s, fid: ops.lcreate(s, fid, b"new", os.O_RDWR, 0o600),
    "read": lambda s, fid: ops.read(s, fid, 0, 1),
    "write": lambda s, fid: ops.write(s, fid, 0, b"x"),
    "fsync": ops.fsync,
    "lock": lambda s, fid: ops.lock(s, fid, 0, ops.LockRange(0, 0, 0)),
    "getlock": lambda s, fid: ops.getlock(s, fid, ops.LockRange(0, 0, 0)),
    "readdir": lambda s, fid: ops.readdir(s, fid, 0, 4096),
    "readdirplus": lambda s, fid: callbacks.readdirplus(s, fid, 0),
    "mkdir": lambda s, fid: ops.mkdir(s, fid, b"new", 0o700),
    "mknod": lambda s, fid: ops.mknod(s, fid, b"new", stat.S_IFIFO | 0o600),
    "symlink": lambda s, fid: ops.symlink(s, fid, b"new", b"target"),
    "link of it": lambda s, fid: ops.link(s, ROOT, fid, b"new"),
    "link in it": lambda s, fid: ops.link(s, fid, ROOT, b"new"),
    "rename of it": lambda s, fid: ops.rename(s, fid, ROOT, b"new"),
    "renameat from it": lambda s, fid: ops.renameat(s, fid, b"top", ROOT, b"new"),
    "renameat to it": lambda s, fid: ops.renameat(s, ROOT, b"top", fid, b"new"),
    "unlinkat": lambda s, fid: ops.unlinkat(s, fid, b"top"),
    "xattrwalk": lambda s, fid: ops.xattrwalk(s, fid, FIRST_HANDLE + 999, b"user.x"),
    "xattrcreate": lambda s, fid: ops.xattrcreate(s, fid, b"user.x", 1),
}


@pytest.mark.parametrize("operation", EVERY_OPERATION)
def test_an_unknown_nodeid_is_stale_and_an_unknown_handle_is_bad(
    tree: Client, operation: str
) -> None:
    """ESTALE makes the kernel walk the path again; a handle is gone for good: EBADF."""
    before = sorted(os.listdir(tree.source))
    with fails(errno.ESTALE):
        tree.do(EVERY_OPERATION[operation], UNKNOWN_NODEID)
    with fails(errno.EBADF):
        tree.do(EVERY_OPERATION[operation], tree.new())
    gone = tree.walk("top")
    tree.do(ops.clunk, gone)
    with fails(errno.EBADF):
        tree.do(EVERY_OPERATION[operation], gone)
    assert sorted(os.listdir(tree.source)) == before
    assert set(tree.session.fids._fids) == {ROOT}


# walk: clones


@pytest.mark.parametrize("names", [(), ("a", "b"), ("top",), ("to-a",), ("fifo",)])
def test_a_walk_of_no_names_clones_any_fid(tree: Client, names: tuple[str, ...]) -> None:
    """A clone stands on the same file, and outlives what it was cloned from."""
    fid = tree.walk(*names)
    clone = tree.new()
    qids, made = tree.do(ops.walk, fid, clone)
    assert qids == []
    assert made is tree.fid(clone)
    before = tree.do(ops.getattr, fid)
    tree.do(ops.clunk, fid)
    assert tree.do(ops.getattr, clone) == before


def test_the_clone_of_an_open_fid_is_unopened(tree: Client) -> None:
    """A clone can be opened again, by itself and in another mode."""
    fid = tree.open("top", flags=os.O_RDONLY)
    clone = tree.walk(start=fid)
    with fails(errno.EINVAL):
        tree.do(ops.read, clone, 0, 3)
    tree.do(ops.lopen, clone, os.O_RDWR)
    assert tree.do(ops.write, clone, 0, b"TOP") == 3
    assert tree.do(ops.read, fid, 0, 3) == b"TOP"
    assert tree.descriptor(clone) != tree.descriptor(fid)


def test_names_are_walked_from_an_open_directory_to_another_fid(tree: Client) -> None:
    """An open fid is a starting point like any other (Linux clients rely on it)."""
    directory = tree.open("a")
    file = tree.walk("b", "c", "file", start=directory)
    assert tree.do(ops.getattr, file).size == 4
    assert tree.do(ops.readdir, directory, 0, 4096)


# walk: all names or nothing


def test_a_walk_of_names_answers_a_qid_for_each(tree: Client) -> None:
    """The qids are those of the files passed: their types, and a path for each file."""
    fid = tree.new()
    qids, made = tree.do(ops.walk, ROOT, fid, [b"a", b"b", b"c", b"file"])
    assert made is tree.fid(fid)
    assert [qid.type for qid in qids] == [QTDIR, QTDIR, QTDIR, QTFILE]
    assert len({qid.path for qid in qids}) == 4
    for depth, qid in enumerate(qids, 1):
        names = ["a", "b", "c", "file"][:depth]
        attributes = tree.do(ops.getattr, tree.walk(*names))
        assert tree.session.fids.qid_of(attributes) == qid
    assert tree.do(ops.getattr, fid).size == 4


@pytest.mark.parametrize(
    ("names", "passed"),
    [
        ([b"a", b"none"], 1),
        ([b"a", b"b", b"none", b"none"], 2),
        ([b"top", b"below-a-file"], 1),
        ([b"to-a", b"b"], 1),
        ([b"a", b"..", b"fifo", b"."], 3),
    ],
)
def test_a_partial_walk_changes_nothing(tree: Client, names: list[bytes], passed: int) -> None:
    """A walk that ends early says how far it came; fid and newfid are as before."""
    fid, newfid = tree.walk(), tree.new()
    node = tree.node(fid)
    qids, made = tree.do(ops.walk, fid, newfid, names)
    assert (len(qids), made) == (passed, None)
    assert not tree.has(newfid)
    assert tree.node(fid) is node
    # To itself, too: it is not moved part of the way.
    qids, made = tree.do(ops.walk, fid, fid, names)
    assert (len(qids), made) == (passed, None)
    assert tree.node(fid) is node
    tree.do(ops.walk, fid, newfid, [b"a"])


def test_a_walk_whose_first_name_fails_is_an_error(tree: Client) -> None:
    """Without even one qid there is only the error to answer."""
    fid = tree.new()
    with fails(errno.ENOENT):
        tree.do(ops.walk, ROOT, fid, [b"none", b"a"])
    assert not tree.has(fid)


def test_a_walk_to_itself_moves_the_fid(tree: Client) -> None:
    """newfid == fid: the fid stands on what was found, and lets go of what it stood on."""
    fid = tree.walk("a")
    held = tree.session.fids.descriptors
    qids, made = tree.do(ops.walk, fid, fid, [b"b", b"c"])
    assert len(qids) == 2
    assert made is tree.fid(fid)
    assert tree.do(ops.walk, fid, tree.new(), [b"file"])[1] is not None
    assert tree.session.fids.descriptors == held + 1, "the fid's new one, and the file's"


def test_a_clone_to_itself_changes_nothing(tree: Client) -> None:
    """walk(fid, fid) without names is legal for an unopened fid."""
    fid = tree.walk("top")
    node = tree.node(fid)
    assert tree.do(ops.walk, fid, fid) == ([], tree.fid(fid))
    assert tree.node(fid) is node


def test_a_taken_newfid_is_refused(tree: Client) -> None:
    """EINVAL, and the fid that has the number keeps it."""
    taken = tree.walk("top")
    for names in ([], [b"a"], [b"a", b"b", b"c", b"file"]):
        with fails(errno.EINVAL):
            tree.do(ops.walk, ROOT, taken, names)
    assert tree.do(ops.getattr, taken).size == 3


def test_an_open_fid_cannot_walk_to_itself(tree: Client) -> None:
    """It would be neither here nor there: EINVAL, and it stays open."""
    directory, file = tree.open("a"), tree.open("top")
    for name in (b"b", b"none"):
        with fails(errno.EINVAL):
            tree.do(ops.walk, directory, directory, [name])
    for fid in (directory, file):
        with fails(errno.EINVAL):
            tree.do(ops.walk, fid, fid)
    assert tree.do(ops.readdir, directory, 0, 4096)
    assert tree.do(ops.read, file, 0, 3) == b"top"


@pytest.mark.parametrize("names", [(), (b"b",)])
def test_a_fid_that_is_opened_as_it_walks_to_itself_stays(
    tree: Client, monkeypatch: pytest.MonkeyPatch, names: tuple[bytes, ...]
) -> None:
    """After the look at whether it is open: it would have one directory open and be another."""
    fid, fids = tree.walk("a"), tree.session.fids
    move = fids.move

    def meanwhile(*args: Any) -> None:
        Stepper(ops.lopen(tree.session, fid, os.O_RDONLY)).finish()
        move(*args)

    monkeypatch.setattr(fids, "move", meanwhile)
    with fails(errno.EINVAL):
        tree.do(ops.walk, fid, fid, names)
    assert tree.do(ops.getattr, fid).ino == os.fstat(tree.descriptor(fid)).st_ino


@pytest.mark.parametrize(
    "opening",
    [
        lambda s, fid: ops.lopen(s, fid, os.O_RDONLY),
        lambda s, fid: ops.lcreate(s, fid, b"new", os.O_RDWR, 0o600),
        lambda s, fid: ops.lcreate(s, fid, b"there", os.O_RDWR, 0o600),
    ],
    ids=["lopen", "lcreate", "lcreate of what is there"],
)
def test_a_fid_that_walks_to_itself_as_it_is_opened_is_not_opened(
    tree: Client, monkeypatch: pytest.MonkeyPatch, opening: Callable[[Session, int], Any]
) -> None:
    """It is where it has walked to, and can be opened there."""
    (tree.source / "a" / "there").touch()
    fid, fids = tree.walk("a"), tree.session.fids

    def meanwhile(*args: Any) -> None:
        Stepper(ops.walk(tree.session, fid, fid, [b"b"])).finish()
        type(fids).open(fids, *args)

    with monkeypatch.context() as patch, fails(errno.EINVAL):
        patch.setattr(fids, "open", meanwhile)
        tree.do(opening, fid)
    assert tree.do(ops.getattr, fid).ino == (tree.source / "a" / "b").stat().st_ino
    tree.do(ops.lopen, fid, os.O_RDONLY)
    assert fids.lend(9) == 1
    assert tree.do(ops.getattr, fid).ino == os.fstat(tree.descriptor(fid)).st_ino


def test_a_walk_takes_sixteen_names(tree: Client) -> None:
    """17 are refused with EINVAL before any is looked at."""
    deep = tree.source.joinpath(*["d"] * MAXWELEM)
    deep.mkdir(parents=True)
    qids, _ = tree.do(ops.walk, ROOT, tree.new(), [b"d"] * MAXWELEM)
    assert len(qids) == MAXWELEM == 16
    newfid = tree.new()
    with fails(errno.EINVAL):
        tree.do(ops.walk, ROOT, newfid, [b"d"] * (MAXWELEM + 1))
    with fails(errno.EINVAL):
        tree.do(ops.walk, ROOT, newfid, [b"none"] * (MAXWELEM + 1))
    assert not tree.has(newfid)


@pytest.mark.parametrize("file", ["top", "to-a", "dangling", "fifo"])
@pytest.mark.parametrize("name", [b"x", b".", b".."])
def test_there_is_nothing_below_a_file(tree: Client, file: str, name: bytes) -> None:
    """Names from anything but a directory: ENOTDIR, a symlink to a directory included."""
    with fails(errno.ENOTDIR):
        tree.do(ops.walk, tree.walk(file), tree.new(), [name])


# walk: names


def test_dot_dot_of_the_root_is_the_root(tree: Client) -> None:
    """No number of them leads out of the source."""
    root = tree.do(ops.getattr, ROOT)
    for names in ([".."], [".."] * 16, ["a", "b", "..", ".."], ["a", "..", "..", "..", "."]):
        assert tree.do(ops.getattr, tree.walk(*names)).ino == root.ino
    assert tree.do(ops.getattr, tree.walk("..", "top")).size == 3
    assert tree.do(ops.getattr, tree.walk("a", "b", "..", "..", "top")).size == 3


def test_dot_is_where_one_is(tree: Client) -> None:
    """In any directory, at any place in the walk; its qid is the directory's."""
    fid = tree.new()
    qids, _ = tree.do(ops.walk, ROOT, fid, [b".", b"a", b".", b"b", b"."])
    assert [qid.path for qid in qids] == [
        qids[0].path,
        qids[1].path,
        qids[1].path,
        qids[3].path,
        qids[3].path,
    ]
    assert tree.do(ops.getattr, fid).ino == (tree.source / "a" / "b").stat().st_ino
    assert tree.know("a", ".") is tree.know("a")


def test_dot_dot_is_never_asked_of_the_source(
    tree: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that was moved out of the source does not lead out of it."""
    asked: list[bytes] = []
    for where, name in ((tree.session, "stat_name"), (module_of(ops.walk), "open_step")):
        real: Callable[[int, bytes], Any] = getattr(where, name)

        def recording(fd: int, name: bytes, real: Callable[[int, bytes], Any] = real) -> Any:
            asked.append(name)
            return real(fd, name)

        monkeypatch.setattr(where, name, recording)
    inner = tree.walk("a", "b")
    outside = tree.source.parent / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    (tree.source / "a" / "b").rename(outside / "b")
    above = tree.walk("..", start=inner)
    assert tree.do(ops.getattr, above).ino == (tree.source / "a").stat().st_ino
    qids, _ = tree.do(ops.walk, inner, tree.new(), [b"..", b"..", b"..", b"secret"])
    assert len(qids) == 3, "it went on beyond the root"
    assert b"secret" in asked
    assert b".." not in asked


def test_no_operation_looks_at_a_name_that_leads_into_the_mount_itself(tree: Client) -> None:
    """ELOOP, also for what was known before something was mounted there."""

    class Own(OwnMount):
        def __init__(self) -> None:
            pass

        def refuse(self, directory: int, name: bytes) -> None:
            if name == b"a":
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    directory = tree.know("a")
    fid = tree.walk("a")
    tree.do(ops.clunk, fid)
    tree.lose_descriptor(directory)
    fid = tree.walk(start=directory.number)
    tree.session.own_mount = Own()
    for operation, *arguments in (
        (ops.walk, ROOT, tree.new(), [b"a"]),
        (ops.walkgetattr, ROOT, tree.new(), b"a"),
        (ops.getattr, fid),  # has no descriptor, and would open it again
        (ops.unlinkat, ROOT, b"a", 0x200),
        (ops.renameat, ROOT, b"top", ROOT, b"a"),
        (ops.rename, fid, ROOT, b"moved"),
        (ops.remove, fid),
    ):
        with fails(errno.ELOOP):
            tree.do(operation, *arguments)
    assert (tree.source / "a").is_dir()
    root = tree.open()
    [shown] = [e for e in tree.do(readdirplus, root, 0) if e.name == b"a"]
    assert shown.attributes is None


def test_dot_dot_finds_a_parent_that_no_fid_stands_on(tree: Client) -> None:
    """A walk through directories keeps none of them, but the way back is known."""
    deep = tree.walk("a", "b", "c")
    assert tree.session.fids.descriptors == 2, "the root's and its own"
    up = tree.walk("..", "..", start=deep)
    assert tree.do(ops.getattr, up).ino == (tree.source / "a").stat().st_ino
    (tree.source / "a" / "b").rename(tree.source / "moved")
    with fails(errno.ESTALE):
        tree.walk("..", start=deep)


@pytest.mark.parametrize("name", ILLEGAL_NAMES)
def test_what_is_not_a_name_is_not_found(tree: Client, name: bytes) -> None:
    """ENOENT for an empty name, a slash or a zero byte, wherever in the walk it stands."""
    fid = tree.new()
    for names in ([name], [b"a", name], [name, b"a"]):
        with fails(errno.ENOENT):
            tree.do(ops.walk, ROOT, fid, names)
    assert not tree.has(fid)


@pytest.mark.parametrize(
    "name", [b"x" * 255, b"\xff\xfe\x80", "é".encode("latin-1"), b"\n", b" ", b"...", b"\\"]
)
def test_a_name_is_any_bytes(client: Client, name: bytes) -> None:
    """Names of 255 bytes, and ones that are no UTF-8, come through unchanged."""
    client.create(name, b"found")
    assert client.do(ops.getattr, client.walk(name)).size == 5
    assert os.listdir(os.fsencode(client.source)) == [name]
    assert client.place(client.walk(name))[1] == name


def test_a_name_of_256_bytes_is_too_long(client: Client) -> None:
    """ENAMETOOLONG, also where it would never have been reached."""
    for names in ([b"x" * 256], [b"none", b"x" * 256]):
        with fails(errno.ENAMETOOLONG):
            client.do(ops.walk, ROOT, client.new(), names)


def test_a_symlink_is_walked_to_and_not_through(tree: Client) -> None:
    """The fid is the symlink's own, and nothing is below it."""
    fid = tree.new()
    qids, _ = tree.do(ops.walk, ROOT, fid, [b"to-a"])
    assert [qid.type for qid in qids] == [QTSYMLINK]
    assert stat.S_ISLNK(tree.do(ops.getattr, fid).mode)
    assert tree.do(ops.walk, ROOT, tree.new(), [b"to-a", b"b"])[1] is None


def test_a_symlink_that_takes_a_directorys_place_is_not_entered(tree: Client) -> None:
    """A fid stays with its directory; a later walk of the name stops at the symlink."""
    fid = tree.walk("a")
    outside = tree.source.parent / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    (tree.source / "a").rename(tree.source / "old")
    (tree.source / "a").symlink_to(outside)
    assert tree.do(ops.walk, fid, tree.new(), [b"b", b"c", b"file"])[1] is not None
    with fails(errno.ENOENT):
        tree.walk("secret", start=fid)
    assert tree.do(ops.walk, ROOT, tree.new(), [b"a", b"secret"])[1] is None


# walk: to the kernel's fids


def test_a_walk_for_the_kernel_counts_lookups(tree: Client) -> None:
    """The nodeid is the file's number; each walk to it is one more lookup."""
    fid = tree.know("top")
    assert fid.number == tree.session.fids.number_of(tree.do(ops.getattr, fid.number))
    assert fid.lookups == 1
    assert tree.know("top") is fid
    assert tree.know("a", "..", "top") is fid
    assert tree.know(start=fid.number) is fid
    assert tree.know(start=tree.walk("top")) is fid
    assert fid.lookups == 5
    tree.forget(fid, 4)
    assert tree.do(ops.getattr, fid.number).size == 3
    tree.forget(fid)
    with fails(errno.ESTALE):
        tree.do(ops.getattr, fid.number)


def test_a_walk_for_the_kernel_counts_only_the_last_name(tree: Client) -> None:
    """Directories on the way are no fids; a partial walk counts nothing."""
    before = set(tree.session.fids._fids)
    fid = tree.know("a", "b", "c", "file")
    assert set(tree.session.fids._fids) - before == {fid.number}
    qids, none = tree.do(ops.walk, ROOT, tree.session.kernel.intern, [b"a", b"none"])
    assert (len(qids), none) == (1, None)
    with fails(errno.ENOENT):
        tree.do(ops.walk, ROOT, tree.session.kernel.intern, [b"none"])
    assert set(tree.session.fids._fids) - before == {fid.number}


def test_the_root_found_by_the_kernel_is_fid_1(tree: Client) -> None:
    """However it is walked to; and no forget takes it away."""
    assert tree.know("..") is tree.fid(ROOT)
    assert tree.know() is tree.fid(ROOT)
    tree.forget(tree.fid(ROOT), 100)
    assert tree.do(ops.getattr, ROOT).ino == tree.source.stat().st_ino


# walkgetattr


def test_a_directory_that_is_walked_up_to_keeps_its_place(tree: Client) -> None:
    """It is found below its parent, not in its child by the name of two dots."""
    a, b = tree.know("a"), tree.know("a", "b")
    places = [tree.place(fid.number) for fid in (a, b)]
    tree.walk("..", start=b.number)
    tree.walk(".", start=b.number)
    assert [tree.place(fid.number) for fid in (a, b)] == places


def test_walkgetattr_is_a_walk_of_one_name_and_a_getattr(tree: Client) -> None:
    fid, attributes = tree.do(ops.walkgetattr, ROOT, tree.session.kernel.intern, b"top")
    assert fid is tree.know("top")
    assert attributes == tree.do(ops.getattr, fid.number)
    assert (fid.lookups, attributes.size) == (2, 3)
    tree.forget(fid, 2)
    clone = tree.walk()
    moved, attributes = tree.do(ops.walkgetattr, clone, clone, b"a")
    assert moved.number == clone
    assert attributes.ino == tree.node(clone).inode
    tree.do(ops.clunk, clone)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"missing", errno.ENOENT),
        (b"", errno.ENOENT),
        (b"a/b", errno.ENOENT),
        (b"n" * 256, errno.ENAMETOOLONG),
    ],
)
def test_a_walkgetattr_that_fails_leaves_nothing(tree: Client, name: bytes, code: int) -> None:
    with fails(code):
        tree.do(ops.walkgetattr, ROOT, tree.session.kernel.intern, name)
    top = tree.walk("top")
    with fails(errno.ENOTDIR):
        tree.do(ops.walkgetattr, top, tree.session.kernel.intern, b"a")
    tree.do(ops.clunk, top)
    directory = tree.open("a")
    with fails(errno.EINVAL):
        tree.do(ops.walkgetattr, directory, directory, b"b")
    tree.do(ops.clunk, directory)
    assert set(tree.session.fids._fids) == {ROOT}


def test_hard_links_are_one_fid(tree: Client) -> None:
    """Two names of a file lead to one nodeid, which remembers the name used last."""
    os.link(tree.source / "top", tree.source / "a" / "second")
    first = tree.know("top")
    assert tree.place(first.number)[1] == b"top"
    assert tree.know("a", "second") is first
    assert first.lookups == 2
    assert tree.place(first.number) == (tree.do(ops.getattr, tree.walk("a")).ino, b"second")
    assert tree.session.fids.descriptors == 3, "the root's, the file's and that of the fid on a"


def test_a_known_file_needs_no_second_descriptor(tree: Client) -> None:
    """A client's fid on a file that the kernel knows shares its node."""
    fid = tree.know("top")
    other = tree.walk("top")
    assert tree.node(other) is fid.node
    tree.forget(fid)
    assert tree.do(ops.getattr, other).size == 3


def test_a_found_file_gives_its_descriptor_to_the_node_that_lost_its(tree: Client) -> None:
    """A lookup of a node without descriptor ends with one node, one descriptor, one fid."""
    fid = tree.know("top")
    tree.lose_descriptor(fid)
    assert tree.know("top") is fid
    assert fid.node.fd >= 0
    assert tree.session.fids.descriptors == 2


# clunk


def test_a_clunked_fid_is_gone_and_its_number_free(tree: Client) -> None:
    """Open or not; the descriptor is closed."""
    for opened in (False, True):
        fid = tree.walk("top")
        if opened:
            tree.do(ops.lopen, fid, os.O_RDONLY)
        tree.do(ops.clunk, fid)
        with fails(errno.EBADF):
            tree.do(ops.clunk, fid)
        tree.do(ops.walk, ROOT, fid, [b"a"])
        assert stat.S_ISDIR(tree.do(ops.getattr, fid).mode)
        tree.do(ops.clunk, fid)
    assert tree.session.fids.statistics() == (1, 0, 0, 1)


def test_a_fid_clunked_while_it_is_used_ends_with_its_last_use(
    tree: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read under way is not disturbed; the descriptor is closed once, and only then."""
    closed: list[int] = []
    close = os.close

    def recording(fd: int) -> None:
        closed.append(fd)
        close(fd)

    fid = tree.open("top")
    number = tree.descriptor(fid)
    monkeypatch.setattr(os, "close", recording)
    read = Stepper(ops.read(tree.session, fid, 0, 3))
    again = Stepper(ops.read(tree.session, fid, 1, 3))
    read.before("Pread")
    again.before("Pread")
    tree.do(ops.clunk, fid)
    with fails(errno.EBADF):
        tree.do(ops.read, fid, 0, 3)
    assert read.finish() == b"top"
    tree.rest()
    assert number not in closed
    assert again.finish() == b"op"
    tree.rest()
    assert closed.count(number) == 1


def test_a_number_used_again_is_another_fid(tree: Client) -> None:
    """An operation on the old fid goes on with the old file."""
    fid = tree.walk("top")
    asking = Stepper(ops.getattr(tree.session, fid))
    asking.before("stat_descriptor")
    tree.do(ops.clunk, fid)
    tree.do(ops.walk, ROOT, fid, [b"a"])
    assert stat.S_ISREG(asking.finish().mode)
    assert stat.S_ISDIR(tree.do(ops.getattr, fid).mode)


def test_a_clunk_that_fails_has_clunked_all_the_same(tree: Client) -> None:
    """An attribute that was not written in full is EINVAL at the clunk, and the fid is gone."""
    fid = tree.walk("top")
    tree.do(ops.xattrcreate, fid, b"user.x", 5)
    tree.do(ops.write, fid, 0, b"1234")
    with fails(errno.EINVAL):
        tree.do(ops.clunk, fid)
    with fails(errno.EBADF):
        tree.do(ops.clunk, fid)


# A client that is no kernel


def test_a_9p_client_gives_its_fids_any_numbers(leak_free: None, source: Path) -> None:
    """The inode numbers of other files, say. Those of a file share its node."""
    for made in ("one", "other"):
        (source / made).write_bytes(made.encode())
    one, other = ((source / name).stat().st_ino for name in ("one", "other"))
    with client_of(source, kernel=False) as client:
        for number, name in ((other, b"one"), (one, b"other"), (7, b"one"), (1 << 31, b"one")):
            client.do(ops.walk, ROOT, number, [name])
        assert client.do(ops.getattr, other).ino == client.do(ops.getattr, 7).ino == one
        assert client.node(7) is client.node(other)
        client.do(ops.lopen, 7, os.O_RDWR)
        client.do(ops.unlinkat, ROOT, b"one")
        assert client.do(ops.read, 7, 0, 9) == b"one"
        assert client.do(ops.getattr, other).nlink == 0
        client.do(ops.walk, ROOT, 8)
        client.do(ops.lcreate, 8, b"one", os.O_RDWR, 0o600)
        for number in (7, other, 1 << 31):
            client.do(ops.clunk, number)
            with fails(errno.EBADF):
                client.do(ops.getattr, number)
        client.do(ops.rename, one, ROOT, b"moved")
        client.do(ops.remove, one)
        assert os.listdir(source) == ["one"]
        assert client.do(ops.read, 8, 0, 9) == b""


# remove


@pytest.mark.parametrize("name", ["top", "a/b/c/file", "to-a", "dangling", "fifo", "a/empty"])
def test_remove_removes_the_file_and_ends_the_fid(tree: Client, name: str) -> None:
    """Files, symlinks (not what they lead to), FIFOs and empty directories."""
    (tree.source / "a" / "empty").mkdir()
    fid = tree.walk(*name.split("/"))
    tree.do(ops.remove, fid)
    assert not os.path.lexists(tree.source / name)
    assert (tree.source / "a").is_dir()
    assert not tree.has(fid)


def test_remove_of_an_open_fid(tree: Client) -> None:
    """It may be open, too."""
    fid = tree.open("top", flags=os.O_RDWR)
    tree.do(ops.remove, fid)
    assert not (tree.source / "top").exists()
    assert not tree.has(fid)


def test_remove_ends_the_fid_even_if_it_fails(tree: Client) -> None:
    """A directory with something in it stays, the fid does not."""
    fid = tree.walk("a")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        tree.do(ops.remove, fid)
    assert not tree.has(fid)
    assert (tree.source / "a" / "b").is_dir()


def test_remove_of_the_root_is_refused(tree: Client) -> None:
    """EBUSY, also through a clone."""
    fid = tree.walk()
    with fails(errno.EBUSY):
        tree.do(ops.remove, fid)
    assert not tree.has(fid)
    assert tree.source.is_dir()


def test_remove_on_a_read_only_session(source: Path) -> None:
    """EROFS; the fid is gone, the file is not."""
    (source / "file").touch()
    with client_of(source, read_only=True) as client:
        fid = client.walk("file")
        with fails(errno.EROFS):
            client.do(ops.remove, fid)
        assert not client.has(fid)
    assert (source / "file").exists()


def test_remove_finds_a_file_where_rename_moved_it(tree: Client) -> None:
    """By rename of the fid, and by renameat of a file that the kernel knows."""
    fid = tree.walk("top")
    tree.do(ops.rename, fid, tree.walk("a"), b"moved")
    tree.do(ops.remove, fid)
    assert os.listdir(tree.source / "a") == ["b"]
    known = tree.know("a", "b", "c", "file")
    clone = tree.walk(start=known.number)
    tree.do(ops.renameat, tree.walk("a", "b", "c"), b"file", ROOT, b"here")
    tree.do(ops.remove, clone)
    assert not (tree.source / "here").exists()


def test_remove_spares_another_file_that_has_the_name_now(tree: Client) -> None:
    """Somebody replaced the file: ESTALE, and the new one is not touched."""
    fid = tree.walk("top")
    (tree.source / "new").write_bytes(b"new")
    (tree.source / "new").rename(tree.source / "top")
    with fails(errno.ESTALE):
        tree.do(ops.remove, fid)
    assert (tree.source / "top").read_bytes() == b"new"
    assert not tree.has(fid)


def test_remove_spares_a_file_that_is_made_while_it_removes(
    tree: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else removes the name and makes it anew, once it was seen to be the fid's file."""
    others: list[Stepper[None]] = []
    real = os.unlink

    def unlink(name: bytes, *, dir_fd: int) -> None:
        if not others:
            other = Stepper(ops.unlinkat(tree.session, ROOT, b"top"))
            others.append(other)
            other.go()
            if other.over:
                (tree.source / "top").write_bytes(b"new")
        real(name, dir_fd=dir_fd)

    fid = tree.walk("top")
    monkeypatch.setattr(os, "unlink", unlink)
    tree.do(ops.remove, fid)
    (other,) = others
    if other.over:
        assert (tree.source / "top").read_bytes() == b"new"
    else:
        with fails(errno.ENOENT):
            other.finish()


def test_remove_of_a_file_that_has_gone(tree: Client) -> None:
    """ENOENT, and the fid ends."""
    fid = tree.walk("top")
    (tree.source / "top").unlink()
    with fails(errno.ENOENT):
        tree.do(ops.remove, fid)
    assert not tree.has(fid)


def test_remove_keeps_the_file_for_the_kernel(tree: Client) -> None:
    """A node of the same file that has no descriptor gets one before the name goes."""
    fid = tree.walk("top")
    directory = tree.open()
    entries = tree.do(readdirplus, directory, 0)
    (known,) = [e.fid for e in entries if e.name == b"top"]
    assert known is not None
    assert known.node is not tree.node(fid)
    assert known.node.fd == -1
    tree.do(ops.remove, fid)
    assert tree.do(ops.getattr, known.number).nlink == 0


# version


def test_version_agrees_on_a_message_size(client: Client) -> None:
    """The smaller of both sides' sizes, and the protocol that both speak."""
    assert client.do(ops.version, 8192, "9P2000.L") == (8192, "9P2000.L")
    assert client.session.msize == 8192
    assert client.do(ops.version, 1 << 30, "9P2000.L") == (ops.MAX_MSIZE, "9P2000.L")
    assert client.do(ops.version, 4096, "9P2000.u") == (4096, "unknown")


def test_version_refuses_messages_that_hold_nothing(client: Client) -> None:
    """EMSGSIZE below 4096 bytes."""
    for size in (4095, 0):
        with fails(errno.EMSGSIZE):
            client.do(ops.version, size, "9P2000.L")


@pytest.mark.parametrize("wanted", ["9P2000.L", "9P2000"])
def test_version_clunks_every_fid(tree: Client, wanted: str) -> None:
    """A new conversation starts without fids: open ones, the kernel's and the root go."""
    tree.open("top")
    tree.open("a")
    tree.know("a", "b")
    attribute = tree.walk("top")
    tree.do(ops.xattrcreate, attribute, b"user.x", 0)
    tree.do(ops.version, 8192, wanted)
    assert len(tree.session.fids) == 0
    assert tree.session.fids.statistics() == (0, 0, 0, 0)
    assert os.listxattr(tree.source / "top") == []
    with fails(errno.ESTALE):
        tree.do(ops.getattr, ROOT)
    tree.do(ops.attach, ROOT, str(tree.source))
    assert tree.do(ops.getattr, tree.walk("top")).size == 3


def test_version_does_not_disturb_what_is_under_way(tree: Client) -> None:
    """A read that has begun ends well, and only then is its file closed."""
    fid = tree.open("top")
    read = Stepper(ops.read(tree.session, fid, 0, 3))
    read.before("Pread")
    tree.do(ops.version, 8192, "9P2000.L")
    assert read.finish() == b"top"


# attach


def test_attach_gives_the_source_directory(tree: Client) -> None:
    """By path or by descriptor, which stays the caller's; all roots are one file."""
    by_path = tree.do(ops.attach, tree.new(), str(tree.source))
    fd = os.open(tree.source, os.O_PATH)
    try:
        fid = tree.new()
        by_descriptor = tree.do(ops.attach, fid, fd)
        assert os.fstat(fd).st_ino == tree.source.stat().st_ino
    finally:
        os.close(fd)
    assert by_path == by_descriptor
    assert by_path.type == QTDIR
    assert tree.do(ops.getattr, tree.walk("top", start=fid)).size == 3
    assert tree.know(start=fid) is tree.fid(ROOT)


def test_attach_refuses_a_taken_fid(tree: Client) -> None:
    """EINVAL, and the fid stays what it was."""
    fid = tree.walk("top")
    with fails(errno.EINVAL):
        tree.do(ops.attach, fid, str(tree.source))
    with fails(errno.EINVAL):
        tree.do(ops.attach, ROOT, str(tree.source))
    assert tree.do(ops.getattr, fid).size == 3


def test_attach_refuses_what_is_no_directory(tree: Client) -> None:
    """ENOTDIR for files, ENOENT for nothing; the fid is not made."""
    fid = tree.new()
    for name in ("top", "fifo"):
        with fails(errno.ENOTDIR):
            tree.do(ops.attach, fid, str(tree.source / name))
    with fails(errno.ENOENT):
        tree.do(ops.attach, fid, str(tree.source / "none"))
    assert not tree.has(fid)


def test_attach_closes_its_descriptor_when_it_fails(
    tree: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root whose attributes cannot be read is no root (leak_free counts descriptors)."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(module_of(ops.attach), "stat_descriptor", broken)
    with fails(errno.EIO):
        tree.do(ops.attach, tree.new(), str(tree.source))


def test_attaching_again_leaves_numbers_as_they_are(tree: Client) -> None:
    """Files of other devices, whose numbers are given in the order they are met, keep theirs."""
    table = tree.session.fids
    first = table.number_of(made_up(7, device=(250, 1)))
    second = table.number_of(made_up(7, device=(250, 2)))
    tree.do(ops.attach, tree.new(), str(tree.source))
    assert table.number_of(made_up(7, device=(250, 2))) == second
    assert table.number_of(made_up(7, device=(250, 1))) == first


def test_a_socket_is_walked_to_like_any_file(client: Client) -> None:
    """Its node holds it without connecting to it."""
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(client.source)  # the path of a socket may have 107 bytes only
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    assert stat.S_ISSOCK(client.do(ops.getattr, client.walk("socket")).mode)
