"""What is mounted in the source: the dispatcher must not be led into it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Child, Mount, mount_ids, run
from servers import SOME_MODELS

from ninefuse.linux.mountinfo import MountsBelow, lines_of

pytestmark = pytest.mark.soak


def test_mounts_below_a_directory_are_noticed_as_they_come_and_go(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    beside = tmp_path.with_name(f"{tmp_path.name}-beside")  # whose name begins in the same way
    beside.mkdir()
    below, others = MountsBelow(str(tmp_path)), MountsBelow(str(beside))
    changes: list[MountsBelow] = []
    below.on_change = lambda: changes.append(below)
    mount = new_mount()
    [text] = mount_ids(mount.path)
    device = text.encode()
    assert below.has(device)
    assert below.has(device), "also when the table has not changed since"
    assert not below.has(device + b"1")
    assert not others.has(device)
    assert MountsBelow(str(tmp_path)).has(device)
    assert changes
    mount.end()
    assert not below.has(device)


def test_names_in_the_mount_table_are_unescaped() -> None:
    line = rb"36 35 98:0 /root /mnt/with\040space\134 rw - ext3 /dev/root rw"
    (found,) = lines_of(line + b"\n")
    assert (found.device, found.point) == (b"98:0", b"/mnt/with space\\")


def test_a_server_below_the_source_that_hangs_stops_nobody_else(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """Though names have proved to be quick: one may lead there."""
    source = tmp_path / "outer"
    (source / "files").mkdir(parents=True)
    for number in range(40):
        (source / "files" / str(number)).write_bytes(b"x")
    outer = new_mount(source=source)
    for number in range(20):
        assert (outer.path / "files" / str(number)).stat().st_size == 1
    inner_point = source / "inner"
    inner_point.mkdir()
    inner = new_mount()
    # A mount in the source itself: of another daemon, that is then stopped.
    done = os.spawnlp(os.P_WAIT, "mount", "mount", "--bind", str(inner.path), str(inner_point))
    assert done == 0
    try:
        os.kill(inner.pid, signal.SIGSTOP)
        with Child(os.stat, outer.path / "inner" / "name") as stuck:
            with Child(_sizes, outer.path / "files") as others:
                assert others.result(10.0) == 40
            assert not stuck.done(0.0)
            os.kill(inner.pid, signal.SIGCONT)
            assert stuck.wait() != 0, "there is no such name"
    finally:
        os.kill(inner.pid, signal.SIGCONT)
        outer.end()  # it has a descriptor in there
        os.spawnlp(os.P_WAIT, "umount", "umount", "-l", str(inner_point))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts in the source")
@pytest.mark.parametrize("model", SOME_MODELS)
def test_xdev_shows_what_a_mount_in_the_source_covers(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below" / "covered").write_bytes(b"x")
    assert run("mount", "-t", "tmpfs", "none", source / "below").returncode == 0
    try:
        (source / "below" / "other").touch()
        hiding = new_mount("--model", model, "-o", "xdev", source=source)
        crossing = new_mount("--model", model, source=source)
        assert os.listdir(crossing.path / "below") == ["other"]
        assert os.listdir(hiding.path / "below") == ["covered"]
        (hiding.path / "below" / "new").write_bytes(b"y")
        assert run("mount", "-t", "tmpfs", "none", source).returncode == 0
        try:
            assert os.listdir(hiding.path) == ["below"], "what is mounted later, too"
        finally:
            run("umount", source)
        crossing.end()
    finally:
        run("umount", "-l", source / "below")
    assert (source / "below" / "new").read_bytes() == b"y"


def _sizes(directory: Path) -> int:
    return sum((directory / str(number)).stat().st_size for number in range(40))
