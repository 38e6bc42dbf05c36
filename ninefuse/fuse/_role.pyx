# cython: language_level=3, boundscheck=False, wraparound=False
"""The role of the dispatcher, which threads hand on, and plain calls made without Python.

One thread leads: it alone reads the device. While nobody leads, all free threads wait for the
device. A request wakes the thread that came last. That one leads. While somebody leads, free
threads wait for the role. So a request of a lone client wakes one thread, and the role costs
nothing.

The leader runs a request's body to its first call that blocks. If that is *plain* (a read, a write
or a sync, whose good outcome is the answer), it is made and answered here, without the
interpreter's lock:

* by the leader itself, once it has passed the role on (`make`);
* by a *hand*: a thread that makes plain calls only (`hand`, `work`). The leader goes on to read
  then, and keeps the interpreter's lock while requests stand in line.

A read, write or sync that can meet nothing under way needs not even its body: the message says
which call the body is going to ask for. So the call is made *ahead*, and answered. A read of what
is in memory needs not even another leader: it waits for nobody (`read_now`). The body is run
afterwards, up to this call, and on with what came of it. It is run before any other body. So
whatever comes later finds it under way, or over. Where several clients go side by side, it may wait
for more of them. One thread then runs all, and the interpreter's lock changes hands once for many.

What is left of a body after its answer is table work. A thread that has the interpreter's lock
anyway does it: before it looks at another request, and before it waits. It must not wait for a
request to come. So it is counted which threads run Python. A thread that has made a call while none
does takes the lock at once.

Locks touched: the mutex of a `Role`, for a few instructions; the interpreter's lock is never
waited for inside.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_Clear
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EIO, ENODEV, ENOENT, ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import logging

from ninefuse.calls import Fsync, Pread, Pwrite
from ninefuse.errors import error
from ninefuse.fuse._message cimport (
    FSYNC_FDATASYNC,
    OP_FSYNC,
    OP_READ,
    OP_WRITE,
    WRITE_CACHE,
    FsyncIn,
    InHeader,
    Message,
    ReadIn,
    decoded,
)
from ninefuse.fuse._wire cimport POLLIN, Device, OutHeader, iovec, poll, pollfd
from ninefuse.linux._transfer cimport pwrite_as, read_nowait

log = logging.getLogger(__name__)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef unsigned long pthread_t
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    pthread_t pthread_self()

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void *, size_t)
    ssize_t pread(int, void *, size_t, int64_t)
    ssize_t pwrite(int, const void *, size_t, int64_t)
    int fsync(int)
    int fdatasync(int)
    int close(int)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD
    uint32_t EPOLLIN, EPOLLET
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event *)
    int epoll_wait(int, epoll_event *, int, int)

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int, int)
    int eventfd_write(int, uint64_t)

cdef extern from "<fcntl.h>" nogil:
    int O_APPEND

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int, timespec *)

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **, Py_ssize_t)

cdef enum:
    KNOWN_HANDLES = 256  # of which it is known what calls they make; the newest
    MOST_AHEAD = 64  # calls made ahead whose bodies are still to be run
    LARGEST_AHEAD = 65536  # bytes of a message, which is copied, or of what is read
    MOST_ASIDE = 64  # plain calls under way, not made ahead, beside which others are
    CROWD = 2  # calls that others are in: so many come back soon, and a body may wait for them
    BATCH = 32  # calls made ahead, the bodies of which are run at the latest when there are as many
    BATCH_TIME = 10  # milliseconds after which they are, if nothing else comes

cdef uint64_t LAST_BYTE = 0x7FFFFFFFFFFFFFFF
cdef uint64_t BEYOND = LAST_BYTE + 1

cdef enum Kind:
    READ
    WRITE
    SYNC
    SYNC_DATA

cdef enum State:
    RAW  # a call made ahead, of a message that nobody has decoded yet
    CLAIMED  # somebody runs its body up to the call
    READY  # its body waits for what comes of the call, as any other's

cdef struct KnownHandle:
    # An open handle, by which reads, writes and syncs are plain calls.
    bint is_known, is_near, is_readable, is_writable, appends, for_caller
    uint32_t user  # who opened it; 0: nobody whose share is bounded
    uint64_t handle
    uint64_t inode
    int fd
    uint32_t uid
    uint32_t gid

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


cdef Job *job_of(request, uint64_t unique) except? NULL:
    """The plain call that a request asks for, with references of its own.

    Raises:
        MemoryError: there is no room.
    """
    call = request.call
    kind = type(call)
    cdef Job *job = <Job *> malloc(sizeof(Job))
    if job == NULL:
        raise MemoryError
    memset(job, 0, sizeof(Job))
    job.state = READY
    try:
        job.fd = call.fd
        job.unique = unique
        if kind is Pwrite:
            job.kind = WRITE
            data = call.data
            job.offset = call.offset
            if call.writer is not None:
                job.for_caller = True
                job.uid, job.gid = call.writer.uid, call.writer.gid
        elif kind is Pread:
            job.kind = READ
            data = PyBytes_FromStringAndSize(NULL, call.count)
            job.offset = call.offset
        else:
            job.kind = SYNC_DATA if call.data_only else SYNC
            data = b""
        job.start = PyBytes_AS_STRING(data)
        job.size = PyBytes_GET_SIZE(data)
    except BaseException:
        free(job)
        raise
    Py_INCREF(data)
    job.data = <PyObject *> data
    Py_INCREF(request)
    job.request = <PyObject *> request
    return job


cdef void do(Job *job) noexcept nogil:
    """Make the call."""
    cdef ssize_t done = 0, more
    cdef int is_back = 1
    job.is_back = True
    if job.kind == READ:
        # A short read is the end of the file to whoever asked; make sure that it is.
        while <size_t> done < job.size:
            more = pread(job.fd, job.start + done, job.size - done, job.offset + done)
            if more < 0 and errno == EINTR:
                continue
            if more < 0:
                done = -errno  # of what was read before nobody is told: it would be the end
            if more <= 0:
                break
            done += more
        job.result = done
        return
    while True:
        if job.kind == WRITE and job.for_caller:
            done = pwrite_as(
                job.fd, job.start, job.size, job.offset, job.uid, job.gid, &is_back
            )
            if not is_back:
                job.is_back = False
                return
        else:
            if job.kind == WRITE:
                done = pwrite(job.fd, job.start, job.size, job.offset)
            else:
                done = fsync(job.fd) if job.kind == SYNC else fdatasync(job.fd)
            if done < 0:
                done = -errno
        if done != -EINTR:
            job.result = done
            return


cdef bint is_plain(Job *job) noexcept nogil:
    """Whether a call went well, in whole."""
    return job.result >= (<ssize_t> job.size if job.kind == WRITE else 0)


cdef void answer(Job *job, Device device) noexcept nogil:
    """Answer a request whose call went well; else Python has more to do with it."""
    cdef OutHeader header
    cdef iovec parts[2]
    cdef uint32_t out[2]
    cdef int count = 2
    if not is_plain(job):
        return
    header.error = 0
    header.unique = job.unique
    parts[0].iov_base, parts[0].iov_len = &header, sizeof(header)
    if job.kind == READ:
        parts[1].iov_base, parts[1].iov_len = job.start, <size_t> job.result
    elif job.kind == WRITE:
        out[0], out[1] = <uint32_t> job.result, 0
        parts[1].iov_base, parts[1].iov_len = out, sizeof(out)
    else:
        count = 1
    # One that nobody waits for any more is answered, too. What the kernel refuses is said again
    # by Python, which tells of it.
    job.is_answered = device.send(parts, count) in (0, ENOENT, ENODEV)


cdef str name_of(Job *job):
    """What the request is called that asks for a call."""
    if job.kind == READ:
        return "read"
    return "write" if job.kind == WRITE else "fsync"


cdef int64_t now() noexcept nogil:
    """Nanoseconds, as of time.monotonic_ns()."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t> t.tv_sec * 1000000000 + t.tv_nsec


cdef take_one(dict counts, key):
    """Count one less. Nothing of Python runs in it, so that no other thread comes between."""
    count = counts[key] - 1
    if count:
        counts[key] = count
    else:
        del counts[key]


cdef class Role:
    """The role of one device's dispatcher, and what is done without it.

    Args:
        device: that is read.
        wake: a descriptor that ends the waiting for requests when it is readable.
        finish: ``finish(request, outcome, is_answered, by_hand)`` is called for each plain
            call that was made, by a thread that has the interpreter's lock. The outcome is what
            the call returns, or a negated errno. ``by_hand``: a hand made it. It raises nothing.
        end_process: called where a thread's own rights were not had back.

    Raises:
        OSError: EMFILE, two more descriptors cannot be had.

    Attributes:
        threads: that take part in leading.
        in_calls: how many of them are in a call that may wait.
        handed: plain calls that hands have or are to have.
        queued: those that no hand has begun.
        finished: how many calls hands have made.
        idle: hands that have nothing to do.
        hands: how many there are.
        passed: when the role was passed on last, in nanoseconds, as of time.monotonic_ns().
        count_ahead: calls made ahead whose bodies have not gone on after them.
        busy: requests under way, but for those whose calls were made ahead.
    """

    cdef pthread_mutex_t mutex
    cdef pthread_cond_t is_free, has_job, is_ready
    cdef bint is_taken, is_over
    cdef pthread_t leader
    cdef int followers  # that wait for the role
    cdef int waiting  # that wait for the device, as nobody leads
    cdef int in_python
    # What was queued at the device is told of once (EPOLLET). So who leads reads until there is
    # nothing, or sees that another does.
    cdef bint may_be_more
    cdef unsigned long told, told_before  # how often it was told, and how often before a read
    cdef int epoll, nudge
    cdef readonly int threads, in_calls, handed, queued, idle, hands
    cdef readonly long finished
    cdef readonly int64_t passed
    cdef readonly int busy
    cdef Job *done  # by calls that were made, and whose bodies have not gone on
    cdef Job *first  # that hands are to make
    cdef Job *last
    cdef Device device
    cdef int wake
    cdef object finish, end_process
    cdef dict users, inodes  # plain calls that are under way, of each
    cdef KnownHandle handles[KNOWN_HANDLES]
    cdef Job *ahead  # calls made ahead, until their bodies have gone on after them
    cdef readonly int count_ahead
    cdef uint64_t aside[MOST_ASIDE]  # inodes of plain calls under way that were not made ahead
    cdef int count_aside
    cdef object foresee
    cdef int for_user

    def __cinit__(self):
        self.epoll = self.nudge = -1
        if pthread_mutex_init(&self.mutex, NULL):
            raise MemoryError
        if pthread_cond_init(&self.is_free, NULL) or pthread_cond_init(&self.has_job, NULL):
            raise MemoryError
        if pthread_cond_init(&self.is_ready, NULL):
            raise MemoryError

    def __init__(self, Device device not None, int wake, finish, end_process):
        self.device = device
        self.wake = wake
        self.finish = finish
        self.end_process = end_process
        self.users = {}
        self.inodes = {}
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        self.nudge = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) if self.epoll >= 0 else -1
        if self.nudge < 0:
            raise error(errno)
        self.hear_of(wake, 0)  # by all
        self.hear_of(device.fd, EPOLLET)
        self.hear_of(self.nudge, EPOLLET)
        self.may_be_more = True

    cdef hear_of(self, int fd, uint32_t how):
        """Wake whoever waits, or one of them, when a descriptor is readable."""
        cdef epoll_event event
        event.events = EPOLLIN | how
        event.data.fd = fd
        if epoll_ctl(self.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            raise error(errno)

    def close(self):
        """Close what is its own; no thread is to come back. Again: nothing."""
        for fd in (self.epoll, self.nudge):
            if fd >= 0:
                close(fd)
        self.epoll = self.nudge = -1

    def __dealloc__(self):
        self.close()

    # ---- who runs Python ----------------------------------------------------------------------

    def enter(self):
        """This thread runs Python from here on."""
        pthread_mutex_lock(&self.mutex)
        self.in_python += 1
        pthread_mutex_unlock(&self.mutex)

    def leave(self):
        """This thread is about to wait: it finishes what was left, and runs Python no more."""
        while self.finish_some(True):
            pass

    cdef drain(self):
        """Finish what was left."""
        if self.done != NULL or self.ahead != NULL:
            while self.finish_some(False):
                pass

    cdef bint finish_some(self, bint leaves):
        """Finish what was left, as far as it is known now.

        Args:
            leaves: if nothing is left, this thread runs Python no more.

        Returns:
            Whether there was something.
        """
        cdef Job *done
        cdef Job *ahead
        pthread_mutex_lock(&self.mutex)
        done, self.done = self.done, NULL
        ahead = self.claimed(True) if done == NULL else NULL
        if leaves and done == NULL and ahead == NULL:
            self.in_python -= 1
        pthread_mutex_unlock(&self.mutex)
        self.finish_all(done)
        if ahead != NULL:
            self.run_body(ahead)
        return done != NULL or ahead != NULL

    cdef finish_all(self, Job *done):
        cdef Job *next
        while done != NULL:
            next = done.next
            self.finish_one(done)
            done = next

    cdef finish_one(self, Job *job):
        """Have a body go on after its call; the job is no more."""
        cdef ssize_t result = job.result
        cdef bint is_answered = job.is_answered
        cdef bint is_read = job.kind == READ
        cdef bint by_hand = job.by_hand
        if is_read and job.data == NULL and result >= 0:
            try:
                data = PyBytes_FromStringAndSize(job.start, result)
                Py_INCREF(data)
                job.data = <PyObject *> data
            except MemoryError:
                result = -ENOMEM
        elif is_read and 0 <= result < <ssize_t> job.size:
            if _PyBytes_Resize(&job.data, result) < 0:  # which has let the bytes go
                PyErr_Clear()
                result = -ENOMEM
        request = <object> job.request
        Py_DECREF(request)
        outcome = 0 if is_answered else result
        if not is_read:
            outcome = result
        if job.data != NULL:
            if is_read and result >= 0:
                outcome = <object> job.data
            Py_DECREF(<object> job.data)
        try:
            if request is not None:
                self.finish(request, outcome, is_answered, by_hand)
            elif not is_answered:
                self.device.error(job.unique, EIO)
        except BaseException:
            log.exception("a request cannot go on")
        if job.message != NULL:
            pthread_mutex_lock(&self.mutex)
            self.take_ahead(job)
            pthread_mutex_unlock(&self.mutex)
            free(job.message)
            free(job.buffer)
        free(job)

    # ---- the role -----------------------------------------------------------------------------

    def joins(self, int count):
        """So many more threads are to take part in leading."""
        pthread_mutex_lock(&self.mutex)
        self.threads += count
        pthread_mutex_unlock(&self.mutex)

    def hires(self, int count):
        """There are to be so many more hands."""
        pthread_mutex_lock(&self.mutex)
        self.hands += count
        pthread_mutex_unlock(&self.mutex)

    def pass_on(self):
        """Let another lead, so that this thread may make a call that waits.

        Returns:
            False if all others are in such calls: then this one is to go on leading.
        """
        cdef bint passed
        pthread_mutex_lock(&self.mutex)
        passed = self.in_calls + 1 < self.threads
        if passed:
            self.pass_it_on()
        pthread_mutex_unlock(&self.mutex)
        return passed

    def retires(self):
        """A thread that leads, or has ended, takes part no more."""
        pthread_mutex_lock(&self.mutex)
        self.threads -= 1
        self.let_go()
        self.see_that_one_reads()
        pthread_mutex_unlock(&self.mutex)

    def came_back(self):
        """The call is over for which the role was passed on."""
        pthread_mutex_lock(&self.mutex)
        self.in_calls -= 1
        pthread_mutex_unlock(&self.mutex)

    def end(self):
        """There is nothing left to lead: all threads come back, and hands once they are done."""
        pthread_mutex_lock(&self.mutex)
        self.is_over = True
        pthread_cond_broadcast(&self.is_free)
        pthread_cond_broadcast(&self.has_job)
        pthread_mutex_unlock(&self.mutex)
        # Their bodies keep their files open: all fids go next.
        self.catch_up()

    def lead(self):
        """Wait for a request, and for the role, or go on in it.

        Returns:
            The message; None: it is over.

        Raises:
            OSError: ENODEV, there is no mount any more, and others of read(2).
        """
        cdef ssize_t got = -EAGAIN
        cdef Message message = None
        if self.leads() and not self.is_over:
            # While requests stand in line the interpreter's lock is kept: this does not wait.
            self.drain()
            got = self.read()
            if got > 0:
                message = self.message(got)
        while message is None:
            self.leave()
            with nogil:
                got = self.next(got == -EAGAIN)
            if got == 0:
                return None
            message = self.message(got)
        self.catch_up()
        return message

    cdef bint leads(self) noexcept nogil:
        return self.is_taken and self.leader == pthread_self()

    cdef ssize_t read(self) noexcept nogil:
        """As the leader: the size of a request; -EAGAIN, there is none; or a negated errno."""
        cdef ssize_t got
        cdef int code
        pthread_mutex_lock(&self.mutex)
        self.told_before = self.told
        pthread_mutex_unlock(&self.mutex)
        while True:
            got = read(self.device.fd, self.device.buffer, self.device.size)
            if got > 0:
                return got
            # The other end of what stands for a device may be gone.
            code = ENODEV if got == 0 or errno == ECONNRESET else errno
            # Withdrawn before it was read, or while it was: there may be another.
            if code != EINTR and code != ENOENT:
                return -code

    cdef ssize_t next(self, bint is_empty) noexcept nogil:
        """Read what needs Python: a size, 0 for the end, or a negated errno. Runs Python then.

        Args:
            is_empty: whether there was nothing when it was read last, if this is the leader.
        """
        cdef Job *job
        cdef ssize_t got = self.next_message(is_empty)
        while got > 0:
            job = self.foreseen(got)
            if job == NULL:
                break
            if not (job.kind == READ and self.read_now(job)):
                pthread_mutex_lock(&self.mutex)
                self.pass_it_on()
                pthread_mutex_unlock(&self.mutex)
                self.make_ahead(job)
            got = self.next_message(False)
        pthread_mutex_lock(&self.mutex)
        self.in_python += 1
        pthread_mutex_unlock(&self.mutex)
        return got

    cdef ssize_t next_message(self, bint is_empty) noexcept nogil:
        """Take the role and read: a size, 0 for the end, or a negated errno."""
        cdef ssize_t got = 0
        pthread_mutex_lock(&self.mutex)
        if not self.leads():
            is_empty = False
            self.take()
        while not self.is_over:
            if not is_empty:
                pthread_mutex_unlock(&self.mutex)
                got = self.read()
                pthread_mutex_lock(&self.mutex)
                if got != -EAGAIN:
                    break
            is_empty = False
            if self.told == self.told_before:  # else another was told meanwhile, and waits
                self.let_go()
                self.may_be_more = False
                self.take()
        if self.is_over:
            got = 0
        pthread_mutex_unlock(&self.mutex)
        return got

    # The mutex is held:

    cdef void take(self) noexcept nogil:
        """Wait until there may be a request, and nobody leads; then lead. Not if it is over."""
        cdef epoll_event event
        cdef int count, patience
        while not self.is_over:
            if self.is_taken:
                self.followers += 1
                pthread_cond_wait(&self.is_free, &self.mutex)
                self.followers -= 1
            elif self.may_be_more:
                self.is_taken = True
                self.leader = pthread_self()
                return
            else:
                self.waiting += 1
                patience = BATCH_TIME if self.is_any_left() else -1
                pthread_mutex_unlock(&self.mutex)
                count = epoll_wait(self.epoll, &event, 1, patience)
                pthread_mutex_lock(&self.mutex)
                self.waiting -= 1
                if count == 0:
                    if not self.waiting and self.followers:  # somebody is to wait meanwhile
                        self.may_be_more = True
                        pthread_cond_signal(&self.is_free)
                    pthread_mutex_unlock(&self.mutex)
                    self.see_that_one_finishes()
                    pthread_mutex_lock(&self.mutex)
                elif count > 0:
                    self.told += 1
                    self.may_be_more = True
                    if event.data.fd == self.wake:
                        self.is_over = True
                        pthread_cond_broadcast(&self.is_free)

    cdef void pass_it_on(self) noexcept nogil:
        """This thread is to make a call that may wait; another one leads."""
        self.passed = now()
        self.in_calls += 1
        self.let_go()
        self.see_that_one_reads()

    cdef void let_go(self) noexcept nogil:
        """Lead no more. There may be more to read, as far as is known, unless it is said after."""
        self.may_be_more = True
        self.is_taken = False
        self.leader = 0  # so that this thread never takes itself for it, without the mutex

    cdef void see_that_one_reads(self) noexcept nogil:
        """The role was let go after a request: there may be more, of which nobody was told."""
        cdef pollfd fds[1]
        if self.waiting:
            fds[0].fd, fds[0].events, fds[0].revents = self.device.fd, POLLIN, 0
            # Where a body is left, who is woken finds no message, and waits with a time.
            if poll(fds, 1, 0) == 0 and (self.in_python or not self.is_any_left()):
                self.may_be_more = False
                return
        if self.followers:
            pthread_cond_signal(&self.is_free)
        elif self.waiting:
            eventfd_write(self.nudge, 1)

    cdef Message message(self, ssize_t got):
        """What was read; None if it has not even a header."""
        if got < 0:
            raise error(-got)
        return decoded(self.device.buffer, got, self.device.short_setxattr)

    # ---- calls made ahead --------------------------------------------------------------------

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

    cdef Job *foreseen(self, ssize_t got) noexcept nogil:
        """As the leader: the call of the message just read, or NULL."""
        cdef InHeader header
        cdef ReadIn write, read
        cdef FsyncIn sync
        cdef const char *start = self.device.buffer
        cdef Kind kind
        cdef uint64_t handle, offset = 0, size = 0
        cdef bint appends = False
        cdef KnownHandle *known
        cdef Job *job
        if self.foresee is None or got < <ssize_t> sizeof(header) or got > LARGEST_AHEAD:
            return NULL
        memcpy(&header, start, sizeof(header))
        if header.len != <size_t> got:
            return NULL
        if header.opcode == OP_WRITE and <size_t> got > sizeof(header) + sizeof(write):
            memcpy(&write, start + sizeof(header), sizeof(write))
            if write.more_flags & WRITE_CACHE or write.offset > LAST_BYTE - write.size:
                return NULL
            if write.size != <size_t> got - sizeof(header) - sizeof(write):
                return NULL
            kind, handle, offset, size = WRITE, write.fh, write.offset, write.size
            appends = write.flags & O_APPEND != 0
        elif header.opcode == OP_READ and <size_t> got == sizeof(header) + sizeof(read):
            memcpy(&read, start + sizeof(header), sizeof(read))
            if not 0 < read.size <= LARGEST_AHEAD or read.offset > LAST_BYTE - read.size:
                return NULL
            kind, handle, offset, size = READ, read.fh, read.offset, read.size
        elif header.opcode == OP_FSYNC and <size_t> got == sizeof(header) + sizeof(sync):
            memcpy(&sync, start + sizeof(header), sizeof(sync))
            kind = SYNC_DATA if sync.flags & FSYNC_FDATASYNC else SYNC
            handle = sync.fh
        else:
            return NULL
        job = <Job *> malloc(sizeof(Job))
        if job == NULL:
            return NULL
        memset(job, 0, sizeof(Job))
        job.message = <char *> malloc(<size_t> got)
        if job.message == NULL:
            free(job)
            return NULL
        if kind == READ:
            job.buffer = <char *> malloc(size)
            if job.buffer == NULL:
                free(job.message)
                free(job)
                return NULL
        job.kind, job.unique, job.offset, job.state = kind, header.unique, <int64_t> offset, RAW
        job.began = now()
        # What is appended begins where the file ends: nobody here knows where that is.
        job.begin = offset
        job.end = BEYOND if appends else offset + size
        known = &self.handles[handle % KNOWN_HANDLES]
        pthread_mutex_lock(&self.mutex)
        if (
            not known.is_known
            or known.handle != handle
            or (kind == READ and not (known.is_readable and known.is_near))
            or (kind == WRITE and (not known.is_writable or appends != known.appends))
            or not self.is_quiet_for(job, known)
        ):
            pthread_mutex_unlock(&self.mutex)
            free(job.buffer)
            free(job.message)
            free(job)
            return NULL
        job.fd, job.inode, job.user = known.fd, known.inode, known.user
        job.for_caller, job.uid, job.gid = known.for_caller, known.uid, known.gid
        memcpy(job.message, start, <size_t> got)
        job.message_size = <size_t> got
        job.size = size
        job.start = job.buffer
        if kind == WRITE:
            job.start = job.message + sizeof(header) + sizeof(write)
        self.add_ahead(job)
        pthread_mutex_unlock(&self.mutex)
        return job

    cdef bint read_now(self, Job *job) noexcept nogil:
        """As the leader: make a read, and answer it, if all is in memory. It waits for nobody."""
        cdef bint is_full
        job.result = read_nowait(job.fd, job.start, job.size, job.offset)
        if job.result != <ssize_t> job.size:
            return False  # at the end of a file, too: it is read again
        job.is_back = True
        answer(job, self.device)
        pthread_mutex_lock(&self.mutex)
        job.is_made = job.is_over = True
        is_full = self.count_ahead >= BATCH or not job.is_answered
        if job.state == READY:
            job.next, self.done = self.done, job
        self.unlock_and_finish(not is_full)
        return True

    cdef void make_ahead(self, Job *job) noexcept nogil:
        """Make a call ahead, and answer it; see that its body is run if nobody else does."""
        cdef bint can_wait
        self.perform(job)
        pthread_mutex_lock(&self.mutex)
        job.is_over = True
        can_wait = (
            job.state == RAW and job.is_answered and self.in_calls >= CROWD
            and self.count_ahead < BATCH
        )
        if job.state == READY:
            job.next, self.done = self.done, job
        # Else who runs its body finishes it; or whoever runs Python claims it, before it waits.
        self.unlock_and_finish(can_wait)

    def made_ahead(self):
        """Of each call made ahead that is not over: what it is, its inode, and when it was begun."""
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

    cpdef catch_up(self):
        """Run the bodies of all calls made ahead, up to these: another body is about to begin.

        Any thread that runs Python.
        """
        cdef Job *job
        cdef bint is_any
        while True:
            pthread_mutex_lock(&self.mutex)
            job = self.claimed(False)
            is_any = job == NULL and self.is_any_claimed()
            pthread_mutex_unlock(&self.mutex)
            if job != NULL:
                self.run_body(job)
            elif is_any:  # by threads that wait for the interpreter's lock
                with nogil:
                    pthread_mutex_lock(&self.mutex)
                    while self.is_any_claimed():
                        pthread_cond_wait(&self.is_ready, &self.mutex)
                    pthread_mutex_unlock(&self.mutex)
            else:
                return

    cdef run_body(self, Job *job):
        """Run the body of a call made ahead, that was claimed, up to this call, or beyond."""
        cdef bint is_over
        request = None
        try:
            message = decoded(job.message, job.message_size, self.device.short_setxattr)
            request = self.foresee(message, job.began)
        except BaseException:  # nobody else would ever run it, and all wait for that
            log.exception("a call was made ahead that its body does not ask for")
        Py_INCREF(request)
        job.request = <PyObject *> request
        pthread_mutex_lock(&self.mutex)
        job.state = READY
        is_over = job.is_over
        pthread_cond_broadcast(&self.is_ready)
        pthread_mutex_unlock(&self.mutex)
        if is_over:
            self.finish_one(job)

    # The mutex is held:

    cdef bint is_quiet_for(self, Job *wanted, KnownHandle *known) noexcept nogil:
        """Whether nothing is under way that a call could meet, and one may be made."""
        cdef Job *job = self.ahead
        cdef int i, count = 0
        if self.busy or self.count_ahead >= MOST_AHEAD or self.in_calls + 1 >= self.threads:
            return False
        if self.is_over:
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

    # ---- plain calls --------------------------------------------------------------------------

    def make(self, request, uint64_t unique):
        """Make a request's plain call, the role having been passed on; answer it, and lead.

        Returns:
            The next message, if others ran Python and the body was left to them. None: it is to
            be asked for.

        Raises:
            OSError: as `lead`.
        """
        cdef Job *job
        cdef ssize_t got = 0
        cdef bint is_left = False
        try:
            job = job_of(request, unique)
        except MemoryError:
            self.came_back()
            self.finish(request, -ENOMEM, False, False)
            return None
        self.leave()
        with nogil:
            self.perform(job)
            pthread_mutex_lock(&self.mutex)
            is_left = self.in_python > 0 and job.is_answered
            if is_left:
                job.next, self.done = self.done, job
            else:
                self.in_python += 1
            pthread_mutex_unlock(&self.mutex)
            if is_left:
                got = self.next(False)
        if is_left:
            if got:
                self.drain()
                message = self.message(got)
                self.catch_up()
                return message
            return None
        self.finish_one(job)
        return None

    cdef void perform(self, Job *job) noexcept nogil:
        """Make a call, and answer it."""
        do(job)
        if not job.by_hand:
            # Before the answer: who has it may ask at once.
            pthread_mutex_lock(&self.mutex)
            self.in_calls -= 1
            job.is_made = job.is_back and is_plain(job)
            pthread_mutex_unlock(&self.mutex)
        if job.is_back:
            answer(job, self.device)
        else:
            with gil:
                self.end_process()

    cdef void see_that_one_finishes(self) noexcept nogil:
        """There is something left of a body: where nobody runs Python, this thread does now."""
        pthread_mutex_lock(&self.mutex)
        self.unlock_and_finish(False)

    cdef void unlock_and_finish(self, bint can_wait) noexcept nogil:
        """Let the mutex go; and likewise, unless what is left can wait."""
        cdef bint is_alone = self.in_python == 0 and not can_wait
        if is_alone:
            self.in_python += 1
        pthread_mutex_unlock(&self.mutex)
        if is_alone:
            with gil:
                self.leave()

    def reserve(self, request, int for_user, int for_inode):
        """Count a request's plain call as under way, until `free`.

        Args:
            request: that asks for it.
            for_user: how many its user may have under way.
            for_inode: how many there may be on its inode.

        Returns:
            False if that many are.
        """
        user, inode = request.user, request.call.on
        mine, on = self.users.get(user, 0), self.inodes.get(inode, 0)
        if mine >= for_user or on >= for_inode:
            return False
        self.users[user], self.inodes[inode] = mine + 1, on + 1
        return True

    def free(self, user, inode):
        """A plain call of a user's on an inode is over, or another than a hand is to make it."""
        take_one(self.users, user)
        take_one(self.inodes, inode)

    def hand(self, request, uint64_t unique):
        """Have a hand make a request's plain call, and answer it.

        Args:
            request: that asks for it.
            unique: of its message.
        """
        cdef Job *job = job_of(request, unique)
        job.by_hand = True
        pthread_mutex_lock(&self.mutex)
        self.handed += 1
        self.queued += 1
        if self.first == NULL:
            self.first = job
        else:
            self.last.next = job
        self.last = job
        if self.idle:
            pthread_cond_signal(&self.has_job)
        pthread_mutex_unlock(&self.mutex)

    def work(self):
        """The life of a hand."""
        cdef Job *job
        with nogil:
            while True:
                pthread_mutex_lock(&self.mutex)
                self.idle += 1
                while self.first == NULL and not self.is_over:
                    pthread_cond_wait(&self.has_job, &self.mutex)
                self.idle -= 1
                job = self.first
                if job == NULL:
                    self.hands -= 1
                    pthread_mutex_unlock(&self.mutex)
                    break
                self.first = job.next
                self.queued -= 1
                pthread_mutex_unlock(&self.mutex)
                self.perform(job)
                pthread_mutex_lock(&self.mutex)
                self.handed -= 1
                self.finished += 1
                job.next, self.done = self.done, job
                pthread_mutex_unlock(&self.mutex)
                self.see_that_one_finishes()

    def take_back(self, wanted):
        """Take calls back that no hand has begun; the requests.

        Args:
            wanted: the request whose call it is; None: all.
        """
        cdef Job *before = NULL
        cdef Job *job
        cdef Job *next
        cdef Job *taken = NULL
        pthread_mutex_lock(&self.mutex)
        job = self.first
        while job != NULL:
            next = job.next
            if wanted is None or job.request == <PyObject *> wanted:
                if before == NULL:
                    self.first = next
                else:
                    before.next = next
                job.next, taken = taken, job
                self.handed -= 1
                self.queued -= 1
            else:
                before = job
            job = next
        self.last = before
        pthread_mutex_unlock(&self.mutex)
        found = []
        while taken != NULL:
            job, taken = taken, taken.next
            found.append(<object> job.request)
            Py_DECREF(<object> job.request)
            Py_DECREF(<object> job.data)
            free(job)
        found.reverse()
        return found
