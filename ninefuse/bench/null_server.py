"""A server that answers every request from memory: the floor under any other. A program.

    python -m ninefuse.bench.null_server [--session pyfuse3|native] MNT

Nothing needs to be made in it: null_tree.py says which files it has. Both sessions answer from
the same tree, so that what differs is what the session costs. Timeouts and the answer to an
O_SYNC open are ninefuse's. Of ninefuse itself the native one has the session's loop and the
decoder; pyfuse3's has nothing of it.
"""

from __future__ import annotations

import argparse
import sys

SESSIONS = ("pyfuse3", "native")


def main() -> int:
    """Serve until unmounted. Returns 0; ends with 2 if the command line is wrong."""
    parser = argparse.ArgumentParser(prog="python -m ninefuse.bench.null_server")
    parser.add_argument("--session", choices=SESSIONS, default=SESSIONS[0])
    parser.add_argument("mountpoint", metavar="MNT")
    given = parser.parse_args()
    # Only the one that is used: the other's memory and imports are not to be measured.
    if given.session == "native":
        from ninefuse.bench.null_native import serve
    else:
        from ninefuse.bench.null_pyfuse3 import serve
    serve(given.mountpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
