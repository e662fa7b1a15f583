"""Access tokens: what they say, who may come in with them, and what their rotation does to everybody else."""

import asyncio
import json
import os
import re
from dataclasses import replace
from itertools import count

import pytest
from given import AROUND, START, a_token
from sqlalchemy import insert

from gatelodge.errors import (
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    Unavailable,
    WrongEnvironment,
)
from gatelodge.strict import decode_base64url
from gatelodge.tokens import TokenRules, read_unverified, verify_token
from gatelodge_server.core.access_tokens import AccessTokens, digest_token, judge_token
from gatelodge_server.core.credentials import credential_status
from gatelodge_server.core.housekeeping import Housekeeping
from gatelodge_server.core.model import DAY, HOUR, SECOND, EndCause, PartnerStatus
from gatelodge_server.core.refusals import PartnerDeactivated, PartnerNotFound, TokenEnded, TokenNotFound
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.signing import GRACE, KEY_SET_MAX_AGE, RING_MAX_AGE
from gatelodge_server.store.tables import access_token, partner

ISSUER, AUDIENCE = "https://uat.example.com", "partner-api-uat"
RULES = TokenRules.for_access_tokens(issuer=ISSUER, audience=AUDIENCE, other_issuers=frozenset({"https://api.example.com"}))


@pytest.fixture
async def acme(lodge):
    """The id of a partner."""
    id_, _ = await lodge.new_partner()
    return id_


async def issue(lodge, partner_id, label="Plans"):
    return await lodge.access_tokens.issue(partner_id, label=label, by="test")


async def claims_of(lodge, text, rules=RULES):
    """What a gate reads: the signature is checked with the ring for access tokens."""
    token = read_unverified(text.reveal())
    key = await lodge.access_keys.find_async(token.kid)
    return verify_token(token, key=key, rules=rules, now=lodge.clock.now / SECOND)


async def verdict(lodge, text):
    """With what the presenter of a token is refused; ``None`` if it may come in."""
    claims = await claims_of(lodge, text)
    return judge_token(await lodge.store.find_token(claims["jti"]), digest_token(text), lodge.clock.now)


# --- What a token says ---


async def test_a_token_says_who_it_is_for_and_does_not_expire(lodge, acme):
    issued = await issue(lodge, acme)
    header, claims, _ = issued.text.reveal().split(".")
    (current,) = [key.kid for key in await lodge.access_keys.list_keys() if key.state(START) == "current"]
    assert json.loads(decode_base64url(header)) == {"alg": "ES256", "kid": current, "typ": "JWT"}
    assert json.loads(decode_base64url(claims)) == {
        "iss": ISSUER,
        "sub": acme,
        "aud": AUDIENCE,
        "iat": START // SECOND,
        "jti": issued.token.id,
        "env": "uat",
        "kind": "partner",
        "partner": acme,
        "scope": "api",
    }
    assert (issued.token.kid, issued.token.version, issued.token.lineage_id) == (current, 1, issued.token.id)
    assert await lodge.store.get_token(issued.token.id) == issued.token


async def test_a_tokens_id_can_be_typed_as_an_argument(lodge, acme):
    for _ in range(50):
        assert re.fullmatch(r"[0-9A-Za-z]{22}", (await issue(lodge, acme)).token.id)


async def test_the_text_is_kept_as_a_digest_only(lodge, acme):
    issued = await issue(lodge, acme)
    text = issued.text.reveal()
    assert text not in repr(issued)
    for part in (text, text.split(".")[2]):
        for file in lodge.backend.path.parent.glob("gatelodge.db*"):
            assert part.encode() not in file.read_bytes()


async def test_two_tokens_of_one_moment_are_two(lodge, acme):
    first, second = await issue(lodge, acme), await issue(lodge, acme)
    assert first.token.id != second.token.id
    assert first.token.digest != second.token.digest


async def test_r11_a_token_of_one_environment_is_refused_in_the_other(lodge, acme):
    issued = await issue(lodge, acme)
    elsewhere = TokenRules.for_access_tokens(issuer="https://api.example.com", audience="partner-api")
    with pytest.raises(InvalidCredential):
        await claims_of(lodge, issued.text, elsewhere)
    with pytest.raises(WrongEnvironment):
        await claims_of(lodge, issued.text, replace(elsewhere, other_issuers=frozenset({ISSUER})))


@pytest.mark.parametrize("change", [{"issuer": ISSUER + "/"}, {"issuer": ISSUER.upper()}, {"audience": AUDIENCE + "x"}])
async def test_r10_issuer_and_audience_are_compared_exactly(lodge, acme, change):
    issued = await issue(lodge, acme)
    with pytest.raises(InvalidCredential):
        await claims_of(lodge, issued.text, replace(RULES, **change))


async def test_r9_a_session_jwt_and_an_access_token_never_pass_for_one_another(lodge, acme):
    _, key = await lodge.new_partner("Other")
    session = (await lodge.sessions.log_in(key)).jwt
    access = (await issue(lodge, acme)).text
    sessions = TokenRules.for_sessions(issuer=ISSUER, audience=AUDIENCE)
    for text, rules, ring in ((session, RULES, lodge.signing_keys), (access, sessions, lodge.access_keys)):
        token = read_unverified(text.reveal())
        genuine = await ring.find_async(token.kid)
        assert genuine is not None
        with pytest.raises(InvalidCredential):  # even with the right key: the type excludes it
            verify_token(token, key=genuine, rules=rules, now=START / SECOND)
    assert await lodge.access_keys.find_async(read_unverified(session.reveal()).kid) is None
    assert await lodge.signing_keys.find_async(read_unverified(access.reveal()).kid) is None


# --- Who may come in ---


async def test_a_token_works_on_and_on(lodge, acme):
    issued = await issue(lodge, acme)
    for _ in range(5):
        assert await verdict(lodge, issued.text) is None
        lodge.clock.forward(400 * DAY)


async def test_a_token_that_was_signed_but_never_issued_is_invalid(lodge, acme):
    issued = await issue(lodge, acme)
    standing = await lodge.store.find_token(issued.token.id)
    assert judge_token(None, issued.token.digest, START) is InvalidCredential
    assert judge_token(standing, os.urandom(32), START) is InvalidCredential
    signer = await lodge.access_keys.signer(START)
    twin = Secret(signer.sign(await claims_of(lodge, issued.text), typ="JWT"))
    assert (await claims_of(lodge, twin))["jti"] == issued.token.id
    assert await verdict(lodge, twin) is InvalidCredential  # the same claims, another signature
    assert await verdict(lodge, issued.text) is None


async def test_r38_r39_what_happens_to_the_partner_happens_to_its_tokens_at_once(lodge, acme):
    issued = await issue(lodge, acme)
    for change, expected in (
        (lodge.partners.suspend, PartnerSuspended),
        (lodge.partners.resume, None),
        (lodge.partners.deactivate, CredentialRevoked),
    ):
        await change(acme, by="test")
        assert await verdict(lodge, issued.text) is expected


@pytest.mark.parametrize("offset", AROUND)
async def test_r40_a_rotation_lets_the_old_version_work_for_the_overlap(lodge, acme, offset):
    old = await issue(lodge, acme)
    lodge.clock.forward(DAY)
    new = await lodge.access_tokens.rotate(old.token.id, overlap=HOUR, by="test")
    assert (new.token.version, new.token.lineage_id, new.token.label) == (2, old.token.id, "Plans")
    lodge.clock.forward(HOUR + offset)
    assert await verdict(lodge, old.text) is (None if offset < 0 else CredentialRotated)
    assert await verdict(lodge, new.text) is None
    first = await lodge.store.get_token(old.token.id)
    assert (first.rotated_at, first.ends_at) == (START + DAY, START + DAY + HOUR)
    assert credential_status(first, lodge.clock.now) == ("active" if offset < 0 else "rotated")


async def test_a_revocation_is_for_good_whatever_the_clock_says(lodge, acme):
    issued = await issue(lodge, acme)
    await lodge.access_tokens.rotate(issued.token.id, overlap=HOUR, by="test")
    assert await lodge.access_tokens.revoke(issued.token.id, by="test") > 0
    for moved in (0, -DAY, 2 * DAY):
        lodge.clock.forward(moved)
        assert await verdict(lodge, issued.text) is CredentialRevoked
        assert credential_status(await lodge.store.get_token(issued.token.id), lodge.clock.now) == "revoked"


async def test_the_versions_of_a_token_are_told_by_any_of_them(lodge, acme):
    first = await issue(lodge, acme)
    await issue(lodge, acme, "Another")
    second = await lodge.access_tokens.rotate(first.token.id, overlap=HOUR, by="test")
    third = await lodge.access_tokens.rotate(second.token.id, overlap=0, by="test")
    for one in (first, second, third):
        versions = await lodge.access_tokens.versions(one.token.id)
        assert [version.id for version in versions] == [each.token.id for each in (third, second, first)]
        assert [version.version for version in versions] == [3, 2, 1]
    assert len(await lodge.access_tokens.list_for(acme)) == 4


async def test_what_cannot_be_done_says_why(lodge, acme):
    tokens, issued = lodge.access_tokens, await issue(lodge, acme)
    await tokens.rotate(issued.token.id, overlap=HOUR, by="test")
    for reason, work in (
        (PartnerNotFound, lambda: issue(lodge, "nobody")),
        (PartnerNotFound, lambda: tokens.list_for("nobody")),
        (TokenNotFound, lambda: tokens.versions("nobody")),
        (TokenNotFound, lambda: tokens.rotate("nobody", overlap=0, by="test")),
        (TokenNotFound, lambda: tokens.revoke("nobody", by="test")),
        (TokenEnded, lambda: tokens.rotate(issued.token.id, overlap=0, by="test")),
    ):
        with pytest.raises(reason):
            await work()
    await lodge.partners.deactivate(acme, by="test")
    with pytest.raises(PartnerDeactivated):
        await issue(lodge, acme)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({}, ("active", "active", "active")),
        ({"ends_at": START, "end_cause": EndCause.ROTATED}, ("active", "rotated", "rotated")),
        ({"ends_at": START, "end_cause": EndCause.REVOKED}, ("revoked", "revoked", "revoked")),
    ],
)
def test_the_status_of_a_token_follows_from_its_end(end, expected):
    token = a_token("kid", **end)
    assert tuple(credential_status(token, START + offset) for offset in AROUND) == expected


# --- The ring ---


async def test_a_key_that_was_retired_since_the_ring_was_read_issues_nothing(lodge, acme):
    """For a second a node does not know of it yet: the store does."""
    await lodge.access_keys.signer(START)
    (kid,) = [key.kid for key in await lodge.access_keys.list_keys() if key.state(START) == "current"]
    await lodge.access_keys.rotate(by="test")
    await lodge.access_keys.retire(kid, by="test")
    with pytest.raises(Unavailable):
        await issue(lodge, acme)
    assert await lodge.access_tokens.list_for(acme) == []
    lodge.monotonic.now += RING_MAX_AGE
    assert (await issue(lodge, acme)).token.kid != kid


async def test_r20_tokens_outlive_the_rotation_of_their_key_and_the_key_goes_after_the_last_of_them(lodge, acme):
    keeper = Housekeeping(store=lodge.store, clock=lodge.clock, on_purged=print, on_mistake=print)
    old = await issue(lodge, acme)
    lodge.clock.forward(KEY_SET_MAX_AGE)
    assert (await lodge.access_keys.rotate(by="test")).signs_from == lodge.clock.now
    lodge.monotonic.now += RING_MAX_AGE
    for _ in range(3):
        lodge.clock.forward(999 * DAY)
        await keeper.go_round()
        lodge.monotonic.now += RING_MAX_AGE
        assert await verdict(lodge, old.text) is None
    new = await lodge.access_tokens.rotate(old.token.id, overlap=HOUR, by="test")
    assert new.token.kid != old.token.kid
    lodge.clock.forward(HOUR)
    await keeper.go_round()
    lodge.monotonic.now += RING_MAX_AGE
    published = {jwk["kid"] for jwk in await lodge.access_keys.key_set()}
    assert old.token.kid not in published
    assert new.token.kid in published
    assert await lodge.access_keys.count_live_tokens() == {new.token.kid: 1}
    assert await verdict(lodge, new.text) is None


PARTNERS = 10_000


async def test_with_ten_thousand_partners_a_new_signing_key_and_a_revocation_are_noticed_by_nobody_else(lodge):
    """Every token works on after a rotation of the keys; of a revocation only the token that it names hears."""
    await lodge.new_partner()
    signer = await lodge.access_keys.signer(START)
    numbers = count()
    source = AccessTokens(
        store=lodge.store,
        signing_keys=lodge.access_keys,
        clock=lodge.clock,
        # As unlike one another as real ones, and made in no time.
        entropy=lambda size: next(numbers).to_bytes(size),
        issuer=ISSUER,
        audience=AUDIENCE,
        environment="uat",
    )
    issued = [await source._make(f"partner-{at}", "Plans", START) for at in range(PARTNERS)]
    insert_all(lodge.backend, [each.token for each in issued])
    assert await lodge.store.count_live_tokens(now=START) == {signer.kid: PARTNERS}

    lodge.clock.forward(KEY_SET_MAX_AGE)
    await lodge.access_keys.rotate(by="test")
    lodge.clock.forward(GRACE)
    assert await lodge.store.retire_unneeded_keys(now=lodge.clock.now) == []
    lodge.monotonic.now += RING_MAX_AGE
    assert (await lodge.access_keys.signer(lodge.clock.now)).kid != signer.kid

    revoked = issued[PARTNERS // 2]
    before = (await lodge.store.list_changes(after=0, limit=100))[-1].sequence
    await lodge.access_tokens.revoke(revoked.token.id, by="test")
    changes = await lodge.store.list_changes(after=before, limit=100)
    assert [(change.kind, change.subject) for change in changes] == [("token", revoked.token.id)]

    key = await lodge.access_keys.find_async(signer.kid)
    standings = []
    for at in range(0, PARTNERS, 1_000):
        standings += await asyncio.gather(*(lodge.store.find_token(each.token.id) for each in issued[at : at + 1_000]))
    for each, standing in zip(issued, standings, strict=True):
        claims = verify_token(read_unverified(each.text.reveal()), key=key, rules=RULES, now=lodge.clock.now / SECOND)
        assert claims["jti"] == standing.holder.credential_id
        reason = judge_token(standing, digest_token(each.text), lodge.clock.now)
        assert reason is (CredentialRevoked if each is revoked else None)


def insert_all(backend, tokens):
    """Partners and their tokens, in bulk."""
    who = {"contact_email": "dev@partner.example", "tier": "starter", "status": PartnerStatus.ACTIVE.value, "origin": "managed"}
    engine = backend.engine()
    with engine.begin() as connection:
        connection.execute(
            insert(partner),
            [{"id": token.partner_id, "name": token.partner_id, "created_at": START, **who} for token in tokens],
        )
        names = ("id", "lineage_id", "version", "partner_id", "label", "kid", "digest", "created_at")
        connection.execute(insert(access_token), [{name: getattr(token, name) for name in names} for token in tokens])
    engine.dispose()
