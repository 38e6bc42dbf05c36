"""What `make conformance` makes of prove's words. pjdfstest itself is not run here."""

from __future__ import annotations

import pytest
from conformance import counted, failures

from ninefuse.bench import BenchError

SUMMARY = """
/p/tests/chmod/00.t (Wstat: 0 Tests: 119 Failed: 2)
  Failed tests:  3, 5
Files=1, Tests=119
Test Summary Report
-------------------
/p/tests/chmod/00.t      (Wstat: 0 Tests: 119 Failed: 2)
  Failed tests:  3, 5
/p/tests/link/00.t       (Wstat: 0 Tests: 20 Failed: 0)
  TODO passed:   7
/p/tests/open/02.t       (Wstat: 256 (exited 1) Tests: 4 Failed: 0)
  Non-zero exit status: 1
  Parse errors: No plan found in TAP output
Files=3, Tests=143, 12 wallclock secs ( 0.1 usr +  0.0 sys =  0.1 CPU)
Result: FAIL
"""


def test_what_failed_is_told_and_surprises_are_not() -> None:
    assert failures(SUMMARY) == {
        "chmod/00.t": "failed; Failed tests: 3, 5",
        "open/02.t": "ended badly; Non-zero exit status: 1; "
        "Parse errors: No plan found in TAP output",
    }


def test_nothing_failed() -> None:
    output = "All tests successful.\nFiles=238, Tests=8789, 99 wallclock secs\nResult: PASS\n"
    assert failures(output) == {}
    assert counted(output) == (238, 8789)


def test_a_run_that_came_to_no_end_is_no_success() -> None:
    with pytest.raises(BenchError, match="no end"):
        counted("prove: cannot find anything")
