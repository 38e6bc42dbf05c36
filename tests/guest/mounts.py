"""What runs in the guest beside programs.py: mounts of v9fs, and other programs on them.

What holds for programs.py holds here: the host sends it there (machine.PROGRAMS).
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import pathlib
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
BLOCK = 4096


def error_of(call: Callable[..., object], *arguments: object) -> str:
    """Call a function; the name of the error that it fails with, "" if it does not."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


# Mounting


def mount(device: str, where: str, options: str) -> None:
    """Mount 9p on a directory, which is made. Raises OSError."""
    os.makedirs(where, exist_ok=True)
    words = (device.encode(), where.encode(), b"9p", 0, options.encode())
    if _libc.mount(*words):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"{device} with {options}")


def mount_by_descriptor(host: str, port: int, where: str, options: str) -> None:
    """Mount over a socket that we connect ourselves (trans=fd). Raises OSError."""
    with socket.create_connection((host, port)) as connection:
        number = connection.fileno()
        mount("9p", where, f"trans=fd,rfdno={number},wfdno={number},{options}")


def mount_by_serial_port(name: str, where: str, options: str) -> Iterator[str]:
    """Mount over a virtio serial port, for as long as this runs.

    v9fs reads and writes sockets and pipes only, so threads carry its bytes to and from the port.
    The first that is yielded is what the port itself is refused with.
    """
    (device,) = [
        path.parent.name
        for path in pathlib.Path("/sys/class/virtio-ports").glob("*/name")
        if path.read_text().strip() == name
    ]
    port = os.open(f"/dev/{device}", os.O_RDWR)
    yield error_of(mount, "9p", where, f"trans=fd,rfdno={port},wfdno={port},{options}")
    os.close(port)  # which v9fs has made non-blocking meanwhile
    port = os.open(f"/dev/{device}", os.O_RDWR)
    ours, theirs = socket.socketpair()

    def carry(source: int, target: int) -> None:
        while data := os.read(source, 1 << 16):
            while data:
                data = data[os.write(target, data) :]

    for ends in ((port, ours.fileno()), (ours.fileno(), port)):
        threading.Thread(target=carry, args=ends, daemon=True).start()
    number = theirs.fileno()
    mount("9p", where, f"trans=fd,rfdno={number},wfdno={number},{options}")
    yield "mounted"
    unmount(where)


def unmount(where: str) -> None:
    """Unmount, at once even if something is open there. Raises OSError."""
    if _libc.umount2(where.encode(), _MNT_DETACH):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), where)


def write_back() -> None:
    """Have the kernel write all that it holds back."""
    os.sync()


# Programs


def program(words: list[str], directory: str) -> str:
    """Run a program that must succeed; what it printed."""
    done = subprocess.run(
        words, cwd=directory, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stderr[-2000:]}"
    return done.stdout


def digests(top: str) -> dict[str, str]:
    """Read all regular files of a tree; the SHA-256 of each, by its path."""
    found = {}
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb") as file:
                    content = file.read()
                found[os.path.relpath(path, top)] = hashlib.sha256(content).hexdigest()
    return found


# The experiment of 2010


def parallel_dd(where: str, clients: int, count: int) -> list[float]:
    """Run so many dd at once, each writing blocks synchronously to a file; then remove the files.

    Real seconds from the first's start to the last's end, and the user and system seconds of all.
    """
    files = [f"{where}/dd-{time.monotonic_ns()}-{number}" for number in range(clients)]
    begin = time.monotonic()
    running = [
        subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={file}", "bs=4k", f"count={count}", "oflag=sync"],
            stderr=subprocess.DEVNULL,
        )
        for file in files
    ]
    used = [0.0, 0.0]
    for one in running:
        _, status, usage = os.wait4(one.pid, 0)
        one.returncode = status
        assert status == 0, f"a dd ended with {status}"
        used = [used[0] + usage.ru_utime, used[1] + usage.ru_stime]
    seconds = time.monotonic() - begin
    for file in files:
        assert os.stat(file).st_size == count * BLOCK, file
        os.unlink(file)
    return [seconds, *used]


# Conformance


def conformance(tests: str, work: str, patterns: str) -> Iterator[str]:
    """Run pjdfstest's files that one of the patterns matches, from memory, on the mount.

    Yields what prove(1) printed for each file, whatever failed.
    """
    here = "/tmp/pjdfstest"
    subprocess.run(["cp", "-a", tests, here], check=True)
    os.makedirs(work)
    top = pathlib.Path(here, "tests")
    for file in sorted(path for pattern in patterns.split(",") for path in top.glob(pattern)):
        done = subprocess.run(
            ["prove", str(file)],
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        yield done.stdout + done.stderr
    yield ""
