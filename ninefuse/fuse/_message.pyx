# cython: language_level=3, boundscheck=False, wraparound=False
"""A request of the kernel's, decoded.

Every length that a message states is checked against the message itself before anything behind it
is touched.

The ``args`` of a `Message` are, for each opcode (sizes in bytes):

    LOOKUP, UNLINK, RMDIR, REMOVEXATTR   name
    FORGET, BATCH_FORGET                 (nodeid, lookups) of each
    GETATTR                              flags, handle
    SETATTR                              valid, handle, size, owner, atime, mtime, ctime (each in
                                         seconds), the same in nanoseconds, mode, uid, gid
    SYMLINK                              name, target
    MKNOD                                name, mode, rdev, umask
    MKDIR                                name, mode, umask
    RENAME, RENAME2                      old name, new name, new directory, flags
    LINK                                 name, nodeid
    OPEN, OPENDIR                        flags, open flags
    CREATE, TMPFILE                      name, flags, mode, umask, open flags
    READ, READDIR, READDIRPLUS           handle, offset, size, read flags, owner, flags
    WRITE                                handle, offset, data, write flags, owner, flags
    RELEASE, RELEASEDIR                  handle, flags, release flags, owner
    FLUSH                                handle, owner
    FSYNC, FSYNCDIR                      handle, flags
    SETXATTR                             name, value, flags, further flags
    GETXATTR                             name, size
    LISTXATTR                            size
    INIT                                 major, minor, readahead, flags (64 bits)
    GETLK, SETLK, SETLKW                 handle, owner, start, end, type, pid, flags
    INTERRUPT                            unique
    IOCTL                                handle, flags, command, data, room for the answer
    FALLOCATE                            handle, offset, length, mode
    LSEEK                                handle, offset, whence
    COPY_FILE_RANGE, COPY_FILE_RANGE_64  handle, offset, nodeid, handle, offset, length, flags
    STATX                                flags, handle, statx flags, mask
    READLINK, STATFS, SYNCFS, DESTROY,
    and what is not served               nothing

Source: Linux include/uapi/linux/fuse.h.

Locks touched: none.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINVAL, EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

cdef struct ForgetOne:
    uint64_t nodeid, nlookup

cdef struct GetattrIn:
    uint32_t flags, dummy
    uint64_t fh

cdef struct SetattrIn:
    uint32_t valid, padding
    uint64_t fh, size, lock_owner, atime, mtime, ctime
    uint32_t atimensec, mtimensec, ctimensec, mode, unused4, uid, gid, unused5

cdef struct FourIn:  # mknod_in, create_in
    uint32_t a, b, c, d

cdef struct TwoIn:  # mkdir_in, open_in, getxattr_in, batch_forget_in
    uint32_t a, b

cdef struct RenameIn:
    uint64_t newdir
    uint32_t flags, padding

cdef struct ReleaseIn:  # and flush_in
    uint64_t fh
    uint32_t flags, release_flags
    uint64_t lock_owner

cdef struct LockIn:
    uint64_t fh, owner, start, end
    uint32_t type, pid, flags, padding

cdef struct InitIn:
    uint32_t major, minor, max_readahead, flags

cdef struct IoctlIn:
    uint64_t fh
    uint32_t flags, cmd
    uint64_t arg
    uint32_t in_size, out_size

cdef struct FallocateIn:
    uint64_t fh, offset, length
    uint32_t mode, padding

cdef struct LseekIn:
    uint64_t fh, offset
    uint32_t whence, padding

cdef struct CopyIn:
    uint64_t fh_in, off_in, nodeid_out, fh_out, off_out, len, flags

cdef struct StatxIn:
    uint32_t getattr_flags, reserved
    uint64_t fh
    uint32_t sx_flags, sx_mask

SIZES = {  # checked by the tests against the protocol's description
    "in_header": sizeof(InHeader),
    "setattr_in": sizeof(SetattrIn),
    "read_in": sizeof(ReadIn),
    "lk_in": sizeof(LockIn),
    "ioctl_in": sizeof(IoctlIn),
    "copy_file_range_in": sizeof(CopyIn),
    "statx_in": sizeof(StatxIn),
}

cdef enum:
    _LOOKUP = 1
    _FORGET = 2
    _GETATTR = 3
    _SETATTR = 4
    _SYMLINK = 6
    _MKNOD = 8
    _MKDIR = 9
    _UNLINK = 10
    _RMDIR = 11
    _RENAME = 12
    _LINK = 13
    _OPEN = 14
    _READ = 15
    _RELEASE = 18
    _SETXATTR = 21
    _GETXATTR = 22
    _LISTXATTR = 23
    _REMOVEXATTR = 24
    _FLUSH = 25
    _INIT = 26
    _OPENDIR = 27
    _READDIR = 28
    _RELEASEDIR = 29
    _FSYNCDIR = 30
    _GETLK = 31
    _SETLK = 32
    _SETLKW = 33
    _CREATE = 35
    _INTERRUPT = 36
    _IOCTL = 39
    _BATCH_FORGET = 42
    _FALLOCATE = 43
    _READDIRPLUS = 44
    _RENAME2 = 45
    _LSEEK = 46
    _COPY_FILE_RANGE = 47
    _TMPFILE = 51
    _STATX = 52
    _COPY_FILE_RANGE_64 = 53

cdef enum:
    _INIT_EXT = 1 << 30
    _SX_GROUPS = 32  # FUSE_EXT_GROUPS, the kind of an extension
    _MOST_CONTEXTS = 31  # what is less is their number, in an extension of that kind
    _SHORT_SETXATTR = 8  # bytes of setxattr_in without FUSE_SETXATTR_EXT
    # Bytes that a READ or READDIR may ask for: 256 pages (handshake.py), of 64 KiB at most.
    # A kernel asks for no more, and who is asked makes room for all of it.
    _MOST_ASKED = 1 << 24

cdef struct Reader:
    # What is left of a message.
    const char *at
    const char *end


cdef int take(Reader *r, void *into, size_t count) except -1:
    """Copy the next ``count`` bytes; refuse what the message does not have."""
    if <size_t> (r.end - r.at) < count:
        raise OSError(EIO, "a message is shorter than its structure")
    memcpy(into, r.at, count)
    r.at += count
    return 0


cdef bytes take_bytes(Reader *r, size_t count):
    """The next ``count`` bytes."""
    cdef bytes found
    if <size_t> (r.end - r.at) < count:
        raise OSError(EIO, "a message is shorter than its data")
    found = PyBytes_FromStringAndSize(r.at, <Py_ssize_t> count)
    r.at += count
    return found


cdef bytes take_name(Reader *r):
    """The bytes up to the next zero, which has to be in the message. A name is not empty."""
    cdef const char *zero = <const char *> memchr(r.at, 0, r.end - r.at)
    cdef bytes found
    if zero == NULL:
        raise OSError(EIO, "a name does not end in its message")
    if zero == r.at:
        raise OSError(EINVAL, "a name is empty")
    found = PyBytes_FromStringAndSize(r.at, zero - r.at)
    r.at = zero + 1
    return found


cdef int take_extensions(Message message, Reader *r) except -1:
    """What follows a request that makes something: the caller's groups, security contexts."""
    cdef TwoIn head
    cdef Reader one
    cdef uint32_t count = 0, group = 0
    cdef uint32_t lengths[2]
    cdef const char *at
    cdef Py_ssize_t size
    groups = []
    contexts = []
    while r.at < r.end:
        one = r[0]
        take(&one, &head, sizeof(head))
        if head.a < sizeof(head) or <size_t> (r.end - r.at) < head.a:
            raise OSError(EIO, "an extension is longer than its message")
        one.end = r.at + head.a
        r.at += head.a
        if head.b <= _MOST_CONTEXTS:
            for _ in range(head.b):
                take(&one, lengths, sizeof(lengths))
                at = one.at
                name = take_name(&one)
                contexts.append((name, take_bytes(&one, lengths[0])))
                # Each is padded to 8 bytes; the last one may not be.
                size = (one.at - at + 7) & ~7
                one.at = at + size if one.end - at >= size else one.end
        elif head.b == _SX_GROUPS:
            take(&one, &count, sizeof(count))
            for _ in range(count):
                take(&one, &group, sizeof(group))
                groups.append(group)
    message.groups = tuple(groups)
    message.contexts = tuple(contexts)
    return 0


@cython.final
@cython.freelist(64)
cdef class Message:
    """One request of the kernel's.

    Attributes:
        opcode, unique, nodeid, uid, gid, pid: of its header.
        args: what else it says; see above. None where `fault` is set.
        fault: 0, or the errno to answer with: the message is not what its opcode says.
        groups: the further groups of the caller that concern what is made; with requests that
            make something, and where FUSE_CREATE_SUPP_GROUP was agreed on.
        contexts: likewise the security attributes that it is to have: (name, value) of each.
    """

    def __repr__(self):
        return f"<opcode {self.opcode} unique {self.unique} nodeid {self.nodeid} {self.args}>"


cdef tuple arguments_of(Message message, Reader *r, bint short_setxattr):
    """Decode what follows the header."""
    cdef uint32_t opcode = message.opcode
    cdef ReadIn rw
    cdef FourIn four
    cdef TwoIn two
    cdef uint64_t number
    cdef GetattrIn getattr_in
    cdef SetattrIn s
    cdef RenameIn rename
    cdef ReleaseIn release
    cdef FsyncIn fsync
    cdef LockIn lock
    cdef InitIn init
    cdef IoctlIn ioctl
    cdef FallocateIn fallocate
    cdef LseekIn lseek
    cdef CopyIn copy
    cdef StatxIn statx
    cdef ForgetOne forgotten
    if opcode == OP_WRITE:
        take(r, &rw, sizeof(rw))
        data = take_bytes(r, rw.size)
        return rw.fh, rw.offset, data, rw.more_flags, rw.lock_owner, rw.flags
    if opcode == _READ or opcode == _READDIR or opcode == _READDIRPLUS:
        take(r, &rw, sizeof(rw))
        if rw.size > _MOST_ASKED:
            raise OSError(EINVAL, "more is asked for than a reply can have")
        return rw.fh, rw.offset, rw.size, rw.more_flags, rw.lock_owner, rw.flags
    if opcode == _LOOKUP or opcode == _UNLINK or opcode == _RMDIR or opcode == _REMOVEXATTR:
        return (take_name(r),)
    if opcode == _GETATTR:
        take(r, &getattr_in, sizeof(getattr_in))
        return getattr_in.flags, getattr_in.fh
    if opcode == _OPEN or opcode == _OPENDIR:
        take(r, &two, sizeof(two))
        return two.a, two.b
    if opcode == _RELEASE or opcode == _RELEASEDIR:
        take(r, &release, sizeof(release))
        return release.fh, release.flags, release.release_flags, release.lock_owner
    if opcode == _FLUSH:
        take(r, &release, sizeof(release))
        return release.fh, release.lock_owner
    if opcode == _FORGET:
        take(r, &number, sizeof(number))
        return ((message.nodeid, number),)
    if opcode == _BATCH_FORGET:
        take(r, &two, sizeof(two))
        if <size_t> (r.end - r.at) / sizeof(ForgetOne) < two.a:
            raise OSError(EIO, "a message is shorter than what it forgets")
        forgets = []
        for _ in range(two.a):
            take(r, &forgotten, sizeof(forgotten))
            forgets.append((forgotten.nodeid, forgotten.nlookup))
        return tuple(forgets)
    if opcode == _GETXATTR:
        take(r, &two, sizeof(two))
        return take_name(r), two.a
    if opcode == _LISTXATTR:
        take(r, &two, sizeof(two))
        return (two.a,)
    if opcode == _SETATTR:
        take(r, &s, sizeof(s))
        return (
            s.valid, s.fh, s.size, s.lock_owner, <int64_t> s.atime, <int64_t> s.mtime,
            <int64_t> s.ctime, s.atimensec, s.mtimensec, s.ctimensec, s.mode, s.uid, s.gid,
        )
    if opcode == _CREATE or opcode == _TMPFILE:
        take(r, &four, sizeof(four))
        name = take_name(r)
        take_extensions(message, r)
        return name, four.a, four.b, four.c, four.d
    if opcode == _MKNOD:
        take(r, &four, sizeof(four))
        name = take_name(r)
        take_extensions(message, r)
        return name, four.a, four.b, four.c
    if opcode == _MKDIR:
        take(r, &two, sizeof(two))
        name = take_name(r)
        take_extensions(message, r)
        return name, two.a, two.b
    if opcode == _SYMLINK:
        name = take_name(r)
        target = take_name(r)
        take_extensions(message, r)
        return name, target
    if opcode == _RENAME:
        take(r, &number, sizeof(number))
        name = take_name(r)
        return name, take_name(r), number, 0
    if opcode == _RENAME2:
        take(r, &rename, sizeof(rename))
        name = take_name(r)
        return name, take_name(r), rename.newdir, rename.flags
    if opcode == _LINK:
        take(r, &number, sizeof(number))
        return take_name(r), number
    if opcode == OP_FSYNC or opcode == _FSYNCDIR:
        take(r, &fsync, sizeof(fsync))
        return fsync.fh, fsync.flags
    if opcode == _SETXATTR:
        if short_setxattr:
            memset(&four, 0, sizeof(four))
            take(r, &four, _SHORT_SETXATTR)
        else:
            take(r, &four, sizeof(four))
        name = take_name(r)
        return name, take_bytes(r, four.a), four.b, four.c
    if opcode == _GETLK or opcode == _SETLK or opcode == _SETLKW:
        take(r, &lock, sizeof(lock))
        return lock.fh, lock.owner, lock.start, lock.end, lock.type, lock.pid, lock.flags
    if opcode == _INIT:
        take(r, &init, sizeof(init))
        number = init.flags
        if init.flags & _INIT_EXT and r.end - r.at >= 4:
            take(r, &two.a, sizeof(two.a))
            number |= <uint64_t> two.a << 32
        return init.major, init.minor, init.max_readahead, number
    if opcode == _INTERRUPT:
        take(r, &number, sizeof(number))
        return (number,)
    if opcode == _IOCTL:
        take(r, &ioctl, sizeof(ioctl))
        return ioctl.fh, ioctl.flags, ioctl.cmd, take_bytes(r, ioctl.in_size), ioctl.out_size
    if opcode == _FALLOCATE:
        take(r, &fallocate, sizeof(fallocate))
        return fallocate.fh, fallocate.offset, fallocate.length, fallocate.mode
    if opcode == _LSEEK:
        take(r, &lseek, sizeof(lseek))
        return lseek.fh, <int64_t> lseek.offset, lseek.whence
    if opcode == _COPY_FILE_RANGE or opcode == _COPY_FILE_RANGE_64:
        take(r, &copy, sizeof(copy))
        return (
            copy.fh_in, copy.off_in, copy.nodeid_out, copy.fh_out, copy.off_out, copy.len,
            copy.flags,
        )
    if opcode == _STATX:
        take(r, &statx, sizeof(statx))
        return statx.getattr_flags, statx.fh, statx.sx_flags, statx.sx_mask
    return ()


cdef Message decoded(const char *start, size_t size, bint short_setxattr):
    """The message in a buffer; None if it has not even a header."""
    cdef InHeader header
    cdef Reader r
    cdef Message message
    if size < sizeof(header):
        return None
    memcpy(&header, start, sizeof(header))
    message = Message.__new__(Message)
    message.opcode = header.opcode
    message.unique = header.unique
    message.nodeid = header.nodeid
    message.uid = header.uid
    message.gid = header.gid
    message.pid = header.pid
    message.fault = 0
    if header.len != size:
        message.fault = EIO
        return message
    r.at = start + sizeof(header)
    r.end = start + size
    try:
        message.args = arguments_of(message, &r, short_setxattr)
    except OSError as refused:
        message.fault = refused.errno
    except MemoryError:
        message.fault = ENOMEM
    return message


def decode(bytes data not None, bint short_setxattr=False):
    """Decode one request as it would come from the device; for tests of the decoder.

    Args:
        data: all of it.
        short_setxattr: whether a SETXATTR has the structure of before FUSE_SETXATTR_EXT.

    Returns:
        The message, or None if there is not even a header.
    """
    return decoded(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), short_setxattr)
