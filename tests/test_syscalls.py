"""System calls that Python's os module lacks (ninefuse/linux: syscalls, filesystems, records)."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ops_helpers import fails, need_devices, needs_root, read_entries
from ops_helpers import leak_free as leak_free

from ninefuse.linux import libc, syscalls
from ninefuse.linux.filesystems import file_handle, file_system_of
from ninefuse.linux.syscalls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    SetTime,
    detached_mount,
    open_cached,
    rename,
    set_times,
    stat_descriptor,
    stat_name,
)

pytestmark = pytest.mark.usefixtures("leak_free")


@pytest.fixture(params=["compiled", "by ctypes"])
def directory(
    leak_free: None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[int]:
    """An O_PATH descriptor of tmp_path; what is asked of it is asked in both ways there are."""
    if request.param == "compiled":
        assert syscalls.statx is not syscalls._look
    else:
        monkeypatch.setattr(syscalls, "statx", syscalls._look)
        monkeypatch.setattr(syscalls, "open_in_memory", syscalls._open)
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def path_descriptor(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_NOFOLLOW)


# openat2


def test_a_step_to_a_name_in_memory(directory: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    for name in (b"file", b"link"):
        stat_name(directory, name)  # it is in memory now
        fd = open_cached(directory, name)
        try:
            assert stat_descriptor(fd).ino == (tmp_path / os.fsdecode(name)).lstat().st_ino
            assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / os.fsdecode(name))
        finally:
            os.close(fd)
    with fails(errno.ENOENT, errno.EAGAIN):  # it may not be known that there is none
        open_cached(directory, b"none")
    with fails(errno.EBADF):
        open_cached(1 << 30, b"file")


@pytest.mark.parametrize("directory", ["compiled"], indirect=True)
def test_no_name_has_a_zero_in_it(directory: int) -> None:
    """It would be cut off there."""
    for call in (stat_name, open_cached):
        with pytest.raises(ValueError, match="null byte"):
            call(directory, b"file\0more")


# statx


def test_attributes_by_name_and_by_descriptor_agree_with_lstat(
    directory: int, tmp_path: Path
) -> None:
    """For each kind of file; a symlink is not followed, nor is an O_PATH descriptor opened."""
    (tmp_path / "file").write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo", 0o4611)
    for path in tmp_path.iterdir():
        expected = path.lstat()
        fd = path_descriptor(path)
        try:
            by_descriptor = stat_descriptor(fd)
        finally:
            os.close(fd)
        by_name = stat_name(directory, os.fsencode(path.name))
        assert by_name == by_descriptor
        a = by_name
        assert (a.ino, a.dev, a.mode, a.nlink, a.uid, a.gid, a.size, a.blocks, a.blksize) == (
            expected.st_ino,
            expected.st_dev,
            expected.st_mode,
            expected.st_nlink,
            expected.st_uid,
            expected.st_gid,
            expected.st_size,
            expected.st_blocks,
            expected.st_blksize,
        )
        assert (a.atime_ns, a.mtime_ns, a.ctime_ns) == (
            expected.st_atime_ns,
            expected.st_mtime_ns,
            expected.st_ctime_ns,
        )
        assert a.kind == stat.S_IFMT(expected.st_mode)


def test_a_birth_stays_through_changes(directory: int, tmp_path: Path) -> None:
    """It is a moment before now, or 0 where the file system keeps none."""
    (tmp_path / "file").touch()
    born = stat_name(directory, b"file").birth
    assert born == 0 or abs(time.time_ns() - born) < 60 * 10**9
    os.utime(tmp_path / "file", ns=(1, 1))
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "file").rename(tmp_path / "moved")
    assert stat_name(directory, b"moved").birth == born


def test_numbers_of_devices(directory: int, tmp_path: Path) -> None:
    """Of the one that a node stands for and of the one that it lies on."""
    need_devices(tmp_path)
    os.mknod(tmp_path / "node", stat.S_IFCHR | 0o600, os.makedev(300, 70_000))
    a = stat_name(directory, b"node")
    assert a.rdev == os.makedev(300, 70_000)
    assert (a.dev_major, a.dev_minor) == (os.major(a.dev), os.minor(a.dev))
    assert a.dev == os.stat(tmp_path / "node").st_dev


def test_errors_are_oserrors_with_their_errno(directory: int) -> None:
    """As of calls that Python has itself."""
    with pytest.raises(FileNotFoundError):
        stat_name(directory, b"none")
    with fails(errno.EBADF):
        stat_descriptor(1 << 30)
    with fails(errno.ENAMETOOLONG):
        stat_name(directory, b"x" * 256)


# renameat2


def test_rename_and_its_flags(directory: int, tmp_path: Path) -> None:
    """Plain, without replacing, exchanging; names are bytes."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    rename(directory, b"a", directory, b"\xff", 0)
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [b"b", b"\xff"]
    with pytest.raises(FileExistsError):
        rename(directory, b"\xff", directory, b"b", RENAME_NOREPLACE)
    rename(directory, b"\xff", directory, b"b", RENAME_EXCHANGE)
    assert (tmp_path / "b").read_bytes() == b"a"
    rename(directory, b"\xff", directory, b"b", 0)
    assert os.listdir(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"b"
    with fails(errno.EINVAL):
        rename(directory, b"b", directory, b"c", RENAME_NOREPLACE | RENAME_EXCHANGE)


# utimensat


@pytest.mark.parametrize("kind", ["file", "dangling", "directory", "fifo"])
def test_times_of_a_path_descriptor(tmp_path: Path, kind: str) -> None:
    """To the nanosecond, before 1970 too, of a symlink itself."""
    path = tmp_path / kind
    makers: dict[str, Callable[[], object]] = {
        "file": path.touch,
        "dangling": lambda: path.symlink_to("nowhere"),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }
    makers[kind]()
    fd = path_descriptor(path)
    try:
        set_times(fd, -1, 1_234_567_890_987_654_321)
        assert (path.lstat().st_atime_ns, path.lstat().st_mtime_ns) == (
            -1,
            1_234_567_890_987_654_321,
        )
        set_times(fd, SetTime.OMIT, -2_000_000_001)
        assert (path.lstat().st_atime_ns, path.lstat().st_mtime_ns) == (-1, -2_000_000_001)
        set_times(fd, SetTime.NOW, SetTime.OMIT)
        assert abs(time.time_ns() - path.lstat().st_atime_ns) < 60 * 10**9
        assert path.lstat().st_mtime_ns == -2_000_000_001
    finally:
        os.close(fd)


def test_times_that_do_not_fit(directory: int, tmp_path: Path) -> None:
    """EINVAL where 64 bits of seconds end; the kernel brings anything less into its range."""
    before = tmp_path.stat().st_mtime_ns
    for ns in ((1 << 63) * 10**9, -((1 << 63) * 10**9) - 1, 1 << 200):
        with fails(errno.EINVAL):
            set_times(directory, SetTime.OMIT, ns)
        with fails(errno.EINVAL):
            set_times(directory, ns, SetTime.OMIT)
    assert tmp_path.stat().st_mtime_ns == before
    set_times(directory, SetTime.OMIT, ((1 << 63) - 1) * 10**9)
    assert tmp_path.stat().st_mtime_ns > before


# getdents64


def test_entries_are_those_of_the_directory(tmp_path: Path) -> None:
    """With number, type and a cookie that leads to the one after."""
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("x")
    (tmp_path / ("y" * 255)).touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        entries = read_entries(fd, 1 << 16)
        assert read_entries(fd, 1 << 16) == []
        for at, entry in enumerate(entries):
            found = os.lstat(os.fsencode(tmp_path) + b"/" + entry.name)
            assert entry.type == stat.S_IFMT(found.st_mode) >> 12
            if entry.name != b"..":
                assert entry.ino == found.st_ino
            os.lseek(fd, entry.offset, os.SEEK_SET)
            assert read_entries(fd, 1 << 16) == entries[at + 1 :]
    finally:
        os.close(fd)
    names = [entry.name for entry in entries]
    assert sorted(names) == sorted([b".", b"..", b"file", b"directory", b"link", b"y" * 255])


def test_a_buffer_too_small_for_one_entry(tmp_path: Path) -> None:
    """EINVAL, as getdents64 says."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with fails(errno.EINVAL):
            read_entries(fd, 16)
        assert len(read_entries(fd, 1 << 12)) == 2
    finally:
        os.close(fd)


# Which file system


@pytest.mark.parametrize("path", ["/proc", "/"])
def test_the_type_is_asked_of_an_o_path_descriptor(path: str) -> None:
    """An overlayfs is one, and nothing else; of proc, handles are not to be had."""
    kinds = {}
    with open("/proc/self/mounts") as mounts:  # a later mount hides an earlier one
        for line in mounts:
            _, at, kind, *_ = line.split()
            kinds[at] = kind
    fd = os.open(path, os.O_PATH)
    try:
        found = file_system_of(fd)
        assert found.is_overlay == (kinds[path] == "overlay")
        lasting = ("ext2", "ext3", "ext4", "xfs", "f2fs", "jfs", "nfs", "nfs4")
        assert found.has_lasting_handles == (kinds[path] in lasting)
        assert found.id == os.fstatvfs(fd).f_fsid
    finally:
        os.close(fd)
    with fails(errno.EBADF):
        file_system_of(1 << 30)


def test_a_files_handle_is_its_own_under_any_name(directory: int) -> None:
    """By a descriptor as by a name; a symlink has one of its own."""
    for name in (b"one", b"other"):
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.symlink(b"one", b"symlink", dir_fd=directory)
    fd = os.open(b"one", os.O_PATH, dir_fd=directory)
    try:
        handle = file_handle(fd)
        assert handle == file_handle(directory, b"one")
        os.rename(b"one", b"moved", src_dir_fd=directory, dst_dir_fd=directory)
        assert handle == file_handle(fd) == file_handle(directory, b"moved")
    finally:
        os.close(fd)
    assert len({handle, *(file_handle(directory, n) for n in (b"other", b"symlink"))}) == 3
    with fails(errno.ENOENT):
        file_handle(directory, b"one")


@needs_root
def test_a_detached_mount_ends_with_its_descriptor() -> None:
    """It is a file system of its own, which appears in no list of mounts."""
    try:
        fd = detached_mount(b"tmpfs")
    except OSError as failure:
        if failure.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        pytest.skip("mounting is not permitted here")
    try:
        with open("/proc/self/mountinfo") as mounts:
            assert not [line for line in mounts if line.split()[2] == device_of(fd)]
        # It can be walked from, like any O_PATH descriptor.
        inside = os.open(".", os.O_RDONLY, dir_fd=fd)
        assert os.listdir(inside) == []
        os.close(inside)
    finally:
        os.close(fd)


def device_of(fd: int) -> str:
    device = os.fstat(fd).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


@needs_root
def test_a_detached_mount_of_nothing() -> None:
    """ENODEV for a file system that there is not (leak_free counts descriptors)."""
    with fails(errno.ENODEV, errno.EPERM, errno.ENOSYS):
        detached_mount(b"no-such-file-system")


# Signals


def test_a_call_that_a_signal_interrupts_is_made_again() -> None:
    """EINTR is nobody's answer: the call goes on, as those of Python do."""
    handled: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
    reading, writing = os.pipe()
    try:
        # Without SA_RESTART, as Python sets it, a signal ends the wait of read(2).
        read = libc.function("read", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
        buffer = ctypes.create_string_buffer(8)
        main = threading.main_thread().ident
        assert main is not None

        def interrupt(main: int = main) -> None:
            for _ in range(5):
                time.sleep(0.02)
                signal.pthread_kill(main, signal.SIGUSR1)
            os.write(writing, b"done")

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        assert read(reading, buffer, 8) == 4
        thread.join(10)
        assert buffer.value == b"done"
        assert handled
    finally:
        signal.signal(signal.SIGUSR1, previous)
        os.close(reading)
        os.close(writing)
