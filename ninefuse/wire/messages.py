"""Every message of 9P2000.L: its number and its fields, as one table.

A line says what follows the size, the type and the tag of a message. In brackets stands what a
field takes: so many bytes (little-endian, without sign), or one of these kinds:

    [s]      a string: its length in 2 bytes, and the bytes. None of them is zero.
    [q]      a qid: type[1] version[4] path[8]
    [data]   count[4] and so many bytes
    [names]  count[2] and so many strings
    [qids]   count[2] and so many qids

A field with a question mark may be left out, and is 0 then.

Sources: diod's protocol.md (9P2000.L); Linux include/net/9p/9p.h and net/9p/client.c; the Plan 9
manual, section 5, for those that 9P2000 has as well. Where they differ Linux is followed, but for
fsync's second field: diod's description and gVisor's client do not have it.

Locks touched: none.
"""

from __future__ import annotations

import re
from typing import NamedTuple

NOTAG = 0xFFFF
NOFID = 0xFFFFFFFF
NONUNAME = 0xFFFFFFFF

_TABLE = """
7 Rlerror ecode[4]
8 Tstatfs fid[4]
9 Rstatfs type[4] bsize[4] blocks[8] bfree[8] bavail[8] files[8] ffree[8] fsid[8] namelen[4]
12 Tlopen fid[4] flags[4]
13 Rlopen qid[q] iounit[4]
14 Tlcreate fid[4] name[s] flags[4] mode[4] gid[4]
15 Rlcreate qid[q] iounit[4]
16 Tsymlink dfid[4] name[s] target[s] gid[4]
17 Rsymlink qid[q]
18 Tmknod dfid[4] name[s] mode[4] major[4] minor[4] gid[4]
19 Rmknod qid[q]
20 Trename fid[4] dfid[4] name[s]
21 Rrename
22 Treadlink fid[4]
23 Rreadlink target[s]
24 Tgetattr fid[4] mask[8]
25 Rgetattr valid[8] qid[q] mode[4] uid[4] gid[4] nlink[8] rdev[8] size[8] blksize[8] blocks[8] \
    atime_s[8] atime_ns[8] mtime_s[8] mtime_ns[8] ctime_s[8] ctime_ns[8] btime_s[8] btime_ns[8] \
    gen[8] data_version[8]
26 Tsetattr fid[4] valid[4] mode[4] uid[4] gid[4] size[8] \
    atime_s[8] atime_ns[8] mtime_s[8] mtime_ns[8]
27 Rsetattr
30 Txattrwalk fid[4] newfid[4] name[s]
31 Rxattrwalk size[8]
32 Txattrcreate fid[4] name[s] size[8] flags[4]
33 Rxattrcreate
40 Treaddir fid[4] offset[8] count[4]
41 Rreaddir entries[data]
50 Tfsync fid[4] datasync[4?]
51 Rfsync
52 Tlock fid[4] type[1] flags[4] start[8] length[8] proc_id[4] client_id[s]
53 Rlock status[1]
54 Tgetlock fid[4] type[1] start[8] length[8] proc_id[4] client_id[s]
55 Rgetlock type[1] start[8] length[8] proc_id[4] client_id[s]
70 Tlink dfid[4] fid[4] name[s]
71 Rlink
72 Tmkdir dfid[4] name[s] mode[4] gid[4]
73 Rmkdir qid[q]
74 Trenameat olddirfid[4] oldname[s] newdirfid[4] newname[s]
75 Rrenameat
76 Tunlinkat dfid[4] name[s] flags[4]
77 Runlinkat
100 Tversion msize[4] version[s]
101 Rversion msize[4] version[s]
102 Tauth afid[4] uname[s] aname[s] n_uname[4]
103 Rauth aqid[q]
104 Tattach newfid[4] afid[4] uname[s] aname[s] n_uname[4]
105 Rattach qid[q]
108 Tflush oldtag[2]
109 Rflush
110 Twalk fid[4] newfid[4] names[names]
111 Rwalk qids[qids]
116 Tread fid[4] offset[8] count[4]
117 Rread data[data]
118 Twrite fid[4] offset[8] data[data]
119 Rwrite count[4]
120 Tclunk fid[4]
121 Rclunk
122 Tremove fid[4]
123 Rremove
"""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        name: as the table has it. One that ends in ``fid`` names a fid: ``newfid`` one that the
            message makes, ``afid`` one of an authentication, any other one that there is.
        kind: what stands in the brackets, without the question mark.
        is_optional: whether it may be left out.
    """

    name: str
    kind: str
    is_optional: bool


class Message(NamedTuple):
    """One message: its number on the wire, its name, its fields."""

    number: int
    name: str
    fields: tuple[Field, ...]


def _read(line: str) -> Message:
    number, name, *fields = line.split()
    read = []
    for field in fields:
        found = re.fullmatch(r"(\w+)\[(\w+)(\??)\]", field)
        assert found is not None, field
        read.append(Field(found[1], found[2], bool(found[3])))
    return Message(int(number), name, tuple(read))


MESSAGES = tuple(_read(line) for line in _TABLE.replace("\\\n", "").strip().splitlines())
BY_NUMBER = {message.number: message for message in MESSAGES}
NUMBER_OF = {message.name: message.number for message in MESSAGES}
