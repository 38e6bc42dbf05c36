"""What pip and pipx make of the wheel and of the source archive: a ninefuse that mounts.

By default the wheel is installed with the packages that are here; in a long run (make soak) the
archive is, with all it needs from the package index, for every Python there is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from functools import partial
from pathlib import Path

import mounting
import pytest
from mounting import ENVIRONMENT, REPO, SOAK, is_mounted, run, wait_until

import ninefuse
from ninefuse.command import cli

HAS_GIT = (REPO / ".git").exists() and shutil.which("git") is not None
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PAGES = sorted(
    str(path.relative_to(REPO)) for path in (REPO / "share").rglob("*.*") if path.is_file()
)
COMPILED = cli.COMPILED
COMMANDS = ("ninefuse", "ninefuse-bench", "ninefuse-serve", "ninefuse-stat")

# A pkg-config to which liburing is unknown, and all else as it is.
NO_LIBURING = """#!/bin/sh
case "$*" in *liburing*) exit 1 ;; esac
exec {} "$@"
"""


call = partial(mounting.call, seconds=280.0)


def build(hook: str, into: Path, without_liburing: bool = False) -> Path:
    """Build an archive as pip would, from a copy: building leaves files in the tree."""
    tree = into / "tree"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "*.egg-info")
    shutil.copytree(REPO, tree, ignore=unwanted)
    shutil.copytree(REPO / ".ci", tree / ".ci")
    env = environment(into, without_liburing)
    code = f"from setuptools import build_meta; build_meta.{hook}({str(into / 'dist')!r})"
    call(sys.executable, "-c", code, cwd=tree, env=env)
    (built,) = (into / "dist").iterdir()
    return built


def environment(directory: Path, without_liburing: bool) -> dict[str, str]:
    env = dict(os.environ)
    if without_liburing:
        found = shutil.which("pkg-config")
        assert found is not None
        script = directory / "bin" / "pkg-config"
        script.parent.mkdir()
        script.write_text(NO_LIBURING.format(found))
        script.chmod(0o755)
        env["PATH"] = f"{script.parent}:{env['PATH']}"
    return env


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", tmp_path_factory.mktemp("sdist"), without_liburing=True)


def serves(bin_directory: Path, base: Path, mountpoint: Path) -> None:
    """Mount, use and unmount with what is installed there, from another directory."""
    source = base / "source"
    source.mkdir()
    assert run(bin_directory / "ninefuse", source, mountpoint).stderr == ""
    (mountpoint / "file").write_text("written\n")
    assert (source / "file").read_text() == "written\n"
    shown = run(bin_directory / "ninefuse-stat", mountpoint).stdout
    assert f"ninefuse {ninefuse.__version__}, pid" in shown
    assert run("fusermount3", "-u", mountpoint).returncode == 0
    wait_until(lambda: not is_mounted(mountpoint), "the end of the mount")


@pytest.fixture(autouse=True)
def no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find what is installed, and not the checkout."""
    monkeypatch.delitem(ENVIRONMENT, "PYTHONPATH")
    monkeypatch.delenv("PYTHONPATH", raising=False)


def test_the_version_is_semantic_and_stands_once() -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", ninefuse.__version__)
    assert "version = attr: ninefuse.__version__\n" in (REPO / "setup.cfg").read_text()
    log = (REPO / "CHANGELOG.md").read_text()
    found = re.search(r"^## (\S+)", log, re.M)
    assert found is not None
    assert found[1] == ninefuse.__version__


@pytest.mark.skipif(not HAS_GIT, reason="git says which files are the checkout's")
def test_the_archive_is_the_whole_checkout(archive: Path) -> None:
    name = f"ninefuse-{ninefuse.__version__}"
    assert archive.name == f"{name}.tar.gz"
    with tarfile.open(archive) as opened:
        names = {
            member.name.removeprefix(f"{name}/")
            for member in opened.getmembers()
            if member.isfile()
        }
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=REPO)
    tree = {path for path in listed.splitlines() if (REPO / path).exists()} - {".gitignore"}
    made = {one for one in names if ".egg-info/" in one} | {"PKG-INFO"}
    assert names - made == tree


def test_an_installed_wheel_works_from_anywhere(tmp_path: Path, mountpoint: Path) -> None:
    wheel = build("build_wheel", tmp_path / "built", without_liburing=True)
    venv = tmp_path / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    call(*pip, wheel, cwd=tmp_path)
    # What it needs is what is here.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for path in PAGES:
        assert (venv / path).read_bytes() == (REPO / path).read_bytes(), path
    assert (site / f"ninefuse-{ninefuse.__version__}.dist-info/licenses/LICENSE").exists()
    where = call(
        python,
        "-c",
        "from ninefuse.command import cli; print(cli.__file__)",
        cwd=tmp_path,
    )
    assert where.startswith(str(site))
    assert "usage: ninefuse-bench" in call(venv / "bin/ninefuse-bench", "--help", cwd=Path("/"))
    serves(venv / "bin", tmp_path, mountpoint)


# ---- with the package index ---------------------------------------------------------------------


def interpreter(version: str) -> str:
    """A Python of that version; skips the test if there is none here."""
    found = shutil.which(f"python{version}")
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in [
        found,
        *sorted(map(str, root.glob(f"versions/{version}.*/bin/python{version}"))),
    ]:
        if python and subprocess.call([python, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return python
    pytest.skip(f"there is no Python {version} here")


# Loads each module; those that lack a package of other people's, or a compiled one of ours, cannot
# be, since both were made for the tests' own Python.
LOAD = """
import importlib, pkgutil, sys
import ninefuse
others = {"trio", "exceptiongroup", "pyfuse3"}
loaded = 0
for module in pkgutil.walk_packages(ninefuse.__path__, "ninefuse."):
    try:
        importlib.import_module(module.name)
        loaded += 1
    except ModuleNotFoundError as error:
        if error.name not in others and not error.name.rpartition(".")[2].startswith("_"):
            raise
print(loaded)
"""


@pytest.mark.parametrize("version", PYTHONS)
def test_the_modules_load_on_every_python_there_is(version: str) -> None:
    """Some of what newer ones have (a generic NamedTuple) fails only when a module is loaded."""
    env = {"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}
    assert int(call(interpreter(version), "-c", LOAD, cwd=Path("/"), env=env)) > 100


long = pytest.mark.skipif(not SOAK, reason="downloads and compiles: make soak")


@long
@pytest.mark.soak
@pytest.mark.limit(300)
@pytest.mark.parametrize("parts", ["all", "no io_uring", "none"])
@pytest.mark.parametrize("version", PYTHONS)
def test_pip_installs_the_archive(
    version: str, parts: str, archive: Path, tmp_path: Path, mountpoint: Path
) -> None:
    """With every compiled part, without liburing's headers, and without a compiler."""
    python = interpreter(version)
    venv = tmp_path / "venv"
    call(python, "-m", "venv", venv, cwd=tmp_path)
    env = environment(tmp_path, without_liburing=parts == "no io_uring")
    install = (venv / "bin" / "pip", "install", "--no-cache-dir")
    call(*install, archive, cwd=tmp_path, env=env)
    if parts == "none":  # what it needs is there by now, which takes a compiler itself
        env["CC"] = "false"
        call(*install, "--force-reinstall", "--no-deps", archive, cwd=tmp_path, env=env)
    told = call(venv / "bin" / "ninefuse", "-V", cwd=tmp_path)
    expected = {
        "all": COMPILED,
        "no io_uring": [name for name in COMPILED if name != "driving._ring"],
        "none": ["nothing"],
    }[parts]
    assert told.splitlines()[-1] == " ".join(("compiled", *expected))
    built = venv.glob("lib/python*/site-packages/ninefuse/**/*.so")
    assert len(list(built)) == (0 if parts == "none" else len(expected))
    for path in PAGES:
        assert (venv / path).exists(), path
    serves(venv / "bin", tmp_path, mountpoint)
    print(f"Python {version}, compiled {parts}: installed, mounted")


@long
@pytest.mark.soak
@pytest.mark.limit(300)
def test_pipx_installs_the_archive(archive: Path, tmp_path: Path, mountpoint: Path) -> None:
    call(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    call(tmp_path / "venv/bin/pip", "install", "pipx", cwd=tmp_path)
    env = environment(tmp_path, without_liburing=False)
    for name in ("HOME", "BIN_DIR", "MAN_DIR"):
        env[f"PIPX_{name}"] = str(tmp_path / "pipx" / name.lower())
    call(tmp_path / "venv/bin/pipx", "install", archive, cwd=tmp_path, env=env)
    for command in COMMANDS:
        assert (tmp_path / "pipx/bin_dir" / command).exists()
        assert (tmp_path / f"pipx/man_dir/man1/{command}.1").exists()
    serves(tmp_path / "pipx/bin_dir", tmp_path, mountpoint)
    print("pipx: installed, mounted")
