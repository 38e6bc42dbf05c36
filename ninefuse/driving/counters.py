"""What is counted of requests, for each callback: how many, how long, on how many threads.

Locks touched: none. Whoever adds has the driver's mutex for it; other threads may read at any
time, and see figures of which the last request may be missing.
"""

from __future__ import annotations

from math import log2

# The extended attribute of a mount's root in which the counters are published.
ATTRIBUTE = "user.ninefuse.stats"

_AN_OCTAVE = 4  # buckets; the bounds of one are 19 % apart


class Latencies:
    """A histogram of durations, whose buckets get wider as these get longer."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = [0] * (64 * _AN_OCTAVE)

    def add(self, nanoseconds: int) -> None:
        """Count one duration, of less than 2**64 nanoseconds."""
        self._counts[int(_AN_OCTAVE * log2(nanoseconds or 1))] += 1

    def buckets(self) -> dict[str, int]:
        """How many durations each bucket has, by its upper bound in microseconds (as text).

        Empty buckets are left out; the bounds rise.
        """
        return {
            f"{2 ** ((index + 1) / _AN_OCTAVE) / 1000:.5g}": count
            for index, count in enumerate(self._counts)
            if count
        }


class Answered:
    """The requests of one callback that have been answered, with a result or an error.

    Attributes:
        count: how many.
        on_dispatcher: how many of them never left the dispatcher.
        crossings: how often they changed threads, all together.
        latencies: from their arrival in the dispatcher to where their bodies ended. Where a plain
            call was answered before, that may be some 10 ms later.
    """

    __slots__ = ("count", "crossings", "latencies", "on_dispatcher")

    def __init__(self) -> None:
        self.count = 0
        self.on_dispatcher = 0
        self.crossings = 0
        self.latencies = Latencies()

    def add(self, crossings: int, nanoseconds: int) -> None:
        """Count one request."""
        self.count += 1
        if crossings:
            self.crossings += crossings
        else:
            self.on_dispatcher += 1
        self.latencies.add(nanoseconds)
