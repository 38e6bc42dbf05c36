"""Attributes and owners of files, through real mounts under each of the threading models."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Child, Mount, Place, become, errno_of, in_child
from trees import has_user_attributes, plant, tree

pytestmark = pytest.mark.soak

NOBODY = 65534
AS_ROOT = os.geteuid() == 0


# Trees


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--", source, target], check=True, timeout=30)


def test_a_tree_copied_from_the_mount_equals_the_source(place: Place, tmp_path: Path) -> None:
    plant(place.source / "tree")
    copy(place.path / "tree", tmp_path / "copy")
    expected = tree(place.source / "tree")
    assert len(expected) > 30
    assert tree(tmp_path / "copy") == expected


def test_a_tree_copied_to_the_mount_equals_the_original(place: Place, tmp_path: Path) -> None:
    plant(tmp_path / "tree")
    copy(tmp_path / "tree", place.path / "copy")
    expected = tree(tmp_path / "tree")
    assert tree(place.source / "copy") == expected
    assert tree(place.path / "copy") == expected


def test_every_attribute_of_a_tree_is_that_of_the_source(place: Place) -> None:
    plant(place.source / "tree")
    for path in [place.path / "tree", *(place.path / "tree").rglob("*")]:
        found = path.lstat()
        source = (place.source / path.relative_to(place.path)).lstat()
        for name in (
            *("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_rdev"),
            *("st_blocks", "st_mtime_ns", "st_ctime_ns"),
        ):
            assert getattr(found, name) == getattr(source, name), (path, name)


def test_a_tree_removed_through_the_mount_is_gone(place: Place) -> None:
    plant(place.source / "tree")
    subprocess.run(["rm", "-r", place.path / "tree"], check=True, timeout=30)
    assert os.listdir(place.source) == []
    assert os.listdir(place.path) == []


def test_a_program_on_the_mount_runs(place: Place) -> None:
    plant(place.source / "tree")
    done = subprocess.run([place.path / "tree/script"], check=False, timeout=20)
    assert done.returncode == 7


# Times


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo"])
def test_times_are_kept_to_the_nanosecond(place: Place, kind: str) -> None:
    path = place.path / "it"
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to("nowhere")
    else:
        os.mkfifo(path)
    moments = (
        (1_234_567_890_123_456_789, 987_654_321_987_654_321),
        (1, 999_999_999),
        (0, 2**31 * 10**9 + 1),
        (-1_000_000_001, -1),
    )
    for atime, mtime in moments:
        os.utime(path, ns=(atime, mtime), follow_symlinks=False)
        source = (place.source / "it").lstat()
        # Some file systems cannot keep them all: what the source has counts.
        os.utime(place.source / "it", ns=(atime, mtime), follow_symlinks=False)
        expected = (place.source / "it").lstat()
        assert (source.st_atime_ns, source.st_mtime_ns) == (
            expected.st_atime_ns,
            expected.st_mtime_ns,
        )
        found = path.lstat()
        assert (found.st_atime_ns, found.st_mtime_ns) == (atime, mtime)


def test_touch_means_now(place: Place) -> None:
    path = place.path / "file"
    path.touch()
    os.utime(path, ns=(5, 6))
    before = time.time_ns() - 20_000_000  # the kernel's clock ticks
    os.utime(path)
    source = (place.source / "file").stat()
    assert before <= source.st_mtime_ns <= time.time_ns()
    assert before <= source.st_atime_ns <= time.time_ns()


def test_one_time_is_set_and_the_other_left_alone(place: Place) -> None:
    path = place.path / "file"
    path.touch()
    os.utime(path, ns=(111, 222))
    subprocess.run(["touch", "-a", "-d", "@7.000000009", path], check=True, timeout=20)
    source = (place.source / "file").stat()
    assert (source.st_atime_ns, source.st_mtime_ns) == (7_000_000_009, 222)
    subprocess.run(["touch", "-m", "-d", "@8.000000001", path], check=True, timeout=20)
    source = (place.source / "file").stat()
    assert (source.st_atime_ns, source.st_mtime_ns) == (7_000_000_009, 8_000_000_001)


def test_writing_and_truncating_move_the_times_forward(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"x")
    os.utime(path, ns=(5, 6))
    changed = path.stat().st_ctime_ns
    time.sleep(0.02)
    with open(path, "ab", buffering=0) as file:
        file.write(b"y")
        assert os.fstat(file.fileno()).st_mtime_ns > 6
    assert (place.source / "file").stat().st_mtime_ns > 6
    assert path.stat().st_ctime_ns > changed
    os.utime(path, ns=(5, 6))
    os.truncate(path, 0)
    assert path.stat().st_mtime_ns == (place.source / "file").stat().st_mtime_ns > 6


def test_a_change_below_a_directory_shows_in_its_times_and_links(place: Place) -> None:
    (place.path / "directory").mkdir()
    directory = place.path / "directory"
    os.utime(directory, ns=(5, 6))
    (directory / "below").mkdir()
    found, source = directory.stat(), (place.source / "directory").stat()
    assert found.st_mtime_ns == source.st_mtime_ns > 6
    assert found.st_nlink == source.st_nlink


# Modes


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o777])
def test_new_files_get_the_mode_asked_for_less_the_umask(place: Place, mask: int) -> None:
    def make() -> None:
        os.umask(mask)
        os.close(os.open(place.path / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.close(os.open(place.path / "suid", os.O_CREAT | os.O_WRONLY, 0o4755))
        os.mkdir(place.path / "directory", 0o777)
        os.mkdir(place.path / "sticky", 0o1777)
        os.mkfifo(place.path / "fifo", 0o666)

    in_child(make)
    for name, asked in (
        ("file", 0o666),
        ("suid", 0o4755),
        ("directory", 0o777),
        ("sticky", 0o1777),
        ("fifo", 0o666),
    ):
        expected = asked & ~(mask & 0o777)
        assert stat.S_IMODE((place.source / name).stat().st_mode) == expected, name
        assert stat.S_IMODE((place.path / name).stat().st_mode) == expected, name
        (place.path / name).chmod(0o700)


def test_chmod_sets_all_twelve_bits(place: Place) -> None:
    (place.path / "file").touch()
    (place.path / "directory").mkdir()
    for name in ("file", "directory"):
        for mode in (0o000, 0o7777, 0o4711, 0o2755, 0o1777, 0o644):
            (place.path / name).chmod(mode)
            assert stat.S_IMODE((place.source / name).stat().st_mode) == mode
            assert stat.S_IMODE((place.path / name).stat().st_mode) == mode
        (place.path / name).chmod(0o700)


def test_chown_to_oneself_is_allowed(place: Place) -> None:
    (place.path / "file").touch()
    os.chown(place.path / "file", os.geteuid(), -1)
    os.chown(place.path / "file", -1, os.getegid())
    source = (place.source / "file").stat()
    assert (source.st_uid, source.st_gid) == (os.geteuid(), os.getegid())


@pytest.mark.skipif(not AS_ROOT, reason="needs root: gives files away")
def test_chown_gives_files_and_links_away(place: Place) -> None:
    (place.path / "file").touch()
    (place.path / "link").symlink_to("file")
    os.chown(place.path / "file", 1001, 1002)
    os.chown(place.path / "link", 1003, 1004, follow_symlinks=False)
    os.chown(place.path / "file", -1, 1005)
    found = [(p / n).lstat() for p in (place.source, place.path) for n in ("file", "link")]
    assert [(s.st_uid, s.st_gid) for s in found] == [(1001, 1005), (1003, 1004)] * 2


# Extended attributes


@pytest.fixture
def attributed(place: Place) -> Path:
    """A file on the mount, of a source that has user attributes."""
    if not has_user_attributes(place.source):
        pytest.skip("the source file system has no user attributes")
    (place.path / "file").touch()
    return place.path / "file"


def test_attributes_are_set_listed_read_and_removed(place: Place, attributed: Path) -> None:
    source = place.source / "file"
    os.setxattr(attributed, "user.one", b"1")
    os.setxattr(attributed, "user.bytes", bytes(range(256)))
    assert {"user.one", "user.bytes"} <= set(os.listxattr(attributed))
    assert os.listxattr(attributed) == os.listxattr(source)
    assert os.getxattr(attributed, "user.bytes") == bytes(range(256))
    os.setxattr(attributed, "user.one", b"other")
    assert os.getxattr(source, "user.one") == b"other"
    os.removexattr(attributed, "user.one")
    assert errno_of(os.getxattr, attributed, "user.one") == errno.ENODATA
    assert errno_of(os.removexattr, attributed, "user.one") == errno.ENODATA
    assert "user.one" not in os.listxattr(source)


def test_create_and_replace_of_an_attribute(place: Place, attributed: Path) -> None:
    replace = errno_of(os.setxattr, attributed, "user.a", b"1", os.XATTR_REPLACE)
    assert replace == errno.ENODATA
    os.setxattr(attributed, "user.a", b"1", os.XATTR_CREATE)
    create = errno_of(os.setxattr, attributed, "user.a", b"2", os.XATTR_CREATE)
    assert create == errno.EEXIST
    assert os.getxattr(place.source / "file", "user.a") == b"1"
    os.setxattr(attributed, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(place.source / "file", "user.a") == b"3"


def test_an_empty_attribute_is_there(place: Place, attributed: Path) -> None:
    os.setxattr(attributed, "user.empty", b"")
    assert os.getxattr(attributed, "user.empty") == b""
    assert "user.empty" in os.listxattr(place.source / "file")


@pytest.mark.parametrize("size", [3000, 4096, 65536, 65537])
def test_big_attributes_fare_as_in_the_source(place: Place, attributed: Path, size: int) -> None:
    value = os.urandom(size)
    (place.source / "other").touch()
    expected = errno_of(os.setxattr, place.source / "other", "user.big", value)
    assert errno_of(os.setxattr, attributed, "user.big", value) == expected
    if not expected:
        assert os.getxattr(attributed, "user.big") == value
        assert os.getxattr(place.source / "file", "user.big") == value


def test_attributes_of_directories_and_of_names_nobody_knows(
    place: Place, attributed: Path
) -> None:
    os.setxattr(place.path, "user.directory", b"d")
    assert os.getxattr(place.source, "user.directory") == b"d"
    (place.source / "other").touch()
    for name in ("nospace.x", "user." + "n" * 250, "user." + "n" * 251, "system.nonsense"):
        expected = errno_of(os.setxattr, place.source / "other", name, b"x")
        assert errno_of(os.setxattr, attributed, name, b"x") == expected, name


def test_attributes_of_an_unlinked_file(attributed: Path) -> None:
    with open(attributed, "rb") as file:
        attributed.unlink()
        os.setxattr(file.fileno(), "user.late", b"x")
        assert os.getxattr(file.fileno(), "user.late") == b"x"


def test_noxattr_switches_attributes_off(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "noxattr")
    path = mount.path / "file"
    path.write_bytes(b"x")
    for _ in range(2):
        assert errno_of(os.setxattr, path, "user.a", b"1") == errno.EOPNOTSUPP
        assert errno_of(os.getxattr, path, "user.a") == errno.EOPNOTSUPP
        assert errno_of(os.removexattr, path, "user.a") == errno.EOPNOTSUPP
    path.write_bytes(b"y")


# The file system


def test_statfs_is_that_of_the_source(place: Place) -> None:
    found, source = os.statvfs(place.path), os.statvfs(place.source)
    for name in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(found, name) == getattr(source, name), name
    assert 0 < found.f_bavail <= found.f_blocks


def test_a_read_only_mount_changes_nothing(new_mount: Callable[..., Mount], tmp_path: Path) -> None:
    source = tmp_path / "source"
    plant(source)
    before = tree(source)
    mount = new_mount("-o", "ro", source=source)
    top = mount.path
    assert tree(top) == before
    for code in (
        errno_of((top / "new").touch),
        errno_of((top / "new").mkdir),
        errno_of((top / "script").unlink),
        errno_of((top / "empty").rmdir),
        errno_of((top / "new").symlink_to, "x"),
        errno_of(os.link, top / "script", top / "new"),
        errno_of(os.rename, top / "script", top / "new"),
        errno_of(os.open, top / "script", os.O_RDWR),
        errno_of(os.open, top / "script", os.O_RDONLY | os.O_TRUNC),
        errno_of((top / "script").chmod, 0o600),
        errno_of(os.chown, top / "script", 0, 0),
        errno_of(os.utime, top / "script"),
        errno_of(os.truncate, top / "script", 0),
        errno_of(os.setxattr, top / "script", "user.x", b"x"),
        errno_of(os.mkfifo, top / "new"),
    ):
        assert code == errno.EROFS
    assert tree(source) == before


# Other users


@pytest.fixture
def open_to_all(new_mount: Callable[..., Mount], request: pytest.FixtureRequest) -> Mount:
    """A mount of root's that lets everybody in, under each of the threading models."""
    mount = new_mount("--model", request.param, "-o", "allow_other")
    mount.source.chmod(0o1777)
    return mount


each_model_open_to_all = pytest.mark.parametrize(
    "open_to_all", ["none", "first", "second"], indirect=True
)
needs_two_users = pytest.mark.skipif(not AS_ROOT, reason="needs root: acts as another user")


@needs_two_users
@each_model_open_to_all
def test_what_a_user_makes_belongs_to_that_user(open_to_all: Mount) -> None:
    def make() -> None:
        os.chdir(open_to_all.path)
        become(NOBODY, [4321])
        os.umask(0o022)
        Path("file").write_bytes(b"x")
        Path("directory").mkdir()
        Path("directory/below").write_bytes(b"x")
        Path("link").symlink_to("file")
        os.mkfifo("fifo")
        os.link("file", "hard")
        os.chown("file", -1, 4321)  # a group of one's own
        for name in ("file", "directory", "link"):
            s = os.lstat(name)
            assert (s.st_uid, s.st_gid) == (NOBODY, 4321 if name == "file" else NOBODY)

    in_child(make)
    for path in open_to_all.source.rglob("*"):
        found = path.lstat()
        group = 4321 if path.name in ("file", "hard") else NOBODY
        assert (found.st_uid, found.st_gid) == (NOBODY, group), path


@needs_two_users
@each_model_open_to_all
def test_a_user_s_and_root_s_files_made_at_once_are_not_mixed_up(open_to_all: Mount) -> None:
    def make(uid: int) -> None:
        os.chdir(open_to_all.path)
        if uid:
            become(uid)
        for n in range(60):
            Path(f"{uid}-{n}").touch()
            Path(f"{uid}-{n}-directory").mkdir()

    for child in [Child(make, uid) for uid in (0, 1001, 1002, NOBODY)]:
        with child:
            child.result()
    for path in open_to_all.source.iterdir():
        found = path.stat()
        assert found.st_uid == found.st_gid == int(path.name.split("-")[0]), path


def _plant_rights(base: Path) -> None:
    """Files and directories that a user may do more or less with."""
    base.mkdir()
    base.chmod(0o755)
    for name, mode, uid, gid in (
        ("secret", 0o600, 0, 0),
        ("readable", 0o644, 0, 0),
        ("writable", 0o666, 0, 0),
        ("group", 0o640, 0, 4321),
        ("no-group", 0o604, 0, 4321),
        ("own", 0o600, NOBODY, NOBODY),
        ("own-none", 0o000, NOBODY, NOBODY),
        ("suid", 0o6777, 0, 0),
    ):
        (base / name).write_bytes(b"#!/bin/true\n")
        os.chown(base / name, uid, gid)
        (base / name).chmod(mode)
    for name, mode, uid in (
        ("closed", 0o700, 0),
        ("look", 0o755, 0),
        ("pass", 0o711, 0),
        ("blind", 0o733, 0),
        ("open", 0o777, 0),
        ("sticky", 0o1777, 0),
        ("setgid", 0o2777, 0),
        ("mine", 0o755, NOBODY),
    ):
        (base / name).mkdir()
        (base / name / "file").write_bytes(b"below")
        (base / name / "file").chmod(0o644)
        (base / name / "owned").mkdir()
        os.chown(base / name / "owned", NOBODY, NOBODY)
        os.chown(base / name, uid, 4321 if name == "setgid" else uid)
        (base / name).chmod(mode)


def _try_rights(base: Path) -> list[tuple[str, object]]:
    """As a user: what each of many calls leads to."""
    os.chdir(base)
    become(NOBODY, [NOBODY, 4321])
    os.umask(0o002)
    results: list[tuple[str, object]] = []

    def attempt(function: Callable[..., object], *args: object, **kwargs: object) -> None:
        code = errno_of(function, *args, **kwargs)
        results.append((f"{function.__name__}{args}{kwargs}", errno.errorcode.get(code, code)))

    for name in (
        *("secret", "readable", "writable", "group", "no-group", "own", "own-none", "suid"),
        *(f"{d}/file" for d in ("closed", "look", "pass", "blind", "open", "sticky", "mine")),
    ):
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            attempt(os.open, name, flags)
        modes = (os.R_OK, os.W_OK, os.X_OK)
        results.extend((f"access {name} {mode}", os.access(name, mode)) for mode in modes)
        attempt(os.truncate, name, 3)
        attempt(os.utime, name)
        attempt(os.utime, name, ns=(1, 2))
        attempt(os.chmod, name, 0o7777)
        attempt(os.chown, name, 0, 0)
        attempt(os.chown, name, NOBODY, 4321)
        attempt(os.setxattr, name, "user.x", b"x")
        attempt(os.getxattr, name, "user.x")
        attempt(os.setxattr, name, "trusted.x", b"x")
        attempt(os.link, name, f"open/linked-{name.replace('/', '-')}")
    for name in ("closed", "look", "pass", "blind", "open", "sticky", "setgid", "mine"):
        attempt(os.listdir, name)
        attempt(os.stat, f"{name}/file")
        attempt(os.open, f"{name}/new", os.O_CREAT | os.O_WRONLY, 0o666)
        attempt(os.mkdir, f"{name}/new-directory")
        attempt(os.symlink, "x", f"{name}/new-link")
        attempt(os.rename, f"{name}/file", f"{name}/renamed")
        attempt(os.rename, f"{name}/owned", f"{name}/owned-too")
        attempt(os.unlink, f"{name}/renamed")
        attempt(os.rmdir, f"{name}/owned-too")
        attempt(os.mknod, f"{name}/device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        attempt(os.rename, "writable", f"{name}/moved")
    return results


def _describe(base: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path.relative_to(base)): (s.st_mode, s.st_uid, s.st_gid)
        for path in [base, *base.rglob("*")]
        for s in [path.lstat()]
    }


@needs_two_users
@each_model_open_to_all
def test_a_user_has_the_rights_that_the_source_would_give(open_to_all: Mount) -> None:
    _plant_rights(open_to_all.source / "direct")
    _plant_rights(open_to_all.source / "mounted")
    expected = in_child(_try_rights, open_to_all.source / "direct")
    found = in_child(_try_rights, open_to_all.path / "mounted")
    assert found == expected
    assert {result for _, result in found} >= {"EACCES", "EPERM", 0, True}
    direct = _describe(open_to_all.source / "direct")
    assert _describe(open_to_all.source / "mounted") == direct
    assert _describe(open_to_all.path / "mounted") == direct


@needs_two_users
def test_writing_by_another_user_clears_set_user_id(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "allow_other")
    (mount.source / "file").write_bytes(b"x")
    (mount.source / "file").chmod(0o6777)

    def write() -> None:
        os.chdir(mount.path)
        become(NOBODY)
        with open("file", "ab") as file:
            file.write(b"y")

    in_child(write)
    assert stat.S_IMODE((mount.source / "file").stat().st_mode) == 0o777


@needs_two_users
def test_without_allow_other_nobody_else_gets_in(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount()
    mount.source.chmod(0o777)
    (mount.source / "file").write_bytes(b"x")

    def look() -> tuple[int, int]:
        os.chdir(mount.path.parent)
        become(NOBODY)
        return errno_of(os.listdir, "mount"), errno_of(os.open, "mount/file", os.O_RDONLY)

    assert in_child(look) == (errno.EACCES, errno.EACCES)
