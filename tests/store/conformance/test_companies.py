"""The verbs of companies, and of the answers that may be asked for again."""

import asyncio
from dataclasses import fields
from uuid import UUID

import pytest
from given import AROUND, START, a_company, a_key, a_login, a_partner, a_replay, changed

from gatelodge.errors import CredentialRevoked, CredentialRotated
from gatelodge_server.core.model import DAY, CompanyDetails, EndCause
from gatelodge_server.core.ports import Created, Done, Opened, Refused, Replayed
from gatelodge_server.core.refusals import CompanyExists, CompanyNotFound, IdempotencyKeyReused, IdempotencyKeySpent

NOBODY = UUID(int=0)


@pytest.fixture
async def zeta(store, key):
    """Another partner."""
    await store.add_partner(a_partner("zeta"), a_key("zeta"), by="test")
    return "zeta"


async def created(store, company, key=None, *, replay=None):
    key = key or a_key(company.partner_id, company.id)
    outcome = await store.create_company(company, key, replay=replay, by="test")
    assert isinstance(outcome, Created)
    return key


async def rolled(store, company_id, replacement, *, ends_at=START, replay=None, now=START):
    return await store.roll_company_key(company_id, replacement, ends_at=ends_at, replay=replay, now=now, by="test")


# --- create_company, find_company, list_companies ---


async def test_a_company_is_kept_as_it_was_created(store, key, trail):
    said = {field.name: f"{field.name} ü☃"[:34] for field in fields(CompanyDetails)} | {
        "country": "DE",
        "bic_number": "ACMEDEFFXXX",
    }
    company = a_company(**said)
    company_key = a_key(company_id=company.id)
    outcome = await store.create_company(company, company_key, replay=None, by="partner:acme-motors")
    assert isinstance(outcome, Created)
    assert outcome.company_id == company.id
    assert await store.find_company("acme-motors", company.id) == company
    assert await store.get_key(company_key.id) == company_key
    assert isinstance(await store.open_session(a_login(company_key)), Opened)
    assert await trail(str(company.id)) == (["company"], ["company.created"])
    (change,) = await store.list_changes(after=outcome.sequence - 1, limit=10)
    assert (change.subject, change.at) == (str(company.id), START)
    event = (await store.list_audit(partner_id="acme-motors", since=None))[-1]
    assert (event.actor, event.detail) == ("partner:acme-motors", company_key.masked)


async def test_what_a_company_did_not_say_stays_unsaid(store, key):
    company = a_company()
    await created(store, company)
    assert (await store.find_company("acme-motors", company.id)).details.vat_number is None


@pytest.mark.parametrize("spelling", ["12/345/67890", "12 345 67890", "12-345.678.90", "1234567890", "１２３４５６７８９０"])  # noqa: RUF001
async def test_a_tax_number_is_one_however_it_is_written(store, key, spelling, backend):
    await created(store, a_company(tax_number="12/345/67890"))
    twin = a_company(tax_number=spelling)
    refused = await store.create_company(twin, a_key(company_id=twin.id), replay=a_replay(), by="test")
    assert refused == Refused(CompanyExists)
    assert [backend.count(table) for table in ("company", "credential", "replay", "audit")] == [1, 2, 0, 2]


async def test_a_tax_number_is_unique_per_partner_and_country_only(store, zeta):
    await created(store, a_company(tax_number="1234567890"))
    await created(store, a_company(tax_number="1234567890", country="AT"))
    await created(store, a_company(zeta, tax_number="1234567890"))


async def test_the_tax_number_of_a_deleted_company_is_free_again(store, key):
    company = a_company(tax_number="1234567890")
    await created(store, company)
    await store.delete_company("acme-motors", company.id, now=START, by="test")
    await created(store, a_company(tax_number="1234567890"))


async def test_another_partners_company_is_as_good_as_not_there(store, zeta):
    company = a_company()
    await created(store, company)
    assert await store.find_company(zeta, company.id) is None
    assert await store.find_company("acme-motors", NOBODY) is None
    assert await store.list_companies(zeta, before=None, limit=10) == []


async def test_companies_are_listed_newest_first_page_by_page(store, zeta):
    companies = [a_company(created_at=START + at) for at in range(5)]
    for company in companies:
        await created(store, company)
    await created(store, a_company(zeta, created_at=START + 2))
    newest_first = companies[::-1]
    assert await store.list_companies("acme-motors", before=None, limit=10) == newest_first
    page = await store.list_companies("acme-motors", before=None, limit=2)
    assert page == newest_first[:2]
    page = await store.list_companies("acme-motors", before=page[-1].id, limit=2)
    assert page == newest_first[2:4]
    assert await store.list_companies("acme-motors", before=page[-1].id, limit=2) == newest_first[4:]
    assert await store.list_companies("acme-motors", before=companies[0].id, limit=2) == []


async def test_a_deleted_company_is_not_listed(store, key):
    companies = [a_company(created_at=START + at) for at in range(3)]
    for company in companies:
        await created(store, company)
    await store.delete_company("acme-motors", companies[1].id, now=START, by="test")
    assert await store.list_companies("acme-motors", before=None, limit=10) == [companies[2], companies[0]]
    assert await store.list_companies("acme-motors", before=companies[1].id, limit=10) == [companies[0]]


async def test_of_many_companies_with_one_tax_number_one_is_created(store, other_node, key, backend):
    companies = [a_company(tax_number="1234567890") for _ in range(20)]
    outcomes = await asyncio.gather(
        *(
            (store, other_node)[at % 2].create_company(company, a_key(company_id=company.id), replay=None, by="test")
            for at, company in enumerate(companies)
        )
    )
    (winner,) = [outcome.company_id for outcome in outcomes if isinstance(outcome, Created)]
    assert outcomes.count(Refused(CompanyExists)) == 19
    assert [company.id for company in await store.list_companies("acme-motors", before=None, limit=30)] == [winner]
    assert backend.count("credential") == 2


# --- roll_company_key ---


@pytest.mark.parametrize("offset", AROUND)
async def test_a_company_gets_a_new_key_and_its_old_one_works_until_the_overlap_ends(store, key, trail, offset):
    company = a_company()
    old, new = await created(store, company), a_key(company_id=company.id)
    outcome = await rolled(store, company.id, new, ends_at=START + DAY)
    assert isinstance(outcome, Created)
    assert outcome.company_id == company.id
    assert isinstance(await store.open_session(a_login(new, now=START + DAY + offset)), Opened)
    before = await store.open_session(a_login(old, now=START + DAY + offset))
    assert isinstance(before, Opened) if offset < 0 else before == Refused(CredentialRotated)
    assert await trail(old.id) == (["credential"], ["key.rotated"])
    (change,) = await store.list_changes(after=outcome.sequence - 1, limit=10)
    assert (change.kind, change.subject) == ("company", str(company.id))


async def test_a_rotation_ends_every_key_of_the_company_and_no_other(store, key):
    company, neighbour = a_company(), a_company()
    keys = [await created(store, company)]
    neighbours = await created(store, neighbour)
    for _ in range(2):
        keys.append(a_key(company_id=company.id))
        await rolled(store, company.id, keys[-1], ends_at=START + DAY)
    newest = a_key(company_id=company.id)
    await rolled(store, company.id, newest, ends_at=START + 5, now=START + 5)
    for old in keys:
        stored = await store.get_key(old.id)
        assert (stored.ends_at, stored.end_cause) == (START + 5, EndCause.ROTATED)
    for live in (newest, neighbours, key):
        assert (await store.get_key(live.id)).ends_at is None


async def test_a_rotation_gives_no_ended_key_more_time_and_says_nothing_of_it(store, key, trail):
    company = a_company()
    first, second, third = await created(store, company), a_key(company_id=company.id), a_key(company_id=company.id)
    await rolled(store, company.id, second, ends_at=START)
    await store.revoke_key(second.id, now=START + 1, by="test")
    await rolled(store, company.id, third, ends_at=START + DAY, now=START + 2)
    assert (await store.get_key(first.id)).ends_at == START
    revoked = await store.get_key(second.id)
    assert (revoked.ends_at, revoked.end_cause) == (START + 1, EndCause.REVOKED)
    assert await trail(first.id) == (["credential"], ["key.rotated"])
    assert await trail(second.id) == (["credential"], ["key.revoked"])


async def test_another_partners_company_gets_no_key(store, zeta):
    company = a_company()
    old = await created(store, company)
    for company_id, partner in ((company.id, zeta), (NOBODY, "acme-motors")):
        key = a_key(partner, company_id)
        assert await rolled(store, company_id, key) == Refused(CompanyNotFound)
        assert await store.get_key(key.id) is None
    assert (await store.get_key(old.id)).ends_at is None


async def test_a_deleted_company_gets_no_key(store, key):
    company = a_company()
    await created(store, company)
    await store.delete_company("acme-motors", company.id, now=START, by="test")
    assert await rolled(store, company.id, a_key(company_id=company.id)) == Refused(CompanyNotFound)


async def test_rotations_at_once_leave_the_newest_key_alone_alive(store, other_node, key):
    company = a_company()
    keys = [await created(store, company), *(a_key(company_id=company.id) for _ in range(10))]
    await asyncio.gather(*(rolled((store, other_node)[at % 2], company.id, new) for at, new in enumerate(keys[1:])))
    live = [one.id for one in keys if (await store.get_key(one.id)).ends_at is None]
    assert len(live) == 1


# --- delete_company ---


async def test_a_deleted_company_is_gone_with_all_its_keys(store, key, trail):
    company = a_company()
    keys = [await created(store, company), a_key(company_id=company.id)]
    await rolled(store, company.id, keys[1], ends_at=START + DAY)
    done = await store.delete_company("acme-motors", company.id, now=START + 5, by="partner:acme-motors")
    assert isinstance(done, Done)
    assert await store.find_company("acme-motors", company.id) is None
    for one in keys:
        assert (await store.get_key(one.id)).ends_at == START + 5
        assert (await store.find_key(one.id)).company_gone is True
        assert await store.open_session(a_login(one, now=START + 5)) == Refused(CredentialRevoked)
    changes, events = await trail(str(company.id))
    assert changes[-1] == "company"
    assert events == ["company.created", "company.deleted"]
    assert (await store.list_changes(after=done.sequence - 1, limit=10))[0].subject == str(company.id)


async def test_a_company_is_deleted_once_and_by_its_partner_only(store, zeta):
    company = a_company()
    await created(store, company)
    assert await store.delete_company(zeta, company.id, now=START, by="test") == Refused(CompanyNotFound)
    assert await store.delete_company("acme-motors", NOBODY, now=START, by="test") == Refused(CompanyNotFound)
    assert await store.find_company("acme-motors", company.id) == company
    assert isinstance(await store.delete_company("acme-motors", company.id, now=START, by="test"), Done)
    assert await store.delete_company("acme-motors", company.id, now=START, by="test") == Refused(CompanyNotFound)


async def test_a_key_that_a_rotation_makes_does_not_outlive_a_deletion_at_the_same_time(store, other_node, key):
    for _ in range(10):
        company = a_company()
        keys = [await created(store, company), a_key(company_id=company.id)]
        await asyncio.gather(
            rolled(other_node, company.id, keys[1]),
            store.delete_company("acme-motors", company.id, now=START, by="test"),
        )
        for one in keys:
            assert isinstance(await store.open_session(a_login(one)), Refused)


# --- Replays ---


async def make_by_creation(store, replay, now=START):
    company = a_company(created_at=now)
    key = a_key(company_id=company.id, created_at=now)
    return key, await store.create_company(company, key, replay=replay, by="test")


async def make_by_rotation(store, replay, now=START):
    """Rotate the key of the partner's first company, which is there from the first time on."""
    companies = await store.list_companies("acme-motors", before=None, limit=100)
    if companies:
        company_id = companies[-1].id
    else:
        company = a_company()
        await created(store, company)
        company_id = company.id
    key = a_key(company_id=company_id, created_at=now)
    # The key before works on in an overlap, so what held it may be asked for again too.
    return key, await rolled(store, company_id, key, ends_at=START + 30 * DAY, replay=replay, now=now)


ways = pytest.mark.parametrize("make", [make_by_creation, make_by_rotation])


@ways
async def test_a_lost_answer_is_given_again_and_nothing_is_made_twice(store, key, backend, make):
    replay = a_replay()
    first_key, first = await make(store, replay)
    rows = [backend.count(table) for table in ("company", "credential", "change", "audit", "replay")]
    # What the repetition brings along is sealed anew; what comes back is what was sealed first.
    again_key, again = await make(store, changed(replay, sealed=b"another"))
    assert again == Replayed(first.company_id, replay.sealed)
    assert [backend.count(table) for table in ("company", "credential", "change", "audit", "replay")] == rows
    assert await store.get_key(again_key.id) is None
    assert (await store.get_key(first_key.id)).ends_at is None


@ways
async def test_an_idempotency_key_of_another_request_is_refused(store, key, make):
    replay = a_replay()
    await make(store, replay)
    other_key, refused = await make(store, changed(replay, fingerprint=bytes(32)))
    assert refused == Refused(IdempotencyKeyReused)
    assert await store.get_key(other_key.id) is None


@ways
@pytest.mark.parametrize("offset", AROUND)
async def test_an_answer_can_be_had_again_until_just_before_its_time_is_over(store, key, make, offset):
    replay = a_replay(readable_until=START + DAY)
    _, first = await make(store, replay)
    _, again = await make(store, replay, START + DAY + offset)
    assert again == (Replayed(first.company_id, replay.sealed) if offset < 0 else Refused(IdempotencyKeySpent))


@ways
async def test_an_answer_is_not_given_again_once_its_key_was_used(store, key, make):
    replay = a_replay()
    new_key, _ = await make(store, replay)
    assert isinstance(await store.open_session(a_login(new_key)), Opened)
    _, again = await make(store, replay)
    assert again == Refused(IdempotencyKeySpent)


@ways
async def test_an_answer_is_not_given_again_once_its_key_lets_nobody_in(store, key, make):
    for end in (_revoke, _delete):
        replay = a_replay()
        new_key, made = await make(store, replay)
        await end(store, new_key, made)
        _, again = await make(store, replay)
        assert again == Refused(IdempotencyKeySpent)


async def _revoke(store, key, _):
    await store.revoke_key(key.id, now=START, by="test")


async def _delete(store, _, made):
    assert isinstance(await store.delete_company("acme-motors", made.company_id, now=START, by="test"), Done)


async def test_a_failed_login_does_not_use_up_the_answer(store, key):
    replay = a_replay()
    new_key, first = await make_by_creation(store, replay)
    await store.open_session(a_login(new_key, digest=bytes(32)))
    await store.open_session(a_login(key))
    _, again = await make_by_creation(store, replay)
    assert again == Replayed(first.company_id, replay.sealed)


@ways
async def test_of_many_requests_with_one_idempotency_key_one_is_done(store, other_node, key, backend, make):
    await make(store, None)
    before = backend.count("credential")
    replay = a_replay()
    outcomes = await asyncio.gather(*(make((store, other_node)[at % 2], replay) for at in range(20)))
    (winner,) = [outcome for _, outcome in outcomes if isinstance(outcome, Created)]
    assert [outcome for _, outcome in outcomes if outcome == Replayed(winner.company_id, replay.sealed)] != []
    assert sum(isinstance(outcome, Replayed) for _, outcome in outcomes) == 19
    assert backend.count("credential") == before + 1


async def test_a_company_that_is_asked_for_again_before_it_is_there_is_told_of_and_not_refused_as_a_second(
    store, other_node, key
):
    """The first request is under way on one node when its caller gives up and asks another."""
    for number in range(10):
        replay, details = a_replay(), {"tax_number": f"12/345/{number}"}

        async def make(node, replay=replay, details=details):
            company = a_company(**details)
            return await node.create_company(company, a_key(company_id=company.id), replay=replay, by="test")

        outcomes = await asyncio.gather(*(make(node) for node in (store, other_node) * 3))
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Created)]
        assert outcomes.count(Replayed(winner.company_id, replay.sealed)) == 5


@ways
@pytest.mark.parametrize("offset", AROUND)
async def test_what_may_no_longer_be_repeated_is_blanked_and_after_a_day_forgotten(store, key, backend, make, offset):
    replay, later = a_replay(readable_until=START + DAY), a_replay(readable_until=START + 9 * DAY)
    _, first = await make(store, replay)
    _, second = await make(store, later)
    await store.forget_replays(now=START + DAY + offset)
    _, again = await make(store, replay)
    assert again == (Replayed(first.company_id, replay.sealed) if offset < 0 else Refused(IdempotencyKeySpent))
    await store.forget_replays(now=START + 2 * DAY + offset)
    assert backend.count("replay") == (2 if offset < 0 else 1)
    _, again = await make(store, later)
    assert again == Replayed(second.company_id, later.sealed)
