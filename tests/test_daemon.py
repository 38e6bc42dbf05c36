"""The command waits for its daemon and returns what became of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import wait_until

import ninefuse

LIMIT = 30.0

# Each test gives the body of `serve` and is run in a process of its own, which has, as a daemon
# does, nothing but files to speak through.
SCRIPT = """
import logging, os, signal, sys, time
from pathlib import Path
from ninefuse.process.daemon import run_detached
from ninefuse.exitcodes import ExitCode, Failure

here = Path({here!r})
deadline = time.monotonic() + {limit}

def wait_for(condition):
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def write(name, text):
    (here / ("." + name)).write_text(str(text))
    (here / ("." + name)).rename(here / name)

def serve(ready):
    write("pid", os.getpid())
{body}

{before}
code = run_detached(serve)
with open(here / "returned", "a") as returned:
    print(os.getpid(), file=returned)
sys.exit(code)
"""


class Command:
    """Runs scripts with a given body of serve, and ends what they leave behind."""

    def __init__(self, here: Path) -> None:
        self.here = here

    def start(
        self, body: str, before: str = "", wrapper: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        indented = "\n".join("    " + line for line in body.strip("\n").splitlines())
        script = SCRIPT.format(here=str(self.here), limit=LIMIT, body=indented, before=before)
        package = Path(str(ninefuse.__file__)).resolve().parent
        return subprocess.Popen(
            [*wrapper, sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.here,
            env={
                **os.environ,
                "PYTHONPATH": str(package.parent),
                "PYTHONDONTWRITEBYTECODE": "1",
                # Empty is unset: what is buffered at the fork is one of the things tested.
                "PYTHONUNBUFFERED": "",
            },
        )

    def run(
        self, body: str, before: str = "", wrapper: tuple[str, ...] = ()
    ) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr, which end only when the daemon lets go of them."""
        with self.start(body, before, wrapper) as process:
            try:
                out, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        return process.returncode, out, err

    def read(self, name: str) -> str:
        """Return what the script wrote under that name, once it is there."""
        wait_until((self.here / name).exists, f"a file {name}", LIMIT)
        return (self.here / name).read_text()

    @property
    def pid(self) -> int:
        return int(self.read("pid"))


def is_gone(pid: int) -> bool:
    """Return whether the process has ended; a zombie that nobody collects has."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    yield Command(tmp_path)
    for name in ("pid", "helper"):
        if (tmp_path / name).exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((tmp_path / name).read_text()), signal.SIGKILL)


def test_the_command_returns_once_ready_and_the_daemon_goes_on(command: Command) -> None:
    code, out, err = command.run(
        """
print("stdin", os.readlink("/proc/self/fd/0"))
print("cwd", os.getcwd())
sys.stdout.flush()
os.write(2, b"a word of libfuse\\n")
ready()
ready()
wait_for((here / "stop").exists)
write("end", "served to the end")
return 0
"""
    )
    assert code == 0
    assert out == "stdin /dev/null\ncwd /\n"
    assert err == "a word of libfuse\n"
    pid = command.pid
    assert os.getsid(pid) == pid
    for descriptor in (0, 1, 2):
        assert os.readlink(f"/proc/{pid}/fd/{descriptor}") == os.devnull
    (command.here / "stop").touch()
    assert command.read("end") == "served to the end"
    wait_until(lambda: is_gone(pid), "the end of the daemon", LIMIT)


def test_only_the_parent_returns_to_the_caller(command: Command) -> None:
    code, out, _ = command.run(
        """
ready()
return 0
""",
        before="import atexit; atexit.register(lambda: os.write(1, b'exit handler\\n'))\n"
        "sys.stdout.write('buffered before the fork\\n')",
    )
    assert code == 0
    wait_until(lambda: is_gone(command.pid), "the end of the daemon", LIMIT)
    assert out == "buffered before the fork\nexit handler\n"
    assert len(command.read("returned").split()) == 1
    assert int(command.read("returned")) != command.pid


def test_a_failure_keeps_its_code_and_its_line(command: Command) -> None:
    code, out, err = command.run('raise Failure(ExitCode.MOUNT_REFUSED, "refused\\nby caf\u00e9")')
    assert code == 16
    assert out == ""
    assert err == "ninefuse: refused\\nby caf\u00e9\n"
    assert is_gone(command.pid)


def test_warnings_of_the_start_reach_the_caller(command: Command) -> None:
    code, out, err = command.run(
        """
log = logging.getLogger("ninefuse.test")
log.setLevel(logging.INFO)
log.info("started")
log.warning("no %s", "suid\\n")
log.error("told as the failure that it leads to")
ready()
log.warning("later")
return 0
"""
    )
    assert (code, out) == (0, "")
    assert err == "ninefuse: no suid\\n\n"


def test_what_the_caller_has_printed_is_not_printed_twice(command: Command) -> None:
    # The child's stdout is still the caller's when it fails.
    code, out, _ = command.run(
        "raise Failure(ExitCode.MOUNT_REFUSED, 'no')",
        before="sys.stdout.write('buffered before the fork\\n')",
    )
    assert (code, out) == (16, "buffered before the fork\n")


def test_a_long_message_arrives_whole(command: Command) -> None:
    code, _, err = command.run('raise Failure(ExitCode.MOUNT_REFUSED, "x" * 200_000)')
    assert code == 16
    assert err == "ninefuse: " + "x" * 200_000 + "\n"


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("raise ValueError('no such luck')", "ValueError: no such luck"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_any_other_exception_is_named_and_its_traceback_logged(
    command: Command, statement: str, named: str
) -> None:
    code, _, err = command.run(
        f"""
logging.basicConfig(filename=here / "log")
{statement}
"""
    )
    assert code == 1
    assert err.startswith(f"ninefuse: internal error: {named}")
    assert err.count("\n") == 1
    assert "Traceback" in command.read("log")


@pytest.mark.parametrize(
    ("statement", "how"),
    [
        ("os._exit(7)", "exit status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("return 0", "exit code 0"),
        ("return 143", "exit code 143"),
    ],
)
def test_a_daemon_that_ends_too_early(command: Command, statement: str, how: str) -> None:
    code, _, err = command.run(statement)
    assert code == 1
    assert err.startswith("ninefuse: the daemon ended before the mount answered")
    assert how in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("end", ["raise Failure(ExitCode.INTERNAL, 'too late')", "1 / 0"])
def test_after_ready_the_log_is_told(command: Command, end: str) -> None:
    code, _, err = command.run(
        f"""
logging.basicConfig(filename=here / "log")
ready()
{end}
"""
    )
    assert (code, err) == (0, "")
    wait_until(lambda: is_gone(command.pid), "the end of the daemon", LIMIT)
    assert ("too late" in command.read("log")) or ("ZeroDivisionError" in command.read("log"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_waiting_command_ends_both(command: Command, number: int) -> None:
    with command.start("time.sleep(60)") as process:
        pid = command.pid
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + number
    assert err == ""
    assert is_gone(pid)


def test_the_command_waits_while_the_daemon_cleans_up(command: Command) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda number, frame: write("stopping", ""))
write("armed", "")
wait_for((here / "stopping").exists)
time.sleep(0.5)
write("clean", "")
return 0
"""
    with command.start(body) as process:
        command.read("armed")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
        assert (command.here / "clean").exists()
    assert process.returncode == 128 + signal.SIGINT


def test_a_ctrl_c_while_starting_comes_to_the_daemon_once(command: Command) -> None:
    """By the command: until it is ready it is in the terminal's process group itself."""
    body = """
write("group", os.getpgrp())
signal.signal(signal.SIGTERM, lambda number, frame: write("stopping", ""))
write("armed", "")
wait_for((here / "stopping").exists)
write("clean", "")
return 0
"""
    with command.start(body, wrapper=("setsid",)) as process:
        command.read("armed")
        assert int(command.read("group")) == process.pid
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=LIMIT)
        assert (command.here / "clean").exists()
    assert process.returncode == 128 + signal.SIGINT


def test_an_interrupt_is_one_again_once_it_is_ready(command: Command) -> None:
    body = """
ready()
try:
    write("armed", "")
    time.sleep(60)
except KeyboardInterrupt:
    write("interrupted", "")
return 0
"""
    with command.start(body) as process:
        command.read("armed")
        os.kill(command.pid, signal.SIGINT)
        assert command.read("interrupted") == ""
        process.communicate(timeout=LIMIT)


def test_a_second_signal_waits_no_longer(command: Command) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda number, frame: write("stopping", ""))
write("armed", "")
time.sleep(60)
"""
    with command.start(body) as process:
        command.read("armed")
        process.send_signal(signal.SIGINT)
        command.read("stopping")
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=LIMIT) == 128 + signal.SIGINT
        assert time.monotonic() - start < 5
        os.kill(command.pid, signal.SIGKILL)


def test_an_ignored_signal_stays_ignored(command: Command) -> None:
    body = """
wait_for((here / "go").exists)
ready()
return 0
"""
    with command.start(body, "signal.signal(signal.SIGINT, signal.SIG_IGN)") as process:
        assert command.pid
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        (command.here / "go").touch()
        process.communicate(timeout=LIMIT)
    assert process.returncode == 0


def test_the_daemon_has_the_signal_mask_of_its_caller(command: Command) -> None:
    code, out, _ = command.run(
        """
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
sys.stdout.flush()
ready()
return 0
"""
    )
    assert (code, out) == (0, "set()\n")


def test_the_daemon_does_not_mind_that_the_command_has_died(command: Command) -> None:
    body = """
parent = os.getppid()
write("waiting", "")
wait_for(lambda: os.getppid() != parent)
ready()
write("end", "alive")
return 0
"""
    with command.start(body) as process:
        command.read("waiting")
        process.kill()
        process.communicate(timeout=LIMIT)
    assert command.read("end") == "alive"
    assert not (command.here / "returned").exists()


@pytest.mark.parametrize(
    ("end", "expected"),
    [("ready(); return 0", 0), ("raise Failure(ExitCode.MOUNT_REFUSED, 'no')", 16)],
)
def test_a_forked_helper_that_holds_the_pipe_delays_nobody(
    command: Command, end: str, expected: int
) -> None:
    start = time.monotonic()
    code, _, _ = command.run(
        f"""
helper = os.fork()
if helper == 0:
    os.close(1)
    os.close(2)
    time.sleep(60)
    os._exit(0)
write("helper", helper)
{end}
"""
    )
    assert code == expected
    assert time.monotonic() - start < 20


def test_standard_streams_closed_by_the_caller(command: Command) -> None:
    closing = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    code, _, _ = command.run(
        """
ready()
write("streams", [os.readlink(f"/proc/self/fd/{number}") for number in range(3)])
sys.stderr.flush()
write("end", "no error")
return 0
""",
        before="from ninefuse.process.daemon import open_standard_streams; open_standard_streams()",
        wrapper=closing,
    )
    assert code == 0
    assert command.read("streams") == str([os.devnull] * 3)
    assert command.read("end") == "no error"
