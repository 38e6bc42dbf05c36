"""Names, directories and links, through real mounts under each of the threading models."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import SOAK, Child, Mount, Place, errno_of, in_child, run
from ops_helpers import read_entries
from streams import directory

from ninefuse.linux.filesystems import file_system_of

pytestmark = pytest.mark.soak

_libc = ctypes.CDLL(None, use_errno=True)

_AT_FDCWD = -100
NOREPLACE = 1
EXCHANGE = 2


def renameat2(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(_AT_FDCWD, bytes(old), _AT_FDCWD, bytes(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# Renaming


def test_a_directory_is_renamed_with_open_files_below_it(place: Place) -> None:
    deep = place.path / "a/b/c"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"before")
    (deep / "seen").write_bytes(b"seen")
    fd = os.open(deep / "file", os.O_RDWR)
    below = os.open(deep, os.O_RDONLY | os.O_DIRECTORY)
    middle = os.open(place.path / "a/b", os.O_RDONLY | os.O_DIRECTORY)
    (place.path / "x").mkdir()
    (place.path / "a").rename(place.path / "x/z")

    moved = place.source / "x/z/b/c"
    os.write(fd, b"after!")
    os.pwrite(fd, b" and on", 6)
    os.fchmod(fd, 0o600)
    assert os.fstat(fd).st_ino == (moved / "file").stat().st_ino
    assert (moved / "file").read_bytes() == b"after! and on"
    assert sorted(os.listdir(below)) == ["file", "seen"]
    os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=below))
    assert (moved / "new").exists()
    os.mkdir("made", dir_fd=middle)
    os.rename("c", "d", src_dir_fd=middle, dst_dir_fd=middle)
    assert os.pread(fd, 5, 0) == b"after"
    assert (place.path / "x/z/b/d/seen").read_bytes() == b"seen"
    assert not (place.path / "a").exists()
    assert sorted(os.listdir(place.source / "x/z/b")) == ["d", "made"]
    os.unlink("file", dir_fd=below)
    assert os.pread(fd, 5, 0) == b"after"
    for opened in (fd, below, middle):
        os.close(opened)


def test_a_working_directory_may_be_renamed(place: Place) -> None:
    (place.path / "from/below").mkdir(parents=True)

    def work() -> str:
        os.chdir(place.path / "from/below")
        os.rename(place.path / "from", place.path / "to")
        Path("file").write_bytes(b"x")
        return os.getcwd()

    assert in_child(work) == str(place.path / "to/below")
    assert (place.source / "to/below/file").read_bytes() == b"x"


def test_renames_of_one_directory_by_many_processes_leave_it_whole(place: Place) -> None:
    names = [f"dir{n}" for n in range(4)]
    (place.path / names[0]).mkdir()
    (place.path / names[0] / "file").write_bytes(b"here")

    def rename(who: int) -> int:
        done = 0
        for n in range(100):
            old, new = names[(who + n) % 4], names[(who * 3 + n * 7 + 1) % 4]
            code = errno_of(os.rename, place.path / old, place.path / new)
            assert code in (0, errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST), os.strerror(code)
            done += not code
            code = errno_of(os.stat, place.path / new / "file")
            assert code in (0, errno.ENOENT), os.strerror(code)
        return done

    assert sum(child.result() for child in [Child(rename, who) for who in range(4)]) > 0
    (left,) = os.listdir(place.source)
    assert (place.source / left / "file").read_bytes() == b"here"
    assert os.listdir(place.path) == [left]


def test_rename_noreplace_replaces_nothing(place: Place) -> None:
    (place.path / "one").write_bytes(b"1")
    (place.path / "two").write_bytes(b"2")
    assert errno_of(renameat2, place.path / "one", place.path / "two", NOREPLACE) == errno.EEXIST
    renameat2(place.path / "one", place.path / "three", NOREPLACE)
    assert (place.source / "two").read_bytes() == b"2"
    assert (place.source / "three").read_bytes() == b"1"
    assert sorted(os.listdir(place.path)) == ["three", "two"]
    # Nor what has come to the source since the name was last looked up.
    assert not (place.path / "late").exists()
    (place.source / "late").write_bytes(b"late")
    assert errno_of(renameat2, place.path / "three", place.path / "late", NOREPLACE)
    assert (place.source / "late").read_bytes() == b"late"


def test_rename_exchange_swaps_a_file_and_a_directory(place: Place) -> None:
    (place.path / "one").write_bytes(b"1")
    (place.path / "two/below").mkdir(parents=True)
    with open(place.path / "one", "rb") as file:
        renameat2(place.path / "one", place.path / "two", EXCHANGE)
        assert (place.path / "two").read_bytes() == b"1"
        assert os.listdir(place.path / "one") == ["below"]
        (place.path / "one/below/file").write_bytes(b"x")
        assert (place.source / "one/below/file").read_bytes() == b"x"
        assert file.read() == b"1"
    missing = place.path / "missing"
    assert errno_of(renameat2, place.path / "one", missing, EXCHANGE) == errno.ENOENT


# Listing


@pytest.fixture
def crowd(place: Place) -> list[str]:
    """Many names in the directory, ten for each file; made in the source, which is quicker."""
    count = 100_000 if SOAK else 10_000 if place.mount.model == "second" else 2_000
    names = [f"name-{n:05}" for n in range(count)]
    for n, name in enumerate(names):
        if n % 10 == 0:
            os.close(os.open(place.source / name, os.O_CREAT | os.O_WRONLY, 0o600))
        else:
            os.link(place.source / names[n - n % 10], place.source / name)
    return names


def test_all_entries_are_listed_once_while_others_come_and_go(
    place: Place, crowd: list[str]
) -> None:
    def come_and_go(who: int) -> None:
        for n in range(1_000_000):
            path = place.path / f"guest-{who}-{n}"
            path.touch()
            if n >= 20:
                (place.path / f"guest-{who}-{n - 20}").unlink()

    with Child(come_and_go, 1), Child(come_and_go, 2):
        for _ in range(3):
            names = os.listdir(place.path)
            assert len(names) == len(set(names)), "a name came twice"
            assert sorted(name for name in names if name.startswith("name")) == crowd
    with directory(place.path) as stream:
        names = [os.fsdecode(name) for name in stream.rest()]
    assert {".", ".."} < set(names)
    assert sorted(name for name in names if name.startswith("name")) == crowd


def test_telldir_and_seekdir_return_to_a_place(place: Place, crowd: list[str]) -> None:
    with directory(place.path) as stream:
        places = []
        names = []
        while (name := stream.read()) is not None:
            names.append(name)
            places.append(stream.tell())
        assert len(set(names)) == len(names) == len(crowd) + 2
        for at in (len(crowd) - 100, 5, 1_711, 1_710, 0, len(crowd) - 1):
            stream.seek(places[at])
            assert [stream.read() for _ in range(3)] == (names + [None])[at + 1 : at + 4]
        stream.seek(places[17])
        assert stream.tell() == places[17]


def test_places_in_a_directory_fit_the_offsets_of_32_bit_programs(
    place: Place, crowd: list[str]
) -> None:
    """The source's own may not fit: ext4 has others for such programs, but we are none."""
    fd = os.open(place.source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        large = [entry for entry in read_entries(fd, 1 << 16) if entry.offset >= 1 << 31]
        if large and not file_system_of(fd).orders_by_hash:
            pytest.skip("nor do the source's own, whoever asks")
    finally:
        os.close(fd)
    with directory(place.path) as stream:
        places = [stream.tell() for _ in iter(stream.read, None)]
    assert len(set(places)) == len(places) == len(crowd) + 2
    assert max(places) < 1 << 31


LISTING = r"""
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    struct dirent *entry;
    struct stat status;
    long half = 0;
    int found = 0, rest = 0;
    DIR *stream = opendir(".");
    for (errno = 0; stream && (entry = readdir(stream)); errno = 0) {
        if (++found == 1500)
            half = telldir(stream);
        if (lstat(entry->d_name, &status))
            break;
    }
    if (errno)
        perror("readdir");
    seekdir(stream, half);
    while (readdir(stream))
        rest++;
    printf("%d %d\n", found, rest);
    return errno;
}
"""


@pytest.fixture(scope="module")
def listing_32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of 32 bits, without support for large files, that lists where it stands."""
    base = tmp_path_factory.mktemp("32")
    (base / "list.c").write_text(LISTING)
    program = base / "list"
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    done = run(compiler, "-m32", "-static", "-w", "-o", program, base / "list.c")
    if done.returncode or run(program).returncode:
        pytest.skip("no program of 32 bits can be made, or run, here")
    return program


def test_a_32_bit_program_lists_a_directory(
    place: Place, crowd: list[str], listing_32: Path
) -> None:
    for path in (place.source, place.path):
        done = run("sh", "-c", 'cd "$1" && exec "$2"', "sh", path, listing_32)
        assert (done.stdout, done.stderr, done.returncode) == (
            f"{len(crowd) + 2} {len(crowd) + 2 - 1500}\n",
            "",
            0,
        ), path


def test_rewinddir_shows_what_has_come_since(place: Place) -> None:
    for n in range(100):
        (place.path / f"old{n}").touch()
    with directory(place.path) as stream:
        assert len(stream.rest()) == 102
        (place.path / "new").touch()
        (place.path / "old5").unlink()
        stream.rewind()
        names = stream.rest()
    assert b"new" in names
    assert b"old5" not in names
    assert len(names) == len(set(names)) == 102


def test_a_directory_removed_entry_by_entry_while_it_is_listed(place: Place) -> None:
    for n in range(1500):
        (place.source / f"file{n}").touch()
    removed = 0
    with directory(place.path) as stream:
        while (name := stream.read()) is not None:
            if name not in (b".", b".."):
                (place.path / os.fsdecode(name)).unlink()
                removed += 1
    assert removed == 1500
    place.path.rmdir()
    place.source.mkdir()


def test_scandir_gives_types_and_numbers(place: Place) -> None:
    (place.path / "directory").mkdir()
    (place.path / "file").touch()
    (place.path / "link").symlink_to("file")
    os.mkfifo(place.path / "fifo")
    with os.scandir(place.path) as entries:
        found = {
            e.name: (e.is_dir(follow_symlinks=False), e.is_symlink(), e.inode()) for e in entries
        }
    source = {name: (place.source / name).lstat() for name in os.listdir(place.source)}
    assert found == {
        name: (stat.S_ISDIR(s.st_mode), stat.S_ISLNK(s.st_mode), s.st_ino)
        for name, s in source.items()
    }


def test_an_open_directory_goes_on_after_it_was_removed(place: Place) -> None:
    (place.path / "directory").mkdir()
    fd = os.open(place.path / "directory", os.O_RDONLY | os.O_DIRECTORY)
    (place.path / "directory").rmdir()
    assert os.listdir(fd) == []
    assert os.fstat(fd).st_nlink == 0
    assert errno_of(os.mkdir, "x", dir_fd=fd) == errno.ENOENT
    os.close(fd)


# Numbers and links


def test_inode_numbers_are_those_of_the_source(place: Place) -> None:
    (place.path / "a/b").mkdir(parents=True)
    (place.path / "a/file").touch()
    (place.path / "a/link").symlink_to("nowhere")
    (place.source / "a/other").touch()
    for name in ("", "a", "a/b", "a/file", "a/link", "a/other", ".."):
        assert (place.path / name).lstat().st_ino == (place.source / name).lstat().st_ino
    root = place.mount.path
    assert root.stat().st_ino == place.mount.source.stat().st_ino
    with os.scandir(place.path / "a") as entries:
        assert {e.name: e.inode() for e in entries} == {
            name: (place.source / "a" / name).lstat().st_ino
            for name in os.listdir(place.source / "a")
        }


def test_hard_links_are_one_file(place: Place) -> None:
    one, two = place.path / "one", place.path / "two"
    one.write_bytes(b"1")
    assert one.stat().st_nlink == 1
    os.link(one, two)
    (place.path / "directory").mkdir()
    os.link(two, place.path / "directory/three")
    two.write_bytes(b"2")
    assert one.read_bytes() == b"2"
    stats = [(place.path / n).stat() for n in ("one", "two", "directory/three")]
    assert len({(s.st_ino, s.st_nlink, s.st_dev) for s in stats}) == 1
    assert stats[0].st_nlink == 3
    assert stats[0].st_ino == (place.source / "one").stat().st_ino
    two.unlink()
    assert one.stat().st_nlink == 2
    assert (place.source / "directory/three").read_bytes() == b"2"


def test_links_made_in_the_source_show_one_number(place: Place) -> None:
    (place.source / "one").write_bytes(b"1")
    os.link(place.source / "one", place.source / "two")
    assert (place.path / "one").stat().st_ino == (place.path / "two").stat().st_ino
    (place.path / "one").unlink()
    assert (place.path / "two").read_bytes() == b"1"
    assert (place.path / "two").stat().st_nlink == 1


def test_a_symlink_itself_can_be_linked(place: Place) -> None:
    (place.path / "link").symlink_to("nowhere")
    os.link(place.path / "link", place.path / "again", follow_symlinks=False)
    assert os.readlink(place.source / "again") == "nowhere"
    assert (place.path / "link").lstat().st_nlink == 2


def test_symlinks_dangling_relative_absolute_and_looping(place: Place, tmp_path: Path) -> None:
    (place.path / "target").write_bytes(b"inside")
    (tmp_path / "target").write_bytes(b"outside")
    targets = {
        "relative": "target",
        "up": f"../{place.path.name}/target",
        "absolute": str(tmp_path / "target"),
        "dangling": "no/such/file",
        "loop": "loop2",
        "loop2": "loop",
        "self": "self",
        "long": "x" * 4095,
    }
    for name, target in targets.items():
        (place.path / name).symlink_to(target)
    for name, target in targets.items():
        assert os.readlink(place.path / name) == os.readlink(place.source / name) == target
        assert (place.path / name).lstat().st_size == len(target)
    assert (place.path / "relative").read_bytes() == b"inside"
    assert (place.path / "up").read_bytes() == b"inside"
    assert (place.path / "absolute").read_bytes() == b"outside"
    assert errno_of(os.stat, place.path / "dangling") == errno.ENOENT
    assert errno_of(os.stat, place.path / "loop") == errno.ELOOP
    assert errno_of(os.stat, place.path / "self") == errno.ELOOP
    (place.path / "no/such").mkdir(parents=True)
    (place.path / "dangling").write_bytes(b"through the link")
    assert (place.source / "no/such/file").read_bytes() == b"through the link"


def test_a_symlink_that_leads_out_of_the_source_means_the_client_s_own_files(
    place: Place, tmp_path: Path
) -> None:
    # The client follows it; the daemon, which sees names only one by one, never does.
    (place.source / "out").symlink_to("../../../../../../../../../../../../etc")
    assert (place.path / "out").samefile("/etc")
    assert errno_of(os.unlink, place.path / "out") == 0
    (place.source / "tmp").symlink_to(tmp_path)
    (place.path / "tmp/made").touch()
    assert (tmp_path / "made").exists()


# Special files


def test_a_fifo_joins_two_processes(place: Place) -> None:
    path = place.path / "fifo"
    os.mkfifo(path, 0o600)
    assert stat.S_ISFIFO((place.source / "fifo").lstat().st_mode)

    def write() -> None:
        with open(path, "wb") as fifo:
            fifo.write(b"through " * 10_000)

    with Child(write) as writer, Child(path.read_bytes) as reader:
        assert reader.result() == b"through " * 10_000
        writer.result()


def test_a_socket_joins_two_processes(place: Place) -> None:
    def serve() -> bytes:
        os.chdir(place.path)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            server.listen()
            connection, _ = server.accept()
            with connection:
                return connection.recv(100)

    def call() -> None:
        os.chdir(place.path)
        with socket.socket(socket.AF_UNIX) as client:
            for _ in range(1000):
                if not errno_of(client.connect, "socket"):
                    break
                time.sleep(0.01)
            client.sendall(b"hello")

    with Child(serve) as server, Child(call) as client:
        client.result()
        assert server.result() == b"hello"
    assert stat.S_ISSOCK((place.source / "socket").lstat().st_mode)
    (place.path / "socket").unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes a device node")
def test_a_device_node_is_kept_and_not_opened(place: Place) -> None:
    device = os.makedev(1, 3)
    os.mknod(place.path / "null", stat.S_IFCHR | 0o666, device)
    os.mknod(place.path / "block", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
    for name, kind, number in (
        ("null", stat.S_ISCHR, device),
        ("block", stat.S_ISBLK, os.makedev(259, 70_000)),
    ):
        for top in (place.path, place.source):
            found = (top / name).lstat()
            assert kind(found.st_mode)
            assert found.st_rdev == number
    assert errno_of(os.open, place.path / "null", os.O_RDWR) == errno.EACCES


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes and opens a device node")
def test_a_device_node_works_with_the_option_dev(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "dev")
    os.mknod(mount.path / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    with open(mount.path / "zero", "rb") as zero:
        assert zero.read(100) == b"\0" * 100


# Names


@pytest.mark.parametrize(
    "name",
    [
        b"x" * 255,
        "ü".encode() * 127,
        b"\xff\xfe not UTF-8 \x80",
        b"new\nline",
        b" ",
        b"-rf",
        b"back\\slash",
        b"\x01\x7f\x1b[31m",
        b"...",
        b"fuse_stacktrace",
    ],
)
def test_names_of_any_bytes(place: Place, name: bytes) -> None:
    path, source = bytes(place.path), bytes(place.source)
    os.mkdir(os.path.join(path, name))
    os.close(os.open(os.path.join(path, name, name), os.O_CREAT | os.O_WRONLY, 0o600))
    os.symlink(name, os.path.join(path, name, b"link"))
    assert os.listdir(source) == os.listdir(path) == [name]
    assert sorted(os.listdir(os.path.join(path, name))) == sorted([name, b"link"])
    assert os.readlink(os.path.join(source, name, b"link")) == name
    os.rename(os.path.join(path, name, name), os.path.join(path, b"moved"))
    os.rename(os.path.join(path, b"moved"), os.path.join(path, name, name))
    assert stat.S_ISREG(os.stat(os.path.join(source, name, b"link")).st_mode)
    os.unlink(os.path.join(path, name, name))
    os.unlink(os.path.join(path, name, b"link"))
    os.rmdir(os.path.join(path, name))
    assert os.listdir(source) == []


def test_a_name_of_256_bytes_is_too_long(place: Place) -> None:
    name = place.path / ("x" * 256)
    assert errno_of(name.touch) == errno.ENAMETOOLONG
    assert errno_of(name.mkdir) == errno.ENAMETOOLONG
    assert errno_of(name.stat) == errno.ENAMETOOLONG
    (place.path / "file").touch()
    assert errno_of(os.rename, place.path / "file", name) == errno.ENAMETOOLONG


def test_a_path_may_be_deeper_than_one_call_can_name(place: Place) -> None:
    def go_down() -> None:
        os.chdir(place.path)
        for _ in range(60):
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
        Path("file").write_bytes(b"deep")
        assert Path("file").read_bytes() == b"deep"
        for _ in range(60):
            os.chdir("..")
        assert os.stat(".").st_ino == place.source.stat().st_ino

    in_child(go_down)


def test_errors_are_those_of_the_source(place: Place) -> None:
    """The same calls in two directories: one on the mount, one of the source file system."""
    other = place.mount.source / (place.path.name + "-other")
    other.mkdir()

    def outcomes(base: Path) -> list[int]:
        (base / "empty").mkdir()
        (base / "full/below").mkdir(parents=True)
        (base / "file").write_bytes(b"x")
        (base / "link").symlink_to("file")
        return [
            errno_of(os.rmdir, base / "full"),
            errno_of(os.rmdir, base / "file"),
            errno_of(os.rmdir, base / "missing"),
            errno_of(os.rmdir, base / "empty/."),
            errno_of(os.unlink, base / "empty"),
            errno_of(os.unlink, base / "missing"),
            errno_of(os.unlink, base / "file/below"),
            errno_of(os.mkdir, base / "file"),
            errno_of(os.mkdir, base / "link"),
            errno_of(os.mkdir, base / "missing/below"),
            errno_of(os.mkdir, base / "."),
            errno_of(os.rename, base / "missing", base / "new"),
            errno_of(os.rename, base / "file", base / "empty"),
            errno_of(os.rename, base / "empty", base / "file"),
            errno_of(os.rename, base / "empty", base / "full"),
            errno_of(os.rename, base / "full", base / "full/below/x"),
            errno_of(os.rename, base / "full/below", base / "empty"),
            errno_of(os.link, base / "file", base / "link"),
            errno_of(os.link, base / "empty", base / "new"),
            errno_of(os.link, base / "missing", base / "new"),
            errno_of(os.symlink, "x", base / "file"),
            errno_of(os.symlink, "", base / "new"),
            errno_of(os.readlink, base / "file"),
            errno_of(os.listdir, base / "file"),
            errno_of(os.open, base / "empty", os.O_WRONLY),
            errno_of(os.open, base / "empty", os.O_RDWR | os.O_CREAT),
            errno_of(os.open, base / "link", os.O_RDONLY | os.O_NOFOLLOW),
            errno_of(os.open, base / "file", os.O_RDONLY | os.O_DIRECTORY),
            errno_of(os.open, base / "link", os.O_CREAT | os.O_EXCL),
            errno_of(os.truncate, base / "empty", 0),
            errno_of(os.truncate, base / "file", -1),
            errno_of(os.truncate, base / "file", 1 << 62),
            errno_of(os.chmod, base / "missing", 0),
            errno_of(os.mkfifo, base / "file"),
            errno_of(os.statvfs, base / "missing"),
            errno_of(os.getxattr, base / "file", "user.missing"),
        ]

    assert outcomes(place.path) == outcomes(other)
