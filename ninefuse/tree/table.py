"""Fids, and the table that holds them: 9P's numbers for nodes.

A *fid* is a number that a client uses for a node, as in 9P: it is unopened (made by walk),
or an open file or directory (lopen, lcreate), or an extended attribute (xattrwalk,
xattrcreate). A fid is counted: the table has one reference, each operation that uses it
another. Clunk takes it out of the table at once; whoever drops the last reference ends it.

clients.py has the table of clients that number their fids themselves, kernel.py that of a kernel.

Locks touched: the table's read-write lock guards the dictionary and what fids stand on and
have open; the mutex ``counts`` (counts.py), inside it, guards references.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from typing import NamedTuple

from ninefuse.errors import error
from ninefuse.linux.syscalls import Attributes
from ninefuse.locks import TableLock
from ninefuse.tree.counts import Counts
from ninefuse.tree.fields import Fid as Fid
from ninefuse.tree.identity import Device, Mark, Rights
from ninefuse.tree.nodes import Named, Node
from ninefuse.tree.opened import OpenDirectory, Opened, OpenFile
from ninefuse.tree.qids import Qid, QidPaths, qid_of

_MANY = 10_000  # fids, of which a table that has gone empty is worth making anew
_STEP = 10_000  # fids more, or fewer by far, that are worth telling of


def open_file_of(fid: Fid) -> OpenFile:
    """The file that a fid has open.

    Raises:
        OSError: EISDIR, a directory; EINVAL, unopened, or an extended attribute.
    """
    if isinstance(fid.opened, OpenFile):
        return fid.opened
    raise error(errno.EISDIR if isinstance(fid.opened, OpenDirectory) else errno.EINVAL)


class TableStatistics(NamedTuple):
    """How many fids a table holds."""

    fids: int
    opened: int  # files, directories and attributes
    files: int
    descriptors: int  # of nodes' own, O_PATH; each open fid has one more


def _nothing(*_: int) -> None:
    pass


class FidTable(Counts):
    """All fids of a session, and the nodes that they stand on.

    Attributes:
        on_change: called, on any thread and with no lock held, each time that the table has
            grown by ``step`` fids, and when it has become far smaller.
        set_id: the numbers of files that the client was told have set-id bits.
        on_set_id: called with each number that is added to those.
        passed: the numbers of files that the client may change without our hearing of it: it is
            not to believe their attributes.

    Args:
        defer: ``defer(close, fd)`` has a descriptor closed where that may block.
    """

    def __init__(self, defer: Callable[..., None]) -> None:
        super().__init__(defer)
        self.lock = TableLock()
        self.step = _STEP
        self.on_change: Callable[[], None] = _nothing  # each `step` fids more, and far fewer
        self.set_id: set[int] = set()
        self.on_set_id: Callable[[int], None] = _nothing
        self.passed: set[int] = set()
        self._fids: dict[int, Fid] = {}
        self._opened = 0  # fids that are open files, directories and attributes
        self._files = 0  # files among them
        self._most = 0  # fids that there were, as far as was noticed, since it last shrank
        self._told = 0  # of how many fids was told last
        self._root: tuple[tuple[int, int], int] | None = None
        self._paths: QidPaths | None = None

    def __len__(self) -> int:
        return len(self._fids)

    # Numbers of files

    def set_root(self, root: Attributes) -> None:
        """Make a source directory the one that numbers are given for.

        Args:
            root: its attributes.
        """
        new = (root.dev_major, root.dev_minor), root.ino
        if new != self._root:  # else numbers given already stay as they are
            self._root, self._source = new, new[0]
            self._paths = QidPaths(root, self.devices)

    def number_of(self, a: Attributes) -> int:
        """The qid path of a file of the source."""
        if self._root == ((a.dev_major, a.dev_minor), a.ino) and not self.devices.aside(a):
            return a.ino
        assert self._paths is not None
        return self._paths.path(a)

    def number_listed(self, directory: Node, inode: int, kind: int) -> int:
        """The qid path of a file that a directory lists, if nothing is mounted on it.

        Args:
            directory: its node.
            inode: the file's inode number.
            kind: S_IFDIR and so on; 0: the directory does not say.
        """
        device, mount = directory.device, directory.mount
        aside = mount.directories if kind == stat.S_IFDIR else mount.files
        if self._root == (device.number, inode) and not aside:
            return inode
        assert self._paths is not None
        return self._paths.path_of(device, inode, aside)

    def number_apart(self, device: Device, inode: int) -> int:
        """A number to show a file with of which nothing but its inode number is known."""
        assert self._paths is not None
        return self._paths.unknown(device, inode)

    def qid_of(self, a: Attributes) -> Qid:
        """The qid of a file of the source."""
        return qid_of(self.number_of(a), a)

    # References

    def get(self, number: int) -> Fid:
        """Find a fid and reference it; give it back with `put`.

        Raises:
            OSError: it is not in the table (`unknown`).
        """
        # Without the table's lock, since one look into a dictionary is one step for all threads
        # (a `get` with a key that is an int runs none of anybody's code): what is found was in the
        # table at that moment, as it would have been for a reader who came before whoever takes
        # it out just now. It may be in no table any more, but it has not ended as long as it has
        # references, and whoever takes it out drops the table's only afterwards.
        fid = self._fids.get(number)
        if fid is not None:
            with self._counts:
                if fid.referenced():
                    return fid
        # It has ended, or is not there: perhaps for the moment in which somebody moves it.
        with self.lock.reading:
            fid = self._fids.get(number)
            if fid is None:
                raise self.unknown(number)
            with self._counts:
                fid.refs += 1
        return fid

    def unknown(self, number: int) -> OSError:
        """What is answered of a fid that is not in the table."""
        return error(errno.EBADF)

    def put(self, fid: Fid) -> None:
        """Drop a reference; the last one ends the fid."""
        with self._counts:
            if fid.dropped():
                return
            # Only the last one comes here: a fid in the table has the table's reference,
            # and one that has left it gets no new ones.
            node, opened = fid.node, fid.opened
            is_lent = False
            if opened is not None:
                self._open.pop(opened, None)
                is_lent = bool(self._lent) and self._is_lent_still(node, opened)
        if opened is not None and opened.fd >= 0:
            if isinstance(opened, OpenFile) and opened.holders:
                self._defer(self.close_locked, opened, node if is_lent else None)
            elif is_lent:
                self._defer(self.close_lent, node, opened.fd, opened.owner)
            else:
                self._defer(self.close_open, opened.fd, opened.owner)
        if not is_lent:
            self.drop(node)

    def close_locked(self, file: OpenFile, lent_to: Node | None = None) -> None:
        """Close the descriptor of an open fid by which locks were taken: they end. Blocks.

        The owners' own descriptors are closed afterwards, each by a call of its own: one close may
        fail (a server tells so of an earlier write), or hang, and the others' locks are to end.

        Args:
            file: what it has open.
            lent_to: whom its descriptor was lent to (`close_lent`), if to anybody.
        """
        try:
            if lent_to is not None:
                self.close_lent(lent_to, file.fd, file.owner)
            else:
                self.close_open(file.fd, file.owner)
        finally:
            for holder in list(file.holders or ()):
                self._defer(holder.lost, file, self.close_open)

    def owner_of(self, number: int) -> int | None:
        """The user id of who opened a fid, if that is known. Takes no lock.

        For whom a request is counted: an answer from a moment ago is as good.
        """
        fid = self._fids.get(number)
        return None if fid is None or fid.opened is None else fid.opened.owner

    def note_set_id(self, number: int) -> None:
        """The client is about to be told that a file has set-id bits."""
        if number not in self.set_id:
            self.set_id.add(number)
            self.on_set_id(number)

    def plain_file_of(self, number: int) -> tuple[Node, OpenFile] | None:
        """The file that a fid has open, if a write to it is no more than that; takes no lock.

        So not of a live file, nor of one that has set-id bits, as far as is known.
        """
        fid = self._fids.get(number)
        if fid is None or not isinstance(fid.opened, OpenFile):
            return None
        node, file = fid.node, fid.opened
        if file.live or file.group is not None or node.number in self.set_id:
            return None
        return node, file

    def new_node(
        self, a: Attributes, fd: int, place: tuple[Node, bytes] | None, mark: Mark = None
    ) -> Node:
        """A node for a file just found or made, referenced by the caller (`drop` it).

        Args:
            a: its attributes.
            fd: an O_PATH descriptor of it, which passes to the node, or -1.
            place: the parent and name it was found at, None for the root.
            mark: what tells it from later files that get its number (`Devices.mark`).
        """
        node = Node(self.number_of(a), a, self.devices.of(a), self.devices.mount_of(a), mark, place)
        if fd >= 0:
            self.give_descriptor(node, fd)
        return node

    # The table

    def add(self, number: int, node: Node, opened: Opened | None = None) -> Fid:
        """Put a new fid into the table; it references the node.

        Returns:
            The fid, not referenced: somebody may clunk it at any time.

        Raises:
            OSError: EINVAL, the number is taken.
        """
        fid = Fid(number, node, opened)
        with self.lock.writing:
            if number in self._fids:
                raise error(errno.EINVAL)
            with self._counts:
                node.refs += 1
            self._fids[number] = fid
            self._count(opened, 1)
        return fid

    def move(self, fid: Fid, node: Node) -> None:
        """Make an unopened fid stand on another node (walk to itself).

        Raises:
            OSError: EINVAL, it is open.
        """
        with self.lock.writing:
            if fid.opened is not None:
                raise error(errno.EINVAL)
            self._move(fid, node)

    def open(
        self, fid: Fid, opened: Opened, node: Node | None = None, was: Node | None = None
    ) -> None:
        """Make an unopened fid an open one.

        Args:
            fid: it.
            opened: what it has open from now on.
            node: whose file that is, if it may be another than the fid stands on (lcreate).
            was: the node that the fid stood on when that was looked for.

        Raises:
            OSError: EINVAL, somebody opened it meanwhile, or moved it from there; ``opened`` is not
                used.
        """
        with self.lock.writing:
            if fid.opened is not None or (was is not None and fid.node is not was):
                raise error(errno.EINVAL)
            if node is not None and node is not fid.node:
                self._move(fid, node)
            fid.opened = opened
            if opened.fd >= 0:
                at = fid.node
                self._open[opened] = at, at.mount  # one step for all threads, as in `get`
            if self._fids.get(fid.number) is fid:  # it may have been clunked meanwhile
                self._count(opened, 1)

    def remove(self, number: int) -> Fid:
        """Take a fid out of the table; its reference passes to the caller (`put` it).

        Raises:
            OSError: as `get`.
        """
        with self.lock.writing:
            fid = self._fids.pop(number, None)
            if fid is not None:
                self._leaves(fid)
        if fid is None:
            raise self.unknown(number)
        return fid

    def clear(self) -> None:
        """Take every fid out of the table (version, and the end of the session)."""
        with self.lock.writing:
            gone, self._fids = self._fids, {}
            self.set_id.clear()
            self.passed.clear()
            self._opened = self._files = 0
            if self._paths is not None:
                self._paths.clear()
        for fid in gone.values():
            self.put(fid)
        self.devices.mounts.end()

    def statistics(self) -> TableStatistics:
        """How many fids there are, and of which kind. Anybody may ask for it, any time."""
        return TableStatistics(len(self._fids), self._opened, self._files, self.descriptors)

    # Nodes that several fids share

    def known(self, a: Attributes, *, allowing: bool = False) -> Node | None:
        """The node that all who look a file up share, referenced (`drop` it), or None.

        Args:
            a: the file's attributes.
            allowing: only if it is as open to others as it was seen last (`Node.allows`).
        """
        return None

    def seen(self, a: Attributes, parent: Node, name: bytes) -> None:
        """Note where a file is found from now on, whose node is shared."""

    def name_of(self, fid: Fid) -> Named | None:
        """By which name a fid has come to its file, if that has several and a client may ask."""
        return None

    def called(self, fid: Fid, named: Named | None) -> None:
        """Note by which name a fid has come to its file; None: by the file's only one, or none."""

    def note_rights(self, a: Attributes, node: Node) -> None:
        """Note what the client is about to be told of a node, seen by its descriptor."""
        if type(node.mark) is Rights and not node.allows(a):
            node.mark = self.devices.rights(a)

    # Helpers that expect the lock to be held

    def _count(self, opened: Opened | None, change: int) -> None:
        if opened is not None:
            self._opened += change
            if isinstance(opened, OpenFile):
                self._files += change

    def _leaves(self, fid: Fid) -> None:
        """A fid has left the table: what the table keeps of it goes as well."""
        self._count(fid.opened, -1)

    def _shrink(self) -> bool:
        """Give back the room of entries long gone: a dictionary only ever grows."""
        count = len(self._fids)
        self._told = min(self._told, count)
        self._most = max(self._most, count)
        if count >= self._most // 4 or self._most < _MANY:
            return False
        self._fids = dict(self._fids)
        self._most = count
        return True

    def _move(self, fid: Fid, node: Node) -> None:
        with self._counts:
            node.refs += 1
        old, fid.node = fid.node, node
        self.drop(old)
