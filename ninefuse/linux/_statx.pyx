# cython: language_level=3
"""What a lookup asks the kernel: a file's attributes, a step to a name that is in memory.

Optional: ninefuse is built without it where a compiler is missing, and makes the same calls by
ctypes then (syscalls.py), which take three times as long beside the kernel's own part. The types
are in _statx.pyi. No lock; the interpreter's is let go during the calls.

Source: statx(2), openat2(2).
"""

from libc.errno cimport EINTR
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

import os

cdef extern from *:
    """
    #include <errno.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* As in include/uapi/linux/stat.h, which older headers have without the mount. */
    struct nf_time { int64_t seconds; uint32_t nanoseconds; int32_t reserved; };
    struct nf_statx {
        uint32_t mask, blksize;
        uint64_t attributes;
        uint32_t nlink, uid, gid;
        uint16_t mode, spare0;
        uint64_t ino, size, blocks, attributes_mask;
        struct nf_time atime, btime, ctime, mtime;
        uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
        uint64_t mount_id, spare[13];
    };

    static int nf_statx(int fd, const char *name, int flags, uint32_t mask, struct nf_statx *found)
    {
        memset(found, 0, sizeof(*found));
        return syscall(SYS_statx, fd, name, flags, mask, found) < 0 ? -errno : 0;
    }

    struct nf_open_how { uint64_t flags, mode, resolve; };

    static int nf_openat2(int directory, const char *name, uint64_t flags, uint64_t resolve)
    {
        struct nf_open_how how = { flags, 0, resolve };
        /* 437 on every architecture. */
        long fd = syscall(437, directory, name, &how, sizeof(how));
        return fd < 0 ? -errno : (int) fd;
    }
    """
    cdef struct nf_time:
        int64_t seconds
        uint32_t nanoseconds
    cdef struct nf_statx:
        uint32_t mask, blksize
        uint64_t attributes
        uint32_t nlink, uid, gid
        uint16_t mode
        uint64_t ino, size, blocks, attributes_mask
        nf_time atime, btime, ctime, mtime
        uint32_t rdev_major, rdev_minor, dev_major, dev_minor
        uint64_t mount_id
    int statx_call "nf_statx"(int, const char *, int, uint32_t, nf_statx *) nogil
    int openat2_call "nf_openat2"(int, const char *, uint64_t, uint64_t) nogil

cdef object _error(int code):
    return OSError(code, os.strerror(code))


def statx(type cls not None, int fd, bytes name not None, int flags, uint32_t mask):
    """What statx(2) says of a file.

    Args:
        cls: a class of tuples, of 24 integers in the order of the kernel's structure (`Attributes`).
        fd: the file, or the directory that the name is in.
        name: without a zero byte; empty, with AT_EMPTY_PATH: the file itself.
        flags: AT_*.
        mask: STATX_*.

    Raises:
        ValueError: there is a zero in the name.
        OSError: of statx(2).
    """
    cdef nf_statx s
    cdef int result
    cdef const char *at = name
    _check(name)
    while True:
        with nogil:
            result = statx_call(fd, at, flags, mask, &s)
        if result != -EINTR:
            break
    if result < 0:
        raise _error(-result)
    values = (
        s.mask, s.blksize, s.attributes, s.nlink, s.uid, s.gid, s.mode, s.ino, s.size, s.blocks,
        s.attributes_mask, s.atime.seconds, s.atime.nanoseconds, s.btime.seconds,
        s.btime.nanoseconds, s.ctime.seconds, s.ctime.nanoseconds, s.mtime.seconds,
        s.mtime.nanoseconds, s.rdev_major, s.rdev_minor, s.dev_major, s.dev_minor, s.mount_id,
    )  # fmt: skip
    return tuple.__new__(cls, values)


def open_in_memory(int directory, bytes name not None, uint64_t flags, uint64_t resolve):
    """openat2(2) of one name.

    Args:
        directory: that the name is in.
        name: without a zero byte.
        flags: O_*.
        resolve: RESOLVE_*.

    Returns:
        The descriptor, or a negated errno.

    Raises:
        ValueError: there is a zero in the name.
    """
    cdef int fd
    cdef const char *at = name
    _check(name)
    with nogil:
        fd = openat2_call(directory, at, flags, resolve)
    return fd


cdef int _check(bytes name) except -1:
    if b"\0" in name:
        raise ValueError("embedded null byte")
    return 0
