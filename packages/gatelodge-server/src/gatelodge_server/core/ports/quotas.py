"""What partners may still do, and what they did."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, Protocol

from gatelodge_server.core.model import Instant, Tier


class UsageMark(NamedTuple):
    """What a node saw since it last said so: of a partner in an hour."""

    partner_id: str
    hour_starts_at: Instant
    accepted: int
    refused: int


class QuotaAsk(NamedTuple):
    """A node wants to let so many more requests of a partner in, and gives back what it did not use of an earlier lease."""

    partner_id: str
    want: int
    now: Instant
    """By the node's own clock. A store that has a clock of its own goes by that."""
    unused: int = 0
    unused_hour_at: Instant = 0
    """In which hour and day the unused ones were leased."""
    unused_day_at: Instant = 0
    usage: Sequence[UsageMark] = ()
    """Of the same partner: to be added to the usage in the same transaction."""


class Lease(NamedTuple):
    """How a partner's windows stand after an ask: so many requests may be let in in these two windows."""

    granted: int
    tier: Tier
    hour_starts_at: Instant
    hour_taken: int
    """Of all nodes, this lease included."""
    day_starts_at: Instant
    day_taken: int
    now: Instant
    """When this was decided, by the store's clock: after the ask was sent, and before its answer came."""


class Unheard:
    """The commit was not answered: what was asked for may have been done or not, all of it or nothing."""


UNHEARD: Final = Unheard()


class LastUse(NamedTuple):
    """When and from where a credential was last used. ``kind``: ``key`` or ``token``."""

    kind: Literal["key", "token"]
    credential_id: str
    at: Instant
    address: str


class QuotaStore(Protocol):
    """What partners may still do, and what they did."""

    async def lease_quota(self, ask: QuotaAsk) -> Lease | Unheard | None:
        """Take up to ``want`` requests out of the partner's present hour and day (by UTC); ``None`` if there is no partner.

        Which window is the present one says the store's clock, read when the partner's row is locked; a database without a
        clock of its own goes by ``ask.now``. Over all nodes, no more is granted in a window than the tier allows. A clock that
        steps back is counted in the window that the store is in already, if that is the next one at most
        (``quotas.judge_ask``). Micro-batched.

        ``ask.usage`` is added in the same transaction, unless there is no partner. When this raises ``Unavailable`` nothing was
        added; ``UNHEARD`` is to be taken as added, as ``note_usage`` does.
        """
        ...

    async def note_usage(self, usage: Sequence[UsageMark], last_uses: Sequence[LastUse]) -> None:
        """Add to the usage that is kept for charts, and move marks of last use on (never back).

        May be tried again when it raises ``Unavailable``: nothing was added then. What may have been added or not, because
        the end of its transaction was not heard of, is taken as added, so that it is never counted twice.
        """
        ...

    async def list_usage(self, partner_id: str, *, since: Instant) -> Sequence[UsageMark]:
        """A partner's usage by the hour, oldest first."""
        ...

    async def forget_usage(self, *, before: Instant) -> None:
        """Drop the usage of hours that began before this moment."""
        ...
