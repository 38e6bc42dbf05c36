"""A client that believes for long what it was told: listings tell it of nothing twice."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from wire_kernel import Kernel, serving
from wire_messages import pack, request

from ninefuse.fuse.opcodes import Opcode

ROOT = 1
NAMES = {b"one", b"two", b"three"}
_ENTRY, _DIRENT = 128, struct.Struct("=QQII")  # bytes of fuse_entry_out; what comes after it


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    with serving(tmp_path, "none") as kernel:
        kernel.init()
        kernel.session.is_believed = True
        yield kernel


def listed(kernel: Kernel) -> dict[bytes, tuple[int, int]]:
    """The nodeid and the inode number of each name, as READDIRPLUS says them."""
    handle = int.from_bytes(kernel.get(Opcode.OPENDIR, pack("open_in", 0, 0), ROOT)[:8], "little")
    found: dict[bytes, tuple[int, int]] = {}
    offset = 0
    while said := kernel.get(
        Opcode.READDIRPLUS, pack("read_in", handle, offset, 4096, 0, 0, 0, 0), ROOT
    ):
        at = 0
        while at < len(said):
            nodeid = int.from_bytes(said[at : at + 8], "little")
            ino, offset, size, _ = _DIRENT.unpack_from(said, at + _ENTRY)
            start = at + _ENTRY + _DIRENT.size
            found[said[start : start + size]] = nodeid, ino
            at = start + (size + 7 & ~7)
    kernel.get(Opcode.RELEASEDIR, pack("release_in", handle, 0, 0, 0), ROOT)
    return {name: ids for name, ids in found.items() if name not in (b".", b"..")}


def test_what_is_known_is_not_told_again(kernel: Kernel) -> None:
    first = listed(kernel)
    assert first.keys() == NAMES
    assert all(nodeid for nodeid, _ in first.values())
    assert listed(kernel) == {name: (0, ino) for name, (_, ino) in first.items()}
    assert sum(fid.lookups for fid in kernel.session.fids._fids.values()) == len(NAMES)


def test_what_is_not_believed_is_told_each_time(kernel: Kernel) -> None:
    kernel.session.is_believed = False
    first = listed(kernel)
    assert all(nodeid for nodeid, _ in first.values())
    assert listed(kernel) == first


def test_what_was_forgotten_or_leads_elsewhere_is_told(kernel: Kernel, tmp_path: Path) -> None:
    first = listed(kernel)
    forget = pack("forget_in", 1)
    number, _ = first[b"one"]
    kernel.send(request(Opcode.FORGET, forget, unique=kernel.new_unique(), nodeid=number))
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "other").replace(tmp_path / "two")
    again = listed(kernel)
    assert again[b"one"] == first[b"one"]
    assert again[b"two"][0] not in (0, first[b"two"][0])
    assert again[b"three"][0] == 0


def test_a_second_name_of_a_file_is_told(kernel: Kernel, tmp_path: Path) -> None:
    """The one by which it was found last is known, and no other."""
    first = listed(kernel)
    (tmp_path / "second").hardlink_to(tmp_path / "one")
    again = listed(kernel)
    assert again[b"second"] == first[b"one"]
    assert listed(kernel)[b"second"][0] == 0


def test_a_name_that_was_moved_through_the_mount_is_known(kernel: Kernel) -> None:
    first = listed(kernel)
    kernel.get(Opcode.RENAME2, pack("rename2_in", ROOT, 0, 0) + b"one\0moved\0", ROOT)
    assert listed(kernel)[b"moved"] == (0, first[b"one"][1])
