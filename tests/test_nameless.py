"""Files that are made without a name (O_TMPFILE), and the names that they get."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_systems import mounted
from ops_helpers import ROOT, Client, client_of, fails, needs_root, outcome
from ops_helpers import client as client
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source
from rights import DEFAULT, acl_for
from test_credentials import as_somebody, identity, look_at

from ninefuse import ops
from ninefuse.fuse import callbacks
from ninefuse.linux.callers import Caller
from ninefuse.ops import Changes
from ninefuse.tree.table import Fid

pytestmark = pytest.mark.usefixtures("leak_free")

ME = Caller(os.geteuid(), os.getegid())
SOMEBODY = Caller(12345, 23456)


@pytest.fixture(autouse=True)
def has_them(source: Path) -> None:
    """Skip where the file system of tmp_path has none."""
    try:
        os.close(os.open(source, os.O_TMPFILE | os.O_RDWR))
    except OSError as failure:
        pytest.skip(f"no files without names here: {failure}")


class Nameless:
    """A file without a name that the kernel has open."""

    def __init__(
        self, client: Client, parent: int = ROOT, flags: int = os.O_RDWR, who: Caller = ME
    ) -> None:
        self.client = client
        making = callbacks.tmpfile(client.session, parent, flags, 0o644, who)
        handle, self.fid, self.attributes = client.run(making)
        self.handle = handle.number

    @property
    def fd(self) -> int:
        return self.client.descriptor(self.handle)

    def link(self, name: str, who: Caller | None = None, parent: int = ROOT) -> Fid:
        link = callbacks.link(self.client.session, self.fid.number, parent, name.encode(), who)
        return self.client.run(link)[0]

    def end(self) -> None:
        """The kernel closes it, and forgets it."""
        self.client.do(callbacks.release, self.handle)
        self.client.forget(self.fid, self.fid.lookups)


@contextlib.contextmanager
def nameless(
    client: Client, parent: int = ROOT, flags: int = os.O_RDWR, who: Caller = ME
) -> Iterator[Nameless]:
    it = Nameless(client, parent, flags, who)
    try:
        yield it
    finally:
        it.end()


def test_it_is_a_file_as_any(client: Client) -> None:
    """Open, with a lookup counted, and with no links; it ends with that."""
    with nameless(client) as it:
        a = it.attributes
        assert (a.nlink, a.size, a.kind) == (0, 0, stat.S_IFREG)
        assert (it.fid.lookups, it.fid.number) == (1, a.ino)
        assert client.do(ops.write, it.handle, 0, b"hello") == 5
        assert client.do(ops.read, it.handle, 1, 10) == b"ello"
        assert client.do(callbacks.getattr, it.fid.number).size == 5
        client.do(callbacks.setattr, it.fid.number, None, Changes(size=2, mode=0o600))
        assert stat.S_IMODE(os.fstat(it.fd).st_mode) == 0o600
        again = client.do(callbacks.open, it.fid.number, os.O_RDONLY).number
        assert client.do(ops.read, again, 0, 10) == b"he"
        client.do(ops.clunk, again)
        assert not list(client.source.iterdir())
    assert len(client.session.fids) == 1


def test_what_cannot_be_made_leaves_nothing(client: Client) -> None:
    """As the source says: open for reading alone, in no directory, in one that has gone."""
    (client.source / "file").touch()
    (client.source / "gone").mkdir()
    file, gone = client.know("file"), client.know("gone")
    (client.source / "gone").rmdir()
    count = len(client.session.fids)
    for parent, flags in (
        *((ROOT, os.O_RDONLY), (file.number, os.O_RDWR), (gone.number, os.O_RDWR)),
        *((ROOT, os.O_PATH | os.O_RDWR), (ROOT, os.O_ACCMODE)),
    ):
        plain = f"/proc/self/fd/{client.node(parent).fd}"
        expected = outcome(lambda: os.open(plain, flags & os.O_ACCMODE | os.O_TMPFILE))  # noqa: B023
        if not isinstance(expected, str):
            os.close(expected)
            continue
        assert outcome(lambda: Nameless(client, parent, flags)) == expected  # noqa: B023
        assert len(client.session.fids) == count
    for fid in (file, gone):
        client.forget(fid)


def test_a_read_only_session_has_none(leak_free: None, source: Path) -> None:
    with client_of(source, read_only=True) as client, fails(errno.EROFS):
        client.do(callbacks.tmpfile, ROOT, os.O_RDWR, 0o600, ME)


def test_where_there_are_none_the_kernel_is_told_so(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EOPNOTSUPP: not ENOSYS, which were for the whole mount."""

    def no(*args: object, **more: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "none here")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no)
        with fails(errno.EOPNOTSUPP):
            client.do(callbacks.tmpfile, ROOT, os.O_RDWR, 0o600, ME)


def test_flags_that_are_for_names_are_no_matter(client: Client) -> None:
    """The kernel sends what it was given."""
    for flags in (os.O_TMPFILE, os.O_TMPFILE | os.O_EXCL, os.O_CREAT, os.O_TRUNC, os.O_APPEND):
        with nameless(client, ROOT, flags | os.O_WRONLY) as it:
            assert client.do(ops.write, it.handle, 0, b"x") == 1
            with fails(errno.EBADF):
                client.do(ops.read, it.handle, 0, 1)


# Its descriptor


def test_it_never_loses_its_descriptor(client: Client) -> None:
    """It has no name to be found by, also when it is no longer open."""
    it = Nameless(client)
    client.do(ops.write, it.handle, 0, b"hello")
    client.do(callbacks.release, it.handle)
    client.session.descriptors.most = 1
    for _ in range(3):
        it.fid.node.recent = False
        client.run(client.session.descriptors._reclaim())
        assert it.fid.node not in client.session.fids.coldest(100)
    assert client.session.descriptors._let_go_of_any() is False
    assert client.do(callbacks.getattr, it.fid.number).size == 5
    client.forget(it.fid)


@needs_root
def test_it_keeps_a_disk_busy_as_on_the_source(leak_free: None, source: Path) -> None:
    with mounted("tmpfs", "tmpfs", source / "disk"), client_of(source) as client:
        disk = client.know("disk")
        with nameless(client, disk.number) as it:
            for _ in range(2):
                idle = client.session.fids.idle_visitors(())
                assert it.fid.node not in idle
                for node in idle:
                    client.session.fids.unpin(node)
            assert it.link("named", parent=disk.number) is it.fid
            it.fid.node.recent = False
            # Once it has a name, it can be left once it is closed.
            client.do(callbacks.release, it.handle)
            idle = client.session.fids.idle_visitors(())
            assert it.fid.node in idle
            for node in idle:
                client.session.fids.unpin(node)
            it.handle = client.do(callbacks.open, it.fid.number, os.O_RDONLY).number
        client.forget(disk)


# Its name


def test_a_link_gives_it_a_name(client: Client) -> None:
    """The same file: with what was written, by the fid that the kernel has."""
    with nameless(client) as it:
        client.do(ops.write, it.handle, 0, b"hello")
        told: list[int] = []
        client.session.attributes_changed = told.append
        assert it.link("named") is it.fid
        assert it.fid.lookups == 2
        assert set(told) == {ROOT, it.fid.number}
        assert client.do(callbacks.getattr, it.fid.number).nlink == 1
        assert (client.source / "named").read_bytes() == b"hello"
        assert client.know("named") is it.fid


def test_it_is_found_by_its_name_then(client: Client) -> None:
    """It loses its descriptor as others do, and is opened again."""
    (client.source / "d").mkdir()
    d = client.know("d")
    it = Nameless(client)
    client.do(ops.write, it.handle, 0, b"hello")
    client.do(callbacks.release, it.handle)
    it.link("named", parent=d.number)
    assert client.place(it.fid.number) == (d.number, b"named")
    client.lose_descriptor(it.fid)
    it.handle = client.do(callbacks.open, it.fid.number, os.O_RDONLY).number
    assert client.do(ops.read, it.handle, 0, 10) == b"hello"
    client.do(callbacks.rename, d.number, b"named", ROOT, b"moved", 0)
    assert client.place(it.fid.number) == (client.node(ROOT).number, b"moved")
    it.end()
    client.forget(d)


def test_only_one_that_is_to_have_a_name_gets_one(client: Client) -> None:
    """Not one that was made with O_EXCL, nor one that has lost its name again: ENOENT."""
    with nameless(client, ROOT, os.O_RDWR | os.O_EXCL) as it, fails(errno.ENOENT):
        it.link("named")
    with nameless(client) as it:
        it.link("named")
        it.link("second")
        client.do(callbacks.unlink, ROOT, b"named")
        it.link("third")
        for name in ("second", "third"):
            client.do(callbacks.unlink, ROOT, name.encode())
        assert client.do(callbacks.getattr, it.fid.number).nlink == 0
        with fails(errno.ENOENT):
            it.link("fourth")
    assert not list(client.source.iterdir())


def test_a_name_that_is_taken(client: Client) -> None:
    """It stays nameless, and can have another."""
    (client.source / "taken").touch()
    with nameless(client) as it:
        with fails(errno.EEXIST):
            it.link("taken")
        assert (it.fid.lookups, it.fid.node.place) == (1, None)
        assert it.link("free") is it.fid


def test_a_name_that_somebody_gave_it_in_the_source(client: Client) -> None:
    """Looked up, it is the file that the kernel knows."""
    with nameless(client) as it:
        root = client.node(ROOT).fd
        os.link(f"/proc/self/fd/{it.fd}", "named", dst_dir_fd=root, follow_symlinks=True)
        assert client.know("named") is it.fid
        client.do(callbacks.unlink, ROOT, b"named")
        assert client.do(callbacks.getattr, it.fid.number).nlink == 0


def test_later_files_with_its_number_are_others(client: Client) -> None:
    """The kernel may not have forgotten the one that had it."""
    for _ in range(5):
        first = Nameless(client)
        client.do(callbacks.release, first.handle)
        number, generation = first.fid.number, first.fid.generation
        # The kernel's forget is on its way, when the file has gone already.
        fd = first.fid.node.fd
        assert fd >= 0
        client.forget(first.fid)
        with nameless(client) as second:
            assert second.attributes.nlink == 0
            if second.fid.number == number:
                assert (second.fid is not first.fid) or second.fid.generation > generation


# Whose it is


@needs_root
def test_it_is_the_callers(client: Client) -> None:
    """And what it makes in a directory of a group is that group's, as with a name."""
    client.source.chmod(0o777)
    before = identity()
    with nameless(client, who=SOMEBODY) as it:
        a = it.attributes
        assert (a.uid, a.gid, stat.S_IMODE(a.mode)) == (*SOMEBODY[:2], 0o644)
    assert identity() == before
    os.chown(client.source, 0, 777)
    client.source.chmod(0o2777)
    with nameless(client, who=SOMEBODY) as it:
        assert (it.attributes.uid, it.attributes.gid) == (SOMEBODY.uid, 777)


@needs_root
def test_who_may_not_write_to_a_directory_makes_none_there(client: Client) -> None:
    """As on the source, which is asked again."""

    def ask(pid: int) -> list[object]:
        answers: list[object] = []
        for mode in (0o755, 0o733, 0o766):
            client.source.chmod(mode)
            made = outcome(lambda: Nameless(client, who=SOMEBODY._replace(pid=pid)))
            answers.append(made if isinstance(made, str) else "made")
            if not isinstance(made, str):
                made.end()
        return answers

    assert look_at(as_somebody, ask) == ["EACCES", "made", "EACCES"]


@needs_root
@pytest.mark.parametrize("has_acl", [False, True])
def test_the_umask_is_applied_unless_there_is_a_default_acl(client: Client, has_acl: bool) -> None:
    """By the source, as for a file with a name."""
    client.source.chmod(0o777)
    if has_acl:
        os.setxattr(client.source, DEFAULT, acl_for(5, 6))
    who = SOMEBODY._replace(umask=0o027)
    named, fid, _ = client.do(callbacks.create, ROOT, b"named", os.O_RDWR, 0o666, who)
    made, other, a = client.do(callbacks.tmpfile, ROOT, os.O_RDWR, 0o666, who)
    assert a.mode == (client.source / "named").stat().st_mode
    assert stat.S_IMODE(a.mode) == (0o660 if has_acl else 0o640)
    for handle in (named, made):
        client.do(callbacks.release, handle.number)
    for one in (fid, other):
        client.forget(one)


@needs_root
def test_who_gives_it_a_name(client: Client) -> None:
    """Its owner may, and whom the source lets link others' files (protected_hardlinks)."""
    client.source.chmod(0o777)
    other = Caller(SOMEBODY.uid + 1, SOMEBODY.gid + 1)
    protected = Path("/proc/sys/fs/protected_hardlinks").read_text().strip() == "1"

    def ask(pid: int) -> None:
        who = SOMEBODY._replace(pid=pid)
        with nameless(client, who=other) as theirs:
            answer = outcome(lambda: theirs.link("theirs", who) and "linked")
            assert answer == ("EPERM" if protected else "linked")
        with nameless(client, who=who) as ours:
            assert ours.link("ours", who) is ours.fid
            client.source.chmod(0o755)
            with fails(errno.EACCES):
                ours.link("more", who)

    look_at(as_somebody, ask)
