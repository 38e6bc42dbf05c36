"""FUSE's messages as the protocol describes them: structures, one golden message of each kind.

Nothing here is taken from what it tests (ninefuse/fuse/_wire.pyx). The structures are written down
from Linux include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random
from struct import Struct
from typing import Any, NamedTuple

# Native order without padding: what padding there is has a field of its own.
STRUCTS = {
    name: Struct("=" + fields)
    for name, fields in {
        "in_header": "2I 2Q 3I 2H",
        "out_header": "I i Q",
        "forget_in": "Q",
        "forget_one": "2Q",
        "batch_forget_in": "2I",
        "getattr_in": "2I Q",
        "setattr_in": "2I 6Q 8I",
        "mknod_in": "4I",
        "mkdir_in": "2I",
        "rename_in": "Q",
        "rename2_in": "Q 2I",
        "link_in": "Q",
        "open_in": "2I",
        "create_in": "4I",
        "read_in": "2Q 2I Q 2I",
        "write_in": "2Q 2I Q 2I",
        "release_in": "Q 2I Q",
        "flush_in": "Q 2I Q",
        "fsync_in": "Q 2I",
        "setxattr_in": "4I",
        "getxattr_in": "2I",
        "lk_in": "2Q 2Q2I 2I",
        "init_in": "4I I 11I",
        "interrupt_in": "Q",
        "ioctl_in": "Q 2I Q 2I",
        "fallocate_in": "3Q 2I",
        "lseek_in": "2Q 2I",
        "copy_file_range_in": "7Q",
        "syncfs_in": "Q",
        "statx_in": "2I Q 2I",
        "ext_header": "2I",
        "secctx": "2I",
        "attr": "6Q 10I",
        "entry_out": "4Q 2I 6Q10I",
        "attr_out": "Q 2I 6Q10I",
        "open_out": "Q I i",
        "write_out": "2I",
        "statfs_out": "5Q 4I 6I",
        "getxattr_out": "2I",
        "lk_out": "2Q2I",
        "ioctl_out": "i 3I",
        "lseek_out": "Q",
        "statx_out": "Q 2I 2Q 2IQ3I2H4QqIiqIiqIiqIi4I14Q",
        "dirent": "2Q 2I",
    }.items()
}

HEADER = STRUCTS["in_header"].size
LOOKUP, FORGET, SETLKW, SETLK, INIT, BATCH_FORGET, WRITE = 1, 2, 33, 32, 26, 42, 16
INTERRUPT, NOTIFY_REPLY = 36, 41
SETXATTR = 21
UNANSWERED = frozenset((FORGET, BATCH_FORGET, INTERRUPT, NOTIFY_REPLY))
INIT_EXT = 1 << 30
FURTHER_GROUPS = 32  # the kind of an extension; one below is a number of security contexts


def pack(name: str, *values: int) -> bytes:
    """A structure."""
    return STRUCTS[name].pack(*values)


def request(
    opcode: int,
    body: bytes = b"",
    *,
    unique: int = 0x1122334455667788,
    nodeid: int = 0x2233445566778899,
    uid: int = 1001,
    gid: int = 1002,
    pid: int = 1003,
    extensions: int = 0,
    length: int | None = None,
) -> bytes:
    """A request as the device would give it.

    Args:
        opcode, body, unique, nodeid, uid, gid, pid: of it.
        extensions: how many bytes at the body's end are extensions.
        length: what the header says; None: what is true.
    """
    whole = HEADER + len(body) if length is None else length
    header = pack("in_header", whole, opcode, unique, nodeid, uid, gid, pid, extensions // 8, 0)
    return header + body


def padded(data: bytes) -> bytes:
    """Data filled up to a multiple of 8 bytes."""
    return data + bytes(-len(data) % 8)


def contexts(*of: tuple[bytes, bytes]) -> bytes:
    """The extension with security contexts: (name, value) of each."""
    each = b"".join(
        padded(pack("secctx", len(value), 0) + name + b"\0" + value) for name, value in of
    )
    return pack("ext_header", STRUCTS["ext_header"].size + len(each), len(of)) + each


def groups(*of: int) -> bytes:
    """The extension with the caller's further groups."""
    body = padded(struct.pack(f"=I{len(of)}I", len(of), *of))
    return pack("ext_header", STRUCTS["ext_header"].size + len(body), FURTHER_GROUPS) + body


class Golden(NamedTuple):
    """A request, and what it says.

    Attributes:
        name: of it, for reports.
        opcode, body: of it.
        args: what `Message.args` is to be.
        short: whether a SETXATTR has the structure of before FUSE_SETXATTR_EXT.
        groups, contexts: what the message is to have of them.
        extensions: how many bytes at the body's end are extensions.
    """

    name: str
    opcode: int
    body: bytes
    args: tuple[Any, ...]
    short: bool = False
    groups: tuple[int, ...] | None = None
    contexts: tuple[tuple[bytes, bytes], ...] | None = None
    extensions: int = 0

    @property
    def data(self) -> bytes:
        """All of it."""
        return request(self.opcode, self.body, extensions=self.extensions)


_NODEID = 0x2233445566778899  # of `request`
_BEFORE_1970 = -5  # seconds
_GROUPS = groups(5001, 5002, 5003)
_CONTEXTS = contexts((b"security.one", b"value"), (b"security.other", b""))


def _making(name: str, opcode: int, body: bytes, args: tuple[Any, ...]) -> Iterator[Golden]:
    """A request that makes something, with each of the extensions that it may have."""
    yield Golden(name, opcode, body, args, groups=(), contexts=())
    of = ((b"security.one", b"value"), (b"security.other", b""))
    for extra, found, contexts_found in (
        (_GROUPS, (5001, 5002, 5003), ()),
        (_CONTEXTS, (), of),
        (_CONTEXTS + _GROUPS, (5001, 5002, 5003), of),
        (contexts(), (), ()),
    ):
        yield Golden(
            f"{name}+{len(extra)}",
            opcode,
            body + extra,
            args,
            groups=found,
            contexts=contexts_found,
            extensions=len(extra),
        )


def _all() -> Iterator[Golden]:
    """One golden message of each opcode, and of each layout; every field has a value of its own."""
    for name, opcode in (("LOOKUP", 1), ("UNLINK", 10), ("RMDIR", 11), ("REMOVEXATTR", 24)):
        yield Golden(name, opcode, b"a name\0", (b"a name",))
    yield Golden("FORGET", 2, pack("forget_in", 1 << 33), ((_NODEID, 1 << 33),))
    forgets = ((1 << 40, 3), (1 << 41, 1 << 63), (7, 1))
    body = pack("batch_forget_in", 3, 0) + b"".join(pack("forget_one", *one) for one in forgets)
    yield Golden("BATCH_FORGET", 42, body, forgets)
    yield Golden("BATCH_FORGET none", 42, pack("batch_forget_in", 0, 0), ())
    yield Golden("GETATTR", 3, pack("getattr_in", 1, 0, 1 << 35), (1, 1 << 35))
    times = (1 << 34, _BEFORE_1970 % (1 << 64), 1 << 32)
    body = pack("setattr_in", 0x7FF, 0, 21, 22, 23, *times, 24, 25, 26, 0o100640, 0, 27, 28, 0)
    yield Golden(
        "SETATTR",
        4,
        body,
        (0x7FF, 21, 22, 23, 1 << 34, _BEFORE_1970, 1 << 32, 24, 25, 26, 0o100640, 27, 28),
    )
    yield Golden("READLINK", 5, b"", ())
    yield from _making("SYMLINK", 6, b"a name\0a target\0", (b"a name", b"a target"))
    body = pack("mknod_in", 0o020600, 0x0107, 0o022, 0) + b"node\0"
    yield from _making("MKNOD", 8, body, (b"node", 0o020600, 0x0107, 0o022))
    yield from _making("MKDIR", 9, pack("mkdir_in", 0o750, 0o027) + b"d\0", (b"d", 0o750, 0o027))
    body = pack("rename_in", 1 << 36) + b"old\0new one\0"
    yield Golden("RENAME", 12, body, (b"old", b"new one", 1 << 36, 0))
    body = pack("rename2_in", 1 << 36, 3, 0) + b"old\0new one\0"
    yield Golden("RENAME2", 45, body, (b"old", b"new one", 1 << 36, 3))
    yield Golden("LINK", 13, pack("link_in", 1 << 37) + b"other\0", (b"other", 1 << 37))
    for name, opcode in (("OPEN", 14), ("OPENDIR", 27)):
        yield Golden(name, opcode, pack("open_in", 0o2001, 1), (0o2001, 1))
    body = pack("create_in", 0o102, 0o640, 0o026, 1) + b"file\0"
    yield from _making("CREATE", 35, body, (b"file", 0o102, 0o640, 0o026, 1))
    body = pack("create_in", 0o20200002, 0o600, 0o077, 0) + b"/\0"
    yield from _making("TMPFILE", 51, body, (b"/", 0o20200002, 0o600, 0o077, 0))
    body = pack("read_in", 31, 1 << 42, 131072, 2, 1 << 43, 0o100000, 0)
    for name, opcode in (("READ", 15), ("READDIR", 28), ("READDIRPLUS", 44)):
        yield Golden(name, opcode, body, (31, 1 << 42, 131072, 2, 1 << 43, 0o100000))
    for data in (b"", b"what\0is\0written"):
        body = pack("write_in", 31, 1 << 42, len(data), 4, 1 << 43, 0o2001, 0) + data
        args = (31, 1 << 42, data, 4, 1 << 43, 0o2001)
        yield Golden(f"WRITE {len(data)}", 16, body, args)
    yield Golden("STATFS", 17, b"", ())
    body = pack("release_in", 41, 0o100001, 2, 1 << 44)
    for name, opcode in (("RELEASE", 18), ("RELEASEDIR", 29)):
        yield Golden(name, opcode, body, (41, 0o100001, 2, 1 << 44))
    yield Golden("FLUSH", 25, pack("flush_in", 41, 0, 0, 1 << 44), (41, 1 << 44))
    for name, opcode in (("FSYNC", 20), ("FSYNCDIR", 30)):
        yield Golden(name, opcode, pack("fsync_in", 51, 1, 0), (51, 1))
    body = pack("setxattr_in", 5, 2, 1, 0) + b"user.n\0val\0e"
    yield Golden("SETXATTR", 21, body, (b"user.n", b"val\0e", 2, 1))
    body = struct.pack("=2I", 5, 2) + b"user.n\0val\0e"
    yield Golden("SETXATTR short", 21, body, (b"user.n", b"val\0e", 2, 0), short=True)
    yield Golden("GETXATTR", 22, pack("getxattr_in", 65536, 0) + b"user.n\0", (b"user.n", 65536))
    yield Golden("LISTXATTR", 23, pack("getxattr_in", 65536, 0), (65536,))
    yield Golden("INIT 16", 26, struct.pack("=4I", 7, 31, 131072, 0x2F), (7, 31, 131072, 0x2F))
    # It says that it has more flags, and then has none.
    body = struct.pack("=4I", 7, 36, 131072, INIT_EXT | 0xF)
    yield Golden("INIT 16, extended", 26, body, (7, 36, 131072, INIT_EXT | 0xF))
    body = pack("init_in", 7, 45, 131072, INIT_EXT | 0xF, 0x14, *[0] * 11)
    yield Golden("INIT 64", 26, body, (7, 45, 131072, INIT_EXT | 0xF | 0x14 << 32))
    # Without that flag the field is none.
    body = pack("init_in", 7, 35, 131072, 0xF, 0x14, *[0] * 11)
    yield Golden("INIT 64, not extended", 26, body, (7, 35, 131072, 0xF))
    body = pack("lk_in", 61, 1 << 45, 100, 199, 1, 62, 1, 0)
    for name, opcode in (("GETLK", 31), ("SETLK", 32), ("SETLKW", 33)):
        yield Golden(name, opcode, body, (61, 1 << 45, 100, 199, 1, 62, 1))
    yield Golden("INTERRUPT", 36, pack("interrupt_in", 1 << 46), (1 << 46,))
    yield Golden("DESTROY", 38, b"", ())
    body = pack("ioctl_in", 71, 16, 0x40086602, 1 << 46, 4, 8) + b"data"
    yield Golden("IOCTL", 39, body, (71, 16, 0x40086602, b"data", 8))
    yield Golden("NOTIFY_REPLY", 41, bytes(40) + b"page", ())
    yield Golden(
        "FALLOCATE", 43, pack("fallocate_in", 91, 1 << 40, 1 << 41, 3, 0), (91, 1 << 40, 1 << 41, 3)
    )
    yield Golden("LSEEK", 46, pack("lseek_in", 92, (1 << 64) - 1, 4, 0), (92, -1, 4))
    body = pack("copy_file_range_in", 93, 94, 95, 96, 97, 1 << 62, 1 << 61)
    for name, opcode in (("COPY_FILE_RANGE", 47), ("COPY_FILE_RANGE_64", 53)):
        yield Golden(name, opcode, body, (93, 94, 95, 96, 97, 1 << 62, 1 << 61))
    yield Golden("SYNCFS", 50, pack("syncfs_in", 0), ())
    yield Golden("STATX", 52, pack("statx_in", 1, 0, 98, 2, 0xFFF), (1, 98, 2, 0xFFF))
    yield Golden("unknown", 4000, b"something", ())


GOLDEN = list(_all())
_OPCODES = sorted({one.opcode for one in GOLDEN})
_OF_EACH = {opcode: [one for one in GOLDEN if one.opcode == opcode] for opcode in _OPCODES}


# Mutations


class Edit(NamedTuple):
    """A change of a message; places and lengths are taken modulo what there is.

    Attributes:
        kind: OVERWRITE, with the data; CUT, so that `at` bytes are left; ADD the data.
    """

    kind: int
    at: int
    data: bytes = b""


OVERWRITE, CUT, ADD = range(3)

# What turns lengths, counts and numbers into bad ones.
BAD = [
    *(struct.pack("=I", number) for number in (0, 1, 7, 8, 9, 31, 32, 33, 4096, 1 << 24, 1 << 31)),
    *(struct.pack("=I", (1 << 32) - number) for number in (1, 2, 7, 8, 40)),
    *(struct.pack("=Q", number) for number in (1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)),
    b"\0",
    b"\xff",
    b"/",
]


def mutated(data: bytes, edits: list[Edit], *, true_length: bool) -> bytes:
    """A message with these changes.

    Args:
        data: the message.
        edits: what to change, one after the other.
        true_length: whether the header says the new length.
    """
    changed = bytearray(data)
    for kind, at, new in edits:
        if kind == CUT:
            del changed[at % (len(changed) + 1) :]
        elif kind == ADD:
            changed += new
        elif changed:
            start = at % len(changed)
            changed[start : start + len(new)] = new
    if true_length and len(changed) >= 4:
        changed[:4] = struct.pack("=I", len(changed))
    return bytes(changed)


def random_edits(choose: Random, length: int) -> list[Edit]:
    """Some changes of a message of that length."""
    edits = []
    for _ in range(choose.choice((1, 1, 1, 2, 3, 8))):
        kind = choose.choice((OVERWRITE, OVERWRITE, OVERWRITE, OVERWRITE, CUT, ADD))
        new = (
            choose.choice(BAD) if choose.random() < 0.7 else choose.randbytes(choose.randint(1, 12))
        )
        # The header has little to be changed.
        at = choose.randrange(0 if choose.random() < 0.05 else HEADER, max(length, HEADER) + 1)
        edits.append(Edit(kind, at, new))
    return edits


def random_input(choose: Random) -> bytes:
    """A changed golden message, or random bytes, sometimes with a header that is one."""
    what = choose.random()
    if what < 0.8:
        golden = choose.choice(_OF_EACH[choose.choice(_OPCODES)])
        edits = random_edits(choose, len(golden.data))
        return mutated(golden.data, edits, true_length=choose.random() < 0.9)
    data = choose.randbytes(choose.choice((0, 3, 39, 40, 41, 48, 72, 100, 300)))
    if what < 0.9:
        return data
    return request(choose.randrange(60), data)
