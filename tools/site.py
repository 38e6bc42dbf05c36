"""mkdocs' hook: the pages beside README join the site, and dead links and blank pages are warnings.

`make check` makes errors of warnings. mkdocs looks at the links between pages, headings included;
here it is seen that a file of the repository is there when a page leads to it. The site does not
have these files, so their names are enough there.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the repository's root, and what the site calls them. (README.md would be its index.)
BESIDE = {
    "README.md": "readme-page.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_FEWEST_WORDS = 40  # of a page that is not blank
_LINK = re.compile(r"\[([^]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")

log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Have the pages beside README in the site, too."""
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page with only links within the site."""
    name = page.file.src_uri
    if len(markdown.split()) < _FEWEST_WORDS:
        log.warning("%s is blank", name)
    here = ROOT if name in BESIDE.values() else ROOT / "docs"

    def inward(match: re.Match[str]) -> str:
        text, target, heading = match[1], match[2], match[3] or ""
        path = os.path.relpath(here / target, ROOT)
        if path.startswith("../") or not (ROOT / path).exists():
            log.warning("%s leads to %s, which is not there", name, target)
        if path in BESIDE:
            return f"[{text}]({BESIDE[path]}{heading})"
        if path.startswith("docs/") and not (ROOT / path).is_dir():
            return f"[{text}]({path.removeprefix('docs/')}{heading})"
        return text

    # In a table GitHub wants this of a | in code, and Python's Markdown shows the backslash.
    markdown = re.sub(r"`[^`\n]*`", lambda match: match[0].replace(r"\|", "|"), markdown)
    return _LINK.sub(inward, markdown)
