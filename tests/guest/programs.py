"""What runs in the guest, on a mount of v9fs: the host sends this text there, and calls by name.

Arguments and results are what JSON can say. A generator stops where it yields until the host lets
it go on. Only the standard library, as Debian's python3 has it; nothing here runs on the host.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import random
import sqlite3
import stat
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from guest.mounts import BLOCK, error_of

_PROMPT_SECONDS = 5.0  # an error that takes longer is told as late

# Files


def unlinked(path: str) -> dict[str, Any]:
    """Use a file by its descriptor after its name has gone; what came of each step."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    os.pwrite(descriptor, b"before" * 1000, 0)
    os.unlink(path)
    found: dict[str, Any] = {"name gone": not os.path.exists(path)}
    os.pwrite(descriptor, b"behind" * 1000, 6000)
    os.fsync(descriptor)
    found["read"] = os.pread(descriptor, 20000, 0) == b"before" * 1000 + b"behind" * 1000
    found["size"] = os.fstat(descriptor).st_size
    steps: dict[str, Callable[[], object]] = {
        "fchmod": lambda: os.fchmod(descriptor, 0o600),
        "ftruncate": lambda: os.ftruncate(descriptor, 5),
        "utime": lambda: os.utime(descriptor, (1, 2)),
    }
    found |= {name: error_of(step) for name, step in steps.items()}
    facts = os.fstat(descriptor)
    found["after"] = [stat.S_IMODE(facts.st_mode), facts.st_size, facts.st_mtime]
    with open(path, "xb") as other:  # another file of that name is another file
        other.write(b"other")
    found["still"] = os.pread(descriptor, 100, 0).decode()
    os.close(descriptor)
    return found


def shapes(top: str) -> dict[str, list[int]]:
    """Make files of all kinds; mode, owner, group, size, links and mtime in ns of each."""
    os.mkdir(top, 0o751)
    deep = "/".join(f"level{number}" for number in range(20))  # more than one Twalk holds
    os.makedirs(f"{top}/{deep}")
    for name in ("plain", "moved", "target", "n" * 255, f"{deep}/leaf"):
        with open(f"{top}/{name}", "wb") as file:
            file.write(name.encode() * 3)
    os.rename(f"{top}/moved", f"{top}/target")
    os.link(f"{top}/plain", f"{top}/hard")
    os.symlink("plain", f"{top}/soft")
    os.symlink("nowhere/" * 100, f"{top}/dangling")
    os.mkfifo(f"{top}/fifo", 0o620)
    os.chmod(f"{top}/plain", 0o4751)
    os.chown(f"{top}/target", 1234, 5678)
    os.utime(f"{top}/target", ns=(10**18 + 1, 10**18 + 123_456_789))
    os.truncate(f"{top}/{deep}/leaf", 100_000)
    # What is open in a directory that moves stays open.
    with open(f"{top}/{deep}/leaf", "r+b") as open_file:
        os.rename(f"{top}/level0", f"{top}/level-moved")
        os.pwrite(open_file.fileno(), b"moved", 50_000)
    found = {}
    for directory, directories, names in os.walk(top):
        for name in (*directories, *names):
            path = os.path.join(directory, name)
            facts = os.lstat(path)
            one = [facts.st_mode, facts.st_uid, facts.st_gid, facts.st_size]
            found[os.path.relpath(path, top)] = [*one, facts.st_nlink, facts.st_mtime_ns]
    return found


def attributes(path: str) -> dict[str, Any]:
    """Set, list, read and remove extended attributes; what there was at each step."""
    with open(path, "wb"):
        pass
    os.setxattr(path, "user.one", b"1" * 1000)
    os.setxattr(path, "user.two", b"2", os.XATTR_CREATE)
    found: dict[str, Any] = {"names": sorted(os.listxattr(path))}
    found["created twice"] = error_of(os.setxattr, path, "user.two", b"3", os.XATTR_CREATE)
    os.setxattr(path, "user.two", b"22", os.XATTR_REPLACE)
    os.removexattr(path, "user.one")
    found["left"] = {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}
    found["removed"] = error_of(os.getxattr, path, "user.one")
    return found


def names(directory: str, count: int) -> list[int]:
    """Make so many names, list them, remove every second, list; how many were seen each time."""
    for number in range(count):
        os.close(os.open(f"{directory}/name{number:05}", os.O_CREAT | os.O_WRONLY, 0o644))
    found = [len(set(os.listdir(directory)))]
    for number in range(0, count, 2):
        os.unlink(f"{directory}/name{number:05}")
    found.append(len(set(os.listdir(directory))))
    return found


def as_user(uid: int, private: str, made: str) -> list[str]:
    """As another user, read a file of root's, and make one; the errors' names, "" for none."""
    ours, theirs = os.pipe()
    if not (pid := os.fork()):
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        said = [
            error_of(os.open, private, os.O_RDONLY),
            error_of(os.open, made, os.O_WRONLY | os.O_CREAT, 0o600),
        ]
        os.write(theirs, ",".join(said).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as answer:
        found = answer.read().decode().split(",")
    os.waitpid(pid, 0)
    return found


# Random I/O


def random_io(path: str, seed: int, steps: int, mapped: bool) -> str:
    """Read and write a file at random and verify all that is read; the SHA-256 of its content.

    Two descriptors are used in turn, and opened anew at times; mapped: also mapped memory.
    """
    choose = random.Random(seed)
    model = bytearray()
    most = 300_000
    handles = [os.open(path, os.O_RDWR | os.O_CREAT, 0o644), os.open(path, os.O_RDWR)]

    def verify(step: int, what: str, offset: int, found: bytes, length: int) -> None:
        wanted = bytes(model[offset : offset + length])
        assert found == wanted, _difference(
            f"step {step}, seed {seed}: {what}", offset, found, wanted
        )

    for step in range(steps):
        which = choose.randrange(2)
        handle = handles[which]
        offset, length = choose.randrange(most), choose.choice((1, 100, 4096, 5000, 70_000))
        action = choose.choice(("read", "read", "write", "write", "cut", "map", "anew", "sync"))
        if action == "read":
            verify(step, action, offset, _all_read(handle, length, offset), length)
        elif action == "write":
            data = choose.randbytes(length)
            _all_written(handle, data, offset)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
        elif action == "cut":
            os.ftruncate(handle, offset)
            del model[offset:]
            model.extend(bytes(offset - len(model)))
        elif action == "map" and mapped and model:
            with mmap.mmap(handle, len(model)) as memory:
                offset = min(offset, len(model) - 1)
                length = min(length, len(model) - offset)
                verify(step, action, offset, memory[offset : offset + length], length)
                data = choose.randbytes(length)
                memory[offset : offset + length] = data
                model[offset : offset + length] = data
                memory.flush()
        elif action == "anew":
            os.close(handle)
            handles[which] = os.open(path, os.O_RDWR)
        elif action == "sync":
            os.fsync(handle)
        assert os.fstat(handles[which]).st_size == len(model), f"step {step}: {action}: the size"
    verify(steps, "all", 0, _all_read(handles[0], most * 2, 0), most * 2)
    for handle in handles:
        os.close(handle)
    return hashlib.sha256(model).hexdigest()


def _difference(where: str, offset: int, found: bytes, wanted: bytes) -> str:
    for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
        if one != other:
            return f"{where}: differs at {offset + number}, from {offset}"
    return f"{where}: {len(found)} bytes at {offset}, not {len(wanted)}"


def _all_read(handle: int, length: int, offset: int) -> bytes:
    parts = []
    while length and (part := os.pread(handle, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _all_written(handle: int, data: bytes, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def seen_by_turns(path: str) -> Generator[str, str | None, None]:
    """Yield the digest of a file that the host changes in between, then add to it in turn."""
    with open(path, "r+b", buffering=0) as file:
        while True:
            size = os.fstat(file.fileno()).st_size
            word = yield hashlib.sha256(_all_read(file.fileno(), size, 0)).hexdigest()
            if word is None:
                return
            _all_written(file.fileno(), word.encode(), size)


# Locks


def hold(path: str, start: int, length: int) -> Iterator[str]:
    """Lock a range, and let it go when the host says so."""
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, length, start)
        yield "held"
        fcntl.lockf(file, fcntl.LOCK_UN, length, start)
        yield "let go"


def try_lock(path: str, start: int, length: int) -> bool:
    """Whether a range can be locked now; it is let go at once."""
    with open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except BlockingIOError:
            return False
    return True


def wait_for_lock(path: str) -> Iterator[str]:
    """Wait until a whole file can be locked."""
    with open(path, "r+b") as file:
        yield "open"
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield "locked"


# Databases


def database(path: str, journal: str, rows: int) -> list[Any]:
    """Make a table in several transactions, one of them rolled back; what SQLite says of it."""
    base = sqlite3.connect(path, timeout=60, isolation_level=None)
    (mode,) = base.execute(f"PRAGMA journal_mode={journal}").fetchone()
    base.execute("CREATE TABLE numbers (one INTEGER PRIMARY KEY, other TEXT)")
    for word in ("COMMIT", "ROLLBACK", "COMMIT"):
        base.execute("BEGIN")
        (begin,) = base.execute("SELECT coalesce(max(one), 0) FROM numbers").fetchone()
        values = [(begin + number + 1, "x" * 300) for number in range(rows)]
        base.executemany("INSERT INTO numbers VALUES (?, ?)", values)
        base.execute(word)
    (good,) = base.execute("PRAGMA integrity_check").fetchone()
    count, total = base.execute("SELECT count(*), sum(one) FROM numbers").fetchone()
    base.close()
    return [mode, good, count, total]


def count_up(path: str, times: int) -> Iterator[str]:
    """Add one to a number in a database, so many times, each in a transaction."""
    base = sqlite3.connect(path, timeout=60, isolation_level=None)
    yield "open"
    for _ in range(times):
        base.execute("BEGIN IMMEDIATE")
        base.execute("UPDATE counter SET number = number + 1")
        base.execute("COMMIT")
    base.close()


# A server that goes away


def work_until_error(path: str) -> Iterator[str]:
    """Write and read synchronously until that fails; then the errors of this and other calls."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_SYNC, 0o644)
    os.pwrite(handle, bytes(BLOCK), 0)
    yield "working"
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: os.pwrite(handle, bytes(BLOCK), 0),
        "read": lambda: os.pread(handle, BLOCK, 0),
        "open": lambda: os.open(path + ".other", os.O_RDONLY),
        "list": lambda: os.listdir(os.path.dirname(path)),
        "make": lambda: os.mkdir(path + ".directory"),
    }
    while not error_of(calls["write"]):
        pass
    for name, step in calls.items():
        before = time.monotonic()
        said = error_of(step) or "no error"
        late = " after long" if time.monotonic() - before > _PROMPT_SECONDS else ""
        yield f"{name}: {said}{late}"
    yield ""
