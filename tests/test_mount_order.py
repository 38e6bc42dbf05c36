"""Requests that overtake each other on a mount: none is answered from before an earlier change."""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import RawArray, RawValue
from pathlib import Path
from typing import Any

import pytest
from mounting import PATIENCE, SOAK, Child, Mount, Place
from servers import SERVERS, options_of

pytestmark = pytest.mark.soak

PAGE = mmap.PAGESIZE
PAGES = 16
_SECONDS = 20.0 if SOAK else 1.0  # of each storm

# The command, whose changes are late: who makes them is late, or is given them late.
LATE = (
    sys.executable,
    "-c",
    """
import sys, threading, time
from functools import partial
from ninefuse import executor
from ninefuse.calls import Pwrite
from ninefuse.command import cli
from ninefuse.driving import uring
from ninefuse.fuse import leading
from ninefuse.linux import transfer
from ninefuse.ops import attributes, names

def say_so():
    print("it is on its way", file=sys.stderr, flush=True)

def make_late(module, name):
    function = getattr(module, name)

    def late(*args):
        say_so()
        time.sleep(0.3)
        return function(*args)

    setattr(module, name, late)

drivers = []

def create(*args, create=executor.create, **how):
    drivers.append(create(*args, **how))
    return drivers[-1]

def late_start(self, request, call, start=uring.Uring._write):
    say_so()
    begin = partial(drivers[0].dispatcher.post, partial(start, self, request, call))
    threading.Timer(0.3, begin).start()

class LateRole(leading.Role):
    def make(self, request, unique):
        if isinstance(request.call, Pwrite):
            say_so()
            self.leave()
            time.sleep(0.3)
            self.enter()
        return super().make(request, unique)

    def makes_ahead(self, foresee, for_user):
        pass  # which would be late in nothing; test_ahead.py has the order of these

    def hand(self, request, unique):
        if not isinstance(request.call, Pwrite):
            return super().hand(request, unique)
        say_so()
        threading.Timer(0.3, partial(super().hand, request, unique)).start()

leading.Role = LateRole
make_late(transfer, "write_fully")
for name in "_ftruncate", "_truncate":
    make_late(attributes, name)
for name in "_rename", "_remove":
    make_late(names, name)
uring.Uring._write = late_start
executor.create = create
sys.exit(cli.main())
""",
)
# The command, whose attributes are told late.
LATE_ATTRIBUTES = (
    sys.executable,
    "-c",
    """
import sys, time
from ninefuse.command import cli
from ninefuse.ops import attributes

def late(fd, look=attributes.stat_descriptor):
    found = look(fd)
    print("it is on its way", file=sys.stderr, flush=True)
    time.sleep(0.5)
    return found

attributes.stat_descriptor = late
sys.exit(cli.main())
""",
)


def pairs(*caches: str) -> list[tuple[str, str]]:
    """Each server with the first of these, one with each other; in a long run all with all.

    When an answer comes is the daemon's affair, what is remembered the kernel's.
    """
    return [
        (server, cache)
        for cache in caches
        for server in (SERVERS if SOAK or cache == caches[0] else ["second, threads"])
    ]


@contextmanager
def _on_its_way(
    mount: Mount, function: Callable[..., object], *args: object
) -> Iterator[Child[Any]]:
    """A process makes a change, and the daemon has begun it, but does it later."""
    since = mount.log.size()
    with Child(function, *args) as child:
        mount.log.wait_for("it is on its way", since)
        yield child


def _write(path: Path, *pages: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    for page in pages:
        os.pwrite(fd, page, 0)
    os.close(fd)


@pytest.mark.parametrize("how", ["pread", "mmap"])
@pytest.mark.parametrize(("server", "cache"), pairs("auto", "loose", "none"))
def test_a_page_that_is_dropped_during_a_write_is_read_as_written(
    new_place: Callable[..., Place], server: str, cache: str, how: str
) -> None:
    """What write(2) has put into the cache is what whoever reads it sees, then and later.

    The first write makes the kernel ask for attributes, which then show it that the file has
    changed: so it drops the page, while the second write of it is on its way.
    """
    place = new_place("-o", f"cache={cache}", *options_of(server), command=LATE)
    path = place.path / "file"
    (place.source / "file").write_bytes(b"0" * PAGE)
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, PAGE, prot=mmap.PROT_READ)

    def seen() -> bytes:
        return os.pread(fd, PAGE, 0) if how == "pread" else mapped[:]

    try:
        assert seen() == b"0" * PAGE
        _write(path, b"1" * PAGE)
        with _on_its_way(place.mount, _write, path, b"2" * PAGE) as writer:
            os.stat(path)
            during = seen()
            writer.result()
        assert (during, seen()) == (b"2" * PAGE, b"2" * PAGE)
        os.stat(path)
        assert seen() == b"2" * PAGE
    finally:
        mapped.close()
        os.close(fd)


@pytest.mark.parametrize("disturb", ["stat", "open"])
@pytest.mark.parametrize("server", SERVERS)
def test_readers_of_mapped_memory_see_what_write_has_finished(
    new_place: Callable[..., Place], server: str, disturb: str
) -> None:
    """One process writes, another one looks at the file or opens it, and one reads its mapping."""
    path = new_place(*options_of(server)).path / "file"
    path.write_bytes(bytes(PAGES * PAGE))
    finished, over = RawArray("q", PAGES), RawValue("i", 0)
    with (
        Child(_read_mapped, path, finished, over) as reading,
        Child(_disturb, path, over, disturb) as disturbing,
    ):
        fd = os.open(path, os.O_RDWR)
        end, count = time.monotonic() + _SECONDS, 0
        while time.monotonic() < end:
            count += 1
            os.pwrite(fd, struct.pack("q", count) * (PAGE // 8), count % PAGES * PAGE)
            finished[count % PAGES] = count
        os.close(fd)
        over.value = 1
        assert reading.result(PATIENCE + _SECONDS) == (0, 0)
        disturbing.result()
    assert count > PAGES


def _read_mapped(path: Path, finished: Any, over: Any) -> tuple[int, int]:
    """How often a page was older than what had been written, and how many are afterwards."""
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, PAGES * PAGE, prot=mmap.PROT_READ)

    def is_old(page: int) -> bool:
        wanted: int = finished[page]
        seen: int = struct.unpack_from("q", mapped, page * PAGE)[0]
        return seen < wanted

    old = 0
    while not over.value:
        old += sum(map(is_old, range(PAGES)))
    return old, sum(map(is_old, range(PAGES)))


def _disturb(path: Path, over: Any, how: str) -> None:
    while not over.value:
        if how == "stat":
            os.stat(path)
        else:
            os.close(os.open(path, os.O_RDONLY))
        time.sleep(0.0005)


# Other pairs of requests


def _truncate(path: Path) -> None:
    os.truncate(path, PAGE // 2)


def _append(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"x" * PAGE)
    os.close(fd)


def _store(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, PAGE) as mapped:
        mapped[:4] = b"here"
        mapped.flush()
    os.close(fd)


def _looks(path: Path) -> tuple[int, int, int]:
    a = os.stat(path)
    return a.st_size, a.st_mtime_ns, a.st_ctime_ns


@pytest.mark.parametrize("change", [_truncate, _append, _store])
@pytest.mark.parametrize("server", SERVERS)
def test_attributes_seen_during_a_change_do_not_stay(
    new_place: Callable[..., Place], server: str, change: Callable[[Path], None]
) -> None:
    """A getattr overtakes a write, a truncation or the writing back of mapped pages."""
    place = new_place("-o", "cache=loose", *options_of(server), command=LATE)
    path = place.path / "file"
    (place.source / "file").write_bytes(b"0" * PAGE)
    os.link(place.source / "file", place.source / "other")
    _looks(path)
    with _on_its_way(place.mount, change, path) as child:
        during = [os.stat(name, follow_symlinks=False) for name in (path, place.path / "other")]
        assert {a.st_ino for a in during} == {path.stat().st_ino}
        child.result()
    assert _looks(path) == _looks(place.source / "file")
    assert path.read_bytes() == (place.source / "file").read_bytes()


def test_attributes_from_before_a_write_do_not_stay(new_mount: Callable[..., Mount]) -> None:
    """A getattr was answered before a write, and the kernel gets the answer after it."""
    mount = new_mount("-o", "cache=loose", "--model", "first", command=LATE_ATTRIBUTES)
    path = mount.path / "file"
    (mount.source / "file").write_bytes(b"0" * PAGE)
    fd = os.open(path, os.O_RDWR)
    try:
        os.pread(fd, 1, 0)
        # The access time has moved: the daemon is asked again.
        with _on_its_way(mount, os.fstat, fd) as child:
            os.pwrite(fd, b"x" * PAGE, PAGE)
            assert not child.done(), "the kernel did not ask, or it was answered too soon"
            child.result()
    finally:
        os.close(fd)
    assert _looks(path) == _looks(mount.source / "file")


@pytest.mark.parametrize(("server", "cache"), pairs("none", "loose"))
def test_names_seen_during_a_change_do_not_stay(
    new_place: Callable[..., Place], server: str, cache: str
) -> None:
    """A lookup or a listing overtakes a rename or an unlink; the kernel keeps them apart."""
    place = new_place("-o", f"cache={cache}", *options_of(server), command=LATE)
    for name in ("a", "b", "c"):
        (place.source / name).write_text(name)
    paths = {name: place.path / name for name in "abcd"}
    for change, left in (
        (lambda: os.rename(paths["a"], paths["b"]), "bc"),
        (lambda: os.rename(paths["b"], paths["d"]), "cd"),
        (lambda: os.unlink(paths["c"]), "d"),
    ):
        with _on_its_way(place.mount, change) as child:
            for path in paths.values():
                os.path.lexists(path)
            os.listdir(place.path)
            child.result()
        assert "".join(sorted(os.listdir(place.path))) == left
        assert "".join(name for name, path in paths.items() if path.exists()) == left
    assert paths["d"].read_text() == "a"
