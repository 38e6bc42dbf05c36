"""Who a client is, and as whom its requests are made.

A server of root acts as each user that a client attaches for; any other server acts as itself.
Of root's own attaches it makes nobody's, unless it was told otherwise. Who is at the other end of
a Unix socket the kernel says, and he can be nobody else than himself, but root. Over TCP and vsock
it is the client who says it: whoever can connect can be any user.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
import stat
import struct
from typing import NamedTuple

from ninefuse.errors import error
from ninefuse.linux.callers import ALL, Caller, Rights
from ninefuse.linux.syscalls import Attributes
from ninefuse.wire.messages import NONUNAME

NOBODY = 65534
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Peer(NamedTuple):
    """Who is at the other end of a connection, as far as the kernel says (SO_PEERCRED)."""

    uid: int | None = None  # None: the kernel does not say
    gid: int = NOBODY

    @property
    def may_be_anybody(self) -> bool:
        """Whether it may act as other users: the kernel does not say who it is, or it is root."""
        return not self.uid


def peer_of(connected: socket.socket) -> Peer:
    """Who is at the other end of a socket."""
    if connected.family != socket.AF_UNIX:
        return Peer()
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, gid = _CREDENTIALS.unpack(found)
    return Peer(uid, gid)


class Users:
    """Who may attach, and as whom.

    Args:
        squashes: whether root's requests are made as nobody.

    Attributes:
        act: whether requests are made with the rights of who attached, not with the server's own.
    """

    def __init__(self, *, squashes: bool = True) -> None:
        self.act = os.geteuid() == 0
        self._squashes = squashes

    @property
    def anybody(self) -> str:
        """As whom one may act of whom the kernel does not say who it is, in words."""
        if not self.act:
            return "this server's user"
        return "any user but root" if self._squashes else "any user, and as root"

    def may_connect(self, peer: Peer) -> bool:
        """Whether a server that acts as itself alone is for this one: himself, or root."""
        return self.act or peer.uid in (None, 0, os.geteuid())

    def caller(self, peer: Peer, uname: bytes, n_uname: int) -> Caller | None:
        """As whom to make the requests of who attaches. Blocks: users and groups are looked up.

        Args:
            peer: who is at the other end.
            uname: a user's name; it counts only where no number is given.
            n_uname: a user id, or NONUNAME.

        Returns:
            Who acts; None: the server itself.

        Raises:
            OSError: EPERM, it is somebody else, or there is no such user.
        """
        if not self.act:
            return None
        uid = _uid_of(uname) if n_uname == NONUNAME else n_uname
        if not peer.may_be_anybody:
            assert peer.uid is not None
            # A client that names no number (Linux, as it mounts) has a name it was given.
            if n_uname not in (NONUNAME, peer.uid):
                raise error(errno.EPERM)
            return _caller_of(peer.uid, peer.gid)
        if uid is None:
            raise error(errno.EPERM)
        if uid == 0 and not self._squashes:
            return Caller(0, 0, rights=Rights(capabilities=ALL))
        return _caller_of(NOBODY if uid == 0 else uid, NOBODY)

    def in_group(self, peer: Peer, caller: Caller, gid: int, directory: Attributes) -> Caller:
        """The same caller, making something that is to be of a group.

        Args:
            peer: who is at the other end.
            caller: who acts.
            gid: of what is made, which is not the caller's own.
            directory: of the directory. Where that says of which group it is, that one counts.

        Raises:
            OSError: EPERM, the caller is not in that group.
        """
        assert caller.rights is not None
        groups = caller.rights.groups
        if directory.mode & stat.S_ISGID and directory.gid == gid:
            return caller
        # A client that may say which user it is may say which group: it knows the user's, which
        # this machine may not.
        if not (peer.may_be_anybody or gid in groups):
            raise error(errno.EPERM)
        if gid == 0 and self._squashes and gid not in groups:
            return caller
        rights = caller.rights._replace(groups=(groups | {caller.gid}) - {gid})
        return caller._replace(gid=gid, rights=rights)


def _caller_of(uid: int, gid: int) -> Caller:
    """A user as this machine knows him: with the groups that he is in, and no capabilities.

    Args:
        uid: his number.
        gid: his group, if nothing is known of him.
    """
    groups: frozenset[int] = frozenset()
    with contextlib.suppress(KeyError):
        entry = pwd.getpwuid(uid)
        gid = entry.pw_gid
        groups = frozenset(os.getgrouplist(entry.pw_name, gid)) - {gid}
    return Caller(uid, gid, rights=Rights(groups))


def _uid_of(uname: bytes) -> int | None:
    """A user's number by his name; nobody's where there is none."""
    if not uname:
        return NOBODY
    try:
        return pwd.getpwnam(os.fsdecode(uname)).pw_uid
    except KeyError:
        return None
