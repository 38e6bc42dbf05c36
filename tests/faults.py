"""The mount of a faultfs (faultfs.py), and the way to have it fail."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from mounting import Mount, Watchdog


class FaultSource:
    """The mount of a faultfs, and the way to have it fail."""

    def __init__(self, mount: Mount, control: socket.socket) -> None:
        self.path = mount.path
        self.mount = mount
        self._stream = control.makefile("rw", encoding="ascii")

    def arm(
        self,
        operation: str,
        code: int | None = None,
        *,
        short: int | None = None,
        skip: int = 0,
        times: int | None = None,
    ) -> None:
        """Have an operation fail, or read or write little; see faultfs.py."""
        words = {"operation": operation, "errno": code, "short": short}
        self.tell({**words, "skip": skip, "times": times})

    def clear(self) -> int:
        """Take all faults away; how often they have met something."""
        return self.tell({"clear": True})

    def close(self) -> None:
        """Say nothing more."""
        self._stream.close()

    def tell(self, words: dict[str, object]) -> int:
        """Say something; how often the faults that were armed have met something."""
        self._stream.write(json.dumps(words) + "\n")
        self._stream.flush()
        met: int = json.loads(self._stream.readline())["met"]
        return met


@contextlib.contextmanager
def faulty(watchdog: Watchdog, base: Path) -> Iterator[FaultSource]:
    """Mount a faultfs, for a while."""
    path = base / "fault-source"
    path.mkdir(parents=True)
    script = Path(__file__).with_name("faultfs.py")
    words = [sys.executable, str(script), str(path)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mount = Mount(
            watchdog, path, path, base / "faultfs-log", words, r"^ready$", stdin=theirs.fileno()
        )
        source = FaultSource(mount, ours)
        try:
            yield source
        finally:
            if mount.process.poll() is None:
                source.clear()
            source.close()
            mount.end()
            mount.log.check()
