"""Calling the C library: what each module of system calls makes its functions with. No lock."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import Any

from ninefuse.errors import error

_libc = ctypes.CDLL(None, use_errno=True)

AT_EMPTY_PATH = 0x1000


def function(name: str, *argtypes: Any) -> Callable[..., int]:
    """A function of the C library that raises OSError where it returns a negative number.

    A call that a signal interrupts is made again, as Python does for its own.
    """
    called = getattr(_libc, name)
    if argtypes:
        called.argtypes = argtypes

    def call(*args: Any) -> int:
        while True:
            result: int = called(*args)
            if result >= 0:
                return result
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise error(code)

    return call
