"""The demo and the benchmarks. Here: child processes, every wait for which has an end.

A mount that hangs hangs whoever touches it, and not even SIGKILL ends a process whose request
lies in a daemon that does not answer. So whatever touches a mount is a child process, waited for
with a limit, and the benchmark's own process stays free to end the daemon.

Signals are noted, and raised as Interrupted only where something is waited for: nothing is ever
interrupted between making a thing (a process, a mount, a directory) and seeing to its removal.

It looks from outside: it may import linux/, settings.py and exitcodes.py, and no daemon imports it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

# How long a process that was killed may take to be gone, in seconds: one that writes to a slow
# disk first finishes that.
_KILL_SECONDS = 3.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BenchError(Exception):
    """A step failed. The message is one line for the user."""


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived. Attribute: number, the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    returncode: its exit status, or minus the signal that killed it. user_seconds,
    system_seconds: its CPU time. output, errors: what it wrote to stdout and stderr. voluntary,
    forced: its context switches, by waiting and by the scheduler.
    """

    returncode: int
    user_seconds: float
    system_seconds: float
    output: bytes
    errors: str
    voluntary: int
    forced: int

    @property
    def complaint(self) -> str:
        """The last line of errors (mostly the one that matters), else how it ended."""
        lines = self.errors.split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if last:
            return last
        if self.returncode < 0:
            return f"killed by signal {-self.returncode}"
        return f"exit status {self.returncode}"


class Process:
    """One child process; made by Processes.start.

    pid; command, its words; ended: how it ended, None while it runs.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command = tuple(command)
        self.ended: Ended | None = None
        # Files in memory: unlike pipes they never fill up, and nobody has to read along.
        self._output = os.memfd_create("output")
        self._errors = os.memfd_create("errors")
        try:
            self.pid = os.posix_spawnp(
                command[0],
                self.command,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, self._output, 1),
                    (os.POSIX_SPAWN_DUP2, self._errors, 2),
                ],
                setsid=True,  # so a terminal's Ctrl-C comes to us only, who end it in good order
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
            )
        except BaseException:
            os.close(self._output)
            os.close(self._errors)
            raise
        self.pidfd = os.pidfd_open(self.pid)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        if self.ended is None:
            # It may have ended unnoticed; being ours, its pid is not given to another meanwhile.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU time so far of the running process: user and system, in seconds."""
        with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return int(fields[11]) / ticks, int(fields[12]) / ticks

    def threads(self) -> list[str]:
        """Return the ids of the running process's threads. Raises OSError when it has ended."""
        return os.listdir(f"/proc/{self.pid}/task")

    def switches(self) -> dict[str, tuple[int, int]]:
        """Return the context switches so far of the running process, by its threads' ids.

        Of each the voluntary ones and the forced ones. Raises OSError when it has ended.
        """
        found = {}
        for thread in self.threads():
            # One may end just now.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{self.pid}/task/{thread}/status", "rb") as file:
                    words = file.read().partition(b"\nvoluntary_ctxt_switches:")[2].split()
                found[thread] = int(words[0]), int(words[2])
        return found

    def collect(self) -> Ended:
        """Wait for the end without a limit, and return how it was; Processes.wait calls this."""
        if self.ended is None:
            _, status, usage = os.wait4(self.pid, 0)
            self.ended = Ended(
                os.waitstatus_to_exitcode(status),
                usage.ru_utime,
                usage.ru_stime,
                _contents(self._output),
                _contents(self._errors).decode(errors="replace"),
                usage.ru_nvcsw,
                usage.ru_nivcsw,
            )
            os.close(self._output)
            os.close(self._errors)
            os.close(self.pidfd)
        return self.ended


class Processes:
    """The child processes of a benchmark, and the signals that end it.

    A context manager, for the main thread: inside, SIGINT, SIGTERM and SIGHUP make `wait` and
    `check` raise Interrupted; at its end no process is left.
    """

    def __init__(self) -> None:
        self._running: set[Process] = set()
        self._signal: int | None = None
        self._shields = 0
        self._handlers: dict[int, Any] = {}
        # Readable once a signal came: poll(2) would otherwise simply go on after it.
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_waker = -1

    def __enter__(self) -> Processes:
        for number in _SIGNALS:
            # What the caller had ignored (nohup, a script's `&`) stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)
        self._old_waker = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        with self.shielded():
            self.kill(tuple(self._running))
        signal.set_wakeup_fd(self._old_waker)
        for number, handler in self._handlers.items():
            # After one that was heard the program is ending with its code: an impatient second
            # one must not change that.
            signal.signal(number, handler if self._signal is None else signal.SIG_IGN)
        os.close(self._woken)
        os.close(self._waker)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number

    def check(self) -> None:
        """Raise Interrupted if a signal came, except inside `shielded`."""
        if self._signal is not None and not self._shields:
            raise Interrupted(self._signal)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Keep signals for later: for what must be done to the end, such as cleaning up."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    def start(self, command: Sequence[str], environment: Mapping[str, str] = os.environ) -> Process:
        """Start a program, found in PATH, in a session of its own.

        Raises BenchError when there is no such program.
        """
        self.check()
        try:
            process = Process(command, environment)
        except OSError as error:
            raise BenchError(f"cannot run {command[0]}: {error.strerror}") from error
        self._running.add(process)
        return process

    def wait(self, processes: Collection[Process], seconds: float) -> bool:
        """Wait at most so many seconds until all have ended, and return whether they have.

        Raises Interrupted when a signal comes.
        """
        deadline = time.monotonic() + seconds
        waiting = {process.pidfd: process for process in processes if process.ended is None}
        poll = select.poll()
        for descriptor in (*waiting, self._woken):
            poll.register(descriptor, select.POLLIN)
        while True:
            self.check()
            if not waiting:
                return True
            left = deadline - time.monotonic()
            for descriptor, _ in poll.poll(max(0.0, left) * 1000):
                if descriptor in waiting:
                    poll.unregister(descriptor)
                    process = waiting.pop(descriptor)
                    process.collect()
                    self._running.discard(process)
                else:
                    os.read(self._woken, 4096)
            if waiting and left <= 0:
                return False

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass. Raises Interrupted when a signal comes."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        self.check()
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                os.read(self._woken, 4096)
            self.check()

    def kill(self, processes: Collection[Process]) -> bool:
        """Kill those that still run, and return whether they are gone.

        They may not be while a request of theirs lies in a daemon that hangs: then once that
        has ended, or at the end of the context.
        """
        for process in processes:
            process.kill()
        with self.shielded():
            return self.wait(processes, _KILL_SECONDS)

    def run(self, command: Sequence[str], seconds: float, *, check: bool = True) -> Ended:
        """Run a tool to its end, with its messages in plain English.

        Arguments: seconds, how long it may take; check, whether it must exit with 0.
        Raises BenchError when it fails or its time is up, and Interrupted.
        """
        process = self.start(command, {**os.environ, "LC_ALL": "C"})
        try:
            in_time = self.wait([process], seconds)
        finally:
            if process.ended is None:
                self.kill([process])
        if not in_time:
            raise BenchError(f"{_short(command)}: did not end within {seconds:g} s")
        ended = process.collect()
        if check and ended.returncode != 0:
            raise BenchError(f"{_short(command)}: failed: {ended.complaint}")
        return ended


def _contents(descriptor: int) -> bytes:
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()


def _short(command: Sequence[str]) -> str:
    line = " ".join(command)
    return line if len(line) <= 100 else line[:97] + "..."
