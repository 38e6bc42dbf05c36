"""What stands beneath a door, whichever it is: the process, the source, the driver, the trace.

A door is what clients come by: a mount (serve.py), sockets (export.py).

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections.abc import Iterator

from ninefuse import executor
from ninefuse.driving.uring import Refused, Uring
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.linux import capabilities, mountinfo, syscalls
from ninefuse.linux.filesystems import file_system_of
from ninefuse.process import signals
from ninefuse.process.loglines import ASKED_FOR
from ninefuse.settings import Settings
from ninefuse.tree.qids import is_on_own_device
from ninefuse.tree.session import Session
from ninefuse.watching import tracing
from ninefuse.watching.trace_file import TraceFile

log = logging.getLogger(__name__)


def settle_process() -> None:
    """Make the process what every door needs it to be. On the main thread, before others start."""
    signals.block()
    capabilities.settle()
    capabilities.leave_groups()
    os.umask(0)  # the callers' count; see credentials.py
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("open files: limit raised from %d to %d", soft, hard)


def open_source(settings: Settings) -> tuple[int, bool]:
    """Open the source directory.

    Returns:
        A descriptor of it, O_PATH, and whether its mount shows all of a file system there.

    Raises:
        Failure: what is mounted in it is to be hidden, and we may not.
    """
    source = os.open(settings.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    is_whole = mountinfo.shows_all(source)
    if not settings.one_file_system:
        return source, is_whole
    try:
        return syscalls.without_mounts(source), is_whole
    except OSError as e:
        text = f"-o xdev: hiding what is mounted in {settings.source} takes CAP_SYS_ADMIN"
        raise Failure(ExitCode.USAGE, f"{text} ({e.strerror})") from None
    finally:
        os.close(source)


def create_driver(
    settings: Settings, source: int, *, by_user: bool, leads: bool = False
) -> executor.Executor:
    """The driver of the threading model that the settings ask for, on the processors for that.

    Args:
        settings: they.
        source: the source directory. Whether it is local decides which calls may wait.
        by_user, leads: as of `executor.create`.

    Raises:
        Failure: USAGE, there is no such model, or no io_uring where it was asked for.
    """
    inline = settings.inline and settings.model == "second"
    uring = _engine(settings, by_user=by_user) if inline and not leads else None
    # The kernel's threads for io_uring stay where this one is, and are better elsewhere.
    one_cpu = settings.one_cpu
    if one_cpu is None:
        one_cpu = uring is None and not leads
    if one_cpu and settings.model != "none":
        _share_one_cpu()
    try:
        driver = executor.create(settings.model, settings.threads, by_user=by_user, leads=leads)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, f"--model {settings.model}: {error}") from error
    if inline and isinstance(driver, executor.SecondModel):
        driver.is_near = is_on_own_device if file_system_of(source).is_local else None
        driver.uring = uring
    return driver


def _engine(settings: Settings, *, by_user: bool) -> Uring | None:
    """The engine that the settings ask for; None: the workers are."""
    if settings.engine == "threads":
        return None
    try:
        return Uring(by_user=by_user)
    except Refused as reason:
        if settings.engine == "uring":
            raise Failure(ExitCode.USAGE, f"--engine uring: {reason}") from None
        log.info("no io_uring, workers instead: %s", reason)
        return None


def _share_one_cpu() -> None:
    """Keep all threads there are, and those they start, on one of the processors they may use.

    The interpreter's lock lets one of them run Python at a time, and passing it on to a
    thread on another processor costs several times what it costs on the same one
    (docs/models.md). The kernel moves others' work away from a busy processor.
    """
    allowed = sorted(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):  # the log's has been started
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), {allowed[os.getpid() % len(allowed)]})


@contextlib.contextmanager
def traced(
    path: str, title: str, driver: executor.Executor, session: Session
) -> Iterator[tracing.Tracer]:
    """Have all that is done inside written to a trace file.

    Args:
        path: the file's.
        title: what the trace is called.
        driver, session: of whom.
    """
    with tracing.Tracer(TraceFile(path, title)) as tracer:
        driver.observer = tracer
        session.announces = True
        session.fids.lock.on_wait = tracer.waited_for_table
        try:
            yield tracer
        finally:
            tracer.close()


def log_lines(lines: list[str]) -> None:
    """Log what somebody has asked for, whatever the level is."""
    for line in lines:
        log.handle(
            log.makeRecord(
                log.name, logging.WARNING, __file__, 0, "%s", (line,), None, extra=ASKED_FOR
            )
        )
