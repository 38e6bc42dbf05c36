"""What the demo and the benchmark share: progress, the scratch directory, the machine, numbers."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ninefuse
from ninefuse.bench import BenchError
from ninefuse.bench.mounted import file_system, mounts_below
from ninefuse.exitcodes import one_line

IN_MEMORY = ("tmpfs", "ramfs")


class Progress:
    """One line on stderr that says what is going on, if that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._shown:
            with contextlib.suppress(OSError):  # a terminal that has gone away
                print(f"\r\033[K{text[:78]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        self("")


def say(progress: Progress, text: str) -> None:
    """Print a line on stdout, in place of the progress."""
    progress.clear()
    print(text, flush=True)


def complain(progress: Progress, program: str, text: str) -> None:
    """Print a line on stderr, which begins with the program's name."""
    progress.clear()
    with contextlib.suppress(OSError):
        print(f"{program}: {one_line(text)}", file=sys.stderr, flush=True)


def parse_number(text: str) -> int:
    """Return a number from 1, of the command line."""
    if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "1,2,5", sorted, each once."""
    return tuple(sorted({parse_number(word) for word in text.split(",")}))


@contextlib.contextmanager
def scratch_directory(parent: Path | None, name: str) -> Iterator[Path]:
    """Make a directory in parent, or where there is a real file system, and remove it at the end.

    Argument: name, what the directory's name begins with after "ninefuse-".
    Raises BenchError when it cannot be made, or, unless something else has failed, removed.
    """
    parent = parent or _choose_parent()
    try:
        made = tempfile.mkdtemp(prefix=f"ninefuse-{name}-", dir=parent)
    except OSError as error:
        raise BenchError(f"cannot make a directory in {parent}: {error.strerror}") from error
    path = Path(made).resolve()
    try:
        yield path
    except BaseException:
        problem = _remove(path)
        if problem:
            logging.warning("%s", one_line(problem))
        raise
    problem = _remove(path)
    if problem:
        raise BenchError(problem)


def _choose_parent() -> Path:
    """Return a directory on a disk: in memory, oflag=sync would have nothing to wait for."""
    usual = Path(tempfile.gettempdir())
    for path in (usual, Path("/var/tmp"), Path.cwd()):
        if os.access(path, os.W_OK | os.X_OK) and file_system(path.resolve()) not in IN_MEMORY:
            return path
    return usual


def _remove(path: Path) -> str:
    """Remove the directory with all that is in it. Return what went wrong, or ""."""
    if mounts_below(path):
        # What stands in a mount is not ours to remove, and it may hang.
        return f"left {path} behind: something is still mounted there"
    shutil.rmtree(path, ignore_errors=True)
    return f"cannot remove {path}" if path.exists() else ""


def machine(scratch: Path) -> dict[str, str]:
    """Return what the figures depend on: CPUs, kernel, file system, versions."""
    kind = file_system(scratch)
    remark = " (in memory: sync has nothing to wait for)" if kind in IN_MEMORY else ""
    return {
        "CPUs": f"{len(os.sched_getaffinity(0))} ({platform.machine()})",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": f"{kind}, in {one_line(str(scratch.parent))}{remark}",
        "ninefuse": f"{ninefuse.__version__}, Python {platform.python_version()}",
    }


def describe_machine(scratch: Path) -> list[str]:
    """Return the same, a line each."""
    return [f"{name:<13}{value}" for name, value in machine(scratch).items()]
