"""What a service manager is told: sd_notify(3), over a socket that is one's own."""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import (
    ENVIRONMENT,
    NINEFUSE,
    PATIENCE,
    Log,
    Mount,
    Watchdog,
    detach,
    is_running,
    run,
    unmount,
    wait_until,
)

from ninefuse.exitcodes import ExitCode
from ninefuse.process import notify


class Manager:
    """The socket of a service manager, by either kind of address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.settimeout(PATIENCE)

    def next(self) -> tuple[int, list[str]]:
        """The next message: who has sent it, by the kernel's word, and its lines."""
        data, ancillary, _, _ = self._socket.recvmsg(4096, 100)
        ((_, kind, credentials),) = ancillary
        assert kind == socket.SCM_CREDENTIALS
        return struct.unpack("iii", credentials)[0], data.decode().split("\n")

    def is_told_nothing(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(PATIENCE)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    # Relative, and so not too long for a socket's address, wherever the tests' directories are.
    monkeypatch.chdir(tmp_path)
    made = Manager("notify" if request.param == "path" else f"@ninefuse-test-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", made.address)
    yield made
    made.close()


@pytest.fixture
def abstract(monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """One that a daemon reaches from any working directory."""
    made = Manager(f"@ninefuse-test-{os.getpid()}")
    monkeypatch.setitem(ENVIRONMENT, "NOTIFY_SOCKET", made.address)
    # As desktops leave it to all that is started there.
    monkeypatch.delitem(ENVIRONMENT, "SYSTEMD_EXEC_PID", raising=False)
    yield made
    made.close()


def test_one_message_is_one_datagram(manager: Manager) -> None:
    notify.notify("MAINPID=7", "READY=1")
    assert manager.next() == (os.getpid(), ["MAINPID=7", "READY=1"])
    assert manager.is_told_nothing()


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_manager_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str | None
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify.notify("READY=1")
    assert caplog.records == []


@pytest.mark.parametrize("address", ["gone", "@gone", "vsock:2:1234", "x" * 200])
def test_a_manager_that_cannot_be_told_is_only_logged(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    address: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.notify("READY=1")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert address.strip("@") in record.getMessage()


def test_a_manager_that_does_not_read_holds_nobody_up(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "_PATIENCE", 0.01)

    def fill() -> None:
        while not caplog.records:
            notify.notify("STATUS=again")

    filler = threading.Thread(target=fill, daemon=True)
    filler.start()
    filler.join(PATIENCE)
    assert not filler.is_alive()


# ---- real mounts ---------------------------------------------------------------------------------


def foreground(guard: Watchdog, tmp_path: Path) -> Mount:
    """Start a mount, and wait for nothing but its process."""
    source, path = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    path.mkdir()
    (source / "file").touch()
    command = [*NINEFUSE, "-f", str(source), str(path)]
    return Mount(guard, source, path, tmp_path / "log", command, ready="")


def test_it_is_ready_once_the_mount_answers_and_stopping_while_it_is_busy(
    guard: Watchdog, abstract: Manager, tmp_path: Path
) -> None:
    mount = foreground(guard, tmp_path)
    try:
        assert abstract.next() == (mount.pid, ["READY=1"])
        assert os.listdir(mount.path) == ["file"]
        with open(mount.path / "file", "wb", buffering=0) as file:
            mount.signal(signal.SIGTERM)
            assert abstract.next() == (mount.pid, ["STOPPING=1"])
            file.write(b"still served")
        assert mount.wait() == 0
        assert abstract.is_told_nothing()
    finally:
        mount.end()
    mount.log.check()
    assert (mount.source / "file").read_bytes() == b"still served"


def test_a_daemon_is_made_the_main_process(
    guard: Watchdog, abstract: Manager, tmp_path: Path, mountpoint: Path
) -> None:
    """By the command, which is the main process until then; an unmount, too, is an end."""
    (tmp_path / "source").mkdir()
    log = Log(tmp_path / "log")
    words = [*NINEFUSE, "--log", str(log.path), str(tmp_path / "source"), str(mountpoint)]
    with subprocess.Popen(words, env=ENVIRONMENT) as command:
        assert command.wait(PATIENCE) == 0
    pid = int(log.wait_for(r"\[(\d+)\] INFO .*mounted on")[1])
    guard.watch(pid, mountpoint)
    try:
        assert abstract.next() == (command.pid, [f"MAINPID={pid}", "READY=1"])
        unmount(mountpoint)
        assert abstract.next() == (pid, ["STOPPING=1"])
        wait_until(lambda: not is_running(pid), "the daemon's end")
        assert abstract.is_told_nothing()
    finally:
        detach(mountpoint)
        guard.forget(mountpoint)
    log.check()


def test_a_mount_that_fails_is_never_ready(abstract: Manager, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "mount").mkdir()
    log = tmp_path / "missing" / "log"  # which the daemon looks for, not the command
    done = run(*NINEFUSE, "--log", log, tmp_path / "source", tmp_path / "mount")
    assert done.returncode == ExitCode.USAGE
    assert abstract.is_told_nothing()
