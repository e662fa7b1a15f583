"""Signing keys, their private halves sealed."""

from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update

from gatelodge_server.core.model import Duration, Instant, SigningKey
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import SigningKeyInUse, SigningKeyNotFound
from gatelodge_server.core.signing import plan_retirement, plan_rotation
from gatelodge_server.store.tables import signing_key
from gatelodge_server.store.trail import append_audit, append_change

_KEYS = select(
    signing_key.c.kid,
    signing_key.c.jwk,
    signing_key.c.wrapped,
    signing_key.c.published_at,
    signing_key.c.signs_from,
    signing_key.c.signs_until,
    signing_key.c.gone_at,
).order_by(signing_key.c.published_at, signing_key.c.kid)


def list_signing_keys(connection: Connection) -> Sequence[SigningKey]:
    """All keys, oldest first."""
    return [SigningKey(*row) for row in connection.execute(_KEYS)]


def _lock_signing_keys(connection: Connection) -> Sequence[SigningKey]:
    return [SigningKey(*row) for row in connection.execute(_KEYS.with_for_update())]


def establish_signing_keys(connection: Connection, first: Sequence[SigningKey], now: Instant) -> Sequence[SigningKey]:
    """Store the first keys unless there are some."""
    keys = _lock_signing_keys(connection)
    if keys:
        return keys
    _write(connection, first, known=())
    append_audit(connection, "signing-key.established", now=now, by="system", subject=first[0].kid)
    append_change(connection, "signing-key", first[0].kid, now)
    return first


def rotate_signing_keys(
    connection: Connection, candidate: SigningKey, lead: Duration, life: Duration, now: Instant, by: str
) -> Done:
    """Let the next key sign."""
    keys = _lock_signing_keys(connection)
    rotation = plan_rotation(keys, candidate, lead=lead, life=life, now=now)
    _write(connection, rotation.changed, known=keys)
    append_audit(connection, "signing-key.rotated", now=now, by=by, subject=rotation.kid)
    return Done(append_change(connection, "signing-key", rotation.kid, now))


def retire_signing_key(connection: Connection, kid: str, now: Instant, by: str) -> Done | Refused:
    """Withdraw a key at once."""
    keys = _lock_signing_keys(connection)
    if kid not in {key.kid for key in keys}:
        return Refused(SigningKeyNotFound)
    changed = plan_retirement(keys, kid, now=now)
    if changed is None:
        return Refused(SigningKeyInUse)
    _write(connection, changed, known=keys)
    append_audit(connection, "signing-key.retired", now=now, by=by, subject=kid)
    return Done(append_change(connection, "signing-key", kid, now))


def _write(connection: Connection, changed: Sequence[SigningKey], *, known: Sequence[SigningKey]) -> None:
    kids = {key.kid for key in known}
    for key in changed:
        instants = {"signs_from": key.signs_from, "signs_until": key.signs_until, "gone_at": key.gone_at}
        if key.kid in kids:
            connection.execute(update(signing_key).where(signing_key.c.kid == key.kid).values(instants))
        else:
            new = {"kid": key.kid, "jwk": key.jwk, "wrapped": key.wrapped, "published_at": key.published_at}
            connection.execute(insert(signing_key).values(new | instants))
