"""What a mount must never do: let people in, unmount others, lose what was synced."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mount, become, errno_of, in_child, is_mounted, run
from test_mount_sync import done, flags_of_descriptors

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for others")


@needs_root
def test_an_access_control_list_keeps_out_whom_it_keeps_out_of_the_source(
    new_mount: Callable[..., Mount],
) -> None:
    """The group bits of a file with a list are its mask, not what the group may do."""
    mount = new_mount("-o", "allow_other")
    for directory in (mount.source, *mount.source.parents):
        os.chmod(directory, os.stat(directory).st_mode | 0o755)
    secret = mount.source / "secret"
    secret.write_bytes(b"secret")
    os.chown(secret, 0, 7777)
    os.chmod(secret, 0o640)
    run("setfacl", "-m", "u:11111:r,g::---", secret)

    def reads(uid: int, gid: int) -> int:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        return errno_of((mount.path / "secret").read_bytes)

    assert in_child(reads, 12345, 7777) == errno.EACCES
    assert in_child(reads, 11111, 11111) == 0


@needs_root
def test_trusted_attributes_are_shown_to_root_only(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "allow_other")
    for directory in (mount.source, *mount.source.parents):
        os.chmod(directory, os.stat(directory).st_mode | 0o755)
    (mount.source / "file").touch()
    os.setxattr(mount.source / "file", "trusted.secret", b"1")

    def names() -> list[str]:
        become(65534)
        return os.listxattr(mount.path / "file")

    assert in_child(names) == []
    assert "trusted.secret" in os.listxattr(mount.path / "file")


@needs_root
def test_a_daemon_leaves_a_mount_alone_that_came_in_its_place(
    new_mount: Callable[..., Mount],
) -> None:
    """Detached by hand while a file is open; a new daemon at the same place; then SIGTERM."""
    old = new_mount()
    with open(old.path / "file", "wb") as file:
        file.write(b"x")
        file.flush()
        assert run("fusermount3", "-u", "-z", old.path).returncode == 0
        subprocess.run(["mount", "-t", "tmpfs", "none", old.path], check=True)
        try:
            (old.path / "mine").touch()
            old.signal(signal.SIGTERM)
            file.close()
            assert old.wait() == 0
            assert is_mounted(old.path)
            assert (old.path / "mine").exists()
        finally:
            subprocess.run(["umount", old.path], check=True)


def test_a_direct_open_for_reading_and_appending_is_synchronous_if_asked(
    new_mount: Callable[..., Mount],
) -> None:
    """The kernel sends no fsync for it, whatever osync= says."""
    mount = new_mount("-o", "osync=cached")
    flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_SYNC
    fd = os.open(mount.path / "file", flags, 0o600)
    try:
        os.write(fd, b"x")
        kept = flags_of_descriptors(mount.pid, mount.source / "file")
        assert [f & os.O_SYNC for f in kept] == [os.O_SYNC]
        assert done(mount, "fsync") == 0
    finally:
        os.close(fd)


def test_a_daemon_without_descriptors_left_still_unmounts(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount()
    for n in range(200):
        (mount.source / str(n)).touch()
    resource.prlimit(mount.pid, resource.RLIMIT_NOFILE, (100, 100))
    files: list[int] = []
    with contextlib.suppress(OSError):
        while True:  # ends when the daemon has no descriptor left
            files.append(os.open(mount.path / str(len(files)), os.O_RDWR))
    assert 0 < len(files) < 100
    assert os.write(files[0], b"x") == 1
    mount.signal(signal.SIGTERM)
    for fd in files:
        os.close(fd)  # none fails for want of a descriptor
    assert mount.wait() == 0
    assert not is_mounted(mount.path)


@needs_root
def test_a_dead_mount_in_the_source_hides_nothing_but_itself(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    below = new_mount()
    mount = new_mount()
    (mount.source / "dead").mkdir()
    (mount.source / "file").touch()
    subprocess.run(["mount", "--bind", below.path, mount.source / "dead"], check=True)
    try:
        below.process.kill()
        below.process.wait()
        assert errno_of(os.stat, mount.source / "dead") == errno.ENOTCONN
        assert sorted(os.listdir(mount.path)) == ["dead", "file"]
        assert errno_of(os.stat, mount.path / "dead") == errno.ENOTCONN
        assert os.stat(mount.path / "file").st_size == 0
    finally:
        subprocess.run(["umount", "-l", mount.source / "dead"], check=True)
        run("fusermount3", "-u", "-z", below.path)


@needs_root
def test_a_daemon_ends_well_with_files_open(new_mount: Callable[..., Mount]) -> None:
    """Those of the second model's that are closed at once, too: there is no device any more."""
    mount = new_mount()
    (mount.source / "file").write_bytes(b"x")

    def hold() -> None:
        for _ in range(400):
            os.close(os.open(mount.path / "file", os.O_RDONLY))
        files = [os.open(mount.path / "file", os.O_RDONLY) for _ in range(3000)]
        run("umount", "-f", "-l", mount.path)
        for file in files:
            errno_of(os.close, file)

    in_child(hold)
    assert mount.wait() == 0
