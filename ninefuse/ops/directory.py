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

from ninefuse.calls import blocking, brief
from ninefuse.errors import error
from ninefuse.linux.records import DirectoryEntry
from ninefuse.linux.syscalls import Attributes, stat_descriptor
from ninefuse.tree.identity import Mark
from ninefuse.tree.opened import OpenDirectory
from ninefuse.tree.session import MOST_TRIES, Session
from ninefuse.tree.table import Fid

_MOST_ENTRIES = 1024  # in a reply with attributes
_AT_ONCE = 64  # of which so many are noted while the rename lock is held


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
    session.kernel.forget([(e.fid.number, 1) for e in entries[fit:] if e.fid is not None])
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
        for at in range(0, len(found), _AT_ONCE):
            piece = found[at : at + _AT_ONCE]
            for tries in range(MOST_TRIES, 0, -1):
                moves = session.rename_lock.moves
                looks = [await _look_at(session, use, directory, entry) for entry in piece]
                async with session.rename_lock.reading:
                    # Else names were moved since they were looked at: perhaps these.
                    if moves == session.rename_lock.moves or tries == 1:
                        for look in filter(None, looks):
                            entries.append(_entry_plus(session, use, look))  # noqa: PERF401
                        break
    except BaseException:
        # No reply will tell of the lookups counted so far.
        session.kernel.forget([(e.fid.number, 1) for e in entries if e.fid is not None])
        raise
    return entries


class _Look(NamedTuple):
    """What was seen of an entry."""

    entry: DirectoryEntry
    attributes: Attributes | None = None
    mark: Mark = None


async def _look_at(
    session: Session, use: Fid, directory: OpenDirectory, entry: DirectoryEntry
) -> _Look | None:
    if entry.name == b"..":
        return _Look(entry)
    if entry.name == b".":
        return await _stat_itself(use, directory, entry)
    return await _walk_entry(session, use, directory, entry)


async def _stat_itself(use: Fid, directory: OpenDirectory, entry: DirectoryEntry) -> _Look:
    """getattr of the directory, for its own entry."""
    return _Look(entry, await brief(use.node.path, stat_descriptor, directory.fd))


async def _walk_entry(
    session: Session, use: Fid, directory: OpenDirectory, entry: DirectoryEntry
) -> _Look | None:
    """walk to an entry and getattr of it, which are a single call; None if it has gone."""
    on = use.node.path
    try:
        return _Look(entry, *await blocking(on, _stat_entry, session, directory.fd, entry.name))
    except FileNotFoundError:
        return None  # removed since it was read
    except OSError:
        return _Look(entry)


def _entry_plus(session: Session, use: Fid, look: _Look) -> EntryPlus:
    """What the reply says of an entry that was seen; a lookup is counted."""
    (ino, offset, kind, name), attributes, mark = look
    if name in (b".", b".."):
        # The number that it is known by, which may be another than the one listed.
        node, place = use.node, use.node.place
        if place is not None:
            ino = node.path if name == b"." else place[0].path
        return EntryPlus(name, offset, ino, kind, attributes, None)
    if attributes is None:
        # A dead mount, say, or one that is somebody else's: it has a name all the same.
        # Nothing is known of it by the number it is shown with, so a forget of that is
        # passed over.
        device = use.node.device
        return EntryPlus(name, offset, session.fids.number_apart(device, ino), kind, None, None)
    node = session.fids.new_node(attributes, -1, (use.node, name), mark)
    try:
        found = session.kernel.intern(node)
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
