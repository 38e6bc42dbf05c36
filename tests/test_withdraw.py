"""Requests that are withdrawn (`Executor.withdraw`): what only waits ends, the rest goes on."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import trio
from helpers_executor import answer, begin, drive, passed, until
from interleaved import Run, explore
from mounting import SOAK

from ninefuse import executor as executor_module
from ninefuse.calls import WRITE, Later, blocking
from ninefuse.driving import driver, patience, shares, workers
from ninefuse.executor import Executor, FirstModel, Request, SecondModel, create
from ninefuse.locks import RenameLock
from ninefuse.settings import MODELS

every_model = pytest.mark.parametrize("model", MODELS)
pooled_models = pytest.mark.parametrize("model", ["first", "second"])

HERE = 7  # an inode


def found(request: Request) -> str:
    """How a request has ended."""
    try:
        return str(request.result())
    except InterruptedError:
        return "EINTR"


class Ended:
    """Who is told of the ends of requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> None:
        self.requests.append(request)


async def later(*, is_withdrawable: bool = True) -> str:
    """A body that waits for ever, unless it is withdrawn."""
    while True:
        await Later(is_withdrawable=is_withdrawable)


async def call(function: Callable[[], Any]) -> Any:
    """A body of one call."""
    return await blocking(HERE, function)


def named(executor: Executor, name: str) -> Request:
    """The request under way that has a name."""
    return next(request for request in executor.requests.values() if request.name == name)


# What waits for a while


@pooled_models
def test_a_wait_for_a_while_ends(model: str) -> None:
    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "waiter", later())
            executor.withdraw(named(executor, "waiter"))
            await until(lambda: outcome.over)
            assert isinstance(outcome.error, InterruptedError)
            assert outcome.error.errno == errno.EINTR

    drive(model, 1, scenario)


@pooled_models
def test_a_wait_that_is_not_withdrawable_goes_on(model: str) -> None:
    gate = [False]

    async def body() -> str:
        while not gate[0]:
            await Later(is_withdrawable=False)
        return "done"

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "waiter", body())
            executor.withdraw(named(executor, "waiter"))
            await trio.sleep(3 * patience.TICK)
            assert not outcome.over
            gate[0] = True
            await until(lambda: outcome.over)
            assert outcome.value == "done"

    drive(model, 1, scenario)


@pooled_models
def test_what_is_withdrawn_in_a_call_ends_at_its_next_wait(model: str) -> None:
    """The call runs to its end; a wait for a while after it ends at once."""
    entered, gate, calls = threading.Event(), threading.Event(), list[str]()

    def stuck() -> None:
        entered.set()
        passed(gate)
        calls.append("made")

    async def body() -> None:
        await blocking(HERE, stuck)
        await blocking(HERE, calls.append, "and another")
        await Later()

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "caller", body())
            await until(entered.is_set)
            executor.withdraw(named(executor, "caller"))
            assert not outcome.over
            gate.set()
            await until(lambda: outcome.over)
            assert isinstance(outcome.error, InterruptedError)
            assert calls == ["made", "and another"]

    drive(model, 1, scenario)


@every_model
def test_at_the_end_nobody_waits_on(model: str) -> None:
    """Who holds what is waited for may keep it for ever."""

    async def scenario(executor: Executor) -> None:
        if model == "none":  # which waits in place, but for locks
            return
        async with trio.open_nursery() as nursery:
            outcomes = [await begin(nursery, executor, f"{n}", later()) for n in range(20)]
            executor.end_waits()
            await until(lambda: all(outcome.over for outcome in outcomes))
            assert all(isinstance(outcome.error, InterruptedError) for outcome in outcomes)
            with pytest.raises(InterruptedError):
                await answer(executor, "one more", later())

    drive(model, 1, scenario)


def test_close_ends_what_waits() -> None:
    executor, ended = create("second", 1), Ended()
    executor.start("waiter", later(), ended)
    executor.close()
    assert [found(request) for request in ended.requests] == ["EINTR"]
    assert not executor.requests


# What waits for its first call


class Stuck:
    """A call that takes the only worker, or all of an inode's places."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        passed(self.gate)
        return "stuck no more"


@pooled_models
@pytest.mark.parametrize("threads", [1, 2], ids=["for a worker", "for the inode"])
def test_a_first_call_is_left_out_at_once(
    model: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all workers are stuck, or the inode's share is used up; later ones have their turn."""
    monkeypatch.setattr(workers, "STUCK", 1000.0)  # no further workers, nothing is let through
    calls: list[int] = []

    async def scenario(executor: Executor) -> None:
        stuck = Stuck()
        async with trio.open_nursery() as nursery:
            first = await begin(nursery, executor, "stuck", call(stuck))
            await until(stuck.entered.is_set)
            waiting = [
                await begin(nursery, executor, f"{n}", call(partial(calls.append, n)))
                for n in range(3)
            ]
            executor.withdraw(named(executor, "1"))
            await until(lambda: waiting[1].over)
            assert isinstance(waiting[1].error, InterruptedError)
            assert not first.over
            stuck.gate.set()
            await until(lambda: all(outcome.over for outcome in (first, *waiting)))
        assert calls == [0, 2]
        pool = executor.pool  # type: ignore[attr-defined]
        await until(lambda: not pool._shares._taken)
        assert not len(pool._shares)

    drive(model, threads, scenario)


@pooled_models
def test_a_signal_ends_a_wait_and_leaves_out_no_call(model: str) -> None:
    """`Executor.interrupt`: what waits for a worker goes on, what waits for others does not."""

    async def call_and_wait() -> str:
        await blocking(HERE, list)
        return await later()

    async def scenario(executor: Executor) -> None:
        stuck = Stuck()
        async with trio.open_nursery() as nursery:
            waiter = await begin(nursery, executor, "waiter", later())
            executor.interrupt(named(executor, "waiter"))
            await until(lambda: waiter.over)
            assert isinstance(waiter.error, InterruptedError)
            await begin(nursery, executor, "stuck", call(stuck))
            await until(stuck.entered.is_set)
            caller = await begin(nursery, executor, "caller", call(lambda: "made"))
            both = await begin(nursery, executor, "both", call_and_wait())
            for name in ("caller", "both"):
                executor.interrupt(named(executor, name))
            stuck.gate.set()
            await until(lambda: caller.over and both.over)
            assert caller.value == "made"
            assert isinstance(both.error, InterruptedError)

    drive(model, 1, scenario)


@pooled_models
def test_only_the_first_call_is_left_out(model: str) -> None:
    """What a body calls to clean up is called, however often it is withdrawn."""
    entered, gate, calls = threading.Event(), threading.Event(), list[str]()

    def stuck() -> None:
        entered.set()
        passed(gate)

    async def body() -> None:
        try:
            await blocking(HERE, calls.append, "the first")
        finally:
            await blocking(HERE, stuck)
            await blocking(HERE, calls.append, "cleaned up")

    async def scenario(executor: Executor) -> None:
        other = Stuck()
        async with trio.open_nursery() as nursery:
            await begin(nursery, executor, "stuck", call(other))
            await until(other.entered.is_set)
            outcome = await begin(nursery, executor, "cleaner", body())
            request = named(executor, "cleaner")
            executor.withdraw(request)
            other.gate.set()
            await until(entered.is_set)
            executor.withdraw(request)
            gate.set()
            await until(lambda: outcome.over)
            assert isinstance(outcome.error, InterruptedError)
            assert calls == ["cleaned up"]

    drive(model, 1, scenario)


@every_model
def test_a_call_that_was_made_is_not_taken_back(model: str) -> None:
    """Withdrawn when it has ended, or before anything knows of it, a request is what it was."""
    ended = Ended()

    async def scenario(executor: Executor) -> None:
        await answer(executor, "first", call(int))  # which has the loop mind the dispatcher
        request = executor.start("call", call(partial(str, "made")), ended)
        await until(lambda: ended.requests)
        executor.withdraw(request)
        assert found(request) == "made"

    drive(model, 1, scenario)


@pooled_models
def test_what_waits_for_a_lock_of_ours_is_told_once_it_has_it(model: str) -> None:
    """These waits are short; then its first call is left out."""
    lock, calls = RenameLock(), list[str]()

    async def body() -> None:
        async with lock.reading:
            pass
        await blocking(HERE, calls.append, "made")

    async def scenario(executor: Executor) -> None:
        assert lock.try_acquire(WRITE)
        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "reader", body())
            executor.withdraw(named(executor, "reader"))
            await trio.sleep(0.01)
            assert not outcome.over
            lock.release(WRITE)
            await until(lambda: outcome.over)
            assert isinstance(outcome.error, InterruptedError)
            assert not calls
            assert lock.try_acquire(WRITE), "it has kept the lock"

    drive(model, 1, scenario)


@pooled_models
def test_withdrawing_from_other_threads_stress(model: str) -> None:
    """Each call is made, or its request ends with EINTR; all places are given back."""
    made: list[int] = []

    async def body(number: int) -> None:
        await blocking(number % 3, made.append, number)
        await blocking(number % 5, int)

    async def scenario(executor: Executor) -> None:
        ended, requests = Ended(), list[Request]()
        over = threading.Event()
        await answer(executor, "first", body(2000))  # which has the loop mind the dispatcher

        def withdraw() -> None:
            while not over.is_set():
                for request in requests[-8:]:
                    executor.withdraw(request)

        threads = [threading.Thread(target=withdraw) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(2000):
                requests.append(executor.start("body", body(number), ended))
                if number % 16 == 0:
                    await trio.lowlevel.checkpoint()
            await until(lambda: len(ended.requests) == 2000)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        interrupted = sum(found(request) == "EINTR" for request in requests)
        assert len(made) == len(set(made)) == 2001 - interrupted
        pool = executor.pool  # type: ignore[attr-defined]
        await until(lambda: not pool._shares._taken)

    drive(model, 2, scenario)


# All ways in which threads can come between each other


class Model(Executor):
    """One whose waits are those of all models; what is resumed is kept."""

    model = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.resumed: list[Request] = []

    def drive(self, request: Request) -> None:
        self.advance(request)

    def resume(self, request: Request) -> None:
        self.resumed.append(request)

    def close(self) -> None:
        """Nothing is left."""


class Bell:
    """What ends waits early, as locks of files do."""

    def __init__(self, lock: Any) -> None:
        self._mutex = lock
        self._has_rung = False
        self._resume: Callable[[], None] | None = None

    def has_come(self, resume: Callable[[], None]) -> bool:
        with self._mutex:
            self._resume = resume
            return self._has_rung

    def ring(self) -> None:
        with self._mutex:
            self._has_rung = True
            resume = self._resume
        if resume is not None:
            resume()


def still(seconds: float, function: Callable[[], None]) -> bool:
    """A clock that stands still."""
    return True


@pytest.mark.parametrize("others", ["withdraw", "ring", "tick", "withdraw, tick", "withdraw, ring"])
def test_a_wait_ends_once_whoever_ends_it(others: str) -> None:
    """Its time, what it waits for, and a withdrawal, while it begins and after."""

    def scenario(run: Run) -> None:
        executor, ended = Model(), Ended()
        executor._patience._mutex = run.lock()  # type: ignore[assignment]
        executor.clock.call_later = still  # type: ignore[method-assign]
        bell, tries = Bell(run.lock()), list[int]()

        async def body() -> str:
            await Later(bell)
            tries.append(1)
            return "goes on"

        request = executor.admit("waiter", body(), ended)
        ending: dict[str, Callable[[], object]] = {
            "withdraw": partial(executor.withdraw, request),
            "ring": bell.ring,
            "tick": executor._patience._let_go,
        }
        run.threads(
            partial(executor.drive, request), *(ending[name] for name in others.split(", "))
        )
        if others == "tick":  # which may have come before there was anything to resume
            executor._patience._let_go()
        assert len(executor.resumed) + len(ended.requests) == 1, "resumed twice, or lost"
        for waiting in executor.resumed:
            executor.drive(waiting)
        (over,) = ended.requests
        outcome = found(over)
        assert outcome in (("goes on", "EINTR") if "withdraw" in others else ("goes on",))
        assert len(tries) == (outcome == "goes on")
        assert len(executor._patience) == 0

    ways = explore([driver, patience], scenario, 2, one_in=1 if SOAK else 15)
    print(f"{others}: {ways} ways")
    assert ways > 20


class Idle:
    """A model whose pool has no threads but the test's.

    Attributes:
        executor: the model.
        ended: who is told of the ends of requests.
        calls: the names of the requests whose calls were made.
    """

    def __init__(self, model: str, run: Run) -> None:
        kind: type[FirstModel | SecondModel] = FirstModel if model == "first" else SecondModel
        with mock.patch.object(threading.Thread, "start"):
            self.executor = kind(2)
        self.pool = self.executor.pool
        self.pool._mutex = run.lock()  # type: ignore[assignment]
        self.ended = Ended()
        self.calls: list[str] = []

    async def body(self, name: str) -> str:
        await blocking(HERE, self.calls.append, name)
        await blocking(HERE + 1, self.calls.append, f"{name} again")
        return "made"

    def admit(self, name: str) -> Request:
        """A request that has not been driven."""
        return self.executor.admit(name, self.body(name), self.ended)

    def take_place(self) -> None:
        """Have the only place that the inode has taken, by a job that is queued."""
        self.executor.drive(self.admit("other"))

    def work(self) -> None:
        """What a worker does."""
        self.pool._run_next()
        self.pool._run_next()

    def check(self, request: Request) -> str:
        """How a request has ended, once all has been done; and that nothing is left."""
        while self.pool._run_next() or self.executor.dispatcher._posted:
            self.executor.after_wait()
        assert not self.executor.requests, "one was lost"
        assert self.ended.requests.count(request) == 1
        outcome = found(request)
        mine = [name for name in self.calls if name.startswith("body")]
        assert mine == (["body", "body again"] if outcome == "made" else [])
        assert not self.pool._shares._taken, "a place was not given back, or twice"
        assert not len(self.pool._shares)
        assert not self.pool._submitted
        return outcome


MODULES = [executor_module, driver, workers, shares]


@pooled_models
@pytest.mark.parametrize("waits", ["for a worker", "for the inode", "while it is submitted"])
def test_a_first_call_is_made_or_left_out(model: str, waits: str) -> None:
    """A worker and a withdrawal, whichever comes first; and places are given back."""
    outcomes: set[str] = set()

    def scenario(run: Run) -> None:
        idle = Idle(model, run)
        if waits == "for the inode":
            idle.take_place()
        request = idle.admit("body")
        withdraw = partial(idle.executor.withdraw, request)
        if waits == "while it is submitted":
            run.threads(partial(idle.executor.drive, request), idle.work, withdraw)
        else:
            idle.executor.drive(request)
            run.threads(idle.work, withdraw)
        outcomes.add(idle.check(request))

    ways = explore(MODULES, scenario, 2, one_in=1 if SOAK else 30)
    print(f"{model}, {waits}: {ways} ways")
    assert outcomes == {"made", "EINTR"}


@pooled_models
@pytest.mark.parametrize(
    "waits", ["for a worker", "for the inode", "for the inode, later", "until there is a place"]
)
def test_without_a_worker_it_is_left_out_at_once(model: str, waits: str) -> None:
    """Whatever it is just about to be queued in: nobody looks at that again for long."""

    def scenario(run: Run) -> None:
        idle = Idle(model, run)
        executor = idle.executor
        if waits != "for a worker":
            idle.take_place()
        request = idle.admit("body")
        withdraw = partial(executor.withdraw, request)
        if waits == "for the inode, later":  # it goes on after another wait
            idle.pool.resume(partial(executor._rest, request))
            run.threads(idle.pool._run_next, withdraw)
        elif waits == "until there is a place":
            executor.drive(request)
            run.threads(idle.pool._run_next, withdraw)
        else:
            run.threads(partial(executor.drive, request), withdraw)
        executor.after_wait()
        assert request in idle.ended.requests
        assert idle.check(request) == "EINTR"

    assert explore(MODULES, scenario, 2, one_in=1 if SOAK else 15) > 20
