"""The plots, as SVG and PNG; the only module that needs matplotlib, and only once it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ninefuse.bench.catalogue import HEADLINE
from ninefuse.bench.results import Cell, Results
from ninefuse.bench.rows import PLAIN_SECOND, SOURCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which does not rest on telling red from green.
_MODELS = {
    "none": "#d55e00",
    "first": "#0072b2",
    PLAIN_SECOND: "#a3d9c6",
    "second-thr": "#4db695",
    "second": "#007d5a",
}
_SOURCE = "#000000"
_PEERS = ("#8a8a8a", "#cc79a7", "#b08900", "#56a0c8", "#7a6a58")
_MARKS = ("s", "^", "D", "v", "P", "X", "<", ">")
_FLOOR = "#9a9a9a"

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ninefuse",  # the same figures give the same file
    "savefig.bbox": "tight",
    "savefig.dpi": 160,
}


def draw(results: Results, directory: Path) -> list[str]:
    """Draw what there are figures for, and return the names of the files.

    Raises ImportError without matplotlib, OSError.
    """
    import matplotlib
    from matplotlib.figure import Figure

    written: list[str] = []
    plots = (("throughput", throughput), ("ratios", ratios))
    with matplotlib.rc_context({**_STYLE}):
        for name, plot in plots:
            figure = Figure(layout="constrained")
            if not plot(figure, results):
                continue
            for kind in ("svg", "png"):
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(directory / f"{name}.{kind}", metadata=metadata)
                written.append(f"{name}.{kind}")
    return written


def _look(results: Results, name: str) -> dict[str, Any]:
    """Return how a row is drawn: the models strong, the peers in the background."""
    kind = next(row.kind for row in results.rows if row.name == name)
    if kind == "source":
        return {"color": _SOURCE, "linewidth": 1.6, "linestyle": "--", "marker": "o", "zorder": 3}
    if kind == "ninefuse":
        color = _MODELS.get(name, "#0072b2")
        return {"color": color, "linewidth": 2.6, "marker": "o", "markersize": 5.5, "zorder": 5}
    if kind == "floor":
        return {"color": _FLOOR, "linewidth": 1.2, "linestyle": ":", "marker": "x", "zorder": 2}
    position = results.names("peer").index(name)
    color, mark = _PEERS[position % len(_PEERS)], _MARKS[position % len(_MARKS)]
    return {"color": color, "linewidth": 1.1, "marker": mark, "markersize": 4, "zorder": 2}


def _where(results: Results) -> str:
    """Return what the figures depend on, in one line."""
    machine = results.machine
    parts = (
        f"{machine.get('CPUs', '?').split()[0]} CPUs",
        machine.get("kernel", "?"),
        machine.get("file system", "?").split(",")[0],
        f"ninefuse {machine.get('ninefuse', '?')}",
    )
    return ", ".join(parts) + ("" if results.complete else "; INCOMPLETE")


def throughput(figure: Figure, results: Results) -> bool:
    """Draw the headline's throughput against X, a line for each row. Return whether there is any.

    The floor is drawn only where it leaves room for the others.
    """
    cells = results.cells_of(HEADLINE)
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for name in results.names():
        found = [(cell.clients, results.figures(cell, name)) for cell in cells]
        points = [(x, one.median, one.least, one.most) for x, one in found if one is not None]
        if points:
            lines[name] = points
    if not lines:
        return False
    figure.set_size_inches(7.2, 4.6)
    axes = figure.add_subplot()
    floor = set(results.names("floor"))
    tops = [point[3] for name, points in lines.items() if name not in floor for point in points]
    top = 1.06 * max(tops, default=1.0)
    ends: list[End] = []
    beyond: list[str] = []
    for name, points in lines.items():
        look = _look(results, name)
        if name in floor and max(point[1] for point in points) > top:
            beyond.append(name)  # the scale is for what writes to a disk
            continue
        xs, medians, least, greatest = (list(column) for column in zip(*points, strict=True))
        axes.plot(xs, medians, **look)
        spread = {"color": look["color"], "zorder": look["zorder"] - 1, "linewidth": 0.9}
        # Side by side, or those of rows that are level would hide one another.
        aside = 0.03 * (len(ends) - (len(lines) - 1) / 2)
        axes.vlines([x + aside for x in xs], least, greatest, alpha=0.55, **spread)
        ends.append(End(xs[-1], medians[-1], name, look["color"], name in _MODELS))
    xs = [cell.clients for cell in cells]
    axes.set_xticks(xs)
    axes.set_xlim(min(xs) - 0.3, max(xs) + 0.3)
    axes.set_ylim(0, top)
    axes.grid(axis="y")
    axes.set_xlabel("X, dd at a time")
    axes.set_ylabel("MB/s, all together")
    axes.set_title("X parallel dd if=/dev/zero bs=4k oflag=sync")
    _label_ends(axes, ends, top)
    rounds = ""
    if cells[0].rounds > 1:
        rounds = f"medians of {results.rounds(cells[0])}, bars from least to greatest; "
    off = f"\nnot shown, since far above: {', '.join(beyond)} (see the tables)" if beyond else ""
    _note(figure, rounds + _where(results) + off)
    return True


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=7, color="#555555")


class End(NamedTuple):
    """Where a line ends, and whose it is. strong: whether it is emphasised."""

    x: float
    value: float
    name: str
    color: str
    strong: bool


def _label_ends(axes: Axes, ends: Sequence[End], top: float) -> None:
    """Write the rows' names at the ends of their lines, none over another."""
    ordered = sorted(ends, key=lambda end: end.value)
    places = spread([end.value for end in ordered], 0.05 * top, 0.99 * top)
    for end, place in zip(ordered, places, strict=True):
        axes.annotate(
            end.name,
            (end.x, end.value),
            xytext=(1.04, place),
            textcoords=("axes fraction", "data"),
            color=end.color,
            fontweight="bold" if end.strong else "normal",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.color,
                "linewidth": 0.6,
                "alpha": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 5,
            },
        )


def spread(values: Sequence[float], gap: float, top: float) -> list[float]:
    """Return places near the ascending values, at least a gap apart, and below top if they fit."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    limit = top
    for position in reversed(range(len(places))):
        places[position] = min(places[position], limit)
        limit = places[position] - gap
    return places


def ratios(figure: Figure, results: Results) -> bool:
    """Draw the models as bars and the peers as marks, as ratios to the source. Return if any."""
    models, peers = results.names("ninefuse"), results.names("peer", "floor")
    cells = [cell for cell in results.cells if _drawn(results, cell, (*models, *peers))]
    if not cells:
        return False
    titles = list(dict.fromkeys(cell.title for cell in cells))
    sides = _sides(cells)
    values = [
        ratio
        for _, side in sides
        for cell in side
        for name in (*models, *peers)
        if (ratio := results.ratio(cell, name, SOURCE)) is not None
    ]
    limits = min(0.01, 0.7 * min(values)), max(1.6, 1.4 * max(values))
    figure.set_size_inches(4.1 * len(sides) + 1.2, 0.47 * len(titles) + 1.5)
    # Not sharey: matplotlib then hides the ticks of all but the first by itself.
    for number, (heading, side) in enumerate(sides, 1):
        axes = figure.add_subplot(1, len(sides), number)
        _bars(axes, results, side, titles, (models, peers), limits)
        axes.set_title(heading)
        if number > 1:
            axes.set_yticklabels([])
    seen: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        seen |= dict(zip(labels, handles, strict=True))
    names = [name for name in (*models, *peers) if name in seen]
    figure.legend(
        [seen[name] for name in names],
        names,
        loc="outside upper center",
        ncols=len(names),
        frameon=False,
        fontsize=8,
        handlelength=1.4,
        columnspacing=1.3,
    )
    note = "ratio to the source directory, more is better, logarithmic scale; "
    _note(figure, note + _where(results))
    return True


def _drawn(results: Results, cell: Cell, names: Sequence[str]) -> bool:
    return any(results.ratio(cell, name, SOURCE) is not None for name in names)


def _sides(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Return the panels: one client, and for each workload the most clients it had."""
    alone = [cell for cell in cells if cell.clients == 1]
    most: dict[str, Cell] = {}
    for cell in cells:
        if cell.clients > 1 and cell.clients >= getattr(most.get(cell.workload), "clients", 0):
            most[cell.workload] = cell
    several = list(most.values())
    found = []
    if alone:
        found.append(("one client", alone))
    if several:
        # The headline has its own numbers of clients.
        usual = {cell.clients for cell in several if cell.workload != HEADLINE}
        first = {cell.clients for cell in several if cell.workload == HEADLINE}
        heading = f"{min(usual or first)} clients"
        if first and usual and first != usual:
            heading += f" (O_SYNC: {min(first)})"
        found.append((heading, several))
    return found


def _bars(
    axes: Axes,
    results: Results,
    cells: Sequence[Cell],
    titles: Sequence[str],
    names: tuple[Sequence[str], Sequence[str]],
    limits: tuple[float, float],
) -> None:
    models, peers = names
    lanes = len(models) + 1  # the last is the peers'
    thick = 0.84 / lanes
    left, right = limits
    at = {title: position for position, title in enumerate(titles)}
    for number, name in enumerate(models):
        look = _look(results, name)
        found = [(cell, results.ratio(cell, name, SOURCE)) for cell in cells]
        pairs = [(cell, ratio) for cell, ratio in found if ratio is not None]
        places = [at[cell.title] + (number - (lanes - 1) / 2) * thick for cell, _ in pairs]
        widths = [ratio - left for _, ratio in pairs]
        axes.barh(
            *(places, widths, 0.9 * thick), left=left, color=look["color"], label=name, zorder=2
        )
    for name in peers:
        look = _look(results, name)
        found = [(cell, results.ratio(cell, name, SOURCE)) for cell in cells]
        pairs = [(cell, ratio) for cell, ratio in found if ratio is not None]
        axes.plot(
            [ratio for _, ratio in pairs],
            [at[cell.title] + (lanes - 1) / 2 * thick for cell, _ in pairs],
            linestyle="none",
            marker=look["marker"],
            markersize=5.2,
            color=look["color"],
            markeredgecolor="white" if look["marker"] != "x" else look["color"],
            markeredgewidth=0.6 if look["marker"] != "x" else 1.4,
            label=name,
            zorder=6,
        )
    axes.axvline(1, color=_SOURCE, linewidth=1, linestyle="--", zorder=1)
    axes.set_xscale("log")
    ticks = [
        tick for tick in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10) if left <= tick <= right
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(left, right)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    for position in range(1, len(titles)):
        axes.axhline(position - 0.5, color="#d0d0d0", linewidth=0.6, zorder=1)
