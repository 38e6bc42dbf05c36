"""What others make and change on an `allow_other` mount is as on the source itself.

Each of these does the same with a directory of the source and with one of the mount, as the
same user, and compares what came of it in the source.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import SESSION, SOAK, Mount, Watchdog, become, errno_of, fresh_place, in_child, run

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for others"),
]

OWNER, STRANGER, GROUP = 12345, 12346, 4321

WAYS = {
    "none": ("--model", "none"),
    "first": ("--model", "first"),
    "request": ("--engine", "threads", "-o", "handover=request"),
    "default": (),
}


@pytest.fixture(params=WAYS if SOAK else ["none", "default"])
def both(
    request: pytest.FixtureRequest, shared_mounts: Callable[..., Mount], guard: Watchdog
) -> Iterator[tuple[Path, Path]]:
    """Two directories of the source, the second one seen through the mount."""
    mount = shared_mounts("-o", "allow_other", *WAYS[request.param])
    for directory in (mount.source, *mount.source.parents):
        os.chmod(directory, os.stat(directory).st_mode | 0o755)
    with fresh_place(mount) as place:
        for side in ("direct", "mounted"):
            (place.source / side).mkdir()
            (place.source / side).chmod(0o777)
        yield place.source / "direct", place.path / "mounted"


def as_user(
    uid: int, function: Callable[[Path], object], top: Path, groups: tuple[int, ...]
) -> object:
    """Call a function with a directory as another user; what it returned."""

    def act() -> object:
        os.chdir(top.parent)  # which the user may not be able to reach
        become(uid, groups)
        return function(Path(top.name))

    return in_child(act)


def alike(
    both: tuple[Path, Path],
    function: Callable[[Path], object],
    uid: int = OWNER,
    groups: tuple[int, ...] = (),
) -> object:
    """Do something on both sides; fail if it came out differently. The result."""
    direct, mounted = both
    expected = as_user(uid, function, direct, groups)
    assert as_user(uid, function, mounted, groups) == expected
    return expected


def look(path: Path) -> list[str]:
    """Names, modes, owners and lists of all that is below a directory."""
    names = sorted(str(below.relative_to(path)) for below in path.rglob("*"))
    modes = [os.lstat(path / name) for name in names]
    lists = run("getfacl", "-R", "-n", "-p", "--omit-header", path).stdout if names else ""
    return [
        f"{n} {s.st_mode:o} {s.st_uid} {s.st_gid}" for n, s in zip(names, modes, strict=True)
    ] + [lists]


def make_all(top: Path) -> None:
    """One of each kind, under several umasks."""
    for mask in (0o000, 0o022, 0o077, 0o777):
        os.umask(mask)
        os.close(os.open(top / f"file-{mask:o}", os.O_CREAT | os.O_WRONLY, 0o6755))
        os.mkdir(top / f"directory-{mask:o}", 0o7777)
        os.mkfifo(top / f"fifo-{mask:o}", 0o666)
        os.symlink("x", top / f"link-{mask:o}")


@pytest.mark.parametrize("acl", ["", "u:7:rwx,g::r-x,o::-", "u::rw,g::rw,o::rw"])
def test_the_umask_counts_only_where_there_is_no_default_list(
    both: tuple[Path, Path], acl: str
) -> None:
    direct, mounted = both
    if acl:
        if shutil.which("setfacl") is None:
            pytest.skip("setfacl(1) is not here: no default list can be made")
        for top in both:
            assert run("setfacl", "-d", "-m", acl, top).returncode == 0
    alike(both, make_all)
    assert look(mounted) == look(direct)
    assert len(look(direct)) == 17
    modes = {stat.S_IMODE(path.stat().st_mode) for path in direct.glob("file-*")}
    assert len(modes) == (1 if acl else 3)


@pytest.mark.parametrize("groups", [(), (GROUP,), (1, 2, GROUP, 9)])
def test_a_set_group_id_directory_gives_its_group_and_the_bit_to_members(
    both: tuple[Path, Path], groups: tuple[int, ...]
) -> None:
    """To those by a further group of theirs, too; to others the group without the bit."""
    for top in both:
        os.chown(top, OWNER, GROUP)
        top.chmod(0o2777)
    alike(both, make_all, STRANGER, groups)
    direct, mounted = both
    assert look(mounted) == look(direct)
    mode = (direct / "file-0").stat().st_mode
    assert bool(mode & stat.S_ISGID) == (GROUP in groups)
    assert (mounted / "file-0").stat().st_gid == GROUP


def test_root_may_keep_the_bit(both: tuple[Path, Path]) -> None:
    for top in both:
        os.chown(top, OWNER, GROUP)
        top.chmod(0o2777)
    alike(both, make_all, 0)
    direct, mounted = both
    assert look(mounted) == look(direct)
    assert (direct / "file-0").stat().st_mode & stat.S_ISGID


def change(top: Path) -> list[tuple[str, int, int]]:
    """Change files in all the ways that may cost them their bits; what they have then."""
    found = []
    for mode in (0o6777, 0o2777, 0o4666):
        for flags in (0, os.O_SYNC, os.O_DSYNC | os.O_APPEND):
            for how in ("write", "truncate", "ftruncate", "open", "chmod", "chown", "group"):
                name = top / f"{mode:o}-{flags}-{how}"
                fd = -1
                code = 0
                try:
                    fd = os.open(name, os.O_RDWR | flags | (os.O_TRUNC if how == "open" else 0))
                    if how == "write":
                        os.write(fd, b"changed")
                    elif how == "truncate":
                        os.truncate(name, 1)
                    elif how == "ftruncate":
                        os.ftruncate(fd, 1)
                    elif how == "chmod":
                        os.chmod(name, mode)
                    elif how == "chown":
                        os.chown(name, os.geteuid(), -1)
                    elif how == "group":
                        os.chown(name, -1, GROUP)
                except OSError as e:
                    code = e.errno or -1
                finally:
                    if fd >= 0:
                        os.close(fd)
                found.append((name.name, code, os.stat(name).st_mode))
    return found


@pytest.mark.parametrize("uid", [OWNER, STRANGER, 0])
def test_set_user_id_and_set_group_id_go_when_the_source_would_take_them(
    both: tuple[Path, Path], uid: int
) -> None:
    """By a write, a truncate and a chown; through the cache and past it."""
    for top in (both[0], both[0].parent / "mounted"):
        for mode in (0o6777, 0o2777, 0o4666):
            for flags in (0, os.O_SYNC, os.O_DSYNC | os.O_APPEND):
                for how in ("write", "truncate", "ftruncate", "open", "chmod", "chown", "group"):
                    path = top / f"{mode:o}-{flags}-{how}"
                    path.write_bytes(b"data")
                    os.chown(path, OWNER, GROUP)
                    path.chmod(mode)
    groups = (GROUP,) if uid == OWNER else ()
    direct, mounted = both
    found = as_user(uid, change, direct, groups)
    through = as_user(uid, change, mounted, groups)
    assert isinstance(found, list)
    assert isinstance(through, list)
    for theirs, ours in zip(found, through, strict=True):
        name, code, mode = theirs
        if uid == 0 and name.endswith("write") and SESSION == "pyfuse3":
            # Whether it is root that writes, it does not tell: the safe side.
            mode &= ~0o6000
        assert ours == (name, code, mode)


def write_to_marked(top: Path) -> list[tuple[str, int, int]]:
    """Write to files with the bit that gives nobody anything, in all ways; what they have then."""
    found = []
    for file in sorted(top.iterdir()):
        how = file.name.partition("-")[2]
        flags = {"sync": os.O_SYNC, "append": os.O_APPEND, "cut": os.O_TRUNC}.get(how, 0)
        code = 0
        try:
            fd = os.open(file, os.O_RDWR | flags)
            if how == "later" and os.geteuid() != STRANGER:
                file.chmod(0o2666)
            if how == "truncate":
                os.truncate(file, 1)
            elif how == "ftruncate":
                os.ftruncate(fd, 1)
            elif how == "map":
                with mmap.mmap(fd, 4) as memory:
                    memory[0:1] = b"x"
            elif how != "cut":
                os.write(fd, b"changed")
            os.close(fd)
        except OSError as e:
            code = e.errno or -1
        found.append((file.name, code, stat.S_IMODE(file.stat().st_mode)))
    return found


@pytest.mark.parametrize("uid", [OWNER, STRANGER, 0])
@pytest.mark.parametrize("groups", [(), (GROUP,)])
def test_a_set_group_id_bit_without_execution_stays_where_the_source_leaves_it(
    both: tuple[Path, Path], uid: int, groups: tuple[int, ...]
) -> None:
    """With root and members of the group; and nobody's write is refused for it."""
    hows = ["write", "later", "sync", "append", "truncate", "ftruncate", "cut"]
    if uid == 0 or groups:
        hows.append("map")
    for top in (both[0], both[0].parent / "mounted"):
        for mode in (0o2666, 0o6666):
            for how in hows:
                if mode == 0o6666 and (uid == 0 or how == "map"):
                    continue  # which take that bit on the mount alone
                path = top / f"{mode:o}-{how}"
                path.write_bytes(b"data")
                os.chown(path, OWNER, GROUP)
                path.chmod(0o666 if how == "later" else mode)
    found = alike(both, write_to_marked, uid, groups)
    assert isinstance(found, list)
    assert {code for _, code, _ in found} == {0}
    marks = {bool(mode & stat.S_ISGID) for name, _, mode in found if "later" not in name}
    assert marks == {uid == 0 or bool(groups)}


def set_list(top: Path) -> list[int]:
    """Set and remove lists on what has a set-group-id bit; all modes after it."""
    modes = []
    for name in ("directory", "file", "mark"):
        for words in (("-m", "u:7:rwx"), ("-b",)):
            run("setfacl", *words, top / name)
            modes.append(os.stat(top / name).st_mode)
    return modes


@pytest.mark.skipif(shutil.which("setfacl") is None, reason="setfacl(1) is not here")
@pytest.mark.parametrize(
    ("uid", "groups"), [(0, ()), (OWNER, ()), (OWNER, (GROUP,)), (STRANGER, (GROUP,))]
)
def test_an_access_list_costs_the_set_group_id_bit_those_whom_it_costs_it_on_the_source(
    both: tuple[Path, Path], uid: int, groups: tuple[int, ...]
) -> None:
    """Not the members of the group: a directory that they share would be none any more."""
    for top in (both[0], both[0].parent / "mounted"):
        (top / "directory").mkdir()
        for name, mode in (("directory", 0o2775), ("file", 0o2775), ("mark", 0o2664)):
            (top / name).touch()
            os.chown(top / name, OWNER, GROUP)
            (top / name).chmod(mode)
    modes = alike(both, set_list, uid, groups)
    assert isinstance(modes, list)
    assert bool(modes[-1] & stat.S_ISGID) == (uid == 0 or GROUP in groups)


def write_as_somebody_else(top: Path) -> list[int]:
    """As root open files with set-id bits, and write to them as another user; their modes."""
    files = [
        os.open(top / f"{flags}", os.O_RDWR | flags)
        for flags in (0, os.O_SYNC, os.O_DSYNC, os.O_APPEND)
    ]
    os.setresuid(OWNER, OWNER, OWNER)
    for file in files:
        os.write(file, b"changed")
    return [stat.S_IMODE(os.fstat(file).st_mode) for file in files]


def test_who_opened_a_file_does_not_matter_to_its_bits(both: tuple[Path, Path]) -> None:
    for top in (both[0], both[0].parent / "mounted"):
        for flags in (0, os.O_SYNC, os.O_DSYNC, os.O_APPEND):
            (top / f"{flags}").touch()
            (top / f"{flags}").chmod(0o6777)
    assert alike(both, write_as_somebody_else, 0) == [0o777] * 4


@pytest.mark.parametrize("sync", [False, True])
def test_the_blocks_reserved_for_root_are_for_root(
    new_mount: Callable[..., Mount], tmp_path: Path, sync: bool
) -> None:
    """A daemon of root would get them for everybody."""
    image, source = tmp_path / "image", tmp_path / "disk"
    source.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    made = run("mkfs.ext4", "-q", "-m", "30", image)
    if made.returncode or run("mount", "-o", "loop", image, source).returncode:
        pytest.skip(f"no ext4 on a loop device here: {made.stderr}")
    try:
        source.chmod(0o777)
        mount = new_mount("-o", "allow_other", source=source)
        for directory in mount.path.parents:
            os.chmod(directory, os.stat(directory).st_mode | 0o755)
        flags = os.O_SYNC if sync else 0
        (source / "many").mkdir()
        for number in range(200):
            (source / str(number)).touch()
        for path in source.iterdir():
            os.chown(path, OWNER, OWNER)

        def fill() -> int:
            become(OWNER)
            fd = os.open("big", os.O_WRONLY | os.O_CREAT | flags, 0o600)
            while True:
                code = errno_of(os.write, fd, b"x" * 65536)
                if code:
                    return code

        def filled() -> int:
            os.chdir(mount.path)
            return fill()

        assert in_child(filled) == errno.ENOSPC

        def spend() -> list[int]:
            """Use up what is left, by names and by attributes: the errors that end it."""
            os.chdir(mount.path)
            become(OWNER)
            links = (errno_of(os.link, "0", f"many/{n}" + "x" * 200) for n in range(500))
            attributes = (errno_of(os.setxattr, f"{n}", "user.x", b"x" * 700) for n in range(200))
            return [next(filter(None, codes), 0) for codes in (links, attributes)]

        assert in_child(spend) == [errno.ENOSPC, errno.ENOSPC]
        left = os.statvfs(source)
        assert left.f_bavail * left.f_frsize < 65536 + 8192
        assert left.f_bfree * left.f_frsize > 3 << 20
        (mount.path / "of root").write_bytes(b"x" * (1 << 20))
        mount.end()
    finally:
        run("umount", "-l", source)
