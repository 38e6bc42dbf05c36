"""The worker pool: threads that run jobs, with a bound for each inode and each user.

A job is a callable. It is submitted *on* an inode (a qid path, or None) and *for* a user (a
uid, or None). At most half of the workers are given to jobs on one inode, so that a file whose
calls hang cannot take the pool; where several users are served, at most half are given to one
of them, and a quarter to one inode for him. The rest waits in the inode's or the user's own
queue. Where the kernel keeps a lock until a job is done, the user has places of their own for
such, and what can have none is refused (shares.py). Jobs that are resumed (their lock was
granted, or there is cleaning up to do) are served before new ones and never wait in a bounded
queue.

What is stuck must keep nobody waiting for longer than a tenth of a second, though: a queue of an
inode or a user that has not moved for so long is let through, up to `SHARE_TIMES` the share; and
when jobs are queued, none has begun for so long, and too few workers are idle, more are started, up
to `MOST_TIMES` as many. They end when they have not been needed for a while. Users other than root
never take the last workers.

Locks touched: the pool's own mutex, for dictionary work and starting threads only.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from queue import Empty, SimpleQueue
from threading import get_ident
from time import monotonic
from typing import NamedTuple

from ninefuse.driving.clock import STUCK
from ninefuse.driving.shares import Shares, Whose
from ninefuse.process.threads import start_quietly

log = logging.getLogger(__name__)

Job = Callable[[], None]

MOST_TIMES = 64  # as many workers as asked for, where all are stuck
SHARE_TIMES = 4  # as many for an inode or a user, where those are stuck
_HOLDER_TIMES = 8  # as many for a user, of requests for which the kernel keeps a lock
_RESERVE = 4  # times as many as asked for, that are for root alone
_SPARE_TIME = 10.0  # seconds that a further worker stays without being needed


class Place(Enum):
    """What a job has that was taken out of its queue."""

    GIVEN = "a place, which is to be given back with `leave`"
    NONE = "none yet"


class PoolStatistics(NamedTuple):
    """Queue lengths of the pool."""

    threads: int
    queued: int
    held_back: int  # waiting in their inode's or user's own queue


class WorkerPool:
    """Threads that run jobs.

    Args:
        threads: how many; 1 or more.
        by_user: whether users are bounded, too.
        refuse: is given a job that waits for a place which it cannot have, and is not run.

    Attributes:
        threads: as given.
    """

    def __init__(
        self, threads: int, *, by_user: bool = False, refuse: Callable[[Job], None] | None = None
    ) -> None:
        if threads < 1:
            raise ValueError(f"a pool needs a thread, not {threads}")
        self._mutex = threading.Lock()
        self._refuse = refuse
        self.threads = threads
        half = max(1, threads // 2)
        self._most = MOST_TIMES * threads
        if by_user:
            quarter, users = max(1, half // 2), self._most - _RESERVE * threads
            holder = _HOLDER_TIMES * half
            self._shares: Shares[Job] = Shares(quarter, half, users, SHARE_TIMES, holder)
        else:
            self._shares = Shares(half, times=SHARE_TIMES)
        # A worker is woken by a token and only then takes a job: it never has one in hand
        # while it runs another. A job is put into its deque before its token.
        self._resumed: deque[Job] = deque()
        self._submitted: deque[Job] = deque()
        self._queue: SimpleQueue[bool] = SimpleQueue()  # True: look for a job; False: end
        self._idle: set[int] = set()  # threads that wait for a token, or are just getting one
        self._begun = 0  # jobs; of interest is whether it has changed
        self._is_closed = False
        self._is_watched = False  # whether somebody looks if the jobs queued are begun
        self._look = threading.Event()
        self._workers: set[threading.Thread] = set()
        for n in range(threads):
            self._start(f"worker-{n}", self._work)
        self._watcher = threading.Thread(target=self._watch, name="pool watcher", daemon=True)
        start_quietly(self._watcher)

    def submit(
        self, job: Job, on: int | None = None, user: Whose = None, *, goes_on: bool = False
    ) -> None:
        """Run ``job`` on a worker, once the inode ``on`` and the user have room. Never blocks.

        The job (or what it hands its place to) must call ``leave(on, user)`` at its end.
        ``goes_on``: whether it has had a place before.
        """
        if self.enter(job, on, user, goes_on=goes_on):
            self.queue(job)

    def queue(self, job: Job) -> None:
        """Run a job that has its place, as `submit` does. Never blocks."""
        self._submitted.append(job)
        self._queue.put(True)
        self._have_watched()

    def enter(self, job: Job, on: int | None, user: Whose = None, *, goes_on: bool = False) -> bool:
        """Ask for one of the places, for a job that is running already.

        Returns:
            True if it was given. False if all are taken: ``job`` then waits in the inode's or
            the user's queue, and will be run later, its place given; or it is refused.
        """
        with self._mutex:
            has_entered = self._shares.enter(job, on, user, goes_on=goes_on)
            hopeless = [] if has_entered else self._shares.hopeless()
        if not has_entered:
            self._have_watched()
        self._refuse_all(hopeless)
        return has_entered

    def leave(self, on: int | None, user: Whose = None) -> None:
        """Give back a place; the next that waits for one gets it."""
        with self._mutex:
            ready = self._shares.leave(on, user)
            self._submitted.extend(ready)
        for _ in ready:
            self._queue.put(True)
        if ready:
            self._have_watched()

    def take(self, is_wanted: Callable[[Job], bool]) -> Place | None:
        """Take a job that has not begun out of the queue in which it waits. Any thread.

        It is not looked for among those that are resumed.

        Args:
            is_wanted: whether it is a job; asked of those that wait, with the mutex held. It may
                ask only for what changes while the job runs, and nobody else may change.

        Returns:
            What the job has, which is the caller's now and is not run; None: none waits, or a
            worker has it.
        """
        with self._mutex:
            if self._shares.remove(is_wanted):
                return Place.NONE
            # Workers take jobs out without the mutex, each in one step; so does this. A job
            # that is put in again is another object.
            for job in list(self._submitted):
                if is_wanted(job):
                    try:
                        self._submitted.remove(job)
                    except ValueError:
                        return None
                    return Place.GIVEN
        return None

    def resume(self, job: Job) -> None:
        """Run ``job`` before all that is queued. Never blocks, never waits for room."""
        self._resumed.append(job)
        self._queue.put(True)
        self._have_watched()

    def close(self) -> None:
        """Let the workers finish everything that was submitted, then end them."""
        with self._mutex:
            self._is_closed = True
            workers = list(self._workers)
        self._look.set()
        for _ in workers:
            self._queue.put(False)
        for thread in [*workers, self._watcher]:
            thread.join()

    def statistics(self) -> PoolStatistics:
        """Queue lengths now."""
        with self._mutex:
            held_back = len(self._shares)
            threads = len(self._workers)
        queued = len(self._submitted) + len(self._resumed)
        return PoolStatistics(threads, queued, held_back)

    def _refuse_all(self, jobs: list[Job]) -> None:
        for job in jobs:
            assert self._refuse is not None
            self._refuse(job)

    def _have_watched(self) -> None:
        if not self._is_watched:
            self._is_watched = True
            self._look.set()

    def _work(self) -> None:
        while self._is_to_go_on():
            self._run_next()
        # What running jobs still hand on now comes after the last token: whoever put it
        # there finds it here.
        while self._run_next():
            pass

    def _work_for_a_while(self) -> None:
        """As `_work`, of a further worker: it ends when it has not been needed for a while.

        It is not needed where as many others are idle as there are to begin with. To be idle
        itself is no measure: idle workers take turns, so a job now and then keeps all of them.
        """
        spare_since = monotonic()
        while True:
            try:
                if not self._is_to_go_on(_SPARE_TIME):
                    break
            except Empty:
                if self._has_left():
                    return
                continue  # it was counted among those that are told to end
            if len(self._idle) < self.threads:
                spare_since = monotonic()
            self._run_next()
            if monotonic() - spare_since > _SPARE_TIME and self._has_left(self.threads):
                return
        while self._run_next():
            pass

    def _is_to_go_on(self, timeout: float | None = None) -> bool:
        """Wait for a token."""
        me = get_ident()
        self._idle.add(me)
        try:
            return self._queue.get(timeout=timeout)
        finally:
            self._idle.discard(me)

    def _has_left(self, idle: int = 0) -> bool:
        """Take this worker out of the pool, unless it is closed or fewer others are idle."""
        with self._mutex:
            if self._is_closed or len(self._idle) < idle:
                return False
            self._workers.discard(threading.current_thread())
            return True

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
        self._begun += 1
        try:
            job()
        except BaseException:
            # Jobs keep their own errors; whatever escapes one must not cost a worker.
            log.exception("a worker's job failed")
        return True

    def _watch(self) -> None:
        """Start more workers where all are stuck, and let through what waits for long."""
        while True:
            self._look.wait()
            self._look.clear()
            begun = -1
            while not self._is_closed:
                # Before anything is let through, which could not have been begun.
                queued = len(self._submitted) + len(self._resumed)
                with self._mutex:
                    overdue = self._shares.overdue()
                    hopeless = self._shares.hopeless()
                    self._submitted.extend(overdue)
                    waits = bool(len(self._shares))
                for _ in overdue:
                    self._queue.put(True)
                self._refuse_all(hopeless)
                if not (queued or overdue or waits):
                    break
                # Whoever is idle has a token coming, and only waits for a processor.
                if begun == self._begun and queued > len(self._idle):
                    self._grow(queued - len(self._idle))
                begun = self._begun
                self._look.wait(STUCK)
            if self._is_closed:
                return
            self._is_watched = False
            # Put in since it was looked at, by one who believed it was being looked at.
            if self._submitted or self._resumed or len(self._shares):
                self._have_watched()

    def _grow(self, count: int) -> None:
        with self._mutex:
            before = len(self._workers)
            for n in range(before, min(before + count, self._most)):
                if not self._is_closed:
                    self._start(f"worker-{n}", self._work_for_a_while)
            now = len(self._workers)
        if now > before:
            log.info("all %d workers are stuck: there are %d now", before, now)

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._workers.add(thread)
        try:
            start_quietly(thread)
        except RuntimeError:  # no thread to be had
            self._workers.discard(thread)
            if work == self._work:
                raise
