"""Every call that an operation makes fails once: nothing is left open, referenced or locked."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ops_helpers import ROOT, Client, client_of, need_attributes, need_flags
from ops_helpers import leak_free as leak_free
from ops_helpers import source as source

from ninefuse import ops
from ninefuse.calls import Body
from ninefuse.fuse import callbacks
from ninefuse.fuse.entries import readdirplus
from ninefuse.linux import filesystems, records, syscalls
from ninefuse.linux.callers import Caller
from ninefuse.linux.ioctls import FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
from ninefuse.linux.syscalls import RENAME_EXCHANGE
from ninefuse.ops import Changes, LockRange
from ninefuse.tree.session import Session
from ninefuse.tree.table import Fid

pytestmark = pytest.mark.usefixtures("leak_free")

ME = Caller(os.geteuid(), os.getegid())
NODUMP = (0x40 | 0x80000).to_bytes(4, sys.byteorder)  # and what ext4 has set: extents
NEW = (1 << 64) + (1 << 32)  # a fid number that the operations below make a fid with

# What operations do to files, as they call it. Closing is not among them: a close that
# fails has closed all the same.
_OF_PYTHON = [
    *("open", "mkdir", "mknod", "symlink", "link", "unlink", "rmdir", "readlink", "dup"),
    *("chmod", "chown", "truncate", "ftruncate", "pread", "pwrite", "fsync", "fdatasync"),
    *("lseek", "statvfs", "getxattr", "setxattr", "listxattr", "removexattr"),
    "copy_file_range",
]
CALLS: list[tuple[object, str]] = [
    *((os, name) for name in _OF_PYTHON),
    *((syscalls, name) for name in ("_statx", "_renameat2", "_utimensat")),
    *((syscalls, "_fallocate"), (syscalls, "_syncfs"), (fcntl, "ioctl")),
    *((records, "_getdents64"), (filesystems, "_fstatfs")),
]


@contextmanager
def one_fails(at: int) -> Iterator[list[str]]:
    """The call of this number fails with EIO; gives the names of the calls made."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for where, name in CALLS:
            real: Callable[..., Any] = getattr(where, name)

            def failing(
                *args: Any, real: Callable[..., Any] = real, name: str = name, **more: Any
            ) -> Any:
                made.append(name)
                if len(made) - 1 == at:
                    raise OSError(errno.EIO, "made to fail")
                return real(*args, **more)

            patch.setattr(where, name, failing)
        yield made


class Scene:
    """A source with something of everything, and fids for it."""

    def __init__(self, client: Client) -> None:
        source = client.source
        (source / "file").write_bytes(b"data")
        (source / "other").write_bytes(b"other")
        (source / "d").mkdir()
        (source / "d" / "inner").write_bytes(b"inner")
        (source / "empty").mkdir()
        (source / "link").symlink_to("file")
        os.setxattr(source / "file", "user.x", b"x")
        self.client = client
        self.file = client.walk("file")
        self.reading = client.open("file")
        self.writing = client.open("file", flags=os.O_RDWR)
        self.listing = client.open()
        self.d = client.walk("d")
        self.link = client.walk("link")
        self.clone = client.walk()
        self.attribute = client.walk("file")
        client.do(ops.xattrcreate, self.attribute, b"user.x", 1)
        client.do(ops.write, self.attribute, 0, b"y")
        self.removing = client.walk("file")
        client.do(ops.xattrcreate, self.removing, b"user.x", 0, remove=True)
        self.known = client.know("d", "inner")
        self.lost = self.without_descriptor("other")
        # A directory and a file in it, neither of which has a descriptor.
        directory = client.know("d")
        self.below = client.know("inner", start=directory.number)
        for fid in (self.below, directory):
            client.lose_descriptor(fid)

    def without_descriptor(self, name: str) -> Fid:
        fid = self.client.know(name)
        self.client.lose_descriptor(fid)
        return fid


OPERATIONS: dict[str, Callable[[Session, Scene], Body[Any]]] = {
    "version": lambda s, c: ops.version(s, 8192, "9P2000.L"),
    "attach": lambda s, c: ops.attach(s, NEW, str(c.client.source)),
    "walk": lambda s, c: ops.walk(s, ROOT, NEW, [b"d", b"..", b"d", b"inner"]),
    "walk to itself": lambda s, c: ops.walk(s, c.clone, c.clone, [b"d", b".", b"inner"]),
    "walk for the kernel": lambda s, c: ops.walk(s, ROOT, s.kernel.intern, [b"d", b"inner"]),
    "walk of a clone": lambda s, c: ops.walk(s, c.file, NEW),
    "walk up": lambda s, c: ops.walk(s, c.below.number, NEW),
    "clunk": lambda s, c: ops.clunk(s, c.reading),
    "clunk of an attribute": lambda s, c: ops.clunk(s, c.attribute),
    "clunk that removes": lambda s, c: ops.clunk(s, c.removing),
    "remove": lambda s, c: ops.remove(s, c.file),
    "getattr": lambda s, c: ops.getattr(s, c.file),
    "getattr without descriptor": lambda s, c: ops.getattr(s, c.below.number),
    "setattr": lambda s, c: ops.setattr(s, c.file, Changes(0o600, *ME[:2], 2, 1, 1)),
    "setattr of an open file": lambda s, c: ops.setattr(s, c.writing, Changes(size=1)),
    "readlink": lambda s, c: ops.readlink(s, c.link),
    "statfs": lambda s, c: ops.statfs(s, c.lost.number),
    "lopen": lambda s, c: ops.lopen(s, c.file, os.O_RDWR | os.O_TRUNC),
    "lopen of a directory": lambda s, c: ops.lopen(s, c.d, os.O_RDONLY),
    "lopen without descriptor": lambda s, c: ops.lopen(s, c.lost.number, os.O_RDONLY),
    "lcreate": lambda s, c: ops.lcreate(s, c.clone, b"new", os.O_RDWR, 0o600, ME),
    "read": lambda s, c: ops.read(s, c.reading, 0, 100),
    "write": lambda s, c: ops.write(s, c.writing, 0, b"new"),
    "fsync": lambda s, c: ops.fsync(s, c.writing),
    "fdatasync": lambda s, c: ops.fsync(s, c.listing, True),
    "lock": lambda s, c: ops.lock(s, c.writing, 0, LockRange(1, 0, 0)),
    "readdir": lambda s, c: ops.readdir(s, c.listing, 0, 4096),
    "readdirplus": lambda s, c: readdirplus(s, c.listing, 0),
    "mkdir": lambda s, c: ops.mkdir(s, c.d, b"new", 0o700, ME),
    "mknod": lambda s, c: ops.mknod(s, c.d, b"new", stat.S_IFIFO | 0o600, 0, ME),
    "symlink": lambda s, c: ops.symlink(s, c.d, b"new", b"target", ME),
    "link": lambda s, c: ops.link(s, c.d, c.below.number, b"new"),
    "rename": lambda s, c: ops.rename(s, c.file, c.d, b"inner"),
    "rename over the lost": lambda s, c: ops.rename(s, c.below.number, ROOT, b"other"),
    "renameat": lambda s, c: ops.renameat(s, ROOT, b"d", ROOT, b"empty"),
    "exchange": lambda s, c: ops.renameat(s, ROOT, b"file", c.d, b"inner", RENAME_EXCHANGE),
    "unlinkat": lambda s, c: ops.unlinkat(s, ROOT, b"other"),
    "unlinkat of a directory": lambda s, c: ops.unlinkat(s, ROOT, b"empty", 0x200),
    "xattrwalk": lambda s, c: ops.xattrwalk(s, c.lost.number, NEW),
    "xattrwalk of a name": lambda s, c: ops.xattrwalk(s, c.file, NEW, b"user.x"),
    "callback lookup": lambda s, c: callbacks.lookup(s, ROOT, b"empty"),
    "callback mkdir": lambda s, c: callbacks.mkdir(s, ROOT, b"new", 0o700, ME),
    "callback mknod": lambda s, c: callbacks.mknod(s, ROOT, b"new", 0o100600, 0, ME),
    "callback symlink": lambda s, c: callbacks.symlink(s, ROOT, b"new", b"target", ME),
    "callback link": lambda s, c: callbacks.link(s, c.below.number, ROOT, b"new"),
    "callback open": lambda s, c: callbacks.open(s, c.below.number, os.O_RDONLY),
    "callback flush": lambda s, c: callbacks.flush(s, c.writing),
    "callback opendir": lambda s, c: callbacks.opendir(s, c.d),
    "lcreate of a file": lambda s, c: ops.lcreate(s, c.clone, b"file", os.O_RDWR, 0o600, ME),
    "callback tmpfile": lambda s, c: callbacks.tmpfile(s, c.d, os.O_RDWR, 0o600, ME),
    "callback fallocate": lambda s, c: callbacks.fallocate(s, c.writing, 0, 0, 4096),
    "callback lseek": lambda s, c: callbacks.lseek(s, c.reading, 0, os.SEEK_HOLE),
    "callback copy_file_range": lambda s, c: callbacks.copy_file_range(
        s, c.reading, 0, c.writing, 4, 4
    ),
    "callback ioctl": lambda s, c: callbacks.ioctl(s, c.reading, FS_IOC_GETFLAGS, b"", 4),
    "callback ioctl that sets": lambda s, c: callbacks.ioctl(
        s, c.reading, FS_IOC_SETFLAGS, NODUMP, 0, ME
    ),
    "callback syncfs": lambda s, c: callbacks.syncfs(s, c.link),
    "callback create": lambda s, c: callbacks.create(s, ROOT, b"new", os.O_RDWR, 0o600, ME),
    "callback setattr": lambda s, c: callbacks.setattr(
        s, c.known.number, c.writing, Changes(mtime=1)
    ),
    "callback getxattr": lambda s, c: callbacks.getxattr(s, c.file, b"user.x"),
    "callback listxattr": lambda s, c: callbacks.listxattr(s, c.file),
    "callback setxattr": lambda s, c: callbacks.setxattr(s, c.file, b"user.y", b"y"),
    "callback removexattr": lambda s, c: callbacks.removexattr(s, c.file, b"user.x"),
    "reclaiming": lambda s, c: s.descriptors._reclaim(),
}
ENDS_FIDS = {"clunk", "clunk of an attribute", "clunk that removes", "remove"}
# Errors of theirs that change nothing for whoever asked.
MAY_GO_ON = {
    "rename",
    "rename over the lost",
    "renameat",
    "exchange",
    "reclaiming",
    "readdir",
    "readdirplus",
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_that_fails_leaves_nothing_behind(source: Path, operation: str) -> None:
    """EIO instead of each of its calls in turn: that is the answer, and all that happens to fids.

    `leak_free` counts descriptors; closing the client looks for references and locks.
    """
    need_attributes(source)
    if "ioctl" in operation:
        need_flags(source)
    for at in range(100):
        directory = source / str(at)
        directory.mkdir()
        with client_of(directory, sync_directories=True) as client:
            scene = Scene(client)
            table = client.session.fids._fids
            for fid in table.values():
                fid.node.recent = False
            if operation == "reclaiming":
                client.session.descriptors.most = 1
            lookups = {number: fid.lookups for number, fid in table.items()}
            opened = {number: fid.opened for number, fid in table.items()}
            failure: OSError | None = None
            with one_fails(at) as made:
                try:
                    client.run(OPERATIONS[operation](client.session, scene))
                except OSError as raised:
                    failure = raised
            client.check_idle()
            if len(made) <= at:  # it has ended without coming to this call
                assert failure is None
                # The table of mounts is read once more where others mount something meanwhile.
                assert at == len(made) or (operation == "attach" and at == len(made) + 1)
                return
            if failure is None:
                # A walk ends early, a reply is short; what else hides an error is no use.
                assert operation in MAY_GO_ON or operation.startswith("walk"), made[-1]
                if not operation.startswith("walk"):
                    continue
            else:
                assert failure.errno == errno.EIO, made[-1]
            ended = set(lookups) - set(table)
            assert len(ended) == (operation in ENDS_FIDS)
            assert {n: fid.lookups for n, fid in table.items()} == {
                n: count for n, count in lookups.items() if n not in ended
            }
            assert {n: fid.opened for n, fid in table.items()} == {
                n: state for n, state in opened.items() if n not in ended
            }
    pytest.fail("it makes more than a hundred calls")
