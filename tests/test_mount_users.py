"""Users other than root, in a namespace where they may open /dev/fuse: mounts that they make,
and mounts that are made for them and handed over as /dev/fd/N.
"""

from __future__ import annotations

import re

import pytest
from apart import NOBODY, needs_namespace, opened_to_users, script_apart

from ninefuse.exitcodes import ExitCode

# Directories of the user's own, and one for logs.
BEFORE = """
chown 65534:65534 /mnt/source /mnt/mount
chmod 755 /mnt/source /mnt/mount
as_user sh -c 'echo hello > /mnt/source/file'
mkdir -m 777 /mnt/logs
log=/mnt/logs/log
"""


@needs_namespace
def test_a_user_mounts_reads_writes_and_unmounts_and_others_stay_outside() -> None:
    done = script_apart(
        opened_to_users()
        + BEFORE
        + """
        as_user ninefuse --log $log /mnt/source /mnt/mount
        as_user cat /mnt/mount/file
        as_user sh -c 'echo more >> /mnt/mount/file; mkdir /mnt/mount/made'
        tell as_other ls /mnt/mount
        tell ls /mnt/mount
        as_other fusermount3 -u /mnt/mount 2>/dev/null || is_mounted
        as_user fusermount3 -u /mnt/mount
        tell is_mounted
        wait_while is_running $(daemon_of $log)
        tail -n1 /mnt/source/file
        stat -c %u:%g /mnt/source/made
        grep -E 'ERROR|WARNING|Traceback' $log || true
        """
    )
    refused = ["ls: cannot access '/mnt/mount': Permission denied", "= 2"]
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "hello",
        *refused,
        *refused,  # root, too
        "= 1",
        "more",
        f"{NOBODY}:{NOBODY}",
    ]


@needs_namespace
def test_others_are_let_in_where_the_machine_allows_it_and_sigterm_unmounts() -> None:
    done = script_apart(
        opened_to_users()
        + BEFORE
        + """
        echo user_allow_other > /mnt/fuse.conf
        as_user ninefuse --log $log /mnt/source /mnt/mount -o allow_other
        as_other cat /mnt/mount/file
        tell as_other touch /mnt/mount/file
        cat /mnt/mount/file
        daemon=$(daemon_of $log)
        stat -c %u /proc/$daemon
        as_user kill $daemon
        wait_while is_running $daemon
        tell is_mounted
        grep -E 'ERROR|WARNING|Traceback' $log || true
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "hello",
        "touch: cannot touch '/mnt/mount/file': Permission denied",
        "= 1",
        "hello",
        f"{NOBODY}",
        "= 1",
    ]


@needs_namespace
def test_a_user_is_told_of_options_that_fusermount_passes_over() -> None:
    done = script_apart(
        opened_to_users()
        + BEFORE
        + """
        as_user ninefuse --log $log /mnt/source /mnt/mount -o suid
        shown /mnt/mount
        as_user fusermount3 -u /mnt/mount
        wait_while is_running $(daemon_of $log)
        """
    )
    assert re.fullmatch(r"ninefuse: fusermount3: .*suid.*\n", done.stderr)
    assert ",nosuid," in done.stdout


@needs_namespace
@pytest.mark.parametrize("kind", ["fuse.ninefuse", "ninefuse"])
def test_a_user_mounts_what_fstab_lets_users_mount(kind: str) -> None:
    done = script_apart(
        opened_to_users()
        + BEFORE
        + f"""
        echo '/mnt/source /mnt/mount {kind} user,noauto,model=first 0 0' > /mnt/fstab
        touch /etc/fstab
        mount --bind /mnt/fstab /etc/fstab
        as_user mount /mnt/mount
        shown /mnt/mount
        as_user cat /mnt/mount/file
        as_other umount /mnt/mount 2>/dev/null || is_mounted
        as_user umount /mnt/mount
        tell is_mounted
        """
    )
    assert done.stderr == ""
    whose = f"user_id={NOBODY},group_id={NOBODY},default_permissions"
    assert done.stdout.splitlines() == [
        f"/mnt/source fuse.ninefuse rw,nosuid,nodev,noexec,relatime,{whose}",
        "hello",
        "= 1",
    ]


@needs_namespace
def test_what_may_not_be_is_said_to_users_and_in_containers() -> None:
    done = script_apart(
        opened_to_users()
        + BEFORE
        + """
        tell as_user ninefuse --log $log /mnt/source /mnt/mount
        chmod 666 /mnt/fuse
        tell setpriv --bounding-set=-sys_admin \\
            setpriv --reuid 65534 --regid 65534 --clear-groups \\
            ninefuse --log $log /mnt/source /mnt/mount
        mkdir -m 755 /mnt/theirs
        tell as_user ninefuse --log $log /mnt/source /mnt/theirs
        """,
        device="600",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "ninefuse: /dev/fuse may not be opened (Permission denied): have root allow it"
        " (chmod 666, or the container's device rules)",
        f"= {ExitCode.FUSE_DEVICE_DENIED:d}",
        "ninefuse: cannot mount on /mnt/mount: fusermount3: mount failed: Operation not permitted"
        " (nobody may mount in here, not even root, without CAP_SYS_ADMIN: start the container"
        " with --cap-add SYS_ADMIN --device /dev/fuse)",
        f"= {ExitCode.MOUNT_REFUSED:d}",
        "ninefuse: cannot mount on /mnt/theirs: fusermount3: user has no write access to"
        " mountpoint /mnt/theirs (mounting takes CAP_SYS_ADMIN, or fusermount3 and a mount point"
        " of one's own)",
        f"= {ExitCode.MOUNT_REFUSED:d}",
    ]


# ---- mounts that are handed over -----------------------------------------------------------------

# Mounts as root with certain options, and becomes the command with the device's descriptor.
OPENER = """
cat > /mnt/opener <<'END'
import os, sys
from ninefuse.linux import syscalls
options, mountpoint, *command = sys.argv[1:]
device = os.open("/dev/fuse", os.O_RDWR)
os.set_inheritable(device, True)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,{options}"
syscalls.mount("elsewhere", mountpoint, "fuse.theirs", 0, options)
with open(f"/proc/self/fdinfo/{device}", "rb") as file:
    if b"fuse_connection" not in file.read():
        print("not told")
        sys.stdout.flush()
os.execvp(command[0], [*command, "/mnt/source", f"/dev/fd/{device}"])
END
handed_over() { PYTHONPATH=$REPO $PYTHON /mnt/opener "$@"; }
"""


@needs_namespace
def test_a_user_serves_a_mount_that_root_has_made() -> None:
    done = script_apart(
        opened_to_users()
        + BEFORE
        + OPENER
        + """
        handed_over default_permissions,allow_other /mnt/mount \\
            setpriv --reuid 65534 --regid 65534 --clear-groups ninefuse --log $log >/dev/null
        shown /mnt/mount
        daemon=$(daemon_of $log)
        stat -c %u /proc/$daemon
        as_other cat /mnt/mount/file
        tell as_other touch /mnt/mount/file
        as_user sh -c 'echo more >> /mnt/mount/file'
        tail -n1 /mnt/source/file
        umount /mnt/mount
        wait_while is_running $daemon
        grep -E 'ERROR|WARNING|Traceback' $log || true
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "elsewhere fuse.theirs rw,relatime,user_id=0,group_id=0,default_permissions,allow_other",
        f"{NOBODY}",
        "hello",
        "touch: cannot touch '/mnt/mount/file': Permission denied",
        "= 1",
        "more",
    ]


@needs_namespace
def test_a_signal_ends_the_daemon_and_leaves_the_mount_to_its_maker() -> None:
    done = script_apart(
        OPENER
        + """
        handed_over default_permissions /mnt/mount ninefuse --log /mnt/log >/dev/null
        daemon=$(daemon_of /mnt/log)
        kill $daemon
        wait_while is_running $daemon
        tell stat /mnt/mount
        umount /mnt/mount
        tell ninefuse /mnt/source /dev/fd/9
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "stat: cannot statx '/mnt/mount': Transport endpoint is not connected",
        "= 1",
        "ninefuse: descriptor 9 is not an open /dev/fuse: mount with one, and hand it on",
        f"= {ExitCode.MOUNT_REFUSED:d}",
    ]


@needs_namespace
def test_a_mount_that_must_not_be_served_is_not() -> None:
    """Where nobody would check permissions, and where the daemon would wait for itself."""
    done = script_apart(
        OPENER
        + """
        mkdir /mnt/source/inside
        tell handed_over allow_other /mnt/mount timeout 10 ninefuse
        tell handed_over default_permissions /mnt/source/inside timeout 10 ninefuse
        """
    )
    lines = done.stdout.splitlines()
    if "not told" in lines:
        pytest.skip("this kernel does not say which mount a device's descriptor serves")
    assert done.stderr == ""
    assert lines == [
        "ninefuse: the mount on /mnt/mount lets other users in, and nobody would check what they"
        " may do: have it made with default_permissions",
        f"= {ExitCode.MOUNT_REFUSED:d}",
        "ninefuse: mount point /mnt/source/inside lies inside the source /mnt/source, so that"
        " requests would come back into the daemon and freeze it: give a mount point outside",
        f"= {ExitCode.MOUNTPOINT_INSIDE_SOURCE:d}",
    ]


@needs_namespace
def test_a_program_that_the_user_may_not_read_does_not_start() -> None:
    """Of a daemon of root it does (tests/test_mount_rights.py); docs/limitations.md."""
    done = script_apart(
        opened_to_users()
        + BEFORE
        + """
        cp /bin/true /mnt/source/program
        chmod 711 /mnt/source/program
        as_user ninefuse --log $log /mnt/source /mnt/mount
        tell as_user /mnt/source/program
        tell as_user /mnt/mount/program 2>/dev/null
        chmod 755 /mnt/source/program
        tell as_user /mnt/mount/program
        as_user fusermount3 -u /mnt/mount
        grep -E 'ERROR|WARNING|Traceback' $log || true
        """
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("=")] == [
        "= 0",
        "= 126",
        "= 0",
    ], done
