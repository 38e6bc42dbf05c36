"""The order of requests on the same bytes: none is answered from before an earlier change.

The kernel lets a cached page go while the write that carries its data is on its way. Whoever
reads the page then is answered by us, and if that answer is from before the write, the old page
stays in the cache for good. So a request that reads or changes bytes of a file waits for all
changes of these bytes that came before it. It waits for no others: not for what comes later, so
that nobody can wait in a circle, and not for reads, whose answers may as well be from before.

Requests come in the order in which the dispatcher starts their bodies. A body says what it is
going to change before its first call. One that has to wait is put aside by its driver and occupies
no thread; whoever ends the last change that it waits for resumes it.

Names have an order as well (`Names`): who takes a name away from a file, because it is that
file's, must not find another's there when he takes it.

Locks touched: the mutex of a `Ranges`, for list work only.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from operator import attrgetter

from ninefuse.calls import Behind

END = 1 << 63  # no file is so long

_start = attrgetter("start")
_number = attrgetter("number")
_place = attrgetter("path", "start")


class Turn:
    """Bytes that a body is about to read or to change, and the changes before it.

    Attributes:
        path: qid path of the file.
        start: the first byte.
        end: the one behind the last.
        number: later changes of the same file have greater ones.
    """

    __slots__ = ("_followers", "_left", "_ranges", "_resume", "end", "number", "path", "start")

    number: int
    _resume: Callable[[], None] | None

    def __init__(self, ranges: Ranges, path: int, start: int, end: int) -> None:
        self._ranges = ranges
        self.path = path
        self.start = start
        self.end = end
        self._left = 0  # changes to wait for
        self._followers: list[Turn] | None = None  # who waits for this one

    def __str__(self) -> str:
        end = "the end" if self.end >= END else str(self.end)
        return f"earlier changes of inode {self.path} from byte {self.start} to {end}"

    async def __aenter__(self) -> None:
        if self._ranges.begin(self):
            await Behind(self)

    async def __aexit__(self, *exc: object) -> None:
        self._ranges.end(self)

    def has_come(self, resume: Callable[[], None]) -> bool:
        """Whether there is nothing left to wait for.

        Args:
            resume: called once, by the thread that ends the last change before this one, if it
                has not come. It must not block.
        """
        with self._ranges.mutex:
            self._resume = resume
            return not self._left

    # The mutex is held:

    def covers(self, other: Turn) -> bool:
        """Whether all bytes of another are among these."""
        return self.start <= other.start and other.end <= self.end

    def follow(self, changes: list[Turn]) -> bool:
        """Wait for these; whether there are any."""
        self._left = len(changes)
        self._resume = None
        for change in changes:
            if change._followers is None:
                change._followers = []
            change._followers.append(self)
        return bool(changes)

    def let_go(self) -> list[Callable[[], None]]:
        """It has ended; whom to resume when the mutex is no longer held."""
        ready = []
        for turn in self._followers or ():
            turn._left -= 1
            if not turn._left and turn._resume is not None:
                ready.append(turn._resume)
        return ready


class _File:
    """The changes of one file that are under way, those that wait among them."""

    __slots__ = ("_count", "_longest", "_turns")

    def __init__(self, first: Turn) -> None:
        first.number = 0
        self._turns = [first]  # by their starts
        self._longest = first.end - first.start  # bytes, of all there were
        self._count = 0

    def before(self, turn: Turn) -> list[Turn]:
        """Whom a turn that comes now has to wait for."""
        first = bisect_left(self._turns, turn.start - self._longest, key=_start)
        last = bisect_left(self._turns, turn.end, first, key=_start)
        found = [other for other in self._turns[first:last] if other.end > turn.start]
        found.sort(key=_number, reverse=True)
        for count, other in enumerate(found, 1):
            if other.covers(turn):  # it waits for all that came before it itself
                return found[:count]
        return found

    def add(self, turn: Turn) -> None:
        """A change comes."""
        self._count += 1
        turn.number = self._count
        self._longest = max(self._longest, turn.end - turn.start)
        self._turns.insert(bisect_left(self._turns, turn.start, key=_start), turn)

    def remove(self, turn: Turn) -> bool:
        """A change has ended; whether it was the last."""
        self._turns.remove(turn)
        return not self._turns


class Ranges:
    """The changes under way, of all files: ``path in ranges`` says whether there are any of one.

    Attributes:
        mutex: guards all of it.
    """

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        # A file with one change under way, as most have, is that change. One that is not in here
        # gets in without the mutex (`setdefault`); all else is done with it.
        self._files: dict[int, Turn | _File] = {}

    def __contains__(self, path: int) -> bool:
        return path in self._files

    def __len__(self) -> int:
        """How many files are being changed."""
        return len(self._files)

    def changing(self, path: int, start: int, end: int) -> Turn:
        """``async with ranges.changing(path, start, end):`` around the change of these bytes.

        It waits for earlier changes of them, and is waited for by what comes later and asks for
        any of them.

        Args:
            path: qid path of the file.
            start: the first byte.
            end: the one behind the last; `END`: there is none.
        """
        return Turn(self, path, start, end)

    async def settled(self, path: int, start: int, end: int) -> None:
        """Wait for the changes of these bytes that came before now.

        Not needed where ``path in ranges`` is false.
        """
        turn = self.look(path, start, end)
        if turn is not None:
            await Behind(turn)

    def look(self, path: int, start: int, end: int) -> Turn | None:
        """What to be `Behind` of, later on, for the changes of these bytes that came before now.

        For who changes other bytes as well: he looks before he begins that change, so that nobody
        waits in a circle. What one waits for has then begun before one's own change.

        Args:
            path, start, end: as of `changing`.

        Returns:
            None, where there is nothing to wait for.
        """
        turn = Turn(self, path, start, end)
        with self.mutex:
            file = self._files.get(path)
            waits = file is not None and turn.follow(self._all_of(file).before(turn))
        return turn if waits else None

    def begin(self, turn: Turn) -> bool:
        """A change comes; whether it has to wait."""
        if self._files.setdefault(turn.path, turn) is turn:
            return False
        with self.mutex:
            file = self._files.setdefault(turn.path, turn)
            if file is turn:  # the other has just ended
                return False
            file = self._all_of(file)
            waits = turn.follow(file.before(turn))
            file.add(turn)
            return waits

    def end(self, turn: Turn) -> None:
        """A change has ended, well or not: resume those whose turn has come by that."""
        files, path = self._files, turn.path
        with self.mutex:
            file = files[path]
            if file is turn or (isinstance(file, _File) and file.remove(turn)):
                del files[path]
            if turn._followers is None:
                return
            ready = turn.let_go()
        for resume in ready:
            resume()

    def _all_of(self, file: Turn | _File) -> _File:
        if isinstance(file, Turn):
            first = file
            file = self._files[first.path] = _File(first)
        return file


class Names(Ranges):
    """The names that are being taken away: by unlinkat and remove, by renames of and to them.

    A name that is there can come to be another file's only after it was taken away. So whoever is
    alone in that can look whose it is, and take it. (From the source itself, where nobody asks,
    it may be taken at any time.)
    """

    def taking(self, directory: int, name: bytes) -> Turn:
        """``async with names.taking(directory, name):`` around taking a name away.

        Args:
            directory: its qid path.
            name: the name in it.
        """
        # A name is a byte of the directory's; two that fall together wait for one another.
        at = hash(name) & END - 1
        return _NameTurn(self, directory, at, at + 1)

    def taking_both(self, one: tuple[int, bytes], other: tuple[int, bytes]) -> Taking:
        """As `taking`, of two names, which may be the same."""
        # In one order, whoever asks: so nobody waits in a circle.
        turns = sorted((self.taking(*one), self.taking(*other)), key=_place)
        return Taking(turns[:1] if _place(turns[0]) == _place(turns[1]) else turns)


class _NameTurn(Turn):
    """A name that a body is about to take away."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"a name of inode {self.path} that is being taken away"


class Taking:
    """Two names that a body takes away; `Names.taking_both`."""

    __slots__ = ("_turns",)

    def __init__(self, turns: list[Turn]) -> None:
        self._turns = turns

    async def __aenter__(self) -> None:
        for turn in self._turns:
            await turn.__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        for turn in self._turns:
            await turn.__aexit__()
