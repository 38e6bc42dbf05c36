# cython: language_level=3
"""What is kept of each file that somebody knows: the fields of its node and of its fid.

There may be a million of each, so they are typed: numbers need no object of their own, nor do a
place and a birth. What is done with them is in nodes.py and table.py.

Optional: ninefuse is built without it where a compiler is missing, and has the fields of fields.py
then, which take some 200 bytes more for each file. The types are in _known.pyi. No lock; the
interpreter's is held, so that a place is read and set as a whole.
"""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t

from ninefuse.tree import fields

cdef object BIRTH = object()  # stands for a mark that is a birth


cdef class NodeFields:
    """The fields of a node (`Node`)."""

    cdef object __weakref__
    cdef object _mark
    cdef int64_t _birth
    cdef object _parent
    cdef object _name
    cdef public int32_t fd
    cdef public int32_t refs
    cdef public int32_t pins
    cdef public uint16_t kind
    cdef public uint8_t uses
    cdef uint8_t _recent

    @property
    def mark(self):
        return self._birth if self._mark is BIRTH else self._mark

    @mark.setter
    def mark(self, mark):
        if type(mark) is int and -(1 << 63) <= mark < 1 << 63:
            self._birth, self._mark = mark, BIRTH
        else:
            self._mark = mark

    @property
    def place(self):
        return None if self._parent is None else (self._parent, self._name)

    @place.setter
    def place(self, place):
        if place is None:
            self._parent = self._name = None
        else:
            self._parent, self._name = place

    @property
    def recent(self):
        return self._recent != 0

    @recent.setter
    def recent(self, bint recent):
        self._recent = recent

    def pinned(self, bint use):
        self.refs += 1
        self.pins += 1
        if use:
            self._recent = True
            self.uses += 1  # modulo 256
        return self.fd >= 0

    def unpinned(self):
        self.pins -= 1
        self.refs -= 1
        return self.refs != 0

    def dropped(self):
        self.refs -= 1
        return self.refs != 0


@cython.no_gc  # nothing that a fid refers to refers to fids
@cython.final
cdef class Fid:
    """A client's number for a node."""

    cdef readonly object number
    cdef public object node
    cdef public object opened
    cdef public int32_t refs
    cdef public uint64_t lookups
    cdef public uint64_t generation

    def __init__(self, number, node, opened=None):
        self.number = number
        self.node = node
        self.opened = opened
        self.refs = 1

    def __repr__(self):
        return fields.shown(self)

    def referenced(self):
        if self.refs == 0:
            return False
        self.refs += 1
        return True

    def dropped(self):
        self.refs -= 1
        return self.refs != 0
