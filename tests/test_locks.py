"""The read-write lock, the fid table's lock and the rename lock (ninefuse/locks.py)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
from helpers_executor import PATIENCE, at_once, bounded, eager_switches
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ninefuse import locks
from ninefuse.calls import READ, WRITE, Acquire, Release
from ninefuse.locks import RenameLock, RWLock, TableLock

MODES = [READ, WRITE]


class Queue:
    """Requests for one lock, and in which order they got it."""

    def __init__(self) -> None:
        self.lock = RWLock("tested")
        self.got: list[str] = []

    def ask(self, *names: str) -> None:
        """Acquire for each name: r1, r2 … read, w1, w2 … write."""
        for name in names:
            if self.lock.acquire(self.mode(name), partial(self.got.append, name)):
                self.got.append(name)

    def end(self, *names: str) -> None:
        """Release for each name."""
        for name in names:
            self.lock.release(self.mode(name))

    @staticmethod
    def mode(name: str) -> str:
        return READ if name.startswith("r") else WRITE


# Order and fairness


def test_readers_share_and_a_writer_is_alone() -> None:
    """Readers hold the lock together; a writer shares it with nobody."""
    queue = Queue()
    queue.ask("r1", "r2", "r3")
    assert queue.got == ["r1", "r2", "r3"]
    queue.ask("w1")
    queue.end("r1", "r2")
    assert queue.got == ["r1", "r2", "r3"], "a writer beside a reader"
    queue.end("r3")
    assert queue.got[3:] == ["w1"]
    queue.ask("w2", "r4")
    assert queue.got[3:] == ["w1"], "somebody beside a writer"


def test_a_waiting_writer_is_not_overtaken_by_later_readers() -> None:
    """A reader that comes after a waiting writer waits for it, though readers hold the lock."""
    queue = Queue()
    queue.ask("r1", "w1", "r2")
    assert queue.got == ["r1"]
    queue.end("r1")
    assert queue.got == ["r1", "w1"]
    queue.end("w1")
    assert queue.got == ["r1", "w1", "r2"]


def test_adjacent_readers_are_let_in_together() -> None:
    """A release lets in all readers up to the next writer, and none behind it."""
    queue = Queue()
    queue.ask("w1", "r1", "r2", "r3", "w2", "r4", "r5", "w3")
    assert queue.got == ["w1"]
    queue.end("w1")
    assert queue.got[1:] == ["r1", "r2", "r3"]
    queue.end("r2", "r1")
    assert queue.got[4:] == [], "the writer has to wait for the last of the three"
    queue.end("r3")
    assert queue.got[4:] == ["w2"]
    queue.end("w2")
    assert queue.got[5:] == ["r4", "r5"]
    queue.end("r4", "r5")
    assert queue.got[7:] == ["w3"]


def test_writers_are_served_in_the_order_they_came() -> None:
    """A queue of writers is first come, first served."""
    queue = Queue()
    names = [f"w{n}" for n in range(50)]
    queue.ask(*names)
    for n, name in enumerate(names):
        assert queue.got == names[: n + 1]
        queue.end(name)


def test_readers_that_never_pause_do_not_starve_a_writer() -> None:
    """With a new reader before each one that leaves, a writer waits for the holders only."""
    queue = Queue()
    queue.ask("r0", "r1", "w")
    for n in range(2, 50):
        queue.ask(f"r{n}")
        if n < 4:
            queue.end(f"r{n - 2}")
    assert queue.got == ["r0", "r1", "w"]


def test_writers_that_never_pause_do_not_starve_a_reader() -> None:
    """With a new writer before each one that leaves, a reader waits for those before it only."""
    queue = Queue()
    queue.ask("w0", "w1", "r")
    for n in range(2, 50):
        queue.ask(f"w{n}")
        if n < 4:
            queue.end(f"w{n - 2}")
    assert queue.got == ["w0", "w1", "r"]


# try_acquire


@pytest.mark.parametrize(
    ("held", "mode", "taken"),
    [
        ("", READ, True),
        ("", WRITE, True),
        ("r", READ, True),
        ("r", WRITE, False),
        ("w", READ, False),
        ("w", WRITE, False),
    ],
)
def test_try_acquire_takes_what_is_free(held: str, mode: str, taken: bool) -> None:
    """try_acquire takes a lock that nobody is in the way of, and otherwise changes nothing."""
    queue = Queue()
    queue.ask(*held)
    before = queue.lock.statistics()
    assert queue.lock.try_acquire(mode) is taken
    if taken:
        queue.lock.release(mode)
    assert queue.lock.statistics() == before, "it queued, or counted as a wait"


def test_try_acquire_does_not_overtake_a_waiter() -> None:
    """try_acquire of a reader fails while a writer waits, though only readers hold the lock."""
    queue = Queue()
    queue.ask("r1", "w1")
    assert not queue.lock.try_acquire(READ)
    queue.end("r1", "w1")
    assert queue.lock.try_acquire(READ)


# Misuse


@pytest.mark.parametrize(("held", "mode"), [("", READ), ("", WRITE), ("w", READ), ("r", WRITE)])
def test_releasing_what_is_not_held_raises(held: str, mode: str) -> None:
    """A release in a mode that nobody holds raises and changes nothing."""
    queue = Queue()
    queue.ask(*held)
    before = queue.lock.statistics()
    with pytest.raises(RuntimeError, match="does not hold it"):
        queue.lock.release(mode)
    assert queue.lock.statistics() == before
    queue.end(*held)


def test_releasing_twice_raises() -> None:
    """The second release of one acquire raises, and the lock can still be taken."""
    for mode in MODES:
        lock = RWLock("tested")
        assert lock.try_acquire(mode)
        lock.release(mode)
        with pytest.raises(RuntimeError, match="does not hold it"):
            lock.release(mode)
        assert lock.try_acquire(WRITE)


# Waiters are callbacks


def test_a_waiter_is_called_once_and_when_it_has_the_lock() -> None:
    """A resume callback runs exactly once, not before its turn, and holds the lock then."""
    lock = RWLock("tested")
    seen: list[tuple[int, bool]] = []

    def resumed() -> None:
        state = lock.statistics()
        seen.append((state.readers, state.writing))

    def scenario() -> None:
        assert lock.acquire(WRITE, pytest.fail)
        assert not lock.acquire(READ, resumed)
        assert not lock.acquire(READ, resumed)
        assert not lock.acquire(WRITE, resumed)
        assert seen == []
        lock.release(WRITE)
        assert seen == [(2, False), (2, False)]
        lock.release(READ)
        lock.release(READ)
        assert seen[2:] == [(0, True)]
        lock.release(WRITE)
        assert len(seen) == 3
        assert lock.try_acquire(WRITE)

    bounded(scenario)


def test_a_resume_callback_may_use_the_same_lock() -> None:
    """The mutex is free when waiters are resumed: a callback may release, acquire and ask."""
    lock = RWLock("tested")
    order: list[str] = []

    def reader() -> None:
        order.append("reader")
        assert lock.statistics().readers == 1
        assert not lock.try_acquire(WRITE)
        assert not lock.acquire(WRITE, writer), "it holds the lock itself, and has to queue"
        lock.release(READ)  # which resumes the writer from inside this callback
        order.append("reader left")

    def writer() -> None:
        order.append("writer")
        assert lock.statistics().writing
        lock.release(WRITE)
        assert lock.try_acquire(READ)
        lock.release(READ)
        order.append("writer left")

    def scenario() -> None:
        assert lock.try_acquire(WRITE)
        assert not lock.acquire(READ, reader)
        lock.release(WRITE)

    bounded(scenario)
    assert order == ["reader", "writer", "writer left", "reader left"]
    state = lock.statistics()
    assert (state.readers, state.writing, state.waiting) == (0, False, 0)


def test_a_reader_let_in_may_leave_while_its_neighbours_are_resumed() -> None:
    """A callback that gives the lock back at once takes no turn from those let in with it."""
    lock = RWLock("tested")
    order: list[str] = []

    def come_and_go(name: str, mode: str) -> None:
        order.append(name)
        lock.release(mode)

    assert lock.try_acquire(WRITE)
    for name in ("r1", "r2", "w1", "r3"):
        mode = Queue.mode(name)
        assert not lock.acquire(mode, partial(come_and_go, name, mode))
    bounded(partial(lock.release, WRITE))
    assert order == ["r1", "r2", "w1", "r3"]
    assert lock.try_acquire(WRITE)


def test_a_releaser_does_not_run_other_threads_into_each_other() -> None:
    """Waiters resumed on many threads are granted once each and never beside a writer."""
    lock = RWLock("tested")
    inside: list[str] = []
    mistakes: list[str] = []
    grants = [0]
    rounds = 300

    def visit(mode: str, mine: threading.Semaphore) -> None:
        if not lock.acquire(mode, mine.release) and not mine.acquire(timeout=PATIENCE):
            raise TimeoutError(f"never granted: {lock}")
        inside.append(mode)
        here = list(inside)
        if WRITE in here and len(here) > 1:
            mistakes.append(f"{here} at once")
        inside.remove(mode)
        grants[0] += mode == WRITE  # only ever changed by a writer
        lock.release(mode)
        if mine.acquire(blocking=False):
            mistakes.append("granted twice")

    def worker(seed: int) -> None:
        choice = random.Random(seed)
        mine = threading.Semaphore(0)
        for n in range(rounds):
            visit(WRITE if n % 3 == 0 else choice.choice([READ, READ, WRITE]), mine)

    with eager_switches():
        at_once(*(partial(worker, seed) for seed in range(6)))
    assert mistakes == []
    assert grants[0] >= 6 * rounds / 3
    state = lock.statistics()
    assert (state.readers, state.writing, state.waiting) == (0, False, 0)


# Statistics


def test_statistics_count_waits_their_sum_and_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only requests that had to queue count as waits; the longest wait is kept."""
    now = [100.0]
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    queue = Queue()
    queue.ask("r1")
    assert queue.lock.statistics() == (1, False, 0, 0, 0.0, 0.0)
    queue.ask("w1")
    now[0] += 1
    queue.ask("r2")
    assert queue.lock.statistics() == (1, False, 2, 2, 0.0, 0.0)
    now[0] += 2
    queue.end("r1")
    assert queue.lock.statistics() == (0, True, 1, 2, 3.0, 3.0)
    now[0] += 2
    queue.end("w1")
    assert queue.lock.statistics() == (1, False, 0, 2, 7.0, 4.0)
    queue.ask("w2")
    now[0] += 1
    queue.end("r2")
    assert queue.lock.statistics() == (0, True, 0, 3, 8.0, 4.0), "a shorter wait changes nothing"


def test_a_lock_says_who_holds_it() -> None:
    """Its repr names the lock, the holders and the number of those that wait."""
    queue = Queue()
    queue.ask("r1", "r2", "w1", "w2")
    assert repr(queue.lock) == "<RWLock tested: 2 readers, 2 waiting>"
    queue.end("r1", "r2")
    assert repr(queue.lock) == "<RWLock tested: writing, 1 waiting>"


# The fid table's lock


@pytest.mark.parametrize("mode", ["reading", "writing"])
def test_a_section_that_raises_gives_the_table_back(mode: str) -> None:
    """An error in a section leaves the lock free."""
    table = TableLock()
    with pytest.raises(KeyError), getattr(table, mode):
        raise KeyError
    assert table.try_acquire(WRITE)


def test_readers_of_the_table_are_inside_together() -> None:
    """Reading sections run at the same time: all of them meet inside."""
    table = TableLock()
    meeting = threading.Barrier(4)

    def reader() -> None:
        with table.reading:
            meeting.wait(PATIENCE)

    at_once(*[reader] * 4)


def test_a_thread_that_waits_for_the_table_gets_it() -> None:
    """A thread that found the table taken goes on when it is given back, in its order."""
    table = TableLock()
    order: list[str] = []

    def visit(name: str) -> None:
        with table.writing:
            order.append(name)

    threads = []
    with table.reading:
        for n in range(5):
            thread = threading.Thread(target=visit, args=(f"w{n}",), daemon=True)
            thread.start()
            threads.append(thread)
            while table.statistics().waiting <= n:
                assert thread.is_alive()
        assert order == []
    for thread in threads:
        thread.join(PATIENCE)
    assert order == ["w0", "w1", "w2", "w3", "w4"]


def test_table_lock_stress() -> None:
    """Real threads: no update lost, no torn read, no wake-up lost."""
    table = TableLock()
    counter = {"left": 0, "right": 0}
    torn: list[dict[str, int]] = []
    rounds = 1500

    def writer() -> None:
        for n in range(rounds):
            with table.writing:
                value = counter["left"]
                counter["left"] = value + 1
                if n % 10 == 0:
                    time.sleep(0)  # another thread's turn
                counter["right"] = value + 1

    def reader() -> None:
        for _ in range(rounds):
            with table.reading:
                left, right = counter["left"], counter["right"]
            if left != right:
                torn.append({"left": left, "right": right})

    with eager_switches():
        at_once(writer, reader, writer, reader, writer, reader)
    assert torn == []
    assert counter == {"left": 3 * rounds, "right": 3 * rounds}
    state = table.statistics()
    assert (state.readers, state.writing, state.waiting) == (0, False, 0)
    assert state.waits > 0, "nobody ever waited: this tested nothing"


# The rename lock


@pytest.mark.parametrize("mode", MODES)
def test_the_rename_lock_is_taken_and_given_back_by_the_driver(mode: str) -> None:
    """A section of a body yields one Acquire and one Release of it; it takes nothing itself."""
    lock = RenameLock()

    async def operation() -> str:
        async with lock.reading if mode == READ else lock.writing:
            return "inside"

    body = operation()
    acquire = body.send(None)
    assert isinstance(acquire, Acquire)
    assert (acquire.lock, acquire.mode) == (lock, mode)
    assert str(acquire) == f"rename lock ({mode})"
    assert lock.statistics() == (0, False, 0, 0, 0.0, 0.0)
    release = body.send(None)
    assert isinstance(release, Release)
    assert release.taken is acquire
    with pytest.raises(StopIteration) as stop:
        body.send(None)
    assert stop.value.value == "inside"


@pytest.mark.parametrize("error", [KeyError, SystemExit, GeneratorExit])
def test_a_body_that_raises_inside_gives_the_rename_lock_back(error: type[BaseException]) -> None:
    """Whatever is raised inside a section, its Release is still yielded."""
    lock = RenameLock()

    async def operation() -> None:
        async with lock.writing:
            raise error

    body = operation()
    assert isinstance(body.send(None), Acquire)
    assert isinstance(body.send(None), Release)
    with pytest.raises(error):
        body.send(None)


# Against a model


class RWLockAgainstModel(RuleBasedStateMachine):
    """RWLock compared with a list of holders and a list of those who wait."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = RWLock("modelled")
        self.numbers = 0
        self.waits = 0
        self.holders: list[str] = []  # modes
        self.queue: list[tuple[int, str]] = []
        self.granted: list[int] = []  # by the lock, in its order

    def _fits(self, mode: str) -> bool:
        return not self.holders or (mode == READ and WRITE not in self.holders)

    def _request(self) -> tuple[int, Callable[[], None]]:
        self.numbers += 1
        return self.numbers, partial(self.granted.append, self.numbers)

    @rule(mode=st.sampled_from(MODES))
    def acquire(self, mode: str) -> None:
        """Taken at once if nobody is in the way or waits; queued otherwise."""
        number, resume = self._request()
        taken = self.lock.acquire(mode, resume)
        assert taken == (not self.queue and self._fits(mode))
        if taken:
            self.holders.append(mode)
        else:
            self.queue.append((number, mode))
            self.waits += 1

    @rule(mode=st.sampled_from(MODES))
    def try_acquire(self, mode: str) -> None:
        """The same, but never queued."""
        taken = self.lock.try_acquire(mode)
        assert taken == (not self.queue and self._fits(mode))
        if taken:
            self.holders.append(mode)

    @precondition(lambda self: self.holders)
    @rule()
    def release(self) -> None:
        """Grants the head of the queue, as far as it fits, in order, at once."""
        mode = self.holders.pop()
        expected = []
        while self.queue and self._fits(self.queue[0][1]):
            number, next_mode = self.queue.pop(0)
            self.holders.append(next_mode)
            expected.append(number)
        self.granted.clear()
        self.lock.release(mode)
        assert self.granted == expected

    @rule(mode=st.sampled_from(MODES))
    def release_unheld(self, mode: str) -> None:
        """Refused."""
        if mode not in self.holders:
            with pytest.raises(RuntimeError, match="does not hold it"):
                self.lock.release(mode)

    @invariant()
    def statistics_agree(self) -> None:
        """Holders, queue and waits are those of the model."""
        state = self.lock.statistics()
        assert state.readers == self.holders.count(READ)
        assert state.writing == (WRITE in self.holders)
        assert self.holders.count(WRITE) <= 1
        assert state.waiting == len(self.queue)
        assert state.waits == self.waits

    def teardown(self) -> None:
        """Once all have left, all have been served."""
        while self.holders:
            self.release()
        assert self.queue == []
        assert self.lock.try_acquire(WRITE)


TestRWLockAgainstModel = RWLockAgainstModel.TestCase
TestRWLockAgainstModel.settings = settings(
    max_examples=150, stateful_step_count=40, derandomize=True, deadline=None
)
