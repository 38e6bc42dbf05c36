"""Nodes: the files of the source, as far as fids know them.

A *node* is a file of the source: its identity, an O_PATH descriptor, and the (parent,
name) under which it was last seen.

A node's descriptor is a cache. Nodes that readdir found have none until they are used,
and the coldest lose theirs when there are too many; it is opened again from the parent
and the name (descriptors.py), and compared with what is known of the file (identity.py).

Locks touched: none. References, pins and descriptors are guarded by the mutex ``counts``
(counts.py), which alone changes them.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from ninefuse.linux.syscalls import Attributes
from ninefuse.tree.fields import NodeFields, Rare
from ninefuse.tree.identity import Born, Device, Mark, Rights
from ninefuse.tree.places import Mount


class Named(NamedTuple):
    """The name by which a fid has come to its file, which has several.

    Attributes:
        place: the parent and the name.
        moves: of the rename lock, when it was found there: where nothing was moved since, it is
            still there, or is no more.
    """

    place: tuple[Node, bytes]
    moves: int


class Node(NodeFields):
    """A file of the source, as far as fids know it."""

    # Here those that have an object anyway: Python is quicker with its own.
    __slots__ = ("device", "inode", "mount", "number", "rare")

    def __init__(
        self,
        number: int,
        a: Attributes,
        device: Device,
        mount: Mount,
        mark: Mark,
        place: tuple[Node, bytes] | None,
    ) -> None:
        self.number = number  # qid path
        self.kind = a.kind  # S_IFREG, S_IFDIR, …
        self.device = device
        self.mount = mount  # that it was found by
        self.inode = a.ino
        self.mark = mark  # see identity.py
        self.fd = -1  # O_PATH, or lent by an open fid; -1: it has none now
        # The (parent, name) it was last seen at, swapped as a whole; None for the root, for a file
        # that has had no name yet, and for one that was found by its number (ops/forgotten.py).
        self.place = place
        self.refs = 1  # fids on it, and operations that use it: now its maker
        self.pins = 0  # operations that use its descriptor
        self.recent = False  # used since the reclaimer last came by
        self.uses = 0  # so often, modulo 256: tells whether it was used in between
        aside = mount.directories if a.kind == stat.S_IFDIR else mount.files
        # What few nodes have; None: nothing.
        self.rare: Rare | None = Rare(aside) if aside else None

    @property
    def aside(self) -> int:
        """What tells it from the same file at another place (places.py)."""
        return 0 if self.rare is None else self.rare.aside

    @property
    def with_rare(self) -> Rare:
        """What is known of few nodes, and is about to be of this one."""
        if self.rare is None:
            self.rare = Rare()
        return self.rare

    def __repr__(self) -> str:
        name = self.place[1] if self.place else b"/"
        return f"<node {self.number} {name!r} fd {self.fd} refs {self.refs} pins {self.pins}>"

    def shows(self, a: Attributes, mark: Mark = None) -> bool:
        """Whether the attributes are this file's, not those of one that has its number now.

        Args:
            a: the attributes.
            mark: of the same file. It is needed where the node has no descriptor and files
                are not told apart by their birth.
        """
        if type(self.mark) is int:
            mark = a.birth
        elif type(self.mark) is Born and mark is None:
            mark = Born(a.birth, self.mark.generation)
        return (
            self.inode == a.ino
            and self.kind == a.kind
            and self.device.number == (a.dev_major, a.dev_minor)
            and self._has_mark(mark, a.uid)
        )

    def is_file_of(self, other: Node) -> bool:
        """Whether both nodes are the same file."""
        owner = other.mark.uid if type(other.mark) is Rights else -1
        return (
            self.has_number_of(other)
            and self.kind == other.kind
            and self._has_mark(other.mark, owner)
        )

    def _has_mark(self, mark: Mark, owner: int) -> bool:
        if type(self.mark) is Rights:
            # The number is the file's own while we have a descriptor. Without, another owner's
            # file is another; one of the same owner may be the same, changed meanwhile.
            return self.fd >= 0 or owner in (-1, self.mark.uid)
        # One that is not known speaks neither for nor against.
        return self.mark is None or mark is None or self.mark == mark

    def allows(self, a: Attributes) -> bool:
        """Whether a file with these attributes is as open to others as this one was seen last.

        Always so where files are told apart by more than that.
        """
        mark = self.mark
        return type(mark) is not Rights or mark == (a.uid, a.gid, a.mode)

    def may_be_believed(self, a: Attributes) -> bool:
        """Whether attributes, as of this file, hold for a while: no later one passes for it."""
        return type(self.mark) is not Rights or (self.fd >= 0 and self.allows(a))

    def has_number_of(self, other: Node) -> bool:
        """Whether both have one (device, inode), as a later file may have, at one place."""
        return (
            self.inode == other.inode
            and self.device.number == other.device.number
            and self.aside == other.aside
        )
