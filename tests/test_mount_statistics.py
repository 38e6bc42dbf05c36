"""The counters that a mount publishes as an extended attribute of its root."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, errno_of, wait_until

from ninefuse.settings import MODELS, SESSIONS

NAME = "user.ninefuse.stats"


def statistics(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.getxattr(mount.path, NAME))
    return found


@pytest.mark.parametrize("session", SESSIONS[1:])
@pytest.mark.parametrize("model", MODELS)
def test_requests_are_counted_by_callback(
    new_mount: Callable[..., Mount], model: str, session: str
) -> None:
    mount = new_mount("--session", session, "--model", model, "--threads", "3", "-o", "inline=off")
    second = 1 if mount.is_native else 2  # pyfuse3's answers leave from trio's thread
    with open(mount.path / "file", "wb", buffering=0) as file:
        for _ in range(10):
            file.write(b"x")
        assert errno_of(os.stat, mount.path / "absent") == errno.ENOENT
        found = statistics(mount)
    assert found["version"] == 2
    assert found["pid"] == mount.pid
    assert (found["source"], found["mountpoint"]) == (str(mount.source), str(mount.path))
    assert (found["model"], found["threads"]) == (model, 0 if model == "none" else 3)
    assert abs(found["time"] - time.time()) < 60
    assert 0 < found["uptime"] < 60
    assert not {"version", "attach"} & found["operations"].keys(), "they are no callbacks"
    for callback, count in (("create", 1), ("write", 10)):
        answered = found["operations"][callback]
        assert answered["count"] == count
        assert answered["errors"] == {}
        assert sum(answered["latency_us"].values()) == count
        assert 0 < float(max(answered["latency_us"], key=float)) < 10e6
        calls = {"create": 3, "write": 1}[callback] * count
        assert answered["on_dispatcher"] == (count if model == "none" else 0)
        crossings = {"none": 0, "first": 2 * calls, "second": second * count}
        assert answered["crossings"] == crossings[model]
    # The file was looked for before it was made.
    assert found["operations"]["lookup"]["errors"] == {"ENOENT": 2}
    assert found["requests"] == {"running": 0, "queued": 0, "held_back": 0}
    assert found["locks"].keys() == {"rename lock", "fid table"}
    assert found["locks"]["rename lock"]["waits"] == 0
    assert found["fids"] == {"known": 3, "open": 1}, "the root, the file, its handle"
    assert found["descriptors"]["nodes"] == 2
    assert found["descriptors"]["open"] > 5
    resident = mount.status("VmRSS") * 1024
    assert resident / 2 < found["memory"]["resident"] < resident * 2


def test_the_value_stays_for_a_second_and_then_changes(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount()
    begin = time.monotonic()
    first = os.getxattr(mount.path, NAME)
    for number in range(20):
        (mount.path / f"file{number}").touch()
    second = os.getxattr(mount.path, NAME)
    if time.monotonic() - begin < 1:
        assert second == first, "or the size that was asked for would not fit"
    wait_until(lambda: os.getxattr(mount.path, NAME) != first, "a new value")
    assert statistics(mount)["operations"]["create"]["count"] == 20


def test_its_size_is_round(new_mount: Callable[..., Mount]) -> None:
    """So that a size asked for just before the second is over is right as a rule."""
    value = os.getxattr(new_mount().path, NAME)
    assert len(value) % 4096 == 0
    assert value.rstrip(b" ").endswith(b"}")


def test_without_descriptors_left_the_counters_are_had_and_the_mount_lives(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount()
    (mount.path / "file").write_bytes(b"x")
    soft, hard = resource.prlimit(mount.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(mount.pid, resource.RLIMIT_NOFILE, (3, hard))
    assert errno_of(os.open, mount.path / "file", os.O_RDONLY) == errno.EMFILE
    try:
        assert statistics(mount)["operations"]["open"]["errors"] == {"EMFILE": 1}
    except OSError:
        # Before Linux 6.2 descriptors are counted with one.
        assert tuple(map(int, os.uname().release.split(".")[:2])) < (6, 2)
    resource.prlimit(mount.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert (mount.path / "file").read_bytes() == b"x"
    resource.prlimit(mount.pid, resource.RLIMIT_NOFILE, (3, hard))
    mount.end()


def test_it_is_in_no_listing_and_cannot_be_set_or_removed(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """Not even where the source's directory has an attribute of that name."""
    source = tmp_path / "source"
    (source / "directory").mkdir(parents=True)
    os.setxattr(source, NAME, b"the source's")
    os.setxattr(source, "user.other", b"1")
    mount = new_mount(source=source)
    assert "user.other" in os.listxattr(mount.path)
    assert NAME not in os.listxattr(mount.path)
    assert errno_of(os.setxattr, mount.path, NAME, b"x") == errno.EPERM
    assert errno_of(os.removexattr, mount.path, NAME) == errno.EPERM
    assert statistics(mount)["version"] == 2
    assert os.getxattr(source, NAME) == b"the source's"
    # Elsewhere it is an attribute like any other.
    inner = mount.path / "directory"
    assert errno_of(os.getxattr, inner, NAME) == errno.ENODATA
    os.setxattr(inner, NAME, b"mine")
    assert os.getxattr(source / "directory", NAME) == b"mine"
    assert NAME in os.listxattr(inner)
    os.removexattr(inner, NAME)


def test_without_xattr_the_counters_come_by_signal(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "noxattr")
    assert errno_of(os.getxattr, mount.path, NAME) == errno.EOPNOTSUPP
    (mount.path / "file").touch()
    text = mount.counters().text
    assert "create 1" in text
    assert " crossings; " in text


def test_what_the_dispatcher_does_itself_is_told(new_mount: Callable[..., Mount]) -> None:
    """On the tests' own file system, which is local, calls that wait for nobody stay with it."""
    mount = new_mount("-o", "inline=auto,attr_timeout=0")
    (mount.path / "file").touch()
    for _ in range(200):
        (mount.path / "file").stat()
    assert statistics(mount)["operations"]["getattr"]["on_dispatcher"] > 190
