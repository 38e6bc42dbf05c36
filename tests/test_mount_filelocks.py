"""Locks of files that clients of a mount take: between them, and between them and the source.

What the kernel, the session and `ninefuse/ops/locking.py` make of them together. Each scenario is
played by programs on a plain directory first, then with one of them or all on the mount: it must
come out the same. (ninefuse's own locks are in test_mount_locks.py.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import pytest
from mounting import (
    PATIENCE,
    SESSION,
    Mount,
    Place,
    Watchdog,
    flags_of_descriptors,
    fresh_place,
    wait_until,
)

pytestmark = pytest.mark.skipif(SESSION == "pyfuse3", reason="locks do not reach the source there")

READ, WRITE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
SHARED, EXCLUSIVE, UNLOCK = fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN
NOW = fcntl.LOCK_NB
SIZE = 100  # bytes of the file
LAST = (1 << 63) - 1
FLOCK = struct.Struct("@hhqqi4x")

SERVERS = {
    "none": ("--model", "none"),
    "first": ("--model", "first"),
    "second": (),
    "second, threads": ("--model", "second", "--engine", "threads"),
}
# Where the two programs are.
SIDES = (("mount", "mount"), ("mount", "source"), ("source", "mount"))

_PR_SET_PDEATHSIG = 1


class Client:
    """A process that has files open, and does with them what it is told; a context manager.

    ``client("record", "f", WRITE)`` calls a method of `_Hands`. The answer is what that returned,
    or the name of its errno.
    """

    def __init__(self, directory: Path) -> None:
        self._line, theirs = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                os.chdir(directory)
                _Hands().serve(theirs)
            finally:
                os._exit(1)
        theirs.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def __call__(self, what: str, *args: Any, **kwargs: Any) -> Any:
        self.begin(what, *args, **kwargs)
        return self.end()

    def begin(self, what: str, *args: Any, **kwargs: Any) -> None:
        """Have it begin with something that may take long."""
        self._line.send((what, args, kwargs))
        assert self._line.poll(PATIENCE)
        assert self._line.recv() == "begins"

    def end(self) -> Any:
        """Its answer to what was begun."""
        assert self._line.poll(PATIENCE), (
            f"no answer from {Path(f'/proc/{self.pid}/stat').read_text()}"
        )
        return self._line.recv()

    def wait_for(self, what: str, *args: Any, **kwargs: Any) -> None:
        """As `begin`, of a call that is known to wait: until it does."""
        self.begin(what, *args, **kwargs)
        wait_until(lambda: self.state() == "S", f"{what} to wait")
        assert not self._line.poll(0), self._line.recv()

    def is_waiting(self) -> bool:
        return not self._line.poll(0)

    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and see it end."""
        if self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._line.close()
            self.pid = -1


class _Hands:
    """What a client does, in its process."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def serve(self, line: Connection) -> None:
        signal.signal(signal.SIGUSR1, _raise)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        while True:
            what, args, kwargs = line.recv()
            line.send("begins")
            try:
                answer = getattr(self, what)(*args, **kwargs)
            except OSError as e:
                answer = errno.errorcode[e.errno or 0]
            line.send(answer)

    def open(self, *keys: str, name: str = "file", flags: int = os.O_RDWR) -> None:
        for key in keys:
            self._fds[key] = os.open(name, flags | os.O_CREAT if flags else flags)

    def dup(self, key: str, new: str) -> None:
        self._fds[new] = os.dup(self._fds[key])

    def close(self, *keys: str) -> None:
        for key in keys:
            os.close(self._fds.pop(key))

    def record(
        self,
        key: str,
        kind: int,
        start: int = 0,
        length: int = 0,
        *,
        waits: bool = False,
        own: bool = False,
        whence: int = os.SEEK_SET,
    ) -> float:
        """fcntl(2) with F_SETLK and its kin; when it was done."""
        command = {
            (False, False): fcntl.F_SETLK,
            (True, False): fcntl.F_SETLKW,
            (False, True): fcntl.F_OFD_SETLK,
            (True, True): fcntl.F_OFD_SETLKW,
        }[waits, own]
        fcntl.fcntl(self._fds[key], command, FLOCK.pack(kind, whence, start, length, 0))
        return time.monotonic()

    def whole(self, key: str, operation: int) -> float:
        """flock(2); when it was done."""
        fcntl.flock(self._fds[key], operation)
        return time.monotonic()

    def ask(
        self, key: str, kind: int, start: int = 0, length: int = 0, *, own: bool = False
    ) -> tuple[int, ...]:
        """fcntl(2) with F_GETLK: kind, whence, start, length, pid."""
        command = fcntl.F_OFD_GETLK if own else fcntl.F_GETLK
        wanted = FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
        return FLOCK.unpack(fcntl.fcntl(self._fds[key], command, wanted))

    def parts(self, key: str, step: int = 10) -> str:
        """What is free of each part of the file: all (.), for reading (r), nothing (W)."""
        found = ""
        for start in range(0, SIZE + step, step):
            kinds = [self.ask(key, kind, start, step)[0] for kind in (READ, WRITE)]
            found += "." if kinds[1] == NONE else "r" if kinds[0] == NONE else "W"
        return found

    def seek(self, key: str, offset: int) -> None:
        os.lseek(self._fds[key], offset, os.SEEK_SET)

    def read(self, key: str) -> int:
        return len(os.pread(self._fds[key], SIZE, 0))

    def write(self, key: str, data: bytes) -> int:
        return os.pwrite(self._fds[key], data, 0)

    def names(self, what: str, *names: str) -> None:
        getattr(os, what)(*names)

    def in_child(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """Do something in a child that ends then."""
        ours, theirs = multiprocessing.Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                try:
                    theirs.send(getattr(self, what)(*args, **kwargs))
                except OSError as e:
                    theirs.send(errno.errorcode[e.errno or 0])
            finally:
                os._exit(0)
        theirs.close()
        answer = ours.recv()
        os.waitpid(pid, 0)
        return answer

    def leave_child(self) -> int:
        """Have a child that has what this has, and does nothing."""
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        return pid

    def end_child(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def waiting_thread(self, key: str, kind: int) -> None:
        """Have a thread wait for a lock."""
        self._thread = threading.Thread(target=self._wait, args=(key, kind))
        self._thread.start()

    def _wait(self, key: str, kind: int) -> None:
        self._tid = threading.get_native_id()
        with contextlib.suppress(OSError):
            self.record(key, kind, waits=True)

    def thread_waits(self) -> bool:
        wait_until(lambda: hasattr(self, "_tid"), "a thread")
        stat = Path(f"/proc/self/task/{self._tid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "a wait")
        return True

    def thread_ends(self) -> bool:
        self._thread.join(PATIENCE)
        return not self._thread.is_alive()


def _raise(*_: object) -> NoReturn:
    raise InterruptedError(errno.EINTR, "interrupted")


# Scenarios


def told(answer: Any, **pids: int) -> Any:
    """An answer without what is another each time: when it came, and from which process."""
    if isinstance(answer, float):
        return "done"
    if isinstance(answer, tuple | list):
        return [told(one, **pids) for one in answer]
    for name, pid in pids.items():
        if answer == pid:
            return name
    return answer


def in_turn(waiting: Client, give: Callable[[], object]) -> str:
    """Somebody waits for what another gives back: who did has it only afterwards."""
    assert waiting.is_waiting()
    before = time.monotonic()
    give()
    got = waiting.end()
    assert isinstance(got, float), got
    assert got > before
    return "in turn"


Scenario = Callable[[Client, Client], Any]
scenarios: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    scenarios.append(function)
    return function


@scenario
def who_keeps_whom_out(one: Client, other: Client) -> Any:
    one("open", "f")
    other("open", "f")
    answers = []
    for own in (False, True):
        for first in (READ, WRITE):
            one("record", "f", first, 10, 10, own=own)
            answers += [
                (other("record", "f", kind, *part, own=others), other("record", "f", NONE))
                for others in (False, True)
                for kind in (READ, WRITE)
                for part in ((0, 10), (0, 11), (12, 1), (19, 5), (20, 0))
            ]
            answers.append(other("whole", "f", EXCLUSIVE | NOW))  # another kind of lock
            other("whole", "f", UNLOCK)
            one("record", "f", NONE, own=own)
    for first in (SHARED, EXCLUSIVE):
        one("whole", "f", first)
        answers += [other("whole", "f", kind | NOW) for kind in (SHARED, EXCLUSIVE, UNLOCK)]
        answers.append(other("record", "f", WRITE))
        other("record", "f", NONE)
    return answers


@scenario
def parts_are_split_and_joined(one: Client, other: Client) -> Any:
    one("open", "f")
    other("open", "f")
    answers = []
    for kind, *part in (
        (WRITE, 0, 100),
        (NONE, 40, 20),
        (READ, 20, 10),
        (READ, 30, 50),
        (WRITE, 30, 10),
        (NONE, 0, 25),
        (WRITE, 90, 0),
        (NONE, 100, 0),
        (READ, 0, 0),
        (NONE, 50, 1),
        (NONE, 0, 0),
    ):
        answers += [one("record", "f", kind, *part), other("parts", "f"), one("parts", "f")]
    return answers


@scenario
def parts_by_other_beginnings(one: Client, other: Client) -> Any:
    """From the position, from the end; backwards; at the last bytes there may be."""
    one("open", "f")
    other("open", "f")
    one("seek", "f", 50)
    answers = []
    for start, length, whence in (
        (10, 10, os.SEEK_CUR),
        (-10, 10, os.SEEK_CUR),
        (-10, 0, os.SEEK_END),
        (30, -10, os.SEEK_SET),
        (5, -10, os.SEEK_SET),
        (-1, 5, os.SEEK_SET),
        (LAST, 1, os.SEEK_SET),
        (LAST, 2, os.SEEK_SET),
        (LAST - 1, 0, os.SEEK_SET),
        (0, LAST, os.SEEK_SET),
    ):
        answers += [
            one("record", "f", WRITE, start, length, whence=whence),
            other("parts", "f"),
            other("ask", "f", WRITE, LAST - 2, 1)[:4],
            other("ask", "f", WRITE, LAST, 1)[:4],
            one("record", "f", NONE),
        ]
    return answers


@scenario
def what_a_handle_is_open_for(one: Client, other: Client) -> Any:
    answers = []
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND):
        one("open", "f", flags=flags)
        other("open", "f", flags=flags)
        for own in (False, True):
            answers += [
                (one("record", "f", kind, own=own), other("record", "f", kind, own=own))
                for kind in (READ, WRITE)
            ]
            answers += [other("ask", "f", kind, own=own)[:4] for kind in (READ, WRITE)]
            one("record", "f", NONE, own=own)
            other("record", "f", NONE, own=own)
        answers += [
            (one("whole", "f", kind | NOW), other("whole", "f", kind | NOW))
            for kind in (SHARED, EXCLUSIVE)
        ]
        one("whole", "f", UNLOCK)
        other("whole", "f", UNLOCK)
    return answers


@scenario
def a_handle_to_read_and_one_to_write(one: Client, other: Client) -> Any:
    """Of one process: its locks are its own, by whichever it took them."""
    one("open", "r", flags=os.O_RDONLY)
    one("open", "w", flags=os.O_WRONLY)
    other("open", "f")
    answers = []
    for key, *wanted in (
        ("r", READ, 0, 50),
        ("w", WRITE, 20, 20),
        ("r", READ, 30, 20),
        ("w", NONE, 0, 10),
        ("r", NONE, 0, 0),
        ("w", WRITE, 0, 50),
        ("r", READ, 0, 50),
    ):
        answers += [one("record", key, *wanted), other("parts", "f"), one("parts", "r")]
    return answers


@scenario
def closing_any_descriptor_drops_records(one: Client, other: Client) -> Any:
    answers = []
    for way in ("another", "a duplicate", "another name", "one to read", "a child"):
        one("open", "f")
        other("open", "f")
        answers += [one("record", "f", WRITE), other("record", "f", READ)]
        if way == "a duplicate":
            one("dup", "f", "g")
        elif way == "another name":
            one("names", "link", "file", "link")
            one("open", "g", name="link")
        else:
            one("open", "g", flags=os.O_RDONLY if way == "one to read" else os.O_RDWR)
        answers += [other("record", "f", READ)]
        if way == "a child":
            answers += [one("in_child", "close", "f"), other("record", "f", READ)]
        one("close", "g")
        answers += [other("record", "f", READ), one("record", "f", WRITE)]
        other("close", "f")
        answers += [one("record", "f", WRITE), other("open", "f"), other("record", "f", READ)]
        one("close", "f")
        answers += [other("record", "f", READ)]
        other("close", "f")
    return answers


@scenario
def a_child_has_no_records_of_its_parent(one: Client, other: Client) -> Any:
    one("open", "f")
    other("open", "f")
    answers = [one("record", "f", WRITE, 0, 10), one("in_child", "record", "f", READ, 0, 5)]
    answers += [one("in_child", "parts", "f"), one("in_child", "record", "f", NONE)]
    answers += [other("parts", "f")]
    child = one("leave_child")
    one("record", "f", NONE)
    answers += [other("parts", "f")]
    one("end_child", child)
    return answers


@scenario
def duplicates_and_children_share_the_lock_of_a_file(one: Client, other: Client) -> Any:
    """flock(2), and what F_OFD_SETLK sets: they are the open file's."""

    def whole(who: Client, key: str = "f") -> Any:
        return who("whole", key, EXCLUSIVE | NOW)

    def record(who: Client, key: str = "f") -> Any:
        return who("record", key, WRITE, own=True)

    answers = []
    for take, give in (
        (whole, ("whole", "f", UNLOCK)),
        (record, ("record", "f", NONE)),
    ):
        own: dict[str, Any] = {} if take is whole else {"own": True}
        one("open", "f", "apart")
        other("open", "f")
        one("dup", "f", "g")
        answers += [take(one), take(one, "g"), take(one, "apart"), take(other)]
        one("close", "g")
        one("close", "apart")
        answers += [take(other), one("in_child", "close", "f"), take(other)]
        answers += [one("in_child", *give, **own), take(other)]
        other(*give, **own)
        answers += [take(one)]
        child = one("leave_child")
        one("close", "f")
        answers += [take(other)]
        one("end_child", child)
        # The kernel tells of the last close, and does not wait for the answer.
        wait_until(lambda: take(other) != "EAGAIN", "the end of the lock")  # noqa: B023
        other("close", "f")
    return answers


@scenario
def a_lock_of_a_file_is_changed(one: Client, other: Client) -> Any:
    """Not in one step: who cannot have it has lost what was there."""
    one("open", "f", "g")
    other("open", "f")
    answers = [
        who("whole", key, operation | NOW)
        for who, key, operation in (
            (one, "f", EXCLUSIVE),
            (one, "f", SHARED),
            (other, "f", SHARED),
            (one, "f", EXCLUSIVE),
            (other, "f", EXCLUSIVE),
            (one, "g", SHARED),
            (other, "f", SHARED),
            (one, "g", SHARED),
            (one, "f", SHARED),
            (other, "f", EXCLUSIVE),
            (one, "g", EXCLUSIVE),
            (one, "f", EXCLUSIVE),
        )
    ]
    for who, key in ((one, "f"), (one, "g"), (other, "f")):
        who("whole", key, UNLOCK)
    return answers


@scenario
def who_waits_has_it_in_turn(one: Client, other: Client) -> Any:
    """Given back, made weaker, closed, or its owner killed."""
    one("open", "f")
    other("open", "f")
    answers = []
    for own in (False, True):
        for kind, give in (
            (WRITE, lambda: one("record", "f", NONE, 5, 10, own=own)),  # noqa: B023
            (READ, lambda: one("record", "f", READ, own=own)),  # noqa: B023
        ):
            answers += [one("record", "f", WRITE, own=own)]
            other.wait_for("record", "f", kind, 5, 5, waits=True)
            answers += [in_turn(other, give), one("parts", "f"), other("record", "f", NONE)]
            one("record", "f", NONE, own=own)
    for operation, give in (
        (EXCLUSIVE, lambda: one("whole", "f", UNLOCK)),
        (SHARED, lambda: one("whole", "f", SHARED)),
        (EXCLUSIVE, lambda: one("close", "f")),
    ):
        answers += [one("whole", "f", EXCLUSIVE)]
        other.wait_for("whole", "f", operation)
        answers += [in_turn(other, give), other("whole", "f", UNLOCK)]
    one("open", "f")
    one("record", "f", WRITE)
    other.wait_for("record", "f", WRITE, waits=True)
    answers += [in_turn(other, lambda: one("close", "f")), other("record", "f", NONE)]
    return answers


@scenario
def who_is_killed_has_none(one: Client, other: Client) -> Any:
    one("open", "f", "g")
    other("open", "f", "g", "h")
    answers = [one("whole", "f", EXCLUSIVE)]
    answers += [one("record", "f", WRITE, 0, 10), one("record", "g", WRITE, 10, 10, own=True)]
    answers += [other("parts", "f"), other("whole", "f", EXCLUSIVE | NOW)]
    other.wait_for("record", "f", WRITE, waits=True)
    answers += [in_turn(other, one.kill), other("whole", "f", EXCLUSIVE)]
    return answers


@scenario
def who_is_interrupted_has_none(one: Client, other: Client) -> Any:
    """By a signal whose handler does not return; by one that the call goes on after; stopped."""
    one("open", "f", "g")
    other("open", "f")
    answers = []
    for take, give, try_it in (
        (("record", "f", WRITE), ("record", "f", NONE), ("record", "g", WRITE)),
        (("whole", "f", EXCLUSIVE), ("whole", "f", UNLOCK), ("whole", "g", EXCLUSIVE | NOW)),
    ):
        waits: dict[str, Any] = {"waits": True} if take[0] == "record" else {}
        answers += [one(*take)]
        other.wait_for(*take, **waits)
        other.signal(signal.SIGUSR1)
        answers += [other.end(), one(*give), one(*try_it)]
        one(*give[:1], try_it[1], *give[2:])
        answers += [one(*take)]
        other.wait_for(*take, **waits)
        other.signal(signal.SIGUSR2)
        other.signal(signal.SIGSTOP)
        wait_until(lambda: other.state() == "T", "a stop")
        other.signal(signal.SIGCONT)
        wait_until(lambda: other.state() == "S", "it to go on")
        answers += [in_turn(other, lambda: one(*give)), one(*try_it)]  # noqa: B023
        answers += [other(*give)]
    return answers


@scenario
def who_is_killed_as_he_waits_has_none(one: Client, other: Client) -> Any:
    one("open", "f", "g")
    other("open", "f")
    answers = [one("record", "f", WRITE)]
    other.wait_for("record", "f", WRITE, waits=True)
    other.kill()
    answers += [one("record", "f", NONE), one("record", "g", WRITE, own=True)]
    return answers


@scenario
def closed_by_a_thread_while_another_waits(one: Client, other: Client) -> Any:
    """What it gets then goes, as by any close. On a mount with the release, which comes later."""
    one("open", "f")
    other("open", "f")
    answers = [other("record", "f", WRITE)]
    one("waiting_thread", "f", WRITE)
    answers += [one("thread_waits"), one("close", "f"), other("record", "f", NONE)]
    answers += [one("thread_ends"), other("record", "f", WRITE, waits=True)]
    return answers


@scenario
def a_file_without_a_name(one: Client, other: Client) -> Any:
    one("open", "f")
    other("open", "f")
    one("names", "unlink", "file")
    answers = [one("record", "f", WRITE), other("record", "f", READ), other("parts", "f")]
    answers += [one("whole", "f", EXCLUSIVE), other("whole", "f", EXCLUSIVE | NOW)]
    other.wait_for("record", "f", WRITE, waits=True)
    answers += [in_turn(other, lambda: one("record", "f", NONE))]
    # Who has its name is another.
    one("open", "new")
    answers += [one("record", "new", WRITE), other("parts", "f")]
    return answers


@scenario
def a_file_that_is_moved_linked_and_cut(one: Client, other: Client) -> Any:
    one("open", "f")
    answers = [one("record", "f", WRITE), one("whole", "f", EXCLUSIVE)]
    one("names", "link", "file", "link")
    one("names", "rename", "file", "moved")
    for name in ("link", "moved"):
        other("open", "f", name=name, flags=os.O_RDWR | os.O_TRUNC)
        answers += [other("record", "f", READ), other("whole", "f", SHARED | NOW)]
        answers += [other("parts", "f"), other("close", "f")]
    other("open", "f", name="file")
    answers += [other("record", "f", WRITE), other("whole", "f", EXCLUSIVE | NOW)]
    return answers


@scenario
def locks_keep_nobody_from_reading_and_writing(one: Client, other: Client) -> Any:
    one("open", "f")
    other("open", "f")
    answers = [one("record", "f", WRITE), one("whole", "f", EXCLUSIVE)]
    answers += [other("write", "f", b"x" * 10), other("read", "f"), one("read", "f")]
    return answers


# On the mount


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    """In a module's scope tests are put in the order of the servers, of which each starts once."""
    name: str = request.param
    return name


@pytest.fixture
def place(server: str, shared_mounts: Callable[..., Mount], guard: Watchdog) -> Iterator[Place]:
    """A fresh directory on a mount, and of its source; in the end nothing is locked."""
    with fresh_place(shared_mounts(*SERVERS[server])) as place:
        yield place


def clients_of(stack: ExitStack, *directories: Path) -> list[Client]:
    return [stack.enter_context(Client(directory)) for directory in directories]


def play(function: Scenario, one: Path, other: Path) -> Any:
    with ExitStack() as stack:
        clients = clients_of(stack, one, other)
        pids = {"one": clients[0].pid, "other": clients[1].pid}
        return told(function(*clients), **pids)


def make_file(directory: Path) -> Path:
    directory.mkdir()
    (directory / "file").write_bytes(bytes(SIZE))
    return directory


def closed(mount: Mount, file: Path) -> bool:
    """Whether the daemon has no descriptor of a file, but for O_PATH."""
    return not flags_of_descriptors(mount.pid, file)


@pytest.mark.parametrize("function", scenarios, ids=lambda function: function.__name__)
def test_it_is_as_on_the_source(place: Place, function: Scenario) -> None:
    expected = play(function, *[make_file(place.source / "plain")] * 2)
    for number, sides in enumerate(SIDES):
        file = make_file(place.source / f"{number}") / "file"
        both = [(place.path if side == "mount" else place.source) / f"{number}" for side in sides]
        assert play(function, *both) == expected, sides
        wait_until(
            partial(closed, place.mount, file),
            "the daemon to close what it had open",
        )


FEW = (
    sys.executable,
    "-c",
    "import sys; from ninefuse.command import cli; from ninefuse.driving import driver;"
    " from ninefuse.fuse import native; driver.MOST_WAITS = 11; native._MOST_REQUESTS = 5;"
    # Who waits is woken, and does not try besides: who does may come before his turn.
    " driver.TICK = driver.LONGEST = 1000.0;"
    " sys.exit(cli.main())",
)


@pytest.mark.parametrize("model", ["none", "first", "second"])
def test_those_who_wait_keep_nobody_from_giving_back(
    new_mount: Callable[..., Mount], model: str
) -> None:
    """More wait than may be under way; and who would be one too many is told so at once."""
    mount = new_mount("--model", model, command=FEW)
    make_file(mount.source / "d")
    with ExitStack() as stack:
        holder, *clients = clients_of(stack, *[mount.path / "d"] * 13)
        for client in (holder, *clients):
            client("open", "f")
        holder("record", "f", WRITE)
        for client in clients:
            client.begin("record", "f", WRITE, waits=True)
        # They come to the daemon in any order: which one is refused is not said, nor who is next.
        assert first_to_end(clients).end() == "ENOLCK"
        while clients:
            holder("record", "f", NONE)
            holder = first_to_end(clients)
            assert isinstance(holder.end(), float)


def first_to_end(clients: list[Client]) -> Client:
    """Wait for one of them to have its answer, and take it out of the list."""
    wait_until(lambda: not all(map(Client.is_waiting, clients)), "an answer")
    client = next(client for client in clients if not client.is_waiting())
    clients.remove(client)
    return client
