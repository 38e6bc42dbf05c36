"""Real programs on a mount: each compared with what it does without, or by its own checker."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import mounting
import pytest
from conftest import start
from file_systems import image
from mounting import (
    ENVIRONMENT,
    SESSION,
    SOAK,
    Child,
    Mount,
    Place,
    Watchdog,
    ending,
    in_child,
    wait_until,
)
from trees import plant, tree

from ninefuse.settings import MODELS

pytestmark = pytest.mark.soak


SCALE = 8 if SOAK else 1
NOTHING: Mapping[str, str] = {}
OWN_ENVIRONMENT = {name: ENVIRONMENT[name] for name in ENVIRONMENT if not name.startswith("MAKE")}

default_model = pytest.mark.parametrize("place", ["second"], indirect=True)
native = pytest.mark.skipif(SESSION == "pyfuse3", reason="pyfuse3's session has no callback for it")
each_model = pytest.mark.parametrize("place", MODELS if SOAK else ["second"], indirect=True)


def call(*words: str | Path, cwd: Path | None = None, env: Mapping[str, str] = NOTHING) -> str:
    """Run a program that must succeed; what it printed, in English."""
    # Also where make runs the tests: of one make below another it says more.
    env = {**OWN_ENVIRONMENT, "LC_ALL": "C", **env}
    return mounting.call(*words, cwd=cwd, env=env, seconds=50 * SCALE)


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")


def expire(place: Place) -> None:
    """Have what the kernel believes of the files expire; with one model, it is all the same.

    A mount that believes for less is asked much more by git, and is no quicker in all.
    """
    if place.mount.model == "second":
        time.sleep(1.1)


# git

GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_AUTHOR_DATE": "1700000000 +0000",
    "GIT_COMMITTER_NAME": "c",
    "GIT_COMMITTER_EMAIL": "c@example.org",
    "GIT_COMMITTER_DATE": "1700000000 +0000",
    "GIT_TERMINAL_PROMPT": "0",
}


def git(top: Path, *words: str | Path) -> str:
    return call("git", "-C", top, "-c", "core.autocrlf=false", *words, env=GIT)


def make_history(top: Path, files: int) -> str:
    """Have git do what people have it do; the number of the last commit."""
    top.mkdir()
    git(top, "init", "--quiet", "--initial-branch=main")
    for n in range(files):
        file = top / f"directory{n % 12}" / f"file {n}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{n}\n" * (n % 40 + 1))
        if n % 7 == 0:
            file.chmod(0o755)
    (top / "symlink").symlink_to("directory0/file 0")
    git(top, "add", "--all")
    git(top, "commit", "--quiet", "--message=first")
    git(top, "checkout", "--quiet", "-b", "branch")
    for n in range(0, 60, 5):
        (top / f"directory{n % 12}/file {n}").write_text("changed\n")
    git(top, "mv", "directory3", "moved")
    git(top, "rm", "--quiet", "-r", "--force", "directory4")
    git(top, "commit", "--quiet", "--all", "--message=second")
    git(top, "checkout", "--quiet", "main")
    assert len(os.listdir(top / "directory4")) == files // 12
    (top / "directory5/new").write_text("new\n")
    git(top, "add", "directory5/new")
    git(top, "commit", "--quiet", "--message=third")
    git(top, "merge", "--quiet", "--message=merged", "branch")
    return git(top, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def last_commit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The number of the last commit in a directory that is no mount, of so many files."""
    need("git")

    @cache
    def find(files: int) -> str:
        return make_history(tmp_path_factory.mktemp("git") / "repository", files)

    return find


@each_model
@pytest.mark.limit(60 * SCALE)
def test_a_git_repository_is_what_it_is_elsewhere(
    place: Place, last_commit: Callable[[int], str]
) -> None:
    here, clone = place.path / "repository", place.path / "clone"
    files = 204 * SCALE
    last = make_history(here, files)
    assert last == last_commit(files), "the same files have the same numbers"
    git(here, "gc", "--quiet")
    git(here, "fsck", "--strict", "--full")
    call("git", "clone", "--quiet", here, clone, env=GIT)
    for repository in (here, clone):
        assert git(repository, "rev-parse", "HEAD") == last
        assert git(repository, "status", "--porcelain") == ""
    if SOAK or place.mount.model == "second":
        # Packed anew on the way, where the first clone has hard links.
        call("git", "clone", "--quiet", "--no-local", here, place.path / "other", env=GIT)
        git(place.path / "other", "fsck", "--strict", "--full")
        git(place.path / "other", "gc", "--quiet", "--aggressive", "--prune=now")
        assert git(place.path / "other", "status", "--porcelain") == ""
    (clone / "directory1/file 1").write_text("pulled\n")
    git(clone, "commit", "--quiet", "--all", "--message=fourth")
    git(here, "pull", "--quiet", "--ff-only", clone, "main")
    git(clone, "fsck", "--strict", "--full")
    assert (place.source / "repository/directory1/file 1").read_text() == "pulled\n"
    expire(place)
    # Unlike status this does not look into files whose times or numbers have changed.
    git(here, "diff-files", "--quiet")
    assert git(place.source / "repository", "status", "--porcelain") == ""


# SQLite


def transactions(path: Path, mode: str, who: int, count: int, told: int) -> bool:
    """Write to a database, a transaction at a time; whether a shared file of it is mapped."""
    base = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    assert base.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
    for n in range(count):
        base.execute("BEGIN IMMEDIATE")
        base.execute("INSERT INTO t VALUES (?, ?, ?)", (who, n, "x" * (n * 37 % 3000)))
        base.execute("UPDATE total SET n = n + 1")
        base.execute("COMMIT")
        os.write(told, b".")
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = any(line.endswith("-shm") and line.split()[1] == "rw-s" for line in maps)
    base.close()
    return mapped


def check_database(path: Path, mode: str) -> tuple[int, int]:
    """Rows, and how many the database believes to have."""
    with contextlib.closing(sqlite3.connect(path)) as base:
        assert base.execute("PRAGMA journal_mode").fetchone() == (mode,)
        assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (rows,) = base.execute("SELECT count(*) FROM t").fetchone()
        (total,) = base.execute("SELECT n FROM total").fetchone()
    return rows, total


def make_database(path: Path, mode: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as base:
        base.execute(f"PRAGMA journal_mode={mode}")
        base.execute("CREATE TABLE t (who INT, n INT, x TEXT, PRIMARY KEY (who, n))")
        base.execute("CREATE TABLE total (n INT)")
        base.execute("INSERT INTO total VALUES (0)")
        base.commit()


@pytest.mark.limit(60 * SCALE)
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_two_processes_write_to_an_sqlite_database_at_once(place: Place, mode: str) -> None:
    path, count = place.path / "base", 40 * SCALE
    in_child(make_database, path, mode)
    told, answers = os.pipe()
    try:
        with (
            Child(transactions, path, mode, 1, count, answers) as one,
            Child(transactions, path, mode, 2, count, answers) as other,
        ):
            # Only in WAL mode there is a file that all map: the index of the log.
            assert one.result(50 * SCALE) == other.result(50 * SCALE) == (mode == "wal")
        assert in_child(check_database, path, mode) == (2 * count, 2 * count)
        assert sorted(os.listdir(place.source)) == ["base"], "journals are gone with the last user"
        assert in_child(check_database, place.source / "base", mode) == (2 * count, 2 * count)
    finally:
        os.close(told)
        os.close(answers)


@native
@pytest.mark.limit(60 * SCALE)
def test_an_sqlite_database_is_written_to_from_both_sides(
    new_place: Callable[..., Place],
) -> None:
    """With a rollback journal, which maps nothing, and cache=none, which keeps nothing."""
    place, count = new_place("-o", "cache=none"), 40 * SCALE
    make_database(place.source / "base", "delete")
    told, answers = os.pipe()
    try:
        with (
            Child(transactions, place.path / "base", "delete", 1, count, answers) as one,
            Child(transactions, place.source / "base", "delete", 2, count, answers) as other,
        ):
            for writer in (one, other):
                writer.result(50 * SCALE)
        for side in (place.path, place.source):
            assert in_child(check_database, side / "base", "delete") == (2 * count, 2 * count)
    finally:
        os.close(told)
        os.close(answers)


# SQLite, where the kernel has the files: the mount's programs and the source's share memory

OFTEN = 5000 if SOAK else 300  # transactions of each writer


def comes_and_goes(path: Path, mode: str, who: int, count: int, told: int) -> bool:
    """As `transactions`, and opens the database anew again and again."""
    return all(
        transactions(path, mode, who * count + n, 5, told) == (mode == "wal")
        for n in range(0, count, 5)
    )


def reads(path: Path, told: int) -> int:
    """See that what is there never becomes less, until told to end; how often."""
    last = times = 0
    with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as base:
        os.set_blocking(told, False)
        while True:
            base.execute("BEGIN")
            (rows,) = base.execute("SELECT count(*) FROM t").fetchone()
            (total,) = base.execute("SELECT n FROM total").fetchone()
            base.execute("COMMIT")
            assert rows == total >= last
            last, times = total, times + 1
            with contextlib.suppress(BlockingIOError):
                os.read(told, 1)
                return times


@pytest.mark.skipif(os.geteuid() != 0, reason="data=kernel takes CAP_SYS_ADMIN")
@pytest.mark.skipif(SESSION == "pyfuse3", reason="data=kernel takes the native session")
@pytest.mark.limit(60 * SCALE)
@pytest.mark.parametrize(
    ("mode", "how", "options"),
    [
        ("wal", "stays", "data=kernel"),
        ("wal", "goes", "data=kernel,cache=none"),
        ("delete", "goes", "data=kernel,cache=none"),
    ],
)
def test_writers_on_the_mount_and_on_the_source_lose_no_row_of_an_sqlite_database(
    new_place: Callable[..., Place], mode: str, how: str, options: str
) -> None:
    place = new_place("-o", options)
    here, there = place.path / "base", place.source / "base"
    in_child(make_database, there, mode)
    count = OFTEN if how == "stays" else OFTEN // 5
    told, answers = os.pipe()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with contextlib.ExitStack() as stack:
            write = transactions if how == "stays" else comes_and_goes
            writers = [
                stack.enter_context(Child(write, path, mode, who, count, nowhere))
                for who, path in enumerate((here, there))
            ]
            readers = [stack.enter_context(Child(reads, path, told)) for path in (here, there)]
            for writer in writers:
                assert writer.result(50 * SCALE) or mode == "delete"
            os.write(answers, b"..")
            assert min(reader.result(50 * SCALE) for reader in readers) > 1
        for path in (here, there):
            assert in_child(check_database, path, mode) == (2 * count, 2 * count)
        assert os.listdir(place.source) == ["base"]
    finally:
        for fd in (told, answers, nowhere):
            os.close(fd)


@default_model
@pytest.mark.limit(60 * SCALE)
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_an_sqlite_database_survives_writers_that_are_killed(place: Place, mode: str) -> None:
    path = place.path / "base"
    in_child(make_database, path, mode)
    done = 0
    for who in range(2 * SCALE):
        told, answers = os.pipe()
        try:
            with Child(transactions, path, mode, who, 1_000_000, answers) as writer:
                for _ in range(10):
                    done += len(os.read(told, 1))
                os.kill(writer.pid, signal.SIGKILL)
            os.close(answers)
            while more := os.read(told, 4096):
                done += len(more)
        finally:
            os.close(told)
        rows, total = in_child(check_database, path, mode)
        assert rows == total >= done, "a transaction is there as a whole, or not at all"
        done = rows


# Trees

ODD_NAMES = (
    *(b"-rf", b"--", b" ", b"trailing ", b"new\nline", b"back\\slash", b"*?[a]", b"'\"$(x)"),
    *(b"\xff\xfe not UTF-8", b"tab\there", b"n" * 255, "日本語".encode(), b"...", b"#x#", b"~"),
)


def plant_all(top: Path) -> None:
    """One of everything, with names that programs stumble over."""
    plant(top)
    (top / "odd").mkdir()
    for number, name in enumerate(ODD_NAMES):
        path = Path(os.fsdecode(bytes(top / "odd") + b"/" + name))
        path.write_bytes(b"%d" % number)
        os.utime(path, ns=(10**18, 10**18 + number))
    os.symlink("../holes", top / "odd/link")
    deep = top / "deep"
    for _ in range(12):
        deep = deep / ("d" * 100)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    for path in [*top.glob("deep/**/"), top / "odd", top]:
        os.utime(path, ns=(10**18, 10**18 + 7))


TAR = ("tar", "--xattrs", "--xattrs-include=user.*", "--numeric-owner", "--sort=name")
# So that two archives of one tree are the same, byte for byte.
PAX = ("--format=posix", "--pax-option=exthdr.name=%d/%f,delete=atime,delete=ctime")


@default_model
@pytest.mark.parametrize("sparse", [(), ("--sparse",)], ids=["plain", "sparse"])
def test_a_tree_packed_and_unpacked_by_tar_is_the_same(
    place: Place, tmp_path: Path, sparse: tuple[str, ...]
) -> None:
    need("tar")
    plant_all(tmp_path / "tree")
    expected = tree(tmp_path / "tree")
    archive, other = tmp_path / "archive", tmp_path / "other"
    (place.path / "unpacked").mkdir()
    call(*TAR, *PAX, *sparse, "-cf", archive, "-C", tmp_path / "tree", ".")
    call(*TAR, "-xpf", archive, "-C", place.path / "unpacked")
    assert tree(place.source / "unpacked") == expected
    assert tree(place.path / "unpacked") == expected
    call(*TAR, "--compare", "-f", archive, "-C", place.path / "unpacked")
    # The other way; the archive is on the mount, too.
    call(*TAR, *PAX, *sparse, "-cf", place.path / "archive", "-C", place.path / "unpacked", ".")
    call(*TAR, *PAX, *sparse, "-cf", other, "-C", place.source / "unpacked", ".")
    (tmp_path / "unpacked").mkdir()
    call(*TAR, "-xpf", place.path / "archive", "-C", tmp_path / "unpacked")
    assert tree(tmp_path / "unpacked") == expected
    if not sparse:  # holes are found in another way
        assert (place.path / "archive").read_bytes() == other.read_bytes()


# Times are compared to the nanosecond, not to the second.
RSYNC = ("rsync", "-aHAX", "--modify-window=-1")


@default_model
def test_rsync_finds_nothing_to_do_the_second_time(place: Place, tmp_path: Path) -> None:
    need("rsync")
    plant_all(tmp_path / "tree")
    os.mknod(tmp_path / "tree/socket", stat.S_IFSOCK | 0o640)
    os.utime(tmp_path / "tree/socket", ns=(5, 6))
    os.utime(tmp_path / "tree", ns=(5, 6))
    expected = tree(tmp_path / "tree")
    for source, target in (
        (tmp_path / "tree", place.path / "copy"),
        (place.path / "copy", place.path / "second"),
        (place.path / "second", tmp_path / "back"),
    ):
        words = (*RSYNC, "--sparse", "--itemize-changes")
        first = call(*words, f"{source}/", f"{target}/")
        assert len(first.splitlines()) > 70
        assert call(*words, f"{source}/", f"{target}/") == ""
        assert tree(target) == expected
    assert call(*words, "--checksum", "--delete", f"{tmp_path}/tree/", f"{place.path}/copy/") == ""
    # In place, and by blocks that have changed.
    with open(tmp_path / "tree/holes", "r+b") as file:
        file.seek(500_000)
        file.write(b"changed")
    for inplace in ((), ("--inplace",)):
        words = (*RSYNC, "--no-whole-file", "--delete", *inplace)
        (tmp_path / "tree/odd/~").unlink(missing_ok=True)
        call(*words, f"{tmp_path}/tree/", f"{place.path}/copy/")
        assert tree(place.source / "copy") == tree(tmp_path / "tree")


# Python


@default_model
@pytest.mark.parametrize("how", ["--symlinks", "--copies"])
def test_a_virtual_environment_of_python_is_made_and_used(place: Place, how: str) -> None:
    """With --copies the interpreter itself is run from the mount."""
    top = place.path / "environment"
    call(sys.executable, "-I", "-m", "venv", "--without-pip", how, top)
    python = top / "bin/python"
    (packages,) = top.glob("lib/python*/site-packages")
    (packages / "package").mkdir()
    (packages / "package/__init__.py").write_text("from .below import answer\n")
    (packages / "package/below.py").write_text("answer = 6 * 7\n")
    script = place.path / "script.py"
    script.write_text(f"#!{python}\nimport sys, package\nprint(sys.prefix, package.answer)\n")
    script.chmod(0o755)
    env = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
    for _ in range(2):
        assert call(script, env=env) == f"{top} 42\n"
    cached = list((place.source / packages.relative_to(place.path)).glob("package/__pycache__/*"))
    assert len(cached) == 2
    (packages / "package/below.py").write_text("answer = 'another'\n")
    assert call(script, env=env) == f"{top} another\n"


# make and gcc

MAKEFILE = """
CFLAGS = -O1 -Wall -Werror
parts = $(patsubst %.c,%.o,$(wildcard part*.c))
program: main.o libparts.a
\t$(CC) -o $@ main.o libparts.a
libparts.a: $(parts)
\t$(AR) rcs $@ $(parts)
%.o: %.c parts.h
\t$(CC) $(CFLAGS) -c -o $@ $<
clean:
\trm -f program *.o *.a
"""


@pytest.mark.limit(60 * SCALE)
@each_model
def test_a_program_is_built_once_and_runs(place: Place, tmp_path: Path) -> None:
    need("make")
    need("gcc")
    top, count = place.path / "project", 18 * SCALE
    top.mkdir()
    (place.path / "temporary").mkdir()
    (top / "Makefile").write_text(MAKEFILE)
    for n in range(count):
        (top / f"part{n}.c").write_text(
            f'#include "parts.h"\nint part{n}(void) {{ return {n}; }}\n'
        )
    (top / "parts.h").write_text("".join(f"int part{n}(void);\n" for n in range(count)))
    terms = " + ".join(f"part{n}()" for n in range(count))
    (top / "main.c").write_text(
        '#include <stdio.h>\n#include "parts.h"\n'
        f'int main(void) {{ return !printf("%d\\n", {terms}); }}\n'
    )
    words = ("make", "-j4", "CC=gcc", "program")
    temporary = {"TMPDIR": str(place.path / "temporary")}
    assert call(*words, cwd=top, env=temporary).count("gcc") == count + 2
    assert call(top / "program") == f"{sum(range(count))}\n"
    assert call(*words, cwd=top, env=temporary) == "make: 'program' is up to date.\n"
    expire(place)
    assert call(*words, cwd=top, env=temporary) == "make: 'program' is up to date.\n"
    (top / "part1.c").write_text('#include "parts.h"\nint part1(void) { return 1001; }\n')
    assert call(*words, cwd=top, env=temporary).count("gcc") == 2
    assert call(top / "program") == f"{sum(range(count)) + 1000}\n"
    assert os.listdir(place.path / "temporary") == []
    shutil.copytree(place.source / "project", tmp_path / "project", symlinks=True)
    assert call(*words, cwd=tmp_path / "project") == "make: 'program' is up to date.\n"
    call("make", "clean", cwd=top)
    assert len(os.listdir(place.source / "project")) == count + 3


# Programs of util-linux, coreutils and e2fsprogs


def both_sides(place: Place) -> tuple[Path, Path]:
    """A plain directory of the source, and one on the mount."""
    for name in ("plain", "mounted"):
        (place.source / name).mkdir()
    return place.source / "plain", place.path / "mounted"


def said(*words: str | Path, cwd: Path) -> tuple[int, str, str]:
    """A program's exit code, and what it says."""
    done = mounting.run(*words, cwd=cwd, env={**OWN_ENVIRONMENT, "LC_ALL": "C"})
    return done.returncode, done.stdout, done.stderr


def blocks_of(path: Path) -> int:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks


@native
def test_holes_are_dug_and_copied(place: Place) -> None:
    """fallocate(1) and cp --sparse, beside the same on the source."""
    need("fallocate")

    def play(top: Path, source: Path) -> object:
        (top / "zeros").write_bytes(b"begin" + bytes(1 << 20) + b"end")
        (top / "punched").write_bytes(b"x" * (1 << 20))
        answers = [
            said(*words, cwd=top)
            for words in (
                ("fallocate", "--dig-holes", "zeros"),
                ("fallocate", "--punch-hole", "--offset=4096", "--length=500KiB", "punched"),
                ("fallocate", "--zero-range", "--offset=600KiB", "--length=8KiB", "punched"),
                ("fallocate", "--length=1MiB", "made"),
                ("fallocate", "--keep-size", "--length=1MiB", "kept"),
                ("cp", "--sparse=always", "zeros", "always"),
                ("cp", "--sparse=auto", "zeros", "auto"),
                ("cp", "--sparse=never", "--reflink=never", "zeros", "never"),
            )
        ]
        names = sorted(os.listdir(source))
        return answers, [
            (name, (source / name).read_bytes(), blocks_of(source / name)) for name in names
        ]

    plain, mounted = both_sides(place)
    expected = play(plain, plain)
    assert play(mounted, place.source / "mounted") == expected
    # Not to be had of the kernel.
    for option in ("--collapse-range", "--insert-range"):
        words = ("fallocate", option, "--offset=4096", "--length=4096", "punched")
        code, _, complaint = said(*words, cwd=mounted)
        assert code
        assert "not supported" in complaint


@native
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts an image")
@pytest.mark.parametrize("kind", ["xfs", "btrfs"] if SOAK else ["xfs"])
def test_a_copy_shares_the_blocks_of_the_original(
    new_mount: Callable[..., Mount], tmp_path: Path, kind: str
) -> None:
    need("filefrag")
    with image(kind, tmp_path) as disk:
        mount = new_mount(source=disk)
        with ending(mount):
            data = os.urandom(3 << 20)
            (mount.path / "file").write_bytes(data)
            call("cp", "--reflink=auto", mount.path / "file", mount.path / "copy")
            call("cp", "--reflink=never", mount.path / "file", mount.path / "apart")
            for name, shared in (("file", True), ("copy", True), ("apart", False)):
                assert (mount.path / name).read_bytes() == data
                assert ("shared" in call("filefrag", "-v", "-s", disk / name)) == shared


@native
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files immutable")
def test_flags_of_files_are_shown_and_set_by_lsattr_and_chattr(place: Place) -> None:
    need("chattr")

    def play(top: Path) -> list[tuple[int, str, str]]:
        (top / "file").write_bytes(b"data")
        (top / "directory").mkdir()
        answers = []
        for name in ("file", "directory"):
            for change, words in (
                ("+i", ("rm", "-rf", name)),
                ("-i", ("chmod", "g+w", name)),
                ("+a", ("mv", name, "moved")),
                ("=", ("touch", name)),
                ("+dA", ("touch", name)),
                ("-dA", ("touch", name)),
            ):
                answers.append(said("chattr", change, name, cwd=top))
                answers.append(said("lsattr", "-d", "-l", name, cwd=top))
                answers.append(said(*words, cwd=top))
        return answers

    plain, mounted = both_sides(place)
    expected = play(plain)
    if expected[0][0]:
        pytest.skip(f"the file system of tmp_path has no flags: {expected[0][2]}")
    assert play(mounted) == expected


@native
@pytest.mark.parametrize("holder", ["mount", "source"])
def test_flock_keeps_programs_out_from_both_sides(place: Place, holder: str) -> None:
    need("flock")
    holds, asks = (place.path, place.source) if holder == "mount" else (place.source, place.path)
    (holds / "lock").touch()
    with subprocess.Popen(
        ["flock", "lock", "sh", "-c", "echo has it; read line"],
        cwd=holds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"has it\n"
        now = ("flock", "--nonblock", "--conflict-exit-code=9", "lock", "true")
        assert said(*now, cwd=asks)[0] == said(*now, cwd=holds)[0] == 9
        with subprocess.Popen(["flock", "lock", "true"], cwd=asks) as waiting:
            wait_until(lambda: waits_by(waiting.pid, asks / "lock"), "flock to wait")
            process.stdin.close()
            assert waiting.wait(mounting.PATIENCE) == 0
    assert said(*now, cwd=asks)[0] == 0


def waits_by(pid: int, file: Path) -> bool:
    """Whether a program sleeps that has a file open."""
    opened = [os.path.realpath(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return os.fspath(file) in opened and state == "S"


# dpkg


CONTROL = """Package: parcel
Version: {version}
Architecture: all
Maintainer: nobody <nobody@example.org>
Description: made by a test
"""


def make_package(base: Path, version: int) -> Path:
    """A package with one of everything that packages have, other in each version."""
    top = base / f"{version}"
    (top / "DEBIAN").mkdir(parents=True)
    (top / "DEBIAN/control").write_text(CONTROL.format(version=version))
    (top / "DEBIAN/conffiles").write_text("/etc/parcel\n")
    (top / "etc").mkdir()
    (top / "etc/parcel").write_text(f"configured {version}\n")
    for n in range(8 * version):
        (top / f"usr/share/parcel/{n % 5}").mkdir(parents=True, exist_ok=True)
        (top / f"usr/share/parcel/{n % 5}/{n}").write_text(f"{n} of {version}\n" * n)
    os.link(top / "usr/share/parcel/1/1", top / "usr/share/parcel/linked")
    (top / "usr/share/parcel/link").symlink_to(f"{version}/{version}")
    (top / "usr/share/parcel/set-id").write_bytes(b"x")
    (top / "usr/share/parcel/set-id").chmod(0o4755)
    call("dpkg-deb", "--build", "--root-owner-group", top, base / f"{version}.deb")
    return base / f"{version}.deb"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_packages_are_installed_replaced_and_removed_by_dpkg(place: Place, tmp_path: Path) -> None:
    need("dpkg-deb")
    packages = [make_package(tmp_path, version) for version in (1, 2)]

    def play(top: Path) -> list[object]:
        # The log has times in it; the hashes of its lists have none.
        dpkg = ("dpkg", f"--root={top}", "--log=/dev/null", "--force-confold")
        for name in ("info", "updates", "triggers", "parts"):
            (top / "var/lib/dpkg" / name).mkdir(parents=True)
        (top / "var/lib/dpkg/status").touch()
        left: list[object] = []
        for words in (
            ("--install", packages[0]),
            ("--install", packages[1]),
            ("--remove", "parcel"),
            ("--purge", "parcel"),
        ):
            call(*dpkg, *words)
            left.append(call(*dpkg, "--verify"))
            left.append(call(*dpkg, "--audit"))
            left.append(
                {
                    name: found._replace(mtime=0)
                    for name, found in tree(top).items()
                    if name.startswith(("etc", "usr", "var/lib/dpkg/info"))
                }
            )
        return left

    plain, mounted = both_sides(place)
    assert play(mounted) == play(plain)


# PostgreSQL

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
SUMS = """SELECT (SELECT sum(abalance) FROM pgbench_accounts),
    (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(bbalance) FROM pgbench_branches),
    (SELECT sum(delta) FROM pgbench_history), (SELECT count(*) FROM pgbench_history)"""


class Cluster:
    """A database cluster of PostgreSQL's on a mount, and its programs, run by its own user.

    Args:
        base: below which are the cluster, the sockets and what clients write. It has a short name,
            for the sockets, and lets everybody through.
        mount: which lets everybody in.
    """

    def __init__(self, base: Path, mount: Mount) -> None:
        self._user = pwd.getpwnam("postgres")
        self.data = mount.path / "data"
        self.clients = base / "clients"
        for directory in (self.data, self.clients):
            directory.mkdir(mode=0o700)
            os.chown(directory, self._user.pw_uid, self._user.pw_gid)

    def run(self, program: str, *words: str | Path, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            [POSTGRES[-1] / program, *words],
            cwd=self.clients,
            env={**OWN_ENVIRONMENT, "LC_ALL": "C", "PGHOST": str(self.clients), "PGPORT": "5999"},
            user=self._user.pw_uid,
            group=self._user.pw_gid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=100,
            check=False,
        )
        log = self.clients / "log"  # the server's
        said = log.read_text()[-3000:] if log.exists() else ""
        assert done.returncode in codes, f"{done.stdout}{said}"
        return done.stdout

    def control(self, *words: str) -> None:
        """Start the server, or stop it."""
        options = f"-k {self.clients} -p 5999 -c listen_addresses="
        log = self.clients / "log"
        self.run("pg_ctl", "-D", self.data, "-w", "-l", log, "-o", options, *words)

    def kill(self) -> None:
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self._processes(), "the end of the server and its children")
        # To the next server it runs for as long as nobody collects it.
        for lock in (self.data / "postmaster.pid", self.clients / ".s.PGSQL.5999.lock"):
            lock.unlink()

    def _processes(self) -> list[str]:
        """Which have their working directory in the cluster: all of the server's."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "cwd") == str(self.data):
                    found.append(process.name)
        return found

    def acknowledged(self) -> int:
        """How many transactions clients have been told of (pgbench -l)."""
        logs = self.clients.glob("pgbench_log.*")
        return sum(len(log.read_text().splitlines()) for log in logs)


@pytest.mark.skipif(not SOAK, reason="half a minute: make soak")
@pytest.mark.skipif(not POSTGRES, reason="there is no PostgreSQL in /usr/lib/postgresql")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: PostgreSQL's user is another")
@pytest.mark.limit(300)
def test_a_postgresql_server_that_is_killed_has_all_that_was_committed(guard: Watchdog) -> None:
    """Each transaction that pgbench was told of, and none in part."""
    # Not below tmp_path, to which pytest lets nobody else.
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as path:
        base = Path(path)
        base.chmod(0o755)
        mount = start(guard, base, "-o", "allow_other")
        with ending(mount):
            cluster = Cluster(base, mount)
            cluster.run("initdb", "-k", "-A", "trust", "-D", cluster.data)
            cluster.control("start")
            cluster.run("pgbench", "-i", "-q", "-s", "2", "postgres")
            load = ("pgbench", "-c", "4", "-T", "60", "-l", "postgres")
            with Child(partial(cluster.run, *load, codes=(1, 2))) as bench:
                wait_until(lambda: cluster.acknowledged() > 500, "transactions", 60)
                cluster.kill()
                bench.result(60)
            cluster.control("start")
            told = cluster.run("psql", "-At", "-F", " ", "postgres", "-c", SUMS)
            *sums, rows = map(int, told.split())
            assert len(set(sums)) == 1, sums
            assert rows >= cluster.acknowledged() > 500
            cluster.control("-m", "fast", "stop")
            cluster.run("pg_checksums", "-c", "-D", cluster.data)
        mount.log.check()
