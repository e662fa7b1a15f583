"""The change sequence and the audit trail: appended to by every verb that changes what others may rely on."""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select, update

from gatelodge_server.core.model import DAY, AuditEvent, Change, Instant
from gatelodge_server.store.races import Turn, unheld, wait_for_turn
from gatelodge_server.store.relocation import refuse_gone
from gatelodge_server.store.tables import audit, change, replay, verification

LAST_CHANGE: Final = "gatelodge.last_change"
"""Under this name a transaction leaves the last step that it has appended, for the driver to ring the bell with."""


def append_change(connection: Connection, kind: str, subject: str, now: Instant) -> int:
    """Append a step to the change sequence; its number."""
    wait_for_turn(connection, Turn.APPENDING)
    step = connection.execute(insert(change).values(kind=kind, subject=subject, at=now).returning(change.c.sequence))
    sequence = int(step.scalar_one())
    connection.info[LAST_CHANGE] = sequence
    return sequence


def append_audit(
    connection: Connection,
    action: str,
    *,
    now: Instant,
    by: str,
    subject: str,
    partner_id: str | None = None,
    detail: str = "",
) -> None:
    """Append an event to the audit trail."""
    event = {"at": now, "action": action, "actor": by, "partner_id": partner_id, "subject": subject, "detail": detail}
    connection.execute(insert(audit), event)


def list_audit(connection: Connection, partner_id: str | None, since: Instant | None) -> Sequence[AuditEvent]:
    """The audit trail, oldest first."""
    query = select(
        audit.c.sequence, audit.c.at, audit.c.action, audit.c.actor, audit.c.partner_id, audit.c.subject, audit.c.detail
    ).order_by(audit.c.sequence)
    if partner_id is not None:
        query = query.where(audit.c.partner_id == partner_id)
    if since is not None:
        query = query.where(audit.c.at >= since)
    return [AuditEvent(*row) for row in connection.execute(query)]


def list_changes(connection: Connection, after: int, limit: int) -> Sequence[Change]:
    """The change sequence after a step. Raises ``Unavailable`` if the deployment has moved away: here it has ended."""
    refuse_gone(connection)
    query = select(change.c.sequence, change.c.kind, change.c.subject, change.c.at)
    query = query.where(change.c.sequence > after).order_by(change.c.sequence).limit(limit)
    return [Change(*row) for row in connection.execute(query)]


def last_change(connection: Connection) -> int:
    """The last step of the change sequence. Raises ``Unavailable`` as ``list_changes`` does."""
    refuse_gone(connection)
    return int(connection.execute(select(func.coalesce(func.max(change.c.sequence), 0))).scalar_one())


def forget_replays(connection: Connection, now: Instant) -> None:
    """Blank the sealed keys whose time is over; drop records that are older than a day."""
    is_readable = verification.c.sealed.is_not(None)
    over = unheld(verification, verification.c.expires_at <= now, is_readable)
    connection.execute(update(verification).where(over).values(sealed=None))
    over = unheld(replay, replay.c.readable_until <= now, replay.c.sealed.is_not(None))
    connection.execute(update(replay).where(over).values(sealed=None))
    connection.execute(delete(replay).where(unheld(replay, replay.c.readable_until <= now - DAY)))


def ping(connection: Connection) -> None:
    """Read something."""
    connection.execute(select(change.c.sequence).limit(1))
