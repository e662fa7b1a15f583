"""Partners."""

from collections.abc import Sequence

from sqlalchemy import Connection, select, update

from gatelodge.errors import InvalidCredential
from gatelodge_server.core.credentials import judge_standing
from gatelodge_server.core.model import Credential, Instant, MailKind, Origin, Partner, PartnerStatus
from gatelodge_server.core.ports import Deactivated, Done, Refused
from gatelodge_server.core.refusals import NotAllowed, PartnerDeactivated, PartnerIdTaken, PartnerNotFound, TierNotFound
from gatelodge_server.store.keys import insert_key, lock_presented
from gatelodge_server.store.outbox import queue_notice
from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.tables import AnyRow, partner, tier
from gatelodge_server.store.trail import append_audit, append_change

_PARTNER = select(
    partner.c.id,
    partner.c.name,
    partner.c.contact_email,
    partner.c.tier,
    partner.c.status,
    partner.c.origin,
    partner.c.created_at,
    partner.c.organization_name,
    partner.c.website_url,
    partner.c.intended_use,
    partner.c.agreed_at,
)


def _partner_of(row: AnyRow) -> Partner:
    id_, name, contact_email, tier_name, status, origin, created_at, *said = row
    return Partner(id_, name, contact_email, tier_name, PartnerStatus(status), Origin(origin), created_at, *said)


def add_partner(connection: Connection, new: Partner, key: Credential, by: str) -> Done | Refused:
    """Add a partner with its first key."""
    if connection.execute(select(tier.c.name).where(tier.c.name == new.tier)).one_or_none() is None:
        return Refused(TierNotFound)
    row = {
        "id": new.id,
        "name": new.name,
        "contact_email": new.contact_email,
        "tier": new.tier,
        "status": new.status.value,
        "origin": new.origin.value,
        "created_at": new.created_at,
    }
    if not insert_unless_there(connection, partner, row):
        return Refused(PartnerIdTaken)
    insert_key(connection, key)
    append_audit(connection, "partner.added", now=new.created_at, by=by, subject=new.id, partner_id=new.id, detail=key.masked)
    return Done(append_change(connection, "partner", new.id, new.created_at))


def find_partner(connection: Connection, partner_id: str) -> Partner | None:
    """The partner with this id."""
    row = connection.execute(_PARTNER.where(partner.c.id == partner_id)).one_or_none()
    return _partner_of(row) if row is not None else None


def list_partners(connection: Connection) -> Sequence[Partner]:
    """All partners, by id."""
    return [_partner_of(row) for row in connection.execute(_PARTNER.order_by(partner.c.id))]


def set_partner_status(connection: Connection, partner_id: str, status: PartnerStatus, now: Instant, by: str) -> Done | Refused:
    """Suspend, resume or deactivate; unless the partner becomes active, its present session epoch ends."""
    row = connection.execute(_PARTNER.where(partner.c.id == partner_id).with_for_update()).one_or_none()
    if row is None:
        return Refused(PartnerNotFound)
    if row.status == PartnerStatus.DEACTIVATED and status is not PartnerStatus.DEACTIVATED:
        return Refused(PartnerDeactivated)
    new_epochs = 0 if status is PartnerStatus.ACTIVE else 1
    connection.execute(
        update(partner)
        .where(partner.c.id == partner_id)
        .values(status=status.value, session_epoch=partner.c.session_epoch + new_epochs)
    )
    action = f"partner.{status.value}"
    append_audit(connection, action, now=now, by=by, subject=partner_id, partner_id=partner_id)
    sequence = append_change(connection, "partner", partner_id, now)
    if status is PartnerStatus.DEACTIVATED and row.status != PartnerStatus.DEACTIVATED:
        queue_notice(connection, MailKind.DEACTIVATED, partner_id, {}, now=now, sequence=sequence)
    return Done(sequence)


def deactivate_own(connection: Connection, key_id: str, digest: bytes, now: Instant) -> Deactivated | Refused:
    """End a partner at the wish of who presents its key, which is judged while neither can change."""
    locked = lock_presented(connection, key_id, digest, now)
    if locked is None:
        return Refused(InvalidCredential)
    key, standing = locked
    reason = judge_standing(standing, now)
    if reason is not None:
        return Refused(reason)
    own = find_partner(connection, key.partner_id)
    if own is None or own.origin is not Origin.SELF_SERVICE or key.company_id is not None:
        return Refused(NotAllowed)
    match set_partner_status(connection, own.id, PartnerStatus.DEACTIVATED, now, by=f"partner:{own.id}"):
        case Done(sequence):
            return Deactivated(own.id, sequence)
        case refused:
            return refused
