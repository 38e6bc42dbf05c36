"""What the two threading models share: the pool, on which bodies go on where they may wait.

Locks touched: whatever bodies ask for, and the pool's mutex.
"""

from __future__ import annotations

import errno
import threading
from functools import partial

from ninefuse.driving.driver import Executor
from ninefuse.driving.request import Request, Step
from ninefuse.driving.workers import Job, Place, PoolStatistics, WorkerPool

# No place of the pool's: not even one for a call on no inode.
_NO_PLACE = -1


class Pooled(Executor):
    """What the two threading models share: the pool."""

    def __init__(self, threads: int, *, by_user: bool = False) -> None:
        super().__init__(most_cleaners=max(1, threads // 2))
        self.by_user = by_user  # whether each user has a share
        self.pool = WorkerPool(threads, by_user=by_user, refuse=self._refuse)
        self._cleans_later = False
        self._has_asked = False  # a worker to make deferred calls, and none has begun
        self._is_closing = False

    def close(self) -> None:
        """Let everything that was started or deferred finish, then end the workers."""
        self._is_closing = True
        self._after()
        self.end_waits()
        self._patience.close()
        self.clock.close()
        self.pool.close()

    def _clean_later(self) -> None:
        if not self._cleans_later and not self._is_closing:
            self._cleans_later = True
            self._patience.wait(self._clean_again, None)

    def _clean_again(self) -> None:
        self._cleans_later = False
        self._after()

    def _after(self) -> None:
        """Have workers do what bodies left to be done."""
        if self.deferred.calls and not self._has_asked:
            # One is enough for all: where closes take their time every request comes by here,
            # and the pool would take the length of its queue for the number of those stuck.
            self._has_asked = True
            self.pool.resume(self._make_deferred)
        while self._background:
            try:
                request = self._background.popleft()
            except IndexError:  # another thread was quicker
                return
            self.pool.resume(partial(self._rest, request))

    def _make_deferred(self) -> None:
        self._has_asked = False  # first: what is deferred from here on may not be seen
        self.deferred.make_all()

    def _unqueue(self, request: Request) -> bool:
        # What is not queued may be running elsewhere: all that is sure is what the pool finds.
        taken = self.pool.take(partial(_is_waiting, request))
        if taken is Place.GIVEN:
            assert request.call is not None
            self.pool.leave(request.call.on, request.share)
        return taken is not None

    def _rest(self, request: Request) -> None:
        """Run the rest of a body on this worker: every later call is made in place.

        Except that a call on another inode takes one of that inode's places. If there is
        none, the rest waits for one in the inode's queue, and this worker is free.
        """
        request.thread = threading.current_thread().name
        share = request.share
        # Which inode's place it has. Kept here: once parked, the request is no longer ours
        # to look at, and one that comes back from there has none.
        place: int | None = _NO_PLACE
        if request.call is not None:  # it waited for this call's place, and has it now
            step, place = Step.CALL, request.call.on
        else:
            step = self.advance(request)
        while step is Step.CALL:
            assert request.call is not None
            on = request.call.on
            if place == _NO_PLACE or on not in (None, place):
                if place != _NO_PLACE:
                    self.pool.leave(place, share)
                if not self.pool.enter(partial(self._rest, request), on, share, goes_on=True):
                    if request.is_withdrawn:
                        self.withdraw(request)
                    return
                place = on
            request.perform()
            step = self.advance(request)
        if place != _NO_PLACE:
            self.pool.leave(place, share)
        self._clean_up(request)

    def _refuse(self, job: Job) -> None:
        """Answer a request whose first call has no place, and is to wait for none. Any thread."""
        assert isinstance(job, partial)
        (request,) = job.args
        request.end_wait(errno.EAGAIN)
        self.resume(request)

    def _clean_up(self, request: Request) -> None:
        """See to what bodies have left to be done, after a request's end on this thread."""
        if self.deferred.calls:
            self.deferred.make_all()
        if self._background:
            self._after()

    def _pool(self) -> PoolStatistics:
        return self.pool.statistics()


def _is_waiting(request: Request, job: Job) -> bool:
    """Whether a job of the pool's is a request's, whose first call has not begun."""
    return isinstance(job, partial) and request in job.args and not request.is_begun
