"""Locks of files: who holds which, by which descriptor, and who waits for one.

It is the source's kernel that keeps locks, so that whoever works on the source and whoever works
here keep each other out. There a lock belongs to an open file description (fcntl(2), F_OFD_SETLK;
flock(2)). Here it belongs to an *owner*, whatever a client means by that, and each owner has one
description of a file for as long as he has a lock of it. So the kernel also keeps two owners
apart, and joins and splits what one of them locks.

This table knows which description is whose. Beside it, it remembers what was locked by it, for
two things: to say whose lock is in the way, which the kernel knows of its own processes only; and
to wake those who wait for what is given back.

Two kinds of lock know nothing of each other: records (byte ranges) and whole files (flock).

Locks touched: a mutex of its own, for list work only. No call is made here but by `Holder.end`.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable
from enum import Enum
from operator import attrgetter
from typing import Protocol

from ninefuse.tree.lockranges import ALL, Held, LockRange, packed, set_part
from ninefuse.tree.nodes import Node
from ninefuse.tree.order import END, Ranges, Turn

_MANY = 1000  # parts of a file that are locked, which the kernel goes through for each lock
_MOST = 64  # who tries at the same time, of those that wait for one file


class Kind(Enum):
    """What a lock keeps others out of."""

    RECORDS = "records"
    WHOLE = "the whole file"


class Locked(Protocol):
    """An open file, by which somebody may have taken locks."""

    fd: int
    holders: set[Holder] | None


Where = tuple[Kind, tuple[int, int], int]  # the device and the inode


def where(kind: Kind, node: Node) -> Where:
    """Under which the locks of a node's file are kept.

    The inode is the file: its number is nobody else's as long as somebody has it open.
    """
    return kind, node.device.number, node.inode


class Holder:
    """An owner of locks of one file, and the description by which he has them.

    Attributes:
        owner: who.
        where: of which file, and of which kind.
        fd: the descriptor; -1: none yet.
        access: what his own is open for: os.O_RDONLY, O_WRONLY or O_RDWR; -1: it is not his own.
        claimed_for: for whom that is counted, a uid, if it is his own.
        is_own: whether the descriptor is his own; else it is an open fid's, which closes it.
        held: what he has locked, by starts.
        files: the open files by which he has taken locks; with the last of them they go.
    """

    __slots__ = (
        "access",
        "claimed_for",
        "fd",
        "files",
        "held",
        "is_busy",
        "is_own",
        "owner",
        "table",
        "where",
    )

    def __init__(self, table: FileLocks, where: Where, owner: Hashable) -> None:
        self.table = table
        self.where = where
        self.owner = owner
        self.fd = self.access = -1
        self.claimed_for: int | None = None
        self.is_own = False
        self.held: list[Held] = []
        self.files: set[Locked] = set()
        self.is_busy = True  # an operation works on it

    def __repr__(self) -> str:
        return f"<holder {self.owner!r} of {self.where} fd {self.fd} {self.held}>"

    def has_at(self, start: int, end: int) -> Held | None:
        """What he has locked of these bytes, the first of it."""
        at = bisect_right(self.held, start, key=attrgetter("end"))
        found = self.held[at] if at < len(self.held) else None
        return found if found is not None and found.start < end else None

    def end(self, close: Callable[[int, int | None], None]) -> None:
        """Close his own descriptor, with which his locks go, and wake who waits. Blocks.

        Args:
            close: ``close(fd, claimed_for)``; see `Counts.close_open`.
        """
        try:
            # A child that is just being made may have the descriptor for a moment longer.
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, packed(ALL))
            close(self.fd, self.claimed_for)
        finally:
            self.table.gave_all(self)

    def lost(self, file: Locked, close: Callable[[int, int | None], None]) -> None:
        """An open file has been closed: if it was the last that he had, his locks go. Blocks."""
        if self.table.leaves(self, file):
            if self.is_own:
                self.end(close)
            else:
                self.table.gave_all(self)


class _File:
    """The locks of one file, of one kind.

    Attributes:
        is_due: whether any who wait may be due to try. Thousands may wait and try from time to
            time; only where something was given back are they gone through.
    """

    __slots__ = ("holders", "is_due", "parts", "waiting")

    def __init__(self) -> None:
        self.parts = 0  # that are locked, by all
        self.holders: dict[Hashable, Holder] = {}
        self.waiting: dict[Waiter, None] = {}  # in the order of their coming
        self.is_due = False

    def note(self, start: int, end: int) -> None:
        """Something was given back there: who wants any of it is to try."""
        for waiter in self.waiting:
            if waiter.wanted.meets(start, end):
                waiter.is_due = self.is_due = True

    def took(self, holder: Holder, new: Held) -> None:
        """Somebody has got a lock: whose way that is in need not try until it is given back."""
        for waiter in self.waiting:
            if waiter.is_kept_out_by(holder.owner, new):
                waiter.is_due = False

    def next(self) -> list[Callable[[], None]]:
        """Whom to wake: of those that are to try, who can all succeed, the first to come first.

        Whoever is in the way of another keeps him waiting only until he has tried.
        """
        if not self.is_due:
            return []
        self.is_due = False
        trying = [waiter for waiter in self.waiting if waiter.is_trying]
        woken = []
        for waiter in self.waiting:
            if not waiter.is_due:
                continue
            if (
                waiter.is_trying
                or len(trying) >= _MOST
                or any(waiter.is_kept_out_by(other.owner, other.wanted) for other in trying)
            ):
                self.is_due = True  # later
                if len(trying) >= _MOST:
                    break
                continue
            waiter.is_trying = True
            trying.append(waiter)
            woken.append(waiter.resume)
        return woken


class Waiter:
    """One who waits for a lock; `FileLocks.waiting`.

    ``with`` it, and inside, in turn: `tries`, a try, and ``await Later(waiter)`` if that failed.
    """

    __slots__ = ("_at", "_table", "is_due", "is_trying", "owner", "resume", "wanted")

    def __init__(self, table: FileLocks, at: Where, owner: Hashable, wanted: LockRange) -> None:
        self._table = table
        self._at = at
        self.owner = owner
        self.wanted = Held(wanted.start, wanted.end, wanted.type, wanted.pid)
        self.is_trying = True
        self.is_due = False  # something was given back since it began to try
        self.resume: Callable[[], None] = _nothing

    def __str__(self) -> str:
        return f"another's lock of {self._at[0].value}, inode {self._at[2]}"

    def __enter__(self) -> Waiter:
        self._table.comes(self._at, self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._table.goes(self._at, self)

    def tries(self) -> None:
        """It tries now: what is given back from now on may be what is in its way."""
        with self._table.mutex:
            self.is_trying = True
            self.is_due = False

    def has_come(self, resume: Callable[[], None]) -> bool:
        """Its try has failed, and it is not worth another as long as it is not resumed.

        Args:
            resume: called when it is to try again, at most once, by who gives something back, or
                by this. It must not block.
        """
        self._table.failed(self._at, self, resume)
        return False

    def is_kept_out_by(self, owner: Hashable, other: Held) -> bool:
        """Whether another's lock is in its way, or would be."""
        return (
            owner != self.owner
            and fcntl.F_WRLCK in (other.type, self.wanted.type)
            and other.meets(self.wanted.start, self.wanted.end)
        )


class FileLocks:
    """The locks of all files of a source, as far as they are taken here.

    Attributes:
        mutex: guards all of it, the holders and what files say of them.
        turns: operations of one owner on one file are made one after the other.
    """

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.turns = Ranges()
        self._files: dict[Where, _File] = {}

    def __len__(self) -> int:
        """How many files are locked, or waited for."""
        return len(self._files)

    @property
    def descriptors(self) -> int:
        """How many descriptors are owners' own."""
        with self.mutex:
            return sum(h.is_own for file in self._files.values() for h in file.holders.values())

    def turn(self, at: Where, owner: Hashable) -> Turn:
        """``async with locks.turn(at, owner):`` around an operation of one owner on one file.

        What it finds out about the owner then stays true, and what it has done is noted in the
        order in which it was done.
        """
        # An owner is a byte of the inode's; two that fall together wait for one another.
        byte = hash((at, owner)) & END - 1
        return _OwnerTurn(self.turns, at[2], byte, byte + 1)

    def has(self, at: Where, owner: Hashable) -> bool:
        """Whether somebody has locks of a file. A look, without the mutex or a turn."""
        file = self._files.get(at)
        return file is not None and owner in file.holders

    def has_many(self, at: Where) -> bool:
        """Whether so much of a file is locked that a call takes its time. A look, as `has`."""
        file = self._files.get(at)
        return file is not None and file.parts > _MANY

    def waiting(self, at: Where, owner: Hashable, wanted: LockRange) -> Waiter:
        """``with locks.waiting(…) as waiter:`` around the wait for a lock.

        Who waits is woken in the order of coming, once something is given back that may have been
        in his way; but of those that would keep each other out, one is.
        """
        return Waiter(self, at, owner, wanted)

    # Operations, in their owner's turn

    def enter(self, at: Where, owner: Hashable) -> Holder:
        """An owner of a file, or a new one, for an operation; `leave` ends that."""
        with self.mutex:
            file = self._files.get(at)
            holder = None if file is None else file.holders.get(owner)
            if holder is None:
                return Holder(self, at, owner)
            holder.is_busy = True
            return holder

    def leave(self, holder: Holder) -> bool:
        """An operation has ended.

        Returns:
            Whether his own descriptor is to be closed (`Holder.end`): nothing is locked by it
            any more, or all open files have gone by which that was done.
        """
        with self.mutex:
            holder.is_busy = False
            if not holder.held or not holder.files:
                self._remove(holder)
                return holder.is_own
            return False

    def set(self, holder: Holder, new: LockRange, file: Locked) -> None:
        """A lock was set or given back by an open file: note it, and wake who is to try."""
        part = Held(new.start, new.end, new.type, new.pid)
        with self.mutex:
            before = len(holder.held)
            given = set_part(holder.held, part)
            there = self._files.get(holder.where)
            if part.type != fcntl.F_UNLCK:
                if there is None:
                    there = self._files[holder.where] = _File()
                there.holders[holder.owner] = holder
                holder.files.add(file)
                if file.holders is None:
                    file.holders = set()
                file.holders.add(holder)
            if there is not None:
                there.parts += len(holder.held) - before
            woken: list[Callable[[], None]] = []
            if there is not None and there.waiting:
                if given is not None:
                    there.note(*given)
                if part.type != fcntl.F_UNLCK:
                    there.took(holder, part)
                woken = there.next()
        for resume in woken:
            resume()

    def pid_of(self, at: Where, owner: Hashable, lock: LockRange, wanted: LockRange) -> int:
        """For which process a lock is held, that the kernel names, if it was taken here; else 0.

        Args:
            at: of which file.
            owner: who asks: it is none of his own.
            lock: as the kernel describes it.
            wanted: in whose way it is.
        """
        start, end = max(lock.start, wanted.start), min(lock.end, wanted.end)
        with self.mutex:
            file = self._files.get(at)
            for holder in () if file is None else file.holders.values():
                held = holder.has_at(start, end)
                if held is not None and held.type == lock.type and holder.owner != owner:
                    return held.pid
        return 0

    # The end of a holder

    def leaves(self, holder: Holder, file: Locked) -> bool:
        """An open file has been closed; whether a holder ends with it, and nobody has ended him."""
        with self.mutex:
            holder.files.discard(file)
            if file.holders is not None:
                file.holders.discard(holder)
            if holder.files or holder.is_busy or not self._has(holder):
                return False
            self._remove(holder)
            return True

    def gave_all(self, holder: Holder) -> None:
        """A holder's locks have gone with his descriptor: wake who is to try."""
        with self.mutex:
            file = self._files.get(holder.where)
            if file is None or not holder.held:
                return
            file.note(holder.held[0].start, holder.held[-1].end)
            woken = file.next()
        for resume in woken:
            resume()

    # What waits

    def comes(self, at: Where, waiter: Waiter) -> None:
        """One begins to try and to wait."""
        with self.mutex:
            self._files.setdefault(at, _File()).waiting[waiter] = None

    def failed(self, at: Where, waiter: Waiter, resume: Callable[[], None]) -> None:
        """A try has failed: others may try, and itself, if something was given back meanwhile."""
        with self.mutex:
            waiter.is_trying = False
            waiter.resume = resume
            woken = self._files[at].next()
        for other in woken:
            other()

    def goes(self, at: Where, waiter: Waiter) -> None:
        """One waits no more, for whatever reason: others may try."""
        with self.mutex:
            file = self._files[at]
            del file.waiting[waiter]
            woken = file.next()
            self._shrink(at, file)
        for resume in woken:
            resume()

    # Helpers that expect the mutex to be held

    def _has(self, holder: Holder) -> bool:
        """Whether a holder has locks here: he has taken some, and has not been ended."""
        file = self._files.get(holder.where)
        return file is not None and file.holders.get(holder.owner) is holder

    def _remove(self, holder: Holder) -> None:
        for one in holder.files:
            if one.holders is not None:
                one.holders.discard(holder)
        if self._has(holder):
            file = self._files[holder.where]
            del file.holders[holder.owner]
            file.parts -= len(holder.held)
            self._shrink(holder.where, file)

    def _shrink(self, at: Where, file: _File) -> None:
        if not file.holders and not file.waiting:
            del self._files[at]


class _OwnerTurn(Turn):
    """One owner's operation on one file."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"an earlier operation of one owner of locks of inode {self.path}"


def _nothing() -> None:
    """Nobody waits yet."""
