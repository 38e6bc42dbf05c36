"""Requests by io_uring (ninefuse/driving/_ring.pyx).

Skipped where it is not built or not allowed.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import PATIENCE
from ops_helpers import descriptors
from ops_helpers import leak_free as leak_free

from ninefuse.linux import capabilities

if TYPE_CHECKING:
    from ninefuse.driving._ring import Ring, probe
else:
    try:
        built = importlib.import_module("ninefuse.driving._ring")
    except ImportError as refused:
        pytest.skip(f"the extension is not built: {refused}", allow_module_level=True)
    Ring, probe = built.Ring, built.probe
    try:
        Ring(1).close()
    except OSError as refused:
        pytest.skip(f"the kernel refuses io_uring: {refused}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("leak_free")

Completion = tuple[object, int, bytes | None]


@pytest.fixture
def ring() -> Iterator[Ring]:
    with contextlib.closing(Ring()) as one:
        yield one


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):  # closed by the test
            os.close(fd)


def readable(ring: Ring, seconds: float) -> bool:
    return bool(select.select([ring.fd], [], [], seconds)[0])


def results(ring: Ring, count: int) -> list[Completion]:
    """Submit, and wait for that many completions as a loop does; no more must come."""
    ring.submit()
    found: list[Completion] = []
    while len(found) < count:
        assert readable(ring, PATIENCE), f"{found} and no more"
        ring.drain()
        found += ring.reap()
    assert len(found) == count
    assert ring.in_flight == 0
    return found


def result(ring: Ring) -> tuple[int, bytes | None]:
    ((_token, number, data),) = results(ring, 1)
    return number, data


# ---- results and errors -------------------------------------------------------------------------


def test_probe_names_all_three() -> None:
    assert probe() == {"read", "write", "fsync"}


def test_write_fsync_read(ring: Ring, file: int) -> None:
    ring.write("w", file, b"hello world", 5)
    assert results(ring, 1) == [("w", 11, None)]
    ring.fsync("s", file, False)
    ring.fsync("d", file, True)
    assert sorted(results(ring, 2), key=str) == [("d", 0, None), ("s", 0, None)]
    ring.read("r", file, 8, 8)
    assert results(ring, 1) == [("r", 8, b"lo world")]
    assert os.lseek(file, 0, os.SEEK_CUR) == 0
    assert os.pread(file, 100, 0) == b"\0" * 5 + b"hello world"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_writes_take_whatever_is_like_bytes(ring: Ring, file: int, kind: Any) -> None:
    ring.write(1, file, kind(b"abc"), 0)
    assert result(ring) == (3, None)
    assert os.pread(file, 9, 0) == b"abc"


def test_reads_at_the_end_are_short(ring: Ring, file: int) -> None:
    os.pwrite(file, b"0123456789", 0)
    for count, offset, data in [
        (100, 0, b"0123456789"),
        (100, 9, b"9"),
        (1, 9, b"9"),
        (2, 9, b"9"),
        (100, 10, b""),
        (1, 10, b""),
        (100, 2**62, b""),
        (0, 0, b""),
        (2**30, 4, b"456789"),
    ]:
        ring.read(1, file, count, offset)
        assert result(ring) == (len(data), data), (count, offset)


def test_a_read_is_not_the_empty_bytes_object_changed(ring: Ring, file: int) -> None:
    os.pwrite(file, b"x", 0)
    ring.read(1, file, 1, 0)
    assert result(ring) == (1, b"x")
    assert bytes([120]) == b"x"
    assert bytes(0) == b""


def test_errors_are_results(ring: Ring, file: int, pipe: tuple[int, int], tmp_path: Path) -> None:
    ring.read(1, 99999, 10, 0)
    assert result(ring) == (-errno.EBADF, None)
    ring.write(1, 99999, b"x", 0)
    assert result(ring) == (-errno.EBADF, None)
    ring.fsync(1, 99999, False)
    assert result(ring) == (-errno.EBADF, None)
    for flags, path, code in [
        (os.O_RDONLY | os.O_DIRECTORY, tmp_path, errno.EISDIR),
        (os.O_WRONLY, tmp_path / "file", errno.EBADF),
    ]:
        fd = os.open(path, flags)
        ring.read(1, fd, 10, 0)
        assert result(ring) == (-code, None), path
        os.close(fd)
    full = os.open("/dev/full", os.O_RDWR)
    ring.write(1, full, b"x", 0)
    assert result(ring) == (-errno.ENOSPC, None)
    os.close(full)
    ring.fsync(1, pipe[0], False)
    assert result(ring) == (-errno.EINVAL, None)


def test_the_largest_offset(ring: Ring, file: int) -> None:
    last = 2**63 - 1
    ring.read(1, file, 1, last)
    number, data = result(ring)
    assert (number, data) in [(0, b""), (-errno.EINVAL, None), (-errno.EOVERFLOW, None)]
    ring.write(1, file, b"xx", last)
    assert result(ring)[0] in (-errno.EFBIG, -errno.EINVAL, -errno.EOVERFLOW)


def test_arguments_out_of_range_queue_nothing(ring: Ring, file: int) -> None:
    for count, offset in [(-1, 0), (0x7FFFF001, 0), (1, -1)]:
        with pytest.raises(ValueError, match=r"cannot read \S+ bytes at"):
            ring.read(1, file, count, offset)
    with pytest.raises(ValueError, match="cannot write 1 bytes at -1"):
        ring.write(1, file, b"x", -1)
    with pytest.raises(OverflowError):
        ring.read(1, file, 1, 2**63)
    with pytest.raises(TypeError):
        ring.write(1, file, "text", 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ring.read(None, file, 1, 0)
    with pytest.raises(ValueError, match="needs an entry"):
        Ring(0)
    assert (ring.in_flight, ring.submit()) == (0, 0)


# ---- queues -------------------------------------------------------------------------------------


def test_more_requests_than_entries(file: int) -> None:
    tokens = [object() for _ in range(1000)]
    with contextlib.closing(Ring(8)) as ring:
        for n, token in enumerate(tokens):
            ring.write(token, file, b"%04d" % n, 4 * n)
        assert ring.in_flight == 1000
        written = results(ring, 1000)
        assert {id(token) for token, _, _ in written} == set(map(id, tokens))
        assert {number for _, number, _ in written} == {4}
        for n in range(1000):
            ring.read(n, file, 4, 4 * n)
        assert sorted(results(ring, 1000), key=str) == sorted(
            [(n, 4, b"%04d" % n) for n in range(1000)], key=str
        )


def test_more_completions_than_the_queue_holds(file: int) -> None:
    os.pwrite(file, b"abcd", 0)
    with contextlib.closing(Ring(8)) as ring:
        for n in range(10_000):
            ring.read(n, file, 4, 0)
        found = results(ring, 10_000)
    assert sorted(found, key=lambda one: int(str(one[0]))) == [
        (n, 4, b"abcd") for n in range(10_000)
    ]


def test_nothing_is_submitted_before_submit(ring: Ring, file: int) -> None:
    ring.write(1, file, b"x", 0)
    time.sleep(0.05)
    assert (ring.reap(), os.fstat(file).st_size, ring.in_flight) == ([], 0, 1)
    assert ring.submit() == 1
    assert ring.submit() == 0
    assert readable(ring, PATIENCE)
    assert ring.reap() == [(1, 1, None)]


def test_drain_makes_the_eventfd_unreadable(ring: Ring, file: int) -> None:
    ring.drain()
    assert not readable(ring, 0)
    ring.read(1, file, 1, 0)
    ring.submit()
    assert readable(ring, PATIENCE)
    ring.drain()
    assert not readable(ring, 0)
    assert ring.reap() == [(1, 0, b"")]


# ---- waiting ------------------------------------------------------------------------------------


def test_a_completion_wakes_a_thread_that_sleeps(ring: Ring, pipe: tuple[int, int]) -> None:
    ring.read("p", pipe[0], 100, 0)
    ring.submit()
    time.sleep(0.05)
    assert (ring.reap(), readable(ring, 0)) == ([], False)
    timer = threading.Timer(0.2, os.write, (pipe[1], b"later"))
    timer.start()
    began = time.monotonic()
    assert readable(ring, PATIENCE)
    assert 0.1 < time.monotonic() - began < 5
    assert ring.reap() == [("p", 5, b"later")]
    timer.join()


def test_a_completion_wakes_epoll(ring: Ring, pipe: tuple[int, int], file: int) -> None:
    """With the one that sleeps on a worker of the kernel, and one that it finishes itself."""
    with select.epoll() as poll:
        poll.register(ring.fd, select.EPOLLIN)
        for n in range(3):
            ring.read(n, pipe[0], 100, 0)
            ring.submit()
            timer = threading.Timer(0.05, os.write, (pipe[1], b"later"))
            timer.start()
            assert poll.poll(PATIENCE) == [(ring.fd, select.EPOLLIN)]
            ring.drain()
            assert ring.reap() == [(n, 5, b"later")]
            timer.join()
            ring.fsync(n, file, False)
            ring.submit()
            assert poll.poll(PATIENCE) == [(ring.fd, select.EPOLLIN)]
            ring.drain()
            assert ring.reap() == [(n, 0, None)]


def test_a_completion_comes_to_a_thread_that_computes(ring: Ring, pipe: tuple[int, int]) -> None:
    ring.read("p", pipe[0], 100, 0)
    ring.submit()
    os.write(pipe[1], b"now")
    until = time.monotonic() + PATIENCE
    found: list[Completion] = []
    while not found and time.monotonic() < until:
        found = ring.reap()
    assert found == [("p", 3, b"now")]


def test_signals_do_not_disturb(ring: Ring, file: int) -> None:
    count = 0

    def handler(_number: int, _frame: object) -> None:
        nonlocal count
        count += 1

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for n in range(300):
            ring.write(n, file, b"x" * 4096, 0)
            ring.fsync(n, file, True)
            assert {number for _, number, _ in results(ring, 2)} == {4096, 0}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert count > 0


# ---- memory -------------------------------------------------------------------------------------


class Token:
    """Something that can be seen to die."""


def test_buffers_and_tokens_live_until_reaped(ring: Ring, pipe: tuple[int, int]) -> None:
    token = Token()
    seen = weakref.ref(token)
    ring.read(token, pipe[0], 1 << 20, 0)
    del token
    data = bytearray(b"a" * 60_000)
    pinned = weakref.ref(memoryview(data))
    ring.write(2, pipe[1], data, 0)
    with pytest.raises(BufferError):
        data.append(0)
    del data
    gc.collect()
    others = [bytes(60_000 + n) for n in range(200)]  # over what was freed by mistake
    ring.submit()
    found: list[Completion] = []
    while ring.in_flight:
        assert readable(ring, PATIENCE)
        ring.drain()
        found += ring.reap()
        gc.collect()
    assert len(others) == 200
    assert seen() is not None
    (read,) = (data for _, _, data in found if data is not None)
    assert read
    assert set(read) == {ord("a")}
    del found
    assert (seen(), pinned()) == (None, None)


def test_a_buffer_is_let_go_when_reaped(ring: Ring, file: int) -> None:
    data = bytearray(b"abc")
    ring.write(1, file, data, 0)
    assert result(ring) == (3, None)
    data.append(0)


def test_results_do_not_share_their_bytes(ring: Ring, file: int) -> None:
    os.pwrite(file, b"0" * 100 + b"1" * 100, 0)
    ring.read(0, file, 100, 0)
    ring.read(1, file, 1000, 100)
    assert sorted(results(ring, 2), key=str) == [(0, 100, b"0" * 100), (1, 100, b"1" * 100)]


def test_tokens_that_use_the_ring_while_they_are_reaped(file: int) -> None:
    """The collector may run anything while completions are taken."""
    rings = [Ring(8)]
    caught: list[Completion] = []

    class Nested:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            caught.extend(rings[0].reap())
            rings[0].read("again", file, 10, 0)

    threshold = gc.get_threshold()
    os.pwrite(file, b"abc", 0)
    gc.set_threshold(5)
    try:
        for _ in range(50):
            for n in range(20):
                Nested()
                rings[0].read(n, file, 10, 0)
            rings[0].submit()
            caught += rings[0].reap()
    finally:
        gc.set_threshold(*threshold)
        gc.collect()
    while rings[0].in_flight:
        rings[0].submit()
        caught += rings[0].reap()
    rings[0].close()
    assert {(number, data) for _, number, data in caught} == {(3, b"abc")}
    assert sum(token != "again" for token, _, _ in caught) == 1000


def test_a_ring_is_not_closed_under_a_harvest(file: int) -> None:
    class Closing:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            try:
                ring.close()
            except RuntimeError as refused:
                refusals.append(refused)

    refusals: list[RuntimeError] = []
    threshold = gc.get_threshold()
    gc.freeze()  # what is here already makes each collection long
    for _ in range(20):
        ring = Ring()
        for n in range(50):
            ring.read(n, file, 10, 0)
        ring.submit()
        gc.collect()
        Closing()
        gc.set_threshold(20)
        try:
            with contextlib.suppress(ValueError):  # closed before it began
                ring.reap()
        finally:
            gc.set_threshold(*threshold)
            gc.collect()
        ring.close()
    gc.unfreeze()
    if sys.version_info < (3, 12):  # newer ones collect between instructions only
        assert refusals


def test_tokens_that_close_the_ring_as_it_closes(pipe: tuple[int, int]) -> None:
    ring = Ring()

    class Closing:
        def __del__(self) -> None:
            with contextlib.suppress(RuntimeError):
                ring.close()

    for _ in range(5):
        ring.read(Closing(), pipe[0], 10, 0)
    ring.submit()
    ring.close()
    assert ring.closed


def test_many_rings_leave_nothing(file: int) -> None:
    def use() -> None:
        ring = Ring(64)
        for n in range(20):
            ring.write(n, file, bytes(10_000), 0)
            ring.read(n, file, 100_000, 0)
        ring.submit()
        ring.reap()
        ring.close()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for _ in range(50):
        use()
    before, open_before = resident(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        use()
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert resident() - before < 4 << 20


def test_a_dropped_ring_keeps_what_the_kernel_writes_to(pipe: tuple[int, int]) -> None:
    kept = Token()
    count = weakref.getweakrefcount(kept)
    seen = weakref.ref(kept)
    ring = Ring()
    ring.read(kept, pipe[0], 100_000, 0)
    del kept
    ring.submit()
    with pytest.warns(ResourceWarning, match="dropped with 1 requests in flight"):
        del ring
    gc.collect()
    assert count == 0
    assert seen() is not None


def test_a_dropped_ring_without_requests_gives_all_back(file: int) -> None:
    token = Token()
    seen = weakref.ref(token)
    ring = Ring()
    ring.read(token, file, 10, 0)
    del token
    results(ring, 1)
    open_before = len(os.listdir("/proc/self/fd"))
    del ring
    assert len(os.listdir("/proc/self/fd")) == open_before - 2
    assert seen() is None


# ---- ending -------------------------------------------------------------------------------------


def test_writes_that_wait_can_be_asked_back(ring: Ring, pipe: tuple[int, int], file: int) -> None:
    ring.cancel_writes()
    os.set_blocking(pipe[1], False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe[1], bytes(4096))
    os.set_blocking(pipe[1], True)
    for n in range(3):
        ring.write(n, pipe[1], b"waits for a reader", 0)
    ring.submit()
    ring.cancel_writes()
    assert sorted(results(ring, 3)) == [(n, -errno.ECANCELED, None) for n in range(3)]
    ring.write(1, file, b"abc", 0)
    assert result(ring) == (3, None)


def test_close_cancels_reads_that_wait(pipe: tuple[int, int]) -> None:
    tokens = [Token() for _ in range(20)]
    seen = [weakref.ref(token) for token in tokens]
    ring = Ring(8)
    for token in tokens:
        ring.read(token, pipe[0], 100, 0)
    ring.submit()
    del tokens, token
    began = time.monotonic()
    ring.close()
    assert time.monotonic() - began < 5
    assert [one() for one in seen] == [None] * 20
    assert (ring.closed, ring.in_flight) == (True, 0)


def test_close_lets_writes_finish(file: int) -> None:
    ring = Ring(8)
    for n in range(100):
        ring.write(n, file, b"%04d" % n, 4 * n)
        ring.fsync(n, file, True)
    ring.close()  # some were not even submitted
    assert os.pread(file, 1000, 0) == b"".join(b"%04d" % n for n in range(100))


def test_close_gives_way_to_a_signal_that_raises(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe[1], bytes(4096))
    os.set_blocking(pipe[1], True)
    ring = Ring()
    ring.write(1, pipe[1], b"waits for a reader", 0)
    ring.submit()

    def handler(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            ring.close()
    finally:
        signal.signal(signal.SIGALRM, old)
    assert (ring.closed, ring.in_flight) == (False, 1)
    os.read(pipe[0], 1 << 16)  # which makes room for it
    ring.close()


def test_close_from_another_thread(pipe: tuple[int, int]) -> None:
    ring = Ring()
    ring.read(1, pipe[0], 100, 0)
    ring.submit()
    thread = threading.Thread(target=ring.close)
    thread.start()
    thread.join(PATIENCE)
    assert ring.closed


def test_a_closed_ring_refuses_everything() -> None:
    ring = Ring()
    ring.close()
    ring.close()
    uses: list[Any] = [
        lambda: ring.fd,
        lambda: ring.read(1, 0, 1, 0),
        lambda: ring.write(1, 0, b"", 0),
        lambda: ring.fsync(1, 0, False),
        ring.submit,
        ring.reap,
        ring.drain,
        ring.cancel_writes,
        lambda: ring.limit_workers(0),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="closed"):
            use()


def test_descriptors_are_not_inherited(ring: Ring) -> None:
    names = {fd for fd, name in descriptors().items() if "io_uring" in name}
    assert names
    assert not any(os.get_inheritable(fd) for fd in {ring.fd, *names})


def test_no_descriptor_is_left_when_none_can_be_made() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) - 1
    for more in range(2):
        # What there is may be numbered with gaps: count by opening.
        held = [os.dup(0) for _ in range(30)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1 + more, hard))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as raised:
                Ring()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)
        assert raised.value.errno == errno.EMFILE
        assert len(os.listdir("/proc/self/fd")) - 1 == used


# Has the kernel answer one system call with an error from now on (seccomp(2)), and tells.
REFUSING = """
import ctypes, os, struct, sys, time
from ninefuse.driving._ring import Ring, probe
number, code = int(sys.argv[1]), int(sys.argv[2])
early = Ring()
program = b"".join(
    struct.pack("=HBBI", *one)
    for one in [
        (0x20, 0, 0, 0),  # the call's number
        (0x15, 0, 1, number),
        (0x06, 0, 0, 0x50000 | code),
        (0x06, 0, 0, 0x7FFF0000),
    ]
)
kept = ctypes.create_string_buffer(program)
header = struct.pack("@HP", 4, ctypes.addressof(kept))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0
assert prctl(22, 2, ctypes.c_char_p(header)) == 0, ctypes.get_errno()
before = os.listdir("/proc/self/fd")
"""
SETUP, ENTER = 425, 426  # io_uring_setup, io_uring_enter, on every architecture


def refusing(number: int, code: int, program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REFUSING + program, str(number), str(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOMEM])
def test_a_kernel_that_refuses(code: int) -> None:
    program = """
try:
    Ring()
except OSError as refused:
    print(refused.errno, sorted(probe()), os.listdir("/proc/self/fd") == before)
"""
    assert refusing(SETUP, code, program) == [f"{code} [] True"]


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBUSY])
def test_a_kernel_without_memory_for_requests(code: int) -> None:
    """It is tried for a while, and the requests stay queued."""
    program = """
fd = os.open("/dev/zero", os.O_RDONLY)
early.read(1, fd, 10, 0)
began = time.monotonic()
try:
    early.submit()
except BlockingIOError:
    print(1 < time.monotonic() - began < 20, early.in_flight)
sys.stdout.flush()
os._exit(0)  # what is in flight cannot be got rid of
"""
    assert refusing(ENTER, code, program) == ["True 1"]


# ---- the kernel's threads -----------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to lay down")
def test_a_write_is_made_with_the_rights_that_were_registered(ring: Ring, file: int) -> None:
    """The right to keep set-user-id bits tells which they are; a number is not given twice."""
    own = capabilities.get_capabilities()
    number = ring.register_personality()  # which may
    try:
        capabilities.set_capabilities(own._replace(effective=own.effective & ~(1 << 4)))
        less = ring.register_personality()
        for personality, left in ((number, 0o4777), (less, 0o777)):
            os.fchmod(file, 0o4777)
            ring.write("token", file, b"x", 0, personality)
            ring.submit()
            assert one(ring)[1] == 1
            assert os.fstat(file).st_mode & 0o7777 == left
        # What is queued is the kernel's before the number goes.
        os.fchmod(file, 0o4777)
        ring.write("token", file, b"x", 0, number)
        ring.unregister_personality(number)
        assert one(ring)[1] == 1
        assert os.fstat(file).st_mode & 0o7777 == 0o4777
    finally:
        capabilities.set_capabilities(own)
    ring.write("token", file, b"x", 0, number)
    ring.submit()
    assert one(ring)[1] == -errno.EINVAL
    for unknown in (number, 0, -1, 1 << 20):
        with pytest.raises(OSError, match="Invalid argument"):
            ring.unregister_personality(unknown)


def one(ring: Ring) -> Completion:
    """The next completion."""
    while True:
        found = ring.reap()
        if found:
            (completion,) = found
            return completion
        select.select([ring.fd], [], [], PATIENCE)
        ring.drain()


@pytest.mark.parametrize("number", [-1, 1 << 16, 1 << 31])
def test_what_can_be_no_personality_is_refused(ring: Ring, file: int, number: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        ring.write("token", file, b"x", 0, number)
    assert ring.in_flight == 0


def test_limit_workers_returns_what_was(ring: Ring) -> None:
    before = ring.limit_workers(0)
    assert min(before) > 0
    assert ring.limit_workers(3, 5) == before
    assert ring.limit_workers(*before) == (3, 5)


def test_probe_does_not_take_workers_away() -> None:
    """The first ring of a thread decides how many it gets, however small."""
    limits: list[tuple[int, int]] = []

    def count(*, probed: bool) -> None:
        if probed:
            assert probe()
        with contextlib.closing(Ring()) as ring:
            limits.append(ring.limit_workers(0))

    for probed in (False, True):
        thread = threading.Thread(target=count, kwargs={"probed": probed})
        thread.start()
        thread.join()
    assert limits[0] == limits[1]


# ---- anything at all ----------------------------------------------------------------------------

offsets = st.integers(0, 20_000)
requests = st.lists(
    st.one_of(
        st.tuples(st.just("read"), offsets, st.integers(0, 20_000)),
        st.tuples(st.just("write"), offsets, st.binary(max_size=6_000)),
        st.tuples(st.just("fsync"), st.booleans(), st.none()),
        st.tuples(st.just("reap"), st.none(), st.none()),
    ),
    max_size=40,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(requests=requests, together=st.booleans(), entries=st.sampled_from([1, 2, 64]))
def test_like_pread_and_pwrite(
    requests: list[tuple[str, Any, Any]], together: bool, entries: int, tmp_path: Path
) -> None:
    """One after the other, or with reads together between writes, the file is the model's."""
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    model = os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    expected: dict[int, tuple[int, bytes | None]] = {}

    def settle(ring: Ring) -> None:
        found = {token: (number, data) for token, number, data in results(ring, len(expected))}
        assert found == expected
        expected.clear()

    with contextlib.closing(Ring(entries)) as ring:
        for n, (kind, first, second) in enumerate(requests):
            if kind == "read":
                data = os.pread(model, second, first)
                ring.read(n, fd, second, first)
                expected[n] = (len(data), data)
            elif kind == "write":
                settle(ring)
                ring.write(n, fd, second, first)
                expected[n] = (os.pwrite(model, second, first), None)
                settle(ring)
            elif kind == "fsync":
                ring.fsync(n, fd, first)
                expected[n] = (0, None)
            if kind == "reap" or not together:
                settle(ring)
        settle(ring)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    os.close(fd)
    os.close(model)
