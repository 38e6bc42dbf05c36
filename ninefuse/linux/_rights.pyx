# cython: language_level=3
"""What a request asks of its caller's process, and a caller's rights, taken on and given back.

Optional: ninefuse is built without it where a compiler is missing, and does the same in Python
then (callers.py, credentials.py). The types are in _rights.pyi. No lock. The interpreter's is let
go while /proc is asked, once a question: a directory of it may be kept locked by somebody. It is
kept while a thread's rights change, which waits for nothing.

What cannot be told for certain is not told: the Python way is gone then, and meets the error.

Source: capget(2), setfsuid(2), setgroups(2), proc(5).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport abort

from ninefuse.errors import error

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/fsuid.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #include <linux/capability.h>

    #define NF_GROUPS 256 /* of somebody who has more, Python takes care */

    struct nf_sets { uint64_t effective, permitted, inheritable; };
    struct nf_seen {
        uint64_t effective;
        uint32_t uid, gid, count, groups[NF_GROUPS];
    };

    static int nf_capget(int pid, struct nf_sets *sets)
    {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, pid };
        struct __user_cap_data_struct data[2];
        memset(sets, 0, sizeof(*sets));
        if (syscall(SYS_capget, &header, data))
            return -errno;
        sets->effective = data[0].effective | (uint64_t) data[1].effective << 32;
        sets->permitted = data[0].permitted | (uint64_t) data[1].permitted << 32;
        sets->inheritable = data[0].inheritable | (uint64_t) data[1].inheritable << 32;
        return 0;
    }

    static int nf_capset(const struct nf_sets *sets)
    {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct data[2] = {
            { (uint32_t) sets->effective, (uint32_t) sets->permitted,
              (uint32_t) sets->inheritable },
            { (uint32_t) (sets->effective >> 32), (uint32_t) (sets->permitted >> 32),
              (uint32_t) (sets->inheritable >> 32) },
        };
        return syscall(SYS_capset, &header, data) ? -errno : 0;
    }

    #define NF_FILE 8192 /* bytes read at once: all that there is, nearly always */

    /* What a file of a thread's directory in /proc says, of a procfs that is open or, by -1, of the
       one that all see; how many bytes, or -1. */
    static ssize_t nf_read(int proc, int pid, const char *name, char *buffer)
    {
        char path[64];
        ssize_t count;
        int fd;
        snprintf(path, sizeof(path), "%s%d/%s", proc < 0 ? "/proc/" : "", pid, name);
        fd = openat(proc < 0 ? AT_FDCWD : proc, path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return -1;
        count = read(fd, buffer, NF_FILE);
        close(fd);
        return count;
    }

    /* Whether the user ids that a thread knows are exactly these; -1: that cannot be told. */
    static int nf_knows(int proc, int pid, const char *map, size_t size)
    {
        char buffer[NF_FILE];
        ssize_t count = nf_read(proc, pid, "uid_map", buffer);
        if (count < 0)
            return -1;
        return (size_t) count == size && !memcmp(buffer, map, size);
    }

    static int nf_covers(int proc, int pid, const char *map, size_t size, uint64_t needed,
                         uint64_t raised)
    {
        struct nf_sets own, theirs;
        return !nf_capget(0, &own)
            && (own.permitted & needed) == needed
            && !(own.permitted & raised & ~own.effective)
            && !nf_capget(pid, &theirs)
            && !(own.permitted & ~theirs.effective)
            && nf_knows(proc, pid, map, size) == 1;
    }

    /* A number of at most 32 bits, in decimal; where it ends, or NULL. */
    static const char *nf_number(const char *at, const char *end, uint32_t *number)
    {
        uint64_t value = 0;
        const char *start = at;
        for (; at < end && *at >= '0' && *at <= '9'; at++) {
            value = value * 10 + (*at - '0');
            if (value > UINT32_MAX)
                return NULL;
        }
        *number = (uint32_t) value;
        return at > start ? at : NULL;
    }

    /* What comes after a word at the beginning of a line, from one on; NULL: there is none. */
    static const char *nf_line(const char *at, const char *end, const char *word)
    {
        size_t size = strlen(word);
        while (at) {
            if ((size_t) (end - at) < size)
                return NULL;
            if (!memcmp(at, word, size))
                return at + size;
            at = memchr(at, '\\n', end - at);
            if (at)
                at++;
        }
        return NULL;
    }

    /* Four numbers, the last of which is wanted; where the next line begins, or NULL. */
    static const char *nf_ids(const char *at, const char *end, uint32_t *last)
    {
        int i;
        for (i = 0; i < 4; i++) {
            at = nf_number(at, end, last);
            if (!at || at >= end || *at != (i < 3 ? '\\t' : '\\n'))
                return NULL;
            at++;
        }
        return at;
    }

    static int nf_parse(const char *at, const char *end, struct nf_seen *seen)
    {
        int digits = 0;
        at = nf_line(at, end, "Uid:\\t");
        if (!at || !(at = nf_ids(at, end, &seen->uid)))
            return 0;
        if (end - at < 5 || memcmp(at, "Gid:\\t", 5)
                || !(at = nf_ids(at + 5, end, &seen->gid))
                || !(at = nf_line(at, end, "Groups:\\t")))
            return 0;
        /* One space comes after each, and one if there is none. */
        if (end - at >= 2 && at[0] == ' ' && at[1] == '\\n')
            at++;
        for (seen->count = 0; at < end && *at != '\\n'; seen->count++, at++) {
            if (seen->count == NF_GROUPS)
                return 0;
            at = nf_number(at, end, &seen->groups[seen->count]);
            if (!at || at >= end || *at != ' ')
                return 0;
        }
        at = nf_line(at, end, "CapEff:\\t");
        if (!at)
            return 0;
        for (seen->effective = 0; at < end && *at != '\\n'; at++, digits++) {
            int digit = *at >= '0' && *at <= '9' ? *at - '0'
                : *at >= 'a' && *at <= 'f' ? *at - 'a' + 10 : -1;
            if (digit < 0 || digits == 16)
                return 0;
            seen->effective = seen->effective << 4 | (uint64_t) digit;
        }
        return digits && at < end;
    }

    static int nf_look(int proc, int pid, const char *map, size_t size, struct nf_seen *seen,
                       int *is_ours)
    {
        char buffer[NF_FILE];
        ssize_t count = nf_read(proc, pid, "status", buffer);
        if (count < 0 || !nf_parse(buffer, buffer + count, seen))
            return 0;
        *is_ours = seen->effective ? nf_knows(proc, pid, map, size) : 1;
        return *is_ours >= 0;
    }

    /* Of this thread only, which glibc's is not. */
    static int nf_getgroups(int room, uint32_t *groups)
    {
        int count = (int) syscall(SYS_getgroups, room, groups);
        return count < 0 ? -errno : count;
    }

    static int nf_setgroups(int count, const uint32_t *groups)
    {
        return syscall(SYS_setgroups, count, groups) ? -errno : 0;
    }

    /* What setfsuid and setfsgid do they do not report; asked with an id that there cannot be,
       they tell what is in force. */
    static int nf_acts_as(uint32_t uid, uint32_t gid)
    {
        return (uint32_t) setfsuid(-1) == uid && (uint32_t) setfsgid(-1) == gid;
    }

    struct nf_acting {
        struct nf_sets own, acting;
        uint32_t uid, gid, own_uid, own_gid;
        int own_count; /* of groups to be given back; -1: they are as they were */
        uint32_t *own_groups;
    };

    static int nf_take(struct nf_acting *a)
    {
        /* The group first: without the user id 0 it may not be changed any more. */
        if (a->gid != a->own_gid)
            setfsgid(a->gid);
        if (a->uid != a->own_uid)
            setfsuid(a->uid);
        if (!nf_acts_as(a->uid, a->gid))
            return -EPERM;
        if (a->uid != a->own_uid || a->acting.effective != a->own.effective)
            return nf_capset(&a->acting);
        return 0;
    }

    /* Whether the thread has its own rights again. */
    static int nf_give_back(struct nf_acting *a)
    {
        if (a->gid != a->own_gid)
            setfsgid(a->own_gid);
        if (a->uid != a->own_uid)
            setfsuid(a->own_uid); /* which raises all of the file capabilities again */
        if ((a->uid != a->own_uid || a->acting.effective != a->own.effective)
                && nf_capset(&a->own))
            return 0;
        if (a->own_count >= 0 && nf_setgroups(a->own_count, a->own_groups))
            return 0;
        return nf_acts_as(a->own_uid, a->own_gid);
    }
    """
    const int NF_GROUPS
    uint32_t geteuid()
    uint32_t getegid()
    unsigned int set_umask "umask"(unsigned int)
    cdef struct nf_sets:
        uint64_t effective, permitted, inheritable
    cdef struct nf_acting:
        nf_sets own, acting
        uint32_t uid, gid, own_uid, own_gid
        int own_count
        uint32_t *own_groups
    cdef struct nf_seen:
        uint64_t effective
        uint32_t uid, gid, count
        uint32_t groups[256]
    int nf_covers(int, int, const char *, size_t, uint64_t, uint64_t) nogil
    int nf_look(int, int, const char *, size_t, nf_seen *, int *) nogil
    int nf_capget(int, nf_sets *)
    int nf_getgroups(int, uint32_t *)
    int nf_setgroups(int, const uint32_t *)
    int nf_take(nf_acting *)
    int nf_give_back(nf_acting *)


def covers(int pid, int proc, bytes uid_map not None, uint64_t needed, uint64_t raised):
    """Whether a thread may do all that this one may, in the same user namespace.

    Args:
        pid: its number.
        proc: a procfs that is open, or -1: the one at /proc.
        uid_map: the user ids that this process knows, as its uid_map says.
        needed: capabilities that this thread must be permitted, or the answer is no.
        raised: those that, where they are permitted, must be effective as well, or it is no.

    Returns:
        False also where that cannot be told, for whatever reason.
    """
    cdef const char *map = PyBytes_AS_STRING(uid_map)
    cdef size_t size = PyBytes_GET_SIZE(uid_map)
    cdef int does
    with nogil:
        does = nf_covers(proc, pid, map, size, needed, raised)
    return does != 0


def look(int pid, int proc, bytes uid_map not None):
    """What a thread's status says, and whether its capabilities are in our user namespace.

    Args:
        pid, proc, uid_map: as of `covers`.

    Returns:
        Its file system ids, its further groups, its effective capabilities, and whether they are
        in our user namespace or it has none. None where that cannot be told, or takes more than
        one look.
    """
    cdef nf_seen seen
    cdef const char *map = PyBytes_AS_STRING(uid_map)
    cdef size_t size = PyBytes_GET_SIZE(uid_map)
    cdef int does, is_ours = 0
    cdef uint32_t i
    with nogil:
        does = nf_look(proc, pid, map, size, &seen, &is_ours)
    if not does:
        return None
    groups = frozenset([seen.groups[i] for i in range(seen.count)])
    return seen.uid, seen.gid, groups, seen.effective, is_ours != 0


def get_sets(int pid):
    """A thread's capabilities: effective, permitted, inheritable; 0: this one's (capget(2)).

    Raises:
        OSError: of capget(2).
    """
    cdef nf_sets sets
    cdef int result = nf_capget(pid, &sets)
    if result:
        raise error(-result)
    return sets.effective, sets.permitted, sets.inheritable


cdef uint32_t *_room(Py_ssize_t count) except NULL:
    cdef void *room = PyMem_Malloc(max(count, 1) * sizeof(uint32_t))
    if room == NULL:
        raise MemoryError
    return <uint32_t *> room


cdef class Acting:
    """This thread's rights, changed for a ``with`` block and given back; see `acting_as`.

    As `_Acting` in credentials.py, which says what each argument is.

    Args:
        umask, caller, groups, own, effective: as there; but caller and own are never None.
        unshare: called before the umask is changed; it makes it the thread's own.
        end: called if the thread's own rights are not had back; it must end the process.
    """

    cdef nf_acting a
    cdef object umask, groups, unshare, end

    def __cinit__(self, umask, caller, groups, own, uint64_t effective, unshare, end):
        self.umask, self.groups, self.unshare, self.end = umask, groups, unshare, end
        self.a.own_groups = NULL
        self.a.own_count = -1
        self.a.uid, self.a.gid = caller.uid, caller.gid
        self.a.own.effective, self.a.own.permitted, self.a.own.inheritable = own
        self.a.acting = self.a.own
        self.a.acting.effective = effective

    def __dealloc__(self):
        PyMem_Free(self.a.own_groups)

    def __enter__(self):
        cdef unsigned int mask
        cdef int result
        if self.umask is not None:
            mask = self.umask
            self.unshare()
            self.umask = set_umask(mask)
        self.a.own_uid, self.a.own_gid = geteuid(), getegid()
        try:
            if self.groups is not None:
                self.change_groups()
            result = nf_take(&self.a)
            if result < 0:
                raise error(-result)
        except BaseException:
            self.give_back()
            raise

    def __exit__(self, kind, failure, traceback):
        self.give_back()

    cdef int change_groups(self) except -1:
        """Take the further groups on, if they are others than the thread's."""
        cdef uint32_t *wanted
        cdef int i, result
        cdef int count = nf_getgroups(0, NULL)
        PyMem_Free(self.a.own_groups)
        self.a.own_groups = NULL
        self.a.own_groups = _room(count)
        count = nf_getgroups(count, self.a.own_groups)
        if count < 0:
            raise error(-count)
        if self.groups == frozenset([self.a.own_groups[i] for i in range(count)]):
            return 0
        wanted = _room(len(self.groups))
        try:
            i = 0
            for group in self.groups:
                wanted[i] = group
                i += 1
            result = nf_setgroups(i, wanted)
        finally:
            PyMem_Free(wanted)
        if result < 0:  # nothing to give back, and no right to
            raise error(-result)
        self.a.own_count = count
        return 0

    cdef int give_back(self) except -1:
        if self.umask is not None:
            set_umask(self.umask)
        if not nf_give_back(&self.a):
            try:
                self.end()
            finally:
                abort()
        return 0
