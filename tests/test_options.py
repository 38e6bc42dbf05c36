"""The -o options and how they join the command line in one Settings."""

import dataclasses
import os

import pytest

from ninefuse.command import manual
from ninefuse.command.options import (
    MAX_THREADS,
    OPTIONS,
    Kind,
    MountOptions,
    Option,
    make_settings,
    parse_options,
    split_words,
)
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.settings import DEFAULT_THREADS, Settings

# What the command line sets, or the words of all options together.
BESIDE = {"source", "mountpoint", "foreground", "log_file", "log_level", "trace_file"}
BESIDE |= {"mount_options", "remount", "listen"}


def settings(*words: str, source: str = "/src") -> Settings:
    return make_settings(source, "/mnt", parse_options(words))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", [""]),
        ("ro", ["ro"]),
        ("a,b,,c,", ["a", "b", "", "c", ""]),
        (r"a\,b,c", ["a,b", "c"]),
        (r"a\\,b", ["a\\", "b"]),
        (r"a\\\,b", [r"a\,b"]),
        (r"a\b", [r"a\b"]),
        ("a\\", ["a\\"]),
    ],
)
def test_words_split_at_commas_that_no_backslash_keeps(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_defaults() -> None:
    assert settings() == Settings(
        source="/src",
        mountpoint="/mnt",
        model="second",
        threads=16,
        foreground=False,
        debug=False,
        log_file=None,
        log_level="info",
        read_only=False,
        dirsync=False,
        sync=False,
        xattr=True,
        allow_other=False,
        attr_timeout=1.0,
        entry_timeout=1.0,
        negative_timeout=1.0,
        keep_cache=False,
        mount_options=("default_permissions", "subtype=ninefuse", "fsname=/src"),
    )


@pytest.mark.parametrize("number", [0, 1, 250_000])
def test_the_number_of_inodes(number: int) -> None:
    assert settings(f"max_inodes={number}") == dataclasses.replace(settings(), max_inodes=number)
    assert settings("max_inodes=3", f"max_inodes={number}").max_inodes == number


def test_every_option_has_a_field_of_the_settings_and_every_field_an_option() -> None:
    fields = {one.name for one in dataclasses.fields(Settings)}
    several = {
        name
        for one in OPTIONS
        if one.sets is None
        for value in one.values.values()
        for name in value
    }
    assert {one.sets for one in OPTIONS} - {None} | several == fields - BESIDE
    # The others are for libfuse or the kernel alone, or say what is so anyway.
    none = {one.name for one in OPTIONS if not (one.sets or one.values or one.for_libfuse)}
    assert none == {
        "rw",
        "exec",
        "async",
        "atime",
        "diratime",
        "default_permissions",
        "fsname",
        "subtype",
    }


def test_every_option_has_one_text() -> None:
    explained = [word.partition("=")[0] for text in manual.MOUNT for word in text.words.split(", ")]
    assert sorted(explained) == sorted(one.name for one in OPTIONS)


@pytest.mark.parametrize("option", [one for one in OPTIONS if one.sets], ids=lambda one: one.name)
def test_an_option_sets_its_field(option: Option) -> None:
    values = {Kind.NUMBER: "7", Kind.SECONDS: "7"}
    for word in option.words():
        text = word + values.get(option.kind, "")
        given = settings("engine=threads", text) if option.name != "engine" else settings(text)
        assert option.sets is not None
        expected = option.read(text)
        assert getattr(given, option.sets) == expected, text
        assert type(getattr(given, option.sets)) is type(expected)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().threads = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "word",
    [
        *("", "defaults", "nofail", "user", "users", "nouser", "owner", "group", "auto", "noauto"),
        *("_netdev", "relatime", "norelatime", "strictatime", "nostrictatime", "lazytime"),
        *("nolazytime", "nonempty", "default_permissions", "x-systemd.automount", "user=joe"),
        *("x-systemd.requires=/a", "X-mount.mkdir", "comment=what, ever".replace(",", r"\,")),
    ],
)
def test_what_fstab_writes_changes_nothing(word: str) -> None:
    assert settings(word) == settings()


@pytest.mark.parametrize(
    "word",
    [
        *("foo", "foo=bar", "ro=1", "debug=1", "max_read=4096", "xattr", "uid=0", "kernel_cache"),
        *("nosymfollow", "umask=022", "RO", " ro", "allow_root", "direct_io", "commentary"),
    ],
)
def test_anything_else_is_refused_by_name(word: str) -> None:
    with pytest.raises(Failure) as caught:
        parse_options(["ro", f"nofail,{word},rw"])
    assert caught.value.code == ExitCode.USAGE
    assert word in caught.value.message


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        (["ro"], {"ro"}),
        (["rw"], set()),
        (["ro", "rw"], set()),
        (["ro,rw,ro"], {"ro"}),
        (["noexec"], {"noexec"}),
        (["noexec,exec"], set()),
        (["sync"], {"sync"}),
        (["sync", "async"], set()),
        (["dirsync"], {"dirsync"}),
        (["noatime"], {"noatime"}),
        (["noatime,atime"], set()),
        # libfuse mounts nodev and nosuid by itself, also as root, so these must reach it.
        (["dev,suid"], {"dev", "suid"}),
        (["dev,nodev", "nosuid,suid"], {"nodev", "suid"}),
        # libfuse 3.14 refuses this word.
        (["nodiratime"], set()),
        (["allow_other"], {"allow_other"}),
        (["auto_unmount"], {"auto_unmount"}),
        (["noxattr,debug,cache=none,threads=3,model=none,attr_timeout=3"], set()),
        (
            ["ro,noatime,nosuid,nodev,noexec,dirsync"],
            {"ro", "noatime", "nosuid", "nodev", "noexec", "dirsync"},
        ),
    ],
)
def test_words_for_libfuse(words: list[str], passed: set[str]) -> None:
    given = settings(*words).mount_options
    assert len(given) == len(set(given))
    assert set(given) - set(settings().mount_options) == passed
    assert "default_permissions" in given


def test_flags_that_the_daemon_itself_heeds() -> None:
    given = settings("ro,dirsync,sync,noxattr,allow_other,debug")
    assert given.read_only
    assert given.dirsync
    assert given.sync
    assert not given.xattr
    assert given.allow_other
    assert given.debug
    assert given.foreground, "debug stays in the foreground, as with all FUSE commands"
    assert not settings("ro,sync", "rw,async").read_only
    assert not settings("ro,sync", "rw,async").sync


@pytest.mark.parametrize(
    ("name", "keep_cache", "seconds"),
    [
        ("none", False, 0.0),
        ("auto", False, 1.0),
        ("readahead", False, 1.0),
        ("mmap", False, 1.0),
        ("loose", True, 86400.0),
        ("fscache", True, 86400.0),
    ],
)
def test_cache(name: str, keep_cache: bool, seconds: float) -> None:
    given = settings(f"cache={name}")
    assert given.keep_cache is keep_cache
    assert (given.attr_timeout, given.entry_timeout, given.negative_timeout) == (seconds,) * 3


@pytest.mark.parametrize("name", ["attr_timeout", "entry_timeout", "negative_timeout"])
@pytest.mark.parametrize("order", ["{0},cache=loose", "cache=loose,{0}"])
def test_a_timeout_by_name_beats_cache_in_either_order(name: str, order: str) -> None:
    expected = dataclasses.replace(settings("cache=loose"), **{name: 2.5})  # type: ignore[arg-type]
    assert settings(order.format(f"{name}=2.5")) == expected


def test_later_words_win() -> None:
    given = settings("cache=loose,model=first,threads=3", "cache=none", "model=none,threads=4")
    assert given.attr_timeout == 0
    assert not given.keep_cache
    assert given.model == "none"
    assert given.threads == 4
    assert settings("attr_timeout=5,attr_timeout=0").attr_timeout == 0


@pytest.mark.parametrize(
    "word",
    [
        *("attr_timeout=-1", "attr_timeout=nan", "entry_timeout=inf", "negative_timeout=x"),
        *("attr_timeout=", "attr_timeout", "entry_timeout=-0.001", "attr_timeout=1e999"),
        *("cache=", "cache", "cache=always", "model=third", "model", "model=None"),
        *("threads=0", "threads=1025", "threads=-1", "threads=1.5", "threads=", "threads=1_6"),
        *("threads", "threads= 3", "threads=3x", "threads=\u0663", "threads=" + "9" * 5000),
        *("fsname=", "fsname", "subtype="),
        *("max_inodes=", "max_inodes", "max_inodes=-1", "max_inodes=1e6", "max_inodes=1_000"),
        *("max_inodes=\u0663", "max_inodes=" + "9" * 16),
    ],
)
def test_bad_values_are_refused_by_name(word: str) -> None:
    with pytest.raises(Failure) as caught:
        parse_options([word])
    assert caught.value.code == ExitCode.USAGE
    assert f"-o {word.partition('=')[0]}" in caught.value.message


def test_a_bad_value_is_refused_even_when_a_later_one_would_win() -> None:
    with pytest.raises(Failure, match="cache=bogus"):
        parse_options(["cache=bogus,cache=none"])


@pytest.mark.parametrize("number", [1, 16, MAX_THREADS])
def test_threads(number: int) -> None:
    assert settings(f"threads={number}").threads == number


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("/a,b", r"fsname=/a\,b"),
        ("/a\\b", r"fsname=/a\\b"),
        ("/a\\,b", r"fsname=/a\\\,b"),
        # libfuse reads three digits after a backslash as an octal number: doubled, they are not.
        ("/a\\101", r"fsname=/a\\101"),
        ("/a b=c", "fsname=/a b=c"),
        ("/caf\u00e9", "fsname=/caf?"),
        ("/a\nb\x7f\t", "fsname=/a?b??"),
        (os.fsdecode(b"/\xff"), "fsname=/?"),
    ],
)
def test_fsname_is_the_source_escaped_and_in_ascii(source: str, word: str) -> None:
    given = settings(source=source)
    assert given.source == source
    assert word in given.mount_options
    "".join(given.mount_options).encode("us-ascii")


def test_fsname_and_subtype_as_given() -> None:
    given = settings(r"fsname=server:/x\,y\\z,subtype=other,fsname=last\,one").mount_options
    assert given == ("default_permissions", "subtype=other", r"fsname=last\,one")
    # fusermount3 would cut these off the subtype, escaped or not.
    assert r"subtype=a?b?c" in settings(r"subtype=a\,b\\c").mount_options


def test_paths_become_absolute(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = make_settings("src/", "../mnt", MountOptions(), log_file="log")
    assert given.source == os.path.join(tmp_path, "src")
    assert given.mountpoint == os.path.join(os.path.dirname(tmp_path), "mnt")
    assert given.log_file == os.path.join(tmp_path, "log")


@pytest.mark.parametrize(
    ("source", "mountpoint", "log"), [("", "/m", "l"), ("/s", "", "l"), ("/s", "/m", "")]
)
def test_an_empty_path_is_not_the_current_directory(source: str, mountpoint: str, log: str) -> None:
    with pytest.raises(Failure) as caught:
        make_settings(source, mountpoint, MountOptions(), log_file=log)
    assert caught.value.code == ExitCode.USAGE


def test_the_command_line_beats_the_options() -> None:
    options = parse_options(["model=first,threads=3"])
    given = make_settings("/s", "/m", options, model="none", threads=5)
    assert (given.model, given.threads) == ("none", 5)
    given = make_settings("/s", "/m", options)
    assert (given.model, given.threads) == ("first", 3)
    assert make_settings("/s", "/m", MountOptions()).threads == DEFAULT_THREADS


@pytest.mark.parametrize(
    ("words", "direct"),
    [
        ((), True),
        (("osync=cached",), False),
        (("osync=cached,osync=direct",), True),
        (("cache=none",), False),
        (("osync=direct", "cache=none"), True),
        (("cache=loose",), True),
    ],
)
def test_synchronous_opens_are_direct_unless_told_otherwise(
    words: tuple[str, ...], direct: bool
) -> None:
    assert settings(*words).direct_sync is direct


def test_osync_knows_two_ways() -> None:
    with pytest.raises(Failure) as caught:
        settings("osync=maybe")
    assert caught.value.code == ExitCode.USAGE
    assert "osync=maybe" in caught.value.message


def test_the_threads_share_one_processor_unless_told_otherwise() -> None:
    assert settings().one_cpu is None
    assert settings("cpus=one").one_cpu is True
    assert settings("cpus=all").one_cpu is False
    with pytest.raises(Failure, match="cpus=two"):
        settings("cpus=two")


def test_lists_are_evaluated_for_others_and_on_request() -> None:
    assert not settings().acl
    assert settings("acl").acl
    assert settings("allow_other").acl
    assert not settings("allow_other,noxattr").acl
    with pytest.raises(Failure) as caught:
        settings("acl,noxattr")
    assert caught.value.code == ExitCode.USAGE


def test_xdev() -> None:
    assert settings("xdev").one_file_system
    assert not settings().one_file_system


@pytest.mark.parametrize("words", ["model=first", "model=none", "inline=off"])
def test_io_uring_is_refused_where_it_would_not_be_used(words: str) -> None:
    with pytest.raises(Failure) as caught:
        settings("engine=uring," + words)
    assert caught.value.code == ExitCode.USAGE
    assert settings("engine=threads," + words).engine == "threads"
    assert settings("engine=uring").engine == "uring"


@pytest.mark.parametrize("words", ["session=pyfuse3", "noatime"])
def test_the_kernel_gets_no_files_where_the_daemon_has_to_read_them(words: str) -> None:
    with pytest.raises(Failure) as caught:
        settings("data=kernel," + words)
    assert caught.value.code == ExitCode.USAGE
    assert settings("data=daemon," + words).data == settings().data == "daemon"
    assert settings("data=kernel").data == "kernel"
    assert settings("data=kernel,noatime,atime,session=auto").data == "kernel"


def test_what_mount_8_hands_back_of_a_mount_that_is_to_be_changed() -> None:
    """What the table shows, words of fstab, and at last what was asked for."""
    text = (
        "rw,nosuid,noexec,relatime,remount,noatime,ro,user_id=0,group_id=0,allow_other,model=first"
    )
    settings = make_settings("/s", "/m", parse_options([text]))
    assert settings.remount == ("ro", "nosuid", "noexec", "noatime")
    assert make_settings("/s", "/m", parse_options(["relatime,ro"])).remount is None
    with pytest.raises(Failure, match="unknown option -o user_id=0"):
        parse_options(["user_id=0"])
    with pytest.raises(Failure, match="unknown option -o what"):
        parse_options(["remount,what"])
