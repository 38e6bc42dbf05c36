"""A FUSE file system whose data never comes.

    python stuckfs.py MNT

Every name in its root that is a number is a file of 1 MiB, which any user may open and map. No
read is ever answered: whoever touches such memory, or passes it to a system call, waits until the
connection is aborted. It speaks to /dev/fuse itself, so that it can be started in no time and has
no thread that could answer anything by mistake. For root, on Linux 5.4 and later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys

SIZE = 1 << 20  # of each file
_ROOT = 1
_FIRST = 2  # inode of the file 0
_FOREVER = 86400

# Opcodes and flags of include/uapi/linux/fuse.h.
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS = 1, 2, 3, 14, 15, 17
_RELEASE, _INIT, _OPENDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 18, 26, 27, 29, 36, 42
_NEVER_ANSWERED = {_FORGET, _READ, _INTERRUPT, _BATCH_FORGET}
_ASYNC_READ, _PARALLEL_DIROPS = 1 << 0, 1 << 18
_KEEP_CACHE = 1 << 1  # else an open would wait for the pages that are being read

_HEADER = struct.Struct("=IIQQIIII")  # length, opcode, unique, nodeid, uid, gid, pid, …
_ANSWER = struct.Struct("=IiQ")  # length, error, unique
_ATTRIBUTES = struct.Struct("=6Q10I")
_INIT_IN = struct.Struct("=4I")
_INIT_OUT = struct.Struct("=4I2H2I2H8I")
_BUFFER = (1 << 20) + 4096


def main(mountpoint: str) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"stuckfs", os.fsencode(mountpoint), b"fuse.stuckfs", 0, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), mountpoint)
    while True:
        try:
            request = os.read(fd, _BUFFER)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted, or aborted
                return
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            raise
        _, opcode, unique, nodeid, *_ = _HEADER.unpack_from(request)
        if opcode in _NEVER_ANSWERED:
            continue
        try:
            code, data = 0, _answer(opcode, nodeid, request[_HEADER.size :])
        except OSError as error:
            code, data = -(error.errno or errno.EIO), b""
        try:
            os.write(fd, _ANSWER.pack(_ANSWER.size + len(data), code, unique) + data)
        except FileNotFoundError:
            continue  # who asked is gone
        if opcode == _INIT:
            print("ready", flush=True)


def _answer(opcode: int, nodeid: int, data: bytes) -> bytes:
    if opcode == _INIT:
        _, minor, read_ahead, flags = _INIT_IN.unpack_from(data)
        flags &= _ASYNC_READ | _PARALLEL_DIROPS
        background = 65535
        limits = (background, background, 1 << 20, 1, 256, 0)
        return _INIT_OUT.pack(7, min(minor, 31), read_ahead, flags, *limits, *[0] * 8)
    if opcode == _LOOKUP:
        name = data.rstrip(b"\0")
        if not name.isdigit():
            raise OSError(errno.ENOENT, "no such file")
        inode = _FIRST + int(name)
        return struct.pack("=4Q2I", inode, 0, _FOREVER, _FOREVER, 0, 0) + _attributes(inode)
    if opcode == _GETATTR:
        return struct.pack("=Q2I", _FOREVER, 0, 0) + _attributes(nodeid)
    if opcode in (_OPEN, _OPENDIR):
        return struct.pack("=Q2I", 0, _KEEP_CACHE, 0)
    if opcode == _STATFS:
        return struct.pack("=5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
    if opcode in (_RELEASE, _RELEASEDIR):
        return b""
    raise OSError(errno.ENOSYS, "no such operation")


def _attributes(inode: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if inode == _ROOT else stat.S_IFREG | 0o444
    size, links = (0, 2) if inode == _ROOT else (SIZE, 1)
    times = [0] * 3
    return _ATTRIBUTES.pack(inode, size, size // 512, *times, *times, mode, links, 0, 0, 0, 4096, 0)


if __name__ == "__main__":
    main(sys.argv[1])
