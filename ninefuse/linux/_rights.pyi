"""Types of the optional extension ninefuse.linux._rights; _rights.pyx says what it does."""

from collections.abc import Callable

from ninefuse.linux.callers import Caller
from ninefuse.linux.capabilities import Capabilities

def covers(pid: int, proc: int, uid_map: bytes, needed: int, raised: int) -> bool: ...
def look(
    pid: int, proc: int, uid_map: bytes
) -> tuple[int, int, frozenset[int], int, bool] | None: ...
def get_sets(pid: int) -> tuple[int, int, int]: ...

class Acting:
    def __init__(
        self,
        umask: int | None,
        caller: Caller,
        groups: frozenset[int] | None,
        own: Capabilities,
        effective: int,
        unshare: Callable[[], object],
        end: Callable[[], object],
    ) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...
