# cython: language_level=3
"""What other compiled modules use of _plain.pyx."""

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from ninefuse.fuse._wire cimport Device

cdef enum Kind:
    READ
    WRITE
    SYNC
    SYNC_DATA

cdef enum State:
    RAW  # a call made ahead, of a message that nobody has decoded yet
    CLAIMED  # somebody runs its body up to the call
    READY  # its body waits for what comes of the call, as any other's

cdef struct Job:
    # One plain call, and what has become of it.
    PyObject *request
    PyObject *data  # the bytes that are written, or read into
    Kind kind
    int fd
    char *start
    size_t size
    int64_t offset
    bint for_caller  # with these ids
    uint32_t uid
    uint32_t gid
    uint64_t unique
    ssize_t result  # bytes, or a negated errno
    bint by_hand
    bint is_answered
    bint is_back  # whether the thread has its own rights
    Job *next
    # Of calls made ahead:
    State state
    char *message
    size_t message_size
    char *buffer  # what is read
    uint64_t inode
    uint64_t begin  # of the bytes that it reads or changes
    uint64_t end
    uint32_t user
    int64_t began  # as of time.monotonic_ns()
    bint is_made  # it went well, and nothing is left but to say so
    bint is_over
    Job *next_ahead

cdef Job *job_of(request, uint64_t unique) except? NULL
cdef void let_go(Job *job) noexcept nogil
cdef void do(Job *job) noexcept nogil
cdef bint is_plain(Job *job) noexcept nogil
cdef void answer(Job *job, Device device) noexcept nogil
cdef str name_of(Job *job)
cdef int64_t now() noexcept nogil
