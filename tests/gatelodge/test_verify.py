"""From the text in a header to a caller."""

import dataclasses

import pytest

from gatelodge import (
    Caller,
    CredentialExpired,
    InvalidCredential,
    Rejected,
    StaticKeys,
    TokenRules,
    VerificationKey,
    Verifier,
    WrongEnvironment,
)
from gatelodge.tokens import public_jwk, sign_token
from gatelodge.wire import TOKEN_MAX_LENGTH

COMPANY = "0197a3f2-3333-7bbb-8ccc-0123456789ab"


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


class CountedKeys(StaticKeys):
    """Counts the look-ups, and can lose its keys."""

    lookups = 0
    gone = False

    def find(self, kid):
        self.lookups += 1
        return None if self.gone else super().find(kid)

    async def find_async(self, kid):
        return self.find(kid)


@pytest.fixture
def clock(issuer):
    return Clock(issuer.now)


@pytest.fixture
def keys(issuer):
    return CountedKeys([issuer.verification_key])


@pytest.fixture(params=["sync", "async"])
def verify(request, issuer, keys, clock):
    """Both ways in, and both remembering and forgetful, give the same verdicts."""
    rules = TokenRules.for_sessions(issuer=issuer.url, audience=issuer.url, other_issuers=frozenset({issuer.production}))
    verifier = Verifier(keys, rules, clock=clock)

    async def call(text):
        return await verifier.verify_async(text) if request.param == "async" else verifier.verify(text)

    return call


async def test_a_partners_session_is_resolved(verify, issuer):
    expected = Caller(
        partner="acme-motors",
        company=None,
        kind="partner",
        tier="starter",
        scopes=frozenset({"plans:read", "plans:write"}),
        credential="session",
        credential_id="k3yk3yk3yk3y",
        session="0197a3f2-2222-7bbb-8ccc-0123456789ab",
        token_id="0197a3f2-1111-7bbb-8ccc-0123456789ab",
        environment="uat",
        expires_at=issuer.now + 86_400,
    )
    assert await verify(issuer.token()) == expected


async def test_a_companys_session_is_resolved(verify, issuer):
    caller = await verify(issuer.token(kind="company", company=COMPANY, sub=COMPANY))
    assert (caller.kind, caller.company, caller.partner) == ("company", COMPANY, "acme-motors")


async def test_a_session_without_a_scope_has_none(verify, issuer):
    assert (await verify(issuer.token(scope=...))).scopes == frozenset()
    assert (await verify(issuer.token(scope=""))).scopes == frozenset()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": ...}, {"kind": "admin"}, {"kind": "Partner"}, {"kind": ["partner"]}, {"kind": None},
        {"company": COMPANY}, {"company": ""}, {"kind": "company"}, {"kind": "company", "company": None},
        {"kind": "company", "company": COMPANY.upper()}, {"kind": "company", "company": COMPANY + "\n"},
        {"kind": "company", "company": "acme"}, {"kind": "company", "company": 7},
        {"partner": ...}, {"partner": ""}, {"partner": 7}, {"partner": ["acme"]}, {"partner": "a\nb"}, {"partner": "a b"},
        {"partner": "acmé"}, {"partner": "x" * 129}, {"tier": ...}, {"tier": None}, {"tier": "a\r\nX-Partner-Id: b"},
        {"env": ...}, {"env": "UAT"}, {"env": 7}, {"env": "uat\n"}, {"scope": None}, {"scope": ["a"]}, {"scope": "a  b"},
        {"scope": " a"}, {"scope": 'a"'}, {"scope": "a\\b"}, {"scope": "a\tb"}, {"scope": "x" * 1025}, {"client_id": "a b"},
        {"sid": "a\nb"}, {"jti": "é"},
    ],
)  # fmt: skip
async def test_a_session_that_does_not_say_exactly_who_calls_is_refused(verify, issuer, changes):
    with pytest.raises(InvalidCredential):
        await verify(issuer.token(**changes))


@pytest.mark.parametrize(("length", "good"), [(127, True), (128, True), (129, False)])
async def test_a_partner_id_has_128_characters_at_most(verify, issuer, length, good):
    text = issuer.token(partner="p" * length)
    if good:
        assert (await verify(text)).partner == "p" * length
    else:
        with pytest.raises(InvalidCredential):
            await verify(text)


@pytest.mark.parametrize(("length", "good"), [(1023, True), (1024, True), (1025, False)])
async def test_a_scope_has_1024_characters_at_most(verify, issuer, length, good):
    text = issuer.token(scope="s" * length)
    if good:
        assert await verify(text)
    else:
        with pytest.raises(InvalidCredential):
            await verify(text)


async def test_r1_to_r17_every_kind_of_wrong_token_is_invalid_through_the_verifier_too(verify, issuer, stranger):
    header, payload, signature = issuer.token().split(".")
    for text in [
        issuer.compact(issuer.header | {"alg": "none"}, issuer.claims()),
        issuer.compact(issuer.header | {"alg": "ES384"}, issuer.claims()),
        issuer.compact(issuer.header | {"jwk": public_jwk(stranger.key)}, issuer.claims(), stranger.key),
        issuer.compact(issuer.header | {"kid": "../k"}, issuer.claims()),
        issuer.compact(issuer.header | {"kid": "unknown"}, issuer.claims()),
        issuer.compact(issuer.header | {"crit": ["x"]}, issuer.claims()),
        f"{header}.{payload}.{signature}=",
        f"{header}.{payload}.{signature}.",
        issuer.compact(issuer.header, b'{"iss":"a","iss":"b"}'),
        issuer.access_token(),
        issuer.token(iss="https://elsewhere.example"),
        issuer.token(aud="https://elsewhere.example"),
        issuer.token(exp="1"),
        issuer.token(nbf=issuer.now + 1),
        "x" * (TOKEN_MAX_LENGTH + 1),
        f"{header}.{payload}.{signature}.{payload}.{signature}",
        issuer.compact(issuer.header, issuer.claims(partner="other"), stranger.key),
        "é",
        "\ud800",
        "",
    ]:  # fmt: skip
        with pytest.raises(Rejected) as caught:
            await verify(text)
        assert type(caught.value) is InvalidCredential
        assert str(caught.value) == InvalidCredential.detail


async def test_r7_a_token_that_was_believed_is_not_believed_in_another_spelling(verify, issuer):
    text = issuer.token()
    await verify(text)
    for twin in [text + "=", text[:-1] + chr(ord(text[-1]) + 1), " " + text]:
        with pytest.raises(InvalidCredential):
            await verify(twin)


async def test_r11_another_environments_token_is_told_so_and_sends_nobody_for_keys(verify, issuer, keys):
    with pytest.raises(WrongEnvironment):
        await verify(issuer.token(iss=issuer.production, aud=issuer.production))
    assert keys.lookups == 0


async def test_r12_a_session_ends_at_its_second_the_first_time_and_every_time(verify, issuer, clock):
    remembered, first_seen_late = issuer.token(), issuer.token(jti="another")
    for clock.now in [issuer.now + 86_399, issuer.now + 86_399.999]:
        assert await verify(remembered)
    for clock.now in [issuer.now + 86_400, issuer.now + 86_401]:
        for text in [remembered, first_seen_late]:
            with pytest.raises(CredentialExpired):
                await verify(text)


async def test_r12_the_leeway_holds_for_a_remembered_token_too(issuer, keys, clock):
    rules = TokenRules.for_sessions(issuer=issuer.url, audience=issuer.url, leeway=30)
    verifier, text = Verifier(keys, rules, clock=clock), issuer.token()
    for clock.now in [issuer.now, issuer.now + 86_429]:
        assert verifier.verify(text)
    clock.now += 1
    with pytest.raises(CredentialExpired):
        verifier.verify(text)


async def test_a_remembered_token_is_forgotten_with_its_key(verify, issuer, keys):
    text = issuer.token()
    assert await verify(text) is await verify(text)
    keys.gone = True
    with pytest.raises(InvalidCredential):
        await verify(text)


async def test_a_remembered_token_is_judged_anew_when_its_key_was_replaced(verify, issuer, stranger, keys):
    text = issuer.token()
    await verify(text)
    keys._keys = {issuer.kid: VerificationKey(issuer.kid, "ES256", stranger.key.public_key())}
    with pytest.raises(InvalidCredential):
        await verify(text)


@pytest.mark.parametrize(("remembered", "held"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_no_more_tokens_are_remembered_than_allowed_and_the_oldest_goes_first(issuer, keys, clock, remembered, held):
    verifier = Verifier(keys, issuer.session_rules, remembered=remembered, clock=clock)
    texts = [issuer.token(jti=f"t{number}") for number in range(5)]
    callers = [verifier.verify(text) for text in texts]
    assert len(verifier._seen) == held
    for caller, text in reversed(list(zip(callers, texts, strict=True))):
        again = verifier.verify(text)
        assert again == caller
    assert len(verifier._seen) == held


def test_what_is_remembered_holds_no_token(issuer, keys, clock):
    verifier, text = Verifier(keys, issuer.session_rules, clock=clock), issuer.token()
    verifier.verify(text)
    assert text.rpartition(".")[2] not in repr(vars(verifier))


def test_a_verifier_is_for_session_jwts(issuer, keys):
    with pytest.raises(ValueError, match="session"):
        Verifier(keys, issuer.access_rules)


def test_a_caller_cannot_be_changed(issuer, keys, clock):
    caller = Verifier(keys, issuer.session_rules, clock=clock).verify(issuer.token())
    with pytest.raises(dataclasses.FrozenInstanceError):
        caller.partner = "other"


def test_the_usual_clock_is_the_real_one(issuer, keys):
    verifier = Verifier(keys, issuer.session_rules)
    text = sign_token(issuer.claims(exp=253_402_300_799), key=issuer.key, kid=issuer.kid, typ="at+jwt")
    assert verifier.verify(text).partner == "acme-motors"
    with pytest.raises(CredentialExpired):
        verifier.verify(issuer.token(exp=1))
