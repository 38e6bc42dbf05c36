"""Tell the service manager how it goes, by the protocol of systemd's sd_notify(3).

It is one datagram to a socket. Of the libraries for that, the one in Python is no longer kept up
and hides errors, and the others want libsystemd's headers and a compiler.

Locks touched: none.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)

# How long a service manager may be too busy to take a message, in seconds: nobody else is served
# in the meantime.
_PATIENCE = 1.0


def notify(*assignments: str) -> None:
    """Send assignments such as READY=1 to the service manager, if there is one that listens.

    It says where in the environment's NOTIFY_SOCKET: by a path, or by @ and a name in the
    abstract namespace (unix(7)).
    """
    address = os.environb.get(b"NOTIFY_SOCKET", b"")
    if not address:
        return
    if address.startswith(b"@"):
        address = b"\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(_PATIENCE)
            sender.sendto("\n".join(assignments).encode(), address)
    except OSError as error:
        where = os.fsdecode(address)
        log.warning("cannot tell the service manager at %s: %s", where, error)


def leave_it_to_our_starter() -> None:
    """Tell nothing from here on, if it is not us whom the service manager has started.

    A service that mounts something, by mount(8) say, is not made another one by that: it has a
    main process of its own, and does not end when the mount does.
    """
    # systemd.exec(5); not known to others, nor to old ones.
    if os.environ.get("SYSTEMD_EXEC_PID", str(os.getpid())) != str(os.getpid()):
        os.environ.pop("NOTIFY_SOCKET", None)
