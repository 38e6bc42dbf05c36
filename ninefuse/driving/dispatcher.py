"""The dispatcher, as drivers know it: a thread that takes requests in, and what is to run there.

What other threads post waits in a queue. The dispatcher empties it whenever it comes out of its
wait for events, which it does once in every round; so whoever posts has to wake it (system calls
here and there, and a fight for the interpreter's lock) only when it sleeps. Whoever runs the
dispatcher's loop says when that is (`before_wait`, `after_wait`), and how to wake it.

Locks touched: none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


def _nothing() -> None:
    """There is no loop yet, so nobody sleeps in it."""


class Dispatcher:
    """The queue of what is to run on the dispatcher.

    Attributes:
        wake: ends its wait for events, or the next one. Any thread.
    """

    def __init__(self) -> None:
        self.wake: Callable[[], None] = _nothing
        self._posted: deque[Callable[[], None]] = deque()
        self._sleeps = False

    def post(self, function: Callable[[], None]) -> None:
        """Have a function called on the dispatcher, soon. Any thread."""
        self._posted.append(function)
        if self._sleeps:
            self._sleeps = False  # one wake-up serves many
            self.wake()

    def before_wait(self) -> None:
        """It is about to sleep until something happens."""
        # In this order: whoever posts adds to the queue first and then looks at the flag.
        self._sleeps = True
        if self._posted:
            self._sleeps = False
            self.wake()

    def after_wait(self) -> None:
        """It has slept, or looked what has happened: call what was posted."""
        self._sleeps = False
        while self._posted:
            self._posted.popleft()()
