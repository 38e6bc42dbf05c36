"""nosuid, nodev and noexec of the source, and of what is mounted in it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_systems import mounted
from mounting import Mount, become, errno_of, in_child, run
from ops_helpers import made_up
from servers import SOME_MODELS

from ninefuse.linux import mountflags
from ninefuse.linux.mountflags import NODEV, NOEXEC, NOSUID
from ninefuse.linux.syscalls import stat_descriptor
from ninefuse.tree.identity import Devices

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes set-id programs"),
]

USER = 65534
# cap_net_raw, permitted and effective (linux/capability.h, VFS_CAP_REVISION_2)
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
ALLOWED = "allow_other,suid,dev,exec,cache=none"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that every user reaches, and that forbids nothing."""
    for directory in (tmp_path, *tmp_path.parents):
        directory.chmod(directory.stat().st_mode | 0o755)
    with mounted("tmpfs", "tmpfs", tmp_path / "tree", "mode=755") as path:
        yield path


def plant(directory: Path) -> None:
    """A program that says who runs it, set-user-id root; one with a capability; a device."""
    for name in ("program", "group", "able"):
        shutil.copy(shutil.which("id") or "", directory / name)
    (directory / "program").chmod(0o4755)
    (directory / "group").chmod(0o2755)
    os.setxattr(directory / "able", "security.capability", CAPABILITY)
    os.setxattr(directory / "able", "user.other", b"x")
    (directory / "marked").touch()
    (directory / "marked").chmod(0o2644)  # for mandatory locks, once
    (directory / "shared").mkdir()
    (directory / "shared").chmod(0o2775)
    os.mknod(directory / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(directory / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    os.mknod(directory / "whiteout", stat.S_IFCHR, 0)


def runs_as(program: Path, what: str = "-u") -> int:
    """The effective user (or group, -g) of a program that an ordinary user starts."""

    def start() -> int:
        become(USER)
        return int(subprocess.run([program, what], capture_output=True, check=True).stdout)

    return in_child(start)


def is_forbidden(directory: Path) -> None:
    assert runs_as(directory / "program") == USER
    assert runs_as(directory / "group", "-g") == USER
    assert errno_of(os.close, os.open(directory / "program", os.O_RDONLY)) == 0


def is_not_shown(directory: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in directory.iterdir()}
    assert (modes["program"], modes["group"]) == (0o755, 0o755)
    assert (modes["marked"], modes["shared"]) == (0o2644, 0o2775), "these give nobody anything"
    for name in ("null", "disk"):
        found = (directory / name).stat()
        assert found.st_rdev == os.makedev(0, 1)
        assert errno_of(os.open, directory / name, os.O_RDWR) == errno.ENXIO
    assert (directory / "whiteout").stat().st_rdev == 0
    assert os.listxattr(directory / "able") == ["user.other"]
    assert errno_of(os.getxattr, directory / "able", "security.capability") == errno.ENODATA


def is_as_it_is(directory: Path) -> None:
    assert runs_as(directory / "program") == 0
    assert runs_as(directory / "group", "-g") == 0
    os.close(os.open(directory / "null", os.O_RDWR))
    assert (directory / "disk").stat().st_rdev == os.makedev(7, 0)
    assert os.getxattr(directory / "able", "security.capability") == CAPABILITY
    assert "security.capability" in os.listxattr(directory / "able")


def options_of(path: Path) -> set[str]:
    return set(run("findmnt", "-no", "VFS-OPTIONS", path).stdout.strip().split(","))


# The source's own mount


@pytest.mark.parametrize("more", [(), ("-o", "auto_unmount")])
def test_the_mount_forbids_what_the_source_forbids(
    new_mount: Callable[..., Mount], source: Path, more: tuple[str, ...]
) -> None:
    plant(source)
    subprocess.run(["mount", "-o", "remount,nosuid,nodev", source], check=True)
    mount = new_mount("-o", ALLOWED, *more, source=source)
    assert mount.log.text().count("mounted with nosuid, nodev, as the source is") == 1
    assert {"nosuid", "nodev"} < options_of(mount.path)
    assert "noexec" not in options_of(mount.path)
    is_forbidden(mount.path)
    assert errno_of(os.open, mount.path / "null", os.O_RDWR) == errno.EACCES
    assert (mount.path / "program").stat().st_mode & stat.S_ISUID, "as the source shows it"
    mount.end()


def test_noexec_is_taken_over_too(new_mount: Callable[..., Mount], source: Path) -> None:
    plant(source)
    subprocess.run(["mount", "-o", "remount,noexec", source], check=True)
    mount = new_mount("-o", ALLOWED, source=source)
    mount.log.wait_for("mounted with noexec, as the source is")
    assert errno_of(subprocess.run, [mount.path / "program"]) == errno.EACCES
    mount.end()


def test_what_nobody_forbids_is_as_it_is(new_mount: Callable[..., Mount], source: Path) -> None:
    plant(source)
    mount = new_mount("-o", ALLOWED, source=source)
    assert "as the source is" not in mount.log.text()
    is_as_it_is(mount.path)
    mount.end()


# What is mounted in the source


@pytest.mark.parametrize("first", ["looked up", "listed"])
@pytest.mark.parametrize("model", SOME_MODELS)
def test_what_a_file_system_in_the_source_forbids_is_not_shown(
    new_mount: Callable[..., Mount], source: Path, model: str, first: str
) -> None:
    plant(source)
    with mounted("tmpfs", "tmpfs", source / "below", "mode=755,nosuid,nodev") as below:
        plant(below)
        mount = new_mount("--model", model, "-o", ALLOWED, source=source)
        if first == "listed":
            assert "below" in os.listdir(mount.path)
            for entry in os.scandir(mount.path):
                entry.stat()
        is_forbidden(mount.path / "below")
        is_not_shown(mount.path / "below")
        is_as_it_is(mount.path)
        assert (below / "program").stat().st_mode & stat.S_ISUID, "it is there all the same"
        # It is asked again with each step into it.
        subprocess.run(["mount", "-o", "remount,suid,dev", below], check=True)
        is_as_it_is(mount.path / "below")
        subprocess.run(["mount", "-o", "remount,nosuid,nodev", below], check=True)
        is_forbidden(mount.path / "below")
        is_not_shown(mount.path / "below")
        mount.end()


def test_a_bind_mount_of_the_sources_own_files_is_another_mount(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    (source / "files").mkdir()
    (source / "bound").mkdir()
    plant(source / "files")
    subprocess.run(["mount", "--bind", source / "files", source / "bound"], check=True)
    try:
        options = "remount,bind,nosuid,nodev"
        subprocess.run(["mount", "-o", options, source / "bound"], check=True)
        mount = new_mount("-o", ALLOWED, source=source)
        is_forbidden(mount.path / "bound")
        is_not_shown(mount.path / "bound")
        mount.end()
    finally:
        subprocess.run(["umount", "-l", source / "bound"], check=True)


def test_a_mount_that_forbids_it_itself_hides_nothing(
    new_mount: Callable[..., Mount], source: Path
) -> None:
    with mounted("tmpfs", "tmpfs", source / "below", "mode=755,nosuid,nodev") as below:
        plant(below)
        mount = new_mount("-o", "allow_other", source=source)
        assert (mount.path / "below" / "program").stat().st_mode & stat.S_ISUID
        assert (mount.path / "below" / "null").stat().st_rdev == os.makedev(1, 3)
        assert runs_as(mount.path / "below" / "program") == USER
        mount.end()


# In parts


def test_words_and_flags() -> None:
    assert mountflags.forbidden_by(["ro"]) == NOSUID | NODEV
    assert mountflags.forbidden_by(["suid", "noexec"]) == NODEV | NOEXEC
    assert mountflags.taken_over(["suid", "ro", "dev"], NOSUID) == ("ro", "dev", "nosuid")
    assert mountflags.taken_over(["nosuid"], NOSUID | NOEXEC) == ("nosuid", "noexec")
    assert mountflags.taken_over(["suid"], 0) == ("suid",)


def test_a_mount_that_is_not_known_yet_shows_nothing_that_could_be_forbidden(
    tmp_path: Path,
) -> None:
    devices = Devices()
    devices.hides = mountflags.HIDEABLE
    program = made_up(1)._replace(mode=stat.S_IFREG | 0o4755, mount_id=7)
    assert devices.shown(program).mode == stat.S_IFREG | 0o755
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert not mountflags.flags_of(fd) & NOSUID, "tests' directories allow set-ids"
        devices.learn(fd, stat_descriptor(fd)._replace(mount_id=7))
    finally:
        os.close(fd)
    assert devices.shown(program) is program
