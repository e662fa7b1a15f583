"""The change sequence, followed: what was read from the store may be remembered for as long as nothing says otherwise.

What happens when a credential is revoked:

1. The verb that revokes it appends a step to the change sequence in its own transaction (``store/trail.py``) and, once that is
   committed and before anybody is told, rings the bell (``ports.Bell``), which every process on the database can hear.
2. Before a process believes anything that it remembers it looks at the bell (``ChangeFollower.is_current``); if that has
   changed it reads the steps that it does not know and drops what they name.
3. A step whose writer died between the commit and the bell is found by the reading that is done every half second anyway. A
   process that could not read for longer than the maximum staleness, or was frozen for so long, believes nothing that it
   remembers: it reads first, and refuses if it cannot.
4. Should the sequence end before a step that is known, a backup has been restored underneath: everything is forgotten.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from gatelodge.errors import Unavailable
from gatelodge_server.core.ports import Bell, TrailStore

MAX_STALENESS: Final = 10.0
"""Seconds, by the monotonic clock, for which the last reading of the change sequence is trusted."""
_PAUSE: Final = 0.5
"""Seconds between two readings that nobody has rung for."""
_PAGE: Final = 500

RESTORED: Final = "all"
"""The kind of change that a restored backup is. It has no subject."""
Forget = Callable[[str, str], None]
"""Told the kind and the subject of each change; of ``RESTORED``, if everything may have changed."""


class FollowedStore(TrailStore, Bell, Protocol):
    """What following needs of a store."""


class ChangeFollower:
    """Tells those who remember things when to forget them. Belongs to one event loop.

    ``on_mistake`` is told of whatever ``run`` meets that is no fault of the store's.
    """

    def __init__(
        self,
        *,
        store: FollowedStore,
        monotonic: Callable[[], float],
        on_mistake: Callable[[Exception], None],
        max_staleness: float = MAX_STALENESS,
    ) -> None:
        self._store = store
        self._on_mistake = on_mistake
        self._monotonic = monotonic
        self._max_staleness = max_staleness
        self._forget: list[Forget] = []
        self._sequence: int | None = None
        self._heard = -1
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def tell(self, forget: Forget) -> None:
        """Let ``forget`` hear of every change from now on."""
        self._forget.append(forget)

    def is_current(self) -> bool:
        """Whether nothing has changed that was not told, as far as can be known."""
        return self._store.bell() == self._heard and self.is_following()

    def is_following(self) -> bool:
        """Whether the sequence has been read within the maximum staleness, whatever may have changed since."""
        return self._monotonic() < self._read_at + self._max_staleness

    async def catch_up(self) -> None:
        """Read what has changed and tell it. Raises ``Unavailable``; then nothing that is remembered may be believed.

        What changes while this is going on may be told or not: it was not over when this was asked.
        """
        if self._reading is not None:
            # Begun before this was asked, so it may have missed what was rung for just now. All wait for the one task,
            # shielded: whoever goes away must not end the reading of the others.
            await asyncio.shield(self._reading)
        if not self.is_current():
            await asyncio.shield(self._begin_reading())

    async def run(self) -> None:
        """Read every now and then, until cancelled."""
        while True:
            try:
                await asyncio.shield(self._begin_reading())
            except Unavailable:
                pass  # the store has said so already, and `is_current` will when it has been for too long
            except Exception as mistake:  # noqa: BLE001 - whatever it is, the next change must be heard of all the same
                self._on_mistake(mistake)
            await asyncio.sleep(_PAUSE)

    def _begin_reading(self) -> asyncio.Task[None]:
        # One that is done is noticed as such only in the loop's next round: it began before this was asked for.
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._read())
            self._reading.add_done_callback(self._end_reading)
        return self._reading

    def _end_reading(self, reading: asyncio.Task[None]) -> None:
        if self._reading is reading:
            self._reading = None
        if not reading.cancelled():
            reading.exception()  # those who wait hear of it

    async def _read(self) -> None:
        # Both before the reading: what is committed during it may not be in it.
        heard, read_at = self._store.bell(), self._monotonic()
        known = self._sequence
        if self._sequence is None:
            # Nothing has been remembered yet, so nothing has to be forgotten.
            self._sequence = await self._store.last_change()
        while True:
            changes = await self._store.list_changes(after=self._sequence, limit=_PAGE)
            for change in changes:
                for forget in self._forget:
                    forget(change.kind, change.subject)
                self._sequence = change.sequence
            if len(changes) < _PAGE:
                break
        if known is not None and self._sequence == known:
            await self._look_for_a_restore(known)
        self._heard, self._read_at = heard, read_at

    async def _look_for_a_restore(self, known: int) -> None:
        last = await self._store.last_change()
        if last < known:
            # What is remembered comes from a database that is no more.
            for forget in self._forget:
                forget(RESTORED, "")
            self._sequence = last
