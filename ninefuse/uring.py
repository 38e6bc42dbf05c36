"""The engine beneath the second model that makes calls through io_uring.

The dispatcher queues reads, writes and syncs; the kernel makes them, on threads of its own
if they wait; the dispatcher takes the results and goes on with the requests. No worker takes
part, so nothing is handed over and nobody fights for the interpreter's lock. What is queued
in one round of the dispatcher's loop is submitted at once, before it sleeps, and all that is
done by then is taken when it wakes; an eventfd wakes it.

Only calls on the source's own device, and only where that is a local file system (pace.py):
the kernel has few threads for them, which a server that does not answer would take.

Locks touched: none; all is the dispatcher's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ninefuse.commands import Call
from ninefuse.ops import io

if TYPE_CHECKING:
    from ninefuse._ring import Ring
    from ninefuse.executor import Request

# What a worker is to do from the start: nothing was done.
_AGAIN = frozenset((-errno.EAGAIN, -errno.EINTR, -errno.ECANCELED, -errno.ENOMEM))
# But of calls that sync ENOMEM may be what became of writing back, which is told once: asked
# again, they would say that all is well.
_SYNCING = frozenset((os.fsync, os.fdatasync, io._write_durably))

_ENTRIES = 256  # submitted at once; more are submitted in between


class Refused(Exception):
    """There is no io_uring here. The message says why."""


class Uring:
    """Makes the calls that have a form for it.

    Attributes:
        fd: readable when something is done, until `drain`.
        count: calls made so far.

    Raises:
        Refused: the module was not built, or the kernel does not let us.
    """

    def __init__(self) -> None:
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
        self.fd = self._ring.fd
        self.count = 0
        self._starts: dict[Any, Callable[[Request, Call], None]] = {
            io._read_fully: self._read,
            io._write_fully: self._write,
            io._write_durably: self._write,
            os.fsync: self._fsync,
            os.fdatasync: self._fdatasync,
        }

    def takes(self, call: Call) -> bool:
        """Whether a call has a form for io_uring."""
        return call.kind in self._starts

    def start(self, request: Request) -> None:
        """Queue the call of a request; it comes back from `done`."""
        call = request.call
        assert call is not None
        self.count += 1
        self._starts[call.kind](request, call)

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
            if self._finished(request, call, result, data):
                request.call = None
            found.append(request)
        return found

    def close(self) -> None:
        """Wait for what is under way, and give everything back."""
        self._ring.close()

    def _read(self, request: Request, call: Call) -> None:
        fd, count, offset = call.args
        self._ring.read(request, fd, count, offset)

    def _write(self, request: Request, call: Call) -> None:
        fd, data, offset = call.args
        self._ring.write(request, fd, data, offset)

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
            request.fail(OSError(-result, os.strerror(-result)))
        elif data is not None:
            fd, count, offset = call.args
            # A short read is the end of the file to whoever asked; make sure that it is.
            if result < count and offset + result < os.fstat(fd).st_size:
                return False
            request.succeed(data)
        elif len(call.args) == 3:
            if result < len(call.args[1]):
                # What is written must not be written again: a file may be open to append.
                rest = (*call.args, result)
                request.call = Call(call.on, io.write_rest, rest, may_be_here=False)
                return False
            request.succeed(result)
        else:
            request.succeed(None)
        return True
