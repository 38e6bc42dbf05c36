"""A native session on a directory, a socket in place of the device, and a kernel.

Messages stay apart on the socket, as they do on the device. What the session says is checked as
the kernel checks it: a reply that it would refuse, or that nobody waits for, fails the test.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_executor import stacks
from mounting import PATIENCE, wait_until
from ops_helpers import descriptors
from wire_messages import HEADER, INIT_EXT, STRUCTS, UNANSWERED, pack, request

from ninefuse import ops
from ninefuse.driving.uring import Refused, Uring
from ninefuse.executor import Executor, LeadingModel, NoThreading, SecondModel, create
from ninefuse.fuse._role import Role
from ninefuse.fuse.leading import Leading
from ninefuse.fuse.native import NativeSession
from ninefuse.fuse.opcodes import Opcode
from ninefuse.settings import LEADERS, Settings
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session

ME = {"uid": os.geteuid(), "gid": os.getegid(), "pid": os.getpid()}  # whose requests they are

_MOST = 1 << 21  # bytes of a reply
_OUT = STRUCTS["out_header"]

# Bytes of a reply's body; of those that are not here it depends.
_SIZES = {
    **dict.fromkeys((Opcode.LOOKUP, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.LINK), 128),
    **dict.fromkeys((Opcode.GETATTR, Opcode.SETATTR), 104),
    **dict.fromkeys((Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.RENAME2), 0),
    **dict.fromkeys((Opcode.OPEN, Opcode.OPENDIR), 16),
    **dict.fromkeys((Opcode.CREATE, Opcode.TMPFILE), 144),
    **dict.fromkeys((Opcode.WRITE, Opcode.COPY_FILE_RANGE), 8),
    **dict.fromkeys((Opcode.LSEEK, Opcode.COPY_FILE_RANGE_64), 8),
    **dict.fromkeys((Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.FLUSH), 0),
    **dict.fromkeys((Opcode.FSYNC, Opcode.FSYNCDIR, Opcode.SYNCFS, Opcode.FALLOCATE), 0),
    **dict.fromkeys((Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.SETLK, Opcode.SETLKW), 0),
    Opcode.STATFS: 80,
    Opcode.GETLK: 24,
    Opcode.STATX: 288,
    Opcode.INIT: 64,
    Opcode.DESTROY: 0,
}


class Kernel:
    """The other end of a session's device.

    Args:
        source: the directory that is served.
        model: a threading model; or ``role``, the second one which hands that over; or
            ``uring``, the second one with that beneath it.

    Attributes:
        session, driver, front: what serves it.
        starts: one for each time that the session said that it has started.
    """

    def __init__(self, source: Path, model: str = "none") -> None:
        self.driver = _driver(model)
        self.session = Session(self.driver, threads=4)
        self.front = NativeSession(Settings(str(source), "/nowhere"), self.session, self.driver)
        self.session.attributes_changed = self.front.attributes_changed
        NoThreading().run_here(ops.attach(self.session, ROOT_NODEID, str(source)))
        ours, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._end.settimeout(PATIENCE)
        self.front.use(ours.detach())
        self._asked: dict[int, bytes] = {}  # what is not answered yet
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._uniques = iter(range(2, 1 << 40, 2))
        self.starts: list[None] = []
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._thread.start()

    # The session's side

    def _run(self) -> None:
        try:
            self.front.run(lambda: self.starts.append(None))
        except BaseException as failure:
            self._failures.append(failure)

    @property
    def serves(self) -> bool:
        """Whether the session still serves."""
        return self._thread.is_alive()

    def ended(self) -> None:
        """Wait for the end of the session; it ends without an error."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "\n".join(["it serves on", *stacks()])
        if self._failures:
            raise self._failures[0]

    def settle(self) -> None:
        """Wait until nothing is under way any more; nothing may be held then."""
        wait_until(self._is_idle, "the requests under way have ended")
        assert not len(self.session.ranges), "a change has not been ended"
        assert not len(self.session.names), "a name is still being taken away"

    def wait_for_leaders(self) -> None:
        """Wait until all threads take part in leading: before, workers stand in for them."""
        role = self.role
        assert role is not None
        wait_until(lambda: role.threads >= LEADERS, "all take part in leading")

    @property
    def role(self) -> Role | None:
        """That threads of the session take in turn; None: they do not."""
        crew = self.driver.crew if isinstance(self.driver, LeadingModel) else None
        return crew._role if isinstance(crew, Leading) else None

    def _is_idle(self) -> bool:
        # In this order: bodies of calls made ahead become requests.
        return not (self.role is not None and self.role.count_ahead) and not self.driver.requests

    def close(self) -> None:
        """End it, if it has not ended, and close what is open."""
        self.front.end()
        self.ended()
        self.front.leave(is_mounted=False)
        self.session.fids.clear()
        self.driver.close()
        self.front.close()
        self._end.close()
        assert len(self.session.fids) == 0
        assert self.session.fids.descriptors == 0

    # The kernel's side

    def hang_up(self) -> None:
        """Take no more replies."""
        self._end.close()

    def init(self, minor: int = 45, flags: int = INIT_EXT | 1 << 29) -> None:
        """Agree on the protocol."""
        error, body = self.ask(Opcode.INIT, pack("init_in", 7, minor, 131072, flags, 0, *[0] * 11))
        assert error == 0
        assert struct.unpack_from("=2I", body) == (7, min(minor, 45))

    def new_unique(self) -> int:
        """A number that no request has had."""
        return next(self._uniques)

    def ask(self, opcode: int, body: bytes = b"", nodeid: int = ROOT_NODEID) -> tuple[int, bytes]:
        """Make a request, and wait for its answer: the errno, and what else it says."""
        unique = self.new_unique()
        self.send(request(opcode, body, unique=unique, nodeid=nodeid, **ME))
        return self.answer(unique)

    def get(self, opcode: int, body: bytes = b"", nodeid: int = ROOT_NODEID) -> bytes:
        """Make a request that must go well; what it says."""
        error, said = self.ask(opcode, body, nodeid)
        assert error == 0, (Opcode(opcode), error)
        return said

    def send(self, data: bytes) -> None:
        """Send a message; its number, if it has one, has to be a new one."""
        if len(data) >= HEADER:
            _, opcode, unique = struct.unpack_from("=2IQ", data)
            if opcode not in UNANSWERED:
                self._asked[unique] = data
        self._end.send(data)

    def answer(self, unique: int) -> tuple[int, bytes]:
        """The answer to a request."""
        while unique not in self._answers:
            self._receive()
        return self._answers.pop(unique)

    def waits_for(self, unique: int) -> bool:
        """Whether a request is one that is answered."""
        return unique in self._asked or unique in self._answers

    def check_silence(self) -> None:
        """No more is said, and nobody waits."""
        assert not self._asked
        assert not self._answers
        self._end.setblocking(False)
        try:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._receive()
        finally:
            self._end.settimeout(PATIENCE)

    def _receive(self) -> None:
        data = self._end.recv(_MOST)
        length, error, unique = _OUT.unpack_from(data)
        assert length == len(data)
        if not unique:
            return  # it answers nothing: attributes have changed
        asked = self._asked.pop(unique, None)
        assert asked is not None, f"an answer that nobody waits for: {data!r}"
        body = data[_OUT.size :]
        assert -512 < error <= 0, (asked, error)
        assert not (error and body), (asked, data)
        if not error:
            check_size(asked, len(body))
        self._answers[unique] = -error, body


def _driver(model: str) -> Executor:
    if model == "role":
        return create("second", 8, leads=True)
    if model != "uring":
        return create(model, 3)
    driver = SecondModel(3)
    try:
        driver.uring = Uring()
    except Refused as reason:
        pytest.skip(f"no io_uring here: {reason}")
    return driver


def check_size(asked: bytes, size: int) -> None:
    """Whether the kernel takes an answer that has a body of this size."""
    opcode = struct.unpack_from("=I", asked, 4)[0]
    if opcode in _SIZES:
        assert size == _SIZES[opcode], (asked, size)
    elif opcode in (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS):
        assert size <= struct.unpack_from("=I", asked, HEADER + 16)[0], (asked, size)
    elif opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
        room = struct.unpack_from("=I", asked, HEADER)[0]
        assert size <= room if room else size == 8, (asked, size)
    elif opcode == Opcode.READLINK:
        assert 0 < size < 4096
    else:
        assert opcode == Opcode.IOCTL, (asked, size)
        assert size <= 16 + struct.unpack_from("=I", asked, HEADER + 28)[0]


@contextlib.contextmanager
def serving(source: Path, model: str = "none") -> Iterator[Kernel]:
    """A session that has not been asked anything yet. It has left nothing open in the end."""
    before = descriptors()
    kernel = Kernel(source, model)
    try:
        yield kernel
    finally:
        kernel.close()
    assert not descriptors().items() - before.items(), "descriptors left open"
