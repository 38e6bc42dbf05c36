"""What the user asked for: the -o options, one table, and the settings that are made of them.

An option is a row of OPTIONS here, a field of Settings, and a text in manual.py; parser, help,
manual page and completions follow from these. The names are those of mount(8), mount.fuse3(8)
and, for cache=, v9fs.

Locks touched: none.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from ninefuse.command.together import check
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.settings import (
    DATA,
    DEFAULT_LOG_LEVEL,
    DEFAULT_TIMEOUT,
    ENGINES,
    HANDOVERS,
    MODELS,
    SESSIONS,
    Settings,
)

_PLUG_IN = re.compile(r"\w+(\.\w+)*:\w+")  # a driver of the user's own, package.module:Class
MAX_THREADS = 1024


# ---- the table ------------------------------------------------------------------------------


class Kind(Enum):
    """How an option is written, and what may stand behind its name."""

    FLAG = "a word, for the kernel; of the words of one group the last one given counts"
    SWITCH = "a word"
    CHOICE = "name=value, of a few"
    NUMBER = "name=, a whole number"
    SECONDS = "name=, a number of seconds"
    TEXT = "name=, any text but none"


@dataclass(frozen=True, slots=True)
class Option:
    """One -o option.

    name: as it is written, without the =. kind: of its value. sets: a field of Settings; None: it
    sets none. value: of a flag or switch, what the field becomes. values: of a choice, what the
    field becomes for each word; where sets is None, a dict of fields, each of which another option
    may set instead. parse: of a number, returns what the field becomes; its
    arguments are the value and the option as it was written, it raises Failure(USAGE).
    group: of a flag. for_libfuse: whether libfuse hears of it.
    """

    name: str
    kind: Kind
    sets: str | None = None
    value: Any = True
    values: Mapping[str, Any] = field(default_factory=dict)
    parse: Callable[[str, str], Any] | None = None
    group: str = ""
    for_libfuse: bool = False

    def words(self) -> list[str]:
        """What may stand after -o: ``name``, ``name=``, or a ``name=value`` for each value."""
        if self.kind in (Kind.FLAG, Kind.SWITCH):
            return [self.name]
        return [f"{self.name}={value}" for value in self.values or ("",)]

    def read(self, word: str) -> Any:
        """What an option that was given is to set.

        Argument: word, the option as it was written.
        Raises Failure(USAGE) that names the option when its value is bad.
        """
        text = word.partition("=")[2]
        if self.kind is Kind.CHOICE:
            if text not in self.values:
                choices = ", ".join(self.values)
                raise Failure(ExitCode.USAGE, f"option -o {word}: choose one of {choices}")
            return self.values[text]
        if self.kind is Kind.TEXT and not text:
            raise Failure(ExitCode.USAGE, f"option -o {self.name}= needs a value")
        if self.kind is Kind.SECONDS:
            return _seconds(text, word)
        if self.parse is not None:
            return self.parse(text, word)
        return text if self.kind is Kind.TEXT else self.value


def parse_threads(text: str, where: str) -> int:
    """Return the number of worker threads that text gives.

    Arguments: text, a whole number from 1 to MAX_THREADS; where, the option as the user wrote
    it, for the message. Raises Failure(USAGE).
    """
    # Checked as text first: int() would take "1_6", " 16" and digits of other scripts too.
    if text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MAX_THREADS:
        return int(text)
    raise Failure(ExitCode.USAGE, f"{where}: the number of threads is 1 to {MAX_THREADS}")


def _workers(text: str, word: str) -> int:
    return parse_threads(text, f"option -o {word}")


def _whole(text: str, word: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise Failure(ExitCode.USAGE, f"option -o {word}: give a whole number, 0 for no limit")
    return int(text)


def _limit(text: str, word: str) -> int:
    return _whole(text, word) or sys.maxsize


def _seconds(text: str, word: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise Failure(
            ExitCode.USAGE, f"option -o {word}: give a number of seconds, zero or greater"
        )
    return seconds


def _flag(name: str, group: str, sets: str | None = None, *, for_libfuse: bool = True) -> Option:
    return Option(name, Kind.FLAG, sets, group=group, for_libfuse=for_libfuse)


def _cached(seconds: float, *, keep_cache: bool = False, direct_sync: bool = True) -> Any:
    """What a kind of cache sets. seconds: how long the kernel may believe names and attributes."""
    times = dict.fromkeys(("attr_timeout", "entry_timeout", "negative_timeout"), seconds)
    return {**times, "keep_cache": keep_cache, "direct_sync": direct_sync}


# cache=none is for those who want the kernel's ordinary way with everything.
_NO_CACHE, _CACHE, _LOOSE = (
    _cached(0.0, direct_sync=False),
    _cached(DEFAULT_TIMEOUT),
    _cached(86400.0, keep_cache=True),
)

OPTIONS = (
    # Libfuse mounts nodev and nosuid for root too unless told otherwise (mo->flags in its
    # lib/mount.c), hence dev and suid are for it, while rw, exec, async and atime are what it does
    # anyway. nodiratime is not: libfuse 3.14 does not know the word, and the kernel never updates
    # access times on a FUSE mount by itself: the source's are moved by our own reads, or not
    # (Session.noatime).
    _flag("ro", "write", "read_only"),
    _flag("rw", "write", for_libfuse=False),
    _flag("dev", "dev"),
    _flag("nodev", "dev"),
    _flag("suid", "suid"),
    _flag("nosuid", "suid"),
    _flag("exec", "exec", for_libfuse=False),
    _flag("noexec", "exec"),
    _flag("sync", "sync", "sync"),
    _flag("async", "sync", for_libfuse=False),
    _flag("dirsync", "dirsync", "dirsync"),
    _flag("atime", "atime", for_libfuse=False),
    _flag("noatime", "atime", "noatime"),
    _flag("diratime", "diratime", for_libfuse=False),
    _flag("nodiratime", "diratime", "nodiratime", for_libfuse=False),
    Option("acl", Kind.SWITCH, "acl"),
    Option("allow_other", Kind.SWITCH, "allow_other", for_libfuse=True),
    Option("auto_unmount", Kind.SWITCH, for_libfuse=True),
    Option("debug", Kind.SWITCH, "debug"),
    Option("default_permissions", Kind.SWITCH),  # which every mount has
    Option("noxattr", Kind.SWITCH, "xattr", value=False),
    Option("xdev", Kind.SWITCH, "one_file_system"),
    Option("fsname", Kind.TEXT),
    Option("subtype", Kind.TEXT),
    Option("threads", Kind.NUMBER, "threads", parse=_workers),
    Option("max_inodes", Kind.NUMBER, "max_inodes", parse=_whole),
    Option("attr_timeout", Kind.SECONDS, "attr_timeout"),
    Option("entry_timeout", Kind.SECONDS, "entry_timeout"),
    Option("negative_timeout", Kind.SECONDS, "negative_timeout"),
    Option("model", Kind.CHOICE, "model", values={name: name for name in MODELS}),
    Option("engine", Kind.CHOICE, "engine", values={name: name for name in ENGINES}),
    Option("session", Kind.CHOICE, "session", values={name: name for name in SESSIONS}),
    Option("data", Kind.CHOICE, "data", values={name: name for name in DATA}),
    Option(
        "cache",
        Kind.CHOICE,
        values={
            "none": _NO_CACHE,
            "auto": _CACHE,
            "readahead": _CACHE,  # v9fs's names, from here on
            "mmap": _CACHE,
            "loose": _LOOSE,
            "fscache": _LOOSE,
        },
    ),
    # One durable write for each write(2) of an O_SYNC open, or a cached one and an fsync.
    Option("osync", Kind.CHOICE, "direct_sync", values={"direct": True, "cached": False}),
    # Whether the dispatcher makes calls itself that wait for nobody.
    Option("inline", Kind.CHOICE, "inline", values={"auto": True, "off": False}),
    # What changes threads: the dispatcher's role, or the request.
    Option("handover", Kind.CHOICE, "handover", values={name: name for name in HANDOVERS}),
    # Whether the daemon's threads share one processor.
    Option("cpus", Kind.CHOICE, "one_cpu", values={"one": True, "all": False}),
    # Of clients at sockets.
    Option("root_squash", Kind.SWITCH, "squashes"),
    Option("no_root_squash", Kind.SWITCH, "squashes", value=False),
    Option("max_connections", Kind.NUMBER, "max_connections", parse=_limit),
    Option("max_fids", Kind.NUMBER, "max_fids", parse=_limit),
    Option("max_requests", Kind.NUMBER, "max_requests", parse=_limit),
    Option("max_bytes", Kind.NUMBER, "max_bytes", parse=_limit),
)
_BY_NAME = {option.name: option for option in OPTIONS}

# Written in fstab for mount(8), systemd and the boot scripts, or left over from FUSE 2
# (nonempty): they say nothing to the file system.
IGNORED = frozenset(
    (
        *("", "defaults", "nofail", "user", "users", "nouser", "owner", "group", "auto", "noauto"),
        *("relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"),
        *("_netdev", "nonempty"),
    )
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=")

# Of the words that say when the kernel notes access times the last one wins. They matter to a
# remount alone.
_ACCESS_TIMES = ("atime", "noatime", "relatime", "norelatime", "strictatime", "nostrictatime")
# What the kernel shows of a mount, which mount(8) hands back when that is to be changed.
_SHOWN = ("user_id", "group_id", "rootmode", "fd", "max_read", "blksize")


# ---- the parser -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the -o options said.

    given: by name, what each option that was given is to set (Option.read); of the flags, those
    in force. ignored: words that mean nothing to us, which only a sloppy parse lets pass. remount:
    whether a mount that is there is to be changed. access_times: when that is to note them, a word
    of mount(8); None: not given.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    remount: bool = False
    access_times: str | None = None

    def flags(self) -> list[str]:
        """The kernel's flags in force, as words."""
        return [name for name in self.given if _BY_NAME[name].kind is Kind.FLAG]

    def fields(self, **flags: Any) -> dict[str, Any]:
        """The fields of Settings that the options set; what was not given is not among them.

        Argument: flags, what other words on the command line said of such fields, which wins
        over options. None: not given.
        """
        fields: dict[str, Any] = {}
        named: dict[str, Any] = {}
        for name, value in self.given.items():
            option = _BY_NAME[name]
            if option.sets is not None:
                named[option.sets] = value
            elif option.kind is Kind.CHOICE:
                fields |= value
        # What was given by its own name holds whether it comes before or after.
        said = {name: value for name, value in flags.items() if value is not None}
        return fields | named | said


def split_words(text: str) -> list[str]:
    r"""Split the argument of one -o at its commas.

    A backslash keeps a comma or a backslash after it as it is, as libfuse has it (fuse_opt.h).
    Before anything else a backslash is only itself.
    """
    words = [""]
    escaped = False
    for char in text:
        if escaped:
            words[-1] += char if char in ",\\" else "\\" + char
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == ",":
            words.append("")
        else:
            words[-1] += char
    if escaped:
        words[-1] += "\\"
    return words


def parse_options(words: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """Parse the arguments of all -o options, in the order given; later ones win.

    Arguments: words, one string `opt[,opt...]` for each -o; sloppy: unknown options are only
    noted (mount(8), -s).
    Raises Failure(USAGE) that names the option when it is unknown or has a bad value.
    """
    flags: dict[str, Option] = {}  # by group
    given: dict[str, Any] = {}
    ignored: list[str] = []
    access_times: str | None = None
    all_words = [word for text in words for word in split_words(text)]
    remount = "remount" in all_words
    for word in all_words:
        name, equals, _ = word.partition("=")
        option = _BY_NAME.get(name)
        if word in _ACCESS_TIMES:
            access_times = word
        if option is not None and not (equals and option.kind in (Kind.FLAG, Kind.SWITCH)):
            if option.kind is Kind.FLAG:
                flags[option.group] = option
            else:
                given[name] = option.read(word)
        elif _means_nothing(word) or word == "remount" or (remount and name in _SHOWN):
            pass
        elif sloppy:
            ignored.append(word)
        else:
            raise Failure(ExitCode.USAGE, f"unknown option -o {word}")

    if {"acl", "noxattr"} <= given.keys():
        raise Failure(ExitCode.USAGE, "-o acl needs what -o noxattr takes away: choose one")
    given |= {flag.name: flag.value for flag in flags.values()}
    return MountOptions(given, tuple(ignored), remount, access_times)


def _means_nothing(word: str) -> bool:
    return word in IGNORED or word.startswith(_IGNORED_PREFIXES)


def known_words() -> list[str]:
    """Return what may stand after -o, one `name`, `name=` or `name=value` each."""
    return [word for option in OPTIONS for word in option.words()]


def parse_model(text: str) -> str:
    """Return the threading model that --model names: one of MODELS, or MODULE:CLASS.

    Raises Failure(USAGE). Whether there is such a class is for executor.create to find out.
    """
    if text in MODELS or _PLUG_IN.fullmatch(text):
        return text
    choices = ", ".join(MODELS)
    raise Failure(
        ExitCode.USAGE, f"--model {text}: choose one of {choices}, or give MODULE:CLASS of your own"
    )


# ---- the settings ---------------------------------------------------------------------------


def make_settings(
    source: str,
    mountpoint: str,
    options: MountOptions,
    *,
    model: str | None = None,
    engine: str | None = None,
    session: str | None = None,
    threads: int | None = None,
    foreground: bool = False,
    debug: bool = False,
    log_file: str | None = None,
    log_level: str = DEFAULT_LOG_LEVEL,
    trace_file: str | None = None,
    listen: Iterable[str] = (),
) -> Settings:
    """Put the command line and the -o options together.

    Arguments: source, mountpoint, log_file, trace_file: paths, relative to the current directory
    or absolute; options, from parse_options; the rest as flags on the command line gave it (None:
    not given), which wins over options. debug on either side means foreground too, as it does
    for all FUSE commands (mount.fuse3(8)).
    Raises Failure(USAGE) when a path is empty, or some of it does not go together (together.py).
    """
    paths = {"SRC": source, "MNT": mountpoint, "--log FILE": log_file, "--trace FILE": trace_file}
    check_paths(paths)
    source = os.path.abspath(source)
    fields = options.fields(
        model=model, engine=engine, session=session, threads=threads, debug=debug or None
    )
    settings = Settings(
        source=source,
        mountpoint=os.path.abspath(mountpoint),
        foreground=foreground or fields.get("debug", False),
        log_file=None if log_file is None else os.path.abspath(log_file),
        log_level=log_level,
        trace_file=None if trace_file is None else os.path.abspath(trace_file),
        listen=tuple(listen),
        mount_options=_words_for_libfuse(source, options),
        remount=_words_to_change(options) if options.remount else None,
        **fields,
    )
    check(settings)
    # The group bits of a file with an ACL hold its mask: a kernel that looks at mode bits
    # alone would let people in whom the source keeps out.
    acl = settings.acl or (settings.allow_other and settings.xattr)
    return replace(settings, acl=acl)


def check_paths(paths: Mapping[str, str | None]) -> None:
    """Refuse empty ones.

    abspath would make the current directory of them: after a typo in a script's variable name that
    is never what was meant.

    Argument: paths, by what the command line calls them; None: not given.
    Raises Failure(USAGE).
    """
    for name, path in paths.items():
        if path == "":
            raise Failure(ExitCode.USAGE, f"{name} is empty: give a path")


def _words_to_change(options: MountOptions) -> tuple[str, ...]:
    words = [word for word in options.flags() if word not in _ACCESS_TIMES]
    return (*words, options.access_times) if options.access_times else tuple(words)


def _words_for_libfuse(source: str, options: MountOptions) -> tuple[str, ...]:
    """Return libfuse's share of the options. Their order has no meaning."""
    given = options.given
    # A comma or backslash in the subtype gets lost between libfuse and fusermount3, however
    # it is escaped (libfuse 3.14, for users other than root).
    subtype = _ascii(given.get("subtype", "ninefuse")).replace(",", "?").replace("\\", "?")
    fsname = _ascii(given.get("fsname", source)).replace("\\", "\\\\").replace(",", "\\,")
    # Without default_permissions a daemon of root with allow_other would let everybody in.
    words = ["default_permissions", f"subtype={subtype}", f"fsname={fsname}"]
    words += [name for name in given if _BY_NAME[name].for_libfuse]
    return tuple(words)


def _ascii(text: str) -> str:
    """Return text with ? for all but printable ASCII: pyfuse3 encodes options as us-ascii."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)
