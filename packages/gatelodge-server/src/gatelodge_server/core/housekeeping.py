"""Housekeeping: what is over and told to nobody any more is deleted, a little at a time, beside everything else.

A session that has ended is kept for a day, so that its holder can be told why. ``store/sessions.py`` decides which are over.
A key for access tokens is withdrawn when no live token needs it any more: ``signing.plan_withdrawals`` decides which.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import DAY, HOUR, Clock, Duration, Instant
from gatelodge_server.core.ports import (
    QuotaStore,
    RegistrationStore,
    RevocationStore,
    SessionStore,
    SigningKeyStore,
    TrailStore,
)
from gatelodge_server.core.revocations import AWAY_FOR

ENDED_SESSIONS_KEPT: Final[Duration] = DAY
USAGE_KEPT: Final[Duration] = 400 * DAY
ENDED_MAILS_KEPT: Final[Duration] = 7 * DAY
"""So that somebody can be told what became of theirs. The limits of registration count those of the last day."""
_SLICE: Final = 500
_PAUSE: Final = 0.1
"""Seconds between two slices: others want to write too."""
_REST: Final = 60.0
"""Seconds between two rounds."""


class HousekeptStore(SessionStore, SigningKeyStore, QuotaStore, RegistrationStore, RevocationStore, TrailStore, Protocol):
    """What housekeeping needs of a store."""


class Housekeeping:
    """Walks through the sessions for as long as the service runs.

    ``clock`` is the one that all nodes share: what one thinks is over another may still need.
    ``delete_letters``: deletes the files of mails that were made before that instant; called in a thread.
    """

    def __init__(
        self,
        *,
        store: HousekeptStore,
        clock: Clock,
        on_purged: Callable[[int], None],
        on_mistake: Callable[[Exception], None],
        delete_letters: Callable[[Instant], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._on_purged = on_purged
        self._on_mistake = on_mistake
        self._delete_letters = delete_letters
        self._usage_forgotten_at: Instant = -HOUR

    async def run(self) -> None:
        """Go round until cancelled. What cannot be done now is done in a later round."""
        while True:
            try:
                self._on_purged(await self.go_round())
            except Unavailable:
                pass  # the store has said so already
            except Exception as mistake:  # noqa: BLE001 - whatever it is, the next round may do without it
                self._on_mistake(mistake)
            await asyncio.sleep(_REST)

    async def go_round(self) -> int:
        """Look at every session once; how many were deleted."""
        now = self._clock()
        await self._store.forget_replays(now=now)
        await self._store.retire_unneeded_keys(now=now)
        await self._store.forget_verifiers(away_for=AWAY_FOR, now=now)
        if now - self._usage_forgotten_at >= HOUR:  # it is kept by the hour, so no other rows are too old before the next
            await self._store.forget_usage(before=now - USAGE_KEPT)
            await self._store.purge_mails(ended_before=now - ENDED_MAILS_KEPT, now=now)
            await asyncio.to_thread(self._delete_letters, now - ENDED_MAILS_KEPT)
            self._usage_forgotten_at = now
        deleted, after = 0, None
        while True:
            purged = await self._store.purge_sessions(after=after, limit=_SLICE, ended_before=now - ENDED_SESSIONS_KEPT)
            deleted += purged.deleted
            if purged.after is None:
                return deleted
            after = purged.after
            await asyncio.sleep(_PAUSE)
