"""A small client of 9P2000.L for tests: one message at a time, or several under way.

`served` has a directory served by a server on a thread of this process; what it leaves behind is
looked for at the end. Nothing waits for longer than `LIMIT`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio
from mounting import wait_until
from ops_helpers import daemon_umask

from ninefuse import executor, ops
from ninefuse.settings import Settings
from ninefuse.tree.session import Session
from ninefuse.wire.codec import HEADER, Frame, Values, decode, encode
from ninefuse.wire.listening import Address, open_all
from ninefuse.wire.messages import NOFID, NONUNAME, NOTAG, NUMBER_OF
from ninefuse.wire.server import Server
from ninefuse.wire.users import Users

LIMIT = 20.0  # seconds that any answer may take
ROOT = 0  # the fid that `Client.start` attaches


class HungUp(Exception):
    """The server has closed the connection."""


class Client:
    """A connection.

    Args:
        connected: its socket.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(LIMIT)
        self.socket = connected
        self.msize = 8192

    @classmethod
    def to(cls, address: Address, *, starts: bool = True, msize: int = 8192) -> Client:
        """A client of a server at an address; ``starts``: with a version and an attach."""
        family = socket.AF_UNIX if address.kind == "unix" else socket.AF_INET
        connected = socket.socket(family, socket.SOCK_STREAM)
        where = address.host if address.kind == "unix" else (address.host, address.port)
        try:
            connected.connect(where)
        except OSError:
            connected.close()
            raise
        client = cls(connected)
        if starts:
            client.start(msize)
        return client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def start(self, msize: int = 8192) -> None:
        """Agree on the protocol, and attach `ROOT`."""
        self.msize, version = self.call("Tversion", msize, b"9P2000.L", tag=NOTAG)
        assert version == b"9P2000.L"
        self.call("Tattach", ROOT, NOFID, b"", b"", os.geteuid())

    def call(self, name: str, *values: Any, tag: int = 1) -> Values:
        """Send a message and return the values of its answer.

        Raises:
            OSError: the answer is an error.
            HungUp: there is none.
        """
        self.send(name, *values, tag=tag)
        frame = self.receive()
        assert frame.tag == tag
        return self.values_of(frame, name)

    def send(self, name: str, *values: Any, tag: int) -> None:
        """Send a message."""
        self.socket.sendall(encode(NUMBER_OF[name], tag, *values))

    def receive(self) -> Frame:
        """The next message."""
        head = self._exactly(HEADER.size)
        return decode(head + self._exactly(HEADER.unpack(head)[0] - HEADER.size))

    def values_of(self, frame: Frame, name: str) -> Values:
        """The values of the answer to a message."""
        if frame.number == NUMBER_OF["Rlerror"]:
            raise OSError(frame.values[0], os.strerror(frame.values[0]))
        assert frame.number == NUMBER_OF[name] + 1
        return frame.values

    def is_hung_up(self) -> bool:
        """Whether the server has closed the connection; waits for it to do something."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except ConnectionResetError:
            return True

    # Shorthands

    def walk(self, newfid: int, *names: bytes, fid: int = ROOT) -> int:
        """Make a fid of what names lead to."""
        (qids,) = self.call("Twalk", fid, newfid, names)
        assert len(qids) == len(names), "the walk ended early"
        return newfid

    def open(self, newfid: int, *names: bytes, flags: int = 0, fid: int = ROOT) -> int:
        """Make an open fid of what names lead to."""
        self.walk(newfid, *names, fid=fid)
        self.call("Tlopen", newfid, flags)
        return newfid

    def create(self, newfid: int, name: bytes, data: bytes = b"") -> int:
        """Make an open fid of a new file in the root, with something in it."""
        self.walk(newfid)
        self.call("Tlcreate", newfid, name, 0o2, 0o644, NONUNAME)
        if data:
            assert self.call("Twrite", newfid, 0, data) == (len(data),)
        return newfid

    def clunk(self, fid: int) -> None:
        """End a fid."""
        self.call("Tclunk", fid)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                more = self.socket.recv(count - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                raise HungUp
            data += more
        return data


class Served:
    """A server on a thread.

    Attributes:
        address: where it is.
        server: it.
        session: its session.
        driver: what runs its bodies.
    """

    def __init__(self, address: Address, server: Server) -> None:
        self.address = address
        self.server = server
        self.session = server.session
        self.driver = server.driver
        self.tasks_alone = self.tasks()

    def client(self, *, starts: bool = True, msize: int = 8192) -> Client:
        """A new connection."""
        return Client.to(self.address, starts=starts, msize=msize)

    def tasks(self) -> int:
        """How many tasks the server has."""
        ask = trio.lowlevel.current_statistics
        try:
            return trio.from_thread.run_sync(ask, trio_token=self.server.token).tasks_living
        except trio.RunFinishedError:  # it was told to end
            return self.tasks_alone

    def is_idle(self) -> bool:
        """Whether nobody is connected, and nothing is left of those who were."""
        return (
            not self.server.connections
            and self.tasks() == self.tasks_alone
            and not self.driver.requests
            and len(self.session.fids) == 1  # the server's own
            and not self.session.fids.open_descriptors
            and not len(self.session.file_locks)
        )


@contextlib.contextmanager
def served(
    source: Path,
    *,
    model: str = "second",
    users: Users | None = None,
    place: Address | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Have a directory served, for a ``with`` block.

    Args:
        source: it.
        model: the threading model.
        place: where clients come; by default at a Unix socket beside it.
        users: who may come; by default with root for root, so that a test may do anything.
        options: fields of the settings.
    """
    settings = Settings(str(source), "", **options)
    place = place or Address("unix", str(source.parent / "socket"))
    with daemon_umask(), contextlib.ExitStack() as clean_up:
        (listener,) = open_all([place])
        clean_up.callback(listener.close)
        driver = executor.create(model, 4)
        session = Session(driver, kernel=False, read_only=settings.read_only, threads=5)
        directory = os.open(source, os.O_PATH | os.O_DIRECTORY)
        clean_up.callback(os.close, directory)
        executor.NoThreading().run_here(ops.attach(session, 0, directory))
        exports = (b"", b"/", os.fsencode(source))
        users = Users(squashes=False) if users is None else users
        server = Server(driver, session, 0, exports, users, settings)
        started = threading.Event()
        thread = threading.Thread(target=server.run, args=([listener], started.set), daemon=True)
        thread.start()
        assert started.wait(LIMIT)
        it = Served(listener.address, server)
        try:
            yield it
            wait_until(it.is_idle, "nothing is left of the clients", LIMIT)
        finally:
            server.end()
            thread.join(LIMIT)
            assert not thread.is_alive(), "the server does not end"
            driver.end_waits()
            session.fids.clear()
            driver.close()
        assert session.fids.descriptors == session.fids.open_descriptors == 0
