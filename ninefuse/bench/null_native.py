"""The null server on the native session: its loop, and a table of rows that answer from memory."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial

from ninefuse.bench.null_tree import BLOCK, NAME_MAX, PLENTY, TIMEOUT, Node, Tree, is_direct
from ninefuse.errors import error
from ninefuse.executor import NoThreading
from ninefuse.fuse import mounting
from ninefuse.fuse import opcodes as op
from ninefuse.fuse._message import Message
from ninefuse.fuse._wire import Device, Entries
from ninefuse.fuse.native import NativeSession
from ninefuse.fuse.opcodes import Opcode
from ninefuse.fuse.rows import Known, Row
from ninefuse.settings import Settings
from ninefuse.tree.session import Session

_DONE = Known(None)
_OPTIONS = ("default_permissions", "fsname=null", "subtype=null")
_BILLION = 1_000_000_000


class NullRows:
    """What the rows share. Args: device, on which answers go; tree, that they come from."""

    def __init__(self, device: Device, tree: Tree) -> None:
        self._device = device
        self._tree = tree
        self._owner = (self._tree.uid, self._tree.gid)
        self._times = divmod(self._tree.now, _BILLION) * 4  # atime, btime, ctime, mtime

    def _attributes(self, node: Node) -> tuple[int, ...]:
        """Attributes (linux/syscalls.py), but not by their names, which would take longer."""
        tree, size = self._tree, node.size
        start = (
            0,
            BLOCK,
            0,
            1,
            tree.uid,
            tree.gid,
            node.mode,
            node.inode,
            size,
            (size + 511) // 512,
        )
        return (*start, 0, *self._times, 0, 0, 0, 0)

    # Names.

    def lookup(self, m: Message) -> Known:
        node = self._tree.find(m.nodeid, m.args[0])
        if node is not None:
            node.lookups += 1
        return Known(node)

    def forget(self, m: Message) -> Known:
        self._tree.forget(m.args)
        return _DONE

    def mkdir(self, m: Message) -> Known:
        name, mode, umask = m.args
        return Known(self._created(m.nodeid, name, stat.S_IFDIR | mode & ~umask))

    def unlink(self, m: Message) -> Known:
        self._tree.unlink(m.nodeid, m.args[0])
        return _DONE

    def rmdir(self, m: Message) -> Known:
        self._tree.rmdir(m.nodeid, m.args[0])
        return _DONE

    # Attributes.

    def getattr(self, m: Message) -> Known:
        return Known(self._tree.nodes[m.nodeid])

    def setattr(self, m: Message) -> Known:
        node = self._tree.nodes[m.nodeid]
        valid, size, mode = m.args[0], m.args[2], m.args[10]
        if valid & op.FATTR_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        if valid & op.FATTR_SIZE:
            node.size = size
        return Known(node)

    def getxattr(self, m: Message) -> Known:
        # Not ENOSYS, after which the kernel would ask no more: the others are asked again.
        raise error(errno.ENODATA)

    def nothing(self, m: Message) -> Known:
        return _DONE

    # Data.

    def open(self, m: Message) -> Known:
        if m.args[0] & os.O_TRUNC:
            self._tree.nodes[m.nodeid].size = 0
        return Known(m.nodeid)

    def create(self, m: Message) -> Known:
        name, _, mode, umask, _ = m.args
        return Known(self._created(m.nodeid, name, stat.S_IFREG | mode & ~umask))

    def read(self, m: Message) -> Known:
        return Known(self._tree.read(*m.args[:3]))

    def write(self, m: Message) -> Known:
        fh, offset, data = m.args[:3]
        return Known(self._tree.write(fh, offset, len(data)))

    # Answers.

    def answer_nothing(self, m: Message, _: None) -> bool:
        return self._device.empty(m.unique)

    def answer_not(self, m: Message, _: None) -> bool:
        return True

    def answer_entry(self, m: Message, node: Node | None) -> bool:
        if node is None:
            return self._device.absent(m.unique, TIMEOUT)
        return self._device.entry(m.unique, *self._entry(node))

    def answer_attributes(self, m: Message, node: Node) -> bool:
        return self._device.attributes(m.unique, TIMEOUT, node.inode, self._attributes(node))

    def answer_statfs(self, m: Message, _: None) -> bool:
        counts = (PLENTY, PLENTY, PLENTY, PLENTY, PLENTY)
        return self._device.file_system(m.unique, *counts, BLOCK, BLOCK, NAME_MAX)

    def answer_open(self, m: Message, inode: int) -> bool:
        return self._device.opened(m.unique, inode, _how(m.args[0]))

    def answer_create(self, m: Message, node: Node) -> bool:
        entry = self._entry(node)
        return self._device.created(m.unique, *entry, node.inode, _how(m.args[1]))

    def answer_data(self, m: Message, data: bytes) -> bool:
        return self._device.data(m.unique, data)

    def answer_count(self, m: Message, count: int) -> bool:
        return self._device.count(m.unique, count)

    def answer_readdir(self, m: Message, _: None) -> bool:
        fh, offset, size = m.args[:3]
        reply = Entries(size)
        for following, node in self._tree.listing(fh, offset):
            fits = reply.add(node.name, node.inode, following, node.mode >> 12)
            self._tree.drop(node)  # it is looked up when it is used
            if not fits:
                break
        return self._device.data(m.unique, reply.reply)

    def answer_readdirplus(self, m: Message, _: None) -> bool:
        fh, offset, size = m.args[:3]
        reply = Entries(size)
        for following, node in self._tree.listing(fh, offset):
            inode, generation, entry_valid, attr_valid, ino, a = self._entry(node)
            where = (node.name, ino, following, node.mode >> 12)
            if not reply.add_plus(*where, inode, generation, entry_valid, attr_valid, a):
                self._tree.drop(node)
                break
            node.lookups += 1
        return self._device.data(m.unique, reply.reply)

    def undo_entry(self, m: Message, node: Node | None) -> None:
        if node is not None:
            self._tree.forget([(node.inode, 1)])

    # Helpers.

    def _created(self, parent: int, name: bytes, mode: int) -> Node:
        node = self._tree.create(parent, name, mode)
        node.lookups += 1
        return node

    def _entry(self, node: Node) -> tuple[int, int, float, float, int, tuple[int, ...]]:
        return node.inode, 0, TIMEOUT, TIMEOUT, node.inode, self._attributes(node)


def table(tree: Tree, device: Device) -> dict[int, Row]:
    """The rows by opcode: every request that the benchmark's workloads lead to."""
    r = NullRows(device, tree)
    nothing = r.nothing, r.answer_nothing
    return {
        Opcode.LOOKUP: Row("lookup", r.lookup, r.answer_entry, r.undo_entry),
        Opcode.FORGET: Row("forget", r.forget, r.answer_not),
        Opcode.BATCH_FORGET: Row("forget", r.forget, r.answer_not),
        Opcode.MKDIR: Row("mkdir", r.mkdir, r.answer_entry, r.undo_entry),
        Opcode.UNLINK: Row("unlink", r.unlink, r.answer_nothing),
        Opcode.RMDIR: Row("rmdir", r.rmdir, r.answer_nothing),
        Opcode.GETATTR: Row("getattr", r.getattr, r.answer_attributes),
        Opcode.SETATTR: Row("setattr", r.setattr, r.answer_attributes),
        Opcode.GETXATTR: Row("getxattr", r.getxattr, r.answer_data),
        Opcode.STATFS: Row("statfs", r.nothing, r.answer_statfs),
        Opcode.OPEN: Row("open", r.open, r.answer_open),
        Opcode.CREATE: Row("create", r.create, r.answer_create, r.undo_entry),
        Opcode.READ: Row("read", r.read, r.answer_data),
        Opcode.WRITE: Row("write", r.write, r.answer_count),
        Opcode.FLUSH: Row("flush", *nothing),
        Opcode.FSYNC: Row("fsync", *nothing),
        Opcode.RELEASE: Row("release", *nothing),
        Opcode.OPENDIR: Row("opendir", r.open, r.answer_open),
        Opcode.READDIR: Row("readdir", r.nothing, r.answer_readdir),
        Opcode.READDIRPLUS: Row("readdirplus", r.nothing, r.answer_readdirplus),
        Opcode.RELEASEDIR: Row("releasedir", *nothing),
    }


def _how(flags: int) -> int:
    return op.FOPEN_DIRECT_IO if is_direct(flags) else 0


def serve(mountpoint: str) -> None:
    """Mount, and serve until unmounted."""
    place = os.path.realpath(mountpoint)
    settings = Settings("/", place, mount_options=_OPTIONS)
    driver = NoThreading()  # which has nothing to run: every answer is known
    session = NativeSession(settings, Session(driver), driver)
    mounted = mounting.mount(settings)
    try:
        session.use(mounted.device, partial(table, Tree()))
        session.run(lambda: None)
    finally:
        session.close()
        mounting.unmount(mounted, place)
