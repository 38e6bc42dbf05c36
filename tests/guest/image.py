"""What a guest is booted from: Debian's kernel, and one archive with all that runs in it.

The packages are fetched by apt-get, as for an empty machine, and nothing of them is installed
here. The kernel takes the archive (an initramfs) as its root, so there is no disk. Both are kept
in build/guest until what they are made of changes; `make clean` removes them.

`make guest` makes it; so does `python tests/guest/image.py`. Debian on amd64 only.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent.parent / "build" / "guest"

KERNEL = "linux-image-amd64"  # depends on the package of the newest one
# What runs in the guest, with all that these depend on.
PACKAGES = (
    "busybox-static",
    "coreutils",
    "git",
    "libpython3-stdlib",
    "openssl",
    "perl",
    "python3-minimal",
)
# The kernel's modules, with all that these depend on.
MODULES = ("virtio_pci", "virtio_net", "virtio_console", "9p", "9pnet_fd", "9pnet_virtio")
_FETCH_SECONDS = 300.0

# Of the packages: what nobody reads there.
_LEFT_OUT = re.compile(
    r"usr/share/(doc|man|locale|info|lintian)/|.*/(gconv|unicore|CORE)/|.*\.pod$"
)
# Debian's merged directories: what packages call /bin/sh lies in /usr/bin.
_MERGED = ("bin", "sbin", "lib", "lib64")


class ImageError(Exception):
    """A guest cannot be made here. The message is one line for the user."""


@dataclass(frozen=True)
class Image:
    """What QEMU boots. kernel, archive: files. release: the kernel's, as uname says it."""

    kernel: Path
    archive: Path
    release: str


def image() -> Image:
    """Return the image, made anew if what it is made of has changed.

    Raises ImageError.
    """
    made = Image(KEPT / "vmlinuz", KEPT / "initramfs", "")
    stamp, wanted = KEPT / "stamp", _ingredients()
    try:
        said, release = stamp.read_text().split()
    except (OSError, ValueError):
        said = ""
    if said != wanted:
        release = _make(made)
        stamp.write_text(f"{wanted} {release}\n")
    return Image(made.kernel, made.archive, release)


def _ingredients() -> str:
    files = [HERE / name for name in ("image.py", "init.sh", "agent.py")]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _make(made: Image) -> str:
    """Write kernel and archive, and return the kernel's release."""
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ImageError(f"a guest is made of Debian's packages, and there is no {program}")
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / "stamp").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as name:
        scratch = Path(name)
        kernel_package = _newest_kernel()
        packages = _fetch(scratch, kernel_package)
        root = Root()
        modules: dict[str, bytes] = {}
        for package in packages:
            if package.name.startswith(kernel_package):
                made.kernel.write_bytes(_kernel(package, modules))
            else:
                root.add_package(package)
    order = _in_order(modules)
    for number, module in enumerate(order):
        root.add(f"modules/{number:02}-{module}.ko", stat.S_IFREG | 0o644, modules[module])
    for source, target in (("init.sh", "init"), ("agent.py", "agent.py")):
        root.add(target, stat.S_IFREG | 0o755, (HERE / source).read_bytes())
    root.write(made.archive)
    return kernel_package.removeprefix("linux-image-")


# Packages


def _run(*words: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=_FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{words[0]} did not end within {_FETCH_SECONDS:g} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ImageError(f"{' '.join(words)[:80]} failed, and said: {said}")
    return done.stdout


def _newest_kernel() -> str:
    found = re.search(r"Depends: (linux-image-\d\S+)", _run("apt-cache", "depends", KERNEL))
    if found is None:
        raise ImageError(f"no package {KERNEL} (apt-get update, on Debian for amd64)")
    return found[1]


def _fetch(scratch: Path, kernel_package: str) -> list[Path]:
    """Fetch all packages into a directory, and return them."""
    (scratch / "partial").mkdir()
    status = scratch / "status"
    status.touch()  # of a machine that has nothing
    alone = (f"Dir::State::status={status}", f"Dir::Cache::archives={scratch}")
    options = [word for option in ("Debug::NoLocking=1", *alone) for word in ("-o", option)]
    install = ("--no-install-recommends", "--download-only", "-y", "install")
    _run("apt-get", "-qq", *options, *install, *PACKAGES)
    _run("apt-get", "-qq", "download", kernel_package, cwd=scratch)
    return sorted(scratch.glob("*.deb"))


@contextmanager
def _contents(package: Path) -> Iterator[tarfile.TarFile]:
    """Open what a package holds, as a stream."""
    words = ["dpkg-deb", "--fsys-tarfile", str(package)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        yield archive
    if process.returncode:
        raise ImageError(f"{package.name} is not whole")


# The kernel


def _kernel(package: Path, modules: dict[str, bytes]) -> bytes:
    """Return the kernel itself, and fill in the modules by name: those of MODULES and beneath."""
    every: dict[str, bytes] = {}
    kernel = b""
    with _contents(package) as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            if not member.isfile() or not (".ko" in name or name.startswith("vmlinuz")):
                continue
            if name.startswith("vmlinuz"):
                kernel = _read(archive, member)
            elif any(part in member.name for part in _PLACES):
                plain = name.partition(".ko")[0].replace("-", "_")
                every[plain] = _unpacked(name, _read(archive, member))
    wanted = list(MODULES)
    while wanted:
        name = wanted.pop()
        # What is built in has no file.
        if name in every and name not in modules:
            modules[name] = every[name]
            wanted += _needs(every[name])
    missing = {"9p", "9pnet_fd", "virtio_console"} - set(modules)
    if not kernel or missing:
        raise ImageError(f"{package.name} has no kernel, or lacks {', '.join(missing)}")
    return kernel


# Where in the package the modules lie: others need not be unpacked.
_PLACES = (
    "/fs/9p/",
    "/net/9p/",
    "/fs/netfs/",
    "/fs/fscache/",
    "/virtio/",
    "/drivers/net/",
    "/char/",
    "/net/core/",
)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member.name
    return file.read()


def _unpacked(name: str, content: bytes) -> bytes:
    return lzma.decompress(content) if name.endswith(".xz") else content


def _needs(module: bytes) -> list[str]:
    """Return the names of the modules that a module names in its own description."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return (
        [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []
    )


def _in_order(modules: dict[str, bytes]) -> list[str]:
    """Return the names so that each comes after those that it needs."""
    order: list[str] = []

    def place(name: str) -> None:
        if name in modules and name not in order:
            for needed in _needs(modules[name]):
                place(needed)
            order.append(name)

    for name in MODULES:
        place(name)
    return order


# The archive


@dataclass
class Root:
    """The guest's root directory, and how it is written: cpio's format that kernels read.

    entries: what each path is, relative to the root: its mode, and what a file holds or a
    symbolic link says.
    """

    entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _MERGED:
            self.add(f"usr/{name}", stat.S_IFDIR | 0o755)
            self.add(name, stat.S_IFLNK | 0o777, f"usr/{name}".encode())
        for name in ("proc", "sys", "dev", "tmp", "mnt", "busybox", "root", "etc"):
            self.add(name, stat.S_IFDIR | 0o755)
        self.add("usr/bin/sh", stat.S_IFLNK | 0o777, b"busybox")
        users = b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"
        self.add("etc/passwd", stat.S_IFREG | 0o644, users)
        self.add("etc/group", stat.S_IFREG | 0o644, b"root:x:0:\nnogroup:x:65534:\n")

    def add(self, path: str, mode: int, content: bytes = b"") -> None:
        """Add an entry, and the directories that it lies in."""
        above = path.rpartition("/")[0]
        if above and above not in self.entries:
            self.add(above, stat.S_IFDIR | 0o755)
        self.entries[path] = (mode, content)

    def add_package(self, package: Path) -> None:
        with _contents(package) as archive:
            for member in archive:
                path = self._place(member.name)
                if not path or _LEFT_OUT.match(path):
                    continue
                if member.isfile():
                    self.add(path, stat.S_IFREG | member.mode, _read(archive, member))
                elif member.issym():
                    self.add(path, stat.S_IFLNK | 0o777, member.linkname.encode())
                elif member.islnk():
                    target = "/" + self._place(member.linkname)
                    self.add(path, stat.S_IFLNK | 0o777, target.encode())
                elif member.isdir() and path not in self.entries:
                    self.add(path, stat.S_IFDIR | member.mode)

    @staticmethod
    def _place(name: str) -> str:
        path = name.removeprefix(".").strip("/")
        return f"usr/{path}" if path.split("/", 1)[0] in _MERGED else path

    def write(self, target: Path) -> None:
        """Write the archive, in one step."""
        part = target.with_suffix(".part")
        with open(part, "wb") as file:
            entries = sorted(self.entries.items())
            for number, (path, (mode, content)) in enumerate(entries, 1):
                file.write(_record(number, path, mode, content))
            file.write(_record(0, "TRAILER!!!", 0, b""))
        part.replace(target)


def _record(number: int, path: str, mode: int, content: bytes) -> bytes:
    """Return one entry (the kernel's Documentation/driver-api/early-userspace/buffer-format)."""
    name = path.encode() + b"\0"
    #        ino     mode  uid gid nlink mtime size  device node, twice  name  checksum
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % one for one in fields)
    return _padded(head + name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


if __name__ == "__main__":
    try:
        print(image())
    except ImageError as problem:
        sys.exit(f"guest: {problem}")
