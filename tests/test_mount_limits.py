"""What docs/limitations.md names as a way round: idmapped sources, terminals, durability."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_systems import image, mounted
from mounting import Mount, errno_of, in_child, is_mounted, run, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts in the source")

_libc = ctypes.CDLL(None, use_errno=True)
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_CLONE, _CLOEXEC, _EMPTY_PATH, _FROM_FD = 1, 0o2000000, 0x1000, 4
_IDMAP = 0x100000
FIRST = 1000  # the id that is shown for 0, and so on


def _call(number: int, *words: int | bytes) -> int:
    done: int = _libc.syscall(number, *words)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done


@contextlib.contextmanager
def user_namespace() -> Iterator[int]:
    """One whose ids from 0 on are ours from `FIRST` on."""
    words = ["unshare", "--user", sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if not holder.stdout.readline():
                pytest.skip("no user namespace can be had")
            for kind in ("uid", "gid"):
                Path(f"/proc/{holder.pid}/{kind}_map").write_text(f"0 {FIRST} 1000")
            fd = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
        finally:
            holder.stdin.close()
    try:
        yield fd
    finally:
        os.close(fd)


def idmap(directory: Path, on: Path) -> None:
    """Mount a directory once more, with other ids."""
    with user_namespace() as namespace:
        tree = _call(_OPEN_TREE, -100, bytes(directory), _CLONE | _CLOEXEC)
        try:
            wanted = struct.pack("=QQQQ", _IDMAP, 0, 0, namespace)
            _call(_MOUNT_SETATTR, tree, b"", _EMPTY_PATH, wanted, len(wanted))
            _call(_MOVE_MOUNT, tree, b"", -100, bytes(on), _FROM_FD)
        finally:
            os.close(tree)


def test_an_idmapped_source_shows_and_takes_its_own_ids(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    disk, source = tmp_path / "disk", tmp_path / "source"
    source.mkdir()
    (disk / "public").mkdir(parents=True)
    (disk / "public").chmod(0o777)
    (disk / "of 5").touch()
    os.chown(disk / "of 5", 5, 6)
    try:
        idmap(disk, source)
    except OSError as e:
        pytest.skip(f"the source's file system cannot be idmapped: {e.strerror}")
    try:
        for directory in (tmp_path, *tmp_path.parents):
            directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o755)
        mount = new_mount("-o", "allow_other", source=source)

        def make(directory: Path) -> int:
            os.setgroups([])
            os.setresgid(FIRST + 6, FIRST + 6, FIRST + 6)
            os.setresuid(FIRST + 5, FIRST + 5, FIRST + 5)
            (directory / "of 5").write_bytes(b"x")  # it is the owner's there, and may be written
            path = directory / "public" / directory.name
            path.touch()
            return path.stat().st_uid

        for directory in (source, mount.path):
            assert (directory / "of 5").stat().st_uid == FIRST + 5
            assert in_child(make, directory) == FIRST + 5
            found = (disk / "public" / directory.name).stat()
            assert (found.st_uid, found.st_gid) == (5, 6)
            # Root is nobody there.
            assert errno_of((directory / "public/of root").touch) == errno.EOVERFLOW
        mount.end()
    finally:
        wait_until(lambda: run("umount", source).returncode == 0, "umount")
        assert not is_mounted(source)


def test_the_mount_itself_cannot_be_idmapped(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """When it can, the limitation is to go, and callers' ids to be looked at."""
    mount = new_mount()
    (tmp_path / "on").mkdir()
    assert errno_of(idmap, mount.path, tmp_path / "on") == errno.EINVAL


def test_terminals_are_those_of_a_devpts_on_the_mount(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "dev")
    (mount.source / "pts").mkdir()
    os.mknod(mount.source / "ptmx", stat.S_IFCHR | 0o666, os.makedev(5, 2))
    with mounted("devpts", "devpts", mount.source / "pts", "newinstance"):
        code = errno_of(os.open, mount.path / "ptmx", os.O_RDWR | os.O_NOCTTY)
        assert code in (errno.ENOENT, errno.ENODEV)
        mount.end()
    mount = new_mount("-o", "dev", source=mount.source)
    with mounted("devpts", "devpts", mount.path / "pts", "newinstance"):
        fd = os.open(mount.path / "ptmx", os.O_RDWR | os.O_NOCTTY)
        try:
            assert "0" in os.listdir(mount.path / "pts")
        finally:
            os.close(fd)


def test_what_makes_durable_where_syncfs_does_not(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """As found in the disk's own file."""
    file = tmp_path / "file of the disk"
    with image("ext4", tmp_path, "-O", "^has_journal", size=16 << 20, file=file) as disk:
        mount = new_mount(source=disk)

        def is_on_disk(marker: bytes) -> bool:
            return marker in file.read_bytes()

        def write(name: str) -> bytes:
            (mount.path / name).write_bytes(marker := b"marker of %s " % name.encode())
            return marker

        marker = write("fsync")
        assert not is_on_disk(marker)
        fd = os.open(mount.path / "fsync", os.O_RDONLY)
        os.fsync(fd)
        assert is_on_disk(marker)
        marker = write("syncfs")
        assert run("sync", "-f", mount.path).returncode == 0
        assert not is_on_disk(marker), "it does now: the limitation is to go"
        assert run("sync", "-f", disk).returncode == 0
        assert is_on_disk(marker)
        os.close(fd)
        mount.end()
        mount = new_mount("-o", "sync", source=disk)
        assert is_on_disk(write("sync"))
        mount.end()
