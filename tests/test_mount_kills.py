"""A daemon that is killed in the middle of its work: what was answered holds, and no more.

The page cache survives a killed process, so everything that a client was told had succeeded must
be in the source, and nothing of what it was told had failed. Of the one call that was under way
when the daemon died either may be true. (What survives the loss of the page cache, too, is for
test_mount_durable.py.)
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mounting import NINEFUSE, SOAK, Child, Mount, Watchdog, run, wait_until
from servers import SERVERS, need_engine

pytestmark = pytest.mark.soak

KILLS = 25 if SOAK else 1  # for each server and place
PLACES = ("small", "disk") if SOAK else ("small",)
CLIENTS = 4
LONGEST_LOAD = 0.25  # seconds from the first answers to the kill, at most
AT_ONCE = 2.0  # seconds, on a machine that has other things to do
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
# So few inodes that making something fails again and again, for want of room for it.
INODES = 10 * CLIENTS

# Names that meet: in two directories that come and go.
NAMES = [f"{directory}{name}" for directory in ("", "p/", "q/") for name in "abcd"]
DIRECTORIES = ["p", "q", "p/r", "c", "q/d"]


# Clients


@dataclass(frozen=True)
class Asked:
    """A call and what came of it.

    Attributes:
        error: its errno, 0 if it succeeded, None if the daemon was gone before it answered.
        count: of bytes written.
    """

    call: str
    arguments: tuple[Any, ...]
    error: int | None = 0
    count: int = 0

    @property
    def was_cut(self) -> bool:
        """Whether a write wrote less than it was to."""
        return self.call == "write" and not self.error and self.count < len(self.arguments[3])


def _draw(dice: random.Random) -> tuple[str, tuple[Any, ...]]:
    """Any call that changes something, as likely as not on names that are there."""
    name, other = dice.choice(NAMES), dice.choice(NAMES)
    call = dice.choice(
        ["create", "create", "write", "write", "write", "mkdir", "rename", "link", "symlink"]
        + ["truncate", "unlink", "rmdir"]
    )
    if call == "create":
        return call, (name, dice.choice([0, os.O_SYNC]))
    if call == "write":
        flags = dice.choice([0, 0, os.O_SYNC, os.O_DSYNC])
        return call, (name, flags, dice.randrange(3000), dice.randbytes(dice.randrange(1, 2000)))
    if call in ("mkdir", "rmdir"):
        return call, (dice.choice(DIRECTORIES),)
    if call == "rename" and dice.randrange(3) == 0:
        return call, (dice.choice(DIRECTORIES), dice.choice(DIRECTORIES))
    if call in ("rename", "link"):
        return call, (name, other)
    if call == "symlink":
        return call, (f"to {other}", name)
    return call, (name, dice.randrange(4000)) if call == "truncate" else (name,)


def _make(call: str, arguments: tuple[Any, ...]) -> int:
    """Make a call in the working directory; how many bytes it wrote."""
    if call == "create":
        name, flags = arguments
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | flags, 0o600))
    elif call == "write":
        name, flags, offset, data = arguments
        fd = os.open(name, os.O_WRONLY | flags)
        try:
            return os.pwrite(fd, data, offset)
        finally:
            # Its error is no answer to the write; the next call meets it as well.
            try:
                os.close(fd)
            except OSError as error:
                assert error.errno in GONE, error  # noqa: PT017
    else:
        getattr(os, call)(*arguments)
    return 0


def _work(top: Path, seed: int, begun: mmap.mmap, number: int) -> tuple[list[Asked], float]:
    """Make calls until the daemon is gone; all of them, and when that was noticed."""
    dice = random.Random(seed)
    os.chdir(top)
    asked: list[Asked] = []
    while True:
        call, arguments = _draw(dice)
        try:
            asked.append(Asked(call, arguments, count=_make(call, arguments)))
        except OSError as error:
            if error.errno in GONE:
                asked.append(Asked(call, arguments, None))
                return asked, time.monotonic()
            asked.append(Asked(call, arguments, error.errno))
        begun[number] = 1


# What should be there


@dataclass
class File:
    """A file, symlink or directory; hard links are one of them."""

    kind: str
    content: Any = b""


Seen = dict[str, tuple[str, Any, tuple[str, ...]]]  # kind, content and all of its names


@dataclass
class Tree:
    """What a client has been told is in its directory."""

    there: dict[str, File] = field(default_factory=dict)

    def copy(self) -> Tree:
        twins = {id(file): File(file.kind, file.content) for file in self.there.values()}
        return Tree({name: twins[id(file)] for name, file in self.there.items()})

    def apply(self, asked: Asked) -> None:
        """Do what a call did that succeeded; AssertionError if it never could have."""
        try:
            self._apply(asked)
        except KeyError as missing:
            raise AssertionError(f"not as answered: {asked}, without {missing}") from None

    def _apply(self, asked: Asked) -> None:
        call, arguments = asked.call, asked.arguments
        if call in ("create", "mkdir", "symlink"):
            name = arguments[1] if call == "symlink" else arguments[0]
            assert name not in self.there, f"not as answered: {asked}"
            kind = {"create": "file", "mkdir": "directory", "symlink": "symlink"}[call]
            self.there[name] = File(kind, arguments[0] if call == "symlink" else b"")
        elif call == "write":
            name, _, offset, data = arguments
            file = self.there[name]
            assert file.kind == "file", f"not as answered: {asked}"
            data = data[: asked.count]
            if data:
                file.content = (
                    file.content[:offset].ljust(offset, b"\0")
                    + data
                    + (file.content[offset + len(data) :])
                )
        elif call == "truncate":
            name, size = arguments
            file = self.there[name]
            assert file.kind == "file", f"not as answered: {asked}"
            file.content = file.content[:size].ljust(size, b"\0")
        elif call == "link":
            assert arguments[1] not in self.there, f"not as answered: {asked}"
            self.there[arguments[1]] = self.there[arguments[0]]
        elif call == "rename":
            self._rename(*arguments)
        else:
            del self.there[arguments[0]]

    def _rename(self, old: str, new: str) -> None:
        # Names of one file stay as they are (rename(2)).
        if self.there[old] is self.there.get(new):
            return
        for name in [name for name in self.there if name == old or name.startswith(f"{old}/")]:
            self.there[new + name[len(old) :]] = self.there.pop(name)

    def seen(self) -> Seen:
        names: dict[int, list[str]] = {}
        for name, file in sorted(self.there.items()):
            names.setdefault(id(file), []).append(name)
        return {
            name: (file.kind, file.content, tuple(names[id(file)]))
            for name, file in self.there.items()
        }


def found_in(top: Path) -> Seen:
    """What is in a directory."""
    paths = [Path(above, name) for above, *names in os.walk(top) for name in (*names[0], *names[1])]
    names: dict[int, list[str]] = {}
    for path in sorted(paths, key=str):
        names.setdefault(path.lstat().st_ino, []).append(str(path.relative_to(top)))
    seen: Seen = {}
    for path in paths:
        same = tuple(names[path.lstat().st_ino])
        name = str(path.relative_to(top))
        if path.is_symlink():
            seen[name] = "symlink", os.readlink(path), same
        elif path.is_dir():
            seen[name] = "directory", b"", same
        else:
            seen[name] = "file", path.read_bytes(), same
    return seen


def possible(answers: list[Asked]) -> Iterator[Seen]:
    """What may be there after these answers, of which the last did not come."""
    tree = Tree()
    *answered, last = answers
    # The kernel cuts a write at a page's end, and what it tells is how many bytes of it were
    # answered: a short one was the call under way when the daemon died, and there was no other.
    if answered and answered[-1].was_cut:
        last = answered.pop()
    for asked in answered:
        if asked.error == 0:
            tree.apply(asked)
    if last.error is None:
        yield tree.seen()
    # A write may have been done in part.
    for count in range(last.count, len(last.arguments[3]) + 1) if last.call == "write" else [0]:
        done = tree.copy()
        try:
            done.apply(Asked(last.call, last.arguments, 0, count))
        except AssertionError:
            return  # it could not have succeeded
        yield done.seen()


def _difference(answers: list[Asked], found: Seen) -> str:
    """What is not as expected, and the last calls that were answered with success."""
    expected = next(possible(answers))
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        one, other = expected.get(name), found.get(name)
        if one != other:
            lines.append(f"{name}: {_summary(one)} expected, {_summary(other)} found")
            if one and other and one[0] == other[0] == "file":
                pairs = enumerate(itertools.zip_longest(one[1], other[1]))
                places = [place for place, (this, that) in pairs if this != that]
                lines.append(f"   differs from byte {places[:1]} to {places[-1:]}")
    done = [asked for asked in answers if not asked.error][-12:]
    return "\n".join([*lines, *(_brief(asked) for asked in done)])


def _summary(seen: tuple[str, Any, tuple[str, ...]] | None) -> str:
    return "nothing" if seen is None else f"{seen[0]} of {len(seen[1])} bytes, named {seen[2]}"


def _brief(asked: Asked) -> str:
    arguments = [len(a) if isinstance(a, bytes) else a for a in asked.arguments]
    return f"{asked.call}{arguments}: {asked.error}, {asked.count} bytes"


# Killing


@dataclass
class Outcome:
    """Figures of one kill, in seconds."""

    calls: int
    failed: int  # of the calls, answered with an error before the kill
    told: float  # until the last client had its error
    unmounting: float
    mounting: float  # again, in the same place


class Victim:
    """A mount whose daemon is killed, and that is mounted again in the same place."""

    def __init__(
        self, watchdog: Watchdog, base: Path, options: tuple[str, ...], command: tuple[str, ...]
    ) -> None:
        self._watchdog = watchdog
        self._command = [*command, "-f", *options]
        self.source, self.path, self._log = base / "source", base / "mount", base / "log"
        self.source.mkdir(exist_ok=True)
        self.path.mkdir()
        self.mount = self._mount()

    def _mount(self) -> Mount:
        self._log.unlink(missing_ok=True)
        words = [*self._command, str(self.source), str(self.path)]
        return Mount(self._watchdog, self.source, self.path, self._log, words, r"mounted on .*\n")

    def kill_often(self, times: int) -> list[Outcome]:
        """`kill` so often, each time otherwise."""
        return [self.kill(random.Random(seed)) for seed in range(times)]

    def kill(self, dice: random.Random) -> Outcome:
        """Kill the daemon under load, unmount, compare, and mount again."""
        tops = [f"client{number}" for number in range(CLIENTS)]
        with ExitStack() as stack:
            begun = stack.enter_context(mmap.mmap(-1, CLIENTS))
            children = []
            for number, top in enumerate(tops):
                (self.source / top).mkdir()
                arguments = (self.path / top, dice.randrange(1 << 32), begun, number)
                children.append(stack.enter_context(Child(_work, *arguments)))
            wait_until(lambda: all(begun[:]), "an answer for each client")
            time.sleep(dice.uniform(0.0, LONGEST_LOAD))
            killed = time.monotonic()
            self.mount.signal(signal.SIGKILL)
            results = [child.result() for child in children]
            assert self.mount.wait() == -signal.SIGKILL
        assert all(noticed > killed for _, noticed in results), "an error before the kill"
        started = time.monotonic()
        done = run("fusermount3", "-u", self.path)
        assert done.returncode == 0, done.stderr
        unmounting = time.monotonic() - started
        self.mount.log.check()
        self.mount.end()
        for top, (answers, _) in zip(tops, results, strict=True):
            found = found_in(self.source / top)
            if not any(found == seen for seen in possible(answers)):
                raise AssertionError(f"not as answered: {_difference(answers, found)}")
        started = time.monotonic()
        self.mount = self._mount()
        assert sorted(os.listdir(self.path)) == tops
        mounting = time.monotonic() - started
        for top in tops:
            shutil.rmtree(self.path / top)
        calls = [asked for answers, _ in results for asked in answers]
        failed = sum(bool(asked.error) for asked in calls)
        told = max(noticed for _, noticed in results) - killed
        return Outcome(len(calls), failed, told, unmounting, mounting)


@contextmanager
def victim(
    watchdog: Watchdog,
    base: Path,
    *options: str,
    command: tuple[str, ...] = NINEFUSE,
    place: str = "small",
) -> Iterator[Victim]:
    """A mount to kill the daemon of; for root in a small place, with room for few files."""
    source = base / "source"
    source.mkdir(parents=True)
    small = os.geteuid() == 0 and place == "small"
    if small:
        done = run("mount", "-t", "tmpfs", "-o", f"nr_inodes={INODES}", "none", source)
        assert done.returncode == 0, done.stderr
    try:
        it = Victim(watchdog, base, options, command)
        try:
            yield it
        finally:
            it.mount.end()
    finally:
        if small:
            run("umount", "-l", source)


@pytest.mark.limit(900.0 if SOAK else 60.0)
@pytest.mark.parametrize("server", SERVERS)
def test_a_daemon_killed_under_load_has_done_what_it_answered(
    guard: Watchdog, tmp_path: Path, server: str
) -> None:
    """Once for each server; `make soak`, two hundred times in all, half of them on a disk."""
    need_engine(server)
    dice = random.Random(server)
    outcomes: list[Outcome] = []
    for place in PLACES:
        with victim(guard, tmp_path / place, *SERVERS[server], place=place) as it:
            outcomes += [it.kill(dice) for _ in range(KILLS)]
    told, unmounting = max(o.told for o in outcomes), max(o.unmounting for o in outcomes)
    mounting = max(o.mounting for o in outcomes)
    calls, failed = sum(o.calls for o in outcomes), sum(o.failed for o in outcomes)
    print(
        f"{server}: {len(outcomes)} kills survived, {calls} calls, {failed} of them failed before;"
        f" all clients told within {told:.3f} s, unmounted within {unmounting:.3f} s,"
        f" mounted again within {mounting:.3f} s"
    )
    assert 0 < failed < calls
    assert told < AT_ONCE
    assert unmounting < AT_ONCE


# That this can fail

# A daemon that answers before it has written.
HASTY = """
import os, sys, threading
from ninefuse.command import cli
from ninefuse.linux import transfer

def later(fd, data, offset, done=0, write=transfer.write_fully):
    kept = os.dup(fd)  # the file may be closed meanwhile
    threading.Timer(0.3, write, (kept, data, offset)).start()
    return len(data)

transfer.write_fully = later
sys.exit(cli.main())
"""
# One that makes a directory, and then finds that something else that it needs is missing.
HALF = """
import errno, sys
from ninefuse.command import cli
from ninefuse.ops import names
make = names._mkdir

def half(*args):
    make(*args)
    raise OSError(errno.ENOMEM, "no memory")

names._mkdir = half
sys.exit(cli.main())
"""


@pytest.mark.parametrize("program", [HASTY, HALF], ids=["hasty", "half"])
def test_a_daemon_that_does_not_do_what_it_answers_is_found_out(
    guard: Watchdog, tmp_path: Path, program: str
) -> None:
    command = (sys.executable, "-c", program)
    with (
        victim(guard, tmp_path / "place", "--model", "none", command=command) as it,
        pytest.raises(AssertionError, match="not as answered"),
    ):
        it.kill_often(50)  # one may come when all was done
