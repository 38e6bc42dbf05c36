"""Marks: what tells a file from a later one that has its inode number."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from file_systems import image, mounted
from mounting import run
from ops_helpers import ROOT, Client, client_of, fails, made_up, needs_root
from ops_helpers import leak_free as leak_free

from ninefuse import ops
from ninefuse.fuse import callbacks
from ninefuse.fuse.entries import fitted, readdirplus
from ninefuse.linux.filesystems import FileSystem
from ninefuse.linux.syscalls import Attributes, stat_descriptor, stat_name
from ninefuse.tree.identity import Devices
from ninefuse.tree.places import hashed
from ninefuse.tree.table import Fid

pytestmark = [pytest.mark.usefixtures("leak_free"), needs_root]


@contextmanager
def source_of(way: str, base: Path) -> Iterator[Path]:
    """An ext4, whose inodes are too small for a birth time, or not; or below the source."""
    size = "256" if way == "births" else "128"
    options = ("-I", size, "-b", "1024", "-N", "64")
    with image("ext4", base, *options) as disk:
        (disk / "lost+found").rmdir()
        yield disk


def recreated(path: Path, number: int) -> bool:
    """Make files in a removed one's place until one has its inode number."""
    for attempt in range(64):
        path.write_bytes(b"later")
        if path.stat().st_ino == number:
            return True
        path.rename(path.with_name(f"not it {attempt}"))
    return False


def listed(client: Client, directory: int = ROOT) -> dict[bytes, Fid]:
    """What a listing with attributes finds."""
    clone = client.walk(start=directory)
    client.do(ops.lopen, clone, os.O_RDONLY)
    found: dict[bytes, Fid] = {}
    offset = 0
    while entries := client.do(readdirplus, clone, offset):
        fitted(client.session, clone, entries, len(entries))
        found |= {entry.name: entry.fid for entry in entries if entry.fid is not None}
        offset = entries[-1].offset
    client.do(ops.clunk, clone)
    return found


@pytest.mark.parametrize("known_by", ["a lookup", "a listing"])
@pytest.mark.parametrize("way", ["births", "handles", "handles, below"])
def test_a_file_without_descriptor_that_was_made_anew_is_stale(
    tmp_path: Path, way: str, known_by: str
) -> None:
    """Unlinked in the source and made again, with the same name and the same inode number."""
    with source_of(way, tmp_path) as disk:
        source = disk
        top: tuple[str, ...] = ()
        if way.endswith("below"):
            source, top = tmp_path, ("disk",)
        path = disk / "file"
        path.write_bytes(b"earlier")
        number = path.stat().st_ino
        with client_of(source) as client:
            directory = client.know(*top).number if top else ROOT
            if known_by == "a lookup":
                fid = client.know("file", start=directory)
                client.lose_descriptor(fid)
            else:
                fid = listed(client, directory)[b"file"]
            assert fid.node.fd == -1
            assert client.do(ops.getattr, fid.number).size == 7, "it is there, and the same"
            client.lose_descriptor(fid)
            path.unlink()
            assert recreated(path, number), "the file system did not give the number again"
            for _ in range(2):
                with fails(errno.ESTALE):
                    client.do(ops.getattr, fid.number)
            # By its name there is another file, which the kernel is told by the generation.
            generation = fid.generation
            again = (
                client.know("file", start=directory)
                if known_by == "a lookup"
                else listed(client, directory)[b"file"]
            )
            assert (again.number, again.generation) == (fid.number, generation + 1)
            assert client.do(ops.getattr, again.number).size == 5


def test_a_name_that_goes_away_is_another_files_by_now(tmp_path: Path) -> None:
    """The node that lost its file does not get the descriptor of the one that is removed."""
    with source_of("handles", tmp_path) as disk:
        path = disk / "file"
        path.write_bytes(b"earlier")
        number = path.stat().st_ino
        with client_of(disk) as client:
            fid = client.know("file")
            client.lose_descriptor(fid)
            path.unlink()
            assert recreated(path, number)
            client.do(ops.unlinkat, ROOT, b"file")
            assert fid.node.fd == -1
            with fails(errno.ESTALE):
                client.do(ops.getattr, fid.number)


def test_a_device_number_may_come_to_be_another_file_systems(tmp_path: Path) -> None:
    """What tells files apart is found out anew wherever a walk comes to a device."""
    devices = Devices()
    with mounted("tmpfs", "tmpfs", tmp_path / "memory") as memory:
        (memory / "file").touch()
        directory = os.open(memory, os.O_PATH)
        try:
            a = stat_name(directory, b"file")
            assert devices.mark(a, directory, b"file") == a.birth > 0, "learned where it is met"
            devices.learn(directory, stat_descriptor(directory))
            before = devices.of(a)
            devices.learn(directory, stat_descriptor(directory))
            assert devices.of(a) is before
            devices.learn(directory, stat_descriptor(directory)._replace(mask=0x7FF))
            rights = (a.uid, a.gid, a.mode)
            assert devices.mark(a, directory, b"file") == rights, "no births, nor lasting handles"
        finally:
            os.close(directory)


# Where nothing tells a file from a later one: by whose it is, and what it allows


@pytest.fixture
def without_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client of a source whose file system keeps neither births nor lasting handles."""
    (tmp_path / "source").mkdir()
    monkeypatch.setattr(Attributes, "has_birth", False)
    monkeypatch.setattr(FileSystem, "has_lasting_handles", False)
    with client_of(tmp_path / "source") as client:
        yield client


def other_owner(path: Path) -> None:
    os.chown(path, 4321, -1)


def other_group(path: Path) -> None:
    os.chown(path, -1, 4321)


def other_mode(path: Path) -> None:
    path.chmod(0o2700)


@pytest.mark.parametrize("change", [other_owner, other_group, other_mode])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_opened_again_must_be_as_open_as_it_was(
    without_marks: Client, kind: str, change: Callable[[Path], None]
) -> None:
    """The kernel let the caller in by what it was told; ESTALE has it look again."""
    client, path = without_marks, without_marks.source / "name"
    path.touch() if kind == "file" else path.mkdir()
    fid = client.know("name")
    client.lose_descriptor(fid)
    change(path)
    clone = client.walk(start=fid.number)
    with fails(errno.ESTALE):
        client.do(ops.lopen, clone, os.O_RDONLY)
    assert fid.node.fd == -1
    if kind == "file" or change is other_owner:
        with fails(errno.ESTALE):
            client.do(ops.getattr, fid.number)
    generation = fid.generation
    again = client.know("name")
    assert again is fid
    # Of another owner it is another file; else the kernel learns what has changed.
    assert fid.generation == generation + (change is other_owner)
    client.do(ops.clunk, clone)
    client.lose_descriptor(fid)
    client.do(ops.clunk, client.open("name"))


@pytest.mark.parametrize("change", [other_group, other_mode])
def test_a_directory_that_is_held_is_found_again_by_a_look_at_it(
    without_marks: Client, change: Callable[[Path], None]
) -> None:
    """Somebody's working directory: the kernel asks for attributes before it lets him in."""
    client, path = without_marks, without_marks.source / "name"
    path.mkdir()
    (path / "file").touch()
    fid = client.know("name")
    client.lose_descriptor(fid)
    change(path)
    assert client.do(ops.getattr, fid.number).gid == path.stat().st_gid
    client.lose_descriptor(fid)
    client.do(ops.clunk, client.walk("file", start=fid.number))


def test_what_is_changed_through_the_mount_stays_known(without_marks: Client) -> None:
    """With or without a descriptor, and files in a directory that was changed in the source."""
    client, path = without_marks, without_marks.source / "directory"
    path.mkdir()
    (path / "file").touch()
    directory = client.know("directory")
    file = client.know("file", start=directory.number)
    for number in (file.number, directory.number):
        for changes in (ops.Changes(mode=0o600), ops.Changes(gid=77), ops.Changes(uid=78)):
            client.run(callbacks.setattr(client.session, number, None, changes))
            client.lose_descriptor(client.fid(number))
            assert client.do(ops.getattr, number).uid == (78 if changes.uid else 0)
            client.lose_descriptor(client.fid(number))
            client.do(ops.lopen, clone := client.walk(start=number), os.O_RDONLY)
            client.do(ops.clunk, clone)
    client.lose_descriptor(file)
    client.lose_descriptor(directory)
    path.chmod(0o711)
    assert client.do(ops.getattr, file.number).mode == stat.S_IFREG | 0o600


def test_attributes_of_what_a_listing_found_are_not_believed(without_marks: Client) -> None:
    """Until the file has a descriptor; nor if they are not what it was seen with."""
    client, path = without_marks, without_marks.source / "name"
    path.touch()
    listed(client)
    fid = client.fid(path.stat().st_ino)
    a = stat_name(-100, os.fsencode(path))
    assert not fid.node.may_be_believed(a)
    assert client.know("name") is fid
    assert fid.node.may_be_believed(a)
    path.chmod(0o604)
    a = stat_name(-100, os.fsencode(path))
    assert listed(client)[b"name"] is fid
    assert not fid.node.may_be_believed(a), "it may be a later file that was seen"
    client.know("name")
    assert fid.node.may_be_believed(a), "opened by its name, it is the same"
    client.forget(fid, 4)


def test_another_owners_file_is_not_joined_to_one_without_descriptor(
    without_marks: Client,
) -> None:
    """A listing finds it, under the number of one that was listed before."""
    client, path = without_marks, without_marks.source / "name"
    path.touch()
    fid = listed(client)[b"name"]
    other_mode(path)
    assert listed(client)[b"name"].generation == 0
    other_owner(path)
    assert listed(client)[b"name"] is fid
    assert fid.generation == 1
    assert client.do(ops.getattr, fid.number).uid == 4321


def test_of_many_rights_few_objects_are_kept() -> None:
    """Any owner may make up any number of them."""
    devices = Devices()
    for number in range(5000):
        one = devices.rights(made_up(3)._replace(gid=number))
        assert devices.rights(made_up(4)._replace(gid=number)) is one
    assert len(devices._rights) <= 1000


def test_what_a_file_system_is_known_by_stays_the_same(tmp_path: Path) -> None:
    """From one version to the next, too: all numbers of its files are made from it."""
    source, devices = tmp_path / "source", Devices()
    with (
        mounted("tmpfs", "tmpfs", source / "z/memory") as memory,
        mounted("tmpfs", "tmpfs", source / "other") as other,
        image("ext4", tmp_path) as disk,
    ):
        assert run("mount", "--bind", memory, other).returncode == 0
        fds = [os.open(path, os.O_PATH) for path in (source, memory, other, disk)]
        try:
            devices.begin(fds[0], stat_descriptor(fds[0]))
            found = [devices.learn(fd, stat_descriptor(fd)).base for fd in fds[1:]]
            id_of_disk = os.fstatvfs(fds[3]).f_fsid
        finally:
            for fd in fds:
                os.close(fd)
            run("umount", other)
        # Of two places the first in order, by whichever it was come to.
        assert found == [*[hashed(b"at other +0")] * 2, hashed(b"id ef53 %x" % id_of_disk)]
