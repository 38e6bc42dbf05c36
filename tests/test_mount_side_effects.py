"""What a call changes besides what it is for is seen at once, though attributes are believed.

A mount believes attributes for a day (cache=loose). After each call, each field is asked for by
itself, on a tree of its own: the kernel asks for a field that it knows to be old, and gets all
of them anew. So a stat(2), which wants them all, would hide what the others are.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import SOAK, Child, Mount, become, in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes all of these files")

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
CAPABILITY = "security.capability"
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep
RENAME_EXCHANGE = 2
USER = 4711

# The fields of a struct statx: what asks for one (STATX_MODE, …), and where it is.
FIELDS: dict[str, tuple[int, int, str]] = {
    "mode": (0x2, 0x1C, "H"),
    "links": (0x4, 0x10, "I"),
    "owner": (0x8, 0x14, "I"),
    "group": (0x10, 0x18, "I"),
    "access time": (0x20, 0x40, "qI"),
    "modification time": (0x40, 0x70, "qI"),
    "change time": (0x80, 0x60, "qI"),
    "size": (0x200, 0x28, "Q"),
    "blocks": (0x400, 0x30, "Q"),
}
_AT_EMPTY_PATH = 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


def look(fd: int, name: str) -> tuple[int, ...]:
    """One field of an open file, and no other."""
    wanted, offset, layout = FIELDS[name]
    found = ctypes.create_string_buffer(256)
    assert _libc.statx(fd, b"", _AT_EMPTY_PATH, wanted, found) == 0
    value: tuple[int, ...] = struct.unpack_from("=" + layout, found.raw, offset)
    return value


def acl_for(user: int, permissions: int) -> bytes:
    """An access ACL with one more user in it (acl(5), as the kernel has it)."""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, permissions, user), (4, 0, nobody), (16, permissions, nobody)]
    entries.append((32, 0, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# The calls

NAMES = (
    *("d", "d/file", "d/listed", "d/set-id", "d/capable", "d/link", "d/empty"),
    *("e", "e/other", "e/empty"),
)


def fill(tree: Path) -> None:
    """Two directories; a file with a name in each; a file of each other kind."""
    (tree / "d" / "empty").mkdir(parents=True)
    (tree / "e" / "empty").mkdir(parents=True)
    for name in ("file", "listed", "set-id", "capable"):
        (tree / "d" / name).write_bytes(b"data")
    os.setxattr(tree / "d/listed", ACCESS, acl_for(USER, 4))
    os.setxattr(tree / "d/file", "user.old", b"value")
    os.link(tree / "d/file", tree / "e/other")
    (tree / "d/set-id").chmod(0o6777)
    os.setxattr(tree / "d/capable", CAPABILITY, NET_RAW)
    (tree / "d/link").symlink_to("file")
    for name in NAMES:  # long ago, so that whatever moves a time moves it by much
        os.utime(tree / name, (10, 10), follow_symlinks=False)
    tree.chmod(0o777)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def write(path: Path, flags: int = 0, data: bytes = b"x") -> None:
    with opened(path, os.O_WRONLY | flags) as fd:
        os.write(fd, data)


def write_and_sync(path: Path) -> None:
    with opened(path, os.O_WRONLY) as fd:
        os.write(fd, b"x" * 10_000)
        os.fsync(fd)


def append_to_open(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        os.write(fd, b"x")


def write_direct(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, mmap.PAGESIZE) as page:
        os.writev(fd, [page])


def write_mapped(path: Path) -> None:
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 4) as memory:
        memory[0:1] = b"x"


def read(path: Path, flags: int = os.O_RDONLY) -> None:
    with opened(path, flags) as fd:
        os.read(fd, 4096)


def fchmod(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd:
        os.fchmod(fd, 0o604)


def truncate_at_open(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_TRUNC):
        pass


def exchange(one: Path, other: Path) -> None:
    assert _libc.renameat2(-100, bytes(one), -100, bytes(other), RENAME_EXCHANGE) == 0


Deed = Callable[[Path], object]

CALLS: dict[str, Deed] = {
    "an ACL set": lambda t: os.setxattr(t / "d/file", ACCESS, acl_for(USER, 6)),
    "an ACL set by another name": lambda t: os.setxattr(t / "e/other", ACCESS, acl_for(USER, 7)),
    "an ACL changed": lambda t: os.setxattr(t / "d/listed", ACCESS, acl_for(USER, 7)),
    "an ACL removed": lambda t: os.removexattr(t / "d/listed", ACCESS),
    "an ACL of a directory": lambda t: os.setxattr(t / "d", ACCESS, acl_for(USER, 6)),
    "a default ACL": lambda t: os.setxattr(t / "d", DEFAULT, acl_for(USER, 4)),
    "setxattr": lambda t: os.setxattr(t / "d/file", "user.new", b"value"),
    "removexattr": lambda t: os.removexattr(t / "d/file", "user.old"),
    "a capability": lambda t: os.setxattr(t / "d/file", CAPABILITY, NET_RAW),
    "chmod": lambda t: (t / "d/file").chmod(0o604),
    "chmod with an ACL": lambda t: (t / "d/listed").chmod(0o604),
    "fchmod": lambda t: fchmod(t / "e/other"),
    "chown": lambda t: os.chown(t / "d/file", 5, 6),
    "chown takes bits": lambda t: os.chown(t / "d/set-id", 5, 6),
    "utime": lambda t: os.utime(t / "d/file", (5, 5)),
    "truncate": lambda t: os.truncate(t / "d/file", 1),
    "truncate takes bits": lambda t: os.truncate(t / "d/set-id", 1),
    "O_TRUNC": lambda t: truncate_at_open(t / "e/other"),
    "O_TRUNC takes bits": lambda t: truncate_at_open(t / "d/set-id"),
    "write": lambda t: write(t / "d/file"),
    "write by another name": lambda t: write(t / "e/other", data=b"x" * 100_000),
    "append": lambda t: write(t / "d/file", os.O_APPEND),
    "write takes bits": lambda t: write(t / "d/set-id"),
    "append takes bits": lambda t: append_to_open(t / "d/set-id"),
    "a synchronous write takes bits": lambda t: write(t / "d/set-id", os.O_SYNC),
    "a direct write takes bits": lambda t: write_direct(t / "d/set-id"),
    "a mapped write": lambda t: write_mapped(t / "d/file"),
    "a mapped write takes bits": lambda t: write_mapped(t / "d/set-id"),
    "write takes a capability": lambda t: write(t / "d/capable"),
    "a synchronous write takes a capability": lambda t: write(t / "d/capable", os.O_SYNC),
    "fsync": lambda t: write_and_sync(t / "d/file"),
    "read": lambda t: read(t / "d/file"),
    "a direct read": lambda t: read(t / "d/file", os.O_RDONLY | os.O_DIRECT),
    "a read past the cache": lambda t: read(t / "d/file", os.O_RDWR | os.O_SYNC),
    "readdir": lambda t: os.listdir(t / "d"),
    "readlink": lambda t: os.readlink(t / "d/link"),
    "link": lambda t: os.link(t / "d/file", t / "e/new"),
    "link by another name": lambda t: os.link(t / "e/other", t / "e/new"),
    "unlink": lambda t: (t / "d/file").unlink(),
    "unlink of another name": lambda t: (t / "e/other").unlink(),
    "unlink of the last name": lambda t: (t / "d/listed").unlink(),
    "rename": lambda t: (t / "d/file").rename(t / "e/new"),
    "rename over a file": lambda t: (t / "d/listed").rename(t / "d/file"),
    "rename over another name": lambda t: (t / "d/listed").rename(t / "e/other"),
    "rename of a directory": lambda t: (t / "d/empty").rename(t / "e/new"),
    "exchange": lambda t: exchange(t / "d/file", t / "d/listed"),
    "exchange with a directory": lambda t: exchange(t / "d/file", t / "e/empty"),
    "create": lambda t: (t / "d/new").touch(),
    "mkdir": lambda t: (t / "d/new").mkdir(),
    "mknod": lambda t: os.mkfifo(t / "d/new"),
    "symlink": lambda t: (t / "d/new").symlink_to("target"),
}
# The size of a directory that is gone is another on the source; nobody can reach it.
CALLS_THAT_REMOVE_DIRECTORIES: dict[str, Deed] = {
    "rmdir": lambda t: (t / "d/empty").rmdir(),
    "rename over a directory": lambda t: (t / "d/empty").rename(t / "e/empty"),
}


def differences(mount: Mount, deed: Deed, gone: bool) -> list[str]:
    """The fields of which the mount says else than the source, right after a call."""
    found = []
    for field in FIELDS:
        tree = f"tree{next(_numbers)}"
        fill(mount.source / tree)
        with contextlib.ExitStack() as stack:
            files = {}
            for name in NAMES:
                if gone and name.endswith("/empty"):
                    continue
                files[name] = [
                    stack.enter_context(opened(top / tree / name, os.O_PATH | os.O_NOFOLLOW))
                    for top in (mount.path, mount.source)
                ]
                os.stat(files[name][0])
            deed(mount.path / tree)
            for name, (ours, theirs) in files.items():
                if (shown := look(ours, field)) != (real := look(theirs, field)):
                    found.append(f"{field} of {name}: {shown}, not {real}")
    return found


_numbers = itertools.count()


# To the kernel `acl` is what allow_other brings with it.
OPTIONS = ("cache=loose", "cache=loose,allow_other", "cache=loose,acl")


@pytest.mark.soak
@pytest.mark.parametrize("options", OPTIONS if SOAK else OPTIONS[:2])
def test_what_calls_change_besides_is_seen_at_once(
    new_mount: Callable[..., Mount], options: str
) -> None:
    mount = new_mount("-o", options)
    gone = CALLS_THAT_REMOVE_DIRECTORIES
    stale = {
        what: found
        for what, deed in {**CALLS, **gone}.items()
        if (found := differences(mount, deed, what in gone))
    }
    assert not stale


@pytest.mark.parametrize("model", ["none", "first"])
def test_so_it_is_under_each_model(new_mount: Callable[..., Mount], model: str) -> None:
    mount = new_mount("-o", "cache=loose", "--model", model)
    for what in ("an ACL set by another name", "append takes bits", "a mapped write takes bits"):
        assert not differences(mount, CALLS[what], gone=False), what


@pytest.mark.parametrize("flags", [0, os.O_SYNC, os.O_APPEND])
def test_so_it_is_with_other_users_writes(new_mount: Callable[..., Mount], flags: int) -> None:
    mount = new_mount("-o", "cache=loose,allow_other")
    fill(mount.source / "tree")
    file = mount.path / "tree/d/set-id"
    assert file.stat().st_mode == stat.S_IFREG | 0o6777

    def write_as_user() -> None:
        with opened(file, os.O_RDWR | flags) as fd:
            become(USER)
            os.write(fd, b"x")

    in_child(write_as_user)
    with opened(file, os.O_PATH) as fd:
        assert look(fd, "mode") == (stat.S_IFREG | 0o777,)


def test_an_answer_from_before_is_not_believed_after(new_mount: Callable[..., Mount]) -> None:
    """Some look at a file all the time, so that answers come while it changes."""
    mount = new_mount("-o", "cache=loose")
    (mount.source / "file").touch()

    def go_on_looking() -> None:
        while True:
            (mount.path / "file").stat()

    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(Child(go_on_looking))
        until = time.monotonic() + 4
        while time.monotonic() < until:
            for value in (b"1", b"2", b"3", b"4"):
                os.setxattr(mount.path / "file", "user.name", value)
            time.sleep(0.002)  # so that all of the answers have come
            expected = (mount.source / "file").stat().st_ctime_ns
            assert (mount.path / "file").stat().st_ctime_ns == expected
