"""Tiers: what partners are allowed, by name. A change counts from the next ask for quota on (``quotas.py``)."""

from collections.abc import Sequence
from typing import Final

from gatelodge_server.core.model import Clock, Tier
from gatelodge_server.core.ports import PartnerStore

LARGEST_LIMIT: Final = 2_000_000_000
"""Requests in an hour or a day: what a database's plain integers can count, and more than anybody has."""


class Tiers:
    """The tiers of one environment."""

    def __init__(self, *, store: PartnerStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def list_all(self) -> Sequence[Tier]:
        """Every tier, the smallest first."""
        return await self._store.list_tiers()

    async def set_limits(self, name: str, *, per_hour: int, per_day: int, by: str) -> int:
        """Add a tier or change what it allows, 1 to ``LARGEST_LIMIT`` each. The change's sequence number.

        A day may be smaller than an hour: then it is the day that limits.
        """
        if not all(1 <= limit <= LARGEST_LIMIT for limit in (per_hour, per_day)):
            raise ValueError(f"a limit is 1 to {LARGEST_LIMIT}")
        done = await self._store.set_tier(Tier(name, per_hour, per_day), now=self._clock(), by=by)
        return done.sequence
