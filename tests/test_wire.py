"""FUSE's messages, decoded and encoded (_message.pyx and _wire.pyx in fuse/), without a kernel.

The structures and the messages are those of wire_messages.py. What stands for the device is one end
of a pair of sockets that keep messages apart.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mounting import PATIENCE
from ops_helpers import leak_free as leak_free
from wire_messages import (
    BAD,
    GOLDEN,
    HEADER,
    INIT,
    SETXATTR,
    STRUCTS,
    Edit,
    Golden,
    contexts,
    groups,
    mutated,
    pack,
    padded,
    random_input,
    request,
)

from ninefuse.fuse import handshake
from ninefuse.fuse.opcodes import Opcode
from ninefuse.linux.syscalls import Attributes

if TYPE_CHECKING:
    from ninefuse.fuse._message import SIZES as SIZES_IN
    from ninefuse.fuse._message import Message, decode
    from ninefuse.fuse._wire import SIZES as SIZES_OUT
    from ninefuse.fuse._wire import Device, Entries
else:
    try:
        message = importlib.import_module("ninefuse.fuse._message")
        wire = importlib.import_module("ninefuse.fuse._wire")
    except ImportError as refused:
        pytest.skip(f"the extension is not built: {refused}", allow_module_level=True)
    SIZES_IN, Message, decode = message.SIZES, message.Message, message.decode
    SIZES_OUT, Device, Entries = wire.SIZES, wire.Device, wire.Entries

FAULTS = (errno.EIO, errno.EINVAL)
UNIQUE = 0x8877665544332211
SIZE = 1 << 20  # bytes of a request at most
BILLION = 1_000_000_000

A = Attributes(
    mask=0xFFF,
    blksize=4096,
    flags=1 << 34,
    nlink=3,
    uid=1005,
    gid=1006,
    mode=0o100640,
    ino=1007,
    size=1 << 40,
    blocks=1 << 31,
    flags_mask=1 << 35,
    atime_seconds=-7,
    atime_nanoseconds=11,
    btime_seconds=1 << 33,
    btime_nanoseconds=12,
    ctime_seconds=1 << 32,
    ctime_nanoseconds=13,
    mtime_seconds=14,
    mtime_nanoseconds=999_999_999,
    rdev_major=0x123,
    rdev_minor=0xABCDE,
    dev_major=8,
    dev_minor=1,
)
MINUS_7 = (1 << 64) - 7
RDEV = 0xABC123DE  # as new_encode_dev has it
ATTR = (
    *(1007, 1 << 40, 1 << 31, MINUS_7, 14, 1 << 32, 11, 999_999_999, 13),
    *(0o100640, 3, 1005, 1006, RDEV, 4096, 0),
)
ENTRY = (21, 22, 1, 2, 500_000_000, 250_000_000, *ATTR)
SHOWN = (21, 22, 1.5, 2.25, 1007, A)  # what of it is said to a `Device`


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What stands for the device, and the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(PATIENCE)
        yield ours, theirs


@pytest.fixture
def device(ends: tuple[socket.socket, socket.socket]) -> Device:
    return Device(ends[0].fileno(), SIZE)


@pytest.fixture
def kernel(ends: tuple[socket.socket, socket.socket]) -> socket.socket:
    return ends[1]


def decoded(data: bytes, *, short: bool = False) -> Message:
    message = decode(data, short)
    assert message is not None
    return message


def check(message: Message, data: bytes) -> None:
    """What holds for every message, whatever it was made of."""
    header = STRUCTS["in_header"].unpack_from(data)
    seen = message.opcode, message.unique, message.nodeid, message.uid, message.gid, message.pid
    assert seen == header[1:7]
    assert message.fault in (0, *FAULTS)
    assert (message.args is None) == bool(message.fault)
    if message.fault:
        assert message.groups is None
        assert message.contexts is None
    repr(message)


# Structures


def test_the_structures_have_the_protocols_sizes() -> None:
    sizes = SIZES_IN | SIZES_OUT
    assert {name: STRUCTS[name].size for name in sizes} == sizes


def test_there_is_a_golden_message_of_each_opcode() -> None:
    assert set(Opcode) <= {one.opcode for one in GOLDEN}


# Requests


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda one: one.name)
def test_a_request_says_what_was_put_into_it(golden: Golden) -> None:
    message = decoded(golden.data, short=golden.short)
    assert (message.opcode, message.unique) == (golden.opcode, 0x1122334455667788)
    assert message.nodeid == 0x2233445566778899
    assert (message.uid, message.gid, message.pid) == (1001, 1002, 1003)
    assert message.fault == 0
    assert message.args == golden.args
    assert message.groups == golden.groups
    assert message.contexts == golden.contexts


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda one: one.name)
def test_a_request_that_ends_early_is_refused(golden: Golden) -> None:
    """At whatever length: whether its header knows or not."""
    whole = golden.data
    for length in range(len(whole)):
        piece = whole[:length]
        if length < HEADER:
            assert decode(piece, golden.short) is None
            continue
        message = decoded(piece, short=golden.short)
        check(message, piece)
        assert message.fault == errno.EIO
        honest = mutated(piece, [], true_length=True)
        message = decoded(honest, short=golden.short)
        check(message, honest)
        if message.fault:
            assert message.fault == errno.EIO
        elif golden.opcode == INIT and length < HEADER + 20:
            # An older kernel's, whose flags have but 32 bits.
            assert message.args == (*golden.args[:3], golden.args[3] & 0xFFFFFFFF)
        else:
            assert message.args == golden.args


# Of these all bytes count, but for extensions. (INIT ends in what it may have some day.)
COMPLETE = [one for one in GOLDEN if one.args and one.opcode != INIT]


@pytest.mark.parametrize("golden", COMPLETE, ids=lambda one: one.name)
def test_a_request_needs_its_last_byte(golden: Golden) -> None:
    last = len(golden.data) - golden.extensions - 1
    honest = mutated(golden.data[:last], [], true_length=True)
    assert decoded(honest, short=golden.short).fault == errno.EIO


def test_a_header_that_is_wrong_about_the_length_is_refused() -> None:
    for length in (0, 39, 40, 46, 48, 1 << 31, (1 << 32) - 1):
        message = decoded(request(1, b"a name\0", length=length))
        assert (message.fault, message.args) == (errno.EIO, None)
    assert decoded(request(1, b"a name\0", length=47)).fault == 0


def test_data_longer_than_its_message_is_refused() -> None:
    many = (1 << 32) - 1
    for size in (6, 1 << 31, many):
        body = pack("write_in", 1, 2, size, 3, 4, 5, 0) + b"data."
        assert decoded(request(16, body)).fault == errno.EIO
        body = pack("ioctl_in", 1, 2, 3, 4, size, 0) + b"data."
        assert decoded(request(39, body)).fault == errno.EIO
        body = pack("setxattr_in", size, 0, 0, 0) + b"n\0data."
        assert decoded(request(21, body)).fault == errno.EIO
    for count in (2, 1 << 28, 1 << 31, many):
        body = pack("batch_forget_in", count, 0) + pack("forget_one", 1, 1)
        assert decoded(request(42, body)).fault == errno.EIO


@pytest.mark.parametrize("opcode", [Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS])
def test_no_more_is_asked_for_than_a_reply_may_have(opcode: Opcode) -> None:
    """Whoever is asked makes room for all of it."""
    most = 256 * 65536  # pages, of the largest size
    assert most >= handshake.MAX_TRANSFER
    for size, fault in ((0, 0), (most, 0), (most + 1, errno.EINVAL), (0xFFFFFFFF, errno.EINVAL)):
        body = pack("read_in", 1, 0, size, 0, 0, 0, 0)
        assert decoded(request(opcode, body)).fault == fault


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.LOOKUP, b"\0"),
        (Opcode.SYMLINK, b"\0target\0"),
        (Opcode.SYMLINK, b"name\0\0"),
        (Opcode.RENAME, bytes(8) + b"\0new\0"),
        (Opcode.RENAME, bytes(8) + b"old\0\0"),
        (Opcode.GETXATTR, bytes(8) + b"\0"),  # it would be asked for all names
        (Opcode.CREATE, bytes(16) + b"\0"),
    ],
)
def test_a_name_is_not_empty(opcode: Opcode, body: bytes) -> None:
    assert decoded(request(opcode, body)).fault == errno.EINVAL


@pytest.mark.parametrize(
    "opcode", [Opcode.LOOKUP, Opcode.MKDIR, Opcode.RENAME, Opcode.SETXATTR, Opcode.SYMLINK]
)
def test_a_name_ends_in_its_message(opcode: Opcode) -> None:
    """Where the last one of it does not, what stands behind the message is not looked at."""
    golden = next(one for one in GOLDEN if one.opcode == opcode)
    longest = golden.data[: golden.data.rindex(b"\0", HEADER)]
    if opcode == Opcode.SETXATTR:
        longest = golden.data[: golden.data.index(b"user.n") + 6]
    message = decoded(mutated(longest, [], true_length=True))
    assert (message.fault, message.args) == (errno.EIO, None)


def test_setxattr_has_the_structure_that_was_agreed_on() -> None:
    """Each read as the other is something else; neither ends the decoder."""
    for golden in GOLDEN:
        if golden.opcode == SETXATTR:
            other = decoded(golden.data, short=not golden.short)
            assert other.args != golden.args


# Extensions


def making(extension: bytes) -> Message:
    return decoded(request(Opcode.MKDIR, pack("mkdir_in", 0, 0) + b"d\0" + extension))


def test_an_extension_of_another_kind_is_passed_over() -> None:
    unknown = pack("ext_header", 16, 33) + b"whatever"
    message = making(unknown + groups(7))
    assert (message.fault, message.groups, message.contexts) == (0, (7,), ())


def test_extensions_of_one_kind_add_up() -> None:
    message = making(groups(7) + contexts((b"a", b"b")) + groups(8) + contexts((b"c", b"d")))
    assert (message.groups, message.contexts) == ((7, 8), ((b"a", b"b"), (b"c", b"d")))


@pytest.mark.parametrize(
    "extension",
    [
        b"short",
        bytes(8),  # of no length: it would be looked at for ever
        pack("ext_header", 7, 33),
        pack("ext_header", 9, 33),
        pack("ext_header", (1 << 32) - 8, 33),
        pack("ext_header", 8, 32),  # no number of groups
        pack("ext_header", 16, 32) + struct.pack("=2I", 2, 7),  # not so many
        pack("ext_header", 16, 32) + struct.pack("=2I", (1 << 32) - 1, 7),
        pack("ext_header", 16, 32) + struct.pack("=2I", 2, 7) + groups(8),  # nor the next one's
        pack("ext_header", 8, 1),  # no context
        pack("ext_header", 16, 1) + pack("secctx", 0, 0),  # no name
        pack("ext_header", 24, 1) + pack("secctx", 0, 0) + b"endless!" + b"\0" * 8,
        pack("ext_header", 24, 1) + pack("secctx", 7, 0) + b"a\0value!",
        pack("ext_header", 24, 1) + pack("secctx", (1 << 32) - 1, 0) + b"a\0value!",
        pack("ext_header", 24, 2) + pack("secctx", 6, 0) + b"a\0value!",  # one, not two
        pack("ext_header", 24, 31) + pack("secctx", 6, 0) + b"a\0value!",
    ],
)
def test_an_extension_that_is_none_is_refused(extension: bytes) -> None:
    message = making(extension)
    assert (message.fault, message.args) == (errno.EIO, None)
    assert (message.groups, message.contexts) == (None, None)


def test_the_last_context_need_not_be_padded() -> None:
    of = pack("secctx", 1, 0) + b"a\0b"
    message = making(pack("ext_header", 8 + len(of), 1) + of)
    assert (message.fault, message.contexts) == (0, ((b"a", b"b"),))


# What is no request


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=300), short=st.booleans())
@example(data=b"", short=False)
@example(data=bytes(40), short=False)
def test_random_bytes_are_a_message_or_none(data: bytes, short: bool) -> None:
    message = decode(data, short)
    assert (message is None) == (len(data) < HEADER)
    if message is not None:
        check(message, data)


edits = st.builds(
    Edit,
    st.integers(0, 2),
    st.one_of(st.integers(HEADER, 128), st.integers(0, 400)),
    st.one_of(st.sampled_from(BAD), st.binary(max_size=16)),
)
changes = st.lists(edits, min_size=1, max_size=8)


@settings(deadline=None, max_examples=300)
@given(golden=st.sampled_from(GOLDEN), of=changes, honest=st.booleans(), short=st.booleans())
def test_a_changed_request_is_decoded_or_refused(
    golden: Golden, of: list[Edit], honest: bool, short: bool
) -> None:
    data = mutated(golden.data, of, true_length=honest)
    message = decode(data, short)
    assert (message is None) == (len(data) < HEADER)
    if message is not None:
        check(message, data)


def test_the_changes_reach_both_what_is_decoded_and_what_is_refused() -> None:
    """Else the tests above, and those of `make soak`, would say little."""
    choose = Random(1)
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(20_000):
        message = decode(random_input(choose))
        if message is not None:
            seen[message.opcode, message.fault] += 1
    for opcode in {one.opcode for one in GOLDEN if one.args}:
        assert seen[opcode, 0] > 10, opcode
        assert seen[opcode, errno.EIO] > 10, opcode
    assert seen[Opcode.READ, errno.EINVAL]
    assert seen[Opcode.LOOKUP, errno.EINVAL]


def test_what_is_no_bytes_is_a_type_error() -> None:
    for wrong in (None, "text", 1):
        with pytest.raises(TypeError):
            decode(wrong)  # type: ignore[arg-type]


# The device


def test_requests_are_received_one_at_a_time(device: Device, kernel: socket.socket) -> None:
    """Each whole, though the next one has the same buffer."""
    assert device.receive() is None
    for golden in GOLDEN:
        kernel.send(golden.data)
        if golden.opcode % 2:
            kernel.send(request(1, b"the next one's name\0", unique=1))
        device.short_setxattr = golden.short
        message = device.receive()
        if golden.opcode % 2:
            other = device.receive()
            assert other is not None
            assert other.args == (b"the next one's name",)
        assert message is not None
        assert (message.opcode, message.args, message.fault) == (golden.opcode, golden.args, 0)
        assert (message.groups, message.contexts) == (golden.groups, golden.contexts)
    assert device.receive() is None


def test_setxattr_is_the_short_one_until_it_is_said(device: Device) -> None:
    """So it is before INIT, and with kernels that do not know of the other."""
    assert device.short_setxattr


def test_what_is_no_message_is_passed_over(device: Device, kernel: socket.socket) -> None:
    kernel.send(b"x")
    kernel.send(bytes(HEADER - 1))
    assert device.receive() is None
    kernel.send(b"x")
    kernel.send(request(5))
    message = device.receive()
    assert message is not None
    assert message.args == ()


def test_a_request_that_has_no_room_is_refused(kernel: socket.socket, ends: Any) -> None:
    small = Device(ends[0].fileno(), 60)
    kernel.send(request(1, b"n" * 30 + b"\0"))
    message = small.receive()
    assert message is not None
    assert (message.fault, message.unique) == (errno.EIO, 0x1122334455667788)


@pytest.mark.parametrize("is_read", [True, False])
def test_where_the_other_end_has_gone_there_is_no_device(
    device: Device, kernel: socket.socket, is_read: bool
) -> None:
    """Whether it has read all answers or not; what it asked before is still heard."""
    kernel.send(request(5))
    device.empty(UNIQUE)
    if is_read:
        kernel.recv(SIZE)
    kernel.close()
    if is_read:
        assert device.receive() is not None
    with pytest.raises(OSError, match="No such device") as info:
        device.receive()
    assert info.value.errno == errno.ENODEV
    assert not device.empty(UNIQUE)
    assert not device.error(UNIQUE, errno.ENOENT)
    assert not device.data(UNIQUE, b"x")


def test_what_cannot_be_read_is_an_error() -> None:
    fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            Device(fd, SIZE).receive()
    finally:
        os.close(fd)


def test_a_device_without_room_is_refused() -> None:
    with pytest.raises(MemoryError):
        Device(0, (1 << 64) - 8192)


def test_waiting_says_which_of_three_has_come(device: Device, kernel: socket.socket) -> None:
    wake, other = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
    try:
        assert device.wait(wake, other, 0) == 0
        assert device.wait(-1, -1, 1) == 0
        os.eventfd_write(other, 1)
        assert device.wait(wake, other, -1) == 4
        kernel.send(request(5))
        assert device.wait(wake, other, -1) == 5
        os.eventfd_write(wake, 1)
        assert device.wait(wake, other, -1) == 7
        assert device.wait(wake, -1, -1) == 3
    finally:
        os.close(wake)
        os.close(other)


# Replies

Send = Callable[["Device"], bool]


def body_of_statx() -> bytes:
    return pack(
        "statx_out",
        *(2, 250_000_000, 0, 0, 0),
        *(0xFFF, 4096, 1 << 34, 3, 1005, 1006, 0o100640, 0, 1007, 1 << 40, 1 << 31, 1 << 35),
        *(-7, 11, 0, 1 << 33, 12, 0, 1 << 32, 13, 0, 14, 999_999_999, 0),
        *(0x123, 0xABCDE, 0, 0),
        *[0] * 14,
    )


REPLIES: dict[str, tuple[Send, bytes]] = {
    "empty": (lambda d: d.empty(UNIQUE), b""),
    "data": (lambda d: d.data(UNIQUE, b"da\0ta"), b"da\0ta"),
    "no data": (lambda d: d.data(UNIQUE, b""), b""),
    "entry": (lambda d: d.entry(UNIQUE, *SHOWN), pack("entry_out", *ENTRY)),
    "absent": (
        lambda d: d.absent(UNIQUE, 1.5),
        pack("entry_out", 0, 0, 1, 0, 500_000_000, *[0] * 17),
    ),
    "attributes": (
        lambda d: d.attributes(UNIQUE, 2.25, 1007, A),
        pack("attr_out", 2, 250_000_000, 0, *ATTR),
    ),
    "opened": (lambda d: d.opened(UNIQUE, 1 << 40, 65), pack("open_out", 1 << 40, 65, 0)),
    "opened, passed through": (
        lambda d: d.opened(UNIQUE, 1 << 40, 128, 1 << 30),
        pack("open_out", 1 << 40, 128, 1 << 30),
    ),
    "created": (
        lambda d: d.created(UNIQUE, *SHOWN, 1 << 40, 65),
        pack("entry_out", *ENTRY) + pack("open_out", 1 << 40, 65, 0),
    ),
    "created, passed through": (
        lambda d: d.created(UNIQUE, *SHOWN, 1 << 40, 128, 7),
        pack("entry_out", *ENTRY) + pack("open_out", 1 << 40, 128, 7),
    ),
    "count": (lambda d: d.count(UNIQUE, 1 << 31), pack("write_out", 1 << 31, 0)),
    "number": (lambda d: d.number(UNIQUE, 1 << 62), pack("lseek_out", 1 << 62)),
    "file system": (
        lambda d: d.file_system(UNIQUE, 1 << 41, 1 << 42, 1 << 43, 1 << 44, 1 << 45, 6, 7, 8),
        pack("statfs_out", 1 << 41, 1 << 42, 1 << 43, 1 << 44, 1 << 45, 6, 8, 7, 0, *[0] * 6),
    ),
    "lock": (
        lambda d: d.lock(UNIQUE, 1 << 61, 1 << 62, 3, 4),
        pack("lk_out", 1 << 61, 1 << 62, 3, 4),
    ),
    "controlled": (
        lambda d: d.controlled(UNIQUE, b"result"),
        pack("ioctl_out", 0, 0, 0, 0) + b"result",
    ),
    "controlled, nothing": (lambda d: d.controlled(UNIQUE, b""), pack("ioctl_out", 0, 0, 0, 0)),
    "statx": (lambda d: d.statx(UNIQUE, 2.25, 1007, A), body_of_statx()),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_has_the_protocols_layout(device: Device, kernel: socket.socket, name: str) -> None:
    send, body = REPLIES[name]
    assert send(device) is True
    received = kernel.recv(SIZE)
    assert received[:16] == pack("out_header", 16 + len(body), 0, UNIQUE)
    assert received[16:] == body


@pytest.mark.parametrize(
    ("code", "said"), [(1, 1), (errno.ENOSYS, 38), (511, 511), (512, 5), (0, 5), (-1, 5)]
)
def test_an_error_has_no_body(device: Device, kernel: socket.socket, code: int, said: int) -> None:
    """What the kernel takes for no error is EIO: it would go on waiting."""
    assert device.error(UNIQUE, code) is True
    assert kernel.recv(SIZE) == pack("out_header", 16, -said, UNIQUE)


def test_times_are_what_the_kernel_takes(device: Device, kernel: socket.socket) -> None:
    for seconds, whole, nanoseconds in (
        (0.0, 0, 0),
        (-1.0, 0, 0),
        (float("nan"), 0, 0),
        (0.25, 0, 250_000_000),
        (1e14, 10**14, 0),
        (1e15, 10**15, 0),
        (1e30, 10**15, 0),
        (float("inf"), 10**15, 0),
    ):
        device.attributes(UNIQUE, seconds, 1007, A)
        valid, fraction = STRUCTS["attr_out"].unpack(kernel.recv(SIZE)[16:])[:2]
        assert (valid, fraction) == (whole, nanoseconds)
    device.attributes(UNIQUE, 1 - 2**-53, 1007, A)
    assert STRUCTS["attr_out"].unpack(kernel.recv(SIZE)[16:])[:2] == (0, BILLION - 1)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(
        st.one_of(
            st.integers(-(1 << 70), 1 << 70),
            st.sampled_from([-1, 0, 1 << 31, 1 << 32, 1 << 63, 1 << 64]),
        ),
        min_size=23,
        max_size=24,
    ),
    valid=st.floats(),
)
def test_attributes_out_of_range_are_an_error(values: list[int], valid: float) -> None:
    """Or are sent, where they fit; never half of them."""
    a = tuple(values)
    sends: dict[int, Send] = {
        128: lambda d: d.entry(UNIQUE, 1, 2, valid, valid, 3, a),
        104: lambda d: d.attributes(UNIQUE, valid, 3, a),
        144: lambda d: d.created(UNIQUE, 1, 2, valid, valid, 3, a, 4, 5),
        288: lambda d: d.statx(UNIQUE, valid, 3, a),
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        device = Device(ours.fileno(), 64)
        for size, send in sends.items():
            if is_sent(device, send):
                assert len(theirs.recv(SIZE)) == 16 + size
            else:
                assert min(values) < 0 or max(values) >= 1 << 63
        with pytest.raises(BlockingIOError):
            theirs.recv(SIZE)


def is_sent(device: Device, send: Send) -> bool:
    try:
        return send(device)
    except OverflowError:
        return False


@pytest.mark.parametrize("wrong", [None, 1, [*A], A[:22], (), "text"])
def test_what_are_no_attributes_is_a_type_error(
    device: Device, kernel: socket.socket, wrong: Any
) -> None:
    entries = Entries(4096)
    sends: list[Callable[[], bool]] = [
        lambda: device.entry(UNIQUE, 1, 2, 3.0, 4.0, 5, wrong),
        lambda: device.attributes(UNIQUE, 1.0, 2, wrong),
        lambda: device.created(UNIQUE, 1, 2, 3.0, 4.0, 5, wrong, 6, 7),
        lambda: device.statx(UNIQUE, 1.0, 2, wrong),
        lambda: entries.add_plus(b"n", 1, 2, 3, 4, 5, 6.0, 7.0, wrong),
    ]
    for send in sends:
        with pytest.raises(TypeError):
            send()
    assert entries.reply == b""
    kernel.setblocking(False)
    with pytest.raises(BlockingIOError):
        kernel.recv(SIZE)


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_numbers_out_of_range_are_an_error(device: Device, number: int) -> None:
    for send in (
        lambda: device.opened(UNIQUE, number, 0),
        lambda: device.opened(UNIQUE, 0, number),
        lambda: device.count(UNIQUE, number),
        lambda: device.number(UNIQUE, number),
        lambda: device.lock(UNIQUE, number, 0, 0, 0),
        lambda: device.empty(number),
        lambda: device.file_system(UNIQUE, number, 0, 0, 0, 0, 0, 0, 0),
        lambda: Entries(number),
        lambda: Entries(4096).add(b"n", number, 0, 0),
    ):
        with pytest.raises(OverflowError):
            send()


def test_a_reply_that_the_kernel_refuses_is_an_error() -> None:
    """It would be our fault, and is not to be taken for a request that was withdrawn."""
    with select.epoll() as refuses:  # whose descriptor cannot be written to, with that very error
        device = Device(refuses.fileno(), SIZE)
        for send, _ in REPLIES.values():
            with pytest.raises(OSError, match="refused a reply") as info:
                send(device)
            assert info.value.errno == errno.EINVAL
        assert device.error(UNIQUE, errno.EIO) is False


# Entries


def dirent(name: bytes, ino: int, offset: int, kind: int) -> bytes:
    return padded(pack("dirent", ino, offset, len(name), kind) + name)


def test_entries_are_laid_out_as_the_kernel_reads_them() -> None:
    entries = Entries(4096)
    assert entries.reply == b""
    names = [b"a", b"12345678", b"123456789", b"n" * 255]
    expected = b""
    for number, name in enumerate(names):
        assert entries.add(name, 1 << 40 | number, 1 << 41 | number, number) is True
        expected += dirent(name, 1 << 40 | number, 1 << 41 | number, number)
    assert entries.reply == expected


def test_entries_with_attributes_come_before_their_names() -> None:
    entries = Entries(4096)
    assert entries.add_plus(b"name", 1007, 31, 8, *SHOWN[:4], A)
    assert entries.add_plus(b"..", 32, 33, 4, 0, 0, 0.0, 0.0, None)
    first = pack("entry_out", *ENTRY) + dirent(b"name", 1007, 31, 8)
    assert entries.reply == first + bytes(128) + dirent(b"..", 32, 33, 4)


@pytest.mark.parametrize("plus", [False, True])
def test_entries_that_have_no_room_are_left_out(plus: bool) -> None:
    """Whole ones; and what came before stays."""

    def add(entries: Entries, name: bytes) -> bool:
        if plus:
            return entries.add_plus(name, 1, 2, 3, 0, 0, 0.0, 0.0, None)
        return entries.add(name, 1, 2, 3)

    for length in (1, 7, 8, 9, 255):
        name = b"n" * length
        size = (128 if plus else 0) + len(dirent(name, 1, 2, 3))
        for room in (0, size - 1, size, 2 * size - 1, 2 * size):
            entries = Entries(room)
            fit = sum(add(entries, name) for _ in range(5))
            assert fit == room // size
            assert len(entries.reply) == fit * size
    unbounded = Entries((1 << 64) - 1)
    assert add(unbounded, b"n" * 100_000)


@settings(deadline=None, max_examples=100)
@given(room=st.integers(0, 2000), names=st.lists(st.binary(max_size=300), max_size=20))
def test_a_reply_of_entries_is_no_longer_than_it_may_be(room: int, names: list[bytes]) -> None:
    entries = Entries(room)
    expected = b""
    for number, name in enumerate(names):
        one = dirent(name, number, number, 0)
        fits = len(expected) + len(one) <= room
        assert entries.add(name, number, number, 0) is fits
        expected += one if fits else b""
    assert entries.reply == expected
