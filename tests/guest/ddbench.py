"""`make guest-bench`: the experiment of 2010, dd in a guest on a directory exported over 9P.

X parallel `dd if=/dev/zero bs=4k oflag=sync` in the guest, each to a file of its own, on mounts of
ninefuse-serve under each model, of diod, both over TCP by QEMU's user network, and of QEMU's own
virtio-9p. All are mounted at once in one guest, with cache=none and the same msize. The source is
dd on the host, beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from guest.benches import DIOD, Bench, Measured, amount, cpu_since, main, rounds, start_servers
from guest.image import ImageError, image
from guest.machine import HOST, Guest, accelerator
from guest.servers import free_port
from ninefuse.bench import BenchError, Process, dd, plots, tables
from ninefuse.bench.catalogue import HEADLINE
from ninefuse.bench.results import Cell, Results, Run, write_file
from ninefuse.bench.rows import SOURCE, Row, version_of

_ABOUT = "dd in a guest on a directory exported over 9P: ninefuse-serve, diod, QEMU."
PROGRAM = "guest-bench"
VIRTIO = "virtio-9p"
MSIZE = 256 * 1024
# Blocks of each dd, by X.
BLOCKS = {1: 600, 2: 500, 3: 400, 5: 300, 10: 200}
_RUN_SECONDS = 300.0


def measure(bench: Bench) -> None:
    """Boot the guest, mount all there, and run the rounds."""
    results = bench.results
    results.rows.append(Row(SOURCE, "source", (), "", "dd on the host, on the directory itself"))
    ports = functools.cache(lambda name: free_port())
    running = start_servers(bench, lambda name: f"tcp:127.0.0.1:{ports(name)}")
    version = version_of(bench.processes, "qemu-system-x86_64", "--version")
    note = "QEMU's own 9P server, security_model=none; its CPU time is not told apart"
    results.rows.append(Row(VIRTIO, "peer", ("qemu",), version, note))
    bench.progress("making the guest")
    try:
        made = image()
    except ImageError as problem:
        raise BenchError(str(problem)) from problem
    results.machine["guest"] = f"Linux {made.release}, 1 CPU by {accelerator()}"
    export = f"local,id=tree,path={bench.source},security_model=none"
    options = ("-fsdev", export, "-device", "virtio-9p-pci,fsdev=tree,mount_tag=tree")
    bench.progress("booting the guest")
    guest = Guest(made, bench.scratch, options)
    try:
        common = f"version=9p2000.L,uname=root,cache=none,msize={MSIZE}"
        for name in results.names("ninefuse", "peer"):
            if name == VIRTIO:
                guest.call("mount", "tree", f"/tmp/{name}", f"trans=virtio,{common}")
                continue
            aname = bench.source if name == DIOD else "/"
            text = f"trans=tcp,port={ports(name)},aname={aname},{common}"
            guest.call("mount", HOST, f"/tmp/{name}", text)
        cells = [_cell(bench, x, count) for x, count in BLOCKS.items()]
        rounds(bench, cells, lambda name, cell: _run(bench, guest, running.get(name), name, cell))
    finally:
        guest.end()


def _cell(bench: Bench, clients: int, count: int) -> Cell:
    blocks, repeat = amount(count, bench.options), bench.options.repeat
    return Cell(HEADLINE, clients, "4k write, O_SYNC", "MB/s", "dd", blocks, True, "", repeat)


def _run(bench: Bench, guest: Guest, server: Process | None, name: str, cell: Cell) -> Measured:
    if name == SOURCE:
        place = dd.Place(name, bench.source, bench.source)
        one = dd.run(bench.processes, place, cell.clients, cell.amount)
        spent = one.spent.clients
        return Measured(one.rate, one.seconds, spent.user, spent.system, (0.0, 0.0))
    before = server.cpu_seconds() if server is not None else (0.0, 0.0)
    words = (f"/tmp/{name}", cell.clients, cell.amount)
    seconds, user, system = guest.call("parallel_dd", *words, seconds=_RUN_SECONDS)
    rate = cell.clients * cell.amount * dd.BLOCK / seconds / 1e6
    return Measured(rate, seconds, user, system, cpu_since(server, before))


def beside_2010(results: Results) -> Results:
    """Return what the plot shows: all but the source, which is far above, and the series' own."""
    rows = [row for row in results.rows if row.name != SOURCE]
    runs = [run for run in results.runs if run.row != SOURCE]
    for model, found in tables.SEED.items():
        rows.append(Row(f"{model}, 2010", "floor", (), ""))
        runs += [
            Run(HEADLINE, clients, rows[-1].name, 1, kilobytes / 1000, "MB/s")
            for clients, kilobytes in found.items()
        ]
    return dataclasses.replace(results, rows=rows, runs=runs)


def report(bench: Bench) -> Iterator[str]:
    """Yield the lines of the tables, and write them and the plot."""
    results = bench.results
    lines = tables.describe(results)
    for table in (*tables.headline(results), *tables.seed(results)):
        lines += ["", *table.text()]
    lines += ["", *tables.scaling(results), *tables.remarks(results)]
    write_file(bench.options.out / "tables.txt", "\n".join(lines) + "\n")
    yield from lines
    with contextlib.suppress(ImportError):  # without matplotlib the tables have to do
        plots.draw(beside_2010(results), bench.options.out)
    yield f"{bench.options.out}: results.json, tables.txt, throughput.svg"


if __name__ == "__main__":
    raise SystemExit(main(PROGRAM, _ABOUT, 3, measure, report))
