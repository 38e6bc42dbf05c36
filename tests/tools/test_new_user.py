"""As a new user: from README alone, in an empty Debian. A long run, as root (make soak).

debootstrap makes the system, with nothing in it but what README asks for: git, make and Python.
Or NINEFUSE_DEBIAN names the root directory of one that is there. Its mounts are in a namespace of
their own, and go with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from blocks import block_of
from mounting import REPO, SOAK

SUITE = "bookworm"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"

# $1 is the new root; what is to be done there comes on standard input. The certificates are this
# machine's, behind whose proxy the downloads may be.
INSIDE = f"""
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t sysfs sysfs "$1/sys"
cp /etc/resolv.conf /etc/hosts "$1/etc"
cp {CERTIFICATES} "$1{CERTIFICATES}"
exec chroot "$1" env -i HOME=/root TERM=dumb PIP_CERT={CERTIFICATES} \\
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin sh -e
"""

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not SOAK, reason="takes ten minutes: make soak"),
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot and debootstrap are root's"),
]


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root directory of a Debian, with this checkout in /srv/ninefuse."""
    given = os.environ.get("NINEFUSE_DEBIAN")
    root = Path(given) if given else tmp_path_factory.mktemp("debian")
    if not given:
        if shutil.which("debootstrap") is None:
            pytest.skip("needs debootstrap, or an empty Debian that NINEFUSE_DEBIAN names")
        packages = "--include=ca-certificates,git,make,python3"
        command = ["debootstrap", "--variant=minbase", packages, SUITE, str(root)]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=600)
    home = root / "srv/ninefuse"
    unwanted = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "*.so", "build")
    shutil.copytree(REPO, home, ignore=unwanted, dirs_exist_ok=True)
    return root


def inside(root: Path, commands: str, seconds: float) -> str:
    """Run commands in the checkout there; what they print."""
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", INSIDE, "sh", root],
        input=f"cd /srv/ninefuse\n{commands}\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.limit(900)
def test_readme_works_in_an_empty_debian(debian: Path) -> None:
    commands = block_of(("README.md", "make demo "))[1].splitlines()
    assert [line.split("#")[0].strip() for line in commands] == ["make demo", "make test"]
    shown = inside(debian, commands[0], 900)
    assert "X parallel dd if=/dev/zero" in shown
    print(shown[shown.index("X parallel dd") :])
    shown = inside(debian, block_of(("README.md", "mkdir -p /tmp/src /tmp/mnt"))[1], 60)
    assert "1000+0 records out" in shown
    assert (debian / "tmp/src/file").stat().st_size == 4096000
    # Of `make test`, what a new user runs; the rest is run by who runs this.
    shown = inside(debian, "make check\nmake test-tools ARGS='-q -k test_documents'", 300)
    assert " passed" in shown.splitlines()[-1]
