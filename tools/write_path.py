"""The way of one write under each threading model: frames, objects, locks, threads.

    .venv/bin/python tools/write_path.py

prints the table of docs/architecture.md. What is counted is one write(2) of 4 KiB, from
pyfuse3's callback to its answer, with no mount and nobody beside it: frames of Python by thread
(each time that one is entered), objects of ninefuse's classes, mutexes taken. The loop's own,
trio's and what it calls around its waits, are left out: how many there are is a matter of luck.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
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
from ninefuse.settings import Settings  # noqa: E402
from ninefuse.tree.kernel import FIRST_HANDLE  # noqa: E402
from ninefuse.tree.session import Session  # noqa: E402

PACKAGE = f"{ROOT}/ninefuse/"
_LOOP = ("before_io_wait", "after_io_wait", "before_wait", "after_wait")
WARM = 20  # writes before the one that is counted
QUIET = 0.2  # seconds
BLOCK = bytes(4096)


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


async def _write(driver: executor.Executor, directory: str, counts: Counts) -> None:
    session = Session(driver)
    awaiting = Awaiting(driver)
    await awaiting.run("attach", ops.attach(session, 1, directory))
    await awaiting.run("walk", ops.walk(session, 1, FIRST_HANDLE, []))
    await awaiting.run("lcreate", ops.lcreate(session, FIRST_HANDLE, b"file", os.O_RDWR, 0o600))
    settings = Settings(directory, directory)
    adapter = Adapter(session, awaiting, settings, lambda: None)
    for number in range(WARM + 1):
        counts.is_on = number == WARM
        await adapter.write(0, 4096 * number, BLOCK)
    await trio.sleep(QUIET)  # what the worker still does after the answer counts, too
    counts.is_on = False
    before = driver.answered["write"].crossings
    await adapter.write(0, 0, BLOCK)
    counts.crossings = driver.answered["write"].crossings - before
    session.fids.clear()


def measure(model: str) -> Counts:
    """One write under a model."""
    with tempfile.TemporaryDirectory() as directory, counting() as counts:
        driver = executor.create(model, 2)
        try:
            trio.run(_write, driver, directory, counts)
        finally:
            driver.close()
    return counts


def table() -> str:
    """All models beside each other, in Markdown."""
    found = {model: measure(model) for model in ("none", "first", "second")}
    lines = ["| | none | first | second |", "|---|---|---|---|"]

    def line(name: str, values: list[object]) -> None:
        lines.append(f"| {name} | " + " | ".join(map(str, values)) + " |")

    counts = list(found.values())
    line("changes of thread", [one.crossings for one in counts])
    line("frames on the dispatcher", [one.frames["dispatcher"] for one in counts])
    line("frames on the worker", [one.frames["worker"] for one in counts])
    line("objects of ninefuse's classes", [one.objects.total() for one in counts])
    line("mutexes taken", [one.mutexes for one in counts])
    return "\n".join(lines)


def main() -> None:
    """Print the table, and which objects these are."""
    print(table())
    made = measure("second").objects
    print("\nObjects:", ", ".join(f"{name} {count}" for name, count in sorted(made.items())))


if __name__ == "__main__":
    main()
