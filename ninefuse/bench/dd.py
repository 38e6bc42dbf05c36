"""X parallel `dd if=/dev/zero of=... bs=4k count=N oflag=sync`: the headline workload."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ninefuse.bench import BenchError, Ended, Process, Processes
from ninefuse.bench.counters import Both, Meter

BLOCK = 4096  # bytes: dd's bs=4k

# How long a dd may take, in seconds: a share for each block and one for bad moments.
_SECONDS_A_BLOCK = 0.02
_SECONDS_MORE = 60.0

# A first look must take this many seconds to say something, the start of the processes included.
_LOOK_SECONDS = 0.12
_LOOK_COUNT = 16

# Names are never used twice: a mount may still believe in a file that was there a second ago.
_serial = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to write.

    name: for messages. directory: what dd writes to, perhaps on a mount. backing: the same
    directory as the source file system has it, where sizes are looked up; None if nowhere.
    server: whose CPU time is measured, if there is one. calls: whether system calls are counted,
    which makes a run slower.
    """

    name: str
    directory: Path
    backing: Path | None
    server: Process | None = None
    calls: bool = False

    def meter(self) -> Meter:
        """Return what measures a run here."""
        return Meter(self.name, self.server, self.calls)


@dataclass(frozen=True, slots=True)
class Result:
    """What one run took.

    clients: how many dd at a time. count: blocks that each wrote. seconds: from the start of
    the first until the end of the last. spent: by all dd together, and by the daemon.
    """

    clients: int
    count: int
    seconds: float
    spent: Both = Both()

    @property
    def rate(self) -> float:
        """Throughput of all clients together, in MB/s (10**6 bytes a second)."""
        return self.clients * self.count * BLOCK / self.seconds / 1e6


@dataclass(frozen=True, slots=True)
class Together:
    """How commands run at once ended; see together.

    seconds: until the last had ended. spent: by all of them, and by the server.
    """

    seconds: float
    spent: Both
    ended: tuple[Ended, ...]


def together(
    processes: Processes,
    place: Place,
    commands: Iterable[Sequence[str]],
    limit: float,
    where: str,
    failed: str,
) -> Together:
    """Run commands at once, on a place.

    Arguments: limit, seconds until all must have ended; where, failed, what an error says of
    which commands they were, and of one that fails.
    Raises BenchError when one fails or they do not end in time.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    running = []
    with place.meter() as meter:
        begin = time.perf_counter()
        try:
            for command in commands:
                process = processes.start(command, environment)
                running.append(process)  # at once: to be killed should the next one not start
            in_time = processes.wait(running, limit)
            seconds = time.perf_counter() - begin
        finally:
            if not all(process.ended for process in running):
                processes.kill(running)
        if not in_time:
            raise BenchError(f"{where}: did not end within {limit:g} s")
        ended = tuple(process.collect() for process in running)
        for one in ended:
            if one.returncode != 0:
                raise BenchError(f"{where}: {failed}: {one.complaint}")
        return Together(seconds, meter.read(ended), ended)


def run(
    processes: Processes,
    place: Place,
    clients: int,
    count: int,
    starts: Sequence[Sequence[str]] = ((),),
) -> Result:
    """Run that many dd at once, each writing count blocks to a new file, and remove the files.

    Argument: starts, the words before each client's dd, in turn.
    Raises BenchError when a dd fails or does not end in time, or a file has not the size it
    should have.
    """
    run_number = next(_serial)
    names = [f"dd-{run_number}-{client}" for client in range(1, clients + 1)]
    limit = _SECONDS_MORE + _SECONDS_A_BLOCK * clients * count
    where = f"{clients} dd on {place.name}"
    commands = [
        [*start, "dd", "if=/dev/zero", f"of={place.directory / name}"]
        + ["bs=4k", f"count={count}", "oflag=sync"]
        for name, start in zip(names, itertools.cycle(starts), strict=False)
    ]
    ran = together(processes, place, commands, limit, where, "one failed")
    for name in names:
        # Not asked of the mount: it might believe what it was told.
        size = (place.backing / name).stat().st_size if place.backing else count * BLOCK
        if size != count * BLOCK:
            raise BenchError(f"{where}: {name} has {size} bytes instead of {count * BLOCK}")
    # Removed where they were written, or the daemon would hold on to them and to their space.
    processes.run(["rm", "--", *(str(place.directory / name) for name in names)], limit)
    return Result(clients, count, ran.seconds, ran.spent)


def choose_count(
    processes: Processes, places: Sequence[Place], clients: int, seconds: float
) -> int:
    """Return the count with which a run in each of the places takes so many seconds in all.

    Every place is tried for a moment, which is also its warm-up: how much slower than the first
    (the source) the others are differs from machine to machine. The files take a quarter of
    the free space at most.
    """
    count = _LOOK_COUNT
    while (first := run(processes, places[0], clients, count)).seconds < _LOOK_SECONDS:
        count *= 2
    spent = first.seconds
    for place in places[1:]:
        # One that cannot do it says so when it is measured.
        with contextlib.suppress(BenchError):
            spent += run(processes, place, clients, count).seconds
    space = os.statvfs(places[0].directory)
    most = space.f_bavail * space.f_frsize // 4 // (clients * BLOCK)
    return max(1, min(_two_digits(count * seconds / spent), most))


def _two_digits(number: float) -> int:
    """Return the number with all but its first two digits zero: nobody reads more."""
    return int(float(f"{number:.1e}"))
