"""The threading model of docs/new-model.md, as it stands there, does what all of them must."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import test_executor
from mounting import ENVIRONMENT, NINEFUSE, REPO, Mount, run, wait_until

from ninefuse import executor
from ninefuse.driving import plugin
from ninefuse.exitcodes import ExitCode
from ninefuse.stats import ATTRIBUTE

MODEL = "thread_per_request:ThreadPerRequest"

# Those of the drivers' tests that are not about which thread does what, or when it begins.
SHARED = (
    "test_results_come_back",
    "test_keywords_reach_the_call",
    "test_errors_come_back",
    "test_an_error_does_not_come_back_twice",
    "test_stop_iteration_of_a_call_is_an_error",
    "test_awaiting_something_foreign_is_a_type_error",
    "test_a_cancelled_caller_does_not_stop_a_started_body",
    "test_a_caller_cancelled_beforehand_is_served_all_the_same",
    "test_close_finishes_what_was_deferred_and_started_in_the_background",
    "test_close_without_any_request",
    "test_close_of_an_unused_executor",
)


def example() -> str:
    """The module in the page."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (REPO / "docs/new-model.md").read_text(), re.M | re.S
    )
    return str(code)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the module, where this process and its daemons find it."""
    directory = tmp_path / "modules"
    directory.mkdir()
    (directory / "thread_per_request.py").write_text(example())
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{directory}:{ENVIRONMENT['PYTHONPATH']}")
    yield directory
    sys.modules.pop("thread_per_request", None)


def test_it_is_about_thirty_lines() -> None:
    code = example().partition("class ")[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("name", SHARED)
def test_it_passes_the_tests_of_the_other_drivers(name: str, directory: Path) -> None:
    test: Callable[..., Any] = getattr(test_executor, name)
    assert list(inspect.signature(test).parameters) == ["model"]
    test(MODEL)


def test_a_mount_with_it(directory: Path, new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("--model", MODEL)

    def use(number: int) -> None:
        one = mount.path / f"directory{number}"
        one.mkdir()
        for name in ("a", "b"):
            (one / name).write_bytes(name.encode() * 100_000)
        (one / "b").rename(one / "c")
        assert (one / "c").read_bytes() == b"b" * 100_000
        (one / "a").unlink()
        assert [path.name for path in one.iterdir()] == ["c"]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(40)))
    assert len(list(mount.source.iterdir())) == 40
    assert json.loads(os.getxattr(mount.path, ATTRIBUTE))["model"] == "thread-per-request"


def test_what_a_quiet_mount_has_deferred_is_made(
    directory: Path, new_mount: Callable[..., Mount]
) -> None:
    """A release makes no call, and may be the last request for long."""
    mount = new_mount("--model", MODEL)
    with open(mount.path / "gone", "wb") as file:
        file.write(b"x")
        (mount.path / "gone").unlink()
    wait_until(lambda: not any("gone" in path for path in descriptors(mount)), "the close")


def descriptors(mount: Mount) -> list[str]:
    """What the daemon has open."""
    found = []
    for name in os.listdir(f"/proc/{mount.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{mount.pid}/fd/{name}"))
    return found


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("no_such_module:Class", "No module named 'no_such_module'"),
        ("thread_per_request:Nothing", "has no attribute 'Nothing'"),
        ("thread_per_request:Request", "is no subclass of"),
        ("thread_per_request:Thread", "is no subclass of"),
    ],
)
def test_a_model_that_is_not_there(model: str, reason: str, directory: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        plugin.make(model, 1, executor.Executor)


WHOLE = """
from ninefuse.executor import NoThreading as Base
class Model(Base):
    model = "mine"
    def __init__(self, threads):
        super().__init__()
"""
BARE = WHOLE.replace("NoThreading", "Executor")  # all else is abstract


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def Model(threads): pass", "Model is no subclass of ninefuse.executor.Executor"),
        ("class Model: pass", "Model is no subclass of ninefuse.executor.Executor"),
        ("raise LookupError('where?')", "own cannot be imported: LookupError: where?"),
        ("class Model(: pass", "own cannot be imported: SyntaxError: "),
        ("import no_such_module", "No module named 'no_such_module'"),
        (BARE, "Model lacks close, drive, resume"),
        (f"{BARE}    def drive(self, request): pass", "Model lacks close, resume"),
        (
            WHOLE + "    async def drive(self, request): pass",
            "Model.drive is a coroutine: begin it with def",
        ),
        (
            WHOLE.replace('"mine"', "None"),
            "Model lacks model, its name for the log and for ninefuse-stat",
        ),
        (WHOLE.replace("__init__(self", "begin(self"), "Model lacks __init__(self, threads)"),
        (WHOLE.replace(", threads", ""), "Model(3) fails: TypeError: "),
        (WHOLE.replace("super().__init__()", "1 / 0"), "Model(3) fails: ZeroDivisionError: "),
        (
            WHOLE.replace("super().__init__()", "pass"),
            "Model.statistics() fails: AttributeError: ",
        ),
    ],
)
def test_what_is_no_model_is_refused_before_the_mount(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(ValueError, match=re.escape(reason)):
        plugin.make("own:Model", 3, executor.Executor)
    sys.modules.pop("own", None)


def test_what_is_no_model_is_a_usage_error_in_one_line(directory: Path, mountpoint: Path) -> None:
    (directory / "own.py").write_text(BARE)
    done = run(*NINEFUSE, "--model", "own:Model", directory, mountpoint)
    assert (done.returncode, done.stderr) == (
        ExitCode.USAGE,
        "ninefuse: --model own:Model: Model lacks close, drive, resume\n",
    )


def test_a_model_that_is_not_there_is_a_usage_error(directory: Path, mountpoint: Path) -> None:
    done = run(*NINEFUSE, "--model", "no_such_module:Class", directory, mountpoint)
    reason = "--model no_such_module:Class: No module named 'no_such_module'"
    assert (done.returncode, done.stderr) == (
        ExitCode.USAGE,
        f"ninefuse: {reason}\n",
    )


@pytest.mark.parametrize("words", [("--model", "a:"), ("--model", "a.b"), ("-o", f"model={MODEL}")])
def test_what_names_no_model(words: tuple[str, str], directory: Path, mountpoint: Path) -> None:
    done = run(*NINEFUSE, *words, directory, mountpoint)
    assert done.returncode == ExitCode.USAGE
    assert "choose one of none, first, second" in done.stderr
