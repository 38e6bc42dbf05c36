"""A mount namespace for tests that need other files than the machine has, or other users.

What is mounted in it nobody else sees. A process namespace goes with it: whatever happens,
daemons end with the script that started them, and their mounts with these.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from mounting import REPO, run

AS_ROOT = os.geteuid() == 0
NOBODY = 65534
OTHER = 1  # daemon(1), wherever there are names of users

needs_namespace = pytest.mark.skipif(
    not AS_ROOT, reason="needs root: runs the command in a mount namespace of its own"
)

# Runs the command as another user, who need not be able to reach the interpreter's files: what
# would be imported later has to come before.
AS_NOBODY = (
    sys.executable,
    "-c",
    "import encodings.unicode_escape, locale, os, sys; from ninefuse import serve;"
    " from ninefuse.command import cli; os.setgroups([]);"
    f" os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY});"
    " sys.exit(cli.main())",
)

# Directories that every user can reach, a /dev/fuse of this mode ("none": there is none), and a
# fuse.conf that allows nothing; then the rest of the words.
_PREPARE = """
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir -m 777 /mnt/source /mnt/mount
if [ "$1" = none ]; then
    mkdir /mnt/dev
    for n in null urandom; do cp -a /dev/$n /mnt/dev/$n; done
    mount --bind /mnt/dev /dev
else
    mknod /mnt/fuse c 10 229
    chmod "$1" /mnt/fuse
    mount --bind /mnt/fuse /dev/fuse
fi
echo > /mnt/fuse.conf
if [ -e /etc/fuse.conf ]; then mount --bind /mnt/fuse.conf /etc/fuse.conf; fi
shift
"""

# For scripts: a command by a user, by another one; a command, and what it said and returned; until
# what is no more; and a remount that does not ask us. (For that, mount(8) of util-linux 2.39 and
# later has to be told to use mount(2): its new calls cannot change a mount of FUSE.)
_WORDS = f"""
as_user() {{ setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "$@"; }}
as_other() {{ setpriv --reuid {OTHER} --regid {OTHER} --clear-groups "$@"; }}
tell() {{ "$@" 2>&1 && echo "= 0" || echo "= $?"; }}
shown() {{ findmnt -no SOURCE,FSTYPE,OPTIONS $1; }}
is_mounted() {{ grep -q ' /mnt/mount ' /proc/self/mountinfo; }}
wait_while() {{ while "$@"; do sleep 0.01; done; }}
remount_alone() {{ LIBMOUNT_FORCE_MOUNT2=always mount -i -o remount,$1 /mnt/mount; }}
daemon_of() {{ sed -n 's/.*\\[\\([0-9]*\\)\\] .*mounted on.*/\\1/p' $1; }}
is_running() {{ grep -q '^State:.[^Z]' /proc/$1/status 2>/dev/null; }}
"""

# The commands where mount(8) looks for them: ninefuse on the system's PATH, and mount.ninefuse
# in /sbin, as the link that the documentation shows.
_INSTALL = """
mkdir /mnt/sbin /mnt/old-sbin /mnt/bin
mount --bind /sbin/ /mnt/old-sbin
ln -s /mnt/old-sbin/* /mnt/sbin/
for command in ninefuse=command.cli mount.ninefuse=command.mounthelper; do
    file=/mnt/bin/${command%=*}
    echo "#!/bin/sh" > $file
    echo "PYTHONPATH=$REPO exec $PYTHON -m ninefuse.${command#*=} \\"\\$@\\"" >> $file
    chmod 755 $file
done
mount --bind /mnt/bin /usr/local/bin
ln -s $(command -v mount.ninefuse) /mnt/sbin/
mount --bind /mnt/sbin /sbin
"""


def run_apart(device: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the namespace, on /mnt/source and /mnt/mount there."""
    script = f'{_PREPARE}\nexec "$@"'
    return _run(script, device, *words, "/mnt/source", "/mnt/mount")


def script_apart(script: str, device: str = "666") -> subprocess.CompletedProcess[str]:
    """Run a shell script in the namespace, with the commands installed."""
    variables = f"REPO={shlex.quote(str(REPO))} PYTHON={shlex.quote(sys.executable)}\n"
    path = "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    return _run(variables + path + _PREPARE + _INSTALL + _WORDS + script, device)


def _run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    namespace = ("unshare", "-m", "--propagation", "private", "-p", "-f", "--kill-child")
    return run(*namespace, "--mount-proc", "sh", "-ec", script, "sh", *words, seconds=45)


def opened_to_users() -> str:
    """A script that lets all users of the namespace reach the interpreter and this checkout.

    Directories above them that are closed to others are covered by open ones.
    """
    needed = {Path(path).resolve() for path in (sys.base_prefix, sys.prefix, REPO)}
    hold, cover, back = ["mkdir /mnt/hold"], [], []
    for number, path in enumerate(sorted(needed)):  # what lies inside another comes later
        if not _is_open(path):
            pytest.skip(f"needs an interpreter and a checkout that users may read: {path}")
        closed = next((d for d in reversed(path.parents) if not _is_open(d)), None)
        if closed is not None:
            held, name = f"/mnt/hold/{number}", shlex.quote(str(path))
            hold += [f"mkdir {held}", f"mount --bind {name} {held}"]
            above = f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}"
            if above not in cover:
                cover.append(above)
            back += [f"mkdir -p {name}", f"mount --bind {held} {name}"]
    return "\n".join([*hold, *cover, *back, ""])


def _is_open(directory: Path) -> bool:
    return bool(directory.stat().st_mode & stat.S_IXOTH)
