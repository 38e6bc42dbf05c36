# cython: language_level=3
"""What other compiled modules use of _ahead.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from ninefuse.fuse._plain cimport Job, State

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef enum:
    KNOWN_HANDLES = 256  # of which it is known what calls they make; the newest
    MOST_ASIDE = 64  # plain calls under way, not made ahead, beside which others are

cdef struct KnownHandle:
    # An open handle, by which reads, writes and syncs are plain calls.
    bint is_known, is_near, is_readable, is_writable, appends, for_caller
    uint32_t user  # who opened it; 0: nobody whose share is bounded
    uint64_t handle
    uint64_t inode
    int fd
    uint32_t uid
    uint32_t gid

cdef class Ahead:
    cdef pthread_mutex_t mutex
    cdef KnownHandle handles[KNOWN_HANDLES]
    cdef Job *ahead  # calls made ahead, until their bodies have gone on after them
    cdef readonly int count_ahead, busy
    cdef uint64_t aside[MOST_ASIDE]  # inodes of plain calls under way that were not made ahead
    cdef int count_aside
    cdef object foresee
    cdef int for_user
    cdef Job *foreseen(self, const char *start, ssize_t got) noexcept nogil
    cdef bint has_room(self) noexcept nogil
    cdef bint is_quiet_for(self, Job *wanted, KnownHandle *known) noexcept nogil
    cdef void add_ahead(self, Job *job) noexcept nogil
    cdef void take_ahead(self, Job *job) noexcept nogil
    cdef Job *first_ahead(self, State state, bint is_over) noexcept nogil
    cdef Job *claimed(self, bint is_over) noexcept nogil
    cdef bint is_any_left(self) noexcept nogil
    cdef bint is_any_claimed(self) noexcept nogil
