"""Who asks, and what he may do: the process behind a request, as /proc tells of it.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
from collections.abc import Callable
from typing import NamedTuple

from ninefuse.linux.capabilities import (
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH,
    CAP_FOWNER,
    CAP_FSETID,
    CAP_MKNOD,
    CAP_SETFCAP,
    CAP_SYS_ADMIN,
    SYS_SETGROUPS,
    get_capabilities,
)
from ninefuse.linux.syscalls import detached_mount, stat_descriptor, stat_name

_Seen = tuple[int, int, frozenset[int], int, bool]  # as of `_look`
_covers: Callable[[int, int, bytes, int, int], bool] | None
_compiled_look: Callable[[int, int, bytes], _Seen | None] | None
try:
    from ninefuse.linux._rights import covers as _covers
    from ninefuse.linux._rights import look as _compiled_look
except ImportError:  # it was not built
    _covers = _compiled_look = None

# What a call may need over an inode; see `acting_as`.
ENTER = CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH  # past its permission bits
MAKE = ENTER | CAP_FSETID  # in it, a file with a set-group-id bit
OWN = CAP_FOWNER  # as if one were its owner
CHANGE = CAP_CHOWN | CAP_FOWNER | CAP_FSETID
LABEL = ENTER | CAP_FOWNER | CAP_FSETID | CAP_SETFCAP  # with extended attributes

_IF_DIRECTORY, _IF_STICKY = 1 << 62, 1 << 63
PASS = ENTER | _IF_DIRECTORY  # if it is a directory
TAKE = CAP_FOWNER | _IF_STICKY  # away from its directory, if that is sticky

ALL = (1 << 62) - 1
_OVER_FILES = ENTER | CHANGE | LABEL  # capabilities that are tied to inodes
# Of a caller of whom no more is known than the ids. The kernel has checked the groups; what
# the sticky bit and ownership say needs none. CAP_MKNOD is no matter of inodes: the kernel's
# answer was no older than the request.
_CHECKED = ENTER | CAP_MKNOD

_STATUS = re.compile(
    rb"\nUid:\t\d+\t\d+\t\d+\t(\d+)\nGid:\t\d+\t\d+\t\d+\t(\d+)\n"
    rb"(?:.*\n)*?Groups:\t(.*)\n(?:.*\n)*?CapEff:\t([0-9a-f]+)\n"
)
_PENDING = re.compile(rb"\nSigPnd:\t([0-9a-f]+)\n")  # of the thread itself


class Caller(NamedTuple):
    """Who asked: the file system ids of the process behind a request, and what else counts."""

    uid: int
    gid: int
    umask: int | None = None  # None: it has been applied to the mode already
    pid: int = 0  # of the thread that waits for the answer; 0: not known
    # The further group that the directory is of, in which something is made; empty: it is of none;
    # None: that is not known.
    groups: tuple[int, ...] | None = None
    # What else it may do, where that is known and no process is to be asked: of a client at the
    # other end of a socket.
    rights: Rights | None = None


class Rights(NamedTuple):
    """What a caller may do besides what the two ids allow."""

    groups: frozenset[int] = frozenset()  # without the first
    capabilities: int = 0
    mapped: int = 0  # those over files whose owner and group are known in its user namespace


def needs_acting(caller: Caller) -> bool:
    """Whether the file system ids of a caller are others than this thread's, and can be had."""
    return caller[:2] != (os.geteuid(), os.getegid()) and os.geteuid() == 0


def keeps_mark(caller: Caller, gid: int) -> bool:
    """Whether the source leaves files of a group their set-group-id bit when a caller writes.

    That is about files without group execution, where the bit is but a mark.
    """
    rights = rights_of(caller, get_capabilities().permitted)
    return gid == caller.gid or gid in rights.groups or bool(rights.capabilities & CAP_FSETID)


def may_see_trusted(caller: Caller) -> bool:
    """Whether the source would list a caller the attributes named trusted.* (xattr(7))."""
    return bool(rights_of(caller, get_capabilities().permitted).capabilities & CAP_SYS_ADMIN)


def may_change_projects(caller: Caller) -> bool:
    """Whether a caller is where the source would let it change the project that a file is of.

    That takes to be in no user namespace of one's own (fileattr_set_prepare in fs/file_attr.c).
    A process that cannot be seen may be in one, unless it is root's.
    """
    if caller.pid and _own_ids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            return _is_in_our_namespace(caller.pid)
    return caller.uid == 0


def is_being_killed(pid: int) -> bool:
    """Whether a caller's thread is about to end: by SIGKILL, or another signal that ends it.

    Raises nothing: one that cannot be looked at, for want of a descriptor say, is not.

    Args:
        pid: the thread's number; 0: it is not known.
    """
    try:
        if not pid or not _own_ids():
            return False
    except OSError:
        return False
    try:
        found = _PENDING.search(_read_status(pid))
    except OSError as e:
        return e.errno in (errno.ENOENT, errno.ESRCH)  # it is no more
    return found is not None and bool(int(found[1], 16) & 1 << signal.SIGKILL - 1)


# What proc(5) says
#
# A caller may wait for an answer while it runs execve(2): closing a file there can mean another
# open, of an overlay's upper layer. It holds a lock then, for which most of its directory in
# /proc has its readers wait (exec_update_lock in the kernel): the links in ns/, stat, fd/ and
# more. Who waited for it would never answer. So no file is read here but status and uid_map.


def look_apart() -> None:
    """Look at callers in a procfs of our own, where we may have one, from now on.

    Who reads a directory keeps its lock for as long as he likes, by reading into memory that
    does not come, and another may wait for it to write to the directory. In the one that all
    see that keeps everybody waiting who looks for a new process.
    """
    global _proc
    with contextlib.suppress(OSError):
        _proc = detached_mount(b"proc")


_proc: int | None = None  # None: the one at /proc


def _own_ids() -> bytes:
    """The user ids that this process knows; none if /proc has other numbers than requests."""
    global _own
    if _own is None:
        pid = os.getpid()
        itself = os.readlink(_place("self"), dir_fd=_proc) == str(pid)
        _own = _read(f"{pid}/uid_map") if itself else b""
    return _own


def _forget_own_ids() -> None:
    global _own
    _own = None


_own: bytes | None = None  # None: this process has not asked
os.register_at_fork(after_in_child=_forget_own_ids)


def rights_of(caller: Caller, permitted: int) -> Rights:
    """A caller's groups and capabilities.

    They do not come with a request, but the thread that made it waits for the answer, so its
    number is no other's and what /proc says of it holds. Errors other than that it is not
    there to be seen are errors of the request: a caller who could have the daemon not look
    would not be looked at.

    Args:
        caller: who asks.
        permitted: what this thread can have at all.
    """
    if caller.rights is not None:
        return caller.rights
    all_if_root = ALL if caller.uid == 0 else _CHECKED
    unknown = Rights(capabilities=all_if_root)
    pid = caller.pid
    if not pid or not _own_ids():
        return unknown
    try:
        if caller.uid == 0 and permitted & _OVER_FILES == _OVER_FILES:
            # Who may do everything needs no groups. That is mostly so, and cheaply asked.
            has = get_capabilities(pid).effective
            if not permitted & ~has and _is_in_our_namespace(pid):
                return Rights(capabilities=has)
        seen = _look(pid)
        if seen is None:
            return unknown
        uid, gid, groups, has, ours = seen
        if (uid, gid) == (caller.uid, caller.gid):
            groups -= {gid}
            if SYS_SETGROUPS is None and groups:
                return unknown
            if ours:
                return Rights(groups, has)
            return Rights(groups, mapped=has & _OVER_FILES)
        # The kernel asks with other ids than the process has: for a file system above this
        # one (overlayfs, with those of who mounted it), for a server in the kernel, or by a
        # personality of io_uring. Nobody becomes root that way who is not. Others could have
        # groups forgotten that way; a server's word is relied on.
        if caller.uid == 0:
            return unknown
        if ours:
            return unknown if has and not permitted & ~has else Rights()
        is_root_there = any(m[:2] == (0, caller.uid) for m in _map(pid, "uid"))
        return Rights(mapped=_OVER_FILES if is_root_there else 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return unknown


def may_all_that_we_may(caller: Caller, raised: int) -> bool:
    """Whether a caller who is root may do all that this thread may. One question of few steps.

    Args:
        caller: who asks; its user id is 0.
        raised: capabilities that this thread must have effective, where they are permitted.

    Returns:
        False also where that would take more to say; `rights_of` says it.
    """
    if _covers is None or not caller.pid or caller.rights is not None:
        return False
    ids = _own_ids()
    return bool(ids) and _covers(
        caller.pid, -1 if _proc is None else _proc, ids, _OVER_FILES, raised
    )


def _look(pid: int) -> _Seen | None:
    """A thread's file system ids, further groups and effective capabilities, by its status.

    And whether these are in our user namespace, or are none. None: its status says nothing of it.
    """
    if _compiled_look is not None:
        seen = _compiled_look(pid, -1 if _proc is None else _proc, _own_ids())
        if seen is not None:
            return seen
    found = _STATUS.search(_read_status(pid))
    if found is None:
        return None
    has = int(found[4], 16)
    groups = frozenset(map(int, found[3].split()))
    return int(found[1]), int(found[2]), groups, has, not has or _is_in_our_namespace(pid)


def _is_in_our_namespace(pid: int) -> bool:
    """Whether a thread's capabilities are in the user namespace that this process is in.

    That it knows the same user ids will do. Who makes another one that knows them all must be
    able to become each of them (user_namespaces(7)).
    """
    return _read(f"{pid}/uid_map") == _own_ids()


def _map(pid: int, kind: str) -> list[tuple[int, ...]]:
    """The ids that a thread's user namespace knows: (there, here, how many)."""
    lines = _read(f"{pid}/{kind}_map").splitlines()
    return [tuple(map(int, line.split())) for line in lines]


def _read_status(pid: int) -> bytes:
    return _read(f"{pid}/status", until=b"\nCapEff:")


def _read(path: str, until: bytes = b"") -> bytes:
    """What a file in /proc says; where what follows a word is not needed, up to there at least."""
    fd = os.open(_place(path), os.O_RDONLY | os.O_CLOEXEC, dir_fd=_proc)
    try:
        data = os.read(fd, 8192)
        # That is all of it, nearly always.
        while until not in data and (more := os.read(fd, 1 << 16)):
            data += more
        return data
    finally:
        os.close(fd)


def _place(path: str) -> str:
    return path if _proc is not None else f"/proc/{path}"


def granted(capabilities: int, pid: int, over: tuple[tuple[int, int, bytes], ...]) -> int:
    """What of its capabilities a caller in another user namespace has for a call.

    It has them over files whose owner and group are both known there (user_namespaces(7)); to
    stand for a file's owner, but in a sticky directory, the owner is enough.
    """
    uids, gids = _map(pid, "uid"), _map(pid, "gid")
    asked = 0
    for wanted, fd, name in over:
        asked |= wanted
        if wanted & _IF_STICKY and not stat_descriptor(fd).mode & stat.S_ISVTX:
            continue
        try:
            a = stat_name(fd, name) if name else stat_descriptor(fd)
        except FileNotFoundError:
            continue  # nobody's
        if wanted & _IF_DIRECTORY and not stat.S_ISDIR(a.mode):
            continue
        if not _knows(uids, a.uid):
            capabilities &= ~wanted
        elif not _knows(gids, a.gid):
            capabilities &= ~wanted if wanted & _IF_STICKY else ~wanted | CAP_FOWNER
    return capabilities & asked


def _knows(ids: list[tuple[int, ...]], number: int) -> bool:
    return any(here <= number < here + count for _, here, count in ids)
