"""The table of what one write takes (tools/write_path.py) is the one in docs/architecture.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mounting import run

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| ([a-z][a-z3', ]+) \| (\d+) \| (\d+) \| (\d+) \|$", re.M)


def table(text: str) -> dict[str, tuple[int, ...]]:
    """The rows of numbers: none, first, second."""
    return {name: tuple(map(int, numbers)) for name, *numbers in ROW.findall(text)}


def test_what_a_write_takes_is_what_the_page_says() -> None:
    """Under none to the frame; under the others, whose threads meet by chance, about."""
    done = run(sys.executable, ROOT / "tools" / "write_path.py")
    measured = table(done.stdout)
    told = table((ROOT / "docs" / "architecture.md").read_text())
    assert len(measured) == 10, done.stdout + done.stderr
    for name, numbers in measured.items():
        if sys.version_info[:2] == (3, 11):  # of which the page speaks
            assert told[name][0] == numbers[0], name
        for one, other in zip(told[name], numbers, strict=True):
            assert one / 2 <= other <= 2 * one, name
