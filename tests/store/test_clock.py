"""The store's clock: the database's own, where it has one that its nodes share."""

import asyncio
import time

import pytest
from backends import PostgresBackend, SqliteBackend
from given import (
    START,
    WEEK,
    a_company,
    a_confirmation,
    a_key,
    a_login,
    a_partner,
    a_refresh,
    a_registration,
    a_replay,
    changed,
)
from sqlalchemy import update

from gatelodge.errors import CredentialExpired
from gatelodge_server.core.housekeeping import Housekeeping
from gatelodge_server.core.model import DAY, HOUR, MINUTE
from gatelodge_server.core.ports import (
    Advanced,
    Begun,
    Condemned,
    Confirmed,
    Done,
    Limited,
    MailLimits,
    QuotaAsk,
    Refused,
    Repeated,
    Replayed,
    UsageMark,
)
from gatelodge_server.core.refusals import IdempotencyKeySpent
from gatelodge_server.core.timekeeping import NodeClock
from gatelodge_server.deployment import system_clock
from gatelodge_server.store.clock import store_now
from gatelodge_server.store.tables import metadata

DIGEST = bytes(range(32))

WRONG = (START, system_clock() + 30_000, system_clock() - 30_000, START + 400 * DAY)
"""What the clocks of four nodes say."""


@pytest.fixture
def postgresql(tmp_path):
    return PostgresBackend.create(tmp_path)


@pytest.fixture
def sqlite(tmp_path):
    return SqliteBackend.create(tmp_path)


async def leases(backend):
    """What four nodes get at once, each by its own clock."""
    nodes = [backend.open() for _ in WRONG]
    await nodes[0].add_partner(a_partner(), a_key(), by="test")
    got = await asyncio.gather(
        *(node.lease_quota(QuotaAsk("acme-motors", 5, now)) for node, now in zip(nodes, WRONG, strict=True))
    )
    for node in nodes:
        await node.close()
    return got


async def test_p5_nodes_whose_clocks_are_wrong_are_counted_by_the_clock_of_the_database(postgresql):
    before = system_clock()
    got = await leases(postgresql)
    after = system_clock()
    for lease in got:
        assert before <= lease.now <= after
        assert (lease.hour_starts_at, lease.day_starts_at) == (lease.now - lease.now % HOUR, lease.now - lease.now % DAY)
    if before // HOUR == after // HOUR:
        assert sorted(lease.hour_taken for lease in got) == [5, 10, 15, 20]


async def test_processes_on_one_machine_have_one_clock_and_are_counted_by_it(sqlite):
    assert [lease.now for lease in await leases(sqlite)] == list(WRONG)


def test_the_time_goes_on_within_a_transaction(postgresql):
    def read(connection):
        first = now = store_now(connection)
        while now == first:
            now = store_now(connection)
        return first, now

    before = system_clock()
    first, later = postgresql.database.read(read)
    assert before <= first < later <= system_clock()


def test_a_database_without_a_clock_has_no_time(sqlite):
    assert sqlite.database.read(store_now) is None


# --- What else two nodes have to agree on ---

APART = (-HOUR, -30_000, 30_000, HOUR)
"""What the clock of a node may be wrong by."""
apart = pytest.mark.parametrize("wrong", APART)
LIMITS = MailLimits(per_address=1, overall=1000, per_address_daily=15)
ADDRESS = "dev@acme.example"


def by_clock(wrong=0):
    """What a node's clock says that is wrong by so much."""
    return system_clock() + wrong


@pytest.fixture
async def nodes(postgresql):
    """Two nodes of one database, which has a partner."""
    nodes = [postgresql.open() for _ in range(2)]
    yield nodes
    for node in nodes:
        await node.close()


@pytest.fixture
async def key(nodes):
    key = a_key()
    await nodes[0].add_partner(a_partner(), key, by="test")
    return key


@pytest.fixture
def age(postgresql):
    """Let everything in a table be older by so much: what its columns say moves back."""

    def age(table, by, *columns):
        found = metadata.tables[table]
        postgresql.run(
            lambda connection: connection.execute(update(found).values({name: found.c[name] - by for name in columns}))
        )

    return age


async def opened(node, key, wrong=0):
    return (await node.open_session(a_login(key, now=by_clock(wrong)))).session


def refresh(node, session, wrong=0, **changes):
    return node.advance_session(a_refresh(session, now=by_clock(wrong), **changes))


@apart
async def test_p10_a_session_lives_as_long_as_it_is_to_whichever_node_it_was_opened_or_refreshed_at(nodes, key, wrong):
    for seen, session in enumerate(
        (first := await opened(nodes[0], key, wrong), (await refresh(nodes[1], first, wrong)).session)
    ):
        assert abs(session.rotated_at - system_clock()) < 10_000
        assert (session.generation, session.expires_at - session.rotated_at) == (seen, WEEK)


@apart
async def test_p10_an_honest_retry_at_a_node_with_another_clock_costs_no_session(nodes, key, wrong):
    session = await opened(nodes[0], key)
    assert isinstance(await refresh(nodes[0], session, wrong, retry=DIGEST), Advanced)
    for clock in (0, wrong, -wrong):
        assert isinstance(await refresh(nodes[1], session, clock, retry=DIGEST), Repeated)


@apart
async def test_p10_no_clock_lets_a_retry_in_after_its_minute(nodes, key, age, wrong):
    session = await opened(nodes[0], key)
    await refresh(nodes[0], session, retry=DIGEST)
    age("session", MINUTE, "rotated_at")
    assert isinstance(await refresh(nodes[1], session, wrong, retry=DIGEST), Condemned)


@apart
@pytest.mark.parametrize("column", ["expires_at", "retires_at"])
async def test_p10_no_clock_ends_a_session_early_or_late(nodes, key, age, wrong, column):
    session = await opened(nodes[0], key)
    left = (WEEK if column == "expires_at" else 4 * WEEK) - 20_000
    age("session", left, column)
    assert isinstance(await refresh(nodes[1], session, wrong, generation=0), Advanced)
    age("session", WEEK, "expires_at", "retires_at")
    assert await refresh(nodes[1], session, wrong, generation=1) == Refused(CredentialExpired)


async def begin(node, wrong=0, **changes):
    asked = a_registration(now=by_clock(wrong), **changes)
    return await node.begin_registration(asked, limits=changes.get("limits", LIMITS), recovery="on")


async def claim(node, wrong=0):
    now = by_clock(wrong)
    return list(await node.claim_mails(limit=10, now=now, until=now + 90_000))


@apart
async def test_p10_two_nodes_never_get_the_same_mail_and_none_waits_longer_for_it(nodes, age, wrong):
    await begin(nodes[0], wrong)
    (mail,) = await claim(nodes[1], -wrong)
    assert [await claim(node, clock) for node in nodes for clock in (wrong, -wrong)] == [[]] * 4
    assert 0 <= mail.expires_at - (by_clock(-wrong) + mail.ahead) <= 10 * MINUTE
    age("outbox", 90_000, "due_at")
    assert [mail.attempts for mail in await claim(nodes[0], wrong)] == [2]


@apart
async def test_p10_mails_of_an_hour_are_counted_by_one_clock(nodes, age, wrong):
    assert isinstance(await begin(nodes[0], wrong), Begun)
    age("outbox", HOUR - MINUTE, "created_at")
    for node, clock in zip(nodes, (wrong, -wrong), strict=True):
        assert await begin(node, clock) == Limited("mails_per_address")
    age("outbox", MINUTE, "created_at")
    assert isinstance(await begin(nodes[1], wrong), Begun)


@apart
async def test_p10_notices_of_an_hour_are_counted_by_one_clock_and_due_at_once(nodes, key, wrong):
    for clock in (0, wrong, -wrong) * 3:
        newer, now = a_key(), by_clock(clock)
        assert isinstance(await nodes[0].roll_key(key.id, newer, ends_at=now, now=now, by="test"), Done)
        key = newer
    told = await claim(nodes[1])
    assert len(told) == 5
    assert [mail.facts["endsAt"] for mail in told] == [str(mail.created_at) for mail in told]


@apart
async def test_p10_a_code_lives_for_ten_minutes_whatever_the_clocks_say(nodes, age, wrong):
    await begin(nodes[0], wrong)
    age("verification", 9 * MINUTE, "created_at", "expires_at")
    challenge = await nodes[1].claim_attempt(ADDRESS, now=by_clock(-wrong))
    right = a_confirmation(challenge, now=by_clock(-wrong))
    assert isinstance(await nodes[1].confirm_registration(right), Confirmed)
    again = await nodes[0].claim_attempt(ADDRESS, now=by_clock(wrong))
    assert isinstance(await nodes[0].repeat_confirmation(ADDRESS, again, now=by_clock(wrong)), Confirmed)
    age("verification", MINUTE, "expires_at")
    assert isinstance(await nodes[0].repeat_confirmation(ADDRESS, again, now=by_clock(wrong)), Refused)
    assert await nodes[1].claim_attempt(ADDRESS, now=by_clock(wrong)) is None


@apart
async def test_p10_a_lost_answer_is_repeated_for_as_long_as_it_is_to_be(nodes, key, age, wrong):
    company, now = a_company(), by_clock(wrong)
    replay = a_replay(readable_until=now + 10 * MINUTE)
    company = changed(company, created_at=now)
    made = await nodes[0].create_company(company, a_key(company_id=company.id), replay=replay, by="test")
    age("replay", 9 * MINUTE, "readable_until")

    async def again():
        twin = changed(a_company(), created_at=by_clock(-wrong))
        return await nodes[1].create_company(twin, a_key(company_id=twin.id), replay=replay, by="test")

    assert await again() == Replayed(made.company_id, replay.sealed)
    age("replay", MINUTE, "readable_until")
    assert await again() == Refused(IdempotencyKeySpent)


async def clock_of(node, own):
    """The clock of a node on a machine with that one."""
    clock = NodeClock(store=node, own=own, monotonic=time.monotonic)
    await clock.look()
    return clock


@pytest.mark.parametrize("wrong", [-HOUR, HOUR, 500 * DAY])
async def test_p10_housekeeping_by_a_wrong_clock_takes_nothing_that_lives(nodes, key, postgresql, wrong):
    session = await opened(nodes[0], key)
    company = changed(a_company(), created_at=by_clock())
    replay = a_replay(readable_until=by_clock() + 10 * MINUTE)
    await nodes[0].create_company(company, a_key(company_id=company.id), replay=replay, by="test")
    await begin(nodes[0])
    await nodes[0].note_usage([UsageMark("acme-motors", system_clock() // HOUR * HOUR, 1, 0)], [])
    purged = []
    clock = await clock_of(nodes[1], lambda: by_clock(wrong))
    assert await Housekeeping(store=nodes[1], clock=clock, on_purged=purged.append, on_mistake=purged.append).go_round() == 0
    assert [postgresql.count(name) for name in ("session", "replay", "verification", "outbox", "usage")] == [1] * 5
    assert None not in {sealed for name in ("replay", "outbox") for (sealed,) in postgresql.rows(name, "sealed")}
    assert isinstance(await refresh(nodes[1], session), Advanced)


async def test_housekeeping_takes_what_is_over_by_the_stores_clock(nodes, key, age, postgresql):
    await opened(nodes[0], key)
    age("session", 2 * WEEK, "expires_at")
    clock = await clock_of(nodes[1], lambda: START - DAY)
    assert await Housekeeping(store=nodes[1], clock=clock, on_purged=None, on_mistake=None).go_round() == 1
