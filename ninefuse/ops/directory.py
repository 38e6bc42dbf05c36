"""Reading directories: readdir, and a look at what an entry leads to.

Locks touched: the listing's own mutex.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import NamedTuple

from ninefuse.calls import Begin, blocking, brief
from ninefuse.errors import error
from ninefuse.linux.records import DirectoryEntry
from ninefuse.linux.syscalls import Attributes, stat_descriptor
from ninefuse.tree.identity import Mark
from ninefuse.tree.opened import OpenDirectory
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid


class Look(NamedTuple):
    """What a walk to an entry and a getattr of it would have said."""

    entry: DirectoryEntry
    attributes: Attributes | None = None  # None for ``..``, and where there are none to be had
    mark: Mark = None


async def readdir(
    session: Session, fid: int, offset: int, count: int, most: int = sys.maxsize
) -> list[DirectoryEntry]:
    """Entries of an open directory, ``.`` and ``..`` among them.

    Args:
        session: the conversation.
        fid: a directory, open.
        offset: the cookie of the entry before, 0 to begin (again) at the start.
        count: bytes of 9P records to return at most.
        most: entries likewise.

    Returns:
        What fits; an empty list at the end.

    Raises:
        OSError: EINVAL, unopened, or not one entry fits; ENOTDIR, an open file; the
            errors of getdents64(2).

    Source: Treaddir of 9P2000.L.
    """
    if session.announces:
        await Begin("readdir", fid)
    use = session.fids.get(fid)
    try:
        directory = open_directory_of(use)
        return await blocking(use.node.number, directory.listing.read, offset, count, most)
    finally:
        session.fids.put(use)


async def readdir_numbered(
    session: Session, fid: int, offset: int, count: int, *, leaves: bool = True
) -> list[DirectoryEntry]:
    """readdir, with the numbers by which clients know the files (qid paths) in `ino`.

    Args:
        session, fid, offset, count: as of `readdir`.
        leaves: whether ``..`` of the root is shown as what is outside; else it is the root.

    Raises:
        OSError: as `readdir`.
    """
    use = session.fids.get(fid)
    try:
        found = await readdir(session, fid, offset, count)
        file_system = use.node.device.file_system
        if file_system is None or not file_system.is_overlay:
            return [
                entry._replace(ino=_listed_number(session, use, entry, leaves)) for entry in found
            ]
        # Its files may be of several devices: which one, their names alone do not tell.
        directory = open_directory_of(use)
        looks = [await look_at(session, use, directory, entry) for entry in found]
        return [_numbered(session, use, look, leaves) for look in looks if look is not None]
    finally:
        session.fids.put(use)


def own_number(use: Fid, entry: DirectoryEntry, leaves: bool = True) -> int:
    """The number that ``.`` or ``..`` is known by, which may be another than the one listed."""
    node, place = use.node, use.node.place
    if place is None:
        return entry.ino if leaves else node.number
    return node.number if entry.name == b"." else place[0].number


def _listed_number(session: Session, use: Fid, entry: DirectoryEntry, leaves: bool) -> int:
    """The number that an entry is known by, if nothing is mounted on it."""
    if entry.name in (b".", b".."):
        return own_number(use, entry, leaves)
    return session.fids.number_listed(use.node, entry.ino, entry.type << 12)


def _numbered(session: Session, use: Fid, look: Look, leaves: bool) -> DirectoryEntry:
    """An entry that was seen, with the number that it is known by."""
    entry, attributes, _ = look
    if attributes is None or entry.name in (b".", b".."):
        return entry._replace(ino=_listed_number(session, use, entry, leaves))
    return entry._replace(ino=session.fids.number_of(attributes))


async def look_at(
    session: Session, use: Fid, directory: OpenDirectory, entry: DirectoryEntry
) -> Look | None:
    """See what an entry of a directory leads to, with no fid for it; None if it has gone.

    Args:
        session: the conversation.
        use: the directory's fid, referenced.
        directory: what it has open.
        entry: one that was read from it.

    Raises:
        OSError: of the entry ``.``, those of statx(2).
    """
    if entry.name == b"..":
        return Look(entry)
    if entry.name == b".":
        if session.announces:
            await Begin("getattr", use.number)
        return Look(entry, await brief(use.node.number, stat_descriptor, directory.fd))
    return await _walk_entry(session, use, directory, entry)


async def _walk_entry(
    session: Session, use: Fid, directory: OpenDirectory, entry: DirectoryEntry
) -> Look | None:
    """walk to an entry and getattr of it, which are a single call; None if it has gone."""
    if session.announces:
        await Begin("walk", use.number)
        await Begin("getattr")
    on = use.node.number
    try:
        return Look(entry, *await blocking(on, _stat_entry, session, directory.fd, entry.name))
    except FileNotFoundError:
        return None  # removed since it was read
    except OSError:
        return Look(entry)


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


def open_directory_of(fid: Fid) -> OpenDirectory:
    """The directory that a fid has open.

    Raises:
        OSError: EINVAL, unopened; ENOTDIR, an open file.
    """
    if isinstance(fid.opened, OpenDirectory):
        return fid.opened
    raise error(errno.EINVAL if fid.opened is None else errno.ENOTDIR)
