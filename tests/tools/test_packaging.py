"""The launcher, the pins, the wheel, tools/setup and the Makefile.

tools/setup runs here in a scratch checkout, with a PATH that holds stand-ins for Python, apt-get
and the compiler, so that nothing is downloaded and nothing of the machine is touched.
"""

import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import mounting
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ninefuse
from ninefuse.command import cli, server
from ninefuse.command.options import parse_options

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.10"
PYTHONS = (OLDEST, "3.11", "3.12", "3.13", "3.14")
# What is built wherever there is a compiler.
WITH_A_COMPILER = [
    *("ninefuse/fuse/_ahead", "ninefuse/fuse/_message", "ninefuse/fuse/_plain"),
    *("ninefuse/fuse/_role", "ninefuse/fuse/_wire"),
    *("ninefuse/linux/_rights", "ninefuse/linux/_statx", "ninefuse/linux/_transfer"),
    "ninefuse/tree/_known",
]
HAS_LIBURING = subprocess.call(["pkg-config", "--exists", "liburing >= 2.3"]) == 0


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the caller's environment, without this checkout on PYTHONPATH."""
    return mounting.run(*command, cwd=cwd, env=os.environ if env is None else env, seconds=120.0)


def script(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


# ---- bin/ninefuse -------------------------------------------------------------------------------


def test_launcher_runs_through_a_symlink_from_any_directory(tmp_path: Path) -> None:
    link = tmp_path / "links" / "nf"
    link.parent.mkdir()
    link.symlink_to(ROOT / "bin" / "ninefuse")
    again = tmp_path / "again"
    again.symlink_to("links/nf")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in ([sys.executable, str(link)], [sys.executable, str(again)], ["./links/nf"]):
        done = run(*command, "-V", cwd=tmp_path, env=env)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert done.stdout.startswith(f"ninefuse {ninefuse.__version__}\npyfuse3 3.5."), command


def test_launcher_is_the_helper_of_mount_8_by_the_helpers_name(tmp_path: Path) -> None:
    link = tmp_path / "mount.ninefuse"
    link.symlink_to(ROOT / "bin" / "mount.ninefuse")
    done = run(sys.executable, link, tmp_path, tmp_path / "missing", "-f", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (32, "")  # for ninefuse -f is something else
    assert done.stderr.startswith("ninefuse: mount point ")


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """Return the launcher of a scratch checkout, whose .venv has no pyfuse3 and no trio."""
    checkout = tmp_path / "a checkout"
    package = checkout / "ninefuse" / "command"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import sys\ndef main(argv):\n    print(sys.prefix, *argv, sep='|')\n    return 7\n"
    )
    (checkout / "bin").mkdir()
    shutil.copy2(ROOT / "bin" / "ninefuse", checkout / "bin")
    done = run(sys.executable, "-m", "venv", "--without-pip", ".venv", cwd=checkout)
    assert done.returncode == 0, done.stderr
    return checkout / "bin" / "ninefuse"


def stub_modules(directory: Path) -> None:
    for name in ("pyfuse3", "trio"):
        (directory / f"{name}.py").touch()


def test_launcher_changes_to_the_interpreter_of_venv(launcher: Path, tmp_path: Path) -> None:
    venv = launcher.parent.parent / ".venv"
    stub_modules(next(venv.glob("lib/python*/site-packages")))
    for python in (sys.executable, str(venv / "bin" / "python")):
        done = run(python, launcher, "a b", "-o", "x,y", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (7, f"{venv}|a b|-o|x,y\n"), done.stderr


def test_launcher_without_pyfuse3_says_what_to_run(launcher: Path, tmp_path: Path) -> None:
    done = run(sys.executable, launcher, "-V", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ninefuse: there is no pyfuse3 for ")
    assert "make demo" in done.stderr
    assert done.stderr.count("\n") == 1


def test_launcher_says_that_its_venv_is_not_for_whoever_starts_it(
    launcher: Path, tmp_path: Path
) -> None:
    """One that root has made, say, with an interpreter in root's own directory."""
    python = launcher.parent.parent / ".venv" / "bin" / "python"
    python.unlink()
    python.touch(0o644)
    done = run(sys.executable, "-S", launcher, "-V", cwd=tmp_path)  # it has no modules either
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ninefuse: you cannot start {python} (Permission denied), and ")
    assert done.stderr.count("\n") == 1


def test_launcher_shows_counters_by_that_name(tmp_path: Path) -> None:
    done = run(ROOT / "bin" / "ninefuse-stat", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ninefuse-stat ")


def test_launcher_does_without_a_venv_whose_interpreter_has_gone(
    launcher: Path, tmp_path: Path
) -> None:
    venv = launcher.parent.parent / ".venv"
    for name in os.listdir(venv / "bin"):
        (venv / "bin" / name).unlink()
    done = run(sys.executable, launcher, "x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, f"{sys.prefix}|x\n"), done.stderr


def test_launcher_is_not_caught_in_a_loop_by_a_half_made_venv(
    launcher: Path, tmp_path: Path
) -> None:
    # Without its pyvenv.cfg, the interpreter in .venv takes itself for the one it links to.
    (launcher.parent.parent / ".venv" / "pyvenv.cfg").unlink()
    done = run(sys.executable, launcher, "x", cwd=tmp_path)
    assert done.returncode in (1, 7)


def test_python_m_ninefuse_is_the_same_command(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "ninefuse", "-V", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"ninefuse {ninefuse.__version__}\n")


def test_importing_the_package_is_cheap() -> None:
    code = "import sys; old = set(sys.modules); import ninefuse; print(*set(sys.modules) - old)"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.split() == ["ninefuse"]


# ---- setup.cfg and requirements.txt -------------------------------------------------------------


def pins() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def pinned_versions(python: str) -> dict[str, str]:
    """Return the version of each package for that Python, such as "3.10"."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    active = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    versions: dict[str, str] = {}
    for pin in active:
        versions[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    assert len(versions) == len(active), f"a package is pinned twice for {python}"
    return versions


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def ranges() -> list[Requirement]:
    config = setup_cfg()
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.split("\n") if line.strip()]


def test_every_pin_is_exact_and_stated_once() -> None:
    for pin in pins():
        assert [clause.operator for clause in pin.specifier] == ["=="], pin
    assert len({str(pin) for pin in pins()}) == len(pins())


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_within_the_ranges_of_setup_cfg(python: str) -> None:
    versions = pinned_versions(python)
    for wanted in ranges():
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), wanted


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_complete_for_every_python(python: str) -> None:
    """What a pinned package needs under that Python is pinned too, in a version that it takes."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    versions = pinned_versions(python)
    for name, pinned in versions.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # one for other Pythons than this
        if distribution.version != pinned:
            continue  # this Python has another release
        supported = "".join(distribution.metadata.get_all("Requires-Python") or [])
        assert SpecifierSet(supported).contains(f"{python}.0"), name
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate(environment):
                continue
            assert canonicalize_name(needed.name) in versions, f"{name} needs {line}"
            version = versions[canonicalize_name(needed.name)]
            assert needed.specifier.contains(version), f"{name} needs {line}"


def test_what_is_installed_is_what_is_pinned() -> None:
    """Without this the tests above could pass over a package."""
    versions = pinned_versions(".".join(map(str, sys.version_info[:2])))
    installed = {
        name: metadata.version(name)
        for name in versions
        if name not in ("setuptools-scm", "vcs-versioning", "cython")  # for building only
    }
    assert installed == {name: versions[name] for name in installed}


def test_the_oldest_python_is_the_same_everywhere() -> None:
    config = setup_cfg()
    assert config["options"]["python_requires"] == f">={OLDEST}"
    assert config["mypy"]["python_version"] == OLDEST
    assert (
        f'target-version = "py{OLDEST.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    )


def test_the_classifiers_name_each_python_and_none_else() -> None:
    named = re.findall(r"Python :: (3\.\d+)$", setup_cfg()["metadata"]["classifiers"], re.M)
    assert named == list(PYTHONS)


# ---- the wheel ----------------------------------------------------------------------------------


def build_wheel(tree: Path, **env: str) -> Path:
    """Build the wheel, from a copy: building leaves files in the tree."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "ninefuse", tree / "ninefuse", ignore=unwanted)
    shutil.copytree(ROOT / "share", tree / "share")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist")
    command = (sys.executable, "-m", "pip", "-v", "wheel", *options, ".")
    done = run(*command, cwd=tree, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (built,) = (tree / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as opened:
        yield opened


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tree = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "ninefuse").rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    assert "ninefuse/py.typed" in tree
    tree |= {
        f"ninefuse-{ninefuse.__version__}.data/data/{path.relative_to(ROOT)}"
        for path in (ROOT / "share").rglob("*")
        if path.is_file()
    }
    assert {name for name in names if not name.endswith(".so")} == tree
    extensions = sorted(names - tree)
    assert sorted(name.split(".")[0] for name in extensions) == [
        *["ninefuse/driving/_ring"] * HAS_LIBURING,
        *WITH_A_COMPILER,
    ]


@pytest.mark.parametrize("missing", ["liburing", "compiler"])
def test_ninefuse_is_built_without_its_extensions(tmp_path: Path, missing: str) -> None:
    env = {"CC": "/no/such/compiler"}
    if missing == "liburing":
        script(tmp_path / "bin" / "pkg-config", "exit 1\n")
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (tmp_path / "tree").mkdir()
    built = build_wheel(tmp_path / "tree", **env)
    with zipfile.ZipFile(built) as opened:
        found = [name.split(".")[0] for name in opened.namelist() if name.endswith(".so")]
        assert found == ([] if missing == "compiler" else WITH_A_COMPILER)
        opened.extractall(tmp_path / "installed")
    code = (
        "import ninefuse.command.cli, importlib.util;"
        " print(importlib.util.find_spec('ninefuse.driving._ring'))"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path / "installed")
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"ninefuse-{ninefuse.__version__}.dist-info"
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    scripts = dict(entry_points["console_scripts"])
    assert scripts["ninefuse"] == "ninefuse.command.cli:main"
    assert scripts["mount.ninefuse"] == "ninefuse.command.mounthelper:main"
    assert scripts["ninefuse-bench"] == "ninefuse.bench.command:main"
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    text = wheel.read(f"{info}/METADATA").decode()
    assert f"\nRequires-Python: >={OLDEST}\n" in text
    assert "\nRequires-Dist: pyfuse3==3.5.*\n" in text
    assert '\nProvides-Extra: bench\nRequires-Dist: matplotlib>=3.8; extra == "bench"\n' in text
    assert (ROOT / "README.md").read_text().strip() in text
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


# ---- tools/setup --------------------------------------------------------------------------------

# Enough of Python for tools/setup: a virtual environment is a copy of this script, pip only says
# what it was asked for, and the rest is the interpreter that runs the tests, as one without gaps.
PYTHON_STAND_IN = """
case "$*" in
*'-m venv'*)
    echo venv >>"$LOG"
    mkdir -p .venv/bin
    cp "$STAND_IN" .venv/bin/python ;;
*'-m pip'*)
    shift 3
    echo "pip $*" >>"$LOG"
    if [ -n "${PIP_FAILS:-}" ]; then echo 'no such package' >&2; exit 1; fi ;;
*ensurepip*)
    "$REAL" "$@" | sed -e "1s|.*|$STAND_IN|" -e '3s|.*||' -e '4s|.*|gcc|' -e '5s|.*||' ;;
*)
    exec "$REAL" "$@" ;;
esac
"""

# Makes what it is asked to install, like the commands that tools/setup looks for.
APT_STAND_IN = """
echo "apt-get $*" >>"$LOG"
case "$*" in *install*fuse3*) ln -s gcc "$BIN/fusermount3" ;; esac
if [ -n "${NO_BINDFS:-}" ]; then case "$*" in *install*bindfs*) exit 100 ;; esac; fi
for name in bindfs fio diod; do
    case "$*" in *install*"$name"*) ln -s gcc "$BIN/$name" ;; esac
done
case "$*" in *install*qemu*) ln -s gcc "$BIN/qemu-system-x86_64" ;; esac
"""

STAMPED = (
    "requirements.txt",
    "setup.cfg",
    "setup.py",
    "pyproject.toml",
    "ninefuse/driving/_ring.pyx",
    "ninefuse/linux/_rights.pyx",
    "ninefuse/linux/_statx.pyx",
    "ninefuse/linux/_transfer.pyx",
    "ninefuse/tree/_known.pyx",
)

BASICS = "sh cat cksum cp cut dirname env flock grep id ln mkdir mktemp mv rm sed sleep"
TEST_TOOLS = (
    "fusermount3 getfattr setfattr getfacl setfacl mount umount unshare setpriv ps pgrep pkill"
    " fuser pkg-config gcc git groff rsync mkfs.xfs mkfs.btrfs"
)


class Checkout:
    """A scratch checkout with tools/setup, and the PATH that it runs with."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        self.bin = directory / "bin"
        self.log = directory / "log"
        self.bin.mkdir()
        (self.root / "tools").mkdir(parents=True)
        for district in ("driving", "linux", "tree"):
            (self.root / "ninefuse" / district).mkdir(parents=True)
        for name in (*STAMPED, "tools/setup"):
            shutil.copy2(ROOT / name, self.root / name)
        for name in BASICS.split():
            found = shutil.which(name)
            assert found is not None, name
            (self.bin / name).symlink_to(found)
        for name in TEST_TOOLS.split():
            script(self.bin / name, "exit 0\n")
        python = script(self.bin / "python3", PYTHON_STAND_IN)
        self.env = {
            "PATH": str(self.bin),
            "TMPDIR": str(directory),
            "BIN": str(self.bin),
            "LOG": str(self.log),
            "REAL": sys.executable,
            "STAND_IN": str(python),
        }

    def setup(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return run(self.root / "tools" / "setup", *words, cwd=self.bin, env={**self.env, **env})

    def logged(self) -> list[str]:
        """Return what was called since the last time, of Python's venv, pip, and apt-get."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [" ".join(line.split()[:2]) for line in lines]


MADE = ["venv", *["pip install"] * 3, "pip check"]
UPDATED = ["pip --version", *MADE[1:]]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    done = checkout.setup()
    assert done.returncode == 0, done.stderr
    assert checkout.logged() == MADE
    return checkout


def test_setup_is_silent_and_quick_when_all_is_there(ready: Checkout) -> None:
    times = []
    for _ in range(5):
        start = time.monotonic()
        done = ready.setup()
        times.append(time.monotonic() - start)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert ready.logged() == []
    assert min(times) < 0.3


def test_setup_leaves_nothing_but_venv(ready: Checkout) -> None:
    assert sorted(path.name for path in ready.root.iterdir()) == [
        ".venv",
        "ninefuse",
        "pyproject.toml",
        "requirements.txt",
        "setup.cfg",
        "setup.py",
        "tools",
    ]
    assert sorted(path.name for path in ready.root.parent.iterdir()) == ["bin", "checkout"]


@pytest.mark.parametrize("name", STAMPED)
def test_setup_brings_venv_up_to_date(ready: Checkout, name: str) -> None:
    with open(ready.root / name, "a") as file:
        file.write("# changed\n")
    assert ready.setup().returncode == 0
    assert ready.logged() == UPDATED
    assert ready.setup().returncode == 0
    assert ready.logged() == []


def test_setup_makes_a_half_made_venv_anew(ready: Checkout) -> None:
    (ready.root / ".venv" / "setup-stamp").unlink()
    (ready.root / ".venv" / "left-over").touch()
    assert ready.setup().returncode == 0
    assert ready.logged() == MADE
    assert not (ready.root / ".venv" / "left-over").exists()


def test_setup_makes_a_venv_anew_whose_interpreter_has_gone(ready: Checkout) -> None:
    python = ready.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/no/such/python")
    assert ready.setup().returncode == 0
    assert ready.logged() == MADE


def test_setup_makes_the_venv_of_a_moved_checkout_anew(ready: Checkout) -> None:
    ready.root = ready.root.rename(ready.root.with_name("moved"))
    assert ready.setup().returncode == 0
    assert ready.logged() == MADE


def test_setup_starts_over_after_pip_has_failed(ready: Checkout) -> None:
    with open(ready.root / "requirements.txt", "a") as file:
        file.write("nothing==1.0\n")
    done = ready.setup(PIP_FAILS="yes")
    assert done.returncode == 1
    assert "no such package\ntools/setup: pip could not install" in done.stderr
    ready.logged()
    assert ready.setup().returncode == 0
    assert ready.logged() == MADE


def test_runs_of_setup_at_the_same_time_make_one_venv(checkout: Checkout) -> None:
    command = [checkout.root / "tools" / "setup"]
    children = [
        subprocess.Popen(command, env=checkout.env, stdout=subprocess.DEVNULL) for _ in range(4)
    ]
    assert [child.wait(timeout=60) for child in children] == [0] * 4
    assert checkout.logged() == MADE


def test_setup_installs_missing_packages_as_root(checkout: Checkout) -> None:
    (checkout.bin / "fusermount3").unlink()
    (checkout.bin / "id").unlink()
    script(checkout.bin / "id", "echo 0\n")
    script(checkout.bin / "apt-get", APT_STAND_IN)
    done = checkout.setup()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("setup: apt-get install fuse3\n")
    assert checkout.logged() == ["apt-get -qq", *MADE]


@pytest.mark.parametrize("installs", [True, False])
def test_setup_does_without_liburing(checkout: Checkout, installs: bool) -> None:
    (checkout.bin / "id").unlink()
    script(checkout.bin / "id", "echo 0\n")
    script(checkout.bin / "pkg-config", 'case "$*" in *liburing*) exit 1 ;; esac\n')
    script(checkout.bin / "apt-get", APT_STAND_IN + ("" if installs else "exit 100\n"))
    done = checkout.setup()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("setup: apt-get install liburing-dev\n")
    assert ("built without io_uring" in done.stdout) == (not installs)
    assert checkout.logged() == ["apt-get -qq"] * (1 if installs else 3) + MADE
    assert checkout.setup().stdout == ""


@pytest.mark.parametrize("apt", [True, False])
def test_setup_says_what_is_missing_when_it_may_not_install(checkout: Checkout, apt: bool) -> None:
    for name in ("fusermount3", "getfattr", "id"):
        (checkout.bin / name).unlink()
    script(checkout.bin / "id", "echo 1000\n")
    script(checkout.bin / "sudo", "echo 'sudo: a password is required' >&2; exit 1\n")
    if apt:
        script(checkout.bin / "apt-get", APT_STAND_IN)
    done = checkout.setup()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(" fuse3 attr\n")
    assert ("sudo apt-get install" in done.stderr) == apt
    assert checkout.logged() == []


def test_setup_says_that_there_is_no_python(checkout: Checkout) -> None:
    (checkout.bin / "python3").unlink()
    script(checkout.bin / "python3.12", "echo 'no such version' >&2; exit 127\n")
    done = checkout.setup()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tools/setup: needs Python 3.10 or newer")
    assert done.stderr.count("\n") == 1


def test_setup_takes_the_first_python_that_is_new_enough(checkout: Checkout) -> None:
    python = checkout.bin / "python3"
    python.rename(checkout.bin / "python3.12")
    script(python, "exit 1\n")
    checkout.env["STAND_IN"] = str(checkout.bin / "python3.12")
    assert checkout.setup().returncode == 0
    assert checkout.logged() == MADE


def allow_apt(checkout: Checkout) -> None:
    (checkout.bin / "id").unlink()
    script(checkout.bin / "id", "echo 0\n")
    script(checkout.bin / "apt-get", APT_STAND_IN)


def test_setup_for_the_benchmark_installs_what_it_compares_with(ready: Checkout) -> None:
    allow_apt(ready)
    assert ready.setup().stdout == "", "nothing of it is missing for the others"
    done = ready.setup("bench")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "setup: apt-get install bindfs fio\n"
    assert ready.logged() == ["apt-get -qq"]
    assert (ready.setup("bench").stdout, ready.logged()) == ("", [])


def test_setup_for_the_benchmark_goes_on_without(ready: Checkout) -> None:
    assert ready.setup("bench").returncode == 0, "with no apt-get at all"
    allow_apt(ready)
    done = ready.setup("bench", NO_BINDFS="yes")
    assert done.returncode == 0
    assert done.stdout.endswith("setup: no bindfs: apt-get could not install it\n")
    assert (ready.bin / "fio").exists()


def test_setup_for_the_benchmark_makes_all_the_rest_too(checkout: Checkout) -> None:
    assert checkout.setup("bench").returncode == 0
    assert checkout.logged() == MADE


def test_setup_for_the_guest_installs_qemu(ready: Checkout) -> None:
    allow_apt(ready)
    done = ready.setup("guest")
    assert (done.returncode, done.stderr) == (0, "")
    # It looks for diod in /usr/sbin too, where it may be.
    assert re.fullmatch(r"setup: apt-get install qemu-system-x86( diod)?\n", done.stdout)
    assert (ready.setup("guest").stdout, ready.logged()) == ("", ["apt-get -qq"])


def test_setup_says_what_it_takes(checkout: Checkout) -> None:
    for words in (["Bench"], ["bench", "more"]):
        done = checkout.setup(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "tools/setup: usage: tools/setup [bench | guest]\n"


# ---- Makefile and .ci/run -----------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Return a directory with the Makefile, where set-up and Python only say their arguments."""
    shutil.copy2(ROOT / "Makefile", tmp_path)
    script(tmp_path / "tools" / "setup", "echo setup $*\n")
    for name in ("python", "ruff", "mypy", "lint-imports", "mkdocs"):
        script(tmp_path / ".venv" / "bin" / name, 'for word; do echo "<$word>"; done\n')
    return tmp_path


def make(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Not as part of the make that may run these tests.
    passed_on = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL"}
    passed_on |= {"SRC", "ARGS", "JOBS", "OUT", "FULL"}
    env = {name: value for name, value in os.environ.items() if name not in passed_on}
    return run("make", *words, cwd=directory, env=env)


def test_make_alone_lists_the_commands(commands: Path) -> None:
    done = make(commands)
    assert done.returncode == 0
    for target in ("demo", "bench", "test", "test-fast", "test-tools", "check", "clean"):
        assert re.search(rf"^make {target}(\s)", done.stdout, re.M), target


def test_make_demo_hands_the_directory_on_as_it_is(commands: Path) -> None:
    words = ["setup", "<-m>", "<ninefuse.bench.demo>"]
    assert make(commands, "demo").stdout.splitlines() == words
    name = '/a b/it\'s "one"; exit 1'
    with_source = make(commands, "demo", f"SRC={name}").stdout.splitlines()
    assert with_source == [*words, "<--source>", f"<{name}>"]


def test_make_bench_hands_directories_on_as_they_are(commands: Path) -> None:
    words = ["setup bench", "<-m>", "<ninefuse.bench.command>"]
    assert make(commands, "bench").stdout.splitlines() == words
    assert make(commands, "bench", "FULL=0").stdout.splitlines() == words
    full = make(commands, "bench", "FULL=1", "SRC=/a b/'s", 'OUT=/"c').stdout.splitlines()
    assert full == [*words, "<--full>", "<--source>", "</a b/'s>", "<--out>", '</"c>']


def test_make_test_runs_pytest_with_further_arguments(commands: Path) -> None:
    begin, more = ["<-m>", "<pytest>"], ["<-x>", "<-k>", "<a or b>"]
    product, beside = ["<--ignore=tests/tools>"], ["<-n>", "<3>", "<--dist>", "<worksteal>"]
    for target, expected in (
        (
            "test",
            [*begin, *product, *beside, "<-m>", "<not alone>", *more]
            + [*begin, *product, "<-m>", "<alone>", *more],
        ),
        ("test-fast", [*begin, *product, *beside, "<-m>", "<not mount>", *more]),
        ("test-tools", [*begin, *beside, "<tests/tools>", *more]),
    ):
        done = make(commands, target, "JOBS=3", "ARGS=-x -k 'a or b'")
        assert done.stdout.splitlines() == ["setup", *expected], target


def test_make_guest_runs_its_tests_and_benchmarks(commands: Path) -> None:
    tests = ["setup guest", "<-m>", "<pytest>", "<-o>", "<faulthandler_timeout=0>"]
    tests += ["<tests/guest>", "<-x>"]
    assert make(commands, "guest", "ARGS=-x").stdout.splitlines() == tests
    for target, module in (("guest-bench", "guest.ddbench"), ("socket-bench", "guest.socketbench")):
        words = ["setup guest", "<-m>", f"<{module}>"]
        assert make(commands, target).stdout.splitlines() == words
        given = make(commands, target, "SRC=/a b", "OUT=/c", "ARGS=--repeat 1").stdout.splitlines()
        assert given == [*words, "<--source>", "</a b>", "<--out>", "</c>", "<--repeat>", "<1>"]


def test_every_test_is_run_by_one_command_of_ci() -> None:
    """What `make test` leaves out, `make test-tools` runs."""
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == [
        "make check",
        "make test",
        "make test-pyfuse3",
        "make test-tools",
    ]


def test_make_check_ends_at_the_first_failure(commands: Path) -> None:
    done = make(commands, "check")
    assert done.stdout.count("setup\n") == 1
    assert done.stdout.endswith("<build>\n<--strict>\n")
    script(commands / ".venv" / "bin" / "ruff", "exit 1\n")
    done = make(commands, "check")
    assert done.returncode != 0
    assert "mypy" not in done.stdout


@pytest.mark.parametrize(
    "name",
    [
        *("bin/ninefuse", "bin/mount.ninefuse", "bin/ninefuse-serve", "bin/ninefuse-stat"),
        *("tools/setup", ".ci/run"),
    ],
)
def test_scripts_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


# ---- docs/ --------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units of docs/systemd, with a ninefuse that is there."""
    for path in (ROOT / "docs" / "systemd").iterdir():
        text = path.read_text().replace("/usr/local/bin/ninefuse", str(ROOT / "bin/ninefuse"))
        (tmp_path / path.name).write_text(text)
    return tmp_path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize(
    "name",
    ["ninefuse@.service", "mnt-data.mount", "ninefuse-serve@.service", "ninefuse-serve@.socket"],
)
def test_systemd_takes_the_units(units: Path, name: str) -> None:
    done = run("systemd-analyze", "verify", "--man=no", units / name, cwd=units)
    ours = [line for line in done.stderr.splitlines() if re.search("ninefuse|mnt-data", line)]
    assert (done.returncode, ours) == (0, [])


def test_ninefuse_takes_what_the_units_say(units: Path) -> None:
    service = configparser.ConfigParser(interpolation=None, strict=False)
    service.read(units / "ninefuse@.service")
    comment = (units / "ninefuse@.service").read_text()
    given = dict(re.findall(r"^#   (\w+)=(.*)$", comment, re.M))
    _, *words = service["Service"]["ExecStart"].split()
    words[words.index("$OPTIONS") : words.index("$OPTIONS") + 1] = given["OPTIONS"].split()
    words = [{"${SOURCE}": given["SOURCE"], "%f": "/mnt/data"}.get(word, word) for word in words]
    settings = cli.parse(words)
    assert (settings.source, settings.mountpoint) == ("/srv/data", "/mnt/data")
    assert settings.foreground
    assert service["Service"]["Type"] == "notify"
    serve = configparser.ConfigParser(interpolation=None)
    serve.read(units / "ninefuse-serve@.service")
    _, *words = serve["Service"]["ExecStart"].split()
    served = server.parse([{"%f": "/srv/data"}.get(word, word) for word in words])
    assert (served.source, served.foreground) == ("/srv/data", True)
    assert serve["Service"]["Type"] == "notify"
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(units / "mnt-data.mount")
    options = parse_options([unit["Mount"]["Options"]])
    assert (options.given["model"], options.given["allow_other"]) == ("second", True)
