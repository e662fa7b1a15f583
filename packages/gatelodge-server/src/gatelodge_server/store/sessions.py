"""Sessions. The verbs here take many requests at once and give each its own outcome, in order; ``batch.py`` collects them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    update,
)

from gatelodge.errors import InvalidCredential
from gatelodge_server.core.credentials import judge_key
from gatelodge_server.core.model import Instant, MailKind, PartnerStatus, Session, SessionEnd
from gatelodge_server.core.ports import (
    Advanced,
    Condemned,
    Done,
    LoginAttempt,
    Opened,
    Purged,
    RefreshAttempt,
    RefreshOutcome,
    Refused,
    SessionStanding,
)
from gatelodge_server.core.sessions import judge_refresh
from gatelodge_server.store.batch import BUSY, Busy
from gatelodge_server.store.clock import STORE_TIME, shared_now
from gatelodge_server.store.keys import STANDING_COLUMNS, WITH_HOLDER, note_first_use, read_presented, standing_of
from gatelodge_server.store.leading import prove_leading
from gatelodge_server.store.outbox import queue_notice
from gatelodge_server.store.races import Turn, take_turn, unheld
from gatelodge_server.store.tables import credential, partner, session
from gatelodge_server.store.trail import append_audit, append_change

_SESSION_COLUMNS = (
    session.c.id,
    session.c.credential_id.label("session_credential_id"),
    session.c.epoch,
    session.c.generation,
    session.c.started_at,
    session.c.rotated_at,
    session.c.expires_at,
    session.c.retires_at,
    session.c.retry_digest,
    session.c.ended_at,
    session.c.end_cause.label("session_end_cause"),
)
_FIND = (
    select(*_SESSION_COLUMNS, *STANDING_COLUMNS)
    .select_from(session.join(WITH_HOLDER, credential.c.id == session.c.credential_id))
    .where(session.c.id.in_(bindparam("ids", expanding=True)))
)
# Who locks many sessions waits for none of them: neither do nodes wait for each other in a circle, nor a whole batch for one
# session. A session that has changed since the statement began is read as it is when it is locked. SQLite has one writer at a
# time and no row locks: SQLAlchemy leaves the clause out there.
_HOLD = _FIND.add_columns(STORE_TIME).with_for_update(of=session, skip_locked=True)
_ARE_THERE = select(session.c.id).where(session.c.id.in_(bindparam("ids", expanding=True)))
_WRITE = (
    update(session)
    .where(session.c.id == bindparam("session_id"))
    .values(
        generation=bindparam("new_generation"),
        rotated_at=bindparam("new_rotated_at"),
        expires_at=bindparam("new_expires_at"),
        retry_digest=bindparam("new_retry_digest"),
        ended_at=bindparam("new_ended_at"),
        end_cause=bindparam("new_end_cause"),
    )
)

_BEFORE: ColumnElement[int] = bindparam("before", type_=BigInteger)
_IS_OVER = or_(
    session.c.expires_at <= _BEFORE,
    session.c.retires_at <= _BEFORE,
    session.c.ended_at <= _BEFORE,
    credential.c.ends_at <= _BEFORE,
    # That all sessions of a partner were ended has no date, and needs none: while the partner is suspended its holder is
    # told so, and afterwards there is nothing left to tell.
    and_(session.c.epoch != partner.c.session_epoch, partner.c.status != PartnerStatus.SUSPENDED.value),
)
_SLICE = (
    select(session.c.id, func.coalesce(_IS_OVER, false()).label("is_over"))
    .select_from(session.join(WITH_HOLDER, credential.c.id == session.c.credential_id))
    .where(session.c.id > bindparam("after"))
    .order_by(session.c.id)
    .limit(bindparam("limit"))
)


def _session_of(row: Sequence[Any]) -> SessionStanding:
    id_, key_id, epoch, generation, started, rotated, expires, retires, retry, ended, end_cause, *standing = row
    cause = SessionEnd(end_cause) if end_cause else None
    found = Session(id_, key_id, epoch, generation, started, rotated, expires, retires, retry, ended, cause)
    return SessionStanding(found, standing_of(standing))


def open_sessions(connection: Connection, attempts: Sequence[LoginAttempt]) -> list[Opened | Refused]:
    """Judge each key and insert the sessions of those that may come in, as one statement."""
    rows = read_presented(connection, [(asked.key_id, asked.digest) for asked in attempts])
    now = shared_now(connection, read=next(iter(rows.values())).store_time) if rows else None
    outcomes: list[Opened | Refused] = []
    new: list[dict[str, object]] = []
    first_used: dict[str, Instant] = {}
    for asked in attempts:
        attempt = asked if now is None else asked.at(now)
        row = rows.get(attempt.key_id)
        standing = standing_of(row[:-1]) if row is not None else None
        reason = judge_key(standing, attempt.digest, attempt.now)
        if reason is not None or standing is None or row is None:
            outcomes.append(Refused(reason or InvalidCredential))
            continue
        opened = Session(
            id=attempt.session_id,
            credential_id=attempt.key_id,
            epoch=standing.session_epoch,
            generation=0,
            started_at=attempt.now,
            rotated_at=attempt.now,
            expires_at=attempt.expires_at,
            retires_at=attempt.retires_at,
        )
        new.append(
            {
                "id": opened.id,
                "credential_id": opened.credential_id,
                "epoch": opened.epoch,
                "generation": opened.generation,
                "started_at": opened.started_at,
                "rotated_at": opened.rotated_at,
                "expires_at": opened.expires_at,
                "retires_at": opened.retires_at,
            }
        )
        if row.first_used_at is None:
            first_used[attempt.key_id] = attempt.now
        outcomes.append(Opened(opened, standing.holder))
    if new:
        connection.execute(insert(session), new)
    if first_used:
        note_first_use(connection, list(first_used), max(first_used.values()))
    return outcomes


def advance_sessions(connection: Connection, attempts: Sequence[RefreshAttempt]) -> list[RefreshOutcome | Busy]:
    """Lock the rows that are free, see what time it is, judge the tokens one after the other, write what has changed.

    Two attempts on one session in one batch are judged in order, the second against what the first has made of the row. Those
    on a session that somebody else holds are ``Busy``; so is one that would end its session, while somebody else appends to the
    change sequence. Nobody in the batch waits for either.
    """
    ids = list({attempt.session_id for attempt in attempts})
    rows = connection.execute(_HOLD, {"ids": ids}).all()
    now = shared_now(connection, read=rows[0].store_time) if rows else None
    found = {row[0]: _session_of(row[:-1]) for row in rows}
    missed = [session_id for session_id in ids if session_id not in found]
    held_by_others = set(connection.execute(_ARE_THERE, {"ids": missed}).scalars()) if missed else set[bytes]()
    outcomes: list[RefreshOutcome | Busy] = []
    changed: dict[bytes, Session] = {}
    for asked in attempts:
        if asked.session_id in held_by_others:
            outcomes.append(BUSY)
            continue
        state = found.get(asked.session_id)
        attempt = asked if now is None else asked.at(now)
        outcome = judge_refresh(state, attempt)
        if isinstance(outcome, Condemned) and not take_turn(connection, Turn.APPENDING):
            outcomes.append(BUSY)
            continue
        if state is not None and isinstance(outcome, (Advanced, Condemned)):
            changed[attempt.session_id] = outcome.session
            found[attempt.session_id] = SessionStanding(outcome.session, state.standing)
            if isinstance(outcome, Condemned):
                sequence = _announce_end(connection, found[attempt.session_id], by="session")
                if outcome.session.end_cause is SessionEnd.REUSE:
                    _tell_of_reuse(connection, found[attempt.session_id], now=attempt.now, sequence=sequence)
        outcomes.append(outcome)
    if changed:
        connection.execute(_WRITE, [_row_of(moved) for moved in changed.values()])
    return outcomes


def _row_of(moved: Session) -> dict[str, object]:
    return {
        "session_id": moved.id,
        "new_generation": moved.generation,
        "new_rotated_at": moved.rotated_at,
        "new_expires_at": moved.expires_at,
        "new_retry_digest": moved.retry_digest,
        "new_ended_at": moved.ended_at,
        "new_end_cause": moved.end_cause.value if moved.end_cause else None,
    }


def _announce_end(connection: Connection, ended: SessionStanding, by: str) -> int:
    now, cause = ended.session.ended_at or 0, ended.session.end_cause or SessionEnd.LOGOUT
    subject = ended.session.id.hex()
    partner_id = ended.standing.holder.partner_id
    append_audit(connection, f"session.{cause.value}", now=now, by=by, subject=subject, partner_id=partner_id)
    return append_change(connection, "session", subject, now)


def _tell_of_reuse(connection: Connection, ended: SessionStanding, *, now: Instant, sequence: int) -> None:
    key_id, started_at = ended.session.credential_id, ended.session.started_at
    masked = connection.execute(select(credential.c.masked).where(credential.c.id == key_id)).scalar_one()
    facts = {"key": masked, "startedAt": str(started_at)}
    queue_notice(connection, MailKind.SESSION_REUSED, ended.standing.holder.partner_id, facts, now=now, sequence=sequence)


def find_sessions(connection: Connection, session_ids: Sequence[bytes]) -> list[SessionStanding | None]:
    """Each session as it stands, in the order asked."""
    found = {row[0]: _session_of(row) for row in connection.execute(_FIND, {"ids": list(set(session_ids))})}
    return [found.get(session_id) for session_id in session_ids]


def end_session(connection: Connection, session_id: bytes, cause: SessionEnd, now: Instant, by: str) -> Done | None:
    """End a session that has not ended yet."""
    own = select(session.c.ended_at).where(session.c.id == session_id)
    row = connection.execute(own.with_for_update()).one_or_none()
    if row is None:
        # It is said to have ended. That must come from a server that leads, and nothing else is written here.
        prove_leading(connection)
        return None
    if row.ended_at is not None:
        return None
    connection.execute(update(session).where(session.c.id == session_id).values(ended_at=now, end_cause=cause.value))
    ended = find_sessions(connection, [session_id])[0]
    return Done(_announce_end(connection, ended, by)) if ended is not None else None


def purge_sessions(connection: Connection, after: bytes | None, limit: int, ended_before: Instant) -> Purged:
    """Delete, among the next sessions by id, those that have been of no use to anybody since ``ended_before``.

    It walks along the primary key: an index on the expiry would have to be kept up by every refresh.
    """
    slice_ = connection.execute(_SLICE, {"after": after or b"", "before": ended_before, "limit": limit}).all()
    dead = [row.id for row in slice_ if row.is_over]
    last = slice_[-1].id if len(slice_) == limit else None
    if dead:
        # Those that somebody holds are left to the next round.
        done = connection.execute(delete(session).where(unheld(session, session.c.id.in_(dead))))
        return Purged(last, done.rowcount)
    return Purged(last, 0)
