"""The 9P operations: one coroutine a message, named after it.

Each is straight-line code on a `Session`: it looks fids up, marks its blocking calls with
`blocking`, takes the rename lock between them to note or to move a file's place, and raises OSError
with the errno of the reply. A driver from executor.py runs it.

It may import tree/, linux/, locks.py and calls.py, but neither fuse/, driving/ and executor.py
nor threading, trio and pyfuse3.

    attach.py      version, attach
    walk.py        walk, walkgetattr, clunk, remove
    attributes.py  getattr, setattr, readlink, statfs
    opening.py     lopen, lcreate
    io.py          read, write, fsync
    locking.py     lock, getlock; and waiting for locks and flock, which are no messages
    directory.py   readdir
    names.py       mkdir, mknod, symlink, link, rename, renameat, unlinkat
    xattr.py       xattrwalk, xattrcreate

Messages are those of 9P2000.L (diod's protocol.md, Linux net/9p), whose preconditions
come from the Plan 9 manual, section 5.
"""

from ninefuse.ops.attach import MAX_MSIZE, VERSION, attach, version
from ninefuse.ops.attributes import Changes, getattr, readlink, setattr, statfs
from ninefuse.ops.directory import readdir
from ninefuse.ops.io import UNKNOWN_WRITE, Writing, fsync, read, write
from ninefuse.ops.locking import LockRange, LockStatus, getlock, lock
from ninefuse.ops.names import link, mkdir, mknod, rename, renameat, symlink, unlinkat
from ninefuse.ops.opening import lcreate, lopen
from ninefuse.ops.walk import clunk, remove, walk, walkgetattr
from ninefuse.ops.xattr import xattrcreate, xattrwalk

__all__ = [
    "MAX_MSIZE",
    "UNKNOWN_WRITE",
    "VERSION",
    "Changes",
    "LockRange",
    "LockStatus",
    "Writing",
    "attach",
    "clunk",
    "fsync",
    "getattr",
    "getlock",
    "lcreate",
    "link",
    "lock",
    "lopen",
    "mkdir",
    "mknod",
    "read",
    "readdir",
    "readlink",
    "remove",
    "rename",
    "renameat",
    "setattr",
    "statfs",
    "symlink",
    "unlinkat",
    "version",
    "walk",
    "walkgetattr",
    "write",
    "xattrcreate",
    "xattrwalk",
]
