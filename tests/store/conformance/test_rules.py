"""What a row breaks decides what is heard of it: a name that is taken is an answer, anything else a fault that is raised."""

import asyncio

import pytest
from given import START, a_company, a_confirmation, a_key, a_partner, a_registration, changed
from sqlalchemy.exc import IntegrityError

from gatelodge_server.core.ports import Confirmed, Created, Done, MailLimits, Refused
from gatelodge_server.core.refusals import CompanyExists, PartnerIdTaken

PLENTY = MailLimits(per_address=100, overall=100, per_address_daily=100)
WRITTEN = ("partner", "company", "credential", "replay", "audit", "change")


@pytest.fixture
def counts(backend):
    """How many rows everything that is written here has."""
    return lambda: [backend.count(table) for table in WRITTEN]


@pytest.fixture
def demand(backend):
    """Lets the values of a column be unique, which no verb knows of."""

    def add(table, column):
        backend.run(lambda connection: connection.exec_driver_sql(f"CREATE UNIQUE INDEX another_rule ON {table} ({column})"))

    return add


async def challenged(store, address, **changes):
    """The challenge of a code that was claimed."""
    await store.begin_registration(a_registration(address, **changes), limits=PLENTY, recovery="on")
    return await store.claim_attempt(address, now=START)


async def test_only_an_id_that_is_taken_makes_a_partner_one_whose_id_is_taken(store, key, counts, demand):
    demand("partner", "contact_email")
    before = counts()
    for broken in (a_partner("zeta"), a_partner("zeta", contact_email="z@zeta.example", name=None)):
        with pytest.raises(IntegrityError):
            await store.add_partner(broken, a_key(broken.id), by="test")
    assert counts() == before
    twin = a_partner(contact_email="twin@acme.example")
    assert await store.add_partner(twin, a_key(), by="test") == Refused(PartnerIdTaken)
    zeta = a_partner("zeta", contact_email="z@zeta.example")
    assert isinstance(await store.add_partner(zeta, a_key("zeta"), by="test"), Done)


async def test_only_a_tax_number_that_is_taken_makes_a_company_one_that_exists(store, key, counts, demand):
    demand("company", "vat_number")
    first = a_company(tax_number="12/345/67890", vat_number="DE1")
    assert isinstance(await store.create_company(first, a_key(company_id=first.id), replay=None, by="test"), Created)
    before = counts()
    for broken in (
        a_company("nobody"),
        a_company(company_name=None),
        a_company(vat_number="DE1"),
        changed(a_company(), id=first.id),
    ):
        with pytest.raises(IntegrityError):
            await store.create_company(broken, a_key(company_id=broken.id), replay=None, by="test")
    assert counts() == before
    twin = a_company(tax_number="12-345-67890")
    assert await store.create_company(twin, a_key(company_id=twin.id), replay=None, by="test") == Refused(CompanyExists)


async def test_only_an_id_that_is_taken_lets_a_registration_try_the_next(store, key, counts, demand):
    demand("partner", "name")
    before = counts()
    broken = a_confirmation(await challenged(store, "dev@zeta.example"), "dev@zeta.example")
    with pytest.raises(IntegrityError):
        await store.confirm_registration(broken)
    assert counts() == before
    challenge = await challenged(store, "dev@zeta.example", display_name="Zeta")
    outcome = await store.confirm_registration(a_confirmation(challenge, "dev@zeta.example"))
    assert isinstance(outcome, Confirmed)
    assert outcome.partner_id == "acme-motors-2"


async def test_what_is_written_to_no_effect_breaks_no_rule_in_silence(store, backend, demand):
    demand("verification", "display_name")
    await challenged(store, "dev@acme.example", display_name="")
    with pytest.raises(IntegrityError):
        await store.claim_attempt("nobody@acme.example", now=START)
    assert backend.rows("verification", "address") == [("dev@acme.example",)]


async def test_many_who_want_one_id_at_once_each_get_another(store, other_node):
    candidates = ("acme-motors", *(f"acme-motors-{number}" for number in range(2, 13)))
    rights = [
        a_confirmation(await challenged(store, address), address, candidates=candidates)
        for address in (f"dev{number}@acme.example" for number in range(12))
    ]
    outcomes = await asyncio.gather(
        *((store, other_node)[at % 2].confirm_registration(right) for at, right in enumerate(rights))
    )
    assert {outcome.partner_id for outcome in outcomes} == set(candidates)


async def test_of_one_that_registers_and_one_that_is_added_with_one_id_both_hear_who_has_it(store, other_node):
    for number in range(10):
        name, address = f"p{number}", f"dev{number}@acme.example"
        right = a_confirmation(await challenged(store, address), address, candidates=(name, f"{name}-2"))
        registered, added = await asyncio.gather(
            store.confirm_registration(right), other_node.add_partner(a_partner(name), a_key(name), by="test")
        )
        if isinstance(added, Done):
            assert registered.partner_id == f"{name}-2"
        else:
            assert (added, registered.partner_id) == (Refused(PartnerIdTaken), name)
