"""Files that the kernel reads, writes and maps itself: -o data=kernel (ninefuse/fuse/backing.py).

Most tests do the same in a directory of the source and in one of the mount, and want the same to
come of it. That it is the kernel that reads and writes, the daemon's counters tell.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from file_systems import image, mounted, overlay
from mounting import (
    NINEFUSE,
    SESSION,
    SOAK,
    Child,
    Mount,
    Place,
    Watchdog,
    become,
    call,
    done,
    ending,
    errno_of,
    fresh_place,
    in_child,
    run,
    wait_until,
)

from ninefuse.exitcodes import ExitCode
from ninefuse.settings import MODELS

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="data=kernel takes CAP_SYS_ADMIN"),
    pytest.mark.skipif(SESSION == "pyfuse3", reason="data=kernel takes the native session"),
]

KERNEL = ("-o", "data=kernel,allow_other")
OWNER, STRANGER = 12345, 12346
PAGE = mmap.PAGESIZE
NEW = os.O_RDWR | os.O_CREAT


@pytest.fixture(params=MODELS if SOAK else ["second"])
def place(
    request: pytest.FixtureRequest, shared_mounts: Callable[..., Mount], guard: Watchdog
) -> Iterator[Place]:
    """A directory of a mount whose files the kernel has, open to everybody."""
    mount = shared_mounts(*KERNEL, "--model", request.param)
    for directory in (mount.source, *mount.source.parents):
        os.chmod(directory, os.stat(directory).st_mode | 0o755)
    with fresh_place(mount) as place:
        place.source.chmod(0o777)
        yield place
        assert passed(mount) == 0, "the kernel was given files that it has not given back"


def passed(mount: Mount) -> int:
    """How many files the kernel has, as the daemon counts them; once what was closed is."""

    def count() -> int:
        found = mount.log.wait_for(r"(\d+) open files passed through", since)
        return int(found[1])

    last = -1
    for _ in range(50):  # RELEASE comes a moment after close(2)
        since = mount.log.size()
        os.kill(mount.pid, signal.SIGUSR1)  # also by a child of the test
        last, before = count(), last
        if last == before:
            break
    return last


@contextlib.contextmanager
def opened(path: Path, flags: int = NEW, mode: int = 0o666) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


# ---- what comes of calls ---------------------------------------------------------------------


def append(top: Path) -> object:
    """By two handles, one of which reads, too, and by one that writes where it says."""
    how = NEW | os.O_APPEND
    with ExitStack() as stack:
        one, other, third = (
            stack.enter_context(opened(top / "f", how))
            for how in (how, how ^ os.O_RDWR | os.O_WRONLY, os.O_RDWR)
        )
        for n in range(20):
            os.write((one, other)[n % 2], b"%d," % n)
            if n == 10:
                os.ftruncate(third, 5)
        os.pwrite(third, b"X", 1)
        os.pwrite(one, b"end", 0)  # which appends (pwrite(2), BUGS)
        assert os.fstat(third).st_size == os.fstat(one).st_size == os.lseek(other, 0, 2)
        return os.pread(one, 1000, 0)


def truncate(top: Path) -> object:
    path = top / "f"
    found: list[object] = []
    with opened(path) as fd:
        os.write(fd, b"0123456789" * 1000)
        with mmap.mmap(fd, 0) as view:
            os.ftruncate(fd, 10)
            found += [os.fstat(fd).st_size, os.pread(fd, 100, 0)]
            os.truncate(path, 9000)
            found += [view[8:12], os.fstat(fd).st_blocks, os.pread(fd, 100, 8990)]
            with opened(path, os.O_WRONLY | os.O_TRUNC):
                found += [os.fstat(fd).st_size, os.pread(fd, 100, 0)]
            os.pwrite(fd, b"x", 5000)
            found += [os.stat(path).st_size, view[4999:5001]]
    found.append(path.read_bytes())
    return found


def synchronous(top: Path) -> object:
    found = []
    for flags in (os.O_SYNC, os.O_DSYNC, os.O_SYNC | os.O_APPEND):
        with opened(top / "f", NEW | flags) as fd:
            found.append(os.write(fd, b"data" * 3000))
            found.append(os.pwritev(fd, [b"more"], 0, os.RWF_DSYNC))
            os.fsync(fd)
            with mmap.mmap(fd, PAGE) as view:
                view[8:12] = b"MAP!"
                view.flush()
            found.append(fcntl.fcntl(fd, fcntl.F_GETFL))
    return found, (top / "f").read_bytes()


def direct(top: Path) -> object:
    """O_DIRECT, aligned and not."""
    buffer = mmap.mmap(-1, 2 * PAGE)
    buffer[:] = b"d" * 2 * PAGE
    with opened(top / "f", NEW | os.O_DIRECT) as fd:
        wrote = os.pwritev(fd, [buffer], 0)
        askew = errno_of(os.pwritev, fd, [memoryview(buffer)[:100]], 1)
        read = os.preadv(fd, [buffer], PAGE)
    return wrote, askew, read, (top / "f").stat().st_size


def maps(top: Path) -> object:
    """Shared and private mappings, beside reads and writes."""
    path = top / "f"
    path.write_bytes(bytes(4 * PAGE))
    with opened(path) as fd, mmap.mmap(fd, 0) as shared:
        private = mmap.mmap(fd, 0, mmap.MAP_PRIVATE)
        shared[0:5] = b"first"
        found: list[object] = [os.pread(fd, 5, 0), private[0:5]]
        private[0:5] = b"other"
        os.pwrite(fd, b"there", PAGE)
        found += [shared[0:5], shared[PAGE : PAGE + 5], private[PAGE : PAGE + 5]]
        os.fsync(fd)
        private.close()
    read_only = os.open(path, os.O_RDONLY)
    found.append(errno_of(mmap.mmap, read_only, 0, mmap.MAP_SHARED))
    with mmap.mmap(read_only, 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        os.close(read_only)
        found.append(view[0:5])
    return found, path.read_bytes()


def holes(top: Path) -> object:
    """fallocate(2), SEEK_HOLE, SEEK_DATA, copy_file_range(2)."""
    found: list[object] = []
    with opened(top / "f") as fd, opened(top / "g") as other:
        os.posix_fallocate(fd, 0, 4 * PAGE)
        found += [os.fstat(fd).st_size, os.fstat(fd).st_blocks]
        os.pwrite(fd, b"x" * PAGE, 10 * PAGE)
        for offset in (0, 5 * PAGE, 10 * PAGE):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                found.append(os.lseek(fd, offset, whence))
        found.append(errno_of(os.lseek, fd, 100 * PAGE, os.SEEK_DATA))
        with mmap.mmap(fd, 0) as view:
            call("fallocate", "--punch-hole", "-o", str(10 * PAGE), "-l", str(PAGE), top / "f")
            found += [view[10 * PAGE : 10 * PAGE + 2], os.pread(fd, 3, 10 * PAGE)]
        os.pwrite(fd, b"copied", 0)
        found.append(os.copy_file_range(fd, other, 100, 0, 7))
        found += [os.pread(other, 200, 0), os.fstat(other).st_size]
    return found


def pipes(top: Path) -> object:
    """sendfile(2) and splice(2), from a file and to one."""
    data = random.Random(1).randbytes(20 * PAGE)
    found = []
    with opened(top / "f") as fd, opened(top / "g") as other:
        os.write(fd, data)
        found.append(os.sendfile(other, fd, 100, 5 * PAGE))
        reading, writing = os.pipe()
        with open(reading, "rb"), open(writing, "wb"):
            found.append(os.splice(fd, writing, 3 * PAGE, offset_src=50))
            found.append(os.splice(reading, other, 3 * PAGE, offset_dst=7))
        found.append(os.fstat(other).st_size)
    return found, (top / "g").read_bytes(), (top / "f").read_bytes() == data


def unlinked(top: Path) -> object:
    """A file that has no name, or never had one, is used, opened again, and given a name."""
    found: list[object] = []
    with opened(top / "f") as fd, opened(top, os.O_RDWR | os.O_TMPFILE) as nameless:
        os.unlink(top / "f")
        for one in (fd, nameless):
            os.write(one, b"there")
            found += [os.fstat(one).st_nlink, os.fstat(one).st_size]
            with opened(Path(f"/proc/self/fd/{one}"), os.O_RDWR | os.O_APPEND) as again:
                os.write(again, b" is more")
                found.append(os.pread(one, 100, 0))
                with mmap.mmap(again, 0) as view:
                    view[0:5] = b"THERE"
            found.append(os.pread(one, 100, 0))
        with opened(top, os.O_RDONLY) as here:
            os.link(f"/proc/self/fd/{nameless}", "named", dst_dir_fd=here, follow_symlinks=True)
        os.write(nameless, b"!")
    return found, (top / "named").read_bytes()


def limits(top: Path) -> object:
    """A limit on the size of files is the caller's."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, 2 * PAGE))
    with opened(top / "f") as fd:
        found = [os.pwrite(fd, b"x" * 4 * PAGE, PAGE), errno_of(os.pwrite, fd, b"x", 2 * PAGE)]
        found.append(errno_of(os.ftruncate, fd, 3 * PAGE))
    return found, (top / "f").stat().st_size


def executed(top: Path) -> object:
    """A program is not busy because somebody had it open for writing before."""
    path = top / "program"
    with opened(path, NEW, 0o755) as writing:
        os.write(writing, Path("/bin/true").read_bytes())
        reading = os.open(path, os.O_RDONLY)
        busy = errno_of(os.posix_spawn, path, [path], {})
    pid = os.posix_spawn(path, [str(path)], {})
    ended = os.waitpid(pid, 0)[1]
    os.close(reading)
    return busy, ended


def locked(top: Path) -> object:
    """A lock of the whole file goes with its handle, though a later one of the file stays."""
    first = os.open(top / "f", NEW)
    with opened(top / "f") as later:
        fcntl.flock(first, fcntl.LOCK_EX)
        kept = errno_of(fcntl.flock, later, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(first)
        wait_until(lambda: not errno_of(fcntl.flock, later, fcntl.LOCK_EX | fcntl.LOCK_NB), "it")
    return kept


@pytest.mark.parametrize(
    "scenario",
    [
        *(append, truncate, synchronous, direct, maps, holes, pipes, unlinked, limits, executed),
        locked,
    ],
    ids=lambda scenario: scenario.__name__,
)
@pytest.mark.parametrize("uid", [0, OWNER])
def test_it_comes_out_as_on_the_source(
    place: Place, scenario: Callable[[Path], object], uid: int
) -> None:
    results = []
    before = done(place.mount, "read") + done(place.mount, "write")
    for top in (place.source / "direct", place.path / "mounted"):
        top.mkdir()
        os.chown(top, uid, uid)

        def act(top: Path = top) -> object:
            os.chdir(top)
            become(uid)
            return scenario(Path("."))

        results.append(in_child(act))
    assert results[1] == results[0]
    assert done(place.mount, "read") + done(place.mount, "write") == before


def test_advice_to_read_ahead_does_no_harm(place: Place) -> None:
    """It reaches the mount's own page cache, which nobody reads from."""
    path = place.path / "f"
    path.write_bytes(b"old" * PAGE)
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        (place.source / "f").write_bytes(b"new" * PAGE)
        with mmap.mmap(fd, 0) as view:
            assert os.pread(fd, 3, 0) == view[0:3] == b"new"
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 3, 0) == b"new"


# ---- both sides at once ------------------------------------------------------------------------


def test_the_mount_and_the_source_share_memory(place: Place) -> None:
    here, there = place.path / "f", place.source / "f"
    here.write_bytes(bytes(2 * PAGE))
    with ExitStack() as stack:
        fd, other = (stack.enter_context(opened(path)) for path in (here, there))
        one, two = (stack.enter_context(mmap.mmap(side, 0)) for side in (fd, other))
        for n in range(100):
            one[n : n + 1] = b"m"
            assert two[n] == os.pread(other, 1, n)[0] == ord("m")
            two[PAGE + n : PAGE + n + 1] = b"s"
            assert one[PAGE + n] == os.pread(fd, 1, PAGE + n)[0] == ord("s")
            os.pwrite(other, b"w", n)
            assert one[n] == ord("w")
            os.pwrite(fd, b"r", n)
            assert two[n] == ord("r")


@pytest.mark.parametrize("cache", ["auto", "loose"])
def test_attributes_are_right_at_once(new_mount: Callable[..., Mount], cache: str) -> None:
    """After writes, stores into mapped memory, and changes in the source, while a file is open."""
    mount = new_mount("-o", f"data=kernel,cache={cache}")
    here, there = mount.path / "f", mount.source / "f"

    def agree() -> None:
        found, real = os.stat(here), os.stat(there)
        for name in (
            "st_size",
            "st_blocks",
            "st_mtime_ns",
            "st_ctime_ns",
            "st_mode",
            "st_atime_ns",
        ):
            assert getattr(found, name) == getattr(real, name), name

    there.write_bytes(b"old")
    agree()  # and now the kernel believes it
    with opened(here) as fd:
        deeds: tuple[Callable[[], object], ...] = (
            lambda: os.truncate(there, 1),
            lambda: os.pwrite(fd, b"x" * 10, 5),
            lambda: there.write_bytes(b"y" * PAGE * 3),
            lambda: os.pread(fd, 10, 0),
            lambda: os.utime(there, ns=(1, 2)),
            lambda: os.chmod(there, 0o604),
        )
        for deed in deeds:
            deed()
            agree()

    def store() -> None:
        fd = os.open(here, os.O_RDWR)
        view = mmap.mmap(fd, 0)
        for number in os.listdir("/proc/self/fd"):  # the view's own is one of them
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{number}") == str(here):
                    os.close(int(number))
        assert passed(mount) == 0
        os.utime(here, ns=(10**18, 10**18))
        agree()
        view[0:1] = b"z"
        agree()
        assert os.stat(here).st_mtime_ns > 10**18

    in_child(store)


def test_a_program_that_was_written_through_the_mount_can_be_run_in_the_source(
    place: Place,
) -> None:
    """Though somebody who reads it has it still open on the mount."""
    writing = os.open(place.path / "program", NEW, 0o755)
    os.write(writing, Path("/bin/true").read_bytes())
    with opened(place.path / "program", os.O_RDONLY):
        os.close(writing)

        def runs() -> bool:
            with contextlib.suppress(OSError):  # the daemon's own handle goes a moment later
                return run(place.source / "program").returncode == 0
            return False

        wait_until(runs, "that nobody has it open for writing")


# ---- whose rights ------------------------------------------------------------------------------


def as_user(uid: int, function: Callable[[], object], top: Path) -> object:
    def act() -> object:
        os.chdir(top)
        become(uid)
        return function()

    return in_child(act)


def test_a_write_takes_set_id_bits_and_capabilities_away_whoever_has_the_file(
    place: Place,
) -> None:
    """And leaves them where the source does."""
    capability = bytes.fromhex("0100000202000000000000000000000000000000")
    found: list[object] = []
    for top in (place.source, place.path):
        for mode in (0o6777, 0o4777, 0o2777):
            for uid in (0, OWNER, STRANGER):
                path = top / f"{top == place.path}-{mode:o}-{uid}"
                path.write_bytes(b"data")
                os.chown(path, OWNER, 0)
                os.chmod(path, mode)
                os.setxattr(path, "security.capability", capability)

                def write(name: str = path.name) -> None:
                    with opened(Path(name), os.O_WRONLY) as fd:
                        os.write(fd, b"new")

                as_user(uid, write, top)
                labels = errno_of(os.getxattr, path, "security.capability")
                found.append((mode, uid, path.stat().st_mode, labels))
    half = len(found) // 2
    assert found[:half] == found[half:]


def test_a_bit_that_comes_while_a_file_is_open_goes_with_the_next_write(
    new_mount: Callable[..., Mount],
) -> None:
    """What the kernel remembers of the mode, by which it executes, is right at once."""
    mount = new_mount("-o", "data=kernel,allow_other,suid,cache=loose")
    for directory in (mount.source, *mount.source.parents):
        os.chmod(directory, os.stat(directory).st_mode | 0o755)
    path = mount.path / "program"
    path.write_bytes(Path("/usr/bin/id").read_bytes())
    path.chmod(0o777)
    ready, go = os.pipe(), os.pipe()

    def write_and_run() -> str:
        os.chdir(mount.path)
        become(OWNER)
        with opened(Path("program"), os.O_WRONLY | os.O_APPEND) as fd:
            os.write(ready[1], b"r")
            os.read(go[0], 1)
            os.write(fd, b"x")
        return run("./program", "-u").stdout.strip()

    with Child(write_and_run) as child:
        os.read(ready[0], 1)
        assert passed(mount) == 1
        path.chmod(0o4777)
        assert path.stat().st_mode & stat.S_ISUID
        os.write(go[1], b"g")
        assert child.result() == str(OWNER)
    assert not (mount.source / "program").stat().st_mode & stat.S_ISUID
    for fd in (*ready, *go):
        os.close(fd)


def test_blocks_that_are_reserved_for_root_are_for_root_alone(
    tmp_path: Path, new_mount: Callable[..., Mount]
) -> None:
    """Whoever had the file first."""
    words = ("-m", "20", "-O", "^has_journal", "-E", "lazy_itable_init=0")
    with image("ext4", tmp_path, *words, size=16 << 20) as disk:
        source = disk / "source"
        source.mkdir()
        for directory in (disk, *disk.parents):
            os.chmod(directory, os.stat(directory).st_mode | 0o755)
        with ending(new_mount(*KERNEL, source=source)) as mount:
            room: dict[tuple[bool, int, int], int] = {}
            for top in (source, mount.path):
                for first, writer in ((OWNER, OWNER), (0, 0), (0, OWNER), (OWNER, 0)):
                    path = top / f"{first}-{writer}"
                    path.touch()
                    path.chmod(0o666)
                    ready, go = os.pipe(), os.pipe()

                    def hold(name: str = path.name, told: int = ready[1], end: int = go[0]) -> None:
                        with opened(Path(name), os.O_RDWR):
                            os.write(told, b"r")
                            os.read(end, 1)

                    def fill(name: str = path.name) -> int:
                        with opened(Path(name), os.O_WRONLY) as fd:
                            with contextlib.suppress(OSError):
                                while os.write(fd, bytes(64 << 10)):
                                    pass
                            return os.fstat(fd).st_size >> 20

                    with Child(as_user, first, hold, top) as holder:
                        os.read(ready[0], 1)
                        full = as_user(writer, fill, top)
                        os.write(go[1], b"g")
                        holder.result()
                    assert isinstance(full, int)
                    room[top == mount.path, first, writer] = full
                    path.unlink()
                    wait_until(lambda: os.statvfs(disk).f_bfree > 3000, "room on the disk")
                    for fd in (*ready, *go):
                        os.close(fd)
        for first, writer in ((OWNER, OWNER), (0, 0), (0, OWNER), (OWNER, 0)):
            assert room[True, first, writer] == room[False, first, writer], (first, writer)
        assert room[True, OWNER, OWNER] + 2 <= room[True, 0, 0]


@pytest.mark.limit(100)
def test_whoever_opens_a_file_and_how_at_the_same_time_nobody_is_refused(place: Place) -> None:
    """The kernel refuses an open that is answered in another way than those before (EIO)."""
    path = place.path / "f"
    path.write_bytes(bytes(8 * PAGE))
    path.chmod(0o666)
    modes = [0o666, 0o4666, 0o2666]
    end = time.monotonic() + (20 if SOAK else 3)

    def use(seed: int) -> int:
        os.chdir(place.path)
        become((0, OWNER, STRANGER)[seed % 3])
        dice, count = random.Random(seed), 0
        while time.monotonic() < end:
            how = dice.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR))
            how |= dice.choice((0, 0, os.O_APPEND, os.O_SYNC, os.O_DIRECT, os.O_TRUNC & ~seed))
            if seed == 0 and dice.random() < 0.2:
                os.chmod("f", dice.choice(modes))
            with opened(Path("f"), how) as fd:
                if how & os.O_ACCMODE != os.O_RDONLY and not how & os.O_DIRECT:
                    os.pwrite(fd, b"%d" % seed, dice.randrange(8 * PAGE))
                if how & os.O_ACCMODE == os.O_RDWR and os.fstat(fd).st_size and seed % 2:
                    with contextlib.suppress(ValueError):  # it was cut just now
                        mmap.mmap(fd, 1).close()
            count += 1
        return count

    with ExitStack() as stack:
        children = [stack.enter_context(Child(use, seed)) for seed in range(6)]
        assert min(child.result(60) for child in children) > 10


def test_on_a_synchronous_mount_the_daemon_writes(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "data=kernel,sync")
    with opened(mount.path / "f") as fd, opened(mount.path / "f", os.O_RDONLY) as reading:
        os.write(fd, b"data")
        assert os.pread(fd, 10, 0) == os.pread(reading, 10, 0) == b"data"
        with mmap.mmap(fd, 0) as view:
            view[0:1] = b"D"
        assert (mount.source / "f").read_bytes() == b"Data"
        assert passed(mount) == 1
    assert done(mount, "write") == 1


# ---- files that the kernel does not get --------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("proc", "uptime"), ("sysfs", "kernel/uevent_seqnum")])
def test_files_that_are_made_as_they_are_read_are_the_daemon_s(
    new_mount: Callable[..., Mount], kind: str, name: str
) -> None:
    mount = new_mount("-o", "data=kernel")
    with mounted(kind, kind, mount.source / "live"):
        with open(mount.path / "live" / name, "rb", buffering=0) as file:
            before = file.read(100)
            time.sleep(0.03)
            file.seek(0)
            assert file.read(100) != before or kind == "sysfs"
            assert before
            assert passed(mount) == 0
        mount.end()
    assert "WARNING ninefuse.fuse" not in mount.log.text()


def test_after_a_remount_with_noatime_the_daemon_reads(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "data=kernel,allow_other")
    file = mount.source / "file"
    file.write_bytes(b"data")

    def is_moved() -> bool:
        os.utime(file, (10**9, 10**9))
        assert (mount.path / "file").read_bytes() == b"data"
        return int(file.stat().st_atime) != 10**9

    assert is_moved()
    assert done(mount, "read") == 0
    for flag, moves in (("noatime", False), ("strictatime", True)):
        call("mount", "-i", "-o", f"remount,bind,{flag}", mount.path)
        assert is_moved() == moves, flag
    assert done(mount, "read") > 0


def test_o_direct_is_refused_as_on_the_source(
    tmp_path: Path, new_mount: Callable[..., Mount]
) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(mounted("ramfs", "ramfs", tmp_path / "ramfs"))
        mount = stack.enter_context(ending(new_mount("-o", "data=kernel", source=source)))
        for top in (source, mount.path):
            (top / "f").write_bytes(b"data")
            assert errno_of(os.open, top / "f", os.O_RDWR | os.O_DIRECT) == errno.EINVAL
        assert (mount.path / "f").read_bytes() == b"data"
        assert passed(mount) == 0


def plant_old(lower: Path) -> None:
    (lower / "old").write_bytes(b"lower")


@pytest.mark.parametrize("where", ["source", "below"])
def test_files_of_an_overlay_are_the_daemon_s(
    tmp_path: Path, new_mount: Callable[..., Mount], where: str
) -> None:
    """Two names of one number may be two files there (tests/test_mount_sources.py)."""
    with ExitStack() as stack:
        source = stack.enter_context(overlay(tmp_path / "base", True, plant_old))
        top = Path()
        if where == "below":
            source, top = tmp_path / "base", Path("overlay")
        mount = stack.enter_context(ending(new_mount("-o", "data=kernel", source=source)))
        top = mount.path / top
        for name in ("old", "new"):
            with opened(top / name) as fd, opened(top / name, os.O_RDONLY) as reading:
                os.pwrite(fd, b"written", 0)
                with mmap.mmap(fd, 0) as view:
                    view[0:1] = b"W"
                assert os.pread(reading, 10, 0) == b"Written"
                assert passed(mount) == 0
        assert mount.log.text().count("do not tell their files apart") == 1, "once"


@pytest.mark.parametrize("below", ["daemon", "kernel"])
def test_a_source_that_is_such_a_mount_is_too_deep(
    new_mount: Callable[..., Mount], below: str
) -> None:
    lower = new_mount("-o", f"data={below},allow_other")
    mount = new_mount("-o", "data=kernel", source=lower.path)
    for name in ("one", "two"):
        with opened(mount.path / name) as fd, opened(mount.path / name, os.O_RDONLY) as reading:
            os.pwrite(fd, b"written", 3)
            with mmap.mmap(fd, 0) as view:
                view[3:4] = b"W"
                view.flush()
            assert os.pread(reading, 4, 3) == b"Writ"
            assert passed(mount) == (below == "daemon")
    assert mount.log.text().count("more deeply than the kernel allows") == (below == "kernel")
    mount.end()


def test_an_overlay_can_lie_on_the_mount(tmp_path: Path, new_mount: Callable[..., Mount]) -> None:
    with ExitStack() as stack:
        base = stack.enter_context(mounted("tmpfs", "tmpfs", tmp_path / "tmpfs", "size=64m"))
        mount = stack.enter_context(ending(new_mount("-o", "data=kernel,allow_other", source=base)))
        for name in ("lower", "upper", "work"):
            (mount.path / name).mkdir()
        (mount.path / "lower/f").write_bytes(b"lower")
        options = "".join(f",{one}dir={mount.path}/{one}" for one in ("lower", "upper", "work"))
        with overlay(tmp_path / "try", True, lambda lower: None):
            pass  # where there are none, this skips the test
        top = tmp_path / "on"
        top.mkdir()
        call("mount", "-t", "overlay", "-o", options[1:], "overlay", top)
        stack.callback(run, "umount", top)
        with opened(top / "f") as fd:
            os.pwrite(fd, b"U", 0)
            assert passed(mount) == 1
        assert (base / "upper/f").read_bytes() == b"Uower"


# ---- how many ----------------------------------------------------------------------------------


@pytest.mark.limit(200)
def test_thousands_of_opens_leave_nothing_behind(
    tmp_path: Path, new_mount: Callable[..., Mount]
) -> None:
    """A file that the kernel were not told to give back would keep its room."""
    with ExitStack() as stack:
        tmpfs = mounted("tmpfs", "tmpfs", tmp_path / "tmpfs", "size=64m")
        source = stack.enter_context(tmpfs)
        mount = stack.enter_context(ending(new_mount(*KERNEL, source=source)))
        source.chmod(0o777)
        free = os.statvfs(source).f_bfree

        def use(worker: int) -> None:
            os.chdir(mount.path)
            become((0, OWNER)[worker % 2])
            path = Path(f"f{worker}")
            for n in range(2500 if SOAK else 400):
                if n % 5 == 0:
                    path.unlink(missing_ok=True)
                    path.write_bytes(bytes(PAGE))
                with opened(path, (os.O_RDONLY, os.O_RDWR, os.O_WRONLY)[n % 3]) as fd:
                    if n % 3:
                        os.write(fd, b"x")
            path.unlink()

        children = [stack.enter_context(Child(use, worker)) for worker in range(4)]
        for child in children:
            child.result(150)
        assert passed(mount) == 0
        wait_until(lambda: os.statvfs(source).f_bfree == free, "all of the room back")
        assert done(mount, "write") == done(mount, "read") == 0


def test_files_stay_open_while_descriptors_are_few(new_mount: Callable[..., Mount]) -> None:
    """The kernel's files take none of ours, and outlive those that nodes lose."""
    few = ("sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *NINEFUSE)
    mount = new_mount("-o", "data=kernel", command=few)
    for n in range(400):
        (mount.path / f"f{n}").write_bytes(b"%d" % n)
    with ExitStack() as stack:
        fds = [
            stack.enter_context(opened(mount.path / f"f{n}", (os.O_RDWR, os.O_RDONLY)[n % 2]))
            for n in range(40)
        ]
        for n in range(400):  # which takes descriptors away
            assert (mount.path / f"f{n}").read_bytes() == b"%d" % n
        for n, fd in enumerate(fds):
            if not n % 2:
                os.write(fd, b"new %d" % n)
            os.unlink(mount.path / f"f{n}")
            assert os.pread(fd, 20, 0) == (b"%d" if n % 2 else b"new %d") % n
            with opened(Path(f"/proc/self/fd/{fd}"), os.O_RDONLY) as again:
                assert os.fstat(again).st_nlink == 0
        assert passed(mount) == 40
    assert mount.status("FDSize") <= 256


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("-o", "data=kernel", "--session", "pyfuse3"), "native session"),
        (("-o", "data=kernel,noatime"), "noatime"),
        (("-o", "data=both"), "daemon, kernel"),
    ],
)
def test_it_is_refused_with_what_cannot_be(
    mountpoint: Path, tmp_path: Path, options: tuple[str, ...], word: str
) -> None:
    said = run(*NINEFUSE, *options, tmp_path, mountpoint)
    assert said.returncode == ExitCode.USAGE
    assert len(said.stderr.splitlines()) == 1
    assert word in said.stderr


@pytest.mark.parametrize("how", [("setpriv", "--bounding-set", "-sys_admin"), ("unshare", "-Ur")])
@pytest.mark.parametrize("detached", [(), ("-f",)])
def test_it_is_refused_without_the_right(
    mountpoint: Path, how: tuple[str, ...], detached: tuple[str, ...]
) -> None:
    """Also where root's rights hold in a user namespace alone, which the kernel says at INIT."""
    apart = (*how, "-m", "--propagation", "private") if how[0] == "unshare" else how
    (mountpoint / "s").mkdir()
    (mountpoint / "m").mkdir()
    said = run(
        *(*apart, *NINEFUSE, *detached), *("-o", "data=kernel", mountpoint / "s", mountpoint / "m")
    )
    assert said.returncode == ExitCode.USAGE, said.stderr
    assert "CAP_SYS_ADMIN" in said.stderr
