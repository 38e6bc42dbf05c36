"""What somebody may have put where a file is to be made."""

from __future__ import annotations

import os
from pathlib import Path


def put_symlink(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def put_hard_link(path: Path, victim: Path) -> None:
    os.link(victim, path)


def put_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def put_their_own(path: Path, victim: Path) -> None:
    path.touch()
    os.chown(path, 65534, 65534)
