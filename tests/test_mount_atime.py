"""What reading through a mount does to the source's access times, with noatime and without."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mount, become, in_child
from servers import SOME_MODELS

pytestmark = pytest.mark.soak

USER = 4711
LONG_AGO = 10


def read(path: Path) -> None:
    path.read_bytes()


def read_direct(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_SYNC)
    os.read(fd, 100)
    os.close(fd)


def read_mapped(path: Path) -> None:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        assert memory[0:1]


def execute(path: Path) -> None:
    subprocess.run([path], check=True, stdout=subprocess.DEVNULL)


def list_names(path: Path) -> None:
    os.listdir(path)


FILES: dict[str, Callable[[Path], object]] = {
    "read": read,
    "read past the cache": read_direct,
    "mapped": read_mapped,
    "executed": execute,
    "a script": execute,
}
LISTED: dict[str, Callable[[Path], object]] = {"listed": list_names}


def moved(mount: Mount, user: int = 0) -> set[str]:
    """Do each to a thing of its own; of which the source's access time has moved."""

    def act() -> None:
        if user:
            become(user)
        for name, deed in {**FILES, **LISTED}.items():
            deed(mount.path / name)

    program = shutil.which("true")
    assert program is not None
    for name in FILES:
        path = mount.source / name
        shutil.copyfile(program, path)
        if name == "a script":
            path.write_text("#!/bin/sh\n:\n")
        path.chmod(0o777)
    (mount.source / "listed").mkdir()
    for name in (*FILES, *LISTED):
        os.utime(mount.source / name, (LONG_AGO, LONG_AGO))
    in_child(act)
    names = {*FILES, *LISTED}
    return {name for name in names if (mount.source / name).stat().st_atime != LONG_AGO}


@pytest.mark.parametrize("model", SOME_MODELS)
@pytest.mark.parametrize("option", ["atime", "noatime", "nodiratime"])
def test_access_times_of_the_source_move_unless_they_are_not_to(
    new_mount: Callable[..., Mount], option: str, model: str
) -> None:
    mount = new_mount("-o", option, "--model", model)
    expected = {"atime": {*FILES, *LISTED}, "noatime": set(), "nodiratime": {*FILES}}
    assert moved(mount) == expected[option]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for others")
def test_nor_do_they_by_those_who_own_nothing_of_it(new_mount: Callable[..., Mount]) -> None:
    """To whom O_NOATIME is refused (open(2)); writing what was just made, and reading it."""
    mount = new_mount("-o", "noatime,allow_other")
    for above in mount.path.parents:
        os.chmod(above, os.stat(above).st_mode | 0o755)
    mount.source.chmod(0o777)
    assert moved(mount, USER) == set()

    def make() -> None:
        become(USER)
        fd = os.open(mount.path / "made", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"data")
        os.utime(fd, (LONG_AGO, LONG_AGO))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 4, 0) == b"data"
        os.close(fd)

    in_child(make)
    assert (mount.source / "made").stat().st_atime == LONG_AGO


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes a mount")
def test_it_follows_a_remount(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "allow_other")
    file = mount.source / "file"
    file.write_bytes(b"data")

    def is_moved() -> bool:
        os.utime(file, (LONG_AGO, LONG_AGO))
        in_child(lambda: os.posix_fadvise(os.open(mount.path / "file", os.O_RDONLY), 0, 0, 4))
        in_child(lambda: (mount.path / "file").read_bytes())
        return int(file.stat().st_atime) != LONG_AGO

    assert is_moved()
    for flag, moves in (("noatime", False), ("strictatime", True)):
        subprocess.run(["mount", "-i", "-o", f"remount,bind,{flag}", mount.path], check=True)
        assert is_moved() == moves, flag
