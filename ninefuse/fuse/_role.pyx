# cython: language_level=3, boundscheck=False, wraparound=False
"""The role of the dispatcher, which threads hand on, and plain calls made without Python.

One thread leads: it alone waits for the device and reads it. Those that follow wait for the role.
The leader runs a request's body to its first call that blocks; if that is *plain* (a read, a write
or a sync, whose good outcome is the answer), it is made here, and answered here, without the
interpreter's lock:

* by the leader itself, once it has passed the role on (`make`);
* by a *hand*: a thread that does nothing else (`hand`, `work`). The leader goes on to read then,
  and keeps the interpreter's lock while requests stand in line.

What is left of a body after its answer is table work. It is done by a thread that has the
interpreter's lock anyway: before it looks at another request, and before it waits. So that it
never waits for a request to come, it is counted which threads run Python: whoever has made a call
while none does takes the lock at once.

Locks touched: the mutex of a `Role`, for a few instructions; the interpreter's lock is never
waited for inside.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_Clear
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, ENODEV, ENOENT, ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

import logging
import os

from ninefuse.calls import Fsync, Pread, Pwrite
from ninefuse.fuse._wire cimport POLLIN, Device, Message, OutHeader, decoded, iovec, poll, pollfd
from ninefuse.linux._transfer cimport pwrite_as

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

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **, Py_ssize_t)

cdef enum Kind:
    READ
    WRITE
    SYNC
    SYNC_DATA

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


cdef void answer(Job *job, Device device) noexcept nogil:
    """Answer a request whose call went well; else Python has more to do with it."""
    cdef OutHeader header
    cdef iovec parts[2]
    cdef uint32_t out[2]
    cdef int count = 2
    if job.result < 0 or (job.kind == WRITE and <size_t> job.result < job.size):
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

    Attributes:
        threads: that take part in leading.
        in_calls: how many of them are in a call that may wait.
        handed: plain calls that hands have or are to have.
        queued: those that no hand has begun.
        finished: how many calls hands have made.
        idle: hands that have nothing to do.
        hands: how many there are.
    """

    cdef pthread_mutex_t mutex
    cdef pthread_cond_t is_free, has_job
    cdef bint is_taken, is_over
    cdef pthread_t leader
    cdef int followers, in_python
    cdef readonly int threads, in_calls, handed, queued, idle, hands
    cdef readonly long finished
    cdef Job *done  # by calls that were made, and whose bodies have not gone on
    cdef Job *first  # that hands are to make
    cdef Job *last
    cdef Device device
    cdef int wake
    cdef object finish, end_process
    cdef dict users, inodes  # plain calls that are under way, of each

    def __cinit__(self):
        if pthread_mutex_init(&self.mutex, NULL):
            raise MemoryError
        if pthread_cond_init(&self.is_free, NULL) or pthread_cond_init(&self.has_job, NULL):
            raise MemoryError

    def __init__(self, Device device not None, int wake, finish, end_process):
        self.device = device
        self.wake = wake
        self.finish = finish
        self.end_process = end_process
        self.users = {}
        self.inodes = {}

    # ---- who runs Python ----------------------------------------------------------------------

    def enter(self):
        """This thread runs Python from here on."""
        pthread_mutex_lock(&self.mutex)
        self.in_python += 1
        pthread_mutex_unlock(&self.mutex)

    def leave(self):
        """This thread is about to wait: it finishes what was left, and runs Python no more."""
        cdef Job *done
        while True:
            pthread_mutex_lock(&self.mutex)
            done, self.done = self.done, NULL
            if done == NULL:
                self.in_python -= 1
            pthread_mutex_unlock(&self.mutex)
            if done == NULL:
                return
            self.finish_all(done)

    cdef drain(self):
        """Finish what was left."""
        cdef Job *done
        if self.done != NULL:
            pthread_mutex_lock(&self.mutex)
            done, self.done = self.done, NULL
            pthread_mutex_unlock(&self.mutex)
            self.finish_all(done)

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
        if is_read and 0 <= result < <ssize_t> job.size:
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
        free(job)
        try:
            self.finish(request, outcome, is_answered, by_hand)
        except Exception:
            log.exception("a request cannot go on")

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
            self.in_calls += 1
            self.is_taken = False
            self.leader = 0  # so that this thread never takes itself for it, without the mutex
            if self.followers:
                pthread_cond_signal(&self.is_free)
        pthread_mutex_unlock(&self.mutex)
        return passed

    def retires(self):
        """A thread that leads, or has ended, takes part no more."""
        pthread_mutex_lock(&self.mutex)
        self.threads -= 1
        self.is_taken = False
        self.leader = 0
        if self.followers:
            pthread_cond_signal(&self.is_free)
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

    def lead(self):
        """Wait for the role, and as its holder for the next request.

        Returns:
            The message; None: it is over.

        Raises:
            OSError: ENODEV, there is no mount any more, and others of read(2).
        """
        cdef ssize_t got
        cdef Message message = None
        if self.is_taken and self.leader == pthread_self() and not self.is_over:
            # While requests stand in line the interpreter's lock is kept: this does not wait.
            self.drain()
            got = read(self.device.fd, self.device.buffer, self.device.size)
            if got > 0:
                message = self.message(got)
        while message is None:
            self.leave()
            with nogil:
                got = self.next()
            if got == 0:
                return None
            message = self.message(got)
        return message

    cdef ssize_t next(self) noexcept nogil:
        """Take the role and read: a size, 0 for the end, or a negated errno. Runs Python then."""
        cdef ssize_t got = 0
        cdef int code
        cdef pollfd fds[2]
        pthread_mutex_lock(&self.mutex)
        if not self.is_taken or self.leader != pthread_self():
            self.followers += 1
            while self.is_taken and not self.is_over:
                pthread_cond_wait(&self.is_free, &self.mutex)
            self.followers -= 1
            if not self.is_over:
                self.is_taken = True
                self.leader = pthread_self()
        if self.is_over:
            self.in_python += 1
            pthread_mutex_unlock(&self.mutex)
            return 0
        pthread_mutex_unlock(&self.mutex)
        fds[0].fd, fds[1].fd = self.device.fd, self.wake
        fds[0].events = fds[1].events = POLLIN
        while True:
            fds[1].revents = 0
            if poll(fds, 2, -1) < 0:
                continue
            if fds[1].revents:
                got = 0
                break
            got = read(self.device.fd, self.device.buffer, self.device.size)
            if got > 0:
                break
            code = ECONNRESET if got == 0 else errno
            # Withdrawn before it was read, or while it was.
            if code == EAGAIN or code == EINTR or code == ENOENT:
                continue
            # The other end of what stands for a device is gone.
            got = -ENODEV if code == ECONNRESET else -code
            break
        pthread_mutex_lock(&self.mutex)
        self.in_python += 1
        pthread_mutex_unlock(&self.mutex)
        return got

    cdef Message message(self, ssize_t got):
        """What was read; None if it has not even a header."""
        if got < 0:
            raise OSError(-got, os.strerror(<int> -got))
        return decoded(self.device.buffer, got, self.device.short_setxattr)

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
            do(job)
            pthread_mutex_lock(&self.mutex)
            self.in_calls -= 1
            pthread_mutex_unlock(&self.mutex)
            if job.is_back:
                answer(job, self.device)
            pthread_mutex_lock(&self.mutex)
            is_left = self.in_python > 0 and job.is_answered
            if is_left:
                job.next, self.done = self.done, job
            else:
                self.in_python += 1
            pthread_mutex_unlock(&self.mutex)
            if is_left:
                got = self.next()
        if is_left:
            if got:
                self.drain()
                return self.message(got)
            return None
        if not job.is_back:
            self.end_process()
        self.finish_one(job)
        return None

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
        cdef bint is_alone
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
                do(job)
                if job.is_back:
                    answer(job, self.device)
                else:
                    with gil:
                        self.end_process()
                pthread_mutex_lock(&self.mutex)
                self.handed -= 1
                self.finished += 1
                job.next, self.done = self.done, job
                is_alone = self.in_python == 0
                if is_alone:
                    self.in_python += 1
                pthread_mutex_unlock(&self.mutex)
                if is_alone:
                    with gil:
                        self.leave()

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
