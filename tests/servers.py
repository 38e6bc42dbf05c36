"""The models and engines that tests of mounts try, by name."""

from __future__ import annotations

import os

import pytest
from mounting import SOAK

from ninefuse.driving.uring import Refused, Uring
from ninefuse.settings import MODELS

SERVERS = {
    "none": ("--model", "none"),
    "first": ("--model", "first"),
    "second, role": ("--model", "second", "-o", "handover=role"),
    "second, threads": ("--engine", "threads", "-o", "handover=request"),
    "second, uring": ("--model", "second", "--engine", "uring"),
}

# Where what the model does is not the point: test_mount_random.py shows that it changes no answer.
SOME_MODELS = MODELS if SOAK else ("second",)


def servers() -> list[str]:
    """Those to test: the default one, or in a long run all."""
    return list(SERVERS) if SOAK else ["second"]


def options_of(server: str) -> tuple[str, ...]:
    """The options of one of SERVERS, or of "second": the default, with NINEFUSE_ENGINE's engine."""
    if server == "second":
        engine = os.environ.get("NINEFUSE_ENGINE")
        return ("--engine", engine) if engine else ()
    need_engine(server)
    return SERVERS[server]


def need_engine(server: str) -> None:
    """Skip the test where the server uses io_uring and there is none."""
    if "uring" in server:
        try:
            Uring().close()
        except Refused as reason:
            pytest.skip(f"no io_uring here: {reason}")
