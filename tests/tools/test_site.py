"""The site made of docs/ and README.md, and its pictures."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("request.svg", "fid.svg", "locks.svg")


def build(tree: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout as `make check` does.

    Not with --quiet: mkdocs counts no warning then.
    """
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = build(ROOT, directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def shown(page: Path) -> str:
    """A page's text, without its tags."""
    return " ".join(html.unescape(re.sub("<[^>]*>", "", page.read_text())).split())


def test_readmes_sections_are_in_their_places(site: Path) -> None:
    index = shown(site / "index.html")
    assert "make demo # mount a directory" in index
    assert "bin/ninefuse /tmp/src /tmp/mnt" in index
    assert "--engine auto|threads|uring" in shown(site / "options.html")
    assert "These are Linux's, or FUSE's." in shown(site / "limitations.html")
    for page in site.glob("*.html"):
        assert "README:" not in page.read_text(), page


def test_a_page_needs_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        assert not re.findall(r'(?:src|<link [^>]*href)="(?:https?:)?//', page.read_text()), page


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("mkdocs.yml", "README.md", "tools/site.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    with open(tmp_path / "docs/caching.md", "a") as page:
        page.write("\n[nowhere](models.md#no-such-heading)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "no-such-heading" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    subprocess.run([sys.executable, ROOT / "tools/pictures.py", directory], check=True, timeout=60)
    return directory


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_up_to_date_and_shown(drawn: Path, name: str) -> None:
    text = (ROOT / "docs/pictures" / name).read_text()
    assert text == (drawn / name).read_text(), "run: make pages"
    ET.fromstring(text)
    assert f"](pictures/{name})" in (ROOT / "docs/how-it-works.md").read_text()


def test_there_are_no_other_pictures(drawn: Path) -> None:
    assert {path.name for path in drawn.iterdir()} == set(PICTURES)
    assert {path.name for path in (ROOT / "docs/pictures").iterdir()} == set(PICTURES)
