"""What a trace says of one request: read from what `ninefuse --trace FILE` writes.

Of each trace the request of the median duration is taken, among those that made as many
blocking calls, and of that what the trace says and nothing else: how often it changed threads
is how many arrows there are.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ninefuse.bench import BenchError

# What stands in a trace around its events: the array's begin and its end.
_FRAME = ("", "[", "]", "{}]")


@dataclass(frozen=True, slots=True)
class Slice:
    """A time that the request spent on one thread, in microseconds of the trace's clock."""

    lane: int
    begin: float
    end: float
    name: str


@dataclass(frozen=True, slots=True)
class HandOver:
    """A change of thread: from one lane at one time to another lane at a later time."""

    from_lane: int
    begin: float
    to_lane: int
    end: float


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as a trace shows it.

    begin, end: microseconds of the trace's clock; so are all times in it. lanes: the names of
    those that took part, by number, the dispatcher's first. bodies: where its body ran, and
    what the dispatcher did before and after that. calls: the blocking calls. All are in the
    order of time.
    """

    name: str
    begin: float
    end: float
    lanes: dict[int, str]
    bodies: tuple[Slice, ...]
    calls: tuple[Slice, ...]
    hand_overs: tuple[HandOver, ...]

    def caption(self, title: str) -> str:
        """Return what it took, in words, and how long."""
        crossings = _number_of(len(self.hand_overs), "crossing")
        calls = _number_of(len(self.calls), "blocking call")
        return f"{title}: {crossings} for {calls}, {_duration(self.end - self.begin)}"


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A request of a trace that could be drawn: how long it took, where it is, what it did.

    duration, begin: microseconds. number: the request's. calls: how many blocking ones.
    """

    duration: float
    number: str
    begin: float
    calls: int


def read_requests(paths: Sequence[Path], name: str, calls: int | None = None) -> list[Request]:
    """Return one request of that name of each trace, all with the same number of blocking calls.

    That number is calls; if None, the one that most requests have, else a readdir of a full
    directory might be compared with one that finds no more entries.

    Raises BenchError when there are none, and OSError.
    """
    found = []
    for path in paths:
        with _blaming(path):
            found.append(candidates(read_events(path), name))
        if not found[-1]:
            raise BenchError(f"{path}: there is no {name} in it that ended without an error")
    if calls is None:
        calls = usual_calls(found)
    requests = []
    for path, those in zip(paths, found, strict=True):
        alike = [candidate for candidate in those if candidate.calls == calls]
        if not alike:
            there = ", ".join(map(str, sorted({candidate.calls for candidate in those})))
            wanted = _number_of(calls, "blocking call")
            raise BenchError(f"{path}: there is no {name} with {wanted} in it, but with {there}")
        with _blaming(path):
            requests.append(_request(path, name, median(alike)))
    return requests


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Have it said of which trace it is that an event lacks what is looked for."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path}: not a trace of ninefuse: {error!r}") from error


def candidates(events: Iterator[dict[str, Any]], name: str) -> list[Candidate]:
    """Return the requests of that name, but those that failed or are not in the trace whole."""
    begins: dict[str, float] = {}
    found = []
    for event in events:
        # Its waits are nested in a request, under the same number; they carry other names.
        if event.get("cat") != "request" or event.get("name") != name:
            continue
        number = str(event["id"])
        if event.get("ph") == "b":
            begins[number] = event["ts"]
        elif event.get("ph") == "e" and number in begins:
            begin, ended = begins.pop(number), event.get("args", {})
            if not ended.get("error"):
                duration = event["ts"] - begin
                found.append(Candidate(duration, number, begin, ended.get("calls", 0)))
    return found


def usual_calls(traces: Sequence[Sequence[Candidate]]) -> int:
    """Return the number of blocking calls that most of the requests have.

    If it may be, one that occurs in every trace; of two as frequent, the larger one.
    """
    counts = [Counter(candidate.calls for candidate in trace) for trace in traces]
    return max(
        set().union(*counts),
        key=lambda calls: (
            all(count[calls] for count in counts),
            sum(count[calls] for count in counts),
            calls,
        ),
    )


def median(those: Sequence[Candidate]) -> Candidate:
    """Return the one of median duration; of an even number, the shorter one of the middle two."""
    return sorted(those)[(len(those) - 1) // 2]


def _request(path: Path, name: str, chosen: Candidate) -> Request:
    number, begin, end = chosen.number, chosen.begin, chosen.begin + chosen.duration
    lanes: dict[int, str] = {}
    bodies: list[Slice] = []
    calls: list[Slice] = []
    sent: dict[str, tuple[int, float]] = {}
    received: dict[str, tuple[int, float]] = {}
    for event in read_events(path):
        phase, arguments = event.get("ph"), event.get("args", {})
        if phase == "M" and event.get("name") == "thread_name":
            lanes[event["tid"]] = arguments["name"]
        if str(arguments.get("request")) != number:
            continue
        lane = event.get("tid", 0)
        if phase == "X":
            piece = Slice(lane, event["ts"], event["ts"] + event["dur"], event["name"])
            if event.get("cat") == "call":
                calls.append(piece)
            elif event.get("cat") in ("stretch", "receive", "reply"):
                bodies.append(piece)
        elif phase in ("s", "f"):
            (sent if phase == "s" else received)[str(event["id"])] = lane, event["ts"]
    hand_overs = [HandOver(*sent[id_], *received[id_]) for id_ in sent if id_ in received]
    used = {piece.lane for piece in (*bodies, *calls)}
    used.update(lane for arrow in hand_overs for lane in (arrow.from_lane, arrow.to_lane))
    return Request(
        name,
        min([begin, *(piece.begin for piece in bodies)]),
        max([end, *(piece.end for piece in bodies)]),
        {lane: lanes.get(lane, f"thread {lane}") for lane in sorted(used)},
        tuple(sorted(bodies, key=_begin)),
        tuple(sorted(calls, key=_begin)),
        tuple(sorted(hand_overs, key=_begin)),
    )


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Give the events of a trace one by one. It may be one that a crash cut off.

    Raises BenchError where a line but the last one is no event, and OSError.
    """
    torn = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip().removesuffix(",")
            if text in _FRAME:
                continue
            if torn:
                break
            try:
                event = json.loads(text)
            except ValueError:
                torn = number
                continue
            if not isinstance(event, dict):
                torn = number
                break
            yield event
        else:
            return
    raise BenchError(f"{path}, line {torn}: no trace event")


def _begin(event: Slice | HandOver) -> float:
    return event.begin


def unit_of(longest: float) -> tuple[str, float]:
    return ("ms", 1e3) if longest >= 1e4 else ("\N{MICRO SIGN}s", 1.0)


def _duration(microseconds: float) -> str:
    unit, factor = unit_of(microseconds)
    return f"{microseconds / factor:.{1 if factor > 1 else 0}f} {unit}"


def _number_of(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
