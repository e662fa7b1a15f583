"""The outbox: mails wait here from the transaction that caused them until some node's mailer has sent them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, and_, case, delete, func, insert, or_, select, update

from gatelodge_server.core.mails import CODES, IS_LAST, NOTICE_TTL, NOTICES_AN_HOUR
from gatelodge_server.core.model import HOUR, Duration, Instant, MailKind
from gatelodge_server.core.ports import Deferred, GivenUp, Mail, MailOutcome
from gatelodge_server.store.clock import STORE_TIME, time_of
from gatelodge_server.store.races import unheld
from gatelodge_server.store.tables import AnyRow, outbox, partner

_FAULT_LENGTH = 200
_CODES_FIRST = case((outbox.c.kind.in_(sorted(kind.value for kind in CODES)), 0), else_=1)
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


def queue_mail(connection: Connection, mail: Mail, *, address: str | None = None) -> None:
    """Queue a mail, due at once. ``address``: the canonical one that it counts against (``begin_registration``)."""
    connection.execute(
        insert(outbox),
        {
            "id": mail.id,
            "kind": mail.kind.value,
            "recipient": mail.recipient,
            "address": address,
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

    Of one kind a partner is told ``NOTICES_AN_HOUR`` times in an hour, the last time with the fact ``IS_LAST``; what happens
    more often is in the audit trail only. Whose hour it is says the store's clock, and so it does when `endsAt` is.
    """
    holder = select(partner.c.name, partner.c.contact_email, STORE_TIME).where(partner.c.id == partner_id)
    row = connection.execute(holder).one()
    queued_at = time_of(connection, now, read=row.store_time)
    told = _count_recent(connection, kind, partner_id, row.contact_email, queued_at)
    if told >= NOTICES_AN_HOUR:
        return
    is_last = {IS_LAST: "yes"} if told == NOTICES_AN_HOUR - 1 else {}
    if "endsAt" in facts:
        facts = {**facts, "endsAt": str(int(facts["endsAt"]) - now + queued_at)}
    subject = f"{kind.value}\0{partner_id}\0{sequence}\0{now}".encode()
    queue_mail(
        connection,
        Mail(
            id=hashlib.sha256(subject).digest()[:16],
            kind=kind,
            recipient=row.contact_email,
            facts={"partnerId": partner_id, "displayName": row.name, **facts, **is_last},
            sealed=None,
            created_at=queued_at,
            expires_at=queued_at + NOTICE_TTL,
        ),
    )


def _count_recent(connection: Connection, kind: MailKind, partner_id: str, recipient: str, now: Instant) -> int:
    """How often a partner was told of such a thing in the last hour. Another one with the same address counts by itself."""
    recent = and_(outbox.c.recipient == recipient, outbox.c.created_at > now - HOUR, outbox.c.kind == kind.value)
    facts = connection.execute(select(outbox.c.facts).where(recent)).scalars()
    return sum(json.loads(said)["partnerId"] == partner_id for said in facts)


def claim_mails(connection: Connection, limit: int, now: Instant, until: Instant) -> Sequence[Mail]:
    """Take the mails that have been due for longest; until ``until`` nobody else gets them. A claim counts as an attempt.

    Codes go first: they die within minutes, and no number of notices may keep them waiting for that long.
    """
    claimed_at = time_of(connection, now)
    ahead = claimed_at - now
    due = _MAIL.where(outbox.c.ended_at.is_(None), outbox.c.due_at <= claimed_at)
    # Nodes that claim at once pass over what the other is about to take.
    due = due.order_by(_CODES_FIRST, outbox.c.due_at, outbox.c.created_at, outbox.c.id)
    due = due.limit(limit).with_for_update(skip_locked=True)
    mails = [_mail_of(row, ahead) for row in connection.execute(due)]
    if mails:
        claimed = update(outbox).where(outbox.c.id.in_([mail.id for mail in mails]))
        connection.execute(claimed.values(due_at=until + ahead, attempts=outbox.c.attempts + 1))
    return mails


def _mail_of(row: AnyRow, ahead: Duration) -> Mail:
    id_, kind, recipient, facts, sealed, created_at, expires_at, attempts = row
    return Mail(id_, MailKind(kind), recipient, json.loads(facts), sealed, created_at, expires_at, attempts + 1, ahead)


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


class Backlog(NamedTuple):
    """What waits in the outbox: how many mails, since when the oldest, and what was last said against one of them."""

    waiting: int
    oldest_at: Instant | None
    fault: str | None


def find_backlog(connection: Connection) -> Backlog:
    """What waits in the outbox at this moment."""
    is_waiting = outbox.c.ended_at.is_(None)
    waiting, oldest_at = connection.execute(select(func.count(), func.min(outbox.c.created_at)).where(is_waiting)).one()
    faults = select(outbox.c.fault).where(is_waiting, outbox.c.fault.is_not(None))
    return Backlog(waiting, oldest_at, connection.execute(faults.order_by(outbox.c.due_at.desc()).limit(1)).scalar())


def purge_mails(connection: Connection, ended_before: Instant, now: Instant) -> None:
    """Delete mails that have been over since ``ended_before``; blank the secrets of those that nobody needs any more."""
    is_stale = and_(outbox.c.ended_at.is_(None), outbox.c.expires_at <= ended_before)
    connection.execute(delete(outbox).where(unheld(outbox, or_(outbox.c.ended_at <= ended_before, is_stale))))
    is_spent = and_(outbox.c.expires_at <= now, outbox.c.sealed.is_not(None))
    connection.execute(update(outbox).where(unheld(outbox, is_spent)).values(sealed=None))
