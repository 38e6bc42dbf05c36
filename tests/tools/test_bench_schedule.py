"""The benchmark's rounds, with workloads that only say what they were asked."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ninefuse.bench import BenchError, Interrupted, Processes, dd
from ninefuse.bench.common import Progress
from ninefuse.bench.counters import Both, Spent
from ninefuse.bench.results import Results
from ninefuse.bench.rows import Row, Site, make_row, makers
from ninefuse.bench.schedule import Served, TimeLeft, measure, steps, task
from ninefuse.bench.users import Unsupported
from ninefuse.bench.workloads import Measured, Workload

Call = tuple[str, str, int]


@dataclass(frozen=True)
class Noted(Workload):
    """Notes its runs; does what was given first."""

    calls: list[Call] = field(default_factory=list)
    before: Callable[[dd.Place], object] = lambda place: None

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        self.calls.append((self.key, place.name, clients))
        self.before(place)
        counted = 9 if place.calls else None
        spent = Both(Spent(0.1, 0.2, 5, 6, counted), Spent(0.3, 0.4, 7, 8, counted))
        return Measured(0.5, 7.0, spent, 2, f"{self.key} DIR")


@pytest.fixture
def processes() -> Iterator[Processes]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with Processes() as processes:
        yield processes
    # After a signal that was heard they stay ignored, in the children of later tests too.
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def rows(processes: Processes, tmp_path: Path) -> list[Served]:
    """Three rows without a server."""
    site = Site(processes, tmp_path, tmp_path)
    return [Served(site, Row(name, "peer", (), "")) for name in ("a", "b", "c")]


def fail(place: dd.Place) -> None:
    if place.name == "b":
        raise BenchError("no luck")


def test_in_every_round_each_row_runs_once_in_turn(
    processes: Processes, rows: list[Served]
) -> None:
    calls: list[Call] = []
    tasks = [
        task(Noted("often", "often", "1/s", "", calls=calls), 1, 3),
        task(Noted("often", "often", "1/s", "", calls=calls), 4, 3),
        task(Noted("once", "once", "1/s", "", calls=calls), 1, 1),
    ]
    results = Results(rows=[served.row for served in rows])
    saved: list[int] = []
    measure(processes, rows, tasks, 1, results, Progress(), lambda: saved.append(len(calls)))
    often = [("often", row, clients) for clients in (1, 4) for row in "abc"]
    assert calls == [*often, *(("once", row, 1) for row in "abc"), *often, *often]
    assert saved == [3, 6, 9, 12, 15, 18, 21], "kept after each cell"
    assert [run.round for run in results.runs] == [1] * 9 + [2] * 6 + [3] * 6
    run = results.runs[0]
    assert (run.value, run.unit, run.seconds) == (7.0, "1/s", 0.5)
    times = (run.client_user, run.client_system, run.daemon_user, run.daemon_system)
    assert times == (0.1, 0.2, 0.3, 0.4)
    assert results.cells[2].command == "once DIR"


def test_a_last_round_counts_calls_and_its_times_are_kept_apart(
    processes: Processes, rows: list[Served]
) -> None:
    calls: list[Call] = []
    tasks = [task(Noted("w", "w", "1/s", "", calls=calls), 1, 2)]
    results = Results(rows=[served.row for served in rows])
    measure(processes, rows, tasks, 1, results, Progress(), lambda: None, calls=True)
    assert calls == [("w", row, 1) for row in "abc"] * 3
    assert [(run.row, run.round) for run in results.runs] == [(a, n) for n in (1, 2) for a in "abc"]
    assert {(run.client_calls, run.daemon_calls) for run in results.runs} == {(None, None)}
    assert [run.row for run in results.counted] == ["a", "b", "c"]
    run = results.counted[0]
    assert (run.client_calls, run.daemon_calls, run.operations) == (9, 9, 2)
    switches = (run.client_voluntary, run.client_forced, run.daemon_voluntary, run.daemon_forced)
    assert switches == (5, 6, 7, 8)


def test_the_order_of_rounds() -> None:
    workload = Noted("w", "w", "s", "")
    tasks = [task(workload, 1, 2), task(workload, 2, 1), task(workload, 3, 3)]
    assert steps(tasks) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (3, 2)]
    assert steps([]) == []


def test_a_cell_that_fails_is_noted_and_the_rest_goes_on(
    processes: Processes, rows: list[Served]
) -> None:
    tasks = [task(Noted("w", "w", "s", "", before=fail), 1, 2)]
    results = Results(rows=[served.row for served in rows])
    measure(processes, rows, tasks, 1, results, Progress(), lambda: None)
    assert [(run.row, run.value, run.error) for run in results.runs] == [
        ("a", 7.0, ""),
        ("b", None, "no luck"),
        ("c", 7.0, ""),
    ] * 2
    assert results.dead == {}


def test_what_a_row_cannot_do_is_no_failure(processes: Processes, rows: list[Served]) -> None:
    def unable(place: dd.Place) -> None:
        raise Unsupported("it cannot")

    results = Results(rows=[served.row for served in rows])
    tasks = [task(Noted("w", "w", "s", "", before=unable), 1, 1)]
    measure(processes, rows, tasks, 1, results, Progress(), lambda: None)
    assert {(run.unsupported, run.error) for run in results.runs} == {(True, "it cannot")}


def test_a_dead_row_is_noted_and_not_asked_again(processes: Processes, tmp_path: Path) -> None:
    """A real server, which is killed during its first run."""
    site = Site(processes, tmp_path, tmp_path / "source")
    site.source.mkdir()
    rows = [Served(site, Row("a", "source", (), "")), Served(site, _null_row(site, "b"))]
    calls: list[Call] = []

    def die(place: dd.Place) -> None:
        if place.server is not None:
            os.kill(place.server.pid, signal.SIGKILL)
            processes.wait([place.server], 10)
            place.meter().__enter__()

    results = Results(rows=[served.row for served in rows])
    tasks = [task(Noted("w", "w", "s", "", calls=calls, before=die), 1, 3)]
    with rows[0], rows[1]:
        measure(processes, rows, tasks, 1, results, Progress(), lambda: None)
    reason = "the server ended: killed by signal 9"
    assert results.dead == {"b": reason}
    assert rows[1].dead == reason, "what became of it at first is what is told"
    assert [run.error for run in results.runs if run.row == "b"] == [reason] * 3
    assert [run.error for run in results.runs if run.row == "a"] == [""] * 3
    assert calls.count(("w", "b", 1)) == 1


def _null_row(site: Site, name: str) -> Row:
    row = make_row(site, name, makers([])["null"])
    assert isinstance(row, Row)
    return row


def test_a_server_that_hangs_is_ended(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ninefuse.bench.schedule._ALIVE_SECONDS", 0.3)
    site = Site(processes, tmp_path, tmp_path)
    with Served(site, _null_row(site, "null")) as served:
        assert served.place.server is not None
        os.kill(served.place.server.pid, signal.SIGSTOP)
        served.examine(processes)
        assert served.dead.startswith("the server does not answer: ")
        assert processes.wait([served.place.server], 10)


def test_an_interrupt_keeps_what_was_done(processes: Processes, rows: list[Served]) -> None:
    def interrupt(place: dd.Place) -> None:
        if place.name == "b":
            os.kill(os.getpid(), signal.SIGINT)
            processes.sleep(10)

    results = Results(rows=[served.row for served in rows])
    tasks = [task(Noted("w", "w", "s", "", before=interrupt), 1, 2)]
    with pytest.raises(Interrupted):
        measure(processes, rows, tasks, 1, results, Progress(), lambda: None)
    assert [(run.row, run.value) for run in results.runs] == [("a", 7.0)]
    assert len(results.cells) == 1


def test_the_time_left() -> None:
    now = 100.0
    left = TimeLeft(40.0, lambda: now)
    assert str(left) == "[....................]   0%"
    left.done(10.0)
    now += 50.0
    assert str(left) == "[#####...............]  25% 2:30 left"
    left.done(30.0)
    assert str(left) == "[####################] 100% 0:00 left"
