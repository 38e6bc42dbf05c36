"""Tests of all compiled modules, built to notice slips of memory, and threads that race.

The session's own, over a socket in place of the device, with leaders, followers and hands. What
ThreadSanitizer is told to leave out is named, with the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mounting import SOAK
from sanitized import MEMORY, THREADS, checkout, run_tests

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not SOAK, reason="takes minutes: make soak"),
]

LEADING = ("tests/test_leading.py", "tests/test_ahead.py")
FILES = (
    *LEADING,
    *("tests/test_wire.py", "tests/test_wire_session.py", "tests/test_wire_filelocks.py"),
    *("tests/test_transfer.py", "tests/test_ring.py", "tests/test_syscalls.py"),
    *("tests/test_callers.py", "tests/test_credentials.py", "tests/test_fields.py"),
)
# Here the sanitizer itself keeps memory.
KEEPS = ("-k", "not test_many_rings_leave_nothing")

ROLE = "ninefuse/fuse/_role.pyx"
PLAIN = "ninefuse/fuse/_plain.pyx"
SUPPRESSED = """\
# A thread looks without the mutex whether it leads itself. Nobody else ever changes that.
race_top:*Role_*lead
# It looks whether anything was left to finish, and takes it by the mutex.
race_top:*Role_*drain
# Python reads figures that are told, or guessed by.
race:*Role_*___get__
race:*Ahead_*___get__
"""


def raced(directory: Path, copy: Path) -> tuple[int, str]:
    """Run the tests of leaders with ThreadSanitizer; the exit code, and what it says."""
    suppressed = directory / "suppressed"
    suppressed.write_text(SUPPRESSED)
    done = run_tests(copy, THREADS, *LEADING, more=f"suppressions={suppressed}")
    print(done.stdout[-3000:], done.stderr[-6000:])
    return done.returncode, done.stderr


def test_they_keep_to_their_memory(tmp_path: Path) -> None:
    done = run_tests(checkout(tmp_path, MEMORY), MEMORY, *FILES, *KEEPS)
    print(done.stdout[-3000:], done.stderr[-6000:])
    assert done.returncode == 0


def test_threads_that_lead_do_not_race(tmp_path: Path) -> None:
    code, said = raced(tmp_path, checkout(tmp_path, THREADS))
    assert code == 0
    assert "ThreadSanitizer" not in said


# What they stand on, as it is, and as it would be by some mistake.


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("job.size = PyBytes_GET_SIZE(data)", "job.size = PyBytes_GET_SIZE(data) + 64"),
        ("    Py_INCREF(data)\n    job.data", "    job.data"),
    ],
    ids=["more than there is", "what is freed"],
)
def test_a_slip_of_memory_is_noticed(tmp_path: Path, good: str, bad: str) -> None:
    """Else the test of it would say nothing."""
    copy = checkout(tmp_path, MEMORY, [(PLAIN, good, bad)])
    done = run_tests(copy, MEMORY, *LEADING)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr, done.stderr[-6000:]


def test_a_mutex_that_is_not_taken_is_noticed(tmp_path: Path) -> None:
    good = """        job.is_over = True
        can_wait = (
"""
    apart = "        pthread_mutex_unlock(&self.mutex)\n"
    again = "        pthread_mutex_lock(&self.mutex)\n"
    copy = checkout(
        tmp_path,
        THREADS,
        [(ROLE, good, apart + good.replace("        can", again + "        can"))],
    )
    assert "WARNING: ThreadSanitizer: data race" in raced(tmp_path, copy)[1]
