"""Whose rights a system call is made with.

A daemon run by root serves callers of all kinds. What a caller makes must belong to
that caller, from its first moment on; and the daemon's own power must not keep
set-user-id and set-group-id bits alive that the caller's write would have cleared.

All of this is state of a *thread*. So it is set and given back inside one system-call
helper, never across an await: under the first model the next call of the same body
runs on another thread.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setfsuid.restype = _libc.setfsgid.restype = ctypes.c_uint32

_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2
_CAP_FSETID = 4
_CAP_SYS_RESOURCE = 24
_CAP_MKNOD = 27
_CAPABILITY_VERSION_3 = 0x20080522


class Caller(NamedTuple):
    """Who asked: the file system ids of the process behind a request."""

    uid: int
    gid: int


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class _Capabilities(NamedTuple):
    effective: int
    permitted: int
    inheritable: int


def _get_capabilities() -> _Capabilities:
    header = _Header(_CAPABILITY_VERSION_3, 0)
    data = (_Data * 2)()
    if _libc.capget(ctypes.byref(header), data):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    low, high = data
    return _Capabilities(
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def _set_capabilities(c: _Capabilities) -> None:
    header = _Header(_CAPABILITY_VERSION_3, 0)
    data = (_Data * 2)()
    for n, part in enumerate(data):
        part.effective = c.effective >> 32 * n & 0xFFFFFFFF
        part.permitted = c.permitted >> 32 * n & 0xFFFFFFFF
        part.inheritable = c.inheritable >> 32 * n & 0xFFFFFFFF
    if _libc.capset(ctypes.byref(header), data):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def settle() -> None:
    """Lay down, for this thread and those it starts, what the daemon must not use.

    CAP_FSETID: with it a write leaves set-user-id and set-group-id bits where the
    caller's own write would clear them. CAP_SYS_RESOURCE: with it callers could use
    the blocks that the file system reserves for root. Both stay permitted.
    (capabilities(7))
    """
    c = _get_capabilities()
    drop = 1 << _CAP_FSETID | 1 << _CAP_SYS_RESOURCE
    if c.effective & drop:
        _set_capabilities(c._replace(effective=c.effective & ~drop))


@contextlib.contextmanager
def acting_as(caller: Caller | None) -> Iterator[None]:
    """Make what this thread creates inside the block belong to ``caller``.

    The file system ids are switched (setfsuid(2)); they are the thread's own. The
    kernel has checked the caller's permissions already, with all its groups, before the
    request came (default_permissions), so the daemon's right to pass directories and to
    make nodes is kept. Without the right to switch (a daemon run by a user), and for
    None, nothing happens.
    """
    if caller is None or caller == (os.geteuid(), os.getegid()) or os.geteuid() != 0:
        yield
        return
    before = _get_capabilities()
    keep = 1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH | 1 << _CAP_MKNOD
    try:
        # The group first: without the user id 0 it may not be changed any more.
        _libc.setfsgid(caller.gid)
        _libc.setfsuid(caller.uid)
        # They report nothing; asking with an impossible id tells what is in force.
        if _libc.setfsuid(-1) != caller.uid or _libc.setfsgid(-1) != caller.gid:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        now = _get_capabilities()
        _set_capabilities(now._replace(effective=now.effective | before.effective & keep))
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())
        # Going back to user 0 raises all of the file capabilities again (capabilities(7)).
        _set_capabilities(before)


@contextlib.contextmanager
def keeping_setgid() -> Iterator[None]:
    """Let a chmod inside the block keep the set-group-id bit of a foreign group.

    The kernel has cleared the bit already if the caller may not keep it; what arrives
    is what the file must get. Does nothing where the capability is not permitted.
    """
    before = _get_capabilities()
    wanted = before.effective | before.permitted & 1 << _CAP_FSETID
    if wanted == before.effective:
        yield
        return
    _set_capabilities(before._replace(effective=wanted))
    try:
        yield
    finally:
        _set_capabilities(before)
