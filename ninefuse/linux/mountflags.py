"""What mounts in the source forbid: set-id programs and devices; and how ours forbids it, too.

A mount takes over what the mount of its source forbids, as a bind mount does. File systems that
are mounted in the source may forbid more. One FUSE mount cannot forbid it for a part of its tree,
so what is forbidden there is not shown: set-id bits, security.capability, the numbers of devices.

Locks touched: none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from ninefuse.linux.syscalls import Attributes

NOSUID, NODEV, NOEXEC = os.ST_NOSUID, os.ST_NODEV, os.ST_NOEXEC
HIDEABLE = NOSUID | NODEV

# The word that forbids it, and the one that allows it (mount(8)).
_WORDS = {NOSUID: ("nosuid", "suid"), NODEV: ("nodev", "dev"), NOEXEC: ("noexec", "exec")}

# A device that nothing answers to. Major 0 is nobody's; 0:0 would be a whiteout of overlayfs.
_NO_DEVICE = 0, 1


def flags_of(fd: int) -> int:
    """What the mount that an open file was reached by forbids (statvfs(3)). Blocks."""
    return os.fstatvfs(fd).f_flag & (NOSUID | NODEV | NOEXEC)


def words_of(flags: int) -> list[str]:
    """The words of mount(8) that forbid so much."""
    return [words[0] for flag, words in _WORDS.items() if flags & flag]


def taken_over(options: Iterable[str], flags: int) -> tuple[str, ...]:
    """Mount options that forbid what they forbade, and what the flags do."""
    known = [words for flag, words in _WORDS.items() if flags & flag]
    allowing = {word for words in known for word in words}
    kept = [option for option in options if option not in allowing]
    return (*kept, *(forbidding for forbidding, _ in known))


def forbidden_by(options: Iterable[str]) -> int:
    """What a mount with these options forbids: set-ids and devices, unless they are allowed."""
    given = set(options)
    flags = sum(flag for flag in (NOSUID, NODEV) if _WORDS[flag][1] not in given)
    return flags | (NOEXEC if "noexec" in given else 0)


def forbidden_in(words: Iterable[bytes]) -> int:
    """What a mount forbids whose flags are these in the mount table."""
    given = set(words)
    return sum(flag for flag, (forbidding, _) in _WORDS.items() if forbidding.encode() in given)


def shown(a: Attributes, forbidden: int) -> Attributes:
    """A file's attributes without what is forbidden where it lies.

    A set-group-id bit without group execution gives nobody a group; on a directory it says whose
    its files become. Both stay.
    """
    if forbidden & NOSUID and a.kind == stat.S_IFREG:
        hidden = stat.S_ISUID | (stat.S_ISGID if a.mode & stat.S_IXGRP else 0)
        if a.mode & hidden:
            a = a._replace(mode=a.mode & ~hidden)
    if forbidden & NODEV and a.kind in (stat.S_IFBLK, stat.S_IFCHR) and a.rdev:
        a = a._replace(rdev_major=_NO_DEVICE[0], rdev_minor=_NO_DEVICE[1])
    return a
