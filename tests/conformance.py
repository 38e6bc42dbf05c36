"""make conformance: pjdfstest on mounts of each model and engine, beside the source itself.

pjdfstest (github.com/pjd/pjdfstest) checks what POSIX and custom say of system calls on files.
It is built outside of this checkout (autoreconf -ifs && ./configure && make pjdfstest) and is
run here as it is, by prove(1): as root, on `allow_other` mounts of a directory of the file
system in question. What fails on the source itself is no fault of the mount.

    python tests/conformance.py PJDFSTEST [--source DIR] [--rows NAME,...] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ninefuse.bench import BenchError, Interrupted, Processes
from ninefuse.bench.mounted import Mounted, file_system, ninefuse_command

_SECONDS = 3600.0  # for all of pjdfstest, once

ROWS: Mapping[str, tuple[str, ...] | None] = {
    "source": None,
    "none": ("--model", "none"),
    "first": ("--model", "first"),
    "second": ("--model", "second"),
    "second-threads": ("--engine", "threads", "-o", "handover=request"),
    "second-uring": ("--model", "second", "--engine", "uring"),
    "pyfuse3": ("--session", "pyfuse3"),
}

# A line of prove's summary; details of what failed follow it.
_FILE = re.compile(r"^(\S+\.t) +\(Wstat: (\d+)\D.*?Tests: (\d+) Failed: (\d+)\)$")


def failures(summary: str) -> dict[str, str]:
    """What prove says has failed: for each test file the details, in one line.

    Args:
        summary: prove's output, with its Test Summary Report if there is one.
    """
    found: dict[str, list[str]] = {}
    details: list[str] | None = None
    for line in summary.partition("Test Summary Report")[2].splitlines():
        if match := _FILE.match(line):
            path, status, _, failed = match.groups()
            name = "/".join(Path(path).parts[-2:])
            details = found.setdefault(name, [])
            details += ["failed"] * bool(int(failed)) + ["ended badly"] * bool(int(status))
        elif details is not None and line.startswith("  "):
            text = " ".join(line.split())
            if text.startswith(("Failed test", "Parse errors", "Non-zero")):
                details.append(text)
        elif line.startswith("Files="):
            break
    # A file of which only surprises are told (TODO passed) has not failed.
    return {name: "; ".join(said) for name, said in found.items() if said}


def counted(summary: str) -> tuple[int, int]:
    """How many files and tests prove has run."""
    match = re.search(r"^Files=(\d+), Tests=(\d+)", summary, re.MULTILINE)
    if match is None:
        raise BenchError(f"prove came to no end: {summary.strip()[-500:]}")
    return int(match[1]), int(match[2])


def run(processes: Processes, place: Path, tests: Sequence[Path]) -> str:
    """Run test files in a directory; prove's output."""
    words = ["env", "-C", str(place), "prove", "--recurse", "-Q", *map(str, tests)]
    return processes.run(words, _SECONDS, check=False).output.decode(errors="replace")


def main() -> int:
    """Run what the command line asks for; 0 if no file fails that the source passes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pjdfstest", type=Path, help="its checkout, built")
    parser.add_argument("--source", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="NAME,...")
    parser.add_argument("--only", default="*/*.t", metavar="PATTERN", help="such as 'chmod/*.t'")
    options = parser.parse_args()
    rows = options.rows.split(",")
    tests = sorted((options.pjdfstest.resolve() / "tests").glob(options.only))
    if unknown := set(rows) - ROWS.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if not tests or not os.access(options.pjdfstest / "pjdfstest", os.X_OK):
        parser.error(f"{options.pjdfstest}: no pjdfstest that was built")
    if os.geteuid() != 0:
        parser.error("pjdfstest tests as root what others may do; run this as root")
    if shutil.which("prove") is None:
        parser.error("prove(1) is not here; it comes with perl")
    scratch = Path(tempfile.mkdtemp(prefix="conformance-", dir=options.source.resolve()))
    try:
        with Processes() as processes:
            return report(processes, scratch, rows, tests)
    except BenchError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return 128 + interrupted.number
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def report(processes: Processes, scratch: Path, rows: Sequence[str], tests: Sequence[Path]) -> int:
    """Run the rows and print what fails on each."""
    scratch.chmod(0o755)  # other users' processes pass it
    source, mountpoint = scratch / "source", scratch / "mount"
    results: dict[str, dict[str, str]] = {}
    for directory in (source, mountpoint):
        directory.mkdir(mode=0o755)
    print(f"pjdfstest on {file_system(scratch)}")
    for row in rows:
        begin = time.monotonic()
        words = ROWS[row]
        if words is None:
            output = run(processes, source, tests)
        else:
            command = ninefuse_command(source, mountpoint, "-o", "allow_other", *words)
            with Mounted(processes, row, command, mountpoint):
                output = run(processes, mountpoint, tests)
        files, count = counted(output)
        results[row] = failed = failures(output)
        seconds = time.monotonic() - begin
        print(f"{row:12} {files} files, {count} tests, {len(failed)} files fail; {seconds:.0f} s")
        for name, details in failed.items():
            known = " (on the source, too)" if name in results.get("source", {}) else ""
            print(f"    {name}: {details}{known}")
        sys.stdout.flush()
    known_to_fail = results.get("source", {}).keys()
    return int(any(failed.keys() - known_to_fail for failed in results.values()))


if __name__ == "__main__":
    sys.exit(main())
