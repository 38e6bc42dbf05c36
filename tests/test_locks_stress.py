"""Fifty clients at once: no deadlock, nobody left waiting, nothing left over, the right tree.

Each client has names of its own, which it makes, moves between directories that all share,
exchanges, links, looks up, lists and removes: so it knows what it must find, whatever the others
do at the same time. Some of them move the directories themselves, below each other. Another few
names are everybody's; of those only the number is known, as nobody replaces one. Hardly any node
keeps its descriptor, so most uses reopen one, and its parents, by name.

The locks are watched (lock_order.py); threads are switched as often as the interpreter can.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import trio
from helpers_executor import PATIENCE, answer, begin, bounded, eager_switches, passed, until
from lock_order import RENAME, Watch, watching
from mounting import SOAK
from ops_helpers import ROOT, daemon_umask, no_leaks, nothing
from ops_helpers import Client as DirectClient
from servers import need_engine

from ninefuse import executor, ops
from ninefuse.calls import Body, blocking
from ninefuse.driving.uring import Uring
from ninefuse.executor import Executor, SecondModel
from ninefuse.fuse import callbacks
from ninefuse.fuse.entries import fitted, readdirplus
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from ninefuse.locks import RenameLock
from ninefuse.tree.nodes import Node
from ninefuse.tree.qids import is_on_own_device
from ninefuse.tree.session import Session

pytestmark = pytest.mark.soak

T = TypeVar("T")

ME = Caller(os.geteuid(), os.getegid())
CLIENTS = 50
MOVERS = 4  # of the clients; each has two directories
DIRECTORIES = 2 * MOVERS
RESIDENTS = 5  # of the clients; each has a file that all use
COMMON = [b"x0", b"x1", b"x2"]  # in each directory, everybody's
DESCRIPTORS = 6
SECONDS = float(os.environ.get("NINEFUSE_SECONDS", 20 if SOAK else 0.3))
ENOUGH = 450  # requests: a busy machine has more time for so many, PATIENCE at most
STUCK = PATIENCE  # seconds without progress
LONGEST = PATIENCE  # seconds of one request, lock or wait
# Who comes later is served later: while one waits, those before it get the rename lock, one for
# each client, and what runs in the background. (It is counted somewhat late.)
OVERTAKEN = 2 * CLIENTS

# The driver, and whether calls are made by workers alone (inline=off), or those that wait for
# nobody by the dispatcher, and by the engine.
SERVERS = ["none", "first", "second", "second-threads", "second-uring"]
CASES = [("none", 1), *itertools.product(SERVERS[1:], (1, 2, 16))]


def create(server: str, threads: int) -> Executor:
    """The driver, as serve.py puts it together."""
    model, _, engine = server.partition("-")
    driver = executor.create(model, threads)
    if engine:
        assert isinstance(driver, SecondModel)
        driver.is_near = is_on_own_device
        if engine == "uring":
            driver.uring = Uring()
    return driver


# The watchdog


def test_the_watchdog_says_who_has_and_who_awaits_what() -> None:
    """Of two who wait for each other: one has the rename lock, and waits for the other's call."""
    with watching() as watch:
        lock, gate, over = RenameLock(), threading.Event(), threading.Event()
        driver = executor.create("second", 1)

        async def holds() -> None:
            await blocking(None, int)
            async with lock.writing:
                gate.wait(PATIENCE)

        async def wants() -> None:
            async with lock.reading:
                gate.set()

        async def both() -> None:
            async with trio.open_nursery() as nursery:
                await begin(nursery, driver, "holds", holds())
                await until(lambda: lock.statistics().writing)
                await begin(nursery, driver, "wants", wants())

        def life() -> None:
            try:
                trio.run(both)
                driver.close()
            finally:
                over.set()

        def report() -> list[str]:
            return [*driver.slow_requests(0), *watch.describe()]

        with pytest.raises(pytest.fail.Exception) as failure:
            bounded(life, 0.3, report, lambda: len(driver.requests))
        text = str(failure.value)
        gate.set()
        for expected in (
            "no progress for 0.3 s",
            "; on worker-0; holds rename lock (write)",
            "; waits for rename lock (read)",
            "rename lock: held by holds (request 1, write); waited for by wants (request 2, read)",
            "--- worker-0",
        ):
            assert expected in text
        passed(over)  # else its bodies would go on beside the next test, and be watched there


# The clients


class World:
    """What the clients share, and what is measured of them."""

    def __init__(self, source: Path, driver: Executor, seed: int) -> None:
        self.driver = driver
        self.source = source
        self.seed = seed
        self.session = Session(driver, most_descriptors=DESCRIPTORS, attr_timeout=1.0)
        self.directories: list[int] = []  # nodeids
        self.residents: list[int] = []  # nodeids of files that stay
        self.places: list[tuple[int, bytes]] = []  # of the directories: which it is in (-1: root)
        self.common = 0  # how many of the common names there are
        self.ended = 0
        self.longest = 0.0
        self.longest_name = ""
        self.reopened = 0
        self.done: Counter[str] = Counter()
        self.begun = time.monotonic()
        reopen = self.session.descriptors.reopen

        def counting(node: Node, looking: bool = False) -> None:
            self.reopened += 1
            reopen(node, looking)

        self.session.descriptors.reopen = counting  # type: ignore[method-assign]

    def goes_on(self) -> bool:
        """Whether there is more to be done."""
        passed = time.monotonic() - self.begun
        return passed < SECONDS or (passed < PATIENCE and self.ended < ENOUGH)

    async def run(self, name: str, body: Body[T]) -> T:
        """A request."""
        since = time.monotonic()
        try:
            return await answer(self.driver, name, body)
        finally:
            self.ended += 1
            if (took := time.monotonic() - since) > self.longest:
                self.longest, self.longest_name = took, name

    async def begin(self) -> None:
        await self.run("attach", ops.attach(self.session, ROOT, str(self.source)))
        for number in range(DIRECTORIES):
            above, name = number - 1 if number % 3 else -1, b"d%d" % number
            parent = ROOT if above < 0 else self.directories[above]
            body = callbacks.mkdir(self.session, parent, name, 0o700, ME)
            fid, _ = await self.run("mkdir", body)
            self.directories.append(fid.number)
            self.places.append((above, name))

    def number_of(self, directory: int) -> int:
        return ROOT if directory < 0 else self.directories[directory]

    def path_of(self, directory: int) -> Path:
        """Where a directory must be in the source now."""
        names: list[str] = []
        while directory >= 0:
            directory, below = self.places[directory]
            names.append(os.fsdecode(below))
            assert len(names) <= DIRECTORIES, "directories below each other"
        return self.source.joinpath(*reversed(names))

    async def chill(self) -> None:
        """Have all descriptors reclaimed that nobody uses just now, again and again."""
        while self.goes_on():
            with self.session.fids.lock.reading:
                for fid in self.session.fids._fids.values():
                    fid.node.recent = False
            self.session.descriptors._again_at = 0
            await self.run("chill", self.notice())
            # While that goes on, the second model's dispatcher leaves all calls to workers.
            await trio.sleep(0.01)

    async def notice(self) -> None:
        await blocking(None, self.session.descriptors.note)

    async def end(self) -> None:
        """Forget the directories; nothing is left but the root, and nobody uses that."""
        self.session.kernel.forget([(number, 1) for number in self.directories])
        await self.run("nothing", nothing(self.session))  # the last closes come after it
        # A descriptor that was lent is exchanged, which is a deferred call, too.
        await until(lambda: self.driver.deferred.is_over and not self.driver.requests)
        await until(lambda: self.session.fids.descriptors == 1)
        assert set(self.session.fids._fids) == {ROOT}
        idle = SimpleNamespace(executor=self.driver, session=self.session)
        DirectClient.check_idle(cast(Any, idle))

    def check_tree(self, clients: list[Client]) -> None:
        """The source has what the clients say, and no more."""
        expected: dict[Path, bytes] = {}
        for client in clients:
            for (directory, own), token in client.own.items():
                expected[self.path_of(directory) / os.fsdecode(own)] = token
        found: dict[Path, bytes] = {}
        common = []
        directories = set()
        for top, below, names in os.walk(self.source):
            directories |= {Path(top, name) for name in below}
            for name in names:
                path = Path(top, name)
                if os.fsencode(name) in COMMON:
                    common.append(path.read_bytes())
                else:
                    found[path] = path.read_bytes()
        assert directories == {self.path_of(number) for number in range(DIRECTORIES)}
        assert found == expected
        assert len(common) == len(set(common)) == self.common


class Client:
    """One client: its names, and the lookups that it has to take back."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.session = world.session
        self.number = number
        self.rng = random.Random(world.seed * 1000 + number)
        self.names = [b"c%02d.%d" % (number, n) for n in range(4)]
        self.own: dict[tuple[int, bytes], bytes] = {}  # (directory, name) -> what is in the file
        self.lookups: Counter[int] = Counter()
        self.tokens = itertools.count(1)
        self.has_resident = CLIENTS - number <= RESIDENTS
        self.mine = -1  # nodeid of the file that stays
        self.resident = (-1, b"")  # and where it is
        self.moves = [number, number + MOVERS] if number < MOVERS else []  # its directories

    async def live(self) -> None:
        """Do one thing after the other until the time is over."""
        world = self.world
        kinds = [self.make, self.look, self.move, self.swap, self.remove, self.link, self.pass_by]
        kinds += [self.read_directory, self.stay, self.share, self.share, self.forget]
        kinds += [self.visit] * 5 + [self.move_resident] * (20 if self.has_resident else 0)
        kinds += [self.move_directory, self.swap_directories] * (3 if self.moves else 0)
        if self.has_resident:
            await self.settle()
        while world.goes_on():
            kind = self.rng.choice(kinds)
            try:
                await kind()
            except OSError as failure:
                raise AssertionError(f"client {self.number}: {kind.__name__}") from failure
            world.done[kind.__name__] += 1

    async def leave(self) -> None:
        while self.lookups:
            await self.forget()

    # What everybody does

    async def run(self, name: str, body: Body[T]) -> T:
        return await self.world.run(name, body)

    async def tolerating(self, codes: set[int], request: Awaitable[T]) -> T | None:
        """What a request answers, or None for an error that another client may be the cause of."""
        try:
            return await request
        except OSError as failure:
            if failure.errno not in codes:
                raise
            return None

    def any_directory(self) -> int:
        return self.rng.randrange(-1, DIRECTORIES)

    def free_place(self) -> tuple[int, bytes] | None:
        place = self.any_directory(), self.rng.choice(self.names)
        return None if place in self.own else place

    def own_place(self) -> tuple[int, bytes] | None:
        places = sorted(place for place in self.own if place != self.resident)
        return self.rng.choice(places) if places else None

    async def look_up(self, place: tuple[int, bytes]) -> tuple[int, Any]:
        """A nodeid, whose lookup is counted, and attributes."""
        body = callbacks.lookup(self.session, self.world.number_of(place[0]), place[1])
        fid, attributes = await self.run("lookup", body)
        self.lookups[fid.number] += 1
        return fid.number, attributes

    async def make_file(self, place: tuple[int, bytes], flags: int) -> bytes:
        """A new file, and what is in it."""
        token = b"%d of %d" % (next(self.tokens), self.number)
        parent = self.world.number_of(place[0])
        body = callbacks.create(self.session, parent, place[1], flags, 0o600, ME)
        handle, fid, _ = await self.run("create", body)
        self.lookups[fid.number] += 1
        body_of_write = ops.write(self.session, handle.number, 0, token)
        assert await self.run("write", body_of_write) == len(token)
        await self.run("release", ops.clunk(self.session, handle.number))
        return token

    async def rename(self, old: tuple[int, bytes], new: tuple[int, bytes], flags: int = 0) -> bool:
        await self.run(
            "rename",
            ops.renameat(
                self.session,
                self.world.number_of(old[0]),
                old[1],
                self.world.number_of(new[0]),
                new[1],
                flags,
            ),
        )
        return True

    # Names of one's own: nothing may fail

    async def make(self) -> None:
        if place := self.free_place():
            self.own[place] = await self.make_file(place, os.O_RDWR | os.O_EXCL)

    async def look(self) -> None:
        if not (place := self.own_place()):
            return
        token = self.own[place]
        nodeid, attributes = await self.look_up(place)
        assert attributes.size == len(token)
        handle = await self.run("open", callbacks.open(self.session, nodeid, os.O_RDONLY))
        assert await self.run("read", ops.read(self.session, handle.number, 0, 100)) == token
        again = await self.run("getattr", ops.getattr(self.session, nodeid))
        assert (again.ino, again.size) == (attributes.ino, len(token))
        await self.run("release", ops.clunk(self.session, handle.number))

    async def move(self) -> None:
        """To another name, or over a file; that is nothing if both are the same file."""
        if not (old := self.own_place()):
            return
        new = self.any_directory(), self.rng.choice(self.names)
        await self.rename(old, new)
        if self.own.get(new) != self.own[old]:
            self.own[new] = self.own.pop(old)

    async def swap(self) -> None:
        one, other = self.own_place(), self.own_place()
        if one and other:
            await self.rename(one, other, RENAME_EXCHANGE)
            self.own[one], self.own[other] = self.own[other], self.own[one]

    async def remove(self) -> None:
        if place := self.own_place():
            parent = self.world.number_of(place[0])
            await self.run("unlink", ops.unlinkat(self.session, parent, place[1]))
            del self.own[place]

    async def link(self) -> None:
        old, new = self.own_place(), self.free_place()
        if old and new:
            nodeid, _ = await self.look_up(old)
            parent = self.world.number_of(new[0])
            body = callbacks.link(self.session, nodeid, parent, new[1])
            fid, _ = await self.run("link", body)
            assert fid.number == nodeid
            self.lookups[nodeid] += 1
            self.own[new] = self.own[old]

    async def pass_by(self) -> None:
        """A directory comes, moves and goes."""
        name = b"m%02d" % self.number
        one, other = self.any_directory(), self.any_directory()
        parent = self.world.number_of(one)
        fid, _ = await self.run("mkdir", callbacks.mkdir(self.session, parent, name, 0o700, ME))
        self.lookups[fid.number] += 1
        await self.rename((one, name), (other, name))
        parent = self.world.number_of(other)
        await self.run("rmdir", ops.unlinkat(self.session, parent, name, 0x200))
        # The kernel may still use it.
        gone = await self.run("getattr", ops.getattr(self.session, fid.number))
        assert gone.nlink == 0

    async def read_directory(self) -> None:
        """A directory has, of one's own names, those that one knows of."""
        directory = self.any_directory()
        parent = self.world.number_of(directory)
        handle = await self.run("opendir", callbacks.opendir(self.session, parent))
        found, offset = [], 0
        while entries := await self.run("readdir", readdirplus(self.session, handle, offset)):
            fit = self.rng.randrange(1, len(entries) + 1)
            fitted(self.session, handle, entries, fit)
            for entry in entries[:fit]:
                found.append(entry.name)
                if entry.fid is not None:
                    self.lookups[entry.fid.number] += 1
            offset = entries[fit - 1].offset
        await self.run("release", ops.clunk(self.session, handle))
        mine = sorted(name for where, name in self.own if where == directory)
        assert sorted(name for name in found if name in (*self.names, self.resident[1])) == mine

    async def stay(self) -> None:
        """Directories are who they are, wherever they are moved."""
        number = self.world.number_of(self.any_directory())
        attributes = await self.run("getattr", ops.getattr(self.session, number))
        assert number in (ROOT, attributes.ino)

    async def forget(self) -> None:
        """Take back what was counted of one nodeid, if any."""
        if self.lookups:
            number = self.rng.choice(sorted(self.lookups))
            if number == self.mine and self.world.goes_on():
                return
            count = self.lookups.pop(number)
            await self.run("forget", callbacks.forget(self.session, [(number, count)]))

    # A file that stays for the whole time, is moved by one client, and used by all others

    async def settle(self) -> None:
        self.resident = self.any_directory(), b"r%02d" % self.number
        self.own[self.resident] = await self.make_file(self.resident, os.O_RDWR | os.O_EXCL)
        (nodeid,) = self.lookups
        self.world.residents.append(nodeid)
        self.mine = nodeid

    async def move_resident(self) -> None:
        new = self.any_directory(), b"r%02d.%d" % (self.number, self.rng.randrange(3))
        await self.rename(self.resident, new)
        self.own[new] = self.own.pop(self.resident)
        self.resident = new

    async def visit(self) -> None:
        """A file is who it is, though its descriptor is gone, and it is just being moved."""
        if not self.world.residents:
            return
        nodeid = self.rng.choice(self.world.residents)
        attributes = await self.run("getattr", ops.getattr(self.session, nodeid))
        assert attributes.ino == nodeid

    # Names of all

    async def share(self) -> None:
        """Make, look up, remove, move or exchange a name that others do the same with."""
        world = self.world
        place = self.any_directory(), self.rng.choice(COMMON)
        other = self.any_directory(), self.rng.choice(COMMON)
        there, gone = {errno.EEXIST, errno.ESTALE}, {errno.ENOENT}
        match self.rng.randrange(5):
            case 0:
                making = self.make_file(place, os.O_RDWR)
                if await self.tolerating(there, making) is not None:
                    world.common += 1
            case 1:
                await self.tolerating(gone, self.look_up(place))
            case 2:
                removing = self.unlink(place)
                if await self.tolerating(gone, removing):
                    world.common -= 1
            case 3:
                await self.tolerating(there | gone, self.rename(place, other, RENAME_NOREPLACE))
            case 4:
                await self.tolerating(gone, self.rename(place, other, RENAME_EXCHANGE))

    async def unlink(self, place: tuple[int, bytes]) -> bool:
        parent = self.world.number_of(place[0])
        await self.run("unlink", ops.unlinkat(self.session, parent, place[1]))
        return True

    # Directories that all use

    async def move_directory(self) -> None:
        """Below another one, if that is not below it."""
        world = self.world
        mine, above = self.rng.choice(self.moves), self.any_directory()
        old = world.places[mine]
        new = above, b"d%d.%d" % (mine, self.rng.randrange(3))
        taken = {world.places[number] for number in self.moves}
        if new not in taken and await self.tolerating({errno.EINVAL}, self.rename(old, new)):
            world.places[mine] = new

    async def swap_directories(self) -> None:
        world = self.world
        one, other = self.moves
        old, new = world.places[one], world.places[other]
        if await self.tolerating({errno.EINVAL}, self.rename(old, new, RENAME_EXCHANGE)):
            world.places[one], world.places[other] = new, old


@pytest.mark.parametrize("is_watched", [True, False] if SOAK else [True])
@pytest.mark.parametrize(("server", "threads"), CASES)
def test_fifty_clients(tmp_path: Path, server: str, threads: int, is_watched: bool) -> None:
    """All of them get through, and leave what they say."""
    need_engine(server)
    seed = int(os.environ.get("NINEFUSE_SEED", random.SystemRandom().getrandbits(32)))
    print(f"\nseed {seed}", end=": ")
    with ExitStack() as around:
        around.enter_context(no_leaks())
        around.enter_context(daemon_umask())
        around.enter_context(eager_switches())
        watch = around.enter_context(watching()) if is_watched else Watch()
        driver = create(server, threads)
        world = World(tmp_path, driver, seed)
        clients = [Client(world, number) for number in range(CLIENTS)]

        async def scenario() -> None:
            await world.begin()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.chill)
                for client in clients:
                    nursery.start_soon(client.live)
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(client.leave)
            await world.end()

        def life() -> None:
            try:
                trio.run(scenario)
            finally:
                world.session.fids.clear()
                driver.close()

        def report() -> list[str]:
            return [f"seed {seed}", *driver.slow_requests(0), *watch.describe()]

        bounded(life, STUCK, report, lambda: world.ended)
    world.check_tree(clients)

    session = world.session
    waits = {lock.name: lock.statistics() for lock in (session.rename_lock, session.fids.lock)}
    longest = max([*watch.longest.values(), *(s.longest_wait for s in waits.values())])
    overtaken = f"overtaken by {watch.overtaken}" if is_watched else "not watched"
    print(
        f"{server}, {threads} threads: {sum(world.done.values())} operations,"
        f" {world.ended} requests, {world.reopened} reopened;"
        f" longest request {world.longest:.3f} s ({world.longest_name});"
        f" longest wait for a lock {longest:.3f} s, {overtaken};"
        + ",".join(f" {s.waits} for {name}" for name, s in waits.items())
    )
    assert longest < LONGEST
    assert world.longest < LONGEST
    assert watch.overtaken < OVERTAKEN
    assert world.reopened > 10, "descriptors were not reclaimed: this tested little"
    # A single worker is behind most of the time, and is left to catch up; not so in a long run.
    if isinstance(driver, SecondModel) and driver.uring is not None and (SOAK or threads > 1):
        assert driver.uring.count > 0
    if is_watched:
        assert watch.taken[RENAME] > 100, "hardly anybody took it: this tested nothing"
