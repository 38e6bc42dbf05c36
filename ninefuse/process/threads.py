"""How the daemon starts its threads: out of reach of signals, some only once they are wanted.

Locks touched: a mutex of each `ThreadOnDemand`, held while its thread starts.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def start_quietly(thread: threading.Thread) -> None:
    """Start a thread with all signals blocked.

    They are for the thread that waits for them (signals.py) and, for the timer of the device,
    for the dispatcher: others' system calls are not interrupted.

    Raises:
        RuntimeError: there is no thread to be had.
    """
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


class ThreadOnDemand:
    """A daemon thread that starts when it is first wanted, and waits to be woken.

    Args:
        name: the thread's.
        run: what it runs. It calls `wait` for each time that it is woken, and returns when `ends`
            is set.

    Attributes:
        ends: set when the thread is to end.
    """

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.ends = threading.Event()
        self._name = name
        self._run = run
        self._wanted = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Have it go on. Any thread; does not wait. Without a thread to be had, the next tries."""
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self.ends.is_set():
                    thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    try:
                        start_quietly(thread)
                    except RuntimeError:
                        return
                    self._thread = thread
        self._wanted.set()

    def wait(self) -> None:
        """Wait until it is woken. The thread itself."""
        self._wanted.wait()
        self._wanted.clear()

    def end(self) -> None:
        """Have it end, and start no more."""
        with self._starting:
            self.ends.set()
        self._wanted.set()

    def join(self, patience: float) -> bool:
        """Wait for its end, so many seconds at most; say whether it has ended, or never was."""
        if self._thread is None:
            return True
        self._thread.join(patience)
        return not self._thread.is_alive()
