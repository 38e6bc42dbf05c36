"""What is to be done a little later, without the dispatcher and without a worker.

Locks touched: a mutex of its own, for the queue only.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

from ninefuse.process.threads import start_quietly

log = logging.getLogger(__name__)

# Seconds without any progress after which what is in the way counts as stuck, and others go on.
STUCK = 0.1

_SPARE_TIME = 10.0  # seconds that the thread waits for something to do


class Clock:
    """Calls functions when their time has come, on a thread that they may not keep."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._due: list[tuple[float, int, Callable[[], None]]] = []  # a heap, by time
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._look = threading.Event()
        self._ends = False

    def call_later(self, seconds: float, function: Callable[[], None]) -> bool:
        """Have a function called. Any thread.

        Args:
            seconds: from now.
            function: what to call. It must not wait for anything.

        Returns:
            False if there is no thread to be had: it will not be called.
        """
        due = time.monotonic() + seconds, next(self._numbers), function
        with self._mutex:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="clock", daemon=True)
                try:
                    start_quietly(thread)
                except RuntimeError:
                    return False
                self._thread = thread
            heapq.heappush(self._due, due)
            if self._due[0] is due:
                self._look.set()
        return True

    def close(self) -> None:
        """Have all that waits now called at once, and end the thread; others may come later."""
        with self._mutex:
            self._ends = True
            thread = self._thread
        self._look.set()
        if thread is not None:
            thread.join()
        with self._mutex:
            due, self._due = sorted(self._due), []
            self._thread = None
            self._ends = False
        for _, _, function in due:
            function()

    def _run(self) -> None:
        idle_since = time.monotonic()
        while True:
            with self._mutex:
                if self._ends:
                    return
                now = time.monotonic()
                wait = self._due[0][0] - now if self._due else idle_since + _SPARE_TIME - now
                if wait <= 0:
                    if not self._due:
                        self._thread = None
                        return
                    function = heapq.heappop(self._due)[2]
                else:
                    function = None
                    self._look.clear()
            if function is None:
                self._look.wait(wait)
            else:
                try:
                    function()
                except Exception:  # must not cost all others their time
                    log.exception("what was to be done later failed")
                idle_since = time.monotonic()
