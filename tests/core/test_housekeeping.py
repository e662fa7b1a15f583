"""Housekeeping deletes what is over, and only that."""

import asyncio

import pytest
from given import AROUND, START

from gatelodge.errors import Unavailable
from gatelodge_server.core.housekeeping import ENDED_MAILS_KEPT, ENDED_SESSIONS_KEPT, USAGE_KEPT, Housekeeping
from gatelodge_server.core.mails import NOTICE_TTL
from gatelodge_server.core.model import DAY, HOUR, CompanyDetails
from gatelodge_server.core.ports import UsageMark

DETAILS = CompanyDetails(company_name="Müller GmbH", country="DE", tax_number="12/345/67890")


class Purged:
    """Hears how many sessions each round has deleted."""

    def __init__(self):
        self.counts = []
        self.heard = asyncio.Event()

    def __call__(self, count):
        self.counts.append(count)
        self.heard.set()


@pytest.fixture
async def purged():
    return Purged()


@pytest.fixture
async def housekeeping(lodge, purged):
    return Housekeeping(store=lodge.store, clock=lodge.clock, on_purged=purged, on_mistake=purged)


async def test_ended_sessions_go_a_day_after_their_end_and_living_ones_stay(lodge, housekeeping):
    _, key = await lodge.new_partner()
    sessions = [await lodge.sessions.log_in(key) for _ in range(4)]
    for tokens in sessions[:2]:
        await lodge.sessions.log_out(tokens.refresh_token)
    for offset, deleted in ((-1, 0), (0, 2), (1, 0)):
        lodge.clock.now = START + ENDED_SESSIONS_KEPT + offset
        assert await housekeeping.go_round() == deleted
    for tokens in sessions[2:]:
        await lodge.sessions.refresh(tokens.refresh_token, idempotency_key=None)
    assert lodge.backend.count("session") == 2


async def test_sessions_that_nobody_came_back_to_go_a_day_after_they_expired(lodge, housekeeping):
    _, key = await lodge.new_partner()
    tokens = await lodge.sessions.log_in(key)
    lodge.clock.now = tokens.refresh_expires_at + DAY - 1
    assert await housekeeping.go_round() == 0
    lodge.clock.forward(1)
    assert await housekeeping.go_round() == 1


async def test_a_round_sees_every_session_however_many_there_are(lodge, housekeeping):
    _, key = await lodge.new_partner()
    sessions = await asyncio.gather(*(lodge.sessions.log_in(key) for _ in range(1_100)))
    for tokens in sessions[::100]:
        await lodge.sessions.log_out(tokens.refresh_token)
    lodge.clock.forward(DAY)
    assert await housekeeping.go_round() == 11
    assert lodge.backend.count("session") == 1_089


async def test_answers_that_may_no_longer_be_repeated_are_forgotten(lodge, housekeeping):
    await lodge.new_partner()
    await lodge.companies.create("acme-motors", DETAILS, idempotency_key="once")
    lodge.clock.forward(DAY)
    await housekeeping.go_round()
    assert lodge.backend.count("replay") == 1
    lodge.clock.forward(DAY)
    await housekeeping.go_round()
    assert lodge.backend.count("replay") == 0


async def test_usage_is_kept_for_400_days_and_looked_at_once_an_hour(lodge, housekeeping):
    partner_id, _ = await lodge.new_partner()
    first = START - START % HOUR
    await lodge.store.note_usage([UsageMark(partner_id, first + hour * HOUR, 1, 0) for hour in range(3)], [])
    for offset, kept in ((-1, 3), (0, 3), (1, 3), (HOUR - 2, 3), (HOUR - 1, 2), (HOUR, 2), (2 * HOUR, 1)):
        lodge.clock.now = first + USAGE_KEPT + offset
        await housekeeping.go_round()
        assert len(await lodge.store.list_usage(partner_id, since=0)) == kept, offset


async def test_it_goes_round_at_once_and_tells_what_it_did(lodge, housekeeping, purged):
    _, key = await lodge.new_partner()
    await lodge.sessions.log_out((await lodge.sessions.log_in(key)).refresh_token)
    lodge.clock.forward(DAY)
    task = asyncio.create_task(housekeeping.run())
    await purged.heard.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert purged.counts == [1]


async def test_r72_it_outlives_a_store_that_is_down(lodge, housekeeping, purged):
    lodge.store.cut_by = Unavailable()
    task = asyncio.create_task(housekeeping.run())
    while "forget_replays" not in lodge.store.asked:
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    assert purged.counts == []
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("offset", AROUND)
async def test_mails_that_were_not_sent_go_a_week_after_their_time(lodge, housekeeping, offset):
    partner_id, _ = await lodge.new_partner()
    await lodge.partners.deactivate(partner_id, by="test")
    assert lodge.backend.count("outbox") == 1
    lodge.clock.now = START + NOTICE_TTL + ENDED_MAILS_KEPT + offset
    await housekeeping.go_round()
    assert lodge.backend.count("outbox") == (0 if offset >= 0 else 1)


async def test_letters_in_files_go_a_week_after_they_were_made_and_are_looked_for_once_an_hour(lodge, purged):
    asked = []
    housekeeping = Housekeeping(
        store=lodge.store, clock=lodge.clock, on_purged=purged, on_mistake=purged, delete_letters=asked.append
    )
    for offset in (0, HOUR - 1, HOUR):
        lodge.clock.now = START + offset
        await housekeeping.go_round()
    assert asked == [START - ENDED_MAILS_KEPT, START + HOUR - ENDED_MAILS_KEPT]
