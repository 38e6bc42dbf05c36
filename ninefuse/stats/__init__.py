"""ninefuse-stat: the live counters of a running mount, as a table.

A mount publishes them as an extended attribute of its root directory: JSON, whose counters
only ever grow, and which is made anew once a second (report.py).

    ask.py       the attribute, read in a child process with a time limit
    snapshot.py  what it says; what is shown of a time is the difference of two snapshots
    table.py     the table
    command.py   the command line

It looks from outside: it may import process/, linux/ and exitcodes.py, and of driving/ the
attribute's name; no daemon imports it.
"""

from ninefuse.driving.counters import ATTRIBUTE as ATTRIBUTE
from ninefuse.exitcodes import ExitCode, one_line


class Problem(Exception):
    """An end of the command that the user can do something about.

    Arguments: message, kept to one line; code, the exit code.
    """

    def __init__(self, message: str, code: int = ExitCode.INTERNAL) -> None:
        super().__init__(one_line(message))
        self.code = code
