"""A request: one body on its way, from its start to its result.

Locks touched: none; a request is on one thread at a time.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from enum import Enum
from threading import get_ident
from typing import Any, Protocol

from ninefuse.calls import Acquire, Behind, Body, Call, Later, Pwrite
from ninefuse.driving.patience import Ticket
from ninefuse.driving.shares import Holder, Whose
from ninefuse.errors import error

log = logging.getLogger(__name__)

Done = Callable[["Request"], None]


class Step(Enum):
    """Where a body stopped."""

    CALL = "it asks for a blocking call"
    PARKED = "it waits for a lock, its turn, or io_uring; who has that for it resumes it"
    DONE = "it has ended"


class Watch(Protocol):
    """What sees one body on its way, by standing in its place; see watching/tracing.py."""

    def make(self, call: Call[Any], *, now: bool) -> Any: ...

    def waits(self, what: str) -> None: ...

    def made_elsewhere(self, call: Call[Any], begin: int, end: int) -> None: ...


class Observer(Protocol):
    """What sees all that a driver does; see watching/tracing.py."""

    def watch(self, tag: int, name: str, body: Body[Any], *, awaited: bool) -> Any: ...

    def watch_call(self, function: Callable[..., Any]) -> Callable[..., Any]: ...

    def answered(self, body: Body[Any]) -> None: ...


class Request:
    """One body on its way: what it waits for, what it holds, how it ended.

    Attributes:
        tag: its number, among those under way.
        name: what reports call it.
        user: whose it is, a uid; None: nobody's in particular.
        share: for whom its places among the workers are.
        done: called with it at its end, on the thread where that is; None: nobody waits for it.
        call: the call to be made next, or None.
        crossings: how often it has changed threads.
        thread: the name of the worker that has it, if one has.
        is_begun: whether one of its calls was begun, or the first was left out because the
            request was withdrawn. No other call is left out then.
        plain: a class of calls, or None: where its first call is of this class and goes well, the
            outcome is its own, and it may be answered before its body goes on.
        is_answered: whether it was.
        is_counted: whether it is among those that are waited for before a call is made ahead of its
            body (`LeadingModel`).
        is_aside: whether it is not, as long as it waits for a plain call.
        in_place: whether the thread that started it is to make its call.
        is_withdrawn: whether somebody has withdrawn it (`Executor.withdraw`).
        is_interrupted: whether it is to wait for nothing any more (`Executor.interrupt`).
        ticket: of the last wait that may end because it is withdrawn, or None.
        value, error: the outcome of its last call, for the body; in the end the body's own.
    """

    __slots__ = (
        "at",
        "body",
        "call",
        "crossings",
        "done",
        "error",
        "has_waited",
        "holds",
        "in_place",
        "is_answered",
        "is_aside",
        "is_begun",
        "is_counted",
        "is_interrupted",
        "is_withdrawn",
        "name",
        "plain",
        "share",
        "since",
        "started",
        "tag",
        "thread",
        "ticket",
        "user",
        "value",
        "waits",
        "watch",
    )

    def __init__(
        self,
        tag: int,
        name: str,
        body: Body[Any],
        user: Whose = None,
        done: Done | None = None,
    ) -> None:
        self.tag = tag
        self.name = name
        self.body = body
        self.share = user
        self.user = user.user if isinstance(user, Holder) else user
        self.done = done
        self.watch: Watch | None = None
        self.started = time.monotonic_ns()
        self.call: Call[Any] | None = None
        self.at = get_ident()  # the thread that it was seen on last
        self.crossings = 0
        self.holds: tuple[Acquire, ...] = ()
        self.has_waited = False  # a while, to try again: it is counted as one that waits
        self.is_begun = False
        self.is_counted = False
        self.is_aside = False
        self.plain: type[Call[Any]] | None = None
        self.is_answered = False
        self.in_place = False
        self.is_withdrawn = False
        self.is_interrupted = False
        self.ticket: Ticket | None = None
        self.waits: Acquire | Behind | Later | None = None
        self.since = 0  # when its call was queued for io_uring, where somebody wants to know
        self.thread = ""
        self.value: Any = None
        self.error: BaseException | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its call is `plain`, and can be made without Python."""
        call = self.call
        if type(call) is not self.plain or self.is_begun or self.watch is not None:
            return False
        return not isinstance(call, Pwrite) or call.group is None

    def result(self) -> Any:
        """What the body returned; raises what it raised. Once."""
        if self.error is None:
            return self.value
        error, self.error = self.error, None
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def log_failure(self) -> None:
        """Log what the body raised, where nobody waits for its result."""
        if self.error is not None:
            log.error("%s failed", self.name, exc_info=self.error)

    def cross(self) -> None:
        """Note that the request is on another thread now."""
        self.at = get_ident()
        self.crossings += 1

    def throw(self) -> Any:
        """Raise the error of its call in the body, and run that to its next command.

        Raises:
            StopIteration: it has ended, with a result.
            BaseException: what it raised.
        """
        error, self.error = self.error, None
        assert error is not None
        try:
            return self.body.throw(error)
        finally:
            del error  # its traceback refers to this frame

    def perform(self) -> None:
        """Make the call that the body asked for, on this thread; keep its outcome."""
        if self.at != get_ident():
            self.cross()
        call = self.call
        assert call is not None
        self.call = None
        self.is_begun = True
        try:
            self.value = call.make() if self.watch is None else self.watch.make(call, now=False)
        except BaseException as error:
            self.error = error

    def perform_quickly(self) -> bool:
        """Make the call on this thread if it does not block, and say whether it was made."""
        call = self.call
        assert call is not None
        try:
            if self.watch is None:
                self.value = call.make_now()
            else:
                self.value = self.watch.make(call, now=True)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            self.error = error
        except BaseException as error:
            self.error = error
        self.call = None
        self.is_begun = True
        return True

    def end_wait(self, code: int = errno.EINTR) -> None:
        """Have the body find its wait, or its call, ended by an error: it was withdrawn."""
        self.call = None
        self.is_begun = True
        self.error = error(code)

    def describe(self) -> str:
        """One line for reports: age, what it does, holds and waits for."""
        age = (time.monotonic_ns() - self.started) / 1e9
        parts = [f"{self.name} (request {self.tag}), {age:.1f} s"]
        if self.thread:
            parts.append(f"on {self.thread}")
        if (call := self.call) is not None:
            parts.append(f"queued for {call.label}")
        if self.holds:
            parts.append("holds " + ", ".join(map(str, self.holds)))
        if (waits := self.waits) is not None:
            parts.append(f"waits for {waits}")
        return "; ".join(parts)
