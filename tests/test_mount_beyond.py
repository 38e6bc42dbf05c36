"""Calls beyond reading and writing, made on a mount and beside it: they come out the same.

What a program is answered, and what is there afterwards. Each scenario is played in a plain
directory of the source first, then in one on the mount. Where the kernel answers by itself, and
does so otherwise for FUSE, the last tests say what it answers (docs/conformance.md does, too).

(The bodies of these callbacks are in test_beyond.py, test_ioctls.py and test_nameless.py; locks
of files in test_mount_filelocks.py, syncfs in test_mount_limits.py.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from file_systems import image, mounted
from mounting import SESSION, Mount, Place, become, ending, errno_of, in_child
from ops_helpers import outcome
from test_mount_side_effects import FIELDS
from trees import has_user_attributes

from ninefuse.linux import syscalls
from ninefuse.linux.ioctls import (
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_GETFSLABEL,
    FS_IOC_GETVERSION,
    FS_IOC_SETFLAGS,
)
from ninefuse.linux.libc import AT_EMPTY_PATH, function
from ninefuse.linux.records import next_record, read_records

NOT_PYFUSE3 = "pyfuse3's session has no callback for it (test_mount_fallbacks.py)"
native = pytest.mark.skipif(SESSION == "pyfuse3", reason=NOT_PYFUSE3)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do it on the source")

BLOCK = 4096  # bytes
LAST = (1 << 63) - 1  # the largest offset
STRANGER = 4711  # a uid

_copy_file_range = function(
    "copy_file_range",
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
    *(ctypes.c_size_t, ctypes.c_uint),
)
_linkat = function(
    "linkat", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int
)
_statx = function(
    "statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
)
_getxattr = function("getxattr", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_listxattr = function("listxattr", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)


# What a directory has, as the source sees it


class Seen(NamedTuple):
    """What is there of a file, but for its number and times."""

    mode: int
    links: int
    size: int
    blocks: int
    data: object
    parts: list[tuple[int, int]]  # from where to where there is data
    attributes: dict[str, bytes]


def seen(path: Path) -> Seen:
    """A file, directory, symlink or special file, in the source."""
    found = path.lstat()
    data: object = None
    parts: list[tuple[int, int]] = []
    if stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            if found.st_size > BLOCK:
                os.fsync(file.fileno())  # blocks that are not allocated yet are counted otherwise
            # A page that is in memory is data, also where nothing was written.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = os.fstat(file.fileno())
            parts = data_of(file.fileno())
            data = file.read() if found.st_size < 1 << 24 else None
    elif stat.S_ISLNK(found.st_mode):
        data = os.readlink(path)
    names = os.listxattr(path, follow_symlinks=False)
    return Seen(
        found.st_mode,
        found.st_nlink,
        found.st_size if data is not None else 0,
        found.st_blocks if data is not None else 0,
        data,
        parts,
        {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(names)},
    )


def data_of(fd: int) -> list[tuple[int, int]]:
    """The parts of an open file that are no holes."""
    parts, end = [], 0
    with contextlib.suppress(OSError):  # ENXIO: no more data
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            assert start < end
            parts.append((start, end))
    os.lseek(fd, 0, os.SEEK_SET)
    return parts


def data_of_path(path: Path) -> list[tuple[int, int]]:
    with open(path, "rb") as file:
        return data_of(file.fileno())


def tree(top: Path) -> dict[str, Seen]:
    return {str(path.relative_to(top)): seen(path) for path in sorted(top.rglob("*"))}


# Scenarios

Scenario = Callable[[Path], Any]


class Played(NamedTuple):
    """What came of a scenario: what it was answered, and what is there."""

    answers: Any
    left: dict[str, Seen]


def play(scenario: Scenario, directory: Path, source: Path) -> Played:
    """Play a scenario in a directory that is empty, and look at it in the source afterwards."""
    return Played(scenario(directory), tree(source))


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def open_and_close(path: Path, flags: int) -> None:
    with opened(path, flags):
        pass


def pattern(size: int) -> bytes:
    """Bytes of which each block is another."""
    return b"".join(n.to_bytes(8, "big") for n in range(size // 8 + 1))[:size]


def compare(both: tuple[Path, Place], scenario: Scenario) -> Any:
    """Play a scenario on both sides, and compare; the answers."""
    plain, place = both
    expected = play(scenario, plain, plain)
    found = play(scenario, place.path, place.source)
    assert found.answers == expected.answers
    assert found.left == expected.left
    return found.answers


@pytest.fixture
def both(place: Place) -> tuple[Path, Place]:
    """A plain directory of the source, and one on the mount."""
    for name in ("plain", "mounted"):
        (place.source / name).mkdir()
    names = place.path / "mounted", place.source / "mounted"
    return place.source / "plain", Place(place.mount, *names)


# fallocate(2)

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
PASSED_ON = (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE)
NO_MODES = (PUNCH_HOLE, PUNCH_HOLE | ZERO | KEEP_SIZE, COLLAPSE | KEEP_SIZE, 4, 1 << 12, -1 << 31)
# Modes that the kernel has no request for: fs/fuse/file.c, fuse_file_fallocate.
NOT_PASSED_ON = (COLLAPSE, INSERT, UNSHARE)

SIZE = 8 * BLOCK + 100
RANGES = (
    *((0, BLOCK), (BLOCK, 2 * BLOCK), (100, BLOCK), (SIZE - 50, 50), (0, SIZE), (0, 1 << 20)),
    *((SIZE, BLOCK), (SIZE + 3 * BLOCK, 10), (1 << 40, BLOCK)),
    *((0, 0), (0, -1), (-1, 10), (LAST, 1), (LAST, LAST), (LAST - BLOCK, BLOCK)),
)


def full_and_sparse(path: Path, sparse: bool) -> None:
    """A file of `SIZE`, with data all over it or at its beginning and its end."""
    data = pattern(SIZE)
    with opened(path, os.O_CREAT | os.O_WRONLY) as fd:
        os.pwrite(fd, data[-100:] if sparse else data, SIZE - 100 if sparse else 0)
        os.pwrite(fd, b"begin", 0)


@native
@pytest.mark.parametrize("mode", PASSED_ON)
def test_room_is_made_and_given_back(both: tuple[Path, Place], mode: int) -> None:
    def scenario(top: Path) -> Any:
        answers: list[Any] = []
        for (offset, length), sparse in itertools.product(RANGES, (False, True)):
            path = top / f"{offset} {length} {sparse}"
            full_and_sparse(path, sparse)
            with opened(path) as fd:
                os.pread(fd, SIZE, 0)  # so that the kernel has pages which must go
                answers.append(outcome(partial(syscalls.fallocate, fd, mode, offset, length)))
                answers.append((os.fstat(fd).st_size, os.pread(fd, 2 * SIZE, 0)))
        return answers

    answers = compare(both, scenario)
    assert answers.count(None) >= 2 * 8, "the source has this mode"


@native
def test_a_mode_that_is_none_is_refused(both: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        full_and_sparse(top / "file", False)
        with opened(top / "file") as fd:
            return [outcome(partial(syscalls.fallocate, fd, m, 0, BLOCK)) for m in NO_MODES]

    assert None not in compare(both, scenario)


@native
def test_room_is_made_for_who_may_write(both: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        full_and_sparse(top / "file", False)
        (top / "directory").mkdir()
        os.mkfifo(top / "fifo")
        answers = []
        for name, flags in (
            ("file", os.O_RDONLY),
            ("file", os.O_WRONLY | os.O_APPEND),
            ("file", os.O_RDWR | os.O_SYNC),
            ("file", os.O_RDWR | os.O_DIRECT),
            ("file", os.O_PATH),
            ("directory", os.O_RDONLY),
            ("fifo", os.O_RDWR),
        ):
            with opened(top / name, flags) as fd:
                answers += [
                    outcome(partial(syscalls.fallocate, fd, mode, BLOCK, BLOCK))
                    for mode in PASSED_ON
                ]
        return answers

    assert {None, "EBADF", "ESPIPE"} <= set(compare(both, scenario))


# fcntl(2)


@native
@pytest.mark.parametrize("how", [0, os.O_DSYNC], ids=["plain", "durable"])
@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR], ids=["writing", "both"])
def test_a_descriptor_appends_as_long_as_it_is_told_to(
    both: tuple[Path, Place], access: int, how: int
) -> None:
    """Whether it was opened so or not; and the source may have grown meanwhile."""

    def scenario(top: Path) -> Any:
        path = top / "file"
        path.write_bytes(b"0123456789")
        answers: list[object] = []
        for flags in (os.O_APPEND, 0):
            with opened(path, access | how | flags) as fd:
                for added in (0, os.O_APPEND, 0):
                    fcntl.fcntl(fd, fcntl.F_SETFL, added)
                    answers += [os.pwrite(fd, b"ab", 3), os.write(fd, b"c")]
                    answers += [os.lseek(fd, 0, os.SEEK_CUR), path.read_bytes()]
        return answers

    answers = compare(both, scenario)
    assert answers[3] == b"c12ab56789"


@native
@needs_root
def test_set_id_bits_stay_for_root_who_writes_elsewhere_than_it_was_opened_for(
    both: tuple[Path, Place],
) -> None:
    def scenario(top: Path) -> Any:
        path = top / "file"
        path.write_bytes(b"0123456789")
        path.chmod(0o6755)
        answers: list[object] = []
        for flags, later in ((os.O_APPEND, 0), (0, os.O_APPEND)):
            with opened(path, os.O_WRONLY | flags) as fd:
                fcntl.fcntl(fd, fcntl.F_SETFL, later)
                answers += [os.pwrite(fd, b"ab", 3), os.stat(path).st_mode, path.read_bytes()]
        return answers

    assert stat.S_IFREG | 0o6755 in compare(both, scenario)


# lseek(2)


def sparse_file(path: Path) -> None:
    """Holes at the beginning, in the middle and at the end."""
    with opened(path, os.O_CREAT | os.O_WRONLY) as fd:
        for offset in (16 * BLOCK, 17 * BLOCK, 64 * BLOCK + 5):
            os.pwrite(fd, b"x" * 100, offset)
        os.ftruncate(fd, 200 * BLOCK)


@native
def test_data_and_holes_are_found(both: tuple[Path, Place]) -> None:
    """And the position is moved by who finds something, alone."""

    def scenario(top: Path) -> Any:
        (top / "empty").touch()
        (top / "full").write_bytes(pattern(SIZE))
        sparse_file(top / "sparse")
        with opened(top / "hole", os.O_CREAT | os.O_WRONLY) as fd:
            os.ftruncate(fd, 1 << 40)
        answers = []
        for name, flags in itertools.product(
            ("empty", "full", "sparse", "hole"),
            (os.O_RDONLY, os.O_RDONLY | os.O_DIRECT, os.O_RDWR | os.O_SYNC),
        ):
            with opened(top / name, flags) as fd:
                for offset in (
                    *(0, 1, BLOCK, 16 * BLOCK - 1, 16 * BLOCK, 18 * BLOCK, 64 * BLOCK + 6),
                    *(65 * BLOCK, SIZE - 1, SIZE, 200 * BLOCK - 1, 200 * BLOCK, 1 << 40, LAST, -1),
                ):
                    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                        answers.append(outcome(partial(os.lseek, fd, offset, whence)))
                        answers.append(os.lseek(fd, 0, os.SEEK_CUR))
        return answers

    answers = compare(both, scenario)
    assert {16 * BLOCK, 64 * BLOCK, 200 * BLOCK, SIZE, "ENXIO"} <= set(answers)


@native
def test_holes_are_where_they_are_by_then(both: tuple[Path, Place]) -> None:
    """By the same descriptor, by which they come and go."""

    def scenario(top: Path) -> Any:
        sparse_file(top / "file")
        with opened(top / "file") as fd:
            answers = [data_of(fd)]
            os.pwrite(fd, b"new", 100 * BLOCK)
            answers.append(data_of(fd))
            syscalls.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 64 * BLOCK, BLOCK)
            answers.append(data_of(fd))
            os.ftruncate(fd, 50 * BLOCK)
            os.ftruncate(fd, 150 * BLOCK)
            answers.append(data_of(fd))
            with mmap.mmap(fd, 150 * BLOCK) as memory:
                memory[120 * BLOCK : 120 * BLOCK + 3] = b"map"
                memory.flush()
            answers.append(data_of(fd))
        return answers

    answers = compare(both, scenario)
    assert len({str(parts) for parts in answers}) == 5


# copy_file_range(2)

COPIES = (
    *((0, 0, 100), (0, 0, SIZE), (5, 7, 3 * BLOCK), (0, 20 * BLOCK, 100), (BLOCK, 0, BLOCK)),
    *((SIZE - 5, 0, 100), (SIZE, 0, 10), (1 << 40, 0, 10), (0, 0, 0), (-1, 0, 10), (0, -1, 10)),
    *((0, LAST, 10), (LAST, 0, 10), (0, 1 << 40, 10), (0, 0, 1 << 40)),
)


def copy(
    source: int, target: int, places: Sequence[int | None], length: int, flags: int = 0
) -> tuple[Any, ...]:
    """How much is copied; where the offsets are by then."""
    given = [None if place is None else ctypes.c_int64(place) for place in places]
    pointers = [None if offset is None else ctypes.byref(offset) for offset in given]
    answer = outcome(
        partial(_copy_file_range, source, pointers[0], target, pointers[1], length, flags)
    )
    return answer, *(None if offset is None else offset.value for offset in given)


@native
@pytest.mark.parametrize("whole", ["two files", "one file"])
def test_a_part_is_copied_to_another_place(both: tuple[Path, Place], whole: str) -> None:
    """Also over itself, which is refused."""

    def scenario(top: Path) -> Any:
        answers: list[Any] = []
        for number, (at, to, length) in enumerate((*COPIES, (0, 100, 200), (100, 0, 200))):
            one = top / f"one {number}"
            one.write_bytes(pattern(SIZE))
            two = one if whole == "one file" else top / f"two {number}"
            with opened(one, os.O_RDONLY) as source, opened(two, os.O_RDWR | os.O_CREAT) as target:
                os.pread(target, SIZE, 0)
                answers.append(copy(source, target, (at, to), length))
                answers.append((os.fstat(target).st_size, os.pread(target, 2 * SIZE, 0)))
        return answers

    answers = compare(both, scenario)
    assert (100, 100, 20 * BLOCK + 100) in answers


@native
def test_copies_go_on_from_position_to_position(both: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        (top / "one").write_bytes(pattern(SIZE))
        (top / "two").write_bytes(b"-" * 50)
        with opened(top / "one") as one, opened(top / "two") as two:
            os.lseek(two, 10, os.SEEK_SET)
            answers: list[Any] = []
            for places in ((None, None), (3, None), (None, 60), (5, 5), (None, None)):
                answers.append(copy(one, two, places, 1000))
                answers.append([os.lseek(fd, 0, os.SEEK_CUR) for fd in (one, two)])
            os.write(two, b"then")
            answers.append(copy(one, two, (None, None), 1 << 20))
            answers.append([os.lseek(fd, 0, os.SEEK_CUR) for fd in (one, two)])
            return answers

    compare(both, scenario)


@native
def test_a_copy_is_for_who_may_read_and_write(both: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        for name in ("one", "two"):
            (top / name).write_bytes(pattern(SIZE))
        (top / "directory").mkdir()
        os.mkfifo(top / "fifo")
        sources = [("one", os.O_RDONLY), ("one", os.O_WRONLY), ("one", os.O_RDONLY | os.O_DIRECT)]
        targets = [("two", flags) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_SYNC)]
        targets += [("two", os.O_WRONLY | os.O_APPEND), ("two", os.O_PATH)]
        others = [("directory", os.O_RDONLY), ("fifo", os.O_RDWR)]
        answers = []
        for source, target in itertools.product(sources + others, targets + others):
            with (
                opened(top / source[0], source[1]) as one,
                opened(top / target[0], target[1]) as two,
            ):
                answers.append(copy(one, two, (0, BLOCK), 2 * BLOCK))
        with opened(top / "one") as one, opened(top / "two") as two:
            answers += [copy(one, two, (0, 0), 10, flags) for flags in (1, 1 << 20, 1 << 31)]
        return answers

    answers = {answer for answer, *_ in compare(both, scenario)}
    assert {2 * BLOCK, "EBADF", "EISDIR", "EINVAL"} <= answers


# O_TMPFILE and linkat(2)


def name_it(fd: int, directory: int, name: str, through: str = "proc") -> None:
    """Give what is open a name, by its descriptor or by the way through /proc."""
    if through == "proc":
        _linkat(-100, b"/proc/self/fd/%d" % fd, directory, os.fsencode(name), 0x400)
    else:
        _linkat(fd, b"", directory, os.fsencode(name), AT_EMPTY_PATH)


@native
def test_a_file_without_a_name_is_made_and_named(both: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        answers: list[Any] = []
        (top / "taken").touch()
        (top / "below").mkdir()
        umask = os.umask(0o027)
        try:
            for number, flags in enumerate(
                (0, os.O_EXCL, os.O_APPEND, os.O_SYNC, os.O_TRUNC, os.O_NOFOLLOW)
            ):
                with (
                    opened(top, os.O_TMPFILE | os.O_RDWR | flags, 0o666) as fd,
                    opened(top, os.O_RDONLY) as directory,
                ):
                    found = os.fstat(fd)
                    answers.append((found.st_mode, found.st_nlink, found.st_size))
                    answers.append((os.write(fd, b"data"), os.listdir(directory)))
                    names = ("taken", "below", "missing/name", f"{number}", f"below/{number}")
                    answers += [
                        outcome(partial(name_it, fd, directory, name, way))
                        for name, way in itertools.product(names, ("proc", "descriptor"))
                    ]
                    answers.append((os.fstat(fd).st_nlink, os.pread(fd, 10, 0)))
                    answers.append(sorted(os.listdir(directory)))
                    os.write(fd, b" and more")
        finally:
            os.umask(umask)
        return answers

    answers = compare(both, scenario)
    assert {"EEXIST", "ENOENT", None} <= {a for a in answers if not isinstance(a, tuple | list)}


@native
def test_where_no_file_without_a_name_can_be_made(both: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        (top / "file").touch()
        (top / "link").symlink_to(".")
        (top / "removed").mkdir()
        answers: list[int | str] = []
        for name, flags in (
            ("file", os.O_RDWR),
            ("missing", os.O_RDWR),
            ("link", os.O_RDWR | os.O_NOFOLLOW),
            ("link", os.O_RDWR),
            (".", os.O_RDONLY),
            (".", os.O_WRONLY),
            (".", os.O_RDWR | os.O_CREAT),
        ):
            fd: int | str = outcome(partial(os.open, top / name, os.O_TMPFILE | flags, 0o600))
            if isinstance(fd, int):
                os.close(fd)
            answers.append(fd if isinstance(fd, str) else "a file")
        with opened(top / "removed", os.O_RDONLY) as directory:
            (top / "removed").rmdir()
            way = f"/proc/self/fd/{directory}"
            answers.append(outcome(partial(os.open, way, os.O_TMPFILE | os.O_RDWR, 0o600)))
        return answers

    answers = compare(both, scenario)
    assert {"ENOTDIR", "ENOENT", "EINVAL", "a file"} <= set(answers)


@native
def test_a_file_without_a_name_is_a_file_as_any(both: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        with (
            opened(top, os.O_TMPFILE | os.O_RDWR, 0o600) as fd,
            opened(top, os.O_RDONLY) as directory,
        ):
            os.write(fd, pattern(SIZE))
            os.fchmod(fd, 0o640)
            if has_user_attributes(top):
                os.setxattr(fd, "user.a", b"value")
            os.utime(fd, (5, 5))
            syscalls.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, BLOCK, BLOCK)
            os.ftruncate(fd, SIZE - 10)
            fcntl.flock(fd, fcntl.LOCK_EX)
            with opened(Path(f"/proc/self/fd/{fd}"), os.O_RDONLY) as again:
                answers = [data_of(again), os.fstat(again).st_nlink]
                answers.append(outcome(partial(fcntl.flock, again, fcntl.LOCK_EX | fcntl.LOCK_NB)))
            with mmap.mmap(fd, BLOCK) as memory:
                memory[:5] = b"store"
            name_it(fd, directory, "named")
            answers.append(os.stat(top / "named").st_ino == os.fstat(fd).st_ino)
            (top / "named").unlink()
            # A file that had a name cannot have one again.
            answers.append(outcome(partial(name_it, fd, directory, "again")))
            return answers

    assert "EAGAIN" in compare(both, scenario)


# File systems


@native
@needs_root
def test_the_figures_of_a_file_system_are_those_of_the_file_asked_for(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    def figures(at: Path | int) -> tuple[int, ...]:
        found = os.fstatvfs(at) if isinstance(at, int) else os.statvfs(at)
        return (*found[:8], found.f_namemax)  # the rest is the mount's own: flags, number

    source = tmp_path / "source"
    with (
        mounted("tmpfs", "tmpfs", source, "size=4m"),
        mounted("tmpfs", "tmpfs", source / "below", "size=8m,nr_inodes=777"),
    ):
        for name in ("file", "below/file"):
            (source / name).write_bytes(b"data")
        (source / "link").symlink_to("below/file")
        os.mkfifo(source / "below/fifo")
        mount = new_mount(source=source)
        with ending(mount):
            for name in (".", "file", "below", "below/file", "link", "below/fifo"):
                assert figures(mount.path / name) == figures(source / name), name
            assert figures(mount.path / "below/file") != figures(source / "file")
            with opened(mount.path / "below/file") as fd:
                os.write(fd, b"x" * (1 << 20))
                assert figures(fd) == figures(source / "below/file")
                (mount.path / "below/file").unlink()
                assert figures(fd) == figures(source / "below")


# statx(2)

BASIC, BTIME = 0x7FF, 0x800
NOFOLLOW, FORCE_SYNC, DONT_SYNC = 0x100, 0x2000, 0x4000
# What FUSE's kernel has an answer for (fs/fuse/dir.c): not the rest of a mask, and no attributes.
KNOWN = BASIC | BTIME
ALL_FIELDS = {**FIELDS, "number": (0x100, 0x20, "Q"), "birth time": (BTIME, 0x50, "qI")}


def statx(path: Path, mask: int, flags: int = 0) -> tuple[Any, ...] | str:
    """The mask, and each field that was asked for."""
    buffer = ctypes.create_string_buffer(256)
    answer = outcome(
        partial(_statx, -100, os.fsencode(path), flags | NOFOLLOW, mask, ctypes.byref(buffer))
    )
    if isinstance(answer, str):
        return answer
    (told,) = struct.unpack_from("=I", buffer.raw)
    return told & mask & KNOWN, *(
        struct.unpack_from("=" + layout, buffer.raw, offset)
        for asked, offset, layout in ALL_FIELDS.values()
        if mask & asked
    )


@native
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_every_field_of_statx_is_the_sources(new_place: Callable[..., Place], cache: str) -> None:
    place = new_place("-o", f"cache={cache}")
    (place.path / "directory").mkdir()
    (place.path / "file").write_bytes(pattern(SIZE))
    (place.path / "link").symlink_to("file")
    os.mkfifo(place.path / "fifo")
    (place.source / "of the source").write_bytes(b"data")
    names = (".", "directory", "file", "link", "fifo", "of the source", "missing")
    for _ in range(2):
        for name, mask, flags in itertools.product(
            names,
            (0, 1, BASIC, BTIME, KNOWN, 0x3FFFFF, 1 << 31),
            (0, FORCE_SYNC, DONT_SYNC, FORCE_SYNC | DONT_SYNC, 1),
        ):
            expected = statx(place.source / name, mask, flags)
            assert statx(place.path / name, mask, flags) == expected, (name, mask, flags)
        for name in names[:-1]:  # changes that show in what is asked next
            os.utime(place.path / name, (5, 5), follow_symlinks=False)
    born = statx(place.path / "file", BTIME)
    assert born[0] == BTIME, "the file system of tmp_path keeps birth times"


# ioctl(2)

NO_ATIME, NO_DUMP, APPEND_ONLY, IMMUTABLE = 0x80, 0x40, 0x20, 0x10
XATTR = struct.Struct("=IIIII8x")
UNKNOWN = {
    "FS_IOC_SETVERSION": 0x40087602,
    "FS_IOC_SETFSLABEL": 0x41009432,
    "FS_IOC_GET_ENCRYPTION_POLICY": 0x400C6615,
    "FS_IOC_ENABLE_VERITY": 0x40806685,
    "EXT4_IOC_MIGRATE": 0x6609,
    "FITRIM": 0xC0185879,
    "BLKGETSIZE64": 0x80081272,
    "TCGETS": 0x5401,
    "nobody's": 0xC0FFEE00,
}
# The kernel answers these for any file: it shows that they are not in our way.
GENERAL = {"FIONREAD": 0x541B, "FIGETBSZ": 2}


def ask(fd: int, number: int, size: int) -> bytes:
    return fcntl.ioctl(fd, number, bytes(size))


def flags_of(path: Path) -> int:
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        return int.from_bytes(ask(fd, FS_IOC_GETFLAGS, 8)[:4], sys.byteorder)


def set_flags(path: Path, flags: int) -> None:
    """What chattr(1) does with some flags, which it leaves the others beside."""
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        kept = flags_of(path) & ~(NO_ATIME | NO_DUMP | APPEND_ONLY | IMMUTABLE)
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, (kept | flags).to_bytes(8, sys.byteorder))


@pytest.fixture
def flagged(both: tuple[Path, Place]) -> Iterator[tuple[Path, Place]]:
    """Both directories, where files have flags; afterwards nobody's keep a test from removing."""
    plain, place = both
    if isinstance(outcome(partial(flags_of, plain)), str):
        pytest.skip("the file system of tmp_path has no flags of files")
    yield both
    for path in (*plain.rglob("*"), *place.source.rglob("*")):
        if path.is_dir() or path.is_file():
            set_flags(path, 0)


def entries(top: Path) -> list[Path]:
    (top / "file").write_bytes(b"data")
    (top / "directory").mkdir()
    return [top / "file", top / "directory"]


@native
def test_flags_of_files_are_asked_for_and_set(flagged: tuple[Path, Place]) -> None:
    def scenario(top: Path) -> Any:
        answers: list[Any] = []
        for path in entries(top):
            for flags in (NO_DUMP, NO_ATIME | NO_DUMP, 0, 1 << 31):
                answers.append(outcome(partial(set_flags, path, flags)))
                answers.append(flags_of(path))
                with opened(path, os.O_RDONLY) as fd:
                    answers.append(XATTR.unpack(ask(fd, FS_IOC_FSGETXATTR, 28)))
            with opened(path, os.O_RDONLY) as fd:
                answers.append(len(ask(fd, FS_IOC_GETVERSION, 8)))
                answers.append(outcome(partial(ask, fd, FS_IOC_GETFSLABEL, 256)))
        # A file that is made in a directory with a flag gets it, where the source says so.
        set_flags(top / "directory", NO_DUMP)
        (top / "directory/new").touch()
        return [*answers, flags_of(top / "directory/new")]

    compare(flagged, scenario)


@native
@needs_root
@pytest.mark.parametrize("flag", [IMMUTABLE, APPEND_ONLY])
def test_what_a_flag_forbids_is_forbidden(flagged: tuple[Path, Place], flag: int) -> None:
    def attempts(top: Path, path: Path) -> Iterator[Callable[[], object]]:
        for flags in (os.O_WRONLY, os.O_WRONLY | os.O_APPEND, os.O_RDONLY, os.O_RDWR | os.O_TRUNC):
            yield partial(open_and_close, path, flags)
        yield lambda: path.chmod(0o600)
        yield lambda: os.chown(path, 1, 1)
        yield lambda: os.utime(path, (5, 5))
        yield lambda: os.utime(path)
        yield lambda: os.truncate(path, 0)
        yield lambda: os.setxattr(path, "user.a", b"value")
        yield lambda: os.link(path, top / "link")
        yield lambda: os.rename(path, top / "renamed")
        yield lambda: (path / "new").touch()
        yield lambda: (path / "kept").unlink()
        yield lambda: os.rename(path / "kept", path / "moved")
        yield partial(open_and_close, path, os.O_TMPFILE | os.O_RDWR)
        yield lambda: (path.rmdir if path.is_dir() else path.unlink)()
        yield lambda: set_flags(path, flag | NO_DUMP)

    def scenario(top: Path) -> Any:
        answers = []
        for path in entries(top):
            if path.is_dir():
                (path / "kept").touch()
            with opened(path, os.O_RDONLY if path.is_dir() else os.O_RDWR) as before:
                set_flags(path, flag)
                answers += [outcome(attempt) for attempt in attempts(top, path)]
                # Who has it open already.
                for change in (
                    lambda: os.write(before, b"x"),
                    lambda: os.ftruncate(before, 1),
                    lambda: os.fchmod(before, 0o640),
                    lambda: syscalls.fallocate(before, PUNCH_HOLE | KEEP_SIZE, 0, 1),
                ):
                    answers.append(outcome(change))
            set_flags(path, 0)
            answers.append(outcome(lambda: os.rename(path, f"{path} renamed")))  # noqa: B023
        return answers

    assert "EPERM" in compare(flagged, scenario)


def set_projects(top: Path) -> Any:
    """Numbers by which project quotas go, and whether directories hand them on."""
    answers: list[Any] = []
    for path in entries(top):
        for flags, project in ((0, 0), (0x200, 0), (0, 42), (0x200, 42), (1 << 30, 0)):
            with opened(path, os.O_RDONLY) as fd:
                given = XATTR.pack(flags, 0, 0, project, 0)
                answers.append(outcome(partial(fcntl.ioctl, fd, FS_IOC_FSSETXATTR, given)))
                answers.append(XATTR.unpack(ask(fd, FS_IOC_FSGETXATTR, 28)))
    (top / "directory/new").touch()
    with opened(top / "directory/new", os.O_RDONLY) as fd:
        return [*answers, XATTR.unpack(ask(fd, FS_IOC_FSGETXATTR, 28))]


@native
@needs_root
def test_a_projects_number_is_set_as_the_source_lets(flagged: tuple[Path, Place]) -> None:
    compare(flagged, set_projects)


@native
@needs_root
def test_a_projects_number_is_handed_on(new_mount: Callable[..., Mount], tmp_path: Path) -> None:
    """Where files have one: on xfs."""
    with image("xfs", tmp_path) as disk:
        mount = new_mount(source=disk)
        with ending(mount):
            for name in ("plain", "mounted"):
                (disk / name).mkdir()
            place = Place(mount, mount.path / "mounted", disk / "mounted")
            *_, inherited = compare((disk / "plain", place), set_projects)
            assert inherited[3] == 42


@native
def test_other_ioctls_are_unknown_or_the_kernels(both: tuple[Path, Place]) -> None:
    plain, place = both
    for path in entries(place.path):
        with opened(path, os.O_RDONLY) as fd:
            for name, number in UNKNOWN.items():
                assert outcome(partial(fcntl.ioctl, fd, number, bytes(256))) == "ENOTTY", name
            assert outcome(partial(ask, fd, 0xC020660B, 32)) == "ENOTSUP", "FIEMAP"
            assert outcome(partial(fcntl.ioctl, fd, 0x40049409, fd)) in (
                *("ENOTSUP", "EISDIR", "EBADF"),
            ), "FICLONE"

    def scenario(top: Path) -> Any:
        (top / "file2").write_bytes(b"data")
        with opened(top / "file2", os.O_RDONLY) as fd:
            os.lseek(fd, 1, os.SEEK_SET)
            return [outcome(partial(ask, fd, number, 8)) for number in GENERAL.values()]

    assert scenario(place.path) == scenario(plain)


@native
@needs_root
def test_flags_are_set_by_whom_the_source_lets(
    new_place: Callable[..., Place], tmp_path: Path
) -> None:
    """The owner sets what anybody may, nobody but root what takes a capability."""
    place = new_place("-o", "allow_other")
    if isinstance(outcome(partial(flags_of, place.source)), str):
        pytest.skip("the file system of tmp_path has no flags of files")

    def attempt(top: Path) -> Any:
        # By a descriptor: the way to the source is closed to others.
        os.chdir(top)
        become(STRANGER)
        return [
            outcome(partial(set_flags, Path(name), flags))
            for name in ("own", "others")
            for flags in (NO_DUMP, NO_ATIME, 0, IMMUTABLE, APPEND_ONLY, 0)
        ]

    answers = []
    for top, source in (
        (place.source / "plain",) * 2,
        (place.path / "mounted", place.source / "mounted"),
    ):
        top.mkdir()
        top.chmod(0o755)
        for name in ("own", "others"):
            (top / name).write_bytes(b"data")
            (top / name).chmod(0o666)
        os.chown(top / "own", STRANGER, STRANGER)
        answers.append((in_child(attempt, top), tree(source), [flags_of(source / "own")]))
    assert answers[1] == answers[0]
    assert answers[0][0][:6] == [None, None, None, "EPERM", "EPERM", None]


# Extended attributes


@native
def test_attributes_are_made_and_replaced_as_asked(both: tuple[Path, Place]) -> None:
    """Flags, sizes, names, and which kinds of files have any."""

    def scenario(top: Path) -> Any:
        entries(top)
        (top / "link").symlink_to("file")
        os.mkfifo(top / "fifo")
        answers: list[Any] = []
        names = ["user.a", "trusted.a", "security.a", "system.a", "nothing.a", "a", "user.", ""]
        names += ["user." + "n" * 250, "user." + "n" * 251, "system.posix_acl_access"]
        for file, name, flags in itertools.product(
            ("file", "directory", "link", "fifo"),
            names,
            (os.XATTR_REPLACE, os.XATTR_CREATE, 0, 3, 4),
        ):
            path = os.fsencode(top / file)

            def change(way: Callable[..., object], *args: object) -> Any:
                return outcome(partial(way, path, name, *args, follow_symlinks=False))  # noqa: B023

            answers += [change(os.setxattr, b"value", flags), change(os.getxattr)]
            answers += [change(os.setxattr, b"", flags), change(os.getxattr)]
            if flags == 0:
                answers += [change(os.removexattr), change(os.removexattr), change(os.getxattr)]
        # Rooms that are too small, and values that are too large.
        for size in (0, 1, 100, 65536, 65537):
            path = os.fsencode(top / "file")
            answers.append(outcome(partial(os.setxattr, path, "user.b", b"x" * size)))
            for room in (0, 1, 99, 100, 65536, 100_000):
                buffer = ctypes.create_string_buffer(room)
                answers.append(outcome(partial(_getxattr, path, b"user.b", buffer, room)))
                answers.append(outcome(partial(_listxattr, path, buffer, room)))
        return answers

    if not has_user_attributes(both[0]):
        pytest.skip("the file system of tmp_path has no extended attributes for users")
    answers = compare(both, scenario)
    assert {"EEXIST", "ENODATA", "ENOTSUP", "EINVAL", "ERANGE"} <= set(answers)


# Listings


def listed(directory: Path) -> dict[str, tuple[int, int]]:
    """The numbers and types of a directory's entries, as getdents64(2) gives them."""
    found = {}
    with opened(directory, os.O_RDONLY) as fd:
        while records := read_records(fd, 1000):
            at = 0
            while at < len(records):
                number, _, kind, name, at = next_record(records, at)
                found[os.fsdecode(name)] = number, kind
    return found


@pytest.mark.parametrize("looked", [False, True], ids=["listed", "looked at"])
def test_entries_say_what_their_files_are(place: Place, looked: bool) -> None:
    """With READDIR and with READDIRPLUS, which follows once a listing's entries are looked at."""
    entries(place.path)
    (place.path / "link").symlink_to("file")
    os.link(place.path / "file", place.path / "another name")
    os.mkfifo(place.path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        cwd = os.open(".", os.O_PATH)
        os.chdir(place.path)  # a socket's path is to be short
        try:
            server.bind("socket")
        finally:
            os.fchdir(cwd)
            os.close(cwd)
    if os.geteuid() == 0:
        os.mknod(place.path / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for number in range(50):
        (place.path / f"name {number}").touch()
    found = listed(place.path)
    if looked:
        for name in found:
            (place.path / name).lstat()
        found = listed(place.path)
    assert set(found) == {".", "..", *os.listdir(place.source)}
    assert found == listed(place.source)
    for name, (number, kind) in found.items():
        there = (place.path / name).lstat()
        assert (number, kind) == (there.st_ino, stat.S_IFMT(there.st_mode) >> 12), name


# renameat2(2)

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
VALID_RENAMES = (0, NOREPLACE, EXCHANGE, WHITEOUT)
RENAMES = (*VALID_RENAMES[:3], NOREPLACE | EXCHANGE, WHITEOUT | EXCHANGE, 8, 1 << 31)
KINDS = ("file", "link", "empty", "full", "missing", "other name")


@pytest.mark.parametrize("flags", [*RENAMES, pytest.param(WHITEOUT, marks=needs_root)])
def test_names_are_moved_as_asked(both: tuple[Path, Place], flags: int) -> None:
    def scenario(top: Path) -> Any:
        answers: list[Any] = []
        kinds = KINDS if flags in VALID_RENAMES else ("file", "missing")
        for number, (old, new) in enumerate(itertools.product(kinds, repeat=2)):
            here = top / f"{number}"
            for side in ("old", "new"):
                (here / side / "empty").mkdir(parents=True)
                (here / side / "full/below").mkdir(parents=True)
                (here / side / "file").write_bytes(side.encode())
                (here / side / "link").symlink_to(side)
            os.link(here / "old/file", here / "new/other name")
            with opened(here / "old", os.O_RDONLY) as one, opened(here / "new", os.O_RDONLY) as two:
                names = old.encode(), new.encode()
                answers.append(
                    outcome(partial(syscalls.rename, one, names[0], two, names[1], flags))
                )
                if number == 0:
                    answers += [
                        outcome(partial(syscalls.rename, one, odd[0], one, odd[1], flags))
                        for odd in ((b".", b"file"), (b"file", b".."), (b"full", b"full/below/x"))
                    ]
        return answers

    answers = compare(both, scenario)
    assert (None in answers) == (flags in VALID_RENAMES)


# poll(2)

ALL_EVENTS = 0x7FF  # of poll(2), and POLLRDHUP's below


def polled(fd: int, events: int) -> list[int]:
    waiting = select.poll()
    waiting.register(fd, events)
    return [told for _, told in waiting.poll(0)]


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_SYNC])
def test_a_file_is_always_ready(both: tuple[Path, Place], flags: int) -> None:
    def scenario(top: Path) -> Any:
        answers: list[Any] = []
        for path in entries(top):
            with opened(path, os.O_RDONLY if path.is_dir() else flags) as fd:
                os.lseek(fd, 0, os.SEEK_END)  # nothing to read
                events = [0, select.POLLIN, select.POLLOUT, select.POLLPRI, ALL_EVENTS, 0x2000]
                answers.append([polled(fd, each) for each in events])
                answers.append([len(ready) for ready in select.select([fd], [fd], [fd], 0)])
        return answers

    compare(both, scenario)


# Shared mappings


@native
@pytest.mark.parametrize("sync", [0, os.O_SYNC, os.O_DSYNC])
@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
def test_what_is_written_past_the_cache_can_be_mapped(
    both: tuple[Path, Place], sync: int, direct: int
) -> None:
    """Stores and writes of one descriptor see each other, and are in the file."""

    def scenario(top: Path) -> Any:
        (top / "file").write_bytes(pattern(8 * BLOCK))
        answers: list[Any] = []
        with (
            opened(top / "file", os.O_RDWR | sync | direct) as fd,
            mmap.mmap(-1, 2 * BLOCK) as page,  # aligned, as O_DIRECT wants it
            mmap.mmap(fd, 8 * BLOCK) as memory,
            opened(top / "file", os.O_RDONLY) as other,
        ):
            memory[:6] = b"stored"
            answers += [os.pread(other, 8, 0), os.preadv(fd, [page], 0), page[:8]]
            page[:] = b"w" * 2 * BLOCK
            answers += [os.pwrite(fd, page, BLOCK), memory[BLOCK - 2 : BLOCK + 2]]
            memory[BLOCK + 10 : BLOCK + 20] = b"in between"
            memory[5 * BLOCK : 5 * BLOCK + 5] = b"later"
            memory.flush()
            answers += [os.pwrite(fd, page, 6 * BLOCK), os.pread(other, 9 * BLOCK, 0)]
            os.ftruncate(fd, 7 * BLOCK)
            answers += [memory[7 * BLOCK - 5 : 7 * BLOCK], os.fstat(fd).st_size]
        with opened(top / "file", os.O_RDONLY | sync | direct) as fd:
            mapped = partial(mmap.mmap, fd, BLOCK)
            with mapped(prot=mmap.PROT_READ) as memory:
                answers.append(memory[:6])
            answers.append(errno_of(mapped, prot=mmap.PROT_WRITE))
        return answers

    assert compare(both, scenario)[-1] == errno.EACCES


# What the kernel answers by itself, otherwise than for the source


@native
@pytest.mark.parametrize("mode", NOT_PASSED_ON)
def test_a_mode_that_the_kernel_keeps_from_us_changes_nothing(place: Place, mode: int) -> None:
    full_and_sparse(place.path / "file", False)
    before = seen(place.source / "file")
    with opened(place.path / "file") as fd:
        assert outcome(partial(syscalls.fallocate, fd, mode, BLOCK, BLOCK)) == "ENOTSUP"
    assert seen(place.source / "file") == before


@native
def test_stores_are_no_data_until_they_are_written(place: Place) -> None:
    """The kernel asks where data is without writing the pages that it has (fuse_lseek)."""
    with opened(place.path / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, 100 * BLOCK)
        with mmap.mmap(fd, 100 * BLOCK) as memory:
            memory[50 * BLOCK : 50 * BLOCK + 5] = b"store"
            assert outcome(partial(data_of, fd)) == []
            memory.flush()
            assert data_of(fd) == data_of_path(place.source / "file") != []


def test_a_file_can_be_given_to_epoll(both: tuple[Path, Place]) -> None:
    """A file system without poll is refused there (EPERM). FUSE has it, whatever we have."""

    def registered(top: Path) -> Any:
        (top / "file").write_bytes(b"data")
        with opened(top / "file") as fd, select.epoll() as waiting:
            waiting.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI)
            return [events for _, events in waiting.poll(0)]

    plain, place = both
    assert outcome(partial(registered, plain)) == "EPERM"
    assert registered(place.path) == [select.EPOLLIN | select.EPOLLOUT]


@native
@needs_root
def test_flags_show_in_no_statx(flagged: tuple[Path, Place]) -> None:
    """The kernel asks for no attributes of statx; lsattr(1) tells."""

    def attributes(path: Path) -> tuple[int, int]:
        buffer = ctypes.create_string_buffer(256)
        _statx(-100, os.fsencode(path), 0, KNOWN, buffer)
        return struct.unpack_from("=Q", buffer.raw, 8)[0] & (IMMUTABLE | APPEND_ONLY), flags_of(
            path
        )

    _, place = flagged
    (place.path / "file").touch()
    set_flags(place.path / "file", IMMUTABLE)
    shown, set_ = attributes(place.source / "file")
    assert shown == IMMUTABLE
    assert attributes(place.path / "file") == (0, set_)
    assert set_ & IMMUTABLE
