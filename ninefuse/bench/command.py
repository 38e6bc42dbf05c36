"""`ninefuse-bench`: ninefuse under each model, beside the source and its peers.

All happens in one scratch directory. It, the mounts in it and the processes that use them are
gone at the end, also when SIGINT, SIGTERM or SIGHUP comes; what was measured until then is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import ninefuse
from ninefuse.bench import BenchError, Interrupted, Processes, plots, tables
from ninefuse.bench.catalogue import DATA_KEYS, HEADLINE, workloads
from ninefuse.bench.common import (
    Progress,
    complain,
    describe_machine,
    machine,
    parse_number,
    parse_numbers,
    say,
    scratch_directory,
)
from ninefuse.bench.counters import why_not_calls
from ninefuse.bench.results import Results
from ninefuse.bench.rows import (
    DATA_ROWS,
    NULL,
    SOURCE,
    Maker,
    Missing,
    Peer,
    Row,
    Site,
    make_row,
    makers,
    parse_peer,
    version_of,
)
from ninefuse.bench.schedule import Served, Task, measure, task
from ninefuse.bench.trees import make_original
from ninefuse.bench.users import MOST, Users

PROGRAM = "ninefuse-bench"

_EPILOG = """\
rows: source, the directory itself; none, first, second, ninefuse under each model;
second-thr, the second without io_uring; second-off, also without calls of the
dispatcher's own, as it was in 2010; kernel, the second with -o data=kernel; bindfs,
bindfs-mt (--multithreaded); pt_ll (libfuse's passthrough_ll, compiled here); example
(pyfuse3's passthroughfs.py, fetched by pip and kept in ~/.cache/ninefuse-bench);
null, null-native (servers that answer from memory); pt_hp, pt_hp-kernel (libfuse's
passthrough_hp with all data through it, and with data by the kernel, from PATH or
given by --peer). One that cannot be had here is left out, and the reason told.

a short run, of half a minute:
  ninefuse-bench --rows source,none,second --workload sync-write,create --repeat 1 \\
    --clients 1,5 --scale 0.2
"""
CLIENTS = (1, 2, 3, 5, 10)
OTHER_CLIENTS = (1, 4)  # of the workloads beside the headline
ROUNDS = 3
HEADLINE_SECONDS = 0.7  # of one run, on average over the rows
# What the quick form measures beside the headline, and how much of the usual amounts.
MAIN_ROWS = frozenset((SOURCE, "none", "first", "second", "bindfs-mt", "pt_ll", NULL))
QUICK_SCALE = 0.6
FULL_SCALE = 3.0  # how many times more --full does in a run
_WEIGHT = 0.7  # about the seconds of a run that is not the headline's


@dataclass(frozen=True, slots=True)
class Options:
    """The command line.

    source: the directory to make the scratch directory in, None to choose one. clients: the
    headline's values of X. repeat: rounds of everything, None for the usual. workload, rows:
    names, None for all. peer: further rows. out: where results go. full: the long form. scale:
    factor on all amounts. users: as how many other users clients come, 0 for the own one. calls:
    whether system calls are counted.
    """

    source: Path | None
    clients: tuple[int, ...]
    repeat: int | None
    workload: tuple[str, ...] | None
    rows: tuple[str, ...] | None
    peer: list[Peer]
    out: Path
    full: bool
    scale: float
    users: int
    calls: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns the exit code: 0, 1 if it could not be run, 2 for a wrong command line, 128 + the
    number of the signal that ended it.
    """
    options = _parse(argv)
    logging.basicConfig(format=f"{PROGRAM}: %(message)s")
    progress = Progress()
    code = 0
    with Processes() as processes:
        results = Results()
        try:
            try:
                _bench(processes, options, results, progress)
                processes.check()
            except Interrupted as signal:
                complain(progress, PROGRAM, f"interrupted by {signal}")
                code = 128 + signal.number
            with processes.shielded():
                if results.cells:
                    _report(results, options.out, progress)
        except BrokenPipeError:
            # Nobody reads on (`| head`). What is still buffered must not fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
        except (BenchError, OSError) as error:
            complain(progress, PROGRAM, str(error))
            code = 1
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measure ninefuse under each threading model beside the source directory and "
        "other file servers, in interleaved rounds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", type=Path, metavar="DIR", help="use the file system that DIR is on")
    add(
        "--clients",
        type=parse_numbers,
        default=CLIENTS,
        metavar="X,...",
        help=f"how many dd at a time write synchronously ({','.join(map(str, CLIENTS))})",
    )
    add(
        "--repeat",
        type=parse_number,
        metavar="N",
        help=f"rounds (default: {ROUNDS} of sync-write and 1 of the others; {ROUNDS} with --full)",
    )
    add("--workload", type=_names, metavar="NAME,...", help=f"only these: {', '.join(_keys())}")
    rows = ", ".join(makers([]))
    add("--rows", type=_names, metavar="NAME,...", help=f"only these, of {rows} and --peer's")
    add(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more file server, which stays in the foreground; {src} and {mnt} in COMMAND "
        "become the directories; no shell",
    )
    default = Path("bench-results")
    add("--out", type=Path, default=default, metavar="DIR", help=f"for results (./{default})")
    add(
        "--full",
        action="store_true",
        help=f"{ROUNDS} rounds of everything on all rows, larger amounts",
    )
    add(
        "--users",
        type=_users,
        default=0,
        metavar="N",
        help="clients come as N other users in turn, where the workload can (root only)",
    )
    add(
        "--calls",
        action="store_true",
        help="one more round, whose times are not told, counts system calls (root)",
    )
    add("--scale", type=_factor, default=1.0, metavar="F", help="factor on all amounts (1)")
    return parser


def _parse(argv: Sequence[str] | None) -> Options:
    parser = make_parser()
    options = Options(**vars(parser.parse_args(argv)))
    try:
        _chosen(makers(options.peer), options.rows, "row")
        _chosen(dict.fromkeys(_keys()), options.workload, "workload")
    except ValueError as error:
        parser.error(str(error))
    return options


def _keys() -> list[str]:
    return [workload.key for workload in workloads(Path(), 1.0, False)]


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(word for word in text.split(",") if word))
    if not names:
        raise argparse.ArgumentTypeError("no name")
    return names


def _peer(text: str) -> Peer:
    try:
        return parse_peer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _users(text: str) -> int:
    number = parse_number(text)
    if number > MOST:
        raise argparse.ArgumentTypeError(f"at most {MOST} users")
    return number


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0.0001 <= factor <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor from 0.0001 to 1000")
    return factor


def _chosen(
    found: dict[str, Maker] | dict[str, None], names: Sequence[str] | None, kind: str
) -> None:
    for name in names or ():
        if name not in found:
            raise ValueError(f"there is no {kind} {name}; there are: {', '.join(found)}")


def _bench(processes: Processes, options: Options, results: Results, progress: Progress) -> None:
    """Measure all; results has what was measured also when an exception ends it."""
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(options.source, "bench"))
        if os.geteuid() == 0:
            scratch.chmod(0o711)  # for clients of another user
        source = scratch / "source"
        source.mkdir()
        for line in describe_machine(scratch):
            say(progress, line)
        progress("looking at programs")
        results.machine = machine(scratch)
        results.versions = versions(processes)
        results.options = _recorded(options)
        files, size = make_original(source / "original")
        results.options["tree"] = f"{files} files, {size} bytes, of Python's own library"

        served = _serve(stack, Site(processes, scratch, source), options, results, progress)
        tasks = _tasks(options, source / "original", bool(results.versions["fio"]))
        results.not_counted = why_not_calls() if options.calls else ""

        def save() -> None:
            results.seconds = time.monotonic() - begin
            results.save(options.out)

        try:
            _, seconds = _sizes(options)
            calls = options.calls and not results.not_counted
            measure(processes, served, tasks, seconds, results, progress, save, calls)
            results.complete = True
        finally:
            results.seconds = time.monotonic() - begin
            progress("unmounting")
    for one in served:
        if one.dead:
            results.dead[one.row.name] = one.dead


def _recorded(options: Options) -> dict[str, object]:
    return {
        "clients": list(options.clients),
        "repeat": options.repeat,
        "full": options.full,
        "scale": options.scale,
        "workload": list(options.workload or ()),
        "rows": list(options.rows or ()),
        "users": options.users,
        "calls": options.calls,
    }


def _serve(
    stack: contextlib.ExitStack,
    site: Site,
    options: Options,
    results: Results,
    progress: Progress,
) -> list[Served]:
    """Make the rows ready and mount them all at once; those that are not to be had are named."""
    served = []
    found = makers(options.peer)
    for name in options.rows or found:
        progress(f"making ready: {name}")
        row = make_row(site, name, found[name])
        if isinstance(row, Row):
            mounted = _mount(stack, site, row)
            if isinstance(mounted, Served):
                served.append(mounted)
                results.rows.append(row)
                continue
            row = mounted
        results.missing.append(row)
        say(progress, f"missing      {row.name}: {row.reason}")
    return served


def _mount(stack: contextlib.ExitStack, site: Site, row: Row) -> Served | Missing:
    try:
        return stack.enter_context(Served(site, row))
    except BenchError as error:
        return Missing(row.name, str(error).removeprefix(f"{row.name}: "))


def _sizes(options: Options) -> tuple[float, float]:
    """Return the factor on amounts, and the seconds of a headline run."""
    scale = options.scale * (FULL_SCALE if options.full else 1.0)
    return scale, HEADLINE_SECONDS * scale


def _tasks(options: Options, original: Path, fio: bool) -> list[Task]:
    scale, seconds = _sizes(options)
    few = options.repeat or (ROUNDS if options.full else 1)
    # Rows that were asked for are all measured, and so are peers that were given.
    main = None
    if not (options.full or options.rows):
        main = MAIN_ROWS | {peer.name for peer in options.peer}
        scale *= QUICK_SCALE
    tasks = []
    for found in workloads(original, scale, fio and not options.users):
        if options.workload is not None and found.key not in options.workload:
            continue
        workload = replace(found, users=Users(options.users)) if options.users else found
        if workload.key == HEADLINE:
            rounds = options.repeat or ROUNDS
            tasks += [task(workload, x, rounds, seconds) for x in options.clients]
        else:
            rows = main | DATA_ROWS if main and workload.key in DATA_KEYS else main
            tasks += [task(workload, x, few, _WEIGHT * scale, rows) for x in OTHER_CLIENTS]
    return tasks


def versions(processes: Processes) -> dict[str, str]:
    """Return the versions of what takes part, beside the rows' own; "" of what there is not."""
    found = {"ninefuse": ninefuse.__version__, "Python": platform.python_version()}
    found.update((name, _installed(name)) for name in ("pyfuse3", "trio", "matplotlib"))
    found["libfuse"] = version_of(processes, "pkg-config", "--modversion", "fuse3")
    for program in ("fusermount3", "dd", "cp", "find", "grep", "fio"):
        found[program] = version_of(processes, program, "--version")
    return found


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _report(results: Results, out: Path, progress: Progress) -> None:
    """Print the tables, and write all files.

    Raises OSError.
    """
    results.save(out)
    written = ["results.json", *tables.write(results, out)]
    text, drawn = "", list[str]()
    try:
        drawn = plots.draw(results, out)
    except ImportError as error:
        text = f"no plots: {error.name or error} is missing; pip install 'ninefuse[bench]'"
    for line in tables.terminal(results):
        say(progress, line)
    if text:
        say(progress, text)
    say(progress, f"{out}: {', '.join([*written, *drawn])}")


if __name__ == "__main__":
    sys.exit(main())
