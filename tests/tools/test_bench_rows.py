"""Which rows there are, how peers are found, and that those which are not are named."""

import io
import os
import shlex
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninefuse.bench import Processes, rows
from ninefuse.bench.rows import Missing, Peer, Row, Site, make_row, makers, parse_peer


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "a source").mkdir()
    with Processes() as processes:
        yield Site(processes, tmp_path, tmp_path / "a source")


def made(site: Site, name: str, *peers: Peer) -> Row | Missing:
    return make_row(site, name, makers(peers)[name])


def test_the_rows_in_order() -> None:
    assert list(makers([Peer("mine", ("x",))])) == [
        *("source", "none", "first", "second-off", "second-thr", "second-req", "second"),
        "kernel",
        *("bindfs", "bindfs-mt", "pt_ll", "example", "null", "null-native"),
        *("pt_hp", "pt_hp-kernel", "mine"),
    ]
    with pytest.raises(ValueError, match="there is a row null already"):
        makers([Peer("null", ("x",))])


def test_ninefuse_is_run_under_each_model(site: Site) -> None:
    for model in ("none", "first", "second"):
        row = made(site, model)
        assert isinstance(row, Row)
        words = row.command[-5:]
        assert words[:2] == ("--model", model)
        assert words[3:] == (str(site.source), str(site.mountpoint(model)))
        assert row.kind == "ninefuse"
        # Clients of another user get in where they can be had.
        assert ("allow_other" in row.command) == (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("x=serve {src} {mnt}", Peer("x", ("serve", "{src}", "{mnt}"))),
        (
            "x=serve -o 'a b',source={src} {mnt}",
            Peer("x", ("serve", "-o", "a b,source={src}", "{mnt}")),
        ),
    ],
)
def test_a_peer_of_the_command_line(text: str, peer: Peer) -> None:
    assert parse_peer(text) == peer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("serve {src} {mnt}", "a peer is NAME=COMMAND"),
        ("=serve {mnt}", "a peer is NAME=COMMAND"),
        ("../x=serve {mnt}", "a peer is NAME=COMMAND"),
        ("x=serve 'open {mnt}", "No closing quotation"),
        ("x=serve {src}", "where the mount point goes"),
        ("x=", "where the mount point goes"),
    ],
)
def test_what_is_no_peer(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_peer(text)


def test_a_peers_words_are_filled_in_without_a_shell(site: Site) -> None:
    peer = parse_peer("x=env A={{src}} {0} -osource={src},{mnt} '$(echo)' {mnt}")
    row = made(site, "x", peer)
    assert isinstance(row, Row)
    source, mountpoint = str(site.source), str(site.mountpoint("x"))
    assert row.command == (
        *("env", f"A={{{source}}}", "{0}", f"-osource={source},{mountpoint}", "$(echo)"),
        mountpoint,
    )


@pytest.mark.parametrize("name", ["bindfs", "bindfs-mt", "pt_hp", "pt_hp-kernel", "x"])
def test_a_program_that_is_not_there_is_missing(
    site: Site, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(site.scratch))
    row = made(site, name, Peer("x", ("nothing", "{mnt}")))
    assert isinstance(row, Missing)
    assert row.name == name
    programs = {"x": "nothing", "pt_hp": "passthrough_hp", "pt_hp-kernel": "passthrough_hp"}
    assert row.reason.startswith(f"no {programs.get(name, 'bindfs')} in PATH")


def put_in_path(site: Site, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    """A program that says something, and no other."""
    program = site.scratch / name
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(site.scratch))


def test_bindfs_is_run_with_and_without_threads(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_path(site, monkeypatch, "bindfs", "bindfs 9.9")
    one, many = made(site, "bindfs"), made(site, "bindfs-mt")
    assert isinstance(one, Row)
    assert isinstance(many, Row)
    assert (one.version, many.version) == ("bindfs 9.9", "bindfs 9.9")
    assert "--multithreaded" not in one.command
    assert "--multithreaded" in many.command
    assert "-f" in one.command


def test_passthrough_hp_with_and_without_the_kernels_data(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_path(site, monkeypatch, "passthrough_hp", "      --nopassthrough    Do not")
    through, kernel = made(site, "pt_hp"), made(site, "pt_hp-kernel")
    assert isinstance(through, Row)
    assert isinstance(kernel, Row)
    places = (str(site.source), str(site.mountpoint("pt_hp")))
    options = ("--foreground", "--nopassthrough", "--direct-io")
    assert through.command == ("passthrough_hp", *options, *places)
    assert kernel.command[:2] == ("passthrough_hp", "--foreground")
    assert len(kernel.command) == 4
    # One that does not know the option has all data through it, whatever its row is called.
    put_in_path(site, monkeypatch, "passthrough_hp", "      --nosplice")
    old = made(site, "pt_hp-kernel")
    assert isinstance(old, Missing)
    assert "older than the kernel's passthrough" in old.reason


def test_a_peer_may_stand_for_passthrough_hp_alone(site: Site) -> None:
    row = made(site, "pt_hp", Peer("pt_hp", (sys.executable, "{mnt}")))
    assert isinstance(row, Row)
    assert row.command == (sys.executable, str(site.mountpoint("pt_hp")))
    with pytest.raises(ValueError, match="there is a row kernel already"):
        makers([Peer("kernel", ("x", "{mnt}"))])


def test_passthrough_ll_without_its_source_is_missing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "EXAMPLES", site.scratch)
    row = made(site, "pt_ll")
    assert isinstance(row, Missing)
    assert "passthrough_ll.c (Debian: apt-get install libfuse3-dev)" in row.reason


def test_passthrough_ll_that_does_not_compile_is_missing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "EXAMPLES", site.scratch)
    (site.scratch / "passthrough_ll.c").write_text("no C\n")
    row = made(site, "pt_ll")
    assert isinstance(row, Missing)
    assert "failed" in row.reason
    assert "\n" not in row.reason


def archive(path: Path, version: str, text: bytes) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as opened:
        member = tarfile.TarInfo(f"pyfuse3-{version}/examples/passthroughfs.py")
        member.size = len(text)
        opened.addfile(member, io.BytesIO(text))


def test_the_example_is_taken_from_the_cache(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(site.scratch / "cache"))
    version = rows.pyfuse3_version().split()[1]
    kept = site.scratch / "cache" / "ninefuse-bench" / f"pyfuse3-{version}.tar.gz"
    archive(kept, version, b"print('served')\n")
    monkeypatch.setattr(rows, "_FETCH_SECONDS", 0.0)  # so fetching would fail
    row = made(site, "example")
    assert isinstance(row, Row)
    assert row.command[0] == sys.executable
    assert Path(row.command[1]).read_text() == "print('served')\n"
    assert row.command[2:] == (str(site.source), str(site.mountpoint("example")))
    kept.write_bytes(b"half a download")
    broken = made(site, "example")
    assert isinstance(broken, Missing)
    assert not kept.exists(), "the next time it is fetched anew"


def test_the_example_that_cannot_be_fetched_is_missing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(site.scratch / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    row = made(site, "example")
    assert isinstance(row, Missing)
    assert row.reason.startswith("pip cannot fetch pyfuse3 ")
    assert not (site.scratch / "cache").exists()


def test_the_cache_is_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert rows.cache_directory() == Path("/x/ninefuse-bench")
    for wrong in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", wrong)
        assert rows.cache_directory() == Path.home() / ".cache" / "ninefuse-bench"


def test_a_peer_is_recorded_as_it_was_given(site: Site) -> None:
    words = ("env", "a b", "{mnt}")
    row = made(site, "x", Peer("x", words))
    assert isinstance(row, Row)
    assert row.note == f"--peer {shlex.join(words)}"
