"""One connection: messages come in, answers go out, each end at its own pace.

A task reads and a task writes. What a client may keep here is bounded: requests under way, and
bytes of requests, of answers to come, and of answers that it does not take. At that bound it is
read from no further until something of it has ended, which delays nobody else. One that sends many
requests at once lets others come in between.

Locks touched: none.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import select
import socket
import struct
import termios
from collections import deque
from typing import Protocol

import trio

from ninefuse.calls import Body
from ninefuse.ops import MAX_MSIZE, VERSION
from ninefuse.ops.attach import MIN_MSIZE
from ninefuse.wire.codec import HEADER, HEADER_SIZE, SIZE, Malformed, decode, encode
from ninefuse.wire.conversation import Broken, Conversation, Door, given_back
from ninefuse.wire.messages import NUMBER_OF
from ninefuse.wire.users import Peer

log = logging.getLogger(__name__)

_PIECE = 1 << 18  # bytes that are read at a time
_IN_A_ROW = 8  # messages of one client that are begun before others have their turn
_GREETING = 60.0  # seconds that a client may take until it has said which protocol it speaks
_PATIENCE = 1.0  # seconds without an end of a request, until it is looked whether he is there
_LOOK = 30.0  # seconds from one look whether a client is heard of to the next
# Seconds after which one is not; what is there says so each two minutes at least (TCP_RTO_MAX).
_SILENCE = 240.0
_LAST_ACK = 56  # where tcpi_last_ack_recv is in struct tcp_info; in milliseconds
_AT_ONCE = 64  # fids that are given back in one go
_PIECES = 16  # answers that are sent at a time

_VERSION = NUMBER_OF["Tversion"]
_ERROR = NUMBER_OF["Rlerror"]


class Host(Door, Protocol):
    """What a connection needs of the server that it is with."""

    async def run_to_end(self, name: str, body: Body[None]) -> None:
        """Have a body run, and wait for its end, which no cancellation keeps from that."""

    def new_number(self) -> int:
        """A number for a conversation."""


class Connection:
    """Args:
    host: the server.
    connected: the socket, which does not block. It is closed at the end.
    peer: who is at the other end.
    name: what the log calls it.
    """

    def __init__(self, host: Host, connected: socket.socket, peer: Peer, name: str) -> None:
        self.name = name
        self._host = host
        self._socket = connected
        self._peer = peer
        self._conversation: Conversation | None = None
        self._requests = 0  # under way, of all conversations
        self._cost = 0  # bytes of these, and of their answers
        self._out: deque[memoryview] = deque()
        self._unsent = 0  # bytes of these
        self._has_out = trio.Event()
        self._eased: trio.Event | None = None  # somebody waits for less of all this
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Serve the client to its end. Everything of it is given back then."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    if self._socket.family in (socket.AF_INET, socket.AF_INET6):
                        nursery.start_soon(self._watch)
                    try:
                        await self._read()
                    except Broken as e:
                        log.warning("%s: connection closed: %s", self.name, e)
                    nursery.cancel_scope.cancel()
        finally:
            self._out.clear()
            self._unsent = 0
            self._socket.close()
            with trio.CancelScope(shield=True):
                await self._end_conversation()
                while self._requests:
                    await self._wait_for_ease()

    # What a conversation asks for

    def send(self, message: bytes) -> None:
        """Send an answer, or leave it to the task that writes."""
        sent = 0
        if not self._out:
            try:
                sent = self._socket.send(message)
            except BlockingIOError:
                pass
            except OSError as e:
                self._lost(e.strerror)
                return
            if sent == len(message):
                return
        rest = memoryview(message)[sent:]
        self._out.append(rest)
        self._unsent += len(rest)
        self._has_out.set()

    def begins(self, cost: int) -> None:
        """A request is under way that takes so many bytes."""
        self._requests += 1
        self._cost += cost

    def ends(self, cost: int) -> None:
        """One is no more."""
        self._requests -= 1
        self._cost -= cost
        self._ease()

    def give_up(self) -> None:
        """End the connection: something has gone wrong here."""
        self._lost("an error of the server's")

    # Reading

    async def _read(self) -> None:
        begun = bytearray()  # a message that has not come as a whole, or a part of its size
        has_agreed = False
        with trio.move_on_after(_GREETING) as greeting:
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                try:
                    piece = self._socket.recv(_PIECE)
                except BlockingIOError:
                    continue
                except OSError as e:
                    self._lost(e.strerror)
                    return
                if not piece:
                    return
                if begun:
                    begun += piece
                    if len(begun) < _length_of(begun) <= self._longest:
                        continue
                    piece = bytes(begun)
                begun = bytearray(await self._take_all(piece))
                if not has_agreed and self._conversation is not None:
                    has_agreed = True
                    greeting.deadline = float("inf")
        if greeting.cancelled_caught:
            log.warning(
                "%s: connection closed: it has not said which protocol it speaks", self.name
            )

    async def _take_all(self, buffer: bytes) -> bytes:
        """Take the messages that are complete; what is left of what was read."""
        at = taken = 0
        while len(buffer) - at >= SIZE.size:
            (size,) = SIZE.unpack_from(buffer, at)
            most = self._longest
            if not HEADER_SIZE <= size <= most:
                raise Broken(f"a message of {size} bytes, where {HEADER_SIZE} to {most} may be")
            if len(buffer) - at < size:
                break
            frame = buffer[at : at + size]
            at += size
            _, number, tag = HEADER.unpack_from(frame)
            if number == _VERSION:
                await self._agree(frame, tag)
            elif self._conversation is None:
                self.send(encode(_ERROR, tag, errno.EPROTO))
            else:
                self._conversation.take(frame)
            if self._has_too_much():
                await self._be_eased()
            taken += 1
            if taken % _IN_A_ROW == 0:
                await trio.lowlevel.checkpoint()
        return buffer[at:]

    @property
    def _longest(self) -> int:
        """Bytes of the longest message that may come now."""
        return MIN_MSIZE if self._conversation is None else self._conversation.msize

    async def _agree(self, frame: bytes, tag: int) -> None:
        """Answer a Tversion: everything that was before is over."""
        await self._end_conversation()
        try:
            msize, version = decode(frame).values
        except Malformed as e:
            log.info("%s: Tversion: %s", self.name, e)
            self.send(encode(_ERROR, tag, errno.EPROTO))
            return
        if msize < MIN_MSIZE:
            self.send(encode(_ERROR, tag, errno.EMSGSIZE))
            return
        msize = min(msize, MAX_MSIZE)
        if version != VERSION.encode():
            self.send(encode(_VERSION + 1, tag, msize, b"unknown"))
            return
        number = self._host.new_number()
        self._conversation = Conversation(self._host, self, number, msize, self._peer)
        log.debug("%s: %s, messages of %d bytes", self.name, VERSION, msize)
        self.send(encode(_VERSION + 1, tag, msize, version))

    async def _end_conversation(self) -> None:
        conversation, self._conversation = self._conversation, None
        if conversation is None:
            return
        fids = iter(conversation.end())
        with trio.CancelScope(shield=True):
            while some := list(itertools.islice(fids, _AT_ONCE)):
                body = given_back(self._host.session, some)
                await self._host.run_to_end("disconnect", body)
                await trio.lowlevel.checkpoint()

    # Room

    def _has_too_much(self) -> bool:
        """Whether the client has as much here as it may."""
        settings = self._host.settings
        return (
            self._requests >= settings.max_requests
            or self._cost + self._unsent > settings.max_bytes
        )

    async def _be_eased(self) -> None:
        while self._has_too_much():
            with trio.move_on_after(_PATIENCE) as patience:
                await self._wait_for_ease()
            # Who is not read from is not heard to leave, and what he has under way may wait for
            # others' locks for as long as they please.
            if patience.cancelled_caught and _has_left(self._socket):
                self._lost("it has hung up")
                await trio.lowlevel.checkpoint()

    async def _wait_for_ease(self) -> None:
        if self._eased is None:
            self._eased = trio.Event()
        await self._eased.wait()

    def _ease(self) -> None:
        if self._eased is not None:
            self._eased.set()
            self._eased = None

    # Writing

    async def _write(self) -> None:
        while True:
            await self._has_out.wait()
            while self._out:
                await trio.lowlevel.wait_writable(self._socket)
                try:
                    sent = self._socket.sendmsg(list(itertools.islice(self._out, _PIECES)))
                except BlockingIOError:
                    continue
                except OSError as e:
                    self._lost(e.strerror)
                    return
                self._unsent -= sent
                while sent:
                    piece = self._out[0]
                    if sent < len(piece):
                        self._out[0] = piece[sent:]
                        break
                    sent -= len(piece)
                    self._out.popleft()
                self._ease()
            self._has_out = trio.Event()

    async def _watch(self) -> None:
        """End it if a client over TCP is not heard of.

        While an answer is on its way the kernel does not ask whether it is there (SO_KEEPALIVE),
        and takes a quarter of an hour to give up. One that is there, and reads nothing, says so.
        """
        while True:
            await trio.sleep(_LOOK)
            if _unheard(self._socket) > _SILENCE:
                self._lost("it is not heard of")

    def _lost(self, why: str | None) -> None:
        log.info("%s: connection lost: %s", self.name, why)
        self._scope.cancel()


def _has_left(connected: socket.socket) -> bool:
    """Whether a client sends nothing any more, whatever of it has not been read."""
    poll = select.poll()
    poll.register(connected, select.POLLRDHUP)
    return bool(poll.poll(0))


def _unheard(connected: socket.socket) -> float:
    """For how many seconds a client has acknowledged nothing, where there is something; else 0."""
    (queued,) = struct.unpack("=i", fcntl.ioctl(connected, termios.TIOCOUTQ, bytes(4)))
    if not queued:
        return 0.0
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK + 4)
    return float(struct.unpack_from("=I", info, _LAST_ACK)[0]) / 1000


def _length_of(begun: bytearray) -> int:
    """How many bytes a message has that begins so; of its size alone, if that is not known."""
    return int(SIZE.unpack_from(begun)[0]) if len(begun) >= SIZE.size else SIZE.size
