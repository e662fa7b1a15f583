"""The session verbs: every outcome, every boundary in threes."""

import asyncio
import os

import pytest
from given import AROUND, START, WEEK, a_key, a_login, a_partner, a_refresh, changed

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    Unavailable,
)
from gatelodge_server.core.model import DAY, MINUTE, PartnerStatus, SessionEnd
from gatelodge_server.core.ports import Advanced, Condemned, Done, Opened, Purged, Refused, Repeated
from gatelodge_server.core.refusals import RefreshTokenReused
from gatelodge_server.core.sessions import judge_session

NOBODY = bytes(16)


async def opened(store, key, **changes):
    outcome = await store.open_session(a_login(key, **changes))
    assert isinstance(outcome, Opened)
    return outcome.session


async def advanced(store, session, **changes):
    outcome = await store.advance_session(a_refresh(session, **changes))
    assert isinstance(outcome, Advanced)
    return outcome.session


async def as_stored(store, session):
    return (await store.find_session(session.id)).session


# --- open_session ---


async def test_a_login_opens_a_session_and_stores_what_it_tells(store, key, company_key):
    attempt = a_login(company_key)
    outcome = await store.open_session(attempt)
    assert isinstance(outcome, Opened)
    session = outcome.session
    assert session.id == attempt.session_id
    assert (session.credential_id, session.epoch, session.generation) == (company_key.id, 0, 0)
    assert (session.started_at, session.rotated_at) == (START, START)
    assert (session.expires_at, session.retires_at) == (attempt.expires_at, attempt.retires_at)
    assert (session.retry_digest, session.ended_at, session.end_cause) == (None, None, None)
    holder = outcome.holder
    assert (holder.partner_id, holder.company_id, holder.tier) == ("acme-motors", company_key.company_id, "starter")
    assert holder.credential_id == company_key.id
    found = await store.find_session(session.id)
    assert found.session == session
    assert found.standing.holder == holder


async def test_a_login_with_a_key_that_nobody_has_is_invalid(store, backend, key):
    assert await store.open_session(a_login(a_key())) == Refused(InvalidCredential)
    assert await store.open_session(a_login(key, digest=os.urandom(32))) == Refused(InvalidCredential)
    assert await store.open_session(a_login(key, digest=b"")) == Refused(InvalidCredential)
    assert backend.count("session") == 0


async def test_a_wrong_secret_learns_nothing_of_what_became_of_the_key(store, key):
    await store.revoke_key(key.id, now=START, by="test")
    assert await store.open_session(a_login(key, digest=os.urandom(32))) == Refused(InvalidCredential)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_rotated_key_opens_sessions_until_its_overlap_ends(store, key, offset):
    await store.roll_key(key.id, a_key(), ends_at=START + DAY, now=START, by="test")
    outcome = await store.open_session(a_login(key, now=START + DAY + offset))
    assert isinstance(outcome, Opened) if offset < 0 else outcome == Refused(CredentialRotated)


async def test_a_login_with_a_revoked_key_is_refused(store, key, backend):
    await store.revoke_key(key.id, now=START, by="test")
    assert await store.open_session(a_login(key)) == Refused(CredentialRevoked)
    assert backend.count("session") == 0


@pytest.mark.parametrize(
    ("status", "reason"),
    [(PartnerStatus.SUSPENDED, PartnerSuspended), (PartnerStatus.DEACTIVATED, CredentialRevoked)],
)
async def test_r38_no_key_of_a_partner_that_is_not_active_opens_a_session(store, key, company_key, status, reason):
    await store.set_partner_status("acme-motors", status, now=START, by="test")
    for holder in (key, company_key):
        assert await store.open_session(a_login(holder)) == Refused(reason)


async def test_the_key_of_a_deleted_company_opens_no_session(store, key, company_key):
    await store.delete_company("acme-motors", company_key.company_id, now=START, by="test")
    assert await store.open_session(a_login(company_key)) == Refused(CredentialRevoked)
    assert isinstance(await store.open_session(a_login(key)), Opened)


async def test_a_partner_that_is_resumed_logs_in_again_in_a_new_epoch(store, key):
    before = await opened(store, key)
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    await store.set_partner_status("acme-motors", PartnerStatus.ACTIVE, now=START, by="test")
    after = await opened(store, key)
    assert after.epoch > before.epoch
    await advanced(store, after)


async def test_many_logins_at_once_each_hear_their_own_answer(store, key, backend):
    strangers = [a_key() for _ in range(20)]
    attempts = [a_login(who) for pair in zip([key] * 20, strangers, strict=True) for who in pair]
    outcomes = await asyncio.gather(*(store.open_session(attempt) for attempt in attempts))
    for attempt, outcome in zip(attempts, outcomes, strict=True):
        if attempt.key_id == key.id:
            assert outcome.session.id == attempt.session_id
        else:
            assert outcome == Refused(InvalidCredential)
    assert backend.count("session") == 20


async def test_a_poisoned_login_harms_nobody_but_its_caller(store, key, backend):
    """Two sessions cannot have one id. Whoever shares a transaction with the mistake must not hear of it."""
    first = await opened(store, key)
    attempts = [a_login(key) for _ in range(9)]
    attempts.insert(4, a_login(key, session_id=first.id))
    outcomes = await asyncio.gather(*(store.open_session(attempt) for attempt in attempts), return_exceptions=True)
    poisoned = outcomes.pop(4)
    assert isinstance(poisoned, Exception)
    assert not isinstance(poisoned, Unavailable)
    assert all(isinstance(outcome, Opened) for outcome in outcomes)
    assert backend.count("session") == 10
    assert await as_stored(store, first) == first


# --- advance_session ---


async def test_r23_a_refresh_moves_the_session_on_and_spends_the_token(store, key):
    session = await opened(store, key)
    digest = os.urandom(32)
    moved = await advanced(store, session, now=START + 5, retry=digest)
    assert moved == changed(session, generation=1, rotated_at=START + 5, expires_at=START + 5 + WEEK, retry_digest=digest)
    assert await as_stored(store, session) == moved
    again = await advanced(store, moved, now=START + 9)
    assert (again.generation, again.retry_digest) == (2, None)


async def test_a_refresh_tells_whose_session_it_is(store, company_key):
    session = await opened(store, company_key)
    outcome = await store.advance_session(a_refresh(session))
    assert outcome.holder.company_id == company_key.company_id
    assert outcome.holder.credential_id == company_key.id


async def test_a_refresh_leaves_the_table_as_long_as_it_was(store, key, backend):
    session = await opened(store, key)
    rows = {table: backend.count(table) for table in ("session", "credential", "change", "audit", "replay")}
    for _ in range(100):
        session = await advanced(store, session)
    assert session.generation == 100
    assert {table: backend.count(table) for table in rows} == rows


async def test_r28_a_refresh_never_reaches_beyond_the_end_of_the_session(store, key):
    session = await opened(store, key, retires_at=START + WEEK + 100)
    for later, expected in ((99, WEEK + 99), (100, WEEK + 100), (101, WEEK + 100)):
        session = await advanced(store, session, now=START + later)
        assert session.expires_at == START + expected


@pytest.mark.parametrize("offset", AROUND)
async def test_r28_a_token_is_good_until_just_before_it_expires(store, key, offset):
    session = await opened(store, key)
    outcome = await store.advance_session(a_refresh(session, now=session.expires_at + offset))
    assert isinstance(outcome, Advanced) if offset < 0 else outcome == Refused(CredentialExpired)
    assert (await as_stored(store, session)).generation == (1 if offset < 0 else 0)


@pytest.mark.parametrize("offset", AROUND)
async def test_r28_a_session_is_good_until_just_before_it_retires(store, key, offset):
    session = await opened(store, key, retires_at=START + DAY)
    outcome = await store.advance_session(a_refresh(session, now=START + DAY + offset))
    assert isinstance(outcome, Advanced) if offset < 0 else outcome == Refused(CredentialExpired)


async def test_a_refresh_of_a_session_that_is_not_there_any_more_has_expired(store, key):
    session = await opened(store, key)
    assert await store.advance_session(a_refresh(session, session_id=NOBODY)) == Refused(CredentialExpired)


async def test_r24_a_spent_token_ends_the_session_for_every_descendant(store, key, trail):
    session = await opened(store, key)
    moved = await advanced(store, session)
    outcome = await store.advance_session(a_refresh(session, now=START + 7))
    assert isinstance(outcome, Condemned)
    assert outcome.cause is SessionEnd.REUSE
    assert outcome.session == changed(moved, ended_at=START + 7, end_cause=SessionEnd.REUSE)
    assert await as_stored(store, session) == outcome.session
    for generation in (0, 1, 2):
        refused = await store.advance_session(a_refresh(session, generation=generation, now=START + 8))
        assert refused == Refused(RefreshTokenReused)
    assert await as_stored(store, session) == outcome.session
    assert await trail(session.id.hex()) == (["session"], ["session.reuse"])


async def test_r26_reuse_is_noticed_within_one_millisecond(store, key):
    session = await opened(store, key)
    await advanced(store, session, now=START)
    assert isinstance(await store.advance_session(a_refresh(session, now=START)), Condemned)


async def test_r26_reuse_is_noticed_when_the_clock_was_set_back(store, key):
    session = await opened(store, key)
    moved = await advanced(store, session)
    await advanced(store, moved)
    assert isinstance(await store.advance_session(a_refresh(moved, now=START - DAY)), Condemned)


async def test_a_token_from_a_lost_future_ends_the_session(store, key, trail):
    session = await opened(store, key)
    outcome = await store.advance_session(a_refresh(session, generation=1, now=START + 7))
    assert isinstance(outcome, Condemned)
    assert outcome.cause is SessionEnd.RESTORED
    assert (await as_stored(store, session)).end_cause is SessionEnd.RESTORED
    assert await store.advance_session(a_refresh(session)) == Refused(CredentialRevoked)
    assert await trail(session.id.hex()) == (["session"], ["session.restored"])


async def test_r32_a_lost_answer_may_be_asked_for_again_and_changes_nothing(store, key):
    session = await opened(store, key)
    digest = os.urandom(32)
    moved = await advanced(store, session, retry=digest)
    for later in (0, 1, 30_000):
        outcome = await store.advance_session(a_refresh(session, retry=digest, now=START + later))
        assert isinstance(outcome, Repeated)
        assert outcome.session == moved
        assert outcome.holder.credential_id == key.id
    assert await as_stored(store, session) == moved
    await advanced(store, moved)


@pytest.mark.parametrize("offset", AROUND)
async def test_r32_the_retry_window_is_sixty_seconds(store, key, offset):
    session = await opened(store, key)
    digest = os.urandom(32)
    moved = await advanced(store, session, now=START + 500, retry=digest)
    outcome = await store.advance_session(a_refresh(session, retry=digest, now=START + 500 + MINUTE + offset))
    assert isinstance(outcome, Repeated if offset < 0 else Condemned)
    assert (await as_stored(store, moved)).end_cause is (None if offset < 0 else SessionEnd.REUSE)


@pytest.mark.parametrize("offset", AROUND)
async def test_r28_a_retry_does_not_outlive_the_session(store, key, offset):
    session = await opened(store, key, retires_at=START + MINUTE)
    digest = os.urandom(32)
    moved = await advanced(store, session, now=START + MINUTE - 10, retry=digest)
    outcome = await store.advance_session(a_refresh(session, retry=digest, now=START + MINUTE + offset))
    if offset < 0:
        assert isinstance(outcome, Repeated)
    else:
        assert outcome == Refused(CredentialExpired)
    assert await as_stored(store, session) == moved


@pytest.mark.parametrize("other", [None, b"", bytes(32)], ids=["none", "empty", "another"])
async def test_r32_a_retry_without_the_same_idempotency_key_is_reuse(store, key, other):
    session = await opened(store, key)
    await advanced(store, session, retry=os.urandom(32))
    assert isinstance(await store.advance_session(a_refresh(session, retry=other)), Condemned)


async def test_a_retry_of_a_refresh_that_had_no_idempotency_key_is_reuse(store, key):
    session = await opened(store, key)
    await advanced(store, session, retry=None)
    assert isinstance(await store.advance_session(a_refresh(session, retry=os.urandom(32))), Condemned)


async def test_r32_no_retry_once_the_successor_has_been_used(store, key):
    session = await opened(store, key)
    digest = os.urandom(32)
    moved = await advanced(store, session, retry=digest)
    await advanced(store, moved, retry=digest)
    assert isinstance(await store.advance_session(a_refresh(session, retry=digest)), Condemned)


@pytest.mark.parametrize("offset", AROUND)
async def test_sessions_end_with_the_overlap_of_their_rotated_key(store, key, offset):
    session = await opened(store, key)
    replacement = a_key()
    await store.roll_key(key.id, replacement, ends_at=START + DAY, now=START, by="test")
    outcome = await store.advance_session(a_refresh(session, now=START + DAY + offset))
    assert isinstance(outcome, Advanced) if offset < 0 else outcome == Refused(CredentialRotated)
    assert isinstance(await store.open_session(a_login(replacement)), Opened)


async def test_r27_what_ended_the_credential_ends_the_session(store, key, company_key):
    mine, its = await opened(store, key), await opened(store, company_key)
    await store.delete_company("acme-motors", company_key.company_id, now=START, by="test")
    assert await store.advance_session(a_refresh(its)) == Refused(CredentialRevoked)
    mine = await advanced(store, mine)
    await store.revoke_key(key.id, now=START, by="test")
    assert await store.advance_session(a_refresh(mine)) == Refused(CredentialRevoked)


async def test_r38_a_suspension_ends_sessions_for_good_and_those_of_companies_too(store, key, company_key):
    sessions = [await opened(store, key), await opened(store, company_key)]
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    for session in sessions:
        assert await store.advance_session(a_refresh(session)) == Refused(PartnerSuspended)
    await store.set_partner_status("acme-motors", PartnerStatus.ACTIVE, now=START, by="test")
    for session in sessions:
        assert await store.advance_session(a_refresh(session)) == Refused(CredentialRevoked)
        assert judge_session(await store.find_session(session.id), START) is CredentialRevoked


async def test_r38_a_deactivation_ends_sessions(store, key, company_key):
    sessions = [await opened(store, key), await opened(store, company_key)]
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    for session in sessions:
        assert await store.advance_session(a_refresh(session)) == Refused(CredentialRevoked)


async def test_what_happens_to_one_partner_leaves_another_alone(store, key):
    other_key = a_key("zeta")
    await store.add_partner(a_partner("zeta"), other_key, by="test")
    session = await opened(store, other_key)
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    await store.revoke_key(key.id, now=START, by="test")
    await advanced(store, session)


async def test_refreshes_of_many_sessions_in_one_batch_are_kept_apart(store, key):
    """Forty sessions, each token twice; every other pair carries an Idempotency-Key."""
    sessions = [await opened(store, key) for _ in range(40)]
    attempts = [a_refresh(session, retry=session.id * 2 if at % 2 else None) for at, session in enumerate(sessions)]
    outcomes = await asyncio.gather(*(store.advance_session(attempt) for attempt in attempts * 2))
    for at, (session, *both) in enumerate(zip(sessions, outcomes[:40], outcomes[40:], strict=True)):
        # Which of the two is first is up to the database, where that works at several batches.
        first, second = sorted(both, key=lambda outcome: not isinstance(outcome, Advanced))
        assert isinstance(first, Advanced)
        assert first.session.id == second.session.id == session.id
        assert isinstance(second, Repeated if at % 2 else Condemned)
        assert await as_stored(store, session) == second.session


async def test_a_poisoned_refresh_harms_nobody_but_its_caller(store, key):
    """A digest that is no bytes cannot be stored."""
    sessions = [await opened(store, key) for _ in range(9)]
    sick = await opened(store, key)
    attempts = [a_refresh(session) for session in sessions]
    attempts.insert(4, a_refresh(sick, retry="no bytes"))
    outcomes = await asyncio.gather(*(store.advance_session(attempt) for attempt in attempts), return_exceptions=True)
    poisoned = outcomes.pop(4)
    assert isinstance(poisoned, Exception)
    assert not isinstance(poisoned, Unavailable)
    assert all(isinstance(outcome, Advanced) for outcome in outcomes)
    assert await as_stored(store, sick) == sick


# --- find_session ---


async def test_sessions_are_found_each_by_its_own_id(store, key, company_key):
    sessions = [await opened(store, who) for who in (key, company_key, key)]
    found = await asyncio.gather(*(store.find_session(id_) for id_ in (sessions[2].id, NOBODY, sessions[0].id, sessions[2].id)))
    assert found[1] is None
    assert [one.session for one in found if one] == [sessions[2], sessions[0], sessions[2]]
    assert (await store.find_session(sessions[1].id)).standing.holder.company_id == company_key.company_id


async def test_a_session_is_found_with_its_credential_as_it_stands_now(store, key):
    session = await opened(store, key)
    await store.revoke_key(key.id, now=START + 3, by="test")
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    standing = (await store.find_session(session.id)).standing
    assert standing == await store.find_key(key.id)
    assert (standing.ends_at, standing.partner_status, standing.session_epoch) == (START + 3, PartnerStatus.SUSPENDED, 1)


# --- end_session ---


@pytest.mark.parametrize("cause", SessionEnd)
async def test_an_ended_session_refreshes_no_more(store, key, trail, cause):
    session = await opened(store, key)
    done = await store.end_session(session.id, cause=cause, now=START + 3, by="test")
    assert isinstance(done, Done)
    assert await as_stored(store, session) == changed(session, ended_at=START + 3, end_cause=cause)
    reason = RefreshTokenReused if cause is SessionEnd.REUSE else CredentialRevoked
    assert await store.advance_session(a_refresh(session)) == Refused(reason)
    assert await trail(session.id.hex()) == (["session"], [f"session.{cause}"])
    last = (await store.list_changes(after=done.sequence - 1, limit=10))[0]
    assert (last.sequence, last.subject, last.at) == (done.sequence, session.id.hex(), START + 3)


async def test_ending_a_session_twice_changes_nothing(store, key, trail):
    session = await opened(store, key)
    await store.end_session(session.id, cause=SessionEnd.LOGOUT, now=START + 3, by="test")
    ended = await as_stored(store, session)
    assert await store.end_session(session.id, cause=SessionEnd.REUSE, now=START + 4, by="test") is None
    assert await as_stored(store, session) == ended
    assert await trail(session.id.hex()) == (["session"], ["session.logout"])


async def test_ending_a_session_that_is_not_there_says_so(store, key, backend):
    before = backend.count("change"), backend.count("audit")
    assert await store.end_session(NOBODY, cause=SessionEnd.LOGOUT, now=START, by="test") is None
    assert (backend.count("change"), backend.count("audit")) == before


async def test_a_session_ends_alone(store, key):
    session, neighbour = await opened(store, key), await opened(store, key)
    await store.end_session(session.id, cause=SessionEnd.LOGOUT, now=START, by="test")
    await advanced(store, neighbour)


# --- purge_sessions ---


async def purged(store, ended_before, *, after=None, limit=100):
    return await store.purge_sessions(after=after, limit=limit, ended_before=ended_before)


async def _let_expire(store, session, key):
    pass  # it was opened so


async def _log_out(store, session, key):
    await store.end_session(session.id, cause=SessionEnd.LOGOUT, now=START + DAY, by="test")


async def _revoke(store, session, key):
    await store.revoke_key(key.id, now=START + DAY, by="test")


async def _rotate(store, session, key):
    await store.roll_key(key.id, a_key(), ends_at=START + DAY, now=START, by="test")


@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize(
    ("lifetimes", "end"),
    [
        ({"expires_at": START + DAY}, _let_expire),
        ({"expires_at": START + WEEK, "retires_at": START + DAY}, _let_expire),
        ({}, _log_out),
        ({}, _revoke),
        ({}, _rotate),
    ],
    ids=["expired", "retired", "ended", "key revoked", "key rotated"],
)
async def test_a_session_is_purged_from_the_moment_that_it_has_been_over_for_so_long(
    store, key, backend, lifetimes, end, offset
):
    neighbour_key = a_key("zeta")
    await store.add_partner(a_partner("zeta"), neighbour_key, by="test")
    session, neighbour = await opened(store, key, **lifetimes), await opened(store, neighbour_key)
    await end(store, session, key)
    gone = offset >= 0
    assert await purged(store, START + DAY + offset) == Purged(None, 1 if gone else 0)
    assert (await store.find_session(session.id) is None) is gone
    await advanced(store, neighbour)


async def test_a_purge_leaves_every_living_session_alone(store, key, company_key):
    sessions = [await opened(store, key), await opened(store, company_key)]
    assert await purged(store, START + WEEK - 1) == Purged(None, 0)
    for session in sessions:
        await advanced(store, session)


async def test_sessions_of_a_suspended_partner_stay_to_tell_why_and_go_when_it_is_over(store, key):
    session = await opened(store, key)
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    assert await purged(store, START) == Purged(None, 0)
    assert await store.advance_session(a_refresh(session)) == Refused(PartnerSuspended)
    await store.set_partner_status("acme-motors", PartnerStatus.ACTIVE, now=START, by="test")
    fresh = await opened(store, key)
    assert await purged(store, START) == Purged(None, 1)
    assert await store.find_session(session.id) is None
    await advanced(store, fresh)


async def test_sessions_of_a_deactivated_partner_go(store, key):
    await opened(store, key)
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    assert await purged(store, START) == Purged(None, 1)


async def test_a_purge_walks_in_slices_by_id_and_sees_each_session_once(store, key, backend):
    logins = [a_login(key, now=START + at, expires_at=START + (DAY if at % 3 else WEEK)) for at in range(10)]
    for login in logins:
        await store.open_session(login)
    ids = sorted(login.session_id for login in logins)
    first = await purged(store, START + DAY, limit=4)
    assert first == Purged(ids[3], 2)
    second = await purged(store, START + DAY, after=first.after, limit=4)
    assert second == Purged(ids[7], 3)
    assert await purged(store, START + DAY, after=second.after, limit=4) == Purged(None, 1)
    assert backend.count("session") == 4
    assert {id_ for id_ in ids if await store.find_session(id_)} == {
        login.session_id for login in logins if login.expires_at == START + WEEK
    }


async def test_a_purge_of_nothing_is_at_the_end(store):
    assert await purged(store, START) == Purged(None, 0)


async def test_a_purged_session_does_not_come_back(store, key):
    session = await opened(store, key, expires_at=START + 1)
    await purged(store, START + DAY)
    assert await store.advance_session(a_refresh(session)) == Refused(CredentialExpired)
    assert await store.find_session(session.id) is None
