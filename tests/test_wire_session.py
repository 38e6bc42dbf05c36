"""The native session (ninefuse/fuse/native.py), with a socket in place of the device.

Requests that no kernel makes are answered with an error, and those after them as ever. What nobody
is told of is taken back.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_executor import bounded, passed
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mounting import SOAK, wait_until
from ops_helpers import need_attributes
from ops_helpers import source as source
from test_wire import changes, decoded
from wire_kernel import ME, Kernel, serving
from wire_messages import (
    GOLDEN,
    INIT_EXT,
    SETLK,
    SETLKW,
    UNANSWERED,
    Edit,
    mutated,
    pack,
    request,
)

from ninefuse import ops
from ninefuse.driving.request import Request
from ninefuse.executor import NoThreading
from ninefuse.fuse import callbacks, native
from ninefuse.fuse._message import Message
from ninefuse.fuse.native import NativeSession
from ninefuse.fuse.opcodes import Opcode
from ninefuse.settings import Settings
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.qids import ROOT_NODEID as ROOT
from ninefuse.tree.session import Session

MODELS = ["none", "second", "role", "uring"]
SETXATTR_EXT = 1 << 29
LONG = 1 << 26  # bytes that a file may have in these tests


@pytest.fixture(autouse=True)
def small_files() -> Iterator[None]:
    """No request makes a file large, whatever number it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LONG, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tree(source: Path) -> Path:
    """A file, a directory with a file in it, a symlink."""
    fill(source)
    (source / "kept").mkdir()
    (source / "kept" / "file").write_bytes(b"kept")
    return source


def fill(source: Path) -> None:
    """Make what may have been removed."""
    if not os.path.lexists(source / "file"):
        (source / "file").write_bytes(b"data")
    if not os.path.lexists(source / "d"):
        (source / "d").mkdir()
    if not os.path.lexists(source / "link"):
        (source / "link").symlink_to("file")


def number(body: bytes) -> int:
    """The first number of an answer: a nodeid, or a handle."""
    return int(struct.unpack_from("=Q", body)[0])


def lookup(kernel: Kernel, name: bytes, parent: int = ROOT) -> int:
    return number(kernel.get(Opcode.LOOKUP, name + b"\0", parent))


def opened(kernel: Kernel, nodeid: int) -> int:
    return number(kernel.get(Opcode.OPEN, pack("open_in", os.O_RDWR, 0), nodeid))


# The beginning


def test_what_comes_before_init_is_refused(tree: Path) -> None:
    """Each request once, with EIO; forgets and interrupts not at all."""
    with serving(tree) as kernel:
        for golden in GOLDEN:
            unique = kernel.new_unique()
            if golden.opcode not in (Opcode.INIT, Opcode.DESTROY):
                kernel.send(request(golden.opcode, golden.body, unique=unique))
                if golden.opcode not in UNANSWERED:
                    assert kernel.answer(unique) == (errno.EIO, b"")
        assert kernel.starts == []
        kernel.init()
        lookup(kernel, b"file")
        kernel.check_silence()
        assert len(kernel.starts) == 1


@pytest.mark.parametrize(("major", "minor"), [(7, 11), (7, 0), (6, 45), (8, 1), (0, 0)])
def test_a_protocol_that_we_do_not_know_is_refused(tree: Path, major: int, minor: int) -> None:
    with serving(tree) as kernel:
        body = pack("init_in", major, minor, 0, 0, 0, *[0] * 11)
        assert kernel.ask(Opcode.INIT, body) == (errno.EPROTO, b"")
        assert kernel.ask(Opcode.LOOKUP, b"file\0") == (errno.EIO, b"")
        assert kernel.starts == []
        kernel.check_silence()


def test_init_is_agreed_on_once(tree: Path) -> None:
    """What it says later changes nothing."""
    need_attributes(tree)
    with serving(tree) as kernel:
        kernel.init()
        body = pack("init_in", 7, 31, 0, 0, 0, *[0] * 11)
        assert kernel.ask(Opcode.INIT, body) == (errno.EIO, b"")
        assert len(kernel.starts) == 1
        kernel.get(Opcode.SETXATTR, pack("setxattr_in", 1, 0, 0, 0) + b"user.n\0v")
        assert os.getxattr(tree, "user.n") == b"v"


@pytest.mark.parametrize(
    ("flags", "layout"), [(INIT_EXT | SETXATTR_EXT, "4I"), (INIT_EXT, "2I"), (0, "2I")]
)
def test_setxattr_comes_as_it_was_agreed_on(tree: Path, flags: int, layout: str) -> None:
    need_attributes(tree)
    with serving(tree) as kernel:
        kernel.init(flags=flags)
        body = struct.pack("=" + layout, 5, *[0] * (int(layout[0]) - 1)) + b"user.n\0value"
        kernel.get(Opcode.SETXATTR, body)
        assert os.getxattr(tree, "user.n") == b"value"


# Bad requests


@pytest.mark.parametrize("model", MODELS)
def test_requests_about_what_nobody_knows_are_refused(tree: Path, model: str) -> None:
    """The golden messages: their nodeids and handles are made up."""
    with serving(tree, model) as kernel:
        kernel.init()
        for golden in GOLDEN:
            if golden.opcode == Opcode.DESTROY or golden.short:
                continue
            unique = kernel.new_unique()
            kernel.send(request(golden.opcode, golden.body, unique=unique, extensions=0))
            if golden.opcode not in UNANSWERED:
                error, _ = kernel.answer(unique)
                assert error or golden.opcode == Opcode.SYNCFS, golden
        kernel.settle()
        kernel.check_silence()
        assert len(kernel.session.fids) == 1


@pytest.mark.parametrize("is_agreed", [False, True])
def test_a_bad_request_that_nobody_waits_for_is_not_answered(tree: Path, is_agreed: bool) -> None:
    with serving(tree) as kernel:
        if is_agreed:
            kernel.init()
        for opcode in UNANSWERED:
            kernel.send(request(opcode, bytes(7), unique=kernel.new_unique()))
            kernel.send(request(opcode, bytes(64), unique=kernel.new_unique(), length=41))
        error, _ = kernel.ask(Opcode.LOOKUP, b"file\0")
        assert error == (0 if is_agreed else errno.EIO)
        kernel.check_silence()


@pytest.mark.parametrize("opcode", [Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS])
def test_more_than_fits_is_not_read(tree: Path, opcode: Opcode) -> None:
    """Of a file, or directory, that is open: four gigabytes would be made room for."""
    with serving(tree) as kernel:
        kernel.init()
        if opcode == Opcode.READ:
            handle = opened(kernel, lookup(kernel, b"file"))
        else:
            handle = number(kernel.get(Opcode.OPENDIR, pack("open_in", 0, 0)))
        body = pack("read_in", handle, 0, 0xFFFFFFFF, 0, 0, 0, 0)
        assert kernel.ask(opcode, body) == (errno.EINVAL, b"")
        kernel.get(opcode, pack("read_in", handle, 0, 65536, 0, 0, 0, 0))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1])
def test_what_is_no_offset_is_refused(tree: Path, model: str, offset: int) -> None:
    """Of 64 bits, an offset has 63."""
    with serving(tree, model) as kernel:
        kernel.init()
        nodeid = lookup(kernel, b"file")
        handle = opened(kernel, nodeid)
        write = pack("write_in", handle, offset, 4, 0, 0, 0, 0) + b"more"
        for opcode, body in (
            (Opcode.READ, pack("read_in", handle, offset, 4, 0, 0, 0, 0)),
            (Opcode.WRITE, write),
            (Opcode.SETATTR, pack("setattr_in", 8, 0, 0, offset, *[0] * 12)),
            (Opcode.FALLOCATE, pack("fallocate_in", handle, offset, 1, 0, 0)),
            (Opcode.FALLOCATE, pack("fallocate_in", handle, 0, offset, 0, 0)),
        ):
            error, _ = kernel.ask(opcode, body, nodeid)
            assert error in (errno.EINVAL, errno.EFBIG), Opcode(opcode)
        assert (tree / "file").read_bytes() == b"data"
        kernel.settle()


def about(file: int, directory: int, handle: int, listing: int) -> list[tuple[int, int, bytes]]:
    """A good request of each kind: opcode, nodeid, body."""
    caller_owner = 77
    times = (1, 2, 3)
    read = pack("read_in", handle, 0, 4096, 0, caller_owner, 0, 0)
    listed = pack("read_in", listing, 0, 4096, 0, 0, 0, 0)
    lock = pack("lk_in", handle, caller_owner, 0, 9, 1, ME["pid"], 0, 0)
    copy = pack("copy_file_range_in", handle, 0, file, handle, 4096, 4, 0)
    return [
        (Opcode.LOOKUP, ROOT, b"file\0"),
        (Opcode.FORGET, file, pack("forget_in", 1)),
        (Opcode.BATCH_FORGET, 0, pack("batch_forget_in", 1, 0) + pack("forget_one", file, 1)),
        (Opcode.GETATTR, file, pack("getattr_in", 0, 0, 0)),
        (Opcode.STATX, file, pack("statx_in", 0, 0, 0, 0, 0xFFF)),
        (
            Opcode.SETATTR,
            file,
            pack("setattr_in", 0x3F, 0, 0, 9, 0, *times, *[4] * 3, 0o644, *[0] * 4),
        ),
        (Opcode.SYMLINK, directory, b"link\0target\0"),
        (Opcode.MKNOD, directory, pack("mknod_in", stat.S_IFREG | 0o644, 0, 0, 0) + b"node\0"),
        (Opcode.MKDIR, directory, pack("mkdir_in", 0o755, 0) + b"d\0"),
        (Opcode.UNLINK, directory, b"node\0"),
        (Opcode.RMDIR, directory, b"d\0"),
        (Opcode.RENAME, directory, pack("rename_in", directory) + b"node\0other\0"),
        (Opcode.RENAME2, directory, pack("rename2_in", directory, 1, 0) + b"node\0new\0"),
        (Opcode.LINK, directory, pack("link_in", file) + b"hard\0"),
        (Opcode.OPEN, file, pack("open_in", os.O_RDWR, 0)),
        (Opcode.OPENDIR, directory, pack("open_in", 0, 0)),
        (Opcode.CREATE, directory, pack("create_in", os.O_RDWR, 0o644, 0, 0) + b"made\0"),
        (Opcode.TMPFILE, directory, pack("create_in", os.O_RDWR, 0o644, 0, 0) + b"/\0"),
        (Opcode.READLINK, file, b""),
        (Opcode.READ, file, read),
        (Opcode.WRITE, file, pack("write_in", handle, 0, 4, 0, caller_owner, 0, 0) + b"more"),
        (Opcode.STATFS, ROOT, b""),
        (Opcode.FLUSH, file, pack("flush_in", handle, 0, 0, caller_owner)),
        (Opcode.FSYNC, file, pack("fsync_in", handle, 1, 0)),
        (Opcode.FSYNCDIR, directory, pack("fsync_in", listing, 1, 0)),
        (Opcode.RELEASE, file, pack("release_in", handle, 0, 0, caller_owner)),
        (Opcode.RELEASEDIR, directory, pack("release_in", listing, 0, 0, 0)),
        (Opcode.READDIR, directory, listed),
        (Opcode.READDIRPLUS, directory, listed),
        (Opcode.SETXATTR, file, pack("setxattr_in", 1, 0, 0, 0) + b"user.n\0v"),
        (Opcode.GETXATTR, file, pack("getxattr_in", 256, 0) + b"user.n\0"),
        (Opcode.LISTXATTR, file, pack("getxattr_in", 256, 0)),
        (Opcode.REMOVEXATTR, file, b"user.n\0"),
        (Opcode.GETLK, file, lock),
        (Opcode.SETLK, file, lock),
        (Opcode.FALLOCATE, file, pack("fallocate_in", handle, 0, 4096, 1, 0)),
        (Opcode.LSEEK, file, pack("lseek_in", handle, 0, os.SEEK_DATA, 0)),
        (Opcode.COPY_FILE_RANGE, file, copy),
        (Opcode.COPY_FILE_RANGE_64, file, copy),
        # To read the flags: none of the changes below makes a request to set some of it.
        (Opcode.IOCTL, file, pack("ioctl_in", handle, 0, 0x80086601, 0, 0, 8)),
        (34, file, bytes(8)),  # ACCESS, which is not served
        (Opcode.SYNCFS, ROOT, pack("syncfs_in", 0)),
        (Opcode.INTERRUPT, 0, pack("interrupt_in", 2)),
        (Opcode.NOTIFY_REPLY, file, bytes(40)),
        (Opcode.DESTROY, 0, b""),
        (Opcode.INIT, 0, pack("init_in", 7, 45, 0, INIT_EXT, 0, *[0] * 11)),
    ]


COUNT = len(about(0, 0, 0, 0))
Change = tuple[int, list[Edit], bool]
bad = st.tuples(st.integers(0, COUNT - 1), st.one_of(st.just([]), changes, changes), st.booleans())


def test_each_kind_of_request_is_among_those_that_are_changed() -> None:
    assert set(Opcode) - {opcode for opcode, _, _ in about(0, 0, 0, 0)} == {Opcode.SETLKW}


@pytest.mark.soak
@pytest.mark.parametrize("model", MODELS)
def test_bad_requests_are_answered_and_the_session_goes_on(tree: Path, model: str) -> None:
    """Whatever they say, each is answered once, and the next good one as ever.

    (But SETLKW, which may have to wait.)
    """
    with serving(tree, model) as kernel:
        kernel.init()
        kept = lookup(kernel, b"kept")

        # Not made smaller where it fails: what the session is like by then is of all before.
        @settings(
            max_examples=2000 if SOAK else 50,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(bad, min_size=1, max_size=12))
        def examine(wanted: list[Change]) -> None:
            assert kernel.serves
            fill(tree)
            file, directory = lookup(kernel, b"file"), lookup(kernel, b"d")
            handle = opened(kernel, file) if (tree / "file").is_file() else 0
            listing = number(kernel.get(Opcode.OPENDIR, pack("open_in", 0, 0)))
            good = about(file, directory, handle, listing)
            uniques = [ask_changed(kernel, good[which], of, honest) for which, of, honest in wanted]
            for unique in filter(kernel.waits_for, uniques):
                kernel.answer(unique)
            attributes = kernel.get(Opcode.LOOKUP, b"file\0", kept)
            assert struct.unpack_from("=2Q", attributes, 40)[1] == len(b"kept")
            for opcode, it in ((Opcode.RELEASE, handle), (Opcode.RELEASEDIR, listing)):
                kernel.ask(opcode, pack("release_in", it, 0, 0, 0))

        examine()
        kernel.settle()
        kernel.check_silence()
        assert len(kernel.starts) == 1


def ask_changed(kernel: Kernel, good: tuple[int, int, bytes], of: list[Edit], honest: bool) -> int:
    """Send a request with changes; its number, which is a new one all the same."""
    opcode, nodeid, body = good
    unique = kernel.new_unique()
    data = bytearray(mutated(request(opcode, body, nodeid=nodeid, **ME), of, true_length=honest))
    if len(data) >= 8 and struct.unpack_from("=I", data, 4)[0] == SETLKW:
        data[4:8] = struct.pack("=I", SETLK)
    if len(data) >= 16:
        data[8:16] = struct.pack("=Q", unique)
    if data:
        kernel.send(bytes(data))
    return unique


# The end


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("is_read", [True, False])
def test_the_session_ends_with_its_device(tree: Path, model: str, is_read: bool) -> None:
    """Also where replies have not been read."""
    with serving(tree, model) as kernel:
        kernel.init()
        lookup(kernel, b"file")
        if not is_read:
            kernel.send(request(Opcode.LOOKUP, b"d\0", unique=kernel.new_unique(), nodeid=ROOT))
        kernel.hang_up()
        kernel.ended()
        kernel.settle()


@pytest.mark.parametrize("model", MODELS)
def test_the_session_ends_when_it_is_told_to(tree: Path, model: str) -> None:
    with serving(tree, model) as kernel:
        kernel.init()
        kernel.front.end()
        kernel.ended()


# More than may be under way


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Syncs last until it is set; two requests are the most that may be under way."""
    gate = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: passed(gate))
    monkeypatch.setattr(native, "_MOST_REQUESTS", 2)
    yield gate
    gate.set()


def fill_up(kernel: Kernel) -> list[int]:
    """Have as many requests under way as may be, and one that is not read; their numbers."""
    kernel.init()
    nodeid = lookup(kernel, b"file")
    body = pack("fsync_in", opened(kernel, nodeid), 0, 0)
    uniques = [kernel.new_unique() for _ in range(2)]
    for unique in uniques:
        kernel.send(request(Opcode.FSYNC, body, unique=unique, nodeid=nodeid, **ME))
    wait_until(lambda: len(kernel.driver.requests) == 2, "both are under way")
    uniques.append(kernel.new_unique())
    kernel.send(request(Opcode.LOOKUP, b"file\0", unique=uniques[-1], nodeid=ROOT, **ME))
    return uniques


@pytest.mark.parametrize("model", ["first", "second"])
def test_while_too_much_is_under_way_the_session_sleeps(
    tree: Path, stuck: threading.Event, model: str
) -> None:
    """Though there is something to be read; it is, when something has ended."""
    with serving(tree, model) as kernel:
        uniques = fill_up(kernel)
        clock = time.pthread_getcpuclockid(kernel._thread.ident or 0)
        before, since = time.clock_gettime(clock), time.monotonic()
        while time.monotonic() < since + 0.5:
            time.sleep(0.1)
        used = time.clock_gettime(clock) - before
        assert used < 0.05 * (time.monotonic() - since)
        assert len(kernel.driver.requests) == 2
        stuck.set()
        for unique in uniques:
            assert kernel.answer(unique)[0] == 0
        kernel.settle()


def test_while_too_much_is_under_way_the_session_ends_with_its_device(
    tree: Path, stuck: threading.Event
) -> None:
    with serving(tree, "second") as kernel:
        fill_up(kernel)
        kernel.hang_up()
        kernel.ended()
        assert len(kernel.driver.requests) == 2
        stuck.set()
        kernel.settle()


MAKERS: dict[str, tuple[int, bytes]] = {
    "lookup": (Opcode.LOOKUP, b"file\0"),
    "lookup of what is known": (Opcode.LOOKUP, b"d\0"),
    "mkdir": (Opcode.MKDIR, pack("mkdir_in", 0o755, 0) + b"new\0"),
    "mknod": (Opcode.MKNOD, pack("mknod_in", stat.S_IFREG | 0o644, 0, 0, 0) + b"new\0"),
    "symlink": (Opcode.SYMLINK, b"new\0target\0"),
    "link": (Opcode.LINK, pack("link_in", 0) + b"new\0"),
    "open": (Opcode.OPEN, pack("open_in", os.O_RDWR, 0)),
    "opendir": (Opcode.OPENDIR, pack("open_in", 0, 0)),
    "create": (Opcode.CREATE, pack("create_in", os.O_RDWR, 0o644, 0, 0) + b"new\0"),
    "tmpfile": (Opcode.TMPFILE, pack("create_in", os.O_RDWR, 0o644, 0, 0) + b"/\0"),
    "readdirplus": (Opcode.READDIRPLUS, b""),
}


def made_for(name: str, known: int, listing: int) -> bytes:
    """A request that gives something away, with what is not known beforehand put in."""
    opcode, body = MAKERS[name]
    nodeid = ROOT
    if name == "link":
        body = pack("link_in", known) + b"new\0"
    elif name == "open":
        nodeid = known
    elif name == "readdirplus":
        body = pack("read_in", listing, 0, 4096, 0, 0, 0, 0)
    return request(opcode, body, unique=1 << 50, nodeid=nodeid, **ME)


def state(session: Session) -> tuple[dict[int, int], int]:
    """What the kernel was given: lookups of each file, and how much is open."""
    fids = session.fids._fids
    return {one: fid.lookups for one, fid in fids.items()}, session.fids.statistics().opened


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_answered_when_nobody_is_there_is_taken_back(
    tree: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    with serving(tree, model) as kernel:
        kernel.init()
        lookup(kernel, b"d")
        known = lookup(kernel, b"file", lookup(kernel, b"kept"))
        listing = number(kernel.get(Opcode.OPENDIR, pack("open_in", 0, 0)))
        kernel.settle()
        before = state(kernel.session)
        # It is not read before the other end has gone.
        holds, gone = threading.Event(), threading.Event()
        take = kernel.front.take

        def held(message: Message) -> Request | None:
            if message.opcode == Opcode.STATFS:
                holds.set()
                passed(gone)
            return take(message)

        monkeypatch.setattr(kernel.front, "take", held)
        kernel.send(request(Opcode.STATFS, unique=kernel.new_unique(), nodeid=ROOT))
        passed(holds)
        kernel.send(made_for(name, known, listing))
        kernel.hang_up()
        gone.set()
        kernel.ended()
        kernel.settle()
        # A request has ended just before it is answered; what is to be closed then is another.
        wait_until(lambda: state(kernel.session) == before, "all is taken back")
        kernel.settle()


class Untaken:
    """In the place of a device: nobody takes an answer, or the kernel refuses it."""

    refuses = False

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.short_setxattr = True
        self.said: list[str] = []
        self.errors: list[int] = []

    def error(self, unique: int, code: int) -> bool:
        self.errors.append(code)
        return False

    def __getattr__(self, name: str) -> Any:
        def answer(*args: object) -> bool:
            self.said.append(name)
            if self.refuses:
                raise OSError(errno.EINVAL, "the kernel refused a reply")
            return False

        return answer


@pytest.fixture
def untaken(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeSession]:
    """A session that nobody hears."""
    monkeypatch.setattr(native, "Device", Untaken)
    driver = NoThreading()
    session = Session(driver)
    driver.run_here(ops.attach(session, ROOT, str(tree)))
    front = NativeSession(Settings(str(tree), "/nowhere"), session, driver)
    front.use(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    take(front, request(Opcode.INIT, pack("init_in", 7, 45, 0, 0, 0, *[0] * 11)))
    yield front
    session.fids.clear()
    driver.close()
    front.close()


def take(front: NativeSession, data: bytes) -> None:
    """Have a request served, on a thread of its own: its umask may become that thread's."""
    bounded(lambda: front.take(decoded(data)))


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_what_nobody_takes_is_taken_back(untaken: NativeSession, name: str, refuses: bool) -> None:
    """Lookups are counted as before, and files closed; so too where the kernel refuses it."""
    session, driver = untaken._session, untaken._driver
    assert isinstance(driver, NoThreading)
    driver.run_here(ops.walkgetattr(session, ROOT, session.kernel.intern, b"d"))
    file, _ = driver.run_here(ops.walkgetattr(session, ROOT, session.kernel.intern, b"file"))
    listing = driver.run_here(callbacks.opendir(session, ROOT)) - FIRST_HANDLE
    before = state(session)
    device: Any = untaken._device
    device.said.clear()
    device.refuses = refuses
    take(untaken, made_for(name, file.number, listing))
    assert len(device.said) == 1, "it was answered"
    assert device.errors == ([errno.EINVAL] if refuses else [])
    assert state(session) == before
    assert not driver.requests


def test_a_model_that_fails_ends_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its body held is given back, and the mount goes on."""

    def fail(request: object) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "file").write_bytes(b"")
    with serving(tmp_path, "first") as kernel:
        kernel.init()
        with monkeypatch.context() as patched:
            patched.setattr(kernel.driver, "drive", fail)
            assert kernel.ask(Opcode.LOOKUP, b"file\0")[0] == errno.EIO
        assert "cannot run it" in caplog.text
        caplog.clear()
        kernel.get(Opcode.LOOKUP, b"file\0")
        kernel.settle()
