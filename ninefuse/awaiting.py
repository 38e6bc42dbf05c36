"""A driver for those who use trio: a request's end becomes a task's wake-up.

``await awaiting.run(name, body)`` starts a body (executor.py) and waits for its end. Where that
comes on another thread, it is posted to the dispatcher, which is trio's thread. trio tells us
through its instrument hooks when it is about to sleep and when it has slept.

pyfuse3's session is served by it; so is whatever else lives in trio's tasks.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import logging
from threading import get_ident
from typing import TypeVar

import trio

from ninefuse.calls import Body
from ninefuse.driving.driver import Executor
from ninefuse.driving.request import Request
from ninefuse.driving.shares import Whose

log = logging.getLogger(__name__)

T = TypeVar("T")


class Awaiting(trio.abc.Instrument):
    """Runs bodies for the tasks of one trio loop.

    Args:
        driver: that they are run by.
    """

    def __init__(self, driver: Executor) -> None:
        self.driver = driver
        self._has_begun = False

    async def run(self, name: str, body: Body[T], user: Whose = None) -> T:
        """Drive a body to its end and return its result. In a task.

        Cancellation is refused from the moment the body has started.

        Args:
            name: what reports call the request.
            body: an operation that has not been started.
            user: as of `Executor.start`.

        Raises:
            Exception: what the body raised; see `Executor.start`.
        """
        driver = self.driver
        end = _End(self)
        request = driver.start(name, body, end, user)
        if not end.is_here:
            self.begin()
            end.is_awaited = True
            await trio.lowlevel.wait_task_rescheduled(_refuse)
        driver.count(request)
        if driver.observer is not None:
            driver.observer.answered(request.body)
        result: T = request.result()
        return result

    def before_io_wait(self, timeout: float) -> None:
        """trio is about to wait for events."""
        try:
            self.driver.before_wait(sleeps=timeout > 0)
        except Exception:  # trio would ask us no more
            log.exception("what comes before a wait failed")

    def after_io_wait(self, timeout: float) -> None:
        """trio has waited for events."""
        try:
            self.driver.after_wait()
        except Exception:  # likewise
            log.exception("what comes after a wait failed")

    def begin(self) -> None:
        """See that what is posted to the dispatcher from elsewhere is done soon. In a task.

        `run` does so where it is needed; who starts bodies otherwise has to.
        """
        if self._has_begun:
            return
        self._has_begun = True
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):  # the loop is no more: nobody sleeps
                token.run_sync_soon(_nothing, idempotent=True)

        self.driver.dispatcher.wake = wake
        trio.lowlevel.add_instrument(self)
        if self.driver.fd >= 0:
            trio.lowlevel.spawn_system_task(self._be_woken)

    async def _be_woken(self) -> None:
        """Wait for the driver's descriptor, so that trio does, and go on with what is done.

        After the draining, though trio has looked just before: what has come in between would
        be drained and not seen.
        """
        while True:
            await trio.lowlevel.wait_readable(self.driver.fd)
            self.driver.drain()
            self.after_io_wait(0)


class _End:
    """What is called at the end of a request, and the task that waits for that."""

    __slots__ = ("_awaiting", "_task", "_thread", "is_awaited", "is_here")

    def __init__(self, awaiting: Awaiting) -> None:
        self._awaiting = awaiting
        self._task = trio.lowlevel.current_task()
        self._thread = get_ident()
        self.is_awaited = False
        self.is_here = False  # the end is known on the dispatcher

    def __call__(self, request: Request) -> None:
        if get_ident() != self._thread:
            self._awaiting.driver.dispatcher.post(self._arrive)
        elif self.is_awaited:
            self._arrive()
        else:  # it never went anywhere else
            self.is_here = True

    def _arrive(self) -> None:
        self.is_here = True
        if self.is_awaited:
            trio.lowlevel.reschedule(self._task)


def _nothing() -> None:
    """What a wake-up runs: the wake-up itself is the point."""


def _refuse(raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
