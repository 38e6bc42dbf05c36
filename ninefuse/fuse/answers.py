"""What the kernel is told, in no session's types: errnos, and which opens go past its cache.

Locks touched: none.
"""

from __future__ import annotations

import errno
import logging
import os

from ninefuse.driving.counters import ATTRIBUTE
from ninefuse.driving.shares import Holder, Whose
from ninefuse.errors import error
from ninefuse.settings import Settings
from ninefuse.tree.qids import ROOT_NODEID

log = logging.getLogger(__name__)

_SYNC = os.O_SYNC | os.O_DSYNC
_MAX_ERRNO = 4095  # the kernel takes nothing above for an error

# An extended attribute of the root that the source knows nothing of: counters, as JSON.
STATISTICS = os.fsencode(ATTRIBUTE)

# The kernel writes back what one user has changed by a handle that another has opened, and drops
# what is refused; and a close, or a sync, that is refused would say that something was lost.
NOT_REFUSED = frozenset(("write", "flush", "fsync", "fsyncdir"))

# For as long as these take, the kernel keeps the lock of an inode: of the directory, or of the file
# that is changed. (It asks for attributes when it looks who may do something in a directory.)
HOLD_LOCKS = frozenset(
    (
        "create",
        "getattr",
        "getxattr",
        "link",
        "lookup",
        "mkdir",
        "mknod",
        "readdir",
        "readdirplus",
        "removexattr",
        "rename",
        "rmdir",
        "setattr",
        "setxattr",
        "symlink",
        "unlink",
    )
)

# What is short for one caller, or for a moment, and says nothing of the name that he looked up.
_SHORTAGES = frozenset((errno.EAGAIN, errno.EMFILE, errno.ENFILE))


class Opens:
    """How opens are answered, by their flags (docs/caching.md).

    Args:
        settings: of the mount.
    """

    def __init__(self, settings: Settings) -> None:
        self._direct_sync = settings.direct_sync
        self._sync = settings.sync
        self._passes = settings.data == "kernel"

    def are_direct(self, flags: int) -> bool:
        """Whether an open goes past the kernel's page cache."""
        access = flags & os.O_ACCMODE
        # Past the cache a synchronous write is one request, and our descriptor makes it
        # durable; through it, it is three (an xattr, the write, an fsync).
        syncs = self._direct_sync and flags & _SYNC and access != os.O_RDONLY
        # What is appended comes where the source's file ends, which may be elsewhere than where
        # the kernel's cache puts it; who reads, too, is to see it there. (Mapped pages of such a
        # file would be appended when pyfuse3's session writes them back: it does not say which
        # writes are. A direct one cannot be mapped shared there, which is the honest answer.)
        appends = flags & os.O_APPEND and access == os.O_RDWR
        return bool(syncs or appends)

    def kept(self, flags: int) -> int:
        """The flags for our own descriptor of a file."""
        if not self.are_direct(flags) and not self._passes:
            # The kernel sends an fsync after each write to a cached synchronous open: a
            # descriptor that syncs as well would do it twice.
            return flags & ~_SYNC
        # It sends none for a direct one, nor for a mount with -o sync; nor where it has the file,
        # but leaves writes to us (backing.py).
        return flags | os.O_SYNC if self._sync else flags


def errno_for_kernel(failure: OSError) -> int:
    """The errno of an answer: one that the kernel takes for what is meant."""
    code = failure.errno
    if code == errno.ENOSYS:
        # From a callback it would switch the operation off for the whole mount: an
        # ENOSYS on one fsync would silently end durability.
        return errno.EOPNOTSUPP
    if not code or not 0 < code <= _MAX_ERRNO:
        log.error("an error without a usable errno: %r", failure)
        return errno.EIO
    return code


def errno_of(callback: str, code: int) -> int:
    """The errno of a callback's answer, which is no loss to others than the caller.

    A name whose lookup fails is known no more to the kernel, and what is mounted on it or below,
    in any mount namespace, is taken away: but not where the errno is ENOMEM or EINTR.
    """
    return errno.ENOMEM if callback == "lookup" and code in _SHORTAGES else code


def share_of(callback: str, user: int | None) -> Whose:
    """For whom the places are that a callback of a user's takes."""
    return Holder(user) if user and callback in HOLD_LOCKS else user


def is_statistics(nodeid: int, name: bytes) -> bool:
    """Whether this is the attribute `STATISTICS`, which only the root has."""
    return nodeid == ROOT_NODEID and name == STATISTICS


def without_statistics(nodeid: int, names: list[bytes]) -> list[bytes]:
    """The names of a file's attributes, but for one of that name that the source may have."""
    return [name for name in names if not is_statistics(nodeid, name)]


def refuse_statistics(nodeid: int, name: bytes) -> None:
    """Refuse with EPERM to change the attribute `STATISTICS`."""
    if is_statistics(nodeid, name):
        raise error(errno.EPERM)


def shortened(result: object) -> str:
    """A result for the debug log: data by its size."""
    if isinstance(result, bytes):
        return f"{len(result)} bytes"
    if isinstance(result, list):
        return f"{len(result)} entries"
    return "done" if result is None else str(result)
