"""The pages that follow from the options: manual pages, completions, the table of docs/options.md.

    .venv/bin/python tools/pages.py [DIRECTORY]

writes them anew, below the checkout or another directory. They are committed, so that the wheel is
built without the libraries that are needed here; tests/tools/test_pages.py fails if they are out
of date.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import docutils.core
import shtab
from docutils.writers import manpage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ninefuse  # noqa: E402
from ninefuse.bench import command as bench  # noqa: E402
from ninefuse.command import cli, manual, options, server, servermanual  # noqa: E402
from ninefuse.settings import MODELS  # noqa: E402
from ninefuse.stats import command as stats  # noqa: E402

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "ninefuse": cli.make_parser,
    "ninefuse-bench": bench.make_parser,
    "ninefuse-serve": server.make_parser,
    "ninefuse-stat": stats.make_parser,
}

# What is offered after -o, where a word after a comma is completed by itself. For bash a word
# ends at =, too, which shtab knows nothing of: it gets them whole.
WORDS = {"ninefuse": options.known_words(), "ninefuse-serve": server.known_words()}
_BASH_WORDS = """\
_@NAME@_mount_options() {
    local before=
    case $1 in *,*) before=${1%,*}, ;; esac
    compgen -P "$before" -W "@WORDS@" -- "${1##*,}"
}
"""
_BASH_WHOLE_WORDS = """
_@NAME@() {
    local line=${COMP_LINE:0:COMP_POINT} COMP_CWORD
    local -a COMP_WORDS
    read -a COMP_WORDS <<<"$line"
    if [[ $line == *' ' ]]; then COMP_WORDS+=(""); fi
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_@NAME@
    if [[ ${COMPREPLY[*]} == *= ]]; then compopt -o nospace; fi
    if [[ ${COMPREPLY[*]} == *=* ]]; then compopt +o filenames; fi
    if [[ ${COMP_WORDS[COMP_CWORD]} == *=* ]]; then COMPREPLY=("${COMPREPLY[@]##*=}"); fi
}
complete -o filenames -F _@NAME@ @COMMAND@
"""
_ZSH_WORDS = """\
_@NAME@_mount_options() {
    compset -P '*,'
    compadd -q -S , - @WORDS@
}
"""
_PREAMBLE = {"bash": _BASH_WORDS, "zsh": _ZSH_WORDS}


def pages() -> dict[str, str]:
    """Return all texts, by their paths in the checkout."""
    made = {"docs/options.md": with_table((ROOT / "docs/options.md").read_text())}
    for name in PARSERS:
        made[f"share/man/man1/{name}.1"] = manual_page(name)
        made[f"share/bash-completion/completions/{name}"] = completion(name, "bash")
        made[f"share/zsh/site-functions/_{name}"] = completion(name, "zsh")
    return made


def manual_page(name: str) -> str:
    """Return a command's manual page, of its template and what its options say."""
    parser = PARSERS[name]()
    parts = {
        "DESCRIPTION": escape(" ".join((parser.description or "").split())),
        "EPILOG": "::\n\n" + indent(parser.epilog or ""),
        "OPTIONS": definitions(of_parser(parser)),
        "MOUNT OPTIONS": definitions((one.words, one.text()) for one in manual.MOUNT),
        "SERVER OPTIONS": definitions((one.words, one.text()) for one in servermanual.SERVER),
        "ACCEPTED": escape(manual.ACCEPTED),
        "EXIT STATUS": definitions(exit_codes()),
    }
    explained = {"ninefuse": manual.COMMAND_LINE, "ninefuse-serve": servermanual.COMMAND_LINE}
    if name in explained:
        parts["OPTIONS"] = definitions((one.words, one.text()) for one in explained[name])
    text = (ROOT / f"tools/man/{name}.rst").read_text().replace("VERSION", ninefuse.__version__)
    text = re.sub(r"^\.\. ([A-Z ]+)$", lambda match: parts[match[1]], text, flags=re.M)
    settings = {"halt_level": 2, "datestamp": None, "smart_quotes": False, "_disable_config": True}
    made = docutils.core.publish_string(
        text, writer=manpage.Writer(), settings_overrides={**settings, "output_encoding": "unicode"}
    )
    return str(made)


def of_parser(parser: argparse.ArgumentParser) -> Iterable[tuple[str, str]]:
    """Return a parser's options as they are written, with their help."""
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            words = ", ".join(action.option_strings)
            value = f" {action.metavar}" if action.metavar else ""
            yield words + value, escape_code(action.help or "")


def exit_codes() -> Iterable[tuple[str, str]]:
    """Return the exit codes, and what is wrong, from the table of docs/exit-codes.md."""
    text = (ROOT / "docs/exit-codes.md").read_text()
    return re.findall(r"^\| (\d+) \| \w+ \| ([^|]*) \|", text, re.M)


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of terms and light Markdown as reStructuredText."""
    return "\n\n".join(f"**{term}**\n{indent(inline(text))}" for term, text in pairs)


def inline(text: str) -> str:
    """Return light Markdown (code, links) as reStructuredText: code bold, links by their text."""
    parts = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).split("`")
    return "".join(f"**{part}**" if n % 2 else escape(part) for n, part in enumerate(parts))


def escape(text: str) -> str:
    return re.sub(r"([\\*|_])", r"\\\1", text)


def escape_code(text: str) -> str:
    """Return an argparse help as light Markdown: without backticks of its own."""
    return text.replace("`", "'") % {}


def indent(text: str) -> str:
    return re.sub(r"^(?=.)", "    ", text, flags=re.M)


def completion(name: str, shell: str) -> str:
    """Return a command's completion script."""
    parser = PARSERS[name]()
    filled = {"NAME": name.replace("-", "_"), "COMMAND": name}
    filled["WORDS"] = " ".join(WORDS.get(name, ()))

    def fill(template: str) -> str:
        return re.sub("@([A-Z]+)@", lambda match: filled[match[1]], template)

    for action in parser._actions:
        kind: dict[object, object] = {
            "SRC": shtab.DIRECTORY,
            "MNT": shtab.DIRECTORY,
            "DIR": shtab.DIRECTORY,
        }
        after_o = dict.fromkeys(("bash", "zsh"), fill("_@NAME@_mount_options"))
        kind |= {"FILE": shtab.FILE, "OPT,...": after_o}
        if not action.option_strings:
            action.help = str(action.metavar)  # what help does not show is not completed either
        if action.metavar in kind:
            action.complete = kind[action.metavar]  # type: ignore[attr-defined]
        elif "--model" in action.option_strings:
            action.choices = MODELS
    made = shtab.complete(parser, shell, preamble=fill(_PREAMBLE[shell]) if name in WORDS else "")
    # shtab's own line for bash comes before, and counts no more.
    if name in WORDS and shell == "bash":
        made += fill(_BASH_WHOLE_WORDS)
    return made


def with_table(text: str) -> str:
    """Return docs/options.md with the table of options as they are now."""
    rows = [(one.words.replace("|", "\\|"), one.text()) for one in manual.COMMAND_LINE[1:]]
    rows += [("-o " + one.words.replace("|", "\\|"), one.text()) for one in manual.MOUNT]
    lines = "".join(f"| `{words}` | {text} |\n" for words, text in rows)
    table = "| option | |\n|---|---|\n" + lines
    made, count = re.subn(r"^\| option \| \|\n(\|.*\n)*", lambda _: table, text, flags=re.M)
    if count != 1:
        raise ValueError(f"docs/options.md has {count} tables of options")
    return made


def main() -> None:
    """Write all pages."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for path, text in pages().items():
        os.makedirs((target / path).parent, exist_ok=True)
        (target / path).write_text(text)


if __name__ == "__main__":
    main()
