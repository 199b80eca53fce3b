"""One replica writes: the one that holds the Lease, as long as no other can hold it.

The law. Clocks of machines differ, so nobody believes a time that another wrote: a Lease is free
when it was given up, or when its holder has not touched it for its whole duration on *our* clock,
counted from when we saw the last touch. The holder in turn counts from before it asked for the
renewal, and stops writing so early that a write begun in time has ended when another may begin.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import structlog

from trimtab.ports import AbsentError, ClusterError, ConflictError, LeaseRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimtab.ports import Clock, LeaseStore

LEASE_S = 10
ROUND_S = 2.0  # four renewals may fail; and 10 + 2 + the jitter stay below 15 s
JITTER_RATIO = 0.2
WRITE_S = 3.0  # what a write takes at most: its deadline

log = structlog.get_logger(__name__)


class Leadership:
    """Whether this replica may write; `run` keeps it so."""

    def __init__(
        self, store: LeaseStore, *, identity: str, clock: Clock, jitter: Callable[[], float]
    ) -> None:
        """Say who we are.

        Args:
            store: Where the Lease is.
            identity: Of this process, and of no other, not even of one that it replaces.
            clock: Monotonic.
            jitter: A number of 0 to 1, another one each time.
        """
        self._store = store
        self._identity = identity
        self._clock = clock
        self._jitter = jitter
        self._lease = LeaseRecord(holder="", duration_s=0)
        self._touched_s = -math.inf
        """When we saw the Lease change last."""
        self._ours_until_s = -math.inf
        self._leads = False
        self._complaint = ""

    @property
    def may_write(self) -> bool:
        """Whether a write that begins now ends while nobody else may write."""
        return self._clock.now_s() + WRITE_S <= self._ours_until_s

    async def run(self) -> NoReturn:
        """Take the Lease when it is free, and renew it, for ever."""
        while True:
            began_s = self._clock.now_s()
            try:
                await self._round()
                self._complaint = ""
            except ConflictError:
                self._lease = replace(self._lease, version="")  # another was faster
            except ClusterError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.warning("the lease cannot be read or renewed", reason=str(error))
            self._tell()
            next_s = began_s + ROUND_S * (1 - JITTER_RATIO * self._jitter())
            free_s = self._touched_s + self._lease.duration_s
            await self._clock.sleep_until_s(min(next_s, free_s) if free_s > began_s else next_s)

    async def release(self) -> None:
        """Give the Lease up, if it is ours, so that another need not wait. Never raises."""
        if self._clock.now_s() >= self._ours_until_s:
            return
        self._ours_until_s = -math.inf
        self._tell()
        try:
            # A renewal may have been cut off on its way, so what we know may be old.
            lease = await self._store.read_lease()
            if lease.holder == self._identity:
                await self._store.write_lease(replace(lease, holder="", duration_s=1))
        except ClusterError as error:
            log.warning("the lease could not be given up, it will run out", reason=str(error))

    async def _round(self) -> None:
        if self._lease.holder != self._identity or not self._lease.version:
            await self._look()
            if not self._is_free:
                return
        changes_hands = self._lease.holder != self._identity
        asked_s = self._clock.now_s()
        self._lease = await self._store.write_lease(
            LeaseRecord(
                holder=self._identity,
                duration_s=LEASE_S,
                transitions=self._lease.transitions + changes_hands,
                acquired="" if changes_hands else self._lease.acquired,
                version=self._lease.version,
            )
        )
        self._ours_until_s = asked_s + LEASE_S

    async def _look(self) -> None:
        try:
            lease = await self._store.read_lease()
        except AbsentError:
            lease = LeaseRecord(holder="", duration_s=0)
        if lease != self._lease:
            self._lease = lease
            self._touched_s = self._clock.now_s()
        if lease.holder != self._identity:
            self._ours_until_s = -math.inf

    @property
    def _is_free(self) -> bool:
        lease = self._lease
        return (
            lease.holder in {"", self._identity}
            or self._clock.now_s() >= self._touched_s + lease.duration_s
        )

    def _tell(self) -> None:
        leads = self._clock.now_s() < self._ours_until_s
        if leads != self._leads:
            self._leads = leads
            log.info("writes from now on" if leads else "writes no more", identity=self._identity)
