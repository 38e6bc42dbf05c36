"""Asking the kernel to forget files, when it knows more of them than it should.

The kernel keeps what it has looked up for as long as it has memory, and each file that it
knows has a fid here. Above a mark it is asked to drop the names of files that have not been
used for long, whereupon it forgets them. Asking waits for the parent directory, which may be
locked by somebody whose request waits for us: so it is done by a thread of its own, which
nobody waits for.

Locks touched: the fid table's, through fids.py; a mutex of its own, to start its thread
once; in the kernel, those of directories.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from ninefuse.fids import FidTable
from ninefuse.mounts import mounts_below

log = logging.getLogger(__name__)

_LOOKS = 256  # fids looked at while the table waits
_PATIENCE = 5.0  # seconds that the end waits for the kernel's answer


class Forgetter:
    """Keeps the number of files that the kernel knows near a mark.

    Args:
        fids: the table.
        most: the mark, in files and directories.
        mountpoint: whose entries they are; what is mounted on one of them keeps it.
        invalidate: ``invalidate(nodeid of the parent, name)`` asks the kernel.
    """

    def __init__(
        self,
        fids: FidTable,
        most: int,
        mountpoint: str,
        invalidate: Callable[[int, bytes], None],
    ) -> None:
        self._fids = fids
        self._most = most
        self._mountpoint = mountpoint
        self._invalidate = invalidate
        self._wanted = threading.Event()
        self._starting = threading.Lock()
        self._ends = False
        self._thread: threading.Thread | None = None
        self.asked = 0  # times that the kernel was asked to forget something

    def note(self) -> None:
        """Have the kernel asked if it knows too much. Any thread; does not wait."""
        if len(self._fids) <= self._most:
            return
        with self._starting:
            if self._thread is None and not self._ends:
                self._thread = threading.Thread(target=self._run, name="forgetter", daemon=True)
                self._thread.start()
        self._wanted.set()

    def end(self) -> bool:
        """Ask no more, and say whether nothing is being asked."""
        with self._starting:
            self._ends = True
        self._wanted.set()
        if self._thread is None:
            return True
        self._thread.join(_PATIENCE)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ends:
                return
            try:
                self._ask()
            except Exception:  # tried again when the table has grown further
                log.exception("the kernel cannot be asked to forget")

    def _ask(self) -> None:
        """Ask for as many as there are above seven eighths of the mark, if there are so many."""
        surplus = len(self._fids) - self._most * 7 // 8
        looks = 2 * len(self._fids)  # a file that was used is passed over once
        # Dropping a name takes away what is mounted on it.
        kept = {os.path.basename(point) for point in mounts_below(self._mountpoint)}
        while surplus > 0 and looks > 0 and not self._ends:
            looks -= _LOOKS
            for parent, name in self._fids.next_entries(_LOOKS):
                if self._ends or surplus <= 0:
                    return
                if name not in kept:
                    surplus -= 1
                    self.asked += 1
                    try:
                        self._invalidate(parent, name)
                    except OSError as error:  # it knows nothing of it any more, say
                        log.debug("forgetting %r below %d: %s", name, parent, error)
