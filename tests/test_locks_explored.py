"""Every state that a read-write lock can be in with a few who want it (ninefuse/locks.py).

`RWLock` beside a model of twenty lines: the holders, and the queue of those who wait. From each
state that the two can reach, everything is tried that somebody can do in it, and both must come
to the same. A state is come to by doing again, with a new lock, what first led to it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
from mounting import SOAK

from ninefuse.calls import READ, WRITE
from ninefuse.locks import RWLock

pytestmark = pytest.mark.soak

MODES = (READ, WRITE)

# What an actor does in the very callback by which it is told that it has the lock. A driver
# gives the callback to another thread, which may be as quick as that.
KEEP = "keep"  # nothing
LEAVE = "leave"  # gives it back
READ_AGAIN, WRITE_AGAIN = "read again", "write again"  # gives it back and asks anew


class State(NamedTuple):
    """What the lock is like, as far as anybody can tell: by actor, and who waits in order."""

    holders: frozenset[tuple[int, str]]
    queue: tuple[tuple[int, str, str], ...]  # actor, mode, what it does when it is told


Move = tuple[int, str, str, str]  # actor; ask, try or release; mode; what it does when told


class Model:
    """What a fair read-write lock is."""

    def __init__(self) -> None:
        self.holders: dict[int, str] = {}
        self.queue: list[tuple[int, str, str]] = []
        self.told: list[int] = []  # who was told that they have it, in order

    def state(self) -> State:
        return State(frozenset(self.holders.items()), tuple(self.queue))

    def is_free_for(self, mode: str) -> bool:
        return not self.holders or (mode == READ and WRITE not in self.holders.values())

    def ask(self, actor: int, mode: str, then: str) -> bool:
        if not self.queue and self.is_free_for(mode):
            self.holders[actor] = mode
            return True
        if then != "give up":
            self.queue.append((actor, mode, then))
        return False

    def release(self, actor: int) -> None:
        del self.holders[actor]
        turn = []
        while self.queue and self.is_free_for(self.queue[0][1]):
            waiter = self.queue.pop(0)
            self.holders[waiter[0]] = waiter[1]
            turn.append(waiter)
        # All of them have it before the first is told.
        for waiter_actor, _, then in turn:
            self.told.append(waiter_actor)
            self.react(waiter_actor, then)

    def react(self, actor: int, then: str) -> None:
        if then != KEEP:
            self.release(actor)
        if then in (READ_AGAIN, WRITE_AGAIN):
            self.ask(actor, READ if then == READ_AGAIN else WRITE, KEEP)

    def make(self, move: Move) -> bool:
        actor, what, mode, then = move
        if what == "release":
            self.release(actor)
            return True
        return self.ask(actor, mode, then if what == "ask" else "give up")

    def moves(self, actors: int, reactions: tuple[str, ...]) -> Iterator[Move]:
        """All that can be done now. Actors are alike: of those who did nothing, one does."""
        waiting = {actor for actor, _, _ in self.queue}
        fresh = False
        for actor in range(actors):
            if actor in self.holders:
                yield actor, "release", self.holders[actor], KEEP
            elif actor not in waiting and not fresh:
                fresh = True
                for mode in MODES:
                    yield actor, "try", mode, KEEP
                    for then in reactions:
                        yield actor, "ask", mode, then


class Real:
    """The lock itself, used by actors as the model is."""

    def __init__(self, make_lock: Callable[[str], RWLock]) -> None:
        self.lock = make_lock("explored")
        self.holds: dict[int, str] = {}  # by what the actors were told
        self.told: list[int] = []
        self.asked: Counter[int] = Counter()  # times that somebody has to be told

    def make(self, move: Move) -> bool:
        actor, what, mode, then = move
        if what == "release":
            self.release(actor)
            return True
        if what == "try":
            taken = self.lock.try_acquire(mode)
            if taken:
                self.holds[actor] = mode
            return taken
        return self.ask(actor, mode, then)

    def ask(self, actor: int, mode: str, then: str) -> bool:
        self.asked[actor] += 1
        if self.lock.acquire(mode, partial(self.resumed, actor, mode, then)):
            self.asked[actor] -= 1
            self.holds[actor] = mode
            return True
        return False

    def release(self, actor: int) -> None:
        self.lock.release(self.holds.pop(actor))

    def resumed(self, actor: int, mode: str, then: str) -> None:
        self.asked[actor] -= 1
        assert self.asked[actor] >= 0, "told twice"
        self.told.append(actor)
        self.holds[actor] = mode
        if then != KEEP:
            self.release(actor)
        if then in (READ_AGAIN, WRITE_AGAIN):
            self.ask(actor, READ if then == READ_AGAIN else WRITE, KEEP)


def compare(real: Real, model: Model) -> None:
    """The lock is in the state that the model is in, and that is a good one."""
    state = real.lock.statistics()
    modes = list(model.holders.values())
    assert modes.count(WRITE) <= 1
    assert WRITE not in modes or len(modes) == 1, "a writer that is not alone"
    assert (state.readers, state.writing) == (modes.count(READ), WRITE in modes)
    assert real.holds == model.holders
    assert real.told == model.told, "others are told, or in another order"
    waiting = [actor for actor, _, _ in model.queue]
    assert [mode for mode, _, _ in real.lock._waiting] == [mode for _, mode, _ in model.queue]
    assert +real.asked == Counter(waiting), "somebody waits for nothing, or is not told"
    # Nobody waits for a lock that is free for them: who is first in the queue was not let in.
    assert not model.queue or not model.is_free_for(model.queue[0][1])


def explore(
    actors: int,
    reactions: tuple[str, ...] = (KEEP,),
    make_lock: Callable[[str], RWLock] = RWLock,
) -> tuple[int, int]:
    """Go through all states and all that can be done in them; how many there were of each."""
    seen = {Model().state()}
    ways: deque[tuple[Move, ...]] = deque([()])
    steps = 0
    while ways:
        way = ways.popleft()
        for move in list(replay(way, make_lock)[1].moves(actors, reactions)):
            real, model = replay(way, make_lock)
            assert real.make(move) == model.make(move)
            compare(real, model)
            steps += 1
            if model.state() not in seen:
                seen.add(model.state())
                ways.append((*way, move))
    return len(seen), steps


def replay(way: tuple[Move, ...], make_lock: Callable[[str], RWLock]) -> tuple[Real, Model]:
    real, model = Real(make_lock), Model()
    for move in way:
        real.make(move)
        model.make(move)
    return real, model


@pytest.mark.parametrize(
    ("actors", "reactions"),
    [
        (6 if SOAK else 5, (KEEP,)),
        (4 if SOAK else 3, (KEEP, LEAVE, READ_AGAIN, WRITE_AGAIN)),
    ],
)
def test_every_state_and_every_step(actors: int, reactions: tuple[str, ...]) -> None:
    """Exclusion, order, who is let in together, and that each is told once: as in the model."""
    states, steps = explore(actors, reactions)
    print(f"{actors} actors, {len(reactions)} reactions: {states} states, {steps} steps")
    assert states > 100


# Locks that are not right


class LetsReadersOvertake(RWLock):
    """Readers come in beside readers, though a writer waits."""

    def _take(self, mode: str) -> bool:
        if mode == READ and not self._writing:
            self._readers += 1
            return True
        return super()._take(mode)


class LetsReadersInOneByOne(RWLock):
    def _grant(self, granted: list[Callable[[], None]]) -> None:
        rest = deque[tuple[str, Callable[[], None], float]]()
        if self._waiting and self._waiting[0][0] == READ:
            while len(self._waiting) > 1:
                rest.appendleft(self._waiting.pop())
        super()._grant(granted)
        self._waiting.extend(rest)


class ServesTheLastFirst(RWLock):
    def _grant(self, granted: list[Callable[[], None]]) -> None:
        self._waiting.reverse()
        super()._grant(granted)
        self._waiting.reverse()


class TellsTwice(RWLock):
    def _grant(self, granted: list[Callable[[], None]]) -> None:
        super()._grant(granted)
        granted.extend(granted[2:])


class ForgetsWhoIsBehindAWriter(RWLock):
    def _grant(self, granted: list[Callable[[], None]]) -> None:
        super()._grant(granted)
        if self._writing and len(self._waiting) == 2:
            self._waiting.pop()


class LetsAWriterInBesideReaders(RWLock):
    def _grant(self, granted: list[Callable[[], None]]) -> None:
        readers, self._readers = self._readers, max(0, self._readers - 1)
        before = self._readers
        super()._grant(granted)
        self._readers += readers - before


class LetsNobodyInBehindAReader(RWLock):
    """A reader that leaves while others stay takes no look at the queue; nor does the last."""

    def release(self, mode: str) -> None:
        waiting = self._waiting
        if mode == READ:
            self._waiting = deque()
        super().release(mode)
        self._waiting = waiting


@pytest.mark.parametrize(
    "wrong",
    [
        LetsReadersOvertake,
        LetsReadersInOneByOne,
        ServesTheLastFirst,
        TellsTwice,
        ForgetsWhoIsBehindAWriter,
        LetsAWriterInBesideReaders,
        LetsNobodyInBehindAReader,
    ],
)
def test_a_lock_that_is_not_right_is_found_out(wrong: type[RWLock]) -> None:
    """With four actors, none of whom does anything special."""
    with pytest.raises((AssertionError, KeyError)):
        explore(4, make_lock=wrong)
