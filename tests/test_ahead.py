"""Calls that are made ahead of their bodies: none that another body could meet, none twice."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_executor import passed
from leaders import (
    SIZE,
    StuckMkdir,
    count_of,
    leading,
    led_in_turn,
    nodeid_of,
    opened,
    reading,
    syncing,
    writing,
)
from leaders import driver as driver
from leaders import foreseen as foreseen
from mounting import SOAK, wait_until
from wire_kernel import Kernel
from wire_messages import pack, request

from ninefuse import ops
from ninefuse.driving.request import Request
from ninefuse.executor import LeadingModel
from ninefuse.fuse import opcodes as op
from ninefuse.fuse.opcodes import Opcode
from ninefuse.tree.kernel import FIRST_HANDLE

FILE, OTHER = b"file", b"other"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A session whose threads lead in turn, on a directory with two files."""
    files = {os.fsdecode(name): b"0" * SIZE for name in (FILE, OTHER)}
    with led_in_turn(tmp_path, files) as kernel:
        yield kernel


def appending(handle: int, data: bytes) -> bytes:
    return pack("write_in", handle, 0, len(data), 0, 0, os.O_APPEND, 0) + data


def write_until_ahead(kernel: Kernel, handle: int, foreseen: list[str]) -> None:
    """Write until a call is made ahead: it is where nobody happens to run Python just then."""
    for _ in range(SIZE):
        assert kernel.get(Opcode.WRITE, writing(handle, b"x")) == count_of(1)
        kernel.settle()
        if foreseen:
            return
    pytest.fail("no call was made ahead")


def test_writes_and_syncs_of_a_lone_client_are_made_ahead(
    kernel: Kernel, driver: LeadingModel, foreseen: list[str], tmp_path: Path
) -> None:
    """Where nobody runs Python; else that one makes them, after their bodies."""
    handle, count = opened(kernel, FILE), 0
    while len(set(foreseen)) < 2 or len(foreseen) < 20:
        assert count < SIZE, foreseen
        assert kernel.get(Opcode.WRITE, writing(handle, b"%d" % (count % 10), count)) == count_of(1)
        kernel.get(Opcode.FSYNC, syncing(handle))
        kernel.settle()
        count += 1
    assert (tmp_path / "file").read_bytes()[:count] == (b"0123456789" * SIZE)[:count]
    for name in ("write", "fsync"):
        counted = driver.answered[name]
        assert (counted.count, counted.crossings) == (count, 0)


def test_reads_of_a_lone_client_are_made_ahead(
    kernel: Kernel, driver: LeadingModel, foreseen: list[str], tmp_path: Path
) -> None:
    """What is read is what there is, to the end of the file and beyond it."""
    content = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(content)
    driver.is_near = lambda inode: True
    handle, count = opened(kernel, FILE, os.O_RDONLY), 0
    while len(foreseen) < 20:
        assert count < SIZE, "no call was made ahead"
        size, offset = count % 300 + 1, count * 7 % (SIZE + 200)
        assert kernel.get(Opcode.READ, reading(handle, size, offset)) == content[offset:][:size]
        kernel.settle()
        count += 1
    assert set(foreseen) == {"read"}
    counted = driver.answered["read"]
    assert (counted.count, counted.crossings) == (count, 0)


def test_reads_of_what_is_in_memory_leave_the_role_where_it_is(
    kernel: Kernel, driver: LeadingModel, foreseen: list[str], tmp_path: Path
) -> None:
    """Who leads makes them, where that waits for nobody; what ends sooner, he does not."""
    with (tmp_path / "file").open("rb", buffering=0) as file:
        try:
            os.preadv(file.fileno(), [bytearray(SIZE)], 0, os.RWF_NOWAIT)
        except OSError as e:
            pytest.skip(f"this file system cannot tell what is in memory: {e}")
    driver.is_near = lambda inode: True
    role = leading(kernel)._role
    handle, count = opened(kernel, FILE, os.O_RDONLY), 0
    passed_on = role.passed
    while len(foreseen) < 40:  # more than may be left to be run
        assert count < SIZE, "no call was made ahead"
        assert kernel.get(Opcode.READ, reading(handle, 10, count % SIZE // 2)) == b"0" * 10
        count += 1
    wait_until(lambda: not leading(kernel)._role.count_ahead, "all bodies have been run")
    assert role.passed == passed_on
    while role.passed == passed_on:
        assert count < 2 * SIZE, "none was made ahead"
        assert kernel.get(Opcode.READ, reading(handle, 10, SIZE - 5)) == b"0" * 5
        count += 1
    assert driver.answered["read"].count <= count


def test_no_read_of_what_may_be_far_away_is_made_ahead(
    kernel: Kernel, driver: LeadingModel, foreseen: list[str]
) -> None:
    """So many could get stuck there that other files' requests would find nobody to make them."""
    driver.is_near = lambda inode: False
    handle = opened(kernel, FILE, os.O_RDONLY)
    for _ in range(20):
        assert kernel.get(Opcode.READ, reading(handle, 10)) == b"0" * 10
    kernel.settle()
    assert not foreseen


@pytest.mark.parametrize(
    ("flags", "size", "offset", "code"),
    [
        (os.O_WRONLY, 10, 0, errno.EBADF),
        (os.O_RDONLY, 10, 1 << 63, errno.EINVAL),
        (os.O_RDONLY, 0, 0, 0),
        (os.O_RDONLY, 128 << 10, 0, 0),
    ],
)
def test_what_is_no_plain_read_is_not_made_ahead(
    kernel: Kernel,
    driver: LeadingModel,
    foreseen: list[str],
    flags: int,
    size: int,
    offset: int,
    code: int,
) -> None:
    driver.is_near = lambda inode: True
    handle = opened(kernel, FILE, flags)
    for _ in range(20):
        said = kernel.ask(Opcode.READ, reading(handle, size, offset))
        assert said == (code, b"" if code or not size else b"0" * SIZE)
        kernel.settle()
    assert not foreseen


def test_an_answer_does_not_wait_for_the_body_and_other_bodies_do(
    kernel: Kernel, driver: LeadingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody runs Python when the write comes: else it is but as any."""
    handle = opened(kernel, FILE)
    goes_on = threading.Event()
    begun: list[str] = []

    def foresee(request: Request, real: Callable[[Request], bool] = driver.foresee) -> bool:
        passed(goes_on)
        begun.append(request.name)
        return real(request)

    def drive(request: Request, real: Callable[[Request], None] = driver.drive) -> None:
        begun.append(request.name)
        real(request)

    monkeypatch.setattr(driver, "foresee", foresee)
    monkeypatch.setattr(driver, "drive", drive)
    try:
        assert kernel.get(Opcode.WRITE, writing(handle, b"x")) == count_of(1)
        unique = kernel.new_unique()
        kernel.send(request(Opcode.LOOKUP, b"absent\0", unique=unique, nodeid=1))
    finally:
        goes_on.set()
    assert kernel.answer(unique)[0] == 0  # there is none, which may be believed
    assert begun == ["write", "lookup"]


@pytest.mark.parametrize("by", ["the same handle", "another handle"])
def test_what_comes_later_is_as_if_the_body_had_been_run_first(kernel: Kernel, by: str) -> None:
    """Sent at once, before the write is answered: a read sees it, a truncation cuts it off."""
    nodeid = nodeid_of(kernel, FILE)
    handle = opened(kernel, FILE)
    second = handle if by == "the same handle" else opened(kernel, FILE)
    size = pack("setattr_in", op.FATTR_SIZE, 0, 0, 0, *[0] * 12)

    def ask_both(*asked: tuple[Opcode, bytes]) -> list[tuple[int, bytes]]:
        uniques = [kernel.new_unique() for _ in asked]
        for unique, (opcode, body) in zip(uniques, asked, strict=True):
            kernel.send(request(opcode, body, unique=unique, nodeid=nodeid, uid=os.geteuid()))
        return [kernel.answer(unique) for unique in uniques]

    for n in range(3000 if SOAK else 300):
        data = b"%07d" % n * 100
        write, read = ask_both(
            (Opcode.WRITE, writing(handle, data)), (Opcode.READ, reading(second, len(data)))
        )
        assert (write, read) == ((0, count_of(len(data))), (0, data)), n
        write, cut = ask_both(
            (Opcode.WRITE, writing(handle, b"tail", SIZE)), (Opcode.SETATTR, size)
        )
        assert (write, cut[0]) == ((0, count_of(4)), 0)
        assert kernel.get(Opcode.READ, reading(second, 10)) == b"", n
    kernel.settle()


def test_none_is_made_ahead_while_a_body_is_under_way(
    kernel: Kernel, foreseen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = opened(kernel, FILE)
    stuck = StuckMkdir(monkeypatch)
    unique = kernel.new_unique()
    body = pack("mkdir_in", 0o755, 0) + b"d\0"
    kernel.send(request(Opcode.MKDIR, body, unique=unique, nodeid=1, uid=os.geteuid()))
    try:
        stuck.wait_until_begun()
        for _ in range(20):
            kernel.get(Opcode.WRITE, writing(handle, b"x"))
            kernel.get(Opcode.FSYNC, syncing(handle))
    finally:
        stuck.goes_on.set()
    assert kernel.answer(unique)[0] == 0
    kernel.settle()
    assert not foreseen
    write_until_ahead(kernel, handle, foreseen)


def test_none_is_made_ahead_where_set_id_bits_may_go(
    kernel: Kernel, foreseen: list[str], tmp_path: Path
) -> None:
    """Not by handles from before either, when there are none any more; but on other files."""
    before, elsewhere = opened(kernel, FILE), opened(kernel, OTHER)
    nodeid = nodeid_of(kernel, FILE)
    for mode in (0o4755, 0o755):
        (tmp_path / "file").chmod(mode)
        kernel.get(Opcode.GETATTR, pack("getattr_in", 0, 0, 0), nodeid)
        kernel.settle()
        if mode == 0o4755:
            assert kernel.session.fids.set_id == {nodeid}
        for _ in range(20):
            kernel.get(Opcode.WRITE, writing(before, b"x"))
        kernel.settle()
        assert not foreseen
        write_until_ahead(kernel, elsewhere, foreseen)
        foreseen.clear()
    kernel.session.fids.set_id.clear()
    for _ in range(20):
        kernel.get(Opcode.WRITE, writing(before, b"x"))
    kernel.settle()
    assert not foreseen
    write_until_ahead(kernel, opened(kernel, FILE), foreseen)


@pytest.mark.parametrize(
    ("flags", "body", "error"),
    [
        (os.O_RDWR, pack("write_in", 0, 0, 2, 0, 0, 0, 0) + b"x", errno.EIO),
        (os.O_RDWR, pack("write_in", 0, 0, 1 << 31, 0, 0, 0, 0) + b"x", errno.EIO),
        (os.O_RDWR, pack("write_in", 0, 1 << 63, 1, 0, 0, 0, 0) + b"x", errno.EINVAL),
        (os.O_RDONLY, pack("write_in", 0, 0, 1, 0, 0, 0, 0) + b"x", errno.EBADF),
        (os.O_RDWR, pack("write_in", 0, 0, 1, op.WRITE_CACHE, 0, 0, 0) + b"x", 0),
        (os.O_RDWR, b"x" * 12, errno.EIO),
        # fcntl(2) has taken it back since.
        (os.O_RDWR | os.O_APPEND, pack("write_in", 0, 0, 1, 0, 0, 0, 0) + b"x", None),
    ],
)
def test_what_is_no_plain_write_is_not_made_ahead(
    kernel: Kernel, foreseen: list[str], tmp_path: Path, flags: int, body: bytes, error: int | None
) -> None:
    handle = opened(kernel, FILE, flags)
    code, _ = kernel.ask(Opcode.WRITE, handle.to_bytes(8, "little") + body[8:])
    kernel.settle()
    assert not foreseen
    assert code == (error or 0)
    if error is None:
        return
    assert (tmp_path / "file").read_bytes() == (b"0" if error else b"x") + b"0" * (SIZE - 1)


def test_nothing_is_written_by_a_handle_that_was_closed(kernel: Kernel, tmp_path: Path) -> None:
    handle = opened(kernel, FILE)
    kernel.get(Opcode.RELEASE, pack("release_in", handle, 0, 0, 0))
    kernel.settle()
    wait_until(lambda: not kernel.session.fids.open_descriptors, "its descriptor is closed")
    again = opened(kernel, OTHER)  # which may have the same descriptor
    for _ in range(20):
        assert kernel.ask(Opcode.WRITE, writing(handle, b"x")) == (errno.EBADF, b"")
        assert kernel.ask(Opcode.FSYNC, syncing(handle)) == (errno.EBADF, b"")
    assert kernel.get(Opcode.WRITE, writing(again, b"y")) == count_of(1)
    kernel.settle()
    assert (tmp_path / "file").read_bytes() == b"0" * SIZE
    assert (tmp_path / "other").read_bytes() == b"y" + b"0" * (SIZE - 1)


def test_more_handles_than_are_known_work_all_the_same(kernel: Kernel, tmp_path: Path) -> None:
    handles = [opened(kernel, (FILE, OTHER)[n % 2]) for n in range(600)]
    for n, handle in enumerate(handles):
        assert kernel.get(Opcode.WRITE, writing(handle, b"%d" % (n % 10), n)) == count_of(1)
    kernel.settle()
    assert (tmp_path / "file").read_bytes()[:600:2] == b"02468" * 60
    assert (tmp_path / "other").read_bytes()[1:600:2] == b"13579" * 60


def test_a_call_that_was_made_is_not_made_again(
    kernel: Kernel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whatever the body asks for: what was appended would be there twice."""
    handle = opened(kernel, FILE, os.O_WRONLY | os.O_APPEND)
    count = 0
    with monkeypatch.context() as patched:
        patched.setattr(Request, "is_plain", False)
        while "was answered before its time" not in caplog.text:
            assert count < SIZE
            assert kernel.get(Opcode.WRITE, appending(handle, b"once")) == count_of(4)
            kernel.settle()
            count += 1
    caplog.clear()
    kernel.get(Opcode.WRITE, appending(handle, b"again"))
    kernel.settle()
    assert (tmp_path / "file").read_bytes() == b"0" * SIZE + b"once" * count + b"again"


@pytest.mark.parametrize("how", ["appends", "overwrites"])
def test_none_is_made_ahead_on_bytes_that_an_unfinished_body_changes(
    kernel: Kernel,
    driver: LeadingModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    how: str,
) -> None:
    """The second's body would wait for the first's, and its call be made a second time."""
    write: Callable[[int, bytes], bytes] = appending if how == "appends" else writing
    flags = os.O_WRONLY | (os.O_APPEND if how == "appends" else 0)
    handle = opened(kernel, FILE, flags)
    goes_on, is_in_first = threading.Event(), threading.Event()

    def foresee(request: Request, real: Callable[[Request], bool] = driver.foresee) -> bool:
        found = real(request)
        if not is_in_first.is_set():
            is_in_first.set()
            passed(goes_on)  # as one that has lost the interpreter's lock
        return found

    monkeypatch.setattr(driver, "foresee", foresee)
    sent = 0
    try:
        while not is_in_first.is_set() and sent < SIZE:
            assert kernel.get(Opcode.WRITE, write(handle, b"one.")) == count_of(4)
            sent += 1
            if not is_in_first.wait(0.01):
                kernel.settle()
        passed(is_in_first)
        unique, other = kernel.new_unique(), kernel.new_unique()
        kernel.send(request(Opcode.WRITE, write(handle, b"two."), unique=unique))
        kernel.send(request(Opcode.LOOKUP, b"absent\0", unique=other, nodeid=1))
    finally:
        goes_on.set()
    assert kernel.answer(unique) == (0, count_of(4))
    assert kernel.answer(other)[0] == 0
    kernel.settle()
    assert "before its time" not in caplog.text
    found = (tmp_path / "file").read_bytes()
    if how == "appends":
        assert found == b"0" * SIZE + b"one." * sent + b"two."
    else:
        assert found == b"two." + b"0" * (SIZE - 4)


def test_a_call_that_is_stuck_is_reported(driver: LeadingModel, kernel: Kernel) -> None:
    """Where nothing else has come, its body is still to be run."""
    assert driver.slow_requests(0.0) == []
    since = time.monotonic_ns()
    driver.crew = SimpleNamespace(made_ahead=lambda: [("write", 7, since - 3 * 10**9)])
    (line,) = driver.slow_requests(2.0)
    assert line.startswith("write, 3.")
    assert line.endswith("inode 7")
    assert driver.slow_requests(60.0) == []
    driver.crew = kernel.front._leading


def test_a_handle_is_closed_while_the_body_of_its_write_ends(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The write was answered: who made it may close. Another file has got set-id bits meanwhile."""
    handle = opened(kernel, FILE)
    real = ops.write

    async def write(*args: Any) -> int:
        count = await real(*args)
        fids = kernel.session.fids
        fids.set_id.add(1)
        fids.put(fids.remove(FIRST_HANDLE + handle))
        return count

    with monkeypatch.context() as patched:
        patched.setattr(ops, "write", write)
        assert kernel.get(Opcode.WRITE, writing(handle, b"x")) == count_of(1)
        kernel.settle()
    assert not caplog.records
