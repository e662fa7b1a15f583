"""The judgements, as tables: who may come in with a key, on a session, with a refresh token."""

from uuid import UUID

import pytest
from given import AROUND, START, a_refresh, changed
from hypothesis import given
from hypothesis import strategies as st

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
)
from gatelodge_server.core.credentials import judge_key, judge_standing
from gatelodge_server.core.model import DAY, MINUTE, EndCause, Holder, PartnerStatus, Session, SessionEnd, Standing
from gatelodge_server.core.ports import Advanced, Condemned, Refused, Repeated, SessionStanding
from gatelodge_server.core.refusals import RefreshTokenReused
from gatelodge_server.core.sessions import RETRY_WINDOW, judge_refresh, judge_session

DIGEST, RETRY = bytes(range(100, 132)), bytes(range(200, 232))
LIVE = Standing(
    holder=Holder("acme-motors", None, "starter", "k3yk3yk3yk3y"),
    digest=DIGEST,
    ends_at=None,
    end_cause=None,
    partner_status=PartnerStatus.ACTIVE,
    session_epoch=3,
    company_gone=False,
)
SESSION = Session(
    id=bytes(range(16)),
    credential_id="k3yk3yk3yk3y",
    epoch=3,
    generation=5,
    started_at=START - DAY,
    rotated_at=START,
    expires_at=START + 7 * DAY,
    retires_at=START + 9 * DAY,
    retry_digest=RETRY,
)
ENDED = {"ends_at": START}


def found(session=SESSION, standing=LIVE):
    return SessionStanding(session, standing)


# --- Standing and key ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"ends_at": START + 1, "end_cause": EndCause.ROTATED}, None),
        # Revoked is revoked, even if the clock has been set back behind the moment of it.
        ({"ends_at": START + 1, "end_cause": EndCause.REVOKED}, CredentialRevoked),
        # And so is what was rotated without an overlap. An overlap ends by the clock.
        ({"ends_at": START + 9, "rotated_at": START + 8, "end_cause": EndCause.ROTATED}, None),
        ({"ends_at": START + 9, "rotated_at": START + 9, "end_cause": EndCause.ROTATED}, CredentialRotated),
        ({"ends_at": START + 9, "rotated_at": START + 10, "end_cause": EndCause.ROTATED}, CredentialRotated),
        (ENDED | {"end_cause": EndCause.EXPIRED}, CredentialExpired),
        (ENDED | {"end_cause": EndCause.ROTATED}, CredentialRotated),
        (ENDED | {"end_cause": EndCause.REVOKED}, CredentialRevoked),
        (ENDED | {"end_cause": None}, CredentialRevoked),
        ({"company_gone": True}, CredentialRevoked),
        ({"partner_status": PartnerStatus.SUSPENDED}, PartnerSuspended),
        ({"partner_status": PartnerStatus.DEACTIVATED}, CredentialRevoked),
        # Of several reasons the one that no resumption undoes.
        (ENDED | {"end_cause": EndCause.ROTATED, "partner_status": PartnerStatus.SUSPENDED}, CredentialRotated),
        ({"company_gone": True, "partner_status": PartnerStatus.SUSPENDED}, CredentialRevoked),
        ({"session_epoch": 4}, None),
    ],
)
def test_a_standing_is_judged(changes, reason):
    assert judge_standing(changed(LIVE, **changes), START) is reason
    assert judge_key(changed(LIVE, **changes), DIGEST, START) is reason


@pytest.mark.parametrize("cause", [EndCause.EXPIRED, EndCause.ROTATED])
@pytest.mark.parametrize("offset", AROUND)
def test_a_key_works_until_just_before_it_ends(cause, offset):
    ending = changed(LIVE, ends_at=START, end_cause=cause)
    assert (judge_standing(ending, START + offset) is None) is (offset < 0)


@pytest.mark.parametrize("changes", [{}, ENDED, {"partner_status": PartnerStatus.SUSPENDED}, {"company_gone": True}])
@pytest.mark.parametrize("digest", [bytes(32), b"", DIGEST[:-1], DIGEST + b"\0", DIGEST[:-1] + bytes([DIGEST[-1] ^ 1])])
def test_without_the_right_digest_a_key_is_invalid_and_nothing_else(changes, digest):
    assert judge_key(changed(LIVE, **changes), digest, START) is InvalidCredential


@pytest.mark.parametrize("digest", [bytes(32), b"", DIGEST])
def test_a_key_that_nobody_has_is_invalid_whatever_its_digest(digest):
    assert judge_key(None, digest, START) is InvalidCredential


def test_the_kind_of_a_holder_follows_from_its_company():
    assert LIVE.holder.kind == "partner"
    assert changed(LIVE.holder, company_id=UUID(int=7)).kind == "company"


# --- Session ---


@pytest.mark.parametrize(
    ("of_session", "of_standing", "reason"),
    [
        ({}, {}, None),
        ({"ended_at": START, "end_cause": SessionEnd.LOGOUT}, {}, CredentialRevoked),
        ({"ended_at": START, "end_cause": SessionEnd.RESTORED}, {}, CredentialRevoked),
        ({"ended_at": START, "end_cause": SessionEnd.REUSE}, {}, RefreshTokenReused),
        ({"ended_at": START + DAY, "end_cause": SessionEnd.LOGOUT}, {}, CredentialRevoked),
        ({"epoch": 2}, {}, CredentialRevoked),
        ({"epoch": 4}, {}, CredentialRevoked),
        ({"epoch": 2}, {"partner_status": PartnerStatus.SUSPENDED}, PartnerSuspended),
        ({}, {"partner_status": PartnerStatus.SUSPENDED}, PartnerSuspended),
        ({}, {"partner_status": PartnerStatus.DEACTIVATED}, CredentialRevoked),
        ({}, {"company_gone": True}, CredentialRevoked),
        ({}, ENDED | {"end_cause": EndCause.ROTATED}, CredentialRotated),
        ({}, ENDED | {"end_cause": EndCause.EXPIRED}, CredentialExpired),
        ({}, {"ends_at": START + 1, "end_cause": EndCause.ROTATED}, None),
        # Whether its refresh token has expired is no matter of the session JWT, which has an end of its own.
        ({"expires_at": START}, {}, None),
    ],
)
def test_a_session_is_judged(of_session, of_standing, reason):
    assert judge_session(found(changed(SESSION, **of_session), changed(LIVE, **of_standing)), START) is reason


# --- Refresh ---


def test_the_present_token_moves_the_session_on():
    attempt = a_refresh(SESSION, retry=b"\1" * 32, now=START + 5, expires_at=START + 8 * DAY)
    assert judge_refresh(found(), attempt) == Advanced(
        changed(SESSION, generation=6, rotated_at=START + 5, expires_at=START + 8 * DAY, retry_digest=b"\1" * 32), LIVE.holder
    )


@pytest.mark.parametrize("offset", AROUND)
def test_r28_the_successor_never_outlives_the_session(offset):
    attempt = a_refresh(SESSION, expires_at=SESSION.retires_at + offset)
    assert judge_refresh(found(), attempt).session.expires_at == SESSION.retires_at + min(offset, 0)


@pytest.mark.parametrize("field", ["expires_at", "retires_at"])
@pytest.mark.parametrize("offset", AROUND)
def test_r28_on_or_after_its_end_a_token_has_expired(field, offset):
    session = changed(SESSION, **{field: START})
    outcome = judge_refresh(found(session), a_refresh(session, now=START + offset))
    assert isinstance(outcome, Advanced) if offset < 0 else outcome == Refused(CredentialExpired)


@pytest.mark.parametrize(
    ("generation", "retry", "later", "kind"),
    [
        (5, None, 0, Advanced),
        (5, RETRY, 0, Advanced),
        (4, RETRY, 0, Repeated),
        (4, RETRY, RETRY_WINDOW - 1, Repeated),
        (4, RETRY, RETRY_WINDOW, Condemned),
        (4, RETRY, RETRY_WINDOW + 1, Condemned),
        (4, RETRY, -DAY, Repeated),
        (4, None, 0, Condemned),
        (4, bytes(32), 0, Condemned),
        (4, RETRY[:-1], 0, Condemned),
        (3, RETRY, 0, Condemned),
        (0, RETRY, 0, Condemned),
        (6, RETRY, 0, Condemned),
        (6, None, 0, Condemned),
        (2**40 - 1, None, 0, Condemned),
    ],
)
def test_a_token_of_another_generation_is_a_retry_or_ends_the_session(generation, retry, later, kind):
    attempt = a_refresh(SESSION, generation=generation, retry=retry, now=START + later)
    outcome = judge_refresh(found(), attempt)
    assert type(outcome) is kind
    if kind is Repeated:
        assert outcome == Repeated(SESSION, LIVE.holder)
    if kind is Condemned:
        cause = SessionEnd.REUSE if generation < 5 else SessionEnd.RESTORED
        assert outcome == Condemned(changed(SESSION, ended_at=START + later, end_cause=cause), cause)


def test_no_idempotency_key_is_not_the_same_as_none_before():
    session = changed(SESSION, retry_digest=None)
    assert isinstance(judge_refresh(found(session), a_refresh(session, generation=4, retry=None)), Condemned)


@pytest.mark.parametrize("generation", [4, 5, 6])
@pytest.mark.parametrize(
    ("of_session", "of_standing", "reason"),
    [
        ({"ended_at": START, "end_cause": SessionEnd.LOGOUT}, {}, CredentialRevoked),
        ({"ended_at": START, "end_cause": SessionEnd.REUSE}, {}, RefreshTokenReused),
        ({"epoch": 2}, {}, CredentialRevoked),
        ({}, {"partner_status": PartnerStatus.SUSPENDED}, PartnerSuspended),
        ({}, ENDED | {"end_cause": EndCause.REVOKED}, CredentialRevoked),
    ],
)
def test_r27_no_token_of_any_generation_is_good_on_a_dead_session(generation, of_session, of_standing, reason):
    dead = found(changed(SESSION, **of_session), changed(LIVE, **of_standing))
    assert judge_refresh(dead, a_refresh(SESSION, generation=generation, retry=RETRY)) == Refused(reason)


def test_a_session_that_is_not_there_any_more_has_expired():
    assert judge_refresh(None, a_refresh(SESSION)) == Refused(CredentialExpired)


def test_r24_reuse_is_reuse_even_when_the_session_has_expired():
    outcome = judge_refresh(found(), a_refresh(SESSION, generation=4, now=SESSION.retires_at + DAY))
    assert isinstance(outcome, Condemned)


@given(
    generations=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 2 * MINUTE)), max_size=30),
)
def test_r25_however_tokens_are_presented_no_generation_wins_twice_and_the_dead_stay_dead(generations):
    session, now = changed(SESSION, generation=0, retry_digest=None), START
    won, dead = set(), False
    for generation, with_key, later in generations:
        now += later
        outcome = judge_refresh(
            found(session), a_refresh(session, generation=generation, retry=RETRY if with_key else None, now=now)
        )
        match outcome:
            case Advanced(moved, _):
                assert not dead
                assert generation not in won
                assert moved.generation == generation + 1
                won.add(generation)
                session = moved
            case Repeated(same, _):
                assert not dead
                assert same is session
                assert generation in won
            case Condemned(ended, _):
                assert not dead
                session, dead = ended, True
            case Refused():
                assert dead
