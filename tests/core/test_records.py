"""What is on record of each kind of credential, whatever it has gone through, as the gate of another node hears it.

The node that serves has remembered every credential before anything happens to it.
"""

import asyncio
import os
from dataclasses import dataclass
from uuid import UUID

import pytest
from given import AROUND, START, Clock

from gatelodge import (
    AccessRing,
    Caller,
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    TokenRules,
    Unavailable,
    Verifier,
    WrongEnvironment,
)
from gatelodge.tokens import read_unverified
from gatelodge_server.core.credentials import Credentials
from gatelodge_server.core.following import ChangeFollower
from gatelodge_server.core.ids import api_key
from gatelodge_server.core.model import DAY, HOUR, SECOND, CompanyDetails, Tier
from gatelodge_server.core.records import StoreRecords
from gatelodge_server.core.refusals import RefreshTokenReused

ISSUER, AUDIENCE = "https://uat.example.com", "partner-api-uat"
DETAILS = CompanyDetails(company_name="Müller GmbH", country="DE", tax_number="12/345/67890")
ALL = frozenset({"partner key", "partner session", "access token", "company key", "company session"})
SESSIONS = frozenset({"partner session", "company session"})


class Line:
    """The line to a real store. While it is cut only the bell is heard."""

    def __init__(self, store):
        self._store = store
        self.bell = store.bell
        self.cut_by = None
        self.asked = []

    def __getattr__(self, verb):
        ask = getattr(self._store, verb)

        async def over_the_line(*args, **kwargs):
            self.asked.append(verb)
            if self.cut_by is not None:
                raise self.cut_by
            return await ask(*args, **kwargs)

        return over_the_line


@dataclass
class Gatehouse:
    """A node that serves, and what it is presented with."""

    lodge: object
    verifier: Verifier
    follower: ChangeFollower
    monotonic: Clock
    store: Line
    partner_id: str
    company_id: UUID
    credentials: dict
    logins: dict

    async def ask(self, name):
        return await self.verifier.verify_async(self.credentials[name].reveal())

    async def verdicts(self):
        """With what each credential is refused; ``None`` if it is let in. The second answer is the first one's."""
        return {name: await self.verdict(name) for name in self.credentials}

    async def verdict(self, name):
        answers = [await asyncio.gather(self.ask(name), return_exceptions=True) for _ in range(2)]
        kinds = {type(answer) for (answer,) in answers}
        assert len(kinds) == 1
        (kind,) = kinds
        return None if kind is Caller else kind

    async def expect(self, refused):
        expected = dict.fromkeys(ALL) | refused
        assert await self.verdicts() == expected


@pytest.fixture
async def gatehouse(lodge):
    partner_id, key = await lodge.new_partner()
    company = await lodge.companies.create(partner_id, DETAILS, idempotency_key=None)
    logins = {"partner": await lodge.sessions.log_in(key), "company": await lodge.sessions.log_in(company.api_key)}
    token = await lodge.access_tokens.issue(partner_id, label="Plans", by="test")

    sql_store = lodge.backend.open()
    store, monotonic = Line(sql_store), Clock(1_000.0)
    follower = ChangeFollower(store=store, monotonic=monotonic, on_mistake=pytest.fail)
    credentials = Credentials(store=store, clock=lodge.clock, entropy=bytes, brand="gatelodge", environment="uat")
    rules = {"issuer": ISSUER, "audience": AUDIENCE, "other_issuers": frozenset({"https://api.example.com"})}
    verifier = Verifier(
        lodge.signing_keys,
        TokenRules.for_sessions(**rules),
        records=StoreRecords(store=store, credentials=credentials, follower=follower, clock=lodge.clock),
        access_ring=AccessRing(lodge.access_keys, TokenRules.for_access_tokens(**rules)),
        environment="uat",
        clock=lambda: lodge.clock.now / SECOND,
    )
    follower.tell(verifier.forget)
    gatehouse = Gatehouse(
        lodge=lodge,
        verifier=verifier,
        follower=follower,
        monotonic=monotonic,
        store=store,
        partner_id=partner_id,
        company_id=company.company_id,
        credentials={
            "partner key": key,
            "partner session": logins["partner"].jwt,
            "access token": token.text,
            "company key": company.api_key,
            "company session": logins["company"].jwt,
        },
        logins=logins,
    )
    await gatehouse.expect({})
    yield gatehouse
    await sql_store.close()


def key_id(gatehouse, name):
    return gatehouse.credentials[name].reveal().split("_")[3]


# --- Who they are ---


async def test_each_kind_is_who_it_is(gatehouse):
    lodge, acme, company = gatehouse.lodge, gatehouse.partner_id, str(gatehouse.company_id)
    of = {name: await gatehouse.ask(name) for name in ALL}
    assert {caller.partner for caller in of.values()} == {acme}
    assert {caller.environment for caller in of.values()} == {"uat"}
    assert {caller.tier for caller in of.values()} == {"starter"}
    assert {name: (caller.credential, caller.kind, caller.company) for name, caller in of.items()} == {
        "partner key": ("api-key", "partner", None),
        "partner session": ("session", "partner", None),
        "access token": ("access-token", "partner", None),
        "company key": ("api-key", "company", company),
        "company session": ("session", "company", company),
    }
    assert {name: sorted(caller.scopes) for name, caller in of.items()} == {
        "partner key": ["api", "companies"],
        "partner session": ["api", "companies"],
        "access token": ["api"],
        "company key": ["api"],
        "company session": ["api"],
    }
    (token,) = await lodge.access_tokens.list_for(acme)
    assert of["access token"].credential_id == of["access token"].token_id == token.id
    for holder in ("partner", "company"):
        key, session = of[f"{holder} key"], of[f"{holder} session"]
        assert key.credential_id == session.credential_id == key_id(gatehouse, f"{holder} key")
        assert (key.session, key.token_id, key.expires_at) == (None, None, None)
        assert session.session == gatehouse.logins[holder].session_id.hex()
        assert session.expires_at == (START + DAY) // SECOND


async def test_what_is_remembered_costs_the_store_no_question(gatehouse):
    gatehouse.store.asked.clear()
    await gatehouse.expect({})
    assert gatehouse.store.asked == []


# --- What becomes of them ---


async def test_r25_a_revoked_key_ends_itself_and_its_sessions(gatehouse):
    await gatehouse.lodge.credentials.revoke(key_id(gatehouse, "partner key"), by="test")
    await gatehouse.expect({"partner key": CredentialRevoked, "partner session": CredentialRevoked})
    await gatehouse.lodge.credentials.revoke(key_id(gatehouse, "company key"), by="test")
    await gatehouse.expect(dict.fromkeys(ALL - {"access token"}, CredentialRevoked))


async def test_r25_a_revoked_access_token_ends_nothing_else(gatehouse):
    (token,) = await gatehouse.lodge.access_tokens.list_for(gatehouse.partner_id)
    await gatehouse.lodge.access_tokens.revoke(token.id, by="test")
    await gatehouse.expect({"access token": CredentialRevoked})


async def test_a_key_that_is_rotated_at_once_is_dead_and_so_are_its_sessions(gatehouse):
    new = await gatehouse.lodge.credentials.rotate(key_id(gatehouse, "partner key"), overlap=0, by="test")
    await gatehouse.expect({"partner key": CredentialRotated, "partner session": CredentialRotated})
    assert (await gatehouse.verifier.verify_async(new.text.reveal())).partner == gatehouse.partner_id


@pytest.mark.parametrize("by", AROUND)
@pytest.mark.parametrize("name", ["partner key", "company key", "access token"])
async def test_a_rotated_credential_works_until_its_overlap_is_over_and_says_when_that_is(gatehouse, name, by):
    lodge = gatehouse.lodge
    lodge.clock.forward(5 * SECOND)
    if name == "access token":
        (token,) = await lodge.access_tokens.list_for(gatehouse.partner_id)
        await lodge.access_tokens.rotate(token.id, overlap=HOUR, by="test")
        concerned = {name}
    else:
        await lodge.credentials.rotate(key_id(gatehouse, name), overlap=HOUR, by="test")
        concerned = {name, name.replace("key", "session")}
    rotated_at = (START + 5 * SECOND) // SECOND
    await gatehouse.expect({})
    for other in ALL:
        caller = await gatehouse.ask(other)
        expected = (rotated_at, rotated_at + HOUR // SECOND) if other in concerned else (None, None)
        assert (caller.rotated_at, caller.sunset_at) == expected
    lodge.clock.forward(HOUR + by)
    await gatehouse.expect(dict.fromkeys(concerned, CredentialRotated) if by >= 0 else {})


async def test_r25_what_is_revoked_in_its_overlap_is_revoked(gatehouse):
    lodge = gatehouse.lodge
    (token,) = await lodge.access_tokens.list_for(gatehouse.partner_id)
    await lodge.access_tokens.rotate(token.id, overlap=HOUR, by="test")
    await lodge.credentials.rotate(key_id(gatehouse, "partner key"), overlap=HOUR, by="test")
    await gatehouse.expect({})
    await lodge.access_tokens.revoke(token.id, by="test")
    await lodge.credentials.revoke(key_id(gatehouse, "partner key"), by="test")
    await gatehouse.expect(dict.fromkeys(("access token", "partner key", "partner session"), CredentialRevoked))


async def test_a_suspended_partner_is_told_so_and_its_sessions_do_not_come_back(gatehouse):
    lodge, acme = gatehouse.lodge, gatehouse.partner_id
    await lodge.partners.suspend(acme, by="test")
    await gatehouse.expect(dict.fromkeys(ALL, PartnerSuspended))
    await lodge.partners.resume(acme, by="test")
    await gatehouse.expect(dict.fromkeys(SESSIONS, CredentialRevoked))


async def test_a_deactivated_partner_and_its_companies_are_over_for_good(gatehouse):
    await gatehouse.lodge.partners.deactivate(gatehouse.partner_id, by="test")
    await gatehouse.expect(dict.fromkeys(ALL, CredentialRevoked))


async def test_a_company_that_is_gone_takes_its_key_and_its_sessions_along(gatehouse):
    await gatehouse.lodge.companies.delete(gatehouse.partner_id, gatehouse.company_id)
    await gatehouse.expect({"company key": CredentialRevoked, "company session": CredentialRevoked})


@pytest.mark.parametrize("holder", ["partner", "company"])
async def test_a_session_that_was_logged_out_of_is_over(gatehouse, holder):
    await gatehouse.lodge.sessions.log_out(gatehouse.logins[holder].refresh_token)
    await gatehouse.expect({f"{holder} session": CredentialRevoked})


@pytest.mark.parametrize("holder", ["partner", "company"])
async def test_r25_a_session_whose_refresh_token_was_reused_is_over(gatehouse, holder):
    tokens = gatehouse.logins[holder]
    await gatehouse.lodge.sessions.refresh(tokens.refresh_token, idempotency_key=None)
    await gatehouse.expect({})
    with pytest.raises(RefreshTokenReused):
        await gatehouse.lodge.sessions.refresh(tokens.refresh_token, idempotency_key=None)
    await gatehouse.expect({f"{holder} session": CredentialRevoked})


@pytest.mark.parametrize("by", AROUND)
async def test_r12_a_session_jwt_expires_and_nothing_else_does(gatehouse, by):
    gatehouse.lodge.clock.forward(DAY + by)
    await gatehouse.expect(dict.fromkeys(SESSIONS, CredentialExpired) if by >= 0 else {})


async def test_another_partners_fate_is_its_own(gatehouse):
    other, key = await gatehouse.lodge.new_partner("Zeta")
    await gatehouse.verifier.verify_async(key.reveal())
    await gatehouse.lodge.partners.deactivate(other, by="test")
    await gatehouse.expect({})
    with pytest.raises(CredentialRevoked):
        await gatehouse.verifier.verify_async(key.reveal())


async def test_r39_another_tier_shows_at_once_whatever_the_token_says(gatehouse):
    lodge = gatehouse.lodge
    await lodge.store.set_tier(Tier("gold", 1_000, 10_000), now=lodge.clock.now, by="test")
    for tier in ("gold", "starter"):
        await lodge.partners.set_tier(gatehouse.partner_id, tier, by="test")
        assert {name: (await gatehouse.ask(name)).tier for name in ALL} == dict.fromkeys(ALL, tier)


# --- Who is nobody ---


async def test_r1_a_token_that_was_signed_but_not_issued_is_invalid(gatehouse):
    """Whoever can sign, but cannot write into the database, gets nowhere; nor does a second signature over the same claims."""
    lodge, now = gatehouse.lodge, gatehouse.lodge.clock.now
    issued = gatehouse.credentials["access token"].reveal()
    claims = dict(read_unverified(issued)._claims)
    signer = await lodge.access_keys.signer(now)
    again = signer.sign(claims, typ="JWT")
    assert again != issued
    for text in (again, signer.sign(claims | {"jti": "never-issued"}, typ="JWT")):
        with pytest.raises(InvalidCredential):
            await gatehouse.verifier.verify_async(text)
    await gatehouse.expect({})


@pytest.mark.parametrize("session", ["00" * 16, "00", "not-hexadecimal", "zz" * 16])
async def test_a_session_jwt_of_a_session_that_is_not_there_is_revoked(gatehouse, session):
    """Its row has been purged; or it never was one, and somebody else has our key."""
    signer = await gatehouse.lodge.signing_keys.signer(gatehouse.lodge.clock.now)
    claims = dict(read_unverified(gatehouse.credentials["partner session"].reveal())._claims)
    with pytest.raises(CredentialRevoked):
        await gatehouse.verifier.verify_async(signer.sign(claims | {"sid": session}, typ="at+jwt"))


async def test_a_key_of_a_right_shape_that_nobody_issued_is_invalid_and_one_of_elsewhere_is_told_so(gatehouse):
    good = gatehouse.credentials["partner key"].reveal()
    with pytest.raises(InvalidCredential):
        await gatehouse.verifier.verify_async(api_key("gatelodge", "uat", "pk", os.urandom).text)
    with pytest.raises(InvalidCredential):
        await gatehouse.verifier.verify_async(api_key("otherlodge", "uat", "pk", os.urandom).text)
    with pytest.raises(WrongEnvironment):
        await gatehouse.verifier.verify_async(api_key("gatelodge", "production", "pk", os.urandom).text)
    for text in ("", good[:-1], good + "a", good.upper(), gatehouse.logins["partner"].refresh_token.reveal()):
        with pytest.raises(InvalidCredential):
            await gatehouse.verifier.verify_async(text)


# --- A store that is down ---


async def test_r72_a_store_that_is_gone_lets_in_whom_we_know_until_the_staleness_is_over_and_nobody_else(gatehouse):
    _, stranger = await gatehouse.lodge.new_partner("Zeta")
    await gatehouse.expect({})
    gatehouse.store.cut_by = Unavailable()
    await gatehouse.expect({})
    with pytest.raises(Unavailable):
        await gatehouse.verifier.verify_async(stranger.reveal())
    gatehouse.monotonic.forward(10.0)
    await gatehouse.expect(dict.fromkeys(ALL, Unavailable))
    gatehouse.store.cut_by = None
    await gatehouse.expect({})


async def test_r72_while_a_change_cannot_be_read_nobody_is_let_in(gatehouse):
    await gatehouse.lodge.credentials.revoke(key_id(gatehouse, "company key"), by="test")
    gatehouse.store.cut_by = Unavailable()
    await gatehouse.expect(dict.fromkeys(ALL, Unavailable))
    gatehouse.store.cut_by = None
    await gatehouse.expect({"company key": CredentialRevoked, "company session": CredentialRevoked})
