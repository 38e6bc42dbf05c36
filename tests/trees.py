"""A tree that has one of everything, and what a copy must have of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from apart import AS_ROOT, NOBODY
from mounting import errno_of


def has_user_attributes(directory: Path) -> bool:
    return not errno_of(os.setxattr, directory, "user.probe", b"x")


class Facts(NamedTuple):
    """What a copy must have of a file, besides its place."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    rdev: int
    links: int
    data: bytes
    attributes: tuple[tuple[str, bytes], ...]


def facts(path: Path) -> Facts:
    s = path.lstat()
    data = b""
    if stat.S_ISREG(s.st_mode):
        data = path.read_bytes()
    elif stat.S_ISLNK(s.st_mode):
        data = os.readlink(bytes(path))
    is_directory = stat.S_ISDIR(s.st_mode)
    names = [n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("user.")]
    return Facts(
        s.st_mode,
        s.st_uid,
        s.st_gid,
        0 if is_directory else s.st_size,  # a directory's is the file system's own affair
        s.st_mtime_ns,
        s.st_rdev,
        0 if is_directory else s.st_nlink,
        data,
        tuple((n, os.getxattr(path, n, follow_symlinks=False)) for n in sorted(names)),
    )


def tree(top: Path) -> dict[str, Facts]:
    found = {".": facts(top)}
    for path in sorted(top.rglob("*")):
        found[str(path.relative_to(top))] = facts(path)
    return found


def plant(top: Path) -> None:
    """Make a tree that has one of everything."""
    top.mkdir()
    for n in range(3):
        below = top / f"directory {n}" / "deeper" / "ünïcode"
        below.mkdir(parents=True)
        for m in range(8):
            file = below / f"file{m}"
            file.write_bytes(os.urandom(m * m * 1000 + m))
            file.chmod(0o600 + m)
            os.utime(file, ns=(10**18 + m, 10**18 + 123_456_789 + n * m))
        (below / "link").symlink_to("../file0")
        os.link(below / "file1", top / f"hard{n}")
    (top / "empty").mkdir(mode=0o700)
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o1777)
    (top / "script").write_bytes(b"#!/bin/sh\nexit 7\n")
    (top / "script").chmod(0o4755)
    with open(top / "holes", "wb") as holes:
        holes.seek(1 << 20)
        holes.write(b"end")
    os.mkfifo(top / "fifo", 0o640)
    os.utime(top / "fifo", ns=(5, 6))
    os.utime(top / "directory 0/deeper/ünïcode/link", ns=(7, 8), follow_symlinks=False)
    if has_user_attributes(top):
        os.setxattr(top / "script", "user.one", b"1")
        os.setxattr(top / "empty", "user.empty", b"")
        os.removexattr(top, "user.probe")
    if AS_ROOT:
        os.mknod(top / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.chown(top / "holes", 1234, 5678)
        os.chown(top / "empty", NOBODY, NOBODY)
    os.utime(top / "directory 1", ns=(10**18, 10**18 + 1))
    os.utime(top, ns=(10**18, 10**18 + 2))
