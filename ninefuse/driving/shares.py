"""Who may have how many of some places: a bound for each inode and for each user.

Calls can be stuck for as long as somebody likes. Whoever makes them get stuck is to be out of
places long before all are taken: what exceeds a bound waits in a queue of that inode or user.
But whoever waits there keeps others waiting in the kernel, who want the page that his request is
about. So a queue that does not move is let through, up to a further bound.

For as long as some requests take, the kernel keeps the lock of a directory that all may use. A
user has places of his own for these (`Holder`), which he has at once. Where they are taken, and
none comes back, what waits has to be refused (`hopeless`): else all would wait for him.

Locks touched: none; whoever uses a `Shares` guards it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Holder:
    """A user, where he has the kernel keep the lock of an inode until he is answered."""

    user: int


def take_one(counts: Counter[K], key: K) -> None:
    """Count one less; nothing is kept of what there is none of."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


# For whom a place is: a uid, or a user as a `Holder`; None and 0: for nobody in particular.
Whose = int | Holder | None


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[T]):
    """What waits for a place, and for whose."""

    item: T
    inode: int | None
    user: Whose
    goes_on: bool


class Shares(Generic[T]):
    """The places taken, and what waits for one.

    Args:
        for_inode: how many may be taken for one inode, by each user if these are bounded.
        for_user: how many may be taken for one user; None: there are no bounds for users.
        for_users: how many for all users but root together.
        times: how many times as many may be taken where what waits does not move.
        for_holder: how many may be taken for one user as a `Holder`.
    """

    def __init__(
        self,
        for_inode: int,
        for_user: int | None = None,
        for_users: int = 1 << 30,
        times: int = 1,
        for_holder: int = 1 << 30,
    ) -> None:
        self.for_inode = for_inode
        self.for_user = for_user
        self.for_users = for_users
        self.for_holder = for_holder
        self._times = times
        self._users = 0  # places taken for them
        self._taken: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[_Waiting[T]]] = {}
        self._moved: set[Hashable] = set()  # queues whose inode or user has given a place back …
        self._looked_at: set[Hashable] = set()  # … since these were looked at
        self._hopeless: set[Holder] = set()  # whose places do not come back

    def __len__(self) -> int:
        """How much waits."""
        return sum(map(len, self._waiting.values()))

    def enter(self, item: T, inode: int | None, user: Whose, *, goes_on: bool = False) -> bool:
        """Take a place, or have ``item`` wait for one.

        Args:
            item: what `leave` is to return when its turn has come.
            inode: for which; None: for none.
            user: for whom.
            goes_on: whether it has had a place before. A `Holder` is not stopped half way.

        Returns:
            Whether it was taken.
        """
        for key in self._keys(inode, user):
            if self._is_full(key, 1) and not (goes_on and isinstance(key, Holder)):
                waiting = _Waiting(item, inode, user, goes_on)
                self._waiting.setdefault(key, deque()).append(waiting)
                return False
        self._take(inode, user)
        return True

    def leave(self, inode: int | None, user: Whose) -> list[T]:
        """Give a place back.

        Returns:
            What has one now: of the inode's queue, of the user's, or of both.
        """
        ready: list[T] = []
        keys = self._keys(inode, user)
        for key in keys:
            self._moved.add(key)
            take_one(self._taken, key)
        if user and self.for_user is not None:
            self._users -= 1
        if isinstance(user, Holder):
            self._hopeless.discard(user)
        for key in keys:
            queue = self._waiting.get(key)
            # What came in by the inode's queue may have taken the user's place as well.
            while queue and not self._is_full(key, 1):
                waiting = queue.popleft()
                # Or it waits in its other queue from now on.
                inode, user = waiting.inode, waiting.user
                if self.enter(waiting.item, inode, user, goes_on=waiting.goes_on):
                    ready.append(waiting.item)
                    break
            if queue is not None and not queue:
                del self._waiting[key]
        return ready

    def remove(self, is_wanted: Callable[[T], bool]) -> bool:
        """Have an item wait no more; whether it was found. It has no place."""
        for key, queue in self._waiting.items():
            for waiting in queue:
                if is_wanted(waiting.item):
                    queue.remove(waiting)
                    if not queue:
                        del self._waiting[key]
                    return True
        return False

    def overdue(self) -> list[T]:
        """Let through what waits in queues that have not moved since this was called last.

        Returns:
            What has a place now, beyond its share.
        """
        ready: list[T] = []
        for key, queue in list(self._waiting.items()):
            if key in self._moved or key not in self._looked_at:
                continue
            while queue:
                waiting = queue[0]
                keys = self._keys(waiting.inode, waiting.user)
                if any(self._is_full(one, self._times) for one in keys):
                    if isinstance(key, Holder):
                        self._hopeless.add(key)
                    break
                queue.popleft()
                self._take(waiting.inode, waiting.user)
                ready.append(waiting.item)
            if not queue:
                del self._waiting[key]
        self._moved.clear()
        self._looked_at = set(self._waiting)
        return ready

    def hopeless(self) -> list[T]:
        """Take out what waits for places of a `Holder` of which none comes back; it has none."""
        found: list[T] = []
        for key in self._hopeless:
            found += [waiting.item for waiting in self._waiting.pop(key, ())]
        return found

    def _keys(self, inode: int | None, user: Whose) -> list[Hashable]:
        """Under which a place is counted."""
        keys: list[Hashable] = []
        if inode is not None:
            keys.append(("inode", inode, (user or 0) if self.for_user is not None else 0))
        if user and self.for_user is not None:
            keys.append(user)
        return keys

    def _take(self, inode: int | None, user: Whose) -> None:
        for key in self._keys(inode, user):
            self._taken[key] += 1
        if user and self.for_user is not None:
            self._users += 1
        if isinstance(user, Holder):
            self._hopeless.discard(user)

    def _is_full(self, key: Hashable, times: int) -> bool:
        if isinstance(key, tuple):
            return self._taken[key] >= times * self.for_inode
        if isinstance(key, Holder):
            return self._taken[key] >= self.for_holder or self._users >= self.for_users
        assert self.for_user is not None
        return self._taken[key] >= times * self.for_user or self._users >= self.for_users
