"""What the daemon tells the kernel by itself: messages on the device that answer no request.

Source: Linux include/uapi/linux/fuse.h; fs/fuse/dev.c, fuse_notify.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Sequence

from ninefuse.errors import error

_OUT_HEADER = struct.Struct("=IiQ")  # length, kind of notification, unique (0)
_INVAL_INODE = 2
_PRUNE = 9
_INODE = struct.Struct("=Qqq")  # nodeid, offset (negative: attributes alone), length


def prune(device: int, nodeids: Sequence[int]) -> None:
    """Ask the kernel to forget files that nobody uses (FUSE_NOTIFY_PRUNE).

    It passes over those in use, and over names that something is mounted on, in whichever
    mount namespace. Unlike dropping a name (FUSE_NOTIFY_INVAL_ENTRY) this takes no lock of a
    directory, whose holder may wait for us: there would be no end to it once we serve no more.

    Args:
        device: the FUSE device; -1: it is not there yet.
        nodeids: of the files.

    Raises:
        OSError: EINVAL, the kernel does not know of it (before Linux 6.18), or there is no
            device yet.
    """
    count = len(nodeids)
    _notify(device, _PRUNE, struct.pack(f"=IIQ{count}Q", count, 0, 0, *nodeids))


def attributes_changed(device: int, nodeid: int) -> None:
    """Have the kernel ask for a file's attributes, and ACLs, before it believes any again.

    It does so too with answers to what it asked before. Only for a file or directory that a
    request under way is about: whoever makes that keeps it in the kernel's memory, and then
    this waits for nobody. (Of one that is just being evicted the kernel waits for the end,
    which may wait for us.)

    Args:
        device: as of `prune`.
        nodeid: of the file.

    Source: Linux fs/fuse/inode.c, fuse_reverse_inval_inode.
    """
    with contextlib.suppress(OSError):  # it knows of no such file, or there is no mount any more
        _notify(device, _INVAL_INODE, _INODE.pack(nodeid, -1, 0))


def _notify(device: int, kind: int, body: bytes) -> None:
    if device < 0:
        raise error(errno.EINVAL)
    os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), kind, 0) + body)
