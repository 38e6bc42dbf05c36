"""Leader and followers: threads of the native session that take the dispatcher's role in turn.

`_role.pyx` says how the role goes from one to the next, and how plain calls are made without
Python. Here it is decided who makes a call:

* The leader makes a call itself, as long as another leader is free. It passes the role on first.
  So a lone client's call and answer stay on one thread.
* Once all others are in calls, a hand makes a plain call. So it is as long as any hand has work.
  The leader reads on meanwhile.
* If all but the leader are in calls, a worker makes any other call: somebody is always to lead.

A thread that is stuck has others stand in for it. If the role was not passed on for a tenth of a
second, one more leader is started. If no hand has come back for so long, what waits for hands goes
to the workers. So does all that comes until one has.

Plain calls on one inode have half as many places as there may be hands, whoever makes them. So have
those of one user, if there are several. A plain call that finds none waits for a place in the
workers' pool. A call made ahead asks for no place, but has one once its body has run up to it.

Locks touched: the mutex of its `Role`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from ninefuse.driving.clock import STUCK
from ninefuse.driving.request import Request
from ninefuse.executor import LeadingModel
from ninefuse.fuse._message import Message
from ninefuse.fuse._role import Role
from ninefuse.fuse._wire import Device
from ninefuse.linux.credentials import end_process
from ninefuse.process.threads import start_quietly
from ninefuse.settings import LEADERS
from ninefuse.tree.kernel import FIRST_HANDLE
from ninefuse.tree.table import FidTable

_MOST_LEADERS = 24
_MOST_HANDS = 8  # or as many as there are workers to begin with
_UNBOUNDED = 1 << 30
_MOST_QUEUED = 24  # calls that wait for one


class Front(Protocol):
    """What becomes of a message; see native.py."""

    ends: bool

    @property
    def has_begun(self) -> bool: ...

    @property
    def is_full(self) -> bool: ...

    @property
    def fids(self) -> FidTable: ...

    def take(self, message: Message) -> Request | None: ...

    def foresee(self, message: Message, began: int) -> Request | None: ...

    def pause(self) -> object: ...


class Leading:
    """The threads of one session.

    Args:
        driver: that bodies are run by.
        front: starts requests.
    """

    def __init__(self, driver: LeadingModel, front: Front) -> None:
        self._driver = driver
        self._front = front
        self._role: Role
        self._has_run = False
        self._hands = min(_MOST_HANDS, driver.pool.threads)
        self._unique = 0  # of the message that the leader is at
        self._seen = -1  # calls that hands had finished, when it was looked at last
        self._away: set[int] = set()  # threads that have passed the role on, and make other calls
        self._is_looking = False
        self._are_stuck = False  # the hands, all of them
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        # Threads to be started; None: no more.
        self._wanted: SimpleQueue[str | None] = SimpleQueue()
        self._leaders = 0  # that were wanted
        self._leading: set[int] = set()  # threads that take part in leading
        self._failure: BaseException | None = None  # what has ended it, but for the mount's end
        driver.crew = self

    def run(self, device: Device, wake: int) -> None:
        """Serve until there is no mount any more, or the eventfd is readable.

        Args:
            device: that is read.
            wake: an eventfd, which ends it.

        Raises:
            OSError: the device cannot be read.
            Failure: what the kernel was to agree on cannot be.
        """
        self._role = Role(device, wake, self._driver.finish, end_process)
        self._has_run = True
        if self._driver.observer is None:  # who is to see what bodies ask for, and when
            self._front.fids.on_set_id = self._role.forgets_file
            for_user = LEADERS // 2 if self._driver.by_user else _UNBOUNDED
            self._role.makes_ahead(self._front.foresee, for_user)
        self._role.joins(1)
        self._run(self._begin)
        self._role.retires()
        for _ in range(LEADERS):
            self._more_leaders()
        self._start_threads()
        self._role.end()
        os.eventfd_write(wake, 1)  # for who waits for the device
        if self._failure is not None:
            raise self._failure

    # What the driver asks for; see `Crew`.

    def reserve(self, request: Request) -> bool:
        """As of a `Crew`."""
        half = max(1, self._hands // 2)
        is_bounded = request.user and self._driver.by_user
        return self._role.reserve(request, half if is_bounded else _UNBOUNDED, half)

    def occupy(self, request: Request) -> None:
        """As of a `Crew`."""
        self._role.reserve(request, _UNBOUNDED, _UNBOUNDED)

    def free(self, user: int | None, inode: int | None) -> None:
        """As of a `Crew`."""
        self._role.free(user, inode)

    def hand(self, request: Request) -> bool:
        """As of a `Crew`."""
        role = self._role
        if not role.handed and role.in_calls + 1 < role.threads:
            return False
        waits = role.idle <= role.queued
        if waits:
            if role.hands < self._hands:
                role.hires(1)
                self._wanted.put("hand")
            elif self._are_stuck or role.queued >= _MOST_QUEUED:
                return False
        request.thread = "a hand"
        try:
            role.hand(request, self._unique)
        except MemoryError:
            return False
        if waits:  # once it is queued: a look that ends before would not see it
            self._look_again()
        return True

    def pass_on(self) -> bool:
        """As of a `Crew`."""
        role = self._role
        if role.pass_on():
            return True
        if self._leaders < _MOST_LEADERS and time.monotonic_ns() > role.passed + STUCK * 1e9:
            self._more_leaders()
        return False

    def is_one(self) -> bool:
        """As of a `Crew`."""
        return threading.get_ident() in self._leading

    def begins(self) -> None:
        """As of a `Crew`."""
        self._role.begins()

    def goes_on(self) -> None:
        """As of a `Crew`."""
        self._role.begins()
        me = threading.get_ident()
        is_away = me in self._away
        self._away.discard(me)  # others' requests that end in this are not what it is away for
        self._role.catch_up()
        if is_away:
            self._away.add(me)

    def ends(self) -> None:
        """As of a `Crew`."""
        self._role.ends()

    def sets_aside(self, inode: int) -> bool:
        """As of a `Crew`."""
        return self._role.sets_aside(inode)

    def comes_back(self, inode: int, *, goes_on: bool) -> None:
        """As of a `Crew`."""
        self._role.comes_back(inode, goes_on)

    def came_back(self) -> None:
        """As of a `Crew`."""
        me = threading.get_ident()
        if me in self._away:
            self._away.discard(me)
            self._role.came_back()

    def made_ahead(self) -> list[tuple[str, int, int]]:
        """As of a `Crew`."""
        return self._role.made_ahead() if self._has_run else []

    def take_back(self, request: Request) -> bool:
        """As of a `Crew`."""
        return bool(self._role.take_back(request))

    def join(self) -> None:
        """As of a `Crew`."""
        for thread in self._threads:
            thread.join()
        if self._has_run:
            self._leave_all_to_workers()
            self._role.close()

    # What the session tells of handles

    def opened(self, handle: int) -> None:
        """The kernel is about to be told of a handle. Reads and writes by it may be plain calls.

        Args:
            handle: the kernel's number of it.
        """
        found = self._front.fids.plain_file_of(FIRST_HANDLE + handle)
        if found is not None:
            node, file = found
            appends = bool(file.flags & os.O_APPEND)
            whose = file.writer, file.owner or 0
            is_near = self._driver.is_near
            may = is_near is not None and is_near(node.number), file.readable, file.writable
            self._role.knows(handle, node.number, file.fd, *may, appends, *whose)
            if self._front.fids.plain_file_of(FIRST_HANDLE + handle) is None:
                self._role.forgets(handle)  # it was seen with set-id bits meanwhile

    def closes(self, handle: int) -> None:
        """A handle is about to be closed."""
        self._role.forgets(handle)

    # The threads

    def _begin(self) -> None:
        """Lead until the kernel was answered for the first time: what that starts is this thread's.

        Signals, above all, which Python has on the main thread.
        """
        while not self._front.has_begun:
            message = self._role.lead()
            if message is None:
                self._ends()
                break
            self._front.take(message)

    def _more_leaders(self) -> None:
        self._leaders += 1
        self._wanted.put("leader")

    def _start_threads(self) -> None:
        """Start those that are wanted, until all is over; without a thread to be had, lead here.

        All by the thread that runs this: it changes no umask, which a thread shares with the one
        that has started it.
        """
        while not self._is_over.is_set():
            name = self._wanted.get()
            if name is None:
                return
            part = self._role.work if name == "hand" else partial(self._run, self._lead)
            label = f"{name}-{len(self._threads)}"
            thread = threading.Thread(target=part, name=label, daemon=True)
            try:
                start_quietly(thread)
                self._threads.append(thread)
            except RuntimeError:
                if name == "hand":
                    self._role.hires(-1)
                elif not self._threads:
                    self._run(self._lead)
                else:
                    self._leaders -= 1

    def _run(self, part: Callable[[], None]) -> None:
        """Run a thread's part in leading; what ends it for all is noted."""
        self._leading.add(threading.get_ident())
        self._role.enter()
        try:
            part()
        except BaseException as e:
            is_gone = isinstance(e, OSError) and e.errno in (errno.ENODEV, errno.ECONNABORTED)
            if not is_gone:
                self._failure = e
            self._ends()
        finally:
            self._role.leave()

    def _ends(self) -> None:
        self._is_over.set()
        self._wanted.put(None)

    def _lead(self) -> None:
        self._role.joins(1)
        message = self._next()
        while message is not None:
            message = self._serve(message) or self._next()
        self._ends()

    def _next(self) -> Message | None:
        """The next message, read as leader; None: all is over."""
        front = self._front
        while front.is_full and not (front.ends or self._is_over.is_set()):
            self._role.leave()
            front.pause()
            self._role.enter()
        return None if front.ends else self._role.lead()

    def _serve(self, message: Message) -> Message | None:
        """Start a request, and make its call if that is this thread's; the next one, if known."""
        role, unique = self._role, message.unique
        self._unique = unique
        request = self._front.take(message)
        if request is None or not request.in_place:
            return None
        if request.is_plain:
            request.in_place = False
            request.thread = threading.current_thread().name
            return role.make(request, unique)
        role.leave()  # which may end others' requests: they are not what it is away for
        self._away.add(threading.get_ident())
        try:
            self._driver.rest(request)
        finally:
            role.enter()
            self.came_back()
        return None

    # Hands that are stuck

    def _look_again(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self._seen = self._role.finished
            if not self._driver.clock.call_later(STUCK, self._look):
                self._is_looking = False  # no thread is to be had: the next that waits tries again

    def _look(self) -> None:
        """See that what waits for hands which are stuck goes to the workers in the end."""
        role = self._role
        self._are_stuck = role.finished == self._seen and not role.idle
        self._is_looking = False
        if self._are_stuck:
            self._leave_all_to_workers()
        if role.queued or self._are_stuck:
            self._look_again()

    def _leave_all_to_workers(self) -> None:
        for request in self._role.take_back(None):
            assert request.call is not None
            self.free(request.user, request.call.on)
            self._driver.leave_to_workers(request)
