"""Types of the optional extension ninefuse.tree._known; _known.pyx says what it does."""

from ninefuse.tree.identity import Mark
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import Opened

class NodeFields:
    mark: Mark
    place: tuple[Node, bytes] | None
    fd: int
    refs: int
    pins: int
    kind: int
    uses: int
    recent: bool
    def pinned(self, use: bool) -> bool: ...
    def unpinned(self) -> bool: ...
    def dropped(self) -> bool: ...

class Fid:
    number: int
    node: Node
    opened: Opened | None
    refs: int
    lookups: int
    generation: int
    def __init__(self, number: int, node: Node, opened: Opened | None = None) -> None: ...
    def referenced(self) -> bool: ...
    def dropped(self) -> bool: ...
