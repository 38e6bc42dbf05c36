"""Where clients come: addresses as they are written, the sockets there, what a client mounts.

    unix:PATH       a Unix socket, mode 0600; one that is left over from a dead server is replaced
    tcp:PORT        on this machine alone (127.0.0.1); tcp:HOST:PORT on an address of it
    vsock:PORT      for virtual machines on this host
    fd:N            a socket that was handed over open: one to listen at, or a connection
    systemd         those that a service manager has handed over (sd_listen_fds(3))

Locks touched: none.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import shlex
import socket
import stat
from collections import Counter
from typing import NamedTuple

from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.ops import MAX_MSIZE

log = logging.getLogger(__name__)

_BACKLOG = 128
_FIRST_HANDED_OVER = 3  # SD_LISTEN_FDS_START
_STARTED = os.getpid()  # whom a service manager has started; a daemon is a child of that
_ANY_GUEST = 0xFFFFFFFF  # VMADDR_CID_ANY


class Address(NamedTuple):
    """An address to listen at.

    Attributes:
        kind: unix, tcp, vsock, fd or systemd.
        host: of tcp; a path for unix.
        port: of tcp and vsock; the descriptor for fd.
    """

    kind: str
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.host}"
        if self.kind == "tcp":
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"tcp:{host}:{self.port}"
        return self.kind if self.kind == "systemd" else f"{self.kind}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether nobody on another machine can come by it."""
        if self.kind != "tcp":
            return self.kind == "unix"
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


def parse(text: str) -> Address:
    """Read an address as --listen has it.

    Raises:
        Failure: USAGE.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return Address(kind, os.path.abspath(rest))
    if kind == "tcp":
        host, colon, port = rest.rpartition(":")
        if not colon:
            host = "127.0.0.1"
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if host and _is_number(port, 65535):
            return Address(kind, host, int(port))
    if kind == "vsock" and _is_number(rest, _ANY_GUEST - 1):
        return Address(kind, "", int(rest))
    if kind == "fd" and _is_number(rest, 1 << 20):
        return Address(kind, "", int(rest))
    raise Failure(
        ExitCode.USAGE,
        f"--listen {text}: give unix:PATH, tcp:PORT, tcp:HOST:PORT, vsock:PORT or fd:N",
    )


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most


def default_address(source: str) -> Address:
    """A Unix socket in the directory that the user has for such things.

    Args:
        source: the exported directory, after which it is named.

    Raises:
        Failure: USAGE, there is no such directory.
    """
    directory = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else "")
    if not directory:
        text = "there is no XDG_RUNTIME_DIR to make a socket in: give --listen"
        raise Failure(ExitCode.USAGE, text)
    name = os.path.basename(source) or "root"
    return Address("unix", os.path.join(os.path.abspath(directory), f"ninefuse-{name}.sock"))


class Listener:
    """A socket at which clients come, or one client's.

    Attributes:
        socket: it, which does not block.
        name: what the log calls it.
        accepts: whether clients come there; else it is a connection.
        address: where it is.
        reach: whence clients come; of a socket that was handed over, what that says.
    """

    def __init__(self, opened: socket.socket, address: Address) -> None:
        self.socket = opened
        self.address = address
        self.name = str(address)
        opened.setblocking(False)
        self.accepts = bool(opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self.reach = address
        if address.kind in ("fd", "systemd") and opened.family in (socket.AF_INET, socket.AF_INET6):
            self.reach = Address("tcp", *opened.getsockname()[:2])
        self._file: tuple[int, int] | None = None
        if address.kind == "unix":
            made = os.lstat(address.host)
            self._file = made.st_dev, made.st_ino

    @property
    def mount_line(self) -> str:
        """What a Linux client mounts it by; empty where it takes more than that."""
        options = f"version=9p2000.L,msize={MAX_MSIZE}"
        if self.address.kind == "unix":
            return f"mount -t 9p -o trans=unix,{options} {shlex.quote(self.address.host)} MNT"
        if self.address.kind == "tcp":
            address = self.address
            return f"mount -t 9p -o trans=tcp,port={address.port},{options} {address.host} MNT"
        return ""

    def close(self) -> None:
        """Close it; a Unix socket's file goes, if it is still this one's."""
        self.socket.close()
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            found = os.lstat(self.address.host)
            if (found.st_dev, found.st_ino) == self._file:
                os.unlink(self.address.host)


def open_all(addresses: list[Address]) -> list[Listener]:
    """Open sockets to listen at.

    Raises:
        Failure: LISTENING_REFUSED, one cannot be had; USAGE, a descriptor is given twice. None is
            left open.
    """
    opened: list[Listener] = []
    for address, count in Counter(addresses).items():
        if address.kind == "fd" and count > 1:
            raise Failure(ExitCode.USAGE, f"--listen {address}: is given twice: leave one out")
    try:
        for address in addresses:
            for one in _open(address):
                listener = Listener(one, address)
                if address.kind == "tcp":  # port 0 is any
                    port = one.getsockname()[1]
                    listener = Listener(one, address._replace(port=port))
                opened.append(listener)
    except OSError as e:
        for listener in opened:
            listener.close()
        reason = e.strerror or str(e)
        text = f"--listen {address}: cannot be listened at ({reason}): give another address"
        raise Failure(ExitCode.LISTENING_REFUSED, text) from None
    return opened


def handed_over() -> bool:
    """Whether a service manager has handed sockets over (sd_listen_fds(3))."""
    return os.environ.get("LISTEN_PID") == str(_STARTED) and _count_handed_over() > 0


def _count_handed_over() -> int:
    count = os.environ.get("LISTEN_FDS", "")
    return int(count) if _is_number(count, 1024) else 0


def _open(address: Address) -> list[socket.socket]:
    if address.kind == "unix":
        return [_open_unix(address.host)]
    if address.kind == "tcp":
        return _open_tcp(address.host, address.port)
    if address.kind == "vsock":
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        return [_listening(listener, (_ANY_GUEST, address.port))]
    if address.kind == "fd":
        return [_adopted(address.port)]
    count = _count_handed_over()
    return [_adopted(fd) for fd in range(_FIRST_HANDED_OVER, _FIRST_HANDED_OVER + count)]


def _open_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # From its first moment on it is for its owner alone.
    umask = os.umask(0o177)
    try:
        try:
            return _listening(listener, path)
        except OSError as e:
            if e.errno != errno.EADDRINUSE or not _is_dead(path):
                raise
        os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return _listening(listener, path)
    finally:
        os.umask(umask)


def _is_dead(path: str) -> bool:
    """Whether a path is a socket of ours at which nobody listens."""
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _open_tcp(host: str, port: int) -> list[socket.socket]:
    opened: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:  # a part of it is empty, or longer than one can be
        raise OSError(errno.EINVAL, "No such name can be") from None
    try:
        for family, kind, protocol, _, where in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.append(_listening(listener, where))
    except OSError:
        for one in opened:
            one.close()
        raise
    return opened


def _listening(listener: socket.socket, where: object) -> socket.socket:
    try:
        listener.bind(where)  # type: ignore[arg-type]
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _adopted(fd: int) -> socket.socket:
    """A socket that was open when we started."""
    os.set_inheritable(fd, False)
    adopted = socket.socket(fileno=fd)
    if adopted.type != socket.SOCK_STREAM:
        adopted.detach()
        raise OSError(errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE))
    return adopted
