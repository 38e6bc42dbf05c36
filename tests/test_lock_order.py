"""The order of locks (lock_order.py): that it is kept, and that whoever breaks it is told."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from helpers_executor import PATIENCE, begin, bounded, drive, until
from lock_order import (
    COUNTS,
    HAND_SHAKES,
    INNERMOST,
    LISTING,
    RANKS,
    RENAME,
    TABLE,
    modules,
    watching,
)
from mounting import REPO
from ops_helpers import ROOT, Client, client_of
from ops_helpers import source as source

from ninefuse import executor, locks, ops
from ninefuse.calls import blocking
from ninefuse.driving import workers
from ninefuse.executor import Executor, NoThreading
from ninefuse.fuse.entries import fitted, readdirplus
from ninefuse.linux import syscalls
from ninefuse.locks import RenameLock
from ninefuse.tree import counts, listing, qids, session


def test_operations_keep_the_order(source: Path) -> None:
    """And take every lock there is, so that the order is seen to be kept."""
    with watching() as watch, client_of(source, most_descriptors=4) as client:
        use_all(client)
    assert min(watch.taken) > 0
    assert not watch.describe(), "all were given back"


def use_all(client: Client) -> None:
    """Operations that nest whatever is ever nested."""
    client.do(ops.mkdir, ROOT, b"d", 0o755)
    directory = client.know("d")
    for number in range(8):
        client.do(ops.clunk, client.create(b"%d" % number, b"data", start=directory.number))
        client.know(b"%d" % number, start=directory.number)
    client.do(ops.renameat, directory.number, b"1", ROOT, b"2")
    client.do(ops.rename, client.walk("2"), ROOT, b"3")
    client.do(ops.unlinkat, ROOT, b"3")
    handle = client.open("d")
    entries = client.do(readdirplus, handle, 0)
    fitted(client.session, handle, entries, 1)
    # Two files of one number: the table gives the second one apart, in its own section.
    known = client.know("d", "4")
    fids, a = client.session.kernel, client.do(ops.getattr, known.number)
    for number in (998, 999):
        node = fids.new_node(a._replace(dev_minor=number), -1, (directory.node, b"stranger"))
        node.device.base = 7
        fids.intern(node)
        fids.drop(node)
    fids.forget([(node.number, 1)])
    fids.statistics()


# Whoever breaks it


class Broken:
    """The locks of a session, to be taken in an order that they are not taken in."""

    def __init__(self, source: Path) -> None:
        self.driver = NoThreading()
        self.session = session.Session(self.driver)
        self.table = self.session.fids.lock
        self.counts = self.session.fids._counts
        self.listing = listing.Listing(-1)._mutex
        root = syscalls.stat_name(-100, os.fsencode(source))
        self.numbers = qids.QidPaths(root, self.session.fids.devices)._mutex

    def table_inside_counts(self) -> None:
        with self.counts, self.table.reading:
            pass

    def table_twice(self) -> None:
        with self.table.reading, self.table.reading:
            pass

    def listing_inside_table(self) -> None:
        with self.table.writing, self.listing:
            pass

    def counts_inside_another_mutex(self) -> None:
        with self.numbers, self.counts:
            pass

    def counts_twice(self) -> None:
        with self.counts, self.counts:
            pass

    def two_innermost(self) -> None:
        with self.driver._registry, self.numbers:
            pass

    def system_call_inside_table(self) -> None:
        with self.table.reading:
            vars(counts)["os"].stat("/")

    def our_own_system_call_inside_counts(self) -> None:
        with self.counts:
            vars(session)["stat_name"](-100, b"/")

    def unknown_lock(self) -> None:
        exec("threading.Lock()", vars(workers))

    def condition(self) -> None:
        exec("threading.Condition()", vars(executor))

    def rename_lock_inside_counts(self) -> None:
        with self.counts:
            self.session.rename_lock.acquire("read", lambda: None)

    def rename_lock_twice(self) -> None:
        async def body() -> None:
            async with self.session.rename_lock.reading, self.session.rename_lock.reading:
                pass

        self.driver.run_here(body())

    def rename_lock_not_held(self) -> None:
        lock = self.session.rename_lock

        async def other() -> None:
            lock.release("read")
            assert lock.acquire("read", lambda: None)

        async def body() -> None:
            async with lock.reading:
                self.driver.run_here(other())

        self.driver.run_here(body())

    def call_inside_the_rename_lock(self) -> None:
        async def body() -> None:
            async with self.session.rename_lock.reading:
                await blocking(None, int)

        self.driver.run_here(body())

    def await_inside_the_table(self) -> None:
        async def body() -> None:
            with self.table.reading:
                await blocking(None, int)

        self.driver.run_here(body())

    def await_inside_a_listing(self) -> None:
        async def body() -> None:
            with self.listing:
                await blocking(None, int)

        self.driver.run_here(body())

    def call_that_keeps_a_mutex(self) -> None:
        async def body() -> None:
            await blocking(None, self.counts.acquire)
            self.counts.release()

        self.driver.run_here(body())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Broken.table_inside_counts, "fid table is taken inside counts"),
        (Broken.table_twice, "fid table is taken inside fid table"),
        (Broken.listing_inside_table, "listing is taken inside fid table"),
        (Broken.counts_inside_another_mutex, "counts is taken inside mutex of QidPaths"),
        (Broken.counts_twice, "counts is taken inside counts"),
        (Broken.two_innermost, "mutex of QidPaths is taken inside mutex of Executor"),
        (Broken.system_call_inside_table, "stat is called inside fid table"),
        (Broken.our_own_system_call_inside_counts, "stat_name is called inside counts"),
        (Broken.unknown_lock, "a lock of ninefuse.driving.workers.<module> has no place in it"),
        (Broken.condition, "a Condition has no place in it"),
        (Broken.call_inside_the_rename_lock, "direct asks for a call inside the rename lock"),
        (Broken.rename_lock_inside_counts, "rename lock is taken inside counts"),
        (Broken.rename_lock_twice, "rename lock is taken twice by direct"),
        (Broken.rename_lock_not_held, "rename lock is given back by direct"),
        (Broken.await_inside_the_table, "direct awaits or ends inside fid table"),
        (Broken.await_inside_a_listing, "direct awaits or ends inside listing"),
        (Broken.call_that_keeps_a_mutex, "a call of direct ends inside counts"),
    ],
)
def test_whoever_breaks_the_order_is_told(
    source: Path, fault: Callable[[Broken], None], said: str
) -> None:
    """At once where that harms nobody, and at the end by the tool, whoever caught it before."""

    def break_it() -> None:
        with watching():
            broken = Broken(source)
            with contextlib.suppress(AssertionError):
                fault(broken)

    with pytest.raises(AssertionError, match=re.escape(said)):
        bounded(break_it)


def test_nothing_is_watched_afterwards(source: Path) -> None:
    """Neither locks made then, nor the functions of ninefuse."""
    before = {module: dict(vars(module)) for module in modules()}
    with watching():
        assert vars(session)["os"] is not os
        assert type(NoThreading()._registry) is not type(threading.Lock())
    assert type(NoThreading()._registry) is type(threading.Lock())
    for module, names in before.items():
        assert {name: vars(module)[name] for name in names} == names


def test_owners_and_waiters_are_told() -> None:
    """Requests own and await the rename lock, threads all others."""
    lines: list[list[str]] = []

    with watching() as watch:
        lock, table, leave = RenameLock(), locks.TableLock(), threading.Event()
        registry = NoThreading()._registry

        async def renaming() -> None:
            await blocking(None, int)
            async with lock.writing:
                leave.wait(PATIENCE)

        async def walking() -> None:
            async with lock.reading:
                pass

        def hold() -> None:
            with table.writing, registry:
                leave.wait(PATIENCE)

        async def scenario(driver: Executor) -> None:
            holder = threading.Thread(target=hold, name="holder")
            visitor = threading.Thread(target=enter, name="visitor")
            holder.start()
            await until(lambda: watch.taken[INNERMOST] and len(watch.describe()) == 2)
            visitor.start()
            await until(lambda: table.statistics().waiting)
            async with trio.open_nursery() as nursery:
                await begin(nursery, driver, "rename", renaming())
                await until(lambda: lock.statistics().writing)
                await begin(nursery, driver, "walk", walking())
                lines.append(watch.describe())
                leave.set()
            holder.join(PATIENCE)
            visitor.join(PATIENCE)

        def enter() -> None:
            with table.reading:
                pass

        drive("second", 2, scenario)
        assert watch.describe() == []
    expected = [
        r"fid table: held by holder \(write\); waited for by visitor for 0\.\d s",
        r"mutex of Executor: held by holder; waited for by nobody",
        r"rename lock: held by rename \(request 1, write\);"
        r" waited for by walk \(request 2, read\) for 0\.\d s",
    ]
    (said,) = lines
    for pattern, line in zip(expected, said, strict=True):
        assert re.fullmatch(pattern, line)
    assert watch.longest["rename lock"] > 0
    assert watch.longest["fid table"] > 0


# Every lock has its place


def test_every_lock_in_the_source_has_a_place() -> None:
    """And every place a lock: `RANKS` names what makes one, no more and no less."""
    makers = set()
    for path in sorted((REPO / "ninefuse").rglob("*.py")):
        relative = path.relative_to(REPO)
        if relative.parts[1] == "bench":
            continue
        module = ".".join(relative.with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in (
                    "threading.Lock",
                    "threading.RLock",
                ):
                    makers.add((module, node.name))
    assert makers == RANKS.keys() | HAND_SHAKES


def test_the_order_is_the_one_that_is_written_down() -> None:
    """The lines of the table in docs/architecture.md, from the outermost inwards."""
    text = (REPO / "docs" / "architecture.md").read_text()
    section = text.partition("## Locks\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!lock \|)(?!---)([^|(]+?)(?: \([^|]*\))? \|", section, re.MULTILINE)
    assert rows == ["rename lock", "a listing's mutex", "fid table", "counts", "others"]
    assert tuple(range(5)) == (RENAME, LISTING, TABLE, COUNTS, INNERMOST)
    # What is made once for each session, request or log is named there.
    for _, kind in RANKS:
        assert kind in ("Listing", "FidTable", "RWLock") or f"`{kind}`" in section
