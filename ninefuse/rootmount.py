"""Mounting as root, by mount(2) and not by libfuse.

libfuse cannot ask for MS_POSIXACL. Without it the kernel applies the caller's umask to the
mode of each new file before it asks us, also where the directory has a default ACL, which
is to be used instead of the umask. With it the mode comes as the caller gave it and the umask
beside it, and the source's file system is asked to do what is right (credentials.py).

Source: libfuse's lib/mount.c, for the options; Linux fs/fuse/inode.c, where MS_POSIXACL sets
dont_mask; umask(2).

Locks touched: none.
"""

from __future__ import annotations

import logging
import os
import re

from ninefuse import preflight, syscalls
from ninefuse.options import Settings

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


def mount(settings: Settings) -> int | None:
    """Mount, if we may.

    Returns:
        The device, open, on which requests come: ``/dev/fd/N`` for libfuse. None where it is
        for libfuse to mount: for users other than root, and for auto_unmount, which is the
        work of fusermount3; also where mount(2) fails, so that there is one who says why.
    """
    if os.geteuid() != 0 or preflight.is_descriptor(settings.mountpoint):
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
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        mode = os.stat(settings.mountpoint).st_mode
        data += [f"fd={device}", f"rootmode={mode:o}", "user_id=0", f"group_id={os.getegid()}"]
        syscalls.mount(fsname, settings.mountpoint, f"fuse.{subtype}", flags, ",".join(data))
    except OSError as e:
        log.debug("mount(2) says: %s; libfuse is to try", e.strerror)
        os.close(device)
        return None
    return device


def detach(mountpoint: str) -> None:
    """Undo `mount`; what is still in use ends later."""
    try:
        syscalls.detach(mountpoint)
    except OSError as e:
        log.warning("%s: cannot unmount: %s", mountpoint, e.strerror)
