"""The rounds: in each, every cell is run once on every row, one row after the other.

What else the machine does so hits all rows alike. A run that fails is recorded as failed, a
server that has died as dead, and the rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from ninefuse.bench import BenchError, Interrupted, Processes, dd
from ninefuse.bench.catalogue import HEADLINE
from ninefuse.bench.common import Progress
from ninefuse.bench.mounted import Limits, Mounted
from ninefuse.bench.results import Cell, Results, Run
from ninefuse.bench.rows import Row, Site
from ninefuse.bench.users import Unsupported
from ninefuse.bench.workloads import Measured, Workload

_ALIVE_SECONDS = 5.0  # how long a server may take to answer after a run that failed
_LIMITS = Limits(start=20.0, unmount=10.0, end=5.0)
COUNTED = 0  # the number of the round in which system calls are counted
_UNCHOSEN = 100  # blocks for the headline, when nothing can be found out


class Served:
    """A row while it is measured: its server runs, and its place is mounted.

    A context manager; on entering it raises BenchError when the mount does not come about.
    dead: what became of the server, "" while it serves.
    """

    def __init__(self, site: Site, row: Row) -> None:
        self.row = row
        self.dead = ""
        self._site = site
        self._mounted: Mounted | None = None
        if row.command:
            mountpoint = site.mountpoint(row.name)
            self._mounted = Mounted(site.processes, row.name, row.command, mountpoint, _LIMITS)

    def __enter__(self) -> Served:
        if self._mounted is not None:
            self._mounted.mountpoint.mkdir()
            self._mounted.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._mounted is None:
            return
        try:
            self._mounted.__exit__(kind, error, traceback)
        except BenchError as problem:
            # The figures stand; how it ended is told with them.
            self.dead = self.dead or f"at its end: {problem}"

    @property
    def place(self) -> dd.Place:
        """Where to work."""
        source = self._site.source
        if self._mounted is None:
            return dd.Place(self.row.name, source, source)
        backing = None if self.row.kind == "floor" else source
        mounted = self._mounted
        return dd.Place(self.row.name, mounted.mountpoint, backing, mounted.server)

    def examine(self, processes: Processes) -> None:
        """Find out whether the server still serves; end one that does not. Sets dead."""
        if self._mounted is None:
            return
        server = self._mounted.server
        if processes.wait([server], 0.0):
            self.dead = f"the server ended: {server.collect().complaint}"
            return
        # A name never asked for before: to what it knows, the kernel has the answer.
        name = f"{self._mounted.mountpoint}/alive-{time.monotonic_ns()}"
        try:
            processes.run(["stat", "--", name], _ALIVE_SECONDS, check=False)
        except BenchError as error:
            self.dead = f"the server does not answer: {error}"
            processes.kill([server])


@dataclass(frozen=True, slots=True)
class Task:
    """A cell with the workload that fills it.

    weight: about how many seconds a run takes. rows: the names of those that it is run on, None
    for all.
    """

    cell: Cell
    workload: Workload
    weight: float = 1.0
    rows: frozenset[str] | None = None

    def on(self, rows: Sequence[Served]) -> list[Served]:
        """Return those of the rows that it is run on."""
        return [one for one in rows if self.rows is None or one.row.name in self.rows]


def task(
    workload: Workload,
    clients: int,
    rounds: int,
    weight: float = 1.0,
    rows: frozenset[str] | None = None,
) -> Task:
    """Return the task of a workload at a number of clients."""
    cell = Cell(
        workload.key,
        clients,
        workload.title,
        workload.unit,
        workload.tool,
        workload.amount,
        workload.more_is_better,
        workload.note,
        rounds,
        one=workload.one,
    )
    return Task(cell, workload, weight, rows)


def steps(tasks: Sequence[Task]) -> list[tuple[int, int]]:
    """Return the order: pairs of a round, from 1, and the position of a task."""
    rounds = max((one.cell.rounds for one in tasks), default=0)
    return [
        (number, position)
        for number in range(1, rounds + 1)
        for position, one in enumerate(tasks)
        if one.cell.rounds >= number
    ]


class TimeLeft:
    """How far the benchmark is. all_weight: of all runs together."""

    def __init__(self, all_weight: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._all = all_weight
        self._done = 0.0
        self._clock = clock
        self._begin = clock()

    def done(self, weight: float) -> None:
        self._done += weight

    def __str__(self) -> str:
        part = min(1.0, self._done / self._all) if self._all else 1.0
        filled = int(20 * part)
        bar = f"[{'#' * filled}{'.' * (20 - filled)}] {part:4.0%}"
        if not self._done:
            return bar
        left = (self._clock() - self._begin) / self._done * (self._all - self._done)
        return f"{bar} {int(left) // 60}:{int(left) % 60:02d} left"


def measure(
    processes: Processes,
    rows: Sequence[Served],
    tasks: Sequence[Task],
    headline_seconds: float,
    results: Results,
    progress: Progress,
    save: Callable[[], None],
    calls: bool = False,
) -> None:
    """Run all tasks on all rows, as often as their cells say, and note each run in results.

    Arguments: headline_seconds, what a run of the headline is to take on average over the rows.
    save, called after each cell. calls, whether a last round of all counts system calls. Raises
    Interrupted; all runs that ended are in results then.
    """
    tasks = list(tasks)
    results.cells = [one.cell for one in tasks]
    order = steps(tasks)
    if calls:
        order += [(COUNTED, position) for position in range(len(tasks))]
    left = TimeLeft(sum(tasks[at].weight * len(tasks[at].on(rows)) for _, at in order))
    for number, position in order:
        one = tasks[position]
        if one.cell.workload == HEADLINE and one.cell.amount <= 1:
            progress(f"{left}  choosing a count")
            count = _choose_count(processes, rows, one.cell.clients, headline_seconds)
            one.cell.amount = count
            tasks[position] = one = replace(one, workload=replace(one.workload, amount=count))
        for served in one.on(rows):
            progress(f"{left}  {one.cell.title} x{one.cell.clients}: {served.row.name}")
            runs = results.counted if number == COUNTED else results.runs
            runs.append(run_once(processes, served, one, number))
            if served.dead:
                results.dead[served.row.name] = served.dead
            left.done(one.weight)
        save()


def _choose_count(
    processes: Processes, rows: Sequence[Served], clients: int, seconds: float
) -> int:
    alive = [served.place for served in rows if not served.dead]
    try:
        return dd.choose_count(processes, alive, clients, seconds * len(alive))
    except (BenchError, IndexError):
        return _UNCHOSEN  # it fails once more when it is measured, and is noted there


def run_once(processes: Processes, served: Served, one: Task, number: int) -> Run:
    """Run a task on a row, in the round of that number; failures are in what it returns."""
    cell = one.cell
    blank = Run(cell.workload, cell.clients, served.row.name, number)
    if served.dead:
        return replace(blank, error=served.dead)
    try:
        place = replace(served.place, calls=number == COUNTED)
        measured = one.workload.run(processes, place, cell.clients)
    except Unsupported as reason:
        return replace(blank, error=str(reason), unsupported=True)
    except Interrupted:
        raise
    except (BenchError, OSError, ValueError) as error:
        served.examine(processes)
        return replace(blank, error=served.dead or str(error))
    cell.command = cell.command or measured.command
    return _filled(blank, measured, cell.unit)


def _filled(blank: Run, measured: Measured, unit: str) -> Run:
    clients, server = measured.spent.clients, measured.spent.server
    return replace(
        blank,
        value=measured.value,
        unit=unit,
        seconds=measured.seconds,
        client_user=clients.user,
        client_system=clients.system,
        daemon_user=server.user,
        daemon_system=server.system,
        operations=measured.operations,
        client_voluntary=clients.voluntary,
        client_forced=clients.forced,
        client_calls=clients.calls,
        daemon_voluntary=server.voluntary,
        daemon_forced=server.forced,
        daemon_calls=server.calls,
    )
