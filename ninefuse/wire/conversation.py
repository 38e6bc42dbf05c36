"""One conversation: what comes between a Tversion and the next, or the end of the connection.

It knows the client's fids and tags. A message that comes becomes a body, which a driver runs; where
that ends the answer is made and handed to the connection. All of it is on the thread of the server,
but for the bodies.

What is checked before a body is made: that the tag is free, that the message is what its type says,
that each fid is one that the client has, and that one it makes is none of these.

Tflush is answered when the request that it names can have no effect any more: after that one's
answer, or in its stead if it was withdrawn before it had done anything (flush(5) of Plan 9).

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple, Protocol

from ninefuse import ops
from ninefuse.calls import Body
from ninefuse.driving.driver import Executor
from ninefuse.driving.request import Request
from ninefuse.errors import error
from ninefuse.linux.callers import Caller
from ninefuse.ops.xattr import XATTR_SIZE_MAX
from ninefuse.settings import Settings
from ninefuse.tree.clients import number_in
from ninefuse.tree.session import Session
from ninefuse.wire.codec import HEADER, Malformed, Values, decode, encode
from ninefuse.wire.messages import BY_NUMBER, NOFID, NOTAG, NUMBER_OF
from ninefuse.wire.requests import LOCK_BLOCK, ROWS
from ninefuse.wire.users import Peer, Users

log = logging.getLogger(__name__)

_MAX_ERRNO = 4095  # above, Linux's client takes nothing for an error
_FID_MASK = 0xFFFFFFFF

_AUTH = NUMBER_OF["Tauth"]
_FLUSH = NUMBER_OF["Tflush"]
_ERROR = NUMBER_OF["Rlerror"]
_ATTACH = NUMBER_OF["Tattach"]
_LOCK = NUMBER_OF["Tlock"]
_LOCK_FLAGS = 2  # where its flags are among its fields
_RENAME = NUMBER_OF["Trename"]  # whose second fid may be none: the file's own directory
_WALK = NUMBER_OF["Twalk"]
# They end their fid, whatever becomes of them: so they are not withdrawn.
_ENDS_FID = (NUMBER_OF["Tclunk"], NUMBER_OF["Tremove"])
_XATTRWALK, _XATTRCREATE = NUMBER_OF["Txattrwalk"], NUMBER_OF["Txattrcreate"]
_ASKS_FOR_BYTES = (NUMBER_OF["Tread"], NUMBER_OF["Treaddir"])


class Broken(Exception):
    """The client does what leaves no way to go on; the text says what."""


class Door(Protocol):
    """What a conversation needs of the server that it is with."""

    driver: Executor
    session: Session
    root: int
    exports: tuple[bytes, ...]
    users: Users
    settings: Settings

    def start(
        self, name: str, body: Body[Any], done: Callable[[Request], None], user: int | None
    ) -> Request:
        """Have a body run, as of `Executor.start`."""

    def post(self, function: Callable[[], None]) -> None:
        """Have a function called on the server's thread, soon. Any thread."""

    def answered(self, request: Request, code: int) -> None:
        """A request has ended, with an errno or 0."""


class Wire(Protocol):
    """What a conversation needs of its connection."""

    name: str

    def send(self, message: bytes) -> None: ...

    def begins(self, cost: int) -> None: ...

    def ends(self, cost: int) -> None: ...

    def give_up(self) -> None: ...


class _Fids(NamedTuple):
    """Where the fields of a type of message are that name fids."""

    known: tuple[int, ...]
    new: int | None


def _fids_of(number: int) -> _Fids:
    names = [field.name for field in BY_NUMBER[number].fields]
    known = (at for at, name in enumerate(names) if name.endswith("fid"))
    known = (at for at in known if names[at] not in ("newfid", "afid"))
    return _Fids(tuple(known), names.index("newfid") if "newfid" in names else None)


_FIDS = {number: _fids_of(number) for number in ROWS}


class _Pending:
    """A request of the client's that has not been answered."""

    __slots__ = (
        "attribute",
        "caller",
        "cost",
        "flushes",
        "newfid",
        "number",
        "request",
        "tag",
        "wanted",
    )

    def __init__(self, number: int, tag: int, cost: int, caller: Caller | None = None) -> None:
        self.number = number
        self.tag = tag
        self.cost = cost  # bytes, of itself and of the answer
        self.caller = caller
        self.request: Request | None = None
        self.flushes: list[_Pending] = []  # Tflush that wait for its end
        self.newfid: int | None = None  # that it makes, if all goes well
        self.wanted = 0  # names of a walk
        # Of an extended attribute: the fid that is to keep it, and its bytes, if they are known.
        self.attribute: tuple[int, int | None] | None = None


class _Coming:
    """Stands for a fid that is being made."""


_COMING = _Coming()


class Conversation:
    """Args:
    door: the server.
    wire: the connection.
    number: this conversation's, which no other has or had.
    msize: the largest message, in bytes.
    peer: who is at the other end.
    """

    def __init__(self, door: Door, wire: Wire, number: int, msize: int, peer: Peer) -> None:
        self.session = door.session
        self.root = door.root
        self.exports = door.exports
        self.users = door.users
        self.peer = peer
        self.number = number
        self.msize = msize
        self._door = door
        self._wire = wire
        self._thread = get_ident()
        self._fids: dict[int, Caller | _Coming | None] = {}  # and as whom each acts
        self._attaching: dict[int, Caller | None] = {}
        self._pending: dict[int, _Pending] = {}  # by tag
        self._locking = 0  # Tlock among these
        self._attributes: dict[int, int] = {}  # by fid, bytes of an extended attribute that it has
        self._kept = 0  # all these bytes
        self._is_over = False

    def attached(self, fid: int, caller: Caller | None) -> None:
        """As of requests.Conversation."""
        self._attaching[fid & _FID_MASK] = caller

    def take(self, frame: bytes) -> None:
        """Begin what a message asks for, or answer that it cannot be.

        Args:
            frame: a whole message other than a Tversion.

        Raises:
            Broken: its tag is that of a request under way, whose answer it would get.
        """
        _, number, tag = HEADER.unpack_from(frame)
        if tag in self._pending:
            raise Broken(f"tag {tag} is used twice at a time")
        if tag == NOTAG:
            self._refuse(tag, errno.EINVAL)
            return
        if number not in ROWS and number != _FLUSH:
            # ENOENT: to authenticate oneself is not needed (auth(5) has no number for that; it is
            # what diod's clients take for it).
            self._refuse(tag, errno.ENOENT if number == _AUTH else errno.EOPNOTSUPP)
            return
        try:
            values = decode(frame).values
        except Malformed as e:
            log.info("%s: %s: %s", self._wire.name, BY_NUMBER[number].name, e)
            self._refuse(tag, errno.EPROTO)
            return
        if number == _FLUSH:
            self._flush(tag, values[0])
            return
        try:
            self._begin(number, tag, values, len(frame))
        except OSError as e:
            self._refuse(tag, e.errno or errno.EIO)

    def end(self) -> list[int]:
        """End the conversation: nothing is answered any more.

        Returns:
            The fids that there are, by their numbers in the session's table. Whoever ends it has
            them clunked (`given_back`). Those that are being made follow by themselves.
        """
        self._is_over = True
        for pending in list(self._pending.values()):
            self._withdraw(pending)
        fids, self._fids = self._fids, {}
        return [number_in(self.number, fid) for fid, who in fids.items() if who is not _COMING]

    def _begin(self, number: int, tag: int, values: Values, size: int) -> None:
        """Begin a request.

        Raises:
            OSError: EBADF, the client has no such fid; EINVAL, a new one is taken; EMFILE, it has
                too many; ENOMEM, they keep too much of extended attributes.
        """
        fids = _FIDS[number]
        caller: Any = None
        known = fids.known
        if number == _RENAME and values[1] == NOFID:
            known = known[:1]
        for at in reversed(known):
            caller = self._fids.get(values[at], _COMING)
            if caller is _COMING:
                raise error(errno.EBADF)
        pending = _Pending(number, tag, size, caller)
        if number in _ASKS_FOR_BYTES:
            pending.cost += min(values[2], self.msize)
        elif number in (_XATTRWALK, _XATTRCREATE):
            pending.attribute = self._attribute_of(number, values)
            pending.cost += XATTR_SIZE_MAX  # as long as it is not known
        if fids.new is not None:
            newfid = values[fids.new]
            if number != _WALK or newfid != values[0]:
                if newfid == NOFID or newfid in self._fids:
                    raise error(errno.EINVAL)
                if len(self._fids) >= self._door.settings.max_fids:
                    raise error(errno.EMFILE)
                pending.newfid = newfid
                pending.wanted = len(values[2]) if number == _WALK else 0
                self._fids[newfid] = _COMING
        if number in _ENDS_FID:
            del self._fids[values[0]]
            pending.cost += self._keep(values[0], 0)
        arguments = list(values)
        for at in fids.known:
            arguments[at] = number_in(self.number, values[at]) if at in known else None
        if fids.new is not None:
            arguments[fids.new] = number_in(self.number, values[fids.new])
        if number == _LOCK and self._locking >= self._door.settings.max_requests // 2:
            # If all waited for locks nobody could give one back.
            arguments[_LOCK_FLAGS] &= ~LOCK_BLOCK
        body = ROWS[number](self, caller, *arguments)
        self._pending[tag] = pending
        self._locking += number == _LOCK
        self._wire.begins(pending.cost)
        done = partial(self._done, pending)
        name = BY_NUMBER[number].name[1:]
        user = None if caller is None else caller.uid
        pending.request = self._door.start(name, body, done, user)

    def _attribute_of(self, number: int, values: Values) -> tuple[int, int | None]:
        """What a request for an extended attribute will keep, and in which fid.

        Raises:
            OSError: ENOMEM, the client's fids keep enough.
        """
        if self._kept > self._door.settings.max_bytes:
            raise error(errno.ENOMEM)
        return (values[1], None) if number == _XATTRWALK else (values[0], values[2])

    def _keep(self, fid: int, size: int) -> int:
        """Note how many bytes of an extended attribute a fid keeps; how many it kept before."""
        before = self._attributes.pop(fid, 0)
        if size:
            self._attributes[fid] = size
        self._kept += size - before
        return before

    def _flush(self, tag: int, oldtag: int) -> None:
        old = self._pending.get(oldtag)
        if old is None:
            self._wire.send(encode(_FLUSH + 1, tag))
            return
        pending = self._pending[tag] = _Pending(_FLUSH, tag, 0)
        self._wire.begins(0)
        old.flushes.append(pending)
        self._withdraw(old)

    def _withdraw(self, pending: _Pending) -> None:
        if pending.request is not None and pending.number not in _ENDS_FID:
            self._door.driver.withdraw(pending.request)

    def _done(self, pending: _Pending, request: Request) -> None:
        """A request's body has ended. Any thread."""
        if get_ident() == self._thread:
            self._finish(pending, request)
        else:
            self._door.post(partial(self._finish, pending, request))

    def _finish(self, pending: _Pending, request: Request) -> None:
        """Answer a request whose body has ended. For a fault of ours the connection is ended."""
        try:
            self._answer(pending, request)
        except Exception:
            log.exception("%s: %s cannot be answered", self._wire.name, request.name)
            self._wire.give_up()
        self._ended(pending)

    def _answer(self, pending: _Pending, request: Request) -> None:
        number, tag = pending.number, pending.tag
        code, values = _outcome(request)
        if not code:
            try:
                answer = encode(number + 1, tag, *values)
                if len(answer) > self.msize:
                    code = errno.EMSGSIZE
            except Exception:
                log.exception("%s: %s has no answer: %r", self._wire.name, request.name, values)
                code = errno.EIO
        self._locking -= number == _LOCK
        self._note_fid(pending, code, values)
        is_dropped = self._is_over or (
            code == errno.EINTR and request.is_withdrawn and bool(pending.flushes)
        )
        if not self._is_over:
            del self._pending[tag]
        self._door.answered(request, code)
        if not is_dropped:
            self._wire.send(encode(_ERROR, tag, code) if code else answer)

    def _note_fid(self, pending: _Pending, code: int, values: Values) -> None:
        """Note what became of a fid that was to be made."""
        if pending.attribute is not None and not code:
            fid, size = pending.attribute
            if fid in self._fids:  # else it was clunked meanwhile
                self._keep(fid, values[0] if size is None else size)
        newfid = pending.newfid
        if newfid is None:
            return
        attached = self._attaching.pop(newfid, None)
        is_made = not code and (pending.number != _WALK or len(values[0]) == pending.wanted)
        if self._is_over:
            if is_made:
                body = given_back(self.session, [number_in(self.number, newfid)])
                self._door.start("disconnect", body, self._door.driver.count, None)
        elif not is_made:
            del self._fids[newfid]
        else:
            is_attach = pending.number == _ATTACH
            self._fids[newfid] = attached if is_attach else pending.caller

    def _ended(self, pending: _Pending) -> None:
        """A request is over: so are the Tflush that wait for it, and those that wait for these."""
        over = [pending]  # no call in a call: they may be a chain of a thousand
        while over:
            one = over.pop()
            if one.number == _FLUSH and not self._is_over:
                del self._pending[one.tag]
                self._wire.send(encode(_FLUSH + 1, one.tag))
            self._wire.ends(one.cost)
            over.extend(reversed(one.flushes))

    def _refuse(self, tag: int, code: int) -> None:
        self._wire.send(encode(_ERROR, tag, code))


async def given_back(session: Session, fids: list[int]) -> None:
    """Clunk fids whose client does not know of them any more."""
    for fid in fids:
        with contextlib.suppress(OSError):
            await ops.clunk(session, fid, commits=False)


def _outcome(request: Request) -> tuple[int, Values]:
    """The errno of a request's end, or 0; and the values of its answer."""
    try:
        return 0, request.result()
    except OSError as e:
        code = e.errno or 0
        if not 0 < code <= _MAX_ERRNO:
            log.error("%s: an error without a usable errno: %r", request.name, e)
            return errno.EIO, ()
        # Linux's client gives an operation up for good where it is told that there is none.
        return errno.EOPNOTSUPP if code == errno.ENOSYS else code, ()
    except Exception:
        log.exception("%s ended in an error", request.name)
        return errno.EIO, ()
