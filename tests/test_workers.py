"""The worker pool and its bound for each inode (ninefuse/driving/workers.py)."""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from helpers_executor import PATIENCE, bounded, eager_switches, passed

from ninefuse.driving import clock, workers
from ninefuse.driving.workers import WorkerPool

STUCK = 7  # an inode whose calls hang
OTHER = 8


@contextmanager
def pool_of(threads: int, *, by_user: bool = False) -> Iterator[WorkerPool]:
    """A pool that is closed at the end, unless the test fails: then its jobs may be stuck."""
    pool = WorkerPool(threads, by_user=by_user)
    yield pool
    bounded(pool.close)


def started(semaphore: threading.Semaphore, times: int) -> None:
    """Wait until so many jobs have started."""
    for _ in range(times):
        if not semaphore.acquire(timeout=PATIENCE):
            raise TimeoutError("a job did not start")


def finish(pool: WorkerPool, on: int | None = None) -> None:
    """Wait until a job that is submitted now has run."""
    done = threading.Event()

    def job() -> None:
        pool.leave(on)
        done.set()

    pool.submit(job, on)
    passed(done)


def rest(pool: WorkerPool) -> None:
    """Wait until every worker has ended what it was at."""
    meeting = threading.Barrier(pool.statistics().threads + 1)

    def meet() -> None:
        meeting.wait(PATIENCE)

    for _ in range(meeting.parties - 1):
        pool.submit(meet)
    meet()


def assert_all_places_free(pool: WorkerPool, on: int) -> None:
    """The inode has its whole half of the pool: no place was lost, and none gained."""
    rest(pool)
    late = threading.Event()

    def refused() -> None:
        late.set()
        pool.leave(on)

    for _ in range(pool._shares.for_inode):
        assert pool.enter(pytest.fail, on)
    assert not pool.enter(refused, on)
    for _ in range(pool._shares.for_inode):
        pool.leave(on)
    passed(late)
    rest(pool)
    assert pool.statistics().held_back == 0
    assert not pool._shares._taken, "something is remembered of inodes that nothing runs on"
    assert not pool._shares._waiting


def test_a_pool_needs_a_thread() -> None:
    """Less than one thread is refused."""
    for threads in (0, -1):
        with pytest.raises(ValueError, match="a pool needs a thread"):
            WorkerPool(threads)


def test_jobs_run_on_all_workers_at_once() -> None:
    """As many jobs as there are threads run at the same time, on other threads than the caller."""
    idents: set[int] = set()
    meeting = threading.Barrier(5)

    def job() -> None:
        idents.add(threading.get_ident())
        meeting.wait(PATIENCE)

    with pool_of(4) as pool:
        for _ in range(4):
            pool.submit(job)
        meeting.wait(PATIENCE)
        assert pool.statistics().threads == 4
    assert len(idents) == 4
    assert threading.get_ident() not in idents


# Half of the pool


@pytest.mark.parametrize(("threads", "half"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (16, 8)])
def test_one_inode_gets_at_most_half_of_the_pool(threads: int, half: int) -> None:
    """Of many stuck jobs on one inode half as many run as there are threads; others are served."""
    gate = threading.Event()
    running = threading.Semaphore(0)
    count = Counter[str]()

    with pool_of(threads) as pool:

        def stuck() -> None:
            count["stuck"] += 1
            running.release()
            passed(gate)
            pool.leave(STUCK)

        assert pool._shares.for_inode == half
        for _ in range(2 * threads + 1):
            pool.submit(stuck, STUCK)
        started(running, half)
        if threads > 1:
            for on in (OTHER, None) * 5:
                finish(pool, on)
            assert pool.statistics().queued == 0, "all others were served"
        assert count["stuck"] == half
        assert pool.statistics().held_back == 2 * threads + 1 - half
        gate.set()
        started(running, 2 * threads + 1 - half)
        finish(pool, STUCK)
        assert_all_places_free(pool, STUCK)
    assert count["stuck"] == 2 * threads + 1


def test_jobs_on_no_inode_may_take_the_whole_pool() -> None:
    """The bound is for inodes; a job on None needs no place and has none to give back."""
    meeting = threading.Barrier(5)

    with pool_of(4) as pool:

        def job() -> None:
            meeting.wait(PATIENCE)
            pool.leave(None)

        for _ in range(4):
            pool.submit(job, None)
        meeting.wait(PATIENCE)


def test_held_back_jobs_are_served_in_order() -> None:
    """What waited in the inode's queue runs afterwards, first come, first served."""
    gate = threading.Event()
    order: list[int] = []

    with pool_of(2) as pool:  # half is one: jobs on one inode run one after the other

        def job(n: int) -> None:
            passed(gate)
            order.append(n)
            pool.leave(STUCK)

        for n in range(20):
            pool.submit(partial(job, n), STUCK)
        finish(pool, OTHER)
        assert pool.statistics().held_back == 19
        gate.set()
        finish(pool, STUCK)
    assert order == list(range(20))


def test_inodes_are_counted_apart() -> None:
    """Two inodes whose jobs hang get half of the pool each, and neither gets the other's."""
    gate = threading.Event()
    running = threading.Semaphore(0)
    count = Counter[int]()

    with pool_of(4) as pool:

        def stuck(on: int) -> None:
            count[on] += 1
            running.release()
            passed(gate)
            pool.leave(on)

        for on in (STUCK,) * 5 + (OTHER,) * 5:
            pool.submit(partial(stuck, on), on)
        started(running, 4)
        assert count == {STUCK: 2, OTHER: 2}
        assert pool.statistics().held_back == 6
        gate.set()
        started(running, 6)
    assert count == {STUCK: 5, OTHER: 5}


def test_the_bound_holds_under_load() -> None:
    """Thousands of jobs on few inodes: all run, never more than half of the pool on one."""
    jobs = 4000
    choice = random.Random(1)
    lock = threading.Lock()
    now = Counter[int]()
    most = Counter[int]()
    done = threading.Semaphore(0)

    with pool_of(4) as pool, eager_switches():

        def job(on: int | None) -> None:
            if on is not None:
                with lock:
                    now[on] += 1
                    most[on] = max(most[on], now[on])
                time.sleep(0)  # another thread's turn
                with lock:
                    now[on] -= 1
            pool.leave(on)
            done.release()

        for _ in range(jobs):
            on = choice.choice([None, 1, 2, 3])
            pool.submit(partial(job, on), on)
        started(done, jobs)
        for on in (1, 2, 3):
            assert_all_places_free(pool, on)
    assert max(most.values()) == 2, "more than half; or never two at once, which tests nothing"


# Places of jobs that are running already


def test_a_running_job_enters_and_leaves() -> None:
    """A job that finds no place ends and frees its worker; the job it left runs with the place."""
    with pool_of(4) as pool:
        gate = threading.Event()
        entered = threading.Semaphore(0)
        refused = threading.Semaphore(0)
        trace: list[str] = []

        def have_place(name: str) -> None:
            trace.append(name)
            entered.release()
            passed(gate)
            pool.leave(STUCK)

        def ask(n: int) -> None:
            if pool.enter(partial(have_place, f"{n} later"), STUCK):
                have_place(f"{n} at once")
            else:
                refused.release()

        for n in range(6):
            pool.submit(partial(ask, n))
            started(entered if n < 2 else refused, 1)
        finish(pool)
        assert trace == ["0 at once", "1 at once"]
        assert pool.statistics().held_back == 4
        gate.set()
        started(entered, 4)
        finish(pool, STUCK)
        assert sorted(trace[2:]) == [f"{n} later" for n in range(2, 6)]
        assert_all_places_free(pool, STUCK)


def test_a_place_can_be_handed_on() -> None:
    """The place belongs to whoever calls leave, on whatever thread: not to a worker."""
    with pool_of(2) as pool:
        there = threading.Event()
        pool.submit(there.set, STUCK)  # it keeps its place
        passed(there)
        held_back = threading.Event()
        pool.submit(held_back.set, STUCK)
        finish(pool)
        assert not held_back.is_set()
        pool.leave(STUCK)  # for the first: the second has the place now
        passed(held_back)
        pool.leave(STUCK)
        assert_all_places_free(pool, STUCK)


# Resumed jobs


def test_resumed_jobs_run_before_queued_ones() -> None:
    """What is resumed runs first, in its order, before all that was submitted earlier."""
    gate, busy = threading.Event(), threading.Event()
    order: list[str] = []

    def occupy() -> None:
        busy.set()
        passed(gate)

    with pool_of(1) as pool:
        pool.submit(occupy)
        passed(busy)
        for name in ("queued 1", "queued 2"):
            pool.submit(partial(order.append, name))
        for name in ("resumed 1", "resumed 2"):
            pool.resume(partial(order.append, name))
        pool.submit(partial(order.append, "queued 3"))
        pool.resume(partial(order.append, "resumed 3"))
        assert pool.statistics().queued == 6
        gate.set()
    assert order == ["resumed 1", "resumed 2", "resumed 3", "queued 1", "queued 2", "queued 3"]


def test_a_resumed_job_wakes_an_idle_worker() -> None:
    """No job needs to be submitted for a resumed one to run."""
    with pool_of(2) as pool:
        for _ in range(100):
            done = threading.Event()
            pool.resume(done.set)
            passed(done)
        assert pool.statistics().queued == 0


def test_a_resumed_job_runs_beside_jobs_that_hang() -> None:
    """A resumed job does not wait for a place, nor for the other workers."""
    gate, busy, done = threading.Event(), threading.Event(), threading.Event()

    with pool_of(2) as pool:

        def stuck() -> None:
            busy.set()
            passed(gate)
            pool.leave(STUCK)

        for _ in range(4):
            pool.submit(stuck, STUCK)
        passed(busy)
        pool.resume(done.set)
        passed(done)
        gate.set()


def test_a_resumed_job_that_hangs_holds_up_no_queued_job() -> None:
    """A worker that goes for a resumed job first leaves the queued ones to the others."""
    gates = [threading.Event(), threading.Event()]
    busy = threading.Semaphore(0)
    gate, hanging, served = threading.Event(), threading.Event(), threading.Event()

    def occupy(n: int) -> None:
        busy.release()
        passed(gates[n])

    def hang() -> None:
        hanging.set()
        passed(gate)

    with pool_of(2) as pool:
        for n in range(2):
            pool.submit(partial(occupy, n))
        started(busy, 2)
        pool.submit(served.set)
        pool.resume(hang)
        gates[0].set()
        passed(hanging)
        gates[1].set()  # the second worker is free now
        was_served = served.wait(2)
        gate.set()
    assert was_served, "the job was in the hands of the worker that hangs"


# Jobs that raise


@pytest.mark.parametrize("error", [OSError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_job_that_raises_costs_no_worker(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a job raises is logged, and its worker goes on, queued or resumed."""
    idents: list[int] = []

    def fail() -> None:
        idents.append(threading.get_ident())
        raise error("on purpose")

    with pool_of(1) as pool:
        pool.submit(fail)
        pool.resume(fail)
        pool.submit(fail)
        pool.submit(lambda: idents.append(threading.get_ident()))
        finish(pool)
    assert len(idents) == 4
    assert len(set(idents)) == 1, "the one worker did them all"
    failures = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(failures) == 3
    assert all(r.exc_info is not None and r.exc_info[0] is error for r in failures)


# The end


def test_close_finishes_everything_submitted() -> None:
    """close() returns when all has run, held-back jobs and resumed ones included."""
    gate = threading.Event()
    busy = threading.Semaphore(0)
    ran = Counter[str]()
    before = threading.active_count()
    pool = WorkerPool(4)

    def stuck() -> None:
        busy.release()
        passed(gate)
        ran["stuck"] += 1
        pool.leave(STUCK)

    def another() -> None:
        ran["another"] += 1
        pool.resume(last)
        pool.leave(OTHER)

    def last() -> None:
        ran["last"] += 1

    for _ in range(20):
        pool.submit(stuck, STUCK)
    started(busy, 2)
    for _ in range(20):
        pool.submit(another, OTHER)
    closer = threading.Thread(target=pool.close, daemon=True)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive(), "it does not wait for jobs that are under way"
    gate.set()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert ran == {"stuck": 20, "another": 20, "last": 20}
    assert pool.statistics()[1:] == (0, 0)
    assert threading.active_count() == before, "a worker is left"


def test_close_of_an_idle_pool_ends_its_threads() -> None:
    """An unused pool can be closed, also twice."""
    before = threading.active_count()
    pool = WorkerPool(3)
    bounded(pool.close)
    bounded(pool.close)
    assert threading.active_count() == before


class LateQueue:
    """The pool's queue, in which what workers put comes after all that close() puts."""

    def __init__(self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        self._queue = pool._queue
        self._ends = threading.Semaphore(0)
        self._threads = pool.statistics().threads
        self.handing_on = threading.Event()
        monkeypatch.setattr(pool, "_queue", self)

    def put(self, item: Any) -> None:
        """Put, but on a worker only when close() has queued an end for each."""
        if threading.current_thread().name.startswith("worker"):
            self.handing_on.set()
            for _ in range(self._threads):
                self._ends.acquire(timeout=1)
            self._queue.put(item)
        else:
            self._queue.put(item)
            self._ends.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


@pytest.mark.parametrize("how", ["leave", "resume"])
def test_a_job_handed_on_while_the_pool_is_closed_still_runs(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() may come between a worker's decision to hand on a job and its doing so."""
    begun, gate = threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        begun.set()
        passed(gate)
        if how == "resume":
            pool.resume(partial(ran.append, "resume"))
        pool.leave(STUCK)

    def held_back() -> None:
        ran.append("leave")
        pool.leave(STUCK)

    with pool_of(2) as pool:
        pool.submit(first, STUCK)
        passed(begun)
        if how == "leave":
            pool.submit(held_back, STUCK)
        late = LateQueue(pool, monkeypatch)
        gate.set()
        passed(late.handing_on)
        bounded(pool.close)
        assert ran == [how]


def test_an_idle_worker_keeps_nothing_of_its_last_job() -> None:
    """What a job refers to (a read's data) is freed when it has run, not at the next job."""

    class Data:
        pass

    def use(data: Data) -> None:
        assert data is not None

    with pool_of(1) as pool:
        for hand_over in (pool.submit, pool.resume):
            data = Data()
            alive = weakref.ref(data)
            freed = threading.Event()
            weakref.finalize(data, freed.set)
            hand_over(partial(use, data))
            del data
            assert freed.wait(2), f"{hand_over.__name__}: {alive()} is still there"


# Signals


def test_signals_are_blocked_in_workers() -> None:
    """No signal is delivered to a worker; the mask of the thread that made the pool stays."""
    masks: list[set[int]] = []

    def job() -> None:
        masks.append({int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])})

    def scenario() -> None:  # on a thread of its own: the mask is the thread's
        mine = {signal.SIGUSR1, signal.SIGWINCH}
        signal.pthread_sigmask(signal.SIG_SETMASK, mine)
        with pool_of(2) as pool:
            pool.submit(job)
            pool.resume(job)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mine

    bounded(scenario)
    wanted = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGIO"}
    for mask in masks:
        assert {int(getattr(signal, name)) for name in wanted} <= mask
    assert len(masks) == 2


# Users


@pytest.mark.parametrize(
    ("threads", "for_user", "for_inode"), [(1, 1, 1), (3, 1, 1), (4, 2, 1), (16, 8, 4)]
)
def test_a_user_gets_at_most_half_of_the_pool(threads: int, for_user: int, for_inode: int) -> None:
    """And half of that for one inode; of root's there is no bound but an inode's."""
    with pool_of(threads, by_user=True) as pool:
        for _ in range(2):  # once more after all was given back
            for inode in range(for_user):
                assert pool.enter(pytest.fail, inode, 1001)
            late = threading.Event()
            assert not pool.enter(late.set, 100, 1001)
            assert not pool.enter(late.set, None, 1001)
            assert all(pool.enter(pytest.fail, 200 + n, 0) for n in range(2 * threads))
            assert pool.enter(pytest.fail, 300, 1002)
            for _ in range(for_inode):
                assert pool.enter(pytest.fail, 400, 0)
            assert not pool.enter(late.set, 400, 0)
            for inode in range(for_user):
                pool.leave(inode, 1001)
            passed(late)
            rest(pool)
            pool.leave(100, 1001)
            pool.leave(None, 1001)
            for n in range(2 * threads):
                pool.leave(200 + n, 0)
            pool.leave(300, 1002)
            for _ in range(for_inode + 1):
                pool.leave(400, 0)
            rest(pool)
        assert not pool._shares._taken
        assert not pool._shares._waiting


# Growth


def test_where_all_are_stuck_more_are_started_and_end_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that nobody waits for longer than that takes, up to a bound."""
    monkeypatch.setattr(workers, "_SPARE_TIME", 0.05)
    monkeypatch.setattr(workers, "MOST_TIMES", 8)
    gate = threading.Event()
    with pool_of(2) as pool:
        for _ in range(2):
            pool.submit(lambda: passed(gate))
        for count in range(5):
            other = threading.Event()
            pool.submit(other.set)
            passed(other)
            pool.submit(lambda: passed(gate))
            assert pool.statistics().threads > 2 + count
        for _ in range(100):
            pool.submit(lambda: passed(gate))
        deadline = time.monotonic() + PATIENCE
        while pool.statistics().threads < 2 * workers.MOST_TIMES:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(3 * clock.STUCK)
        assert pool.statistics().threads == 2 * workers.MOST_TIMES
        gate.set()
        while pool.statistics().threads > 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        late = threading.Event()
        pool.submit(late.set)
        passed(late)


def test_no_more_are_started_where_some_are_idle() -> None:
    """They are not stuck: the machine is busy, and has not let them run yet."""
    with pool_of(2) as pool:
        done = threading.Semaphore(0)
        for _ in range(2):
            pool._submitted.append(done.release)  # whose tokens come late
        pool._have_watched()
        time.sleep(5 * clock.STUCK)
        assert pool.statistics().threads == 2
        for _ in range(2):
            pool._queue.put(True)
        started(done, 2)


def test_further_workers_end_though_there_is_always_a_little_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers take turns, so each has something to do again before it has waited for long."""
    monkeypatch.setattr(workers, "_SPARE_TIME", 0.2)
    gate = threading.Event()
    deadline = time.monotonic() + PATIENCE
    with pool_of(2) as pool:
        for _ in range(20):
            pool.submit(lambda: passed(gate))
        while pool.statistics().threads < 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gate.set()
        while pool.statistics().threads > 2:
            assert time.monotonic() < deadline
            for _ in range(20):
                one = threading.Event()
                pool.submit(one.set)
                passed(one)


def test_a_further_worker_stays_where_the_others_are_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is looked for by more than are idle, for longer than a spare one waits."""
    monkeypatch.setattr(workers, "_SPARE_TIME", 0.02)
    gate = threading.Event()
    with pool_of(4) as pool:
        for _ in range(4):
            pool.submit(lambda: passed(gate))
        seen: set[threading.Thread] = set()

        def note(one: threading.Event) -> None:
            seen.add(threading.current_thread())
            one.set()

        over = time.monotonic() + 20 * workers._SPARE_TIME
        while time.monotonic() < over:
            one = threading.Event()
            pool.submit(partial(note, one))
            passed(one)
        assert all(thread.is_alive() for thread in seen)
        gate.set()


def test_what_is_let_through_is_begun_by_workers_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has only just come into the queue: nobody is stuck who could have begun it."""
    over, busy = threading.Event(), threading.Semaphore(0)
    with pool_of(16, by_user=True) as pool:

        def stuck(inode: int) -> None:
            busy.release()
            passed(over)
            pool.leave(inode, 1001)

        grown: list[int] = []
        monkeypatch.setattr(pool, "_grow", grown.append)
        for first in (0, 12):  # his share is eight
            for inode in range(first, min(first + 12, 16)):
                pool.submit(partial(stuck, inode), inode, 1001)
            started(busy, min(12, 16 - first))
        assert grown == []
        over.set()


@pytest.mark.parametrize("by_user", [False, True])
def test_a_queue_that_does_not_move_is_let_through(by_user: bool) -> None:
    """Who waits behind his own calls that are stuck may have the kernel's lock of a directory."""
    gate = threading.Event()
    with pool_of(4, by_user=by_user) as pool:

        def stuck() -> None:
            passed(gate)
            pool.leave(STUCK, 1001)

        def other(over: threading.Event) -> None:
            pool.leave(STUCK if not by_user else OTHER, 1001)
            over.set()

        for _ in range(2):
            pool.submit(stuck, STUCK, 1001)
        for _ in range(3):
            over = threading.Event()
            pool.submit(partial(other, over), STUCK if not by_user else OTHER, 1001)
            passed(over)
        assert not gate.is_set()
        gate.set()


def _pass_and_note(gate: threading.Event, done: list[int], number: int) -> None:
    passed(gate)
    done.append(number)


def test_a_grown_pool_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its threads, those that are just about to end among them."""
    monkeypatch.setattr(workers, "_SPARE_TIME", 0.001)
    monkeypatch.setattr(workers, "STUCK", 0.005)
    before = threading.active_count()
    for _ in range(20):
        gate, done = threading.Event(), list[int]()
        pool = WorkerPool(1)
        for number in range(6):
            pool.submit(partial(_pass_and_note, gate, done, number))
        deadline = time.monotonic() + PATIENCE
        while pool.statistics().threads < 6:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        gate.set()
        bounded(pool.close)
        assert sorted(done) == list(range(6))
        assert threading.active_count() == before


def test_who_has_nothing_to_do_is_not_woken() -> None:
    """The watcher sleeps once all that was queued has begun."""
    with pool_of(2) as pool:
        once = threading.Event()
        pool.submit(once.set)
        passed(once)
        deadline = time.monotonic() + PATIENCE
        while pool._is_watched:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not pool._look.is_set()
