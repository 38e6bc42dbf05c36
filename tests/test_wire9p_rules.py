"""The rules of 9P2000.L, message by message, over a socket; under each threading model.

Sources: the Plan 9 manual, section 5; QEMU's and diod's servers; Linux's fs/9p. Errors are those
of docs/operations.md.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client9p import LIMIT, ROOT, Client, Served, served
from mounting import wait_until
from ops_helpers import fails, module_of, need_attributes, needs_root

from ninefuse import ops
from ninefuse.executor import SecondModel
from ninefuse.tree.qids import is_on_own_device
from ninefuse.wire.messages import NOFID, NONUNAME, NOTAG

RDONLY, WRONLY, RDWR, CREAT, EXCL, TRUNC, APPEND = 0, 1, 2, 0o100, 0o200, 0o1000, 0o2000
ENTRY = struct.Struct("<BIQQBH")
BASIC = 0x7FF
SIZE, ATIME, MTIME, CTIME, ATIME_SET, MTIME_SET = 8, 0x10, 0x20, 0x40, 0x80, 0x100
NOTHING = (0, 0, 0, 0, 0, 0, 0, 0)  # of a setattr
UNKNOWN = 4711  # a fid that nobody has


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small tree."""
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "f").write_bytes(b"hello")
    (source / "a" / "b" / "deep").write_bytes(b"deep")
    (source / "link").symlink_to("f")
    os.mkfifo(source / "fifo")
    return source


@pytest.fixture(params=["none", "first", "second"])
def server(request: pytest.FixtureRequest, source: Path) -> Iterator[Served]:
    with served(source, model=request.param) as it:
        yield it


@pytest.fixture
def c(server: Served) -> Iterator[Client]:
    """A client, attached to ROOT."""
    with server.client() as client:
        yield client


def qid_path(client: Client, fid: int) -> int:
    path: int = client.call("Tgetattr", fid, BASIC)[1][2]
    return path


def entries(data: bytes) -> list[tuple[bytes, int, int, int]]:
    """Name, cookie, d_type and qid path of what a readdir has answered."""
    found, at = [], 0
    while at < len(data):
        _, _, path, cookie, kind, length = ENTRY.unpack_from(data, at)
        at += ENTRY.size
        found.append((data[at : at + length], cookie, kind, path))
        at += length
    return found


# version, attach, auth


@pytest.mark.parametrize(
    ("msize", "version", "answer"),
    [
        (4096, b"9P2000.L", (4096, b"9P2000.L")),
        (1 << 20, b"9P2000.L", (1 << 20, b"9P2000.L")),
        (0xFFFFFFFF, b"9P2000.L", (1 << 20, b"9P2000.L")),
        (8192, b"9P2000", (8192, b"unknown")),
        (8192, b"9P2000.u", (8192, b"unknown")),
        (8192, b"9P2000.L.x", (8192, b"unknown")),
        (8192, b"", (8192, b"unknown")),
    ],
)
def test_version(server: Served, msize: int, version: bytes, answer: tuple[int, bytes]) -> None:
    with server.client(starts=False) as c:
        assert c.call("Tversion", msize, version, tag=NOTAG) == answer
        if answer[1] == b"unknown":
            with fails(errno.EPROTO):
                c.call("Tattach", ROOT, NOFID, b"", b"", os.geteuid())
        c.start()


def test_a_version_of_too_small_messages(server: Served) -> None:
    with server.client(starts=False) as c:
        for msize in (0, 4095):
            with fails(errno.EMSGSIZE):
                c.call("Tversion", msize, b"9P2000.L", tag=NOTAG)
        c.start(4096)


def test_nothing_is_answered_before_a_version(server: Served) -> None:
    with server.client(starts=False) as c:
        with fails(errno.EPROTO):
            c.call("Tattach", ROOT, NOFID, b"", b"", os.geteuid())
        c.start()


def test_another_version_begins_anew(server: Served, c: Client) -> None:
    """All fids have gone, open ones too, and their numbers can be given again."""
    c.open(5, b"f")
    c.walk(6, b"a")
    c.start()
    assert server.session.fids.statistics().fids == 2  # the server's own, and ROOT
    # A model may answer a clunk before the descriptor is closed.
    wait_until(lambda: not server.session.fids.open_descriptors, "they are closed", LIMIT)
    for fid in (5, 6):
        with fails(errno.EBADF):
            c.call("Tgetattr", fid, BASIC)
    c.walk(5, b"a")


def test_attach(c: Client, source: Path) -> None:
    for fid, aname in ((10, b""), (11, b"/"), (12, os.fsencode(source))):
        (qid,) = c.call("Tattach", fid, NOFID, b"", aname, os.geteuid())
        assert qid[0] == 0x80
        assert qid[2] == source.stat().st_ino
    with fails(errno.EINVAL):  # taken
        c.call("Tattach", 10, NOFID, b"", b"", os.geteuid())
    for aname in (b"/etc", os.fsencode(source.parent), b"a", b"."):
        with fails(errno.ENOENT):
            c.call("Tattach", 13, NOFID, b"", aname, os.geteuid())
    with fails(errno.EBADF):
        c.call("Tgetattr", 13, BASIC)


def test_an_attach_that_fails_makes_no_fid(
    server: Served, c: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source may not answer just then: the number is free for the next try."""

    def away(fd: int) -> None:
        raise OSError(errno.EIO, "it does not answer")

    with monkeypatch.context() as patch, fails(errno.EIO):
        patch.setattr(module_of(ops.getattr), "stat_descriptor", away)
        c.call("Tattach", 5, NOFID, b"", b"", os.geteuid())
    assert server.session.fids.statistics().fids == 2  # the server's own, and ROOT
    c.call("Tattach", 5, NOFID, b"", b"", os.geteuid())


def test_nobody_authenticates_himself(c: Client) -> None:
    with fails(errno.ENOENT):  # which says that it is not needed
        c.call("Tauth", 20, b"me", b"", NONUNAME)
    with fails(errno.EPERM):
        c.call("Tattach", 21, 20, b"me", b"", NONUNAME)


# What every message has


def test_an_unknown_fid(c: Client) -> None:
    """Whichever field names it."""
    no = UNKNOWN
    for name, *values in (
        ("Tstatfs", no),
        ("Tlopen", no, 0),
        ("Tlcreate", no, b"x", 0, 0, 0),
        ("Tsymlink", no, b"x", b"y", 0),
        ("Tmknod", no, b"x", 0, 0, 0, 0),
        ("Trename", no, ROOT, b"x"),
        ("Trename", ROOT, no, b"x"),
        ("Treadlink", no),
        ("Tgetattr", no, BASIC),
        ("Tsetattr", no, *NOTHING, 0),
        ("Txattrwalk", no, 9, b""),
        ("Txattrcreate", no, b"user.x", 1, 0),
        ("Treaddir", no, 0, 100),
        ("Tfsync", no, 0),
        ("Tlock", no, 0, 0, 0, 0, 0, b""),
        ("Tgetlock", no, 0, 0, 0, 0, b""),
        ("Tlink", no, ROOT, b"x"),
        ("Tlink", ROOT, no, b"x"),
        ("Tmkdir", no, b"x", 0, 0),
        ("Trenameat", no, b"x", ROOT, b"y"),
        ("Trenameat", ROOT, b"x", no, b"y"),
        ("Tunlinkat", no, b"x", 0),
        ("Twalk", no, 9, ()),
        ("Tread", no, 0, 1),
        ("Twrite", no, 0, b"x"),
        ("Tclunk", no),
        ("Tremove", no),
    ):
        with fails(errno.EBADF):
            c.call(str(name), *values)


def test_fids_of_connections_are_apart(server: Served, c: Client) -> None:
    with server.client() as other:
        c.open(5, b"f")
        with fails(errno.EBADF):
            other.call("Tread", 5, 0, 9)
        other.open(5, b"a", b"b", b"deep")
        assert other.call("Tread", 5, 0, 9) == (b"deep",)
        assert c.call("Tread", 5, 0, 9) == (b"hello",)
        other.clunk(5)
        assert c.call("Tread", 5, 0, 9) == (b"hello",)


def test_any_numbers_are_fids_and_tags(c: Client) -> None:
    for fid in (1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE):
        c.walk(fid, b"f")
        for tag in (0, 1, 0x7FFF, 0xFFFE):
            assert c.call("Tgetattr", fid, BASIC, tag=tag)[7] == 5
    for name, *values in (  # but that which says that there is none
        ("Twalk", ROOT, NOFID, (b"f",)),
        ("Tattach", NOFID, NOFID, b"", b"", os.geteuid()),
        ("Txattrwalk", ROOT, NOFID, b""),
    ):
        with fails(errno.EINVAL):
            c.call(name, *values)


# walk


def test_walk(c: Client, source: Path) -> None:
    (qids,) = c.call("Twalk", ROOT, 5, (b"a", b"b", b"deep"))
    assert [qid[0] for qid in qids] == [0x80, 0x80, 0]
    inodes = [(source / path).stat().st_ino for path in ("a", "a/b", "a/b/deep")]
    assert [qid[2] for qid in qids] == inodes
    (qids,) = c.call("Twalk", ROOT, 6, (b"link",))
    assert qids[0][0] == 2
    assert qids[0][2] == (source / "link").lstat().st_ino


def test_a_walk_of_no_names_clones(c: Client) -> None:
    """Files, too, and open ones; the clone is not open."""
    c.open(5, b"f")
    assert c.call("Twalk", 5, 6, ()) == ((),)
    with fails(errno.EINVAL):
        c.call("Tread", 6, 0, 1)
    c.call("Tlopen", 6, RDONLY)
    assert c.call("Tread", 6, 0, 9) == (b"hello",)


def test_a_walk_that_ends_early_makes_no_fid(c: Client) -> None:
    with fails(errno.ENOENT):
        c.call("Twalk", ROOT, 5, (b"none", b"b"))
    for names, count in (((b"a", b"none"), 1), ((b"a", b"b", b"none", b"x"), 2)):
        (qids,) = c.call("Twalk", ROOT, 5, names)
        assert len(qids) == count
        with fails(errno.EBADF):
            c.call("Tgetattr", 5, BASIC)
    (qids,) = c.call("Twalk", ROOT, ROOT, (b"a", b"none"))
    assert len(qids) == 1
    c.walk(5, b"f")  # ROOT is where it was


def test_a_walk_to_the_same_fid_moves_it(c: Client) -> None:
    c.walk(5, b"a")
    c.walk(5, b"b", fid=5)
    c.walk(5, b"deep", fid=5)
    c.call("Tlopen", 5, RDONLY)
    assert c.call("Tread", 5, 0, 9) == (b"deep",)
    with fails(errno.EINVAL):  # open
        c.call("Twalk", 5, 5, ())


def test_a_walk_to_a_fid_that_is_taken(c: Client) -> None:
    c.walk(5, b"f")
    for names in ((), (b"a",)):
        with fails(errno.EINVAL):
            c.call("Twalk", ROOT, 5, names)
    c.call("Tlopen", 5, RDONLY)


def test_a_walk_of_many_names(c: Client, source: Path) -> None:
    names = [b"x"] * 16
    source.joinpath(*map(os.fsdecode, names)).mkdir(parents=True)
    c.walk(5, *names)
    with fails(errno.EINVAL):
        c.call("Twalk", ROOT, 6, (*names, b"x"))


def test_a_walk_from_what_is_no_directory(c: Client) -> None:
    for fid, name in ((5, b"f"), (6, b"link"), (7, b"fifo")):
        c.walk(fid, name)
        with fails(errno.ENOTDIR):
            c.call("Twalk", fid, 9, (b"x",))
    assert len(c.call("Twalk", ROOT, 9, (b"link", b"x"))[0]) == 1


def test_a_walk_from_an_open_directory(c: Client) -> None:
    """Linux does it (diod #70, #81)."""
    c.open(5, b"a")
    c.walk(6, b"b", fid=5)
    with fails(errno.EINVAL):
        c.call("Twalk", 5, 5, (b"b",))


def test_the_root_cannot_be_left(c: Client, source: Path) -> None:
    root = source.stat().st_ino
    (qids,) = c.call("Twalk", ROOT, 5, (b"..", b"..", b"a", b"..", b"..", b"..", b"f"))
    assert [qid[2] for qid in qids[:2]] == [root, root]
    assert [qid[2] for qid in qids[3:6]] == [root] * 3
    (source / "out").symlink_to("..")
    (source / "etc").symlink_to("/etc")
    for name in (b"out", b"etc"):
        (qids,) = c.call("Twalk", ROOT, 6, (name, b"passwd"))
        assert len(qids) == 1
    for name in (b"", b"/", b"a/b", b"../x", b"/etc/passwd"):
        with fails(errno.ENOENT):
            c.call("Twalk", ROOT, 6, (name,))


# Opening, reading, writing


def test_read_and_write(c: Client, source: Path) -> None:
    c.open(5, b"f", flags=RDWR)
    assert c.call("Twrite", 5, 3, b"LO!") == (3,)
    assert c.call("Tread", 5, 0, 100) == (b"helLO!",)
    assert c.call("Tread", 5, 4, 1) == (b"O",)
    assert c.call("Tread", 5, 6, 100) == c.call("Tread", 5, 1 << 40, 1) == (b"",)
    assert (source / "f").read_bytes() == b"helLO!"


def test_no_more_is_read_than_a_message_holds(c: Client, source: Path) -> None:
    (source / "big").write_bytes(bytes(range(256)) * 100)
    c.open(5, b"big")
    for count in (c.msize - 11, c.msize, 0xFFFFFFFF):
        (data,) = c.call("Tread", 5, 0, count)
        assert data == (source / "big").read_bytes()[: c.msize - 11]


def test_lopen_says_what_to_ask_for_at_a_time(server: Served) -> None:
    for msize, iounit in ((4096, 0), (8192, 4096), (1 << 20, (1 << 20) - 4096)):
        with server.client(msize=msize) as c:
            c.walk(5, b"f")
            qid, found = c.call("Tlopen", 5, RDONLY)
            assert found == iounit
            assert qid[2] == qid_path(c, 5)


def test_what_may_be_opened(c: Client) -> None:
    c.open(5, b"f")
    with fails(errno.EINVAL):  # open already
        c.call("Tlopen", 5, RDONLY)
    c.walk(6, b"fifo")
    with fails(errno.ENXIO):
        c.call("Tlopen", 6, RDONLY)
    c.walk(7, b"link")
    with fails(errno.ENXIO, errno.ELOOP):
        c.call("Tlopen", 7, RDONLY)
    c.walk(8, b"a")
    for flags in (WRONLY, RDWR, TRUNC):
        with fails(errno.EISDIR):
            c.call("Tlopen", 8, flags)
    c.walk(9, b"f")
    with fails(errno.EINVAL):
        c.call("Tlopen", 9, 3)
    with fails(errno.ENOTDIR):
        c.call("Tlopen", 9, 0o200000)


def test_flags_of_an_open(c: Client, source: Path) -> None:
    """They have x86's numbers on the wire. CREAT, NOCTTY, LARGEFILE and CLOEXEC say nothing."""
    c.open(5, b"f", flags=WRONLY | APPEND | CREAT | 0o400 | 0o100000 | 0o2000000)
    c.call("Twrite", 5, 0, b"!")
    assert (source / "f").read_bytes() == b"hello!"
    c.open(6, b"f", flags=WRONLY | TRUNC)
    assert (source / "f").read_bytes() == b""
    c.open(7, b"f", flags=RDWR | 0o4000000 | 0o10000)
    c.call("Twrite", 7, 0, b"sync")
    assert (source / "f").read_bytes() == b"sync"


def test_reading_and_writing_what_is_not_open_for_it(c: Client) -> None:
    c.walk(5, b"f")
    c.open(6, b"f", flags=WRONLY)
    c.open(7, b"f", flags=RDONLY)
    c.open(8, b"a")
    for name, fid, code in (
        ("Tread", 5, errno.EINVAL),
        ("Tread", 6, errno.EBADF),
        ("Tread", 8, errno.EISDIR),
        ("Twrite", 5, errno.EINVAL),
        ("Twrite", 7, errno.EBADF),
        ("Twrite", 8, errno.EISDIR),
    ):
        with fails(code):
            c.call(name, fid, 0, 1 if name == "Tread" else b"x")
    for name in ("Tread", "Twrite"):
        with fails(errno.EINVAL):
            c.call(name, 7 if name == "Tread" else 6, 1 << 63, 1 if name == "Tread" else b"x")
    for name, *values in (
        ("Tfsync", 5, 0),
        ("Treaddir", 5, 0, 100),
        ("Tlock", 5, 0, 0, 0, 0, 1, b""),
        ("Tgetlock", 5, 0, 0, 0, 1, b""),
    ):
        with fails(errno.EINVAL):
            c.call(str(name), *values)
    with fails(errno.ENOTDIR):
        c.call("Treaddir", 7, 0, 100)


def test_fsync(c: Client) -> None:
    c.open(5, b"f", flags=RDWR)
    c.open(6, b"a")
    for fid in (5, 6):
        for datasync in (0, 1):
            assert c.call("Tfsync", fid, datasync) == ()


def test_lcreate(c: Client, source: Path) -> None:
    """The directory's fid becomes the open file."""
    c.walk(5, b"a")
    qid, _ = c.call("Tlcreate", 5, b"new", RDWR, 0o640, NONUNAME)
    made = (source / "a" / "new").stat()
    assert qid[2] == made.st_ino == qid_path(c, 5)
    assert stat.S_IMODE(made.st_mode) == 0o640
    assert c.call("Twrite", 5, 0, b"new") == (3,)
    with fails(errno.EINVAL):
        c.call("Tlcreate", 5, b"other", RDWR, 0o640, NONUNAME)


def test_an_lcreate_that_fails_leaves_the_directory(c: Client, source: Path) -> None:
    c.walk(5, b"a")
    for name, flags, code in (
        (b"b", RDWR | EXCL, errno.EEXIST),
        (b"b", RDWR, errno.EISDIR),
        (b".", RDWR, errno.EEXIST),
        (b"..", RDWR, errno.EEXIST),
        (b"", RDWR, errno.EINVAL),
        (b"x/y", RDWR, errno.EINVAL),
        (b"x" * 256, RDWR, errno.ENAMETOOLONG),
    ):
        with fails(code):
            c.call("Tlcreate", 5, name, flags, 0o600, NONUNAME)
    c.call("Tlcreate", 5, b"new", RDWR, 0o600, NONUNAME)
    c.walk(6, b"f")
    with fails(errno.ENOTDIR):
        c.call("Tlcreate", 6, b"x", RDWR, 0o600, NONUNAME)
    c.open(7, b"a")
    with fails(errno.EINVAL):  # open
        c.call("Tlcreate", 7, b"x", RDWR, 0o600, NONUNAME)
    assert sorted(os.listdir(source / "a")) == ["b", "new"]


def test_lcreate_of_what_is_there_opens_it(c: Client) -> None:
    c.walk(5)
    c.call("Tlcreate", 5, b"f", RDWR, 0o600, NONUNAME)
    assert c.call("Tread", 5, 0, 9) == (b"hello",)


def test_a_file_that_was_removed_is_there_as_long_as_it_is_open(c: Client, source: Path) -> None:
    c.open(5, b"f", flags=RDWR)
    c.call("Tunlinkat", ROOT, b"f", 0)
    assert c.call("Tgetattr", 5, BASIC)[5] == 0  # links
    c.call("Tsetattr", 5, SIZE, 0, 0, 0, 2, 0, 0, 0, 0)
    c.call("Tsetattr", 5, 1, 0o600, 0, 0, 0, 0, 0, 0, 0)
    assert c.call("Tread", 5, 0, 9) == (b"he",)
    c.create(6, b"f", b"new")
    assert c.call("Tread", 5, 0, 9) == (b"he",)
    assert qid_path(c, 5) != qid_path(c, 6)
    assert (source / "f").read_bytes() == b"new"


# Attributes


def test_getattr(c: Client, source: Path) -> None:
    os.utime(source / "f", ns=(1_000_000_007, 2_000_000_009))
    for path in ("f", "a", "link", "fifo"):
        c.walk(5, os.fsencode(path))
        valid, qid, mode, uid, gid, nlink, rdev, size, blksize, blocks, *times = c.call(
            "Tgetattr", 5, BASIC
        )
        s = (source / path).lstat()
        assert valid == BASIC
        assert qid[2] == s.st_ino
        assert (mode, uid, gid, nlink) == (s.st_mode, s.st_uid, s.st_gid, s.st_nlink)
        assert (rdev, size, blksize, blocks) == (s.st_rdev, s.st_size, s.st_blksize, s.st_blocks)
        for at, moment in ((0, s.st_atime_ns), (2, s.st_mtime_ns), (4, s.st_ctime_ns)):
            assert times[at] * 10**9 + times[at + 1] == moment
        c.clunk(5)


def test_getattr_says_which_of_it_is_true(c: Client) -> None:
    """No more than was asked for, and no generation or data version: there are none."""
    for asked in (0, 1, 0x200, BASIC):
        assert c.call("Tgetattr", ROOT, asked)[0] == asked
    assert not c.call("Tgetattr", ROOT, 0x3FFF)[0] & 0x3000


def test_times_before_1970_and_after_2038(c: Client, source: Path) -> None:
    for seconds in (-5, -(1 << 30), 1 << 32):
        c.walk(5, b"f")
        times = (seconds % (1 << 64), 5) * 2
        c.call("Tsetattr", 5, ATIME | ATIME_SET | MTIME | MTIME_SET, 0, 0, 0, 0, *times)
        found = (source / "f").stat()
        assert found.st_atime_ns == found.st_mtime_ns == seconds * 10**9 + 5
        assert c.call("Tgetattr", 5, BASIC)[10:14] == times
        c.clunk(5)


def test_setattr(c: Client, source: Path) -> None:
    path = source / "f"
    c.walk(5, b"f")
    c.call("Tsetattr", 5, 1, 0o604, 0, 0, 0, 0, 0, 0, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    c.call("Tsetattr", 5, SIZE, 0, 0, 0, 2, 0, 0, 0, 0)
    assert path.read_bytes() == b"he"
    times = ATIME | ATIME_SET | MTIME | MTIME_SET
    c.call("Tsetattr", 5, times, 0, 0, 0, 0, 11, 12, 13, 14)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (11_000_000_012, 13_000_000_014)
    c.call("Tsetattr", 5, MTIME, 0, 0, 0, 0, 0, 0, 0, 0)  # now
    assert path.stat().st_mtime > 1_000_000
    assert path.stat().st_atime_ns == 11_000_000_012
    with fails(errno.EINVAL):
        c.call("Tsetattr", 5, MTIME | MTIME_SET, 0, 0, 0, 0, 0, 0, 0, 10**9)


def test_setattr_of_a_size_and_a_time(c: Client, source: Path) -> None:
    """The size comes first, since it moves the time."""
    c.walk(5, b"f")
    c.call("Tsetattr", 5, SIZE | MTIME | MTIME_SET, 0, 0, 0, 1, 0, 0, 13, 14)
    assert (source / "f").stat().st_mtime_ns == 13_000_000_014
    c.call("Tsetattr", 5, SIZE | MTIME, 0, 0, 0, 1, 0, 0, 0, 0)
    assert (source / "f").stat().st_mtime > 1_000_000


def test_setattr_of_the_change_time_alone(c: Client, source: Path) -> None:
    before = (source / "f").stat().st_ctime_ns
    c.walk(5, b"f")
    c.call("Tsetattr", 5, CTIME, 0, 0, 0, 0, 0, 0, 0, 0)
    assert (source / "f").stat().st_ctime_ns >= before
    assert (source / "f").stat().st_mtime_ns <= before


@needs_root
def test_setattr_of_the_owner(c: Client, source: Path) -> None:
    c.walk(5, b"link")
    c.call("Tsetattr", 5, 2 | 4, 0, 1234, 5678, 0, 0, 0, 0, 0)
    found = (source / "link").lstat()
    assert (found.st_uid, found.st_gid) == (1234, 5678)
    c.call("Tsetattr", 5, 2 | 4, 0, NONUNAME, 1, 0, 0, 0, 0, 0)
    found = (source / "link").lstat()
    assert (found.st_uid, found.st_gid) == (1234, 1)


def test_statfs(c: Client, source: Path) -> None:
    kind, size, blocks, _, _, files, _, _, longest = c.call("Tstatfs", ROOT)
    s = os.statvfs(source)
    assert kind == 0x01021997
    assert (size, blocks, files, longest) == (s.f_frsize, s.f_blocks, s.f_files, s.f_namemax)


def test_readlink(c: Client, source: Path) -> None:
    c.walk(5, b"link")
    assert c.call("Treadlink", 5) == (b"f",)
    with fails(errno.EINVAL):
        c.call("Treadlink", ROOT)
    (source / "long").symlink_to("x" * 4095)
    c.walk(6, b"long")
    assert c.call("Treadlink", 6) == (b"x" * 4095,)


def test_an_answer_that_no_message_holds(server: Served, source: Path) -> None:
    (source / "long").symlink_to("x" * 4090)
    with server.client(msize=4096) as c:
        c.walk(5, b"long")
        with fails(errno.EMSGSIZE):
            c.call("Treadlink", 5)
        c.call("Tgetattr", 5, BASIC)


# Directories


def test_readdir(c: Client, source: Path) -> None:
    c.open(5)
    (data,) = c.call("Treaddir", 5, 0, 4000)
    found = entries(data)
    assert {name for name, *_ in found} == {b".", b"..", b"a", b"f", b"link", b"fifo"}
    for name, _, kind, path in found:
        s = (source / os.fsdecode(name)).lstat() if name != b".." else source.stat()
        assert (kind, path) == (stat.S_IFMT(s.st_mode) >> 12, s.st_ino)
    assert c.call("Treaddir", 5, found[-1][1], 4000) == (b"",)
    assert c.call("Treaddir", 5, 0, 4000) == (data,)  # once more from the start


def test_readdir_in_pieces(c: Client, source: Path) -> None:
    """What has no room is not lost; any cookie may be gone back to."""
    names = {f"file-{number:03}" for number in range(300)}
    for name in names:
        (source / "a" / name).touch()
    c.open(5, b"a")
    found, cookie = [], 0
    while piece := entries(c.call("Treaddir", 5, cookie, 200)[0]):
        found += piece
        cookie = piece[-1][1]
    assert sorted(name for name, *_ in found) == sorted(map(str.encode, names | {".", "..", "b"}))
    middle = found[100]
    assert entries(c.call("Treaddir", 5, middle[1], 8000)[0])[0] == found[101]
    with fails(errno.EINVAL):  # not even one fits
        c.call("Treaddir", 5, 0, 24)
    (data,) = c.call("Treaddir", 5, 0, 0xFFFFFFFF)
    assert len(data) <= c.msize - 11


# Names


def test_making_things(c: Client, source: Path) -> None:
    """No fid is made by it."""
    (qid,) = c.call("Tmkdir", ROOT, b"dir", 0o750, NONUNAME)
    s = (source / "dir").stat()
    assert (qid[0], qid[2], stat.S_IMODE(s.st_mode)) == (0x80, s.st_ino, 0o750)
    (qid,) = c.call("Tsymlink", ROOT, b"sym", b"to/where", NONUNAME)
    assert qid[0] == 2
    assert os.readlink(source / "sym") == "to/where"
    (qid,) = c.call("Tmknod", ROOT, b"pipe", stat.S_IFIFO | 0o600, 0, 0, NONUNAME)
    assert stat.S_ISFIFO((source / "pipe").stat().st_mode)
    c.walk(5, b"f")
    assert c.call("Tlink", ROOT, 5, b"again") == ()
    assert (source / "again").stat().st_ino == (source / "f").stat().st_ino


def test_making_what_cannot_be(c: Client) -> None:
    c.walk(5, b"f")
    c.walk(6, b"a")
    for name, code in (
        (b"a", errno.EEXIST),
        (b".", errno.EEXIST),
        (b"..", errno.EEXIST),
        (b"", errno.EINVAL),
        (b"x/y", errno.EINVAL),
        (b"x" * 256, errno.ENAMETOOLONG),
    ):
        for message, *values in (
            ("Tmkdir", ROOT, name, 0o700, NONUNAME),
            ("Tsymlink", ROOT, name, b"x", NONUNAME),
            ("Tmknod", ROOT, name, stat.S_IFIFO | 0o600, 0, 0, NONUNAME),
            ("Tlink", ROOT, 5, name),
        ):
            with fails(code):
                c.call(str(message), *values)
    with fails(errno.ENOTDIR):
        c.call("Tmkdir", 5, b"x", 0o700, NONUNAME)
    with fails(errno.EPERM):
        c.call("Tlink", ROOT, 6, b"x")
    for numbers in ((0xFFFFFFFF, 0), (0, 0xFFFFFFFF), (1 << 12, 0), (0, 1 << 20)):
        with fails(errno.EINVAL):
            c.call("Tmknod", ROOT, b"x", stat.S_IFCHR | 0o600, *numbers, NONUNAME)


def test_unlinkat(c: Client, source: Path) -> None:
    c.open(5, b"a")  # an open one, as rm -r has it (lib9p, PR 18)
    for fid, name, flags, code in (
        (ROOT, b"a", 0, errno.EISDIR),
        (ROOT, b"a", 0x200, errno.ENOTEMPTY),
        (ROOT, b"f", 0x200, errno.ENOTDIR),
        (ROOT, b"f", 1, errno.EINVAL),
        (ROOT, b".", 0x200, errno.EINVAL),
        (ROOT, b"..", 0x200, errno.ENOTEMPTY),
        (ROOT, b"none", 0, errno.ENOENT),
        (ROOT, b"", 0, errno.EINVAL),
        (ROOT, b"a/b", 0x200, errno.EINVAL),
    ):
        with fails(code):
            c.call("Tunlinkat", fid, name, flags)
    c.walk(6, b"a", b"b", b"deep")
    c.walk(7, b"a", b"b")
    c.call("Tunlinkat", 7, b"deep", 0)
    c.call("Tunlinkat", 5, b"b", 0x200)
    assert os.listdir(source / "a") == []
    assert c.call("Tgetattr", 6, BASIC)[5] == 0


def test_remove_ends_its_fid_whatever_becomes_of_it(c: Client, source: Path) -> None:
    c.walk(5, b"f")
    c.call("Tremove", 5)
    assert not (source / "f").exists()
    c.walk(6, b"a")
    with fails(errno.ENOTEMPTY):
        c.call("Tremove", 6)
    for fid in (5, 6):
        with fails(errno.EBADF):
            c.call("Tclunk", fid)
    c.walk(7)
    with fails(errno.EBUSY):
        c.call("Tremove", 7)


def test_rename(c: Client, source: Path) -> None:
    """The fid goes on naming the file."""
    c.walk(5, b"f")
    c.walk(6, b"a")
    c.call("Trename", 5, 6, b"moved")
    assert (source / "a" / "moved").read_bytes() == b"hello"
    c.call("Trename", 5, ROOT, b"back")
    c.call("Tremove", 5)
    assert not (source / "back").exists()


def test_rename_in_the_same_directory(c: Client, source: Path) -> None:
    """No directory named: the one that it is in (QEMU's server takes that)."""
    c.walk(5, b"a", b"b", b"deep")
    c.call("Trename", 5, NOFID, b"deeper")
    assert os.listdir(source / "a" / "b") == ["deeper"]
    with fails(errno.EBUSY):
        c.call("Trename", ROOT, NOFID, b"x")


def test_renameat(c: Client, source: Path) -> None:
    c.walk(5, b"a")
    c.walk(6, b"a", b"b", b"deep")
    c.call("Trenameat", ROOT, b"f", 5, b"g")
    assert (source / "a" / "g").read_bytes() == b"hello"
    c.call("Trenameat", 5, b"g", 5, b"g")
    for old, oldname, new, newname, code in (
        (ROOT, b"none", ROOT, b"x", errno.ENOENT),
        (ROOT, b".", ROOT, b"x", errno.EINVAL),
        (ROOT, b"a", ROOT, b"..", errno.EINVAL),
        (ROOT, b"a", ROOT, b"", errno.EINVAL),
        (ROOT, b"a", 5, b"x", errno.EINVAL),  # into itself
        (ROOT, b"link", 5, b"b", errno.EISDIR),
    ):
        with fails(code):
            c.call("Trenameat", old, oldname, new, newname)


def test_fids_follow_what_others_rename(server: Served, c: Client, source: Path) -> None:
    """Those at what is moved and below it, of every connection, by name and by number."""
    with server.client() as other:
        other.walk(5, b"a", b"b", b"deep")
        other.walk(6, b"a", b"b")
        other.walk(7, b"a")
        other.clunk(6)
        c.call("Trenameat", ROOT, b"a", ROOT, b"z")
        c.walk(8, b"z")
        c.call("Tmkdir", ROOT, b"a", 0o700, NONUNAME)  # another one at the old place
        c.call("Trenameat", 8, b"b", ROOT, b"y")
        other.walk(9, b"..", fid=7)
        assert qid_path(other, 9) == source.stat().st_ino
        other.call("Trename", 5, NOFID, b"deeper")
        assert os.listdir(source / "y") == ["deeper"]
        other.call("Tremove", 5)
        assert os.listdir(source / "y") == []
        other.call("Tremove", 7)
        assert not (source / "z").exists()
        assert (source / "a").exists()


def test_fids_follow_what_is_found_at_another_place(
    server: Served, c: Client, source: Path
) -> None:
    """Moved in the source, by nobody's message; and found there by another client."""
    c.walk(5, b"f")
    (source / "f").rename(source / "a" / "moved")
    with fails(errno.ENOENT):
        c.call("Trename", 5, ROOT, b"x")
    with server.client() as other:
        other.walk(5, b"a", b"moved")
    c.call("Trename", 5, NOFID, b"again")
    assert (source / "a" / "again").read_bytes() == b"hello"


def test_remove_takes_no_other_file_of_that_name(c: Client, source: Path) -> None:
    """Nor does rename: what was made in between is somebody else's."""
    for message, *values in (("Tremove", 5), ("Trename", 5, ROOT, b"x")):
        c.walk(5, b"f")
        (source / "f").rename(source / "hidden")
        (source / "f").write_bytes(b"another")
        with fails(errno.ESTALE):
            c.call(str(message), *values)
        assert (source / "f").read_bytes() == b"another"
        (source / "hidden").rename(source / "f")
        if message == "Trename":
            c.clunk(5)


@pytest.mark.parametrize("how", ["walked", "cloned", "moved", "renamed"])
def test_a_fid_stands_for_the_name_that_it_has_come_by(
    server: Served, c: Client, source: Path, how: str
) -> None:
    """It is that which Tremove and Trename take, where a file has several, whoever came after."""
    os.link(source / "f", source / "a" / "one")
    os.link(source / "f", source / "a" / "other")
    for message, *values in (("Tremove", 5), ("Trename", 5, ROOT, b"x")):
        c.walk(5, b"a", b"one")
        name = "one"
        if how == "cloned":
            c.walk(6, fid=5)
            c.clunk(5)
            c.walk(5, fid=6)
            c.clunk(6)
        elif how == "moved":
            c.clunk(5)
            c.walk(5, b"a")
            c.walk(5, b"one", fid=5)
        with server.client() as someone:
            someone.walk(1, b"f")
            someone.walk(2, b"a", b"other")
            if how == "renamed":
                c.call("Trename", 5, ROOT, b"two")
                assert sorted(os.listdir(source / "a")) == ["b", "other"]
                someone.walk(3, b"f")
                someone.walk(4, b"a", b"other")
                name = "two"
        c.call(str(message), *values)
        assert not (source / "a" / name).exists()
        assert not (source / name).exists()
        assert (source / "f").exists()
        assert (source / "a" / "other").exists()
        if message == "Tremove":
            os.link(source / "f", source / "a" / "one")
        else:
            assert (source / "x").exists()
            c.clunk(5)


def test_a_name_that_has_gone_is_not_taken_for_another_of_the_file(
    server: Served, c: Client, source: Path
) -> None:
    os.link(source / "f", source / "one")
    c.walk(5, b"one")
    c.walk(6, b"f")
    (source / "one").unlink()
    with fails(errno.ENOENT):
        c.call("Trename", 5, ROOT, b"x")
    with fails(errno.ENOENT):
        c.call("Tremove", 5)
    assert (source / "f").exists()


# Extended attributes


def test_attributes(c: Client, source: Path) -> None:
    need_attributes(source)
    os.setxattr(source / "f", "user.one", b"1")
    c.walk(5, b"f")
    assert c.call("Txattrwalk", 5, 6, b"user.one") == (1,)
    os.setxattr(source / "f", "user.one", b"22")
    assert c.call("Tread", 6, 0, 9) == (b"1",)  # as it was then
    assert c.call("Tread", 6, 1, 9) == (b"",)
    (size,) = c.call("Txattrwalk", 5, 7, b"")
    (names,) = c.call("Tread", 7, 0, 1000)
    assert len(names) == size
    assert b"user.one" in names.split(b"\0")
    with fails(errno.ENODATA):
        c.call("Txattrwalk", 5, 8, b"user.none")
    with fails(errno.EINVAL):  # taken
        c.call("Txattrwalk", 5, 7, b"user.one")
    with fails(errno.EBADF):
        c.call("Tclunk", 8)
    with fails(errno.EINVAL):
        c.call("Tlopen", 6, RDONLY)


def test_setting_an_attribute(c: Client, source: Path) -> None:
    """It is set by the clunk."""
    need_attributes(source)
    c.walk(5, b"f")
    c.call("Txattrcreate", 5, b"user.new", 5, 0)
    assert c.call("Twrite", 5, 0, b"12") == (2,)
    assert c.call("Twrite", 5, 2, b"345") == (3,)
    with fails(errno.ENOSPC):
        c.call("Twrite", 5, 5, b"6")
    assert "user.new" not in os.listxattr(source / "f")
    c.clunk(5)
    assert os.getxattr(source / "f", "user.new") == b"12345"
    c.walk(5, b"f")
    c.call("Txattrcreate", 5, b"user.new", 0, 0)
    c.clunk(5)
    assert "user.new" not in os.listxattr(source / "f")
    c.walk(5, b"f")
    c.call("Txattrcreate", 5, b"user.empty", 0, os.XATTR_CREATE)
    c.clunk(5)
    assert os.getxattr(source / "f", "user.empty") == b""


def test_an_attribute_that_is_not_set(server: Served, c: Client, source: Path) -> None:
    need_attributes(source)
    os.setxattr(source / "f", "user.old", b"1")
    c.walk(5, b"f")
    for size, flags, code in ((65537, 0, errno.E2BIG), (1, 4, errno.EINVAL)):
        with fails(code):
            c.call("Txattrcreate", 5, b"user.x", size, flags)
    c.call("Txattrcreate", 5, b"user.x", 5, 0)
    with fails(errno.EINVAL):
        c.call("Txattrcreate", 5, b"user.x", 5, 0)
    c.call("Twrite", 5, 0, b"123")
    with fails(errno.EINVAL):  # incomplete: the fid is gone all the same
        c.clunk(5)
    with fails(errno.EBADF):
        c.clunk(5)
    for name, flags, code in (
        (b"user.old", os.XATTR_CREATE, errno.EEXIST),
        (b"user.none", os.XATTR_REPLACE, errno.ENODATA),
    ):
        c.walk(5, b"f")
        c.call("Txattrcreate", 5, name, 1, flags)
        c.call("Twrite", 5, 0, b"2")
        with fails(code):
            c.clunk(5)
    c.open(6, b"f")
    with fails(errno.EINVAL):  # open
        c.call("Txattrcreate", 6, b"user.x", 1, 0)
    # Nor by a connection that ends before the clunk.
    c.walk(7, b"f")
    c.call("Txattrcreate", 7, b"user.old", 0, 0)
    c.socket.close()
    wait_until(server.is_idle, "the connection is gone", LIMIT)
    assert os.listxattr(source / "f") == ["user.old"]


# Locks


def lock(client: Client, fid: int, kind: int, start: int = 0, length: int = 0, pid: int = 1) -> int:
    status: int = client.call("Tlock", fid, kind, 0, start, length, pid, b"client")[0]
    return status


def test_locks(server: Served, c: Client, source: Path) -> None:
    """They exclude other clients, other processes of the same client, and who is on the source."""
    with server.client() as other, (source / "f").open("r+b") as there:
        c.open(5, b"f", flags=RDWR)
        other.open(5, b"f", flags=RDWR)
        assert lock(c, 5, 1, 0, 10) == 0
        assert lock(c, 5, 1, 5, 10) == 0  # its own
        assert lock(c, 5, 1, 0, 10, pid=2) == 1
        assert lock(other, 5, 0, 0, 10) == 1
        assert lock(other, 5, 1, 15, 10) == 0
        with fails(errno.EAGAIN, errno.EACCES):
            fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        assert other.call("Tgetlock", 5, 1, 0, 10, 1, b"client") == (1, 0, 15, 1, b"")
        assert other.call("Tgetlock", 5, 1, 40, 1, 7, b"client") == (2, 40, 1, 7, b"client")
        assert lock(c, 5, 2, 0, 5) == 0
        assert lock(other, 5, 1, 0, 5) == 0
        assert lock(other, 5, 1, 5, 1) == 1
        for kind, flags in ((3, 0), (0, 4)):
            with fails(errno.EINVAL):
                c.call("Tlock", 5, kind, flags, 0, 0, 1, b"client")
        with fails(errno.EINVAL):
            lock(c, 5, 1, 1 << 63)
        c.clunk(5)
        assert lock(other, 5, 1, 0, 0) == 0


def test_names_of_who_locks_may_be_long(server: Served, c: Client) -> None:
    """All of such a name counts, and little of it is kept."""
    c.open(5, b"f", flags=2)
    names = [bytes([byte]).rjust(8000, b"x") for byte in b"ab"]
    assert c.call("Tlock", 5, 1, 0, 0, 0, 1, names[0]) == (0,)
    assert c.call("Tlock", 5, 1, 0, 0, 0, 1, names[1]) == (1,)
    assert c.call("Tlock", 5, 0, 0, 0, 0, 1, names[0]) == (0,)
    assert c.call("Tlock", 5, 0, 0, 0, 0, 1, names[1]) == (0,)
    (file,) = server.session.file_locks._files.values()
    assert [len(owner[1]) for owner in list[Any](file.holders)] == [64, 64]


def test_locks_of_a_file_that_has_many(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel goes through all of them for each: it is no matter of the dispatcher's then."""
    monkeypatch.setattr("ninefuse.tree.filelocks._MANY", 10)
    try_, on_workers = module_of(ops.lock)._try, list[bool]()

    def noted(*args: Any) -> Any:
        on_workers.append(threading.current_thread().name.startswith("worker"))
        return try_(*args)

    monkeypatch.setattr(module_of(ops.lock), "_try", noted)
    with served(source) as server, server.client() as c:
        assert isinstance(server.driver, SecondModel)
        server.driver.is_near = is_on_own_device
        c.open(5, b"f", flags=2)
        for at in range(0, 28, 2):
            assert c.call("Tlock", 5, 1, 0, at, 1, 1, b"c") == (0,)
        # The first is made where its descriptor is opened.
        assert on_workers[1:] == [False] * 10 + [True] * 3
        assert c.call("Tlock", 5, 2, 0, 0, 0, 1, b"c") == (0,)
        for at in (0, 2):
            assert c.call("Tlock", 5, 1, 0, at, 1, 1, b"c") == (0,)
        assert on_workers[-1] is False
        (file,) = server.session.file_locks._files.values()
        assert file.parts == 2


def test_a_lock_is_for_what_the_fid_is_open_for(c: Client) -> None:
    c.open(5, b"f", flags=RDONLY)
    assert lock(c, 5, 0) == 0
    with fails(errno.EBADF):
        lock(c, 5, 1)


def test_locks_end_with_the_connection(server: Served, source: Path) -> None:
    with (source / "f").open("r+b") as there:
        with server.client() as c:
            c.open(5, b"f", flags=RDWR)
            assert lock(c, 5, 1) == 0
        wait_until(server.is_idle, "the connection is gone", LIMIT)
        fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Read-only


def test_a_read_only_export(source: Path) -> None:
    with served(source, read_only=True) as server, server.client() as c:
        c.walk(5, b"f")
        for name, *values in (
            ("Tlopen", 5, WRONLY),
            ("Tlopen", 5, TRUNC),
            ("Tlcreate", ROOT, b"x", RDWR, 0o600, NONUNAME),
            ("Tmkdir", ROOT, b"x", 0o700, NONUNAME),
            ("Tsymlink", ROOT, b"x", b"y", NONUNAME),
            ("Tmknod", ROOT, b"x", stat.S_IFIFO, 0, 0, NONUNAME),
            ("Tlink", ROOT, 5, b"x"),
            ("Trename", 5, ROOT, b"x"),
            ("Trenameat", ROOT, b"f", ROOT, b"x"),
            ("Tunlinkat", ROOT, b"f", 0),
            ("Tsetattr", 5, 1, *NOTHING),
            ("Txattrcreate", 5, b"user.x", 1, 0),
            ("Tremove", 5),
        ):
            with fails(errno.EROFS):
                c.call(str(name), *values)
        c.open(6, b"f")
        assert c.call("Tread", 6, 0, 9) == (b"hello",)
