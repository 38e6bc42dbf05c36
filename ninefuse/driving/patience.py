"""Bodies that go on after a while, to try again.

A file on which somebody holds a lease cannot be opened until he gives it back, for 45 seconds
at most (fcntl(2), F_SETLEASE); a lock of a file is held for as long as its holder likes. Whoever
wants either does not wait on a thread: he asks without waiting, again and again. Few are let go on
at a time for each user, in turn, so that one who has thousands of files to wait for keeps nobody
else from anything.

What waits has a `Ticket`. Three may end its wait: its time, something that it waits for besides,
and who withdraws it. Whoever of them takes the ticket has the waiting body; nobody else has.

Locks touched: a mutex of its own, for the queues only.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

from ninefuse.driving.clock import Clock

TICK = 0.05  # seconds
LONGEST = 0.25  # seconds between two tries; whose turn it is not waits longer
_AT_ONCE = 8  # of each user, in a tick; twice as many each time that some have succeeded


class State(Enum):
    """Where a ticket is."""

    NEW = "it does not wait yet"
    WAITS = "it waits"
    RUNG = "its wait was over before it began"
    TAKEN = "somebody goes on with what waited"


class Ticket:
    """One wait of one body.

    Args:
        resume: what goes on when the wait is over.
        user: in whose turn, a uid.
    """

    __slots__ = ("resume", "state", "user")

    def __init__(self, resume: Callable[[], None], user: int | None) -> None:
        self.resume = resume
        self.user = user
        self.state = State.NEW


class _Turns:
    """What waits in one user's turn."""

    __slots__ = ("at_once", "succeeded", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Ticket] = deque()
        self.at_once = _AT_ONCE
        self.succeeded = False  # since the last tick

    def due(self) -> list[Ticket]:
        """What goes on now; it is taken."""
        self.at_once = 2 * self.at_once if self.succeeded else _AT_ONCE
        self.succeeded = False
        due: list[Ticket] = []
        while self.waiting and len(due) < self.at_once:
            ticket = self.waiting.popleft()
            if ticket.state is State.WAITS:
                ticket.state = State.TAKEN
                due.append(ticket)
        return due


class Patience:
    """Resumes what waits, when its time has come and it is its turn.

    Args:
        clock: that tells when a tick is over.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._turns: dict[int | None, _Turns] = {}
        # What is due later than at the next tick: a heap, by time. Like the queues of users it
        # may have tickets in it that were taken.
        self._later: list[tuple[float, int, Ticket]] = []
        self._numbers = itertools.count()
        self._count = 0  # tickets that wait
        self._is_ticking = False

    def __len__(self) -> int:
        """How much waits."""
        return self._count

    def wait(self, resume: Callable[[], None], user: int | None) -> None:
        """Have ``resume`` called after a tick, on a thread that it may not keep. Any thread.

        Args:
            resume: what goes on.
            user: in whose turn, a uid.
        """
        self.queue(Ticket(resume, user), TICK)

    def queue(self, ticket: Ticket, pause: float) -> bool:
        """Have a new ticket wait. Any thread.

        Args:
            ticket: its `resume` is called once, on a thread that it may not keep, unless
                somebody takes it before.
            pause: seconds that it waits at least; what is no more than a tick is a tick.

        Returns:
            False if its wait was over before (`end`): it does not wait, and is not resumed.
        """
        with self._mutex:
            if ticket.state is not State.NEW:
                return False
            ticket.state = State.WAITS
            self._count += 1
            if pause > TICK:
                due = time.monotonic() + pause
                heapq.heappush(self._later, (due, next(self._numbers), ticket))
            else:
                self._turns.setdefault(ticket.user, _Turns()).waiting.append(ticket)
            ticks, self._is_ticking = self._is_ticking, True
        if not ticks and not self._clock.call_later(TICK, self._tick):
            self._is_ticking = False  # no thread was to be had: the next that waits tries again
        return True

    def take(self, ticket: Ticket) -> bool:
        """Take what waits out of its wait. Any thread.

        Returns:
            Whether it waited: then it is the caller's to go on with, and nobody else resumes it.
        """
        with self._mutex:
            if ticket.state is not State.WAITS:
                return False
            ticket.state = State.TAKEN
            self._count -= 1
            return True

    def end(self, ticket: Ticket) -> None:
        """Resume what waits now; what does not wait yet need not begin to. Any thread."""
        with self._mutex:
            waits = ticket.state is State.WAITS
            if waits:
                ticket.state = State.TAKEN
                self._count -= 1
            elif ticket.state is State.NEW:
                ticket.state = State.RUNG
        if waits:
            ticket.resume()

    def ended(self, user: int | None) -> None:
        """Note that something that has waited need not come again. Any thread."""
        with self._mutex:
            turns = self._turns.get(user)
            if turns is not None:
                turns.succeeded = True

    def close(self) -> None:
        """Have all that waits now go on at once."""
        goes_on = True
        while goes_on:
            goes_on = self._let_go(at_once=True)

    def _tick(self) -> None:
        if self._let_go() and not self._clock.call_later(TICK, self._tick):
            self._is_ticking = False

    def _let_go(self, *, at_once: bool = False) -> bool:
        """Resume those whose turn it is.

        Args:
            at_once: whether the time of all has come.

        Returns:
            False if there were none and nothing waits: the ticking has ended.
        """
        with self._mutex:
            now = time.monotonic()
            while self._later and (at_once or self._later[0][0] <= now):
                ticket = heapq.heappop(self._later)[2]
                if ticket.state is State.WAITS:
                    self._turns.setdefault(ticket.user, _Turns()).waiting.append(ticket)
            due = [ticket for turns in self._turns.values() for ticket in turns.due()]
            self._turns = {user: turns for user, turns in self._turns.items() if turns.waiting}
            self._count -= len(due)
            goes_on = bool(due) or self._count > 0
            if not goes_on:
                self._is_ticking = False
        for ticket in due:
            ticket.resume()
        return goes_on
