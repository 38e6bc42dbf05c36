"""Where log lines go: stderr, a file or syslog.

Who logs never waits for an output: a thread for each writes the lines. (A pipe may be full, and
somebody may hold the inode's lock of a file that he can only read.)

Locks touched: logging's own of each handler, never across a write.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import stat
import syslog
import threading
from typing import Protocol

from ninefuse.linux import capabilities
from ninefuse.process import ownfile
from ninefuse.process.loglines import priority
from ninefuse.process.threads import start_quietly

log = logging.getLogger(__name__)

# Lines that may wait to be written, and how many are written in one go.
_MOST_WAITING = 10_000
_AT_ONCE = 500
# How long an end waits for lines that are still to be written, in seconds.
_PATIENCE = 1.0


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
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        start_quietly(self._thread)

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
        capabilities.settle()  # as all threads of a daemon: this one is there before it is one
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
            mark = f"<{syslog.LOG_DAEMON | priority(record)}>ninefuse[{os.getpid()}]"
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
