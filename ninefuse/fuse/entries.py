"""Entries with their attributes, as FUSE's READDIRPLUS wants them, and the room for them.

9P has no such message: it is a readdir, and a walk and a getattr of each entry. The nodes
that it finds have no descriptor until they are used.

Of a client that believes for long what it was told (cache=loose), names that it knows are not
looked at again: it asks by itself when it wants to know more.

Locks touched: the rename lock, read, where names that were found are remembered; the fid
table's.
"""

from __future__ import annotations

import stat
import sys
from typing import NamedTuple

from ninefuse import ops
from ninefuse.linux.records import DirectoryEntry
from ninefuse.linux.syscalls import Attributes
from ninefuse.ops.directory import (
    Look,
    look_at,
    open_directory_of,
    own_number,
    readdir_numbered,
)
from ninefuse.tree.opened import OpenDirectory
from ninefuse.tree.session import MOST_TRIES, Session
from ninefuse.tree.table import Fid

_MOST_ENTRIES = 1024  # in a reply
_AT_ONCE = 64  # of which so many are noted while the rename lock is held


class EntryPlus(NamedTuple):
    """A directory entry with what a walk and a getattr of it would have said."""

    name: bytes
    offset: int  # cookie of the entry after this one
    ino: int  # as the directory gives it
    type: int  # DT_*
    attributes: Attributes | None  # None for ``..``, what is believed, and where none can be had
    fid: Fid | None  # the kernel's, a lookup counted; None for ``.``, ``..`` and such a one


async def readdir(session: Session, handle: int, offset: int, size: int) -> list[DirectoryEntry]:
    """readdir, with the numbers by which the kernel knows the files.

    Args:
        session: the conversation.
        handle: a directory, open.
        offset: as for readdir.
        size: bytes of the reply. A record of the kernel's is a third longer than 9P's at most.

    Raises:
        OSError: as readdir.
    """
    return await readdir_numbered(session, handle, offset, size * 3 // 4)


async def readdirplus(session: Session, handle: int, offset: int) -> list[EntryPlus]:
    """readdir, about as many entries as the reply before had room for; walk and getattr of each.

    Each entry counts a lookup of its fid, which `fitted` takes back for those that found no
    room.

    Args:
        session: the conversation.
        handle: a directory, open.
        offset: as for readdir.

    Raises:
        OSError: as readdir.

    Locks: the rename lock, read.
    """
    use = session.fids.get(handle)
    try:
        directory = open_directory_of(use)
        while True:
            found = await ops.readdir(session, handle, offset, sys.maxsize, directory.fits)
            entries = await _entries_plus(session, use, directory, found)
            # None where all of them have gone since they were read is not the end.
            if entries or not found:
                return entries
            offset = found[-1].offset
    finally:
        session.fids.put(use)


def fitted(session: Session, handle: int, entries: list[EntryPlus], fit: int) -> None:
    """Note how many entries found room in the reply; take the others' lookups back."""
    session.kernel.forget([(e.fid.number, 1) for e in entries[fit:] if e.fid is not None])
    try:
        use = session.fids.get(handle)
    except OSError:
        return
    if isinstance(use.opened, OpenDirectory) and fit:
        # All fitted: there may be room for more. Else the next reply will be as full.
        if fit < len(entries):
            use.opened.fits = fit
        else:
            use.opened.fits = max(use.opened.fits, min(2 * fit, _MOST_ENTRIES))
    session.fids.put(use)


async def _entries_plus(
    session: Session, use: Fid, directory: OpenDirectory, found: list[DirectoryEntry]
) -> list[EntryPlus]:
    entries: list[EntryPlus] = []
    try:
        for at in range(0, len(found), _AT_ONCE):
            piece = found[at : at + _AT_ONCE]
            for _ in range(MOST_TRIES - 1):
                moves = session.rename_lock.moves
                looks: list[Look | EntryPlus | None] = [
                    await _seen(session, use, directory, entry) for entry in piece
                ]
                async with session.rename_lock.reading:
                    # Else names were moved since they were looked at: perhaps these.
                    if moves == session.rename_lock.moves:
                        # One by one: should one fail, those before it are taken back.
                        entries.extend(_entry_plus(session, use, look) for look in looks if look)
                        break
            else:
                # Names are being moved all the time; while it is taken, one of these is not.
                for entry in piece:
                    async with session.names.taking(use.node.number, entry.name):
                        seen = await look_at(session, use, directory, entry)
                        async with session.rename_lock.reading:
                            if seen is not None:
                                entries.append(_entry_plus(session, use, seen))
    except BaseException:
        # No reply will tell of the lookups counted so far.
        session.kernel.forget([(e.fid.number, 1) for e in entries if e.fid is not None])
        raise
    return entries


async def _seen(
    session: Session, use: Fid, directory: OpenDirectory, entry: DirectoryEntry
) -> Look | EntryPlus | None:
    """See what an entry leads to, unless the client believes that it knows; None: it has gone."""
    if session.is_believed and entry.name not in (b".", b".."):
        number = session.fids.number_listed(use.node, entry.ino, entry.type << 12)
        if session.kernel.knows(number, (use.node, entry.name)):
            return EntryPlus(entry.name, entry.offset, number, entry.type, None, None)
    return await look_at(session, use, directory, entry)


def _entry_plus(session: Session, use: Fid, look: Look | EntryPlus) -> EntryPlus:
    """What the reply says of an entry that was seen; a lookup is counted."""
    if isinstance(look, EntryPlus):
        return look
    (ino, offset, kind, name), attributes, mark = look
    if name in (b".", b".."):
        return EntryPlus(name, offset, own_number(use, look.entry), kind, attributes, None)
    if attributes is None:
        # A dead mount, say, or one that is somebody else's: it has a name all the same.
        # Nothing is known of it by the number it is shown with, so a forget of that is
        # passed over.
        device = use.node.device
        return EntryPlus(name, offset, session.fids.number_apart(device, ino), kind, None, None)
    node = session.fids.new_node(attributes, -1, (use.node, name), mark)
    try:
        found = session.kernel.intern(node, (use.node, name))
    finally:
        session.fids.drop(node)
    return EntryPlus(name, offset, ino, stat.S_IFMT(attributes.mode) >> 12, attributes, found)
