"""Mounting as root, by mount(2) and not by libfuse.

libfuse cannot ask for MS_POSIXACL. Without it the kernel applies the caller's umask to the
mode of each new file before it asks us, also where the directory has a default ACL, which
is to be used instead of the umask. With it the mode comes as the caller gave it and the umask
beside it, and the source's file system is asked to do what is right (credentials.py).

A mount point may lie in a directory that others may write, and who exchanges it for a symlink
would have root mount, or unmount, elsewhere. So it is opened once, and compared with what
preflight has checked; the mount is made by that descriptor, and found again by its parent's.

Source: libfuse's lib/mount.c, for the options; Linux fs/fuse/inode.c, where MS_POSIXACL sets
dont_mask; umask(2).

Locks touched: none.
"""

from __future__ import annotations

import errno
import logging
import os
import re

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.linux import syscalls
from ninefuse.linux.syscalls import proc_path
from ninefuse.settings import FUSE_DEVICE, Settings

log = logging.getLogger(__name__)

_NOSUID, _NODEV, _POSIXACL = 0x2, 0x4, 0x10000

# What each word of mount(8) takes from the flags, and adds to them.
_FLAGS = {
    "rw": (0x1, 0),
    "ro": (0, 0x1),
    "suid": (_NOSUID, 0),
    "nosuid": (0, _NOSUID),
    "dev": (_NODEV, 0),
    "nodev": (0, _NODEV),
    "exec": (0x8, 0),
    "noexec": (0, 0x8),
    "async": (0x10, 0),
    "sync": (0, 0x10),
    "dirsync": (0, 0x80),
    "atime": (0x400, 0),
    "noatime": (0, 0x400),
}


class MountPoint:
    """The place of a mount that root has made; it stays the same whatever becomes of its path.

    The descriptor of its parent is kept until the process ends. One of the mount itself would
    keep it busy.

    Attributes:
        parent: an O_PATH descriptor of the directory that it is in.
        name: its name there.
        number: the mount's connection, by which it is known from another one on the same place.

    Args:
        point: an O_PATH descriptor of the directory that was just mounted on.
    """

    def __init__(self, point: int) -> None:
        # What is mounted on cannot be renamed, but before.
        self.name = os.path.basename(_path_of(point))
        self.parent = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=point)
        self.number = self._device()[1]

    def is_ours(self) -> bool:
        """Whether it is our mount that lies on top there. The mount is not asked."""
        return self._device() == (0, self.number)

    def detach(self) -> None:
        """Unmount; what is still in use ends later."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            top = os.open(self.name, flags, dir_fd=self.parent)
            try:
                if syscalls.device_behind(top, b"") == (0, self.number):
                    syscalls.detach(proc_path(top))
            finally:
                os.close(top)
        except OSError as e:
            log.warning("%s: cannot unmount: %s", self.name, e.strerror)

    def _device(self) -> tuple[int, int]:
        return syscalls.device_behind(self.parent, os.fsencode(self.name))


def mount(settings: Settings) -> tuple[int, MountPoint] | None:
    """Mount, if we may.

    Returns:
        The device, open, on which requests come: ``/dev/fd/N`` for libfuse; and where it is
        mounted. None where it is for fusermount3 to mount, started by libfuse or by us: for users
        other than root, and for auto_unmount; also where root may not mount, so that there is one
        who says why.

    Raises:
        Failure: another directory has come in the place of the mount point.
        OSError: of mount(2).
    """
    if os.geteuid() != 0 or settings.is_handed_over:
        return None
    flags = _POSIXACL | _NOSUID | _NODEV
    fsname, subtype, data = "", "", ["default_permissions"]
    for word in settings.mount_options:
        name, _, value = word.partition("=")
        if name == "fsname":
            fsname = re.sub(r"\\(.)", r"\1", value)
        elif name == "subtype":
            subtype = value
        elif name == "allow_other":
            data.append(name)
        elif name in _FLAGS:
            taken, added = _FLAGS[name]
            flags = flags & ~taken | added
        elif name != "default_permissions":
            return None
    device = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        place = _mount_on(settings.mountpoint, device, fsname, subtype, flags, data)
    except BaseException:
        os.close(device)  # which ends the mount, too, if there is one
        raise
    if place is None:
        os.close(device)
        return None
    return device, place


def _mount_on(
    mountpoint: str, device: int, fsname: str, subtype: str, flags: int, data: list[str]
) -> MountPoint | None:
    point = _opened(mountpoint)
    try:
        mode = os.fstat(point).st_mode
        data += [f"fd={device}", f"rootmode={mode:o}", "user_id=0", f"group_id={os.getegid()}"]
        try:
            syscalls.mount(fsname, proc_path(point), f"fuse.{subtype}", flags, ",".join(data))
        except OSError as e:
            if e.errno != errno.EPERM:
                raise
            log.debug("mount(2) says: %s; libfuse is to try", e.strerror)
            return None
        try:
            place = MountPoint(point)
        except OSError:  # no descriptor is left for it; this one leads to what lies on top
            syscalls.detach(proc_path(point))
            raise
        if _path_of(point) != mountpoint:
            place.detach()
            raise exchanged(mountpoint)
        return place
    finally:
        os.close(point)


def _opened(mountpoint: str) -> int:
    """An O_PATH descriptor of the mount point that was checked, of no other directory."""
    try:
        point = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
            raise exchanged(mountpoint) from None
        raise
    if _path_of(point) != mountpoint:
        os.close(point)
        raise exchanged(mountpoint)
    return point


def _path_of(fd: int) -> str:
    return os.readlink(proc_path(fd))


def exchanged(mountpoint: str) -> Failure:
    """The failure of a mount that would not be, or is not, where it was to be."""
    return Failure(
        ExitCode.MOUNT_REFUSED,
        f"mount point {mountpoint} is not the directory that was checked: somebody exchanges it; "
        "give one in a directory that only you may write",
    )
