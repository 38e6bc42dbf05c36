"""Each thing that is wrong before the mount has its own exit code and one line of advice."""

import dataclasses
import errno
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ninefuse.command import preflight
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.settings import Settings

NOBODY = 65534


def outcome(settings: Settings) -> tuple[ExitCode, str]:
    """Return the exit code of the check and its message."""
    try:
        preflight.check(settings)
    except Failure as failure:
        return failure.code, failure.message
    return ExitCode.OK, ""


def outcome_as_user(settings: Settings) -> tuple[ExitCode, str]:
    """As outcome, but without root's rights, which no permission holds back.

    Only the effective ids change: they are what counts, whoever has started the process.
    """
    if os.geteuid() != 0:
        return outcome(settings)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
            os.write(write_end, pickle.dumps(outcome(settings)))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    code, message = pickle.loads(answer)
    return code, message


@pytest.fixture
def base() -> Iterator[Path]:
    """Return a directory that every user may enter, which pytest's tmp_path is not."""
    path = Path(tempfile.mkdtemp(prefix="ninefuse-test-"))
    path.chmod(0o755)
    yield path.resolve()
    for directory in [path, *path.rglob("*/")]:
        if directory.is_dir() and not directory.is_symlink():
            directory.chmod(0o700)
    shutil.rmtree(path)


@pytest.fixture
def settings(base: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return settings that pass all checks, for root and for others."""
    for name in ("src", "mnt", "bin"):
        (base / name).mkdir()
    (base / "fuse").touch()
    (base / "fuse").chmod(0o666)
    (base / "fuse.conf").write_text("# user_allow_other\n")
    (base / "bin" / "fusermount3").touch()
    (base / "bin" / "fusermount3").chmod(0o755)
    monkeypatch.setattr(preflight, "FUSE_DEVICE", str(base / "fuse"))
    monkeypatch.setattr(preflight, "FUSE_CONF", str(base / "fuse.conf"))
    monkeypatch.setenv("PATH", str(base / "bin"))
    return Settings(source=str(base / "src"), mountpoint=str(base / "mnt"))


Changed = Callable[..., Settings]


@pytest.fixture
def changed(settings: Settings) -> Changed:
    """Return a function that gives the settings with other fields; paths may be Path objects."""

    def change(**fields: Any) -> Settings:
        for name, value in fields.items():
            fields[name] = str(value) if isinstance(value, Path) else value
        return dataclasses.replace(settings, **fields)

    return change


def fake_stat(
    monkeypatch: pytest.MonkeyPatch, path: Path, fake: Callable[[], os.stat_result]
) -> None:
    """Let os.stat of that one path return, or raise, what fake does."""
    real = os.stat

    def stat(name: object, *args: object, **kwargs: object) -> os.stat_result:
        if name == str(path):
            return fake()
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)


def raising(number: int) -> Callable[[], os.stat_result]:
    def fake() -> os.stat_result:
        raise OSError(number, os.strerror(number))

    return fake


def test_nothing_wrong(settings: Settings) -> None:
    assert outcome(settings) == (ExitCode.OK, "")
    assert outcome_as_user(settings) == (ExitCode.OK, "")


def test_source_missing(changed: Changed, base: Path) -> None:
    code, message = outcome(changed(source=base / "none"))
    assert code == ExitCode.SOURCE_MISSING
    assert str(base / "none") in message
    assert outcome(changed(source=base / "fuse" / "below-a-file"))[0] == ExitCode.SOURCE_MISSING


def test_source_not_a_directory(changed: Changed, base: Path) -> None:
    assert outcome(changed(source=base / "fuse"))[0] == ExitCode.SOURCE_NOT_DIRECTORY


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111, 0o333])
def test_source_must_be_listed_and_entered(settings: Settings, mode: int) -> None:
    os.chmod(settings.source, mode)
    code, message = outcome_as_user(settings)
    assert code == ExitCode.SOURCE_UNREADABLE
    assert settings.source in message


def test_source_below_a_closed_directory(changed: Changed, base: Path) -> None:
    (base / "closed" / "src").mkdir(parents=True)
    (base / "closed").chmod(0)
    code, message = outcome_as_user(changed(source=base / "closed" / "src"))
    assert code == ExitCode.SOURCE_UNREADABLE
    assert "Permission denied" in message


def test_source_that_may_only_be_read_is_enough(settings: Settings) -> None:
    os.chmod(settings.source, 0o555)
    assert outcome_as_user(settings)[0] == ExitCode.OK


def test_mountpoint_missing(changed: Changed, base: Path) -> None:
    code, message = outcome(changed(mountpoint=base / "none"))
    assert code == ExitCode.MOUNTPOINT_MISSING
    assert "mkdir" in message
    code, _ = outcome(changed(mountpoint=base / "fuse" / "below-a-file"))
    assert code == ExitCode.MOUNTPOINT_MISSING


def test_mountpoint_not_a_directory(changed: Changed, base: Path) -> None:
    assert outcome(changed(mountpoint=base / "fuse"))[0] == ExitCode.MOUNTPOINT_NOT_DIRECTORY


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ECONNABORTED, errno.EIO])
def test_dead_mount(
    changed: Changed, base: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    mountpoint = base / "a dead mount"
    fake_stat(monkeypatch, mountpoint, raising(number))
    code, message = outcome(changed(mountpoint=mountpoint))
    assert code == ExitCode.MOUNTPOINT_DEAD
    assert f"fusermount3 -u '{mountpoint}'" in message


def test_mountpoint_that_may_not_be_reached(changed: Changed, base: Path) -> None:
    (base / "closed" / "mnt").mkdir(parents=True)
    (base / "closed").chmod(0)
    code, message = outcome_as_user(changed(mountpoint=base / "closed" / "mnt"))
    assert code == ExitCode.MOUNT_REFUSED
    assert "Permission denied" in message


@pytest.mark.parametrize(
    ("which", "expected"),
    [("mountpoint", ExitCode.MOUNTPOINT_DEAD), ("source", ExitCode.SOURCE_UNREADABLE)],
)
def test_a_hung_directory_does_not_hang_the_command(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, which: str, expected: ExitCode
) -> None:
    def hang() -> os.stat_result:
        time.sleep(60)
        raise AssertionError

    fake_stat(monkeypatch, Path(getattr(settings, which)), hang)
    monkeypatch.setattr(preflight, "STAT_TIMEOUT", 0.3)
    forked: list[int] = []
    real_fork = os.fork

    def fork() -> int:
        forked.append(real_fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", fork)
    start = time.monotonic()
    code, message = outcome(settings)
    assert time.monotonic() - start < 10
    assert code == expected
    assert "0.3 s" in message
    # The child that was stuck is not left behind; those that answered are collected already.
    assert os.WTERMSIG(os.waitpid(forked[-1], 0)[1]) == signal.SIGKILL
    with pytest.raises(ChildProcessError):
        os.waitpid(forked[0], os.WNOHANG)


def test_same_directory(changed: Changed, base: Path) -> None:
    assert outcome(changed(mountpoint=base / "src"))[0] == ExitCode.SAME_DIRECTORY
    (base / "link").symlink_to("src")
    assert outcome(changed(mountpoint=base / "link"))[0] == ExitCode.SAME_DIRECTORY


def test_same_directory_where_inode_numbers_do_not_last(
    changed: Changed, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "src" / "a").mkdir()
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    assert outcome(changed(mountpoint=base / "src"))[0] == ExitCode.SAME_DIRECTORY
    code, _ = outcome(changed(mountpoint=base / "src" / "a"))
    assert code == ExitCode.MOUNTPOINT_INSIDE_SOURCE


def test_same_directory_under_two_names(
    settings: Settings, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a bind mount makes it.
    inode = os.stat(settings.source)
    fake_stat(monkeypatch, base / "mnt", lambda: inode)
    assert outcome(settings)[0] == ExitCode.SAME_DIRECTORY


def test_mountpoint_inside_source(changed: Changed, base: Path) -> None:
    (base / "src" / "a" / "b").mkdir(parents=True)
    (base / "link").symlink_to("src/a")
    for mountpoint in (base / "src" / "a", base / "src" / "a" / "b", base / "link" / "b"):
        code, message = outcome(changed(mountpoint=mountpoint))
        assert code == ExitCode.MOUNTPOINT_INSIDE_SOURCE
        assert str(mountpoint) in message
    assert outcome(changed(source="/"))[0] == ExitCode.MOUNTPOINT_INSIDE_SOURCE


def test_mountpoint_inside_a_bind_mount_of_the_source(
    changed: Changed, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "other" / "mnt").mkdir(parents=True)
    inode = os.stat(base / "src")
    fake_stat(monkeypatch, base / "other", lambda: inode)
    code, _ = outcome(changed(mountpoint=base / "other" / "mnt"))
    assert code == ExitCode.MOUNTPOINT_INSIDE_SOURCE


def test_source_inside_mountpoint(changed: Changed, base: Path) -> None:
    (base / "mnt" / "a").mkdir()
    (base / "link").symlink_to("mnt/a")
    for source in (base / "mnt" / "a", base / "link"):
        assert outcome(changed(source=source))[0] == ExitCode.SOURCE_INSIDE_MOUNTPOINT
    assert outcome(changed(mountpoint="/"))[0] == ExitCode.SOURCE_INSIDE_MOUNTPOINT


def test_a_name_that_begins_alike_is_not_inside(changed: Changed, base: Path) -> None:
    (base / "srcs").mkdir()
    (base / "sr").mkdir()
    assert outcome(changed(mountpoint=base / "srcs"))[0] == ExitCode.OK
    assert outcome(changed(mountpoint=base / "sr"))[0] == ExitCode.OK


def test_no_device(settings: Settings, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "fuse").unlink()
    code, message = outcome(settings)
    assert code == ExitCode.NO_FUSE_DEVICE
    assert "modprobe fuse" in message
    # A node without a driver gives ENXIO, and so does a socket.
    monkeypatch.chdir(base)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("fuse")
        assert outcome(settings)[0] == ExitCode.NO_FUSE_DEVICE


def test_device_denied(settings: Settings, base: Path) -> None:
    (base / "fuse").chmod(0o400)
    assert outcome_as_user(settings)[0] == ExitCode.FUSE_DEVICE_DENIED


def test_fusermount_is_for_everybody_but_root(
    settings: Settings, changed: Changed, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "bin" / "fusermount3").unlink()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, message = outcome(settings)
    assert code == ExitCode.NO_FUSERMOUNT
    assert "fuse3" in message
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert outcome(settings)[0] == ExitCode.OK
    # libfuse leaves this to fusermount3 for root as well.
    assert outcome(changed(mount_options=("auto_unmount",)))[0] == ExitCode.NO_FUSERMOUNT


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        (None, ExitCode.ALLOW_OTHER_DENIED),
        ("", ExitCode.ALLOW_OTHER_DENIED),
        ("#user_allow_other\n", ExitCode.ALLOW_OTHER_DENIED),
        ("user_allow_others\n", ExitCode.ALLOW_OTHER_DENIED),
        ("\xff\nmount_max = 3\n  user_allow_other # for all\n", ExitCode.OK),
        ("user_allow_other", ExitCode.OK),
    ],
)
def test_allow_other(
    changed: Changed,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    conf: str | None,
    expected: ExitCode,
) -> None:
    (base / "fuse.conf").unlink()
    if conf is not None:
        (base / "fuse.conf").write_bytes(conf.encode("latin-1"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert outcome(changed(allow_other=True))[0] == expected
    assert outcome(changed())[0] == ExitCode.OK
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert outcome(changed(allow_other=True))[0] == ExitCode.OK


def test_a_mount_handed_over_as_a_descriptor(changed: Changed, base: Path) -> None:
    """Nothing of it is looked at but the descriptor: the rest would wait until it is served."""
    (base / "fuse").unlink()
    device = os.open("/dev/fuse", os.O_RDWR)
    other = os.open("/dev/null", os.O_RDWR)
    try:
        path = f"/dev/fd/{device}"
        assert outcome(changed(mountpoint=path))[0] == ExitCode.OK
        missing = changed(mountpoint=path, source=base / "none")
        assert outcome(missing)[0] == ExitCode.SOURCE_MISSING
        assert outcome(changed(mountpoint=f"{path}/x"))[0] == ExitCode.MOUNTPOINT_MISSING
        code, message = outcome(changed(mountpoint=f"/dev/fd/{other}"))
        assert code == ExitCode.MOUNT_REFUSED
        assert f"descriptor {other} " in message
    finally:
        os.close(device)
        os.close(other)
    for number in (device, 10**30):
        assert outcome(changed(mountpoint=f"/dev/fd/{number}"))[0] == ExitCode.MOUNT_REFUSED


def test_a_message_is_one_line_whatever_the_name(changed: Changed, base: Path) -> None:
    _, message = outcome(changed(source=base / "a\nb\x1b[2J"))
    assert message.isprintable()
    assert r"a\nb\x1b[2J" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="users follow their symlinks")
def test_root_follows_no_symlink_that_others_can_put_there(
    settings: Settings, base: Path, changed: Changed
) -> None:
    (base / "shared").mkdir()
    (base / "shared" / "link").symlink_to(base / "mnt")
    linked = changed(mountpoint=base / "shared" / "link")
    assert preflight.check(linked).mountpoint == settings.mountpoint
    (base / "shared").chmod(0o777)
    code, message = outcome(linked)
    assert code == ExitCode.MOUNT_REFUSED
    assert message.startswith(f"mount point {linked.mountpoint} is a symlink in a directory")
