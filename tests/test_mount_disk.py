"""A source whose disk fails, is full or frozen, or that is taken away, under the mount.

What callers are told is what they would be told on the source itself. A disk that fails is an
image file on a file system that fails when told (faultfs.py): other than that itself, the ext4
on it is a local file system, on which the second model's engine makes calls.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import mmap
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults import FaultSource, faulty
from file_systems import image, mounted
from mounting import SOAK, Child, Mount, Watchdog, ending, errno_of, run, wait_until
from servers import SERVERS, options_of, servers

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount file systems"),
]

PAGE = mmap.PAGESIZE
DATA = random.Random(10).randbytes(16 * PAGE)

Results = list[tuple[str, int]]  # what was done, and the errno


# A disk that fails


@pytest.fixture(scope="module")
def broken(
    watchdog: Watchdog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, FaultSource]]:
    """An ext4 file system, and what its disk is on; while the tests of this file run."""
    base = tmp_path_factory.mktemp("broken")
    with faulty(watchdog, base) as ground:
        ground.tell({"direct": True})  # else what fails is only the kernel's cache of it
        # Without a journal, which an error would end.
        words = ("-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard")
        file = ground.path / "image"
        with image("ext4", base, *words, size=8 << 20, file=file, options="noatime") as top:
            yield top, ground
            ground.clear()


@pytest.fixture
def disk(
    broken: tuple[Path, FaultSource], guard: Watchdog, tmp_path: Path
) -> Iterator[tuple[Path, FaultSource]]:
    """A directory of one test's own on that disk, which works at its beginning and end."""
    top, ground = broken
    source = top / tmp_path.name
    source.mkdir()
    yield source, ground
    ground.clear()


def sync_and_fail(path: Path, ground: FaultSource, flags: int) -> Results:
    """Write and sync while the disk fails: who is told of it, and how often."""
    results: Results = []

    def note(what: str, call: Callable[..., object], *args: object) -> None:
        results.append((what, errno_of(call, *args)))

    with ExitStack() as stack:
        first, second, third = fds = [os.open(path, os.O_CREAT | os.O_RDWR) for _ in range(3)]
        sync = os.open(path, os.O_RDWR | flags)
        for fd in (*fds, sync):
            stack.callback(os.close, fd)
        os.pwrite(first, DATA, 0)
        os.fsync(first)

        ground.arm("write", errno.EIO)
        note("write", os.pwrite, first, DATA[: 4 * PAGE], 0)
        note("first fsync", os.fsync, first)
        assert ground.clear()
        for turn in range(2):
            note(f"fsync of the first again, {turn}", os.fsync, first)
            note(f"fdatasync of the second, {turn}", os.fdatasync, second)
            note(f"fsync of the third, {turn}", os.fsync, third)
        note("write again", os.pwrite, first, DATA[: 4 * PAGE], 0)
        note("fsync of it", os.fsync, first)

        ground.arm("write", errno.EIO)
        note("synchronous write", os.pwrite, sync, DATA[:PAGE], 0)
        assert ground.clear()
        for turn in range(2):
            note(f"fsync of the second, {turn}", os.fsync, second)
        note("synchronous write again", os.pwrite, sync, DATA[:PAGE], 0)
        late = os.open(path, os.O_RDWR)
        stack.callback(os.close, late)
        note("fsync of who came late", os.fsync, late)
    assert path.read_bytes() == DATA
    return results


@pytest.mark.parametrize("server", SERVERS if SOAK else ["second, threads", "second, uring"])
def test_an_error_of_the_disk_is_told_by_fsync_to_each_open_descriptor_once(
    disk: tuple[Path, FaultSource], new_mount: Callable[..., Mount], server: str
) -> None:
    source, ground = disk
    told = 0
    for osync in ("direct", "cached"):
        options = (*options_of(server), "-o", f"osync={osync}")
        with ending(new_mount(*options, source=source)) as mount:
            for flags in (os.O_SYNC, os.O_DSYNC):
                name = f"{osync} {flags}"
                expected = sync_and_fail(source / f"beside {name}", ground, flags)
                answers = dict(expected)
                assert answers["first fsync"] == errno.EIO
                assert answers["fsync of the first again, 0"] == 0
                assert answers["fdatasync of the second, 0"] == errno.EIO
                assert answers["fdatasync of the second, 1"] == 0
                assert answers["synchronous write"] == errno.EIO
                found = sync_and_fail(mount.path / name, ground, flags)
                assert found == expected
                told += sum(code == errno.EIO for _, code in found)
            syncs = json.loads(os.getxattr(mount.path, "user.ninefuse.stats"))["operations"][
                "fsync"
            ]
            if "uring" in server:
                assert syncs["crossings"] == 0, "workers have made the calls"
            else:
                assert (syncs["crossings"] > 0) == (server != "none")
    print(f"{server}: {told} errors of the disk told")


@pytest.mark.parametrize("server", servers())
def test_data_that_the_disk_does_not_give_is_an_error_and_comes_later(
    disk: tuple[Path, FaultSource], new_mount: Callable[..., Mount], server: str
) -> None:
    source, ground = disk
    with ending(new_mount(*options_of(server), source=source)) as mount:
        (mount.path / "file").write_bytes(DATA)
        os.sync()
        for top in (source, mount.path):
            with open(source / "file", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with open(top / "file", "rb", buffering=0) as file:
                ground.arm("read", errno.EIO)
                assert errno_of(file.read, PAGE) == errno.EIO
                assert ground.clear()
                assert file.read() == DATA


# A disk that is full


PIECE = 1 << 16  # bytes
ROOM = 1 << 20  # bytes, of a file that is removed


def piece(at: int) -> bytes:
    """What is written at an offset."""
    return (b"%15d\n" % at) * (PIECE // 16)


def fill(path: Path, flags: int) -> int:
    """Write to a file until there is no room; how many bytes were acknowledged."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | flags, 0o600)
    written = 0
    try:
        while True:
            rest = piece(written // PIECE * PIECE)[written % PIECE :]
            written += os.pwrite(fd, rest, written)
            if not flags:
                os.fsync(fd)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
    finally:
        os.close(fd)
    return written


def check_filled(path: Path, size: int) -> None:
    assert path.read_bytes() == b"".join(map(piece, range(0, size, PIECE)))[:size]


def try_a_full_disk(top: Path, source: Path, flags: int) -> int:
    """Fill it, in a file and by mapped pages, and make room again; bytes acknowledged."""
    size = fill(top / "big", flags)
    for path in (top, source):
        check_filled(path / "big", size)
    data = random.Random(size).randbytes(ROOM // 2)
    with open(top / "hole", "w+b") as file:
        file.truncate(len(data))
        with mmap.mmap(file.fileno(), len(data)) as mapped:
            mapped[:] = data
            assert errno_of(mapped.flush) == errno.ENOSPC
            assert errno_of(os.fsync, file.fileno()) == 0  # it has been told
            check_filled(source / "big", size)
            (top / "ballast").unlink()

            def is_room() -> bool:
                # The kernel forgets the file a moment later, and the daemon closes it then.
                mapped[:] = data
                return not errno_of(mapped.flush)

            wait_until(is_room, "room", 5.0)
            os.fsync(file.fileno())
    fd = os.open(top / "big", os.O_WRONLY | flags)
    try:
        assert os.pwrite(fd, DATA, size) == len(DATA)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert (source / "hole").read_bytes() == data
    assert (source / "big").read_bytes()[size:] == DATA
    return size


# The kind of the file system, osync=, and how the file is opened.
FULL = (
    list(itertools.product(("ext4", "tmpfs"), ("direct", "cached"), (os.O_SYNC, 0)))
    if SOAK
    else [("ext4", "direct", 0), ("tmpfs", "cached", os.O_SYNC)]
)


@pytest.mark.parametrize("server", servers())
def test_a_full_disk_says_so_and_goes_on_when_there_is_room(
    new_mount: Callable[..., Mount], tmp_path: Path, server: str
) -> None:
    written = 0
    for number, (kind, osync, flags) in enumerate(FULL):
        base = tmp_path / str(number)
        base.mkdir()
        with ExitStack() as stack:
            if kind == "tmpfs":
                source = stack.enter_context(mounted(kind, kind, base / "disk", "size=2m"))
            else:
                source = stack.enter_context(image(kind, base, "-m", "0", size=4 << 20))
            (source / "ballast").write_bytes(bytes(ROOM))
            options = (*options_of(server), "-o", f"osync={osync}")
            mount = stack.enter_context(ending(new_mount(*options, source=source)))
            written += try_a_full_disk(mount.path, source, flags)
    print(f"{server}: {written} bytes acknowledged on {len(FULL)} full disks, and whole")


# A disk that is frozen

HOLD = 30.0 if SOAK else 0.7  # seconds


@contextlib.contextmanager
def frozen(top: Path) -> Iterator[None]:
    """Freeze a file system, for a while: whatever changes it waits."""
    done = run("fsfreeze", "--freeze", top)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        done = run("fsfreeze", "--unfreeze", top)
    assert done.returncode == 0, done.stderr


def _overwrite(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    assert os.pwrite(fd, b"frozen", 0) == 6
    os.fsync(fd)
    os.close(fd)


# Each in a directory of its own: the kernel keeps a directory's others waiting, too.
CHANGES: dict[str, Callable[[Path], object]] = {
    "write": _overwrite,
    "create": lambda path: path.with_name("new").write_bytes(b"new"),
    "chmod": lambda path: path.chmod(0o600),
    "unlink": lambda path: path.unlink(),
}


def _look(top: Path) -> tuple[bytes, int, list[str], bytes]:
    """What changes nothing: of a file that is in the kernel's cache, and of one that is not."""
    there = top / "there"
    return (
        (there / "cached").read_bytes(),
        (there / "cached").stat().st_size,
        sorted(os.listdir(there)),
        (there / "other").read_bytes(),
    )


SEEN = (DATA, len(DATA), ["cached", "other"], b"other")


def plant(top: Path) -> None:
    (top / "there").mkdir(parents=True)
    (top / "there/cached").write_bytes(DATA)
    (top / "there/other").write_bytes(b"other")
    for change in CHANGES:
        (top / change).mkdir()
        (top / change / "file").write_bytes(b"before")


def check_changes(top: Path) -> None:
    assert (top / "write/file").read_bytes() == b"frozen"
    assert (top / "create/new").read_bytes() == b"new"
    assert (top / "chmod/file").stat().st_mode & 0o777 == 0o600
    assert os.listdir(top / "unlink") == []


@pytest.mark.limit(200)
def test_a_frozen_source_keeps_those_waiting_who_change_it(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """On all mounts of it at once. Those who only look wait for nothing, except under none."""
    rows: dict[str, tuple[str, ...]] = {"second, inline=off": ("-o", "inline=off")}
    rows |= {server: options_of(server) for server in servers()}
    with ExitStack() as stack:
        disk = stack.enter_context(image("ext4", tmp_path, size=32 << 20))
        tops = {"the source": disk / "the source"}
        plant(disk / "the source")
        for row, options in rows.items():
            plant(disk / row)
            mount = stack.enter_context(ending(new_mount(*options, source=disk / row)))
            tops[row] = mount.path
            assert (mount.path / "there/cached").read_bytes() == DATA
        with frozen(disk):
            until = time.monotonic() + HOLD
            changing = {
                (row, change): stack.enter_context(Child(CHANGES[change], top / change / "file"))
                for row, top in tops.items()
                for change in CHANGES
            }
            time.sleep(0.3)
            looking = {row: stack.enter_context(Child(_look, top)) for row, top in tops.items()}
            for row in tops.keys() - {"none"}:
                assert looking[row].result() == SEEN, row
            time.sleep(max(0.0, until - time.monotonic()))
            assert [which for which, child in changing.items() if child.done()] == []
        for row, top in tops.items():
            assert looking[row].result() == SEEN, row
            for change in CHANGES:
                changing[row, change].result()
            check_changes(top)
            check_changes(disk / row)
    print(f"frozen for {HOLD:g} s: {', '.join(rows)}: {len(changing)} waited, none was lost")


# A source that goes


def _try_names(top: Path) -> list[int]:
    """What becomes of calls on a directory, by its names and without."""
    calls: list[Callable[[], object]] = [
        lambda: os.listdir(top),
        lambda: (top / "file").stat(),
        lambda: (top / "file").read_bytes(),
        lambda: (top / "sub/file").stat(),
        lambda: os.statvfs(top),
        lambda: (top / "sub").rmdir(),
        lambda: (top / "file").rename(top / "moved"),
        lambda: (top / "new").write_bytes(b"new"),
        lambda: (top / "directory").mkdir(),
        lambda: (top / "symlink").symlink_to("file"),
        lambda: (top / "new").unlink(),
    ]
    return [errno_of(call) for call in calls]


def _try_descriptor(fd: int) -> None:
    """A file that is open goes on, whatever has become of its name."""
    assert os.pwrite(fd, DATA, 0) == len(DATA)
    os.fsync(fd)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, PAGE)
    assert os.pread(fd, 2 * PAGE, 0) == DATA[:PAGE]
    assert os.fstat(fd).st_size == PAGE


def try_without(
    make: Callable[..., Mount], options: tuple[str, ...], source: Path, go: Callable[[], object]
) -> list[int]:
    """Have a source go, with what was open before; the errnos of calls then.

    They are those on the source, to one who has it open: a descriptor is all that the daemon
    has of it, too.
    """
    for name in ("through", "direct"):
        (source / name / "sub").mkdir(parents=True)
        for path in (source / name / "file", source / name / "sub/file"):
            path.write_bytes(b"file")
    with ExitStack() as stack:

        def opened(path: Path, flags: int) -> int:
            fd = os.open(path, flags)
            stack.callback(os.close, fd)
            return fd

        mount = stack.enter_context(ending(make(*options, "-o", "cache=none", source=source)))
        roots = [mount.path, Path(f"/proc/self/fd/{opened(source, os.O_PATH)}")]
        tops = [opened(r / n, os.O_PATH) for r, n in zip(roots, ("through", "direct"), strict=True)]
        files = [opened(Path(f"/proc/self/fd/{top}/file"), os.O_RDWR) for top in tops]
        go()
        for file in files:
            _try_descriptor(file)
        found, expected = (
            [
                *_try_names(Path(f"/proc/self/fd/{top}")),
                errno_of(os.listdir, root),
                errno_of(os.stat, root / "through"),
                errno_of(os.mkdir, root / f"new{top}"),
            ]
            for root, top in zip(roots, tops, strict=True)
        )
        assert found == expected
    return found


@pytest.mark.parametrize("server", servers())
def test_a_source_that_is_unmounted_lazily_goes_on_until_the_mount_is_gone(
    new_mount: Callable[..., Mount], tmp_path: Path, server: str
) -> None:
    with image("ext4", tmp_path, size=8 << 20) as disk:

        def go() -> None:
            done = run("umount", "-l", disk)
            assert done.returncode == 0, done.stderr

        assert set(try_without(new_mount, options_of(server), disk, go)) == {0, errno.ENOTEMPTY}
        assert os.listdir(disk) == []
        # Nobody keeps the file system, nor the loop device that it was on.
        wait_until(lambda: not run("losetup", "-j", tmp_path / "image").stdout, "its end")


@pytest.mark.parametrize("server", servers())
def test_a_source_that_is_removed_is_an_empty_directory_that_takes_nothing(
    new_mount: Callable[..., Mount], tmp_path: Path, server: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    found = try_without(new_mount, options_of(server), source, lambda: shutil.rmtree(source))
    assert set(found) == {0, errno.ENOENT}
    assert not source.exists()
