"""The outbox: mails wait here from the transaction that caused them until some node's mailer has sent them."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, and_, delete, insert, or_, select, update

from gatelodge_server.core.mails import NOTICE_TTL
from gatelodge_server.core.model import Instant, MailKind
from gatelodge_server.core.ports import Deferred, GivenUp, Mail, MailOutcome
from gatelodge_server.store.tables import AnyRow, outbox, partner

_FAULT_LENGTH = 200
_MAIL = select(
    outbox.c.id,
    outbox.c.kind,
    outbox.c.recipient,
    outbox.c.facts,
    outbox.c.sealed,
    outbox.c.created_at,
    outbox.c.expires_at,
    outbox.c.attempts,
)


def queue_mail(connection: Connection, mail: Mail) -> None:
    """Queue a mail, due at once."""
    connection.execute(
        insert(outbox),
        {
            "id": mail.id,
            "kind": mail.kind.value,
            "recipient": mail.recipient,
            "facts": json.dumps(dict(mail.facts)),
            "sealed": mail.sealed,
            "created_at": mail.created_at,
            "due_at": mail.created_at,
            "expires_at": mail.expires_at,
            "attempts": 0,
        },
    )


def queue_notice(
    connection: Connection, kind: MailKind, partner_id: str, facts: Mapping[str, str], *, now: Instant, sequence: int
) -> None:
    """Queue a notice to the address that the partner has on record: of step ``sequence`` of the change sequence.

    To ``facts`` come `partnerId` and `displayName`. A verb has no randomness, so the id is made from what the notice is of; the
    moment is part of it because a database that was restored from a backup counts the same steps again.
    """
    row = connection.execute(select(partner.c.name, partner.c.contact_email).where(partner.c.id == partner_id)).one()
    subject = f"{kind.value}\0{partner_id}\0{sequence}\0{now}".encode()
    queue_mail(
        connection,
        Mail(
            id=hashlib.sha256(subject).digest()[:16],
            kind=kind,
            recipient=row.contact_email,
            facts={"partnerId": partner_id, "displayName": row.name, **facts},
            sealed=None,
            created_at=now,
            expires_at=now + NOTICE_TTL,
        ),
    )


def claim_mails(connection: Connection, limit: int, now: Instant, until: Instant) -> Sequence[Mail]:
    """Take the mails that have been due for longest; until ``until`` nobody else gets them. A claim counts as an attempt."""
    due = _MAIL.where(outbox.c.ended_at.is_(None), outbox.c.due_at <= now)
    # Nodes that claim at once pass over what the other is about to take.
    due = due.order_by(outbox.c.due_at, outbox.c.created_at, outbox.c.id).limit(limit).with_for_update(skip_locked=True)
    mails = [_mail_of(row) for row in connection.execute(due)]
    if mails:
        claimed = update(outbox).where(outbox.c.id.in_([mail.id for mail in mails]))
        connection.execute(claimed.values(due_at=until, attempts=outbox.c.attempts + 1))
    return mails


def _mail_of(row: AnyRow) -> Mail:
    id_, kind, recipient, facts, sealed, created_at, expires_at, attempts = row
    return Mail(id_, MailKind(kind), recipient, json.loads(facts), sealed, created_at, expires_at, attempts + 1)


def settle_mail(connection: Connection, mail_id: bytes, outcome: MailOutcome, now: Instant) -> None:
    """Say what became of a mail. One that has ended stays as it ended: a claim may have lapsed meanwhile."""
    match outcome:
        case Deferred(due_at, fault):
            values = {"due_at": due_at, "fault": fault[:_FAULT_LENGTH]}
        case GivenUp(fault):
            values = {"ended_at": now, "outcome": "given_up", "fault": fault[:_FAULT_LENGTH], "sealed": None}
        case _:
            values = {"ended_at": now, "outcome": "sent", "fault": None, "sealed": None}
    connection.execute(update(outbox).where(outbox.c.id == mail_id, outbox.c.ended_at.is_(None)).values(values))


def purge_mails(connection: Connection, ended_before: Instant, now: Instant) -> None:
    """Delete mails that have been over since ``ended_before``; blank the secrets of those that nobody needs any more."""
    is_stale = and_(outbox.c.ended_at.is_(None), outbox.c.expires_at <= ended_before)
    connection.execute(delete(outbox).where(or_(outbox.c.ended_at <= ended_before, is_stale)))
    connection.execute(update(outbox).where(outbox.c.expires_at <= now, outbox.c.sealed.is_not(None)).values(sealed=None))
