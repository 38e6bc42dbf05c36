# cython: language_level=3, boundscheck=False, wraparound=False
"""The kernel's side of a FUSE connection: one device, and replies encoded.

This module knows the protocol's bytes and nothing of files. `Device` reads one request at a time
(_message.pyx decodes it) and writes one reply at a time, without the interpreter's lock.

Source: Linux include/uapi/linux/fuse.h; fs/fuse/dev.c, fuse_dev_do_read and fuse_dev_do_write.

Locks touched: none. Any thread may write replies; one thread at a time may read.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EINVAL, EIO, ENODEV, ENOENT, errno
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from ninefuse.errors import error
from ninefuse.fuse._message cimport Message, decoded

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **, size_t, size_t)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void *, size_t)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int, const iovec *, int)

cdef enum:
    _PAGE = 4096

# ---- the protocol's structures ----------------------------------------------------------------

cdef struct Attr:
    uint64_t ino, size, blocks, atime, mtime, ctime
    uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags

cdef struct EntryOut:
    uint64_t nodeid, generation, entry_valid, attr_valid
    uint32_t entry_valid_nsec, attr_valid_nsec
    Attr attr

cdef struct AttrOut:
    uint64_t attr_valid
    uint32_t attr_valid_nsec, dummy
    Attr attr

cdef struct OpenOut:
    uint64_t fh
    uint32_t open_flags
    int32_t backing_id

cdef struct CreateOut:
    EntryOut entry
    OpenOut opened

cdef struct StatfsOut:
    uint64_t blocks, bfree, bavail, files, ffree
    uint32_t bsize, namelen, frsize, padding
    uint32_t spare[6]

cdef struct LockOut:
    uint64_t start, end
    uint32_t type, pid

cdef struct IoctlOut:
    int32_t result
    uint32_t flags, in_iovs, out_iovs

cdef struct Time:
    int64_t seconds
    uint32_t nanoseconds
    int32_t reserved

cdef struct StatxOut:
    uint64_t attr_valid
    uint32_t attr_valid_nsec, out_flags
    uint64_t spare[2]
    uint32_t mask, blksize
    uint64_t attributes
    uint32_t nlink, uid, gid
    uint16_t mode, spare0
    uint64_t ino, size, blocks, attributes_mask
    Time atime, btime, ctime, mtime
    uint32_t rdev_major, rdev_minor, dev_major, dev_minor
    uint64_t spare2[14]

cdef struct Dirent:
    uint64_t ino, off
    uint32_t namelen, type

SIZES = {  # checked by the tests against the protocol's description
    "out_header": sizeof(OutHeader),
    "attr": sizeof(Attr),
    "entry_out": sizeof(EntryOut),
    "attr_out": sizeof(AttrOut),
    "open_out": sizeof(OpenOut),
    "statfs_out": sizeof(StatfsOut),
    "lk_out": sizeof(LockOut),
    "ioctl_out": sizeof(IoctlOut),
    "statx_out": sizeof(StatxOut),
    "dirent": sizeof(Dirent),
}

# ---- encoding ---------------------------------------------------------------------------------

cdef inline uint64_t number_at(attributes, Py_ssize_t index) except? 0xFFFFFFFFFFFFFFFF:
    return <uint64_t> <object> PyTuple_GET_ITEM(attributes, index)


cdef inline int64_t signed_at(attributes, Py_ssize_t index) except? -1:
    return <int64_t> <object> PyTuple_GET_ITEM(attributes, index)


cdef enum:  # the fields of Attributes (linux/syscalls.py), in its order
    _MASK, _BLKSIZE, _FLAGS, _NLINK, _UID, _GID, _MODE, _INO, _SIZE, _BLOCKS, _FLAGS_MASK
    _ATIME, _ATIME_NS, _BTIME, _BTIME_NS, _CTIME, _CTIME_NS, _MTIME, _MTIME_NS
    _RDEV_MAJOR, _RDEV_MINOR, _DEV_MAJOR, _DEV_MINOR


cdef int check_attributes(a) except -1:
    """Refuse what is no tuple with all the fields."""
    if not isinstance(a, tuple) or PyTuple_GET_SIZE(a) <= _DEV_MINOR:
        raise TypeError(f"not Attributes: {a!r}")
    return 0


cdef int fill_attr(Attr *attr, uint64_t ino, a) except -1:
    """Put Attributes into the kernel's structure."""
    cdef uint32_t major, minor
    check_attributes(a)
    major = <uint32_t> number_at(a, _RDEV_MAJOR)
    minor = <uint32_t> number_at(a, _RDEV_MINOR)
    attr.ino = ino
    attr.size = number_at(a, _SIZE)
    attr.blocks = number_at(a, _BLOCKS)
    attr.atime = <uint64_t> signed_at(a, _ATIME)
    attr.mtime = <uint64_t> signed_at(a, _MTIME)
    attr.ctime = <uint64_t> signed_at(a, _CTIME)
    attr.atimensec = <uint32_t> number_at(a, _ATIME_NS)
    attr.mtimensec = <uint32_t> number_at(a, _MTIME_NS)
    attr.ctimensec = <uint32_t> number_at(a, _CTIME_NS)
    attr.mode = <uint32_t> number_at(a, _MODE)
    attr.nlink = <uint32_t> number_at(a, _NLINK)
    attr.uid = <uint32_t> number_at(a, _UID)
    attr.gid = <uint32_t> number_at(a, _GID)
    attr.rdev = minor & 0xFF | major << 8 | (minor & ~<uint32_t> 0xFF) << 12
    attr.blksize = <uint32_t> number_at(a, _BLKSIZE)
    attr.flags = 0
    return 0


cdef void fill_time(double seconds, uint64_t *whole, uint32_t *nanoseconds) noexcept:
    """Put a duration into the kernel's two fields; what is longer than it takes is the longest."""
    if not seconds > 0:
        whole[0] = 0
        nanoseconds[0] = 0
    elif seconds >= 1e15:
        whole[0] = <uint64_t> 1_000_000_000_000_000
        nanoseconds[0] = 0
    else:
        whole[0] = <uint64_t> seconds
        nanoseconds[0] = <uint32_t> ((seconds - <double> whole[0]) * 1e9)


cdef int fill_entry(
    EntryOut *entry, uint64_t nodeid, uint64_t generation, double entry_valid, double attr_valid,
    uint64_t ino, a
) except -1:
    entry.nodeid = nodeid
    entry.generation = generation
    fill_time(entry_valid, &entry.entry_valid, &entry.entry_valid_nsec)
    fill_time(attr_valid, &entry.attr_valid, &entry.attr_valid_nsec)
    fill_attr(&entry.attr, ino, a)
    return 0


@cython.final
cdef class Entries:
    """The entries of a directory for one reply, as many as it has room for.

    Args:
        size: bytes of the reply at most.
    """

    cdef bytearray data
    cdef size_t room

    def __init__(self, size_t size):
        self.data = bytearray()
        self.room = size

    cdef bint _add(
        self, EntryOut *entry, bytes name, uint64_t ino, uint64_t offset, uint32_t kind
    ) except -1:
        cdef Dirent dirent
        cdef Py_ssize_t length = PyBytes_GET_SIZE(name)
        cdef Py_ssize_t size = (<Py_ssize_t> sizeof(dirent) + length + 7) & ~7
        cdef Py_ssize_t at = len(self.data)
        cdef Py_ssize_t whole = size + (<Py_ssize_t> sizeof(EntryOut) if entry != NULL else 0)
        cdef char *start
        if <size_t> whole > self.room:
            return False
        self.room -= whole
        self.data.extend(bytes(whole))
        start = (<char *> self.data) + at
        if entry != NULL:
            memcpy(start, entry, sizeof(EntryOut))
            start += sizeof(EntryOut)
        dirent.ino = ino
        dirent.off = offset
        dirent.namelen = <uint32_t> length
        dirent.type = kind
        memcpy(start, &dirent, sizeof(dirent))
        memcpy(start + sizeof(dirent), PyBytes_AS_STRING(name), length)
        return True

    def add(self, bytes name not None, uint64_t ino, uint64_t offset, uint32_t kind):
        """Add an entry of READDIR; False, and nothing is added, where there is no room.

        Args:
            name: its name.
            ino: its inode number.
            offset: the cookie of the entry after it.
            kind: DT_* of its type.
        """
        return self._add(NULL, name, ino, offset, kind)

    def add_plus(
        self, bytes name not None, uint64_t ino, uint64_t offset, uint32_t kind, uint64_t nodeid,
        uint64_t generation, double entry_valid, double attr_valid, attributes
    ):
        """Add an entry of READDIRPLUS, likewise.

        Args:
            name, ino, offset, kind: as of `add`.
            nodeid: 0: nothing is said but the name, and no lookup is counted.
            generation: of the nodeid.
            entry_valid, attr_valid: seconds for which name and attributes may be believed.
            attributes: Attributes, or None with nodeid 0.
        """
        cdef EntryOut entry
        memset(&entry, 0, sizeof(entry))
        if nodeid:
            fill_entry(&entry, nodeid, generation, entry_valid, attr_valid, ino, attributes)
        return self._add(&entry, name, ino, offset, kind)

    @property
    def reply(self):
        """All that was added, as the reply has it."""
        return bytes(self.data)


# ---- the device -------------------------------------------------------------------------------

@cython.final
cdef class Device:
    """An open FUSE device, or what stands for one: each read one request, each write one reply.

    Replies return whether somebody took them. False: the request was withdrawn meanwhile, or
    there is no mount any more; what the reply gave away is to be taken back.

    Args:
        fd: open, with O_NONBLOCK; it stays its owner's.
        size: bytes that a request may have.

    Attributes:
        fd: as given.
        short_setxattr: whether the kernel sends SETXATTR in its older form.

    Raises:
        MemoryError: there is no room for a request.
    """

    def __cinit__(self, int fd, size_t size):
        cdef void *room = NULL
        if posix_memalign(&room, _PAGE, size):
            raise MemoryError
        self.buffer = <char *> room
        self.fd = fd
        self.size = size
        self.short_setxattr = True

    def __dealloc__(self):
        free(self.buffer)

    def receive(self):
        """Read the next request; does not wait.

        Returns:
            The message; None if there is none now.

        Raises:
            OSError: ENODEV, there is no mount any more; ECONNABORTED, it was aborted; EPERM,
                it is not there yet; others of read(2).
        """
        cdef ssize_t got
        cdef int code
        cdef Message message
        while True:
            with nogil:
                got = read(self.fd, self.buffer, self.size)
                code = errno
            if got < 0:
                if code == EAGAIN or code == EINTR:
                    return None
                if code == ENOENT:  # it was withdrawn while it was copied
                    continue
                if code == ECONNRESET:  # as below, and answers were not read
                    code = ENODEV
                raise error(code)
            message = decoded(self.buffer, got, self.short_setxattr)
            if message is not None:
                return message
            if not got:  # the other end of what stands for a device
                raise error(ENODEV)

    def wait(self, int wake, int other, int milliseconds):
        """Sleep until there is a request, or one of two other descriptors is readable.

        Args:
            wake, other: the descriptors; -1: none.
            milliseconds: how long at most; -1: for ever.

        Returns:
            1 for the device, 2 for ``wake`` and 4 for ``other``, added; 0 if the time is over.
        """
        cdef pollfd fds[3]
        cdef int found = 0, count
        fds[0].fd, fds[1].fd, fds[2].fd = self.fd, wake, other
        for index in range(3):
            fds[index].events = POLLIN
            fds[index].revents = 0
        with nogil:
            count = poll(fds, 3, milliseconds)
        if count > 0:
            for index in range(3):
                if fds[index].revents:
                    found |= 1 << index
        return found

    cdef int send(self, iovec *parts, int count) noexcept nogil:
        """Write what is in the parts, the first an OutHeader; 0 or an errno."""
        cdef size_t whole = 0
        cdef int index
        for index in range(count):
            whole += parts[index].iov_len
        (<OutHeader *> parts[0].iov_base).len = <uint32_t> whole
        while writev(self.fd, parts, count) < 0:
            if errno != EINTR:
                return errno
        return 0

    cdef bint answer(self, uint64_t unique, const void *body, size_t size) except -1:
        return self.answer_two(unique, body, size, NULL, 0)

    cdef bint answer_two(
        self, uint64_t unique, const void *body, size_t size, const void *more, size_t more_size
    ) except -1:
        cdef OutHeader header
        cdef iovec parts[3]
        cdef int code
        header.error = 0
        header.unique = unique
        parts[0].iov_base, parts[0].iov_len = &header, sizeof(header)
        parts[1].iov_base, parts[1].iov_len = <void *> body, size
        parts[2].iov_base, parts[2].iov_len = <void *> more, more_size
        with nogil:
            code = self.send(parts, 3 if more_size else 2 if size else 1)
        if not code:
            return True
        if code == EINVAL:
            # The kernel does not take it for an answer, and its caller would wait for ever.
            self.error(unique, EIO)
            raise OSError(EINVAL, "the kernel refused a reply")
        return False

    def error(self, uint64_t unique, int code):
        """Answer with an error.

        Args:
            unique: of the request.
            code: an errno, 1 to 511.
        """
        cdef OutHeader header
        cdef iovec part
        cdef int failed
        if not 0 < code < 512:
            code = EIO
        header.error = -code
        header.unique = unique
        part.iov_base, part.iov_len = &header, sizeof(header)
        with nogil:
            failed = self.send(&part, 1)
        return failed == 0

    def empty(self, uint64_t unique):
        """Answer that it is done."""
        return self.answer(unique, NULL, 0)

    def data(self, uint64_t unique, bytes data not None):
        """Answer with bytes: what was read, a target, a value, entries."""
        return self.answer(unique, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    def entry(
        self, uint64_t unique, uint64_t nodeid, uint64_t generation, double entry_valid,
        double attr_valid, uint64_t ino, attributes
    ):
        """Answer with a file that was looked up or made; arguments as of `Entries.add_plus`."""
        cdef EntryOut out
        fill_entry(&out, nodeid, generation, entry_valid, attr_valid, ino, attributes)
        return self.answer(unique, &out, sizeof(out))

    def absent(self, uint64_t unique, double entry_valid):
        """Answer that there is no such name, which may be believed for so many seconds."""
        cdef EntryOut out
        memset(&out, 0, sizeof(out))
        fill_time(entry_valid, &out.entry_valid, &out.entry_valid_nsec)
        return self.answer(unique, &out, sizeof(out))

    def attributes(self, uint64_t unique, double attr_valid, uint64_t ino, attributes):
        """Answer with Attributes, to be believed for so many seconds."""
        cdef AttrOut out
        out.dummy = 0
        fill_time(attr_valid, &out.attr_valid, &out.attr_valid_nsec)
        fill_attr(&out.attr, ino, attributes)
        return self.answer(unique, &out, sizeof(out))

    def opened(self, uint64_t unique, uint64_t handle, uint32_t flags, int32_t backing=0):
        """Answer with a file handle, FOPEN_* flags, and the backing id that these may ask for."""
        cdef OpenOut out
        out.fh = handle
        out.open_flags = flags
        out.backing_id = backing
        return self.answer(unique, &out, sizeof(out))

    def created(
        self, uint64_t unique, uint64_t nodeid, uint64_t generation, double entry_valid,
        double attr_valid, uint64_t ino, attributes, uint64_t handle, uint32_t flags,
        int32_t backing=0
    ):
        """Answer as `entry` and `opened` do, in one."""
        cdef CreateOut out
        fill_entry(&out.entry, nodeid, generation, entry_valid, attr_valid, ino, attributes)
        out.opened.fh = handle
        out.opened.open_flags = flags
        out.opened.backing_id = backing
        return self.answer(unique, &out, sizeof(out))

    def count(self, uint64_t unique, uint32_t count):
        """Answer with a number of bytes: written, copied, or that a value has."""
        cdef uint32_t[2] out
        out[0], out[1] = count, 0
        return self.answer(unique, out, sizeof(out))

    def number(self, uint64_t unique, uint64_t number):
        """Answer with one number of 64 bits: an offset, or bytes copied."""
        return self.answer(unique, &number, sizeof(number))

    def file_system(
        self, uint64_t unique, uint64_t blocks, uint64_t bfree, uint64_t bavail, uint64_t files,
        uint64_t ffree, uint32_t bsize, uint32_t frsize, uint32_t namelen
    ):
        """Answer a STATFS; the names are statvfs(3)'s."""
        cdef StatfsOut out
        memset(&out, 0, sizeof(out))
        out.blocks, out.bfree, out.bavail = blocks, bfree, bavail
        out.files, out.ffree = files, ffree
        out.bsize, out.frsize, out.namelen = bsize, frsize, namelen
        return self.answer(unique, &out, sizeof(out))

    def lock(self, uint64_t unique, uint64_t start, uint64_t end, uint32_t kind, uint32_t pid):
        """Answer with a lock: its first and last byte, F_RDLCK and so on, whose it is."""
        cdef LockOut out
        out.start, out.end, out.type, out.pid = start, end, kind, pid
        return self.answer(unique, &out, sizeof(out))

    def controlled(self, uint64_t unique, bytes data not None):
        """Answer an IOCTL that has gone well, with what it is to write to its caller."""
        cdef IoctlOut out
        memset(&out, 0, sizeof(out))
        return self.answer_two(
            unique, &out, sizeof(out), PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)
        )

    def statx(self, uint64_t unique, double attr_valid, uint64_t ino, a):
        """Answer a STATX with Attributes, likewise."""
        cdef StatxOut out
        check_attributes(a)
        memset(&out, 0, sizeof(out))
        fill_time(attr_valid, &out.attr_valid, &out.attr_valid_nsec)
        out.mask = <uint32_t> number_at(a, _MASK)
        out.blksize = <uint32_t> number_at(a, _BLKSIZE)
        out.attributes = number_at(a, _FLAGS)
        out.nlink = <uint32_t> number_at(a, _NLINK)
        out.uid = <uint32_t> number_at(a, _UID)
        out.gid = <uint32_t> number_at(a, _GID)
        out.mode = <uint16_t> number_at(a, _MODE)
        out.ino = ino
        out.size = number_at(a, _SIZE)
        out.blocks = number_at(a, _BLOCKS)
        out.attributes_mask = number_at(a, _FLAGS_MASK)
        out.atime.seconds = signed_at(a, _ATIME)
        out.atime.nanoseconds = <uint32_t> number_at(a, _ATIME_NS)
        out.btime.seconds = signed_at(a, _BTIME)
        out.btime.nanoseconds = <uint32_t> number_at(a, _BTIME_NS)
        out.ctime.seconds = signed_at(a, _CTIME)
        out.ctime.nanoseconds = <uint32_t> number_at(a, _CTIME_NS)
        out.mtime.seconds = signed_at(a, _MTIME)
        out.mtime.nanoseconds = <uint32_t> number_at(a, _MTIME_NS)
        out.rdev_major = <uint32_t> number_at(a, _RDEV_MAJOR)
        out.rdev_minor = <uint32_t> number_at(a, _RDEV_MINOR)
        return self.answer(unique, &out, sizeof(out))
