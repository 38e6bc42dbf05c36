"""One export over sockets, from the first system call to the last.

`serve` sets the process up, attaches the source, listens, and serves until it is told to end.

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable

from ninefuse import executor, groundwork, ops, sockets
from ninefuse.exitcodes import ExitCode
from ninefuse.process import logs, memory, signals
from ninefuse.process.notify import notify
from ninefuse.settings import Settings
from ninefuse.tree.leaving import Leaver
from ninefuse.tree.session import Session
from ninefuse.watching import report
from ninefuse.wire import listening
from ninefuse.wire.listening import Listener
from ninefuse.wire.server import Server
from ninefuse.wire.users import Users

log = logging.getLogger(__name__)

_END_GRACE = 5.0  # seconds until the process ends whatever hangs
_OWN_FID = 0  # the source directory's, which no client's is


def serve(settings: Settings, ready: Callable[[], None]) -> int:
    """Serve until told to end. Blocks; on the main thread.

    Args:
        settings: as preflight has checked them.
        ready: called once clients are served.

    Returns:
        The process's exit code.

    Raises:
        Failure: an address cannot be listened at, or clients cannot be served there.
    """
    # While the umask is what it was.
    listeners = listening.open_all(sockets.addresses_of(settings))
    try:
        return _serve(settings, listeners, ready)
    finally:
        for listener in listeners:
            listener.close()


def _serve(settings: Settings, listeners: list[Listener], ready: Callable[[], None]) -> int:
    groundwork.settle_process()
    users = Users(squashes=settings.squashes)
    sockets.say_who_may_come(users, listeners)
    source, _ = groundwork.open_source(settings)
    os.chdir("/")  # so as not to keep another file system busy
    driver = groundwork.create_driver(settings, source, by_user=users.act)
    session = Session(
        driver,
        kernel=False,
        read_only=settings.read_only,
        sync_directories=settings.sync or settings.dirsync,
        threads=1 + (0 if settings.model == "none" else settings.threads),
    )
    session.fids.on_change = memory.settle
    session.noatime, session.nodiratime = settings.noatime, settings.nodiratime
    server = sockets.create_server(settings, driver, session, _OWN_FID, users)
    with contextlib.ExitStack() as trace:
        if settings.trace_file is not None:
            title = f"ninefuse-serve {report.printable(settings.source)}, model {settings.model}"
            path = settings.trace_file
            server.watch(trace.enter_context(groundwork.traced(path, title, driver, session)))
        try:
            executor.NoThreading().run_here(ops.attach(session, _OWN_FID, source))
            _run(settings, driver, session, server, listeners, ready)
        finally:
            driver.end_waits()
            session.fids.clear()
            driver.close()
            os.close(source)
            logs.tell_repeats(all_of_them=True)
    log.info("%s: ended", settings.source)
    return ExitCode.OK


def _run(
    settings: Settings,
    driver: executor.Executor,
    session: Session,
    server: Server,
    listeners: list[Listener],
    ready: Callable[[], None],
) -> None:
    counters = report.Counters(settings, server, driver, session)
    leaver = Leaver(session.fids, forget=lambda nodes: None)
    ended = threading.Event()

    def started() -> None:
        memory.settle()
        log.info("%s: served, model %s", settings.source, driver.model)
        sockets.say_where(settings, listeners)
        ready()

    def stop() -> None:
        notify("STOPPING=1")
        server.end()
        if not ended.wait(_END_GRACE):
            log.error("%s: requests are stuck; ending without", settings.source)
            end_now()
            logs.finish()
            os._exit(ExitCode.INTERNAL)

    def end_now() -> None:
        for listener in listeners:
            listener.close()

    signals.start(
        stop=stop,
        end_now=end_now,
        counters=lambda: groundwork.log_lines(counters.lines()),
        stacks=lambda: groundwork.log_lines(report.stacks(driver)),
        what="hanging up",
    )
    try:
        server.run(listeners, started)
    finally:
        ended.set()
        leaver.end()
        notify("STOPPING=1")
