"""A million bad requests to a decoder that is built to notice the least slip of memory.

AddressSanitizer and UndefinedBehaviorSanitizer, of gcc or clang, end a process that touches what is
not its own. The build lies in a directory of its own; ninefuse's is not touched.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from mounting import REPO, SOAK

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not SOAK, reason="takes minutes: make soak"),
]

SOURCE = REPO / "ninefuse" / "fuse" / "_wire.pyx"
FUZZ = REPO / "tests" / "wire_fuzz.py"
INPUTS = 1_000_000
COMPILER = shlex.split(os.environ.get("CC", "gcc"))
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-DCYTHON_USE_FREELISTS=0",  # what is freed is freed, and not kept for the next one
)
LIMIT = 900.0  # seconds


def libasan() -> str:
    """The library that has to be there before all others."""
    try:
        found = subprocess.run(
            [*COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as failure:
        pytest.skip(f"no compiler that has sanitizers: {failure}")
    if not os.path.isabs(found):
        pytest.skip("no AddressSanitizer here")
    return os.path.realpath(found)


def build(directory: Path, source: str) -> Path:
    """The extension of that source, with the sanitizers in it."""
    if importlib.util.find_spec("Cython") is None:
        pytest.skip("no Cython here")
    pyx, c, built = (directory / f"_wire.{suffix}" for suffix in ("pyx", "c", "so"))
    pyx.write_text(source)
    subprocess.run([sys.executable, "-m", "cython", "-3", str(pyx), "-o", str(c)], check=True)
    include = sysconfig.get_path("platinclude")
    subprocess.run(
        [*COMPILER, "-shared", "-fPIC", "-O1", "-g", "-w", *SANITIZERS, f"-I{include}", str(c)]
        + ["-o", str(built)],
        check=True,
    )
    return built


def fuzz(built: Path, seed: int, inputs: int) -> subprocess.CompletedProcess[str]:
    """Feed inputs to a build, in a process of its own."""
    environment = {
        **os.environ,
        "LD_PRELOAD": libasan(),
        # Each object of Python's has memory of its own then, with guards around it.
        "PYTHONMALLOC": "malloc",
        # The interpreter keeps much until its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, str(FUZZ), str(built), str(seed), str(inputs)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_a_million_bad_requests(tmp_path: Path) -> None:
    began = time.monotonic()
    built = build(tmp_path, SOURCE.read_text())
    print(f"built in {time.monotonic() - began:.0f} s")
    done = fuzz(built, 1, INPUTS)
    print(done.stdout, done.stderr[-4000:])
    assert done.returncode == 0


# What the decoder's safety stands on, as it is, and as it would be by some mistake.
LENGTH = """if <size_t> (r.end - r.at) < count:
        raise OSError(EIO, "a message is shorter than its %s")"""
BROKEN = {
    "a structure's length": (LENGTH % "structure", "pass"),
    "data's length": (LENGTH % "data", "pass"),
    "a name's end": ("memchr(r.at, 0, r.end - r.at)", "memchr(r.at, 0, 1 << 20)"),
    "an extension's length": (
        "if head.a < sizeof(head) or <size_t> (r.end - r.at) < head.a:",
        "if head.a < sizeof(head):",
    ),
    "an entry's room": ("self.data.extend(bytes(whole))", "self.data.extend(bytes(whole - 8))"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bound_that_is_missing_is_noticed(tmp_path: Path, what: str) -> None:
    """Else the test above would say nothing."""
    good, bad = BROKEN[what]
    source = SOURCE.read_text()
    assert source.count(good) == 1
    done = fuzz(build(tmp_path, source.replace(good, bad)), 1, INPUTS // 10)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr, done.stderr
