"""Files whose content is made as they are read: /proc and its like, below the source."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_systems import mounted
from mounting import Child, Mount, errno_of, wait_until
from servers import SOME_MODELS

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts in the source"),
]


@contextlib.contextmanager
def live(new_mount: Callable[..., Mount], model: str, kind: str = "proc") -> Iterator[Mount]:
    """A mount whose source has such a file system at ``live``."""
    mount = new_mount("--model", model)
    with mounted(kind, kind, mount.source / "live"):
        yield mount
        mount.end()


def read(path: Path) -> bytes:
    """With as few calls as there can be: one, and one for the end."""
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.read(fd, 1 << 16)
        assert os.read(fd, 1 << 16) == b"" or len(data) > 1000
        return data
    finally:
        os.close(fd)


@pytest.mark.parametrize("model", SOME_MODELS)
def test_files_of_proc_have_content_though_their_size_is_0(
    new_mount: Callable[..., Mount], model: str
) -> None:
    with live(new_mount, model) as mount:
        proc = mount.path / "live"
        for name in ("version", "sys/kernel/hostname", "1/comm", "filesystems", "cpuinfo"):
            assert (proc / name).stat().st_size == 0
            assert read(proc / name) == read(Path("/proc", name)) != b"", name
        assert len((proc / "1/mounts").read_bytes()) > 100
        # What changes is seen at once, by a descriptor that is open, too.
        with open(proc / "uptime", "rb", buffering=0) as file:
            before = file.read(100)
            time.sleep(0.03)
            file.seek(0)
            assert file.read(100) != before
        with open(proc / "version", "rb") as file:
            assert file.read() == Path("/proc/version").read_bytes()


@pytest.mark.parametrize("model", SOME_MODELS)
def test_each_write_to_such_a_file_arrives_as_one(
    new_mount: Callable[..., Mount], model: str
) -> None:
    """A number in two writes would be two numbers; an error is the file's own."""
    # Each process has one of its own: the watchdog's test needs no setting of the whole machine.
    with live(new_mount, model) as mount, Child(time.sleep, 30) as child:
        proc = mount.path / "live" / str(child.pid)
        own = Path("/proc") / str(child.pid)
        (proc / "oom_score_adj").write_text("1")
        (proc / "oom_score_adj").write_text("321\n")
        assert (own / "oom_score_adj").read_text() == "321\n"
        assert (proc / "oom_score_adj").read_text() == "321\n"
        fd = os.open(proc / "oom_score_adj", os.O_RDWR)
        try:
            assert os.write(fd, b"12\n") == 3
            assert os.pread(fd, 100, 0) == b"12\n"
            assert errno_of(os.write, fd, b"no number") == errno.EINVAL
            assert errno_of(os.pwrite, fd, b"5000", 0) == errno.EINVAL
        finally:
            os.close(fd)
        assert (own / "oom_score_adj").read_text() == "12\n"


def figureless(data: bytes) -> bytes:
    """The same for two readings of counters."""
    return re.sub(rb"\d+", b"0", data)[:2000]


def beginning(path: Path) -> bytes | None:
    """What a file begins with; None where it has gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["sysfs", "tracefs", "debugfs", "cgroup2"])
def test_other_file_systems_of_the_kind(new_mount: Callable[..., Mount], kind: str) -> None:
    """Whatever size their files tell, all of each is read."""
    with live(new_mount, "second", kind) as mount:
        compared = 0
        for directory, below, names in os.walk(mount.source / "live"):
            if "tracing" in below:
                below.remove("tracing")  # an automount
            if "events" in below:
                below.remove("events")  # where all files have one inode number
            for name in names:
                path = Path(directory, name)
                shown = mount.path / path.relative_to(mount.source)
                if path.is_symlink() or not path.stat().st_mode & 0o444:
                    continue
                if name in ("trace_pipe", "kmsg") or "per_cpu" in directory:
                    continue  # waits for what is to come
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                except OSError:
                    continue
                try:
                    before = os.read(fd, 4096)
                    os.lseek(fd, 0, os.SEEK_SET)
                    after = os.read(fd, 4096)
                except OSError:
                    continue
                finally:
                    os.close(fd)
                if before and before == after:
                    through = beginning(shown)
                    if beginning(path) != before:
                        continue  # it has changed, or gone, meanwhile
                    assert through is not None, path
                    assert figureless(through) == figureless(before), path
                    compared += 1
            if compared > 200:
                break
        if not compared:
            pytest.skip(f"no file of {kind} has content")


def test_a_pipe_of_events_gives_what_has_come_and_does_not_wait_for_more(
    new_mount: Callable[..., Mount],
) -> None:
    with live(new_mount, "second", "tracefs") as mount:
        instance = mount.source / f"live/instances/ninefuse_{os.getpid()}"
        try:
            instance.mkdir(parents=True)
        except OSError as e:
            pytest.skip(f"no instance of tracing can be had: {e.strerror}")
        try:
            shown = mount.path / instance.relative_to(mount.source)
            (shown / "trace_marker").write_text("from the mount\n")

            def one_read() -> bytes:
                with open(shown / "trace_pipe", "rb", buffering=0) as pipe:
                    return pipe.read(1 << 16)

            with Child(one_read) as child:
                assert b"from the mount" in child.result()
        finally:
            mount.end()
            wait_until(lambda: errno_of(instance.rmdir) == 0, "an instance that nobody uses")


def test_a_server_below_the_source_may_have_such_files(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """One that has mounted /proc, say, as a FUSE server does: another ninefuse."""
    inner = new_mount(source=Path("/proc"))
    outer = new_mount(source=inner.path)
    assert (outer.path / "version").stat().st_size == 0
    assert (outer.path / "version").read_bytes() == Path("/proc/version").read_bytes()
    outer.end()


def test_an_empty_file_can_be_mapped_where_it_grows(new_mount: Callable[..., Mount]) -> None:
    """Past the cache it could not: nothing of the kind happens on a file system of files."""
    mount = new_mount()
    (mount.source / "empty").touch()
    for flags in (os.O_RDONLY, os.O_RDWR):
        fd = os.open(mount.path / "empty", flags)
        try:
            (mount.path / "empty").write_bytes(b"x" * 4096)
            with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
                assert mapped[:2] == b"xx"
            os.truncate(mount.path / "empty", 0)
        finally:
            os.close(fd)
