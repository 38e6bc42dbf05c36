"""All ways in which a few threads can take turns: a tool for tests of what races.

`explore` runs a scenario again and again. Each time its threads run one at a time, and change at
other lines of the modules that are watched: at none, at each single line, at each two, … up to a
bound. A thread that waits for a lock lets others run. So what goes wrong because a thread comes in
between two lines of another is found each time, and is the same each time.

Most races take one change of threads in the wrong place, or two.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from helpers_executor import PATIENCE

Switch = tuple[int, int]  # at which line, counted from the start; to which thread


class Lock:
    """A mutex of the threads of one run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.is_locked = False

    def __enter__(self) -> bool:
        while self.is_locked:
            self._run.wait_for(self)
        self.is_locked = True
        return True

    def __exit__(self, *exc: object) -> None:
        self.is_locked = False


class Run:
    """One way to run the threads.

    Args:
        modules: whose lines are counted.
        switches: where threads change though they could go on.
    """

    def __init__(self, modules: list[types.ModuleType], switches: list[Switch]) -> None:
        self._files = {module.__file__ for module in modules}
        self._switches = dict(switches)
        self.lines = 0
        self.choices: list[Switch] = []  # where a thread could have changed to another
        self.errors: list[BaseException] = []
        self._functions: list[Callable[[], object]] = []
        self._turns: list[threading.Event] = []
        self._blocked: dict[int, Lock] = {}
        self._over: set[int] = set()
        self._current = 0
        self._done = threading.Event()

    def lock(self) -> Lock:
        """A lock for what the threads share."""
        return Lock(self)

    def threads(self, *functions: Callable[[], object]) -> None:
        """Run these, each on a thread of its own, to their ends."""
        self._functions = list(functions)
        self._turns = [threading.Event() for _ in functions]
        threads = [
            threading.Thread(target=self._life, args=(number,), daemon=True)
            for number in range(len(functions))
        ]
        for thread in threads:
            thread.start()
        self._turns[0].set()
        if not self._done.wait(PATIENCE):
            raise TimeoutError("the threads do not come to their ends")
        for thread in threads:
            thread.join(PATIENCE)
        if self.errors:
            raise self.errors[0]

    def wait_for(self, lock: Lock) -> None:
        """Let others run until a lock is free."""
        self._blocked[self._current] = lock
        self._change(self._next())

    def can_run(self, number: int) -> bool:
        """Whether a thread is neither over nor waits."""
        lock = self._blocked.get(number)
        return number not in self._over and (lock is None or not lock.is_locked)

    def _life(self, number: int) -> None:
        turn = self._turns[number]
        turn.wait(PATIENCE)
        turn.clear()
        sys.settrace(self._trace)
        try:
            self._functions[number]()
        except BaseException as error:
            self.errors.append(error)
        finally:
            sys.settrace(None)
        self._over.add(number)
        following = self._next()
        if following is None:
            self._done.set()
        else:
            self._current = following
            self._turns[following].set()

    def _next(self) -> int | None:
        for number in range(len(self._functions)):
            if self.can_run(number):
                return number
        return None

    def _change(self, to: int | None) -> None:
        here = self._current
        if to is None:
            self.errors.append(RuntimeError("all threads wait"))
            self._done.set()
            raise SystemExit
        if to != here:
            self._current = to
            self._turns[to].set()
            self._turns[here].wait(PATIENCE)
            self._turns[here].clear()
        self._blocked.pop(here, None)

    def _trace(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            for other in range(len(self._functions)):
                if other != self._current and self.can_run(other):
                    self.choices.append((self.lines, other))
            to = self._switches.get(self.lines)
            if to is not None:
                self._change(to)
        return self._line


def explore(
    modules: list[types.ModuleType],
    scenario: Callable[[Run], object],
    most: int,
    one_in: int = 1,
) -> int:
    """Run a scenario in all ways with up to so many changes of threads; how many these were.

    Args:
        modules: at whose lines threads may change.
        scenario: makes what the threads share, has them run, and checks what came of it.
        most: changes in one run, besides those where a thread ends or waits.
        one_in: of the ways with the most changes, each so many-th is tried.

    Raises:
        AssertionError: with the changes of the run that failed.
    """
    ways: list[list[Switch]] = [[]]
    count = longest = 0
    while ways:
        switches = ways.pop()
        if len(switches) == most and most > 1:
            longest += 1
            if longest % one_in:
                continue
        count += 1
        run = Run(modules, switches)
        try:
            scenario(run)
        except BaseException as error:
            raise AssertionError(f"with {switches}: {error!r}") from error
        if len(switches) < most:
            after = switches[-1][0] if switches else 0
            ways += [[*switches, choice] for choice in run.choices if choice[0] > after]
    return count
