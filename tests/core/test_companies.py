"""Companies as their partner deals with them, lost answers included."""

import asyncio
from uuid import UUID

import pytest
from given import AROUND, START

from gatelodge.errors import CredentialRevoked, CredentialRotated
from gatelodge_server.core.companies import REPLAY_WINDOW, canonical_tax_number
from gatelodge_server.core.model import HOUR, CompanyDetails
from gatelodge_server.core.refusals import CompanyExists, CompanyNotFound, IdempotencyKeyReused, IdempotencyKeySpent

DETAILS = CompanyDetails(company_name="Müller GmbH", country="DE", tax_number="12/345/67890")
OTHER = CompanyDetails(company_name="Schmidt KG", country="DE", tax_number="98/765/43210")
NOBODY = UUID(int=0)


@pytest.fixture
async def acme(lodge):
    return (await lodge.new_partner())[0]


@pytest.fixture
async def zeta(lodge, acme):
    return (await lodge.new_partner("Zeta"))[0]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("12/345/67890", "1234567890"),
        (" 12 345-678.90\t", "1234567890"),
        ("１２３", "123"),  # noqa: RUF001 - full-width digits
        ("de-123abc", "DE123ABC"),
        ("ﬁ1", "FI1"),
        ("", ""),
    ],
)
def test_tax_numbers_are_compared_without_what_is_there_for_reading(text, canonical):
    assert canonical_tax_number(text) == canonical
    assert canonical_tax_number(canonical) == canonical


async def test_a_company_is_created_with_a_key_of_its_own(lodge, acme):
    made = await lodge.companies.create(acme, DETAILS, idempotency_key=None)
    company = await lodge.companies.get(acme, made.company_id)
    assert (company.details, company.partner_id, company.created_at) == (DETAILS, acme, START)
    holder = await lodge.credentials.authenticate(made.api_key)
    assert (holder.company_id, holder.partner_id, holder.kind) == (made.company_id, acme, "company")
    assert made.api_key.reveal() not in repr(made)


async def test_a_company_is_created_once(lodge, acme, zeta):
    await lodge.companies.create(acme, DETAILS, idempotency_key=None)
    for key in (None, "once"):
        with pytest.raises(CompanyExists):
            await lodge.companies.create(acme, DETAILS, idempotency_key=key)
    await lodge.companies.create(zeta, DETAILS, idempotency_key=None)


async def test_r52_another_partners_company_is_as_good_as_not_there(lodge, acme, zeta):
    made = await lodge.companies.create(acme, DETAILS, idempotency_key=None)
    for partner, company in ((zeta, made.company_id), (acme, NOBODY)):
        for refusal in (
            lodge.companies.get(partner, company),
            lodge.companies.delete(partner, company),
            lodge.companies.rotate_key(partner, company, overlap=0, idempotency_key=None),
            lodge.companies.rotate_key(partner, company, overlap=0, idempotency_key="once"),
        ):
            with pytest.raises(CompanyNotFound):
                await refusal
    assert await lodge.companies.list_page(zeta, before=None, limit=10) == []
    await lodge.credentials.authenticate(made.api_key)


async def test_a_page_of_companies_is_newest_first(lodge, acme):
    first = await lodge.companies.create(acme, DETAILS, idempotency_key=None)
    lodge.clock.forward(1)
    second = await lodge.companies.create(acme, OTHER, idempotency_key=None)
    page = await lodge.companies.list_page(acme, before=None, limit=10)
    assert [company.id for company in page] == [second.company_id, first.company_id]
    assert [one.id for one in await lodge.companies.list_page(acme, before=second.company_id, limit=1)] == [first.company_id]


async def test_a_deleted_company_is_gone_and_its_key_dead(lodge, acme):
    made = await lodge.companies.create(acme, DETAILS, idempotency_key=None)
    assert await lodge.companies.delete(acme, made.company_id) > 0
    with pytest.raises(CompanyNotFound):
        await lodge.companies.get(acme, made.company_id)
    with pytest.raises(CredentialRevoked):
        await lodge.credentials.authenticate(made.api_key)


@pytest.mark.parametrize("offset", AROUND)
async def test_r40_a_company_gets_a_new_key_and_the_old_one_works_for_the_overlap(lodge, acme, offset):
    made = await lodge.companies.create(acme, DETAILS, idempotency_key=None)
    rotated = await lodge.companies.rotate_key(acme, made.company_id, overlap=HOUR, idempotency_key=None)
    assert rotated.company_id == made.company_id
    lodge.clock.now = START + HOUR + offset
    await lodge.credentials.authenticate(rotated.api_key)
    if offset < 0:
        await lodge.credentials.authenticate(made.api_key)
    else:
        with pytest.raises(CredentialRotated):
            await lodge.credentials.authenticate(made.api_key)


async def create(lodge, partner, key, details=DETAILS):
    return await lodge.companies.create(partner, details, idempotency_key=key)


async def rotate(lodge, partner, key, overlap=0):
    (company,) = await lodge.companies.list_page(partner, before=None, limit=1) or [None]
    company_id = company.id if company else (await create(lodge, partner, None)).company_id
    return await lodge.companies.rotate_key(partner, company_id, overlap=overlap, idempotency_key=key)


ways = pytest.mark.parametrize("ask", [create, rotate])


@ways
async def test_p11_a_lost_answer_comes_again_with_the_same_key(lodge, acme, ask):
    made = await ask(lodge, acme, "once")
    lodge.clock.forward(REPLAY_WINDOW - 1)
    again = await ask(lodge, acme, "once")
    assert (again.company_id, again.api_key.reveal()) == (made.company_id, made.api_key.reveal())


@ways
async def test_p11_of_many_at_once_with_one_idempotency_key_all_get_one_key(lodge, acme, ask):
    if ask is rotate:
        await create(lodge, acme, None)
    answers = await asyncio.gather(*(ask(lodge, acme, "once") for _ in range(20)))
    assert len({(answer.company_id, answer.api_key.reveal()) for answer in answers}) == 1


@ways
@pytest.mark.parametrize("offset", AROUND)
async def test_a_lost_answer_can_be_had_again_for_ten_minutes(lodge, acme, ask, offset):
    await ask(lodge, acme, "once")
    lodge.clock.now = START + REPLAY_WINDOW + offset
    if offset < 0:
        await ask(lodge, acme, "once")
    else:
        with pytest.raises(IdempotencyKeySpent):
            await ask(lodge, acme, "once")


@ways
async def test_a_lost_answer_is_gone_once_its_key_has_logged_in(lodge, acme, ask):
    made = await ask(lodge, acme, "once")
    await lodge.sessions.log_in(made.api_key)
    with pytest.raises(IdempotencyKeySpent):
        await ask(lodge, acme, "once")


async def test_an_idempotency_key_belongs_to_one_request(lodge, acme):
    made = await create(lodge, acme, "once")
    with pytest.raises(IdempotencyKeyReused):
        await create(lodge, acme, "once", OTHER)
    with pytest.raises(IdempotencyKeyReused):
        await rotate(lodge, acme, "once")
    await rotate(lodge, acme, "twice", overlap=5)
    with pytest.raises(IdempotencyKeyReused):
        await rotate(lodge, acme, "twice", overlap=6)
    assert made.company_id == (await rotate(lodge, acme, "thrice")).company_id


async def test_an_idempotency_key_belongs_to_one_partner(lodge, acme, zeta):
    mine, theirs = await create(lodge, acme, "once"), await create(lodge, zeta, "once")
    assert mine.company_id != theirs.company_id
    assert mine.api_key.reveal() != theirs.api_key.reveal()


@ways
async def test_r69_the_row_alone_does_not_open_what_is_sealed(lodge, acme, ask):
    made = await ask(lodge, acme, "the-idempotency-key")
    secret = made.api_key.reveal()[-36:-6].encode()
    for path in lodge.backend.path.parent.iterdir():
        written = path.read_bytes()
        assert secret not in written
        assert b"the-idempotency-key" not in written
