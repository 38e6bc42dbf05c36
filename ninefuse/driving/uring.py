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

The kernel makes writes to files one at a time where these have something in common besides
their name (io-wq serializes by a hash of the inode, of 64 values): behind one that is stuck others
wait, to other files. So the writes in the ring are those of one user at a time; others' go to the
workers. And once one user's writes have not moved for a tenth of a second, what the kernel has
not begun is asked back, and his next writes go to the workers, too, until the ring has none.

What the kernel has no memory for stays queued and is submitted again. Until then workers make what
comes.

A write that is made for a caller goes with that caller's rights: the kernel keeps them as a
*personality* (io_uring_register(2)), is told its number with the write, and has the thread that
makes the write take it on for that time. They are what `spending_as` would write with, and the
dispatcher has them while they are registered only.

Locks touched: none; all is the dispatcher's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ninefuse.calls import Call, Fsync, Pread, Pwrite
from ninefuse.driving.request import Request
from ninefuse.errors import error
from ninefuse.linux.callers import Caller
from ninefuse.linux.credentials import registered_as

if TYPE_CHECKING:
    from ninefuse.driving._ring import Ring

log = logging.getLogger(__name__)

# What a worker is to do from the start: nothing was done.
_AGAIN = frozenset((-errno.EAGAIN, -errno.EINTR, -errno.ECANCELED, -errno.ENOMEM))
# Of a write for a caller, what the kernel refuses to do with a personality: a security module
# may, and says so before anything is done. A worker is to make it.
_REFUSED = frozenset((-errno.EACCES, -errno.EPERM, -errno.EINVAL))

_ENTRIES = 256  # submitted at once; more are submitted in between
PLACES = 16  # calls under way, and threads that the kernel may use for them
PERSONALITIES = 64  # that are kept; those used last


class Refused(Exception):
    """There is no io_uring here. The message says why."""


class _User:
    """What one user has under way, and what waits for a place."""

    __slots__ = (
        "count",
        "has_moved",
        "has_written",
        "is_stuck",
        "waiting",
        "writes",
        "writes_are_stuck",
    )

    def __init__(self) -> None:
        self.count = 0
        self.writes = 0  # of these
        self.waiting: deque[Request] = deque()
        self.has_moved = False  # something came back since it was looked at
        self.is_stuck = False  # nothing has for a while
        self.has_written = False  # a write came back since it was looked at
        self.writes_are_stuck = False  # none has for a while


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
            from ninefuse.driving._ring import Ring, probe
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
        self._is_refused = False  # the kernel did not take what is queued
        self._users: dict[int, _User] = {}
        self._writer = 0  # whose writes are in the ring, where there are any
        # By user id, group id and further group; in the order of their last use.
        self._personalities: OrderedDict[tuple[int, int, int | None], int] = OrderedDict()
        self._starts: dict[type[Call[Any]], Callable[[Request, Any], None]] = {
            Pread: self._read,
            Pwrite: self._write,
            Fsync: self._fsync,
        }

    def takes(self, call: Call[Any]) -> bool:
        """Whether a call has a form for io_uring."""
        return type(call) in self._starts

    def start(self, request: Request) -> bool:
        """Queue the call of a request; it comes back from `done`, or from `overdue`.

        Returns:
            False if a worker is to make it: this user's places are taken by calls that are stuck,
            or the kernel has no memory, or does not keep the rights that it is to be made with.
        """
        number = request.user or 0
        user = self._users.get(number)
        if user is None:
            user = self._users[number] = _User()
        if isinstance(request.call, Pwrite) and not self._may_write(number, user):
            return False
        if self._has_place(number, user):
            return self._start(request, user)
        if user.is_stuck:
            return False
        user.waiting.append(request)
        return True

    def leave(self, request: Request) -> bool:
        """Take a request out of the queue in which it waits for a place; whether it was there."""
        user = self._users.get(request.user or 0)
        if user is None or request not in user.waiting:
            return False
        user.waiting.remove(request)
        return True

    def has_waiting(self) -> bool:
        """Whether anything waits, for a place, behind a write or for memory of the kernel's.

        `overdue` is to be asked then.
        """
        return self._is_refused or any(user.waiting or user.writes for user in self._users.values())

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
            if user.writes and not user.has_written:
                user.writes_are_stuck = True
                if not self._is_refused:
                    self._tell(self._ring.cancel_writes)
            user.has_written = False
        return found

    def _may_write(self, number: int, user: _User) -> bool:
        """Whether a user's writes may be in the ring now."""
        if user.writes:
            return not user.writes_are_stuck
        others = self._users.get(self._writer)
        return others is None or not others.writes

    def _has_place(self, number: int, user: _User) -> bool:
        share = PLACES // 2 if self._by_user and number else PLACES
        return self._under_way < PLACES and user.count < share

    def _start(self, request: Request, user: _User) -> bool:
        """Queue a call that has a place; False if a worker is to make it."""
        call = request.call
        assert call is not None
        writes = isinstance(call, Pwrite)
        if self._is_refused or (writes and not self._may_write(request.user or 0, user)):
            return False
        try:
            self._starts[type(call)](request, call)
        except (OSError, MemoryError):  # nothing was queued
            return False
        request.is_begun = True
        if writes:
            self._writer = request.user or 0
            user.writes += 1
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
        if isinstance(request.call, Pwrite):
            user.writes -= 1
            user.has_written = True
            user.writes_are_stuck = user.writes_are_stuck and user.writes > 0

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

    def submit(self) -> bool:
        """Give the kernel all that is queued; False if it is to be tried again."""
        if self._ring.in_flight or self._is_refused:
            self._tell(self._ring.submit)
        return not self._is_refused

    def _tell(self, submit: Callable[[], object]) -> None:
        """Have the ring submit; what the kernel does not take stays queued."""
        try:
            submit()
            self._is_refused = False
        except OSError as e:
            if not self._is_refused:
                log.warning("io_uring takes no calls (%s): trying again", e.strerror)
            self._is_refused = True

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
            if request.watch is not None:
                request.watch.made_elsewhere(call, request.since, time.perf_counter_ns())
            try:
                is_finished = self._finished(request, call, result, data)
            except OSError as e:  # others that are done are not to be lost by it
                request.error, is_finished = e, True
            if is_finished:
                request.call = None
            found.append(request)
        return found + self._start_waiting()

    def close(self) -> None:
        """Wait for what is under way, and give everything back."""
        self._ring.close()

    def _read(self, request: Request, call: Pread) -> None:
        self._ring.read(request, call.fd, call.count, call.offset)

    def _write(self, request: Request, call: Pwrite) -> None:
        rights = 0 if call.writer is None else self._personality(call.writer, call.group)
        self._ring.write(request, call.fd, call.data, call.offset, rights)

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

    def _fsync(self, request: Request, call: Fsync) -> None:
        self._ring.fsync(request, call.fd, call.data_only)

    def _finished(self, request: Request, call: Call[Any], result: int, data: bytes | None) -> bool:
        """Keep the outcome of a call; False if a worker is to make it again, or to go on."""
        if result < 0:
            # Of calls that sync ENOMEM may be what became of writing back, which is told once:
            # asked again, they would say that all is well.
            syncs = isinstance(call, Fsync) or (isinstance(call, Pwrite) and call.durable)
            if result in _AGAIN and not (syncs and result == -errno.ENOMEM):
                return False
            is_for_a_caller = isinstance(call, Pwrite) and call.writer is not None
            if is_for_a_caller and result in _REFUSED:
                return False
            request.error = error(-result)
        elif isinstance(call, Pread):
            assert data is not None
            # A short read is the end of the file to whoever asked; make sure that it is.
            if result < call.count and call.offset + result < os.fstat(call.fd).st_size:
                return False
            request.value = data
        elif isinstance(call, Pwrite):
            if result < len(call.data):
                # What is written must not be written again: a file may be open to append.
                call.done = result
                return False
            request.value = result
        else:
            request.value = None
        return True
