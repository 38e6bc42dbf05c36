"""Shares of places: bounds for inodes and users, and what waits for a place."""

from __future__ import annotations

import random
from collections import Counter

from ninefuse.shares import Shares


def test_an_inode_has_so_many_places() -> None:
    """What finds none gets the place that is given back, in turn."""
    shares: Shares[str] = Shares(2)
    assert [shares.enter(item, 7, None) for item in "abcd"] == [True, True, False, False]
    assert shares.enter("e", 8, None)
    assert len(shares) == 2
    assert shares.leave(7, None) == ["c"]
    assert shares.leave(8, None) == []
    assert shares.leave(7, None) == ["d"]
    assert len(shares) == 0


def test_a_user_has_so_many_places() -> None:
    """Whatever the inode; root and nobody have no bound."""
    shares: Shares[str] = Shares(4, 2)
    entered = [shares.enter(item, inode, 1001) for inode, item in enumerate("abc", 1)]
    assert entered == [True, True, False]
    assert shares.enter("d", None, 1001) is False
    for user in (0, None):
        assert all(shares.enter("x", inode, user) for inode in (4, 5, 6, None))
    assert shares.enter("y", 9, 1002)
    assert shares.leave(1, 1001) == ["c"]
    assert shares.leave(2, 1001) == ["d"]


def test_users_have_no_bound_where_there_is_none() -> None:
    shares: Shares[str] = Shares(1)
    assert all(shares.enter("x", inode, 1001) for inode in range(100))


def test_what_waited_for_an_inode_may_have_to_wait_for_its_user() -> None:
    """And the other way round; it has both in the end."""
    shares: Shares[str] = Shares(1, 1)
    assert shares.enter("a", 1, 1001)
    assert shares.enter("b", 2, 1002)
    assert not shares.enter("c", 1, 1002)  # for the inode
    assert shares.leave(1, 1001) == []  # now for the user
    assert shares.enter("d", 1, 1003)
    assert shares.leave(2, 1002) == []  # for the inode again
    assert shares.leave(1, 1003) == ["c"]


def test_at_random_no_bound_is_exceeded_and_nothing_is_lost() -> None:
    rng = random.Random(5)
    shares: Shares[tuple[int, int | None, int | None]] = Shares(3, 5)
    inside: list[tuple[int, int | None, int | None]] = []
    outside = 0
    for number in range(20_000):
        if rng.random() < 0.5:
            item = number, rng.choice((None, 1, 2, 3, 4)), rng.choice((None, 0, 7, 8, 9))
            if shares.enter(item, *item[1:]):
                inside.append(item)
            else:
                outside += 1
        elif inside:
            item = inside.pop(rng.randrange(len(inside)))
            ready = shares.leave(*item[1:])
            inside += ready
            outside -= len(ready)
        assert outside == len(shares)
        inodes = Counter(item[1] for item in inside if item[1] is not None)
        users = Counter(item[2] for item in inside if item[2])
        assert max(inodes.values(), default=0) <= 3
        assert max(users.values(), default=0) <= 5
    while inside:
        inside += shares.leave(*inside.pop()[1:])
    assert len(shares) == 0
    assert not shares._taken
    assert not shares._waiting
