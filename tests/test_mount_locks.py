"""Fifty clients of a real mount, whose daemon watches its locks: the kernel's own order of things.

What test_locks_stress.py does to the operations, done by programs: each has names of its own in
directories that all share and some move. The daemon keeps next to no descriptors, and its threads
are switched as often as the interpreter can; its log says if a lock is taken out of its order.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from mounting import PATIENCE, SOAK, Child, Mount, errno_of, unmount, wait_until

from ninefuse.linux.syscalls import RENAME_EXCHANGE, rename

pytestmark = pytest.mark.soak

PROCESSES, THREADS = 10, 5
DIRECTORIES = 8
MOVERS = 4  # of the clients; each has two of the directories
SECONDS = float(os.environ.get("NINEFUSE_SECONDS", 20 if SOAK else 1))
LONGEST = 5.0  # seconds of one call
SERVERS = [
    ("none",),
    ("first",),
    ("second", "--engine", "threads"),
    ("second", "--engine", "uring"),
]
CASES = [
    [*server, "--threads", str(threads)]
    for server, threads in itertools.product(SERVERS, (1, 2, 16))
    if server[0] != "none" or threads == 1
]
WATCHED_NINEFUSE = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); sys.setswitchinterval(1e-6);"
    " import lock_order; sys.exit(lock_order.run_daemon(most_descriptors=16))",
)

Place = tuple[int, str]  # one of the directories, and a name in it


class Told(NamedTuple):
    """What a client says in the end."""

    own: dict[Place, str]  # its files, and what is in them
    moved: dict[int, Place]  # the directories that it moves, and where they are
    calls: int
    longest: float  # seconds


class Client:
    """A thread of a program; directories are used by descriptors, wherever they are moved."""

    def __init__(self, directories: list[int], number: int, seed: int) -> None:
        self.directories = directories
        self.number = number
        self.rng = random.Random(seed * 1000 + number)
        self.names = [f"c{number:02d}.{n}" for n in range(4)]
        self.own: dict[Place, str] = {}
        self.tokens = itertools.count(1)
        mine = (number, number + MOVERS) if number < MOVERS else ()
        self.moved: dict[int, Place] = {n: (-1, f"d{n}") for n in mine}
        self.calls = 0
        self.longest = 0.0

    def live(self, until: float) -> Told:
        kinds = [self.make, self.look, self.move, self.swap, self.remove, self.link, self.list_one]
        kinds += [self.pass_by, self.stay] + [self.move_directory] * (4 if self.moved else 0)
        while time.monotonic() < until:
            since = time.monotonic()
            self.rng.choice(kinds)()
            self.calls += 1
            self.longest = max(self.longest, time.monotonic() - since)
        return Told(self.own, self.moved, self.calls, self.longest)

    def fd(self, directory: int) -> int:
        return self.directories[directory]  # that of the root is the last

    def any_directory(self) -> int:
        return self.rng.randrange(-1, DIRECTORIES)

    def free_place(self) -> Place | None:
        place = self.any_directory(), self.rng.choice(self.names)
        return None if place in self.own else place

    def own_place(self) -> Place | None:
        return self.rng.choice(sorted(self.own)) if self.own else None

    def rename(self, old: Place, new: Place, flags: int = 0) -> None:
        rename(self.fd(old[0]), os.fsencode(old[1]), self.fd(new[0]), os.fsencode(new[1]), flags)

    def make(self) -> None:
        if place := self.free_place():
            token = f"{next(self.tokens)} of {self.number}"
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            file = os.open(place[1], flags, 0o600, dir_fd=self.fd(place[0]))
            os.write(file, token.encode())
            os.close(file)
            self.own[place] = token

    def look(self) -> None:
        if place := self.own_place():
            file = os.open(place[1], os.O_RDONLY, dir_fd=self.fd(place[0]))
            assert os.read(file, 100).decode() == self.own[place]
            os.close(file)

    def move(self) -> None:
        if old := self.own_place():
            new = self.any_directory(), self.rng.choice(self.names)
            self.rename(old, new)
            if self.own.get(new) != self.own[old]:  # else both are one file, and stay
                self.own[new] = self.own.pop(old)

    def swap(self) -> None:
        one, other = self.own_place(), self.own_place()
        if one and other:
            self.rename(one, other, RENAME_EXCHANGE)
            self.own[one], self.own[other] = self.own[other], self.own[one]

    def remove(self) -> None:
        if place := self.own_place():
            os.unlink(place[1], dir_fd=self.fd(place[0]))
            del self.own[place]

    def link(self) -> None:
        old, new = self.own_place(), self.free_place()
        if old and new:
            os.link(old[1], new[1], src_dir_fd=self.fd(old[0]), dst_dir_fd=self.fd(new[0]))
            self.own[new] = self.own[old]

    def list_one(self) -> None:
        directory = self.any_directory()
        file = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd(directory))
        found = sorted(name for name in os.listdir(file) if name in self.names)
        os.close(file)
        assert found == sorted(name for where, name in self.own if where == directory)

    def pass_by(self) -> None:
        """A directory comes, moves and goes, and is used after that."""
        name = f"m{self.number:02d}"
        one, other = self.any_directory(), self.any_directory()
        os.mkdir(name, dir_fd=self.fd(one))
        file = os.open(name, os.O_PATH, dir_fd=self.fd(one))
        self.rename((one, name), (other, name))
        os.rmdir(name, dir_fd=self.fd(other))
        os.fstat(file)
        os.close(file)

    def stay(self) -> None:
        directory = self.fd(self.any_directory())
        assert os.fstat(directory).st_ino == os.stat(".", dir_fd=directory).st_ino

    def move_directory(self) -> None:
        """Below another one, or into the other's place; not below itself (EINVAL)."""
        mine = self.rng.choice(sorted(self.moved))
        old, places = self.moved[mine], self.moved.values()
        if self.rng.random() < 0.3:
            one, other = self.moved
            if not errno_of(self.rename, self.moved[one], self.moved[other], RENAME_EXCHANGE):
                self.moved[one], self.moved[other] = self.moved[other], self.moved[one]
            return
        new = self.any_directory(), f"d{mine}.{self.rng.randrange(3)}"
        if new not in places and not errno_of(self.rename, old, new):
            self.moved[mine] = new


def live(directories: list[int], process: int, seed: int, until: float) -> list[Told]:
    """One program: its threads are clients."""
    told: list[Told] = []
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            told.append(Client(directories, number, seed).live(until))
        except BaseException as failure:
            failures.append(failure)

    numbers = range(process * THREADS, (process + 1) * THREADS)
    threads = [threading.Thread(target=client, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return told


@pytest.mark.limit(SECONDS + 60)
@pytest.mark.parametrize("options", CASES if SOAK else [["second"]], ids=" ".join)
def test_fifty_clients_of_a_mount(new_mount: Callable[..., Mount], options: list[str]) -> None:
    """All get through, and leave what they say; no lock was taken out of its order."""
    seed = random.SystemRandom().getrandbits(32)
    mount = new_mount("--model", *options, "-o", "cpus=all", command=WATCHED_NINEFUSE)
    for number in range(DIRECTORIES):
        (mount.source / f"d{number}").mkdir()
    told: list[Told] = []
    with ExitStack() as ends:
        directories = []
        for path in [*(mount.path / f"d{n}" for n in range(DIRECTORIES)), mount.path]:
            directories.append(os.open(path, os.O_PATH | os.O_DIRECTORY))
            ends.callback(os.close, directories[-1])
        until = time.monotonic() + SECONDS
        children = [
            ends.enter_context(Child(live, directories, process, seed, until))
            for process in range(PROCESSES)
        ]
        try:
            for child in children:
                told += child.result(SECONDS + PATIENCE)
        except TimeoutError:
            fail_with_stacks(mount, "the clients do not end")
        except AssertionError as failure:
            raise AssertionError(f"seed {seed}\n{mount.log.text()[-3000:]}") from failure
    check_tree(mount.source, told)

    files = sum(len(client.own) for client in told)

    def is_idle() -> bool:
        now = mount.counters()
        return now.opened == now.under_way == 0 and now.fids <= 1 + DIRECTORIES + files

    wait_until(is_idle, "fids are given back")
    unmount(mount.path)
    try:
        mount.wait()
    except subprocess.TimeoutExpired:
        fail_with_stacks(mount, "the daemon does not end")
    line = mount.log.wait_for(r"locks taken: .*")[0]
    longest = max(client.longest for client in told)
    calls = sum(client.calls for client in told)
    print(f"\n{' '.join(options)}: {calls} calls, longest {longest:.3f} s; {line}")
    assert longest < LONGEST
    taken = [int(n) for n in re.findall(r"(\d+) [a-z ]+(?=[,;])", line)[:5]]
    assert min(taken) > 0, f"the locks were not watched: {line}"


def fail_with_stacks(mount: Mount, what: str) -> NoReturn:
    """Fail with all that the daemon has to say: stacks, owners and waiters of locks."""
    since = mount.log.size()
    mount.signal(signal.SIGUSR2)
    time.sleep(1)
    pytest.fail(f"{what}\n{mount.log.text(since)}")


def check_tree(source: Path, told: list[Told]) -> None:
    """The source has what the clients say, and no more."""
    places = {number: place for client in told for number, place in client.moved.items()}

    def path_of(directory: int) -> Path:
        names: list[str] = []
        while directory >= 0:
            directory, name = places[directory]
            names.append(name)
        return source.joinpath(*reversed(names))

    expected = {path_of(d) / n: token for client in told for (d, n), token in client.own.items()}
    found: dict[Path, str] = {}
    directories = set()
    for top, below, names in os.walk(source):
        directories |= {Path(top, name) for name in below}
        found |= {Path(top, name): Path(top, name).read_text() for name in names}
    assert directories == {path_of(number) for number in range(DIRECTORIES)}
    assert found == expected
