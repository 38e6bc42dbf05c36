"""Files that the kernel reads, writes and maps itself (-o data=kernel, FOPEN_PASSTHROUGH).

An open is answered with a *backing id*: a number that the kernel has given, by an ioctl on the
FUSE device, to a file of the source. By that it opens the source's file itself, and asks us for
names and attributes only. What the kernel wants of it (Linux fs/fuse/iomode.c, passthrough.c):

* An inode's handles have one id, all that are open at the same time, or none has: else an open is
  EIO. So whoever opens a file first decides, those who follow join him, and the id goes with the
  last of them. Before the kernel sends RELEASE it has let go of the handle's.
* What reads and writes by an id has the rights of the thread that asked for it. The id is asked
  for with the ids of who opens the file (`spending_as`), so that reserved blocks are reserved,
  and set-id bits go. Of who comes with other ids, and writes, the daemon makes the writes: his
  handle has the id all the same, and FOPEN_DIRECT_IO. So it is for files that have set-id bits
  when they are opened, since some writers may leave them, and for writes with -o sync.
* The kernel believes its attributes of a file, though mapped pages, or who shares the file with
  its writers on the source, may have changed it. So it is told that these hold for no time
  (`FidTable.passed`) from the first open for writing on, to the last close; or to its being
  forgotten, if it may be mapped for writing.

Locks touched: the mutex of the backings, an innermost one. No call is made with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading

from ninefuse.calls import brief
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse import callbacks
from ninefuse.fuse.handles import Handle, Made, or_clunk
from ninefuse.linux.callers import Caller, needs_acting
from ninefuse.linux.credentials import spending_as
from ninefuse.linux.syscalls import proc_path
from ninefuse.settings import Settings
from ninefuse.tree.identity import Rights
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import OpenFile
from ninefuse.tree.session import SET_ID, Session
from ninefuse.tree.table import open_file_of

log = logging.getLogger(__name__)

_MAP = struct.Struct("=iIQ")  # struct fuse_backing_map: descriptor, flags, padding
_ID = struct.Struct("=I")
_BACKING_OPEN = 1 << 30 | _MAP.size << 16 | 229 << 8 | 1  # _IOW(229, 1, …)
_BACKING_CLOSE = 1 << 30 | _ID.size << 16 | 229 << 8 | 2

_READABLE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Backing:
    """What the handles of a file have in common for as long as any is open."""

    __slots__ = ("handles", "id", "is_mappable", "node", "owner")

    def __init__(self, node: Node, owner: tuple[int, int] | None, number: int) -> None:
        self.node = node
        self.owner = owner  # with whose ids the kernel reads and writes; None: with the daemon's
        self.id = number  # 0: the kernel asks us for the data
        self.handles = 0
        self.is_mappable = False  # whether it may have been mapped for writing


class Backings:
    """What opens and closes files where the kernel is to read and write them; a `Files`.

    Args:
        session: the conversation.
        settings: of the mount.
    """

    def __init__(self, session: Session, settings: Settings) -> None:
        self._session = session
        self._sync = settings.sync
        self._device = -1
        self._how = os.O_PATH | os.O_CLOEXEC  # how a file is opened that it is to be given
        self._mutex = threading.Lock()
        self._by_node: dict[Node, Backing] = {}
        self._by_handle: dict[int, Backing] = {}
        self._told: set[str] = set()  # what the log has

    def passed(self) -> int:
        """How many files the kernel reads and writes itself now."""
        with self._mutex:
            return sum(backing.id > 0 for backing in self._by_node.values())

    def begin(self, device: int) -> None:
        """Try whether the kernel takes files. Once INIT has been answered.

        Args:
            device: the FUSE device.

        Raises:
            Failure: it takes none.
        """
        self._device = device
        probe = os.memfd_create("probe", os.MFD_CLOEXEC)
        try:
            try:
                backing = self._new(probe)
            except OSError as e:
                if e.errno != errno.EBADF:
                    raise
                self._how = _READABLE  # before Linux 6.14 it takes no O_PATH
                backing = self._new(probe)
        except OSError as e:
            text = "-o data=kernel takes CAP_SYS_ADMIN, outside of any user namespace"
            raise Failure(ExitCode.USAGE, f"{text} ({e.strerror})") from None
        finally:
            os.close(probe)
        self._close(backing)

    # ---- as the callbacks of these names --------------------------------------------------------

    async def open(
        self, session: Session, nodeid: int, flags: int, caller: Caller | None = None
    ) -> Handle:
        """`callbacks.open`, and the kernel is given the file."""
        handle = await callbacks.open(session, nodeid, flags, caller)
        given, is_first = await self._given(handle, None, flags, caller)
        if is_first:
            session.attributes_changed(nodeid)
        return given

    async def create(
        self,
        session: Session,
        parent: int,
        name: bytes,
        flags: int,
        mode: int,
        caller: Caller | None = None,
    ) -> Made:
        """`callbacks.create`, and the kernel is given the file."""
        made = await callbacks.create(session, parent, name, flags, mode, caller)
        return await self._given_new(made, flags, caller)

    async def tmpfile(
        self, session: Session, parent: int, flags: int, mode: int, caller: Caller | None = None
    ) -> Made:
        """`callbacks.tmpfile`, and the kernel is given the file."""
        made = await callbacks.tmpfile(session, parent, flags, mode, caller)
        return await self._given_new(made, flags, caller)

    async def release(self, session: Session, handle: int) -> None:
        """`callbacks.release`; with the last handle of a file the kernel gives it back."""
        unused = self._left(handle)
        if unused:
            session.defer(self._close, unused)
        await callbacks.release(session, handle)

    # ---- ids ------------------------------------------------------------------------------------

    async def _given_new(self, made: Made, flags: int, caller: Caller | None) -> Made:
        handle, fid, attributes = made
        try:
            given, _ = await self._given(handle, fid.node, flags, caller)
        except BaseException:
            self._session.kernel.forget([(fid.number, 1)])
            raise
        return given, fid, attributes

    async def _given(
        self, handle: Handle, node: Node | None, flags: int, caller: Caller | None
    ) -> tuple[Handle, bool]:
        """A handle with the id by which the kernel has its file, and whether it had none before.

        Args:
            handle: just opened.
            node: by which the kernel knows the file; None: it is the handle's own. (Of a file that
                was just made the handle has another, if somebody was quicker to look it up.)
            flags: of the open.
            caller: who opens it.
        """
        fids = self._session.fids
        use = fids.get(handle.number)
        try:
            file, known = open_file_of(use), node or use.node
            give = brief(known.number, self._give, handle, file, known, flags, caller)
            return await or_clunk(self._session, use, give)
        finally:
            fids.put(use)

    def _give(
        self, handle: Handle, file: OpenFile, node: Node, flags: int, caller: Caller | None
    ) -> tuple[Handle, bool]:
        if flags & os.O_DIRECT:
            _check_direct(file.fd)
        has_bits = file.writable and os.fstat(file.fd).st_mode & SET_ID
        spender = caller if caller is not None and needs_acting(caller) else None
        owner = None if spender is None else (spender.uid, spender.gid)
        backing, is_first = self._joined(handle, file, node)
        if backing is None:
            new = Backing(node, owner, self._id_for(node, file, spender))
            backing, is_first = self._joined(handle, file, node, new)
            assert backing is not None
            if backing is not new and new.id:
                self._close(new.id)
        if not backing.id:
            return handle, False
        lies_on = node.device.file_system
        if file.writable:
            is_ours = has_bits or self._sync or backing.owner != owner
        else:
            # A server on the network may look at who reads.
            is_ours = backing.owner != owner and (lies_on is None or not lies_on.is_local)
        return handle._replace(backing=backing.id, is_live=bool(is_ours)), is_first

    def _joined(
        self, handle: Handle, file: OpenFile, node: Node, new: Backing | None = None
    ) -> tuple[Backing | None, bool]:
        """Count a handle of a file, whose first one brings ``new``.

        Returns:
            What it has in common with the others, if there is anything; whether the kernel was to
            believe the file's attributes until now.
        """
        passed, is_first = self._session.fids.passed, False
        with self._mutex:
            backing = self._by_node.get(node, new)
            if backing is not None:
                self._by_node[node] = self._by_handle[handle.number] = backing
                backing.handles += 1
                backing.is_mappable |= file.readable and file.writable
                if backing.id and file.writable:
                    is_first = node.number not in passed
                    passed.add(node.number)
        return backing, is_first

    def _left(self, handle: int) -> int:
        """Count a handle that is about to be closed; the id that nobody uses any more, or 0."""
        with self._mutex:
            backing = self._by_handle.pop(handle, None)
            if backing is None:
                return 0
            backing.handles -= 1
            if backing.handles:
                return 0
            del self._by_node[backing.node]
            if not backing.is_mappable:
                self._session.fids.passed.discard(backing.node.number)
            return backing.id

    def _id_for(self, node: Node, file: OpenFile, spender: Caller | None) -> int:
        """A new id for a file; 0 if the daemon is to read and write it."""
        lies_on = node.device.file_system
        if self._session.noatime or (lies_on is not None and lies_on.is_live):
            return 0
        if type(node.mark) is Rights:
            # Two names that lead to one file here may be two of the source.
            self._tell("overlayfs and some others do not tell their files apart")
            return 0
        try:
            return self._new(file.fd, spender)
        except OSError as e:
            deep = "file systems lie on each other more deeply than the kernel allows"
            self._tell(deep if e.errno == errno.ELOOP else e.strerror or str(e))
            return 0

    def _tell(self, why: str) -> None:
        """Say once why files are not given to the kernel."""
        if why not in self._told:
            self._told.add(why)
            log.warning("the daemon reads and writes some files, with data=kernel, too: %s", why)

    def _new(self, file: int, spender: Caller | None = None) -> int:
        # Not the handle's own descriptor: what the kernel is given stays open, and a file that is
        # open for writing cannot be executed.
        fd = os.open(proc_path(file), self._how)
        try:
            if spender is None:
                return self._asked_for(fd)
            return spending_as(spender, None, self._asked_for, fd)
        finally:
            os.close(fd)

    def _asked_for(self, fd: int) -> int:
        backing: int = fcntl.ioctl(self._device, _BACKING_OPEN, bytearray(_MAP.pack(fd, 0, 0)))
        return backing

    def _close(self, backing: int) -> None:
        with contextlib.suppress(OSError):  # there is no mount any more
            fcntl.ioctl(self._device, _BACKING_CLOSE, bytearray(_ID.pack(backing)))


def _check_direct(fd: int) -> None:
    """Refuse O_DIRECT where the source does, with EINVAL: the kernel opens the file by it, too."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
