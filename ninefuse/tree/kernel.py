"""Nodeids: the fids by which a kernel knows files, and how many lookups it has of each.

FUSE's two kinds of number are both fids. A nodeid is an unopened fid whose number is its
qid path (the root's is 1); the kernel's lookup count is kept with it, and a generation that
tells it when the number has passed to another file. A file handle is a fid cloned from it
and opened; those are numbered from 2**64, which no nodeid reaches. (9P has 32 bits for a
fid; an inode number needs more.)

This is table work, not protocol: finding or making a nodeid and counting its lookup are one
section of the table's lock, and so are taking lookups back and ending it.

Locks touched: the table's lock and the mutex ``counts``, as in table.py.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable

from ninefuse.errors import error
from ninefuse.linux.syscalls import Attributes
from ninefuse.tree.identity import Born, Rights
from ninefuse.tree.nodes import Node
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.table import Fid, FidTable

FIRST_HANDLE = 1 << 64
_AT_ONCE = 256  # fids that are gone through while others wait for the table


class KernelTable(FidTable):
    """The fids of a session whose client is a kernel.

    There is one nodeid for each file, so that all who look a file up share its node.

    Args:
        defer: as for `FidTable`.
    """

    def __init__(self, defer: Callable[..., None]) -> None:
        super().__init__(defer)
        self._handles = itertools.count(FIRST_HANDLE)
        self._generations = itertools.count(int.from_bytes(os.urandom(4), "big"))

    def new_number(self) -> int:
        """A fid number for a file handle: 2**64 and up, never given twice."""
        return next(self._handles)

    def intern(self, node: Node, place: tuple[Node, bytes] | None = None) -> Fid:
        """Find or make the fid by which the kernel knows a node's file; count a lookup.

        The kernel's number for a file is its qid path (the root's is 1), so that there
        is one such fid for each file, whoever asks.

        Args:
            node: found or made by the caller, who keeps its reference. Another node of
                the same file may be the one in the table; it learns this one's name.
            place: the parent and name that it was found at just now.

        Returns:
            The fid, not referenced: the lookup just counted keeps it in the table.
        """
        with self.lock.writing:
            number, fid = self._fid_of(node)
            if fid is None:
                fid = Fid(number, node)
                fid.generation = self._generation(node, 0)
                self._fids[number] = fid
                with self._counts:
                    node.refs += 1
            elif not fid.node.is_file_of(node):
                # The file that had this inode number has gone. The kernel gives back the
                # number's lookups together; the new generation tells it that what it
                # has of the old file is not of this one.
                self._move(fid, node)
                fid.generation = self._generation(node, fid.generation + 1)
            elif fid.node is not node:
                # One found by its number has none, and the root, which may be mounted below itself.
                if node.place is not None and number != ROOT_NODEID:
                    fid.node.place = node.place
                # What was seen without a descriptor may be of a file that has gone by now.
                is_sure = node.fd >= 0 or fid.node.fd < 0
                if fid.node.mark is None or (type(fid.node.mark) is Rights and is_sure):
                    fid.node.mark = node.mark
                self._share_descriptor(node, fid.node)
            if place is not None and number != ROOT_NODEID:
                fid.node.place = place
            fid.lookups += 1
            grown = len(self._fids) >= self._told + self.step
            if grown:
                self._told = len(self._fids)
        if grown:
            self.on_change()
        return fid

    def knows(self, number: int, place: tuple[Node, bytes]) -> bool:
        """Whether the kernel knows a file by a number, that was found at this parent and name."""
        with self.lock.reading:
            fid = self._fids.get(number)
            return fid is not None and fid.lookups > 0 and fid.node.place == place

    def forget(self, forgets: Iterable[tuple[int, int]]) -> int:
        """Take lookups back; a nodeid that has none left leaves the table (FUSE_FORGET).

        Args:
            forgets: (nodeid, how many); unknown nodeids are passed over.

        Returns:
            How many nodeids left the table.
        """
        left, gone, shrunk = iter(forgets), 0, False
        while some := list(itertools.islice(left, _AT_ONCE)):
            ended = []
            with self.lock.writing:
                for number, count in some:
                    fid = self._fids.get(number)
                    if fid is None or number == ROOT_NODEID:
                        continue
                    fid.lookups = max(0, fid.lookups - count)
                    if not fid.lookups:
                        del self._fids[number]
                        self._leaves(fid)
                        ended.append(fid)
                shrunk = self._shrink() or shrunk
            for fid in ended:
                self.put(fid)
            gone += len(ended)
        if shrunk:
            self.on_change()
        return gone

    def next_idle(self, looks: int) -> list[int]:
        """Nodeids that the kernel could do without, those it was told of first at the front.

        None that is open, or was used since it was last looked at here.

        Args:
            looks: at how many fids to look; the next call looks at those that follow.
        """
        found: list[int] = []
        with self.lock.writing:
            for number in list(itertools.islice(self._fids, looks)):
                fid = self._fids[number] = self._fids.pop(number)  # at the end now
                node = fid.node
                if number >= FIRST_HANDLE or number == ROOT_NODEID:
                    continue
                if node.recent:
                    node.recent = False
                elif node.refs == 1:
                    found.append(number)
        return found

    # What the table does otherwise for other clients

    def unknown(self, number: int) -> OSError:
        """ESTALE for a nodeid, so that the kernel walks the path again; EBADF for a handle."""
        return error(errno.EBADF if number >= FIRST_HANDLE else errno.ESTALE)

    def known(self, a: Attributes, *, allowing: bool = False) -> Node | None:
        """The node by which the kernel knows a file, referenced (`drop` it), or None."""
        with self.lock.reading:
            fid = self._fids.get(self.number_of(a))
            if fid is None or not fid.node.shows(a) or (allowing and not fid.node.allows(a)):
                return None
            with self._counts:
                fid.node.refs += 1
            return fid.node

    def seen(self, a: Attributes, parent: Node, name: bytes) -> None:
        """Note where a file that the kernel may know is found from now on."""
        with self.lock.writing:
            fid = self._fids.get(self.number_of(a))
            if fid is not None and fid.node.shows(a):
                fid.node.place = parent, name

    # Helpers that expect the locks to be held

    def _generation(self, node: Node, plain: int) -> int:
        """The generation of a fid that comes to stand on a node's file, 32 bits.

        By nodeid and generation the kernel asks for a file that it has forgotten. A file that is
        not found again then has another generation each time, so that none passes for it.

        Args:
            node: it.
            plain: what it is where the kernel does not ask.
        """
        if type(node.mark) is Born:
            return node.mark.generation
        if self.devices.inodes is None:
            return plain
        return next(self._generations) & 0xFFFFFFFF

    def _fid_of(self, node: Node) -> tuple[int, Fid | None]:
        """The number by which the kernel is to know a node's file, and its fid if there is one."""
        assert self._paths is not None
        if (node.device.number, node.inode) == self._root and not node.aside:
            return ROOT_NODEID, self._fids.get(ROOT_NODEID)
        number = node.number = self._paths.path_of(node.device, node.inode, node.aside)
        fid = self._fids.get(number)
        if fid is None or fid.node.has_number_of(node):
            return number, fid
        number = node.number = self._paths.apart(
            node.device, node.inode, node.aside, lambda number: number not in self._fids
        )
        return number, None

    def _is_shared(self, node: Node) -> bool:
        # Without the table's lock: a nodeid that leaves the table meanwhile leaves the node later.
        fid = self._fids.get(node.number)
        return fid is not None and fid.node is node

    def _leaves(self, fid: Fid) -> None:
        self._count(fid.opened, -1)
        if fid.number < FIRST_HANDLE and self._paths is not None:
            node = fid.node
            self.set_id.discard(fid.number)
            self.passed.discard(fid.number)
            self._paths.back(node.device, node.inode, node.aside, fid.number)

    def _share_descriptor(self, found: Node, known: Node) -> None:
        """A node gets the descriptor of a newly found twin, if it has none, or of another mount.

        A descriptor keeps its mount busy, and what is done by it is done at that place.
        """
        old = -1
        with self._counts:
            if known.fd < 0:
                known.mount = found.mount
            elif found.fd < 0 or found.mount is known.mount or known.pins:
                return
            if found.fd >= 0 and known.refs and found.refs == 1:
                old = self._take(known)
                known.mount = found.mount
                self._give(known, self._take(found))
        if old >= 0:
            self._defer(self.close_node, old)
