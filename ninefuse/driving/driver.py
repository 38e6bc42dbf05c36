"""What drivers share: the life of a request, and what comes after it.

A driver takes a request from one command of its body to the next (calls.py). `Executor` runs the
body, takes and gives back its locks, and puts it aside where it has to wait; the models
(executor.py) decide on which thread each call is made.

Locks touched: whatever bodies ask for, and two mutexes of its own: for the registry and for the
counters.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from threading import get_ident
from typing import Any, ClassVar, NamedTuple

from ninefuse.calls import Acquire, Begin, Behind, Body, Call, Later, Release
from ninefuse.driving.clock import Clock
from ninefuse.driving.counters import Answered
from ninefuse.driving.deferred import Deferred
from ninefuse.driving.dispatcher import Dispatcher
from ninefuse.driving.patience import LONGEST, TICK, Patience, Ticket
from ninefuse.driving.request import Done, Observer, Request, Step
from ninefuse.driving.shares import Whose, take_one
from ninefuse.driving.workers import PoolStatistics
from ninefuse.errors import error

log = logging.getLogger(__name__)

# Requests of one user under way, of those that are for the executor to refuse; and, counted
# apart, of those that wait for a lock of a file or for a lease.
MOST_REQUESTS = 4000
MOST_WAITS = 20_000  # requests that wait so, of all users together


class ExecutorStatistics(NamedTuple):
    """Counters of a driver since its start, and what is under way now."""

    model: str
    on_dispatcher: int  # requests that never left the dispatcher
    handed_over: int  # requests that were on another thread
    running: int
    pool: PoolStatistics


class Executor(ABC):
    """What all drivers share: the life of a request, and what comes after it.

    Attributes:
        requests: those under way, by tag.
        waiting: how many of these wait for what somebody else has (`Later`), or have done so.
        answered: what is counted of them, by the name that `start` was given.
        dispatcher: the thread that starts requests, and what is to run there.
    """

    model: ClassVar[str]

    def __init__(self, most_cleaners: int = 1) -> None:
        self.requests: dict[int, Request] = {}
        self.waiting = 0
        self.answered: dict[str, Answered] = {}
        self.observer: Observer | None = None
        self.dispatcher = Dispatcher()
        self.clock = Clock()
        self.deferred = Deferred(most_cleaners, self._clean_later)
        self._tags = itertools.count(1)
        self._registry = threading.Lock()
        self._counting = threading.Lock()
        self._users: Counter[int] = Counter()  # requests under way, of each, …
        self._waits: Counter[int] = Counter()  # … but for those that are counted as `waiting`
        self._patience = Patience(self.clock)
        self._background: deque[Request] = deque()
        self._behind: set[int] = set()  # those of the background that have not ended
        self._is_ending = False  # nobody is to wait for a while any more

    def start(self, name: str, body: Body[Any], done: Done, user: Whose = None) -> Request:
        """Drive a body to its end. On the dispatcher; raises nothing. Arguments as of `admit`."""
        request = self.admit(name, body, done, user)
        try:
            self.drive(request)
        except Exception:
            self.give_up(request)
        return request

    def give_up(self, request: Request) -> None:
        """End a request by which `drive` has failed: its body finds EIO. In an except clause."""
        log.exception("%s: the threading model cannot run it", request.name)
        step = Step.CALL
        while step is Step.CALL:
            request.end_wait(errno.EIO)
            step = self.advance(request)

    def admit(
        self,
        name: str,
        body: Body[Any],
        done: Done | None = None,
        user: Whose = None,
        plain: type[Call[Any]] | None = None,
    ) -> Request:
        """A request of a body, to be driven with `drive` at once.

        Args:
            name: what reports call the request.
            body: an operation that has not been started.
            done: called with the request once the body has ended, on the thread where that
                was, perhaps before `drive` returns. It may not block. ``request.result()`` is
                then the body's result or error; what is no `Exception` (a worker's SystemExit,
                say) becomes OSError(EIO). None: nobody waits for it.
            user: who has his share of the workers, a uid, as a `Holder` where the kernel keeps a
                lock meanwhile; None and 0: nobody in particular.
            plain: as of a `Request`.
        """
        request = Request(next(self._tags), name, body, user, done)
        request.plain = plain
        if self.observer is not None:
            watched = self.observer.watch(request.tag, name, body, awaited=done is not None)
            request.body = request.watch = watched
        with self._registry:
            self.requests[request.tag] = request
            if request.user:
                self._users[request.user] += 1
        return request

    def in_background(self, name: str, body: Body[None]) -> None:
        """Drive a body that nobody waits for, after the running one. Any thread."""
        request = self.admit(name, body)
        with self._registry:
            self._behind.add(request.tag)
        self._background.append(request)

    def withdraw(self, request: Request) -> None:
        """End a request whose outcome nobody wants, if it only waits. Any thread; does not block.

        It ends with OSError(EINTR), which its body is told where it waits: for a while (`Later`,
        if that is withdrawable), or for its first call to be begun. One whose first call was begun
        goes on, to its end or to a wait of the first kind. What waits for a lock of ours, or for
        earlier changes, is told once it has waited. The request may have ended already.

        Whatever waits is in one place (a queue, or the tickets of `Patience`), out of which it
        is taken by whoever goes on with it, in one step: a worker, a clock, or this. So no body
        is on two threads, and none is lost. What is on its way into such a place is told by
        whoever puts it there, who looks whether it was withdrawn after he has done so.
        """
        request.is_withdrawn = True
        if self._stop_waiting(request) or self._unqueue(request):
            self._interrupt(request)

    def interrupt(self, request: Request) -> None:
        """End a wait for what somebody else has: of `Later`, if that is withdrawable. Likewise.

        As a signal does that the caller goes on after. On a file system open(2) and fcntl(2) may be
        told EINTR then, where they wait for a lease or a lock. Other calls may not, though ours
        wait for a worker: a request that has not begun does begin.
        """
        request.is_interrupted = True
        if self._stop_waiting(request):
            self._interrupt(request)

    def end_waits(self) -> None:
        """End all that wait for a while: with EINTR, if that is withdrawable. Any thread.

        For the end: who holds what they wait for may keep it as long as he likes.
        """
        self._is_ending = True
        with self._registry:
            requests = list(self.requests.values())
        for request in requests:
            if self._stop_waiting(request):
                self._interrupt(request)

    def defer(self, function: Callable[..., Any], *args: Any) -> None:
        """Have a call that may block made soon, where it may. Any thread.

        It is made after the running body, or with another one that ends before.
        """
        if self.observer is not None:
            function = self.observer.watch_call(function)
        self.deferred.add(function, args)

    @property
    def has_deferred(self) -> bool:
        """Whether deferred calls are under way, or still to be made."""
        return not self.deferred.is_over

    def has_too_many(self, user: int | None) -> bool:
        """Whether a user has as many requests under way as one may.

        Those that wait for a lock or a lease are not among them: they hold nothing but memory. And
        who has the lock may be the same user, whose further requests are what they wait for.
        """
        return bool(user) and self._users[user or 0] >= MOST_REQUESTS

    def count(self, request: Request) -> None:
        """Count a request that has ended, where it is answered. Any thread."""
        if request.at != get_ident():
            request.cross()
        taken = time.monotonic_ns() - request.started
        with self._counting:
            counted = self.answered.get(request.name)
            if counted is None:
                counted = self.answered[request.name] = Answered()
            counted.add(request.crossings, taken)

    def statistics(self) -> ExecutorStatistics:
        """Counters and queue lengths now."""
        answered = list(self.answered.values())
        count = sum(one.count for one in answered)
        stayed = sum(one.on_dispatcher for one in answered)
        return ExecutorStatistics(
            self.model, stayed, count - stayed, len(self.requests), self._pool()
        )

    def slow_requests(self, older_than: float) -> list[str]:
        """A line for each request under way for more than ``older_than`` seconds."""
        before = time.monotonic_ns() - older_than * 1e9
        with self._registry:
            return [r.describe() for r in self.requests.values() if r.started <= before]

    # What a model decides

    @abstractmethod
    def drive(self, request: Request) -> None:
        """Take a request to its end: to where `advance` has answered DONE.

        Called on the dispatcher. What takes long goes on elsewhere.
        """

    @abstractmethod
    def resume(self, request: Request) -> None:
        """Go on with a request that was PARKED, from `advance` on.

        Called once for each time, on any thread, perhaps before that `advance` has returned.
        It may not block.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish everything that was started or deferred."""

    # For whoever runs the dispatcher

    @property
    def fd(self) -> int:
        """A descriptor that wakes the dispatcher when it is readable, until `drain`; -1: none."""
        return -1

    def drain(self) -> None:  # noqa: B027 - most have none
        """Make `fd` unreadable. On the dispatcher."""

    def before_wait(self, *, sleeps: bool) -> None:
        """The dispatcher is about to look what has happened; ``sleeps``: until something has."""
        if sleeps:
            self.dispatcher.before_wait()

    def after_wait(self) -> None:
        """The dispatcher has waited, or looked what has happened."""
        self.dispatcher.after_wait()

    # For models

    def advance(self, request: Request) -> Step:
        """Run a body up to its next blocking call, on this thread.

        Once this has answered PARKED the request may be running on another thread: the caller
        must not touch it again. Once it has answered DONE, the request's `done` was called.
        """
        if request.at != get_ident():
            request.cross()
        if request.waits is not None:  # it was parked, and has been granted what it waited for
            if isinstance(request.waits, Acquire):
                request.holds += (request.waits,)
            request.waits = None
        while True:
            try:
                if request.error is None:
                    value, request.value = request.value, None
                    command = request.body.send(value)
                else:
                    command = request.throw()
            except StopIteration as stop:
                request.value = stop.value
                self._end(request)
                return Step.DONE
            except Exception as failure:
                request.error = failure
                self._end(request)
                return Step.DONE
            except BaseException as failure:
                log.error("%s ended in %r", request.name, failure, exc_info=failure)
                request.error = error(errno.EIO)
                self._end(request)
                return Step.DONE
            if isinstance(command, Call):
                if request.is_withdrawn and not request.is_begun:
                    request.end_wait()
                    continue
                request.call = command
                return Step.CALL
            if isinstance(command, Release):
                taken = list(request.holds)
                taken.remove(command.taken)
                request.holds = tuple(taken)
                command.taken.lock.release(command.taken.mode)
            elif isinstance(command, Acquire) and command.lock.try_acquire(command.mode):
                request.holds += (command,)
            elif isinstance(command, (Acquire, Behind, Later)):
                if self._park(request, command):
                    return Step.PARKED
            elif not isinstance(command, Begin):
                request.error = TypeError(f"{request.name} awaits {command!r}: not a command")

    def left_behind(self) -> Iterator[Request]:
        """Make the deferred calls, and yield what was left to the background, on this thread.

        A request that is yielded is to be driven to its end before the next one is asked for.
        """
        self.deferred.make_all()
        while self._background:
            try:
                request = self._background.popleft()
            except IndexError:  # another thread was quicker
                return
            yield request
            self.deferred.make_all()

    def wait_a_while(self, request: Request, later: Later) -> bool:
        """Have a body go on after a while; False if it goes on at once."""
        patience = self._patience
        ticket = Ticket(partial(self.resume, request), request.user)
        request.ticket = ticket if later.is_withdrawable else None
        if later.early is not None and later.early.has_come(partial(patience.end, ticket)):
            return False
        if not patience.queue(ticket, min(TICK * (1 << min(later.tries, 8)), LONGEST)):
            return False
        # From here on it may have been resumed, and be on another thread: unless this takes it.
        if (
            (request.is_withdrawn or request.is_interrupted or self._is_ending)
            and later.is_withdrawable
            and patience.take(ticket)
        ):
            request.end_wait()
            return False
        return True

    def _stop_waiting(self, request: Request) -> bool:
        """Take a request out of a wait for a while, if it may be; whether it is ours now."""
        ticket = request.ticket
        return ticket is not None and self._patience.take(ticket)

    def _unqueue(self, request: Request) -> bool:
        """Take a request whose first call has not begun out of the queue in which it waits.

        Whether that was done: then nobody else has it. Any thread.
        """
        return False

    def _interrupt(self, request: Request) -> None:
        """Go on with a request that was taken out of its wait because it was withdrawn."""
        request.end_wait()
        self.resume(request)

    def _pool(self) -> PoolStatistics:
        return PoolStatistics(0, 0, 0)

    def _clean_later(self) -> None:  # noqa: B027 - with one thread there is nobody to look
        """See that somebody looks whether those who make deferred calls are stuck."""

    def _may_wait(self, request: Request, later: Later) -> bool:
        """Count a request among those that wait, from now to its end; False if there are too many.

        One that cannot be told so, because something was done already, waits all the same.
        """
        if request.has_waited:
            return True
        user = request.user
        with self._registry:
            has_share = not user or self._waits[user] < MOST_REQUESTS
            if later.is_withdrawable and not (has_share and self.waiting < MOST_WAITS):
                return False
            request.has_waited = True
            self.waiting += 1
            if user:
                self._waits[user] += 1
                take_one(self._users, user)
        return True

    def _park(self, request: Request, command: Acquire | Behind | Later) -> bool:
        """Have a request wait for what it asks for; False if it need not wait any more."""
        if isinstance(command, Later) and not self._may_wait(request, command):
            request.error = error(errno.EAGAIN)
            return False
        # Said before it is queued: then the request may be resumed at any time.
        request.waits = command
        if request.watch is not None:
            request.watch.waits(str(command))
        if isinstance(command, Later):
            waits = self.wait_a_while(request, command)
            if not waits:
                request.waits = None
            return waits
        resume = partial(self.resume, request)
        if isinstance(command, Acquire):
            goes_on = command.lock.acquire(command.mode, resume)
            if goes_on:
                request.holds += (command,)
        else:
            goes_on = command.turn.has_come(resume)
        if goes_on:
            request.waits = None
        return not goes_on

    def _end(self, request: Request) -> None:
        with self._registry:
            del self.requests[request.tag]
            self.waiting -= request.has_waited
            if request.user:
                take_one(self._waits if request.has_waited else self._users, request.user)
            self._behind.discard(request.tag)
        if request.has_waited:
            self._patience.ended(request.user)
        if request.done is None:
            request.log_failure()
        else:
            request.done(request)
