"""Types of the optional extension ninefuse.fuse._wire; _wire.pyx says what it does."""

from ninefuse.fuse._message import Message

SIZES: dict[str, int]

class Entries:
    reply: bytes
    def __init__(self, size: int) -> None: ...
    def add(self, name: bytes, ino: int, offset: int, kind: int) -> bool: ...
    def add_plus(
        self,
        name: bytes,
        ino: int,
        offset: int,
        kind: int,
        nodeid: int,
        generation: int,
        entry_valid: float,
        attr_valid: float,
        attributes: tuple[int, ...] | None,
    ) -> bool: ...

class Device:
    fd: int
    short_setxattr: bool
    def __init__(self, fd: int, size: int) -> None: ...
    def receive(self) -> Message | None: ...
    def wait(self, wake: int, other: int, milliseconds: int) -> int: ...
    def error(self, unique: int, code: int) -> bool: ...
    def empty(self, unique: int) -> bool: ...
    def data(self, unique: int, data: bytes) -> bool: ...
    def entry(
        self,
        unique: int,
        nodeid: int,
        generation: int,
        entry_valid: float,
        attr_valid: float,
        ino: int,
        attributes: tuple[int, ...],
    ) -> bool: ...
    def absent(self, unique: int, entry_valid: float) -> bool: ...
    def attributes(
        self, unique: int, attr_valid: float, ino: int, attributes: tuple[int, ...]
    ) -> bool: ...
    def opened(self, unique: int, handle: int, flags: int, backing: int = 0) -> bool: ...
    def created(
        self,
        unique: int,
        nodeid: int,
        generation: int,
        entry_valid: float,
        attr_valid: float,
        ino: int,
        attributes: tuple[int, ...],
        handle: int,
        flags: int,
        backing: int = 0,
    ) -> bool: ...
    def count(self, unique: int, count: int) -> bool: ...
    def number(self, unique: int, number: int) -> bool: ...
    def file_system(
        self,
        unique: int,
        blocks: int,
        bfree: int,
        bavail: int,
        files: int,
        ffree: int,
        bsize: int,
        frsize: int,
        namelen: int,
    ) -> bool: ...
    def lock(self, unique: int, start: int, end: int, kind: int, pid: int) -> bool: ...
    def controlled(self, unique: int, data: bytes) -> bool: ...
    def statx(self, unique: int, attr_valid: float, ino: int, a: tuple[int, ...]) -> bool: ...
