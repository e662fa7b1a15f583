"""API keys and their standing.

Locks are taken in one order by every verb of the store, so that no two transactions wait for each other in a circle:
verification, replay, partner, company, credential. To add a row is also to lock those that it refers to (on PostgreSQL as
`FOR KEY SHARE`), so a key is added after its partner was locked and before another key is. A verb that is told of a key only
finds the partner by it first, and reads the key again once it has both. Whoever locks many rows that can be dealt with another
time, as housekeeping does, waits for none of them (``races.unheld``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Update, bindparam, func, insert, or_, select, update

from gatelodge.errors import InvalidCredential
from gatelodge_server.core.credentials import judge_key, judge_standing
from gatelodge_server.core.model import HOUR, Credential, EndCause, Holder, Instant, MailKind, PartnerStatus, Standing, Tier
from gatelodge_server.core.ports import Done, Refused, Replay, Rolled, RolledBefore, RolledTooOften
from gatelodge_server.core.refusals import IdempotencyKeySpent, KeyEnded, KeyNotFound, NotAllowed, PartnerDeactivated
from gatelodge_server.core.registration import KEYS_AN_HOUR
from gatelodge_server.store.clock import STORE_TIME
from gatelodge_server.store.outbox import queue_notice
from gatelodge_server.store.replays import find_replay, keep_replay
from gatelodge_server.store.tables import AnyRow, company, credential, partner, replay, tier, verification
from gatelodge_server.store.trail import append_audit, append_change

STANDING_COLUMNS = (
    credential.c.id.label("credential_id"),
    credential.c.partner_id,
    credential.c.company_id,
    credential.c.digest,
    credential.c.ends_at,
    credential.c.end_cause,
    credential.c.first_used_at,
    credential.c.rotated_at,
    partner.c.status,
    partner.c.session_epoch,
    partner.c.tier,
    company.c.deleted_at,
)
WITH_HOLDER = credential.join(partner, partner.c.id == credential.c.partner_id).outerjoin(
    company, company.c.id == credential.c.company_id
)
_STANDINGS = select(*STANDING_COLUMNS).select_from(WITH_HOLDER).where(credential.c.id.in_(bindparam("ids", expanding=True)))
_IS_NOT_REVOKED = or_(credential.c.end_cause.is_(None), credential.c.end_cause != EndCause.REVOKED.value)
_PRESENTED = _STANDINGS.add_columns(STORE_TIME).where(credential.c.digest.in_(bindparam("digests", expanding=True)))
CREDENTIALS = select(
    credential.c.id,
    credential.c.kind,
    credential.c.partner_id,
    credential.c.company_id,
    credential.c.digest,
    credential.c.masked,
    credential.c.created_at,
    credential.c.ends_at,
    credential.c.end_cause,
    credential.c.last_used_at,
)
_LISTED = CREDENTIALS.add_columns(partner.c.status, company.c.deleted_at).select_from(WITH_HOLDER)


def standing_of(columns: Sequence[Any]) -> Standing:
    """A standing, from the values of ``STANDING_COLUMNS``: by position, since a look-up by name for each would be felt."""
    id_, partner_id, company_id, digest, ends_at, end_cause, used_at, rotated_at, status, epoch, tier, deleted_at = columns
    return Standing(
        holder=Holder(partner_id, UUID(bytes=company_id) if company_id else None, tier, id_),
        digest=digest,
        ends_at=ends_at,
        end_cause=EndCause(end_cause) if end_cause else None,
        partner_status=PartnerStatus(status),
        session_epoch=epoch,
        company_gone=deleted_at is not None,
        rotated_at=rotated_at,
        first_used_at=used_at,
    )


def credential_of(row: Sequence[Any]) -> Credential:
    """A credential, from a row of ``CREDENTIALS``."""
    id_, kind, partner_id, company_id, digest, masked, created_at, ends_at, end_cause, last_used_at = row
    return Credential(
        id=id_,
        kind=kind,
        partner_id=partner_id,
        company_id=UUID(bytes=company_id) if company_id else None,
        digest=digest,
        masked=masked,
        created_at=created_at,
        ends_at=ends_at,
        end_cause=EndCause(end_cause) if end_cause else None,
        last_used_at=last_used_at,
    )


def read_presented(connection: Connection, presented: Iterable[tuple[str, bytes]]) -> dict[str, AnyRow]:
    """The rows of those keys that were presented with their digest, by id: ``STANDING_COLUMNS`` and ``STORE_TIME``.

    A wrong secret for a known id finds nothing, as an unknown id does, and so takes no longer. That the database compares the
    digests in its own time tells nothing: nobody can make a secret whose digest begins as another's does.
    """
    ids, digests = zip(*set(presented), strict=True)
    asked = {"ids": list(set(ids)), "digests": list(digests)}
    return {row.credential_id: row for row in connection.execute(_PRESENTED, asked)}


def find_keys(connection: Connection, key_ids: Sequence[str]) -> list[Standing | None]:
    """The standing of each key, in the order asked."""
    rows = {row.credential_id: row for row in connection.execute(_STANDINGS, {"ids": list(set(key_ids))})}
    return [standing_of(rows[key_id]) if key_id in rows else None for key_id in key_ids]


def insert_key(connection: Connection, key: Credential) -> None:
    """Store a new key."""
    connection.execute(
        insert(credential),
        {
            "id": key.id,
            "kind": key.kind,
            "partner_id": key.partner_id,
            "company_id": key.company_id.bytes if key.company_id else None,
            "digest": key.digest,
            "masked": key.masked,
            "created_at": key.created_at,
        },
    )


def note_first_use(connection: Connection, key_ids: Sequence[str], now: Instant) -> None:
    """These keys are in use: whoever asked for them has them, so no answer that holds one needs to be repeated any more.

    What has been noted before stays.
    """
    forget_answers(connection, key_ids)
    is_unused = credential.c.first_used_at.is_(None)
    used = update(credential).where(credential.c.id == bindparam("key_id"), is_unused).values(first_used_at=now)
    _execute_in_order(connection, used, key_ids)


def forget_answers(connection: Connection, key_ids: Sequence[str]) -> None:
    """No answer that holds one of these keys can be asked for any more."""
    for answers in (verification, replay):
        is_readable = answers.c.sealed.is_not(None)
        forgotten = update(answers).where(answers.c.credential_id == bindparam("key_id"), is_readable).values(sealed=None)
        _execute_in_order(connection, forgotten, key_ids)


def _execute_in_order(connection: Connection, statement: Update, key_ids: Sequence[str]) -> None:
    """Key by key: one statement for all of them would lock rows in whatever order it finds them, and each node in another."""
    if key_ids:
        connection.execute(statement, [{"key_id": key_id} for key_id in sorted(key_ids)])


def get_key(connection: Connection, key_id: str) -> Credential | None:
    """A key as it is stored."""
    row = connection.execute(CREDENTIALS.where(credential.c.id == key_id)).one_or_none()
    return credential_of(row) if row is not None else None


def list_keys(connection: Connection, partner_id: str) -> Sequence[Credential]:
    """A partner's keys and its companies', newest first."""
    query = _LISTED.where(credential.c.partner_id == partner_id)
    query = query.order_by(credential.c.created_at.desc(), credential.c.id)
    return [_listed_of(row) for row in connection.execute(query)]


def _listed_of(row: AnyRow) -> Credential:
    *own, status, deleted_at = row
    return replace(credential_of(own), partner_status=PartnerStatus(status), company_gone=deleted_at is not None)


def _lock_key(connection: Connection, key_id: str) -> Credential | None:
    # Against changes only: sessions and answers may refer to it meanwhile.
    row = connection.execute(CREDENTIALS.where(credential.c.id == key_id).with_for_update(key_share=True)).one_or_none()
    return credential_of(row) if row is not None else None


def lock_presented(connection: Connection, key_id: str, digest: bytes, now: Instant) -> tuple[Credential, Standing] | None:
    """The key that is presented with its digest, and its standing: its partner and it are locked. ``None``: there is none.

    Its presenter has it: no answer that held it can be asked for any more.
    """
    found = find_keys(connection, [key_id])[0]
    if judge_key(found, digest, now) is InvalidCredential or found is None:
        return None
    forget_answers(connection, [key_id])
    lock_partner(connection, found.holder.partner_id)
    note_first_use(connection, [key_id], now)
    old, standing = _lock_key(connection, key_id), find_keys(connection, [key_id])[0]
    return (old, standing) if old is not None and standing is not None else None


def lock_partner(connection: Connection, partner_id: str) -> None:
    """Keep a partner as it is, and its keys as many as they are, until this transaction is over."""
    connection.execute(select(partner.c.id).where(partner.c.id == partner_id).with_for_update())


def roll_key(
    connection: Connection, key_id: str, replacement: Credential, ends_at: Instant, now: Instant, by: str
) -> Done | Refused:
    """Put a new key in the place of a live one."""
    found = get_key(connection, key_id)
    if found is None:
        return Refused(KeyNotFound)
    lock_partner(connection, found.partner_id)
    if found.company_id is not None:
        own = select(company.c.id).where(company.c.id == found.company_id.bytes)
        connection.execute(own.with_for_update(read=True, key_share=True))
    old = _lock_key(connection, key_id) or found
    if old.end_cause in {EndCause.ROTATED, EndCause.REVOKED} or (old.ends_at is not None and now >= old.ends_at):
        return Refused(KeyEnded)
    standing = find_keys(connection, [key_id])[0]
    if standing is None or standing.partner_status is PartnerStatus.DEACTIVATED:
        return Refused(PartnerDeactivated)
    insert_key(connection, replacement)
    done = end_keys(connection, [old], ends_at=ends_at, cause=EndCause.ROTATED, now=now, by=by, detail=replacement.masked)
    if old.company_id is None:
        tell_of_rotation(connection, old, replacement, ends_at=ends_at, now=now, sequence=done.sequence)
    return done


def roll_own_key(
    connection: Connection,
    key_id: str,
    digest: bytes,
    replacement: Credential,
    ends_at: Instant,
    asked: Replay | None,
    now: Instant,
) -> Rolled | RolledBefore | RolledTooOften | Refused:
    """Put a new key in the place of the one that is presented, or say what was put there when the same was asked before."""
    locked = lock_presented(connection, key_id, digest, now)
    if locked is None:
        return Refused(InvalidCredential)  # nothing below is told to anybody who does not hold the key
    old, standing = locked
    known = _find_own_replay(connection, asked, standing.holder, now)
    if known is not None:
        return known
    reason = judge_standing(standing, now)
    if reason is not None:
        return Refused(reason)
    if old.company_id is not None:
        return Refused(NotAllowed)
    if old.end_cause is EndCause.ROTATED:
        return Refused(KeyEnded)  # it lives on in an overlap, and has its one successor
    again_at = _next_key_at(connection, old.partner_id, now)
    if again_at is not None:
        return RolledTooOften(again_at)
    fresh, by = replace(replacement, partner_id=old.partner_id), f"partner:{old.partner_id}"
    insert_key(connection, fresh)
    keep_replay(connection, asked, fresh, now)
    done = end_keys(connection, [old], ends_at=ends_at, cause=EndCause.ROTATED, now=now, by=by, detail=fresh.masked)
    tell_of_rotation(connection, old, fresh, ends_at=ends_at, now=now, sequence=done.sequence)
    return Rolled(old.partner_id, _tier_called(connection, standing.holder.tier), done.sequence)


def _tier_called(connection: Connection, name: str) -> Tier:
    query = select(tier.c.name, tier.c.requests_per_hour, tier.c.requests_per_day).where(tier.c.name == name)
    return Tier(*connection.execute(query).one())


def _next_key_at(connection: Connection, partner_id: str, now: Instant) -> Instant | None:
    """When a partner that has had ``KEYS_AN_HOUR`` keys in the last hour may have another. ``None``: now."""
    own = select(credential.c.created_at).where(credential.c.partner_id == partner_id, credential.c.company_id.is_(None))
    newest = own.where(credential.c.created_at > now - HOUR).order_by(credential.c.created_at.desc()).limit(KEYS_AN_HOUR)
    made = connection.execute(newest).scalars().all()
    return made[-1] + HOUR if len(made) == KEYS_AN_HOUR else None


def _find_own_replay(
    connection: Connection, asked: Replay | None, holder: Holder, now: Instant
) -> RolledBefore | Refused | None:
    known = find_replay(connection, asked, now)
    if known is None or isinstance(known, Refused):
        return known
    made = find_keys(connection, [known.credential_id])[0]
    if made is None or judge_standing(made, now) is not None:
        return Refused(IdempotencyKeySpent)  # a key that lets nobody in is not worth telling
    return RolledBefore(holder.partner_id, _tier_called(connection, holder.tier), known.sealed)


def tell_of_rotation(
    connection: Connection, old: Credential, replacement: Credential, *, ends_at: Instant, now: Instant, sequence: int
) -> None:
    """Tell the owner of a partner's key, in the transaction that replaces it."""
    facts = {"oldKey": old.masked, "newKey": replacement.masked, "endsAt": str(ends_at)}
    queue_notice(connection, MailKind.KEY_ROTATED, old.partner_id, facts, now=now, sequence=sequence)


def revoke_key(connection: Connection, key_id: str, now: Instant, by: str) -> Done | Refused:
    """End a key now, whatever was planned for it."""
    old = _lock_key(connection, key_id)
    if old is None:
        return Refused(KeyNotFound)
    return end_keys(connection, [old], ends_at=now, cause=EndCause.REVOKED, now=now, by=by)


def end_keys(
    connection: Connection,
    keys: Sequence[Credential],
    *,
    ends_at: Instant,
    cause: EndCause,
    now: Instant,
    by: str,
    detail: str = "",
) -> Done:
    """Let keys end, at the latest at ``ends_at``; what has ended before ends no later. A step of the sequence for each.

    A revocation is written even where a key has ended already: an overlap that was over comes to life again when a clock is
    set back, what was revoked never. Nothing overwrites a revocation, not even one that is committed meanwhile.
    """
    # All are locked before the first step is appended, for whoever has that turn must wait for nobody (``races.Turn``).
    ids = sorted(key.id for key in keys)
    every = select(credential.c.id).where(credential.c.id.in_(ids)).order_by(credential.c.id)
    connection.execute(every.with_for_update(key_share=True))  # sessions that refer to them are not held up
    for key in keys:
        is_later = key.ends_at is None or key.ends_at > ends_at
        values: dict[str, Any] = {"end_cause": cause.value}
        if is_later:
            values["ends_at"] = ends_at
        if cause is EndCause.ROTATED:
            # An overlap that is cut short now is none any more, and must not come back with a clock that is set back.
            values["rotated_at"] = now if ends_at <= now else func.coalesce(credential.c.rotated_at, now)
        if is_later or cause is EndCause.REVOKED:
            connection.execute(update(credential).where(credential.c.id == key.id, _IS_NOT_REVOKED).values(values))
    sequence = 0
    for key in keys:
        sequence = append_change(connection, "credential", key.id, now)
        action = f"key.{cause.value}"
        append_audit(connection, action, now=now, by=by, subject=key.id, partner_id=key.partner_id, detail=detail)
    return Done(sequence)
