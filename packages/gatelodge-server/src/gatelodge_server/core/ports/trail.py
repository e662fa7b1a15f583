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

    async def last_change(self) -> int:
        """The last step of the change sequence; 0 if there is none."""
        ...

    async def forget_replays(self, *, now: Instant) -> None:
        """Blank what may no longer be asked for again, and drop what is older than a day."""
        ...

    async def tell_time(self) -> Instant | None:
        """What time it is by the clock that all nodes share; ``None`` where there is none but the caller's."""
        ...

    async def ping(self) -> None:
        """Return if the store answers; else raise ``Unavailable``."""
        ...


class Bell(Protocol):
    """Something to look at before what was read is believed: it costs next to nothing."""

    def bell(self) -> int:
        """A number that has become another once a change has been committed, before anybody is told of the change.

        Raises ``Unavailable``.
        """
        ...

    async def listen(self) -> None:
        """Let the bell hear of what others commit as soon as can be, until cancelled."""
        ...
