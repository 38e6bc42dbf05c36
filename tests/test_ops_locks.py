"""Locks of files: lock and getlock of owners, flock, and what waits for them.

What a lock keeps others out of is asked of the source itself: a `Neighbour` works on it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers_executor import Outcome, answer, begin, drive, until
from lock_order import watching
from neighbour import Neighbour
from ops_helpers import ROOT, Client, Stepper, client_of, fails, no_leaks, nothing
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.driving import driver
from ninefuse.executor import Executor
from ninefuse.fuse import callbacks
from ninefuse.linux.callers import Caller
from ninefuse.ops import LockRange, LockStatus, locking
from ninefuse.settings import MODELS
from ninefuse.tree.filelocks import Holder, Kind, where
from ninefuse.tree.qids import is_on_own_device
from ninefuse.tree.session import Session

READ, WRITE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
SHARED, EXCLUSIVE, UNLOCK = fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN
ONE, OTHER, THIRD = 0xF00D_0000_0000_0001, 2, 3  # owners
SIZE = 100

every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture
def file(source: Path) -> Path:
    """A file of the source."""
    path = source / "file"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def neighbour(file: Path) -> Iterator[Neighbour]:
    with Neighbour(file) as it:
        yield it


def handle(client: Client, flags: int = os.O_RDWR) -> int:
    return client.open("file", flags=flags)


def lock(client: Client, fid: int, owner: int | None, *wanted: int) -> bool:
    """Set or clear a lock: kind, start, length, pid; whether that could be done."""
    status = client.do(ops.lock, fid, 0, LockRange(*wanted), owner)
    assert status in (LockStatus.SUCCESS, LockStatus.BLOCKED)
    return status is LockStatus.SUCCESS


def own_descriptors(client: Client) -> int:
    return client.session.file_locks.descriptors


# Who keeps whom out


@pytest.mark.parametrize("first", [READ, WRITE])
@pytest.mark.parametrize("second", [READ, WRITE])
@pytest.mark.parametrize("same_handle", [False, True])
def test_two_owners_keep_each_other_out(
    client: Client, file: Path, first: int, second: int, same_handle: bool
) -> None:
    """By one handle or two; where both only read they do not; and not beside each other."""
    mine = handle(client)
    other = mine if same_handle else handle(client)
    assert lock(client, mine, ONE, first, 10, 10)
    assert lock(client, other, OTHER, second, 19, 1) == (first == second == READ)
    assert lock(client, other, OTHER, second, 20, 1)
    assert lock(client, other, OTHER, second, 0, 10)


def test_one_owner_replaces_splits_and_joins(client: Client, neighbour: Neighbour) -> None:
    """By whichever handle: as fcntl(2) does it."""
    handles = [handle(client) for _ in range(2)]
    steps = [
        (WRITE, 0, 30),
        (NONE, 10, 10),
        (READ, 5, 20),
        (WRITE, 8, 2),
        (NONE, 0, 6),
        (WRITE, 20, 0),
        (NONE, 90, 0),
        (READ, 0, 50),
    ]
    expected = [NONE] * SIZE
    for number, (kind, start, length) in enumerate(steps):
        assert lock(client, handles[number % 2], ONE, kind, start, length)
        for byte in range(start, start + length if length else SIZE):
            expected[byte] = kind
        for byte in range(SIZE):
            assert neighbour.is_free(byte) == (expected[byte] == NONE), byte
            assert neighbour.is_free(byte, kind=READ) == (expected[byte] != WRITE), byte
        assert own_descriptors(client) == 1
    assert lock(client, handles[0], ONE, NONE, 0, 0)
    assert neighbour.is_free(0, 0)


def test_the_source_and_the_client_keep_each_other_out(
    client: Client, neighbour: Neighbour
) -> None:
    fid = handle(client)
    assert neighbour.record(WRITE, 10, 10)
    assert not lock(client, fid, ONE, READ, 0, 0)
    assert lock(client, fid, ONE, WRITE, 0, 10)
    assert not neighbour.record(WRITE, 0, 20)
    assert neighbour.record(NONE)
    assert lock(client, fid, ONE, WRITE, 0, 0)
    assert not neighbour.record(READ, 99, 1)
    assert lock(client, fid, ONE, NONE, 0, 0)
    assert neighbour.record(READ)
    assert lock(client, fid, OTHER, READ, 0, 0)
    assert not lock(client, fid, OTHER, WRITE, 0, 0)


def test_flock_keeps_out_other_handles_and_the_source(client: Client, neighbour: Neighbour) -> None:
    mine, other = handle(client), handle(client, os.O_RDONLY)
    assert client.do(locking.flock, mine, SHARED)
    assert client.do(locking.flock, other, SHARED)
    assert not client.do(locking.flock, mine, EXCLUSIVE)  # which has lost its own by that
    at = where(Kind.WHOLE, client.node(mine))
    assert not client.session.file_locks.has(at, client.fid(mine).opened)
    assert client.do(locking.flock, other, EXCLUSIVE)
    assert client.session.file_locks.has(at, client.fid(other).opened)
    assert not neighbour.whole(SHARED)
    assert client.do(locking.flock, other, UNLOCK)
    assert neighbour.whole(EXCLUSIVE)
    assert not client.do(locking.flock, mine, SHARED)
    assert client.do(locking.flock, mine, UNLOCK)


def test_the_two_kinds_know_nothing_of_each_other(client: Client, neighbour: Neighbour) -> None:
    fids = [handle(client) for _ in range(2)]
    assert client.do(locking.flock, fids[0], EXCLUSIVE)
    assert lock(client, fids[1], ONE, WRITE, 0, 0)
    assert not neighbour.is_free(0)
    assert lock(client, fids[1], ONE, NONE, 0, 0)
    assert neighbour.record(WRITE)
    assert not neighbour.whole(SHARED)


def test_a_fid_is_an_owner_of_its_own(client: Client, neighbour: Neighbour) -> None:
    """Where none is named; it keeps the named ones out, too."""
    fid = handle(client)
    assert lock(client, fid, None, WRITE, 0, 10, 7)
    assert not lock(client, fid, ONE, READ, 5, 1)
    assert client.do(ops.getlock, fid, LockRange(READ, 5, 1), ONE) == (WRITE, 0, 10, 7)
    assert lock(client, fid, ONE, WRITE, 10, 10, 8)
    assert client.do(ops.getlock, fid, LockRange(READ, 5, 9), ONE) == (WRITE, 0, 10, 7)
    assert client.do(ops.getlock, fid, LockRange(READ, 5, 9), None) == (WRITE, 10, 10, 8)
    assert not neighbour.is_free(19)


# What is in the way


def test_who_is_in_the_way(client: Client, neighbour: Neighbour) -> None:
    """The process of the source, or that of the request by which it was locked here."""
    fid = handle(client)
    assert neighbour.record(WRITE, 10, 10)
    assert lock(client, fid, ONE, READ, 30, 10, 1234)
    assert lock(client, fid, OTHER, READ, 35, 10, 5678)

    def getlk(wanted: LockRange) -> LockRange:
        return client.do(callbacks.getlk, fid, wanted, THIRD)

    assert getlk(LockRange(READ, 0, 15)) == (WRITE, 10, 10, neighbour.pid)
    assert getlk(LockRange(WRITE, 25, 8)) == (READ, 30, 10, 1234)
    assert getlk(LockRange(WRITE, 41, 1)) == (READ, 35, 10, 5678)
    assert getlk(LockRange(READ, 20, 0, 99)) == (NONE, 20, 0, 99)
    assert client.do(callbacks.getlk, fid, LockRange(WRITE, 30, 5, 7), ONE) == (NONE, 30, 5, 7)
    assert lock(client, fid, ONE, NONE, 0, 0)
    assert lock(client, fid, OTHER, NONE, 0, 0)
    assert neighbour.record(NONE)
    assert neighbour.record(WRITE, 50, 0, own=True)  # the kernel does not say whose
    assert getlk(LockRange(READ, 0, 0)) == (WRITE, 50, 0, 0)


def test_who_is_in_the_way_of_a_part(client: Client, file: Path) -> None:
    """Two processes that share an owner; the kernel joins what each has locked."""
    fid = handle(client)
    assert lock(client, fid, ONE, WRITE, 0, 10, 11)
    assert lock(client, fid, ONE, WRITE, 10, 10, 12)
    assert lock(client, fid, ONE, WRITE, 20, 0, 13)
    assert lock(client, fid, ONE, NONE, 25, 5)
    for byte, pid in ((0, 11), (9, 11), (10, 12), (20, 13), (24, 13), (30, 13)):
        found = client.do(ops.getlock, fid, LockRange(READ, byte, 1), OTHER)
        assert (found.type, found.pid) == (WRITE, pid), byte
        assert found.start <= byte
        assert found.length == 0 or found.start + found.length > byte
    assert client.do(ops.getlock, fid, LockRange(READ, 25, 5), OTHER).type == NONE


def test_ranges_of_63_bits(client: Client, neighbour: Neighbour) -> None:
    last = (1 << 63) - 1
    fid = handle(client)
    assert lock(client, fid, ONE, WRITE, last, 0, 5)
    assert not neighbour.is_free(last, 0)
    assert neighbour.is_free(last - 1)
    found = client.do(ops.getlock, fid, LockRange(READ, 0, 0), OTHER)
    assert found == (WRITE, last, 0, 5)
    with fails(errno.EOVERFLOW):
        lock(client, fid, ONE, WRITE, last, last)
    with fails(errno.EINVAL):
        lock(client, fid, ONE, WRITE, -1, 0)
    assert own_descriptors(client) == 1


def test_locks_that_make_no_sense(client: Client, file: Path) -> None:
    """EINVAL for types, flags and unopened fids; EBADF against the fid's mode; EISDIR."""
    reading, writing = handle(client, os.O_RDONLY), handle(client, os.O_WRONLY)
    with fails(errno.EBADF):
        lock(client, reading, ONE, WRITE, 0, 0)
    with fails(errno.EBADF):
        lock(client, writing, ONE, READ, 0, 0)
    with fails(errno.EINVAL):
        lock(client, reading, ONE, 77, 0, 0)
    with fails(errno.EINVAL):
        client.do(ops.lock, reading, 4, LockRange(READ, 0, 0), ONE)
    with fails(errno.EINVAL):
        lock(client, client.walk("file"), ONE, READ, 0, 0)
    with fails(errno.EISDIR):
        lock(client, client.open(), ONE, READ, 0, 0)
    for operation in (0, 16, EXCLUSIVE | fcntl.LOCK_NB):
        with fails(errno.EINVAL):
            client.do(locking.flock, reading, operation)
        with fails(errno.EINVAL):
            client.do(locking.flock_in_time, reading, operation)
    with fails(errno.EISDIR):
        client.do(callbacks.flock, client.open(), SHARED, False)
    assert lock(client, reading, ONE, NONE, 0, 0)  # of which there are none
    assert lock(client, writing, ONE, WRITE, 0, 0)
    assert own_descriptors(client) == 1


def test_callbacks_answer_eagain(client: Client, neighbour: Neighbour) -> None:
    fid = handle(client)
    assert neighbour.record(READ, 0, 1)
    assert neighbour.whole(SHARED)
    with fails(errno.EAGAIN):
        client.do(callbacks.setlk, fid, ONE, LockRange(WRITE, 0, 0), False)
    with fails(errno.EAGAIN):
        client.do(callbacks.flock, fid, EXCLUSIVE, False)
    client.do(callbacks.setlk, fid, ONE, LockRange(READ, 0, 0), True)
    client.do(callbacks.flock, fid, SHARED, True)
    client.do(callbacks.setlk, fid, ONE, LockRange(NONE, 0, 0), True)


# The end of locks


def test_flush_drops_the_locks_of_who_closes(client: Client, neighbour: Neighbour) -> None:
    """By any handle of the file, and nobody else's."""
    mine, other = handle(client), handle(client, os.O_RDONLY)
    assert lock(client, mine, ONE, WRITE, 0, 10)
    assert lock(client, mine, ONE, WRITE, 20, 10)
    assert lock(client, mine, OTHER, WRITE, 40, 10)
    assert client.do(locking.flock, other, SHARED)
    client.do(callbacks.flush, other, THIRD)
    client.do(callbacks.flush, other)
    assert not neighbour.is_free(0, 10)
    client.do(callbacks.flush, other, ONE)
    assert neighbour.is_free(0, 40)
    assert not neighbour.is_free(45)
    assert not neighbour.whole(EXCLUSIVE)
    assert own_descriptors(client) == 1


def test_flush_makes_no_call_where_there_are_no_locks(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fid = handle(client, os.O_RDONLY)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", None)
        client.do(callbacks.flush, fid, ONE)


def test_release_drops_what_goes_with_the_handle(client: Client, neighbour: Neighbour) -> None:
    """flock, and locks of an open file description, of whose end the kernel says nothing."""
    mine, other = handle(client), handle(client)
    assert client.do(locking.flock, mine, SHARED)
    assert client.do(locking.flock, other, SHARED)
    assert lock(client, mine, ONE, WRITE, 0, 10)
    assert lock(client, other, OTHER, WRITE, 20, 10)
    client.do(callbacks.release, mine)
    assert neighbour.is_free(0, 10)
    assert not neighbour.is_free(20, 10)
    assert not neighbour.whole(EXCLUSIVE)
    client.do(callbacks.release, other)
    assert neighbour.is_free(0, 0)
    assert neighbour.whole(EXCLUSIVE)
    assert own_descriptors(client) == 0


@pytest.mark.parametrize("in_use", [False, True], ids=["", "while somebody uses the fid"])
@pytest.mark.parametrize("ending", [callbacks.release, ops.remove])
def test_locks_are_given_back_before_the_file_is_closed(
    client: Client,
    neighbour: Neighbour,
    monkeypatch: pytest.MonkeyPatch,
    ending: Callable[[Session, int], Any],
    in_use: bool,
) -> None:
    """Which comes later, and may take its time."""
    fid = handle(client)
    assert client.do(locking.flock, fid, EXCLUSIVE)
    assert lock(client, fid, ONE, WRITE, 0, 0)
    assert lock(client, fid, None, READ, 0, 0) is False
    assert not neighbour.is_free(0, 0)
    deferred: list[Callable[[], object]] = []

    def defer(function: Callable[..., object], *args: object) -> None:
        deferred.append(partial(function, *args))

    use = client.session.fids.get(fid)
    if not in_use:
        client.session.fids.put(use)
    with monkeypatch.context() as patch:
        patch.setattr(client.session, "defer", defer)
        patch.setattr(client.session.fids, "_defer", defer)
        client.do(ending, fid)
        assert neighbour.is_free(0, 0)
        assert neighbour.whole(EXCLUSIVE)
        if in_use:
            client.session.fids.put(use)
    assert deferred
    for function in deferred:
        function()


@pytest.mark.parametrize("fails_", [False, True])
def test_remove_keeps_locks_until_the_name_has_gone(
    client: Client, file: Path, neighbour: Neighbour, fails_: bool
) -> None:
    """A file may be there for its lock: who gets that next looks whether the file still is."""
    fid = handle(client)
    assert lock(client, fid, ONE, WRITE, 0, 0)
    removing = Stepper(ops.remove(client.session, fid))
    removing.before("remove_if_same")
    assert not neighbour.is_free(0)
    if fails_:
        file.unlink()
        with fails(errno.ENOENT):
            removing.finish()
    else:
        removing.after("remove_if_same")
        assert not neighbour.is_free(0)
        removing.finish()
    assert neighbour.is_free(0, 0)


def test_an_owner_unlocks_by_another_handle_as_the_first_is_closed(
    client: Client, neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His descriptor is closed once: its number may be another's by then."""
    fids = [handle(client) for _ in range(2)]
    assert lock(client, fids[0], ONE, WRITE, 0, 0)
    lost = Holder.lost

    def meanwhile(holder: Holder, *args: Any) -> None:
        unlocking = ops.lock(client.session, fids[1], 0, LockRange(NONE, 0, 0), ONE)
        assert Stepper(unlocking).finish() is LockStatus.SUCCESS
        lost(holder, *args)

    monkeypatch.setattr(Holder, "lost", meanwhile)
    client.session.fids.put(client.session.fids.remove(fids[0]))
    client.rest()
    assert neighbour.is_free(0, 0)
    assert client.session.fids.open_descriptors == 1


def test_a_close_that_fails_keeps_nobody_elses_locks(
    source: Path, file: Path, neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server tells so of an earlier write. What was closed is closed all the same."""
    close = os.close

    def failing(fd: int) -> None:
        close(fd)
        if fd in failing_ones:
            failing_ones.remove(fd)
            raise OSError(errno.EIO, "an earlier write has failed")

    with client_of(source) as client:
        fid = handle(client)
        for owner in range(5):
            assert lock(client, fid, owner, WRITE, owner, 1)
        assert client.do(locking.flock, fid, EXCLUSIVE)
        (records, _) = client.session.file_locks._files.values()
        failing_ones = {records.holders[owner].fd for owner in (1, 3)} | {client.descriptor(fid)}
        assert not neighbour.is_free(4)
        monkeypatch.setattr(os, "close", failing)
        client.session.fids.put(client.session.fids.remove(fid))
        client.rest()
        assert not failing_ones
        assert neighbour.is_free(0, 0)
        assert neighbour.whole(EXCLUSIVE)
        assert own_descriptors(client) == client.session.fids.open_descriptors == 0


def test_an_owner_keeps_his_locks_as_long_as_he_has_a_handle(
    client: Client, neighbour: Neighbour
) -> None:
    """Of those by which he has locked."""
    fids = [handle(client) for _ in range(3)]
    assert lock(client, fids[0], ONE, WRITE, 0, 10)
    assert lock(client, fids[1], ONE, WRITE, 10, 10)
    client.do(ops.clunk, fids[0])
    assert not neighbour.is_free(0)
    client.do(ops.clunk, fids[1])
    assert neighbour.is_free(0, 0)


def test_a_handle_that_ends_while_its_owner_locks_by_another(
    client: Client, neighbour: Neighbour
) -> None:
    """His descriptor is in use just then."""
    fids = [handle(client) for _ in range(2)]
    assert lock(client, fids[0], ONE, WRITE, 0, 10)
    wanted = LockRange(WRITE, 20, 10)
    locking_ = Stepper(ops.lock(client.session, fids[1], 0, wanted, ONE))
    locking_.before("_try")
    client.session.fids.put(client.session.fids.remove(fids[0]))
    client.do(nothing)  # after which what was deferred is done
    assert locking_.finish() is LockStatus.SUCCESS
    assert not neighbour.is_free(20)
    client.do(callbacks.release, fids[1])
    assert neighbour.is_free(0, 0)


def test_the_end_of_the_session_ends_all(source: Path, file: Path, neighbour: Neighbour) -> None:
    with no_leaks(), client_of(source) as client:
        for owner in range(10):
            assert lock(client, handle(client), owner, READ, 0, 0)
            assert client.do(locking.flock, handle(client), SHARED)
        assert own_descriptors(client) == 10
    assert neighbour.is_free(0, 0)
    assert neighbour.whole(EXCLUSIVE)


def test_a_descriptor_lasts_as_long_as_there_is_a_lock(client: Client, file: Path) -> None:
    """Of one who is kept out there is none."""
    mine, other = handle(client), handle(client)
    before = client.session.fids.open_descriptors
    for _ in range(3):
        assert lock(client, mine, ONE, WRITE, 0, 10)
        assert not lock(client, other, OTHER, WRITE, 0, 10)
        assert client.session.fids.open_descriptors == before + 1
        assert lock(client, mine, ONE, NONE, 0, 5)
        assert client.session.fids.open_descriptors == before + 1
        assert lock(client, mine, ONE, NONE, 5, 5)
        client.rest()
        assert client.session.fids.open_descriptors == before


def test_without_a_descriptor_there_is_no_lock(client: Client, file: Path) -> None:
    """ENOLCK, as fcntl(2) has it; each user has a share; what there is goes on."""
    fid = handle(client)
    descriptors = client.session.descriptors
    descriptors.shared = descriptors._few + 20
    locked = 0
    with fails(errno.ENOLCK):
        for owner in range(60):
            assert lock(client, fid, owner, READ, owner, 1)
            locked += 1
    assert 10 < locked == own_descriptors(client) < 20
    assert lock(client, fid, 0, READ, 70, 1)
    assert lock(client, fid, 0, NONE, 0, 0)
    client.rest()
    assert lock(client, fid, 59, READ, 0, 1)


def test_a_lock_is_counted_for_who_opened_the_file(client: Client, file: Path) -> None:
    """Another than root and our own user has half of them."""
    fids, stranger = client.session.fids, os.geteuid() + 4321
    fid = handle(client)
    client.fid(fid).opened.owner = stranger  # type: ignore[union-attr]
    assert lock(client, fid, ONE, WRITE, 0, 0)
    assert fids._claimed == {stranger: 1}
    assert lock(client, fid, ONE, NONE, 0, 0)
    client.rest()
    assert fids._claimed == {}
    client.fid(fid).opened.owner = None  # type: ignore[union-attr]


# By which descriptor


def opened_for(client: Client) -> list[int]:
    """What the owners' own descriptors are open for."""
    files = client.session.file_locks._files.values()
    holders = [holder for file in files for holder in file.holders.values() if holder.is_own]
    return [fcntl.fcntl(holder.fd, fcntl.F_GETFL) & os.O_ACCMODE for holder in holders]


def test_a_lock_to_read_does_not_open_for_writing(client: Client, source: Path) -> None:
    """What is locked by a handle that cannot write can be executed meanwhile (ETXTBSY)."""
    program = source / "file"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    reading = handle(client, os.O_RDONLY)
    assert lock(client, reading, ONE, READ, 0, 0)
    assert opened_for(client) == [os.O_RDONLY]
    assert subprocess.run([program], check=False).returncode == 0


def test_who_reads_by_one_handle_and_writes_by_another(
    client: Client, neighbour: Neighbour
) -> None:
    """What he has locked stays locked while he gets another descriptor, wanted by whomever."""
    reading, writing = handle(client, os.O_RDONLY), handle(client, os.O_WRONLY)
    assert lock(client, reading, ONE, READ, 0, 10)
    assert lock(client, reading, ONE, READ, 50, 0)
    assert neighbour.record(READ, 55, 5)
    assert not lock(client, writing, ONE, WRITE, 50, 0)
    for byte, free in ((0, False), (9, False), (10, True), (49, True), (52, False), (99, False)):
        assert neighbour.is_free(byte) == free, byte
    assert lock(client, writing, ONE, WRITE, 5, 40)
    assert not neighbour.is_free(30, kind=READ)
    assert neighbour.is_free(0, 5, kind=READ)
    assert not neighbour.is_free(0)
    assert opened_for(client) == [os.O_RDWR]
    client.rest()
    assert own_descriptors(client) == 1
    client.do(callbacks.flush, reading, ONE)
    assert neighbour.is_free(0, 0)


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_where_the_daemon_may_not_open_for_both(
    client: Client, neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """The mode may have been changed since the handle was opened: what is needed is enough."""
    fid = handle(client)
    really, refused = os.open, {os.O_RDWR}

    def refuse(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if path.startswith("/proc/") and flags & os.O_ACCMODE in refused:
            raise PermissionError(errno.EACCES, "not for you")
        return really(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert lock(client, fid, ONE, kind, 0, 10)
    assert opened_for(client) == [os.O_RDONLY if kind == READ else os.O_WRONLY]
    assert not neighbour.is_free(0)
    refused |= {os.O_RDONLY, os.O_WRONLY}
    with fails(errno.EACCES):
        lock(client, fid, OTHER, READ, 50, 10)
    if kind == READ:
        with fails(errno.EACCES):
            lock(client, fid, ONE, WRITE, 50, 10)
    assert own_descriptors(client) == 1


def test_a_removed_file_can_be_locked(client: Client, file: Path) -> None:
    mine, other = handle(client), handle(client)
    file.unlink()
    assert lock(client, mine, ONE, WRITE, 0, 0)
    assert not lock(client, other, OTHER, READ, 0, 0)
    assert client.do(ops.getlock, other, LockRange(READ, 0, 0), OTHER).type == WRITE


# Waiting


async def opened(executor: Executor, source: Path, count: int = 1) -> tuple[Session, list[int]]:
    """A session, and open handles of its file."""
    session = Session(executor)
    await answer(executor, "attach", ops.attach(session, ROOT, str(source)))
    fid, _ = await answer(executor, "lookup", callbacks.lookup(session, ROOT, b"file"))
    me = Caller(os.geteuid(), os.getegid())
    handles = []
    for _ in range(count):
        body = callbacks.open(session, fid.number, os.O_RDWR, me)
        handles.append((await answer(executor, "open", body)).number)
    return session, handles


def scenario(
    source: Path, story: Callable[..., Any], model: str, threads: int = 1, count: int = 2
) -> None:
    """Tell a story of waiting, with a session and open handles; afterwards nothing is left."""

    async def whole(executor: Executor) -> None:
        if model == "second-local":
            executor.is_near = is_on_own_device  # type: ignore[attr-defined]
        session, handles = await opened(executor, source, count)
        await story(executor, session, handles)
        session.fids.clear()
        await answer(executor, "nothing", nothing(session))
        await until(lambda: not session.fids.open_descriptors)
        assert len(session.file_locks) == 0

    with no_leaks():
        drive(model.partition("-")[0], threads, whole)


models = pytest.mark.parametrize("model", [*MODELS, "second-local"])


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is woken, or he waits for ever."""
    monkeypatch.setattr(driver, "TICK", 1000.0)
    monkeypatch.setattr(driver, "LONGEST", 1000.0)


Asks = Callable[[Session, int, int], Any]


def take(session: Session, fid: int, owner: int, waits: bool = True) -> Any:
    return callbacks.setlk(session, fid, owner, LockRange(WRITE, 0, 0, owner), waits)


def drop(session: Session, fid: int, owner: int) -> Any:
    return callbacks.setlk(session, fid, owner, LockRange(NONE, 0, 0), False)


def take_whole(session: Session, fid: int, owner: int, waits: bool = True) -> Any:
    return callbacks.flock(session, fid, EXCLUSIVE, waits)


def drop_whole(session: Session, fid: int, owner: int) -> Any:
    return callbacks.flock(session, fid, UNLOCK, False)


def to_read(session: Session, fid: int, owner: int) -> Any:
    return callbacks.setlk(session, fid, owner, LockRange(READ, 10, 0), False)


def flush(session: Session, fid: int, owner: int) -> Any:
    return callbacks.flush(session, fid, owner)


def release(session: Session, fid: int, owner: int) -> Any:
    return callbacks.release(session, fid)


@models
@pytest.mark.parametrize(
    ("taking", "giving"),
    [(take, drop), (take, flush), (take, release), (take_whole, drop_whole), (take_whole, release)],
)
def test_who_waits_is_woken_at_once(
    source: Path, file: Path, no_polling: None, model: str, taking: Asks, giving: Asks
) -> None:
    """However a lock is given back; and others are served meanwhile, by one thread."""

    async def story(executor: Executor, session: Session, handles: list[int]) -> None:
        mine, other = handles
        await answer(executor, "setlk", taking(session, mine, ONE))
        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "setlkw", taking(session, other, OTHER))
            for number in range(10):
                await answer(executor, "mkdir", ops.mkdir(session, ROOT, b"d%d" % number, 0o755))
            assert not outcome.over
            await answer(executor, "gives", giving(session, mine, ONE))
            await until(lambda: outcome.over)
            assert outcome.error is None
        with fails(errno.EAGAIN):
            await answer(executor, "setlk", taking(session, handles[-1], THIRD, waits=False)) if (
                taking is take
            ) else await answer(executor, "fails", failing())

    async def failing() -> None:
        raise BlockingIOError(errno.EAGAIN, "flock is the handle's own")

    scenario(source, story, model)


@models
def test_a_weaker_lock_lets_readers_in(
    source: Path, file: Path, no_polling: None, model: str
) -> None:
    async def story(executor: Executor, session: Session, handles: list[int]) -> None:
        mine, other = handles
        await answer(executor, "setlk", take(session, mine, ONE))
        async with trio.open_nursery() as nursery:
            wanted = LockRange(READ, 20, 5)
            body = callbacks.setlk(session, other, OTHER, wanted, True)
            reader = await begin(nursery, executor, "setlkw", body)
            body = callbacks.setlk(session, other, THIRD, LockRange(WRITE, 20, 5), True)
            writer = await begin(nursery, executor, "setlkw", body)
            await answer(executor, "setlk", to_read(session, mine, ONE))
            await until(lambda: reader.over)
            assert reader.error is None
            assert not writer.over
            await answer(executor, "setlk", drop(session, mine, ONE))
            assert not writer.over
            await answer(executor, "setlk", drop(session, other, OTHER))
            await until(lambda: writer.over)

    scenario(source, story, model)


@models
@pytest.mark.parametrize("kind", ["record", "whole"])
def test_who_waits_for_the_source_tries_again(
    source: Path, file: Path, neighbour: Neighbour, model: str, kind: str
) -> None:
    async def story(executor: Executor, session: Session, handles: list[int]) -> None:
        if kind == "record":
            assert neighbour.record(WRITE, 50, 1)
            body = take(session, handles[0], ONE)
        else:
            assert neighbour.whole(SHARED)
            body = take_whole(session, handles[0], ONE)
        async with trio.open_nursery() as nursery:
            outcome = await begin(nursery, executor, "setlkw", body)
            await trio.sleep(0.6)  # so that the pauses have grown
            assert not outcome.over
            assert neighbour.record(NONE)
            assert neighbour.whole(UNLOCK)
            await until(lambda: outcome.over)
            assert outcome.error is None
        assert neighbour.is_free(0) == (kind == "whole")

    scenario(source, story, model)


@models
@pytest.mark.parametrize("taking", [take, take_whole])
def test_who_is_withdrawn_has_nothing(
    source: Path, file: Path, neighbour: Neighbour, no_polling: None, model: str, taking: Asks
) -> None:
    """EINTR at once; who waits behind him has his turn."""

    async def story(executor: Executor, session: Session, handles: list[int]) -> None:
        mine, other, third = handles
        await answer(executor, "setlk", taking(session, mine, ONE))
        async with trio.open_nursery() as nursery:
            first = await begin(nursery, executor, "first", taking(session, other, OTHER))
            second = await begin(nursery, executor, "second", taking(session, third, THIRD))
            request = next(r for r in executor.requests.values() if r.name == "first")
            await until(lambda: "waits for another's lock" in request.describe())
            executor.withdraw(request)
            await until(lambda: first.over)
            assert isinstance(first.error, InterruptedError)
            assert not second.over
            await answer(executor, "drop", callbacks.release(session, mine))
            await until(lambda: second.over)
            assert second.error is None

    scenario(source, story, model, count=3)


@models
def test_a_lock_that_comes_as_its_waiter_is_withdrawn(
    source: Path, file: Path, neighbour: Neighbour, model: str
) -> None:
    """He has it, or was told EINTR and has not: never both."""
    got = Counter[bool]()

    async def story(executor: Executor, session: Session, handles: list[int]) -> None:
        mine, other = handles
        for number in range(200):
            await answer(executor, "setlk", take(session, mine, ONE))
            async with trio.open_nursery() as nursery:
                outcome = await begin(nursery, executor, "w", take(session, other, OTHER))
                request = next(r for r in executor.requests.values() if r.name == "w")
                giving = executor.start("drop", drop(session, mine, ONE), lambda _: None)
                for _ in range(number % 5):
                    await trio.lowlevel.checkpoint()
                executor.withdraw(request)
                await until(lambda: outcome.over and giving.tag not in executor.requests)  # noqa: B023
            has_it = outcome.error is None
            got[has_it] += 1
            assert neighbour.is_free(0, 0) != has_it
            await answer(executor, "flush", callbacks.flush(session, other, OTHER))

    scenario(source, story, model)
    print(model, got)


@models
@pytest.mark.parametrize("taking", [take, take_whole])
def test_a_hundred_wait_on_one_thread(
    source: Path, file: Path, no_polling: None, monkeypatch: pytest.MonkeyPatch, model: str,
    taking: Asks
) -> None:  # fmt: skip
    """All else goes on; each has the lock in turn, and few try in vain."""
    count, tries = 100, [0]
    really = locking._try

    def counted(*args: Any) -> bool:
        tries[0] += 1
        return really(*args)

    monkeypatch.setattr(locking, "_try", counted)

    async def story(executor: Executor, session: Session, handles: list[int]) -> None:
        giving = drop if taking is take else drop_whole
        await answer(executor, "setlk", taking(session, handles[0], 1000))
        order: list[int] = []

        async def one(number: int) -> None:
            await taking(session, handles[number], number)
            order.append(number)
            await giving(session, handles[number], number)

        async with trio.open_nursery() as nursery:
            outcomes = [
                await begin(nursery, executor, "one", one(number)) for number in range(1, count + 1)
            ]
            for number in range(20):
                await answer(executor, "mkdir", ops.mkdir(session, ROOT, b"d%d" % number, 0o755))
            assert not any(outcome.over for outcome in outcomes)
            await until(lambda: len(executor._patience) == count)
            await until(lambda: session.fids.open_descriptors == len(handles) + (taking is take))
            before = tries[0]
            await answer(executor, "drop", giving(session, handles[0], 1000))
            await until(lambda: all(outcome.over for outcome in outcomes))
        assert all(outcome.error is None for outcome in outcomes)
        assert order == sorted(order), "in the order of their coming"
        # Each locks, unlocks, and may have tried once in vain.
        assert tries[0] - before <= 3 * count + 10

    scenario(source, story, model, count=count + 1)


@pytest.mark.parametrize("model", ["first", "second", "second-local"])
def test_owners_at_random_are_never_two(source: Path, file: Path, model: str) -> None:
    """On parts of a file, read or written, waited for and withdrawn; the source among them."""
    rng = random.Random(9)
    parts: list[Counter[str]] = [Counter() for _ in range(8)]
    mutex = threading.Lock()

    def enter(kind: int, first: int, last: int) -> None:
        with mutex:
            for part in parts[first:last]:
                part["w" if kind == WRITE else "r"] += 1
                assert part["w"] <= 1, "two that write"
                assert not (part["w"] and part["r"]), "one that writes, and one that reads"

    def leave(kind: int, first: int, last: int) -> None:
        with mutex:
            for part in parts[first:last]:
                part["w" if kind == WRITE else "r"] -= 1

    async def one(session: Session, fid: int, owner: int, seed: int) -> None:
        own = random.Random(seed)
        first = own.randrange(8)
        last = own.randrange(first, 8) + 1
        kind = own.choice([READ, WRITE])
        wanted = LockRange(kind, first * 10, (last - first) * 10, owner)
        await callbacks.setlk(session, fid, owner, wanted, True)
        enter(kind, first, last)
        await ops.fsync(session, fid, True)  # something that takes a while
        leave(kind, first, last)
        if own.random() < 0.5:
            await callbacks.flush(session, fid, owner)
        else:
            await callbacks.setlk(session, fid, owner, wanted._replace(type=NONE), False)

    async def story(executor: Executor, session: Session, handles: list[int]) -> None:
        outcomes: list[Outcome] = []
        async with trio.open_nursery() as nursery:
            for number in range(150):
                body = one(session, handles[number % 4], number, number)
                outcomes.append(await begin(nursery, executor, "one", body))
                if rng.random() < 0.2 and (under_way := list(executor.requests.values())):
                    executor.withdraw(rng.choice(under_way))
            await until(lambda: all(outcome.over for outcome in outcomes))
        for outcome in outcomes:
            assert outcome.error is None or isinstance(outcome.error, InterruptedError)
        assert sum(outcome.error is None for outcome in outcomes) > 100

    with watching():
        scenario(source, story, model, threads=3, count=4)
