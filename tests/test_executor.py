"""The threading models: four drivers of the same operation bodies (ninefuse/executor.py)."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from helpers_executor import (
    PATIENCE,
    Outcome,
    answer,
    begin,
    bounded,
    drive,
    eager_switches,
    passed,
    until,
)

from ninefuse.calls import READ, Acquire, Body, blocking
from ninefuse.driving import driver as driver_module
from ninefuse.driving import request as request_module
from ninefuse.driving import workers
from ninefuse.driving.pooled import Pooled
from ninefuse.driving.shares import Holder
from ninefuse.executor import Executor, NoThreading, create
from ninefuse.locks import RenameLock, TableLock
from ninefuse.settings import MODELS

POOLED = ["first", "second"]
STUCK = 7  # an inode whose calls hang
OTHER = 8

every_model = pytest.mark.parametrize("model", MODELS)
pooled_models = pytest.mark.parametrize("model", POOLED)


class Foreign:
    """Something to await that is none of the drivers' commands."""

    def __await__(self) -> Generator[object, Any, None]:
        yield "not a command"


async def one_call(on: int | None, function: Callable[[], Any]) -> Any:
    """A body of one call."""
    return await blocking(on, function)


def is_free(lock: RenameLock) -> bool:
    """Whether nobody holds a lock or waits for it."""
    state = lock.statistics()
    return (state.readers, state.writing, state.waiting) == (0, False, 0)


# Results and errors


@every_model
def test_results_come_back(model: str) -> None:
    """A call's result reaches its body, and the body's result its caller."""

    async def body(n: int) -> list[int]:
        return [await blocking(None, max, n, 3), await blocking(STUCK, abs, -n)]

    async def scenario(executor: Executor) -> None:
        assert await answer(executor, "body", body(5)) == [5, 5]
        assert await answer(executor, "body", body(1)) == [3, 1]

    drive(model, 2, scenario)


@every_model
def test_keywords_reach_the_call(model: str) -> None:
    """Keyword arguments of a call are not lost on the way (think of dir_fd)."""

    async def body() -> int:
        return await blocking(None, int, "ff", base=16)

    async def scenario(executor: Executor) -> int:
        return await answer(executor, "body", body())

    assert drive(model, 1, scenario) == 255


@every_model
def test_errors_come_back(model: str) -> None:
    """What a call raises is raised in the body; what leaves the body, at its caller."""
    trace: list[str] = []
    raised = OSError(errno.ENOSPC, "no space")

    def fail() -> None:
        raise raised

    async def passes_it_on() -> None:
        await blocking(None, fail)

    async def catches_it() -> str:
        try:
            await blocking(None, fail)
        except OSError as error:
            trace.append(f"caught {error.strerror}")
        return await blocking(None, str, "and went on")

    async def raises_itself() -> None:
        raise KeyError("before any call")

    async def raises_itself_later() -> None:
        await blocking(None, int)
        raise KeyError("after a call")

    async def scenario(executor: Executor) -> None:
        with pytest.raises(OSError, match="no space") as caught:
            await answer(executor, "passes it on", passes_it_on())
        assert caught.value is raised
        assert await answer(executor, "catches it", catches_it()) == "and went on"
        assert trace == ["caught no space"]
        with pytest.raises(KeyError, match="before any call"):
            await answer(executor, "raises", raises_itself())
        with pytest.raises(KeyError, match="after a call"):
            await answer(executor, "raises", raises_itself_later())

    drive(model, 1, scenario)


@every_model
def test_an_error_does_not_come_back_twice(model: str) -> None:
    """An error that a body has handled is not raised again at its next call."""

    def fail() -> None:
        raise OSError(errno.EIO, "once")

    async def body() -> list[int]:
        results = []
        for n in range(3):
            with pytest.raises(OSError, match="once"):
                await blocking(None, fail)
            results.append(await blocking(None, abs, n))
        return results

    async def scenario(executor: Executor) -> list[int]:
        return await answer(executor, "body", body())

    assert drive(model, 1, scenario) == [0, 1, 2]


@every_model
@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
def test_what_is_no_exception_becomes_eio(model: str, error: type[BaseException]) -> None:
    """A call's SystemExit and the like end neither worker nor dispatcher: the caller gets EIO."""
    lock = RenameLock()
    trace: list[str] = []

    def leave() -> None:
        raise error

    async def body() -> None:
        try:
            async with lock.writing:
                await blocking(STUCK, leave)
        except error:
            trace.append("seen by the body")
            raise

    async def early() -> None:
        raise error

    async def scenario(executor: Executor) -> None:
        for operation in (body, early):
            with pytest.raises(OSError, match="Input/output error") as caught:
                await answer(executor, "body", operation())
            assert caught.value.errno == errno.EIO
        assert trace == ["seen by the body"]
        assert is_free(lock)
        # The only worker there is goes on, and the inode has its place back.
        assert await answer(executor, "next", one_call(STUCK, partial(str, "here"))) == "here"

    drive(model, 1, scenario)


@every_model
def test_stop_iteration_of_a_call_is_an_error(model: str) -> None:
    """A call's StopIteration does not end its body as though that had returned."""

    async def body() -> str:
        await blocking(None, next, iter(list[int]()))
        return "went on without a result"

    async def scenario(executor: Executor) -> None:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await answer(executor, "body", body())

    drive(model, 1, scenario)


@every_model
def test_awaiting_something_foreign_is_a_type_error(model: str) -> None:
    """A body that awaits what is no command gets TypeError there, and can go on."""
    trace: list[str] = []

    async def body(foreign: Callable[[], Awaitable[None]], calls: int) -> str:
        for _ in range(calls):
            await blocking(None, int)
        try:
            await foreign()
        except TypeError as error:
            trace.append(str(error))
        return await blocking(None, str, "went on")

    async def scenario(executor: Executor) -> None:
        for calls in (0, 2):
            assert await answer(executor, "body", body(Foreign, calls)) == "went on"
            assert trace.pop() == "body awaits 'not a command': not a command"
        assert await answer(executor, "body", body(trio.lowlevel.checkpoint, 0)) == "went on"
        assert "not a command" in trace.pop()

        async def lets_it_pass() -> None:
            await Foreign()

        with pytest.raises(TypeError, match="not a command"):
            await answer(executor, "body", lets_it_pass())

    drive(model, 1, scenario)


# Where each call runs


class Trace:
    """On which thread each step of a body ran."""

    def __init__(self) -> None:
        self.body: list[int] = []
        self.calls: list[int] = []
        self.all: list[int] = []

    def mark(self, steps: list[int]) -> None:
        """Note this thread."""
        steps.append(get_ident())
        self.all.append(get_ident())

    def crossings(self) -> int:
        """How often the request went from one thread to another, from run() and back to it."""
        here = get_ident()
        steps = [here, *self.all, here]
        return sum(a != b for a, b in zip(steps, steps[1:], strict=False))

    async def operation(self, inodes: list[int | None], lock: RenameLock) -> None:
        """A body that makes a call on each inode, in a section of a lock."""
        self.mark(self.body)
        async with lock.reading:
            self.mark(self.body)
            for on in inodes:
                await blocking(on, self.mark, self.calls)
                self.mark(self.body)
        self.mark(self.body)


def check_where(
    model: str, check: Callable[[Trace, int], None], blocking_calls: int, beside: int
) -> None:
    """Run bodies that note where they are, several at a time, and check each on the dispatcher."""
    lock = RenameLock()
    # One alone always has room at its inodes. Several would be held back now and then, and
    # go on on another worker.
    inodes = [n % 3 if beside == 1 else None for n in range(blocking_calls)]

    async def scenario(executor: Executor) -> None:
        async def client() -> None:
            for _ in range(10):
                trace = Trace()
                await answer(executor, "body", trace.operation(inodes, lock))
                assert len(trace.calls) == blocking_calls
                assert len(trace.body) == blocking_calls + 3
                check(trace, get_ident())

        async with trio.open_nursery() as nursery:
            for _ in range(beside):
                nursery.start_soon(client)

    drive(model, 4, scenario)


several_bodies = pytest.mark.parametrize(("blocking_calls", "beside"), [(1, 1), (3, 1), (5, 12)])


@several_bodies
def test_none_runs_everything_on_the_dispatcher(blocking_calls: int, beside: int) -> None:
    """Under none, no step of a body leaves the dispatcher."""

    def check(trace: Trace, dispatcher: int) -> None:
        assert set(trace.all) == {dispatcher}

    check_where("none", check, blocking_calls, beside)


@several_bodies
def test_first_runs_calls_on_workers_only(blocking_calls: int, beside: int) -> None:
    """Under first, calls run on workers, all between them on the dispatcher: 2b crossings."""

    def check(trace: Trace, dispatcher: int) -> None:
        assert dispatcher not in trace.calls
        assert set(trace.body) == {dispatcher}
        assert trace.crossings() == 2 * blocking_calls

    check_where("first", check, blocking_calls, beside)


@several_bodies
def test_second_hands_over_once(blocking_calls: int, beside: int) -> None:
    """Under second, all from the first call on runs on one worker: two crossings."""

    def check(trace: Trace, dispatcher: int) -> None:
        assert trace.body[:2] == [dispatcher] * 2
        later = {*trace.body[2:], *trace.calls}
        assert dispatcher not in later
        assert len(later) == 1
        assert trace.crossings() == 2

    check_where("second", check, blocking_calls, beside)


@every_model
def test_a_body_without_calls_never_leaves_the_dispatcher(model: str) -> None:
    """Nothing to wait for, nothing to hand over; not even when all workers are busy."""
    gate, busy = threading.Event(), threading.Event()

    def stuck() -> None:
        busy.set()
        passed(gate)

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            if model != "none":
                await begin(nursery, executor, "stuck", one_call(None, stuck))
                passed(busy)
            for _ in range(10):
                trace = Trace()
                await answer(executor, "body", trace.operation([], RenameLock()))
                assert set(trace.all) == {get_ident()}
            assert executor.statistics().on_dispatcher == 10
            assert executor.statistics().handed_over == 0
            gate.set()

    drive(model, 1, scenario)


@every_model
def test_statistics(model: str) -> None:
    """Requests are counted by whether they made a call on a worker; the pool is described."""
    gate, busy = threading.Event(), threading.Semaphore(0)

    def stuck() -> None:
        busy.release()
        passed(gate)

    async def nothing() -> None:
        pass

    async def scenario(executor: Executor) -> None:
        for _ in range(3):
            await answer(executor, "nothing", nothing())
        for _ in range(2):
            await answer(executor, "call", one_call(None, int))
        now = executor.statistics()
        assert now.model == model
        assert now.running == 0
        if model == "none":
            assert now[1:] == (5, 0, 0, (0, 0, 0))
            return
        assert now[1:] == (3, 2, 0, (2, 0, 0))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                await begin(nursery, executor, "stuck", one_call(STUCK, stuck))
            assert busy.acquire(timeout=PATIENCE)
            await begin(nursery, executor, "stuck", one_call(None, stuck))
            assert busy.acquire(timeout=PATIENCE)
            await begin(nursery, executor, "queued", one_call(None, int))
            assert executor.statistics()[1:] == (3, 2, 5, (2, 1, 2))
            gate.set()
        assert executor.statistics()[1:] == (3, 7, 0, (2, 0, 0))

    drive(model, 2, scenario)


# Rule 3: a started body runs to its end


@pooled_models
def test_a_cancelled_caller_does_not_stop_a_started_body(model: str) -> None:
    """The body runs to its end and its result is returned; the cancellation comes after that."""
    gate, busy = threading.Event(), threading.Event()
    lock = RenameLock()
    trace: list[str] = []

    def stuck() -> None:
        busy.set()
        passed(gate)

    async def body() -> str:
        async with lock.writing:
            await blocking(None, stuck)
            for n in range(3):
                await blocking(None, trace.append, f"call {n}")
        async with lock.reading:
            return await blocking(None, str, "result")

    async def scenario(executor: Executor) -> None:
        scope = trio.CancelScope()

        async def caller() -> None:
            with scope:
                trace.append(await answer(executor, "body", body()))
                await trio.lowlevel.checkpoint()
                trace.append("not cancelled")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller)
            await until(busy.is_set)
            scope.cancel()
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            assert trace == []
            assert not lock.try_acquire(READ), "the lock was taken from a running body"
            gate.set()
        assert trace == ["call 0", "call 1", "call 2", "result"]
        assert scope.cancelled_caught
        assert is_free(lock)

    drive(model, 1, scenario)


@pooled_models
def test_a_cancelled_caller_does_not_stop_a_body_that_waits_for_a_lock(model: str) -> None:
    """A body that is cancelled in a lock's queue keeps its turn, and gives the lock back."""
    gate = threading.Event()
    lock = RenameLock()
    trace: list[str] = []

    async def holder() -> None:
        async with lock.writing:
            await blocking(None, passed, gate)

    async def waiter() -> None:
        async with lock.writing:
            await blocking(None, trace.append, "waiter")

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            await begin(nursery, executor, "holder", holder())
            with trio.CancelScope() as scope:
                scope.cancel()
                nursery.start_soon(trio.to_thread.run_sync, until_waiting, lock, gate)
                await answer(executor, "waiter", waiter())
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert trace == ["waiter"]
        assert is_free(lock)

    drive(model, 1, scenario)


def until_waiting(lock: RenameLock, gate: threading.Event) -> None:
    """Open a gate when somebody waits for a lock. On a thread of its own."""
    deadline = time.monotonic() + PATIENCE
    while not lock.statistics().waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    gate.set()


@every_model
def test_a_caller_cancelled_beforehand_is_served_all_the_same(model: str) -> None:
    """run() under a cancelled scope starts the body, and it runs to its end."""
    trace: list[str] = []

    async def body() -> str:
        for n in range(3):
            await blocking(None, trace.append, f"call {n}")
        return "result"

    async def scenario(executor: Executor) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            trace.append(await answer(executor, "body", body()))
            await trio.lowlevel.checkpoint()
            trace.append("not cancelled")
        assert scope.cancelled_caught

    drive(model, 1, scenario)
    assert trace == ["call 0", "call 1", "call 2", "result"]


# What comes after a body


@every_model
@pytest.mark.parametrize("calls", [0, 2])
def test_deferred_calls_run_after_the_body(model: str, calls: int) -> None:
    """In their order, after the body has ended, and not on the dispatcher if there is a pool."""
    trace: list[str] = []
    idents: list[int] = []

    def clean_up(name: str) -> None:
        idents.append(get_ident())
        trace.append(name)

    async def scenario(executor: Executor) -> None:
        async def body() -> None:
            executor.defer(clean_up, "clean up 1")
            for n in range(calls):
                await blocking(None, executor.defer, clean_up, f"from call {n}")
            executor.defer(clean_up, "clean up 2")
            trace.append("end")

        await answer(executor, "body", body())
        expected = ["end", "clean up 1", *(f"from call {n}" for n in range(calls)), "clean up 2"]
        if model == "none":
            assert trace == expected, "done when run() returns"
        await until(lambda: len(trace) == len(expected))
        assert trace == expected
        assert (get_ident() in idents) == (model == "none")

    drive(model, 1, scenario)


@every_model
@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_a_deferred_call_that_fails_harms_nothing(
    model: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the request has its result, and the other deferred calls are made."""
    trace: list[str] = []

    def fail(name: str) -> None:
        raise error(f"on purpose: {name}")

    async def scenario(executor: Executor) -> None:
        async def body() -> str:
            executor.defer(fail, "function")
            executor.defer(partial(fail, "partial"))  # which has no __name__
            executor.defer(trace.append, "clean up")
            return await blocking(None, str, "result")

        assert await answer(executor, "body", body()) == "result"
        await until(lambda: trace)
        assert await answer(executor, "next", one_call(None, partial(str, "here"))) == "here"

    drive(model, 1, scenario)
    assert trace == ["clean up"]
    for name in ("function", "partial"):
        assert any(f"on purpose: {name}" in r.getMessage() for r in caplog.records)


@every_model
@pytest.mark.parametrize("calls", [0, 1])
def test_background_bodies_run(model: str, calls: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever starts them does not wait; they take locks, make calls, and may start more."""
    lock = RenameLock()
    trace: list[str] = []
    idents: list[int] = []

    async def scenario(executor: Executor) -> None:
        async def background(generation: int) -> None:
            async with lock.writing:
                await blocking(STUCK, idents.append, get_ident())
                await blocking(None, idents.append, get_ident())
            executor.defer(trace.append, f"clean up {generation}")
            if generation < 2:
                executor.in_background("next", background(generation + 1))
                return
            raise OSError(errno.EIO, "logged")

        async def body() -> None:
            async with lock.reading:
                executor.in_background("background", background(0))
                assert trace == []
                for _ in range(calls):
                    await blocking(None, int)
            trace.append("body")

        await answer(executor, "body", body())
        if model == "none":
            assert len(trace) == 4, "done when run() returns"
        await until(lambda: len(trace) == 4)
        assert trace == ["body", "clean up 0", "clean up 1", "clean up 2"]
        assert len(idents) == 6
        assert (get_ident() in idents) == (model == "none")
        assert is_free(lock)

    drive(model, 1, scenario)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == ["next failed"]


@pooled_models
def test_background_bodies_wait_like_others(model: str) -> None:
    """One that has to wait for a lock, or a place of its inode, is put aside and runs later."""
    gate, busy = threading.Event(), threading.Event()
    lock = RenameLock()
    trace: list[str] = []

    def stuck() -> None:
        busy.set()
        passed(gate)

    async def background(name: str) -> None:
        async with lock.reading:
            await blocking(STUCK, trace.append, name)

    async def scenario(executor: Executor) -> None:
        async def holder() -> None:
            async with lock.writing:
                for n in range(4):
                    executor.in_background(f"background {n}", background(f"{n}"))
                await blocking(STUCK, stuck)

        async def starter() -> None:
            pass  # at its end those in the background are started

        async with trio.open_nursery() as nursery:
            await begin(nursery, executor, "holder", holder())
            await until(busy.is_set)
            await answer(executor, "starter", starter())
            await until(lambda: lock.statistics().waiting == 4)
            assert await answer(executor, "other", one_call(OTHER, partial(str, "fine"))) == "fine"
            assert trace == []
            gate.set()
        await until(lambda: len(trace) == 4)

    drive(model, 2, scenario)
    assert sorted(trace) == ["0", "1", "2", "3"]


# Waiting for the end of a request


# Rule 1: a coroutine that runs is not resumed


class GrantedTooEarly:
    """A lock that is let go on another thread before acquire() has returned."""

    name = "racy lock"

    def __init__(self, went_on: threading.Event, wait: float) -> None:
        self.went_on = went_on
        self.wait = wait
        self.releases = 0

    def acquire(self, mode: str, resume: Callable[[], None]) -> bool:
        thread = threading.Thread(target=resume, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        self.went_on.wait(self.wait)
        return False

    def try_acquire(self, mode: str) -> bool:
        return False

    def release(self, mode: str) -> None:
        self.releases += 1


@pooled_models
@pytest.mark.parametrize("calls", [0, 1])
def test_a_waiter_may_be_granted_before_the_driver_knows_that_it_waits(
    model: str, calls: int
) -> None:
    """The grant may come, and the body go on, while its driver is still in acquire()."""
    went_on, driver_is_done = threading.Event(), threading.Event()
    # Under second the body goes on on another worker, and acquire() returns after that.
    # Under first it goes on on the dispatcher, which is in acquire() itself.
    lock = GrantedTooEarly(went_on, 2 if model == "second" else 0.01)

    async def scenario(executor: Executor) -> None:
        def look() -> list[str]:
            went_on.set()
            passed(driver_is_done)
            return executor.slow_requests(0)

        async def body() -> list[str]:
            for _ in range(calls):
                await blocking(None, int)
            async with SectionOf(Acquire(lock, READ)):
                return await blocking(None, look)

        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "body", body())
            await until(went_on.is_set)
            await trio.testing.wait_all_tasks_blocked(0.01)
            driver_is_done.set()
        (line,) = outcome.value
        assert line.endswith("; holds racy lock (read)"), "the driver touched it after that"
        assert lock.releases == 1

    drive(model, 2, scenario)


class SectionOf:
    """``async with`` for a lock of the test's own, by way of the rename lock's section."""

    def __init__(self, taken: Acquire) -> None:
        self._section = RenameLock().reading
        self._section._acquire = taken
        self._section._release.taken = taken

    async def __aenter__(self) -> None:
        await self._section.__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        await self._section.__aexit__(*exc)


@pooled_models
def test_waiters_resumed_by_other_threads_stress(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bodies between their send()s, parked and resumed thousands of times: none runs twice."""
    lock = RenameLock()
    steps = Counter[int]()
    rounds = 25

    async def body(n: int) -> None:
        for k in range(rounds):
            if (n + k) % 3:
                async with lock.writing:
                    steps[n] += 1
            else:
                async with lock.reading:
                    if k % 2:
                        await blocking(None, int)
                    steps[n] += 1

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            for n in range(60):
                nursery.start_soon(answer, executor, f"{n}", body(n))

    with eager_switches():
        drive(model, 4, scenario)
    assert steps == {n: rounds for n in range(60)}
    assert is_free(lock)
    assert lock.statistics().waits > 60
    assert caplog.records == []


# Rule 2: who waits for a lock occupies no thread


@pooled_models
def test_waiters_occupy_no_worker(model: str) -> None:
    """With one worker and a hundred bodies in the lock's queue, other calls are made."""
    lock = RenameLock()
    waiting: list[Outcome] = []

    async def section(writing: bool, calls: int) -> None:
        for _ in range(calls):
            await blocking(None, int)
        async with lock.writing if writing else lock.reading:
            await blocking(None, int)

    async def scenario(executor: Executor) -> None:
        assert lock.try_acquire(READ)
        async with trio.open_nursery() as nursery:
            waiting.append(await begin(nursery, executor, "writer", section(True, 0)))
            waiting.extend(
                [
                    await begin(nursery, executor, f"{n}", section(n % 7 == 0, n % 2))
                    for n in range(100)
                ]
            )
            await until(lambda: lock.statistics().waiting == 101)
            for _ in range(10):
                assert (
                    await answer(executor, "other", one_call(None, partial(str, "fine"))) == "fine"
                )
            assert not any(outcome.over for outcome in waiting)
            lock.release(READ)
        assert all(outcome.over and outcome.error is None for outcome in waiting)
        assert is_free(lock)

    drive(model, 1, scenario)


def test_resumed_bodies_go_before_new_ones() -> None:
    """Under second, a body that got its lock is served before requests that came meanwhile."""
    gate, busy = threading.Event(), threading.Event()
    lock = RenameLock()
    trace: list[str] = []

    def stuck() -> None:
        busy.set()
        passed(gate)

    async def holder() -> None:
        async with lock.writing:
            await blocking(None, stuck)

    async def waiter() -> None:
        async with lock.reading:
            await blocking(None, trace.append, "waiter")

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            await begin(nursery, executor, "holder", holder())
            passed(busy)
            await begin(nursery, executor, "waiter", waiter())
            for n in range(3):
                await begin(nursery, executor, "new", one_call(None, partial(trace.append, f"{n}")))
            gate.set()

    drive("second", 1, scenario)
    assert trace == ["waiter", "0", "1", "2"]


@every_model
def test_one_thread_gets_through_a_storm(model: str) -> None:
    """A pool of one thread, 3000 concurrent walks, creates and renames: all are served."""
    lock = RenameLock()
    table = TableLock()
    choice = random.Random(2)
    names: dict[str, int] = {}
    done = Counter[str]()

    async def walk(n: int) -> None:
        async with lock.reading:
            before = dict(names)
            await blocking(n % 4, int)
            assert names == before, "changed under a reader"
        done["walk"] += 1

    async def create(n: int) -> None:
        await blocking(None, int)
        async with lock.reading:
            await blocking(n % 4, int)
        with table.writing:
            done["create"] += 1

    async def rename(n: int) -> None:
        async with lock.writing:
            before = dict(names)
            await blocking(n % 4, int)
            assert names == before, "changed under a writer"
            names["name"] = n
            await blocking(None, int)
        done["rename"] += 1

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            for n in range(3000):
                body = choice.choice([walk, walk, create, create, rename])
                nursery.start_soon(answer, executor, f"{n}", body(n))

    start = time.monotonic()
    drive(model, 1, scenario)
    assert done.total() == 3000
    assert is_free(lock)
    assert time.monotonic() - start < PATIENCE


# Promise 5: a file whose data is slow does not stop the others


class Slow:
    """Calls that hang until told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.running = threading.Semaphore(0)
        self.begun = 0

    def call(self) -> None:
        """Hang."""
        self.begun += 1
        self.running.release()
        passed(self.gate)

    async def begun_calls(self, number: int) -> None:
        """Wait until so many hang."""
        await until(lambda: self.begun >= number)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers become no more, and what waits for a place is not let through, however long it is."""
    monkeypatch.setattr(workers, "STUCK", 10 * PATIENCE)


async def others_are_served(executor: Executor, lock: RenameLock) -> None:
    """Calls on other inodes, on none, and name operations all come to their end."""

    async def names() -> str:
        async with lock.reading:
            return await blocking(OTHER, str, "fine")

    for _ in range(10):
        for on in (OTHER, None):
            assert await answer(executor, "other", one_call(on, partial(str, "fine"))) == "fine"
        assert await answer(executor, "names", names()) == "fine"


@pooled_models
@pytest.mark.parametrize("threads", [2, 4, 5])
def test_calls_stuck_on_one_inode_do_not_stop_others(
    model: str, threads: int, steady: None
) -> None:
    """With twice as many calls stuck on one inode as there are threads, others are served."""
    slow = Slow()
    lock = RenameLock()

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            stuck = [
                await begin(nursery, executor, "stuck", one_call(STUCK, slow.call))
                for _ in range(2 * threads)
            ]
            await slow.begun_calls(threads // 2)
            await others_are_served(executor, lock)
            assert slow.begun == threads // 2
            assert not any(outcome.over for outcome in stuck)
            slow.gate.set()
        assert slow.begun == 2 * threads
        assert all(outcome.error is None for outcome in stuck)

    drive(model, threads, scenario)


@pooled_models
def test_calls_stuck_after_waiting_for_a_lock_do_not_stop_others(model: str, steady: None) -> None:
    """The same when the stuck bodies come to their first call after a lock was granted."""
    slow = Slow()
    lock = RenameLock()
    threads = 4

    async def body() -> None:
        async with lock.reading:
            await blocking(STUCK, slow.call)

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            gate = threading.Event()

            async def holder() -> None:
                async with lock.writing:
                    await blocking(None, passed, gate)

            await begin(nursery, executor, "holder", holder())
            for _ in range(2 * threads):
                await begin(nursery, executor, "stuck", body())
            assert lock.statistics().waiting == 2 * threads
            gate.set()
            await slow.begun_calls(threads // 2)
            await others_are_served(executor, lock)
            assert slow.begun == threads // 2
            slow.gate.set()
        assert slow.begun == 2 * threads
        assert is_free(lock)

    drive(model, threads, scenario)


@pooled_models
@pytest.mark.parametrize("first_on", [None, OTHER])
def test_later_calls_stuck_on_one_inode_do_not_stop_others(
    model: str, first_on: int | None, steady: None
) -> None:
    """The same when the call that hangs is not the body's first, nor on its first inode."""
    slow = Slow()
    lock = RenameLock()
    threads = 4
    spread = iter(range(100, 1000))

    async def body() -> str:
        # Each on an inode of its own, so that none is held back here.
        await blocking(None if first_on is None else next(spread), int)
        await blocking(STUCK, slow.call)
        return await blocking(None if first_on is None else next(spread), str, "result")

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            stuck = [await begin(nursery, executor, "stuck", body()) for _ in range(2 * threads)]
            await slow.begun_calls(threads // 2)
            await others_are_served(executor, lock)
            assert slow.begun == threads // 2
            slow.gate.set()
        assert [outcome.value for outcome in stuck] == ["result"] * 2 * threads

    drive(model, threads, scenario)


@every_model
def test_only_under_none_a_stuck_call_stops_all(model: str) -> None:
    """A request that comes while calls hang is served, but under none only when they are over."""
    trace: list[str] = []
    served = threading.Event()
    first = iter([True])
    patience = 0.2 if model == "none" else PATIENCE

    async def scenario(executor: Executor) -> None:
        token = trio.lowlevel.current_trio_token()

        async with trio.open_nursery() as nursery:

            async def other() -> None:
                await answer(executor, "other", one_call(OTHER, served.set))

            def slow() -> None:
                if next(first, False):
                    token.run_sync_soon(nursery.start_soon, other)
                # What it waits for comes in now. It does not wait for ever.
                trace.append("served meanwhile" if served.wait(patience) else "not served")

            for _ in range(8 if model != "none" else 2):
                nursery.start_soon(answer, executor, "slow", one_call(STUCK, slow))
            await until(served.is_set)

    drive(model, 4, scenario)
    assert trace[0] == ("not served" if model == "none" else "served meanwhile")


# Completions


@pooled_models
@pytest.mark.parametrize("clients", [1, 2, 8])
@pytest.mark.parametrize("busy", [False, True])
def test_no_completion_is_missed(model: str, clients: int, busy: bool) -> None:
    """Each result reaches its caller, whether the dispatcher sleeps or has other things to do.

    A client asks again as soon as it is answered, so that workers complete at all moments
    of the dispatcher's falling asleep.
    """
    count = 0

    async def scenario(executor: Executor) -> None:
        async def client() -> None:
            nonlocal count
            for n in range(600 // clients):
                assert await answer(executor, "call", one_call(n % 3, partial(abs, -n))) == n
                count += 1

        async def something_else() -> None:
            choice = random.Random(clients)
            while True:
                await trio.lowlevel.checkpoint()
                await trio.sleep(choice.choice([0, 0.0001, 0.0005]))

        async with trio.open_nursery() as beside:
            if busy:
                beside.start_soon(something_else)
            async with trio.open_nursery() as nursery:
                for _ in range(clients):
                    nursery.start_soon(client)
            beside.cancel_scope.cancel()

    with eager_switches():
        drive(model, 2, scenario)
    assert count == 600 // clients * clients


@pooled_models
def test_completions_need_no_idle_dispatcher(model: str) -> None:
    """A dispatcher that always has something to run serves completions all the same."""

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            outcome = Outcome()

            async def client() -> None:
                outcome.value = await answer(executor, "call", one_call(None, partial(str, "here")))
                outcome.over = True

            nursery.start_soon(client)
            with trio.fail_after(PATIENCE):
                while not outcome.over:  # never asleep
                    await trio.lowlevel.checkpoint()
            assert outcome.value == "here"

    drive(model, 1, scenario)


# Reports


@pooled_models
def test_slow_requests_say_what_they_hold_and_wait_for(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each old request: its age, the locks it holds and what it waits for."""
    now = [1000]
    clock = SimpleNamespace(monotonic_ns=lambda: now[0] * 10**9, monotonic=lambda: now[0])
    monkeypatch.setattr(request_module, "time", clock)
    monkeypatch.setattr(driver_module, "time", clock)
    gate, busy = threading.Event(), threading.Event()
    lock = RenameLock()

    def stuck() -> None:
        busy.set()
        passed(gate)

    async def holder() -> None:
        async with lock.writing:
            await blocking(None, stuck)

    async def waiter() -> None:
        async with lock.reading:
            pass

    async def two_locks(second: RenameLock) -> None:
        async with second.reading, lock.writing:
            pass

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            await begin(nursery, executor, "rename", holder())
            passed(busy)
            now[0] += 5
            await begin(nursery, executor, "walk", waiter())
            await begin(nursery, executor, "both", two_locks(RenameLock("second lock")))
            await begin(nursery, executor, "read", one_call(STUCK, stuck))
            assert executor.slow_requests(20) == []
            assert executor.slow_requests(5) == [
                "rename (request 1), 5.0 s; on worker-0; holds rename lock (write)"
            ]
            now[0] += 2
            assert executor.slow_requests(1) == [
                "rename (request 1), 7.0 s; on worker-0; holds rename lock (write)",
                "walk (request 2), 2.0 s; waits for rename lock (read)",
                "both (request 3), 2.0 s; holds second lock (read); waits for rename lock (write)",
                "read (request 4), 2.0 s; queued for stuck",
            ]
            gate.set()
        assert executor.slow_requests(0) == []

    drive(model, 1, scenario)


@pooled_models
def test_deferred_calls_that_hang_keep_no_others_waiting(model: str) -> None:
    """Half of the workers make them; where these are stuck, one more begins after a while."""
    gate, done = threading.Event(), threading.Semaphore(0)

    async def scenario(executor: Executor) -> None:
        async def body() -> None:
            await blocking(None, int)

        for _ in range(6):
            executor.defer(passed, gate)
            await answer(executor, "close", body())
        for _ in range(6):
            executor.defer(done.release)
        # Nobody comes after this one who would look.
        await answer(executor, "close", body())
        for _ in range(6):
            await until(lambda: done.acquire(blocking=False))
        gate.set()

    drive(model, 8, scenario)


@pooled_models
def test_a_deferred_call_that_hangs_keeps_none_waiting_that_came_with_it(model: str) -> None:
    """Those of one request go to one worker, and nobody else need come after it."""
    gate, done = threading.Event(), threading.Semaphore(0)

    async def scenario(executor: Executor) -> None:
        async def body() -> None:
            executor.defer(passed, gate)
            executor.defer(done.release)
            await blocking(None, int)

        await answer(executor, "close", body())
        await until(lambda: done.acquire(blocking=False))
        gate.set()

    drive(model, 8, scenario)


@pooled_models
def test_deferred_calls_that_wait_ask_for_one_worker(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for one with each request that ends meanwhile: as many more would be started."""
    monkeypatch.setattr(workers, "STUCK", 1000.0)
    gate, made = threading.Event(), threading.Semaphore(0)

    async def stuck() -> None:
        await blocking(None, passed, gate)

    async def scenario(executor: Executor) -> None:
        async def close() -> None:
            executor.defer(made.release)

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                await begin(nursery, executor, "stuck", stuck())
            assert isinstance(executor, Pooled)
            pool = executor.pool
            await until(lambda: not pool.statistics().queued)  # both have begun
            for _ in range(20):
                await answer(executor, "close", close())
            queued = pool.statistics().queued
            gate.set()
        for _ in range(20):
            await until(lambda: made.acquire(blocking=False))
        assert queued == 1

    drive(model, 2, scenario)


@pooled_models
def test_a_user_may_have_so_many_requests_under_way(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody and root as many as they like; nothing is kept of who has none."""
    monkeypatch.setattr(driver_module, "MOST_REQUESTS", 2)
    gate = threading.Event()

    async def body() -> None:
        await blocking(None, passed, gate)

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            for user in (1001, 1001, 0, 0, 0, None):
                nursery.start_soon(answer, executor, "call", body(), user)
            await trio.testing.wait_all_tasks_blocked()
            assert executor.has_too_many(1001)
            assert not any(map(executor.has_too_many, (1002, 0, None)))
            gate.set()
        assert not executor.has_too_many(1001)
        assert not executor._users

    drive(model, 8, scenario)


@pooled_models
def test_who_has_the_kernel_keep_locks_is_refused_where_all_are_stuck(model: str) -> None:
    """EAGAIN, before anything is done; what has begun goes on, and so do others."""
    gate = threading.Event()
    made: list[int | None] = []

    async def body(inode: int) -> None:
        await blocking(inode, passed, gate)
        await blocking(inode + 100, made.append, inode)

    async def other() -> None:
        await blocking(None, made.append, None)

    async def scenario(executor: Executor) -> None:
        one = Holder(1001)
        async with trio.open_nursery() as nursery:
            for inode in range(8):  # as many as there are, where there are two workers
                nursery.start_soon(answer, executor, "stuck", body(inode), one)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(2):
                with pytest.raises(OSError, match="unavailable") as refused:
                    await answer(executor, "refused", other(), one)
                assert refused.value.errno == errno.EAGAIN
            assert made == []
            for user in (1001, 1002, Holder(1002), 0, None):
                await answer(executor, "other", other(), user)
            gate.set()
        await answer(executor, "other", other(), one)

    drive(model, 2, scenario, by_user=True)
    assert made[:5] + made[-1:] == 6 * [None]
    assert set(made[5:-1]) == set(range(8))


# The end


@every_model
def test_close_finishes_what_was_deferred_and_started_in_the_background(model: str) -> None:
    """What nobody waits for is done when close() returns; no worker is left."""
    before = threading.active_count()
    executor = create(model, 2)
    lock = RenameLock()
    trace: list[str] = []

    async def background(n: int) -> None:
        async with lock.writing:
            await blocking(STUCK, time.sleep, 0.001)
            await blocking(None, trace.append, f"background {n}")
        executor.defer(trace.append, f"after {n}")
        if n == 3:
            executor.in_background("last", background(4))

    async def body() -> None:
        for n in range(4):
            executor.in_background("background", background(n))
            executor.defer(trace.append, f"deferred {n}")
        await blocking(None, int)

    async def scenario() -> None:
        await answer(executor, "body", body())

    trio.run(scenario)
    executor.defer(trace.append, "deferred when all was over")
    bounded(executor.close, report=lambda: executor.slow_requests(0))
    assert sorted(trace) == sorted(
        [
            *(f"background {n}" for n in range(5)),
            *(f"after {n}" for n in range(5)),
            *(f"deferred {n}" for n in range(4)),
            "deferred when all was over",
        ]
    )
    assert executor.requests == {}
    assert threading.active_count() == before


def test_close_under_second_finishes_bodies_under_way() -> None:
    """Handed-over bodies, also held-back ones and those in a lock's queue, run to their end."""
    slow = Slow()
    lock = RenameLock()
    trace: list[str] = []

    async def body(n: int) -> None:
        async with lock.writing if n % 3 == 0 else lock.reading:
            await blocking(STUCK, slow.call)
            await blocking(None, trace.append, f"{n}")

    async def scenario(executor: Executor) -> None:
        async with trio.open_nursery() as nursery:
            for n in range(12):
                await begin(nursery, executor, f"{n}", body(n))
            await slow.begun_calls(1)
            threading.Timer(0.05, slow.gate.set).start()
            executor.close()  # it holds up the dispatcher, whom these bodies do not need
            assert len(trace) == 12
            assert executor.requests == {}

    drive("second", 4, scenario)


@every_model
def test_close_without_any_request(model: str) -> None:
    """What was deferred, or put into the background, is done though no request came."""
    trace: list[str] = []

    async def background() -> None:
        await blocking(None, trace.append, "background")

    for what in ("deferred", "background"):
        executor = create(model, 1)
        if what == "deferred":
            executor.defer(trace.append, what)
        else:
            executor.in_background(what, background())
        bounded(executor.close)
        assert trace.pop() == what
        assert executor.requests == {}


@every_model
def test_close_of_an_unused_executor(model: str) -> None:
    """An executor that never ran anything can be closed."""
    before = threading.active_count()
    bounded(create(model, 3).close)
    assert threading.active_count() == before


def test_none_without_trio() -> None:
    """run_here drives a body to its end on the calling thread, its clean-ups included."""
    executor = NoThreading()
    trace: list[Any] = []

    async def background() -> None:
        trace.append("background")

    async def body() -> str:
        executor.defer(trace.append, "deferred")
        executor.in_background("background", background())
        await blocking(None, trace.append, get_ident())
        return "result"

    async def fails() -> None:
        await blocking(None, int, "not a number")

    assert executor.run_here(body()) == "result"
    assert trace == [get_ident(), "deferred", "background"]
    with pytest.raises(ValueError, match="not a number"):
        executor.run_here(fails())
    assert executor.requests == {}


# Stress


class Tree:
    """Names and inodes that point at each other, as parents and names of fids do.

    Changed in two steps under the rename lock, with a call in between: who sees one step
    without the other was let in beside a writer.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.lock = RenameLock()
        self.table = TableLock()
        self.names = {n: f"name {n}" for n in range(size)}
        self.inodes = {name: n for n, name in self.names.items()}
        self.counter = 0
        self.done = Counter[str]()
        self.size = size
        self.choice = random.Random(seed)

    def body(self) -> Body[None]:
        """One of the operations below, on an inode by chance."""
        operation = self.choice.choices(
            [self.walk, self.rename, self.create, self.read, self.fail], [4, 2, 2, 3, 1]
        )[0]
        return operation(self.choice.randrange(self.size))

    def count(self, operation: str) -> None:
        """Count on whatever thread, under the table's lock."""
        with self.table.writing:
            self.done[operation] += 1

    def check(self, inode: int) -> None:
        """Both steps are done, or none."""
        assert self.inodes[self.names[inode]] == inode
        assert len(self.inodes) == self.size

    async def walk(self, inode: int) -> None:
        async with self.lock.reading:
            name = self.names[inode]
            self.check(inode)
            await blocking(inode, self.check, inode)
            await blocking(None, self.check, (inode + 1) % self.size)
            assert self.names[inode] == name
        self.count("walk")

    async def rename(self, inode: int) -> None:
        async with self.lock.writing:
            self.check(inode)
            self.counter += 1
            new = f"name {inode} of {self.counter}"
            del self.inodes[self.names[inode]]
            await blocking(inode, int)
            self.names[inode] = new
            await blocking(None, int)
            self.inodes[new] = inode
        self.count("rename")

    async def create(self, inode: int) -> None:
        await blocking(inode, int)
        async with self.lock.reading:
            await blocking((inode + 1) % self.size, self.check, inode)
        async with self.lock.writing:
            self.check(inode)
        self.count("create")

    async def read(self, inode: int) -> None:
        await blocking(inode, int)
        self.count("read")

    async def fail(self, inode: int) -> None:
        async with self.lock.writing:
            self.count("fail")
            await blocking(inode, int, "no number")


@pytest.mark.parametrize("threads", [1, 2, 16])
@every_model
def test_stress(model: str, threads: int) -> None:
    """Hundreds of mixed operations at once: exclusion holds, all end, nothing is left."""
    requests = 1000
    tree = Tree(size=5, seed=threads)
    failures: list[Exception] = []

    async def scenario(executor: Executor) -> None:
        async def request() -> None:
            try:
                await answer(executor, "request", tree.body())
            except ValueError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(requests):
                nursery.start_soon(request)
        running = executor.statistics()
        assert running.running == 0
        assert running.on_dispatcher + running.handed_over == requests

    with eager_switches():
        drive(model, threads, scenario)
    assert tree.done.total() == requests
    assert len(failures) == tree.done["fail"]
    assert min(tree.done[name] for name in ("walk", "rename", "create", "read", "fail")) > 20
    assert is_free(tree.lock)
    for inode in range(tree.size):
        tree.check(inode)
    if model != "none":
        assert tree.lock.statistics().waits > 100, "nobody ever waited: this tested nothing"
