"""Many files, many clients, and clients that are killed: what a daemon keeps and how it stalls."""

from __future__ import annotations

import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import pytest
from mounting import SOAK, Child, Mount, wait_until
from servers import SOME_MODELS

from ninefuse.settings import MODELS

pytestmark = pytest.mark.soak

STALL = 0.3  # seconds
IDLE_MEMORY = 60 * 1024  # KiB
FEW_DESCRIPTORS = 256
# For tests that take seconds each, of what the models share or the second is worst at.


def figures(mount: Mount) -> tuple[int, int, int, int]:
    now = mount.counters()
    return now.fids, now.opened, now.descriptors, now.node_descriptors


def at_rest(mount: Mount) -> tuple[int, int, int, int]:
    """Fids and descriptors once the kernel has sent all that it sends later: releases, forgets."""
    os.listdir(mount.path)  # libfuse opens a pipe of its own for the first longer answer
    seen = [figures(mount)]

    def unchanged() -> bool:
        time.sleep(0.05)
        seen.append(figures(mount))
        return len(seen) > 3 and len(set(seen[-4:])) == 1

    wait_until(unchanged, "a daemon at rest", 10.0)
    return seen[-1]


# Leaks


def _use_files(top: Path, count: int) -> None:
    """Make, copy, look at, rename and remove files in many ways."""
    top.mkdir()
    for n in range(count):
        path = top / f"file{n}"
        path.write_bytes(b"x" * n)
        shutil.copy(path, top / f"copy{n}")
        os.link(path, top / f"link{n}")
        (top / f"symlink{n}").symlink_to("nowhere")
        path.rename(top / f"moved{n}")
        with open(top / f"moved{n}", "r+b") as file:
            if n % 3:
                (top / f"moved{n}").unlink()
            file.truncate(0)
        (top / f"missing{n}").exists()
        if n % 20 == 0:
            os.listdir(top)
    shutil.rmtree(top)


@pytest.mark.parametrize("model", SOME_MODELS)
def test_fids_and_descriptors_are_given_back(new_mount: Callable[..., Mount], model: str) -> None:
    mount = new_mount("--model", model)
    before = at_rest(mount)
    children = [Child(_use_files, mount.path / str(who), 40) for who in range(3)]
    for child in children:
        with child:
            child.result()
    assert at_rest(mount) == before


def _copy_and_delete(source: Path, target: Path) -> int:
    """Copy a tree in as few requests as that takes, and delete it; how many files it had."""
    count = 0
    target.mkdir()
    for below in sorted(os.listdir(source)):
        (target / below).mkdir()
        names = os.listdir(source / below)
        for name in names:
            data = (source / below / name).read_bytes()
            fd = os.open(target / below / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            if data:
                os.write(fd, data)
            os.close(fd)
        count += len(names)
    for below in os.listdir(target):
        names = os.listdir(target / below)
        for name in names:
            (target / below / name).unlink()
        (target / below).rmdir()
    target.rmdir()
    return count


@pytest.fixture
def quick_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: what is measured is the daemon."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else tmp_path) as path:
        yield Path(path)


@pytest.mark.limit(200)
def test_thousands_of_files_leave_nothing_and_little_memory(
    quick_directory: Path,
    new_mount: Callable[..., Mount],
    record_property: Callable[[str, object], None],
) -> None:
    """Two thousand; `make soak`, twenty thousand."""
    directories = 20 if SOAK else 2
    copied, source = quick_directory / "copied", quick_directory / "source"
    for below in range(directories):
        (copied / str(below)).mkdir(parents=True)
        for n in range(500):
            (copied / str(below) / str(n)).write_bytes(b"data" * (n if n % 4 == 0 else 0))
    mount = new_mount("--model", "second", source=source)
    before = at_rest(mount)
    started = time.monotonic()
    children = [Child(_copy_and_delete, copied, mount.path / str(who)) for who in range(2)]
    for child in children:
        with child:
            assert child.result(180.0) == 500 * directories
    taken = time.monotonic() - started
    assert at_rest(mount) == before
    memory = mount.status("VmRSS")
    record_property("seconds", round(taken, 1))
    record_property("VmRSS in KiB", memory)
    print(f"{1000 * directories} files: {taken:.1f} s, VmRSS {memory} KiB")
    assert memory <= IDLE_MEMORY
    assert os.listdir(mount.source) == []


def test_a_fresh_daemon_is_small(new_mount: Callable[..., Mount]) -> None:
    assert new_mount().status("VmRSS") <= IDLE_MEMORY


# A daemon with few descriptors

LIMITED = (
    sys.executable,
    "-c",
    "import resource, sys; from ninefuse.command import cli;"
    f" resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW_DESCRIPTORS}, {FEW_DESCRIPTORS}));"
    " sys.exit(cli.main())",
)


@contextmanager
def most_descriptors_of(mount: Mount) -> Iterator[list[int]]:
    """Look again and again how many descriptors a daemon has; the most seen, and the looks."""
    seen, done = [0, 0], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            seen[0] = max(seen[0], len(os.listdir(f"/proc/{mount.pid}/fd")))
            seen[1] += 1

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        done.set()
        looking.join()


@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_tree_far_larger_than_the_limit_on_open_files(
    new_mount: Callable[..., Mount], model: str
) -> None:
    count = 3000 if SOAK else 1500
    # With a long timeout the kernel goes on knowing every file that it has seen.
    mount = new_mount("--model", model, "-o", "entry_timeout=1000", command=LIMITED)
    assert resource.prlimit(mount.pid, resource.RLIMIT_NOFILE)[1] == FEW_DESCRIPTORS
    with most_descriptors_of(mount) as sampled:
        _use_a_big_tree(mount, count)
    counters = mount.counters()
    print(f"{model}: {count} files, {sampled[0]} descriptors at the most, {sampled[1]} samples")
    assert sampled[1] > 100
    # Below the limit at any time: no call has met it.
    assert max(counters.descriptors, sampled[0]) < FEW_DESCRIPTORS
    assert not re.search("EMFILE|ENFILE|Too many open files", counters.text + mount.log.text())


def _use_a_big_tree(mount: Mount, count: int) -> None:
    files = [Path(f"{n % 7}/{n % 5}/file{n}") for n in range(count)]
    for n, file in enumerate(files):
        (mount.source / file).parent.mkdir(parents=True, exist_ok=True)
        (mount.source / file).write_bytes(b"%d" % n)

    for n, file in enumerate(files):
        assert (mount.path / file).stat().st_ino == (mount.source / file).stat().st_ino
        assert (mount.path / file).read_bytes() == b"%d" % n
    assert mount.counters().fids > count
    # Through directories that have been moved, and whose descriptors are long gone.
    for top in range(7):
        (mount.path / str(top)).rename(mount.path / f"moved{top}")
    with ExitStack() as stack:
        opened = [
            stack.enter_context(open(mount.path / f"moved{files[n]}", "rb")) for n in range(40)
        ]
        # Known to the kernel and to nobody else: the daemon has not opened these.
        seen = [os.open(mount.path / f"moved{files[n]}", os.O_PATH) for n in range(40, 80)]
        for fd in seen:
            stack.callback(os.close, fd)
        for n, file in enumerate(files):
            old, new = mount.path / f"moved{file}", mount.path / f"moved{file}.new"
            old.rename(new)
            if n % 3 == 0:
                assert new.read_bytes() == b"%d" % n
        for file in files:
            (mount.path / f"moved{file}.new").unlink()
        assert [file.read() for file in opened] == [b"%d" % n for n in range(40)]
        assert {os.fstat(file.fileno()).st_nlink for file in opened} == {0}
        assert [os.fstat(fd).st_nlink for fd in seen] == [0] * 40
    shutil.rmtree(mount.path / "moved0")
    assert sorted(os.listdir(mount.source)) == [f"moved{n}" for n in range(1, 7)]


@pytest.mark.parametrize("model", SOME_MODELS)
def test_with_a_limit_of_256_two_hundred_files_are_open(
    new_mount: Callable[..., Mount], model: str
) -> None:
    """Each takes one descriptor. More are refused, names go on, and nothing meets the limit."""
    count, most = 200, FEW_DESCRIPTORS
    mount = new_mount("--model", model, "-o", "entry_timeout=1000", command=LIMITED)
    for n in range(most):
        (mount.source / f"file{n}").write_bytes(b"%d" % n)
    with ExitStack() as stack, most_descriptors_of(mount) as sampled:

        def opening(n: int, mode: str = "rb") -> IO[bytes]:
            return stack.enter_context((mount.path / f"file{n}").open(mode))

        opened = [opening(n, ("rb", "r+b", "ab")[n % 3]) for n in range(count)]
        with pytest.raises(OSError, match="Too many open files in system"):
            list(map(opening, range(count, most)))
        for n, file in enumerate(opened):
            assert os.stat(mount.path / f"file{n}").st_size == os.fstat(file.fileno()).st_size
            (mount.path / f"file{n}").rename(mount.path / f"moved{n}")
            os.fchmod(file.fileno(), 0o600)
            (mount.path / f"moved{n}").unlink()
            if file.readable():
                assert file.read() == b"%d" % n
            else:
                assert file.write(b"more") == 4
            assert os.fstat(file.fileno()).st_nlink == 0
        (mount.path / "made").mkdir()
    # All that were closed have made room again.
    wait_until(lambda: mount.counters().opened == 0, "all closed")
    with ExitStack() as stack:
        for n in range(count, most):
            stack.enter_context(open(mount.path / f"file{n}", "rb"))
    assert sampled[0] < FEW_DESCRIPTORS
    assert not re.search("EMFILE|Too many open files", mount.counters().text + mount.log.text())


# Clients that are killed


def _ask(path: Path, seed: int, sent: mmap.mmap) -> None:
    """Ask for names that are not there: a killed asker has nothing open that would be closed."""
    for n in range(1_000_000):
        sent[0] = 1
        (path / f"missing{seed}-{n}").exists()


def _hammer(path: Path, seed: int, sent: mmap.mmap) -> None:
    """Send requests of many kinds."""
    dice = random.Random(seed)
    fd = os.open(path / "busy", os.O_RDWR)
    for n in range(1_000_000):
        sent[0] = 1
        what = dice.randrange(5)
        if what == 0:
            os.pwrite(fd, b"x" * 4096, 4096 * dice.randrange(64))
        elif what == 1:
            os.close(os.open(path / "busy", os.O_RDONLY))
        elif what == 2:
            os.listdir(path)
        elif what == 3:
            os.pread(fd, 1 << 16, 4096 * dice.randrange(64))
        else:
            (path / f"missing{seed}-{n}").exists()


def _work_steadily(path: Path, beside: Path, done: mmap.mmap) -> None:
    """Write and sync a small block, again and again, until told to stop.

    In turn with the same beside the mount, which shows when the machine itself stands still.
    done: the number of rounds, the longest stall of the one and of the other, whether to stop.
    """
    stalls = [0.0, 0.0]
    fds = [os.open(path, os.O_RDWR), os.open(beside, os.O_RDWR)]
    rounds = 0
    while not done[24]:
        for which, fd in enumerate(fds):
            started = time.monotonic()
            os.pwrite(fd, b"y" * 4096, 0)
            os.fsync(fd)
            stalls[which] = max(stalls[which], time.monotonic() - started)
        rounds += 1
        done[:24] = struct.pack("qdd", rounds, *stalls)


def _kill_clients(
    mount: Mount, beside: Path, client: Callable[..., None], kills: int, at_once: int
) -> tuple[float, float]:
    """Kill clients, some at once; return how long the steady one and the machine stood still.

    After each kill there is quiet until the steady client has gone on: a request of somebody
    else's would end the stall of a daemon that stands still reading the device.
    """
    dice = random.Random(kills)
    with (
        mmap.mmap(-1, 64) as done,
        mmap.mmap(-1, 64) as sent,
        Child(_work_steadily, mount.path / "steady", beside, done) as steady,
    ):

        def rounds() -> int:
            number: int = struct.unpack_from("q", done)[0]
            return number

        def has_reached(number: int) -> bool:
            return rounds() >= number

        for kill in range(0, kills, at_once):
            with ExitStack() as stack:
                sent[0] = 0
                clients = [
                    stack.enter_context(Child(client, mount.path, kill + n, sent))
                    for n in range(at_once)
                ]
                wait_until(lambda: sent[0], "a client's first request")
                time.sleep(dice.uniform(0.0, 0.004))
                for victim in clients:
                    os.kill(victim.pid, signal.SIGKILL)
            goal = rounds() + 2
            wait_until(partial(has_reached, goal), "the steady client")
        done[24] = 1
        steady.result()
        _, stall, machine = struct.unpack_from("qdd", done)
        return stall, machine


# The command, with a pause between seeing that there is a request and reading it, as there is
# on a busy machine: time in which a request can be withdrawn.
PAUSING = (
    sys.executable,
    "-c",
    """
import sys, time
from ninefuse.command import cli
from ninefuse.fuse import pyfuse3_device as device
wait = device._Lowlevel._wait_for_request

async def wait_and_pause(self, fd):
    await wait(self, fd)
    time.sleep(0.002)

device._Lowlevel._wait_for_request = wait_and_pause
sys.exit(cli.main())
""",
)


def _check_stalls(mount: Mount, base: Path, client: Callable[..., None], *numbers: int) -> None:
    (mount.source / "busy").write_bytes(bytes(64 * 4096))
    (mount.source / "steady").write_bytes(bytes(4096))
    (base / "beside").write_bytes(bytes(4096))
    for name in ("busy", "steady"):
        (mount.path / name).read_bytes()
    before = at_rest(mount)
    for _ in range(4):
        stall, machine = _kill_clients(mount, base / "beside", client, *numbers)
        print(f"longest stall {stall:.3f} s, the machine's own {machine:.3f} s")
        # Where the machine itself stands still, nothing can be said of the mount.
        if stall <= STALL or machine < STALL / 3:
            break
    assert stall <= STALL
    now = at_rest(mount)
    assert all(count <= then for count, then in zip(now, before, strict=True)), (before, now)


@pytest.mark.parametrize("model", SOME_MODELS)
def test_clients_killed_by_the_hundred_stall_nobody(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    _check_stalls(new_mount("--model", model), tmp_path, _hammer, 200, 5)


@pytest.mark.parametrize("model", SOME_MODELS)
def test_requests_withdrawn_before_they_are_read_stall_nobody(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    mount = new_mount("--session", "pyfuse3", "--model", model, command=PAUSING)
    _check_stalls(mount, tmp_path, _ask, 50, 1)


def _wakeups(mount: Mount) -> int:
    """How often the daemon's threads have been given a processor."""
    total = 0
    for status in Path(f"/proc/{mount.pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if "ctxt_switches" in line:
                total += int(line.split()[1])
    return total


def test_idle_daemons_sleep(new_mount: Callable[..., Mount]) -> None:
    mounts = [new_mount("--model", model) for model in MODELS]
    for mount in mounts:
        (mount.path / "file").write_bytes(b"x" * 100_000)
        assert (mount.path / "file").read_bytes() == b"x" * 100_000
        (mount.path / "file").unlink()
    time.sleep(0.6)  # the timer that guards reads of the device ends with the load
    before = {mount.model: (_wakeups(mount), mount.cpu_ticks()) for mount in mounts}
    time.sleep(1.0)
    assert {mount.model: (_wakeups(mount), mount.cpu_ticks()) for mount in mounts} == before
