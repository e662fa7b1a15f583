"""The time of day by which a process judges and dates what it does not ask the store about.

Where several nodes share a store they go by its clock (``store/clock.py``). What each of them decides by itself (when a JWT was
issued and when it expires, whether an overlap is over) it decides by the same clock: it looks at that every second, and carries
it on by the monotonic clock in between. So a machine whose clock is wrong, or is set while it runs, gives out and lets in
nothing that another node would not.

A look takes time, and the store's clock was read at some moment of it. So each look bounds by how much the two clocks differ,
and a quick one bounds it closely; the bounds of all looks hold together, widened by what clocks drift apart in between. When
they contradict each other the store's clock has been set, or another server leads: then the last one counts.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, NamedTuple

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import SECOND, Clock, Instant
from gatelodge_server.core.ports import TrailStore

_PAUSE: Final = 1.0
"""Seconds between two looks."""
_DRIFT: Final = 0.001
"""By how much two clocks may go at different speeds: twice what NTP allows itself to correct a clock by (500 ppm)."""


class _Bounds(NamedTuple):
    """By how many milliseconds the store's clock is ahead of the monotonic one, known at an instant of the latter."""

    least: float
    most: float
    at: float

    def narrowed(self, last: "_Bounds") -> "_Bounds":
        """These and what a later look says."""
        drift = _DRIFT * (last.at - self.at)
        least, most = max(self.least - drift, last.least), min(self.most + drift, last.most)
        return _Bounds(least, most, last.at) if least <= most else last


class NodeClock:
    """A ``Clock``: the store's, as this process knows it. ``own`` is used before the first look, and if the store has none."""

    def __init__(self, *, store: TrailStore, own: Clock, monotonic: Callable[[], float]) -> None:
        self._store = store
        self._own = own
        self._monotonic = monotonic
        self._ahead: _Bounds | None = None

    def __call__(self) -> Instant:
        """The time, in milliseconds since 1970."""
        if self._ahead is None:
            return self._own()
        return int(self._milliseconds() + (self._ahead.least + self._ahead.most) / 2)

    async def look(self) -> bool:
        """Look at the store's clock; whether it has one. Raises ``Unavailable``."""
        begun = self._milliseconds()
        there = await self._store.tell_time()
        ended = self._milliseconds()
        if there is None:
            return False
        # It was rounded down to a millisecond.
        last = _Bounds(there - ended, there + 1 - begun, ended)
        self._ahead = last if self._ahead is None else self._ahead.narrowed(last)
        return True

    async def run(self) -> None:
        """Look every now and then, until cancelled or until it is known that there is nothing to look at."""
        has_clock = True
        while has_clock:
            await asyncio.sleep(_PAUSE)
            with contextlib.suppress(Unavailable):  # the store has said so already, and the time goes on without it
                has_clock = await self.look()

    def _milliseconds(self) -> float:
        return self._monotonic() * SECOND
