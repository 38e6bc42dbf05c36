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
import errno
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from ninefuse.errors import error
from ninefuse.exitcodes import ExitCode
from ninefuse.linux.callers import (
    ALL,
    Caller,
    Rights,
    granted,
    may_all_that_we_may,
    rights_of,
)
from ninefuse.linux.capabilities import (
    CAP_FSETID,
    CLONE_FS,
    OWN_HEADER,
    SYS_SETGROUPS,
    Capabilities,
    Sets,
    failure,
    get_capabilities,
    libc,
    set_capabilities,
    set_groups,
)

_write_as: Callable[[int, bytes, int, int, int, Callable[[], object]], int] | None
try:
    from ninefuse.linux._transfer import write_as as _write_as
except ImportError:  # it was not built
    _write_as = None
_CompiledActing: type[Acting] | None
try:
    from ninefuse.linux._rights import Acting

    _CompiledActing = None if SYS_SETGROUPS is None else Acting
except ImportError:  # it was not built
    _CompiledActing = None

log = logging.getLogger(__name__)

T = TypeVar("T")

_thread = threading.local()  # unshared: whether the umask is the thread's own


def acting_as(
    caller: Caller | None,
    *over: tuple[int, int, bytes],
    bits: bool = False,
    making: bool = False,
    rights: Rights | None = None,
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
        rights: those to have, at most the caller's; None: all the caller's.

    Raises:
        OSError: EPERM, the daemon may not take these ids on; what looking at the caller's
            process meets.
    """
    umask = caller.umask if making and caller is not None else None
    euid = os.geteuid()
    if euid != 0 or (caller is None and not bits):
        return _AS_IT_IS if umask is None else _Acting(umask)
    egid = os.getegid()
    if (
        caller is not None
        and rights is None
        and caller.uid == euid
        and caller.gid == egid
        and may_all_that_we_may(caller, CAP_FSETID if bits else 0)
    ):
        return _AS_IT_IS if umask is None else _Acting(umask)
    own = get_capabilities()
    if caller is None:
        caller, rights = Caller(euid, egid), Rights(capabilities=ALL)
    elif rights is None:
        rights = rights_of(caller, own.permitted)
    effective = rights.capabilities & own.permitted
    if rights.mapped:
        effective |= granted(rights.mapped, caller.pid, over) & own.permitted
    groups: frozenset[int] | None = rights.groups
    if effective == own.permitted and caller.uid == euid:
        # It may do all that the daemon may, mostly as it is.
        effective = own.effective | (own.permitted & CAP_FSETID if bits else 0)
        groups = None
        if effective == own.effective and caller.gid == egid:
            return _AS_IT_IS if umask is None else _Acting(umask)
    if _CompiledActing is None:
        return _Acting(umask, caller, groups, own, effective)
    return _CompiledActing(umask, caller, groups, own, effective, _have_own_umask, end_process)


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
    sets = Sets()
    if libc.capget(OWN_HEADER, sets):
        raise failure()
    try:
        libc.setfsgid(gid)
        libc.setfsuid(uid)
        # They report nothing; asking with an impossible id tells what is in force.
        if libc.setfsuid(-1) != uid or libc.setfsgid(-1) != gid:
            raise error(errno.EPERM)
        return function(*args)
    finally:
        uid, gid = os.geteuid(), os.getegid()
        given_back = False
        try:
            libc.setfsgid(gid)
            libc.setfsuid(uid)
            given_back = (
                not libc.capset(OWN_HEADER, sets)
                and libc.setfsuid(-1) == uid
                and libc.setfsgid(-1) == gid
            )
        finally:
            if not given_back:
                end_process()


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
        return _write_as(fd, data, offset, caller.uid, caller.gid, end_process)
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
    return _Acting(None, caller, groups, get_capabilities(), None)


def end_process() -> None:
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
        own: Capabilities | None = None,
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
                    set_groups(self._groups)
                except OSError:  # nothing to give back, and no right to
                    self._own_groups = None
                    raise
        # The group first: without the user id 0 it may not be changed any more.
        if caller.gid != os.getegid():
            libc.setfsgid(caller.gid)
        if caller.uid != os.geteuid():
            libc.setfsuid(caller.uid)
        # They report nothing; asking with an impossible id tells what is in force.
        if libc.setfsuid(-1) != caller.uid or libc.setfsgid(-1) != caller.gid:
            raise error(errno.EPERM)
        if self._effective is not None:
            assert self._own is not None
            if caller.uid != os.geteuid() or self._effective != self._own.effective:
                set_capabilities(self._own._replace(effective=self._effective))

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
                libc.setfsgid(gid)
            if caller.uid != uid:
                # Which raises all of the file capabilities again (capabilities(7)).
                libc.setfsuid(uid)
            if caller.uid != uid or self._effective not in (None, own.effective):
                set_capabilities(own)
            if self._own_groups is not None:
                set_groups(self._own_groups)
            given_back = libc.setfsuid(-1) == uid and libc.setfsgid(-1) == gid
        finally:
            if not given_back:
                end_process()


_AS_IT_IS: AbstractContextManager[None] = contextlib.nullcontext()


def _have_own_umask() -> None:
    """Make the umask (and the working directory) this thread's own (unshare(2))."""
    if getattr(_thread, "unshared", False):
        return
    if libc.unshare(CLONE_FS):
        raise failure()
    _thread.unshared = True
