"""The guest of `make guest`, and exports that it has mounted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import SOAK

from guest.exports import Export
from guest.image import image
from guest.machine import Guest
from guest.servers import Server

WANTED = SOAK or os.environ.get("NINEFUSE_GUEST") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "boots a virtual machine: `make guest` runs it, and so does `make soak`"
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.soak)
            if not WANTED:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Guest]]:
    """Return the guest: one for all tests, or a new one after a test has lost it."""
    running: list[Guest] = []

    def current() -> Guest:
        if not running or running[-1].lost or running[-1].process.poll() is not None:
            if running:
                running[-1].end()
            running.append(Guest(image(), tmp_path_factory.mktemp("guest")))
        return running[-1]

    yield current
    for guest in running:
        guest.end()


@pytest.fixture
def new_export(guests: Callable[[], Guest], tmp_path: Path) -> Iterator[Callable[..., Export]]:
    """Export a fresh directory and mount it in the guest: new_export(cache, *mount options)."""
    made: list[Export] = []

    def make(cache: str = "none", *options: str, trans: str = "tcp") -> Export:
        base = tmp_path / f"export{len(made)}"
        source = base / "source"
        source.mkdir(parents=True)
        export = Export(guests(), Server(source, base / "log"), source)
        export.server.start()
        made.append(export)
        export.mount(cache, *options, trans=trans)
        return export

    with contextlib.ExitStack() as ends:
        yield make
        for export in made:
            ends.callback(export.server.end)
            if export.where and not export.guest.lost:
                ends.callback(export.unmount)
