"""The ninefuse-stat command: its arguments, and a table now and then."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ninefuse.exitcodes import ExitCode, one_line
from ninefuse.process import daemon
from ninefuse.stats import Problem
from ninefuse.stats.ask import Question, explain
from ninefuse.stats.snapshot import Period, Snapshot, between, parse, since_mount
from ninefuse.stats.table import table

LIMIT = 5.0  # seconds that a mount may take to answer

_LEAST_WATCH = 1.0  # seconds that a mount keeps a snapshot: sooner there would be no news
_MOST_WATCH = 86400.0

_HELP = """\
MNT is a mount of ninefuse, or anything in one. Without --watch the rates and
latencies are those since it was mounted; with --watch the first table is, and
each further one is about the time since the table before it. Ctrl-C ends that
(exit code 0).

columns:
  per s   requests answered in a second
  p50...  latency of the fastest 50, 90, 99 and 100 % of them, from the arrival
          in the daemon to the answer: upper bounds, up to 19 % too high
  disp    share of the requests that never left the dispatcher
  cross   changes of thread on the way of a request, on average
  errors  how many were answered with which error
  waits, waited, longest   how often and how long a lock was waited for, and the
          longest wait since the mount

exit codes: 0 fine; 1 the counters cannot be had; 2 the command line is wrong
"""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. watch: seconds from table to table, None for one table only."""

    path: str
    watch: float | None
    json: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Argument: argv, the words after the command's name; None takes sys.argv's.
    """
    daemon.open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names the terminal has no letters for
    try:
        return _run(_parse(sys.argv[1:] if argv is None else argv))
    except Problem as problem:
        print(f"ninefuse-stat: {problem}", file=sys.stderr, flush=True)
        return problem.code
    except SystemExit as end:  # so argparse ends --help
        return end.code if isinstance(end.code, int) else ExitCode.OK
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(options: Options) -> int:
    in_place = options.watch is not None and not options.json and sys.stdout.isatty()
    earlier: Snapshot | None = None
    try:
        while True:
            text = _read(options.path, patient=earlier is not None)
            snapshot = parse(text)
            if options.json:
                _print(json.dumps(json.loads(text), indent=2))
            else:
                period = since_mount(snapshot) if earlier is None else between(earlier, snapshot)
                _show(period, in_place=in_place, again=earlier is not None)
            if options.watch is None:
                return ExitCode.OK
            earlier = snapshot
            time.sleep(options.watch)
    except KeyboardInterrupt:
        if options.watch is None:
            raise
        if in_place:
            _print("")  # the shell's prompt comes after the terminal's ^C otherwise
        return ExitCode.OK  # it is how one is meant to end it


def _read(path: str, *, patient: bool) -> str:
    """Return the mount's snapshot as text.

    Argument: patient, whether to go on waiting for a mount that does not answer in time (after
    a line that says so): that it hangs is what someone who watches it wants to see the end of.
    Raises Problem.
    """
    silence = f"{path} does not answer within {LIMIT:g} s"
    with contextlib.closing(Question(path)) as question:
        reply = question.answer(LIMIT)
        if reply is None and not patient:
            raise Problem(f"{silence}: kill -USR2 has its daemon log what is stuck, and where")
        if reply is None:
            print(f"ninefuse-stat: {one_line(silence)}: waiting", file=sys.stderr, flush=True)
        while reply is None:
            reply = question.answer(LIMIT)
    if reply.error:
        raise explain(path, reply)
    return reply.value


def _show(period: Period, *, in_place: bool, again: bool) -> None:
    if not in_place:
        _print("\n".join([*([""] if again else []), *table(period)]))
        return
    columns, rows = shutil.get_terminal_size()  # 80 and 24 where the terminal does not know
    # The last row is left to the cursor. What does not fit would scroll, and not be drawn over.
    lines = [line[:columns] for line in table(period, rows - 1)[: rows - 1]]
    begin = "\033[H" if again else "\033[H\033[2J"
    _print(begin + "".join(f"{line}\033[K\n" for line in lines) + "\033[J", end="")


def _print(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        if isinstance(error, BrokenPipeError):
            raise SystemExit(ExitCode.INTERNAL) from None  # nobody reads on (`| head`)
        raise Problem(f"cannot print: {error.strerror}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise a Problem: main prints its one line, where argparse would print the usage too."""
        raise Problem(f"{message} (see ninefuse-stat --help)", ExitCode.USAGE)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="ninefuse-stat",
        usage="ninefuse-stat MNT [--watch SECONDS] [--json]",
        description="Show what a mount of ninefuse is doing: rates and latencies by operation,\n"
        "and what it waits for.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="MNT", help=argparse.SUPPRESS)
    parser.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="a new table every so many seconds, fractions included; at least 1, for which "
        "time a mount keeps its counters",
    )
    parser.add_argument("--json", action="store_true", help="the counters as they are published")
    return parser


def _parse(argv: Sequence[str]) -> Options:
    return Options(**vars(make_parser().parse_args(argv)))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if _LEAST_WATCH <= value <= _MOST_WATCH:
        return value
    raise argparse.ArgumentTypeError(
        f"{text!r} is no number of seconds from {_LEAST_WATCH:g} to {_MOST_WATCH:g}"
    )


if __name__ == "__main__":
    sys.exit(main())
