# cython: language_level=3
"""What other compiled modules use of _wire.pyx."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

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

cdef struct OutHeader:
    uint32_t len
    int32_t error
    uint64_t unique

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
