"""getattr, setattr, readlink and statfs."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ops_helpers import (
    Client,
    Stepper,
    client_of,
    fails,
    module_of,
    need_devices,
    needs_root,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.fuse import callbacks
from ninefuse.linux.syscalls import SetTime
from ninefuse.ops import Changes

pytestmark = pytest.mark.usefixtures("leak_free")

SECOND = 1_000_000_000
KINDS = ["file", "directory", "symlink", "dangling", "fifo", "socket"]


@pytest.fixture
def kinds(client: Client) -> Client:
    """One of each kind of file, named after it."""
    source = client.source
    (source / "file").write_bytes(b"0123456789")
    (source / "directory").mkdir()
    (source / "symlink").symlink_to("file")
    (source / "dangling").symlink_to("nowhere")
    os.mkfifo(source / "fifo")
    os.mknod(source / "socket", stat.S_IFSOCK | 0o600)
    return client


# getattr


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_are_the_files_own(kinds: Client, kind: str) -> None:
    """Each field is what lstat says; a symlink's are the symlink's."""
    path = kinds.source / kind
    os.utime(path, ns=(1_234_567_890_123_456_789, -987_654_321), follow_symlinks=False)
    expected = path.lstat()
    a = kinds.do(ops.getattr, kinds.walk(kind))
    assert a.ino == expected.st_ino
    assert a.dev == expected.st_dev
    assert a.mode == expected.st_mode
    assert a.kind == stat.S_IFMT(expected.st_mode)
    assert a.nlink == expected.st_nlink
    assert (a.uid, a.gid) == (expected.st_uid, expected.st_gid)
    assert a.size == expected.st_size
    assert (a.blocks, a.blksize) == (expected.st_blocks, expected.st_blksize)
    assert a.mtime_ns == expected.st_mtime_ns == -987_654_321
    assert a.ctime_ns == expected.st_ctime_ns
    assert a.atime_ns == expected.st_atime_ns
    assert a.rdev == expected.st_rdev


def test_a_device_node_says_which_device(client: Client) -> None:
    """Major and minor numbers, large ones too."""
    need_devices(client.source)
    device = os.makedev(300, 70_000)
    os.mknod(client.source / "node", stat.S_IFBLK | 0o600, device)
    a = client.do(ops.getattr, client.walk("node"))
    assert (a.rdev, a.kind) == (device, stat.S_IFBLK)


@pytest.mark.parametrize("opened", [False, True])
def test_attributes_after_the_file_was_unlinked(kinds: Client, opened: bool) -> None:
    """The fid still is the file, which has no link any more; open or not."""
    fid = kinds.open("file", flags=os.O_RDWR) if opened else kinds.walk("file")
    (kinds.source / "file").rename(kinds.source / "moved")
    (kinds.source / "file").write_bytes(b"another")
    (kinds.source / "moved").unlink()
    a = kinds.do(ops.getattr, fid)
    assert (a.nlink, a.size) == (0, 10)
    if opened:
        kinds.do(ops.write, fid, 10, b"x")
        assert kinds.do(ops.getattr, fid).size == 11


def test_attributes_of_a_removed_directory(kinds: Client) -> None:
    """It can be asked about for as long as a fid stands on it."""
    fid = kinds.open("directory")
    (kinds.source / "directory").rmdir()
    a = kinds.do(ops.getattr, fid)
    assert (a.kind, a.nlink) == (stat.S_IFDIR, 0)


# setattr


@pytest.mark.parametrize("mode", [0o600, 0o000, 0o7777, 0o4711, 0o1755])
def test_mode_bits_are_set_exactly(kinds: Client, mode: int) -> None:
    """Set-user-id, set-group-id and sticky bit are among them; type bits say nothing."""
    for kind in ("file", "directory", "fifo"):
        path = kinds.source / kind
        before = path.lstat()
        kinds.do(ops.setattr, kinds.walk(kind), Changes(mode=stat.S_IFLNK | mode))
        after = path.lstat()
        assert stat.S_IMODE(after.st_mode) == mode
        assert stat.S_IFMT(after.st_mode) == stat.S_IFMT(before.st_mode)
        assert after.st_mtime_ns == before.st_mtime_ns


def test_the_mode_of_a_symlink_is_not_its_targets(kinds: Client) -> None:
    """Linux keeps no mode for symlinks; the file behind one is not touched."""
    before = (kinds.source / "file").stat()
    with fails(errno.EOPNOTSUPP):
        kinds.do(ops.setattr, kinds.walk("symlink"), Changes(mode=0o777))
    assert (kinds.source / "file").stat() == before


@needs_root
@pytest.mark.parametrize("kind", KINDS)
def test_owners_are_set(kinds: Client, kind: str) -> None:
    """Both or one of them; a symlink's is its own."""
    path = kinds.source / kind
    target = (kinds.source / "file").stat().st_uid
    fid = kinds.walk(kind)
    kinds.do(ops.setattr, fid, Changes(uid=1234, gid=2345))
    assert (path.lstat().st_uid, path.lstat().st_gid) == (1234, 2345)
    kinds.do(ops.setattr, fid, Changes(uid=3_000_000_000))
    assert (path.lstat().st_uid, path.lstat().st_gid) == (3_000_000_000, 2345)
    kinds.do(ops.setattr, fid, Changes(gid=7))
    assert (path.lstat().st_uid, path.lstat().st_gid) == (3_000_000_000, 7)
    if kind == "symlink":
        assert (kinds.source / "file").stat().st_uid == target


def test_an_owner_that_stays_is_no_change(kinds: Client) -> None:
    """One's own ids may be set by anybody who owns the file."""
    fid = kinds.walk("file")
    kinds.do(ops.setattr, fid, Changes(uid=os.geteuid(), gid=os.getegid()))
    assert kinds.do(ops.getattr, fid).uid == os.geteuid()


def test_a_size_is_set_without_opening(kinds: Client) -> None:
    """An unopened fid will do: shorter, longer (with zeros), none."""
    path, fid = kinds.source / "file", kinds.walk("file")
    kinds.do(ops.setattr, fid, Changes(size=4))
    assert path.read_bytes() == b"0123"
    kinds.do(ops.setattr, fid, Changes(size=6))
    assert path.read_bytes() == b"0123\0\0"
    kinds.do(ops.setattr, fid, Changes(size=0))
    assert path.read_bytes() == b""
    assert kinds.fid(fid).opened is None


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDONLY])
def test_a_size_is_set_through_an_open_fid(kinds: Client, flags: int) -> None:
    """Also after the file was unlinked, and where it is open for reading only."""
    reading, fid = kinds.open("file"), kinds.open("file", flags=flags)
    (kinds.source / "file").unlink()
    kinds.do(ops.setattr, fid, Changes(size=3))
    assert kinds.do(ops.read, reading, 0, 100) == b"012"


def test_a_size_is_set_with_the_descriptor_that_may_write(
    kinds: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open file that has lost its permissions can still be cut: ftruncate, no path."""
    fid = kinds.open("file", flags=os.O_RDWR)

    def denied(path: str, size: int) -> None:
        raise PermissionError(errno.EACCES, "not by its path")

    monkeypatch.setattr(os, "truncate", denied)
    kinds.do(ops.setattr, fid, Changes(size=2))
    assert (kinds.source / "file").read_bytes() == b"01"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("directory", errno.EISDIR),
        ("symlink", errno.EINVAL),
        ("fifo", errno.EINVAL),
        ("socket", errno.EINVAL),
    ],
)
def test_only_files_have_a_size(kinds: Client, kind: str, code: int) -> None:
    """The errno is truncate's; a FIFO is not waited for, a symlink not followed."""
    with fails(code):
        kinds.do(ops.setattr, kinds.walk(kind), Changes(size=0))
    assert (kinds.source / "file").stat().st_size == 10


def test_a_size_has_63_bits(kinds: Client) -> None:
    """9P has 64; EINVAL as for the negative number that the kernel would see."""
    fid = kinds.open("file", flags=os.O_RDWR)
    for size in (1 << 63, (1 << 64) - 1, -1):
        with fails(errno.EINVAL):
            kinds.do(ops.setattr, fid, Changes(size=size))
        with fails(errno.EINVAL):
            kinds.do(ops.setattr, kinds.walk("file"), Changes(size=size))
    assert (kinds.source / "file").stat().st_size == 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("atime", "mtime"),
    [
        (1_700_000_000_123_456_789, 1_600_000_000_987_654_321),
        (0, 1),
        (-1, -SECOND),
        (-1_234_567_890_123_456_789, -SECOND - 1),
        (4 * 10**18, 3 * 10**18),
    ],
)
def test_times_are_set_to_the_nanosecond(kinds: Client, kind: str, atime: int, mtime: int) -> None:
    """Before 1970 too; a symlink's are its own."""
    path = kinds.source / kind
    file = (kinds.source / "file").stat()
    kinds.do(ops.setattr, kinds.walk(kind), Changes(atime=atime, mtime=mtime))
    assert (path.lstat().st_atime_ns, path.lstat().st_mtime_ns) == (atime, mtime)
    if kind != "file":
        assert (kinds.source / "file").stat() == file


def test_one_time_is_set_and_the_other_left(kinds: Client) -> None:
    """None and SetTime.OMIT leave a time as it is, SetTime.NOW makes it the present."""
    path, fid = kinds.source / "file", kinds.walk("file")
    os.utime(path, ns=(11, 22))
    kinds.do(ops.setattr, fid, Changes(atime=33))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (33, 22)
    kinds.do(ops.setattr, fid, Changes(mtime=44, atime=SetTime.OMIT))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (33, 44)
    before = time.time_ns()
    kinds.do(ops.setattr, fid, Changes(mtime=SetTime.NOW))
    assert path.stat().st_atime_ns == 33
    # The kernel's clock for files advances in ticks: it may be one behind.
    assert before - SECOND <= path.stat().st_mtime_ns <= time.time_ns() + SECOND
    kinds.do(ops.setattr, fid, Changes(atime=SetTime.NOW, mtime=SetTime.OMIT))
    assert before - SECOND <= path.stat().st_atime_ns <= time.time_ns() + SECOND


def test_who_is_not_the_owner_sets_both_times_to_now_only(
    kinds: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE says the present as a moment; the kernel wants to hear that it is now."""
    module = module_of(ops.setattr)
    real = module.set_times
    path, fid = kinds.source / "file", kinds.walk("file")

    def not_the_owner(fd: int, atime: int | SetTime, mtime: int | SetTime) -> None:
        if (atime, mtime) != (SetTime.NOW, SetTime.NOW):
            raise PermissionError(errno.EPERM, "not the owner")
        real(fd, atime, mtime)

    monkeypatch.setattr(module, "set_times", not_the_owner)
    os.utime(path, ns=(11, 22))
    now = time.time_ns()
    hour = 3600 * SECOND
    for atime, mtime in (
        (now, now - hour),
        (now + hour, now),
        (now, None),
        (SetTime.OMIT, now),
        (SetTime.NOW, now),
    ):
        with fails(errno.EPERM):
            kinds.do(callbacks.setattr, fid, None, Changes(atime=atime, mtime=mtime))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (11, 22)
    now = time.time_ns()
    with fails(errno.EPERM):
        kinds.do(ops.setattr, fid, Changes(atime=now, mtime=now))  # a moment like any other to 9P
    kinds.do(callbacks.setattr, fid, None, Changes(atime=now, mtime=now))
    for found in (path.stat().st_atime_ns, path.stat().st_mtime_ns):
        assert abs(found - now) < 60 * SECOND


def test_times_further_than_64_bits_of_seconds(kinds: Client) -> None:
    """EINVAL, and no other exception."""
    fid = kinds.walk("file")
    before = (kinds.source / "file").stat()
    for time_ns in ((1 << 63) * SECOND, -((1 << 63) + 1) * SECOND):
        with fails(errno.EINVAL):
            kinds.do(ops.setattr, fid, Changes(mtime=time_ns))
    assert (kinds.source / "file").stat() == before


def test_times_are_set_through_an_open_fid_of_an_unlinked_file(kinds: Client) -> None:
    """So are mode and owner: everything works on what the fid stands on."""
    fid = kinds.open("file")
    (kinds.source / "file").unlink()
    kinds.do(ops.setattr, fid, Changes(mode=0o640, uid=os.geteuid(), atime=1, mtime=2))
    a = kinds.do(ops.getattr, fid)
    assert (stat.S_IMODE(a.mode), a.atime_ns, a.mtime_ns, a.nlink) == (0o640, 1, 2, 0)


def test_the_change_time_alone(kinds: Client) -> None:
    """It moves on, and nothing else does."""
    path, fid = kinds.source / "file", kinds.walk("file")
    before = path.stat()
    deadline = time.monotonic() + 10
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the kernel's clock for files advances in ticks
        kinds.do(ops.setattr, fid, Changes(ctime=True))
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid, after.st_size) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
        before.st_size,
    )
    assert (after.st_atime_ns, after.st_mtime_ns) == (before.st_atime_ns, before.st_mtime_ns)


def test_no_change_is_none(kinds: Client) -> None:
    """A setattr that asks for nothing makes no call that changes anything."""
    changing = Stepper(ops.setattr(kinds.session, kinds.walk("file"), Changes()))
    changing.finish()
    assert changing.calls == []


def test_changes_come_in_the_order_of_their_effects(kinds: Client) -> None:
    """Mode, owner, size, times: the size would overwrite the time just set."""
    changes = Changes(0o6755, os.geteuid(), os.getegid(), 3, 111, 222)
    for fid, truncate in (
        (kinds.walk("file"), "_truncate"),
        (kinds.open("file", flags=os.O_RDWR), "_ftruncate"),
    ):
        changing = Stepper(ops.setattr(kinds.session, fid, changes))
        changing.finish()
        assert changing.calls == ["_chmod", "_chown", truncate, "_set_times"]
        after = (kinds.source / "file").stat()
        assert (after.st_size, after.st_atime_ns, after.st_mtime_ns) == (3, 111, 222)


def test_steps_before_one_that_fails_stay_done(kinds: Client) -> None:
    """As with the system calls: the mode is set, the size refused, the times not reached."""
    path = kinds.source / "directory"
    os.utime(path, ns=(11, 22))
    with fails(errno.EISDIR):
        changes = Changes(mode=0o711, size=0, mtime=33)
        kinds.do(ops.setattr, kinds.walk("directory"), changes)
    assert stat.S_IMODE(path.stat().st_mode) == 0o711
    assert path.stat().st_mtime_ns == 22


def test_nothing_changes_on_a_read_only_session(source: Path) -> None:
    """EROFS, also for what changes nothing."""
    (source / "file").write_bytes(b"data")
    before = (source / "file").stat()
    with client_of(source, read_only=True) as client:
        fid = client.walk("file")
        for changes in (Changes(mode=0o777), Changes(size=0), Changes(mtime=0), Changes()):
            with fails(errno.EROFS):
                client.do(ops.setattr, fid, changes)
        assert client.do(ops.getattr, fid).mtime_ns == before.st_mtime_ns
    assert (source / "file").stat() == before


# readlink and statfs


@pytest.mark.parametrize(
    "target",
    [b"nowhere", b"/", b"..", b"../../../etc", b"symlink", b"\xff\xfe", b"x/" * 2047 + b"x"],
)
def test_a_symlink_says_what_it_was_made_with(client: Client, target: bytes) -> None:
    """Dangling, absolute, a loop, no UTF-8, very long: it is never looked at."""
    os.symlink(target, os.fsencode(client.source) + b"/symlink")
    fid = client.walk("symlink")
    assert client.do(ops.readlink, fid) == target
    (client.source / "symlink").unlink()
    assert client.do(ops.readlink, fid) == target


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "socket"])
def test_only_symlinks_are_read_as_such(kinds: Client, kind: str) -> None:
    """EINVAL, as readlink says."""
    with fails(errno.EINVAL):
        kinds.do(ops.readlink, kinds.walk(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_statfs_is_of_the_file_system_of_the_source(kinds: Client, kind: str) -> None:
    """From any file, open or not."""
    expected = os.statvfs(kinds.source)
    fids = [kinds.walk(kind)]
    if kind in ("file", "directory"):
        fids.append(kinds.open(kind))
    for fid in fids:
        found = kinds.do(ops.statfs, fid)
        assert (found.f_bsize, found.f_frsize, found.f_blocks, found.f_namemax) == (
            expected.f_bsize,
            expected.f_frsize,
            expected.f_blocks,
            expected.f_namemax,
        )


# What they have in common

EACH: dict[str, Callable[[Client, int], object]] = {
    "getattr": lambda client, fid: client.do(ops.getattr, fid),
    "setattr": lambda client, fid: client.do(ops.setattr, fid, Changes(mode=0o600, mtime=5)),
    "setattr of the size": lambda client, fid: client.do(ops.setattr, fid, Changes(size=1)),
    "statfs": lambda client, fid: client.do(ops.statfs, fid),
}


@pytest.mark.parametrize("operation", EACH)
def test_a_node_without_descriptor_is_opened_again(kinds: Client, operation: str) -> None:
    """By its parent and name; where these lead elsewhere, the file is out of reach: ESTALE."""
    known = kinds.know("directory")
    (kinds.source / "directory" / "inner").write_bytes(b"inner")
    inner = kinds.know("inner", start=known.number)
    for fid in (inner, known):
        kinds.lose_descriptor(fid)
    EACH[operation](kinds, inner.number)
    assert inner.node.fd >= 0
    kinds.lose_descriptor(inner)
    name = "inner"
    (kinds.source / "directory" / name).rename(kinds.source / "moved")
    (kinds.source / "directory" / name).write_bytes(b"another")
    with fails(errno.ESTALE):
        EACH[operation](kinds, inner.number)
    assert (kinds.source / "directory" / name).read_bytes() == b"another"
