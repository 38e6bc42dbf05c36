"""Descriptors as a cache: which nodes have one, who loses one, how a node gets it again.

The limit on open files is shared by nodes (O_PATH descriptors), by open fids, and by what
the daemon itself and the calls under way need. Open fids have what they need, as long as a
few are left for nodes; nodes have the rest. Whoever is about to open something makes room
for it first, so that no call fails for want of a descriptor. Nodes of open files give up
theirs, for an open fid can lend its own; then what nobody has used for longest is closed.
Where all are in use the answer is ENFILE, before anything was done, and names can still be
looked up, moved and removed.

Locks touched: the mutex ``counts``, through counts.py. No other: a lookup stuck in a slow source
must not keep the reclaimer waiting, and all names behind it.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable

from ninefuse.calls import Body, blocking
from ninefuse.errors import error
from ninefuse.linux import syscalls
from ninefuse.linux.syscalls import Attributes, stat_descriptor
from ninefuse.tree.identity import Born, Device
from ninefuse.tree.nodes import Node
from ninefuse.tree.table import FidTable

_OWN = 32  # descriptors of the daemon itself: 22 to 29 by model and session, and its logs
# That one call may have open at a time, besides what it is asked to open: three, which few have
# at once. Where the limit is low calls have a sixteenth of it between them, at least one each.
_IN_FLIGHT, _IN_FLIGHT_PART = 3, 16
_LEAST = 32  # to share where the limit leaves next to nothing
_FEW, _FEW_PART, _FEWEST = 64, 40, 5  # that open fids leave for nodes: a fortieth between these
MOST = 16384  # for nodes: each keeps an inode of the source in memory
_AT_ONCE = 4  # closed by one who makes room, so that it is not made at each step
_LOOKED_AT = 64  # nodes, by one who makes room


class Descriptors:
    """The descriptors of one session.

    Args:
        fids: the table whose nodes they are for.
        in_background: has a body run that nobody waits for (`Executor.in_background`).
        stat_name, open_step: look at names of the source (`Session.stat_name`, …).
        most: for nodes at most.
        threads: how many make calls at the same time.
        limit: on the process's open files; by default what it is now.
    """

    def __init__(
        self,
        fids: FidTable,
        in_background: Callable[[str, Body[None]], None],
        stat_name: Callable[[int, bytes], Attributes] = syscalls.stat_name,
        open_step: Callable[[int, bytes], int] = syscalls.open_step,
        *,
        most: int = MOST,
        threads: int = 1,
        limit: int | None = None,
    ) -> None:
        if limit is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = most
        in_flight = max(threads, min(_IN_FLIGHT * threads, limit // _IN_FLIGHT_PART))
        self.shared = max(_LEAST, limit - _OWN - in_flight)
        self._few = max(_FEWEST, min(_FEW, self.shared // _FEW_PART))
        self._spare = self._few // 2  # of these, that can be had when something is to be opened
        self._threads = threads
        self._fids = fids
        self._in_background = in_background
        self._stat_name = stat_name
        self._open_step = open_step
        self._reclaiming = False
        self._again_at = 0  # nodes with a descriptor, at which reclaiming is worth another try

    @property
    def for_nodes(self) -> int:
        """How many descriptors nodes may have now."""
        return min(self.most, max(self._few, self.shared - self._fids.open_descriptors))

    @property
    def are_short(self) -> bool:
        """Whether room has to be made before anything is opened for a fid."""
        return self._fids.descriptors >= self.for_nodes - self._spare

    @property
    def have_room(self) -> bool:
        """Whether a node can have another descriptor without one's being closed."""
        return self._fids.descriptors < self.for_nodes

    def claim(self, owner: int | None = None) -> None:
        """Count the descriptor that an open fid is about to have (`FidTable.close_open`).

        Args:
            owner: the user id of who opens it, who may have half of all (`FidTable.claim`).

        Raises:
            OSError: ENFILE, too many files are open, or this user has too many.
        """
        self._fids.claim(self.shared - self._few, owner)

    def make_room_for_open(self, near: Node) -> None:
        """`make_room`, for an open fid; a few are left for names to be looked up with."""
        self.make_room(near, self._spare)

    def reopen(self, node: Node, looking: bool = False) -> None:
        """Open a node again, which is pinned, by its parent and name. Blocks.

        Args:
            node: it.
            looking: whether all that is wanted are its attributes, which the caller is told.
                Then a directory may have been opened or closed to others since it was seen.

        Raises:
            OSError: ESTALE, the names do not lead there any more; ENFILE.
        """
        try:
            self.make_room(node)
            try:
                fd = self.open_again(node, looking=looking)
            except OSError as e:
                if e.errno != errno.ESTALE:
                    raise
                fd = self._open_by_number(node)
        except OSError:
            if node.fd < 0:
                raise
            return  # it was given one meanwhile, perhaps since its name was going (`keeping`)
        self._fids.give_descriptor(node, fd)

    def open_named(self, directory: Node, name: bytes, node: Node) -> None:
        """Give a node its descriptor by a name that it was just seen at. Blocks."""
        self.make_room(node)
        fd = self._open_step(directory.fd, name)
        try:
            same = self._is_open_at(node, fd)
        except BaseException:
            os.close(fd)
            raise
        if same:
            self._fids.give_descriptor(node, fd)
        else:
            os.close(fd)

    def make_room(self, near: Node, spare: int = 0) -> None:
        """See that another descriptor can be had. Blocks, if another's has to be closed.

        Args:
            near: closed are descriptors on the device of this node. Who gets to wait for a
                device that does not answer has business there.
            spare: how many more there must be.

        Raises:
            OSError: ENFILE, all are in use.
        """
        fids, most = self._fids, self.for_nodes - spare
        count = fids.descriptors
        if count < most:
            return
        left = self.shared - spare - count - fids.open_descriptors
        if left > 0 and count <= self._again_at:
            return  # nodes have many, but nothing is short, and little could be closed
        if fids.lend(_AT_ONCE, _LOOKED_AT):
            return
        # Few at a time: what one has in hand, others do not find.
        cold = fids.coldest(2 * _AT_ONCE, _LOOKED_AT, near.device)
        if self._let_go(cold, _AT_ONCE, near.device):
            return
        self._again_at = count + most // 8
        # The calls under way may each have one too many.
        if left <= -self._threads and not self._let_go_of_any():
            raise error(errno.ENFILE)

    def note(self) -> None:
        """Have the coldest reclaimed when nodes have nearly as many as they may."""
        count, most = self._fids.descriptors, self.for_nodes
        if count < most // 2:
            self._again_at = 0
        elif count > most * 7 // 8 and count > self._again_at and not self._reclaiming:
            self._reclaiming = True
            self._in_background("reclaim", self._reclaim())

    async def _reclaim(self) -> None:
        """Close descriptors that can be opened again, down to three quarters of the most.

        Whoever takes a name away pins its node first (`Session.keeping`), and a pinned node
        keeps its descriptor; a node that has lost it by then gets it back.
        """
        try:
            surplus = self._fids.descriptors - self.for_nodes * 3 // 4
            await blocking(None, self._lend_or_close, surplus)
        finally:
            # Where little could be closed, not to look again at every lookup.
            self._again_at = self._fids.descriptors + self.for_nodes // 8
            self._reclaiming = False

    def _lend_or_close(self, surplus: int) -> None:
        self._close_coldest(surplus - self._fids.lend(surplus))

    def _close_coldest(self, surplus: int) -> None:
        # The newest first: a directory is mostly older than what was found in it, and would
        # have to be opened again to see that its entries can be.
        self._let_go(self._fids.coldest(surplus)[::-1], surplus, self._fids.devices.own)

    def _let_go_of_any(self) -> bool:
        """Close some descriptors whatever it takes; False if all are in use.

        First those of nodes that open fids can lend theirs. At last also those of files whose
        remembered names have gone, but which have others: the kernel, told ESTALE, looks for them
        again by the path that it was given.
        """
        if self._fids.lend(_AT_ONCE):
            return True
        for last_resort in (False, True):
            for _ in range(2 * self._fids.descriptors // _AT_ONCE):
                nodes = self._fids.coldest(2 * _AT_ONCE)
                if not nodes:
                    break
                if self._let_go(nodes, _AT_ONCE, self._fids.devices.own, last_resort):
                    return True
        return False

    def _let_go(
        self, nodes: list[Node], most: int, near: Device | None, last_resort: bool = False
    ) -> int:
        """Close the descriptors of some pinned nodes that nobody else uses, and unpin all.

        None of those that could not be opened again: they have lost their names, or their
        parents have. As a last resort, of files that have another name. Where it can be done on
        a local file system it waits for nobody: somebody may keep others out of a directory.

        Args:
            nodes: which.
            most: how many to close.
            near: the device that may be waited for; others that are not local are passed over.
            last_resort: whether it is one.

        Returns:
            How many were closed, up to ``most``.
        """
        fids, closed = self._fids, 0
        look = _Look(self._fids, self._stat_name, self.open_again, near)
        try:
            for node in nodes:
                # Somebody who has it now may take its name away between the look and the taking.
                fd, uses, is_used = -1, node.uses, node.pins > 1
                if (closed < most and not is_used) and (
                    look.leads_back(node) or (last_resort and _has_another_name(node))
                ):
                    fd = fids.take_descriptor(node, uses)
                fids.unpin(node)
                if fd >= 0:
                    fids.close_node(fd)
                    closed += 1
        finally:
            look.close()
        return closed

    def open_again(
        self, node: Node, *, use: bool = True, looking: bool = False, waiting: bool = True
    ) -> int:
        """A new descriptor of a node, by the names that it remembers. Blocks.

        Climbs to the nearest ancestor that has a descriptor and comes down from it, one
        name at a time, comparing each file with what its node knows of it.

        Args:
            node: it.
            use: whether that counts as a use of what it comes by.
            looking: as for `reopen`.
            waiting: whether it may wait for who keeps others out of a directory.

        Raises:
            OSError: ESTALE, the names do not lead there any more; EAGAIN, it would have to wait.
        """
        open_step = self._open_step if waiting else syscalls.open_cached
        way: list[tuple[Node, bytes]] = []
        passed: set[Node] = set()
        top: Node = node
        while True:
            place = top.place  # read once: a walk may find the file at another place
            # A directory mounted below itself is found below itself.
            if place is None or top in passed:
                raise error(errno.ESTALE)
            passed.add(top)
            way.append((top, place[1]))
            top = place[0]
            if self._fids.pin(top, use=use):
                break
            self._fids.unpin(top)
        fd = -1
        try:
            for step, name in reversed(way):
                above, fd = fd, open_step(top.fd if fd < 0 else fd, name)
                _close(above)
                # Of a directory on the way no more is wanted than what is in it.
                is_lenient = step is not node or (looking and node.kind == stat.S_IFDIR)
                if not self._is_open_at(step, fd, is_lenient):
                    raise error(errno.ESTALE)
        except (FileNotFoundError, NotADirectoryError):
            _close(fd)
            raise error(errno.ESTALE) from None
        except BaseException:
            _close(fd)
            raise
        finally:
            self._fids.unpin(top)
        return fd

    def _open_by_number(self, node: Node) -> int:
        """A new descriptor of a node whose inode can be found by its number. Blocks.

        Raises:
            OSError: ESTALE, it cannot, or was removed.
        """
        if type(node.mark) is not Born:
            raise error(errno.ESTALE)
        fd = self._fids.devices.open_number(node.inode, node.mark.generation)
        try:
            same = _has_name(fd) and self._is_open_at(node, fd)
        except BaseException:
            os.close(fd)
            raise
        if not same:
            os.close(fd)
            raise error(errno.ESTALE)
        return fd

    def _is_open_at(self, node: Node, fd: int, is_lenient: bool = False) -> bool:
        attributes, devices = stat_descriptor(fd), self._fids.devices
        if attributes.is_mount_root:
            devices.learn(fd, attributes)
        if not node.shows(attributes, devices.mark(attributes, fd)):
            return False
        if node.aside != devices.aside(attributes):
            return False  # the same one at another place
        if node.fd < 0:
            node.mount = devices.mount_of(attributes)
        # The kernel let the caller in by what it was told of the node.
        return is_lenient or node.allows(attributes)


class _Look:
    """A look at whether names lead back to nodes.

    A directory that has no descriptor is opened for it, and kept open until it is another's
    turn: those that are cold together were often found together.
    """

    def __init__(
        self,
        fids: FidTable,
        stat_name: Callable[[int, bytes], Attributes],
        open_again: Callable[..., int],
        near: Device | None,
    ) -> None:
        self._near = near
        self._fids = fids
        self._stat_name = stat_name
        self._open_again = open_again
        self._directory: Node | None = None
        self._fd = -1

    def leads_back(self, node: Node) -> bool:
        """Whether a node's parent and name still lead to it."""
        if node.place is None:
            is_found = type(node.mark) is Born and not self._fids.devices.mounts.cover_own()
            return is_found and _has_name(node.fd)
        file_system = node.device.file_system
        waiting = file_system is None or not file_system.is_local
        if waiting and node.device != self._near:
            return False
        parent, name = node.place
        has_descriptor = self._fids.pin(parent, use=False)
        try:
            directory = parent.fd if has_descriptor else self._opened(parent, waiting)
            found = self._stat_name(directory, name) if waiting else _stat_cached(directory, name)
            return node.shows(found) and node.aside == self._fids.devices.aside(found)
        except OSError:
            return False
        finally:
            self._fids.unpin(parent)

    def close(self) -> None:
        """Close the directory that was kept open."""
        if self._directory is not None:
            self._directory = None
            os.close(self._fd)

    def _opened(self, directory: Node, waiting: bool) -> int:
        if directory is not self._directory:
            self.close()
            self._fd = self._open_again(directory, use=False, waiting=waiting)
            self._directory = directory
        return self._fd


def _stat_cached(directory: int, name: bytes) -> Attributes:
    """The attributes of a name, if the kernel has it in memory, as that of an open file."""
    fd = syscalls.open_cached(directory, name)
    try:
        return stat_descriptor(fd)
    finally:
        os.close(fd)


def _has_another_name(node: Node) -> bool:
    return node.kind != stat.S_IFDIR and _has_name(node.fd)


def _has_name(fd: int) -> bool:
    try:
        return stat_descriptor(fd).nlink > 0
    except OSError:
        return False


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
