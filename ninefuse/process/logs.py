"""Logging, set up for a process: which messages go where, one line an event.

The outputs are in logoutputs.py; how lines look, and what keeps one message from filling the log,
in loglines.py.

Locks touched: those of the handlers and filters that it calls.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.process.loglines import LineFormatter, RepeatFilter
from ninefuse.process.logoutputs import LogFile, QueuedHandler, Stderr, SyslogHandler
from ninefuse.settings import Settings

SYSLOG_SOCKET = "/dev/log"

# Of one and the same message this many are logged in this many seconds; more are only counted,
# and the count is logged after that time.
REPEAT_LIMIT = 10
REPEAT_SECONDS = 60.0

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


def _open_file(path: str) -> LogFile:
    try:
        return LogFile(path)
    except OSError as error:
        raise Failure(
            ExitCode.USAGE,
            f"log file {path} cannot be opened ({error.strerror}): give one that can be written",
        ) from None


def _withdrawn(record: logging.LogRecord) -> bool:
    """Pass over what pyfuse3 calls an error and what is none: a reply that nobody waits for.

    The kernel has taken the request back, since the mount is gone or the caller was killed.
    """
    reply_failed = str(record.msg).endswith(": fuse_reply_* failed with %s")
    return not (reply_failed and record.args == (os.strerror(errno.ENOENT),))
