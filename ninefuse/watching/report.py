"""What a running daemon says of itself: counters and stacks.

The counters are published as an extended attribute of the mount's root (ninefuse-stat
reads it) and logged on SIGUSR1; SIGUSR2 logs the stacks. The signals are answered on the
signal thread, while everything else may be stuck; so nothing here does more than read.

Locks touched: those of the statistics it asks for, all held for an instant only.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections import Counter
from typing import Any, Protocol

import ninefuse
from ninefuse.executor import Executor
from ninefuse.locks import RWLock
from ninefuse.settings import Settings
from ninefuse.tree.session import Session

_SLOW = 2.0  # seconds after which a request under way is listed
_FRESH = 1.0  # seconds for which published counters stay the same
_PADDED = 4096  # bytes; a value's size is a multiple, and so mostly that of the one before
_FORMAT = 2  # goes up when a reader of the older one would misread the new one


class Front(Protocol):
    """What is asked of whatever clients come by: a FUSE session, or a server."""

    @property
    def errors(self) -> Counter[tuple[str, int]]: ...

    def passed(self) -> int: ...


class Counters:
    """The counters of one mount, since it was mounted; or of a server."""

    def __init__(
        self, settings: Settings, front: Front, executor: Executor, session: Session
    ) -> None:
        self._settings = settings
        self._front = front
        self._executor = executor
        self._session = session
        self._since = time.monotonic()
        # Open from the start: the counters are wanted most when no descriptors are left.
        self._memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._published = b""
        self._published_at = -_FRESH

    def published(self) -> bytes:
        """The counters as JSON, UTF-8, padded with blanks; the same for a second.

        Who reads an extended attribute asks for its size first: it must not grow meanwhile.
        """
        now = time.monotonic()
        if now - self._published_at >= _FRESH:
            text = json.dumps(self.snapshot()).encode()
            self._published = text.ljust(-(-len(text) // _PADDED) * _PADDED)
            self._published_at = now
        return self._published

    def snapshot(self) -> dict[str, Any]:
        """The counters now; docs/observing.md says what each means."""
        executor = self._executor.statistics()
        fids = self._session.fids.statistics()
        locks = (self._session.rename_lock, self._session.fids.lock)
        return {
            "version": _FORMAT,
            "ninefuse": ninefuse.__version__,
            "pid": os.getpid(),
            "source": printable(self._settings.source),
            "mountpoint": printable(self._settings.mountpoint),
            "model": executor.model,
            "threads": executor.pool.threads,
            "time": time.time(),
            "uptime": time.monotonic() - self._since,
            "operations": self._operations(),
            "requests": {
                "running": executor.running,
                "queued": executor.pool.queued,
                "held_back": executor.pool.held_back,
            },
            "locks": {lock.name: _lock(lock) for lock in locks},
            "fids": {"known": fids.fids, "open": fids.opened},
            "descriptors": {"open": _descriptors(), "nodes": fids.descriptors},
            "data": {"by": self._settings.data, "passed": self._front.passed()},
            "memory": {"resident": self._resident()},
        }

    def lines(self) -> list[str]:
        """The counters for the log."""
        now = self.snapshot()
        operations: dict[str, dict[str, Any]] = now["operations"]
        counts = (f"{name} {one['count']}" for name, one in sorted(operations.items()))
        errors = (
            f"{name} {code} {count}"
            for name, one in sorted(operations.items())
            for code, count in one["errors"].items()
        )
        stayed = sum(one["on_dispatcher"] for one in operations.values())
        count = sum(one["count"] for one in operations.values())
        crossings = sum(one["crossings"] for one in operations.values())
        requests, fids, descriptors = now["requests"], now["fids"], now["descriptors"]
        data = now["data"]
        return [
            f"model {now['model']}, {now['threads']} workers, {now['uptime']:.0f} s, "
            f"{now['memory']['resident'] >> 20} MiB",
            f"operations: {', '.join(counts) or 'none'}",
            f"errors: {', '.join(errors) or 'none'}",
            f"requests: {stayed} ended on the dispatcher, {count - stayed} handed over, "
            f"{crossings} crossings; {requests['running']} under way, "
            f"{requests['queued']} queued, {requests['held_back']} held back for a share",
            *(_lock_line(name, lock) for name, lock in now["locks"].items()),
            f"data: by the {data['by']}; {data['passed']} open files passed through",
            f"fids: {fids['known']}, {fids['open']} of them open; "
            f"descriptors: {descriptors['open']}, {descriptors['nodes']} of them for nodes",
        ]

    def _resident(self) -> int:
        """Bytes of memory that the process has (proc(5))."""
        return int(os.pread(self._memory, 200, 0).split()[1]) * resource.getpagesize()

    def _operations(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {
            name: {
                "count": one.count,
                "errors": {},
                "on_dispatcher": one.on_dispatcher,
                "crossings": one.crossings,
                "latency_us": one.latencies.buckets(),
            }
            for name, one in list(self._executor.answered.items())
        }
        for (name, code), count in list(self._front.errors.items()):
            if name in found:
                found[name]["errors"][errno.errorcode.get(code, str(code))] = count
        return found


def stacks(executor: Executor) -> list[str]:
    """Every thread's stack, and the requests that have been under way for long."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        stack = traceback.extract_stack(frame)
        lines.extend(f"  {e.filename}:{e.lineno} {e.name}: {e.line}" for e in stack)
    slow = executor.slow_requests(_SLOW)
    lines.append(f"requests under way for more than {_SLOW:.0f} s: {len(slow)}")
    lines.extend(f"  {line}" for line in slow)
    return lines


def _lock(lock: RWLock) -> dict[str, Any]:
    found = lock.statistics()._asdict()
    found["waited"] = round(found["waited"], 6)
    found["longest_wait"] = round(found["longest_wait"], 6)
    return found


def _lock_line(name: str, lock: dict[str, Any]) -> str:
    return (
        f"{name}: waited for {lock['waits']} times, {lock['longest_wait'] * 1000:.1f} ms at the "
        f"longest; now {lock['readers']} readers, {'a' if lock['writing'] else 'no'} writer, "
        f"{lock['waiting']} waiting"
    )


def _descriptors() -> int:
    """How many descriptors the process has open; without one to find out, if possible."""
    count = os.stat("/proc/self/fd").st_size  # since Linux 6.2
    return count or len(os.listdir("/proc/self/fd"))


def printable(path: str) -> str:
    """A path as text that any reader of JSON takes: bytes that are no characters are shown."""
    return os.fsencode(path).decode(errors="backslashreplace")
