"""lopen, lcreate, read, write, fsync, lock and getlock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

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
from ninefuse.fuse import callbacks
from ninefuse.linux import filesystems
from ninefuse.ops import LockRange, LockStatus
from ninefuse.tree.qids import QTDIR, QTFILE

pytestmark = pytest.mark.usefixtures("leak_free")

OFF_MAX = (1 << 63) - 1


@pytest.fixture
def file(client: Client) -> Path:
    """A file ``file`` of ten bytes, in the client's source."""
    path = client.source / "file"
    path.write_bytes(b"0123456789")
    return path


def kernel_flags(client: Client, fid: int) -> int:
    """The flags that a fid's descriptor is open with."""
    return fcntl.fcntl(client.descriptor(fid), fcntl.F_GETFL)


# lopen


def test_lopen_opens_files_and_directories(client: Client, file: Path) -> None:
    """The answer is the file's qid; an open fid can be read."""
    fid, directory = client.walk("file"), client.walk()
    qid = client.do(ops.lopen, fid, os.O_RDONLY)
    assert (qid.type, qid) == (QTFILE, client.session.fids.qid_of(client.do(ops.getattr, fid)))
    assert client.do(ops.read, fid, 0, 100) == b"0123456789"
    assert client.do(ops.lopen, directory, os.O_RDONLY).type == QTDIR
    assert len(client.do(ops.readdir, directory, 0, 4096)) == 3


def test_lopen_of_an_open_fid_is_refused(client: Client, file: Path) -> None:
    """EINVAL, whatever it is open as; it stays open as it was."""
    fid, directory, created = client.open("file"), client.open(), client.create("new")
    for number in (fid, directory, created):
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with fails(errno.EINVAL):
                client.do(ops.lopen, number, flags)
    assert client.do(ops.read, fid, 0, 100) == b"0123456789"
    with fails(errno.EBADF):
        client.do(ops.write, fid, 0, b"x")


def test_lopen_of_an_attribute_is_refused(client: Client, file: Path) -> None:
    """A fid that xattrcreate or xattrwalk made is open already."""
    writing, listing = client.walk("file"), client.new()
    client.do(ops.xattrcreate, writing, b"user.x", 1)
    client.do(ops.xattrwalk, ROOT, listing)
    for fid in (writing, listing):
        with fails(errno.EINVAL):
            client.do(ops.lopen, fid, os.O_RDONLY)


def test_lopen_drops_flags_that_make_no_sense_here(client: Client, file: Path) -> None:
    """It creates nothing, follows /proc, and needs no alignment."""
    creating = os.O_CREAT | os.O_EXCL
    dropped = creating | os.O_NOFOLLOW | os.O_NOCTTY | os.O_DIRECT | os.O_ASYNC
    fid = client.walk("file")
    client.do(ops.lopen, fid, os.O_RDWR | os.O_APPEND | dropped)
    got = kernel_flags(client, fid)
    assert got & os.O_ACCMODE == os.O_RDWR
    assert got & os.O_APPEND
    assert not got & (os.O_DIRECT | os.O_ASYNC)
    assert not os.get_inheritable(client.descriptor(fid))
    assert client.do(ops.read, fid, 1, 3) == b"123", "an offset and a size that are not aligned"


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC])
def test_a_file_opened_for_synchronous_writes_makes_them(
    client: Client, file: Path, flags: int
) -> None:
    """What such a write acknowledges is durable: the source is told; for new files as well."""
    made = client.walk()
    client.do(ops.lcreate, made, b"new", os.O_WRONLY | flags, 0o600)
    for fid in (client.open("file", flags=os.O_WRONLY | flags), made):
        assert kernel_flags(client, fid) & (os.O_SYNC | os.O_DSYNC) == flags
    assert not kernel_flags(client, client.open("file")) & (os.O_SYNC | os.O_DSYNC)


def test_lopen_never_gives_a_path_descriptor(client: Client, file: Path) -> None:
    """O_PATH and O_TMPFILE of the client are not the server's."""
    fid = client.walk("file")
    client.do(ops.lopen, fid, os.O_PATH)
    assert client.do(ops.read, fid, 0, 2) == b"01"
    with fails(errno.EISDIR):
        client.do(ops.lopen, client.walk(), os.O_RDWR | os.O_TMPFILE)


def test_each_open_has_a_descriptor_of_its_own(client: Client, file: Path) -> None:
    """With its own mode and flags: one appends, one only reads."""
    appending = client.open("file", flags=os.O_WRONLY | os.O_APPEND)
    reading = client.open("file", flags=os.O_RDONLY)
    client.do(ops.write, appending, 0, b"x")
    assert client.do(ops.read, reading, 9, 10) == b"9x"
    with fails(errno.EBADF):
        client.do(ops.read, appending, 0, 1)
    with fails(errno.EBADF):
        client.do(ops.write, reading, 0, b"y")


@pytest.mark.parametrize("mode", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY])
def test_lopen_truncates_where_it_is_asked_to(client: Client, file: Path, mode: int) -> None:
    """O_TRUNC is honoured, and the qid is of the file afterwards."""
    fid = client.walk("file")
    before = client.session.fids.qid_of(client.do(ops.getattr, fid))
    qid = client.do(ops.lopen, fid, mode | os.O_TRUNC)
    assert file.stat().st_size == 0
    assert qid == client.session.fids.qid_of(client.do(ops.getattr, fid))
    assert qid.path == before.path
    assert qid.version != before.version


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_ACCMODE, os.O_TRUNC])
def test_a_directory_is_not_opened_for_writing(client: Client, flags: int) -> None:
    """EISDIR, as open(2) says; the fid stays unopened."""
    fid = client.walk()
    with fails(errno.EISDIR):
        client.do(ops.lopen, fid, flags)
    client.do(ops.lopen, fid, os.O_RDONLY)


def test_a_file_is_not_opened_as_a_directory(client: Client, file: Path) -> None:
    """ENOTDIR with O_DIRECTORY."""
    fid = client.walk("file")
    with fails(errno.ENOTDIR):
        client.do(ops.lopen, fid, os.O_RDONLY | os.O_DIRECTORY)
    client.do(ops.lopen, fid, os.O_RDONLY)


@pytest.mark.parametrize("kind", ["fifo", "symlink", "dangling", "socket", "device"])
def test_special_files_are_not_opened(client: Client, file: Path, kind: str) -> None:
    """ENXIO at once: no FIFO is waited for, no device or socket of the server reached."""
    path = client.source / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":
        path.symlink_to("file")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        need_devices(client.source)
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    fid = client.walk(kind)
    before = time.monotonic()
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC | os.O_NONBLOCK):
        with fails(errno.ENXIO):
            client.do(ops.lopen, fid, flags)
    assert time.monotonic() - before < 5
    assert client.fid(fid).opened is None
    assert file.read_bytes() == b"0123456789"


def test_lopen_opens_the_file_that_was_found(client: Client, file: Path) -> None:
    """A FIFO or another file under its name by now does not matter, nor that it has none."""
    fid = client.walk("file")
    other = client.walk(start=fid)
    file.rename(client.source / "elsewhere")
    os.mkfifo(file)
    client.do(ops.lopen, fid, os.O_RDWR)
    (client.source / "elsewhere").unlink()
    client.do(ops.lopen, other, os.O_RDWR)
    assert client.do(ops.read, other, 0, 4) == b"0123"


def test_lopen_on_a_read_only_session(source: Path) -> None:
    """EROFS for each flag that changes something; reading is fine."""
    (source / "file").write_bytes(b"data")
    with client_of(source, read_only=True) as client:
        fid = client.walk("file")
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_ACCMODE, os.O_RDONLY | os.O_TRUNC):
            with fails(errno.EROFS):
                client.do(ops.lopen, fid, flags)
        client.do(ops.lopen, fid, os.O_RDONLY | os.O_APPEND)
        assert client.do(ops.read, fid, 0, 9) == b"data"
        assert client.do(ops.readdir, client.open(), 0, 4096)


@pytest.mark.parametrize("name", ["file", "."])
def test_of_two_lopens_at_once_one_wins(client: Client, file: Path, name: str) -> None:
    """Both have opened the file when they come to note it: EINVAL, and one descriptor."""
    fid = client.walk(name)
    call = "_open_directory" if name == "." else "_open_file"
    first = Stepper(ops.lopen(client.session, fid, os.O_RDONLY))
    second = Stepper(ops.lopen(client.session, fid, os.O_RDONLY))
    first.after(call)
    second.after(call)
    second.finish()
    opened = client.fid(fid).opened
    with fails(errno.EINVAL):
        first.finish()
    assert client.fid(fid).opened is opened
    client.do(ops.fsync, fid)


def test_lopen_of_a_fid_clunked_meanwhile_leaves_nothing_open(client: Client, file: Path) -> None:
    """The clunk came while the file was being opened (leak_free counts descriptors)."""
    fid = client.walk("file")
    opening = Stepper(ops.lopen(client.session, fid, os.O_RDONLY))
    opening.after("_open_file")
    client.do(ops.clunk, fid)
    opening.finish()
    assert not client.has(fid)


def test_lopen_that_fails_leaves_the_fid_unopened(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its calls it is that fails."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    fid = client.walk("file")
    with monkeypatch.context() as patch:
        patch.setattr(module_of(ops.lopen), "stat_descriptor", broken)
        with fails(errno.EIO):
            client.do(ops.lopen, fid, os.O_RDONLY)
    client.do(ops.lopen, fid, os.O_RDONLY)
    assert client.do(ops.read, fid, 0, 2) == b"01"


def test_lopen_without_atime_where_that_is_not_allowed(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O_NOATIME is for owners; for others the file is opened without it."""
    real = os.open
    tried: list[int] = []

    def not_the_owner(path: str, flags: int, *args: int, **more: int) -> int:
        tried.append(flags & os.O_NOATIME)
        if flags & os.O_NOATIME:
            raise PermissionError(errno.EPERM, "not the owner")
        return real(path, flags, *args, **more)

    fid, other = client.walk("file"), client.walk("file")
    monkeypatch.setattr(os, "open", not_the_owner)
    client.do(ops.lopen, fid, os.O_RDONLY | os.O_NOATIME)
    monkeypatch.undo()
    assert tried == [os.O_NOATIME, 0]
    client.do(ops.lopen, other, os.O_RDONLY | os.O_NOATIME)
    assert kernel_flags(client, other) & os.O_NOATIME


# lcreate


def test_lcreate_turns_the_directory_into_the_file(client: Client) -> None:
    """The same fid is the new file from then on, open, and remembers where it is."""
    (client.source / "d").mkdir()
    fid, stays = client.walk("d"), client.walk("d")
    qid = client.do(ops.lcreate, fid, b"new", os.O_RDWR | os.O_EXCL, 0o640)
    assert qid == client.session.fids.qid_of(client.do(ops.getattr, fid))
    assert qid.type == QTFILE
    assert client.do(ops.write, fid, 0, b"data") == 4
    assert client.do(ops.read, fid, 0, 9) == b"data"
    assert (client.source / "d" / "new").read_bytes() == b"data"
    with fails(errno.ENOTDIR):
        client.do(ops.walk, fid, client.new(), [b"x"])
    assert client.place(fid) == (client.do(ops.getattr, stays).ino, b"new")
    client.do(ops.remove, fid)
    assert os.listdir(client.source / "d") == []
    assert stat.S_ISDIR(client.do(ops.getattr, stays).mode)


@pytest.mark.parametrize("kind", ["file", "directory", "dangling", "fifo"])
def test_lcreate_of_a_name_that_is_taken(client: Client, kind: str) -> None:
    """EEXIST for who asked for a new file; the kernel, which looked, hears ESTALE if it did not.

    Nothing is touched.
    """
    path = client.source / "name"
    if kind == "file":
        path.write_bytes(b"kept")
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        os.mkfifo(path)
    before = path.lstat()
    fid = client.walk()
    with fails(errno.EEXIST):
        client.do(ops.lcreate, fid, b"name", os.O_RDWR | os.O_EXCL | os.O_TRUNC, 0o600)
    with fails(errno.ESTALE):
        client.do(callbacks.create, ROOT, b"name", os.O_RDWR | os.O_TRUNC, 0o600, None)
    if kind != "file":
        with fails(errno.EISDIR if kind == "directory" else errno.ENXIO):
            client.do(ops.lcreate, fid, b"name", os.O_RDWR | os.O_TRUNC, 0o600)
    after = path.lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns, after.st_mode) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
        before.st_mode,
    )
    assert os.listdir(client.source) == ["name"]
    # The fid is still the unopened directory.
    client.do(ops.lcreate, fid, b"other", os.O_RDWR | os.O_EXCL, 0o600)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC])
def test_lcreate_of_a_file_that_is_there_opens_it(client: Client, flags: int) -> None:
    """As open(2) with O_CREAT does it, and as other servers answer a client that did not look."""
    (client.source / "name").write_bytes(b"data")
    known = client.know("name")
    fid = client.walk()
    qid = client.do(ops.lcreate, fid, b"name", flags, 0o600)
    assert qid.path == known.number
    assert client.node(fid) is known.node
    assert client.do(ops.read, fid, 0, 9) == (b"" if flags & os.O_TRUNC else b"data")
    if flags & os.O_ACCMODE:
        assert client.do(ops.write, fid, 0, b"more") == 4
    assert client.place(fid) == (client.do(ops.getattr, ROOT).ino, b"name")


def test_lcreate_of_a_file_that_comes_and_goes(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when it is to be made, and gone when it is to be opened; then it is made."""
    module = module_of(ops.lcreate)
    real = module._create_file
    tries = []

    def taken_once(*args: int) -> int:
        tries.append(args)
        if len(tries) == 1:
            raise FileExistsError(errno.EEXIST, "there it is")
        fd: int = real(*args)
        return fd

    monkeypatch.setattr(module, "_create_file", taken_once)
    fid = client.walk()
    client.do(ops.lcreate, fid, b"name", os.O_RDWR, 0o600)
    assert len(tries) == 2
    assert client.do(ops.write, fid, 0, b"x") == 1


def test_lcreate_that_fails_leaves_the_directory(source: Path) -> None:
    """Whichever of its calls it is that fails, the last one too."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    with client_of(source, sync_directories=True) as client:
        fid = client.walk()
        node = client.node(fid)
        for number, (module, call) in enumerate(
            [
                (module_of(ops.lcreate), "_create_file"),
                (module_of(ops.lcreate), "_path_descriptor"),
                (module_of(type(client.session)), "_sync_directory"),
            ]
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, call, lambda *args: broken(0))
                with fails(errno.EIO):
                    client.do(ops.lcreate, fid, b"%d" % number, os.O_RDWR, 0o600)
            assert client.node(fid) is node
            assert client.fid(fid).opened is None
            client.check_idle()
        client.do(ops.lcreate, fid, b"new", os.O_RDWR, 0o600)


def test_lcreate_in_what_is_no_unopened_directory(client: Client, file: Path) -> None:
    """EINVAL for an open fid, directory or file; ENOTDIR for a file."""
    for fid in (client.open(), client.open("file"), client.create("made")):
        with fails(errno.EINVAL):
            client.do(ops.lcreate, fid, b"new", os.O_RDWR, 0o600)
    with fails(errno.ENOTDIR):
        client.do(ops.lcreate, client.walk("file"), b"new", os.O_RDWR, 0o600)
    assert not (client.source / "new").exists()


def test_lcreate_in_a_directory_that_was_removed(client: Client) -> None:
    """ENOENT: nothing can be made there any more."""
    (client.source / "d").mkdir()
    fid = client.walk("d")
    (client.source / "d").rmdir()
    with fails(errno.ENOENT):
        client.do(ops.lcreate, fid, b"new", os.O_RDWR, 0o600)


@pytest.mark.parametrize("name", ILLEGAL_NAMES)
def test_lcreate_refuses_what_is_not_a_name(client: Client, name: bytes) -> None:
    """EINVAL; EEXIST for the two names that every directory has; ENAMETOOLONG."""
    fid = client.walk()
    with fails(errno.EINVAL):
        client.do(ops.lcreate, fid, name, os.O_RDWR, 0o600)
    for taken in (b".", b".."):
        with fails(errno.EEXIST):
            client.do(ops.lcreate, fid, taken, os.O_RDWR, 0o600)
    with fails(errno.ENAMETOOLONG):
        client.do(ops.lcreate, fid, b"x" * 256, os.O_RDWR, 0o600)
    assert os.listdir(client.source) == []


def test_lcreate_on_a_read_only_session(source: Path) -> None:
    """EROFS, whatever the flags."""
    with client_of(source, read_only=True) as client:
        fid = client.walk()
        for flags in (os.O_RDONLY, os.O_RDWR):
            with fails(errno.EROFS):
                client.do(ops.lcreate, fid, b"new", flags, 0o600)
    assert os.listdir(source) == []


@pytest.mark.parametrize("mode", [0o666, 0o600, 0o000, 0o444, 0o1777, 0o4755, 0o6711])
def test_lcreate_gives_exactly_the_mode_asked_for(client: Client, mode: int) -> None:
    """The caller's umask has been applied; type bits are not the mode's; data can be written."""
    fid = client.walk()
    client.do(ops.lcreate, fid, b"new", os.O_RDWR | os.O_EXCL, stat.S_IFREG | mode)
    assert (client.source / "new").stat().st_mode == stat.S_IFREG | mode
    assert client.do(ops.write, fid, 0, b"x") == 1


def test_lcreate_opens_in_the_mode_asked_for(client: Client) -> None:
    """Write-only, read-only, appending; flags that make no sense are dropped."""
    writing, reading, appending = client.walk(), client.walk(), client.walk()
    client.do(ops.lcreate, writing, b"w", os.O_WRONLY | os.O_DIRECT, 0o600)
    client.do(ops.lcreate, reading, b"r", os.O_RDONLY, 0o600)
    client.do(ops.lcreate, appending, b"a", os.O_WRONLY | os.O_APPEND, 0o600)
    assert not kernel_flags(client, writing) & os.O_DIRECT
    assert client.do(ops.write, writing, 1, b"x") == 1
    with fails(errno.EBADF):
        client.do(ops.read, writing, 0, 1)
    assert client.do(ops.read, reading, 0, 1) == b""
    with fails(errno.EBADF):
        client.do(ops.write, reading, 0, b"x")
    client.do(ops.write, appending, 0, b"1")
    client.do(ops.write, appending, 0, b"2")
    assert (client.source / "a").read_bytes() == b"12"


def test_of_two_lcreates_at_once_one_wins_the_fid(client: Client) -> None:
    """Both files are made; the fid becomes one of them, the other's descriptor is closed."""
    fid = client.walk()
    first = Stepper(ops.lcreate(client.session, fid, b"first", os.O_RDWR, 0o600))
    second = Stepper(ops.lcreate(client.session, fid, b"second", os.O_RDWR, 0o600))
    first.after("_path_descriptor")
    second.after("_path_descriptor")
    second.finish()
    with fails(errno.EINVAL):
        first.finish()
    client.rest()
    client.do(ops.write, fid, 0, b"x")
    assert (client.source / "second").read_bytes() == b"x"
    assert (client.source / "first").read_bytes() == b""


def test_lcreate_is_about_the_file_made_and_not_its_name(client: Client) -> None:
    """Whoever puts another file in its place meanwhile changes nothing."""
    fid = client.walk()
    creating = Stepper(ops.lcreate(client.session, fid, b"new", os.O_RDWR, 0o600))
    creating.after("_create_file")
    (client.source / "new").rename(client.source / "moved")
    (client.source / "new").mkdir()
    qid = creating.finish()
    assert qid.type == QTFILE
    client.do(ops.write, fid, 0, b"x")
    assert (client.source / "moved").read_bytes() == b"x"


# read and write


def test_an_unopened_fid_is_neither_read_nor_written(client: Client, file: Path) -> None:
    """EINVAL."""
    for fid in (client.walk("file"), client.walk()):
        with fails(errno.EINVAL):
            client.do(ops.read, fid, 0, 1)
        with fails(errno.EINVAL):
            client.do(ops.write, fid, 0, b"x")


def test_a_directory_is_neither_read_nor_written(client: Client) -> None:
    """EISDIR."""
    fid = client.open()
    with fails(errno.EISDIR):
        client.do(ops.read, fid, 0, 1)
    with fails(errno.EISDIR):
        client.do(ops.write, fid, 0, b"x")


def test_a_file_is_used_only_as_it_was_opened(client: Client, file: Path) -> None:
    """EBADF for a read of a file open for writing, and the other way round."""
    writing = client.open("file", flags=os.O_WRONLY)
    with fails(errno.EBADF):
        client.do(ops.read, writing, 0, 1)
    reading = client.open("file", flags=os.O_RDONLY)
    with fails(errno.EBADF):
        client.do(ops.write, reading, 0, b"x")
    both = client.open("file", flags=os.O_RDWR)
    assert client.do(ops.write, both, 0, b"x") == 1
    assert client.do(ops.read, both, 0, 1) == b"x"
    neither = client.open("file", flags=os.O_ACCMODE)
    with fails(errno.EBADF):
        client.do(ops.read, neither, 0, 1)
    with fails(errno.EBADF):
        client.do(ops.write, neither, 0, b"x")


@pytest.mark.parametrize(
    ("offset", "count", "found"),
    [(0, 10, 10), (0, 11, 10), (3, 4, 4), (9, 5, 1), (10, 5, 0), (10**12, 5, 0), (0, 0, 0)],
)
def test_a_read_is_short_only_at_the_end(
    client: Client, file: Path, offset: int, count: int, found: int
) -> None:
    """And empty behind it."""
    fid = client.open("file")
    assert client.do(ops.read, fid, offset, count) == b"0123456789"[offset : offset + found]


def test_holes_read_as_zeros(client: Client) -> None:
    """A write behind the end leaves a hole, which takes no room."""
    fid = client.create("sparse")
    assert client.do(ops.write, fid, 1 << 30, b"end") == 3
    assert client.do(ops.read, fid, 5, 4) == bytes(4)
    assert client.do(ops.read, fid, (1 << 30) - 2, 100) == b"\0\0end"
    attributes = client.do(ops.getattr, fid)
    assert attributes.size == (1 << 30) + 3
    assert attributes.blocks * 512 < 1 << 20


def test_appending_ignores_the_offset(client: Client, file: Path) -> None:
    """What is written comes to the end, wherever the client believes that to be."""
    fid = client.open("file", flags=os.O_RDWR | os.O_APPEND)
    assert client.do(ops.write, fid, 0, b"a") == 1
    with file.open("ab") as other:
        other.write(b"other")
    assert client.do(ops.write, fid, 3, b"b") == 1
    assert client.do(ops.read, fid, 8, 100) == b"89aotherb"


def test_much_data_comes_through_whole(client: Client) -> None:
    """One write and one read of 8 MiB and a bit, at an odd offset."""
    data = os.urandom(8 << 20) + b"tail"
    fid = client.create("big")
    assert client.do(ops.write, fid, 3, data) == len(data)
    assert client.do(ops.read, fid, 3, len(data)) == data
    assert client.do(ops.read, fid, 0, 64 << 20) == bytes(3) + data


def test_nothing_is_written_by_an_empty_write(client: Client, file: Path) -> None:
    """0 bytes at any offset leave the file as it is."""
    fid = client.open("file", flags=os.O_WRONLY)
    assert client.do(ops.write, fid, 100, b"") == 0
    assert file.read_bytes() == b"0123456789"


def test_an_offset_has_63_bits(client: Client, file: Path) -> None:
    """9P has 64; what the kernel would take for negative is EINVAL like there."""
    fid = client.open("file", flags=os.O_RDWR)
    for offset in (OFF_MAX + 1, (1 << 64) - 1, -1):
        with fails(errno.EINVAL):
            client.do(ops.read, fid, offset, 1)
        with fails(errno.EINVAL):
            client.do(ops.write, fid, offset, b"x")
    with fails(errno.EFBIG, errno.EINVAL):
        client.do(ops.write, fid, OFF_MAX, b"xx")
    assert file.read_bytes() == b"0123456789"


def test_a_file_is_used_after_it_was_unlinked(client: Client, file: Path) -> None:
    """Reads, writes and syncs go on."""
    fid = client.open("file", flags=os.O_RDWR)
    file.unlink()
    assert client.do(ops.write, fid, 10, b"more") == 4
    client.do(ops.fsync, fid)
    assert client.do(ops.read, fid, 8, 100) == b"89more"


def test_short_reads_are_continued(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system gives a few bytes at a time; the client gets all it asked for."""
    real = os.pread
    asked: list[tuple[int, int]] = []

    def few(fd: int, count: int, offset: int) -> bytes:
        asked.append((count, offset))
        return real(fd, min(count, 4), offset)

    fid = client.open("file")
    monkeypatch.setattr(os, "pread", few)
    assert client.do(ops.read, fid, 1, 8) == b"12345678"
    assert asked == [(8, 1), (4, 5)]
    assert client.do(ops.read, fid, 1, 100) == b"123456789"


def test_short_writes_are_continued(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system takes a few bytes at a time; all are written, each once."""
    real = os.pwrite
    asked: list[tuple[bytes, int]] = []

    def few(fd: int, data: bytes, offset: int) -> int:
        asked.append((bytes(data), offset))
        return real(fd, data[:4], offset)

    fid = client.open("file", flags=os.O_WRONLY)
    monkeypatch.setattr(os, "pwrite", few)
    assert client.do(ops.write, fid, 5, b"abcdefghij") == 10
    assert asked == [(b"abcdefghij", 5), (b"efghij", 9), (b"ij", 13)]
    assert file.read_bytes() == b"01234abcdefghij"


@pytest.mark.parametrize("ending", ["error", "nothing"])
def test_a_write_that_stops_says_how_far_it_came(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """An error after some bytes is told by the count; with the first bytes it is the answer."""
    real = os.pwrite
    answers = [4, 4]

    def filling(fd: int, data: bytes, offset: int) -> int:
        if answers:
            return real(fd, data[: answers.pop()], offset)
        if ending == "nothing":
            return 0
        raise OSError(errno.ENOSPC, "full")

    fid = client.open("file", flags=os.O_WRONLY)
    monkeypatch.setattr(os, "pwrite", filling)
    assert client.do(ops.write, fid, 0, b"abcdefghij") == 8
    if ending == "error":
        with fails(errno.ENOSPC):
            client.do(ops.write, fid, 8, b"ij")
    assert file.read_bytes() == b"abcdefgh89"


@pytest.mark.parametrize(
    ("flags", "offset", "written"),
    [
        (os.O_RDWR, 0, None),
        (os.O_RDWR, 4096, None),
        (os.O_RDWR, 5, 4),
        (os.O_RDWR | os.O_APPEND, 0, 4),
        (os.O_RDWR | os.O_SYNC, 0, 4),
        (os.O_WRONLY, 0, 4),
    ],
)
def test_a_write_that_may_be_of_mapped_pages_stops_with_the_error(
    client: Client,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: int,
    offset: int,
    written: int | None,
) -> None:
    """The kernel would not look at the count; of others it is the answer."""
    real = os.pwrite
    fid = client.open("file", flags=flags)
    room = [4]

    def filling(fd: int, data: bytes, offset: int) -> int:
        if not room:
            raise OSError(errno.EDQUOT, "no more")
        return real(fd, data[: room.pop()], offset)

    monkeypatch.setattr(os, "pwrite", filling)
    if written is None:
        with fails(errno.EDQUOT):
            client.do(ops.write, fid, offset, b"abcdefgh")
    else:
        assert client.do(ops.write, fid, offset, b"abcdefgh") == written


def test_errors_of_reading_come_through(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO from the disk is EIO for the client, in the middle of a read too."""
    real = os.pread
    answers = [4]

    def breaking(fd: int, count: int, offset: int) -> bytes:
        if answers:
            return real(fd, answers.pop(), offset)
        raise OSError(errno.EIO, "broken")

    fid = client.open("file")
    monkeypatch.setattr(os, "pread", breaking)
    with fails(errno.EIO):
        client.do(ops.read, fid, 0, 10)


# fsync, and what a close reports


@pytest.mark.parametrize("datasync", [False, True])
def test_fsync_syncs_the_open_file(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch, datasync: bool
) -> None:
    """With its own descriptor, files and directories; data only where that is enough."""
    synced: list[tuple[str, int]] = []
    for name in ("fsync", "fdatasync"):
        real: Callable[[int], None] = getattr(os, name)

        def recording(fd: int, name: str = name, real: Callable[[int], None] = real) -> None:
            synced.append((name, fd))
            real(fd)

        monkeypatch.setattr(os, name, recording)
    fids = [client.open("file"), client.open("file", flags=os.O_WRONLY), client.open()]
    for fid in fids:
        client.do(ops.fsync, fid, datasync)
    name = "fdatasync" if datasync else "fsync"
    assert synced == [(name, client.descriptor(fid)) for fid in fids]


def test_fsync_of_what_is_not_open(client: Client, file: Path) -> None:
    """EINVAL for unopened fids and for attributes."""
    attribute = client.new()
    client.do(ops.xattrwalk, ROOT, attribute)
    for fid in (client.walk("file"), client.walk(), attribute):
        with fails(errno.EINVAL):
            client.do(ops.fsync, fid)


def test_an_fsync_that_fails_is_told(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not durable must not be acknowledged."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr(os, "fdatasync", broken)
    fid = client.open("file")
    for datasync in (False, True):
        with fails(errno.EIO):
            client.do(ops.fsync, fid, datasync)


@pytest.fixture
def reports_at_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's file system, whichever it is, may report errors at close(2)."""
    monkeypatch.setattr(filesystems, "_SILENT_AT_CLOSE", frozenset())


def test_where_a_close_reports_nothing_no_duplicate_is_closed(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file systems these are is known of each of them; of others it is not."""
    fid = client.open("file", flags=os.O_RDWR)
    duplicates: list[int] = []

    def duplicate(fd: int) -> int:
        duplicates.append(fd)
        return os.open(file, os.O_RDONLY)

    monkeypatch.setattr(os, "dup", duplicate)
    for kind, is_closed in ((0xEF53, False), (0x01021994, False), (0x6969, True), (0, True)):
        monkeypatch.setattr(client.node(fid).device, "file_system", filesystems.FileSystem(kind, 0))
        client.do(callbacks.flush, fid)
        assert bool(duplicates) is is_closed, hex(kind)
        duplicates.clear()
    monkeypatch.setattr(client.node(fid).device, "file_system", None)
    client.do(callbacks.flush, fid)
    assert duplicates


@pytest.mark.usefixtures("reports_at_close")
def test_errors_that_a_close_reports_are_fetched(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By closing a duplicate; the file stays open."""
    real = os.close
    closed: list[int] = []

    def full(fd: int) -> None:
        closed.append(fd)
        real(fd)
        raise OSError(errno.EDQUOT, "over quota")

    fid = client.open("file", flags=os.O_RDWR)
    reader = client.open("file")
    client.do(callbacks.flush, fid)
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", full)
        with fails(errno.EDQUOT):
            client.do(callbacks.flush, fid)
        client.do(callbacks.flush, reader)  # nothing was written there
    assert len(closed) == 1
    assert closed != [client.descriptor(fid)]
    assert client.do(ops.read, fid, 0, 1) == b"0"
    with fails(errno.EINVAL):
        client.do(callbacks.flush, client.walk("file"))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
@pytest.mark.usefixtures("reports_at_close")
def test_a_close_does_not_fail_for_want_of_a_descriptor(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def none_left(fd: int) -> int:
        raise OSError(code, "too many open files")

    fid = client.open("file", flags=os.O_RDWR)
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", none_left)
        client.do(callbacks.flush, fid)


# lock and getlock

READ = fcntl.F_RDLCK
WRITE = fcntl.F_WRLCK
NONE = fcntl.F_UNLCK


def test_a_lock_is_in_the_way_of_another_fids(client: Client, file: Path) -> None:
    """BLOCKED, not an error and no wait; unlocking lets the other in."""
    mine, other = (client.open("file", flags=os.O_RDWR) for _ in range(2))
    assert client.do(ops.lock, mine, 0, LockRange(WRITE, 0, 100)) is LockStatus.SUCCESS
    for flags in (0, 1, 2, 3):
        wanted = LockRange(READ, 99, 10)
        assert client.do(ops.lock, other, flags, wanted) is LockStatus.BLOCKED
    assert client.do(ops.lock, other, 0, LockRange(WRITE, 100, 0)) is LockStatus.SUCCESS
    assert client.do(ops.lock, mine, 0, LockRange(NONE, 50, 50)) is LockStatus.SUCCESS
    assert client.do(ops.lock, other, 0, LockRange(WRITE, 50, 50)) is LockStatus.SUCCESS
    assert client.do(ops.lock, other, 0, LockRange(WRITE, 49, 1)) is LockStatus.BLOCKED


def test_getlock_says_what_is_in_the_way(client: Client, file: Path) -> None:
    """Kind and range of the lock, or F_UNLCK with what was asked."""
    mine, other = (client.open("file", flags=os.O_RDWR) for _ in range(2))
    client.do(ops.lock, mine, 0, LockRange(READ, 10, 5))
    client.do(ops.lock, mine, 0, LockRange(WRITE, 20, 0))
    assert client.do(ops.getlock, other, LockRange(WRITE, 0, 12))[:3] == (READ, 10, 5)
    assert client.do(ops.getlock, other, LockRange(READ, 1000, 1))[:3] == (WRITE, 20, 0)
    wanted = LockRange(READ, 10, 5, pid=77)
    assert client.do(ops.getlock, other, wanted) == wanted._replace(type=NONE)
    wanted = LockRange(WRITE, 0, 0, pid=77)
    assert client.do(ops.getlock, mine, wanted) == wanted._replace(type=NONE), "its own lock"


def test_read_locks_are_shared(client: Client, file: Path) -> None:
    """And a write lock waits for all of them."""
    fids = [client.open("file", flags=os.O_RDWR) for _ in range(3)]
    for fid in fids[:2]:
        assert client.do(ops.lock, fid, 0, LockRange(READ, 0, 0)) is LockStatus.SUCCESS
    assert client.do(ops.lock, fids[2], 0, LockRange(WRITE, 0, 1)) is LockStatus.BLOCKED
    assert client.do(ops.lock, fids[0], 0, LockRange(WRITE, 0, 1)) is LockStatus.BLOCKED
    client.do(ops.lock, fids[1], 0, LockRange(NONE, 0, 0))
    assert client.do(ops.lock, fids[0], 0, LockRange(WRITE, 0, 1)) is LockStatus.SUCCESS


def test_a_lock_ends_with_its_fid(client: Client, file: Path) -> None:
    """The clunk of another fid on the file does not end it."""
    mine, other, third = (client.open("file", flags=os.O_RDWR) for _ in range(3))
    client.do(ops.lock, mine, 0, LockRange(WRITE, 0, 0))
    client.do(ops.clunk, third)
    assert client.do(ops.lock, other, 0, LockRange(WRITE, 0, 0)) is LockStatus.BLOCKED
    client.do(ops.clunk, mine)
    assert client.do(ops.lock, other, 0, LockRange(WRITE, 0, 0)) is LockStatus.SUCCESS


def test_locks_on_what_cannot_be_locked(client: Client, file: Path) -> None:
    """EINVAL unopened, and for unknown flags and types; EISDIR; EBADF in the wrong mode."""
    unopened, directory, reading = client.walk("file"), client.open(), client.open("file")
    for wanted in (LockRange(READ, 0, 0), LockRange(NONE, 0, 0)):
        with fails(errno.EINVAL):
            client.do(ops.lock, unopened, 0, wanted)
        with fails(errno.EISDIR):
            client.do(ops.lock, directory, 0, wanted)
        with fails(errno.EINVAL):
            client.do(ops.lock, reading, 4, wanted)
    with fails(errno.EINVAL):
        client.do(ops.getlock, unopened, LockRange(READ, 0, 0))
    with fails(errno.EISDIR):
        client.do(ops.getlock, directory, LockRange(READ, 0, 0))
    with fails(errno.EBADF):
        client.do(ops.lock, reading, 0, LockRange(WRITE, 0, 0))
    with fails(errno.EINVAL):
        client.do(ops.lock, reading, 0, LockRange(77, 0, 0))
    assert client.do(ops.lock, reading, 0, LockRange(READ, 0, 0)) is LockStatus.SUCCESS


def test_a_lock_has_a_range_of_63_bits(client: Client, file: Path) -> None:
    """9P has 64: EINVAL beyond what the kernel can say."""
    fid = client.open("file", flags=os.O_RDWR)
    for wanted in (LockRange(WRITE, OFF_MAX + 1, 0), LockRange(WRITE, 0, OFF_MAX + 1)):
        with fails(errno.EINVAL):
            client.do(ops.lock, fid, 0, wanted)
        with fails(errno.EINVAL):
            client.do(ops.getlock, fid, wanted)
    assert client.do(ops.lock, fid, 0, LockRange(WRITE, 0, OFF_MAX)) is LockStatus.SUCCESS


def test_new_files_depend_on_the_umask_of_the_daemon_only(source: Path) -> None:
    """It is 0 while it serves: the kernel has applied the caller's (serve.py)."""
    with client_of(source) as client:
        client.do(ops.lcreate, client.walk(), b"f", os.O_RDWR, 0o666)
        client.do(ops.mkdir, ROOT, b"d", 0o777)
        client.do(ops.mknod, ROOT, b"n", stat.S_IFREG | 0o666)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in source.iterdir()}
    assert modes == {"f": 0o666, "d": 0o777, "n": 0o666}


def test_a_server_socket_is_not_connected_to(client: Client) -> None:
    """ENXIO for a socket that somebody listens on, too; nobody called."""
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(client.source)  # the path of a socket may have 107 bytes only
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        listener.listen()
        listener.setblocking(False)
        with fails(errno.ENXIO):
            client.do(ops.lopen, client.walk("socket"), os.O_RDWR)
        with pytest.raises(BlockingIOError):
            listener.accept()
