"""Callers who keep what others need: memory that never comes, and what can be held with it.

A system call that is given memory of a file system that does not answer (stuckfs.py) waits for
it, and keeps what it has locked meanwhile: write(2) its file, getdents64(2) its directory, for
which the right to read it is enough. Whoever needs the same lock waits, too, for as long as it
pleases the attacker. On the source that is those who ask for the same file or directory. What
is here holds things in the source and makes calls on them through the mount, in processes of
ordinary users.

An `Attacker` is such a process. It tells of its calls on a `Board`, so that a test can see that
they are stuck, and that they have ended when what they waited for was let go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mounting import Child, Mount, Watchdog, become, is_running, wait_until
from stuckfs import SIZE

TRAINING = 60  # calls after which a daemon may believe that it knows their kind
_STACK = 256 << 10  # of a thread that only waits
_GENTLY = 0.002  # seconds between two looks at a board, …
_FOR_EACH = 20e-6  # … and for each call on it
_EXTENTS = 20_000  # of a file that takes a second to truncate
_MNT_FORCE, _MNT_DETACH = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


# Memory that never comes


class Memory:
    """The mount of a stuckfs.

    Args:
        watchdog: ends it, too, if a test takes too long.
        path: an empty directory.
        log: where its messages go.
    """

    def __init__(self, watchdog: Watchdog, path: Path, log: Path) -> None:
        script = Path(__file__).with_name("stuckfs.py")
        command = [sys.executable, "-I", "-S", str(script), str(path)]
        self.path = path
        self._mount = Mount(watchdog, path, path, log, command, r"^ready$")

    def release(self) -> None:
        """Abort the connection: what waits for its memory gets an error."""
        # By the mount, as its descriptor is in other processes, too; see umount2(2).
        _libc.umount2(os.fsencode(self.path), _MNT_FORCE | _MNT_DETACH)

    def end(self) -> None:
        self.release()
        self._mount.wait()
        self._mount.end()


@contextlib.contextmanager
def memory_that_never_comes(watchdog: Watchdog, path: Path, log: Path) -> Iterator[Memory]:
    """Mount it on a new directory, which goes with it."""
    path.mkdir()
    memory = Memory(watchdog, path, log)
    try:
        yield memory
    finally:
        memory.end()
        path.rmdir()


def stuck_page(memory: Path, number: int = 0) -> mmap.mmap:
    """A mapping of a file whose data never comes; it must not be touched in this process.

    The system calls that are given it do so without the interpreter's lock.
    """
    fd = os.open(memory / str(number), os.O_RDONLY)
    try:
        return mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)


# What an attacker and a test tell each other


class Board:
    """Figures in memory that an attacker and its test both have.

    Args:
        count: how many calls the attacker makes, each with a place of its own.
    """

    _GOES, _OVER, _READY, _LONGEST, _CALLS = range(5)

    def __init__(self, count: int) -> None:
        self.count = count
        self._memory = mmap.mmap(-1, 8 * (self._CALLS + 3 * count))
        self._cells = memoryview(self._memory).cast("d")

    # The attacker's side

    def ready(self) -> None:
        """All is prepared; wait until the test says go."""
        self._cells[self._READY] = 1
        while not self._cells[self._GOES]:
            time.sleep(_GENTLY)

    def wait_until_over(self) -> None:
        while not self.is_over():
            time.sleep(_GENTLY)

    def wait_for_returns(self, seconds: float) -> None:
        """Wait until all calls that were begun have returned, or the time is over."""
        deadline = time.monotonic() + seconds
        while self.waiting() and time.monotonic() < deadline:
            self.pause()

    def pause(self) -> None:
        """Wait a little between two looks at all calls."""
        time.sleep(_GENTLY + self.count * _FOR_EACH)

    def is_over(self) -> bool:
        return bool(self._cells[self._OVER])

    def call(self, number: int, function: Callable[[], object]) -> None:
        """Make a call at a place of the board; its error is kept there."""
        begin, end, code = (self._CALLS + n * self.count + number for n in range(3))
        self._cells[end] = 0
        self._cells[begin] = time.monotonic()
        try:
            function()
            self._cells[code] = 0
        except OSError as error:
            self._cells[code] = error.errno or -1
        finally:
            self._cells[end] = time.monotonic()
            taken = self._cells[end] - self._cells[begin]
            self._cells[self._LONGEST] = max(self._cells[self._LONGEST], taken)

    # The test's side

    def is_ready(self) -> bool:
        return bool(self._cells[self._READY])

    def go(self) -> None:
        self._cells[self._GOES] = 1

    def end(self) -> None:
        self._cells[self._OVER] = self._cells[self._GOES] = 1

    def begun(self) -> int:
        """How many calls have been begun."""
        return sum(begin > 0 for begin, _ in self._times())

    def waiting(self) -> int:
        """How many calls have not returned."""
        return sum(begin > 0 and not end for begin, end in self._times())

    def longest(self) -> float:
        """Seconds of the longest call; one that has not returned counts up to now."""
        now = time.monotonic()
        pending = (now - begin for begin, end in self._times() if begin and not end)
        return max(self._cells[self._LONGEST], *pending, 0.0)

    def errors(self) -> set[int]:
        """The errors of the calls that have returned."""
        first = self._CALLS + 2 * self.count
        return {int(code) for code in self._cells[first : first + self.count] if code}

    def _times(self) -> Iterator[tuple[float, float]]:
        first, count = self._CALLS, self.count
        begins = self._cells[first : first + count].tolist()
        return zip(begins, self._cells[first + count : first + 2 * count].tolist(), strict=True)


class Ground:
    """Where an attacker is: what its functions are given, in its process.

    Attributes:
        source, mount: its own directory, and the same one through the mount.
        top_source, top_mount: the directory above them, which all users may write in.
        memory: a directory of files whose data never comes.
        board: where it tells of its calls.
    """

    def __init__(self, source: Path, mount: Path, name: str, memory: Path, board: Board) -> None:
        self.source, self.mount = source / name, mount / name
        self.top_source, self.top_mount = source, mount
        self.memory = memory
        self.board = board

    def held(self, name: str = "held") -> Path:
        """A file in the source, whose lock `hold` takes."""
        path = self.source / name
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        return path

    def hold(self, *paths: Path) -> None:
        """Hold the locks of files of the source for ever, by writing what never comes."""
        page = stuck_page(self.memory)
        for path in paths:
            fd = os.open(path, os.O_WRONLY)
            _thread(_without_error, os.write, fd, page)
        time.sleep(0.05)

    def hold_directory(self, path: Path) -> None:
        """Hold a directory's lock, shared, by having it listed into what never comes."""
        page = stuck_page(self.memory)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        _thread(_libc.getdents64, fd, ctypes.c_void_p(address), ctypes.c_size_t(SIZE))
        time.sleep(0.05)

    def calls(self, *functions: Callable[[], object]) -> None:
        """Make each of these calls in a thread of its own."""
        for number, function in enumerate(functions):
            _thread(self.board.call, number, function)


def _thread(function: Callable[..., object], *args: object) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _without_error(function: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(OSError):
        function(*args)


def make_file(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))


# Attacks: each prepares, waits for the test's word, and makes its calls


def changes(path: Path) -> dict[str, Callable[[], object]]:
    """Calls on a file of one's own through the mount, each of which needs the file's lock."""
    fd = os.open(path, os.O_RDWR)
    return {
        "chmod": partial(os.chmod, path, 0o600),
        "utime": partial(os.utime, path),
        "setxattr": partial(os.setxattr, path, "user.x", b"1"),
        "truncate": partial(os.ftruncate, fd, 0),
        "write": partial(os.pwrite, fd, b"x", 0),
    }


def change_held(ground: Ground, kind: str) -> None:
    """One file is held; a call on it, of a kind that is quick as a rule."""
    held = ground.held()
    call = changes(ground.mount / held.name)[kind]
    for _ in range(TRAINING):
        call()
    ground.board.ready()
    ground.hold(held)
    ground.calls(call)


def change_each(ground: Ground, kind: str) -> None:
    """Many files are held; one call on each."""
    held = [ground.held(f"held{number}") for number in range(ground.board.count)]
    calls = [changes(ground.mount / path.name)[kind] for path in held]
    ground.board.ready()
    ground.hold(*held)
    ground.calls(*calls)


def change_while_written(ground: Ground, kind: str) -> None:
    """A file is written from a mapping of the mount, which holds it for what the mount brings."""
    size = 4 << 20
    held, other = ground.held(), ground.held("other")
    os.truncate(other, size)
    call = changes(ground.mount / held.name)[kind]
    for _ in range(TRAINING):
        call()
    mapped = os.open(ground.mount / other.name, os.O_RDONLY)
    target = os.open(held, os.O_WRONLY)

    def write() -> None:
        while not ground.board.is_over():
            with mmap.mmap(mapped, size, mmap.MAP_SHARED, mmap.PROT_READ) as data:
                _without_error(os.pwrite, target, data, 0)
            os.posix_fadvise(mapped, 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(0.02)  # it is not the machine that is to be kept busy

    def change() -> None:
        while not ground.board.is_over():
            ground.board.call(0, call)
            time.sleep(0.001)

    ground.board.ready()
    _thread(write)
    _thread(change)


def change_while_read(ground: Ground, kind: str) -> None:
    """A file is read past the page cache into what never comes, which holds it, too."""
    held = ground.held()
    held.write_bytes(b"x" * SIZE)
    call = changes(ground.mount / held.name)[kind]
    for _ in range(TRAINING):
        call()
    fd = os.open(held, os.O_RDONLY | os.O_DIRECT)
    page = stuck_page(ground.memory)
    ground.board.ready()
    _thread(_without_error, os.readv, fd, [page])
    time.sleep(0.05)
    ground.calls(call)


def remove_held(ground: Ground) -> None:
    """A held file is removed, when the removals of others have been quick."""
    for number in range(TRAINING):
        make_file(ground.mount / f"{number}")
        os.unlink(ground.mount / f"{number}")
    held = ground.held()
    os.stat(ground.mount / held.name)
    ground.board.ready()
    ground.hold(held)
    ground.calls(partial(os.unlink, ground.mount / held.name))


def rename_over_held(ground: Ground) -> None:
    """A file is renamed to the name of a held one."""
    other = ground.mount / "other"
    for _ in range(TRAINING):
        make_file(other)
        os.rename(other, ground.mount / "moved")
    make_file(other)
    held = ground.held()
    os.stat(ground.mount / held.name)
    ground.board.ready()
    ground.hold(held)
    ground.calls(partial(os.rename, other, ground.mount / held.name))


def link_held(ground: Ground) -> None:
    """A held file is linked."""
    for number in range(TRAINING):
        os.link(ground.mount / ground.held("other").name, ground.mount / f"{number}")
    held = ground.held()
    os.stat(ground.mount / held.name)
    ground.board.ready()
    ground.hold(held)
    ground.calls(partial(os.link, ground.mount / held.name, ground.mount / "linked"))


def make_in_held_directory(ground: Ground, where: str) -> None:
    """A directory is held by one who lists it; something is made in it."""
    name = f"new-{ground.source.name}"
    for number in range(TRAINING):
        os.mkdir(ground.mount / f"{number}")
    mount = ground.top_mount if where == "top" else ground.mount
    ground.board.ready()
    ground.hold_directory(ground.top_source if where == "top" else ground.source)
    ground.calls(partial(os.mkdir, mount / name))


def rename_in_held_directory(ground: Ground) -> None:
    """`mv` in a directory of one's own that one holds oneself."""
    one, other = ground.mount / "one", ground.mount / "other"
    make_file(one)
    for _ in range(TRAINING):
        os.rename(one, other)
        os.rename(other, one)
    ground.board.ready()
    ground.hold_directory(ground.source)
    ground.calls(partial(os.rename, one, other))


def look_in_held_directory(ground: Ground) -> None:
    """Many names are looked for in a directory that is held, and waited for to be changed.

    Who waits to change it keeps those out who would only look.
    """
    below = ground.source / "below"
    below.mkdir()
    mounted = ground.mount / below.name
    os.stat(mounted)
    calls = [partial(os.path.lexists, mounted / f"{n}") for n in range(ground.board.count)]
    ground.board.ready()
    ground.hold_directory(below)
    _thread(_without_error, os.mkdir, below / "new")
    time.sleep(0.05)
    ground.calls(*calls)


def open_leased(ground: Ground, files: int) -> None:
    """Files are opened that their owner holds leases on, and does not give up."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    leased = []
    for number in range(files):
        fd = os.open(ground.held(f"leased{number}"), os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        leased.append(fd)
    for number in range(files):
        os.stat(ground.mount / f"leased{number}")
    paths = (ground.mount / f"leased{number}" for number in itertools.cycle(range(files)))
    calls = [partial(_open_and_close, next(paths)) for _ in range(ground.board.count)]
    ground.board.ready()
    ground.calls(*calls)
    ground.board.wait_until_over()
    for fd in leased:
        os.close(fd)


def _open_and_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


def use_shared_while_stuck(ground: Ground, kind: str) -> None:
    """More calls are stuck than one may have workers for; names are made and looked for meanwhile.

    In a directory that all share, whose lock the kernel keeps for each of them.
    """
    count = ground.board.count
    calls: list[Callable[[], object]]
    if kind == "read":
        mounted = ground.top_mount / ground.memory.relative_to(ground.top_source)
        calls = [partial(_read, mounted / f"{number}") for number in range(count)]
        held = []
    else:
        held = [ground.held(f"held{number}") for number in range(count)]
        calls = [changes(ground.mount / path.name)[kind] for path in held]
    shared = ground.top_mount / "shared"

    def make(which: int) -> None:
        for number in itertools.takewhile(lambda _: not ground.board.is_over(), itertools.count()):
            path = shared / f"{ground.source.name}-{which}-{number}"
            with contextlib.suppress(OSError):
                os.mkdir(path)
                os.rmdir(path)
            time.sleep(_GENTLY)

    def look(which: int) -> None:
        for number in itertools.takewhile(lambda _: not ground.board.is_over(), itertools.count()):
            _without_error(os.stat, shared / f"no-{ground.source.name}-{which}-{number}")
            time.sleep(_GENTLY)

    ground.board.ready()
    for which in range(4):
        _thread(make, which)
        _thread(look, which)
    time.sleep(0.3)
    ground.hold(*held)
    ground.calls(*calls)


def read_what_never_comes(ground: Ground) -> None:
    """Files below the source are read whose data never comes; each is another one."""
    mounted = ground.top_mount / ground.memory.relative_to(ground.top_source)
    calls = [partial(_read, mounted / f"{number}") for number in range(ground.board.count)]
    ground.board.ready()
    ground.calls(*calls)


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        file.read(10)


def fragmented(path: Path, extents: int = _EXTENTS) -> Path:
    """A file that takes long to truncate; it has every second block, and nothing in them."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for number in range(extents):
        os.posix_fallocate(fd, 8192 * number, 4096)
    os.close(fd)
    return path


def truncate_fragmented(ground: Ground) -> None:
    """What truncating takes grows with the file."""
    fd = os.open(ground.mount / fragmented(ground.source / "fragmented").name, os.O_RDWR)
    other = os.open(ground.mount / ground.held("other").name, os.O_RDWR)
    for _ in range(TRAINING):
        os.ftruncate(other, 0)
    ground.board.ready()
    ground.board.call(0, partial(os.ftruncate, fd, 0))


def remove_fragmented(ground: Ground) -> None:
    """So does removing it; it is gone for good with its last descriptor, which is the mount's."""
    path = ground.mount / fragmented(ground.source / "fragmented").name
    for number in range(TRAINING):
        make_file(ground.mount / f"other{number}")
        os.unlink(ground.mount / f"other{number}")
    os.stat(path)
    free = partial(os.statvfs, ground.top_source)
    enough = free().f_bfree + _EXTENTS // 2

    def remove() -> None:
        os.unlink(path)
        while free().f_bfree < enough and not ground.board.is_over():
            time.sleep(_GENTLY)

    ground.board.ready()
    ground.board.call(0, remove)


def remove_huge_directory(ground: Ground, names: int) -> None:
    """A directory that has had many names is looked through when it is removed."""
    huge = ground.source / "huge"
    huge.mkdir()
    padding = "x" * 240
    for number in range(names):
        if number % 60_000 == 0:
            linked = ground.held(f"linked{number}")
        os.link(linked, huge / f"{number}{padding}")
    for entry in os.listdir(huge):
        os.unlink(huge / entry)
    for number in range(TRAINING):
        os.mkdir(ground.mount / f"{number}")
        os.rmdir(ground.mount / f"{number}")
    os.stat(ground.mount / huge.name)
    ground.board.ready()
    ground.board.call(0, partial(os.rmdir, ground.mount / huge.name))


# Attackers


class Attacker:
    """A process of an ordinary user who attacks; end it with `end`, or `kill`.

    Args:
        attack: one of the functions above, of a ground and `args`.
        uid: whose.
        source, mount: a directory of the source, and the same through the mount.
        memory: the directory of a stuckfs.
        name: of the directory in them that becomes the attacker's own.
        count: how many calls it makes.
    """

    def __init__(
        self,
        attack: Callable[..., None],
        *args: object,
        uid: int,
        source: Path,
        mount: Path,
        memory: Path,
        name: str,
        count: int = 1,
    ) -> None:
        (source / name).mkdir()
        os.chown(source / name, uid, uid)
        self.uid = uid
        self.board = Board(count)
        ground = Ground(source, mount, name, memory, self.board)
        self._child = Child(_attack, attack, uid, ground, args)

    def wait_until_ready(self, seconds: float) -> None:
        wait_until(
            lambda: self.board.is_ready() or self._child.done(), "a prepared attack", seconds
        )
        if not self.board.is_ready():
            self._child.result()

    def go(self, seconds: float) -> bool:
        """Let it begin; whether it has begun all its calls within that time."""
        self.board.go()
        deadline = time.monotonic() + seconds
        while self.board.begun() < self.board.count:
            if time.monotonic() > deadline or self._child.done():
                return False
            self.board.pause()
        return True

    def end(self, seconds: float) -> None:
        """Have it end; TimeoutError unless all its calls return within that time."""
        self.board.end()
        self.board.wait_for_returns(seconds)
        waiting = self.board.waiting()
        if waiting:
            raise TimeoutError(f"{waiting} calls of an attacker did not end within {seconds:g} s")
        self._child.result(seconds)

    def kill(self, seconds: float) -> bool:
        """Kill it, if it still runs; whether it is gone within that time."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not is_running(self._child.pid), "a killed attacker's end", seconds)
            self._child.wait()
            return True
        return False


def _attack(
    attack: Callable[..., None], uid: int, ground: Ground, args: tuple[object, ...]
) -> None:
    become(uid)
    threading.stack_size(_STACK)
    attack(ground, *args)
    ground.board.wait_until_over()
    ground.board.wait_for_returns(20.0)


def is_expected(code: int) -> bool:
    """Whether an attacker's call may end with that error, of the file system that is gone."""
    # Or of its mount point, by those that have not come that far before it was taken away.
    # EAGAIN: too many of his are stuck.
    gone = (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT)
    return code in (0, errno.EAGAIN, *gone)
