"""The servers whose exports the guest mounts: ninefuse-serve, and diod to tell faults apart."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mounting import ENVIRONMENT, wait_until

# NINEFUSE_GUEST_SERVER=diod: the same tests with diod, which tells whose fault a failure is.
SERVER = os.environ.get("NINEFUSE_GUEST_SERVER") or "ninefuse"
# What is started with these words ends when the tests' process does, however that ends.
WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_START_SECONDS = 30.0
_END_SECONDS = 20.0


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def command_of(
    kind: str, listen: Sequence[str], source: Path, options: Sequence[str] = ()
) -> list[str]:
    """Return the command line of a server in the foreground.

    Args:
        kind: "ninefuse" or "diod".
        listen: where, each as "tcp:HOST:PORT" or "unix:PATH".
        source: what it serves.
        options: more of its own options.
    """
    if kind == "ninefuse":
        serve = [sys.executable, "-m", "ninefuse.command.server", "-f", "-o", "no_root_squash"]
        places = [word for one in listen for word in ("--listen", one)]
        return [*serve, *places, *options, str(source)]
    program = shutil.which("diod", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert program is not None, "no diod (Debian: apt-get install diod)"
    known = ["-f", "-n", "-N", "-c", "/dev/null", "-L", "stderr", "-U", "root"]
    places = [word for one in listen for word in ("-l", one.partition(":")[2])]
    return [program, *known, *places, "-e", str(source), *options]


@dataclass
class Server:
    """A server of a directory on a TCP port of the host's loopback, and on a Unix socket.

    source: what it serves. log: the file that has its words; the socket lies beside it.
    """

    source: Path
    log: Path
    kind: str = SERVER
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        places = (f"tcp:127.0.0.1:{self.port}", f"unix:{self.socket}")
        command = command_of(self.kind, places, self.source)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*WITH_US, *command],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, f"{command} listens", _START_SECONDS)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the server ended: {self.log.read_text()[-2000:]}"
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(_END_SECONDS)

    def end(self) -> None:
        """End it as a user would; ninefuse-serve then exits with 0."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                code = self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            assert self.kind != "ninefuse" or code == 0, self.log.read_text()[-2000:]

    @property
    def socket(self) -> Path:
        return self.log.with_name("socket")

    @property
    def aname(self) -> str:
        """What a client names as the tree: diod knows its exports by their paths."""
        return str(self.source) if self.kind == "diod" else "/"
