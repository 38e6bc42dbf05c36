"""Trees and callers that mean harm: what they do must neither hang a mount nor lead it astray."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import random
import re
import signal
import stat
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mounting import (
    NINEFUSE,
    REPO,
    SOAK,
    Child,
    Mount,
    Place,
    errno_of,
    in_child,
    run,
    wait_until,
)
from ops_helpers import ROOT, Client, client_of
from servers import SOME_MODELS

from ninefuse import ops
from ninefuse.fuse import callbacks
from ninefuse.linux.syscalls import RENAME_EXCHANGE, rename
from ninefuse.ops import Changes, LockRange

pytestmark = pytest.mark.soak

SECONDS = 20.0 if SOAK else 0.4  # of a race
# Where the models share what is tested, or the second is worst at it.

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts in the source")


# The mount inside its own source


@contextmanager
def bound(what: Path, where: Path, option: str = "--bind") -> Iterator[None]:
    """Show a directory, or a file, at another place as well."""
    done = run("mount", option, what, where)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        run("umount", "-l", where)


def _look_around(path: Path) -> dict[str, int]:
    """What comes of each way to a name that leads back into its own mount."""
    (path / "other").write_bytes(b"x")
    return {
        "stat": errno_of(os.stat, path / "loop"),
        "below": errno_of(os.stat, path / "loop" / "file"),
        "open": errno_of(os.open, path / "loop", os.O_RDONLY),
        "create": errno_of(os.open, path / "loop" / "new", os.O_CREAT | os.O_WRONLY),
        "mkdir": errno_of(os.mkdir, path / "loop"),
        "rmdir": errno_of(os.rmdir, path / "loop"),
        "rename": errno_of(os.rename, path / "loop", path / "moved"),
        "over": errno_of(os.rename, path / "other", path / "loop"),
        "link": errno_of(os.link, path / "other", path / "loop"),
        "a file": errno_of(os.stat, path / "looped"),
    }


def _list(path: Path) -> list[str]:
    """The names of a directory, with their attributes where there are any."""
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() or entry.name)


@needs_root
@pytest.mark.limit(20.0)
@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_mount_inside_its_own_source_is_not_entered(
    new_mount: Callable[..., Mount], model: str
) -> None:
    """Neither what is new to the mount nor what it knew before something was mounted on it."""
    mount = new_mount("--model", model, "-o", "cache=none")
    (mount.source / "loop").mkdir()
    (mount.source / "known" / "below").mkdir(parents=True)
    for name in ("file", "looped"):
        (mount.source / name).write_bytes(b"x")
    assert in_child(_list, mount.path / "known") == ["below"]
    with ExitStack() as stack:
        for name in ("loop", "known"):
            stack.enter_context(bound(mount.path, mount.source / name))
        stack.enter_context(bound(mount.path / "file", mount.source / "looped"))
        found = in_child(_look_around, mount.path, seconds=5.0)
        assert found == dict.fromkeys(found, errno.ELOOP)
        assert in_child(errno_of, os.rmdir, mount.path / "known", seconds=5.0) == errno.ELOOP
        listed = in_child(_list, mount.path, seconds=5.0)
        assert listed == ["file", "known", "loop", "looped", "other"]
        assert in_child(os.stat, mount.source / "loop" / "file", seconds=5.0).st_size == 1
    assert in_child(_list, mount.path / "known", seconds=5.0) == ["below"]
    assert in_child(errno_of, os.stat, mount.path / "loop", seconds=5.0) == 0


@needs_root
@pytest.mark.limit(20.0)
@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_directory_above_both_inside_the_source(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    """All of it is shown but the mount; the source below itself is a directory of its own."""
    mount = new_mount("--model", model, "-o", "cache=none")
    loop = mount.source / "loop"
    loop.mkdir()
    (mount.source / "file").write_bytes(b"x")
    above = mount.source.parent
    with bound(above, loop, "--rbind"):
        seen = mount.path / "loop"
        assert in_child(_list, seen, seconds=5.0) == ["log", "mount", "source"]
        assert in_child(errno_of, os.stat, seen / "mount", seconds=5.0) == errno.ELOOP
        assert in_child(_list, seen / "source", seconds=5.0) == ["file", "loop"]
        assert in_child(os.stat, mount.path / "file", seconds=5.0).st_size == 1


@needs_root
def test_with_xdev_what_the_mount_covers_in_its_own_source_is_shown(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "xdev")
    (mount.source / "loop" / "covered").mkdir(parents=True)
    with bound(mount.path, mount.source / "loop"):
        assert in_child(_list, mount.path / "loop", seconds=5.0) == ["covered"]


# Directories that pass mounts on to each other; $1 is the model, the rest the command.
PASSED_ON = """
mount -t tmpfs tmpfs /mnt
mount --make-rshared /mnt
cd /mnt; mkdir -p top/mount top/source/loop; touch top/source/file
mount --bind top top/source/loop
model=$1; shift
"$@" --log /mnt/log --model "$model" top/source top/mount
trap 'cd /; fusermount3 -u /mnt/top/mount || fusermount3 -uz /mnt/top/mount' EXIT
grep -c " /mnt/top/.* fuse.ninefuse" /proc/self/mountinfo
ls top/mount/loop
for n in top/mount/loop/mount top/mount/loop/mount/file top/mount/file; do
    timeout 5 "$PYTHON" -c 'import os, sys; os.stat(sys.argv[1])' $n 2>&1 | grep -o "Errno [0-9]*"
done
true
"""


@needs_root
@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_mount_that_is_passed_on_into_its_own_source(model: str) -> None:
    """As on systems where all mounts are shared: the bind mount was there before."""
    namespace = ("unshare", "-m", "--propagation", "private", "env", f"PYTHON={sys.executable}")
    done = run(*namespace, f"PYTHONPATH={REPO}", "sh", "-ec", PASSED_ON, "sh", model, *NINEFUSE)
    assert done.stderr == ""
    # Twice in the table, since it is at the bind mount, too.
    assert done.stdout.split("\n") == ["2", "mount", "source", *2 * [f"Errno {errno.ELOOP}"], ""]


# Looking who opens what

_libc = ctypes.CDLL(None, use_errno=True)
_IN_OPEN = 0x20
_IN_ALL_EVENTS = 0xFFF
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


@contextmanager
def watched(mask: int, *paths: Path) -> Iterator[Callable[[], list[str]]]:
    """Yield a function that tells what has happened to files since it was last asked."""
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    names = {_libc.inotify_add_watch(fd, os.fsencode(path), mask): path.name for path in paths}
    assert min(names) > 0

    def events() -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(fd, 1 << 16):
                while data:
                    watch, what, _, length = _EVENT.unpack_from(data)
                    if what & mask:  # and not that it is gone
                        found.append(f"{names[watch]}: {what:#x}")
                    data = data[_EVENT.size + length :]
        return found

    try:
        yield events
    finally:
        os.close(fd)


# Symlinks in the place of directories and files


def _swap(source: Path, pairs: list[tuple[str, str]], done: mmap.mmap) -> None:
    """Exchange pairs of names as fast as possible, and count."""
    fd = os.open(source, os.O_PATH | os.O_DIRECTORY)
    for count in itertools.count(1):
        for one, other in pairs:
            rename(fd, one.encode(), fd, other.encode(), RENAME_EXCHANGE)
        done[:8] = struct.pack("q", count * len(pairs))


def _walk_and_change(top: Path, seed: int, until: float) -> tuple[Counter[str], set[int]]:
    """All kinds of calls by way of names that are swapped; what came of them, and numbers seen."""
    dice = random.Random(seed)
    seen: set[int] = set()
    outcomes: Counter[str] = Counter()

    def read(path: Path) -> None:
        with open(path, "rb") as file:
            seen.add(os.fstat(file.fileno()).st_ino)
            assert b"secret" not in file.read()

    def write(path: Path) -> None:
        with open(path, "r+b") as file:
            file.write(b"inside")

    def look(path: Path) -> None:
        seen.add(path.lstat().st_ino)
        seen.add(path.stat().st_ino)

    def list_above(path: Path) -> None:
        seen.update(entry.inode() for entry in os.scandir(path.parent))

    def create(path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    changes: list[Callable[[Path], object]] = [
        read, write, look, list_above, os.listxattr, partial(os.chmod, mode=0o640), os.utime,
        partial(os.truncate, length=3), lambda path: os.setxattr(path, "user.mine", b"1"),
    ]  # fmt: skip
    calls: list[Callable[[Path], object]] = [
        *changes, create, os.unlink, os.mkdir, os.rmdir,
        partial(os.symlink, "nowhere"), partial(os.mknod, mode=stat.S_IFSOCK | 0o600),
        lambda path: os.rename(path, path.with_name("moved")),
        lambda path: os.rename(path, top / "moved"),
        lambda path: os.link(path, top / f"linked{seed}"),
        lambda path: os.link(top / "own", path),
    ]  # fmt: skip
    names = ["directory/file", "directory/below/file", "directory/new", "directory/below/new"]
    names += ["directory/below", "moved", f"linked{seed}"]
    while time.monotonic() < until or outcomes.total() < 50:
        if dice.randrange(5):
            code = errno_of(dice.choice(calls), top / dice.choice(names))
        else:  # what is swapped itself stays
            code = errno_of(dice.choice(changes), top / "file")
        outcomes[errno.errorcode.get(code, "done")] += 1
    return outcomes, seen


def _state(top: Path) -> dict[str, Any]:
    """All there is to know of a tree."""
    return {
        str(path): (
            tuple(path.lstat())[:7],
            path.lstat().st_mtime_ns,
            path.lstat().st_ctime_ns,
            os.listxattr(path),
            path.read_bytes() if path.is_file() else sorted(os.listdir(path)),
        )
        for path in (top, *top.rglob("*"))
    }


@pytest.mark.limit(60.0 + SECONDS)
@pytest.mark.parametrize("model", SOME_MODELS)
def test_symlinks_swapped_for_directories_lead_nowhere(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    """Where they lead there is something for the daemon only: beside the mount is nothing."""
    source, outside = tmp_path / "deep" / "source", tmp_path / "deep" / "outside"
    for top in (outside, source / "directory"):
        (top / "below").mkdir(parents=True)
        for place in (top, top / "below"):
            (place / "file").write_bytes(b"secret" if top == outside else b"inside")
    (source / "file").write_bytes(b"inside")
    (source / "own").write_bytes(b"inside")
    (source / "way").symlink_to("../outside")
    (source / "trap").symlink_to("../outside/file")
    (source / "directory" / "way").symlink_to("../../outside/below")
    pairs = [("directory", "way"), ("file", "trap")]
    mount = new_mount("--model", model, "-o", "cache=none", source=source)
    before = _state(outside)
    forbidden = {path.stat().st_ino for path in (outside, *outside.rglob("*"))}
    until = time.monotonic() + SECONDS
    with watched(_IN_ALL_EVENTS, outside, outside / "file", outside / "below") as events:
        with ExitStack() as stack:
            done = stack.enter_context(mmap.mmap(-1, 8))
            stack.enter_context(Child(_swap, source, pairs, done))
            clients = [
                stack.enter_context(Child(_walk_and_change, mount.path, seed, until))
                for seed in range(3)
            ]
            outcomes: Counter[str] = Counter()
            for client in clients:
                counts, seen = client.result(SECONDS + 20.0)
                outcomes += counts
                assert not seen & forbidden
            swaps: int = struct.unpack("q", done[:])[0]
        assert events() == []
    assert _state(outside) == before
    print(f"{model}: {swaps} swaps, {outcomes.total()} calls: {dict(outcomes.most_common())}")
    assert swaps > 100
    assert outcomes["done"] > 20
    assert outcomes["ENOENT"] > 20


# Special files


def _special_files(top: Path) -> list[Path]:
    """A FIFO without a writer, a socket and, if we may, a device."""
    os.mkfifo(top / "fifo")
    os.mknod(top / "socket", stat.S_IFSOCK | 0o600)
    if os.geteuid() == 0:
        os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    return sorted(top.iterdir())


def _use_in_every_way(client: Client, name: bytes) -> Counter[str]:
    """Each operation, on a name and on a fid of it; which of them succeeded."""
    done: Counter[str] = Counter()

    def attempt(operation: Callable[..., Any], *args: Any) -> None:
        with contextlib.suppress(OSError):
            client.do(operation, *args)
            done[operation.__name__] += 1

    known = client.know(name)
    client.lose_descriptor(known)
    client.do(ops.getattr, known.number)  # which opens it again
    fid, nodeid = client.walk(name), known.number
    client.do(ops.link, ROOT, fid, b"other")
    for number in (fid, nodeid):
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_NONBLOCK):
            attempt(ops.lopen, number, flags)
            attempt(callbacks.open, number, flags)
        for changes in (
            Changes(mode=0o640),
            Changes(uid=os.geteuid(), gid=os.getegid()),
            Changes(size=0),
            Changes(atime=1, mtime=2),
            Changes(ctime=True),
        ):
            attempt(ops.setattr, number, changes)
        for operation, *args in (
            (ops.getattr,), (ops.statfs,), (ops.readlink,),
            (ops.read, 0, 10), (ops.write, 0, b"x"),
            (ops.fsync,), (ops.readdir, 0, 1000), (ops.lock, 0, LockRange(1, 0, 0)),
            (ops.getlock, LockRange(1, 0, 0)), (ops.xattrwalk, client.new()),
            (ops.xattrwalk, client.new(), b"user.x"), (callbacks.listxattr,),
            (callbacks.getxattr, b"trusted.x"), (callbacks.setxattr, b"trusted.x", b"1"),
            (callbacks.removexattr, b"trusted.x"), (ops.lcreate, b"x", os.O_RDWR, 0o600),
            (ops.walk, client.new(), [b"x"]), (ops.rename, ROOT, b"moved"),
            (ops.rename, ROOT, name),
        ):  # fmt: skip
            attempt(operation, number, *args)
    for flags in (0, os.O_EXCL, os.O_TRUNC):
        attempt(ops.lcreate, client.walk(), name, os.O_RDWR | flags, 0o600)
    attempt(ops.renameat, ROOT, name, ROOT, b"moved")
    attempt(ops.renameat, ROOT, b"moved", ROOT, name)
    attempt(ops.readdir, client.open(), 0, 10_000)
    attempt(ops.unlinkat, ROOT, b"other")
    attempt(ops.remove, fid)
    return done


def test_no_operation_opens_a_special_file(tmp_path: Path) -> None:
    """A FIFO without a writer would keep it waiting; a device may do anything."""
    paths = _special_files(tmp_path)

    def use() -> tuple[list[Counter[str]], list[str]]:
        with watched(_IN_OPEN, *paths) as events, client_of(tmp_path) as client:
            return [_use_in_every_way(client, os.fsencode(path.name)) for path in paths], events()

    found, opened = in_child(use, seconds=10.0)
    assert opened == []
    for done in found:
        assert {"getattr", "setattr", "rename", "renameat", "unlinkat", "remove"} <= {*done}
        assert not {"lopen", "open", "lcreate", "read", "write", "fsync", "lock"} & {*done}
    assert os.listdir(tmp_path) == []


def _use_special(path: Path) -> None:
    path.lstat()
    os.chmod(path, 0o640)
    os.chown(path, os.geteuid(), os.getegid())
    os.utime(path)
    os.listxattr(path)
    errno_of(os.setxattr, path, "trusted.x", b"1")
    errno_of(os.truncate, path, 0)
    path.rename(path.with_name("moved"))
    os.link(path.with_name("moved"), path)
    # The kernel's own FIFO, of the mount; it waits for nobody.
    if path.name == "fifo":
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    os.listdir(path.parent)
    os.unlink(path.with_name("moved"))
    os.unlink(path)


def test_special_files_are_used_through_the_mount_and_never_opened(place: Place) -> None:
    paths = _special_files(place.source)
    with watched(_IN_OPEN, *paths) as events:
        for path in paths:
            in_child(_use_special, place.path / path.name, seconds=10.0)
        assert events() == []
    assert os.listdir(place.path) == []


# Names in logs


def test_names_do_not_forge_lines_of_the_log(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """Those of the directories are in it; those of files should something else go wrong."""
    forged = "\n2026-01-01 00:00:00 [1] ERROR ninefuse: forged\r\x1b[31m\x7f\u2028"
    source = tmp_path / f"source{forged}"
    source.mkdir()
    mount = new_mount("--log-level", "debug", source=source)
    mount.log.expect("forged")
    (mount.path / forged).mkdir()
    for name in (forged, f"{forged}/{forged}"):
        errno_of(os.rmdir, mount.path / name / forged)
        os.listxattr(mount.path / forged)
    mount.counters()
    mount.signal(signal.SIGUSR2)
    mount.log.wait_for(r"requests under way")
    text = mount.log.text()
    assert "forged" in text
    event = re.compile(rf"\d{{4}}-\d\d-\d\d \S+ \[{mount.pid}\] [A-Z]+ \S+: ")
    for line in text[:-1].split("\n"):
        assert event.match(line), line
        assert line.isprintable(), line
    shown = run(sys.executable, "-m", "ninefuse.stats.command", mount.path)
    assert shown.returncode == 0, shown.stderr
    assert "forged" in shown.stdout
    assert all(line.isprintable() for line in shown.stdout.split("\n"))


# Callers who change who they are

_IDS = (12345, 12346)


def _change_ids(stop: threading.Event) -> None:
    """Have this process be one user and the other in turn, with the right to be either."""
    one, other = _IDS
    while not stop.is_set():
        for now, then in ((one, other), (other, one)):
            os.setresgid(now, now, then)
            os.setresuid(now, now, then)


def _create_as_anybody(top: Path, seconds: float) -> int:
    """Make things in several threads while another changes the ids of all; how many."""
    one, other = _IDS
    os.chdir(top)  # the way there may be closed to others
    os.setgroups([])
    os.setresgid(one, one, other)
    os.setresuid(one, one, other)
    stop = threading.Event()
    until = time.monotonic() + seconds
    made: Counter[int] = Counter()
    failures: list[BaseException] = []

    def make(who: int) -> None:
        ways: list[Callable[[Path], object]] = [
            os.mkdir,
            os.mkfifo,
            partial(os.symlink, "x"),
            lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)),
        ]
        try:
            while time.monotonic() < until or made[who] < 20:
                ways[made[who] % len(ways)](Path(f"{who}-{made[who]}"))
                made[who] += 1
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=make, args=(who,)) for who in range(4)]
    changer = threading.Thread(target=_change_ids, args=(stop,))
    for thread in (changer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    changer.join()
    assert not failures, failures
    return made.total()


def _credentials_of(mount: Mount) -> set[tuple[str, ...]]:
    """The ids and capabilities of a daemon's threads."""
    found = set()
    for status in Path(f"/proc/{mount.pid}/task").glob("*/status"):
        lines = status.read_text().splitlines()
        found.add(tuple(line for line in lines if re.match(r"Uid|Gid|Groups|Cap", line)))
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for others")
@pytest.mark.limit(60.0 + SECONDS)
@pytest.mark.parametrize("model", SOME_MODELS)
def test_what_a_caller_makes_while_it_changes_its_ids_is_its_own(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    top = tmp_path / "source" / "top"
    top.mkdir(parents=True)
    top.chmod(0o777)
    mount = new_mount("--model", model, "-o", "allow_other", source=top.parent)
    before = _credentials_of(mount)
    assert len(before) == 1
    made = in_child(_create_as_anybody, mount.path / "top", SECONDS, seconds=SECONDS + 20.0)
    found = [path.lstat() for path in top.iterdir()]
    assert len(found) == made
    owners = Counter((a.st_uid, a.st_gid) for a in found)
    print(f"{model}: {made} made, by owner and group: {dict(owners)}")
    assert {uid for uid, _ in owners} == set(_IDS)
    assert {gid for _, gid in owners} == set(_IDS)
    (mount.path / "root").touch()
    assert (mount.source / "root").stat().st_uid == 0
    assert _credentials_of(mount) == before


# Crowds, signals, and ends in the middle


def _open_at_once(path: Path, threads: int, opened: int, go_on: int) -> int:
    """Open a file in many threads at once and hold it; how many read what is in it."""
    barrier = threading.Barrier(threads)
    fds: list[int] = []

    def open_it() -> None:
        barrier.wait()
        fds.append(os.open(path, os.O_RDWR))

    crowd = [threading.Thread(target=open_it) for _ in range(threads)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    os.write(opened, b"x")
    os.read(go_on, 1)
    right = sum(os.pread(fd, 10, 0) == b"data" for fd in fds)
    for fd in fds:
        os.close(fd)
    return right


@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_thousand_opens_at_once(new_mount: Callable[..., Mount], model: str) -> None:
    mount = new_mount("--model", model)
    (mount.source / "file").write_bytes(b"data")
    before = mount.counters().descriptors
    opened, we_opened = os.pipe()
    go_on, we_go_on = os.pipe()
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            children = [
                stack.enter_context(
                    Child(_open_at_once, mount.path / "file", 250, we_opened, go_on)
                )
                for _ in range(4)
            ]
            said = b""
            while len(said) < 4:
                said += os.read(opened, 4)
            taken = time.monotonic() - started
            assert mount.counters().opened == 1000
            os.write(we_go_on, b"x" * 4)
            assert [child.result() for child in children] == [250] * 4
    finally:
        for fd in (opened, we_opened, go_on, we_go_on):
            os.close(fd)
    print(f"{model}: 1000 opens in {taken:.2f} s")
    wait_until(lambda: mount.counters().opened == 0, "the closes")
    # One for the file itself, which the kernel knows; and libfuse's pipe.
    wait_until(lambda: mount.counters().descriptors <= before + 4, "the descriptors' end")


def _work_through_signals(top: Path, seconds: float) -> tuple[int, int]:
    """Calls of many kinds with a signal every half millisecond; how many rounds, and signals.

    A request that was made twice would find its name there already, or gone, or its record
    twice; one that was lost would show as well.
    """
    signals = 0

    def count(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1

    until = time.monotonic() + seconds
    log = os.open(top / "log", os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    synced = os.open(top / "synced", os.O_CREAT | os.O_RDWR | os.O_SYNC, 0o600)
    # It does not restart what it interrupts: that is left to Python, which tells of all else.
    signal.signal(signal.SIGALRM, count)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    rounds = 0
    while time.monotonic() < until or signals < 100:
        record = b"%08d" % rounds * 2000  # several pages
        assert os.write(log, record) == len(record)
        assert os.pread(log, len(record), rounds * len(record)) == record
        assert os.pwrite(synced, record[:512], rounds * 512) == 512
        one, other, third = (top / f"{name}{rounds}" for name in ("one", "other", "third"))
        os.close(os.open(one, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        one.rename(other)
        os.link(other, one)
        os.mkdir(third)
        third.rmdir()
        third.symlink_to("x")
        other.unlink()
        third.unlink()
        rounds += 1
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    return rounds, signals


@pytest.mark.limit(60.0 + SECONDS)
def test_requests_interrupted_by_signals_are_done_once(place: Place) -> None:
    rounds, signals = in_child(_work_through_signals, place.path, SECONDS, seconds=SECONDS + 20.0)
    print(f"{place.mount.model}: {rounds} rounds of calls, {signals} signals")
    assert signals >= 100
    expected = b"".join(b"%08d" % n * 2000 for n in range(rounds))
    assert (place.source / "log").read_bytes() == expected
    expected = b"".join((b"%08d" % n * 2000)[:512] for n in range(rounds))
    assert (place.source / "synced").read_bytes() == expected
    names = {"log", "synced", *(f"one{n}" for n in range(rounds))}
    assert set(os.listdir(place.source)) == names


_BLOCK = 8 << 20


def _overwrite(path: Path, flags: int, begun: int) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    new = b"n" * _BLOCK
    os.write(begun, b"x")
    os.pwrite(fd, new, 0)
    time.sleep(60.0)


@pytest.mark.limit(120.0)
@pytest.mark.parametrize("model", SOME_MODELS)
@pytest.mark.parametrize("flags", [0, os.O_SYNC], ids=["cached", "synced"])
def test_a_process_killed_in_the_middle_of_a_write(
    new_mount: Callable[..., Mount], model: str, flags: int
) -> None:
    """What it had written by then is there, from the start on, and the file can be used."""
    mount = new_mount("--model", model)
    dice = random.Random(flags)
    path, source = mount.path / "file", mount.source / "file"
    cut = 0
    turns = 60 if SOAK else 6
    for _ in range(turns):
        source.write_bytes(b"o" * _BLOCK)
        begun, we_began = os.pipe()
        try:
            with Child(_overwrite, path, flags, we_began) as writer:
                os.read(begun, 1)
                time.sleep(dice.uniform(0.0, 0.02))
                os.kill(writer.pid, signal.SIGKILL)
        finally:
            os.close(begun)
            os.close(we_began)
        wait_until(lambda: mount.counters().opened == 0, "the end of what it had asked for")
        data = source.read_bytes()
        written = data.rstrip(b"o")
        assert written == b"n" * len(written)
        assert len(data) == _BLOCK
        cut += 0 < len(written) < _BLOCK
        with open(path, "r+b", buffering=0) as file:
            assert file.write(b"again") == 5
        assert source.read_bytes()[:5] == b"again"
    print(f"{model}: {turns} writers killed, {cut} of them in the middle of the write")
