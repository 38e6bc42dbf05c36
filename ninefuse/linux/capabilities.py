"""What a thread of the daemon may do: its capabilities and groups.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import sys
from typing import NamedTuple

from ninefuse.errors import error

# These calls wait for nothing: letting the interpreter's lock go around them costs more.
libc = ctypes.PyDLL(None, use_errno=True)
libc.setfsuid.restype = libc.setfsgid.restype = ctypes.c_uint32

CAP_CHOWN = 1 << 0
CAP_DAC_OVERRIDE = 1 << 1
CAP_DAC_READ_SEARCH = 1 << 2
CAP_FOWNER = 1 << 3
CAP_FSETID = 1 << 4
CAP_SYS_ADMIN = 1 << 21
CAP_SYS_RESOURCE = 1 << 24
CAP_MKNOD = 1 << 27
CAP_SETFCAP = 1 << 31
_CAPABILITY_VERSION_3 = 0x20080522
CLONE_FS = 0x200
_PR_CAPBSET_READ = 23

# setgroups(2) for one thread: glibc's would change all of them. Where its number is not
# known, further groups cannot be taken on.
SYS_SETGROUPS = (
    {
        "x86_64": 116,
        "aarch64": 159,
        "riscv64": 159,
        "loongarch64": 159,
        "ppc64": 81,
        "ppc64le": 81,
        "s390x": 206,
    }.get(os.uname().machine)
    if sys.maxsize > 1 << 32
    else None
)

_HEADER = struct.Struct("=Ii")  # version, process
_SETS = struct.Struct("=6I")  # effective, permitted, inheritable: the low halves, the high ones
OWN_HEADER = _HEADER.pack(_CAPABILITY_VERSION_3, 0)
Sets = ctypes.c_char * _SETS.size


class Capabilities(NamedTuple):
    """The sets of capabilities(7)."""

    effective: int
    permitted: int
    inheritable: int


def _get_sets(pid: int) -> tuple[int, int, int]:
    """`get_sets` without the extension."""
    sets = Sets()
    header = _HEADER.pack(_CAPABILITY_VERSION_3, pid) if pid else OWN_HEADER
    if libc.capget(header, sets):
        raise failure()
    e, p, i, high_e, high_p, high_i = _SETS.unpack(sets)
    return e | high_e << 32, p | high_p << 32, i | high_i << 32


try:
    from ninefuse.linux._rights import get_sets as get_sets
except ImportError:  # it was not built
    get_sets = _get_sets


def get_capabilities(pid: int = 0) -> Capabilities:
    """The capabilities of this thread, or of another one (capget(2))."""
    return Capabilities._make(get_sets(pid))


def set_capabilities(c: Capabilities) -> None:
    """Have this thread have these capabilities (capset(2)).

    Raises:
        OSError: EPERM, it may not.
    """
    e, p, i = c
    low = 0xFFFFFFFF
    if libc.capset(OWN_HEADER, _SETS.pack(e & low, p & low, i & low, e >> 32, p >> 32, i >> 32)):
        raise failure()


def set_groups(groups: frozenset[int] | list[int]) -> None:
    """Have this thread, and no other, be in these further groups (setgroups(2)).

    Raises:
        OSError: EPERM, it may not, or the number of the call is not known here.
    """
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if SYS_SETGROUPS is None:
        raise error(errno.EPERM)
    if libc.syscall(ctypes.c_long(SYS_SETGROUPS), ctypes.c_long(len(groups)), array):
        raise failure()


def failure() -> OSError:
    """The error of the last call of `libc`."""
    return error(ctypes.get_errno())


def can_become_able_to_mount() -> bool:
    """Whether any program started from here can have CAP_SYS_ADMIN, a set-user-id one, say.

    In most containers none can: it is not in their bounding set (capabilities(7)).
    """
    return bool(libc.prctl(_PR_CAPBSET_READ, CAP_SYS_ADMIN.bit_length() - 1, 0, 0, 0))


def settle() -> None:
    """Lay down, for this thread and those it starts, what the daemon must not use.

    CAP_FSETID: with it a write leaves set-user-id and set-group-id bits where the
    caller's own write would clear them. CAP_SYS_RESOURCE: with it callers could use
    the blocks that the file system reserves for root. Both stay permitted.
    (capabilities(7))
    """
    c = get_capabilities()
    drop = CAP_FSETID | CAP_SYS_RESOURCE
    if c.effective & drop:
        set_capabilities(c._replace(effective=c.effective & ~drop))


def leave_groups() -> None:
    """Leave all groups but the first: what they may do is not for callers."""
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):
            os.setgroups([])
