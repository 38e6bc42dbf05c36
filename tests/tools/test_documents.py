"""Every block of commands in README.md, beside it and in docs/ is run, or it is said why it is not.

A block is what is indented by four blanks or stands between fences. Each runs in a directory of its
own, with the paths that the pages use (/tmp/src, /tmp/mnt) below it, and with what it needs to find
there made before.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from blocks import Key, block_of, blocks
from mounting import ENVIRONMENT, PATIENCE, REPO, detach
from ops_helpers import bound_callbacks
from pyfuse3 import Operations

from ninefuse.fuse.adapter import Adapter

MOUNT = "ninefuse /tmp/src /tmp/mnt --log /tmp/log"
UNMOUNT = "fusermount3 -u /tmp/mnt"
KILL = "kill -9 $(ninefuse-stat --json /tmp/mnt | grep -Po '\"pid\": \\K\\d+')"


@dataclass(frozen=True)
class Run:
    """How a block is run.

    output: patterns that it prints, in this order. before, after: commands of the test's. files:
    what to make of other blocks, by name.
    """

    output: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    files: tuple[tuple[str, Key], ...] = ()


# Callbacks that pyfuse3 does not have.
BEYOND_PYFUSE3 = {"getlk", "setlk", "flock"}

MODEL = ("docs/new-model.md", '"""thread_per_request.py')

RUN: dict[Key, Run] = {
    ("README.md", "mkdir -p /tmp/src /tmp/mnt"): Run(
        (r"1000\+0 records out",), after="test $(stat -c %s /tmp/src/file) = 4096000"
    ),
    ("docs/index.md", "mkdir -p /tmp/src /tmp/mnt"): Run(
        after="cmp /etc/hostname /tmp/src/hostname"
    ),
    ("docs/architecture.md", "from ninefuse import ops"): Run((r"^b'[^']+\\n'$",)),
    ("docs/adding-an-operation.md", "import errno"): Run((r"^1048576$",)),
    ("docs/observing.md", "ninefuse-stat /tmp/mnt"): Run(
        (r"model second, 16 threads", r"model second, 16 threads"), MOUNT, UNMOUNT
    ),
    ("docs/observing.md", "getfattr --only-values"): Run(
        (r'^\{.*"model": ?"second"',), MOUNT, UNMOUNT
    ),
    ("docs/observing.md", "ninefuse --trace"): Run(
        # The daemon ends a little later than its mount.
        after="until python3 -m json.tool /tmp/trace.json; do sleep 0.05; done >/dev/null 2>&1",
    ),
    ("docs/new-model.md", "PYTHONPATH=$PWD ninefuse --model"): Run(
        (r"model thread-per-request",),
        after="cmp /etc/hostname /tmp/src/hostname",
        files=(("thread_per_request.py", MODEL),),
    ),
    ("docs/troubleshooting.md", "fusermount3 -u"): Run(
        before=f"{MOUNT}; {KILL}; ! ls /tmp/mnt", after=f"ls /tmp/mnt; {UNMOUNT}"
    ),
    ("docs/troubleshooting.md", "pkill --oldest -USR2"): Run(
        before=MOUNT,
        after=f"until grep -q 'requests under way' /tmp/log; do sleep 0.05; done; {UNMOUNT}",
    ),
    ("docs/troubleshooting.md", "grep ' /tmp/mnt '"): Run(
        (r"^\d+ \d+ 0:\d+ / \S+ .* fuse\.ninefuse ",), MOUNT, UNMOUNT
    ),
    ("docs/troubleshooting.md", "fuser -vm /tmp/mnt"): Run(
        (r"sleep",),
        f"{MOUNT}; cd /tmp/mnt; sleep 60 & cd /; sleeper=$!; ! {UNMOUNT}",
        f"kill $sleeper; wait $sleeper || {UNMOUNT}",
    ),
    ("docs/troubleshooting.md", "ls -l /dev/fuse"): Run((r"^crw",)),
}

PICTURE = "a picture"
TABLE = "a table of results"
NOT_RUN: dict[Key, str] = {
    ("README.md", "make demo "): "takes a minute: test_demo.py; and make test is running this",
    ("README.md", "dd if=/dev/zero of=/tmp/mnt/file     "): PICTURE,
    ("README.md", "source         none"): TABLE,
    ("docs/index.md", "make demo"): "takes a minute: test_demo.py",
    ("docs/options.md", "ninefuse [options] SRC MNT"): "how the command is written",
    ("docs/architecture.md", "programs "): PICTURE,
    ("docs/architecture.md", "dd if=/dev/zero of=/mnt/file     "): PICTURE,
    ("docs/architecture.md", "echo 16000 > /sys/fs/fuse/"): "test_mount_slow.py writes there",
    ("docs/conformance.md", "make conformance"): "needs pjdfstest, built: test_conformance.py",
    ("docs/models.md", "async def mkdir("): "a body in outline",
    ("docs/models.md", "dispatcher  ──body──[mkdir]"): PICTURE,
    ("docs/models.md", "dispatcher  ──body──┐         ┌"): PICTURE,
    ("docs/models.md", "dispatcher  ──body──┐\n"): PICTURE,
    ("docs/models.md", "leader-0 "): PICTURE,
    ("docs/mounting.md", 'ln -s "$('): "would stay: test_mount_helper.py makes links of its own",
    ("docs/mounting.md", "mount -t fuse.ninefuse"): "test_mount_helper.py, with such a link",
    (
        "docs/mounting.md",
        "/srv/data /mnt/data fuse.ninefuse",
    ): "fstab: test_mount_helper.py",
    ("docs/mounting.md", "mount -t fuse3"): "test_mount_helper.py, with its own paths",
    ("docs/mounting.md", "ninefuse -o allow_other,dev,suid"): "needs podman",
    ("docs/mounting.md", "/var/log/ninefuse.log {"): "for logrotate; test_mount_logs.py rotates",
    ("docs/serve.md", "ninefuse --listen"): "test_mount_sockets.py",
    ("docs/serve.md", "ninefuse-serve /data"): "test_serve_command.py; v9fs is not everywhere",
    MODEL: "test_new_model.py runs it",
    (
        "docs/options.md",
        "source ",
    ): "test_packaging.py installs it, test_pages.py completes with it",
    ("docs/performance.md", ".venv/bin/ninefuse-bench"): "eleven minutes: test_bench_command.py",
    ("docs/performance.md", "MB/s, median"): TABLE,
    (
        "docs/troubleshooting.md",
        "echo 1 > /sys/fs/fuse/",
    ): "as the watchdog does: mounting.py, abort",
    ("docs/troubleshooting.md", "docker run"): "needs docker",
    ("docs/troubleshooting.md", "all 16 workers are stuck"): "a line of the log",
}


def pages() -> list[str]:
    paths = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")]
    return sorted(str(path.relative_to(REPO)) for path in paths)


def test_every_block_is_run_or_it_is_said_why_not() -> None:
    keys = [*RUN, *NOT_RUN]
    for page in pages():
        for _, text in blocks(page):
            found = [key for key in keys if key[0] == page and text.lstrip().startswith(key[1])]
            assert len(found) == 1, f"{page}: say in RUN or NOT_RUN what is to be done with\n{text}"
    for key in keys:
        block_of(key)


@pytest.fixture
def place(tmp_path: Path, mountpoint: Path) -> Path:
    """A directory with bin/ninefuse, as a checkout has it, and commands on the PATH."""
    (tmp_path / "src").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ninefuse").symlink_to(REPO / "bin" / "ninefuse")
    (tmp_path / "path").mkdir()
    path = f'PYTHONPATH="${{PYTHONPATH:-}}:{REPO}" exec'
    stat = f"'{sys.executable}' -m ninefuse.stats.command"
    for name, text in (
        ("ninefuse", f"{path} '{sys.executable}' -m ninefuse \"$@\""),
        # --watch goes on until Ctrl-C. Anything else ends by itself. (Without --foreground the
        # signal would come twice.)
        (
            "ninefuse-stat",
            f'limit=20; [ "$1" != --watch ] || limit=3; '
            f'{path} timeout --foreground --preserve-status -s INT $limit {stat} "$@"',
        ),
    ):
        script = tmp_path / "path" / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("key", RUN, ids=lambda key: f"{key[0]}:{key[1][:30]}")
def test_a_block_does_what_the_page_says(key: Key, place: Path, mountpoint: Path) -> None:
    language, body = block_of(key)
    how = RUN[key]
    body = "\n".join(line for line in body.splitlines() if line.strip() != "…")
    assert language in ("", "python"), language
    if language:
        (place / "example.py").write_text(body)
        body = "python3 example.py"
    for name, other in how.files:
        (place / name).write_text(block_of(other)[1])
    # In a file: what looks for a command line with the mount point in it is not to find this one.
    text = "\n".join(["set -e", how.before, "echo BEGIN", body, "echo END", how.after, ""])
    (place / "commands").write_text(re.sub(r"/tmp/(?=src|mnt|log|trace)", f"{place}/", text))
    environment = {
        **ENVIRONMENT,
        "PATH": f"{place}/path:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    try:
        done = subprocess.run(
            ["bash", "commands"],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        detach(mountpoint)
    assert done.returncode == 0, done.stdout
    shown = done.stdout.partition("BEGIN\n")[2].partition("END\n")[0]
    for pattern in how.output:
        match = re.search(pattern, shown, re.M)
        assert match, f"{pattern!r} is not in\n{shown}"
        shown = shown[match.end() :]


def test_the_table_of_operations_is_that_of_the_callbacks() -> None:
    """The same names in the same order; the adapter has each that pyfuse3 can call."""
    text = (REPO / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = text[text.index("| callback |") :].split("\n\n")[0].split("\n")[2:]
    documented = [name for row in rows for name in row.split("|")[1].strip().split(", ")]
    assert documented == bound_callbacks()
    for name in documented:
        assert inspect.iscoroutinefunction(vars(Adapter).get(name)) == hasattr(Operations, name)


def test_every_module_is_among_the_rooms() -> None:
    """By its name in code; one that stands in several districts, once for each."""
    named = Counter(re.findall(r"`(\w+\.pyx?)`", (REPO / "docs/rooms.md").read_text()))
    there = Counter(
        path.name for path in (REPO / "ninefuse").rglob("*.py*") if path.suffix in (".py", ".pyx")
    )
    del there["__init__.py"]
    assert {name for name, times in there.items() if named[name] < times} == set()
    assert named.keys() - there.keys() == set()


def test_readme_is_two_screens() -> None:
    """What is more has its page in docs/."""
    assert len((REPO / "README.md").read_text().splitlines()) <= 110
