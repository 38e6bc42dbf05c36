"""pyfuse3's session: libfuse reads the device, trio runs a task for each request.

What is done around it so that it stands still for nobody is in pyfuse3_device.py.

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyfuse3
import trio

from ninefuse.awaiting import Awaiting
from ninefuse.driving.driver import Executor
from ninefuse.fuse import notices, rootmount
from ninefuse.fuse import pyfuse3_device as device
from ninefuse.fuse.adapter import Adapter
from ninefuse.fuse.mounting import refused
from ninefuse.fuse.sessions import Place, Watcher
from ninefuse.linux import mountinfo
from ninefuse.settings import Settings
from ninefuse.tree.session import Session

# Tasks that wait for the device to give them a request. Each keeps a buffer of 1 MiB,
# of which only what was used takes memory; fewer would end and start all the time.
_MIN_TASKS = 32
# Requests under way at which the device is read no more: well above what the kernel
# sends when every thread of a busy machine is stuck in one file.
_MAX_TASKS = 20_000


class Pyfuse3Session:
    """The requests of one mount, by pyfuse3.

    Args:
        settings: of the mount.
        session: the conversation.
        driver: that bodies are run by.
    """

    asks_again = False  # pyfuse3 does not know whether files will be found

    def __init__(self, settings: Settings, session: Session, driver: Executor) -> None:
        self._settings = settings
        self._adapter = Adapter(session, Awaiting(driver), settings)
        self._tracer: Watcher | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._ends = False

    @property
    def errors(self) -> Counter[tuple[str, int]]:
        """How many there were, by callback and errno."""
        return self._adapter.errors

    @property
    def statistics(self) -> Callable[[], bytes]:
        """What says the value of the attribute that the counters are published in."""
        return self._adapter.statistics

    @statistics.setter
    def statistics(self, function: Callable[[], bytes]) -> None:
        self._adapter.statistics = function

    def mount(self) -> Place:
        """As of a `FuseSession`."""
        try:
            made = rootmount.mount(self._settings)
        except OSError as e:
            raise refused(self._settings.mountpoint, e.strerror or str(e)) from None
        if made is None:
            self._init(self._settings.mountpoint)
            return Place(mountinfo.connection_at(self._settings.mountpoint))
        fd, point = made
        # Modes come as they were asked for, with the caller's umask beside them.
        self._adapter.unmasked = True
        try:
            self._init(f"/dev/fd/{fd}")
        except BaseException:
            point.detach()
            os.close(fd)
            raise
        return Place(point.number, point)

    def watch(self, tracer: Watcher) -> None:
        """As of a `FuseSession`."""
        self._tracer = tracer

    def run(self, started: Callable[[], None]) -> None:
        """As of a `FuseSession`."""
        device.install(None if self._tracer is None else partial(_watched, self._tracer))
        try:
            trio.run(self._serve, started)
        finally:
            device.remove()

    def end(self) -> None:
        """As of a `FuseSession`."""
        self._ends = True
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(device.terminate)

    def passed(self) -> int:
        """As of a `FuseSession`; its kernel is not asked to."""
        return 0

    def prune(self, nodeids: Sequence[int]) -> None:
        """As of a `FuseSession`."""
        notices.prune(device.descriptor(), nodeids)

    def attributes_changed(self, nodeid: int) -> None:
        """As of a `FuseSession`."""
        notices.attributes_changed(device.descriptor(), nodeid)

    def leave(self, *, is_mounted: bool) -> None:
        """As of a `FuseSession`."""
        pyfuse3.close(unmount=is_mounted)

    def close(self) -> None:
        """As of a `FuseSession`: there is nothing left."""

    async def _serve(self, started: Callable[[], None]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, started)
            if not self._ends:
                await pyfuse3.main(_MIN_TASKS, _MAX_TASKS)
            nursery.cancel_scope.cancel()

    async def _announce(self, started: Callable[[], None]) -> None:
        await self._adapter.started.wait()
        device.raise_limits(self._settings.mountpoint)
        started()

    def _init(self, mountpoint: str) -> None:
        """pyfuse3.init, with what libfuse prints on failure made part of the failure."""
        with _captured_stderr() as said:
            try:
                pyfuse3.init(self._adapter, mountpoint, set(self._settings.mount_options))
            except RuntimeError as e:
                reason = " ".join(said().split()) or str(e)
                raise refused(self._settings.mountpoint, reason) from None


def _watched(tracer: Watcher, wait: device.WaitReadable) -> device.WaitReadable:
    """Return a wait for the FUSE device that does the same and is watched.

    When a task waits (again) it has sent its reply; when its wait is over it receives.
    """
    tracer.who = trio.lowlevel.current_task

    async def watched(fd: int) -> None:
        tracer.replied()
        await wait(fd)
        tracer.received()

    return watched


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Send descriptor 2 to a file; yields a function that says what came so far."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 4096, 0).decode(errors="replace")
        finally:
            os.dup2(before, 2)
            os.close(before)
