"""As whom the requests of clients are made, by a server of root; and who may connect.

The users are numbers that this machine has no names for, but where one is named.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from client9p import LIMIT, ROOT, Client, Served, served
from mounting import Child, errno_of, wait_until
from ops_helpers import fails, need_attributes, needs_root

from ninefuse.linux.callers import Caller, Rights, rights_of
from ninefuse.wire import server as server_module
from ninefuse.wire.listening import Address
from ninefuse.wire.messages import NOFID, NONUNAME, NOTAG
from ninefuse.wire.users import NOBODY, Peer, Users, peer_of

pytestmark = needs_root

BASIC = 0x7FF
ONE, OTHER = 31001, 31002  # user ids


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What is whose, and for whom, says its name."""
    source = tmp_path / "source"
    source.mkdir()
    for name, uid, mode in (
        ("roots", 0, 0o600),
        ("for-all", 0, 0o666),
        ("ones", ONE, 0o600),
        ("others", OTHER, 0o644),
    ):
        (source / name).write_bytes(name.encode())
        (source / name).chmod(mode)
        os.chown(source / name, uid, uid)
    for name, uid, mode in (
        ("ones-dir", ONE, 0o700),
        ("roots-dir", 0, 0o700),
        ("listed", 0, 0o744),
        ("sticky", 0, 0o1777),
    ):
        (source / name).mkdir()
        (source / name).chmod(mode)
        (source / name / "in").write_bytes(b"in")
        (source / name / "in").chmod(0o666)
        os.chown(source / name, uid, uid)
    return source


@pytest.fixture(params=["none", "first", "second"])
def server(request: pytest.FixtureRequest, source: Path) -> Iterator[Served]:
    with served(source, model=request.param, users=Users()) as it:
        yield it


def attached(server: Served, n_uname: int, uname: bytes = b"") -> Client:
    client = server.client(starts=False)
    try:
        client.msize, _ = client.call("Tversion", 8192, b"9P2000.L", tag=NOTAG)
        client.call("Tattach", ROOT, NOFID, uname, b"", n_uname)
    except BaseException:
        client.socket.close()
        raise
    return client


@pytest.fixture
def one(server: Served) -> Iterator[Client]:
    """A client of user ONE's."""
    with attached(server, ONE) as client:
        yield client


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


# What a user may do


def test_files_are_opened_as_the_user(one: Client, source: Path) -> None:
    one.open(1, b"ones", flags=2)
    assert one.call("Tread", 1, 0, 9) == (b"ones",)
    one.open(2, b"for-all", flags=2)
    one.open(3, b"others")
    for fid, name, flags in ((4, b"roots", 0), (5, b"others", 1), (6, b"others", 0o1000)):
        one.walk(fid, name)
        with fails(errno.EACCES):
            one.call("Tlopen", fid, flags)
    one.walk(7)
    with fails(errno.EACCES):
        one.call("Tlcreate", 7, b"roots", 0, 0, NONUNAME)
    assert (source / "others").read_bytes() == b"others"


def test_directories_are_searched_as_the_user(one: Client) -> None:
    one.walk(1, b"ones-dir", b"in")
    for name in (b"roots-dir", b"listed"):
        for names in ((name, b"in"), (name, b"none"), (name, b".."), (name, b".")):
            assert len(one.call("Twalk", ROOT, 2, names)[0]) == 1
        one.walk(3, name)
        for below in (b"in", b"none", b".."):
            with fails(errno.EACCES):
                one.call("Twalk", 3, 2, (below,))
        one.clunk(3)
    one.walk(4, b"roots-dir")
    with fails(errno.EACCES):
        one.call("Tlopen", 4, 0)
    one.open(5, b"listed")  # it may be listed, not searched


def test_a_walk_goes_no_further_than_a_user_may_whoever_has_been_there(
    server: Served, one: Client
) -> None:
    """The nodes are shared, the right to search is not."""
    with attached(server, OTHER) as other:
        one.walk(1, b"ones-dir", b"in")
        assert len(other.call("Twalk", ROOT, 1, (b"ones-dir", b"in"))[0]) == 1


def test_what_is_made_is_the_users(one: Client, source: Path) -> None:
    below = source / "sticky"
    one.walk(1, b"sticky")
    one.call("Tmkdir", 1, b"dir", 0o755, NONUNAME)
    one.call("Tsymlink", 1, b"sym", b"x", NONUNAME)
    one.call("Tmknod", 1, b"pipe", stat.S_IFIFO | 0o600, 0, 0, NONUNAME)
    one.walk(2, b"sticky")
    one.call("Tlcreate", 2, b"file", 2, 0o644, NONUNAME)
    for name in ("dir", "sym", "pipe", "file"):
        assert owner(below / name) == (ONE, NOBODY)
    with fails(errno.EPERM):
        one.call("Tmknod", 1, b"dev", stat.S_IFCHR | 0o600, 1, 3, NONUNAME)
    for message, *values in (
        ("Tmkdir", ROOT, b"x", 0o755, NONUNAME),
        ("Tsymlink", ROOT, b"x", b"y", NONUNAME),
        ("Tmknod", ROOT, b"x", stat.S_IFIFO | 0o600, 0, 0, NONUNAME),
    ):
        with fails(errno.EACCES):
            one.call(str(message), *values)


def test_names_are_moved_and_removed_as_the_user(one: Client, source: Path) -> None:
    for fid, name in ((1, b"others"), (2, b"ones"), (3, b"for-all")):
        one.walk(fid, name)
    one.walk(9, b"sticky")
    for message, *values in (
        ("Tunlinkat", ROOT, b"ones", 0),
        ("Trename", 2, 9, b"x"),
        ("Trename", 2, NOFID, b"x"),
        ("Trenameat", ROOT, b"ones", 9, b"x"),
        ("Tremove", 2),
        ("Tlink", ROOT, 3, b"x"),
    ):
        with fails(errno.EACCES):
            one.call(str(message), *values)
    for message, *values in (
        ("Tunlinkat", 9, b"in", 0),  # somebody else's, in a sticky directory
        ("Trenameat", 9, b"in", 9, b"x"),
    ):
        with fails(errno.EPERM):
            one.call(str(message), *values)
    one.walk(4, b"ones-dir", b"in")
    one.walk(5, b"ones-dir")
    one.call("Trename", 4, 5, b"moved")
    one.call("Tremove", 4)
    assert os.listdir(source / "ones-dir") == []


def test_attributes_are_changed_as_the_user(one: Client, source: Path) -> None:
    nothing = (0,) * 4
    for fid, name in ((1, b"ones"), (2, b"others"), (3, b"for-all")):
        one.walk(fid, name)
    one.call("Tsetattr", 1, 1, 0o640, 0, 0, 0, *nothing)
    assert stat.S_IMODE((source / "ones").stat().st_mode) == 0o640
    for fid in (2, 3):
        with fails(errno.EPERM):
            one.call("Tsetattr", fid, 1, 0o666, 0, 0, 0, *nothing)
        with fails(errno.EPERM):
            one.call("Tsetattr", fid, 2, 0, ONE, 0, 0, *nothing)
        with fails(errno.EPERM):
            one.call("Tsetattr", fid, 0x20 | 0x100, 0, 0, 0, 0, 0, 0, 5, 5)
    with fails(errno.EPERM):
        one.call("Tsetattr", 1, 2, 0, OTHER, 0, 0, *nothing)
    with fails(errno.EACCES):
        one.call("Tsetattr", 2, 8, 0, 0, 0, 1, *nothing)
    with fails(errno.EACCES):
        one.call("Tsetattr", 2, 0x10 | 0x20, 0, 0, 0, 0, *nothing)
    # Who may write may do these, as truncate(2) and utime(2) with no times.
    one.call("Tsetattr", 3, 8 | 0x20, 0, 0, 0, 1, *nothing)
    one.call("Tsetattr", 3, 0x10 | 0x20, 0, 0, 0, 0, *nothing)


def test_extended_attributes_are_used_as_the_user(one: Client, source: Path) -> None:
    need_attributes(source)
    for path in (source / "roots", source / "others", source / "ones"):
        os.setxattr(path, "user.a", b"1")
        os.setxattr(path, "trusted.a", b"1")
    for fid, name in ((1, b"ones"), (2, b"others"), (3, b"roots")):
        one.walk(fid, name)
    assert one.call("Txattrwalk", 1, 9, b"user.a") == (1,)
    one.clunk(9)
    assert one.call("Txattrwalk", 2, 9, b"user.a") == (1,)
    one.clunk(9)
    with fails(errno.EACCES):
        one.call("Txattrwalk", 3, 9, b"user.a")
    with fails(errno.ENODATA):  # root's alone
        one.call("Txattrwalk", 1, 9, b"trusted.a")
    (size,) = one.call("Txattrwalk", 1, 9, b"")
    assert b"trusted.a" not in one.call("Tread", 9, 0, size)[0]
    for fid, name, code in (
        (2, b"user.a", errno.EACCES),
        (1, b"trusted.a", errno.EPERM),
        (1, b"security.x", errno.EPERM),
    ):
        one.call("Twalk", fid, 8, ())
        one.call("Txattrcreate", 8, name, 1, 0)
        one.call("Twrite", 8, 0, b"2")
        with fails(code):
            one.clunk(8)


def test_a_write_takes_set_id_bits_away(one: Client, source: Path) -> None:
    (source / "for-all").chmod(0o6777)
    one.open(1, b"for-all", flags=1)
    one.call("Twrite", 1, 0, b"x")
    assert stat.S_IMODE((source / "for-all").stat().st_mode) == 0o777


def test_set_id_bits_that_the_source_does_not_honour(source: Path) -> None:
    """Nor does whoever mounts it."""
    words = ("mount", "-t", "tmpfs", "-o", "nosuid", "tmpfs", str(source / "sticky"))
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        for path in (source / "sticky" / "tool", source / "for-all"):
            path.touch()
            path.chmod(0o6755)
        with served(source, users=Users()) as server, attached(server, ONE) as c:
            for names, mode in (((b"sticky", b"tool"), 0o755), ((b"for-all",), 0o6755)):
                c.walk(1, *names)
                assert stat.S_IMODE(c.call("Tgetattr", 1, BASIC)[2]) == mode
                c.clunk(1)
    finally:
        subprocess.run(["umount", "-l", source / "sticky"], check=True)


# As whom one attaches


@pytest.mark.parametrize(
    ("n_uname", "uname"), [(0, b""), (0, b"root"), (NONUNAME, b""), (NONUNAME, b"root")]
)
def test_root_is_nobody(server: Served, source: Path, n_uname: int, uname: bytes) -> None:
    """And so is who does not say who he is."""
    with attached(server, n_uname, uname) as c:
        c.walk(1, b"roots")
        with fails(errno.EACCES):
            c.call("Tlopen", 1, 0)
        c.walk(2, b"sticky")
        for name, gid in ((b"x", NONUNAME), (b"y", 0)):
            c.call("Tmkdir", 2, name, 0o700, gid)
            assert owner(source / "sticky" / os.fsdecode(name)) == (NOBODY, NOBODY)


def test_root_is_root_where_that_was_said(source: Path) -> None:
    with served(source, users=Users(squashes=False)) as server, attached(server, 0) as c:
        c.open(1, b"roots", flags=2)
        c.walk(2, b"ones-dir")
        c.call("Tmkdir", 2, b"dir", 0o700, 0)
        assert owner(source / "ones-dir" / "dir") == (0, 0)
        c.walk(3, b"ones-dir", b"dir")
        c.call("Tsetattr", 3, 2, 0, ONE, 0, 0, *(0,) * 4)
        assert owner(source / "ones-dir" / "dir") == (ONE, 0)


def test_a_name_that_nobody_has(server: Served) -> None:
    with pytest.raises(PermissionError):
        attached(server, NONUNAME, b"no-such-user")


def test_each_attach_has_its_own_user(one: Client, server: Served) -> None:
    """One connection, as Linux has it with access=user; clones keep theirs."""
    one.call("Tattach", 50, NOFID, b"", b"", OTHER)
    one.walk(51, b"others", fid=50)
    one.call("Twalk", 51, 52, ())
    one.call("Tlopen", 52, 2)
    one.walk(1, b"others")
    with fails(errno.EACCES):
        one.call("Tlopen", 1, 2)
    one.walk(53, b"sticky", fid=50)
    one.call("Tlcreate", 53, b"x", 2, 0o600, NONUNAME)


def test_groups(server: Served, source: Path) -> None:
    """Those that this machine knows the user to be in."""
    for name, members in ((g.gr_gid, g.gr_mem) for g in grp.getgrall()):
        for member in members:
            uid = pwd.getpwnam(member).pw_uid
            if uid and name != pwd.getpwuid(uid).pw_gid:
                break
        else:
            continue
        break
    else:
        pytest.skip("no user of this machine is in a further group")
    os.chown(source / "roots", 0, name)
    (source / "roots").chmod(0o640)
    with attached(server, uid) as c, attached(server, ONE) as other:
        c.open(1, b"roots")
        other.walk(1, b"roots")
        with fails(errno.EACCES):
            other.call("Tlopen", 1, 0)


# Groups of what is made


def test_the_group_that_a_client_names(one: Client, source: Path) -> None:
    """It is believed of one who may be any user; root's is not."""
    one.walk(1, b"sticky")
    for name, gid, found in ((b"a", 4242, 4242), (b"b", 0, NOBODY), (b"c", NONUNAME, NOBODY)):
        one.call("Tmkdir", 1, name, 0o700, gid)
        assert owner(source / "sticky" / os.fsdecode(name)) == (ONE, found)
    one.walk(2, b"sticky")
    one.call("Tlcreate", 2, b"d", 2, 0o600, 4242)
    assert owner(source / "sticky" / "d") == (ONE, 4242)


def test_the_group_of_a_directory_that_hands_it_on(one: Client, source: Path) -> None:
    (source / "sticky").chmod(0o3777)
    os.chown(source / "sticky", 0, 4243)
    one.walk(1, b"sticky")
    for name, gid in ((b"a", 4243), (b"b", NONUNAME), (b"c", 4242)):
        one.call("Tmkdir", 1, name, 0o700, gid)
        assert owner(source / "sticky" / os.fsdecode(name)) == (ONE, 4243)


# Who the kernel says that it is


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "peer_of", lambda connected: Peer(ONE, 31))


def test_who_is_known_can_be_nobody_else(peer: None, server: Served, source: Path) -> None:
    for n_uname in (0, OTHER, NOBODY):
        with pytest.raises(PermissionError):
            attached(server, n_uname)
    for n_uname, uname in ((ONE, b""), (NONUNAME, b"root"), (NONUNAME, b"no-such-user")):
        with attached(server, n_uname, uname) as c:
            c.walk(1, b"sticky")
            c.call("Tmkdir", 1, b"x", 0o700, 31)
            assert owner(source / "sticky" / "x") == (ONE, 31)
            c.call("Tunlinkat", 1, b"x", 0x200)
            for gid in (0, 32):
                with fails(errno.EPERM):
                    c.call("Tmkdir", 1, b"y", 0o700, gid)
            # But where the directory hands its own on: Linux's client names that one.
            (source / "sticky").chmod(0o3777)
            os.chown(source / "sticky", 0, 32)
            c.call("Tmkdir", 1, b"z", 0o700, 32)
            assert owner(source / "sticky" / "z") == (ONE, 32)
            c.call("Tunlinkat", 1, b"z", 0x200)
            os.chown(source / "sticky", 0, 0)
            (source / "sticky").chmod(0o1777)


def attaches(path: str) -> list[int]:
    """In a process of user ONE's: the errnos of attaches as another one, and as himself."""
    os.setgroups([])
    os.setresgid(ONE, ONE, ONE)
    os.setresuid(ONE, ONE, ONE)
    with Client.to(Address("unix", path), starts=False) as client:
        client.call("Tversion", 8192, b"9P2000.L", tag=NOTAG)
        attach = partial(errno_of, client.call, "Tattach", 1, NOFID, b"", b"")
        return [attach(OTHER), attach(ONE)]


def test_a_process_of_another_user(server: Served, source: Path) -> None:
    """The kernel's word for it; the socket was opened to all by root."""
    directory = os.open(source.parent, os.O_PATH)  # the ones above are closed to others
    try:
        source.parent.chmod(0o755)
        (source.parent / "socket").chmod(0o666)
        with Child(attaches, f"/proc/self/fd/{directory}/socket") as child:
            assert child.result() == [errno.EPERM, 0]
    finally:
        os.close(directory)


def test_who_may_connect_to_a_server_that_is_not_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: ONE)
    users = Users()
    assert not users.act
    assert [users.may_connect(Peer(uid)) for uid in (ONE, 0, None, OTHER)] == [
        *(True, True, True),
        False,
    ]
    assert users.caller(Peer(ONE), b"root", 0) is None
    monkeypatch.undo()
    assert Users().may_connect(Peer(OTHER))


def test_who_may_not_connect(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Users, "may_connect", lambda self, peer: False)
    with served(source) as server, server.client(starts=False) as c:
        with fails(errno.EPERM):
            c.call("Tversion", 8192, b"9P2000.L", tag=NOTAG)
        assert c.is_hung_up()
    assert "refused: it is user 0's" in caplog.text


def test_a_user_has_half_of_the_connections(source: Path, peer: None) -> None:
    with served(source, users=Users(), max_connections=4) as server:
        first = [attached(server, ONE) for _ in range(2)]
        for _ in range(2):
            with server.client(starts=False) as c, fails(errno.EUSERS):
                c.call("Tversion", 8192, b"9P2000.L", tag=NOTAG)
        first[0].socket.close()
        wait_until(lambda: server.server.connections == 1, "one has gone", LIMIT)
        with attached(server, ONE):
            pass
        first[1].socket.close()


def test_peers() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert peer_of(one) == Peer(os.geteuid(), os.getegid())
    with socket.socket(socket.AF_INET) as tcp:
        assert peer_of(tcp) == Peer(None)
        assert peer_of(tcp).may_be_anybody
    assert Peer(0).may_be_anybody
    assert not Peer(ONE).may_be_anybody


def test_rights_that_are_known_are_not_looked_up() -> None:
    rights = Rights(frozenset((7,)), 0)
    assert rights_of(Caller(0, 0, pid=os.getpid(), rights=rights), -1) is rights
