"""`ninefuse --listen`: a mount and sockets, one session: names, locks and writes on both sides."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from client9p import LIMIT, ROOT, Client
from mounting import NINEFUSE, Mount, in_child, run, wait_until
from ops_helpers import fails

from ninefuse import sockets
from ninefuse.linux import mountinfo
from ninefuse.wire.listening import Address
from ninefuse.wire.messages import NOFID, NONUNAME

BASIC = 0x7FF
MODELS = ("none", "first", "second")
OPTIONS = "cache=none,no_root_squash"


@pytest.fixture(params=MODELS)
def mount(request: pytest.FixtureRequest, new_mount: Callable[..., Mount], tmp_path: Path) -> Mount:
    words = ("--listen", f"unix:{tmp_path / 'socket'}", "--model", request.param, "-o", OPTIONS)
    mount = new_mount(*words)
    (mount.source / "a" / "b").mkdir(parents=True)
    (mount.source / "f").write_bytes(b"hello")
    return mount


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return Address("unix", str(tmp_path / "socket"))


@pytest.fixture
def c(mount: Mount, address: Address) -> Iterator[Client]:
    with Client.to(address) as client:
        yield client


def test_both_show_the_same_files(mount: Mount, c: Client) -> None:
    for name in ("f", "a", "a/b"):
        c.walk(5, *os.fsencode(name).split(b"/"))
        found = c.call("Tgetattr", 5, BASIC)
        shown = (mount.path / name).stat()
        assert (found[1][2], found[2], found[5]) == (shown.st_ino, shown.st_mode, shown.st_nlink)
        c.clunk(5)
    (mount.path / "new").write_bytes(b"by the mount")
    c.open(5, b"new", flags=2)
    assert c.call("Tread", 5, 0, 99) == (b"by the mount",)
    c.call("Twrite", 5, 0, b"BY")
    assert (mount.path / "new").read_bytes() == b"BY the mount"
    c.call("Tmkdir", ROOT, b"dir", 0o700, NONUNAME)
    assert (mount.path / "dir").is_dir()


def test_fids_follow_what_the_mount_renames(mount: Mount, c: Client) -> None:
    c.walk(5, b"f")
    c.walk(6, b"a", b"b")
    os.rename(mount.path / "a", mount.path / "z")
    os.rename(mount.path / "f", mount.path / "z" / "b" / "g")
    c.walk(7, b"..", fid=6)
    assert c.call("Tgetattr", 7, BASIC)[1][2] == (mount.path / "z").stat().st_ino
    c.call("Trename", 5, NOFID, b"h")
    assert os.listdir(mount.path / "z" / "b") == ["h"]
    c.call("Tremove", 5)
    assert os.listdir(mount.source / "z" / "b") == []


def test_fids_follow_what_the_mount_lists_at_another_place(mount: Mount, c: Client) -> None:
    """Moved in the source, by nobody's request; the listing looks at each entry."""
    c.walk(5, b"f")
    (mount.source / "f").rename(mount.source / "g")
    with fails(errno.ENOENT):
        c.call("Trename", 5, ROOT, b"x")
    assert "g" in os.listdir(mount.path)
    c.call("Tremove", 5)
    assert not (mount.source / "g").exists()


def test_the_mount_follows_what_a_client_renames(mount: Mount, c: Client) -> None:
    """A working directory, a file that is open, and a file that the kernel knows."""
    with (mount.path / "f").open("rb") as there:
        fd = os.open(mount.path / "a" / "b", os.O_RDONLY)
        try:
            c.call("Trenameat", ROOT, b"a", ROOT, b"z")
            c.call("Trenameat", ROOT, b"f", ROOT, b"g")
            (mount.source / "a").mkdir()
            os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            assert (mount.source / "z" / "b" / "made").exists()
            os.stat("..", dir_fd=fd)
        finally:
            os.close(fd)
        assert os.fstat(there.fileno()).st_ino == (mount.path / "g").stat().st_ino
    c.walk(5, b"g")
    c.call("Tremove", 5)
    assert not (mount.path / "g").exists()


def test_a_file_is_removed_on_one_side_and_open_on_the_other(mount: Mount, c: Client) -> None:
    c.open(5, b"f")
    os.unlink(mount.path / "f")
    assert c.call("Tread", 5, 0, 9) == (b"hello",)
    assert c.call("Tgetattr", 5, BASIC)[5] == 0
    (mount.path / "g").write_bytes(b"there")
    with (mount.path / "g").open("rb") as there:
        c.call("Tunlinkat", ROOT, b"g", 0)
        assert there.read() == b"there"
        assert os.fstat(there.fileno()).st_nlink == 0


def lock(path: Path) -> int:
    """In a process of its own: the errno of a lock of the whole file, to write."""
    with path.open("r+b") as there:
        try:
            fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            return e.errno or -1
    return 0


def test_locks_exclude_each_other(mount: Mount, c: Client) -> None:
    c.open(5, b"f", flags=2)
    with (mount.path / "f").open("r+b") as there:
        fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert c.call("Tlock", 5, 1, 0, 0, 0, 1, b"c") == (1,)
        kind, *_, pid, _ = c.call("Tgetlock", 5, 1, 0, 0, 1, b"c")
        assert (kind, pid) == (1, os.getpid())
        c.send("Tlock", 5, 1, 1, 0, 0, 1, b"c", tag=9)  # waits
        c.call("Tgetattr", ROOT, BASIC)
    assert c.receive().values == (0,)
    assert in_child(lock, mount.path / "f") in (errno.EAGAIN, errno.EACCES)
    assert in_child(lock, mount.source / "f") in (errno.EAGAIN, errno.EACCES)
    c.clunk(5)
    assert in_child(lock, mount.path / "f") == 0


def test_many_on_both_sides(mount: Mount, address: Address) -> None:
    """Names are made, moved and removed by two clients and two on the mount at a time."""
    failures: list[BaseException] = []

    def by_client(number: int) -> None:
        with Client.to(address) as c:
            for turn in range(60):
                name = b"c%d-%d" % (number, turn)
                c.create(5, name, name)
                c.clunk(5)
                c.call("Trenameat", ROOT, name, ROOT, b"moved-" + name)
                c.open(6, b"moved-" + name)
                assert c.call("Tread", 6, 0, 99) == (name,)
                c.call("Tunlinkat", ROOT, b"moved-" + name, 0)
                c.clunk(6)

    def by_mount(number: int) -> None:
        for turn in range(60):
            path = mount.path / f"m{number}-{turn}"
            path.write_text(path.name)
            path.rename(mount.path / f"moved-{path.name}")
            assert (mount.path / f"moved-{path.name}").read_text() == path.name
            (mount.path / f"moved-{path.name}").unlink()

    def guarded(function: Callable[[int], None], number: int) -> None:
        try:
            function(number)
        except BaseException as e:
            failures.append(e)

    threads = [
        threading.Thread(target=guarded, args=(function, number))
        for function in (by_client, by_mount)
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * LIMIT)
    assert not failures
    assert sorted(os.listdir(mount.source)) == ["a", "f"]


def test_nothing_is_left_of_a_client(mount: Mount, address: Address) -> None:
    before = mount.counters()
    with Client.to(address) as c:
        for fid in range(1, 50):
            c.open(fid, b"f")
        assert mount.counters().opened >= 49
    wait_until(lambda: mount.counters().fids <= before.fids, "its fids are gone", LIMIT)
    after = mount.counters()
    assert after.opened == 0
    assert "9p lopen 49" in after.text


def test_the_end_of_the_mount_is_the_end_of_the_sockets(
    mount: Mount, c: Client, tmp_path: Path
) -> None:
    """Whoever unmounts; and a client that has files open keeps it no longer."""
    c.open(5, b"f")
    assert run("fusermount3", "-u", mount.path).returncode == 0
    assert mount.wait() == 0
    assert c.is_hung_up()
    assert "client 0: disconnected" in mount.log.text()
    assert not (tmp_path / "socket").exists()


def test_a_signal_ends_both(mount: Mount, c: Client, tmp_path: Path) -> None:
    c.open(5, b"f")
    # Busy, but of no file: of files only the client has one open, which keeps nothing.
    fd = os.open(mount.path, os.O_PATH)
    try:
        mount.signal(signal.SIGTERM)
        assert mount.wait(7.0) == 0
    finally:
        os.close(fd)
    assert c.is_hung_up()
    assert not (tmp_path / "socket").exists()


def test_an_address_that_cannot_be_had(tmp_path: Path, mountpoint: Path) -> None:
    """Nothing is mounted then."""
    (tmp_path / "source").mkdir()
    (tmp_path / "taken").touch()
    for word in (f"unix:{tmp_path / 'taken'}", "nonsense:1"):
        done = run(*NINEFUSE, "--listen", word, tmp_path / "source", mountpoint)
        assert done.returncode in (2, 17)
        assert "--listen" in done.stderr
    assert not os.path.ismount(mountpoint)


# Programs in which a server cannot start.
NO_DESCRIPTOR = """
import os, resource, sys, trio
from ninefuse.command import cli

def run(*_):
    resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))
    while True:
        os.open("/dev/null", os.O_RDONLY)

trio.run = run
sys.exit(cli.main())
"""
NO_THREAD = """
import sys, threading
from ninefuse.command import cli

def start(thread, start=threading.Thread.start):
    if thread.name == "sockets":
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = start
sys.exit(cli.main())
"""


@pytest.mark.parametrize("words", [("-f",), ()], ids=["foreground", "daemon"])
@pytest.mark.parametrize(
    ("program", "reason"),
    [(NO_DESCRIPTOR, "Too many open files"), (NO_THREAD, "can't start new thread")],
    ids=["descriptors", "threads"],
)
def test_a_server_that_cannot_start_is_the_end_of_the_mount(
    tmp_path: Path, mountpoint: Path, program: str, reason: str, words: tuple[str, ...]
) -> None:
    """Whoever waits for the mount is told why there is none."""
    (tmp_path / "source").mkdir()
    words += ("--listen", f"unix:{tmp_path / 'socket'}")
    command = (sys.executable, "-c", program, *words)
    done = run(*command, tmp_path / "source", mountpoint, seconds=LIMIT)
    assert done.returncode == 17
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ninefuse: clients cannot be served ({reason}): raise ")
    assert mountinfo.connection_at(str(mountpoint)) is None
    assert not (tmp_path / "socket").exists()


def test_a_server_that_fails_later_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A daemon's standard error leads nowhere. The mount goes on."""

    def run(listeners: object, started: Callable[[], None]) -> None:
        started()
        raise RuntimeError("the loop failed")

    sockets._Start().run(SimpleNamespace(run=run), [])  # type: ignore[arg-type]
    assert "served no more" in caplog.text
    assert "the loop failed" in caplog.text


def test_who_is_at_the_mount_asks_anew_for_a_file_that_a_client_has_replaced(
    mount: Mount, c: Client
) -> None:
    """The number of a file that is gone may be given again: it is another node then."""
    for turn in range(20):
        name = b"n%d" % turn
        c.create(5, name, name)
        c.clunk(5)
        path = mount.path / os.fsdecode(name)
        assert path.read_bytes() == name
        c.call("Tunlinkat", ROOT, name, 0)
        with fails(errno.ENOENT):
            path.stat()
