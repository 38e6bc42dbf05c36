"""A FUSE server in the foreground, its mount, and its end.

Any server that stays in the foreground will do: ninefuse (see ninefuse_command), bindfs -f,
libfuse's examples. Whether it is mounted is asked of /proc/self/mountinfo, never of the mount.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import ninefuse
from ninefuse.bench import BenchError, Process, Processes
from ninefuse.exitcodes import one_line
from ninefuse.linux import mountinfo

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Limits:
    """How long each step of a mount's life may take, in seconds.

    start: until the mount answers. unmount: of fusermount -u, with repetitions while the mount
    is busy. end: of the daemon, once unmounted.
    """

    start: float = 20.0
    unmount: float = 10.0
    end: float = 5.0


def ninefuse_command(source: Path, mountpoint: Path, *options: str) -> list[str]:
    """Return the command that serves source on mountpoint in the foreground.

    It is the checkout's bin/ninefuse, or the installed package where there is no checkout.
    """
    program = Path(ninefuse.__file__).resolve().parent.parent / "bin" / "ninefuse"
    words = [str(program)] if program.is_file() else ["-m", "ninefuse"]
    # With this interpreter, which has what ninefuse needs: PATH's first python3 may not.
    return [sys.executable, *words, "-f", *options, "--", str(source), str(mountpoint)]


class Mounted:
    """A mount, as a context manager: served inside, gone afterwards whatever happens.

    On entering it raises BenchError when the mount does not come about. On leaving it raises
    BenchError when the mount had to be ended by force or the server did not end well; if
    something else has failed already, that is logged instead.

    Arguments: name, for messages; command, the server, which stays in the foreground;
    mountpoint, absolute and without symlinks.
    """

    def __init__(
        self,
        processes: Processes,
        name: str,
        command: Sequence[str],
        mountpoint: Path,
        limits: Limits | None = None,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.mountpoint = mountpoint
        self._processes = processes
        self._limits = limits or Limits()
        self._server: Process | None = None

    @property
    def server(self) -> Process:
        """The server's process."""
        assert self._server is not None, "not entered"
        return self._server

    def __enter__(self) -> Mounted:
        self._server = self._processes.start(self.command)
        try:
            self._await_mount(self._limits.start)
            # In the list but not yet served, it would hold up the first request. `.`: of the
            # mount, not of the directory that it covers.
            probe = ["stat", "--", f"{self.mountpoint}/."]
            self._processes.run(probe, self._limits.start)
        except BaseException:
            self._end_after_failure()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._end_after_failure()
            return
        problem = self._end()
        ended = self.server.ended
        if not problem and ended is not None:
            if ended.returncode != 0:
                problem = f"the server ended with {ended.complaint}"
            elif "Traceback (most recent call last)" in ended.errors:
                problem = f"the server logged an exception: {ended.complaint}"
        if problem:
            raise BenchError(f"{self.name}: {problem}")

    def _end_after_failure(self) -> None:
        problem = self._end()
        if problem:
            log.warning("%s: %s", self.name, one_line(problem))

    def _await_mount(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_mounted(self.mountpoint):
            if self._processes.wait([self.server], _POLL_SECONDS):
                raise BenchError(f"{self.name}: not mounted: {self.server.collect().complaint}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name}: not mounted after {seconds:g} s")

    def _end(self) -> str:
        """Unmount and see the server end, by force if need be. Return what went wrong, or ""."""
        with self._processes.shielded():
            if self.server.ended is None and not is_mounted(self.mountpoint):
                # It may be about to mount: killed then, it would leave a dead mount.
                try:
                    self._await_mount(self._limits.end)
                except BenchError:
                    self._processes.kill([self.server])
            problem = self._unmount()
            if not self._processes.wait([self.server], self._limits.end):
                # One cause that is not the server's: a process with a mount namespace of its
                # own, begun meanwhile, keeps a copy of the mount in it.
                problem = problem or (
                    f"unmounted, but the server did not end within {self._limits.end:g} s "
                    "(does another mount namespace hold the mount?)"
                )
                if not self._processes.kill([self.server]):
                    problem += f"; process {self.server.pid} does not even end when killed"
            # A second time: of a server that was killed, the dead mount remains.
            if is_mounted(self.mountpoint):
                self._detach()
            if is_mounted(self.mountpoint):
                problem = f"{self.mountpoint} is still mounted; try: umount -l {self.mountpoint}"
        return problem

    def _unmount(self) -> str:
        """Unmount politely, then by force. Return what went wrong, or ""."""
        deadline = time.monotonic() + self._limits.unmount
        problem = ""
        while is_mounted(self.mountpoint):
            left = deadline - time.monotonic()
            if left <= 0:
                self._detach()
                return f"unmounted by force: {problem}"
            try:
                self._processes.run([unmounter(), "-u", "--", str(self.mountpoint)], left)
            except BenchError as error:
                # Something may have looked in (an indexer) and be gone in a moment.
                problem = str(error)
                self._processes.sleep(0.1)
        return ""

    def _detach(self) -> None:
        try:
            self._processes.run(
                [unmounter(), "-u", "-z", "--", str(self.mountpoint)], self._limits.unmount
            )
        except BenchError as error:
            log.warning("%s: %s", self.name, one_line(str(error)))


def unmounter() -> str:
    """Return the program that unmounts: fusermount, or fusermount3 where only that exists."""
    return "fusermount" if shutil.which("fusermount") else "fusermount3"


def is_mounted(path: Path) -> bool:
    """Return whether something is mounted on that absolute path."""
    return any(mountpoint == path for mountpoint, _ in _mounts())


def mounts_below(path: Path) -> list[Path]:
    """Return the mount points in and below that absolute path."""
    return [mountpoint for mountpoint, _ in _mounts() if mountpoint.is_relative_to(path)]


def file_system(path: Path) -> str:
    """Return the type of the file system that holds the absolute path, such as "ext4"."""
    found = "unknown"
    deepest = -1
    for mountpoint, kind in _mounts():
        # Of several on one mount point the last one is on top.
        if path.is_relative_to(mountpoint) and len(mountpoint.parts) >= deepest:
            found, deepest = kind, len(mountpoint.parts)
    return found


def _mounts() -> list[tuple[Path, str]]:
    """Return all mount points with the types of their file systems; see proc(5)."""
    return [(Path(os.fsdecode(a.point)), os.fsdecode(a.kind)) for a in mountinfo.lines()]
