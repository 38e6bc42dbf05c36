"""The tables, as text for a terminal and as Markdown, and the lines that say what they mean."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ninefuse.bench.catalogue import HEADLINE
from ninefuse.bench.results import Cell, Figures, Results, write_file
from ninefuse.bench.rows import PLAIN_SECOND, SOURCE

WIDTH = 100

# The table of the patch series of 2010: kB/s of all clients together, by model and by X.
SEED = {
    "none": {1: 226, 2: 353, 3: 373, 5: 235, 10: 268},
    "first": {1: 218, 2: 336, 3: 474, 5: 624, 10: 914},
    "second": {1: 177, 2: 432, 3: 430, 5: 611, 10: 940},
}


@dataclass(frozen=True)
class Table:
    """One table. title; notes, lines below it; heads and lines, cells of text; labels: how many
    columns, from the first, say what a line is, and are repeated when the table is split.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    labels: int = 1

    def text(self) -> list[str]:
        """Return the lines for a terminal, split by columns where they would be too wide."""
        grid = [list(self.heads), *map(list, self.lines)]
        widths = [max(_width(line[at]) for line in grid) for at in range(len(self.heads))]
        out = [self.title]
        for columns in self._parts(widths):
            out.append("")
            for line in grid:
                words = [_padded(line[at], widths[at], at < self.labels) for at in columns]
                out.append("  ".join(words).rstrip())
        notes = [line for note in self.notes for line in textwrap.wrap(note, WIDTH)]
        return [*out, *(["", *notes] if notes else [])]

    def _parts(self, widths: Sequence[int]) -> list[list[int]]:
        """Return the columns of each part: the labels and as many others as fit."""
        labels = list(range(self.labels))
        parts = [list(labels)]
        for column in range(self.labels, len(widths)):
            needed = sum(widths[at] + 2 for at in (*parts[-1], column)) - 2
            if needed > WIDTH and len(parts[-1]) > self.labels:
                parts.append(list(labels))
            parts[-1].append(column)
        return parts

    def markdown(self) -> list[str]:
        """Return the lines as Markdown."""
        marks = ["---" if at < self.labels else "---:" for at in range(len(self.heads))]
        grid = (self.heads, marks, *self.lines)
        rows = [
            "| " + " | ".join(word.replace("|", "\\|") for word in line) + " |" for line in grid
        ]
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return [f"### {self.title}", "", *rows, *notes]


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _padded(text: str, width: int, left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text


def figure(value: float) -> str:
    """Return the number with three digits in at most six columns, such as 12.3k."""
    for limit, unit in ((999_500, "M"), (999.5, "k")):
        if value >= limit:
            return f"{_three_digits(value / (1e6 if unit == 'M' else 1e3))}{unit}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    if value >= 0.0995:
        return f"{value:.2f}"
    return f"{value:.3f}" if value >= 0.00995 or not value else f"{value:.4f}"


# A cell of a table, in words.


def _state(results: Results, cell: Cell, row: str) -> str:
    """Return what stands where there is no figure."""
    runs = results.of(cell, row)
    if not runs:
        return "-"
    return "n/a" if all(run.unsupported for run in runs) else "failed"


def _shown(
    results: Results, cell: Cell, row: str, field: str, show: Callable[[Figures], str]
) -> str:
    figures = results.figures(cell, row, field)
    if figures is None:
        return _state(results, cell, row)
    return show(figures) + ("*" if results.error(cell, row) else "")


def _median(figures: Figures) -> str:
    return figure(figures.median)


def _spread(figures: Figures) -> str:
    if figures.least == figures.most:
        return figure(figures.median)
    return f"{figure(figures.median)} ({figure(figures.least)}-{figure(figures.most)})"


def _ratio(results: Results, cell: Cell, row: str, other: str | None) -> str:
    ratio = None if other is None else results.ratio(cell, row, other)
    return "-" if ratio is None else figure(ratio)


# The headline.


def _headline(results: Results) -> list[Cell]:
    return [cell for cell in results.cells_of(HEADLINE) if _begun(results, cell)]


def _begun(results: Results, cell: Cell) -> bool:
    """Return whether the cell had any run: after Ctrl-C not all had."""
    return any(results.of(cell, name) for name in results.names())


def headline(results: Results) -> list[Table]:
    """Return the tables of the synchronous writes: a line for each row, a column for each X."""
    cells = _headline(results)
    if not cells:
        return []
    names = results.names()
    heads = ["", *(f"X={cell.clients}" for cell in cells)]

    def table(title: str, show: Callable[[Cell, str], str], *notes: str) -> Table:
        lines = [[name, *(show(cell, name) for cell in cells)] for name in names]
        return Table(title, heads, lines, notes)

    def system(cell: Cell, row: str) -> str:
        if row == SOURCE:
            return _shown(results, cell, row, "client_system", _median)
        daemon = _shown(results, cell, row, "daemon_system", _median)
        return f"{daemon} + {_shown(results, cell, row, 'client_system', _median)}"

    counts = ", ".join(f"{cell.amount} at X={cell.clients}" for cell in cells)
    best = ", ".join(f"{results.best_peer(cell) or '-'} at X={cell.clients}" for cell in cells)
    what = "X parallel dd bs=4k oflag=sync"
    return [
        table(
            f"{what}: throughput of all together, MB/s",
            lambda cell, row: _shown(results, cell, row, "value", _spread),
            f"Median (least-greatest) of {results.rounds(cells[0])}; blocks of each dd: {counts}.",
        ),
        table(
            f"{what}: throughput as a ratio to the source / to the best peer",
            lambda cell, row: (
                f"{_ratio(results, cell, row, SOURCE)} / "
                f"{_ratio(results, cell, row, results.best_peer(cell))}"
            ),
            f"Best peer: {best}.",
        ),
        table(
            f"{what}: real time, s",
            lambda cell, row: _shown(results, cell, row, "seconds", _median),
        ),
        table(
            f"{what}: system time, s, of the daemon + of all dd",
            system,
            "The daemon's is counted in clock ticks (10 ms as a rule).",
        ),
    ]


def seed(results: Results) -> list[Table]:
    """Return the table of the models' ratios, beside those of 2010."""
    cells = _headline(results)
    second = PLAIN_SECOND if PLAIN_SECOND in results.names() else "second"
    pairs = [("first", "none"), (second, "none"), (second, "first")]
    if not cells or not {"none", "first", second} <= set(results.names()):
        return []

    def both(cell: Cell, over: str, under: str) -> str:
        old = _seed(over).get(cell.clients), _seed(under).get(cell.clients)
        theirs = f"{old[0] / old[1]:.2f}" if old[0] and old[1] else "-"
        return f"{_ratio(results, cell, over, under)} ({theirs})"

    lines = [[f"{a} / {b}", *(both(cell, a, b) for cell in cells)] for a, b in pairs]
    heads = ["", *(f"X={cell.clients}" for cell in cells)]
    title = "Ratios between the models' throughputs: here (and in the table of 2010)"
    kilobytes = [f"{name} {'/'.join(str(kb) for kb in row.values())}" for name, row in SEED.items()]
    note = f"2010, QEMU, kB/s at X = 1/2/3/5/10: {', '.join(kilobytes)}."
    return [Table(title, heads, lines, [note])]


def _seed(name: str) -> dict[int, int]:
    """Return what the table of 2010 has of a row, by X."""
    return SEED.get("second" if name == PLAIN_SECOND else name, {})


def scaling(results: Results) -> list[str]:
    """Return what X clients bring under each model, and how the two models compare."""
    cells = _headline(results)
    if not cells:
        return []
    lines = []
    one, most = cells[0], cells[-1]
    for name in results.names("source", "ninefuse") if one is not most else ():
        first, last = results.figures(one, name), results.figures(most, name)
        if first is None or last is None:
            continue
        line = f"{name}(X={most.clients}) / {name}(X={one.clients}): "
        line += f"{last.median / first.median:.2f}"
        old = _seed(name)
        if one.clients in old and most.clients in old:
            line += f"  (2010: {old[most.clients] / old[one.clients]:.2f})"
        lines.append(line)
    for second in (PLAIN_SECOND, "second"):
        ratios = [
            f"{ratio:.2f} at X={cell.clients}"
            for cell in cells
            if (ratio := results.ratio(cell, "first", second)) is not None
        ]
        if ratios:
            lines.append(f"first / {second}: {', '.join(ratios)}")
    return lines


# The other workloads.


def _others(results: Results) -> list[Cell]:
    cells = [cell for cell in results.cells if cell.workload != HEADLINE]
    return [cell for cell in cells if _begun(results, cell)]


def others(results: Results) -> list[Table]:
    """Return the tables of the other workloads: a line for each cell, a column for each row."""
    cells = _others(results)
    if not cells:
        return []
    names = results.names()

    def label(cell: Cell) -> str:
        return f"{cell.title} x{cell.clients}"

    medians = Table(
        "Other workloads, medians: MB/s, operations a second, or seconds",
        ["x: clients", "", *names],
        [
            [
                label(cell),
                cell.unit,
                *(_shown(results, cell, row, "value", _median) for row in names),
            ]
            for cell in cells
        ],
        _tools(cells),
        labels=2,
    )
    others = [name for name in names if name != SOURCE]
    ratios = Table(
        "Other workloads: ratio to the source (more is better, also where seconds were measured)",
        ["x: clients", *others],
        [[label(cell), *(_ratio(results, cell, row, SOURCE) for row in others)] for cell in cells],
    )
    models = results.names("ninefuse")
    peers = Table(
        "Other workloads: the models as a ratio to the best peer",
        ["x: clients", *models, "best peer"],
        [
            [
                label(cell),
                *(_ratio(results, cell, row, results.best_peer(cell)) for row in models),
                results.best_peer(cell) or "-",
            ]
            for cell in cells
        ],
    )
    return [
        medians,
        *([ratios] if SOURCE in names and others else []),
        *([peers] if models and results.names("peer") else []),
    ]


# Counts.


def _counts(results: Results, cell: Cell, row: str, what: str) -> str:
    """Return the daemon's count for each operation, and the clients'."""
    daemon, clients = (results.each(cell, row, f"{who}_{what}") for who in ("daemon", "client"))
    shown = "-" if clients is None else figure(clients)
    return shown if row == SOURCE or daemon is None else f"{figure(daemon)} + {shown}"


def counts(results: Results) -> list[Table]:
    """Return what was counted for each operation: a line for each cell, a column for each row."""
    cells = [cell for cell in results.cells if _begun(results, cell)]
    names = results.names()

    def table(what: str, field: str, note: str) -> Table:
        lines = [
            [
                f"{cell.title} x{cell.clients}",
                cell.one,
                *(_counts(results, cell, row, field) for row in names),
            ]
            for cell in cells
        ]
        title = f"{what} for each operation, the daemon's + the clients'"
        return Table(title, ["x: clients", "for each", *names], lines, [note], labels=2)

    found = []
    if any(run.operations for run in results.runs):
        note = "By waiting, in the timed rounds; forced ones are in tables.txt."
        found.append(table("Context switches", "voluntary", note))
    if any(run.operations for run in results.counted):
        note = "In a round of its own; with what dd, fio and others take to start and to end."
        found.append(table("System calls", "calls", note))
    return found


def details(results: Results) -> list[Table]:
    """Return a table for each cell, with all that was measured: a line for each row."""
    return [_detail(results, cell) for cell in results.cells if _begun(results, cell)]


def _detail(results: Results, cell: Cell) -> Table:
    peer = results.best_peer(cell)
    heads = ["", "median", "least", "most", "/ source", "/ best peer", "real s"]
    heads += ["daemon sys", "daemon user", "client sys", "client user"]
    heads += [f"{count} / {cell.one}" for count in ("waits", "forced", "calls")]
    fields = ("seconds", "daemon_system", "daemon_user", "client_system", "client_user")
    lines = [
        [
            row,
            _shown(results, cell, row, "value", _median),
            _shown(results, cell, row, "value", lambda figures: figure(figures.least)),
            _shown(results, cell, row, "value", lambda figures: figure(figures.most)),
            _ratio(results, cell, row, SOURCE),
            _ratio(results, cell, row, peer),
            *(_shown(results, cell, row, field, _median) for field in fields),
            *(_counts(results, cell, row, what) for what in ("voluntary", "forced", "calls")),
        ]
        for row in results.names()
    ]
    notes = [f"{cell.command or cell.tool}  (amount {cell.amount}, {results.rounds(cell)})"]
    notes += [cell.note] if cell.note else []
    return Table(f"{cell.title}, {cell.clients} at once, {cell.unit}", heads, lines, notes)


# What is said beside the tables.


def _tools(cells: Sequence[Cell]) -> list[str]:
    """Return which program did what, a line each; not where the title names it."""
    titles: dict[str, list[str]] = {}
    for cell in cells:
        known = titles.setdefault(cell.tool, [])
        if cell.tool not in cell.title and cell.title not in known:
            known.append(cell.title)
    return [f"By {tool}: {'; '.join(known)}." for tool, known in titles.items() if known]


def remarks(results: Results) -> list[str]:
    """Return what the tables leave out: rows missing or dead, and runs that failed."""
    lines = []
    if not results.complete:
        lines.append("INCOMPLETE: not all planned runs were made.")
    lines += [f"missing: {row.name}: {row.reason}" for row in results.missing]
    if results.not_counted:
        lines.append(f"system calls: not counted: {results.not_counted}")
    lines += [f"dead: {name}: {reason}" for name, reason in results.dead.items()]
    for cell in results.cells:
        for row in results.names():
            error = results.error(cell, row)
            if error and error != results.dead.get(row):
                lines.append(f"failed: {cell.title} x{cell.clients} on {row}: {error}")
    return lines


def describe(results: Results) -> list[str]:
    """Return the machine, the versions and the rows, a line each."""
    lines = [f"{name:<13}{value}" for name, value in results.machine.items()]
    tools = ("pyfuse3", "trio", "libfuse", "dd", "fio")
    versions = [f"{tool} {results.versions.get(tool) or 'none'}" for tool in tools]
    lines.append(f"{'versions':<13}{', '.join(versions)}")
    lines += [
        f"{row.name:<13}{row.note}{f' ({row.version})' if row.version else ''}"
        for row in results.rows
    ]
    return lines


def _sections(results: Results) -> list[list[Table]]:
    return [headline(results), seed(results), others(results), counts(results)]


def terminal(results: Results) -> list[str]:
    """Return what is printed at the end."""
    lines = ["", *describe(results)]
    for tables in _sections(results):
        for table in tables:
            lines += ["", *table.text()]
    lines += ["", *scaling(results), *remarks(results)]
    if not lines[-1]:
        lines.pop()
    minutes, seconds = divmod(round(results.seconds), 60)
    return [*lines, f"{minutes} min {seconds} s in all."]


def write(results: Results, directory: Path) -> list[str]:
    """Write tables.txt and tables.md, and return their names. Raises OSError."""
    text = [*terminal(results)[1:], "", "Each by itself"]
    for table in details(results):
        text += ["", *table.text()]
    write_file(directory / "tables.txt", "\n".join(text) + "\n")
    marked = [f"    {line}" for line in describe(results)]
    for table in (*(one for tables in _sections(results) for one in tables), *details(results)):
        marked += ["", *table.markdown()]
    said = [f"* {line}" for line in (*scaling(results), *remarks(results))]
    write_file(directory / "tables.md", "\n".join([*marked, "", *said]) + "\n")
    return ["tables.txt", "tables.md"]
