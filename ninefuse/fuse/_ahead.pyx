# cython: language_level=3, boundscheck=False, wraparound=False
"""Which calls are made ahead: those that can meet nothing under way.

A read, write or sync by a handle that is known for it is told from its message. What is under way
is counted: bodies that run, inodes of plain calls beside which others may be made, and calls made
ahead whose bodies have not gone on after them. By whom they are made, and when, _role.pyx says.

Locks touched: the mutex of the `Role` that an `Ahead` is, for a few instructions.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

from ninefuse.fuse._message cimport (
    FSYNC_FDATASYNC,
    OP_FSYNC,
    OP_READ,
    OP_WRITE,
    WRITE_CACHE,
    FsyncIn,
    InHeader,
    ReadIn,
)
from ninefuse.fuse._plain cimport (
    CLAIMED,
    RAW,
    READ,
    SYNC,
    SYNC_DATA,
    WRITE,
    Job,
    Kind,
    State,
    let_go,
    name_of,
    now,
)

cdef extern from "<fcntl.h>" nogil:
    int O_APPEND

cdef enum:
    MOST_AHEAD = 64  # calls made ahead whose bodies are still to be run
    LARGEST_AHEAD = 65536  # bytes of a message, which is copied, or of what is read

cdef uint64_t LAST_BYTE = 0x7FFFFFFFFFFFFFFF
cdef uint64_t BEYOND = LAST_BYTE + 1


cdef struct Asked:
    # What a message asks for, if it may be a plain call.
    Kind kind
    uint64_t unique
    uint64_t handle
    uint64_t offset
    uint64_t size
    bint appends


cdef bint asks(const char *start, ssize_t got, Asked *asked) noexcept nogil:
    """Whether a message asks for a read, a write or a sync, and for which."""
    cdef InHeader header
    cdef ReadIn write, read
    cdef FsyncIn sync
    if got < <ssize_t> sizeof(header) or got > LARGEST_AHEAD:
        return False
    memcpy(&header, start, sizeof(header))
    if header.len != <size_t> got:
        return False
    asked.unique, asked.offset, asked.size, asked.appends = header.unique, 0, 0, False
    if header.opcode == OP_WRITE and <size_t> got > sizeof(header) + sizeof(write):
        memcpy(&write, start + sizeof(header), sizeof(write))
        if write.more_flags & WRITE_CACHE or write.offset > LAST_BYTE - write.size:
            return False
        if write.size != <size_t> got - sizeof(header) - sizeof(write):
            return False
        asked.kind, asked.handle = WRITE, write.fh
        asked.offset, asked.size = write.offset, write.size
        asked.appends = write.flags & O_APPEND != 0
    elif header.opcode == OP_READ and <size_t> got == sizeof(header) + sizeof(read):
        memcpy(&read, start + sizeof(header), sizeof(read))
        if not 0 < read.size <= LARGEST_AHEAD or read.offset > LAST_BYTE - read.size:
            return False
        asked.kind, asked.handle = READ, read.fh
        asked.offset, asked.size = read.offset, read.size
    elif header.opcode == OP_FSYNC and <size_t> got == sizeof(header) + sizeof(sync):
        memcpy(&sync, start + sizeof(header), sizeof(sync))
        asked.kind = SYNC_DATA if sync.flags & FSYNC_FDATASYNC else SYNC
        asked.handle = sync.fh
    else:
        return False
    return True


cdef Job *job_for(Asked *asked, size_t got) noexcept nogil:
    """A job with room for its message, and for what is read; NULL: there is none."""
    cdef Job *job = <Job *> malloc(sizeof(Job))
    if job == NULL:
        return NULL
    memset(job, 0, sizeof(Job))
    job.message = <char *> malloc(got)
    if asked.kind == READ:
        job.buffer = <char *> malloc(asked.size)
    if job.message == NULL or (asked.kind == READ and job.buffer == NULL):
        let_go(job)
        return NULL
    job.kind, job.unique, job.state, job.began = asked.kind, asked.unique, RAW, now()
    job.offset = <int64_t> asked.offset
    # What is appended begins where the file ends: nobody here knows where that is.
    job.begin = asked.offset
    job.end = BEYOND if asked.appends else asked.offset + asked.size
    job.message_size, job.size = got, asked.size
    return job


cdef bint is_plain_by(KnownHandle *known, Asked *asked) noexcept nogil:
    """Whether what is asked for is a plain call, by what is known at the place of its handle."""
    if not known.is_known or known.handle != asked.handle:
        return False
    if asked.kind == READ:
        return known.is_readable and known.is_near
    return asked.kind != WRITE or (known.is_writable and asked.appends == known.appends)


cdef class Ahead:
    """What is known of calls that are made ahead; a `Role` is one.

    Attributes:
        count_ahead: calls made ahead whose bodies have not gone on after them.
        busy: requests under way, but for those whose calls were made ahead.
    """

    def __cinit__(self):
        if pthread_mutex_init(&self.mutex, NULL):
            raise MemoryError

    def makes_ahead(self, foresee, int for_user):
        """Make calls ahead, from now on.

        Args:
            foresee: ``foresee(message, began)`` runs the body of a message up to its call, which
                was begun at ``began`` (nanoseconds, as of time.monotonic_ns()). Its request, or
                None, if the body asked for something else.
            for_user: how many there may be at a time of one user, but of user 0.
        """
        self.for_user = for_user
        self.foresee = foresee

    def begins(self):
        """A body is about to be run, beside which no call is made ahead."""
        pthread_mutex_lock(&self.mutex)
        self.busy += 1
        pthread_mutex_unlock(&self.mutex)

    def ends(self):
        """Such a body has ended, or stands still."""
        pthread_mutex_lock(&self.mutex)
        self.busy -= 1
        pthread_mutex_unlock(&self.mutex)

    def sets_aside(self, uint64_t inode):
        """A body has come to a plain call on an inode: those on others may be made ahead again.

        Returns:
            False if there are too many of these; then they may not.
        """
        cdef bint is_aside
        pthread_mutex_lock(&self.mutex)
        is_aside = self.count_aside < MOST_ASIDE
        if is_aside:
            self.aside[self.count_aside] = inode
            self.count_aside += 1
            self.busy -= 1
        pthread_mutex_unlock(&self.mutex)
        return is_aside

    def comes_back(self, uint64_t inode, bint goes_on):
        """Such a body goes on after its call, or has ended.

        Args:
            inode: that of its call.
            goes_on: whether it goes on, so that none is made ahead beside it.
        """
        cdef int i
        pthread_mutex_lock(&self.mutex)
        self.busy += goes_on
        for i in range(self.count_aside):
            if self.aside[i] == inode:
                self.count_aside -= 1
                self.aside[i] = self.aside[self.count_aside]
                break
        pthread_mutex_unlock(&self.mutex)

    def knows(
        self, uint64_t handle, uint64_t inode, int fd, bint is_near, bint is_readable,
        bint is_writable, bint appends, writer, uint32_t user,
    ):
        """By this handle reads, writes and syncs are plain calls, until `forgets`.

        Args:
            handle: the kernel's number of it.
            inode: its file's, as calls have it.
            fd: by which calls are made.
            is_near: whether a read of what is in memory waits for nobody. Else none is made ahead.
            is_readable: whether it may be read.
            is_writable: whether it may be written to.
            appends: whether it was opened to append (fcntl(2) may have changed that).
            writer: a `Caller` for whom it is written; None: the daemon.
            user: the user id of who opened it.
        """
        cdef KnownHandle known
        known.is_known, known.is_near, known.is_readable = True, is_near, is_readable
        known.is_writable, known.appends = is_writable, appends
        known.for_caller = writer is not None
        known.handle, known.inode, known.fd = handle, inode, fd
        known.user = user
        known.uid = known.gid = 0
        if writer is not None:
            known.uid, known.gid = writer.uid, writer.gid
        pthread_mutex_lock(&self.mutex)
        self.handles[handle % KNOWN_HANDLES] = known
        pthread_mutex_unlock(&self.mutex)

    def forgets(self, uint64_t handle):
        """A handle is about to be closed."""
        cdef KnownHandle *known = &self.handles[handle % KNOWN_HANDLES]
        pthread_mutex_lock(&self.mutex)
        if known.handle == handle:
            known.is_known = False
        pthread_mutex_unlock(&self.mutex)

    def forgets_file(self, uint64_t inode):
        """By no handle of a file that is open now calls are plain."""
        cdef int i
        pthread_mutex_lock(&self.mutex)
        for i in range(KNOWN_HANDLES):
            if self.handles[i].inode == inode:
                memset(&self.handles[i], 0, sizeof(KnownHandle))
        pthread_mutex_unlock(&self.mutex)

    cdef Job *foreseen(self, const char *start, ssize_t got) noexcept nogil:
        """The call that a message asks for, if it may be made ahead; or NULL. As the leader."""
        cdef Asked asked
        cdef KnownHandle *known
        cdef Job *job
        if self.foresee is None or not asks(start, got, &asked):
            return NULL
        job = job_for(&asked, <size_t> got)
        if job == NULL:
            return NULL
        known = &self.handles[asked.handle % KNOWN_HANDLES]
        pthread_mutex_lock(&self.mutex)
        if not (is_plain_by(known, &asked) and self.has_room() and self.is_quiet_for(job, known)):
            pthread_mutex_unlock(&self.mutex)
            let_go(job)
            return NULL
        job.fd, job.inode, job.user = known.fd, known.inode, known.user
        job.for_caller, job.uid, job.gid = known.for_caller, known.uid, known.gid
        memcpy(job.message, start, <size_t> got)
        job.start = job.buffer
        if job.kind == WRITE:
            job.start = job.message + sizeof(InHeader) + sizeof(ReadIn)
        self.add_ahead(job)
        pthread_mutex_unlock(&self.mutex)
        return job

    def made_ahead(self):
        """Of each call made ahead that is not over: what it is, its inode, when it was begun."""
        cdef Job *job
        found = []
        pthread_mutex_lock(&self.mutex)
        job = self.ahead
        while job != NULL:
            if not job.is_over and job.state == RAW:
                found.append((name_of(job), job.inode, job.began))
            job = job.next_ahead
        pthread_mutex_unlock(&self.mutex)
        return found

    # The mutex is held:

    cdef bint has_room(self) noexcept nogil:
        """Whether a call may be made ahead, as far as threads go."""
        return False

    cdef bint is_quiet_for(self, Job *wanted, KnownHandle *known) noexcept nogil:
        """Whether nothing is under way that a call could meet, and one may be made."""
        cdef Job *job = self.ahead
        cdef int i, count = 0
        if self.busy or self.count_ahead >= MOST_AHEAD:
            return False
        for i in range(self.count_aside):
            if self.aside[i] == known.inode:
                return False
        while job != NULL:
            if not job.is_over and known.user and job.user == known.user:
                count += 1
            if job.inode == known.inode:
                # One that did not go well goes on in its body, perhaps with another call. One that
                # is stuck keeps no others on this inode from having their share.
                if not job.is_made:
                    return False
                if job.kind == READ and wanted.kind == READ:
                    job = job.next_ahead
                    continue
                # Its body may still say that it changes these bytes, and another would wait for it.
                if job.begin < wanted.end and wanted.begin < job.end:
                    return False
            job = job.next_ahead
        return count < self.for_user

    cdef void add_ahead(self, Job *job) noexcept nogil:
        cdef Job **at = &self.ahead
        while at[0] != NULL:
            at = &at[0].next_ahead
        at[0] = job
        self.count_ahead += 1

    cdef void take_ahead(self, Job *job) noexcept nogil:
        cdef Job **at = &self.ahead
        while at[0] != job:
            at = &at[0].next_ahead
        at[0] = job.next_ahead
        self.count_ahead -= 1

    cdef Job *first_ahead(self, State state, bint is_over) noexcept nogil:
        """The first call made ahead that has come so far; or NULL.

        Args:
            state: how far.
            is_over: only one that is over.
        """
        cdef Job *job = self.ahead
        while job != NULL and (job.state != state or (is_over and not job.is_over)):
            job = job.next_ahead
        return job

    cdef Job *claimed(self, bint is_over) noexcept nogil:
        """The first call made ahead whose body nobody runs, claimed; or NULL.

        Args:
            is_over: only one that is over.
        """
        cdef Job *job = self.first_ahead(RAW, is_over)
        if job != NULL:
            job.state = CLAIMED
        return job

    cdef bint is_any_left(self) noexcept nogil:
        """Whether a call made ahead is over, and nobody has begun with its body."""
        return self.first_ahead(RAW, True) != NULL

    cdef bint is_any_claimed(self) noexcept nogil:
        return self.first_ahead(CLAIMED, False) != NULL
