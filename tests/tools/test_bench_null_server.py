"""The null server on a real mount: what it answers, and that nothing of it stays."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninefuse.bench import BenchError, Processes, catalogue, dd, workloads
from ninefuse.bench.mounted import Mounted, mounts_below
from ninefuse.bench.null_server import SESSIONS
from ninefuse.bench.users import Unsupported

LIMIT = 20.0
NULL_SERVER = (sys.executable, "-m", "ninefuse.bench.null_server")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module", params=SESSIONS)
def mount(
    request: pytest.FixtureRequest, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mounted]:
    """One server for all, on each session; leaving it raises unless it ends well."""
    path = tmp_path_factory.mktemp("null").resolve()
    command = [*NULL_SERVER, "--session", request.param, str(path)]
    with Mounted(processes, "null", command, path) as mounted:
        yield mounted
    assert mounts_below(path) == []


def said(processes: Processes, mount: Mounted, script: str) -> str:
    """Run a shell in the mount, and return what it printed."""
    command = ["sh", "-euc", f'cd "$0"; {script}', str(mount.mountpoint)]
    return processes.run(command, LIMIT).output.decode()


def test_names_of_a_certain_form_exist(processes: Processes, mount: Mounted) -> None:
    out = said(processes, mount, "stat -c '%F %s' file-8192-x dir-7 dir-3-7 dir-7/file-5-y")
    lines = out.splitlines()
    assert [lines[0], lines[3]] == ["regular file 8192", "regular file 5"]
    assert [line.split()[0] for line in lines[1:3]] == ["directory"] * 2


def test_others_do_not(processes: Processes, mount: Mounted) -> None:
    with pytest.raises(BenchError, match="No such file"):
        said(processes, mount, "stat nothing")


def test_reads_are_zeros_to_the_end(processes: Processes, mount: Mounted) -> None:
    assert said(processes, mount, "wc -c <file-3000001-r") == "3000001\n"
    assert said(processes, mount, "tr -d '\\0' <file-3000001-r") == ""


def test_writes_are_counted(processes: Processes, mount: Mounted) -> None:
    out = said(
        processes,
        mount,
        "dd if=/dev/zero of=out bs=4k count=5 oflag=sync 2>&1; stat -c %s out;"
        " dd if=/dev/zero of=out bs=1k count=2 2>/dev/null; stat -c %s out; rm out; ls",
    )
    assert out.splitlines()[-2:] == ["20480", "2048"]


def test_what_is_created_is_remembered_until_it_is_removed(
    processes: Processes, mount: Mounted
) -> None:
    out = said(
        processes,
        mount,
        "mkdir made; : >made/a; : >made/b; chmod 600 made/a; stat -c %a made/a; ls made;"
        " rmdir made 2>/dev/null || echo full; rm -r made; ls; test -e made || echo gone",
    )
    assert out.split() == ["600", "a", "b", "full", "gone"]


def test_a_directory_lists_as_many_files_as_its_name_says(
    processes: Processes, mount: Mounted
) -> None:
    assert said(processes, mount, "ls -U dir-700-x | wc -l; ls dir-x | wc -l") == "700\n0\n"
    assert said(processes, mount, "ls -lU dir-3-y | tail -n +2 | cut -c1").split() == ["-"] * 3


@pytest.mark.parametrize("workload", catalogue.workloads(Path(), 0.001, False), ids=lambda w: w.key)
def test_every_workload_runs_on_it_or_says_why_not(
    processes: Processes, mount: Mounted, workload: workloads.Workload
) -> None:
    place = dd.Place("null", mount.mountpoint, None, mount.server)
    try:
        found = workload.run(processes, place, 2)
    except Unsupported:
        assert workload.key.startswith("tree-") or workload.key == "write-user"
    else:
        assert found.value > 0
        assert found.spent.server.system >= 0


def test_it_forgets_what_the_kernel_forgets(processes: Processes, mount: Mounted) -> None:
    assert said(processes, mount, "ls") == ""


def test_it_says_how_it_is_called() -> None:
    done = subprocess.run(NULL_SERVER, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
