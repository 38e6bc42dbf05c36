"""What has been acknowledged as durable survives the loss of everything that was not on the disk.

The source is on an ext4 file system of its own, in an image file behind a loop device. What the
file system has given to its disk is in the image; what is only in its page cache or in an open
transaction of its journal is not. So a copy of the image is what a power failure would have
left, but for the disk's own cache: that it was told to empty it is seen from its counters.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mounting import (
    PATIENCE,
    SESSION,
    SOAK,
    Child,
    Mount,
    done,
    is_mounted,
    mount_ids,
    run,
    wait_until,
)
from servers import SERVERS, need_engine

pytestmark = pytest.mark.soak

TURNS = 3 if SOAK else 1  # of five copies each, for each way of each server

SIZE = 4096  # bytes of a record
SLOTS = 8  # records in a file: it grows to that size, then is written over

_numbers = itertools.count(1)

# How a writer asks for durability: the flags of its open, and what it calls after each write.
Way = tuple[int, Callable[[int], None] | None]
WAYS: dict[str, Way] = {
    "O_SYNC": (os.O_SYNC, None),
    "O_DSYNC": (os.O_DSYNC, None),
    "fsync": (0, os.fsync),
    "fdatasync": (0, os.fdatasync),
}
ALL_WAYS: dict[str, Way] = {**WAYS, "nothing": (0, None)}

# The command, with calls that say that they have synced and have not.
LYING = (
    sys.executable,
    "-c",
    "import os, sys; from ninefuse.fuse import answers; from ninefuse.command import cli;"
    " os.fsync = os.fdatasync = lambda fd: None;"
    " answers.Opens.kept = lambda self, flags: flags & ~answers._SYNC;"
    " sys.exit(cli.main())",
)
# The same with calls that sync after they have been answered.
LATE = (
    sys.executable,
    "-c",
    "import os, sys, threading; from ninefuse.command import cli; sync = os.fsync;"
    " os.fsync = lambda fd: threading.Timer(0.3, sync, (os.dup(fd),)).start();"
    " sys.exit(cli.main())",
)


class Disk:
    """An ext4 file system in an image file, mounted; nothing reaches the image by itself.

    Attributes:
        source: a directory in it.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._top = base / "disk"
        self._image = base / "image"
        self._copies = 0
        self.survived = 0  # power failures after which the disk could be mounted, and was looked at
        self.source = self._top / "source"
        self._top.mkdir()
        with open(self._image, "wb") as image:
            image.truncate(32 << 20)
        # Whatever it would do later by itself, it does now.
        made = run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._image)
        assert made.returncode == 0, made.stderr
        # Its timer would commit what nobody has asked for.
        _mount(self._image, self._top, "commit=300,noatime")
        try:
            self.source.mkdir()
            done = run("sync", "--file-system", self._top)
            assert done.returncode == 0, done.stderr
            [device] = mount_ids(self._top)
            self._counters = Path(f"/sys/dev/block/{device}/stat")
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        _unmount(self._top)

    def flushes(self) -> int | None:
        """How often the disk was told to empty its cache; None if the kernel does not count."""
        fields = self._counters.read_text().split()
        return int(fields[15]) if len(fields) > 15 else None

    def copy(self) -> Path:
        """Copy the image as it is now, quickly."""
        self._copies += 1
        path = self._base / f"copy{self._copies}"
        done = run("cp", "--reflink=never", "--sparse=always", self._image, path)
        assert done.returncode == 0, done.stderr
        return path

    def copy_at_rest(self, before: Callable[[], None]) -> Path:
        """Copy the image at a moment at which nothing is being written to it.

        A copy takes its time, and one of a disk at work has blocks of different ages: a state
        that the disk was never in.

        Args:
            before: called before each attempt.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            before()
            then = self._writes()
            path = self.copy()
            if self._writes() == then and then[1] == 0:
                return path
            path.unlink()
        raise TimeoutError("the disk was never at rest")

    @contextlib.contextmanager
    def after_power_failure(self, copy: Path) -> Iterator[Path]:
        """Mount a copy, so that its journal is replayed; the source's directory in it."""
        top = self._base / "restored"
        top.mkdir(exist_ok=True)
        _mount(copy, top, "noatime")
        try:
            yield top / "source"
            self.survived += 1
        finally:
            _unmount(top)
            copy.unlink()

    def _writes(self) -> tuple[int, int]:
        """How many writes the disk has done, and what it is doing."""
        fields = self._counters.read_text().split()
        return int(fields[4]), int(fields[8])


def _mount(image: Path, on: Path, options: str) -> None:
    done = run("mount", "-t", "ext4", "-o", f"loop,{options}", image, on)
    if done.returncode:
        raise OSError(f"mount: {done.stderr.strip()}")


def _unmount(path: Path) -> None:
    """Unmount what is busy, too; its loop device goes with it."""
    if run("umount", path).returncode and is_mounted(path):
        run("umount", "-l", path)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid():
        pytest.skip("only root may mount an image")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("there are no loop devices")
    if shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        pytest.skip("there is no mkfs.ext4")
    try:
        found = Disk(tmp_path)
    except OSError as error:
        pytest.skip(f"an image cannot be mounted here: {error}")
    try:
        yield found
    finally:
        found.end()


# Writers


def record(number: int) -> bytes:
    return (b"%d " % number).ljust(16, b".") * (SIZE // 16)


def _write_records(path: Path, way: Way, orders: int, answers: int, waits: bool) -> None:
    """Write records and say so, each when told to or after a pause of any length."""
    flags, sync = way
    dice = random.Random(str(path))
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | flags, 0o600)
    for number in range(1_000_000):
        if not waits:
            time.sleep(dice.uniform(0.0, 0.02))
        elif not os.read(orders, 1):
            return
        assert os.pwrite(fd, record(number), number % SLOTS * SIZE) == SIZE
        if sync is not None:
            sync(fd)
        os.write(answers, struct.pack("q", number))


class Writer:
    """A child process that writes records into a file of its own.

    Attributes:
        count: how many it has had acknowledged, as far as it was listened to.
    """

    def __init__(self, directory: Path, way: Way, waits: bool) -> None:
        self.name = f"file{next(_numbers)}"
        self.count = 0
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        os.set_blocking(self._answers, False)
        self._child = Child(_write_records, directory / self.name, way, orders, answers, waits)
        os.close(orders)
        os.close(answers)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.kill()
        os.close(self._orders)
        os.close(self._answers)

    def order(self, count: int = 1) -> None:
        """Let it write that many records."""
        os.write(self._orders, b"x" * count)

    def listen(self) -> None:
        """Take in what it has said by now."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._answers, 8 * 512):
                self.count = struct.unpack_from("q", data, len(data) - 8)[0] + 1
            self._child.result()  # it has ended, and tells why

    def wait_for(self, count: int) -> None:
        def there() -> bool:
            self.listen()
            return self.count >= count

        wait_until(there, f"record {count} of {self.name}")


def missing(source: Path, writer: Writer) -> list[int]:
    """Which of a writer's acknowledged records are not in the source, whole.

    In the place of each there may be a later one, which was not acknowledged yet.
    """
    path = source / writer.name
    data = path.read_bytes() if path.exists() else b""
    lost = []
    for number in range(max(0, writer.count - SLOTS), writer.count):
        found = data[number % SLOTS * SIZE :][:SIZE]
        head = found.split(b" ")[0]
        there = int(head) if head.isdigit() else -1
        if there < number or there % SLOTS != number % SLOTS or found != record(there):
            lost.append(number)
    return lost


def missing_after(disk: Disk, copy: Path, writers: list[Writer]) -> dict[str, list[int]]:
    """What is missing in a copy, of each writer that misses something."""
    with disk.after_power_failure(copy) as source:
        lost = {writer.name: missing(source, writer) for writer in writers}
    return {name: numbers for name, numbers in lost.items() if numbers}


def check_writers_who_wait(disk: Disk, top: Path, way: str, writers: int) -> None:
    """Copies at the very moment of an acknowledgement, when the disk should be at rest."""
    with ExitStack() as stack:
        found = [stack.enter_context(Writer(top, ALL_WAYS[way], True)) for _ in range(writers)]
        total = 0
        for count in (3, SLOTS):  # while the file grows, and when it is written over
            before = disk.flushes()
            for _ in range(count):
                total += 1
                for writer in found:
                    writer.order()
                for writer in found:
                    writer.wait_for(total)
            copy, after = disk.copy(), disk.flushes()
            assert missing_after(disk, copy, found) == {}, way
            if before is not None and after is not None:
                # Those who sync at the same time may share a flush, one alone never does.
                assert after - before >= count, "the disk was not told to empty its cache"


def check_a_writer_who_goes_on(disk: Disk, top: Path, way: str) -> None:
    """A copy at a moment of no one's choice, in the middle of something perhaps."""
    with Writer(top, ALL_WAYS[way], False) as writer:
        writer.wait_for(2)
        copy = disk.copy_at_rest(writer.listen)
        assert missing_after(disk, copy, [writer]) == {}, way


@pytest.mark.limit(200)
@pytest.mark.parametrize(
    ("osync", "server"),
    [("direct", server) for server in SERVERS]
    # The kernel's fsync after a write, which `direct` has among its ways, too.
    + [("cached", server) for server in (SERVERS if SOAK else ("second, role", "second, uring"))],
)
def test_what_was_acknowledged_as_durable_survives_a_power_failure(
    disk: Disk, new_mount: Callable[..., Mount], server: str, osync: str
) -> None:
    need_engine(server)
    mount = new_mount(*SERVERS[server], "-o", f"osync={osync}", source=disk.source)
    for _ in range(TURNS):
        for way in WAYS if osync == "direct" else ("O_SYNC", "O_DSYNC"):
            check_writers_who_wait(disk, mount.path, way, 1)
            check_writers_who_wait(disk, mount.path, way, 3)
            check_a_writer_who_goes_on(disk, mount.path, way)
    print(f"{osync}, {server}: {disk.survived} power failures survived by all acknowledged writes")
    if "uring" in SERVERS[server]:
        done = json.loads(os.getxattr(mount.path, "user.ninefuse.stats"))["operations"]
        syncs = done["write" if osync == "direct" else "fsync"]
        assert syncs["crossings"] < syncs["count"] / 4, "workers have made the calls"


@pytest.mark.skipif(SESSION == "pyfuse3", reason="data=kernel takes the native session")
@pytest.mark.limit(200)
@pytest.mark.parametrize(("options", "ways"), [("", WAYS), (",sync", ("nothing",))])
def test_so_does_what_the_kernel_writes_itself(
    disk: Disk, new_mount: Callable[..., Mount], options: str, ways: Iterable[str]
) -> None:
    mount = new_mount("-o", f"data=kernel{options}", source=disk.source)
    for _ in range(TURNS):
        for way in ways:
            check_writers_who_wait(disk, mount.path, way, 1)
            check_writers_who_wait(disk, mount.path, way, 3)
            check_a_writer_who_goes_on(disk, mount.path, way)
    assert (done(mount, "write") > 0) == bool(options)


def test_names_survive_a_power_failure_once_their_directory_was_synced(
    disk: Disk, new_mount: Callable[..., Mount]
) -> None:
    mount = new_mount(source=disk.source)
    fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (mount.path / "made").mkdir()
        (mount.path / "old").touch()
        os.fsync(fd)
        (mount.path / "old").rename(mount.path / "new")
        with disk.after_power_failure(disk.copy()) as source:
            assert sorted(os.listdir(source)) == ["made", "old"]
        os.fsync(fd)
        with disk.after_power_failure(disk.copy()) as source:
            assert sorted(os.listdir(source)) == ["made", "new"]
    finally:
        os.close(fd)


def test_with_dirsync_names_survive_a_power_failure_by_themselves(
    disk: Disk, new_mount: Callable[..., Mount]
) -> None:
    mount = new_mount("-o", "dirsync", source=disk.source)
    (mount.path / "made").mkdir()
    (mount.path / "old").touch()
    (mount.path / "old").rename(mount.path / "new")
    with disk.after_power_failure(disk.copy()) as source:
        assert sorted(os.listdir(source)) == ["made", "new"]


# That these tests can fail


@pytest.mark.parametrize("server", ["none", "second, threads"])
def test_what_nobody_has_synced_does_not_survive(
    disk: Disk, new_mount: Callable[..., Mount], server: str
) -> None:
    mount = new_mount(*SERVERS[server], source=disk.source)
    fd = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        os.fsync(fd)
        assert os.write(fd, record(0)) == SIZE
        (mount.path / "name").touch()
        assert (disk.source / "file").read_bytes() == record(0)
        with disk.after_power_failure(disk.copy()) as source:
            assert (source / "file").stat().st_size == 0
            assert os.listdir(source) == ["file"]
        os.fdatasync(fd)
        with disk.after_power_failure(disk.copy()) as source:
            assert (source / "file").read_bytes() == record(0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("osync", ["direct", "cached"])
def test_a_server_that_lies_about_syncs_is_found_out(
    disk: Disk, new_mount: Callable[..., Mount], osync: str
) -> None:
    mount = new_mount(*SERVERS["none"], "-o", f"osync={osync}", source=disk.source, command=LYING)
    for way in WAYS:
        with pytest.raises(AssertionError, match="0, 1, 2"):
            check_writers_who_wait(disk, mount.path, way, 1)


def test_a_server_that_syncs_too_late_is_found_out(
    disk: Disk, new_mount: Callable[..., Mount]
) -> None:
    mount = new_mount(*SERVERS["none"], source=disk.source, command=LATE)
    with pytest.raises(AssertionError, match="0, 1, 2"):
        check_writers_who_wait(disk, mount.path, "fsync", 1)
