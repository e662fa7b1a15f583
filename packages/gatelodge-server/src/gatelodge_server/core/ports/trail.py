"""What was done, and what others have to hear of."""

from collections.abc import Sequence
from typing import Protocol

from gatelodge_server.core.model import AuditEvent, Change, Instant


class TrailStore(Protocol):
    """What was done, and what others have to hear of."""

    async def list_audit(self, *, partner_id: str | None, since: Instant | None) -> Sequence[AuditEvent]:
        """The audit trail, oldest first."""
        ...

    async def list_changes(self, *, after: int, limit: int) -> Sequence[Change]:
        """The change sequence after step ``after``."""
        ...

    async def forget_replays(self, *, now: Instant) -> None:
        """Blank what may no longer be asked for again, and drop what is older than a day."""
        ...

    async def ping(self) -> None:
        """Return if the store answers; else raise ``Unavailable``."""
        ...
