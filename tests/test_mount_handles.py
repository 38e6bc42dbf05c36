"""File handles of a mount: open_by_handle_at(2) of files that the kernel has forgotten.

An NFS server holds files by such handles, for as long as it likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from file_systems import image, mounted
from mounting import NINEFUSE, SESSION, SOAK, Child, Mount, errno_of, run, wait_until
from ops_helpers import outcome

from ninefuse.linux.filesystems import HANDLE_HEADER, file_handle

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may open by handle"),
    pytest.mark.skipif(SESSION != "native", reason="pyfuse3's session finds no forgotten file"),
]

FILES = 20
KINDS = ("ext4", "xfs", "btrfs")
FUSE_HANDLE = struct.Struct("=III")  # fuse_encode_fh: the nodeid's halves, high first; generation
FILEID_INO64_GEN = 0x81
MS_NOSUID, MS_NODEV, MS_REMOUNT = 2, 4, 32

_libc = ctypes.CDLL(None, use_errno=True)


def handle_of(path: Path) -> bytes:
    """The handle of a file, by its path; not of what a symlink leads to."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        return file_handle(fd)
    finally:
        os.close(fd)


def fuse_handle(nodeid: int, generation: int) -> bytes:
    """A handle of the mount's that is made up."""
    halves = nodeid >> 32, nodeid & 0xFFFFFFFF
    body = FUSE_HANDLE.pack(*halves, generation)
    return HANDLE_HEADER.pack(len(body), FILEID_INO64_GEN) + body


def generation_of(path: Path) -> int:
    """The generation of a file of ext4's own."""
    return int.from_bytes(handle_of(path)[-4:], "little")


def open_handle(mount: Path, handle: bytes, flags: int = os.O_RDONLY) -> int:
    """open_by_handle_at(2), by the root of a mount."""
    top = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = _libc.open_by_handle_at(top, handle, flags | os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
        return int(fd)
    finally:
        os.close(top)


def is_stale(mount: Path, handle: bytes) -> bool:
    try:
        os.close(open_handle(mount, handle, os.O_PATH))
    except OSError as e:
        return e.errno == errno.ESTALE
    return False


def read(mount: Path, handle: bytes) -> bytes:
    """What is in a file that is opened by its handle."""
    fd = open_handle(mount, handle)
    try:
        return os.read(fd, 1000)
    finally:
        os.close(fd)


def remount(path: Path) -> None:
    """Have the kernel forget the names of a file system, and files that only names keep."""
    # As drop_caches does for all there are, which other tests might not like.
    if _libc.mount(None, bytes(path), None, MS_REMOUNT | MS_NOSUID | MS_NODEV, None):
        raise OSError(ctypes.get_errno(), f"remount {path}")


def forget(mount: Mount) -> None:
    """Have the kernel forget all files of a mount, and the daemon hear of it."""
    remount(mount.path)
    wait_until(lambda: mount.counters().fids == 1, "all files forgotten")
    if os.path.ismount(mount.source):
        remount(mount.source)


@pytest.fixture(scope="module", params=KINDS)
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A file system of its own, which tests share."""
    with image(request.param, tmp_path_factory.mktemp(request.param)) as top:
        yield top


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    with image("ext4", tmp_path, size=16 << 20) as top:
        yield top


def test_forgotten_files_are_opened(disk: Path, new_mount: Callable[..., Mount]) -> None:
    """A file deep below, a symlink, and a directory, with what is in it and above it."""
    mount = new_mount(source=disk)
    deep = mount.path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep below")
    (deep / "link").symlink_to("nowhere")
    handles = {name: handle_of(deep / name) for name in ("file", "link", ".")}
    for _ in range(2):  # lookups are counted as often as they are given back
        forget(mount)
        assert read(mount.path, handles["file"]) == b"deep below"
        link = open_handle(mount.path, handles["link"], os.O_PATH | os.O_NOFOLLOW)
        assert os.readlink(b"", dir_fd=link) == b"nowhere"
        os.close(link)
        forget(mount)
        fd = open_handle(mount.path, handles["."], os.O_DIRECTORY)
        assert sorted(os.listdir(fd)) == ["file", "link"]
        assert os.readlink(f"/proc/self/fd/{fd}") == str(deep)
        assert os.stat("../../..", dir_fd=fd).st_ino == mount.path.stat().st_ino
        assert (Path(f"/proc/self/fd/{fd}") / "file").read_bytes() == b"deep below"
        os.close(fd)
    shutil.rmtree(mount.path / "a")


def test_a_forgotten_file_is_written(disk: Path, new_mount: Callable[..., Mount]) -> None:
    """And goes on to be found by its name, which the daemon had not known; the file alone."""
    mount = new_mount(source=disk)
    (mount.path / "file").write_bytes(b"old")
    handle = handle_of(mount.path / "file")
    forget(mount)
    fd = open_handle(mount.path, handle, os.O_RDWR)
    assert os.write(fd, b"new") == 3
    assert (mount.path / "file").stat().st_ino == os.fstat(fd).st_ino
    (mount.path / "file").rename(mount.path / "moved")
    os.fchmod(fd, 0o640)
    os.close(fd)
    forget(mount)
    assert stat.S_IMODE((disk / "moved").stat().st_mode) == 0o640
    assert read(mount.path, handle) == b"new"
    (disk / "moved").unlink()


def test_handles_last_longer_than_the_daemon(disk: Path, new_mount: Callable[..., Mount]) -> None:
    """And are the same under another model."""
    first = new_mount("--model", "none", source=disk)
    (first.path / "directory").mkdir()
    (first.path / "directory" / "file").write_bytes(b"kept")
    (first.path / "removed").write_bytes(b"removed")
    names = ("directory", "directory/file", "removed")
    directory, file, removed = (handle_of(first.path / name) for name in names)
    first.end()
    (disk / "removed").unlink()
    second = new_mount("--model", "first", source=disk)
    assert read(second.path, file) == b"kept"
    fd = open_handle(second.path, directory, os.O_DIRECTORY)
    assert os.listdir(fd) == ["file"]
    os.close(fd)
    assert is_stale(second.path, removed)
    shutil.rmtree(disk / "directory")


def test_a_removed_file_is_stale(disk: Path, new_mount: Callable[..., Mount]) -> None:
    """Also where somebody has it open in the source, so that its inode is there."""
    mount = new_mount(source=disk)
    for name in ("open", "closed", "here"):
        (mount.path / name).write_bytes(b"x")
    (mount.path / "directory").mkdir()
    handles = [handle_of(mount.path / name) for name in ("open", "closed", "here", "directory")]
    nameless = os.open(mount.path, os.O_TMPFILE | os.O_RDWR)
    handles.append(file_handle(nameless))
    assert not is_stale(mount.path, handles[-1])
    os.close(nameless)
    (mount.path / "here").unlink()
    forget(mount)
    with open(disk / "open", "rb"):
        for name in ("open", "closed"):
            (disk / name).unlink()
        (disk / "directory").rmdir()
        assert [is_stale(mount.path, handle) for handle in handles] == [True] * len(handles)
    forget(mount)


def test_a_number_that_is_given_again_is_stale(ext4: Path, new_mount: Callable[..., Mount]) -> None:
    """Of the file that had it; the new one has a handle of its own."""
    mount = new_mount(source=ext4)
    old = mount.path / "old"
    old.write_bytes(b"old")
    number, handle = old.stat().st_ino, handle_of(old)
    os.unlink(ext4 / "old")
    forget(mount)

    def gets_it() -> bool:
        (ext4 / "new").unlink(missing_ok=True)
        (ext4 / "new").write_bytes(b"new")
        return (ext4 / "new").stat().st_ino == number

    wait_until(gets_it, "the number given to the next file, as ext4 does once all have let it go")
    assert is_stale(mount.path, handle)
    assert (mount.path / "new").stat().st_ino == number
    assert is_stale(mount.path, handle), "which the kernel knows now"
    new = handle_of(mount.path / "new")
    forget(mount)
    assert read(mount.path, new) == b"new"


def change(tops: list[Path], seconds: float) -> int:
    """Replace, remove and move files, by the mount and in the source; how often."""
    random = Random(16)
    end = time.monotonic() + seconds
    for count in itertools.count():
        if time.monotonic() > end:
            return count
        top, name = random.choice(tops), f"file{random.randrange(FILES)}"
        with contextlib.suppress(FileNotFoundError):
            what = random.randrange(4)
            if what < 2:  # with numbers that were others' a moment ago
                (top / "new").write_bytes(b"%d" % count)
                (top / "new").rename(top / name)
            elif what == 2:
                (top / name).unlink()
            else:
                (top / name).rename(top / f"file{random.randrange(FILES)}")
    raise AssertionError("the count has no end")


@pytest.mark.soak
@pytest.mark.limit(200)
def test_a_handle_is_of_one_file(ext4: Path, new_mount: Callable[..., Mount]) -> None:
    """Whatever becomes of others, and whenever it is forgotten. And each lookup is given back."""
    mount = new_mount(source=ext4)
    seconds = 60.0 if SOAK else 3.0
    handles: dict[bytes, bytes] = {}
    opened = stale = 0
    random = Random(17)
    with Child(change, [mount.path, ext4], seconds) as child:
        while not child.done():
            with contextlib.suppress(OSError):
                fd = os.open(mount.path / f"file{random.randrange(FILES)}", os.O_RDONLY)
                handles[file_handle(fd)] = os.read(fd, 100)
                os.close(fd)
            if not random.randrange(10):
                remount(random.choice([mount.path, ext4]))
            for handle in random.sample(list(handles), min(8, len(handles))):
                found = outcome(lambda handle=handle: read(mount.path, handle))  # type: ignore[misc]
                if found == "ESTALE":
                    stale += 1
                    del handles[handle]
                else:
                    assert found == handles[handle]
                    opened += 1
        assert child.result() > 100
    assert opened > 100
    assert stale > 20
    forget(mount)


def test_invented_handles_are_stale(ext4: Path, new_mount: Callable[..., Mount]) -> None:
    """The root's inode number, the journal's, unused ones; and such as no inode has."""
    (ext4 / "file").write_bytes(b"x")
    mount = new_mount(source=ext4)
    number, generation = (ext4 / "file").stat().st_ino, generation_of(ext4 / "file")
    assert read(mount.path, fuse_handle(number, generation)) == b"x", "nothing is remembered"
    forget(mount)
    journal, reserved, unused, beyond = 8, 10, 500, 1 << 31
    for nodeid in (
        ext4.stat().st_ino,
        journal,
        reserved,
        unused,
        beyond,
        1 << 32,
        1 << 52,
        -1 % 2**64,
    ):
        for wrong in (0, 1, generation):
            assert is_stale(mount.path, fuse_handle(nodeid, wrong)), (nodeid, wrong)
    for wrong in (0, generation ^ 1, generation ^ 1 << 31):
        assert is_stale(mount.path, fuse_handle(number, wrong))
    forget(mount)


def test_what_a_mount_covers_is_not_reached(ext4: Path, new_mount: Callable[..., Mount]) -> None:
    """While something is mounted in the source nothing forgotten is found; then all is again."""
    (ext4 / "covered").mkdir()
    for name in ("covered/below", "beside"):
        (ext4 / name).write_bytes(b"of the disk")
    mount = new_mount(source=ext4)
    names = ("covered", "covered/below", "beside")
    covered, below, beside = (handle_of(mount.path / name) for name in names)
    forget(mount)
    with mounted("tmpfs", "tmpfs", ext4 / "covered"):
        (ext4 / "covered" / "file").write_bytes(b"of the tmpfs")
        assert [is_stale(mount.path, handle) for handle in (covered, below, beside)] == [True] * 3
        other = handle_of(mount.path / "covered" / "file")
        with open(mount.path / "covered" / "file", "rb"):
            assert read(mount.path, other) == b"of the tmpfs"
        forget(mount)
        assert is_stale(mount.path, other)
        assert (mount.path / "covered" / "file").read_bytes() == b"of the tmpfs"
        assert is_stale(mount.path, other), "it has another generation each time"
        run("umount", "-l", ext4 / "covered")
    forget(mount)
    assert is_stale(mount.path, other)
    assert read(mount.path, below) == read(mount.path, beside) == b"of the disk"
    os.close(open_handle(mount.path, covered, os.O_DIRECTORY))


def test_a_mount_on_the_source_itself_covers_nothing(
    ext4: Path, new_mount: Callable[..., Mount]
) -> None:
    """The daemon has what is below it open, and goes on to show that."""
    (ext4 / "file").write_bytes(b"of the disk")
    mount = new_mount(source=ext4)
    handle = handle_of(mount.path / "file")
    forget(mount)
    with mounted("tmpfs", "tmpfs", ext4):
        assert read(mount.path, handle) == (mount.path / "file").read_bytes() == b"of the disk"


def test_without_mounts_nothing_is_covered(ext4: Path, new_mount: Callable[..., Mount]) -> None:
    (ext4 / "covered").mkdir()
    (ext4 / "covered" / "file").write_bytes(b"of the disk")
    with mounted("tmpfs", "tmpfs", ext4 / "covered"):
        (ext4 / "covered" / "file").write_bytes(b"of the tmpfs")
        mount = new_mount("-o", "xdev", source=ext4)
        handles = [handle_of(mount.path / name) for name in ("covered", "covered/file")]
        forget(mount)
        assert read(mount.path, handles[1]) == b"of the disk"
        fd = open_handle(mount.path, handles[0], os.O_DIRECTORY)
        assert os.listdir(fd) == ["file"]
        os.close(fd)
        mount.end()


def test_an_overlay_on_the_mount_has_lasting_handles_as_well(
    ext4: Path, tmp_path: Path, new_mount: Callable[..., Mount]
) -> None:
    """Which overlayfs makes of the mount's."""
    mount = new_mount(source=ext4)
    for name in ("lower", "upper", "work"):
        (mount.path / name).mkdir()
    for name in ("changed", "same"):
        (mount.path / "lower" / name).write_bytes(b"lower")
    top = mount.path
    options = f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
    with mounted(
        "overlay", "overlay", tmp_path / "over", f"{options},index=on,nfs_export=on"
    ) as over:
        (over / "changed").write_bytes(b"upper")
        handles = [handle_of(over / name) for name in ("changed", "same")]
        # Its own files first, which keep the mount's; it keeps a few for good.
        before = mount.counters().fids
        remount(over)
        remount(mount.path)
        wait_until(lambda: mount.counters().fids < before, "some files forgotten")
        assert [read(over, handle) for handle in handles] == [b"upper", b"lower"]
        mount.log.check()


@pytest.mark.parametrize("how", ["subdirectory", "bind", "xdev", "incapable"])
def test_where_files_are_not_found(
    ext4: Path, tmp_path: Path, new_mount: Callable[..., Mount], how: str
) -> None:
    """A handle would lead out of what is not a whole file system; without a capability, nowhere."""
    source = ext4 / "directory"
    source.mkdir()
    (ext4 / "outside").write_bytes(b"x")
    (source / "file").write_bytes(b"x")
    command: tuple[str, ...] = NINEFUSE
    with contextlib.ExitStack() as stack:
        if how == "bind":
            source = stack.enter_context(mounted("none", source, tmp_path / "bound", "bind"))
        elif how == "incapable":
            without = ("setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search")
            source, command = ext4, (*without, *NINEFUSE)
        options = ("-o", "xdev") if how == "xdev" else ()
        mount = new_mount(*options, source=source, command=command)
        assert errno_of(handle_of, mount.path) == errno.EOPNOTSUPP
        for file in (ext4 / "outside", ext4 / "directory" / "file"):
            handle = fuse_handle(file.stat().st_ino, generation_of(file))
            assert is_stale(mount.path, handle)
        mount.end()


def test_pyfuse3_finds_none(ext4: Path, new_mount: Callable[..., Mount]) -> None:
    """What the kernel knows it opens by itself."""
    mount = new_mount("--session", "pyfuse3", source=ext4)
    (mount.path / "file").write_bytes(b"x")
    handle = handle_of(mount.path / "file")
    assert read(mount.path, handle) == b"x"
    forget(mount)
    assert is_stale(mount.path, handle)
