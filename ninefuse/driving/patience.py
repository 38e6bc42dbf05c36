"""Bodies that go on after a while, to try again.

A file on which somebody holds a lease cannot be opened until he gives it back, for 45 seconds
at most (fcntl(2), F_SETLEASE). Whoever opens it does not wait on a thread: he asks without
waiting, again and again. Few are let go on at a time for each user, in turn, so that one who
has thousands of files to wait for keeps nobody else from anything.

Locks touched: a mutex of its own, for the queues only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ninefuse.driving.clock import Clock

TICK = 0.05  # seconds
_AT_ONCE = 8  # of each user, in a tick; twice as many each time that some have succeeded


class _Turns:
    """What waits in one user's turn."""

    __slots__ = ("at_once", "succeeded", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.at_once = _AT_ONCE
        self.succeeded = False  # since the last tick

    def due(self) -> list[Callable[[], None]]:
        """What goes on now."""
        self.at_once = 2 * self.at_once if self.succeeded else _AT_ONCE
        self.succeeded = False
        return [self.waiting.popleft() for _ in range(min(self.at_once, len(self.waiting)))]


class Patience:
    """Resumes what waits, a tick later or when it is its turn.

    Args:
        clock: that tells when a tick is over.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._turns: dict[int | None, _Turns] = {}
        self._is_ticking = False

    def __len__(self) -> int:
        """How much waits."""
        with self._mutex:
            return sum(len(turns.waiting) for turns in self._turns.values())

    def wait(self, resume: Callable[[], None], user: int | None) -> None:
        """Have ``resume`` called after a while, on a thread that it may not keep. Any thread.

        Args:
            resume: what goes on.
            user: in whose turn, a uid.
        """
        with self._mutex:
            self._turns.setdefault(user, _Turns()).waiting.append(resume)
            ticks, self._is_ticking = self._is_ticking, True
        if not ticks and not self._clock.call_later(TICK, self._tick):
            self._is_ticking = False  # no thread was to be had: the next that waits tries again

    def ended(self, user: int | None) -> None:
        """Note that something that has waited need not come again. Any thread."""
        with self._mutex:
            turns = self._turns.get(user)
            if turns is not None:
                turns.succeeded = True

    def close(self) -> None:
        """Have all that waits now go on at once."""
        while due := self._due():
            for resume in due:
                resume()

    def _tick(self) -> None:
        due = self._due()
        for resume in due:
            resume()
        if due and not self._clock.call_later(TICK, self._tick):
            self._is_ticking = False

    def _due(self) -> list[Callable[[], None]]:
        """Those whose turn it is. Where there are none, the ticking ends."""
        with self._mutex:
            due = [resume for turns in self._turns.values() for resume in turns.due()]
            self._turns = {user: turns for user, turns in self._turns.items() if turns.waiting}
            if not due:
                self._is_ticking = False
            return due
