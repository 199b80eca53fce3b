"""What the loop needs from the world, and the errors it may be told.

Errors form a tree by what the caller can do: a `TrimtabError` is told to the user or counted and
tried again at the next tick; everything else is a bug and ends the task that met it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

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
