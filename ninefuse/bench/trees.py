"""Workloads on a real tree of files: cp -r, find, ls -lR, grep -r, rm -rf."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ninefuse.bench import Processes, dd
from ninefuse.bench.users import Unsupported
from ninefuse.bench.workloads import (
    LIMIT,
    Measured,
    Workload,
    fresh,
    measured,
    parallel,
)


@dataclass(frozen=True)
class Tree(Workload):
    """A tool on a tree of files, a tree for each client; seconds until the last has ended.

    words: the command, with {tree} for the tree seen through the row (which is made natively
    before), {original} for the original's native path, {copy} for a new name in the row.
    """

    one: str = "tree"
    words: tuple[str, ...] = ()
    original: Path = Path()

    def run(self, processes: Processes, place: dd.Place, clients: int) -> Measured:
        if place.backing is None:
            raise Unsupported("it holds no tree")
        if self.users:
            raise Unsupported("its trees are of the user who mounted")
        with fresh(processes, place) as here:
            assert here.backing is not None
            commands = []
            for number in range(clients):
                if "{tree}" in self.words:
                    command = ["cp", "-r", "--", str(self.original), f"{here.backing}/{number}"]
                    processes.run(command, LIMIT)
                names = {
                    "{tree}": f"{here.directory}/{number}",
                    "{copy}": f"{here.directory}/{number}",
                    "{original}": str(self.original),
                }
                commands.append([names.get(word, word) for word in self.words])
            together = parallel(processes, here, commands)
        command = [names.get(word, word) for word in self.words]
        return measured(together.seconds, together, clients, command, here)


TREE_PACKAGES = (
    *("asyncio", "concurrent", "ctypes", "email", "encodings", "html", "http", "importlib"),
    *("json", "logging", "multiprocessing", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref"),
    *("xml", "zoneinfo"),
)


def make_original(top: Path) -> tuple[int, int]:
    """Copy a part of the interpreter's own library there; return its files and their bytes."""
    library = Path(os.__file__).parent
    for name in TREE_PACKAGES:
        if (library / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "test", "tests", "*.so")
            shutil.copytree(library / name, top / name, ignore=ignore)
    sizes = [path.stat().st_size for path in top.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
