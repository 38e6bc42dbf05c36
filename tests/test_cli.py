"""The command line: what it takes, what it prints, and which exit code it returns."""

import importlib.util
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import ninefuse
from ninefuse.command import cli, preflight
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.process import daemon, logs
from ninefuse.settings import Settings

Serve = Callable[[Settings, Callable[[], None]], int]


class FakeMount(types.ModuleType):
    """Stands for ninefuse.serve: calls ready, and remembers the settings."""

    def __init__(self) -> None:
        super().__init__("ninefuse.serve")
        self.served: list[Settings] = []
        self.outcome: int | BaseException = 0

    def serve(self, settings: Settings, ready: Callable[[], None]) -> int:
        self.served.append(settings)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        ready()
        return self.outcome


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> FakeMount:
    """Replace the mount, the checks and the set-up of logging."""
    fake = FakeMount()
    monkeypatch.setitem(sys.modules, "ninefuse.serve", fake)
    monkeypatch.setattr(ninefuse, "serve", fake, raising=False)  # where it has been imported
    monkeypatch.setattr(ninefuse, "mount", fake, raising=False)
    monkeypatch.setattr(preflight, "check", lambda settings: settings)
    monkeypatch.setattr(logs, "configure", lambda settings, daemon: None)
    return fake


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Replace the fork: serve runs in this process. Return whether ready was called, per run."""
    runs: list[bool] = []

    def run_detached(serve: Callable[[Callable[[], None]], int], program: str) -> int:
        runs.append(False)

        def ready() -> None:
            runs[-1] = True

        return serve(ready)

    monkeypatch.setattr(daemon, "run_detached", run_detached)
    return runs


@pytest.mark.parametrize(
    "argv",
    [
        ["-o", "ro", "--threads", "3", "/s", "/m"],
        ["/s", "/m", "-o", "ro", "--threads", "3"],
        ["/s", "-o", "ro", "--threads", "3", "/m"],
        ["-o", "ro", "/s", "--threads=3", "/m"],
        ["-oro", "--threads=3", "--", "/s", "/m"],
    ],
)
def test_options_stand_before_between_or_after_the_paths(argv: list[str]) -> None:
    settings = cli.parse(argv)
    assert (settings.source, settings.mountpoint) == ("/s", "/m")
    assert settings.read_only
    assert settings.threads == 3


def test_defaults() -> None:
    settings = cli.parse(["/s", "/m"])
    assert settings.model == "second"
    assert settings.threads == 16
    assert settings.log_level == "info"
    assert not settings.foreground
    assert not settings.debug


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = cli.parse(["-f", "-s", "--log", "l", "--log-level", "error", "s", "m"])
    assert settings.foreground
    assert not settings.debug
    assert settings.model == "none"
    assert settings.log_level == "error"
    assert settings.log_file == str(tmp_path / "l")
    assert settings.source == str(tmp_path / "s")
    debug = cli.parse(["-d", "s", "m"])
    assert debug.debug
    assert debug.foreground


def test_o_is_repeatable_and_the_command_line_wins() -> None:
    settings = cli.parse(["-o", "ro,model=none", "-o", "rw,threads=4", "/s", "/m"])
    assert not settings.read_only
    assert (settings.model, settings.threads) == ("none", 4)
    assert cli.parse(["--model", "first", "-o", "model=none", "/s", "/m"]).model == "first"
    assert cli.parse(["-s", "-o", "model=first", "/s", "/m"]).model == "none"
    assert cli.parse(["--threads", "9", "-o", "threads=4", "/s", "/m"]).threads == 9


def test_as_mount_fuse_calls_it() -> None:
    settings = cli.parse(["/s", "/m", "-o", "rw,noexec,x-systemd.automount,_netdev,dev,suid"])
    assert {"dev", "suid", "noexec"} < set(settings.mount_options)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "SRC, MNT"),
        (["/s"], "MNT"),
        (["/s", "/m", "/x"], "/x"),
        (["--bogus", "/s", "/m"], "--bogus"),
        (["--thr", "3", "/s", "/m"], "--thr"),
        (["--threads", "0", "/s", "/m"], "--threads"),
        (["--threads", "many", "/s", "/m"], "--threads"),
        (["--model", "third", "/s", "/m"], "--model"),
        (["--log-level", "loud", "/s", "/m"], "--log-level"),
        (["-o", "bogus", "/s", "/m"], "bogus"),
        (["-o"], "-o"),
        (["", "/m"], "SRC"),
        (["/s", ""], "MNT"),
    ],
)
def test_a_usage_error_is_one_line_with_a_hint(
    argv: list[str], named: str, mount: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ninefuse: ")
    assert named in err
    assert err.endswith("(see ninefuse --help)\n")
    assert err.count("\n") == 1
    assert mount.served == []


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_fits_a_screen_and_shows_the_three_commands(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    commands = [line.strip() for line in lines[lines.index("examples:") + 1 :]]
    assert commands[0].startswith("ninefuse /")
    assert commands[1].startswith("dd ")
    assert commands[2].startswith("fusermount3 -u /")


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_versions_one_a_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    versions = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    names = ["ninefuse", "pyfuse3", "libfuse", "Python", "trio", "kernel", "compiled"]
    assert list(versions) == names
    assert versions["ninefuse"] == ninefuse.__version__
    assert versions["pyfuse3"][0].isdigit()
    assert versions["libfuse"].startswith("3.")
    assert versions["Python"] == platform.python_version()
    assert versions["trio"][0].isdigit()
    assert versions["kernel"] == os.uname().release
    assert {"fuse._wire", "fuse._role"} <= set(versions["compiled"].split())


def test_versions_say_so_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.versions().splitlines()[-1] == "compiled nothing"


def test_versions_without_pyfuse3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyfuse3", None)
    assert cli.main(["-V"]) == 0
    assert "libfuse unknown" in capsys.readouterr().out.splitlines()


def test_a_failed_check_keeps_its_code_and_mounts_nothing(
    mount: FakeMount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(settings: Settings) -> None:
        raise Failure(ExitCode.NO_FUSE_DEVICE, "no device")

    monkeypatch.setattr(preflight, "check", check)
    assert cli.main(["/s", "/m"]) == 12
    assert capsys.readouterr().err == "ninefuse: no device\n"
    assert mount.served == []


def test_the_checks_see_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path / "none"), str(tmp_path)]) == ExitCode.SOURCE_MISSING
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_foreground_serves_in_this_process(mount: FakeMount, detached: list[bool]) -> None:
    assert cli.main(["-f", "/s", "/m"]) == 0
    assert mount.served == [cli.parse(["-f", "/s", "/m"])]
    assert detached == []


def test_otherwise_a_daemon_serves(mount: FakeMount, detached: list[bool]) -> None:
    assert cli.main(["/s", "/m"]) == 0
    assert mount.served == [cli.parse(["/s", "/m"])]
    assert detached == [True]


@pytest.mark.parametrize(
    ("flags", "started", "speaks"),
    [
        ([], None, True),
        ([], "us", True),
        ([], "1", False),
        (["-f"], "1", True),
    ],
)
def test_a_daemon_speaks_to_a_service_manager_that_has_started_it_and_nobody_else(
    mount: FakeMount,
    detached: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    started: str | None,
    speaks: bool,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    if started is not None:
        monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()) if started == "us" else started)
    assert cli.main([*flags, "/s", "/m"]) == 0
    assert ("NOTIFY_SOCKET" in os.environ) == speaks


@pytest.mark.parametrize(("flags", "as_daemon"), [(["-f"], False), (["-d"], False), ([], True)])
def test_logging_is_set_up_where_it_serves(
    mount: FakeMount,
    detached: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    as_daemon: bool,
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(logs, "configure", lambda settings, daemon: calls.append(daemon))
    cli.main([*flags, "/s", "/m"])
    assert calls == [as_daemon]


@pytest.mark.parametrize("flags", [["-f"], []])
def test_a_refused_mount(
    mount: FakeMount, detached: list[bool], capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    mount.outcome = Failure(ExitCode.MOUNT_REFUSED, "refused")
    assert cli.main([*flags, "/s", "/m"]) == 16
    assert capsys.readouterr().err == "ninefuse: refused\n"


def test_the_exit_code_of_serve_is_returned(mount: FakeMount) -> None:
    mount.outcome = 143
    assert cli.main(["-f", "/s", "/m"]) == 143


def test_an_unexpected_error_is_named_and_logged(
    mount: FakeMount, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    mount.outcome = ZeroDivisionError("by\nnothing")
    assert cli.main(["-f", "/s", "/m"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == r"ninefuse: internal error: ZeroDivisionError: by\nnothing"
    assert "Traceback" in caplog.text


def test_an_interrupt(mount: FakeMount) -> None:
    mount.outcome = KeyboardInterrupt()
    assert cli.main(["-f", "/s", "/m"]) == 130


def test_a_missing_library_is_named(
    mount: FakeMount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(ninefuse, "mount")
    monkeypatch.setitem(sys.modules, "ninefuse.serve", None)
    monkeypatch.delattr(ninefuse, "serve", raising=False)
    assert cli.main(["/s", "/m"]) == 1
    err = capsys.readouterr().err
    assert "ninefuse" in err
    assert "install pyfuse3 and trio" in err
    assert err.count("\n") == 1


def test_a_mount_that_listens_nowhere_loads_no_trio() -> None:
    """It takes as long to load as all the rest, and a third of the memory."""
    program = "import sys, ninefuse.serve, ninefuse.fuse.native; print('trio' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert out.stdout == b"False\n"


def test_argv_comes_from_the_process(
    mount: FakeMount, detached: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ninefuse", "/s", "/m"])
    assert cli.main() == 0
    assert mount.served[0].mountpoint == "/m"


def test_the_documented_exit_codes() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "INTERNAL": 1,
        "USAGE": 2,
        "SOURCE_MISSING": 3,
        "SOURCE_NOT_DIRECTORY": 4,
        "SOURCE_UNREADABLE": 5,
        "MOUNTPOINT_MISSING": 6,
        "MOUNTPOINT_NOT_DIRECTORY": 7,
        "MOUNTPOINT_DEAD": 8,
        "SAME_DIRECTORY": 9,
        "MOUNTPOINT_INSIDE_SOURCE": 10,
        "SOURCE_INSIDE_MOUNTPOINT": 11,
        "NO_FUSE_DEVICE": 12,
        "FUSE_DEVICE_DENIED": 13,
        "NO_FUSERMOUNT": 14,
        "ALLOW_OTHER_DENIED": 15,
        "MOUNT_REFUSED": 16,
        "LISTENING_REFUSED": 17,
    }
