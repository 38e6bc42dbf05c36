"""The engine beneath the second model that makes calls through io_uring.

The dispatcher queues reads, writes and syncs; the kernel makes them, on threads of its own
if they wait; the dispatcher takes the results and goes on with the requests. No worker takes
part, so nothing is handed over and nobody fights for the interpreter's lock. What is queued
in one round of the dispatcher's loop is submitted at once, before it sleeps, and all that is
done by then is taken when it wakes; an eventfd wakes it.

Only calls on the source's own device, and only where that is a local file system: the kernel
has few threads for them, which a server that does not answer would take. A local call can be
stuck as well, so a user has at most half of the places. What finds none waits in a queue of that
user's; when nothing of his has come back for a tenth of a second, it is left to the workers.

A write that is made for a caller goes with that caller's rights: the kernel keeps them as a
*personality* (io_uring_register(2)), is told its number with the write, and has the thread that
makes the write take it on for that time. They are what `spending_as` would write with, and the
dispatcher has them while they are registered only.

Locks touched: none; all is the dispatcher's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ninefuse.commands import Call
from ninefuse.credentials import Caller, registered_as
from ninefuse.ops import io

if TYPE_CHECKING:
    from ninefuse._ring import Ring
    from ninefuse.executor import Request

# What a worker is to do from the start: nothing was done.
_AGAIN = frozenset((-errno.EAGAIN, -errno.EINTR, -errno.ECANCELED, -errno.ENOMEM))
# But of calls that sync ENOMEM may be what became of writing back, which is told once: asked
# again, they would say that all is well.
_SYNCING = frozenset((os.fsync, os.fdatasync, io._write_durably, io.write_durably_as))
# Writes for a caller. Of these a worker is also to make what the kernel refuses to do with a
# personality: a security module may, and says so before anything is done.
_FOR_CALLERS = frozenset((io.write_as, io.write_durably_as))
_REFUSED = frozenset((-errno.EACCES, -errno.EPERM, -errno.EINVAL))

_ENTRIES = 256  # submitted at once; more are submitted in between
PLACES = 16  # calls under way, and threads that the kernel may use for them
STUCK = 0.1  # seconds without a result
PERSONALITIES = 64  # that are kept; those used last


class Refused(Exception):
    """There is no io_uring here. The message says why."""


class _User:
    """What one user has under way, and what waits for a place."""

    __slots__ = ("count", "has_moved", "is_stuck", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.waiting: deque[Request] = deque()
        self.has_moved = False  # something came back since it was looked at
        self.is_stuck = False  # nothing has for a while


class Uring:
    """Makes the calls that have a form for it.

    Args:
        by_user: whether a user other than root has at most half of the places.

    Attributes:
        fd: readable when something is done, until `drain`.
        count: calls made so far.

    Raises:
        Refused: the module was not built, or the kernel does not let us.
    """

    def __init__(self, *, by_user: bool = False) -> None:
        try:
            from ninefuse._ring import Ring, probe
        except ImportError as error:
            raise Refused(f"ninefuse was built without it ({error})") from None
        try:
            self._ring: Ring = Ring(_ENTRIES)
        except OSError as error:
            raise Refused(f"the kernel refuses it ({error.strerror})") from None
        missing = {"read", "write", "fsync"} - probe()
        if missing:
            self._ring.close()
            raise Refused(f"the kernel's has no {', '.join(sorted(missing))}")
        with contextlib.suppress(OSError):  # a kernel before 5.15, which has some of its own
            self._ring.limit_workers(PLACES)
        self.fd = self._ring.fd
        self.count = 0
        self._by_user = by_user
        self._under_way = 0
        self._users: dict[int, _User] = {}
        # By user id, group id and further group; in the order of their last use.
        self._personalities: OrderedDict[tuple[int, int, int | None], int] = OrderedDict()
        self._starts: dict[Any, Callable[[Request, Call], None]] = {
            io._read_fully: self._read,
            io._write_fully: self._write,
            io._write_durably: self._write,
            io.write_as: self._write_as,
            io.write_durably_as: self._write_as,
            os.fsync: self._fsync,
            os.fdatasync: self._fdatasync,
        }

    def takes(self, call: Call) -> bool:
        """Whether a call has a form for io_uring."""
        return call.kind in self._starts

    def start(self, request: Request) -> bool:
        """Queue the call of a request; it comes back from `done`, or from `overdue`.

        Returns:
            False if a worker is to make it: this user's places are taken by calls that are stuck,
            or the kernel does not keep the rights that it is to be made with.
        """
        number = request.user or 0
        user = self._users.get(number)
        if user is None:
            user = self._users[number] = _User()
        if self._has_place(number, user):
            return self._start(request, user)
        if user.is_stuck:
            return False
        user.waiting.append(request)
        return True

    def has_waiting(self) -> bool:
        """Whether anything waits for a place, and somebody has to ask `overdue`."""
        return any(user.waiting for user in self._users.values())

    def overdue(self) -> list[Request]:
        """What a worker is to make, since nothing has come back since this was called last.

        To be called every `STUCK` seconds while `has_waiting`.
        """
        found: list[Request] = []
        for user in self._users.values():
            if user.waiting and not user.has_moved:
                user.is_stuck = True
                found += user.waiting
                user.waiting.clear()
            user.has_moved = False
        return found

    def _has_place(self, number: int, user: _User) -> bool:
        share = PLACES // 2 if self._by_user and number else PLACES
        return self._under_way < PLACES and user.count < share

    def _start(self, request: Request, user: _User) -> bool:
        """Queue a call that has a place; False if a worker is to make it."""
        call = request.call
        assert call is not None
        try:
            self._starts[call.kind](request, call)
        except OSError:  # nothing was queued
            return False
        self.count += 1
        self._under_way += 1
        user.count += 1
        return True

    def _ended(self, request: Request) -> None:
        """A call of this request's has come back: its place is the next one's."""
        number = request.user or 0
        user = self._users[number]
        self._under_way -= 1
        user.count -= 1
        user.has_moved = True
        user.is_stuck = False

    def _start_waiting(self) -> list[Request]:
        """Queue what has a place now; what is left to workers."""
        left = []
        for number, user in list(self._users.items()):
            while user.waiting and self._has_place(number, user):
                request = user.waiting.popleft()
                if not self._start(request, user):
                    left.append(request)
            if not user.count and not user.waiting:
                del self._users[number]
        return left

    def submit(self) -> None:
        """Give the kernel all that is queued."""
        if self._ring.in_flight:
            self._ring.submit()

    def drain(self) -> None:
        """Make `fd` unreadable."""
        self._ring.drain()

    def done(self) -> list[Request]:
        """The requests whose calls are done.

        Each has its result, and its call is None; or its call is left, for a worker.
        """
        if not self._ring.in_flight:
            return []
        found = []
        for token, result, data in self._ring.reap():
            request = cast("Request", token)
            call = request.call
            assert call is not None
            self._ended(request)
            if self._finished(request, call, result, data):
                request.call = None
            found.append(request)
        return found + self._start_waiting()

    def close(self) -> None:
        """Wait for what is under way, and give everything back."""
        self._ring.close()

    def _read(self, request: Request, call: Call) -> None:
        fd, count, offset = call.args
        self._ring.read(request, fd, count, offset)

    def _write(self, request: Request, call: Call) -> None:
        fd, data, offset = call.args
        self._ring.write(request, fd, data, offset)

    def _write_as(self, request: Request, call: Call) -> None:
        fd, data, offset, writer, group = call.args
        self._ring.write(request, fd, data, offset, self._personality(writer, group))

    def _personality(self, writer: Caller, group: int | None) -> int:
        """The number of the rights that `spending_as` would write with.

        Raises:
            OSError: the kernel does not keep them.
        """
        kept = self._personalities
        rights = writer.uid, writer.gid, group
        number = kept.get(rights)
        if number is not None:
            kept.move_to_end(rights)
            return number
        if len(kept) >= PERSONALITIES:
            # Out of the table first: whatever comes of it, the number is not used again.
            _, oldest = kept.popitem(last=False)
            self._ring.unregister_personality(oldest)
        number = registered_as(writer, group, self._ring.register_personality)
        kept[rights] = number
        return number

    def _fsync(self, request: Request, call: Call) -> None:
        self._ring.fsync(request, call.args[0], False)

    def _fdatasync(self, request: Request, call: Call) -> None:
        self._ring.fsync(request, call.args[0], True)

    def _finished(self, request: Request, call: Call, result: int, data: bytes | None) -> bool:
        """Keep the outcome of a call; False if a worker is to make it again, or to go on."""
        if result < 0:
            told_once = result == -errno.ENOMEM and call.kind in _SYNCING
            if result in _AGAIN and not told_once:
                return False
            if result in _REFUSED and call.kind in _FOR_CALLERS:
                return False
            request.fail(OSError(-result, os.strerror(-result)))
        elif data is not None:
            fd, count, offset = call.args
            # A short read is the end of the file to whoever asked; make sure that it is.
            if result < count and offset + result < os.fstat(fd).st_size:
                return False
            request.succeed(data)
        elif len(call.args) >= 3:
            if result < len(call.args[1]):
                # What is written must not be written again: a file may be open to append.
                go_on = io.write_rest_as if call.kind in _FOR_CALLERS else io.write_rest
                request.call = Call(call.on, go_on, (*call.args, result))
                return False
            request.succeed(result)
        else:
            request.succeed(None)
        return True
