"""A million bad requests to a decoder that is built to notice the least slip of memory.

AddressSanitizer and UndefinedBehaviorSanitizer end a process that touches what is not its own.
(What of it is beside threads is in test_role_sanitized.py.)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from mounting import REPO, SOAK
from sanitized import COMPILER, LIMIT, MEMORY, environment, library

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not SOAK, reason="takes minutes: make soak"),
]

SOURCE = REPO / "ninefuse" / "fuse" / "_wire.pyx"
FUZZ = REPO / "tests" / "wire_fuzz.py"
INPUTS = 1_000_000


def build(directory: Path, source: str) -> Path:
    """The extension of that source, with the sanitizers in it."""
    library(MEMORY)  # or skip
    pyx, c, built = (directory / f"_wire.{suffix}" for suffix in ("pyx", "c", "so"))
    pyx.write_text(source)
    shutil.copy(SOURCE.with_suffix(".pxd"), directory)
    subprocess.run([sys.executable, "-m", "cython", "-3", str(pyx), "-o", str(c)], check=True)
    include = sysconfig.get_path("platinclude")
    subprocess.run(
        [*COMPILER, "-shared", "-fPIC", "-O1", "-g", "-w", *MEMORY, f"-I{include}", str(c)]
        + ["-o", str(built)],
        check=True,
    )
    return built


def fuzz(built: Path, seed: int, inputs: int) -> subprocess.CompletedProcess[str]:
    """Feed inputs to a build, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(FUZZ), str(built), str(seed), str(inputs)],
        env=environment(MEMORY),
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
