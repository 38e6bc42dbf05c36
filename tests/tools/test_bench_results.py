"""The benchmark's statistics, tables, files and plots, from made-up figures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ninefuse.bench import plots, tables
from ninefuse.bench.results import Cell, Figures, Results, Run
from ninefuse.bench.rows import Missing, Row

# MB/s of the headline by row and X, in the rounds' order.
HEADLINE = {
    "source": {1: [10, 20, 30], 10: [80, 100, 90]},
    "none": {1: [8, 10, 9], 10: [9, 9, 9]},
    "first": {1: [5, 5, 5], 10: [30, 30, 30]},
    "second": {1: [6, 4, 5], 10: [36, 36, 36]},
    "slow": {1: [2, 2, 2], 10: [12, 12, 12]},
    "quick": {1: [4, 4, 4], 10: [18, 18, 18]},
    "null": {1: [500, 500, 500], 10: [900, 900, 900]},
}
KINDS = {"source": "source", "null": "floor", "slow": "peer", "quick": "peer"}


def cell(workload: str, clients: int, unit: str = "MB/s", rounds: int = 1) -> Cell:
    return Cell(workload, clients, workload, unit, "tool", 100, unit != "s", "a note", rounds)


def made_up() -> Results:
    rows = [
        Row(name, KINDS.get(name, "ninefuse"), ("serve", name), "1.0", f"what {name} is")
        for name in HEADLINE
    ]
    results = Results(
        machine={"CPUs": "2 (x)", "kernel": "Linux 6", "file system": "ext4, in /tmp"},
        versions={"dd": "dd 9.1"},
        rows=rows,
        missing=[Missing("other", "no other in PATH")],
        cells=[
            cell("sync-write", 1, rounds=3),
            cell("sync-write", 10, rounds=3),
            cell("find", 4, "s"),
        ],
        complete=True,
        seconds=61.0,
    )
    for name, by_clients in HEADLINE.items():
        for clients, values in by_clients.items():
            for number, value in enumerate(values, 1):
                cpu = (0.01, 0.02, 0.03, 0.04)
                run = Run("sync-write", clients, name, number, value, "MB/s", 1 / value, *cpu)
                # Of 10 blocks: the clients' switches and the daemon's.
                run = replace(run, operations=10, client_voluntary=number, client_forced=2)
                run = replace(run, daemon_voluntary=30 * number, daemon_forced=5)
                results.runs.append(run)
    for name, seconds in (
        ("source", 0.5),
        ("none", 1.0),
        ("first", 4.0),
        ("slow", 2.0),
        ("quick", 0.8),
    ):
        results.runs.append(Run("find", 4, name, 1, seconds, "s", seconds, 0, 0, 0, 0))
    results.runs.append(Run("find", 4, "second", 1, error="find: failed: no luck"))
    results.runs.append(Run("find", 4, "null", 1, error="it holds no tree", unsupported=True))
    return results


def test_median_least_and_most() -> None:
    results = made_up()
    one, most, _ = results.cells
    assert results.figures(one, "source") == Figures(20, 10, 30)
    assert results.figures(most, "source") == Figures(90, 80, 100)
    assert results.figures(one, "none", "client_user") == Figures(0.01, 0.01, 0.01)
    assert Figures.of([1, 2, 3, 10]).median == 2.5
    assert results.figures(results.cells[2], "second") is None


def test_a_failed_run_does_not_count_and_is_told() -> None:
    results = made_up()
    one = results.cells[0]
    results.runs.append(Run("sync-write", 1, "none", 4, error="dd: failed"))
    assert results.figures(one, "none") == Figures(9, 8, 10)
    assert results.error(one, "none") == "dd: failed"
    text = "\n".join(tables.terminal(results))
    assert re.search(r"^none +9\.00 \(8\.00-10\.0\)\* ", text, re.MULTILINE)
    assert "failed: sync-write x1 on none: dd: failed\n" in text
    assert results.error(results.cells[2], "null") == "", "what cannot be is no failure"


def test_ratios_say_that_more_is_better_whatever_the_unit() -> None:
    results = made_up()
    one, _, find = results.cells
    assert results.ratio(one, "none", "source") == pytest.approx(9 / 20)
    assert results.ratio(find, "none", "source") == pytest.approx(0.5)
    assert results.ratio(find, "quick", "none") == pytest.approx(1.25)
    assert results.ratio(find, "second", "source") is None


def test_the_best_peer_is_not_the_floor_and_no_model() -> None:
    results = made_up()
    one, _, find = results.cells
    assert results.best_peer(one) == "quick"
    assert results.best_peer(find) == "quick", "the one with the fewest seconds"
    results.rows = [row for row in results.rows if row.kind != "peer"]
    assert results.best_peer(one) is None


def test_scaling_and_the_table_of_2010() -> None:
    results = made_up()
    lines = tables.scaling(results)
    assert "none(X=10) / none(X=1): 1.00  (2010: 1.19)" in lines
    assert "second(X=10) / second(X=1): 7.20  (2010: 5.31)" in lines
    assert lines[-1] == "first / second: 1.00 at X=1, 0.83 at X=10"
    (table,) = tables.seed(results)
    assert table.lines == [
        ["first / none", "0.56 (0.96)", "3.33 (3.41)"],
        ["second / none", "0.56 (0.78)", "4.00 (3.51)"],
        ["second / first", "1.00 (0.81)", "1.20 (1.03)"],
    ]


def test_the_headline_tables() -> None:
    throughput, ratio, real, system = tables.headline(made_up())
    lines = {line[0]: list(line[1:]) for line in throughput.lines}
    assert lines["source"] == ["20.0 (10.0-30.0)", "90.0 (80.0-100)"]
    assert lines["first"] == ["5.00", "30.0"]
    assert {line[0]: line[2] for line in ratio.lines}["second"] == "0.40 / 2.00"
    assert {line[0]: line[1] for line in real.lines}["slow"] == "0.50"
    assert {line[0]: line[1] for line in system.lines}["slow"] == "0.040 + 0.020"
    assert {line[0]: line[1] for line in system.lines}["source"] == "0.020"


def test_the_tables_of_the_others() -> None:
    medians, ratios, peers = tables.others(made_up())
    assert medians.heads[2:] == list(HEADLINE)
    assert medians.lines == [
        ["find x4", "s", "0.50", "1.00", "4.00", "failed", "2.00", "0.80", "n/a"]
    ]
    assert ratios.lines == [["find x4", "0.50", "0.12", "-", "0.25", "0.62", "-"]]
    assert peers.lines == [["find x4", "0.80", "0.20", "-", "quick"]]


def test_the_tables_of_what_was_counted() -> None:
    results = made_up()
    (switches,) = tables.counts(results)
    assert switches.heads[1:4] == ["for each", "source", "none"]
    assert switches.lines[0][:4] == ["sync-write x1", "operation", "0.20", "6.00 + 0.20"]
    assert switches.lines[2][2:] == ["-"] * 7, "nothing is known of how many operations"
    counted = Run("sync-write", 1, "none", 0, 7.0, operations=20)
    for mine, theirs in ((100, 40), (120, 60), (500, 41)):
        results.counted.append(replace(counted, daemon_calls=mine, client_calls=theirs))
    (_, calls) = tables.counts(results)
    assert calls.title.startswith("System calls for each operation")
    assert calls.lines[0][:4] == ["sync-write x1", "operation", "-", "6.00 + 2.05"]
    assert results.figures(results.cells[0], "none") == Figures(9, 8, 10), "they were not timed"
    detail = tables.details(results)[0]
    line = next(line for line in detail.lines if line[0] == "none")
    assert list(line[-3:]) == ["6.00 + 0.20", "0.50 + 0.20", "6.00 + 2.05"]


def test_calls_that_could_not_be_counted_are_told() -> None:
    results = made_up()
    assert not any("not counted" in line for line in tables.terminal(results))
    results.not_counted = "Permission denied"
    assert "system calls: not counted: Permission denied" in tables.terminal(results)


def test_what_is_missing_dead_or_left_out_is_named() -> None:
    results = made_up()
    results.complete = False
    results.dead["slow"] = "the server ended: killed by signal 9"
    results.cells.append(cell("never begun", 1))
    lines = tables.terminal(results)
    assert "INCOMPLETE: not all planned runs were made." in lines
    assert "missing: other: no other in PATH" in lines
    assert "dead: slow: the server ended: killed by signal 9" in lines
    assert "failed: find x4 on second: find: failed: no luck" in lines
    assert not any("never begun" in line for line in lines)
    assert lines[-1] == "1 min 1 s in all."


def test_wide_tables_are_split_and_long_notes_folded() -> None:
    heads = ["what", *(f"column {number}" for number in range(20))]
    table = tables.Table("A table", heads, [["it", *"abcdefghijklmnopqrst"]], ["word " * 40])
    lines = table.text()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("it ") for line in lines) == 3
    assert "".join(re.findall(r"\b[a-t]\b", "\n".join(lines))) == "abcdefghijklmnopqrst"


def test_all_tables_fit_with_nine_rows() -> None:
    results = made_up()
    results.rows += [Row(f"another-peer-{number}", "peer", (), "") for number in range(3)]
    assert max(map(len, tables.terminal(results))) <= 100


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.000"),
        (0.00321, "0.0032"),
        (0.0321, "0.032"),
        (0.996, "1.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12_340, "12.3k"),
        (999_600, "1.00M"),
        (1_234_000, "1.23M"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert tables.figure(value) == text


def test_results_json_has_all_that_was_measured(tmp_path: Path) -> None:
    results = made_up()
    results.dead["slow"] = "gone"
    results.save(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (found["format"], found["complete"], found["seconds"]) == (1, True, 61.0)
    assert found["machine"] == results.machine
    assert found["versions"] == {"dd": "dd 9.1"}
    assert found["missing"] == [{"name": "other", "reason": "no other in PATH"}]
    slow = next(row for row in found["rows"] if row["name"] == "slow")
    assert slow["command"] == ["serve", "slow"]
    assert slow["dead"] == "gone"
    assert [work["workload"] for work in found["workloads"]] == ["sync-write", "sync-write", "find"]
    assert len(found["runs"]) == len(results.runs)
    assert found["runs"][0] == {
        "workload": "sync-write",
        "clients": 1,
        "row": "source",
        "round": 1,
        "value": 10,
        "unit": "MB/s",
        "seconds": 0.1,
        "client_user": 0.01,
        "client_system": 0.02,
        "daemon_user": 0.03,
        "daemon_system": 0.04,
        "operations": 10,
        "client_voluntary": 1,
        "client_forced": 2,
        "client_calls": None,
        "daemon_voluntary": 30,
        "daemon_forced": 5,
        "daemon_calls": None,
        "error": "",
        "unsupported": False,
    }
    assert (found["counted"], found["not_counted"]) == ([], "")
    failed = next(run for run in found["runs"] if run["error"])
    assert (failed["value"], failed["seconds"]) == (None, None)


def test_tables_are_written_as_text_and_markdown(tmp_path: Path) -> None:
    results = made_up()
    assert tables.write(results, tmp_path) == ["tables.txt", "tables.md"]
    text = (tmp_path / "tables.txt").read_text()
    for line in tables.terminal(results):
        assert f"{line}\n" in text
    assert "kernel       Linux 6\n" in text
    assert "what quick is (1.0)" in text
    marked = (tmp_path / "tables.md").read_text()
    assert "| source | 20.0 (10.0-30.0) | 90.0 (80.0-100) |\n" in marked
    grids = re.findall(r"(?:^\|.*\n)+", marked, re.MULTILINE)
    assert len(grids) == 4 + 1 + 3 + 1 + 3
    for grid in grids:
        assert len({line.count("|") for line in grid.splitlines()}) == 1


def test_plots_are_written_as_svg_and_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra ninefuse[bench]")
    results = made_up()
    names = ["throughput.svg", "throughput.png", "ratios.svg", "ratios.png"]
    assert plots.draw(results, tmp_path) == names
    for name in names:
        begin = (tmp_path / name).read_bytes()[:100]
        assert begin.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    throughput = (tmp_path / "throughput.svg").read_text()
    for name in HEADLINE:
        shown = f">{name}</text>" in throughput
        assert shown == (name != "null"), "the floor is far above and would flatten the rest"
    assert "not shown, since far above: null" in throughput
    ratios = (tmp_path / "ratios.svg").read_text()
    for text in ("none", "quick", "null", "one client", "find", "2 CPUs, Linux 6, ext4"):
        assert text in ratios


def test_without_figures_there_are_no_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra ninefuse[bench]")
    results = made_up()
    results.runs = []
    assert plots.draw(results, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    places = plots.spread([1, 1.1, 1.2, 9.9, 10, 10], 1, 10)
    assert all(b - a >= 0.999 for a, b in zip(places, places[1:], strict=False))
    assert places[0] == 1
    assert places[-1] == 10
