"""File systems of their own for tests: in memory, in an image, in layers. For root alone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mounting import is_mounted, run, wait_until

SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@contextlib.contextmanager
def mounted(kind: str, device: str | Path, on: Path, options: str = "") -> Iterator[Path]:
    """Mount a file system, for a while; skip the test where that is not possible."""
    on.mkdir(parents=True, exist_ok=True)
    done = run("mount", "-t", kind, *(("-o", options) if options else ()), device, on)
    if done.returncode:
        pytest.skip(f"no {kind} can be mounted here: {done.stderr.strip()}")
    try:
        yield on
    finally:
        # The daemon's last closes are deferred, and may take a moment after its end.
        with contextlib.suppress(TimeoutError):
            wait_until(
                lambda: not is_mounted(on) or run("umount", on).returncode == 0, f"umount {on}", 2.0
            )
        if is_mounted(on):
            run("umount", "-l", on)


@contextlib.contextmanager
def image(
    kind: str,
    base: Path,
    *words: str,
    size: int = 300 << 20,
    file: Path | None = None,
    options: str = "",
) -> Iterator[Path]:
    """A new file system in a sparse file, mounted by way of a loop device.

    Args:
        kind: of the file system.
        base: where its file and its mount point are made.
        words: for mkfs.
        size: bytes.
        file: the file, where it is not to be in ``base``.
        options: of the mount.
    """
    make = shutil.which(f"mkfs.{kind}", path=SBIN)
    if make is None:
        pytest.skip(f"there is no mkfs.{kind}")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("there are no loop devices")
    if file is None:
        file = base / "image"
    with open(file, "wb") as new:
        new.truncate(size)
    done = run(make, "-q", *words, file)
    assert done.returncode == 0, done.stderr
    try:
        with mounted(kind, file, base / "disk", ",".join(filter(None, ("loop", options)))) as disk:
            yield disk
    finally:
        file.unlink()


@contextlib.contextmanager
def overlay(base: Path, one: bool, plant: Callable[[Path], None]) -> Iterator[Path]:
    """An overlayfs, whose lower layer is planted first; on one file system, or on two."""
    with ExitStack() as stack:
        first = stack.enter_context(mounted("tmpfs", "tmpfs", base / "first", "size=64m"))
        second = first
        if not one:
            second = stack.enter_context(mounted("tmpfs", "tmpfs", base / "second", "size=64m"))
        lower, upper, work = first / "lower", second / "upper", second / "work"
        for path in (lower, upper, work):
            path.mkdir()
        plant(lower)
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        if not one:
            options += ",xino=off"
        yield stack.enter_context(mounted("overlay", "overlay", base / "overlay", options))


@contextlib.contextmanager
def file_system(kind: str, base: Path, plant: Callable[[Path], None]) -> Iterator[Path]:
    if kind == "tmpfs":
        with mounted("tmpfs", "tmpfs", base / "tmpfs", "size=64m") as path:
            yield path
    elif kind.startswith("overlayfs"):
        with overlay(base, kind == "overlayfs", plant) as path:
            yield path
    else:
        with image(kind, base) as path:
            yield path
