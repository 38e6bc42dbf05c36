"""What the tests of locks, workers and executor share: runs that fail instead of hanging.

A lost wake-up or a deadlock shows as a run that does not end. Everything here that waits
does so for PATIENCE seconds at most; then the test fails, with the stacks of all threads.
The threads it leaves behind are daemons.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import pytest
import trio
import trio.testing
from mounting import PATIENCE as PATIENCE

from ninefuse.awaiting import Awaiting
from ninefuse.calls import Body
from ninefuse.driving.shares import Whose
from ninefuse.driving.uring import Refused, Uring
from ninefuse.executor import Executor, create

T = TypeVar("T")


def passed(event: threading.Event) -> None:
    """Wait for an event on this thread."""
    if not event.wait(PATIENCE):
        raise TimeoutError("the event that this waits for was not set")


def bounded(
    function: Callable[[], T],
    patience: float = PATIENCE,
    report: Callable[[], list[str]] = list,
    progress: Callable[[], object] = bool,
) -> T:
    """Call a function on a thread of its own, and fail the test if it does not end.

    Args:
        function: which.
        patience: seconds from its start, or since ``progress`` last gave another answer.
        report: lines to fail with, besides the threads' stacks.
        progress: by default there is none to be seen.
    """
    values: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            values.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="bounded", daemon=True)
    thread.start()
    seen, since = progress(), time.monotonic()
    while thread.is_alive():
        thread.join(0.1)
        now = progress()
        if now != seen:
            seen, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > patience:
            pytest.fail("\n".join([f"no progress for {patience:g} s", *report(), *stacks()]))
    if errors:
        raise errors.pop()
    return values.pop()


def at_once(*functions: Callable[[], object]) -> None:
    """Call each function on a thread of its own, all let go together; raise what one raised."""
    barrier = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def call(function: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        pytest.fail("\n".join([f"not over after {PATIENCE} s", *stacks()]))
    if errors:
        raise errors.pop()


def stacks() -> list[str]:
    """The stacks of all threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines += [f"--- {names.get(ident)}", *traceback.format_stack(frame)]
    return lines


@contextmanager
def eager_switches() -> Iterator[None]:
    """Let the interpreter change threads as often as it can, to find races."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


# A loop is known by its driver, since tests have a driver each.
_awaiting: WeakKeyDictionary[Executor, Awaiting] = WeakKeyDictionary()


async def answer(executor: Executor, name: str, body: Body[T], user: Whose = None) -> T:
    """Drive a body to its end, in a task of the loop that is the executor's dispatcher."""
    awaiting = _awaiting.get(executor)
    if awaiting is None:
        awaiting = _awaiting[executor] = Awaiting(executor)
    return await awaiting.run(name, body, user)


def drive(
    model: str,
    threads: int,
    scenario: Callable[[Executor], Awaitable[T]],
    *,
    by_user: bool = False,
) -> T:
    """Run a scenario under a threading model, on a thread of its own: the dispatcher.

    Afterwards the executor is closed, and no request may be left in it.
    """
    executor = create(model, threads, by_user=by_user)

    def life() -> T:
        try:
            return trio.run(scenario, executor)
        finally:
            executor.close()

    result = bounded(life, report=lambda: executor.slow_requests(0))
    assert executor.requests == {}
    return result


class Outcome:
    """What became of a body that a scenario started."""

    def __init__(self) -> None:
        self.over = False
        self.value: Any = None
        self.error: Exception | None = None


async def begin(nursery: trio.Nursery, executor: Executor, name: str, body: Body[Any]) -> Outcome:
    """Start a body in a task; return when all tasks wait (for a call, a lock, a timer)."""
    outcome = Outcome()

    async def task() -> None:
        try:
            outcome.value = await answer(executor, name, body)
        except Exception as error:
            outcome.error = error
        outcome.over = True

    nursery.start_soon(task)
    await trio.testing.wait_all_tasks_blocked()
    return outcome


async def until(condition: Callable[[], object]) -> None:
    """Let everything else go on until a condition holds that another thread brings about."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


@pytest.fixture
def engine() -> Iterator[Uring]:
    """An io_uring of the test's own."""
    try:
        found = Uring()
    except Refused as reason:
        pytest.skip(f"no io_uring here: {reason}")
    yield found
    found.close()
