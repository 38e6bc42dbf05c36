"""mount.ninefuse: what mount(8) runs for `mount -t ninefuse`.

The calling convention is mount(8)'s ("EXTERNAL HELPERS"), where -f and -s mean other things than
to the ninefuse command, and so are the exit codes.

Locks touched: none.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from ninefuse.command import cli, options, preflight
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.linux import syscalls

# mount(8)'s exit codes, from its section EXIT STATUS.
_EX_OK, _EX_USAGE, _EX_SOFTWARE, _EX_USER, _EX_FAIL = 0, 1, 4, 8, 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the helper and return an exit code of mount(8).

    Argument: argv, the words after the command's name; None takes sys.argv's.
    """
    words = sys.argv[1:] if argv is None else argv
    # Whoever runs mount(8) may be a service: what that one tells of itself is its own matter.
    os.environ.pop("NOTIFY_SOCKET", None)
    code = cli.guarded(lambda: _mount(words))
    if code > 128:
        return _EX_USER
    known = {
        ExitCode.OK: _EX_OK,
        ExitCode.USAGE: _EX_USAGE,
        ExitCode.ALLOW_OTHER_DENIED: _EX_USAGE,  # "incorrect invocation or permissions"
        ExitCode.INTERNAL: _EX_SOFTWARE,
    }
    return known.get(ExitCode(code), _EX_FAIL)


def _mount(words: Sequence[str]) -> int:
    given = _parser().parse_args(words)
    parsed = options.parse_options(given.options, sloppy=given.sloppy)
    # The paths are absolute in here: in another namespace the working directory is "/".
    settings = options.make_settings(given.source, given.mountpoint, parsed)
    if given.verbose:
        for word in parsed.ignored:
            print(f"mount.ninefuse: unknown option {shlex.quote(word)} ignored", flush=True)
    if given.namespace is not None:
        _enter(given.namespace)
    if given.fake:
        if settings.remount is None:
            preflight.check(settings)
        return ExitCode.OK
    code = cli.mount(settings)
    if code == ExitCode.OK and given.verbose:
        source, mountpoint = map(shlex.quote, (settings.source, settings.mountpoint))
        if settings.remount is None:
            print(f"mount.ninefuse: {source} mounted on {mountpoint}, model {settings.model}")
        else:
            print(f"mount.ninefuse: {mountpoint} remounted")
    return code


def _enter(path: str) -> None:
    """Change to the mount namespace that the path stands for.

    Raises:
        Failure: it cannot be entered.
    """
    # While their files can still be found: the interpreter need not be there.
    cli.load()
    try:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.enter_mount_namespace(namespace)
        finally:
            os.close(namespace)
    except OSError as error:
        text = f"namespace {path} cannot be entered ({error.strerror})"
        raise Failure(ExitCode.USAGE, f"{text}: give one that is there, as root") from None


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="mount.ninefuse",
        description="Mount the directory SRC on the directory MNT, for mount(8).",
        epilog="What may follow -o is what ninefuse takes.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("mountpoint", metavar="MNT")
    add = parser.add_argument
    add("-s", dest="sloppy", action="store_true", help="let unknown options pass")
    add("-f", dest="fake", action="store_true", help="do everything but the mount")
    add("-n", action="store_true", help="nothing: there is no /etc/mtab to be written")
    add("-v", dest="verbose", action="store_true", help="say what is done, and what is ignored")
    add("-N", dest="namespace", metavar="FILE", help="mount in this mount namespace")
    add("-o", dest="options", metavar="OPT,...", action="append", default=[], help="options")
    add("-t", metavar="TYPE", help="ignored: it is the type by which mount(8) has found us")
    return parser


if __name__ == "__main__":
    sys.exit(main())
