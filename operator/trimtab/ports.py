"""What the loop needs from the world, and the errors it may be told.

Errors form a tree by what the caller can do: a `TrimtabError` is told to the user or counted and
tried again at the next tick; everything else is a bug and ends the task that met it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from trimtab.core.model import Endpoint, Observation, Snapshot


class TrimtabError(Exception):
    """Something outside did not do what was asked; the message says what to do about it."""


class ConfigurationError(TrimtabError):
    """What the user wrote cannot be carried out: told in one line, exit code 2."""


class StartError(TrimtabError):
    """A part could not be started (port taken, binary missing): told in one line, exit code 1."""


class PublishError(TrimtabError):
    """A data plane did not take a snapshot; the next tick tries again."""

    def __init__(self, data_plane: str, detail: str) -> None:
        super().__init__(f"{data_plane} refused the snapshot: {detail}")


class ClusterError(TrimtabError):
    """The Kubernetes API did not do what was asked, or did not say so; a later try may."""

    def __init__(self, detail: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s
        """How long it asked to be left alone."""


class AbsentError(ClusterError):
    """The object is not there, or not any more."""


class ConflictError(ClusterError):
    """Somebody else was faster: read again before the next try."""


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds."""

    async def sleep_until_s(self, then_s: float) -> None:
        """Return at `then_s`, or at once if that has passed."""


class Scraper(Protocol):
    async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
        """Ask every endpoint for its page at once. Bad pages are values in the answer."""


class Publisher(Protocol):
    async def publish(self, pool: str, snapshot: Snapshot) -> None:
        """Make the data plane follow `snapshot`. Safe to repeat. Raises PublishError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """Who may write. An empty `version` says that the Lease is to be made."""

    holder: str
    """Empty when it was given up."""
    duration_s: int
    transitions: int = 0
    acquired: str = ""
    """When the holder took it, as the API writes times; empty: now."""
    version: str = ""


class LeaseStore(Protocol):
    async def read_lease(self) -> LeaseRecord:
        """Say who holds it. Raises ClusterError, AbsentError."""

    async def write_lease(self, record: LeaseRecord) -> LeaseRecord:
        """Write it, if it still has that version. Raises ClusterError, ConflictError."""


class Recorder(Protocol):
    """Where a cluster's users read what became of their pools."""

    async def apply_status(
        self, namespace: str, name: str, status: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Replace our part of a pool's status, and return the object. Raises ClusterError."""

    async def post_event(
        self, regarding: Mapping[str, str], *, reason: str, note: str, warning: bool
    ) -> None:
        """Tell of a change of an object. Raises ClusterError."""
