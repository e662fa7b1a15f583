"""Access tokens and their standing. Locks are taken in one order: partner, token, signing key."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, insert, or_, select, update

from gatelodge_server.core.model import AccessToken, EndCause, Holder, Instant, MailKind, PartnerStatus, Standing
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import PartnerDeactivated, PartnerNotFound, SigningKeyNotFound, TokenEnded, TokenNotFound
from gatelodge_server.store.outbox import queue_notice
from gatelodge_server.store.tables import AnyRow, access_token, partner, signing_key
from gatelodge_server.store.trail import append_audit, append_change

_WITH_PARTNER = access_token.join(partner, partner.c.id == access_token.c.partner_id)
_STANDINGS = (
    select(
        access_token.c.id,
        access_token.c.partner_id,
        access_token.c.digest,
        access_token.c.ends_at,
        access_token.c.end_cause,
        access_token.c.rotated_at,
        partner.c.status,
        partner.c.session_epoch,
        partner.c.tier,
    )
    .select_from(_WITH_PARTNER)
    .where(access_token.c.id.in_(bindparam("ids", expanding=True)))
)
_TOKENS = select(
    access_token.c.id,
    access_token.c.lineage_id,
    access_token.c.version,
    access_token.c.partner_id,
    access_token.c.label,
    access_token.c.kid,
    access_token.c.digest,
    access_token.c.created_at,
    access_token.c.rotated_at,
    access_token.c.ends_at,
    access_token.c.end_cause,
    access_token.c.last_used_at,
    access_token.c.last_used_from,
)
_LISTED = _TOKENS.add_columns(partner.c.status).select_from(_WITH_PARTNER)
_LIVE_BY_KEY = (
    select(access_token.c.kid, func.count().label("tokens"))
    .select_from(_WITH_PARTNER)
    .where(
        or_(access_token.c.ends_at.is_(None), access_token.c.ends_at > bindparam("now")),
        or_(access_token.c.end_cause.is_(None), access_token.c.end_cause != EndCause.REVOKED.value),
        partner.c.status != PartnerStatus.DEACTIVATED.value,
    )
    .group_by(access_token.c.kid)
)


def _standing_of(row: AnyRow) -> Standing:
    id_, partner_id, digest, ends_at, end_cause, rotated_at, status, epoch, tier = row
    return Standing(
        holder=Holder(partner_id, None, tier, id_),
        digest=digest,
        ends_at=ends_at,
        end_cause=EndCause(end_cause) if end_cause else None,
        partner_status=PartnerStatus(status),
        session_epoch=epoch,
        company_gone=False,
        rotated_at=rotated_at,
    )


def _token_of(row: Sequence[Any]) -> AccessToken:
    id_, lineage_id, version, partner_id, label, kid, digest, created_at, *end, last_used_at, last_used_from = row
    rotated_at, ends_at, end_cause = end
    return AccessToken(
        id=id_,
        lineage_id=lineage_id,
        version=version,
        partner_id=partner_id,
        label=label,
        kid=kid,
        digest=digest,
        created_at=created_at,
        rotated_at=rotated_at,
        ends_at=ends_at,
        end_cause=EndCause(end_cause) if end_cause else None,
        last_used_at=last_used_at,
        last_used_from=last_used_from,
    )


def _listed_of(row: AnyRow) -> AccessToken:
    *own, status = row
    return replace(_token_of(own), partner_status=PartnerStatus(status))


def find_tokens(connection: Connection, token_ids: Sequence[str]) -> list[Standing | None]:
    """The standing of each token, in the order asked."""
    found = {row.id: _standing_of(row) for row in connection.execute(_STANDINGS, {"ids": list(set(token_ids))})}
    return [found.get(token_id) for token_id in token_ids]


def _find(connection: Connection, query: Select[tuple[object, ...]]) -> AccessToken | None:
    row = connection.execute(query).one_or_none()
    return _token_of(row) if row is not None else None


def get_token(connection: Connection, token_id: str) -> AccessToken | None:
    """A token as it is stored."""
    return _find(connection, _TOKENS.where(access_token.c.id == token_id))


def list_tokens(connection: Connection, partner_id: str) -> Sequence[AccessToken]:
    """All versions of a partner's tokens, newest first."""
    query = _LISTED.where(access_token.c.partner_id == partner_id)
    query = query.order_by(access_token.c.created_at.desc(), access_token.c.version.desc(), access_token.c.id)
    return [_listed_of(row) for row in connection.execute(query)]


def list_token_versions(connection: Connection, lineage_id: str) -> Sequence[AccessToken]:
    """The versions of one token, newest first."""
    query = _LISTED.where(access_token.c.lineage_id == lineage_id).order_by(access_token.c.version.desc())
    return [_listed_of(row) for row in connection.execute(query)]


def count_live_tokens(connection: Connection, now: Instant) -> Mapping[str, int]:
    """How many tokens may still be used, by the key that signed them. In its overlap a rotated one may."""
    return {row.kid: row.tokens for row in connection.execute(_LIVE_BY_KEY, {"now": now})}


def issue_token(connection: Connection, token: AccessToken, by: str) -> Done | Refused:
    """Store a token, if its partner may have one and its key is still there."""
    reason = _hold_partner(connection, token.partner_id)
    if reason is not None or not _hold_key(connection, token.kid, token.created_at):
        return Refused(reason or SigningKeyNotFound)
    _insert(connection, token)
    now, partner_id = token.created_at, token.partner_id
    append_audit(connection, "token.issued", now=now, by=by, subject=token.id, partner_id=partner_id, detail=token.label)
    return Done(append_change(connection, "token", token.id, now))


def roll_token(
    connection: Connection, token_id: str, replacement: AccessToken, ends_at: Instant, now: Instant, by: str
) -> Done | Refused:
    """Put a new version in the place of a live token."""
    reason = _hold_partner(connection, replacement.partner_id)
    old = _lock_token(connection, token_id)
    if old is None:
        return Refused(TokenNotFound)
    if old.end_cause is not None or (old.ends_at is not None and now >= old.ends_at):
        return Refused(TokenEnded)
    if reason is not None or not _hold_key(connection, replacement.kid, now):
        return Refused(reason or SigningKeyNotFound)
    _insert(connection, replacement)
    _write_end(connection, token_id, ends_at=ends_at, end_cause=EndCause.ROTATED.value, rotated_at=now)
    detail, partner_id = replacement.id, replacement.partner_id
    append_audit(connection, "token.rotated", now=now, by=by, subject=token_id, partner_id=partner_id, detail=detail)
    sequence = append_change(connection, "token", token_id, now)
    facts = {"label": old.label, "oldToken": old.id, "newToken": replacement.id, "endsAt": str(ends_at)}
    queue_notice(connection, MailKind.TOKEN_ROTATED, partner_id, facts, now=now, sequence=sequence)
    return Done(sequence)


def revoke_token(connection: Connection, token_id: str, now: Instant, by: str) -> Done | Refused:
    """End a token now and for good, whatever was planned for it."""
    old = _lock_token(connection, token_id)
    if old is None:
        return Refused(TokenNotFound)
    # The cause is written even where the token has ended already: a rotated one comes to life again when a clock is set
    # back, a revoked one never.
    ends_at = now if old.ends_at is None else min(old.ends_at, now)
    _write_end(connection, token_id, ends_at=ends_at, end_cause=EndCause.REVOKED.value)
    append_audit(connection, "token.revoked", now=now, by=by, subject=token_id, partner_id=old.partner_id)
    return Done(append_change(connection, "token", token_id, now))


def _hold_partner(connection: Connection, partner_id: str) -> type[PartnerNotFound | PartnerDeactivated] | None:
    """Why the partner may not be given a token. If it may, that stays so until this transaction is over."""
    query = select(partner.c.status).where(partner.c.id == partner_id).with_for_update(read=True)
    status = connection.execute(query).scalar_one_or_none()
    if status is None:
        return PartnerNotFound
    return PartnerDeactivated if status == PartnerStatus.DEACTIVATED else None


def _hold_key(connection: Connection, kid: str, now: Instant) -> bool:
    """Whether the signing key is not gone. If so, it is not withdrawn before this transaction is over."""
    query = select(signing_key.c.gone_at).where(signing_key.c.kid == kid).with_for_update(read=True)
    row = connection.execute(query).one_or_none()
    return row is not None and (row.gone_at is None or now < row.gone_at)


def _lock_token(connection: Connection, token_id: str) -> AccessToken | None:
    return _find(connection, _TOKENS.where(access_token.c.id == token_id).with_for_update())


def _insert(connection: Connection, token: AccessToken) -> None:
    connection.execute(
        insert(access_token),
        {
            "id": token.id,
            "lineage_id": token.lineage_id,
            "version": token.version,
            "partner_id": token.partner_id,
            "label": token.label,
            "kid": token.kid,
            "digest": token.digest,
            "created_at": token.created_at,
        },
    )


def _write_end(connection: Connection, token_id: str, **end: Instant | str) -> None:
    connection.execute(update(access_token).where(access_token.c.id == token_id).values(end))
