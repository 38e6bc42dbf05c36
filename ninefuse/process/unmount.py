"""Unmounts a mount from outside the daemon that serves it.

A program of its own: unmounting writes dirty pages back, into the very daemon that
would be waiting for the unmount to end. Run as

    python -I unmount.py [--detach] MNT [PARENT NUMBER]

it exits with 0 once MNT is unmounted. A busy MNT is detached (nobody finds it any more,
those who use it go on): this is said on stdout with the line "detached", and the mount
is kept alive until stdin is closed, so that what is still mapped can be written back
once more at the very end. With --detach it is detached at once, and that is all.

PARENT is an open descriptor of the directory that MNT is in, and NUMBER the mount's
connection, where root has made it: others may exchange what MNT's path leads to, and so
the mount is found by these. Without them it is fusermount3 that looks at what it unmounts.

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
import sys

_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000
_DEVICE_AT = 0x88  # of struct statx
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None)


class ByPath:
    """A mount that a user has made, or libfuse."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = mountpoint

    def unmount(self, *, lazy: bool) -> bool:
        """Unmount it, or detach it; whether that was possible."""
        for program, flags in (
            ("fusermount3", ["-u", "-z"] if lazy else ["-u"]),
            ("umount", ["-l"] if lazy else []),
        ):
            if shutil.which(program) is None:
                continue
            command = [program, *flags, "--", self._mountpoint]
            if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0:
                return True
        return False

    def open(self) -> int:
        """A descriptor of its root."""
        return os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY)


class ByParent:
    """A mount that root has made."""

    def __init__(self, parent: int, name: str, number: int) -> None:
        self._parent = parent
        self._name = name
        self._number = number

    def unmount(self, *, lazy: bool) -> bool:
        """Unmount it, or detach it; whether that was possible."""
        try:
            top = self._open(os.O_PATH)
        except OSError:
            return False
        if lazy:
            done = _umount(f"/proc/self/fd/{top}", _MNT_DETACH)
            os.close(top)
            return done
        # A descriptor would keep it busy. What is mounted on a name is not exchanged, but by
        # being unmounted.
        os.close(top)
        return _umount(f"/proc/self/fd/{self._parent}/{self._name}", _UMOUNT_NOFOLLOW)

    def open(self) -> int:
        """A descriptor of its root."""
        return self._open(os.O_RDONLY | os.O_DIRECTORY)

    def _open(self, flags: int) -> int:
        fd = os.open(self._name, flags | os.O_NOFOLLOW, dir_fd=self._parent)
        if _device(fd) != (0, self._number):
            os.close(fd)
            raise FileNotFoundError(self._name)
        return fd


def _device(fd: int) -> tuple[int, int]:
    """The device of an open file, which is not asked (statx(2), for no field at all)."""
    buffer = ctypes.create_string_buffer(256)
    _libc.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, buffer)
    major, minor = struct.unpack_from("=II", buffer, _DEVICE_AT)
    return major, minor


def _umount(path: str, flags: int) -> bool:
    done: int = _libc.umount2(os.fsencode(path), flags)
    return done == 0


def main(words: list[str]) -> int:
    """Unmount, or detach and wait; see the module's docstring."""
    at_once = words[0] == "--detach"
    mountpoint, *place = words[1:] if at_once else words
    mount: ByPath | ByParent = ByPath(mountpoint)
    if place:
        parent, number = map(int, place)
        mount = ByParent(parent, os.path.basename(mountpoint), number)
    if at_once:
        return 0 if mount.unmount(lazy=True) else 1
    if mount.unmount(lazy=False):
        return 0
    directory = -1
    with contextlib.suppress(OSError):
        directory = mount.open()
        _libc.syncfs(directory)
    if not mount.unmount(lazy=True):
        return 1
    print("detached", flush=True)
    sys.stdin.read()
    if directory >= 0:
        _libc.syncfs(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
