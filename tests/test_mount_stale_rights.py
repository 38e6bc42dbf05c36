"""What the kernel allows by attributes that it remembers, the source decides again.

Each case is prepared twice in the source: a directory to be used as it is, and one to be used
through a mount that believes for a day what it was told. A user has looked at the mount's, then
both are changed in the source, and the user's call must fail on the mount as it does there.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounting import Child, Mount, become, errno_of
from rights import ACCESS, DEFAULT, acl_for, tree
from servers import options_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for others")

USER, OTHER, GROUP = 12345, 12346, 4321
REFUSED = (errno.EACCES, errno.EPERM)
HARDLINKS = Path("/proc/sys/fs/protected_hardlinks").read_text()


@dataclass
class Case:
    """What is there, what happens to it in the source, and what the user does then.

    Attributes:
        make: in a directory that belongs to root and is open to all.
        change: in the same.
        calls: each in a directory of its own, which is the current one.
    """

    make: Callable[[Path], object]
    change: Callable[[Path], object]
    calls: dict[str, Callable[[], object]]


def file(path: Path, mode: int = 0o644, owner: int = 0, group: int = 0) -> Path:
    path.write_bytes(b"data")
    os.setxattr(path, "user.x", b"x")
    os.chown(path, owner, group)
    path.chmod(mode)
    return path


def directory(path: Path, mode: int = 0o755, owner: int = 0) -> Path:
    path.mkdir()
    os.chown(path, owner, 0)
    path.chmod(mode)
    return path


# What a sticky directory protects


def jobs(top: Path) -> None:
    spool = directory(top / "spool", 0o1777)
    file(spool / "job", 0o644, USER)
    directory(spool / "work", 0o755, USER)
    file(top / "mine", 0o644, USER)
    directory(top / "empty", 0o755, USER)


def jobs_of_another(top: Path) -> None:
    """The user's are elsewhere by now, and another user has taken the names."""
    for name in ("job", "work"):
        (top / "spool" / name).rename(top / f"old {name}")
    file(top / "spool/job", 0o644, OTHER)
    directory(top / "spool/work", 0o755, OTHER)


def exchange(one: str, other: str) -> None:
    from ninefuse.linux import syscalls

    here = os.open(".", os.O_PATH)
    try:
        syscalls.rename(here, one.encode(), here, other.encode(), syscalls.RENAME_EXCHANGE)
    finally:
        os.close(here)


STICKY = Case(
    jobs,
    jobs_of_another,
    {
        "unlink": lambda: os.unlink("spool/job"),
        "rename": lambda: os.rename("spool/job", "spool/stolen"),
        "rename away": lambda: os.rename("spool/job", "stolen"),
        "replace": lambda: os.rename("mine", "spool/job"),
        "exchange": lambda: exchange("mine", "spool/job"),
        "rmdir": lambda: os.rmdir("spool/work"),
        "rename directory": lambda: os.rename("spool/work", "spool/stolen"),
        "replace directory": lambda: os.rename("empty", "spool/work"),
    },
)


def now_sticky(top: Path) -> None:
    (top / "spool").chmod(0o1777)
    os.chown(top / "spool/job", OTHER, OTHER)
    os.chown(top / "spool/work", OTHER, OTHER)


def not_yet_sticky(top: Path) -> None:
    jobs(top)
    (top / "spool").chmod(0o777)


STICKY_SINCE = Case(not_yet_sticky, now_sticky, dict(STICKY.calls))


# What a directory's own permissions protect


def open_directory(top: Path) -> None:
    shared = directory(top / "shared", 0o777)
    file(shared / "old")
    directory(shared / "empty")
    file(top / "mine", 0o644, USER)


IN_DIRECTORY: dict[str, Callable[[], object]] = {
    "create": lambda: os.open("shared/new", os.O_CREAT | os.O_WRONLY, 0o600),
    "mkdir": lambda: os.mkdir("shared/new"),
    "mknod": lambda: os.mknod("shared/new", stat.S_IFREG | 0o600),
    "mkfifo": lambda: os.mkfifo("shared/new"),
    "symlink": lambda: os.symlink("x", "shared/new"),
    "link": lambda: os.link("mine", "shared/new"),
    "unlink": lambda: os.unlink("shared/old"),
    "rmdir": lambda: os.rmdir("shared/empty"),
    "rename within": lambda: os.rename("shared/old", "shared/new"),
    "rename away": lambda: os.rename("shared/old", "new"),
    "rename into": lambda: os.rename("mine", "shared/new"),
    "replace": lambda: os.rename("mine", "shared/old"),
}

CLOSED = Case(open_directory, lambda top: (top / "shared").chmod(0o755), IN_DIRECTORY)


def directory_by_list(top: Path) -> None:
    open_directory(top)
    os.setxattr(top / "shared", ACCESS, acl_for(USER, 7))


LISTED_NO_MORE = Case(
    directory_by_list,
    lambda top: os.setxattr(top / "shared", ACCESS, acl_for(USER, 5)),
    IN_DIRECTORY,
)

HIDDEN = Case(
    lambda top: directory(top / "shared", 0o755),
    lambda top: (top / "shared").chmod(0o711),
    {"opendir": lambda: os.open("shared", os.O_RDONLY | os.O_DIRECTORY)},
)


# What a file's own permissions protect


def touch_now() -> None:
    os.utime("file")


ON_FILE: dict[str, Callable[[], object]] = {
    "open to read": lambda: os.open("file", os.O_RDONLY),
    "open to write": lambda: os.open("file", os.O_WRONLY),
    "open for both": lambda: os.open("file", os.O_RDWR),
    "open to append": lambda: os.open("file", os.O_WRONLY | os.O_APPEND),
    "open to empty": lambda: os.open("file", os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda: os.truncate("file", 1),
    "touch": touch_now,
    "getxattr": lambda: os.getxattr("file", "user.x"),
    "setxattr": lambda: os.setxattr("file", "user.y", b"y"),
    "removexattr": lambda: os.removexattr("file", "user.x"),
}

TAKEN = Case(
    lambda top: file(top / "file", 0o666), lambda top: (top / "file").chmod(0o600), ON_FILE
)


def file_by_list(top: Path) -> None:
    os.setxattr(file(top / "file", 0o600), ACCESS, acl_for(USER, 6))


UNLISTED = Case(file_by_list, lambda top: os.removexattr(top / "file", ACCESS), ON_FILE)

# The group's members may less than others, and now the user is one.
SHUT_OUT = Case(
    lambda top: file(top / "file", 0o606),
    lambda top: os.chown(top / "file", 0, GROUP),
    ON_FILE,
)


def execute() -> None:
    subprocess.run([os.path.abspath("program")], check=False)


def program(top: Path) -> None:
    shutil.copy("/bin/true", top / "program")
    (top / "program").chmod(0o755)


NOT_EXECUTABLE = Case(program, lambda top: (top / "program").chmod(0o644), {"execute": execute})


# What belongs to an owner


def owned(top: Path) -> None:
    file(top / "file", 0o660, USER, GROUP)
    os.setxattr(top / "file", ACCESS, acl_for(USER, 6))
    file(top / "letter", 0o600, USER)
    os.symlink("x", top / "link")
    os.chown(top / "link", USER, GROUP, follow_symlinks=False)
    work = directory(top / "work", 0o1777, USER)
    os.setxattr(work, "user.x", b"x")
    os.setxattr(work, DEFAULT, acl_for(USER, 7))


def given_away(top: Path) -> None:
    for name in ("file", "letter", "link", "work"):
        os.chown(top / name, OTHER, OTHER, follow_symlinks=False)


OWNED = Case(
    owned,
    given_away,
    {
        "chmod": lambda: os.chmod("file", 0o666),
        "chmod of a directory": lambda: os.chmod("work", 0o777),
        "chgrp": lambda: os.chown("file", -1, GROUP),
        "chgrp of a directory": lambda: os.chown("work", -1, GROUP),
        "chgrp of a symlink": lambda: os.chown("link", -1, USER, follow_symlinks=False),
        "set times": lambda: os.utime("file", ns=(1, 1)),
        "set times of a symlink": lambda: os.utime("link", ns=(1, 1), follow_symlinks=False),
        "set a list": lambda: os.setxattr("file", ACCESS, acl_for(USER, 7)),
        "remove a list": lambda: os.removexattr("file", ACCESS),
        "set a default list": lambda: os.setxattr("work", DEFAULT, acl_for(USER, 5)),
        "remove a default list": lambda: os.removexattr("work", DEFAULT),
        "label a sticky directory": lambda: os.setxattr("work", "user.x", b"y"),
        "clear a sticky directory": lambda: os.removexattr("work", "user.x"),
        "leave no trace": lambda: os.open("file", os.O_RDONLY | os.O_NOATIME),
        # Where fs.protected_hardlinks is off, everybody may.
        **({"link": lambda: os.link("letter", "another")} if HARDLINKS.strip() == "1" else {}),
    },
)

CASES = {
    "sticky": STICKY,
    "sticky since": STICKY_SINCE,
    "closed": CLOSED,
    "listed no more": LISTED_NO_MORE,
    "hidden": HIDDEN,
    "taken": TAKEN,
    "unlisted": UNLISTED,
    "shut out": SHUT_OUT,
    "not executable": NOT_EXECUTABLE,
    "owned": OWNED,
}


def look_around(top: str) -> None:
    """Have the kernel hear of all that is there, by the user's own looks."""
    for above, directories, files in os.walk(top):
        for name in (".", *directories, *files):
            path = os.path.join(above, name)
            os.lstat(path)
            os.access(path, os.R_OK | os.W_OK | os.X_OK)


@pytest.mark.parametrize("server", ["none", "first", "second, role", "second, threads"])
def test_the_source_decides_again(new_mount: Callable[..., Mount], server: str) -> None:
    """By owner, mode, sticky bit and lists as they are, not as the kernel remembers them."""
    mount = new_mount(*options_of(server), "-o", "allow_other,cache=loose")
    for above in (mount.source, *mount.source.parents):
        os.chmod(above, os.stat(above).st_mode | 0o755)
    places = {}
    for side, top in (("direct", mount.source), ("mounted", mount.path)):
        for name, case in CASES.items():
            for call in case.calls:
                here = f"{side} {name}: {call}"
                places[side, name, call] = top / here
                (mount.source / here).mkdir()
                (mount.source / here).chmod(0o777)
                case.make(mount.source / here)

    def act() -> dict[tuple[str, str], list[int]]:
        become(USER, (GROUP,))
        for place in places.values():
            look_around(str(place))
        os.write(looked[1], b"x")
        os.read(changed[0], 1)
        found: dict[tuple[str, str], list[int]] = {}
        for (_, name, call), place in places.items():
            os.chdir(place)
            found.setdefault((name, call), []).append(errno_of(CASES[name].calls[call]))
        return found

    looked, changed = os.pipe(), os.pipe()
    try:
        with Child(act) as child:
            os.read(looked[0], 1)
            for side, name, call in places:
                CASES[name].change(mount.source / f"{side} {name}: {call}")
            os.write(changed[1], b"x")
            found = child.result()
    finally:
        for end in (*looked, *changed):
            os.close(end)
    assert {key: codes for key, codes in found.items() if codes[0] != codes[1]} == {}
    assert {key: codes for key, codes in found.items() if codes[0] not in REFUSED} == {}
    # And nothing was done before it was refused.
    for name, case in CASES.items():
        for call in case.calls:
            direct, mounted = (
                tree(mount.source / f"{s} {name}: {call}") for s in ("direct", "mounted")
            )
            assert mounted == direct, (name, call)
