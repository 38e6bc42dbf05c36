"""Sockets for clients: where they are, what is said of them, and a thread beside a mount.

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

from ninefuse.driving.driver import Executor
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.settings import Settings
from ninefuse.tree.session import Session
from ninefuse.wire import listening
from ninefuse.wire.listening import Address, Listener
from ninefuse.wire.server import Server
from ninefuse.wire.users import Users

log = logging.getLogger(__name__)

_END_GRACE = 5.0  # seconds that requests of clients may take at the end
_TICK = 0.01


def addresses_of(settings: Settings) -> list[Address]:
    """Where to listen: as was said, or where the service manager does, or where users have it.

    Raises:
        Failure: USAGE.
    """
    if settings.listen:
        return [listening.parse(text) for text in settings.listen]
    if listening.handed_over():
        return [Address("systemd")]
    return [listening.default_address(settings.source)]


def create_server(
    settings: Settings,
    driver: Executor,
    session: Session,
    root: int,
    users: Users,
    *,
    apart: bool = False,
) -> Server:
    """A server of the source directory, of which ``root`` is a fid. Arguments as of a `Server`."""
    exports = (b"", b"/", os.fsencode(settings.source))
    return Server(driver, session, root, exports, users, settings, apart=apart)


def say_who_may_come(users: Users, listeners: list[Listener]) -> None:
    """Log aloud where others than the server's own user may come in."""
    for listener in listeners:
        if listener.reach.kind == "tcp" and not listener.reach.is_local:
            log.warning("%s: open to every machine that can reach it", listener.name)
        if listener.reach.kind in ("tcp", "vsock"):
            log.warning("%s: whoever connects may act as %s", listener.name, users.anybody)


def say_where(settings: Settings, listeners: list[Listener]) -> None:
    """Log and print where clients come, and how they mount it."""
    for listener in listeners:
        log.info("%s: listening at %s", settings.source, listener.name)
        with contextlib.suppress(OSError):  # whoever was to read it has gone: no reason to end
            print(": ".join(filter(None, (listener.name, listener.mount_line))), flush=True)


class _Start:
    """The start of a server on another thread: who waits for it is told also of its failure."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._failure: BaseException | None = None

    def run(self, server: Server, listeners: list[Listener]) -> None:
        """Run a server to its end. On its thread."""
        try:
            server.run(listeners, self._is_over.set)
        except BaseException as e:
            if self._is_over.is_set():  # nobody waits any more
                log.exception("clients at sockets are served no more")
            self._failure = e
            self._is_over.set()

    def wait(self) -> None:
        """Wait until clients are served.

        Raises:
            BaseException: why they are not.
        """
        self._is_over.wait()
        if self._failure is not None:
            raise self._failure


class Beside:
    """Sockets beside a mount, served by a thread of their own; the mount's dispatcher runs bodies.

    Args:
        settings: of the mount; they say where to listen.

    Raises:
        Failure: an address cannot be listened at.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._listeners = listening.open_all(addresses_of(settings))
        self._users = Users(squashes=settings.squashes)
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, driver: Executor, session: Session, root: int) -> None:
        """Serve them from now on. Arguments as of a `Server`.

        Raises:
            Failure: LISTENING_REFUSED, the server or its thread cannot be started.
        """
        say_who_may_come(self._users, self._listeners)
        server = create_server(self._settings, driver, session, root, self._users, apart=True)
        start = _Start()
        arguments = (server, self._listeners)
        thread = threading.Thread(target=start.run, args=arguments, name="sockets", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:
            text = f"clients cannot be served ({e}): raise the limit of processes (ulimit -u)"
            raise Failure(ExitCode.LISTENING_REFUSED, text) from None
        start.wait()
        self._server, self._thread = server, thread
        say_where(self._settings, self._listeners)

    def hang_up(self) -> None:
        """Begin to end it. Any thread; does not wait."""
        if self._server is not None:
            self._server.end()

    def end(self, driver: Executor) -> None:
        """End it, but for what hangs. On the dispatcher, which nobody runs any more."""
        self.hang_up()
        until = time.monotonic() + _END_GRACE
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < until:
            driver.before_wait(sleeps=False)
            driver.after_wait()
            driver.drain()
            self._thread.join(_TICK)

    def close(self) -> None:
        """Listen no more."""
        for listener in self._listeners:
            listener.close()
