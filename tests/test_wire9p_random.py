"""Random messages and sequences of messages: what the server makes of them, and what is left.

Frames: any bytes that have the size of a message get one answer that the protocol has. Sequences:
several connections do what they like in one tree, and each answer is compared with a model of it.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client9p import ROOT, Client, Served, served
from hypothesis import given, settings
from hypothesis import strategies as st
from model9p import Model, errno_name
from mounting import SOAK
from ops_helpers import outcome

from ninefuse.wire.codec import HEADER, HEADER_SIZE, encode
from ninefuse.wire.messages import BY_NUMBER, NONUNAME, NUMBER_OF, Message
from ninefuse.wire.users import Users

pytestmark = pytest.mark.soak

FRAMES = 1_000_000 if SOAK else 6_000
STEPS = 30_000 if SOAK else 1_300

NAMES = [b"a", b"b", b"c", b"..", b".", b"", b"a/b", b"\xff", b"x" * 255, b"x" * 256]
NUMBERS = [0, 1, 2, 3, 7, 24, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
LONG = [*NUMBERS, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
REQUESTS = [message for message in BY_NUMBER.values() if message.name.startswith("T")]
_SIZES = {"1": 1, "2": 2, "4": 4, "8": 8}


def value(r: random.Random, kind: str, name: str) -> Any:
    """A value for a field, mostly one that means something."""
    if name.endswith("fid"):
        return r.choice((*range(12), 0xFFFFFFFF))
    if kind in _SIZES:
        return r.choice([n for n in LONG if n < 256 ** _SIZES[kind]])
    if kind == "s":
        return r.choice([*NAMES, b"user.a", b"9P2000.L"])
    if kind == "names":
        return [r.choice(NAMES) for _ in range(r.choice((0, 1, 1, 2, 3, 17)))]
    return r.randbytes(r.choice((0, 1, 100, 5000)))


def frame(r: random.Random, tag: int) -> bytes:
    """A message: as it should be, with a byte changed, cut off or made longer, or random."""
    message: Message = r.choice(REQUESTS)
    if message.name == "Tversion" and r.random() < 0.9:
        message = BY_NUMBER[NUMBER_OF["Twalk"]]
    values = (value(r, field.kind, field.name) for field in message.fields)
    body = bytearray(encode(message.number, tag, *values)[HEADER_SIZE:])
    number, how = message.number, r.random()
    if how < 0.1 and body:
        body[r.randrange(len(body))] = r.randrange(256)
    elif how < 0.15:
        del body[r.randrange(len(body) + 1) :]
    elif how < 0.2:
        body += r.randbytes(r.randrange(20))
    elif how < 0.3:
        number, body = r.randrange(256), bytearray(r.randbytes(r.randrange(64)))
    return HEADER.pack(HEADER_SIZE + len(body), number, tag) + body


@pytest.mark.parametrize("model", ["none", "first", "second"])
def test_random_frames(tmp_path: Path, model: str) -> None:
    """Each gets one answer: its own kind's, or an error. Nothing is left in the end."""
    source = tmp_path / "source"
    source.mkdir()
    source.chmod(0o777)  # root is nobody
    r = random.Random(os.environ.get("NINEFUSE_SEED", model))
    with served(source, model=model, users=Users()) as server, server.client() as c:
        for tag in range(FRAMES // 3):
            sent = frame(r, tag % 0xFFFF)
            c.socket.sendall(sent)
            answer = c.receive()
            assert answer.tag == tag % 0xFFFF, sent
            assert answer.number in (NUMBER_OF["Rlerror"], sent[4] + 1), sent
            if answer.number == NUMBER_OF["Rlerror"]:
                assert 0 < answer.values[0] < 4096, sent
            if sent[4] == NUMBER_OF["Tversion"] or tag % 200 == 0:
                c.start()  # else most fids are taken, or gone, in time
    assert not list(source.parent.glob("x*")), "something was made outside"


@pytest.mark.parametrize("model", ["none", "first", "second"])
def test_random_frames_under_way(tmp_path: Path, model: str) -> None:
    """Many at a time, with Tflush of each other: none is answered twice or after its Rflush."""
    source = tmp_path / "source"
    source.mkdir()
    source.chmod(0o777)
    r = random.Random(os.environ.get("NINEFUSE_SEED", model))
    with served(source, model=model, users=Users()) as server, server.client() as c:
        for _ in range(max(20, FRAMES // 900)):
            for fid in range(1, 9):  # some that there are
                c.walk(fid)
            sent = {tag: _frame_or_flush(r, tag) for tag in range(300)}
            c.socket.sendall(b"".join(sent.values()))
            for tag in sent:
                c.send("Tflush", tag, tag=1000 + tag)
            came: list[int] = []
            while len([tag for tag in came if tag >= 1000]) < len(sent):
                answer = c.receive()
                came.append(answer.tag)
                if answer.tag < 1000:
                    kinds = NUMBER_OF["Rlerror"], sent[answer.tag][4] + 1
                    assert answer.number in kinds, sent[answer.tag]
            places = {tag: at for at, tag in enumerate(came)}
            assert len(places) == len(came), "one is answered twice"
            for tag, message in sent.items():
                assert places.get(tag, -1) < places[1000 + tag]
                assert tag in places or message[4] != NUMBER_OF["Tflush"]
            c.start()


def _frame_or_flush(r: random.Random, tag: int) -> bytes:
    if r.random() < 0.25:
        return encode(NUMBER_OF["Tflush"], tag, r.randrange(tag + 1))
    if r.random() < 0.1:  # one that may have to wait
        range_ = r.randrange(3), 1, r.randrange(3), r.randrange(3)
        return encode(NUMBER_OF["Tlock"], tag, r.randrange(12), *range_, r.randrange(3), b"x")
    while (message := frame(r, tag))[4] == NUMBER_OF["Tversion"]:
        pass
    return message


@pytest.mark.parametrize("size", [1, 3, 64])
def test_random_bytes(tmp_path: Path, size: int) -> None:
    """They may end the connection, and nothing else."""
    source = tmp_path / "source"
    source.mkdir()
    r = random.Random(size)
    with served(source, users=Users()) as server, server.client() as other:
        for _ in range(max(20, FRAMES // 900)):
            with server.client(starts=False) as c:
                c.socket.sendall(r.randbytes(r.randrange(1, 40)) * size)
            other.call("Tgetattr", ROOT, 0x7FF)


# Sequences, beside a model


def a_step(r: random.Random, model: Model, connection: int) -> tuple[str, tuple[Any, ...]]:
    """A message of a connection's, mostly one that can be."""
    fids = sorted(model.fids[connection])

    def fid(*kinds: str) -> int:
        fitting = [fid for fid in fids if model.fids[connection][fid].kind in kinds]
        return r.choice(fitting) if fitting and r.random() < 0.93 else r.choice((*fids, 99))

    def name() -> bytes:
        return r.choice([b"a", b"b", b"c", b"d"]) if r.random() < 0.95 else r.choice(NAMES)

    def new() -> int:
        free = [number for number in range(1, 9) if number not in fids]
        return r.choice(free) if free and r.random() < 0.95 else r.choice(range(1, 9))

    steps: list[Callable[[], tuple[str, tuple[Any, ...]]]] = [
        lambda: ("Twalk", (fid("dir"), new(), tuple(name() for _ in range(r.randrange(4))))),
        lambda: ("Twalk", (fid("dir", "file", "open"), new(), ())),
        lambda: ("Twalk", (fid("dir"), new(), tuple(r.choice((b"..", name())) for _ in "123"))),
        lambda: ("Twalk", ((n := fid("dir")), n, (name(),))),
        lambda: ("Tlopen", (fid("file"), r.choice((0, 1, 2, 0o1002)))),
        lambda: ("Tlcreate", (fid("dir"), name(), 2, 0o644, NONUNAME)),
        lambda: ("Tlcreate", (fid("dir"), name(), 0o202, 0o644, NONUNAME)),
        lambda: ("Twrite", (fid("open"), r.randrange(20), r.randbytes(r.randrange(9)))),
        lambda: ("Tread", (fid("open"), r.randrange(20), 30)),
        lambda: ("Tmkdir", (fid("dir"), name(), 0o755, NONUNAME)),
        lambda: ("Tunlinkat", (fid("dir"), name(), r.choice((0, 0, 0x200)))),
        lambda: ("Trenameat", (fid("dir"), name(), fid("dir"), name())),
        lambda: ("Trename", (fid("file", "open", "dir"), fid("dir"), name())),
        lambda: ("Tremove", (fid("file", "open"),)),
        lambda: ("Tlink", (fid("dir"), fid("file", "open"), name())),
        lambda: ("Tgetattr", (fid("file", "open", "dir"), 0x7FF)),
        lambda: ("Tsetattr", (fid("file", "open"), 8, 0, 0, 0, r.randrange(20), 0, 0, 0, 0)),
        lambda: ("Tclunk", (fid("file", "open", "dir"),)),
        lambda: ("Tclunk", (fid("file", "open"),)),
    ]
    return r.choice(steps)()


def shown(client: Client, message: str, values: tuple[Any, ...]) -> Any:
    """What a client is answered, as far as the model knows it; or the name of an errno."""
    found = outcome(lambda: client.call(message, *values))
    if isinstance(found, str):
        return found
    if message == "Twalk":
        return [qid[0] for qid in found[0]]
    if message == "Tgetattr":
        mode, nlink, size = found[2], found[5], found[7]
        return ("dir",) if stat.S_ISDIR(mode) else ("file", nlink, size)
    return found[0] if message in ("Tread", "Twrite") else ()


def run_sequence(r: random.Random, server: Served, source: Path, steps: int) -> None:
    """Three connections take so many steps in an empty tree, beside a model of it."""
    model = Model(3)
    clients = [server.client() for _ in range(3)]
    try:
        for number in range(steps):
            connection = r.randrange(3)
            if r.random() < 0.004:  # one goes, and comes back
                clients[connection].socket.close()
                clients[connection] = server.client()
                model.hang_up(connection)
                continue
            message, values = a_step(r, model, connection)
            expected = errno_name(lambda: model.call(connection, message, *values))  # noqa: B023
            found = shown(clients[connection], message, values)
            assert found == expected, f"step {number}: {message} {values} of {connection}"
        assert model.tree() == on_disk(source)
    finally:
        for client in clients:
            client.socket.close()


@pytest.mark.parametrize("driver", ["none", "first", "second"])
def test_long_sequences(tmp_path: Path, driver: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with served(source, model=driver) as server:
        run_sequence(random.Random(os.environ.get("NINEFUSE_SEED", driver)), server, source, STEPS)


def test_short_sequences(tmp_path: Path) -> None:
    """Of which hypothesis finds a shortest one that fails."""
    source = tmp_path / "source"
    source.mkdir()
    with served(source) as server:

        @settings(max_examples=50 if not SOAK else 2000, derandomize=True, deadline=None)
        @given(st.randoms(use_true_random=False), st.integers(0, 40))
        def check(r: random.Random, steps: int) -> None:
            for path in source.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            run_sequence(r, server, source, steps)

        check()


def on_disk(directory: Path) -> dict[bytes, Any]:
    return {
        os.fsencode(path.name): on_disk(path) if path.is_dir() else path.read_bytes()
        for path in directory.iterdir()
    }
