"""Whose a request of the native session is, and what is told to who has too many.

Locks touched: none.
"""

from __future__ import annotations

import errno
import fcntl

from ninefuse.fuse._message import Message
from ninefuse.fuse.answers import NOT_REFUSED
from ninefuse.fuse.opcodes import Opcode
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.table import FidTable

# Whose these are the header does not say, or not truly: who opened the handle is counted.
_BY_HANDLE = frozenset(
    (
        Opcode.READ,
        Opcode.WRITE,
        Opcode.FLUSH,
        Opcode.FSYNC,
        Opcode.READDIR,
        Opcode.READDIRPLUS,
        Opcode.FSYNCDIR,
    )
)
# The kernel sends these in nobody's name.
_NOBODYS = frozenset((Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.FORGET, Opcode.BATCH_FORGET))
LOCKS = frozenset((Opcode.SETLK, Opcode.SETLKW))


def user_of(message: Message, fids: FidTable) -> int | None:
    """The user id of whose share a request is; None: it is nobody's.

    Args:
        message: it.
        fids: the session's.
    """
    if message.opcode in _BY_HANDLE:
        return fids.owner_of(FIRST_HANDLE + message.args[0])
    return None if message.opcode in _NOBODYS else message.uid


def refusal(name: str, message: Message) -> int:
    """The errno that is told to who has too many requests under way; 0: none, he is served.

    Args:
        name: of the callback.
        message: the request.
    """
    if message.opcode in LOCKS:
        # Others wait for what is given back. And EAGAIN would say that a lock is in the way.
        return 0 if message.args[4] == fcntl.F_UNLCK else errno.ENOLCK
    return 0 if name in NOT_REFUSED else errno.EAGAIN
