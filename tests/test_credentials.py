"""Whose rights a system call is made with (ninefuse/linux/credentials.py)."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from mounting import in_child
from ops_helpers import ROOT, Client, client_of, fails, need_devices, needs_root
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.exitcodes import ExitCode
from ninefuse.linux import callers, capabilities, credentials
from ninefuse.linux.callers import Caller
from ninefuse.linux.capabilities import settle
from ninefuse.linux.credentials import acting_as, pwrite_as, spending_as
from ninefuse.ops import Changes

pytestmark = pytest.mark.usefixtures("leak_free")

T = TypeVar("T")

SOMEBODY = Caller(12345, 23456)
FSETID, SYS_RESOURCE = 1 << 4, 1 << 24  # capabilities(7)


def identity() -> tuple[str, ...]:
    """The ids and capabilities of the calling thread."""
    with open("/proc/thread-self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return tuple(lines[name].strip() for name in ("Uid", "Gid", "Groups", "CapPrm", "CapEff"))


def effective() -> int:
    """The effective capabilities of the calling thread."""
    return int(identity()[-1], 16)


def on_a_thread(function: Callable[[], T]) -> T:
    """What a function returns, or raises, on a thread of its own: it may spoil that one."""
    values: list[T] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            values.append(function())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    if failures:
        raise failures[0]
    return values[0]


@pytest.fixture(autouse=True)
def unspoilt() -> Iterator[None]:
    """No test leaves its own thread with other rights than it found."""
    before = identity()
    yield
    assert identity() == before


@pytest.fixture(autouse=True, params=["compiled", "interpreted"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of all: each test is made in compiled code and in Python."""
    if request.param == "interpreted":
        monkeypatch.setattr(credentials, "_write_as", None)
        monkeypatch.setattr(credentials, "_CompiledActing", None)
        monkeypatch.setattr(callers, "_covers", None)
        monkeypatch.setattr(callers, "_compiled_look", None)
        monkeypatch.setattr(capabilities, "get_sets", capabilities._get_sets)
    elif None in (credentials._write_as, credentials._CompiledActing, callers._covers):
        pytest.skip("the extension is not built")


@pytest.fixture
def open_to_all(source: Path) -> Path:
    """A source directory in which everybody may do everything."""
    source.chmod(0o777)
    return source


def owner(path: Path) -> Caller:
    found = path.lstat()
    return Caller(found.st_uid, found.st_gid)


# acting_as

MAKERS: dict[str, Callable[[Client, Caller | None], object]] = {
    "file": lambda c, who: c.do(ops.lcreate, c.walk(), b"new", os.O_RDWR, 0o640, who),
    "directory": lambda c, who: c.do(ops.mkdir, ROOT, b"new", 0o750, who),
    "node": lambda c, who: c.do(ops.mknod, ROOT, b"new", stat.S_IFREG | 0o640, 0, who),
    "fifo": lambda c, who: c.do(ops.mknod, ROOT, b"new", stat.S_IFIFO | 0o640, 0, who),
    "socket": lambda c, who: c.do(ops.mknod, ROOT, b"new", stat.S_IFSOCK | 0o640, 0, who),
    "symlink": lambda c, who: c.do(ops.symlink, ROOT, b"new", b"target", who),
}


@needs_root
@pytest.mark.parametrize("maker", MAKERS)
def test_what_a_caller_makes_is_the_callers(client: Client, maker: str) -> None:
    """From the first moment on: the ids are those of the call that makes it."""
    before = identity()
    for who in (SOMEBODY, Caller(0, 500), Caller(500, 0), Caller(4_000_000_000, 4_000_000_001)):
        MAKERS[maker](client, who)
        assert owner(client.source / "new") == who
        assert identity() == before
        client.do(ops.remove, client.walk("new"))


@pytest.mark.parametrize("maker", MAKERS)
def test_without_a_caller_it_is_the_daemons(client: Client, maker: str) -> None:
    """So it is for a caller who is the daemon's own user, and always without root's rights."""
    for who in (None, Caller(os.geteuid(), os.getegid())):
        MAKERS[maker](client, who)
        assert owner(client.source / "new") == Caller(os.geteuid(), os.getegid())
        client.do(ops.remove, client.walk("new"))


@needs_root
@pytest.mark.parametrize("maker", MAKERS)
def test_the_daemons_ids_are_back_after_an_error(client: Client, maker: str) -> None:
    """The name is taken, the directory has gone."""
    (client.source / "new").mkdir()
    before = identity()
    with fails(errno.EEXIST, errno.EISDIR):
        MAKERS[maker](client, SOMEBODY)
    assert identity() == before
    (client.source / "new").rmdir()
    client.source.rmdir()
    with fails(errno.ENOENT):
        MAKERS[maker](client, SOMEBODY)
    assert identity() == before


@needs_root
def test_ids_are_back_after_any_exception() -> None:
    """Also after one that is no error."""
    before = identity()

    def fail_inside(failure: BaseException) -> None:
        with acting_as(SOMEBODY):
            assert identity() != before
            raise failure

    for failure in (OSError(5, "broken"), KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(failure)):
            fail_inside(failure)
        assert identity() == before


@needs_root
def test_callers_may_be_nested() -> None:
    """The outer one's ids come back first."""
    before = identity()
    with acting_as(SOMEBODY):
        outer = identity()
        assert outer[:2] == ("0\t0\t0\t12345", "0\t0\t0\t23456")
        with acting_as(None):
            assert identity() == outer
    assert identity() == before


@needs_root
def test_other_threads_keep_their_ids(tmp_path: Path) -> None:
    """While one acts for a caller; also threads that start meanwhile elsewhere."""
    before = identity()
    inside, done = threading.Event(), threading.Event()

    def act() -> None:
        with acting_as(SOMEBODY):
            inside.set()
            assert done.wait(20)
            (tmp_path / "theirs").mkdir()

    tmp_path.chmod(0o777)
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    assert inside.wait(20)
    assert identity() == before
    assert on_a_thread(identity) == before
    (tmp_path / "ours").mkdir()
    done.set()
    thread.join(20)
    assert owner(tmp_path / "ours") == Caller(0, 0)
    assert owner(tmp_path / "theirs") == SOMEBODY


@needs_root
def test_the_daemon_may_still_pass_and_write_directories(client: Client) -> None:
    """The kernel has checked the caller's rights, with groups that the daemon does not know."""
    (client.source / "closed").mkdir(0o700)
    directory = client.walk("closed")
    client.do(ops.lcreate, client.walk("closed"), b"file", os.O_RDWR, 0o600, SOMEBODY)
    client.do(ops.mkdir, directory, b"directory", 0o700, SOMEBODY)
    client.do(ops.symlink, directory, b"symlink", b"x", SOMEBODY)
    assert {owner(path) for path in (client.source / "closed").iterdir()} == {SOMEBODY}


@needs_root
def test_device_nodes_are_made_for_callers(client: Client) -> None:
    """Who may not make them does not get that far; the kernel has checked."""
    need_devices(client.source)
    device = os.makedev(1, 3)
    client.do(ops.mknod, ROOT, b"node", stat.S_IFCHR | 0o600, device, SOMEBODY)
    assert owner(client.source / "node") == SOMEBODY
    assert (client.source / "node").stat().st_rdev == device


@needs_root
def test_a_caller_gets_no_other_power(open_to_all: Path) -> None:
    """Only what was needed to make things is kept; giving them away is not."""
    (open_to_all / "file").touch()
    with acting_as(SOMEBODY):
        now = effective()
        with pytest.raises(PermissionError):
            os.chown(open_to_all / "file", 1, 1)
        with pytest.raises(PermissionError):
            os.chmod(open_to_all / "file", 0o777)
    chown, fowner, linux_immutable, mac_override = 1 << 0, 1 << 3, 1 << 9, 1 << 32
    assert now & (chown | fowner | FSETID | linux_immutable | mac_override) == 0


@needs_root
def test_in_a_set_group_id_directory(client: Client) -> None:
    """New files get the directory's group, new directories its bit as well."""
    os.chown(client.source, 0, 777)
    client.source.chmod(0o2777)
    client.do(ops.lcreate, client.walk(), b"file", os.O_RDWR, 0o664, SOMEBODY)
    client.do(ops.mkdir, ROOT, b"directory", 0o775, SOMEBODY)
    client.do(ops.symlink, ROOT, b"symlink", b"x", SOMEBODY)
    client.do(ops.mknod, ROOT, b"fifo", stat.S_IFIFO | 0o664, 0, SOMEBODY)
    assert {owner(path) for path in client.source.iterdir()} == {Caller(SOMEBODY.uid, 777)}
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in client.source.iterdir()}
    assert modes == {"file": 0o664, "directory": 0o2775, "symlink": 0o777, "fifo": 0o664}


@needs_root
def test_no_set_group_id_for_a_group_that_is_not_the_callers(client: Client) -> None:
    """A new program file in such a directory would run with rights of the directory's group."""
    os.chown(client.source, 0, 777)
    client.source.chmod(0o2777)
    client.do(ops.lcreate, client.walk(), b"file", os.O_RDWR, 0o2775, SOMEBODY)
    assert stat.S_IMODE((client.source / "file").stat().st_mode) == 0o775


def test_without_the_right_to_switch_nothing_is_switched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that a user runs makes files of its own, and raises nothing."""
    before = identity()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with acting_as(SOMEBODY):
        assert identity() == before
        (tmp_path / "file").touch()
    monkeypatch.undo()
    assert owner(tmp_path / "file") == Caller(os.geteuid(), os.getegid())


# Whose process it is


def look_at(become: Callable[[], object], ask: Callable[[int], T]) -> T:
    """What is answered for a process, by its number, that has become somebody."""
    ready, over = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become()
            os.write(ready[1], b"x")
            os.read(over[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    try:
        assert os.read(ready[0], 1) == b"x"
        return ask(pid)
    finally:
        os.write(over[1], b"x")
        os.waitpid(pid, 0)
        for fd in (ready[0], *over):
            os.close(fd)


def as_somebody() -> None:
    os.setgroups([7, 8, SOMEBODY.gid])
    os.setresgid(SOMEBODY.gid, SOMEBODY.gid, SOMEBODY.gid)
    os.setresuid(SOMEBODY.uid, SOMEBODY.uid, SOMEBODY.uid)


@needs_root
def test_a_callers_groups_and_capabilities_are_taken_on_and_given_back() -> None:
    """Those of the very thread; a daemon's own are not the caller's."""

    def inside(pid: int) -> tuple[str, ...]:
        with acting_as(SOMEBODY._replace(pid=pid)):
            return identity()

    uids, gids, groups, _, capabilities = look_at(as_somebody, inside)
    assert (uids, gids) == ("0\t0\t0\t12345", "0\t0\t0\t23456")
    assert groups.split() == ["7", "8"]
    assert int(capabilities, 16) == 0


@needs_root
def test_of_a_process_with_other_ids_nothing_is_taken() -> None:
    """It could have the kernel ask so to be rid of groups that may less than others."""

    def rights(who: Caller) -> Callable[[int], tuple[int, int]]:
        permitted = capabilities.get_capabilities().permitted

        def ask(pid: int) -> tuple[int, int]:
            found = callers.rights_of(who._replace(pid=pid), permitted)
            return found.capabilities & permitted, len(found.groups)

        return ask

    permitted = capabilities.get_capabilities().permitted
    checked = callers._CHECKED & permitted
    other = Caller(SOMEBODY.uid + 1, SOMEBODY.gid)
    assert look_at(as_somebody, rights(SOMEBODY)) == (0, 2)
    assert look_at(as_somebody, rights(other)) == (0, 0)
    # Nobody becomes root by such a trick: a file system that root has mounted asks so.
    assert look_at(as_somebody, rights(Caller(0, 0))) == (permitted, 0)
    # A server of root's is believed, and so is what cannot be seen, but for ownership.
    assert look_at(int, rights(other)) == (checked, 0)
    assert rights(other)(1 << 30) == (checked, 0)
    assert rights(other)(0) == (checked, 0)
    assert not checked & 1 << 3


@needs_root
def test_a_caller_who_cannot_be_looked_at_for_want_of_descriptors_is_refused() -> None:
    """Or callers could have themselves not looked at, by opening many files."""

    def ask(pid: int) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
        try:
            with fails(errno.EMFILE), acting_as(SOMEBODY._replace(pid=pid)):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    look_at(as_somebody, ask)


@needs_root
@pytest.mark.parametrize("capability", [6, 7])  # CAP_SETGID, CAP_SETUID
def test_nobody_acts_without_the_callers_ids(capability: int) -> None:
    """A daemon that may not take them on refuses, and has what it had."""

    def act() -> None:
        c = capabilities.get_capabilities()
        capabilities.set_capabilities(c._replace(effective=c.effective & ~(1 << capability)))
        before = identity()
        acted: list[int] = []
        for rights in (None, callers.Rights()):
            with fails(errno.EPERM), acting_as(SOMEBODY, rights=rights):
                acted.append(1)
            assert identity() == before
        assert not acted

    on_a_thread(act)


@needs_root
def test_the_umask_is_the_threads_own_and_is_given_back(tmp_path: Path) -> None:
    def act() -> None:
        with acting_as(SOMEBODY._replace(umask=0o27), making=True):
            os.close(os.open(tmp_path / "theirs", os.O_CREAT | os.O_WRONLY, 0o777))
            assert on_a_thread(lambda: os.umask(os.umask(0o22))) != 0o27
        os.close(os.open(tmp_path / "ours", os.O_CREAT | os.O_WRONLY, 0o777))

    tmp_path.chmod(0o777)
    before = os.umask(0o22)
    try:
        on_a_thread(act)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o755


@needs_root
def test_a_process_ends_rather_than_go_on_with_a_strangers_rights() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            with acting_as(SOMEBODY):
                # The rights to have them back have gone.
                c = capabilities.get_capabilities()
                capabilities.set_capabilities(capabilities.Capabilities(0, 0, c.inheritable))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ExitCode.INTERNAL


# spending_as


@needs_root
@pytest.mark.parametrize("group", [None, 4321])
def test_spending_takes_the_ids_and_leaves_nothing_that_root_may(group: int | None) -> None:
    """And gives back what there was, whatever the function does."""

    def act() -> None:
        os.setgroups([77])
        settle()
        before = identity()
        for who in (SOMEBODY, Caller(0, 500), Caller(500, 0), Caller(4_000_000_000, 9)):
            uids, gids, groups, permitted, now = spending_as(who, group, identity)
            assert (int(uids.split()[-1]), int(gids.split()[-1])) == who[:2]
            assert groups.split() == (["77"] if group is None else ["4321"])
            assert permitted == before[3]
            over_files = callers._OVER_FILES | capabilities.CAP_MKNOD
            if who.uid:
                # What is no matter of files stays: no write asks for it.
                assert not int(now, 16) & (over_files & ~capabilities.CAP_SETFCAP)
            assert not int(now, 16) & (FSETID | SYS_RESOURCE)
            assert identity() == before
            with pytest.raises(ZeroDivisionError):
                spending_as(who, group, lambda: 1 // 0)
            assert identity() == before

    # setgroups(2) of glibc's is every thread's: in a process of its own.
    in_child(act)


@needs_root
@pytest.mark.parametrize("group", [None, 4321])
@pytest.mark.parametrize("capability", [6, 7])  # CAP_SETGID, CAP_SETUID
def test_nothing_is_spent_without_the_callers_ids(group: int | None, capability: int) -> None:
    """A daemon that may not take them on refuses."""

    def act() -> None:
        c = capabilities.get_capabilities()
        capabilities.set_capabilities(c._replace(effective=c.effective & ~(1 << capability)))
        before = identity()
        called: list[int] = []
        with fails(errno.EPERM):
            spending_as(SOMEBODY, group, called.append, 1)
        assert identity() == before
        assert not called

    on_a_thread(act)


@needs_root
@pytest.mark.parametrize("group", [None, 4321])
def test_a_process_ends_rather_than_go_on_after_spending(group: int | None) -> None:
    def lose() -> int:
        c = capabilities.get_capabilities()
        capabilities.set_capabilities(capabilities.Capabilities(0, 0, c.inheritable))
        return 99

    pid = os.fork()
    if pid == 0:
        os._exit(spending_as(SOMEBODY, group, lose))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ExitCode.INTERNAL


@pytest.fixture
def file(source: Path) -> Iterator[int]:
    fd = os.open(source / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@needs_root
@pytest.mark.parametrize("group", [None, 4321])
def test_a_write_for_somebody_is_that_write_and_no_more(file: int, group: int | None) -> None:
    def act() -> None:
        settle()
        before = identity()
        assert pwrite_as(SOMEBODY, group, file, b"hello", 3) == 5
        assert pwrite_as(SOMEBODY, group, file, b"", 0) == 0
        assert pwrite_as(Caller(0, 7), group, file, memoryview(b"new")[1:], 0) == 2  # type: ignore[arg-type]
        assert identity() == before
        assert os.pread(file, 100, 0) == b"ew\0hello"
        with fails(errno.EBADF):
            pwrite_as(SOMEBODY, group, -1, b"x", 0)
        with pytest.raises((OSError, ValueError)):
            pwrite_as(SOMEBODY, group, file, b"x", -1)
        assert identity() == before

    on_a_thread(act)


@needs_root
def test_a_write_for_somebody_takes_set_user_id_away(file: int) -> None:
    """Without settling, too, where root's own would leave it."""

    def act() -> None:
        before = identity()
        for who, left in ((SOMEBODY, 0o755), (Caller(0, 7), 0o4755)):
            os.fchmod(file, 0o4755)
            assert pwrite_as(who, None, file, b"x", 0) == 1
            assert stat.S_IMODE(os.fstat(file).st_mode) == left
        assert identity() == before

    on_a_thread(act)


@needs_root
@pytest.mark.parametrize("capability", [6, 7])  # CAP_SETGID, CAP_SETUID
def test_nothing_is_written_without_the_callers_ids(file: int, capability: int) -> None:
    def act() -> None:
        c = capabilities.get_capabilities()
        capabilities.set_capabilities(c._replace(effective=c.effective & ~(1 << capability)))
        before = identity()
        with fails(errno.EPERM):
            pwrite_as(SOMEBODY, None, file, b"x", 0)
        assert identity() == before
        assert os.fstat(file).st_size == 0

    on_a_thread(act)


def refuse_capset() -> None:
    """Have the kernel answer this thread's capset(2) with EPERM from now on (seccomp(2))."""
    code = {"x86_64": 126, "aarch64": 91, "riscv64": 91}.get(os.uname().machine)
    if code is None:
        os._exit(ExitCode.INTERNAL)  # nothing to be seen here
    program = b"".join(
        struct.pack("=HBBI", *step)
        for step in (
            (0x20, 0, 0, 0),  # load the number of the call
            (0x15, 0, 1, code),
            (0x06, 0, 0, 0x50000 | errno.EPERM),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    kept = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", 4, ctypes.addressof(kept))
    assert not capabilities.libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    assert not capabilities.libc.prctl(22, 2, header)  # PR_SET_SECCOMP


@needs_root
@pytest.mark.parametrize("group", [None, 4321])
def test_a_process_ends_rather_than_go_on_after_a_write(file: int, group: int | None) -> None:
    """The thread's capabilities cannot be set to what they were."""
    pid = os.fork()
    if pid == 0:
        try:
            settle()
            refuse_capset()
            pwrite_as(SOMEBODY, group, file, b"x", 0)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ExitCode.INTERNAL


# settle


def test_settling_lays_down_two_capabilities(leak_free: None) -> None:
    """They stay permitted; everything else stays as it was; once more changes nothing."""
    before = effective()

    def settled() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        settle()
        first = identity()
        settle()
        return first, identity(), on_a_thread(identity)

    permitted = identity()[:-1]
    for now in on_a_thread(settled):
        assert now[:-1] == permitted
        assert int(now[-1], 16) == before & ~(FSETID | SYS_RESOURCE)
    assert effective() == before


@needs_root
@pytest.mark.parametrize("how", ["write", "truncate", "chown"])
def test_a_change_by_the_daemon_clears_set_user_id(source: Path, how: str) -> None:
    """As the caller's own would; without settling, root's writes leave the bits alone."""

    def change() -> int:
        settle()
        (source / "program").write_bytes(b"old")
        (source / "program").chmod(0o6755)
        with client_of(source) as client:
            fid = client.open("program", flags=os.O_RDWR)
            if how == "write":
                client.do(ops.write, fid, 0, b"new")
            elif how == "truncate":
                client.do(ops.setattr, fid, Changes(size=0))
            else:
                client.do(ops.setattr, fid, Changes(uid=5, gid=5))
        return stat.S_IMODE((source / "program").stat().st_mode)

    assert on_a_thread(change) == 0o755


@needs_root
def test_acting_for_somebody_does_not_bring_laid_down_capabilities_back(tmp_path: Path) -> None:
    """Going back to user 0 would raise them again."""

    def act() -> tuple[int, int, int]:
        settle()
        before = effective()
        with acting_as(SOMEBODY):
            inside = effective()
        return before, inside, effective()

    before, inside, after = on_a_thread(act)
    assert before == after
    assert not (before | inside) & (FSETID | SYS_RESOURCE)


# The right to keep bits


@needs_root
def test_a_mode_that_arrives_is_set(source: Path) -> None:
    """The kernel has taken the bit away already where the caller may not have it."""
    (source / "file").touch()
    os.chown(source / "file", 5, 777)

    def change() -> int:
        settle()
        before = effective()
        with client_of(source) as client:
            client.do(ops.setattr, client.walk("file"), Changes(mode=0o2755))
        assert effective() == before
        return stat.S_IMODE((source / "file").stat().st_mode)

    assert on_a_thread(change) == 0o2755


@needs_root
def test_the_right_to_keep_the_bit_ends_with_the_block() -> None:
    """Also by an exception; where it is there already, nothing changes."""

    def keep() -> None:
        for who in (None, Caller(0, 0)):
            with acting_as(who):
                before = effective()
            settle()
            with acting_as(who):
                assert effective() == before & ~(FSETID | SYS_RESOURCE)
            before = effective()
            with acting_as(who, bits=True):
                assert effective() == before | FSETID
            assert effective() == before
            with pytest.raises(OSError, match="broken"), acting_as(who, bits=True):
                raise OSError(errno.EIO, "broken")
            assert effective() == before

    on_a_thread(keep)


@needs_root
def test_a_right_that_is_not_permitted_is_not_asked_for() -> None:
    """A daemon without it goes on without it."""

    def keep() -> None:
        c = capabilities.get_capabilities()
        without = c.permitted & ~FSETID
        capabilities.set_capabilities(
            c._replace(effective=without & c.effective, permitted=without)
        )
        before = identity()
        for who in (None, Caller(0, 0)):
            with acting_as(who, bits=True):
                assert identity() == before
            assert identity() == before

    on_a_thread(keep)


def test_capabilities_that_may_not_be_had() -> None:
    """EPERM for more than is permitted, as capset says."""

    def raise_them() -> None:
        c = capabilities.get_capabilities()
        capabilities.set_capabilities(c._replace(effective=0, permitted=0))
        assert effective() == 0
        with fails(errno.EPERM):
            capabilities.set_capabilities(c._replace(effective=FSETID, permitted=FSETID))

    on_a_thread(raise_them)
