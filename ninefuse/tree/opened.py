"""What an open fid has open: a file, a directory, an extended attribute to read or to write.

Locks touched: none. What one of them holds is changed by its fid's operations alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from ninefuse.linux.callers import Caller
from ninefuse.linux.credentials import spending_as
from ninefuse.tree.filelocks import Holder
from ninefuse.tree.listing import Listing

T = TypeVar("T")


class OpenFile:
    """The state of a fid after lopen or lcreate of a file.

    ``opener`` is who opened it, if that is known; ``writer`` the same, where a write must be
    made with other ids than the daemon's; ``group`` a further group to write in, or None;
    ``owner`` the user id of who opened it, whom its descriptor is counted for, or None; ``live``
    whether each read and write is one of the source's, past every cache; ``holders`` who has taken
    locks by it, or None.
    """

    __slots__ = ("fd", "flags", "group", "holders", "live", "opener", "owner", "writer")

    def __init__(
        self,
        fd: int,
        flags: int,
        writer: Caller | None = None,
        owner: int | None = None,
        live: bool = False,
    ) -> None:
        self.live = live
        self.fd = fd
        self.flags = flags
        self.writer = writer
        self.group: int | None = None
        self.opener: Caller | None = None
        self.owner = owner
        self.holders: set[Holder] | None = None  # guarded by the mutex of `FileLocks`

    def spend(self, function: Callable[..., T], *args: object) -> T:
        """Call what takes blocks by this file, for who opened it (`spending_as`). Blocks.

        Args:
            function: what to call.
            args: its arguments.

        Raises:
            OSError: of `spending_as`.
        """
        if self.writer is None:
            return function(*args)
        return spending_as(self.writer, self.group, function, *args)

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class OpenDirectory:
    """The state of a fid after lopen of a directory; ``owner`` as of an `OpenFile`."""

    __slots__ = ("fd", "fits", "listing", "owner")

    def __init__(self, fd: int, owner: int | None = None) -> None:
        self.fd = fd
        self.owner = owner
        self.listing = Listing(fd)
        self.fits = 24  # entries that fitted into the last reply with attributes


class AttributeRead:
    """The state of a fid after xattrwalk: a value, or a list of names, as it was then."""

    __slots__ = ("value",)

    fd = -1
    owner = None

    def __init__(self, value: bytes) -> None:
        self.value = value


class AttributeWrite:
    """The state of a fid after xattrcreate: what clunk is going to set, or remove."""

    __slots__ = ("caller", "data", "flags", "name", "remove", "size")

    fd = -1
    owner = None

    def __init__(
        self, name: bytes, size: int, flags: int, remove: bool, caller: Caller | None = None
    ) -> None:
        self.caller = caller
        self.name = name
        self.size = size  # declared by xattrcreate
        self.flags = flags
        self.remove = remove
        self.data = b""  # what write has brought so far


Opened = OpenFile | OpenDirectory | AttributeRead | AttributeWrite
