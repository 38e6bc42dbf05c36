"""What an operation body says to its driver.

A 9P operation is a coroutine that knows nothing of threads or trio. Where it may block it
awaits one of the commands below. The command goes to whoever drives the body (executor.py has
the drivers, one for each threading model), and the body goes on with the command's result:

* a `Call`: make this call. What it is says its class: `Pread`, `Pwrite`, `Fsync`, or `FunctionCall`
  for a function and its arguments. ``await blocking(on, function, *args)`` is the usual way to
  say the last; ``blocking_unless`` and ``brief`` are for calls which have a form that never waits.
* ``async with lock.reading`` / ``async with lock.writing`` (locks.py): take a lock, give it
  back. No other command may be given in between: whoever waits for a call would have all wait
  who want the lock.
* ``await Later()``: go on after a while, to try again; or before, where something says so.
* ``await Behind(turn)``: wait for earlier changes of the same bytes (order.py).
* ``await Begin(message, fid)``: a message begins. Drivers pass over it; traces show it.

Each call names the inode that it may get stuck on, so that calls which are stuck on one file
cannot take every worker.

Locks touched: none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from ninefuse.linux import transfer
from ninefuse.linux.callers import Caller

P = ParamSpec("P")
T = TypeVar("T")

READ = "read"
WRITE = "write"


class Queueing(Protocol):
    """A lock whose waiters are callbacks instead of blocked threads."""

    name: str

    def try_acquire(self, mode: str) -> bool: ...

    def acquire(self, mode: str, resume: Callable[[], None]) -> bool: ...

    def release(self, mode: str) -> None: ...


class Coming(Protocol):
    """What is to come, and is waited for: a turn (order.py), a lock of a file (filelocks.py)."""

    def has_come(self, resume: Callable[[], None]) -> bool: ...


class Call(Generic[T]):
    """A call that may block, and what it may get stuck on.

    Attributes:
        on: qid path of the inode, or None.
        quick: whether it has a form that waits for nobody on a local file system, `make_now`:
            then it may stay on the dispatcher. (Any other may wait for as long as somebody likes:
            who holds an inode's lock may be waiting for memory that a FUSE server brings.)
        label: what it is, in words, for traces and reports.
    """

    __slots__ = ("on",)

    quick: Any
    label: Any
    on: int | None

    def __await__(self) -> Generator[Any, Any, T]:
        result: T = yield self
        return result

    def make(self) -> T:
        """Make it, however long that takes. Any thread.

        Raises:
            Exception: whatever the call raises.
        """
        raise NotImplementedError

    def make_now(self) -> T:
        """Make it without waiting, where it is `quick`. Any thread.

        Raises:
            BlockingIOError: it would have waited, and nothing was done.
            Exception: whatever the call raises.
        """
        raise NotImplementedError


class FunctionCall(Call[T]):
    """The call ``function(*args)``.

    Args:
        on: as of a `Call`.
        function: what is called.
        args: its arguments.
        quick: does the same with the same arguments, and waits for nobody: where it would, it
            raises BlockingIOError and has done nothing. None: there is no such form.
    """

    __slots__ = ("args", "function", "quick")

    def __init__(
        self,
        on: int | None,
        function: Callable[..., T],
        args: tuple[Any, ...],
        quick: Callable[..., T] | None = None,
    ) -> None:
        self.on = on
        self.function = function
        self.args = args
        self.quick = quick

    @property
    def label(self) -> str:
        """The function's name, in words."""
        return words_of(self.function)

    def make(self) -> T:
        return self.function(*self.args)

    def make_now(self) -> T:
        result: T = self.quick(*self.args)
        return result


class Pread(Call[bytes]):
    """Read ``count`` bytes of a file from ``offset``; fewer at its end only (pread(2))."""

    __slots__ = ("count", "fd", "offset")

    quick = True
    label = "read"

    def __init__(self, on: int | None, fd: int, count: int, offset: int) -> None:
        self.on = on
        self.fd = fd
        self.count = count
        self.offset = offset

    def make(self) -> bytes:
        return transfer.read_fully(self.fd, self.count, self.offset)

    def make_now(self) -> bytes:
        return transfer.read_now(self.fd, self.count, self.offset)


class Pwrite(Call[int]):
    """Write ``data`` to a file at ``offset``; how much was written (pwrite(2)).

    Attributes:
        durable: whether the descriptor makes it durable (O_SYNC, O_DSYNC).
        writer: for whom, with whose rights it is written (`pwrite_as`); None: the daemon.
        group: a further group of theirs, or None.
        done: how much of it was written before.
    """

    __slots__ = ("data", "done", "durable", "fd", "group", "offset", "writer")

    quick = False
    label = "write"

    def __init__(
        self,
        on: int | None,
        fd: int,
        data: bytes,
        offset: int,
        durable: bool = False,
        writer: Caller | None = None,
        group: int | None = None,
    ) -> None:
        self.on = on
        self.fd = fd
        self.data = data
        self.offset = offset
        self.durable = durable
        self.writer = writer
        self.group = group
        self.done = 0

    def make(self) -> int:
        if self.writer is None:
            return transfer.write_fully(self.fd, self.data, self.offset, self.done)
        return transfer.write_for(
            self.writer, self.group, self.fd, self.data, self.offset, self.done
        )


class Fsync(Call[None]):
    """Make a file durable (fsync(2)); ``data_only``: what is needed to read it back alone."""

    __slots__ = ("data_only", "fd")

    quick = False
    label = "sync"

    def __init__(self, on: int | None, fd: int, *, data_only: bool = False) -> None:
        self.on = on
        self.fd = fd
        self.data_only = data_only

    def make(self) -> None:
        (os.fdatasync if self.data_only else os.fsync)(self.fd)


class _Other:
    """A command that is no call, and has no result."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        yield self


class Acquire:
    """Take ``lock`` in ``mode`` (READ or WRITE) before the body goes on."""

    __slots__ = ("lock", "mode")

    def __init__(self, lock: Queueing, mode: str) -> None:
        self.lock = lock
        self.mode = mode

    def __str__(self) -> str:
        return f"{self.lock.name} ({self.mode})"


class Release:
    """Give back what ``taken`` took."""

    __slots__ = ("taken",)

    def __init__(self, taken: Acquire) -> None:
        self.taken = taken


class Later(_Other):
    """Go on after a while (some hundredths of a second), on no thread meanwhile.

    Args:
        early: what ends the wait before its time, if it comes; None: nothing does. It must not
            be held by a lock or a turn of this body's own.
        tries: how often was tried before: the pauses grow with it, up to a bound.
        is_withdrawable: whether the wait may end in OSError(EINTR), because the request was
            withdrawn (`Executor.withdraw`): nothing that the body has done has had an effect. The
            first of a body's waits may end in OSError(EAGAIN) then: too many wait already.
    """

    __slots__ = ("early", "is_withdrawable", "tries")

    def __init__(
        self, early: Coming | None = None, tries: int = 0, *, is_withdrawable: bool = True
    ) -> None:
        self.early = early
        self.tries = tries
        self.is_withdrawable = is_withdrawable

    def __str__(self) -> str:
        return "another try" if self.early is None else str(self.early)


class Behind(_Other):
    """Go on when it is the turn of ``turn``; see order.py."""

    __slots__ = ("turn",)

    def __init__(self, turn: Coming) -> None:
        self.turn = turn

    def __str__(self) -> str:
        return str(self.turn)


class Begin(_Other):
    """The 9P message ``message`` begins, on ``fid``. Said only where somebody wants to know.

    Args:
        message: its name, without the T.
        fid: that it is about, or None.
    """

    __slots__ = ("fid", "message")

    def __init__(self, message: str, fid: int | None = None) -> None:
        self.message = message
        self.fid = fid


Command = Call[Any] | Acquire | Release | Later | Behind | Begin
Body = Coroutine[Any, Any, T]


def blocking(
    on: int | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> Call[T]:
    """``await`` it: make a call that may block, wherever the threading model wants it made.

    Args:
        on: qid path of the inode that the call may get stuck on, or None.
        function: what to call; it runs on a worker or on the dispatcher.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        Exception: whatever ``function`` raised.
        OSError: EINTR, the request was withdrawn before its first call, and this was to be it.
    """
    return FunctionCall(on, partial(function, **kwargs) if kwargs else function, args)


def blocking_unless(
    on: int | None,
    quick: Callable[P, T],
    function: Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Call[T]:
    """As `blocking`, for a call that has a form which waits for nobody (`FunctionCall.quick`).

    It takes no keyword arguments.
    """
    assert not kwargs
    return FunctionCall(on, function, args, quick)


def brief(
    on: int | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> Call[T]:
    """As `blocking`, for a call that takes no lock of an inode: statx of a descriptor, say.

    On a local file system it waits for nobody, so it is its own quick form. It takes no
    keyword arguments.
    """
    assert not kwargs
    return FunctionCall(on, function, args, function)


def words_of(function: Callable[..., Any]) -> str:
    """The name of a function, in words: ``_keep_mark`` is "keep mark"."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", None) or str(function)
    return name.strip("_").replace("_", " ")
