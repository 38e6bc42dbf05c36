"""Making files in a caller's name, by what the kernel says of the caller's groups.

A request that makes something says which further group of the caller's the directory is of, if
it is of one (FUSE_CREATE_SUPP_GROUP). Where mode bits alone decide, that is all there is to know:
/proc need not be asked. What is refused then is tried again with all the caller's rights, since a
capability, or another group, may allow it.

Locks touched: none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeVar

from ninefuse.linux.callers import MAKE, Caller, Rights, needs_acting
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.syscalls import proc_path

T = TypeVar("T")

_ACCESS_LIST = "system.posix_acl_access"


def make_as(
    caller: Caller | None, directory: int, mode: int, make: Callable[..., T], *args: object
) -> T:
    """Call what makes something in a directory, with a caller's rights and umask. Blocks.

    Args:
        caller: whose it is to be; None: the daemon's.
        directory: its descriptor, O_PATH will do.
        mode: that is asked for. Whether a set-group-id bit stays depends on all the groups.
        make: makes it, or fails and has made nothing.
        args: its arguments.

    Raises:
        OSError: what ``make`` raises; the errors of `acting_as`.
    """
    marked = caller is not None and bool(mode & stat.S_ISGID)
    if (
        caller is not None
        and caller.groups is not None
        and not marked
        and caller.uid != 0
        and needs_acting(caller)
        and not _has_list(directory)
    ):
        try:
            with acting_as(caller, making=True, rights=Rights(frozenset(caller.groups))):
                return make(*args)
        except PermissionError:
            pass
    with acting_as(caller, (MAKE, directory, b""), bits=marked, making=True):
        return make(*args)


def _has_list(directory: int) -> bool:
    """Whether an ACL says who may enter and change a directory: any group may be in it."""
    try:
        os.getxattr(proc_path(directory), _ACCESS_LIST)
    except OSError:  # there is none, or there are none on this file system
        return False
    return True
