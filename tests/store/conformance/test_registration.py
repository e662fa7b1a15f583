"""The registration verbs: every outcome, every boundary in threes, and whatever may happen at once."""

import asyncio
import os
from collections import Counter
from dataclasses import replace

import pytest
from given import AROUND, START, a_company, a_confirmation, a_key, a_login, a_partner, a_registration, a_replay
from sqlalchemy import select, update

from gatelodge.errors import CredentialRevoked, CredentialRotated, InvalidCredential, PartnerSuspended
from gatelodge_server.core.credentials import judge_standing
from gatelodge_server.core.model import DAY, HOUR, MINUTE, EndCause, MailKind, Origin, PartnerStatus, Tier
from gatelodge_server.core.ports import (
    Begun,
    Challenge,
    Confirmed,
    Created,
    Deactivated,
    Limited,
    MailLimits,
    Opened,
    Refused,
    Rolled,
    RolledBefore,
    RolledTooOften,
)
from gatelodge_server.core.refusals import (
    IdempotencyKeyReused,
    IdempotencyKeySpent,
    InvalidVerificationCode,
    KeyEnded,
    NotAllowed,
    PartnerDeactivated,
    PartnerIdTaken,
    TierNotFound,
)
from gatelodge_server.store.tables import metadata

ADDRESS = "dev@acme.example"
LIMITS = MailLimits(per_address=5, overall=1000, per_address_daily=15)
PLENTY = MailLimits(per_address=100_000, overall=100_000, per_address_daily=100_000)
INVALID = Refused(InvalidVerificationCode)
TTL = 10 * MINUTE
STARTER = Tier("starter", 100, 1000)


async def begin(store, address=ADDRESS, *, limits=PLENTY, recovery="on", **changes):
    registration = a_registration(address, **changes)
    await store.begin_registration(registration, limits=limits, recovery=recovery)
    return registration


async def asked(store, address=ADDRESS, *, limits=LIMITS, recovery="on", **changes):
    """What the log is told of a registration."""
    return await store.begin_registration(a_registration(address, **changes), limits=limits, recovery=recovery)


async def claimed(store, address=ADDRESS, *, now=START):
    challenge = await store.claim_attempt(address, now=now)
    assert isinstance(challenge, Challenge)
    return challenge


async def registered(store, address=ADDRESS, *, now=START, **changes):
    """A partner that has registered itself: what was confirmed, and with what."""
    await begin(store, address, now=now)
    right = a_confirmation(await claimed(store, address, now=now), address, now=now, **changes)
    outcome = await store.confirm_registration(right)
    assert isinstance(outcome, Confirmed)
    return outcome, right


async def mails(store, *, now=START):
    return list(await store.claim_mails(limit=1000, now=now, until=now))


async def kinds(store):
    return Counter(mail.kind for mail in await mails(store))


def rows(backend, table, *, writing=None):
    """The rows of a table, seen from outside."""

    def verb(connection):
        if writing is not None:
            connection.execute(update(metadata.tables[table]).values(writing))
        return connection.execute(select(metadata.tables[table])).all()

    return backend.run(verb)


# --- begin_registration ---


async def test_a_new_address_is_sent_a_code(store, backend):
    asked = await begin(store, organization_name="Acme", contact_email="Dev@acme.example")
    (mail,) = await mails(store)
    assert (mail.kind, mail.recipient, mail.sealed) == (MailKind.VERIFICATION, "Dev@acme.example", b"sealed code")
    assert mail.facts == {"displayName": "Acme Motors", "organizationName": "Acme"}
    assert (mail.id, mail.created_at, mail.expires_at) == (asked.mail_id, START, START + TTL)
    assert backend.count("partner") == 0
    assert await store.claim_attempt(ADDRESS, now=START) == Challenge(
        asked.salt, asked.digest, START, None, "Acme Motors", "Acme", is_confirmed=False, sealed=None
    )


async def test_r58_a_new_code_takes_the_place_of_the_one_before(store):
    await begin(store)
    old = await claimed(store)
    newer = await begin(store)
    assert await store.confirm_registration(a_confirmation(old)) == INVALID
    assert (await claimed(store)).digest == newer.digest


async def test_the_address_of_an_active_partner_is_sent_a_recovery_code_in_the_partners_own_words(store):
    done, _ = await registered(store)
    await begin(store, contact_email="DEV@acme.example", display_name="Mallory", organization_name="Evil")
    (mail,) = [mail for mail in await mails(store) if mail.kind is MailKind.RECOVERY]
    assert (mail.kind, mail.recipient, mail.sealed) == (MailKind.RECOVERY, ADDRESS, b"sealed code")
    assert mail.facts == {"displayName": "Acme Motors", "partnerId": done.partner_id}
    assert (await claimed(store)).partner_id == done.partner_id


async def test_without_recovery_the_address_of_a_partner_gets_neither_mail_nor_code(store):
    done, _ = await registered(store)
    before = await claimed(store)
    await begin(store, recovery="off")
    assert await kinds(store) == {MailKind.VERIFICATION: 1}
    assert (await claimed(store)).digest == before.digest
    await store.set_partner_status(done.partner_id, PartnerStatus.DEACTIVATED, now=START, by="test")
    await begin(store, recovery="off")  # it may register anew
    assert (await kinds(store))[MailKind.VERIFICATION] == 2


async def test_the_address_of_a_suspended_partner_gets_a_mail_but_no_code(store):
    done, _ = await registered(store)
    await store.set_partner_status(done.partner_id, PartnerStatus.SUSPENDED, now=START, by="test")
    before = await claimed(store)
    await begin(store, display_name="Mallory")
    (mail,) = [mail for mail in await mails(store) if mail.kind is MailKind.SUSPENDED]
    assert (mail.kind, mail.recipient, mail.sealed) == (MailKind.SUSPENDED, ADDRESS, None)
    assert mail.facts == {"displayName": "Acme Motors", "partnerId": done.partner_id}
    assert (await claimed(store)).digest == before.digest


async def test_the_address_of_a_deactivated_partner_registers_anew_under_another_id(store):
    first, _ = await registered(store)
    await store.set_partner_status(first.partner_id, PartnerStatus.DEACTIVATED, now=START, by="test")
    second, right = await registered(store, now=START + 1)
    assert (first.partner_id, second.partner_id) == ("acme-motors", "acme-motors-2")
    assert (await store.find_key(right.key.id)).partner_status is PartnerStatus.ACTIVE


async def test_a_managed_partner_with_this_address_is_none_that_has_registered_itself(store, key):
    assert (await store.find_partner("acme-motors")).contact_email == "dev@acme.example"
    await begin(store)
    assert await kinds(store) == {MailKind.VERIFICATION: 1}


@pytest.mark.parametrize("offset", AROUND)
async def test_r63_an_address_has_so_many_mails_an_hour(store, offset):
    spellings = (
        "dev@acme.example",
        "Dev@acme.example",
        "DEV@acme.example",
        "\N{FULLWIDTH LATIN SMALL LETTER D}ev@acme.example",
        "dEv@acme.example",
    )
    for spelling in spellings:
        await begin(store, contact_email=spelling, limits=LIMITS)
    before = await claimed(store)
    await begin(store, now=START + HOUR + offset, limits=LIMITS)
    assert len(await mails(store, now=START + HOUR + offset)) == (5 if offset < 0 else 6)
    await begin(store, "other@acme.example", now=START + HOUR - 1, limits=LIMITS)
    assert "other@acme.example" in {mail.recipient for mail in await mails(store, now=START + 2 * HOUR)}
    if offset < 0:
        assert (await claimed(store)).digest == before.digest  # nothing has changed


@pytest.mark.parametrize("offset", AROUND)
async def test_r63_all_addresses_together_have_so_many_mails_an_hour(store, offset):
    for number in range(3):
        await begin(store, f"dev{number}@acme.example")
    await begin(store, now=START + HOUR + offset, limits=MailLimits(5, 3, per_address_daily=100_000))
    assert len(await mails(store, now=START + HOUR + offset)) == (3 if offset < 0 else 4)


@pytest.mark.parametrize("offset", AROUND)
async def test_r63_an_address_has_so_many_mails_in_a_day(store, offset):
    for number in range(15):
        assert await asked(store, now=START + number * HOUR) == Begun(MailKind.VERIFICATION)
    assert await asked(store, now=START + DAY - HOUR) == Limited("mails_per_address_daily")
    assert await asked(store, "other@acme.example", now=START + DAY - HOUR) == Begun(MailKind.VERIFICATION)
    expected = Limited("mails_per_address_daily") if offset < 0 else Begun(MailKind.VERIFICATION)
    assert await asked(store, now=START + DAY + offset) == expected


async def test_r63_no_flood_of_new_addresses_keeps_a_partner_from_its_recovery_nor_the_other_way_round(store):
    await registered(store)
    limits = LIMITS._replace(overall=2)
    assert await asked(store, "one@acme.example", limits=limits) == Begun(MailKind.VERIFICATION)
    assert await asked(store, "two@acme.example", limits=limits) == Limited("mails_overall")
    assert [await asked(store, limits=limits) for _ in range(3)] == [Begun(MailKind.RECOVERY)] * 2 + [Limited("mails_overall")]


async def test_who_is_sent_nothing_is_told_to_the_log_and_why(store):
    await registered(store)
    assert await asked(store, limits=LIMITS._replace(per_address=1)) == Limited("mails_per_address")
    assert await asked(store, recovery="off") == Limited("recovery")
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    assert await asked(store) == Begun(MailKind.SUSPENDED)


async def test_r63_notices_are_no_mails_of_registration(store, key):
    for _ in range(3):
        newer = a_key()
        await store.roll_key(key.id, newer, ends_at=START, now=START, by="test")
        key = newer
    await begin(store, limits=MailLimits(1, 1, per_address_daily=100_000))
    assert await kinds(store) == {MailKind.KEY_ROTATED: 3, MailKind.VERIFICATION: 1}


async def test_r63_of_registrations_at_once_no_more_than_the_limit_cause_a_mail(store, other_node):
    await asyncio.gather(*(begin(node, limits=LIMITS) for node in (store, other_node) * 20))
    assert len(await mails(store)) == 5


async def test_r62_whatever_is_known_of_an_address_the_transaction_goes_to_the_disk(store, backend):
    """A commit without a write would be over sooner."""

    async def writes(asking):
        before = backend.written()
        await asking
        return backend.written() != before

    done, _ = await registered(store)
    assert await writes(begin(store, recovery="off"))
    assert await writes(begin(store, limits=MailLimits(1, 1000, per_address_daily=100_000)))
    assert await writes(begin(store, "unknown@acme.example", limits=MailLimits(1, 1, per_address_daily=100_000)))
    assert await writes(begin(store, "unknown@acme.example"))
    for address in (ADDRESS, "nobody@acme.example"):
        for now in (START, START + TTL):
            assert await writes(store.claim_attempt(address, now=now))
    await store.set_partner_status(done.partner_id, PartnerStatus.SUSPENDED, now=START, by="test")
    assert await writes(begin(store))
    assert {row.address for row in rows(backend, "verification")} == {ADDRESS, "unknown@acme.example"}


# --- claim_attempt ---


async def test_there_is_nothing_to_judge_for_an_address_without_a_code(store, backend):
    assert await store.claim_attempt(ADDRESS, now=START) is None
    assert backend.count("verification") == 0


@pytest.mark.parametrize("offset", AROUND)
async def test_r57_a_code_is_good_for_ten_minutes(store, offset):
    await begin(store)
    challenge = await store.claim_attempt(ADDRESS, now=START + TTL + offset)
    assert isinstance(challenge, Challenge) if offset < 0 else challenge is None


async def test_r59_a_code_is_judged_five_times(store):
    await begin(store)
    claims = [await store.claim_attempt(ADDRESS, now=START) for _ in range(8)]
    assert [claim is not None for claim in claims] == [True] * 5 + [False] * 3


async def test_r59_of_two_hundred_guesses_at_once_five_are_judged(store, other_node):
    await begin(store)
    claims = await asyncio.gather(*(node.claim_attempt(ADDRESS, now=START) for node in (store, other_node) * 100))
    assert sum(claim is not None for claim in claims) == 5


async def test_r59_a_new_code_brings_new_attempts_but_not_a_new_day(store):
    judged = 0
    for round_ in range(7):
        await begin(store, now=START + round_)
        claims = [await store.claim_attempt(ADDRESS, now=START + round_) for _ in range(6)]
        judged += sum(claim is not None for claim in claims)
    assert judged == 25


@pytest.mark.parametrize("offset", AROUND)
async def test_r59_the_day_begins_at_midnight_by_utc_and_no_clock_that_is_set_back_begins_another(store, offset):
    midnight = START - START % DAY + DAY
    before = midnight - MINUTE
    for _ in range(5):
        await begin(store, now=before)
        for _ in range(5):
            await claimed(store, now=before)
    await begin(store, now=before)
    claim = await store.claim_attempt(ADDRESS, now=midnight + offset)
    assert claim is None if offset < 0 else isinstance(claim, Challenge)
    for _ in range(30):
        await begin(store, now=midnight)
        await store.claim_attempt(ADDRESS, now=midnight)
    assert await store.claim_attempt(ADDRESS, now=midnight) is None
    assert await store.claim_attempt(ADDRESS, now=before) is None


# --- confirm_registration ---


async def test_a_right_code_makes_a_partner_with_all_that_was_said(store, backend, trail):
    done, right = await registered(store)
    assert (done.partner_id, done.tier.name) == ("acme-motors", "starter")
    (row,) = rows(backend, "partner")
    assert (row.id, row.name, row.contact_email, row.tier) == ("acme-motors", "Acme Motors", ADDRESS, "starter")
    assert (row.status, row.origin, row.created_at) == ("active", "self-service", START)
    assert (row.registered_address, row.organization_name, row.agreed_at) == (ADDRESS, None, START)
    assert (row.website_url, row.intended_use) == ("https://acme.example/", "to sell")
    assert (await store.get_key(right.key.id)).partner_id == "acme-motors"
    assert isinstance(await store.open_session(a_login(right.key)), Opened)
    assert await trail("acme-motors") == (["partner"], ["partner.registered"])
    assert done.sequence == (await store.list_changes(after=0, limit=10))[-1].sequence


async def test_r59_a_right_attempt_is_taken_off_the_count(store, backend):
    await begin(store)
    for _ in range(4):
        await claimed(store)
    await store.confirm_registration(a_confirmation(await claimed(store)))
    (row,) = rows(backend, "verification")
    assert (row.attempts, row.day_failures) == (4, 4)
    await claimed(store)  # wrong guesses after it count too
    assert await store.claim_attempt(ADDRESS, now=START) is None


async def test_r58_a_code_has_its_effect_once(store, backend):
    _, right = await registered(store)
    assert await store.confirm_registration(replace(right, key=a_key(""))) == INVALID
    assert (backend.count("partner"), backend.count("credential")) == (1, 1)


async def test_r55_nothing_is_confirmed_for_an_address_without_a_code(store, backend):
    await begin(store)
    challenge = await claimed(store)
    assert await store.confirm_registration(a_confirmation(challenge, "other@acme.example")) == INVALID
    assert backend.count("partner") == 0


async def test_the_first_id_that_nobody_has_or_had_is_taken(store):
    ids = [(await registered(store, f"dev{number}@acme.example"))[0].partner_id for number in range(3)]
    assert ids == ["acme-motors", "acme-motors-2", "acme-motors-3"]
    await begin(store)
    right = a_confirmation(await claimed(store))
    assert await store.confirm_registration(right) == Refused(PartnerIdTaken)


async def test_no_second_partner_is_made_for_an_address_whatever_another_node_has_done_meanwhile(store, backend, key):
    await begin(store)
    right = a_confirmation(await claimed(store))
    rows(backend, "partner", writing={"registered_address": ADDRESS})
    assert await store.confirm_registration(right) == INVALID
    assert (backend.count("partner"), backend.count("credential")) == (1, 1)


async def test_a_tier_that_is_not_there_makes_no_partner(store, backend):
    await begin(store)
    right = a_confirmation(await claimed(store), tier="golden")
    assert await store.confirm_registration(right) == Refused(TierNotFound)
    assert backend.count("partner") == 0


async def test_a_recovery_ends_every_key_of_the_partner_at_once_and_none_of_its_companies(store, trail):
    done, first = await registered(store)
    company = a_company(done.partner_id)
    company_key = a_key(done.partner_id, company.id)
    assert isinstance(await store.create_company(company, company_key, replay=None, by="test"), Created)
    second = a_key(done.partner_id)
    await store.roll_key(first.key.id, second, ends_at=START + DAY, now=START, by="test")  # both are alive
    session = (await store.open_session(a_login(second))).session
    now = START + MINUTE
    recovered, right = await registered(store, now=now, tier="ignored", candidates=())
    assert (recovered.partner_id, recovered.tier.name) == (done.partner_id, "starter")
    for old in (first.key, second):
        standing = await store.find_key(old.id)
        assert (standing.ends_at, standing.end_cause) == (now, EndCause.ROTATED)
        assert judge_standing(standing, now) is CredentialRotated
    assert judge_standing((await store.find_session(session.id)).standing, now) is CredentialRotated
    assert judge_standing(await store.find_key(company_key.id), now) is None
    assert judge_standing(await store.find_key(right.key.id), now) is None
    (notice,) = [mail for mail in await mails(store, now=now) if mail.kind is MailKind.KEY_RECOVERED]
    assert (notice.kind, notice.recipient, notice.sealed) == (MailKind.KEY_RECOVERED, ADDRESS, None)
    assert notice.facts["newKey"] == right.key.masked
    assert await trail(right.key.id) == ([], ["key.recovered"])
    assert await trail(second.id) == (["credential"], ["key.rotated"])


@pytest.mark.parametrize("status", [PartnerStatus.SUSPENDED, PartnerStatus.DEACTIVATED])
async def test_a_code_recovers_nothing_for_a_partner_that_is_not_active_any_more(store, backend, status):
    done, _ = await registered(store)
    await begin(store)
    challenge = await claimed(store)
    await store.set_partner_status(done.partner_id, status, now=START, by="test")
    assert await store.confirm_registration(a_confirmation(challenge)) == INVALID
    assert backend.count("credential") == 1


# --- repeat_confirmation ---


async def test_a_lost_answer_is_given_again_while_the_key_is_unused(store, backend):
    done, right = await registered(store)
    for _ in range(9):  # as often as it takes: it is taken off the count
        again = await claimed(store)
        assert (again.is_confirmed, again.sealed) == (True, right.sealed)
        repeated = await store.repeat_confirmation(ADDRESS, again, now=START)
        assert (repeated.partner_id, repeated.tier) == (done.partner_id, done.tier)
        assert repeated.sequence >= done.sequence
    (row,) = rows(backend, "verification")
    assert (row.attempts, row.day_failures) == (0, 0)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_lost_answer_is_given_again_until_the_code_expires(store, offset):
    await registered(store)
    again = await claimed(store)
    repeated = await store.repeat_confirmation(ADDRESS, again, now=START + TTL + offset)
    assert isinstance(repeated, Confirmed) if offset < 0 else repeated == INVALID


async def _use(store, key):
    assert isinstance(await store.open_session(a_login(key)), Opened)


async def _rotate(store, key):
    await store.roll_key(key.id, a_key(key.partner_id), ends_at=START, now=START, by="test")


async def _rotate_oneself(store, key):
    await store.roll_own_key(key.id, key.digest, a_key(""), ends_at=START + DAY, replay=None, now=START)


async def _revoke(store, key):
    await store.revoke_key(key.id, now=START, by="test")


async def _suspend(store, key):
    await store.set_partner_status(key.partner_id, PartnerStatus.SUSPENDED, now=START, by="test")


async def _register_again(store, _key):
    await begin(store)


@pytest.mark.parametrize("event", [_use, _rotate, _rotate_oneself, _revoke, _suspend, _register_again])
async def test_a_lost_answer_is_not_given_again_after_this(store, event):
    done, right = await registered(store)
    again = await claimed(store)
    await event(store, replace(right.key, partner_id=done.partner_id))
    assert await store.repeat_confirmation(ADDRESS, again, now=START) == INVALID


async def test_the_sealed_key_is_gone_once_it_is_used_and_once_the_code_is_over(store, backend):
    _, right = await registered(store)
    _, unused = await registered(store, "other@acme.example")
    await _use(store, right.key)
    assert {row.address: row.sealed for row in rows(backend, "verification")} == {
        ADDRESS: None,
        "other@acme.example": unused.sealed,
    }
    for offset in AROUND:
        await store.forget_replays(now=START + TTL + offset)
        sealed = next(row.sealed for row in rows(backend, "verification") if row.address == "other@acme.example")
        assert sealed == (unused.sealed if offset < 0 else None)


async def test_nothing_is_repeated_that_was_never_confirmed(store):
    await begin(store)
    assert await store.repeat_confirmation(ADDRESS, await claimed(store), now=START) == INVALID


# --- find_registrant, purge_mails ---


async def test_a_registrant_is_a_partner_with_what_its_tier_allows(store, key):
    assert await store.find_registrant("nobody") is None
    found = await store.find_registrant("acme-motors")
    assert found.partner == a_partner()
    assert (found.tier.name, found.tier.requests_per_hour, found.tier.requests_per_day) == ("starter", 100, 1000)
    done, _ = await registered(store, "other@acme.example")
    assert (await store.find_registrant(done.partner_id)).partner.origin is Origin.SELF_SERVICE


@pytest.mark.parametrize("offset", AROUND)
async def test_r65_a_code_without_effect_is_forgotten_once_its_day_is_over_too(store, backend, offset):
    await begin(store)
    await store.purge_mails(ended_before=START, now=START + TTL)
    assert backend.count("verification") == 1  # what is counted against the address today is still needed
    await store.purge_mails(ended_before=START, now=START - START % DAY + DAY + offset)
    assert backend.count("verification") == (1 if offset < 0 else 0)


# --- At once ---


async def test_of_two_confirmations_at_once_one_makes_the_partner(store, other_node, backend):
    for round_ in range(10):
        address = f"dev{round_}@acme.example"
        await begin(store, address)
        challenges = [await claimed(store, address) for _ in range(4)]
        rights = [a_confirmation(challenge, address, candidates=(f"p{round_}", f"p{round_}-2")) for challenge in challenges]
        nodes = (store, other_node) * 2
        outcomes = await asyncio.gather(*(n.confirm_registration(r) for n, r in zip(nodes, rights, strict=True)))
        assert sorted(map(type, outcomes), key=lambda kind: kind.__name__) == [Confirmed, *[Refused] * 3]
    assert (backend.count("partner"), backend.count("credential")) == (10, 10)


async def test_two_addresses_of_one_organisation_at_once_get_two_ids(store, other_node):
    rights = []
    for number in range(2):
        address = f"dev{number}@acme.example"
        await begin(store, address)
        rights.append(a_confirmation(await claimed(store, address), address))
    outcomes = await asyncio.gather(*(n.confirm_registration(r) for n, r in zip((store, other_node), rights, strict=True)))
    assert {outcome.partner_id for outcome in outcomes} == {"acme-motors", "acme-motors-2"}


async def test_a_registration_beside_a_confirmation_leaves_either_the_partner_or_a_new_code(store, other_node, backend):
    for round_ in range(20):
        address = f"dev{round_}@acme.example"
        await begin(store, address)
        right = a_confirmation(await claimed(store, address), address, candidates=(f"p{round_}",))
        outcome, _ = await asyncio.gather(store.confirm_registration(right), begin(other_node, address, now=START + 1))
        (row,) = [row for row in rows(backend, "verification") if row.address == address]
        made = await store.find_partner(f"p{round_}") is not None
        assert made is isinstance(outcome, Confirmed)
        assert row.created_at == START + 1  # the newer code is the one that counts, as a recovery if there is a partner
        assert (row.credential_id, row.sealed, row.partner_id) == (None, None, f"p{round_}" if made else None)


@pytest.mark.parametrize("status", [PartnerStatus.SUSPENDED, PartnerStatus.DEACTIVATED])
async def test_a_recovery_beside_the_end_of_the_partner_lets_nobody_in(store, other_node, status):
    for round_ in range(10):
        address = f"dev{round_}@acme.example"
        done, first = await registered(store, address, candidates=(f"p{round_}",))
        await begin(store, address)
        right = a_confirmation(await claimed(store, address), address)
        outcome, _ = await asyncio.gather(
            store.confirm_registration(right),
            other_node.set_partner_status(done.partner_id, status, now=START, by="test"),
        )
        ended = PartnerSuspended if status is PartnerStatus.SUSPENDED else CredentialRevoked
        if isinstance(outcome, Confirmed):
            assert await store.open_session(a_login(first.key)) == Refused(CredentialRotated)
            assert await store.open_session(a_login(right.key)) == Refused(ended)
        else:
            assert outcome == INVALID
            assert await store.get_key(right.key.id) is None


# --- roll_own_key ---


async def roll(store, key, *, digest=None, ends_at=START, replay=None, now=START):
    newer = a_key("", created_at=now)
    outcome = await store.roll_own_key(
        key.id, key.digest if digest is None else digest, newer, ends_at=ends_at, replay=replay, now=now
    )
    return outcome, newer


async def test_a_key_replaces_itself_and_its_owner_is_told(store, key, trail):
    outcome, newer = await roll(store, key)
    assert (outcome.partner_id, (await store.get_key(newer.id)).partner_id) == ("acme-motors", "acme-motors")
    assert outcome.tier == STARTER
    assert await store.open_session(a_login(key)) == Refused(CredentialRotated)
    assert isinstance(await store.open_session(a_login(newer)), Opened)
    assert await trail(key.id) == (["credential"], ["key.rotated"])
    (mail,) = await mails(store)
    assert (mail.kind, mail.recipient) == (MailKind.KEY_ROTATED, "dev@acme.example")
    assert (mail.facts["oldKey"], mail.facts["newKey"]) == (key.masked, newer.masked)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_key_that_replaced_itself_works_on_for_its_overlap(store, key, offset):
    await roll(store, key, ends_at=START + HOUR)
    outcome = await store.open_session(a_login(key, now=START + HOUR + offset))
    assert isinstance(outcome, Opened) if offset < 0 else outcome == Refused(CredentialRotated)
    again, _ = await roll(store, key, now=START + HOUR + offset)
    assert again == Refused(KeyEnded if offset < 0 else CredentialRotated)


async def test_a_key_that_nobody_has_replaces_nothing(store, key, backend):
    assert (await roll(store, a_key()))[0] == Refused(InvalidCredential)
    assert (await roll(store, key, digest=os.urandom(32)))[0] == Refused(InvalidCredential)
    assert backend.count("credential") == 1


async def test_the_key_of_a_company_does_not_replace_itself(store, company_key):
    assert (await roll(store, company_key))[0] == Refused(NotAllowed)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_partner_gets_thirty_keys_an_hour_and_what_is_past_that_changes_nothing(
    store, key, company_key, backend, offset
):
    for at in range(1, 30):  # its first one counts too
        outcome, newer = await roll(store, key, now=START + at)
        assert isinstance(outcome, Rolled)
        key = replace(newer, partner_id="acme-motors")
    keys, told = backend.count("credential"), backend.count("outbox")
    now = START + HOUR + offset
    outcome, newer = await roll(store, key, now=now)
    if offset < 0:
        assert outcome == RolledTooOften(START + HOUR)
        assert (backend.count("credential"), backend.count("outbox")) == (keys, told)
        assert isinstance(await store.open_session(a_login(key, now=now)), Opened)
        assert await store.get_key(newer.id) is None
    else:
        assert isinstance(outcome, Rolled)


async def test_the_answer_to_the_last_rotation_of_an_hour_is_repeated(store, key):
    replay = a_replay()
    for at in range(1, 30):
        old, (outcome, newer) = key, await roll(store, key, replay=replay if at == 29 else None)
        assert isinstance(outcome, Rolled)
        key = replace(newer, partner_id="acme-motors", created_at=START)
    assert (await roll(store, old, replay=replay))[0] == RolledBefore("acme-motors", STARTER, replay.sealed)


@pytest.mark.parametrize(
    ("status", "reason"), [(PartnerStatus.SUSPENDED, PartnerSuspended), (PartnerStatus.DEACTIVATED, CredentialRevoked)]
)
async def test_the_key_of_a_partner_that_is_not_active_does_not_replace_itself(store, key, status, reason):
    await store.set_partner_status("acme-motors", status, now=START, by="test")
    assert (await roll(store, key))[0] == Refused(reason)


async def test_p11_a_lost_answer_to_a_rotation_is_given_again_although_the_old_key_has_ended(store, key, backend):
    replay = a_replay()
    first, newer = await roll(store, key, replay=replay)
    assert isinstance(first, Rolled)
    for _ in range(3):
        same = a_replay(id=replay.id, fingerprint=replay.fingerprint)
        assert (await roll(store, key, replay=same))[0] == RolledBefore("acme-motors", STARTER, replay.sealed)
    assert (await roll(store, key, replay=replay, digest=os.urandom(32)))[0] == Refused(InvalidCredential)
    assert (await roll(store, key, replay=a_replay(id=replay.id)))[0] == Refused(IdempotencyKeyReused)
    assert (await roll(store, key, replay=a_replay()))[0] == Refused(CredentialRotated)
    assert (backend.count("credential"), len(await mails(store))) == (2, 1)
    await _use(store, newer)
    assert (await roll(store, key, replay=replay))[0] == Refused(IdempotencyKeySpent)


@pytest.mark.parametrize("event", [_rotate, _revoke, _suspend])
async def test_p11_a_new_key_that_lets_nobody_in_is_not_told_again(store, key, event):
    replay = a_replay()
    _, newer = await roll(store, key, replay=replay, ends_at=START + DAY)
    await event(store, replace(newer, partner_id="acme-motors"))
    assert (await roll(store, key, replay=replay))[0] == Refused(IdempotencyKeySpent)


async def test_p11_of_rotations_at_once_one_wins_and_those_with_its_idempotency_key_hear_of_it(store, other_node, key, backend):
    replay = a_replay()
    nodes = (store, other_node) * 10
    outcomes = await asyncio.gather(*(roll(node, key, replay=replay if at % 4 < 2 else None) for at, node in enumerate(nodes)))
    counted = Counter(type(outcome) for outcome, _ in outcomes)
    assert counted[Rolled] == 1
    assert counted[Refused] + counted[RolledBefore] == 19
    assert all(outcome == Refused(CredentialRotated) for outcome, _ in outcomes if isinstance(outcome, Refused))
    assert backend.count("credential") == 2


# --- deactivate_own ---


async def own(store):
    """The key of a partner that has registered itself."""
    done, right = await registered(store)
    return replace(right.key, partner_id=done.partner_id)


async def test_a_partner_that_has_registered_itself_ends_itself_and_is_told(store, trail):
    key = await own(store)
    outcome = await store.deactivate_own(key.id, key.digest, now=START)
    assert isinstance(outcome, Deactivated)
    assert outcome.partner_id == key.partner_id
    assert (await store.find_partner(key.partner_id)).status is PartnerStatus.DEACTIVATED
    changes, events = await trail(key.partner_id)
    assert (changes[-1], events[-1]) == ("partner", "partner.deactivated")
    assert (await kinds(store))[MailKind.DEACTIVATED] == 1
    assert await store.deactivate_own(key.id, key.digest, now=START) == Refused(CredentialRevoked)
    assert (await kinds(store))[MailKind.DEACTIVATED] == 1


@pytest.mark.parametrize(
    ("event", "reason"), [(_rotate, CredentialRotated), (_revoke, CredentialRevoked), (_suspend, PartnerSuspended)]
)
async def test_r38_a_key_that_lets_nobody_in_ends_no_partner_and_no_suspension(store, event, reason):
    key = await own(store)
    await event(store, key)
    status = (await store.find_partner(key.partner_id)).status
    assert await store.deactivate_own(key.id, key.digest, now=START) == Refused(reason)
    assert (await store.find_partner(key.partner_id)).status is status is not PartnerStatus.DEACTIVATED


async def test_who_does_not_hold_a_partners_own_key_does_not_end_it(store):
    key = await own(store)
    company = a_company(partner_id=key.partner_id)
    company_key = a_key(key.partner_id, company_id=company.id)
    await store.create_company(company, company_key, replay=None, by="test")
    for presented, digest, reason in (
        (key, os.urandom(32), InvalidCredential),
        (a_key(), key.digest, InvalidCredential),
        (company_key, company_key.digest, NotAllowed),
    ):
        assert await store.deactivate_own(presented.id, digest, now=START) == Refused(reason)
    assert (await store.find_partner(key.partner_id)).status is PartnerStatus.ACTIVE


async def test_a_partner_that_a_manager_has_made_does_not_end_itself(store, key):
    assert await store.deactivate_own(key.id, key.digest, now=START) == Refused(NotAllowed)
    assert (await store.find_partner("acme-motors")).status is PartnerStatus.ACTIVE


async def test_r38_of_a_suspension_and_a_partners_own_end_at_once_the_first_one_stands(store, other_node):
    for round_ in range(10):
        done, right = await registered(store, f"dev{round_}@acme.example", candidates=(f"p{round_}",))
        nodes = (store, other_node) if round_ % 2 else (other_node, store)
        suspended, ended = await asyncio.gather(
            nodes[0].set_partner_status(done.partner_id, PartnerStatus.SUSPENDED, now=START, by="test"),
            nodes[1].deactivate_own(right.key.id, right.key.digest, now=START),
        )
        status = (await store.find_partner(done.partner_id)).status
        if isinstance(ended, Deactivated):
            assert (suspended, status) == (Refused(PartnerDeactivated), PartnerStatus.DEACTIVATED)
        else:
            assert (ended, status) == (Refused(PartnerSuspended), PartnerStatus.SUSPENDED)
