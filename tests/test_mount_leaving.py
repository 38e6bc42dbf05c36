"""Disks that are mounted in the source can be unmounted again, once nobody uses them."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from file_systems import image, mounted
from mounting import SOAK, Child, Mount, errno_of, run, wait_until
from ops_helpers import client_of

from ninefuse.linux.syscalls import stat_descriptor
from ninefuse.settings import MODELS
from ninefuse.tree import leaving

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts in the source"),
]

SOON = 2.0  # seconds after the last use


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def stick(source: Path) -> Iterator[Path]:
    """A file system in memory, mounted in the source."""
    with mounted("tmpfs", "tmpfs", source / "stick", "size=16m") as path:
        (path / "directory").mkdir()
        (path / "file").write_text("file")
        (path / "directory" / "below").write_text("below")
        yield path


def can_be_unmounted(path: Path, seconds: float = SOON) -> bool:
    """Whether it is, within a time."""
    try:
        wait_until(lambda: run("umount", path).returncode == 0, f"umount {path}", seconds)
    except TimeoutError:
        return False
    return True


def held_in(mount: Mount, path: Path) -> list[str]:
    """What a daemon has open there."""
    found = []
    for fd in Path(f"/proc/{mount.pid}/fd").iterdir():
        try:
            name = os.readlink(fd)
        except FileNotFoundError:
            continue
        if name.startswith(str(path)):
            found.append(name)
    return found


def use_all_ways(path: Path) -> None:
    """Have each kind of request answered."""
    subprocess.run(["ls", "-lRa", path], check=True, stdout=subprocess.DEVNULL)
    file = path / "new"
    file.write_bytes(b"x" * 10000)
    with open(file, "r+b") as opened:
        with mmap.mmap(opened.fileno(), 0) as mapped:
            mapped[5] = 65
            mapped.flush()
        os.fsync(opened.fileno())
        os.fstat(opened.fileno())
        os.ftruncate(opened.fileno(), 77)
    os.setxattr(file, "user.name", b"value")
    os.listxattr(file)
    os.getxattr(file, "user.name")
    os.removexattr(file, "user.name")
    os.symlink("new", path / "symlink")
    os.readlink(path / "symlink")
    os.mkfifo(path / "fifo")
    os.link(file, path / "link")
    os.rename(path / "link", path / "moved")
    (path / "made").mkdir()
    os.rename(path / "moved", path / "made" / "moved")
    file.chmod(0o600)
    os.chown(file, 1, 2)
    os.utime(file)
    os.statvfs(file)
    (path / "program").write_text("#!/bin/sh\n")
    (path / "program").chmod(0o755)
    subprocess.run([path / "program"], check=True)
    subprocess.run([path / "program"], check=True, cwd=path)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    os.unlink(file)
    os.unlink(path / "made" / "moved")
    os.rmdir(path / "made")


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        (kind, model)
        for kind in ("tmpfs", "ext4")
        for model in (*MODELS, "second threads")
        if SOAK or kind == "tmpfs" or model == "second"
    ],
)
def test_a_disk_that_was_used_in_all_ways(
    new_mount: Callable[..., Mount], source: Path, kind: str, model: str
) -> None:
    model, _, engine = model.partition(" ")
    words = ("--engine", engine) if engine else ()
    if kind == "tmpfs":
        disk = mounted("tmpfs", "tmpfs", source / "disk", "size=16m")
    else:
        disk = image("ext4", source, size=16 << 20)
    with disk as path:
        mount = new_mount("--model", model, *words, source=source)
        use_all_ways(mount.path / "disk")
        assert can_be_unmounted(path), held_in(mount, path)
        assert not held_in(mount, path)
        assert os.listdir(mount.path / "disk") == []
        mount.end()


def test_what_is_used_again_is_opened_again(new_mount: Callable[..., Mount], stick: Path) -> None:
    mount = new_mount("-o", "cache=loose", source=stick.parent)
    there = mount.path / "stick"
    directory = os.open(there / "directory", os.O_PATH)  # known to the kernel, not open here
    try:
        assert (there / "directory" / "below").read_text() == "below"
        for _ in range(2):
            wait_until(lambda: not held_in(mount, stick), "all descriptors to be closed", SOON)
            assert (there / "directory" / "below").read_text() == "below"
            assert sorted(os.listdir(f"/proc/self/fd/{directory}")) == ["below"]
            assert held_in(mount, stick)
    finally:
        os.close(directory)


def test_what_is_open_keeps_the_disk_busy(new_mount: Callable[..., Mount], stick: Path) -> None:
    """As on the source. It is whole for as long."""
    mount = new_mount(source=stick.parent)
    with open(mount.path / "stick" / "file", "r+") as file:
        (stick / "file").rename(stick / "moved")
        time.sleep(3 * leaving.PERIOD)
        assert run("umount", stick).returncode != 0
        file.write("more")
        file.flush()
        assert os.fstat(file.fileno()).st_size == 4
    assert (stick / "moved").read_text() == "more"
    assert can_be_unmounted(stick)


def test_somebody_in_a_directory_of_it_keeps_it_not(
    new_mount: Callable[..., Mount], stick: Path
) -> None:
    """The disk goes, and he is told; on the source it would be busy. With the disk he is back."""
    mount = new_mount("-o", "attr_timeout=0,entry_timeout=0", source=stick.parent)
    image_of = stick.parent.parent / "elsewhere"
    image_of.mkdir()
    assert run("mount", "--bind", stick, image_of).returncode == 0
    try:
        directory = os.open(mount.path / "stick" / "directory", os.O_PATH)
        try:
            assert can_be_unmounted(stick)
            gone = (errno.ESTALE, errno.ENOENT)
            assert errno_of(os.stat, "below", dir_fd=directory) in gone
            assert errno_of(os.open, "new", os.O_CREAT, dir_fd=directory) in gone
            assert errno_of(os.stat, mount.path / "stick" / "directory") == errno.ENOENT
            assert run("mount", "--bind", image_of, stick).returncode == 0
            assert (mount.path / "stick" / "directory" / "below").read_text() == "below"
        finally:
            os.close(directory)
        assert can_be_unmounted(stick)
    finally:
        run("umount", image_of)


def test_what_was_renamed_in_the_source_is_looked_for_by_its_path(
    new_mount: Callable[..., Mount], stick: Path
) -> None:
    mount = new_mount(source=stick.parent)
    there = mount.path / "stick"
    assert (there / "directory" / "below").read_text() == "below"
    (stick / "directory").rename(stick / "renamed")
    (stick / "file").rename(stick / "file2")
    wait_until(lambda: not held_in(mount, stick), "all descriptors to be closed", SOON)
    assert (there / "renamed" / "below").read_text() == "below"
    assert (there / "file2").read_text() == "file"
    wait_until(lambda: not (there / "directory").exists(), "the old name to go")


def test_what_has_no_name_left_keeps_its_descriptor(
    new_mount: Callable[..., Mount], stick: Path
) -> None:
    """A removed directory that somebody is in: it could not be opened again. Until he leaves."""
    mount = new_mount("-o", "attr_timeout=0", source=stick.parent)
    removed = {}
    for name, root in (("here", mount.path / "stick"), ("in the source", stick)):
        (stick / name).mkdir()
        removed[name] = os.open(mount.path / "stick" / name, os.O_PATH)
        (root / name).rmdir()
    try:
        time.sleep(3 * leaving.PERIOD)
        for fd in removed.values():
            assert os.fstat(fd).st_nlink == 0
            assert stat.S_ISDIR(os.fstat(fd).st_mode)
        assert run("umount", stick).returncode != 0
    finally:
        for fd in removed.values():
            os.close(fd)
    if not knows_how_to_forget():
        subprocess.run(["stat", mount.path / "stick/in the source"], capture_output=True)
    assert can_be_unmounted(stick)


def knows_how_to_forget() -> bool:
    """FUSE_NOTIFY_PRUNE is Linux 6.18's."""
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 18)


def test_a_second_place_can_be_unmounted(new_mount: Callable[..., Mount], source: Path) -> None:
    """A bind mount of the source's own files, one of which is open at its first place."""
    (source / "one/sub").mkdir(parents=True)
    (source / "two").mkdir()
    (source / "one/file").write_text("file")
    assert run("mount", "--bind", source / "one", source / "two").returncode == 0
    try:
        mount = new_mount(source=source)
        for name in ("two", "one", "two", "one"):
            assert (mount.path / name / "file").read_text() == "file"
            assert os.listdir(mount.path / name / "sub") == []
        with open(mount.path / "one/file") as file:
            assert can_be_unmounted(source / "two")
            assert file.read() == "file"
        assert os.listdir(mount.path / "two") == []
    finally:
        run("umount", "-l", source / "two")


def test_a_disk_taken_away_lazily_is_free_soon(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    """umount -l: what is left of it goes with its last use."""
    with image("ext4", source, size=16 << 20) as disk:
        (disk / "file").write_text("file")
        mount = new_mount(source=source)
        device = os.stat(disk).st_dev
        loop = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/loop/backing_file")
        os.listdir(mount.path / "disk")
        (mount.path / "disk/file").read_text()
        assert run("umount", "-l", disk).returncode == 0
        wait_until(lambda: not loop.exists(), "the loop device, free again", SOON)
        mount.end()


def test_a_server_that_hangs_keeps_no_other_disk(
    new_mount: Callable[..., Mount], stick: Path
) -> None:
    source = stick.parent
    (source / "hangs").mkdir()
    server = new_mount("-o", "attr_timeout=0,entry_timeout=0")
    (server.path / "name").touch()
    assert run("mount", "--bind", server.path, source / "hangs").returncode == 0
    try:
        mount = new_mount(source=source)
        os.listdir(mount.path / "hangs")
        (mount.path / "hangs" / "name").read_bytes()
        os.kill(server.pid, signal.SIGSTOP)
        with Child(os.listdir, mount.path / "hangs") as stuck:
            for _ in range(2):
                (mount.path / "stick" / "file").read_text()
                wait_until(lambda: not held_in(mount, stick), "the stick to be left", SOON)
            assert can_be_unmounted(stick)
            os.kill(server.pid, signal.SIGCONT)
            stuck.wait()
        assert can_be_unmounted(source / "hangs")
        mount.end()
    finally:
        os.kill(server.pid, signal.SIGCONT)
        run("umount", "-l", source / "hangs")


def test_a_mount_that_hangs_even_so_keeps_no_other(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing more is begun there."""
    let_on, asked = threading.Event(), []
    with ExitStack() as stack:
        for name in ("good", "bad"):
            path = stack.enter_context(mounted("tmpfs", "tmpfs", source / name, "size=1m"))
            (path / "file").touch()
        client = stack.enter_context(client_of(source))
        fids = [client.know(name, "file") for name in ("good", "bad")]
        bad = fids[1].node.mount

        def has_names(fd: int) -> bool:
            if stat_descriptor(fd).mount_id == bad.number:
                asked.append(fd)
                let_on.wait(20.0)
            return True

        monkeypatch.setattr(leaving, "has_names", has_names)
        leaver = leaving.Leaver(client.session.fids, lambda nodeids: None)
        leaver.note()
        try:
            wait_until(lambda: asked and fids[0].node.fd < 0, "the good one, left", SOON)
            client.know("good", "file")
            wait_until(lambda: fids[0].node.fd < 0, "the good one, left again", SOON)
            assert len(asked) == 1
            let_on.set()
            wait_until(lambda: not client.session.fids.visitors, "both, left", SOON)
        finally:
            let_on.set()
            leaver.end()


def test_nothing_wakes_up_for_a_disk_that_is_left(
    new_mount: Callable[..., Mount], stick: Path
) -> None:
    mount = new_mount(source=stick.parent)
    os.listdir(mount.path / "stick")
    wait_until(lambda: not held_in(mount, stick), "all descriptors to be closed", SOON)
    time.sleep(2 * leaving.PERIOD)

    def wakings() -> dict[str, int]:
        found = {}
        for task in Path(f"/proc/{mount.pid}/task").iterdir():
            text = (task / "status").read_text()
            found[task.name] = int(text.partition("voluntary_ctxt_switches:")[2].split()[0])
        return found

    before = wakings()
    time.sleep(3 * leaving.PERIOD)
    assert wakings() == before
