"""Signals, on a thread of their own.

Python runs signal handlers on the main thread, which is the dispatcher, which may be
inside a system call that does not end. So the signals are blocked everywhere and this
thread waits for them:

    SIGINT, SIGTERM, SIGHUP   unmount, or hang up, and end; the second one ends at once, but for
                              the same one that comes with it: timeout(1) sends two
    SIGUSR1                   log the counters
    SIGUSR2                   log the stacks and the requests that are taking long

Locks touched: none.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from ninefuse.process import logs

log = logging.getLogger(__name__)

STOP = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_TOGETHER = 0.1  # seconds in which one is the same that has come before
WAITED_FOR = STOP | {signal.SIGUSR1, signal.SIGUSR2}


def block() -> None:
    """Keep the signals from this thread and all that it starts from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR | {signal.SIGALRM})


def start(
    *,
    stop: Callable[[], None],
    end_now: Callable[[], None],
    counters: Callable[[], None],
    stacks: Callable[[], None],
    what: str = "unmounting",
) -> None:
    """Start the thread. Its callbacks run there, and must not need the dispatcher.

    Args:
        stop: begin to unmount; runs on yet another thread and may take its time.
        end_now: last words before the process ends.
        counters: log a snapshot of the counters.
        stacks: log all threads' stacks.
        what: the log says that ``stop`` does.
    """

    def wait() -> None:
        stopping, since = 0, 0.0  # by which signal, and when it came
        while True:
            received = signal.sigtimedwait(WAITED_FOR, logs.REPEAT_SECONDS)
            try:
                if received is None:
                    logs.tell_repeats()  # of which nothing else may remind
                    continue
                number = received.si_signo
                if number == signal.SIGUSR1:
                    counters()
                elif number == signal.SIGUSR2:
                    stacks()
                elif not stopping:
                    stopping, since = number, time.monotonic()
                    log.info("%s: %s", signal.Signals(number).name, what)
                    try:
                        threading.Thread(target=stop, name="stop", daemon=True).start()
                    except RuntimeError:  # none to be had: here, where no second signal is heard
                        stop()
                elif number != stopping or time.monotonic() - since > _TOGETHER:
                    log.warning("%s again: ending at once", signal.Signals(number).name)
                    end_now()
                    logs.finish()
                    os._exit(128 + number)
            except Exception:
                log.exception("%s", received)

    threading.Thread(target=wait, name="signals", daemon=True).start()
