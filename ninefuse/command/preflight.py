"""The checks before the mount: whatever can be known beforehand is said in one clear line.

Locks touched: none.
"""

import dataclasses
import errno
import os
import select
import shlex
import shutil
import signal
import stat

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse import mounting
from ninefuse.linux import capabilities, mountinfo
from ninefuse.linux.syscalls import proc_path
from ninefuse.process import ownfile
from ninefuse.settings import FUSE_DEVICE, Settings

FUSE_CONF = "/etc/fuse.conf"
FUSERMOUNT = "fusermount3"

# How long a directory may take to answer stat(2) before it counts as hung, in seconds.
STAT_TIMEOUT = 5.0

# What stat(2) says about the mount point of a FUSE daemon that has died (ENOTCONN) or whose
# connection was aborted.
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)


def check(settings: Settings) -> Settings:
    """Check that the mount can work; call this before anything is forked or mounted.

    Returns the settings with the mount point's real path: it is that which was checked, and which
    the kernel will show. Raises Failure with an exit code of its own for each thing that is wrong.
    """
    check_source(settings.source)
    if settings.data == "kernel":
        _check_may_pass()
    if settings.is_handed_over:
        _check_handed_over(settings.source, settings.mountpoint)
        return settings  # there is nothing left to look at or to mount
    _check_mountpoint(settings.mountpoint)
    real = _real_mountpoint(settings.mountpoint)
    _check_overlap(settings.source, settings.mountpoint, real)
    _check_device()
    # As root libfuse mounts by itself, but auto_unmount is the work of fusermount3.
    if os.geteuid() != 0 or "auto_unmount" in settings.mount_options:
        _check_fusermount()
    if settings.allow_other and os.geteuid() != 0:
        _check_allow_other()
    return dataclasses.replace(settings, mountpoint=real)


def check_source(source: str) -> None:
    """Check that a directory is there and can be served; raises Failure."""
    if not _answers(source):
        raise Failure(
            ExitCode.SOURCE_UNREADABLE,
            f"source {source} does not answer within {STAT_TIMEOUT:g} s: "
            "check the disk or server that it is on",
        )
    try:
        mode = _ask(source).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Failure(
            ExitCode.SOURCE_MISSING, f"source {source} does not exist: create it or check the name"
        ) from None
    except OSError as error:
        raise Failure(
            ExitCode.SOURCE_UNREADABLE,
            f"source {source} cannot be reached ({error.strerror}): check its permissions and "
            "those of the directories above it",
        ) from None
    if not stat.S_ISDIR(mode):
        raise Failure(
            ExitCode.SOURCE_NOT_DIRECTORY, f"source {source} is not a directory: give a directory"
        )
    if not os.access(source, os.R_OK | os.X_OK, effective_ids=True):
        raise Failure(
            ExitCode.SOURCE_UNREADABLE,
            f"source {source} may not be listed and entered by you: "
            "check its permissions (r and x are needed)",
        )


def _check_may_pass() -> None:
    if not capabilities.get_capabilities().effective & capabilities.CAP_SYS_ADMIN:
        raise Failure(
            ExitCode.USAGE,
            "-o data=kernel takes CAP_SYS_ADMIN: mount as root, or leave it out",
        )


def _check_mountpoint(mountpoint: str) -> None:
    undo = f"unmount it with: fusermount3 -u {shlex.quote(mountpoint)}"
    if not _answers(mountpoint):
        raise Failure(
            ExitCode.MOUNTPOINT_DEAD,
            f"mount point {mountpoint} does not answer within {STAT_TIMEOUT:g} s: end the daemon "
            f"that is mounted there, or {undo}",
        )
    try:
        mode = _ask(mountpoint).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Failure(
            ExitCode.MOUNTPOINT_MISSING,
            f"mount point {mountpoint} does not exist: create it with mkdir",
        ) from None
    except OSError as error:
        if error.errno in _DEAD:
            raise Failure(
                ExitCode.MOUNTPOINT_DEAD,
                f"mount point {mountpoint} holds a dead mount ({error.strerror}): {undo}",
            ) from None
        raise _unreachable(mountpoint, error) from None
    if not stat.S_ISDIR(mode):
        raise Failure(
            ExitCode.MOUNTPOINT_NOT_DIRECTORY,
            f"mount point {mountpoint} is not a directory: give a directory",
        )


def _unreachable(mountpoint: str, error: OSError) -> Failure:
    # One cause is a live FUSE mount of another user: it shuts out everybody else, root too.
    return Failure(
        ExitCode.MOUNT_REFUSED,
        f"mount point {mountpoint} cannot be reached ({error.strerror}): check its "
        "permissions, and that no other user has a mount there",
    )


def _real_mountpoint(mountpoint: str) -> str:
    """The real path of the mount point; root follows no symlink that others can put there."""
    if os.geteuid() != 0:
        return os.path.realpath(mountpoint)
    try:
        parent, name = ownfile.place_of(mountpoint)
        try:
            if ownfile.is_private(parent):
                return os.path.realpath(mountpoint)
            real = os.path.join(os.readlink(proc_path(parent)), name)
        finally:
            os.close(parent)
    except OSError as error:
        raise _unreachable(mountpoint, error) from None
    if os.path.islink(real):
        raise Failure(
            ExitCode.MOUNT_REFUSED,
            f"mount point {mountpoint} is a symlink in a directory that others may write: "
            "give what it is to lead to",
        )
    return real


def _check_overlap(source: str, mountpoint: str, real_mountpoint: str) -> None:
    real_source = os.path.realpath(source)
    if _is_same(real_source, real_mountpoint):
        raise Failure(
            ExitCode.SAME_DIRECTORY,
            f"{source} and {mountpoint} are the same directory: give another mount point",
        )
    there = mountinfo.on_top(real_mountpoint)
    names = (os.fsencode(source), os.fsencode(real_source))
    if there and os.fsdecode(there.kind) == mountinfo.OURS and there.source in names:
        # A second daemon would cover the first, and what programs have open stays with that.
        raise Failure(
            ExitCode.SAME_DIRECTORY,
            f"{source} is mounted on {mountpoint} already: give another mount point, or unmount "
            f"it first with: fusermount3 -u {shlex.quote(mountpoint)}",
        )
    if _is_inside(real_mountpoint, real_source):
        raise _inside_source(source, mountpoint)
    if _is_inside(real_source, real_mountpoint):
        raise Failure(
            ExitCode.SOURCE_INSIDE_MOUNTPOINT,
            f"source {source} lies inside the mount point {mountpoint}, which would hide it: "
            "give a mount point outside",
        )


def _check_handed_over(source: str, mountpoint: str) -> None:
    """Check a mount that somebody else has made; it must not be touched before it is served."""
    # Before we open files of our own, which may get this number.
    known = mountinfo.of_device(mounting.handed_over(mountpoint))
    if known is None:
        return
    point, options = known
    if "allow_other" in options and "default_permissions" not in options:
        raise Failure(
            ExitCode.MOUNT_REFUSED,
            f"the mount on {point} lets other users in, and nobody would check what they may do: "
            "have it made with default_permissions",
        )
    if point.startswith(os.path.join(os.path.realpath(source), "")):
        raise _inside_source(source, point)


def _inside_source(source: str, mountpoint: str) -> Failure:
    return Failure(
        ExitCode.MOUNTPOINT_INSIDE_SOURCE,
        f"mount point {mountpoint} lies inside the source {source}, so that requests would "
        "come back into the daemon and freeze it: give a mount point outside",
    )


def _check_device() -> None:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        raise Failure(
            ExitCode.FUSE_DEVICE_DENIED,
            f"{FUSE_DEVICE} may not be opened ({error.strerror}): "
            "have root allow it (chmod 666, or the container's device rules)",
        ) from None
    except OSError as error:
        raise Failure(
            ExitCode.NO_FUSE_DEVICE,
            f"there is no usable {FUSE_DEVICE} ({error.strerror}): load the kernel module with "
            f"modprobe fuse, or give the container the device (--device {FUSE_DEVICE})",
        ) from None


def _check_fusermount() -> None:
    if shutil.which(FUSERMOUNT) is None:
        raise Failure(
            ExitCode.NO_FUSERMOUNT,
            f"{FUSERMOUNT} is not on the PATH: install the package fuse3",
        )


def _check_allow_other() -> None:
    try:
        with open(FUSE_CONF, encoding="utf-8", errors="replace") as conf:
            lines = [line.partition("#")[0].strip() for line in conf]
    except OSError:
        # fusermount3 takes a file that it cannot read for an empty one too.
        lines = []
    if "user_allow_other" not in lines:
        raise Failure(
            ExitCode.ALLOW_OTHER_DENIED,
            f"allow_other is not allowed to users: have root put the line user_allow_other into "
            f"{FUSE_CONF}, or leave the option out",
        )


def _is_same(one: str, other: str) -> bool:
    """Return whether two paths lead to one directory. Bind mounts give it more than one name."""
    return one == other or os.path.samestat(os.stat(one), os.stat(other))


def _is_inside(path: str, directory: str) -> bool:
    """Return whether directory is one of the directories above path.

    Both are real paths. Each directory above is compared by device and inode too, since a bind
    mount can give the outer one a name that the inner path does not show.
    """
    above = path
    while above != os.path.dirname(above):
        above = os.path.dirname(above)
        if _is_same(above, directory):
            return True
    return False


def _ask(path: str) -> os.stat_result:
    """stat(2), and on a FUSE mount statfs(2) first: that is never answered from memory.

    Elsewhere it is left out, since it would wait for an automount that waits for us (systemd's).
    """
    if mountinfo.kind_at(os.path.realpath(path)).partition(".")[0] in ("fuse", "fuseblk"):
        os.statvfs(path)
    return os.stat(path)


def _answers(path: str) -> bool:
    """Return whether `_ask` of path comes back, with whatever result, within STAT_TIMEOUT.

    It runs in a child process, since a thread that is stuck in a hung mount could neither be
    left behind nor be taken across a fork. Not covered: a mount that hangs only after this
    answer, and one that hangs so that even SIGKILL has to wait for it; then the child stays
    behind until the mount answers or is gone.
    """
    done, child_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Its end is all that it reports: the end closes the pipe.
        try:
            _ask(path)
        finally:
            os._exit(0)
    os.close(child_end)
    try:
        answered = bool(select.select([done], [], [], STAT_TIMEOUT)[0])
    finally:
        os.close(done)
    if answered:
        os.waitpid(pid, 0)
    else:
        os.kill(pid, signal.SIGKILL)
    return answered
