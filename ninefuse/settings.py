"""The settings of one mount, and what they can be: what the command line is read for.

Locks touched: none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MODELS = ("none", "first", "second")
DEFAULT_MODEL = "second"
ENGINES = ("auto", "threads", "uring")
DEFAULT_ENGINE = "auto"
SESSIONS = ("auto", "native", "pyfuse3")
DEFAULT_SESSION = "auto"
HANDOVERS = ("auto", "role", "request")
DEFAULT_HANDOVER = "auto"
LEADERS = 12  # threads that take the dispatcher's role in turn, as long as none is stuck
DATA = ("daemon", "kernel")
DEFAULT_DATA = "daemon"
DEFAULT_THREADS = 16
DEFAULT_TIMEOUT = 1.0  # seconds, as of cache=auto
DEFAULT_MAX_INODES = 1_000_000
DEFAULT_CONNECTIONS = 256
DEFAULT_FIDS = 100_000  # of one connection, as are those that follow
DEFAULT_REQUESTS = 1024
DEFAULT_BYTES = 8 << 20
LOG_LEVELS = ("error", "warning", "info", "debug")
DEFAULT_LOG_LEVEL = "info"

FUSE_DEVICE = "/dev/fuse"
_HANDED_OVER = re.compile(r"/dev/fd/[0-9]+")


@dataclass(frozen=True, slots=True)
class Settings:
    """All that one mount needs to know, or a server that has no mount.

    source, mountpoint: absolute paths. model: the threading model, one of MODELS or
    MODULE:CLASS. engine: what is
    beneath the second one, one of ENGINES. session: who speaks with the kernel, one of SESSIONS.
    data: who reads and writes files, one of DATA.
    threads: how many workers. log_file, trace_file:
    absolute paths, or None. attr_timeout, entry_timeout,
    negative_timeout: seconds for which the kernel may keep attributes, names and the absence
    of names. keep_cache: whether cached file data outlives an open. direct_sync: whether writes
    through O_SYNC and O_DSYNC opens go past the kernel's page cache. one_cpu: whether the
    threads share one processor; None: where requests are handed to workers, and no io_uring
    stands between. inline: whether the second model's dispatcher makes quick calls itself.
    handover: what the second model hands over, one of HANDOVERS. xattr: whether extended
    attributes are served. acl: whether the kernel evaluates ACLs. one_file_system: whether what
    is mounted in the source is hidden. max_inodes: of how many files the kernel may know before
    it is asked to forget some; 0: any number. mount_options: the words for libfuse, each for an
    -o of its own and already escaped. remount: the words by which a mount that is there is to be
    changed; None: one is to be made. listen: addresses at which clients are served, as --listen
    has them. squashes: whether a client's root acts as nobody. max_connections: of
    such clients. max_fids, max_requests: that one of them may have. max_bytes: of its requests
    and answers, likewise, and again of extended attributes that its fids keep.
    """

    source: str
    mountpoint: str
    model: str = DEFAULT_MODEL
    engine: str = DEFAULT_ENGINE
    session: str = DEFAULT_SESSION
    data: str = DEFAULT_DATA
    threads: int = DEFAULT_THREADS
    foreground: bool = False
    debug: bool = False
    log_file: str | None = None
    log_level: str = DEFAULT_LOG_LEVEL
    trace_file: str | None = None
    max_inodes: int = DEFAULT_MAX_INODES
    read_only: bool = False
    dirsync: bool = False
    noatime: bool = False
    nodiratime: bool = False
    sync: bool = False
    xattr: bool = True
    allow_other: bool = False
    attr_timeout: float = DEFAULT_TIMEOUT
    entry_timeout: float = DEFAULT_TIMEOUT
    negative_timeout: float = DEFAULT_TIMEOUT
    keep_cache: bool = False
    direct_sync: bool = True
    one_cpu: bool | None = None
    inline: bool = True
    handover: str = DEFAULT_HANDOVER
    acl: bool = False
    one_file_system: bool = False
    mount_options: tuple[str, ...] = ()
    remount: tuple[str, ...] | None = None
    listen: tuple[str, ...] = ()
    squashes: bool = True
    max_connections: int = DEFAULT_CONNECTIONS
    max_fids: int = DEFAULT_FIDS
    max_requests: int = DEFAULT_REQUESTS
    max_bytes: int = DEFAULT_BYTES

    @property
    def may_lead(self) -> bool:
        """Whether the dispatcher's role is to change threads, if the session lets it."""
        return (
            self.model == "second"
            and self.inline
            and self.handover != "request"
            and not self.listen  # clients at sockets give their requests to one dispatcher
            and self.engine != "uring"
            and self.session != "pyfuse3"
        )

    @property
    def is_handed_over(self) -> bool:
        """Whether somebody else has made the mount and handed it over, open.

        ``/dev/fd/N`` is libfuse's name for it (mount.fuse3(8), drop_privileges).
        """
        return _HANDED_OVER.fullmatch(self.mountpoint) is not None
