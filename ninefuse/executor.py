"""The threading models: four drivers of the same operation bodies.

An operation (ninefuse/ops/) is a coroutine, a *body*, written as if it were alone in the world. It
looks up a fid, makes a system call, looks at the result, makes another. It holds no thread.
Wherever it may block it stops, by ``await``, and hands out a command (calls.py): make this call,
take this lock, wait for that. A *driver* takes the command, sees to it, and sends the result back
in. The body never learns which thread the driver uses. That is the one thing in which the models
differ. There are three models and four drivers, since the second model can hand over two things:

* `NoThreading`: the thread that took the request makes every call itself, one request at a time.
* `FirstModel`: each call goes to a worker, and its result comes back before the body goes on.
  With b calls a request changes threads 2b times.
* `SecondModel`: the body runs here up to its first call that blocks. The *rest of the body* goes
  to a worker, which makes every later call in place. That is one change of thread for any body.
* `LeadingModel`, the second model's other driver: the request stays on its thread, and the *role*
  of taking requests changes threads. The thread that took a request lets another one take the
  next, and then makes the call. A mount has this driver by default, if the native session serves
  it without --listen (`Settings.may_lead`).

So a request is a body and the place where it stopped. A driver is a few lines around one loop:
``step = self.advance(request)`` runs the body to its next command. `CALL` means that a call is to
be made (``request.perform()``). `PARKED` means that the body waits for something, and belongs to
nobody until `resume`. `DONE` means that it has ended. The loop is in driving/driver.py.

**The dispatcher** is the thread that starts requests. Others may become it in turn, but there is
one at a time. So bodies start in the order in which requests came. Before its first call a body
says which bytes it is going to change, and it says so in that order. Otherwise a read could
overtake a write of the same bytes, and the kernel would keep the old page for good.

What is guaranteed
------------------

1. A body that has started runs to its end, whatever becomes of its caller. There
   ``done(request)`` is called, once, on the thread where the body ended. If a body were dropped
   half-way, a descriptor would stay open, or a fid half opened, and nobody would notice.
2. One thread at a time runs a body. Once `advance` says PARKED, no driver touches the request: the
   thread that resumes it may be faster than the one that put it aside. A waiting request is in one
   place. The thread that takes it out of there, in one step, goes on with it.
3. No call is made while the body holds a lock that others want. A call may be stuck for as long as
   some caller likes, and everybody who wants the lock would be stuck with it. A body that waits
   for a lock is put aside on no thread, and the thread that gives the lock back resumes it. So a
   pool of one thread gets through any number of renames. (Locks inside the tables are held for
   microseconds.) Two things are held across calls, and each holds up only requests for the same
   thing. A *turn* (tree/order.py) is for one file's bytes, or one name. A listing's mutex is for
   one open directory.
4. A call takes no more than its share. Each call names the inode that it may get stuck on, and
   each request its user. At most half of the workers are in one inode's calls. A queue that has
   not moved for 0.1 s is let through, up to four times that; more workers are started then. So a
   file on a disk that hangs stops requests for that file, and no others for long.
5. An exception ends a request, never a driver. An exception of a call is thrown into the body. An
   exception of the body is the request's result.

What may run where
------------------

* **On the dispatcher**: bodies between their calls, and calls that have a form which waits for
  nobody (`Call.quick`). It makes no other call, however short that was so far. An ordinary user
  can hold the lock of a file for ever, by a write from memory that a FUSE server of the user's
  never brings. If the dispatcher made a chmod of that file, it would wait for this lock, and all
  requests with it. One of these may be the request that would end the wait.
* **On a worker, or on a leader that has passed the role on**: any call. Under the second model the
  body runs there, too. One thread is always left to lead. `LeadingModel` asks the crew
  (driving/crew.py) before it keeps a request. If nobody would be left, a worker gets it.
* **Without Python's interpreter lock**: *plain* calls, whose good outcome is the answer itself (a
  read, a write, a sync). Compiled code makes and answers them, and `finish` runs the rest of the
  body afterwards. After an error, or a short write, the body goes on and answers itself. A leader
  makes them. If all other leaders are in calls, a *hand* does, a thread that makes plain calls
  only (``by_hand``). A call may even be made *ahead*, before its body runs; then `foresee` runs
  the body up to it.
* **In io_uring** (`SecondModel.uring`, where requests are handed over): reads, writes and syncs of
  local files. The dispatcher queues them and takes them back.
* **Not here**: closing files. A last close may take seconds, so a body leaves it behind
  (driving/deferred.py). `left_behind` has it made after the answer, by any thread that has time.

Under `NoThreading` all of this is one thread. It cannot promise 4, nor that others go on during a
call. It is there to show that. Even there a body that waits for a lock of a *file* is put aside,
since another request has to give the lock back.

The FUSE session runs the dispatcher, or trio does (awaiting.py). It tells the driver when it is
about to sleep (`before_wait`) and when it has slept (`after_wait`). Other threads post their work
for the dispatcher (driving/dispatcher.py), and it is run there. A driver knows nothing else of its
surroundings: no FUSE, no 9P, no trio, no operation. So the tests drive bodies without a mount, and
a model of your own is a class of some thirty lines (docs/new-model.md).

Locks touched: those that bodies ask for, and the pool's mutex.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ninefuse.calls import Body, Call, Fsync, Later, Pwrite
from ninefuse.driving import plugin
from ninefuse.driving.clock import STUCK
from ninefuse.driving.crew import Crew
from ninefuse.driving.driver import Executor
from ninefuse.driving.patience import TICK
from ninefuse.driving.pooled import Pooled
from ninefuse.driving.request import Request, Step
from ninefuse.driving.uring import Uring
from ninefuse.errors import error

__all__ = ["Executor", "FirstModel", "LeadingModel", "NoThreading", "Request", "SecondModel"]
__all__ += ["Step", "create"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH = 6  # deferred calls that may wait for more of them, …
_BATCH_TIME = 0.01  # … for so many seconds
_MOST_BEHIND = 8  # deferred calls


class NoThreading(Executor):
    """The dispatcher makes every call itself: one request at a time."""

    model = "none"

    def drive(self, request: Request) -> None:
        """As of an `Executor`: to its end, here."""
        self._drive(request)
        if self.deferred.calls or self._background:
            self._after()

    def resume(self, request: Request) -> None:
        """As of an `Executor`: here, in its turn."""
        self.dispatcher.post(partial(self.drive, request))

    def wait_a_while(self, request: Request, later: Later) -> bool:
        """Wait in place: nothing else is under way, and all that comes waits for this.

        Not for what another request may have to bring, which would never come: a lock of a
        file. The body is put aside for that, as under the other models. Bodies meet nothing
        half done by it: one that waits so holds no lock of ours and no turn.
        """
        if later.early is not None:
            return super().wait_a_while(request, later)
        time.sleep(TICK)
        return False

    def run_here(self, body: Body[T]) -> T:
        """Run a body to its end on this thread; its result or error.

        One that waits for a lock that a later body of this thread is to give back waits for ever.
        """
        request = self.start("direct", body, _nobody)
        while request.tag in self.requests:
            time.sleep(TICK)
            self.after_wait()
        result: T = request.result()
        return result

    def close(self) -> None:
        """As of an `Executor`."""
        self.end_waits()
        self.after_wait()
        self._after()
        self.clock.close()

    def _drive(self, request: Request) -> None:
        while (step := self.advance(request)) is not Step.DONE:
            if step is Step.CALL:
                request.perform()
            elif isinstance(request.waits, Later):
                return
            else:
                raise RuntimeError(f"{request.describe()}: nobody is left to let it go")

    def _after(self) -> None:
        for request in self.left_behind():
            self._drive(request)


class FirstModel(Pooled):
    """Each call goes to a worker and its result comes back: two crossings a call."""

    model = "first"

    def drive(self, request: Request) -> None:
        """As of an `Executor`: here to the next call, and from there by a worker and back."""
        step = self.advance(request)
        if step is Step.CALL:
            assert request.call is not None
            job = partial(self._one_call, request)
            self.pool.submit(job, request.call.on, request.share, goes_on=request.is_begun)
            if request.is_withdrawn:
                self.withdraw(request)
        elif step is Step.DONE:
            self._after()

    def resume(self, request: Request) -> None:
        """As of an `Executor`: on the dispatcher; on a worker what nobody waits for."""
        if request.done is None:
            self.pool.resume(partial(self._rest, request))
        else:
            self.dispatcher.post(partial(self.drive, request))

    def _one_call(self, request: Request) -> None:
        request.thread = threading.current_thread().name
        assert request.call is not None
        on, share = request.call.on, request.share
        request.perform()
        self.dispatcher.post(partial(self.drive, request))
        self.pool.leave(on, share)


class SecondModel(Pooled):
    """The dispatcher runs to the first call; a worker runs the rest: one crossing.

    Where the source is local it runs to the first call that would block and, with an engine, to
    the first that this does not take.

    Attributes:
        is_near: which inodes lie on a local file system, whose calls have forms that wait for
            nobody, and for which the dispatcher is to make these; None: none.
        uring: the engine that makes calls in the workers' place; None: there is none.
    """

    model = "second"

    def __init__(self, threads: int, *, by_user: bool = False) -> None:
        super().__init__(threads, by_user=by_user)
        self.is_near: Callable[[int | None], bool] | None = None
        self.uring: Uring | None = None
        self._batching = False  # whether deferred calls wait for more of them
        self._is_minding = False  # whether what waits for the engine is looked after

    def drive(self, request: Request) -> None:
        """As of an `Executor`: here to its first call that blocks, the rest elsewhere."""
        step = self.advance(request)
        if self.is_near is not None and step is Step.CALL and not self._is_behind():
            step = self._run_on(request, self.is_near)
        self._hand_over(request, step)

    def resume(self, request: Request) -> None:
        """As of an `Executor`: on a worker, to its end."""
        self.pool.resume(partial(self._rest, request))

    def withdraw(self, request: Request) -> None:
        """As of an `Executor`."""
        super().withdraw(request)
        if self.uring is not None:  # what waits for a place there is the dispatcher's alone
            self.dispatcher.post(partial(self._leave_engine, request))

    @property
    def fd(self) -> int:
        """As of an `Executor`: the engine's."""
        return -1 if self.uring is None else self.uring.fd

    def drain(self) -> None:
        """As of an `Executor`."""
        if self.uring is not None:
            self.uring.drain()

    def before_wait(self, *, sleeps: bool) -> None:
        """As of an `Executor`: the engine gets all that was queued in this round."""
        if self.uring is not None and not self.uring.submit():
            self._mind()  # which ends the wait soon
        super().before_wait(sleeps=sleeps)

    def after_wait(self) -> None:
        """As of an `Executor`: what the engine has done goes on here."""
        if self.uring is not None:
            for request in self.uring.done():
                self._go_on(request)
        super().after_wait()

    def close(self) -> None:
        """As of an `Executor`."""
        super().close()
        if self.uring is not None:
            self.uring.close()

    def _interrupt(self, request: Request) -> None:
        if self._is_ending or request.done is None:
            super()._interrupt(request)
        else:  # a worker may not be free
            request.end_wait()
            self.dispatcher.post(partial(self.drive, request))

    def _hand_over(self, request: Request, step: Step) -> None:
        if step is Step.CALL:
            assert request.call is not None
            self.pool.submit(partial(self._rest, request), request.call.on, request.share)
            if request.is_withdrawn:
                self.withdraw(request)
        elif step is Step.DONE:
            if self.is_near is None or self._background or len(self.deferred.calls) > _BATCH:
                self._after()
            elif self.deferred.calls and not self._batching:
                # A worker for each would cost more than the calls do.
                self._batching = True
                if not self.clock.call_later(_BATCH_TIME, self._end_batch):
                    self._end_batch()  # no thread is to be had

    def _end_batch(self) -> None:
        self._batching = False
        self._after()

    def _is_behind(self) -> bool:
        """Whether the workers have to catch up with what requests left them to do.

        A dispatcher that makes all calls itself would outrun them: files are closed by
        workers, and there are only so many descriptors.
        """
        return bool(self._behind) or len(self.deferred.calls) > _MOST_BEHIND

    def _run_on(self, request: Request, is_near: Callable[[int | None], bool]) -> Step:
        """Make calls without a worker as long as that is right; where the body stopped then."""
        request.thread = "dispatcher"
        step = Step.CALL
        while step is Step.CALL:
            call = request.call
            assert call is not None
            if not is_near(call.on):
                break
            if not (call.quick and request.perform_quickly()):
                if self.uring is None or not self.uring.takes(call):
                    break
                if request.watch is not None:
                    request.since = time.perf_counter_ns()
                if not self.uring.start(request):
                    break
                self._mind()
                return Step.PARKED
            step = self.advance(request)
        return step

    def _go_on(self, request: Request) -> None:
        """The engine has made a request's call, or has left it to a worker."""
        call = request.call
        step = Step.CALL
        if call is None:
            step = self.advance(request)
            if step is Step.CALL and self.is_near is not None:
                step = self._run_on(request, self.is_near)
        self._hand_over(request, step)

    def _mind(self) -> None:
        """See that what waits for an engine which is stuck goes to the workers in the end."""
        if not self._is_minding and self.uring is not None and self.uring.has_waiting():
            look = partial(self.dispatcher.post, self._look_after)
            # Else no thread is to be had, and the next that comes tries again.
            self._is_minding = self.clock.call_later(STUCK, look)

    def _leave_engine(self, request: Request) -> None:
        """Go on with a withdrawn request, if its first call waits for a place of the engine's."""
        assert self.uring is not None
        if not request.is_begun and self.uring.leave(request):
            self._interrupt(request)

    def _look_after(self) -> None:
        self._is_minding = False
        assert self.uring is not None
        for request in self.uring.overdue():
            self._hand_over(request, Step.CALL)
        self._mind()


class LeadingModel(SecondModel):
    """The second model, where not the request changes threads, but the role of the dispatcher.

    Who has read a request runs its body to the first call that would block, passes the role on, and
    makes that call and all later ones itself. Calls that need no Python are made without it.

    Attributes:
        crew: those who lead in turn.
    """

    crew: Crew

    def drive(self, request: Request) -> None:
        """As of an `Executor`. Where the request is `in_place` then, its call is this thread's."""
        request.is_counted = True
        self.crew.begins()
        step = self.advance(request)
        if self.is_near is not None and step is Step.CALL and not self._is_behind():
            step = self._run_on(request, self.is_near)
        if step is not Step.CALL:
            self._hand_over(request, step)
            return
        call = request.call
        assert call is not None
        if request.is_plain and self.crew.reserve(request):
            if call.on is not None and self.crew.sets_aside(call.on):
                request.is_counted, request.is_aside = False, True
            if self.crew.hand(request):
                return
            if self.crew.pass_on():
                request.in_place = True
                return
            self._comes_back(request, call, goes_on=True)
            self.crew.free(request.user, call.on)
        request.plain = None  # it has no place as such
        job = partial(self._rest, request)
        if not self.pool.enter(job, call.on, request.share):
            if request.is_withdrawn:
                self.withdraw(request)
        elif self.crew.pass_on():
            request.in_place = True
        else:
            self.pool.queue(job)

    def foresee(self, request: Request) -> bool:
        """Run a body up to a plain call that was made ahead; False if it asks for another.

        Nothing else that this call could meet is under way. So the body waits for nothing.
        """
        step = self.advance(request)
        if step is Step.CALL and request.is_plain:
            assert request.call is not None
            self.crew.occupy(request)
            return True
        if step is not Step.DONE:
            log.error("%s was answered before its time", request.describe())
            request.is_answered = request.is_withdrawn = True
        if step is Step.CALL:  # which is not to be made a second time
            request.is_begun = True
            request.call, request.error = None, error(errno.EIO)
            self._hand_over(request, self.advance(request))
        return False

    def wait_a_while(self, request: Request, later: Later) -> bool:
        """As of an `Executor`. Calls may be made ahead meanwhile: it holds no lock, and no turn."""
        is_counted, request.is_counted = request.is_counted, False
        if is_counted:
            self.crew.ends()
        waits = super().wait_a_while(request, later)
        if is_counted and not waits:
            self._goes_on(request)
        return waits

    def rest(self, request: Request) -> None:
        """Make the call of a request that is in place, and all later ones, on this thread."""
        request.in_place = False
        self._rest(request)

    def finish(self, request: Request, outcome: Any, is_answered: bool, by_hand: bool) -> None:
        """Go on with a request whose plain call was made without Python. It makes no call here.

        Args:
            request: that asked for it.
            outcome: of the call, or a negated errno.
            is_answered: whether that was told already.
            by_hand: whether a hand made it, which is another thread than the one that read it.
        """
        call = request.call
        assert call is not None
        self.crew.free(request.user, call.on)
        if not (is_answered or request.is_counted):  # it was made ahead, and may not be over
            request.is_counted = True
            self.crew.begins()
        request.is_begun = True
        if by_hand:
            request.cross()
        request.at = threading.get_ident()
        step = Step.CALL
        if isinstance(call, Pwrite) and 0 <= outcome < len(call.data):
            # What is written must not be written again: a file may be open to append.
            call.done = outcome
        else:
            if isinstance(outcome, int) and outcome < 0:
                request.error = error(-outcome)
            else:
                request.value = None if isinstance(call, Fsync) else outcome
                request.is_answered = is_answered
            request.call = None
            step = self.advance(request)
        self._comes_back(request, call, goes_on=step is not Step.DONE)
        self._hand_over(request, step)

    def _rest(self, request: Request) -> None:
        if isinstance(request.waits, Later) and request.done is not None:
            self._goes_on(request)
        super()._rest(request)

    def _goes_on(self, request: Request) -> None:
        request.is_counted = True
        self.crew.goes_on()

    def _comes_back(self, request: Request, call: Call[Any], *, goes_on: bool) -> None:
        """A body that was set aside goes on, or has ended."""
        if request.is_aside:
            request.is_aside = False
            goes_on = goes_on and not request.is_counted
            if goes_on:
                request.is_counted = True
            assert call.on is not None
            self.crew.comes_back(call.on, goes_on=goes_on)

    def leave_to_workers(self, request: Request) -> None:
        """Have a worker make a request's call. Any thread."""
        assert request.call is not None
        self._comes_back(request, request.call, goes_on=True)
        self._hand_over(request, Step.CALL)

    def slow_requests(self, older_than: float) -> list[str]:
        """As of an `Executor`; calls made ahead among them."""
        now = time.monotonic_ns()
        ahead = [
            (name, inode, (now - began) / 1e9) for name, inode, began in self.crew.made_ahead()
        ]
        return super().slow_requests(older_than) + [
            f"{name}, {age:.1f} s; in a call on inode {inode}"
            for name, inode, age in ahead
            if age >= older_than
        ]

    def close(self) -> None:
        """As of an `Executor`."""
        self.end_waits()
        self.crew.join()
        super().close()

    def _end(self, request: Request) -> None:
        # Before the answer: who has it may ask at once.
        self.crew.came_back()
        if request.is_counted:
            self.crew.ends()
        super()._end(request)

    def _clean_up(self, request: Request) -> None:
        if self.crew.is_one():  # who leads gets stuck in nobody's close
            self._hand_over(request, Step.DONE)
        else:
            super()._clean_up(request)

    def _unqueue(self, request: Request) -> bool:
        if self.crew.take_back(request):
            assert request.call is not None
            self._comes_back(request, request.call, goes_on=True)
            self.crew.free(request.user, request.call.on)
            return True
        return super()._unqueue(request)

    def _interrupt(self, request: Request) -> None:
        Executor._interrupt(self, request)  # on a worker


def create(model: str, threads: int, *, by_user: bool = False, leads: bool = False) -> Executor:
    """The driver of a threading model.

    Args:
        model: ``none``, ``first`` or ``second``; or the module and the name of an `Executor` of
            the user's own, as ``package.module:Class``. It is called with the number of threads.
        threads: workers of the pool, 1 or more; the none model has no pool.
        by_user: whether each user is to have his share of the workers (not of a plugged in
            model's).
        leads: whether the second model hands over the role, not the request.

    Raises:
        ValueError: there is no such class, or it cannot be a model.
    """
    if model == "none":
        return NoThreading()
    if ":" in model:
        own: Executor = plugin.make(model, threads, Executor)
        return own
    second = LeadingModel if leads else SecondModel
    return {"first": FirstModel, "second": second}[model](threads, by_user=by_user)


def _nobody(request: Request) -> None:
    """Whoever started it has it, and looks for himself."""
