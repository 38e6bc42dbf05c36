"""Callers who keep others waiting: nobody does whom the source would not make wait.

A root daemon serves everybody. Attackers hold locks of their own files and directories in the
source for as long as they like (stuck.py), and make calls on them through the mount, which cannot
be answered meanwhile. Others measure how long theirs take, all at the same time: through the
mount, on the source beside it, and through a mount of the same kind that nobody attacks. So it
does not matter how busy the machine is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import mmap
import os
import re
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import stuck
from conftest import start
from file_systems import mounted
from mounting import (
    HASTY_NINEFUSE,
    SOAK,
    Child,
    Counters,
    Mount,
    Watchdog,
    abort,
    become,
    is_mounted,
    mount_ids,
    run,
    wait_until,
)
from servers import need_engine
from stuck import Attacker, Memory, memory_that_never_comes

pytestmark = [
    pytest.mark.alone,
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for others"),
    pytest.mark.limit(120.0),
]

ATTACKER, VICTIM, ROOT = 1001, 1002, 0
# Where victims are: a mount that is attacked, another one of the same kind, the source.
ATTACKED, SPARED, SOURCE = "attacked", "spared", "source"

WORST = 0.2  # seconds that a call may take under attack, whatever it takes without
SLACK = 0.001  # seconds by which the median may be more than twice that of the spared
BUSY = 0.01  # the same where an attacker makes a processor work
SLACK_OF_ONE = 0.05  # the same of one kind of call, of which there are few
SECONDS = 0.4  # of a measurement
PAUSE = 0.004  # seconds between a victim's calls
FLOOD = 4.0  # seconds in which thousands of requests that come at once are read
# Seconds after which a victim that does not come back is given up. Who waits for an attacker does
# so until he is let go; a busy machine needs less.
STUCK = 15.0
READY = 40.0 if SOAK else 20.0  # seconds for an attacker to prepare
BEGUN = 20.0  # seconds for an attacker to begin its calls
ENDED = 20.0  # seconds for all to be over
# Of a daemon that does nothing: descriptors that are no node's, threads that are no workers
# (io_uring's end some seconds later).
DESCRIPTORS, THREADS = 40, 100

SERVERS = {
    "second-role": ("--model", "second", "-o", "handover=role"),
    "second-request": ("--model", "second", "--engine", "threads", "-o", "handover=request"),
    "second-uring": ("--model", "second", "--engine", "uring"),
    "first-threads": ("--model", "first", "--engine", "threads"),
}


# Victims


def _rounds(own: Path, shared: Path, name: str) -> Iterator[list[tuple[str, Callable[[], object]]]]:
    """Calls of somebody who minds his own business, round by round; `open` leaves a file open."""
    known, moved = own / "known", own / "moved"
    fds: list[int] = []

    def take(path: Path, flags: int) -> None:
        fds.append(os.open(path, flags, 0o644))

    def close() -> None:
        os.close(fds.pop())

    for n in itertools.count():
        new, directory, common = own / f"new{n}", own / f"directory{n}", shared / f"{name}{n}"
        yield [
            ("statfs", partial(os.statvfs, shared)),
            ("look for nothing", partial(os.path.lexists, own / f"no{n}")),
            ("look for nothing (shared)", partial(os.path.lexists, shared / f"no{name}{n}")),
            ("stat", partial(os.stat, known)),
            ("stat a new name", partial(os.path.lexists, own / f"old{n}")),
            ("open", partial(take, known, os.O_RDONLY)),
            ("read from the source", lambda: os.pread(fds[-1], 5000, 0)),
            ("close", close),
            ("chmod", partial(os.chmod, known, 0o640 if n % 2 else 0o600)),
            ("create", partial(take, new, os.O_CREAT | os.O_EXCL | os.O_RDWR)),
            ("write", lambda: os.pwrite(fds[-1], b"x" * 5000, 0)),
            ("read", lambda: os.pread(fds[-1], 5000, 0)),
            ("truncate", lambda: os.ftruncate(fds[-1], 0)),
            ("close written", close),
            ("rename", partial(os.rename, new, moved)),
            ("readdir", partial(os.listdir, own / "few")),
            ("unlink", partial(os.unlink, moved)),
            ("mkdir", partial(os.mkdir, directory)),
            ("rmdir", partial(os.rmdir, directory)),
            ("create (shared)", partial(take, common, os.O_CREAT | os.O_EXCL | os.O_RDWR)),
            ("close (shared)", close),
            ("unlink (shared)", partial(os.unlink, common)),
        ]


Latencies = dict[str, list[float]]  # seconds of each call, by its name


def _measure(
    uid: int, own: Path, shared: Path, name: str, seconds: float, now: mmap.mmap
) -> Latencies:
    """Make calls for some time, as somebody; what each took. `now` tells which one is made."""
    become(uid)
    found: Latencies = {}
    until = time.monotonic() + seconds
    for calls in _rounds(own, shared, name):
        for number, (kind, call) in enumerate(calls):
            now[:8] = struct.pack("q", number)
            begin = time.perf_counter()
            call()
            found.setdefault(kind, []).append(time.perf_counter() - begin)
            time.sleep(PAUSE)
        if time.monotonic() > until:
            return found
    raise AssertionError


class Role(NamedTuple):
    """Who measures, and where."""

    name: str
    uid: int
    where: str = ATTACKED


OTHER = Role("another user", VICTIM)
SUPERUSER = Role("root", ROOT)
SAME = Role("the attacker's user, elsewhere", ATTACKER)
BESIDE = Role("another user, on the source", VICTIM, SOURCE)


class Stuck(AssertionError):
    """Somebody waits for an attacker."""


class Slow(AssertionError):
    """Somebody is slower than he may be; which may be the machine's fault."""


class Victims:
    """Those who measure at the same time, each in a directory of its own, made beforehand."""

    _numbers = itertools.count()

    def __init__(self, roles: list[Role], attacked: Mount, spared: Mount) -> None:
        self._tops = {ATTACKED: attacked.path, SPARED: spared.path, SOURCE: attacked.source}
        self._sources = {ATTACKED: attacked.source, SPARED: spared.source, SOURCE: attacked.source}
        self._names = {role: self._make_directory(role) for role in roles}

    def _make_directory(self, role: Role) -> str:
        name = f"victim{next(self._numbers)}"
        own = self._sources[role.where] / name
        (own / "few").mkdir(parents=True)
        for path in (own / "known", *(own / f"old{n}" for n in range(0, 100, 2))):
            path.write_bytes(b"x" * 5000)
            os.chown(path, role.uid, role.uid)
        for n in range(10):
            (own / "few" / f"{n}").touch()
        os.chown(own, role.uid, role.uid)
        # Known to the kernel from here on: of a name that is not it asks with the lock of the
        # directory, and who makes another one there has that for as long as it takes.
        Child(os.stat, self._tops[role.where] / name).result()
        Child(os.stat, self._tops[role.where] / "shared").result()
        return name

    def measure(self, seconds: float) -> dict[Role, Latencies]:
        """What their calls take.

        Raises:
            Stuck: somebody's call does not return.
        """
        children = {}
        for role, name in self._names.items():
            top, now = self._tops[role.where], mmap.mmap(-1, 8)
            words = (role.uid, top / name, top / "shared", name, seconds, now)
            child = Child(_measure, *words)
            _started.append(child)
            children[role] = child, now
        until = time.monotonic() + seconds + STUCK
        late = []
        for role, (child, now) in children.items():
            if not child.done(max(0.0, until - time.monotonic())):
                (number,) = struct.unpack("q", now[:8])
                kind = next(_rounds(Path(), Path(), ""))[number][0]
                late.append(f"{role.name}: {kind!r} does not return")
        if late:
            raise Stuck("; ".join(late))
        return {role: child.result() for role, (child, _) in children.items()}


_started: list[Child[Any]] = []  # and not collected yet


def compare(found: dict[Role, Latencies], slack: float) -> tuple[list[str], list[str]]:
    """A line for each who measured on the attacked mount; and what is more than it may be."""
    lines, complaints = [], []
    spared: Latencies = {}
    for role, taken in found.items():
        if role.where == SPARED:
            for kind, times in taken.items():
                spared.setdefault(kind, []).extend(times)
    usual, most_spared, most_beside = _median(spared), _worst(spared)[0], _worst(found[BESIDE])[0]
    limit = max(WORST, 3 * most_spared, 3 * most_beside)
    for role, taken in found.items():
        if role.where != ATTACKED:
            continue
        (most, kind), median = _worst(taken), _median(taken)
        line = (
            f"{role.name}: worst {most * 1e3:.1f} ms ({kind}), spared {most_spared * 1e3:.1f}, on "
            f"the source {most_beside * 1e3:.1f}; median {median * 1e6:.0f} us, spared "
            f"{usual * 1e6:.0f}"
        )
        lines.append(line)
        if most > limit or median > 2 * usual + slack:
            complaints.append(line)
        for kind, times in taken.items():
            one, other = statistics.median(times), statistics.median(spared[kind])
            if one > 2 * other + SLACK_OF_ONE:
                said = f"{one * 1e3:.1f} ms, spared {other * 1e3:.1f}"
                complaints.append(f"{role.name}: {kind!r} takes {said}")
    return lines, complaints


def _median(found: Latencies) -> float:
    return statistics.median(itertools.chain(*found.values()))


def _worst(found: Latencies) -> tuple[float, str]:
    return max((max(taken), kind) for kind, taken in found.items())


# Servers


class Server:
    """A daemon that attacks share, started anew where one has left it stuck.

    Attributes:
        watchdog: ends it if a test takes too long.
        is_broken: whether it may be stuck.
    """

    def __init__(self, watchdog: Watchdog, base: Path, options: tuple[str, ...]) -> None:
        self.watchdog = watchdog
        self.is_broken = False
        self._base = base
        self._options = options
        self._numbers = itertools.count()
        self._mounts: dict[str, Mount] = {}

    def mount(self, where: str = ATTACKED) -> Mount:
        found = self._mounts.get(where)
        if found is not None and (self.is_broken or found.process.poll() is not None):
            _end_by_force(self.watchdog, found)
            found = None
        if found is None:
            base = self.new_base(where)
            with on_one_cpu("threads" in self._options):
                found = self._mounts[where] = open_mount(self.watchdog, base, *self._options)
            if where == ATTACKED:
                self.is_broken = False
        return found

    def new_base(self, kind: str) -> Path:
        base = self._base / f"{kind}{next(self._numbers)}"
        base.mkdir()
        return base

    def end(self) -> None:
        for where, mount in self._mounts.items():
            if where == ATTACKED and self.is_broken:
                _end_by_force(self.watchdog, mount)
            else:
                mount.end()
                mount.log.check()


@contextlib.contextmanager
def on_one_cpu(wanted: bool) -> Iterator[None]:
    """Have daemons that keep to one processor choose the same one: they are compared."""
    allowed = os.sched_getaffinity(0)
    if wanted:
        os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def open_mount(
    watchdog: Watchdog, base: Path, *options: str, command: tuple[str, ...] | None = None
) -> Mount:
    """A mount that all users reach and may write in."""
    for directory in (base / "source", base / "source" / "shared"):
        directory.mkdir()
        os.chmod(directory, 0o1777)
    words = ("-o", "allow_other", *options)
    if command is None:
        return start(watchdog, base, *words)
    return start(watchdog, base, *words, command=command)


def _end_by_force(watchdog: Watchdog, mount: Mount) -> None:
    """End a daemon that may answer nothing any more, and what waits for it."""
    if mount.process.poll() is None:
        mount.process.kill()
    _abort(watchdog, mount)
    mount.process.wait(ENDED)
    mount.end()


def _abort(watchdog: Watchdog, mount: Mount) -> None:
    if watchdog.control is not None:
        for device in mount_ids(mount.path):
            abort(watchdog.control, device)


@pytest.fixture(scope="module")
def open_directory() -> Iterator[Path]:
    """A directory that all users reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="ninefuse-callers-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.fixture(scope="module")
def servers(watchdog: Watchdog, open_directory: Path) -> Iterator[Callable[[str], Server]]:
    """Return the server of that name, which this file's tests share."""
    found: dict[str, Server] = {}

    def server(name: str) -> Server:
        if name not in found:
            need_engine(name)
            base = open_directory / name
            base.mkdir()
            found[name] = Server(watchdog, base, SERVERS[name])
        return found[name]

    with ExitStack() as ends:
        yield server
        for one in found.values():
            ends.callback(one.end)


# Attacks


@dataclass
class Attack:
    """What attackers do.

    Attributes:
        function, args: of stuck.py.
        count: how many calls each makes.
        lasts: whether its calls wait as long as it likes; it is no attack if one returns before.
        least: else, seconds that the longest one takes at least.
        spares_own: whether the attacker's own calls elsewhere are to go on.
        slack: seconds by which others' median may be more than twice that of the spared: as much
            as it takes where an attacker keeps a processor busy.
        servers: those that `make test` tries it on.
        inside: whether what never comes is a file in the source.
    """

    function: Callable[..., None]
    args: tuple[object, ...] = ()
    count: int = 1
    lasts: bool = True
    least: float = 0.2
    spares_own: bool = True
    slack: float = SLACK
    servers: tuple[str, ...] = tuple(SERVERS)
    inside: bool = False


ONE = ("second-role",)  # of what concerns its dispatcher alone
SECOND = ("second-role", "second-uring")
# The others are attacked so in a long run; second-uring by many at once (CROWD), too.
BESIDES = ("second-role", "first-threads")


def _servers_for(kind: str) -> tuple[str, ...]:
    return {"chmod": BESIDES, "write": SECOND}.get(kind, ONE)


MANY = 2500  # more requests than a daemon took at a time

ATTACKS = {
    **{
        f"{kind} of a held file": Attack(stuck.change_held, (kind,), servers=_servers_for(kind))
        for kind in ("chmod", "utime", "setxattr", "truncate", "write")
    },
    **{
        f"{kind} of a file written from the mount": Attack(
            stuck.change_while_written,
            (kind,),
            lasts=False,
            least=0.001,
            slack=BUSY,
            servers=tuple(SERVERS) if kind == "chmod" else _servers_for(kind),
        )
        for kind in ("chmod", "utime", "setxattr", "truncate", "write")
    },
    "chmod of a file read directly": Attack(stuck.change_while_read, ("chmod",), servers=ONE),
    "chmod of 40 held files": Attack(
        stuck.change_each, ("chmod",), 40, spares_own=False, servers=BESIDES
    ),
    "write to 40 held files": Attack(
        stuck.change_each, ("write",), 40, spares_own=False, servers=SECOND
    ),
    "unlink of a held file": Attack(stuck.remove_held, servers=BESIDES),
    "rename over a held file": Attack(stuck.rename_over_held, servers=ONE),
    "link of a held file": Attack(stuck.link_held, servers=ONE),
    "mkdir in a held top directory": Attack(
        stuck.make_in_held_directory, ("top",), servers=BESIDES
    ),
    "mkdir in a held directory": Attack(stuck.make_in_held_directory, ("own",), servers=ONE),
    "rename in a held directory": Attack(stuck.rename_in_held_directory, servers=BESIDES),
    "lookups in a held directory": Attack(
        stuck.look_in_held_directory, (), MANY, spares_own=False, servers=ONE
    ),
    "opens of leased files": Attack(
        stuck.open_leased, (40,), 40, spares_own=False, servers=BESIDES
    ),
    "many opens of leased files": Attack(
        stuck.open_leased, (40,), MANY, spares_own=False, servers=ONE
    ),
    "truncate of a fragmented file": Attack(stuck.truncate_fragmented, lasts=False, slack=BUSY),
    "unlink of a fragmented file": Attack(
        stuck.remove_fragmented, servers=ONE, lasts=False, slack=BUSY
    ),
    "reads that never end": Attack(
        stuck.read_what_never_comes, (), 64, spares_own=False, inside=True
    ),
    "many reads that never end": Attack(
        stuck.read_what_never_comes, (), MANY, spares_own=False, servers=ONE, inside=True
    ),
    "names beside reads that never end": Attack(
        stuck.use_shared_while_stuck,
        ("read",),
        100,
        spares_own=False,
        slack=BUSY,
        servers=BESIDES,
        inside=True,
    ),
    # Some are refused.
    "names beside 100 held files": Attack(
        stuck.use_shared_while_stuck,
        ("chmod",),
        100,
        lasts=False,
        spares_own=False,
        slack=BUSY,
        servers=BESIDES,
    ),
    "rmdir of a huge directory": Attack(
        stuck.remove_huge_directory,
        (200_000 if SOAK else 10_000,),
        lasts=False,
        least=0.001,
        slack=BUSY,
        servers=(),
    ),
}


@contextlib.contextmanager
def attacked(
    server: Server, mount: Mount, attacks: list[tuple[Attack, int]], begun: float = BEGUN
) -> Iterator[list[Attacker]]:
    """Run attacks, by uid; at the end all they wait for is let go, and has to return."""
    number, base = next(_numbers), server.new_base("attack")
    above = mount.source if any(attack.inside for attack, _ in attacks) else base
    path = above / f"memory{number}"
    with memory_that_never_comes(server.watchdog, path, base / "log") as memory:
        attackers: list[Attacker] = []
        try:
            for attack, uid in attacks:
                attackers.append(
                    Attacker(
                        attack.function,
                        *attack.args,
                        uid=uid,
                        source=mount.source,
                        mount=mount.path,
                        memory=memory.path,
                        name=f"attacker{next(_numbers)}",
                        count=attack.count,
                    )
                )
            for attacker in attackers:
                attacker.wait_until_ready(READY)
            until = time.monotonic() + begun
            for attacker in attackers:
                attacker.go(max(0.0, until - time.monotonic()))
            yield attackers
            _let_go(memory, attackers)
        except BaseException:
            server.is_broken = True
            _let_go_by_force(server, mount, memory, attackers)
            raise


_numbers = itertools.count()


def _let_go(memory: Memory, attackers: list[Attacker]) -> None:
    for attacker in attackers:
        attacker.board.end()
    memory.release()
    for attacker in attackers:
        attacker.end(ENDED)
        assert all(map(stuck.is_expected, attacker.board.errors())), attacker.board.errors()


def _let_go_by_force(
    server: Server, mount: Mount, memory: Memory, attackers: list[Attacker]
) -> None:
    for attacker in attackers:
        attacker.board.end()
    memory.release()
    for attacker in attackers:
        attacker.board.wait_for_returns(0.5 / len(attackers))
    gone = [attacker.kill(1.0) for attacker in attackers]
    if not all(gone):
        _abort(server.watchdog, mount)
        assert all(attacker.kill(ENDED) for attacker in attackers), "an attacker does not end"


def _attacked_and_compared(
    server: Server, attacks: list[tuple[Attack, int]], seconds: float, begun: float = BEGUN
) -> list[str]:
    """Measure idle, and under attack; what came of it.

    Raises:
        Stuck, Slow: others are kept waiting.
    """
    spared, mount = server.mount(SPARED), server.mount()
    roles = [OTHER, SUPERUSER]
    if all(attack.spares_own for attack, _ in attacks):
        roles.append(SAME)
    # As many on the mount that is spared: they keep each other waiting, too.
    elsewhere = [role._replace(where=SPARED) for role in roles]
    victims = Victims([*roles, *elsewhere, BESIDE], mount, spared)
    with ExitStack() as stack:
        stack.callback(_collect_started, server, mount)
        with attacked(server, mount, attacks, begun) as attackers:
            flood = _taken_in(mount)
            found = victims.measure(seconds)
            for (attack, _), attacker in zip(attacks, attackers, strict=True):
                _check_it_was_an_attack(attack, attacker)
    _check_nothing_is_left(mount)
    lines, complaints = compare(found, max(attack.slack for attack, _ in attacks))
    if complaints:
        raise Slow("\n".join(complaints))
    return [*lines, f"the first asked waited {flood * 1e3:.0f} ms"]


def _taken_in(mount: Mount) -> float:
    """Wait until the daemon has all that was asked at once; the longest wait of others meanwhile.

    The kernel's queue of requests is one for all: who comes after thousands waits until the
    daemon has read them.
    """
    longest, before, until = 0.0, -1, time.monotonic() + FLOOD
    while True:
        begin = time.monotonic()
        asking = Child(os.statvfs, mount.path)
        _started.append(asking)
        if not asking.done(STUCK):
            raise Stuck(f"somebody who asks for nothing of the attacker's waits for {STUCK} s")
        longest = max(longest, time.monotonic() - begin)
        now = mount.counters().under_way
        if now <= before + 10 or time.monotonic() > until:
            return longest
        before = now
        time.sleep(0.1)


def _check_it_was_an_attack(attack: Attack, attacker: Attacker) -> None:
    board = attacker.board
    said = (
        f"no attack: {attack.function.__name__}: {board.begun()} of {board.count} calls begun, "
        f"{board.waiting()} wait, {board.longest():.3f} s at most; errors {board.errors()}"
    )
    assert board.begun() == board.count, said
    assert board.waiting() == board.count if attack.lasts else board.longest() > attack.least, said


def _patiently(compared: Callable[[], list[str]], turns: int = 8) -> list[str]:
    """Try again where it may have been the machine."""
    try:
        return compared()
    except Slow:
        if turns == 1:
            raise
    return _patiently(compared, turns - 1)


def _collect_started(server: Server, mount: Mount) -> None:
    """See to the end of victims, those that were given up, too."""
    for child in _started:
        if not child.done():
            os.kill(child.pid, signal.SIGKILL)
    while _started:
        child = _started.pop()
        if not child.done(2.0):
            _abort(server.watchdog, mount)
        child.wait()


def _check_nothing_is_left(mount: Mount) -> None:
    """No request, no open file and no descriptor; no more threads than it tells of."""

    def nothing_is_left() -> bool:
        now = mount.counters()
        other_descriptors = now.descriptors - now.node_descriptors
        return (
            now.under_way == now.held_back == now.opened == 0
            and other_descriptors <= DESCRIPTORS
            and len(os.listdir(f"/proc/{mount.pid}/task")) <= _threads_told(now) + THREADS
        )

    wait_until(nothing_is_left, "the end of all that the attack needed", ENDED)


def _threads_told(counters: Counters) -> int:
    told = re.search(r"(\d+) workers", counters.text)
    assert told is not None
    return int(told[1])


CASES = [
    pytest.param(server, name, id=f"{server}-{name}")
    for server in SERVERS
    for name, attack in ATTACKS.items()
    if SOAK or server in attack.servers
]


@pytest.mark.parametrize(("server", "name"), CASES)
def test_nobody_else_waits_for_an_attacker(
    guard: Watchdog, servers: Callable[[str], Server], server: str, name: str
) -> None:
    attacks = [(ATTACKS[name], ATTACKER)]
    lines = _patiently(partial(_attacked_and_compared, servers(server), attacks, SECONDS))
    print(f"\n{name}:", *lines, sep="\n")


FEW_REQUESTS = (
    sys.executable,
    "-c",
    "import sys; from ninefuse.driving import driver; from ninefuse.command import cli;"
    " driver.MOST_REQUESTS = 5; sys.exit(cli.main())",
)


def _statvfs_as(uid: int, path: Path) -> int:
    become(uid)
    try:
        os.statvfs(path)
    except OSError as failure:
        return failure.errno or -1
    return 0


def test_who_has_too_many_requests_under_way_is_told_so(
    guard: Watchdog, open_directory: Path
) -> None:
    """EAGAIN, until some have been answered; others are answered as ever."""
    base = open_directory / "few"
    base.mkdir()
    server = Server(guard, base, ())
    mount = open_mount(guard, server.new_base("mount"), command=FEW_REQUESTS)
    try:
        with attacked(server, mount, [(Attack(stuck.change_each, ("chmod",), 5), ATTACKER)]):
            wait_until(lambda: mount.counters().under_way == 5, "five requests under way")
            told = {
                uid: Child(_statvfs_as, uid, mount.path).result()
                for uid in (ATTACKER, VICTIM, ROOT)
            }
        assert told == {ATTACKER: errno.EAGAIN, VICTIM: 0, ROOT: 0}
        assert Child(_statvfs_as, ATTACKER, mount.path).result() == 0
    finally:
        mount.end()


def test_who_is_refused_takes_no_mount_away(guard: Watchdog, open_directory: Path) -> None:
    """A directory that he asks for again is still there for others, and what is mounted below.

    The kernel drops a name whose lookup fails but with ENOMEM or EINTR, and with it all mounts
    below the name, in every mount namespace.
    """
    base = open_directory / "refused"
    base.mkdir()
    server = Server(guard, base, ())
    options = ("-o", "entry_timeout=0")
    mount = open_mount(guard, server.new_base("mount"), *options, command=FEW_REQUESTS)
    (mount.source / "shared" / "disk").mkdir()
    disk = mount.path / "shared" / "disk"
    try:
        with (
            mounted("tmpfs", "tmpfs", disk),
            attacked(server, mount, [(Attack(stuck.change_each, ("chmod",), 5), ATTACKER)]),
        ):
            wait_until(lambda: mount.counters().under_way == 5, "five requests under way")
            refused = Child(_statvfs_as, ATTACKER, disk).result()
            assert is_mounted(disk), "somebody's mount is gone"
        assert refused == errno.ENOMEM
    finally:
        mount.end()


# Many attackers at once

CROWD_SECONDS = 60.0 if SOAK else 3.0
CROWD_SIZE = 50 if SOAK else 8
LEASE_BREAK_TIME = 45.0  # seconds that the kernel gives the owner of a lease by default
# Each of another user than the one before; all together are more than the workers are.
CROWD = [
    "chmod of a held file",
    "write of a file written from the mount",
    "chmod of 40 held files",
    "unlink of a held file",
    "rename in a held directory",
    "opens of leased files",
    "mkdir in a held top directory",
    "lookups in a held directory",
    "truncate of a held file",
    "rename over a held file",
    "write to 40 held files",
]


@pytest.mark.limit(60.0 + 4 * CROWD_SECONDS)
@pytest.mark.parametrize("server", SERVERS if SOAK else SECOND)
def test_nobody_else_waits_for_many_attackers(
    guard: Watchdog, servers: Callable[[str], Server], server: str
) -> None:
    """Of several users and kinds at once."""
    attacks = []
    for number, kind in enumerate(itertools.islice(itertools.cycle(CROWD), CROWD_SIZE)):
        attack = ATTACKS[kind]
        if number >= len(CROWD):  # one of them makes very many calls
            attack = dataclasses.replace(attack, count=min(attack.count, 40))
        if attack.function is stuck.open_leased and CROWD_SECONDS > LEASE_BREAK_TIME:
            attack = dataclasses.replace(attack, lasts=False)
        attacks.append((attack, 2001 + number % 7))  # not the user who measures
    lines = _patiently(partial(_attacked_and_compared, servers(server), attacks, CROWD_SECONDS), 4)
    print(f"\n{CROWD_SIZE} attackers:", *lines, sep="\n")


@pytest.mark.parametrize("kind", ["write to 40 held files", "reads that never end"])
def test_nobody_else_waits_where_all_hands_are_stuck(
    guard: Watchdog, servers: Callable[[str], Server], kind: str
) -> None:
    """Three users have all of them, and a leader; reads and writes go to the workers."""
    attacks = [(ATTACKS[kind], uid) for uid in (2001, 2002, 2003)]
    lines = _patiently(partial(_attacked_and_compared, servers("second-role"), attacks, SECONDS))
    print(f"\nthree users, {kind}:", *lines, sep="\n")


# Ending under attack


def _answered_at_last(path: Path) -> None:
    """Ask for names until there is no mount any more."""
    become(VICTIM)
    for number in itertools.count():
        try:
            os.stat(path / f"{number}")
        except FileNotFoundError:
            if not os.path.ismount(path):
                return
        except OSError:
            return
        time.sleep(PAUSE)


def _ask_to_end(mount: Mount, way: str) -> None:
    if way == "SIGTERM":
        mount.log.expect("the dispatcher does not end")
        mount.signal(signal.SIGTERM)
    else:
        done = run(*way.split(), mount.path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("chmod of 40 held files", "SIGTERM"),
        ("chmod of 40 held files", "umount -f -l"),
        ("chmod of 40 held files", "fusermount3 -u -z"),
        ("chmod of a held file", "SIGTERM"),
        ("opens of leased files", "SIGTERM"),
    ],
)
def test_a_daemon_ends_under_attack(
    guard: Watchdog, open_directory: Path, name: str, way: str
) -> None:
    """The mount point is given back in time, whatever the attacker does, and callers go on.

    Its process ends when the last call that it makes for the attacker does.
    """
    base = open_directory / f"end{next(_numbers)}"
    base.mkdir()
    server = Server(guard, base, ())
    mount = open_mount(guard, server.new_base("mount"), command=HASTY_NINEFUSE)
    try:
        with ExitStack() as stack:
            asking = Child(_answered_at_last, mount.path)
            _started.append(asking)
            stack.callback(_collect_started, server, mount)
            with attacked(server, mount, [(ATTACKS[name], ATTACKER)]) as (attacker,):
                assert attacker.board.waiting() == attacker.board.count
                _ask_to_end(mount, way)
                wait_until(lambda: not is_mounted(mount.path), "the mount point given back", 5.0)
                # Who is detached is served as long as he likes.
                if way != "fusermount3 -u -z":
                    asking.result(5.0)
                    wait_until(lambda: not attacker.board.waiting(), "the attacker's answers", 5.0)
            assert mount.wait(ENDED) in (0, 1)
            asking.result(ENDED)
    finally:
        if mount.process.poll() is None:
            _end_by_force(guard, mount)
        else:
            mount.end()
