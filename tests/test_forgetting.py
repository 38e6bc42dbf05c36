"""A table that grows and shrinks, and the kernel that is asked to forget."""

from __future__ import annotations

import errno
import gc
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from mounting import wait_until
from ops_helpers import Client, made_up
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.fuse import forgetting
from ninefuse.fuse.forgetting import Forgetter
from ninefuse.process import memory
from ninefuse.tree.kernel import KernelTable

THE_ROOT = made_up(2, kind=stat.S_IFDIR)


class Table(KernelTable):
    """A table of made-up files in one directory, the root."""

    def __init__(self) -> None:
        super().__init__(lambda function, *args: function(*args))
        self.set_root(THE_ROOT)
        self.root = self.new_node(THE_ROOT, -1, None)
        self.intern(self.root)
        self.told: list[int] = []
        self.on_change = lambda: self.told.append(len(self))

    def look_up(self, *numbers: int, kind: int = stat.S_IFREG) -> None:
        """Count a lookup of each; nobody has used them for long."""
        for number in numbers:
            node = self.new_node(made_up(number, kind=kind), -1, (self.root, b"%d" % number))
            node.recent = False
            self.intern(node)
            self.drop(node)

    def forget_all(self, *numbers: int) -> None:
        self.forget([(number, 1 << 30) for number in numbers])


# The table


def test_growing_is_told_at_each_step() -> None:
    """And again where it has shrunk meanwhile."""
    table = Table()
    table.step = 100
    table.look_up(*range(10, 460))
    assert table.told == [100, 200, 300, 400]
    table.look_up(*range(10, 460))
    assert len(table.told) == 4, "nothing new"
    table.forget_all(*range(200, 460))
    table.look_up(*range(200, 320))
    assert table.told == [100, 200, 300, 400, 291]


def test_it_is_told_with_no_lock_held() -> None:
    """What is done then may use the table."""
    table = Table()
    table.step = 10
    sizes: list[int] = []
    table.on_change = lambda: sizes.append(table.statistics().fids)
    table.look_up(*range(10, 30))
    assert sizes == [10, 20]


def test_a_table_gone_empty_takes_no_room() -> None:
    """A dictionary keeps the room of entries that have gone."""
    table = Table()
    count = 40_000
    table.look_up(*range(10, 10 + count))
    table.told.clear()
    full = table._fids.__sizeof__()
    for number in range(10, 10 + count):
        table.forget_all(number)
    assert len(table) == 1
    assert table._fids.__sizeof__() < full // 4
    assert table.told, "memory can be given back"
    assert len(table.told) <= 3


def test_files_are_offered_in_turn() -> None:
    """The kernel's oldest first, and each again only after all others."""
    table = Table()
    table.look_up(*range(10, 20))
    offered = [table.next_idle(4) for _ in range(5)]
    # The root is among those looked at.
    assert sum(offered, []) == [*range(10, 20), *range(10, 18)]
    assert len(table) == 11


@pytest.mark.usefixtures("leak_free")
def test_what_is_in_use_is_not_offered(client: Client) -> None:
    """And what was used since the last look is passed over once."""
    table = client.session.kernel
    for name in ("open", "cloned", "idle", "used"):
        (client.source / name).touch()
    opened = client.know("open")
    client.do(ops.lopen, client.walk(start=opened.number), os.O_RDONLY)
    client.walk(start=client.know("cloned").number)
    idle, used = client.know("idle"), client.know("used")
    assert table.next_idle(100) == []
    client.do(ops.getattr, used.number)
    assert table.next_idle(100) == [idle.number]
    assert table.next_idle(100) == [idle.number, used.number]


# Asking the kernel


class Kernel:
    """Forgets what it is asked to, of a table, but for every tenth file, which is in use."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.asked: list[int] = []
        self.answers = threading.Event()
        self.answers.set()

    def prune(self, nodeids: Sequence[int]) -> None:
        self.asked.extend(nodeids)
        self.answers.wait()
        self.table.forget_all(*(number for number in nodeids if number % 10))


def test_the_kernel_is_asked_down_to_seven_eighths_of_the_mark() -> None:
    """Once the mark is passed, and for the oldest."""
    table = Table()
    kernel = Kernel(table)
    forgetter = Forgetter(table, 800, kernel.prune)
    table.look_up(*range(10, 800))
    forgetter.note()
    assert forgetter._thread._thread is None, "there is nothing to ask for"
    table.look_up(*range(800, 1010))
    forgetter.note()
    wait_until(lambda: forgetter.asked == 301, "the kernel to be asked")
    assert kernel.asked == list(range(10, 311))
    assert len(table) == 1001 - 301 + 31, "some were in use"
    assert forgetter.end()


def test_an_end_waits_for_the_question_under_way_and_asks_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device must not be taken away while it is used."""
    table = Table()
    kernel = Kernel(table)
    kernel.answers.clear()
    forgetter = Forgetter(table, 8, kernel.prune)
    table.look_up(*range(11, 30))
    forgetter.note()
    wait_until(lambda: kernel.asked, "a question")
    monkeypatch.setattr(forgetting, "_PATIENCE", 0.01)
    assert not forgetter.end(), "the kernel does not answer"
    monkeypatch.setattr(forgetting, "_PATIENCE", 20.0)
    kernel.answers.set()
    assert forgetter.end()
    asked = list(kernel.asked)
    table.look_up(*range(30, 60))
    forgetter.note()
    assert kernel.asked == asked


def test_an_older_kernel_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    caplog.set_level("INFO")

    def refuse(nodeids: Sequence[int]) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    forgetter = Forgetter(table, 4, refuse)
    for more in (20, 30):
        table.look_up(*range(10, more))
        forgetter.note()
        wait_until(lambda: "takes no requests to forget" in caplog.text, "a line in the log")
        assert forgetter.end() or more == 20
    assert caplog.text.count("takes no requests") == 1


def test_a_question_that_cannot_be_put_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()

    def broken(nodeids: Sequence[int]) -> None:
        raise ValueError(nodeids)

    forgetter = Forgetter(table, 4, broken)
    table.look_up(*range(10, 20))
    forgetter.note()
    wait_until(lambda: "cannot be asked" in caplog.text, "a complaint")
    assert forgetter.end()


# Memory


def test_the_collector_leaves_alone_what_was_there(tmp_path: Path) -> None:
    """Else it would look at a million nodes each time, with all threads waiting."""
    try:
        kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
        memory.settle()
        assert gc.get_freeze_count() >= 1000
        assert not any(one is kept for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_without_a_thread_the_next_that_asks_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the end does not wait for one that was never there."""
    table, asked = Table(), list[int]()
    forgetter = Forgetter(table, 10, asked.extend)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        forgetter.ask_for([7])
        assert forgetter.end()
    forgetter = Forgetter(table, 10, asked.extend)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        forgetter.ask_for([8])
    forgetter.ask_for([9])
    wait_until(lambda: {8, 9} <= set(asked), "both")
    assert forgetter.end()
