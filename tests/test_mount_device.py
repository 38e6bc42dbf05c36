"""Getting the FUSE device without libfuse: by mount(2), by fusermount3, and handed over.

The mounts are real, and served by the tests themselves (tiny_server.py).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_server
from apart import AS_ROOT, NOBODY
from mounting import (
    Child,
    Watchdog,
    become,
    detach,
    errno_of,
    in_child,
    is_mounted,
    processes_naming,
    wait_until,
)

from ninefuse.command.options import OPTIONS, make_settings, parse_options
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse import mounting
from ninefuse.linux import capabilities, mountinfo, syscalls
from ninefuse.process import signals
from ninefuse.settings import Settings

USER = NOBODY  # whom fusermount3 wants to know by name
PLAIN, KEPT = (), ("auto_unmount",)  # mounted by mount(2), by fusermount3
FOR_MOUNT = {option.name for option in OPTIONS if option.for_libfuse}

_BIND, _PRIVATE = 0x1000, 0x44000
_CLONE_NEWNS = 0x20000
_PR_CAPBSET_DROP = 24

pytestmark = pytest.mark.skipif(not AS_ROOT, reason="needs root: becomes another user")


def settings_of(mountpoint: Path | str, *options: str, fsname: str = "tiny") -> Settings:
    escaped = fsname.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={escaped}", *options]
    return make_settings("/tmp", str(mountpoint), parse_options(words))


class Line(NamedTuple):
    """What the mount table says of a mount point."""

    flags: set[str]
    kind: str
    source: str
    options: set[str]


def line_of(path: Path | str) -> Line:
    for line in reversed(Path("/proc/self/mountinfo").read_bytes().splitlines()):
        mount, _, rest = line.partition(b" - ")
        fields = [_unescaped(field) for field in [*mount.split(b" "), *rest.split(b" ")]]
        if fields[4] == str(path):
            kind, source, options = fields[-3:]
            return Line(set(fields[5].split(",")), kind, source, set(options.split(",")))
    raise AssertionError(f"nothing is mounted on {path}")


def _unescaped(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\(\d{3})", lambda match: bytes([int(match[1], 8)]), field))


def descriptors() -> set[int]:
    """The open ones, but for the listing's own."""
    found = {int(number) for number in os.listdir("/proc/self/fd")}
    return {number for number in found if errno_of(os.fstat, number) == 0}


def has_children() -> bool:
    return errno_of(os.waitpid, -1, os.WNOHANG) != errno.ECHILD


def refusal(settings: Settings, may_leave_helper: bool = False) -> str:
    """How mounting is refused; what it leaves open or running is an error."""
    before = descriptors()
    with pytest.raises(Failure) as refused:
        mounting.mount(settings)
    assert refused.value.code == ExitCode.MOUNT_REFUSED
    assert descriptors() == before
    assert may_leave_helper or not has_children()
    return refused.value.message


class Facts(NamedTuple):
    """What a server has seen."""

    is_by_mount: bool
    is_kept: bool
    flags: tuple[bool, bool]  # whether the device blocks, and is inherited
    number: int | None
    requests: list[tiny_server.Request]
    left_open: int


def serve(settings: Settings) -> Facts:
    """Mount, serve until it is unmounted, and close."""
    before = descriptors()
    mounted = mounting.mount(settings)
    facts = Facts(
        mounted.point is not None,
        mounted.keeper is not None,
        (os.get_blocking(mounted.device), os.get_inheritable(mounted.device)),
        mounted.number,
        tiny_server.serve(mounted.device),
        0,
    )
    os.close(mounted.device)
    mounting.unmount(mounted, settings.mountpoint)
    return facts._replace(left_open=len(descriptors() - before))


@contextmanager
def served(guard: Watchdog, settings: Settings) -> Iterator[Child[Facts]]:
    """A server in a child, whose mount answers."""
    path = Path(settings.mountpoint)
    with Child(serve, settings) as child:
        guard.watch(child.pid, path)
        try:
            wait_until(lambda: is_mounted(path) or child.done(), "the mount")
            if is_mounted(path):
                path.stat()
            yield child
        finally:
            detach(path)
            guard.forget(path)


# Mounting, and what is mounted


@pytest.mark.parametrize("options", [PLAIN, KEPT])
def test_the_device_is_there_and_all_is_closed_in_the_end(
    guard: Watchdog, mountpoint: Path, options: tuple[str, ...]
) -> None:
    with served(guard, settings_of(mountpoint, *options)) as server:
        number = mountinfo.connection_at(str(mountpoint))
        line = line_of(mountpoint)
        assert (line.kind, line.source) == ("fuse.ninefuse", "tiny")
        assert {"user_id=0", "group_id=0", "default_permissions"} <= line.options
        assert {"nosuid", "nodev"} <= line.flags
        detach(mountpoint)
        facts = server.result()
    assert facts.flags == (False, False)
    assert facts.number == number
    assert facts.requests[0].opcode == tiny_server.INIT
    assert (facts.is_by_mount, facts.is_kept) == (options == PLAIN, options == KEPT)
    # Of the place of a mount of root's there is one, until the process ends.
    assert facts.left_open == (1 if facts.is_by_mount else 0)


@pytest.mark.parametrize(("options", "sent"), [(PLAIN, 0o777), (KEPT, 0o750)])
def test_modes_come_unmasked_by_mount_2_alone(
    guard: Watchdog, mountpoint: Path, options: tuple[str, ...], sent: int
) -> None:
    with served(guard, settings_of(mountpoint, *options)) as server:
        before = os.umask(0o027)
        try:
            assert errno_of((mountpoint / "made").mkdir) == errno.ENOSYS
        finally:
            os.umask(before)
        detach(mountpoint)
        bodies = {request.opcode: request.body for request in server.result().requests}
    mode, umask = struct.unpack_from("=II", bodies[tiny_server.MKDIR])
    assert (mode, umask) == (sent, 0o027)


NAMES = ("a,b", "back\\slash\\", ",ro", " two words ")


# For root fusermount3 notes the name by mount(8), some of which take one for an option.
@pytest.mark.parametrize(
    ("options", "fsname"),
    [*((PLAIN, name) for name in ("-o", "--", *NAMES)), *((KEPT, name) for name in NAMES)],
)
def test_names_of_any_kind_reach_the_table(
    guard: Watchdog, mountpoint: Path, options: tuple[str, ...], fsname: str
) -> None:
    with served(guard, settings_of(mountpoint, *options, fsname=fsname)):
        line = line_of(mountpoint)
        assert line.source == fsname
        assert "rw" in line.flags


@pytest.mark.parametrize("options", [PLAIN, KEPT])
@pytest.mark.parametrize("name", ["-o", "with space", "comma,back\\slash", "new\nline", "\udcff"])
def test_mount_points_of_any_name(
    guard: Watchdog, tmp_path: Path, options: tuple[str, ...], name: str
) -> None:
    path = tmp_path / name
    path.mkdir()
    with served(guard, settings_of(path, *options)) as server:
        number = mountinfo.connection_at(str(path))
        detach(path)
        assert number is not None
        assert server.result().number == number


FORBIDDING = ("ro", "nodev", "nosuid", "noexec", "sync", "dirsync", "noatime")
ALLOWING = ("dev", "suid", "allow_other")


def test_each_word_that_there_is_is_tested_here() -> None:
    assert {*FORBIDDING, *ALLOWING, *KEPT} == FOR_MOUNT


@pytest.mark.parametrize("options", [PLAIN, KEPT])
def test_words_for_the_kernel_reach_it(
    guard: Watchdog, mountpoint: Path, options: tuple[str, ...]
) -> None:
    with served(guard, settings_of(mountpoint, *options, *FORBIDDING)):
        line = line_of(mountpoint)
        assert {"ro", "nodev", "nosuid", "noexec", "noatime"} <= line.flags
        assert {"sync", "dirsync"} <= line.flags | line.options
    with served(guard, settings_of(mountpoint, *options, *ALLOWING)):
        line = line_of(mountpoint)
        assert line.flags == {"rw", "relatime"}
        assert "allow_other" in line.options


# auto_unmount


def helper_of(path: Path) -> list[str]:
    return [words for words in processes_naming(path) if "fusermount3" in words]


def serve_with_children(settings: Settings, pipe: int) -> None:
    """Mount, and start a program that inherits all that it can and outlives us."""
    mounted = mounting.mount(settings)
    program = ("sh", "-c", "read line")
    subprocess.Popen(program, stdin=pipe, close_fds=False, start_new_session=True)
    tiny_server.serve(mounted.device)


def test_a_killed_server_is_unmounted_though_its_children_live(
    guard: Watchdog, mountpoint: Path
) -> None:
    theirs, ours = os.pipe()
    with Child(serve_with_children, settings_of(mountpoint, *KEPT), theirs) as server:
        guard.watch(server.pid, mountpoint)
        wait_until(lambda: is_mounted(mountpoint), "the mount")
        mountpoint.stat()
        assert len(helper_of(mountpoint)) == 1
        server.kill()
        wait_until(lambda: not is_mounted(mountpoint), "the mount point given back")
        wait_until(lambda: not helper_of(mountpoint), "the helper's end")
        assert errno_of(os.write, ours, b"\n") == 0, "the program had lived until now"
    os.close(theirs)
    os.close(ours)
    guard.forget(mountpoint)


def test_the_helper_goes_with_an_orderly_end(guard: Watchdog, mountpoint: Path) -> None:
    def end(settings: Settings) -> None:
        mounted = mounting.mount(settings)
        assert helper_of(mountpoint)
        os.close(mounted.device)
        mounting.unmount(mounted, settings.mountpoint)
        assert not is_mounted(mountpoint)
        assert os.wait()[1] == 0

    in_child(end, settings_of(mountpoint, *KEPT))
    assert not helper_of(mountpoint)


# Unmounting


@pytest.mark.parametrize("options", [PLAIN, KEPT])
def test_what_others_mounted_on_top_stays(
    guard: Watchdog, mountpoint: Path, options: tuple[str, ...]
) -> None:
    def end(settings: Settings) -> None:
        below = mounting.mount(settings)
        with Child(tiny_server.serve, below.device):
            syscalls.mount("above", str(mountpoint), "tmpfs", 0, "")
        os.close(below.device)
        mounting.unmount(below, settings.mountpoint)
        assert line_of(mountpoint).source == "above"

    in_child(end, settings_of(mountpoint, *options))


@pytest.mark.parametrize("options", [PLAIN, KEPT])
def test_a_busy_mount_that_nobody_serves_any_more_is_detached(
    guard: Watchdog, mountpoint: Path, options: tuple[str, ...]
) -> None:
    def end(settings: Settings) -> None:
        mounted = mounting.mount(settings)
        os.open(mountpoint, os.O_PATH)  # somebody's, who keeps it busy
        os.close(mounted.device)
        mounting.unmount(mounted, settings.mountpoint)
        assert not is_mounted(mountpoint)
        assert errno_of(os.fstat, mounted.device) == errno.EBADF

    in_child(end, settings_of(mountpoint, *options))
    assert os.listdir(mountpoint) == []


def test_a_mount_that_landed_elsewhere_is_refused_and_taken_away(
    guard: Watchdog, tmp_path: Path
) -> None:
    (tmp_path / "real/mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    text = in_child(refusal, settings_of(tmp_path / "link/mnt", *KEPT), True)
    assert "is not the directory that was checked: somebody exchanges it" in text
    wait_until(lambda: not is_mounted(tmp_path / "real/mnt"), "the mount point given back")


# As another user, and with another fusermount3


def in_namespace(function: Callable[[Path], None], *, user: int = USER) -> None:
    """Call a function in a child with mounts of its own, as a user who may open /dev/fuse.

    Its argument is a directory of USER's.
    """

    def call() -> None:
        assert ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0
        syscalls.mount("", "/", "", _PRIVATE, "")
        syscalls.mount("tmpfs", "/mnt", "tmpfs", 0, "mode=755")
        os.mknod("/mnt/fuse", 0o020666, os.makedev(10, 229))
        os.chmod("/mnt/fuse", 0o666)
        syscalls.mount("/mnt/fuse", "/dev/fuse", "", _BIND, "")
        if os.path.exists("/etc/fuse.conf"):
            syscalls.mount("/dev/null", "/etc/fuse.conf", "", _BIND, "")
        home = Path("/mnt/home")
        home.mkdir()
        os.chown(home, USER, USER)
        if user:
            become(user)
        function(home)

    in_child(call)


@pytest.mark.parametrize("options", [PLAIN, KEPT])
def test_a_user_mounts_and_unmounts(options: tuple[str, ...]) -> None:
    def check(home: Path) -> None:
        path = home / "a,b \\ c"
        path.mkdir()
        settings = settings_of(path, *options, "suid", "dev", "noexec")
        before = descriptors()
        mounted = mounting.mount(settings)
        assert has_children() == (options == KEPT)
        assert (mounted.point is None, mounted.keeper is None) == (True, options == PLAIN)
        assert mounted.number is not None
        assert mounted.number == mountinfo.connection_at(str(path))
        line = line_of(path)
        assert line.flags == {"rw", "nosuid", "nodev", "noexec", "relatime"}
        assert {f"user_id={USER}", f"group_id={USER}"} <= line.options
        with Child(tiny_server.serve, mounted.device):
            path.stat()
        os.close(mounted.device)
        mounting.unmount(mounted, settings.mountpoint)
        assert not is_mounted(path)
        assert descriptors() == before
        if options == KEPT:
            assert os.wait()[1] == 0

    in_namespace(check)


def test_what_fusermount3_refuses_it_says_itself() -> None:
    def check(home: Path) -> None:
        os.mkdir(home / "mnt")
        text = refusal(settings_of("/mnt"))
        assert text == (
            "cannot mount on /mnt: fusermount3: user has no write access to mountpoint /mnt"
            " (mounting takes CAP_SYS_ADMIN, or fusermount3 and a mount point of one's own)"
        )
        for more in (PLAIN, KEPT):
            text = refusal(settings_of(home / "mnt", *more, "allow_other"))
            assert "fusermount3: option allow_other only allowed if 'user_allow_other'" in text
        assert "No such file or directory" in refusal(settings_of(home / "missing"))

    in_namespace(check)


def test_where_nobody_may_mount_root_hears_it_from_fusermount3() -> None:
    def check(home: Path) -> None:
        admin = capabilities.CAP_SYS_ADMIN
        assert capabilities.libc.prctl(_PR_CAPBSET_DROP, admin.bit_length() - 1, 0, 0, 0) == 0
        e, p, i = capabilities.get_capabilities()
        capabilities.set_capabilities(capabilities.Capabilities(e & ~admin, p & ~admin, i & ~admin))
        assert refusal(settings_of(home)) == (
            "cannot mount on /mnt/home: fusermount3: mount failed: Operation not permitted (nobody"
            " may mount in here, not even root, without CAP_SYS_ADMIN: start the container with"
            " --cap-add SYS_ADMIN --device /dev/fuse)"
        )

    in_namespace(check, user=0)


def with_program(home: Path, script: str) -> None:
    """Put another program in fusermount3's place."""
    program = home / "program"
    program.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    syscalls.mount(str(program), "/usr/bin/fusermount3", "", _BIND, "")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "fusermount3 gave no device (exit status 3)"),
        ("kill -9 $$", "fusermount3 gave no device (killed by signal 9)"),
        (
            "head -c 1000000 /dev/zero | tr '\\0' x >&2; echo 'at  last' >&2; exit 1",
            "xxx (mounting takes",
        ),
        ("echo; echo 'two\nlines' >&2", ": two; lines (mounting takes"),
    ],
)
@pytest.mark.parametrize("options", [PLAIN, KEPT])
def test_a_program_that_mounts_nothing(script: str, said: str, options: tuple[str, ...]) -> None:
    def check(home: Path) -> None:
        with_program(home, script)
        become(USER)
        assert said in refusal(settings_of(home, *options))

    in_namespace(check, user=0)


def test_a_program_that_fails_after_all() -> None:
    def check(home: Path) -> None:
        shutil.copy("/usr/bin/fusermount3", "/mnt/real")
        os.chmod("/mnt/real", 0o4755)
        unmounts = 'if [ "$1" = -u ]; then exec /mnt/real "$@"; fi'
        with_program(home, f'{unmounts}\n/mnt/real "$@"; echo but no >&2; exit 1')
        become(USER)
        assert ": but no (" in refusal(settings_of(home))
        assert not is_mounted(home)

    in_namespace(check, user=0)


def test_where_the_kernel_collects_children_by_itself() -> None:
    def check(home: Path) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        settings = settings_of(home)
        mounted = mounting.mount(settings)
        assert is_mounted(home)
        os.close(mounted.device)
        mounting.unmount(mounted, settings.mountpoint)
        assert not is_mounted(home)

    in_namespace(check)


def test_without_the_program() -> None:
    def check(home: Path) -> None:
        syscalls.mount("/dev/null", "/usr/bin/fusermount3", "", _BIND, "")
        os.environ["PATH"] = ":relative:.:/mnt/nowhere"
        (home / "relative").mkdir()
        for place in (home, home / "relative"):
            (place / "fusermount3").write_text("#!/bin/sh\necho they ran me >&2\n")
            (place / "fusermount3").chmod(0o755)
        os.chdir(home)
        become(USER)
        assert ": there is no fusermount3 on the PATH (" in refusal(settings_of(home))
        os.environ["PATH"] = f"relative:{home}"
        assert ": they ran me (" in refusal(settings_of(home))

    in_namespace(check, user=0)


# Not in sh, which unblocks signals by itself.
TELLER = """#!{python} -IS
import json, os, sys
open_there = {{}}
for fd in os.listdir("/proc/self/fd"):
    try:
        open_there[fd] = os.readlink("/proc/self/fd/" + fd)
    except OSError:
        pass
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if "\\t" in line)
signals = [int(status[name], 16) for name in ("SigBlk", "SigIgn")]
told = sys.argv[1:], signals, open_there, os.environ["_FUSE_COMMFD"], os.getpgrp()
json.dump(told, open("{file}", "w"))
"""


def test_the_program_inherits_nothing_that_is_not_for_it() -> None:
    def check(home: Path) -> None:
        file = home / "told"
        with_program(home, TELLER.format(python=sys.executable, file=file))
        caller = os.open("/etc/passwd", os.O_RDONLY)
        os.set_inheritable(caller, True)
        signals.block()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with pytest.raises(Failure):
            mounting.mount(settings_of(home, *KEPT, "ro"))
        words, (blocked, ignored), open_there, commfd, group = json.loads(file.read_text())
        assert words == [
            "-o",
            "default_permissions,subtype=ninefuse,fsname=tiny,auto_unmount,ro",
            "--",
            str(home),
        ]
        assert {number for number in range(1, 65) if blocked >> number - 1 & 1} == signals.STOP
        assert not ignored >> signal.SIGCHLD - 1 & 1
        assert group == os.getpgrp()
        assert open_there.pop(commfd).startswith("socket:")
        assert (open_there.pop("0"), open_there.pop("1")) == ("/dev/null", "/dev/null")
        assert open_there.pop("2").startswith("pipe:")
        assert not open_there

    in_namespace(check, user=0)


# What is handed over


def test_a_device_that_is_handed_over_is_made_ready_and_left_to_its_maker(
    guard: Watchdog, mountpoint: Path
) -> None:
    def check() -> None:
        device = os.open("/dev/fuse", os.O_RDWR)
        os.set_inheritable(device, True)
        data = f"fd={device},rootmode=40000,user_id=0,group_id=0"
        syscalls.mount("theirs", str(mountpoint), "fuse", 0, data)
        mounted = mounting.mount(settings_of(f"/dev/fd/{device}"))
        assert mounted == mounting.Mounted(device)
        assert (os.get_blocking(device), os.get_inheritable(device)) == (False, False)
        with Child(tiny_server.serve, device):
            mountpoint.stat()
        os.close(mounted.device)
        mounting.unmount(mounted, f"/dev/fd/{device}")
        assert errno_of(os.fstat, device) == errno.EBADF
        assert line_of(mountpoint).source == "theirs"

    in_child(check)


@pytest.mark.parametrize("number", ["0", "777", "9" * 30])
def test_what_is_no_device_is_not_taken(number: str) -> None:
    def check() -> None:
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        with pytest.raises(Failure, match=f"^descriptor {number} is not an open /dev/fuse: "):
            mounting.mount(settings_of(f"/dev/fd/{number}"))

    in_child(check)
