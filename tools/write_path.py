"""The way of one write under each threading model: frames, objects, locks, threads.

    .venv/bin/python tools/write_path.py

prints the table of docs/architecture.md. What is counted is one write(2) of 4 KiB, with no mount
and nobody beside it: frames of Python by thread (each time that one is entered), objects of
ninefuse's classes, mutexes taken. Under the native session from the reading of the request to its
answer, both on a pair of sockets in place of the device; under pyfuse3's from its callback to what
that returns. What the loops do around their waits is left out: how often is a matter of luck.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ninefuse import executor, ops  # noqa: E402
from ninefuse.awaiting import Awaiting  # noqa: E402
from ninefuse.fuse.adapter import Adapter  # noqa: E402
from ninefuse.fuse.native import NativeSession  # noqa: E402
from ninefuse.fuse.opcodes import Opcode  # noqa: E402
from ninefuse.settings import Settings  # noqa: E402
from ninefuse.tree.kernel import FIRST_HANDLE  # noqa: E402
from ninefuse.tree.session import Session  # noqa: E402

PACKAGE = f"{ROOT}/ninefuse/"
MODELS = ("none", "first", "second")
_LOOP = ("before_io_wait", "after_io_wait", "before_wait", "after_wait", "fd", "_take_some")
WARM = 20  # writes before the one that is counted
# Seconds: after an answer a worker still does something. Before the write that is counted too
# short for the pool to fall asleep.
QUIET, PAUSE = 0.2, 0.02
BLOCK = bytes(4096)

# Of include/uapi/linux/fuse.h: length, opcode, unique, nodeid, uid, gid, pid, extensions; what
# INIT has (of a kernel that offers nothing) and WRITE; length, error, unique.
_HEADER = struct.Struct("=IIQQIIIHH")
_INIT = struct.Struct("=IIII")
_WRITE = struct.Struct("=QQIIQII")
_REPLY = struct.Struct("=IiQ")


class Counts:
    """What one write took."""

    def __init__(self) -> None:
        self.is_on = False
        self.frames: Counter[str] = Counter()  # by thread: dispatcher, worker
        self.objects: Counter[str] = Counter()  # by class
        self.mutexes = 0
        self.crossings = 0  # from thread to thread

    def see(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profile function (sys.setprofile)."""
        code = frame.f_code
        if not self.is_on or event != "call" or PACKAGE not in code.co_filename:
            return
        if code.co_name in _LOOP:
            return
        if not _is_on_the_way():
            return
        name = threading.current_thread().name
        self.frames["worker" if name.startswith("worker") else "dispatcher"] += 1
        if code.co_name == "__init__":
            self.objects[type(frame.f_locals["self"]).__name__] += 1


def _is_on_the_way() -> bool:
    """Whether this thread is the dispatcher or a worker: the pool is watched by another."""
    name = threading.current_thread().name
    return name == "MainThread" or name.startswith("worker")


class _Mutex:
    """A lock of the threading module that is counted."""

    def __init__(self, counts: Counts, lock: Any) -> None:
        self._counts = counts
        self._lock = lock
        self.release = lock.release
        self.locked = lock.locked

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._counts.mutexes += self._counts.is_on and _is_on_the_way()
        return bool(self._lock.acquire(blocking, timeout))

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


@contextmanager
def counting() -> Iterator[Counts]:
    """Count in all threads and of all mutexes that are made inside."""
    counts, make = Counts(), threading.Lock

    def counted() -> _Mutex:
        return _Mutex(counts, make())

    threading.setprofile(counts.see)
    sys.setprofile(counts.see)
    try:
        with mock.patch.object(threading, "Lock", counted):
            yield counts
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


class Kernel:
    """The other end of what stands for the device.

    Args:
        end: of the pair of sockets.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._unique = 0

    def ask(self, opcode: Opcode, body: bytes) -> None:
        """Send a request and wait for its answer, which has to be that it was done."""
        self._unique += 2
        size = _HEADER.size + len(body)
        self._end.send(_HEADER.pack(size, opcode, self._unique, 1, 0, 0, 0, 0, 0) + body)
        _, error, unique = _REPLY.unpack_from(self._end.recv(4096))
        assert (error, unique) == (0, self._unique)

    def write(self, offset: int) -> None:
        """Write a block."""
        self.ask(Opcode.WRITE, _WRITE.pack(0, offset, len(BLOCK), 0, 0, 0, 0) + BLOCK)


def _opened(driver: executor.Executor, directory: str) -> Session:
    """A conversation in which a new file is open as the first handle."""
    session = Session(driver)
    begin = executor.NoThreading()  # what is counted are callbacks
    begin.run_here(ops.attach(session, 1, directory))
    begin.run_here(ops.walk(session, 1, FIRST_HANDLE, []))
    begin.run_here(ops.lcreate(session, FIRST_HANDLE, b"file", os.O_RDWR, 0o600))
    return session


def _write(driver: executor.Executor, directory: str, counts: Counts) -> None:
    """Count a write by the native session, of which this thread is the dispatcher."""
    session = _opened(driver, directory)
    native = NativeSession(Settings(directory, directory), session, driver)
    device, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device.setblocking(False)
    native.use(device.detach())

    def ask() -> None:
        try:
            kernel = Kernel(end)
            kernel.ask(Opcode.INIT, _INIT.pack(7, 45, 1 << 17, 0))
            for number in range(WARM):
                kernel.write(4096 * number)
            time.sleep(PAUSE)
            before = driver.answered["write"].crossings
            counts.is_on = True
            kernel.write(0)
            time.sleep(QUIET)
            counts.is_on = False
            counts.crossings = driver.answered["write"].crossings - before
        finally:
            native.end()

    kernel = threading.Thread(target=ask, name="kernel")
    kernel.start()
    native.run(lambda: None)
    kernel.join()
    native.leave(is_mounted=False)
    session.fids.clear()
    native.close()
    end.close()


def _write_by_pyfuse3(driver: executor.Executor, directory: str, counts: Counts) -> None:
    """Count a write by pyfuse3's session, without pyfuse3."""
    session = _opened(driver, directory)

    async def ask() -> None:
        adapter = Adapter(session, Awaiting(driver), Settings(directory, directory))
        for number in range(WARM):
            await adapter.write(0, 4096 * number, BLOCK)
        await trio.sleep(PAUSE)
        before = driver.answered["write"].crossings
        counts.is_on = True
        await adapter.write(0, 0, BLOCK)
        await trio.sleep(QUIET)
        counts.is_on = False
        counts.crossings = driver.answered["write"].crossings - before

    trio.run(ask)
    session.fids.clear()


Writing = Callable[[executor.Executor, str, Counts], None]


def measure(model: str, write: Writing = _write) -> Counts:
    """One write under a model."""
    with tempfile.TemporaryDirectory() as directory, counting() as counts:
        driver = executor.create(model, 2)
        try:
            write(driver, directory, counts)
        finally:
            driver.close()
    return counts


def table() -> str:
    """All models beside each other, in Markdown."""
    lines = ["| | none | first | second |", "|---|---|---|---|"]

    def line(name: str, values: list[int]) -> None:
        lines.append(f"| {name} | " + " | ".join(map(str, values)) + " |")

    for by, write in (("", _write), (", by pyfuse3", _write_by_pyfuse3)):
        counts = [measure(model, write) for model in MODELS]
        line(f"changes of thread{by}", [one.crossings for one in counts])
        line(f"frames on the dispatcher{by}", [one.frames["dispatcher"] for one in counts])
        line(f"frames on the worker{by}", [one.frames["worker"] for one in counts])
        line(f"objects of ninefuse's classes{by}", [one.objects.total() for one in counts])
        line(f"mutexes taken{by}", [one.mutexes for one in counts])
    return "\n".join(lines)


def main() -> None:
    """Print the table, and which objects these are."""
    print(table())
    made = measure("second").objects
    print("\nObjects:", ", ".join(f"{name} {count}" for name, count in sorted(made.items())))


if __name__ == "__main__":
    main()
