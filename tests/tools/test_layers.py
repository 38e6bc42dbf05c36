"""What may import what: import-linter's contracts, each of which breaks when it is crossed."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with the contracts."""
    shutil.copytree(
        ROOT / "ninefuse", tmp_path / "ninefuse", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy2(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def broken(tree: Path) -> list[str]:
    """The contracts that are broken, by name; as `make check` asks."""
    code = "import sys; from importlinter.cli import lint_imports_command as main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--no-logo"],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(.*) BROKEN", done.stdout, re.M)
    assert bool(found) == bool(done.returncode), done.stdout + done.stderr
    return found


def test_the_contracts_are_kept(tree: Path) -> None:
    assert broken(tree) == []


def test_each_contract_breaks_when_its_line_is_crossed(tree: Path) -> None:
    """One import each, all of which Python itself would take."""
    for module, line in (
        ("linux/mountflags.py", "from ninefuse.tree import qids"),
        ("ops/xattr.py", "import threading"),
        ("tree/order.py", "import trio"),
        ("driving/shares.py", "import ninefuse.tree.session"),
        ("serve.py", "import ninefuse.stats"),
        ("watching/report.py", "import pyfuse3"),
    ):
        with open(tree / "ninefuse" / module, "a") as file:
            file.write(line + "\n")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    contracts = [config[one]["name"] for one in config if one.startswith("importlinter:contract:")]
    assert broken(tree) == contracts


def test_a_new_module_has_to_be_given_its_layer(tree: Path) -> None:
    (tree / "ninefuse" / "elsewhere.py").touch()
    assert broken(tree) == ["Each district imports only what stands below it"]
