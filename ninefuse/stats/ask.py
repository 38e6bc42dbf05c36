"""Asking a mount for its counters, in a child process.

A mount that hangs hangs whoever touches it, and that must not be the user's terminal. So
nothing but the child asks anything of the path that was given, not even whether it exists.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import time
from typing import NamedTuple

from ninefuse.linux import mountinfo
from ninefuse.stats import ATTRIBUTE, Problem

_KILL_SECONDS = 0.2  # for a killed child to be gone

# What the calls say about a mount whose daemon has died, or whose connection was aborted.
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
# What they say where there is no such attribute, or where it may not be read.
_MISSING = (errno.ENODATA, errno.ENOTSUP)
_DENIED = (errno.EACCES, errno.EPERM)


class Reply(NamedTuple):
    """What came of reading the attribute.

    error: the errno, 0 if there is a value. kind, mountpoint: the type of the file system and
    where it is mounted, "" if that was not looked at.
    """

    error: int
    value: str
    kind: str = ""
    mountpoint: str = ""


class Question:
    """A child process that reads the attribute. At most one is waited for at a time.

    Argument: path, what the user gave.
    """

    def __init__(self, path: str) -> None:
        self._answer = b""
        self._pipe, their_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            # Its end is what it reports too: the end closes the pipe.
            try:
                os.setsid()  # a terminal's Ctrl-C is for the command alone
                os.close(self._pipe)
                answer = json.dumps(look(path)).encode()
                while answer:
                    answer = answer[os.write(their_end, answer) :]
            finally:
                os._exit(0)
        os.close(their_end)

    def answer(self, seconds: float) -> Reply | None:
        """Wait at most so many seconds for the reply; None if it has not come.

        Raises Problem when the child ended without one.
        """
        deadline = time.monotonic() + seconds
        while select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(self._pipe, 1 << 16)
            if part:
                self._answer += part
                continue
            if not self._answer:
                raise Problem("the child process that reads the counters has failed")
            return Reply(*json.loads(self._answer))
        return None

    def close(self) -> None:
        """End the child; one that not even SIGKILL ends before the mount answers is left."""
        os.close(self._pipe)
        deadline = time.monotonic() + _KILL_SECONDS
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.001)


def look(path: str) -> Reply:
    """Read the attribute of the path, else of the mount point of the FUSE mount that it is in.

    May block for ever: for child processes only.
    """
    try:
        return Reply(0, _attribute(path))
    except OSError as error:
        code = error.errno or errno.EIO
    if code not in (*_MISSING, *_DENIED):
        return Reply(code, "")
    try:
        kind, mountpoint = mount_of(path)
    except OSError:  # it may not be reached, or is out of this process's sight
        return Reply(code, "")
    if not kind.startswith("fuse"):
        return Reply(code, "", kind, mountpoint)
    try:
        return Reply(0, _attribute(mountpoint), kind, mountpoint)
    except OSError as error:
        return Reply(error.errno or errno.EIO, "", kind, mountpoint)


def _attribute(path: str) -> str:
    return os.getxattr(path, ATTRIBUTE).decode("utf-8", "replace")


def mount_of(path: str) -> tuple[str, str]:
    """Return the type of the file system that the path is on, and its mount point.

    Raises OSError (FileNotFoundError if the mount is not in the list of mounts).
    """
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        line = mountinfo.of_file(descriptor)
    finally:
        os.close(descriptor)
    if line is None:
        raise FileNotFoundError(errno.ENOENT, "no such mount", path)
    return os.fsdecode(line.kind), os.fsdecode(line.point)


def explain(path: str, reply: Reply) -> Problem:
    """Return what to tell the user of a path from which there are no counters to be had."""
    code, where = reply.error, reply.mountpoint or path
    if code in (errno.ENOENT, errno.ENOTDIR):
        return Problem(f"{path}: no such directory")
    if code in _DEAD:
        return Problem(f"{path}: the daemon of this mount has died: unmount it (fusermount3 -u)")
    if code in _DENIED:
        return Problem(
            f"{where}: permission denied: a mount is open to the user who mounted it, "
            "and to others with -o allow_other only"
        )
    if code in _MISSING and reply.kind == mountinfo.OURS:
        if code == errno.ENOTSUP:
            return Problem(
                f"{where} is mounted with -o noxattr, and so without this attribute: "
                "kill -USR1 has its daemon log the counters "
                "(to syslog, or where --log says)"
            )
        return Problem(
            f"{where}: this ninefuse does not publish its counters: update it, "
            "or have them logged with kill -USR1"
        )
    if code == errno.ENOTSUP and reply.kind.startswith("fuse"):
        return Problem(
            f"{where} ({reply.kind}) is no mount of ninefuse, or is one with -o noxattr "
            "(then kill -USR1 has its daemon log the counters)"
        )
    if code in _MISSING:
        kind = f" (but of {reply.kind}, mounted on {where})" if reply.kind else ""
        return Problem(f"{path} is in no mount of ninefuse{kind}")
    return Problem(f"{path}: {os.strerror(code)}")
