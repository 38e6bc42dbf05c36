"""Descriptors of nodes: who loses one, how it is opened again, and the limit on open files."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from file_systems import mounted
from ops_helpers import (
    ROOT,
    Client,
    Stepper,
    client_of,
    fails,
    module_of,
    needs_root,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.calls import Body, Call, Command, Later
from ninefuse.fuse import callbacks
from ninefuse.fuse.entries import fitted, readdirplus
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import Attributes
from ninefuse.tree import descriptors, leaving
from ninefuse.tree.descriptors import Descriptors
from ninefuse.tree.nodes import Node
from ninefuse.tree.opened import OpenDirectory, OpenFile
from ninefuse.tree.qids import is_on_own_device
from ninefuse.tree.table import Fid

pytestmark = pytest.mark.usefixtures("leak_free")

STRANGER = os.geteuid() + 1000  # another user than the daemon's


# Which nodes lose theirs, and how they get it again


@contextmanager
def few_descriptors(source: Path, most: int) -> Iterator[Client]:
    """A client whose nodes may keep so many descriptors."""
    with client_of(source, most_descriptors=most) as client:
        yield client


def look_up_all(client: Client, directory: int = ROOT) -> list[Fid]:
    """Look all entries of a directory up, one by one."""
    clone = client.walk(start=directory)
    client.do(ops.lopen, clone, os.O_RDONLY)
    names = [entry.name for entry in client.do(ops.readdir, clone, 0, 1 << 20)]
    client.do(ops.clunk, clone)
    return [client.know(n, start=directory) for n in sorted(names) if n not in (b".", b"..")]


def reclaim(client: Client, fid: Fid) -> None:
    """Take the descriptor of a node away, if the session would."""
    for other in client.session.fids._fids.values():
        other.node.recent = other is not fid
    client.session.descriptors._close_coldest(1)


def make_files(directory: Path, count: int) -> None:
    for number in range(count):
        (directory / f"{number:04d}").write_bytes(b"x" * number)


@pytest.mark.parametrize("threads", [1, 17])
@pytest.mark.parametrize("limit", [256, 1024, 20_000])
def test_nodes_have_what_open_files_leave(client: Client, limit: int, threads: int) -> None:
    """At least a few, 16,384 at most; a part of the limit is left for calls under way.

    Of 256, with as many threads as there are by default, open files have 200.
    """
    fids = client.session.fids
    cache = Descriptors(
        fids, client.executor.in_background, most=16384, threads=threads, limit=limit
    )
    room = limit - 32 - max(threads, min(3 * threads, limit // 16))
    few = max(5, min(64, room // 40))
    assert cache.for_nodes == min(room, 16384)
    for opened in range(1, room - few + 1):
        cache.claim()
        assert cache.for_nodes == min(16384, room - opened)
        assert cache.for_nodes + opened + threads < limit - 30
    with fails(errno.ENFILE):
        cache.claim()
    assert cache.for_nodes == few
    fids.open_descriptors = 0


def test_a_user_may_have_half_of_the_descriptors_for_open_files(client: Client) -> None:
    """Others, root and the daemon itself go on; what is closed is given back to whom it was."""
    fids = client.session.fids
    cache = Descriptors(fids, client.executor.in_background, limit=256)
    most = cache.shared - 5
    for _ in range(most // 2):
        cache.claim(STRANGER)
    for _ in range(2):
        with fails(errno.ENFILE):
            cache.claim(STRANGER)
    cache.claim(STRANGER + 1)
    cache.claim(0)
    cache.claim()
    cache.claim(os.geteuid())
    fids.unclaim(STRANGER)
    cache.claim(STRANGER)
    with fails(errno.ENFILE):
        cache.claim(STRANGER)
    for owner in (STRANGER + 1, 0, None, os.geteuid(), *[STRANGER] * (most // 2)):
        fids.unclaim(owner)
    assert (fids.open_descriptors, fids._claimed) == (0, {})


@needs_root
def test_whoever_opened_a_file_has_its_descriptor_counted(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the end: of files made and opened, of directories, and of what cannot be opened."""

    def broken(fd: int, *_: object) -> int:
        raise OSError(errno.EIO, "broken")

    source.chmod(0o777)
    (source / "directory").mkdir()
    (source / "file").touch()
    with client_of(source) as client:
        table, caller = client.session.fids, Caller(STRANGER, STRANGER, None, 0)
        opened = []
        for name in ("file", "directory"):
            opened.append(client.walk(name))
            client.do(ops.lopen, opened[-1], os.O_RDONLY, caller)
        opened.append(client.walk())
        client.do(ops.lcreate, opened[-1], b"new", os.O_RDWR, 0o644, caller)
        for fid in opened:
            state = client.fid(fid).opened
            assert isinstance(state, OpenFile | OpenDirectory)
            assert state.owner == STRANGER
        assert table._claimed == {STRANGER: 3}
        with fails(errno.ENOTDIR):
            client.do(ops.lopen, client.walk("file"), os.O_WRONLY | os.O_DIRECTORY, caller)
        with fails(errno.EEXIST):
            client.do(ops.lcreate, client.walk(), b"file", os.O_RDWR | os.O_EXCL, 0o644, caller)
        with monkeypatch.context() as patch, fails(errno.EIO):
            patch.setattr(module_of(ops.lopen), "_open_directory", broken)
            client.do(ops.lopen, client.walk(), os.O_RDONLY, caller)
        assert table._claimed == {STRANGER: 3}
        client.do(ops.clunk, client.open("file"))
        for fid in opened:
            client.do(ops.clunk, fid)
        client.rest()
        assert (table.open_descriptors, table._claimed) == (0, {})


def test_many_files_are_known_with_few_descriptors(source: Path) -> None:
    """Each is opened again when it is used, and the others pay for it."""
    make_files(source, 200)
    with few_descriptors(source, 20) as client:
        fids = look_up_all(client)
        assert client.session.fids.descriptors <= 21
        random.Random(3).shuffle(fids)
        for fid in fids:
            assert fid.node.place is not None
            assert client.do(ops.getattr, fid.number).size == int(fid.node.place[1])
            assert client.session.fids.descriptors <= 21
        assert client.session.fids.descriptors >= 10


def test_files_that_a_listing_found_take_few_descriptors_too(source: Path) -> None:
    """They get theirs at their first use, and the coldest lose theirs then as well."""
    make_files(source, 300)
    with few_descriptors(source, 16) as client:
        fid, offset = client.open(), 0
        found: list[int] = []
        while reply := client.do(readdirplus, fid, offset):
            fitted(client.session, fid, reply, len(reply))
            found += [entry.fid.number for entry in reply if entry.fid is not None]
            offset = reply[-1].offset
        for number in found:
            client.do(ops.getattr, number)
        assert len(found) == 300
        assert client.session.fids.descriptors <= 17


def test_files_that_were_made_take_few_descriptors_too(source: Path) -> None:
    """Making a file is one of the moments at which the coldest lose theirs."""
    with few_descriptors(source, 16) as client:
        for number in range(100):
            handle = client.create(b"%d" % number)
            client.know(start=handle)
            client.do(ops.clunk, handle)
            assert client.session.fids.descriptors <= 18
        assert len(client.session.fids) == 101


def test_a_deep_tree_takes_few_descriptors(source: Path) -> None:
    """Directories below each other: none is needed to let go of another."""
    depth = 150
    source.joinpath(*["d"] * depth).mkdir(parents=True)
    with few_descriptors(source, 16) as client:
        fids = [client.fid(ROOT)]
        for _ in range(depth):
            fids.append(client.know("d", start=fids[-1].number))
            assert client.session.fids.descriptors <= 18
        inodes = [client.do(ops.getattr, fid.number).ino for fid in reversed(fids)]
        assert len(set(inodes)) == depth + 1
        assert client.session.fids.descriptors <= 18
        assert client.do(ops.getattr, client.walk("..", start=fids[-1].number)).ino == inodes[1]


def test_what_is_in_use_keeps_its_descriptor(source: Path) -> None:
    """The root, open files, fids of clients, and what an operation is at."""
    make_files(source, 6)
    with few_descriptors(source, 1000) as client:
        opened, cloned, asked, idle, *_ = look_up_all(client)
        client.do(ops.lopen, client.walk(start=opened.number), os.O_RDONLY)
        client.walk(start=cloned.number)
        asking = Stepper(ops.getattr(client.session, asked.number))
        asking.before("stat_descriptor")
        for fid in (client.fid(ROOT), opened, cloned, asked, idle):
            reclaim(client, fid)
        assert [fid.node.fd >= 0 for fid in (client.fid(ROOT), opened, cloned, asked)] == [True] * 4
        assert idle.node.fd == -1
        asking.finish()


def test_a_node_used_since_the_last_round_is_passed_over_once(source: Path) -> None:
    """The coldest go first."""
    make_files(source, 4)
    with few_descriptors(source, 1000) as client:
        fids = look_up_all(client)
        for fid in fids:
            fid.node.recent = False
        client.do(ops.getattr, fids[0].number)
        client.session.descriptors._close_coldest(2)
        assert [fid.node.fd >= 0 for fid in fids] == [True, False, False, True]


def test_no_more_are_reclaimed_than_wanted(source: Path) -> None:
    """None at all if others have let go meanwhile."""
    make_files(source, 4)
    with few_descriptors(source, 1000) as client:
        for fid in look_up_all(client):
            fid.node.recent = False
        for most in (0, -3):
            assert client.session.fids.coldest(most) == []
            client.session.descriptors._close_coldest(most)
        assert client.session.fids.descriptors == 5


def test_a_reclaimed_file_is_found_where_it_was_renamed_to(source: Path) -> None:
    """By us: it is opened again at its new name, and below a directory's new name."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        for fid in (file, directory):
            reclaim(client, fid)
            assert fid.node.fd == -1
        client.do(ops.renameat, ROOT, b"d", ROOT, b"e")
        client.do(ops.renameat, client.walk("e"), b"file", ROOT, b"g")
        assert client.do(ops.getattr, file.number).size == 4
        assert client.do(ops.getattr, directory.number).kind == stat.S_IFDIR


@pytest.mark.parametrize("how", ["unlinked", "moved", "replaced", "directory moved"])
def test_what_its_name_does_not_lead_back_to_keeps_its_descriptor(source: Path, how: str) -> None:
    """It could not be opened again."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        if how == "unlinked":
            client.do(ops.unlinkat, directory.number, b"file")
        elif how == "moved":
            (source / "d" / "file").rename(source / "file")
        elif how == "replaced":
            (source / "new").touch()
            (source / "new").rename(source / "d" / "file")
        else:
            reclaim(client, directory)
            (source / "d").rename(source / "e")
        reclaim(client, file)
        assert file.node.fd >= 0
        assert client.do(ops.getattr, file.number).size == 4


def test_a_name_taken_away_just_after_the_look_keeps_the_descriptor(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if another reclaimer came by meanwhile, for whom that use was long ago."""
    make_files(source, 1)
    with few_descriptors(source, 1000) as client:
        (fid,) = look_up_all(client)
        leads_back = descriptors._Look.leads_back

        def meanwhile(look: descriptors._Look, node: Node) -> bool:
            found = leads_back(look, node)
            client.do(ops.unlinkat, ROOT, b"0000")
            node.recent = False
            return found

        monkeypatch.setattr(descriptors._Look, "leads_back", meanwhile)
        reclaim(client, fid)
        assert fid.node.fd >= 0
        assert client.do(ops.getattr, fid.number).nlink == 0


@pytest.mark.parametrize("who", ["reclaimer", "leaver"])
def test_a_name_that_was_about_to_go_before_the_look_keeps_the_descriptor(
    source: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """It is still there at the look, and goes before the descriptor would."""
    make_files(source, 1)
    with few_descriptors(source, 1000) as client:
        fids = client.session.fids
        (fid,) = look_up_all(client)
        fid.node.recent = False
        cold = fids.coldest(1)
        assert cold == [fid.node]
        removing = Stepper(ops.unlinkat(client.session, ROOT, b"0000"))
        removing.before("_remove")

        def meanwhile(*args: Any) -> bool:
            removing.finish()
            return True

        if who == "reclaimer":
            monkeypatch.setattr(descriptors._Look, "leads_back", meanwhile)
            client.session.descriptors._let_go(cold, 1, fids.devices.own)
        else:
            monkeypatch.setattr(leaving, "has_names", meanwhile)
            leaving.Leaver(fids, lambda numbers: None)._leave(0, cold)
        removing.go()
        assert fid.node.fd >= 0
        assert client.do(ops.getattr, fid.number).nlink == 0


def test_a_name_that_cannot_be_looked_at_keeps_the_descriptor(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error says nothing about where the name leads."""
    make_files(source, 1)

    def broken(fd: int, name: bytes) -> Attributes:
        raise OSError(errno.EIO, "broken")

    with few_descriptors(source, 1000) as client:
        (fid,) = look_up_all(client)
        monkeypatch.setattr(descriptors, "_stat_cached", broken)
        reclaim(client, fid)
        assert fid.node.fd >= 0


def test_a_file_that_cannot_be_asked_for_its_names_keeps_no_other_from_being_left(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its own descriptor; the leaver lets go of it as of the others, and says so."""
    make_files(source, 5)
    with few_descriptors(source, 1000) as client:
        fids = look_up_all(client)
        for fid in fids:
            fid.node.recent = False
        nodes = client.session.fids.coldest(5)
        assert set(nodes) == {fid.node for fid in fids}
        bad = nodes[1].fd

        def asked(fd: int) -> bool:
            if fd == bad:
                raise OSError(errno.EIO, "broken")
            return True

        said: list[tuple[object, ...]] = []
        monkeypatch.setattr(leaving, "has_names", asked)
        monkeypatch.setattr(leaving.log, "warning", lambda *words: said.append(words))
        leaving.Leaver(client.session.fids, lambda numbers: None)._leave(0, nodes)
        assert [node.fd for node in nodes] == [-1, bad, -1, -1, -1]
        assert len(said) == 1
        client.check_idle()


@pytest.mark.parametrize("how", ["unlinked", "replaced", "directory", "parent gone", "parent file"])
def test_a_reclaimed_file_that_has_gone_is_stale(source: Path, how: str) -> None:
    """By somebody else's hand: ESTALE, for then the kernel walks the path again."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        reclaim(client, file)
        reclaim(client, directory)
        assert client.session.fids.descriptors == 1
        (source / "d" / "file").rename(source / "kept")  # its inode number stays taken
        if how == "replaced":
            (source / "d" / "file").write_bytes(b"other")
        elif how == "directory":
            (source / "d" / "file").mkdir()
        elif how in ("parent gone", "parent file"):
            (source / "d").rmdir()
            if how == "parent file":
                (source / "d").touch()
        for _ in range(2):
            with fails(errno.ESTALE):
                client.do(ops.getattr, file.number)
        client.do(ops.getattr, ROOT)
        if how in ("replaced", "directory"):
            again = client.know("file", start=directory.number)
            assert again is not file
            assert client.do(ops.getattr, again.number).size != 4


def test_errors_of_opening_again_are_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not taken for a file that has gone; and the next try may do."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"data")
    with few_descriptors(source, 1000) as client:
        directory = client.know("d")
        file = client.know("file", start=directory.number)
        descriptors = client.session.descriptors
        places = ((descriptors, "_open_step"), (module_of(Descriptors), "stat_descriptor"))
        for where, name in places:
            real = getattr(where, name)
            for good in range(2):
                reclaim(client, file)
                reclaim(client, directory)
                calls: list[Any] = []

                def breaking(
                    *args: Any, real: Any = real, good: int = good, calls: list[Any] = calls
                ) -> Any:
                    calls.append(args)
                    if len(calls) > good:
                        raise OSError(errno.EMFILE, "no more")
                    return real(*args)

                with monkeypatch.context() as patch:
                    patch.setattr(where, name, breaking)
                    with fails(errno.EMFILE):
                        client.do(ops.getattr, file.number)
                assert len(calls) == good + 1
                client.check_idle()
        assert client.do(ops.getattr, file.number).size == 4


def test_of_two_who_open_a_node_again_the_second_closes(source: Path) -> None:
    """Both have opened the file; the node keeps one descriptor (leak_free counts)."""
    make_files(source, 1)
    with few_descriptors(source, 1000) as client:
        (fid,) = look_up_all(client)
        reclaim(client, fid)
        assert fid.node.fd == -1
        first = Stepper(ops.getattr(client.session, fid.number))
        second = Stepper(ops.statfs(client.session, fid.number))
        first.before("reopen")
        second.before("reopen")
        second.finish()
        kept = fid.node.fd
        assert kept >= 0
        first.finish()
        assert fid.node.fd == kept
        client.rest()
        assert client.session.fids.descriptors == 2


def test_what_is_being_renamed_can_be_used_meanwhile(source: Path) -> None:
    """Between the two names there would be nothing to open: it is opened before."""
    make_files(source, 2)
    with few_descriptors(source, 1000) as client:
        fid, _ = look_up_all(client)
        reclaim(client, fid)
        moving = Stepper(ops.renameat(client.session, ROOT, b"0000", ROOT, b"0001"))
        moving.after("_rename")
        assert client.do(ops.getattr, fid.number).size == 0
        moving.finish()
        assert client.place(fid.number)[1] == b"0001"


def test_opening_again_is_tried_again_after_a_rename(source: Path) -> None:
    """It had begun with the old name, before the file was kept open."""
    make_files(source, 1)
    with few_descriptors(source, 1000) as client:
        (fid,) = look_up_all(client)
        reclaim(client, fid)
        (source / "0000").rename(source / "elsewhere")
        asking = Stepper(ops.getattr(client.session, fid.number))
        asking.after("reopen")  # which has failed
        (source / "elsewhere").rename(source / "0000")
        client.do(ops.renameat, ROOT, b"0000", ROOT, b"0001")
        assert asking.finish().size == 0
        assert asking.calls.count("reopen") == 2


def test_reclaiming_waits_for_nobody_who_uses_names(source: Path) -> None:
    """A walk that is stuck in a slow directory must not hold it up, and all names behind it."""
    make_files(source, 40)
    with few_descriptors(source, 1000) as client:
        fids = look_up_all(client)
        walking = Stepper(ops.walk(client.session, ROOT, client.new(), [b"0000"]))
        walking.before("_step")
        for fid in fids:
            fid.node.recent = False
        client.session.descriptors.most = 16
        Stepper(client.session.descriptors._reclaim()).finish()
        assert client.session.fids.descriptors == 12
        walking.finish()


def test_a_name_that_is_going_away_keeps_its_nodes_descriptor(source: Path) -> None:
    """Between the look at the name and its removal nobody may reclaim it."""
    make_files(source, 40)
    with few_descriptors(source, 1000) as client:
        fids = look_up_all(client)
        removing = Stepper(ops.unlinkat(client.session, ROOT, b"0003"))
        removing.before("_remove")
        for fid in fids:
            fid.node.recent = False
        client.session.descriptors.most = 8
        Stepper(client.session.descriptors._reclaim()).finish()
        removing.finish()
        (gone,) = [fid for fid in fids if fid.node.place and fid.node.place[1] == b"0003"]
        assert gone.node.fd >= 0
        assert client.do(ops.getattr, gone.number).nlink == 0


def test_what_cannot_be_reclaimed_is_not_looked_at_for_every_lookup(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are walked to by their clients: the next look comes when an eighth more have been."""
    make_files(source, 64)
    with few_descriptors(source, 32) as client:
        for name in sorted(os.listdir(source))[:40]:
            client.walk(name)
        looks: list[int] = []
        real = client.session.fids.coldest

        def counting(most: int, *where: Any) -> list[Node]:
            looks.append(most)
            return real(most, *where)

        monkeypatch.setattr(client.session.fids, "coldest", counting)
        for name in sorted(os.listdir(source))[40:]:
            client.walk(name)
        assert 0 < len(looks) <= 24 // (32 // 8) + 1


def test_directories_below_each_other_are_stale_rather_than_endless(source: Path) -> None:
    """One that was mounted below itself is remembered below itself."""
    (source / "a" / "b").mkdir(parents=True)
    with few_descriptors(source, 1000) as client:
        a = client.know("a")
        b = client.know("b", start=a.number)
        for fid in (b, a):
            reclaim(client, fid)
        a.node.place = b.node, b"a"
        for fid in (a, b):
            with fails(errno.ESTALE):
                client.do(ops.getattr, fid.number)
        assert client.know("a") is a
        assert client.do(ops.getattr, b.number).kind == stat.S_IFDIR


@needs_root
def test_a_root_that_is_mounted_below_itself(source: Path) -> None:
    """It is another directory there, with the same files; it is not removed."""
    (source / "below").mkdir()
    (source / "file").touch()
    try:
        subprocess.run(["mount", "--bind", source, source / "below"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    try:
        with few_descriptors(source, 1000) as client:
            below = client.know("below")
            assert below is not client.fid(ROOT)
            assert is_on_own_device(below.number)
            assert client.node(ROOT).place is None
            assert client.know("..") is client.know("below", "..") is client.fid(ROOT)
            for number in (ROOT, below.number):
                with fails(errno.EBUSY):
                    client.do(ops.remove, client.walk(start=number))
            assert client.know("below", "file") is client.know("file")
            reclaim(client, below)
            assert client.do(ops.getattr, below.number).ino == source.stat().st_ino
    finally:
        subprocess.run(["umount", source / "below"], check=True)


@needs_root
def test_a_file_that_overlayfs_copies_up_is_the_same_file(tmp_path: Path) -> None:
    """Its birth changes with the first write; its fid, its generation and its use do not."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "d").mkdir()
    (tmp_path / "lower" / "d" / "file").write_bytes(b"low")
    layers = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    try:
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, tmp_path / "merged"],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("overlayfs cannot be mounted here")
    try:
        with few_descriptors(tmp_path / "merged", 1000) as client:
            directory = client.know("d")
            file = client.know("file", start=directory.number)
            born = client.do(ops.getattr, file.number).birth
            writing = client.walk(start=file.number)
            client.do(ops.lopen, writing, os.O_WRONLY | os.O_APPEND)
            client.do(ops.write, writing, 0, b"up")
            assert client.do(ops.getattr, file.number).birth != born
            client.do(ops.clunk, writing)
            assert client.know("d") is directory
            assert client.know("d", "file") is file
            assert (directory.generation, file.generation) == (0, 0)
            reclaim(client, file)
            assert file.node.fd == -1
            assert client.do(ops.getattr, file.number).size == 5
            client.do(ops.rename, file.number, ROOT, b"moved")
            client.do(ops.remove, client.walk("moved"))
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)


def test_a_descriptor_that_comes_and_goes_takes_no_room(source: Path) -> None:
    """One file is all that can be reclaimed, and is used again each time."""
    make_files(source, 8)
    with few_descriptors(source, 6) as client:
        *held, thrashed = look_up_all(client)
        for fid in held:
            client.do(ops.getattr, client.walk(start=fid.number))
        losses: Counter[bool] = Counter()
        for _ in range(400):
            client.do(ops.getattr, thrashed.number)
            client.session.descriptors.note()
            client.rest()
            losses[thrashed.node.fd == -1] += 1
        assert losses[True] > 100, "it was not reclaimed again and again"
        assert len(client.session.fids._clock) <= 100
        assert len(client.session.fids) == 1 + 8 + 7


# The limit

LIMIT = 95  # on open files: 60 of them are to share, 5 at least for nodes


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


def open_all(client: Client, count: int) -> list[int]:
    """Open files until that is refused; the open fids."""
    opened: list[int] = []
    for number in range(count):
        fid = client.walk(f"{number:04d}")
        try:
            client.do(ops.lopen, fid, os.O_RDONLY)
        except OSError as error:
            assert error.errno == errno.ENFILE  # noqa: PT017
            client.do(ops.clunk, fid)
            return opened
        opened.append(fid)
    raise AssertionError("there is no end of descriptors")


def _to_wait(body: Body[Any]) -> Command | None:
    """Run a body until it waits for something; None: it has ended."""
    value: Any = None
    error: OSError | None = None
    while True:
        try:
            command = body.send(value) if error is None else body.throw(error)
        except StopIteration:
            return None
        if not isinstance(command, Call):
            return command  # type: ignore[no-any-return]
        value = error = None
        try:
            value = command.make()
        except OSError as e:
            error = e


def test_who_opens_waits_for_what_is_about_to_be_closed(source: Path) -> None:
    """A file that was closed has its descriptor until a worker comes to it, which may be busy."""
    make_files(source, 100)
    with limited(source) as client:
        opened = open_all(client, 100)
        last = client.walk("0099")
        Stepper(ops.clunk(client.session, opened.pop())).finish()  # by nobody who closes for it
        opening = ops.lopen(client.session, last, os.O_RDONLY)
        for tries in range(3):
            assert isinstance(_to_wait(opening), Later), tries
        client.executor.deferred.make_all()
        assert _to_wait(opening) is None
        assert in_use(client) <= 60
        client.do(ops.clunk, last)


def test_open_files_take_what_nodes_can_do_without(source: Path) -> None:
    """The more are open the fewer nodes have one; never are there more than there may be."""
    make_files(source, 100)
    with limited(source) as client:
        known = [client.know(f"{number:04d}") for number in range(60, 100)]
        before = client.session.fids.descriptors
        assert before >= 35
        opened = [client.open(f"{number:04d}") for number in range(20)]
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
        assert len(opened) == 55, "each lends its own to its node"
        assert in_use(client) <= 60
        with fails(errno.ENFILE):
            for number in range(5):  # the one just refused has left a little room
                opened.append(client.create(f"new{number}", b"x" * len(opened)))
        assert not (source / f"new{number}").exists(), "refused before it was made"
        truncated = client.walk("0000")
        with fails(errno.ENFILE):
            client.do(ops.lopen, truncated, os.O_WRONLY | os.O_TRUNC)
        client.do(ops.clunk, truncated)
        for number in range(40, 100):
            name = b"%04d" % number
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
        client.open("0000")


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
            here = [client.know(f"{number:04d}") for number in range(25)]
            top = client.know("below").number
            there = [client.know(f"{number:04d}", start=top) for number in range(25)]
            client.session.descriptors._reclaiming = True  # it hangs somewhere
            more = [client.know(f"{number:04d}", start=top) for number in range(25, 40)]
            assert all(fid.node.fd >= 0 for fid in here), "nobody who was looking below"
            assert sum(fid.node.fd >= 0 for fid in (*there, *more)) < 40
            assert in_use(client) <= 60


def test_a_reclaimer_that_hangs_lets_nothing_pile_up(source: Path) -> None:
    """Whoever opens something makes room for it, whether or not anybody did so before."""
    make_files(source, 200)
    with limited(source) as client:
        for number in range(50):
            client.know(f"{number:04d}")
        client.session.descriptors.most = 20
        hanging = Stepper(client.session.descriptors._reclaim())
        hanging.before("_lend_or_close")
        client.session.descriptors._reclaiming = True
        client.session.descriptors.most = 16384
        for number in range(50, 200):
            client.know(f"{number:04d}")
            assert in_use(client) <= 61
        hanging.finish()


def test_what_has_no_name_any_more_keeps_its_descriptor(source: Path) -> None:
    """It is the only way to the file: those go first that can be opened again."""
    make_files(source, 120)
    with limited(source) as client:
        gone = [client.know(f"{number:04d}") for number in range(30)]
        for number in range(30):
            client.do(ops.unlinkat, ROOT, b"%04d" % number)
        for number in range(30, 120):
            client.know(f"{number:04d}")
            assert in_use(client) <= 61
        assert [client.do(ops.getattr, fid.number).nlink for fid in gone] == [0] * 30


def test_files_that_were_linked_and_unlinked_are_reclaimed(source: Path) -> None:
    """As mail and git make them: under one name, linked to another, the first one removed."""
    with limited(source) as client:
        for number in range(150):
            handle = client.create("temporary", b"x")
            fid = client.know(start=handle)
            client.do(ops.clunk, handle)
            linked, _ = client.do(callbacks.link, fid.number, ROOT, b"%d" % number)
            client.forget(linked)
            client.do(ops.unlinkat, ROOT, b"temporary")
            assert in_use(client) <= 61


def test_files_whose_known_names_went_are_reclaimed_at_last(source: Path) -> None:
    """Each has another name, by which it is found again: ESTALE has the kernel look for it."""
    (source / "kept").mkdir()
    (source / "gone").mkdir()
    with limited(source) as client:
        kept, gone = client.know("kept").number, client.know("gone").number
        known = []
        for number in range(150):
            name = b"%d" % number
            (source / "kept" / f"{number}").write_bytes(b"x" * number)
            os.link(source / "kept" / f"{number}", source / "gone" / f"{number}")
            known.append(client.know(name, start=gone))
            client.do(ops.unlinkat, gone, name)
            assert in_use(client) <= 62
        with fails(errno.ESTALE):
            for fid in known:
                client.do(ops.getattr, fid.number)
        for number, fid in enumerate(known):
            assert client.know(f"{number}", start=kept) is fid
            assert client.do(ops.getattr, fid.number).size == number
            assert in_use(client) <= 62


def test_one_who_makes_room_leaves_others_something_to_close(source: Path) -> None:
    """What it looks at is not to be had for others meanwhile, who need not be refused."""
    make_files(source, 60)
    with limited(source) as client:
        fids = client.session.fids
        for number in range(55):
            client.know(f"{number:04d}").node.recent = False
        for fid in fids._fids.values():
            fid.node.recent = False
        in_hand = fids.coldest(8, 64)
        fids.claim(60)
        fids.claim(60)
        for _ in range(5):
            client.session.descriptors.make_room_for_open(client.node(ROOT))
        assert len(in_hand) == 8
        for node in in_hand:
            fids.unpin(node)
        fids.unclaim()
        fids.unclaim()


def test_where_nothing_can_be_closed_a_lookup_is_refused_and_no_call_fails(source: Path) -> None:
    """ENFILE, which says what is the matter, before the limit itself is met."""
    make_files(source, 120)
    with limited(source) as client:
        gone = []
        with fails(errno.ENFILE):
            for number in range(120):
                gone.append(client.know(f"{number:04d}"))
                client.do(ops.unlinkat, ROOT, b"%04d" % number)
        assert 55 <= len(gone) <= 62
        assert in_use(client) <= 62
        assert client.do(ops.getattr, gone[0].number).nlink == 0
        client.forget(gone.pop())
        client.rest()
        client.forget(gone.pop())
        client.rest()
        client.know("0110")


@needs_root
def test_the_root_of_the_source_is_never_closed(source: Path) -> None:
    make_files(source, 100)
    with limited(source) as client:
        for number in range(100):
            client.know(f"{number:04d}")
        assert client.node(ROOT).fd >= 0
