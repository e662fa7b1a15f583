"""The feed of revocations: steps of the change sequence with what their subjects have come to, and those who follow.

What a verifier is told of a subject is read when it is told, not when the step was made. It may so be newer than the step, and
then a later step says the same again; it is never older.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Select, Subquery, and_, case, delete, func, or_, select, update

from gatelodge.errors import CredentialRevoked
from gatelodge_server.core.model import Change, Duration, EndCause, Instant, KeyPurpose, PartnerStatus
from gatelodge_server.core.ports.common import Refused
from gatelodge_server.core.ports.revocations import Acknowledgement, Beginning, Reach, Revocation, Tail
from gatelodge_server.core.refusals import StepNotFound, TooManyRequests
from gatelodge_server.core.revocations import (
    VERIFIERS_MAX,
    company_end,
    key_end,
    partner_end,
    signing_key_end,
)
from gatelodge_server.store.batch import BUSY, Busy
from gatelodge_server.store.clock import clock_name, time_of
from gatelodge_server.store.races import Turn, insert_unless_there, take_turn, unheld
from gatelodge_server.store.tables import change, company, credential, partner, signing_key, verifier
from gatelodge_server.store.trail import last_change, list_changes

_STEP: Final = select(change.c.sequence, change.c.kind, change.c.subject, change.c.at)
_KEYS: Final = select(credential.c.id, credential.c.ends_at, credential.c.end_cause, credential.c.rotated_at)
_PARTNERS: Final = select(partner.c.id, partner.c.status, partner.c.session_epoch)
_PARTNER_KIND, _KEY_KIND = "partner", "credential"

States = Mapping[str, Revocation]
"""What subjects of one kind have come to, without step and time. One of which there is nothing to say is left out."""


def _sessions(_: Connection, subjects: Sequence[str]) -> States:
    # Every step of this kind is an end, and a session never comes back: its row need not be there any more.
    return {subject: Revocation(0, "session", subject, None, CredentialRevoked) for subject in subjects}


def _keys(connection: Connection, subjects: Sequence[str]) -> States:
    return {row.id: _key_of(row) for row in connection.execute(_KEYS.where(credential.c.id.in_(subjects)))}


def _key_of(row: Any) -> Revocation:  # noqa: ANN401 - a row
    cause = EndCause(row.end_cause) if row.end_cause else None
    return Revocation(0, _KEY_KIND, row.id, None, *key_end(row.ends_at, cause, row.rotated_at))


def _companies(connection: Connection, subjects: Sequence[str]) -> States:
    ids = [UUID(subject).bytes for subject in subjects]
    rows = connection.execute(select(company.c.id, company.c.deleted_at).where(company.c.id.in_(ids)))
    found = {str(UUID(bytes=row.id)): company_end(row.deleted_at) for row in rows}
    return {subject: Revocation(0, "company", subject, None, reason) for subject, reason in found.items() if reason}


def _partners(connection: Connection, subjects: Sequence[str]) -> States:
    rows = connection.execute(_PARTNERS.where(partner.c.id.in_(subjects)))
    # One that was never suspended has nothing to be told of.
    return {row.id: _partner_of(row) for row in rows if row.session_epoch > 0 or row.status != PartnerStatus.ACTIVE}


def _partner_of(row: Any) -> Revocation:  # noqa: ANN401 - a row
    reason = partner_end(PartnerStatus(row.status))
    return Revocation(0, _PARTNER_KIND, row.id, None, reason, epoch=row.session_epoch)


def _signing_keys(connection: Connection, subjects: Sequence[str]) -> States:
    query = select(signing_key.c.kid, signing_key.c.gone_at).where(signing_key.c.kid.in_(subjects))
    rows = connection.execute(query.where(signing_key.c.purpose == KeyPurpose.SESSION.value))
    gone = {row.kid: row.gone_at for row in rows if row.gone_at is not None}
    return {kid: Revocation(0, "signing-key", kid, None, *signing_key_end(gone_at)) for kid, gone_at in gone.items()}


_STATES: Final[Mapping[str, Callable[[Connection, Sequence[str]], States]]] = {
    "session": _sessions,
    _KEY_KIND: _keys,
    "company": _companies,
    _PARTNER_KIND: _partners,
    "signing-key": _signing_keys,
}
"""The kinds of steps that go out. Access tokens do not: whether one was ever issued only its issuer can say. Nor do tiers."""


def read_revocations(connection: Connection, asked: Sequence[tuple[int, int]]) -> list[Tail]:
    """What is behind each of these steps, so many steps of it. Most who ask have read equally far, and are told alike."""
    found = {one: _read_tail(connection, *one) for one in set(asked)}
    return [found[one] for one in asked]


def _read_tail(connection: Connection, after: int, limit: int) -> Tail:
    """What the next steps have changed: each subject once, as its last step among them."""
    row = connection.execute(_STEP.where(change.c.sequence == after)).one_or_none()
    step = Change(*row) if row is not None else None
    found = list_changes(connection, after, limit + 1)
    steps = found[:limit]
    last = steps[-1] if steps else step
    return Tail(step, steps[0] if steps else None, last, _states_of(connection, steps), len(found) > limit)


def _states_of(connection: Connection, steps: Iterable[Change]) -> Sequence[Revocation]:
    latest = {(step.kind, step.subject): step for step in steps}
    told: list[Revocation] = []
    for kind, read in _STATES.items():
        of_kind = {subject: step for (its_kind, subject), step in latest.items() if its_kind == kind}
        if not of_kind:
            continue
        for subject, state in read(connection, list(of_kind)).items():
            step = of_kind[subject]
            told.append(
                Revocation(step.sequence, kind, subject, step.at, state.reason, ends_at=state.ends_at, epoch=state.epoch)
            )
    return sorted(told, key=lambda one: one.sequence)


def begin_revocations(connection: Connection, since: Instant, after: tuple[str, str] | None, limit: int) -> Beginning:
    """Where to begin, and what older steps have left behind: keys first, then partners, each by id."""
    step = _step_before(connection, since)
    number = 0 if step is None else step.sequence
    kind, subject = after or (_KEY_KIND, "")
    found: list[Revocation] = []
    if kind == _KEY_KIND:
        # Those whose end was decided later have a step that is read anyway. What was revoked ended with its step.
        was_decided_before = and_(
            or_(credential.c.rotated_at.is_(None), credential.c.rotated_at <= since),
            or_(credential.c.end_cause.is_(None), credential.c.end_cause != EndCause.REVOKED.value),
        )
        query = _KEYS.where(credential.c.ends_at > since, was_decided_before, credential.c.id > subject)
        found += [_key_of(row) for row in connection.execute(query.order_by(credential.c.id).limit(limit + 1))]
        subject = ""
    if len(found) <= limit:
        query = _PARTNERS.where(partner.c.status == PartnerStatus.SUSPENDED.value, partner.c.id > subject)
        rows = connection.execute(query.order_by(partner.c.id).limit(limit + 1 - len(found)))
        found += [_partner_of(row) for row in rows]
    told = [Revocation(number, one.kind, one.subject, None, one.reason, one.ends_at, one.epoch) for one in found[:limit]]
    return Beginning(step, told, (told[-1].kind, told[-1].subject) if len(found) > limit else None)


def _step_before(connection: Connection, since: Instant) -> Change | None:
    """The last step before all that were made after ``since``. Clocks may have been set back: numbers decide, not times."""
    first = connection.execute(select(func.min(change.c.sequence)).where(change.c.at > since)).scalar_one()
    query = _STEP if first is None else _STEP.where(change.c.sequence < first)
    row = connection.execute(query.order_by(change.c.sequence.desc()).limit(1)).one_or_none()
    return Change(*row) if row is not None else None


def acknowledge_steps(connection: Connection, said: Sequence[Acknowledgement]) -> list[Refused | Busy | None]:
    """Note what verifiers have applied. What one said last counts, also where that is less: it may have begun anew.

    One that is new is ``Busy`` while another node lets some in: those that are known, which are nearly all, wait for nobody.
    """
    last, outcomes = last_change(connection), dict[int, Refused | Busy | None]()
    names = {one.verifier for one in said}
    known = connection.execute(select(verifier.c.id).where(verifier.c.id.in_(names))).scalars().all()
    newcomers = _judge_newcomers(connection, max(said, key=lambda one: one.now)) if len(known) < len(names) else BUSY
    clock = clock_name(connection)
    new: list[tuple[int, Acknowledgement]] = []
    # In one order everywhere, so that nodes do not wait for each other in a circle.
    for place, one in sorted(enumerate(said), key=lambda pair: (pair[1].verifier, pair[0])):
        if one.sequence > last:
            outcomes[place] = Refused(StepNotFound)
        elif _note(connection, one, clock):
            outcomes[place] = None
        else:
            new.append((place, one))
    # Whoever is new may take a place, which locks a row out of that order: so nothing is waited for from here on.
    for place, one in new:
        outcomes[place] = newcomers if newcomers is not None else _let_in(connection, one, clock)
    return [outcomes[place] for place in range(len(said))]


def _judge_newcomers(connection: Connection, said: Acknowledgement) -> Refused | Busy | None:
    """Why nobody who is new can be let in; ``None``: as many can as there is room for."""
    if _is_full(connection) and connection.execute(_longest_away(connection, said)).scalar_one_or_none() is None:
        return Refused(TooManyRequests)
    return None if take_turn(connection, Turn.COUNTING_VERIFIERS) else BUSY


def _is_full(connection: Connection) -> bool:
    return bool(connection.execute(select(func.count()).select_from(verifier)).scalar_one() >= VERIFIERS_MAX)


def _note(connection: Connection, said: Acknowledgement, clock: str) -> bool:
    """Note it of one that is known; whether it is. One that was a moment ago may be forgotten."""
    own = update(verifier).where(verifier.c.id == said.verifier)
    return bool(connection.execute(own.values(_what_is_noted(connection, said, clock))).rowcount)


def _let_in(connection: Connection, said: Acknowledgement, clock: str) -> Refused | None:
    """Note it of one that is new. For whoever has the turn: nobody else lets anybody in."""
    if _note(connection, said, clock):  # it is in this batch twice
        return None
    if _is_full(connection) and not _make_room(connection, said):
        return Refused(TooManyRequests)
    insert_unless_there(connection, verifier, {"id": said.verifier, **_what_is_noted(connection, said, clock)})
    return None


def _what_is_noted(connection: Connection, said: Acknowledgement, clock: str) -> dict[str, object]:
    return {"sequence": said.sequence, "seen_at": time_of(connection, said.now), "clock": clock}


def _make_room(connection: Connection, said: Acknowledgement) -> bool:
    """Forget the one that has been away longest; whether there is one that is not there any more.

    It refuses everything and is not counted. When it comes back it is new, as if it had been away for ``AWAY_FOR``. One that
    comes back this very moment holds its row, and is left alone.
    """
    away = connection.execute(_longest_away(connection, said).with_for_update(of=verifier, skip_locked=True))
    found = away.scalar_one_or_none()
    return found is not None and bool(connection.execute(delete(verifier).where(verifier.c.id == found)).rowcount)


def _longest_away(connection: Connection, said: Acknowledgement) -> Select[Any]:
    """Of those that ``count_reach`` does not count, the one that was seen longest ago."""
    other, counted_at = _counted_at(connection, said.now)
    query = select(verifier.c.id).join_from(verifier, other, other.c.clock == verifier.c.clock)
    query = query.where(verifier.c.seen_at <= counted_at - said.within)
    return query.order_by((counted_at - verifier.c.seen_at).desc(), verifier.c.id).limit(1)


def count_reach(connection: Connection, asked: Sequence[tuple[int, Duration, Instant]]) -> list[Reach]:
    """Of each step: how many are there, and how many of them have applied it."""
    return [_count_reach(connection, *one) for one in asked]


def _count_reach(connection: Connection, sequence: int, within: Duration, now: Instant) -> Reach:
    has_applied = func.count().filter(verifier.c.sequence >= sequence)
    other, counted_at = _counted_at(connection, now)
    query = select(func.count(), has_applied).join_from(verifier, other, other.c.clock == verifier.c.clock)
    verifiers, acknowledged = connection.execute(query.where(verifier.c.seen_at > counted_at - within)).one()
    return Reach(sequence, int(verifiers), int(acknowledged))


def _counted_at(connection: Connection, now: Instant) -> tuple[Subquery, ColumnElement[int]]:
    """The time by which each verifier is there or is not, and what has to be joined to say it.

    Those whom only the clock of an earlier leader has seen count if they were there when it was read last. How long ago that
    was the present one cannot say, and to be told of one too many does no harm.
    """
    other = select(verifier.c.clock, func.max(verifier.c.seen_at).label("seen_at")).group_by(verifier.c.clock).subquery()
    is_present = verifier.c.clock == clock_name(connection)
    return other, case((is_present, time_of(connection, now)), else_=other.c.seen_at)


def forget_verifiers(connection: Connection, away_for: Duration, now: Instant) -> int:
    """Delete those that have been away for long. Those whom an earlier leader's clock has seen age by the present one now."""
    clock = clock_name(connection)
    others = select(verifier.c.clock, func.max(verifier.c.seen_at)).where(verifier.c.clock != clock).group_by(verifier.c.clock)
    for other, last_seen_at in connection.execute(others).all():
        aged = verifier.c.seen_at + (time_of(connection, now) - last_seen_at)
        theirs = update(verifier).where(unheld(verifier, verifier.c.clock == other))
        connection.execute(theirs.values(seen_at=aged, clock=clock))
    seen_before = time_of(connection, now) - away_for
    return connection.execute(delete(verifier).where(unheld(verifier, verifier.c.seen_at < seen_before))).rowcount
