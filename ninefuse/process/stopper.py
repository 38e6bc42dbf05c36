"""Ends a mount from outside the dispatcher, which may be stuck.

A mount is unmounted by a program of its own (unmount.py), while it goes on being served. What
does not end in time is ended without: first the dispatcher's loop, then the process.

Locks touched: those of what it asks, all held for an instant only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ninefuse.exitcodes import ExitCode
from ninefuse.linux import mountinfo
from ninefuse.process import logs, unmount
from ninefuse.process.notify import notify

log = logging.getLogger(__name__)

BUSY_GRACE = 10.0  # seconds to go on serving a busy mount that was detached
END_GRACE = 5.0  # seconds after that until the process ends whatever hangs


class Place(Protocol):
    """Where root has made the mount: found by its parent's descriptor, whatever its path is."""

    parent: int
    number: int

    def is_ours(self) -> bool:
        """Whether it is our mount that lies on top there. The mount is not asked."""


class Stopper:
    """Ends one mount. Its methods may be called on any thread.

    Attributes:
        number: of the mount's FUSE connection, by which it is known from another mount at
            the same place; None for a mount that was handed over open.
        point: where it is, if root has made it.
        ended: set once the dispatcher serves no more.

    Args:
        mountpoint: its real path.
        is_used: whether files of it are open, or mapped.
        end_loop: has the dispatcher end, whether the mount is there or not; it does not wait.
    """

    def __init__(
        self, mountpoint: str, is_used: Callable[[], bool], end_loop: Callable[[], None]
    ) -> None:
        self.number: int | None = None
        self.point: Place | None = None
        self.ended = threading.Event()
        self._mountpoint = mountpoint
        self._is_used = is_used
        self._end_loop = end_loop
        self._is_announced = False
        # Descriptors to end with, should there be no others left then.
        self._spare = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(8)]

    def is_mounted(self) -> bool:
        """Whether it is our mount that lies on top at the mount point."""
        try:
            if self.point is not None:
                return self.point.is_ours()
            if self.number is None:
                return False
            return mountinfo.connection_at(self._mountpoint) == self.number
        except FileNotFoundError:  # nor is the mount point there any more
            return False
        except OSError as e:  # no descriptor left, say
            log.warning("%s: cannot look whether it is mounted: %s", self._mountpoint, e)
            return False

    def announce(self) -> None:
        """This is the end: tell the service manager, once; what follows may take descriptors."""
        self._give_up_spare()
        if not self._is_announced:
            self._is_announced = True
            notify("STOPPING=1")

    def stop(self) -> None:
        """Unmount while the mount goes on being served; then see that the loop ends.

        It takes BUSY_GRACE and twice END_GRACE at most; where the dispatcher hangs, the process
        ends in here.
        """
        self.announce()
        until = time.monotonic() + BUSY_GRACE
        helper = self._helper() if self.is_mounted() else None
        # A busy mount is detached, and kept alive by the helper until nobody has a file
        # open (or mapped) any more, or the time is up.
        while not self.ended.wait(0.05) and time.monotonic() < until:
            if not self._is_used():
                if helper is None:
                    break
                assert helper.stdin is not None
                helper.stdin.close()
                if helper.poll() is not None:
                    break
        if helper is not None:
            assert helper.stdin is not None
            helper.stdin.close()
        if not self.ended.wait(END_GRACE if helper is not None else 0):
            log.warning("%s: ending though it may be in use", self._mountpoint)
            self._end_loop()
            if not self.ended.wait(END_GRACE):
                log.error("%s: the dispatcher does not end; ending without", self._mountpoint)
                self.abandon()
                logs.finish()
                os._exit(ExitCode.INTERNAL)

    def abandon(self) -> None:
        """Detach the mount without waiting for anything."""
        self._give_up_spare()
        if not self.is_mounted():
            return
        point = self.point
        if point is None:
            command = ["fusermount3", "-u", "-z", "--", self._mountpoint]
        else:
            command = self._unmounter("--detach")
        with contextlib.suppress(OSError):
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=() if point is None else (point.parent,),
            )

    def _helper(self) -> subprocess.Popen[bytes] | None:
        try:
            return subprocess.Popen(
                self._unmounter(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a second Ctrl-C is for us alone
                pass_fds=() if self.point is None else (self.point.parent,),
            )
        except OSError as e:
            log.error("%s: cannot start the helper that unmounts: %s", self._mountpoint, e)
            return None

    def _unmounter(self, *words: str) -> list[str]:
        """The command that unmounts; the descriptor of `point` is to be passed on to it."""
        command = [sys.executable, "-I", unmount.__file__, *words, self._mountpoint]
        if self.point is not None:
            command += [str(self.point.parent), str(self.point.number)]
        return command

    def _give_up_spare(self) -> None:
        with contextlib.suppress(IndexError):  # that was the last, whichever thread closed it
            while True:
                os.close(self._spare.pop())
