"""Opening a file of our own, the log or a trace, in a directory that others may write.

Whoever may write the directory can put a symlink, a FIFO or a hard link there, at any moment.
So a file is opened once, in a way that neither waits nor follows; what it is, is asked of the
descriptor; and nothing is done to it before that. In a private directory, which nobody but root
and we may write, whoever puts things there means them.

Locks touched: none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def place_of(path: str) -> tuple[int, str]:
    """An O_PATH descriptor of the directory that a path leads to, and the name in it."""
    directory, name = os.path.split(path)
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), name


def is_private(directory: int) -> bool:
    """Whether only root and we may put things into an open directory."""
    status = os.fstat(directory)
    return _is_trusted(status) and not status.st_mode & _WRITABLE_BY_OTHERS


def open_own(directory: int, name: str, mode: int, flags: int = 0, *, regular: bool = False) -> int:
    """Open a file for writing, and make it if it is not there. Nothing in it is changed.

    Args:
        directory: a descriptor of the directory, O_PATH will do.
        name: in it. A symlink is followed where the directory is private.
        mode: of a new file.
        flags: more of open(2)'s, O_APPEND say; not O_TRUNC, which comes before any check.
        regular: whether it must be a regular file. Else it may be a device or a pipe; nobody
            who reads that: ENXIO.

    Raises:
        OSError: EPERM, it is not ours, with the reason as its text; the errors of open(2).
    """
    private = is_private(directory)
    flags |= os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | (0 if private else os.O_NOFOLLOW), mode, dir_fd=directory)
    except OSError as e:
        if e.errno == errno.ELOOP and not private:
            raise _refusal("a symlink in a directory that others may write") from None
        raise
    try:
        status = os.fstat(fd)
        is_regular = stat.S_ISREG(status.st_mode)
        if regular and not is_regular:
            raise _refusal("no regular file")
        if not private and not _is_trusted(status):
            raise _refusal("another user's, in a directory that others may write")
        if not private and is_regular and status.st_nlink != 1:
            raise _refusal("a file with several names, in a directory that others may write")
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & os.O_APPEND)  # it may be waited for from now on
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _refusal(reason: str) -> OSError:
    return OSError(errno.EPERM, reason)
