"""The bytes of 9P2000.L's messages, made and read by the table of messages.py.

A message is size[4] type[1] tag[2] and its fields. What is read is checked: each length lies in
the message before anything of that length is made, a string has no zero byte, and nothing is left
over at the end.

Locks touched: none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ninefuse.wire.messages import MESSAGES, Message

HEADER = struct.Struct("<IBH")  # size, type, tag
HEADER_SIZE = HEADER.size
SIZE = struct.Struct("<I")

_COUNT = struct.Struct("<H")
_LONG_COUNT = struct.Struct("<I")
_QID = struct.Struct("<BIQ")
_FORMATS = {"1": "B", "2": "H", "4": "I", "8": "Q", "q": "BIQ"}

Values = tuple[Any, ...]
# Append the bytes of a value to a list of pieces.
_Packer = Callable[[list[bytes], Any], None]
# Take a value out of a message at a place; the value, and the place behind it.
_Reader = Callable[[bytes, int], tuple[Any, int]]


class Malformed(Exception):
    """A message is not what its type says; the text says why."""


class Frame(NamedTuple):
    """A message that was read: its type, its tag, and the values of its fields in their order."""

    number: int
    tag: int
    values: Values


# ---- strings, data, lists ---------------------------------------------------------------------


def _pack_string(pieces: list[bytes], value: bytes) -> None:
    pieces.append(_COUNT.pack(len(value)))
    pieces.append(value)


def _read_string(frame: bytes, at: int) -> tuple[bytes, int]:
    begin = at + _COUNT.size
    end = begin + _COUNT.unpack_from(frame, at)[0]
    if end > len(frame):
        raise Malformed("a string goes beyond the message")
    value = frame[begin:end]
    if b"\0" in value:
        raise Malformed("a string has a zero byte")
    return value, end


def _pack_data(pieces: list[bytes], value: bytes) -> None:
    pieces.append(_LONG_COUNT.pack(len(value)))
    pieces.append(value)


def _read_data(frame: bytes, at: int) -> tuple[bytes, int]:
    begin = at + _LONG_COUNT.size
    end = begin + _LONG_COUNT.unpack_from(frame, at)[0]
    if end > len(frame):
        raise Malformed("data goes beyond the message")
    return frame[begin:end], end


def _pack_names(pieces: list[bytes], value: list[bytes] | tuple[bytes, ...]) -> None:
    pieces.append(_COUNT.pack(len(value)))
    for name in value:
        _pack_string(pieces, name)


def _read_names(frame: bytes, at: int) -> tuple[tuple[bytes, ...], int]:
    (count,) = _COUNT.unpack_from(frame, at)
    at += _COUNT.size
    if at + count * _COUNT.size > len(frame):
        raise Malformed("more names are announced than the message has room for")
    names = []
    for _ in range(count):
        name, at = _read_string(frame, at)
        names.append(name)
    return tuple(names), at


def _pack_qids(pieces: list[bytes], value: list[tuple[int, int, int]]) -> None:
    pieces.append(_COUNT.pack(len(value)))
    pieces.extend(_QID.pack(*qid) for qid in value)


def _read_qids(frame: bytes, at: int) -> tuple[tuple[Any, ...], int]:
    (count,) = _COUNT.unpack_from(frame, at)
    at += _COUNT.size
    end = at + count * _QID.size
    if end > len(frame):
        raise Malformed("more qids are announced than the message has room for")
    return tuple(_QID.iter_unpack(frame[at:end])), end


_VARIABLE: dict[str, tuple[_Packer, _Reader]] = {
    "s": (_pack_string, _read_string),
    "data": (_pack_data, _read_data),
    "names": (_pack_names, _read_names),
    "qids": (_pack_qids, _read_qids),
}


# ---- one message ------------------------------------------------------------------------------


class _Run:
    """Fields of fixed size that follow each other: one struct.

    Attributes:
        struct: of all their bytes.
        qids: which of the fields are qids.
        count: how many fields they are.
    """

    __slots__ = ("count", "qids", "struct")

    def __init__(self, kinds: list[str]) -> None:
        self.struct = struct.Struct("<" + "".join(_FORMATS[kind] for kind in kinds))
        self.qids = [at for at, kind in enumerate(kinds) if kind == "q"]
        self.count = len(kinds)

    def pack(self, values: Values) -> bytes:
        for at in reversed(self.qids):
            values = (*values[:at], *values[at], *values[at + 1 :])
        return self.struct.pack(*values)

    def read(self, frame: bytes, at: int) -> tuple[Values, int]:
        values = self.struct.unpack_from(frame, at)
        for place in self.qids:
            values = (*values[:place], values[place : place + 3], *values[place + 3 :])
        return values, at + self.struct.size


class _Layout:
    """How one message is laid out: runs of fixed fields, and fields of other kinds."""

    __slots__ = ("_parts", "_shortest", "number")

    def __init__(self, message: Message) -> None:
        self.number = message.number
        self._parts: list[_Run | tuple[_Packer, _Reader]] = []
        fixed: list[str] = []
        for field in message.fields:
            if field.kind in _FORMATS:
                fixed.append(field.kind)
                continue
            if fixed:
                self._parts.append(_Run(fixed))
                fixed = []
            self._parts.append(_VARIABLE[field.kind])
        if fixed:
            self._parts.append(_Run(fixed))
        # What may be left out is of fixed size, and stands at the end.
        optional = [_FORMATS[field.kind] for field in message.fields if field.is_optional]
        self._shortest = struct.calcsize("<" + "".join(optional))

    def pack(self, pieces: list[bytes], values: Values) -> None:
        """Append the bytes of a message's fields."""
        at = 0
        for part in self._parts:
            if isinstance(part, _Run):
                pieces.append(part.pack(values[at : at + part.count]))
                at += part.count
            else:
                part[0](pieces, values[at])
                at += 1
        if at != len(values):
            raise ValueError(f"message {self.number} has {at} fields, not {len(values)}")

    def read(self, frame: bytes, length: int) -> Values:
        """The values of a message's fields; what was left out is 0."""
        values: Values = ()
        at = HEADER_SIZE
        for part in self._parts:
            if isinstance(part, _Run):
                some, at = part.read(frame, at)
                values += some
            else:
                value, at = part[1](frame, at)
                values += (value,)
        if at != len(frame):
            raise Malformed(f"{length - at} bytes follow its end")
        return values

    def completed(self, frame: bytes) -> bytes:
        """The message with what was left out of it."""
        if not self._shortest:
            return frame
        whole = HEADER_SIZE + sum(p.struct.size for p in self._parts if isinstance(p, _Run))
        if len(frame) == whole - self._shortest:
            return frame + bytes(self._shortest)
        return frame


_LAYOUTS = {message.number: _Layout(message) for message in MESSAGES}


def encode(number: int, tag: int, *values: Any) -> bytes:
    """The bytes of a message.

    Args:
        number: its type.
        tag: its tag.
        values: of its fields, in their order; bytes for strings and data, tuples for qids.

    Raises:
        struct.error: a value does not fit its field.
        ValueError: there are more values than fields.
    """
    pieces = [b""]
    _LAYOUTS[number].pack(pieces, values)
    pieces[0] = HEADER.pack(HEADER_SIZE + sum(map(len, pieces)), number, tag)
    return b"".join(pieces)


def decode(frame: bytes) -> Frame:
    """Read a whole message.

    Args:
        frame: its bytes, the size among them, which says how many they are.

    Raises:
        Malformed: it is not what its type says, or there is no such type.
    """
    _, number, tag = HEADER.unpack_from(frame)
    layout = _LAYOUTS.get(number)
    if layout is None:
        raise Malformed(f"there is no message of type {number}")
    try:
        return Frame(number, tag, layout.read(layout.completed(frame), len(frame)))
    except struct.error:
        raise Malformed("it ends before its last field") from None
