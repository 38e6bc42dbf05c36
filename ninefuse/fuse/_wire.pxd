# cython: language_level=3
"""What other compiled modules use of _wire.pyx."""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)
    enum:
        POLLIN

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

cdef struct OutHeader:
    uint32_t len
    int32_t error
    uint64_t unique

cdef class Message:
    cdef readonly uint32_t opcode, uid, gid, pid
    cdef readonly uint64_t unique, nodeid
    cdef readonly tuple args, groups, contexts
    cdef readonly int fault

cdef Message decoded(const char *start, size_t size, bint short_setxattr)

cdef class Device:
    cdef readonly int fd
    cdef public bint short_setxattr
    cdef char *buffer
    cdef size_t size
    cdef int send(self, iovec *parts, int count) noexcept nogil
    cdef bint answer(self, uint64_t unique, const void *body, size_t size) except -1
    cdef bint answer_two(
        self, uint64_t unique, const void *body, size_t size, const void *more, size_t more_size
    ) except -1
