"""Who may do what is as on the source: several hundred calls by callers of all kinds.

Callers with other users' ids and groups, with and without capabilities, in a user namespace of
their own, make the same calls in a directory of the source and in one of an `allow_other` mount.
The answers must be the same, and so must what the source is afterwards.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from mounting import SOAK, Child, Mount, Watchdog, errno_of, fresh_place
from rights import ACCESS, DEFAULT, acl, tree
from servers import options_of

from ninefuse.linux import capabilities

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for others"),
]

USER, OTHER, GROUP, FURTHER, SUB = 12345, 12346, 4321, 4322, 30000
CLONE_NEWUSER = 0x10000000
PR_SET_KEEPCAPS = 8
CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETFCAP, SYS_ADMIN = (
    1 << n for n in (0, 1, 2, 3, 4, 31, 21)
)

_libc = ctypes.CDLL(None, use_errno=True)

# The calls


def exchange(one: str, other: str) -> None:
    from ninefuse.linux import syscalls

    here = os.open(".", os.O_PATH)
    try:
        syscalls.rename(here, one.encode(), here, other.encode(), syscalls.RENAME_EXCHANGE)
    finally:
        os.close(here)


def opened(name: str, flags: int, mode: int = 0o644) -> None:
    os.close(os.open(name, flags, mode))


def written(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    try:
        os.write(fd, b"changed")
    finally:
        os.close(fd)


def cut(name: str) -> None:
    fd = os.open(name, os.O_RDWR)
    try:
        os.ftruncate(fd, 1)
    finally:
        os.close(fd)


def executed(name: str) -> None:
    os.waitpid(os.posix_spawn(os.path.abspath(name), [name], {}), 0)


NOBODY = 0xFFFFFFFF
LIST = acl((1, 7, NOBODY), (2, 5, USER), (4, 5, NOBODY), (16, 7, NOBODY), (32, 4, NOBODY))
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
OWN = "own"  # a file of the caller's, in a directory of its own

ON_FILE: dict[str, Callable[[str], object]] = {
    "read": lambda f: opened(f, os.O_RDONLY),
    "open to write": lambda f: opened(f, os.O_WRONLY),
    "append": lambda f: opened(f, os.O_RDWR | os.O_APPEND),
    "empty": lambda f: opened(f, os.O_WRONLY | os.O_TRUNC),
    "create over": lambda f: opened(f, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    "read unnoticed": lambda f: opened(f, os.O_RDONLY | os.O_NOATIME),
    "write": written,
    "truncate": lambda f: os.truncate(f, 1),
    "ftruncate": cut,
    "execute": executed,
    "chmod": lambda f: os.chmod(f, 0o640),
    "chmod to set ids": lambda f: os.chmod(f, 0o6755),
    "chmod less set ids": lambda f: os.chmod(f, os.stat(f).st_mode & 0o1777),
    "chown": lambda f: os.chown(f, os.getuid(), os.getgid()),
    "chown away": lambda f: os.chown(f, SUB, -1),
    "chgrp": lambda f: os.chown(f, -1, FURTHER),
    "chown to nobody": lambda f: os.chown(f, -1, -1),
    "touch": lambda f: os.utime(f),
    "set times": lambda f: os.utime(f, ns=(10**9, 10**9)),
    "getxattr": lambda f: os.getxattr(f, "user.x"),
    "setxattr": lambda f: os.setxattr(f, "user.y", b"y"),
    "removexattr": lambda f: os.removexattr(f, "user.x"),
    "set list": lambda f: os.setxattr(f, ACCESS, LIST),
    "remove list": lambda f: os.removexattr(f, ACCESS),
    "set trusted": lambda f: os.setxattr(f, "trusted.y", b"y"),
    "get trusted": lambda f: os.getxattr(f, "trusted.x"),
    "set capability": lambda f: os.setxattr(f, "security.capability", CAPABILITY),
    "link": lambda f: os.link(f, f"{OWN}/link"),
}

IN_DIRECTORY: dict[str, Callable[[str], object]] = {
    "list": lambda d: opened(d, os.O_RDONLY | os.O_DIRECTORY),
    "create": lambda d: opened(f"{d}/new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666),
    "create program": lambda d: opened(f"{d}/new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o6755),
    "mkdir": lambda d: os.mkdir(f"{d}/new", 0o2775),
    "mkfifo": lambda d: os.mkfifo(f"{d}/new", 0o666),
    "mknod": lambda d: os.mknod(f"{d}/new", stat.S_IFREG | 0o2755),
    "symlink": lambda d: os.symlink("x", f"{d}/new"),
    "link into": lambda d: os.link(f"{OWN}/file", f"{d}/new"),
    "unlink root's": lambda d: os.unlink(f"{d}/root"),
    "unlink user's": lambda d: os.unlink(f"{d}/user"),
    "unlink sub's": lambda d: os.unlink(f"{d}/sub"),
    "rmdir": lambda d: os.rmdir(f"{d}/dir"),
    "rename": lambda d: os.rename(f"{d}/root", f"{d}/new"),
    "rename away": lambda d: os.rename(f"{d}/sub", f"{OWN}/new"),
    "rename into": lambda d: os.rename(f"{OWN}/file", f"{d}/new"),
    "replace": lambda d: os.rename(f"{OWN}/file", f"{d}/user"),
    "move directory": lambda d: os.rename(f"{d}/dir", f"{OWN}/dir"),
    "exchange": lambda d: exchange(f"{d}/user", f"{d}/root"),
    "chmod": lambda d: os.chmod(d, 0o2770),
    "chown": lambda d: os.chown(d, os.getuid(), os.getgid()),
    "chgrp": lambda d: os.chown(d, -1, FURTHER),
    "touch": lambda d: os.utime(d),
    "setxattr": lambda d: os.setxattr(d, "user.y", b"y"),
    "set default": lambda d: os.setxattr(d, DEFAULT, LIST),
}

# What they are made on: owner, group, mode, whether user SUB+1's list is on it

FILES = (
    (0, 0, 0o644, False),
    (0, GROUP, 0o664, False),
    (0, FURTHER, 0o707, False),  # the group may less than others
    (0, 0, 0o6777, False),
    (0, FURTHER, 0o2666, False),
    (0, 0, 0o711, False),
    (0, 0, 0o600, True),
    (USER, GROUP, 0o6755, False),
    (USER, OTHER, 0o2755, False),
    (USER, FURTHER, 0o600, True),
    (SUB + 1, SUB + 2, 0o600, False),
    (SUB + 1, 0, 0o600, False),
)

DIRECTORIES = (
    (0, 0, 0o755, False),
    (0, 0, 0o1777, False),
    (0, 0, 0o700, True),
    (0, FURTHER, 0o2775, False),
    (0, FURTHER, 0o707, False),
    (OTHER, FURTHER, 0o3777, False),
    (USER, OTHER, 0o3777, False),
    (SUB + 1, SUB + 2, 0o700, False),
    (SUB + 1, SUB + 2, 0o1777, False),
    (SUB + 1, 0, 0o2775, False),
)

# What the names of calls have in them that take something away in a directory.
TAKING = ("unlink", "rmdir", "rename", "replace", "move", "exchange")
PROGRAM = b"#!/bin/true\n"


def prepare(top: Path) -> None:
    """A file or directory for each call, and what the calls need beside."""
    top.mkdir()
    top.chmod(0o777)
    (top / OWN).mkdir()
    (top / OWN / "file").touch()
    os.chown(top / OWN / "file", USER, USER)
    os.chown(top / OWN, USER, USER)
    (top / OWN).chmod(0o777)


def make_file(path: Path, owner: int, group: int, mode: int, listed: bool) -> None:
    path.write_bytes(PROGRAM)
    if "xattr" in path.name or "trusted" in path.name:
        os.setxattr(path, "user.x", b"x")
        os.setxattr(path, "trusted.x", b"x")
    dress(path, owner, group, mode, listed)


def make_directory(path: Path, owner: int, group: int, mode: int, listed: bool) -> None:
    path.mkdir()
    if any(word in path.name for word in TAKING):
        for name, whose in (("root", 0), ("user", USER), ("sub", SUB + 1)):
            (path / name).touch()
            os.chown(path / name, whose, whose)
        (path / "dir").mkdir()
        os.chown(path / "dir", owner, group)
    dress(path, owner, group, mode, listed)


def dress(path: Path, owner: int, group: int, mode: int, listed: bool) -> None:
    os.chown(path, owner, group)
    path.chmod(mode)
    if listed:
        os.setxattr(path, ACCESS, LIST)


def spots() -> Iterator[tuple[str, Callable[[str], object], tuple[int, int, int, bool]]]:
    """Each call with each thing that it is made on."""
    for kind, calls, targets in (("file", ON_FILE, FILES), ("dir", IN_DIRECTORY, DIRECTORIES)):
        for call, function in calls.items():
            for n, target in enumerate(targets):
                yield f"{kind} {n} {call}", function, target


# The callers


def drop_to(uid: int, gid: int, groups: Sequence[int] = (), kept: int = 0) -> None:
    """Another user's identity for good, with these capabilities."""
    _libc.prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    own = capabilities.get_capabilities()
    kept &= own.permitted
    capabilities.set_capabilities(own._replace(effective=kept, permitted=kept))


def root_without(missing: int) -> None:
    os.setgroups([])
    own = capabilities.get_capabilities()
    capabilities.set_capabilities(own._replace(effective=own.permitted & ~missing))


def in_a_namespace(uid: int) -> None:
    """A user namespace that maps USER to 0 and ten more, as of a rootless container."""
    ready, mapped = os.pipe(), os.pipe()
    parent = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(ready[1])  # so that the read ends where the namespace is refused (in a chroot)
        if os.read(ready[0], 1):
            for kind in ("uid", "gid"):
                Path(f"/proc/{parent}/{kind}_map").write_text(f"0 {USER} 1\n1 {SUB} 10\n")
            os.write(mapped[1], b"x")
        os._exit(0)
    assert _libc.unshare(CLONE_NEWUSER) == 0, os.strerror(ctypes.get_errno())
    os.write(ready[1], b"x")
    os.read(mapped[0], 1)
    os.waitpid(helper, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    for whose in (0, uid):  # from 0 to another costs the capabilities
        os.setresuid(whose, whose, whose)


FILES_ALL = CHOWN | DAC_OVERRIDE | DAC_READ_SEARCH | FOWNER | FSETID
IDENTITIES: dict[str, Callable[[], object]] = {
    "user": lambda: drop_to(USER, USER),
    "member": lambda: drop_to(USER + 5, GROUP, (GROUP, FURTHER, 7)),
    "owner and member": lambda: drop_to(USER, GROUP, (FURTHER,)),
    "root of a namespace": lambda: in_a_namespace(0),
    "user of a namespace": lambda: in_a_namespace(2),
    "user who passes": lambda: drop_to(USER + 5, USER + 5, (), DAC_OVERRIDE),
    "user who reads": lambda: drop_to(USER + 5, USER + 5, (), DAC_READ_SEARCH),
    "user who owns": lambda: drop_to(USER + 5, USER + 5, (), FOWNER),
    "user who gives": lambda: drop_to(USER + 5, USER + 5, (), CHOWN | FSETID),
    "user who may all": lambda: drop_to(USER, USER, (FURTHER,), FILES_ALL | SYS_ADMIN | SETFCAP),
    "root": lambda: root_without(0),
    "root who passes nothing": lambda: root_without(DAC_OVERRIDE | DAC_READ_SEARCH),
    "root who owns nothing": lambda: root_without(FOWNER | CHOWN),
    "root who keeps no bits": lambda: root_without(FSETID | SETFCAP | SYS_ADMIN),
    "root of nothing": lambda: root_without(-1),
}
# Under the other models, who are served by other threads, or by the dispatcher itself.
FEW = ("member", "root of a namespace", "root who passes nothing") if SOAK else ("member",)

KEEP_BITS = {
    name for name in IDENTITIES if name.startswith("root") or "all" in name or "give" in name
}


def is_known(identity: str, spot: str) -> bool:
    """Whether docs/conformance.md tells of the difference."""
    if not spot.startswith("file "):
        return False
    _, n, call = spot.split(" ", 2)
    mode = FILES[int(n)][2]
    is_mark = mode & 0o6010 == 0o2000
    if call == "chown to nobody":
        # So the kernel asks, too, before it lets somebody write who is not the owner.
        return bool(mode & 0o6000)
    # Whose a write is does not come with it: it takes set-id bits, whoever may keep them.
    return call == "write" and bool(mode & 0o6000) and identity in KEEP_BITS and not is_mark


CASES = [("second, role", name) for name in IDENTITIES] + [
    (server, name) for server in ("none", "first") for name in FEW
]


@pytest.mark.parametrize(("server", "identity"), CASES)
def test_rights_are_those_of_the_source(
    shared_mounts: Callable[..., Mount], guard: Watchdog, server: str, identity: str
) -> None:
    mount = shared_mounts("-o", "allow_other", *options_of(server))
    for above in (mount.source, *mount.source.parents):
        os.chmod(above, os.stat(above).st_mode | 0o755)
    with fresh_place(mount) as place:
        for side in ("direct", "mounted"):
            prepare(place.source / side)
            for spot, _, target in spots():
                make = make_file if spot.startswith("file") else make_directory
                make(place.source / side / spot, *target)
        # The directories are entered before: not everybody gets there.
        tops = {"direct": place.source / "direct", "mounted": place.path / "mounted"}
        held = {side: os.open(top, os.O_PATH) for side, top in tops.items()}

        def act() -> list[tuple[str, int, int]]:
            os.umask(0o022)
            IDENTITIES[identity]()
            codes: dict[str, list[int]] = {}
            for side in ("direct", "mounted"):
                os.fchdir(held[side])
                for spot, call, _ in spots():
                    codes.setdefault(spot, []).append(errno_of(call, spot))
                    errno_of(os.rename, f"{OWN}/new", f"{OWN}/file")
            return [(spot, direct, mounted) for spot, (direct, mounted) in codes.items()]

        try:
            with Child(act) as child:
                answers = child.result()
        finally:
            for fd in held.values():
                os.close(fd)
        different = [a for a in answers if a[1] != a[2] and not is_known(identity, a[0])]
        direct, mounted = (tree(place.source / side) for side in ("direct", "mounted"))
        for known in [path for path in direct if is_known(identity, path.split("/")[0])]:
            del direct[known], mounted[known]
        differ = {p: (direct.get(p), mounted.get(p)) for p in direct.keys() | mounted.keys()}
        differ = {p: both for p, both in differ.items() if both[0] != both[1]}
        assert (different, differ) == ([], {})
        assert len(answers) > 500
        if identity not in ("root", "user who may all"):
            assert {1, 13} & {code for _, code, _ in answers}
