"""What is measured: a class for each kind of workload, which runs it once on one row.

Real programs do the work: dd, fio, coreutils, find, grep; the measuring client (client.py) where
there is none. Each run has a directory of its own, of a name never used before, so that the mount
knows nothing of it. What it holds is made in the source directly; it is removed through the mount,
or a daemon that keeps a descriptor for each inode would run out of them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ninefuse.bench import BenchError, Processes, dd
from ninefuse.bench.counters import Both, Spent
from ninefuse.bench.users import Unsupported, Users

CLIENT = Path(__file__).with_name("client.py")

LIMIT = 60.0  # how long the programs of one run may take, in seconds
_START_SECONDS = 0.12  # what a client takes to be ready, and what each further one adds
_START_MORE = 0.03

_serial = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run took.

    seconds: real time. value: in the workload's unit. spent: by the clients, and by the server
    meanwhile, whose CPU time is to a clock tick. operations: how many there were, which counts
    are told for. command: of the first client, with DIR for the directory it worked in.
    """

    seconds: float
    value: float
    spent: Both
    operations: int
    command: str


@dataclass(frozen=True)
class Workload:
    """One workload; `run` is the subclasses'.

    key: for --workload and results.json. title: for tables. unit: of the values. tool: the
    program that does it. amount: of operations, bytes or blocks, of all clients together.
    more_is_better: False for seconds. note: what else the reader must know. one: what
    system calls and context switches are told for one of. users: as whom the clients come.
    """

    key: str
    title: str
    unit: str
    tool: str
    amount: int = 1
    more_is_better: bool = True
    note: str = ""
    one: str = "block"
    users: Users = Users()

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        """Run once. Raises BenchError, and Unsupported when the row cannot do it."""
        raise NotImplementedError

    def share(self, clients: int) -> int:
        """Return each client's part of the amount."""
        return max(1, self.amount // clients)


def parallel(
    processes: Processes, place: dd.Place, commands: Sequence[Sequence[str]], limit: float = LIMIT
) -> dd.Together:
    """Run the commands at once, on the place.

    Raises BenchError when one fails or they do not end in time.
    """
    return dd.together(processes, place, commands, limit, commands[0][0], "failed")


@contextlib.contextmanager
def fresh(processes: Processes, place: dd.Place) -> Iterator[dd.Place]:
    """Give a new directory, and remove it through the mount."""
    name = f"dir-{next(_serial)}"
    if place.backing is None:
        # Nothing to remove: what the workloads create there they remove themselves.
        yield replace(place, directory=place.directory / name)
        return
    (place.backing / name).mkdir()
    try:
        yield replace(place, directory=place.directory / name, backing=place.backing / name)
    except BaseException:
        # Natively: the mount may hang, and perhaps was why it failed.
        shutil.rmtree(place.backing / name, ignore_errors=True)
        raise
    processes.run(["rm", "-rf", "--", str(place.directory / name)], LIMIT)


def measured(
    value: float,
    together: dd.Together,
    operations: int,
    command: Sequence[str],
    place: dd.Place,
    seconds: float | None = None,
) -> Measured:
    """Return the result. Argument: seconds, if the clients timed themselves."""
    return Measured(
        together.seconds if seconds is None else seconds,
        value,
        together.spent,
        operations,
        shlex.join(command).replace(str(place.directory), "DIR"),
    )


# dd.


@dataclass(frozen=True)
class SyncWrite(Workload):
    """The headline: X dd of 4 KiB blocks with O_SYNC. amount: blocks of each, set per X."""

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        if not self.users:
            result = dd.run(processes, place, clients, self.amount)
        else:
            with fresh(processes, place) as here:
                self.users.open(processes, here)
                starts = [self.users.start(client) for client in range(clients)]
                result = dd.run(processes, here, clients, self.amount, starts)
        command = f"dd if=/dev/zero of=DIR/FILE bs=4k count={self.amount} oflag=sync"
        operations = clients * self.amount
        return Measured(result.seconds, result.rate, result.spent, operations, command)


@dataclass(frozen=True)
class Write(Workload):
    """dd to a new file for each client. amount: bytes. block: of one write; words: for dd."""

    block: int = 4096
    words: tuple[str, ...] = ()

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        count = max(1, self.share(clients) // self.block)
        with fresh(processes, place) as here:
            self.users.open(processes, here)
            files = [here.directory / f"out-{number}" for number in range(clients)]
            numbers = [f"bs={self.block}", f"count={count}", *self.words]
            commands = [
                [*self.users.start(client), "dd", "if=/dev/zero", f"of={file}", *numbers]
                for client, file in enumerate(files)
            ]
            together = parallel(processes, here, commands)
            for file in files if here.backing else ():
                size = (here.backing / file.name).stat().st_size if here.backing else 0
                if size != count * self.block:
                    raise BenchError(f"{file.name} has {size} bytes instead of what was written")
            processes.run(["rm", "--", *map(str, files)], LIMIT)
        blocks = clients * count
        rate = blocks * self.block / 1e6 / together.seconds
        return measured(rate, together, blocks, commands[0], here)


def _make_files(processes: Processes, place: dd.Place, clients: int, size: int) -> list[Path]:
    """Make a file of that size, full of zeros, for each client; in memory and on the disk."""
    names = [f"file-{size}-{number}" for number in range(clients)]
    for name in names if place.backing else ():
        # Written out: only then can its pages be dropped.
        command = ["dd", "if=/dev/zero", f"of={place.backing}/{name}", "bs=1M", "conv=fsync"]
        processes.run([*command, f"count={size}", "iflag=count_bytes"], LIMIT)
    return [place.directory / name for name in names]


@dataclass(frozen=True)
class Read(Workload):
    """dd of a file, at 1 MiB. amount: bytes.

    cached: whether it is in the source's cache, and read past the mount's, each MiB by one request
    (O_DIRECT; of the source itself just from its cache). Otherwise no cache has it.
    """

    cached: bool = False

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        size = self.share(clients)
        with fresh(processes, place) as here:
            self.users.open(processes, here)
            files = _make_files(processes, here, clients, size)
            for file in files if here.backing and not self.cached else ():
                # The mount has never seen it; this drops it from the source's cache.
                drop = ["dd", f"if={here.backing}/{file.name}", "iflag=nocache", "count=0"]
                processes.run(drop, LIMIT)
            past = ["iflag=direct"] if self.cached and here.backing != here.directory else []
            commands = [
                [*self.users.start(client), "dd", f"if={file}", "of=/dev/null", "bs=1M", *past]
                for client, file in enumerate(files)
            ]
            together = parallel(processes, here, commands)
            for one in together.ended:
                if f"\n{size} bytes" not in f"\n{one.errors}":
                    raise BenchError(f"dd did not read {size} bytes: {one.complaint}")
        rate = clients * size / 1e6 / together.seconds
        blocks = clients * max(1, size // 1_048_576)
        return measured(rate, together, blocks, commands[0], here)


# Random reads.


@dataclass(frozen=True)
class FioRead(Workload):
    """fio, random 4 KiB reads, one job for each client. amount: reads."""

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        if self.users:
            raise Unsupported("fio is one user's process")
        count = self.share(clients)
        size = readable_bytes(count)
        with fresh(processes, place) as here:
            _make_files(processes, here, clients, size)
            command = ["fio", "--name=reads", f"--directory={here.directory}"]
            command += [f"--filename_format=file-{size}-$jobnum", f"--numjobs={clients}"]
            command += ["--rw=randread", "--bs=4k", f"--size={size}", f"--io_size={count * 4096}"]
            command += ["--ioengine=psync", "--invalidate=0", "--randrepeat=1", "--thread"]
            command += ["--group_reporting", "--output-format=json"]
            together = parallel(processes, here, [command])
        try:
            output = together.ended[0].output
            text = output[output.index(b"{") :]  # fio may print remarks before the object
            read = json.loads(text)["jobs"][0]["read"]
            done, seconds = read["total_ios"], read["runtime"] / 1000
            rate = read["iops"]
        except (ValueError, KeyError, IndexError) as error:
            raise BenchError(f"fio: its output is not as expected: {error!r}") from error
        if done != clients * count:
            raise BenchError(f"fio read {done} blocks instead of {clients * count}")
        return measured(rate, together, done, command, here, seconds)


# The measuring client.


@dataclass(frozen=True)
class Metadata(Workload):
    """The measuring client. amount: operations.

    operation: the client's name for it. prepare: makes what a client needs, given the place, the
    client's prefix there and its count. prefix: how names begin, which tells the null server what
    they are; {bytes} is the size of a file to read. shared: whether all clients work in one
    directory.
    """

    one: str = "operation"
    operation: str = ""
    prepare: Callable[[Path, int], object] | None = None
    prefix: str = "name-"
    shared: bool = False

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        count = self.share(clients)
        with fresh(processes, place) as here:
            self.users.open(processes, here)
            prefixes = []
            for number in range(clients):
                parent = f"dir-{'all' if self.shared else number}"
                start = self.prefix.replace("{bytes}", str(readable_bytes(count)))
                prefix = f"{parent}/{start}{number}-"
                if here.backing is not None:
                    (here.backing / parent).mkdir(exist_ok=True)
                    if self.users:
                        (here.backing / parent).chmod(0o777)
                    if self.prepare is not None:
                        self.prepare(here.backing / prefix, count)
                        self.users.give(here.backing / prefix, number)
                prefixes.append(str(here.directory / prefix))
            return run_clients(processes, self.operation, count, prefixes, here, users=self.users)


@dataclass(frozen=True)
class Listing(Workload):
    """The measuring client lists directories. amount: directories; each: names in one."""

    one: str = "name"
    each: int = 200

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        count = self.share(clients)
        with fresh(processes, place) as here:
            self.users.open(processes, here)
            prefixes = []
            for number in range(clients):
                prefix = f"dir-{self.each}-{number}-"
                for directory in range(count) if here.backing else ():
                    path = Path(f"{here.backing}/{prefix}{directory}")
                    path.mkdir()
                    make_files(path / "file-0-", self.each)
                prefixes.append(str(here.directory / prefix))
            names = count * self.each
            return run_clients(
                processes, "readdir", count, prefixes, here, expected=names, users=self.users
            )


def make_files(prefix: Path, count: int) -> None:
    """Make so many empty files of numbered names, in the source."""
    for number in range(count):
        os.close(os.open(f"{prefix}{number}", os.O_WRONLY | os.O_CREAT, 0o644))


def make_one(prefix: Path, count: int) -> None:
    """Make the one file that is used again and again, in the source."""
    prefix.write_bytes(bytes(4096))


def make_readable(prefix: Path, count: int) -> None:
    """Make a file with twice as many blocks as will be read, in the source."""
    prefix.write_bytes(bytes(readable_bytes(count)))


def readable_bytes(count: int) -> int:
    """Return the size of a file of which so many blocks are read at random."""
    return 2 * count * 4096


def run_clients(
    processes: Processes,
    operation: str,
    count: int,
    prefixes: Sequence[str],
    place: dd.Place,
    expected: int | None = None,
    users: Users | None = None,
) -> Measured:
    """Run a client for each prefix, all beginning at one instant.

    Arguments: expected, what each must have done, count by default; users, as whom they come.
    Raises BenchError when one fails or did less.
    """
    at = time.monotonic() + _START_SECONDS + _START_MORE * len(prefixes)
    words = [sys.executable, "-I", "-S", str(CLIENT), f"--at={at:.6f}"]

    def all_do(operation: str, count: int) -> dd.Together:
        commands = []
        for number, prefix in enumerate(prefixes):
            user = [f"--user={users.of(number)}"] if users else []
            commands.append([*words, *user, operation, str(count), prefix])
        return parallel(processes, place, commands)

    together = all_do(operation, count)
    calls = together.spent.clients.calls
    if calls is not None:  # less those of as many clients that only start and end
        calls -= all_do("missing", 0).spent.clients.calls or 0
    reports = [json.loads(one.output) for one in together.ended]
    for report in reports:
        if report["done"] != (expected or count):
            raise BenchError(f"{operation}: {report['done']} done instead of {expected or count}")
    seconds = max(report["end"] for report in reports) - min(report["begin"] for report in reports)
    done = sum(report["done"] for report in reports)
    command = ["python", "-I", "-S", "client.py", "--at=INSTANT"]
    command += [operation, str(count), prefixes[0]]
    clients = Spent(
        sum(report["user"] for report in reports),
        sum(report["system"] for report in reports),
        sum(report["voluntary"] for report in reports),
        sum(report["forced"] for report in reports),
        calls,
    )
    return Measured(
        seconds,
        done / seconds,
        Both(clients, together.spent.server),
        done,
        shlex.join(command).replace(str(place.directory), "DIR"),
    )
