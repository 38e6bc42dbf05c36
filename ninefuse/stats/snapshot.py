"""What a mount says of itself at one time, and what it did between two times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ninefuse.exitcodes import one_line
from ninefuse.stats import ATTRIBUTE, Problem

VERSION = 2  # of the snapshots that are understood here


@dataclass(frozen=True, slots=True)
class Operation:
    """What was counted of the requests of one callback.

    count: those that were answered. errors: how many with which errno. on_dispatcher: how many
    never left the dispatcher. crossings: changes of thread, of all together. latencies: how many
    took less than so many microseconds and no less than the bound before.
    """

    count: int
    errors: Mapping[str, int]
    on_dispatcher: int
    crossings: int
    latencies: Mapping[float, int]


@dataclass(frozen=True, slots=True)
class Lock:
    """The waits for one lock so far, in seconds, and who holds and wants it now."""

    waits: int
    waited: float
    longest_wait: float
    readers: int
    writing: bool
    waiting: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters of a mount at one moment.

    time: Unix time. uptime: seconds since it was mounted. operations: by callback. running,
    queued, held_back: requests now. fids, open_fids; descriptors, of which nodes are the ones
    that stand for files; memory: resident, in bytes.
    """

    ninefuse: str
    pid: int
    source: str
    mountpoint: str
    model: str
    threads: int
    time: float
    uptime: float
    operations: Mapping[str, Operation]
    running: int
    queued: int
    held_back: int
    locks: Mapping[str, Lock]
    fids: int
    open_fids: int
    descriptors: int
    nodes: int
    memory: int


class _Fields:
    """An object of the JSON text, whose members are asked for by type.

    Each raises ValueError, with the member's name, when it is not there or something else.
    """

    def __init__(self, value: object, name: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no object")
        self._members: dict[str, Any] = value
        self._name = name

    def integer(self, key: str) -> int:
        value = self._members.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
            raise self._wrong(key, "count")
        return value

    def seconds(self, key: str) -> float:
        value = self._members.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
            raise self._wrong(key, "number of seconds")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self._members.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self._members.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return one_line(value)

    def fields(self, key: str) -> _Fields:
        return _Fields(self._members.get(key), f"{self._name}.{key}")

    def each(self, key: str) -> dict[str, _Fields]:
        """Return the members of a member, all of which are objects."""
        inner = self.fields(key)
        return {name: inner.fields(name) for name in inner._members}

    def counts(self, key: str) -> dict[str, int]:
        inner = self.fields(key)
        return {name: inner.integer(name) for name in inner._members}

    def _wrong(self, key: str, wanted: str) -> ValueError:
        return ValueError(f"{self._name}.{key} is no {wanted}")


def parse(text: str) -> Snapshot:
    """Return the snapshot that the JSON text holds.

    Raises Problem when it is not one, or one of a version that this command does not know.
    """
    try:
        value = json.loads(text)
        top = _Fields(value, "the value")
        if value.get("version") != VERSION:
            raise Problem(
                f"the mount's counters are of version {value.get('version')!r}, and this command "
                f"knows {VERSION} only: update ninefuse, and mount anew"
            )
        requests, fids = top.fields("requests"), top.fields("fids")
        descriptors = top.fields("descriptors")
        return Snapshot(
            ninefuse=top.text("ninefuse"),
            pid=top.integer("pid"),
            source=top.text("source"),
            mountpoint=top.text("mountpoint"),
            model=top.text("model"),
            threads=top.integer("threads"),
            time=top.seconds("time"),
            uptime=top.seconds("uptime"),
            operations={
                one_line(name): _operation(fields)
                for name, fields in top.each("operations").items()
            },
            running=requests.integer("running"),
            queued=requests.integer("queued"),
            held_back=requests.integer("held_back"),
            locks={one_line(name): _lock(fields) for name, fields in top.each("locks").items()},
            fids=fids.integer("known"),
            open_fids=fids.integer("open"),
            descriptors=descriptors.integer("open"),
            nodes=descriptors.integer("nodes"),
            memory=top.fields("memory").integer("resident"),
        )
    except (ValueError, RecursionError) as error:
        raise Problem(f"the attribute {ATTRIBUTE} holds no counters: {error}") from None


def _operation(fields: _Fields) -> Operation:
    latencies = {float(bound): n for bound, n in fields.counts("latency_us").items()}
    if not all(bound >= 0 for bound in latencies):  # nor is NaN
        raise ValueError("a latency is no duration")
    return Operation(
        fields.integer("count"),
        {one_line(name): count for name, count in fields.counts("errors").items()},
        fields.integer("on_dispatcher"),
        fields.integer("crossings"),
        latencies,
    )


def _lock(fields: _Fields) -> Lock:
    return Lock(
        fields.integer("waits"),
        fields.seconds("waited"),
        fields.seconds("longest_wait"),
        fields.integer("readers"),
        fields.boolean("writing"),
        fields.integer("waiting"),
    )


# What happened in a time.


@dataclass(frozen=True, slots=True)
class Period:
    """What a table shows: what was counted in a time, and how things are at its end.

    seconds: how long it was. whole: whether it is all the time since the mount. operations:
    those that were called in it. locks: with its waits, but the longest one ever.
    """

    seconds: float
    whole: bool
    operations: Mapping[str, Operation]
    locks: Mapping[str, Lock]
    end: Snapshot


def since_mount(snapshot: Snapshot) -> Period:
    """Return the time from the mount to the snapshot."""
    operations = {name: o for name, o in snapshot.operations.items() if o.count}
    return Period(snapshot.uptime, True, operations, snapshot.locks, snapshot)


def between(earlier: Snapshot, later: Snapshot) -> Period:
    """Return the time between two snapshots.

    If they are not two of one daemon it is the time since the mount. The same goes where the
    clock was set back, or nothing new was published: then there is no time between them.
    """
    if later.pid != earlier.pid or later.uptime < earlier.uptime or later.time <= earlier.time:
        return since_mount(later)
    operations = {}
    for name, operation in later.operations.items():
        difference = _since(earlier.operations.get(name), operation)
        if difference.count:
            operations[name] = difference
    locks = {}
    for name, lock in later.locks.items():
        before = earlier.locks.get(name)
        waits, waited = (before.waits, before.waited) if before else (0, 0.0)
        locks[name] = replace(
            lock, waits=max(0, lock.waits - waits), waited=max(0.0, lock.waited - waited)
        )
    return Period(later.time - earlier.time, False, operations, locks, later)


def _since(earlier: Operation | None, later: Operation) -> Operation:
    if earlier is None:
        return later
    return Operation(
        max(0, later.count - earlier.count),
        Counter(later.errors) - Counter(earlier.errors),  # leaves out what is not above zero
        max(0, later.on_dispatcher - earlier.on_dispatcher),
        max(0, later.crossings - earlier.crossings),
        _minus(later.latencies, earlier.latencies),
    )


def _minus(later: Mapping[float, int], earlier: Mapping[float, int]) -> dict[float, int]:
    differences = {bound: count - earlier.get(bound, 0) for bound, count in later.items()}
    return {bound: count for bound, count in differences.items() if count > 0}


def total(operations: Iterable[Operation]) -> Operation:
    """Return what was counted of all the operations together."""
    errors: Counter[str] = Counter()
    latencies: Counter[float] = Counter()
    count = on_dispatcher = crossings = 0
    for operation in operations:
        count += operation.count
        on_dispatcher += operation.on_dispatcher
        crossings += operation.crossings
        errors.update(operation.errors)
        latencies.update(operation.latencies)
    return Operation(count, errors, on_dispatcher, crossings, latencies)


def percentile(latencies: Mapping[float, int], percent: int) -> float | None:
    """Return the bound in microseconds below which that share of the durations lies.

    It is the upper bound of the bucket in which the share is reached, and None when there are
    no durations.
    """
    durations = sum(latencies.values())
    # Rounded up: of three durations, half is reached by the second one. In whole numbers, since
    # a fraction that is a little off would take the next bucket.
    rank = -(-durations * percent // 100)
    for bound in sorted(latencies):
        rank -= latencies[bound]
        if rank <= 0:
            return bound
    return None
