"""Linux's own 9P client in a guest, on what the server exports: files, names, attributes, users."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import Facts, plant, tree

from guest.exports import CACHES, Export, mount_options
from guest.image import image
from guest.machine import Guest, serial_port
from guest.servers import Server

NOBODY = 65534


@pytest.fixture(params=CACHES)
def export(request: pytest.FixtureRequest, new_export: Callable[..., Export]) -> Export:
    """An export, mounted under each of the client's ways to cache."""
    return new_export(request.param)


def _as_v9fs_can(facts: Facts) -> Facts:
    """What v9fs can say of a file: times in whole seconds, and no attribute that is empty."""
    seconds = facts.mtime // 10**9
    return facts._replace(
        mtime=seconds, attributes=tuple(one for one in facts.attributes if one[1])
    )


def test_a_tree_is_copied_whole(export: Export) -> None:
    plant(export.source / "original")
    original = export.source / "original"
    wanted = {
        str(path.relative_to(original)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in original.rglob("*")
        if path.is_file() and not path.is_symlink()
    }

    assert export.call("digests", "original") == wanted
    export.guest.call("program", ["cp", "-a", "original", "copy"], export.where)

    export.settle()
    wanted_of_copy = {path: _as_v9fs_can(one) for path, one in tree(original).items()}
    assert {
        path: _as_v9fs_can(one) for path, one in tree(export.source / "copy").items()
    } == wanted_of_copy


def test_all_kinds_of_files_are_the_sources(export: Export, request: pytest.FixtureRequest) -> None:
    found = export.call("shapes", "made")

    export.settle()
    made = export.source / "made"
    on_disk = {}
    for path in made.rglob("*"):
        facts = path.lstat()
        one = [facts.st_mode, facts.st_uid, facts.st_gid, facts.st_size]
        on_disk[str(path.relative_to(made))] = [*one, facts.st_nlink, facts.st_mtime_ns]
    assert (made / "target").read_bytes() == b"moved" * 3
    leaf = next(made.rglob("leaf")).read_bytes()
    assert (leaf[:4], leaf[50_000:50_005], len(leaf)) == (b"leve", b"moved", 100_000)
    if "loose" in request.node.callspec.params["export"]:
        # The guest has a time of its own for what it writes later.
        found, on_disk = ({n: one[:-1] for n, one in all.items()} for all in (found, on_disk))
    assert found == on_disk


def test_a_file_is_used_after_its_name_has_gone(export: Export) -> None:
    assert export.call("unlinked", "file") == {
        "name gone": True,
        "read": True,
        "size": 12_000,
        "fchmod": "",
        "ftruncate": "",
        "utime": "",
        "after": [0o600, 5, 2.0],
        "still": "befor",
    }
    export.settle()
    assert (export.source / "file").read_bytes() == b"other"


@pytest.mark.parametrize("cache", CACHES)
def test_a_thousand_names_are_listed_once(new_export: Callable[..., Export], cache: str) -> None:
    export = new_export(cache, "msize=8192")  # so that a listing takes several answers
    (export.source / "many").mkdir()

    assert export.call("names", "many", 1000, seconds=120) == [1000, 500]
    assert len(os.listdir(export.source / "many")) == 500


def test_extended_attributes(export: Export) -> None:
    assert export.call("attributes", "file") == {
        "names": ["user.one", "user.two"],
        "created twice": "EEXIST",
        "left": {"user.two": "22"},
        "removed": "ENODATA",
    }
    assert os.getxattr(export.source / "file", "user.two") == b"22"


@pytest.mark.parametrize("access", ["user", "client"])
def test_users_are_who_they_are(new_export: Callable[..., Export], access: str) -> None:
    export = new_export("none", f"access={access}")
    shared = export.source / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    private = shared / "private"
    private.write_bytes(b"root's")
    private.chmod(0o600)

    paths = (export.path("shared/private"), export.path("shared/made"))
    assert export.guest.call("as_user", NOBODY, *paths) == ["EACCES", ""]

    made = (shared / "made").stat()
    assert (made.st_uid, made.st_gid) == (NOBODY, NOBODY)


def test_a_client_that_brings_its_own_socket(new_export: Callable[..., Export]) -> None:
    export = new_export("none", trans="fd")
    shutil.copyfile(__file__, export.source / "file")

    found = export.guest.call("digests", export.where)

    content = (export.source / "file").read_bytes()
    assert found == {"file": hashlib.sha256(content).hexdigest()}


def test_over_a_virtio_serial_port(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    server = Server(source, tmp_path / "log")
    server.start()
    guest = Guest(image(), tmp_path, serial_port("export", server.socket))
    try:
        where = "/tmp/serial"
        job = guest.begin("mount_by_serial_port", "export", where, mount_options(server))
        assert job.said() == "EINVAL", "the kernel takes the port itself, and no relay is needed"
        job.go()
        assert job.said() == "mounted"
        digest = guest.call("random_io", f"{where}/file", 3, 100, False, seconds=120)
        job.go()
        job.result()
    finally:
        guest.end()
        server.end()

    assert hashlib.sha256((source / "file").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("seed", [1, 2])
def test_random_reads_and_writes_are_true(
    export: Export, seed: int, request: pytest.FixtureRequest
) -> None:
    # Without a cache v9fs has no shared memory that is written.
    mapped = "none" not in request.node.callspec.params["export"]

    digest = export.call("random_io", "file", seed, 400, mapped, seconds=180)

    export.settle()
    assert hashlib.sha256((export.source / "file").read_bytes()).hexdigest() == digest


def test_what_the_host_writes_is_seen(new_export: Callable[..., Export]) -> None:
    """Without a cache both sides see each other's writes at once."""
    export = new_export("none")
    file = export.source / "file"
    file.write_bytes(b"begin")
    job = export.begin("seen_by_turns", "file")
    for turn in range(10):
        assert job.said() == hashlib.sha256(file.read_bytes()).hexdigest(), turn
        job.go(f"guest {turn} ")
        assert job.said() == hashlib.sha256(file.read_bytes()).hexdigest(), turn
        assert file.read_bytes().endswith(f"guest {turn} ".encode())
        with open(file, "ab") as ours:
            ours.write(b"host " * 1000)
        job.go("")
    job.said()
    job.go(None)
    job.result()
