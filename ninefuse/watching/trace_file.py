"""The file of a trace: what was seen of requests, as Chrome trace events, a line each.

The format is the JSON array form of the Trace Event Format, which Perfetto and
chrome://tracing open; it allows that the end of the array is missing, so what a killed
daemon leaves can be read. A thread writes; what waits for it is bounded, and so is the file.

    lane (a thread)   stretch > message > call     complete events, one within the other
                      receive, reply, deferred
    hand-over         an arrow from one stretch to the next on another lane
    request           from its arrival to its reply, with its waits: an asynchronous event
    lost              a mark where something is left out, with how much: an instant event

Locks touched: its own mutex, for counting what waits and what is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.process import ownfile
from ninefuse.process.threads import start_quietly

log = logging.getLogger(__name__)

_MOST_WAITING = 100_000  # pieces (some 200 bytes each) that may wait to be written
_MOST_BYTES = 1 << 30  # of a file: more than viewers open
_PATIENCE = 5.0  # seconds at the end: what is not written by then is left out
_LAST_WORDS = 1.0  # seconds more, for saying so in the file
_LINES = 500  # to write in one go
_PID = 1

Event = dict[str, Any]


class Lane(NamedTuple):
    """A thread: its number in the trace and its name."""

    number: int
    name: str


class Message(NamedTuple):
    """A 9P message, by its name in the protocol, and the fid it was sent to."""

    name: str
    fid: int | None


class Piece(NamedTuple):
    """A time in which a body ran (``call`` is empty), or a call that it had made."""

    lane: Lane
    begin: int  # ns, as all times here
    end: int
    call: str
    message: int  # the message it belongs to, by number; -1: none


class Wait(NamedTuple):
    """A time in which a body waited for a lock, or for io_uring, and occupied no thread."""

    label: str
    begin: int
    end: int


class Way:
    """What was seen of one request."""

    __slots__ = (
        "arrived",
        "blocked",
        "engine_calls",
        "error",
        "messages",
        "name",
        "pieces",
        "received",
        "reply",
        "tag",
        "waits",
    )

    def __init__(self, tag: int, name: str, arrived: int) -> None:
        self.tag = tag
        self.name = name
        self.received: tuple[Lane, int] | None = None  # where and when its reading began
        self.arrived = arrived
        self.pieces: list[Piece] = []  # in the order of time, and so are the next three
        self.messages: list[Message] = []
        self.waits: list[Wait] = []
        self.engine_calls = 0  # made meanwhile
        self.blocked: list[tuple[Lane, str, int, int]] = []  # waits on a thread
        self.error = ""
        self.reply: tuple[Lane, int, int] | None = None

    def size(self) -> int:
        """How much memory it takes, in pieces."""
        return len(self.pieces) + len(self.messages) + 8


class Stretch(NamedTuple):
    """Pieces of a way that follow each other on one thread, without a wait between them."""

    lane: Lane
    pieces: list[Piece]

    @property
    def begin(self) -> int:
        return self.pieces[0].begin

    @property
    def end(self) -> int:
        return self.pieces[-1].end


class TraceFile:
    """Writes ways to a file, on a thread of its own.

    Args:
        path: of the file, which is made or emptied.
        title: what the viewer calls the process.

    Raises:
        Failure: it cannot be written.
    """

    def __init__(self, path: str, title: str) -> None:
        self.path = path
        try:
            self._fd = _opened(path)
            head = b"[\n" + _json(_metadata("process_name", 0, name=title))
            self._whole = os.write(self._fd, head)  # bytes of whole lines
        except OSError as error:
            raise Failure(
                ExitCode.USAGE,
                f"trace file {path} cannot be written ({error.strerror}): give one that can be",
            ) from None
        self._left = _MOST_BYTES
        self._queue: SimpleQueue[Way | list[Event] | None] = SimpleQueue()
        self._mutex = threading.Lock()
        self._waiting = 0  # events in the queue, by a generous estimate
        self._lost = 0  # requests that found it full, or came too late
        self._lost_calls = 0  # deferred calls that did
        self._told = (0, 0)  # of these, how many the file tells of
        self._deadline = sys.float_info.max  # after it nothing is written but what is left out
        self._hand_overs = itertools.count(1)
        self._thread = threading.Thread(target=self._write_all, name="trace", daemon=True)
        start_quietly(self._thread)

    def lane(self, name: str) -> Lane:
        """Make a lane for the calling thread, and tell the viewer of it.

        Args:
            name: what it is called; "dispatcher" and "worker-0" and so on come first.
        """
        kind, _, number = name.partition("-")
        if name == "dispatcher":
            lane = Lane(0, name)
        elif kind == "worker" and number.isdecimal():
            lane = Lane(int(number) + 1, name)
        else:
            lane = Lane(threading.get_native_id() + 10_000, name)
        self._queue.put(
            [
                _metadata("thread_name", lane.number, name=name),
                _metadata("thread_sort_index", lane.number, sort_index=lane.number),
            ]
        )
        return lane

    def put(self, way: Way) -> None:
        """Have a request written that is over. Any thread; never blocks."""
        with self._mutex:
            if self._waiting > _MOST_WAITING:
                self._lost += 1
                return
            self._waiting += way.size()
        self._queue.put(way)

    def put_deferred(self, lane: Lane, name: str, begin: int, end: int) -> None:
        """Have a call written that belongs to no request any more. Any thread; never blocks."""
        if self._queue.qsize() < _MOST_WAITING:
            self._queue.put([_complete(lane, "deferred", name, begin, end)])
        else:
            with self._mutex:
                self._lost_calls += 1

    def close(self) -> None:
        """Write what is left, and the end of the array; not if that takes seconds."""
        self._deadline = time.monotonic() + _PATIENCE
        self._queue.put(None)
        self._thread.join(_PATIENCE + _LAST_WORDS)
        if self._thread.is_alive():
            log.warning("%s: cannot be written to its end", self.path)
            return
        os.close(self._fd)
        if self._lost:
            log.warning(
                "%s lacks %d requests, which came faster than it was written",
                self.path,
                self._lost,
            )

    def _write_all(self) -> None:
        lines: list[bytes] = []
        while (found := self._queue.get()) is not None:
            lines += [b",\n" + _json(event) for event in self._events(found)]
            if len(lines) >= _LINES or self._queue.empty():
                self._write(b"".join(lines) + self._missing())
                lines = []
        self._write(b"".join(lines) + self._missing())
        if self._left > 0:
            self._write(b"\n]\n")

    def _events(self, found: Way | list[Event]) -> list[Event]:
        is_late = time.monotonic() > self._deadline
        if isinstance(found, list):
            if not is_late or found[0]["ph"] == "M":
                return found
            with self._mutex:
                self._lost_calls += len(found)
            return []
        with self._mutex:
            self._waiting -= found.size()
            self._lost += is_late
        return [] if is_late else events(found, self._hand_overs)

    def _missing(self) -> bytes:
        """The line that tells what was left out since the last such line, if anything was."""
        with self._mutex:
            lost = self._lost, self._lost_calls
        if lost == self._told:
            return b""
        requests, calls = lost[0] - self._told[0], lost[1] - self._told[1]
        self._told = lost
        mark = _mark(f"left out: {requests} requests, {calls} deferred calls")
        mark["args"] = {"requests": requests, "deferred": calls}
        return b",\n" + _json(mark)

    def _write(self, data: bytes) -> None:
        """Write whole lines, or none any more: the disk's or the file's limit is reached."""
        if self._left <= 0:
            return
        self._left -= len(data)
        try:
            if self._left <= 0:
                log.warning("%s ends here: it has %d bytes", self.path, _MOST_BYTES)
                data = b",\n" + _json(_mark("the file is full: the rest is left out")) + b"\n]\n"
            left = data
            while left:
                left = left[os.write(self._fd, left) :]
            self._whole += len(data)
        except OSError as error:
            self._left = 0
            log.warning("%s ends here: %s", self.path, error.strerror)
            self._cut()

    def _cut(self) -> None:
        """Take back the line that found no more room, with all that was written with it."""
        with contextlib.suppress(OSError):  # not a regular file
            os.ftruncate(self._fd, self._whole)


def _opened(path: str) -> int:
    """A file that is ours, made or emptied."""
    directory, name = ownfile.place_of(path)
    try:
        fd = ownfile.open_own(directory, name, 0o644)
    finally:
        os.close(directory)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, 0)
    return fd


def events(way: Way, hand_overs: Iterator[int]) -> list[Event]:
    """The events that show a request.

    Args:
        way: of a request that is over.
        hand_overs: the numbers for its arrows, which no other request may use.
    """
    found: list[Event] = []
    tag = {"request": way.tag}
    if way.received is not None:
        found.append(_complete(way.received[0], "receive", "receive", way.received[1], way.arrived))
        found[-1]["args"] = tag
    stretches = list(_stretches(way))
    for stretch in stretches:
        found += _stretch_events(way, stretch)
    for lane, label, begin, end in way.blocked:
        found.append({**_complete(lane, "lock", label, begin, end), "args": tag})
    stations = [(s.lane, s.begin, s.end) for s in stretches]
    if way.reply is not None:
        lane, begin, end = way.reply
        stations.append(way.reply)
        found.append({**_complete(lane, "reply", "reply", begin, end), "args": tag})
    pauses = [(wait.label, wait.begin, wait.end) for wait in way.waits]
    crossings = 0
    for (left, _, gone), (reached, come, _) in itertools.pairwise(stations):
        if left == reached:
            continue
        crossings += 1
        number = next(hand_overs)
        arrow = {"name": "hand-over", "cat": "hand-over", "id": number, "pid": _PID, "args": tag}
        # An arrow belongs to the slice that encloses it: it starts just before its end.
        found.append({**arrow, "ph": "s", "tid": left.number, "ts": _us(gone - 1)})
        found.append({**arrow, "ph": "f", "bp": "e", "tid": reached.number, "ts": _us(come)})
        if not any(gone <= wait.end and wait.begin <= come for wait in way.waits):
            pauses.append(("queued" if reached.number else "returning", gone, come))
    begin = way.arrived if way.received is None else way.received[1]
    end = max(station[2] for station in stations)
    found.append(_asynchronous(way, "b", way.name, begin))
    for label, since, until in sorted(pauses, key=lambda pause: pause[1]):
        found.append(_asynchronous(way, "b", label, since))
        found.append(_asynchronous(way, "e", label, until))
    found.append(_asynchronous(way, "e", way.name, end))
    found[-1]["args"] = {
        "crossings": crossings,
        "calls": sum(bool(piece.call) for piece in way.pieces) + way.engine_calls,
        "messages": [message.name for message in way.messages],
        **({"error": way.error} if way.error else {}),
    }
    return found


def _stretches(way: Way) -> Iterator[Stretch]:
    """The stretches of a way: it ends at another thread's piece, and at a wait."""
    pieces: list[Piece] = []
    waits = iter([*(wait.begin for wait in way.waits), sys.maxsize])
    next_wait = next(waits)
    for piece in way.pieces:
        if pieces and (piece.lane != pieces[0].lane or piece.begin > next_wait):
            yield Stretch(pieces[0].lane, pieces)
            pieces = []
        while piece.begin > next_wait:
            next_wait = next(waits)
        pieces.append(piece)
    if pieces:
        yield Stretch(pieces[0].lane, pieces)


def _stretch_events(way: Way, stretch: Stretch) -> Iterator[Event]:
    tag = {"request": way.tag}
    lane = stretch.lane
    yield {**_complete(lane, "stretch", way.name, stretch.begin, stretch.end), "args": tag}
    for number, group in itertools.groupby(stretch.pieces, lambda piece: piece.message):
        pieces = list(group)
        if number >= 0:
            message = way.messages[number]
            shown = _complete(lane, "message", message.name, pieces[0].begin, pieces[-1].end)
            fid = {} if message.fid is None else {"fid": message.fid}
            yield {**shown, "args": {**tag, **fid}}
        for piece in pieces:
            if piece.call:
                shown = _complete(lane, "call", piece.call, piece.begin, piece.end)
                yield {**shown, "args": tag}


def _complete(lane: Lane, category: str, name: str, begin: int, end: int) -> Event:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": _PID,
        "tid": lane.number,
        "ts": _us(begin),
        "dur": _us(end - begin),
    }


def _asynchronous(way: Way, phase: str, name: str, when: int) -> Event:
    return {
        "name": name,
        "cat": "request",
        "ph": phase,
        "id": way.tag,
        "pid": _PID,
        "tid": 0,
        "ts": _us(when),
    }


def _metadata(what: str, lane: int, **args: object) -> Event:
    return {"name": what, "ph": "M", "pid": _PID, "tid": lane, "args": args}


def _mark(name: str) -> Event:
    """Something that is said of the whole trace, at this time."""
    now = _us(time.perf_counter_ns())  # the clock of the requests
    return {"name": name, "cat": "lost", "ph": "i", "s": "g", "pid": _PID, "tid": 0, "ts": now}


def _us(nanoseconds: int) -> float:
    """The format's unit: microseconds."""
    return nanoseconds / 1000


def _json(event: Event) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()
