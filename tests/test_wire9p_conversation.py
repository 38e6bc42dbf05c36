"""Tags, Tflush, malformed messages, limits, and clients that misbehave: others go on."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client9p import LIMIT, ROOT, Client, Served, served
from mounting import wait_until
from ops_helpers import fails, module_of, need_attributes

from ninefuse import ops
from ninefuse.process import memory
from ninefuse.settings import DEFAULT_BYTES
from ninefuse.wire.codec import HEADER, HEADER_SIZE, encode
from ninefuse.wire.connection import Connection
from ninefuse.wire.conversation import Conversation
from ninefuse.wire.listening import Address
from ninefuse.wire.messages import BY_NUMBER, NOFID, NOTAG, NUMBER_OF

BASIC = 0x7FF


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"hello")
    return source


@pytest.fixture(params=["first", "second"])
def server(request: pytest.FixtureRequest, source: Path) -> Iterator[Served]:
    with served(source, model=request.param) as it:
        yield it


@pytest.fixture
def c(server: Served) -> Iterator[Client]:
    with server.client() as client:
        yield client


class Stuck:
    """statfs(3) that does not come back until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.count = 0
        self.free = threading.Event()
        self._statvfs = os.statvfs

    def __call__(self, fd: int) -> os.statvfs_result:
        self.count += 1
        self.begun.release()
        assert self.free.wait(LIMIT)
        return self._statvfs(fd)

    def wait(self, count: int = 1) -> None:
        """Wait until so many have begun."""
        for _ in range(count):
            assert self.begun.acquire(timeout=LIMIT)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    it = Stuck()
    monkeypatch.setattr(os, "statvfs", it)
    yield it
    it.free.set()


# Tags


def test_answers_come_as_requests_end(c: Client, stuck: Stuck) -> None:
    c.send("Tstatfs", ROOT, tag=1)
    stuck.wait()
    for tag in (2, 3):
        c.call("Tgetattr", ROOT, BASIC, tag=tag)
    stuck.free.set()
    frame = c.receive()
    assert (frame.number, frame.tag) == (NUMBER_OF["Rstatfs"], 1)


def test_a_tag_that_is_used_twice_ends_the_connection(
    server: Served, c: Client, stuck: Stuck, caplog: pytest.LogCaptureFixture
) -> None:
    c.send("Tstatfs", ROOT, tag=1)
    stuck.wait()
    with server.client() as other:
        c.send("Tgetattr", ROOT, BASIC, tag=1)
        assert c.is_hung_up()
        other.call("Tgetattr", ROOT, BASIC)
    assert "tag 1 is used twice" in caplog.text


def test_a_tag_is_free_with_its_answer(c: Client) -> None:
    for _ in range(100):
        c.call("Tgetattr", ROOT, BASIC, tag=7)


def test_no_tag_is_for_versions_alone(c: Client) -> None:
    with fails(errno.EINVAL):
        c.call("Tgetattr", ROOT, BASIC, tag=NOTAG)
    c.call("Tgetattr", ROOT, BASIC)


# Tflush


def test_a_flush_of_nothing(c: Client) -> None:
    assert c.call("Tflush", 4711, tag=2) == ()
    assert c.call("Tflush", 2, tag=2) == ()  # itself


def test_a_flush_is_answered_after_what_it_is_for(c: Client, stuck: Stuck) -> None:
    """Though that cannot be called off any more; others are answered meanwhile."""
    c.send("Tstatfs", ROOT, tag=1)
    stuck.wait()
    c.send("Tflush", 1, tag=2)
    c.send("Tflush", 2, tag=3)  # of a flush
    c.send("Tflush", 1, tag=4)
    c.call("Tgetattr", ROOT, BASIC, tag=5)
    stuck.free.set()
    found = [c.receive() for _ in range(4)]
    assert [frame.tag for frame in found] == [1, 2, 3, 4]
    assert found[0].number == NUMBER_OF["Rstatfs"]
    assert {frame.number for frame in found[1:]} == {NUMBER_OF["Rflush"]}


def test_a_chain_of_flushes(source: Path, stuck: Stuck) -> None:
    """Each is of the one before, as many as requests may be: all are answered, in that order."""
    count = 2 * sys.getrecursionlimit()
    with served(source, max_requests=count + 1) as server, server.client() as c:
        c.send("Tstatfs", ROOT, tag=0)
        stuck.wait()
        for tag in range(1, count):
            c.send("Tflush", tag - 1, tag=tag)
        c.call("Tgetattr", ROOT, BASIC, tag=count)  # so all have come
        stuck.free.set()
        assert [c.receive().tag for _ in range(count)] == list(range(count))


def test_a_request_that_has_not_begun_is_called_off(c: Client, stuck: Stuck) -> None:
    """It gets no answer, and does nothing: the workers that one file may have are stuck."""
    for tag in range(1, 31):
        c.send("Tstatfs", ROOT, tag=tag)
    stuck.wait(2)
    c.send("Tflush", 30, tag=100)
    frame = c.receive()
    assert (frame.number, frame.tag) == (NUMBER_OF["Rflush"], 100)
    c.send("Tgetattr", ROOT, BASIC, tag=30)  # the tag is free again
    stuck.free.set()
    tags = sorted(c.receive().tag for _ in range(30))
    assert tags == list(range(1, 31))
    assert stuck.count == 29


def test_a_clunk_is_not_called_off(c: Client, source: Path, stuck: Stuck) -> None:
    """Its fid has gone already: so it is answered, and then the flush, though it had to queue."""
    need_attributes(source)
    c.walk(5, b"f")
    c.call("Txattrcreate", 5, b"user.a", 1, 0)
    c.call("Twrite", 5, 0, b"1")
    c.walk(6, b"f")
    for tag in range(30):
        c.send("Tstatfs", 6, tag=tag)
    stuck.wait(2)
    c.send("Tclunk", 5, tag=100)
    c.send("Tflush", 100, tag=101)
    c.call("Tgetattr", ROOT, BASIC, tag=102)  # so both have come
    stuck.free.set()
    found = [c.receive() for _ in range(32)]
    numbers = [frame.number for frame in found if frame.tag >= 100]
    assert numbers == [NUMBER_OF["Rclunk"], NUMBER_OF["Rflush"]]
    assert os.getxattr(source / "f", "user.a") == b"1"


def test_what_is_under_way_at_a_version_is_not_answered(
    server: Served, c: Client, stuck: Stuck
) -> None:
    """Nor is there a fid of it: the walk that ends afterwards is undone."""
    c.send("Tstatfs", ROOT, tag=1)
    stuck.wait()
    c.start()
    stuck.free.set()
    wait_until(lambda: not server.driver.requests, "they have ended", LIMIT)
    c.call("Tgetattr", ROOT, BASIC, tag=1)


def test_a_walk_that_ends_after_its_connection(
    server: Served, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves no fid."""
    begun, free = threading.Event(), threading.Event()
    step = module_of(ops.walk)._step

    def slow(*args: Any) -> Any:
        begun.set()
        assert free.wait(LIMIT)
        return step(*args)

    monkeypatch.setattr(module_of(ops.walk), "_step", slow)
    with server.client() as c:
        c.send("Twalk", ROOT, 5, (b"f",), tag=1)
        assert begun.wait(LIMIT)
    free.set()
    wait_until(server.is_idle, "nothing is left", LIMIT)


# Waiting for locks


def test_who_waits_for_a_lock_is_answered_once_he_has_it(server: Served, c: Client) -> None:
    with server.client() as other:
        c.open(5, b"f", flags=2)
        other.open(5, b"f", flags=2)
        assert c.call("Tlock", 5, 1, 0, 0, 0, 1, b"c") == (0,)
        assert other.call("Tlock", 5, 1, 0, 0, 0, 1, b"c") == (1,)
        other.send("Tlock", 5, 1, 1, 0, 0, 1, b"c", tag=7)
        other.call("Tgetattr", ROOT, BASIC)
        c.call("Tlock", 5, 2, 0, 0, 0, 1, b"c")
        assert (other.receive().values, c.call("Tlock", 5, 1, 0, 0, 0, 1, b"c")) == ((0,), (1,))


def test_a_wait_for_a_lock_is_called_off(server: Served, c: Client) -> None:
    """By a flush, and by the end of the connection."""
    with server.client() as holder, server.client() as other:
        holder.open(5, b"f", flags=2)
        holder.call("Tlock", 5, 1, 0, 0, 0, 1, b"c")
        for client in (c, other):
            client.open(5, b"f", flags=2)
            client.send("Tlock", 5, 1, 1, 0, 0, 1, b"c", tag=7)
        c.send("Tflush", 7, tag=8)
        frame = c.receive()
        assert (frame.number, frame.tag) == (NUMBER_OF["Rflush"], 8)
        other.socket.close()
        wait_until(lambda: server.server.connections == 2, "one has gone", LIMIT)
        holder.clunk(5)
        assert c.call("Tlock", 5, 1, 0, 0, 0, 1, b"c") == (0,)


def test_not_all_requests_wait_for_locks(source: Path) -> None:
    """The others are told that it is taken, so that somebody can give it back."""
    with served(source, max_requests=10) as server, server.client() as holder:
        holder.open(5, b"f", flags=2)
        holder.call("Tlock", 5, 1, 0, 0, 0, 1, b"c")
        with server.client() as c:
            c.open(5, b"f", flags=2)
            for tag in range(9):
                c.send("Tlock", 5, 1, 1, tag, 1, tag, b"c", tag=tag)
            found = [c.receive() for _ in range(4)]
            assert {frame.values for frame in found} == {(1,)}
            holder.clunk(5)
            assert {c.receive().values for _ in range(5)} == {(0,)}


# What is no message


def test_unknown_messages_are_refused(c: Client) -> None:
    """9P2000's older ones, R-messages, and numbers that nothing has."""
    known = {NUMBER_OF[m.name] for m in BY_NUMBER.values() if m.name.startswith("T")}
    for number in sorted(set(range(256)) - known):
        c.socket.sendall(HEADER.pack(HEADER_SIZE, number, 1))
        with fails(errno.EOPNOTSUPP):
            c.values_of(c.receive(), "Tgetattr")


def test_malformed_messages_are_refused(c: Client) -> None:
    """Cut off, with something behind, with a zero byte in a name: the connection goes on."""
    whole = encode(NUMBER_OF["Twalk"], 1, ROOT, 5, (b"f",))
    for body in (whole[7:-1], whole[7:] + b"x", whole[7:].replace(b"f", b"\0"), b""):
        c.socket.sendall(HEADER.pack(HEADER_SIZE + len(body), NUMBER_OF["Twalk"], 1) + body)
        with fails(errno.EPROTO):
            c.values_of(c.receive(), "Twalk")
    c.socket.sendall(HEADER.pack(8, NUMBER_OF["Tflush"], 1) + b"x")
    with fails(errno.EPROTO):
        c.values_of(c.receive(), "Tflush")
    c.call("Tgetattr", ROOT, BASIC)


@pytest.mark.parametrize("size", [0, 1, 6, 8193, 1 << 20, 0xFFFFFFFF])
def test_a_message_of_no_possible_size_ends_the_connection(
    server: Served, c: Client, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    with server.client() as other:
        c.socket.sendall(struct.pack("<IBH", size, NUMBER_OF["Tclunk"], 1))
        assert c.is_hung_up()
        other.call("Tgetattr", ROOT, BASIC)
    assert f"a message of {size} bytes" in caplog.text


@pytest.mark.parametrize("size", [6, 8193, 0xFFFFFFFF])
def test_such_a_size_in_pieces(c: Client, size: int) -> None:
    for byte in HEADER.pack(size, NUMBER_OF["Tclunk"], 1):
        with contextlib.suppress(ConnectionError):
            c.socket.send(bytes((byte,)))
        time.sleep(0.01)  # so that they come one by one; no proof hangs on it
    assert c.is_hung_up()


def test_before_a_version_messages_are_small(server: Served) -> None:
    with server.client(starts=False) as c:
        c.socket.sendall(struct.pack("<IBH", 4097, NUMBER_OF["Tversion"], NOTAG))
        assert c.is_hung_up()


def test_a_malformed_version(c: Client) -> None:
    c.socket.sendall(HEADER.pack(9, NUMBER_OF["Tversion"], NOTAG) + b"xx")
    with fails(errno.EPROTO):
        c.values_of(c.receive(), "Tversion")
    with fails(errno.EPROTO):  # all that was before is over
        c.call("Tgetattr", ROOT, BASIC)
    c.start()


# Limits


def test_too_many_fids(source: Path) -> None:
    with served(source, max_fids=10) as server, server.client() as c:
        for fid in range(1, 10):
            c.walk(fid)
        for call in (
            lambda: c.walk(10),
            lambda: c.call("Tattach", 10, NOFID, b"", b"", os.geteuid()),
            lambda: c.call("Txattrwalk", 1, 10, b""),
        ):
            with fails(errno.EMFILE):
                call()
        c.walk(1, b"f", fid=1)  # no new one
        c.clunk(1)
        c.walk(10)
        with server.client() as other:
            other.walk(1)


def test_too_much_of_extended_attributes(source: Path) -> None:
    """Fids keep the values that are read and written, and these are bounded, too."""
    need_attributes(source)
    os.setxattr(source / "f", "user.a", bytes(1000))
    with served(source, max_bytes=133_500) as server, server.client() as c:
        for fid in range(1, 6):
            c.walk(fid, b"f")
        for fid in (1, 2):
            c.call("Txattrcreate", fid, b"user.b", 65_500, 0)
        for fid in range(10, 13):
            c.call("Txattrwalk", 5, fid, b"user.a")
        for name, *values in (
            ("Txattrcreate", 3, b"user.b", 1, 0),
            ("Txattrwalk", 5, 13, b"user.a"),
            ("Txattrwalk", 5, 13, b""),
        ):
            with fails(errno.ENOMEM):
                c.call(name, *values)
        with server.client() as other:
            other.walk(1, b"f")
            other.call("Txattrwalk", 1, 2, b"user.a")
        # Those that failed have kept nothing, and their fids are free.
        for fid in (10, 11, 12):
            c.clunk(fid)
        for fid in range(13, 100):
            c.call("Txattrwalk", 5, fid, b"user.a")
            c.clunk(fid)
        for _ in range(4):
            with fails(errno.ENODATA):
                c.call("Txattrwalk", 5, 13, b"user.none")
        with fails(errno.E2BIG):
            c.call("Txattrcreate", 3, b"user.b", 65_537, 0)
        c.call("Tremove", 1)
        for fid in range(13, 70):
            c.call("Txattrwalk", 5, fid, b"user.a")


def test_too_many_connections(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(source, max_connections=3) as server, contextlib.ExitStack() as clients:
        first = [clients.enter_context(server.client()) for _ in range(3)]
        for _ in range(2):
            with server.client(starts=False) as c:
                with fails(errno.EUSERS):
                    c.call("Tversion", 8192, b"9P2000.L", tag=NOTAG)
                assert c.is_hung_up()
        first[0].call("Tgetattr", ROOT, BASIC)
        first[0].socket.close()
        wait_until(lambda: server.server.connections == 2, "one has gone", LIMIT)
        clients.enter_context(server.client())
    assert "refused: there are 3 clients" in caplog.text


def test_many_requests_of_one_client(source: Path, stuck: Stuck) -> None:
    """What is too many waits in its socket; every one is answered in the end."""
    with served(source, max_requests=5) as server, server.client() as c, server.client() as other:
        for tag in range(40):
            c.send("Tstatfs", ROOT, tag=tag)
        wait_until(lambda: len(server.driver.requests) == 5, "five are under way", LIMIT)
        for _ in range(20):
            other.call("Tgetattr", ROOT, BASIC)
            assert len(server.driver.requests) <= 6
        stuck.free.set()
        assert sorted(c.receive().tag for _ in range(40)) == list(range(40))


def test_many_bytes_of_one_client(source: Path, stuck: Stuck) -> None:
    """A few are begun at a time, and every one is answered."""
    with served(source, max_bytes=100_000) as server, server.client(msize=1 << 16) as c:
        c.open(5, b"f")
        c.send("Tstatfs", ROOT, tag=99)
        stuck.wait()
        for tag in range(50):
            c.send("Tread", 5, 0, 50_000, tag=tag)
        stuck.free.set()
        assert sorted(c.receive().tag for _ in range(51)) == [*range(50), 99]


def test_the_room_of_fids_that_have_gone_is_given_back(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever minds the table is told as it grows. What has become garbage since is found."""
    monkeypatch.setattr("ninefuse.tree.table._MANY", 100)
    cycle = threading.local()
    cycle.itself = cycle
    garbage = weakref.ref(cycle)
    memory.settle()
    del cycle
    with served(source) as server:
        fids, told = server.session.fids, []
        fids.step = 50
        fids.on_change = lambda: told.append(len(fids))
        with server.client() as c:
            for fid in range(1, 300):
                c.walk(fid)
            size = sys.getsizeof(fids._fids)
        wait_until(lambda: sys.getsizeof(fids._fids) < size // 4, "it is given back", LIMIT)
        wait_until(lambda: garbage() is None, "the garbage, too", LIMIT)
    assert told == [50, 100, 150, 200, 250, 300]


# Clients that misbehave


def pings(client: Client, seconds: float) -> list[float]:
    """How long each of many small requests takes, for that long, in seconds."""
    taken, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        client.call("Tgetattr", ROOT, BASIC)
        taken.append(time.monotonic() - begin)
    return taken


def kept() -> int:
    """Bytes of requests and answers that the server keeps for one client at most."""
    connections = (one for one in gc.get_objects() if isinstance(one, Connection))
    return max(one._cost + one._unsent for one in connections)


def test_a_client_that_does_not_read_its_answers(server: Served, source: Path) -> None:
    """It is read from no further, keeps no more than it may here, and others are served."""
    (source / "big").write_bytes(bytes(1 << 20))
    with server.client() as other, server.client(msize=1 << 20) as c:
        c.open(5, b"big")
        c.socket.setblocking(False)
        sent = 0
        # Until the server takes no more: what has gone into the socket is far less than this.
        with contextlib.suppress(BlockingIOError):
            for tag in range(60_000):
                sent += c.socket.send(encode(NUMBER_OF["Tread"], tag, 5, 0, 1 << 20))
        assert sent < 60_000 * 23
        assert kept() <= DEFAULT_BYTES + 2 * c.msize
        for _ in range(50):
            other.call("Tgetattr", ROOT, BASIC)
        # It comes back, and gets all that it asked for.
        c.socket.settimeout(LIMIT)
        for _ in range(20):
            assert len(c.receive().values[0]) == (1 << 20) - 11


def test_a_client_that_sends_a_byte_at_a_time(server: Served) -> None:
    with server.client() as other, server.client() as c:
        message = encode(NUMBER_OF["Tgetattr"], 1, ROOT, BASIC)
        for at in range(len(message)):
            c.socket.sendall(message[at : at + 1])
            other.call("Tgetattr", ROOT, BASIC)
        assert c.receive().tag == 1


def test_messages_that_come_together_and_in_pieces(c: Client) -> None:
    message = encode(NUMBER_OF["Tgetattr"], 0, ROOT, BASIC)
    many = b"".join(encode(NUMBER_OF["Tgetattr"], tag, ROOT, BASIC) for tag in range(100))
    for size in (1, len(message) - 1, len(message) + 3, 1000):
        for at in range(0, len(many), size):
            c.socket.sendall(many[at : at + size])
        assert sorted(c.receive().tag for _ in range(100)) == list(range(100))


@pytest.mark.parametrize("how", ["close", "reset", "shutdown", "half a message"])
def test_a_client_that_vanishes(server: Served, source: Path, how: str) -> None:
    """Nothing of it is left: `served` looks."""
    with server.client() as other:
        c = server.client()
        for fid in range(1, 200):
            c.open(fid, b"f", flags=2)
        c.create(300, b"new", b"data")
        c.call("Tlock", 5, 1, 0, 0, 0, 1, b"c")
        if how == "reset":
            c.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "shutdown":
            c.socket.shutdown(socket.SHUT_WR)
            assert c.is_hung_up()
        elif how == "half a message":
            c.socket.sendall(encode(NUMBER_OF["Tgetattr"], 1, ROOT, BASIC)[:-3])
        c.socket.close()
        wait_until(lambda: server.server.connections == 1, "it has gone", LIMIT)
        assert len(server.session.fids) == 2
        other.open(1, b"f", flags=2)
        assert other.call("Tlock", 1, 1, 0, 0, 0, 1, b"c") == (0,)


def test_a_client_that_vanishes_while_it_is_not_read_from(source: Path) -> None:
    """It has as much under way as it may, all of which waits for another's lock."""
    with served(source, max_bytes=100_000) as server, server.client() as holder:
        holder.open(5, b"f", flags=2)
        holder.call("Tlock", 5, 1, 0, 0, 0, 1, b"c")
        with server.client(msize=1 << 16) as c:
            c.open(5, b"f", flags=2)
            for tag in range(3):
                c.send("Tlock", 5, 1, 1, 0, 0, tag, b"c" * 60_000, tag=tag)
            wait_until(lambda: len(server.driver.requests) == 2, "two of three wait", LIMIT)
        wait_until(lambda: server.server.connections == 1, "it has gone", LIMIT)
        wait_until(lambda: not server.driver.requests, "its requests have ended", LIMIT)


def test_a_client_that_is_not_heard_of(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acknowledges no answers. One that has none to come is asked by the kernel."""
    monkeypatch.setattr("ninefuse.wire.connection._LOOK", 0.05)
    monkeypatch.setattr("ninefuse.wire.connection._SILENCE", 0.3)
    (source / "big").write_bytes(bytes(1 << 20))
    with (
        served(source, place=Address("tcp", "127.0.0.1", 0)) as server,
        server.client() as idle,
        server.client(msize=1 << 20) as c,
    ):
        c.open(5, b"big")
        for tag in range(20):
            c.send("Tread", 5, 0, 1 << 20, tag=tag)
        # What it takes in is full: the kernel asks it more and more seldom.
        wait_until(lambda: server.server.connections == 1, "it is not heard of", LIMIT)
        idle.call("Tgetattr", ROOT, BASIC)


def test_a_client_that_says_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ninefuse.wire.connection._GREETING", 0.2)
    with served(source) as server:
        with server.client(starts=False) as c:
            assert c.is_hung_up()
        with server.client(starts=False) as c:
            c.call("Tversion", 8192, b"9P2000", tag=NOTAG)
            assert c.is_hung_up()
        with server.client() as c:
            assert pings(c, 0.5)


def test_many_messages_at_once_do_not_keep_others_waiting(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that send thousands in one go, neither waits until the other's have been taken."""
    take, order = Conversation.take, list[int]()

    def noted(self: Conversation, frame: bytes) -> None:
        order.append(self.number)
        take(self, frame)

    monkeypatch.setattr(Conversation, "take", noted)
    many = b"".join(encode(NUMBER_OF["Tgetattr"], tag, ROOT, BASIC) for tag in range(1000))
    begun, free = threading.Event(), threading.Event()

    def look_away() -> None:
        begun.set()
        assert free.wait(LIMIT)

    with server.client() as one, server.client() as other:
        assert server.server.token is not None
        server.server.token.run_sync_soon(look_away)
        assert begun.wait(LIMIT)
        order.clear()
        for c in (one, other):
            c.socket.sendall(many)
        free.set()
        for c in (one, other):
            assert sorted(c.receive().tag for _ in range(1000)) == list(range(1000))
    assert len(set(order[:100])) == 2


def test_the_end_of_the_server(source: Path) -> None:
    """Clients see their connections closed."""
    with served(source) as server:
        clients = [server.client() for _ in range(3)]
        server.server.end()
        for c in clients:
            assert c.is_hung_up()
            c.socket.close()


def test_an_exception_that_nobody_thought_of_costs_one_client_the_connection(
    server: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it had is given back; others are served on."""

    def fail(*args: object) -> None:
        raise ZeroDivisionError

    with server.client() as other, server.client() as c:
        with monkeypatch.context() as patched:
            patched.setattr(Conversation, "_note_fid", fail)
            c.send("Tgetattr", ROOT, BASIC, tag=7)
            wait_until(c.is_hung_up, "it is hung up", LIMIT)
        wait_until(lambda: server.server.connections == 1, "it has gone", LIMIT)
        other.call("Tgetattr", ROOT, BASIC)
    wait_until(server.is_idle, "nothing is left", LIMIT)
    assert "cannot be answered" in caplog.text
    caplog.clear()
