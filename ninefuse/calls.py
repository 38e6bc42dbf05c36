"""What an operation body says to its driver.

A 9P operation is a coroutine that knows nothing of threads or trio. Where it may
block it yields one of the commands below to whoever drives it (executor.py has the
drivers, one for each threading model), and goes on with the command's result:

* ``await blocking(on, function, *args)``: make this call. ``on`` names the inode
  that the call may get stuck on (a qid path, or None), so that calls stuck on one
  file cannot take every worker. ``blocking_unless(on, quick, function, *args)``: the
  same, where the call has a form that never waits; ``brief(on, function, *args)``: the
  same, where the call itself is such a form.
* ``async with lock.reading`` / ``async with lock.writing`` (locks.py): take a lock,
  give it back. No other command may be given in between: whoever waits for a call
  would have all wait who want the lock.
* ``await later()``: go on after a while, to try again.
* ``await ended(tag)``: wait until another request has ended.
* ``await behind(turn)``: wait for earlier changes of the same bytes (order.py).

Locks touched: none.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator, Hashable
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

READ = "read"
WRITE = "write"


class Queueing(Protocol):
    """A lock whose waiters are callbacks instead of blocked threads."""

    name: str

    def acquire(self, mode: str, resume: Callable[[], None]) -> bool: ...

    def release(self, mode: str) -> None: ...


class Coming(Protocol):
    """What has others before it; see order.py."""

    def has_come(self, resume: Callable[[], None]) -> bool: ...


class Call:
    """Make the call ``function(*args)``, which may block, on the inode ``on``.

    Attributes:
        kind: what is called, without the arguments that are bound to it.
        quick: does the same with the same arguments, and waits for nobody on a local file
            system: where it would, it raises BlockingIOError and has done nothing. None: there
            is no such form. (A call of any other kind may wait for as long as somebody likes:
            who holds an inode's lock may be waiting for memory that a FUSE server brings.)
    """

    __slots__ = ("args", "function", "kind", "on", "quick")

    def __init__(
        self,
        on: int | None,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        quick: Callable[..., Any] | None = None,
        kind: Hashable = None,
    ) -> None:
        self.on = on
        self.function = function
        self.args = args
        self.quick = quick
        self.kind = kind or function


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


class Ended:
    """Wait until the request ``tag`` has ended; one that is not known has."""

    __slots__ = ("tag",)

    def __init__(self, tag: int) -> None:
        self.tag = tag

    def __str__(self) -> str:
        return f"the end of request {self.tag}"


class Later:
    """Go on after a while; see patience.py."""

    __slots__ = ()

    def __str__(self) -> str:
        return "another try"


class Behind:
    """Go on when it is the turn of ``turn``; see order.py."""

    __slots__ = ("turn",)

    def __init__(self, turn: Coming) -> None:
        self.turn = turn

    def __str__(self) -> str:
        return str(self.turn)


Command = Call | Acquire | Release | Ended | Later | Behind
Body = Coroutine[Any, Any, T]


@types.coroutine
def _ask(command: Command) -> Generator[Command, Any, Any]:
    return (yield command)


async def blocking(
    on: int | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Make a call that may block, wherever the threading model wants it made.

    Args:
        on: qid path of the inode that the call may get stuck on, or None.
        function: what to call; it runs on a worker or on the dispatcher.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        Exception: whatever ``function`` raised.
    """
    call: Callable[..., T] = partial(function, **kwargs) if kwargs else function
    result: T = await _ask(Call(on, call, args, kind=function))
    return result


async def blocking_unless(
    on: int | None,
    quick: Callable[P, T],
    function: Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """As `blocking`, for a call that has a form which waits for nobody (`Call.quick`).

    It takes no keyword arguments.
    """
    assert not kwargs
    result: T = await _ask(Call(on, function, args, quick))
    return result


async def brief(
    on: int | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """As `blocking`, for a call that takes no lock of an inode: statx of a descriptor, say.

    On a local file system it waits for nobody, so it is its own quick form. It takes no
    keyword arguments.
    """
    assert not kwargs
    result: T = await _ask(Call(on, function, args, function))
    return result


async def later() -> None:
    """Go on after a while (some hundredths of a second), on no thread meanwhile."""
    await _ask(Later())


async def ended(tag: int) -> None:
    """Wait until the request ``tag`` has ended (its answer is then on its way)."""
    await _ask(Ended(tag))


async def behind(turn: Coming) -> None:
    """Wait until a turn has come; for order.py, which says what came earlier."""
    await _ask(Behind(turn))
