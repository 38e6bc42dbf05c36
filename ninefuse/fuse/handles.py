"""File handles: clones of a fid that are opened, and files that are made by one.

Locks touched: those of the messages.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable
from typing import NamedTuple, Protocol, TypeVar

from ninefuse import ops
from ninefuse.calls import Body
from ninefuse.errors import error
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import Attributes
from ninefuse.ops.opening import create_nameless
from ninefuse.tree.opened import OpenFile
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid

T = TypeVar("T")


class Handle(NamedTuple):
    """A file that was opened."""

    number: int  # of its fid
    is_live: bool  # to be read and written by us, past all caches; see `OpenFile`
    backing: int = 0  # by which the kernel reads and writes it itself (backing.py); 0: it asks us


Made = tuple[Handle, Fid, Attributes]


class Files(Protocol):
    """What opens files, makes and closes them: callbacks.py, or what has more to do with that."""

    def open(
        self, session: Session, nodeid: int, flags: int, caller: Caller | None = None, /
    ) -> Body[Handle]: ...

    def create(
        self,
        session: Session,
        parent: int,
        name: bytes,
        flags: int,
        mode: int,
        caller: Caller | None = None,
        /,
    ) -> Body[Made]: ...

    def tmpfile(
        self,
        session: Session,
        parent: int,
        flags: int,
        mode: int,
        caller: Caller | None = None,
        /,
    ) -> Body[Made]: ...

    def release(self, session: Session, handle: int, /) -> Body[None]: ...


async def clone_of(session: Session, fid: int) -> Fid:
    """walk of no names to a new handle."""
    _, clone = await ops.walk(session, fid, session.kernel.new_number())
    assert clone is not None
    return clone


def handle_of(fid: Fid) -> Handle:
    return Handle(fid.number, isinstance(fid.opened, OpenFile) and fid.opened.live)


async def or_clunk(session: Session, fid: Fid, message: Awaitable[T]) -> T:
    """Await a message; where it fails, clunk the fid that it was for."""
    try:
        return await message
    except BaseException:
        await ops.clunk(session, fid.number)
        raise


async def create_in(
    session: Session, clone: Fid, name: bytes, flags: int, mode: int, caller: Caller | None
) -> Made:
    try:
        await ops.lcreate(session, clone.number, name, flags | os.O_EXCL, mode, caller)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        # The kernel looked and found none. It looks again by itself, and opens what is there with
        # the checks that opening takes.
        raise error(errno.ESTALE) from None
    return await _made(session, clone)


async def create_nameless_in(
    session: Session, clone: Fid, flags: int, mode: int, caller: Caller | None
) -> Made:
    await create_nameless(session, clone.number, flags, mode, caller)
    return await _made(session, clone)


async def _made(session: Session, clone: Fid) -> Made:
    """The kernel's fid for what a clone has just become."""
    _, fid = await ops.walk(session, clone.number, session.kernel.intern)
    assert fid is not None
    return handle_of(clone), fid, await attributes_of(session, fid)


async def attributes_of(session: Session, fid: Fid) -> Attributes:
    """getattr of what was just found; if it fails, take back the lookup nobody hears of.

    The kernel keeps a directory locked for its names' requests. So this goes on the
    directory's share of the workers: in the file's own it might queue behind reads that
    are stuck, and every other name of the directory with it.
    """
    place = fid.node.place
    try:
        return await ops.getattr(session, fid.number, on=place[0].number if place else None)
    except BaseException:
        session.kernel.forget([(fid.number, 1)])
        raise
