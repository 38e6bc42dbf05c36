"""Errors and short answers of the source, on a source that fails when told (faultfs.py).

Each reaches the caller as it does on the source itself, with one exception: ENOSYS comes
through as EOPNOTSUPP, since from a callback it would switch the operation off for the whole
mount. (The source's own kernel remembers it, too: see `REMEMBERED`.)

A FUSE file system is no local one, so under the second model all its calls go to workers,
whatever the engine; errors of a local disk are in test_mount_disk.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from faultfs import ENDS
from faults import FaultSource, faulty
from mounting import NINEFUSE, SOAK, Mount, Watchdog, errno_of, wait_until
from servers import options_of, servers

pytestmark = pytest.mark.soak

CODES = (errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EROFS, errno.ENOSPC, errno.ENOSYS)
PAGE = mmap.PAGESIZE
DATA = random.Random(9).randbytes(3 * PAGE + 100)

# After one ENOSYS the kernel of the source answers these by itself, for good: as if they had
# been done (open, opendir: every handle is 0 then), or in another way (create: mknod and open),
# or with EOPNOTSUPP (extended attributes), or EPERM (link).
REMEMBERED = {
    *("getxattr", "setxattr", "listxattr", "removexattr", "flush", "fsync", "fsyncdir", "link"),
    *("create", "opendir", "open"),
}


def shown(code: int) -> int:
    """The errno that a caller of the mount gets for one of the source."""
    return errno.EOPNOTSUPP if code == errno.ENOSYS else code


@pytest.fixture(scope="module")
def ground(watchdog: Watchdog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSource]:
    with faulty(watchdog, tmp_path_factory.mktemp("faults")) as found:
        yield found


@pytest.fixture(scope="module")
def mounts(
    watchdog: Watchdog, ground: FaultSource, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Mount]]:
    """The mounts of the source that tests share, by their options."""
    found: dict[tuple[str, ...], Mount] = {}

    def mount(*options: str) -> Mount:
        if options not in found:
            base = tmp_path_factory.mktemp("mount")
            path = base / "mount"
            path.mkdir()
            words = [*NINEFUSE, "-f", *options, str(ground.path), str(path)]
            found[options] = Mount(
                watchdog, ground.path, path, base / "log", words, r"mounted on .*\n"
            )
        return found[options]

    with contextlib.ExitStack() as ends:
        yield mount
        for one in found.values():
            ends.callback(one.log.check)
            ends.callback(one.end)


@pytest.fixture
def source(ground: FaultSource, guard: Watchdog) -> Iterator[FaultSource]:
    """The source that tests share, with no fault at the beginning and the end of each."""
    yield ground
    ground.clear()
    ground.tell({"direct": False})


@pytest.fixture
def own_source(guard: Watchdog, tmp_path: Path) -> Iterator[FaultSource]:
    with faulty(guard, tmp_path) as found:
        yield found


# What is done while something fails


class Spot:
    """A directory, on the mount or on its source, with files to do things to.

    Attributes: path: it. fd, directory: descriptors of `file` and of itself, while open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = self.directory = -1

    def make(self) -> None:
        self.path.mkdir()
        for name in ("kept", "file"):
            (self.path / name).write_bytes(DATA)
        os.setxattr(self.path / "file", "user.a", b"value")
        (self.path / "symlink").symlink_to("nowhere")
        self.restore()

    def restore(self) -> None:
        """Have the names that should be there, whatever was done or half done."""
        found = set(os.listdir(self.path))
        for name in found & {"made", "moved"}:
            path = self.path / name
            (os.rmdir if stat.S_ISDIR(path.lstat().st_mode) else os.unlink)(path)
        if "victim" not in found:
            (self.path / "victim").touch()
        if "empty" not in found:
            (self.path / "empty").mkdir()

    def open(self) -> None:
        self.fd = os.open(self.path / "file", os.O_RDWR)
        self.directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        """Close what is open; whatever that says."""
        for fd in (self.fd, self.directory):
            errno_of(os.close, fd)
        self.fd = self.directory = -1

    @contextlib.contextmanager
    def ready(self, operation: str) -> Iterator[None]:
        """Have open what the call for an operation needs to be."""
        if operation in OF_DESCRIPTORS:
            self.open()
        try:
            yield
        finally:
            self.close()


def _read(spot: Spot) -> None:
    assert os.pread(spot.fd, len(DATA), 0) == DATA


def _remove_attribute(spot: Spot) -> None:
    os.setxattr(spot.path / "file", "user.b", b"value")
    os.removexattr(spot.path / "file", "user.b")


def _create(spot: Spot) -> None:
    os.close(os.open(spot.path / "made", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _open(spot: Spot) -> None:
    os.close(os.open(spot.path / "file", os.O_RDONLY))


def _open_directory(spot: Spot) -> None:
    os.close(os.open(spot.path, os.O_RDONLY | os.O_DIRECTORY))


def _close(spot: Spot) -> None:
    fd, spot.fd = spot.fd, -1
    os.close(fd)


def _close_directory(spot: Spot) -> None:
    fd, spot.directory = spot.directory, -1
    os.close(fd)


# One call for each operation of the source, which leads to it there and through the mount.
CALLS: dict[str, Callable[[Spot], object]] = {
    "lookup": lambda spot: os.stat(spot.path / "file"),
    "getattr": lambda spot: os.fstat(spot.fd),
    "setattr": lambda spot: os.fchmod(spot.fd, 0o640),
    "readlink": lambda spot: os.readlink(spot.path / "symlink"),
    "mknod": lambda spot: os.mknod(spot.path / "made", stat.S_IFIFO | 0o600),
    "mkdir": lambda spot: os.mkdir(spot.path / "made"),
    "symlink": lambda spot: os.symlink("nowhere", spot.path / "made"),
    "link": lambda spot: os.link(spot.path / "file", spot.path / "made"),
    "unlink": lambda spot: os.unlink(spot.path / "victim"),
    "rmdir": lambda spot: os.rmdir(spot.path / "empty"),
    "rename": lambda spot: os.rename(spot.path / "victim", spot.path / "moved"),
    "read": _read,
    "write": lambda spot: os.pwrite(spot.fd, DATA[:PAGE], 0),
    "fsync": lambda spot: os.fsync(spot.fd),
    "flush": lambda spot: os.close(os.dup(spot.fd)),
    "release": _close,
    "readdir": lambda spot: os.listdir(spot.path),
    "fsyncdir": lambda spot: os.fsync(spot.directory),
    "releasedir": _close_directory,
    "statfs": lambda spot: os.statvfs(spot.path),
    "removexattr": _remove_attribute,
    "getxattr": lambda spot: os.getxattr(spot.path / "file", "user.a"),
    "setxattr": lambda spot: os.setxattr(spot.path / "file", "user.a", b"new"),
    "listxattr": lambda spot: os.listxattr(spot.path / "file"),
    # Last, for what their ENOSYS does to the others.
    "create": _create,
    "opendir": _open_directory,
    "open": _open,
}


# Those whose calls take a descriptor.
OF_DESCRIPTORS = {
    *("getattr", "setattr", "read", "write", "fsync", "flush", "release", "fsyncdir", "releasedir")
}
# Those after which a name is there or gone.
OF_NAMES = {"mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "create"}


def tree(top: Path) -> dict[str, tuple[int, int, bytes]]:
    """What is below a directory: types and permissions, link counts, data or target."""
    found = {}
    for path in sorted(top.iterdir()):
        s = path.lstat()
        data = b""
        if stat.S_ISREG(s.st_mode):
            data = path.read_bytes()
        elif stat.S_ISLNK(s.st_mode):
            data = os.fsencode(os.readlink(path))
        found[path.name] = s.st_mode, s.st_nlink, data
    return found


class State(NamedTuple):
    """What must not grow."""

    fids: int
    opened: int
    others: int  # descriptors that are neither a node's nor of an open fid
    under_way: int


def state(mount: Mount) -> State:
    c = mount.counters()
    return State(c.fids, c.opened, c.descriptors - c.node_descriptors - c.opened, c.under_way)


def state_at_rest(mount: Mount) -> State:
    """The state once all that was deferred is done, for which it is the same for a while."""
    found, since = state(mount), time.monotonic()
    while time.monotonic() < since + 0.2:
        now = state(mount)
        if now != found:
            found, since = now, time.monotonic()
    return found


def wait_for_state(mount: Mount, before: State, what: str) -> None:
    """Wait for no more than there was: closes are deferred, and the kernel forgets late."""

    def grown() -> dict[str, int]:
        now = state(mount)._asdict()
        return {name: n for name, n in now.items() if n > getattr(before, name)}

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not grown(), "what is deferred")
    assert not grown(), f"{what}: before it there was {before}"


# Errors


def attempt(source: FaultSource, spot: Spot, operation: str, code: int) -> tuple[int, int]:
    """Make a call while the source fails; how often the fault was met, and the errno."""
    with spot.ready(operation):
        source.arm(operation, code)
        failed = errno_of(CALLS[operation], spot)
        if operation in ENDS:  # for which nobody waits
            wait_until(lambda: source.tell({}), f"{operation} at the source")
        met = source.clear()
    if not failed and operation in OF_NAMES:
        spot.restore()
    return met, failed


def afterwards(spot: Spot, operation: str) -> int:
    """The errno of the same call, without a fault; what it did is undone."""
    with spot.ready(operation):
        code = errno_of(CALLS[operation], spot)
    if operation in OF_NAMES:
        spot.restore()
    return code


_numbers = itertools.count(1)


def beside(mount: Mount, source: FaultSource) -> tuple[Spot, Spot]:
    """Two directories with the same in them, one to be used through the mount, one without."""
    through, direct = (Spot(top / f"spot{next(_numbers)}") for top in (mount.path, source.path))
    for spot in (through, direct):
        spot.make()
    return through, direct


def state_before(mount: Mount, spot: Spot) -> State:
    """The state once all calls were made without a fault."""
    for operation in CALLS:
        assert afterwards(spot, operation) == 0, operation
    return state_at_rest(mount)


def check_nothing_is_lost(spot: Spot, mount: Mount, source: FaultSource) -> None:
    """What was acknowledged is there, and the mount and its source agree."""
    assert (spot.path / "kept").read_bytes() == DATA
    same = source.path / spot.path.relative_to(mount.path)
    assert tree(spot.path) == tree(same)


@pytest.mark.parametrize("server", servers())
def test_errors_of_the_source_reach_the_caller_of_the_mount(
    source: FaultSource, mounts: Callable[..., Mount], server: str
) -> None:
    mount = mounts(*options_of(server), "-o", "cache=none")
    through, direct = beside(mount, source)
    before = state_before(mount, through)
    tried: Counter[str] = Counter()
    for operation in CALLS:
        for code in CODES:
            if code == errno.ENOSYS:
                continue
            what = f"{operation}, {errno.errorcode[code]}"
            met, failed = attempt(source, through, operation, code)
            assert met, what
            if SOAK or code == errno.EDQUOT:
                assert attempt(source, direct, operation, code)[1] == failed, what
            # The end of a file or directory is told to nobody.
            assert failed == (0 if operation in ENDS else code), what
            if SOAK or code == errno.ENOSPC:
                assert afterwards(through, operation) == 0, what
            tried[operation] += met
        wait_for_state(mount, before, operation)
    check_nothing_is_lost(through, mount, source)
    print(f"{server}: faults met, with each of {len(CODES) - 1} errnos: {dict(tried)}")


@pytest.mark.parametrize("server", servers())
def test_an_operation_that_the_source_does_not_have(
    own_source: FaultSource, new_mount: Callable[..., Mount], server: str
) -> None:
    """ENOSYS: the mount says EOPNOTSUPP where the source says ENOSYS, or what its kernel says."""
    source = own_source
    mount = new_mount(*options_of(server), "-o", "cache=none", source=source.path)
    through, direct = beside(mount, source)
    before = state_before(mount, through)
    remembered = set()
    for operation in CALLS:
        met, failed = attempt(source, through, operation, errno.ENOSYS)
        assert met, operation
        met, expected = attempt(source, direct, operation, errno.ENOSYS)
        if not met:
            remembered.add(operation)
        assert failed == shown(expected), operation
        if operation not in ("opendir", "open"):  # nothing else is of use after these
            assert afterwards(through, operation) == afterwards(direct, operation), operation
            wait_for_state(mount, before, operation)
        if operation == "create":  # the last after which anything can be listed
            check_nothing_is_lost(through, mount, source)
    assert remembered == REMEMBERED


@pytest.mark.limit(200)
@pytest.mark.parametrize("server", servers())
def test_an_error_of_any_step_of_a_request_leaves_nothing_behind(
    source: FaultSource, mounts: Callable[..., Mount], server: str
) -> None:
    """Each call is made with its first step at the source failing, with its second, and so on."""
    mount = mounts(*options_of(server), "-o", "cache=none")
    spot, _ = beside(mount, source)
    before = state_before(mount, spot)
    steps: dict[str, int] = {}
    for operation in CALLS if SOAK else ("mkdir", "readdir", "create"):
        for code in CODES[:-1] if SOAK else [errno.EIO]:
            for skip in range(100):
                with spot.ready(operation):
                    source.arm("*", code, skip=skip, times=1)
                    failed = errno_of(CALLS[operation], spot)
                    met = source.clear()
                assert failed in (0, code), (operation, skip)
                if operation in OF_NAMES:
                    spot.restore()
                if not met:
                    assert not failed, (operation, skip)
                    steps[operation] = skip
                    break
            else:
                pytest.fail(f"{operation} has no end")
        wait_for_state(mount, before, operation)
        if operation in OF_NAMES:
            check_nothing_is_lost(spot, mount, source)
    check_nothing_is_lost(spot, mount, source)
    print(f"{server}: steps that failed one by one: {steps}")


# Short answers

SHORT = (1000, PAGE, PAGE + 1)  # bytes, of BLOCK
BLOCK = DATA[: 3 * PAGE]


@pytest.mark.parametrize("server", servers())
def test_short_reads_of_the_source(
    source: FaultSource, mounts: Callable[..., Mount], server: str
) -> None:
    """The mount reads on, as programs do: its kernel takes a short read for the end."""
    through = mounts(*options_of(server)).path / f"read by {server}"
    beside = source.path / through.name
    through.write_bytes(DATA)
    for direct in (True, False):
        source.tell({"direct": direct})
        for size in SHORT:
            source.arm("read", short=size)
            expected, found = beside.read_bytes(), through.read_bytes()
            assert source.clear() > (4 if direct else 1)
            # In the cache of the source's kernel a short read is an end, and a hole after it.
            assert found == (DATA if direct else expected), size
            assert expected == DATA or not direct
            assert through.read_bytes() == beside.read_bytes() == DATA, size


@pytest.mark.parametrize("server", servers())
def test_short_writes_of_the_source(
    source: FaultSource, mounts: Callable[..., Mount], server: str
) -> None:
    """The mount writes the rest; if that is refused it is a short count, and then the error.

    (Not of an open with O_RDWR: see docs/conformance.md.)
    """
    mount = mounts(*options_of(server))
    for number, (direct, flags) in enumerate(
        (direct, flags) for direct in (True, False) for flags in (0, os.O_SYNC, os.O_APPEND)
    ):
        source.tell({"direct": direct})
        name, other = f"{server}{number}", f"beside {server}{number}"
        fd = os.open(mount.path / name, os.O_CREAT | os.O_WRONLY | flags)
        # Not to append: at an odd place the kernel makes two writes of one.
        beside = os.open(source.path / other, os.O_CREAT | os.O_WRONLY | flags & os.O_SYNC)
        try:
            for size in SHORT:
                at = os.fstat(fd).st_size
                source.arm("write", short=size)
                assert os.pwrite(beside, BLOCK, at) == size
                assert os.pwrite(fd, BLOCK, at) == len(BLOCK)
                assert source.clear() > 3
                at += len(BLOCK)
                source.arm("write", short=size, times=1)
                source.arm("write", errno.EDQUOT)
                assert os.pwrite(fd, BLOCK, at) == size
                assert errno_of(os.pwrite, fd, BLOCK, at + size) == errno.EDQUOT
                source.clear()
                assert os.fstat(fd).st_size == at + size
                assert (mount.path / name).read_bytes()[at:] == BLOCK[:size]
                assert os.pwrite(fd, BLOCK[size:], at + size) == len(BLOCK) - size
        finally:
            os.close(fd)
            os.close(beside)
        assert (mount.path / name).read_bytes() == 2 * len(SHORT) * BLOCK
        assert (source.path / name).read_bytes() == 2 * len(SHORT) * BLOCK


# What is written back later


def write_back(path: Path, source: FaultSource, code: int) -> list[int]:
    """Have writing back mapped pages fail: what those are told who sync, first and again."""
    path.write_bytes(bytes(2 * PAGE))
    results = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "r+b", buffering=0)) for _ in range(3)]
        mapped = stack.enter_context(mmap.mmap(files[0].fileno(), 2 * PAGE))
        mapped[:4] = b"lost"
        source.arm("write", code)
        results.append(errno_of(mapped.flush))
        assert source.clear()
        for _ in range(2):
            results += [errno_of(os.fsync, file.fileno()) for file in files]
        mapped[PAGE : PAGE + 4] = b"kept"
        results.append(errno_of(mapped.flush))
        results += [errno_of(os.fsync, file.fileno()) for file in files]
    assert path.read_bytes()[PAGE : PAGE + 4] == b"kept"
    return results


@pytest.mark.parametrize("server", servers())
def test_an_error_of_writing_back_is_told_to_each_open_descriptor_once(
    source: FaultSource, mounts: Callable[..., Mount], server: str
) -> None:
    mount = mounts(*options_of(server))
    for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        expected = write_back(source.path / f"beside {server}", source, code)
        # The first descriptor was told by msync; the two others are by their first fsync.
        assert expected == [code, 0, code, code, *[0] * 7], expected
        assert write_back(mount.path / server, source, code) == expected
        assert (mount.path / server).read_bytes() == (source.path / server).read_bytes()


# The source's server is gone


@pytest.mark.parametrize("server", servers())
def test_a_source_whose_server_has_died(
    own_source: FaultSource, new_mount: Callable[..., Mount], server: str
) -> None:
    """Each call fails as it does on the source; the daemon lives, and unmounts cleanly."""
    source = own_source
    mount = new_mount(*options_of(server), "-o", "cache=none", source=source.path)
    through, direct = beside(mount, source)
    with contextlib.ExitStack() as stack:
        for spot in (through, direct):
            spot.open()
            stack.callback(spot.close)
        source.mount.process.kill()
        source.mount.process.wait()
        for operation, call in CALLS.items():
            if operation in ENDS:
                continue
            expected = errno_of(call, direct)
            assert expected in (errno.ENOTCONN, errno.ECONNABORTED), operation
            assert errno_of(call, through) == expected, operation
    wait_until(lambda: not state(mount).opened, "the end of all handles")
    mount.end()
