"""Where log messages go and how they look: stderr, a file or syslog, one line an event."""

import contextlib
import copy
import errno
import io
import logging
import logging.handlers
import math
import os
import socket
import stat
import sys
import syslog
import threading
import time
from collections.abc import Callable

from ninefuse.exitcodes import ExitCode, Failure, one_line
from ninefuse.options import Settings

SYSLOG_SOCKET = "/dev/log"

# Of one and the same message this many are logged in this many seconds; more are only counted,
# and the count is logged after that time.
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
    file is used whenever one is given; a daemon without one logs to syslog, and for as long as
    there is none, as early in a boot, to nowhere. Call it before the umask is changed.
    Raises Failure(USAGE) when the log file cannot be opened.
    """
    level = logging.DEBUG if settings.debug else _LEVELS[settings.log_level]
    handlers: list[logging.Handler] = []
    if not daemon:
        handlers.append(logging.StreamHandler(sys.stderr))
    if settings.log_file is not None:
        handlers.append(_open_file(settings.log_file))
    elif daemon:
        handlers.append(SyslogHandler(SYSLOG_SOCKET))

    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.get_name() == _HANDLER_NAME]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.set_name(_HANDLER_NAME)
        # One filter each: with a shared one every message would count once per handler.
        handler.addFilter(RepeatFilter(handler, REPEAT_LIMIT, REPEAT_SECONDS))
        # syslog and the journal stamp time and process on their own.
        in_journal = handler is handlers[0] and not daemon and _is_journal(2)
        handler.setFormatter(
            LineFormatter(
                with_time=not isinstance(handler, SyslogHandler) and not in_journal,
                with_priority=in_journal,
            )
        )
        root.addHandler(handler)
    root.setLevel(level)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(level if settings.debug else max(level, logging.WARNING))
    logging.getLogger("pyfuse3").addFilter(_withdrawn)


def tell_repeats(*, all_of_them: bool = False) -> None:
    """Log how many messages were only counted: those whose time is over, or all at the end."""
    for handler in logging.getLogger().handlers:
        for repeats in handler.filters:
            if isinstance(repeats, RepeatFilter):
                repeats.tell(all_of_them=all_of_them)


def _is_journal(descriptor: int) -> bool:
    """Whether a descriptor leads to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    stream = os.environ.get("JOURNAL_STREAM")
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        return stream == f"{status.st_dev}:{status.st_ino}"
    return False


def _open_file(path: str) -> logging.Handler:
    try:
        return LogFile(path)
    except OSError as error:
        raise Failure(
            ExitCode.USAGE,
            f"log file {path} cannot be opened ({error.strerror}): give one that can be written",
        ) from None


class LogFile(logging.handlers.WatchedFileHandler):
    """A file that is opened anew when it has been renamed or removed, as logrotate does.

    It is looked for in the directory that was there at the start: a path could lead into the
    mount, by which the daemon would wait for itself. What is no file (/dev/stderr, a pipe) stays
    open as it is. Argument: path, of the file.
    """

    def __init__(self, path: str) -> None:
        self._umask = os.umask(0o077)  # which can only be read by being set
        os.umask(self._umask)
        directory, name = os.path.split(path)
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            in_it = f"/proc/self/fd/{self._directory}/{name}"
            super().__init__(in_it, mode="a", encoding="utf-8")
        except OSError:
            os.close(self._directory)
            raise

    def reopenIfNeeded(self) -> None:
        """Open the file anew where another one has its name, or none."""
        if self._is_file:
            super().reopenIfNeeded()

    def _open(self) -> io.TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            # Later the process has no umask of its own (mount.py).
            descriptor = os.open(path, flags, 0o666 & ~self._umask)
            self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return descriptor

        return open(self.baseFilename, "a", encoding="utf-8", opener=opener)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, or drop it when there is no file to be had."""
        if self._directory >= 0:
            with contextlib.suppress(OSError):
                super().emit(record)

    def close(self) -> None:
        """Close the file."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
        super().close()


def _priority(record: logging.LogRecord) -> int:
    """syslog's number for a record's level."""
    if record.levelno >= logging.ERROR:
        return syslog.LOG_ERR
    if record.levelno >= logging.WARNING:
        return syslog.LOG_WARNING
    return syslog.LOG_INFO if record.levelno >= logging.INFO else syslog.LOG_DEBUG


class LineFormatter(logging.Formatter):
    """One line an event, with all that is not printable escaped; tracebacks follow, indented.

    Neither a file name in a message nor one in a traceback can thus look like an event of its
    own. Arguments: with_time, whether a line begins with date, time and process id;
    with_priority, whether each begins with its level as the journal reads it (sd-daemon(3)).
    """

    def __init__(self, with_time: bool = True, with_priority: bool = False) -> None:
        stamp = "%(asctime)s [%(process)d] " if with_time else ""
        super().__init__(stamp + "%(levelname)s %(name)s: %(message)s")
        self._with_priority = with_priority

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line for the record."""
        return one_line(super().formatMessage(record) + getattr(record, "repeat_note", ""))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and, where the record has one, the traceback below it."""
        # formatMessage has left no newline in the event's own line: the rest is traceback.
        line, *rest = super().format(record).split("\n")
        mark = f"<{_priority(record)}>" if self._with_priority else ""
        return "\n".join([mark + line, *(mark + "    " + one_line(text) for text in rest)])


def _withdrawn(record: logging.LogRecord) -> bool:
    """Pass over what pyfuse3 calls an error and what is none: a reply that nobody waits for.

    The kernel has taken the request back, since the mount is gone or the caller was killed.
    """
    reply_failed = str(record.msg).endswith(": fuse_reply_* failed with %s")
    return not (reply_failed and record.args == (os.strerror(errno.ENOENT),))


class _Repeated:
    """One kind of message: since when it is counted, how often it came, and the last one."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.count = 0
        self.last: logging.LogRecord | None = None  # that was not logged


class RepeatFilter(logging.Filter):
    """Keep a message that comes again and again from filling the log.

    Messages are the same when they have one text template and come from one place. The last one
    let through says that more are only counted. How many there were is said once the time is
    over: with the next message of whatever kind, or by `tell`.
    Debug messages all pass, and what is marked ASKED_FOR: who asks for them wants each.
    Arguments: handler, whose filter this is, and which gets the counts; limit, how many pass in a
    period of that many seconds; clock, returns seconds.
    """

    def __init__(
        self,
        handler: logging.Handler,
        limit: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._handler = handler
        self._limit = limit
        self._seconds = seconds
        self._clock = clock
        self._seen: dict[tuple[str, int, str, int, str], _Repeated] = {}
        self._due = math.inf  # when the first period is over in which something was not logged
        # Handlers run their filters outside their own lock. Reentrant, since a Python signal
        # handler may log in the middle of a log call.
        self._lock = threading.RLock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be logged; leave a note in record.repeat_note."""
        # Always set: the filter of another handler may have left its own note there.
        record.repeat_note = getattr(record, "repeated", "")
        if record.levelno <= logging.DEBUG or hasattr(record, "asked_for"):
            return True
        self.tell()
        key = (record.name, record.levelno, record.pathname, record.lineno, str(record.msg))
        # Templates are few, unless somebody formats before logging: forget all rather than
        # grow without end.
        if len(self._seen) >= 1000 and key not in self._seen:
            self.tell(all_of_them=True)
        with self._lock:
            now = self._clock()
            repeated = self._seen.get(key)
            if repeated is None or now - repeated.start >= self._seconds:
                repeated = self._seen[key] = _Repeated(now)
            repeated.count += 1
            if repeated.count == self._limit:
                record.repeat_note = (
                    f" (more like this within {self._seconds:g} s are only counted)"
                )
            if repeated.count <= self._limit:
                return True
            repeated.last = record
            self._due = min(self._due, repeated.start + self._seconds)
            return False

    def tell(self, *, all_of_them: bool = False) -> None:
        """Log how many were only counted, for each kind of message whose time is over, or all."""
        with self._lock:
            now = self._clock()
            if now < self._due and not all_of_them:
                return
            over = [
                key
                for key, repeated in self._seen.items()
                if all_of_them or now - repeated.start >= self._seconds
            ]
            ended = [self._seen.pop(key) for key in over]
            left = (r.start for r in self._seen.values() if r.last is not None)
            self._due = min(left, default=math.inf) + self._seconds
        for repeated in ended:
            if repeated.last is not None:
                summary = copy.copy(repeated.last)
                summary.exc_info = summary.exc_text = summary.stack_info = None
                missed = repeated.count - self._limit
                summary.repeated = f" (repeated {missed} times, this was the last)"
                summary.__dict__.update(ASKED_FOR)  # so that it is not counted itself
                self._handler.handle(summary)


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
        try:
            mark = f"<{syslog.LOG_DAEMON | _priority(record)}>ninefuse[{os.getpid()}]"
            line = f"{mark}: {self.format(record)}"
            with contextlib.suppress(OSError):
                self._socket.sendto(line.encode(), self._address)
        except Exception:
            # Whatever a message's own arguments do when they are formatted, logging never raises.
            self.handleError(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()
