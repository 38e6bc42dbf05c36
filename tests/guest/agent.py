"""In the guest: runs what the host asks for, each call in a process of its own. A program.

It speaks lines of JSON with machine.py over a virtio serial port. From the host:

    {"load": TEXT, "name": NAME}                a module; its functions can be called
    {"job": N, "call": NAME, "arguments": []}   call one of them
    {"job": N, "go": VALUE}                     an answer to what a job said

and to the host:

    {"ready": true}                             once
    {"job": N, "said": VALUE}                   the function is a generator that yielded this, and
                                                now waits for "go"
    {"job": N, "value": VALUE}                  what it returned
    {"job": N, "failed": TEXT}                  its traceback
    {"job": N, "ended": STATUS}                 its process has gone
"""

from __future__ import annotations

import glob
import inspect
import json
import os
import select
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable, Generator
from typing import Any


class Lines:
    """Lines of JSON on a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.rest = b""

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.descriptor, data) :]

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that one read completes; None at the end."""
        part = os.read(self.descriptor, 1 << 16)
        if not part:
            return None
        *whole, self.rest = (self.rest + part).split(b"\n")
        return [json.loads(line) for line in whole]


def load(name: str, text: str) -> dict[str, Any]:
    """Make a module of that name, in a package that may have to be made, and return its names."""
    sys.modules.setdefault(name.rpartition(".")[0], types.ModuleType("package"))
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    return module.__dict__


def run(lines: Lines, function: Callable[..., Any], arguments: list[Any]) -> None:
    """In a job's process: call the function, and send what comes of it."""
    try:
        value = function(*arguments)
        if inspect.isgenerator(value):
            value = converse(lines, value)
        lines.send({"value": value})
    except BaseException:
        lines.send({"failed": traceback.format_exc()})
    os._exit(0)


def converse(lines: Lines, generator: Generator[Any, Any, Any]) -> Any:
    """Send what a generator yields, let it go on when the host says so, and return its value."""
    answer = None
    while True:
        try:
            lines.send({"said": generator.send(answer)})
        except StopIteration as end:
            return end.value
        messages: list[dict[str, Any]] = []
        while not messages:
            messages = lines.receive() or []
        answer = messages[0]["go"]


def port(name: str) -> int:
    """Return the descriptor of the serial port of that name, once it is there."""
    while True:
        for path in glob.glob("/sys/class/virtio-ports/*/name"):
            with open(path) as file:
                if file.read().strip() == name:
                    return os.open(f"/dev/{path.split('/')[-2]}", os.O_RDWR)
        time.sleep(0.01)


def main() -> None:
    host = Lines(port("agent"))
    programs: dict[str, Any] = {}
    jobs: dict[
        int, tuple[int, Lines, int]
    ] = {}  # by the descriptor of our end: the number, the lines, the process
    host.send({"ready": True})
    while True:
        descriptors = [host.descriptor, *jobs]
        for descriptor in select.select(descriptors, [], [])[0]:
            if descriptor != host.descriptor:
                number, lines, pid = jobs[descriptor]
                messages = lines.receive()
                for message in messages or ():
                    host.send({"job": number, **message})
                if messages is None:
                    del jobs[descriptor]
                    os.close(descriptor)
                    host.send({"job": number, "ended": os.waitpid(pid, 0)[1]})
                continue
            for message in host.receive() or ():
                if "load" in message:
                    programs |= load(message["name"], message["load"])
                elif "call" in message:
                    ours, theirs = (end.detach() for end in socket.socketpair())
                    pid = os.fork()
                    if not pid:
                        os.close(ours)
                        run(Lines(theirs), programs[message["call"]], message["arguments"])
                    os.close(theirs)
                    jobs[ours] = (message["job"], Lines(ours), pid)
                else:
                    for number, lines, _ in jobs.values():
                        if number == message["job"]:
                            lines.send({"go": message["go"]})


if __name__ == "__main__":
    main()
