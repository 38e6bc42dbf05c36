"""Who may have how many of some places: a bound for each inode and for each user.

Calls can be stuck for as long as somebody likes. Whoever makes them get stuck is to be out of
places long before all are taken: what exceeds a bound waits in a queue of that inode or user.
But whoever waits there keeps others waiting in the kernel, who want the lock of the directory
or the page that his request is about. So a queue that does not move is let through, up to a
further bound.

Locks touched: none; whoever uses a `Shares` guards it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Waiting(NamedTuple, Generic[T]):
    """What waits for a place, and for whose."""

    item: T
    inode: int | None
    user: int | None


class Shares(Generic[T]):
    """The places taken, and what waits for one.

    Args:
        for_inode: how many may be taken for one inode, by each user if these are bounded.
        for_user: how many may be taken for one user; None: there are no bounds for users.
        for_users: how many for all users but root together.
        times: how many times as many may be taken where what waits does not move.
    """

    def __init__(
        self, for_inode: int, for_user: int | None = None, for_users: int = 1 << 30, times: int = 1
    ) -> None:
        self.for_inode = for_inode
        self.for_user = for_user
        self.for_users = for_users
        self._times = times
        self._users = 0  # places taken for them
        self._taken: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[_Waiting[T]]] = {}
        self._moved: set[Hashable] = set()  # queues whose inode or user has given a place back …
        self._looked_at: set[Hashable] = set()  # … since these were looked at

    def __len__(self) -> int:
        """How much waits."""
        return sum(map(len, self._waiting.values()))

    def enter(self, item: T, inode: int | None, user: int | None) -> bool:
        """Take a place, or have ``item`` wait for one.

        Args:
            item: what `leave` is to return when its turn has come.
            inode: for which; None: for none.
            user: for whom, a uid; None and 0: for nobody in particular.

        Returns:
            Whether it was taken.
        """
        for key in self._keys(inode, user):
            if self._is_full(key, 1):
                self._waiting.setdefault(key, deque()).append(_Waiting(item, inode, user))
                return False
        self._take(inode, user)
        return True

    def leave(self, inode: int | None, user: int | None) -> list[T]:
        """Give a place back.

        Returns:
            What has one now: of the inode's queue, of the user's, or of both.
        """
        ready: list[T] = []
        keys = self._keys(inode, user)
        for key in keys:
            self._moved.add(key)
            self._taken[key] -= 1
            if not self._taken[key]:
                del self._taken[key]
        if user and self.for_user is not None:
            self._users -= 1
        for key in keys:
            queue = self._waiting.get(key)
            # What came in by the inode's queue may have taken the user's place as well.
            while queue and not self._is_full(key, 1):
                waiting = queue.popleft()
                # Or it waits in its other queue from now on.
                if self.enter(*waiting):
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
                    break
                queue.popleft()
                self._take(waiting.inode, waiting.user)
                ready.append(waiting.item)
            if not queue:
                del self._waiting[key]
        self._moved.clear()
        self._looked_at = set(self._waiting)
        return ready

    def _keys(self, inode: int | None, user: int | None) -> list[Hashable]:
        """Under which a place is counted."""
        keys: list[Hashable] = []
        if inode is not None:
            keys.append(("inode", inode, (user or 0) if self.for_user is not None else 0))
        if user and self.for_user is not None:
            keys.append(user)
        return keys

    def _take(self, inode: int | None, user: int | None) -> None:
        for key in self._keys(inode, user):
            self._taken[key] += 1
        if user and self.for_user is not None:
            self._users += 1

    def _is_full(self, key: Hashable, times: int) -> bool:
        if isinstance(key, tuple):
            return self._taken[key] >= times * self.for_inode
        assert self.for_user is not None
        return self._taken[key] >= times * self.for_user or self._users >= self.for_users
