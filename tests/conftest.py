"""What the tests of several layers share: where a cluster can run, and what happens where not."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from cluster import network
from cluster.tools import UnavailableError, programs, system_program

if TYPE_CHECKING:
    from collections.abc import Callable

# pytest-asyncio keeps the loop it finds at its start and never closes it; the collector's complaint
# would fail whichever test it interrupts.
asyncio.set_event_loop(None)

NEEDS: dict[str, Callable[[], object]] = {
    "plane": programs,
    "cluster": network.enter,
    "cluster_ips": lambda: system_program("nft"),
}
"""The fixtures that start a cluster, and what makes this process ready for them, in that order."""


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in the background deaf to Ctrl-C, and so would be all that we start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "cluster: starts a real Kubernetes; set by its fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(_asks(item, fixture) for fixture in NEEDS):
            item.add_marker(pytest.mark.cluster)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Move into a private network if a selected test needs it, and skip what cannot run here.

    With TRIMTAB_REQUIRE_CLUSTER=1 nothing is skipped: what cannot run is an error.
    """
    if session.config.option.collectonly:
        return
    for fixture, prepare in NEEDS.items():
        asking = [item for item in session.items if _asks(item, fixture)]
        try:
            if asking:
                prepare()
        except UnavailableError as error:
            if os.environ.get("TRIMTAB_REQUIRE_CLUSTER") == "1":
                raise pytest.UsageError(f"{len(asking)} tests cannot run: {error}") from None
            for item in asking:
                item.add_marker(pytest.mark.skip(reason=str(error)))


def _asks(item: pytest.Item, fixture: str) -> bool:
    return fixture in getattr(item, "fixturenames", ())
