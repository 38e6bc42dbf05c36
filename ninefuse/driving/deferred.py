"""Calls that are made later, by whoever has time: closing files, above all.

Such a call may hang (a close that writes to a server which does not answer), so a few threads at
a time make them: it is not to take worker after worker. Where all of those are stuck, one more
goes on.

Locks touched: a mutex of its own, for counting only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ninefuse.calls import words_of
from ninefuse.driving.clock import STUCK

log = logging.getLogger(__name__)

_MOST = 64  # threads that make deferred calls, where some are stuck


class Deferred:
    """The calls that were deferred.

    Args:
        most: threads that make them at a time, as long as none is stuck.
        look_again: has `make_all` called once more in a while, since those may be stuck.

    Attributes:
        calls: that are still to be made.
    """

    def __init__(self, most: int, look_again: Callable[[], None]) -> None:
        self.calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._most = most
        self._look_again = look_again
        self._mutex = threading.Lock()
        self._makers = 0
        self._last = time.monotonic()  # when one of them was over

    def add(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Have ``function(*args)`` called. Any thread."""
        self.calls.append((function, args))

    @property
    def is_over(self) -> bool:
        """Whether all have been made, and none is under way."""
        return not (self.calls or self._makers)

    def make_all(self) -> None:
        """Make them on this thread, unless enough are at it."""
        while self.calls:
            may_make = self._may_make()
            if self._makers >= self._most or len(self.calls) > 1:
                self._look_again()  # this one may get stuck as well, and others are behind it
            if not may_make:
                return
            try:
                self._make()
            finally:
                with self._mutex:
                    self._makers -= 1

    def _may_make(self) -> bool:
        with self._mutex:
            is_stuck = time.monotonic() > self._last + STUCK
            if self._makers < (_MOST if is_stuck else self._most):
                self._makers += 1
                return True
            return False

    def _make(self) -> None:
        while self.calls:
            try:
                function, args = self.calls.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                function(*args)
            except BaseException as error:
                # A close that fails has closed all the same, and nobody waits for it.
                name = getattr(function, "__name__", words_of(function))
                log.warning("%s%r failed: %r", name, args, error)
            self._last = time.monotonic()
