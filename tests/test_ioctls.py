"""The ioctls that are passed on (ninefuse/linux/ioctls.py), beside the same on plain files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from file_systems import image
from ops_helpers import ROOT, Client, client_of, fails, need_flags, needs_root, outcome
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source
from test_credentials import as_somebody, identity, look_at
from test_mount_rights import SUB, USER, in_a_namespace

from ninefuse import ops
from ninefuse.fuse import callbacks
from ninefuse.linux import callers, ioctls
from ninefuse.linux.callers import Caller
from ninefuse.linux.ioctls import (
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_GETFSLABEL,
    FS_IOC_GETVERSION,
    FS_IOC_SETFLAGS,
)
from ninefuse.tree.kernel import FIRST_HANDLE

pytestmark = pytest.mark.usefixtures("leak_free")

SOMEBODY = Caller(12345, 23456)
CONTAINED = Caller(USER, USER)  # root of `in_a_namespace`
IMMUTABLE, APPEND, NODUMP, PROJINHERIT = 0x10, 0x20, 0x40, 0x20000000
XFLAG_NODUMP, XFLAG_PROJINHERIT = 0x80, 0x200
XATTR = struct.Struct("=IIIII8x")

GETTERS = {
    "flags": (FS_IOC_GETFLAGS, 4),
    "version": (FS_IOC_GETVERSION, 4),
    "attributes": (FS_IOC_FSGETXATTR, 28),
    "label": (FS_IOC_GETFSLABEL, 256),
}


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int.from_bytes(ioctls.ask(fd, FS_IOC_GETFLAGS), sys.byteorder)
    finally:
        os.close(fd)


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=q", flags))
    finally:
        os.close(fd)


def packed(flags: int, size: int = 8) -> bytes:
    """Flags as a program gives them: an int at the beginning of a long."""
    return flags.to_bytes(4, sys.byteorder).ljust(size, b"\xff")


@pytest.fixture
def files(client: Client) -> Iterator[Client]:
    """A client of a source with a file, "f", and a directory, "d", that have flags."""
    need_flags(client.source)
    (client.source / "f").touch()
    (client.source / "d").mkdir()
    yield client
    for name in ("f", "d"):
        path = client.source / name
        if flags_of(path) & (IMMUTABLE | APPEND):
            set_flags(path, flags_of(path) & ~(IMMUTABLE | APPEND))


@contextlib.contextmanager
def open_handle(client: Client, name: str, caller: Caller | None = None) -> Iterator[int]:
    """A handle such as the kernel opens for this: to read."""
    fid = client.know(name) if name else None
    number = fid.number if fid is not None else ROOT
    if fid is None or fid.node.kind == 0o040000:
        handle = client.do(callbacks.opendir, number, caller)
    else:
        handle = client.do(callbacks.open, number, os.O_RDONLY, caller).number
    try:
        yield handle
    finally:
        client.do(ops.clunk, handle)
        if fid is not None:
            client.forget(fid)


# What is passed on


@pytest.mark.parametrize("name", ["f", "d"])
@pytest.mark.parametrize("getter", GETTERS)
def test_what_is_asked_is_what_the_source_says(files: Client, getter: str, name: str) -> None:
    """As many bytes as the source moves, whatever the number says of them."""
    command, size = GETTERS[getter]
    fd = os.open(files.source / name, os.O_RDONLY)
    try:
        plain = outcome(lambda: fcntl.ioctl(fd, command, bytes(256))[:size])
    finally:
        os.close(fd)
    with open_handle(files, name) as handle:
        for room in (size, size + 4, 300):
            assert (
                outcome(lambda: files.do(callbacks.ioctl, handle, command, b"", room))  # noqa: B023
                == plain
            )
        with fails(errno.EINVAL):
            files.do(callbacks.ioctl, handle, command, b"", size - 1)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("name", ["f", "d", ""])
def test_what_is_set_is_set_in_the_source(files: Client, name: str, size: int) -> None:
    """By a handle that is open for reading; the kernel is told of whose times have changed."""
    path = files.source / name
    told: list[int] = []
    files.session.attributes_changed = told.append
    before = flags_of(path)
    with open_handle(files, name) as handle:
        for flags in (before | NODUMP, before):
            given = packed(flags, size)
            assert files.do(callbacks.ioctl, handle, FS_IOC_SETFLAGS, given, 0) == b""
            assert flags_of(path) == flags
        assert told == [path.stat().st_ino if name else ROOT] * 2
        with fails(errno.EINVAL):
            files.do(callbacks.ioctl, handle, FS_IOC_SETFLAGS, b"abc", 0)
        assert len(told) == 2


def test_attributes_are_set_in_the_source(files: Client) -> None:
    path = files.source / "f"
    with open_handle(files, "f") as handle:
        old = files.do(callbacks.ioctl, handle, FS_IOC_FSGETXATTR, b"", 28)
        flags, *others = XATTR.unpack(old)
        new = XATTR.pack(flags | XFLAG_NODUMP, *others)
        files.do(callbacks.ioctl, handle, FS_IOC_FSSETXATTR, new, 0)
        assert flags_of(path) & NODUMP
        assert files.do(callbacks.ioctl, handle, FS_IOC_FSGETXATTR, b"", 28) == new
        with fails(errno.EINVAL):
            files.do(callbacks.ioctl, handle, FS_IOC_FSSETXATTR, new[:27], 0)


REFUSED = {
    "TCGETS": 0x5401,
    "FIONREAD": 0x541B,
    "FIBMAP": 1,
    "FITRIM": 0xC0185879,
    "FIFREEZE": 0xC0045877,
    "FICLONE": 0x40049409,
    "FS_IOC32_GETFLAGS": 0x80046601,
    "FS_IOC_SETVERSION": 0x40087602,
    "FS_IOC_SETFSLABEL": 0x41009432,
    "FS_IOC_ENABLE_VERITY": 0x40806685,
    "FS_IOC_ADD_ENCRYPTION_KEY": 0xC0506617,
    "EXT4_IOC_SHUTDOWN": 0x8004587D,
    "none": 0,
    "the last": (1 << 32) - 1,
    "too large": 1 << 40,
    "negative": -1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused(
    client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOTTY, without asking the source."""

    def never(*args: object) -> bytes:
        raise AssertionError

    monkeypatch.setattr(fcntl, "ioctl", never)
    fid = client.create("f")
    for data, room in ((b"", 0), (bytes(8), 8), (bytes(300), 300)):
        with fails(errno.ENOTTY):
            client.do(callbacks.ioctl, fid, REFUSED[name], data, room)
    client.do(ops.clunk, fid)


def test_what_is_not_open_has_no_ioctls(client: Client) -> None:
    (client.source / "f").touch()
    unopened = client.walk("f")
    for code, fid in ((errno.EINVAL, unopened), (errno.EBADF, FIRST_HANDLE + 1000)):
        with fails(code):
            client.do(callbacks.ioctl, fid, FS_IOC_GETFLAGS, b"", 4)
    client.do(ops.clunk, unopened)


def test_a_read_only_session_sets_nothing(leak_free: None, source: Path) -> None:
    need_flags(source)
    (source / "f").touch()
    with client_of(source, read_only=True) as client, open_handle(client, "f") as handle:
        flags = client.do(callbacks.ioctl, handle, FS_IOC_GETFLAGS, b"", 4)
        assert len(flags) == 4
        for command in (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR):
            with fails(errno.EROFS):
                client.do(callbacks.ioctl, handle, command, bytes(28), 0)


def test_the_source_has_room_for_what_the_number_says(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FUSE server goes by that; the caller gets what is moved."""
    given: list[tuple[int, int]] = []

    def serve(fd: int, command: int, data: bytes) -> bytes:
        given.append((command >> 16 & 0x3FFF, len(data)))
        return b"x" * len(data)

    monkeypatch.setattr(fcntl, "ioctl", serve)
    fid = client.create("f")
    for command, size in GETTERS.values():
        assert client.do(callbacks.ioctl, fid, command, b"", 300) == b"x" * size
    client.do(callbacks.ioctl, fid, FS_IOC_SETFLAGS, packed(0, 4), 0)
    assert len(given) == len(GETTERS) + 1
    assert all(said == size for said, size in given)
    client.do(ops.clunk, fid)


# Whose rights


def owned(client: Client, caller: Caller) -> Path:
    path = client.source / "f"
    os.chown(path, caller.uid, caller.gid)
    path.chmod(0o666)
    return path


@needs_root
def test_a_caller_sets_flags_of_own_files_only(files: Client) -> None:
    """And none that take a right which it has not."""
    path = owned(files, SOMEBODY)
    flags = flags_of(path)
    other = Caller(SOMEBODY.uid + 1, SOMEBODY.gid)
    before = identity()

    def as_process(pid: int) -> None:
        for who in (SOMEBODY._replace(pid=pid), SOMEBODY):
            with open_handle(files, "f", who) as handle:
                for wanted, answer in (
                    (flags | NODUMP, b""),
                    (flags | IMMUTABLE, "EPERM"),
                    (flags | APPEND, "EPERM"),
                    (flags, b""),
                ):
                    asking = FS_IOC_SETFLAGS, packed(wanted), 0, who
                    assert outcome(lambda: files.do(callbacks.ioctl, handle, *asking)) == answer  # noqa: B023
                    assert identity() == before
        with open_handle(files, "f", other) as handle:
            for who in (other, other._replace(pid=pid)):
                asking = FS_IOC_SETFLAGS, packed(flags | NODUMP), 0, who
                with fails(errno.EPERM):
                    files.do(callbacks.ioctl, handle, *asking)

    look_at(as_somebody, as_process)
    assert flags_of(path) == flags


@needs_root
def test_root_makes_files_immutable(files: Client) -> None:
    """If it has what it takes."""
    path = owned(files, SOMEBODY)
    flags = flags_of(path)

    def as_process(pid: int) -> None:
        for who in (Caller(0, 0, pid=pid), Caller(0, 0), None):
            with open_handle(files, "f", who) as handle:
                for wanted in (flags | IMMUTABLE, flags | APPEND, flags):
                    files.do(callbacks.ioctl, handle, FS_IOC_SETFLAGS, packed(wanted), 0, who)
                    assert flags_of(path) == wanted

    look_at(int, as_process)

    def without_the_right(pid: int) -> None:
        who = Caller(0, 0, pid=pid)
        with open_handle(files, "f", who) as handle:
            files.do(callbacks.ioctl, handle, FS_IOC_SETFLAGS, packed(flags | NODUMP), 0, who)
            with fails(errno.EPERM):
                files.do(callbacks.ioctl, handle, FS_IOC_SETFLAGS, packed(flags | APPEND), 0, who)

    look_at(lambda: drop(9), without_the_right)
    assert flags_of(path) == flags | NODUMP


def drop(capability: int) -> None:
    """Have this process, from now on, be without a capability."""
    from ninefuse.linux import capabilities

    c = capabilities.get_capabilities()
    left = ~(1 << capability)
    capabilities.set_capabilities(
        capabilities.Capabilities(c.effective & left, c.permitted & left, c.inheritable)
    )


def test_a_daemon_that_is_not_root_sets_flags_for_its_owner(
    files: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It acts as itself, so it looks whose the file is."""
    owner = os.geteuid() or 1000
    if os.geteuid() == 0:
        os.chown(files.source / "f", owner, owner)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    flags = flags_of(files.source / "f")
    with open_handle(files, "f") as handle:
        for who in (Caller(owner, 1), Caller(0, 0), None):
            for wanted in (flags | NODUMP, flags):
                files.do(callbacks.ioctl, handle, FS_IOC_SETFLAGS, packed(wanted), 0, who)
                assert flags_of(files.source / "f") == wanted
        for command in (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR):
            with fails(errno.EPERM):
                files.do(callbacks.ioctl, handle, command, bytes(28), 0, Caller(owner + 1, 1))
    assert flags_of(files.source / "f") == flags


# Projects


@pytest.fixture
def projects(leak_free: None, tmp_path: Path) -> Iterator[Client]:
    """A client of a file system that has projects, with a file of SOMEBODY's."""
    with image("xfs", tmp_path) as disk, client_of(disk) as client:
        (disk / "f").touch()
        owned(client, SOMEBODY)
        yield client


def project_of(client: Client, handle: int) -> tuple[Any, ...]:
    return XATTR.unpack(client.do(callbacks.ioctl, handle, FS_IOC_FSGETXATTR, b"", 28))


def changed(client: Client, handle: int, who: Caller) -> list[bytes | str]:
    """What is answered to changes of a file's project: its number, and whether it is inherited."""
    flags, extsize, extents, _, cow = project_of(client, handle)
    plain = int.from_bytes(
        client.do(callbacks.ioctl, handle, FS_IOC_GETFLAGS, b"", 4), sys.byteorder
    )
    asked = [
        (FS_IOC_FSSETXATTR, XATTR.pack(flags, extsize, extents, 42, cow)),
        (FS_IOC_FSSETXATTR, XATTR.pack(flags ^ XFLAG_PROJINHERIT, extsize, extents, 42, cow)),
        (FS_IOC_SETFLAGS, packed(plain)),
        (FS_IOC_SETFLAGS, packed(plain ^ PROJINHERIT)),
    ]
    return [
        outcome(lambda: client.do(callbacks.ioctl, handle, *one, 0, who))  # noqa: B023
        for one in asked
    ]


@needs_root
def test_projects_are_changed_by_who_is_in_no_namespace(projects: Client) -> None:
    """They are what project quotas go by. Root's that cannot be seen is believed."""
    path = projects.source / "f"

    def ask(who: Caller) -> Callable[[int], list[bytes | str]]:
        def asked(pid: int) -> list[bytes | str]:
            with open_handle(projects, "f") as handle:
                answers = changed(projects, handle, who._replace(pid=pid))
                clean = XATTR.pack(0, 0, 0, 0, 0)
                projects.do(callbacks.ioctl, handle, FS_IOC_FSSETXATTR, clean, 0)
                return answers

        return asked

    granted = look_at(as_somebody, ask(SOMEBODY))
    assert granted[0] == granted[2] == b""
    assert look_at(int, ask(Caller(0, 0))) == granted
    assert ask(Caller(0, 0))(0) == granted
    owned(projects, CONTAINED)
    refused = look_at(lambda: in_a_namespace(0), ask(CONTAINED))
    assert refused == ["EINVAL", "EINVAL", b"", "EINVAL"]
    assert ask(CONTAINED)(0) == refused
    assert flags_of(path) & PROJINHERIT == 0


@needs_root
def test_flags_are_set_from_a_namespace(files: Client) -> None:
    """Of files whose owners are known there, by who has the right there; not such as take more."""
    flags = flags_of(files.source / "f")
    user = Caller(SUB + 1, SUB + 1)

    def ask(who: Caller) -> Callable[[int], list[bytes | str]]:
        def asked(pid: int) -> list[bytes | str]:
            answers = []
            for wanted in (flags | NODUMP, flags | APPEND, flags):
                asking = FS_IOC_SETFLAGS, packed(wanted), 0, who._replace(pid=pid)
                answers.append(outcome(lambda: files.do(callbacks.ioctl, handle, *asking)))  # noqa: B023
            return answers

        return asked

    some, none = [b"", "EPERM", b""], ["EPERM"] * 3
    with open_handle(files, "f") as handle:
        for owner, of_root, of_user in (
            *((CONTAINED, some, none), (Caller(SUB + 1, SUB + 2), some, some)),
            *((Caller(SUB + 2, 0), some, none), (Caller(5, 5), none, none)),
        ):
            owned(files, owner)
            assert look_at(lambda: in_a_namespace(0), ask(CONTAINED)) == of_root
            assert look_at(lambda: in_a_namespace(2), ask(user)) == of_user


@needs_root
def test_who_cannot_be_seen_changes_no_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is not that of the callers."""
    monkeypatch.setattr(callers, "_own", b"")
    assert callers.may_change_projects(Caller(0, 0, pid=os.getpid()))
    assert not callers.may_change_projects(SOMEBODY._replace(pid=os.getpid()))
