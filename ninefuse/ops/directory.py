"""Reading directories: readdir, and its form with attributes.

Locks touched: the listing's own mutex; the rename lock, read, by readdirplus, which
remembers the names it found.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import NamedTuple

from ninefuse.commands import blocking
from ninefuse.fids import Fid, OpenDirectory, error
from ninefuse.identity import Mark
from ninefuse.session import Session
from ninefuse.syscalls import Attributes, DirectoryEntry, stat_descriptor

_MOST_ENTRIES = 1024  # in a reply with attributes


class EntryPlus(NamedTuple):
    """A directory entry with what a walk and a getattr of it would have said."""

    name: bytes
    offset: int  # cookie of the entry after this one
    ino: int  # as the directory gives it
    type: int  # DT_*
    attributes: Attributes | None  # None for ``..``, and where there are none to be had
    fid: Fid | None  # the kernel's, a lookup counted; None for ``.``, ``..`` and such a one


async def readdir(session: Session, fid: int, offset: int, count: int) -> list[DirectoryEntry]:
    """Entries of an open directory, ``.`` and ``..`` among them.

    Args:
        session: the conversation.
        fid: a directory, open.
        offset: the cookie of the entry before, 0 to begin (again) at the start.
        count: bytes of 9P records to return at most.

    Returns:
        What fits; an empty list at the end.

    Raises:
        OSError: EINVAL, unopened, or not one entry fits; ENOTDIR, an open file; the
            errors of getdents64(2).

    Source: Treaddir of 9P2000.L.
    """
    use = session.fids.get(fid)
    try:
        return await _entries(use, _open_directory_of(use), offset, count)
    finally:
        session.fids.put(use)


async def readdirplus(session: Session, fid: int, offset: int) -> list[EntryPlus]:
    """Entries with attributes, about as many as the reply before had room for.

    This is Treaddir, and Twalk and Tgetattr of each entry. The nodes it finds have no
    descriptor until they are used. Each entry counts a lookup of its fid, which
    `fitted` takes back for those that found no room.

    Args:
        session: the conversation.
        fid: a directory, open.
        offset: as for readdir.

    Raises:
        OSError: as readdir.

    Locks: the rename lock, read.
    """
    use = session.fids.get(fid)
    try:
        directory = _open_directory_of(use)
        async with session.rename_lock.reading:
            while True:
                found = await _entries(use, directory, offset, sys.maxsize, directory.fits)
                entries = await _entries_plus(session, use, directory, found)
                # None where all of them have gone since they were read is not the end.
                if entries or not found:
                    return entries
                offset = found[-1].offset
    finally:
        session.fids.put(use)


def fitted(session: Session, fid: int, entries: list[EntryPlus], fit: int) -> None:
    """Note how many entries found room in the reply; take the others' lookups back."""
    session.fids.forget([(e.fid.number, 1) for e in entries[fit:] if e.fid is not None])
    try:
        use = session.fids.get(fid)
    except OSError:
        return
    if isinstance(use.opened, OpenDirectory) and fit:
        # All fitted: there may be room for more. Else the next reply will be as full.
        if fit < len(entries):
            use.opened.fits = fit
        else:
            use.opened.fits = max(use.opened.fits, min(2 * fit, _MOST_ENTRIES))
    session.fids.put(use)


async def _entries(
    use: Fid, directory: OpenDirectory, offset: int, count: int, most: int = sys.maxsize
) -> list[DirectoryEntry]:
    return await blocking(use.node.path, directory.listing.read, offset, count, most)


async def _entries_plus(
    session: Session, use: Fid, directory: OpenDirectory, found: list[DirectoryEntry]
) -> list[EntryPlus]:
    entries: list[EntryPlus] = []
    try:
        for entry in found:
            plus = await _entry_plus(session, use, directory, entry)
            if plus is not None:
                entries.append(plus)
    except BaseException:
        # No reply will tell of the lookups counted so far.
        session.fids.forget([(e.fid.number, 1) for e in entries if e.fid is not None])
        raise
    return entries


async def _entry_plus(
    session: Session, use: Fid, directory: OpenDirectory, entry: DirectoryEntry
) -> EntryPlus | None:
    if entry.name == b"..":
        return EntryPlus(entry.name, entry.offset, entry.ino, entry.type, None, None)
    if entry.name == b".":
        return await _stat_itself(use, directory, entry)
    return await _walk_entry(session, use, directory, entry)


async def _stat_itself(use: Fid, directory: OpenDirectory, entry: DirectoryEntry) -> EntryPlus:
    """getattr of the directory, for its own entry."""
    attributes = await blocking(use.node.path, stat_descriptor, directory.fd)
    return EntryPlus(entry.name, entry.offset, entry.ino, entry.type, attributes, None)


async def _walk_entry(
    session: Session, use: Fid, directory: OpenDirectory, entry: DirectoryEntry
) -> EntryPlus | None:
    """walk to an entry and getattr of it, which are a single call; None if it has gone."""
    on = use.node.path
    ino, offset, kind, name = entry
    try:
        attributes, mark = await blocking(on, _stat_entry, session, directory.fd, name)
    except FileNotFoundError:
        return None  # removed since it was read
    except OSError:
        # A dead mount, say, or one that is somebody else's: it has a name all the same.
        # Nothing is known of it by the number it is shown with, so a forget of that is
        # passed over.
        device = use.node.device
        return EntryPlus(name, offset, session.fids.number_apart(device, ino), kind, None, None)
    node = session.fids.new_node(attributes, -1, (use.node, name), mark)
    try:
        found = session.fids.intern(node)
    finally:
        session.fids.drop(node)
    return EntryPlus(name, offset, ino, stat.S_IFMT(attributes.mode) >> 12, attributes, found)


def _stat_entry(session: Session, directory: int, name: bytes) -> tuple[Attributes, Mark]:
    attributes = session.stat_name(directory, name)
    if attributes.is_mount_root:
        attributes = _learn(session, directory, name)
    return attributes, session.fids.devices.mark(attributes, directory, name)


def _learn(session: Session, directory: int, name: bytes) -> Attributes:
    """Have what is mounted on a name learned; the attributes of its root."""
    fd = session.open_step(directory, name)
    try:
        attributes = stat_descriptor(fd)
        session.fids.devices.learn(fd, attributes)
    finally:
        os.close(fd)
    return attributes


def _open_directory_of(fid: Fid) -> OpenDirectory:
    if isinstance(fid.opened, OpenDirectory):
        return fid.opened
    raise error(errno.EINVAL if fid.opened is None else errno.ENOTDIR)
