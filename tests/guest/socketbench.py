"""`make socket-bench`: 9P clients on the host, over a Unix socket: the server is what limits.

socketclient.c has 1 and 10 connections with one request each under way, to ninefuse-serve under
each model and to diod: synchronous writes of 4 KiB, each connection to a file of its own; and
walks to a file with a getattr and a clunk.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from guest.benches import DIOD, Bench, Measured, amount, cpu_since, main, rounds, start_servers
from ninefuse.bench import BenchError, Process, dd, tables
from ninefuse.bench.results import Cell, write_file

_ABOUT = "9P clients on the host, over a Unix socket: ninefuse-serve and diod."
PROGRAM = "socket-bench"
CLIENT = Path(__file__).with_name("socketclient.c")
CLIENTS = (1, 10)
# Of each connection: its kind for the client, title, unit, how many at each number of clients.
KINDS = (
    ("write", "4k write, O_SYNC", "MB/s", {1: 1000, 10: 400}),
    ("walk", "walk + getattr + clunk", "1/s", {1: 4000, 10: 800}),
)
_WALKED = "walked"
_BUILD_SECONDS = 60.0
_RUN_SECONDS = 120.0
_serial = itertools.count(1)


def measure(bench: Bench) -> None:
    """Compile the client, start the servers, and run the rounds."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchError("no cc or gcc in PATH to compile the client with")
    client = bench.scratch / "socketclient"
    bench.processes.run([compiler, "-O2", "-o", str(client), str(CLIENT)], _BUILD_SECONDS)
    (bench.source / _WALKED).touch()
    running = start_servers(bench, lambda name: f"unix:{bench.scratch / name}")
    cells = [
        Cell(
            kind,
            clients,
            title,
            unit,
            "socketclient",
            amount(counts[clients], bench.options),
            True,
            "",
            bench.options.repeat,
        )
        for kind, title, unit, counts in KINDS
        for clients in CLIENTS
    ]
    rounds(bench, cells, lambda name, cell: _run(bench, client, running[name], name, cell))


def _run(bench: Bench, client: Path, server: Process, name: str, cell: Cell) -> Measured:
    aname = str(bench.source) if name == DIOD else "/"
    file = _WALKED if cell.workload == "walk" else f"written-{next(_serial)}"
    words = [str(client), str(bench.scratch / name), aname, cell.workload]
    words += [str(cell.clients), str(cell.amount), file]
    before = server.cpu_seconds()
    said = json.loads(bench.processes.run(words, _RUN_SECONDS).output)
    used = cpu_since(server, before)
    if cell.workload == "write":
        for path in bench.source.glob(f"{file}-*"):
            if path.stat().st_size != cell.amount * dd.BLOCK:
                raise BenchError(f"{name}: {path.name} has {path.stat().st_size} bytes")
            path.unlink()
    size = dd.BLOCK / 1e6 if cell.workload == "write" else 1
    rate = cell.clients * cell.amount * size / said["seconds"]
    return Measured(rate, said["seconds"], said["user"], said["system"], used)


def report(bench: Bench) -> Iterator[str]:
    """Yield the lines of the tables, and write them."""
    results = bench.results
    lines = tables.describe(results)
    for table in (*tables.others(results), *tables.details(results)):
        lines += ["", *table.text()]
    lines += tables.remarks(results)
    write_file(bench.options.out / "tables.txt", "\n".join(lines) + "\n")
    yield from lines
    yield f"{bench.options.out}: results.json, tables.txt"


if __name__ == "__main__":
    raise SystemExit(main(PROGRAM, _ABOUT, 5, measure, report))
