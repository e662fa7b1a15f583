"""The verbs of partners and their keys."""

import asyncio

import pytest
from given import AROUND, START, a_company, a_key, a_login, a_partner, changed

from gatelodge.errors import CredentialRevoked, CredentialRotated
from gatelodge_server.core.model import DAY, HOUR, EndCause, Origin, PartnerStatus
from gatelodge_server.core.ports import Created, Done, Opened, Refused
from gatelodge_server.core.refusals import (
    KeyEnded,
    KeyNotFound,
    PartnerDeactivated,
    PartnerIdTaken,
    PartnerNotFound,
    TierNotFound,
)

# --- add_partner, find_partner, list_partners ---


async def test_a_partner_is_kept_as_it_was_added(store, trail):
    partner = a_partner(name="Société Générale — Straße ☃", tier="growth", origin=Origin.SELF_SERVICE)
    key = a_key()
    done = await store.add_partner(partner, key, by="manager")
    assert isinstance(done, Done)
    assert await store.find_partner("acme-motors") == partner
    assert await store.list_keys("acme-motors") == [key]
    assert await trail("acme-motors") == (["partner"], ["partner.added"])
    (change,) = await store.list_changes(after=done.sequence - 1, limit=10)
    assert (change.sequence, change.at) == (done.sequence, START)
    (event,) = await store.list_audit(partner_id="acme-motors", since=None)
    assert (event.actor, event.at, event.detail) == ("manager", START, key.masked)


async def test_an_id_is_never_given_twice_even_after_deactivation(store, key, backend):
    twin = a_key()
    assert await store.add_partner(a_partner(name="Twin"), twin, by="test") == Refused(PartnerIdTaken)
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    assert await store.add_partner(a_partner(name="Twin"), twin, by="test") == Refused(PartnerIdTaken)
    assert (await store.find_partner("acme-motors")).name == "Acme Motors"
    assert await store.find_key(twin.id) is None
    assert backend.count("audit") == 2


async def test_a_partner_of_no_tier_is_not_added(store, backend):
    assert await store.add_partner(a_partner(tier="gold"), a_key(), by="test") == Refused(TierNotFound)
    assert [backend.count(table) for table in ("partner", "credential", "audit", "change")] == [0, 0, 0, 0]


async def test_a_partner_that_is_not_there_is_not_found(store, key):
    assert await store.find_partner("acme") is None
    assert await store.find_partner("ACME-MOTORS") is None
    assert await store.find_partner("acme-motors ") is None


async def test_partners_are_listed_by_id(store):
    assert await store.list_partners() == []
    partners = [a_partner(name) for name in ("zeta", "acme", "miller")]
    for partner in partners:
        await store.add_partner(partner, a_key(partner.id), by="test")
    assert await store.list_partners() == sorted(partners, key=lambda partner: partner.id)


async def test_of_two_partners_with_one_id_one_is_added(store, other_node):
    keys = [a_key() for _ in range(8)]
    outcomes = await asyncio.gather(
        *((store, other_node)[at % 2].add_partner(a_partner(name=f"{at}"), key, by="test") for at, key in enumerate(keys))
    )
    (winner,) = [at for at, outcome in enumerate(outcomes) if isinstance(outcome, Done)]
    assert [outcome for outcome in outcomes if outcome == Refused(PartnerIdTaken)] == [Refused(PartnerIdTaken)] * 7
    assert (await store.find_partner("acme-motors")).name == f"{winner}"
    assert [key.id for key in await store.list_keys("acme-motors")] == [keys[winner].id]


# --- set_partner_status ---


@pytest.mark.parametrize("status", PartnerStatus)
async def test_a_status_is_set_and_told_to_everybody(store, key, trail, status):
    done = await store.set_partner_status("acme-motors", status, now=START + 1, by="manager")
    assert (await store.find_partner("acme-motors")).status is status
    assert (await store.find_key(key.id)).partner_status is status
    assert await trail("acme-motors") == (["partner", "partner"], ["partner.added", f"partner.{status}"])
    assert (await store.list_changes(after=done.sequence - 1, limit=10))[0].at == START + 1


async def test_only_what_is_not_active_moves_the_epoch(store, key):
    epochs = []
    for status in (PartnerStatus.ACTIVE, PartnerStatus.SUSPENDED, PartnerStatus.ACTIVE, PartnerStatus.SUSPENDED):
        await store.set_partner_status("acme-motors", status, now=START, by="test")
        epochs.append((await store.find_key(key.id)).session_epoch)
    assert epochs == [0, 1, 1, 2]


async def test_a_partner_that_is_not_there_has_no_status(store, key, backend):
    refused = await store.set_partner_status("acme", PartnerStatus.SUSPENDED, now=START, by="test")
    assert refused == Refused(PartnerNotFound)
    assert (await store.find_partner("acme-motors")).status is PartnerStatus.ACTIVE
    assert backend.count("change") == 1


@pytest.mark.parametrize("status", [PartnerStatus.ACTIVE, PartnerStatus.SUSPENDED])
async def test_r38_deactivation_is_final(store, key, status):
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    assert await store.set_partner_status("acme-motors", status, now=START, by="test") == Refused(PartnerDeactivated)
    assert (await store.find_partner("acme-motors")).status is PartnerStatus.DEACTIVATED
    again = await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    assert isinstance(again, Done)


async def test_of_a_deactivation_and_a_resumption_at_once_the_deactivation_stays(store, other_node, key):
    for at in range(10):
        name = f"partner-{at}"
        await store.add_partner(a_partner(name), a_key(name), by="test")
        await asyncio.gather(
            store.set_partner_status(name, PartnerStatus.DEACTIVATED, now=START, by="test"),
            other_node.set_partner_status(name, PartnerStatus.ACTIVE, now=START, by="test"),
        )
        assert (await store.find_partner(name)).status is PartnerStatus.DEACTIVATED


# --- find_key, get_key, list_keys ---


async def test_a_key_is_found_with_all_that_decides_about_it(store, key, company_key):
    standing = await store.find_key(company_key.id)
    assert standing.holder.partner_id == "acme-motors"
    assert standing.holder.company_id == company_key.company_id
    assert standing.holder.credential_id == company_key.id
    assert standing.holder.tier == "starter"
    assert standing.digest == company_key.digest
    assert (standing.ends_at, standing.end_cause) == (None, None)
    assert standing.partner_status is PartnerStatus.ACTIVE
    assert standing.session_epoch == 0
    assert standing.company_gone is False
    assert (await store.find_key(key.id)).holder.company_id is None


async def test_keys_asked_for_at_once_each_come_back_to_the_one_who_asked(store, key, company_key):
    strangers = [a_key().id for _ in range(3)]
    asked = [strangers[0], key.id, company_key.id, strangers[1], key.id, strangers[2]]
    found = await asyncio.gather(*(store.find_key(id_) for id_ in asked))
    told = [standing.holder.credential_id if standing else None for standing in found]
    assert told == [id_ if id_ in (key.id, company_key.id) else None for id_ in asked]


async def test_a_key_is_given_back_as_it_was_stored(store, key, company_key):
    assert await store.get_key(key.id) == key
    assert await store.get_key(company_key.id) == company_key
    assert await store.get_key(a_key().id) is None
    assert await store.get_key(key.id.swapcase()) is None


async def test_keys_are_listed_newest_first_with_those_of_companies(store, key):
    companies = [a_company() for _ in range(2)]
    keys = [key]
    for later, company in enumerate(companies, start=1):
        keys.append(a_key(company_id=company.id, created_at=START + later))
        await store.create_company(company, keys[-1], replay=None, by="test")
    stranger = a_key("zeta", created_at=START + 9)
    await store.add_partner(a_partner("zeta"), stranger, by="test")
    assert await store.list_keys("acme-motors") == keys[::-1]
    assert await store.list_keys("zeta") == [stranger]
    assert await store.list_keys("nobody") == []


# --- roll_key ---


async def test_r40_a_rotated_key_ends_and_its_replacement_stands(store, key, trail):
    replacement = a_key(created_at=START + 5)
    done = await store.roll_key(key.id, replacement, ends_at=START + DAY, now=START + 5, by="manager")
    assert isinstance(done, Done)
    assert await store.get_key(key.id) == changed(key, ends_at=START + DAY, end_cause=EndCause.ROTATED)
    assert await store.get_key(replacement.id) == replacement
    assert await trail(key.id) == (["credential"], ["key.rotated"])
    (change,) = await store.list_changes(after=done.sequence - 1, limit=10)
    assert (change.kind, change.subject, change.at) == ("credential", key.id, START + 5)
    event = (await store.list_audit(partner_id="acme-motors", since=START + 5))[-1]
    assert (event.actor, event.detail) == ("manager", replacement.masked)


async def test_r40_without_an_overlap_the_old_key_is_dead_at_once(store, key):
    replacement = a_key()
    await store.roll_key(key.id, replacement, ends_at=START, now=START, by="test")
    assert await store.open_session(a_login(key)) == Refused(CredentialRotated)
    assert isinstance(await store.open_session(a_login(replacement)), Opened)


async def test_the_key_of_a_company_is_rotated_like_any_other(store, company_key):
    replacement = a_key(company_id=company_key.company_id)
    await store.roll_key(company_key.id, replacement, ends_at=START, now=START, by="test")
    outcome = await store.open_session(a_login(replacement))
    assert outcome.holder.company_id == company_key.company_id


async def test_a_key_that_is_not_there_cannot_be_rotated(store, key):
    replacement = a_key()
    refused = await store.roll_key(a_key().id, replacement, ends_at=START, now=START, by="test")
    assert refused == Refused(KeyNotFound)
    assert await store.get_key(replacement.id) is None


@pytest.mark.parametrize("offset", [-DAY, *AROUND])
async def test_a_key_that_was_rotated_is_not_rotated_again_even_in_its_overlap(store, key, offset):
    await store.roll_key(key.id, a_key(), ends_at=START + DAY, now=START, by="test")
    replacement = a_key()
    refused = await store.roll_key(key.id, replacement, ends_at=START + 9, now=START + DAY + offset, by="test")
    assert refused == Refused(KeyEnded)
    assert await store.get_key(replacement.id) is None
    assert (await store.get_key(key.id)).ends_at == START + DAY


async def test_a_revoked_key_is_not_rotated_back_to_life(store, key):
    await store.revoke_key(key.id, now=START, by="test")
    replacement = a_key()
    refused = await store.roll_key(key.id, replacement, ends_at=START + DAY, now=START, by="test")
    assert refused == Refused(KeyEnded)
    assert await store.get_key(replacement.id) is None


async def test_no_key_of_a_deactivated_partner_is_rotated(store, key):
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    assert await store.roll_key(key.id, a_key(), ends_at=START, now=START, by="test") == Refused(PartnerDeactivated)


async def test_a_suspended_partners_key_is_rotated_and_the_new_one_suspended_too(store, key):
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    replacement = a_key()
    assert isinstance(await store.roll_key(key.id, replacement, ends_at=START, now=START, by="test"), Done)
    assert (await store.find_key(replacement.id)).partner_status is PartnerStatus.SUSPENDED


async def test_no_key_of_a_deleted_company_is_rotated(store, company_key):
    await store.delete_company("acme-motors", company_key.company_id, now=START, by="test")
    replacement = a_key(company_id=company_key.company_id)
    assert await store.roll_key(company_key.id, replacement, ends_at=START, now=START, by="test") == Refused(KeyEnded)


async def test_of_many_rotations_of_one_key_one_wins(store, other_node, key):
    replacements = [a_key() for _ in range(10)]
    outcomes = await asyncio.gather(
        *(
            (store, other_node)[at % 2].roll_key(key.id, replacement, ends_at=START + DAY, now=START, by="test")
            for at, replacement in enumerate(replacements)
        )
    )
    (winner,) = [at for at, outcome in enumerate(outcomes) if isinstance(outcome, Done)]
    assert outcomes.count(Refused(KeyEnded)) == 9
    assert {found.id for found in await store.list_keys("acme-motors")} == {key.id, replacements[winner].id}


# --- revoke_key ---


async def test_a_revoked_key_is_dead_from_that_moment_on(store, key, trail):
    done = await store.revoke_key(key.id, now=START + 5, by="manager")
    assert isinstance(done, Done)
    assert await store.get_key(key.id) == changed(key, ends_at=START + 5, end_cause=EndCause.REVOKED)
    assert await trail(key.id) == (["credential"], ["key.revoked"])
    assert (await store.list_changes(after=done.sequence - 1, limit=10))[0].subject == key.id


async def test_revoking_a_key_twice_is_no_fault_and_changes_nothing(store, key):
    await store.revoke_key(key.id, now=START + 5, by="test")
    before = await store.get_key(key.id)
    again = await store.revoke_key(key.id, now=START + 6, by="test")
    assert isinstance(again, Done)
    assert again.sequence > 0
    assert await store.get_key(key.id) == before


@pytest.mark.parametrize("offset", AROUND)
async def test_a_rotated_key_can_be_revoked_whether_it_has_ended_or_not_and_no_clock_brings_it_back(store, key, offset):
    await store.roll_key(key.id, a_key(), ends_at=START + DAY, now=START, by="test")
    now = START + DAY + offset
    await store.revoke_key(key.id, now=now, by="test")
    assert (await store.get_key(key.id)).ends_at == min(now, START + DAY)
    for asked_at in (now + 1, START + HOUR, START - DAY):
        assert await store.open_session(a_login(key, now=asked_at)) == Refused(CredentialRevoked)


async def test_the_moment_of_a_rotation_is_kept(store, key):
    assert (await store.find_key(key.id)).rotated_at is None
    await store.roll_key(key.id, a_key(), ends_at=START + DAY, now=START + 5, by="test")
    assert (await store.find_key(key.id)).rotated_at == START + 5
    await store.revoke_key(key.id, now=START + 9, by="test")
    assert (await store.find_key(key.id)).rotated_at == START + 5


async def test_no_rotation_undoes_a_revocation_that_a_clock_set_back_puts_into_the_future(store, company_key):
    await store.revoke_key(company_key.id, now=START + DAY, by="test")
    replacement = a_key(company_id=company_key.company_id)
    rolled = {"ends_at": START + HOUR, "replay": None, "now": START, "by": "test"}
    assert isinstance(await store.roll_company_key(company_key.company_id, replacement, **rolled), Created)
    assert (await store.get_key(company_key.id)).end_cause is EndCause.REVOKED
    assert await store.open_session(a_login(company_key)) == Refused(CredentialRevoked)


async def test_a_key_that_is_not_there_cannot_be_revoked(store, key, backend):
    before = backend.count("change")
    assert await store.revoke_key(a_key().id, now=START, by="test") == Refused(KeyNotFound)
    assert backend.count("change") == before


async def test_of_a_rotation_and_a_revocation_at_once_the_key_is_dead_whoever_was_first(store, other_node, key):
    for at in range(10):
        name = f"partner-{at}"
        old = a_key(name)
        await store.add_partner(a_partner(name), old, by="test")
        await asyncio.gather(
            store.roll_key(old.id, a_key(name), ends_at=START + DAY, now=START, by="test"),
            other_node.revoke_key(old.id, now=START, by="test"),
        )
        assert await store.open_session(a_login(old)) == Refused(CredentialRevoked)


async def test_the_first_use_of_a_key_is_noted_once_and_stays(store, key):
    assert (await store.find_key(key.id)).first_used_at is None
    await store.note_first_use(key.id, now=START + 1)
    await store.note_first_use(key.id, now=START + 2)
    assert (await store.find_key(key.id)).first_used_at == START + 1
