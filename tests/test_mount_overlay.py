"""overlayfs on the mount: its upper and its lower directory there, as containers have them."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mounting import Mount, Place, errno_of, run
from servers import SOME_MODELS

from ninefuse.linux.syscalls import RENAME_WHITEOUT, rename

pytestmark = pytest.mark.soak

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts an overlay")


@contextlib.contextmanager
def overlay(on: Path, lower: Path, base: Path) -> Iterator[Path]:
    """An overlay whose upper and work directories are in ``base``.

    They are asked for whatever the kernel has to say of them: a mount that is refused is a
    failure, if the same is to be had of the source.
    """
    for path in (on, base / "upper", base / "work"):
        path.mkdir(exist_ok=True)
    options = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work"
    done = run("mount", "-t", "overlay", "overlay", "-o", options, on)
    assert done.returncode == 0, done.stderr
    try:
        yield on
    finally:
        assert run("umount", on).returncode == 0 or run("umount", "-l", on).returncode == 0


def needs_overlay(tmp_path: Path, base: Path) -> None:
    """Skip the test where the source's own file system can be no upper directory."""
    (base / "lower").mkdir(parents=True)
    try:
        with overlay(tmp_path / "try", base / "lower", base):
            pass
    except AssertionError as e:
        pytest.skip(f"no overlay on the source's file system: {e}")


def plant(lower: Path) -> None:
    """What a base image would have: files, links, directories, one with many names."""
    (lower / "etc").mkdir(parents=True)
    (lower / "etc/passwd").write_text("root\n")
    (lower / "etc/mode").write_bytes(b"x")
    (lower / "etc/mode").chmod(0o640)
    (lower / "many").mkdir()
    for number in range(100):
        (lower / f"many/{number}").write_bytes(b"%d" % number)
    (lower / "link").symlink_to("etc/passwd")
    os.link(lower / "etc/passwd", lower / "hard")
    (lower / "deep/a/b").mkdir(parents=True)
    (lower / "deep/a/b/file").write_bytes(b"deep")


def use(merged: Path) -> None:
    """What a package's installation does, and its removal: everything that an upper is asked."""
    with open(merged / "etc/passwd", "a") as file:
        file.write("daemon\n")
    for number in range(60):
        (merged / f"many/{number}").unlink()
    os.rename(merged / "many/70", merged / "many/seventy")
    os.rename(merged / "many/71", merged / "many/72")
    shutil.rmtree(merged / "deep")
    (merged / "deep").mkdir()
    (merged / "deep/new").write_bytes(b"new")
    (merged / "fresh/below").mkdir(parents=True)
    os.rename(merged / "fresh", merged / "moved")
    (merged / "etc/new").write_bytes(b"replaced")
    os.rename(merged / "etc/new", merged / "etc/mode")
    (merged / "link").unlink()
    (merged / "link").mkdir()
    os.chown(merged / "hard", 5, 6)
    (merged / "hard").chmod(0o600)
    os.setxattr(merged / "hard", b"user.k", b"v")
    os.mkfifo(merged / "fifo")
    os.truncate(merged / "many/90", 0)
    with open(merged / "many/91", "r+b") as file:
        file.write(b"XY")
        os.fsync(file.fileno())


class Seen(NamedTuple):
    """What is to be seen of a file, but times and numbers."""

    mode: int
    uid: int
    gid: int
    rdev: int
    content: object
    attributes: dict[str, bytes]


def tree(top: Path) -> dict[str, Seen]:
    """All that is to be seen below a directory."""
    found: dict[str, Seen] = {}
    for directory, names, files in os.walk(top):
        for name in sorted(names + files):
            path = Path(directory, name)
            a = path.lstat()
            content: object = None
            if path.is_symlink():
                content = os.readlink(path)
            elif stat.S_ISREG(a.st_mode):
                content = path.read_bytes()
            attributes = {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
            }
            where = str(path.relative_to(top))
            found[where] = Seen(a.st_mode, a.st_uid, a.st_gid, a.st_rdev, content, attributes)
    return found


@needs_root
@pytest.mark.parametrize("model", SOME_MODELS)
def test_an_upper_directory_on_the_mount_is_as_one_on_the_source(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    needs_overlay(tmp_path, tmp_path / "probe")
    lower = tmp_path / "lower"
    plant(lower)
    plain = tmp_path / "plain"
    plain.mkdir()
    mount = new_mount("--model", model)
    for base in (plain, mount.path):
        with overlay(tmp_path / "merged", lower, base) as merged:
            use(merged)
        with overlay(tmp_path / "merged", lower, base) as merged:  # nothing but what is stored
            (merged.parent / f"{base.name}.tree").write_text(repr(sorted(tree(merged).items())))
    seen = [(tmp_path / f"{name}.tree").read_text() for name in ("plain", mount.path.name)]
    assert seen[0] == seen[1]
    layers = tree(plain / "upper"), tree(mount.source / "upper")
    for layer in layers:
        for entry in layer.values():
            # File handles and ids of the lower file system, of which the mount has none.
            for name in ("trusted.overlay.origin", "trusted.overlay.uuid"):
                entry.attributes.pop(name, None)
            entry.attributes.pop("trusted.overlay.impure", None)
    assert layers[0] == layers[1]
    assert any(stat.S_ISCHR(e.mode) and e.rdev == 0 for e in layers[1].values()), "whiteouts"


@needs_root
def test_a_package_is_unpacked_and_removed_over_an_upper_on_the_mount(
    new_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """With the system's own programs: cp, mv, rm, tar over what the interpreter came with."""
    needs_overlay(tmp_path, tmp_path / "probe")
    package = tmp_path / "package"
    shutil.copytree(Path(os.__file__).parent / "email", package / "email")
    shutil.copytree(Path(os.__file__).parent / "json", package / "json")
    script = """
    set -e
    cp -a "$1" "$2/usr"
    tar -C "$1" -cf - . | tar -C "$2" -xf -
    mv "$2/email" "$2/mail"
    rm -r "$2/json"
    cp -a "$2/usr/json" "$2/json"
    mv "$2/usr/json/decoder.py" "$2/json/encoder.py"
    rm -r "$2/usr"
    """
    mount = new_mount()
    plain = tmp_path / "plain"
    plain.mkdir()
    seen = []
    for base in (plain, mount.path):
        with overlay(tmp_path / "merged", package, base) as merged:
            done = run("sh", "-ec", script, "sh", package, merged)
            assert done.returncode == 0, done.stderr
        with overlay(tmp_path / "merged", package, base) as merged:
            seen.append(tree(merged))
    assert seen[0] == seen[1]
    assert any(name.startswith("mail/") for name in seen[1])


@needs_root
@pytest.mark.parametrize("model", SOME_MODELS)
def test_root_in_a_container_has_fewer_rights_than_who_mounted_the_overlay(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    """Its process may set no attribute of overlayfs's; overlayfs may, and asks for it."""
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv")
    needs_overlay(tmp_path, tmp_path / "probe")
    lower = tmp_path / "lower"
    plant(lower)
    mount = new_mount("--model", model)
    script = """
    rm -r deep many/1
    mkdir deep many/1
    echo x >> etc/passwd
    mv many/2 many/two
    """
    fewer = "--bounding-set=-sys_admin,-mknod,-sys_resource"
    with overlay(tmp_path / "merged", lower, mount.path) as merged:
        done = run("setpriv", fewer, "sh", "-ec", f"cd {merged}\n{script}")
        assert (done.returncode, done.stderr) == (0, "")
        assert os.listdir(merged / "deep") == []
    upper = mount.source / "upper"
    assert os.getxattr(upper / "deep", "trusted.overlay.opaque") == b"y"
    assert (upper / "etc/passwd").read_text() == "root\nx\n"
    assert (upper / "many/two").read_bytes() == b"2"
    # Without the overlay it has no right to them, as on the source.
    (mount.path / "file").touch()
    own = "import os, sys; os.setxattr(sys.argv[1], 'trusted.x', b'1')"
    done = run("setpriv", fewer, sys.executable, "-c", own, mount.path / "file")
    assert "PermissionError" in done.stderr
    assert os.listxattr(mount.source / "file") == []


@needs_root
@pytest.mark.limit(30.0)
@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_program_is_started_with_a_file_open_that_was_copied_up(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    """execve(2) closes it, which overlayfs has the mount asked for: amid a change of the process.

    Who looked for the caller in /proc then, where most of it waits for the end of that change,
    kept waiting him, itself, and everybody who lists processes.
    """
    needs_overlay(tmp_path, tmp_path / "probe")
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "file").write_bytes(b"1")
    mount = new_mount("--model", model)
    script = """
import os, sys
uid, name = int(sys.argv[1]), sys.argv[2]
reader = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
writer = os.open(name, os.O_WRONLY | os.O_CLOEXEC)
os.setresuid(uid, uid, uid)
os.execv("/bin/echo", ["echo", "started"])
"""
    for uid in ("0", "1234"):
        with overlay(tmp_path / "merged", lower, mount.path) as merged:
            done = run(sys.executable, "-c", script, uid, merged / "file")
        assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")
        shutil.rmtree(mount.path / "upper")
        shutil.rmtree(mount.path / "work")


@needs_root
def test_a_lower_directory_on_the_mount(new_mount: Callable[..., Mount], tmp_path: Path) -> None:
    needs_overlay(tmp_path, tmp_path / "probe")
    mount = new_mount()
    plant(mount.source / "lower")
    base = tmp_path / "upper"
    base.mkdir()
    before = tree(mount.source / "lower")
    with overlay(tmp_path / "merged", mount.path / "lower", base) as merged:
        assert tree(merged) == before
        use(merged)
        assert (merged / "etc/passwd").read_text() == "root\ndaemon\n"
    assert tree(mount.source / "lower") == before


def test_the_name_that_was_moved_shows_a_whiteout_at_once(place: Place) -> None:
    (place.path / "one").write_bytes(b"1")
    (place.path / "two").write_bytes(b"2")
    fd = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if errno_of(rename, fd, b"one", fd, b"new", RENAME_WHITEOUT):
            there = os.open(place.source, os.O_RDONLY | os.O_DIRECTORY)
            try:
                code = errno_of(rename, there, b"one", there, b"new", RENAME_WHITEOUT)
            finally:
                os.close(there)
            assert code != 0, "the source does it"
            pytest.skip("the source's file system has no whiteouts, or this user no right to them")
    finally:
        os.close(fd)
    assert (place.path / "new").read_bytes() == b"1"
    left = (place.path / "one").lstat()
    assert (stat.S_ISCHR(left.st_mode), left.st_rdev) == (True, 0)
    assert left.st_uid == os.geteuid()
    assert sorted(os.listdir(place.path)) == ["new", "one", "two"]
    (place.path / "one").unlink()
    assert not (place.source / "one").exists()
