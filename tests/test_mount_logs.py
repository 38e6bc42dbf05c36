"""What a mount writes into its log, and where that goes when the file is rotated."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from misplaced import put_fifo, put_hard_link, put_symlink
from mounting import (
    ENVIRONMENT,
    NINEFUSE,
    PATIENCE,
    SOAK,
    Log,
    Mount,
    detach,
    errno_of,
    in_child,
    is_mounted,
    unmount,
    wait_until,
)

from ninefuse.process.logs import REPEAT_LIMIT
from ninefuse.settings import MODELS

pytestmark = pytest.mark.soak

# The command, with a fault in it: statfs ends in an exception that no operation should raise.
FAULTY_NINEFUSE = (
    sys.executable,
    "-c",
    """
import sys
from ninefuse.command import cli
from ninefuse.fuse import callbacks
from ninefuse.process import logs
def statfs(session):
    raise ZeroDivisionError
    yield
callbacks.statfs = statfs
sys.exit(cli.main())
""",
)


def test_requests_are_not_logged_at_the_usual_level(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount()
    before = mount.log.text()
    for number in range(20):
        (mount.path / f"file{number}").write_bytes(b"x")
        assert errno_of(os.mkdir, mount.path / f"file{number}") == errno.EEXIST
        assert errno_of(os.stat, mount.path / f"missing{number}") == errno.ENOENT
        assert errno_of(os.rmdir, mount.path / f"file{number}") == errno.ENOTDIR
    os.statvfs(mount.path)
    unmount(mount.path)
    assert mount.wait() == 0
    (line,) = mount.log.text().removeprefix(before).splitlines()
    assert line.endswith(": unmounted")


def test_an_error_that_repeats_is_counted_and_said_at_the_end_at_the_latest(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount(command=FAULTY_NINEFUSE)
    mount.log.expect("statfs failed|Traceback")
    for _ in range(REPEAT_LIMIT + 20):
        assert errno_of(os.statvfs, mount.path) == errno.EIO
    assert "under way" in mount.counters().text
    unmount(mount.path)
    assert mount.wait() == 0
    text = mount.log.text()
    assert text.count("Traceback") == REPEAT_LIMIT
    *_, count, end = text.splitlines()
    assert count.endswith("statfs failed (repeated 20 times, this was the last)")
    assert end.endswith(": unmounted")


def test_the_count_is_said_when_nothing_else_happens(new_mount: Callable[..., Mount]) -> None:
    *command, program = FAULTY_NINEFUSE
    shorter = program.replace("sys.exit", "logs.REPEAT_SECONDS = 0.3\nsys.exit")
    mount = new_mount(command=(*command, shorter))
    mount.log.expect("statfs failed|Traceback")
    for _ in range(REPEAT_LIMIT + 20):
        assert errno_of(os.statvfs, mount.path) == errno.EIO
    mount.log.wait_for(r"statfs failed \(repeated \d+ times, this was the last\)$")


def test_a_rotated_log_goes_on_in_a_new_file(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    path = tmp_path / "ninefuse.log"
    before = os.umask(0o027)
    try:
        mount = new_mount("--log", str(path))
    finally:
        os.umask(before)
    path.rename(tmp_path / "ninefuse.log.1")
    mount.signal(signal.SIGUSR1)
    Log(path).wait_for(r"descriptors: \d+")
    assert path.stat().st_mode & 0o777 == 0o640, "though the process has no umask"
    assert "mounted on" in (tmp_path / "ninefuse.log.1").read_text()
    assert "descriptors:" not in (tmp_path / "ninefuse.log.1").read_text()


def test_a_log_below_the_mount_point_makes_nobody_wait_for_himself(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """It is in the directory that the mount covers."""
    log = tmp_path / "mount0" / "mount" / "log"  # where new_mount mounts
    mount = new_mount("--log", str(log))
    assert log.parent == mount.path
    assert mount.counters().fids == 1
    assert os.listdir(mount.path) == []
    unmount(mount.path)
    assert mount.wait() == 0
    assert log.read_text().endswith("unmounted\n")


@pytest.mark.usefixtures("guard")
# Who waits for the log waits under none with all that the daemon serves.
@pytest.mark.parametrize("model", MODELS if SOAK else ["none", "second"])
@pytest.mark.parametrize("where", ["--log", "stderr"])
def test_a_log_that_takes_nothing_keeps_nobody_waiting(
    tmp_path: Path, where: str, model: str
) -> None:
    """Lines for each request, into a pipe that nobody reads."""
    source, path, pipe = tmp_path / "source", tmp_path / "mount", tmp_path / "pipe"
    source.mkdir()
    path.mkdir()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command: list[str | Path] = [*NINEFUSE, "-f", "--log-level", "debug", "--model", model]
    command += [source, path]
    if where == "--log":
        command += ["--log", pipe]
    with open(pipe, "wb") as stderr:
        daemon = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stderr=stderr if where == "stderr" else subprocess.DEVNULL,
        )
    try:
        wait_until(lambda: is_mounted(path), "the mount")
        assert in_child(_use, path) == 500
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0
        assert not is_mounted(path)
    finally:
        os.close(reader)
        daemon.kill()
        detach(path)
        daemon.wait()


def _use(path: Path) -> int:
    for number in range(500):
        (path / str(number)).write_bytes(b"x")
    return len(os.listdir(path))


def test_what_others_put_in_the_place_of_a_rotated_log_is_not_written_to(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    directory, victim = tmp_path / "shared", tmp_path / "victim"
    directory.mkdir()
    directory.chmod(0o1777)
    victim.write_text("theirs")
    path = directory / "log"
    mount = new_mount("--log", str(path))
    for put in (put_symlink, put_hard_link, put_fifo):
        path.rename(directory / "log.1")
        put(path, victim)
        assert mount.counters().fids == 1, "on stderr"
        Log(directory / "log.1").wait_for(rf"log file {path}: not opened anew \(")
        path.unlink()
        assert mount.counters().fids == 1
        Log(path).wait_for(r"descriptors: \d+")
    assert victim.read_text() == "theirs"
