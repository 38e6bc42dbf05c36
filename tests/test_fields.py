"""The fields of nodes and fids: the same compiled and in Python, but for the memory they take."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import pytest

from ninefuse.linux.syscalls import Attributes
from ninefuse.tree import fields
from ninefuse.tree.identity import Born, Rights
from ninefuse.tree.nodes import Node

try:
    from ninefuse.tree import _known
except ImportError:
    _known = None  # type: ignore[assignment]

needs_extension = pytest.mark.skipif(_known is None, reason="the extension was not built")

WAYS = ["python", pytest.param("compiled", marks=needs_extension)]


@pytest.fixture(params=WAYS)
def node(request: pytest.FixtureRequest) -> Any:
    kind = fields._NodeFields if request.param == "python" else _known.NodeFields
    node = kind()
    node.refs, node.pins, node.uses, node.fd, node.recent = 1, 0, 254, -1, False
    return node


@pytest.fixture(params=WAYS)
def fid(request: pytest.FixtureRequest, node: Any) -> Any:
    return (fields._Fid if request.param == "python" else _known.Fid)(1 << 80, node)


def test_pins_and_references_are_counted(node: Any) -> None:
    """A pin has a reference; only a use is one, modulo 256."""
    assert node.pinned(True) is False
    assert (node.refs, node.pins, node.uses, node.recent) == (2, 1, 255, True)
    node.fd, node.recent = 7, False
    assert node.pinned(False) is True
    assert (node.refs, node.pins, node.uses, node.recent) == (3, 2, 255, False)
    assert node.pinned(True) is True
    assert node.uses == 0
    assert node.unpinned()
    assert (node.refs, node.pins) == (3, 2)
    assert node.dropped()
    assert node.unpinned()
    assert not node.unpinned()
    assert (node.refs, node.pins) == (0, 0)


@pytest.mark.parametrize(
    "mark",
    [
        *(0, 1_796_000_000 * 10**9 + 1, -5, (1 << 63) - 1, -(1 << 63), 1 << 63, -(1 << 63) - 1),
        *(Born(5, 6), b"handle", Rights(1, 2, 3), None),
    ],
)
def test_a_mark_is_what_was_set(node: Any, mark: Any) -> None:
    """Of the same type, too: a birth is an int. One that was there before does not show."""
    for before in (7, None, mark):
        node.mark = before
        node.mark = mark
        assert node.mark == mark
        assert type(node.mark) is type(mark)


def test_a_place_is_what_was_set(node: Any) -> None:
    for place in (None, (node, b"name"), (node, b"other"), None):
        node.place = place
        assert node.place == place


def test_a_fid_is_referenced_until_its_last_reference_was_dropped(fid: Any) -> None:
    assert (fid.number, fid.refs, fid.lookups, fid.generation) == (1 << 80, 1, 0, 0)
    assert fid.opened is None
    assert repr(fid) == f"<fid {1 << 80} unopened refs 1 lookups 0>"
    assert fid.referenced()
    assert fid.dropped()
    assert not fid.dropped()
    assert not fid.referenced()
    assert fid.refs == 0
    fid.lookups = fid.generation = (1 << 64) - 1
    assert fid.lookups == fid.generation == (1 << 64) - 1


@needs_extension
def test_what_a_known_file_takes() -> None:
    """Its node and its fid, with what the collector of garbage keeps of each."""
    a = Attributes(*[1] * len(Attributes._fields))
    node = Node(1, a, None, _Nowhere(), 5, None)  # type: ignore[arg-type]
    fid = fields.Fid(1, node)
    assert not gc.is_tracked(fid)
    assert sys.getsizeof(node) <= 128
    assert sys.getsizeof(fid) <= 64


class _Nowhere:
    directories = files = 0


CHAIN = """
import sys
from ninefuse.tree import fields
if sys.argv[1] == "python":
    Node = fields._NodeFields
else:
    from ninefuse.tree.nodes import Node
node = None
for _ in range(300_000):
    below = Node.__new__(Node)
    below.place = None if node is None else (node, b"name")
    node, below = below, None
del node
print("ended")
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_very_deep_tree_ends(way: str) -> None:
    """Each directory is known by the one below it, and goes with that: no stack is that deep."""
    done = subprocess.run(
        [sys.executable, "-c", CHAIN, way], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr
