"""The picture of a request: what is read of small made-up traces, and what is drawn of it."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ninefuse.bench import BenchError, trace_picture
from ninefuse.bench.trace_reader import HandOver, Slice, read_events, read_requests


def lane(number: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}


def piece(request: int, tid: int, cat: str, name: str, begin: float, end: float) -> dict[str, Any]:
    event = {"ph": "X", "pid": 1, "tid": tid, "cat": cat, "name": name, "ts": begin}
    return {**event, "dur": end - begin, "args": {"request": request}}


def arrow(request: int, number: int, *points: tuple[int, float]) -> list[dict[str, Any]]:
    """A hand-over from one lane and time to another; of one point, its beginning only."""
    event = {"cat": "hand-over", "name": "hand-over", "pid": 1, "id": number}
    return [
        {**event, "ph": phase, "tid": tid, "ts": time, "args": {"request": request}}
        for phase, (tid, time) in zip("sf", points, strict=False)
    ]


def around(
    request: int, name: str, begin: float, end: float, calls: int = 0, **arguments: Any
) -> list[dict[str, Any]]:
    event = {"cat": "request", "id": request, "pid": 1, "tid": 0}
    return [
        {**event, "ph": "b", "name": name, "ts": begin},
        {**event, "ph": "b", "name": "queued", "ts": begin + 1},
        {**event, "ph": "e", "name": "queued", "ts": begin + 2},
        {**event, "ph": "e", "name": name, "ts": end, "args": {"calls": calls, **arguments}},
    ]


# A create with two calls, of 100 us: under the first model on two workers, under the second on
# one. Another request's events lie among them.
LANES = [lane(0, "dispatcher"), lane(2, "worker-1"), lane(3, "worker-2"), lane(9, "worker-8")]
FIRST = [
    *LANES,
    *around(7, "create", 1000, 1100, 2, crossings=99),
    piece(7, 0, "receive", "receive", 1000, 1004),
    piece(7, 0, "stretch", "create", 1004, 1010),
    piece(7, 0, "message", "Tlcreate", 1005, 1010),
    *arrow(7, 1, (0, 1010), (2, 1020)),
    *arrow(8, 5, (0, 1010), (9, 1020)),
    piece(8, 9, "call", "_stat", 1020, 1030),
    piece(7, 2, "stretch", "create", 1020, 1040),
    piece(7, 2, "call", "_create_file", 1021, 1039),
    *arrow(7, 2, (2, 1040), (0, 1050)),
    piece(7, 0, "stretch", "create", 1050, 1055),
    *arrow(7, 3, (0, 1055), (3, 1060)),
    piece(7, 3, "stretch", "create", 1060, 1070),
    piece(7, 3, "call", "_open_path", 1061, 1069),
    *arrow(7, 4, (3, 1070), (0, 1090)),
    piece(7, 0, "reply", "reply", 1090, 1100),
]
SECOND = [
    *LANES,
    *around(3, "create", 500, 560, 2),
    piece(3, 0, "stretch", "create", 500, 510),
    *arrow(3, 1, (0, 510), (3, 520)),
    piece(3, 3, "stretch", "create", 520, 545),
    piece(3, 3, "call", "_create_file", 521, 530),
    piece(3, 3, "call", "_open_path", 531, 532),
    *arrow(3, 2, (3, 545), (0, 550)),
    piece(3, 0, "reply", "reply", 550, 560),
]


def write(path: Path, events: Sequence[dict[str, Any]], end: str = "{}]\n") -> Path:
    lines = "".join(f"{json.dumps(event)},\n" for event in events)
    path.write_text(f"[\n{lines}{end}")
    return path


@pytest.fixture
def traces(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "first.json", FIRST), write(tmp_path / "second.json", SECOND)]


def events_of(path: Path) -> list[dict[str, Any]]:
    return list(read_events(path))


# Reading


@pytest.mark.parametrize("end", ["]\n", "{}]\n", "{}]", "", '{"ph": "X", "ts', '{"ph": "X", "ts\n'])
def test_a_trace_may_end_anywhere(tmp_path: Path, end: str) -> None:
    assert events_of(write(tmp_path / "trace", FIRST, end)) == FIRST


def test_a_last_event_without_its_comma_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", FIRST, json.dumps(LANES[0]) + "\n]\n")
    assert events_of(path) == [*FIRST, LANES[0]]


@pytest.mark.parametrize("line", ['{"ph": "X"', "1", "not JSON"])
def test_what_is_no_event_in_the_middle_is_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "trace", FIRST[:2], f"{line},\n{json.dumps(FIRST[2])},\n]\n")
    with pytest.raises(BenchError, match=r"trace, line 4: no trace event"):
        events_of(path)


def test_events_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", [{"cat": "request", "name": "create", "ph": "b"}])
    with pytest.raises(BenchError, match="not a trace of ninefuse"):
        read_requests([path], "create")


def test_a_request_is_what_the_trace_says(traces: list[Path]) -> None:
    first, second = read_requests(traces, "create")
    assert first.lanes == {0: "dispatcher", 2: "worker-1", 3: "worker-2"}
    assert second.lanes == {0: "dispatcher", 3: "worker-2"}
    assert (first.begin, first.end) == (1000, 1100)
    assert first.calls == (
        Slice(2, 1021, 1039, "_create_file"),
        Slice(3, 1061, 1069, "_open_path"),
    )
    assert [body.begin for body in first.bodies] == [1000, 1004, 1020, 1050, 1060, 1090]
    assert second.hand_overs == (HandOver(0, 510, 3, 520), HandOver(3, 545, 0, 550))


def test_crossings_are_the_arrows_of_the_trace(traces: list[Path], tmp_path: Path) -> None:
    captions = [r.caption("it") for r in read_requests(traces, "create")]
    assert captions == [
        "it: 4 crossings for 2 blocking calls, 100 \N{MICRO SIGN}s",
        "it: 2 crossings for 2 blocking calls, 60 \N{MICRO SIGN}s",
    ]
    fewer = [event for event in SECOND if event.get("id") != 2]
    more = [*fewer, *arrow(3, 9, (3, 545))]  # one that never arrived is none
    for events in (fewer, more):
        path = write(tmp_path / "fewer", events)
        (request,) = read_requests([path], "create")
        assert request.caption("x").startswith("x: 1 crossing for 2 blocking calls, ")


# Choosing


def durations(*requests: tuple[float, int], begin: int = 1) -> list[dict[str, Any]]:
    """Requests of that duration and number of calls, one after the other, numbered."""
    return [
        event
        for number, (duration, calls) in enumerate(requests, begin)
        for event in around(number, "read", number * 1e4, number * 1e4 + duration, calls)
    ]


def chosen(tmp_path: Path, events: list[dict[str, Any]], calls: int | None = None) -> float:
    path = write(tmp_path / "trace", events)
    (request,) = read_requests([path], "read", calls)
    return request.end - request.begin


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([30], 30),
        ([30, 10, 20], 20),
        ([40, 10, 20, 30], 20),
        ([1, 1, 5, 1000, 1000], 5),
        ([100, 9, 30], 30),
    ],
)
def test_the_median_is_chosen(tmp_path: Path, given: list[float], expected: float) -> None:
    assert chosen(tmp_path, durations(*((duration, 1) for duration in given))) == expected


def test_failed_and_unfinished_requests_are_left_out(tmp_path: Path) -> None:
    events = [
        *durations((30, 1), (10, 1), (20, 1)),
        *around(10, "read", 0, 21, 1, error="EIO"),
        *around(11, "read", 0, 22, 1, error="EIO"),
        *around(12, "read", 0, 23, 1)[:1],
        *around(13, "read", 0, 24, 1)[1:],
        *around(14, "write", 0, 25, 1),
    ]
    assert chosen(tmp_path, events) == 20


def test_only_requests_that_did_as_much_are_compared(tmp_path: Path) -> None:
    # As ls does it: each directory's entries, and then that there are no more.
    listings = durations((10, 1), (500, 7), (11, 1), (520, 7), (12, 1), (510, 7))
    assert chosen(tmp_path, listings) == 510
    assert chosen(tmp_path, listings, 1) == 11
    mostly_small = durations((10, 1), (500, 7), (11, 1), (12, 1))
    assert chosen(tmp_path, mostly_small) == 11
    assert chosen(tmp_path, mostly_small, 7) == 500
    with pytest.raises(BenchError, match="no read with 3 blocking calls in it, but with 1, 7"):
        chosen(tmp_path, listings, 3)


def test_both_traces_are_to_have_such_a_request(tmp_path: Path) -> None:
    one = write(tmp_path / "one", durations((10, 1), (20, 1), (30, 1), (500, 7)))
    other = write(tmp_path / "other", durations((600, 7), begin=5))
    requests = read_requests([one, other], "read")
    assert [request.end - request.begin for request in requests] == [500, 600]


# Names below a lane. A character is one point wide here, and four lie between two names.


def places(*calls: tuple[str, float, float], limit: float = 1000.0) -> list[tuple[Any, ...]]:
    labels = trace_picture.place_labels(calls, lambda text: float(len(text)), limit)
    return [(label.text, label.middle, label.row) for label in labels]


def test_names_stand_below_the_middle_of_their_calls() -> None:
    assert places(("open", 10, 20), ("stat", 30, 50)) == [("open", 15, 0), ("stat", 40, 0)]


def test_a_name_without_room_goes_a_row_down() -> None:
    assert places(("openat", 10, 11), ("statxx", 12, 13), ("fstat1", 21, 22)) == [
        ("openat", 10.5, 0),
        ("statxx", 12.5, 1),
        ("fstat1", 21.5, 0),
    ]


def test_calls_of_one_name_share_it_where_they_are_close() -> None:
    near = [("statname", float(n), n + 1.0) for n in range(100, 150, 10)]
    assert places(*near) == [("statname \N{MULTIPLICATION SIGN} 5", 120.5, 0)]
    far = [("statname", float(n), n + 1.0) for n in range(100, 160, 12)]
    assert [text for text, _, _ in places(*far)] == ["statname"] * 5
    other = [near[0], ("open", 115.0, 116.0), near[2]]
    assert [text for text, _, _ in places(*other)] == ["statname", "open", "statname"]


def test_names_stay_inside_the_picture() -> None:
    assert places(("getdents64", 0, 1), ("getdents64", 98, 99), limit=100) == [
        ("getdents64", 5, 0),
        ("getdents64", 95, 0),
    ]


@pytest.mark.parametrize("longest", [0.4, 9, 99.9, 100, 100.1, 430, 917, 1578, 8e4, 3e6])
def test_the_scale_has_round_steps(longest: float) -> None:
    times, step = trace_picture._ticks(longest)
    assert 4 <= longest / step <= 10
    assert re.match(r"(1|2|5)\.0+e", f"{step:e}")
    assert times == pytest.approx([n * step for n in range(len(times))])
    assert times[-1] <= longest < times[-1] + step


# The picture


def texts(svg: bytes) -> list[str]:
    """What can be read in the picture, from the first to the last; fails if it is not SVG."""
    root = ElementTree.fromstring(svg)
    found = ("".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text"))
    return [text for text in found if text]


def test_the_picture_says_what_it_shows(traces: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    out = tmp_path / "out.svg"
    words = ["--request", "create", "--out", str(out), *map(str, traces)]
    assert trace_picture.main(words) == 0
    svg = out.read_bytes()
    found = texts(svg)
    assert "first: 4 crossings for 2 blocking calls, 100 \N{MICRO SIGN}s" in found
    assert "second: 2 crossings for 2 blocking calls, 60 \N{MICRO SIGN}s" in found
    assert found.count("dispatcher") == 2
    assert found.count("worker-2") == 2
    assert found.count("worker-1") == 1
    assert "worker-8" not in found, "it did not take part"
    assert found.count("create_file") == 2
    assert found.count("open_path") == 2
    # The numbers of the arrows, of one panel and the other; the scale has none of these.
    assert [word for word in found if word in "12345"] == ["1", "2", "3", "4", "1", "2"]
    assert "\N{MICRO SIGN}s since the create request was received" in found
    root = ElementTree.fromstring(svg)
    assert root.get("width") == "504pt"
    assert float(str(root.get("height")).removesuffix("pt")) < 300
    assert trace_picture.main(words) == 0
    assert out.read_bytes() == svg, "the same traces, the same file"


def test_a_third_trace_is_drawn_below(traces: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    out = tmp_path / "out.svg"
    words = ["--request", "create", "--out", str(out), *map(str, traces), str(traces[1])]
    assert trace_picture.main(words) == 0
    captions = [word for word in texts(out.read_bytes()) if " crossings for 2 " in word]
    assert [word.split(":")[0] for word in captions] == list(trace_picture.TITLES)


def test_both_are_on_one_scale(traces: list[Path]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    found = texts(trace_picture.draw(read_requests(traces, "create")))
    scale = [word for word in found if re.fullmatch(r"\d+0|0", word)]
    assert scale == ["0", "10", "20", "30", "40", "50", "60", "70", "80", "90", "100"]


def test_numbers_do_not_cover_each_other(traces: list[Path], tmp_path: Path) -> None:
    crowded = [
        *LANES,
        *around(1, "create", 0, 1000),
        *(event for n in range(0, 900, 30) for event in arrow(1, n, (0, n), (2, n + 10))),
        *(event for n in range(15, 900, 30) for event in arrow(1, n, (2, n), (0, n + 10))),
    ]
    sparse = read_requests(traces, "create")[0]
    (dense,) = read_requests([write(tmp_path / "crowded", crowded)], "create")
    for request, scale, lines in ((sparse, 4.3, 1), (dense, 0.43, 2)):
        panel = trace_picture._Panel(request, scale, lambda text: 5.0 * len(text))
        numbers = panel.numbers()
        assert len(numbers) == len(request.hand_overs)
        assert len({round(y, 3) for _, y in numbers}) == lines
        assert min(math.dist(*pair) for pair in itertools.combinations(numbers, 2)) > 10
        for number, (x, y) in enumerate(numbers):
            (x1, y1), (x2, y2) = (
                point(request.hand_overs[number]) for point in (panel.tail, panel.head)
            )
            assert (x - x1) * (y2 - y1) == pytest.approx((x2 - x1) * (y - y1)), "on its arrow"


def test_what_is_wrong_is_one_line(
    traces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.svg"
    for words, message in (
        (["--request", "mkdir", *map(str, traces)], "there is no mkdir in it"),
        (["--request", "create", str(tmp_path / "missing"), str(traces[1])], "No such file"),
    ):
        assert trace_picture.main([*words, "--out", str(out)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("trace_picture: ")
        assert message in err
        assert err.count("\n") == 1
    assert not out.exists()


def test_without_matplotlib_it_says_so(
    traces: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    requests = read_requests(traces, "create")
    with pytest.raises(BenchError, match="pip install matplotlib"):
        trace_picture.draw(requests)
