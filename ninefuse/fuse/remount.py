"""Changing a mount that is there: `mount -o remount,ro MNT` and its like.

mount(8) runs us for it, as for a mount, with the words of /etc/fstab or of the mount table before
those that it was given. The kernel changes what it decides by itself, which the daemon need not
know of: ro and rw, noexec, the keeping of access times. What the daemon was told when it
was started it keeps to: the words for that are passed over, since mount(8) gives all of them.

Locks touched: none.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterable

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.linux import mountflags, mountinfo, syscalls

_REMOUNT, _RELATIME, _STRICTATIME = 0x20, 0x200000, 0x1000000
_NOATIME, _NODIRATIME = 0x400, 0x800
_ATIMES = _NOATIME | _RELATIME | _STRICTATIME

# What each word that the table or an option has takes from the flags, and adds to them.
_FLAGS = {
    "rw": (0x1, 0),
    "ro": (0, 0x1),
    "nosuid": (0, 0x2),
    "nodev": (0, 0x4),
    "exec": (0x8, 0),
    "noexec": (0, 0x8),
    "sync": (0, 0x10),
    "dirsync": (0, 0x80),
    "diratime": (_NODIRATIME, 0),
    "nodiratime": (0, _NODIRATIME),
    "noatime": (_ATIMES, _NOATIME),
    "relatime": (_ATIMES, _RELATIME),
    "strictatime": (_ATIMES, _STRICTATIME),
    "atime": (_ATIMES, _RELATIME),
    "norelatime": (_ATIMES, _RELATIME),
    "nostrictatime": (_ATIMES, _RELATIME),
}
_ATIME_WORDS = frozenset(word for word in _FLAGS if word.endswith("atime"))
# The daemon makes durable what it was told to when it was started.
_DAEMONS = ("sync", "dirsync")


def change(source: str, mountpoint: str, words: Iterable[str]) -> None:
    """Have the kernel change a mount of ours.

    nosuid and nodev are never taken away: what file systems in the source forbid is hidden by
    the daemon only if the mount did not forbid it from the first (mountflags.py).

    Args:
        source: what is mounted. What its own mount forbids by noexec stays forbidden.
        mountpoint: where it is.
        words: what is to be changed, in the words of mount(8).

    Raises:
        Failure: there is no such mount, or the kernel refuses.
    """
    try:
        point = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise _none_there(mountpoint) from None
    try:
        line = mountinfo.of_file(point)
        place = os.fsencode(os.readlink(syscalls.proc_path(point)))
        if line is None or line.kind.partition(b".")[0] != b"fuse" or line.point != place:
            raise _none_there(mountpoint)
        now = [*os.fsdecode(line.options).split(","), *os.fsdecode(line.flags).split(",")]
        if "ro" in now:  # the mount or its file system, which may be mounted elsewhere, too
            now.append("ro")
        asked = list(words)
        # mount(8) gives all words that are to hold: exec, which is the rule, is not among them.
        if "noexec" in now and "noexec" not in asked and not _is_noexec(source):
            now.remove("noexec")
        if not _ATIME_WORDS.isdisjoint(asked):
            now = [word for word in now if word not in _ATIME_WORDS]
        for word in asked:
            if word in _DAEMONS and word not in now:
                raise Failure(
                    ExitCode.USAGE,
                    f"-o remount,{word}: that is for the daemon to do, which is told when it is "
                    "started: unmount, and mount anew",
                )
        flags = _flags_of([*now, *asked])
        try:
            syscalls.mount("none", syscalls.proc_path(point), "fuse", _REMOUNT | flags, "")
        except OSError as e:
            raise _refused(mountpoint, e) from None
    finally:
        os.close(point)


def _is_noexec(source: str) -> bool:
    try:
        return bool(os.statvfs(source).f_flag & mountflags.NOEXEC)
    except OSError:
        return True  # it has another name (fsname=), say: who knows


def _flags_of(words: Iterable[str]) -> int:
    flags = _RELATIME
    for word in words:
        taken, added = _FLAGS.get(word, (0, 0))
        flags = flags & ~taken | added
    return flags


def _none_there(mountpoint: str) -> Failure:
    return Failure(
        ExitCode.USAGE, f"-o remount: nothing of ours is mounted on {mountpoint}: mount it first"
    )


def _refused(mountpoint: str, e: OSError) -> Failure:
    if e.errno == errno.EBUSY:
        return Failure(
            ExitCode.MOUNT_REFUSED,
            f"{mountpoint} cannot be made read-only: files are open for writing there, which "
            f"fuser -vm {shlex.quote(mountpoint)} shows: end the programs",
        )
    return Failure(
        ExitCode.MOUNT_REFUSED,
        f"cannot remount {mountpoint}: {e.strerror or e} (changing a mount takes root)",
    )
