"""The outbox: what is queued with which change, who gets a mail to send, and what becomes of it."""

import asyncio
import itertools
import os
from collections import Counter

import pytest
from given import (
    AROUND,
    START,
    WEEK,
    a_company,
    a_key,
    a_login,
    a_mail,
    a_partner,
    a_refresh,
    a_signing_key,
    a_token,
    next_version,
)

from gatelodge_server.core.ids import uuid7
from gatelodge_server.core.model import DAY, HOUR, MINUTE, SECOND, KeyPurpose, MailKind, PartnerStatus
from gatelodge_server.core.ports import Condemned, Deferred, Done, GivenUp, Sent
from gatelodge_server.store.outbox import queue_mail

LAPSE = 90 * SECOND


@pytest.fixture
def queue(backend):
    """Queue mails as a verb does, each in a transaction."""

    async def queue(*mails):
        driver = backend.driver()
        for mail in mails:
            await driver.write(queue_mail, mail)
        await driver.close()
        return list(mails)

    return queue


@pytest.fixture
def claim(store):
    async def claim(*, now=START, limit=100, node=None, until=None):
        return list(await (node or store).claim_mails(limit=limit, now=now, until=until or now + LAPSE))

    return claim


def ids(mails):
    return [mail.id for mail in mails]


# --- Claims ---


async def test_a_mail_is_due_at_once_and_comes_as_it_was_queued(queue, claim):
    (mail,) = await queue(a_mail(facts={"displayName": "Müller\u2028 & Co", "organizationName": ""}))
    assert await claim(now=START - 1) == []
    assert await claim() == [mail._replace(attempts=1)]


async def test_the_oldest_are_claimed_first_and_no_more_than_asked_for(queue, claim):
    mails = await queue(*(a_mail(created_at=START + at) for at in (2, 0, 3, 1)))
    oldest = sorted(mails, key=lambda mail: mail.created_at)
    assert ids(await claim(now=START + 9, limit=3)) == ids(oldest[:3])
    assert ids(await claim(now=START + 9, limit=3)) == ids(oldest[3:])
    assert await claim(now=START + 9, limit=3) == []


async def test_r64_codes_are_claimed_before_whatever_else_waits_however_long(queue, claim):
    codes = (MailKind.VERIFICATION, MailKind.RECOVERY)
    notices = await queue(*(a_mail(kind, expires_at=START + WEEK) for kind in MailKind if kind not in codes))
    newer = await queue(*(a_mail(kind, created_at=START + SECOND) for kind in codes))
    assert set(ids(await claim(now=START + SECOND, limit=2))) == set(ids(newer))
    assert set(ids(await claim(now=START + SECOND))) == set(ids(notices))


@pytest.mark.parametrize("offset", AROUND)
async def test_a_claim_that_lapses_comes_again_and_was_an_attempt(queue, claim, offset):
    await queue(a_mail())
    (first,) = await claim()
    again = await claim(now=START + LAPSE + offset)
    assert [mail.attempts for mail in (first, *again)] == ([1, 2] if offset >= 0 else [1])


@pytest.mark.parametrize("offset", AROUND)
async def test_a_mail_that_is_deferred_is_due_when_it_was_said(store, queue, claim, offset):
    (mail,) = await queue(a_mail(sealed=b"sealed"))
    await claim()
    await store.settle_mail(mail.id, Deferred(START + MINUTE, "450 to RCPT: come again " + "x" * 300), now=START)
    again = await claim(now=START + MINUTE + offset)
    assert [(mail.attempts, mail.sealed) for mail in again] == ([(2, b"sealed")] if offset >= 0 else [])


@pytest.mark.parametrize("outcome", [Sent(), GivenUp("550 to RCPT: nobody of this name")], ids=["sent", "given up"])
async def test_a_mail_that_has_ended_stays_so_and_its_secret_is_gone(store, queue, claim, rows, outcome):
    (mail,) = await queue(a_mail(sealed=b"sealed", expires_at=START + WEEK))
    await claim()
    await store.settle_mail(mail.id, outcome, now=START + 1)
    ((sealed, ended_at),) = await rows("sealed", "ended_at")
    assert (sealed, ended_at) == (None, START + 1)
    await store.settle_mail(mail.id, Deferred(START, "too late"), now=START + 2)
    assert await claim(now=START + DAY) == []
    await store.settle_mail(mail.id, GivenUp("too late"), now=START + 3)
    await store.settle_mail(mail.id, Sent(), now=START + 4)
    word = "sent" if isinstance(outcome, Sent) else "given_up"
    assert [row[:2] for row in await rows("ended_at", "outcome", "fault")] == [(START + 1, word)]
    assert (await rows("fault"))[0][0] == (None if isinstance(outcome, Sent) else outcome.fault)


# --- Races ---


async def test_two_nodes_that_claim_at_once_never_get_the_same_mail(store, other_node, queue, claim):
    mails = await queue(*(a_mail() for _ in range(30)))
    nodes = itertools.cycle([store, other_node])
    claims = await asyncio.gather(*(claim(limit=4, node=next(nodes)) for _ in range(20)))
    claimed = [id_ for claimed in claims for id_ in ids(claimed)]
    assert len(claimed) == 30
    assert set(claimed) == set(ids(mails))


async def test_of_claims_that_lapsed_each_comes_again_to_one_node_only(store, other_node, queue, claim):
    await queue(*(a_mail() for _ in range(10)))
    await claim()
    nodes = itertools.cycle([store, other_node])
    claims = await asyncio.gather(*(claim(now=START + LAPSE, limit=2, node=next(nodes)) for _ in range(20)))
    assert sorted(mail.attempts for claimed in claims for mail in claimed) == [2] * 10


# --- Purging ---


@pytest.fixture
def rows(backend):
    """Columns of the outbox, seen from outside."""

    async def rows(*columns):
        return backend.rows("outbox", *columns)

    return rows


@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize("outcome", [Sent(), GivenUp("no")], ids=["sent", "given up"])
async def test_a_mail_that_ended_longer_ago_than_asked_is_deleted(store, queue, claim, backend, outcome, offset):
    (mail,) = await queue(a_mail(expires_at=START + WEEK))
    await claim()
    await store.settle_mail(mail.id, outcome, now=START)
    await store.purge_mails(ended_before=START + offset, now=START + DAY)
    assert backend.count("outbox") == (0 if offset >= 0 else 1)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_mail_that_nobody_has_sent_is_deleted_as_long_after_its_time(store, queue, backend, offset):
    await queue(a_mail(expires_at=START + HOUR), a_mail(expires_at=START + WEEK))
    await store.purge_mails(ended_before=START + HOUR + offset, now=START + HOUR + DAY)
    assert backend.count("outbox") == (1 if offset >= 0 else 2)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_secret_that_nobody_needs_any_more_is_blanked(store, queue, rows, offset):
    await queue(a_mail(sealed=b"sealed", expires_at=START + HOUR))
    await store.purge_mails(ended_before=START, now=START + HOUR + offset)
    assert await rows("sealed") == [(None if offset >= 0 else b"sealed",)]


# --- Notices ---


def facts_of(mail, key):
    return {name: fact for name, fact in mail.facts.items() if name not in {"partnerId", "displayName"}}


async def test_r66_the_owner_is_told_once_that_a_key_was_rotated(store, key, claim):
    replacement = a_key()
    assert isinstance(await store.roll_key(key.id, replacement, ends_at=START + HOUR, now=START, by="test"), Done)
    (notice,) = await claim()
    assert (notice.kind, notice.recipient, notice.expires_at) == (MailKind.KEY_ROTATED, "dev@acme.example", START + 3 * DAY)
    assert notice.facts == {
        "partnerId": "acme-motors",
        "displayName": "Acme Motors",
        "oldKey": key.masked,
        "newKey": replacement.masked,
        "endsAt": str(START + HOUR),
    }
    assert notice.sealed is None


@pytest.fixture
def roll(store):
    """Rotate a key so many times, and say which key it is then."""

    async def roll(key, times, *, now=START):
        for _ in range(times):
            newer = a_key(key.partner_id)
            assert isinstance(await store.roll_key(key.id, newer, ends_at=now, now=now, by="test"), Done)
            key = newer
        return key

    return roll


@pytest.mark.parametrize("offset", AROUND)
async def test_an_owner_is_told_five_times_an_hour_and_the_fifth_says_that_it_is_the_last(key, claim, roll, offset):
    last = await roll(key, 7)
    told = await claim()
    assert [mail.facts.get("isLast") for mail in told].count("yes") == 1
    assert (len(told), len([mail for mail in told if "isLast" in mail.facts])) == (5, 1)
    await roll(last, 1, now=START + HOUR + offset)
    again = [mail for mail in await claim(now=START + HOUR + offset) if mail.created_at > START]
    assert len(again) == (0 if offset < 0 else 1)


async def test_what_is_told_of_one_thing_or_one_partner_is_no_part_of_what_is_told_of_another(store, key, claim, roll):
    other = a_key("other")
    await store.add_partner(a_partner("other"), other, by="test")  # its address is the same
    await roll(key, 7)
    await roll(other, 7)
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    told = Counter((mail.facts["partnerId"], mail.kind) for mail in await claim())
    rotated, deactivated = MailKind.KEY_ROTATED, MailKind.DEACTIVATED
    assert told == {("acme-motors", rotated): 5, ("other", rotated): 5, ("acme-motors", deactivated): 1}


async def test_of_reused_refresh_tokens_an_owner_is_told_five_times_an_hour(store, key, claim):
    for _ in range(7):
        session = (await store.open_session(a_login(key))).session
        await store.advance_session(a_refresh(session, now=START + 1))
        assert isinstance(await store.advance_session(a_refresh(session, now=START + 2)), Condemned)
    assert [mail.kind for mail in await claim(now=START + 2)] == [MailKind.SESSION_REUSED] * 5


async def test_r66_a_rotation_that_is_refused_tells_nobody(store, key, claim):
    await store.roll_key(key.id, a_key(), ends_at=START, now=START, by="test")
    assert len(await claim()) == 1
    await store.roll_key(key.id, a_key(), ends_at=START, now=START, by="test")
    await store.roll_key("unknown", a_key(), ends_at=START, now=START, by="test")
    assert await claim() == []


async def test_the_rotation_of_a_companys_key_tells_nobody(store, company_key, claim):
    replacement = a_key(company_id=company_key.company_id)
    assert isinstance(await store.roll_key(company_key.id, replacement, ends_at=START, now=START, by="test"), Done)
    assert await claim() == []


async def test_r66_the_owner_is_told_once_that_an_access_token_was_rotated(store, key, claim):
    ring = [a_signing_key("1", signs_from=START, purpose=KeyPurpose.ACCESS), a_signing_key("2", purpose=KeyPurpose.ACCESS)]
    await store.establish_signing_keys(ring, now=START)
    token = a_token("1")
    await store.issue_token(token, by="test")
    replacement = next_version(token)
    for _ in range(2):
        await store.roll_token(token.id, replacement, ends_at=START, now=START, by="test")
    (notice,) = await claim()
    assert (notice.kind, notice.recipient) == (MailKind.TOKEN_ROTATED, "dev@acme.example")
    told = {"label": token.label, "oldToken": token.id, "newToken": replacement.id, "endsAt": str(START)}
    assert notice.facts.items() >= told.items()


@pytest.mark.parametrize("before", list(PartnerStatus))
async def test_r66_the_owner_is_told_of_deactivation_once_and_of_nothing_less(store, key, claim, before):
    await store.set_partner_status("acme-motors", before, now=START, by="test")
    assert len(await claim()) == (1 if before is PartnerStatus.DEACTIVATED else 0)
    for now in (START + 1, START + 2):
        await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=now, by="test")
    notices = await claim(now=START + 3)
    assert [notice.kind for notice in notices] == ([] if before is PartnerStatus.DEACTIVATED else [MailKind.DEACTIVATED])


async def test_r66_deactivations_at_once_at_two_nodes_tell_the_owner_once(store, other_node, key, claim):
    nodes = itertools.cycle([store, other_node])
    await asyncio.gather(
        *(
            next(nodes).set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START + at, by="test")
            for at in range(10)
        )
    )
    assert len(await claim(now=START + DAY)) == 1


@pytest.mark.parametrize("of", ["partner", "company"])
async def test_r66_the_owner_is_told_once_that_a_refresh_token_came_twice(store, key, claim, of):
    company = a_company()
    company_key = a_key(company_id=company.id)
    await store.create_company(company, company_key, replay=None, by="test")
    used = key if of == "partner" else company_key
    session = (await store.open_session(a_login(used))).session
    outcomes = [await store.advance_session(a_refresh(session, now=START + at)) for at in (1, 2, 3)]
    assert isinstance(outcomes[1], Condemned)
    (notice,) = await claim(now=START + 9)
    assert (notice.kind, notice.recipient, notice.created_at) == (MailKind.SESSION_REUSED, "dev@acme.example", START + 2)
    assert (notice.facts["key"], notice.facts["startedAt"]) == (used.masked, str(START))


async def test_r66_of_fifty_refreshes_at_once_one_notice_is_made(store, other_node, key, claim):
    nodes = itertools.cycle([store, other_node])
    session = (await store.open_session(a_login(key))).session
    await asyncio.gather(*(next(nodes).advance_session(a_refresh(session)) for _ in range(50)))
    assert len(await claim()) == 1


async def test_a_token_from_after_a_restored_backup_is_no_reuse_and_tells_nobody(store, key, claim):
    session = (await store.open_session(a_login(key))).session
    assert isinstance(await store.advance_session(a_refresh(session, generation=7)), Condemned)
    assert await claim() == []


async def test_notices_of_one_moment_are_different_mails_and_those_of_one_step_the_same_on_every_node(store, key, claim):
    second = a_key()
    await store.roll_key(key.id, second, ends_at=START, now=START, by="test")
    await store.roll_key(second.id, a_key(), ends_at=START, now=START, by="test")
    await store.add_partner(a_partner("other"), a_key("other"), by="test")
    await store.set_partner_status("other", PartnerStatus.DEACTIVATED, now=START, by="test")
    notices = await claim()
    assert len({notice.id for notice in notices}) == len(notices) == 3
    assert {len(notice.id) for notice in notices} == {16}


async def test_every_mail_id_is_that_of_one_mail(queue, claim):
    mails = await queue(*(a_mail(id=uuid7(START, os.urandom)) for _ in range(3)))
    assert set(ids(await claim())) == set(ids(mails))
