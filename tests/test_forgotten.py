"""Files that are found by their inodes' numbers: counted, reclaimed, opened again."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from file_systems import image, mounted
from mounting import errno_of, in_child, is_mounted, run
from ops_helpers import ROOT, Client, client_of, fails, needs_root, outcome
from ops_helpers import leak_free as leak_free

from ninefuse import ops
from ninefuse.fuse import callbacks, forgotten
from ninefuse.fuse.entries import fitted, readdirplus
from ninefuse.fuse.shown import Shown
from ninefuse.linux import inodes, mountflags
from ninefuse.linux.capabilities import (
    CAP_DAC_READ_SEARCH,
    CAP_SYS_ADMIN,
    get_capabilities,
    set_capabilities,
)
from ninefuse.linux.inodes import inodes_of
from ninefuse.linux.syscalls import stat_descriptor, stat_name
from ninefuse.settings import Settings
from ninefuse.tree.identity import Born
from ninefuse.tree.table import Fid

pytestmark = [pytest.mark.usefixtures("leak_free"), needs_root]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with image("ext4", tmp_path, size=16 << 20) as top:
        yield top


@contextmanager
def finder(top: Path, **options: Any) -> Iterator[Client]:
    """A client of a whole file system that asks again for what it has forgotten."""
    fd = os.open(top, os.O_PATH)
    inodes = inodes_of(fd)
    os.close(fd)
    assert inodes is not None
    try:
        with client_of(top, **options) as client:
            client.do(ops.version, ops.MAX_MSIZE, ops.VERSION)
            client.session.fids.devices.inodes = inodes
            client.do(ops.attach, ROOT, str(top))
            yield client
    finally:
        inodes.close()


def find(client: Client, path: Path) -> Fid:
    fid, attributes = client.do(callbacks.lookup, path.lstat().st_ino, b".")
    assert attributes.ino == fid.number == path.lstat().st_ino
    return fid


def reclaimed(client: Client, *fids: Fid) -> int:
    """How many of them lose their descriptors, where all that can lose theirs."""
    for fid in fids:
        fid.node.recent = False
    client.session.descriptors._close_coldest(1 << 30)
    return sum(fid.node.fd < 0 for fid in fids)


@pytest.mark.parametrize(
    ("kind", "words", "without", "has"),
    [
        ("ext4", (), 0, True),
        ("ext4", (), CAP_SYS_ADMIN, True),
        ("ext4", (), CAP_DAC_READ_SEARCH, False),
        ("ext4", ("-I", "128"), 0, False),  # no births
        ("xfs", (), 0, True),
        ("xfs", (), CAP_SYS_ADMIN, False),  # no generations
    ],
)
def test_whose_inodes_are_found(
    tmp_path: Path, kind: str, words: tuple[str, ...], without: int, has: bool
) -> None:
    def are_found(top: Path) -> bool:
        c = get_capabilities()
        set_capabilities(c._replace(effective=c.effective & ~without))
        return inodes_of(os.open(top, os.O_PATH)) is not None

    with image(kind, tmp_path, *words) as top:
        assert in_child(are_found, top) is has


def test_lookups_are_counted(disk: Path) -> None:
    """Of what was forgotten, and of what is known still."""
    (disk / "file").write_bytes(b"x")
    with finder(disk) as client:
        fid = find(client, disk / "file")
        assert fid.lookups == 1
        assert find(client, disk / "file") is fid
        assert client.know("file") is fid
        assert fid.lookups == 3
        client.forget(fid, 2)
        assert client.has(fid.number)
        client.forget(fid)
        assert not client.has(fid.number)
        (disk / "file").unlink()
        with fails(errno.ESTALE):
            client.do(forgotten.find, fid.number)
        assert len(client.session.fids) == 1


def test_what_is_removed_while_it_is_known(disk: Path) -> None:
    (disk / "file").write_bytes(b"x")
    with finder(disk) as client:
        fid = client.know("file")
        (disk / "file").unlink()
        with fails(errno.ESTALE):
            client.do(forgotten.find, fid.number)
        assert fid.lookups == 1
        client.forget(fid)
        assert not client.has(fid.number)


def test_the_directory_above(disk: Path) -> None:
    """Asked of the source; never that of the root, nor of a file."""
    (disk / "a" / "b").mkdir(parents=True)
    (disk / "file").touch()
    with finder(disk) as client:
        below = find(client, disk / "a" / "b")
        above, _ = client.do(callbacks.lookup, below.number, b"..")
        assert (above.number, above.lookups) == ((disk / "a").stat().st_ino, 1)
        root, attributes = client.do(callbacks.lookup, above.number, b"..")
        assert (root.number, root.generation) == (ROOT, 0)
        assert attributes.ino == disk.stat().st_ino
        with fails(errno.ESTALE):
            client.do(callbacks.lookup, ROOT, b"..")
        with fails(errno.ENOTDIR):
            client.do(callbacks.lookup, find(client, disk / "file").number, b"..")
        with fails(errno.ESTALE):
            client.do(callbacks.lookup, disk.stat().st_ino, b".")


def test_the_generation_is_one_however_it_is_found(disk: Path) -> None:
    (disk / "file").write_bytes(b"x")
    with finder(disk) as client:
        seen = []
        fid = client.know("file")
        seen.append(fid.generation)
        client.forget(fid)
        fid = find(client, disk / "file")
        seen.append(fid.generation)
        client.forget(fid)
        handle = client.open()
        entries = client.do(readdirplus, handle, 0)
        seen += [entry.fid.generation for entry in entries if entry.fid and entry.name == b"file"]
        fitted(client.session, handle, entries, 0)
        client.do(ops.clunk, handle)
        _, fid, _ = client.do(callbacks.create, ROOT, b"other", os.O_RDWR, 0o644)
        other = fid.generation
        client.forget(fid)
        assert find(client, disk / "other").generation == other
        assert len(set(seen)) == 1
        assert len(seen) == 3
        assert other not in (0, *seen)


def test_a_name_that_is_another_files_by_now(disk: Path) -> None:
    """No file is told apart by another's generation."""
    for name in ("one", "two"):
        (disk / name).touch()
    with finder(disk) as client:
        devices, top = client.session.fids.devices, client.node(ROOT).fd
        a = stat_name(top, b"one")
        assert devices.mark(a, top, b"one") == client.know("one").node.mark
        with fails(errno.ESTALE):
            devices.mark(a, top, b"two")


def test_a_hidden_device_has_32_bits(tmp_path: Path) -> None:
    """As many as the kernel keeps of a generation; each device is another file than if shown."""
    settings = Settings(source=str(tmp_path), mountpoint=str(tmp_path))
    with image("ext4", tmp_path, size=16 << 20, options="nodev") as disk, finder(disk) as client:
        for number in range(16):  # half of which have the highest bit
            os.mknod(disk / f"{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
            fid, attributes = client.do(callbacks.lookup, ROOT, b"%d" % number)
            shown = Shown(client.session, settings).entry(fid, attributes)
            assert shown.generation == fid.generation
            client.session.fids.devices.hides = mountflags.HIDEABLE
            hidden = Shown(client.session, settings).entry(fid, attributes)
            client.session.fids.devices.hides = 0
            assert hidden.attributes.rdev != shown.attributes.rdev
            assert hidden.generation ^ shown.generation == 1 << 31
            assert 0 <= hidden.generation < 1 << 32


def test_descriptors_are_reclaimed(disk: Path) -> None:
    """Of what has no name here, too; it is opened again by its number."""
    names = [f"file{number}" for number in range(40)]
    for number, name in enumerate(names):
        (disk / name).write_bytes(b"x" * number)
    with finder(disk, most_descriptors=16) as client:
        fids = [find(client, disk / name) for name in names]
        client.rest()
        assert client.session.fids.descriptors <= 16
        for number, fid in enumerate(fids):
            assert client.do(ops.getattr, fid.number).size == number
        assert client.session.fids.descriptors <= 16


def test_one_without_a_name_keeps_its_descriptor(disk: Path) -> None:
    """So does one that is removed, and each while a mount covers a part of the source."""
    (disk / "file").write_bytes(b"x")
    (disk / "removed").write_bytes(b"x")
    (disk / "point").mkdir()
    with finder(disk) as client:
        file, removed = (find(client, disk / name) for name in ("file", "removed"))
        handle, nameless, _ = client.do(callbacks.tmpfile, ROOT, os.O_RDWR, 0o600)
        (disk / "removed").unlink()
        with mounted("tmpfs", "tmpfs", disk / "point"):
            assert reclaimed(client, file, nameless, removed) == 0
        assert reclaimed(client, file, nameless, removed) == 1
        assert file.node.fd < 0
        client.do(ops.getattr, file.number)
        client.do(ops.clunk, handle.number)


def test_a_file_that_was_moved_is_opened_by_its_number(disk: Path) -> None:
    """And the file that has its name now is not; one that is gone is stale."""
    (disk / "file").write_bytes(b"x")
    with finder(disk) as client:
        fid = client.know("file")
        client.lose_descriptor(fid)
        (disk / "file").rename(disk / "moved")
        (disk / "file").write_bytes(b"another")
        assert client.do(ops.getattr, fid.number).size == 1
        client.lose_descriptor(fid)
        with mounted("tmpfs", "tmpfs", disk / "lost+found"):
            assert outcome(lambda: client.do(ops.getattr, fid.number)) == "ESTALE"
        with open(disk / "moved", "rb"):  # so that its inode stays
            (disk / "moved").unlink()
            assert outcome(lambda: client.do(ops.getattr, fid.number)) == "ESTALE"


def test_a_name_is_remembered(disk: Path) -> None:
    """Of who was found by the number, once it is seen; of who has one, when that is asked for."""
    (disk / "a").mkdir()
    (disk / "a" / "file").write_bytes(b"x")
    with finder(disk) as client:
        fid = find(client, disk / "a" / "file")
        assert fid.node.place is None
        client.know("a", "file")
        place = client.place(fid.number)
        assert place == ((disk / "a").stat().st_ino, b"file")
        node, _ = forgotten._find(client.session, client.node(ROOT), fid.number)
        assert node is not fid.node
        forgotten._intern(client.session, node)
        assert client.place(fid.number) == place


def test_none_is_found_once_the_source_was_taken_away(disk: Path) -> None:
    """What is mounted in it stays where it was, and no table tells of it."""
    (disk / "file").write_bytes(b"x")
    (disk / "point").mkdir()
    number = (disk / "file").stat().st_ino
    with finder(disk) as client:
        client.forget(find(client, disk / "file"))
        run("mount", "-t", "tmpfs", "tmpfs", disk / "point")
        run("umount", "-l", disk)
        assert not is_mounted(disk)
        with fails(errno.ESTALE):
            client.do(forgotten.find, number)


def test_the_generation_tells_files_of_one_birth_apart(disk: Path) -> None:
    """Files that had one number within a tick of the clock are as old as each other."""
    (disk / "file").write_bytes(b"x")
    with finder(disk) as client:
        fid = client.know("file")
        old, born = fid.node, fid.node.mark
        assert type(born) is Born
        assert fid.generation == born.generation
        a = stat_descriptor(old.fd)
        later = client.session.fids.new_node(a, -1, None, born._replace(generation=77))
        assert client.session.kernel.intern(later) is fid
        assert (fid.node, fid.generation) == (later, 77)
        assert not later.shows(a, born), "so it is not opened as the other"
        assert later.shows(a)
        client.session.fids.drop(later)


@pytest.mark.parametrize(
    ("said", "told"), [(errno.ENOMEM, errno.ESTALE), (errno.EPERM, errno.EPERM)]
)
def test_a_number_that_a_file_is_just_being_given_is_stale(
    disk: Path, monkeypatch: pytest.MonkeyPatch, said: int, told: int
) -> None:
    """The kernel has no memory for it then, it says."""

    def refused(*args: object) -> int:
        raise OSError(said, "not now")

    fd = os.open(disk, os.O_PATH)
    found = inodes_of(fd)
    os.close(fd)
    assert found is not None
    monkeypatch.setattr(inodes, "_open_by_handle_at", refused)
    try:
        assert errno_of(found.open, disk.stat().st_ino) == told
    finally:
        found.close()
