"""fids, the nodes they stand on, and the table that holds them.

A *node* is a file of the source: its identity, an O_PATH descriptor, and the (parent,
name) under which it was last seen. A *fid* is a number that a client uses for a node,
as in 9P: it is unopened (made by walk), or an open file or directory (lopen, lcreate),
or an extended attribute (xattrwalk, xattrcreate).

FUSE's two kinds of number are both fids here. A nodeid is an unopened fid whose number
is its qid path (the root's is 1); the kernel's lookup count is kept with it. A file
handle is a fid cloned from it and opened; those are numbered from 2**64, which no
nodeid reaches. (9P has 32 bits for a fid; an inode number needs more.)

A fid is counted: the table has one reference, each operation that uses it another.
Clunk takes it out of the table at once; whoever drops the last reference ends it.
Closing a descriptor can block (the last close of a big unlinked file does), so it is
never done here but handed to ``defer``.

A node's descriptor is a cache. Nodes that readdir found have none until they are used,
and the coldest lose theirs when there are too many; it is opened again from the parent
and the name (descriptors.py), and compared with what is known of the file (identity.py).

Locks touched: the table's read-write lock guards the dictionary, lookup counts and
states (a fid is found by its number without it, see `FidTable.get`); the mutex ``counts``
guards references, pins and descriptors of fids and nodes. ``counts`` is the innermost lock
of all.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from ninefuse.credentials import Caller
from ninefuse.identity import Device, Devices, Mark, Rights
from ninefuse.listing import Listing
from ninefuse.locks import TableLock
from ninefuse.places import Mount
from ninefuse.qids import ROOT_NODEID, Qid, QidPaths, qid_of
from ninefuse.syscalls import Attributes

FIRST_HANDLE = 1 << 64
_MANY = 10_000  # fids, of which a table that has gone empty is worth making anew
_STEP = 10_000  # fids more, or fewer by far, that are worth telling of
_AT_ONCE = 256  # fids or nodes that are gone through while others wait for the table


def error(code: int) -> OSError:
    """An OSError of this errno, with its usual text."""
    return OSError(code, os.strerror(code))


class Node:
    """A file of the source, as far as fids know it."""

    __slots__ = (
        "aside",
        "asked",
        "bare",
        "device",
        "fd",
        "inode",
        "kind",
        "mark",
        "mount",
        "path",
        "pins",
        "place",
        "recent",
        "refs",
        "uses",
    )

    def __init__(
        self,
        path: int,
        a: Attributes,
        device: Device,
        mount: Mount,
        mark: Mark,
        place: tuple[Node, bytes] | None,
    ) -> None:
        self.path = path  # qid path
        self.kind = a.kind  # S_IFREG, S_IFDIR, …
        self.device = device
        self.mount = mount  # that it was found by
        self.inode = a.ino
        # What tells it from the same one at another place (places.py).
        self.aside = mount.directories if self.kind == stat.S_IFDIR else mount.files
        self.mark = mark  # see identity.py
        self.fd = -1  # O_PATH; -1: it has none now
        self.asked: Mount | None = None  # its own when the kernel was told to look it up again
        # The (parent, name) it was last seen at, swapped as a whole; None for the root.
        self.place = place
        self.refs = 1  # fids on it, and operations that use it: now its maker
        self.pins = 0  # operations that use its descriptor
        self.recent = False  # used since the reclaimer last came by
        self.uses = 0  # so often, modulo 256: tells whether it was used in between
        # Monotonic seconds until which it is known to have no security.capability; while
        # that is asked, minus the time of asking.
        self.bare = 0.0

    def __repr__(self) -> str:
        name = self.place[1] if self.place else b"/"
        return f"<node {self.path} {name!r} fd {self.fd} refs {self.refs} pins {self.pins}>"

    def shows(self, a: Attributes, mark: Mark = None) -> bool:
        """Whether the attributes are this file's, not those of one that has its number now.

        Args:
            a: the attributes.
            mark: of the same file. It is needed where the node has no descriptor and files
                are not told apart by their birth.
        """
        return (
            self.inode == a.ino
            and self.kind == a.kind
            and self.device.number == (a.dev_major, a.dev_minor)
            and self._has_mark(a.birth if type(self.mark) is int else mark, a.uid)
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


class OpenFile:
    """The state of a fid after lopen or lcreate of a file.

    ``opener`` is who opened it, if that is known; ``writer`` the same, where a write must be
    made with other ids than the daemon's; ``group`` a further group to write in, or None;
    ``owner`` the user id of who opened it, whom its descriptor is counted for, or None; ``live``
    whether each read and write is one of the source's, past every cache.
    """

    __slots__ = ("fd", "flags", "group", "live", "opener", "owner", "writer")

    def __init__(
        self,
        fd: int,
        flags: int,
        writer: Caller | None = None,
        owner: int | None = None,
        live: bool = False,
    ) -> None:
        self.live = live
        self.fd = fd
        self.flags = flags
        self.writer = writer
        self.group: int | None = None
        self.opener: Caller | None = None
        self.owner = owner

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class OpenDirectory:
    """The state of a fid after lopen of a directory; ``owner`` as of an `OpenFile`."""

    __slots__ = ("fd", "fits", "listing", "owner")

    def __init__(self, fd: int, owner: int | None = None) -> None:
        self.fd = fd
        self.owner = owner
        self.listing = Listing(fd)
        self.fits = 24  # entries that fitted into the last reply with attributes


class AttributeRead:
    """The state of a fid after xattrwalk: a value, or a list of names, as it was then."""

    __slots__ = ("value",)

    fd = -1
    owner = None

    def __init__(self, value: bytes) -> None:
        self.value = value


class AttributeWrite:
    """The state of a fid after xattrcreate: what clunk is going to set, or remove."""

    __slots__ = ("caller", "data", "flags", "name", "remove", "size")

    fd = -1
    owner = None

    def __init__(
        self, name: bytes, size: int, flags: int, remove: bool, caller: Caller | None = None
    ) -> None:
        self.caller = caller
        self.name = name
        self.size = size  # declared by xattrcreate
        self.flags = flags
        self.remove = remove
        self.data = b""  # what write has brought so far


Opened = OpenFile | OpenDirectory | AttributeRead | AttributeWrite


class Fid:
    """A client's number for a node."""

    __slots__ = ("generation", "lookups", "node", "number", "opened", "refs")

    def __init__(self, number: int, node: Node, opened: Opened | None = None) -> None:
        self.number = number
        self.node = node
        self.opened = opened  # None: unopened
        self.refs = 1  # the table's; each operation under way has one more
        self.lookups = 0  # FUSE's lookup count, for nodeids
        self.generation = 0  # FUSE's, raised when the number passes to another file

    def __repr__(self) -> str:
        state = type(self.opened).__name__ if self.opened else "unopened"
        return f"<fid {self.number} {state} refs {self.refs} lookups {self.lookups}>"


class TableStatistics(NamedTuple):
    """How many fids a table holds."""

    fids: int
    opened: int  # files, directories and attributes
    files: int
    descriptors: int  # O_PATH descriptors of nodes; each open fid has one more


def _nothing() -> None:
    pass


class FidTable:
    """All fids of a session.

    Attributes:
        on_change: called, on any thread and with no lock held, each time that the table has
            grown by ``step`` fids, and when it has become far smaller.
        set_id: the nodeids of which the kernel was told that they have set-id bits.

    Args:
        defer: ``defer(close, fd)`` has a descriptor closed where that may block.
    """

    def __init__(self, defer: Callable[..., None]) -> None:
        self.lock = TableLock()
        self.devices = Devices()
        self.descriptors = 0  # of nodes, those on their way to being closed among them
        self.open_descriptors = 0  # of open fids, likewise, and those about to be opened
        self._claimed: dict[int, int] = {}  # of these, by the user id of who has them, …
        self._unbounded = (None, 0, os.geteuid())  # … unless he has no bound: root, our own user
        self._counts = threading.Lock()
        self._fids: dict[int, Fid] = {}
        self._opened = 0  # fids that are open files, directories and attributes
        self._files = 0  # files among them
        self._most = 0  # fids that there were, as far as was noticed, since it last shrank
        self.step = _STEP
        self.on_change: Callable[[], None] = _nothing  # each `step` fids more, and far fewer
        self._told = 0  # of how many fids was told last
        self.set_id: set[int] = set()
        self._defer = defer
        self._handles = itertools.count(FIRST_HANDLE)
        self._root: tuple[tuple[int, int], int] | None = None
        self._paths: QidPaths | None = None
        # Nodes with a descriptor, in the reclaimer's order; in no other list, or a node that has
        # gone would keep the memory around it.
        self._clock: OrderedDict[Node, None] = OrderedDict()
        # Those of them that are on other mounts than the source's own.
        self._visitors: OrderedDict[Node, None] = OrderedDict()
        self.on_visit: Callable[[], None] = _nothing  # there is one, any thread, no lock held

    def __len__(self) -> int:
        return len(self._fids)

    # Numbers

    def new_number(self) -> int:
        """A fid number for a file handle: 2**64 and up, never given twice."""
        return next(self._handles)

    def set_root(self, root: Attributes) -> None:
        """Make a source directory the one that numbers are given for.

        Args:
            root: its attributes.
        """
        new = (root.dev_major, root.dev_minor), root.ino
        if new != self._root:  # else numbers given already stay as they are
            self._root = new
            self._paths = QidPaths(root, self.devices)

    def path_of(self, a: Attributes) -> int:
        """The qid path of a file of the source."""
        if self._root == ((a.dev_major, a.dev_minor), a.ino) and not self.devices.aside(a):
            return a.ino
        assert self._paths is not None
        return self._paths.path(a)

    def number_apart(self, device: Device, inode: int) -> int:
        """A number to show a file with of which nothing but its inode number is known."""
        assert self._paths is not None
        return self._paths.unknown(device, inode)

    def qid_of(self, a: Attributes) -> Qid:
        """The qid of a file of the source."""
        return qid_of(self.path_of(a), a)

    # References

    def get(self, number: int) -> Fid:
        """Find a fid and reference it; give it back with `put`.

        Raises:
            OSError: not in the table: ESTALE for a nodeid (the kernel then walks the
                path again), EBADF for a file handle.
        """
        # Without the table's lock, since one look into a dictionary is one step for all threads
        # (a `get` with a key that is an int runs none of anybody's code): what is found was in the
        # table at that moment, as it would have been for a reader who came before whoever takes
        # it out just now. It may be in no table any more, but it has not ended as long as it has
        # references, and whoever takes it out drops the table's only afterwards.
        fid = self._fids.get(number)
        if fid is not None:
            with self._counts:
                if fid.refs:
                    fid.refs += 1
                    return fid
        # It has ended, or is not there: perhaps for the moment in which somebody moves it.
        with self.lock.reading:
            fid = self._fids.get(number)
            if fid is None:
                raise error(errno.EBADF if number >= FIRST_HANDLE else errno.ESTALE)
            with self._counts:
                fid.refs += 1
        return fid

    def put(self, fid: Fid) -> None:
        """Drop a reference; the last one ends the fid."""
        with self._counts:
            fid.refs -= 1
            if fid.refs:
                return
        # Only the last one comes here: a fid in the table has the table's reference,
        # and one that has left it gets no new ones.
        if fid.opened is not None and fid.opened.fd >= 0:
            self._defer(self.close_open, fid.opened.fd, fid.opened.owner)
        self.drop(fid.node)

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

    def close_node(self, fd: int) -> None:
        """Close a descriptor that was taken from a node. Blocks."""
        try:
            os.close(fd)
        finally:
            with self._counts:
                self.descriptors -= 1

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
        node = Node(self.path_of(a), a, self.devices.of(a), self.devices.mount_of(a), mark, place)
        if fd >= 0:
            self.give_descriptor(node, fd)
        return node

    def drop(self, node: Node) -> None:
        """Drop a reference to a node; the last one closes its descriptor."""
        with self._counts:
            node.refs -= 1
            if node.refs:
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
            node.refs += 1
            node.pins += 1
            if use:
                node.recent = True
                node.uses = (node.uses + 1) & 0xFF
            return node.fd >= 0

    def unpin(self, node: Node) -> None:
        """Undo `pin`."""
        with self._counts:
            node.pins -= 1
        self.drop(node)

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

    def intern(self, node: Node) -> Fid:
        """Find or make the fid by which the kernel knows a node's file; count a lookup.

        The kernel's number for a file is its qid path (the root's is 1), so that there
        is one such fid for each file, whoever asks.

        Args:
            node: found or made by the caller, who keeps its reference. Another node of
                the same file may be the one in the table; it learns this one's name.

        Returns:
            The fid, not referenced: the lookup just counted keeps it in the table.
        """
        with self.lock.writing:
            number, fid = self._fid_of(node)
            if fid is None:
                fid = Fid(number, node)
                self._fids[number] = fid
                with self._counts:
                    node.refs += 1
            elif not fid.node.is_file_of(node):
                # The file that had this inode number has gone. The kernel gives back the
                # number's lookups together; the new generation tells it that what it
                # has of the old file is not of this one.
                self._move(fid, node)
                fid.generation += 1
            elif fid.node is not node:
                if fid.node.place is not None:  # the root, which may be mounted below itself
                    fid.node.place = node.place
                # What was seen without a descriptor may be of a file that has gone by now.
                is_sure = node.fd >= 0 or fid.node.fd < 0
                if fid.node.mark is None or (type(fid.node.mark) is Rights and is_sure):
                    fid.node.mark = node.mark
                self._share_descriptor(node, fid.node)
            fid.lookups += 1
            grown = len(self._fids) >= self._told + self.step
            if grown:
                self._told = len(self._fids)
        if grown:
            self.on_change()
        return fid

    def known(self, a: Attributes, *, allowing: bool = False) -> Node | None:
        """The node by which the kernel knows a file, referenced (`drop` it), or None.

        Args:
            a: its attributes.
            allowing: only if it is as open to others as it was seen last (`Node.allows`).
        """
        with self.lock.reading:
            fid = self._fids.get(self.path_of(a))
            if fid is None or not fid.node.shows(a) or (allowing and not fid.node.allows(a)):
                return None
            with self._counts:
                fid.node.refs += 1
            return fid.node

    def note_rights(self, a: Attributes, node: Node) -> None:
        """Note what the kernel is about to be told of a node, seen by its descriptor."""
        if type(node.mark) is Rights and not node.allows(a):
            node.mark = self.devices.rights(a)

    def seen(self, a: Attributes, parent: Node, name: bytes) -> None:
        """Note where a file that the kernel may know is found from now on."""
        with self.lock.writing:
            fid = self._fids.get(self.path_of(a))
            if fid is not None and fid.node.shows(a) and fid.node.place is not None:
                fid.node.place = parent, name

    def move(self, fid: Fid, node: Node) -> None:
        """Make an unopened fid stand on another node (walk to itself)."""
        with self.lock.writing:
            self._move(fid, node)

    def open(self, fid: Fid, opened: Opened, node: Node | None = None) -> None:
        """Make an unopened fid an open one, on another node if one is given (lcreate).

        Raises:
            OSError: EINVAL, somebody else opened it meanwhile; ``opened`` is not used.
        """
        with self.lock.writing:
            if fid.opened is not None:
                raise error(errno.EINVAL)
            if node is not None:
                self._move(fid, node)
            fid.opened = opened
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
            raise error(errno.EBADF if number >= FIRST_HANDLE else errno.ESTALE)
        return fid

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

    def clear(self) -> None:
        """Take every fid out of the table (version, and the end of the session)."""
        with self.lock.writing:
            gone, self._fids = self._fids, {}
            self.set_id.clear()
            self._opened = self._files = 0
            if self._paths is not None:
                self._paths.clear()
        for fid in gone.values():
            self.put(fid)
        self.devices.mounts.end()

    def statistics(self) -> TableStatistics:
        """How many fids there are, and of which kind. Anybody may ask for it, any time."""
        return TableStatistics(len(self._fids), self._opened, self._files, self.descriptors)

    # Reclaiming descriptors

    def coldest(
        self, most: int, looks: int | None = None, device: Device | None = None
    ) -> list[Node]:
        """Pin the nodes that have not been used for longest, for their descriptors.

        Only nodes that can be opened again are taken: known to the kernel, with a
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
        with self.lock.reading, self._counts:
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
            with self.lock.reading, self._counts:
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

    # Letting the kernel forget

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

    # Helpers that expect the locks to be held

    def _fid_of(self, node: Node) -> tuple[int, Fid | None]:
        """The number by which the kernel is to know a node's file, and its fid if there is one."""
        assert self._paths is not None
        if (node.device.number, node.inode) == self._root and not node.aside:
            return ROOT_NODEID, self._fids.get(ROOT_NODEID)
        number = node.path = self._paths.path_of(node.device, node.inode, node.aside)
        fid = self._fids.get(number)
        if fid is None or fid.node.has_number_of(node):
            return number, fid
        number = node.path = self._paths.apart(
            node.device, node.inode, node.aside, lambda number: number not in self._fids
        )
        return number, None

    def _count(self, opened: Opened | None, change: int) -> None:
        if opened is not None:
            self._opened += change
            if isinstance(opened, OpenFile):
                self._files += change

    def _leaves(self, fid: Fid) -> None:
        """A fid has left the table: what the table keeps of it goes as well."""
        self._count(fid.opened, -1)
        if fid.number < FIRST_HANDLE and self._paths is not None:
            node = fid.node
            self.set_id.discard(fid.number)
            self._paths.back(node.device, node.inode, node.aside, fid.number)

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

    def _is_cold(self, node: Node) -> bool:
        """Whether nobody uses a node's descriptor, and it can be opened again."""
        if node.pins or node.refs != 1 or node.place is None:
            return False
        fid = self._fids.get(node.path)
        return fid is not None and fid.node is node

    def _give(self, node: Node, fd: int) -> None:
        node.fd = fd
        node.recent = True
        self._clock[node] = None
        if node.mount.number != self.devices.mounts.own or self._is_apart(node):
            self._visitors[node] = None

    def _is_apart(self, node: Node) -> bool:
        return self._root is not None and node.device.number != self._root[0]

    def _take(self, node: Node) -> int:
        fd, node.fd = node.fd, -1
        if fd >= 0:
            del self._clock[node]
            self._visitors.pop(node, None)
        return fd

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
