"""The bookkeeping of nodes: who refers to them, who uses their descriptors, who loses one.

A node is counted: each fid on it has one reference, each operation that uses it another,
and whoever drops the last one ends it. It is *pinned* by whoever uses its descriptor.
Nodes that have one stand in the clock, in the order in which the reclaimer looks at them
(descriptors.py says when and which). Closing a descriptor can block (the last close of a
big unlinked file does), so it is never done here but handed to ``defer``.

A file that is open has two: its node's and the open fid's. Where descriptors are short the open
fid *lends* its own to the node, and the node's is closed. When that fid ends, the node gets one of
its own at the same number, so whoever is using the number goes on.

Locks touched: the mutex ``counts``, the innermost lock of all, guards all of it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

from ninefuse.errors import error
from ninefuse.linux.syscalls import proc_path
from ninefuse.tree.identity import Born, Device, Devices
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import Opened
from ninefuse.tree.places import Mount

_AT_ONCE = 256  # nodes that are gone through while others wait for the mutex


def _nothing() -> None:
    pass


class Counts:
    """References, pins and descriptors of the nodes of one session.

    Attributes:
        devices: what is known of devices and of the mounts in the source.
        descriptors: how many nodes have one, those on their way to being closed among them.
        open_descriptors: how many open fids have, likewise, and those about to be opened.
        on_visit: called, on any thread and with no lock held, when a node on another mount
            than the source's own has a descriptor.

    Args:
        defer: ``defer(close, fd)`` has a descriptor closed where that may block.
    """

    def __init__(self, defer: Callable[..., None]) -> None:
        self.devices = Devices()
        self.descriptors = 0
        self.open_descriptors = 0
        self.on_visit: Callable[[], None] = _nothing
        self._source: tuple[int, int] | None = None  # the device of the source directory
        # Descriptors of open fids, by the user id of who has them, …
        self._claimed: dict[int, int] = {}
        self._unbounded = (None, 0, os.geteuid())  # … unless he has no bound: root, our own user
        self._counts = threading.Lock()
        self._defer = defer
        # Nodes with a descriptor, in the reclaimer's order; in no other list, or a node that has
        # gone would keep the memory around it.
        self._clock: OrderedDict[Node, None] = OrderedDict()
        # Those of them that are on other mounts than the source's own.
        self._visitors: OrderedDict[Node, None] = OrderedDict()
        # What fids have open that have lent nothing: of which node, and opened by which mount, …
        self._open: OrderedDict[Opened, tuple[Node, Mount]] = OrderedDict()
        # … and who lent a node what it has, which is in no clock then.
        self._lent: dict[Node, Opened] = {}

    # References

    def drop(self, node: Node) -> None:
        """Drop a reference to a node; the last one closes its descriptor."""
        with self._counts:
            if node.dropped():
                return
            fd = self._take(node)
        if fd >= 0:
            self._defer(self.close_node, fd)

    def pin(self, node: Node, *, use: bool = True) -> bool:
        """Reference a node and keep its descriptor, if it has one, from being reclaimed.

        Args:
            node: it.
            use: whether that counts as a use of it. Not so by the reclaimer itself.

        Returns:
            Whether it has a descriptor. It is referenced and pinned either way.
        """
        with self._counts:
            return node.pinned(use)

    def unpin(self, node: Node) -> None:
        """Undo `pin`; the last reference closes the descriptor."""
        with self._counts:
            if node.unpinned():
                return
            fd = self._take(node)
        if fd >= 0:
            self._defer(self.close_node, fd)

    def give_descriptor(self, node: Node, fd: int) -> None:
        """Give a node a descriptor; of two who opened one, the second's is closed."""
        with self._counts:
            self.descriptors += 1
            given = node.fd < 0 and node.refs > 0
            if given:
                self._give(node, fd)
        if not given:
            self._defer(self.close_node, fd)
        elif node in self._visitors:
            self.on_visit()

    def take_descriptor(self, node: Node, uses: int) -> int:
        """Take the descriptor of a node that only the caller uses and has pinned.

        Args:
            node: it.
            uses: its uses when it was looked at.

        Returns:
            The descriptor, which is the caller's now, or -1 if the node is in use, or was
            since it was looked at: its name may have been taken away, and lead to it no more.
        """
        with self._counts:
            if node.pins > 1 or node.refs > 2 or node.uses != uses:
                return -1
            return self._take(node)

    def close_node(self, fd: int) -> None:
        """Close a descriptor that was taken from a node. Blocks."""
        try:
            os.close(fd)
        finally:
            with self._counts:
                self.descriptors -= 1

    # Descriptors of open fids

    def claim(self, most: int, owner: int | None = None) -> None:
        """Count a descriptor that is about to be opened for a fid; `close_open` counts it off.

        Args:
            most: how many there may be.
            owner: the user id of who opens it. Any but root and the daemon's own user may have
                half of these; None: nobody's.

        Raises:
            OSError: ENFILE, there are as many.
        """
        with self._counts:
            if self.open_descriptors >= most:
                raise error(errno.ENFILE)
            if owner is not None and owner not in self._unbounded:
                has = self._claimed.get(owner, 0)
                if has >= max(1, most // 2):
                    raise error(errno.ENFILE)
                self._claimed[owner] = has + 1
            self.open_descriptors += 1

    def unclaim(self, owner: int | None = None) -> None:
        """Undo `claim`, where nothing came to be opened."""
        with self._counts:
            self.open_descriptors -= 1
            if owner is not None and owner not in self._unbounded:
                left = self._claimed[owner] - 1
                if left:
                    self._claimed[owner] = left
                else:
                    del self._claimed[owner]

    def close_open(self, fd: int, owner: int | None = None) -> None:
        """Close the descriptor of an open fid, which was claimed for a user. Blocks."""
        try:
            os.close(fd)
        finally:
            self.unclaim(owner)

    # Lending them to nodes

    def lend(self, most: int, looks: int | None = None) -> int:
        """Close descriptors of nodes that are open, and lend them those of open fids instead.

        It waits for nobody: what is closed is not the last of its file. A node that is pinned
        keeps its own, for its number is in use.

        Args:
            most: how many to close.
            looks: at how many nodes to look at most; by default at all.

        Returns:
            How many were closed.
        """
        closed: list[int] = []
        left = len(self._open) if looks is None else looks
        while left > 0 and len(closed) < most and self._open:
            with self._counts:
                for _ in range(min(left, _AT_ONCE, len(self._open))):
                    if len(closed) >= most:
                        break
                    opened, (node, mount) = self._open.popitem(last=False)
                    is_in_use = node.pins or node.fd < 0 or node in self._lent
                    if is_in_use or mount is not node.mount:  # a descriptor keeps that busy
                        self._open[opened] = node, mount  # at the end now
                        continue
                    closed.append(self._take(node))
                    node.fd = opened.fd
                    self._lent[node] = opened
            left -= _AT_ONCE
        for fd in closed:
            self.close_node(fd)
        return len(closed)

    def close_lent(self, node: Node, fd: int, owner: int | None = None) -> None:
        """`close_open` of a descriptor that was lent to a node, referenced for this. Blocks.

        The node gets one of its own at the same number. It could not be found by its name if that
        has gone, and others may be using the number.

        Args:
            node: it; the reference is dropped.
            fd: the descriptor.
            owner: as for `close_open`.
        """
        try:
            own = os.open(proc_path(fd), os.O_PATH | os.O_CLOEXEC)
            try:
                os.dup2(own, fd, inheritable=False)
            finally:
                os.close(own)
        except OSError:
            pass  # there is no room, so it stays open: the node must not lose its file
        with self._counts:
            is_its = node.fd == fd
            if is_its:
                del self._lent[node]
                self._give(node, fd)
                self.descriptors += 1
        try:
            if not is_its:
                os.close(fd)
            elif node in self._visitors:
                self.on_visit()
        finally:
            self.unclaim(owner)
            self.drop(node)

    # Reclaiming descriptors

    def coldest(
        self, most: int, looks: int | None = None, device: Device | None = None
    ) -> list[Node]:
        """Pin the nodes that have not been used for longest, for their descriptors.

        Only nodes that can be opened again are taken: known by an unopened fid, with a
        parent, not in use and not open. A node used since the last call is passed over
        once (the clock, or second-chance, algorithm).

        Args:
            most: how many nodes.
            looks: at how many nodes to look at most; by default at all, twice.
            device: whose nodes; by default all.
        """
        cold: list[Node] = []
        left = 2 * len(self._clock) if looks is None else looks
        while left > 0 and len(cold) < most and self._clock:
            self._look_for_cold(cold, most, min(left, _AT_ONCE), device)
            left -= _AT_ONCE
        return cold

    def _look_for_cold(
        self, cold: list[Node], most: int, looks: int, device: Device | None
    ) -> None:
        with self._counts:
            for _ in range(looks):
                if len(cold) >= most or not self._clock:
                    break
                node, _ = self._clock.popitem(last=False)
                self._clock[node] = None  # at the end now
                if device is not None and device.number != node.device.number:
                    continue
                if node.recent:
                    node.recent = False
                elif self._is_cold(node):
                    node.pins += 1
                    node.refs += 1
                    cold.append(node)

    # Leaving other mounts

    @property
    def visitors(self) -> int:
        """How many nodes have a descriptor on another mount than the source's own."""
        return len(self._visitors)

    def idle_visitors(self, but: Collection[int]) -> list[Node]:
        """Pin those that have not been used since this was asked last, for their descriptors.

        They are nodes as `coldest` has them.

        Args:
            but: numbers of mounts that are passed over.
        """
        idle: list[Node] = []
        left = len(self._visitors)
        while left > 0:
            with self._counts:
                for _ in range(min(left, _AT_ONCE, len(self._visitors))):
                    node, _ = self._visitors.popitem(last=False)
                    self._visitors[node] = None  # at the end now
                    if node.recent:
                        node.recent = False
                    elif node.mount.number not in but and self._is_cold(node):
                        node.pins += 1
                        node.refs += 1
                        idle.append(node)
            left -= _AT_ONCE
        return idle

    # Helpers that expect the mutex to be held

    def _is_cold(self, node: Node) -> bool:
        """Whether nobody uses a node's descriptor, and it can be opened again."""
        can_be_opened = node.place is not None or type(node.mark) is Born
        return not node.pins and node.refs == 1 and can_be_opened and self._is_shared(node)

    def _is_shared(self, node: Node) -> bool:
        """Whether whoever looks for the node's file finds this node (`FidTable.known`).

        A node that nobody else finds keeps its descriptor: who takes its name away does not know
        of it, and it could not be opened again.
        """
        return False

    def _give(self, node: Node, fd: int) -> None:
        node.fd = fd
        node.recent = True
        self._clock[node] = None
        is_apart = self._source is not None and node.device.number != self._source
        if is_apart or node.mount.number != self.devices.mounts.own:
            self._visitors[node] = None

    def _take(self, node: Node) -> int:
        """Take a node's own descriptor away; -1 if it had none, or a lent one."""
        fd, node.fd = node.fd, -1
        if fd < 0 or (self._lent and self._lent.pop(node, None) is not None):
            return -1
        del self._clock[node]
        self._visitors.pop(node, None)
        return fd

    def _is_lent_still(self, node: Node, opened: Opened) -> bool:
        """A fid on a node has ended: whether its descriptor is to be closed by `close_lent`."""
        if self._lent.get(node) is not opened:
            return False
        if node.refs > 1:
            return True
        del self._lent[node]  # the node ends with the fid
        node.fd = -1
        return False
