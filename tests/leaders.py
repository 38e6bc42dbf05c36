"""What tests of leader and followers share: a session led in turn, messages, a call that is stuck.

A module has the fixtures `driver` and `foreseen` by importing them, beside one of its own that is
called `kernel`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_executor import passed
from mounting import wait_until
from wire_kernel import Kernel, serving
from wire_messages import pack

from ninefuse.driving.request import Request
from ninefuse.executor import LeadingModel
from ninefuse.fuse.leading import Leading
from ninefuse.fuse.opcodes import Opcode

SIZE = 4096


@contextmanager
def led_in_turn(directory: Path, files: dict[str, bytes]) -> Iterator[Kernel]:
    """A session whose threads lead in turn, on a directory with these files."""
    for name, content in files.items():
        (directory / name).write_bytes(content)
    with serving(directory, "role") as kernel:
        kernel.init()
        kernel.wait_for_leaders()
        yield kernel


@pytest.fixture
def driver(kernel: Kernel) -> LeadingModel:
    assert isinstance(kernel.driver, LeadingModel)
    return kernel.driver


@pytest.fixture
def foreseen(driver: LeadingModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the callbacks whose calls were made ahead."""
    names: list[str] = []

    def foresee(request: Request, real: Callable[[Request], bool] = driver.foresee) -> bool:
        names.append(request.name)
        return real(request)

    monkeypatch.setattr(driver, "foresee", foresee)
    return names


def leading(kernel: Kernel) -> Leading:
    assert isinstance(kernel.driver, LeadingModel)
    assert isinstance(kernel.driver.crew, Leading)
    return kernel.driver.crew


def writing(handle: int, data: bytes, offset: int = 0) -> bytes:
    return pack("write_in", handle, offset, len(data), 0, 0, 0, 0) + data


def reading(handle: int, size: int, offset: int = 0) -> bytes:
    return pack("read_in", handle, offset, size, 0, 0, 0, 0)


def syncing(handle: int) -> bytes:
    return pack("fsync_in", handle, 1, 0)


def count_of(count: int) -> bytes:
    """As a write answers it."""
    return count.to_bytes(8, "little")


def nodeid_of(kernel: Kernel, name: bytes) -> int:
    return int.from_bytes(kernel.get(Opcode.LOOKUP, name + b"\0")[:8], "little")


def opened(kernel: Kernel, name: bytes, flags: int = os.O_RDWR) -> int:
    said = kernel.get(Opcode.OPEN, pack("open_in", flags, 0), nodeid_of(kernel, name))
    kernel.settle()  # so that the next call may be made ahead
    return int.from_bytes(said[:8], "little")


class StuckMkdir:
    """mkdir(2) that does not come back until `goes_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes_on = threading.Event()
        self.begun = 0

        def stuck(*args: Any, mkdir: Any = os.mkdir, **how: Any) -> None:
            self.begun += 1
            passed(self.goes_on)
            mkdir(*args, **how)

        monkeypatch.setattr(os, "mkdir", stuck)

    def wait_until_begun(self, count: int = 1) -> None:
        """Wait until so many calls are stuck."""
        wait_until(lambda: self.begun >= count, "calls that do not come back")
