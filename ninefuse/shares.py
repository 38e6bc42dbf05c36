"""Who may have how many of some places: a bound for each inode and for each user.

Calls can be stuck for as long as somebody likes. Whoever makes them get stuck is to be out of
places long before all are taken: what exceeds a bound waits in a queue of that inode or user,
and keeps nobody else waiting.

Locks touched: none; whoever uses a `Shares` guards it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
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
        for_inode: how many may be taken for one inode.
        for_user: how many may be taken for one user; None: there are no bounds for users.
    """

    def __init__(self, for_inode: int, for_user: int | None = None) -> None:
        self.for_inode = for_inode
        self.for_user = for_user
        self._taken: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[_Waiting[T]]] = {}

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
        key = self._full(inode, user)
        if key is not None:
            self._waiting.setdefault(key, deque()).append(_Waiting(item, inode, user))
            return False
        if inode is not None:
            self._taken["inode", inode] += 1
        if user and self.for_user is not None:
            self._taken["user", user] += 1
        return True

    def leave(self, inode: int | None, user: int | None) -> list[T]:
        """Give a place back.

        Returns:
            What has one now: of the inode's queue, of the user's, or of both.
        """
        ready: list[T] = []
        keys = (("inode", inode), ("user", user))
        for key in keys:
            if key in self._taken:
                self._taken[key] -= 1
                if not self._taken[key]:
                    del self._taken[key]
        for key in keys:
            queue = self._waiting.get(key)
            # What came in by the inode's queue may have taken the user's place as well.
            while queue and not self._is_full(*key):
                waiting = queue.popleft()
                # Or it waits in its other queue from now on.
                if self.enter(*waiting):
                    ready.append(waiting.item)
                    break
            if queue is not None and not queue:
                del self._waiting[key]
        return ready

    def _is_full(self, kind: str, number: int | None) -> bool:
        most = self.for_inode if kind == "inode" else self.for_user
        return most is not None and self._taken[kind, number] >= most

    def _full(self, inode: int | None, user: int | None) -> Hashable:
        """Which queue there is to wait in, if any."""
        if inode is not None and self._is_full("inode", inode):
            return "inode", inode
        if user and self._is_full("user", user):
            return "user", user
        return None
