"""What ddbench.py and socketbench.py share: options, servers, interleaved rounds, the report.

In each round every cell is run on every row, one row after the other, beginning with another one
each time; what else the machine does so hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mounting import ENVIRONMENT

import ninefuse
from guest.machine import GuestFailed, GuestLost
from guest.servers import command_of
from ninefuse.bench import BenchError, Interrupted, Process, Processes
from ninefuse.bench.command import versions
from ninefuse.bench.common import (
    Progress,
    complain,
    machine,
    parse_number,
    say,
    scratch_directory,
)
from ninefuse.bench.results import Cell, Results, Run
from ninefuse.bench.rows import Missing, Row, version_of
from ninefuse.settings import MODELS

DIOD = "diod"
# The rows of ninefuse-serve, and its options. The second model is shown without io_uring as well.
SERVED = {**{model: ("--model", model) for model in MODELS}, "second-thr": ("--engine", "threads")}
_START_SECONDS = 30.0


@dataclass(frozen=True)
class Measured:
    """One run: a value in the cell's unit, real seconds, CPU seconds of clients and server."""

    value: float
    seconds: float
    user: float
    system: float
    server: tuple[float, float]


@dataclass
class Bench:
    """A benchmark under way. scratch: its directory; source: what all servers serve."""

    processes: Processes
    scratch: Path
    source: Path
    results: Results
    progress: Progress
    options: argparse.Namespace


# Runs a cell on the row of that name.
Runner = Callable[[str, Cell], Measured]


def start_servers(bench: Bench, listen: Callable[[str], str]) -> dict[str, Process]:
    """Start ninefuse-serve under each model, and diod; their rows are in results then.

    Args:
        bench: where.
        listen: returns where the row of that name listens, as for servers.command_of.
    """
    running = {}
    for name in (*SERVED, DIOD):
        kind, options = ("ninefuse", SERVED[name]) if name in SERVED else (DIOD, ())
        try:
            command = command_of(kind, (listen(name),), bench.source, options)
        except AssertionError as reason:
            bench.results.missing.append(Missing(name, str(reason)))
            continue
        running[name] = server = bench.processes.start(command, ENVIRONMENT)
        _await(bench.processes, name, server, listen(name))
        version, group, note = (
            ninefuse.__version__,
            "ninefuse",
            f"ninefuse-serve {' '.join(options)}",
        )
        if kind == DIOD:
            version = version_of(bench.processes, "dpkg-query", "-W", "-f", "${Version}", DIOD)
            group, note = "peer", "diod, 16 threads (its default)"
        bench.results.rows.append(Row(name, group, tuple(command), version, note))
    return running


def _await(processes: Processes, name: str, server: Process, listen: str) -> None:
    """Wait until a server takes connections. Raises BenchError."""
    kind, _, place = listen.partition(":")
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if kind == "unix":
                with socket.socket(socket.AF_UNIX) as one:
                    one.connect(place)
            else:
                host, port = place.rsplit(":", 1)
                socket.create_connection((host, int(port)), 1).close()
            return
        if processes.wait([server], 0.05):
            raise BenchError(f"{name}: the server ended: {server.collect().complaint}")
        if time.monotonic() > deadline:
            raise BenchError(f"{name}: no answer within {_START_SECONDS:g} s")


def cpu_since(server: Process | None, before: tuple[float, float]) -> tuple[float, float]:
    """Return the server's CPU seconds beyond those before, user and system; none without one."""
    if server is None:
        return 0.0, 0.0
    user, system = server.cpu_seconds()
    return user - before[0], system - before[1]


def rounds(bench: Bench, cells: Sequence[Cell], run: Runner) -> None:
    """Run all cells on all rows, and note the runs; one that fails is noted as failed."""
    results = bench.results
    results.cells = list(cells)
    names = results.names()
    for number in range(1, bench.options.repeat + 1):
        for cell in cells:
            for step in range(len(names)):
                name = names[(step + number) % len(names)]
                bench.processes.check()  # what a guest is waited for hears no signal
                bench.progress(f"round {number}: {cell.title} x{cell.clients}: {name}")
                blank = Run(cell.workload, cell.clients, name, number)
                try:
                    found = run(name, cell)
                except (BenchError, GuestFailed) as error:
                    results.runs.append(dataclasses.replace(blank, error=str(error)))
                    continue
                results.runs.append(_filled(blank, found, cell.unit))
        results.save(bench.options.out)
    results.complete = True


def _filled(blank: Run, found: Measured, unit: str) -> Run:
    user, system = found.server
    return dataclasses.replace(
        blank,
        value=found.value,
        unit=unit,
        seconds=found.seconds,
        client_user=found.user,
        client_system=found.system,
        daemon_user=user,
        daemon_system=system,
    )


def main(
    program: str,
    description: str,
    repeat: int,
    measure: Callable[[Bench], None],
    report: Callable[[Bench], Iterator[str]],
) -> int:
    """Run a benchmark from its command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    add = parser.add_argument
    add("--source", type=Path, metavar="DIR", help="use the file system that DIR is on")
    add("--repeat", type=parse_number, default=repeat, metavar="N", help=f"rounds ({repeat})")
    add("--scale", type=float, default=1.0, metavar="F", help="factor on all amounts (1)")
    out = Path("bench-results") / program
    add("--out", type=Path, default=out, metavar="DIR", help=f"for results (./{out})")
    options = parser.parse_args()
    progress = Progress()
    begin = time.monotonic()
    results = Results()
    code = 0
    with Processes() as processes:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            with scratch_directory(options.source, "clients") as scratch:
                if os.geteuid() == 0:
                    scratch.chmod(0o711)
                source = scratch / "source"
                source.mkdir()
                results.machine = machine(scratch)
                results.versions = versions(processes)
                results.options = {"repeat": options.repeat, "scale": options.scale}
                bench = Bench(processes, scratch, source, results, progress, options)
                measure(bench)
        except Interrupted as signal:
            complain(progress, program, f"interrupted by {signal}")
            code = 128 + signal.number
        except (BenchError, GuestLost, OSError) as error:
            complain(progress, program, str(error))
            code = 1
        if results.runs:
            results.seconds = time.monotonic() - begin
            results.save(options.out)
            for line in report(Bench(processes, Path(), Path(), results, progress, options)):
                say(progress, line)
    return code


def amount(number: int, options: argparse.Namespace) -> int:
    """Return the number by the command line's factor, 8 at least."""
    return max(8, int(number * options.scale))
