"""What the operations of one mount share: the fid table, the rename lock, the rules.

Also the one way to a node's descriptor: `using` pins it, and has it opened again where it
was reclaimed or never made.

Locks touched: the fid table's, through table.py; the rename lock, read, by `remember`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from ninefuse.calls import Body, Later, blocking
from ninefuse.errors import error
from ninefuse.linux.mountinfo import OwnMount
from ninefuse.linux.syscalls import Attributes, open_step, stat_name
from ninefuse.locks import RenameLock
from ninefuse.tree.clients import BothTable, ClientsTable
from ninefuse.tree.descriptors import MOST, Descriptors
from ninefuse.tree.filelocks import FileLocks
from ninefuse.tree.kernel import KernelTable
from ninefuse.tree.nodes import Node
from ninefuse.tree.order import Names, Ranges
from ninefuse.tree.table import Fid, FidTable

T = TypeVar("T")

NAME_MAX = 255  # bytes
_LAST_OFFSET = (1 << 63) - 1
PERMISSIONS = 0o7777  # mode bits besides the type: set-user-id and the like are among them
SET_ID = stat.S_ISUID | stat.S_ISGID

# How often names are looked at that are being moved; at last while each is taken (`Names`).
MOST_TRIES = 4
_GRACE = 5.0  # seconds beyond the time after which the kernel breaks a lease


class Background(Protocol):
    """What a session needs of its driver: to have things done after a body."""

    @property
    def has_deferred(self) -> bool: ...

    def defer(self, function: Callable[..., object], *args: object) -> None: ...

    def in_background(self, name: str, body: Body[None]) -> None: ...


class Session:
    """One client's view of one source directory.

    Args:
        driver: makes deferred calls and runs bodies nobody waits for (an Executor).
        kernel: whether the client is a kernel, which looks files up and forgets them; else there
            may be many, which give each fid its number themselves, as 9P has it.
        clients: whether there may be such ones beside a kernel.
        read_only: refuse what would change the source, with EROFS.
        sync_directories: make changes of a directory durable before they are
            acknowledged (mount(8)'s sync and dirsync).
        most_descriptors: O_PATH descriptors to keep for nodes, where the process's limit on
            open files leaves so many; each keeps an inode of the source in memory.
        threads: how many make calls at the same time.
        attr_timeout: seconds for which attributes may be believed.

    Attributes:
        fids: its fids.
        kernel: the same table, if the client is a kernel.
    """

    fids: FidTable
    kernel: KernelTable

    def __init__(
        self,
        driver: Background,
        *,
        kernel: bool = True,
        clients: bool = False,
        read_only: bool = False,
        sync_directories: bool = False,
        most_descriptors: int = MOST,
        threads: int = 1,
        attr_timeout: float = 0.0,
    ) -> None:
        self.attr_timeout = attr_timeout
        self.announces = False  # whether operations say which message they are (`Begin`)
        self._driver = driver
        self.defer = driver.defer
        if kernel:
            self.fids = self.kernel = (BothTable if clients else KernelTable)(driver.defer)
        else:
            self.fids = ClientsTable(driver.defer)
        self.rename_lock = RenameLock()
        self.ranges = Ranges()
        self.names = Names()
        self.file_locks = FileLocks()
        self.read_only = read_only
        # Whether the mount that the requests come by has been made writable since.
        self.has_become_writable: Callable[[], bool] = bool
        self.sync_directories = sync_directories
        # Whether reads leave the access times alone, of all and of directories.
        self.noatime = self.nodiratime = False
        # Has them changed where the mount that the requests come by was changed.
        self.look_at_mount: Callable[[], object] = bool
        self.own_mount: OwnMount | None = None  # by which the requests come, if by one
        # Whether the client believes for long what it was told, and is to be told nothing twice.
        self.is_believed = False
        # Tells the client that the attributes of a fid's file are others than it believes. For
        # a fid that a request under way was made with: then it waits for nobody.
        self.attributes_changed: Callable[[int], object] = _nobody_believes
        self.descriptors = Descriptors(
            self.fids,
            driver.in_background,
            self.stat_name,
            self.open_step,
            most=most_descriptors,
            threads=threads,
        )
        self.msize = 0  # bytes of a message, agreed by version

    def using(self, number: int, *, looking: bool = False) -> Use:
        """``async with session.using(fid) as use``: reference a fid, pin its node.

        Inside, ``use.fid`` is the fid, ``use.node`` its node and ``use.fd`` the node's
        O_PATH descriptor.

        Args:
            number: the fid.
            looking: whether only attributes are wanted (`Descriptors.reopen`).

        Raises:
            OSError: unknown fid (see `FidTable.get`); ESTALE where the node had no
                descriptor and its name leads to it no more.
        """
        return Use(self, number, looking)

    def using_node(self, node: Node) -> UseNode:
        """``async with session.using_node(node)``: as `using`, for a node held already."""
        return UseNode(self, node)

    async def reopen(self, node: Node, looking: bool = False) -> None:
        """Give a pinned node its descriptor again, by the names that it remembers.

        Args:
            node: it.
            looking: as for `Descriptors.reopen`.

        Raises:
            OSError: ESTALE, they do not lead there any more; ENFILE.
        """
        reopen = self.descriptors.reopen
        await self.unless_moved(lambda: blocking(node.number, reopen, node, looking))

    async def unless_moved(self, find: Callable[[], Awaitable[T]]) -> T:
        """Await what finds a file by its remembered place; again, if a rename came in between.

        Raises:
            OSError: what ``find`` raises; ESTALE only if no name was moved meanwhile, or
                `MOST_TRIES` times.
        """
        for _ in range(MOST_TRIES - 1):
            moves = self.rename_lock.moves
            try:
                return await find()
            except OSError as e:
                if e.errno != errno.ESTALE or moves == self.rename_lock.moves:
                    raise
        return await find()

    def writable(self) -> None:
        """Refuse with EROFS on a read-only session."""
        if self.read_only and not self.has_become_writable():
            raise error(errno.EROFS)

    def stat_name(self, directory: int, name: bytes) -> Attributes:
        """The attributes of a name in a directory; a symlink is not followed. Blocks.

        Raises:
            OSError: ELOOP, the name leads into the mount that the requests come by; the errors
                of statx(2).
        """
        if self.own_mount is not None:
            self.own_mount.refuse(directory, name)
        return stat_name(directory, name)

    def open_step(self, directory: int, name: bytes) -> int:
        """An O_PATH descriptor of a name in a directory; a symlink is not followed. Blocks.

        Raises:
            OSError: as stat_name; the errors of open(2).
        """
        if self.own_mount is not None:
            self.own_mount.refuse(directory, name)
        return open_step(directory, name)

    def keeping(self, directory: Node, name: bytes) -> Keeping:
        """``async with session.keeping(directory, name) as node``, around taking the name away.

        The file behind the name gets its descriptor, if the kernel knows the file, and
        keeps it: without, it could not be opened again while the name goes, or after, but
        the kernel may still use it. ``node`` is None if the kernel does not know it.
        """
        return Keeping(self, directory, name)

    async def remember(self, node: Node, directory: Node, name: bytes) -> None:
        """Note that a file is to be found by this name from now on.

        Locks: the rename lock, read.
        """
        async with self.rename_lock.reading:
            node.place = directory, name

    async def claim_descriptor(self, near: Node, owner: int | None = None) -> None:
        """See that an open fid can have a descriptor; `FidTable.close_open` is its end.

        Where all are in use, it waits a little for those that are about to be closed.

        Args:
            near: a node of the device that it is about to be opened on.
            owner: the user id of who opens it, whose share is bounded; None: nobody's.

        Raises:
            OSError: ENFILE, too many are in use; EINTR, EAGAIN: see `Later`.
        """
        for tries in range(MOST_TRIES):
            try:
                await self._claim(near, owner)
                return
            except OSError as e:
                # Who closes a file is told that it is closed before its descriptor is.
                if e.errno != errno.ENFILE or not self._driver.has_deferred:
                    raise
            await Later(tries=tries)
        await self._claim(near, owner)

    async def _claim(self, near: Node, owner: int | None) -> None:
        self.descriptors.claim(owner)
        if self.descriptors.are_short:
            try:
                await blocking(near.number, self.descriptors.make_room_for_open, near)
            except BaseException:
                self.fids.unclaim(owner)
                raise

    async def settle(self, directory: Node) -> None:
        """Make what was changed in a directory durable, where the mount asks for it."""
        if self.sync_directories:
            await blocking(directory.number, _sync_directory, directory.fd)


class Keeping:
    """The file behind a name, pinned while the name goes away; `Session.keeping`."""

    __slots__ = ("_directory", "_name", "_node", "_session")

    def __init__(self, session: Session, directory: Node, name: bytes) -> None:
        self._session = session
        self._directory = directory
        self._name = name
        self._node: Node | None = None

    async def __aenter__(self) -> Node | None:
        session, directory, fids = self._session, self._directory, self._session.fids
        try:
            a = await blocking(directory.number, session.stat_name, directory.fd, self._name)
        except FileNotFoundError:
            return None
        node = fids.known(a)
        if node is None:
            return None
        has_descriptor = fids.pin(node)
        fids.drop(node)  # the pin's reference is enough
        self._node = node
        if not has_descriptor:
            try:
                open_named = session.descriptors.open_named
                await blocking(directory.number, open_named, directory, self._name, node)
            except BaseException:
                fids.unpin(node)
                raise
            session.descriptors.note()
        return node

    async def __aexit__(self, *exc: object) -> None:
        if self._node is not None:
            self._session.fids.unpin(self._node)


class UseNode:
    """A node referenced and pinned, for an ``async with`` block; `Session.using_node`."""

    __slots__ = ("_session", "node")

    def __init__(self, session: Session, node: Node) -> None:
        self._session = session
        self.node = node

    async def __aenter__(self) -> Node:
        session, node = self._session, self.node
        if not session.fids.pin(node):
            await _open_pinned(session, node)
        return node

    async def __aexit__(self, *exc: object) -> None:
        self._session.fids.unpin(self.node)


class Use:
    """A fid referenced and its node pinned, for an ``async with`` block; `Session.using`.

    Attributes:
        fid: the fid.
        node: the node that it stood on when the block was entered: it may be moved to another.
    """

    __slots__ = ("_looking", "_number", "_session", "fid", "node")

    fid: Fid
    node: Node

    def __init__(self, session: Session, number: int, looking: bool) -> None:
        self._session = session
        self._number = number
        self._looking = looking

    async def __aenter__(self) -> Use:
        fids = self._session.fids
        self.fid = fids.get(self._number)
        self.node = self.fid.node
        if not fids.pin(self.node):
            try:
                await _open_pinned(self._session, self.node, self._looking)
            except BaseException:
                fids.put(self.fid)
                raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        fids = self._session.fids
        fids.unpin(self.node)
        fids.put(self.fid)

    @property
    def fd(self) -> int:
        """The node's O_PATH descriptor."""
        return self.node.fd


async def _open_pinned(session: Session, node: Node, looking: bool = False) -> None:
    """Give a node that was just pinned its descriptor again; where that fails, unpin it."""
    try:
        await session.reopen(node, looking)
        session.descriptors.note()
    except BaseException:
        session.fids.unpin(node)
        raise


def _nobody_believes(fid: int) -> None:
    """A client that does not keep attributes need not be told that they have changed."""


async def patiently(ask: Callable[[], Awaitable[T]], *, is_withdrawable: bool = True) -> T:
    """Await what answers EAGAIN while somebody holds a lease on the file, until he gives it up.

    Whoever asks so begins to break the lease, which the kernel ends after a time
    (fcntl(2), F_SETLEASE). No thread waits meanwhile.

    Args:
        ask: makes a call in the form that does not wait (O_NONBLOCK).
        is_withdrawable: whether the wait may end in EINTR (`Later`).

    Raises:
        OSError: what ``ask`` raises; EAGAIN, nobody has given up anything in that time; EINTR, the
            request was withdrawn.
    """
    until = None
    while True:
        try:
            return await ask()
        except BlockingIOError:
            now = time.monotonic()
            if until is None:
                until = now + _break_time + _GRACE
            elif now > until:
                raise
        await Later(is_withdrawable=is_withdrawable)


def _lease_break_time() -> int:
    """Seconds after which the kernel breaks a lease (proc(5))."""
    try:
        with open("/proc/sys/fs/lease-break-time", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 45


_break_time = _lease_break_time()  # once: whoever reads the directory can keep others out of it


def _sync_directory(fd: int) -> None:
    # An O_PATH descriptor cannot be synced.
    readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        os.fsync(readable)
    finally:
        os.close(readable)


def check_offset(*offsets: int) -> None:
    """Refuse what is no place in a file, or no size of one, with EINVAL: off_t has 63 bits."""
    for offset in offsets:
        if not 0 <= offset <= _LAST_OFFSET:
            raise error(errno.EINVAL)


def check_component(name: bytes, *, illegal: int = errno.EINVAL) -> None:
    """Refuse what is not one name in a directory.

    Args:
        name: a path component.
        illegal: the errno for an empty name and for one with a slash or a zero byte.

    Raises:
        OSError: ``illegal``; ENAMETOOLONG, over 255 bytes.
    """
    if not name or b"/" in name or b"\0" in name:
        raise error(illegal)
    if len(name) > NAME_MAX:
        raise error(errno.ENAMETOOLONG)


def check_new_name(name: bytes) -> None:
    """Refuse a name that nothing can be made under; EEXIST for ``.`` and ``..``."""
    check_component(name)
    if name in (b".", b".."):
        raise error(errno.EEXIST)


def check_directory(node: Node) -> None:
    """Refuse a node that is not a directory, with ENOTDIR."""
    if node.kind != stat.S_IFDIR:
        raise error(errno.ENOTDIR)
