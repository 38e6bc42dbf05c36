"""FUSE callbacks as sequences of 9P messages (ninefuse/fuse/callbacks.py)."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers_executor import answer
from ops_helpers import (
    ILLEGAL_NAMES,
    ROOT,
    UNKNOWN_NODEID,
    Client,
    Stepper,
    client_of,
    fails,
    module_of,
    need_attributes,
)
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.calls import Body
from ninefuse.executor import create
from ninefuse.fuse import callbacks, changes
from ninefuse.linux.callers import Caller
from ninefuse.linux.syscalls import Attributes
from ninefuse.ops import Changes
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid

pytestmark = pytest.mark.usefixtures("leak_free")

ME = Caller(os.geteuid(), os.getegid())


@pytest.fixture
def tree(client: Client) -> Client:
    """A file, a directory with a file in it, a symlink."""
    (client.source / "file").write_bytes(b"data")
    (client.source / "d").mkdir()
    (client.source / "d" / "inner").write_bytes(b"inner")
    (client.source / "link").symlink_to("file")
    return client


def fids(client: Client) -> set[int]:
    return set(client.session.fids._fids)


# Whose attributes change

Changers = dict[str, Callable[[Session, int, int, int], Body[Any]]]
CHANGERS: Changers = {
    "mkdir": lambda s, d, e, f: callbacks.mkdir(s, d, b"new", 0o755, ME),
    "mknod": lambda s, d, e, f: callbacks.mknod(s, d, b"new", 0o100644, 0, ME),
    "symlink": lambda s, d, e, f: callbacks.symlink(s, d, b"new", b"target", ME),
    "create": lambda s, d, e, f: callbacks.create(s, d, b"new", os.O_RDWR, 0o644, ME),
    "unlink": lambda s, d, e, f: callbacks.unlink(s, d, b"inner", ME),
    "rename": lambda s, d, e, f: callbacks.rename(s, d, b"inner", e, b"new", 0, ME),
    "rename in place": lambda s, d, e, f: callbacks.rename(s, d, b"inner", d, b"new", 0, ME),
    "link": lambda s, d, e, f: callbacks.link(s, f, d, b"new", ME),
    "setxattr": lambda s, d, e, f: callbacks.setxattr(s, f, b"user.name", b"value", ME),
    "removexattr": lambda s, d, e, f: callbacks.removexattr(s, f, b"user.old", ME),
}
AGAIN = {  # what they fail with the second time
    **dict.fromkeys(("mkdir", "mknod", "symlink", "link"), errno.EEXIST),
    **dict.fromkeys(("unlink", "rename", "rename in place"), errno.ENOENT),
    "create": errno.ESTALE,
    "removexattr": errno.ENODATA,
}
CHANGED = {"rename": "de", "link": "df", "setxattr": "f", "removexattr": "f"}


@pytest.mark.parametrize("changer", CHANGERS)
def test_the_client_is_told_whose_attributes_change(tree: Client, changer: str) -> None:
    """Those that the call is about; nobody's where it fails."""
    need_attributes(tree.source)
    os.setxattr(tree.source / "file", "user.old", b"value")
    (tree.source / "e").mkdir()
    names = ("d", "e", "file")
    d, e, f = (tree.do(callbacks.lookup, ROOT, name.encode())[0].number for name in names)
    told: list[int] = []
    tree.session.attributes_changed = told.append
    change = CHANGERS[changer]
    tree.do(change, d, e, f)
    numbers = {"d": d, "e": e, "f": f}
    assert told == [numbers[one] for one in CHANGED.get(changer, "d")]
    if changer in AGAIN:
        told.clear()
        with fails(AGAIN[changer]):
            tree.do(change, d, e, f)
        assert not told


@pytest.mark.parametrize("waits", [False, True])
def test_the_client_is_told_to_look_at_a_file_again_that_is_locked(
    tree: Client, waits: bool
) -> None:
    """Before it is told of the lock; not when that is given back, or not to be had."""
    fid, _ = tree.do(callbacks.lookup, ROOT, b"file")
    handle = tree.do(callbacks.open, fid.number, os.O_RDWR).number
    told: list[int] = []
    tree.session.attributes_changed = told.append
    lock, unlock = (ops.LockRange(kind, 0, 0, 7) for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK))
    tree.do(callbacks.setlk, handle, 1, lock, waits)
    tree.do(callbacks.flock, handle, fcntl.LOCK_SH, waits)
    assert told == [fid.number] * 2
    with fails(errno.EAGAIN):
        tree.do(callbacks.setlk, handle, 2, lock, False)
    tree.do(callbacks.setlk, handle, 1, unlock, waits)
    tree.do(callbacks.flock, handle, fcntl.LOCK_UN, waits)
    assert told == [fid.number] * 2
    tree.do(ops.clunk, handle)


def test_the_client_is_told_once_of_set_id_bits_that_may_be_gone(tree: Client) -> None:
    fid, _ = tree.do(callbacks.lookup, ROOT, b"file")
    handle = tree.do(callbacks.open, fid.number, os.O_WRONLY).number
    told: list[int] = []
    tree.session.attributes_changed = told.append
    tree.do(callbacks.write, handle, 0, b"x")
    tree.session.fids.set_id.add(fid.number)
    for _ in range(2):
        assert tree.do(callbacks.write, handle, 0, b"x") == 1
        assert told == [fid.number]
    tree.session.fids.set_id.add(fid.number)
    tree.do(callbacks.forget, [(fid.number, 1)])
    assert not tree.session.fids.set_id
    tree.do(ops.clunk, handle)


# lookup and forget


def test_lookup_answers_fid_and_attributes(tree: Client) -> None:
    """The lookup is counted; the same file is the same fid."""
    fid, a = tree.do(callbacks.lookup, ROOT, b"file")
    assert (a.size, fid.lookups) == (4, 1)
    assert fid.number == a.ino
    again, _ = tree.do(callbacks.lookup, ROOT, b"file")
    assert again is fid
    assert fid.lookups == 2
    tree.do(callbacks.forget, [(fid.number, 2)])
    assert fids(tree) == {ROOT}


def test_lookups_that_fail_count_nothing(tree: Client) -> None:
    """Nothing there, no name, no directory, no such parent."""
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    for parent, name, code in (
        (ROOT, b"none", errno.ENOENT),
        (ROOT, b"x" * 256, errno.ENAMETOOLONG),
        (file.number, b"x", errno.ENOTDIR),
        (UNKNOWN_NODEID, b"file", errno.ESTALE),
        *((ROOT, name, errno.ENOENT) for name in ILLEGAL_NAMES),
    ):
        with fails(code):
            tree.do(callbacks.lookup, parent, name)
    assert fids(tree) == {ROOT, file.number}
    assert file.lookups == 1


def test_of_many_forgets_most_are_left_for_later(
    tree: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says tens of thousands at once, when a directory goes; others wait meanwhile."""
    numbers = []
    for number in range(10):
        (tree.source / f"many{number}").touch()
        numbers.append(tree.do(callbacks.lookup, ROOT, b"many%d" % number)[0].number)
    left: list[Callable[[], object]] = []
    monkeypatch.setattr(callbacks, "_AT_ONCE", 4)
    monkeypatch.setattr(tree.session, "defer", lambda *call: left.append(partial(*call)))
    assert tree.do(callbacks.forget, [(number, 1) for number in numbers]) == 4
    assert fids(tree) == {ROOT, *numbers[4:]}
    for call in left:
        call()
    assert fids(tree) == {ROOT}


def test_a_forget_is_never_an_error(tree: Client) -> None:
    """Unknown numbers and too many lookups are passed over, the others are not."""
    fid, _ = tree.do(callbacks.lookup, ROOT, b"file")
    tree.do(callbacks.forget, [(UNKNOWN_NODEID, 1), (ROOT, 1), (fid.number, 10**12)])
    assert fids(tree) == {ROOT}
    assert tree.session.fids.descriptors == 1


# Making things

MAKERS: dict[str, Callable[[Session, int, bytes], Body[tuple[Fid, Attributes]]]] = {
    "mkdir": lambda s, parent, name: callbacks.mkdir(s, parent, name, 0o40751, ME),
    "mknod": lambda s, parent, name: callbacks.mknod(s, parent, name, 0o100751, 0, ME),
    "symlink": lambda s, parent, name: callbacks.symlink(s, parent, name, b"target", ME),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_was_made_is_looked_up(tree: Client, maker: str) -> None:
    """One lookup, and the attributes of the new file."""
    parent, _ = tree.do(callbacks.lookup, ROOT, b"d")
    before = fids(tree)
    fid, a = tree.do(MAKERS[maker], parent.number, b"new")
    assert fids(tree) - before == {fid.number}
    assert fid.lookups == 1
    found = (tree.source / "d" / "new").lstat()
    assert (a.ino, a.mode) == (found.st_ino, found.st_mode)
    if maker != "symlink":
        assert stat.S_IMODE(a.mode) == 0o751
    with fails(errno.EEXIST):
        tree.do(MAKERS[maker], parent.number, b"new")
    assert fid.lookups == 1


def test_a_link_is_a_lookup_of_the_file(tree: Client) -> None:
    """By the file's own fid, not by the new name; its attributes tell of two links."""
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    fid, a = tree.do(callbacks.link, file.number, ROOT, b"new")
    assert fid is file
    assert (fid.lookups, a.nlink) == (2, 2)
    with fails(errno.EEXIST):
        tree.do(callbacks.link, file.number, ROOT, b"d")
    assert fid.lookups == 2


# Opening


def test_open_answers_a_handle_of_its_own(tree: Client) -> None:
    """Above all nodeids; each open has another, and clunk ends it."""
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    first = tree.do(callbacks.open, file.number, os.O_RDONLY).number
    second = tree.do(callbacks.open, file.number, os.O_RDWR | os.O_TRUNC).number
    assert FIRST_HANDLE <= first < second
    assert tree.do(ops.getattr, file.number).size == 0
    assert tree.do(ops.write, second, 0, b"new") == 3
    assert tree.do(ops.read, first, 0, 9) == b"new"
    for handle in (first, second):
        tree.do(callbacks.flush, handle)
        tree.do(ops.clunk, handle)
    assert fids(tree) == {ROOT, file.number}
    assert file.opened is None


def test_an_open_that_fails_leaves_no_fid(tree: Client) -> None:
    """The clone goes with it."""
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    link, _ = tree.do(callbacks.lookup, ROOT, b"link")
    before = fids(tree)
    for nodeid, flags, code in (
        (file.number, os.O_DIRECTORY, errno.ENOTDIR),
        (link.number, os.O_RDONLY, errno.ENXIO),
        (ROOT, os.O_RDWR, errno.EISDIR),
        (UNKNOWN_NODEID, os.O_RDONLY, errno.ESTALE),
    ):
        with fails(code):
            tree.do(callbacks.open, nodeid, flags)
        assert fids(tree) == before


def test_create_answers_handle_fid_and_attributes(tree: Client) -> None:
    """The open file, a lookup of it, exactly the mode asked for."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    handle, fid, a = tree.do(callbacks.create, ROOT, b"new", flags, 0o100640, ME)
    assert (fid.lookups, a.size, stat.S_IMODE(a.mode)) == (1, 0, 0o640)
    assert a.ino == (tree.source / "new").stat().st_ino
    assert tree.do(ops.write, handle.number, 0, b"x") == 1
    assert tree.do(callbacks.lookup, ROOT, b"new")[0] is fid
    tree.do(ops.clunk, handle.number)
    assert tree.do(ops.getattr, fid.number).size == 1


def test_a_create_is_about_the_file_made(tree: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever replaces its name meanwhile is not taken for it."""
    module = module_of(ops.lcreate)
    real = module._create_file

    def replaced(*args: Any) -> int:
        fd: int = real(*args)
        (tree.source / "new").unlink()
        (tree.source / "new").mkdir()
        return fd

    monkeypatch.setattr(module, "_create_file", replaced)
    handle, fid, a = tree.do(callbacks.create, ROOT, b"new", os.O_RDWR, 0o600, ME)
    assert (stat.S_IFMT(a.mode), a.nlink) == (stat.S_IFREG, 0)
    assert tree.do(ops.write, handle.number, 0, b"x") == 1
    assert tree.do(ops.getattr, fid.number).size == 1


def test_a_create_that_fails_leaves_no_fid(tree: Client) -> None:
    """Taken (ESTALE makes the kernel look again), no directory, no name."""
    before = fids(tree)
    for parent, name, flags, code in (
        (ROOT, b"file", os.O_RDWR, errno.ESTALE),
        (ROOT, b"file", os.O_RDWR | os.O_EXCL, errno.EEXIST),
        (ROOT, b"x" * 256, os.O_RDWR, errno.ENAMETOOLONG),
        (UNKNOWN_NODEID, b"new", os.O_RDWR, errno.ESTALE),
    ):
        with fails(code):
            tree.do(callbacks.create, parent, name, flags, 0o600, ME)
        assert fids(tree) == before
    assert (tree.source / "file").read_bytes() == b"data"


# Attributes


def test_setattr_answers_the_new_attributes(tree: Client) -> None:
    """With a handle it is the open file that is changed."""
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    handle = tree.do(callbacks.open, file.number, os.O_RDWR).number
    assert tree.do(callbacks.setattr, file.number, None, Changes(mode=0o600)).mode & 0o777 == 0o600
    assert tree.do(callbacks.setattr, file.number, handle, Changes(size=2)).size == 2
    tree.do(ops.unlinkat, ROOT, b"file")
    a = tree.do(callbacks.setattr, file.number, handle, Changes(size=1, mtime=7))
    assert (a.size, a.mtime_ns, a.nlink) == (1, 7, 0)
    tree.do(ops.clunk, handle)
    with fails(errno.EBADF):
        tree.do(callbacks.setattr, file.number, handle, Changes(size=0))


# Extended attributes


def test_extended_attributes_through_fids_of_their_own(tree: Client) -> None:
    """Set, read, listed and removed; empty and large values; no fid is left."""
    need_attributes(tree.source)
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    before = fids(tree)
    for value in (b"", b"x", bytes(range(256)) * 4):
        tree.do(callbacks.setxattr, file.number, b"user.x", value)
        assert tree.do(callbacks.getxattr, file.number, b"user.x") == value
    tree.do(callbacks.setxattr, file.number, b"user.y", b"y")
    assert sorted(tree.do(callbacks.listxattr, file.number)) == [b"user.x", b"user.y"]
    for name in (b"user.x", b"user.y"):
        tree.do(callbacks.removexattr, file.number, name)
    assert tree.do(callbacks.listxattr, file.number) == []
    assert fids(tree) == before


CAPABILITY = b"security.capability"
A_CAPABILITY = bytes.fromhex("0000000200040000000000000000000000000000")


def need_capabilities(path: Path) -> None:
    try:
        os.setxattr(path, CAPABILITY, A_CAPABILITY)
    except PermissionError:
        pytest.skip("only root may set security.capability")
    os.removexattr(path, CAPABILITY)


def test_that_a_file_has_no_capability_is_believed_for_a_time(source: Path) -> None:
    """As long as attributes are; of what is set through the mount it is known at once."""
    need_attributes(source)
    (source / "file").write_bytes(b"")
    need_capabilities(source / "file")
    with client_of(source, attr_timeout=3600.0) as tree:
        file, _ = tree.do(callbacks.lookup, ROOT, b"file")

        def asked() -> bytes:
            return tree.do(callbacks.getxattr, file.number, CAPABILITY)

        for _ in range(2):
            with fails(errno.ENODATA):
                asked()
        os.setxattr(source / "file", CAPABILITY, A_CAPABILITY)
        with fails(errno.ENODATA):
            asked()
        tree.do(callbacks.setxattr, file.number, CAPABILITY, A_CAPABILITY)
        assert asked() == A_CAPABILITY
        tree.do(callbacks.removexattr, file.number, CAPABILITY)
        with fails(errno.ENODATA):
            asked()
        file.node.with_rare.bare_until = time.monotonic() - 0.001  # the time is over
        os.setxattr(source / "file", CAPABILITY, A_CAPABILITY)
        assert asked() == A_CAPABILITY
        with fails(errno.ENODATA):
            tree.do(callbacks.getxattr, file.number, b"user.none")
        tree.do(callbacks.forget, [(file.number, 1)])


def test_without_a_timeout_the_capability_is_asked_for_each_time(tree: Client) -> None:
    need_attributes(tree.source)
    need_capabilities(tree.source / "file")
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    with fails(errno.ENODATA):
        tree.do(callbacks.getxattr, file.number, CAPABILITY)
    os.setxattr(tree.source / "file", CAPABILITY, A_CAPABILITY)
    assert tree.do(callbacks.getxattr, file.number, CAPABILITY) == A_CAPABILITY


def test_a_capability_that_is_set_while_one_is_asked_for_is_not_forgotten(source: Path) -> None:
    """The one who asked has the old answer, and must not have it believed."""
    need_attributes(source)
    (source / "file").write_bytes(b"")
    need_capabilities(source / "file")
    with client_of(source, attr_timeout=3600.0) as tree:
        file, _ = tree.do(callbacks.lookup, ROOT, b"file")
        asking = Stepper(callbacks.getxattr(tree.session, file.number, CAPABILITY))
        asking.after("_getxattr")
        tree.do(callbacks.setxattr, file.number, CAPABILITY, A_CAPABILITY)
        with fails(errno.ENODATA):
            asking.finish()
        assert tree.do(callbacks.getxattr, file.number, CAPABILITY) == A_CAPABILITY
        tree.do(callbacks.forget, [(file.number, 1)])


def test_extended_attributes_that_fail_leave_no_fid(tree: Client) -> None:
    """None there, too large, no namespace, no name, no such file."""
    need_attributes(tree.source)
    file, _ = tree.do(callbacks.lookup, ROOT, b"file")
    before = fids(tree)
    number = file.number
    with fails(errno.ENODATA):
        tree.do(callbacks.getxattr, number, b"user.none")
    with fails(errno.ENODATA):
        tree.do(callbacks.removexattr, number, b"user.none")
    with fails(errno.E2BIG):
        tree.do(callbacks.setxattr, number, b"user.x", bytes(65537))
    with fails(errno.EOPNOTSUPP):
        tree.do(callbacks.setxattr, number, b"no-namespace", b"x")
    with fails(errno.EINVAL):
        tree.do(callbacks.setxattr, number, b"", b"x")
    with fails(errno.EINVAL):
        tree.do(callbacks.removexattr, number, b"")
    for sequence in (callbacks.getxattr, callbacks.removexattr):
        with fails(errno.ESTALE):
            tree.do(sequence, UNKNOWN_NODEID, b"user.x")
    with fails(errno.ESTALE):
        tree.do(callbacks.setxattr, UNKNOWN_NODEID, b"user.x", b"x")
    with fails(errno.ESTALE):
        tree.do(callbacks.listxattr, UNKNOWN_NODEID)
    assert fids(tree) == before


@pytest.mark.parametrize("remove", [False, True])
def test_extended_attributes_of_a_read_only_session(source: Path, remove: bool) -> None:
    """EROFS, and no fid is left."""
    (source / "file").touch()
    with client_of(source, read_only=True) as client:
        file, _ = client.do(callbacks.lookup, ROOT, b"file")
        with fails(errno.EROFS):
            if remove:
                client.do(callbacks.removexattr, file.number, b"user.x")
            else:
                client.do(callbacks.setxattr, file.number, b"user.x", b"x")
        assert fids(client) == {ROOT, file.number}


# All at once


@pytest.mark.parametrize(("model", "threads"), [("first", 3), ("second", 1), ("second", 4)])
def test_a_storm_of_callbacks_leaves_nothing(
    leak_free: None, source: Path, model: str, threads: int
) -> None:
    """Many clients on few names: only OSErrors, and every fid and descriptor goes in the end."""
    (source / "d").mkdir()
    executor = create(model, threads)
    session = Session(executor, most_descriptors=16)
    table = session.fids
    errnos = set()

    async def run(body: Body[Any]) -> Any:
        try:
            return await answer(executor, "storm", body)
        except OSError as failure:
            errnos.add(failure.errno)
            return None

    async def forget(fid: Fid) -> None:
        await run(callbacks.forget(session, [(fid.number, 1)]))

    async def one(chance: random.Random, parents: list[int]) -> None:
        for _ in range(60):
            parent, other = chance.choice(parents), chance.choice(parents)
            name, new = (b"%d" % chance.randrange(4) for _ in range(2))
            what = chance.randrange(7)
            if what == 0:
                flags = os.O_RDWR | chance.choice([0, os.O_EXCL])
                made = await run(callbacks.create(session, parent, name, flags, 0o600, ME))
                if made is not None:
                    assert await run(ops.write(session, made[0].number, 0, b"data")) == 4
                    await run(ops.clunk(session, made[0].number))
                    await forget(made[1])
            elif what == 1:
                found = await run(callbacks.lookup(session, parent, name))
                if found is not None:
                    handle = await run(callbacks.open(session, found[0].number, os.O_RDONLY))
                    if handle is not None:
                        await run(ops.read(session, handle.number, 0, 10))
                        await run(ops.clunk(session, handle.number))
                    await forget(found[0])
            elif what == 2:
                flags = chance.choice([0, 0, 1, 2])
                await run(ops.renameat(session, parent, name, other, new, flags))
            elif what == 3:
                await run(ops.unlinkat(session, parent, name, chance.choice([0, 0, 0x200])))
            elif what == 4:
                made = await run(callbacks.mkdir(session, parent, name, 0o700, ME))
                if made is not None:
                    await forget(made[0])
            elif what == 5:
                found = await run(callbacks.lookup(session, parent, name))
                if found is not None:
                    linked = await run(callbacks.link(session, found[0].number, other, new))
                    if linked is not None:
                        await forget(linked[0])
                    await forget(found[0])
            else:
                handle = await run(callbacks.opendir(session, parent))
                offset = 0
                while entries := await run(callbacks.readdirplus(session, handle, offset)):
                    offset = entries[-1].offset
                    for entry in entries:
                        if entry.fid is not None:
                            await run(ops.getattr(session, entry.fid.number))
                            await forget(entry.fid)
                await run(ops.clunk(session, handle))

    async def storm() -> None:
        await answer(executor, "attach", ops.attach(session, ROOT, str(source)))
        d, _ = await answer(executor, "lookup", callbacks.lookup(session, ROOT, b"d"))
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(one, random.Random(number), [ROOT, d.number])
        await forget(d)

    try:
        trio.run(storm)
    finally:
        executor.close()
    assert set(table._fids) == {ROOT}
    assert executor.requests == {}
    assert table._fids[ROOT].refs == 1
    assert session.rename_lock.statistics()[:3] == (0, False, 0)
    expected = {errno.ENOENT, errno.EEXIST, errno.ESTALE, errno.EISDIR, errno.ENOTDIR}
    assert errnos & expected
    assert errnos <= expected | {errno.ENOTEMPTY, errno.EINVAL, errno.EPERM, errno.ENXIO}
    table.clear()
    executor.deferred.make_all()
    assert table.descriptors == 0


@pytest.mark.parametrize("refusals", [1, 3, 100])
def test_a_write_is_not_refused_because_another_took_the_set_id_bits_just_before(
    tree: Client, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """The kernel asks for a change time then, and was refused while there were bits."""
    tried: list[None] = []

    async def refused(*args: Any) -> None:
        tried.append(None)
        if len(tried) <= refusals:
            raise PermissionError(errno.EPERM, "not the owner")
        await change(*args)

    change = ops.setattr
    found, _ = tree.run(callbacks.lookup(tree.session, ROOT, b"file"))
    monkeypatch.setattr(ops, "setattr", refused)
    asked = callbacks.setattr(tree.session, found.number, None, Changes(), ME, says_all=True)
    if refusals < 4:
        assert tree.run(asked).mode & 0o777
    else:
        with fails(errno.EPERM):
            tree.run(asked)


@pytest.fixture
def not_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for attributes to be changed may not change them."""

    async def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not the owner")

    monkeypatch.setattr(ops, "setattr", refused)


@pytest.mark.usefixtures("not_owner")
@pytest.mark.parametrize(
    ("mode", "asked"),
    [(0o6775, 0o775), (0o4766, 0o766), (0o2775, 0o775), (0o6766, 0o2766)],
)
def test_before_a_write_the_kernel_takes_set_id_bits_in_anybody_s_name(
    tree: Client, mode: int, asked: int
) -> None:
    """Those that the write would cost the file: not a set-group-id bit that is but a mark."""
    path = tree.source / "file"
    found, _ = tree.do(callbacks.lookup, ROOT, b"file")
    path.chmod(mode)
    for other in (asked ^ 0o100, asked & 0o777 ^ 0o20, mode & 0o700):
        with fails(errno.EPERM):
            tree.do(callbacks.setattr, found.number, None, Changes(mode=other), ME)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    tree.do(callbacks.setattr, found.number, None, Changes(mode=asked), ME)
    assert stat.S_IMODE(path.stat().st_mode) == asked


@pytest.mark.usefixtures("not_owner")
def test_a_mode_that_the_owner_sets_meanwhile_is_not_undone(
    tree: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel asks for set-id bits to go, by the mode that the file had before."""
    path = tree.source / "file"
    found, _ = tree.do(callbacks.lookup, ROOT, b"file")
    path.chmod(0o6777)

    def closes(caller: Caller, fd: int) -> bool:
        path.chmod(0o4700)
        return True

    monkeypatch.setattr(changes, "_may_write_as", closes)
    tree.do(callbacks.setattr, found.number, None, Changes(mode=0o777), ME)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
