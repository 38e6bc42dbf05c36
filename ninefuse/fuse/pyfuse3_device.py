"""The FUSE device under pyfuse3: waiting for it, reading it without standing still, its limits.

pyfuse3 runs a number of tasks, each of which waits for the device, reads a request and
answers it. It reaches trio through its own module attribute, where this module puts a
stand-in, for two reasons.

*Standing still.* pyfuse3 reads the device while it holds the interpreter's lock, and the
device blocks. When a request is withdrawn between the moment the device is readable and
the read (its caller was killed), the read waits for the next request, and every thread
of the daemon with it. Making the device non-blocking is no cure: pyfuse3 takes EAGAIN
for the end. It does go on after EINTR. So an interval timer interrupts the read: it runs
while requests come in, and stops after a tick without any, so that an idle daemon sleeps.

*Waiting.* pyfuse3's tasks queue for a lock, and the one that has it waits for the device
in trio: two or three rounds of trio's loop for each request. Each round makes system
calls that let the interpreter's lock go for an instant, which wakes workers that then
find it taken again. The stand-in's lock is none, and its wait asks the device first and
returns at once if there is a request. When there is none, one task waits for the device
on behalf of all, and then wakes as many as there were requests in the round before: what
arrives together is read in one round. No await lies between the answer and the read, so
no two tasks read for one request.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

import pyfuse3
import trio

from ninefuse.linux import syscalls
from ninefuse.linux.mountinfo import connection_at
from ninefuse.linux.syscalls import PollFd, is_ready

log = logging.getLogger(__name__)

WaitReadable = Callable[[int], Awaitable[None]]

_TICK = 0.1  # seconds: how long a read may stand still, twice that at worst
_IN_A_ROW = 16  # requests read without a round of trio's loop, for the others' sake

# Requests in the background; the kernel's defaults are 12 and 9. Well below what pyfuse3_session.py
# lets run at once, so that they alone never stop the device from being read.
_LIMITS = {"max_background": 16_000, "congestion_threshold": 12_000}


class _NoLock:
    """Stands in for trio.Lock, which pyfuse3 takes around waiting for the device."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc: object) -> None:
        pass


class _Lowlevel:
    """Stands in for trio.lowlevel.

    Attributes:
        wait_readable: waits until the device has something to read; see the module's
            docstring.
    """

    def __init__(self, around: Callable[[WaitReadable], WaitReadable] | None) -> None:
        wait = self._wait_for_request
        self.wait_readable: WaitReadable = wait if around is None else around(wait)
        self._pollfd = PollFd(-1, select.POLLIN, 0)
        self._pollfd_address = ctypes.byref(self._pollfd)
        self._parked = trio.lowlevel.ParkingLot()
        self._waiting = False  # whether a task waits for the device on behalf of all
        self._woken = 0  # tasks that are about to ask the device
        self._round = 0  # requests since the last wait
        self._closed = False
        self._in_a_row = 0
        self._reads = 0
        self._reads_at_tick = 0
        self._ticking = False

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    def descriptor(self) -> int:
        """The device's, as it was waited for last; -1 before that."""
        return int(self._pollfd.fd)

    async def _wait_for_request(self, fd: int) -> None:
        self._pollfd.fd = fd
        while self._in_a_row == _IN_A_ROW or not is_ready(self._pollfd_address):
            self._in_a_row = 0
            # Asked here, after each wait: pyfuse3 asked before the first.
            if self._closed:
                raise trio.ClosedResourceError
            if self._waiting:
                await self._parked.park()
                self._woken -= 1
            else:
                await self._wait(fd)
        self._in_a_row += 1
        self._round += 1
        self._reads += 1
        if not self._waiting and not self._woken:
            self._wake(1)  # there may be more, and somebody must wait for what comes next
        if not self._ticking:
            self._ticking = True
            signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)

    async def _wait(self, fd: int) -> None:
        self._waiting = True
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            self._waiting = False
            self._wake(max(1, self._round))
            self._round = 0

    def close(self) -> None:
        """Let nobody wait any more."""
        self._closed = True
        self._wake(len(self._parked))

    def _wake(self, count: int) -> None:
        self._woken += len(self._parked.unpark(count=count))

    def tick(self, signum: int, frame: FrameType | None) -> None:
        """The timer's signal: it has interrupted a read, if one stood still."""
        if self._reads == self._reads_at_tick:
            self._ticking = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._reads_at_tick = self._reads


class _Trio:
    """Stands in for the trio module."""

    Lock = _NoLock

    def __init__(self, around: Callable[[WaitReadable], WaitReadable] | None) -> None:
        self.lowlevel = _Lowlevel(around)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def install(around: Callable[[WaitReadable], WaitReadable] | None = None) -> None:
    """Have pyfuse3 wait for the device by the rules above. On the dispatcher, once.

    Args:
        around: makes of the wait for the device one that does more (tracing.py).
    """
    stand_in = _Trio(around)
    signal.signal(signal.SIGALRM, stand_in.lowlevel.tick)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    pyfuse3.trio = stand_in  # type: ignore[attr-defined]


def descriptor() -> int:
    """The device, as it was waited for last; -1: it was not yet."""
    return int(pyfuse3.trio.lowlevel.descriptor())  # type: ignore[attr-defined]


def terminate() -> None:
    """End pyfuse3's tasks as they come back from what they are doing. On the dispatcher."""
    pyfuse3.trio.lowlevel.close()  # type: ignore[attr-defined]
    pyfuse3.terminate()


def remove() -> None:
    """Undo `install`."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    pyfuse3.trio = trio  # type: ignore[attr-defined]


def raise_limits(mountpoint: str) -> None:
    """Let more than a dozen readaheads and writebacks be under way, where we may.

    Requests in the background are counted for the whole mount; at the kernel's limit
    of 12, a dozen reads stuck in one file stop the buffered reads of all others. Only
    root may raise it (Linux Documentation/filesystems/fuse, fusectl).
    """
    number = connection_at(mountpoint)
    if number is None or os.geteuid() != 0:
        return
    try:
        with _control_file_system() as control:
            for name, value in _LIMITS.items():
                fd = os.open(f"{number}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
                try:
                    os.write(fd, b"%d" % value)
                finally:
                    os.close(fd)
    except OSError as e:
        log.info("the limits of the FUSE connection stay as they are: %s", e)


@contextlib.contextmanager
def _control_file_system() -> Iterator[int]:
    """A descriptor of fusectl's root, mounted for us alone where nobody mounted it."""
    path = "/sys/fs/fuse/connections"
    if os.path.isdir(path) and os.listdir(path):
        control = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        control = syscalls.detached_mount(b"fusectl")
    try:
        yield control
    finally:
        os.close(control)
