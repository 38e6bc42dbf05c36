"""pjdfstest in a guest, on a mount of v9fs: what fails there, and whose fault it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conformance import counted, failures

from guest.exports import Export

PJDFSTEST = os.environ.get("PJDFSTEST", "")
# "chmod/*.t,link/*.t" for some of them.
PATTERN = os.environ.get("NINEFUSE_GUEST_PJDFSTEST") or "*/*.t"
_SECONDS = 7200.0
_FILE_SECONDS = 1800.0  # rename/00.t alone has a thousand checks

# 9P names no groups of who asks: the server takes those that it knows of the user. These checks
# are of users that have others.
_GROUPS = "a user's groups are the server's word"
KNOWN = {
    "chown/05.t": _GROUPS,
    "open/06.t": _GROUPS,
    "utimensat/08.t": "v9fs cuts times to whole seconds",
}


@pytest.mark.skipif(
    not PJDFSTEST,
    reason="needs PJDFSTEST=/some/dir, built there for the guest: ./configure CFLAGS=-static",
)
@pytest.mark.timeout(_SECONDS)
def test_pjdfstest_fails_only_where_v9fs_does(new_export: Callable[..., Export]) -> None:
    export = new_export("none", "access=client")
    export.source.chmod(0o755)
    kept = shutil.ignore_patterns(".git", "*.o", "autom4te.cache")
    shutil.copytree(Path(PJDFSTEST), export.source / "pjdfstest", ignore=kept)
    where = (export.path("pjdfstest"), export.path("work"), PATTERN)

    job = export.guest.begin("conformance", *where)
    found: dict[str, str] = {}
    checks = 0
    while said := job.said(_FILE_SECONDS):
        found |= failures(said)
        checks += counted(said)[1]
        job.go()
    job.go()

    print(f"pjdfstest: {checks} checks; {found}")
    assert checks
    assert {name: why for name, why in found.items() if name not in KNOWN} == {}
    if PATTERN == "*/*.t":
        assert set(KNOWN) <= set(found), "some pass, and need no explanation any more"
