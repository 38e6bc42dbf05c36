"""What the tests of real mounts share: daemons, children, and a watchdog over both.

A daemon always runs in a process of its own, and the test's process may touch the mount.
Should a mount hang, whatever touches it hangs too, and perhaps the whole interpreter with it
(a page fault in mapped memory keeps the GIL). So the one who notices is a third process: the
watchdog, which runs this file. It ends the daemons and aborts their connections when a test
takes too long, or when the tests' process is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

REPO = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds; only a test that fails waits so long
SOAK = os.environ.get("NINEFUSE_SOAK") == "1"  # make soak: what takes longer
SESSION = os.environ.get("NINEFUSE_SESSION") or "native"  # who speaks with the kernel
TEST_LIMIT = 300.0 if SOAK else 60.0  # seconds until the watchdog ends a test's mounts

NINEFUSE = (sys.executable, "-m", "ninefuse")
# The command, with less patience when it ends: what it does then is the same.
HASTY_NINEFUSE = (
    sys.executable,
    "-c",
    "import sys; from ninefuse.command import cli; from ninefuse.process import stopper;"
    " stopper.BUSY_GRACE, stopper.END_GRACE = 1.0, 0.5; sys.exit(cli.main())",
)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH")))),
}

# What must not be in a daemon's log, unless the test expects it.
_COMPLAINT = re.compile(r"Traceback|\b(ERROR|CRITICAL)\b|Exception ignored|Fatal Python")

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


# Waiting


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Poll until the condition holds; fail after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


def errno_of(function: Callable[..., object], *args: object, **kwargs: object) -> int:
    """Call a function and return the errno that it fails with, 0 if it does not."""
    try:
        function(*args, **kwargs)
    except OSError as error:
        return error.errno or -1
    return 0


# Processes


class Child(Generic[T]):
    """A forked child of the tests' process that runs one function, and dies with its parent.

    Use it in a with block, at whose end it is killed if it still runs.
    """

    def __init__(self, function: Callable[..., T], *args: object) -> None:
        self._pipe, their_end = os.pipe()
        self._answer: bytes | None = None
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _answer(their_end, function, args)
        os.close(their_end)

    def __enter__(self) -> Child[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def done(self, seconds: float = 0.0) -> bool:
        """Whether the function has ended, waiting for it that long."""
        if self._answer is None:
            deadline = time.monotonic() + seconds
            parts: list[bytes] = []
            while True:
                left = max(0.0, deadline - time.monotonic())
                if not select.select([self._pipe], [], [], left)[0]:
                    assert not parts, "a child stopped in the middle of its answer"
                    return False
                part = os.read(self._pipe, 1 << 16)
                if not part:
                    self._answer = b"".join(parts)
                    break
                parts.append(part)
                deadline = time.monotonic() + PATIENCE
        return True

    def result(self, seconds: float = PATIENCE) -> T:
        """What the function returned; AssertionError, with its traceback, if it raised."""
        if not self.done(seconds):
            raise TimeoutError(f"a child process did not end within {seconds:g} s")
        status = self.wait()
        if not self._answer:
            raise AssertionError(f"a child process ended with {status} and said nothing")
        succeeded, value = pickle.loads(self._answer)
        if not succeeded:
            raise AssertionError(f"in a child process:\n{value}")
        result: T = value
        return result

    def wait(self) -> int:
        """Collect the process; its exit code, negative for a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pipe)
        return self._status

    def kill(self) -> None:
        """Kill the process with SIGKILL, if it still runs, and collect it."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def _answer(pipe: int, function: Callable[..., object], args: Sequence[object]) -> None:
    """In the child: call the function, send what came of it, and end."""
    code = 1
    try:
        try:
            answer = pickle.dumps((True, function(*args)))
            code = 0
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        while answer:
            answer = answer[os.write(pipe, answer) :]
    finally:
        os._exit(code)


def in_child(function: Callable[..., T], *args: object, seconds: float = PATIENCE) -> T:
    """Call a function in a forked child and return its result."""
    with Child(function, *args) as child:
        return child.result(seconds)


def become(uid: int, groups: Sequence[int] = ()) -> None:
    """Take another user's identity, for good; in a child process."""
    os.setgroups(groups)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that other users get through to, gone at the end.

    Not in tmp_path: a pytest that starts meanwhile closes what is above that.
    """
    with tempfile.TemporaryDirectory() as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        yield path


def run(
    *words: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its exit code, with its output captured.

    Args:
        words: the program and its arguments.
        cwd: where.
        env: its environment; None: one with this checkout on PYTHONPATH.
        seconds: how long it may take.
    """
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env=ENVIRONMENT if env is None else env,
        timeout=seconds,
        check=False,
    )


def call(
    *words: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = PATIENCE,
) -> str:
    """Run a program that must succeed, as `run` does; what it printed."""
    done = run(*words, cwd=cwd, env=env, seconds=seconds)
    said = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{said}"
    return done.stdout


def processes_naming(path: Path) -> list[str]:
    """The command lines of the processes that have a path among their arguments."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(path) in words:
                found.append(f"{directory.name}: {b' '.join(words).decode(errors='replace')}")
    return found


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Let this process collect the exit codes of daemons, as their new parent (prctl(2))."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def exit_code_of_orphan(pid: int, seconds: float = PATIENCE) -> int:
    """Wait for an adopted daemon's end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        collected, status = os.waitpid(pid, os.WNOHANG)
        if collected:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    raise TimeoutError(f"the daemon did not end within {seconds:g} s")


# Mounts


def mount_ids(path: Path) -> list[str]:
    """The devices (major:minor) of what is mounted on a path, the topmost last."""
    # As the kernel writes it: blanks and backslashes in octal.
    wanted = re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", str(path))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return [fields[2] for line in lines if (fields := line.split(" "))[4] == wanted]


def is_mounted(path: Path) -> bool:
    """Whether something is mounted on a path; asks the kernel, never the mount."""
    return bool(mount_ids(path))


def unmount(path: Path) -> None:
    """Unmount as a user would; raises if that is refused."""
    done = run("fusermount3", "-u", path)
    assert done.returncode == 0, done.stderr


def detach(path: Path) -> None:
    """Take whatever is mounted on a path away from it."""
    while is_mounted(path):
        done = run("fusermount3", "-u", "-z", path)
        if done.returncode:
            assert os.geteuid() == 0, done.stderr
            run("umount", "-l", path)


def control_file_system() -> int | None:
    """A descriptor of fusectl's root directory, or None where there is no way to it.

    Where nobody has mounted it, root gets a mount of its own that nobody else sees and that
    ends with the descriptor.
    """
    path = "/sys/fs/fuse/connections"
    with contextlib.suppress(OSError):
        if os.listdir(path):
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    from ninefuse.linux.syscalls import detached_mount

    try:
        return detached_mount(b"fusectl")
    except OSError:
        return None


@dataclass
class Counters:
    """What a daemon says of itself on SIGUSR1."""

    fids: int
    opened: int
    descriptors: int
    node_descriptors: int
    under_way: int
    held_back: int
    text: str = field(repr=False)


class Log:
    """The log of one daemon, as a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = 0
        self._expected: list[str] = []

    def text(self, since: int = 0) -> str:
        """What is in the log, from a byte on."""
        if not self.path.exists():
            return ""
        return self.path.read_bytes()[since:].decode(errors="backslashreplace")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def expect(self, pattern: str) -> None:
        """Lines that match are no complaints, from here on to the next `check`."""
        self._expected.append(pattern)

    def wait_for(self, pattern: str, since: int = 0, seconds: float = PATIENCE) -> re.Match[str]:
        """Wait for a line that matches; return the match."""
        regex = re.compile(pattern, re.MULTILINE)
        wait_until(
            lambda: regex.search(self.text(since)), f"{pattern!r} in the daemon's log", seconds
        )
        match = regex.search(self.text(since))
        assert match is not None
        return match

    def check(self) -> None:
        """Fail if there is a complaint in what has come since the last check."""
        text = self.text(self._seen)
        self._seen = self.size()
        expected, self._expected = self._expected, []
        complaints = [
            line
            for line in text.splitlines()
            if _COMPLAINT.search(line) and not any(re.search(e, line) for e in expected)
        ]
        assert not complaints, f"the daemon's log says:\n{text[-6000:]}"


class Mount:
    """A daemon in the foreground of a process of its own, and its mount.

    Attributes: source, path: the two directories. pid: the daemon's. log: a Log. model: the
    threading model that its command line asks for. is_native: whether the session is our own.
    """

    def __init__(
        self,
        watchdog: Watchdog,
        source: Path,
        path: Path,
        log: Path,
        command: Sequence[str],
        ready: str,
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.source = source
        self.path = path
        self.log = Log(log)
        self.model = command[command.index("--model") + 1] if "--model" in command else "second"
        self.is_native = "pyfuse3" not in command
        self._watchdog = watchdog
        self._exit_code: int | None = None
        with open(log, "ab") as output:
            # In a session of its own, a Ctrl-C in the terminal is for the tests alone: they
            # unmount, and want no daemon that does so already.
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=output,
                stderr=output,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        self.pid = self.process.pid
        watchdog.watch(self.pid, path)
        try:
            wait_until(
                lambda: re.search(ready, self.log.text()) or self.process.poll() is not None,
                f"{ready!r} from {command}",
            )
            if self.process.poll() is not None:
                code = self.process.returncode
                raise AssertionError(f"{command} ended with {code}:\n{self.log.text()}")
        except BaseException:
            self.process.kill()
            self.end()
            raise

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the daemon's end; its exit code."""
        self._exit_code = self.process.wait(seconds)
        return self._exit_code

    def end(self) -> None:
        """Unmount and see that the daemon ends well, unless it has ended already."""
        try:
            if self.process.poll() is None:
                if is_mounted(self.path):
                    done = run("fusermount3", "-u", self.path)
                    if done.returncode:
                        detach(self.path)
                self.wait()
                assert self._exit_code == 0, f"the daemon ended with {self._exit_code}"
        finally:
            if self.process.poll() is None:
                self.process.kill()
            detach(self.path)
            self.process.wait(PATIENCE)
            self._watchdog.forget(self.path)
        wait_until(
            lambda: not processes_naming(self.path), f"the end of all processes of {self.path}"
        )

    def counters(self) -> Counters:
        """Have the daemon log its counters, and read them."""
        since = self.log.size()
        self.signal(signal.SIGUSR1)
        last = self.log.wait_for(
            r"fids: (\d+), (\d+) of them open; descriptors: (\d+), (\d+) of them for nodes\n",
            since,
        )
        text = self.log.text(since)
        requests = re.search(r"(\d+) under way, \d+ queued, (\d+) held back", text)
        assert requests is not None, text
        fids, opened, descriptors, node_descriptors = map(int, last.groups())
        under_way, held_back = map(int, requests.groups())
        return Counters(fids, opened, descriptors, node_descriptors, under_way, held_back, text)

    def status(self, name: str) -> int:
        """A figure from /proc/PID/status, in its own unit."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
        raise KeyError(name)

    def cpu_ticks(self) -> int:
        """The processor time that the daemon has used, in clock ticks."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


@contextlib.contextmanager
def ending(mount: Mount) -> Iterator[Mount]:
    """End a daemon before its source goes."""
    try:
        yield mount
    finally:
        mount.end()


def flags_of_descriptors(pid: int, file: Path) -> list[int]:
    """The open(2) flags of each descriptor that a process has of a file, O_PATH ones not."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.stat(f"/proc/{pid}/fd/{number}").st_ino != file.stat().st_ino:
                continue
            info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
        except OSError:
            continue  # closed meanwhile
        flags = int(info.split("flags:")[1].split()[0], 8)
        if not flags & os.O_PATH:
            found.append(flags)
    return found


def done(mount: Mount, callback: str) -> int:
    """How often a callback has been answered, as the daemon counts it."""
    match = re.search(rf"operations:.*\b{callback} (\d+)", mount.counters().text)
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class Place:
    """A directory of one test's own, on a mount and in its source."""

    mount: Mount
    path: Path  # through the mount
    source: Path  # the same directory, without it


_numbers = itertools.count(1)


@contextlib.contextmanager
def fresh_place(mount: Mount) -> Iterator[Place]:
    """A directory on a mount that tests share; the daemon must be well at its end."""
    name = f"test{next(_numbers)}"
    (mount.source / name).mkdir()
    yield Place(mount, mount.path / name, mount.source / name)
    assert mount.process.poll() is None, f"the daemon is gone:\n{mount.log.text()[-6000:]}"
    mount.log.check()
    shutil.rmtree(mount.source / name)


# The watchdog


class Watchdog:
    """Sees to it that nothing hangs for ever; the tests' end of it.

    Args:
        control: fusectl's root directory, or None: the daemons are only killed then, which
            ends their connections too, but for calls that do not let themselves be killed.
    """

    def __init__(self, control: int | None) -> None:
        self.control = control
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(-1 if control is None else control)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=() if control is None else (control,),
            start_new_session=True,
            bufsize=0,
        )

    def watch(self, pid: int, path: Path) -> None:
        """End this daemon and its mount, too, when a test takes too long."""
        self._say(do="watch", pid=pid, path=str(path))

    def forget(self, path: Path) -> None:
        """The mount is gone."""
        self._say(do="forget", path=str(path))

    def arm(self, seconds: float) -> None:
        """A test begins."""
        self._say(do="arm", seconds=seconds)

    def disarm(self) -> bool:
        """A test is over; whether that was in time."""
        self._say(do="disarm")
        assert self._process.stdout is not None
        return self._process.stdout.readline() == b"in time\n"

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(PATIENCE)

    def _say(self, **message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")


class _Guard:
    """The watchdog's own end, in its process."""

    def __init__(self, control: int) -> None:
        self._control = control
        self._victims: dict[str, int] = {}  # mount point -> pid
        self._deadline: float | None = None
        self._fired = False

    def run(self) -> None:
        buffer = b""
        while True:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if not select.select([0], [], [], left)[0]:
                self._deadline = None
                self._fired = True
                self._end_all()
                continue
            part = os.read(0, 1 << 16)
            if not part:
                break
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))
        self._end_all()

    def _obey(self, message: dict[str, Any]) -> None:
        if message["do"] == "watch":
            self._victims[message["path"]] = message["pid"]
        elif message["do"] == "forget":
            self._victims.pop(message["path"], None)
        elif message["do"] == "arm":
            self._deadline = time.monotonic() + message["seconds"]
            self._fired = False
        else:
            self._deadline = None
            os.write(1, b"too late\n" if self._fired else b"in time\n")

    def _end_all(self) -> None:
        for pid in self._victims.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)  # a last word: the stacks
        if self._victims:
            time.sleep(0.5)
        connections = {path: mount_ids(Path(path)) for path in self._victims}
        for path, pid in self._victims.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            for device in connections[path]:
                abort(self._control, device)
        for path in self._victims:
            for command in (["fusermount3", "-u", "-z", path], ["umount", "-l", path]):
                if is_mounted(Path(path)) and shutil.which(command[0]):
                    subprocess.run(command, check=False, timeout=PATIENCE)
        self._victims.clear()


def abort(control: int, device: str) -> None:
    """Abort the FUSE connection of a mounted device (major:minor)."""
    write_control(control, device, "abort", 1)


def write_control(control: int, device: str, name: str, value: int) -> None:
    """Write a figure into fusectl's directory of a connection, where there is one."""
    with contextlib.suppress(OSError):
        file = os.open(f"{device.split(':')[1]}/{name}", os.O_WRONLY, dir_fd=control)
        try:
            os.write(file, b"%d" % value)
        finally:
            os.close(file)


if __name__ == "__main__":
    _Guard(int(sys.argv[1])).run()
