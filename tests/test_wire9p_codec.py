"""The bytes of 9P2000.L's messages: each one as it was written down by hand, and what is refused.

The bytes of `GOLDEN` were made from diod's protocol.md and Linux's net/9p with other code than
codec.py. Beside them: every message comes back from its bytes as it went, whatever is in it; and
of bytes that are no message nothing else than `Malformed` comes.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninefuse.wire.codec import HEADER, HEADER_SIZE, Frame, Malformed, decode, encode
from ninefuse.wire.messages import BY_NUMBER, MESSAGES, NOTAG, NUMBER_OF

GOLDEN = (
    ("Rlerror", (2,), "0b00000007020102000000"),
    ("Tstatfs", (9,), "0b00000008020109000000"),
    (
        "Rstatfs",
        (16914839, 4096, 1, 2, 3, 4, 5, 6, 255),
        "430000000902019719020100100000010000000000000002000000000000000300000000000000040000000000000005000000000000000600000000000000ff000000",
    ),
    ("Tlopen", (9, 2), "0f0000000c02010900000002000000"),
    (
        "Rlopen",
        ((128, 16909060, 1234605616436508552), 8192),
        "180000000d02018004030201887766554433221100200000",
    ),
    (
        "Tlcreate",
        (9, b"new", 194, 420, 100),
        "1c0000000e02010900000003006e6577c2000000a401000064000000",
    ),
    (
        "Rlcreate",
        ((128, 16909060, 1234605616436508552), 8192),
        "180000000f02018004030201887766554433221100200000",
    ),
    (
        "Tsymlink",
        (9, b"link", b"to/it", 100),
        "1c0000001002010900000004006c696e6b0500746f2f697464000000",
    ),
    (
        "Rsymlink",
        ((128, 16909060, 1234605616436508552),),
        "1400000011020180040302018877665544332211",
    ),
    (
        "Tmknod",
        (9, b"node", 8612, 1, 3, 100),
        "210000001202010900000004006e6f6465a4210000010000000300000064000000",
    ),
    ("Rmknod", ((128, 16909060, 1234605616436508552),), "1400000013020180040302018877665544332211"),
    ("Trename", (9, 10, b"name"), "15000000140201090000000a00000004006e616d65"),
    ("Rrename", (), "07000000150201"),
    ("Treadlink", (9,), "0b00000016020109000000"),
    ("Rreadlink", (b"to/it",), "0e0000001702010500746f2f6974"),
    ("Tgetattr", (9, 2047), "1300000018020109000000ff07000000000000"),
    (
        "Rgetattr",
        (
            2047,
            (128, 16909060, 1234605616436508552),
            33188,
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            8,
            9,
            10,
            11,
            12,
            13,
            14,
            15,
            16,
            17,
        ),
        "a0000000190201ff0700000000000080040302018877665544332211a4810000010000000200000003000000000000000400000000000000050000000000000006000000000000000700000000000000080000000000000009000000000000000a000000000000000b000000000000000c000000000000000d000000000000000e000000000000000f0000000000000010000000000000001100000000000000",
    ),
    (
        "Tsetattr",
        (9, 511, 384, 1, 2, 3, 4, 5, 6, 7),
        "430000001a020109000000ff01000080010000010000000200000003000000000000000400000000000000050000000000000006000000000000000700000000000000",
    ),
    ("Rsetattr", (), "070000001b0201"),
    ("Txattrwalk", (9, 10, b"user.a"), "170000001e0201090000000a0000000600757365722e61"),
    ("Rxattrwalk", (5,), "0f0000001f02010500000000000000"),
    (
        "Txattrcreate",
        (9, b"user.a", 5, 1),
        "1f000000200201090000000600757365722e61050000000000000001000000",
    ),
    ("Rxattrcreate", (), "07000000210201"),
    ("Treaddir", (9, 7, 4096), "1700000028020109000000070000000000000000100000"),
    ("Rreaddir", (b"entry",), "1000000029020105000000656e747279"),
    ("Tfsync", (9, 1), "0f0000003202010900000001000000"),
    ("Rfsync", (), "07000000330201"),
    (
        "Tlock",
        (9, 1, 1, 2, 3, 4, b"host"),
        "2a00000034020109000000010100000002000000000000000300000000000000040000000400686f7374",
    ),
    ("Rlock", (1,), "0800000035020101"),
    (
        "Tgetlock",
        (9, 1, 2, 3, 4, b"host"),
        "26000000360201090000000102000000000000000300000000000000040000000400686f7374",
    ),
    (
        "Rgetlock",
        (2, 2, 3, 4, b"host"),
        "220000003702010202000000000000000300000000000000040000000400686f7374",
    ),
    ("Tlink", (9, 10, b"name"), "15000000460201090000000a00000004006e616d65"),
    ("Rlink", (), "07000000470201"),
    ("Tmkdir", (9, b"dir", 493, 100), "18000000480201090000000300646972ed01000064000000"),
    ("Rmkdir", ((128, 16909060, 1234605616436508552),), "1400000049020180040302018877665544332211"),
    ("Trenameat", (9, b"old", 10, b"new"), "190000004a02010900000003006f6c640a00000003006e6577"),
    ("Rrenameat", (), "070000004b0201"),
    ("Tunlinkat", (9, b"name", 512), "150000004c02010900000004006e616d6500020000"),
    ("Runlinkat", (), "070000004d0201"),
    ("Tversion", (8192, b"9P2000.L"), "1500000064ffff0020000008003950323030302e4c"),
    ("Rversion", (8192, b"unknown"), "1400000065ffff002000000700756e6b6e6f776e"),
    ("Tauth", (9, b"me", b"/src", 1000), "190000006602010900000002006d6504002f737263e8030000"),
    ("Rauth", ((128, 16909060, 1234605616436508552),), "1400000067020180040302018877665544332211"),
    (
        "Tattach",
        (9, 4294967295, b"me", b"", 1000),
        "1900000068020109000000ffffffff02006d650000e8030000",
    ),
    (
        "Rattach",
        ((128, 16909060, 1234605616436508552),),
        "1400000069020180040302018877665544332211",
    ),
    ("Tflush", (3,), "090000006c02010300"),
    ("Rflush", (), "070000006d0201"),
    ("Twalk", (9, 10, (b"a", b"..")), "180000006e0201090000000a000000020001006102002e2e"),
    (
        "Rwalk",
        (((128, 16909060, 1234605616436508552), (2, 5, 6)),),
        "230000006f020102008004030201887766554433221102050000000600000000000000",
    ),
    ("Tread", (9, 7, 4096), "1700000074020109000000070000000000000000100000"),
    ("Rread", (b"data",), "0f0000007502010400000064617461"),
    ("Twrite", (9, 7, b"data"), "1b0000007602010900000007000000000000000400000064617461"),
    ("Rwrite", (4,), "0b00000077020104000000"),
    ("Tclunk", (9,), "0b00000078020109000000"),
    ("Rclunk", (), "07000000790201"),
    ("Tremove", (9,), "0b0000007a020109000000"),
    ("Rremove", (), "070000007b0201"),
)

_INTEGERS = {"1": 1, "2": 2, "4": 4, "8": 8}
_STRINGS = st.binary(max_size=300).map(lambda value: value.replace(b"\0", b"."))
_QIDS = st.tuples(*(st.integers(0, 256**size - 1) for size in (1, 4, 8)))
_KINDS: dict[str, st.SearchStrategy[Any]] = {
    **{kind: st.integers(0, 256**size - 1) for kind, size in _INTEGERS.items()},
    "s": _STRINGS,
    "q": _QIDS,
    "data": st.binary(max_size=2000),
    "names": st.lists(_STRINGS, max_size=20).map(tuple),
    "qids": st.lists(_QIDS, max_size=20).map(tuple),
}


def tag_of(name: str) -> int:
    return NOTAG if name.endswith("version") else 0x0102


@pytest.mark.parametrize(("name", "values", "written"), GOLDEN, ids=[one[0] for one in GOLDEN])
def test_the_bytes_of_a_message(name: str, values: tuple[Any, ...], written: str) -> None:
    frame = bytes.fromhex(written)
    assert encode(NUMBER_OF[name], tag_of(name), *values) == frame
    assert decode(frame) == Frame(NUMBER_OF[name], tag_of(name), values)


def test_every_message_was_written_down() -> None:
    assert [name for name, _, _ in GOLDEN] == [message.name for message in MESSAGES]


def test_every_request_has_its_answer() -> None:
    """A T-message's number is even, and the next one is its R-message's."""
    names = {message.number: message.name for message in MESSAGES}
    for number, name in names.items():
        if number % 2 == 0:
            assert names[number + 1] == "R" + name[1:]


@given(st.data(), st.sampled_from(MESSAGES), st.integers(0, 0xFFFF))
def test_a_message_comes_back_as_it_went(data: st.DataObject, message: Any, tag: int) -> None:
    values = tuple(data.draw(_KINDS[field.kind]) for field in message.fields)
    frame = encode(message.number, tag, *values)
    assert HEADER.unpack_from(frame) == (len(frame), message.number, tag)
    assert decode(frame) == Frame(message.number, tag, values)


@pytest.mark.parametrize(("name", "values", "written"), GOLDEN, ids=[one[0] for one in GOLDEN])
def test_a_message_that_is_cut_off_is_malformed(
    name: str, values: tuple[Any, ...], written: str
) -> None:
    """At every byte of its fields; but fsync may come without its last field."""
    frame = bytes.fromhex(written)
    for end in range(HEADER_SIZE, len(frame)):
        if (name, end) == ("Tfsync", len(frame) - 4):
            assert decode(frame[:end]).values == (values[0], 0)
            continue
        with pytest.raises(Malformed):
            decode(frame[:end])


@pytest.mark.parametrize(("name", "values", "written"), GOLDEN, ids=[one[0] for one in GOLDEN])
def test_a_message_with_something_behind_it_is_malformed(
    name: str, values: tuple[Any, ...], written: str
) -> None:
    for more in (b"\0", b"\0" * 4, b"more"):
        with pytest.raises(Malformed, match="follow"):
            decode(bytes.fromhex(written) + more)


@given(st.sampled_from(MESSAGES), st.binary(max_size=200))
def test_random_fields(message: Any, body: bytes) -> None:
    """They are a message, which then has just these bytes, or malformed."""
    frame = HEADER.pack(HEADER_SIZE + len(body), message.number, 1) + body
    try:
        found = decode(frame)
    except Malformed:
        return
    again = encode(found.number, found.tag, *found.values)
    assert again == frame or (message.name == "Tfsync" and len(body) == 4)


@given(st.sampled_from(GOLDEN), st.data())
def test_a_message_with_one_byte_changed(golden: Any, data: st.DataObject) -> None:
    """Nothing else than `Malformed` is raised, and what is read lies in the message."""
    frame = bytearray.fromhex(golden[2])
    if len(frame) == HEADER_SIZE:
        return
    at = data.draw(st.integers(HEADER_SIZE, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(frame))
    except Malformed:
        return
    assert encode(found.number, found.tag, *found.values) == frame


def test_a_string_with_a_zero_byte_is_malformed() -> None:
    frames = (
        encode(NUMBER_OF["Tlcreate"], 1, 1, b"a\0b", 0, 0, 0),
        encode(NUMBER_OF["Twalk"], 1, 1, 2, (b"a", b"\0")),
    )
    for frame in frames:
        with pytest.raises(Malformed, match="zero"):
            decode(frame)


@pytest.mark.parametrize("number", sorted(set(range(256)) - set(BY_NUMBER)))
def test_there_are_no_other_messages(number: int) -> None:
    with pytest.raises(Malformed, match=f"type {number}"):
        decode(HEADER.pack(HEADER_SIZE, number, 1))


def test_a_count_beyond_the_message_makes_nothing_of_that_size() -> None:
    """The largest counts there are, in messages of a few bytes."""
    names = HEADER.pack(0, NUMBER_OF["Twalk"], 1) + struct.pack("<IIH", 1, 2, 0xFFFF) + b"\0\0"
    data = HEADER.pack(0, NUMBER_OF["Twrite"], 1) + struct.pack("<IQI", 1, 0, 0xFFFFFFFF) + b"x"
    qids = HEADER.pack(0, NUMBER_OF["Rwalk"], 1) + struct.pack("<H", 0xFFFF) + bytes(13)
    for frame in (names, data, qids):
        with pytest.raises(Malformed, match="room|beyond"):
            decode(frame)


def test_values_that_do_not_fit_their_fields() -> None:
    for values in ((1 << 32,), (-1,), ("9",)):
        with pytest.raises(struct.error):
            encode(NUMBER_OF["Tclunk"], 1, *values)
    with pytest.raises(ValueError, match="1 fields, not 2"):
        encode(NUMBER_OF["Tclunk"], 1, 2, 3)
