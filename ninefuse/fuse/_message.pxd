# cython: language_level=3
"""What other compiled modules use of _message.pyx."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef enum:
    OP_READ = 15
    OP_WRITE = 16
    OP_FSYNC = 20
    WRITE_CACHE = 1
    FSYNC_FDATASYNC = 1

cdef struct InHeader:
    uint32_t len, opcode
    uint64_t unique, nodeid
    uint32_t uid, gid, pid
    uint16_t total_extlen, padding

cdef struct ReadIn:  # and write_in
    uint64_t fh, offset
    uint32_t size, more_flags
    uint64_t lock_owner
    uint32_t flags, padding

cdef struct FsyncIn:
    uint64_t fh
    uint32_t flags, padding

cdef class Message:
    cdef readonly uint32_t opcode, uid, gid, pid
    cdef readonly uint64_t unique, nodeid
    cdef readonly tuple args, groups, contexts
    cdef readonly int fault

cdef Message decoded(const char *start, size_t size, bint short_setxattr)
