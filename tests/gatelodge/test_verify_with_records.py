"""A verifier that asks the issuer's records: three kinds of credential, what is remembered of them, and when it is forgotten."""

import asyncio

import pytest
from gating import FOREVER, Book, Down, a_grant, caller, digest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatelodge import (
    AccessRing,
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    StaticKeys,
    TokenRules,
    Verifier,
    WrongEnvironment,
)
from gatelodge.verify import _subjects_of

KINDS = ["api-key", "access-token", "session"]
COMPANY = "0197a3f2-3333-7bbb-8ccc-0123456789ab"
ASKED = {"api-key": "key", "access-token": "token", "session": "session"}
AROUND = [-1, 0, 1]
RULES = TokenRules.for_sessions(issuer="https://uat.example.com", audience="uat")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def ask(gatehouse):
    """Present a credential by its kind, or a text."""
    return lambda what: gatehouse.verifier.verify_async(gatehouse.credentials.get(what, what))


def tampered(text):
    """With one digit of its signature changed."""
    return text[:-10] + ("B" if text[-10] == "A" else "A") + text[-9:]


def index_is_whole(verifier):
    """Each digest that is remembered stands under each of its subjects, and nothing else stands there."""
    expected = {}
    for one, seen in verifier._seen.items():
        for subject in _subjects_of(seen.grant.caller):
            expected.setdefault(subject, set()).add(one)
    return verifier._by_subject == expected


# --- Three kinds ---


async def test_each_kind_is_who_the_records_say_and_costs_them_one_question(gatehouse, ask, kind):
    for _ in range(3):
        assert await ask(kind) == caller(kind)
    assert gatehouse.book.asked == [ASKED[kind]]


async def test_r39_what_the_records_say_counts_and_not_what_the_token_says(gatehouse, ask):
    gatehouse.book.sessions["5e55"] = a_grant(caller("session", tier="gold", scopes=frozenset({"x"})))
    assert (await ask("session")).tier == "gold"
    assert (await ask("session")).scopes == {"x"}


async def test_the_records_are_told_what_a_token_claims_and_never_asked_about_what_is_not_genuine(gatehouse, ask, stranger):
    for text in [
        stranger.token(sid="5e55"), stranger.access_token(jti="at-1"), tampered(gatehouse.session), tampered(gatehouse.token),
        gatehouse.issuer.token(sid="5e55", aud="https://elsewhere.example"), gatehouse.access_issuer.access_token(jti="at 1"), "a.b.c", ".",
    ]:  # fmt: skip
        with pytest.raises(InvalidCredential):
            await ask(text)
    assert gatehouse.book.asked == []


async def test_r9_no_kind_passes_as_another(gatehouse, ask):
    """The type, the ring and the rules each are enough to refuse it."""
    sessions, access = gatehouse.issuer, gatehouse.access_issuer
    wrong = {
        "a session under the type of access tokens, from their ring": access.token("JWT", sid="5e55", jti="at-1"),
        "the same, from the ring of sessions": sessions.token("JWT", sid="5e55", jti="at-1"),
        "a session from the ring of access tokens": access.token(sid="5e55"),
        "an access token from the ring of sessions": sessions.access_token(jti="at-1"),
        "an access token under the type of sessions": sessions.token(exp=..., sid="5e55"),
        "the same, from its own ring": access.token(exp=..., sid="5e55", jti="at-1"),
        "an access token that expires": access.access_token(jti="at-1", exp=sessions.now + 60),
        "a session without its id": sessions.token(sid=...),
        "a type that nobody knows": sessions.token("jwt", sid="5e55"),
    }
    for text in wrong.values():
        gatehouse.book.tokens["at-1"] = (digest(text), a_grant(caller("access-token")))
        gatehouse.book.keys[text] = a_grant(caller("api-key"))
        with pytest.raises(InvalidCredential):
            await ask(text)
    assert gatehouse.book.asked == []


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_token_of_the_ring_is_good_under_any_name_that_the_records_know_for_the_issuers_own(gatehouse, ask, is_known):
    other = "https://moved.example.com"
    if is_known:
        gatehouse.book.issuers.add(other)
    session = gatehouse.issuer.token(sid="5e55", iss=other)
    token = gatehouse.access_issuer.access_token(jti="at-2", iss=other)
    gatehouse.book.tokens["at-2"] = (digest(token), a_grant(caller("access-token")))
    for text in [session, token]:
        if is_known:
            assert (await ask(text)).partner == caller("session").partner
        else:
            with pytest.raises(InvalidCredential):
                await ask(text)


async def test_a_token_that_was_signed_but_never_issued_is_invalid(gatehouse, ask):
    """Whoever has the key of the ring, but not the database, gets nowhere."""
    for text in [gatehouse.access_issuer.access_token(jti="never"), gatehouse.access_issuer.access_token(jti="at-1", sub="x")]:
        with pytest.raises(InvalidCredential):
            await ask(text)
    assert gatehouse.book.asked == ["token", "token"]


async def test_without_a_ring_for_them_access_tokens_are_refused(gatehouse, issuer, access_issuer):
    verifier = Verifier(
        StaticKeys([issuer.verification_key]), issuer.session_rules, records=gatehouse.book, clock=gatehouse.clock
    )
    for text in [gatehouse.token, issuer.access_token(jti="at-1")]:
        with pytest.raises(InvalidCredential):
            await verifier.verify_async(text)
    assert (await verifier.verify_async(gatehouse.session)).partner == "acme-motors"


async def test_without_records_there_are_neither_keys_nor_access_tokens(issuer, gatehouse):
    verifier = Verifier(StaticKeys([issuer.verification_key]), issuer.session_rules, clock=gatehouse.clock)
    for text in [gatehouse.KEY, gatehouse.token]:
        with pytest.raises(InvalidCredential):
            await verifier.verify_async(text)


def test_with_records_nobody_may_ask_without_waiting(gatehouse):
    with pytest.raises(TypeError, match="verify_async"):
        gatehouse.verifier.verify(gatehouse.session)


@pytest.mark.parametrize("wrong", ["no records", "rules of sessions"])
def test_a_ring_of_access_tokens_needs_records_and_rules_of_its_own(issuer, access_issuer, wrong):
    keys = StaticKeys([issuer.verification_key])
    rules = issuer.access_rules if wrong == "no records" else issuer.session_rules
    records = None if wrong == "no records" else Book()
    with pytest.raises(ValueError, match="access tokens"):
        Verifier(keys, issuer.session_rules, records=records, access_ring=AccessRing(keys, rules))


async def test_what_cannot_be_a_credential_is_refused_before_anything_is_done_with_it(gatehouse, ask):
    gatehouse.book.told = "would not be compared"
    for text in ["k" * 8193, "é", "\ud800", "x" * 10_000_000]:
        with pytest.raises(InvalidCredential):
            await ask(text)


# --- The environment ---


async def test_r11_a_token_of_another_environment_is_told_so_and_asks_for_no_key(gatehouse, ask, stranger):
    asked = []
    for ring in (gatehouse.verifier._keys, gatehouse.verifier._access_ring.keys):
        ring.find_async = asked.append
    for maker in (gatehouse.issuer, gatehouse.access_issuer, stranger):
        for changes in (
            {"env": "production"},
            {"iss": gatehouse.issuer.production},
            {"env": "production", "iss": "https://elsewhere.example"},
        ):
            for text in (maker.token(**changes), maker.access_token(**changes)):
                with pytest.raises(WrongEnvironment):
                    await ask(text)
    assert (asked, gatehouse.book.asked) == ([], [])


@pytest.mark.parametrize("env", [..., None, 7, "", "UAT"])
async def test_a_token_that_names_no_environment_is_invalid(gatehouse, ask, env):
    refusal = WrongEnvironment if isinstance(env, str) else InvalidCredential
    for text in [gatehouse.issuer.token(sid="5e55", env=env), gatehouse.access_issuer.access_token(jti="at-1", env=env)]:
        gatehouse.book.tokens["at-1"] = (digest(text), a_grant(caller("access-token")))
        with pytest.raises(refusal):
            await ask(text)


# --- When it ends ---


@pytest.mark.parametrize("reason", [CredentialRotated, CredentialExpired, CredentialRevoked])
@pytest.mark.parametrize("by", AROUND)
async def test_a_credential_ends_when_and_as_the_records_have_foretold(gatehouse, ask, kind, reason, by):
    end = gatehouse.clock.now + 100
    known = {"api-key": gatehouse.book.keys, "access-token": gatehouse.book.tokens, "session": gatehouse.book.sessions}[kind]
    for name, entry in known.items():
        known[name] = (
            (entry[0], a_grant(caller(kind), end, reason)) if kind == "access-token" else a_grant(caller(kind), end, reason)
        )
    await ask(kind)
    gatehouse.clock.now = end + by / 1000
    if by < 0:
        assert await ask(kind) == caller(kind)
    else:
        with pytest.raises(reason):
            await ask(kind)
    assert len(gatehouse.book.asked) == 1


@pytest.mark.parametrize("by", AROUND)
async def test_a_session_ends_by_its_jwt_or_by_its_record_whichever_is_first(gatehouse, ask, by):
    expires_at = gatehouse.issuer.now + 86_400
    gatehouse.book.sessions["5e55"] = a_grant(caller("session"), expires_at + by, CredentialRotated)
    await ask("session")
    gatehouse.clock.now = expires_at + min(by, 0)
    with pytest.raises(CredentialRotated if by <= 0 else CredentialExpired):
        await ask("session")


# --- Forgetting ---


def everybody():
    """Callers with all their subjects: two partners, two companies, a session."""
    return {
        "partner": caller(),
        "second key": caller(credential_id="k3y2k3y2k3y2"),
        "company": caller(credential_id="companykey01", company=COMPANY, kind="company"),
        "sibling": caller(credential_id="companykey02", company=COMPANY[:-1] + "c", kind="company"),
        "stranger": caller(partner="zeta", credential_id="zetakey00001"),
    }


@pytest.mark.parametrize(
    ("sort", "subject", "gone"),
    [
        ("credential", "k3yk3yk3yk3y", {"partner", "session"}),
        ("credential", "k3y2k3y2k3y2", {"second key"}),
        ("company", COMPANY, {"company"}),
        ("partner", "acme-motors", {"partner", "second key", "company", "sibling", "session", "token"}),
        ("partner", "zeta", {"stranger"}),
        ("session", "5e55", {"session"}),
        ("token", "at-1", {"token"}),
        ("credential", "nobody", set()),
        ("partner", "", set()),
        ("tier", "starter", ...),
        ("signing-key", "kid", ...),
        ("something new", "acme-motors", ...),
        ("", "", ...),
    ],
)
async def test_what_has_changed_is_forgotten_and_nothing_else(gatehouse, sort, subject, gone):
    texts = {"session": gatehouse.session, "token": gatehouse.token}
    for name, who in everybody().items():
        texts[name] = f"key-of-{name}"
        gatehouse.book.keys[texts[name]] = a_grant(who)
    for text in texts.values():
        await gatehouse.verifier.verify_async(text)
    assert len(gatehouse.verifier._seen) == len(texts)

    gatehouse.book.change(sort, subject)
    gatehouse.book.asked.clear()
    asked_again = set()
    for name, text in texts.items():
        before = len(gatehouse.book.asked)
        await gatehouse.verifier.verify_async(text)
        if len(gatehouse.book.asked) > before:
            asked_again.add(name)
    assert asked_again == (set(texts) if gone is ... else gone)
    assert index_is_whole(gatehouse.verifier)


@pytest.mark.parametrize("reason", [CredentialRevoked, CredentialRotated, PartnerSuspended, InvalidCredential])
async def test_r25_what_was_ended_is_refused_on_the_next_request(gatehouse, ask, kind, reason):
    await ask(kind)
    gatehouse.end(kind, reason)
    for _ in range(2):
        with pytest.raises(reason):
            await ask(kind)


async def test_what_is_refused_is_not_remembered(gatehouse, ask, kind):
    good = dict(gatehouse.book.keys), dict(gatehouse.book.tokens), dict(gatehouse.book.sessions)
    gatehouse.end(kind)
    with pytest.raises(CredentialRevoked):
        await ask(kind)
    gatehouse.book.keys, gatehouse.book.tokens, gatehouse.book.sessions = good
    assert await ask(kind) == caller(kind)


async def test_what_was_forgotten_while_it_was_looked_up_is_not_remembered(gatehouse, ask, kind):
    """The answer was on its way when the credential was revoked: this request was there before, the next is not."""

    async def revoked_meanwhile():
        gatehouse.book.before_answer = None
        gatehouse.end(kind)
        await gatehouse.book.catch_up()

    gatehouse.book.before_answer = revoked_meanwhile
    assert await ask(kind) == caller(kind)
    assert not gatehouse.verifier._seen
    with pytest.raises(CredentialRevoked):
        await ask(kind)


async def test_r25_what_was_revoked_while_it_was_looked_up_but_not_yet_heard_of_is_refused_next_time(gatehouse, ask, kind):
    async def revoked_meanwhile():
        gatehouse.book.before_answer = None
        gatehouse.end(kind)

    gatehouse.book.before_answer = revoked_meanwhile
    await ask(kind)
    with pytest.raises(CredentialRevoked):
        await ask(kind)


# --- Currency ---


async def test_r72_nothing_remembered_is_believed_before_what_has_changed_is_known(gatehouse, ask, kind):
    await ask(kind)
    gatehouse.book.change("partner", "somebody-else")
    gatehouse.book.fault = Down()
    for _ in range(2):
        with pytest.raises(Down):
            await ask(kind)
    gatehouse.book.fault = None
    assert await ask(kind) == caller(kind)
    assert len(gatehouse.book.asked) == 1


async def test_r72_records_that_cannot_be_asked_let_nobody_in_and_nothing_is_remembered(gatehouse, ask, kind):
    await gatehouse.book.catch_up()
    gatehouse.book.fault = Down()
    with pytest.raises(Down):
        await ask(kind)
    assert not gatehouse.verifier._seen
    gatehouse.book.fault = None
    assert await ask(kind) == caller(kind)


async def test_while_the_records_are_current_they_are_asked_nothing_about_whom_we_know(gatehouse, ask, kind):
    await ask(kind)
    gatehouse.book.fault = Down()
    assert await ask(kind) == caller(kind)


# --- How much is remembered ---


@pytest.mark.parametrize(("remembered", "held"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)])
async def test_no_more_is_remembered_than_allowed_and_nothing_of_the_rest_stays(gatehouse_with, remembered, held):
    gatehouse = gatehouse_with(remembered=remembered)
    for _ in range(2):
        for text in gatehouse.credentials.values():
            await gatehouse.verifier.verify_async(text)
            assert index_is_whole(gatehouse.verifier)
    assert len(gatehouse.verifier._seen) == held


async def test_fifty_who_come_at_once_with_one_new_credential_are_remembered_once(gatehouse, ask, kind):
    async def a_while():
        await asyncio.sleep(0)

    gatehouse.book.before_answer = a_while
    callers = await asyncio.gather(*(ask(kind) for _ in range(50)))
    assert set(callers) == {caller(kind)}
    assert len(gatehouse.verifier._seen) == 1
    assert index_is_whole(gatehouse.verifier)


async def test_a_credential_that_two_looked_up_with_different_answers_leaves_no_trace_of_the_older(gatehouse, ask):
    """The one was answered before the key had moved, the other after; neither has been told yet."""
    went_on = asyncio.Event()

    async def moved_meanwhile():
        if gatehouse.book.asked == ["key"]:
            await went_on.wait()

    gatehouse.book.before_answer = moved_meanwhile
    first = asyncio.create_task(ask("api-key"))
    while gatehouse.book.asked != ["key"]:
        await asyncio.sleep(0)
    gatehouse.book.keys[gatehouse.KEY] = a_grant(caller(partner="zeta"))
    await ask("api-key")
    went_on.set()
    await first
    assert index_is_whole(gatehouse.verifier)
    assert len(gatehouse.verifier._seen) == 1


steps = st.lists(
    st.tuples(st.just("ask"), st.integers(0, 11))
    | st.tuples(
        st.sampled_from(["credential", "company", "partner", "session", "token", "tier"]),
        st.sampled_from(["p0", "p1", "c0", "c1", "k0", "k5", "k11", "s3", "s7", "nobody"]),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(steps=steps, remembered=st.integers(0, 5))
def test_whatever_is_asked_and_forgotten_nothing_is_left_over(steps, remembered):
    async def go():
        book = Book()
        verifier = Verifier(StaticKeys(()), RULES, records=book, remembered=remembered, clock=lambda: 0)
        book.forget = verifier.forget
        for number in range(12):
            who = caller(
                partner=f"p{number % 2}",
                company=f"c{number % 3}" if number % 3 else None,
                credential_id=f"k{number}",
                session=f"s{number}" if number % 4 == 3 else None,
            )
            book.keys[f"key{number}"] = a_grant(who, FOREVER)
        for what, subject in steps:
            if what == "ask":
                assert (await verifier.verify_async(f"key{subject}")).credential_id == f"k{subject}"
            else:
                book.change(what, subject)
                await book.catch_up()
                of_the_subject = [seen for seen in verifier._seen.values() if subject in _subjects_of(seen.grant.caller)]
                assert not of_the_subject
            assert len(verifier._seen) <= remembered
            assert index_is_whole(verifier)

    asyncio.run(go())
