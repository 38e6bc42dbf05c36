"""What is compared: the source itself, ninefuse under each model, and every peer that is at hand.

A peer is another file server of the same directory, found, built or fetched here. One that is
not to be had is Missing, with the reason. Each is a command that serves in the foreground.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ninefuse
from ninefuse.bench import BenchError, Processes
from ninefuse.bench.mounted import ninefuse_command

SOURCE = "source"
# The null server on pyfuse3's session, and on the native one.
NULL = "null"
NULL_NATIVE = "null-native"

PLAIN_SECOND = "second-off"
KERNEL = "kernel"

# The second model with nothing but hand-overs, as it was in 2010; with calls of the
# dispatcher's own; and with io_uring; as it is, which hands over the role; and where the kernel
# reads and writes the files itself.
NINEFUSE = {
    "none": ("--model", "none"),
    "first": ("--model", "first"),
    PLAIN_SECOND: ("--model", "second", "-o", "inline=off"),
    "second-thr": ("--model", "second", "--engine", "threads", "-o", "handover=request"),
    "second-req": ("--model", "second", "-o", "handover=request"),
    "second": ("--model", "second"),
    KERNEL: ("--model", "second", "-o", "data=kernel"),
}

# libfuse's passthrough_hp, with all data through it, and where the kernel has the files.
PASSTHROUGH_HP = {"pt_hp": ("--nopassthrough", "--direct-io"), "pt_hp-kernel": ()}

# Of interest where files are read and written, and nowhere else.
DATA_ROWS = frozenset((KERNEL, *PASSTHROUGH_HP))

# Where Debian's libfuse3-dev has libfuse's examples.
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")

_BUILD_SECONDS = 60.0
_FETCH_SECONDS = 120.0  # pip makes a build environment to read the name of what it fetches
_VERSION_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the tables.

    name: for tables, --rows and results.json. kind: "source", "ninefuse", "peer", or "floor" for
    the null servers. command: the server's words, none for the source. version; note: what the
    reader should know of its options.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    version: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """A row that is not measured. name; reason, one line."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer of the command line: NAME=COMMAND."""

    name: str
    words: tuple[str, ...]


def parse_peer(text: str) -> Peer:
    """Return the peer of a --peer option. Raises ValueError when it is none."""
    name, equals, command = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.+-]{1,20}", name):
        raise ValueError("a peer is NAME=COMMAND, with a NAME of letters, digits, and . + - _")
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise ValueError(f"the command of {name}: {error}") from error
    if not words or not any("{mnt}" in word for word in words):
        raise ValueError(f"the command of {name} must say where the mount point goes: {{mnt}}")
    return Peer(name, words)


@dataclass(frozen=True, slots=True)
class Site:
    """Where rows are made ready.

    scratch: the benchmark's directory, without symlinks. source: what is served.
    """

    processes: Processes
    scratch: Path
    source: Path

    def mountpoint(self, name: str) -> Path:
        """Return where the row is mounted."""
        return self.scratch / f"mnt-{name}"


# A function that makes the row of that name ready. Raises BenchError when it is not to be had.
Maker = Callable[[Site, str], Row]


def makers(peers: Sequence[Peer]) -> dict[str, Maker]:
    """Return what makes each row, by its name, in the order of the tables.

    A peer may stand for passthrough_hp, of another version or with other options. Raises
    ValueError when two have the same name.
    """
    found: dict[str, Maker] = {SOURCE: _source}
    found.update((name, _ninefuse) for name in NINEFUSE)
    found |= {
        "bindfs": _bindfs,
        "bindfs-mt": _bindfs,
        "pt_ll": _passthrough_ll,
        "example": _example,
        NULL: _null,
        NULL_NATIVE: _null_native,
        **dict.fromkeys(PASSTHROUGH_HP, _passthrough_hp),
    }
    for peer in peers:
        if found.get(peer.name) not in (None, _passthrough_hp):
            raise ValueError(f"there is a row {peer.name} already")
        found[peer.name] = _given(peer)
    return found


def make_row(site: Site, name: str, maker: Maker) -> Row | Missing:
    """Make the row ready, or say why it is not to be had."""
    try:
        return maker(site, name)
    except BenchError as error:
        return Missing(name, str(error))


def _source(site: Site, name: str) -> Row:
    return Row(name, "source", (), "", "the directory itself, no FUSE")


def _ninefuse(site: Site, name: str) -> Row:
    # For all users where root mounts, as bindfs does then; another one would have to be allowed to.
    for_all = ("-o", "allow_other") if os.geteuid() == 0 else ()
    options = (*for_all, *NINEFUSE[name])
    command = ninefuse_command(site.source, site.mountpoint(name), *options)
    note = " ".join(("ninefuse", *options))
    return Row(name, "ninefuse", tuple(command), ninefuse.__version__, note)


def _null(site: Site, name: str) -> Row:
    note = "a server on pyfuse3 that answers from memory: the floor of its session"
    return Row(name, "floor", _null_server(site, name, "pyfuse3"), pyfuse3_version(), note)


def _null_native(site: Site, name: str) -> Row:
    if importlib.util.find_spec("ninefuse.fuse._wire") is None:
        raise BenchError("the native session was not built, which takes a C compiler and Cython")
    note = "likewise on the native session: the floor of ninefuse"
    return Row(name, "floor", _null_server(site, name, "native"), ninefuse.__version__, note)


def _null_server(site: Site, name: str, session: str) -> tuple[str, ...]:
    words = ("-m", "ninefuse.bench.null_server", "--session", session)
    return (sys.executable, *words, str(site.mountpoint(name)))


def pyfuse3_version() -> str:
    """Return "pyfuse3" and the version that is installed."""
    return f"pyfuse3 {importlib.metadata.version('pyfuse3')}"


def version_of(processes: Processes, *command: str) -> str:
    """Return the first line of what a program says of its version, "" if it says nothing."""
    try:
        ended = processes.run(command, _VERSION_SECONDS, check=False)
    except BenchError:
        return ""
    said = ended.output.decode(errors="replace") + ended.errors
    return said.strip().partition("\n")[0].strip()


def _find(program: str, hint: str = "") -> str:
    found = shutil.which(program)
    if found is None:
        raise BenchError(f"no {program} in PATH{hint}")
    return found


def _bindfs(site: Site, name: str) -> Row:
    _find("bindfs", " (Debian: apt-get install bindfs)")
    options = ("--multithreaded",) if name == "bindfs-mt" else ()
    command = ("bindfs", "-f", *options, str(site.source), str(site.mountpoint(name)))
    note = " ".join(("bindfs", *options)) if options else "bindfs, one thread (its default)"
    return Row(name, "peer", command, version_of(site.processes, "bindfs", "--version"), note)


def _passthrough_ll(site: Site, name: str) -> Row:
    code = EXAMPLES / "passthrough_ll.c"
    if not code.is_file():
        raise BenchError(f"no {code} (Debian: apt-get install libfuse3-dev)")
    compiler = _find("cc" if shutil.which("cc") else "gcc")
    _find("pkg-config")
    run = site.processes.run
    flags = run(["pkg-config", "--cflags", "--libs", "fuse3"], _VERSION_SECONDS).output
    program = site.scratch / "passthrough_ll"
    build = [compiler, "-O2", "-o", str(program), str(code), *shlex.split(flags.decode())]
    run(build, _BUILD_SECONDS)
    # fuse_opt splits at commas; xattr: so that the kernel's question before each write is asked.
    source = str(site.source).replace("\\", "\\\\").replace(",", "\\,")
    command = (str(program), "-f", "-o", f"source={source},xattr", str(site.mountpoint(name)))
    version = run(["pkg-config", "--modversion", "fuse3"], _VERSION_SECONDS).output.decode()
    note = "libfuse's passthrough_ll -o xattr, cc -O2"
    return Row(name, "peer", command, f"libfuse {version.strip()}", note)


def _passthrough_hp(site: Site, name: str) -> Row:
    program = "passthrough_hp"
    _find(program, " (an example of libfuse 3.17 or later, built from its sources)")
    known = site.processes.run([program, "--help"], _VERSION_SECONDS, check=False)
    if b"--nopassthrough" not in known.output + known.errors.encode():
        raise BenchError(f"this {program} is older than the kernel's passthrough (libfuse 3.17)")
    options = PASSTHROUGH_HP[name]
    places = str(site.source), str(site.mountpoint(name))
    note = " ".join(("libfuse's", program, *options))
    return Row(name, "peer", (program, "--foreground", *options, *places), "", note)


def _example(site: Site, name: str) -> Row:
    version = pyfuse3_version().split()[1]
    archive = _fetched(site, version)
    member = f"pyfuse3-{version}/examples/passthroughfs.py"
    try:
        with tarfile.open(archive) as opened:
            if hasattr(tarfile, "data_filter"):
                opened.extract(member, site.scratch, filter="data")
            else:  # an early patch release of Python 3.10 or 3.11; it is one named file
                opened.extract(member, site.scratch)
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        archive.unlink(missing_ok=True)  # it may be half a download
        raise BenchError(f"no passthroughfs.py in {archive.name}: {error}") from error
    program = site.scratch / member
    command = (sys.executable, str(program), str(site.source), str(site.mountpoint(name)))
    note = "pyfuse3's passthroughfs.py; no xattrs, so not asked for one before each write"
    return Row(name, "peer", command, f"pyfuse3 {version}", note)


def cache_directory() -> Path:
    """Return where what was fetched is kept: below $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "ninefuse-bench"


def _fetched(site: Site, version: str) -> Path:
    """Return pyfuse3's source distribution, fetched with pip if it is not in the cache."""
    cache = cache_directory()
    archive = cache / f"pyfuse3-{version}.tar.gz"
    if archive.is_file():
        return archive
    target = site.scratch / "fetched"
    pip = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps"]
    pip += ["--retries=1", "--timeout=15", "--no-binary=pyfuse3", f"--dest={target}"]
    environment = ["env"]
    pins = Path(ninefuse.__file__).resolve().parent.parent / "requirements.txt"
    if pins.is_file():  # pip builds the metadata, with tools that the pins hold to versions
        environment += ["-C", str(pins.parent), f"PIP_CONSTRAINT={pins.name}"]
        environment += [f"PIP_BUILD_CONSTRAINT={pins.name}"]
    try:
        environment.append(f"TMPDIR={site.scratch}")
        site.processes.run([*environment, *pip, f"pyfuse3=={version}"], _FETCH_SECONDS)
        (made,) = target.glob("pyfuse3-*.tar.gz")
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f"{archive.name}.{os.getpid()}"
        shutil.copyfile(made, part)
        part.replace(archive)
    except (BenchError, OSError, ValueError) as error:
        raise BenchError(f"pip cannot fetch pyfuse3 {version} (offline?): {error}") from error
    return archive


def _given(peer: Peer) -> Maker:
    def make(site: Site, name: str) -> Row:
        _find(peer.words[0])
        places = {"{src}": str(site.source), "{mnt}": str(site.mountpoint(name))}
        command = tuple(_filled(word, places) for word in peer.words)
        return Row(name, "peer", command, "", f"--peer {shlex.join(peer.words)}")

    return make


def _filled(word: str, places: dict[str, str]) -> str:
    """Return the word with {src} and {mnt} replaced, and all other braces as they are."""
    return re.sub(r"\{(?:src|mnt)\}", lambda match: places[match[0]], word)
