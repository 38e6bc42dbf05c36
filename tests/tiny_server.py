"""The smallest FUSE server: a root directory with nothing in it, by the kernel's own protocol."""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
from typing import NamedTuple

LOOKUP, GETATTR, MKDIR, INIT = 1, 3, 9, 26
_FORGETS = (2, 42)

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_INIT_OUT = struct.pack("=4IHHIIHHII24x", 7, 31, 1 << 16, 0, 0, 0, 1 << 12, 1, 0, 0, 0, 0)
_TIMES = (0,) * 9
_MODE = stat.S_IFDIR | 0o755
_ATTR_OUT = struct.pack("=QII6Q10I", 0, 0, 0, 1, 0, 0, *_TIMES[:6], _MODE, 2, 0, 0, 0, 4096, 0)


class Request(NamedTuple):
    """What the kernel asked."""

    opcode: int
    body: bytes


def serve(device: int) -> list[Request]:
    """Serve until it is unmounted; what was asked. The device must not block."""
    poll = select.poll()
    poll.register(device, select.POLLIN)
    seen: list[Request] = []
    while True:
        poll.poll()
        try:
            message = os.read(device, 1 << 17)
        except OSError as e:
            if e.errno == errno.ENODEV:
                return seen
            if e.errno not in (errno.EAGAIN, errno.ENOENT):
                raise
            continue
        _, opcode, unique, *_ = _IN_HEADER.unpack_from(message)
        seen.append(Request(opcode, message[_IN_HEADER.size :]))
        if opcode in _FORGETS:
            continue
        code, body = _ANSWERS.get(opcode, (-errno.ENOSYS, b""))
        os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), code, unique) + body)


_ANSWERS = {INIT: (0, _INIT_OUT), GETATTR: (0, _ATTR_OUT), LOOKUP: (-errno.ENOENT, b"")}
