"""Trees and callers that mean harm: what they do must neither hang a mount nor lead it astray."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from mounting import MODELS, NINEFUSE, REPO, Mount, errno_of, in_child, run

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts in the source")


# The mount inside its own source


@contextmanager
def bound(what: Path, where: Path, option: str = "--bind") -> Iterator[None]:
    """Show a directory, or a file, at another place as well."""
    done = run("mount", option, what, where)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        run("umount", "-l", where)


def _look_around(path: Path) -> dict[str, int]:
    """What comes of each way to a name that leads back into its own mount."""
    (path / "other").write_bytes(b"x")
    return {
        "stat": errno_of(os.stat, path / "loop"),
        "below": errno_of(os.stat, path / "loop" / "file"),
        "open": errno_of(os.open, path / "loop", os.O_RDONLY),
        "create": errno_of(os.open, path / "loop" / "new", os.O_CREAT | os.O_WRONLY),
        "mkdir": errno_of(os.mkdir, path / "loop"),
        "rmdir": errno_of(os.rmdir, path / "loop"),
        "rename": errno_of(os.rename, path / "loop", path / "moved"),
        "over": errno_of(os.rename, path / "other", path / "loop"),
        "link": errno_of(os.link, path / "other", path / "loop"),
        "a file": errno_of(os.stat, path / "looped"),
    }


def _list(path: Path) -> list[str]:
    """The names of a directory, with their attributes where there are any."""
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() or entry.name)


@needs_root
@pytest.mark.limit(20.0)
@pytest.mark.parametrize("model", MODELS)
def test_a_mount_inside_its_own_source_is_not_entered(
    new_mount: Callable[..., Mount], model: str
) -> None:
    """Neither what is new to the mount nor what it knew before something was mounted on it."""
    mount = new_mount("--model", model, "-o", "cache=none")
    (mount.source / "loop").mkdir()
    (mount.source / "known" / "below").mkdir(parents=True)
    for name in ("file", "looped"):
        (mount.source / name).write_bytes(b"x")
    assert in_child(_list, mount.path / "known") == ["below"]
    with ExitStack() as stack:
        for name in ("loop", "known"):
            stack.enter_context(bound(mount.path, mount.source / name))
        stack.enter_context(bound(mount.path / "file", mount.source / "looped"))
        found = in_child(_look_around, mount.path, seconds=5.0)
        assert found == dict.fromkeys(found, errno.ELOOP)
        assert in_child(errno_of, os.rmdir, mount.path / "known", seconds=5.0) == errno.ELOOP
        listed = in_child(_list, mount.path, seconds=5.0)
        assert listed == ["file", "known", "loop", "looped", "other"]
        assert in_child(os.stat, mount.source / "loop" / "file", seconds=5.0).st_size == 1
    assert in_child(_list, mount.path / "known", seconds=5.0) == ["below"]
    assert in_child(errno_of, os.stat, mount.path / "loop", seconds=5.0) == 0


@needs_root
@pytest.mark.limit(20.0)
@pytest.mark.parametrize("model", MODELS)
def test_a_directory_above_both_inside_the_source(
    new_mount: Callable[..., Mount], tmp_path: Path, model: str
) -> None:
    """All of it is shown but the mount, and the source, which cannot be below itself."""
    mount = new_mount("--model", model, "-o", "cache=none")
    loop = mount.source / "loop"
    loop.mkdir()
    (mount.source / "file").write_bytes(b"x")
    above = mount.source.parent
    with bound(above, loop, "--rbind"):
        seen = mount.path / "loop"
        assert in_child(_list, seen, seconds=5.0) == ["log", "mount", "source"]
        assert in_child(errno_of, os.stat, seen / "mount", seconds=5.0) == errno.ELOOP
        # The kernel's own answer: it knows each directory by one place.
        again = in_child(errno_of, os.stat, seen / "source", seconds=5.0)
        assert again in (errno.ELOOP, errno.ESTALE, errno.EIO)
        assert in_child(os.stat, mount.path / "file", seconds=5.0).st_size == 1


# Directories that pass mounts on to each other; $1 is the model, the rest the command.
PASSED_ON = """
mount -t tmpfs tmpfs /mnt
mount --make-rshared /mnt
cd /mnt; mkdir -p top/mount top/source/loop; touch top/source/file
mount --bind top top/source/loop
model=$1; shift
"$@" --log /mnt/log --model "$model" top/source top/mount
trap 'cd /; fusermount3 -u /mnt/top/mount || fusermount3 -uz /mnt/top/mount' EXIT
grep -c ninefuse /proc/self/mountinfo
ls top/mount/loop
for n in top/mount/loop/mount top/mount/loop/mount/file top/mount/file; do
    timeout 5 "$PYTHON" -c 'import os, sys; os.stat(sys.argv[1])' $n 2>&1 | grep -o "Errno [0-9]*"
done
true
"""


@needs_root
@pytest.mark.parametrize("model", MODELS)
def test_a_mount_that_is_passed_on_into_its_own_source(model: str) -> None:
    """As on systems where all mounts are shared: the bind mount was there before."""
    namespace = ("unshare", "-m", "--propagation", "private", "env", f"PYTHON={sys.executable}")
    done = run(*namespace, f"PYTHONPATH={REPO}", "sh", "-ec", PASSED_ON, "sh", model, *NINEFUSE)
    assert done.stderr == ""
    # Twice in the table, since it is at the bind mount, too.
    assert done.stdout.split("\n") == ["2", "mount", "source", *2 * [f"Errno {errno.ELOOP}"], ""]
