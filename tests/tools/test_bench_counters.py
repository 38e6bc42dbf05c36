"""What the benchmark counts of a run: context switches and system calls, server's and clients'."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import wait_until

from ninefuse.bench import BenchError, Process, Processes, counters
from ninefuse.bench.counters import Meter, Spent, why_not_calls

COUNT = 5000
LIMIT = 60.0

counts = pytest.mark.skipif(bool(why_not_calls()), reason=f"system calls: {why_not_calls()}")

# For each line that it reads it makes COUNT calls in this thread and COUNT in a new one.
SERVER = f"""
import os, sys, threading
def work():
    for _ in range({COUNT}):
        os.getppid()
asked, answers = sys.argv[1:]
def serve():
    while True:
        with open(asked) as lines:
            for line in lines:
                work()
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
        with open(answers, "w") as file:
            file.write("done")
threading.Thread(target=serve).start()
"""


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture
def server(processes: Processes, tmp_path: Path) -> Process:
    for name in ("asked", "answers"):
        os.mkfifo(tmp_path / name)
    words = (str(tmp_path / "asked"), str(tmp_path / "answers"))
    server = processes.start([sys.executable, "-I", "-S", "-c", SERVER, *words], os.environ)
    wait_until(lambda: len(server.threads()) == 2, "the server's thread", LIMIT)
    return server


def ask(tmp_path: Path) -> list[str]:
    return ["sh", "-c", f'echo >"{tmp_path}/asked"; cat "{tmp_path}/answers"']


def calling(count: int) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", f"import os\nfor _ in range({count}): os.getppid()"]


@counts
def test_calls_are_those_of_the_clients_and_their_children(processes: Processes) -> None:
    """Not this process's own: what the same program takes without them is what is beside them."""
    counted = []
    for number in (0, COUNT):
        with Meter("here", None, calls=True) as meter:
            for _ in range(COUNT):
                os.getppid()
            words = ["sh", "-c", '"$@"; exit', "sh", *calling(number)]
            both = meter.read([processes.run(words, LIMIT)])
        assert both.server == Spent()
        assert both.clients.calls is not None
        counted.append(both.clients.calls)
    assert 0 < counted[0] < COUNT
    assert COUNT <= counted[1] - counted[0] < 1.1 * COUNT


@counts
def test_calls_are_those_of_all_threads_of_the_server(
    processes: Processes, server: Process, tmp_path: Path
) -> None:
    """Also of one that is begun, and has ended, meanwhile."""
    with Meter("here", server, calls=True) as meter:
        both = meter.read([processes.run(ask(tmp_path), LIMIT)])
    assert both.server.calls is not None
    assert both.clients.calls is not None
    assert 2 * COUNT <= both.server.calls < 2.2 * COUNT
    assert both.clients.calls < COUNT


def test_switches_are_counted_without_any_right(
    processes: Processes, server: Process, tmp_path: Path
) -> None:
    with Meter("here", server) as meter:
        before = meter.read([])
        asked = [processes.run(ask(tmp_path), LIMIT) for _ in range(20)]
        after = meter.read(asked)
    assert (after.server.calls, after.clients.calls) == (None, None)
    # It waits for each question, and whoever asks waits for each answer.
    assert after.server.voluntary - before.server.voluntary >= 20
    assert after.clients.voluntary >= 20
    assert after.clients.voluntary == sum(one.voluntary for one in asked)


def test_where_calls_cannot_be_counted_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "_TRACING", (tmp_path,))
    assert why_not_calls() == "no trace point raw_syscalls:sys_enter (is tracefs mounted?)"
    with pytest.raises(BenchError, match="cannot count system calls"):
        Meter("here", None, calls=True).__enter__()


def test_a_server_that_has_ended_is_told(processes: Processes) -> None:
    server = processes.start(["true"], os.environ)
    assert processes.wait([server], LIMIT)
    with pytest.raises(BenchError, match="mine: the server has ended"):
        Meter("mine", server).__enter__()
