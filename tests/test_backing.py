"""The files that the kernel is given (ninefuse/fuse/backing.py), with no kernel to take them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from ops_helpers import ROOT, Client, client_of, fails
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source
from test_wire_session import take
from wire_messages import INIT_EXT, pack, request

from ninefuse import ops
from ninefuse.executor import NoThreading
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse import backing, callbacks, handles
from ninefuse.fuse.backing import Backings
from ninefuse.fuse.handles import Handle
from ninefuse.fuse.native import NativeSession
from ninefuse.fuse.opcodes import Opcode
from ninefuse.fuse.shown import Shown
from ninefuse.linux.callers import Caller
from ninefuse.settings import Settings
from ninefuse.tree.session import Session


class Taker:
    """The ioctls of a kernel that takes files.

    Attributes:
        has: by id, the inode number of the file that it has.
        fails: with this errno, if it is not 0.
        takes_paths: whether it takes O_PATH.
        meanwhile: called while it takes the next one.
    """

    def __init__(self) -> None:
        self.has: dict[int, int] = {}
        self.fails = 0
        self.takes_paths = True
        self.meanwhile: Callable[[], object] | None = None
        self._last = 0

    def ioctl(self, device: int, number: int, argument: bytearray) -> int:
        if number == backing._BACKING_CLOSE:
            del self.has[struct.unpack("=I", argument)[0]]
            return 0
        assert number == backing._BACKING_OPEN == 0x4010E501
        fd, flags, padding = struct.unpack("=iIQ", argument)
        assert (flags, padding) == (0, 0)
        is_path = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
        if self.fails or (is_path and not self.takes_paths):
            raise OSError(self.fails or errno.EBADF, "no")
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        self._last += 1
        self.has[self._last] = os.fstat(fd).st_ino
        return self._last


@pytest.fixture
def taker(monkeypatch: pytest.MonkeyPatch) -> Taker:
    taker = Taker()

    class Calls:
        ioctl = taker.ioctl
        fcntl, F_GETFL, F_SETFL = fcntl.fcntl, fcntl.F_GETFL, fcntl.F_SETFL

    monkeypatch.setattr(backing, "fcntl", Calls)
    return taker


@pytest.fixture
def files(client: Client, taker: Taker) -> Backings:
    return begun(client, taker)


def begun(client: Client, taker: Taker) -> Backings:
    """What gives files to the kernel, and a file."""
    (client.source / "file").write_bytes(b"data")
    files = Backings(client.session, Settings(str(client.source), "/nowhere", data="kernel"))
    files.begin(0)
    assert taker.has == {}, "what was tried is given back"
    return files


def nodeid_of(client: Client, name: bytes = b"file") -> int:
    return client.run(callbacks.lookup(client.session, ROOT, name))[0].number


def opened(client: Client, files: Backings, nodeid: int, flags: int = os.O_RDWR) -> Handle:
    return client.run(files.open(client.session, nodeid, flags))


def close(client: Client, files: Backings, handle: Handle) -> None:
    client.run(files.release(client.session, handle.number))


def test_the_handles_of_a_file_have_one_id_until_the_last_is_closed(
    client: Client, files: Backings, taker: Taker
) -> None:
    file = nodeid_of(client)
    handles = [
        opened(client, files, file, flags) for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY)
    ]
    inode = (client.source / "file").stat().st_ino
    assert taker.has == {handle.backing: inode for handle in handles}
    assert files.passed() == 1
    for handle in handles:
        assert list(taker.has.values()) == [inode]
        assert not handle.is_live
        close(client, files, handle)
    assert taker.has == {}
    assert files.passed() == 0
    again = opened(client, files, file)
    assert again.backing not in (0, handles[0].backing)
    close(client, files, again)


def test_of_two_who_open_a_file_first_one_has_the_kernel_give_back_what_he_brings(
    client: Client, files: Backings, taker: Taker
) -> None:
    file, quicker = nodeid_of(client), []
    taker.meanwhile = lambda: quicker.append(opened(client, files, file))
    slower = opened(client, files, file)
    assert slower.backing == quicker[0].backing
    assert list(taker.has) == [slower.backing]
    for handle in (slower, *quicker):
        close(client, files, handle)
    assert taker.has == {}


def test_a_new_file_is_known_by_the_node_that_the_kernel_knows(
    client: Client, files: Backings, taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody looks a file up before its maker does: then the two have a node each."""
    create = handles.create_in

    async def looked_up_in_between(*args: object) -> object:
        made = await create(*args)  # type: ignore[arg-type]
        return made[0], found[0], made[2]

    found = [client.run(callbacks.lookup(client.session, ROOT, b"file"))[0]]
    monkeypatch.setattr(callbacks, "create_in", looked_up_in_between)
    maker, _, _ = client.run(files.create(client.session, ROOT, b"new", os.O_RDWR, 0o600))
    later = opened(client, files, found[0].number)
    assert later.backing == maker.backing
    for handle in (maker, later):
        close(client, files, handle)


@pytest.mark.parametrize("how", ["read", "written", "mapped"])
def test_attributes_are_not_believed_of_a_file_that_the_kernel_may_change(
    client: Client, files: Backings, how: str
) -> None:
    """Nor later, if it may still be mapped for writing, until it is forgotten."""
    told: list[int] = []
    session = client.session
    session.attributes_changed = told.append
    shown = Shown(session, Settings("/", "/", attr_timeout=5.0))
    found, attributes = client.run(callbacks.lookup(session, ROOT, b"file"))
    file = found.number
    flags = {"read": os.O_RDONLY, "written": os.O_WRONLY, "mapped": os.O_RDWR}[how]
    reading = opened(client, files, file, os.O_RDONLY)
    assert told == []
    for count in (1, 2):
        assert shown.believed(file) == (0.0 if how == "mapped" and count == 2 else 5.0)
        handles = [opened(client, files, file, flags) for _ in range(2)]
        during = 5.0 if how == "read" else 0.0
        assert shown.believed(file) == shown.entry(found, attributes).attr_valid == during
        times = {"read": 0, "written": count, "mapped": 1}[how]
        assert told == [file] * times, "that they are old, once"
        if count == 1:
            close(client, files, reading)
        for handle in handles:
            assert shown.believed(file) == during
            close(client, files, handle)
    session.kernel.forget([(file, 1)])
    assert not session.fids.passed


def test_what_the_kernel_does_not_take_the_daemon_reads_and_the_log_has_it_once(
    source: Path, taker: Taker, caplog: pytest.LogCaptureFixture
) -> None:
    with client_of(source) as client, caplog.at_level(logging.WARNING):
        files = begun(client, taker)
        file = nodeid_of(client)
        taker.fails = errno.ELOOP
        first = opened(client, files, file)
        taker.fails = 0
        # The kernel would refuse another answer than the first one's.
        second = opened(client, files, file)
        assert first.backing == second.backing == 0
        assert files.passed() == 0
        for handle in (first, second):
            close(client, files, handle)
        taker.fails = errno.ELOOP
        close(client, files, opened(client, files, file))
        assert len(caplog.records) == 1
        taker.fails = 0
        third = opened(client, files, file)
        assert third.backing
        close(client, files, third)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root acts for others")
def test_whoever_has_other_rights_than_the_kernel_s_has_the_daemon_write(
    client: Client, files: Backings, taker: Taker
) -> None:
    path = client.source / "file"
    path.chmod(0o666)
    file = nodeid_of(client)
    someone, other = (Caller(uid, uid, None, 0) for uid in (12345, 12346))
    uids: list[int] = []

    def note() -> None:
        status = Path("/proc/self/task", str(threading.get_native_id()), "status").read_text()
        uids.append(int(status.split("Uid:")[1].split()[3]))

    taker.meanwhile = note
    for caller, flags, is_ours in (
        (someone, os.O_RDWR, False),
        (someone, os.O_WRONLY, False),
        (other, os.O_RDONLY, False),
        (other, os.O_WRONLY, True),
        (None, os.O_RDWR, True),
    ):
        handle = client.run(files.open(client.session, file, flags, caller))
        assert handle.is_live == is_ours, (caller, flags)
        if caller is not someone or flags == os.O_WRONLY:
            close(client, files, handle)
        else:
            first = handle
    assert uids == [12345]
    close(client, files, first)
    path.chmod(0o4666)
    handle = opened(client, files, file)
    assert handle.is_live, "set-id bits"
    close(client, files, handle)


def test_a_kernel_that_takes_no_o_path_is_given_another_descriptor(
    client: Client, taker: Taker
) -> None:
    taker.takes_paths = False
    files = begun(client, taker)
    handle = opened(client, files, nodeid_of(client), os.O_WRONLY)
    assert handle.backing
    close(client, files, handle)
    assert taker.has == {}


def test_a_kernel_that_lets_us_give_it_nothing_ends_the_mount(client: Client, taker: Taker) -> None:
    taker.fails = errno.EPERM
    with pytest.raises(Failure, match="CAP_SYS_ADMIN") as caught:
        Backings(client.session, Settings("/", "/", data="kernel")).begin(0)
    assert caught.value.code == ExitCode.USAGE


def test_an_open_that_fails_leaves_nothing(
    client: Client, files: Backings, taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    monkeypatch.setattr(backing, "_check_direct", refuse)
    file, before = nodeid_of(client), set(client.session.fids._fids)
    with fails(errno.EINVAL):
        opened(client, files, file, os.O_RDWR | os.O_DIRECT)
    with fails(errno.EINVAL):
        flags = os.O_RDWR | os.O_DIRECT
        client.run(files.create(client.session, ROOT, b"new", flags, 0o600))
    assert set(client.session.fids._fids) == before
    assert taker.has == {}


def test_a_kernel_without_passthrough_ends_the_mount(source: Path) -> None:
    driver = NoThreading()
    session = Session(driver)
    driver.run_here(ops.attach(session, ROOT, str(source)))
    front = NativeSession(Settings(str(source), "/nowhere", data="kernel"), session, driver)
    front.use(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    body = pack("init_in", 7, 45, 0, INIT_EXT, 0, *[0] * 11)
    with pytest.raises(Failure, match=r"Linux 6\.9") as caught:
        take(front, request(Opcode.INIT, body))
    assert caught.value.code == ExitCode.MOUNT_REFUSED
    session.fids.clear()
    driver.close()
    front.close()
