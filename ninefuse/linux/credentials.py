"""Whose rights a system call is made with.

A daemon run by root serves callers of all kinds. The kernel has checked what a caller may
do, but on attributes that it remembers. So the call is made with the caller's ids, groups
and capabilities, and the source's file system decides again. What a caller makes belongs
to that caller from its first moment on, and set-user-id and set-group-id bits go where the
caller's own call would take them.

All of this is state of a *thread*. So it is set and given back inside one system-call
helper, never across an await: under the first model the next call of the same body
runs on another thread.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import stat
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

from ninefuse.exitcodes import ExitCode
from ninefuse.linux.syscalls import detached_mount, stat_descriptor, stat_name

_write_as: Callable[[int, bytes, int, int, int, Callable[[], object]], int] | None
try:
    from ninefuse.linux._transfer import write_as as _write_as
except ImportError:  # it was not built
    _write_as = None

log = logging.getLogger(__name__)

T = TypeVar("T")

# These calls wait for nothing: letting the interpreter's lock go around them costs more.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.setfsuid.restype = _libc.setfsgid.restype = ctypes.c_uint32

_CAP_CHOWN = 1 << 0
_CAP_DAC_OVERRIDE = 1 << 1
_CAP_DAC_READ_SEARCH = 1 << 2
_CAP_FOWNER = 1 << 3
_CAP_FSETID = 1 << 4
_CAP_SYS_ADMIN = 1 << 21
_CAP_SYS_RESOURCE = 1 << 24
_CAP_MKNOD = 1 << 27
_CAP_SETFCAP = 1 << 31
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_FS = 0x200
_PR_CAPBSET_READ = 23

# What a call may need over an inode; see `acting_as`.
ENTER = _CAP_DAC_OVERRIDE | _CAP_DAC_READ_SEARCH  # past its permission bits
MAKE = ENTER | _CAP_FSETID  # in it, a file with a set-group-id bit
OWN = _CAP_FOWNER  # as if one were its owner
CHANGE = _CAP_CHOWN | _CAP_FOWNER | _CAP_FSETID
LABEL = ENTER | _CAP_FOWNER | _CAP_FSETID | _CAP_SETFCAP  # with extended attributes

_IF_DIRECTORY, _IF_STICKY = 1 << 62, 1 << 63
PASS = ENTER | _IF_DIRECTORY  # if it is a directory
TAKE = _CAP_FOWNER | _IF_STICKY  # away from its directory, if that is sticky

_ALL = (1 << 62) - 1
_OVER_FILES = ENTER | CHANGE | LABEL  # capabilities that are tied to inodes
# Of a caller of whom no more is known than the ids. The kernel has checked the groups; what
# the sticky bit and ownership say needs none. CAP_MKNOD is no matter of inodes: the kernel's
# answer was no older than the request.
_CHECKED = ENTER | _CAP_MKNOD

# setgroups(2) for one thread: glibc's would change all of them. Where its number is not
# known, further groups cannot be taken on.
_SYS_SETGROUPS = (
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
_OWN_HEADER = _HEADER.pack(_CAPABILITY_VERSION_3, 0)
_Sets = ctypes.c_char * _SETS.size

_STATUS = re.compile(
    rb"\nUid:\t\d+\t\d+\t\d+\t(\d+)\nGid:\t\d+\t\d+\t\d+\t(\d+)\n"
    rb"(?:.*\n)*?Groups:\t(.*)\n(?:.*\n)*?CapEff:\t([0-9a-f]+)\n"
)

_thread = threading.local()  # unshared: whether the umask is the thread's own


class Caller(NamedTuple):
    """Who asked: the file system ids of the process behind a request, and what else counts."""

    uid: int
    gid: int
    umask: int | None = None  # None: it has been applied to the mode already
    pid: int = 0  # of the thread that waits for the answer; 0: not known


class _Rights(NamedTuple):
    """What a caller may do besides what the two ids allow."""

    groups: frozenset[int] = frozenset()  # without the first
    capabilities: int = 0
    mapped: int = 0  # those over files whose owner and group are known in its user namespace


class _Capabilities(NamedTuple):
    effective: int
    permitted: int
    inheritable: int


def _get_capabilities(pid: int = 0) -> _Capabilities:
    """The capabilities of this thread, or of another one (capget(2))."""
    sets = _Sets()
    header = _HEADER.pack(_CAPABILITY_VERSION_3, pid) if pid else _OWN_HEADER
    if _libc.capget(header, sets):
        raise _failure()
    e, p, i, high_e, high_p, high_i = _SETS.unpack(sets)
    return _Capabilities(e | high_e << 32, p | high_p << 32, i | high_i << 32)


def _set_capabilities(c: _Capabilities) -> None:
    e, p, i = c
    low = 0xFFFFFFFF
    if _libc.capset(_OWN_HEADER, _SETS.pack(e & low, p & low, i & low, e >> 32, p >> 32, i >> 32)):
        raise _failure()


def _set_groups(groups: frozenset[int] | list[int]) -> None:
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _SYS_SETGROUPS is None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    if _libc.syscall(ctypes.c_long(_SYS_SETGROUPS), ctypes.c_long(len(groups)), array):
        raise _failure()


def _failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def can_become_able_to_mount() -> bool:
    """Whether any program started from here can have CAP_SYS_ADMIN, a set-user-id one, say.

    In most containers none can: it is not in their bounding set (capabilities(7)).
    """
    return bool(_libc.prctl(_PR_CAPBSET_READ, _CAP_SYS_ADMIN.bit_length() - 1, 0, 0, 0))


def settle() -> None:
    """Lay down, for this thread and those it starts, what the daemon must not use.

    CAP_FSETID: with it a write leaves set-user-id and set-group-id bits where the
    caller's own write would clear them. CAP_SYS_RESOURCE: with it callers could use
    the blocks that the file system reserves for root. Both stay permitted.
    (capabilities(7))
    """
    c = _get_capabilities()
    drop = _CAP_FSETID | _CAP_SYS_RESOURCE
    if c.effective & drop:
        _set_capabilities(c._replace(effective=c.effective & ~drop))


def leave_groups() -> None:
    """Leave all groups but the first: what they may do is not for callers."""
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):
            os.setgroups([])


def needs_acting(caller: Caller) -> bool:
    """Whether the file system ids of a caller are others than this thread's, and can be had."""
    return caller[:2] != (os.geteuid(), os.getegid()) and os.geteuid() == 0


def keeps_mark(caller: Caller, gid: int) -> bool:
    """Whether the source leaves files of a group their set-group-id bit when a caller writes.

    That is about files without group execution, where the bit is but a mark.
    """
    rights = _rights_of(caller, _get_capabilities().permitted)
    return gid == caller.gid or gid in rights.groups or bool(rights.capabilities & _CAP_FSETID)


def may_see_trusted(caller: Caller) -> bool:
    """Whether the source would list a caller the attributes named trusted.* (xattr(7))."""
    return bool(_rights_of(caller, _get_capabilities().permitted).capabilities & _CAP_SYS_ADMIN)


# What proc(5) says


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


def _own_namespace() -> str:
    """This process's user namespace; empty if /proc has other process numbers than requests."""
    global _own
    pid = os.getpid()
    if _own[0] != pid:
        itself = _link("self") == str(pid)
        _own = pid, _link("self/ns/user") if itself else ""
    return _own[1]


_own: tuple[int, str] = (0, "")


def _rights_of(caller: Caller, permitted: int) -> _Rights:
    """A caller's groups and capabilities.

    They do not come with a request, but the thread that made it waits for the answer, so its
    number is no other's and what /proc says of it holds. Errors other than that it is not
    there to be seen are errors of the request: a caller who could have the daemon not look
    would not be looked at.

    Args:
        caller: who asks.
        permitted: what this thread can have at all.
    """
    all_if_root = _ALL if caller.uid == 0 else _CHECKED
    unknown = _Rights(capabilities=all_if_root)
    pid = caller.pid
    if not pid or not _own_namespace():
        return unknown
    try:
        if caller.uid == 0 and permitted & _OVER_FILES == _OVER_FILES:
            # Who may do everything needs no groups. That is mostly so, and cheaply asked.
            has = _get_capabilities(pid).effective
            if not permitted & ~has and _is_in_our_namespace(pid):
                return _Rights(capabilities=has)
        found = _STATUS.search(_read(f"{pid}/status"))
        if found is None:
            return unknown
        has = int(found[4], 16)
        ours = not has or _is_in_our_namespace(pid)
        gid = int(found[2])
        if (int(found[1]), gid) == (caller.uid, caller.gid):
            groups = frozenset(map(int, found[3].split())) - {gid}
            if _SYS_SETGROUPS is None and groups:
                return unknown
            if ours:
                return _Rights(groups, has)
            return _Rights(groups, mapped=has & _OVER_FILES)
        # The kernel asks with other ids than the process has: for a file system above this
        # one (overlayfs, with those of who mounted it), for a server in the kernel, or by a
        # personality of io_uring. Nobody becomes root that way who is not. Others could have
        # groups forgotten that way; a server's word is relied on.
        if caller.uid == 0:
            return unknown
        if ours:
            return unknown if has and not permitted & ~has else _Rights()
        is_root_there = any(m[:2] == (0, caller.uid) for m in _map(pid, "uid"))
        return _Rights(mapped=_OVER_FILES if is_root_there else 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return unknown


def _is_in_our_namespace(pid: int) -> bool:
    """Whether a thread's capabilities are in the user namespace that this process is in."""
    try:
        return _link(f"{pid}/ns/user") == _own_namespace()
    except PermissionError:
        # That takes CAP_SYS_PTRACE, which containers lack. One that knows the same ids will do.
        return all(_map(pid, kind) == _map("self", kind) for kind in ("uid", "gid"))


def _map(pid: int | str, kind: str) -> list[tuple[int, ...]]:
    """The ids that a thread's user namespace knows: (there, here, how many)."""
    lines = _read(f"{pid}/{kind}_map").splitlines()
    return [tuple(map(int, line.split())) for line in lines]


def _link(path: str) -> str:
    return os.readlink(path if _proc is not None else f"/proc/{path}", dir_fd=_proc)


def _read(path: str) -> bytes:
    flags = os.O_RDONLY | os.O_CLOEXEC
    fd = os.open(path if _proc is not None else f"/proc/{path}", flags, dir_fd=_proc)
    try:
        data = os.read(fd, 8192)
        # That is all of it, nearly always, and what is not in it is not needed.
        while b"\nCapEff:" not in data and (more := os.read(fd, 1 << 16)):
            data += more
        return data
    finally:
        os.close(fd)


def _granted(capabilities: int, pid: int, over: tuple[tuple[int, int, bytes], ...]) -> int:
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
            capabilities &= ~wanted if wanted & _IF_STICKY else ~wanted | _CAP_FOWNER
    return capabilities & asked


def _knows(ids: list[tuple[int, ...]], number: int) -> bool:
    return any(here <= number < here + count for _, here, count in ids)


# Acting


def acting_as(
    caller: Caller | None, *over: tuple[int, int, bytes], bits: bool = False, making: bool = False
) -> AbstractContextManager[None]:
    """Give this thread a caller's rights, for a ``with`` block around system calls.

    The file system ids, the further groups and the effective capabilities are the caller's
    inside, as far as the daemon has them itself. A caller in another user namespace has
    capabilities over what its namespace knows, which is looked up just before. Of one whose
    process cannot be seen only the ids are known: root's are trusted with everything,
    others with what the kernel has checked by their groups. A daemon that is not root acts
    for everybody as itself, and so does any for None.

    Should the thread's own rights not be had back, the process ends: whatever the thread did
    next would be done with a stranger's rights, other callers' requests among it.

    Args:
        caller: who asks.
        over: which capabilities the call may need over which inode: (ENTER or another of
            these sets, descriptor, name in it or empty for itself).
        bits: whether CAP_FSETID counts, the right to keep set-user-id and set-group-id bits.
            It is laid down otherwise; see `settle`.
        making: whether the caller's umask is to be the thread's. It counts only where the
            directory has no default ACL, which the source's file system knows best (umask(2)).

    Raises:
        OSError: EPERM, the daemon may not take these ids on; what looking at the caller's
            process meets.
    """
    umask = caller.umask if making and caller is not None else None
    euid = os.geteuid()
    if euid != 0 or (caller is None and not bits):
        return _AS_IT_IS if umask is None else _Acting(umask)
    own = _get_capabilities()
    egid = os.getegid()
    if caller is None:
        caller, rights = Caller(euid, egid), _Rights(capabilities=_ALL)
    else:
        rights = _rights_of(caller, own.permitted)
    effective = rights.capabilities & own.permitted
    if rights.mapped:
        effective |= _granted(rights.mapped, caller.pid, over) & own.permitted
    groups: frozenset[int] | None = rights.groups
    if effective == own.permitted and caller.uid == euid:
        # It may do all that the daemon may, mostly as it is.
        effective = own.effective | (own.permitted & _CAP_FSETID if bits else 0)
        groups = None
        if effective == own.effective and caller.gid == egid:
            return _AS_IT_IS if umask is None else _Acting(umask)
    return _Acting(umask, caller, groups, own, effective)


def spending_as(caller: Caller, group: int | None, function: Callable[..., T], *args: object) -> T:
    """Call a function that takes blocks for a caller, by way of an open descriptor.

    The descriptor is all the right that is needed. What the kernel asks of the thread in a
    write(2) beside it:

    * whether the blocks that a file system reserves may be used: the file system ids, the
      groups, CAP_SYS_RESOURCE (ext4_has_free_clusters in fs/ext4/balloc.c, and its like in ext2
      and f2fs), which also tells whose quota has no limit (ignore_hardlimit in
      fs/quota/dquot.c);
    * whether set-id bits stay: CAP_FSETID, and for a set-group-id bit that is but a mark the
      group (setattr_should_drop_suidgid in fs/attr.c).

    With another file system user id than 0 the kernel takes CAP_FSETID and its like away by
    itself, and CAP_SYS_RESOURCE is laid down (`settle`). So the ids are all that has to be set;
    to give the capabilities back takes a call, since user id 0 brings CAP_FSETID with it
    (cap_task_fix_setuid in security/commoncap.c). Should the thread's own rights not be had
    back, the process ends, as in `acting_as`.

    Args:
        caller: for whom.
        group: which further group to be in; None: those that the thread is in.
        function: what to call.
        args: its arguments.

    Raises:
        OSError: EPERM, the daemon may not take these ids on; what the function raises.
    """
    if group is not None:
        with _spending(caller, group):
            return function(*args)
    uid, gid = caller.uid, caller.gid
    sets = _Sets()
    if _libc.capget(_OWN_HEADER, sets):
        raise _failure()
    try:
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)
        # They report nothing; asking with an impossible id tells what is in force.
        if _libc.setfsuid(-1) != uid or _libc.setfsgid(-1) != gid:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return function(*args)
    finally:
        uid, gid = os.geteuid(), os.getegid()
        given_back = False
        try:
            _libc.setfsgid(gid)
            _libc.setfsuid(uid)
            given_back = (
                not _libc.capset(_OWN_HEADER, sets)
                and _libc.setfsuid(-1) == uid
                and _libc.setfsgid(-1) == gid
            )
        finally:
            if not given_back:
                _end()


def pwrite_as(caller: Caller, group: int | None, fd: int, data: bytes, offset: int) -> int:
    """pwrite(2), as `spending_as` would call it; how many bytes were written.

    In compiled code, where there is some. (Of the eight microseconds that it takes beside the
    write, seven are the kernel's, which makes five sets of credentials for it.)

    Args:
        caller: for whom.
        group: as for `spending_as`.
        fd: open for writing.
        data: what.
        offset: where, in bytes.

    Raises:
        OSError: as `spending_as`.
    """
    if group is None and _write_as is not None:
        return _write_as(fd, data, offset, caller.uid, caller.gid, _end)
    return spending_as(caller, group, os.pwrite, fd, data, offset)


def registered_as(caller: Caller, group: int | None, register: Callable[[], T]) -> T:
    """Call what has the kernel keep the rights that `spending_as` would call a function with.

    Args:
        caller: for whom.
        group: as there.
        register: what to call; it writes nothing.

    Raises:
        OSError: as there.
    """
    with _spending(caller, group):
        return register()


def _spending(caller: Caller, group: int | None) -> _Acting:
    groups = None if group is None else frozenset((group,))
    return _Acting(None, caller, groups, _get_capabilities(), None)


def _end() -> None:
    """End the process: what this thread did next would be done with a stranger's rights."""
    log.critical("a thread's own rights cannot be had back: the process ends")
    os._exit(ExitCode.INTERNAL)


class _Acting:
    """This thread's rights, changed and given back; see `acting_as`.

    Args:
        umask: what the umask is to be; None: left.
        caller: whose file system ids to take on; None: they and all else stay.
        groups: what the further groups are to be; None: left.
        own: what the thread has now.
        effective: what it is to have; None: what is left with these ids.
    """

    __slots__ = ("_caller", "_effective", "_groups", "_own", "_own_groups", "_umask")

    def __init__(
        self,
        umask: int | None,
        caller: Caller | None = None,
        groups: frozenset[int] | None = None,
        own: _Capabilities | None = None,
        effective: int | None = None,
    ) -> None:
        self._umask = umask
        self._caller = caller
        self._groups = groups
        self._own = own
        self._effective = effective
        self._own_groups: list[int] | None = None  # to be given back

    def __enter__(self) -> None:
        if self._umask is not None:
            _have_own_umask()
            self._umask = os.umask(self._umask)
        if self._caller is not None:
            try:
                self._take(self._caller)
            except BaseException:
                self.__exit__()
                raise

    def _take(self, caller: Caller) -> None:
        if self._groups is not None:
            own_groups = os.getgroups()
            if self._groups != set(own_groups):
                self._own_groups = own_groups
                try:
                    _set_groups(self._groups)
                except OSError:  # nothing to give back, and no right to
                    self._own_groups = None
                    raise
        # The group first: without the user id 0 it may not be changed any more.
        if caller.gid != os.getegid():
            _libc.setfsgid(caller.gid)
        if caller.uid != os.geteuid():
            _libc.setfsuid(caller.uid)
        # They report nothing; asking with an impossible id tells what is in force.
        if _libc.setfsuid(-1) != caller.uid or _libc.setfsgid(-1) != caller.gid:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if self._effective is not None:
            assert self._own is not None
            if caller.uid != os.geteuid() or self._effective != self._own.effective:
                _set_capabilities(self._own._replace(effective=self._effective))

    def __exit__(self, *exc: object) -> None:
        if self._umask is not None:
            os.umask(self._umask)
        if self._caller is None:
            return
        own, caller = self._own, self._caller
        assert own is not None
        uid, gid = os.geteuid(), os.getegid()
        given_back = False
        try:
            if caller.gid != gid:
                _libc.setfsgid(gid)
            if caller.uid != uid:
                # Which raises all of the file capabilities again (capabilities(7)).
                _libc.setfsuid(uid)
            if caller.uid != uid or self._effective not in (None, own.effective):
                _set_capabilities(own)
            if self._own_groups is not None:
                _set_groups(self._own_groups)
            given_back = _libc.setfsuid(-1) == uid and _libc.setfsgid(-1) == gid
        finally:
            if not given_back:
                _end()


_AS_IT_IS: AbstractContextManager[None] = contextlib.nullcontext()


def _have_own_umask() -> None:
    """Make the umask (and the working directory) this thread's own (unshare(2))."""
    if getattr(_thread, "unshared", False):
        return
    if _libc.unshare(_CLONE_FS):
        raise _failure()
    _thread.unshared = True
