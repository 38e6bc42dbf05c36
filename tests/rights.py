"""ACLs, and whose everything in a tree is."""

from __future__ import annotations

import os
import struct
from pathlib import Path

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL of (tag, permissions, id), as the kernel has it (acl(5))."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def acl_for(user: int, permissions: int) -> bytes:
    """One that lets a user in and nobody else but the owner."""
    nobody = 0xFFFFFFFF
    return acl(
        (1, 6, nobody), (2, permissions, user), (4, 0, nobody), (16, 7, nobody), (32, 0, nobody)
    )


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    """What is there, and whose."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        a = path.lstat()
        labels = {} if path.is_symlink() else {x: os.getxattr(path, x) for x in os.listxattr(path)}
        found[str(path.relative_to(top))] = (a.st_mode, a.st_uid, a.st_gid, a.st_nlink, labels)
    return found
