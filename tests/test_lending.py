"""Open fids that lend their descriptors to nodes, so that an open file takes one, not two."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from file_systems import mounted
from ops_helpers import ROOT, Client, Stepper, client_of, fails, module_of, needs_root
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.linux.callers import Caller
from ninefuse.ops.locking import flock
from ninefuse.tree.descriptors import Descriptors
from ninefuse.tree.lockranges import LockRange
from ninefuse.tree.table import Fid

pytestmark = pytest.mark.usefixtures("leak_free")


def lend(client: Client) -> int:
    """Have every open fid lend that can."""
    return client.session.fids.lend(sys.maxsize)


def opened(client: Client, fid: Fid, flags: int = os.O_RDONLY) -> int:
    """An open clone of a fid."""
    clone = client.walk(start=fid.number)
    client.do(ops.lopen, clone, flags)
    return clone


def is_path_only(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)


@pytest.fixture
def file(client: Client, source: Path) -> Fid:
    """A file that the kernel knows."""
    (source / "file").write_bytes(b"data")
    return client.know("file")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_an_open_file_takes_one_descriptor(client: Client, file: Fid, flags: int) -> None:
    """All that is done to the file by its nodeid goes on, whatever it is open for."""
    before = client.session.fids.descriptors
    handle = opened(client, file, flags)
    assert client.session.fids.descriptors == before
    assert lend(client) == 1
    assert client.session.fids.descriptors == before - 1
    assert file.node.fd == client.descriptor(handle)
    assert lend(client) == 0
    assert client.do(ops.getattr, file.number).size == 4
    client.do(ops.setattr, file.number, ops.Changes(mode=0o640, size=3, mtime=10**9))
    client.do(ops.link, ROOT, file.number, b"linked")
    other = opened(client, file, os.O_RDWR)
    assert client.do(ops.read, other, 0, 10) == b"dat"
    client.do(ops.clunk, other)
    client.do(ops.clunk, handle)
    assert is_path_only(file.node.fd)
    assert client.session.fids.descriptors == before
    a = client.do(ops.getattr, file.number)
    assert (a.size, a.mode & 0o777, a.mtime_ns, a.nlink) == (3, 0o640, 10**9, 2)


def test_a_directory_lends_too(client: Client, source: Path) -> None:
    """Names below it are found by what lists it, and the listing goes on."""
    (source / "d").mkdir()
    (source / "d" / "f").touch()
    directory = client.know("d")
    handle = opened(client, directory)
    assert lend(client) == 1
    below = client.know("f", start=directory.number)
    client.do(ops.mkdir, directory.number, b"made", 0o700)
    names = {entry.name for entry in client.do(ops.readdir, handle, 0, 1000)}
    assert names == {b".", b"..", b"f", b"made"}
    client.do(ops.clunk, handle)
    assert is_path_only(directory.node.fd)
    client.lose_descriptor(below)
    assert client.do(ops.getattr, below.number).kind == stat.S_IFREG


def test_a_removed_file_is_there_after_its_last_close(client: Client, file: Fid) -> None:
    """No name leads to it, so its node could not be opened again."""
    handle = opened(client, file, os.O_RDWR)
    client.do(ops.unlinkat, ROOT, b"file")
    assert lend(client) == 1
    assert client.do(ops.getattr, file.number).nlink == 0
    client.do(ops.clunk, handle)
    assert client.do(ops.getattr, file.number).nlink == 0
    again = opened(client, file)
    assert client.do(ops.read, again, 0, 10) == b"data"
    client.do(ops.clunk, again)


def test_a_closed_file_is_not_kept_open(client: Client, file: Fid, source: Path) -> None:
    """What is open for writing cannot be executed, nor leased by others (fcntl(2))."""
    handle = opened(client, file, os.O_RDWR)
    assert lend(client) == 1
    client.do(ops.clunk, handle)
    client.rest()
    alone = os.open(source / "file", os.O_RDONLY)
    try:
        fcntl.fcntl(alone, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    finally:
        os.close(alone)


def test_a_number_in_use_stays_that_file(client: Client, file: Fid) -> None:
    """The handle is closed while somebody is about to make a call by the node's number."""
    handle = opened(client, file, os.O_RDWR)
    assert lend(client) == 1
    asking = Stepper(ops.getattr(client.session, file.number))
    asking.before("stat_descriptor")
    client.do(ops.clunk, handle)
    client.rest()
    others = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(4)]
    try:
        assert asking.finish().size == 4
    finally:
        for fd in others:
            os.close(fd)


def test_a_node_in_use_is_lent_nothing(client: Client, file: Fid) -> None:
    """Its number is about to be used; afterwards it is."""
    handle = opened(client, file)
    asking = Stepper(ops.getattr(client.session, file.number))
    asking.before("stat_descriptor")
    assert lend(client) == 0
    assert asking.finish().size == 4
    assert lend(client) == 1
    client.do(ops.clunk, handle)


@pytest.mark.parametrize("first", [True, False])
def test_of_several_that_are_open_one_lends(client: Client, file: Fid, first: bool) -> None:
    """When it is closed another can; when one of the others is, nothing changes."""
    handles = [opened(client, file, flags) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)]
    assert lend(client) == 1
    (lender,) = [h for h in handles if client.descriptor(h) == file.node.fd]
    if not first:
        for handle in handles:
            if handle != lender:
                client.do(ops.clunk, handle)
        assert file.node.fd == client.descriptor(lender)
        assert lend(client) == 0
        client.do(ops.clunk, lender)
        assert lend(client) == 0
    else:
        client.do(ops.clunk, lender)
        assert is_path_only(file.node.fd)
        assert lend(client) == 1
        assert client.do(ops.getattr, file.number).size == 4
        for handle in handles:
            if handle != lender:
                client.do(ops.clunk, handle)
    assert is_path_only(file.node.fd)


def test_one_that_is_opened_before_the_lender_is_closed(client: Client, file: Fid) -> None:
    """A clunk is done with before its descriptor is closed: the file may be opened meanwhile."""
    lender = opened(client, file)
    assert lend(client) == 1
    Stepper(ops.clunk(client.session, lender)).finish()
    table = client.session.fids
    assert lend(client) == 0
    other = client.walk(start=file.number)
    Stepper(ops.lopen(client.session, other, os.O_RDONLY)).finish()
    client.rest()
    assert is_path_only(file.node.fd)
    assert lend(client) == 1
    assert file.node.fd == client.descriptor(other)
    client.forget(file)
    assert table.descriptors == 1
    client.do(ops.clunk, other)


def test_a_file_that_nobody_else_knows_ends_with_its_fid(
    client: Client, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is opened for a node that goes as well."""
    (source / "file").touch()
    handle = client.open("file")
    assert lend(client) == 1
    assert client.session.fids.descriptors == 1
    monkeypatch.setattr(client.session.fids, "close_lent", None)
    client.do(ops.clunk, handle)
    client.rest()
    assert client.session.fids.descriptors == 1


def test_a_node_that_has_none_is_lent_nothing(source: Path) -> None:
    """A fid of 9P's clients is all that stands on it: it can be closed though it is open."""
    (source / "file").touch()
    with client_of(source, kernel=False) as client:
        _, fid = client.do(ops.walk, ROOT, 7, [b"file"])
        assert fid is not None
        client.do(ops.lopen, 7, os.O_RDONLY)
        fid.node.recent = False
        client.session.descriptors._close_coldest(9)
        assert fid.node.fd == -1
        assert lend(client) == 0
        assert client.do(ops.getattr, 7).kind == stat.S_IFREG
        assert lend(client) == 1
        client.do(ops.clunk, 7)


# When it is done


def known_and_open(client: Client, source: Path, count: int) -> tuple[list[Fid], list[int]]:
    """So many files that are known and have not been used since, and as many that are open."""
    for number in range(2 * count):
        (source / f"{number:02d}").touch()
    known = [client.know(f"{number:02d}") for number in range(count)]
    handles = [client.open(f"{number:02d}") for number in range(count, 2 * count)]
    for fid in known:
        fid.node.recent = False
    return known, handles


@contextmanager
def limited(source: Path, count: int) -> Iterator[Client]:
    """A client that may have so many descriptors."""
    with client_of(source) as client:
        session = client.session
        session.descriptors = Descriptors(
            session.fids, client.executor.in_background, threads=1, limit=count + 35
        )
        assert session.descriptors.shared == count
        yield client


def test_open_files_lend_before_known_ones_lose_theirs(source: Path) -> None:
    """Those would have to be found by their names again."""
    with limited(source, 60) as client:
        client.session.descriptors._reclaiming = True  # it hangs somewhere
        known, handles = known_and_open(client, source, 17)
        assert len(client.session.fids._lent) == 0
        handles += [client.create(f"new{number}") for number in range(12)]
        assert len(client.session.fids._lent) > 0
        assert all(fid.node.fd >= 0 for fid in known)


def test_the_reclaimer_has_open_files_lend_first(source: Path) -> None:
    with client_of(source, most_descriptors=1000) as client:
        known, handles = known_and_open(client, source, 20)
        client.session.descriptors.most = 31
        Stepper(client.session.descriptors._reclaim()).finish()
        assert client.session.fids.descriptors == 23
        assert len(client.session.fids._lent) == 18
        assert all(fid.node.fd >= 0 for fid in known)


def test_where_some_are_in_use_all_others_are_asked(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rule who makes room looks at some only."""
    monkeypatch.setattr(module_of(Descriptors), "_LOOKED_AT", 1)
    with limited(source, 40) as client:
        known, _ = known_and_open(client, source, 12)
        for number in range(12):
            client.do(ops.unlinkat, ROOT, b"%02d" % number)
        table = client.session.fids
        assert (table.descriptors, table.open_descriptors) == (25, 12)
        used = [node for node, _ in table._open.values()][:6]
        for node in used:
            table.pin(node)
        more = [client.create(f"new{number}") for number in range(6)]
        assert not set(used) & table._lent.keys()
        for node in used:
            table.unpin(node)
        assert [client.do(ops.getattr, fid.number).nlink for fid in known] == [0] * 12
        assert len(more) == 6


# What may go wrong, and what else a descriptor does


def test_where_no_descriptor_is_left_the_file_stays_open(
    client: Client, file: Fid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node keeps the lender's, rather than lose a file that has no name."""

    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "no more")

    handle = opened(client, file, os.O_RDWR)
    client.do(ops.unlinkat, ROOT, b"file")
    assert lend(client) == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        client.do(ops.clunk, handle)
        client.rest()
    assert client.do(ops.getattr, file.number).nlink == 0
    assert client.session.fids.open_descriptors == 0
    assert client.session.fids.descriptors == 2


def test_a_close_that_fails_is_counted_off_all_the_same(
    client: Client, file: Fid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node has lost what it was lent, and a server tells of a write that it could not make."""

    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "no more")

    def failing(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "an earlier write has failed")

    close, deferred = os.close, list[Callable[[], object]]()
    table = client.session.fids
    handle = opened(client, file, os.O_RDWR)
    assert lend(client) == 1
    with monkeypatch.context() as patch:
        patch.setattr(table, "_defer", lambda *call: deferred.append(partial(*call)))
        client.do(ops.clunk, handle)
    with table._counts:
        assert table._take(file.node) == -1
    (closing,) = deferred
    with monkeypatch.context() as patch, fails(errno.EIO):
        patch.setattr(os, "open", full)
        patch.setattr(os, "close", failing)
        closing()
    assert table.open_descriptors == 0
    assert file.node.refs == 1


def test_a_lender_whose_owner_has_locks_by_another_file(client: Client, file: Fid) -> None:
    """They stay, and the descriptor is the node's all the same."""
    lender, other = (opened(client, file, os.O_RDWR) for _ in range(2))
    for start, handle in enumerate((lender, other)):
        wanted = LockRange(fcntl.F_WRLCK, start, 1)
        assert client.do(ops.lock, handle, 0, wanted, "owner") is ops.LockStatus.SUCCESS
    assert lend(client) == 1
    assert file.node.fd == client.descriptor(lender)
    client.do(ops.clunk, lender)
    client.rest()
    assert is_path_only(file.node.fd)
    assert client.do(ops.getlock, other, LockRange(fcntl.F_WRLCK, 0, 0), "another").length == 2
    client.do(ops.clunk, other)


def test_locks_end_with_a_lender(client: Client, file: Fid, source: Path) -> None:
    """flock is made on the handle's own descriptor."""
    handle = opened(client, file, os.O_RDWR)
    assert client.do(flock, handle, fcntl.LOCK_EX)
    assert lend(client) == 1
    with (source / "file").open("rb") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        client.do(ops.clunk, handle)
        client.rest()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@needs_root
def test_who_lends_is_counted_for_its_user(source: Path) -> None:
    """Until it is closed, whoever uses the descriptor besides."""
    (source / "file").touch()
    with client_of(source) as client:
        table, caller = client.session.fids, Caller(12345, 12345, None, 0)
        file = client.know("file")
        handle = client.walk(start=file.number)
        client.do(ops.lopen, handle, os.O_RDONLY, caller)
        assert lend(client) == 1
        assert table._claimed == {12345: 1}
        client.do(ops.clunk, handle)
        client.rest()
        assert (table._claimed, table.open_descriptors) == ({}, 0)


@needs_root
@pytest.mark.parametrize("lends", [True, False])
def test_a_file_found_by_another_mount_is_lent_nothing_of_the_old_one(
    source: Path, lends: bool
) -> None:
    """A descriptor keeps its mount busy; the node's is by the mount it was looked up at last."""
    with mounted("tmpfs", "tmpfs", source / "disk") as disk:
        (disk / "file").write_bytes(b"data")
        with mounted("none", disk, source / "again", "bind"), client_of(source) as client:
            file = client.know("disk", "file")
            handle = opened(client, file)
            if lends:
                assert lend(client) == 1
            assert client.know("again", "file") is file
            assert is_path_only(file.node.fd)
            assert lend(client) == 0
            client.do(ops.clunk, handle)
            client.rest()
            assert client.do(ops.getattr, file.number).size == 4
            again = opened(client, file)
            assert lend(client) == 1
            client.do(ops.clunk, again)
            client.forget(file, 2)


@needs_root
def test_a_disk_is_left_by_who_was_lent_a_descriptor_on_it(source: Path) -> None:
    """It can be unmounted a moment after the last close (leaving.py)."""
    with mounted("tmpfs", "tmpfs", source / "disk") as disk, client_of(source) as client:
        (disk / "file").touch()
        table = client.session.fids
        file = client.know("disk", "file")
        handle = opened(client, file)
        assert lend(client) == 1
        visits: list[int] = []
        table.on_visit = lambda: visits.append(table.visitors)
        before = table.visitors
        client.do(ops.clunk, handle)
        client.rest()
        assert (before, visits) == (0, [1])
