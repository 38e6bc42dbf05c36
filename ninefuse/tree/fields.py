"""What is kept of each file that somebody knows: the fields of its node and of its fid.

Where ninefuse was built with a compiler they are those of _known.pyx, which take less memory.

Locks touched: none; see nodes.py and table.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ninefuse.tree.identity import Mark
    from ninefuse.tree.nodes import Node
    from ninefuse.tree.opened import Opened
    from ninefuse.tree.places import Mount


class Rare:
    """What is known of few nodes.

    Attributes:
        aside: what tells the file from the same one at another place (places.py); 0: nothing.
        asked: the node's own mount when the kernel was told to look it up again, or None.
        bare_until: monotonic seconds until which it is known to have no security.capability.
        bare_asked: when that was asked last, if nobody has changed an attribute since.
    """

    __slots__ = ("aside", "asked", "bare_asked", "bare_until")

    def __init__(self, aside: int = 0) -> None:
        self.aside = aside
        self.asked: Mount | None = None
        self.bare_until = self.bare_asked = 0.0


class _NodeFields:
    """`NodeFields` without the extension."""

    __slots__ = (
        "__weakref__",
        "fd",
        "kind",
        "mark",
        "pins",
        "place",
        "recent",
        "refs",
        "uses",
    )

    fd: int
    kind: int
    mark: Mark
    pins: int
    place: tuple[Node, bytes] | None
    recent: bool
    refs: int
    uses: int

    def pinned(self, use: bool) -> bool:
        """Count a pin and its reference; whether there is a descriptor."""
        self.refs += 1
        self.pins += 1
        if use:
            self.recent = True
            self.uses = (self.uses + 1) & 0xFF
        return self.fd >= 0

    def unpinned(self) -> bool:
        """Undo `pinned`; whether it is still referenced."""
        self.pins -= 1
        return self.dropped()

    def dropped(self) -> bool:
        """Count a reference off; whether there are others."""
        self.refs -= 1
        return self.refs != 0


class _Fid:
    """`Fid` without the extension."""

    __slots__ = ("generation", "lookups", "node", "number", "opened", "refs")

    def __init__(self, number: int, node: Node, opened: Opened | None = None) -> None:
        self.number = number
        self.node = node
        self.opened = opened  # None: unopened
        self.refs = 1  # the table's; each operation under way has one more
        self.lookups = 0  # FUSE's lookup count, for nodeids
        self.generation = 0  # FUSE's, raised when the number passes to another file

    def __repr__(self) -> str:
        return shown(self)

    def referenced(self) -> bool:
        """Count a reference, unless the last one was dropped; whether it was not."""
        if not self.refs:
            return False
        self.refs += 1
        return True

    def dropped(self) -> bool:
        """Count a reference off; whether there are others."""
        self.refs -= 1
        return self.refs != 0


def shown(fid: _Fid | Fid) -> str:
    """What a fid is, for the log."""
    state = type(fid.opened).__name__ if fid.opened else "unopened"
    return f"<fid {fid.number} {state} refs {fid.refs} lookups {fid.lookups}>"


try:
    from ninefuse.tree._known import Fid as Fid
    from ninefuse.tree._known import NodeFields as NodeFields
except ImportError:  # it was not built
    Fid = _Fid  # type: ignore[assignment,misc]
    NodeFields = _NodeFields  # type: ignore[assignment,misc]
