"""What users read in the cluster: each pool's status, and an event for each change of a condition.

Written by the leader alone, and only what says something new: conditions at once, numbers every
30 s (core/conditions.py says what is worth it). What was written is compared with what the API
server says is there, so a status that somebody spoils is mended, and a new leader writes nothing
where the old one has told all. A write that fails is tried again later, and later each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

import structlog

from trimtab.core.conditions import Type, flips, status, worth_writing
from trimtab.ports import AbsentError, ClusterError
from trimtab.registry import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from trimtab.core.conditions import Facts
    from trimtab.core.model import Decision
    from trimtab.ports import Clock, Recorder
    from trimtab.registry import Pool, Registry

LOOK_EVERY_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0

log = structlog.get_logger(__name__)


class Knowing(Protocol):
    """Who knows what is to be told."""

    def decision(self, pool: Pool) -> Decision | None: ...

    def facts(self, pool: Pool) -> Facts: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """When one pool's status may be written again."""

    written_s: float = -math.inf
    tried_s: float = -math.inf
    not_before_s: float = -math.inf
    failures: int = 0

    def wrote(self, now_s: float) -> Pace:
        return Pace(written_s=now_s, tried_s=now_s)

    def failed(self, now_s: float, *, retry_after_s: float, jitter: float) -> Pace:
        """Wait twice as long as before, or as long as was asked; never all at the same moment."""
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self.failures) * (0.5 + jitter / 2)
        return Pace(
            written_s=self.written_s,
            tried_s=now_s,
            not_before_s=now_s + max(pause_s, retry_after_s),
            failures=min(self.failures + 1, 16),
        )


class Reports:
    """Brings status and events to where users read them."""

    def __init__(
        self,
        registry: Registry,
        knowing: Knowing,
        recorder: Recorder,
        *,
        may_write: Callable[[], bool],
        clock: Clock,
        wall_s: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        """Say from where, to where and when.

        Args:
            registry: The pools and the status that each has now; told of each answer.
            knowing: What is to be said of them.
            recorder: Who writes.
            may_write: Asked before each write.
            clock: Monotonic.
            wall_s: The time of day, for people.
            jitter: A number of 0 to 1, another one each time.
        """
        self._registry = registry
        self._knowing = knowing
        self._recorder = recorder
        self._may_write = may_write
        self._clock = clock
        self._wall_s = wall_s
        self._jitter = jitter
        self._paces: dict[str, Pace] = {}
        self._complaint = ""

    async def run(self) -> NoReturn:
        while True:
            began_s = self._clock.now_s()
            await self.write()
            await self._clock.sleep_until_s(began_s + LOOK_EVERY_S)

    async def write(self) -> None:
        """Write what is due. Ends at the first failure: it is likely everybody's."""
        pools = {pool.uid: pool for pool in self._registry.pools().values()}
        self._paces = {uid: self._paces.get(uid, Pace()) for uid in pools}
        for uid in sorted(pools, key=lambda uid: self._paces[uid].tried_s):
            pace, now_s = self._paces[uid], self._clock.now_s()
            if now_s < pace.not_before_s:
                continue
            following = self._due(pools[uid], since_s=now_s - pace.written_s)
            if following is None:
                continue
            if not self._may_write():
                return
            try:
                await self._tell(pools[uid], following)
            except AbsentError:
                continue  # deleted meanwhile; the watch will say so
            except ClusterError as error:
                self._complain(pools[uid], error)
                self._paces[uid] = pace.failed(
                    self._clock.now_s(), retry_after_s=error.retry_after_s, jitter=self._jitter()
                )
                return
            self._complaint = ""
            self._paces[uid] = pace.wrote(now_s)

    def _due(self, pool: Pool, *, since_s: float) -> dict[str, Any] | None:
        following = status(
            self._knowing.decision(pool),
            self._knowing.facts(pool),
            pool.status,
            wall_s=self._wall_s(),
        )
        return following if worth_writing(pool.status, following, since_s=since_s) else None

    async def _tell(self, pool: Pool, following: dict[str, Any]) -> None:
        written = await self._recorder.apply_status(pool.namespace, pool.name, following)
        self._registry.told(Kind.POOLS, written)
        regarding = {
            "apiVersion": "trimtab.dev/v1alpha1",
            "kind": "InferencePool",
            "namespace": pool.namespace,
            "name": pool.name,
            "uid": pool.uid,
        }
        for condition in news(pool.status, following):
            if not self._may_write():
                return
            try:
                await self._recorder.post_event(
                    regarding,
                    reason=condition["reason"],
                    note=f"{condition['type']} is {condition['status']}: {condition['message']}",
                    warning=condition["status"] == "False",
                )
            except ClusterError as error:  # the status says it, too
                self._complain(pool, error)
                return

    def _complain(self, pool: Pool, error: ClusterError) -> None:
        if str(error) != self._complaint:
            self._complaint = str(error)
            log.warning("could not be told to the cluster", pool=pool.key, reason=str(error))


def news(previous: Mapping[str, Any], following: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the changed conditions that are worth an event.

    Of a pool that had none before, those that users wait for or must mend.
    """
    if previous.get("conditions"):
        return flips(previous, following)
    return [
        condition
        for condition in flips(previous, following)
        if condition["type"] == Type.READY or condition["status"] == "False"
    ]
