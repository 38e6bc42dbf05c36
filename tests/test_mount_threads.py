"""The threads of a daemon: how many, and where they may run."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from mounting import Mount
from servers import need_engine


def affinities(mount: Mount) -> list[set[int]]:
    """The processors of the dispatcher and of each worker."""
    tasks = os.listdir(f"/proc/{mount.pid}/task")
    return [os.sched_getaffinity(int(task)) for task in tasks]


@pytest.mark.parametrize("model", ["first", "second"])
def test_dispatcher_and_workers_share_one_processor(
    new_mount: Callable[..., Mount], model: str
) -> None:
    options = ("--engine", "threads", "-o", "handover=request")
    found = affinities(new_mount("--model", model, "--threads", "3", *options))
    assert len(found) >= 4
    assert len(set.union(*found)) == 1


def test_with_io_uring_they_go_where_they_like(new_mount: Callable[..., Mount]) -> None:
    """The kernel's threads go with the dispatcher, and would share its processor, too."""
    need_engine("uring")
    for cpus in affinities(new_mount("--engine", "uring")):
        assert cpus == os.sched_getaffinity(0)


def test_those_who_lead_in_turn_go_where_they_like(new_mount: Callable[..., Mount]) -> None:
    for cpus in affinities(new_mount()):
        assert cpus == os.sched_getaffinity(0)


def test_they_go_where_they_like_if_told_so(new_mount: Callable[..., Mount]) -> None:
    for cpus in affinities(new_mount("-o", "cpus=all")):
        assert cpus == os.sched_getaffinity(0)


def test_without_workers_there_is_nothing_to_share(new_mount: Callable[..., Mount]) -> None:
    for cpus in affinities(new_mount("--model", "none")):
        assert cpus == os.sched_getaffinity(0)
