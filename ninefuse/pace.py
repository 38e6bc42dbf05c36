"""Which calls the dispatcher makes itself: those that are over before a worker would begin.

The second model runs a request on the dispatcher until it would block. Whether a call would
is known beforehand for some (`Call.quick`); of the others their past says it. Handing a
request over and back costs 50 to 150 microseconds, so a call that takes less is best made where
the request is, and one that takes somewhat more when nobody else is waiting: a lone client
would pay for the hand-over, and there is nobody whom it would serve.

A server that does not answer must never stop the dispatcher. So calls are made here only if
the source lies on a local file system, and nothing is mounted in it: a name may lead
anywhere. Nor are calls that others can keep waiting (`Call.may_be_here`). A local disk may
stall, too, or be frozen. Each call that waits for a millisecond or more while others are there
sends its kind to the workers, for 32 times as long as it took: of some calls that need the disk
and others that do not, the dispatcher meets so few that it loses three hundredths of its time. If
it took ten milliseconds, it is for a second at least, and twice as long if it happens again
soon.

Where clients take all CPUs, much of a call's time is time that the dispatcher was kept off
the CPU; it would be no less for a worker, and the hand-over is dearer than ever. So in a crowd
a call that took long is asked for what the kernel knows: whether the thread gave the CPU away,
and if not, how long it had it.

Locks touched: none. Workers add to the figures too; a sample lost between two threads does
not matter.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Hashable

from ninefuse.commands import Call
from ninefuse.qids import is_on_own_device

# Nanoseconds. Below these a call is made here, whoever else is waiting:
_SHORT = 40_000  # if the engine would make it otherwise
_SHORT_FOR_WORKER = 100_000  # if a worker would, who costs more to hand it to
_LONG = 1_500_000  # above it handing over costs next to nothing
_STALL = 1_000_000  # longer than others may be kept waiting
_BAD_STALL = 10_000_000
_LONG_STALL = 100_000_000  # longer than even a lone client's are to take here
_SAMPLES = 8  # calls on workers before a kind is tried here
_WEIGHT = 8  # the average is over about so many calls
_UNTRIED = -1
_SHARE = 32  # of the time, the one part that stalls may take
_FIRST_PENALTY = 1.0  # seconds, for a bad one
_LAST_PENALTY = 64.0
_FORGIVEN = 5  # times the penalty

# Requests that come alone before the dispatcher believes that they do.
_ALONE = 16


class _Kind:
    """What is known of the calls of one function."""

    __slots__ = ("average", "best", "here", "penalty", "samples", "until")

    def __init__(self) -> None:
        self.here = False  # whether `average` is from calls made here
        self.average = 0  # ns
        self.best = _LONG_STALL  # ns, of the last samples on workers
        self.samples = 0
        self.until = 0.0  # monotonic seconds: to the workers until then
        self.penalty = _FIRST_PENALTY

    def add(self, nanoseconds: int) -> None:
        """Add a call made here to the average."""
        if self.average == _UNTRIED:
            self.average = nanoseconds
        else:
            self.average += (nanoseconds - self.average) // _WEIGHT


class Pace:
    """Measures calls and decides where the next one is made. For one driver.

    Args:
        is_sole: whether the source lies on a local file system with nothing mounted in it,
            now. Asked before each request.

    Attributes:
        demotions: how often a kind of call was sent to the workers after a stall.
        longest_stall: seconds, the longest call made on the dispatcher.
    """

    def __init__(self, is_sole: Callable[[], bool]) -> None:
        self._is_sole = is_sole
        self._sole = False
        self._kinds: dict[Hashable, _Kind] = {}
        self._crowd = 0  # requests still to come alone
        # In a crowd, the dispatcher's figures when the call began.
        self._before: resource.struct_rusage | None = None
        self.demotions = 0
        self._longest = 0

    @property
    def longest_stall(self) -> float:
        return self._longest / 1e9

    def arrived(self, alone: bool) -> None:
        """A request has come; ``alone``: no other is under way."""
        self._sole = self._is_sole()
        if not alone:
            self._crowd = _ALONE
        elif self._crowd:
            self._crowd -= 1

    def is_local(self, call: Call) -> bool:
        """Whether a call that uses no name is on the source's own, local file system."""
        return self._sole and is_on_own_device(call.on)

    def is_here(self, call: Call, engine: bool = False) -> bool:
        """Whether the dispatcher is to make a call itself.

        Args:
            call: it.
            engine: whether the engine makes it otherwise, and not a worker.
        """
        if not (call.may_be_here and self.is_local(call)):
            return False
        kind = self._kind(call)
        if kind.here:
            if not self._crowd:
                return kind.average < _LONG
            return kind.average < (_SHORT if engine else _SHORT_FOR_WORKER)
        if kind.samples < _SAMPLES or time.monotonic() < kind.until:
            return False
        if kind.best >= _LONG:
            kind.samples, kind.best = 0, _LONG_STALL
            return False
        # Tried once, whoever waits: only here is it measured without the hand-over.
        kind.here, kind.average = True, _UNTRIED
        return True

    def begins(self) -> None:
        """The dispatcher is about to make a call."""
        self._before = _usage() if self._crowd else None

    def took_here(self, call: Call, nanoseconds: int, is_waited_for: Callable[[], bool]) -> None:
        """The dispatcher has made a call.

        Args:
            call: it.
            nanoseconds: how long it took.
            is_waited_for: whether there is another request now, which had to wait.
        """
        kind = self._kind(call)
        if nanoseconds <= _SHORT:
            kind.add(nanoseconds)
            return
        if nanoseconds > self._longest:
            self._longest = nanoseconds
        if self._before is not None:
            after = _usage()
            if after.ru_nvcsw == self._before.ru_nvcsw:
                nanoseconds = min(nanoseconds, _cpu_time(after) - _cpu_time(self._before))
        kind.add(nanoseconds)
        waiting = is_waited_for()
        if waiting:
            self._crowd = _ALONE
        if nanoseconds > (_STALL if waiting else _LONG_STALL):
            self._demote(kind, nanoseconds)

    def took_there(self, call: Call, nanoseconds: int) -> None:
        """A worker, or the engine, has made a call."""
        if not is_on_own_device(call.on):
            return  # which says nothing of those here
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

    def _demote(self, kind: _Kind, nanoseconds: int) -> None:
        now = time.monotonic()
        self.demotions += 1
        kind.here = False
        kind.samples, kind.best = 0, _LONG_STALL
        if nanoseconds <= _BAD_STALL:
            kind.until = max(kind.until, now + nanoseconds * _SHARE / 1e9)
            return
        # After a good time it is a first offence again.
        if now > kind.until + _FORGIVEN * kind.penalty:
            kind.penalty = _FIRST_PENALTY
        kind.until = now + max(kind.penalty, nanoseconds * _SHARE / 1e9)
        kind.penalty = min(2 * kind.penalty, _LAST_PENALTY)


def _usage() -> resource.struct_rusage:
    """What this thread has used, and how often it has waited for something (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_THREAD)


def _cpu_time(usage: resource.struct_rusage) -> int:
    """Nanoseconds on the CPU."""
    return int((usage.ru_utime + usage.ru_stime) * 1e9)
