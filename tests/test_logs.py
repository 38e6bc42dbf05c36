"""Where log messages go, how they look, and how many of one kind there are."""

import logging
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from misplaced import put_fifo, put_hard_link, put_symlink, put_their_own

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.process import loglines, logoutputs, logs
from ninefuse.settings import Settings
from ninefuse.watching.trace_file import TraceFile

SETTINGS = Settings(source="/src", mountpoint="/mnt")
LOGGERS = ("", "pyfuse3", "trio")


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    levels = [logging.getLogger(name).level for name in LOGGERS]
    yield
    for handler in our_handlers():
        logging.getLogger().removeHandler(handler)
        handler.close()
    for name, level in zip(LOGGERS, levels, strict=True):
        logging.getLogger(name).setLevel(level)


def our_handlers() -> list[logging.Handler]:
    return [handler for handler in logging.getLogger().handlers if handler.name == "ninefuse"]


def with_log(path: Path, **fields: object) -> Settings:
    return Settings(source="/src", mountpoint="/mnt", log_file=str(path), **fields)  # type: ignore[arg-type]


def written(path: Path) -> str:
    """What is in a log file once all that was logged is written."""
    logs.finish()
    return path.read_text(encoding="utf-8")


def shown(capfd: pytest.CaptureFixture[str]) -> str:
    """What came on stderr since this was asked last, likewise."""
    logs.finish()
    return capfd.readouterr().err


def say(text: str) -> None:
    """Log a line, and see it written."""
    logging.getLogger("ninefuse.test").warning("%s", text)
    logs.finish()


def record(message: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("ninefuse.test", level, __file__, 1, message, args, None)


def test_foreground_logs_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure(SETTINGS, daemon=False)
    logging.getLogger("ninefuse.test").info("hello %d", 3)
    logs.finish()
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d .* \[{os.getpid()}\] INFO ninefuse.test: hello 3\n", err
    )


def test_daemon_logs_to_the_file_and_keeps_what_is_in_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    logs.configure(with_log(path), daemon=True)
    logging.getLogger("ninefuse.test").warning("caf\u00e9")
    first, second = written(path).splitlines()
    assert first == "before"
    assert second.endswith("WARNING ninefuse.test: caf\u00e9")
    assert shown(capfd) == ""


def test_foreground_uses_a_given_file_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure(with_log(tmp_path / "log"), daemon=False)
    logging.getLogger("ninefuse.test").warning("both")
    assert "both" in written(tmp_path / "log")
    assert "both" in shown(capfd)


def test_daemon_without_syslog_logs_nowhere_until_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logs, "SYSLOG_SOCKET", "syslog")
    logs.configure(SETTINGS, daemon=True)
    logging.getLogger("ninefuse.test").error("unheard")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as late:
        late.bind("syslog")
        late.settimeout(10)
        logging.getLogger("ninefuse.test").error("heard")
        assert late.recv(1000).endswith(b": heard")
    assert shown(capfd) == ""


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    logs.configure(with_log(tmp_path / "one"), daemon=True)
    logs.configure(with_log(tmp_path / "two"), daemon=True)
    logging.getLogger("ninefuse.test").warning("once")
    assert written(tmp_path / "one") == ""
    assert written(tmp_path / "two").count("once") == 1


def test_log_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        logs.configure(with_log(tmp_path / "none" / "log"), daemon=True)
    assert caught.value.code == ExitCode.USAGE
    assert str(tmp_path / "none" / "log") in caught.value.message


# The file and its rotation


def test_a_file_that_was_renamed_is_opened_anew_with_the_first_ones_mode(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = os.umask(0o027)
    try:
        logs.configure(with_log(path), daemon=True)
        os.umask(0)  # as the mount sets it
        say("one")
        path.rename(tmp_path / "log.1")
        say("two")
        path.unlink()
        say("three")
    finally:
        os.umask(before)
    assert written(tmp_path / "log.1").endswith(": one\n")
    assert written(path).endswith(": three\n")
    assert written(path).count("\n") == 1
    assert path.stat().st_mode & 0o777 == 0o640


def test_until_a_file_can_be_opened_anew_the_one_before_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    logs.configure(with_log(path), daemon=True)
    path.rename(tmp_path / "log.1")
    path.mkdir()
    for number in range(3):
        say(f"still {number}")
    path.rmdir()
    say("heard again")
    first, second, *more = written(tmp_path / "log.1").splitlines()
    assert first.endswith(": still 0")
    assert second.endswith(
        f"log file {path}: not opened anew (Is a directory); writing on to the one that was open"
    )
    assert [line[-1] for line in more] == ["1", "2"], "and that is said once"
    assert written(path).count("\n") == 1
    assert written(path).endswith("heard again\n")
    assert shown(capfd) == ""


def test_what_is_no_file_is_kept(tmp_path: Path) -> None:
    """A daemon's own stderr, say, which it has no longer after a while."""
    read_end, write_end = os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        (tmp_path / "log").symlink_to(f"/proc/self/fd/{write_end}")
        logs.configure(with_log(tmp_path / "log"), daemon=True)
        say("one")
        os.dup2(null, write_end)
        say("two")
        text = os.read(read_end, 1000).decode()
        assert [line.split()[-1] for line in text.splitlines()] == ["one", "two"]
    finally:
        for descriptor in (read_end, write_end, null):
            os.close(descriptor)


def test_a_closed_file_is_not_opened_anew(tmp_path: Path) -> None:
    handler = logoutputs.QueuedHandler(logoutputs.LogFile(str(tmp_path / "log")))
    handler.close()
    (tmp_path / "log").unlink()
    handler.handle(record("late"))
    assert not (tmp_path / "log").exists()


# What others put in its place


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that everybody may write, as /tmp is."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
PUT = [
    (put_symlink, "a symlink in a directory that others may write"),
    (put_hard_link, "a file with several names, in a directory that others may write"),
    (put_fifo, "No such device or address"),  # that nobody reads
    pytest.param(
        put_their_own, "another user's, in a directory that others may write", marks=needs_root
    ),
]


@pytest.mark.parametrize(("put", "reason"), PUT)
def test_what_others_put_in_the_place_of_the_file_is_not_written_to(
    shared: Path, put: Callable[[Path, Path], None], reason: str
) -> None:
    path, victim = shared / "log", shared.parent / "victim"
    victim.write_text("theirs\n")
    logs.configure(with_log(path), daemon=True)
    path.rename(shared / "log.1")
    put(path, victim)
    for number in range(3):
        say(f"line {number}")
    lines = written(shared / "log.1").splitlines()
    assert [line[-6:] for line in lines if "log file" not in line] == ["line 0", "line 1", "line 2"]
    [said] = [line for line in lines if "log file" in line]
    assert f"log file {path}: not opened anew ({reason})" in said
    assert victim.read_text() == "theirs\n"
    path.unlink()
    say("in a new one")
    assert written(path).endswith("in a new one\n")


def test_a_pipe_with_a_reader_is_no_file_to_be_opened_anew(shared: Path) -> None:
    path = shared / "log"
    logs.configure(with_log(path), daemon=True)
    path.rename(shared / "log.1")
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        say("one")
        say("two")
        # Nothing has come. Without a writer it would be at its end.
        with open(path, "wb"), pytest.raises(BlockingIOError):
            os.read(reader, 100)
    finally:
        os.close(reader)
    assert "not opened anew (no regular file)" in written(shared / "log.1")


@pytest.mark.parametrize(("put", "reason"), PUT)
def test_at_the_start_it_is_refused(
    shared: Path, put: Callable[[Path, Path], None], reason: str
) -> None:
    path, victim = shared / "log", shared.parent / "victim"
    victim.write_text("theirs\n")
    put(path, victim)
    with pytest.raises(Failure) as caught:
        logs.configure(with_log(path), daemon=True)
    assert caught.value.code == ExitCode.USAGE
    assert f"log file {path} cannot be opened ({reason}): give one" in caught.value.message
    with pytest.raises(Failure) as caught:
        TraceFile(str(path), "title")
    assert f"trace file {path} cannot be written ({reason}): give one" in caught.value.message
    assert victim.read_text() == "theirs\n"


def test_in_a_directory_of_ones_own_a_symlink_is_followed(tmp_path: Path) -> None:
    """At each opening, as whoever rotates the file it leads to expects."""
    path, kept = tmp_path / "log", tmp_path / "kept"
    path.symlink_to("kept")
    logs.configure(with_log(path), daemon=True)
    say("one")
    kept.rename(tmp_path / "kept.1")
    say("two")
    assert written(tmp_path / "kept.1").endswith("one\n")
    assert written(kept).endswith("two\n")
    assert written(kept).count("\n") == 1


# Nobody waits for it


def test_whoever_logs_does_not_wait_for_a_pipe_that_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logoutputs, "_MOST_WAITING", 2000)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    logs.configure(with_log(tmp_path / "pipe", log_level="debug"), daemon=True)
    logger = logging.getLogger("ninefuse.test")

    def fill() -> None:
        for number in range(20_000):
            logger.debug("line %d", number)

    filler = threading.Thread(target=fill, daemon=True)
    filler.start()
    filler.join(20)
    assert not filler.is_alive()
    # All that was kept comes in its order once somebody reads, and how many were not.
    text, lost = b"", 0
    numbers: list[int] = []
    while len(numbers) + lost < 20_000:
        text += _read_soon(reader)
        numbers = [int(number) for number in re.findall(rb"line (\d+)\n", text)]
        lost = sum(map(int, re.findall(rb"(\d+) lines are missing here, which came faster", text)))
    assert numbers == sorted(numbers)
    assert numbers[:2000] == list(range(2000))
    assert lost
    assert len(numbers) + lost == 20_000
    logger.debug("at last")
    while b"at last" not in text:
        text += _read_soon(reader)
    os.close(reader)


def _read_soon(reader: int) -> bytes:
    """What a pipe has next; it fails if nothing comes for a long time."""
    ready, _, _ = select.select([reader], [], [], 20)
    assert ready, "nothing is written any more"
    return os.read(reader, 1 << 16)


def test_a_log_that_takes_nothing_does_not_keep_a_process_from_ending(tmp_path: Path) -> None:
    """Neither in the foreground nor where nothing is cleaned up."""
    program = (
        "import logging, os, sys\n"
        "from ninefuse.process import logs\n"
        "from ninefuse.settings import Settings\n"
        "logs.configure(Settings('/src', '/mnt', log_file=sys.argv[1]), daemon=True)\n"
        "for n in range(1500):\n"
        "    logging.getLogger(f'ninefuse.{n}').warning('%s', 'x' * 100)\n"
        "if sys.argv[2:]: logs.finish(); os._exit(3)\n"
        "sys.exit(3)\n"
    )
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for words in ([], ["at once"]):
            done = subprocess.run(
                [sys.executable, "-c", program, str(tmp_path / "pipe"), *words],
                timeout=20,
                check=False,
            )
            assert done.returncode == 3
    finally:
        os.close(reader)


def test_short_commands_lose_nothing_and_a_forked_child_writes_its_own(tmp_path: Path) -> None:
    program = (
        "import logging, os, sys\n"
        "from ninefuse.process import logs\n"
        "from ninefuse.settings import Settings\n"
        "def settings(name): return Settings('/src', '/mnt', log_file=sys.argv[1] + name)\n"
        "logs.configure(settings('parent'), daemon=True)\n"
        "logging.getLogger('ninefuse').warning('before')\n"
        "pid = os.fork()\n"
        "if not pid: logs.configure(settings('child'), daemon=True)\n"
        "for n in range(3000):\n"
        "    logging.getLogger(f'ninefuse.{n}').warning('after %d', n)\n"
        "if pid: os.waitpid(pid, 0)\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, f"{tmp_path}/"], timeout=20, check=True
    )
    parent = (tmp_path / "parent").read_text().splitlines()
    child = (tmp_path / "child").read_text().splitlines()
    assert [line.split(": ")[1] for line in child] == [f"after {n}" for n in range(3000)]
    assert [line.split(": ")[1] for line in parent] == [
        "before",
        *(f"after {n}" for n in range(3000)),
    ]


def test_the_journal_is_told_levels_and_no_time(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    logs.configure(SETTINGS, daemon=False)
    try:
        raise ValueError
    except ValueError:
        logging.getLogger("ninefuse.test").exception("said")
    logging.getLogger("ninefuse.test").warning("more")
    lines = shown(capfd).splitlines()
    assert lines[0] == "<3>ERROR ninefuse.test: said"
    assert lines[1] == "<3>    Traceback (most recent call last):"
    assert lines[-1] == "<4>WARNING ninefuse.test: more"
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    logs.configure(SETTINGS, daemon=False)
    logging.getLogger("ninefuse.test").warning("on a terminal")
    assert re.match(r"\d{4}-", shown(capfd))


@pytest.mark.parametrize(
    ("fields", "own", "library"),
    [
        ({"log_level": "error"}, logging.ERROR, logging.ERROR),
        ({"log_level": "warning"}, logging.WARNING, logging.WARNING),
        ({"log_level": "info"}, logging.INFO, logging.WARNING),
        ({"log_level": "debug"}, logging.DEBUG, logging.WARNING),
        ({"debug": True}, logging.DEBUG, logging.DEBUG),
        ({"debug": True, "log_level": "error"}, logging.DEBUG, logging.DEBUG),
    ],
)
def test_levels(tmp_path: Path, fields: dict[str, object], own: int, library: int) -> None:
    logs.configure(with_log(tmp_path / "log", **fields), daemon=True)
    assert logging.getLogger("ninefuse.test").getEffectiveLevel() == own
    assert logging.getLogger("pyfuse3").getEffectiveLevel() == library
    assert logging.getLogger("trio.abc").getEffectiveLevel() == library


def test_a_file_name_cannot_forge_a_line() -> None:
    name = os.fsdecode(b"a\nERROR ninefuse: forged\x1b[2J\xff")
    line = loglines.LineFormatter(with_time=False).format(record("lost %s", name))
    assert line == r"INFO ninefuse.test: lost a\nERROR ninefuse: forged\x1b[2J\udcff"


def test_a_traceback_follows_indented_and_escaped() -> None:
    event = record("went wrong")
    try:
        raise ValueError("one\ntwo\x1b")
    except ValueError:
        event.exc_info = sys.exc_info()
    first, *rest = loglines.LineFormatter(with_time=False).format(event).split("\n")
    assert first == "INFO ninefuse.test: went wrong"
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-2:] == ["    ValueError: one", r"    two\x1b"]
    assert all(line.startswith("    ") for line in rest)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Repeats(logging.Handler):
    """A handler with a filter that lets two of a kind pass in ten seconds, and its clock."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.repeats = loglines.RepeatFilter(self, limit=2, seconds=10, clock=self.clock)
        self.addFilter(self.repeats)
        self.setFormatter(loglines.LineFormatter(with_time=False))
        self._lines: list[str] = []

    def emit(self, event: logging.LogRecord) -> None:
        self._lines.append(self.format(event).removeprefix("INFO ninefuse.test: "))

    def lines(self) -> list[str]:
        """What has been logged since this was asked last."""
        lines, self._lines = self._lines, []
        return lines


MORE = " (more like this within 10 s are only counted)"


def test_repeats_are_counted_and_said_once() -> None:
    log = Repeats()
    for number in range(5):
        log.handle(record("lost %d", number))
    assert log.lines() == ["lost 0", "lost 1" + MORE]
    log.clock.now += 9.9
    log.handle(record("lost %d", 5))
    assert log.lines() == []
    log.clock.now += 0.1
    for number in range(6, 9):
        log.handle(record("lost %d", number))
    assert log.lines() == [
        "lost 5 (repeated 4 times, this was the last)",
        "lost 6",
        "lost 7" + MORE,
    ]
    log.clock.now += 10
    log.handle(record("lost %d", 9))
    assert log.lines() == ["lost 8 (repeated 1 times, this was the last)", "lost 9"]
    log.clock.now += 10
    log.handle(record("lost %d", 10))
    assert log.lines() == ["lost 10"]


def test_the_count_of_one_message_is_said_with_the_next_of_another_kind() -> None:
    log = Repeats()
    for number in range(5):
        log.handle(record("lost %d", number))
    log.clock.now += 5
    for number in range(4):
        log.handle(record("found %d", number))
    log.lines()
    log.clock.now += 5
    log.handle(record("else"))
    assert log.lines() == ["lost 4 (repeated 3 times, this was the last)", "else"]
    log.clock.now += 5
    log.repeats.tell()
    assert log.lines() == ["found 3 (repeated 2 times, this was the last)"]
    log.clock.now += 100
    log.repeats.tell(all_of_them=True)
    assert log.lines() == []


def test_counts_are_said_when_asked_and_all_of_them_at_the_end() -> None:
    log = Repeats()
    for _ in range(122):
        log.handle(record("lost"))
    log.lines()
    log.repeats.tell()
    assert log.lines() == [], "more of it may come"
    log.repeats.tell(all_of_them=True)
    assert log.lines() == ["lost (repeated 120 times, this was the last)"]
    log.handle(record("lost"))
    assert log.lines() == ["lost"], "counted anew"


def test_a_count_goes_without_the_traceback_and_keeps_the_level() -> None:
    log = Repeats()
    for _ in range(4):
        event = record("lost", level=logging.ERROR)
        try:
            raise ValueError
        except ValueError:
            event.exc_info = sys.exc_info()
        log.handle(event)
    log.lines()
    log.repeats.tell(all_of_them=True)
    assert log.lines() == ["ERROR ninefuse.test: lost (repeated 2 times, this was the last)"]


def test_one_text_from_two_places_is_two_messages() -> None:
    log = Repeats()
    for line in (1, 1, 1, 2):
        event = record("lost")
        event.lineno = line
        log.handle(event)
    assert log.lines() == ["lost", "lost" + MORE, "lost"]


def test_what_was_asked_for_is_never_held_back() -> None:
    log = Repeats()
    for _ in range(50):
        event = record("counters")
        event.__dict__.update(loglines.ASKED_FOR)
        log.handle(event)
    log.repeats.tell(all_of_them=True)
    assert log.lines() == ["counters"] * 50


def test_other_messages_are_not_held_back() -> None:
    log = Repeats()
    for _ in range(5):
        log.handle(record("lost %d", 1))
    log.lines()
    log.handle(record("found %d", 1))
    log.handle(record("lost %d", 1, level=logging.ERROR))
    assert log.lines() == ["found 1", "ERROR ninefuse.test: lost 1"]


def test_debug_messages_all_pass() -> None:
    log = Repeats()
    for _ in range(50):
        log.handle(record("request", level=logging.DEBUG))
    assert log.lines() == ["DEBUG ninefuse.test: request"] * 50


def test_the_filter_does_not_grow_without_end_and_forgets_no_count() -> None:
    log = Repeats()
    for _ in range(7):
        log.handle(record("lost"))
    for number in range(5000):
        log.handle(record(f"formatted before logging: {number}"))
    assert len(log.repeats._seen) <= 1000
    assert "lost (repeated 5 times, this was the last)" in log.lines()


def test_a_record_that_cannot_be_formatted_stops_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure(with_log(tmp_path / "log"), daemon=True)
    (handler,) = our_handlers()
    for _ in range(logs.REPEAT_LIMIT + 5):
        handler.handle(record("%d", "no number"))
    logs.tell_repeats(all_of_them=True)
    assert written(tmp_path / "log") == ""
    assert shown(capfd).count("--- Logging error ---") == logs.REPEAT_LIMIT + 1


def test_configured_handlers_limit_repeats_each_for_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure(with_log(tmp_path / "log"), daemon=False)
    for number in range(logs.REPEAT_LIMIT + 5):
        logging.getLogger("ninefuse.test").error("slow: %d", number)
    for text in (written(tmp_path / "log"), shown(capfd)):
        lines = text.splitlines()
        assert len(lines) == logs.REPEAT_LIMIT
        assert lines[0].endswith("slow: 0")
        assert lines[-1].endswith("are only counted)")
    logs.tell_repeats()
    assert shown(capfd) == "", "its time is not over"
    logs.tell_repeats(all_of_them=True)
    for text in (written(tmp_path / "log"), shown(capfd)):
        assert text.endswith("slow: 14 (repeated 5 times, this was the last)\n")


# A syslog of our own. Its address is relative, since a socket's path may only have 107 bytes.


@pytest.fixture
def syslog_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logs, "SYSLOG_SOCKET", "syslog")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("syslog")
        listener.settimeout(10)
        yield listener


def test_daemon_without_a_file_logs_to_syslog(syslog_socket: socket.socket) -> None:
    logs.configure(Settings(source="/src", mountpoint="/mnt", log_level="debug"), daemon=True)
    # Facility daemon (3 * 8) and the severities of syslog(3).
    for level, priority in (("error", 27), ("warning", 28), ("info", 30), ("debug", 31)):
        getattr(logging.getLogger("ninefuse.test"), level)("said\n%s", level)
        line = syslog_socket.recv(1000).decode()
        assert line == (
            f"<{priority}>ninefuse[{os.getpid()}]: {level.upper()} ninefuse.test: said\\n{level}"
        )


def test_a_full_or_ended_syslog_stops_nobody(
    syslog_socket: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = logoutputs.SyslogHandler("syslog")

    def fill() -> None:
        for number in range(5000):
            handler.handle(record("filling %d", number))

    filler = threading.Thread(target=fill, daemon=True)
    filler.start()
    filler.join(10)
    assert not filler.is_alive()
    syslog_socket.close()
    handler.handle(record("unheard"))
    os.unlink("syslog")
    handler.handle(record("unheard"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as restarted:
        restarted.bind("syslog")
        restarted.settimeout(10)
        handler.handle(record("heard again"))
        assert restarted.recv(1000).endswith(b"heard again")
    handler.close()
    assert shown(capfd) == ""
