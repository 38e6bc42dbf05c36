"""ninefuse-stat: what it makes of snapshots, and what it says where there are none.

Snapshots are made up, with figures that can be worked out by hand; the attribute is a real one on
an ordinary directory, which the command takes for a mount.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ninefuse
from ninefuse.stats import ATTRIBUTE, Problem, ask, command
from ninefuse.stats.ask import Reply
from ninefuse.stats.snapshot import (
    Lock,
    Operation,
    Snapshot,
    between,
    parse,
    percentile,
    since_mount,
    total,
)
from ninefuse.stats.table import table

ROOT = Path(str(ninefuse.__file__)).resolve().parent.parent
LIMIT = 30.0
NAME = "ninefuse-stat: "

SNAPSHOT: dict[str, Any] = {
    "version": 2,
    "ninefuse": "0.1.0",
    "pid": 123,
    "source": "/src",
    "mountpoint": "/mnt",
    "model": "second",
    "threads": 16,
    "time": 1_700_000_000.0,
    "uptime": 20.0,
    "operations": {
        "lookup": {
            "count": 10,
            "errors": {"ENOENT": 3},
            "on_dispatcher": 1,
            "crossings": 18,
            "latency_us": {"14.336": 5, "163.84": 4, "2.62144e+06": 1},
        },
        "forget": {
            "count": 30,
            "errors": {},
            "on_dispatcher": 30,
            "crossings": 0,
            "latency_us": {"0.256": 30},
        },
    },
    "requests": {"running": 7, "queued": 6, "held_back": 5},
    "locks": {
        "rename lock": {
            "waits": 3,
            "waited": 0.01,
            "longest_wait": 0.004,
            "readers": 2,
            "writing": False,
            "waiting": 1,
        },
        "fid table": {
            "waits": 0,
            "waited": 0,
            "longest_wait": 0,
            "readers": 0,
            "writing": True,
            "waiting": 0,
        },
    },
    "fids": {"known": 51, "open": 11},
    "descriptors": {"open": 32, "nodes": 8},
    "memory": {"resident": 26_000_000},
}


def snapshot(**changes: Any) -> Snapshot:
    return parse(json.dumps({**SNAPSHOT, **changes}))


def later(seconds: float = 2.0) -> dict[str, Any]:
    """A snapshot of the same daemon, so many seconds after SNAPSHOT, to be changed further."""
    value = copy.deepcopy(SNAPSHOT)
    value["time"] += seconds
    value["uptime"] += seconds
    return value


def operation(latencies: dict[float, int], **changes: Any) -> Operation:
    fields = {"errors": {}, "on_dispatcher": 0, "crossings": 0, **changes}
    return Operation(count=sum(latencies.values()), latencies=latencies, **fields)


def rows(lines: list[str]) -> dict[str, list[str]]:
    """The rows of the operations, by name, in the table's order; their words."""
    begin = next(n for n, line in enumerate(lines) if line.startswith("operation"))
    return {words[0]: words[1:] for words in (line.split() for line in lines[begin + 1 :])}


# Snapshots


def test_a_snapshot_is_read() -> None:
    found = snapshot()
    assert (found.ninefuse, found.pid, found.source, found.mountpoint) == (
        "0.1.0",
        123,
        "/src",
        "/mnt",
    )
    assert (found.model, found.threads, found.time, found.uptime) == ("second", 16, 1.7e9, 20.0)
    assert (found.running, found.queued, found.held_back) == (7, 6, 5)
    assert (found.fids, found.open_fids, found.descriptors, found.nodes) == (51, 11, 32, 8)
    assert found.memory == 26_000_000
    assert found.operations["lookup"] == Operation(
        10, {"ENOENT": 3}, 1, 18, {14.336: 5, 163.84: 4, 2621440.0: 1}
    )
    assert found.locks["rename lock"] == Lock(3, 0.01, 0.004, 2, False, 1)


def test_another_version_says_to_update() -> None:
    with pytest.raises(Problem, match="version 1, .* update") as failure:
        snapshot(version=1)
    assert failure.value.code == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '"text"',
        json.dumps({**SNAPSHOT, "pid": "123"}),
        json.dumps({**SNAPSHOT, "pid": -1}),
        json.dumps({**SNAPSHOT, "pid": True}),
        json.dumps({**SNAPSHOT, "uptime": float("nan")}),
        json.dumps({**SNAPSHOT, "locks": {"it": 1}}),
        json.dumps({**SNAPSHOT, "locks": {"it": {**SNAPSHOT["locks"]["fid table"], "writing": 1}}}),
        json.dumps({key: value for key, value in SNAPSHOT.items() if key != "memory"}),
        json.dumps(
            {
                **SNAPSHOT,
                "operations": {"x": {**SNAPSHOT["operations"]["lookup"], "latency_us": {"nan": 1}}},
            }
        ),
    ],
)
def test_what_is_no_snapshot_is_refused(text: str) -> None:
    with pytest.raises(Problem, match="holds no counters"):
        parse(text)


# Percentiles


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        ({}, (None, None, None, None)),
        ({16.0: 1}, (16, 16, 16, 16)),
        # Half of two is reached by the first, and half of three by the second.
        ({1.0: 1, 2.0: 1}, (1, 2, 2, 2)),
        ({1.0: 1, 2.0: 1, 3.0: 1}, (2, 3, 3, 3)),
        # Exactly at a bucket's edge, and one request more on its other side.
        ({1.0: 50, 2.0: 40, 3.0: 9, 4.0: 1}, (1, 2, 3, 4)),
        ({1.0: 49, 2.0: 41, 3.0: 9, 4.0: 1}, (2, 2, 3, 4)),
        ({1.0: 50, 2.0: 39, 3.0: 10, 4.0: 1}, (1, 3, 3, 4)),
        ({1.0: 50, 2.0: 40, 3.0: 8, 4.0: 2}, (1, 2, 4, 4)),
        # By the bounds, not in the order they come in.
        ({100.0: 1, 9.0: 99}, (9, 9, 9, 100)),
    ],
)
def test_percentiles(latencies: dict[float, int], expected: tuple[float | None, ...]) -> None:
    assert tuple(percentile(latencies, p) for p in (50, 90, 99, 100)) == expected


# Differences


def test_an_interval_has_what_was_counted_in_it() -> None:
    value = later(2.0)
    value["operations"]["lookup"] = {
        "count": 18,
        "errors": {"ENOENT": 5, "EACCES": 1},
        "on_dispatcher": 3,
        "crossings": 30,
        "latency_us": {"14.336": 5, "163.84": 11, "2.62144e+06": 1, "20.48": 1},
    }
    value["operations"]["mkdir"] = SNAPSHOT["operations"]["lookup"]
    value["locks"]["rename lock"].update(waits=8, waited=0.06, longest_wait=0.04)
    period = between(snapshot(), parse(json.dumps(value)))
    assert (period.seconds, period.whole) == (2.0, False)
    assert set(period.operations) == {"lookup", "mkdir"}, "forget was not called"
    assert period.operations["lookup"] == Operation(
        8, {"ENOENT": 2, "EACCES": 1}, 2, 12, {163.84: 7, 20.48: 1}
    )
    assert period.operations["mkdir"].count == 10
    lock = period.locks["rename lock"]
    assert (lock.waits, round(lock.waited, 6), lock.longest_wait) == (5, 0.05, 0.04)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pid": 124, "uptime": 21.0, "time": 1_700_000_002.0}, id="another process"),
        pytest.param({"uptime": 1.5, "time": 1_700_000_002.0}, id="the same number, but younger"),
        pytest.param({"uptime": 22.0, "time": 1_600_000_000.0}, id="clock set back"),
        pytest.param({}, id="nothing new"),
    ],
)
def test_without_a_time_between_them_it_starts_anew(changes: dict[str, Any]) -> None:
    second = snapshot(**changes)
    assert between(snapshot(), second) == since_mount(second)
    assert since_mount(second).operations["lookup"].count == 10


def test_all_together() -> None:
    one = operation({1.0: 2, 2.0: 1}, errors={"EIO": 1}, on_dispatcher=1, crossings=4)
    other = operation({2.0: 5, 3.0: 1}, errors={"EIO": 2, "EPERM": 1}, crossings=12)
    assert total([one, other]) == Operation(
        9, {"EIO": 3, "EPERM": 1}, 1, 16, {1.0: 2, 2.0: 6, 3.0: 1}
    )


# The table


def test_the_table() -> None:
    lines = table(since_mount(snapshot()))
    assert lines[:2] == [
        "/src on /mnt",
        "ninefuse 0.1.0, pid 123, up 20 s; model second, 16 threads",
    ]
    assert "requests    7 running, 6 queued, 5 held back" in lines
    assert "fids        51, 11 of them open" in lines
    assert "descriptors 32, 8 of them for nodes" in lines
    assert "memory      26.0 MB" in lines
    assert "rename lock       3  10.0 ms  4.00 ms  2 readers, 1 waiting" in lines
    assert "fid table         0      0 s      0 s  a writer" in lines
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d, the 20\.0 s since the mount", x) for x in lines)
    assert lines[-4:] == [
        "operation     per s     p50     p90     p99     max disp cross errors",
        # 40 in 20 s: half of them is reached by a forget, 90 % by the sixth lookup.
        "all            2.00 0.26 us  164 us  2.62 s  2.62 s  78%   0.5 ENOENT 3",
        "forget         1.50 0.26 us 0.26 us 0.26 us 0.26 us 100%   0.0",
        "lookup         0.50 14.3 us  164 us  2.62 s  2.62 s  10%   1.8 ENOENT 3",
    ]


def test_rates_are_those_of_the_interval() -> None:
    value = later(2.5)
    value["operations"]["lookup"]["count"] += 5
    value["operations"]["lookup"]["crossings"] += 10
    value["operations"]["lookup"]["latency_us"]["14.336"] += 5
    lines = table(between(snapshot(), parse(json.dumps(value))))
    assert any(line.endswith(", the last 2.5 s") for line in lines)
    assert rows(lines) == {
        "lookup": ["2.00", *("14.3", "us") * 4, "0%", "2.0"],
    }


def test_the_most_frequent_operation_comes_first() -> None:
    operations = {
        name: {**SNAPSHOT["operations"]["lookup"], "count": count, "on_dispatcher": 0}
        for name, count in (("read", 5), ("write", 50), ("open", 5), ("never", 0))
    }
    lines = table(since_mount(snapshot(operations=operations)))
    assert list(rows(lines)) == ["all", "write", "open", "read"]


def test_without_requests_there_is_a_line_instead() -> None:
    whole = table(since_mount(snapshot(operations={}, uptime=0.0)))
    assert whole[-1].endswith(", the 0.0 s since the mount: no requests")
    idle = between(snapshot(), parse(json.dumps(later(3.0))))
    assert table(idle)[-1].endswith(", the last 3.0 s: no requests")


@pytest.mark.parametrize("size", [0, 1, 999, 99_999, 10**9, 10**15])
@pytest.mark.parametrize("microseconds", ["0.256", "999.7", "1.04858e+06", "9.2e9", "inf"])
def test_the_table_fits_a_terminal(size: int, microseconds: str) -> None:
    busy = {
        "count": size + 1,
        "errors": {"EPROTONOSUPPORT": size, "ENOENT": size // 2, "EIO": size // 3},
        "on_dispatcher": size,
        "crossings": size * 20,
        "latency_us": {microseconds: size + 1},
    }
    value = {
        **later(1e5),
        "source": "/a/rather/long/path" * 9,
        "mountpoint": "/mount point" * 9,
        "threads": 1000,
        "operations": {"copy_file_range": busy, "removexattr": busy},
        "requests": {"running": size, "queued": size, "held_back": size},
        "memory": {"resident": size},
    }
    lines = table(since_mount(parse(json.dumps(value))))
    assert max(map(len, lines)) <= 80
    found = rows(lines)
    assert set(found) == {"all", "copy_file_r", "removexattr"}
    # The columns are where their headings are, whatever they hold.
    heading = next(line for line in lines if line.startswith("operation"))
    for line in lines[-3:]:
        assert line[heading.index("disp") - 1] == line[heading.index("cross") - 1] == " "


def test_an_error_that_does_not_fit_is_counted() -> None:
    errors = {"ENOENT": 3231, "EACCES": 12, "EIO": 3}
    busy = {**SNAPSHOT["operations"]["lookup"], "errors": errors}
    lines = table(since_mount(snapshot(operations={"lookup": busy})))
    assert lines[-1].endswith(" ENOENT 3231, +15")


def test_names_cannot_draw_on_the_terminal() -> None:
    value = snapshot(source="/a\x1b[2Jb", operations={"\x1b": SNAPSHOT["operations"]["lookup"]})
    text = "\n".join(table(since_mount(value)))
    assert "\x1b" not in text
    assert r"/a\x1b[2Jb on /mnt" in text


def test_a_short_terminal_has_the_most_frequent_ones() -> None:
    period = since_mount(
        snapshot(
            operations={
                f"op{n}": {
                    **SNAPSHOT["operations"]["lookup"],
                    "count": 1000 - n,
                    "on_dispatcher": 0,
                }
                for n in range(20)
            }
        )
    )
    whole = table(period)
    for limit in (20, len(whole) - 1):
        lines = table(period, limit)
        assert len(lines) == limit
        assert lines[:-1] == whole[: limit - 1]
        assert lines[-1] == f"({len(whole) - limit + 1} more, less frequent)"
    for enough in (len(whole), 10_000, 3):
        assert table(period, enough) == whole


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_ages(seconds: float, expected: str) -> None:
    assert f"up {expected};" in table(since_mount(snapshot(uptime=seconds)))[1]


# The command


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A directory with the attribute, as a mount's root has it."""
    try:
        publish(tmp_path, SNAPSHOT)
    except OSError as error:
        pytest.skip(f"no extended attributes in {tmp_path}: {error.strerror}")
    return tmp_path


def publish(directory: Path, value: object) -> None:
    os.setxattr(directory, ATTRIBUTE, json.dumps(value).encode())


def run(*words: object, stdout: Any = subprocess.PIPE) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", command.__name__, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout, done.stderr


def fails(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run the command in this process, and return its code and its one line."""
    code = command.main([*map(str, words)])
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(NAME)
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return code, err.removeprefix(NAME).removesuffix("\n")


def test_it_shows_the_attribute_of_a_directory(published: Path) -> None:
    code, out, err = run(published)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "/src on /mnt"
    assert rows(out.splitlines())["lookup"][0] == "0.50"


def test_json_is_the_snapshot_itself(published: Path) -> None:
    publish(published, {**SNAPSHOT, "something": "new"})
    code, out, err = run("--json", published)
    assert (code, err) == (0, "")
    assert json.loads(out) == {**SNAPSHOT, "something": "new"}
    assert out.startswith('{\n  "version": 2,\n')


def test_it_starts_without_the_libraries_of_the_daemon() -> None:
    program = (
        f"import sys, {command.__name__}; print(sorted({{'pyfuse3', 'trio'}} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert out.stdout == "[]\n"


def test_a_directory_that_is_no_mount(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, line = fails(capfd, tmp_path)
    assert code == 1
    assert line.startswith(f"{tmp_path} is in no mount of ninefuse (but of ")


def test_a_file_system_without_such_attributes(capfd: pytest.CaptureFixture[str]) -> None:
    code, line = fails(capfd, "/proc/self")
    assert (code, line) == (
        1,
        "/proc/self is in no mount of ninefuse (but of proc, mounted on /proc)",
    )


@pytest.mark.parametrize("name", ["missing", "file/below it", "two\nlines"])
def test_a_directory_that_does_not_exist(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    code, line = fails(capfd, tmp_path / name)
    assert code == 1
    assert line.endswith(": no such directory")


def test_what_is_in_the_attribute_may_be_something_else(
    capfd: pytest.CaptureFixture[str], published: Path
) -> None:
    os.setxattr(published, ATTRIBUTE, b"\xff{")
    assert fails(capfd, published)[0] == 1
    publish(published, {**SNAPSHOT, "version": 7})
    code, line = fails(capfd, "--json", published)
    assert code == 1
    assert line.endswith("update ninefuse, and mount anew")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(errno.ENOTCONN, ""), "/mnt/x: the daemon of this mount has died: "),
        (Reply(errno.EACCES, "", "fuse.ninefuse", "/mnt"), "/mnt: permission denied: "),
        (Reply(errno.ENOTSUP, "", "fuse.ninefuse", "/mnt"), "/mnt is mounted with -o noxattr"),
        (Reply(errno.ENODATA, "", "fuse.ninefuse", "/mnt"), "/mnt: this ninefuse does not publ"),
        (Reply(errno.ENOTSUP, "", "fuse.mine", "/mnt"), "/mnt (fuse.mine) is no mount of ninefuse"),
        (Reply(errno.ENODATA, "", "fuse.mine", "/mnt"), "/mnt/x is in no mount of ninefuse (but"),
        (Reply(errno.ENODATA, ""), "/mnt/x is in no mount of ninefuse"),
        (Reply(errno.ELOOP, ""), f"/mnt/x: {os.strerror(errno.ELOOP)}"),
    ],
)
def test_what_is_wrong_is_said(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    reply: Reply,
    message: str,
) -> None:
    monkeypatch.setattr(ask, "look", lambda path: reply)
    code, line = fails(capfd, "/mnt/x")
    assert code == 1
    assert line.startswith(message)
    assert ("noxattr" in line) == (reply.error == errno.ENOTSUP)


def test_below_a_mount_it_is_the_mount_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, published: Path
) -> None:
    below = published / "below"
    below.mkdir()
    monkeypatch.setattr(ask, "mount_of", lambda path: ("fuse.any", str(published)))
    reply = ask.look(str(below))
    assert (reply.error, reply.mountpoint) == (0, str(published))
    assert json.loads(reply.value) == SNAPSHOT
    monkeypatch.setattr(ask, "mount_of", lambda path: ("ext4", str(published)))
    assert ask.look(str(below)).error == errno.ENODATA, "only FUSE mounts are ours"


def test_the_mount_of_a_path() -> None:
    assert ask.mount_of("/proc/self/status") == ("proc", "/proc")
    with pytest.raises(FileNotFoundError):
        ask.mount_of("/proc/missing")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("/mnt", "/mnt"),
        ("/mnt", "--watch"),
        ("/mnt", "--watch", "0.99"),
        ("/mnt", "--watch", "-1"),
        ("/mnt", "--watch", "nan"),
        ("/mnt", "--watch", "inf"),
        ("/mnt", "--watch", "1s"),
        ("/mnt", "--wat", "2"),
    ],
)
def test_a_wrong_command_line(capfd: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, line = fails(capfd, *words)
    assert code == 2
    assert line.endswith("(see ninefuse-stat --help)")


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "at least 1" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_a_full_disk_is_no_traceback(published: Path) -> None:
    with open("/dev/full", "w") as full:
        code, _, err = run(published, stdout=full)
    assert (code, err) == (1, f"{NAME}cannot print: {os.strerror(errno.ENOSPC)}\n")


# A mount that hangs


def hang(path: str) -> Reply:
    time.sleep(LIMIT)
    return Reply(0, "")


def children() -> list[int]:
    """The children of this process, those included that have ended and were not collected."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_mount_that_does_not_answer(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    monkeypatch.setattr(ask, "look", hang)
    monkeypatch.setattr(command, "LIMIT", 0.2)
    begin = time.monotonic()
    code, line = fails(capfd, "/mnt")
    assert code == 1
    assert line.startswith("/mnt does not answer within 0.2 s")
    assert 0.2 <= time.monotonic() - begin < 5
    assert children() == before


def test_who_watches_is_told_and_goes_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: str) -> Reply:
        time.sleep(0.5)
        return Reply(0, "late")

    monkeypatch.setattr(ask, "look", slow)
    monkeypatch.setattr(command, "LIMIT", 0.1)
    assert command._read("/mnt", patient=True) == "late"
    assert capfd.readouterr().err == f"{NAME}/mnt does not answer within 0.1 s: waiting\n"


def test_a_child_that_fails_is_noticed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "look", lambda path: os._exit(1))
    assert fails(capfd, "/mnt") == (1, "the child process that reads the counters has failed")


# Watching


class Watcher:
    """ninefuse-stat --watch 1 on a directory; its output is read from a pipe or a terminal."""

    def __init__(self, directory: Path, *, terminal: bool) -> None:
        self._end, theirs = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", command.__name__, "--watch", "1", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        os.close(theirs)
        self.seen = ""

    def read_until(self, pattern: str) -> str:
        """Return the output up to the pattern's end; what comes after it is kept."""
        deadline = time.monotonic() + LIMIT
        while not (match := re.search(pattern, self.seen)):
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._end], [], [], left)[0], self.seen
            self.seen += os.read(self._end, 1 << 16).decode()
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._end)


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def watcher(request: pytest.FixtureRequest, published: Path) -> Iterator[Watcher]:
    watcher = Watcher(published, terminal=request.param)
    yield watcher
    watcher.end()


def test_watching(watcher: Watcher, published: Path, request: pytest.FixtureRequest) -> None:
    terminal = "terminal" in request.node.name
    first = watcher.read_until(r"lookup .*\n")
    value = later(4.0)
    value["operations"]["lookup"]["count"] += 8
    publish(published, value)
    second = watcher.read_until(r"lookup .*\n")
    assert "the 20.0 s since the mount" in first
    assert "the last 4.0 s" in second
    assert re.search(r"lookup +2\.00 ", second)
    assert first.startswith("\x1b[H\x1b[2J") == terminal
    assert ("\x1b[H" in second) == terminal
    assert ("\x1b" in first + second) == terminal
    watcher.process.send_signal(signal.SIGINT)
    assert watcher.process.wait(LIMIT) == 0
    assert watcher.process.stderr is not None
    assert watcher.process.stderr.read() == b""


def test_it_ends_when_the_mount_is_gone(published: Path) -> None:
    watcher = Watcher(published, terminal=False)
    try:
        watcher.read_until(r"lookup .*\n")
        os.removexattr(published, ATTRIBUTE)
        _, err = watcher.process.communicate(timeout=LIMIT)
        assert watcher.process.returncode == 1
        assert err.startswith(f"{NAME}{published} is in no mount of ninefuse".encode())
    finally:
        watcher.end()
