"""Where log messages go and how they look: stderr, a file or syslog, one line an event.

Who logs never waits for it: a thread for each output writes the lines. (A pipe may be full, and
somebody may hold the inode's lock of a file that he can only read.)

Locks touched: a filter's own mutex, for dictionary work; logging's, none across a write.
"""

import contextlib
import copy
import errno
import logging
import math
import os
import queue
import select
import signal
import socket
import stat
import syslog
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ninefuse.exitcodes import ExitCode, Failure, one_line
from ninefuse.linux import credentials
from ninefuse.process import ownfile
from ninefuse.settings import Settings

log = logging.getLogger(__name__)

SYSLOG_SOCKET = "/dev/log"

# Of one and the same message this many are logged in this many seconds; more are only counted,
# and the count is logged after that time.
REPEAT_LIMIT = 10
REPEAT_SECONDS = 60.0

# Lines that may wait to be written, and how many are written in one go.
_MOST_WAITING = 10_000
_AT_ONCE = 500
# How long an end waits for lines that are still to be written, in seconds.
_PATIENCE = 1.0

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
        handlers.append(QueuedHandler(Stderr()))
    if settings.log_file is not None:
        handlers.append(QueuedHandler(_open_file(settings.log_file)))
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


def finish() -> None:
    """See that what was logged so far is written, before an end without any clean-up.

    It takes a second at most for each output, whatever that one does.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, QueuedHandler):
            handler.finish()


def _is_journal(descriptor: int) -> bool:
    """Whether a descriptor leads to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    stream = os.environ.get("JOURNAL_STREAM")
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        return stream == f"{status.st_dev}:{status.st_ino}"
    return False


def _open_file(path: str) -> "LogFile":
    try:
        return LogFile(path)
    except OSError as error:
        raise Failure(
            ExitCode.USAGE,
            f"log file {path} cannot be opened ({error.strerror}): give one that can be written",
        ) from None


class Output(Protocol):
    """What a QueuedHandler writes to, on its thread; each call may wait for any time."""

    def write(self, lines: bytes) -> None:
        """Write whole lines; OSError where that fails."""

    def close(self) -> None:
        """Close what is open."""


class Stderr:
    """The standard error that there was at the start."""

    def __init__(self) -> None:
        # One of our own: what libfuse prints while it mounts is caught by way of descriptor 2.
        self._fd = os.dup(2)

    def write(self, lines: bytes) -> None:
        _write(self._fd, lines)

    def close(self) -> None:
        os.close(self._fd)


class LogFile:
    """A file that is opened anew when it has been renamed or removed, as logrotate does.

    It is looked for in the directory that was there at the start: a path could lead into the
    mount, by which the daemon would wait for itself. Where others may write that directory, what
    they put there is not written to (ownfile.py): the lines go on to the file that is open.
    What is no file (/dev/stderr, a pipe) stays open as it is.

    Argument: path, of the file. Raises OSError when it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        umask = os.umask(0o077)  # which can only be read by being set
        os.umask(umask)
        self._mode = 0o666 & ~umask  # later the process has no umask of its own (serve.py)
        self._path = path
        self._refused = ""  # why what has the name is not written to, as it was said last
        self._directory, self._name = ownfile.place_of(path)
        try:
            self._fd = ownfile.open_own(self._directory, self._name, self._mode, os.O_APPEND)
        except OSError:
            os.close(self._directory)
            raise
        status = os.fstat(self._fd)
        self._is_file = stat.S_ISREG(status.st_mode)
        self._status = status

    def write(self, lines: bytes) -> None:
        if self._is_file:
            self._reopen_if_needed()
        _write(self._fd, lines)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._directory)

    def _reopen_if_needed(self) -> None:
        try:
            if self._has_its_name():
                return
            fd = ownfile.open_own(
                self._directory, self._name, self._mode, os.O_APPEND, regular=True
            )
        except OSError as e:
            if self._refused != e.strerror:
                self._refused = str(e.strerror)
                text = "log file %s: not opened anew (%s); writing on to the one that was open"
                log.warning(text, self._path, e.strerror)
            return
        os.close(self._fd)
        self._fd = fd
        self._status = os.fstat(fd)
        self._refused = ""

    def _has_its_name(self) -> bool:
        follow = ownfile.is_private(self._directory)
        try:
            there = os.stat(self._name, dir_fd=self._directory, follow_symlinks=follow)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, self._status)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[_write_some(fd, data) :]


def _write_some(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:  # as whoever else has it open wanted it
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll()
        return 0


class QueuedHandler(logging.Handler):
    """Has lines written by a thread of its own: whoever logs never waits for the output.

    Lines keep their order. Those that find no room, since the output takes nothing, are counted,
    and the count is written once it does again. (logging.handlers.QueueListener can be ended
    only by waiting for it without a limit, and writes one line each time that it gets the
    interpreter's lock.) Argument: output, which is the handler's from now on.
    """

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        # Of no bound, so that it takes neither a lock nor a wait to put something in.
        self._queue: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        self._lost = 0  # lines that found no room; counted inside the handler's lock
        self._closed = False
        # Signals are for others; see workers.py.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def emit(self, record: logging.LogRecord) -> None:
        """Have one record written."""
        try:
            if self._closed:
                return
            if self._queue.qsize() >= _MOST_WAITING:
                self._lost += 1
                return
            self._queue.put(self._line(record))
        except Exception:
            # Whatever a message's own arguments do when they are formatted, logging never raises.
            self.handleError(record)

    def finish(self) -> None:
        """Wait until what was logged so far is written; a second at most."""
        # In a forked child there is no such thread, and the lines are the parent's.
        if self._thread.is_alive():
            written = threading.Event()
            self._queue.put(written)
            written.wait(_PATIENCE)

    def close(self) -> None:
        """Write what is left, and close the output; not if that takes longer than a second."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join(_PATIENCE)
            if not self._thread.is_alive():
                self._output.close()
        super().close()

    def _write_all(self) -> None:
        credentials.settle()  # as all threads of a daemon: this one is there before it is one
        told = 0  # of how many lost lines
        ended = False
        while not ended:
            lines: list[bytes] = []
            finished: list[threading.Event] = []
            item = self._queue.get()
            while True:
                if item is None:
                    ended = True
                elif isinstance(item, bytes):
                    lines.append(item)
                else:
                    finished.append(item)
                if ended or len(lines) >= _AT_ONCE or self._queue.empty():
                    break
                item = self._queue.get()
            self._write(lines)
            lost = self._lost
            if lost > told:
                self._write([self._line(_lost_lines(lost - told))])
                told = lost
            for event in finished:
                event.set()

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            with contextlib.suppress(OSError):  # there is nobody to tell
                self._output.write(b"".join(lines))

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode(errors="backslashreplace") + b"\n"


def _lost_lines(count: int) -> logging.LogRecord:
    text = "%d lines are missing here, which came faster than they were written"
    return logging.LogRecord(log.name, logging.WARNING, __file__, 0, text, (count,), None)


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
