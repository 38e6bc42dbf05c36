# cython: language_level=3, boundscheck=False, wraparound=False
"""A plain call: a read, a write or a sync, made and answered without the interpreter's lock.

Its good outcome is the answer. Of any other outcome Python is told, which has more to do with it.

Locks touched: none. A job is one thread's at a time, but for what _role.pyx says of it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_INCREF, PyObject
from libc.errno cimport EINTR, ENODEV, ENOENT, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from ninefuse.calls import Fsync, Pread, Pwrite
from ninefuse.fuse._wire cimport Device, OutHeader, iovec
from ninefuse.linux._transfer cimport pwrite_as

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int, void *, size_t, int64_t)
    ssize_t pwrite(int, const void *, size_t, int64_t)
    int fsync(int)
    int fdatasync(int)

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int, timespec *)


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


cdef void let_go(Job *job) noexcept nogil:
    """Free a job, with what was kept of its message. Not what it refers to."""
    free(job.message)
    free(job.buffer)
    free(job)


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
