"""Feeds bad input to a build of _message.pyx and _wire.pyx; what test_wire_sanitized.py runs.

    python wire_fuzz.py DIRECTORY SEED INPUTS

It ends with 0 if nothing was wrong. What the sanitizers find ends it at once.
"""

from __future__ import annotations

import errno
import importlib.util
import math
import socket
import sys
import time
from collections import Counter
from random import Random
from typing import Any

from wire_messages import HEADER, random_input

_NUMBERS = (-1, 0, 1, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63)
_SECONDS = (0.0, -1.0, 0.5, 1e9, 1e15, 1e300, math.inf, math.nan)


def load(directory: str, name: str) -> Any:
    """An extension that was built there, in the place of ninefuse's."""
    spec = importlib.util.spec_from_file_location(f"ninefuse.fuse.{name}", f"{directory}/{name}.so")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Feeder:
    """Both ends of a device.

    Args:
        message, wire: the extensions.
        choose: makes the inputs.
    """

    def __init__(self, message: Any, wire: Any, choose: Random) -> None:
        self._message = message
        self._wire = wire
        self._choose = choose
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self._theirs):
            end.setblocking(False)
        self.seen: Counter[str] = Counter()

    def request(self) -> None:
        """Have one request decoded, by itself and from a device whose buffer it just fills."""
        data = random_input(self._choose)
        short = self._choose.random() < 0.5
        message = self._message.decode(data, short)
        if len(data) < HEADER:
            assert message is None
            self.seen["no message"] += 1
        else:
            assert message.fault in (0, errno.EIO, errno.EINVAL)
            assert (message.args is None) == bool(message.fault)
            self.seen["refused" if message.fault else "decoded"] += 1
        if not data:
            return  # that is the end of a socket
        device = self._wire.Device(self._ours.fileno(), len(data))
        device.short_setxattr = short
        self._theirs.send(data)
        received = device.receive()
        assert repr(received) == repr(message)
        if received is not None:
            found = received.fault, received.groups, received.contexts
            assert found == (message.fault, message.groups, message.contexts)

    def reply(self) -> None:
        """Have one reply encoded, of numbers that may be none."""
        device = self._wire.Device(self._ours.fileno(), HEADER)
        unique, one, two, three = (self._number() for _ in range(4))
        valid = self._choose.choice(_SECONDS)
        a = tuple(self._number() for _ in range(self._choose.choice((0, 22, 23, 23, 23, 24))))
        data = bytes(self._choose.randrange(300))
        calls = (
            lambda: device.error(unique, one),
            lambda: device.data(unique, data),
            lambda: device.entry(unique, one, two, valid, valid, three, a),
            lambda: device.absent(unique, valid),
            lambda: device.attributes(unique, valid, one, a),
            lambda: device.opened(unique, one, two),
            lambda: device.created(unique, one, two, valid, valid, three, a, one, two),
            lambda: device.count(unique, one),
            lambda: device.number(unique, one),
            lambda: device.file_system(unique, one, two, three, one, two, three, one, two),
            lambda: device.lock(unique, one, two, three, one),
            lambda: device.controlled(unique, data),
            lambda: device.statx(unique, valid, one, a),
        )
        try:
            self._choose.choice(calls)()
            self._theirs.recv(1 << 16)
            self.seen["sent"] += 1
        except (OverflowError, TypeError):
            self.seen["not sent"] += 1

    def listing(self) -> None:
        """Have a reply filled with entries."""
        room = self._choose.randrange(2000)
        entries = self._wire.Entries(room)
        a = tuple(self._choose.randrange(1 << 31) for _ in range(24))
        for _ in range(self._choose.randrange(12)):
            name = bytes(self._choose.randrange(300))
            if self._choose.random() < 0.5:
                entries.add(name, 1, 2, 3)
            else:
                entries.add_plus(name, 1, 2, 3, self._choose.randrange(2), 4, 5.0, 6.0, a)
        assert len(entries.reply) <= room
        self.seen["listings"] += 1

    def _number(self) -> int:
        if self._choose.random() < 0.7:
            return self._choose.choice(_NUMBERS)
        return self._choose.getrandbits(self._choose.choice((8, 32, 64, 70)))


def main() -> None:
    """Feed as many requests as were asked for, and some replies."""
    directory, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # In this order: the second has what it imports of the first from this build.
    message, wire = load(directory, "_message"), load(directory, "_wire")
    feeder = Feeder(message, wire, Random(seed))
    began = time.monotonic()
    for turn in range(count):
        feeder.request()
        if turn % 16 == 0:
            feeder.reply()
            feeder.listing()
    took = time.monotonic() - began
    seen = ", ".join(f"{count} {what}" for what, count in sorted(feeder.seen.items()))
    print(f"{count} requests in {took:.0f} s: {seen}")


if __name__ == "__main__":
    main()
