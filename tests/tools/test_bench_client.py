"""The measuring client, as the benchmark runs it, and the workloads on a plain directory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mounting import open_directory
from ops_helpers import needs_root

from ninefuse.bench import BenchError, Processes, catalogue, dd, trees, users, workloads
from ninefuse.bench.counters import Spent
from ninefuse.bench.users import Unsupported, Users
from ninefuse.bench.workloads import CLIENT, Workload


def client(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(CLIENT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def report(*words: object) -> dict[str, float]:
    done = client(*words)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert sorted(found) == ["begin", "done", "end", "forced", "system", "user", "voluntary"]
    assert found["begin"] <= found["end"]
    return dict(found)


def make(directory: Path, prefix: str, count: int, size: int = 0) -> None:
    for number in range(count):
        (directory / f"{prefix}{number}").write_bytes(bytes(size))


def test_it_stats_each_name_once(tmp_path: Path) -> None:
    make(tmp_path, "n", 5)
    assert report("stat", 5, tmp_path / "n")["done"] == 5
    done = client("stat", 6, tmp_path / "n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No such file" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_name_must_be_missing(tmp_path: Path) -> None:
    assert report("missing", 5, tmp_path / "n")["done"] == 5
    make(tmp_path, "n", 5)
    assert client("missing", 5, tmp_path / "n").returncode == 1


def test_it_opens_one_file_again_and_again(tmp_path: Path) -> None:
    make(tmp_path, "n", 1)
    assert report("open", 7, tmp_path / "n0")["done"] == 7
    assert client("open", 7, tmp_path / "n1").returncode == 1


def test_it_creates_and_unlinks(tmp_path: Path) -> None:
    assert report("create", 4, tmp_path / "n")["done"] == 4
    assert list(tmp_path.iterdir()) == []
    make(tmp_path, "n", 3)
    assert client("create", 4, tmp_path / "n").returncode == 1, "of new names only"


def test_it_counts_the_names_it_lists(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"d{number}").mkdir()
        make(tmp_path / f"d{number}", "n", 4 + number)
    assert report("readdir", 3, tmp_path / "d")["done"] == 4 + 5 + 6


def test_it_changes_the_mode_each_time(tmp_path: Path) -> None:
    make(tmp_path, "n", 1)
    assert report("chmod", 2, tmp_path / "n0")["done"] == 2
    assert os.stat(tmp_path / "n0").st_mode & 0o777 == 0o600
    report("chmod", 3, tmp_path / "n0")
    assert os.stat(tmp_path / "n0").st_mode & 0o777 == 0o644


def test_it_reads_blocks_at_random(tmp_path: Path) -> None:
    make(tmp_path, "n", 1, 40 * 4096)
    assert report("read", 20, tmp_path / "n0")["done"] == 20


def test_it_waits_for_the_instant(tmp_path: Path) -> None:
    at = time.monotonic() + 0.4
    begin = report("missing", 1, tmp_path / "n", "--at", at)["begin"]
    assert at <= begin < at + 10


def test_its_own_start_is_not_its_cpu_time(tmp_path: Path) -> None:
    found = report("missing", 1, tmp_path / "n")
    assert found["user"] + found["system"] <= found["end"] - found["begin"] + 0.005


@pytest.fixture
def opened() -> Iterator[Path]:
    with open_directory() as path:
        yield path


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


ALL = [workload.key for workload in catalogue.workloads(Path(), 1, False)]


def small(tmp_path: Path, fio: bool) -> dict[str, Workload]:
    original = tmp_path / "original"
    original.mkdir(parents=True)
    for number in range(3):
        (original / f"{number}.py").write_text("yield\n")
    found = {one.key: one for one in catalogue.workloads(original, 0.001, fio)}
    found["sync-write"] = workloads.SyncWrite("sync-write", "", "MB/s", "dd", 3)
    return found


@needs_root
def test_it_becomes_another_user(opened: Path) -> None:
    for number, owner in enumerate((users.FIRST, 0)):
        make(opened, f"n{number}-", 1)
        os.chown(opened / f"n{number}-0", owner, owner)
    as_other = ("--user", users.FIRST, "chmod", 2)
    assert report(*as_other, opened / "n0-0")["done"] == 2
    done = client(*as_other, opened / "n1-0")
    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr


@needs_root
@pytest.mark.parametrize("key", ALL)
def test_each_workload_by_several_users(processes: Processes, opened: Path, key: str) -> None:
    workload = replace(small(opened, False)[key], users=Users(2))
    here = opened / "here"
    here.mkdir()
    place = dd.Place("here", here, here)
    if key.startswith("tree-"):
        with pytest.raises(Unsupported, match="of the user who mounted"):
            workload.run(processes, place, 3)
    else:
        assert workload.run(processes, place, 3).value > 0
    assert list(here.iterdir()) == []


def test_fio_is_one_users(processes: Processes, tmp_path: Path) -> None:
    workload = replace(small(tmp_path, True)["read-4k"], users=Users(2))
    with pytest.raises(Unsupported, match="one user's process"):
        workload.run(processes, dd.Place("here", tmp_path, tmp_path), 2)


@pytest.mark.parametrize("key", ALL)
def test_each_workload_on_a_plain_directory(processes: Processes, opened: Path, key: str) -> None:
    if key == "write-user" and os.geteuid() != 0:
        pytest.skip("only root has clients of another user")
    workload = small(opened, False)[key]
    here = opened / "here"
    here.mkdir()
    found = workload.run(processes, dd.Place("here", here, here), 2)
    assert found.seconds > 0
    assert found.value > 0
    assert found.spent.server == Spent()
    assert found.operations >= 2
    assert str(here) not in found.command
    assert "DIR/" in found.command
    assert list(here.iterdir()) == [], "all is removed"


def test_rates_are_of_all_clients_from_the_first_begin_to_the_last_end(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "client.py"
    fake.write_text(
        "import sys\n"
        "last = sys.argv[-1].endswith('b')\n"
        "begin, end = (12.0, 15.0) if last else (11.0, 13.0)\n"
        'words = \'"done": 8, "begin": %f, "end": %f, "user": 1, "system": 2, \'\n'
        'words += \'"voluntary": 3, "forced": 4\'\n'
        "print('{' + words % (begin, end) + '}')\n"
    )
    monkeypatch.setattr(workloads, "CLIENT", fake)
    place = dd.Place("here", tmp_path, tmp_path)
    found = workloads.run_clients(processes, "stat", 8, ["a", "b"], place)
    assert (found.seconds, found.value) == (4.0, 4.0)
    assert found.spent.clients == Spent(2, 4, 6, 8)
    assert found.operations == 16
    with pytest.raises(BenchError, match="stat: 8 done instead of 9"):
        workloads.run_clients(processes, "stat", 9, ["a", "b"], place)


@needs_root
def test_a_client_of_another_user_is_one(processes: Processes, opened: Path) -> None:
    """Who may not get there is told of."""
    log = opened / "log"
    program = opened / "dd"
    program.write_text(
        f'#!/bin/sh\necho "$(id -u) $(id -g) $(id -G)" >>"{log}"\nexec /bin/dd "$@"\n'
    )
    program.chmod(0o755)
    log.touch()
    log.chmod(0o666)
    here = opened / "here"
    here.mkdir()
    path = os.environ["PATH"]
    workload = small(opened, False)["write-user"]
    opened.chmod(0o700)
    with pytest.raises(Unsupported, match="other users do not get there"):
        workload.run(processes, dd.Place("here", here, here), 2)
    opened.chmod(0o755)
    sync = replace(small(opened / "sync", False)["sync-write"], users=Users(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{opened}:{path}")
        workload.run(processes, dd.Place("here", here, here), 2)
        sync.run(processes, dd.Place("here", here, here), 3)
    user, other = users.FIRST, users.FIRST + 1
    lines = [f"{user} {user} {user}\n"] * 4 + [f"{other} {other} {other}\n"]
    assert sorted(log.read_text().splitlines(keepends=True)) == lines
    assert list(here.iterdir()) == []


def test_another_user_takes_root_and_setpriv(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = small(tmp_path, False)["write-user"]
    place = dd.Place("here", tmp_path, tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported, match="only root"):
        workload.run(processes, place, 1)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(users, "_PROGRAM", "no-such-program")
    with pytest.raises(Unsupported, match="no no-such-program in PATH"):
        workload.run(processes, place, 1)


def test_a_cached_read_is_past_the_mounts_cache_alone(processes: Processes, tmp_path: Path) -> None:
    """On the source itself O_DIRECT would be past the only one."""
    workload = small(tmp_path, False)["read-cached"]
    source, mount = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    assert "direct" not in workload.run(processes, dd.Place("source", source, source), 1).command
    mount.symlink_to(source)
    assert "iflag=direct" in workload.run(processes, dd.Place("mount", mount, source), 1).command


def test_a_short_file_is_found_out(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "dd"
    program.write_text('#!/bin/sh\nof=${2#of=}\nprintf x >"$of"\n')
    program.chmod(0o755)
    workload = small(tmp_path, False)["write-4k"]
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BenchError, match="out-0 has 1 bytes"):
        workload.run(processes, dd.Place("here", tmp_path, tmp_path), 1)


def test_one_of_several_that_fails_is_told(processes: Processes, tmp_path: Path) -> None:
    place = dd.Place("here", tmp_path, tmp_path)
    commands = [["true"], ["sh", "-c", "echo no luck >&2; exit 3"]]
    with pytest.raises(BenchError, match="failed: no luck"):
        workloads.parallel(processes, place, commands)
    with pytest.raises(BenchError, match=r"did not end within 0\.1 s"):
        workloads.parallel(processes, place, [["sleep", "60"]], 0.1)


def fake_fio(directory: Path, output: str) -> str:
    program = directory / "fio"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nothing", "its output is not as expected"),
        ('{"jobs": []}', "its output is not as expected"),
        ('{"jobs": [{"read": {"total_ios": 5, "runtime": 9, "iops": 1}}]}', "fio read 5 blocks"),
    ],
)
def test_a_fio_that_did_something_else_is_found_out(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    workload = small(tmp_path, True)["read-4k"]
    monkeypatch.setenv("PATH", fake_fio(tmp_path, output))
    with pytest.raises(BenchError, match=message):
        workload.run(processes, dd.Place("here", tmp_path, tmp_path), 2)


def test_fio_is_taken_at_its_word(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = small(tmp_path, True)["read-4k"]
    ios = workload.share(2) * 2
    output = (
        f'a remark\n{{"jobs": [{{"read": {{"total_ios": {ios}, "runtime": 2000, "iops": 77}}}}]}}'
    )
    monkeypatch.setenv("PATH", fake_fio(tmp_path, output))
    found = workload.run(processes, dd.Place("here", tmp_path, tmp_path), 2)
    assert (found.value, found.seconds) == (77, 2.0)
    assert "--numjobs=2" in found.command


def test_the_same_amount_is_shared_out(tmp_path: Path) -> None:
    workload = small(tmp_path, False)["stat"]
    assert workload.share(1) == workload.amount
    assert workload.share(4) == workload.amount // 4
    assert workload.share(1000) == 1


def test_the_original_is_a_real_tree(tmp_path: Path) -> None:
    files, size = trees.make_original(tmp_path / "original")
    assert files == sum(path.is_file() for path in (tmp_path / "original").rglob("*"))
    assert 150 < files < 600
    assert size > 1_000_000
    assert not list(tmp_path.rglob("__pycache__"))
