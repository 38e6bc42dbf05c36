"""Getting the FUSE device without libfuse, and giving it up again.

Root mounts by mount(2) (rootmount.py), users and auto_unmount by fusermount3 (fusermount.py), and
a device that is handed over as /dev/fd/N has been mounted by somebody else.

Locks touched: none.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse import fusermount, rootmount
from ninefuse.linux import capabilities, mountinfo
from ninefuse.settings import FUSE_DEVICE, Settings

_FUSE_NUMBERS = os.makedev(10, 229)


class Mounted(NamedTuple):
    """A mount that was made, and what ends it.

    Attributes:
        device: what requests are read from: non-blocking, close-on-exec.
        number: of the mount's connection, by which it is known from another one on the same
            place; None for one that was handed over, which is not ours to unmount.
        point: where it is, if root has made it by mount(2). Modes of new files come as they
            were asked for then, with the caller's umask beside them; else without what it takes.
        keeper: the descriptor by which fusermount3 knows that we live; None without auto_unmount.
    """

    device: int
    number: int | None = None
    point: rootmount.MountPoint | None = None
    keeper: int | None = None


def mount(settings: Settings) -> Mounted:
    """Mount, or take over what is mounted. Blocks.

    Raises:
        Failure: MOUNT_REFUSED, with the reason.
    """
    if settings.is_handed_over:
        mounted = Mounted(handed_over(settings.mountpoint))
        # Its maker may have given it to us with any flags, and sees these.
        os.set_inheritable(mounted.device, False)
    else:
        mounted = _made(settings)
    os.set_blocking(mounted.device, False)
    return mounted


def unmount(mounted: Mounted, mountpoint: str) -> None:
    """Detach what is still ours at the mount point. Blocks.

    To be called when the device was let go of: whoever waits for an answer, the unmounting too, has
    an error then. What was handed over is left to its maker.

    Args:
        mounted: as `mount` returned it.
        mountpoint: its real path.
    """
    if mounted.point is not None:
        mounted.point.detach()
    elif mounted.number is not None and mountinfo.connection_at(mountpoint) == mounted.number:
        fusermount.unmount(mountpoint)
    if mounted.keeper is not None:
        os.close(mounted.keeper)


def handed_over(mountpoint: str) -> int:
    """The descriptor that ``/dev/fd/N`` names.

    Raises:
        Failure: MOUNT_REFUSED, it is no open FUSE device.
    """
    number = int(mountpoint.rpartition("/")[2])
    try:
        status = os.fstat(number)
    except (OSError, OverflowError):
        status = None
    if status is None or not (stat.S_ISCHR(status.st_mode) and status.st_rdev == _FUSE_NUMBERS):
        raise Failure(
            ExitCode.MOUNT_REFUSED,
            f"descriptor {number} is not an open {FUSE_DEVICE}: mount with one, and hand it on",
        )
    return number


def refused(mountpoint: str, reason: str) -> Failure:
    """The failure of a mount, with what can be done about it."""
    if capabilities.can_become_able_to_mount():
        advice = "mounting takes CAP_SYS_ADMIN, or fusermount3 and a mount point of one's own"
    else:
        advice = (
            "nobody may mount in here, not even root, without CAP_SYS_ADMIN: start the "
            f"container with --cap-add SYS_ADMIN --device {FUSE_DEVICE}"
        )
    return Failure(ExitCode.MOUNT_REFUSED, f"cannot mount on {mountpoint}: {reason} ({advice})")


def _made(settings: Settings) -> Mounted:
    mountpoint = settings.mountpoint
    try:
        made = rootmount.mount(settings)
        if made is not None:
            device, point = made
            return Mounted(device, point.number, point)
        device, keeper = fusermount.mount(mountpoint, settings.mount_options)
    except OSError as e:
        raise refused(mountpoint, e.strerror or str(e)) from None
    except fusermount.Refused as reason:
        raise refused(mountpoint, str(reason)) from None
    there = mountinfo.connection_at(mountpoint)
    number = mountinfo.connection_of(device)
    mounted = Mounted(device, there if number is None else number, keeper=keeper)
    if os.geteuid() == 0 and (there is None or there != mounted.number):
        os.close(device)  # and fusermount3 unmounts
        if keeper is not None:
            os.close(keeper)
        raise rootmount.exchanged(mountpoint)
    return mounted
