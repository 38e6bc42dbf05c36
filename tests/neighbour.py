"""Another process, which locks files of the source while a test locks them through ninefuse.

It is a program of its own, not a fork: that would have the test's descriptors, and with them its
locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

FLOCK = struct.Struct("@hhqqi4x")


class Neighbour:
    """A process that has a file open and does with it what it is told; a context manager.

    Args:
        path: the file, which it opens for reading and writing.
    """

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Neighbour:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def record(self, kind: int, start: int = 0, length: int = 0, *, own: bool = False) -> bool:
        """Lock, or unlock, a part of the file by fcntl(2); whether that could be done.

        Args:
            kind: fcntl.F_RDLCK, F_WRLCK or F_UNLCK.
            start: bytes.
            length: bytes; 0: to the end.
            own: whether the lock is one of the open file description.
        """
        command = fcntl.F_OFD_SETLK if own else fcntl.F_SETLK
        return self._ask("record", command, kind, start, length)

    def whole(self, operation: int) -> bool:
        """Lock, or unlock, the file by flock(2); whether that could be done."""
        return self._ask("whole", operation)

    def record_in_time(self, kind: int, start: int = 0, length: int = 0) -> None:
        """Begin to wait for a lock of a part, as `record`; `has_it` tells of the end."""
        self._say("record", fcntl.F_SETLKW, kind, start, length)

    def has_it(self) -> bool:
        """Wait for what was begun; whether it was done."""
        assert self._process.stdout is not None
        return self._process.stdout.readline() == "True\n"

    def is_free(self, start: int, length: int = 1, kind: int = fcntl.F_WRLCK) -> bool:
        """Whether it could lock a part, which is unlocked again."""
        could = self.record(kind, start, length)
        if could:
            self.record(fcntl.F_UNLCK, start, length)
        return could

    def _ask(self, *words: Any) -> bool:
        self._say(*words)
        return self.has_it()

    def _say(self, *words: Any) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin)


def _serve() -> None:
    fd = os.open(sys.argv[1], os.O_RDWR)
    for line in sys.stdin:
        what, *words = line.split()
        numbers = [int(word) for word in words]
        try:
            if what == "whole":
                fcntl.flock(fd, numbers[0] | fcntl.LOCK_NB)
            else:
                command, kind, start, length = numbers
                fcntl.fcntl(fd, command, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
            print(True, flush=True)
        except (BlockingIOError, PermissionError):
            print(False, flush=True)


if __name__ == "__main__":
    _serve()
