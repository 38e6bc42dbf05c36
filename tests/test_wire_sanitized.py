"""A million bad requests to a decoder that is built to notice the least slip of memory.

AddressSanitizer and UndefinedBehaviorSanitizer end a process that touches what is not its own.
(What of it is beside threads is in test_role_sanitized.py.)
"""

from __future__ import annotations

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

SOURCES = [REPO / "ninefuse" / "fuse" / f"{name}.pyx" for name in ("_message", "_wire")]
FUZZ = REPO / "tests" / "wire_fuzz.py"
INPUTS = 1_000_000


def build(directory: Path, good: str = "", bad: str = "") -> None:
    """Build both extensions with the sanitizers in them, what is in one of them once exchanged."""
    library(MEMORY)  # or skip
    include = sysconfig.get_path("platinclude")
    for source in SOURCES:
        pyx, c, built = (directory / f"{source.stem}.{suffix}" for suffix in ("pyx", "c", "so"))
        text = source.read_text()
        pyx.write_text(text.replace(good, bad) if good and good in text else text)
        # By its name in ninefuse: the one is compiled against the other.
        name = f"ninefuse.fuse.{source.stem}"
        cython = [sys.executable, "-m", "cython", "-3", f"-I{REPO}", "--module-name", name]
        subprocess.run([*cython, str(pyx), "-o", str(c)], check=True)
        subprocess.run(
            [*COMPILER, "-shared", "-fPIC", "-O1", "-g", "-w", *MEMORY, f"-I{include}", str(c)]
            + ["-o", str(built)],
            check=True,
        )


def fuzz(directory: Path, seed: int, inputs: int) -> subprocess.CompletedProcess[str]:
    """Feed inputs to a build, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(FUZZ), str(directory), str(seed), str(inputs)],
        env=environment(MEMORY),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_a_million_bad_requests(tmp_path: Path) -> None:
    began = time.monotonic()
    build(tmp_path)
    print(f"built in {time.monotonic() - began:.0f} s")
    done = fuzz(tmp_path, 1, INPUTS)
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
    assert sum(source.read_text().count(good) for source in SOURCES) == 1
    build(tmp_path, good, bad)
    done = fuzz(tmp_path, 1, INPUTS // 10)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr, done.stderr
