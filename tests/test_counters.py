"""What is counted of requests: latencies in buckets, and crossings from thread to thread."""

from __future__ import annotations

import threading

import pytest
from helpers_executor import answer, drive
from hypothesis import given
from hypothesis import strategies as st

from ninefuse.calls import blocking
from ninefuse.driving.counters import Latencies
from ninefuse.executor import Executor
from ninefuse.locks import RenameLock

MICROSECOND = 1000  # nanoseconds
HOUR = 3600 * 10**9


@given(st.integers(min_value=0, max_value=HOUR))
def test_a_duration_lies_just_below_its_buckets_bound(nanoseconds: int) -> None:
    latencies = Latencies()
    latencies.add(nanoseconds)
    ((bound, count),) = latencies.buckets().items()
    assert count == 1
    upper = float(bound) * MICROSECOND
    rounding = 1e-4  # the text has five digits
    assert nanoseconds < upper * (1 + rounding)
    assert upper <= max(nanoseconds, 1) * 2**0.25 * (1 + rounding)


def test_buckets_rise_and_count() -> None:
    latencies = Latencies()
    for nanoseconds in (0, 1, 2, 1_000_000, 1_000_001, 2**63):
        latencies.add(nanoseconds)
    buckets = latencies.buckets()
    assert list(buckets.values()) == [2, 1, 2, 1]
    assert list(buckets)[:2] == ["0.0011892", "0.0023784"]
    bounds = [float(bound) for bound in buckets]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("calls", [0, 1, 3, 7])
@pytest.mark.parametrize("model", ["none", "first", "second"])
def test_crossings_are_counted_from_the_threads_that_calls_ran_on(model: str, calls: int) -> None:
    """0 under none; two for each blocking call under first; two at most under second."""
    threads: list[int] = []

    async def body() -> None:
        threads.append(threading.get_ident())
        for _ in range(calls):
            await blocking(None, lambda: threads.append(threading.get_ident()))
            threads.append(threading.get_ident())

    async def scenario(executor: Executor) -> int:
        await answer(executor, "body", body())
        threads.append(threading.get_ident())
        return executor.answered["body"].crossings

    crossings = drive(model, 4, scenario)
    assert crossings == sum(a != b for a, b in zip(threads, threads[1:], strict=False))
    assert crossings == {"none": 0, "first": 2 * calls, "second": 2 * min(calls, 1)}[model]


@pytest.mark.parametrize("model", ["none", "first", "second"])
def test_what_is_answered_is_counted_by_name_errors_too(model: str) -> None:
    async def fails() -> None:
        await blocking(None, int, "no number")

    async def stays() -> None:
        async with RenameLock().reading:
            pass

    async def scenario(executor: Executor) -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="no number"):
                await answer(executor, "fails", fails())
        await answer(executor, "stays", stays())
        fails_, stays_ = executor.answered["fails"], executor.answered["stays"]
        assert (fails_.count, stays_.count) == (3, 1)
        assert fails_.on_dispatcher == (3 if model == "none" else 0)
        assert stays_.on_dispatcher == 1
        assert sum(fails_.latencies.buckets().values()) == 3
        assert sum(stays_.latencies.buckets().values()) == 1

    drive(model, 2, scenario)
