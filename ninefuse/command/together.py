"""Settings that do not go together.

Locks touched: none.
"""

from __future__ import annotations

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.settings import Settings


def check(settings: Settings) -> None:
    """Refuse an engine or a hand-over that the model has not, and data=kernel without its needs.

    Args:
        settings: as the command line gave them.

    Raises:
        Failure: USAGE; the message says what goes instead.
    """
    if settings.engine == "uring" and not (settings.model == "second" and settings.inline):
        text = "--engine uring is beneath the second model only, with -o inline=auto"
        raise Failure(ExitCode.USAGE, text)
    if settings.listen and settings.session == "pyfuse3":
        text = "--listen takes the native session: leave --session pyfuse3 out"
        raise Failure(ExitCode.USAGE, text)
    if settings.handover == "role" and not settings.may_lead:
        text = (
            "-o handover=role is for the second model on the native session, without io_uring "
            "and --listen and with -o inline=auto"
        )
        raise Failure(ExitCode.USAGE, text)
    if settings.data == "kernel" and settings.session == "pyfuse3":
        text = "-o data=kernel takes the native session: leave --session pyfuse3 out"
        raise Failure(ExitCode.USAGE, text)
    if settings.data == "kernel" and settings.noatime:
        text = "-o noatime takes -o data=daemon: the kernel's reads move the source's access times"
        raise Failure(ExitCode.USAGE, text)
