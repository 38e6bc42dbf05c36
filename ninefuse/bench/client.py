"""The measuring client: metadata operations on a mount, counted and timed. A program.

    python -I -S client.py --at SECONDS [--user UID] WORKLOAD COUNT PREFIX

It waits for an instant of CLOCK_MONOTONIC, so that several clients begin together, does its
operations, and prints one line of JSON: done, begin, end (seconds of that clock), user, system
(CPU seconds in between), voluntary, forced (context switches likewise). Only the standard library:
it must start quickly, and alone. With --user it becomes that user first, and so need not be one
who may read the interpreter.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

BLOCK = 4096

_AT_EMPTY_PATH, _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS = 0x1000, 0x2000, 0x7FF
_STATX_BYTES = 256

# What is done once for each of the names, made beforehand.
Step = Callable[[str], object]


def lookup_missing(path: str) -> None:
    """Ask for a name that is not there. Raises FileExistsError when it is."""
    with suppress(FileNotFoundError):
        os.stat(path)
        raise FileExistsError(path)


def open_and_close(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def create_and_unlink(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    os.unlink(path)


def listing(path: str) -> int:
    """List a directory, and return how many names it has."""
    return len(os.listdir(path))


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def chmods(prefix: str, count: int) -> Callable[[], int]:
    """Return what changes the mode of one file so often, each time to another."""

    def run() -> int:
        for number in range(count):
            os.chmod(prefix, 0o600 if number % 2 else 0o644)
        return count

    return run


def getattrs(prefix: str, count: int) -> Callable[[], int]:
    """Return what asks so often for the attributes of one file, past what the kernel believes."""
    statx = ctypes.CDLL(None, use_errno=True).statx
    flags = _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    words = [os.open(prefix, os.O_PATH), b"", flags, _STATX_BASIC_STATS, buffer]

    def run() -> int:
        for _ in range(count):
            if statx(*words):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), prefix)
        return count

    return run


def reads(prefix: str, count: int) -> Callable[[], int]:
    """Return what reads so many blocks of one file, in a random order that is always the same."""
    descriptor = os.open(prefix, os.O_RDONLY)
    blocks = os.fstat(descriptor).st_size // BLOCK
    offsets = [number * BLOCK for number in random.Random(9).sample(range(blocks), count)]
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def run() -> int:
        for offset in offsets:
            if len(os.pread(descriptor, BLOCK, offset)) != BLOCK:
                raise OSError(f"{prefix}: a short read at {offset}")
        return count

    return run


def each(step: Step, paths: Sequence[str]) -> Callable[[], int]:
    """Return what does the step with each of the paths."""

    def run() -> int:
        for path in paths:
            step(path)
        return len(paths)

    return run


def lists(paths: Iterable[str]) -> Callable[[], int]:
    """Return what lists each of the directories, and counts names."""
    return lambda: sum(map(listing, paths))


WORKLOADS: dict[str, Callable[[str, int], Callable[[], int]]] = {
    "stat": lambda prefix, count: each(os.stat, numbered(prefix, count)),
    "missing": lambda prefix, count: each(lookup_missing, numbered(prefix, count)),
    "getattr": getattrs,
    "open": lambda prefix, count: each(open_and_close, [prefix] * count),
    "create": lambda prefix, count: each(create_and_unlink, numbered(prefix, count)),
    "readdir": lambda prefix, count: lists(numbered(prefix, count)),
    "chmod": chmods,
    "read": reads,
}


def become(user: int) -> None:
    """Be another user, with a group of the same number and no other. Raises OSError."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one client. Returns 0, or 1 with a line on stderr when an operation fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", type=float, default=0.0)
    parser.add_argument("--user", type=int)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("count", type=int)
    parser.add_argument("prefix")
    options = parser.parse_args(argv)
    try:
        if options.user is not None:
            become(options.user)
        run = WORKLOADS[options.workload](options.prefix, options.count)
        time.sleep(max(0.0, options.at - time.monotonic()))
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.monotonic()
        done = run()
        end = time.monotonic()
        after = resource.getrusage(resource.RUSAGE_SELF)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    report = {"done": done, "begin": begin, "end": end, "user": user, "system": system}
    report["voluntary"] = after.ru_nvcsw - before.ru_nvcsw
    report["forced"] = after.ru_nivcsw - before.ru_nivcsw
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
