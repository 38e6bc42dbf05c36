"""The ninefuse-serve command: a directory served over sockets, by 9P2000.L.

Its options are those of the ninefuse command that mean something without a mount, and a few of its
own; servermanual.py has what they say of themselves.

Locks touched: none.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ninefuse.command import cli, options, preflight, servermanual
from ninefuse.command.together import check
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.settings import DEFAULT_LOG_LEVEL, ENGINES, LOG_LEVELS, MODELS, Settings

_EXAMPLES = """\
examples:
  ninefuse-serve /data
  ninefuse-serve -f --listen tcp:5640 /data
  mount -t 9p -o trans=tcp,port=5640,version=9p2000.L 127.0.0.1 /mnt/data
"""

# Of the mount options those that say something of the source, or of how it is served.
_SHARED = (
    *("ro", "rw", "sync", "async", "dirsync", "atime", "noatime", "diratime", "nodiratime"),
    *("xdev", "debug", "model", "threads", "engine", "inline", "cpus"),
)
_OWN = (
    *("root_squash", "no_root_squash"),
    *("max_connections", "max_fids", "max_requests", "max_bytes"),
)
_PROGRAM = "ninefuse-serve"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (ExitCode).

    Argument: argv, the words after the command's name; None takes sys.argv's.
    """
    words = sys.argv[1:] if argv is None else argv
    return cli.guarded(lambda: serve(parse(words)), program=_PROGRAM)


def parse(argv: Sequence[str]) -> Settings:
    """Return the settings that the command line asks for.

    Raises Failure(USAGE), and SystemExit once help or versions are printed.
    """
    given = make_parser().parse_args(argv)
    paths = {"SRC": given.source, "--log FILE": given.log, "--trace FILE": given.trace}
    options.check_paths(paths)
    for word in (word for text in given.options for word in options.split_words(text)):
        if word.partition("=")[0] not in (*_SHARED, *_OWN, *options.IGNORED):
            raise Failure(ExitCode.USAGE, f"unknown option -o {word}")
    fields = options.parse_options(given.options).fields(
        model=given.model,
        engine=given.engine,
        threads=given.threads,
        debug=given.debug or None,
    )
    settings = Settings(
        source=os.path.abspath(given.source),
        mountpoint="",
        foreground=given.foreground or fields.get("debug", False),
        log_file=None if given.log is None else os.path.abspath(given.log),
        log_level=given.log_level,
        trace_file=None if given.trace is None else os.path.abspath(given.trace),
        listen=tuple(given.listen),
        **fields,
    )
    check(settings)
    return settings


def serve(settings: Settings) -> int:
    """Check and serve: here in the foreground, otherwise as a daemon that is left behind.

    Returns the exit code. Raises Failure.
    """
    preflight.check_source(settings.source)
    return cli.run(settings, _load(), _PROGRAM)


def known_words() -> list[str]:
    """Return what may stand after -o, one `name`, `name=` or `name=value` each."""
    known = (*_SHARED, *_OWN)
    return [word for option in options.OPTIONS if option.name in known for word in option.words()]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [options] SRC",
        description="Serve the directory SRC over sockets, by the protocol 9P2000.L.",
        epilog=_EXAMPLES,
        formatter_class=cli.Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("source", metavar="SRC", help=argparse.SUPPRESS)

    def add(*names: str, **how: Any) -> None:
        parser.add_argument(*names, help=servermanual.brief(names[0]), **how)

    add("--listen", metavar="ADDRESS", action="append", default=[])
    add("-o", dest="options", metavar="OPT,...", action="append", default=[])
    add("-f", dest="foreground", action="store_true")
    add("-d", dest="debug", action="store_true")
    add("--model", type=options.parse_model, metavar="|".join(MODELS))
    add("--engine", choices=ENGINES, metavar="|".join(ENGINES))
    add("--threads", type=cli.threads, metavar="N")
    add("--log", metavar="FILE")
    add("--log-level", choices=LOG_LEVELS, default=DEFAULT_LOG_LEVEL, metavar="LEVEL")
    add("--trace", metavar="FILE")
    add("--help-options", action=cli.PrintAction, nargs=0, const=servermanual.explanation)
    add("-V", "--version", action=cli.PrintAction, nargs=0, const=cli.versions)
    return parser


def _load() -> Callable[[Settings, Callable[[], None]], int]:
    """Import the server and return its serve; Failure if that cannot be."""
    try:
        from ninefuse import export  # late, so that help and usage errors work without trio
    except ImportError as error:
        raise Failure(ExitCode.INTERNAL, f"{error}: install trio for {sys.executable}") from error

    return export.serve


if __name__ == "__main__":
    sys.exit(main())
