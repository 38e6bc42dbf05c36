"""Shares of places: bounds for inodes and users, and what waits for a place."""

from __future__ import annotations

import random
from collections import Counter

from ninefuse.driving.shares import Holder, Shares


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
    shares: Shares[str] = Shares(1, 2)
    assert shares.enter("a", 1, 1001)
    assert shares.enter("b", 2, 1001)
    assert not shares.enter("c", 1, 1001)  # for the inode
    assert not shares.enter("d", 3, 1001)  # for the user
    assert shares.leave(1, 1001) == ["c"]
    assert not shares.enter("e", 1, 1001)
    assert shares.leave(2, 1001) == ["d"]
    assert shares.leave(1, 1001) == ["e"]


def test_one_user_takes_nothing_of_an_inode_from_another() -> None:
    shares: Shares[str] = Shares(1, 4)
    assert shares.enter("a", 1, 1001)
    assert not shares.enter("b", 1, 1001)
    for user in (1002, 0):
        assert shares.enter("c", 1, user)
        assert not shares.enter("d", 1, user)


def test_what_does_not_move_is_let_through() -> None:
    """So many times the share; what moves waits its turn."""
    shares: Shares[int] = Shares(1, 2, times=3)
    for number in range(10):
        shares.enter(number, None, 1001)
    moving = [shares.enter(number, None, 1002) for number in range(100, 104)]
    assert moving == [True, True, False, False]
    assert shares.overdue() == [], "it has only just begun to wait"
    assert shares.leave(None, 1002) == [102]
    assert shares.overdue() == [2, 3, 4, 5]
    assert shares.overdue() == [103], "the other's has not moved since"
    assert shares.overdue() == []
    assert len(shares) == 4
    # They are places like others.
    given = [shares.leave(None, 1001) for _ in range(6)]
    assert given == [[], [], [], [], [6], [7]]


def test_users_leave_some_for_root() -> None:
    shares: Shares[str] = Shares(9, 2, for_users=3, times=9)
    assert all(shares.enter("a", None, user) for user in (1001, 1001, 1002))
    assert not shares.enter("b", None, 1003)
    assert shares.enter("c", None, 0)
    assert shares.overdue() == shares.overdue() == []
    assert shares.leave(None, 1002) == []
    assert shares.overdue() == ["b"], "whoever's place it was"


def test_at_random_no_bound_is_exceeded_and_nothing_is_lost() -> None:
    rng = random.Random(5)
    shares: Shares[tuple[int, int | None, int | None]] = Shares(3, 5, times=2)
    inside: list[tuple[int, int | None, int | None]] = []
    outside = 0
    for number in range(20_000):
        what = rng.random()
        if what < 0.5:
            item = number, rng.choice((None, 1, 2, 3, 4)), rng.choice((None, 0, 7, 8, 9))
            if shares.enter(item, *item[1:]):
                inside.append(item)
            else:
                outside += 1
        elif inside:
            ready = shares.overdue() if what > 0.95 else []
            item = inside.pop(rng.randrange(len(inside)))
            ready += shares.leave(*item[1:])
            inside += ready
            outside -= len(ready)
        assert outside == len(shares)
        inodes = Counter((item[1], item[2] or 0) for item in inside if item[1] is not None)
        users = Counter(item[2] for item in inside if item[2])
        assert max(inodes.values(), default=0) <= 6
        assert max(users.values(), default=0) <= 10
    while inside:
        inside += shares.leave(*inside.pop()[1:])
    assert len(shares) == 0
    assert not shares._taken
    assert not shares._waiting
    assert shares._users == 0


# Users for whom the kernel keeps a lock


def test_a_holder_has_places_of_its_own() -> None:
    """However many of the user's other places are taken, and of the inode."""
    shares: Shares[str] = Shares(2, 2, for_holder=3)
    assert [shares.enter(item, 7, 1001) for item in "abc"] == [True, True, False]
    assert [shares.enter(item, 7, Holder(1001)) for item in "def"] == [True, True, False]
    assert [shares.enter(item, 8, Holder(1001)) for item in "gh"] == [True, False]
    assert shares.enter("i", 7, Holder(1002))
    assert shares.leave(8, Holder(1001)) == ["h"]
    assert shares.leave(7, 1001) == ["c"]
    assert shares.leave(7, Holder(1001)) == ["f"]


def test_what_a_holder_cannot_have_is_refused() -> None:
    """Where none of its places comes back: at once, until one does."""
    shares: Shares[int] = Shares(9, 9, times=4, for_holder=2)
    one = Holder(1001)
    entered = [shares.enter(number, number, one) for number in range(4)]
    assert entered == [True, True, False, False]
    for _ in range(2):
        assert shares.hopeless() == []
        assert shares.overdue() == []
    assert shares.hopeless() == [2, 3]
    assert not shares.enter(4, 4, one)
    assert shares.hopeless() == [4]
    assert len(shares) == 0
    assert shares.leave(0, one) == []
    assert shares.enter(5, 5, one)
    assert not shares.enter(6, 6, one)
    assert shares.hopeless() == [], "one has come back"
    assert shares.leave(1, one) == [6]


def test_a_holder_whose_places_come_back_is_waited_for() -> None:
    shares: Shares[int] = Shares(9, 9, for_holder=1)
    one = Holder(1001)
    assert [shares.enter(number, number, one) for number in range(4)] == [True] + 3 * [False]
    for number in range(3):
        assert shares.leave(number, one) == [number + 1]
        assert shares.overdue() == []
        assert shares.hopeless() == []


def test_a_holder_is_not_stopped_half_way() -> None:
    """But by the bound of an inode."""
    shares: Shares[str] = Shares(2, 9, for_holder=1)
    one = Holder(1001)
    assert shares.enter("a", 1, one)
    assert shares.enter("b", 2, one, goes_on=True)
    assert not shares.enter("c", 3, one)
    assert shares.enter("d", 2, one, goes_on=True)
    assert not shares.enter("e", 2, one, goes_on=True)
    assert shares.leave(2, one) == ["e"]
    # A user's other places are bounded all the same.
    plain: Shares[str] = Shares(9, 1)
    assert plain.enter("a", 1, 1001)
    assert not plain.enter("b", 2, 1001, goes_on=True)


def test_a_holder_is_refused_where_all_users_have_too_many() -> None:
    """And has places again once there are any."""
    shares: Shares[str] = Shares(9, 9, for_users=1, for_holder=9)
    one = Holder(1001)
    assert shares.enter("a", 1, 1002)
    assert not shares.enter("b", 2, one)
    assert (shares.overdue(), shares.overdue(), shares.hopeless()) == ([], [], ["b"])
    assert shares.leave(1, 1002) == []
    assert shares.enter("c", 3, one)
    assert not shares.enter("d", 4, one)
    assert shares.hopeless() == []
