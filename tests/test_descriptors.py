"""The limit on open files: what is left for nodes, and what happens when all are in use."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from file_systems import mounted
from ops_helpers import ROOT, Client, Stepper, client_of, fails, needs_root
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.descriptors import Descriptors

pytestmark = pytest.mark.usefixtures("leak_free")

LIMIT = 103  # on open files: 60 of them are to share, 15 at least for nodes


@contextmanager
def limited(source: Path) -> Iterator[Client]:
    """A client whose descriptors are counted as if the process had few; its limit is another."""
    with client_of(source) as client:
        session = client.session
        session.descriptors = Descriptors(
            session.fids, client.executor.in_background, threads=1, limit=LIMIT
        )
        assert session.descriptors.shared == 60
        yield client


def in_use(client: Client) -> int:
    return client.session.fids.descriptors + client.session.fids.open_descriptors


def make_files(directory: Path, count: int) -> None:
    for number in range(count):
        (directory / f"{number:03d}").write_bytes(b"x" * number)


def open_all(client: Client, count: int) -> list[int]:
    """Open files until that is refused; the open fids."""
    opened: list[int] = []
    for number in range(count):
        fid = client.walk(f"{number:03d}")
        try:
            client.do(ops.lopen, fid, os.O_RDONLY)
        except OSError as error:
            assert error.errno == errno.ENFILE  # noqa: PT017
            client.do(ops.clunk, fid)
            return opened
        opened.append(fid)
    raise AssertionError("there is no end of descriptors")


def test_open_files_take_what_nodes_can_do_without(source: Path) -> None:
    """The more are open the fewer nodes have one; never are there more than there may be."""
    make_files(source, 100)
    with limited(source) as client:
        known = [client.know(f"{number:03d}") for number in range(60, 100)]
        before = client.session.fids.descriptors
        assert before >= 35
        opened = [client.open(f"{number:03d}") for number in range(20)]
        assert in_use(client) <= 60
        assert client.session.fids.descriptors <= 41
        for number, fid in enumerate(opened):
            assert client.do(ops.read, fid, 0, 100) == b"x" * number
        for number, looked_up in enumerate(known, 60):
            assert client.do(ops.getattr, looked_up.number).size == number
            assert in_use(client) <= 60


def test_names_go_on_when_all_descriptors_are_in_open_files(source: Path) -> None:
    """Opening is refused before anything was done; everything else is served."""
    make_files(source, 100)
    with limited(source) as client:
        opened = open_all(client, 60)
        assert len(opened) >= 21, "each keeps its node's descriptor as well"
        assert in_use(client) <= 60
        with fails(errno.ENFILE):
            for number in range(5):  # the one just refused has left a little room
                opened.append(client.create(f"new{number}", b"x" * len(opened)))
        assert not (source / f"new{number}").exists(), "refused before it was made"
        truncated = client.walk("000")
        with fails(errno.ENFILE):
            client.do(ops.lopen, truncated, os.O_WRONLY | os.O_TRUNC)
        client.do(ops.clunk, truncated)
        for number in range(40, 100):
            name = b"%03d" % number
            fid = client.know(name)
            assert client.do(ops.getattr, fid.number).size == number
            client.do(ops.mkdir, ROOT, b"made", 0o700)
            client.do(ops.renameat, ROOT, name, ROOT, b"moved")
            client.do(ops.unlinkat, ROOT, b"moved")
            client.do(ops.unlinkat, ROOT, b"made", 0x200)
            client.forget(fid)
            assert in_use(client) <= 62
        for number, handle in enumerate(opened):
            assert client.do(ops.read, handle, 0, 100) == b"x" * number
        for _ in range(2):
            client.do(ops.clunk, opened.pop())
        client.rest()
        client.open("000")


def test_only_descriptors_of_ones_own_device_are_closed_to_make_room(tmp_path: Path) -> None:
    """Closing, and the look before it, may wait for a device, and for one that hangs."""
    if os.geteuid():
        pytest.skip("only root may mount")
    source = tmp_path / "source"
    source.mkdir()
    make_files(source, 40)
    with mounted("tmpfs", "tmpfs", source / "below") as below:
        make_files(below, 40)
        with limited(source) as client:
            here = [client.know(f"{number:03d}") for number in range(25)]
            there = [client.know("below", f"{number:03d}") for number in range(25)]
            client.session.descriptors._reclaiming = True  # it hangs somewhere
            more = [client.know("below", f"{number:03d}") for number in range(25, 40)]
            assert all(fid.node.fd >= 0 for fid in here), "nobody who was looking below"
            assert sum(fid.node.fd >= 0 for fid in (*there, *more)) < 40
            assert in_use(client) <= 60


def test_a_reclaimer_that_hangs_lets_nothing_pile_up(source: Path) -> None:
    """Whoever opens something makes room for it, whether or not anybody did so before."""
    make_files(source, 200)
    with limited(source) as client:
        for number in range(50):
            client.know(f"{number:03d}")
        client.session.descriptors.most = 20
        hanging = Stepper(client.session.descriptors._reclaim())
        hanging.before("_close_coldest")
        client.session.descriptors._reclaiming = True
        client.session.descriptors.most = 16384
        for number in range(50, 200):
            client.know(f"{number:03d}")
            assert in_use(client) <= 61
        hanging.finish()


def test_what_has_no_name_any_more_keeps_its_descriptor(source: Path) -> None:
    """It is the only way to the file: those go first that can be opened again."""
    make_files(source, 120)
    with limited(source) as client:
        gone = [client.know(f"{number:03d}") for number in range(30)]
        for number in range(30):
            client.do(ops.unlinkat, ROOT, b"%03d" % number)
        for number in range(30, 120):
            client.know(f"{number:03d}")
            assert in_use(client) <= 61
        assert [client.do(ops.getattr, fid.number).nlink for fid in gone] == [0] * 30


def test_where_nothing_can_be_closed_a_lookup_is_refused_and_no_call_fails(source: Path) -> None:
    """ENFILE, which says what is the matter, before the limit itself is met."""
    make_files(source, 120)
    with limited(source) as client:
        gone = []
        with fails(errno.ENFILE):
            for number in range(120):
                gone.append(client.know(f"{number:03d}"))
                client.do(ops.unlinkat, ROOT, b"%03d" % number)
        assert 55 <= len(gone) <= 62
        assert in_use(client) <= 62
        assert client.do(ops.getattr, gone[0].number).nlink == 0
        client.forget(gone.pop())
        client.rest()
        client.forget(gone.pop())
        client.rest()
        client.know("110")


@needs_root
def test_the_root_of_the_source_is_never_closed(source: Path) -> None:
    make_files(source, 100)
    with limited(source) as client:
        for number in range(100):
            client.know(f"{number:03d}")
        assert client.node(ROOT).fd >= 0
