"""Clients of other users than the one who mounted: who they are, and how they are started."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ninefuse.bench import Processes, dd

FIRST = 54321  # uid and gid of the first of the other users
MOST = 1000

_PROGRAM = "setpriv"
_LIMIT = 10.0  # how long a look at a directory may take, in seconds


class Unsupported(Exception):
    """The row cannot do the workload. The message says why."""


@dataclass(frozen=True, slots=True)
class Users:
    """The users as which clients come, in turn. number: how many, 0 for the one who mounted."""

    number: int = 0

    def __bool__(self) -> bool:
        return self.number > 0

    def of(self, client: int) -> int:
        """Return the uid and gid of a client, the first being 0."""
        return FIRST + client % self.number

    def start(self, client: int) -> tuple[str, ...]:
        """Return the words that begin a client's command."""
        if not self.number:
            return ()
        user = self.of(client)
        return (_PROGRAM, f"--reuid={user}", f"--regid={user}", "--clear-groups", "--")

    def give(self, prefix: Path, client: int) -> None:
        """Give a client what was made for it in the source: all whose path begins so."""
        for path in prefix.parent.glob(f"{prefix.name}*") if self.number else ():
            os.chown(path, self.of(client), self.of(client))

    def open(self, processes: Processes, place: dd.Place) -> None:
        """Open a place's directory to the users, if they are others.

        Raises Unsupported when they cannot be had, or do not get there.
        """
        if not self.number:
            return
        if os.geteuid() != 0:
            raise Unsupported("only root can have clients of another user")
        if shutil.which(_PROGRAM) is None:
            raise Unsupported(f"no {_PROGRAM} in PATH")
        if place.backing is not None:
            place.backing.chmod(0o777)
        look = [*self.start(0), "test", "-x", str(place.directory)]
        if processes.run(look, _LIMIT, check=False).returncode != 0:
            raise Unsupported("other users do not get there")
