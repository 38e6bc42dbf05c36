"""The exit codes of the ninefuse command, and the exception that carries one to the user.

Locks touched: none.
"""

import enum
import sys


class ExitCode(enum.IntEnum):
    """What the ninefuse command returns. The numbers are documented and never reused."""

    OK = 0  # the mount answers (as a daemon), or was served to its end (in the foreground)
    INTERNAL = 1  # an error in ninefuse itself or in what it is built on
    USAGE = 2  # the command line or an -o option is wrong
    SOURCE_MISSING = 3  # SRC does not exist
    SOURCE_NOT_DIRECTORY = 4  # SRC is a file or something else that is no directory
    SOURCE_UNREADABLE = 5  # SRC may not be listed or entered, or does not answer
    MOUNTPOINT_MISSING = 6  # MNT does not exist
    MOUNTPOINT_NOT_DIRECTORY = 7  # MNT is a file or something else that is no directory
    MOUNTPOINT_DEAD = 8  # MNT holds a mount whose daemon has died or does not answer
    SAME_DIRECTORY = 9  # SRC and MNT are one directory, or SRC is mounted on MNT already
    MOUNTPOINT_INSIDE_SOURCE = 10  # requests would come back into the daemon and freeze it
    SOURCE_INSIDE_MOUNTPOINT = 11  # the mount would hide its own source
    NO_FUSE_DEVICE = 12  # the kernel offers no /dev/fuse
    FUSE_DEVICE_DENIED = 13  # /dev/fuse is there, but this user may not open it
    NO_FUSERMOUNT = 14  # fusermount3, which mounts for everybody but root, is not installed
    ALLOW_OTHER_DENIED = 15  # allow_other without user_allow_other in /etc/fuse.conf
    MOUNT_REFUSED = 16  # the kernel or fusermount3 refused the mount
    LISTENING_REFUSED = 17  # an address of --listen cannot be had, or not served


def one_line(text: str) -> str:
    r"""Return text with all that is not printable escaped (a newline becomes \n).

    File names may hold newlines, terminal controls and bytes that are no characters. None of
    them may forge a line of a log or reach a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


class Failure(Exception):
    """An end of the command that the user can do something about.

    Arguments: code, the exit code; message, what is wrong and what to do (kept to one line,
    whatever names it holds).
    """

    code: ExitCode
    message: str

    def __init__(self, code: ExitCode, message: str) -> None:
        self.code = code
        self.message = one_line(message)
        super().__init__(self.message)


def report(failure: Failure, program: str = "ninefuse") -> ExitCode:
    """Print the failure as one line on stderr and return its exit code."""
    print(f"{program}: {failure.message}", file=sys.stderr, flush=True)
    return failure.code
