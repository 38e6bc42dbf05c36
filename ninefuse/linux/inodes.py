"""Inodes by their numbers: file handles that are made here, not asked for.

On ext4, xfs and btrfs a file handle is an inode's number and its generation, which tells the
inode from those that had the number before or get it later. So who knows the number can make the
handle again. ext4 and btrfs take generation 0 for any; xfs is asked which one an inode has.

A handle leads anywhere on its file system, whatever a mount shows of that. So inodes are found
here only for who has all of it (`mountinfo.shows_all`).

Source: open_by_handle_at(2), ioctl_xfs_bulkstat(2); Linux fs/ext4/namei.c, ext4_nfs_get_inode;
fs/btrfs/export.c, btrfs_get_dentry; fs/xfs/xfs_export.c, xfs_nfs_get_inode.

Locks touched: none.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from ninefuse.errors import error
from ninefuse.linux.filesystems import HANDLE_HEADER, file_handle, file_system_of
from ninefuse.linux.libc import function
from ninefuse.linux.syscalls import stat_descriptor

# By the type of a handle: the inode's number, what is the same for all, the generation.
_FORMS = {
    0x01: struct.Struct("=I0sI"),  # FILEID_INO32_GEN: ext4; xfs with small numbers
    0x4D: struct.Struct("=Q8sI"),  # FILEID_BTRFS_WITHOUT_PARENT: the subvolume in between
    0x81: struct.Struct("=Q0sI"),  # FILEID_INO32_GEN, XFS_FILEID_TYPE_64FLAG
}
_ANY = 0  # for a generation

# struct xfs_bulkstat_req: the first number, flags, how many at most; then a struct xfs_bulkstat.
_BULK_HEADER, _BULK_SIZE = 64, 256
_BULK = struct.Struct("=QII")
_BULK_GENERATION = struct.Struct("=64xI")
_XFS_IOC_BULKSTAT = 2 << 30 | _BULK_HEADER << 16 | ord("X") << 8 | 127  # _IOR('X', 127, …)

_open_by_handle_at = function("open_by_handle_at", ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


class Inodes:
    """The inodes of one file system.

    Args:
        top: its root directory, open for reading; `close` closes it.

    Raises:
        OSError: EOPNOTSUPP, its handles are of another form; EPERM, we may not open them; others
            of open_by_handle_at(2).
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._is_xfs = file_system_of(top).is_xfs
        handle = file_handle(top)
        _, kind = HANDLE_HEADER.unpack_from(handle)
        if kind not in _FORMS:
            raise error(errno.EOPNOTSUPP)
        self._header, self._form = handle[: HANDLE_HEADER.size], _FORMS[kind]
        number, self._between, _ = self._form.unpack_from(handle, HANDLE_HEADER.size)
        os.close(self.open(number))  # which shows whether we may

    def close(self) -> None:
        """Find no more."""
        os.close(self._top)

    def generation(self, inode: int, file: int, name: bytes = b"") -> int:
        """The generation of an inode, 32 bits. Waits for nobody if no name is given.

        Args:
            inode: its number.
            file: a descriptor of the file, O_PATH will do, or of the directory ``name`` is in.
            name: a name in that directory; a symlink is not followed.

        Raises:
            OSError: ESTALE, the name has become another inode's; as name_to_handle_at(2).
        """
        number, _, generation = self._form.unpack_from(file_handle(file, name), HANDLE_HEADER.size)
        if number != inode:
            raise error(errno.ESTALE)
        return int(generation)

    def open(self, inode: int, generation: int | None = None) -> int:
        """An O_PATH descriptor of an inode, on the mount that the root was opened by. Blocks.

        Args:
            inode: its number.
            generation: that it must have; None: any.

        Raises:
            OSError: ESTALE, there is none; as open_by_handle_at(2).
        """
        if generation is None:
            generation = self._generation_on_xfs(inode) if self._is_xfs else _ANY
        try:
            handle = self._header + self._form.pack(inode, self._between, generation)
        except struct.error:  # more bits than a number has here
            raise error(errno.ESTALE) from None
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return _open_by_handle_at(self._top, handle, flags)
        except OSError as e:
            # Also said of a number that a file gets that is just being made (iget_locked): whoever
            # had it before is gone.
            raise error(errno.ESTALE) if e.errno == errno.ENOMEM else e from None

    def _generation_on_xfs(self, inode: int) -> int:
        # Of a number that no inode has it is the next one's: xfs does not open that by this number.
        request = bytearray(_BULK_SIZE)
        _BULK.pack_into(request, 0, inode, 0, 1)
        fcntl.ioctl(self._top, _XFS_IOC_BULKSTAT, request)
        (generation,) = _BULK_GENERATION.unpack_from(request, _BULK_HEADER)
        return int(generation)


def inodes_of(directory: int) -> Inodes | None:
    """The inodes of the file system that a directory is the root of; None: they cannot be had.

    It takes CAP_DAC_READ_SEARCH, on xfs CAP_SYS_ADMIN as well. Blocks.

    Args:
        directory: O_PATH will do.
    """
    top = -1
    try:
        if file_system_of(directory).opens_numbers and stat_descriptor(directory).has_birth:
            top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            return Inodes(top)
    except OSError:
        if top >= 0:
            os.close(top)
    return None
