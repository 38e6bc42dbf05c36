"""The fixtures of real mounts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import (
    NINEFUSE,
    SESSION,
    SOAK,
    TEST_LIMIT,
    Mount,
    Place,
    Watchdog,
    control_file_system,
    detach,
    fresh_place,
)

from ninefuse.settings import MODELS

_END_LIMIT = 120.0  # seconds from the last test to the end of the process


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "limit(seconds): how long the watchdog gives a test",
        "mount: needs a mount; by itself on all tests that use the watchdog or another's namespace",
        "alone: measures what others wait for: nothing else may run beside it",
        "soak: has a long form, which `make soak` runs (mounting.SOAK is true then)",
    ):
        config.addinivalue_line("markers", line)
    # A shell that starts a run in the background has it ignore these, and what the tests start
    # would inherit that. A handler is not inherited by programs, and does as little.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a mount; `make test-fast` runs the rest."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "watchdog" in fixtures or item.path.name.startswith("test_mount_"):
            item.add_marker(pytest.mark.mount)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """See that the process ends, though a thread of a test that failed may never do."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.option.markexpr:
        session.exitstatus = pytest.ExitCode.OK  # all that was asked for is in another lane
    last = threading.Timer(_END_LIMIT, os._exit, (exitstatus or 1,))
    last.daemon = True
    last.start()


@pytest.fixture(scope="session")
def watchdog() -> Iterator[Watchdog]:
    """The process that ends mounts which hang."""
    assert os.access("/dev/fuse", os.R_OK | os.W_OK), "these tests need /dev/fuse"
    control = control_file_system()
    dog = Watchdog(control)
    yield dog
    dog.close()
    if control is not None:
        os.close(control)


@pytest.fixture
def guard(watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[Watchdog]:
    """The watchdog, awake for one test."""
    marker = request.node.get_closest_marker("limit")
    seconds = TEST_LIMIT if marker is None else marker.args[0]
    watchdog.arm(seconds)
    yield watchdog
    assert watchdog.disarm(), f"not over within {seconds:g} s: its mounts were aborted"


@pytest.fixture
def new_place(
    shared_mounts: Callable[..., Mount], guard: Watchdog
) -> Iterator[Callable[..., Place]]:
    """Return fresh directories on shared mounts: new_place(*options, command=…)."""
    with contextlib.ExitStack() as ends:

        def make(*options: str, command: tuple[str, ...] = NINEFUSE) -> Place:
            mount = shared_mounts(*options, command=command)
            return ends.enter_context(fresh_place(mount))

        yield make


@pytest.fixture(scope="session")
def shared_mounts(
    watchdog: Watchdog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Mount]]:
    """Return the mount of a command with certain options.

    Tests share it, each in a directory of its own (`fresh_place`).
    """
    mounts: dict[tuple[tuple[str, ...], tuple[str, ...]], Mount] = {}

    def shared(*options: str, command: tuple[str, ...] = NINEFUSE) -> Mount:
        mount = mounts.get((command, options))
        if mount is not None and mount.process.poll() is not None:
            mount.end()  # a test's fault, which that test was told
            mount = None
        if mount is None:
            base = tmp_path_factory.mktemp("shared")
            mount = mounts[command, options] = start(watchdog, base, *options, command=command)
        return mount

    with contextlib.ExitStack() as ends:
        yield shared
        for mount in mounts.values():
            ends.callback(mount.log.check)
            ends.callback(mount.end)


# What the kernel makes of a model's answers is the same under each: by default one is enough.
@pytest.fixture(params=MODELS if SOAK else ["second"])
def place(
    request: pytest.FixtureRequest, shared_mounts: Callable[..., Mount], guard: Watchdog
) -> Iterator[Place]:
    """A fresh directory on a mount; in a long run, under each of the threading models."""
    with fresh_place(shared_mounts("--model", request.param)) as place:
        yield place


@pytest.fixture
def new_mount(guard: Watchdog, tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """Mount with options of one's own: new_mount(*options, source=None, before=())."""
    mounts: list[Mount] = []

    def make(
        *options: str, source: Path | None = None, command: tuple[str, ...] = NINEFUSE
    ) -> Mount:
        base = tmp_path / f"mount{len(mounts)}"
        base.mkdir()
        mount = start(guard, base, *options, source=source, command=command)
        mounts.append(mount)
        return mount

    yield make
    with contextlib.ExitStack() as ends:
        for mount in mounts:
            ends.callback(mount.log.check)
            ends.callback(mount.end)


def start(
    watchdog: Watchdog,
    base: Path,
    *options: str,
    source: Path | None = None,
    command: tuple[str, ...] = NINEFUSE,
) -> Mount:
    """Start a daemon in the foreground on directories below base, and wait for its mount.

    The environment's NINEFUSE_ENGINE is the engine of those that do not ask for one, its
    NINEFUSE_SESSION the session, and its NINEFUSE_DATA who reads and writes files.
    """
    if (engine := os.environ.get("NINEFUSE_ENGINE")) and "--engine" not in options:
        options = ("--engine", engine, *options)
    if "--session" not in options:
        options = ("--session", SESSION, *options)
    if (data := os.environ.get("NINEFUSE_DATA")) and not any("data=" in one for one in options):
        options = ("-o", f"data={data}", *options)
    source = source or base / "source"
    path = base / "mount"
    source.mkdir(exist_ok=True)
    path.mkdir()
    return Mount(
        watchdog,
        source,
        path,
        base / "log",
        [*command, "-f", *options, str(source), str(path)],
        r"mounted on .*\n",
    )


@pytest.fixture
def mountpoint(guard: Watchdog, tmp_path: Path) -> Iterator[Path]:
    """A directory to mount on, with nothing on it afterwards."""
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    detach(path)
