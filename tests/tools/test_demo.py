"""The demo on tiny counts: what it shows, and that it leaves nothing behind however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blocks import block_of
from mounting import wait_until

import ninefuse
from ninefuse.bench import BenchError, Processes, dd, demo
from ninefuse.bench.mounted import (
    Limits,
    Mounted,
    file_system,
    is_mounted,
    mounts_below,
    ninefuse_command,
)

LIMIT = 60.0
TINY = ("--count", "3", "--clients", "1,3", "--files", "2")


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


class Demo:
    """Starts the demo with its scratch directory in a given one."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent

    def start(self, *words: str, path: str = "") -> subprocess.Popen[str]:
        package = Path(str(ninefuse.__file__)).resolve().parent
        return subprocess.Popen(
            [sys.executable, "-m", "ninefuse.bench.demo", "--source", str(self.parent), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(package.parent),
                "PATH": f"{path}{os.pathsep if path else ''}{os.environ['PATH']}",
            },
        )

    def run(self, *words: str, path: str = "") -> tuple[int, str, str]:
        with self.start(*words, path=path) as process:
            try:
                out, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        return process.returncode, out, err

    def users(self, program: str = "") -> list[str]:
        """Return the command lines (of that program) which name the directory."""
        found = []
        for pid in Path("/proc").iterdir():
            if not pid.name.isdigit():
                continue
            try:
                words = (pid / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            line = os.fsdecode(b" ".join(words))
            if str(self.parent) in line and program in (os.fsdecode(words[0]), ""):
                found.append(line)
        return found

    def left(self) -> list[object]:
        """Return all that is left of a demo: files, mounts, processes."""
        return [*self.parent.iterdir(), *mounts_below(self.parent), *self.users()]


@pytest.fixture
def the_demo(tmp_path: Path) -> Demo:
    parent = tmp_path / "parent of it"
    parent.mkdir()
    return Demo(parent)


def test_a_run_shows_its_table_and_leaves_nothing(the_demo: Demo) -> None:
    code, out, err = the_demo.run(*TINY)
    assert (code, err) == (0, "")
    assert the_demo.left() == []
    for mount in ("none", "first", "second", "pyfuse3"):
        assert re.search(rf"^{mount} .* files .* equal$", out, re.MULTILINE)
    assert re.search(r"^ 1      3( +[\d.]+){10}$", out, re.MULTILINE)
    assert re.search(r"^ 3      3( +[\d.]+){10}$", out, re.MULTILINE)
    assert re.search(r"^second / none at X=3: \d+\.\d\d$", out, re.MULTILINE)
    assert "best of 2 runs" in out
    assert f"kernel       Linux {os.uname().release}\n" in out
    assert f"file system  {file_system(the_demo.parent)}, " in out
    assert os.uname().nodename not in out


MOMENTS: dict[str, Callable[[Demo], object]] = {
    "scratch made": lambda the_demo: list(the_demo.parent.iterdir()),
    "daemon started": lambda the_demo: the_demo.users(sys.executable)[1:],
    "first mount": lambda the_demo: mounts_below(the_demo.parent),
    "copying": lambda the_demo: the_demo.users("cp"),
    "dd": lambda the_demo: the_demo.users("dd")[2:],
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("scratch made", signal.SIGINT),
        ("daemon started", signal.SIGTERM),
        ("first mount", signal.SIGHUP),
        ("copying", signal.SIGTERM),
        ("dd", signal.SIGINT),
    ],
)
def test_interrupted_it_leaves_nothing(the_demo: Demo, moment: str, number: signal.Signals) -> None:
    words = ("--count", "1000000", "--clients", "3", "--files", "2")
    with the_demo.start(*words) as process:
        try:
            wait_until(lambda: MOMENTS[moment](the_demo), moment, LIMIT)
            process.send_signal(number)
            time.sleep(0.05)
            process.send_signal(number)  # an impatient user changes nothing
            _, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert err == f"demo: interrupted by {number.name}\n"
    assert process.returncode == 128 + number
    assert the_demo.left() == []


def test_nobody_reads_its_output(the_demo: Demo) -> None:
    with the_demo.start(*TINY) as process:
        try:
            assert process.stdout is not None
            process.stdout.close()
            assert process.stderr is not None
            assert process.stderr.read() == ""
            assert process.wait(LIMIT) == 1
        finally:
            process.kill()
    assert the_demo.left() == []


def fake_dd(directory: Path, script: str) -> str:
    """Make a dd of that shell script, which has the real one as $dd; return its directory."""
    directory.mkdir()
    program = directory / "dd"
    program.write_text(f"#!/bin/sh\ndd=$(PATH={os.environ['PATH']} command -v dd)\n{script}\n")
    program.chmod(0o755)
    return str(directory)


def test_a_dd_that_fails_makes_it_fail(the_demo: Demo, tmp_path: Path) -> None:
    script = 'case $2 in */second/*-2) echo "no luck" >&2; exit 3; esac; exec "$dd" "$@"'
    path = fake_dd(tmp_path / "bin", script)
    code, out, err = the_demo.run(*TINY, path=path)
    assert (code, err) == (1, "demo: 3 dd on second: one failed: no luck\n")
    assert "X parallel" not in out
    assert the_demo.left() == []


def test_a_short_file_is_found_out(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_dd(tmp_path / "bin", 'exec "$dd" "$1" "$2" bs=4k count=1')
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    place = dd.Place("here", tmp_path, tmp_path)
    with pytest.raises(BenchError, match="has 4096 bytes instead of 8192"):
        dd.run(processes, place, 1, 2)


def test_dd_is_timed_and_its_files_are_removed(processes: Processes, tmp_path: Path) -> None:
    place = dd.Place("here", tmp_path, tmp_path)
    result = dd.run(processes, place, 2, 5)
    assert (result.clients, result.count) == (2, 5)
    assert 0 <= result.spent.clients.system <= result.seconds * 2.1
    assert result.rate == pytest.approx(2 * 5 * 4096 / result.seconds / 1e6)
    assert list(tmp_path.iterdir()) == []


def test_a_count_is_chosen_to_fit_the_time(processes: Processes, tmp_path: Path) -> None:
    place = dd.Place("here", tmp_path, tmp_path)
    assert dd.choose_count(processes, [place, place], 2, 1e-6) == 1
    assert dd.choose_count(processes, [place, place], 2, 100.0) > 100


def change_bytes(copy: Path) -> None:
    times = os.stat(copy / "large.bin")
    with (copy / "large.bin").open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"changed")
    os.utime(copy / "large.bin", ns=(times.st_atime_ns, times.st_mtime_ns))


def change_time(copy: Path) -> None:
    before = os.lstat(copy / "links" / "loop")
    nanoseconds = (before.st_atime_ns, before.st_mtime_ns + 1)
    os.utime(copy / "links" / "loop", ns=nanoseconds, follow_symlinks=False)


def exchange_links(copy: Path) -> None:
    """As many links as before on both files, all else the same but for who is whose."""
    times = os.stat(copy / "links").st_mtime_ns
    (copy / "links" / "hard-0").rename(copy / "links" / "other")
    (copy / "links" / "hard-1").rename(copy / "links" / "hard-0")
    (copy / "links" / "other").rename(copy / "links" / "hard-1")
    os.utime(copy / "links", ns=(times, times))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_bytes, "large.bin"),
        (lambda copy: (copy / "large.bin").chmod(0o640), "large.bin"),
        (change_time, "loop"),
        (exchange_links, "binary/0/0.bin"),
        (lambda copy: (copy / "names" / "-rf").unlink(), "no 'names/-rf' in"),
        (lambda copy: (copy / "names" / "more").touch(), "no 'names/more' in"),
    ],
)
def test_differences_are_found(
    processes: Processes, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    demo.make_tree(processes, tree, 2)
    subprocess.run(["cp", "-a", tree, copy], check=True)
    original = demo.list_tree(processes, tree)
    demo.compare(processes, tree, original, copy)
    times = os.stat(copy / "names").st_mtime_ns
    change(copy)
    os.utime(copy / "names", ns=(times, times))
    with pytest.raises(BenchError, match=message):
        demo.compare(processes, tree, original, copy)


def test_a_mount_that_hangs_is_ended_by_force(processes: Processes, tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mount point\n"
    source.mkdir()
    mountpoint.mkdir()
    limits = Limits(unmount=0.5, end=0.5)
    mounted = Mounted(processes, "it", ninefuse_command(source, mountpoint), mountpoint, limits)

    def use() -> None:
        with mounted:
            assert file_system(mountpoint).startswith("fuse")
            os.kill(mounted.server.pid, signal.SIGSTOP)
            with pytest.raises(BenchError, match="did not end within 0.2 s"):
                processes.run(["ls", str(mountpoint)], 0.2)

    with pytest.raises(BenchError, match="^it: "):
        use()
    assert not is_mounted(mountpoint)
    assert mounted.server.ended is not None


def test_a_server_that_does_not_mount_is_reported(processes: Processes, tmp_path: Path) -> None:
    command = ninefuse_command(tmp_path / "missing", tmp_path)
    mounted = Mounted(processes, "it", command, tmp_path)
    with pytest.raises(BenchError, match="it: not mounted: ninefuse: source .*missing"), mounted:
        pass


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    code, _, err = Demo(tmp_path / "missing").run(*TINY)
    assert code == 1
    assert err.startswith("demo: cannot make a directory in ")
    assert err.count("\n") == 1


FACTORS = (("source", 1), ("none", 8), ("first", 4), ("second", 2), ("pyfuse3", 4))


def results(seconds: float) -> dict[int, dict[str, list[dd.Result]]]:
    return {
        clients: {
            name: [dd.Result(clients, 1000, seconds * more * factor) for more in (1.5, 1.0)]
            for name, factor in FACTORS
        }
        for clients in (1, 100)
    }


def test_the_table_has_the_best_of_each_cell_and_ratios() -> None:
    lines = demo.table(results(0.5))
    assert lines[-2:] == [
        " 1   1000   0.50   8.2    1.0  0.12    2.0  0.25    4.1  0.50    2.0  0.25",
        "100   1000   0.50 819.2  102.4  0.12  204.8  0.25  409.6  0.50  204.8  0.25",
    ]
    assert demo.summary(results(0.5)) == [
        "second / none at X=100: 4.00",
        "Runs of one cell differ by 50% (median), 50% at most.",
    ]


@pytest.mark.parametrize("seconds", [0.005, 0.1, 9.9996, 99.996, 10_000.0])
def test_the_table_fits_a_terminal(seconds: float) -> None:
    lines = demo.table(results(seconds))
    assert max(map(len, lines)) <= 80
    assert len({len(line) for line in lines[-3:-1]}) == 1, "heading and row are as wide"


def test_without_repetitions_nothing_is_said_of_them() -> None:
    once = {x: {name: runs[:1] for name, runs in row.items()} for x, row in results(1).items()}
    assert "one run each" in demo.table(once)[0]
    assert len(demo.summary(once)) == 1


def test_readme_shows_such_a_table() -> None:
    """Its heading and the width of its columns are what the demo prints now."""
    _, text = block_of(("README.md", "source         none"))
    shown, printed = text.splitlines(), demo.table(results(1))
    assert shown[:2] == printed[-4:-2]
    assert [int(row.split()[0]) for row in shown[2:]] == [1, 2, 5, 10]
    for row in shown[2:]:
        assert len(row) == len(printed[-3]), row
        assert len(row.split()) == len(printed[-2].split()), row
