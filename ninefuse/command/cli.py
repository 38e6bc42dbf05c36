"""The ninefuse command: arguments, checks, and the hand-over to the mount.

Locks touched: none.
"""

import argparse
import ctypes
import functools
import importlib.util
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ninefuse
from ninefuse.command import manual, options, preflight
from ninefuse.exitcodes import ExitCode, Failure, report
from ninefuse.fuse import remount
from ninefuse.process import daemon, logs, notify
from ninefuse.settings import DEFAULT_LOG_LEVEL, ENGINES, LOG_LEVELS, MODELS, SESSIONS, Settings

log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  ninefuse /data /mnt/data
  dd if=/dev/zero of=/mnt/data/file bs=4k count=1000 oflag=sync
  fusermount3 -u /mnt/data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (ExitCode).

    Argument: argv, the words after the command's name; None takes sys.argv's.
    """
    words = sys.argv[1:] if argv is None else argv
    return guarded(lambda: mount(parse(words)))


def guarded(command: Callable[[], int], program: str = "ninefuse") -> int:
    """Run a command to its end; whatever that is, it makes one exit code, and one line.

    Arguments: command, which returns an exit code; program, its name.
    """
    daemon.open_standard_streams()
    try:
        return command()
    except Failure as failure:
        if failure.code == ExitCode.USAGE:
            failure = Failure(failure.code, f"{failure.message} (see {program} --help)")
        return report(failure, program)
    except SystemExit as end:
        # So argparse ends --help and --version.
        return end.code if isinstance(end.code, int) else ExitCode.OK
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        log.exception("unexpected error")
        logs.finish()
        return report(
            Failure(ExitCode.INTERNAL, f"internal error: {type(error).__name__}: {error}"), program
        )


def parse(argv: Sequence[str]) -> Settings:
    """Return the settings that the command line asks for.

    Raises Failure(USAGE), and SystemExit once help, options or versions are printed.
    """
    given = make_parser().parse_args(argv)
    return options.make_settings(
        given.source,
        given.mountpoint,
        options.parse_options(given.options),
        model=given.model,
        engine=given.engine,
        session=given.session,
        threads=given.threads,
        foreground=given.foreground,
        debug=given.debug,
        log_file=given.log,
        log_level=given.log_level,
        trace_file=given.trace,
        listen=given.listen,
    )


def mount(settings: Settings) -> int:
    """Check, mount, and serve: here in the foreground, otherwise as a daemon that is left behind.

    Or have a mount that is there changed (mount(8), -o remount).

    Returns the exit code. Raises Failure.
    """
    if settings.remount is not None:
        remount.change(settings.source, settings.mountpoint, settings.remount)
        return ExitCode.OK
    return run(preflight.check(settings), load())


def run(
    settings: Settings,
    server: Callable[[Settings, Callable[[], None]], int],
    program: str = "ninefuse",
) -> int:
    """Serve: here in the foreground, otherwise as a daemon that is left behind.

    Arguments: settings, as preflight has checked them; server, which calls what it is given once
    clients are served, and returns an exit code; program, the command's name.

    Returns the exit code. Raises Failure.
    """

    def serve_detached(ready: Callable[[], None]) -> int:
        # In the child: the log's sockets and threads' locks are its own from the start.
        logs.configure(settings, daemon=True)
        return server(settings, ready)

    if settings.foreground:
        logs.configure(settings, daemon=False)
        # Of those who started us only a service manager waits until clients are served.
        return server(settings, lambda: notify.notify("READY=1"))
    notify.leave_it_to_our_starter()
    return daemon.run_detached(serve_detached, program)


def load() -> Callable[[Settings, Callable[[], None]], int]:
    """Import the mount and return its serve; Failure if that cannot be."""
    try:
        # Late, so that help, usage errors and the checks work, and fast, without pyfuse3.
        from ninefuse import serve
    except ImportError as error:
        raise Failure(
            ExitCode.INTERNAL, f"{error}: install pyfuse3 and trio for {sys.executable}"
        ) from error

    return serve.serve


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise a Failure: main prints its one line, where argparse would print the usage too."""
        raise Failure(ExitCode.USAGE, message)


# Room for the longest option beside its text: all fits a screen of 24 lines.
Formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)


class PrintAction(argparse.Action):
    """An option that prints what its constant returns."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print what the constant returns and end, before argparse misses the paths."""
        try:
            print(self.const(), flush=True)
        except OSError as error:
            # A full disk, or a reader that has gone: no case for a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
            raise Failure(ExitCode.INTERNAL, f"cannot print: {error.strerror}") from None
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="ninefuse",
        # What it does, on the same line: all is to fit a screen.
        usage="ninefuse [options] SRC MNT  (mounts directory SRC on directory MNT)",
        epilog=_EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    # Not in the list: whoever reads that has found it.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("source", metavar="SRC", help=argparse.SUPPRESS)
    parser.add_argument("mountpoint", metavar="MNT", help=argparse.SUPPRESS)

    def add(*names: str, **how: Any) -> None:
        parser.add_argument(*names, help=manual.brief(names[0]), **how)

    add("-o", dest="options", metavar="OPT,...", action="append", default=[])
    add("-f", dest="foreground", action="store_true")
    add("-d", dest="debug", action="store_true")
    add("-s", dest="model", action="store_const", const="none")
    add("--model", type=options.parse_model, metavar="|".join(MODELS))
    add("--engine", choices=ENGINES, metavar="|".join(ENGINES))
    add("--session", choices=SESSIONS, metavar="|".join(SESSIONS))
    add("--threads", type=threads, metavar="N")
    add("--listen", metavar="ADDRESS", action="append", default=[])
    add("--log", metavar="FILE")
    add(
        "--log-level",
        choices=LOG_LEVELS,
        default=DEFAULT_LOG_LEVEL,
        metavar="LEVEL",
    )
    add("--trace", metavar="FILE")
    add("--help-options", action=PrintAction, nargs=0, const=manual.explanation)
    add("-V", "--version", action=PrintAction, nargs=0, const=versions)
    return parser


def threads(text: str) -> int:
    """Return what --threads says; raises Failure."""
    return options.parse_threads(text, f"--threads {text}")


# setup.py has what each is for.
COMPILED = (
    *("fuse._message", "fuse._wire", "fuse._plain", "fuse._ahead", "fuse._role"),
    *("linux._rights", "linux._statx", "linux._transfer", "tree._known"),
    "driving._ring",
)


def versions() -> str:
    """Return the versions of all that matters for a bug report, one a line."""
    return "\n".join(
        (
            f"ninefuse {getattr(ninefuse, '__version__', 'unknown')}",
            f"pyfuse3 {_module_version('pyfuse3')}",
            f"libfuse {_libfuse_version()}",
            f"Python {platform.python_version()}",
            f"trio {_module_version('trio')}",
            f"kernel {os.uname().release}",
            f"compiled {compiled()}",
        )
    )


def compiled() -> str:
    """The modules that were compiled, of those that are: what lacks does not do, or is slower."""
    built = [name for name in COMPILED if importlib.util.find_spec(f"ninefuse.{name}")]
    return " ".join(built) or "nothing"


def _module_version(name: str) -> str:
    import importlib.metadata  # a third of the time that all imports here take

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _libfuse_version() -> str:
    try:
        import pyfuse3

        # Looked up through pyfuse3's own module, the dynamic linker finds it in the very libfuse
        # that pyfuse3 runs on, whatever that file is called (libfuse3.so.3, .so.4).
        pkgversion = ctypes.CDLL(pyfuse3.__file__).fuse_pkgversion
    except (ImportError, OSError, AttributeError):
        return "unknown"
    pkgversion.restype = ctypes.c_char_p
    version: bytes = pkgversion()
    return version.decode("ascii", "replace")


if __name__ == "__main__":
    sys.exit(main())
