"""What a mount must never do: let people in, unmount others, lose what was synced."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import (
    ENVIRONMENT,
    NINEFUSE,
    PATIENCE,
    SOAK,
    Child,
    Log,
    Mount,
    become,
    detach,
    done,
    errno_of,
    flags_of_descriptors,
    in_child,
    is_mounted,
    mount_ids,
    run,
    wait_until,
)

from ninefuse.exitcodes import ExitCode
from ninefuse.linux.syscalls import RENAME_EXCHANGE, rename

pytestmark = pytest.mark.soak

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


def exchange(one: Path, other: Path) -> None:
    """Exchange two names for as long as one is let."""
    while True:
        with contextlib.suppress(OSError):  # busy, once it is mounted on
            rename(-100, os.fsencode(one), -100, os.fsencode(other), RENAME_EXCHANGE)
        time.sleep(0.0003)


@needs_root
@pytest.mark.limit(200)
@pytest.mark.usefixtures("guard")
def test_a_mount_point_that_is_exchanged_leads_root_nowhere_else(tmp_path: Path) -> None:
    """Neither when it mounts nor when it unmounts."""
    source, shared, victim = tmp_path / "source", tmp_path / "shared", tmp_path / "victim"
    for directory in (source, shared, victim):
        directory.mkdir()
    shared.chmod(0o777)
    view, link = shared / "view", shared / "link"
    view.mkdir()
    link.symlink_to(victim)
    codes: list[int] = []
    refused = {ExitCode.MOUNT_REFUSED, ExitCode.MOUNTPOINT_MISSING}
    subprocess.run(["mount", "-t", "tmpfs", "none", victim], check=True)
    try:
        with Child(exchange, view, link):
            until = time.monotonic() + (100 if SOAK else 4)
            while time.monotonic() < until or not refused & set(codes):
                daemon = subprocess.Popen(
                    [*NINEFUSE, "-f", source, view], env=ENVIRONMENT, stderr=subprocess.DEVNULL
                )
                try:
                    while daemon.poll() is None:
                        if is_mounted(view) or len(mount_ids(victim)) > 1:
                            break
                        time.sleep(0.005)
                    assert len(mount_ids(victim)) == 1
                    daemon.send_signal(signal.SIGTERM)
                    codes.append(daemon.wait(PATIENCE))
                    assert not is_mounted(view)
                    assert not is_mounted(link)
                    assert len(mount_ids(victim)) == 1
                finally:
                    daemon.kill()
                    daemon.wait()
                    detach(view)
                    detach(link)
    finally:
        detach(victim)


@needs_root
def test_a_mount_whose_path_has_changed_is_unmounted_all_the_same(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """And not what has its path by then."""
    mount = new_mount()
    directory = mount.path.parent
    directory.rename(tmp_path / "renamed")
    mount.path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", mount.path], check=True)
    try:
        assert is_mounted(tmp_path / "renamed" / "mount")
        mount.signal(signal.SIGTERM)
        assert mount.wait() == 0
        assert not is_mounted(tmp_path / "renamed" / "mount")
        assert len(mount_ids(mount.path)) == 1
    finally:
        subprocess.run(["umount", mount.path], check=True)


@needs_root
def test_a_mount_whose_path_has_changed_is_detached_at_once_too(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    mount = new_mount()
    with open(mount.path / "file", "wb", buffering=0) as file:
        mount.path.parent.rename(tmp_path / "renamed")
        mount.path.mkdir(parents=True)
        log = Log(tmp_path / "renamed" / "log")
        mount.signal(signal.SIGTERM)
        log.wait_for("SIGTERM: unmounting")
        mount.signal(signal.SIGINT)
        assert mount.wait() == 128 + signal.SIGINT
        wait_until(lambda: not is_mounted(tmp_path / "renamed" / "mount"), "the end of the mount")
        assert errno_of(file.write, b"x")
        with contextlib.suppress(OSError):
            file.close()
