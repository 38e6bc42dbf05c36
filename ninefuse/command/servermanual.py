"""What each option of the ninefuse-serve command says of itself, as manual.py has it of ninefuse.

Those that both have say the same, from the same text.

Locks touched: none.
"""

from ninefuse.command import manual
from ninefuse.command.manual import Text
from ninefuse.settings import (
    DEFAULT_BYTES,
    DEFAULT_CONNECTIONS,
    DEFAULT_FIDS,
    DEFAULT_REQUESTS,
)

_LISTEN = Text(
    "--listen ADDRESS",
    "unix:PATH, tcp:[HOST:]PORT, vsock:PORT or fd:N",
    "; as often as you like. By default the sockets that a service manager has handed over, or a "
    "Unix socket in $XDG_RUNTIME_DIR. `tcp:PORT` is for this machine alone; "
    "[who may do what](serve.md#who-may-do-what)",
)
_OPTIONS = Text("-o OPT,...", "options: ro, no_root_squash, ...", "; as often as you like")
_SHARED = (
    *("-f", "-d", "--model", "--engine", "--threads", "--log", "--log-level", "--trace"),
    *("--help-options", "-V,"),
)
COMMAND_LINE = (
    _LISTEN,
    _OPTIONS,
    *(one for one in manual.COMMAND_LINE if one.words.split(" ")[0] in _SHARED),
)
SERVER = (
    Text("ro, rw, sync, async, dirsync, atime, noatime, diratime, nodiratime", "as in mount(8)"),
    Text(
        "root_squash, no_root_squash",
        "whether a client's root acts as nobody (default) or as root",
        ", where the server is root's",
    ),
    Text(
        "xdev",
        "hide what is mounted in the source, and show what it covers",
        "; as root. By default file systems in the source are part of the export",
    ),
    Text(
        "max_connections=",
        f"clients at a time ({DEFAULT_CONNECTIONS})",
        "; others are told EUSERS. 0, here and below: no limit",
    ),
    Text("max_fids=", f"fids of one client ({DEFAULT_FIDS:,})", "; more are refused with EMFILE"),
    Text(
        "max_requests=",
        f"requests of one client under way ({DEFAULT_REQUESTS:,})",
        "; at that it is read from no further until one has ended",
    ),
    Text(
        "max_bytes=",
        f"bytes of one client's requests and answers ({DEFAULT_BYTES >> 20} MiB)",
        "; at that, likewise",
    ),
    *(one for one in manual.MOUNT if one.words.split("=")[0] in ("inline", "cpus")),
    Text("debug, model=, threads=, engine=", "as above"),
)


def brief(words: str) -> str:
    """Return the first part of what an option of the command line says, in plain text."""
    return manual.brief(words, COMMAND_LINE)


def explanation() -> str:
    """Return what --help-options prints."""
    return manual.explanation(COMMAND_LINE, SERVER)
