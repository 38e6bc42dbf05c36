"""Any sequence of operations, on any fids and names: a result or an OSError, and no leak."""

from __future__ import annotations

import errno
import inspect
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from mounting import SOAK
from ops_helpers import ROOT, UNKNOWN_NODEID, Client, bound_callbacks, client_of, fails, no_leaks

from ninefuse import ops
from ninefuse.fuse import callbacks
from ninefuse.fuse.entries import fitted
from ninefuse.linux import ioctls
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import SetTime
from ninefuse.ops import Changes, LockRange
from ninefuse.tree.kernel import FIRST_HANDLE

pytestmark = pytest.mark.soak

ME = Caller(os.geteuid(), os.getegid())

TIMES = 16 if SOAK else 1  # as many sequences

# Few, so that they meet; ones that are no names, seldom.
GOOD_NAMES = [b"a", b"b", b"c", b"\xff"]
BAD_NAMES = [b".", b"..", b"", b"a/b", b"a\0", b"x" * 255, b"x" * 256]
ATTRIBUTES = [*[b"user.a", b"user.b"] * 3, b"", b"bad", b"user.\0", b"user." + b"x" * 300]


class Live(int):
    """Stands for one of the fids that there are when the step is made."""


KERNEL = object()  # stands for what gives a file its nodeid
SOURCE = object()  # stands for the path of the source, the only one that may be attached


def resolved(client: Client, argument: Any) -> Any:
    """The argument of a step, with what it stands for in the place of a `Live` or SOURCE."""
    if argument is KERNEL:
        return client.session.kernel.intern
    if argument is SOURCE:
        return str(client.source)
    if isinstance(argument, Live):
        there = sorted(client.session.fids._fids)
        return there[argument % len(there)]
    if isinstance(argument, list):
        return [(resolved(client, a), n) if isinstance(a, Live) else (a, n) for a, n in argument]
    return argument


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nine times out of ten a good one."""
    return st.integers(0, 9).flatmap(lambda n: bad if n == 9 else good)


handles = st.integers(FIRST_HANDLE, FIRST_HANDLE + 40)
fids = mostly(st.builds(Live, st.integers(0, 30)), st.one_of(st.just(UNKNOWN_NODEID), handles))
names = mostly(st.sampled_from(GOOD_NAMES), st.sampled_from(BAD_NAMES))
path = st.lists(names, min_size=1, max_size=3).map(tuple)
attributes = st.sampled_from(ATTRIBUTES)
open_flags = st.builds(
    int.__or__,
    st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR]),
    st.sampled_from(
        [0, 0, os.O_TRUNC, os.O_APPEND, os.O_EXCL, os.O_DIRECTORY, os.O_CREAT, 1 << 31]
    ),
)
modes = mostly(st.sampled_from([0o644, 0o755, 0o7777]), st.sampled_from([0, 0xFFFF_FFFF]))
kinds = st.sampled_from([0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR, stat.S_IFLNK])
offsets = mostly(
    st.sampled_from([0, 0, 1, 5, 70]),
    st.sampled_from([-1, 1 << 20, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
)
places = mostly(st.integers(0, 70), st.sampled_from([-1, 1 << 63, (1 << 64) - 1]))
counts = st.sampled_from([0, 10, 60, 5000])
data = st.binary(max_size=40)
ids = st.sampled_from([None, os.geteuid()])
times = st.one_of(
    st.none(),
    st.sampled_from(SetTime),
    st.integers(-(10**19), 10**19),
    st.sampled_from([1 << 100, -(1 << 100)]),
)
changes = st.builds(Changes, st.one_of(st.none(), modes), ids, ids, st.one_of(st.none(), places),
                    times, times, st.booleans())  # fmt: skip
ranges = st.builds(LockRange, st.sampled_from([0, 1, 2, 255]), offsets, offsets, st.just(7))
owners = st.sampled_from([5, 6, 7])

allocations = st.sampled_from([0, 1, 2, 3, 8, 16, 17, 32, 1 << 31, -1])
commands = st.sampled_from([*ioctls.ALLOWED, 0x5401, (1 << 32) - 1])

Step = tuple[Callable[..., Any], tuple[Any, ...]]

drawn: set[Callable[..., Any]] = set()  # the operations that steps are of


def step(operation: Callable[..., Any], *arguments: st.SearchStrategy[Any]) -> Any:
    """An operation and arguments for it."""
    drawn.add(operation)
    return st.tuples(st.just(operation), st.tuples(*arguments))


def any_of(steps: list[Any]) -> st.SearchStrategy[Any]:
    """One of the steps, each as often as it stands there (st.one_of would take each for once)."""
    return st.integers(0, len(steps) - 1).flatmap(steps.__getitem__)


# What makes fids comes often, and what ends all of them seldom.
MESSAGES = [
    *3 * [step(ops.walk, fids, handles, path)],
    *2 * [step(ops.walk, fids, handles)],
    *2 * [step(ops.walk, fids, st.just(KERNEL), path)],
    step(ops.walk, fids, fids, path),
    step(ops.walk, fids, fids),
    step(ops.walk, fids, handles, st.just((b"a",) * 17)),
    step(ops.walkgetattr, fids, st.one_of(st.just(KERNEL), handles, fids), names),
    step(ops.clunk, fids),
    step(ops.remove, fids),
    step(ops.getattr, fids),
    step(ops.setattr, fids, changes),
    step(ops.readlink, fids),
    step(ops.statfs, fids),
    *3 * [step(ops.lopen, fids, open_flags)],
    *2 * [step(ops.lcreate, fids, names, open_flags, modes)],
    *2 * [step(ops.read, fids, offsets, counts)],
    *3 * [step(ops.write, fids, places, data)],
    step(ops.fsync, fids, st.booleans()),
    *2 * [step(ops.lock, fids, mostly(st.integers(0, 3), st.just(8)), ranges)],
    *2 * [step(ops.lock, fids, st.just(0), ranges, owners)],
    step(ops.getlock, fids, ranges),
    step(ops.getlock, fids, ranges, owners),
    *2 * [step(ops.readdir, fids, offsets, counts)],
    step(ops.mkdir, fids, names, modes),
    step(ops.mknod, fids, names, st.builds(int.__or__, kinds, modes)),
    step(ops.symlink, fids, names, st.sampled_from([b"a", b"..", b"/", b"", b"\0", b"x" * 5000])),
    *2 * [step(ops.link, fids, fids, names)],
    *2 * [step(ops.rename, fids, fids, names)],
    *2 * [step(ops.renameat, fids, names, fids, names, st.sampled_from([0, 0, 1, 2, 3, 4]))],
    # One that succeeds as a rule: by chance hardly any does.
    step(ops.renameat, st.just(ROOT), st.just(b"b"), st.just(ROOT), names, st.just(0)),
    *2 * [step(ops.unlinkat, fids, names, st.sampled_from([0, 0, 0x200, 1]))],
    *2 * [step(ops.xattrwalk, fids, handles, attributes)],
    step(ops.xattrwalk, fids, handles, st.just(b"")),
    *2 * [step(ops.xattrcreate, fids, attributes, st.sampled_from([0, 3, 70000, -1]),
               st.integers(0, 4))],
    mostly(
        step(ops.statfs, fids),
        step(ops.version, st.sampled_from([4096, 1 << 40, 0, -1]),
             st.sampled_from(["9P2000.L", "9P2000", ""])),
    ),
    step(ops.attach, mostly(handles, fids),
         mostly(st.just(SOURCE), st.sampled_from(["/nowhere", "/dev/null", "", -1, 1 << 20]))),
]  # fmt: skip
CALLBACKS = [
    *2 * [step(callbacks.lookup, fids, names)],
    step(callbacks.getattr, fids),
    step(callbacks.readlink, fids),
    step(callbacks.statfs, fids),
    step(callbacks.syncfs, fids),
    step(callbacks.tmpfile, fids, open_flags, modes, st.just(ME)),
    step(callbacks.fallocate, fids, allocations, places, places),
    step(callbacks.lseek, fids, offsets, st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE, 0, 9])),
    *2 * [step(callbacks.copy_file_range, fids, offsets, fids, places, places)],
    step(
        callbacks.ioctl,
        fids,
        commands,
        st.sampled_from([b"", bytes(8), bytes(28)]),
        st.sampled_from([0, 8, 300]),
    ),
    step(callbacks.read, fids, offsets, counts),
    step(callbacks.fsync, fids, st.booleans()),
    step(callbacks.fsyncdir, fids, st.booleans()),
    step(callbacks.release, fids),
    # Not one that waits: nobody would give anything back.
    *2 * [step(callbacks.setlk, fids, owners, ranges, st.just(False))],
    step(callbacks.getlk, fids, ranges, owners),
    *2 * [step(callbacks.flock, fids, st.sampled_from([1, 2, 8, 4]), st.just(False))],
    step(callbacks.releasedir, fids),
    step(callbacks.mkdir, fids, names, modes, st.just(ME)),
    step(callbacks.mknod, fids, names, modes, st.just(0), st.just(ME)),
    step(callbacks.symlink, fids, names, st.just(b"a"), st.just(ME)),
    step(callbacks.link, fids, fids, names),
    step(callbacks.unlink, fids, names),
    step(callbacks.rmdir, fids, names),
    step(callbacks.rename, fids, names, fids, names, st.sampled_from([0, 0, 1, 2, 3, 4])),
    *2 * [step(callbacks.create, fids, names, open_flags, modes, st.just(ME))],
    *2 * [step(callbacks.open, fids, open_flags)],
    step(callbacks.opendir, fids),
    *2 * [step(callbacks.readdirplus, fids, offsets)],
    step(callbacks.readdir, fids, offsets, counts),
    step(callbacks.flush, fids),
    *2 * [step(callbacks.flush, fids, owners)],
    step(callbacks.write, fids, places, data),
    step(callbacks.setattr, fids, st.one_of(st.none(), fids), changes),
    step(callbacks.getxattr, fids, attributes),
    step(callbacks.setxattr, fids, attributes, data),
    step(callbacks.listxattr, fids),
    step(callbacks.removexattr, fids, attributes),
    step(callbacks.forget, st.lists(st.tuples(fids, st.integers(0, 3)), max_size=3)),
]


class Run:
    """A client that makes any step and looks at what comes of it."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def make(self, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """A result or an OSError with a usual errno; afterwards nothing is in use."""
        session = self.client.session
        arguments = tuple(resolved(self.client, argument) for argument in arguments)
        note(f"{operation.__name__}{arguments!r}")
        try:
            result = self.client.do(operation, *arguments)
        except OSError as failure:
            note(f"    {failure!r}")
            assert failure.errno in errno.errorcode  # noqa: PT017
            result = None
        if operation is callbacks.readdirplus and result:
            fitted(session, arguments[0], result, len(result) // 2)
        self.client.check_idle()
        if ROOT not in session.fids._fids:
            self.client.do(ops.attach, ROOT, str(self.client.source))


@contextmanager
def run(tmp_path_factory: pytest.TempPathFactory, **options: Any) -> Iterator[Run]:
    """A run in a new directory, with a file, a directory and a symlink in it."""
    source: Path = tmp_path_factory.mktemp("random")
    (source / "a").mkdir()
    (source / "a" / "a").write_bytes(b"data")
    (source / "b").write_bytes(b"data")
    (source / "c").symlink_to("a")
    with no_leaks(), client_of(source, **options) as client:
        mode = os.O_RDONLY if options.get("read_only") else os.O_RDWR
        client.walk("c")
        for path in (["b"], ["a", "a"]):
            client.open(*path, flags=mode)
            client.open(*path[:-1])
            client.know(*path)
            client.walk(*path)
        yield Run(client)
        # Whatever modes it has been given, the directory can be removed.
        source.chmod(0o700)


@settings(max_examples=250 * TIMES, derandomize=True, database=None, deadline=None)
@given(steps=st.lists(any_of(MESSAGES), min_size=5, max_size=40))
def test_any_messages(tmp_path_factory: pytest.TempPathFactory, steps: list[Step]) -> None:
    """9P messages, in any order, also ones that no client would send."""
    with run(tmp_path_factory) as it:
        for operation, arguments in steps:
            it.make(operation, arguments)


@settings(max_examples=200 * TIMES, derandomize=True, database=None, deadline=None)
@given(steps=st.lists(any_of(MESSAGES + CALLBACKS), min_size=5, max_size=40))
def test_any_messages_and_callbacks_with_few_descriptors(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    """Callbacks among them; descriptors are reclaimed all the time."""
    with run(tmp_path_factory, most_descriptors=2, sync_directories=True) as it:
        for operation, arguments in steps:
            it.make(operation, arguments)


@settings(max_examples=60 * TIMES, derandomize=True, database=None, deadline=None)
@given(steps=st.lists(any_of(MESSAGES + CALLBACKS), min_size=5, max_size=40))
def test_any_messages_on_a_read_only_session(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    """Nothing changes in the source."""
    with run(tmp_path_factory, read_only=True) as it:
        source = it.client.source
        before = {path: path.lstat() for path in (source, *sorted(source.rglob("*")))}
        for operation, arguments in steps:
            it.make(operation, arguments)
        after = {path: path.lstat() for path in (source, *sorted(source.rglob("*")))}
        unchanging = slice(0, 7)  # not the time of the last access
        assert {path: found[unchanging] for path, found in before.items()} == {
            path: found[unchanging] for path, found in after.items()
        }
        assert all(after[path].st_mtime_ns == found.st_mtime_ns for path, found in before.items())
        assert all(after[path].st_ctime_ns == found.st_ctime_ns for path, found in before.items())


# What is not left to luck: each operation succeeds, and fails

NEW = FIRST_HANDLE + 1000


def certain(client: Client, name: str) -> tuple[Any, ...]:
    """Arguments with which an operation succeeds, on the files that a run begins with."""
    rights: dict[str, Callable[[], tuple[Any, ...]]] = {
        "attach": lambda: (NEW, str(client.source)),
        "clunk": lambda: (client.walk("b"),),
        "fsync": lambda: (client.open("b", flags=os.O_RDWR), True),
        "getattr": lambda: (client.walk("b"),),
        "getlock": lambda: (client.open("b", flags=os.O_RDWR), LockRange(1, 0, 0)),
        "lcreate": lambda: (client.walk(), b"new", os.O_RDWR, 0o644),
        "link": lambda: (ROOT, client.walk("b"), b"new"),
        "lock": lambda: (client.open("b", flags=os.O_RDWR), 0, LockRange(1, 0, 0)),
        "lopen": lambda: (client.walk("b"), os.O_RDONLY),
        "mkdir": lambda: (ROOT, b"new", 0o755),
        "mknod": lambda: (ROOT, b"new", stat.S_IFIFO | 0o644),
        "read": lambda: (client.open("b"), 0, 10),
        "readdir": lambda: (client.open(), 0, 5000),
        "readdirplus": lambda: (client.open(), 0),
        "readlink": lambda: (client.walk("c"),),
        "remove": lambda: (client.walk("b"),),
        "rename": lambda: (client.walk("b"), ROOT, b"new"),
        "renameat": lambda: (ROOT, b"b", ROOT, b"new"),
        "setattr": lambda: (client.walk("b"), Changes(mode=0o600)),
        "statfs": lambda: (ROOT,),
        "symlink": lambda: (ROOT, b"new", b"a"),
        "unlinkat": lambda: (ROOT, b"b"),
        "version": lambda: (1 << 20, "9P2000.L"),
        "walk": lambda: (ROOT, NEW, [b"a", b"a"]),
        "walkgetattr": lambda: (ROOT, NEW, b"b"),
        "write": lambda: (client.open("b", flags=os.O_RDWR), 0, b"new"),
        "xattrcreate": lambda: (client.walk("b"), b"user.new", 3),
        "xattrwalk": lambda: (client.walk("b"), NEW, b""),
    }
    assert name in rights, f"say here how {name} succeeds"
    return rights[name]()


def failing(name: str, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
    """Arguments with which an operation fails, and how: most have no such fid."""
    if name == "version":
        return (0, "9P2000.L"), errno.EMSGSIZE
    if name == "attach":
        return (NEW, "/nowhere"), errno.ENOENT
    return (UNKNOWN_NODEID, *arguments[1:]), errno.ESTALE


OPERATIONS = sorted(
    {name for name in ops.__all__ if inspect.iscoroutinefunction(getattr(ops, name))}
    - {"stat"}  # getattr's other name
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_succeeds_and_fails(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    operation = getattr(ops, name)
    with run(tmp_path_factory) as made:
        arguments = certain(made.client, name)
        wrong, code = failing(name, arguments)
        with fails(code):
            made.client.do(operation, *wrong)
        made.client.do(operation, *arguments)
        if name == "version":  # it ends all fids
            made.client.do(ops.attach, ROOT, str(made.client.source))


def test_every_operation_is_among_them() -> None:
    sequences = {getattr(callbacks, name) for name in bound_callbacks()}
    operations = {
        getattr(ops, name)
        for name in ops.__all__
        if inspect.iscoroutinefunction(getattr(ops, name))
    }
    assert operations | sequences <= drawn
