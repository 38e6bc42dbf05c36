"""The table of locks: what is remembered of each, and who is woken when one is given back."""

from __future__ import annotations

import fcntl
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from interleaved import Run, explore
from mounting import SOAK

from ninefuse.tree import filelocks
from ninefuse.tree.filelocks import FileLocks, Holder, Kind, Locked, Waiter
from ninefuse.tree.lockranges import ALL, Held, LockRange, set_part

READ, WRITE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
AT = (Kind.RECORDS, (8, 1), 5)  # a file
END = LockRange(NONE, 0, 0).end

# What is remembered


def test_parts_at_random_are_those_of_each_byte() -> None:
    """Set, given back, split and joined, and whether anything became free by it."""
    rng = random.Random(3)
    for _ in range(300):
        held: list[Held] = []
        expected: dict[int, tuple[int, int]] = {}  # by byte: what kind, of which process
        for _ in range(20):
            start = rng.randrange(20)
            new = Held(start, rng.randrange(start, 20) + 1, rng.choice([READ, WRITE, NONE]), 0)
            if new.type != NONE:
                new = new._replace(pid=rng.choice([1, 2]))
            given = []
            for byte in range(new.start, new.end):
                kind, _ = expected.pop(byte, (NONE, 0))
                weaker = kind == WRITE and new.type != WRITE
                if weaker or (kind == READ and new.type == NONE):
                    given.append(byte)
                if new.type != NONE:
                    expected[byte] = new.type, new.pid
            assert set_part(held, new) == ((given[0], given[-1] + 1) if given else None)
            shown = {b: (one.type, one.pid) for one in held for b in range(one.start, one.end)}
            assert shown == expected
            assert held == sorted(held)
            assert sum(one.end - one.start for one in held) == len(shown), "one byte twice"
            for one, other in zip(held, held[1:], strict=False):
                assert one.end < other.start or one[2:] != other[2:], "not joined"


def test_many_parts_are_many_only_where_they_do_not_touch() -> None:
    held: list[Held] = []
    for byte in range(0, 1000, 2):
        set_part(held, Held(byte, byte + 1, WRITE, 1))
    assert len(held) == 500
    for byte in range(1, 1000, 2):
        set_part(held, Held(byte, byte + 1, WRITE, 1))
    assert held == [Held(0, 1000, WRITE, 1)]
    assert set_part(held, Held(0, END, NONE, 0)) == (0, 1000)
    assert held == []


# Who waits


class Kernel:
    """What grants the locks: one step, whatever threads do."""

    def __init__(self) -> None:
        self.granted: list[tuple[object, Held]] = []

    def is_free(self, owner: object, wanted: Held) -> bool:
        others = [held for other, held in self.granted if other != owner]
        near = [held for held in others if held.meets(wanted.start, wanted.end)]
        return not any(WRITE in (held.type, wanted.type) for held in near)

    def take(self, owner: object, wanted: Held) -> bool:
        if self.is_free(owner, wanted):
            self.granted.append((owner, wanted))
            return True
        return False

    def drop(self, owner: object) -> None:
        self.granted = [(other, held) for other, held in self.granted if other != owner]


class Client:
    """One owner, who holds, waits, gives back; what it does is done in its turn."""

    def __init__(self, place: Place, owner: str, *wanted: int) -> None:
        self.place = place
        self.owner = owner
        self.wanted = LockRange(*wanted)
        self.file = cast("Locked", SimpleFile())
        self.state = "new"
        self.tries = 0
        self.waiter: Waiter = place.locks.waiting(AT, owner, self.wanted)

    @property
    def part(self) -> Held:
        return Held(self.wanted.start, self.wanted.end, self.wanted.type, 0)

    def begin(self) -> None:
        """Begin to wait, and try."""
        self.waiter.__enter__()
        self.run()

    def run(self) -> None:
        """Try until it has the lock, or is to wait."""
        while True:
            self.waiter.tries()
            if self.take():
                self.waiter.__exit__()
                return
            self.state = "waits"
            if not self.waiter.has_come(self.ring):
                return

    def take(self) -> bool:
        """One try."""
        holder = self.place.locks.enter(AT, self.owner)
        self.tries += 1
        granted = self.place.kernel.take(self.owner, self.part)
        if granted:
            self.place.locks.set(holder, self.wanted, self.file)
            self.state = "has it"
        self.place.locks.leave(holder)
        return granted

    def ring(self) -> None:
        """It is woken."""
        self.place.rung.append(self)

    def withdraw(self) -> None:
        """It waits no more, if it does; it may have been woken just now."""
        if self.state == "waits":
            self.state = "withdrawn"
            self.waiter.__exit__()

    def give(self) -> None:
        """Give all back."""
        holder = self.place.locks.enter(AT, self.owner)
        self.place.kernel.drop(self.owner)
        self.place.locks.set(holder, ALL, self.file)
        self.place.locks.leave(holder)
        self.state = "gave it"

    def end(self) -> None:
        """The file is closed."""
        (holder,) = self.file.holders or set()
        if self.place.locks.leaves(holder, self.file):
            self.place.kernel.drop(self.owner)
            self.place.locks.gave_all(holder)
        self.state = "gave it"


class SimpleFile:
    """An open file, as far as locks know it."""

    def __init__(self) -> None:
        self.fd = 3
        self.holders: set[Holder] | None = None


class Place:
    """A file of the source, and the table of its locks."""

    def __init__(self, mutex: Any = None) -> None:
        self.kernel = Kernel()
        self.locks = FileLocks()
        if mutex is not None:
            self.locks.mutex = mutex
        self.rung: list[Client] = []
        self.clients: list[Client] = []

    def client(self, owner: str, *wanted: int) -> Client:
        self.clients.append(Client(self, owner, *wanted))
        return self.clients[-1]

    def go_on(self) -> None:
        """Those who were woken try, one after the other."""
        while self.rung:
            client = self.rung.pop(0)
            if client.state == "waits":
                client.run()

    def check(self) -> None:
        """Nobody waits for what is free; who waits is known to wait, and nobody else."""
        for client in self.clients:
            free = self.kernel.is_free(client.owner, client.part)
            assert client.state != "waits" or not free, f"{client.owner} was not woken"
        waiting = {client.waiter for client in self.clients if client.state == "waits"}
        file = self.locks._files.get(AT)
        assert set(() if file is None else file.waiting) == waiting
        assert not any(waiter.is_trying for waiter in waiting)


def test_the_first_to_come_is_the_first_to_try() -> None:
    """One of those who keep each other out; each has tried twice in the end."""
    place = Place()
    holder = place.client("holder", WRITE, 0, 0)
    assert holder.take()
    waiting = [place.client(f"{n}", WRITE, 0, 0) for n in range(100)]
    for client in waiting:
        client.begin()
    last = holder
    for client in waiting:
        last.give()
        assert place.rung == [client]
        place.go_on()
        assert client.state == "has it"
        last = client
    assert [client.tries for client in waiting] == [2] * 100
    last.give()
    assert len(place.locks) == 0


def test_readers_are_let_in_together_and_others_are_left_alone() -> None:
    place = Place()
    holder, far = place.client("holder", WRITE, 0, 50), place.client("far", WRITE, 50, 50)
    assert holder.take()
    assert far.take()
    readers = [place.client(f"reader {n}", READ, n, 10) for n in range(10)]
    writer = place.client("writer", WRITE, 5, 10)
    others = [place.client(f"other {n}", WRITE, 60 + n, 1) for n in range(10)]
    behind = place.client("behind", READ, 40, 20)
    for client in [*readers, writer, *others, behind]:
        client.begin()
    holder.give()
    place.go_on()
    assert {client.state for client in readers} == {"has it"}
    assert writer.tries == 1, "readers are in its way, and came before"
    assert {client.tries for client in others} == {1}, "it was not theirs"
    assert (behind.tries, behind.state) == (2, "waits")
    for reader in readers:
        reader.give()
        place.go_on()
    assert writer.state == "has it"
    far.give()
    place.go_on()
    assert {client.state for client in [*others, behind]} == {"has it"}


def test_a_weaker_lock_is_no_reason_to_try_for_who_wants_more() -> None:
    place = Place()
    holder = place.client("holder", WRITE, 0, 0)
    assert holder.take()
    writer, reader = place.client("writer", WRITE, 5, 5), place.client("reader", READ, 5, 5)
    writer.begin()
    reader.begin()
    place.kernel.drop("holder")
    holder.wanted = LockRange(READ, 0, 0)
    assert holder.take()
    place.go_on()
    assert reader.state == "has it"
    assert (writer.state, writer.tries) == ("waits", 1)


def test_whoever_fails_lets_the_next_one_try() -> None:
    """Somebody else may be in the way, of whom nothing is known here: on the source."""
    place = Place()
    holder = place.client("holder", WRITE, 0, 0)
    assert holder.take()
    first, second = place.client("first", WRITE, 0, 20), place.client("second", WRITE, 10, 20)
    first.begin()
    second.begin()
    place.kernel.granted.append(("a neighbour", Held(0, 1, WRITE, 0)))
    holder.give()
    assert place.rung == [first]
    place.go_on()
    assert (first.state, second.state) == ("waits", "has it")


def test_more_than_may_try_at_once_all_have_it_in_the_end() -> None:
    place = Place()
    holder = place.client("holder", WRITE, 0, 0)
    assert holder.take()
    waiting = [place.client(f"{n}", WRITE, n, 1) for n in range(300)]
    for client in waiting:
        client.begin()
    holder.give()
    assert len(place.rung) <= filelocks._MOST
    place.go_on()
    assert {client.state for client in waiting} == {"has it"}
    assert {client.tries for client in waiting} == {2}


class Looked(dict[Waiter, None]):
    """Who waits; counts how often all of them are gone through."""

    count = 0

    def __iter__(self) -> Iterator[Waiter]:
        self.count += 1
        return super().__iter__()


def test_a_try_in_vain_is_no_reason_to_look_at_all_who_wait() -> None:
    """Thousands may wait, and each tries again and again: only what is given back is."""
    place = Place()
    holder = place.client("holder", WRITE, 0, 0)
    assert holder.take()
    waiting = [place.client(f"{n}", WRITE, 0, 0) for n in range(20)]
    looked = place.locks._files[AT].waiting = Looked()
    for client in waiting:
        client.begin()
    for client in waiting[1:]:
        client.run()
    waiting.pop().withdraw()
    assert looked.count == 0
    holder.give()
    assert place.rung == waiting[:1]
    for client in waiting:
        place.go_on()
        assert client.state == "has it"
        client.give()


def test_owners_at_random_wait_for_nothing_that_is_free() -> None:
    rng = random.Random(11)
    for _ in range(300):
        place = Place()
        for number in range(6):
            start = rng.randrange(6)
            length = rng.choice([0, 1, 2, 3])
            place.client(f"{number}", rng.choice([READ, WRITE]), start, length)
        for _ in range(40):
            client = rng.choice(place.clients)
            match client.state:
                case "new" | "gave it" | "withdrawn":
                    client.waiter = place.locks.waiting(AT, client.owner, client.wanted)
                    client.begin()
                case "waits":
                    client.withdraw() if rng.random() < 0.3 else client.run()
                case "has it":
                    client.end() if rng.random() < 0.3 else client.give()
            if rng.random() < 0.7:
                place.go_on()
                place.check()
        place.go_on()
        place.check()


# All ways in which threads can come between each other

WHOLE = (WRITE, 0, 0)
Acts = Callable[["Place", "Client", "Client", "Client"], tuple[Callable[[], object], ...]]
STORIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, Acts]] = {
    "a lock is given back as one begins to wait": (
        WHOLE, WHOLE, "first",
        lambda place, holder, first, second: (first.begin, holder.give),
    ),
    "a file is closed as one begins to wait": (
        WHOLE, WHOLE, "first",
        lambda place, holder, first, second: (first.begin, holder.end),
    ),
    "two begin": (
        WHOLE, WHOLE, "first, second",
        lambda place, holder, first, second: (first.begin, second.begin, holder.give),
    ),
    "one begins behind another": (
        WHOLE, (READ, 5, 1), "second",
        lambda place, holder, first, second: (second.begin, holder.give, place.go_on),
    ),
    "who is first is withdrawn": (
        WHOLE, WHOLE, "",
        lambda place, holder, first, second: (first.withdraw, holder.give, place.go_on),
    ),
    "who is first fails": (
        (WRITE, 0, 20), (WRITE, 10, 20), "",
        lambda place, holder, first, second: (holder.give, place.go_on, place.go_on),
    ),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("neighbour", [False, True], ids=["", "with a neighbour"])
def test_nobody_misses_what_is_given_back(story: str, neighbour: bool) -> None:
    """The holder gives his lock back while others begin to wait, try, or are withdrawn."""
    one, other, begins, acts = STORIES[story]

    def scenario(run: Run) -> None:
        place = Place(run.lock())
        holder = place.client("holder", *WHOLE)
        first, second = place.client("first", *one), place.client("second", *other)
        assert holder.take()
        for client in (first, second):
            if client.owner not in begins and "two" not in story:
                client.begin()
        if neighbour:
            place.kernel.granted.append(("a neighbour", Held(0, 1, WRITE, 0)))
        run.threads(*acts(place, holder, first, second))
        place.go_on()
        place.check()
        for client in (first, second):
            if client.state == "has it":
                client.give()
                place.go_on()
                place.check()

    ways = explore([filelocks], scenario, 2, one_in=1 if SOAK else 30)
    print(f"{story}: {ways} ways")
    assert ways > 50


def test_an_owner_ends_once_though_he_unlocks_as_the_file_is_closed() -> None:
    """Else his descriptor's number would be closed twice, which may be another's by then."""

    def scenario(run: Run) -> None:
        locks = Place(run.lock()).locks
        file, other = cast("Locked", SimpleFile()), cast("Locked", SimpleFile())
        holder = locks.enter(AT, "owner")
        holder.is_own = True
        locks.set(holder, LockRange(WRITE, 0, 0), file)
        assert not locks.leave(holder)
        ended: list[Holder] = []

        def close() -> None:
            ended.extend(one for one in list(file.holders or ()) if locks.leaves(one, file))

        def unlock() -> None:
            one = locks.enter(AT, "owner")
            locks.set(one, ALL, other)
            if locks.leave(one):
                ended.append(one)

        run.threads(close, unlock)
        assert ended == [holder]
        assert len(locks) == 0

    assert explore([filelocks], scenario, 2) > 50
