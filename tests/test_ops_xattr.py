"""xattrwalk, xattrcreate, and what the clunk of an attribute does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from ops_helpers import (
    ROOT,
    UNKNOWN_NODEID,
    Client,
    Stepper,
    client_of,
    fails,
    need_attributes,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.ops.xattr import XATTR_SIZE_MAX

pytestmark = pytest.mark.usefixtures("leak_free")


@pytest.fixture
def path(client: Client) -> Path:
    """A file ``file`` whose attributes user.a and user.b are ``first`` and empty."""
    need_attributes(client.source)
    path = client.source / "file"
    path.write_bytes(b"data")
    os.setxattr(path, "user.a", b"first")
    os.setxattr(path, "user.b", b"")
    return path


def put(client: Client, name: bytes, value: bytes, flags: int = 0) -> None:
    """Set an attribute of ``file`` the way clients do."""
    fid = client.walk("file")
    client.do(ops.xattrcreate, fid, name, len(value), flags)
    assert client.do(ops.write, fid, 0, value) == len(value)
    client.do(ops.clunk, fid)


def get(client: Client, name: bytes) -> bytes:
    """Read an attribute of ``file`` the way clients do."""
    file, fid = client.walk("file"), client.new()
    size = client.do(ops.xattrwalk, file, fid, name)
    value = client.do(ops.read, fid, 0, size + 100)
    assert len(value) == size
    client.do(ops.clunk, fid)
    client.do(ops.clunk, file)
    return value


# xattrwalk


def test_an_attribute_is_read_like_a_file(client: Client, path: Path) -> None:
    """In pieces, at any offset; nothing behind its end."""
    fid = client.new()
    assert client.do(ops.xattrwalk, client.walk("file"), fid, b"user.a") == 5
    assert client.do(ops.read, fid, 0, 5) == b"first"
    assert client.do(ops.read, fid, 1, 3) == b"irs"
    assert client.do(ops.read, fid, 4, 100) == b"t"
    assert client.do(ops.read, fid, 5, 1) == b""
    assert client.do(ops.read, fid, 1 << 40, 1) == b""
    assert get(client, b"user.b") == b""


def test_the_list_of_attributes(client: Client, path: Path) -> None:
    """All names, each ended by a zero byte; none for a file without."""
    assert sorted(get(client, b"").split(b"\0")) == [b"", b"user.a", b"user.b"]
    for name in ("user.a", "user.b"):
        os.removexattr(path, name)
    assert get(client, b"") == b""


def test_a_value_is_the_one_that_was_there_at_the_walk(client: Client, path: Path) -> None:
    """It does not change below a reader, nor go away with the file's fid."""
    file, fid, names = client.walk("file"), client.new(), client.new()
    client.do(ops.xattrwalk, file, fid, b"user.a")
    client.do(ops.xattrwalk, file, names)
    os.setxattr(path, "user.a", b"second")
    os.removexattr(path, "user.b")
    client.do(ops.clunk, file)
    assert client.do(ops.read, fid, 0, 100) == b"first"
    assert b"user.b" in client.do(ops.read, names, 0, 100)


def test_attributes_of_open_and_of_unlinked_files(client: Client, path: Path) -> None:
    """Any fid of the file will do; an attribute's fid stands on the file, too."""
    fid, opened = client.new(), client.open("file")
    path.unlink()
    assert client.do(ops.xattrwalk, opened, fid, b"user.a") == 5
    assert client.do(ops.getattr, fid).nlink == 0
    again = client.new()
    assert client.do(ops.xattrwalk, fid, again, b"user.a") == 5


def test_an_attribute_that_is_not_there(client: Client, path: Path) -> None:
    """ENODATA, and newfid is not made; errors of names are getxattr's."""
    file, fid = client.walk("file"), client.new()
    with fails(errno.ENODATA):
        client.do(ops.xattrwalk, file, fid, b"user.none")
    with fails(errno.EOPNOTSUPP):
        client.do(ops.xattrwalk, file, fid, b"no-namespace")
    with fails(errno.ERANGE, errno.EOPNOTSUPP):
        client.do(ops.xattrwalk, file, fid, b"user." + b"x" * 300)
    with fails(errno.EINVAL):
        client.do(ops.xattrwalk, file, fid, b"user.a\0")
    assert not client.has(fid)


def test_xattrwalk_refuses_a_taken_newfid(client: Client, path: Path) -> None:
    """EINVAL, and that fid is as before; the file's own number is taken as well."""
    file, taken = client.walk("file"), client.open("file")
    for newfid in (taken, file):
        with fails(errno.EINVAL):
            client.do(ops.xattrwalk, file, newfid, b"user.a")
    assert client.do(ops.read, taken, 0, 9) == b"data"


def test_a_symlinks_attributes_are_not_its_targets(client: Client, path: Path) -> None:
    """They are the symlink's own, which has none for users."""
    (client.source / "link").symlink_to("file")
    with fails(errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
        client.do(ops.xattrwalk, client.walk("link"), client.new(), b"user.a")
    fid = client.walk("link")
    client.do(ops.xattrcreate, fid, b"user.new", 0)
    with fails(errno.EPERM, errno.EOPNOTSUPP):
        client.do(ops.clunk, fid)
    assert sorted(os.listxattr(path)) == ["user.a", "user.b"]


def test_an_attribute_is_not_written_where_it_was_walked_to(client: Client, path: Path) -> None:
    """EINVAL; nor read where it is being created."""
    fid = client.new()
    client.do(ops.xattrwalk, client.walk("file"), fid, b"user.a")
    with fails(errno.EINVAL):
        client.do(ops.write, fid, 0, b"x")
    creating = client.walk("file")
    client.do(ops.xattrcreate, creating, b"user.c", 0)
    with fails(errno.EINVAL):
        client.do(ops.read, creating, 0, 1)


# xattrcreate, write, clunk


def test_an_attribute_is_set_at_the_clunk(client: Client, path: Path) -> None:
    """Not before; in as many writes as it takes."""
    fid = client.walk("file")
    client.do(ops.xattrcreate, fid, b"user.a", 6)
    assert client.do(ops.write, fid, 0, b"new") == 3
    assert client.do(ops.write, fid, 3, b"er") == 2
    assert client.do(ops.write, fid, 5, b"") == 0
    assert client.do(ops.write, fid, 5, b"!") == 1
    assert os.getxattr(path, "user.a") == b"first"
    client.do(ops.clunk, fid)
    assert os.getxattr(path, "user.a") == b"newer!"
    assert not client.has(fid)


@pytest.mark.parametrize("value", [b"", b"\0", bytes(range(256)), b"x" * 1000])
def test_a_value_is_any_bytes(client: Client, path: Path, value: bytes) -> None:
    """An empty one is a value, not a removal."""
    put(client, b"user.new", value)
    assert os.getxattr(path, "user.new") == value
    assert get(client, b"user.new") == value


def test_an_attribute_is_removed_at_the_clunk(client: Client, path: Path) -> None:
    """With the flag that says so; ENODATA where there is none."""
    fid = client.walk("file")
    client.do(ops.xattrcreate, fid, b"user.a", 0, remove=True)
    assert "user.a" in os.listxattr(path)
    client.do(ops.clunk, fid)
    assert os.listxattr(path) == ["user.b"]
    fid = client.walk("file")
    client.do(ops.xattrcreate, fid, b"user.a", 0, remove=True)
    with fails(errno.ENODATA):
        client.do(ops.clunk, fid)
    assert not client.has(fid)


@pytest.mark.parametrize("written", [b"", b"1234"])
def test_less_than_was_declared_is_not_set(client: Client, path: Path, written: bytes) -> None:
    """EINVAL at the clunk; the old value stays, the fid does not."""
    fid = client.walk("file")
    client.do(ops.xattrcreate, fid, b"user.a", 5)
    client.do(ops.write, fid, 0, written)
    with fails(errno.EINVAL):
        client.do(ops.clunk, fid)
    assert os.getxattr(path, "user.a") == b"first"
    assert not client.has(fid)


def test_more_than_was_declared_is_not_taken(client: Client, path: Path) -> None:
    """ENOSPC, and nothing of that write; EINVAL for one that leaves a gap or goes back."""
    fid = client.walk("file")
    client.do(ops.xattrcreate, fid, b"user.a", 4)
    with fails(errno.ENOSPC):
        client.do(ops.write, fid, 0, b"12345")
    client.do(ops.write, fid, 0, b"12")
    for offset in (0, 1, 3, 1 << 70):
        with fails(errno.EINVAL):
            client.do(ops.write, fid, offset, b"x")
    with fails(errno.ENOSPC):
        client.do(ops.write, fid, 2, b"345")
    client.do(ops.write, fid, 2, b"34")
    client.do(ops.clunk, fid)
    assert os.getxattr(path, "user.a") == b"1234"


def test_create_and_replace(client: Client, path: Path) -> None:
    """XATTR_CREATE wants none there, XATTR_REPLACE one; said at the clunk."""
    put(client, b"user.new", b"1", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        put(client, b"user.new", b"2", os.XATTR_CREATE)
    put(client, b"user.new", b"3", os.XATTR_REPLACE)
    with fails(errno.ENODATA):
        put(client, b"user.none", b"4", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.new") == b"3"
    assert "user.none" not in os.listxattr(path)


def test_a_value_has_64_kib_at_most(client: Client, path: Path) -> None:
    """E2BIG at once, before anything is kept; 64 KiB are the file system's to refuse."""
    fid = client.walk("file")
    for size in (XATTR_SIZE_MAX + 1, 1 << 32, 1 << 64):
        with fails(errno.E2BIG):
            client.do(ops.xattrcreate, fid, b"user.a", size)
    client.do(ops.xattrcreate, fid, b"user.a", XATTR_SIZE_MAX)
    assert client.do(ops.write, fid, 0, bytes(XATTR_SIZE_MAX)) == XATTR_SIZE_MAX
    try:
        client.do(ops.clunk, fid)
    except OSError as failure:
        assert failure.errno in (errno.ENOSPC, errno.E2BIG, errno.EDQUOT)  # noqa: PT017
        assert os.getxattr(path, "user.a") == b"first"
    else:
        assert os.getxattr(path, "user.a") == bytes(XATTR_SIZE_MAX)


def test_xattrcreate_refuses_what_makes_no_sense(client: Client, path: Path) -> None:
    """EINVAL: unknown flags, no name, a zero byte in it, a negative size; the fid stays."""
    fid = client.walk("file")
    for name, size, flags in (
        (b"user.x", 1, 4),
        (b"user.x", 1, -1),
        (b"", 1, 0),
        (b"user.\0x", 1, 0),
        (b"user.x", -1, 0),
    ):
        with fails(errno.EINVAL):
            client.do(ops.xattrcreate, fid, name, size, flags)
    client.do(ops.lopen, fid, os.O_RDONLY)


def test_xattrcreate_wants_an_unopened_fid(client: Client, path: Path) -> None:
    """EINVAL for open files and directories, and for attributes; they stay what they are."""
    file, directory = client.open("file"), client.open()
    reading, writing = client.new(), client.walk("file")
    client.do(ops.xattrwalk, client.walk("file"), reading, b"user.a")
    client.do(ops.xattrcreate, writing, b"user.a", 3)
    for fid in (file, directory, reading, writing):
        with fails(errno.EINVAL):
            client.do(ops.xattrcreate, fid, b"user.c", 1)
    assert client.do(ops.read, file, 0, 9) == b"data"
    assert client.do(ops.read, reading, 0, 9) == b"first"
    client.do(ops.write, writing, 0, b"abc")
    client.do(ops.clunk, writing)
    assert os.getxattr(path, "user.a") == b"abc"


def test_attributes_of_the_root(client: Client, path: Path) -> None:
    """Through a clone, as for every file: the root's fid stays."""
    fid, reading = client.walk(), client.new()
    client.do(ops.xattrcreate, fid, b"user.root", 1)
    client.do(ops.write, fid, 0, b"1")
    client.do(ops.clunk, fid)
    assert os.getxattr(client.source, "user.root") == b"1"
    assert client.do(ops.xattrwalk, ROOT, reading, b"user.root") == 1


def test_attributes_are_not_created_on_a_read_only_session(source: Path) -> None:
    """EROFS already for xattrcreate; reading is fine."""
    need_attributes(source)
    (source / "file").touch()
    os.setxattr(source / "file", "user.a", b"first")
    with client_of(source, read_only=True) as client:
        fid = client.walk("file")
        for remove in (False, True):
            with fails(errno.EROFS):
                client.do(ops.xattrcreate, fid, b"user.a", 0, remove=remove)
        client.do(ops.clunk, fid)
        assert get(client, b"user.a") == b"first"
    assert os.getxattr(source / "file", "user.a") == b"first"


def test_an_attribute_is_set_on_a_file_that_was_unlinked(client: Client, path: Path) -> None:
    """The fid that is clunked still is the file."""
    fid, opened = client.walk("file"), client.open("file")
    client.do(ops.xattrcreate, fid, b"user.a", 4)
    client.do(ops.write, fid, 0, b"late")
    path.unlink()
    client.do(ops.clunk, fid)
    reading = client.new()
    client.do(ops.xattrwalk, opened, reading, b"user.a")
    assert client.do(ops.read, reading, 0, 9) == b"late"


def test_an_attribute_is_set_once(client: Client, path: Path) -> None:
    """A clunk that is under way has taken the fid out of the table."""
    fid = client.walk("file")
    client.do(ops.xattrcreate, fid, b"user.a", 0)
    clunking = Stepper(ops.clunk(client.session, fid))
    clunking.before("_setxattr")
    with fails(errno.EBADF):
        client.do(ops.clunk, fid)
    with fails(errno.EBADF):
        client.do(ops.write, fid, 0, b"")
    clunking.finish()
    assert os.getxattr(path, "user.a") == b""


def test_attributes_without_file_system_support_are_refused_cleanly(client: Client) -> None:
    """An unknown fid is told before anything else is done; no fid is made."""
    newfid = client.new()
    with fails(errno.ESTALE):
        client.do(ops.xattrwalk, UNKNOWN_NODEID, newfid)
    assert not client.has(newfid)
