"""Leaving the file systems that are mounted in the source, so that they can be unmounted.

A descriptor keeps its mount busy. Nobody looks for a holder in a daemon, when he pulls out the
stick that he has listed the files of. So nodes on other mounts than the source's own lose their
descriptors once nobody has used them for about a second; what is open keeps its own, as on the
source. A node that is used again is opened again by its name (descriptors.py).

That takes a look every half second, as long as there are such descriptors, by a thread of its
own. Of each file is asked whether it has a name left, without asking a server. Should even that
hang, it hangs a thread for this mount alone. What has no name left could not be opened again;
the kernel is asked to forget it, which it does unless somebody is in there.

Locks touched: the mutex ``counts``, through counts.py; one to start its thread, in threads.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import groupby

from ninefuse.linux.syscalls import has_names
from ninefuse.process.threads import ThreadOnDemand
from ninefuse.tree.nodes import Node
from ninefuse.tree.table import FidTable

log = logging.getLogger(__name__)

PERIOD = 0.5  # seconds; what was not used between two looks is left at the second


class Leaver:
    """Has nodes on other mounts than the source's own lose descriptors that are not used.

    Args:
        fids: their table.
        forget: has the kernel asked to forget some, by their numbers.
    """

    def __init__(self, fids: FidTable, forget: Callable[[list[int]], None]) -> None:
        self._fids = fids
        self._forget = forget
        self._thread = ThreadOnDemand("leaver", self._run)
        self._leaving: set[int] = set()  # mounts (Mount.number) that a thread is at
        fids.on_visit = self.note

    def note(self) -> None:
        """There is such a descriptor. Any thread; does not wait."""
        self._thread.wake()

    def end(self) -> None:
        """Look no more."""
        self._thread.end()

    def _run(self) -> None:
        while True:
            self._thread.wait()
            while self._fids.visitors:
                if self._thread.ends.wait(PERIOD):
                    return
                try:
                    self._look()
                except Exception:  # tried again
                    log.exception("descriptors on other mounts cannot be closed")

    def _look(self) -> None:
        idle = self._fids.idle_visitors(self._leaving)
        idle.sort(key=_mount_of)
        for number, nodes in groupby(idle, _mount_of):
            self._leaving.add(number)
            args = number, list(nodes)
            try:
                threading.Thread(target=self._leave, args=args, name="leaver", daemon=True).start()
            except RuntimeError:  # there may be no more threads
                self._leave(*args)

    def _leave(self, mount: int, nodes: list[Node]) -> None:
        fids, nameless = self._fids, []
        try:
            for node in nodes:
                # As in descriptors.py: who has it now may take its name away after the look.
                fd, uses, is_used = -1, node.uses, node.pins > 1
                try:
                    if is_used:
                        continue
                    if not has_names(node.fd):
                        nameless.append(node.number)
                    else:
                        fd = fids.take_descriptor(node, uses)
                except OSError as e:  # of this one alone; it is asked again at the next look
                    log.warning("a descriptor on another mount cannot be closed: %s", e)
                finally:
                    fids.unpin(node)
                if fd >= 0:
                    fids.close_node(fd)
            if nameless:
                self._forget(nameless)
        except Exception:
            log.exception("descriptors on another mount cannot be closed")
        finally:
            self._leaving.discard(mount)


def _mount_of(node: Node) -> int:
    return node.mount.number
