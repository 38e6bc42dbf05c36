"""The pictures of docs/how-it-works.md: a request's way, a fid's life, the locks.

    python3 tools/pictures.py [DIRECTORY]

writes them anew, into docs/pictures or another directory. They are committed;
tests/tools/test_site.py fails if they are out of date. Nothing but the standard library is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent

SIZE = 13  # of letters
_WIDE = 0.56  # of a letter, on average, in sizes
_STYLE = f"""\
text {{ font: {SIZE}px sans-serif; fill: #222 }}
.title {{ font-weight: bold }}
.note {{ font-size: {SIZE - 2}px; fill: #555 }}
.body {{ fill: #cfe3f7; stroke: #3b6ea5 }}
.call {{ fill: #fbdcb4; stroke: #b5701a }}
.state {{ fill: #e3f2dd; stroke: #4d8a3a }}
.wait {{ fill: #f4f4f4; stroke: #999; stroke-dasharray: 4 3 }}
.tick {{ fill: #7b4fa3 }}
.lane {{ stroke: #ccc }}
.arrow {{ stroke: #333; stroke-width: 1.4; fill: none; marker-end: url(#head) }}
"""


class Picture:
    """An SVG that grows. Raises ValueError for what would not fit."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
            ' markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#333"/></marker>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        wide = len(words) * SIZE * _WIDE * (0.86 if kind == "note" else 1)
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        if not (left >= 0 and left + wide <= self._size[0] and SIZE <= y <= self._size[1]):
            raise ValueError(f"{words!r} does not fit the picture")
        self._parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">'
            f"{escape(words)}</text>"
        )

    def box(self, kind: str, x: float, y: float, wide: float, words: str, *more: str) -> None:
        """A box around one line of words, and more lines as notes."""
        lines = [(words, ""), *((line, "note") for line in more)]
        high = 10 + 17 * len(lines)
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{wide:g}" height="{high}" rx="4"/>'
        )
        for n, (line, style) in enumerate(lines):
            if len(line) * SIZE * _WIDE * (0.86 if style else 1) > wide:
                raise ValueError(f"{line!r} does not fit its box")
            self.text(x + wide / 2, y + 18 + 17 * n, line, style, "middle")

    def tick(self, x: float, y: float) -> None:
        """A short stretch of time."""
        self._parts.append(f'<rect class="tick" x="{x:g}" y="{y:g}" width="6" height="12"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self._parts.append(f'<path class="lane" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        way = "L".join(f"{x:g} {y:g}" for x, y in points)
        self._parts.append(f'<path class="arrow" d="M{way}"/>')

    def finished(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


# Stretches of one request: lane, kind, width, words. A change of lane is a crossing, but to what
# runs beside it ("wait"), which takes no time of the request's.
_MKDIR = (
    ("call", 90, "mkdirat"),
    ("body", 60, "body"),
    ("call", 90, "statx"),
    ("body", 60, "body"),
)
_BEGIN = ("dispatcher", "body", 60, "body")
_WAYS = {
    "none: a mkdir. The dispatcher makes every call itself": (
        _BEGIN,
        *(("dispatcher", *stretch) for stretch in _MKDIR),
    ),
    "first: each call goes to a worker, and its result comes back": (
        _BEGIN,
        *(("worker" if one[0] == "call" else "dispatcher", *one) for one in _MKDIR),
    ),
    "second, as in 2010: the rest of the body goes to a worker": (
        _BEGIN,
        *(("worker", *stretch) for stretch in _MKDIR),
    ),
    "second, by default: the role changes threads, not the request": (
        ("leader-0", "body", 60, "body"),
        ("leader-1", "wait", 200, "reads the next request"),
        *(("leader-0", *stretch) for stretch in _MKDIR),
    ),
    "second, with --engine uring: a write, whose call io_uring makes": (
        _BEGIN,
        ("io_uring", "call", 90, "pwrite"),
        _BEGIN,
    ),
}
_GAP = 26  # for the arrow of a crossing


def way() -> str:
    """A request's way through each model."""
    high = 128
    picture = Picture(700, 10 + high * len(_WAYS), "A request's way through none, first and second")
    for n, (title, stretches) in enumerate(_WAYS.items()):
        top = 10 + n * high
        home = stretches[0][0]
        other = next((one[0] for one in stretches if one[0] != home), "worker")
        lanes = {home: top + 28, other: top + 80}
        threads = [lane for lane, kind, *_ in stretches if kind != "wait" and lane != "io_uring"]
        changes = sum(a != b for a, b in zip(threads, threads[1:], strict=False))
        count = f"{changes} change{'s' * (changes != 1)} of thread"
        picture.text(10, top + 14, title, "title")
        picture.text(690, top + 14, count, "note", "end")
        for name, y in lanes.items():
            picture.text(82, y + 18, name, "note", "end")
            picture.line(90, y + 13, 690, y + 13)
        x, before = 100.0, home
        for lane, kind, wide, words in stretches:
            if lane != before:
                picture.arrow((x, lanes[before] + 13), (x + _GAP, lanes[lane] + 13))
                if kind == "wait":
                    picture.box(kind, x + _GAP, lanes[lane], wide, words)
                    continue
                x += _GAP
            picture.box(kind, x, lanes[lane], wide, words)
            x, before = x + wide, lane
        picture.arrow((x, lanes[before] + 13), (x + _GAP, lanes[before] + 13))
        picture.text(x + _GAP + 4, lanes[before] + 9, "answer", "note")
    return picture.finished()


def fid() -> str:
    """A fid's life."""
    picture = Picture(800, 400, "The life of a fid, from walk to clunk")
    picture.text(20, 20, "nodeids: how the kernel knows a file", "title")
    picture.text(490, 20, "file handles: how it has one open", "title")
    left, right, wide = 20, 490, 290
    picture.box("state", left, 80, wide, "unopened fid", "in the table; its number is the qid path")
    picture.box("state", left, 180, wide, "node with descriptor", "O_PATH: outlives its name")
    picture.box("wait", left, 270, wide, "node without descriptor", "device, inode, (parent, name)")
    picture.box("state", right, 80, wide, "clone", "a second fid, counted from 2^64")
    picture.box("state", right, 180, wide, "open fid", "a descriptor of its own, to read and write")
    picture.box("call", right, 290, wide, "out of the table", "no new request finds it")
    picture.box("call", right, 362, wide, "closed, after the body")
    picture.arrow((165, 34), (165, 80))
    picture.text(175, 60, "LOOKUP, MKDIR…: walk", "note")
    picture.arrow((165, 124), (165, 180))
    picture.text(175, 156, "refers to its node", "note")
    picture.arrow((110, 224), (110, 270))
    picture.text(102, 251, "too many", "note", "end")
    picture.arrow((150, 270), (150, 224))
    picture.text(158, 251, "used: opened again, or ESTALE", "note")
    picture.arrow((310, 94), (490, 94))
    picture.text(400, 88, "OPEN: walk(0)", "note", "middle")
    picture.arrow((635, 124), (635, 180))
    picture.text(645, 156, "lopen, lcreate", "note")
    picture.arrow((635, 224), (635, 290))
    picture.text(645, 261, "RELEASE: clunk", "note")
    picture.arrow((310, 112), (420, 112), (420, 312), (490, 312))
    picture.text(412, 332, "FORGET: clunk", "note", "end")
    picture.arrow((635, 334), (635, 362))
    picture.text(627, 353, "last reference dropped", "note", "end")
    return picture.finished()


# Who holds and awaits what: row, [(from, to, kind, words)].
_ROWS = (
    (
        "lookup a/x",
        ((20, 240, "state", "rename lock, read"),),
    ),
    (
        "rename a/y b/y",
        ((60, 240, "wait", "put aside"), (240, 440, "state", "rename lock, write")),
    ),
    (
        "lookup b/z",
        ((110, 440, "wait", "put aside: came after the writer"), (440, 560, "state", "read")),
    ),
    (
        "write to b/y",
        ((40, 520, "call", "pwrite, with no lock at all"),),
    ),
)


def locks() -> str:
    """Who waits for whom."""
    picture = Picture(720, 376, "The rename lock and the fid table's lock, in time")
    picture.text(10, 20, "The rename lock, while four requests are under way", "title")
    for n, (name, spans) in enumerate(_ROWS):
        top = 34 + 74 * n
        picture.text(118, top + 24, name, "note", "end")
        picture.line(124, top + 68, 710, top + 68)
        for begin, end, kind, words in spans:
            picture.box(kind, 130 + begin, top + 4, end - begin, words)
            # A lookup looks into the table, for dictionary work, with the outer lock in hand.
            if kind == "state" and name.startswith("lookup"):
                picture.tick(130 + (begin + end) / 2, top + 56)
    picture.arrow((370, 38), (370, 108))
    picture.arrow((570, 112), (570, 182))
    picture.tick(14, 348)
    picture.text(28, 360, "the fid table's lock: for microseconds, never across a call", "note")
    picture.text(710, 360, "time runs to the right; put aside: holds no thread", "note", "end")
    return picture.finished()


def pictures() -> dict[str, str]:
    """Return all pictures, by the names of their files."""
    return {"request.svg": way(), "fid.svg": fid(), "locks.svg": locks()}


def main() -> None:
    """Write all pictures."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/pictures"
    for name, text in pictures().items():
        (target / name).write_text(text)


if __name__ == "__main__":
    main()
