"""What one run took of a server and of its clients: processor time, context switches, calls.

Time and switches cost nothing: the kernel counts them anyway. System calls are counted by a
performance counter on the trace point of their entry (perf_event_open(2)), which makes every call
of the machine a little slower; so only in a round of its own, whose times are not told. It takes
root, or kernel.perf_event_paranoid at -1. No lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ninefuse.bench import BenchError, Ended, Process
from ninefuse.linux.libc import function

# linux/perf_event.h: type, size, config, and a word of flags at byte 40, in the first version.
_ATTRIBUTES = struct.Struct("=IIQ24xQ16x")
_TRACE_POINT = 2
_INHERIT = 1 << 1
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "ppc64le": 319, "s390x": 331}
_ANY_CPU, _NO_GROUP, _CLOSE_ON_EXEC = -1, -1, 8
_ENTRY = "events/raw_syscalls/sys_enter/id"
_TRACING = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))

_syscall = function("syscall")


@dataclass(frozen=True, slots=True)
class Spent:
    """What some processes took. user, system: CPU seconds. voluntary, forced: context switches,
    by waiting and by the scheduler. calls: of the system, None where they were not counted.
    """

    user: float = 0.0
    system: float = 0.0
    voluntary: int = 0
    forced: int = 0
    calls: int | None = None


@dataclass(frozen=True, slots=True)
class Both:
    """What the clients and the server took of one run."""

    clients: Spent = Spent()
    server: Spent = Spent()


class Meter:
    """Measures a run: entered before its clients are started, read after they have ended.

    Arguments: name, for messages; server, None without one; calls, whether system calls are
    counted. Raises BenchError on entering when the server has ended or calls cannot be counted,
    and on reading when the server has ended.
    """

    def __init__(self, name: str, server: Process | None, calls: bool = False) -> None:
        self._name = name
        self._server = server
        self._calls = calls
        self._before = (0.0, 0.0)
        self._switches: dict[str, tuple[int, int]] = {}
        self._opened = contextlib.ExitStack()
        # Of this process with and without its children, and of the server's threads.
        self._own: tuple[int, int] | None = None
        self._threads: list[int] = []

    def __enter__(self) -> Meter:
        try:
            if self._calls:
                self._count()
            self._before, self._switches = self._of_server()
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, clients: Iterable[Ended]) -> Both:
        """Return what was taken since entering. Argument: clients, all that were started."""
        ended = tuple(clients)
        after, switches = self._of_server()
        # A thread that has ended meanwhile took its count with it.
        nothing = (0, 0)
        deltas = [
            (now[0] - was[0], now[1] - was[1])
            for thread, now in switches.items()
            for was in (self._switches.get(thread, nothing),)
        ]
        server = Spent(
            after[0] - self._before[0],
            after[1] - self._before[1],
            sum(voluntary for voluntary, _ in deltas),
            sum(forced for _, forced in deltas),
            sum(map(_read, self._threads)) if self._calls and self._server else None,
        )
        return Both(
            Spent(
                sum(one.user_seconds for one in ended),
                sum(one.system_seconds for one in ended),
                sum(one.voluntary for one in ended),
                sum(one.forced for one in ended),
                _read(self._own[0]) - _read(self._own[1]) if self._own else None,
            ),
            server,
        )

    def _of_server(self) -> tuple[tuple[float, float], dict[str, tuple[int, int]]]:
        if self._server is None:
            return (0.0, 0.0), {}
        try:
            return self._server.cpu_seconds(), self._server.switches()
        except OSError as error:
            raise BenchError(f"{self._name}: the server has ended") from error

    def _count(self) -> None:
        try:
            # What is started from here inherits the first one; its count comes back at its end.
            self._own = (self._opened_counter(0, _INHERIT), self._opened_counter(0, 0))
            for thread in self._server.threads() if self._server else ():
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    self._threads.append(self._opened_counter(int(thread), _INHERIT))
        except OSError as error:
            raise BenchError(f"cannot count system calls: {error.strerror}") from error

    def _opened_counter(self, thread: int, flags: int) -> int:
        counter = _open(thread, flags)
        self._opened.callback(os.close, counter)
        return counter


def why_not_calls() -> str:
    """Return why system calls cannot be counted here, "" if they can."""
    try:
        os.close(_open(0, 0))
    except FileNotFoundError:
        return "no trace point raw_syscalls:sys_enter (is tracefs mounted?)"
    except OSError as error:
        return f"{error.strerror} (it takes root, or kernel.perf_event_paranoid at -1)"
    return ""


def _open(thread: int, flags: int) -> int:
    """Return a counter of the calls of a thread, 0 for this one. Raises OSError."""
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    point = _trace_point()
    if number is None or point is None:
        raise FileNotFoundError(_ENTRY)
    attributes = _ATTRIBUTES.pack(_TRACE_POINT, _ATTRIBUTES.size, point, flags)
    words = (thread, _ANY_CPU, _NO_GROUP, _CLOSE_ON_EXEC)
    return _syscall(ctypes.c_long(number), attributes, *map(ctypes.c_long, words))


def _trace_point() -> int | None:
    for place in _TRACING:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return int((place / _ENTRY).read_text())
    return None


def _read(counter: int) -> int:
    return int.from_bytes(os.read(counter, 8), sys.byteorder)
