"""Clusters for tests: one control plane and one set of fake nodes a session, a namespace a test."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from cluster.control_plane import ControlPlane
from cluster.fake_nodes import Cluster
from cluster.tools import programs

if TYPE_CHECKING:
    from collections.abc import Iterator

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Give a real control plane without nodes (level A)."""
    with ControlPlane.start(programs(), tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture(scope="session")
def cluster(plane: ControlPlane) -> Iterator[Cluster]:
    """Give the control plane with nodes on which pods answer (level B)."""
    with Cluster.start(plane) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster_ips(cluster: Cluster) -> Cluster:
    """Give that cluster where ClusterIPs answer as well."""
    return cluster


@pytest.fixture
def namespace(plane: ControlPlane) -> Iterator[str]:
    """Give a namespace of one's own; what is left in it is deleted without grace."""
    name = f"test-{next(_numbers)}"
    plane.create_namespace(name)
    yield name
    plane.api.delete(f"/api/v1/namespaces/{name}")
    plane.api.delete(f"/api/v1/namespaces/{name}/pods", grace_s=0)
