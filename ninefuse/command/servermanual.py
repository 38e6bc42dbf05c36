"""What each option of the ninefuse-serve command says of itself, as manual.py has it of ninefuse.

Those that both have say the same, from the same text.

Locks touched: none.
"""

from ninefuse.command import manual
from ninefuse.command.manual import Text

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
        "xdev",
        "hide what is mounted in the source, and show what it covers",
        "; as root. By default file systems in the source are part of the export",
    ),
    *manual.CLIENTS,
    *(one for one in manual.MOUNT if one.words.split("=")[0] in ("inline", "cpus")),
    Text("debug, model=, threads=, engine=", "as above"),
)


def brief(words: str) -> str:
    """Return the first part of what an option of the command line says, in plain text."""
    return manual.brief(words, COMMAND_LINE)


def explanation() -> str:
    """Return what --help-options prints."""
    return manual.explanation(COMMAND_LINE, SERVER)
