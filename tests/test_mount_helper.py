"""ninefuse beneath mount(8): the helper mount.ninefuse, /etc/fstab, findmnt, remount, umount."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from apart import needs_namespace, script_apart
from servers import SOME_MODELS

from ninefuse.command import cli, mounthelper
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.linux import mountinfo, syscalls
from ninefuse.settings import Settings

pytestmark = pytest.mark.soak

# ---- the helper's own command line ---------------------------------------------------------------


class FakeMount:
    """Stands for cli.mount: remembers the settings, and has the outcome that a test gives it."""

    def __init__(self) -> None:
        self.mounted: list[Settings] = []
        self.outcome: int | Failure = 0

    def __call__(self, settings: Settings) -> int:
        self.mounted.append(settings)
        if isinstance(self.outcome, Failure):
            raise self.outcome
        return self.outcome


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> FakeMount:
    fake = FakeMount()
    monkeypatch.setattr(cli, "mount", fake)
    return fake


def test_the_letters_mean_what_mount_8_means_by_them(
    mount: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where -f and -s mean other things to ninefuse."""
    words = ["/s", "/m", "-s", "-n", "-v", "-t", "ninefuse.x", "-o", "ro,no/such,model=first"]
    assert mounthelper.main(words) == 0
    (settings,) = mount.mounted
    assert (settings.source, settings.mountpoint) == ("/s", "/m")
    assert (settings.model, settings.read_only, settings.foreground) == ("first", True, False)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "mount.ninefuse: unknown option no/such ignored",
        "mount.ninefuse: /s mounted on /m, model first",
    ]
    assert err == ""
    assert mounthelper.main(["/s", "/m", "-sn", "-o", "other"]) == 0
    assert capsys.readouterr() == ("", "")


def test_f_does_everything_but_the_mount(
    mount: FakeMount, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("source", "mount"):
        (tmp_path / name).mkdir()
    words = ["-f", str(tmp_path / "source")]
    assert mounthelper.main([*words, str(tmp_path / "mount")]) == 0
    assert capsys.readouterr() == ("", "")
    assert mounthelper.main([*words, str(tmp_path / "missing")]) == 32
    assert "does not exist" in capsys.readouterr().err
    assert mounthelper.main([*words, str(tmp_path / "mount"), "-o", "what"]) == 1
    assert mount.mounted == []


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (0, 0),
        (Failure(ExitCode.USAGE, "x"), 1),
        (Failure(ExitCode.ALLOW_OTHER_DENIED, "x"), 1),
        (Failure(ExitCode.INTERNAL, "x"), 4),
        (ExitCode.INTERNAL, 4),
        (130, 8),
        (143, 8),
        (Failure(ExitCode.SOURCE_MISSING, "x"), 32),
        (Failure(ExitCode.NO_FUSE_DEVICE, "x"), 32),
        (Failure(ExitCode.MOUNT_REFUSED, "x"), 32),
        (ExitCode.MOUNT_REFUSED, 32),
    ],
)
def test_exit_codes_are_those_of_mount_8(
    mount: FakeMount, outcome: int | Failure, code: int
) -> None:
    mount.outcome = outcome
    assert mounthelper.main(["/s", "/m"]) == code


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["/s"], "MNT"),
        (["/s", "/m", "-x"], "-x"),
        (["/s", "/m", "-o", "what"], "what"),
        (["/s", "/m", "-s", "-o", "cache=what"], "cache=what"),
        (["/s", "/m", "-N", "/no/such/file"], "/no/such/file"),
        (["/s", "/m", "-N", "/dev/null"], "/dev/null"),
    ],
)
def test_what_the_helper_does_not_take(
    mount: FakeMount, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert mounthelper.main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ninefuse: ")
    assert named in err
    assert err.count("\n") == 1
    assert mount.mounted == []


def test_the_service_that_runs_mount_8_speaks_for_itself(
    mount: FakeMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/of/somebody/else")
    assert mounthelper.main(["/s", "/m"]) == 0
    assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EPERM, "cannot remount {}: Operation not permitted (changing a mount takes root)"),
        (errno.EBUSY, "{} cannot be made read-only: files are open for writing there, which "),
    ],
)
def test_a_remount_that_the_kernel_refuses(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    text: str,
) -> None:
    flags = b"rw,nosuid,noexec"
    line = mountinfo.MountLine(b"0:1", bytes(tmp_path), b"fuse.x", b"rw", b"1", flags=flags)
    monkeypatch.setattr(mountinfo, "of_file", lambda fd: line)
    asked: list[int] = []

    def refused(source: str, target: str, kind: str, flags: int, data: str) -> None:
        asked.append(flags)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(syscalls, "mount", refused)
    words = ["/no/such", str(tmp_path), "-o", "remount,ro,user_id=0,model=first,suid,nodiratime"]
    assert mounthelper.main(words) == 32
    assert text.format(tmp_path) in capsys.readouterr().err
    # Read-only, nosuid, noexec (who knows of such a source?), nodiratime, relatime.
    assert asked == [0x20 | 0x1 | 0x2 | 0x8 | 0x800 | 0x200000]


# ---- with the real mount(8) ----------------------------------------------------------------------

FLAGS = "relatime,user_id=0,group_id=0,default_permissions"


@needs_namespace
def test_mount_runs_ninefuse_by_the_name_in_its_type() -> None:
    done = script_apart(
        """
        echo hello > /mnt/source/file
        tell mount -t fuse.ninefuse /mnt/source /mnt/mount -o noexec,model=first
        shown /mnt/mount
        cat /mnt/mount/file
        tell remount_alone ro
        touch /mnt/mount/new 2>&1 || true
        tell umount /mnt/mount
        tell findmnt /mnt/mount
        tell mount -t fuse.ninefuse /mnt/missing /mnt/mount
        mkdir -p /mnt/.venv/bin
        mv /mnt/bin/ninefuse /mnt/.venv/bin
        tell mount -t fuse3 "/mnt/.venv/bin/ninefuse#/mnt/source" /mnt/mount -o ro
        shown /mnt/mount
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "= 0",
        f"/mnt/source fuse.ninefuse rw,noexec,{FLAGS}",
        "hello",
        "= 0",
        "touch: cannot touch '/mnt/mount/new': Read-only file system",
        "= 0",
        "= 1",  # it is no longer there
        "ninefuse: source /mnt/missing does not exist: create it or check the name",
        f"= {ExitCode.SOURCE_MISSING:d}",
        "= 0",
        f"/mnt/source fuse.ninefuse ro,{FLAGS}",
    ]


@needs_namespace
def test_mount_runs_the_helper_for_the_type_ninefuse() -> None:
    done = script_apart(
        """
        echo hello > /mnt/source/file
        tell mount -t ninefuse /mnt/source /mnt/mount -f -v
        tell findmnt /mnt/mount
        tell mount -t ninefuse /mnt/missing /mnt/mount
        tell mount -t ninefuse /mnt/source /mnt/mount -svn -o what,ro
        shown /mnt/mount
        cat /mnt/mount/file
        tell umount /mnt/mount
        tell findmnt /mnt/mount
        unshare -m --propagation private sleep 60 &
        sleeper=$!
        until [ "$(readlink /proc/$sleeper/ns/mnt)" != "$(readlink /proc/self/ns/mnt)" ]; do :; done
        tell mount -N $sleeper -t ninefuse /mnt/source /mnt/mount
        tell findmnt /mnt/mount
        nsenter -t $sleeper -m cat /mnt/mount/file
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "= 0",
        "= 1",  # -f has mounted nothing
        "ninefuse: source /mnt/missing does not exist: create it or check the name",
        "= 32",
        "mount.ninefuse: unknown option what ignored",
        "mount.ninefuse: /mnt/source mounted on /mnt/mount, model second",
        "= 0",
        f"/mnt/source fuse.ninefuse ro,nosuid,nodev,{FLAGS}",
        "hello",
        "= 0",
        "= 1",
        "= 0",
        "= 1",  # it is in the other namespace only
        "hello",
    ]


REFUSED = "Read-only file system"
CHANGES = """
shown /mnt/mount
for word in ro rw noatime relatime,noexec exec,nodiratime ro,diratime; do
    tell mount -o remount,$word /mnt/mount
    shown /mnt/mount
    touch /mnt/mount/file 2>&1 || true
done
"""


@needs_namespace
@pytest.mark.parametrize("model", SOME_MODELS)
@pytest.mark.parametrize("kind", ["fuse.ninefuse", "ninefuse"])
def test_a_mount_is_changed_while_it_is_served(kind: str, model: str) -> None:
    """Whatever mount(8) calls us by, which hands back what the mount table shows."""
    made = f"mount -t {kind} -o nosuid,nodev,model={model} /mnt/source /mnt/mount\n"
    done = script_apart(made + CHANGES)
    rest = FLAGS.removeprefix("relatime,")
    refused = f"touch: cannot touch '/mnt/mount/file': {REFUSED}"

    def shown(flags: str) -> str:
        return f"/mnt/source fuse.ninefuse {flags},{rest}"

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        shown("rw,nosuid,nodev,relatime"),
        "= 0",
        shown("ro,nosuid,nodev,relatime"),
        refused,
        "= 0",
        shown("rw,nosuid,nodev,relatime"),
        "= 0",
        shown("rw,nosuid,nodev,noatime"),
        "= 0",
        shown("rw,nosuid,nodev,noexec,relatime"),
        "= 0",
        shown("rw,nosuid,nodev,nodiratime,relatime"),
        "= 0",
        shown("ro,nosuid,nodev,relatime"),
        refused,
    ]


@needs_namespace
@pytest.mark.parametrize("model", SOME_MODELS)
def test_a_mount_that_was_made_read_only_becomes_writable(model: str) -> None:
    """The daemon's own switch follows the table, there and back, by whatever way it changed."""
    done = script_apart(
        f"""
        tell mount -t ninefuse -o ro,model={model} /mnt/source /mnt/mount
        touch /mnt/mount/new 2>&1 || true
        tell mount -o remount,rw /mnt/mount
        echo hello > /mnt/mount/new
        mkdir /mnt/mount/directory
        mv /mnt/mount/new /mnt/mount/directory
        setfattr -n user.k -v v /mnt/mount/directory/new 2> /dev/null || true
        cat /mnt/source/directory/new
        tell remount_alone ro
        rm /mnt/mount/directory/new 2>&1 || true
        tell remount_alone rw
        rm /mnt/mount/directory/new
        ls /mnt/source/directory
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "= 0",
        f"touch: cannot touch '/mnt/mount/new': {REFUSED}",
        "= 0",
        "hello",
        "= 0",
        f"rm: cannot remove '/mnt/mount/directory/new': {REFUSED}",
        "= 0",
    ]


@needs_namespace
def test_what_a_remount_by_fstab_says_and_what_it_does_not_change() -> None:
    done = script_apart(
        """
        echo "/mnt/source /mnt/mount ninefuse model=first,nofail,allow_other,exec 0 0" > /mnt/fstab
        touch /etc/fstab
        mount --bind /mnt/fstab /etc/fstab
        tell mount /mnt/mount
        tell mount -v -o remount,ro /mnt/mount
        shown /mnt/mount
        tell mount -o remount /mnt/mount
        shown /mnt/mount
        tell mount -o remount,suid,dev,strictatime /mnt/mount
        shown /mnt/mount
        tell mount -o remount,sync /mnt/mount
        sleep 60 > /mnt/mount/busy &
        tell mount -o remount,ro /mnt/mount
        kill $!
        tell mount -f -o remount,ro /mnt/mount
        shown /mnt/mount
        tell mount -t ninefuse -o remount,noatime /mnt/source /mnt/mount
        shown /mnt/mount
        mkdir /mnt/third
        tell ninefuse -o remount,ro /mnt/source /mnt/third
        tell ninefuse -o remount,ro /mnt/source /mnt/mount/busy
        """
    )
    assert done.stderr == ""
    rest = "user_id=0,group_id=0,default_permissions,allow_other"
    for_the_daemon = (
        "ninefuse: -o remount,sync: that is for the daemon to do, which is told when it is"
        " started: unmount, and mount anew (see ninefuse --help)"
    )
    nothing = "ninefuse: -o remount: nothing of ours is mounted on {}: mount it first (see"
    lines = done.stdout.splitlines()
    assert lines == [
        "= 0",
        "mount.ninefuse: /mnt/mount remounted",
        "= 0",
        f"/mnt/source fuse.ninefuse ro,nosuid,nodev,relatime,{rest}",
        "= 0",
        f"/mnt/source fuse.ninefuse rw,nosuid,nodev,relatime,{rest}",
        "= 0",
        f"/mnt/source fuse.ninefuse rw,nosuid,nodev,{rest}",
        for_the_daemon,
        "= 1",
        "ninefuse: /mnt/mount cannot be made read-only: files are open for writing there, which"
        " fuser -vm /mnt/mount shows: end the programs",
        "= 32",
        "= 0",
        f"/mnt/source fuse.ninefuse rw,nosuid,nodev,{rest}",
        "= 0",
        f"/mnt/source fuse.ninefuse rw,nosuid,nodev,noatime,{rest}",
        nothing.format("/mnt/third") + " ninefuse --help)",
        f"= {ExitCode.USAGE:d}",
        nothing.format("/mnt/mount/busy") + " ninefuse --help)",
        f"= {ExitCode.USAGE:d}",
    ]


@needs_namespace
@pytest.mark.parametrize("kind", ["fuse.ninefuse", "ninefuse"])
def test_what_file_systems_in_the_source_forbid_is_hidden_once_the_mount_allows_it(
    kind: str,
) -> None:
    """mount(8) takes nosuid away without asking us where it knows no type, or has -i."""
    done = script_apart(
        f"""
        mkdir /mnt/source/below
        mount -t tmpfs -o nosuid,nodev none /mnt/source/below
        cp /bin/true /mnt/source/below/program
        chmod 4755 /mnt/source/below/program
        mknod /mnt/source/below/null c 1 3
        tell mount -t {kind} -o nosuid,nodev,cache=none /mnt/source /mnt/mount
        stat -c %a,%t:%T /mnt/mount/below/program /mnt/mount/below/null
        tell remount_alone suid,dev
        stat -c %a,%t:%T /mnt/mount/below/program /mnt/mount/below/null
        tell remount_alone nosuid,nodev
        stat -c %a,%t:%T /mnt/mount/below/program /mnt/mount/below/null
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        *("= 0", "4755,0:0", "644,1:3"),
        *("= 0", "755,0:0", "644,0:1"),
        *("= 0", "4755,0:0", "644,1:3"),
    ]


FSTAB = r"""
cat > /mnt/fstab <<'END'
/mnt/source /mnt/mount fuse.ninefuse model=first,nofail,_netdev,x-systemd.automount 0 0
/mnt/with\040space /mnt/third ninefuse defaults,ro,comment=why,threads=3 0 0
/mnt/source /mnt/later ninefuse noauto 0 0
END
"""


@needs_namespace
def test_mount_does_what_fstab_says_and_does_it_once() -> None:
    done = script_apart(
        FSTAB
        + """
        echo hello > /mnt/source/file
        mkdir "/mnt/with space" /mnt/third
        echo x > "/mnt/with space/file"
        touch /etc/fstab
        mount --bind /mnt/fstab /etc/fstab
        tell mount -a
        tell mount -a
        grep -c ' - fuse.ninefuse /mnt/' /proc/self/mountinfo
        shown /mnt/mount
        cat /mnt/mount/file
        shown /mnt/third
        cat /mnt/third/file
        tell umount /mnt/third
        tell mount /mnt/third
        cat /mnt/third/file
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "= 0",
        "= 0",
        "2",
        f"/mnt/source fuse.ninefuse rw,{FLAGS}",
        "hello",
        f"/mnt/with space fuse.ninefuse ro,nosuid,nodev,{FLAGS}",
        "x",
        "= 0",
        "= 0",
        "x",
    ]


# What systemd does for x-systemd.automount: has the kernel report whoever comes to the mount point
# (autofs, a direct mount), and mounts in its own process group, which alone does not have to wait.
AUTOMOUNT = """
cat > /mnt/automount <<'END'
import fcntl, os, struct, subprocess
from ninefuse.linux import syscalls
READY, FAILED = 0x9360, 0x9361
reports, reporter = os.pipe()
options = f"fd={reporter},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
syscalls.mount("automount", "/mnt/mount", "autofs", 0, options)
point = os.open("/mnt/mount", os.O_RDONLY | os.O_DIRECTORY)
visitor = subprocess.Popen(["cat", "/mnt/mount/file"], start_new_session=True)
token = struct.unpack_from("iiI", os.read(reports, 400))[2]
answer = FAILED
try:
    done = subprocess.run(["mount", "/mnt/mount"], timeout=15)
    answer = READY if done.returncode == 0 else FAILED
finally:
    fcntl.ioctl(point, answer, token)
    visitor.wait()
END
"""


@needs_namespace
@pytest.mark.skipif(
    "autofs" not in Path("/proc/filesystems").read_text(), reason="this kernel has no autofs"
)
def test_an_automount_is_not_waited_for_by_the_daemon_that_it_waits_for() -> None:
    done = script_apart(
        AUTOMOUNT
        + """
        echo hello > /mnt/source/file
        echo '/mnt/source /mnt/mount ninefuse x-systemd.automount 0 0' > /mnt/fstab
        touch /etc/fstab
        mount --bind /mnt/fstab /etc/fstab
        PYTHONPATH=$REPO setsid --wait $PYTHON /mnt/automount
        umount /mnt/mount
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
