# cython: language_level=3
"""Two calls for which Python takes several steps: a read of cached bytes, a write for a caller.

Optional: ninefuse is built without it where a compiler is missing, and does the same in Python
then (transfer.py, credentials.py). The types are in _transfer.pyi.

Source: preadv2(2), setfsuid(2), capset(2).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.exc cimport PyErr_CheckSignals, PyErr_Clear
from cpython.ref cimport Py_DECREF, PyObject
from libc.errno cimport EINTR
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport abort

import os

cdef extern from "Python.h":
    PyObject *PyBytes_FromStringAndSize(const char *, Py_ssize_t) except NULL
    int _PyBytes_Resize(PyObject **, Py_ssize_t)

cdef int64_t LONGEST = 0x7FFFF000  # bytes of one call; the kernel's own bound


cdef object _error(int code):
    return OSError(code, os.strerror(code))


def read_cached(int fd, int64_t count, int64_t offset):
    """Read what the page cache holds: preadv2(2) with RWF_NOWAIT.

    Into bytes that were not filled with zeros before, nor copied after.

    Args:
        fd: open for reading.
        count: bytes, at most 0x7ffff000.
        offset: where, in bytes.

    Returns:
        The bytes: fewer at the end of the file, or where the cache ends.

    Raises:
        ValueError: count or offset is out of range.
        OSError: EAGAIN, nothing is there without waiting; EOPNOTSUPP, the file system does not
            tell; the errors of preadv2(2).
    """
    cdef PyObject *buffer
    cdef char *start
    cdef ssize_t result
    cdef object data
    if not 0 <= count <= LONGEST or offset < 0:
        raise ValueError(f"cannot read {count} bytes at {offset}")
    buffer = PyBytes_FromStringAndSize(NULL, count)
    start = PyBytes_AS_STRING(<object> buffer)
    while True:
        with nogil:  # nobody else has seen the bytes
            result = read_nowait(fd, start, count, offset)
        if result != -EINTR:
            break
        try:
            PyErr_CheckSignals()
        except BaseException:
            Py_DECREF(<object> buffer)
            raise
    if result < 0:
        Py_DECREF(<object> buffer)
        raise _error(<int> -result)
    if result < count:
        if _PyBytes_Resize(&buffer, result) < 0:  # which has let the bytes go
            PyErr_Clear()
            raise MemoryError
    data = <object> buffer
    Py_DECREF(data)
    return data


def write_as(int fd, data, int64_t offset, uint32_t uid, uint32_t gid, end):
    """Write with other file system ids than this thread's: pwrite(2) between setfsuid(2)s.

    Nothing of Python runs meanwhile. See `spending_as` in credentials.py for what counts.

    Args:
        fd: open for writing.
        data: bytes or the like, at most 0x7ffff000. Must not be changed meanwhile.
        offset: where, in bytes; ignored for O_APPEND.
        uid: the file system user id.
        gid: the file system group id.
        end: called if the thread's own rights are not had back; it must end the process.

    Returns:
        How many bytes were written.

    Raises:
        ValueError: the data is too long, or the offset is negative.
        OSError: EPERM, this thread may not take these ids on; the errors of pwrite(2).
    """
    cdef Py_buffer view
    cdef ssize_t result
    cdef int is_back
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len > LONGEST or offset < 0:
            raise ValueError(f"cannot write {view.len} bytes at {offset}")
        while True:
            with nogil:
                result = pwrite_as(fd, view.buf, view.len, offset, uid, gid, &is_back)
            if not is_back:
                try:
                    end()
                finally:
                    abort()
            if result != -EINTR:
                break
            PyErr_CheckSignals()
    finally:
        PyBuffer_Release(&view)
    if result < 0:
        raise _error(<int> -result)
    return result
