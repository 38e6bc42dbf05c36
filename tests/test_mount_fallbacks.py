"""What pyfuse3's session has no callback for: the errno says so, and programs go their other ways.

The wrong errno would make them give up: EIO from fallocate, say, is a full or broken disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Mount, Place, Watchdog, errno_of, fresh_place, in_child, run

pytestmark = pytest.mark.soak

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16  # of fallocate(2)
FICLONE = 0x40049409
FS_IOC_FIEMAP = 0xC020660B
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F

MIB = 1 << 20


@pytest.fixture
def place(shared_mounts: Callable[..., Mount], guard: Watchdog) -> Iterator[Place]:
    with fresh_place(shared_mounts("--session", "pyfuse3")) as place:
        yield place


def fallocate(file: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(file, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("mode", [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE, COLLAPSE_RANGE])
def test_fallocate_is_not_supported_and_changes_nothing(place: Place, mode: int) -> None:
    path = place.path / "file"
    path.write_bytes(b"x" * 8192)
    with open(path, "r+b") as file:
        for _ in range(2):  # the kernel remembers the answer
            assert errno_of(fallocate, file.fileno(), mode, 4096, 4096) == errno.EOPNOTSUPP
    assert (place.source / "file").read_bytes() == b"x" * 8192


def test_posix_fallocate_gives_the_file_its_size_and_blocks_all_the_same(place: Place) -> None:
    """glibc writes to each block instead; what is there stays."""
    path = place.path / "file"
    path.write_bytes(b"x" * 5000)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
        os.fsync(file.fileno())
    source = (place.source / "file").stat()
    assert source.st_size == path.stat().st_size == MIB
    assert source.st_blocks * 512 >= MIB
    assert (place.source / "file").read_bytes() == b"x" * 5000 + bytes(MIB - 5000)
    done = run("fallocate", "--posix", "--length", "2MiB", path)
    assert done.returncode == 0, done.stderr
    assert (place.source / "file").stat().st_size == 2 * MIB


def test_the_whole_of_a_file_is_data_to_those_who_look_for_holes(place: Place) -> None:
    path = place.path / "file"
    with open(path, "wb") as holes:
        holes.seek(MIB)
        holes.write(b"end")
    size = MIB + 3
    with open(path, "rb") as file:
        for _ in range(2):
            for offset in (0, 4097, size - 1):
                assert os.lseek(file.fileno(), offset, os.SEEK_DATA) == offset
                assert os.lseek(file.fileno(), offset, os.SEEK_HOLE) == size
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert errno_of(os.lseek, file.fileno(), size, whence) == errno.ENXIO
    done = run("cp", "--sparse=always", path, place.path / "copy")
    assert done.returncode == 0, done.stderr
    assert (place.source / "copy").read_bytes() == bytes(MIB) + b"end"
    assert (place.source / "copy").stat().st_blocks * 512 < MIB, "cp finds zeros by itself"


def test_a_file_is_copied_in_the_kernel_within_the_mount_and_not_across(place: Place) -> None:
    data = random.Random(1).randbytes(300_000)
    (place.path / "from").write_bytes(data)
    (place.source / "other").touch()
    with open(place.path / "from", "rb") as source:
        with open(place.path / "to", "wb") as target:
            done = 0
            while part := os.copy_file_range(source.fileno(), target.fileno(), MIB, done, done):
                done += part
        with open(place.source / "other", "wb") as target:
            across = errno_of(os.copy_file_range, source.fileno(), target.fileno(), MIB)
    assert (place.source / "to").read_bytes() == data
    assert across in (0, errno.EXDEV, errno.EOPNOTSUPP), os.strerror(across)


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_cp_copies_within_the_mount_to_it_and_from_it(place: Place, reflink: str) -> None:
    data = random.Random(2).randbytes(2 * MIB + 17)
    (place.source / "from").write_bytes(data)
    for source, target in (
        (place.path / "from", place.path / "within"),
        (place.path / "from", place.source / "out"),
        (place.source / "from", place.path / "in"),
    ):
        done = run("cp", f"--reflink={reflink}", source, target)
        assert done.returncode == 0, done.stderr
        assert (place.source / target.name).read_bytes() == data
        assert (place.path / target.name).read_bytes() == data


def test_a_clone_is_refused_as_by_a_file_system_without_any(place: Place) -> None:
    (place.path / "from").write_bytes(b"x" * 8192)
    with open(place.path / "from", "rb") as source, open(place.path / "to", "wb") as target:
        code = errno_of(fcntl.ioctl, target.fileno(), FICLONE, source.fileno())
    assert code == errno.EOPNOTSUPP
    done = run("cp", "--reflink=always", place.path / "from", place.path / "clone")
    assert done.returncode == 1
    assert "Operation not supported" in done.stderr


def test_a_file_without_a_name_cannot_be_made(place: Place) -> None:
    """EOPNOTSUPP is what the C library and programs take for a reason to make a named one."""
    for _ in range(2):
        code = errno_of(os.open, place.path, os.O_TMPFILE | os.O_RDWR, 0o600)
        assert code == errno.EOPNOTSUPP
    assert os.listdir(place.source) == []


@pytest.mark.parametrize(
    "request_code", [FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR, 0x5401]
)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_ioctls_are_unknown(place: Place, kind: str, request_code: int) -> None:
    path = place.path / "it"
    if kind == "file":
        path.touch()
    else:
        path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(2):
            assert errno_of(fcntl.ioctl, fd, request_code, bytearray(64)) == errno.ENOTTY
    finally:
        os.close(fd)


def test_where_the_blocks_of_a_file_are_is_not_told(place: Place) -> None:
    (place.path / "file").write_bytes(b"x" * 8192)
    request = bytearray(struct.pack("=QQIIII", 0, 8192, 0, 0, 16, 0) + bytes(16 * 56))
    with open(place.path / "file", "rb") as file:
        assert errno_of(fcntl.ioctl, file.fileno(), FS_IOC_FIEMAP, request) == errno.EOPNOTSUPP


# Locks


def _try_flock(path: Path, how: int) -> int:
    with open(path, "r+b") as file:
        return errno_of(fcntl.flock, file, how | fcntl.LOCK_NB)


def _try_range(path: Path, how: int, start: int = 0) -> int:
    with open(path, "r+b") as file:
        return errno_of(fcntl.lockf, file, how | fcntl.LOCK_NB, 10, start)


@pytest.mark.parametrize("attempt", [_try_flock, _try_range])
def test_locks_are_among_users_of_the_mount_and_the_source_knows_nothing_of_them(
    place: Place, attempt: Callable[[Path, int], int]
) -> None:
    path, source = place.path / "file", place.source / "file"
    path.write_bytes(b"x" * 100)
    lock = fcntl.flock if attempt is _try_flock else fcntl.lockf
    with open(path, "r+b") as holder:
        lock(holder, fcntl.LOCK_EX)
        for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            assert in_child(attempt, path, how) == errno.EAGAIN
            assert in_child(attempt, source, how) == 0
        lock(holder, fcntl.LOCK_UN)
        lock(holder, fcntl.LOCK_SH)
        assert in_child(attempt, path, fcntl.LOCK_SH) == 0
        assert in_child(attempt, path, fcntl.LOCK_EX) == errno.EAGAIN
    assert in_child(attempt, path, fcntl.LOCK_EX) == 0
    with open(source, "r+b") as holder:
        lock(holder, fcntl.LOCK_EX)
        assert in_child(attempt, path, fcntl.LOCK_EX) == 0


def test_ranges_are_locked_each_for_itself_and_a_waiting_lock_can_be_interrupted(
    place: Place,
) -> None:
    path = place.path / "file"
    path.write_bytes(b"x" * 100)

    def wait_in_vain() -> bool:
        def give_up(*_: object) -> None:
            raise TimeoutError

        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with open(path, "r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
            except TimeoutError:
                return True
        return False

    with open(path, "r+b") as holder:
        fcntl.lockf(holder, fcntl.LOCK_EX, 10, 0)
        assert in_child(_try_range, path, fcntl.LOCK_EX, 5) == errno.EAGAIN
        assert in_child(_try_range, path, fcntl.LOCK_EX, 10) == 0
        assert in_child(wait_in_vain)
