"""What operations answer with: an OSError of an errno. A leaf, for every module. No lock."""

from __future__ import annotations

import os


def error(code: int) -> OSError:
    """An OSError of this errno, with its usual text (and Python's class for it)."""
    return OSError(code, os.strerror(code))
