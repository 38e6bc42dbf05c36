"""Which workloads there are: their names, amounts and options. The kinds are in workloads.py and
trees.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ninefuse.bench.trees import Tree
from ninefuse.bench.users import Users
from ninefuse.bench.workloads import (
    FioRead,
    Listing,
    Metadata,
    Read,
    SyncWrite,
    Workload,
    Write,
    make_files,
    make_one,
    make_readable,
)

HEADLINE = "sync-write"
# Those that read or write files, beside the headline.
DATA_KEYS = frozenset(("write-4k", "write-1m", "write-user", "read-1m", "read-cached", "read-4k"))

_PYTHON = "the Python client"
_MEBI = 1 << 20


def workloads(original: Path, scale: float, fio: bool) -> list[Workload]:
    """Return all workloads, the headline first.

    Arguments: original, the tree's, see make_original. scale: factor on the amounts. fio:
    whether there is fio, otherwise the measuring client reads.
    """

    def amount(number: int, least: int = 8) -> int:
        return max(least, int(number * scale))

    return [
        SyncWrite(HEADLINE, "4k write, O_SYNC", "MB/s", "dd"),
        *_data(amount, fio),
        *_metadata(amount),
        *_trees(original),
    ]


# Returns the number scaled, but not less than the second.
Amount = Callable[..., int]


def _data(amount: Amount, fio: bool) -> list[Workload]:
    warm = "each file new to the mount and in the source's cache: the way, not the disk"
    read = ("read-4k", "4k read, random", "1/s")
    random: Workload
    if fio:
        random = FioRead(*read, "fio", amount(12000), note=warm)
    else:
        random = Metadata(
            *(*read, _PYTHON, amount(12000)),
            note=warm,
            operation="read",
            prepare=make_readable,
            prefix="file-{bytes}-",
        )
    return [
        Write("write-4k", "4k write, buffered", "MB/s", "dd", amount(32 * _MEBI, 1 << 16)),
        Write(
            *("write-1m", "1M write, fdatasync", "MB/s", "dd", amount(64 * _MEBI, 4 * _MEBI)),
            block=_MEBI,
            words=("conv=fdatasync",),
        ),
        Write(
            *("write-user", "4k write, other user", "MB/s", "dd", amount(32 * _MEBI, 1 << 16)),
            note="as 4k write, by clients of another user than root, who mounted",
            users=Users(1),
        ),
        Read(
            *("read-1m", "1M read, cold", "MB/s", "dd", amount(64 * _MEBI, 4 * _MEBI)),
            note="in no cache: neither the mount's nor the source's",
        ),
        Read(
            *("read-cached", "1M read, cached", "MB/s", "dd", amount(128 * _MEBI, 4 * _MEBI)),
            note="in the source's cache and past the mount's (O_DIRECT): a request for each MiB",
            cached=True,
        ),
        random,
    ]


def _metadata(amount: Amount) -> list[Workload]:
    cold = "names that the mount has not seen"
    return [
        Metadata(
            *("stat", "stat, own directory", "1/s", _PYTHON, amount(1500)),
            note=f"{cold}, in a directory for each client",
            operation="stat",
            prepare=make_files,
            prefix="file-0-",
        ),
        Metadata(
            *("stat-shared", "stat, one directory", "1/s", _PYTHON, amount(1500)),
            note=f"{cold}, all in one directory, whose lookups the kernel serialises",
            operation="stat",
            prepare=make_files,
            prefix="file-0-",
            shared=True,
        ),
        Metadata(
            *("missing", "missing name", "1/s", _PYTHON, amount(1500)),
            note="names that are not there, each asked for once",
            operation="missing",
        ),
        Metadata(
            *("getattr", "attributes again", "1/s", _PYTHON, amount(3000)),
            note="one file for each client, again and again, past what the kernel believes",
            operation="getattr",
            prepare=make_one,
            prefix="file-4096-",
        ),
        Metadata(
            *("open", "open + close", "1/s", _PYTHON, amount(1500)),
            note="one file for each client, again and again",
            operation="open",
            prepare=make_one,
            prefix="file-4096-",
        ),
        Metadata(
            *("create", "create + unlink", "1/s", _PYTHON, amount(1000)),
            note="pairs of both",
            operation="create",
        ),
        Listing(
            *("readdir", "names listed", "1/s", _PYTHON, amount(8, 4)),
            note="os.listdir of 200 names in new directories (READDIRPLUS); amount: directories",
        ),
        Metadata(
            *("chmod", "chmod", "1/s", _PYTHON, amount(1500)),
            note="one file for each client, again and again",
            operation="chmod",
            prepare=make_one,
            prefix="file-4096-",
        ),
    ]


def _trees(original: Path) -> list[Workload]:
    trees = (
        ("cp", "cp -r of a tree", ("cp", "-r", "--", "{original}", "{copy}")),
        ("find", "find", ("find", "{tree}", "-type", "f", "-newer", "{original}")),
        ("ls", "ls -lR", ("ls", "-lR", "--", "{tree}")),
        ("grep", "grep -r", ("grep", "-rcw", "yield", "--", "{tree}")),
        ("rm", "rm -rf", ("rm", "-rf", "--", "{tree}")),
    )
    return [
        Tree(
            *(f"tree-{key}", title, "s", words[0]),
            more_is_better=False,
            note="a part of Python's own library, a cold copy for each client",
            words=words,
            original=original,
        )
        for key, title, words in trees
    ]
