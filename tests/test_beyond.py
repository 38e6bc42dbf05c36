"""What 9P has no message for (ninefuse/fuse/beyond.py), beside the same calls on plain files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from file_systems import mounted
from helpers_executor import answer, begin, drive, passed, until
from mounting import run
from ops_helpers import (
    ROOT,
    UNKNOWN_NODEID,
    Client,
    Stepper,
    client_of,
    fails,
    needs_root,
    outcome,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source
from test_credentials import FSETID, as_somebody, identity, look_at, on_a_thread

from ninefuse import ops
from ninefuse.calls import Body
from ninefuse.executor import Executor
from ninefuse.fuse import beyond, callbacks
from ninefuse.linux import syscalls
from ninefuse.linux.callers import Caller
from ninefuse.linux.capabilities import settle
from ninefuse.linux.credentials import acting_as
from ninefuse.linux.filesystems import FileSystem
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.session import Session

pytestmark = pytest.mark.usefixtures("leak_free")

SOMEBODY = Caller(12345, 23456)
LAST = (1 << 63) - 1
KEEP_SIZE, PUNCH_HOLE, NO_HIDE_STALE, COLLAPSE, ZERO, INSERT, UNSHARE = (1 << n for n in range(7))
BLOCK = 4096
DATA = bytes(range(1, 251)) * 80  # 20,000 bytes, none of which is 0


@pytest.fixture(params=["disk", "memory"])
def beside(request: pytest.FixtureRequest, leak_free: None, tmp_path: Path) -> Iterator[Client]:
    """A client of a directory, which has one named "plain" beside it: on a disk, or in memory."""
    base = tmp_path
    if request.param == "memory":
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("there is no /dev/shm")
        base = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        (base / "source").mkdir()
        (base / "plain").mkdir()
        with client_of(base / "source") as it:
            yield it
    finally:
        if base is not tmp_path:
            shutil.rmtree(base)


class Pair:
    """A file of the source that is open through the client, and one beside it that is just open."""

    def __init__(self, client: Client, data: bytes = DATA, name: str = "f", flags: int = os.O_RDWR):
        self.client = client
        self.paths = client.source / name, client.source.parent / "plain" / name
        for path in self.paths:
            path.write_bytes(data)
        self.fid = client.know(name)
        self.handle = client.do(callbacks.open, self.fid.number, flags).number
        self.fd = os.open(self.paths[1], flags)

    def sparse(self) -> None:
        """Data, a hole, data, and a hole at the end."""
        for path in self.paths:
            with path.open("r+b") as file:
                file.truncate(0)
                for at in (0, 64 * BLOCK):
                    file.seek(at)
                    file.write(b"x" * BLOCK)
                file.truncate(128 * BLOCK)

    def check(self) -> None:
        """Both have become the same."""
        one, other = (path.stat() for path in self.paths)
        assert (one.st_size, one.st_blocks, one.st_mode) == (
            other.st_size,
            other.st_blocks,
            other.st_mode,
        )
        if one.st_size < 1 << 20:
            assert self.paths[0].read_bytes() == self.paths[1].read_bytes()

    def close(self) -> None:
        os.close(self.fd)
        self.client.do(ops.clunk, self.handle)
        self.client.forget(self.fid)


@contextlib.contextmanager
def pair_of(client: Client, *args: Any, **kwargs: Any) -> Iterator[Pair]:
    it = Pair(client, *args, **kwargs)
    try:
        yield it
    finally:
        it.close()


# fallocate

MODES = [
    *(0, KEEP_SIZE, PUNCH_HOLE, PUNCH_HOLE | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE),
    *(COLLAPSE, INSERT, COLLAPSE | KEEP_SIZE, UNSHARE, NO_HIDE_STALE, 1 << 20, -1, 1 << 31),
]
PARTS = [
    *((0, BLOCK), (BLOCK, BLOCK), (1000, 5000), (8 * BLOCK, BLOCK), (0, 1 << 20), (5, 0)),
    *((-1, 5), (5, -1), (LAST, 1), (LAST - 5, 5), (1 << 62, 1 << 62), (0, LAST)),
]


@pytest.mark.parametrize("mode", MODES)
def test_a_part_is_reserved_freed_or_zeroed_as_the_source_does_it(
    beside: Client, mode: int
) -> None:
    """Any mode, any part: the same content, the same blocks, the same error."""
    known = mode if 0 <= mode < 1 << 31 else 1 << 30  # what is no int cannot be asked for
    for offset, length in PARTS:
        if (offset, length, mode & PUNCH_HOLE) == (0, LAST, 0):
            continue  # it would take what room there is
        with pair_of(beside) as pair:
            plain = outcome(
                lambda: syscalls.fallocate(pair.fd, known, offset, length)  # noqa: B023
            )
            asked = outcome(
                lambda: beside.do(callbacks.fallocate, pair.handle, mode, offset, length)  # noqa: B023
            )
            assert asked == plain, (mode, offset, length)
            pair.check()


@pytest.mark.parametrize("offset", [-1, 1 << 63, 1 << 64, -(1 << 70)])
def test_numbers_that_are_no_offsets(client: Client, offset: int) -> None:
    fid = client.create("f", DATA)
    for arguments in ((0, offset, 1), (0, 0, offset)):
        with fails(errno.EINVAL):
            client.do(callbacks.fallocate, fid, *arguments)
    for places in ((offset, fid, 0, 1), (0, fid, offset, 1), (0, fid, 0, offset)):
        with fails(errno.EINVAL):
            client.do(callbacks.copy_file_range, fid, *places)
    with fails(errno.ENXIO):
        client.do(callbacks.lseek, fid, offset, os.SEEK_DATA)
    assert (client.source / "f").read_bytes() == DATA
    client.do(ops.clunk, fid)


def test_what_is_not_open_for_it_is_refused(client: Client) -> None:
    (client.source / "f").write_bytes(DATA)
    reading, writing = client.open("f"), client.open("f", flags=os.O_WRONLY)
    appending = client.open("f", flags=os.O_WRONLY | os.O_APPEND)
    directory, unopened = client.open(), client.walk("f")
    unknown = FIRST_HANDLE + 1000
    for code, fid in (
        *((errno.EBADF, reading), (errno.EISDIR, directory)),
        *((errno.EINVAL, unopened), (errno.EBADF, unknown)),
    ):
        with fails(code):
            client.do(callbacks.fallocate, fid, 0, 0, 10)
        with fails(code):
            client.do(callbacks.copy_file_range, reading, 0, fid, 0, 10)
    for code, fid in (
        *((errno.EBADF, writing), (errno.EISDIR, directory)),
        *((errno.EINVAL, unopened), (errno.EBADF, unknown)),
    ):
        with fails(code):
            client.do(callbacks.copy_file_range, fid, 0, writing, 0, 10)
        if fid != writing:
            with fails(code):
                client.do(callbacks.lseek, fid, 0, os.SEEK_DATA)
    with fails(errno.EBADF):
        client.do(callbacks.copy_file_range, reading, 0, appending, 0, 10)
    assert (client.source / "f").read_bytes() == DATA
    for fid in (reading, writing, appending, directory, unopened):
        client.do(ops.clunk, fid)


def test_a_read_only_session_changes_nothing(leak_free: None, source: Path) -> None:
    """Also of what was open for writing before it was one."""
    (source / "f").write_bytes(DATA)
    with client_of(source) as client:
        writing = client.open("f", flags=os.O_RDWR)
        client.session.read_only = True
        for change in (
            callbacks.fallocate(client.session, writing, PUNCH_HOLE | KEEP_SIZE, 0, BLOCK),
            callbacks.copy_file_range(client.session, writing, 0, writing, 5 * BLOCK, BLOCK),
        ):
            with fails(errno.EROFS):
                client.run(change)
        assert client.do(callbacks.lseek, writing, 0, os.SEEK_HOLE) == len(DATA)
        client.do(ops.clunk, writing)
    assert (source / "f").read_bytes() == DATA


# Whose blocks, whose bits

CHANGERS: dict[str, Callable[[Session, int], Body[Any]]] = {
    "fallocate": lambda s, fid: callbacks.fallocate(s, fid, KEEP_SIZE, 0, 1 << 20),
    "punch": lambda s, fid: callbacks.fallocate(s, fid, PUNCH_HOLE | KEEP_SIZE, 0, BLOCK),
    "copy_file_range": lambda s, fid: callbacks.copy_file_range(s, fid, 0, fid, 5 * BLOCK, 10),
}
changers = pytest.mark.parametrize("changer", CHANGERS)


@needs_root
@changers
def test_set_id_bits_go_as_by_the_openers_own_call(source: Path, changer: str) -> None:
    """Of root, and of somebody; the kernel is told that the mode may be another."""

    def change() -> None:
        settle()
        for who in (None, Caller(0, 0), SOMEBODY):
            path = source / "program"
            path.write_bytes(DATA)
            path.chmod(0o6777)
            with client_of(source) as client:
                fid = client.know("program")
                handle = client.do(callbacks.open, fid.number, os.O_RDWR, who).number
                told: list[int] = []
                client.session.attributes_changed = told.append
                client.run(CHANGERS[changer](client.session, handle))
                assert stat.S_IMODE(path.stat().st_mode) == 0o777
                assert told == [fid.number]
                client.do(ops.clunk, handle)
                client.forget(fid)

    on_a_thread(change)


@needs_root
@changers
def test_a_mark_stays_for_whom_the_source_leaves_it(source: Path, changer: str) -> None:
    """A set-group-id bit without group execution: for members of the group."""

    def mark(path: Path, mode: int) -> None:
        with acting_as(None, bits=True):
            path.chmod(mode)

    def change(pid: int) -> None:
        settle()
        path = source / "marked"
        for group, left in ((8, 0o2666), (9, 0o666)):
            for late in (False, True):
                path.write_bytes(DATA)
                os.chown(path, 1, group)
                mark(path, 0o666 if late else 0o2666)
                with client_of(source) as client:
                    fid = client.know("marked")
                    who = SOMEBODY._replace(pid=pid)
                    handle = client.do(callbacks.open, fid.number, os.O_RDWR, who).number
                    mark(path, 0o2666)
                    client.session.fids.set_id.add(fid.number)
                    client.run(CHANGERS[changer](client.session, handle))
                    assert stat.S_IMODE(path.stat().st_mode) == left, (group, late)
                    client.do(ops.clunk, handle)
                    client.forget(fid)

    look_at(as_somebody, lambda pid: on_a_thread(lambda: change(pid)))


@needs_root
@changers
def test_blocks_are_taken_for_the_opener(
    source: Path, changer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With his ids, by which a file system tells for whom it keeps some, and without CAP_FSETID."""
    seen: list[tuple[str, ...]] = []

    def spied(call: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any) -> Any:
            seen.append(identity())
            return call(*args)

        return spy

    monkeypatch.setattr(syscalls, "fallocate", spied(syscalls.fallocate))
    monkeypatch.setattr(os, "copy_file_range", spied(os.copy_file_range))
    (source / "f").write_bytes(DATA)
    (source / "f").chmod(0o666)
    before = identity()
    with client_of(source) as client:
        fid = client.walk("f")
        client.do(ops.lopen, fid, os.O_RDWR, SOMEBODY)
        client.run(CHANGERS[changer](client.session, fid))
        client.do(ops.clunk, fid)
    ((uids, gids, _, _, effective),) = seen
    assert (int(uids.split()[-1]), int(gids.split()[-1])) == SOMEBODY[:2]
    assert not int(effective, 16) & FSETID
    assert identity() == before


@changers
def test_the_kernel_is_told_also_where_a_change_fails(
    client: Client, changer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of it may have been done."""

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(syscalls, "fallocate", fail)
    monkeypatch.setattr(os, "copy_file_range", fail)
    fid = client.create("f", DATA)
    told: list[int] = []
    client.session.attributes_changed = told.append
    with fails(errno.ENOSPC):
        client.run(CHANGERS[changer](client.session, fid))
    assert told == [client.node(fid).number]
    client.do(ops.clunk, fid)


def test_the_kernel_is_told_of_what_was_read(client: Client) -> None:
    """Its access time is another, unless reads leave it."""
    one, other = client.create("f", DATA), client.create("g")
    numbers = [client.node(fid).number for fid in (one, other)]
    told: list[int] = []
    client.session.attributes_changed = told.append
    assert client.do(callbacks.copy_file_range, one, 0, other, 0, 10) == 10
    assert sorted(told) == sorted(numbers)
    client.session.noatime = True
    told.clear()
    assert client.do(callbacks.copy_file_range, one, 0, other, 0, 10) == 10
    assert told == [numbers[1]]
    for fid in (one, other):
        client.do(ops.clunk, fid)


# lseek


def test_data_and_holes_are_where_the_source_has_them(beside: Client) -> None:
    with pair_of(beside) as pair:
        for is_sparse in (False, True):
            if is_sparse:
                pair.sparse()
            size = pair.paths[0].stat().st_size
            places = [0, 1, BLOCK, 64 * BLOCK - 1, 64 * BLOCK, 65 * BLOCK, LAST, 1 << 40]
            for offset in (*places, size - 1, size, size + 1):
                for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                    assert outcome(
                        lambda: beside.do(callbacks.lseek, pair.handle, offset, whence)  # noqa: B023
                    ) == outcome(lambda: os.lseek(pair.fd, offset, whence)), (offset, whence)  # noqa: B023
        assert beside.do(callbacks.lseek, pair.handle, BLOCK, os.SEEK_DATA) == 64 * BLOCK
        for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, 5, -1):
            with fails(errno.EINVAL):
                beside.do(callbacks.lseek, pair.handle, 0, whence)


def test_seeking_moves_nobody(client: Client) -> None:
    """Reads and writes are where they say they are."""
    fid = client.create("f", DATA)
    assert client.do(callbacks.lseek, fid, 0, os.SEEK_HOLE) == len(DATA)
    assert client.do(ops.read, fid, 10, 10) == DATA[10:20]
    assert client.do(ops.write, fid, 5, b"x") == 1
    assert client.do(callbacks.lseek, fid, 7, os.SEEK_DATA) == 7
    assert (client.source / "f").read_bytes() == DATA[:5] + b"x" + DATA[6:]
    client.do(ops.clunk, fid)


# copy_file_range

COPIES = [
    *((0, 0, 100), (0, 0, len(DATA)), (5, 7, 1000), (0, 3 * BLOCK, BLOCK), (0, 50 * BLOCK, 10)),
    *((len(DATA) - 5, 0, 100), (len(DATA), 0, 10), (1 << 40, 0, 10), (0, 0, 0)),
    *((0, LAST - 5, 5), (0, LAST, 1), (LAST, 0, 1), (0, 0, LAST)),
]


def copied(one: Pair, at: int, other: Pair, to: int, length: int) -> int:
    """How much is copied from one to another through the client."""
    handles = one.handle, other.handle
    copy = callbacks.copy_file_range(one.client.session, handles[0], at, handles[1], to, length)
    return one.client.run(copy)


@pytest.mark.parametrize("where", COPIES)
def test_a_part_is_copied_as_the_source_does_it(beside: Client, where: tuple[int, ...]) -> None:
    source_offset, target_offset, length = where
    with pair_of(beside) as one, pair_of(beside, b"old" * 500, "g") as other:
        plain = outcome(
            lambda: os.copy_file_range(one.fd, other.fd, length, source_offset, target_offset)
        )
        asked = outcome(lambda: copied(one, source_offset, other, target_offset, length))
        assert asked == plain
        one.check()
        other.check()


@pytest.mark.parametrize("where", [(0, BLOCK, BLOCK), (0, 10, BLOCK), (10, 0, 100), (0, 0, 10)])
def test_a_part_is_copied_within_a_file(beside: Client, where: tuple[int, ...]) -> None:
    """EINVAL where it would be copied onto itself."""
    source_offset, target_offset, length = where
    with pair_of(beside) as pair:
        plain = outcome(
            lambda: os.copy_file_range(pair.fd, pair.fd, length, source_offset, target_offset)
        )
        asked = outcome(lambda: copied(pair, source_offset, pair, target_offset, length))
        assert asked == plain
        pair.check()


@needs_root
def test_a_copy_to_another_file_system(leak_free: None, source: Path) -> None:
    """EXDEV, or what else the source says."""
    (source / "f").write_bytes(DATA)
    with mounted("tmpfs", "tmpfs", source / "disk"):
        (source / "disk" / "g").touch()
        with open(source / "f", "rb") as one, open(source / "disk" / "g", "r+b") as other:
            plain = outcome(lambda: os.copy_file_range(one.fileno(), other.fileno(), 100, 0, 0))
        with client_of(source) as client:
            fid, there = client.open("f"), client.open("disk", "g", flags=os.O_RDWR)
            asked = outcome(lambda: client.do(callbacks.copy_file_range, fid, 0, there, 0, 100))
            assert asked == plain
            for number in (fid, there):
                client.do(ops.clunk, number)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is copied at a time, which is little; and how much each asked for."""
    asked: list[int] = []
    copy = os.copy_file_range

    def spy(source: int, target: int, count: int, *where: int) -> int:
        asked.append(count)
        if len(asked) == 4:
            raise OSError(errno.EIO, "no disk")
        return copy(source, target, count, *where)

    monkeypatch.setattr(os, "copy_file_range", spy)
    monkeypatch.setattr(beyond, "_PIECE", 100)
    return asked


def test_a_copy_is_made_in_pieces(client: Client, pieces: list[int]) -> None:
    """One after the other, up to the end, or to an error, or for a while."""
    one, other = client.create("f", DATA[:230]), client.create("g")

    def copy(length: int) -> int:
        return client.do(callbacks.copy_file_range, one, 0, other, 10, length)

    assert copy(230) == 230
    assert pieces == [100, 100, 30]
    assert (client.source / "g").read_bytes() == bytes(10) + DATA[:230]
    with fails(errno.EIO):
        copy(1000)
    pieces[:] = [0, 0]
    assert copy(1000) == 100  # the error comes with the rest
    assert pieces == [0, 0, 100, 100]
    assert copy(1000) == 230
    assert pieces[4:] == [100, 100, 100, 100]
    for fid in (one, other):
        client.do(ops.clunk, fid)


def test_a_copy_that_takes_long_is_answered_with_a_part(
    client: Client, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beyond, "_A_WHILE", -1.0)
    one, other = client.create("f", DATA), client.create("g")
    assert client.do(callbacks.copy_file_range, one, 0, other, 0, 1000) == 100
    assert pieces == [100]
    for fid in (one, other):
        client.do(ops.clunk, fid)


# The order of what is asked of the same bytes

Made = Callable[[Session, int, int], Body[Any]]
FIRST: dict[str, tuple[Made, str]] = {
    "fallocate": (
        lambda s, f, g: callbacks.fallocate(s, f, ZERO | KEEP_SIZE, 0, 100),
        "_fallocate",
    ),
    "copy to it": (lambda s, f, g: callbacks.copy_file_range(s, g, 0, f, 0, 100), "_copy"),
    "write": (lambda s, f, g: ops.write(s, f, 0, b"new" * 30), "Pwrite"),
}
THEN: dict[str, Made] = {
    "read": lambda s, f, g: ops.read(s, f, 50, 1000),
    "write": lambda s, f, g: ops.write(s, f, 50, b"x"),
    "fallocate": lambda s, f, g: callbacks.fallocate(s, f, 0, 50, 10),
    "insert": lambda s, f, g: callbacks.fallocate(s, f, INSERT, 0, BLOCK),
    "lseek": lambda s, f, g: callbacks.lseek(s, f, 20, os.SEEK_DATA),
    "copy to it": lambda s, f, g: callbacks.copy_file_range(s, g, 0, f, 80, 100),
    "copy from it": lambda s, f, g: callbacks.copy_file_range(s, f, 80, g, 0, 100),
    "copy within it": lambda s, f, g: callbacks.copy_file_range(s, f, 80, f, 5000, 100),
}


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("first", FIRST)
def test_what_comes_later_waits_for_changes_of_the_same_bytes(
    client: Client, first: str, then: str
) -> None:
    f, g = client.create("f", DATA), client.create("g", DATA)
    make, call = FIRST[first]
    change = Stepper(make(client.session, f, g))
    change.before(call)
    later = Stepper(THEN[then](client.session, f, g))
    later.to_lock()
    assert not later.calls
    change.finish()
    with contextlib.suppress(*([OSError] if then == "insert" else [])):  # few sources have it
        later.finish()
    for fid in (f, g):
        client.do(ops.clunk, fid)


ELSEWHERE: dict[str, Made] = {
    "read": lambda s, f, g: ops.read(s, f, 100, 1000),
    "fallocate": lambda s, f, g: callbacks.fallocate(s, f, 0, 100, 10),
    "lseek": lambda s, f, g: callbacks.lseek(s, f, 100, os.SEEK_DATA),
    "copy to it": lambda s, f, g: callbacks.copy_file_range(s, g, 200, f, 100, 100),
    "copy from it": lambda s, f, g: callbacks.copy_file_range(s, f, 100, g, 100, 100),
    "read of the other": lambda s, f, g: ops.read(s, g, 0, 100),
    "write to the other": lambda s, f, g: ops.write(s, g, 0, b"x"),
}


@pytest.mark.parametrize("then", ELSEWHERE)
@pytest.mark.parametrize("first", FIRST)
def test_other_bytes_are_not_waited_for(client: Client, first: str, then: str) -> None:
    """Nor what is only read."""
    f, g = client.create("f", DATA), client.create("g", DATA)
    make, call = FIRST[first]
    change = Stepper(make(client.session, f, g))
    change.before(call)
    client.run(ELSEWHERE[then](client.session, f, g))
    change.finish()
    for fid in (f, g):
        client.do(ops.clunk, fid)


def test_what_moves_the_rest_of_a_file_is_a_change_of_the_rest(client: Client) -> None:
    fid = client.create("f", DATA)
    if isinstance(outcome(lambda: client.do(callbacks.fallocate, fid, INSERT, 0, BLOCK)), str):
        pytest.skip("the file system of tmp_path does not move parts of files")
    client.do(callbacks.fallocate, fid, COLLAPSE, 0, BLOCK)
    for mode in (INSERT, COLLAPSE):
        change = Stepper(callbacks.fallocate(client.session, fid, mode, 0, BLOCK))
        change.before("_fallocate")
        read = Stepper(ops.read(client.session, fid, 3 * BLOCK, 10))
        read.to_lock()
        change.finish()
        # The first moves it behind; with the second all is as before.
        at = (2 if mode == INSERT else 3) * BLOCK
        assert read.finish() == DATA[at : at + 10]
    client.do(ops.clunk, fid)


def test_two_copies_from_each_other_do_not_wait_in_a_circle(client: Client) -> None:
    """Each waits for a write first, and so begins before it has its turn."""
    f, g = client.create("f", DATA), client.create("g", DATA)
    writes = [Stepper(ops.write(client.session, fid, 0, b"new")) for fid in (f, g)]
    for write in writes:
        write.before("Pwrite")
    copies = [
        Stepper(callbacks.copy_file_range(client.session, one, 0, other, 0, 100))
        for one, other in ((f, g), (g, f))
    ]
    for copy in copies:
        copy.to_lock()
    for write in writes:
        write.finish()
    for copy in copies:
        assert copy.finish() == 100
    assert (client.source / "f").read_bytes() == b"new" + DATA[3:]
    for fid in (f, g):
        client.do(ops.clunk, fid)


async def _open(executor: Executor, source: Path, names: str) -> tuple[Session, list[int]]:
    session = Session(executor)
    await answer(executor, "attach", ops.attach(session, ROOT, str(source)))
    for fid, name in enumerate(names, 2):
        (source / name).write_bytes(DATA)
        await answer(executor, "walk", ops.walk(session, ROOT, fid, [name.encode()]))
        await answer(executor, "lopen", ops.lopen(session, fid, os.O_RDWR))
    return session, list(range(2, 2 + len(names)))


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("model", ["first", "second"])
def test_no_read_overtakes_a_hole_that_is_made(
    model: str, threads: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a copy, nor a write, with threads beside each other."""
    fallocate = syscalls.fallocate
    begun, go_on = threading.Event(), threading.Event()

    def late(fd: int, mode: int, offset: int, length: int) -> None:
        begun.set()
        passed(go_on)
        fallocate(fd, mode, offset, length)

    monkeypatch.setattr(syscalls, "fallocate", late)

    async def scenario(executor: Executor) -> None:
        session, (f, g) = await _open(executor, source, "fg")
        try:
            async with trio.open_nursery() as nursery:
                try:
                    hole = callbacks.fallocate(session, f, PUNCH_HOLE | KEEP_SIZE, 0, BLOCK)
                    await begin(nursery, executor, "fallocate", hole)
                    await until(begun.is_set)
                    reads = [
                        await begin(nursery, executor, "read", ops.read(session, f, at, 10))
                        for at in range(0, BLOCK - 10, 200)
                    ]
                    copying = callbacks.copy_file_range(session, f, 0, g, 0, BLOCK)
                    copy = await begin(nursery, executor, "copy_file_range", copying)
                    writing = ops.write(session, f, BLOCK - 4, b"last")
                    write = await begin(nursery, executor, "write", writing)
                    assert not any(one.over for one in (*reads, copy, write))
                finally:
                    go_on.set()
            assert {read.value for read in reads} == {bytes(10)}
            assert (copy.value, write.value) == (BLOCK, 4)
        finally:
            session.fids.clear()

    drive(model, threads, scenario)
    hole = bytes(BLOCK - 4)
    assert (source / "f").read_bytes() == hole + b"last" + DATA[BLOCK:]
    # What is only read may be from before the write, or from after it.
    copied = (source / "g").read_bytes()
    assert copied in (hole + end + DATA[BLOCK:] for end in (bytes(4), b"last"))


# File systems


def sizes(found: os.statvfs_result) -> tuple[int, ...]:
    return found.f_bsize, found.f_blocks, found.f_files


@needs_root
def test_statfs_is_of_the_file_asked_for(leak_free: None, source: Path) -> None:
    """What is mounted in the source answers for itself."""
    (source / "f").touch()
    with mounted("tmpfs", "tmpfs", source / "disk", "size=64k"), client_of(source) as client:
        (source / "disk" / "g").touch()
        there = sizes(os.statvfs(source / "disk"))
        here = sizes(os.statvfs(source))
        assert there != here
        disk = client.know("disk")
        g = client.know("g", start=disk.number)
        f = client.know("f")
        assert sizes(client.do(callbacks.statfs, ROOT)) == here
        for fid, expected in ((f, here), (disk, there), (g, there)):
            assert sizes(client.do(callbacks.statfs, fid.number)) == expected
        with fails(errno.ESTALE):
            client.do(callbacks.statfs, UNKNOWN_NODEID)
        for fid in (g, disk, f):
            client.forget(fid)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices whose file systems are made durable; of the first in `FULL` that fails."""
    devices: list[int] = []
    sync = syscalls.sync_file_system

    def spy(fd: int) -> None:
        devices.append(os.fstat(fd).st_dev)
        sync(fd)
        if devices[-1] in FULL:
            raise OSError(errno.ENOSPC, "not written back")

    monkeypatch.setattr(syscalls, "sync_file_system", spy)
    monkeypatch.setattr(sys.modules[__name__], "FULL", set())
    return devices


FULL: set[int] = set()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "root"])
def test_the_file_system_of_any_file_is_made_durable(
    client: Client, synced: list[int], kind: str
) -> None:
    """Without opening what does something when it is opened."""
    (client.source / "file").touch()
    (client.source / "directory").mkdir()
    (client.source / "symlink").symlink_to("/nowhere")
    os.mkfifo(client.source / "fifo")
    fid = client.know(*([] if kind == "root" else [kind]))
    if kind != "root":
        client.lose_descriptor(fid)
    client.do(callbacks.syncfs, fid.number)
    assert synced == [client.source.stat().st_dev]
    if kind != "root":
        client.forget(fid)
    with fails(errno.ESTALE):
        client.do(callbacks.syncfs, UNKNOWN_NODEID)


@needs_root
def test_what_is_mounted_in_the_source_is_made_durable_with_its_root(
    leak_free: None, source: Path, synced: list[int]
) -> None:
    """As far as anybody has been there; each once, and an error keeps it from none."""
    with contextlib.ExitStack() as stack:
        for name in ("one", "two", "other"):
            stack.enter_context(mounted("tmpfs", "tmpfs", source / name))
        (source / "two" / "below").mkdir()
        stack.enter_context(mounted("tmpfs", "tmpfs", source / "two" / "below"))
        own, one, two, below = (
            (source / name).stat().st_dev for name in (".", "one", "two", "two/below")
        )
        client = stack.enter_context(client_of(source))
        client.do(callbacks.syncfs, ROOT)
        assert synced == [own]
        del synced[:]
        fids = [client.know("one"), client.know("two")]
        fids.append(client.know("below", start=fids[1].number))
        client.do(callbacks.syncfs, fids[0].number)
        assert synced == [one]
        for fid in fids:  # and though nothing there is known any more
            client.forget(fid)
        for full in ((), (own,), (one,)):
            del synced[:]
            FULL.update(full)
            with fails(errno.ENOSPC) if full else contextlib.nullcontext():
                client.do(callbacks.syncfs, ROOT)
            assert sorted(synced) == sorted((own, one, two, below))
            FULL.clear()
        assert run("umount", source / "one").returncode == 0
        del synced[:]
        client.do(callbacks.syncfs, ROOT)
        assert sorted(synced) == sorted((own, two, below))


@needs_root
def test_a_server_that_may_ask_back_is_not_asked(
    leak_free: None, source: Path, synced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is opened where a file that is no file is mounted."""
    (source / "pipe").touch()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounted("tmpfs", "tmpfs", source / "served"))
        elsewhere = stack.enter_context(mounted("tmpfs", "tmpfs", source.parent / "elsewhere"))
        os.mkfifo(elsewhere / "fifo")
        assert run("mount", "--bind", elsewhere / "fifo", source / "pipe").returncode == 0
        stack.callback(run, "umount", source / "pipe")
        client = stack.enter_context(client_of(source))
        for name in ("served", "pipe"):
            client.forget(client.know(name))
        served = (source / "served").stat().st_dev
        client.do(callbacks.syncfs, ROOT)
        assert synced == [source.stat().st_dev, served]
        monkeypatch.setattr(FileSystem, "is_fuse", property(lambda found: found.kind == 0x01021994))
        client.do(callbacks.syncfs, ROOT)
        assert synced[2:] == [source.stat().st_dev]
