"""The threading models: three drivers of the same operation bodies.

A body (ninefuse/ops/) is a coroutine that yields a command wherever it may block
(calls.py). A driver decides on which thread each call is made:

* `NoThreading`: the dispatcher makes every call itself, one request at a time.
* `FirstModel`: each call goes to a worker, its result comes back to the dispatcher,
  which runs the body on to its next call: two crossings for each blocking call.
* `SecondModel`: the dispatcher runs the body to its first blocking call and hands the
  rest of the body to a worker, which makes every later call in place: one crossing out
  and one back, whatever the body does.

The dispatcher is the thread that runs trio. Of a threading model it makes only calls that have
a form which waits for nobody (`Call.quick`), however short others were before: one caller
can keep the lock of an inode for as long as he likes, and all would wait with the dispatcher.
A request that was handed over is waited for with cancellation refused: a started body always
runs to its end. A body that has to wait for a lock is put aside and occupies no thread; whoever
lets the lock go resumes it. No operation makes a call while it holds one (the tests check).

Locks touched: whatever bodies ask for, the pool's mutex, and the registry's own.
"""

from __future__ import annotations

import errno
import importlib
import itertools
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from threading import get_ident
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import trio

from ninefuse.calls import Acquire, Behind, Body, Call, Ended, Later, Release
from ninefuse.driving.counters import Answered
from ninefuse.driving.patience import Patience
from ninefuse.driving.uring import STUCK, Uring
from ninefuse.driving.workers import PoolStatistics, WorkerPool
from ninefuse.locks import table_lock_held
from ninefuse.tree.qids import is_on_own_device

log = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH = 6  # deferred calls that may wait for more of them, …
_BATCH_TIME = 0.01  # … for so many seconds
_MOST_BEHIND = 8  # deferred calls
_STUCK = 0.1  # seconds without a deferred call's end
_MOST_CLEANERS = 64  # threads that make deferred calls, where some are stuck

# Requests of one user under way, of those that are for the executor to refuse.
MOST_REQUESTS = 4000

_A_WHILE = 0.05  # seconds until another try, without threads

# No place of the pool's: not even one for a call on no inode.
_NO_PLACE = -1


class Step(Enum):
    """Where a body stopped."""

    CALL = "it asks for a blocking call"
    PARKED = "it waits for a lock, or its turn; who lets it have that resumes it"
    DONE = "it has ended"


class Request:
    """One body on its way: what it waits for, what it holds, how it ended."""

    __slots__ = (
        "_error",
        "_joiners",
        "_value",
        "at",
        "body",
        "call",
        "crossings",
        "has_waited",
        "holds",
        "name",
        "started",
        "tag",
        "task",
        "thread",
        "user",
        "waits",
    )

    def __init__(self, tag: int, name: str, body: Body[Any], user: int | None = None) -> None:
        self.tag = tag
        self.name = name
        self.body = body
        self.user = user  # whose it is, a uid; None: nobody's in particular
        self.started = time.monotonic_ns()
        self.call: Call | None = None  # the call to be made next
        self.at = get_ident()  # the thread that it was seen on last
        self.crossings = 0  # how often that changed
        self.holds: tuple[Acquire, ...] = ()
        self.has_waited = False  # a while, to try again
        self.waits: Acquire | Behind | Ended | Later | None = None
        self.task: trio.lowlevel.Task | None = None
        self.thread: str = ""
        self._value: Any = None
        self._error: BaseException | None = None
        self._joiners: list[Callable[[], None]] | None = None

    def result(self) -> Any:
        """What the body returned; raises what it raised."""
        if self._error is None:
            return self._value
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def log_failure(self) -> None:
        """Log what the body raised, where nobody waits for its result."""
        if self._error is not None:
            log.error("%s failed", self.name, exc_info=self._error)

    def cross(self) -> None:
        """Note that the request is on another thread now."""
        self.at = get_ident()
        self.crossings += 1

    def perform(self) -> None:
        """Make the call that the body asked for, on this thread; keep its outcome."""
        if self.at != get_ident():
            self.cross()
        call = self.call
        assert call is not None
        self.call = None
        try:
            self._value = call.function(*call.args)
        except BaseException as error:
            self._error = error

    def succeed(self, value: Any) -> None:
        """Keep the result of a call that was made otherwise than by `perform`."""
        self._value = value

    def fail(self, error: Exception) -> None:
        """Keep the error of such a call."""
        self._error = error

    def perform_quickly(self) -> bool:
        """Make the call on this thread if it does not block, and say whether it was made."""
        call = self.call
        assert call is not None
        assert call.quick is not None
        try:
            self._value = call.quick(*call.args)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            self._error = error
        except BaseException as error:
            self._error = error
        self.call = None
        return True

    def describe(self) -> str:
        """One line for reports: age, what it does, holds and waits for."""
        age = (time.monotonic_ns() - self.started) / 1e9
        parts = [f"{self.name} (request {self.tag}), {age:.1f} s"]
        if self.thread:
            parts.append(f"on {self.thread}")
        if (call := self.call) is not None:
            parts.append(f"queued for {getattr(call.function, '__name__', call.function)}")
        if self.holds:
            parts.append("holds " + ", ".join(map(str, self.holds)))
        if (waits := self.waits) is not None:
            parts.append(f"waits for {waits}")
        return "; ".join(parts)


class ExecutorStatistics(NamedTuple):
    """Counters of a driver since its start, and what is under way now."""

    model: str
    on_dispatcher: int  # requests that never left the dispatcher
    handed_over: int  # requests that were on another thread
    running: int
    pool: PoolStatistics


class Observer(Protocol):
    """What sees all that a driver does, by putting itself around bodies; see tracing.py."""

    def watch(self, tag: int, name: str, body: Body[T], *, awaited: bool) -> Body[T]: ...

    def watch_call(self, function: Callable[..., Any]) -> Callable[..., Any]: ...

    def made_by_engine(self, body: Body[Any], call: Call, begin: int, end: int) -> None: ...

    def answered(self, body: Body[Any]) -> None: ...


class Executor(ABC):
    """What the three drivers share: the life of a request, and what comes after it."""

    model: ClassVar[str]

    def __init__(self, most_cleaners: int = 1) -> None:
        self.requests: dict[int, Request] = {}  # tag -> request under way
        self._tags = itertools.count(1)
        self._registry = threading.Lock()
        self._users: Counter[int] = Counter()  # requests under way, of each
        self._cleanups: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._most_cleaners = most_cleaners
        self._cleaners = 0
        self._cleaned = time.monotonic()  # when a deferred call was over
        self._patience = Patience()
        self._background: deque[Request] = deque()
        self._behind: set[int] = set()  # those of the background that have not ended
        self.answered: dict[str, Answered] = {}  # by the name that `run` was given
        self.observer: Observer | None = None

    async def run(self, name: str, body: Body[T], user: int | None = None) -> T:
        """Drive a body to its end and return its result.

        Called on the dispatcher only. Cancellation is refused from the moment the body
        has started.

        Args:
            name: what reports call the request.
            body: an operation that has not been started.
            user: who has his share of the workers, a uid; None and 0: nobody in particular.

        Raises:
            Exception: what the body raised. Anything that is not an `Exception`
                (a worker's SystemExit, say) becomes OSError(EIO).
        """
        request = self._admit(name, body, user, awaited=True)
        await self.drive(request)
        if request.at != get_ident():
            request.cross()
        counted = self.answered.get(name)
        if counted is None:
            counted = self.answered[name] = Answered()
        counted.add(request.crossings, time.monotonic_ns() - request.started)
        if self.observer is not None:
            self.observer.answered(request.body)
        result: T = request.result()
        return result

    def in_background(self, name: str, body: Body[None]) -> None:
        """Drive a body that nobody waits for, after the running one. Any thread."""
        request = self._admit(name, body)
        with self._registry:
            self._behind.add(request.tag)
        self._background.append(request)

    def defer(self, function: Callable[..., Any], *args: Any) -> None:
        """Have a call that may block made soon, where it may. Any thread.

        It is made after the running body, or with another one that ends before.
        """
        if self.observer is not None:
            function = self.observer.watch_call(function)
        self._cleanups.append((function, args))

    def has_too_many(self, user: int | None) -> bool:
        """Whether a user has as many requests under way as one may."""
        return bool(user) and self._users[user or 0] >= MOST_REQUESTS

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

    @abstractmethod
    async def drive(self, request: Request) -> None:
        """Take a request to its end: to where `advance` has answered DONE.

        Called on the dispatcher. May not be left, nor cancelled, before that.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish everything that was started or deferred."""

    def _pool(self) -> PoolStatistics:
        return PoolStatistics(0, 0, 0)

    def _admit(
        self, name: str, body: Body[Any], user: int | None = None, *, awaited: bool = False
    ) -> Request:
        request = Request(next(self._tags), name, body, user)
        if self.observer is not None:
            request.body = self.observer.watch(request.tag, name, body, awaited=awaited)
        with self._registry:
            self.requests[request.tag] = request
            if user:
                self._users[user] += 1
        return request

    def advance(self, request: Request, resume: Callable[[], None]) -> Step:
        """Run a body up to its next blocking call, on this thread.

        Once this has answered PARKED the request may be running on another thread:
        the caller must not touch it again.
        """
        if request.at != get_ident():
            request.cross()
        if request.waits is not None:  # it was parked, and has been granted its lock
            if isinstance(request.waits, Acquire):
                request.holds += (request.waits,)
            request.waits = None
        body = request.body
        while True:
            value, request._value = request._value, None
            error, request._error = request._error, None
            try:
                command = body.send(value) if error is None else body.throw(error)
            except StopIteration as stop:
                request._value = stop.value
                self._end(request)
                return Step.DONE
            except Exception as failure:
                request._error = failure
                self._end(request)
                return Step.DONE
            except BaseException as failure:
                log.error("%s ended in %r", request.name, failure, exc_info=failure)
                request._error = OSError(errno.EIO, os.strerror(errno.EIO))
                self._end(request)
                return Step.DONE
            finally:
                del error
            if table_lock_held():
                # A bug that would be a deadlock on another day: tell the body itself.
                request._error = AssertionError(f"{request.name} awaits inside the table's lock")
            elif type(command) is Call:
                request.call = command
                return Step.CALL
            elif type(command) is Acquire:
                # Said before it is queued: then the request may be resumed at any time.
                request.waits = command
                if not command.lock.acquire(command.mode, resume):
                    return Step.PARKED
                request.waits = None
                request.holds += (command,)
            elif type(command) is Release:
                taken = list(request.holds)
                taken.remove(command.taken)
                request.holds = tuple(taken)
                command.taken.lock.release(command.taken.mode)
            elif type(command) is Behind:
                request.waits = command
                if not command.turn.has_come(resume):
                    return Step.PARKED
                request.waits = None
            elif type(command) is Ended:
                request.waits = command
                if not self._join(command.tag, request, resume):
                    return Step.PARKED
                request.waits = None
            elif type(command) is Later:
                request.waits = command
                self.wait_a_while(request, resume)
                return Step.PARKED
            else:
                request._error = TypeError(f"{request.name} awaits {command!r}: not a command")

    def wait_a_while(self, request: Request, resume: Callable[[], None]) -> None:
        """Have a parked body go on after a while."""
        request.has_waited = True
        self._patience.wait(resume, request.user)

    def _end(self, request: Request) -> None:
        with self._registry:
            del self.requests[request.tag]
            if user := request.user:
                self._users[user] -= 1
                if not self._users[user]:
                    del self._users[user]
            self._behind.discard(request.tag)
            joiners = request._joiners
        if request.has_waited:
            self._patience.ended(request.user)
        for resume in joiners or ():
            resume()

    def _join(self, tag: int, request: Request, resume: Callable[[], None]) -> bool:
        with self._registry:
            other = self.requests.get(tag)
            if other is None or other is request:
                return True
            if other._joiners is None:
                other._joiners = []
            other._joiners.append(resume)
            return False

    def left_behind(self) -> Iterator[Request]:
        """Make the deferred calls, and yield what was left to the background, on this thread.

        A request that is yielded is to be driven to its end before the next one is asked for.
        """
        self._clean_up()
        while self._background:
            try:
                request = self._background.popleft()
            except IndexError:  # another thread was quicker
                return
            yield request
            request.log_failure()
            self._clean_up()

    def _clean_up(self) -> None:
        """Make the deferred calls, on this thread, unless enough are at it.

        A few threads at a time: if closing hangs, it is not to take worker after worker. But
        where all of them are stuck, one more goes on.
        """
        while self._cleanups:
            may_clean = self._may_clean()
            if self._cleaners >= self._most_cleaners:
                self._clean_later()  # this one may get stuck as well
            if not may_clean:
                return
            try:
                self._make_deferred_calls()
            finally:
                with self._registry:
                    self._cleaners -= 1

    def _may_clean(self) -> bool:
        with self._registry:
            is_stuck = time.monotonic() > self._cleaned + _STUCK
            if self._cleaners < (_MOST_CLEANERS if is_stuck else self._most_cleaners):
                self._cleaners += 1
                return True
            return False

    def _clean_later(self) -> None:  # noqa: B027 - with one thread there is nobody to look
        """See that somebody looks whether those who clean up are stuck."""

    def _make_deferred_calls(self) -> None:
        while self._cleanups:
            try:
                function, args = self._cleanups.popleft()
            except IndexError:  # another thread was quicker
                return
            self._make_deferred(function, args)
            self._cleaned = time.monotonic()

    @staticmethod
    def _make_deferred(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except BaseException as error:
            # A close that fails has closed all the same, and nobody waits for it.
            name = getattr(function, "__name__", function)
            log.warning("%s%r failed: %r", name, args, error)


class NoThreading(Executor):
    """The dispatcher makes every call itself: one request at a time."""

    model = "none"

    async def drive(self, request: Request) -> None:
        self.drive_here(request)
        self._after()

    def drive_here(self, request: Request) -> None:
        """Run a request to its end on this thread."""
        while (step := self.advance(request, _never)) is not Step.DONE:
            if step is Step.CALL:
                request.perform()
            elif not isinstance(request.waits, Later):
                raise RuntimeError(f"{request.describe()}: nobody is left to let it go")

    def wait_a_while(self, request: Request, resume: Callable[[], None]) -> None:
        """Wait in place: nothing else is under way, and all that comes waits for this."""
        time.sleep(_A_WHILE)

    def run_here(self, body: Body[T]) -> T:
        """Run a body to its end on this thread, without trio; its result or error."""
        request = self._admit("direct", body)
        self.drive_here(request)
        self._after()
        result: T = request.result()
        return result

    def close(self) -> None:
        self._after()

    def _after(self) -> None:
        for request in self.left_behind():
            self.drive_here(request)


class _Pooled(Executor, trio.abc.Instrument):
    """What the two threading models share: the pool, and the way back to the dispatcher.

    Completed requests wait in a queue. The dispatcher empties it whenever it comes out
    of its wait for events, which it does once in every round; so a worker has to wake
    it (two system calls here, two there, and a fight for the interpreter's lock) only
    when it sleeps. trio tells us through its instrument hooks when that is.
    """

    def __init__(self, threads: int, *, by_user: bool = False) -> None:
        super().__init__(most_cleaners=max(1, threads // 2))
        self.pool = WorkerPool(threads, by_user=by_user)
        self._token: trio.lowlevel.TrioToken | None = None
        self._dispatcher = -1  # which thread it is
        self._completed: deque[Request] = deque()
        self._asleep = False
        self._cleans_later = False
        self._is_closing = False
        self.uring: Uring | None = None  # makes calls in the workers' place

    async def run(self, name: str, body: Body[T], user: int | None = None) -> T:
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
            self._dispatcher = get_ident()
            trio.lowlevel.add_instrument(self)
            if self.uring is not None:
                trio.lowlevel.spawn_system_task(self._be_woken, self.uring)
        return await super().run(name, body, user)

    def before_io_wait(self, timeout: float) -> None:
        """trio is about to wait for events."""
        if self.uring is not None:
            self.uring.submit()
        if timeout > 0:
            # In this order: a worker adds to the queue first and then looks at the flag.
            self._asleep = True
            if self._completed:
                self._wake()

    def after_io_wait(self, timeout: float) -> None:
        """trio has waited for events: reschedule the tasks of completed requests."""
        self._asleep = False
        if self.uring is not None:
            for request in self.uring.done():
                assert request.task is not None
                trio.lowlevel.reschedule(request.task)
        while self._completed:
            task = self._completed.popleft().task
            assert task is not None
            trio.lowlevel.reschedule(task)

    def _clean_later(self) -> None:
        if not self._cleans_later and not self._is_closing:
            self._cleans_later = True
            self._patience.wait(self._clean_again, None)

    def _clean_again(self) -> None:
        self._cleans_later = False
        self._after()

    async def _be_woken(self, uring: Uring) -> None:
        """Wait for the engine, so that trio does; see `after_io_wait` for what follows."""
        while True:
            await trio.lowlevel.wait_readable(uring.fd)
            uring.drain()

    def close(self) -> None:
        """Let everything that was started or deferred finish, then end the workers."""
        self._is_closing = True
        self._after()
        self._patience.close()
        self.pool.close()
        if self.uring is not None:
            self.uring.close()

    def _complete(self, request: Request) -> None:
        """Send a request back to the dispatcher. Any thread."""
        self._completed.append(request)
        if self._asleep:
            self._wake()

    def _wake(self) -> None:
        self._asleep = False  # one wake-up serves many completions
        assert self._token is not None
        self._token.run_sync_soon(_nothing, idempotent=True)

    def _after(self) -> None:
        """Have workers do what bodies left to be done."""
        if self._cleanups:
            self.pool.resume(self._clean_up)
        while self._background:
            try:
                request = self._background.popleft()
            except IndexError:  # another thread was quicker
                return
            self.pool.resume(partial(self._rest, request))

    def _rest(self, request: Request) -> None:
        """Run the rest of a body on this worker: every later call is made in place.

        Except that a call on another inode takes one of that inode's places. If there is
        none, the rest waits for one in the inode's queue, and this worker is free.
        """
        request.thread = threading.current_thread().name
        user = request.user
        resume = partial(self._resume, request)
        # Which inode's place it has. Kept here: once parked, the request is no longer ours
        # to look at, and one that comes back from there has none.
        place: int | None = _NO_PLACE
        if request.call is not None:  # it waited for this call's place, and has it now
            step, place = Step.CALL, request.call.on
        else:
            step = self.advance(request, resume)
        while step is Step.CALL:
            assert request.call is not None
            on = request.call.on
            if place == _NO_PLACE or on not in (None, place):
                if place != _NO_PLACE:
                    self.pool.leave(place, user)
                if not self.pool.enter(partial(self._rest, request), on, user):
                    return
                place = on
            request.perform()
            step = self.advance(request, resume)
        if step is Step.DONE:
            if request.task is not None:
                self._complete(request)
            else:
                request.log_failure()
        if place != _NO_PLACE:
            self.pool.leave(place, user)
        if self._cleanups:
            self._clean_up()
        if self._background:
            self._after()

    def _resume(self, request: Request) -> None:
        """A parked request was granted its lock: go on with it on a worker."""
        self.pool.resume(partial(self._rest, request))

    def _pool(self) -> PoolStatistics:
        return self.pool.statistics()


class FirstModel(_Pooled):
    """Each call goes to a worker and its result comes back: two crossings a call."""

    model = "first"

    async def drive(self, request: Request) -> None:
        request.task = trio.lowlevel.current_task()
        granted = partial(self._complete, request)
        while (step := self.advance(request, granted)) is not Step.DONE:
            if step is Step.CALL:
                assert request.call is not None
                job = partial(self._one_call, request)
                self.pool.submit(job, request.call.on, request.user)
            await trio.lowlevel.wait_task_rescheduled(_refuse)
        self._after()

    def _one_call(self, request: Request) -> None:
        request.thread = threading.current_thread().name
        assert request.call is not None
        on, user = request.call.on, request.user
        request.perform()
        self._complete(request)
        self.pool.leave(on, user)


class SecondModel(_Pooled):
    """The dispatcher runs to the first call; a worker runs the rest: two crossings.

    Where the source is local it runs to the first call that would block and, with an engine, to
    the first that this does not take.

    Attributes:
        is_local: whether the source lies on a local file system, whose calls have forms that
            wait for nobody, and the dispatcher is to make these.
    """

    model = "second"

    def __init__(self, threads: int, *, by_user: bool = False) -> None:
        super().__init__(threads, by_user=by_user)
        self.is_local = False
        self._batching = False  # whether deferred calls wait for more of them
        self._is_minding = False  # whether what waits for the engine is looked after

    async def drive(self, request: Request) -> None:
        request.task = trio.lowlevel.current_task()
        resume = partial(self._resume, request)
        step = self.advance(request, resume)
        if self.is_local and step is Step.CALL and not self._is_behind():
            step = await self._run_on(request, resume)
        if step is Step.DONE:
            if not self.is_local or self._background or len(self._cleanups) > _BATCH:
                self._after()
            elif self._cleanups and not self._batching:
                self._batching = True
                trio.lowlevel.spawn_system_task(self._end_batch)
            return
        if step is Step.CALL:
            assert request.call is not None
            self.pool.submit(partial(self._rest, request), request.call.on, request.user)
        await trio.lowlevel.wait_task_rescheduled(_refuse)

    async def _end_batch(self) -> None:
        """Hand over what was deferred: a worker for each would cost more than the calls do."""
        try:
            await trio.sleep(_BATCH_TIME)
        finally:
            self._batching = False
        self._after()

    def _is_behind(self) -> bool:
        """Whether the workers have to catch up with what requests left them to do.

        A dispatcher that makes all calls itself would outrun them: files are closed by
        workers, and there are only so many descriptors.
        """
        return bool(self._behind) or len(self._cleanups) > _MOST_BEHIND

    async def _run_on(self, request: Request, resume: Callable[[], None]) -> Step:
        """Make calls without a worker as long as that is right; where the body stopped then."""
        request.thread = "dispatcher"
        step = Step.CALL
        while step is Step.CALL:
            call = request.call
            assert call is not None
            if not is_on_own_device(call.on):
                break
            if call.quick is not None and request.perform_quickly():
                pass
            elif self.uring is not None and self.uring.takes(call):
                begin = time.monotonic_ns()
                if not self.uring.start(request):
                    break
                if not self._is_minding and self.uring.has_waiting():
                    self._is_minding = True
                    trio.lowlevel.spawn_system_task(self._mind, self.uring)
                await trio.lowlevel.wait_task_rescheduled(_refuse)
                if self.observer is not None and request.call is not call:
                    end = time.monotonic_ns()
                    self.observer.made_by_engine(request.body, call, begin, end)
                if request.call is not None:
                    break  # it could not be finished there
            else:
                break
            step = self.advance(request, resume)
        return step

    async def _mind(self, uring: Uring) -> None:
        """Send to the workers what waits for an engine that is stuck."""
        try:
            while uring.has_waiting():
                await trio.sleep(STUCK)
                for request in uring.overdue():
                    assert request.task is not None
                    trio.lowlevel.reschedule(request.task)
        finally:
            self._is_minding = False


def create(model: str, threads: int, *, by_user: bool = False) -> Executor:
    """The driver of a threading model.

    Args:
        model: ``none``, ``first`` or ``second``; or the module and the name of an `Executor` of
            the user's own, as ``package.module:Class``. It is called with the number of threads.
        threads: workers of the pool, 1 or more; the none model has no pool.
        by_user: whether each user is to have his share of the workers (not of a plugged in
            model's).

    Raises:
        ValueError: there is no such class, or it is no `Executor`.
    """
    if model == "none":
        return NoThreading()
    if ":" in model:
        return _plugged_in(model)(threads)
    return {"first": FirstModel, "second": SecondModel}[model](threads, by_user=by_user)


def _plugged_in(model: str) -> Callable[[int], Executor]:
    module, _, name = model.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise ValueError(f"{name} is no subclass of ninefuse.executor.Executor")
    return found


def _never() -> None:
    raise RuntimeError("resumed, though the none model never waits")


def _nothing() -> None:
    """What a wake-up runs: the wake-up itself is the point."""


def _refuse(raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
