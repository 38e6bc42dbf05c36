"""The table that ninefuse-stat prints."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ninefuse.stats.snapshot import Lock, Operation, Period, percentile, total

WIDTH = 80  # columns


def table(period: Period, rows: int | None = None) -> list[str]:
    """Return the lines of the table, none of them longer than WIDTH.

    What is always there comes first, so that it stands still when the table is drawn again.

    Argument: rows, how many lines there may be; None, or a number too small to be of use, sets
    no limit. The operations with the lowest rates are left out for it.
    """
    end = period.end
    uses = [
        ("requests", f"{end.running} running, {end.queued} queued, {end.held_back} held back"),
        ("fids", f"{end.fids}, {end.open_fids} of them open"),
        ("descriptors", f"{end.descriptors}, {end.nodes} of them for nodes"),
        ("memory", f"{end.memory / 1e6:.1f} MB"),
    ]
    lines = [
        f"{_shortened(end.source, 36)} on {_shortened(end.mountpoint, 36)}",
        f"ninefuse {end.ninefuse}, pid {end.pid}, up {_age(end.uptime)}; "
        f"model {end.model}, {_number_of(end.threads, 'thread')}",
        "",
        *(f"{name:<12}{use}" for name, use in uses),
        "",
        f"{'lock':<12}{'waits':>7} {'waited':>8} {'longest':>8}  now",
        *(_lock_line(name, lock) for name, lock in period.locks.items()),
        "",
        f"{_clock(end.time)}, {_span(period)}",
    ]
    operations = sorted(period.operations.items(), key=lambda item: (-item[1].count, item[0]))
    if operations:
        lines.append(
            _row("operation", "per s", "p50", "p90", "p99", "max", "disp", "cross", "errors")
        )
        if len(operations) > 1:
            operations.insert(0, ("all", total(period.operations.values())))
        lines.extend(_operation_line(name, o, period.seconds) for name, o in operations)
        if rows is not None and rows < len(lines) and len(lines) - len(operations) < rows - 1:
            left_out = len(lines) - rows + 1
            lines[rows - 1 :] = [f"({left_out} more, less frequent)"]
    return [line[:WIDTH].rstrip() for line in lines]


def _row(name: str, *columns: str) -> str:
    rate, p50, p90, p99, most, share, crossings, errors = columns
    return (
        f"{name:<11.11} {rate:>7} {p50:>7} {p90:>7} {p99:>7} {most:>7} "
        f"{share:>4} {crossings:>5} {errors:.17}"
    )


def _operation_line(name: str, operation: Operation, seconds: float) -> str:
    count = operation.count
    return _row(
        name,
        _rate(count / seconds) if seconds else "-",
        *(_duration(percentile(operation.latencies, percent)) for percent in (50, 90, 99, 100)),
        f"{operation.on_dispatcher / count:.0%}",
        f"{operation.crossings / count:.1f}",
        _errors(operation.errors, 17),
    )


def _lock_line(name: str, lock: Lock) -> str:
    now = []
    if lock.writing:
        now.append("a writer")
    if lock.readers:
        now.append(_number_of(lock.readers, "reader"))
    if lock.waiting:
        now.append(f"{lock.waiting} waiting")
    waited, longest = (_duration(seconds * 1e6) for seconds in (lock.waited, lock.longest_wait))
    return f"{name:<12.12}{lock.waits:>7} {waited:>8} {longest:>8}  {', '.join(now) or 'free'}"


def _errors(errors: Mapping[str, int], width: int) -> str:
    """Return the errors with their counts, the most frequent first, as many as fit.

    What does not fit is a number at the end: of the requests, as the others are.
    """
    counts = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    for shown in range(len(counts), 0, -1):
        parts = [f"{name} {count}" for name, count in counts[:shown]]
        rest = sum(count for _, count in counts[shown:])
        if rest:
            parts.append(f"+{rest}")
        if len(text := ", ".join(parts)) <= width:
            return text
    return str(sum(errors.values())) if errors else ""


def _span(period: Period) -> str:
    span = f"{period.seconds:.1f} s" if period.seconds < 600 else _age(period.seconds)
    span = f"the {span} since the mount" if period.whole else f"the last {span}"
    return span if period.operations else f"{span}: no requests"


def _rate(value: float) -> str:
    if value >= 1e6:
        return f"{_three_digits(value / 1e6)}M"
    return _three_digits(value) if value >= 0.01 else "<0.01"


def _duration(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    if microseconds == 0:
        return "0 s"
    if microseconds < 1e3:
        return f"{_three_digits(microseconds)} us"
    if microseconds < 1e6:
        return f"{_three_digits(microseconds / 1e3)} ms"
    return f"{_three_digits(microseconds / 1e6)} s"


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def _age(seconds: float) -> str:
    """Return a time in the two units that fit it."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _number_of(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _shortened(path: str, width: int) -> str:
    """Return the path in at most so many columns. Its end says more than its beginning."""
    return path if len(path) <= width else f"...{path[3 - width :]}"
