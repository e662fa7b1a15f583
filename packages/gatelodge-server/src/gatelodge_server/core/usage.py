"""What partners did: how many requests were let in and refused in each hour, and when a credential was last used.

Each process counts by itself. A partner's counts go to the store in the transaction that leases for the partner or gives back
(``QuotaAsk.usage``), and so cost none of their own. What does not come along there goes by itself, about once a second and at
the end (``Quotas.run``, ``close``): the counts of partners for whom nothing was asked since, and the last uses of credentials.
Both ways end in one function, ``store/quotas.py`` ``_add``. What is known not to be written is kept, and told another time;
what may have been written, because its commit was not answered, is taken as written, so that nothing is counted twice.

The counts are kept for charts and for people who look; what a partner may still do is decided by ``quotas.py`` alone.
"""

from collections.abc import Iterable
from typing import Literal

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import Instant
from gatelodge_server.core.ports import LastUse, QuotaStore, UsageMark

UseKind = Literal["key", "token"]


class UsageLedger:
    """What this process saw and the store has not heard yet. Belongs to one event loop."""

    def __init__(self, store: QuotaStore) -> None:
        self._store = store
        self._counts: dict[str, dict[Instant, tuple[int, int]]] = {}
        self._uses: dict[tuple[UseKind, str], tuple[Instant, str]] = {}

    def note(self, partner_id: str, hour_starts_at: Instant, accepted: int, refused: int) -> None:
        """So many more requests of a partner in an hour."""
        if accepted or refused:
            hours = self._counts.setdefault(partner_id, {})
            before = hours.get(hour_starts_at, (0, 0))
            hours[hour_starts_at] = (before[0] + accepted, before[1] + refused)

    def note_use(self, kind: UseKind, credential_id: str, address: str, now: Instant) -> None:
        """A credential is being used."""
        self._uses[kind, credential_id] = (now, address)

    def take(self, partner_id: str) -> list[UsageMark]:
        """All counts of a partner, for whoever tells the store; if they are not written, ``keep`` has them again."""
        return [UsageMark(partner_id, hour, *count) for hour, count in self._counts.pop(partner_id, {}).items()]

    def keep(self, marks: Iterable[UsageMark]) -> None:
        """So much was not written after all."""
        for mark in marks:
            self.note(*mark)

    async def flush(self) -> None:
        """Tell the store all that is left. Raises ``Unavailable``: then it is all kept, to be told another time."""
        marks = [mark for partner_id in tuple(self._counts) for mark in self.take(partner_id)]
        uses, self._uses = self._uses, {}
        if not marks and not uses:
            return
        try:
            await self._store.note_usage(
                marks,
                [LastUse(kind, credential_id, at, address) for (kind, credential_id), (at, address) in uses.items()],
            )
        except Unavailable:
            self.keep(marks)
            self._uses = {**uses, **self._uses}  # what was noted in the meantime is newer
            raise
