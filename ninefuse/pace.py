"""Which calls the dispatcher makes itself: those that are over before a worker would begin.

The second model runs a request on the dispatcher until it would block. Whether a call would
is known beforehand for some (`Call.quick`); of the others their past says it. Handing a
request over and back costs some 50 microseconds, so a call that takes less is best made where
the request is, and one that takes somewhat more when nobody else is waiting: a lone client
would pay for the hand-over, and there is nobody whom it would serve.

Only calls on the source's own device are ever made here, and only if that is a local file
system: a server that does not answer must not stop the dispatcher. A local disk may stall,
too. The first call that takes long sends its kind to the workers, for a second, and twice as
long each time it happens again: one stall for each demotion.

Locks touched: none. Workers add to the figures too; a sample lost between two threads does
not matter.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

from ninefuse.commands import Call

_SHORT = 40_000  # ns; below it a call is made here, whoever else is waiting
_LONG = 1_500_000  # ns; above it handing over costs next to nothing
_STALL = 10_000_000  # ns; a call that takes longer stops the others noticeably
_SAMPLES = 8  # calls on workers before a kind is tried here
_WEIGHT = 8  # the average is over about so many calls
_FIRST_PENALTY = 1.0  # seconds
_LAST_PENALTY = 64.0

# Requests that come alone before the dispatcher believes that they do.
_ALONE = 16


class _Kind:
    """What is known of the calls of one function."""

    __slots__ = ("average", "best", "here", "penalty", "samples", "until")

    def __init__(self) -> None:
        self.here = False  # whether `average` is from calls made here
        self.average = 0  # ns
        self.best = _STALL  # ns, of the last samples on workers
        self.samples = 0
        self.until = 0.0  # monotonic seconds: to the workers until then
        self.penalty = _FIRST_PENALTY


class Pace:
    """Measures calls and decides where the next one is made. For one driver.

    Attributes:
        demotions: how often a kind of call was sent to the workers after a stall.
        longest_stall: seconds, the longest call made on the dispatcher.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._crowd = 0  # requests still to come alone
        self.demotions = 0
        self._longest = 0

    @property
    def longest_stall(self) -> float:
        return self._longest / 1e9

    def came_alone(self) -> None:
        """A request has come while no other was under way."""
        if self._crowd:
            self._crowd -= 1

    def crowded(self) -> None:
        """A request had to wait for another, or met it under way."""
        self._crowd = _ALONE

    def is_here(self, call: Call) -> bool:
        """Whether the dispatcher is to make a call itself."""
        if call.on is None or call.on >> 48:
            return False  # of another device, or of an unknown one
        kind = self._kind(call)
        if kind.here:
            return kind.average < (_LONG if not self._crowd else _SHORT)
        if kind.samples < _SAMPLES or time.monotonic() < kind.until:
            return False
        if kind.best >= (_LONG if not self._crowd else _SHORT):
            kind.samples, kind.best = 0, _STALL
            return False
        kind.here, kind.average = True, kind.best
        return True

    def took_here(self, call: Call, nanoseconds: int) -> bool:
        """The dispatcher has made a call; whether another request may mind."""
        kind = self._kind(call)
        kind.average += (nanoseconds - kind.average) // _WEIGHT
        if nanoseconds > self._longest:
            self._longest = nanoseconds
        if nanoseconds > _STALL:
            self._demote(kind)
        return nanoseconds > _SHORT

    def took_there(self, call: Call, nanoseconds: int) -> None:
        """A worker has made a call."""
        kind = self._kind(call)
        if kind.here:
            # Here it would be slower than that only for the interpreter's lock, which
            # a worker waits for as well.
            if nanoseconds < kind.average:
                kind.average += (nanoseconds - kind.average) // _WEIGHT
            return
        kind.samples += 1
        if nanoseconds < kind.best:
            kind.best = nanoseconds

    def _kind(self, call: Call) -> _Kind:
        kind = self._kinds.get(call.kind)
        if kind is None:
            # One for a method, whatever it is bound to.
            function = getattr(call.kind, "__func__", call.kind)
            kind = self._kinds.setdefault(function, _Kind())
        return kind

    def _demote(self, kind: _Kind) -> None:
        now = time.monotonic()
        # After a long good time it is a first offence again.
        if now > kind.until + 2 * _LAST_PENALTY:
            kind.penalty = _FIRST_PENALTY
        self.demotions += 1
        kind.here = False
        kind.samples, kind.best = 0, _STALL
        kind.until = now + kind.penalty
        kind.penalty = min(2 * kind.penalty, _LAST_PENALTY)
