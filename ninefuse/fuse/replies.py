"""How the native session answers: for each kind of result, its encoding, and what is taken back.

The kernel may have no use for an answer any more, since its caller is gone. What the answer gave
away is taken back then: a lookup that was counted, a file that was opened.

Locks touched: the fid table's, where lookups are taken back. Any thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ninefuse.calls import Body
from ninefuse.errors import error
from ninefuse.fuse import callbacks
from ninefuse.fuse import opcodes as op
from ninefuse.fuse._message import Message
from ninefuse.fuse._wire import Device, Entries
from ninefuse.fuse.answers import Opens, without_statistics
from ninefuse.fuse.entries import EntryPlus, fitted
from ninefuse.fuse.handles import Files, Handle, Made
from ninefuse.fuse.shown import Shown
from ninefuse.linux.records import DirectoryEntry
from ninefuse.linux.syscalls import Attributes
from ninefuse.ops.locking import LockRange
from ninefuse.settings import Settings
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid

LAST_BYTE = (1 << 63) - 1  # of a lock to the end of a file, however it grows

Found = tuple[Fid, Attributes]


class Replies:
    """The answers of one mount. Each returns whether somebody took it.

    Args:
        device: on which they go.
        session: the conversation.
        settings: of the mount.
        background: has a body run that nobody waits for (`Executor.in_background`).
        files: what closes files.
    """

    def __init__(
        self,
        device: Device,
        session: Session,
        settings: Settings,
        background: Callable[[str, Body[None]], None],
        files: Files = callbacks,
    ) -> None:
        self.device = device
        self.session = session
        self.shown = Shown(session, settings)
        self.opens = Opens(settings)
        self.background = background
        self.files = files
        # Called with the kernel's number of a handle that it is about to be told.
        self.opened: Callable[[int], None] = _nothing
        self._keep_cache = op.FOPEN_KEEP_CACHE if settings.keep_cache else 0

    def nothing(self, m: Message, result: object) -> bool:
        return self.device.empty(m.unique)

    def no_reply(self, m: Message, result: object) -> bool:
        return True  # nobody waits

    def entry(self, m: Message, found: Found) -> bool:
        return self.device.entry(m.unique, *self.shown.entry(*found))

    def attributes(self, m: Message, found: Attributes) -> bool:
        return self.device.attributes(
            m.unique, self.shown.believed(m.nodeid), *self.shown.attributes(m.nodeid, found)
        )

    def statx(self, m: Message, found: Attributes) -> bool:
        return self.device.statx(
            m.unique, self.shown.believed(m.nodeid), *self.shown.attributes(m.nodeid, found)
        )

    def data(self, m: Message, data: bytes) -> bool:
        return self.device.data(m.unique, data)

    def count(self, m: Message, count: int) -> bool:
        return self.device.count(m.unique, count)

    def number(self, m: Message, number: int) -> bool:
        return self.device.number(m.unique, number)

    def open(self, m: Message, handle: Handle) -> bool:
        return self.device.opened(m.unique, *self._opened(handle, m.args[0]))

    def opendir(self, m: Message, handle: int) -> bool:
        return self.device.opened(m.unique, handle - FIRST_HANDLE, 0)

    def create(self, m: Message, made: Made) -> bool:
        handle, fid, attributes = made
        return self.device.created(
            m.unique, *self.shown.entry(fid, attributes), *self._opened(handle, m.args[1])
        )

    def statfs(self, m: Message, found: os.statvfs_result) -> bool:
        return self.device.file_system(
            m.unique,
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            found.f_bsize,
            found.f_frsize,
            found.f_namemax,
        )

    def lock(self, m: Message, found: LockRange) -> bool:
        end = found.start + found.length - 1 if found.length else LAST_BYTE
        return self.device.lock(m.unique, found.start, end, found.type, max(found.pid, 0))

    def ioctl(self, m: Message, data: bytes) -> bool:
        return self.device.controlled(m.unique, data)

    def readdir(self, m: Message, found: list[DirectoryEntry]) -> bool:
        reply = Entries(m.args[2])
        for entry in found:
            if not reply.add(entry.name, entry.ino, entry.offset, entry.type):
                break
        return self.device.data(m.unique, reply.reply)

    def readdirplus(self, m: Message, found: list[EntryPlus]) -> bool:
        reply = Entries(m.args[2])
        fit, taken = 0, False
        try:
            for entry in found:
                if not self._add(reply, entry):
                    break
                fit += 1
            taken = self.device.data(m.unique, reply.reply)
        finally:
            # Of what nobody was told all lookups are taken back.
            fitted(self.session, FIRST_HANDLE + m.args[0], found, fit if taken else 0)
        return taken

    def value(self, m: Message, value: bytes) -> bool:
        return self._sized(m, m.args[1], value)

    def names(self, m: Message, names: list[bytes]) -> bool:
        shown = without_statistics(m.nodeid, names)
        return self._sized(m, m.args[0], b"".join(name + b"\0" for name in shown))

    # What is taken back

    def undo_entry(self, m: Message, found: Found) -> None:
        self._forget(found[0])

    def undo_open(self, m: Message, handle: Handle) -> None:
        self.background("release", self.files.release(self.session, handle.number))

    def undo_opendir(self, m: Message, handle: int) -> None:
        self.background("release", callbacks.releasedir(self.session, handle))

    def undo_create(self, m: Message, made: Made) -> None:
        handle, fid, _ = made
        self._forget(fid)
        self.undo_open(m, handle)

    def _opened(self, handle: Handle, flags: int) -> tuple[int, int, int]:
        """The kernel's number of a handle, how it is to use it, and the backing id."""
        how = self._keep_cache
        if handle.backing:
            how = op.FOPEN_PASSTHROUGH  # which is not to be said with the other
        elif self.opens.are_direct(flags):
            how |= op.FOPEN_DIRECT_IO | op.FOPEN_PARALLEL_DIRECT_WRITES
        if handle.is_live:
            how |= op.FOPEN_DIRECT_IO
        number = handle.number - FIRST_HANDLE
        self.opened(number)
        return number, how, handle.backing

    def _add(self, reply: Entries, entry: EntryPlus) -> bool:
        if entry.fid is None or entry.attributes is None:  # it is looked up when it is used
            return reply.add_plus(
                entry.name, entry.ino, entry.offset, entry.type, 0, 0, 0.0, 0.0, None
            )
        nodeid, generation, entry_valid, attr_valid, ino, a = self.shown.entry(
            entry.fid, entry.attributes
        )
        return reply.add_plus(
            entry.name,
            ino,
            entry.offset,
            entry.type,
            nodeid,
            generation,
            entry_valid,
            attr_valid,
            a,
        )

    def _sized(self, m: Message, room: int, value: bytes) -> bool:
        """Answer with a value, or with its size where that is asked for."""
        if not room:
            return self.device.count(m.unique, len(value))
        if len(value) > room:
            raise error(errno.ERANGE)
        return self.device.data(m.unique, value)

    def _forget(self, fid: Fid) -> None:
        self.session.kernel.forget([(fid.number, 1)])


def _nothing(handle: int) -> None:
    """Nobody wants to know of handles."""
