"""The order of locks, asserted while a test or a daemon runs: a tool of the tests alone.

Inside `watching` all that ninefuse's modules make a lock with makes one that knows its rank,
its owner and who waits for it, and the two read-write locks do the same: threads own and
await the mutexes and the fid table's lock, requests the rename lock. It is a violation

* to take a lock while one of the same rank, or of a rank further in, is held;
* to take the rename lock with any lock held, or twice for one request;
* to ask for a call with any lock held, or to await with any held but the rename lock;
* to make a system call with the fid table's lock held, or with one further in.

Each is kept, and an AssertionError at once where a body or a call can raise it: `watching` fails
at its end, a daemon says so in its log. A lock that `RANKS` does not know cannot be made: who
adds one decides where it belongs (docs/architecture.md). Locks made before are not watched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any
from unittest import mock

import ninefuse
from ninefuse import executor, locks
from ninefuse.linux import filesystems, records, syscalls
from ninefuse.locks import RenameLock
from ninefuse.tree import session
from ninefuse.watching import report

log = logging.getLogger("ninefuse.locks")

# Outermost first: whoever holds a lock may take those of greater numbers only.
RENAME, LISTING, TABLE, COUNTS, INNERMOST = range(5)
RANK_NAMES = ("rename lock", "listing", "fid table", "counts", "innermost")

# The mutexes, by the module and the class that make them.
RANKS = {
    ("ninefuse.tree.listing", "Listing"): LISTING,
    ("ninefuse.linux.mountinfo", "MountsBelow"): LISTING,  # held while the mount table is read
    ("ninefuse.tree.places", "Mounts"): LISTING,  # likewise
    ("ninefuse.process.threads", "ThreadOnDemand"): INNERMOST,
    ("ninefuse.fuse.backing", "Backings"): INNERMOST,
    ("ninefuse.tree.counts", "Counts"): COUNTS,
    ("ninefuse.locks", "RWLock"): INNERMOST,  # the state of a read-write lock
    ("ninefuse.driving.driver", "Executor"): INNERMOST,  # the registry of requests
    ("ninefuse.driving.clock", "Clock"): INNERMOST,
    ("ninefuse.driving.deferred", "Deferred"): INNERMOST,
    ("ninefuse.driving.workers", "WorkerPool"): INNERMOST,
    ("ninefuse.driving.patience", "Patience"): INNERMOST,
    ("ninefuse.tree.order", "Ranges"): INNERMOST,
    ("ninefuse.tree.filelocks", "FileLocks"): INNERMOST,
    ("ninefuse.tree.qids", "QidPaths"): INNERMOST,
    ("ninefuse.watching.trace_file", "TraceFile"): INNERMOST,
    ("ninefuse.process.loglines", "RepeatFilter"): INNERMOST,
}
# Taken by the thread that waits and given back by the one that wakes it: no mutex.
HAND_SHAKES = {("ninefuse.locks", "_BlockingSection")}

_SYSTEM_CALLS = re.findall(
    r"\w+",
    "chmod chown close dup fchmod fchown fdatasync fstat fstatvfs fsync ftruncate getxattr link"
    " listdir listxattr lseek lstat mkdir mknod open pread preadv pwrite pwritev read readlink"
    " removexattr rename rmdir scandir setxattr stat symlink sync truncate unlink utime write",
)
_OUR_SYSTEM_CALLS = (
    *(syscalls.device_behind, syscalls.open_step, syscalls.rename),
    *(syscalls.stat_descriptor, syscalls.stat_name),
    *(filesystems.file_handle, records.read_records),
)


class Watch:
    """What is known of the locks made inside one `watching`.

    Attributes:
        violations: a line for each.
        longest: lock -> seconds, the longest that somebody waited for it.
        taken: rank -> how often a lock of it was taken.
        overtaken: how often, at most, others got the rename lock while one waited for it.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.longest: dict[str, float] = {}
        self.taken = [0] * len(RANK_NAMES)
        self.overtaken = 0
        # By thread. Each entry is changed by its own thread only.
        self._held: dict[int, list[tuple[int, str, str]]] = {}
        self._awaited: dict[int, tuple[str, float]] = {}
        self._running: dict[int, executor.Request] = {}
        self._owners: dict[RenameLock, dict[executor.Request, str]] = {}  # and the mode

    # Rules

    def may_take(self, rank: int, name: str) -> None:
        """The calling thread is about to take a lock."""
        for held, other, _ in self._held.get(get_ident(), ()):
            if held >= rank:
                self.refuse(f"{name} is taken inside {other}")

    def is_free(self, what: str) -> None:
        """The calling thread does something that it may do without locks only."""
        if held := self._held.get(get_ident()):
            self.refuse(f"{what} inside {held[-1][1]}", raising=False)

    def may_call(self, name: str) -> None:
        """The calling thread is about to make a system call."""
        for rank, other, _ in self._held.get(get_ident(), ()):
            if rank >= TABLE:
                self.refuse(f"{name} is called inside {other}")

    def may_wait(self, request: executor.Request) -> None:
        """A request is about to have a call made, which may be stuck for ever."""
        for lock, owners in self._owners.items():
            if request in owners:
                text = f"{request.name} asks for a call inside the {lock.name}"
                self.refuse(text, raising=False)

    def refuse(self, text: str, *, raising: bool = True) -> None:
        """Keep a violation, and raise it."""
        text = f"lock order: {text}, on {threading.current_thread().name}"
        self.violations.append(text)
        log.error("%s", text, stack_info=True)
        if raising:
            raise AssertionError(text)

    # Bookkeeping

    def took(self, rank: int, name: str, mode: str = "") -> None:
        self.taken[rank] += 1
        self._held.setdefault(get_ident(), []).append((rank, name, mode))

    def gives_back(self, rank: int, name: str, mode: str = "") -> None:
        held = self._held[get_ident()]
        held.remove((rank, name, mode))
        if not held:
            del self._held[get_ident()]

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Around a thread's wait for a lock; it may wait for the mutex of that meanwhile."""
        since = time.monotonic()
        outer = self._awaited.get(get_ident())
        self._awaited[get_ident()] = name, since
        try:
            yield
        finally:
            if outer is None:
                del self._awaited[get_ident()]
            else:
                self._awaited[get_ident()] = outer
            self.waited(name, time.monotonic() - since)

    def waited(self, name: str, seconds: float) -> None:
        if seconds > self.longest.get(name, 0.0):
            self.longest[name] = seconds

    def describe(self) -> list[str]:
        """Owners and waiters of each lock that has any."""
        now = time.monotonic()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        owners: dict[str, list[str]] = {}
        waiters: dict[str, list[str]] = {}
        for ident, held in list(self._held.items()):
            for _, lock, mode in list(held):
                line = f"{names.get(ident, ident)} {f'({mode})' if mode else ''}".rstrip()
                owners.setdefault(lock, []).append(line)
        for ident, (lock, since) in list(self._awaited.items()):
            line = f"{names.get(ident, ident)} for {now - since:.1f} s"
            waiters.setdefault(lock, []).append(line)
        for rename, holding in list(self._owners.items()):
            for owner, mode in list(holding.items()):
                line = f"{owner.name} (request {owner.tag}, {mode})"
                owners.setdefault(rename.name, []).append(line)
            for mode, resume, since in list(rename._waiting):
                who = resume.owner if isinstance(resume, _Granted) else None
                request = "somebody" if who is None else f"{who.name} (request {who.tag}, {mode})"
                waiters.setdefault(rename.name, []).append(f"{request} for {now - since:.1f} s")
        return [
            f"{lock}: held by {', '.join(owners.get(lock, ['nobody']))};"
            f" waited for by {', '.join(waiters.get(lock, ['nobody']))}"
            for lock in sorted({*owners, *waiters})
        ]

    # The rename lock

    def take_rename_lock(self, lock: RenameLock, mode: str, resume: Callable[[], None]) -> bool:
        """`RenameLock.acquire`."""
        self.may_take(RENAME, lock.name)
        owner = self._running.get(get_ident())
        owners = self._owners.setdefault(lock, {})
        if owner is None:  # a test that drives a body itself
            return locks.RWLock.acquire(lock, mode, resume)
        if owner in owners:
            self.refuse(f"{lock.name} is taken twice by {owner.describe()}", raising=False)
        granted = _Granted(self, lock, owner, mode, resume)
        if locks.RWLock.acquire(lock, mode, granted):
            self.owns(lock, owner, mode)
            return True
        return False

    def owns(self, lock: RenameLock, owner: executor.Request, mode: str) -> None:
        self.taken[RENAME] += 1
        self._owners[lock][owner] = mode

    def give_rename_lock_back(self, lock: RenameLock, mode: str) -> None:
        """`RenameLock.release`."""
        self.is_free(f"{lock.name} is given back")
        owner = self._running.get(get_ident())
        if owner is not None and self._owners[lock].pop(owner, None) != mode:
            text = f"{lock.name} is given back by {owner.describe()}, who does not have it"
            self.refuse(text, raising=False)
        locks.RWLock.release(lock, mode)

    # What is put in the place of ninefuse's own

    def put_around(self, advance: Callable[..., Any]) -> Callable[..., Any]:
        """`Executor.advance`, which also says whose body a thread runs."""

        @functools.wraps(advance)
        def advancing(driver: Any, request: executor.Request) -> Any:
            ident, name = get_ident(), request.name
            self.is_free(f"{name} begins or goes on")
            before = self._running.get(ident)
            self._running[ident] = request
            try:
                step = advance(driver, request)
                if step is executor.Step.CALL:
                    self.may_wait(request)
                return step
            finally:
                if before is None:
                    del self._running[ident]
                else:
                    self._running[ident] = before
                self.is_free(f"{name} awaits or ends")

        return advancing

    def put_around_call(self, perform: Callable[..., Any]) -> Callable[..., Any]:
        """`Request.perform` and `perform_quickly`."""

        @functools.wraps(perform)
        def performing(request: executor.Request) -> Any:
            name = request.name
            self.is_free(f"a call of {name} begins")
            try:
                return perform(request)
            finally:
                self.is_free(f"a call of {name} ends")

        return performing

    def put_around_system_call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def calling(*args: Any, **kwargs: Any) -> Any:
            if self._held:
                self.may_call(function.__name__)
            return function(*args, **kwargs)

        return calling


class _Granted:
    """The callback of a request that waits for the rename lock."""

    __slots__ = ("_before", "_lock", "_mode", "_resume", "_since", "_watch", "owner")

    def __init__(
        self,
        watch: Watch,
        lock: RenameLock,
        owner: executor.Request,
        mode: str,
        resume: Callable[[], None],
    ) -> None:
        self._watch = watch
        self._lock = lock
        self._mode = mode
        self._resume = resume
        self._since = time.monotonic()
        self._before = watch.taken[RENAME]
        self.owner = owner

    def __call__(self) -> None:
        self._watch.is_free("a request is resumed")
        self._watch.waited(self._lock.name, time.monotonic() - self._since)
        others = self._watch.taken[RENAME] - self._before
        self._watch.overtaken = max(self._watch.overtaken, others)
        self._watch.owns(self._lock, self.owner, self._mode)
        self._resume()


class _Mutex:
    """A lock of the threading module that knows its rank."""

    def __init__(self, watch: Watch, rank: int, name: str, reentrant: bool) -> None:
        self._watch = watch
        self._rank = rank
        self._name = name
        self._lock: Any = threading.RLock() if reentrant else threading.Lock()
        self._reentrant = reentrant
        self._owner = 0
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        again = self._reentrant and self._owner == get_ident()
        if not again:
            self._watch.may_take(self._rank, self._name)
        if not self._lock.acquire(False):
            if not blocking:
                return False
            with self._watch.waiting(self._name):
                if not self._lock.acquire(True, timeout):
                    return False
        self._depth += 1
        if not again:
            self._owner = get_ident()
            self._watch.took(self._rank, self._name)
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            self._watch.gives_back(self._rank, self._name)
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class _Threading:
    """The threading module, as ninefuse's modules see it."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        if name in ("Barrier", "BoundedSemaphore", "Condition", "Semaphore"):
            self._watch.refuse(f"a {name} has no place in it")
        return getattr(threading, name)

    def Lock(self) -> Any:
        module, kind = maker = _maker(sys._getframe(1))
        if maker in HAND_SHAKES:
            return threading.Lock()
        return self._mutex(module, kind, reentrant=False)

    def RLock(self) -> Any:
        return self._mutex(*_maker(sys._getframe(1)), reentrant=True)

    def _mutex(self, module: str, kind: str, reentrant: bool) -> _Mutex:
        rank = RANKS.get((module, kind))
        if rank is None:
            self._watch.refuse(f"a lock of {module}.{kind} has no place in it")
            raise AssertionError
        name = RANK_NAMES[rank] if rank < INNERMOST else f"mutex of {kind}"
        return _Mutex(self._watch, rank, name, reentrant)


def _maker(frame: types.FrameType) -> tuple[str, str]:
    """The module and the class whose method makes a lock."""
    module = frame.f_globals["__name__"]
    maker = frame.f_locals.get("self")
    kinds = [cls.__name__ for cls in type(maker).__mro__ if cls.__module__ == module]
    known = [kind for kind in kinds if (module, kind) in RANKS.keys() | HAND_SHAKES]
    return module, (known or kinds or [frame.f_code.co_name])[0]


class _Os:
    """The os module, as ninefuse's modules see it."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name in _SYSTEM_CALLS:
            value = self._watch.put_around_system_call(value)
        # Found without this from now on; and it is the same one each time it is asked for.
        setattr(self, name, value)
        return value


def modules() -> list[types.ModuleType]:
    """All modules of the daemon."""
    elsewhere = ("ninefuse.bench", "ninefuse.__main__", "ninefuse.driving._ring")
    return [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(ninefuse.__path__, "ninefuse.")
        if not module.name.startswith(elsewhere)
    ]


def _enter_section(watch: Watch, enter: Callable[..., None]) -> Callable[..., None]:
    def entering(section: Any) -> None:
        name = section._lock.name
        watch.may_take(TABLE, name)
        with watch.waiting(name):
            enter(section)
        watch.took(TABLE, name, section._mode)

    return entering


def _exit_section(watch: Watch, leave: Callable[..., None]) -> Callable[..., None]:
    def leaving(section: Any, *exc: object) -> None:
        watch.gives_back(TABLE, section._lock.name, section._mode)
        leave(section, *exc)

    return leaving


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch the locks that are made inside; fail at the end if there was a violation."""
    watch = Watch()
    with contextlib.ExitStack() as patches:
        _put_in_place(watch, patches)
        yield watch
    assert not watch.violations, "\n".join(watch.violations)


def _put_in_place(watch: Watch, patches: contextlib.ExitStack) -> None:
    def put(target: Any, name: str, value: Any) -> None:
        patches.enter_context(mock.patch.object(target, name, value))

    replaced: dict[Any, Any] = {threading: _Threading(watch), os: _Os(watch)}
    for function in _OUR_SYSTEM_CALLS:
        replaced[function] = watch.put_around_system_call(function)
    for module in modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType | types.FunctionType) and value in replaced:
                put(module, name, replaced[value])

    section = locks._BlockingSection
    put(section, "__enter__", _enter_section(watch, section.__enter__))
    put(section, "__exit__", _exit_section(watch, section.__exit__))

    def acquire(lock: RenameLock, mode: str, resume: Callable[[], None]) -> bool:
        return watch.take_rename_lock(lock, mode, resume)

    def release(lock: RenameLock, mode: str) -> None:
        watch.give_rename_lock_back(lock, mode)

    put(RenameLock, "try_acquire", lambda lock, mode: False)  # so that `acquire` sees all
    put(RenameLock, "acquire", acquire)
    put(RenameLock, "release", release)
    put(executor.Executor, "advance", watch.put_around(executor.Executor.advance))
    for name in ("perform", "perform_quickly"):
        call = getattr(executor.Request, name)
        put(executor.Request, name, watch.put_around_call(call))


def run_daemon(most_descriptors: int = 16384) -> int:
    """The command, watched: violations are errors in its log, SIGUSR2 shows the locks too."""
    from ninefuse import serve
    from ninefuse.command import cli

    watch = Watch()
    stacks = report.stacks
    with contextlib.ExitStack() as patches:
        _put_in_place(watch, patches)

        def put(target: Any, name: str, value: Any) -> None:
            patches.enter_context(mock.patch.object(target, name, value))

        put(report, "stacks", lambda driver: [*watch.describe(), *stacks(driver)])
        few = functools.partial(session.Session, most_descriptors=most_descriptors)
        put(serve, "Session", few)
        code = cli.main()
    waits = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in sorted(watch.longest.items()))
    taken = ", ".join(f"{n} {name}" for name, n in zip(RANK_NAMES, watch.taken, strict=True))
    log.info("locks taken: %s; longest waits: %s", taken, waits or "none")
    return 1 if watch.violations else code
