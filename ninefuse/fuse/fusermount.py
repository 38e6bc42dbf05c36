"""Mounting and unmounting by fusermount3, as libfuse does it: for users, and for auto_unmount.

fusermount3 is set-user-id root. It opens the device as the user who calls it, mounts, and sends
the device over the socket that _FUSE_COMMFD names. For auto_unmount it stays: when the other end
of the socket is closed, it unmounts what nobody serves any more.

It is started by posix_spawn(3). subprocess gives a child no signal mask of its own, but by Python
that runs between fork and exec, which is not safe beside threads.

Source: libfuse's lib/mount.c and util/fusermount.c, 3.14 to 3.18.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Iterable, Sequence

from ninefuse.process import signals

log = logging.getLogger(__name__)

PROGRAM = "fusermount3"
_COMMFD = "_FUSE_COMMFD"
_MOST = 4096  # of what it says, in bytes

# Python, or who started it, may ignore these, and programs inherit that.
_DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD)


class Refused(Exception):
    """There is no mount. Its text is the reason."""


def mount(mountpoint: str, options: Iterable[str]) -> tuple[int, int | None]:
    """Have a file system mounted. Blocks until it is.

    Args:
        mountpoint: an absolute path.
        options: words for -o, as in Settings.mount_options; commas and backslashes of fsname=
            are escaped there just as fusermount3 undoes it. To users it forbids set-ids and
            devices whatever they say, and says so, which is logged.

    Returns:
        The device, open; and with auto_unmount our end of the socket, which is to be closed once
        there is nothing left to unmount. The child is not waited for then.

    Raises:
        Refused: with what fusermount3 said.
        OSError: of pipe(2), socketpair(2), posix_spawn(3), recvmsg(2).
    """
    words = list(options)
    stays = "auto_unmount" in words
    with _Said() as said, contextlib.ExitStack() as ends:
        ours, theirs = map(ends.enter_context, socket.socketpair())
        pid = _start(["-o", ",".join(words), "--", mountpoint], said, theirs.fileno())
        theirs.close()  # now the child's end is the end
        device = _received(ours)
        if device is not None and stays:
            said.log()
            return device, ours.detach()
        code = _exit_code(pid)
        if device is None:
            raise Refused(said.text() or f"{PROGRAM} gave no device ({_described(code)})")
        if code:
            os.close(device)
            unmount(mountpoint)
            raise Refused(said.text() or f"{PROGRAM} failed ({_described(code)})")
        said.log()
        return device, None


def unmount(mountpoint: str) -> None:
    """Detach a user's mount; what is still in use ends later. Blocks.

    Where that is refused, the log says so.
    """
    try:
        with _Said() as said:
            code = _exit_code(_start(["-u", "-z", "--", mountpoint], said))
            reason = "" if code == 0 else said.text() or _described(code)
    except (OSError, Refused) as e:
        reason = str(e)
    if reason:
        log.warning("%s: cannot unmount: %s", mountpoint, reason)


class _Said:
    """What a child says on stderr: a pipe. What it does not hold is lost: no child waits for us."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)
        os.set_blocking(self.theirs, False)

    def __enter__(self) -> _Said:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._ours)
        os.close(self.theirs)

    def text(self) -> str:
        """The last of it, on one line, in which a semicolon ends each of its own."""
        try:
            said = os.read(self._ours, 1 << 16)
        except BlockingIOError:  # nothing
            return ""
        lines = said[-_MOST:].decode(errors="replace").splitlines()
        return "; ".join(" ".join(line.split()) for line in lines if line.strip())

    def log(self) -> None:
        """Warn of what it said though it did what it was to do: of options that it passed over."""
        if text := self.text():
            log.warning("%s", text)


def _start(arguments: Sequence[str], said: _Said, commfd: int | None = None) -> int:
    """Start fusermount3; its process id."""
    environment = dict(os.environ)
    kept = {0, 1, 2}
    if commfd is not None:
        environment[_COMMFD] = str(commfd)
        os.set_inheritable(commfd, True)
        kept.add(commfd)
    streams = (
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, said.theirs, 2),
    )
    closed = [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() - kept]
    return os.posix_spawn(
        _program(),
        [PROGRAM, *arguments],
        environment,
        file_actions=[*streams, *closed],
        # What asks us to end comes to a whole process group or service. It is not to end the child
        # between its mount and the handing over, which would leave a dead mount. The group has to
        # be ours: an automount keeps all others waiting at its mount point.
        setsigmask=signals.STOP,
        setsigdef=_DEFAULT,
    )


def _program() -> str:
    """The path of fusermount3: of the system's, or of one on the PATH, as libfuse looks for it.

    Relative directories of the PATH are passed over: the daemon is elsewhere by now.
    """
    places = ["/usr/bin", *(place for place in os.get_exec_path() if os.path.isabs(place))]
    program = shutil.which(PROGRAM, path=os.pathsep.join(places))
    if program is None:
        raise Refused(f"there is no {PROGRAM} on the PATH")
    return program


def _inheritable() -> set[int]:
    """Descriptors that our own caller left open: those of Python are close-on-exec."""
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # closed by now, as the listing's own
            if os.get_inheritable(number):
                found.add(number)
    return found


def _received(ours: socket.socket) -> int | None:
    """The descriptor that comes over a socket; None: the other end was closed."""
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
        return descriptor
    return None


def _exit_code(pid: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # SIGCHLD is ignored, and so the kernel has collected it
        return 0


def _described(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"killed by signal {-code}"
