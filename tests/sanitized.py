"""Builds with gcc's or clang's sanitizers, which tell of what a process must not do with memory.

The build lies in a directory of its own; ninefuse's is not touched.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from mounting import REPO

COMPILER = shlex.split(os.environ.get("CC", "gcc"))
MEMORY = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-DCYTHON_USE_FREELISTS=0",  # what is freed is freed, and not kept for the next one
)
THREADS = ("-fsanitize=thread", "-fno-omit-frame-pointer")
LIMIT = 900.0  # seconds
_KINDS = {MEMORY: "libasan.so", THREADS: "libtsan.so"}


def library(kind: tuple[str, ...]) -> str:
    """The library that has to be there before all others; skips the test where there is none.

    Args:
        kind: MEMORY or THREADS.
    """
    try:
        found = subprocess.run(
            [*COMPILER, f"-print-file-name={_KINDS[kind]}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as failure:
        pytest.skip(f"no compiler that has sanitizers: {failure}")
    if not os.path.isabs(found):
        pytest.skip(f"no {_KINDS[kind]} here")
    if importlib.util.find_spec("Cython") is None:
        pytest.skip("no Cython here")
    return os.path.realpath(found)


def environment(kind: tuple[str, ...], more: str = "") -> dict[str, str]:
    """What a process that loads such a build has in its environment.

    Args:
        kind: MEMORY or THREADS.
        more: for the sanitizer itself, beside what is always said.
    """
    if kind is THREADS:
        said = {"TSAN_OPTIONS": f"history_size=4:exitcode=0:{more}"}
    else:
        said = {
            # Each object of Python's has memory of its own then, with guards around it.
            "PYTHONMALLOC": "malloc",
            # The interpreter keeps much until its end.
            "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:{more}",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    return {**os.environ, "LD_PRELOAD": library(kind), **said}


def checkout(
    directory: Path, kind: tuple[str, ...], changes: Sequence[tuple[str, str, str]] = ()
) -> Path:
    """A copy of ninefuse and its tests, all compiled modules with the sanitizer in them.

    Args:
        directory: where to.
        kind: MEMORY or THREADS.
        changes: a file of it, what is in it once, and what is to be there instead.
    """
    library(kind)
    copy = directory / "copy"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "bench-results")
    shutil.copytree(REPO, copy, ignore=unwanted)
    for name, good, bad in changes:
        source = (copy / name).read_text()
        assert source.count(good) == 1, good
        (copy / name).write_text(source.replace(good, bad))
    flags = shlex.join(("-O1", "-g", "-w", *kind))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, "CFLAGS": flags, "LDFLAGS": flags},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert list(copy.glob("ninefuse/fuse/_role.*.so")), done.stderr
    return copy


def run_tests(
    copy: Path, kind: tuple[str, ...], *words: str, more: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run tests of a checkout with a sanitizer.

    Args:
        copy, kind: as `checkout` has them.
        words: pytest's.
        more: for the sanitizer itself.
    """
    # Their short forms: all is many times slower.
    said = environment(kind, more) | {"PYTHONPATH": str(copy), "NINEFUSE_SOAK": "0"}
    # gcc's older ThreadSanitizer does not find its way where addresses are all too random.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    # What the sanitizer says is to be read here, and not to be kept for tests that fail.
    command = [*fixed, sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-o", "timeout=0", "-o", "faulthandler_timeout=0", *words]
    return subprocess.run(
        command, cwd=copy, env=said, capture_output=True, text=True, timeout=LIMIT
    )
