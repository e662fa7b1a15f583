"""Answers that held a new key and may be asked for again: found and kept in the transaction that makes the key."""

from sqlalchemy import Connection, insert, select

from gatelodge_server.core.model import Credential, Instant
from gatelodge_server.core.ports import Refused, Replay
from gatelodge_server.core.refusals import IdempotencyKeyReused, IdempotencyKeySpent
from gatelodge_server.store.clock import STORE_TIME, time_of
from gatelodge_server.store.tables import AnyRow, replay

_REPLAY = select(
    replay.c.fingerprint, replay.c.credential_id, replay.c.company_id, replay.c.sealed, replay.c.readable_until, STORE_TIME
)


def find_replay(connection: Connection, asked: Replay | None, now: Instant) -> AnyRow | Refused | None:
    """The row of an answer that may be given again; ``None`` if the same was not asked before.

    Refused with ``IdempotencyKeyReused`` if something else was, with ``IdempotencyKeySpent`` if the answer is past repeating.
    """
    if asked is None:
        return None
    row = connection.execute(_REPLAY.where(replay.c.id == asked.id)).one_or_none()
    if row is None:
        return None
    if row.fingerprint != asked.fingerprint:
        return Refused(IdempotencyKeyReused)
    if row.sealed is None or time_of(connection, now, read=row.store_time) >= row.readable_until:
        return Refused(IdempotencyKeySpent)
    return row


def keep_replay(connection: Connection, asked: Replay | None, key: Credential, now: Instant) -> None:
    """Keep the answer that holds this key, if it may be asked for again."""
    if asked is not None:
        connection.execute(
            insert(replay),
            {
                "id": asked.id,
                "fingerprint": asked.fingerprint,
                "credential_id": key.id,
                "company_id": key.company_id.bytes if key.company_id is not None else None,
                "sealed": asked.sealed,
                "readable_until": asked.readable_until - now + time_of(connection, now),
            },
        )
