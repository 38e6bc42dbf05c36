"""Unmounts a mount from outside the daemon that serves it.

A program of its own: unmounting writes dirty pages back, into the very daemon that
would be waiting for the unmount to end. Run as

    python -I unmount.py MNT

it exits with 0 once MNT is unmounted. A busy MNT is detached (nobody finds it any more,
those who use it go on): this is said on stdout with the line "detached", and the mount
is kept alive until stdin is closed, so that what is still mapped can be written back
once more at the very end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys


def _unmount(mountpoint: str, *, lazy: bool) -> bool:
    for program, flags in (
        ("fusermount3", ["-u", "-z"] if lazy else ["-u"]),
        ("umount", ["-l"] if lazy else []),
    ):
        if shutil.which(program) is None:
            continue
        command = [program, *flags, "--", mountpoint]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return True
    return False


def _sync(directory: int) -> None:
    ctypes.CDLL(None).syncfs(directory)


def main(mountpoint: str) -> int:
    """Unmount, or detach and wait; see the module's docstring."""
    if _unmount(mountpoint, lazy=False):
        return 0
    directory = -1
    with contextlib.suppress(OSError):
        directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        _sync(directory)
    if not _unmount(mountpoint, lazy=True):
        return 1
    print("detached", flush=True)
    sys.stdin.read()
    if directory >= 0:
        _sync(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
