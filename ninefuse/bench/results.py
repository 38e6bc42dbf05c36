"""What was measured: every run, the statistics of each cell, and results.json."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ninefuse.bench.rows import Missing, Row

# Of results.json: raised when what it holds is renamed or gets another meaning.
FORMAT = 1


@dataclass(slots=True)
class Cell:
    """One workload at one number of clients: a line of the tables, a run of each row a round.

    workload: its key. rounds: how many are planned. one: what counts are told for. command: as
    the first row ran it. The rest as in workloads.Workload.
    """

    workload: str
    clients: int
    title: str
    unit: str
    tool: str
    amount: int
    more_is_better: bool
    note: str
    rounds: int
    command: str = ""
    one: str = "operation"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one cell on one row.

    value: in the cell's unit. seconds: real time. client_…, daemon_…: CPU seconds, user and
    system; context switches, voluntary and forced; system calls, None where they were not counted.
    operations: how many blocks, names or other things were done. error: why there are no figures,
    in which case they are None. unsupported: whether the row cannot do it, and did not try.
    """

    workload: str
    clients: int
    row: str
    round: int
    value: float | None = None
    unit: str = ""
    seconds: float | None = None
    client_user: float | None = None
    client_system: float | None = None
    daemon_user: float | None = None
    daemon_system: float | None = None
    operations: int | None = None
    client_voluntary: int | None = None
    client_forced: int | None = None
    client_calls: int | None = None
    daemon_voluntary: int | None = None
    daemon_forced: int | None = None
    daemon_calls: int | None = None
    error: str = ""
    unsupported: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """The median, the least and the greatest of some runs."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figures:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Results:
    """All of one benchmark.

    machine, versions, options: what the figures depend on, by name. rows: as measured. missing:
    rows that are not. cells: in the tables' order. runs: as they were made. counted: further
    runs, in which system calls were counted; their times are those of a slower machine.
    not_counted: why there are none, "" if there are. dead: what became of a row's server, by the
    row's name. complete: whether all planned runs were made.
    """

    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    counted: list[Run] = field(default_factory=list)
    not_counted: str = ""
    dead: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    seconds: float = 0.0

    def of(self, cell: Cell, row: str) -> list[Run]:
        """Return the runs of a cell on the row of that name, those that failed too."""
        key = (cell.workload, cell.clients, row)
        return [run for run in self.runs if (run.workload, run.clients, run.row) == key]

    def figures(self, cell: Cell, row: str, field: str = "value") -> Figures | None:
        """Return the statistics of a field of the runs, None without one that succeeded."""
        values = [getattr(run, field) for run in self.of(cell, row) if run.value is not None]
        return Figures.of(values) if values else None

    def each(self, cell: Cell, row: str, field: str) -> float | None:
        """Return the median of a count for each operation, None without one.

        Argument: field, of Run; calls are those of the counted runs.
        """
        runs = self.counted if field.endswith("_calls") else self.runs
        counts = [
            getattr(run, field) / run.operations
            for run in runs
            if self._is_of(run, cell)
            and run.row == row
            and run.operations
            and getattr(run, field) is not None
        ]
        return statistics.median(counts) if counts else None

    def rounds(self, cell: Cell) -> str:
        """Return how many rounds there were, in words: fewer than planned if interrupted."""
        begun = {run.round for run in self.runs if self._is_of(run, cell)}
        text = f"{len(begun)} round{'s' if len(begun) != 1 else ''}"
        return text if len(begun) >= cell.rounds else f"{text} of {cell.rounds}"

    def _is_of(self, run: Run, cell: Cell) -> bool:
        return (run.workload, run.clients) == (cell.workload, cell.clients)

    def error(self, cell: Cell, row: str) -> str:
        """Return the first error among the runs, "" without one."""
        runs = self.of(cell, row)
        return next((run.error for run in runs if run.error and not run.unsupported), "")

    def ratio(self, cell: Cell, row: str, other: str) -> float | None:
        """Return how many times better the row's median is than the other's; more is better."""
        mine, theirs = self.figures(cell, row), self.figures(cell, other)
        if mine is None or theirs is None or not mine.median or not theirs.median:
            return None
        ratio = mine.median / theirs.median
        return ratio if cell.more_is_better else 1 / ratio

    def best_peer(self, cell: Cell) -> str | None:
        """Return the name of the peer with the best median, None without any; not the floor."""
        found = {
            row.name: figures.median
            for row in self.rows
            if row.kind == "peer" and (figures := self.figures(cell, row.name)) is not None
        }
        if not found:
            return None
        choose = max if cell.more_is_better else min
        return choose(found, key=lambda name: found[name])

    def names(self, *kinds: str) -> list[str]:
        """Return the names of the rows of these kinds, of all if none is given."""
        return [row.name for row in self.rows if not kinds or row.kind in kinds]

    def cells_of(self, workload: str) -> list[Cell]:
        """Return the cells of that workload, by ascending number of clients."""
        return sorted(
            (cell for cell in self.cells if cell.workload == workload),
            key=lambda cell: cell.clients,
        )

    def as_json(self) -> dict[str, Any]:
        """Return what results.json holds."""
        return {
            "format": FORMAT,
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "machine": self.machine,
            "versions": self.versions,
            "options": self.options,
            "rows": [{**asdict(row), "dead": self.dead.get(row.name, "")} for row in self.rows],
            "missing": [asdict(row) for row in self.missing],
            "workloads": [asdict(cell) for cell in self.cells],
            "runs": [asdict(run) for run in self.runs],
            "counted": [asdict(run) for run in self.counted],
            "not_counted": self.not_counted,
        }

    def save(self, directory: Path) -> None:
        """Write results.json, in one step: whoever reads it finds an old or a new one.

        Raises OSError.
        """
        write_file(directory / "results.json", json.dumps(self.as_json(), indent=1) + "\n")


def write_file(path: Path, text: str) -> None:
    """Write a file in one step. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
