# cython: language_level=3
"""The calls of _transfer.pyx, for other compiled modules too: a write for a caller, a cached read."""

from libc.stdint cimport int64_t, uint32_t

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/fsuid.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>
    #include <linux/capability.h>

    /* What setfsuid and setfsgid do they do not report; asked with an id that there cannot be,
       they tell what is in force. */
    static inline int acts_as(uid_t uid, gid_t gid)
    {
        return (uid_t) setfsuid(-1) == uid && (gid_t) setfsgid(-1) == gid;
    }

    /* preadv2(2) of what the page cache holds; the negated errno. */
    static inline ssize_t read_nowait(int fd, void *buffer, size_t count, off_t offset)
    {
        struct iovec part = { buffer, count };
        ssize_t result = preadv2(fd, &part, 1, offset, RWF_NOWAIT);
        return result < 0 ? -errno : result;
    }

    /* pwrite(2) with other file system ids than the thread has otherwise; the negated errno. All
       that may be wrong in the end is *is_back: whether the thread has its own rights again. */
    static inline ssize_t pwrite_as(int fd, const void *data, size_t count, off_t offset,
                                    uid_t uid, gid_t gid, int *is_back)
    {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct own[2];
        uid_t own_uid = geteuid();
        gid_t own_gid = getegid();
        ssize_t result;

        *is_back = 1;
        if (syscall(SYS_capget, &header, own))
            return -errno;
        setfsgid(gid);
        setfsuid(uid);
        if (acts_as(uid, gid)) {
            result = pwrite(fd, data, count, offset);
            if (result < 0)
                result = -errno;
        } else {
            result = -EPERM;
        }
        setfsgid(own_gid);
        setfsuid(own_uid);
        *is_back = !syscall(SYS_capset, &header, own) && acts_as(own_uid, own_gid);
        return result;
    }
    """
    ssize_t read_nowait(int, void *, size_t, int64_t) nogil
    ssize_t pwrite_as(int, const void *, size_t, int64_t, uint32_t, uint32_t, int *) nogil
