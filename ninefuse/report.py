"""What a running daemon says of itself: counters (SIGUSR1), stacks (SIGUSR2).

Made on the signal thread, while everything else may be stuck; so it only reads.

Locks touched: those of the statistics it asks for, all held for an instant only.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import traceback

from ninefuse.adapter import Adapter
from ninefuse.executor import Executor
from ninefuse.locks import RWLock
from ninefuse.session import Session

_SLOW = 2.0  # seconds after which a request under way is listed


def counters(adapter: Adapter, executor: Executor, session: Session) -> list[str]:
    """Lines that say what has been done, and what is under way."""
    done = executor.statistics()
    fids = session.fids.statistics()
    operations = ", ".join(f"{n} {count}" for n, count in sorted(dict(adapter.operations).items()))
    errors = ", ".join(
        f"{name} {errno.errorcode.get(code, code)} {count}"
        for (name, code), count in sorted(dict(adapter.errors).items())
    )
    return [
        f"model {done.model}, {done.pool.threads} workers",
        f"operations: {operations or 'none'}",
        f"errors: {errors or 'none'}",
        f"requests: {done.on_dispatcher} ended on the dispatcher, {done.handed_over} handed over, "
        f"{done.running} under way, {done.pool.queued} queued, "
        f"{done.pool.held_back} held back for their inode",
        _lock_line(session.rename_lock),
        _lock_line(session.fids.lock),
        f"fids: {fids.fids}, {fids.opened} of them open; "
        f"descriptors: {len(os.listdir('/proc/self/fd'))}, {fids.descriptors} of them for nodes",
    ]


def stacks(executor: Executor) -> list[str]:
    """Every thread's stack, and the requests that have been under way for long."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        stack = traceback.extract_stack(frame)
        lines.extend(f"  {e.filename}:{e.lineno} {e.name}: {e.line}" for e in stack)
    slow = executor.slow_requests(_SLOW)
    lines.append(f"requests under way for more than {_SLOW:.0f} s: {len(slow)}")
    lines.extend(f"  {line}" for line in slow)
    return lines


def _lock_line(lock: RWLock) -> str:
    s = lock.statistics()
    return (
        f"{lock.name}: waited for {s.waits} times, {s.longest_wait * 1000:.1f} ms at the longest; "
        f"now {s.readers} readers, {'a' if s.writing else 'no'} writer, {s.waiting} waiting"
    )
