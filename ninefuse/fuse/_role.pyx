# cython: language_level=3, boundscheck=False, wraparound=False
"""The role of the dispatcher, which threads hand on, and plain calls made without Python.

One thread leads: it alone reads the device. While nobody leads, all free threads wait for the
device. A request wakes the thread that came last. That one leads. While somebody leads, free
threads wait for the role. So a request of a lone client wakes one thread, and the role costs
nothing.

The leader runs a request's body to its first call that blocks. If that is *plain* (a read, a write
or a sync, whose good outcome is the answer), it is made and answered here, without the
interpreter's lock (_plain.pyx):

* by the leader itself, once it has passed the role on (`make`);
* by a *hand*: a thread that makes plain calls only (`hand`, `work`). The leader goes on to read
  then, and keeps the interpreter's lock while requests stand in line.

A read, write or sync that can meet nothing under way needs not even its body: the message says
which call the body is going to ask for. So the call is made *ahead*, and answered (_ahead.pyx has
which ones). A read of what is in memory needs not even another leader: it waits for nobody
(`read_now`). The body is run afterwards, up to this call, and on with what came of it. It is run
before any other body. So whatever comes later finds it under way, or over. Where several clients go
side by side, it may wait for more of them. One thread then runs all, and the interpreter's lock
changes hands once for many.

What is left of a body after its answer is table work. A thread that has the interpreter's lock
anyway does it: before it looks at another request, and before it waits. It must not wait for a
request to come. So it is counted which threads run Python. A thread that has made a call while none
does takes the lock at once.

Locks touched: the mutex of a `Role`, for a few instructions; the interpreter's lock is never
waited for inside.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_Clear
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EIO, ENODEV, ENOENT, ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t

import logging

from ninefuse.errors import error
from ninefuse.fuse._ahead cimport (
    Ahead,
    pthread_mutex_lock,
    pthread_mutex_t,
    pthread_mutex_unlock,
)
from ninefuse.fuse._message cimport Message, decoded
from ninefuse.fuse._plain cimport RAW, READ, READY, Job, answer, do, is_plain, job_of, let_go, now
from ninefuse.fuse._wire cimport POLLIN, Device, poll, pollfd
from ninefuse.linux._transfer cimport read_nowait

log = logging.getLogger(__name__)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass
    ctypedef unsigned long pthread_t
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    pthread_t pthread_self()

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void *, size_t)
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

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **, Py_ssize_t)

cdef enum:
    CROWD = 2  # calls that others are in: so many come back soon, and a body may wait for them
    BATCH = 32  # calls made ahead, the bodies of which are run at the latest when there are as many
    BATCH_TIME = 10  # milliseconds after which they are, if nothing else comes


cdef take_one(dict counts, key):
    """Count one less. Nothing of Python runs in it, so that no other thread comes between."""
    count = counts[key] - 1
    if count:
        counts[key] = count
    else:
        del counts[key]


cdef class Role(Ahead):
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
    """

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
    cdef Job *done  # by calls that were made, and whose bodies have not gone on
    cdef Job *first  # that hands are to make
    cdef Job *last
    cdef Device device
    cdef int wake
    cdef object finish, end_process
    cdef dict users, inodes  # plain calls that are under way, of each

    def __cinit__(self):
        self.epoll = self.nudge = -1
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
        let_go(job)

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
            job = self.foreseen(self.device.buffer, got)
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

    cdef bint has_room(self) noexcept nogil:
        """Whether another thread can lead while this one makes a call. The mutex is held."""
        return not self.is_over and self.in_calls + 1 < self.threads

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
            let_go(job)
        found.reverse()
        return found
