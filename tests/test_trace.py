"""--trace: what it says of real requests, and its file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from conftest import start
from helpers_executor import answer, begin, drive, passed, until
from mounting import Mount, Watchdog, wait_until
from trace_format import Event, check, left_out, number_of, read, requests

from ninefuse import executor, ops
from ninefuse.calls import blocking
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse.adapter import Adapter
from ninefuse.locks import RenameLock, TableLock
from ninefuse.settings import MODELS
from ninefuse.tree.session import Session
from ninefuse.watching import trace_file
from ninefuse.watching.trace_file import Lane, Piece, TraceFile, Way
from ninefuse.watching.tracing import Tracer

FS_IOC_GETFLAGS = 0x80086601

ROOT = Path(__file__).resolve().parent.parent


# What real mounts write


def do_everything(top: Path, source: Path) -> None:
    """Have the kernel send each callback that docs/operations.md has a row for."""
    (source / "old").write_bytes(b"old")
    directory = top / "directory"
    directory.mkdir()
    file = directory / "file"
    fd = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)
    os.write(fd, b"hello")
    os.fsync(fd)
    os.close(fd)
    assert (top / "old").read_bytes() == b"old"
    os.chmod(file, 0o640)
    os.setxattr(file, "user.a", b"value")
    assert os.getxattr(file, "user.a") == b"value"
    assert "user.a" in os.listxattr(file)
    os.removexattr(file, "user.a")
    os.symlink("file", directory / "symlink")
    assert os.readlink(directory / "symlink") == "file"
    os.link(file, directory / "link")
    os.mkfifo(directory / "fifo")
    assert len(os.listdir(directory)) == 4
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)
    os.statvfs(top)
    for call in (say_more, lock):
        with contextlib.suppress(OSError):  # which pyfuse3 has no callbacks for
            call(file)
    file.rename(directory / "moved")
    assert not (top / "absent").exists()
    for name in os.listdir(directory):
        (directory / name).unlink()
    directory.rmdir()
    time.sleep(0.15)  # the attributes of the root are old by now
    os.stat(top)


def say_more(file: Path) -> None:
    os.close(os.open(file.parent, os.O_TMPFILE | os.O_RDWR, 0o600))
    with open(file, "r+b") as one, open(file.parent.parent / "other", "w+b") as other:
        os.posix_fallocate(one.fileno(), 0, 8192)
        os.lseek(one.fileno(), 0, os.SEEK_HOLE)
        os.copy_file_range(one.fileno(), other.fileno(), 4096)
        fcntl.ioctl(one, FS_IOC_GETFLAGS, bytes(8))


def lock(file: Path) -> None:
    with open(file, "r+b") as one:
        fcntl.lockf(one, fcntl.LOCK_EX)
        fcntl.fcntl(one, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        fcntl.flock(one, fcntl.LOCK_EX)


class Trace(NamedTuple):
    """What was done once on a mount."""

    model: str
    session: str
    events: list[Event]


@pytest.fixture(scope="module")
def traces() -> dict[tuple[str, str], list[Event]]:
    return {}


@pytest.fixture(params=[*((model, "native") for model in MODELS), ("second", "pyfuse3")])
def trace(
    request: pytest.FixtureRequest,
    guard: Watchdog,
    tmp_path: Path,
    traces: dict[tuple[str, str], list[Event]],
) -> Trace:
    """A model and a session, and the trace of a mount on which everything was done once."""
    model, session = request.param
    if (model, session) not in traces:
        file = tmp_path / "trace"
        # So that the model alone decides which calls are made where.
        options = ["--model", model, "--session", session, "--trace", str(file)]
        options += ["-o", "inline=off,attr_timeout=0.1"]
        mount = start(guard, tmp_path, *options)
        try:
            do_everything(mount.path, mount.source)
        finally:
            mount.end()
        mount.log.check()
        traces[model, session] = read(file)
    return Trace(model, session, traces[model, session])


def answers(events: list[Event]) -> Iterator[tuple[int, str, Event]]:
    """Number, callback and final arguments of each request."""
    for number, found in requests(events).items():
        last = [event for event in found if event["ph"] == "e"][-1]
        yield number, last["name"], last["args"]


def test_a_trace_is_in_the_format(trace: Trace) -> None:
    model, events = trace.model, trace.events
    check(events)
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert "dispatcher" in names
    assert ("worker-0" in names) == (model != "none")
    (title,) = (e["args"]["name"] for e in events if e["name"] == "process_name")
    assert title.endswith(f"model {model}")


def documented_messages() -> dict[str, str]:
    """For each callback of the table in docs/operations.md a pattern of its messages."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = text[text.index("| callback |") :].split("\n\n")[0]
    names = "|".join(sorted(ops.__all__, key=len, reverse=True))
    patterns = {}
    for row in table.split("\n")[2:]:
        callbacks, messages = (cell.strip() for cell in row.split("|")[1:3])
        messages = re.sub(r"\([^)]*\)", "", messages)  # what they are given
        for callback in callbacks.split(", "):
            said = messages
            if " or " in said:  # "mknod, mkdir or symlink; walk, getattr": its own
                said = callback + said[said.index(";") :]
            if said.startswith("none"):
                said = ""
            first, each = said, ""
            if " each " in said:
                first, _, each = said.partition(", then ") if ", then " in said else ("", "", said)
            one, more = (
                "".join(f"T{name} " for name in re.findall(rf"\b({names})\b", part))
                for part in (first, each)
            )
            patterns[callback] = one + (f"(?:{more})*" if more else "")
    return patterns


def test_the_messages_of_each_callback_are_those_documented(
    trace: Trace,
) -> None:
    """And each callback of the table that the session has was seen."""
    documented = documented_messages()
    assert documented["create"] == "Twalk Tlcreate Twalk Tgetattr "
    assert documented["readdirplus"] == "Treaddir (?:Twalk Tgetattr )*"
    seen = Counter[str]()
    for _, callback, args in answers(trace.events):
        said = "".join(f"{name} " for name in args["messages"])
        if callback in ("version", "attach"):
            continue
        if callback == "readdirplus":
            # A directory's own entry needs no walk; its parent's is not looked at.
            said, alone = re.subn(r"(?<!Twalk )Tgetattr ", "", said, count=1)
            assert alone == (said != "Treaddir "), args
        if "error" in args:
            # The messages up to the one that failed; of an attribute's fid, none is left.
            assert documented[callback].startswith(said), (callback, args)
        else:
            assert re.fullmatch(documented[callback], said), (callback, args)
            seen[callback] += 1
    if trace.session == "pyfuse3":
        sent = {callback for callback in documented if callback in vars(Adapter)}
        sent = sent - {"readdir"} | {"readdirplus"}  # which it has but one callback for
    else:
        sent = documented.keys() - {"syncfs"}  # the kernel sends none to such a mount
    assert seen.keys() == sent


def test_the_first_model_crosses_at_each_call_and_the_second_once(
    trace: Trace,
) -> None:
    """Crossings are arrows, drawn from the lanes that everything was seen on."""
    model, events = trace.model, trace.events
    # pyfuse3's answers leave from trio's thread.
    second = 2 if trace.session == "pyfuse3" else 1
    found = requests(events)
    b_of: dict[str, set[int]] = {}
    for number, callback, args in answers(events):
        arrows = [e for e in found[number] if e["ph"] in "sf"]
        calls = [e for e in found[number] if e.get("cat") == "call"]
        assert len(arrows) == 2 * args["crossings"]
        assert len(calls) == args["calls"]
        b_of.setdefault(callback, set()).add(len(calls))
        expected = {"none": 0, "first": 2 * len(calls), "second": second * min(1, len(calls))}
        assert args["crossings"] == expected[model], (callback, args)
        lanes = {e["tid"] for e in calls}
        assert (0 in lanes) == (model == "none" and bool(calls))
        if model == "second":
            assert len(lanes) <= 1, "the rest of a request stays with its worker"
    assert b_of["create"] == {3}
    assert 1 in b_of["write"]
    assert 6 in b_of["readdirplus"]


def test_each_request_shows_its_way(trace: Trace) -> None:
    """Received, run, queued, called, replied to, in the order of time; the fid is named."""
    model, events = trace.model, trace.events
    comes_back = model == "first" or (model, trace.session) == ("second", "pyfuse3")
    create = next(
        found
        for found in requests(events).values()
        if any(e["ph"] == "b" and e["name"] == "create" for e in found)
    )
    by = Counter(e["cat"] for e in create if e["ph"] == "X")
    assert by["receive"] == by["reply"] == 1
    assert by["stretch"] == {"none": 1, "first": 7, "second": 2}[model]
    assert by["call"] == 3
    waits = Counter(e["name"] for e in create if e["ph"] == "b")
    assert waits["queued"] == {"none": 0, "first": 3, "second": 1}[model]
    assert waits["returning"] == (waits["queued"] if comes_back else 0)
    calls = [e for e in create if e.get("cat") == "call"]
    assert [e["name"] for e in calls] == ["create file", "path descriptor", "stat descriptor"]
    messages = [e for e in create if e.get("cat") == "message"]
    assert all("fid" in e["args"] for e in messages)
    receive, reply = (
        next(e for e in create if e.get("cat") == cat) for cat in ("receive", "reply")
    )
    assert receive["dur"] > 0
    assert reply["dur"] > 0
    assert receive["ts"] < messages[0]["ts"] < calls[0]["ts"] < reply["ts"]
    if model != "none":
        assert any(e.get("cat") == "deferred" for e in events), "closes made by workers"


@pytest.mark.limit(300.0)
def test_ten_thousand_requests(guard: Watchdog, tmp_path: Path) -> None:
    """Each is there once, as a viewer wants it, or is among those that the file says it lacks.

    A machine that has other work to do may leave the trace's thread behind.
    """
    file = tmp_path / "trace"
    mount = start(guard, tmp_path, "--trace", str(file), "-o", "noxattr")
    try:
        with open(mount.path / "file", "wb", buffering=0) as out:
            for _ in range(10_000):
                out.write(b"x" * 64)
    finally:
        mount.end()
    mount.log.check()
    events = read(file)
    check(events)
    # The end of a request tells its messages; the end of a wait does not.
    done = Counter(e["name"] for e in events if e["ph"] == "e" and "messages" in e.get("args", {}))
    lost = left_out(events)["requests"]
    assert done["write"] <= 10_000 <= done["write"] + lost
    assert done.total() + lost < 10_050, "no more are said to be left out than are"


def test_a_killed_daemon_leaves_a_trace_that_can_be_read(guard: Watchdog, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    mount = start(guard, tmp_path, "--trace", str(file))
    try:
        for number in range(50):
            (mount.path / f"file{number}").write_bytes(b"x")
        wait_until(lambda: file.stat().st_size > 100_000, "the trace to be written")
        mount.signal(signal.SIGKILL)
        mount.wait()
    finally:
        mount.end()
    events = read(file, torn=True)
    last = number_of(events[-1])  # of which it may lack some
    check([e for e in events if last is None or number_of(e) != last])
    assert sum(e["ph"] == "e" and e["name"] == "create" for e in events) > 10


def test_a_trace_that_cannot_be_written_is_refused(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"ended with 2:\n.*trace file .*No such file"):
        new_mount("--trace", str(tmp_path / "absent" / "trace"))


# Waits for locks


def traced(
    tmp_path: Path, model: str, scenario: Callable[[executor.Executor, Tracer], object]
) -> list[Event]:
    """Run a scenario under a model with a tracer; the trace."""
    file = tmp_path / "trace"
    tracer = Tracer(TraceFile(str(file), "test"))

    async def run(driver: executor.Executor) -> None:
        driver.observer = tracer
        await scenario(driver, tracer)  # type: ignore[misc]

    with tracer:
        drive(model, 4, run)
        tracer.close()
    events = read(file)
    check(events)
    return events


@pytest.mark.parametrize("model", ["first", "second"])
def test_waits_for_the_rename_lock_are_shown_and_only_they(tmp_path: Path, model: str) -> None:
    lock, gate = RenameLock(), threading.Event()
    meanwhile: list[float] = []

    async def holder() -> None:
        async with lock.reading:
            await blocking(None, passed, gate)

    async def waiter() -> None:
        await blocking(None, int)
        async with lock.writing:
            await blocking(None, int)

    async def scenario(driver: executor.Executor, tracer: Tracer) -> None:
        async with trio.open_nursery() as nursery:
            await begin(nursery, driver, "holder", holder())
            await begin(nursery, driver, "waiter", waiter())
            await until(lambda: lock.statistics().waiting)
            meanwhile.append(time.perf_counter() * 1e6)
            await trio.sleep(0.001)
            meanwhile.append(time.perf_counter() * 1e6)
            gate.set()

    events = traced(tmp_path, model, scenario)
    waits = [e for e in events if e["ph"] in "be" and e["name"].startswith("waits")]
    assert [e["name"] for e in waits] == ["waits for rename lock (write)"] * 2
    assert waits[0]["ts"] <= meanwhile[0] < meanwhile[1] <= waits[1]["ts"]
    answers_ = {callback: args for _, callback, args in answers(events)}
    assert answers_["waiter"]["calls"] == 2
    assert "error" not in answers_["waiter"]


def test_waits_for_the_fid_table_are_shown_in_the_call_they_hold_up(tmp_path: Path) -> None:
    table, held, gate = TableLock(), threading.Event(), threading.Event()
    meanwhile: list[float] = []

    def hold() -> None:
        with table.writing:
            held.set()
            wait_until(lambda: table.statistics().waiting, "the call to wait")
            meanwhile.append(time.perf_counter() * 1e6)
        gate.set()

    def look() -> None:
        with table.reading:
            pass

    async def looks() -> None:
        await blocking(None, look)

    async def scenario(driver: executor.Executor, tracer: Tracer) -> None:
        table.on_wait = tracer.waited_for_table
        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        passed(held)
        await answer(driver, "looks", looks())
        passed(gate)

    events = traced(tmp_path, "second", scenario)
    (wait,) = (e for e in events if e.get("cat") == "lock")
    (call,) = (e for e in events if e.get("cat") == "call")
    assert wait["name"] == "waits for fid table (read)"
    assert wait["tid"] == call["tid"]
    assert call["ts"] <= wait["ts"] <= meanwhile[0] <= wait["ts"] + wait["dur"]
    assert wait["ts"] + wait["dur"] <= call["ts"] + call["dur"]


@pytest.mark.parametrize("model", MODELS)
def test_errors_and_what_nobody_waits_for_are_traced(tmp_path: Path, model: str) -> None:
    """A body does and raises under a tracer what it does without."""

    async def fails() -> None:
        await blocking(None, os.stat, "/nonexistent")

    async def background() -> None:
        await blocking(None, int)

    async def scenario(driver: executor.Executor, tracer: Tracer) -> None:
        driver.in_background("background", background())
        driver.defer(os.getpid)
        with pytest.raises(FileNotFoundError):
            await answer(driver, "fails", fails())

    events = traced(tmp_path, model, scenario)
    found = {callback: args for _, callback, args in answers(events)}
    assert found["fails"]["error"] == "ENOENT"
    assert found["background"]["calls"] == 1
    assert [e["name"] for e in events if e.get("cat") == "deferred"] == ["getpid"]


def test_operations_do_the_same_under_a_tracer(tmp_path: Path) -> None:
    """Results, and errors of messages that are given wrong arguments."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"hello")
    seen: list[object] = []

    async def scenario(driver: executor.Executor, tracer: Tracer) -> None:
        session = Session(driver)
        session.announces = True
        fd = os.open(source, os.O_PATH | os.O_DIRECTORY)
        await answer(driver, "version", ops.version(session, ops.MAX_MSIZE, ops.VERSION))
        await answer(driver, "attach", ops.attach(session, 1, fd))
        await answer(driver, "walk", ops.walk(session, 1, 7, [b"file"]))
        await answer(driver, "lopen", ops.lopen(session, 7, os.O_RDONLY))
        seen.append(await answer(driver, "read", ops.read(session, 7, 1, 3)))
        with pytest.raises(OSError, match="Bad file descriptor"):
            await answer(driver, "write", ops.write(session, 7, 0, b"x"))
        await answer(driver, "clunk", ops.clunk(session, 7))
        session.fids.clear()
        os.close(fd)

    events = traced(tmp_path, "second", scenario)
    assert seen == [b"ell"]
    fids = [e["args"].get("fid") for e in events if e.get("cat") == "message"]
    assert set(fids) == {None, 1, 7}, "version has none"


# The file


def way(tag: int) -> Way:
    found = Way(tag, "write", tag * 1000)
    found.pieces.append(Piece(Lane(0, "dispatcher"), tag * 1000, tag * 1000 + 500, "", -1))
    return found


def test_what_cannot_be_written_in_time_is_dropped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing waits for a file that is slow, and memory is bounded: a FIFO that nobody reads."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = TraceFile(str(path), "title")
    file.lane("dispatcher")
    count = 40_000
    begin_ = time.monotonic()
    for tag in range(1, count + 1):
        file.put(way(tag))
    assert time.monotonic() - begin_ < 10
    closing = threading.Thread(target=file.close)
    closing.start()
    os.set_blocking(reader, True)
    with open(reader, encoding="utf-8") as lines:
        events = json.load(lines)
    closing.join(10)
    assert not closing.is_alive()
    check(events)
    kept = sum(e["ph"] == "e" for e in events)
    limit = trace_file._MOST_WAITING // way(1).size()
    assert kept <= limit + 5000, "what was waiting, and what a pipe holds"
    assert f"lacks {count - kept} requests" in caplog.text
    assert left_out(events)["requests"] == count - kept > 0


def test_what_comes_too_late_is_left_out_and_told_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end has a bound; what waits by then is counted, in the file too."""
    monkeypatch.setattr(trace_file, "_PATIENCE", 0.05)
    monkeypatch.setattr(trace_file, "_LAST_WORDS", 20.0)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = TraceFile(str(path), "title")
    lane = file.lane("dispatcher")
    for tag in range(1, 5001):
        file.put(way(tag))
        file.put_deferred(lane, "close", tag * 1000 + 600, tag * 1000 + 700)
    closing = threading.Thread(target=file.close)
    closing.start()
    # The pipe is full: nothing goes on before somebody reads, after the deadline.
    wait_until(lambda: time.monotonic() > file._deadline, "the deadline")
    os.set_blocking(reader, True)
    with open(reader, encoding="utf-8") as lines:
        events = json.load(lines)
    closing.join(20)
    assert not closing.is_alive()
    check(events)
    lost = left_out(events)
    assert lost["requests"] == 5000 - sum(e["ph"] == "e" for e in events) > 0
    assert lost["deferred"] == 5000 - sum(e.get("cat") == "deferred" for e in events) > 0
    assert f"lacks {lost['requests']} requests" in caplog.text


def test_a_file_that_is_full_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_file, "_MOST_BYTES", 10_000)
    path = tmp_path / "trace"
    file = TraceFile(str(path), "title")
    file.lane("dispatcher")
    with caplog.at_level(logging.WARNING):
        for tag in range(1, 101):
            file.put(way(tag))
            time.sleep(0.0005)
        file.close()
    events = read(path)
    check(events)
    assert events[-1]["name"] == "the file is full: the rest is left out"
    assert path.stat().st_size <= 10_200
    assert caplog.text.count("ends here") == 1


def test_a_disk_that_gets_full_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What came up to the limit in the middle of a line is taken back."""
    path = tmp_path / "trace"
    file = TraceFile(str(path), "title")
    file.lane("dispatcher")
    room = [3000]
    write = os.write

    def limited(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(fd, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", limited)
    for tag in range(1, 101):
        file.put(way(tag))
        time.sleep(0.0005)
    file.close()
    events = read(path, torn=True)
    assert 5 < len(events) < 60
    assert path.read_text(encoding="utf-8").endswith("}")
    assert caplog.text.count("ends here: No space left on device") == 1


def test_closes_are_bounded_too_and_a_stuck_file_does_not_keep_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_file, "_MOST_WAITING", 1000)
    monkeypatch.setattr(trace_file, "_PATIENCE", 0.1)
    monkeypatch.setattr(trace_file, "_LAST_WORDS", 0.0)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = TraceFile(str(path), "title")
    lane = file.lane("worker-0")
    for _ in range(20_000):
        file.put_deferred(lane, "close", 1, 2)
    assert file._queue.qsize() <= 1000
    file.close()
    assert "cannot be written to its end" in caplog.text
    os.close(reader)  # the writer gets EPIPE, and ends


def test_a_full_disk_is_told_at_once() -> None:
    with pytest.raises(Failure, match="No space left") as failure:
        TraceFile("/dev/full", "title")
    assert failure.value.code == ExitCode.USAGE
