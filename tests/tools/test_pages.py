"""What follows from the options: help, manual pages, completions, the table of docs/options.md."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mounting import PATIENCE

from ninefuse.command import manual, options
from ninefuse.command.cli import make_parser

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ninefuse", "ninefuse-bench", "ninefuse-serve", "ninefuse-stat")
PAGES = [
    "docs/options.md",
    *(f"share/man/man1/{name}.1" for name in NAMES),
    *(f"share/bash-completion/completions/{name}" for name in NAMES),
    *(f"share/zsh/site-functions/_{name}" for name in NAMES),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all pages as they are to be now."""
    directory = tmp_path_factory.mktemp("pages")
    # A process of its own: docutils opens files that it leaves to the interpreter to close.
    subprocess.run(
        [sys.executable, ROOT / "tools/pages.py", directory], check=True, timeout=PATIENCE
    )
    return directory


def test_every_page_is_looked_at(made: Path) -> None:
    found = (path for path in made.rglob("*") if path.is_file())
    assert {str(path.relative_to(made)) for path in found} == set(PAGES)
    committed = (path for path in (ROOT / "share").rglob("*") if path.is_file())
    assert {str(path.relative_to(ROOT)) for path in committed} < set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_up_to_date(made: Path, name: str) -> None:
    assert (ROOT / name).read_text() == (made / name).read_text(), "run: make pages"


def test_the_options_are_listed_once() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    listed = [
        path.name for path in pages if re.search(r"^\| `(-o )?cache=", path.read_text(), re.M)
    ]
    assert listed == ["options.md"]


def test_every_option_of_the_command_line_is_explained_and_none_else() -> None:
    taken = {word for action in make_parser()._actions for word in action.option_strings}
    explained = {
        word.split(" ")[0] for one in manual.COMMAND_LINE for word in one.words.split(", ")
    }
    assert explained == taken - {"-h", "--help"}  # which whoever reads it has found


def test_every_mount_option_is_explained_and_none_else() -> None:
    explained = {
        word.split("=")[0] + ("=" if "=" in word else "")
        for one in manual.MOUNT
        for word in one.words.split(", ")
    }
    assert explained == {re.sub("=.*", "=", word) for word in options.known_words()}
    for one in manual.MOUNT:
        for word in one.words.split(", "):
            name, _, values = word.partition("=")
            for value in values.split("|") if values else ():
                options.parse_options([f"{name}={value}"])


def test_known_words_are_taken() -> None:
    values = {"fsname=": "x", "subtype=": "x", "threads=": "2"}
    for word in options.known_words():
        options.parse_options([word + (values.get(word, "1") if word.endswith("=") else "")])


def test_what_is_explained_is_in_the_help_and_in_the_page() -> None:
    explanation = " ".join(manual.explanation().split())
    page = man(ROOT / "share/man/man1/ninefuse.1")
    for one in (*manual.COMMAND_LINE, *manual.MOUNT):
        text = manual.plain(one.text())
        assert f"{one.words} {text}" in explanation
        assert text in page, one.words
    help_lines = make_parser().format_help()
    for one in manual.COMMAND_LINE:
        assert one.words in help_lines
        assert manual.plain(one.brief) in help_lines


def man(path: Path) -> str:
    """Return a manual page as text, on one line; fail if it has faults."""
    done = subprocess.run(
        # Long lines, no hyphens and nothing spread out, so that words can be looked for.
        ["groff", "-man", "-Tutf8", "-ww", "-P-cbou", "-rLL=2000n", "-rHY=0", "-dAD=l", path],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stderr == ""
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("name", NAMES)
def test_a_manual_page_has_no_faults_and_all_its_parts(name: str) -> None:
    text = man(ROOT / f"share/man/man1/{name}.1")
    for part in ("SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO"):
        assert f" {part} " in text
    assert f" {name} - " in text


# ---- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("ninefuse --eng\turi\t so\tx", ["--engine", "uring", "source/x"]),
        ("ninefuse --mod\tf\t x", ["--model", "first", "x"]),
        ("ninefuse -o allow_\t x", ["-o", "allow_other", "x"]),
        ("ninefuse -o ro,cac\tlo\t so\tx", ["-o", "ro,cache=loose", "source/x"]),
        ("ninefuse -o fsn\tx y", ["-o", "fsname=x", "y"]),
        ("ninefuse --log no\t so\t ", ["--log", "notes", "source/"]),
        ("ninefuse-bench --wor\tx", ["--workload", "x"]),
        ("ninefuse-stat --js\t so\t", ["--json", "source/"]),
    ],
)
def test_bash_completes(typed: str, words: list[str], tmp_path: Path) -> None:
    """Typed at a prompt, with tabs, as people do."""
    (tmp_path / "source").mkdir()
    (tmp_path / "notes").touch()
    command = typed.split(" ")[0]
    script = ROOT / "share/bash-completion/completions" / command
    setting = f"source '{script}'; {command}() {{ printf '<%s>\\n' END \"$@\" END; exit; }}\n"
    terminal, theirs = pty.openpty()
    child = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "READY:"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        until(terminal, "READY:")
        os.write(terminal, setting.encode())
        until(terminal, "READY:")
        os.write(terminal, typed.encode() + b"\n")
        shown = until(terminal, "<END>\r\n", "<END>\r\n")
    finally:
        child.kill()
        child.wait(PATIENCE)
        os.close(terminal)
    assert re.findall("<(.*)>\r\n", shown)[1:-1] == words, shown


def until(terminal: int, *marks: str) -> str:
    """Read what a terminal shows until all marks have come, in this order."""
    shown = ""
    deadline = time.monotonic() + PATIENCE
    pattern = re.compile(".*".join(map(re.escape, marks)), re.DOTALL)
    while not pattern.search(shown):
        left = deadline - time.monotonic()
        assert left > 0, shown
        assert select.select([terminal], [], [], left)[0], shown
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown
