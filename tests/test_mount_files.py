"""Data of files, through real mounts under each of the threading models."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Child, Mount, Place, errno_of, in_child

pytestmark = pytest.mark.soak

PAGE = mmap.PAGESIZE


def contents(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, (1 << 20) + 17])
def test_what_is_written_is_in_the_source_and_reads_back(place: Place, size: int) -> None:
    data = contents(size)
    (place.path / "file").write_bytes(data)
    assert (place.source / "file").read_bytes() == data
    assert (place.path / "file").read_bytes() == data


def test_what_is_in_the_source_reads_through_the_mount(place: Place) -> None:
    data = contents(3 << 20)
    (place.source / "file").write_bytes(data)
    with open(place.path / "file", "rb") as file:
        assert file.read() == data
        file.seek(2 << 20)
        assert file.read(5) == data[2 << 20 : (2 << 20) + 5]
        assert os.pread(file.fileno(), 100, 3 << 20) == b""


def test_small_writes_all_over_a_file(place: Place) -> None:
    dice = random.Random(1)
    expected = bytearray(300_000)
    with open(place.path / "file", "w+b", buffering=0) as file:
        file.truncate(len(expected))
        for _ in range(200):
            data = dice.randbytes(dice.randrange(1, 9000))
            offset = dice.randrange(len(expected) - len(data))
            assert os.pwrite(file.fileno(), data, offset) == len(data)
            expected[offset : offset + len(data)] = data
        assert os.pread(file.fileno(), len(expected), 0) == expected
    assert (place.source / "file").read_bytes() == expected


def test_processes_that_write_to_files_of_their_own_do_not_mix_them_up(place: Place) -> None:
    def work(name: str) -> str:
        dice = random.Random(name)
        digest = hashlib.sha256()
        with open(place.path / name, "wb", buffering=0) as file:
            for _ in range(60):
                block = dice.randbytes(dice.randrange(1, 20_000))
                digest.update(block)
                file.write(block)
        assert hashlib.sha256((place.path / name).read_bytes()).digest() == digest.digest()
        return digest.hexdigest()

    children = {name: Child(work, name) for name in "abcdef"}
    for name, child in children.items():
        with child:
            digest = hashlib.sha256((place.source / name).read_bytes()) if child.done(20) else None
            assert digest is not None
            assert digest.hexdigest() == child.result()


def test_an_unlinked_open_file_is_there_to_the_end(place: Place) -> None:
    path = place.path / "file"
    with open(path, "w+b", buffering=0) as file:
        fd = file.fileno()
        file.write(b"hello, world")
        path.unlink()
        assert os.listdir(place.source) == []
        assert os.fstat(fd).st_nlink == 0
        os.fchmod(fd, 0o604)
        os.ftruncate(fd, 5)
        os.pwrite(fd, b"J", 0)
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == b"Jello"
        os.utime(fd, ns=(1_000_000_001, 2_000_000_002))
        now = os.fstat(fd)
        assert (stat.S_IMODE(now.st_mode), now.st_size, now.st_nlink) == (0o604, 5, 0)
        assert (now.st_atime_ns, now.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
        assert os.listdir(place.path) == []


def test_a_file_replaced_by_a_rename_stays_what_it_was_to_who_has_it_open(place: Place) -> None:
    (place.path / "old").write_bytes(b"old")
    (place.path / "new").write_bytes(b"new")
    with open(place.path / "old", "r+b", buffering=0) as file:
        os.replace(place.path / "new", place.path / "old")
        assert file.read() == b"old"
        file.write(b"er")
        assert os.pread(file.fileno(), 10, 0) == b"older"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert (place.path / "old").read_bytes() == b"new"


def test_one_writer_appends(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"one\n")
    with open(path, "ab", buffering=0) as file:
        file.write(b"two\n")
        os.ftruncate(file.fileno(), 4)
        file.write(b"three\n")
        assert os.pwrite(file.fileno(), b"four\n", 0) == 5  # O_APPEND wins over the offset
    assert (place.source / "file").read_bytes() == b"one\nthree\nfour\n"


def test_many_appenders_lose_and_break_no_line(place: Place) -> None:
    path = place.path / "file"

    def append(who: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for n in range(150):
            line = f"{who} {n} ".ljust(20 + n, "x").encode() + b"\n"
            assert os.write(fd, line) == len(line)
        os.close(fd)

    for child in [Child(append, who) for who in range(4)]:
        with child:
            child.result()
    lines = (place.source / "file").read_bytes().splitlines()
    assert len(lines) == 600
    assert all(len(line) == 20 + int(line.split()[1]) for line in lines)
    for who in range(4):
        numbers = [int(line.split()[1]) for line in lines if int(line.split()[0]) == who]
        assert numbers == list(range(150))


def _write_mapped(fd: int, data: bytes) -> None:
    with mmap.mmap(fd, len(data)) as mapping:
        mapping[:] = data
        mapping.flush()


def test_a_file_open_to_read_and_append_holds_everything_once(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"a" * PAGE)
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    assert os.write(fd, b"b" * 100) == 100
    # Dirty pages must go where they came from, not to the end. No mapping at all is right too.
    code = errno_of(_write_mapped, fd, b"a" * PAGE)
    assert code in (0, errno.ENODEV)
    assert os.pread(fd, 1, PAGE + 99) == b"b"
    os.close(fd)
    assert (place.source / "file").stat().st_size == PAGE + 100
    assert (place.source / "file").read_bytes() == b"a" * PAGE + b"b" * 100


def test_an_appender_beside_a_mapping_does_not_double_its_pages(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"a" * 2 * PAGE)
    appender = os.open(path, os.O_RDWR | os.O_APPEND)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE) as mapping:
        mapping[PAGE - 1 : PAGE + 1] = b"bb"
        os.write(appender, b"end")
        mapping.flush()
    os.close(appender)
    expected = b"a" * (PAGE - 1) + b"bb" + b"a" * (PAGE - 1) + b"end"
    assert (place.source / "file").read_bytes() == expected


@pytest.mark.parametrize("size", [0, 10, PAGE, PAGE + 100, 100_000])
@pytest.mark.parametrize("how", ["path", "descriptor"])
def test_truncate_shrinks_and_grows(place: Place, how: str, size: int) -> None:
    data = contents(PAGE + 50)
    path = place.path / "file"
    path.write_bytes(data)
    if how == "path":
        os.truncate(path, size)
    else:
        with open(path, "r+b") as file:
            os.ftruncate(file.fileno(), size)
            assert os.fstat(file.fileno()).st_size == size
    expected = data[:size].ljust(size, b"\0")
    assert path.stat().st_size == size
    assert (place.source / "file").read_bytes() == expected
    assert path.read_bytes() == expected


def test_a_file_without_write_permission_is_truncated_by_who_just_made_it(place: Place) -> None:
    fd = os.open(place.path / "file", os.O_RDWR | os.O_CREAT, 0o400)
    os.write(fd, b"12345")
    os.ftruncate(fd, 2)
    os.close(fd)
    assert (place.source / "file").read_bytes() == b"12"


def test_open_with_trunc_empties_a_file(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"full")
    path.chmod(0o640)
    before = path.stat().st_ino
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    after = (place.source / "file").stat()
    assert (after.st_size, stat.S_IMODE(after.st_mode), after.st_ino) == (0, 0o640, before)
    assert path.read_bytes() == b""
    path.write_bytes(b"full")
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    assert path.stat().st_size == 0


def test_holes_read_as_zeros_and_take_no_room(place: Place) -> None:
    path = place.path / "file"
    with open(path, "w+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"end", 1 << 30)
        assert os.pread(file.fileno(), 4, (1 << 30) - 2) == b"\0\0en"
        assert os.pread(file.fileno(), 1000, 500_000) == b"\0" * 1000
        os.fsync(file.fileno())
    found, source = path.stat(), (place.source / "file").stat()
    assert found.st_size == source.st_size == (1 << 30) + 3
    assert found.st_blocks == source.st_blocks < 2048


def test_a_shared_mapping_is_written_back_to_the_source(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"." * 5 * PAGE)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 5 * PAGE) as mapping:
        mapping[3 * PAGE : 3 * PAGE + 5] = b"there"
        mapping.flush()
        assert (place.source / "file").read_bytes()[3 * PAGE :][:6] == b"there."
        mapping[PAGE : PAGE + 4] = b"here"
    # The second change is written back when the mapping ends, at the latest.
    assert (place.source / "file").read_bytes()[PAGE:][:5] == b"here."
    assert (place.source / "file").stat().st_size == 5 * PAGE


def test_a_time_that_is_set_after_msync_stays(place: Place) -> None:
    """Without msync it does not, nor does a store move it at once: docs/limitations.md."""
    path = place.path / "file"
    path.write_bytes(b"data")
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        os.utime(path, (5, 5))
        memory[0:1] = b"D"
        memory.flush()
        assert path.stat().st_mtime > 5
        assert (place.source / "file").read_bytes() == b"Data"
        os.utime(path, (5, 5))
    for seen in (path, place.source / "file"):
        assert seen.stat().st_mtime == 5


def test_a_mapping_outlives_its_descriptor(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"." * PAGE)
    fd = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(fd, PAGE)
    os.close(fd)
    mapping[:4] = b"late"
    mapping.close()
    assert (place.source / "file").read_bytes()[:5] == b"late."


def test_a_mapping_and_write_see_each_other(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"." * PAGE)
    with open(path, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), PAGE) as mapping:
        file.write(b"by write")
        assert mapping[:9] == b"by write."
        mapping[100:106] = b"by map"
        assert os.pread(file.fileno(), 7, 100) == b"by map."

        def other() -> bytes:
            with open(path, "rb") as again:
                return mmap.mmap(again.fileno(), PAGE, prot=mmap.PROT_READ)[100:106]

        assert in_child(other) == b"by map"


def test_a_private_mapping_changes_nothing(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"." * PAGE)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE, prot=3) as mapping,
    ):
        mapping[:4] = b"mine"
        assert mapping[:5] == b"mine."
    assert path.read_bytes() == b"." * PAGE
    assert (place.source / "file").read_bytes() == b"." * PAGE


def test_of_many_exclusive_creators_exactly_one_wins(place: Place) -> None:
    rounds = 40

    def race(who: int) -> list[int]:
        won = []
        for n in range(rounds):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            try:
                fd = os.open(place.path / f"lock{n}", flags, 0o600)
            except FileExistsError:
                continue
            os.write(fd, b"%d" % who)
            os.close(fd)
            won.append(n)
        return won

    winners: list[int] = [-1] * rounds
    children = [Child(race, who) for who in range(6)]
    for who, child in enumerate(children):
        with child:
            for n in child.result():
                assert winners[n] == -1, "two have won"
                winners[n] = who
    assert -1 not in winners
    for n, who in enumerate(winners):
        assert (place.source / f"lock{n}").read_bytes() == b"%d" % who


def test_creators_without_exclusive_all_open_the_one_file(place: Place) -> None:
    def create(who: int) -> None:
        for n in range(40):
            fd = os.open(place.path / f"file{n}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            os.write(fd, b"%d" % who)
            os.close(fd)

    for child in [Child(create, who) for who in range(5)]:
        with child:
            child.result()
    for n in range(40):
        assert sorted((place.source / f"file{n}").read_bytes()) == sorted(b"01234")


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC, 0])
def test_synced_writes(place: Place, flag: int) -> None:
    fd = os.open(place.path / "file", os.O_CREAT | os.O_WRONLY | flag, 0o600)
    for n in range(5):
        os.pwrite(fd, b"x" * 4096, n * 4096)
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    assert (place.source / "file").read_bytes() == b"x" * 5 * 4096


def test_a_directory_can_be_synced(place: Place) -> None:
    (place.path / "file").touch()
    fd = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def test_a_file_is_copied_inside_the_kernel(place: Place) -> None:
    data = contents(200_000)
    (place.path / "from").write_bytes(data)
    with open(place.path / "from", "rb") as source, open(place.path / "to", "wb") as target:
        left = len(data)
        while left:
            copied = os.copy_file_range(source.fileno(), target.fileno(), left)
            assert copied
            left -= copied
    assert (place.source / "to").read_bytes() == data


def test_locks_keep_other_processes_out(place: Place) -> None:
    path = place.path / "file"
    path.touch()

    def try_both() -> tuple[int, int]:
        with open(path, "r+b") as file:
            flags = fcntl.LOCK_EX | fcntl.LOCK_NB
            return errno_of(fcntl.flock, file, flags), errno_of(fcntl.lockf, file, flags)

    assert in_child(try_both) == (0, 0)
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert in_child(try_both) == (errno.EAGAIN, errno.EAGAIN)
    assert in_child(try_both) == (0, 0)


def test_a_descriptor_only_does_what_it_was_opened_for(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"data")
    reader = os.open(path, os.O_RDONLY)
    writer = os.open(path, os.O_WRONLY)
    assert errno_of(os.write, reader, b"x") == errno.EBADF
    assert errno_of(os.read, writer, 1) == errno.EBADF
    assert errno_of(os.ftruncate, reader, 0) == errno.EINVAL
    os.close(reader)
    os.close(writer)
    assert path.read_bytes() == b"data"


def test_a_mount_without_cache_can_be_mapped_and_shows_the_source_as_it_is(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "cache=none")
    file = mount.source / "file"
    assert not (mount.path / "file").exists()
    file.write_bytes(b"." * PAGE)
    assert (mount.path / "file").stat().st_size == PAGE
    file.write_bytes(b":" * 100)
    assert (mount.path / "file").stat().st_size == 100
    assert (mount.path / "file").read_bytes() == b":" * 100
    file.write_bytes(b"." * PAGE)
    with open(mount.path / "file", "r+b") as again, mmap.mmap(again.fileno(), PAGE) as mapping:
        assert mapping[:3] == b"..."
        mapping[:3] = b"abc"
    assert file.read_bytes()[:4] == b"abc."
    file.unlink()
    assert not (mount.path / "file").exists()


def test_data_of_a_fifo_in_the_source_does_not_reach_the_mount(place: Place) -> None:
    # A FIFO of the mount is the client's own: opening it to read must not wait in the daemon.
    os.mkfifo(place.source / "fifo")
    fd = os.open(place.path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(fd, 10) == b""
    os.close(fd)
    Path(place.path / "file").write_bytes(b"still answers")
