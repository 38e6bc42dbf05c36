"""Where log messages go, how they look, and how many of one kind there are."""

import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninefuse import logs
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.options import Settings

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


def record(message: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("ninefuse.test", level, __file__, 1, message, args, None)


def test_foreground_logs_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(SETTINGS, daemon=False)
    logging.getLogger("ninefuse.test").info("hello %d", 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d .* \[{os.getpid()}\] INFO ninefuse.test: hello 3\n", err
    )


def test_daemon_logs_to_the_file_and_keeps_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    logs.configure(with_log(path), daemon=True)
    logging.getLogger("ninefuse.test").warning("caf\u00e9")
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first == "before"
    assert second.endswith("WARNING ninefuse.test: caf\u00e9")
    assert capsys.readouterr().err == ""


def test_foreground_uses_a_given_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(with_log(tmp_path / "log"), daemon=False)
    logging.getLogger("ninefuse.test").warning("both")
    assert "both" in (tmp_path / "log").read_text()
    assert "both" in capsys.readouterr().err


def test_daemon_without_syslog_logs_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "SYSLOG_SOCKET", str(tmp_path / "none"))
    logs.configure(SETTINGS, daemon=True)
    assert [type(handler) for handler in our_handlers()] == [logging.NullHandler]
    logging.getLogger("ninefuse.test").error("unheard")
    assert capsys.readouterr().err == ""


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    logs.configure(with_log(tmp_path / "one"), daemon=True)
    logs.configure(with_log(tmp_path / "two"), daemon=True)
    logging.getLogger("ninefuse.test").warning("once")
    assert (tmp_path / "one").read_text() == ""
    assert (tmp_path / "two").read_text().count("once") == 1


def test_log_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        logs.configure(with_log(tmp_path / "none" / "log"), daemon=True)
    assert caught.value.code == ExitCode.USAGE
    assert str(tmp_path / "none" / "log") in caught.value.message


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
    line = logs.LineFormatter(with_time=False).format(record("lost %s", name))
    assert line == r"INFO ninefuse.test: lost a\nERROR ninefuse: forged\x1b[2J\udcff"


def test_a_traceback_follows_indented_and_escaped() -> None:
    event = record("went wrong")
    try:
        raise ValueError("one\ntwo\x1b")
    except ValueError:
        event.exc_info = sys.exc_info()
    first, *rest = logs.LineFormatter(with_time=False).format(event).split("\n")
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


def notes(repeats: logs.RepeatFilter, events: list[logging.LogRecord]) -> list[str | None]:
    """Return the note of each event that passes, None for each that does not."""
    return [event.repeat_note if repeats.filter(event) else None for event in events]  # type: ignore[attr-defined]


def test_repeats_are_counted_and_said_once() -> None:
    clock = Clock()
    repeats = logs.RepeatFilter(limit=2, seconds=10, clock=clock)
    more = " (more like this within 10 s are only counted)"
    assert notes(repeats, [record("lost %d", number) for number in range(5)]) == [
        "",
        more,
        None,
        None,
        None,
    ]
    clock.now += 9.9
    assert notes(repeats, [record("lost %d", 6)]) == [None]
    clock.now += 0.1
    assert notes(repeats, [record("lost %d", number) for number in range(3)]) == [
        " (4 more like this were not logged)",
        more,
        None,
    ]
    clock.now += 10
    assert notes(repeats, [record("lost %d", 1)]) == [" (1 more like this were not logged)"]
    clock.now += 10
    assert notes(repeats, [record("lost %d", 1)]) == [""]


def test_other_messages_are_not_held_back() -> None:
    repeats = logs.RepeatFilter(limit=2, seconds=10, clock=Clock())
    for _ in range(5):
        repeats.filter(record("lost %d", 1))
    assert repeats.filter(record("found %d", 1))
    assert repeats.filter(record("lost %d", 1, level=logging.ERROR))


def test_debug_messages_all_pass() -> None:
    repeats = logs.RepeatFilter(limit=2, seconds=10, clock=Clock())
    assert all(repeats.filter(record("request", level=logging.DEBUG)) for _ in range(50))


def test_the_filter_does_not_grow_without_end() -> None:
    repeats = logs.RepeatFilter(limit=2, seconds=10, clock=Clock())
    for number in range(5000):
        assert repeats.filter(record(f"formatted before logging: {number}"))
    assert len(repeats._seen) <= 1000


def test_configured_handlers_limit_repeats_each_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(with_log(tmp_path / "log"), daemon=False)
    for number in range(logs.REPEAT_LIMIT + 5):
        logging.getLogger("ninefuse.test").error("slow: %d", number)
    for text in ((tmp_path / "log").read_text(), capsys.readouterr().err):
        lines = text.splitlines()
        assert len(lines) == logs.REPEAT_LIMIT
        assert lines[0].endswith("slow: 0")
        assert lines[-1].endswith("are only counted)")


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
    syslog_socket: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logs.SyslogHandler("syslog")

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
    assert capsys.readouterr().err == ""
