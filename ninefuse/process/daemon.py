"""Going on in the background: fork, tell the waiting command how the mount went, detach.

Locks touched: none.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from ninefuse.exitcodes import ExitCode, Failure, one_line, report
from ninefuse.process.notify import notify

log = logging.getLogger(__name__)

# How long the command waits for its child to end after asking it to, in seconds. A mount that
# is busy serves on for up to 15 s.
STOP_SECONDS = 12.0

# How soon the waiting command sees a signal, in seconds.
_SIGNAL_SECONDS = 0.05


def open_standard_streams() -> None:
    """Open /dev/null for each of the descriptors 0 to 2 that the caller of the command closed.

    Call this before anything else is opened, or a pipe, a log or the FUSE device gets one of
    these numbers, and with it what is meant for a terminal.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    # Python leaves None for a descriptor that was closed at its start.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def run_detached(serve: Callable[[Callable[[], None]], int], program: str = "ninefuse") -> int:
    """Run serve in a daemon process and return how its start went.

    The fork comes first and the child does everything else, since neither threads nor trio's
    file descriptors survive a fork. No thread may run when this is called, and the descriptors
    0 to 2 have to be open (open_standard_streams).

    It is one fork, not the customary two. setsid alone parts the child from the terminal and
    its process group. A second fork would only keep a daemon that opens terminals from getting
    one as its controlling terminal. With one fork the parent knows the daemon's pid and can
    collect its status.

    Argument: serve, called in the child with a function `ready` that it calls once the mount
    answers; it returns an exit code. What it raises before that is reported here, as of program,
    and so is each warning that it logs.
    Returns ExitCode.OK once ready was called, the failure's own code (after one line on
    stderr) when it was not, and 128 + the signal when SIGINT or SIGTERM ended the waiting; the
    child has been sent SIGTERM then. The child never returns from this function.
    Raises OSError when there is no process or pipe to be had (fork(2), pipe(2)).
    """
    read_end, write_end = os.pipe()
    # What is still buffered would be written twice, once by each process.
    _flush_standard_streams()
    # While blocked, signals are neither lost nor do they interrupt anything halfway: _wait
    # asks for them. One that the caller has set to be ignored (nohup, a script's `&`) stays so.
    signals = {
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _run_child(serve, write_end, old_mask, program)
        os.close(write_end)
        code = _wait(pid, read_end, signals, program)
        if code == ExitCode.OK:
            # From the process that the service manager has started, which is the one it believes.
            notify(f"MAINPID={pid}", "READY=1")
            # It is mounted, and the command has only to end: a signal comes too late to call
            # it off and must not make it look as if it had.
            old_mask |= signals
        return code
    finally:
        os.close(read_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _flush_standard_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A full disk or a reader that is gone must not keep a mount from working.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


# The child's side.


class _Starter(logging.Handler):
    """Tells whoever has started the daemon what its log warns of; a Failure tells of errors."""

    def __init__(self, program: str) -> None:
        super().__init__(logging.WARNING)
        self._program = program

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line on stderr."""
        if record.levelno == logging.WARNING:
            # A reader that is gone must not keep a mount from working.
            with contextlib.suppress(OSError, ValueError):
                line = f"{self._program}: {one_line(record.getMessage())}"
                print(line, file=sys.stderr, flush=True)


def _run_child(
    serve: Callable[[Callable[[], None]], int], pipe: int, mask: Iterable[int], program: str
) -> NoReturn:
    """Run serve as a daemon and end the process, whatever happens."""
    code = int(ExitCode.INTERNAL)
    try:
        code = _detach_and_serve(serve, pipe, mask, program)
    finally:
        # os._exit, so that neither the caller's frames nor its exit handlers run once more.
        with contextlib.suppress(Exception):
            logging.shutdown()
        _flush_standard_streams()
        os._exit(code)


def _detach_and_serve(
    serve: Callable[[Callable[[], None]], int], pipe: int, mask: Iterable[int], program: str
) -> int:
    """Run serve and return its exit code; tell the parent how the start went, and detach then."""
    is_ready = False
    ours, starter = logging.getLogger("ninefuse"), _Starter(program)

    def ready() -> None:
        nonlocal is_ready
        if is_ready:
            return
        is_ready = True
        # Not before: an automount lets only its own process group at the mount point until it is
        # mounted, and has everybody else wait for that.
        os.setsid()
        signal.signal(signal.SIGINT, interrupt or signal.SIG_DFL)
        _tell(pipe, ExitCode.OK, "")
        # Only now: until here errors, libfuse's too, were to reach the user's terminal.
        ours.removeHandler(starter)
        _redirect_to_null(1, 2)

    # A Ctrl-C comes to the waiting command too, which asks us to end.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # A working directory would keep its file system from being unmounted.
        os.chdir("/")
        _redirect_to_null(0)
        ours.addHandler(starter)
        code = serve(ready)
        if is_ready:
            return code
        failure = Failure(
            ExitCode.INTERNAL,
            f"the daemon ended before the mount answered (exit code {code}): "
            "run with -f to see more",
        )
    except Failure as error:
        failure = error
    except BaseException as error:
        log.exception("the daemon ends on an unexpected error")
        failure = Failure(ExitCode.INTERNAL, f"internal error: {type(error).__name__}: {error}")
    if is_ready:
        # The command has returned long ago: the log is all that is left.
        log.error("%s", failure.message)
    else:
        _tell(pipe, failure.code, failure.message)
    return failure.code


def _tell(pipe: int, code: ExitCode, message: str) -> None:
    """Send the parent its one line, `CODE MESSAGE`, and close the pipe."""
    # The newline ends the message: some process forked meanwhile may hold the pipe open.
    line = f"{code:d} {message}\n".encode()
    # The parent may have died; Python ignores SIGPIPE, and so nobody minds.
    with contextlib.suppress(BrokenPipeError):
        while line:
            line = line[os.write(pipe, line) :]
    os.close(pipe)


def _redirect_to_null(*descriptors: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


# The parent's side.


def _wait(pid: int, pipe: int, signals: set[signal.Signals], program: str) -> int:
    """Wait until the child has told how its start went, or for a signal. Return the exit code."""
    line = b""
    while not line.endswith(b"\n"):
        received = signal.sigtimedwait(signals, 0)
        if received is not None:
            os.kill(pid, signal.SIGTERM)
            _collect(pid, STOP_SECONDS, signals)
            return 128 + received.si_signo
        if select.select([pipe], [], [], _SIGNAL_SECONDS)[0]:
            chunk = os.read(pipe, 65536)
            if not chunk:
                status = _collect(pid, STOP_SECONDS, signals)
                message = (
                    f"the daemon ended before the mount answered ({_describe(status)}): "
                    "run with -f to see more"
                )
                return report(Failure(ExitCode.INTERNAL, message), program)
            line += chunk
    number, _, message = line.decode().rstrip("\n").partition(" ")
    code = ExitCode(int(number))
    if code != ExitCode.OK:
        _collect(pid, STOP_SECONDS, signals)
        report(Failure(code, message), program)
    return code


def _collect(pid: int, seconds: float, signals: set[signal.Signals]) -> int | None:
    """Wait for the child's end, at most that many seconds, and return its wait status.

    Returns None when it has not ended in time or another signal came: who presses Ctrl-C twice
    does not want to wait.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if signal.sigtimedwait(signals, _SIGNAL_SECONDS) is not None:
            return None
    return None


def _describe(status: int | None) -> str:
    if status is None:
        return "no exit status"
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by signal {-code}"
