"""`--trace FILE`: the way of every request, in the Chrome trace-event format.

A `Tracer` is a driver's observer. It has a `_TracedBody` stand between each body and its driver:
that sees when and on which thread the body runs, which messages it begins (`Begin`), what it
waits for, which calls it asks for and where these are made. So a trace shows what a driver does,
not what it is meant to do. Without one there is nothing to pay for but a comparison for each
message and each call.

What was seen of a request is handed to a thread that writes it (trace_file.py) when the
request is answered.

Locks touched: none; it is called inside sections of the fid table's lock.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from ninefuse.calls import Begin, Body, Call, Command, words_of
from ninefuse.watching.trace_file import Lane, Message, Piece, TraceFile, Wait, Way

T = TypeVar("T")

_now = time.perf_counter_ns

_INTERVAL = 1e-4  # seconds

# pyfuse3 may end a task after a reply, which then does not come back to wait.
_MOST_REPLYING = 4096


class Tracer:
    """Watches the requests of one driver and has them written; an executor's `Observer`.

    A context manager: inside, threads are switched more often.

    Attributes:
        who: reads requests and answers them: a thread; under pyfuse3 a task of trio's.

    Args:
        file: where to write.
    """

    def __init__(self, file: TraceFile) -> None:
        self._file = file
        self._lanes: dict[int, Lane] = {}  # by the thread's ident
        self._running: dict[int, _TracedBody[Any]] = {}  # likewise: whose code runs there
        self.who: Callable[[], object] = threading.get_ident
        self._received: dict[object, int] = {}  # by who: when a request was there
        self._replying: dict[object, Way] = {}  # likewise: requests that are being answered

    def __enter__(self) -> Tracer:
        # The thread that writes is busy, and would keep the others waiting for the
        # interpreter's lock for milliseconds: for calls that take microseconds.
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(_INTERVAL)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setswitchinterval(self._interval)

    def watch(self, tag: int, name: str, body: Body[T], *, awaited: bool) -> Body[T]:
        """Return a body that does the same and is watched.

        Args:
            tag: the request's number.
            name: its callback.
            body: not started.
            awaited: whether `answered` will be called; if not, it is over when it ends.
        """
        watched = _TracedBody(self, tag, name, body, awaited)
        if awaited:
            received = self._received.pop(self.who(), None)
            if received is not None:
                watched.way.received = (self.lane(), received)
        return watched

    def watch_call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same; its lane shows when it ran."""
        name = words_of(function)

        def watched(*args: Any) -> Any:
            lane, begin = self.lane(), _now()
            try:
                return function(*args)
            finally:
                self._file.put_deferred(lane, name, begin, _now())

        watched.__name__ = getattr(function, "__name__", name)
        return watched

    def answered(self, body: Body[Any]) -> None:
        """A body's answer is there. On the thread that answers."""
        assert isinstance(body, _TracedBody)
        now = _now()
        body.way.reply = (self.lane(), now, now)
        if len(self._replying) >= _MOST_REPLYING:
            self._flush()
        task = self.who()
        before = self._replying.get(task)
        if before is not None:  # it was no request of the device's
            self._file.put(before)
        self._replying[task] = body.way

    def received(self) -> None:
        """Whoever this is (`who`) has read a request."""
        if len(self._received) >= _MOST_REPLYING:
            self._received.clear()  # of tasks that have ended, and of what has no body
        self._received[self.who()] = _now()

    def replied(self) -> None:
        """The answer to the last body of which `answered` told the same one was sent."""
        way = self._replying.pop(self.who(), None)
        if way is not None and way.reply is not None:
            way.reply = (way.reply[0], way.reply[1], _now())
            self._file.put(way)

    def close(self) -> None:
        """Write what is left. When nothing is under way any more."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        for way in self._replying.values():
            self._file.put(way)
        self._replying.clear()
        self._received.clear()

    def waited_for_table(self, mode: str, begin: int, end: int) -> None:
        """A wait for the fid table's lock is over (`TableLock.on_wait`)."""
        body = self._running.get(threading.get_ident())
        if body is not None:
            body.way.blocked.append((self.lane(), f"waits for fid table ({mode})", begin, end))

    def lane(self) -> Lane:
        """The lane of the calling thread."""
        ident = threading.get_ident()
        lane = self._lanes.get(ident)
        if lane is None:
            thread = threading.current_thread()
            name = "dispatcher" if thread is threading.main_thread() else thread.name
            lane = self._lanes[ident] = self._file.lane(name)
        return lane


class _TracedBody(Coroutine[Any, Any, T]):
    """Stands between a body and its driver, and keeps what it sees of the body's way."""

    def __init__(self, tracer: Tracer, tag: int, name: str, body: Body[T], awaited: bool) -> None:
        self.way = Way(tag, name, _now())
        self._tracer = tracer
        self._body = body
        self._awaited = awaited
        self._waiting: tuple[str, int] | None = None  # for what, since when

    def send(self, value: Any) -> Any:
        return self._run(self._body.send, value)

    def throw(self, *error: Any) -> Any:
        return self._run(self._body.throw, *error)

    def close(self) -> None:
        self._body.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._body.__await__()

    def make(self, call: Call[Any], *, now: bool) -> Any:
        """Make a call that the body asked for, as its driver has it made."""
        tracer, message = self._tracer, len(self.way.messages) - 1
        lane, ident = tracer.lane(), threading.get_ident()
        tracer._running[ident] = self
        name = call.label
        begin = _now()
        try:
            return call.make_now() if now else call.make()
        except BlockingIOError:
            name = ""  # it would have blocked, and so is still to be made
            raise
        finally:
            self.way.pieces.append(Piece(lane, begin, _now(), name, message))
            tracer._running.pop(ident, None)

    def waits(self, what: str) -> None:
        """The body is about to be put aside. Said before: then it may run on another thread."""
        self._waiting = (f"waits for {what}", _now())

    def made_elsewhere(self, call: Call[Any], begin: int, end: int) -> None:
        """A call was made on no thread of ours, between these times (ns)."""
        self.way.waits.append(Wait(f"io_uring: {call.label}", begin, end))
        self.way.engine_calls += 1

    def _run(self, resume: Callable[..., Any], *value: Any) -> Command:
        """Run the body to its next command, which goes to the driver."""
        tracer = self._tracer
        lane, begin = tracer.lane(), _now()
        ident = threading.get_ident()
        if self._waiting is not None:
            what, since = self._waiting
            self._waiting = None
            self.way.waits.append(Wait(what, since, begin))
        tracer._running[ident] = self
        try:
            while True:
                command: Command = resume(*value)
                if not isinstance(command, Begin):
                    break
                begin = self._cut(lane, begin)
                self.way.messages.append(Message(f"T{command.message}", command.fid))
                resume, value = self._body.send, (None,)
        except BaseException as end:  # StopIteration is how a body ends
            self._cut(lane, begin)
            if not isinstance(end, StopIteration):
                self.way.error = _error_name(end)
            if not self._awaited:
                tracer._file.put(self.way)
            raise
        finally:
            tracer._running.pop(ident, None)
        self._cut(lane, begin)
        return command

    def _cut(self, lane: Lane, begin: int) -> int:
        """Note that the body ran here until now; return now."""
        now = _now()
        message = len(self.way.messages) - 1
        self.way.pieces.append(Piece(lane, begin, now, "", message))
        return now


def _error_name(error: BaseException) -> str:
    code = getattr(error, "errno", None)
    return errno.errorcode.get(code, str(code)) if code else type(error).__name__
