# cython: language_level=3
"""Reads, writes and syncs by io_uring(7): asked for here, made by the kernel, taken back here.

A thin binding to liburing, for a loop that sleeps in epoll_wait(2) and is woken by an
eventfd. Optional: ninefuse is built without it where liburing 2.3 or a compiler is missing,
and runs without it where the kernel refuses io_uring. The types are in _ring.pyi.

A ring belongs to one thread. What a request needs (its token, the buffer that the kernel
reads or fills) is kept in a slot; the slot's number is all that the kernel is told, and
comes back with the completion. A slot does not move, and is let go by nothing but its
completion: a ring that is dropped with requests in flight leaves theirs allocated for ever,
since the kernel may write to them at any later time.

Source: io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_Clear
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, ENOMEM, ENOSYS, ETIME, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

import warnings

from ninefuse.errors import error

cdef extern from "Python.h":
    PyObject *PyBytes_FromStringAndSize(const char *, Py_ssize_t) except NULL
    int _PyBytes_Resize(PyObject **, Py_ssize_t)

cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int, void *, size_t)
    int c_close "close"(int)
    int usleep(unsigned)

cdef extern from "sys/eventfd.h" nogil:
    int EFD_CLOEXEC
    int EFD_NONBLOCK
    int eventfd(unsigned, int)

cdef extern from "liburing.h" nogil:
    unsigned IORING_SETUP_CQSIZE
    unsigned IORING_SETUP_CLAMP
    unsigned IORING_SETUP_SUBMIT_ALL
    unsigned IORING_SETUP_COOP_TASKRUN
    unsigned IORING_FEAT_NODROP
    unsigned IORING_FEAT_NATIVE_WORKERS
    unsigned IORING_FSYNC_DATASYNC
    int IORING_OP_READ
    int IORING_OP_WRITE
    int IORING_OP_FSYNC

    struct io_uring:
        pass
    struct io_uring_params:
        uint32_t flags
        uint32_t cq_entries
        uint32_t features
    struct io_uring_sqe:
        uint16_t personality
    struct io_uring_cqe:
        uint64_t user_data
        int res
    struct io_uring_probe:
        pass
    struct __kernel_timespec:
        long long tv_sec
        long long tv_nsec

    int io_uring_queue_init(unsigned, io_uring *, unsigned)
    int io_uring_queue_init_params(unsigned, io_uring *, io_uring_params *)
    void io_uring_queue_exit(io_uring *)
    int io_uring_register_eventfd(io_uring *, int)
    int io_uring_register_iowq_max_workers(io_uring *, unsigned *)
    int io_uring_register_personality(io_uring *)
    int io_uring_unregister_personality(io_uring *, int)
    io_uring_sqe *io_uring_get_sqe(io_uring *)
    void io_uring_sqe_set_data64(io_uring_sqe *, uint64_t)
    void io_uring_prep_read(io_uring_sqe *, int, void *, unsigned, uint64_t)
    void io_uring_prep_write(io_uring_sqe *, int, const void *, unsigned, uint64_t)
    void io_uring_prep_fsync(io_uring_sqe *, int, unsigned)
    void io_uring_prep_cancel64(io_uring_sqe *, uint64_t, int)
    unsigned io_uring_sq_ready(io_uring *)
    unsigned io_uring_cq_ready(io_uring *)
    bint io_uring_cq_has_overflow(io_uring *)
    int io_uring_submit(io_uring *)
    unsigned io_uring_peek_batch_cqe(io_uring *, io_uring_cqe **, unsigned)
    void io_uring_cq_advance(io_uring *, unsigned)
    int io_uring_wait_cqe_timeout(io_uring *, io_uring_cqe **, __kernel_timespec *)
    io_uring_probe *io_uring_get_probe_ring(io_uring *)
    int io_uring_opcode_supported(io_uring_probe *, int)
    void io_uring_free_probe(io_uring_probe *)

cdef enum:  # what is cancelled
    READS
    WRITES

cdef int DEFAULT_ENTRIES = 256

# More than are ever in flight at once; what does not fit is kept by the kernel all the same.
cdef unsigned COMPLETIONS = 4096

# What one system call transfers at most (MAX_RW_COUNT).
cdef int64_t LONGEST = 0x7FFFF000

# Whose completion says how a cancellation went. Not -1, which is liburing's own.
cdef uint64_t CANCELLATION = <uint64_t> -2

# How long close() waits before it cancels again, in nanoseconds: a request that was just on
# its way from one of the kernel's queues to another is not found.
cdef long long PATIENCE = 100_000_000

# How often a submission is tried that the kernel has no memory for, 1 ms apart.
cdef int TRIES = 1000

cdef unsigned CHUNK = 64


cdef struct Slot:
    PyObject *token  # NULL: the slot is free
    PyObject *buffer  # of a read: bytes that nobody else has seen; else NULL
    Py_buffer data  # of a write; else zeros
    unsigned number
    Slot *next  # free one


def probe():
    """Return which of read, write and fsync this kernel does; none where it refuses."""
    cdef io_uring ring
    cdef io_uring_probe *answer
    # Not liburing's own small ring: a thread's first ring says how many workers it gets.
    if io_uring_queue_init(DEFAULT_ENTRIES, &ring, 0) < 0:
        return frozenset()
    answer = io_uring_get_probe_ring(&ring)
    io_uring_queue_exit(&ring)
    if answer is NULL:
        return frozenset()
    codes = {"read": IORING_OP_READ, "write": IORING_OP_WRITE, "fsync": IORING_OP_FSYNC}
    try:
        return frozenset(
            name for name, code in codes.items() if io_uring_opcode_supported(answer, code)
        )
    finally:
        io_uring_free_probe(answer)


cdef class Ring:
    """A submission queue and a completion queue, and what is under way between them.

    Args:
        entries: how many requests are submitted with one system call at most, 1 or more.

    Raises:
        OSError: ENOSYS, no io_uring in this kernel, or one older than 5.12; EPERM, it is
            not allowed here; EACCES; ENOMEM; EMFILE.
    """

    cdef io_uring ring
    cdef int event
    cdef bint is_open
    cdef bint busy  # in a system call, without the interpreter's lock
    cdef int harvesting  # how many calls are at it, one inside the other
    cdef unsigned used
    cdef unsigned chunks
    cdef Slot **table  # of chunks
    cdef Slot *free
    cdef list early  # completions taken before somebody asked for them

    def __cinit__(self, int entries=DEFAULT_ENTRIES):
        cdef io_uring_params params
        cdef int result
        if entries < 1:
            raise ValueError(f"a ring needs an entry, not {entries}")
        self.event = -1
        self.early = []
        # A completion that takes some work on the submitting thread (a read that waited for
        # the page cache or for a pipe) wakes the thread if it sleeps, and otherwise waits for
        # its next system call, with no interrupt to force one: COOP_TASKRUN. DEFER_TASKRUN
        # would have the thread make a system call for all of them, also those that the
        # kernel's workers can post by themselves. SINGLE_ISSUER gains nothing without it, and
        # refuses the close from another thread.
        for wish in (IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN, 0):
            memset(&params, 0, sizeof(params))
            params.flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | <uint32_t> wish
            params.cq_entries = max(COMPLETIONS, 2 * <unsigned> entries)
            result = io_uring_queue_init_params(entries, &self.ring, &params)
            if result != -EINVAL:
                break
        if result < 0:
            raise error(-result)
        self.is_open = True
        try:
            # Before 5.12 the requests of a thread were made by other processes' threads.
            if not (params.features & IORING_FEAT_NODROP
                    and params.features & IORING_FEAT_NATIVE_WORKERS):
                raise error(ENOSYS)
            self.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if self.event < 0:
                raise error(errno)
            result = io_uring_register_eventfd(&self.ring, self.event)
            if result < 0:
                raise error(-result)
        except BaseException:
            self._give_back()
            raise

    def __del__(self):
        if self.is_open and self.used:
            warnings.warn(
                f"a ring was dropped with {self.used} requests in flight; their memory is lost",
                ResourceWarning,
                stacklevel=2,
            )

    def __dealloc__(self):
        cdef io_uring_cqe *cqe
        if self.is_open:
            while self.used and io_uring_peek_batch_cqe(&self.ring, &cqe, 1):
                if cqe.user_data != CANCELLATION:
                    self._drop(cqe.user_data)
                io_uring_cq_advance(&self.ring, 1)
            self._give_back()

    @property
    def fd(self):
        """The eventfd's descriptor: readable when completions have been posted."""
        self._check()
        return self.event

    @property
    def in_flight(self):
        """Requests that were queued or submitted and have not been reaped."""
        return self.used + len(self.early)

    @property
    def closed(self):
        """Whether `close` has done its work."""
        return not self.is_open

    def read(self, token not None, int fd, int64_t count, int64_t offset):
        """Queue a read: pread(2), which does not move the file's position.

        Args:
            token: what comes back with the result; kept until then.
            fd: open for reading; may be closed once the request was submitted.
            count: bytes, at most 0x7ffff000.
            offset: where, in bytes; 0 for what has no positions.

        Raises:
            ValueError: count or offset is out of range.
            OSError: the queue was full, and the kernel took nothing for a second.
        """
        cdef Slot *slot
        cdef io_uring_sqe *sqe
        self._check()
        if not 0 <= count <= LONGEST or offset < 0:
            raise ValueError(f"cannot read {count} bytes at {offset}")
        slot = self._slot()
        try:
            slot.buffer = PyBytes_FromStringAndSize(NULL, count)
            sqe = self._entry()
        except BaseException:
            self._let_go(slot)
            raise
        io_uring_prep_read(sqe, fd, PyBytes_AS_STRING(<object> slot.buffer), count, offset)
        self._keep(slot, token, sqe)

    def write(self, token not None, int fd, data, int64_t offset, int personality=0):
        """Queue a write: pwrite(2), which does not move the file's position.

        Args:
            token: what comes back with the result; kept until then.
            fd: open for writing; may be closed once the request was submitted.
            data: bytes or the like, at most 0x7ffff000; kept, and refused to be resized,
                until the request was reaped. Must not be changed meanwhile.
            offset: where, in bytes; ignored for O_APPEND, 0 for what has no positions.
            personality: with whose rights, a number of `register_personality`; 0: with those
                that this thread has when it submits.

        Raises:
            ValueError: the data is too long, the offset is negative, or this can be no
                personality.
            OSError: the queue was full, and the kernel took nothing for a second.
        """
        cdef Slot *slot
        cdef io_uring_sqe *sqe
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)  # may run anybody's code
        try:
            self._check()
            if view.len > LONGEST or offset < 0:
                raise ValueError(f"cannot write {view.len} bytes at {offset}")
            if not 0 <= personality <= 0xFFFF:
                raise ValueError(f"there is no personality {personality}")
            slot = self._slot()
        except BaseException:
            PyBuffer_Release(&view)
            raise
        slot.data = view
        try:
            sqe = self._entry()
        except BaseException:
            self._let_go(slot)
            raise
        io_uring_prep_write(sqe, fd, slot.data.buf, <unsigned> slot.data.len, offset)
        sqe.personality = <uint16_t> personality
        self._keep(slot, token, sqe)

    def fsync(self, token not None, int fd, bint datasync):
        """Queue an fsync(2), or an fdatasync(2).

        It covers writes whose results have come back; others may be made after it.

        Args:
            token: what comes back with the result; kept until then.
            fd: open; may be closed once the request was submitted.
            datasync: leave out what is not needed to read the data back.

        Raises:
            OSError: the queue was full, and the kernel took nothing for a second.
        """
        cdef Slot *slot
        cdef io_uring_sqe *sqe
        self._check()
        slot = self._slot()
        try:
            sqe = self._entry()
        except BaseException:
            self._let_go(slot)
            raise
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC if datasync else 0)
        self._keep(slot, token, sqe)

    def submit(self):
        """Hand all that is queued to the kernel, in one system call; none if nothing is.

        The interpreter's lock is free meanwhile. A read that the page cache can answer is
        completed in it.

        Returns:
            How many requests.

        Raises:
            OSError: EAGAIN, the kernel had no memory for them for a second; they stay
                queued.
        """
        self._check()
        return self._submit()

    def reap(self):
        """Take the completions posted so far, without a system call.

        Returns:
            For each its token, its result (bytes transferred, 0 for a sync, or the
            negated errno) and, of a read that succeeded, the bytes.
        """
        cdef list taken
        self._check()
        taken = self.early
        self.early = []
        self._harvest(taken)
        return taken

    def drain(self):
        """Make the eventfd unreadable until the next completion is posted.

        To be done before `reap`: the other way round a completion posted in between would
        go unnoticed.
        """
        cdef uint64_t count
        self._check()
        if c_read(self.event, &count, sizeof(count)) < 0 and errno not in (EAGAIN, EINTR):
            raise error(errno)

    def cancel_writes(self):
        """Ask the kernel to give up the writes that it has queued and not begun.

        What it gives up comes back with the result -ECANCELED; the rest as usual.
        """
        self._check()
        self._cancel(WRITES)

    def limit_workers(self, unsigned bounded, unsigned unbounded=0):
        """Set how many threads the kernel may use for requests that block.

        It applies to all rings of the calling thread. At first it is the smaller of the
        entries of the thread's first ring and four times the processors for bounded work,
        and the limit of processes for unbounded.

        Args:
            bounded: for regular files and block devices; 0: leave it as it is.
            unbounded: for pipes, sockets and the like; 0: leave it as it is.

        Returns:
            What both were before.

        Raises:
            OSError: EINVAL, a kernel before 5.15.
        """
        cdef unsigned values[2]
        cdef int result
        self._check()
        values[0] = bounded
        values[1] = unbounded
        result = io_uring_register_iowq_max_workers(&self.ring, values)
        if result < 0:
            raise error(-result)
        return values[0], values[1]

    def register_personality(self):
        """Have the kernel keep the rights that this thread has now: ids, groups, capabilities.

        Returns:
            A number for `write`, at least 1.

        Raises:
            OSError: ENOMEM; ENOSPC, there are 65,535 of them; EINVAL, a kernel before 5.6.
        """
        cdef int result
        self._check()
        result = io_uring_register_personality(&self.ring)
        if result < 0:
            raise error(-result)
        # 0 would be this thread's own rights, and the rest would not get through.
        if not 1 <= result <= 0xFFFF:
            raise error(EINVAL)
        return result

    def unregister_personality(self, int number):
        """Have the kernel forget rights that it keeps.

        What is queued is submitted first, as `submit` does: the kernel looks a personality up
        then, and what is under way keeps the rights that it found.

        Raises:
            OSError: EINVAL, there is no such number; as `submit`.
        """
        cdef int result
        self._check()
        self._submit()
        result = io_uring_unregister_personality(&self.ring, number)
        if result < 0:
            raise error(-result)

    def close(self):
        """Wait for what is in flight and give everything back. A second time does nothing.

        Reads are cancelled if they have to wait; what was asked to be written or synced is,
        however long it takes. Results that were not reaped are lost.

        Raises:
            KeyboardInterrupt: or what else a signal's handler raised; the ring is still open.
            OSError: as `submit`, likewise.
            RuntimeError: called by an object's end while completions are being taken.
        """
        cdef io_uring_cqe *cqe
        cdef __kernel_timespec patience
        cdef int result
        if not self.is_open:
            return
        self._check()
        if self.harvesting:
            raise RuntimeError("the ring's completions are just being taken")
        self._submit()
        self._harvest([])
        while self.used:
            self._cancel(READS)
            patience.tv_sec = 0
            patience.tv_nsec = PATIENCE
            self.busy = True
            with nogil:
                result = io_uring_wait_cqe_timeout(&self.ring, &cqe, &patience)
            self.busy = False
            if result < 0 and result not in (-ETIME, -EINTR, -EAGAIN):
                raise error(-result)
            self._harvest([])
            PyErr_CheckSignals()
        self.early = []
        if self.is_open:  # a token's end, or a handler, may have closed it meanwhile
            self._give_back()

    cdef int _check(self) except -1:
        if not self.is_open:
            raise ValueError("the ring is closed")
        if self.busy:
            raise RuntimeError("the ring belongs to another thread, which is using it")
        return 0

    cdef Slot *_slot(self) except NULL:
        """A free slot, not in the list of free ones any more."""
        cdef Slot **table
        cdef Slot *chunk
        cdef Slot *slot
        cdef unsigned n
        if self.free is NULL:
            table = <Slot **> PyMem_Realloc(self.table, (self.chunks + 1) * sizeof(Slot *))
            if table is NULL:
                raise MemoryError
            self.table = table
            chunk = <Slot *> PyMem_Calloc(CHUNK, sizeof(Slot))
            if chunk is NULL:
                raise MemoryError
            for n in range(CHUNK):
                chunk[n].number = self.chunks * CHUNK + n
                chunk[n].next = &chunk[n + 1] if n + 1 < CHUNK else NULL
            table[self.chunks] = chunk
            self.chunks += 1
            self.free = chunk
        slot = self.free
        self.free = slot.next
        return slot

    cdef void _keep(self, Slot *slot, object token, io_uring_sqe *sqe) noexcept:
        """Fill in the rest of a request that cannot fail any more."""
        Py_INCREF(token)
        slot.token = <PyObject *> token
        self.used += 1
        io_uring_sqe_set_data64(sqe, slot.number)

    cdef Slot *_at(self, uint64_t number) noexcept:
        return &self.table[number // CHUNK][number % CHUNK]

    cdef void _let_go(self, Slot *slot) noexcept:
        """Free a slot and its buffer; not its token. May run anybody's code, at its end."""
        cdef PyObject *buffer = slot.buffer
        cdef Py_buffer data = slot.data
        slot.token = NULL
        slot.buffer = NULL
        memset(&slot.data, 0, sizeof(Py_buffer))
        slot.next = self.free
        self.free = slot
        if buffer is not NULL:
            Py_DECREF(<object> buffer)
        PyBuffer_Release(&data)  # does nothing to zeros

    cdef void _drop(self, uint64_t number) noexcept:
        """Free a slot whose result nobody wants."""
        cdef Slot *slot = self._at(number)
        cdef PyObject *token = slot.token
        self.used -= 1
        self._let_go(slot)
        Py_DECREF(<object> token)

    cdef io_uring_sqe *_entry(self) except NULL:
        """The next entry of the submission queue; submits what is there if it is full."""
        cdef io_uring_sqe *sqe = io_uring_get_sqe(&self.ring)
        while sqe is NULL:
            self._submit()
            sqe = io_uring_get_sqe(&self.ring)
        return sqe

    cdef int _submit(self) except -1:
        cdef int result
        cdef int done = 0
        cdef int tries = 0
        while io_uring_sq_ready(&self.ring):
            self.busy = True
            with nogil:
                result = io_uring_submit(&self.ring)
            self.busy = False
            if result > 0:
                done += result
            elif result in (0, -EAGAIN, -EBUSY):
                # No memory, or no room for more completions: what is taken makes some.
                tries += 1
                if tries > TRIES:
                    raise error(EAGAIN)
                self._harvest(self.early)
                self.busy = True
                with nogil:
                    usleep(1000)
                self.busy = False
            elif result != -EINTR:
                raise error(-result)
        return done

    cdef int _harvest(self, list taken) except -1:
        """Add all completions posted so far.

        Allocating may run the collector, and that anybody's code, this method included: each
        completion is out of the ring before anything is made of it.
        """
        cdef io_uring_cqe *cqe
        cdef uint64_t number
        cdef int result
        cdef Slot *slot
        cdef PyObject *buffer
        cdef object token
        cdef object data
        self.harvesting += 1
        try:
            # It looks at the overflow too, and only then makes a system call.
            while io_uring_peek_batch_cqe(&self.ring, &cqe, 1):
                number = cqe.user_data
                result = cqe.res
                io_uring_cq_advance(&self.ring, 1)
                if number == CANCELLATION:
                    continue
                slot = self._at(number)
                token = <object> slot.token
                Py_DECREF(token)  # the slot's reference; ours is the variable's
                self.used -= 1
                data = None
                if slot.buffer is not NULL and result >= 0:
                    buffer = slot.buffer
                    slot.buffer = NULL
                    if (result < PyBytes_GET_SIZE(<object> buffer)
                            and _PyBytes_Resize(&buffer, result) < 0):
                        PyErr_Clear()
                        result = -ENOMEM
                    else:
                        data = <object> buffer
                        Py_DECREF(data)
                self._let_go(slot)
                taken.append((token, result, data))
        finally:
            self.harvesting -= 1
        return 0

    cdef int _cancel(self, int which) except -1:
        """Ask for the end of READS or of WRITES; there is an answer, but nobody needs it."""
        cdef unsigned n
        cdef Slot *slot
        cdef io_uring_sqe *sqe
        cdef bint is_it
        for n in range(self.chunks * CHUNK):
            slot = self._at(n)
            if slot.token is NULL:
                continue
            is_it = slot.data.buf is not NULL if which == WRITES else slot.buffer is not NULL
            if is_it:
                sqe = self._entry()
                io_uring_prep_cancel64(sqe, n, 0)
                io_uring_sqe_set_data64(sqe, CANCELLATION)
        self._submit()
        return 0

    cdef void _give_back(self) noexcept:
        """Close what is open. Slots in use stay: the kernel may still write to their buffers."""
        cdef unsigned n
        self.is_open = False
        io_uring_queue_exit(&self.ring)
        if self.event >= 0:
            c_close(self.event)
        if not self.used:
            for n in range(self.chunks):
                PyMem_Free(self.table[n])
            PyMem_Free(self.table)
            self.table = NULL
            self.free = NULL
            self.chunks = 0
