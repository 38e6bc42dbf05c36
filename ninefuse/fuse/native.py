"""A FUSE session of our own: requests straight from the device, answers straight to it.

FUSE is a queue. When a program opens a file on the mount, Linux puts a message into the queue:
LOOKUP, OPEN, with a number of its own (`unique`). The program sleeps. A daemon reads the message
from the device /dev/fuse with read(2), does the work, and writes an answer with the same number by
writev(2). The program goes on. There is nothing more to it. But until a message is answered its
program sleeps, and Linux may hold locks for it. These are of the directory in which it looks a name
up, or of the page that it reads. A daemon that answers late stops more than one program.

The way of a message here:

    Role.lead (_role.pyx)         read(2), lengths checked, decoded to a `Message`
    NativeSession.take            the row of its opcode (rows.py); the row makes the body
    LeadingModel.drive            the driver runs the body up to its call (executor.py)
    Role.make                     a plain call: the role passed on, the call, writev(2)
    LeadingModel.finish           the body to its end
    NativeSession._answer         counted; where not answered yet: encoded by the row, writev(2)

For a lone client most reads and writes are made *ahead*: call and answer first
(`Role.make_ahead`), then the body (`foresee`). A request that meets another one under way takes
the way above. Python makes a call that is not plain, on the thread that the driver chooses. Where
requests are handed over (-o handover=request), `run` reads here, by `Device.receive`, and
`Executor.drive` hands them on.

Reading, a plain call and the answer do without the interpreter's lock. Decoding and encoding need
it. The session decides nothing about files: callbacks.py has the meaning of each request,
executor.py the choice of threads. This module connects the two.

What is guaranteed
------------------

* **One thread reads at a time**: the dispatcher. That is the thread of `run`, or the leader of the
  moment (leading.py, _role.pyx). So requests start in the order in which Linux sent them, and an
  INTERRUPT is never read before its request.
* **Any thread answers**: the one where the body ended, or for a plain call the one that made it.
  No answer waits for the dispatcher, so under the second model a request crosses threads once, or
  never. A writev to the device is one message, whole or not at all, so answers need no lock.
* **Each message has one answer**, if it wants one. A body that fails is answered with its errno. An
  unforeseen failure is logged and answered with EIO. No exception leaves a request, since it would
  end the loop, and with it the mount: every program on it would get ENOTCONN. FORGET, BATCH_FORGET
  and INTERRUPT want no answer.
* **An answer that nobody took is taken back.** An answer gives things away: Linux counts a lookup,
  an open has a handle. If the caller was killed meanwhile, writev(2) says ENOENT. Linux has not
  got the answer then, and will never send the FORGET or the RELEASE. Without `undo` the node or
  the open file would stay for as long as the mount.
* **A request is counted before it is answered.** `_answer` counts it and takes it out of those
  under way before it writes. A program that has its answer may look at the counters at once. (Plain
  calls are answered first, in _role.pyx. For these the counters may be some 10 ms behind.)

What would go wrong otherwise
-----------------------------

* If the device blocked: a request may be withdrawn between its announcement by poll(2) and the
  read. The read would then sleep until the next request, with all the thread's other work. So the
  device has O_NONBLOCK, and such a request costs a try. The dispatcher sleeps in poll(2) alone. The
  device wakes it, an eventfd (`_be_woken`, any thread), or the engine. Leaders sleep in epoll(7).
  The device wakes one of them, the same eventfd all, and a leader the next (`Role`).
* If the device were read without a bound: requests stuck on a dead disk would take all memory. At
  20,000 the device is read no more (`is_full`). Requests that wait for a lock of a file or a lease
  do not count. The request that ends their wait may have to come by the device, and it would never
  be read.
* If one user could have all these: `has_too_many` refuses, with an errno that the program and the
  kernel can bear (`refusal`). Never refused are write, flush, sync, release, forget and unlock.
  What they bring or give back would be lost.
* If the descriptor were closed when the mount ends: its number could be given to another file. A
  worker that is about to answer would then write into that. `leave` puts /dev/null in its place.
  `close` gives the number back when nothing is under way any more.
* If an INTERRUPT ended a request that has had an effect: the program would repeat it. So
  `_interrupt` ends only waits. If the caller is being killed, it withdraws a request that only
  waits. After any other signal it ends a wait for a lock of a file or a lease. Other requests go
  on, as a system call on a disk does.

INIT is the first message, and nothing else is served before it: it says which of the protocol's
features both sides have (handshake.py). An unknown opcode is answered with ENOSYS. Linux then does
something of its own and asks no more.

Locks touched: none but the driver's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ninefuse.calls import Body, Call
from ninefuse.driving.driver import Executor
from ninefuse.driving.request import Request
from ninefuse.executor import LeadingModel
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse import callbacks, handshake, mounting, notices
from ninefuse.fuse import opcodes as op
from ninefuse.fuse._message import Message
from ninefuse.fuse._wire import Device
from ninefuse.fuse.answers import errno_for_kernel, errno_of, share_of, shortened
from ninefuse.fuse.backing import Backings
from ninefuse.fuse.handles import Files
from ninefuse.fuse.leading import Leading
from ninefuse.fuse.opcodes import Opcode
from ninefuse.fuse.replies import Replies
from ninefuse.fuse.rows import Known, NotServed, Row, Rows, lock_rows, table
from ninefuse.fuse.sessions import Place, Watcher
from ninefuse.fuse.whose import LOCKS, refusal, user_of
from ninefuse.linux.callers import is_being_killed
from ninefuse.settings import Settings
from ninefuse.tree.session import Session
from ninefuse.tree.table import FidTable

log = logging.getLogger(__name__)

_IN_A_ROW = 16  # requests read before what else the dispatcher has to do is looked at
# Requests under way at which the device is read no more: well above what comes when every thread
# of a busy machine is stuck in one file. Those that wait for a lock or a lease do not count.
_MOST_REQUESTS = 20_000
_LONG = 3600.0  # seconds of belief: a client that has them is told of no name twice
_A_WHILE = 50  # milliseconds until it is looked at again whether there are fewer

# Nobody waits for an answer to these, whatever they say.
_UNANSWERED = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY))


class NativeSession:
    """The requests of one mount.

    Args:
        settings: of the mount.
        session: the conversation.
        driver: that bodies are run by.

    Attributes:
        ends: whether it is to serve no more.
        errors: how many there were, by callback and errno.
        statistics: what says the value of the attribute that the counters are published in.
    """

    asks_again = True

    def __init__(self, settings: Settings, session: Session, driver: Executor) -> None:
        self.errors: Counter[tuple[str, int]] = Counter()
        self.statistics: Callable[[], bytes] = bytes
        self._watcher: Watcher | None = None
        self._session = session
        self._driver = driver
        self._settings = settings
        session.is_believed = min(settings.attr_timeout, settings.entry_timeout) >= _LONG
        self._device: Device
        self._backings = Backings(session, settings) if settings.data == "kernel" else None
        self._files: Files = callbacks if self._backings is None else self._backings
        self._rows = Rows(session, settings, self._files)
        self._table: dict[int, Row] = {}
        self._asked: dict[int, Request] = {}  # under way, by what the kernel calls them
        self._lock_rows: tuple[Row, ...] = ()
        self._fd = -1
        # Open from the start: in the end there may be no descriptors left.
        self._nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._mounted: mounting.Mounted | None = None
        self._agreed: handshake.Agreed | None = None
        self._started: Callable[[], None] = _nothing
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.ends = False
        self._debug = log.isEnabledFor(logging.DEBUG)  # asked once, not for each request
        driver.dispatcher.wake = self._be_woken
        if isinstance(driver, LeadingModel):
            self._leading = Leading(driver, self)

    # ---- its life -----------------------------------------------------------------------------

    def mount(self) -> Place:
        """As of a `FuseSession`."""
        self._mounted = mounting.mount(self._settings)
        self.use(self._mounted.device)
        return Place(self._mounted.number, self._mounted.point)

    def watch(self, tracer: Watcher) -> None:
        """As of a `FuseSession`."""
        self._watcher = tracer

    def use(self, device: int, rows: Callable[[Device], dict[int, Row]] | None = None) -> None:
        """Serve this device from now on.

        Args:
            device: the FUSE device, open, with O_NONBLOCK. It becomes the session's.
            rows: by opcode, what answers requests on it; None: the callbacks.
        """
        self._fd = device
        self._device = Device(device, handshake.BUFFER_SIZE)
        self._table = (rows or self._callbacks)(self._device)

    def run(self, started: Callable[[], None]) -> None:
        """Serve until there is no mount any more, or `end` was called. On the dispatcher.

        Args:
            started: called once the kernel has been answered for the first time.

        Raises:
            OSError: the device cannot be read.
        """
        self._started = started
        if isinstance(self._driver, LeadingModel):
            self._leading.run(self._device, self._wake)
            return
        driver, device = self._driver, self._device
        while not self.ends:
            is_full = self.is_full
            try:
                taken = 0 if is_full else self._take_some()
            except OSError as e:
                if e.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                raise
            idle = taken < _IN_A_ROW
            driver.before_wait(sleeps=idle)
            if idle or driver.fd >= 0:
                wait = -1 if idle else 0
                found = self.pause() if is_full else device.wait(self._wake, driver.fd, wait)
                if found & 2:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                if found & 4:
                    driver.drain()
            driver.after_wait()

    def end(self) -> None:
        """Have `run` return, whether there is a mount or not. Any thread; does not wait."""
        self.ends = True
        self._be_woken()

    def leave(self, *, is_mounted: bool) -> None:
        """As of a `FuseSession`.

        The device's number stays taken until `close`: whoever is about to answer writes to no
        other file.
        """
        with contextlib.suppress(OSError):  # its number is beyond what the process may have
            os.dup2(self._nowhere, self._fd, inheritable=False)
        if is_mounted and self._mounted is not None:
            mounting.unmount(self._mounted, self._settings.mountpoint)

    def close(self) -> None:
        """Close what is open, when nothing is under way any more."""
        for fd in (self._fd, self._wake, self._nowhere):
            if fd >= 0:
                os.close(fd)
        self._fd = self._wake = self._nowhere = -1

    def passed(self) -> int:
        """As of a `FuseSession`."""
        return 0 if self._backings is None else self._backings.passed()

    # ---- what the kernel is told ----------------------------------------------------------------

    def prune(self, nodeids: Sequence[int]) -> None:
        """Ask the kernel to forget files that nobody uses; see `notices.prune`."""
        notices.prune(self._fd, nodeids)

    def attributes_changed(self, nodeid: int) -> None:
        """Have the kernel believe a file's attributes no more; see `notices`."""
        notices.attributes_changed(self._fd, nodeid)

    # ---- requests -----------------------------------------------------------------------------

    def _callbacks(self, device: Device) -> dict[int, Row]:
        self._rows.statistics = lambda: self.statistics()
        background = self._driver.in_background
        replies = Replies(device, self._session, self._settings, background, self._files)
        if isinstance(self._driver, LeadingModel):
            replies.opened, self._rows.closes = self._leading.opened, self._leading.closes
        self._lock_rows = lock_rows(self._rows, replies)
        return table(self._rows, replies)

    def _take_some(self) -> int:
        """Start requests, as many as there are and as may be in a row; how many."""
        receive = self._device.receive
        for taken in range(_IN_A_ROW):
            message = receive()
            if message is None:
                return taken
            self.take(message)
        return _IN_A_ROW

    @property
    def has_begun(self) -> bool:
        """Whether the kernel was answered for the first time."""
        return self._agreed is not None

    @property
    def is_full(self) -> bool:
        """Whether so much is under way that no request is to be read."""
        return len(self._driver.requests) - self._driver.waiting >= _MOST_REQUESTS

    def pause(self) -> int:
        """As `Device.wait`, for a while at most, whether there is something to be read or not."""
        engine = self._driver.fd
        poll = select.poll()
        poll.register(self._fd, 0)  # told is its end alone
        poll.register(self._wake, select.POLLIN)
        if engine >= 0:
            poll.register(engine, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(_A_WHILE)}
        if self._fd in ready:
            self.ends = True
        return 2 * (self._wake in ready) + 4 * (engine in ready)

    @property
    def fids(self) -> FidTable:
        """The session's."""
        return self._session.fids

    def take(self, message: Message) -> Request | None:
        """Start a request; it, where it is one of the driver's and may be under way."""
        if self._watcher is not None:
            self._watcher.received()
        if message.fault:
            log.warning("a request that is none: %r", message)
            if message.opcode not in _UNANSWERED:
                self._device.error(message.unique, message.fault)
            return None
        row = self._table.get(message.opcode)
        if row is None or self._agreed is None:
            return self._take_other(message)
        return self._start(row, message)

    def _start(self, row: Row, message: Message) -> Request | None:
        try:
            body = row.asks(message)
        except NotServed:
            self._refuse(row.name, message, errno.ENOSYS)
            return None
        except Exception as e:
            self._fail(row, message, e)
            return None
        if isinstance(body, Known):
            self._reply(row, message, body.result)
            return None
        user = user_of(message, self.fids)
        if user and self._driver.has_too_many(user) and (code := refusal(row.name, message)):
            body.close()
            self._refuse(row.name, message, code)
            return None
        # Where a file's set-id bits may go, a body has more to do than its call.
        plain = None if message.nodeid in self.fids.set_id else row.plain
        request = self._admit(row, message, body, user, plain)
        try:
            self._driver.drive(request)
        except Exception:
            self._driver.give_up(request)
        return request

    def _admit(
        self,
        row: Row,
        message: Message,
        body: Body[Any],
        user: int | None,
        plain: type[Call[Any]] | None,
    ) -> Request:
        done = partial(self._answer, row, message)
        request = self._driver.admit(row.name, body, done, share_of(row.name, user), plain)
        self._asked[message.unique] = request  # before anything is done: it may end elsewhere
        return request

    def foresee(self, message: Message, began: int) -> Request | None:
        """Run the body of a message whose call was made ahead, up to that; see `Role`."""
        assert isinstance(self._driver, LeadingModel)
        row = self._table[message.opcode]
        body = row.asks(message)
        assert not isinstance(body, Known)
        request = self._admit(row, message, body, user_of(message, self.fids), row.plain)
        request.started = began
        return request if self._driver.foresee(request) else None

    def _take_other(self, message: Message) -> Request | None:
        """Requests that are about the connection, and those that are not served."""
        opcode = message.opcode
        if opcode == Opcode.INTERRUPT:
            self._interrupt(message.args[0])
        elif opcode == Opcode.INIT:
            self._agree(message)
        elif opcode in LOCKS and self._agreed is not None:
            return self._start(self._lock_rows[message.args[6] & op.LK_FLOCK], message)
        elif opcode in _UNANSWERED:
            pass  # nothing was asked for, nor looked up
        elif opcode == Opcode.DESTROY:
            self._device.empty(message.unique)
        elif self._agreed is None:
            self._device.error(message.unique, errno.EIO)
        else:
            # The kernel has an answer of its own then, and asks no more: access(2) by the mode,
            # poll(2) that a file is always ready.
            self._device.error(message.unique, errno.ENOSYS)
        return None

    def _agree(self, message: Message) -> None:
        if self._agreed is not None:  # it is said once
            self._device.error(message.unique, errno.EIO)
            return
        major, minor, readahead, offered = message.args
        try:
            agreed = handshake.agree(
                major,
                minor,
                offered,
                acl=self._settings.acl,
                exports=self._session.fids.devices.inodes is not None,
                passes=self._backings is not None,
            )
        except OSError as e:
            log.error("the kernel's FUSE protocol is %d.%d, which is too old", major, minor)
            self._device.error(message.unique, e.errno or errno.EPROTO)
            return
        self._rows.knows_groups = handshake.Flags.CREATE_SUPP_GROUP in agreed.flags
        self._device.short_setxattr = handshake.Flags.SETXATTR_EXT not in agreed.flags
        self._answer_init(message, agreed, readahead)
        self._agreed = agreed
        log.debug("FUSE 7.%d: %r", agreed.minor, agreed.flags)
        self._started()

    def _answer_init(self, message: Message, agreed: handshake.Agreed, readahead: int) -> None:
        backings = self._backings
        if backings is not None and handshake.Flags.PASSTHROUGH not in agreed.flags:
            self._device.error(message.unique, errno.EPROTO)
            text = "-o data=kernel takes Linux 6.9 or newer, with CONFIG_FUSE_PASSTHROUGH"
            raise Failure(ExitCode.MOUNT_REFUSED, text)
        self._device.data(message.unique, handshake.reply(agreed, readahead))
        if backings is not None:
            backings.begin(self._fd)

    # ---- answers ------------------------------------------------------------------------------

    def _answer(self, row: Row, message: Message, request: Request) -> None:
        """A request has ended: answer it. On the thread where that was; raises nothing."""
        driver = self._driver
        self._asked.pop(message.unique, None)
        driver.count(request)
        if driver.observer is not None:
            driver.observer.answered(request.body)
        try:
            result = request.result()
        except Exception as e:
            if request.is_answered:
                log.exception("%s failed after it was answered", row.name)
            else:
                self._fail(row, message, e)
        else:
            if not request.is_answered:
                self._reply(row, message, result)
        if self._watcher is not None:
            self._watcher.replied()

    def _reply(self, row: Row, message: Message, result: Any) -> None:
        if self._debug:
            log.debug("%s: %s", row.name, shortened(result))
        try:
            taken = row.answers(message, result)
        except Exception as e:
            self._fail(row, message, e)
            taken = False
        if not taken and row.undo is not None:
            try:
                row.undo(message, result)
            except Exception:
                log.exception("%s cannot be taken back", row.name)

    def _fail(self, row: Row, message: Message, failure: Exception) -> None:
        if isinstance(failure, OSError):
            code = errno_for_kernel(failure)
        else:
            log.error("%s failed", row.name, exc_info=failure)
            code = errno.EIO
        valid = self._settings.negative_timeout
        if code == errno.ENOENT and message.opcode == Opcode.LOOKUP and valid:
            self.errors[row.name, code] += 1
            self._device.absent(message.unique, valid)
            return
        self._refuse(row.name, message, code)

    def _refuse(self, name: str, message: Message, code: int) -> None:
        code = errno_of(name, code)
        self.errors[name, code] += 1
        if self._debug:
            log.debug("%s: %s", name, errno.errorcode.get(code, code))
        if message.opcode not in _UNANSWERED:
            self._device.error(message.unique, code)

    def _interrupt(self, unique: int) -> None:
        """A signal has come to a caller: a request of his that only waits waits no more.

        One that waits for a worker does so only if he is being killed. Who goes on is not to be
        told EINTR by calls that no file system interrupts. Raises nothing: a signal ends no mount.
        """
        request = self._asked.get(unique)
        if request is None:  # it is answered
            return
        assert isinstance(request.done, partial)
        try:
            if is_being_killed(request.done.args[-1].pid):
                self._driver.withdraw(request)
            else:
                self._driver.interrupt(request)
        except Exception:
            log.exception("%s goes on in spite of a signal", request.name)

    def _be_woken(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            os.eventfd_write(self._wake, 1)


def _nothing() -> None:
    """Nobody waits for the start."""
