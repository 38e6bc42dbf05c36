"""Bodies that go on after a while, to try again.

A file on which somebody holds a lease cannot be opened until he gives it back, for 45 seconds
at most (fcntl(2), F_SETLEASE). Whoever opens it does not wait on a thread: he asks without
waiting, again and again. Few are let go on at a time for each user, in turn, so that one who
has thousands of files to wait for keeps nobody else from anything.

Locks touched: a mutex of its own, for the queues only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_TICK = 0.05  # seconds
_AT_ONCE = 8  # of each user, in a tick


class Patience:
    """Resumes what waits, a tick later or when it is its turn."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: dict[int | None, deque[Callable[[], None]]] = {}
        self._is_ticking = False

    def __len__(self) -> int:
        """How much waits."""
        with self._mutex:
            return sum(map(len, self._waiting.values()))

    def wait(self, resume: Callable[[], None], user: int | None) -> None:
        """Have ``resume`` called after a while, on a thread that it may not keep. Any thread.

        Args:
            resume: what goes on.
            user: in whose turn, a uid.
        """
        with self._mutex:
            self._waiting.setdefault(user, deque()).append(resume)
            starts = not self._is_ticking
            self._is_ticking = True
        if starts:
            threading.Thread(target=self._tick, name="patience", daemon=True).start()

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK)
            with self._mutex:
                due = [
                    queue.popleft()
                    for queue in self._waiting.values()
                    for _ in range(min(_AT_ONCE, len(queue)))
                ]
                self._waiting = {user: queue for user, queue in self._waiting.items() if queue}
                if not due:
                    self._is_ticking = False
                    return
            for resume in due:
                resume()
