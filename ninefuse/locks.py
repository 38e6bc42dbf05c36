"""The two locks of a 9P server: the fid table's and the global rename lock.

Both are the same fair read-write lock. Its waiters are callbacks, served strictly in
the order they came: a writer waits for the holders before it, readers that came
after a waiting writer wait for it, and readers next to each other are let in
together. They differ in how one waits:

* ``TableLock`` blocks the thread. It is for table work only (a few dictionary
  operations), so a wait is microseconds; it is never held across an await (the tests check).
* ``RenameLock`` is taken by operation bodies, through their driver. A body that has
  to wait is put aside and occupies no thread: a pool of one worker gets through any
  number of walks, creates and renames.

Lock order, outermost first: the rename lock, a directory's listing, the fid table's
lock, the counts of the fid table, and then all other mutexes (docs/architecture.md names
them), inside which there is none. tests/lock_order.py asserts it. The rename lock is taken with no
other lock held, between calls: by a lookup after its look, to note the place, and by a rename
before it moves the name, and after.

A short mutex guards the state of each lock and is never held while anything waits or
is resumed.
"""

from __future__ import annotations

import threading
import time
import types
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from ninefuse.calls import READ, WRITE, Acquire, Release


class LockStatistics(NamedTuple):
    """What a lock looks like now, and how often and how long it was waited for."""

    readers: int
    writing: bool
    waiting: int
    waits: int
    waited: float  # seconds, all waits together
    longest_wait: float  # seconds


class RWLock:
    """A fair read-write lock whose waiters are callbacks.

    Args:
        name: how reports call the lock.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._mutex = threading.Lock()
        self._readers = 0
        self._writing = False
        self._waiting: deque[tuple[str, Callable[[], None], float]] = deque()
        self._waits = 0
        self._waited = 0.0
        self._longest = 0.0

    def __repr__(self) -> str:
        s = self.statistics()
        holder = "writing" if s.writing else f"{s.readers} readers"
        return f"<{type(self).__name__} {self.name}: {holder}, {s.waiting} waiting>"

    def try_acquire(self, mode: str) -> bool:
        """Take the lock if nobody is in the way or waits already; never queues."""
        with self._mutex:
            return self._take(mode)

    def acquire(self, mode: str, resume: Callable[[], None]) -> bool:
        """Take the lock, or queue for it.

        Args:
            mode: READ or WRITE.
            resume: called once, by the thread that let the lock go, when a queued
                request has been granted it. It must not block.

        Returns:
            True if the lock was taken at once. False if the request was queued: from
            then on it may be resumed at any moment, on any thread.
        """
        with self._mutex:
            if self._take(mode):
                return True
            self._waits += 1
            self._waiting.append((mode, resume, time.monotonic()))
            return False

    def release(self, mode: str) -> None:
        """Give the lock back and resume those whose turn it is.

        Raises:
            RuntimeError: the lock is not held in this mode.
        """
        granted: list[Callable[[], None]] = []
        with self._mutex:
            if mode == WRITE:
                if not self._writing:
                    raise RuntimeError(f"{self.name}: released by a writer that does not hold it")
                self._writing = False
            else:
                if not self._readers:
                    raise RuntimeError(f"{self.name}: released by a reader that does not hold it")
                self._readers -= 1
            if self._waiting:
                self._grant(granted)
        for resume in granted:
            resume()

    def statistics(self) -> LockStatistics:
        """A consistent snapshot of the lock's state and counters."""
        with self._mutex:
            return LockStatistics(
                self._readers,
                self._writing,
                len(self._waiting),
                self._waits,
                self._waited,
                self._longest,
            )

    def _take(self, mode: str) -> bool:
        if self._writing or self._waiting:
            return False
        if mode == READ:
            self._readers += 1
            return True
        if self._readers:
            return False
        self._writing = True
        return True

    def _grant(self, granted: list[Callable[[], None]]) -> None:
        now = time.monotonic()
        while self._waiting and not self._writing:
            mode, resume, since = self._waiting[0]
            if mode == WRITE:
                if self._readers:
                    break
                self._writing = True
            else:
                self._readers += 1
            self._waiting.popleft()
            self._waited += now - since
            self._longest = max(self._longest, now - since)
            granted.append(resume)


class _BlockingSection:
    """``with table_lock.reading:`` and ``with table_lock.writing:``."""

    __slots__ = ("_lock", "_mode")

    def __init__(self, lock: TableLock, mode: str) -> None:
        self._lock = lock
        self._mode = mode

    def __enter__(self) -> None:
        if not self._lock.try_acquire(self._mode):
            since = time.perf_counter_ns()
            turn = threading.Lock()
            turn.acquire()
            if not self._lock.acquire(self._mode, turn.release):
                turn.acquire()
            if self._lock.on_wait is not None:
                self._lock.on_wait(self._mode, since, time.perf_counter_ns())

    def __exit__(self, *exc: object) -> None:
        self._lock.release(self._mode)


class TableLock(RWLock):
    """The lock of the fid table: ``with lock.reading:``, ``with lock.writing:``.

    Waiting blocks the thread, so a section holds table work only: no system call, no
    await, and no second section of the same lock.

    Attributes:
        on_wait: called after each wait, on the thread that waited and now holds the lock,
            with the mode and the wait's begin and end (`time.perf_counter_ns`); None.
    """

    def __init__(self, name: str = "fid table") -> None:
        super().__init__(name)
        self.on_wait: Callable[[str, int, int], None] | None = None
        self.reading = _BlockingSection(self, READ)
        self.writing = _BlockingSection(self, WRITE)


class _BodySection:
    """``async with rename_lock.reading:`` in an operation body."""

    __slots__ = ("_acquire", "_release")

    def __init__(self, lock: RWLock, mode: str) -> None:
        self._acquire = Acquire(lock, mode)
        self._release = Release(self._acquire)

    @types.coroutine
    def __aenter__(self) -> Generator[Acquire, Any, None]:
        yield self._acquire

    @types.coroutine
    def __aexit__(self, *exc: object) -> Generator[Release, Any, None]:
        yield self._release


class RenameLock(RWLock):
    """The global rename lock: ``async with lock.reading:`` in operation bodies.

    Written where a rename moves the (parent, name) that nodes remember, read where a name
    that was just looked at becomes such a place. It is held for that alone, never across a call:
    a call on a directory can be stuck for as long as somebody likes, and everybody else would be
    stuck behind the lock. So whoever looks at a name notes `moves` before, and looks again if it
    has changed when he has the lock. The driver takes it and gives it back; see executor.py.

    Attributes:
        moves: raised in write mode, before a name is moved and after.
    """

    def __init__(self, name: str = "rename lock") -> None:
        super().__init__(name)
        self.moves = 0
        self.reading = _BodySection(self, READ)
        self.writing = _BodySection(self, WRITE)
