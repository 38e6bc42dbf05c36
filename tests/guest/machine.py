"""A guest under QEMU: how it is booted, asked to run a program, and always ended.

Its console goes to a file. What it is asked for goes over a virtio serial port, a Unix socket on
this side (agent.py says which words). Every wait has a limit, and a guest that does not
answer within it is not asked again: it is killed, with its console in the message.

QEMU's network is its own process's: the guest reaches the host's loopback as 10.0.2.2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guest.image import Image
from guest.servers import WITH_US

HOST = "10.0.2.2"  # the host's 127.0.0.1, as the guest sees it
QEMU = "qemu-system-x86_64"
MEMORY = "1G"  # the archive is in it twice while it is unpacked
BOOT_SECONDS = 90.0  # without hardware virtualisation it takes some ten
_END_SECONDS = 10.0
_TAIL = 3000  # characters of the console in a message

# What is loaded there, in this order.
PROGRAMS = ("mounts", "programs")


def accelerator() -> str:
    """Return who runs the guest: "kvm" where the processor can, else "tcg", QEMU's emulation.

    There are machines with a /dev/kvm whose processor cannot: a guest would stand still there.
    """
    words = set(Path("/proc/cpuinfo").read_text().split())
    return "kvm" if words & {"svm", "vmx"} and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def serial_port(name: str, path: Path) -> tuple[str, ...]:
    """Return QEMU's words for a virtio serial port that is connected to a Unix socket."""
    chardev = ("-chardev", f"socket,id={name},path={path}")
    return (*chardev, "-device", f"virtserialport,chardev={name},name={name}")


class GuestFailed(AssertionError):
    """A program in the guest raised; the message has its traceback."""


class GuestLost(AssertionError):
    """The guest ended, or did not answer in time; the message has the end of its console."""


class Job:
    """One call of a function in the guest, made by Guest.begin."""

    def __init__(self, guest: Guest, number: int, name: str) -> None:
        self._guest = guest
        self.number = number
        self.name = name
        self.messages: list[dict[str, Any]] = []

    def said(self, seconds: float = 30.0) -> Any:
        """Wait for what the function yields next, and return it."""
        return self._next("said", seconds)

    def go(self, value: object = None) -> None:
        """Let a function that yielded go on; its yield returns the value."""
        self._guest.send({"job": self.number, "go": value})

    def result(self, seconds: float = 30.0) -> Any:
        """Wait for what the function returns. Raises GuestFailed if it raised."""
        return self._next("value", seconds)

    def _next(self, kind: str, seconds: float) -> Any:
        self._guest.wait(lambda: bool(self.messages), seconds, self.name)
        message = self.messages.pop(0)
        if kind in message:
            return message[kind]
        if "failed" in message:
            raise GuestFailed(f"{self.name}, in the guest:\n{message['failed']}")
        raise GuestFailed(f"{self.name} in the guest: {message} where it was to have {kind}")


class Guest:
    """One guest; boots when made.

    Args:
        image: what it boots.
        directory: for its socket, its console and QEMU's own words; files of any name.
        options: further words for QEMU.
    """

    def __init__(self, image: Image, directory: Path, options: Sequence[str] = ()) -> None:
        program = shutil.which(QEMU)
        assert program is not None, f"no {QEMU} (Debian: apt-get install qemu-system-x86)"
        self.console = directory / "console"
        self.lost = False
        self._jobs: dict[int, Job] = {}
        self._number = 0
        self._ready = False
        self._rest = b""
        path = directory / "port"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(_END_SECONDS)
        words = [
            *(*WITH_US, program, "-machine", f"accel={accelerator()}", "-cpu", "max"),
            *("-m", MEMORY, "-smp", "1"),
            *("-display", "none", "-no-reboot", "-nodefaults", "-no-user-config"),
            *("-kernel", str(image.kernel), "-initrd", str(image.archive)),
            # Without mitigations and audit: half the time to boot. A panic ends the machine.
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off audit=0"),
            *("-serial", f"file:{self.console}"),
            *("-device", "virtio-serial-pci", *serial_port("agent", path)),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
            *options,
        ]
        with open(directory / "qemu", "wb") as output:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._errors = directory / "qemu"
        try:
            with listener:
                self._port, _ = listener.accept()
            self.wait(lambda: self._ready, BOOT_SECONDS, "booting")
            for name in PROGRAMS:
                text = Path(__file__).with_name(f"{name}.py").read_text()
                self.send({"load": text, "name": f"guest.{name}"})
        except BaseException as error:
            self.end()
            if isinstance(error, TimeoutError):
                raise GuestLost(f"QEMU did not start: {self.words()}") from error
            raise

    def begin(self, name: str, *arguments: object) -> Job:
        """Call a function in the guest; a generator can be answered (Job.said, Job.go)."""
        self._number += 1
        job = self._jobs[self._number] = Job(self, self._number, name)
        self.send({"job": self._number, "call": name, "arguments": arguments})
        return job

    def call(self, name: str, *arguments: object, seconds: float = 60.0) -> Any:
        """Call a function of mounts.py or programs.py and return what it returns.

        Args:
            name: the function's.
            arguments: its arguments; what JSON can say.
            seconds: how long it may take.

        Raises:
            GuestFailed: it raised.
            GuestLost: it did not end in time; the guest is not to be used any more.
        """
        return self.begin(name, *arguments).result(seconds)

    def send(self, message: dict[str, object]) -> None:
        self._port.settimeout(_END_SECONDS)
        self._port.sendall(json.dumps(message).encode() + b"\n")

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Take in what the guest says until the condition holds. Raises GuestLost."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._port.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = self._port.recv(1 << 16)
            except TimeoutError:
                part = None
            if not part:
                self.lost = True
                problem = "did not end" if part is None else "the guest ended"
                raise GuestLost(f"{what}: {problem} within {seconds:g} s; {self.words()}")
            *whole, self._rest = (self._rest + part).split(b"\n")
            for line in whole:
                self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._ready = True
            return
        job = self._jobs[message.pop("job")]
        if "ended" in message:
            del self._jobs[job.number]
            # After its value, which the function's caller takes, nothing more is asked for.
            if message["ended"]:
                job.messages.append({"failed": f"its process ended with {message['ended']}"})
        else:
            job.messages.append(message)

    def words(self) -> str:
        """Return the end of what the console and QEMU said."""
        said = ""
        for path in (self.console, self._errors):
            with contextlib.suppress(FileNotFoundError):
                said += path.read_text(errors="replace")[-_TAIL:]
        return f"its console:\n{said}"

    def end(self) -> None:
        """Kill the machine; it has nothing that anybody keeps."""
        self.process.kill()
        self.process.wait(_END_SECONDS)
        with contextlib.suppress(AttributeError):
            self._port.close()
