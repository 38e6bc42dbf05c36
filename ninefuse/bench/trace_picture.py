"""One request under both threading models, drawn from traces of each, one above the other.

matplotlib is needed for the drawing, and is imported only there.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ninefuse.bench import BenchError
from ninefuse.bench.trace_reader import HandOver, Request, read_requests, unit_of
from ninefuse.exitcodes import one_line

TITLES = ("first", "second", "second, the role handed over")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture and return the exit code: 0, or 1 if there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m ninefuse.bench.trace_picture",
        description="Draw one request of a callback, the one of median duration, from a trace of "
        "each of the two threading models, and of one more kind.",
    )
    parser.add_argument("--request", required=True, metavar="NAME", help="a callback: create")
    parser.add_argument(
        "--calls",
        type=int,
        metavar="N",
        help="of those with N blocking calls (as many as most of them have)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.svg")
    parser.add_argument("first", type=Path, metavar="TRACE_FIRST")
    parser.add_argument("second", type=Path, metavar="TRACE_SECOND")
    parser.add_argument("role", type=Path, nargs="?", metavar="TRACE_ROLE")
    given = parser.parse_args(argv)
    traces = tuple(trace for trace in (given.first, given.second, given.role) if trace is not None)
    try:
        requests = read_requests(traces, given.request, given.calls)
        given.out.write_bytes(draw(requests))
    except (BenchError, OSError) as error:
        print(f"trace_picture: {one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


# The layout of a panel, in points: y grows downwards from the panel's upper edge.

_WIDTH = 504.0  # 7 inches: 700 pixels at the 100 dots per inch of most documents
_LEFT, _RIGHT = 60.0, 8.0
_CAPTION = 20.0
_BOX = 14.0  # a lane's height
_LABEL = 11.0  # a row of names below it
_GAP = 24.0  # below the dispatcher's lane: the arrows' numbers
_LANE_GAP = 6.0  # below a worker's
_PANEL_GAP = 8.0
_AXIS = 21.0

_NUMBER = 11.0  # the room that an arrow's number takes

_TEXT = 8.0  # font sizes
_SMALL = 7.0
_LEAST_BOX = 1.2  # the width at which a call of no time can still be seen

# After Okabe and Ito, told apart also by those who see no colours: light, dark, and in between.
_BODY, _CALL, _ARROW, _GREY = "#cfe5f3", "#0a5a8c", "#d55e00", "#8a8a8a"


@dataclass(frozen=True, slots=True)
class Label:
    """A name below a lane, for one call or for several that follow each other.

    text; middle: x; row: 0 is next to the lane. begin, end: what it is the name of. shared:
    whether that is several calls.
    """

    text: str
    middle: float
    row: int
    begin: float
    end: float
    shared: bool


def place_labels(
    calls: Sequence[tuple[str, float, float]],
    width_of: Callable[[str], float],
    limit: float,
) -> list[Label]:
    """Return where the names of a lane's calls stand, so that none covers another.

    Neighbours of one name that stand too close for a name each share one, with their number.

    Arguments: calls, with name, begin and end, in the order of time; width_of, which returns the
    width of a text; limit, the width that there is. All in points.
    """
    groups: list[tuple[str, list[tuple[float, float]]]] = []
    for name, begin, end in calls:
        if groups and groups[-1][0] == name:
            before, after = groups[-1][1][-1]
            if (begin + end) / 2 - (before + after) / 2 < width_of(name) + 4:
                groups[-1][1].append((begin, end))
                continue
        groups.append((name, [(begin, end)]))
    labels: list[Label] = []
    rows: list[float] = []  # where the last name of each row ends
    for name, spans in groups:
        begin, end = spans[0][0], spans[-1][1]
        text = name if len(spans) == 1 else f"{name} \N{MULTIPLICATION SIGN} {len(spans)}"
        half = width_of(text) / 2
        middle = max(half, min((begin + end) / 2, limit - half))
        row = len(rows)
        for candidate, last in enumerate(rows):
            # It may stand anywhere below what it is the name of.
            moved = max(middle, last + 4 + half)
            if moved <= max(middle, min(end, limit - half)):
                row, middle = candidate, moved
                break
        rows[row : row + 1] = [middle + half]
        labels.append(Label(text, middle, row, begin, end, len(spans) > 1))
    return labels


class _Panel:
    """The layout of one request: the scale, the lanes' heights and the names below them."""

    def __init__(self, request: Request, scale: float, width_of: Callable[[str], float]) -> None:
        self.request = request
        self._scale = scale
        self.tops: dict[int, float] = {}
        self.labels: dict[int, list[Label]] = {}
        y = _CAPTION
        self._gap = 0.0  # the middle of the gap below the first lane
        for lane in request.lanes:
            calls = [
                (call.name.lstrip("_"), self.x(call.begin), self.x(call.end))
                for call in request.calls
                if call.lane == lane
            ]
            self.labels[lane] = place_labels(calls, width_of, _WIDTH - _LEFT - _RIGHT)
            self.tops[lane] = y
            y += _BOX + _LABEL * (1 + max((label.row for label in self.labels[lane]), default=-1))
            self.height = y
            y += _LANE_GAP if self._gap else _GAP
            self._gap = self._gap or y - _GAP / 2

    def x(self, time: float) -> float:
        """Return where a time stands, in points from the axes' left edge."""
        return (time - self.request.begin) * self._scale

    def tail(self, arrow: HandOver) -> tuple[float, float]:
        """Return the point where an arrow begins: at the edge of its lane."""
        return self.x(arrow.begin), self._edge(arrow.from_lane, arrow.to_lane)

    def head(self, arrow: HandOver) -> tuple[float, float]:
        """Return the point where an arrow ends."""
        return self.x(arrow.end), self._edge(arrow.to_lane, arrow.from_lane)

    def _edge(self, lane: int, other: int) -> float:
        return self.tops[lane] + (_BOX if self.tops[other] > self.tops[lane] else 0)

    def numbers(self) -> list[tuple[float, float]]:
        """Return where the arrows' numbers stand, each on its arrow.

        That is in the gap below the first lane, where nothing else stands: in one line, or in
        two by turns where one would be too crowded.
        """
        for offsets in ((0.0, 0.0), (_NUMBER / 2, -_NUMBER / 2)):
            places = [
                self._number(arrow, self._gap + offsets[position % 2])
                for position, arrow in enumerate(self.request.hand_overs)
            ]
            pairs = itertools.combinations(places, 2)
            if all(math.dist(one, other) >= _NUMBER for one, other in pairs):
                break
        return places

    def _number(self, arrow: HandOver, y: float) -> tuple[float, float]:
        begin, end = self.tail(arrow), self.head(arrow)
        if not min(begin[1], end[1]) < y < max(begin[1], end[1]):
            y = (begin[1] + end[1]) / 2  # from worker to worker
        share = (y - begin[1]) / (end[1] - begin[1]) if begin[1] != end[1] else 0.5
        return begin[0] + share * (end[0] - begin[0]), y


# Drawing.


def draw(requests: Sequence[Request]) -> bytes:
    """Return an SVG picture of the requests, named TITLES, below each other on one time scale.

    Raises BenchError without matplotlib.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
        textpath = importlib.import_module("matplotlib.textpath")
    except ImportError as error:
        raise BenchError(f"{error}: pip install matplotlib") from error

    def width_of(text: str) -> float:
        return float(textpath.TextPath((0, 0), text, size=_SMALL).get_extents().width)

    longest = max(request.end - request.begin for request in requests) or 1.0
    # A hundredth is left free, so that the last box does not touch the edge.
    scale = (_WIDTH - _LEFT - _RIGHT) / (longest * 1.01)
    panels = [_Panel(request, scale, width_of) for request in requests]
    height = sum(panel.height + _PANEL_GAP for panel in panels) + _AXIS
    style = {
        "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
        "svg.hashsalt": "ninefuse",  # the same picture is the same file
        "font.family": "sans-serif",
        "font.size": _TEXT,
        "text.parse_math": False,  # a dollar sign is one
    }
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(_WIDTH / 72, height / 72), facecolor="white")
        top = height
        titles = TITLES[: len(panels)]
        for number, (title, panel) in enumerate(zip(titles, panels, strict=True)):
            axes = figure.add_axes(
                (
                    _LEFT / _WIDTH,
                    (top - panel.height) / height,
                    (_WIDTH - _LEFT - _RIGHT) / _WIDTH,
                    panel.height / height,
                )
            )
            axes.set_xlim(0, _WIDTH - _LEFT - _RIGHT)
            axes.set_ylim(panel.height, 0)
            axes.set_axis_off()
            _draw_grid(axes, panel.height, longest, scale)
            _draw_panel(axes, panel, title)
            if number == 0:
                _draw_legend(axes, width_of)
            if number == len(panels) - 1:
                _draw_axis(axes, panel, longest, scale)
            top -= panel.height + _PANEL_GAP
        picture = io.BytesIO()
        captions = (
            panel.request.caption(title) for title, panel in zip(titles, panels, strict=True)
        )
        metadata = {"Title": "; ".join(captions), "Date": None, "Creator": None}
        figure.savefig(picture, format="svg", facecolor="white", metadata=metadata)
    return picture.getvalue()


def _draw_panel(axes: Any, panel: _Panel, title: str) -> None:
    request = panel.request
    axes.text(-_LEFT + 4, 9, request.caption(title), weight="bold", va="center")
    for lane, name in request.lanes.items():
        middle = panel.tops[lane] + _BOX / 2
        axes.text(-6, middle, name, ha="right", va="center")
        axes.plot(
            (0, panel.x(request.end)), (middle, middle), color="#bbbbbb", linewidth=0.6, zorder=1
        )
    for pieces, inset, colour, least in (
        (request.bodies, 0.0, _BODY, 0.6),
        (request.calls, 2.5, _CALL, _LEAST_BOX),
    ):
        for piece in pieces:
            begin, end = panel.x(piece.begin), panel.x(piece.end)
            top = panel.tops[piece.lane] + inset
            width, height = max(end - begin, least), _BOX - 2 * inset
            _box(axes, begin, top, width, height, colour)
    for lane, labels in panel.labels.items():
        for label in labels:
            _draw_label(axes, label, panel.tops[lane] + _BOX)
    for arrow in request.hand_overs:
        _draw_arrow(axes, panel, arrow)
    for number, (x, y) in enumerate(panel.numbers(), 1):
        _draw_number(axes, number, x, y)


def _box(axes: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    edge = _CALL if colour == _BODY else colour
    axes.fill(
        (x, x + width, x + width, x),
        (y, y, y + height, y + height),
        facecolor=colour,
        edgecolor=edge,
        linewidth=0.5,
        zorder=3,
    )


def _draw_label(axes: Any, label: Label, bottom: float) -> None:
    middle = (label.begin + label.end) / 2
    y = bottom + _LABEL * label.row
    if label.shared:
        axes.plot((label.begin, label.end), (bottom + 2,) * 2, color=_CALL, linewidth=0.8)
    if label.row:
        axes.plot((middle, middle), (bottom, y + 2), color=_GREY, linewidth=0.5, zorder=2)
    axes.text(
        label.middle,
        y + _LABEL / 2 + 1.5,
        label.text,
        size=_SMALL,
        ha="center",
        va="center",
        zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.3},
    )


def _draw_arrow(axes: Any, panel: _Panel, arrow: HandOver) -> None:
    axes.annotate(
        "",
        xy=panel.head(arrow),
        xytext=panel.tail(arrow),
        zorder=4,
        arrowprops={
            "arrowstyle": "-|>,head_length=0.35,head_width=0.18",
            "color": _ARROW,
            "linewidth": 1.0,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


def _draw_number(axes: Any, number: int, x: float, y: float) -> None:
    axes.text(
        x,
        y,
        str(number),
        size=6.5,
        ha="center",
        va="center",
        zorder=5,
        bbox={
            "boxstyle": "circle,pad=0.15",
            "facecolor": "white",
            "edgecolor": _ARROW,
            "linewidth": 0.8,
        },
    )


def _draw_legend(axes: Any, width_of: Callable[[str], float]) -> None:
    x = _WIDTH - _LEFT - _RIGHT
    for text, colour in (("hand-over", _ARROW), ("blocking call", _CALL), ("request runs", _BODY)):
        x -= width_of(text)
        axes.text(x, 9, text, size=_SMALL, va="center")
        x -= 14
        if colour == _ARROW:
            axes.annotate(
                "",
                xy=(x + 11, 9),
                xytext=(x, 9),
                arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0},
            )
        else:
            _box(axes, x, 6, 11, 6, colour)
        x -= 12


def _ticks(longest: float) -> tuple[list[float], float]:
    """Return the times to be marked, four to ten of them, and how many microseconds they step."""
    step = 1e-3
    while longest / step > 10:
        # 1, 2, 5, 10, ... The factor from 2 to 5 is not that of the others.
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    return [n * step for n in range(int(longest / step) + 1)], step


def _draw_grid(axes: Any, bottom: float, longest: float, scale: float) -> None:
    for time in _ticks(longest)[0]:
        axes.plot(
            (time * scale, time * scale),
            (_CAPTION - 3, bottom + _PANEL_GAP / 2),
            color="#e6e6e6",
            linewidth=0.6,
            zorder=0,
            clip_on=False,
        )


def _draw_axis(axes: Any, panel: _Panel, longest: float, scale: float) -> None:
    times, step = _ticks(longest)
    unit, factor = unit_of(longest)
    for time in times:
        axes.text(time * scale, panel.height + 9, f"{time / factor:g}", ha="center", va="center")
    axes.text(
        (_WIDTH - _LEFT - _RIGHT) / 2,
        panel.height + 22,
        f"{unit} since the {panel.request.name} request was received",
        ha="center",
        va="center",
    )


if __name__ == "__main__":
    sys.exit(main())
