"""The server: one export, some sockets to listen at, a task for each connection.

A client of 9P connects to a socket and sends messages: Twalk, Tlopen, Tread. Each has a *tag* of
the client's choice, and *fids*, numbers that the client gives to files itself. Each message is
answered by one with the same tag, in any order. These are the operations of ninefuse/ops/ by name,
so little is left to do here: take the bytes, have the body run, send the bytes. The rest is keeping
many clients from each other, none of whom is trusted.

    Server        listens, decides who is served, gives back what the gone have left   (here)
    Connection    one socket: bytes to messages and back, and how much a client may have
    Conversation  from a Tversion to the next: its fids and tags, requests under way, Tflush
    requests.py   each T-message as the operation that it asks for

What runs where
---------------

* **Everything of the server runs on one thread, by trio**: its tasks read, write and wait, and
  take turns wherever one awaits. So a connection's state needs no lock. A task must not block the
  thread (by looking a name up, or closing a file), or all clients would wait. It has a body run
  instead.
* **Bodies run wherever the driver has them run** (executor.py). `start` begins one. Where it ends
  `done` is called, on some thread, and must not touch a connection: `post` brings the rest to the
  server's thread.
* **The dispatcher is this thread**, if there is a server alone (ninefuse-serve): `Awaiting` tells
  the driver when trio sleeps. Beside a mount (`apart`) the dispatcher is the mount's. Then `start`
  posts bodies to it, so that both doors' requests begin in one order. One order of changes, one
  table of fids and one rename lock hold for both.

What is guaranteed
------------------

* **No client can end the server.** A message that is wrong gets an error. A message that cannot be
  cut from the next ends its connection. An unforeseen exception is logged, with a traceback. From a
  body it is answered with EIO. From a connection's tasks, or where a request is to be answered
  (`Conversation._finish`), it ends that connection and no other, and the request is given back.
* **A client keeps nobody waiting.** Answers that it does not take are bounded, and at the bound it
  is read from no further. One that sends many messages at once lets others come in between. One
  that says nothing has a minute. One that has vanished is noticed by TCP's keepalives. If a worker
  awaited the sending of an answer, one client that does not read would hold it up for ever.
* **A client has no more than its share**: of connections (half of them for one user of a Unix
  socket), fids, requests, bytes. A refused client's first message is answered with the reason.
  That, too, has its bounds, or refusing would cost more than serving.
* **Everything that a client had is given back** when it goes. Its requests run to their ends, or
  are withdrawn if they only wait. Its fids are clunked and its locks given back. That is shielded
  from cancellation. Otherwise the end of the server, which cancels all tasks, would leave locks on
  the source that nobody owns. Only then does a connection count as ended.
* **A client's identity** is decided once, when it connects (users.py), by what the kernel says of
  the socket, and once for each attach. A message can name no other user afterwards.

The end
-------

`end` cancels one scope, from any thread. Listening stops, every connection hangs up and gives back
what it had, and `run` returns when the last has. A connection that was handed over (``fd:N``) is
served like one that was taken. The server ends with it if there is nothing else to serve.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import trio

from ninefuse.awaiting import Awaiting
from ninefuse.calls import Body, blocking
from ninefuse.driving.driver import Executor
from ninefuse.driving.request import Request
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.process import memory
from ninefuse.settings import Settings
from ninefuse.tree.clients import FIRST_CONVERSATION, ClientsTable
from ninefuse.tree.session import Session
from ninefuse.wire.codec import HEADER, encode
from ninefuse.wire.connection import Connection
from ninefuse.wire.listening import Listener
from ninefuse.wire.messages import NUMBER_OF
from ninefuse.wire.users import Peer, Users, peer_of

log = logging.getLogger(__name__)

_REFUSING = 5.0  # seconds that one is waited for who is to be told that there are too many
_MOST_REFUSED = 64  # that are told so at a time; others see the connection closed
_TIDY_PERIOD = 5.0  # seconds from one tidying to the next
_SHORT_OF_FILES = 0.2  # seconds until it is tried again to take a connection
_KEPT_ALIVE = (
    (socket.SO_KEEPALIVE, socket.SOL_SOCKET, 1),
    # A client that is gone is noticed within two minutes.
    (socket.TCP_KEEPIDLE, socket.IPPROTO_TCP, 60),
    (socket.TCP_KEEPINTVL, socket.IPPROTO_TCP, 15),
    (socket.TCP_KEEPCNT, socket.IPPROTO_TCP, 4),
    (socket.TCP_NODELAY, socket.IPPROTO_TCP, 1),
)


class Watcher(Protocol):
    """What sees requests come and answers go (watching/tracing.py)."""

    def replied(self) -> None: ...


class Server:
    """Serves an export.

    Args:
        driver: that bodies are run by.
        session: of which all connections' fids are.
        root: a fid of the exported directory, which no client has.
        exports: the names that a client may give for it.
        users: who may connect, and as whom.
        settings: what clients may have.
        apart: whether the driver's dispatcher is another thread than that of `run`.

    Attributes:
        errors: how many answers were errors, by message and errno.
        token: trio's, once it runs.
    """

    def __init__(
        self,
        driver: Executor,
        session: Session,
        root: int,
        exports: tuple[bytes, ...],
        users: Users,
        settings: Settings,
        *,
        apart: bool = False,
    ) -> None:
        self.driver = driver
        self.session = session
        self.root = root
        self.exports = exports
        self.users = users
        self.settings = settings
        self.errors: Counter[tuple[str, int]] = Counter()
        self._apart = apart
        self.connections = 0
        self._of_users: Counter[int] = Counter()  # connections at Unix sockets
        self._refusing = 0  # clients that are being told why they are not served
        self._numbers = itertools.count(FIRST_CONVERSATION)
        self._tracer: Watcher | None = None
        self._somebody_left = trio.Event()
        self.token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()

    def passed(self) -> int:
        """How many files clients read and write by themselves: none."""
        return 0

    def watch(self, tracer: Watcher) -> None:
        """Have the way of requests watched."""
        self._tracer = tracer

    def run(self, listeners: Iterable[Listener], started: Callable[[], None]) -> None:
        """Serve until `end`. Blocks.

        Args:
            listeners: where clients come; they stay the caller's.
            started: called once they are served.

        Raises:
            Failure: LISTENING_REFUSED, there are no descriptors for trio's loop.
        """
        try:
            trio.run(self._serve, list(listeners), started)
        except OSError as e:  # before the loop runs: what comes out of it comes in a group
            reason = e.strerror or str(e)
            text = f"clients cannot be served ({reason}): raise the limit of open files (ulimit -n)"
            raise Failure(ExitCode.LISTENING_REFUSED, text) from None

    def end(self) -> None:
        """End it. Any thread."""
        if self.token is None:
            self._scope.cancel()
            return
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self._scope.cancel)

    # What connections ask for

    def new_number(self) -> int:
        """A number for a conversation."""
        return next(self._numbers)

    def start(
        self, name: str, body: Body[Any], done: Callable[[Request], None], user: int | None
    ) -> Request:
        """Have a body run, as of `Executor.start`."""
        if not self._apart:
            return self.driver.start(name, body, done, user)
        request = self.driver.admit(f"9p {name}", body, done, user)
        self.driver.dispatcher.post(partial(self.driver.drive, request))
        return request

    def post(self, function: Callable[[], None]) -> None:
        """Have a function called on the thread of `run`, soon. Any thread."""
        if not self._apart:
            self.driver.dispatcher.post(function)
        elif self.token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self.token.run_sync_soon(function)

    async def run_to_end(self, name: str, body: Body[None]) -> None:
        """Have a body run, and wait for its end, which no cancellation keeps from that."""
        ended = trio.Event()

        def done(request: Request) -> None:
            self.driver.count(request)
            request.log_failure()
            self.post(ended.set)

        self.start(name, body, done, None)
        with trio.CancelScope(shield=True):
            await ended.wait()

    def answered(self, request: Request, code: int) -> None:
        """A request has ended, with an errno or 0."""
        self.driver.count(request)
        if code:
            self.errors[request.name, code] += 1
        if self.driver.observer is not None:
            self.driver.observer.answered(request.body)
            if self._tracer is not None:
                self._tracer.replied()

    async def _serve(self, listeners: list[Listener], started: Callable[[], None]) -> None:
        self.token = trio.lowlevel.current_trio_token()
        if not self._apart:
            Awaiting(self.driver).begin()
        with self._scope:
            async with trio.open_nursery() as house:
                house.start_soon(self._tidy_up)
                async with trio.open_nursery() as clients, trio.open_nursery() as doors:
                    for listener in listeners:
                        doors.start_soon(self._listen, listener, clients)
                    started()
                # All that were served were connections that were handed over, and have ended.
                house.cancel_scope.cancel()

    async def _tidy_up(self) -> None:
        """Give back what clients took that have gone, now and then."""
        while True:
            await self._somebody_left.wait()
            self._somebody_left = trio.Event()
            await self.run_to_end("tidy", _tidied(self.session))
            await trio.sleep(_TIDY_PERIOD)

    async def _listen(self, listener: Listener, clients: trio.Nursery) -> None:
        """Take connections, or serve the one that was handed over."""
        if not listener.accepts:
            self._welcome(listener.socket.dup(), listener.name, clients)
            return
        while True:
            await trio.lowlevel.wait_readable(listener.socket)
            try:
                connected, _ = listener.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as e:
                # Most likely no descriptor is left. Whoever waits does so in the kernel.
                log.error("%s: cannot take a connection: %s", listener.name, e.strerror)
                await trio.sleep(_SHORT_OF_FILES)
                continue
            self._welcome(connected, listener.name, clients)

    def _welcome(self, connected: socket.socket, where: str, clients: trio.Nursery) -> None:
        connected.setblocking(False)
        try:
            peer = peer_of(connected)
            if connected.family in (socket.AF_INET, socket.AF_INET6):
                for option, level, value in _KEPT_ALIVE:
                    connected.setsockopt(level, option, value)
        except OSError as e:  # it has gone already
            log.info("%s: connection lost: %s", where, e.strerror)
            connected.close()
            return
        number = next(self._numbers)
        name = f"{where} client {number - FIRST_CONVERSATION}"
        if not self.users.may_connect(peer):
            log.warning("%s: refused: it is user %s's", name, peer.uid)
            self._refuse(connected, errno.EPERM, clients)
        elif self._has_too_many(peer):
            log.warning("%s: refused: there are %d clients", name, self.connections)
            self._refuse(connected, errno.EUSERS, clients)
        else:
            connection = Connection(self, connected, peer, name)
            self.connections += 1
            if peer.uid is not None:
                self._of_users[peer.uid] += 1
            clients.start_soon(self._serve_one, connected, connection, peer)

    def _has_too_many(self, peer: Peer) -> bool:
        """Whether nobody, or not this one, may have another connection."""
        most = self.settings.max_connections
        if self.connections >= most:
            return True
        is_bounded = peer.uid not in (None, 0, os.geteuid())
        return is_bounded and self._of_users[peer.uid or 0] >= max(1, most // 2)

    async def _serve_one(
        self, connected: socket.socket, connection: Connection, peer: Peer
    ) -> None:
        log.info("%s: connected", connection.name)
        try:
            await connection.run()
        except Exception:
            log.exception("%s: connection closed", connection.name)
        finally:
            self.connections -= 1
            self._somebody_left.set()
            if peer.uid is not None:
                self._of_users -= Counter((peer.uid,))  # which keeps none of nothing
            connected.close()
            log.info("%s: disconnected", connection.name)

    def _refuse(self, connected: socket.socket, code: int, clients: trio.Nursery) -> None:
        """Have somebody told why, unless there are many who are."""
        if self._refusing < _MOST_REFUSED:
            clients.start_soon(self._tell, connected, code)
        else:
            connected.close()

    async def _tell(self, connected: socket.socket, code: int) -> None:
        """Answer a client's first message with an error, if it comes soon, and hang up."""
        self._refusing += 1
        try:
            await self._tell_in_time(connected, code)
        finally:
            self._refusing -= 1

    async def _tell_in_time(self, connected: socket.socket, code: int) -> None:
        with connected, contextlib.suppress(OSError), trio.move_on_after(_REFUSING):
            message = b""
            while len(message) < HEADER.size:
                more = await _next_piece(connected)
                if not more:
                    return
                message += more
            _, _, tag = HEADER.unpack_from(message)
            connected.send(encode(NUMBER_OF["Rlerror"], tag, code))
            # What is closed with something unread loses what was sent, too.
            connected.shutdown(socket.SHUT_WR)
            while await _next_piece(connected):
                pass


async def _tidied(session: Session) -> None:
    has_shrunk = False
    if isinstance(session.fids, ClientsTable):
        has_shrunk = await blocking(None, session.fids.tidy)
    # Connections that have ended are garbage in cycles, their numbers of fids among it.
    await blocking(None, partial(memory.settle, anew=has_shrunk))


async def _next_piece(connected: socket.socket) -> bytes:
    await trio.lowlevel.wait_readable(connected)
    try:
        return connected.recv(4096)
    except BlockingIOError:
        return b""
