"""What partners did: how many requests were let in and refused in each hour, and when a credential was last used.

Each process counts by itself and adds its counts to those of the store every second (``Quotas.run``). They are kept for charts
and for people who look; what a partner may still do is decided by ``quotas.py`` alone.
"""

from collections.abc import Mapping
from typing import Literal

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import Instant
from gatelodge_server.core.ports import LastUse, QuotaStore, UsageMark

UseKind = Literal["key", "token"]


class UsageLedger:
    """What this process saw and the store has not heard yet. Belongs to one event loop."""

    def __init__(self, store: QuotaStore) -> None:
        self._store = store
        self._counts: dict[tuple[str, Instant], tuple[int, int]] = {}
        self._uses: dict[tuple[UseKind, str], tuple[Instant, str]] = {}

    def note(self, partner_id: str, hour_starts_at: Instant, accepted: int, refused: int) -> None:
        """So many more requests of a partner in an hour."""
        if accepted or refused:
            before = self._counts.get((partner_id, hour_starts_at), (0, 0))
            self._counts[partner_id, hour_starts_at] = (before[0] + accepted, before[1] + refused)

    def note_use(self, kind: UseKind, credential_id: str, address: str, now: Instant) -> None:
        """A credential is being used."""
        self._uses[kind, credential_id] = (now, address)

    async def flush(self) -> None:
        """Tell the store. Raises ``Unavailable``: then it is all kept, to be told another time."""
        counts, self._counts = self._counts, {}
        uses, self._uses = self._uses, {}
        if not counts and not uses:
            return
        try:
            await self._store.note_usage(
                [UsageMark(partner_id, hour, *count) for (partner_id, hour), count in counts.items()],
                [LastUse(kind, credential_id, at, address) for (kind, credential_id), (at, address) in uses.items()],
            )
        except Unavailable:
            self._keep(counts, uses)
            raise

    def _keep(
        self,
        counts: Mapping[tuple[str, Instant], tuple[int, int]],
        uses: Mapping[tuple[UseKind, str], tuple[Instant, str]],
    ) -> None:
        for (partner_id, hour), (accepted, refused) in counts.items():
            self.note(partner_id, hour, accepted, refused)
        self._uses = {**uses, **self._uses}  # what was noted in the meantime is newer
