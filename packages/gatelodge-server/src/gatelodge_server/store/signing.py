"""Signing keys, their private halves sealed. A verb concerns the keys of one purpose, and locks them."""

from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update

from gatelodge_server.core.model import Duration, Instant, KeyPurpose, SigningKey
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import SigningKeyInUse, SigningKeyNotFound
from gatelodge_server.core.signing import plan_retirement, plan_rotation, plan_withdrawals
from gatelodge_server.store.tables import AnyRow, signing_key, tier
from gatelodge_server.store.tokens import count_live_tokens
from gatelodge_server.store.trail import append_audit, append_change

_KEYS = select(
    signing_key.c.kid,
    signing_key.c.jwk,
    signing_key.c.wrapped,
    signing_key.c.published_at,
    signing_key.c.signs_from,
    signing_key.c.signs_until,
    signing_key.c.gone_at,
    signing_key.c.purpose,
).order_by(signing_key.c.published_at, signing_key.c.kid)
# Before the first key there is no row to lock. The tiers are there from the beginning, and this lock on them lets partners be
# added meanwhile.
_LOCK_NOTHING = select(tier.c.name).order_by(tier.c.name).with_for_update(key_share=True)


def _key_of(row: AnyRow) -> SigningKey:
    kid, jwk, wrapped, published_at, signs_from, signs_until, gone_at, purpose = row
    return SigningKey(kid, jwk, wrapped, published_at, signs_from, signs_until, gone_at, KeyPurpose(purpose))


def list_signing_keys(connection: Connection) -> Sequence[SigningKey]:
    """All keys, oldest first."""
    return [_key_of(row) for row in connection.execute(_KEYS)]


def _list_purpose(connection: Connection, purpose: KeyPurpose) -> Sequence[SigningKey]:
    return [_key_of(row) for row in connection.execute(_KEYS.where(signing_key.c.purpose == purpose.value))]


def _lock_signing_keys(connection: Connection, purpose: KeyPurpose) -> Sequence[SigningKey]:
    query = select(signing_key.c.kid).where(signing_key.c.purpose == purpose.value).order_by(signing_key.c.kid)
    connection.execute(query.with_for_update())
    # Read only now: who waited for the lock would not see the key that the one before has published.
    return _list_purpose(connection, purpose)


def establish_signing_keys(connection: Connection, first: Sequence[SigningKey], now: Instant) -> Sequence[SigningKey]:
    """Store the first keys of their purpose unless there are some."""
    connection.execute(_LOCK_NOTHING)
    keys = _list_purpose(connection, first[0].purpose)
    if keys:
        return keys
    _write(connection, first, known=())
    append_audit(connection, "signing-key.established", now=now, by="system", subject=first[0].kid)
    append_change(connection, "signing-key", first[0].kid, now)
    return first


def rotate_signing_keys(
    connection: Connection, candidate: SigningKey, lead: Duration, life: Duration | None, now: Instant, by: str
) -> Done:
    """Let the next key sign."""
    keys = _lock_signing_keys(connection, candidate.purpose)
    rotation = plan_rotation(keys, candidate, lead=lead, life=life, now=now)
    _write(connection, rotation.changed, known=keys)
    append_audit(connection, "signing-key.rotated", now=now, by=by, subject=rotation.kid)
    return Done(append_change(connection, "signing-key", rotation.kid, now))


def retire_signing_key(connection: Connection, kid: str, now: Instant, by: str) -> Done | Refused:
    """Withdraw a key at once."""
    purpose = connection.execute(select(signing_key.c.purpose).where(signing_key.c.kid == kid)).scalar_one_or_none()
    if purpose is None:
        return Refused(SigningKeyNotFound)
    keys = _lock_signing_keys(connection, KeyPurpose(purpose))
    live_tokens = count_live_tokens(connection, now).get(kid, 0)
    changed = plan_retirement(keys, kid, live_tokens=live_tokens, now=now)
    if changed is None:
        return Refused(SigningKeyInUse)
    _write(connection, changed, known=keys)
    append_audit(connection, "signing-key.retired", now=now, by=by, subject=kid)
    return Done(append_change(connection, "signing-key", kid, now))


def retire_unneeded_keys(connection: Connection, now: Instant) -> Sequence[str]:
    """Withdraw what no longer signs and no live token needs."""
    keys = _lock_signing_keys(connection, KeyPurpose.ACCESS)
    # Counted after the lock: an issue that was under way has been committed, and no other gets past its key.
    gone = plan_withdrawals(keys, count_live_tokens(connection, now), now=now)
    _write(connection, gone, known=keys)
    for key in gone:
        append_audit(connection, "signing-key.retired", now=now, by="system", subject=key.kid)
        append_change(connection, "signing-key", key.kid, now)
    return [key.kid for key in gone]


def _write(connection: Connection, changed: Sequence[SigningKey], *, known: Sequence[SigningKey]) -> None:
    kids = {key.kid for key in known}
    for key in changed:
        instants = {"signs_from": key.signs_from, "signs_until": key.signs_until, "gone_at": key.gone_at}
        if key.kid in kids:
            connection.execute(update(signing_key).where(signing_key.c.kid == key.kid).values(instants))
        else:
            new = {
                "kid": key.kid,
                "jwk": key.jwk,
                "wrapped": key.wrapped,
                "published_at": key.published_at,
                "purpose": key.purpose.value,
            }
            connection.execute(insert(signing_key).values(new | instants))
