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


def test_every_page_is_there_with_its_text(site: Path) -> None:
    assert "make demo # mount a directory" in shown(site / "readme-page.html")
    assert "bin/ninefuse /tmp/src /tmp/mnt" in shown(site / "index.html")
    assert "--engine auto|threads|uring" in shown(site / "options.html")
    assert "Nearly all of it is Linux's or FUSE's." in shown(site / "limitations.html")
    assert "How to report" in shown(site / "security.html")


def test_a_page_leads_to_those_beside_readme_and_back(site: Path) -> None:
    assert 'href="readme-page.html"' in (site / "index.html").read_text()
    assert 'href="reliability.html#the-rule"' in (site / "security.html").read_text()


def test_a_page_needs_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        assert not re.findall(r'(?:src|<link [^>]*href)="(?:https?:)?//', page.read_text()), page


@pytest.mark.parametrize(
    ("page", "added", "told"),
    [
        ("docs/caching.md", "[nowhere](models.md#no-such-heading)", "no-such-heading"),
        ("docs/caching.md", "[nowhere](../ninefuse/no_such_module.py)", "no_such_module.py"),
        ("CONTRIBUTING.md", "[nowhere](docs/models.md#no-such-heading)", "no-such-heading"),
        ("README.md", "[nowhere](docs/no-such-page.md)", "no-such-page.md"),
        ("CHANGELOG.md", "[nowhere](README.md#no-such-heading)", "no-such-heading"),
        ("docs/caching.md", None, "caching.md is blank"),
    ],
)
def test_a_dead_link_and_a_blank_page_are_errors(
    page: str, added: str | None, told: str, tmp_path: Path
) -> None:
    for name in ("ninefuse", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("docs", "share", "tools"):  # the hook looks from where it stands
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (ROOT / "mkdocs.yml", ROOT / "LICENSE", *ROOT.glob("*.md")):
        shutil.copy2(path, tmp_path)
    text = (tmp_path / page).read_text()
    (tmp_path / page).write_text("# Caching\n" if added is None else f"{text}\n{added}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert told in done.stdout + done.stderr


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
