"""What each option of the ninefuse command says of itself.

Each text stands here once. `--help` shows its first part, `--help-options` the whole; the manual
page and docs/options.md are made of it by tools/pages.py (`make pages`). It is Markdown, with code
in backticks and links as they are in docs/.

Locks touched: none.
"""

import re
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from ninefuse.command.options import IGNORED, MAX_THREADS
from ninefuse.settings import (
    DEFAULT_BYTES,
    DEFAULT_CONNECTIONS,
    DEFAULT_FIDS,
    DEFAULT_MAX_INODES,
    DEFAULT_REQUESTS,
    DEFAULT_THREADS,
)


class Text(NamedTuple):
    """What one option says, or several together.

    words: the options as one writes them, of -o without it. brief: the line of --help. more: what
    follows that.
    """

    words: str
    brief: str
    more: str = ""

    def text(self) -> str:
        """Return all that is to be said of it."""
        return self.brief + self.more


COMMAND_LINE = (
    Text("-o OPT,...", "mount options: ro, allow_other, ...", "; as often as you like"),
    Text("-f", "stay in the foreground"),
    Text("-d", "stay in the foreground, with debug messages"),
    Text("-s", "same as --model none", ", under which one caller can keep all others waiting"),
    Text(
        "--model none|first|second",
        "[threading model](models.md) (second)",
        "; `package.module:Class` is [one of your own](new-model.md)",
    ),
    Text(
        "--engine auto|threads|uring",
        "what makes calls beneath the model (auto)",
        ", if the second model hands over requests. `auto`: [io_uring](models.md#io_uring) if "
        "there is one, but not with `inline=off`. `threads`: workers only. `uring`: io_uring, or "
        "an error if there is none",
    ),
    Text(
        "--session auto|native|pyfuse3",
        "who speaks with the kernel (auto)",
        ". `auto`: `native`, or `pyfuse3` if that was not built, "
        "which can do [less](mounting.md#the-session-of-pyfuse3)",
    ),
    Text(
        "--threads N",
        f"workers ({DEFAULT_THREADS})",
        f", to begin with: more are started if all are stuck; from 1 to {MAX_THREADS}",
    ),
    Text(
        "--listen ADDRESS",
        "serve sockets, too: unix:PATH, tcp:[HOST:]PORT",
        ", vsock:PORT or fd:N, by [9P2000.L](serve.md#beside-a-mount); as often as you like",
    ),
    Text(
        "--log FILE",
        "log to FILE; a daemon otherwise logs to syslog",
        ", if there is one, and `-f` to stderr",
    ),
    Text("--log-level LEVEL", "error, warning, info (default) or debug"),
    Text(
        "--trace FILE",
        "write the way of requests to FILE",
        ", for [Perfetto](observing.md#traces)",
    ),
    Text("--help-options", "explain all options, those of -o too"),
    Text("-V, --version", "print versions, and what is compiled"),
)

# Of clients at sockets.
CLIENTS = (
    Text(
        "root_squash, no_root_squash",
        "whether root of a client at a socket acts as nobody (default) or as root",
        ", if root runs ninefuse",
    ),
    Text(
        "max_connections=",
        f"clients at sockets at a time ({DEFAULT_CONNECTIONS})",
        "; others are told EUSERS. 0, here and below: no limit",
    ),
    Text("max_fids=", f"fids of such a client ({DEFAULT_FIDS:,})", "; more are refused (EMFILE)"),
    Text(
        "max_requests=",
        f"requests of such a client under way ({DEFAULT_REQUESTS:,})",
        "; at the limit the daemon reads no further from the client until one has ended",
    ),
    Text(
        "max_bytes=",
        f"bytes of its requests and answers ({DEFAULT_BYTES >> 20} MiB)",
        "; at the limit likewise. As many again of extended attributes; more are refused (ENOMEM)",
    ),
)

MOUNT = (
    Text(
        "ro, rw, dev, nodev, suid, nosuid, exec, noexec, sync, async, dirsync, atime, noatime, "
        "diratime, nodiratime",
        "as in mount(8), but `nodev` and `nosuid` unless told otherwise",
        ". What the source's own mount forbids stays forbidden",
    ),
    Text(
        "allow_other",
        "let other users in",
        "; needs `user_allow_other` in /etc/fuse.conf unless root mounts",
    ),
    Text(
        "acl",
        "have the kernel evaluate POSIX ACLs",
        "; on with allow_other unless `noxattr`",
    ),
    Text(
        "xdev",
        "hide what is mounted in the source, and show what it covers",
        "; as root. By default file systems in the source are part of the mount",
    ),
    Text(
        "cache=none|auto|loose",
        "[what the kernel may remember](caching.md)",
        ". `none`: nothing. `auto` (default): for 1 second. `loose`: for a day, for exclusive use "
        "of the source. v9fs's names are taken too: `readahead` and `mmap` for `auto`, `fscache` "
        "for `loose`",
    ),
    Text("attr_timeout=, entry_timeout=, negative_timeout=", "seconds, each for itself"),
    Text(
        "noxattr",
        "no extended attributes, and no questions for them",
        ": faster",
    ),
    Text(
        "osync=direct|cached",
        "writes of O_SYNC and O_DSYNC opens",
        ". `direct` (default): one durable write past the page cache. `cached` (default with "
        "`cache=none`): a cached write and an fsync, for programs that map such a file shared "
        "before Linux 6.6, or with `--session pyfuse3`",
    ),
    Text(
        "data=daemon|kernel",
        "[who reads and writes files](operations.md#files-that-the-kernel-reads-and-writes)",
        ". `daemon` is the default. `kernel`: the kernel reads, writes and maps the source's files "
        "itself, and asks the daemon for names and attributes alone; as root, from Linux 6.9 on, "
        "not with noatime",
    ),
    Text(
        "inline=auto|off",
        "whether the dispatcher makes calls itself",
        " that [wait for nobody](models.md#until-it-would-block), under the second model. `auto` "
        "(default): it does. `off`: workers make all calls",
    ),
    Text(
        "handover=auto|role|request",
        "what changes threads under the second model (auto)",
        ". `role`: the [role](models.md#leader-and-followers) of the dispatcher. `request`: the "
        "request, as in 2010. `auto`: the role if the native session serves, but the request "
        "with `--engine uring`, `--listen` or `inline=off`",
    ),
    Text(
        "cpus=one|all",
        "keep the daemon's threads on one processor",
        ", or on all. `one` is the default if requests are handed to workers, where it is faster",
    ),
    Text(
        "max_inodes=",
        f"how many files the kernel may know ({DEFAULT_MAX_INODES:,})",
        " before it is asked to forget those long unused, from Linux 6.18 on. Each takes some 340 "
        "bytes in the daemon, and more in the kernel. 0: no limit",
    ),
    *CLIENTS,
    Text("fsname=, subtype=, auto_unmount", "as in mount.fuse3(8)"),
    Text("debug, default_permissions", "the first as `-d`; the second is on anyway"),
    Text(
        "model=, threads=, engine=, session=",
        "as above, for /etc/fstab",
        ": `/src /mnt fuse.ninefuse model=first,nofail 0 0`, with `ninefuse` in /usr/local/bin",
    ),
)

ACCEPTED = (
    "Options of /etc/fstab for other programs are accepted, and mean nothing to the file system: "
    f"{', '.join(sorted(filter(None, IGNORED)))}, and all that begins with x-, X-, comment= or "
    "user=."
)


def brief(words: str, command_line: Iterable[Text] = COMMAND_LINE) -> str:
    """Return the first part of what an option of the command line says, in plain text.

    Arguments: words, as they begin there; only one may begin so; command_line: all options.
    """
    (option,) = (one for one in command_line if one.words.split(" ")[0].rstrip(",") == words)
    return plain(option.brief)


def plain(text: str) -> str:
    """Return a text without its marks: code and links as what they show."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "")


def explanation(command_line: Iterable[Text] = COMMAND_LINE, mount: Iterable[Text] = MOUNT) -> str:
    """Return what --help-options prints, of options of the command line and those after -o."""
    lines = []
    for prefix, options in (("", command_line), ("-o ", mount)):
        for option in options:
            lines += textwrap.wrap(prefix + option.words, 78, subsequent_indent="   ")
            lines += _indented(plain(option.text()))
    return "\n".join([*lines, *textwrap.wrap(ACCEPTED, 78)])


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 78, initial_indent=" " * 8, subsequent_indent=" " * 8)
