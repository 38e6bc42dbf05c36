"""`ninefuse-bench` as a whole, on tiny amounts: what it writes, and that nothing is left."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mounting import open_directory, wait_until
from ops_helpers import needs_root

import ninefuse
from ninefuse.bench import command, plots
from ninefuse.bench.catalogue import DATA_KEYS
from ninefuse.bench.counters import why_not_calls
from ninefuse.bench.mounted import mounts_below

LIMIT = 60.0
NO_PLOTS = importlib.util.find_spec("matplotlib") is None
ROOT = Path(str(ninefuse.__file__)).resolve().parent.parent


class Bench:
    """Starts the benchmark with its scratch directory in a given one."""

    def __init__(self, tmp_path: Path) -> None:
        self.parent = tmp_path / "parent of it"
        self.parent.mkdir()
        self.out = tmp_path / "results"

    def start(self, *words: str) -> subprocess.Popen[str]:
        options = ("--source", str(self.parent), "--out", str(self.out))
        return subprocess.Popen(
            [sys.executable, "-m", "ninefuse.bench.command", *options, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        with self.start(*words) as process:
            try:
                out, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        return process.returncode, out, err

    def results(self) -> dict[str, object]:
        found = json.loads((self.out / "results.json").read_text())
        assert isinstance(found, dict)
        return found

    def left(self) -> list[object]:
        return [*self.parent.iterdir(), *mounts_below(self.parent)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_run_writes_all_its_files_and_leaves_nothing(bench: Bench) -> None:
    code, out, err = bench.run(
        *("--rows", "source,second,gone,bad", "--workload", "sync-write,stat", "--scale", "0.01"),
        *("--clients", "1,2", "--repeat", "2"),
        *("--peer", "gone=no-such-server {src} {mnt}", "--peer", "bad=false {mnt}"),
    )
    assert (code, err) == (0, "")
    assert bench.left() == []
    files = {path.name for path in bench.out.iterdir()}
    assert {"results.json", "tables.txt", "tables.md"} <= files
    pictures = {f"{plot}.{kind}" for plot in ("throughput", "ratios") for kind in ("svg", "png")}
    assert pictures == files - {"results.json", "tables.txt", "tables.md"} or NO_PLOTS
    assert "missing: gone: no no-such-server in PATH\n" in out
    assert "missing: bad: not mounted: exit status 1\n" in out
    assert "\nsecond(X=2) / second(X=1): " in out
    assert "\nstat, own directory x4" in out
    assert str(bench.parent) not in "".join(
        line for line in out.splitlines() if not line.startswith("file system")
    )

    found = bench.results()
    assert found["complete"] is True
    runs = found["runs"]
    assert isinstance(runs, list)
    assert len(runs) == 2 * 2 * 4
    assert [run["row"] for run in runs] == ["source", "second"] * 8
    assert {run["error"] for run in runs} == {""}
    assert all(run["value"] > 0 and run["seconds"] > 0 for run in runs)
    versions, machine = found["versions"], found["machine"]
    assert isinstance(versions, dict)
    assert isinstance(machine, dict)
    assert versions["ninefuse"] == ninefuse.__version__
    assert all(versions[name] for name in ("Python", "pyfuse3", "trio", "libfuse", "dd", "cp"))
    assert "fio" in versions
    assert machine["kernel"] == f"Linux {os.uname().release}"
    assert machine["CPUs"].startswith(f"{len(os.sched_getaffinity(0))} ")
    assert os.uname().nodename not in json.dumps(machine)
    works = found["workloads"]
    assert isinstance(works, list)
    assert {work["command"].split()[0] for work in works} == {"dd", "python"}
    assert [work["amount"] for work in works if work["workload"] == "stat"] == [15, 15]
    rows = found["rows"]
    assert isinstance(rows, list)
    assert rows[1]["command"][-5:-3] == ["--model", "second"]


@needs_root
@pytest.mark.skipif(bool(why_not_calls()), reason=f"system calls: {why_not_calls()}")
def test_calls_are_counted_and_clients_are_several_users() -> None:
    with open_directory() as directory:
        bench = Bench(directory)
        code, out, err = bench.run(
            *("--rows", "source,second", "--workload", "sync-write,missing,tree-find", "--calls"),
            *("--scale", "0.01", "--clients", "2", "--repeat", "1", "--users", "2"),
        )
        assert (code, err) == (0, "")
        assert bench.left() == []
        found = bench.results()
    counted = found["counted"]
    assert isinstance(counted, list)
    assert {run["round"] for run in counted} == {0}
    runs = [run for run in counted if not run["unsupported"]]
    assert [run["row"] for run in runs] == ["source", "second"] * 3
    for run in runs:
        assert run["client_calls"] > 0
        # A request is read and answered at least.
        if run["row"] == "second":
            assert run["daemon_calls"] >= 2 * run["operations"]
            assert run["daemon_voluntary"] > 0
        else:
            assert run["daemon_calls"] is None
    trees = [run for run in counted if run["workload"] == "tree-find"]
    assert {run["error"] for run in trees} == {"its trees are of the user who mounted"}
    assert "System calls for each operation, the daemon's + the clients'" in out


def test_without_matplotlib_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> list[str]:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(plots, "draw", missing)
    words = ["--rows", "source", "--workload", "missing", "--scale", "0.01"]
    code = command.main([*words, "--source", str(tmp_path), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert code == 0
    assert "\nno plots: matplotlib is missing; pip install 'ninefuse[bench]'\n" in out
    assert (tmp_path / "out" / "tables.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_was_done(bench: Bench, number: signal.Signals) -> None:
    words = ("--rows", "source,none", "--workload", "missing", "--repeat", "1000000")
    with bench.start(*words, "--scale", "0.01") as process:
        try:
            wait_until((bench.out / "results.json").exists, "the first results", LIMIT)
            process.send_signal(number)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert err == f"ninefuse-bench: interrupted by {number.name}\n"
    assert bench.left() == []
    found = bench.results()
    assert found["complete"] is False
    assert isinstance(found["runs"], list)
    assert len(found["runs"]) >= 2
    assert "INCOMPLETE" in out
    assert "INCOMPLETE" in (bench.out / "tables.txt").read_text()


def test_interrupted_before_anything_was_measured(bench: Bench) -> None:
    with bench.start("--rows", "source,none", "--workload", "missing") as process:
        try:
            wait_until(
                lambda: mounts_below(bench.parent) or list(bench.parent.iterdir()),
                "the benchmark to begin",
                LIMIT,
            )
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == "ninefuse-bench: interrupted by SIGINT\n"
    assert bench.left() == []


def test_a_directory_that_cannot_be_written(bench: Bench) -> None:
    bench.out.write_text("a file")
    code, _, err = bench.run("--rows", "source", "--workload", "missing")
    assert code == 1
    assert err.startswith("ninefuse-bench: ")
    assert err.count("\n") == 1
    assert bench.left() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "source,other"], "there is no row other; there are: source, none, first"),
        (["--workload", "stats"], "there is no workload stats; there are: sync-write, "),
        (["--rows", ","], "no name"),
        (["--clients", "1,x"], "'x' is not a number from 1"),
        (["--repeat", "0"], "'0' is not a number from 1"),
        (["--users", "1001"], "at most 1000 users"),
        (["--scale", "nan"], "'nan' is not a factor"),
        (["--peer", "x=serve {src}"], "must say where the mount point goes: {mnt}"),
        (["--peer", "none=serve {mnt}"], "there is a row none already"),
    ],
)
def test_wrong_command_lines(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def parse(*words: str) -> command.Options:
    return command._parse(words)


def rounds(*words: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for one in command._tasks(parse(*words), Path(), False):
        found.setdefault(one.cell.workload, set()).add(one.cell.rounds)
    return found


def test_what_is_measured_how_often() -> None:
    assert rounds()["sync-write"] == {3}
    assert {key for key, value in rounds().items() if value == {1}} == set(rounds()) - {
        "sync-write"
    }
    assert set(map(tuple, rounds("--full").values())) == {(3,)}
    assert set(map(tuple, rounds("--repeat", "5").values())) == {(5,)}
    assert set(rounds("--workload", "stat,chmod")) == {"stat", "chmod"}
    assert parse("--rows", "none,source,none").rows == ("none", "source")


def test_clients_and_amounts() -> None:
    tasks = command._tasks(parse("--clients", "7,2,7"), Path(), False)
    assert [one.cell.clients for one in tasks[:2]] == [2, 7]
    assert {one.cell.clients for one in tasks[2:]} == {1, 4}
    full = command._tasks(parse("--full", "--scale", "2"), Path(), False)
    amounts = {one.cell.workload: one.cell.amount for one in full}
    usual = {one.cell.workload: one.cell.amount for one in tasks}
    assert amounts["stat"] == 6 * usual["stat"] / command.QUICK_SCALE


def test_all_clients_come_as_other_users_where_that_is_asked_for() -> None:
    several = command._tasks(parse("--users", "3"), Path(), True)
    assert {one.workload.users.number for one in several} == {3}
    usual = command._tasks(parse(), Path(), True)
    assert {one.cell.workload for one in usual if one.workload.users} == {"write-user"}


def test_the_quick_form_measures_main_rows_beside_the_headline() -> None:
    """Unless rows are asked for; a peer that was given is measured everywhere."""
    quick = command._tasks(parse("--peer", "mine=x {mnt}"), Path(), False)
    assert {one.rows for one in quick[:5]} == {None}
    main = command.MAIN_ROWS | {"mine"}
    data = {one.rows for one in quick[5:] if one.cell.workload in DATA_KEYS}
    others = {one.rows for one in quick[5:] if one.cell.workload not in DATA_KEYS}
    assert others == {main}
    assert data == {main | {"kernel", "pt_hp", "pt_hp-kernel"}}
    for words in (("--full",), ("--rows", "source,bindfs")):
        assert {one.rows for one in command._tasks(parse(*words), Path(), False)} == {None}
