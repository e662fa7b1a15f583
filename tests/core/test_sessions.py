"""Log in, refresh, log out, over a real database: what is handed out, and what is refused."""

import asyncio
import base64
import json
import re

import pytest
from given import AROUND, START

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    Unavailable,
    WrongEnvironment,
)
from gatelodge.tokens import TokenRules, read_unverified
from gatelodge.verify import Verifier
from gatelodge_server.core.ids import api_key
from gatelodge_server.core.model import DAY, HOUR, MINUTE, SECOND, CompanyDetails
from gatelodge_server.core.refusals import RefreshTokenReused
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.sessions import SessionLifetimes

ISSUER, AUDIENCE = "https://uat.example.com", "partner-api-uat"
DETAILS = CompanyDetails(company_name="Müller GmbH", country="DE", tax_number="12/345/67890")


def claims_of(tokens):
    payload = tokens.jwt.reveal().split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


async def verified(lodge, tokens):
    """Who presents the JWT, as a service behind the gate would see it."""
    rules = TokenRules.for_sessions(issuer=ISSUER, audience=AUDIENCE)
    verifier = Verifier(lodge.signing_keys, rules, clock=lambda: lodge.clock.now / SECOND)
    return await verifier.verify_async(tokens.jwt.reveal())


@pytest.fixture
async def key(lodge):
    """The API key of the partner ``acme-motors``."""
    return (await lodge.new_partner())[1]


async def refreshed(lodge, tokens, *, idempotency_key=None):
    return await lodge.sessions.refresh(tokens.refresh_token, idempotency_key=idempotency_key)


# --- What is handed out ---


async def test_r13_the_claims_of_a_partners_session_are_these_and_no_others(lodge, key):
    lodge.clock.forward(199)
    tokens = await lodge.sessions.log_in(key)
    claims = claims_of(tokens)
    token_id = claims.pop("jti")
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", token_id)
    assert claims == {
        "iss": ISSUER,
        "sub": "acme-motors",
        "aud": AUDIENCE,
        "iat": START // SECOND,
        "exp": START // SECOND + 86_400,
        "client_id": tokens.holder.credential_id,
        "sid": tokens.session_id.hex(),
        "env": "uat",
        "kind": "partner",
        "partner": "acme-motors",
        "tier": "starter",
        "scope": "api companies",
        "epoch": 0,
    }
    assert read_unverified(tokens.jwt.reveal()).type == "at+jwt"


async def test_r13_the_claims_of_a_companys_session_name_the_company(lodge, key):
    company = await lodge.companies.create("acme-motors", DETAILS, idempotency_key=None)
    claims = claims_of(await lodge.sessions.log_in(company.api_key))
    assert claims["sub"] == claims["company"] == str(company.company_id)
    assert (claims["partner"], claims["kind"], claims["scope"]) == ("acme-motors", "company", "api")


async def test_the_jwt_expires_at_its_announced_second(lodge, key):
    lodge.clock.forward(199)
    tokens = await lodge.sessions.log_in(key)
    assert tokens.jwt_expires_at == claims_of(tokens)["exp"] * SECOND
    assert START + DAY <= tokens.jwt_expires_at <= lodge.clock.now + DAY
    for offset in AROUND:
        lodge.clock.now = tokens.jwt_expires_at + offset * SECOND
        if offset < 0:
            assert (await verified(lodge, tokens)).partner == "acme-motors"
        else:
            with pytest.raises(CredentialExpired):
                await verified(lodge, tokens)


async def test_r28_the_refresh_token_expires_as_announced(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    assert tokens.refresh_expires_at == START + 30 * DAY
    lodge.clock.now = tokens.refresh_expires_at - 1
    tokens = await refreshed(lodge, tokens)
    assert tokens.refresh_expires_at == START + 60 * DAY - 1
    lodge.clock.now = tokens.refresh_expires_at
    with pytest.raises(CredentialExpired):
        await refreshed(lodge, tokens)


async def test_r28_no_session_is_kept_alive_for_longer_than_it_may(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    retires = START + SessionLifetimes().session_ttl
    while (lodge.clock.now + 20 * DAY) < retires:
        lodge.clock.forward(20 * DAY)
        tokens = await refreshed(lodge, tokens)
    lodge.clock.now = retires - HOUR
    tokens = await refreshed(lodge, tokens)
    assert tokens.refresh_expires_at == tokens.jwt_expires_at == retires
    lodge.clock.now = retires
    with pytest.raises(CredentialExpired):
        await refreshed(lodge, tokens)


async def test_the_service_behind_the_gate_sees_whose_session_it_is(lodge, key):
    caller = await verified(lodge, await lodge.sessions.log_in(key))
    assert (caller.partner, caller.company, caller.tier, caller.environment) == ("acme-motors", None, "starter", "uat")
    assert caller.scopes == {"api", "companies"}


async def test_r23_a_refresh_gives_all_four_fields_anew(lodge, key):
    first = await lodge.sessions.log_in(key)
    lodge.clock.forward(SECOND)
    second = await refreshed(lodge, first)
    assert second.jwt.reveal() != first.jwt.reveal()
    assert second.refresh_token.reveal() != first.refresh_token.reveal()
    assert second.jwt_expires_at == first.jwt_expires_at + SECOND
    assert second.refresh_expires_at == first.refresh_expires_at + SECOND
    assert claims_of(second)["sid"] == claims_of(first)["sid"]
    assert claims_of(second)["jti"] != claims_of(first)["jti"]


async def test_r13_every_jwt_has_an_id_of_its_own(lodge, key):
    logins = await asyncio.gather(*(lodge.sessions.log_in(key) for _ in range(100)))
    assert len({claims_of(tokens)["jti"] for tokens in logins}) == 100
    assert len({tokens.session_id for tokens in logins}) == 100


async def test_a_thousand_refreshes_leave_one_row(lodge, key):
    logins = await asyncio.gather(*(lodge.sessions.log_in(key) for _ in range(20)))
    rows = [lodge.backend.count(table) for table in ("session", "change", "audit", "replay")]
    for _ in range(50):
        logins = await asyncio.gather(*(refreshed(lodge, tokens) for tokens in logins))
    assert [lodge.backend.count(table) for table in ("session", "change", "audit", "replay")] == rows


async def test_an_operation_reads_the_clock_once(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    for operation in (
        lambda: lodge.sessions.log_in(key),
        lambda: refreshed(lodge, tokens),
        lambda: lodge.sessions.authenticate(tokens.session_id),
        lambda: lodge.sessions.end(tokens.session_id),
    ):
        before = lodge.clock.reads
        await operation()
        assert lodge.clock.reads - before == 1


# --- What is refused ---


async def test_a_key_that_is_none_is_refused_without_asking_the_store(lodge, key):
    text = key.reveal()
    lodge.store.asked.clear()
    for wrong in ("", text[:-1], text + "x", text[:-1] + ("0" if text[-1] != "0" else "1"), "Bearer " + text):
        with pytest.raises(InvalidCredential):
            await lodge.sessions.log_in(Secret(wrong))
    with pytest.raises(InvalidCredential):
        await lodge.sessions.log_in(Secret(api_key("other", "uat", "pk", bytes).text))
    with pytest.raises(WrongEnvironment):
        await lodge.sessions.log_in(Secret(api_key("gatelodge", "production", "pk", bytes).text))
    assert lodge.store.asked == []


async def test_a_well_formed_key_that_nobody_has_is_refused(lodge, key):
    with pytest.raises(InvalidCredential):
        await lodge.sessions.log_in(Secret(api_key("gatelodge", "uat", "pk", bytes).text))


async def test_a_forged_refresh_token_is_refused_without_asking_the_store(lodge, key):
    text = (await lodge.sessions.log_in(key)).refresh_token.reveal()
    lodge.store.asked.clear()
    forged = Secret(text[:-1] + ("A" if text[-1] != "A" else "B"))
    for present in (lambda: lodge.sessions.refresh(forged, idempotency_key=None), lambda: lodge.sessions.log_out(forged)):
        with pytest.raises(InvalidCredential):
            await present()
    assert lodge.store.asked == []


async def test_r24_a_spent_token_ends_the_session(lodge, key):
    first = await lodge.sessions.log_in(key)
    second = await refreshed(lodge, first)
    for tokens in (first, second, first):
        with pytest.raises(RefreshTokenReused):
            await refreshed(lodge, tokens)
    with pytest.raises(CredentialRevoked):
        await lodge.sessions.authenticate(first.session_id)


async def test_a_token_from_a_lost_future_is_refused_and_ends_the_session(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    future = lodge.refresh_tokens.write(tokens.session_id, 1)
    for token in (future, tokens.refresh_token):
        with pytest.raises(CredentialRevoked):
            await lodge.sessions.refresh(token, idempotency_key=None)


async def test_r32_a_retry_gets_the_same_refresh_token_and_a_fresh_jwt(lodge, key):
    first = await lodge.sessions.log_in(key)
    second = await refreshed(lodge, first, idempotency_key="once")
    lodge.clock.forward(MINUTE - 1)
    again = await refreshed(lodge, first, idempotency_key="once")
    assert again.refresh_token.reveal() == second.refresh_token.reveal()
    assert again.refresh_expires_at == second.refresh_expires_at
    assert claims_of(again)["jti"] != claims_of(second)["jti"]
    await refreshed(lodge, again)


@pytest.mark.parametrize("other", [None, "twice", "ONCE", "once "])
async def test_r32_a_retry_with_another_idempotency_key_is_reuse(lodge, key, other):
    first = await lodge.sessions.log_in(key)
    await refreshed(lodge, first, idempotency_key="once")
    with pytest.raises(RefreshTokenReused):
        await refreshed(lodge, first, idempotency_key=other)


async def test_an_idempotency_key_is_not_stored_as_it_is(lodge, key):
    first = await lodge.sessions.log_in(key)
    await refreshed(lodge, first, idempotency_key="the-key-of-this-refresh")
    session = (await lodge.store.find_session(first.session_id)).session
    assert len(session.retry_digest) == 32
    other = await lodge.sessions.log_in(key)
    await refreshed(lodge, other, idempotency_key="the-key-of-this-refresh")
    assert (await lodge.store.find_session(other.session_id)).session.retry_digest != session.retry_digest


@pytest.mark.parametrize("spent", [False, True])
async def test_a_logout_ends_the_session_with_any_of_its_tokens(lodge, key, spent):
    first = await lodge.sessions.log_in(key)
    second = await refreshed(lodge, first)
    await lodge.sessions.log_out((first if spent else second).refresh_token)
    await lodge.sessions.log_out(second.refresh_token)
    with pytest.raises(CredentialRevoked):
        await refreshed(lodge, second)
    with pytest.raises(CredentialRevoked):
        await lodge.sessions.authenticate(second.session_id)


async def test_a_session_says_whose_it_is_for_as_long_as_it_stands(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    assert await lodge.sessions.authenticate(tokens.session_id) == tokens.holder
    with pytest.raises(CredentialRevoked):
        await lodge.sessions.authenticate(bytes(16))


async def test_r38_what_happens_to_the_partner_or_the_key_is_told_on_its_sessions(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    await lodge.partners.suspend("acme-motors", by="test")
    for refusal in (lodge.sessions.authenticate(tokens.session_id), refreshed(lodge, tokens), lodge.sessions.log_in(key)):
        with pytest.raises(PartnerSuspended):
            await refusal
    await lodge.partners.resume("acme-motors", by="test")
    with pytest.raises(CredentialRevoked):
        await lodge.sessions.authenticate(tokens.session_id)
    tokens = await lodge.sessions.log_in(key)
    await lodge.credentials.rotate(tokens.holder.credential_id, overlap=0, by="test")
    for refusal in (lodge.sessions.authenticate(tokens.session_id), refreshed(lodge, tokens), lodge.sessions.log_in(key)):
        with pytest.raises(CredentialRotated):
            await refusal


async def test_r35_without_a_store_nothing_is_handed_out_and_nothing_acknowledged(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    lodge.store.cut_by = Unavailable()
    for refusal in (
        lodge.sessions.log_in(key),
        refreshed(lodge, tokens),
        lodge.sessions.log_out(tokens.refresh_token),
        lodge.sessions.authenticate(tokens.session_id),
    ):
        with pytest.raises(Unavailable):
            await refusal
    lodge.store.cut_by = None
    await refreshed(lodge, tokens)


async def test_r69_what_is_handed_out_shows_none_of_it(lodge, key):
    tokens = await lodge.sessions.log_in(key)
    for secret in (tokens.jwt, tokens.refresh_token):
        assert secret.reveal() not in repr(tokens)
