"""docs/exit-codes.md has each line that the ninefuse command may end with, and no other."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from ninefuse.exitcodes import ExitCode

ROOT = Path(__file__).resolve().parents[2]

# For whom the line is passed on, or what argparse says.
_NOT_A_TEXT = re.compile(r"[…\W]*(\(see ninefuse --help\))?")


def documented() -> list[tuple[int, str]]:
    text = (ROOT / "docs/exit-codes.md").read_text()
    return [
        (int(code), line) for code, line in re.findall(r"^\| (\d+) \| `([^`]+)` \|", text, re.M)
    ]


def in_the_code() -> Iterator[tuple[int, str]]:
    """Yield the exit code and the text of each Failure that is made anywhere."""
    for path in (ROOT / "ninefuse").rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            texts: dict[str, list[ast.expr]] = {}  # what each name is made
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    texts.setdefault(node.targets[0].id, []).append(node.value)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Failure":
                    code, _, name = ast.unparse(node.args[0]).partition(".")
                    if isinstance(node.args[1], ast.Name) and node.args[1].id in constants:
                        texts = {node.args[1].id: [constants[node.args[1].id]]}
                    for chosen in itertools.product(*texts.values()):
                        text = template(node.args[1], dict(zip(texts, chosen, strict=True)))
                        if code == "ExitCode" and not _NOT_A_TEXT.fullmatch(text):
                            yield int(ExitCode[name]), text


def template(node: ast.expr, texts: dict[str, ast.expr]) -> str:
    """Return a message with … for all that is put in, but for texts of the same function."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, texts) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, texts)
    if isinstance(node, ast.Name) and isinstance(texts.get(node.id), ast.Constant | ast.JoinedStr):
        return template(texts[node.id], {})
    return "…"


def test_the_lines_of_the_code_are_those_of_the_page() -> None:
    assert set(documented()) == set(in_the_code())


def test_each_line_stands_once_and_in_the_order_of_its_code() -> None:
    lines = documented()
    assert len(set(lines)) == len(lines)
    assert [code for code, _ in lines] == sorted(code for code, _ in lines)


def test_every_exit_code_has_a_line() -> None:
    assert {code for code, _ in documented()} == {int(code) for code in ExitCode} - {0}
