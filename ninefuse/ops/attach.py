"""Beginning a conversation: version, attach.

Locks touched: the fid table's.
"""

from __future__ import annotations

import errno
import os

from ninefuse.calls import Begin, blocking
from ninefuse.errors import error
from ninefuse.linux.syscalls import stat_descriptor
from ninefuse.tree.qids import Qid
from ninefuse.tree.session import Session

MIN_MSIZE = 4096  # bytes
MAX_MSIZE = 1 << 20
VERSION = "9P2000.L"


async def version(session: Session, msize: int, wanted: str) -> tuple[int, str]:
    """Agree on a message size and start afresh: every fid is clunked.

    Args:
        session: the conversation.
        msize: the largest message the client takes, in bytes.
        wanted: the protocol the client speaks.

    Returns:
        The message size in force, and the protocol: ``unknown`` if it is not 9P2000.L.

    Raises:
        OSError: EMSGSIZE, ``msize`` is under 4096.

    Source: version(5) of Plan 9; QEMU hw/9pfs/9p.c, v9fs_version.
    """
    if session.announces:
        await Begin("version")
    session.fids.clear()
    if msize < MIN_MSIZE:
        raise error(errno.EMSGSIZE)
    session.msize = min(msize, MAX_MSIZE)
    return session.msize, VERSION if wanted == VERSION else "unknown"


async def attach(session: Session, fid: int, directory: int | str) -> Qid:
    """Make ``fid`` stand for the source directory.

    Args:
        session: the conversation; it serves one source directory.
        fid: a new fid.
        directory: an O_PATH descriptor of the source directory, which stays the
            caller's, or its path (9P's aname).

    Raises:
        OSError: EINVAL, the fid is taken; ENOTDIR and others of open(2).

    Source: attach(5) of Plan 9. There is no authentication: whoever could mount the
    source could read it.
    """
    if session.announces:
        await Begin("attach", fid)
    fd = await blocking(None, _open_root, directory)
    try:
        attributes = await blocking(None, stat_descriptor, fd)
        await blocking(None, session.fids.devices.begin, fd, attributes)
        mark = await blocking(None, session.fids.devices.mark, attributes, fd)
    except OSError:
        os.close(fd)
        raise
    session.fids.set_root(attributes)
    node = session.fids.new_node(attributes, fd, None, mark)
    try:
        session.fids.add(fid, node)
    finally:
        session.fids.drop(node)
    return session.fids.qid_of(attributes)


def _open_root(directory: int | str) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    if isinstance(directory, int):
        return os.open(".", flags, dir_fd=directory)
    return os.open(directory, flags)
