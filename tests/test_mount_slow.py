"""A file whose data is slow, on a real slow source (slowfs.py), and those beside it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from mounting import (
    HASTY_NINEFUSE,
    NINEFUSE,
    SESSION,
    Child,
    Mount,
    Watchdog,
    is_mounted,
    mount_ids,
    wait_until,
    write_control,
)
from slowfs import slow_bytes

# The command, whose workers become no more while their calls are stuck: by default they do after
# a tenth of a second, which a busy machine may need for less.
STEADY_NINEFUSE = (
    sys.executable,
    "-c",
    "import sys; from ninefuse.command import cli; from ninefuse.driving import workers;"
    " workers.STUCK = 600.0; sys.exit(cli.main())",
)
THREADS = 4
STEP = 8 << 20  # so far apart that the kernel reads ahead for none of them


class SlowSource:
    """The mount of a slowfs, and the way to tell it to go on."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.path = mount.path

    def withheld(self) -> list[str]:
        """What is withheld: `read OFFSET`, `lookup NAME`."""
        return re.findall(r"^(?:read|lookup) .*$", self.mount.log.text(), re.MULTILINE)

    def release(self) -> None:
        """Answer everything from now on."""
        assert self.mount.process.stdin is not None
        with suppress(BrokenPipeError):
            if not self.mount.process.stdin.closed:
                self.mount.process.stdin.write(b"release\n")
                self.mount.process.stdin.close()


@pytest.fixture
def slow(guard: Watchdog, tmp_path: Path) -> Iterator[SlowSource]:
    path = tmp_path / "slow-source"
    path.mkdir()
    script = Path(__file__).with_name("slowfs.py")
    mount = Mount(
        guard,
        path,
        path,
        tmp_path / "slowfs-log",
        [sys.executable, str(script), str(path)],
        r"^ready$",
        stdin=subprocess.PIPE,
    )
    if guard.control is not None:
        # Else twelve reads that are withheld stop all that the kernel reads ahead of use.
        (device,) = mount_ids(path)
        write_control(guard.control, device, "max_background", 1000)
        write_control(guard.control, device, "congestion_threshold", 1000)
    source = SlowSource(mount)
    yield source
    source.release()
    mount.end()
    mount.log.check()


@pytest.fixture
def released_last(slow: SlowSource) -> Iterator[Callable[..., Mount]]:
    """Take over mounts, which go once the source has been released."""
    mounts: list[Mount] = []

    def take(mount: Mount) -> Mount:
        mounts.append(mount)
        return mount

    yield take
    slow.release()
    with ExitStack() as ends:
        for mount in mounts:
            ends.callback(mount.log.check)
            ends.callback(mount.end)


def _read_slow(path: Path, number: int, signs: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    (signs / f"ready{number}").touch()
    wait_until((signs / "go").exists, "all readers ready")
    data = os.pread(fd, 100, number * STEP)
    os.close(fd)
    return data == slow_bytes(number * STEP, 100)


def _read(path: Path) -> bytes:
    with open(path / "other", "rb") as file:
        return file.read(50_000)  # what is there already, whatever `_write` adds meanwhile


def _stat(path: Path) -> int:
    return (path / "third").stat().st_size


def _create(path: Path) -> int:
    fd = os.open(path / "made", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.close(fd)
    return (path / "made").stat().st_size


def _write(path: Path) -> int:
    fd = os.open(path / "other", os.O_WRONLY)
    written = os.pwrite(fd, b"x" * 8192, 1 << 20)
    os.fsync(fd)
    os.close(fd)
    return written


def _list(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name != "made")


REQUESTS: dict[str, tuple[Callable[[Path], object], object]] = {
    "read": (_read, b"other" * 10_000),
    "stat": (_stat, 5),
    "create": (_create, 0),
    "write and fsync": (_write, 8192),
    "readdir": (_list, ["other", "slow", "third"]),
}


def _half(threads: int, model: str = "second") -> int:
    """How many calls one file can have made at a time: by workers, and by hands, if there are."""
    has_hands = model == "second" and SESSION == "native"
    return threads // 2 + (min(8, threads) // 2 if has_hands else 0)


@pytest.fixture
def start_readers(
    slow: SlowSource, tmp_path: Path
) -> Iterator[Callable[[Mount, int], list[Child[bool]]]]:
    """Start processes that read the slow file, each at an offset of its own.

    They read once all have opened it: a later open would wait in the kernel, not in the daemon,
    for the pages that are being read (fuse_open, without keep_cache, invalidates them).
    """
    with ExitStack() as stack:

        def start(mount: Mount, count: int) -> list[Child[bool]]:
            signs = tmp_path / "signs"
            signs.mkdir()
            readers = [
                stack.enter_context(Child(_read_slow, mount.path / "slow", number + 1, signs))
                for number in range(count)
            ]
            wait_until(lambda: len(os.listdir(signs)) == count, "all readers ready")
            (signs / "go").touch()
            return readers

        yield start
        slow.release()


@pytest.mark.parametrize("model", ["first", "second"])
def test_other_files_go_on_while_one_file_is_stuck(
    model: str,
    slow: SlowSource,
    new_mount: Callable[..., Mount],
    start_readers: Callable[[Mount, int], list[Child[bool]]],
) -> None:
    (slow.path / "other").write_bytes(b"other" * 10_000)
    (slow.path / "third").write_bytes(b"third")
    options = ("--model", model, "--threads", str(THREADS))
    mount = new_mount(*options, source=slow.path, command=STEADY_NINEFUSE)
    readers = start_readers(mount, 2 * THREADS)
    # Half of those who make calls are given to one file; the other readers are held back for it.
    half = _half(THREADS, model)
    wait_until(lambda: len(slow.withheld()) == half, "reads at the slow source")
    wait_until(lambda: mount.counters().held_back == 2 * THREADS - half, "held back reads")
    for name, (request, expected) in REQUESTS.items():
        with Child(request, mount.path) as child:
            assert child.result() == expected, name
    assert len(slow.withheld()) == half
    assert not any(reader.done() for reader in readers)
    slow.release()
    assert all(reader.result() for reader in readers)


def test_other_files_do_not_go_on_without_threads(
    slow: SlowSource,
    new_mount: Callable[..., Mount],
    start_readers: Callable[[Mount, int], list[Child[bool]]],
) -> None:
    (slow.path / "other").write_bytes(b"other" * 10_000)
    (slow.path / "third").write_bytes(b"third")
    mount = new_mount("--model", "none", source=slow.path)
    readers = start_readers(mount, 2 * THREADS)
    wait_until(slow.withheld, "a read at the slow source")
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(Child(request, mount.path))
            for name, (request, _) in REQUESTS.items()
        }
        stack.callback(slow.release)
        assert not any(child.done(0.3) for child in children.values())
        assert len(slow.withheld()) == 1
        assert not any(reader.done() for reader in readers)
        slow.release()
        for name, child in children.items():
            assert child.result() == REQUESTS[name][1], name
    assert all(reader.result() for reader in readers)


@pytest.mark.skipif(SESSION == "pyfuse3", reason="its kernel is told to look up one at a time")
@pytest.mark.parametrize("model", ["first", "second"])
def test_lookups_in_one_directory_go_on_side_by_side(
    model: str, slow: SlowSource, new_mount: Callable[..., Mount]
) -> None:
    """And what is known in it is used meanwhile. The source looks up one name at a time."""
    (slow.path / "other").write_bytes(b"other")
    mount = new_mount("--model", model, "--threads", str(THREADS), source=slow.path)
    (mount.path / "other").stat()
    with ExitStack() as stack:
        lookers = [
            stack.enter_context(Child(os.path.exists, mount.path / f"stuck{number}"))
            for number in range(2)
        ]
        stack.callback(slow.release)
        wait_until(slow.withheld, "a lookup at the slow source")
        wait_until(lambda: mount.counters().under_way == 2, "two lookups under way")
        with Child(_read, mount.path) as child:
            assert child.result() == b"other"
        assert not any(looker.done() for looker in lookers)
        slow.release()
        assert not any(looker.result() for looker in lookers)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: who alone may raise max_background")
def test_more_stuck_readers_than_the_kernel_s_default_limit(
    slow: SlowSource,
    new_mount: Callable[..., Mount],
    start_readers: Callable[[Mount, int], list[Child[bool]]],
) -> None:
    """The kernel sends 12 background requests by default; a stuck buffered read is one."""
    (slow.path / "other").write_bytes(b"other" * 10_000)
    mount = new_mount("--threads", "16", source=slow.path, command=STEADY_NINEFUSE)
    readers = start_readers(mount, 32)
    half = _half(16)
    wait_until(lambda: len(slow.withheld()) == half, "reads at the slow source")
    wait_until(lambda: mount.counters().held_back == 32 - half, "held back reads")
    with Child(_read, mount.path) as child:
        assert child.result() == b"other" * 10_000
    slow.release()
    assert all(reader.result() for reader in readers)


def test_readers_killed_while_stuck_leave_nothing_behind(
    slow: SlowSource,
    new_mount: Callable[..., Mount],
    start_readers: Callable[[Mount, int], list[Child[bool]]],
) -> None:
    (slow.path / "other").write_bytes(b"other")
    mount = new_mount("--threads", str(THREADS), source=slow.path)
    for name in ("slow", "other"):
        (mount.path / name).stat()
    before = mount.counters()
    readers = start_readers(mount, 2 * THREADS)
    wait_until(lambda: mount.counters().held_back, "held back reads")
    for reader in readers:
        os.kill(reader.pid, signal.SIGKILL)
    assert (mount.path / "other").read_bytes() == b"other"
    slow.release()
    assert [reader.wait() for reader in readers] == [-signal.SIGKILL] * len(readers)
    wait_until(
        lambda: (
            (mount.counters().fids, mount.counters().descriptors)
            == (before.fids, before.descriptors)
        ),
        "descriptors and fids as before",
    )


def test_sigusr2_tells_stacks_and_slow_requests(
    slow: SlowSource, new_mount: Callable[..., Mount]
) -> None:
    """A rename goes on beside a lookup that is stuck in another directory."""
    # Whose name is known: under pyfuse3 the kernel asks one directory for one name at a time.
    (slow.path / "below").mkdir()
    (slow.path / "below/old").write_bytes(b"x")
    options = ("--threads", str(THREADS), "-o", "entry_timeout=100")
    mount = new_mount(*options, source=slow.path)
    below = mount.path / "below"
    below.stat()
    with Child(os.path.exists, mount.path / "stuck") as looker:
        wait_until(slow.withheld, "a lookup at the slow source")
        os.rename(below / "old", below / "older")

        def slow_requests() -> list[str]:
            since = mount.log.size()
            mount.signal(signal.SIGUSR2)
            mount.log.wait_for(r"requests under way for more than", since)
            wait_until(lambda: mount.log.text(since).endswith("\n"), "the whole line")
            return re.findall(r"lookup \(request .*", mount.log.text(since))

        wait_until(slow_requests, "a slow request", seconds=10.0)
        (lookup,) = slow_requests()
        assert re.search(r"lookup .* on (worker|leader)-\d+", lookup)
        assert "holds" not in lookup
        text = mount.log.text()
        assert re.search(r"thread worker-\d+:", text)
        assert "thread MainThread:" in text
        assert "_step" in text  # what the worker is stuck in
        slow.release()
        assert looker.result() is False
    assert (slow.path / "below/older").read_bytes() == b"x"


def test_sigterm_ends_a_daemon_whose_dispatcher_is_stuck(
    slow: SlowSource,
    new_mount: Callable[..., Mount],
    start_readers: Callable[[Mount, int], list[Child[bool]]],
) -> None:
    mount = new_mount("--model", "none", source=slow.path, command=HASTY_NINEFUSE)
    (reader,) = start_readers(mount, 1)
    wait_until(slow.withheld, "a read at the slow source")
    mount.log.expect("the dispatcher does not end")
    mount.signal(signal.SIGTERM)
    assert mount.wait() == 1
    wait_until(lambda: not is_mounted(mount.path), "the mount point given back")
    with pytest.raises(AssertionError, match=r"Errno (5|103|107)"):
        reader.result()


def test_a_second_signal_ends_a_daemon_whose_dispatcher_is_stuck_at_once(
    slow: SlowSource,
    new_mount: Callable[..., Mount],
    start_readers: Callable[[Mount, int], list[Child[bool]]],
) -> None:
    mount = new_mount("--model", "none", source=slow.path, command=NINEFUSE)
    start_readers(mount, 1)
    wait_until(slow.withheld, "a read at the slow source")
    mount.signal(signal.SIGTERM)
    mount.log.wait_for("SIGTERM: unmounting")
    mount.signal(signal.SIGINT)
    assert mount.wait(3.0) == 128 + signal.SIGINT
    wait_until(lambda: not is_mounted(mount.path), "the mount point given back")
