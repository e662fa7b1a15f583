"""Partners: added by a partner manager, suspended, resumed, deactivated.

What happens when one is suspended (``gatelodge partner suspend ID``):

1. ``cli.py`` calls ``Partners.suspend``.
2. ``store/partners.py`` sets the status and moves the partner's session epoch on, in one transaction: every session that
   started in an earlier epoch, its companies' included, is dead from then on and stays so after ``resume``.
3. Every later look at a key or session of the partner sees the status and the epoch; nothing is cached that could lag.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gatelodge_server.core.credentials import Credentials, IssuedKey
from gatelodge_server.core.model import Clock, Origin, Partner, PartnerStatus
from gatelodge_server.core.ports import PartnerStore, Refused
from gatelodge_server.core.refusals import PartnerIdTaken, PartnerNotFound

DEFAULT_TIER: Final = "starter"
_FALLBACK_SLUG: Final = "partner"


@dataclass(frozen=True, slots=True)
class NewPartner:
    """What a partner manager says of a partner to be added. ``id`` is made from the name unless it is given."""

    name: str
    contact_email: str
    tier: str = DEFAULT_TIER
    id: str | None = None


class Partners:
    """The partners of one environment."""

    def __init__(self, *, store: PartnerStore, credentials: Credentials, clock: Clock, slugify: Callable[[str], str]) -> None:
        self._store = store
        self._credentials = credentials
        self._clock = clock
        self._slugify = slugify

    async def add(self, new: NewPartner, *, by: str) -> tuple[Partner, IssuedKey]:
        """Add a managed partner with its first key. Raises ``PartnerIdTaken`` (for a given id) or ``TierNotFound``."""
        now = self._clock()
        for candidate in self._candidates(new):
            partner = Partner(
                id=candidate,
                name=new.name,
                contact_email=new.contact_email,
                tier=new.tier,
                status=PartnerStatus.ACTIVE,
                origin=Origin.MANAGED,
                created_at=now,
            )
            issued = self._credentials.issue(candidate, None, now)
            match await self._store.add_partner(partner, issued.credential, by=by):
                case Refused(reason) if reason is PartnerIdTaken and new.id is None:
                    continue
                case Refused(reason):
                    raise reason
                case _:
                    return partner, issued
        raise PartnerIdTaken

    async def get(self, partner_id: str) -> Partner:
        """The partner. Raises ``PartnerNotFound``."""
        partner = await self._store.find_partner(partner_id)
        if partner is None:
            raise PartnerNotFound
        return partner

    async def list_all(self) -> Sequence[Partner]:
        """Every partner, by id."""
        return await self._store.list_partners()

    async def suspend(self, partner_id: str, *, by: str) -> int:
        """Refuse the partner and its companies, and end their sessions for good. The change's sequence number."""
        return await self._set_status(partner_id, PartnerStatus.SUSPENDED, by=by)

    async def resume(self, partner_id: str, *, by: str) -> int:
        """Let the partner in again. Its keys work as before; sessions start anew."""
        return await self._set_status(partner_id, PartnerStatus.ACTIVE, by=by)

    async def deactivate(self, partner_id: str, *, by: str) -> int:
        """End the partner, its companies, keys and sessions for good."""
        return await self._set_status(partner_id, PartnerStatus.DEACTIVATED, by=by)

    async def set_tier(self, partner_id: str, tier: str, *, by: str) -> int:
        """Put the partner into a tier, at once. Raises ``PartnerNotFound``, ``PartnerDeactivated`` or ``TierNotFound``."""
        match await self._store.set_partner_tier(partner_id, tier, now=self._clock(), by=by):
            case Refused(reason):
                raise reason
            case done:
                return done.sequence

    async def _set_status(self, partner_id: str, status: PartnerStatus, *, by: str) -> int:
        match await self._store.set_partner_status(partner_id, status, now=self._clock(), by=by):
            case Refused(reason):
                raise reason
            case done:
                return done.sequence

    def _candidates(self, new: NewPartner) -> Sequence[str]:
        if new.id is not None:
            return [new.id]
        slug = self._slugify(new.name) or _FALLBACK_SLUG
        return [slug, *(f"{slug}-{n}" for n in range(2, 1000))]
