"""`make demo`: mount a directory, copy a tree through the mount, time parallel dd, clean up.

All happens in one scratch directory. It, the mounts in it and the processes that use them are
gone at the end, also when a step fails or SIGINT, SIGTERM or SIGHUP comes.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ninefuse.bench import BenchError, Interrupted, Processes, dd
from ninefuse.bench.common import (
    Progress,
    complain,
    describe_machine,
    parse_number,
    parse_numbers,
    say,
    scratch_directory,
)
from ninefuse.bench.mounted import Mounted, ninefuse_command, unmounter
from ninefuse.exitcodes import one_line
from ninefuse.settings import MODELS

CLIENTS = (1, 2, 5, 10)
SOURCE = "source"
# The mounts, and the options of each. The models are served by our own session, where it was built.
MOUNTS = {
    **{model: ("--model", model) for model in MODELS},
    "pyfuse3": ("--model", "second", "--session", "pyfuse3"),
}

# How long all runs of dd are to take, in seconds, and how long one turn of an X may take: its
# cells (the source, and each mount), once each.
_DD_SECONDS = 60.0
_LEAST_SECONDS = 2.0
_MOST_SECONDS = 8.0
# A later turn is left out when it would not end by then, in seconds from the start.
_LATEST_SECONDS = 100.0
_COPY_SECONDS = 60.0  # how long a copy or a comparison may take

# The best run of each cell, by X and by the name of the place.
Best = Mapping[int, Mapping[str, dd.Result]]


@dataclass(frozen=True, slots=True)
class Options:
    """The command line.

    source: the directory to make the scratch directory in, None to choose one. clients: the
    values of X. count: blocks for each dd, None to choose. rounds: runs of each cell. files: how
    many files of each kind the tree has.
    """

    source: Path | None
    clients: tuple[int, ...]
    count: int | None
    rounds: int
    files: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code: 0, 1 if a step failed, 128 + the signal."""
    options = _parse(argv)
    logging.basicConfig(format="demo: %(message)s")
    progress = Progress()
    code = 0
    with Processes() as processes:
        try:
            _demo(processes, options, progress)
            processes.check()
        except Interrupted as signal:
            complain(progress, "demo", f"interrupted by {signal}")
            code = 128 + signal.number
        except BrokenPipeError:
            # Nobody reads on (`| head`). What is still buffered must not fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
        except (BenchError, OSError) as error:
            complain(progress, "demo", str(error))
            code = 1
    return code


def _parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m ninefuse.bench.demo",
        description="Mount a scratch directory under each threading model, copy a tree through "
        "the mounts, and time parallel dd with oflag=sync on them and on the directory itself.",
    )
    add = parser.add_argument
    add("--source", type=Path, metavar="DIR", help="use the file system that DIR is on")
    add(
        "--clients",
        type=parse_numbers,
        default=CLIENTS,
        metavar="X,...",
        help=f"how many dd at a time ({','.join(map(str, CLIENTS))})",
    )
    number = parse_number
    add("--count", type=number, metavar="N", help="blocks for each dd (chosen to fit the time)")
    add("--rounds", type=number, default=2, metavar="N", help="runs of each cell (2)")
    add("--files", type=number, default=60, metavar="N", help="files of each kind to copy (60)")
    return Options(**vars(parser.parse_args(argv)))


def _demo(processes: Processes, options: Options, progress: Progress) -> None:
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(options.source, "demo"))
        for line in describe_machine(scratch):
            say(progress, line)
        source = scratch / SOURCE
        source.mkdir()
        progress("making files")
        make_tree(processes, source / "tree", options.files)

        places = [dd.Place(SOURCE, source, source)]
        for mount, words in MOUNTS.items():
            progress(f"mounting under {mount}")
            mountpoint = scratch / mount
            mountpoint.mkdir()
            command = ninefuse_command(source, mountpoint, *words)
            name = f"the mount under {mount}"
            stack.enter_context(Mounted(processes, name, command, mountpoint))
            places.append(dd.Place(mount, mountpoint, source))

        say(
            progress,
            "\ncp -a from and to the mount; every byte, mode, owner, time and link compared",
        )
        for place in places[1:]:
            progress(f"copying a tree through the mount under {place.name}")
            say(progress, copy_tree(processes, place))

        results = measure(processes, options, places, progress, begin)
        say(progress, "")
        for line in (*table(results), "", *summary(results)):
            say(progress, line)
        progress("unmounting")
    # Said by whoever has looked: the context managers raise an error where something is left.
    say(
        progress,
        f"\nUnmounted with {unmounter()} -u, {one_line(str(scratch))} removed; "
        f"{time.monotonic() - begin:.0f} s in all.",
    )


# The tree, its copy, and the comparison.


def make_tree(processes: Processes, top: Path, files: int) -> None:
    """Make a directory tree of about five times so many files: texts, binaries, links, holes.

    It is the same tree every time, with modes and times of its own.
    """
    rng = random.Random(9)
    top.mkdir()
    made: list[Path] = []

    def make(path: Path, content: bytes) -> None:
        processes.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(rng.choice((0o644, 0o600, 0o755, 0o444)))
        made.append(path)

    for number in range(files):
        words = " ".join(rng.choice(("walk", "read", "write", "clunk")) for _ in range(900))
        make(top / f"text/chapter {number}.txt", f"{words}\n".encode() * (number % 4 + 1))
        make(
            top / "binary" / f"{number % 7}" / f"{number}.bin", rng.randbytes(rng.randrange(60000))
        )
        make(top / f"empty/{number}", b"")
    deep = top / "deep"
    for number in range(min(files, 20)):
        deep /= f"level {number}"
        make(deep / "leaf", b"leaf\n")
    make(top / "large.bin", rng.randbytes(3_000_001))
    make(top / "names" / "-rf", b"a name like an option\n")
    make(top / "names" / "two\nlines", b"a newline in the name\n")
    make(top / "names" / "\u00e4\u6f22\U0001f600", b"not ASCII\n")
    make(top / "names" / ("x" * 255), b"as long as a name may be\n")

    (top / "sparse").mkdir()
    for number in range(3):
        path = top / "sparse" / f"{number}"
        with path.open("wb") as file:
            file.write(b"begin")
            file.seek((number + 1) << 20)
            file.write(b"middle")
            file.truncate((number + 2) << 20)
        made.append(path)

    (top / "links").mkdir()
    for number in range(files):
        processes.check()
        (top / "links" / f"symbolic-{number}").symlink_to(f"../text/chapter {number}.txt")
        (top / "links" / f"hard-{number}").hardlink_to(
            top / "binary" / f"{number % 7}/{number}.bin"
        )
        made.append(top / "links" / f"symbolic-{number}")
    (top / "links" / "dangling").symlink_to("nowhere")
    (top / "links" / "absolute").symlink_to("/dev/null")
    (top / "links" / "loop").symlink_to("loop")

    # Directories last, deepest first: what is made in them changes their times.
    directories = [Path(path) for path, _, _ in os.walk(top, topdown=False)]
    for path in (*made, *directories):
        nanoseconds = rng.randrange(10**9, 17 * 10**17)
        os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)


def copy_tree(processes: Processes, place: dd.Place) -> str:
    """Copy the tree with cp -a, read and written through the mount, compare, remove the copy.

    Returns a line that says how it went. Raises BenchError when something differs.
    """
    tree, copy = "tree", f"copy-{place.name}"
    source = place.backing
    assert source is not None, "of a model's mount"
    begin = time.perf_counter()
    processes.run(
        ["cp", "-a", "--", str(place.directory / tree), str(place.directory / copy)], _COPY_SECONDS
    )
    seconds = time.perf_counter() - begin
    original = list_tree(processes, source / tree)
    # As the mount shows it, and as it stands in the source.
    for top in (place.directory, source):
        compare(processes, source / tree, original, top / copy)
    processes.run(["rm", "-r", "--", str(place.directory / copy)], _COPY_SECONDS)
    sizes = [entry.size for entry in original.values() if entry.kind == "f"]
    return (
        f"{place.name:<8}{len(sizes)} files ({sum(sizes) / 1e6:.1f} MB), "
        f"{len(original) - len(sizes)} links and directories in {seconds:.2f} s: equal"
    )


class Entry(NamedTuple):
    """What find says of one file, times included to the nanosecond.

    kind: f, d or l. links, size: 0 for directories, where file systems count as they like.
    target: of a symlink. twins: the names of the same file in the tree.
    """

    kind: str
    mode: str
    owner: str
    mtime: str
    links: int
    size: int
    target: str
    twins: tuple[str, ...]


def list_tree(processes: Processes, top: Path) -> dict[str, Entry]:
    """Return all below the directory, and it itself as "", by relative path."""
    fields = r"%P\0%y\0%m\0%U:%G\0%T@\0%n\0%s\0%l\0%D:%i\0"
    ended = processes.run(["find", str(top), "-printf", fields], _COPY_SECONDS)
    words = os.fsdecode(ended.output).split("\0")[:-1]
    rows = [words[start : start + 9] for start in range(0, len(words), 9)]
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row[8], []).append(row[0])
    entries = {}
    for path, kind, mode, owner, mtime, links, size, target, inode in rows:
        counts = (0, 0) if kind == "d" else (int(links), int(size))
        twins = tuple(sorted(names[inode]))
        entries[path] = Entry(kind, mode, owner, mtime, *counts, target, twins)
    return entries


def compare(processes: Processes, tree: Path, original: Mapping[str, Entry], copy: Path) -> None:
    """Compare the copy with the tree, of which original is the list: bytes and attributes.

    Raises BenchError with the first difference.
    """
    copied = list_tree(processes, copy)
    for path in sorted(original.keys() | copied.keys()):
        for entries, name in ((original, tree), (copied, copy)):
            if path not in entries:
                raise BenchError(f"{copy} differs from {tree}: no {path!r} in {name}")
        if original[path] != copied[path]:
            raise BenchError(
                f"{copy} differs from {tree}: {path!r} is {copied[path]}, not {original[path]}"
            )
    command = ["diff", "--recursive", "--no-dereference", "--brief", "--", str(tree), str(copy)]
    ended = processes.run(command, _COPY_SECONDS, check=False)
    if ended.returncode != 0:
        said = ended.output.decode(errors="replace").partition("\n")[0]
        raise BenchError(f"{copy} differs from {tree}: {said or ended.complaint}")


# The parallel dd.


def measure(
    processes: Processes,
    options: Options,
    places: Sequence[dd.Place],
    progress: Progress,
    begin: float,
) -> dict[int, dict[str, list[dd.Result]]]:
    """Run every cell once in each round, all places in turn, so that a bad moment hits all alike.

    Argument: begin, the start of the whole run on the monotonic clock: later rounds are left
    out when time is short. Returns the results by X and by name of the place.
    """
    results: dict[int, dict[str, list[dd.Result]]] = {}
    counts: dict[int, int] = {}
    first_dd = time.monotonic()
    for number in range(1, options.rounds + 1):
        for position, clients in enumerate(options.clients):
            cells = results.setdefault(clients, {place.name: [] for place in places})
            if number == 1:
                progress(f"dd x {clients}: choosing a count")
                # What an X took longer than planned is taken from those that come after it.
                left = first_dd + _DD_SECONDS - time.monotonic()
                turns = len(options.clients) * options.rounds - position
                share = min(max(left / turns, _LEAST_SECONDS), _MOST_SECONDS)
                counts[clients] = options.count or dd.choose_count(
                    processes, places, clients, share
                )
            else:
                needed = sum(cell[0].seconds for cell in cells.values())
                if time.monotonic() - begin + needed > _LATEST_SECONDS:
                    continue
            for place in places:
                progress(f"dd x {clients} on {place.name}, round {number} of {options.rounds}")
                cells[place.name].append(dd.run(processes, place, clients, counts[clients]))
    return results


def best(results: Mapping[int, Mapping[str, Sequence[dd.Result]]]) -> Best:
    """Return the fastest run of each cell: what else the machine does only ever slows it down."""
    return {
        clients: {
            name: min(runs, key=lambda result: result.seconds) for name, runs in cells.items()
        }
        for clients, cells in results.items()
    }


def table(results: Mapping[int, Mapping[str, Sequence[dd.Result]]]) -> list[str]:
    """Return the lines of the table: for each X a row, for each place its figures."""
    fewest = min(len(runs) for cells in results.values() for runs in cells.values())
    most = max(len(runs) for cells in results.values() for runs in cells.values())
    if most == 1:
        runs = "one run each"
    else:
        runs = f"best of {most} runs" if fewest == most else f"best of {fewest} to {most} runs"
    lines = [
        f"X parallel dd if=/dev/zero of=... bs=4k count=N oflag=sync; {runs}",
        "s: until the last has ended; MB/s: of all together; ratio: to the source",
        "pyfuse3: the second model, under the session of pyfuse3",
        "",
        "".join((f"{SOURCE:>18}    ", *(f"  {mount:^11}" for mount in MOUNTS))).rstrip(),
        f"{'X':>2} {'N':>6}  {'s':>5} {'MB/s':>5}" + f"  {'MB/s':>5} ratio" * len(MOUNTS),
    ]
    for clients, cells in best(results).items():
        source = cells[SOURCE]
        line = f"{clients:>2} {source.count:>6}"
        line += f"  {_figure(source.seconds, 2)} {_figure(source.rate)}"
        for cell in (cells[mount] for mount in MOUNTS):
            line += f"  {_figure(cell.rate)}"
            line += f" {cell.rate / source.rate:5.2f}"
        lines.append(line)
    return lines


def _figure(value: float, digits: int = 1) -> str:
    """Return the number in five columns, with fewer decimals if it is large."""
    while digits and len(f"{value:.{digits}f}") > 5:
        digits -= 1
    return f"{value:5.{digits}f}"


def summary(results: Mapping[int, Mapping[str, Sequence[dd.Result]]]) -> list[str]:
    """Return the lines below the table: what threads bring, and how far to trust the figures."""
    most = max(results)
    cells = best(results)[most]
    lines = [f"second / none at X={most}: {cells['second'].rate / cells['none'].rate:.2f}"]
    spreads = [
        max(run.seconds for run in runs) / min(run.seconds for run in runs) - 1
        for row in results.values()
        for runs in row.values()
        if len(runs) > 1
    ]
    if spreads:
        spreads.sort()
        lines.append(
            f"Runs of one cell differ by {spreads[len(spreads) // 2]:.0%} (median), "
            f"{spreads[-1]:.0%} at most."
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
