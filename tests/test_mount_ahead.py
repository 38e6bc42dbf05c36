"""Calls that are made ahead of their bodies while others are stuck: nobody else is slower for it.

The session is at a socket in place of the device. What is stuck is a read of a file system that
never answers (stuckfs.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_executor import passed
from leaders import SIZE, count_of, leading, led_in_turn, opened, reading, writing
from leaders import driver as driver
from leaders import foreseen as foreseen
from mounting import Watchdog, wait_until
from stuck import Memory, memory_that_never_comes
from wire_kernel import Kernel
from wire_messages import pack, request

from ninefuse.driving.patience import Patience, Ticket
from ninefuse.executor import LeadingModel
from ninefuse.fuse.opcodes import Opcode
from ninefuse.ops import locking
from ninefuse.tree.kernel import FIRST_HANDLE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts without a helper")

STUCK, FILE = b"stuck", b"file"
LARGE = 128 << 10  # bytes of a read that is not made ahead itself
WRITES = 40  # more calls than bodies may wait for each other


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    source = tmp_path / "source"
    source.mkdir()
    with led_in_turn(source, {"stuck": b"0" * SIZE, "file": b"0" * SIZE}) as kernel:
        yield kernel


@pytest.fixture
def memory(kernel: Kernel, guard: Watchdog, tmp_path: Path) -> Iterator[Memory]:
    """What never answers; it does with an error in the end, before the session does."""
    with memory_that_never_comes(guard, tmp_path / "memory", tmp_path / "log") as memory:
        yield memory


def stuck_reads(kernel: Kernel, memory: Memory, count: int) -> list[int]:
    """Have so many reads of a file get stuck; their numbers."""
    handle = opened(kernel, STUCK)
    found = kernel.session.fids.plain_file_of(FIRST_HANDLE + handle)
    assert found is not None
    there = os.open(memory.path / "0", os.O_RDONLY)
    os.dup2(there, found[1].fd, inheritable=False)
    os.close(there)
    uniques = [kernel.new_unique() for _ in range(count)]
    for number, unique in enumerate(uniques):
        body = reading(handle, LARGE, number * LARGE)
        kernel.send(request(Opcode.READ, body, unique=unique, uid=os.geteuid()))
    role = leading(kernel)._role
    wait_until(lambda: role.in_calls + role.handed - role.queued >= count, "reads are stuck")
    return uniques


def write_until_ahead(kernel: Kernel, handle: int, foreseen: list[str]) -> None:
    """Write many times, and until several calls were made ahead: where nobody ran Python then."""
    count = 0
    while count < WRITES or foreseen.count("write") < 2:
        assert count < SIZE, "no call was made ahead"
        assert kernel.get(Opcode.WRITE, writing(handle, b"x", count)) == count_of(1)
        count += 1
    wait_until(
        lambda: not leading(kernel)._role.count_ahead,
        "all bodies have been run, with nothing after them",
    )


@pytest.mark.parametrize("count", [1, 3])
def test_a_read_that_is_stuck_leaves_the_writes_of_another_file_ahead(
    kernel: Kernel, memory: Memory, foreseen: list[str], tmp_path: Path, count: int
) -> None:
    """With three, bodies wait for each other, and for no message that may never come."""
    handle = opened(kernel, FILE)
    uniques = stuck_reads(kernel, memory, count)
    write_until_ahead(kernel, handle, foreseen)
    assert (tmp_path / "source/file").read_bytes()[:WRITES] == b"x" * WRITES
    memory.release()
    for unique in uniques:
        assert kernel.answer(unique)[0] in (errno.ECONNABORTED, errno.EIO, errno.ENOTCONN)
    kernel.settle()
    assert leading(kernel)._role.busy == 0


def test_a_read_that_is_stuck_leaves_no_write_of_its_file_ahead(
    kernel: Kernel, memory: Memory, foreseen: list[str]
) -> None:
    """Their bodies have an order."""
    handle = opened(kernel, STUCK)
    uniques = stuck_reads(kernel, memory, 1)
    for number in range(1, WRITES):
        assert kernel.get(Opcode.WRITE, writing(handle, b"x", number * SIZE)) == count_of(1)
    assert not foreseen
    memory.release()
    assert kernel.answer(uniques[0])[0] != 0
    kernel.settle()


def test_who_waits_for_a_lock_leaves_writes_ahead(
    kernel: Kernel, foreseen: list[str], tmp_path: Path
) -> None:
    """Those of the locked file, too: a lock is advice."""
    handle = opened(kernel, FILE)
    with (tmp_path / "source/file").open("r+b") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        unique = kernel.new_unique()
        lock = pack("lk_in", handle, 1, 0, (1 << 63) - 1, fcntl.F_WRLCK, 1, 0, 0)
        kernel.send(request(Opcode.SETLKW, lock, unique=unique, uid=os.geteuid()))
        wait_until(lambda: kernel.driver.waiting == 1, "it waits")
        wait_until(lambda: leading(kernel)._role.busy == 0, "and stands still")
        write_until_ahead(kernel, handle, foreseen)
    assert kernel.answer(unique) == (0, b"")
    kernel.settle()
    assert leading(kernel)._role.busy == 0


def test_who_ends_others_bodies_is_in_his_own_call_all_the_same(
    kernel: Kernel,
    driver: LeadingModel,
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Who waits for a lock that is given back at once runs the bodies of writes that came then.

    Were he taken for one who has come back, all others could get stuck, and nobody would lead.
    """
    (tmp_path / "source/other").write_bytes(b"0")
    handle, other = opened(kernel, FILE), opened(kernel, b"other")
    crew = leading(kernel)
    uniques = stuck_reads(kernel, memory, 2)  # so that bodies are left
    driver.is_near = None  # so that he makes the tries himself
    in_calls: list[int] = []
    is_back = threading.Event()

    def take(*args: Any, real: Callable[..., Any] = locking._try) -> Any:
        in_calls.append(crew._role.in_calls)
        return real(*args)

    with (tmp_path / "source/file").open("r+b") as holder:

        def queue(self: Patience, ticket: Ticket, pause: float, real: Any = Patience.queue) -> bool:
            if len(in_calls) == 1:
                assert kernel.get(Opcode.WRITE, writing(other, b"x")) == count_of(1)
                fcntl.lockf(holder, fcntl.LOCK_UN)
                self.end(ticket)
                is_back.set()
            return bool(real(self, ticket, pause))

        fcntl.lockf(holder, fcntl.LOCK_EX)
        monkeypatch.setattr(locking, "_try", take)
        monkeypatch.setattr(Patience, "queue", queue)
        unique = kernel.new_unique()
        lock = pack("lk_in", handle, 1, 0, (1 << 63) - 1, fcntl.F_WRLCK, 1, 0, 0)
        kernel.send(request(Opcode.SETLKW, lock, unique=unique, uid=os.geteuid()))
        passed(is_back)  # one thread at a time takes answers
        assert kernel.answer(unique) == (0, b"")
    memory.release()
    for number in uniques:
        assert kernel.answer(number)[0] != 0
    kernel.settle()
    assert len(in_calls) == 2
    assert in_calls[0] == in_calls[1]
    assert crew._role.in_calls == 0
