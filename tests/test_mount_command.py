"""The command, end to end: real mounts, exit codes, signals, and how a daemon ends."""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from apart import AS_NOBODY, AS_ROOT, needs_namespace, run_apart
from mounting import (
    ENVIRONMENT,
    HASTY_NINEFUSE,
    NINEFUSE,
    PATIENCE,
    REPO,
    Child,
    Log,
    Mount,
    Watchdog,
    adopting_orphans,
    detach,
    errno_of,
    exit_code_of_orphan,
    is_mounted,
    is_running,
    processes_naming,
    run,
    unmount,
    wait_until,
)
from ops_helpers import fails

from ninefuse.command import cli
from ninefuse.exitcodes import ExitCode
from ninefuse.fuse import rootmount
from ninefuse.settings import MODELS

PAGE = mmap.PAGESIZE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "src"
    path.mkdir()
    (path / "file").write_bytes(b"hello")
    return path


class Daemon:
    """A daemon that the command has left behind."""

    def __init__(self, path: Path, log: Path, since: int = 0) -> None:
        self.path = path
        self.log = Log(log)
        self.pid = int(self.log.wait_for(r"\[(\d+)\] INFO .*mounted on", since)[1])


@contextmanager
def daemon(watchdog: Watchdog, source: Path, path: Path, *options: str) -> Iterator[Daemon]:
    """Run the command until it returns, and see to its daemon afterwards."""
    log = path.with_name(path.name + "-log")
    since = Log(log).size()
    with adopting_orphans():
        done = run(*NINEFUSE, "--log", log, *options, source, path)
        try:
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            left = Daemon(path, log, since)
            watchdog.watch(left.pid, path)
            try:
                yield left
                left.log.check()
            finally:
                # Already collected, its number may be another process's by now.
                with suppress(ChildProcessError):
                    if not os.waitpid(left.pid, os.WNOHANG)[0]:
                        os.kill(left.pid, signal.SIGKILL)
                        os.waitpid(left.pid, 0)
                watchdog.forget(path)
        finally:
            detach(path)


# Starting


def test_the_command_returns_once_the_mount_answers_and_goes_on_as_a_daemon(
    guard: Watchdog, source: Path, mountpoint: Path
) -> None:
    with daemon(guard, source, mountpoint) as left:
        assert (mountpoint / "file").read_bytes() == b"hello"
        process = Path(f"/proc/{left.pid}")
        assert os.getsid(left.pid) == left.pid
        assert os.readlink(process / "cwd") == "/"
        assert {os.readlink(process / "fd" / n) for n in "012"} == {"/dev/null"}
        assert len(processes_naming(mountpoint)) == 1


def test_the_launcher_of_the_checkout_mounts(
    guard: Watchdog, source: Path, mountpoint: Path
) -> None:
    """With this interpreter, if the checkout has no .venv of its own."""
    log = mountpoint.with_name("launcher-log")
    launcher = REPO / "bin" / "ninefuse"
    done = run(sys.executable, launcher, "--log", log, source, mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert (mountpoint / "file").read_bytes() == b"hello"
    pid = Daemon(mountpoint, log).pid
    unmount(mountpoint)
    wait_until(lambda: not is_running(pid), "the daemon's end")


@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_options_are_taken_before_and_after_the_paths(
    guard: Watchdog, tmp_path: Path, source: Path, mountpoint: Path, place: str
) -> None:
    options = ["-o", "ro,fsname=some\\,thing", "--model", "first", "--log", str(tmp_path / "log")]
    words = [str(source), str(mountpoint)]
    at = {"before": 0, "between": 1, "after": 2}[place]
    done = run(*NINEFUSE, *words[:at], *options, *words[at:])
    assert (done.returncode, done.stderr) == (0, "")
    left = Daemon(mountpoint, tmp_path / "log")
    (line,) = [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == str(mountpoint)
    ]
    assert line.split()[5].startswith("ro,")
    assert " - fuse.ninefuse some,thing " in line
    assert "model first" in left.log.text()
    assert (mountpoint / "file").read_bytes() == b"hello"
    unmount(mountpoint)
    wait_until(lambda: not is_running(left.pid), "the daemon's end")


def test_the_shorthand_for_no_threads(new_mount: Callable[..., Mount]) -> None:
    assert "model none" in new_mount("-s").counters().text


def test_debug_stays_in_the_foreground_and_logs_more(
    guard: Watchdog, source: Path, mountpoint: Path
) -> None:
    mount = Mount(
        guard,
        source,
        mountpoint,
        mountpoint.with_name("log"),
        [*NINEFUSE, "-d", str(source), str(mountpoint)],
        r"mounted on .*\n",
    )
    try:
        assert " DEBUG " in mount.log.text()
    finally:
        mount.end()
    mount.log.check()


@pytest.mark.parametrize("name", ["with space", "comma,back\\slash", "new\nline", "\udcff\udcfe"])
def test_directories_of_any_name(guard: Watchdog, source: Path, tmp_path: Path, name: str) -> None:
    strange, path = tmp_path / f"source {name}", tmp_path / f"mount {name}"
    source.rename(strange)
    path.mkdir()
    with daemon(guard, strange, path) as left:
        assert (path / "file").read_bytes() == b"hello"
        assert is_mounted(path)
        os.kill(left.pid, signal.SIGTERM)
        assert exit_code_of_orphan(left.pid) == 0
        assert not is_mounted(path)


def test_a_mount_of_a_mount(guard: Watchdog, new_mount: Callable[..., Mount]) -> None:
    lower = new_mount()
    upper = new_mount(source=lower.path)
    (upper.path / "directory").mkdir()
    (upper.path / "directory/file").write_bytes(b"through two daemons")
    assert (lower.source / "directory/file").read_bytes() == b"through two daemons"
    assert (upper.path / "directory").stat().st_ino == (lower.source / "directory").stat().st_ino
    unmount(upper.path)
    assert upper.wait() == 0


# What is refused, and how


def refused(code: ExitCode, done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check the exit code and the one line that goes with it."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("ninefuse: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_usage_errors(source: Path, mountpoint: Path) -> None:
    refused(ExitCode.USAGE, run(*NINEFUSE, "-o", "nonsense", source, mountpoint), "nonsense")
    refused(ExitCode.USAGE, run(*NINEFUSE, "--model", "third", source, mountpoint), "--model")
    refused(ExitCode.USAGE, run(*NINEFUSE, source), "MNT")
    log = mountpoint / "missing" / "log"
    refused(ExitCode.USAGE, run(*NINEFUSE, "--log", log, source, mountpoint), str(log))
    assert not is_mounted(mountpoint)


def test_a_missing_source(tmp_path: Path, mountpoint: Path) -> None:
    done = run(*NINEFUSE, tmp_path / "missing", mountpoint)
    refused(ExitCode.SOURCE_MISSING, done, str(tmp_path / "missing"), "does not exist")


def test_a_source_that_is_no_directory(source: Path, mountpoint: Path) -> None:
    done = run(*NINEFUSE, source / "file", mountpoint)
    refused(ExitCode.SOURCE_NOT_DIRECTORY, done, "not a directory")


def test_a_source_that_may_not_be_read(source: Path, mountpoint: Path) -> None:
    source.chmod(0)
    done = run(*(AS_NOBODY if AS_ROOT else NINEFUSE), source, mountpoint)
    source.chmod(0o700)
    refused(ExitCode.SOURCE_UNREADABLE, done, f"source {source}", "permissions")


def test_a_missing_mount_point(source: Path, tmp_path: Path) -> None:
    done = run(*NINEFUSE, source, tmp_path / "missing")
    refused(ExitCode.MOUNTPOINT_MISSING, done, str(tmp_path / "missing"), "mkdir")


def test_a_mount_point_that_is_no_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(*NINEFUSE, source, tmp_path / "file")
    refused(ExitCode.MOUNTPOINT_NOT_DIRECTORY, done, "not a directory")


def test_source_and_mount_point_the_same(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    refused(ExitCode.SAME_DIRECTORY, run(*NINEFUSE, source, source), "same directory")
    done = run(*NINEFUSE, source, tmp_path / "link")
    refused(ExitCode.SAME_DIRECTORY, done, "same directory")


def test_a_source_that_is_mounted_there_already(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """Only there, and only that: another directory may be mounted on top."""
    mount = new_mount()
    (tmp_path / "link").symlink_to(mount.source)
    for source in (mount.source, tmp_path / "link"):
        done = run(*NINEFUSE, source, mount.path)
        refused(ExitCode.SAME_DIRECTORY, done, "already", f"fusermount3 -u {mount.path}")
    for source, place in ((tmp_path / "other", mount.path), (mount.source, tmp_path / "place")):
        source.mkdir(exist_ok=True)
        place.mkdir(exist_ok=True)
        assert run(*NINEFUSE, source, place).returncode == ExitCode.OK
        unmount(place)
    assert is_mounted(mount.path)


def test_a_mount_point_inside_the_source(source: Path) -> None:
    (source / "below/deeper").mkdir(parents=True)
    done = run(*NINEFUSE, source, source / "below/deeper")
    refused(ExitCode.MOUNTPOINT_INSIDE_SOURCE, done, "inside")


def test_a_source_inside_the_mount_point(source: Path) -> None:
    (source / "below/deeper").mkdir(parents=True)
    done = run(*NINEFUSE, source / "below/deeper", source)
    refused(ExitCode.SOURCE_INSIDE_MOUNTPOINT, done, "inside")


def test_a_mount_that_is_refused(source: Path, mountpoint: Path) -> None:
    if AS_ROOT:
        # Root without the right to mount, as in most containers.
        without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
        log = mountpoint.with_name("log")
        done = run(*without, *NINEFUSE, "--log", log, source, mountpoint)
        refused(ExitCode.MOUNT_REFUSED, done, str(mountpoint), "--cap-add SYS_ADMIN")
    else:
        done = run(
            *NINEFUSE, "--log", mountpoint.with_name("log"), source, "/usr"
        )  # not a user's to mount on
        refused(ExitCode.MOUNT_REFUSED, done, "/usr")
    assert not is_mounted(mountpoint)


@pytest.mark.skipif(not AS_ROOT, reason="needs root: mount(2)")
def test_a_mount_that_fails_halfway_is_taken_back(
    source: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made, but there is no descriptor by which it would be found again."""

    def fail(point: int) -> None:
        assert is_mounted(mountpoint)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(rootmount, "MountPoint", fail)
    with fails(errno.EMFILE):
        rootmount.mount(cli.parse([str(source), str(mountpoint)]))
    assert not is_mounted(mountpoint)


def test_a_mount_over_another_says_what_it_hides(
    source: Path, mountpoint: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    other = tmp_path / "other"
    other.mkdir()
    try:
        assert run(*NINEFUSE, "--log", log, source, mountpoint).stderr == ""
        done = run(*NINEFUSE, "--log", log, other, mountpoint)
        assert done.returncode == 0
        told = f"{mountpoint}: this mount hides the one that is there (fuse.ninefuse)"
        assert done.stderr == f"ninefuse: {told}\n"
    finally:
        for _ in range(2):
            run("fusermount3", "-u", mountpoint)
        run("fusermount3", "-uz", mountpoint)
    assert not is_mounted(mountpoint)


@needs_namespace
def test_no_fuse_device() -> None:
    refused(ExitCode.NO_FUSE_DEVICE, run_apart("none", *NINEFUSE), "/dev/fuse", "modprobe fuse")


@needs_namespace
def test_a_fuse_device_that_may_not_be_opened() -> None:
    refused(ExitCode.FUSE_DEVICE_DENIED, run_apart("600", *AS_NOBODY), "/dev/fuse", "chmod 666")


@needs_namespace
def test_no_fusermount3() -> None:
    words = ("env", "PATH=/nonexistent", *AS_NOBODY)
    refused(ExitCode.NO_FUSERMOUNT, run_apart("666", *words), "fusermount3", "fuse3")


@needs_namespace
def test_allow_other_that_users_may_not_ask_for() -> None:
    done = run_apart("666", *AS_NOBODY, "-o", "allow_other")
    refused(ExitCode.ALLOW_OTHER_DENIED, done, "user_allow_other", "/etc/fuse.conf")


# Ending


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_in_the_foreground(
    new_mount: Callable[..., Mount], number: signal.Signals
) -> None:
    mount = new_mount()
    (mount.path / "file").write_bytes(b"x")
    mount.signal(number)
    assert mount.wait(5.0) == 0
    assert not is_mounted(mount.path)
    assert os.listdir(mount.path) == []
    assert (mount.source / "file").read_bytes() == b"x"


@pytest.mark.parametrize("model", MODELS)
def test_sigterm_ends_a_daemon(guard: Watchdog, source: Path, mountpoint: Path, model: str) -> None:
    with daemon(guard, source, mountpoint, "--model", model) as left:
        os.kill(left.pid, signal.SIGTERM)
        assert exit_code_of_orphan(left.pid, 5.0) == 0
        assert not is_mounted(mountpoint)
        wait_until(lambda: not processes_naming(mountpoint), "the end of all processes")


@pytest.mark.parametrize(
    "program",
    [
        ("fusermount3", "-u"),
        pytest.param(
            ("umount",), marks=pytest.mark.skipif(not AS_ROOT, reason="needs root: umount(8)")
        ),
    ],
)
def test_an_unmount_ends_the_daemon(
    guard: Watchdog, source: Path, mountpoint: Path, program: tuple[str, ...]
) -> None:
    with daemon(guard, source, mountpoint) as left:
        (mountpoint / "made").write_bytes(b"x")
        assert run(*program, mountpoint).returncode == 0
        assert exit_code_of_orphan(left.pid, 5.0) == 0
        assert not is_mounted(mountpoint)
        assert processes_naming(mountpoint) == []
        assert (source / "made").read_bytes() == b"x"


def test_a_busy_mount_is_not_unmounted_by_users(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount()
    with open(mount.path / "file", "w+b", buffering=0) as file:
        assert run("fusermount3", "-u", mount.path).returncode != 0
        file.write(b"still there")
        assert os.pread(file.fileno(), 100, 0) == b"still there"
        assert is_mounted(mount.path)
    unmount(mount.path)
    assert mount.wait(5.0) == 0


def test_a_busy_mount_is_detached_by_a_signal_and_served_until_it_is_no_more(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount()
    with open(mount.path / "file", "w+b", buffering=0) as file:
        file.write(b"before")
        mount.signal(signal.SIGTERM)
        wait_until(lambda: not is_mounted(mount.path), "the mount point given back")
        time.sleep(0.3)
        assert mount.process.poll() is None
        file.write(b" and after")
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), 100, 0) == b"before and after"
        assert os.listdir(mount.path) == []
    assert mount.wait(5.0) == 0
    assert (mount.source / "file").read_bytes() == b"before and after"


def test_a_mount_that_stays_busy_is_ended_all_the_same(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount(command=HASTY_NINEFUSE)
    with open(mount.path / "file", "wb", buffering=0) as file:
        file.write(b"acknowledged")
        mount.signal(signal.SIGTERM)
        assert mount.wait(10.0) == 0
        assert "may be in use" in mount.log.text()
        assert errno_of(file.write, b"x") in (errno.ENOTCONN, errno.ECONNABORTED)
        with suppress(OSError):
            file.close()
    assert (mount.source / "file").read_bytes() == b"acknowledged"


def test_a_mapped_page_written_after_the_mount_was_detached_is_not_lost(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount()
    (mount.path / "file").write_bytes(b"." * 3 * PAGE)
    fd = os.open(mount.path / "file", os.O_RDWR)
    mapping = mmap.mmap(fd, 3 * PAGE)
    os.close(fd)
    mapping[:5] = b"first"
    mount.signal(signal.SIGTERM)
    wait_until(lambda: not is_mounted(mount.path), "the mount point given back")
    time.sleep(0.2)
    mapping[PAGE : PAGE + 6] = b"second"
    assert mount.process.poll() is None
    mapping.close()
    assert mount.wait(5.0) == 0
    data = (mount.source / "file").read_bytes()
    assert data[:6] == b"first."
    assert data[PAGE : PAGE + 7] == b"second."


def has_grown(path: Path) -> bool:
    return path.stat().st_size > 10_000


def _append(fd: int, stop: Path) -> int:
    """Write numbered lines until told to stop; how many were acknowledged."""
    for n in range(1_000_000):
        assert os.write(fd, b"%09d\n" % n * 50) == 500
        if n % 8 == 0:
            if stop.exists():
                return n + 1
            os.fdatasync(fd)
    raise AssertionError("never told to stop")


def _map(path: Path, stop: Path) -> int:
    """Write numbers into a mapping, never synced, until told to stop; the last number."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 64 * PAGE) as mapping:
        for n in range(1_000_000):
            for page in range(64):
                mapping[page * PAGE : page * PAGE + 8] = b"%08d" % n
            if stop.exists():
                return n
    raise AssertionError("never told to stop")


@pytest.mark.parametrize("model", MODELS)
def test_sigterm_under_load_loses_nothing(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    mount = new_mount("--model", model)
    stop = tmp_path / "stop"
    (mount.path / "mapped").write_bytes(bytes(64 * PAGE))
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    with ExitStack() as stack:
        writers = []
        for who in range(3):
            fd = os.open(mount.path / f"file{who}", flags, 0o600)
            writers.append(stack.enter_context(Child(_append, fd, stop)))
            os.close(fd)
        mapper = stack.enter_context(Child(_map, mount.path / "mapped", stop))
        for who in range(3):
            wait_until(partial(has_grown, mount.source / f"file{who}"), "some writes")
        time.sleep(0.2)
        mount.signal(signal.SIGTERM)
        wait_until(lambda: not is_mounted(mount.path), "the mount point given back")
        time.sleep(0.3)
        stop.touch()
        for who, writer in enumerate(writers):
            count = writer.result()
            expected = b"".join(b"%09d\n" % n * 50 for n in range(count))
            assert (mount.source / f"file{who}").read_bytes() == expected
        last = mapper.result()
    assert mount.wait(5.0) == 0
    data = (mount.source / "mapped").read_bytes()
    assert {data[page * PAGE : page * PAGE + 8] for page in range(64)} == {b"%08d" % last}


def _append_until_it_fails(fd: int, report: Path) -> None:
    """Write numbered lines; report how many bytes of each were acknowledged."""
    with open(report, "wb", buffering=0) as said, suppress(OSError):
        for n in range(1_000_000):
            said.write(b"%d\n" % os.write(fd, b"%09d\n" % n * 50))


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_daemon_loses_nothing_that_was_acknowledged(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    mount = new_mount("--model", model)
    with ExitStack() as stack:
        for who in range(3):
            fd = os.open(mount.path / f"file{who}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            report = tmp_path / f"report{who}"
            stack.enter_context(Child(_append_until_it_fails, fd, report))
            os.close(fd)
        for who in range(3):
            wait_until(partial(has_grown, mount.source / f"file{who}"), "some writes")
        mount.signal(signal.SIGKILL)
        assert mount.wait() == -signal.SIGKILL
    for who in range(3):
        # The kernel cuts a write at a page's end: the last one may have been done in part.
        written = list(map(int, (tmp_path / f"report{who}").read_text().split()))
        assert len(written) >= 20
        assert set(written[:-1]) == {500}
        expected = b"".join((b"%09d\n" % n * 50)[:size] for n, size in enumerate(written))
        assert (mount.source / f"file{who}").read_bytes()[: len(expected)] == expected


def test_a_dead_mount_is_named_and_mounted_again_once_it_is_gone(
    guard: Watchdog, source: Path, mountpoint: Path
) -> None:
    # The kernel remembers the directory as it was, for a day.
    with daemon(guard, source, mountpoint, "-o", "cache=loose") as left:
        (mountpoint / "made").write_bytes(b"kept")
        assert mountpoint.is_dir()
        os.kill(left.pid, signal.SIGKILL)
        assert exit_code_of_orphan(left.pid) == -signal.SIGKILL
        assert errno_of(os.listdir, mountpoint) == errno.ENOTCONN
        done = run(*NINEFUSE, source, mountpoint)
        refused(ExitCode.MOUNTPOINT_DEAD, done, f"fusermount3 -u {mountpoint}")
        unmount(mountpoint)
    with daemon(guard, source, mountpoint) as left:
        assert (mountpoint / "made").read_bytes() == b"kept"
        unmount(mountpoint)
        assert exit_code_of_orphan(left.pid) == 0


def test_the_service_takes_away_a_dead_mount_and_no_other(
    guard: Watchdog, source: Path, mountpoint: Path
) -> None:
    """What docs/systemd has done before each start."""
    unit = (REPO / "docs/systemd/ninefuse@.service").read_text()
    script = re.search(r"^ExecStartPre=-/bin/sh -c '(.*)' sh %f$", unit, re.MULTILINE)
    assert script is not None
    with daemon(guard, source, mountpoint) as left:
        assert run("sh", "-c", script[1], "sh", mountpoint).returncode == 0
        assert (mountpoint / "file").read_bytes() == b"hello"
        os.kill(left.pid, signal.SIGKILL)
        assert exit_code_of_orphan(left.pid) == -signal.SIGKILL
        assert run("sh", "-c", script[1], "sh", mountpoint).returncode == 0
        assert not is_mounted(mountpoint)


def test_auto_unmount_has_fusermount3_watch_over_the_daemon(
    guard: Watchdog, source: Path, mountpoint: Path
) -> None:
    """Whether it clears up after a killed daemon is up to it, and to libfuse's timing."""
    with daemon(guard, source, mountpoint, "-o", "auto_unmount") as left:
        assert (mountpoint / "file").read_bytes() == b"hello"
        assert [p for p in processes_naming(mountpoint) if "fusermount3" in p]
        os.kill(left.pid, signal.SIGKILL)
        wait_until(lambda: not processes_naming(mountpoint), "the end of all processes")
        detach(mountpoint)


def test_a_second_signal_ends_at_once(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount()
    with open(mount.path / "file", "wb", buffering=0) as file:
        mount.signal(signal.SIGTERM)
        mount.log.wait_for("SIGTERM: unmounting")
        mount.signal(signal.SIGINT)
        assert mount.wait(2.0) == 128 + signal.SIGINT
        wait_until(lambda: not is_mounted(mount.path), "the mount point given back")
        assert errno_of(file.write, b"x")
        with suppress(OSError):
            file.close()


def test_sigterm_while_starting_leaves_no_mount(source: Path, mountpoint: Path) -> None:
    """Whenever it comes, it ends the command, and nothing stays mounted."""
    for delay in (0.05, 0.15, 0.25, 0.35, 0.45):
        process = subprocess.Popen(
            [*NINEFUSE, str(source), str(mountpoint)],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
        )
        with process:
            time.sleep(delay)
            process.send_signal(signal.SIGTERM)
            code = process.wait(PATIENCE)
        if code == 0:  # it had returned before
            unmount(mountpoint)
        else:
            assert code in (-signal.SIGTERM, 128 + signal.SIGTERM)
        wait_until(lambda: not processes_naming(mountpoint), "the end of all processes")
        assert not is_mounted(mountpoint)


# What a daemon says


def test_sigusr1_logs_counters_as_often_as_it_is_asked(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("--model", "second", "--threads", "3")
    (mount.path / "file").write_bytes(b"x")
    (mount.path / "missing").exists()
    (mount.path / "full/below").mkdir(parents=True)
    assert errno_of((mount.path / "full").rmdir) == errno.ENOTEMPTY
    for _ in range(5):
        counters = mount.counters()
    assert "model second, 3 workers" in counters.text
    assert re.search(r"operations: .*\bcreate 1\b.*\bwrite 1\b", counters.text)
    assert re.search(r"errors: .*\brmdir ENOTEMPTY 1\b", counters.text)
    assert "rename lock: waited for" in counters.text
    assert counters.opened == 0
    assert counters.fids == 4
    with open(mount.path / "file", "rb"):
        assert mount.counters().opened == 1


def test_sigusr2_logs_every_threads_stack(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("--threads", "5")
    since = mount.log.size()
    mount.signal(signal.SIGUSR2)
    mount.log.wait_for(r"requests under way for more than 2 s: 0\n", since)
    text = mount.log.text(since)
    for name in ("MainThread", "signals", *(f"worker-{n}" for n in range(5))):
        assert f"thread {name}:\n" in text
    assert (mount.path).is_dir()
