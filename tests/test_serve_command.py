"""The ninefuse-serve command: its options, and servers in processes of their own."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client9p import LIMIT, ROOT, Client
from mounting import Child, wait_until
from ops_helpers import fails, needs_root

from ninefuse import export
from ninefuse.command import options, server, servermanual
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.process import signals
from ninefuse.settings import Settings
from ninefuse.wire import listening
from ninefuse.wire.listening import Address
from ninefuse.wire.messages import NOFID, NONUNAME, NOTAG

COMMAND = (sys.executable, "-m", "ninefuse.command.server")
CREDENTIALS = struct.Struct("=iII")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir(mode=0o755)
    (source / "f").write_bytes(b"hello")
    return source


class Process:
    """A server in the foreground.

    Attributes:
        lines: what it has printed: an address, and how that is mounted.
    """

    def __init__(self, *words: str | Path, **how: object) -> None:
        self.popen = subprocess.Popen(
            [*COMMAND, "-f", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **how,  # type: ignore[call-overload]
        )
        self.lines: list[str] = []

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()

    def address(self) -> Address:
        """The next address that it says it listens at."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        self.lines.append(line.rstrip())
        return listening.parse(line.partition(": ")[0].rstrip())

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send it a signal; its exit code, and its log."""
        self.popen.send_signal(number)
        _, log = self.popen.communicate(timeout=LIMIT)
        return self.popen.returncode, log


@contextlib.contextmanager
def running(*words: str | Path, **how: object) -> Iterator[Process]:
    with Process(*words, **how) as process:
        yield process


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**os.environ, **environment},
    )


def read(client: Client, name: bytes = b"f") -> bytes:
    client.open(9, name)
    (data,) = client.call("Tread", 9, 0, 100)
    client.clunk(9)
    assert isinstance(data, bytes)
    return data


# The command line


def test_defaults() -> None:
    settings = server.parse(["/s"])
    assert settings == Settings("/s", "")


def test_options() -> None:
    words = "--listen tcp:5640 --listen unix:/x --model first --threads 3 -d --log l --trace t"
    more = "-o ro,sync,no_root_squash,max_connections=5 -o max_fids=0,noatime,defaults /s"
    settings = server.parse([*words.split(), *more.split()])
    assert settings.listen == ("tcp:5640", "unix:/x")
    assert (settings.model, settings.threads) == ("first", 3)
    assert settings.foreground
    assert settings.read_only
    assert settings.sync
    assert settings.noatime
    assert not settings.squashes
    assert (settings.max_connections, settings.max_fids) == (5, sys.maxsize)
    assert settings.log_file == os.path.abspath("l")
    assert settings.trace_file == os.path.abspath("t")


@pytest.mark.parametrize(
    "words",
    [
        "-o allow_other /s",
        "-o cache=none /s",
        "-o nonsense /s",
        "-o max_fids=-1 /s",
        "-o max_bytes=x /s",
        "--engine uring --model first /s",
        "--session native /s",
        "/s /m",
        "",
    ],
)
def test_what_is_no_option_of_a_server(words: str) -> None:
    with pytest.raises(Failure) as info:
        server.parse(words.split())
    assert info.value.code == ExitCode.USAGE


def test_every_option_of_the_server_has_one_text() -> None:
    explained = [
        w.partition("=")[0] for text in servermanual.SERVER for w in text.words.split(", ")
    ]
    known = {word.partition("=")[0] for word in server.known_words()}
    assert sorted(explained) == sorted(known)
    assert known <= {option.name for option in options.OPTIONS}


@pytest.mark.parametrize(
    ("text", "address", "is_local"),
    [
        ("unix:/a/b", Address("unix", "/a/b"), True),
        ("tcp:564", Address("tcp", "127.0.0.1", 564), True),
        ("tcp:0.0.0.0:564", Address("tcp", "0.0.0.0", 564), False),
        ("tcp:[::1]:564", Address("tcp", "::1", 564), True),
        ("tcp:host.example:0", Address("tcp", "host.example", 0), False),
        ("vsock:564", Address("vsock", "", 564), False),
        ("fd:3", Address("fd", "", 3), False),
    ],
)
def test_addresses(text: str, address: Address, is_local: bool) -> None:
    assert listening.parse(text) == address
    assert address.is_local == is_local
    assert listening.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "unix", "tcp:", "tcp:x", "tcp::5", "tcp:h:70000", "tcp:h:-1", "vsock:x", "fd:"]
    + ["fd:-1", "udp:5", "/a/b", "tcp:h:٥"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(Failure, match="unix:PATH") as info:
        listening.parse(text)
    assert info.value.code == ExitCode.USAGE


# In the foreground


def test_a_server_from_its_start_to_its_end(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "socket"
    places = ("--listen", f"unix:{path}", "--listen", "tcp:0")
    with running(*places, source) as process:
        addresses = process.address(), process.address()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (
            f"mount -t 9p -o trans=unix,version=9p2000.L,msize=1048576 {path} MNT"
            in (process.lines[0])
        )
        assert re.search(r"trans=tcp,port=\d+,.* 127\.0\.0\.1 MNT", process.lines[1])
        for address in addresses:
            with Client.to(address) as c:
                assert read(c) == b"hello"
        with Client.to(addresses[0]) as c:
            process.popen.send_signal(signal.SIGUSR1)
            code, log = process.end()
            assert c.is_hung_up()
    assert code == 0
    assert not path.exists()
    assert "operations: " in log
    assert "read 2" in log
    assert "whoever connects may act as" in log
    assert "open to every machine" not in log


def test_a_server_that_is_open_to_other_machines_says_so(source: Path) -> None:
    with running("--listen", "tcp:0.0.0.0:0", source) as process:
        process.address()
        _, log = process.end()
    assert "open to every machine that can reach it" in log


def test_the_default_address(tmp_path: Path, source: Path) -> None:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    with running(source, env=environment) as process:
        address = process.address()
        assert address == Address("unix", str(tmp_path / "ninefuse-source.sock"))
        with Client.to(address) as c:
            assert read(c) == b"hello"
        assert process.end(signal.SIGINT)[0] == 0


def test_a_trace(tmp_path: Path, source: Path) -> None:
    path, trace = tmp_path / "socket", tmp_path / "trace"
    with running("--listen", f"unix:{path}", "--trace", trace, source) as process:
        with Client.to(process.address()) as c:
            read(c)
        process.end()
    text = trace.read_text()
    assert '"lopen"' in text
    assert "ninefuse-serve" in text


def test_options_reach_the_server(tmp_path: Path, source: Path) -> None:
    words = ("--listen", f"unix:{tmp_path / 'socket'}", "-o", "ro,max_fids=3", "--model", "none")
    with running(*words, source) as process, Client.to(process.address()) as c:
        with fails(errno.EROFS):
            c.call("Tmkdir", ROOT, b"x", 0o700, NONUNAME)
        c.walk(1)
        c.walk(2)
        with fails(errno.EMFILE):
            c.walk(3)
        process.popen.send_signal(signal.SIGUSR1)
        _, log = process.end()
    assert "model none" in log


@needs_root
def test_root_is_squashed_unless_told_otherwise(tmp_path: Path, source: Path) -> None:
    for word, is_allowed in (("root_squash", False), ("no_root_squash", True)):
        words = ("--listen", f"unix:{tmp_path / 'socket'}", "-o", word)
        outcome = contextlib.nullcontext() if is_allowed else fails(errno.EACCES)
        with running(*words, source) as process, Client.to(process.address()) as c, outcome:
            c.call("Tmkdir", ROOT, b"x", 0o700, NONUNAME)


@needs_root
@pytest.mark.parametrize(
    ("word", "text"), [("root_squash", "any user but root\n"), ("no_root_squash", "and as root\n")]
)
def test_the_log_says_who_one_can_be(source: Path, word: str, text: str) -> None:
    with running("--listen", "tcp:0", "-o", word, source) as process:
        process.address()
        _, log = process.end()
    assert text in log


def serve_as(user: int, source: str, path: str) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    export.serve(Settings(source, "", listen=(f"unix:{path}",)), lambda: None)


@needs_root
def test_a_server_that_is_not_roots(tmp_path: Path, source: Path) -> None:
    """All is done as its own user, whoever is attached for."""
    for path in (tmp_path, source):
        path.chmod(0o777)
    directory = os.open(tmp_path, os.O_PATH)  # those above are closed to others
    try:
        here = f"/proc/self/fd/{directory}"
        with Child(serve_as, 31001, f"{here}/source", f"{here}/socket") as child:
            wait_until((tmp_path / "socket").exists, "it listens", LIMIT)
            wait_until(lambda: not child.done() and _answers(tmp_path), "it answers", LIMIT)
            with Client.to(Address("unix", str(tmp_path / "socket"))) as c:
                c.call("Tattach", 1, NOFID, b"", b"", 0)
                for fid, name in ((ROOT, b"one"), (1, b"other")):
                    c.call("Tmkdir", fid, name, 0o700, 0)
                    assert (source / os.fsdecode(name)).stat().st_uid == 31001
    finally:
        os.close(directory)


def _answers(directory: Path) -> bool:
    with (
        contextlib.suppress(ConnectionRefusedError),
        Client.to(Address("unix", str(directory / "socket"))),
    ):
        return True
    return False


# As a daemon


def test_a_daemon(tmp_path: Path, source: Path) -> None:
    path, log = tmp_path / "socket", tmp_path / "log"
    done = run("--listen", f"unix:{path}", "--log", log, source)
    assert done.returncode == 0, done.stderr
    assert f"unix:{path}: mount -t 9p" in done.stdout
    with Client.to(Address("unix", str(path))) as c:
        assert read(c) == b"hello"
        found = c.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        os.kill(CREDENTIALS.unpack(found)[0], signal.SIGTERM)
        assert c.is_hung_up()
    wait_until(lambda: "ended" in log.read_text(), "the daemon ends", LIMIT)
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--listen", "tcp:5", "none"), 3, "does not exist"),
        (("--listen", "tcp:5", "source/f"), 4, "is not a directory"),
        (("--listen", "udp:5", "source"), 2, "give unix:PATH"),
        (("--listen", "unix:none/socket", "source"), 17, "cannot be listened at"),
        (("--listen", "fd:9", "source"), 17, "cannot be listened at"),
        (("--listen", "tcp:..:5", "source"), 17, "No such name can be"),
        (("--model", "x:y", "--listen", "unix:s", "source"), 2, "--model x:y"),
    ],
)
def test_failures(
    tmp_path: Path, source: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    for more in ((), ("-f",)):
        done = subprocess.run(
            [*COMMAND, *more, *words],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        assert done.returncode == code
        (line,) = done.stderr.splitlines()
        assert line.startswith("ninefuse-serve: ")
        assert text in line
    assert not (tmp_path / "s").exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path, source: Path) -> None:
    program = (
        "import sys, trio; from ninefuse.command import server\n"
        "def fail(*_): raise OSError(24, 'Too many open files')\n"
        "trio.run = fail; sys.exit(server.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "-f", "--listen", f"unix:{tmp_path / 'socket'}", source],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 17
    (line,) = done.stderr.splitlines()
    assert line.startswith("ninefuse-serve: clients cannot be served (Too many open files)")
    assert not (tmp_path / "socket").exists()


def test_there_is_nowhere_to_listen(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Failure, match="XDG_RUNTIME_DIR"):
        listening.default_address(str(source))


# Sockets that are there


def test_a_socket_that_a_dead_server_has_left(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with running("--listen", f"unix:{path}", source) as process, Client.to(process.address()) as c:
        assert read(c) == b"hello"


def test_what_is_not_replaced(tmp_path: Path, source: Path) -> None:
    """A live server's socket, a file, a symlink; and what came in its place at the end."""
    path = tmp_path / "socket"
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("socket")
    with running("--listen", f"unix:{path}", source) as process:
        address = process.address()
        for name in ("socket", "file", "link"):
            done = run("-f", "--listen", f"unix:{tmp_path / name}", source)
            assert done.returncode == 17
        with Client.to(address) as c:
            assert read(c) == b"hello"
        path.unlink()
        path.write_bytes(b"mine")
        assert process.end()[0] == 0
    assert path.read_bytes() == b"mine"


def test_nobody_reads_where_it_listens(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "socket"
    read_end, write_end = os.pipe()
    os.close(read_end)
    words = [*COMMAND, "-f", "--listen", f"unix:{path}", str(source)]
    with subprocess.Popen(words, stdout=write_end, stderr=subprocess.DEVNULL) as process:
        os.close(write_end)
        wait_until(lambda: path.exists() and _answers(tmp_path), "it answers", LIMIT)
        process.terminate()
        assert process.wait(LIMIT) in (0, 120)  # Python says 120 for what it cannot flush


def test_vsock(source: Path) -> None:
    """It can be listened at. (That a guest comes by it takes a guest.)"""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        except OSError:
            pytest.skip("this kernel has no vsock")
        port = probe.getsockname()[1]
    with running("--listen", f"vsock:{port}", source) as process:
        assert process.address() == Address("vsock", "", port)
        code, log = process.end()
    assert code == 0
    assert "whoever connects may act as" in log


# What a service manager hands over


def listener_at(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_a_socket_that_is_handed_over(tmp_path: Path, source: Path) -> None:
    with listener_at(tmp_path / "socket") as listener:
        fd = listener.fileno()
        with running("--listen", f"fd:{fd}", source, pass_fds=[fd]) as process:
            assert process.address() == Address("fd", "", fd)
            with Client.to(Address("unix", str(tmp_path / "socket"))) as c:
                assert read(c) == b"hello"
            assert process.end()[0] == 0
    assert (tmp_path / "socket").exists()


def test_a_socket_that_is_handed_over_and_open_to_other_machines(source: Path) -> None:
    """The log says so, as of an address; but not of one for this machine alone."""
    for host, is_open in (("0.0.0.0", True), ("127.0.0.1", False)):
        with socket.create_server((host, 0)) as listener:
            fd = listener.fileno()
            with running("--listen", f"fd:{fd}", source, pass_fds=[fd]) as process:
                process.address()
                _, log = process.end()
        assert ("open to every machine" in log) == is_open
        assert "whoever connects may act as" in log


def test_a_descriptor_that_is_given_twice(source: Path) -> None:
    done = run("-f", "--listen", "fd:9", "--listen", "tcp:0", "--listen", "fd:9", source)
    assert done.returncode == ExitCode.USAGE
    assert "--listen fd:9: is given twice" in done.stderr


def test_a_connection_that_is_handed_over(source: Path) -> None:
    """With its end the server ends."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    with running("--listen", f"fd:{fd}", source, pass_fds=[fd]) as process:
        theirs.close()
        process.address()
        with Client(ours) as c:
            c.start()
            assert read(c) == b"hello"
        assert process.popen.wait(LIMIT) == 0


def activate(source: str, path: str, notify: str, *words: str) -> None:
    """Become a server that systemd has started: descriptor 3 is the socket."""
    listener = listener_at(Path(path))
    os.dup2(listener.fileno(), 3)
    environment = {
        **os.environ,
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "1",
        "XDG_RUNTIME_DIR": str(Path(path).parent),
        "NOTIFY_SOCKET": notify,
    }
    os.execve(sys.executable, [*COMMAND, *(words or ("-f",)), source], environment)


def test_socket_activation(tmp_path: Path, source: Path) -> None:
    """By LISTEN_FDS, with READY=1 and STOPPING=1 for the service manager."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(LIMIT)
        words = (str(source), str(path), str(tmp_path / "notify"))
        with Child(activate, *words) as child:
            assert manager.recv(100) == b"READY=1"
            with Client.to(Address("unix", str(path)), starts=False) as c:
                c.call("Tversion", 8192, b"9P2000.L", tag=NOTAG)
                os.kill(child.pid, signal.SIGTERM)
                assert manager.recv(100) == b"STOPPING=1"
                assert child.wait() == 0
    assert path.exists()


def test_socket_activation_of_a_daemon(tmp_path: Path, source: Path) -> None:
    """The sockets are for whom systemd has started, and for the daemon that it leaves behind."""
    path, log = tmp_path / "socket", tmp_path / "log"
    with Child(activate, str(source), str(path), "", "--log", str(log)) as child:
        assert child.wait() == 0
        daemon = int(re.findall(r" \[(\d+)\] ", log.read_text())[-1])
        try:
            assert daemon != child.pid
            with Client.to(Address("unix", str(path))) as c:
                assert read(c) == b"hello"
        finally:
            os.kill(daemon, signal.SIGTERM)
        wait_until(lambda: "ended" in log.read_text(), "the daemon ends", LIMIT)


def serve_stuck(source: str, path: str) -> None:
    """A server whose statfs never comes back, once it has begun."""

    def stuck(_: object) -> None:
        Path(f"{path}-begun").touch()
        signal.pause()

    os.statvfs = stuck  # type: ignore[assignment]
    signals._TOGETHER = 60.0
    export.serve(Settings(source, "", listen=(f"unix:{path}",)), lambda: None)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], ExitCode.INTERNAL),
        ([signal.SIGTERM, signal.SIGTERM], ExitCode.INTERNAL),  # together, as of timeout(1)
        ([signal.SIGTERM, signal.SIGINT], 128 + signal.SIGINT),
    ],
)
def test_the_end_of_a_server_whose_requests_are_stuck(
    tmp_path: Path, source: Path, numbers: list[signal.Signals], code: int
) -> None:
    """It ends within seconds; with a second signal at once."""
    path = tmp_path / "socket"
    with Child(serve_stuck, str(source), str(path)) as child:
        wait_until(lambda: path.exists() and _answers(tmp_path), "it answers", LIMIT)
        with Client.to(Address("unix", str(path))) as c:
            c.send("Tstatfs", ROOT, tag=1)
            wait_until((tmp_path / "socket-begun").exists, "it is stuck", LIMIT)
            for number in numbers:
                os.kill(child.pid, number)
                c.is_hung_up()
            assert child.wait() == code
    assert not path.exists()
