"""Types of the optional extension ninefuse.fuse._message; _message.pyx says what it does."""

from typing import Any

SIZES: dict[str, int]

class Message:
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    args: Any
    fault: int
    groups: tuple[int, ...] | None
    contexts: tuple[tuple[bytes, bytes], ...] | None

def decode(data: bytes, short_setxattr: bool = False) -> Message | None: ...
