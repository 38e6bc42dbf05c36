"""Where log messages go and how they look: stderr, a file or syslog, one line an event."""

import contextlib
import errno
import logging
import os
import socket
import sys
import syslog
import threading
import time
from collections.abc import Callable

from ninefuse.exitcodes import ExitCode, Failure, one_line
from ninefuse.options import Settings

SYSLOG_SOCKET = "/dev/log"

# Of one and the same message this many are logged in this many seconds; more are only counted.
REPEAT_LIMIT = 10
REPEAT_SECONDS = 60.0

# The `extra` of lines that somebody has asked for, by a signal say: they all pass.
ASKED_FOR = {"asked_for": True}

# Loggers of the libraries, which at info and below write about every request.
_LIBRARIES = ("pyfuse3", "trio")

_LEVELS = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}

# How configure finds the handlers of an earlier call among those of others.
_HANDLER_NAME = "ninefuse"


def configure(settings: Settings, daemon: bool) -> None:
    """Set up logging for this process, in place of any earlier call.

    Arguments: settings (debug, log_level and log_file count); daemon: False adds stderr. A log
    file is used whenever one is given; a daemon without one logs to syslog, and where there is
    no syslog to nowhere.
    Raises Failure(USAGE) when the log file cannot be opened.
    """
    level = logging.DEBUG if settings.debug else _LEVELS[settings.log_level]
    handlers: list[logging.Handler] = []
    if not daemon:
        handlers.append(logging.StreamHandler(sys.stderr))
    if settings.log_file is not None:
        handlers.append(_open_file(settings.log_file))
    elif daemon:
        handlers.append(
            SyslogHandler(SYSLOG_SOCKET) if os.path.exists(SYSLOG_SOCKET) else logging.NullHandler()
        )

    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.get_name() == _HANDLER_NAME]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.set_name(_HANDLER_NAME)
        # One filter each: with a shared one every message would count once per handler.
        handler.addFilter(RepeatFilter())
        # syslog stamps time and process on its own.
        handler.setFormatter(LineFormatter(with_time=not isinstance(handler, SyslogHandler)))
        root.addHandler(handler)
    root.setLevel(level)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(level if settings.debug else max(level, logging.WARNING))
    logging.getLogger("pyfuse3").addFilter(_withdrawn)


def _open_file(path: str) -> logging.Handler:
    try:
        return logging.FileHandler(path, mode="a", encoding="utf-8")
    except OSError as error:
        raise Failure(
            ExitCode.USAGE,
            f"log file {path} cannot be opened ({error.strerror}): give one that can be written",
        ) from None


class LineFormatter(logging.Formatter):
    """One line an event, with all that is not printable escaped; tracebacks follow, indented.

    Neither a file name in a message nor one in a traceback can thus look like an event of its
    own. Argument: with_time, whether a line begins with date, time and process id.
    """

    def __init__(self, with_time: bool = True) -> None:
        stamp = "%(asctime)s [%(process)d] " if with_time else ""
        super().__init__(stamp + "%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line for the record."""
        return one_line(super().formatMessage(record) + getattr(record, "repeat_note", ""))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and, where the record has one, the traceback below it."""
        # formatMessage has left no newline in the event's own line: the rest is traceback.
        line, *rest = super().format(record).split("\n")
        return "\n".join([line, *("    " + one_line(text) for text in rest)])


def _withdrawn(record: logging.LogRecord) -> bool:
    """Pass over what pyfuse3 calls an error and what is none: a reply that nobody waits for.

    The kernel has taken the request back, since the mount is gone or the caller was killed.
    """
    reply_failed = str(record.msg).endswith(": fuse_reply_* failed with %s")
    return not (reply_failed and record.args == (os.strerror(errno.ENOENT),))


class RepeatFilter(logging.Filter):
    """Keep a message that comes again and again from filling the log.

    Messages are the same when logger, level and text template are. The last one let through
    says that more are only counted; the first one after the time says how many there were.
    Debug messages all pass, and what is marked ASKED_FOR: who asks for them wants each.
    Arguments: limit, how many pass in a period of that many seconds; clock, returns seconds.
    """

    def __init__(
        self,
        limit: int = REPEAT_LIMIT,
        seconds: float = REPEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._limit = limit
        self._seconds = seconds
        self._clock = clock
        # (logger, level, template) -> (start of the period, messages in it)
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}
        # Handlers run their filters outside their own lock. Reentrant, since a Python signal
        # handler may log in the middle of a log call.
        self._lock = threading.RLock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be logged; leave a note in record.repeat_note."""
        # Always set: the filter of another handler may have left its own note there.
        record.repeat_note = ""
        if record.levelno <= logging.DEBUG or hasattr(record, "asked_for"):
            return True
        key = (record.name, record.levelno, str(record.msg))
        with self._lock:
            now = self._clock()
            start, count = self._seen.get(key, (now, 0))
            missed = 0
            if now - start >= self._seconds:
                missed = max(0, count - self._limit)
                start, count = now, 0
            # Templates are few, unless somebody formats before logging: forget all rather than
            # grow without end.
            if len(self._seen) >= 1000 and key not in self._seen:
                self._seen.clear()
            self._seen[key] = (start, count + 1)
        if missed:
            record.repeat_note = f" ({missed} more like this were not logged)"
        elif count + 1 == self._limit:
            record.repeat_note = f" (more like this within {self._seconds:g} s are only counted)"
        return count < self._limit


class SyslogHandler(logging.Handler):
    """Send log lines to the local syslog without ever waiting for it.

    logging.handlers.SysLogHandler blocks while syslog's queue is full. That could stop the
    whole mount, and for good where syslog itself waits for a file on the mount; here a line is
    dropped instead. Argument: address, the path of syslog's datagram socket (syslog(3)).
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        # Not connected: a restarted syslog is found again by its path.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, or drop it when syslog is full or gone."""
        if record.levelno >= logging.ERROR:
            priority = syslog.LOG_ERR
        elif record.levelno >= logging.WARNING:
            priority = syslog.LOG_WARNING
        elif record.levelno >= logging.INFO:
            priority = syslog.LOG_INFO
        else:
            priority = syslog.LOG_DEBUG
        try:
            line = f"<{syslog.LOG_DAEMON | priority}>ninefuse[{os.getpid()}]: {self.format(record)}"
            with contextlib.suppress(OSError):
                self._socket.sendto(line.encode(), self._address)
        except Exception:
            # Whatever a message's own arguments do when they are formatted, logging never raises.
            self.handleError(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()
