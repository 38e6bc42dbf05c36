"""What is asked of a process, in compiled code and in Python (ninefuse/linux/callers.py)."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import in_child
from ops_helpers import needs_root
from test_credentials import look_at

from ninefuse.linux import callers, capabilities, credentials
from ninefuse.linux.callers import Caller, may_all_that_we_may
from ninefuse.linux.credentials import acting_as

try:
    from ninefuse.linux import _rights
except ImportError:
    pytest.skip("the extension is not built", allow_module_level=True)

PID = 4321
FSETID = capabilities.CAP_FSETID
CLONE_NEWUSER = 0x10000000
OUR_MAP = b"         0          0 4294967295\n"
STATUS = (
    "Name:\tcat\nUmask:\t0022\nState:\tS (sleeping)\nPid:\t4321\n"
    "Uid:\t1\t2\t3\t{uid}\nGid:\t5\t6\t7\t{gid}\nFDSize:\t64\nGroups:\t{groups}\nNStgid:\t4321\n"
    "CapInh:\t0000000000000000\nCapPrm:\t000001ffffffffff\nCapEff:\t{caps}\nCapBnd:\t0\n"
)


def status(
    uid: object = 1000, gid: object = 1001, groups: str = " ", caps: str = "0000000000000000"
) -> bytes:
    return STATUS.format(uid=uid, gid=gid, groups=groups, caps=caps).encode()


class Proc:
    """A directory that says what a procfs would of one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path / str(PID)
        self.path.mkdir()
        self.fd = os.open(path, os.O_PATH)

    def look(self, said: bytes, uid_map: bytes = OUR_MAP) -> callers._Seen | None:
        """What the compiled code makes of it."""
        (self.path / "status").write_bytes(said)
        (self.path / "uid_map").write_bytes(uid_map)
        return _rights.look(PID, self.fd, OUR_MAP)


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proc]:
    """For the Python way, too."""
    made = Proc(tmp_path)
    monkeypatch.setattr(callers, "_proc", made.fd)
    monkeypatch.setattr(callers, "_own", OUR_MAP)
    monkeypatch.setattr(callers, "_compiled_look", None)
    yield made
    os.close(made.fd)


LARGEST = 4294967294


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        (status(), (1000, 1001, frozenset(), 0, True)),
        (status(groups=""), (1000, 1001, frozenset(), 0, True)),
        (status(groups="7 8 1001 "), (1000, 1001, frozenset((7, 8, 1001)), 0, True)),
        (
            status(LARGEST, LARGEST, f"{LARGEST} ", "000001ffffffffff"),
            (LARGEST, LARGEST, frozenset((LARGEST,)), (1 << 41) - 1, True),
        ),
        (status(caps="8000000000000001"), (1000, 1001, frozenset(), 1 << 63 | 1, True)),
        (
            status(groups="".join(f"{n} " for n in range(256))),
            (1000, 1001, frozenset(range(256)), 0, True),
        ),
    ],
)
def test_a_status_is_read_as_python_reads_it(proc: Proc, said: bytes, seen: callers._Seen) -> None:
    assert proc.look(said) == seen
    assert callers._look(PID) == seen


@pytest.mark.parametrize("caps", ["0000000000000000", "0000000000000001"])
@pytest.mark.parametrize("uid_map", [OUR_MAP[:-1], OUR_MAP + b"1", b"0 1000 1\n", b""])
def test_capabilities_in_another_namespace_are_not_ours(
    proc: Proc, caps: str, uid_map: bytes
) -> None:
    """Who has none has them nowhere."""
    seen = proc.look(status(caps=caps), uid_map)
    assert seen == callers._look(PID)
    assert seen is not None
    assert seen[4] is (int(caps) == 0)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"Name:\tcat\n",
        status(uid="4294967296"),
        status(gid="99999999999999999999999"),
        status(uid=""),
        status(uid="-1"),
        status(uid="1 "),
        status(uid="1\t2"),
        status(gid="x"),
        status(groups="7"),
        status(groups="7  8 "),
        status(groups="7\t8 "),
        status(groups="4294967296 "),
        status(groups="-7 "),
        status(groups="".join(f"{n} " for n in range(257))),
        status(caps=""),
        status(caps="00000000000000001"),
        status(caps="000000000000000g"),
        status(caps="000001FFFFFFFFFF"),
        status().replace(b"Gid:", b"Gyd:"),
        status().replace(b"\nGid:", b"\nMore:\t1\nGid:"),
        status().replace(b"\nGroups:", b"\nxGroups:"),
        status().replace(b"\nCapEff:", b"\nxCapEff:"),
        status().replace(b"Name:\tcat\n", b"Name:\t" + b"c" * 9000 + b"\n"),
        *(status(groups="7 8 ")[:size] for size in range(len(status(groups="7 8 ")) - 10)),
    ],
)
def test_what_is_not_certain_is_left_to_python(proc: Proc, said: bytes) -> None:
    assert proc.look(said) is None


def test_a_status_that_cannot_be_read_is_left_to_python(proc: Proc) -> None:
    for pid in (PID, PID + 1, 0, -1, 2**31 - 1):
        assert _rights.look(pid, proc.fd, OUR_MAP) is None
    proc.look(status(caps="0000000000000001"))
    (proc.path / "uid_map").unlink()
    assert _rights.look(PID, proc.fd, OUR_MAP) is None


@pytest.mark.parametrize(
    ("code", "is_no_more"),
    [
        (errno.ENOENT, True),
        (errno.ESRCH, True),
        (errno.EMFILE, False),
        (errno.ENFILE, False),
        (errno.ENOMEM, False),
        (errno.EACCES, False),
    ],
)
def test_who_cannot_be_looked_at_is_not_taken_for_one_being_killed(
    proc: Proc, monkeypatch: pytest.MonkeyPatch, code: int, is_no_more: bool
) -> None:
    """Only who is no more is; his request would end with EINTR, though he goes on."""

    def fail(*_: object, **__: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(callers, "_read", fail)
    assert callers.is_being_killed(PID) is is_no_more
    monkeypatch.setattr(callers, "_own", None)  # what is asked first
    (proc.path.parent / "self").symlink_to(str(os.getpid()))
    assert callers.is_being_killed(PID) is False


@pytest.mark.parametrize(("pending", "is_killed"), [("0000000000000100", True), ("4000", False)])
def test_a_pending_kill_is_seen(proc: Proc, pending: str, is_killed: bool) -> None:
    (proc.path / "status").write_text(f"Name:\tcat\nSigPnd:\t{pending}\nCapEff:\t0\n")
    assert callers.is_being_killed(PID) is is_killed


def test_a_forked_process_asks_for_its_own_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have come into another user namespace, or have another number in /proc."""
    monkeypatch.setattr(callers, "_own", b"its parent's")
    assert in_child(callers._own_ids) == Path("/proc/self/uid_map").read_bytes()
    assert callers._own_ids() == b"its parent's"


# Whether a caller may do all that we may


def drop(capability: int) -> None:
    c = capabilities.get_capabilities()
    capabilities.set_capabilities(
        c._replace(effective=c.effective & ~capability, permitted=c.permitted & ~capability)
    )


def enter_namespace() -> None:
    """Be root in a user namespace that knows root only."""
    assert not capabilities.libc.unshare(ctypes.c_int(CLONE_NEWUSER))
    Path("/proc/self/uid_map").write_text("0 0 1\n")


@needs_root
@pytest.mark.parametrize(
    ("become", "may"),
    [
        (int, True),
        (lambda: drop(1 << 40), False),
        (lambda: drop(capabilities.CAP_CHOWN), False),
        (lambda: os.setresuid(1000, 1000, 1000), False),
        (enter_namespace, False),
    ],
    ids=["like us", "less one", "less chown", "user", "namespace"],
)
def test_who_may_all_is_told_from_who_may_less(become: Callable[[], object], may: bool) -> None:
    permitted = capabilities.get_capabilities().permitted
    if not may and become is not enter_namespace and not permitted & 1 << 40:
        pytest.skip("this process may not all itself")

    def ask(pid: int) -> object:
        who = Caller(0, 0, pid=pid)
        found = callers.rights_of(who, permitted)
        told = may_all_that_we_may(who, 0)
        assert not told or not permitted & ~found.capabilities
        return told

    assert look_at(become, ask) is may


@needs_root
def test_nothing_is_told_of_who_is_not_there() -> None:
    for pid in (0, 1 << 30):
        assert not may_all_that_we_may(Caller(0, 0, pid=pid), 0)
    told = Caller(0, 0, pid=os.getpid(), rights=callers.Rights())
    assert not may_all_that_we_may(told, 0)


@needs_root
def test_who_may_less_over_files_than_root_asks_for_groups() -> None:
    """All that this process may is not all over files then."""

    def act() -> None:
        pid = os.getpid()
        assert may_all_that_we_may(Caller(0, 0, pid=pid), 0)
        drop(capabilities.CAP_CHOWN)
        assert not may_all_that_we_may(Caller(0, 0, pid=pid), 0)

    in_child(act)


@needs_root
def test_what_is_to_be_raised_is_not_there_yet() -> None:
    """As after `settle`; nothing is raised where it is not permitted."""

    def ask(pid: int) -> None:
        who = Caller(0, 0, pid=pid)
        capabilities.settle()
        assert may_all_that_we_may(who, 0)
        assert not may_all_that_we_may(who, FSETID)
        with acting_as(who, bits=True):
            assert may_all_that_we_may(who, FSETID)

    in_child(look_at, int, ask)


@needs_root
@pytest.mark.parametrize("own", [[], [77], list(range(1000, 1400))], ids=len)
@pytest.mark.parametrize("theirs", [[], [77], [7, 8], list(range(2000, 2400))], ids=len)
def test_any_number_of_groups_is_taken_on_and_given_back(own: list[int], theirs: list[int]) -> None:
    """Both ways."""

    def act() -> None:
        os.setgroups(own)
        assert credentials._CompiledActing is not None
        for way in (credentials._CompiledActing, None):
            credentials._CompiledActing = way
            rights = callers.Rights(frozenset(theirs))
            with acting_as(Caller(5, 6), rights=rights):
                assert set(os.getgroups()) == set(theirs)
                assert capabilities.get_capabilities().effective == 0
            assert sorted(os.getgroups()) == own

    in_child(act)
