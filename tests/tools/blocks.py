"""The blocks of commands in README.md and docs/: what is indented by four blanks, or fenced."""

from __future__ import annotations

from collections.abc import Iterator

from mounting import REPO

Key = tuple[str, str]  # a page, and how a block of it begins


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Yield the language ("" for the shell) and the text of each block of a page."""
    block: list[str] | None = None
    language = ""
    before = ""  # the line before, which is empty before an indented block
    for line in [*(REPO / page).read_text().splitlines(), ""]:
        if line.startswith("```"):
            if block is None:
                block, language = [], line.removeprefix("```")
            else:
                yield language, "\n".join(block)
                block = None
        elif block is not None and (language != "    " or line.startswith("    ")):
            block.append(line.removeprefix("    ") if language == "    " else line)
        else:
            if block is not None:
                yield "", "\n".join(block)
                block = None
            if line.startswith("    ") and not before and line[4:5] not in "*-":
                block, language = [line[4:]], "    "
        before = line.strip()


def block_of(key: Key) -> tuple[str, str]:
    """The language and the text of the one block that begins so."""
    (found,) = (one for one in blocks(key[0]) if one[1].lstrip().startswith(key[1]))
    return found
