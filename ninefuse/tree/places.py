"""The mounts of a source and in it: what each forbids, and which show the same files.

A bind mount shows a directory at a second place. The kernel keeps one place of a directory,
which is where its ``..`` leads: so at a second place a directory is another one, with a number
of its own. It follows the place where the mount is, since mounts are numbered anew each time.
Files have any number of names; at a second place they are the same, with the same number, as
long as the mounts allow the same. Else (one is read-only, say, or has other owners) the files
of the second are others, too.

The *first* of several mounts of a file system that have a directory in common is the source's
own; else the one that shows most, or whose place comes first in order. But one that was taken
for the first stays it for as long as it is there.

Locks touched: a mutex of its own, held while the mount table is read, with no other lock inside.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

from ninefuse.linux import mountflags
from ninefuse.linux.mountinfo import MountLine, MountTable

_MANY = 1000  # mounts, of which those that have gone are worth looking for
_TIMES = frozenset((b"relatime", b"noatime", b"nodiratime", b"strictatime"))


class Mount:
    """A mount of the source, or in it.

    Attributes:
        number: as statx(2) has it; 0: the kernel does not say.
        forbids: what it forbids now (mountflags.py).
        directories, files: 0, or what tells those that it shows from the same ones at the first
            mount of them.
    """

    __slots__ = ("directories", "files", "forbids", "line", "number", "version")

    def __init__(self, number: int, forbids: int) -> None:
        self.number = number
        self.forbids = forbids
        self.directories = 0
        self.files = 0
        self.line: MountLine | None = None
        self.version = -1  # of the mount table that this was found out by


def hashed(identity: bytes) -> int:
    """64 bits that stand for something, always the same."""
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big")


UNKNOWN = Mount(0, mountflags.HIDEABLE)


class Mounts:
    """The mounts that were met below one source directory.

    Attributes:
        own: the number of the source's own; 0: the kernel does not say.
    """

    def __init__(self) -> None:
        self.own = 0
        self._source = self._prefix = b"/"  # its path, and what is before a path below it
        self._known: dict[int, Mount] = {}
        self._lock = threading.Lock()
        self._table: MountTable | None = None
        self._is_listed = False  # not so a copy that nobody else can mount anything on

    def begin(self, source: bytes, number: int) -> None:
        """The source directory's path is this, and its mount's number."""
        with self._lock:
            self._source, self.own = source, number
            self._prefix = source.rstrip(b"/") + b"/"
            if self._table is None:
                self._table = MountTable()
            self._is_listed = number in self._table.lines()

    def end(self) -> None:
        """No more is to be learned."""
        with self._lock:
            if self._table is not None:
                self._table.close()
                self._table, self._known = None, {}

    def get(self, number: int) -> Mount:
        """A mount by its number; one that was not `learn`-ed forbids all."""
        return self._known.get(number, UNKNOWN)

    def met(self) -> list[bytes]:
        """Where in the source the other mounts are that were met here: paths below it."""
        with self._lock:
            table = self._table.lines() if self._table is not None else {}
            lines = [table[number] for number in self._known if number in table]
        below = self._prefix
        return [line.point.removeprefix(below) for line in lines if line.point.startswith(below)]

    def cover_own(self) -> bool:
        """Whether something may be mounted on a file or directory of the source's own mount."""
        with self._lock:
            table = self._table.lines() if self._table is not None else {}
        own = table.get(self.own)
        if own is None:
            return self._is_listed  # it was taken away, with what is mounted on it
        # What is mounted over the root itself hides nothing from who has that open.
        return any(line.parent == own.number and line.point != own.point for line in table.values())

    def learn(self, number: int, forbids: int) -> None:
        """Note what a mount forbids, and find out what others show as well."""
        with self._lock:
            table: dict[int, MountLine] = {}
            version = 0
            if self._table is not None and number:
                table, version = self._table.lines(), self._table.version
            mount, line = self._known.get(number), table.get(number)
            if mount is None or not _is_same(mount.line, line):
                self._drop_old(table)
                mount = Mount(number, forbids)
                self._place(mount, line, table)
            elif not number:  # which is all of them, where the kernel does not tell
                mount.forbids |= forbids
            else:
                mount.forbids = forbids
            if mount.version != version:
                mount.line, mount.version = line, version
                self._compare(mount, line, table)
            self._known[number] = mount

    def _drop_old(self, table: dict[int, MountLine]) -> None:
        if len(self._known) >= _MANY:  # mounts come and go
            keep = self._known.items()
            self._known = {n: m for n, m in keep if n == self.own or n in table}

    def _place(self, mount: Mount, line: MountLine | None, table: dict[int, MountLine]) -> None:
        """Find out whether a mount that was just met is the first of what it shows."""
        if mount.number == self.own or not table:
            return
        if line is None:  # nobody else's, or one that was taken away
            mount.directories = mount.files = hashed(b"mount %d" % mount.number)
        elif any(self._comes_before(rival, line) for rival in self._rivals(line, table)):
            mount.directories = hashed(b"place " + line.point.removeprefix(self._prefix))

    def _compare(self, mount: Mount, line: MountLine | None, table: dict[int, MountLine]) -> None:
        """Find out whether a second mount allows other things than the first."""
        if not mount.directories or line is None:
            return
        rivals = list(self._rivals(line, table))
        if not rivals:
            return  # that one has gone
        first = min(rivals, key=lambda rival: (not self._is_first(rival), *self._order(rival)))
        allows, others = (set(one.flags.split(b",")) - _TIMES for one in (line, first))
        if b"idmapped" in allows | others:
            mount.files = mount.directories
        elif allows != others:
            mount.files = hashed(b"as " + b",".join(sorted(allows)))
        else:
            mount.files = 0

    def _rivals(self, line: MountLine, table: dict[int, MountLine]) -> Iterator[MountLine]:
        """The other mounts in the source that show a part of what this one does, or all."""
        root = self._root(line)
        for other in table.values():
            if (
                other.device == line.device
                and other.number != line.number
                and (self._is_own(other) or other.point.startswith(self._prefix))
                and other.point != line.point  # it covers that one, or is covered
                and _have_something_in_common(root, self._root(other))
            ):
                yield other

    def _comes_before(self, rival: MountLine, line: MountLine) -> bool:
        if int(rival.number) in self._known and _is_same(
            self._known[int(rival.number)].line, rival
        ):
            return self._is_first(rival)
        return self._order(rival) < self._order(line)

    def _order(self, line: MountLine) -> tuple[bool, int, bytes]:
        return not self._is_own(line), len(self._root(line)), line.point

    def _is_first(self, line: MountLine) -> bool:
        mount = self._known.get(int(line.number))
        return self._is_own(line) or (
            mount is not None and _is_same(mount.line, line) and not mount.directories
        )

    def _is_own(self, line: MountLine) -> bool:
        return int(line.number) == self.own

    def _root(self, line: MountLine) -> bytes:
        """What of its file system a mount shows; of the source's own, the source."""
        point = line.point.rstrip(b"/") + b"/"
        if self._is_own(line) and self._source.startswith(point):
            return line.root.rstrip(b"/") + b"/" + self._source[len(point) :]
        return line.root


def _is_same(line: MountLine | None, other: MountLine | None) -> bool:
    """Whether a number stands for the same mount as before: they are given again."""
    if line is None or other is None:
        return line is other
    return (line.device, line.root, line.point) == (other.device, other.root, other.point)


def _have_something_in_common(root: bytes, other: bytes) -> bool:
    one, two = (path.rstrip(b"/") + b"/" for path in (root, other))
    return one.startswith(two) or two.startswith(one)
