"""What the tests of several layers share: how a cluster is asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

import pytest

from cluster import network
from cluster.tools import UnavailableError, programs

if TYPE_CHECKING:
    from pathlib import Path

_no_network = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: starts a real Kubernetes; added by its fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"plane", "cluster"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.cluster)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Move into a private network while this process still has a single thread: see `network`."""
    if not any("cluster" in getattr(item, "fixturenames", ()) for item in session.items):
        return
    try:
        programs()
        network.enter()
    except UnavailableError as error:
        session.config.stash[_no_network] = str(error)


@pytest.fixture(scope="session")
def kubernetes_programs() -> Path:
    """Return the directory of kube-apiserver and the others, or skip."""
    try:
        return programs()
    except UnavailableError as error:
        skip(str(error))


@pytest.fixture(scope="session")
def private_network(pytestconfig: pytest.Config) -> None:
    """Skip where this process could not move into a network of its own."""
    if reason := pytestconfig.stash.get(_no_network, ""):
        skip(reason)


def skip(reason: str) -> NoReturn:
    """Skip what this machine cannot run; where the cluster tests are required, fail."""
    if os.environ.get("TRIMTAB_REQUIRE_CLUSTER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
