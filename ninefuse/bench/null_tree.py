"""The files of the null server, out of thin air: what it answers from, under either session.

A name such as `file-4096-x` is a file of that size, full of zeros, and `dir-300-x` a directory
that lists so many files (`dir-x`: none). What is created is remembered by name, what is written
only counted. Nodes are numbered as the kernel numbers them, and open files by their nodes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ninefuse.errors import error

ROOT = 1
TIMEOUT = 1.0  # seconds: for attributes and for names, found or not
BLOCK = 4096
PLENTY = 1 << 30  # blocks, and files, that there are and that are free
NAME_MAX = 255

_FILE = re.compile(rb"file-(\d+)-")
_DIRECTORY = re.compile(rb"dir-(?:(\d+)-)?")
_ZEROS = bytes(1 << 20)


@dataclass
class Node:
    """A file or directory that the kernel knows of, or that was created.

    parent, name: where it is. listed: how many files a directory lists out of thin air.
    lookups: the kernel's count. created: whether it is remembered when the kernel forgets it.
    children: by name, those that were created.
    """

    inode: int
    parent: int
    name: bytes
    mode: int
    size: int = 0
    listed: int = 0
    lookups: int = 0
    created: bool = False
    children: dict[bytes, int] = field(default_factory=dict)


class Tree:
    """All nodes. What cannot be done raises OSError, with the errno that the caller is to see.

    nodes: by number. uid, gid: of all. now: all times, in nanoseconds.
    """

    def __init__(self) -> None:
        self.nodes = {ROOT: Node(ROOT, ROOT, b"", stat.S_IFDIR | 0o777, created=True)}
        self.uid, self.gid = os.getuid(), os.getgid()
        self.now = time.time_ns()
        self._known: dict[tuple[int, bytes], int] = {}
        self._last = ROOT

    def find(self, parent: int, name: bytes) -> Node | None:
        inode = self._known.get((parent, name))
        if inode is not None:
            return self.nodes[inode]
        if match := _FILE.match(name):
            node = self._add(parent, name, stat.S_IFREG | 0o644)
            node.size = int(match[1])
            return node
        if match := _DIRECTORY.match(name):
            node = self._add(parent, name, stat.S_IFDIR | 0o755)
            node.listed = int(match[1] or 0)
            return node
        return None

    def create(self, parent: int, name: bytes, mode: int) -> Node:
        if self.find(parent, name) is not None:
            raise error(errno.EEXIST)
        node = self._add(parent, name, mode)
        node.created = True
        self.nodes[parent].children[name] = node.inode
        return node

    def unlink(self, parent: int, name: bytes) -> None:
        node = self.find(parent, name)
        if node is None:
            raise error(errno.ENOENT)
        self.nodes[parent].children.pop(name, None)
        self._known.pop((parent, name), None)
        node.created = False
        self.drop(node)

    def rmdir(self, parent: int, name: bytes) -> None:
        node = self.find(parent, name)
        if node is not None and node.children:
            raise error(errno.ENOTEMPTY)
        self.unlink(parent, name)

    def forget(self, forgets: Iterable[tuple[int, int]]) -> None:
        """Take lookups back: (node, how many) of each."""
        for inode, count in forgets:
            node = self.nodes.get(inode)
            if node is not None:
                node.lookups -= count
                self.drop(node)

    def drop(self, node: Node) -> None:
        """Forget the node unless somebody still needs it."""
        if node.lookups <= 0 and not node.created:
            self.nodes.pop(node.inode, None)
            if self._known.get((node.parent, node.name)) == node.inode:
                del self._known[node.parent, node.name]

    def read(self, inode: int, offset: int, size: int) -> bytes:
        length = max(0, min(size, self.nodes[inode].size - offset))
        return _ZEROS[:length] if length <= len(_ZEROS) else bytes(length)

    def write(self, inode: int, offset: int, length: int) -> int:
        node = self.nodes[inode]
        node.size = max(node.size, offset + length)
        return length

    def listing(self, inode: int, start: int) -> Iterator[tuple[int, Node]]:
        """The entries of a directory from a position on, each with that of the next one."""
        directory = self.nodes[inode]
        names = [b"file-0-%d" % number for number in range(directory.listed)]
        names += directory.children
        for position in range(start, len(names)):
            node = self.find(inode, names[position])
            assert node is not None
            yield position + 1, node

    def _add(self, parent: int, name: bytes, mode: int) -> Node:
        self._last += 1
        node = Node(self._last, parent, name, mode)
        self.nodes[node.inode] = node
        self._known[parent, name] = node.inode
        return node


def is_direct(flags: int) -> bool:
    """Whether an open goes past the kernel's cache: as ninefuse has it, each O_SYNC write is one
    request then."""
    return bool(flags & os.O_DSYNC)
