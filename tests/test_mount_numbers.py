"""Inode numbers on a mount: below 2**53, and the same after each mount and each boot.

The files of the source's own file system have its numbers. Those of others mounted in it have
numbers of our making, which backups (borg, tar -g) and programs that keep numbers in doubles
(node.js) rely on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from file_systems import SBIN, mounted, overlay
from mounting import Mount, run, wait_until

from ninefuse.linux.filesystems import uuid_of_file_system

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount file systems")

EXACT = 1 << 53  # whole numbers below it are apart in a double, too


@contextlib.contextmanager
def made_anew(new_mount: Callable[..., Mount], source: Path) -> Iterator[Path]:
    """A mount for a while."""
    mount = new_mount(source=source)
    try:
        yield mount.path
    finally:
        mount.end()


def looked_at(
    new_mount: Callable[..., Mount], source: Path, names: Sequence[str]
) -> dict[str, int]:
    """The numbers of files on a mount of its own, looked at in this order."""
    with made_anew(new_mount, source) as path:
        found = {name: (path / name).lstat().st_ino for name in names}
        listed: dict[str, int] = {}
        for name in names:
            with os.scandir(path / os.path.dirname(name)) as entries:
                listed |= {e.path: e.inode() for e in entries}
        assert {name: listed[str(path / name)] for name in names} == found
    assert max(found.values()) < EXACT
    assert len(set(found.values())) == len(names)
    return found


def make_file_system(kind: str, file: Path) -> None:
    make = shutil.which(f"mkfs.{kind}", path=SBIN)
    if make is None or not os.path.exists("/dev/loop-control"):
        pytest.skip(f"no {kind} can be made here")
    with open(file, "wb") as new:
        new.truncate(320 << 20)
    done = run(make, "-q", file)
    assert done.returncode == 0, done.stderr


def test_the_order_of_looking_changes_no_number(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """Nor does a boot, after which a file system in memory is another one."""
    source = tmp_path / "source"
    names = ["file", *(f"{d}/{n}" for d in ("d1", "d2") for n in "ab"), "d1", "d2"]
    found = []
    for round in range(2):
        with ExitStack() as stack:
            for name in ("d1", "d2") if round else ("d2", "d1"):
                top = stack.enter_context(mounted("tmpfs", "tmpfs", source / name, "size=1m"))
                for file in "ab":
                    (top / file).touch()
            (source / "file").touch()
            found.append(looked_at(new_mount, source, names))
            found.append(looked_at(new_mount, source, names[::-1]))
    assert all(numbers == found[0] for numbers in found)
    assert found[0]["file"] == (source / "file").stat().st_ino, "the source's own"


@pytest.mark.parametrize("kind", ["ext4", "btrfs", "xfs"])
def test_a_disk_has_its_numbers_wherever_it_is_mounted(
    new_mount: Callable[..., Mount], tmp_path: Path, kind: str
) -> None:
    """By its UUID, or what the file system makes of it."""
    source, found = tmp_path / "source", []
    make_file_system(kind, tmp_path / "image")
    with ExitStack() as held:
        for place in ("one", "other/two"):
            with mounted(kind, tmp_path / "image", source / place, "loop") as disk:
                for name in "abc":
                    (disk / name).touch()
                fd = os.open(disk, os.O_PATH)
                has_uuid = kind != "xfs" or uuid_of_file_system(fd)
                os.close(fd)
                if not has_uuid:
                    pytest.skip("before Linux 6.9 its place is all that tells it from others")
                numbers = looked_at(new_mount, source, [f"{place}/{name}" for name in "cab"])
                found.append({name[-1]: number for name, number in numbers.items()})
            # The next loop device has another number.
            if not found[1:]:
                (tmp_path / "hold").write_bytes(bytes(1 << 20))
                done = run("losetup", "-f", "--show", tmp_path / "hold")
                assert done.returncode == 0, done.stderr
                held.callback(run, "losetup", "-d", done.stdout.strip())
    assert found[0] == found[1]


def test_two_copies_of_a_disk_are_told_apart(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """They have one UUID, and the same numbers within."""
    source = tmp_path / "source"
    make_file_system("ext4", tmp_path / "one")
    shutil.copy(tmp_path / "one", tmp_path / "two")
    with ExitStack() as stack:
        names = []
        for disk in ("one", "two"):
            top = stack.enter_context(mounted("ext4", tmp_path / disk, source / disk, "loop"))
            for name in "abc":
                (top / name).write_text(f"{disk} {name}")
                names.append(f"{disk}/{name}")
        with made_anew(new_mount, source) as path:
            for _ in range(2):
                numbers = [(path / name).stat().st_ino for name in names]
                assert len(set(numbers)) == len(names)
                assert max(numbers) < EXACT
            for name in names:
                assert (path / name).read_text() == name.replace("/", " ")


@pytest.mark.parametrize("one", [True, False], ids=["one", "two"])
def test_overlays_below_the_source_are_told_apart(
    new_mount: Callable[..., Mount], tmp_path: Path, one: bool
) -> None:
    """Their own ids may be those of the file system beneath."""
    source = tmp_path / "source"
    source.mkdir()

    def plant(lower: Path) -> None:
        for name in "ab":
            (lower / name).write_text(name)

    with ExitStack() as stack:
        names = []
        for base in ("x", "y"):
            top = stack.enter_context(overlay(source / base, one, plant))
            (top / "c").write_text("upper")
            names += [f"{base}/overlay/{name}" for name in "abc"]
        found = looked_at(new_mount, source, names)
        assert looked_at(new_mount, source, names[::-1]) == found


def test_a_fuse_mount_in_the_source_has_its_numbers_each_time(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """Whoever may mount there does so as often as he likes, and uses nothing up."""
    source, behind = tmp_path / "source", tmp_path / "behind"
    (source / "point").mkdir(parents=True)
    behind.mkdir()
    (behind / "file").write_bytes(b"x")
    outer = new_mount("-o", "cache=none", source=source)
    seen = set()
    for _ in range(3):
        inner = new_mount(source=behind)
        done = run("mount", "--bind", inner.path, source / "point")
        assert done.returncode == 0, done.stderr
        try:
            assert (outer.path / "point/file").read_bytes() == b"x"
            seen.add((outer.path / "point/file").stat().st_ino)
        finally:
            run("umount", "-l", source / "point")
        wait_until(lambda: not (outer.path / "point/file").exists(), "the mount point, empty")
        os.listdir(outer.path)
    assert len(seen) == 1
    assert max(seen) < EXACT
