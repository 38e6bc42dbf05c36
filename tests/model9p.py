"""A model of a tree that several 9P connections change: dictionaries and bytes, no system calls.

`Model.call` does what a message does and returns what its answer says, or raises OSError. It knows
regular files and directories, and no times, owners or modes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from ninefuse.errors import error

_ACCESS = 3
_TRUNC, _EXCL = 0o1000, 0o200


class File:
    """A file: what is in it, and how many names it has."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.links = 1


class Directory:
    """A directory: its names, and where it is; ``above`` is itself for the root."""

    def __init__(self, above: Directory | None) -> None:
        self.names: dict[bytes, File | Directory] = {}
        self.above = self if above is None else above
        self.is_gone = False


class Fid:
    """A fid: what it stands on, where that was found, and how it is open."""

    def __init__(
        self, node: File | Directory, place: tuple[Directory, bytes] | None, access: int = -1
    ) -> None:
        self.node = node
        self.place = place
        self.access = access  # -1: not open

    @property
    def kind(self) -> str:
        if isinstance(self.node, Directory):
            return "dir"
        return "file" if self.access < 0 else "open"


def errno_name(function: Callable[[], Any]) -> Any:
    """What a function returns, or the name of the errno that it raises."""
    try:
        return function()
    except OSError as e:
        return errno.errorcode[e.errno or 0]


class Model:
    """Args:
    connections: how many there are; each has the root as its fid 0.
    """

    def __init__(self, connections: int) -> None:
        self.root = Directory(None)
        self.fids: list[dict[int, Fid]] = [{} for _ in range(connections)]
        # Where a file was seen last, for all fids of it.
        self.places: dict[File | Directory, tuple[Directory, bytes]] = {}
        for connection in range(connections):
            self.hang_up(connection)

    def hang_up(self, connection: int) -> None:
        """A connection is lost; there is another in its stead."""
        self.fids[connection] = {0: Fid(self.root, None)}

    def call(self, connection: int, message: str, *values: Any) -> Any:
        """What a message is answered."""
        return getattr(self, message[1:])(self.fids[connection], *values)

    def tree(self, directory: Directory | None = None) -> dict[bytes, Any]:
        """All that there is, by names."""
        directory = self.root if directory is None else directory
        return {
            name: self.tree(node) if isinstance(node, Directory) else bytes(node.data)
            for name, node in directory.names.items()
        }

    # Messages

    def walk(
        self, fids: dict[int, Fid], fid: int, newfid: int, names: tuple[bytes, ...]
    ) -> list[int]:
        start = self._fid(fids, fid)
        if newfid != fid and newfid in fids:
            raise error(errno.EINVAL)
        if len(names) > 16:
            raise error(errno.EINVAL)
        for name in names:
            _check(name, errno.ENOENT)
        if names and not isinstance(start.node, Directory):
            raise error(errno.ENOTDIR)
        if newfid == fid and start.access >= 0:
            raise error(errno.EINVAL)
        node = start.node
        kinds: list[int] = []
        for name in names:
            try:
                node = self._step(node, name)
            except OSError:
                if not kinds:
                    raise
                return kinds
            kinds.append(0x80 if isinstance(node, Directory) else 0)
        fids[newfid] = Fid(node, None)
        return kinds

    def _step(self, node: File | Directory, name: bytes) -> File | Directory:
        if not isinstance(node, Directory):
            raise error(errno.ENOTDIR)
        if name == b".":
            return node
        if name == b"..":
            return node.above
        if name not in node.names:
            raise error(errno.ENOENT)
        below = node.names[name]
        self.places[below] = node, name
        return below

    def lopen(self, fids: dict[int, Fid], fid: int, flags: int) -> tuple[()]:
        it = self._fid(fids, fid)
        if it.access >= 0:
            raise error(errno.EINVAL)
        if isinstance(it.node, Directory):
            if flags:
                raise error(errno.EISDIR)
        elif flags & _TRUNC:
            it.node.data.clear()
        it.access = flags & _ACCESS
        return ()

    def lcreate(
        self, fids: dict[int, Fid], fid: int, name: bytes, flags: int, mode: int, gid: int
    ) -> tuple[()]:
        it = self._fid(fids, fid)
        _check_new(name)
        if it.access >= 0:
            raise error(errno.EINVAL)
        if not isinstance(it.node, Directory):
            raise error(errno.ENOTDIR)
        there = it.node.names.get(name)
        if there is None:
            if it.node.is_gone:
                raise error(errno.ENOENT)
            there = it.node.names[name] = File()
        elif flags & _EXCL:
            raise error(errno.EEXIST)
        elif isinstance(there, Directory):
            raise error(errno.EISDIR)
        self.places[there] = it.node, name
        it.node, it.access = there, flags & _ACCESS
        return ()

    def write(self, fids: dict[int, Fid], fid: int, offset: int, data: bytes) -> int:
        it = self._fid(fids, fid)
        file = self._open_file(it)
        if it.access == 0:
            raise error(errno.EBADF)
        if data:
            file.data.extend(bytes(max(0, offset - len(file.data))))
            file.data[offset : offset + len(data)] = data
        return len(data)

    def read(self, fids: dict[int, Fid], fid: int, offset: int, count: int) -> bytes:
        it = self._fid(fids, fid)
        file = self._open_file(it)
        if it.access == 1:
            raise error(errno.EBADF)
        return bytes(file.data[offset : offset + count])

    def mkdir(self, fids: dict[int, Fid], fid: int, name: bytes, mode: int, gid: int) -> tuple[()]:
        it = self._fid(fids, fid)
        _check_new(name)
        directory = _directory(it.node)
        self._free(directory, name)
        directory.names[name] = Directory(directory)
        return ()

    def link(self, fids: dict[int, Fid], dirfid: int, fid: int, name: bytes) -> tuple[()]:
        where, it = self._fid(fids, dirfid), self._fid(fids, fid)
        _check_new(name)
        directory = _directory(where.node)
        if isinstance(it.node, Directory):
            raise error(errno.EPERM)
        self._free(directory, name)
        if not it.node.links:
            raise error(errno.ENOENT)
        it.node.links += 1
        directory.names[name] = it.node
        return ()

    def unlinkat(self, fids: dict[int, Fid], fid: int, name: bytes, flags: int) -> tuple[()]:
        it = self._fid(fids, fid)
        _check(name, errno.EINVAL)
        if name == b".":
            raise error(errno.EINVAL)
        if name == b"..":
            raise error(errno.ENOTEMPTY)
        self._unlink(_directory(it.node), name, is_directory=bool(flags))
        return ()

    def renameat(
        self, fids: dict[int, Fid], old: int, oldname: bytes, new: int, newname: bytes
    ) -> tuple[()]:
        one, other = self._fid(fids, old), self._fid(fids, new)
        for name in (oldname, newname):
            _check_moved(name)
        self._move(_directory(one.node), oldname, _directory(other.node), newname)
        return ()

    def rename(self, fids: dict[int, Fid], fid: int, dirfid: int, name: bytes) -> tuple[()]:
        it, other = self._fid(fids, fid), self._fid(fids, dirfid)
        _check_moved(name)
        if it.node is self.root:
            raise error(errno.EBUSY)
        new = _directory(other.node)
        self._move(*self._place(it.node), new, name)
        return ()

    def remove(self, fids: dict[int, Fid], fid: int) -> tuple[()]:
        it = self._fid(fids, fid)
        del fids[fid]
        if it.node is self.root:
            raise error(errno.EBUSY)
        directory, name = self._place(it.node)
        self._unlink(directory, name, is_directory=isinstance(it.node, Directory))
        return ()

    def getattr(self, fids: dict[int, Fid], fid: int, mask: int) -> tuple[Any, ...]:
        node = self._fid(fids, fid).node
        if isinstance(node, Directory):
            return ("dir",)
        return "file", node.links, len(node.data)

    def setattr(self, fids: dict[int, Fid], fid: int, valid: int, *values: int) -> tuple[()]:
        node, size = self._fid(fids, fid).node, values[3]
        if isinstance(node, Directory):
            raise error(errno.EISDIR)
        node.data = node.data[:size].ljust(size, b"\0")
        return ()

    def clunk(self, fids: dict[int, Fid], fid: int) -> tuple[()]:
        self._fid(fids, fid)
        del fids[fid]
        return ()

    # What messages share

    def _fid(self, fids: dict[int, Fid], fid: int) -> Fid:
        if fid not in fids:
            raise error(errno.EBADF)
        return fids[fid]

    def _open_file(self, it: Fid) -> File:
        if it.access < 0:
            raise error(errno.EINVAL)
        if isinstance(it.node, Directory):
            raise error(errno.EISDIR)
        return it.node

    def _place(self, node: File | Directory) -> tuple[Directory, bytes]:
        """Where a file was seen last, if it is still there."""
        directory, name = self.places[node]
        if name not in directory.names:
            raise error(errno.ENOENT)
        if directory.names[name] is not node:
            raise error(errno.ESTALE)
        return directory, name

    def _free(self, directory: Directory, name: bytes) -> None:
        if name in directory.names:
            raise error(errno.EEXIST)
        if directory.is_gone:
            raise error(errno.ENOENT)

    def _unlink(self, directory: Directory, name: bytes, *, is_directory: bool) -> None:
        there = directory.names.get(name)
        if there is None:
            raise error(errno.ENOENT)
        if isinstance(there, Directory):
            if not is_directory:
                raise error(errno.EISDIR)
            if there.names:
                raise error(errno.ENOTEMPTY)
            there.is_gone = True
        elif is_directory:
            raise error(errno.ENOTDIR)
        else:
            there.links -= 1
        del directory.names[name]

    def _move(self, old: Directory, oldname: bytes, new: Directory, newname: bytes) -> None:
        """rename(2), whose errors come in the kernel's order (fs/namei.c, do_renameat2)."""
        moved, there = old.names.get(oldname), new.names.get(newname)
        if moved is None:
            raise error(errno.ENOENT)
        if isinstance(moved, Directory) and moved in _lineage(new):
            raise error(errno.EINVAL)
        if isinstance(there, Directory) and there in _lineage(old):
            raise error(errno.ENOTEMPTY)
        if there is None and new.is_gone:
            raise error(errno.ENOENT)
        if moved is there:
            return
        if there is not None:
            if isinstance(moved, Directory) and not isinstance(there, Directory):
                raise error(errno.ENOTDIR)
            if isinstance(there, Directory) and not isinstance(moved, Directory):
                raise error(errno.EISDIR)
            self._unlink(new, newname, is_directory=isinstance(there, Directory))
        del old.names[oldname]
        new.names[newname] = moved
        self.places[moved] = new, newname
        if isinstance(moved, Directory):
            moved.above = new


def _lineage(directory: Directory) -> list[Directory]:
    """A directory and all above it."""
    found = [directory]
    while directory.above is not directory:
        directory = directory.above
        found.append(directory)
    return found


def _directory(node: File | Directory) -> Directory:
    if not isinstance(node, Directory):
        raise error(errno.ENOTDIR)
    return node


def _check(name: bytes, code: int) -> None:
    if not name or b"/" in name or b"\0" in name:
        raise error(code)
    if len(name) > 255:
        raise error(errno.ENAMETOOLONG)


def _check_new(name: bytes) -> None:
    _check(name, errno.EINVAL)
    if name in (b".", b".."):
        raise error(errno.EEXIST)


def _check_moved(name: bytes) -> None:
    _check(name, errno.EINVAL)
    if name in (b".", b".."):
        raise error(errno.EINVAL)
