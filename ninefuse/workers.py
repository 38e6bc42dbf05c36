"""The worker pool: threads that run jobs, with a bound for each inode.

A job is a callable. It is submitted *on* an inode (a qid path, or None): at most half
of the workers are ever given to jobs on the same inode, so that a file whose calls
hang cannot take the pool; the rest wait in that inode's own queue. Jobs that are
resumed (their lock was granted, or there is cleaning up to do) are served before new
ones and never wait in a bounded queue.

Locks touched: the pool's own mutex, for dictionary work only.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

log = logging.getLogger(__name__)

Job = Callable[[], None]


class PoolStatistics(NamedTuple):
    """Queue lengths of the pool."""

    threads: int
    queued: int
    held_back: int  # waiting in their inode's own queue


class WorkerPool:
    """A fixed number of threads that run jobs.

    Args:
        threads: how many; 1 or more.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a pool needs a thread, not {threads}")
        self.limit_per_inode = max(1, threads // 2)
        self._mutex = threading.Lock()
        self._admitted: dict[int, int] = {}  # inode -> jobs queued or running on it
        self._held_back: dict[int, deque[Job]] = {}
        # A worker is woken by a token and only then takes a job: it never has one in hand
        # while it runs another. A job is put into its deque before its token.
        self._resumed: deque[Job] = deque()
        self._submitted: deque[Job] = deque()
        self._queue: SimpleQueue[bool] = SimpleQueue()  # True: look for a job; False: end
        # Signals are for the thread that waits for them (signals.py) and, for the timer
        # of the device, for the dispatcher: a worker's system calls are not interrupted.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._threads = [
                threading.Thread(target=self._work, name=f"worker-{n}", daemon=True)
                for n in range(threads)
            ]
            for thread in self._threads:
                thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def submit(self, job: Job, on: int | None = None) -> None:
        """Run ``job`` on a worker, once the inode ``on`` has room. Never blocks.

        The job (or what it hands its place to) must call ``leave(on)`` at its end.
        """
        if self.enter(job, on):
            self._submitted.append(job)
            self._queue.put(True)

    def enter(self, job: Job, on: int | None) -> bool:
        """Ask for one of the inode's places, for a job that is running already.

        Returns:
            True if it was given. False if all are taken: ``job`` then waits in the
            inode's queue and will be run later, its place given.
        """
        if on is None:
            return True
        with self._mutex:
            count = self._admitted.get(on, 0)
            if count < self.limit_per_inode:
                self._admitted[on] = count + 1
                return True
            self._held_back.setdefault(on, deque()).append(job)
            return False

    def leave(self, on: int | None) -> None:
        """Give back a place of the inode; the next that waits for one gets it."""
        if on is None:
            return
        with self._mutex:
            waiting = self._held_back.get(on)
            if not waiting:
                self._admitted[on] -= 1
                if not self._admitted[on]:
                    del self._admitted[on]
                return
            job = waiting.popleft()
            if not waiting:
                del self._held_back[on]
        self._submitted.append(job)
        self._queue.put(True)

    def resume(self, job: Job) -> None:
        """Run ``job`` before all that is queued. Never blocks, never waits for room."""
        self._resumed.append(job)
        self._queue.put(True)

    def close(self) -> None:
        """Let the workers finish everything that was submitted, then end them."""
        for _ in self._threads:
            self._queue.put(False)
        for thread in self._threads:
            thread.join()

    def statistics(self) -> PoolStatistics:
        """Queue lengths now."""
        with self._mutex:
            held_back = sum(len(jobs) for jobs in self._held_back.values())
        queued = len(self._submitted) + len(self._resumed)
        return PoolStatistics(len(self._threads), queued, held_back)

    def _work(self) -> None:
        while self._queue.get():
            self._run_next()
        # What running jobs still hand on now comes after the last token: whoever put it
        # there finds it here.
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Run the job whose turn it is, if there is one left."""
        while True:
            jobs = self._resumed or self._submitted
            try:
                job = jobs.popleft()
                break
            except IndexError:  # another worker was quicker
                if jobs is self._submitted:
                    return False
        try:
            job()
        except BaseException:
            # Jobs keep their own errors; whatever escapes one must not cost a worker.
            log.exception("a worker's job failed")
        return True
