"""What the mount may still show of the source as it was: docs/caching.md, row by row."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mounting import REPO, Mount, become, errno_of, in_child

MODES = ("none", "auto", "loose")
A_SECOND = 1.0
MARGIN = 0.5  # seconds
PAGE = mmap.PAGESIZE

CAPABILITY = "security.capability"
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep
ACL = "system.posix_acl_access"


def acl_for(user: int) -> bytes:
    """An access ACL that lets one more user read (acl(5), as the kernel has it)."""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, 4, user), (4, 0, nobody), (16, 4, nobody), (32, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@dataclass
class Case:
    """A directory in which something is looked at, changed in the source, and looked at again.

    Attributes:
        mount, source: the directory, through the mount and without it.
        stack: closed at the end.
    """

    mount: Path
    source: Path
    stack: ExitStack
    look: Callable[[], object] = field(init=False)
    change: Callable[[], object] = field(init=False)
    new: object = field(init=False)
    ask: Callable[[], object] | None = None  # what comes before the change; else look

    def file(self, data: bytes = b"old") -> None:
        (self.source / "file").write_bytes(data)

    def open(self, flags: int = os.O_RDONLY) -> int:
        """Open the file through the mount, and nothing else: Python's open() would stat it."""
        fd = os.open(self.mount / "file", flags)
        self.stack.callback(os.close, fd)
        return fd

    def read(self, offset: int = 0) -> bytes:
        """What is read from the file, opened anew."""
        fd = os.open(self.mount / "file", os.O_RDONLY)
        try:
            return os.pread(fd, 100, offset)
        finally:
            os.close(fd)

    def rewrite(self, data: bytes, *, same_time: bool = False) -> None:
        """Write over the beginning of the file, in the source."""
        before = (self.source / "file").stat()
        with open(self.source / "file", "r+b") as file:
            file.write(data)
        if same_time:
            os.utime(self.source / "file", ns=(before.st_atime_ns, before.st_mtime_ns))
        else:  # whatever the resolution of the file system's clock
            os.utime(self.source / "file")

    def append(self, data: bytes) -> None:
        with open(self.source / "file", "ab") as file:
            file.write(data)

    def replace(self, data: bytes = b"new") -> None:
        (self.source / "other").write_bytes(data)
        (self.source / "other").rename(self.source / "file")


def attribute(path: Path, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None


def opens_for_another_user(directory: Path) -> bool:
    return works_for_another_user(directory, os.open, "file", os.O_RDONLY)


def may_be_looked_at_by_another_user(directory: Path) -> bool:
    return works_for_another_user(directory, os.stat, "file")


def works_for_another_user(directory: Path, call: Callable[..., object], *args: object) -> bool:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)

    def attempt() -> bool:
        become(4711)
        return errno_of(call, *args, dir_fd=fd) == 0

    try:
        return in_child(attempt)
    finally:
        os.close(fd)


def attributes(case: Case) -> None:
    def look() -> object:
        found = (case.mount / "file").stat()
        return stat.S_IMODE(found.st_mode), found.st_size, found.st_mtime, found.st_nlink

    def change() -> None:
        case.append(b"!")
        (case.source / "file").chmod(0o601)
        os.link(case.source / "file", case.source / "link")
        os.utime(case.source / "file", (5, 5))

    case.file()
    case.look, case.change, case.new = look, change, (0o601, 4, 5.0, 2)


def permission_taken(case: Case) -> None:
    case.file()
    (case.source / "file").chmod(0o604)
    case.look = lambda: opens_for_another_user(case.mount)
    case.change, case.new = lambda: (case.source / "file").chmod(0o600), False


def search_taken(case: Case) -> None:
    case.file()
    case.source.chmod(0o711)
    case.look = lambda: may_be_looked_at_by_another_user(case.mount)
    case.change, case.new = lambda: case.source.chmod(0o700), False


def permission_given(case: Case) -> None:
    case.file()
    (case.source / "file").chmod(0o600)
    case.look = lambda: opens_for_another_user(case.mount)
    case.change, case.new = lambda: (case.source / "file").chmod(0o604), True


def acl(case: Case) -> None:
    case.file()
    (case.source / "file").chmod(0o600)
    case.look = lambda: attribute(case.mount / "file", ACL) is not None
    case.change = lambda: os.setxattr(case.source / "file", ACL, acl_for(4711))
    case.new = True


def capability_set(case: Case) -> None:
    case.file()
    case.look = lambda: attribute(case.mount / "file", CAPABILITY)
    case.change = lambda: os.setxattr(case.source / "file", CAPABILITY, NET_RAW)
    case.new = NET_RAW


def capability_removed(case: Case) -> None:
    case.file()
    os.setxattr(case.source / "file", CAPABILITY, NET_RAW)
    case.look = lambda: attribute(case.mount / "file", CAPABILITY)
    case.change, case.new = lambda: os.removexattr(case.source / "file", CAPABILITY), None


def other_attribute(case: Case) -> None:
    case.file()
    case.look = lambda: attribute(case.mount / "file", "user.name")
    case.change = lambda: os.setxattr(case.source / "file", "user.name", b"new")
    case.new = b"new"


def name_removed(case: Case) -> None:
    case.file()
    case.look, case.new = lambda: (case.mount / "file").exists(), False
    case.change = lambda: (case.source / "file").unlink()


def name_replaced(case: Case) -> None:
    case.file()
    case.look, case.change, case.new = case.read, case.replace, b"new"


def directory_moved(case: Case) -> None:
    (case.source / "directory").mkdir()
    (case.source / "directory" / "name").touch()
    case.look, case.new = lambda: (case.mount / "directory" / "name").exists(), False
    case.change = lambda: (case.source / "directory").rename(case.source / "moved")


def name_made_after_a_look(case: Case) -> None:
    case.look, case.change, case.new = lambda: (case.mount / "file").exists(), case.file, True


def name_made(case: Case) -> None:
    case.look, case.change, case.new = lambda: (case.mount / "file").exists(), case.file, True
    case.ask = lambda: (case.mount / "another").exists()


def listing(case: Case) -> None:
    def look() -> object:
        os.lseek(fd, 0, os.SEEK_SET)
        return sorted(os.listdir(fd)), sorted(os.listdir(case.mount))

    def change() -> None:
        (case.source / "file").unlink()
        (case.source / "made").touch()

    case.file()
    fd = os.open(case.mount, os.O_RDONLY | os.O_DIRECTORY)
    case.stack.callback(os.close, fd)
    case.look, case.change, case.new = look, change, (["made"], ["made"])


def data_of_an_open_file(case: Case) -> None:
    case.file()
    fd = case.open()
    case.look = lambda: os.pread(fd, 100, 0)
    case.change, case.new = lambda: case.rewrite(b"new"), b"new"


def data_of_an_open_file_and_no_new_time(case: Case) -> None:
    data_of_an_open_file(case)
    case.change = lambda: case.rewrite(b"new", same_time=True)


def data_of_a_locked_file(case: Case) -> None:
    case.file()
    fd = case.open()

    def look() -> object:
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            return os.pread(fd, 100, 0)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    case.look, case.change, case.new = look, lambda: case.rewrite(b"new"), b"new"


def data_opened_anew(case: Case) -> None:
    case.file()
    case.look, case.change, case.new = case.read, lambda: case.rewrite(b"new"), b"new"


def data_opened_anew_and_no_new_time(case: Case) -> None:
    data_opened_anew(case)
    case.change = lambda: case.rewrite(b"new", same_time=True)


def data_beyond_the_end(case: Case) -> None:
    case.file()
    fd = case.open()
    case.look = lambda: (case.read(), os.pread(fd, 100, 3))
    case.change, case.new = lambda: case.append(b"er"), (b"older", b"er")


def direct_data(case: Case) -> None:
    case.file(b"a" * PAGE)
    fd = case.open(os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, 4 * PAGE)
    case.stack.callback(memory.close)

    def look() -> object:
        return memory[: os.preadv(fd, [memory], 0)]

    def change() -> None:
        case.rewrite(b"b" * PAGE, same_time=True)
        case.append(b"c")

    case.look, case.change, case.new = look, change, b"b" * PAGE + b"c"


def data_of_an_appender(case: Case) -> None:
    case.file()
    fd = case.open(os.O_RDWR | os.O_APPEND)

    def change() -> None:
        case.rewrite(b"new", same_time=True)
        case.append(b"er")

    case.look, case.change, case.new = lambda: os.pread(fd, 100, 0), change, b"newer"


def mapped_data(case: Case) -> None:
    case.file(b"a" * PAGE)
    mapping = mmap.mmap(case.open(), PAGE, prot=mmap.PROT_READ)
    case.stack.callback(mapping.close)
    case.look, case.new = lambda: mapping[:PAGE], b"b" * PAGE
    case.change = lambda: case.rewrite(b"b" * PAGE)


# In the order of the table in docs/caching.md.
CASES = (
    attributes,
    permission_taken,
    search_taken,
    permission_given,
    acl,
    capability_set,
    capability_removed,
    other_attribute,
    name_removed,
    name_replaced,
    directory_moved,
    name_made_after_a_look,
    name_made,
    listing,
    data_of_an_open_file,
    data_of_an_open_file_and_no_new_time,
    data_of_a_locked_file,
    data_opened_anew,
    data_opened_anew_and_no_new_time,
    data_beyond_the_end,
    direct_data,
    data_of_an_appender,
    mapped_data,
)
FOR_ROOT = (
    permission_taken,
    search_taken,
    permission_given,
    acl,
    capability_set,
    capability_removed,
)
FOR_OUR_SESSION = (data_of_a_locked_file,)  # pyfuse3 does not pass locks on


def the_table() -> list[dict[str, str]]:
    """The rows of the first table in docs/caching.md, cells by their column's head."""
    text = (REPO / "docs" / "caching.md").read_text()
    lines = text[text.index("| what was changed") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def shown(mount: dict[str, Mount], again_after: float, hurry: float) -> dict[tuple[str, str], str]:
    """Make all the changes, and say when each was seen: "at once", "later" or "not".

    Args:
        mount: the mounts, by names that are the results' too, beside the cases'.
        again_after: when to look again, in seconds after the change.
        hurry: within how many seconds all is to be looked at for the first time, again and
            again if that does not succeed, since only then it is known what is remembered.
    """
    for attempt in range(10):
        with ExitStack() as stack:
            cases = {}
            for name, make in itertools.product(mount, CASES):
                if (os.geteuid() == 0 or make not in FOR_ROOT) and (
                    mount[name].is_native or make not in FOR_OUR_SESSION
                ):
                    directory = f"{attempt} {make.__name__}"
                    source = mount[name].source / directory
                    source.mkdir()
                    case = Case(mount[name].path / directory, source, stack)
                    make(case)
                    cases[name, make.__name__] = case
            started = time.monotonic()
            for case in cases.values():
                assert (case.ask or case.look)() != case.new
            for case in cases.values():
                case.change()
            changed = time.monotonic()
            first = {key: case.look() == case.new for key, case in cases.items()}
            if time.monotonic() - started > hurry:
                continue
            time.sleep(max(0.0, changed + again_after - time.monotonic()))
            second = {key: case.look() == case.new for key, case in cases.items()}
            return {
                key: "at once" if first[key] else "later" if second[key] else "not" for key in cases
            }
    raise TimeoutError("this machine is too slow for this test")


def options(*words: str) -> tuple[str, str]:
    """As root, with what makes the kernel evaluate ACLs, and lets another user try."""
    return "-o", ",".join((*words, "allow_other") if os.geteuid() == 0 else words)


@pytest.mark.alone  # all is to be looked at within a second, which nothing else must take
def test_mounts_are_as_stale_as_the_table_says(new_mount: Callable[..., Mount]) -> None:
    mounts = {mode: new_mount(*options(f"cache={mode}")) for mode in MODES}
    found = shown(mounts, A_SECOND + MARGIN, hurry=0.9 * A_SECOND)
    seen_as = {"at once": "at once", "1 s": "later"}
    rows = dict(zip((make.__name__ for make in CASES), the_table(), strict=True))
    assert found == {(mode, name): seen_as.get(rows[name][mode], "not") for mode, name in found}


def test_a_day_is_what_the_timeouts_say(new_mount: Callable[..., Mount]) -> None:
    """With shorter ones, what the table gives a day is seen when they are over."""
    seconds = "attr_timeout=0.6,entry_timeout=0.6,negative_timeout=0.6"
    mounts = {"loose": new_mount(*options("cache=loose", seconds))}
    found = shown(mounts, 0.6 + MARGIN, hurry=0.5)
    seen_as = {"at once": "at once", "1 day": "later"}
    rows = dict(zip((make.__name__ for make in CASES), the_table(), strict=True))
    assert found == {(mode, name): seen_as.get(rows[name][mode], "not") for mode, name in found}


def prepared(mount: Mount, stack: ExitStack, *makers: Callable[[Case], None]) -> list[Case]:
    """Cases that have been looked at, and then changed in the source."""
    cases = []
    for make in makers:
        (mount.source / make.__name__).mkdir()
        case = Case(mount.path / make.__name__, mount.source / make.__name__, stack)
        make(case)
        assert case.look() != case.new
        case.change()
        cases.append(case)
    return cases


def stale(cases: list[Case]) -> list[bool]:
    return [case.look() != case.new for case in cases]


def ask_for_attributes(path: Path) -> None:
    """What `stat --cached=never` does: statx(2) with AT_STATX_FORCE_SYNC."""
    found = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.statx(-100, os.fsencode(path), 0x2000, 0x7FF, found) == 0


def write_in_place(path: Path, data: bytes, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


# What ends it before its time


def test_a_listing_shows_names_that_lead_to_others_now_and_asks_for_nothing_else(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "cache=loose")
    with ExitStack() as stack:
        cases = prepared(mount, stack, name_replaced, directory_moved, name_made_after_a_look)
        left = prepared(
            mount,
            stack,
            name_removed,
            data_of_an_open_file,
            data_of_an_open_file_and_no_new_time,
            data_opened_anew,
            data_opened_anew_and_no_new_time,
            data_beyond_the_end,
            mapped_data,
        )
        assert all(stale(cases + left))
        for case in cases + left:
            os.listdir(case.mount)
        assert not any(stale(cases))
        assert all(stale(left))


def test_asking_for_a_files_attributes_refreshes_its_data(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "cache=loose")
    with ExitStack() as stack:
        cases = prepared(
            mount,
            stack,
            attributes,
            data_of_an_open_file,
            data_opened_anew,
            data_beyond_the_end,
            mapped_data,
        )
        assert all(stale(cases))
        for case in cases:
            ask_for_attributes(case.mount / "file")
        assert not any(stale(cases))


def test_a_write_through_the_mount_brings_the_changes_in_the_source_with_it(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "cache=loose")
    with ExitStack() as stack:
        cases = prepared(mount, stack, attributes, data_beyond_the_end)
        assert all(stale(cases))
        for case in cases:
            write_in_place(case.mount / "file", b"o")
        assert cases[1].look() == (b"older", b"er")
        found = (cases[0].mount / "file").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_size, found.st_nlink) == (0o601, 4, 2)
        # Elsewhere in the file, too.
        case = Case(mount.path, mount.source, stack)
        case.file(b"a" * 2 * PAGE)
        fd = case.open(os.O_RDWR)
        assert os.pread(fd, PAGE, 0) == b"a" * PAGE
        case.rewrite(b"b" * PAGE)
        os.pwrite(fd, b"c" * PAGE, PAGE)
        assert os.pread(fd, 2 * PAGE, 0) == b"b" * PAGE + b"c" * PAGE


@pytest.mark.parametrize("mode", MODES)
def test_an_fchmod_through_the_mount_makes_the_kernel_keep_data_that_has_changed(
    new_mount: Callable[..., Mount], mode: str
) -> None:
    """Its answer brings the new times and drops nothing; later the times are no news."""
    seconds = "" if mode == "none" else ",attr_timeout=0.2"
    mount = new_mount("-o", f"cache={mode}{seconds}")
    with ExitStack() as stack:
        case = Case(mount.path, mount.source, stack)
        case.file()
        fd = case.open()
        assert os.pread(fd, 10, 0) == b"old"
        case.rewrite(b"new")
        os.fchmod(fd, 0o640)
        time.sleep(0.4)
        assert os.pread(fd, 10, 0) == b"old"
        ask_for_attributes(case.mount / "file")
        assert os.pread(fd, 10, 0) == b"old"
        assert case.read() == (b"old" if mode == "loose" else b"new")


@pytest.mark.parametrize("mode", MODES)
def test_data_with_no_new_time_is_read_again_once_it_was_dropped(
    new_mount: Callable[..., Mount], mode: str
) -> None:
    """By an open, whosever it is; or by whoever asks for that, which works in loose mode too."""
    mount = new_mount("-o", f"cache={mode}")
    with ExitStack() as stack:
        cases = prepared(mount, stack, data_of_an_open_file_and_no_new_time)
        [case] = cases
        for change in range(2):
            assert stale(cases) == [True]
            ask_for_attributes(case.mount / "file")
            assert stale(cases) == [True]
            fd = case.open()
            assert stale(cases) == [mode == "loose"]
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert stale(cases) == [False]
            case.new = b"%d" % change + b"ew"
            case.rewrite(b"%d" % change + b"ew", same_time=True)


def test_mapped_data_is_refreshed_when_somebody_looks_at_the_file(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "cache=none")
    with ExitStack() as stack:
        cases = prepared(mount, stack, mapped_data)
        file = cases[0].mount / "file"
        fd = cases[0].open()
        looks: list[Callable[[], object]] = [
            lambda: os.pread(fd, 1, 0),
            file.stat,
            lambda: os.listdir(file.parent),
            cases[0].read,
        ]
        for number, look in enumerate(looks):
            cases[0].look()
            cases[0].new = b"%d" % number * PAGE
            cases[0].rewrite(b"%d" % number * PAGE)
            assert stale(cases) == [True]
            look()
            assert stale(cases) == [False]


def test_the_first_stat_after_a_read_of_the_source_asks(new_mount: Callable[..., Mount]) -> None:
    """Reading has moved the access time, so that the kernel's attributes are none any more."""
    mount = new_mount("-o", "cache=loose")
    with ExitStack() as stack:
        [case] = cases = prepared(mount, stack, data_of_an_open_file)
        assert stale(cases) == [True]
        (case.mount / "file").stat()
        assert stale(cases) == [False]
        (case.mount / "file").stat()
        case.rewrite(b"old")
        (case.mount / "file").stat()
        assert case.look() == b"new", "this read was from the cache"


def test_a_new_mount_remembers_nothing(new_mount: Callable[..., Mount]) -> None:
    mount = new_mount("-o", "cache=loose")
    with ExitStack() as stack:
        makers = (attributes, name_removed, name_replaced, name_made_after_a_look, data_opened_anew)
        cases = prepared(mount, stack, *makers)
        assert all(stale(cases))
        mount.end()
        again = new_mount("-o", "cache=loose", source=mount.source)
        for case in cases:
            case.mount = again.path / case.mount.name
        assert not any(stale(cases))


# What it means for those who write


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_through_the_mount_is_seen_at_once(
    new_mount: Callable[..., Mount], mode: str
) -> None:
    mount = new_mount("-o", f"cache={mode}")
    file, other, link = (mount.path / name for name in ("file", "other", "link"))

    def seen() -> tuple[object, ...]:
        try:
            found = file.stat()
        except FileNotFoundError:
            return None, sorted(os.listdir(mount.path))
        return file.read_bytes(), found.st_size, stat.S_IMODE(found.st_mode), found.st_nlink

    def write_and_see(change: Callable[[], object]) -> tuple[object, ...]:
        in_child(change)
        return seen()

    assert seen() == (None, [])
    made = write_and_see(lambda: write_in_place(file, b"one", os.O_CREAT))
    assert made == (b"one", 3, 0o600, 1)
    with open(file, "rb", buffering=0) as opened:
        assert opened.read() == b"one"
        assert write_and_see(lambda: write_in_place(file, b"two"))[0] == b"two"
        assert os.pread(opened.fileno(), 10, 0) == b"two"
        assert write_and_see(lambda: write_in_place(file, b"!", os.O_APPEND))[1] == 4
        assert os.pread(opened.fileno(), 10, 0) == b"two!"
        assert write_and_see(lambda: os.truncate(file, 2))[0] == b"tw"
        assert os.pread(opened.fileno(), 10, 0) == b"tw"
    assert write_and_see(lambda: file.chmod(0o640))[2] == 0o640
    assert write_and_see(lambda: os.link(file, link))[3] == 2
    assert write_and_see(lambda: file.rename(other)) == (None, ["link", "other"])
    assert write_and_see(lambda: other.replace(file))[0] == b"tw"
    other.write_bytes(b"other")
    assert write_and_see(lambda: other.replace(file))[:2] == (b"other", 5)
    assert write_and_see(file.unlink) == (None, ["link"])


@pytest.mark.parametrize("mode", ["auto", "loose"])
def test_writers_lose_nothing_to_a_name_or_an_end_that_is_believed(
    new_mount: Callable[..., Mount], mode: str
) -> None:
    mount = new_mount("-o", f"cache={mode}")
    for name in ("made", "directory", "opened"):
        assert not (mount.path / name).exists()
        (mount.source / name).write_bytes(b"theirs")
    flags = os.O_CREAT | os.O_WRONLY
    assert errno_of(os.open, mount.path / "made", flags | os.O_EXCL) == errno.EEXIST
    assert errno_of(os.mkdir, mount.path / "directory") == errno.EEXIST
    write_in_place(mount.path / "opened", b" and ours", os.O_CREAT | os.O_APPEND)
    assert (mount.source / "opened").read_bytes() == b"theirs and ours"

    (mount.source / "log").write_bytes(b"one\n")
    assert (mount.path / "log").read_bytes() == b"one\n"
    with open(mount.path / "log", "ab", buffering=0) as file:
        write_in_place(mount.source / "log", b"two\n", os.O_APPEND)
        file.write(b"three\n")
        assert (mount.path / "log").read_bytes() == b"one\ntwo\nthree\n"
    assert (mount.source / "log").read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("mode", ["auto", "loose"])
def test_what_is_written_under_a_name_that_was_replaced_goes_to_the_file_that_was(
    new_mount: Callable[..., Mount], mode: str
) -> None:
    """And is lost with it, as long as the name is believed. A new file needs O_EXCL."""
    seconds = ",entry_timeout=0.5" if mode == "auto" else ""
    mount = new_mount("-o", f"cache={mode}{seconds}")
    for name in ("removed", "replaced"):
        (mount.source / name).write_bytes(b"before")
    began = time.monotonic()
    opened = [os.open(mount.path / name, os.O_RDONLY) for name in ("removed", "replaced")]
    (mount.source / "removed").unlink()
    (mount.source / "new").write_bytes(b"theirs")
    (mount.source / "new").rename(mount.source / "replaced")
    for name in ("removed", "replaced"):
        write_in_place(mount.path / name, b"ours", os.O_CREAT | os.O_TRUNC)
    if time.monotonic() - began < 0.4 or mode == "loose":
        assert [os.pread(fd, 10, 0) for fd in opened] == [b"ours", b"ours"]
        assert os.listdir(mount.source) == ["replaced"]
        assert (mount.source / "replaced").read_bytes() == b"theirs"
    for fd in opened:
        os.close(fd)
    if mode == "auto":
        time.sleep(0.8)
        for name in ("removed", "replaced"):
            write_in_place(mount.path / name, b"ours", os.O_CREAT | os.O_TRUNC)
            assert (mount.source / name).read_bytes() == b"ours"
    else:
        flags = os.O_CREAT | os.O_EXCL
        os.close(os.open(mount.path / "removed", flags))
        assert errno_of(os.open, mount.path / "replaced", flags) == errno.EEXIST
        assert sorted(os.listdir(mount.source)) == ["removed", "replaced"]


def test_a_file_that_has_grown_is_cut_where_its_end_was(new_mount: Callable[..., Mount]) -> None:
    """Though opened anew: the data is of now, its length of as long ago as attr_timeout."""
    mount = new_mount("-o", "attr_timeout=0.5")
    for _ in range(10):
        with ExitStack() as stack:
            case = Case(mount.path, mount.source, stack)
            case.file(b"old")
            began = time.monotonic()
            assert case.read() == b"old"
            case.rewrite(b"new and longer")
            found = case.read()
            if time.monotonic() - began < 0.4:
                break
            (mount.path / "file").unlink()
    assert found == b"new"
    time.sleep(0.8)
    assert case.read() == b"new and longer"
    mount = new_mount("-o", "attr_timeout=0")
    with ExitStack() as stack:
        case = Case(mount.path, mount.source, stack)
        case.file(b"old")
        assert case.read() == b"old"
        case.rewrite(b"new and longer")
        assert case.read() == b"new and longer"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files capabilities")
def test_a_write_takes_a_capability_away_that_the_mount_knows_nothing_of(
    new_mount: Callable[..., Mount],
) -> None:
    mount = new_mount("-o", "cache=loose")
    with ExitStack() as stack:
        [case] = cases = prepared(mount, stack, capability_set)
        assert stale(cases) == [True]
        write_in_place(case.mount / "file", b"x")
        assert attribute(case.source / "file", CAPABILITY) is None
