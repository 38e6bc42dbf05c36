"""What a mount writes into its log, and where that goes when the file is rotated."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from mounting import Log, Mount, errno_of, unmount

from ninefuse.logs import REPEAT_LIMIT

# The command, with a fault in it: statfs ends in an exception that no operation should raise.
FAULTY_NINEFUSE = (
    sys.executable,
    "-c",
    """
import sys
from ninefuse import cli, logs, sequences
def statfs(session):
    raise ZeroDivisionError
    yield
sequences.statfs = statfs
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
