"""The fids of clients that give them their numbers themselves, as 9P has it.

All clients of a session share the nodes: there is one for each file, whoever has walked to it. So
a rename tells all fids of the file where it is now, and a node can lose its descriptor while fids
stand on it (counts.py). The fids are apart: each conversation numbers its own (`number_in`).

Locks touched: the table's lock and the mutex ``counts``, as in table.py. The mutex guards the
dictionary of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

from ninefuse.linux.syscalls import Attributes
from ninefuse.tree.identity import Mark, Rights
from ninefuse.tree.kernel import KernelTable
from ninefuse.tree.nodes import Named, Node
from ninefuse.tree.opened import Opened
from ninefuse.tree.table import Fid, FidTable

_FID_BITS = 32  # 9P's
# Conversations are numbered from here, so that their fids are above all numbers of a kernel's.
FIRST_CONVERSATION = 1 << 33


def number_in(conversation: int, fid: int) -> int:
    """The number in the table of a fid that a conversation knows by a number of its own.

    Args:
        conversation: its number, `FIRST_CONVERSATION` or above, which no other has or had.
        fid: of 32 bits.
    """
    return conversation << _FID_BITS | fid


class ClientsTable(FidTable):
    """The fids of a session whose clients number them.

    Args:
        defer: as for `FidTable`.
    """

    def __init__(self, defer: Callable[..., None]) -> None:
        super().__init__(defer)
        # By their numbers, those that a fid stands on; and the directories above, which a rename
        # has to tell where they are, though no fid may stand on them.
        self._nodes: WeakValueDictionary[int, Node] = WeakValueDictionary()
        self._named: dict[int, Named] = {}  # by the numbers of fids

    def new_node(
        self, a: Attributes, fd: int, place: tuple[Node, bytes] | None, mark: Mark = None
    ) -> Node:
        """As of a `FidTable`; the node that is known of the file already, if one is.

        Where that one is found now, `seen` is told, by whoever knows that nothing was renamed.
        """
        node = super().new_node(a, -1, place, mark)
        with self._counts:
            known = self._nodes.setdefault(node.number, node)
            if known is not node and known.is_file_of(node):
                known.refs += 1
                if known.mark is None or (type(known.mark) is Rights and (fd >= 0 or known.fd < 0)):
                    known.mark = mark
                if known.fd < 0:
                    known.mount = node.mount
            elif known is not node:
                # That one's file has gone. Its fids keep it, and what it has open.
                known = self._nodes[node.number] = node
        if fd >= 0:
            self.give_descriptor(known, fd)
        return known

    def add(self, number: int, node: Node, opened: Opened | None = None) -> Fid:
        """As of a `FidTable`; `on_change` is told of each `step` fids more."""
        fid = super().add(number, node, opened)
        if len(self._fids) >= self._told + self.step:
            self._told = len(self._fids)
            self._most = max(self._most, self._told)
            self.on_change()
        return fid

    def tidy(self) -> bool:
        """Give back the room of entries long gone, if there are many. Any thread; blocks a little.

        Clients come and go, and may have had a hundred thousand fids each.

        Returns:
            Whether there were many.
        """
        with self.lock.writing:
            has_shrunk = self._shrink()
            if has_shrunk:
                with self._counts:
                    self._nodes = WeakValueDictionary(self._nodes)
        return has_shrunk

    def known(self, a: Attributes, *, allowing: bool = False) -> Node | None:
        """As of a `FidTable`."""
        number = self.number_of(a)
        with self._counts:
            node = self._nodes.get(number)
            if node is None or not node.shows(a) or (allowing and not node.allows(a)):
                return None
            node.refs += 1
            return node

    def seen(self, a: Attributes, parent: Node, name: bytes) -> None:
        """As of a `FidTable`."""
        number = self.number_of(a)
        with self._counts:
            node = self._nodes.get(number)
            # The root has no name, wherever it may be mounted once more.
            if node is not None and node.place is not None and node.shows(a):
                node.place = parent, name

    def name_of(self, fid: Fid) -> Named | None:
        """As of a `FidTable`."""
        return self._named.get(fid.number)

    def called(self, fid: Fid, named: Named | None) -> None:
        """As of a `FidTable`."""
        if named is None:
            self._named.pop(fid.number, None)
            return
        with self.lock.reading:
            if self._fids.get(fid.number) is fid:  # it may have been clunked meanwhile
                self._named[fid.number] = named

    def _leaves(self, fid: Fid) -> None:
        super()._leaves(fid)
        self._named.pop(fid.number, None)

    def _is_shared(self, node: Node) -> bool:
        return self._nodes.get(node.number) is node


class BothTable(ClientsTable, KernelTable):
    """The fids of a session that has clients of both kinds: a kernel, and others.

    The kernel's nodeids stand on the nodes that the others' fids stand on.

    Args:
        defer: as for `FidTable`.
    """
