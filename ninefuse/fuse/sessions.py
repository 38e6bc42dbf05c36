"""Who speaks with the kernel: a session of our own, or pyfuse3's.

Both put what the kernel asks to the callbacks (callbacks.py) and have bodies run by the same
drivers. pyfuse3's has no callback for locks, fallocate and some others; it needs no compiler.

Locks touched: none.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ninefuse.driving.driver import Executor
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse.rootmount import MountPoint
from ninefuse.settings import Settings
from ninefuse.tree.session import Session

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a mount is.

    Attributes:
        number: of its connection; None: it was handed over, and its place is not known.
        point: the place, if root has made the mount, who is to detach it in the end.
    """

    number: int | None
    point: MountPoint | None = None


class FuseSession(Protocol):
    """The requests of one mount, and their answers.

    Attributes:
        asks_again: whether the kernel may ask for files that it has forgotten (forgotten.py).
        statistics: what says the value of the attribute that the counters are published in.
    """

    asks_again: bool
    statistics: Callable[[], bytes]

    @property
    def errors(self) -> Counter[tuple[str, int]]:
        """How many there were, by callback and errno."""

    def mount(self) -> Place:
        """Mount, and say where that is.

        Raises:
            Failure: the mount was refused.
        """

    def watch(self, tracer: Watcher) -> None:
        """Have it see when requests come and answers go. Before `run`."""

    def run(self, started: Callable[[], None]) -> None:
        """Serve until the mount is gone, or `end` was called. On the dispatcher, once.

        Args:
            started: called once the kernel has begun to talk to us.
        """

    def end(self) -> None:
        """Have `run` return, whether there is a mount or not. Any thread; does not wait."""

    def passed(self) -> int:
        """How many files the kernel reads and writes itself (-o data=kernel)."""

    def prune(self, nodeids: Sequence[int]) -> None:
        """As `notices.prune`."""

    def attributes_changed(self, nodeid: int) -> None:
        """As `notices.attributes_changed`."""

    def leave(self, *, is_mounted: bool) -> None:
        """Let go of the device after `run`, and unmount if it is for the session to do.

        Callers that still wait get an error.

        Args:
            is_mounted: whether the mount is still there.
        """

    def close(self) -> None:
        """Close what is open, when nothing is under way any more."""


class Watcher(Protocol):
    """What sees requests come and answers go (watching/tracing.py).

    Attributes:
        who: says who reads and answers: the thread, unless it is replaced.
    """

    who: Callable[[], object]

    def received(self) -> None: ...

    def replied(self) -> None: ...


def is_native(settings: Settings) -> bool:
    """Whether `create` makes the native session; where it refuses to, that is said there."""
    if settings.session == "pyfuse3":
        return False
    try:
        import ninefuse.fuse.native  # noqa: F401
    except ImportError:
        return False
    return True


def create(settings: Settings, session: Session, driver: Executor) -> FuseSession:
    """The FUSE session that the settings ask for.

    Args:
        settings: of the mount.
        session: the conversation.
        driver: that bodies are run by.

    Raises:
        Failure: the native one was asked for, or what it alone can do, and was not built.
    """
    if settings.session != "pyfuse3":
        try:
            from ninefuse.fuse.native import NativeSession
        except ImportError as e:
            if settings.session == "native" or settings.data == "kernel":
                what = "-o data=kernel" if settings.data == "kernel" else "--session native"
                text = f"{what}: it was not built, which takes a C compiler and Cython ({e})"
                raise Failure(ExitCode.USAGE, text) from None
            log.info("the native session was not built: pyfuse3's serves the mount")
        else:
            return NativeSession(settings, session, driver)
    from ninefuse.fuse.pyfuse3_session import Pyfuse3Session

    return Pyfuse3Session(settings, session, driver)
