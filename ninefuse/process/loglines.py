"""How log lines look, and how many of one kind there are.

Locks touched: a filter's own mutex, for dictionary work; logging's handler, outside that mutex.
"""

from __future__ import annotations

import copy
import logging
import math
import syslog
import threading
import time
from collections.abc import Callable

from ninefuse.exitcodes import one_line

# The `extra` of lines that somebody has asked for, by a signal say: they all pass.
ASKED_FOR = {"asked_for": True}


def priority(record: logging.LogRecord) -> int:
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
        mark = f"<{priority(record)}>" if self._with_priority else ""
        return "\n".join([mark + line, *(mark + "    " + one_line(text) for text in rest)])


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
