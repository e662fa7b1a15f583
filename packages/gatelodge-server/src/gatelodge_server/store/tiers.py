"""Tiers, and which one a partner is in."""

from collections.abc import Sequence

from sqlalchemy import Connection, select, update

from gatelodge_server.core.model import Instant, PartnerStatus, Tier
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import PartnerDeactivated, PartnerNotFound, TierNotFound
from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.tables import partner, tier
from gatelodge_server.store.trail import append_audit, append_change

_TIERS = select(tier.c.name, tier.c.requests_per_hour, tier.c.requests_per_day)


def list_tiers(connection: Connection) -> Sequence[Tier]:
    """All tiers, the smallest first."""
    query = _TIERS.order_by(tier.c.requests_per_hour, tier.c.requests_per_day, tier.c.name)
    return [Tier(*row) for row in connection.execute(query)]


def set_tier(connection: Connection, new: Tier, now: Instant, by: str) -> Done:
    """Add a tier, or change what it allows."""
    limits = {"requests_per_hour": new.requests_per_hour, "requests_per_day": new.requests_per_day}
    if connection.execute(select(tier.c.name).where(tier.c.name == new.name)).one_or_none() is None:
        insert_unless_there(connection, tier, {"name": new.name, **limits})
    connection.execute(update(tier).where(tier.c.name == new.name).values(limits))
    detail = f"{new.requests_per_hour} an hour, {new.requests_per_day} a day"
    append_audit(connection, "tier.set", now=now, by=by, subject=new.name, detail=detail)
    return Done(append_change(connection, "tier", new.name, now))


def set_partner_tier(connection: Connection, partner_id: str, name: str, now: Instant, by: str) -> Done | Refused:
    """Put a partner into a tier. It counts from the next ask for quota and the next look at a credential on."""
    row = connection.execute(select(partner.c.status).where(partner.c.id == partner_id).with_for_update()).one_or_none()
    if row is None:
        return Refused(PartnerNotFound)
    if row.status == PartnerStatus.DEACTIVATED:
        return Refused(PartnerDeactivated)
    if connection.execute(select(tier.c.name).where(tier.c.name == name)).one_or_none() is None:
        return Refused(TierNotFound)
    connection.execute(update(partner).where(partner.c.id == partner_id).values(tier=name))
    append_audit(connection, "partner.tier", now=now, by=by, subject=partner_id, partner_id=partner_id, detail=name)
    return Done(append_change(connection, "partner", partner_id, now))
