"""Asking the kernel to forget files, when it knows more of them than it should.

The kernel keeps what it has looked up for as long as it has memory, and each file that it
knows has a fid here. Above a mark it is asked to forget those that have not been used for
long. It may have to wait for a file's pages, which may wait for us: so it is asked by a
thread of its own, which nobody waits for.

Locks touched: the fid table's, through kernel.py; a mutex to start its thread, in threads.py.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence

from ninefuse.process.threads import ThreadOnDemand
from ninefuse.tree.kernel import KernelTable

log = logging.getLogger(__name__)

_LOOKS = 256  # fids looked at while the table waits
_PATIENCE = 5.0  # seconds that the end waits for the kernel's answer


class Forgetter:
    """Keeps the number of files that the kernel knows near a mark.

    Args:
        fids: the table.
        most: the mark, in files and directories.
        prune: ``prune(nodeids)`` asks the kernel to forget them unless they are in use.

    Attributes:
        asked: how many files it was asked to forget.
    """

    def __init__(
        self, fids: KernelTable, most: int, prune: Callable[[Sequence[int]], None]
    ) -> None:
        self._fids = fids
        self._most = most
        self._prune = prune
        self._thread = ThreadOnDemand("forgetter", self._run)
        self._more: set[int] = set()  # files to ask for besides
        self.asked = 0

    def note(self) -> None:
        """Have the kernel asked if it knows too much. Any thread; does not wait."""
        if len(self._fids) > self._most:
            self._thread.wake()

    def ask_for(self, nodeids: Iterable[int]) -> None:
        """Have the kernel asked to forget these files, however many it knows. Likewise."""
        self._more.update(nodeids)
        self._thread.wake()

    def end(self) -> bool:
        """Ask no more, and say whether nothing is being asked."""
        self._thread.end()
        return self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while not self._thread.ends.is_set():
            self._thread.wait()
            try:
                self._ask()
            except OSError as error:
                if error.errno == errno.EINVAL:
                    log.info("the kernel takes no requests to forget (Linux does from 6.18 on)")
                    return
                log.warning("the kernel cannot be asked to forget: %s", error)
            except Exception:  # tried again when the table has grown further
                log.exception("the kernel cannot be asked to forget")

    def _ask(self) -> None:
        """Ask for as many as there are above seven eighths of the mark, if there are so many."""
        if self._more:
            more, self._more = self._more, set()
            self._prune(list(more))
        if len(self._fids) <= self._most:
            return
        surplus = len(self._fids) - self._most * 7 // 8
        looks = 2 * len(self._fids)  # a file that was used is passed over once
        while surplus > 0 and looks > 0 and not self._thread.ends.is_set():
            looks -= _LOOKS
            nodeids = self._fids.next_idle(_LOOKS)[:surplus]
            if nodeids:
                self._prune(nodeids)
                self.asked += len(nodeids)
                surplus -= len(nodeids)
