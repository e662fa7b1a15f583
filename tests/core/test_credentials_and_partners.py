"""Keys and partners as a partner manager deals with them."""

import hashlib
import os

import pytest
from given import AROUND, START

from gatelodge.errors import CredentialRevoked, CredentialRotated, InvalidCredential, PartnerSuspended, WrongEnvironment
from gatelodge.wire import ApiKey
from gatelodge_server.core.ids import api_key
from gatelodge_server.core.model import HOUR, CompanyDetails, Origin, PartnerStatus
from gatelodge_server.core.partners import NewPartner
from gatelodge_server.core.refusals import (
    KeyEnded,
    KeyNotFound,
    PartnerDeactivated,
    PartnerIdTaken,
    PartnerNotFound,
    TierNotFound,
)
from gatelodge_server.core.secrets import Secret

MAIL = "dev@acme.example"


def id_of(key):
    return ApiKey.parse(key.reveal()).id


# --- Partners ---


async def test_a_partner_is_added_with_a_key_that_works_at_once(lodge):
    partner, issued = await lodge.partners.add(NewPartner("Société Générale", MAIL), by="anna")
    assert (partner.id, partner.name, partner.contact_email) == ("societe-generale", "Société Générale", MAIL)
    assert (partner.tier, partner.status, partner.origin) == ("starter", PartnerStatus.ACTIVE, Origin.MANAGED)
    assert await lodge.partners.get("societe-generale") == partner
    holder = await lodge.credentials.authenticate(issued.text)
    assert (holder.partner_id, holder.company_id, holder.kind) == ("societe-generale", None, "partner")
    assert issued.credential.id == holder.credential_id


async def test_partners_of_one_name_get_ids_of_their_own(lodge):
    ids = [(await lodge.partners.add(NewPartner("Acme Motors", MAIL), by="test"))[0].id for _ in range(3)]
    assert ids == ["acme-motors", "acme-motors-2", "acme-motors-3"]
    assert [partner.id for partner in await lodge.partners.list_all()] == ids


async def test_a_name_without_a_letter_gets_an_id_too(lodge):
    assert (await lodge.partners.add(NewPartner("☃", MAIL), by="test"))[0].id == "partner"


async def test_an_id_that_was_asked_for_is_given_or_refused(lodge):
    new = NewPartner("Acme Motors", MAIL, id="acme")
    assert (await lodge.partners.add(new, by="test"))[0].id == "acme"
    with pytest.raises(PartnerIdTaken):
        await lodge.partners.add(new, by="test")


async def test_the_tier_of_a_partner_must_be_there(lodge):
    assert (await lodge.partners.add(NewPartner("Acme", MAIL, tier="growth"), by="test"))[0].tier == "growth"
    with pytest.raises(TierNotFound):
        await lodge.partners.add(NewPartner("Acme", MAIL, tier="gold"), by="test")


async def test_a_thousand_partners_of_one_name_are_enough(lodge):
    """The store is asked for one id after the other, and not for ever."""
    taken = type("Taken", (), {"slugs": 0})

    class Full:
        async def add_partner(self, partner, key, *, by):
            taken.slugs += 1
            return await lodge.store.add_partner(first, key, by=by)

    first, _ = await lodge.partners.add(NewPartner("Acme", MAIL), by="test")
    partners = type(lodge.partners)(store=Full(), credentials=lodge.credentials, clock=lodge.clock, slugify=lambda _: "acme")
    with pytest.raises(PartnerIdTaken):
        await partners.add(NewPartner("Acme", MAIL), by="test")
    assert taken.slugs == 999


async def test_r38_a_partner_is_suspended_resumed_and_deactivated(lodge):
    partner_id, key = await lodge.new_partner()
    steps = [await lodge.partners.suspend(partner_id, by="test")]
    with pytest.raises(PartnerSuspended):
        await lodge.credentials.authenticate(key)
    steps.append(await lodge.partners.resume(partner_id, by="test"))
    await lodge.credentials.authenticate(key)
    steps.append(await lodge.partners.deactivate(partner_id, by="test"))
    with pytest.raises(CredentialRevoked):
        await lodge.credentials.authenticate(key)
    assert steps == sorted(set(steps))
    with pytest.raises(PartnerDeactivated):
        await lodge.partners.resume(partner_id, by="test")


async def test_a_partner_that_is_not_there_is_refused_everywhere(lodge):
    for ask in (lodge.partners.get, lodge.credentials.list_for):
        with pytest.raises(PartnerNotFound):
            await ask("nobody")
    for change in (lodge.partners.suspend, lodge.partners.resume, lodge.partners.deactivate):
        with pytest.raises(PartnerNotFound):
            await change("nobody", by="test")


# --- Keys ---


async def test_r68_only_a_digest_of_a_key_is_stored(lodge):
    _, key = await lodge.new_partner()
    (stored,) = await lodge.credentials.list_for("acme-motors")
    parsed = ApiKey.parse(key.reveal())
    assert stored.digest == hashlib.sha256(key.reveal().encode()).digest()
    assert stored.masked == f"gatelodge_uat_pk_{stored.id}_…"
    assert parsed.secret not in repr(stored)
    for path in lodge.backend.path.parent.iterdir():
        assert parsed.secret.encode() not in path.read_bytes()


async def test_r67_a_mistyped_key_is_refused_without_asking_the_store(lodge):
    _, key = await lodge.new_partner()
    text = key.reveal()
    lodge.store.asked.clear()
    for at in range(len(text)):
        wrong = text[:at] + ("x" if text[at] != "x" else "y") + text[at + 1 :]
        with pytest.raises(InvalidCredential):
            await lodge.credentials.authenticate(Secret(wrong))
    assert lodge.store.asked == []


async def test_r29_a_key_of_another_environment_or_brand_is_refused_by_its_marking(lodge):
    with pytest.raises(WrongEnvironment):
        await lodge.credentials.authenticate(Secret(api_key("gatelodge", "production", "pk", os.urandom).text))
    with pytest.raises(InvalidCredential):
        await lodge.credentials.authenticate(Secret(api_key("another", "production", "pk", os.urandom).text))
    assert "find_key" not in lodge.store.asked


async def test_a_genuine_id_with_another_secret_is_invalid(lodge):
    _, key = await lodge.new_partner()
    parsed = ApiKey.parse(key.reveal())
    guess = ApiKey(parsed.brand, parsed.environment, parsed.kind, parsed.id, "0" * 30)
    with pytest.raises(InvalidCredential):
        await lodge.credentials.authenticate(Secret(guess.text))
    nobodys = ApiKey(parsed.brand, parsed.environment, parsed.kind, "0" * 12, parsed.secret)
    with pytest.raises(InvalidCredential):
        await lodge.credentials.authenticate(Secret(nobodys.text))


async def test_a_partners_key_is_not_taken_for_one_of_another_kind(lodge):
    _, key = await lodge.new_partner()
    parsed = ApiKey.parse(key.reveal())
    other = ApiKey(parsed.brand, parsed.environment, "ck", parsed.id, parsed.secret)
    with pytest.raises(InvalidCredential):
        await lodge.credentials.authenticate(Secret(other.text))


@pytest.mark.parametrize("offset", AROUND)
async def test_r40_a_rotated_key_works_until_its_overlap_ends(lodge, offset):
    _, key = await lodge.new_partner()
    issued = await lodge.credentials.rotate(id_of(key), overlap=HOUR, by="test")
    lodge.clock.now = START + HOUR + offset
    assert (await lodge.credentials.authenticate(issued.text)).partner_id == "acme-motors"
    if offset < 0:
        await lodge.credentials.authenticate(key)
    else:
        with pytest.raises(CredentialRotated):
            await lodge.credentials.authenticate(key)


async def test_a_key_rotated_without_an_overlap_stays_dead_when_the_clock_is_set_back(lodge):
    _, key = await lodge.new_partner()
    await lodge.credentials.rotate(id_of(key), overlap=0, by="test")
    for lodge.clock.now in (START, START - 1, START - HOUR):
        with pytest.raises(CredentialRotated):
            await lodge.credentials.authenticate(key)


async def test_an_overlap_that_was_cut_short_does_not_come_back_when_the_clock_is_set_back(lodge):
    await lodge.new_partner()
    details = CompanyDetails(company_name="Müller GmbH", country="DE", tax_number="12/345/67890")
    company = await lodge.companies.create("acme-motors", details, idempotency_key=None)
    await lodge.companies.rotate_key("acme-motors", company.company_id, overlap=HOUR, idempotency_key=None)
    lodge.clock.now = START + 10
    await lodge.credentials.authenticate(company.api_key)
    await lodge.companies.rotate_key("acme-motors", company.company_id, overlap=0, idempotency_key=None)
    for lodge.clock.now in (START + 10, START + 9, START):
        with pytest.raises(CredentialRotated):
            await lodge.credentials.authenticate(company.api_key)


async def test_a_companys_key_stays_a_companys_when_it_is_rotated(lodge):
    await lodge.new_partner()
    details = CompanyDetails(company_name="Müller GmbH", country="DE", tax_number="12/345/67890")
    company = await lodge.companies.create("acme-motors", details, idempotency_key=None)
    issued = await lodge.credentials.rotate(id_of(company.api_key), overlap=0, by="test")
    assert "_ck_" in issued.text.reveal()
    assert (await lodge.credentials.authenticate(issued.text)).company_id == company.company_id


async def test_a_revoked_key_is_dead_and_cannot_be_rotated(lodge):
    _, key = await lodge.new_partner()
    assert await lodge.credentials.revoke(id_of(key), by="test") > 0
    with pytest.raises(CredentialRevoked):
        await lodge.credentials.authenticate(key)
    with pytest.raises(KeyEnded):
        await lodge.credentials.rotate(id_of(key), overlap=0, by="test")


async def test_a_key_that_is_not_there_is_refused(lodge):
    with pytest.raises(KeyNotFound):
        await lodge.credentials.rotate("0" * 12, overlap=0, by="test")
    with pytest.raises(KeyNotFound):
        await lodge.credentials.revoke("0" * 12, by="test")
