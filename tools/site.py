"""mkdocs' hook: pages of the site that README.md has already, and links that leave docs/.

`<!-- README: One heading | Another -->` in a page stands for these sections of README.md; the
heading `-` is what stands before the first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with README's sections in their places, and only links within the site."""
    sections = readme_sections()

    def included(match: re.Match[str]) -> str:
        return "\n".join(sections[name.strip()] for name in match[1].split(" | "))

    markdown = re.sub(r"^<!-- README: (.*) -->$", included, markdown, flags=re.M)
    # In a table GitHub wants this of a | in code, and Python's Markdown shows the backslash.
    markdown = re.sub(r"`[^`\n]*`", lambda match: match[0].replace(r"\|", "|"), markdown)
    # A file of the repository, which the site does not have: its name is enough.
    return re.sub(r"\[([^]]*)\]\((\.\./[^)]*|CHANGELOG\.md)\)", _inward, markdown)


def _inward(match: re.Match[str]) -> str:
    text, target = match[1], match[2]
    if target == "../README.md#limitations":
        return f"[{text}](limitations.md)"
    return str(text)


def readme_sections() -> dict[str, str]:
    """Return README's sections by their headings, with links as they are from docs/."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((?=(ninefuse|tests|tools)/)", "](../", text)
    first, *rest = re.split(r"^(?=## )", text, flags=re.M)
    sections = {"-": first}
    for section in rest:
        sections[section.splitlines()[0].removeprefix("## ")] = section
    return sections
