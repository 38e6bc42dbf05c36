"""What the second model asks of those who take the dispatcher's role in turn.

Locks touched: none.
"""

from __future__ import annotations

from typing import Protocol

from ninefuse.driving.request import Request


class Crew(Protocol):
    """Those who lead in turn, and the hands that make plain calls; see fuse/leading.py."""

    def reserve(self, request: Request) -> bool:
        """Give a plain call a place, for which `free` is called in the end; False if none is left.

        A user and an inode have so many at most.
        """

    def occupy(self, request: Request) -> None:
        """As `reserve`, for a call that was made already."""

    def free(self, user: int | None, inode: int | None) -> None:
        """Give the place of a call back."""

    def hand(self, request: Request) -> bool:
        """Have a hand make the plain call of the request that is being started, if it is better."""

    def pass_on(self) -> bool:
        """Let another thread lead; False if nobody is to be had."""

    def is_one(self) -> bool:
        """Whether this thread takes part in leading."""

    def begins(self) -> None:
        """A body is about to be run by the leader, with which no call is to be made ahead."""

    def goes_on(self) -> None:
        """Such a body goes on, which stood still: first those whose calls were made ahead."""

    def ends(self) -> None:
        """Such a body has ended, or stands still."""

    def sets_aside(self, inode: int) -> bool:
        """Such a body waits for a plain call: those on other inodes may be made ahead meanwhile.

        False: they may not, there are too many such bodies.
        """

    def comes_back(self, inode: int, *, goes_on: bool) -> None:
        """A body that was set aside goes on, or has ended."""

    def came_back(self) -> None:
        """The calls are over for which this thread has passed the role on, if it has."""

    def made_ahead(self) -> list[tuple[str, int, int]]:
        """The calls under way whose bodies are still to be run up to them.

        What each is, the inode, and when it was begun, as of time.monotonic_ns().
        """

    def take_back(self, request: Request) -> bool:
        """Take a request's call from the hands; False if one has begun it, or none has it."""

    def join(self) -> None:
        """Wait for the end of all threads; what hands have not begun is left to the workers."""
