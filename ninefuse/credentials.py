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
import stat
import threading
from collections.abc import Iterator
from typing import NamedTuple

from ninefuse.syscalls import stat_descriptor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setfsuid.restype = _libc.setfsgid.restype = ctypes.c_uint32

_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2
_CAP_FSETID = 4
_CAP_SYS_ADMIN = 21
_CAP_SYS_RESOURCE = 24
_CAP_MKNOD = 27
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_FS = 0x200
_PR_CAPBSET_READ = 23

# What of the daemon's capabilities is kept: to make something, and to change something.
_FOR_MAKING = 1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH | 1 << _CAP_MKNOD
_ALL = -1

_thread = threading.local()  # unshared: whether the umask is the thread's own


class Caller(NamedTuple):
    """Who asked: the file system ids of the process behind a request, and what else counts."""

    uid: int
    gid: int
    umask: int | None = None  # None: it has been applied to the mode already
    pid: int = 0  # 0: not known


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


def can_become_able_to_mount() -> bool:
    """Whether any program started from here can have CAP_SYS_ADMIN, a set-user-id one, say.

    In most containers none can: it is not in their bounding set (capabilities(7)).
    """
    return bool(_libc.prctl(_PR_CAPBSET_READ, _CAP_SYS_ADMIN, 0, 0, 0))


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


def leave_groups() -> None:
    """Leave all groups but the first: what they may do is not for callers."""
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):
            os.setgroups([])


def needs_acting(caller: Caller) -> bool:
    """Whether `acting_as` has anything to do for a caller."""
    return caller[:2] != (os.geteuid(), os.getegid()) and os.geteuid() == 0


def may_set_gid_bit(caller: Caller, gid: int) -> bool:
    """Whether a caller may have the set-group-id bit on a file of a group.

    Its members may, by their further groups too, and who has CAP_FSETID (capabilities(7)).
    """
    if caller.gid == gid:
        return True
    status = _status_of(caller)
    groups = map(int, status.get(b"Groups", b"").split())
    return gid in groups or _has(status, _CAP_FSETID)


def may_see_trusted(caller: Caller) -> bool:
    """Whether the source would list a caller the attributes named trusted.* (xattr(7))."""
    return _has(_status_of(caller), _CAP_SYS_ADMIN)


def _has(status: dict[bytes, bytes], capability: int) -> bool:
    return bool(int(status.get(b"CapEff", b"0"), 16) >> capability & 1)


def _status_of(caller: Caller) -> dict[bytes, bytes]:
    """What proc(5) says of a caller's process; nothing if that cannot be relied on.

    Its groups and capabilities do not come with a request. It waits for its answer
    meanwhile; should it be killed, and another have its number by now, that one is told
    apart by its user. Capabilities in another user namespace are none here. And /proc may be
    that of other process numbers than requests have.
    """
    process = f"/proc/{caller.pid}"
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return {}
        theirs, ours = os.stat(f"{process}/ns/user"), os.stat("/proc/self/ns/user")
        with open(f"{process}/status", "rb") as file:
            lines = dict(line.split(b":", 1) for line in file if b":" in line)
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            lines.pop(b"CapEff", None)
        return lines if int(lines[b"Uid"].split()[3]) == caller.uid else {}
    except (OSError, KeyError, ValueError):
        return {}


def may_have_setgid(directory: int, mode: int, caller: Caller | None) -> bool:
    """Whether a new file may have a set-group-id bit that `acting_as` would cost it.

    Args:
        directory: a descriptor of the one it is made in.
        mode: the new file's.
        caller: who makes it.
    """
    if not mode & stat.S_ISGID or caller is None:
        return False
    above = stat_descriptor(directory)
    return not above.mode & stat.S_ISGID or may_set_gid_bit(caller, above.gid)


@contextlib.contextmanager
def acting_as(caller: Caller | None, *, keep_bits: bool = False) -> Iterator[None]:
    """Make what this thread creates inside the block belong to ``caller``.

    The file system ids are switched (setfsuid(2)); they are the thread's own. The
    kernel has checked the caller's permissions already, with all its groups, before the
    request came (default_permissions), so the daemon's right to pass directories and to
    make nodes is kept. Without the right to switch (a daemon run by a user), and for
    None, the ids stay as they are.

    The caller's umask is the thread's inside, too: it counts only where the directory has no
    default ACL, which the source's file system knows best (umask(2)).

    Args:
        caller: who asks.
        keep_bits: let a new file have the set-group-id bit though its group, the
            directory's, is neither the caller's first nor the daemon's; see `may_set_gid_bit`.
    """
    if caller is None or caller.umask is None:
        with _ids_of(caller, _FOR_MAKING, keep_bits):
            yield
        return
    _have_own_umask()
    before = os.umask(caller.umask)
    try:
        with _ids_of(caller, _FOR_MAKING, keep_bits):
            yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def spending_as(caller: Caller | None, *, keep_bits: bool = False) -> Iterator[None]:
    """Let what is done inside the block take blocks as ``caller`` does, not as root.

    For changes that are the daemon's to make, and that may need room: with all of its
    capabilities, but with the caller's file system ids, by which a file system tells for
    whom it reserves blocks.

    Args:
        caller: who asks.
        keep_bits: let the file keep a set-group-id bit; see `may_set_gid_bit`.
    """
    with _ids_of(caller, _ALL, keep_bits):
        yield


@contextlib.contextmanager
def _ids_of(caller: Caller | None, kept: int, keep_bits: bool) -> Iterator[None]:
    if caller is None or not needs_acting(caller):
        with keeping_bits() if keep_bits else contextlib.nullcontext():
            yield
        return
    before = _get_capabilities()
    kept &= before.effective
    if keep_bits:
        kept |= before.permitted & 1 << _CAP_FSETID
    try:
        # The group first: without the user id 0 it may not be changed any more.
        _libc.setfsgid(caller.gid)
        _libc.setfsuid(caller.uid)
        # They report nothing; asking with an impossible id tells what is in force.
        if _libc.setfsuid(-1) != caller.uid or _libc.setfsgid(-1) != caller.gid:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        now = _get_capabilities()
        _set_capabilities(now._replace(effective=now.effective | kept))
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())
        # Going back to user 0 raises all of the file capabilities again (capabilities(7)).
        _set_capabilities(before)


def _have_own_umask() -> None:
    """Make the umask (and the working directory) this thread's own (unshare(2))."""
    if getattr(_thread, "unshared", False):
        return
    if _libc.unshare(_CLONE_FS):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    _thread.unshared = True


@contextlib.contextmanager
def keeping_bits() -> Iterator[None]:
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
