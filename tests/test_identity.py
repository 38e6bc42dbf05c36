"""Marks: what tells a file from a later one that has its inode number."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from file_systems import image, mounted
from ops_helpers import ROOT, Client, client_of, fails, needs_root
from ops_helpers import leak_free as leak_free

from ninefuse import ops
from ninefuse.fids import Fid
from ninefuse.identity import Devices
from ninefuse.ops.directory import fitted, readdirplus
from ninefuse.syscalls import stat_descriptor, stat_name

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
            assert devices.mark(a, directory, b"file") is None, "not learned"
            devices.learn(directory, stat_descriptor(directory))
            assert devices.mark(a, directory, b"file") == a.birth > 0
            before = devices.of(a)
            devices.learn(directory, stat_descriptor(directory))
            assert devices.of(a) is before
            devices.learn(directory, stat_descriptor(directory)._replace(mask=0x7FF))
            assert devices.mark(a, directory, b"file") is None, "no births, nor lasting handles"
        finally:
            os.close(directory)
