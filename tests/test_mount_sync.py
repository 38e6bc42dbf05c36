"""Synchronous writes (O_SYNC, O_DSYNC): one request each, durable by our own descriptor."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

import pytest
from mounting import (
    Mount,
    Place,
    Watchdog,
    done,
    errno_of,
    flags_of_descriptors,
    fresh_place,
    wait_until,
)

pytestmark = pytest.mark.soak

SYNC_FLAGS = [os.O_SYNC, os.O_DSYNC]


@pytest.mark.parametrize("sync", SYNC_FLAGS)
def test_a_synchronous_open_writes_through_a_descriptor_with_the_same_flags(
    place: Place, sync: int
) -> None:
    fd = os.open(place.path / "file", os.O_CREAT | os.O_WRONLY | sync, 0o600)
    try:
        assert [f & sync for f in flags_of_descriptors(place.mount.pid, place.source / "file")] == [
            sync
        ]
        os.write(fd, b"x" * 5000)
        assert (place.source / "file").read_bytes() == b"x" * 5000
    finally:
        os.close(fd)
    # The kernel tells the daemon of a close, and does not wait for it.
    wait_until(
        lambda: not flags_of_descriptors(place.mount.pid, place.source / "file"),
        "the end of the daemon's own descriptor",
    )
    again = os.open(place.path / "file", os.O_RDWR | sync)
    try:
        assert [f & sync for f in flags_of_descriptors(place.mount.pid, place.source / "file")] == [
            sync
        ]
    finally:
        os.close(again)


def test_an_ordinary_open_is_cached_and_not_synchronous(place: Place) -> None:
    with open(place.path / "file", "w+b") as file:
        file.write(b"12345678")
        file.flush()
        flags = flags_of_descriptors(place.mount.pid, place.source / "file")
        assert [f & os.O_SYNC for f in flags] == [0]
        mmap.mmap(file.fileno(), 8).close()


def test_a_synchronous_write_is_one_request(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount()
    fd = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY | os.O_SYNC, 0o600)
    try:
        before = [done(mount, name) for name in ("write", "fsync", "getxattr")]
        for _ in range(10):
            os.write(fd, b"x" * 4096)
        wait_until(lambda: done(mount, "write") == before[0] + 10, "the writes, counted")
        after = [done(mount, name) for name in ("write", "fsync", "getxattr")]
    finally:
        os.close(fd)
    assert [b - a for a, b in zip(before, after, strict=True)] == [10, 0, 0]


@pytest.mark.parametrize("option", ["osync=cached", "cache=none"])
def test_a_cached_synchronous_write_is_followed_by_an_fsync(
    new_mount: Callable[..., Mount], option: str
) -> None:
    mount = new_mount("-o", option)
    fd = os.open(mount.path / "file", os.O_CREAT | os.O_RDWR | os.O_SYNC, 0o600)
    try:
        before = done(mount, "fsync")
        os.write(fd, b"x" * 4096)
        # Counted a moment after it is answered.
        wait_until(lambda: done(mount, "fsync") == before + 1, "an fsync")
        flags = flags_of_descriptors(mount.pid, mount.source / "file")
        assert [f & os.O_SYNC for f in flags] == [0]  # the fsync is enough
        with mmap.mmap(fd, 4096) as mapping:
            mapping[:3] = b"abc"
    finally:
        os.close(fd)
    assert (mount.source / "file").read_bytes()[:4] == b"abcx"


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_APPEND])
def test_a_direct_open_cannot_be_mapped_shared_under_pyfuse3(
    shared_mounts: Callable[..., Mount], guard: Watchdog, flag: int
) -> None:
    with fresh_place(shared_mounts("--session", "pyfuse3")) as place:
        (place.source / "file").write_bytes(b"x" * 4096)
        fd = os.open(place.path / "file", os.O_RDWR | flag)
        try:
            assert errno_of(mmap.mmap, fd, 4096) == errno.ENODEV
            mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE).close()
        finally:
            os.close(fd)


@pytest.mark.parametrize("other", [os.O_WRONLY, os.O_WRONLY | os.O_APPEND])
@pytest.mark.parametrize("flag", [0, os.O_SYNC, os.O_APPEND])
def test_mapped_pages_are_written_in_their_place(place: Place, flag: int, other: int) -> None:
    """By whichever handle the kernel writes them back: one that appends, say."""
    (place.source / "file").write_bytes(b"x" * 8192)
    fd = os.open(place.path / "file", os.O_RDWR | flag)
    beside = os.open(place.path / "file", other)
    try:
        with mmap.mmap(fd, 8192) as mapped:
            mapped[:5] = b"first"
            mapped[4096:4100] = b"next"
            mapped.flush()
    finally:
        os.close(beside)
        os.close(fd)
    expected = b"first" + b"x" * 4091 + b"next" + b"x" * 4092
    assert (place.source / "file").read_bytes() == expected


def test_synchronous_and_ordinary_opens_of_one_file_see_each_other(place: Place) -> None:
    path = place.path / "file"
    path.write_bytes(b"a" * 8192)
    fd = os.open(path, os.O_RDWR | os.O_SYNC)
    try:
        with open(path, "r+b", buffering=0) as cached:
            assert cached.read(8192) == b"a" * 8192  # in the page cache now
            os.pwrite(fd, b"b" * 4096, 4096)
            assert os.pread(cached.fileno(), 8192, 0) == b"a" * 4096 + b"b" * 4096
            os.pwrite(cached.fileno(), b"c" * 100, 0)
            assert os.pread(fd, 200, 0) == b"c" * 100 + b"a" * 100
    finally:
        os.close(fd)
