"""Reads a trace and checks it against the Trace Event Format (Chromium's document of it).

What a viewer relies on: each event has the fields of its phase; on a lane complete events
lie within each other or apart; every asynchronous begin has its end, nested; both ends of an
arrow lie in an event of their lane.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_FIELDS = {
    "M": {"name", "pid", "tid", "args"},
    "X": {"name", "cat", "pid", "tid", "ts", "dur"},
    "b": {"name", "cat", "pid", "tid", "ts", "id"},
    "e": {"name", "cat", "pid", "tid", "ts", "id"},
    "s": {"name", "cat", "pid", "tid", "ts", "id"},
    "f": {"name", "cat", "pid", "tid", "ts", "id"},
    "i": {"name", "cat", "pid", "tid", "ts", "s"},
}
_ROUNDING = 0.0005  # us: times are whole nanoseconds, kept as fractions of microseconds
_NEAR = 100  # slices of one lane


def read(path: Path, *, torn: bool = False) -> list[Event]:
    """The events of a trace; one of a daemon that was killed may be torn at its end."""
    text = path.read_text(encoding="utf-8")
    if not torn:
        events: list[Event] = json.loads(text)
        return events
    lines = text.split("\n")
    assert lines[0] == "["
    events = [json.loads(line.rstrip(",")) for line in lines[1:-1]]
    if lines[-1].endswith("}"):
        events.append(json.loads(lines[-1]))
    return events


def check(events: list[Event]) -> None:
    """Fail if a viewer would stumble over the events."""
    lanes = set()
    complete: dict[int, list[Event]] = defaultdict(list)
    nested: dict[tuple[str, int], list[Event]] = defaultdict(list)
    arrows: dict[int, dict[str, Event]] = defaultdict(dict)
    for event in events:
        phase = event["ph"]
        assert event.keys() >= _FIELDS[phase], event
        if phase == "M":
            if event["name"] == "thread_name":
                assert event["tid"] not in lanes, "a lane is named once"
                lanes.add(event["tid"])
            continue
        assert isinstance(event["ts"], int | float), event
        assert event["ts"] >= 0, event
        assert event["pid"] == 1, event
        assert isinstance(event["tid"], int), event
        if phase == "X":
            assert event["dur"] >= 0, event
            complete[event["tid"]].append(event)
        elif phase == "i":
            assert event["s"] == "g", "said of the whole trace"
        elif phase in "be":
            nested[event["cat"], event["id"]].append(event)
        else:
            assert phase not in arrows[event["id"]], "an arrow has one tail and one head"
            arrows[event["id"]][phase] = event
    assert complete.keys() <= lanes, "each lane has a name"
    for lane in complete.values():
        _check_lane(lane)
    for begun in nested.values():
        _check_nested(begun)
    starts = {}
    for number, lane in complete.items():
        lane.sort(key=lambda event: float(event["ts"]))
        starts[number] = [event["ts"] for event in lane]
    for arrow in arrows.values():
        _check_arrow(arrow, complete, starts)


def _check_lane(lane: list[Event]) -> None:
    """Complete events of one thread lie within each other or apart."""
    enclosing: list[float] = []  # where they end
    for event in sorted(lane, key=lambda event: (event["ts"], -event["dur"])):
        while enclosing and enclosing[-1] <= event["ts"] + _ROUNDING:
            enclosing.pop()
        end = event["ts"] + event["dur"]
        assert not enclosing or end <= enclosing[-1] + _ROUNDING, event
        enclosing.append(end)


def _check_nested(events: list[Event]) -> None:
    """The begins and ends of one id match like brackets, in the order of the file and of time."""
    open_: list[str] = []
    last = 0.0
    for event in events:
        assert event["ts"] >= last - _ROUNDING, event
        last = event["ts"]
        if event["ph"] == "b":
            open_.append(event["name"])
        else:
            assert open_.pop() == event["name"], event
    assert open_ == [], events


def _check_arrow(
    arrow: dict[str, Event], complete: dict[int, list[Event]], starts: dict[int, list[float]]
) -> None:
    tail, head = arrow["s"], arrow["f"]
    assert head["bp"] == "e", "or it belongs to the next slice of its lane"
    assert tail["tid"] != head["tid"]
    assert tail["ts"] <= head["ts"]
    for end in (tail, head):
        lane = complete[end["tid"]]
        # The slices of a request that start before it, of which the outermost is not far.
        last = bisect_right(starts[end["tid"]], end["ts"] + _ROUNDING)
        assert any(
            event["ts"] + event["dur"] + _ROUNDING >= end["ts"]
            for event in lane[max(0, last - _NEAR) : last]
        ), f"no slice for {end}"


def left_out(events: list[Event]) -> Counter[str]:
    """How many requests, and deferred calls, the trace says that it lacks."""
    found = Counter({"requests": 0, "deferred": 0})
    for event in events:
        if event.get("cat") == "lost":
            found.update(event.get("args", {}))
    return found


def number_of(event: Event) -> int | None:
    """The number of the request that an event belongs to."""
    number = event["id"] if event["ph"] in "be" else event.get("args", {}).get("request")
    assert number is None or isinstance(number, int)
    return number


def requests(events: list[Event]) -> dict[int, list[Event]]:
    """The events of each request, by its number."""
    found: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        number = number_of(event)
        if number is not None:
            found[number].append(event)
    return found
