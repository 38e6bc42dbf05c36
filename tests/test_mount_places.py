"""Directories and files that mounts in the source show at two places."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from file_systems import file_system, image, mounted
from mounting import Child, Mount, errno_of, in_child, run, wait_until
from servers import SOME_MODELS

from ninefuse.tree.qids import is_on_own_device

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts in the source"),
]

EXACT = 1 << 53


@contextlib.contextmanager
def bound(directory: Path, on: Path, options: str = "") -> Iterator[Path]:
    """A second place of a directory or file, for a while."""
    done = run("mount", "--bind", directory, on)
    assert done.returncode == 0, done.stderr
    try:
        if options:
            done = run("mount", "-o", f"remount,bind,{options}", on)
            assert done.returncode == 0, done.stderr
        yield on
    finally:
        run("umount", "-l", on)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    for name in ("home/project/data", "ftp/pub"):
        (path / name).mkdir(parents=True)
    return path


@pytest.fixture
def twice(source: Path) -> Iterator[Path]:
    """A source with a directory, home/project/data, that is also at ftp/pub."""
    data = source / "home/project/data"
    (data / "sub").mkdir()
    (data / "file").write_text("file")
    os.link(data / "file", data / "link")
    with bound(data, source / "ftp/pub"):
        yield source


def shown_at(path: Path) -> str:
    """What the kernel says is the path of a directory, in which somebody is."""
    fd = os.open(path, os.O_PATH)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def numbers_below(path: Path) -> dict[str, int]:
    found = {}
    for directory, _, files in os.walk(path):
        for name in (".", *files):
            one = os.path.normpath(os.path.join(directory, name))
            found[os.path.relpath(one, path)] = os.lstat(one).st_ino
    return found


@pytest.mark.parametrize("model", SOME_MODELS)
def test_up_from_a_directory_leads_to_where_one_came_from(
    new_mount: Callable[..., Mount], twice: Path, model: str
) -> None:
    """Whoever has looked at the other place meanwhile."""
    mount = new_mount("--model", model, "-o", "attr_timeout=0,entry_timeout=0", source=twice)
    ways = {"home/project/data": "home/project", "ftp/pub": "ftp"}
    directories = {way: os.open(mount.path / way, os.O_PATH | os.O_DIRECTORY) for way in ways}
    try:
        number = 0
        for _ in range(2):
            for way, up in ways.items():
                number += 1
                os.listdir(mount.path / way)
                for other, fd in directories.items():
                    where = os.readlink(f"/proc/self/fd/{fd}")
                    assert where == str(mount.path / other)
                name = f"../notes{number}"
                fd = os.open(name, os.O_CREAT | os.O_EXCL, dir_fd=directories[way])
                os.close(fd)
                assert (twice / up / name[3:]).exists()
                above = os.open("..", os.O_PATH, dir_fd=directories[way])
                assert os.fstat(above).st_ino == (mount.path / up).stat().st_ino
                os.close(above)
            # Deeper down, too.
            for way in ways:
                below = mount.path / way / "sub"
                assert shown_at(below) == str(below)
                up_again = os.stat(below / "..")
                assert up_again.st_ino == os.fstat(directories[way]).st_ino
    finally:
        for fd in directories.values():
            os.close(fd)


def test_what_is_done_at_one_place_is_seen_at_the_other(
    new_mount: Callable[..., Mount], twice: Path
) -> None:
    mount = new_mount(source=twice)
    one, other = mount.path / "home/project/data", mount.path / "ftp/pub"
    os.listdir(other)
    (one / "new").write_text("new")
    wait_until((other / "new").exists, "the new file, at the other place")
    assert (other / "new").read_text() == "new"
    (other / "new").write_text("changed")
    assert (one / "new").read_text() == "changed"
    os.rename(other / "new", other / "sub/moved")
    wait_until((one / "sub/moved").exists, "the moved file, at the other place")
    os.link(other / "sub/moved", other / "linked")
    os.link(one / "sub/moved", one / "linked2")
    assert errno_of(os.link, one / "file", other / "x") == errno.EXDEV, "as on the source"
    assert errno_of(os.rename, one / "file", other / "x") == errno.EXDEV
    assert errno_of(os.rmdir, other) == errno.EBUSY
    os.rename(one / "sub", one / "sub2")
    wait_until((other / "sub2/moved").exists, "the directory by its new name, at the other place")
    shutil.rmtree(other / "sub2")
    wait_until(lambda: not (one / "sub2").exists(), "the end of the directory")


def test_files_are_the_same_at_both_places_and_directories_are_not(
    new_mount: Callable[..., Mount], twice: Path
) -> None:
    """With one number: locks, hard links and what is in memory are the file's."""
    mount = new_mount(source=twice)
    one, other = mount.path / "home/project/data", mount.path / "ftp/pub"
    numbers = {os.lstat(path / name).st_ino for path in (one, other) for name in ("file", "link")}
    assert numbers == {(twice / "home/project/data/file").stat().st_ino}
    for name in (".", "sub"):
        assert (one / name).stat().st_ino == (twice / "home/project/data" / name).stat().st_ino
        second = (other / name).stat().st_ino
        assert (one / name).stat().st_ino != second < EXACT
        assert is_on_own_device(second)
    with open(one / "file") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with open(other / "file") as second_file:
            flags = fcntl.LOCK_SH | fcntl.LOCK_NB
            assert in_child(errno_of, fcntl.flock, second_file, flags) == errno.EWOULDBLOCK
    # ls -ia: what a listing says of itself is what stat says.
    done = subprocess.run(["ls", "-ia", other], capture_output=True, text=True, check=True)
    listed = {line.split()[1]: int(line.split()[0]) for line in done.stdout.splitlines()}
    assert listed["."] == other.stat().st_ino
    assert listed[".."] == (mount.path / "ftp").stat().st_ino
    assert listed["sub"] == (other / "sub").stat().st_ino
    # A copy keeps the hard links of both.
    copy = mount.path / "copy"
    subprocess.run(["cp", "-a", mount.path / "home", mount.path / "ftp", copy_to(copy)], check=True)
    assert (copy / "ftp/pub/link").stat().st_ino == (copy / "home/project/data/file").stat().st_ino


def copy_to(path: Path) -> Path:
    path.mkdir()
    return path


def test_numbers_at_a_second_place_are_the_same_each_time(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    """In whatever order it is looked at, though mounts are numbered anew."""
    data, found = source / "home/project/data", []
    (data / "sub").mkdir()
    (data / "file").touch()
    (source / "third").mkdir()
    for round in range(2):
        with ExitStack() as stack:
            places = [source / "ftp/pub", source / "third"]
            for place in places[:: -1 if round else 1]:
                stack.enter_context(bound(data, place))
            mount = new_mount(source=source)
            for place in places:
                os.listdir(mount.path / place.relative_to(source))
            found.append(numbers_below(mount.path))
            mount.end()
    assert found[0] == found[1]
    names = ["home/project/data/sub", "ftp/pub/sub", "third/sub"]
    assert len({found[0][name] for name in names}) == 3
    assert found[0][names[0]] == (data / "sub").stat().st_ino


def test_a_directory_from_beside_the_source_keeps_its_numbers(
    new_mount: Callable[..., Mount], source: Path, tmp_path: Path
) -> None:
    """There is no second place of it in the source."""
    beside = tmp_path / "beside"
    (beside / "sub").mkdir(parents=True)
    with bound(beside, source / "ftp/pub"):
        mount = new_mount(source=source)
        assert (mount.path / "ftp/pub/sub").stat().st_ino == (beside / "sub").stat().st_ino
        mount.end()


@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_source_that_is_bound_in_itself(
    new_mount: Callable[..., Mount], source: Path, model: str
) -> None:
    """It ends somewhere, as on the source."""
    (source / "self").mkdir()
    (source / "file").write_text("file")
    with bound(source, source / "self"), bound(source / "home", source / "self/home/project"):
        mount = new_mount("--model", model, source=source)
        within = mount.path / "self"
        assert sorted(os.listdir(within)) == sorted(os.listdir(source))
        assert (within / "file").read_text() == "file"
        assert within.stat().st_ino != mount.path.stat().st_ino
        assert os.path.samestat((within / "..").stat(), mount.path.stat())
        (within / "ftp/new").write_text("new")
        assert (source / "ftp/new").read_text() == "new"
        assert shown_at(within / "ftp/pub") == str(within / "ftp/pub")
        for words in (["find"], ["ls", "-lR"], ["du", "-a"]):
            subprocess.run([*words, mount.path], check=True, stdout=subprocess.DEVNULL, timeout=20)
        mount.end()


def test_a_file_system_that_is_mounted_twice(new_mount: Callable[..., Mount], source: Path) -> None:
    (source / "zz").mkdir()
    with mounted("tmpfs", "tmpfs", source / "z/memory", "size=4m") as memory:
        (memory / "sub/deep").mkdir(parents=True)
        (memory / "file").touch()
        alone = new_mount(source=source)
        before = numbers_below(alone.path / "z/memory")
        alone.end()
        # Once whole, and a part of it.
        with bound(memory / "sub", source / "ftp/pub"), bound(memory, source / "zz"):
            mount = new_mount(source=source)
            ways = [mount.path / way for way in ("z/memory/sub", "ftp/pub", "zz/sub")]
            for way in (*ways, *ways[::-1]):
                assert shown_at(way / "deep") == str(way / "deep")
                assert not any(map(is_on_own_device, numbers_below(way).values()))
            assert len({(way / "deep").stat().st_ino for way in ways}) == 3
            assert numbers_below(mount.path / "z/memory") == before
            assert (mount.path / "zz/file").stat().st_ino == before["file"]
            mount.end()


# Where the mounts differ


def test_a_place_that_is_read_only_is_so_whoever_has_used_the_other(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    data = source / "home/project/data"
    (data / "file").write_text("file")
    with bound(data, source / "ftp/pub", "ro"):
        mount = new_mount("-o", "attr_timeout=0,entry_timeout=0", source=source)
        one, other = mount.path / "home/project/data/file", mount.path / "ftp/pub/file"
        for order in ((one, other), (other, one)):
            for path in order:
                path.read_text()
            (data / "file").chmod(0o644)
            one.write_text("written")
            one.chmod(0o600)
            assert errno_of(other.write_text, "refused") == errno.EROFS
            assert errno_of(other.chmod, 0o644) == errno.EROFS
            assert errno_of(os.utime, other) == errno.EROFS
            assert other.read_text() == "written"
        # With the same rights again, it is the same file again.
        run("mount", "-o", "remount,bind,rw", source / "ftp/pub")
        other.write_text("also")
        assert one.read_text() == "also"
        assert other.stat().st_ino == one.stat().st_ino
        mount.end()


def test_set_id_bits_of_one_place_do_not_show_at_the_other(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    data = source / "home/project/data"
    (data / "program").touch()
    (data / "program").chmod(0o4755)
    with bound(data, source / "ftp/pub", "nosuid"):
        options = "suid,dev,allow_other,attr_timeout=10,entry_timeout=10"
        mount = new_mount("-o", options, source=source)
        one, other = mount.path / "home/project/data/program", mount.path / "ftp/pub/program"
        for path in (one, other, one, other):
            assert path.stat().st_mode & 0o7777 == (0o4755 if path is one else 0o755)
        mount.end()


def test_a_place_with_other_owners(new_mount: Callable[..., Mount], source: Path) -> None:
    """An idmapped mount."""
    data = source / "home/project/data"
    (data / "sub").mkdir()
    (data / "file").touch()
    bind_with_owner(1234, data, source / "ftp/pub")
    try:
        mount = new_mount(source=source)
        for _ in range(2):
            for name in ("file", "sub"):
                assert (mount.path / "home/project/data" / name).stat().st_uid == 0
                assert (mount.path / "ftp/pub" / name).stat().st_uid == 1234
        mount.end()
    finally:
        run("umount", "-l", source / "ftp/pub")


def bind_with_owner(uid: int, directory: Path, on: Path) -> None:
    """Bind a directory, with what is root's another user's (mount_setattr(2))."""
    holder = subprocess.Popen(["unshare", "-U", "sleep", "60"])
    try:
        own = os.readlink("/proc/self/ns/user")
        ns = Path(f"/proc/{holder.pid}/ns/user")
        wait_until(lambda: os.readlink(ns) != own, "a user namespace")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text(f"0 {uid} 1")
        fd = os.open(ns, os.O_RDONLY)
        try:
            call = ctypes.CDLL(None, use_errno=True).syscall
            path, number = ctypes.c_char_p, ctypes.c_long
            tree = call(number(428), number(-100), path(os.fsencode(directory)), number(1))
            attributes = struct.pack("=QQQQ", 0x100000, 0, 0, fd)  # MOUNT_ATTR_IDMAP
            size, empty = number(len(attributes)), path(b"")
            done = call(number(442), number(tree), empty, number(0x1000), path(attributes), size)
            if done:
                pytest.skip(f"no idmapped mounts here: {os.strerror(ctypes.get_errno())}")
            target = path(os.fsencode(on))
            done = call(number(429), number(tree), empty, number(-100), target, number(4))
            assert done == 0, os.strerror(ctypes.get_errno())
            os.close(tree)
        finally:
            os.close(fd)
    finally:
        holder.kill()
        holder.wait()


# Other things that are found twice


def test_a_file_that_is_bound_elsewhere(new_mount: Callable[..., Mount], source: Path) -> None:
    (source / "home/file").write_text("file")
    (source / "ftp/place").touch()
    with bound(source / "home/file", source / "ftp/place"):
        mount = new_mount(source=source)
        one, other = mount.path / "home/file", mount.path / "ftp/place"
        assert one.stat().st_ino == other.stat().st_ino == (source / "home/file").stat().st_ino
        other.write_text("by its other place")
        assert one.read_text() == "by its other place"
        assert errno_of(other.unlink) == errno.EBUSY
        assert errno_of(os.rename, other, mount.path / "ftp/moved") == errno.EBUSY
        one.rename(mount.path / "home/moved")
        assert other.read_text() == "by its other place"
        (mount.path / "home/moved").unlink()
        assert other.read_text() == "by its other place"
        assert other.stat().st_nlink == 0
        mount.end()


def test_directories_of_an_overlay_that_is_bound_elsewhere(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    def plant(lower: Path) -> None:
        (lower / "sub/deep").mkdir(parents=True)
        (lower / "sub/file").write_text("low")

    for kind in ("overlayfs", "overlayfs of two"):
        base = source / kind.replace(" ", "-")
        with (
            file_system(kind, base, plant) as merged,
            bound(merged / "sub", source / "ftp/pub"),
        ):
            mount = new_mount(source=source)
            ways = [mount.path / merged.relative_to(source) / "sub", mount.path / "ftp/pub"]
            lower = mount.path / base.relative_to(source) / "first/lower/sub"
            for way in (*ways, lower, *ways[::-1]):
                assert shown_at(way / "deep") == str(way / "deep")
                assert (way / "file").read_text() == "low"
            (ways[0] / "file").write_text("copied up")
            assert (ways[1] / "file").read_text() == "copied up"
            assert (lower / "file").read_text() == "low"
            mount.end()


def test_subvolumes_and_snapshots_with_the_same_numbers(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    """Two subvolumes of btrfs, one of them also mounted by itself, and a snapshot."""
    if shutil.which("btrfs") is None:
        pytest.skip("there is no btrfs")
    with image("btrfs", source) as disk:
        for words in (["create", "one"], ["create", "two"]):
            done = run("btrfs", "subvolume", words[0], disk / words[1])
            assert done.returncode == 0, done.stderr
        for name in ("one", "two"):
            (disk / name / "sub").mkdir()
            (disk / name / "sub/file").write_text(name)
        done = run("btrfs", "subvolume", "snapshot", disk / "one", disk / "shot")
        assert done.returncode == 0, done.stderr
        (disk / "one/sub/file").write_text("one, later")
        expected = {"one": "one, later", "two": "two", "shot": "one"}
        assert len({(disk / name / "sub").stat().st_ino for name in expected}) == 1
        with bound(disk / "one", source / "ftp/pub"):
            mount = new_mount(source=source)
            for _ in range(2):
                for name, text in expected.items():
                    way = mount.path / "disk" / name / "sub"
                    assert shown_at(way) == str(way)
                    assert (way / "file").read_text() == text
                way = mount.path / "ftp/pub/sub"
                assert shown_at(way) == str(way)
                assert (way / "file").read_text() == "one, later"
            assert len(set(numbers_below(mount.path / "disk").values())) == 1 + 3 * 3
            mount.end()


def test_a_mount_that_is_made_anew_is_found_anew(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    """The one before, taken away while it was in use, is not looked at any more."""
    with mounted("tmpfs", "tmpfs", source / "kept", "size=1m") as memory:
        (memory / "sub").mkdir()
        (memory / "sub/file").write_text("file")
        mount = new_mount("-o", "attr_timeout=0,entry_timeout=0", source=source)
        with bound(memory, source / "ftp/pub"), Child(stay_in, mount.path / "ftp/pub/sub"):
            (mount.path / "ftp/pub/sub/file").write_text("first")
        with bound(memory, source / "ftp/pub", "ro"):
            assert (mount.path / "ftp/pub/sub/file").read_text() == "first"
            path = mount.path / "ftp/pub/sub/new"
            assert errno_of(path.write_text, "second") == errno.EROFS
            assert errno_of((mount.path / "ftp/pub/sub/file").write_text, "x") == errno.EROFS
        mount.end()


def stay_in(path: Path) -> None:
    os.chdir(path)
    os.read(os.pipe()[0], 1)
