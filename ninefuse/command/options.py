"""What the user asked for: the parser of -o options, and what it makes settings of.

The option names follow mount(8), mount.fuse3(8) and, for cache=, v9fs.
"""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.settings import (
    DEFAULT_ENGINE,
    DEFAULT_LOG_LEVEL,
    DEFAULT_MAX_INODES,
    DEFAULT_MODEL,
    DEFAULT_THREADS,
    ENGINES,
    MODELS,
    Settings,
)

_PLUG_IN = re.compile(r"\w+(\.\w+)*:\w+")  # a driver of the user's own, package.module:Class
MAX_THREADS = 1024

# The kernel's mount flags. Of the words of one group the last one given wins; the second
# member says whether libfuse has to hear of it. It mounts nodev and nosuid for root too unless
# told otherwise (mo->flags in its lib/mount.c), hence dev and suid are passed on, while rw,
# exec, async and atime are what it does anyway. nodiratime is not passed on: libfuse 3.14
# does not know the word, and the kernel never updates access times on a FUSE mount by itself:
# the source's are moved by our own reads, or not (Session.noatime).
_KERNEL_FLAGS = {
    "ro": ("write", True),
    "rw": ("write", False),
    "dev": ("dev", True),
    "nodev": ("dev", True),
    "suid": ("suid", True),
    "nosuid": ("suid", True),
    "exec": ("exec", False),
    "noexec": ("exec", True),
    "sync": ("sync", True),
    "async": ("sync", False),
    "dirsync": ("dirsync", True),
    "atime": ("atime", False),
    "noatime": ("atime", True),
    "diratime": ("diratime", False),
    "nodiratime": ("diratime", False),
}

_SWITCHES = (
    "acl",
    "allow_other",
    "auto_unmount",
    "debug",
    "default_permissions",
    "noxattr",
    "xdev",
)
_TIMEOUTS = ("attr_timeout", "entry_timeout", "negative_timeout")

# cache= with v9fs's names as aliases.
_CACHE_NAMES = {
    "none": "none",
    "auto": "auto",
    "readahead": "auto",
    "mmap": "auto",
    "loose": "loose",
    "fscache": "loose",
}

# Options with one of a few values.
_CHOICES = {
    "model": MODELS,
    "engine": ENGINES,
    "cache": tuple(_CACHE_NAMES),
    # One durable write for each write(2) of an O_SYNC open, or a cached one and an fsync.
    "osync": ("direct", "cached"),
    # Whether the dispatcher makes calls itself that do not block, or are soon over.
    "inline": ("auto", "off"),
    # Whether the daemon's threads share one processor.
    "cpus": ("one", "all"),
}
_NAMES = ("fsname", "subtype")

# How long the kernel may believe names and attributes, in seconds, for each kind of cache.
_CACHE_SECONDS = {"none": 0.0, "auto": 1.0, "loose": 86400.0}

# Written in fstab for mount(8), systemd and the boot scripts, or left over from FUSE 2
# (nonempty): they say nothing to the file system.
IGNORED = frozenset(
    (
        "",
        "defaults",
        "nofail",
        "user",
        "users",
        "nouser",
        "owner",
        "group",
        "auto",
        "noauto",
        "_netdev",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
        "nonempty",
    )
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=")

# Of the words that say when the kernel notes access times the last one wins. They matter to a
# remount alone.
_ACCESS_TIMES = ("atime", "noatime", "relatime", "norelatime", "strictatime", "nostrictatime")
# What the kernel shows of a mount, which mount(8) hands back when that is to be changed.
_SHOWN = ("user_id", "group_id", "rootmode", "fd", "max_read", "blksize")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the -o options said. None stands for "not given".

    flags: the kernel's flags in force, as words. The timeouts are in seconds. ignored: words that
    mean nothing to us, which only a sloppy parse lets pass. remount: whether a mount that is there
    is to be changed. access_times: when that is to note them, a word of mount(8).
    """

    flags: tuple[str, ...] = ()
    remount: bool = False
    access_times: str | None = None
    ignored: tuple[str, ...] = ()
    allow_other: bool = False
    auto_unmount: bool = False
    debug: bool = False
    xattr: bool = True
    model: str | None = None
    engine: str | None = None
    threads: int | None = None
    fsname: str | None = None
    subtype: str | None = None
    attr_timeout: float = 1.0
    entry_timeout: float = 1.0
    negative_timeout: float = 1.0
    keep_cache: bool = False
    direct_sync: bool = True
    one_cpu: bool | None = None
    inline: bool = True
    acl: bool = False
    one_file_system: bool = False
    max_inodes: int = DEFAULT_MAX_INODES


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
    flags: dict[str, str] = {}
    ignored: list[str] = []
    switches: set[str] = set()
    values: dict[str, str] = {}
    timeouts: dict[str, float] = {}
    threads: int | None = None
    max_inodes = DEFAULT_MAX_INODES
    access_times: str | None = None
    given = [word for text in words for word in split_words(text)]
    remount = "remount" in given
    for word in given:
        name, _, value = word.partition("=")
        if word in _ACCESS_TIMES:
            access_times = word
        if word in _KERNEL_FLAGS:
            flags[_KERNEL_FLAGS[word][0]] = word
        elif word in _SWITCHES:
            switches.add(word)
        elif word in IGNORED or word.startswith(_IGNORED_PREFIXES):
            pass
        elif name in _NAMES:
            if not value:
                raise Failure(ExitCode.USAGE, f"option -o {name}= needs a value")
            values[name] = value
        elif name in _CHOICES:
            values[name] = _choice(word, value, _CHOICES[name])
        elif name == "threads":
            threads = parse_threads(value, f"option -o {word}")
        elif name == "max_inodes":
            max_inodes = _whole(word, value)
        elif name in _TIMEOUTS:
            timeouts[name] = _seconds(word, value)
        elif word == "remount" or (remount and name in _SHOWN):
            pass
        elif sloppy:
            ignored.append(word)
        else:
            raise Failure(ExitCode.USAGE, f"unknown option -o {word}")

    if {"acl", "noxattr"} <= switches:
        raise Failure(ExitCode.USAGE, "-o acl needs what -o noxattr takes away: choose one")
    cache = _CACHE_NAMES[values.get("cache", "auto")]
    seconds = _CACHE_SECONDS[cache]
    return MountOptions(
        flags=tuple(flags.values()),
        remount=remount,
        access_times=access_times,
        ignored=tuple(ignored),
        allow_other="allow_other" in switches,
        auto_unmount="auto_unmount" in switches,
        debug="debug" in switches,
        xattr="noxattr" not in switches,
        model=values.get("model"),
        engine=values.get("engine"),
        threads=threads,
        fsname=values.get("fsname"),
        subtype=values.get("subtype"),
        # Looked up last, so that a timeout given by name holds whether it comes before or
        # after cache=.
        attr_timeout=timeouts.get("attr_timeout", seconds),
        entry_timeout=timeouts.get("entry_timeout", seconds),
        negative_timeout=timeouts.get("negative_timeout", seconds),
        keep_cache=cache == "loose",
        # cache=none is for those who want the kernel's ordinary way with everything.
        direct_sync=values.get("osync", "cached" if cache == "none" else "direct") == "direct",
        one_cpu={"one": True, "all": False, None: None}[values.get("cpus")],
        inline=values.get("inline", "auto") == "auto",
        acl="acl" in switches,
        one_file_system="xdev" in switches,
        max_inodes=max_inodes,
    )


def known_words() -> list[str]:
    """Return what may stand after -o, one `name`, `name=` or `name=value` each."""
    return [
        *_KERNEL_FLAGS,
        *_SWITCHES,
        *(f"{name}=" for name in (*_NAMES, "threads", "max_inodes", *_TIMEOUTS)),
        *(f"{name}={value}" for name, values in _CHOICES.items() for value in values),
    ]


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


def parse_threads(text: str, where: str) -> int:
    """Return the number of worker threads that text gives.

    Arguments: text, a whole number from 1 to MAX_THREADS; where, the option as the user wrote
    it, for the message. Raises Failure(USAGE).
    """
    # Checked as text first: int() would take "1_6", " 16" and digits of other scripts too.
    if text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MAX_THREADS:
        return int(text)
    raise Failure(ExitCode.USAGE, f"{where}: the number of threads is 1 to {MAX_THREADS}")


def make_settings(
    source: str,
    mountpoint: str,
    options: MountOptions,
    *,
    model: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    foreground: bool = False,
    debug: bool = False,
    log_file: str | None = None,
    log_level: str = DEFAULT_LOG_LEVEL,
    trace_file: str | None = None,
) -> Settings:
    """Put the command line and the -o options together.

    Arguments: source, mountpoint, log_file, trace_file: paths, relative to the current directory
    or absolute; options, from parse_options; the rest as flags on the command line gave it (None:
    not given), which wins over options. debug on either side means foreground too, as it does
    for all FUSE commands (mount.fuse3(8)).
    Raises Failure(USAGE) when a path is empty, or the engine is not to be had with the model.
    """
    for name, path in (
        ("SRC", source),
        ("MNT", mountpoint),
        ("--log FILE", log_file),
        ("--trace FILE", trace_file),
    ):
        # abspath would make the current directory of it: after a typo in a script's variable
        # name that is never what was meant.
        if path == "":
            raise Failure(ExitCode.USAGE, f"{name} is empty: give a path")
    source = os.path.abspath(source)
    debug = debug or options.debug
    model = model or options.model or DEFAULT_MODEL
    engine = engine or options.engine or DEFAULT_ENGINE
    if engine == "uring" and (model != "second" or not options.inline):
        text = "--engine uring is beneath the second model only, with -o inline=auto"
        raise Failure(ExitCode.USAGE, text)
    return Settings(
        source=source,
        mountpoint=os.path.abspath(mountpoint),
        model=model,
        engine=engine,
        threads=threads or options.threads or DEFAULT_THREADS,
        foreground=foreground or debug,
        debug=debug,
        log_file=None if log_file is None else os.path.abspath(log_file),
        log_level=log_level,
        trace_file=None if trace_file is None else os.path.abspath(trace_file),
        read_only="ro" in options.flags,
        dirsync="dirsync" in options.flags,
        noatime="noatime" in options.flags,
        nodiratime="nodiratime" in options.flags,
        sync="sync" in options.flags,
        xattr=options.xattr,
        allow_other=options.allow_other,
        attr_timeout=options.attr_timeout,
        entry_timeout=options.entry_timeout,
        negative_timeout=options.negative_timeout,
        keep_cache=options.keep_cache,
        direct_sync=options.direct_sync,
        one_cpu=options.one_cpu,
        inline=options.inline,
        # The group bits of a file with an ACL hold its mask: a kernel that looks at mode bits
        # alone would let people in whom the source keeps out.
        acl=options.acl or (options.allow_other and options.xattr),
        one_file_system=options.one_file_system,
        max_inodes=options.max_inodes,
        mount_options=_words_for_libfuse(source, options),
        remount=_words_to_change(options) if options.remount else None,
    )


def _words_to_change(options: MountOptions) -> tuple[str, ...]:
    words = [word for word in options.flags if word not in _ACCESS_TIMES]
    return (*words, options.access_times) if options.access_times else tuple(words)


def _words_for_libfuse(source: str, options: MountOptions) -> tuple[str, ...]:
    """Return libfuse's share of the options. Their order has no meaning."""
    # A comma or backslash in the subtype gets lost between libfuse and fusermount3, however
    # it is escaped (libfuse 3.14, for users other than root).
    subtype = _ascii(options.subtype or "ninefuse").replace(",", "?").replace("\\", "?")
    fsname = _ascii(options.fsname or source).replace("\\", "\\\\").replace(",", "\\,")
    # Without default_permissions a daemon of root with allow_other would let everybody in.
    words = ["default_permissions", f"subtype={subtype}", f"fsname={fsname}"]
    if options.allow_other:
        words.append("allow_other")
    if options.auto_unmount:
        words.append("auto_unmount")
    words += [flag for flag in options.flags if _KERNEL_FLAGS[flag][1]]
    return tuple(words)


def _ascii(text: str) -> str:
    """Return text with ? for all but printable ASCII: pyfuse3 encodes options as us-ascii."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


def _choice(word: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise Failure(ExitCode.USAGE, f"option -o {word}: choose one of {', '.join(choices)}")
    return value


def _whole(word: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 15):
        raise Failure(ExitCode.USAGE, f"option -o {word}: give a whole number, 0 for no limit")
    return int(value)


def _seconds(word: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise Failure(
            ExitCode.USAGE, f"option -o {word}: give a number of seconds, zero or greater"
        )
    return seconds
