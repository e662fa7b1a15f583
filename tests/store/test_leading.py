"""A leader that somebody else has taken the place of, and that nobody has fenced, is not believed."""

import asyncio

import pytest
from backends import Backend, until
from given import AROUND, START, Clock, a_key, a_partner
from sqlalchemy import select, text
from standby import Pair

from gatelodge.errors import Unavailable
from gatelodge_server.core.following import MAX_STALENESS, ChangeFollower
from gatelodge_server.core.model import SessionEnd
from gatelodge_server.store.address import parse_address
from gatelodge_server.store.leading import NAME, PROOF, PROOF_PATIENCE, RENEWAL, TRUST, Leader
from gatelodge_server.store.migrate import upgrade
from gatelodge_server.store.postgres import PATIENCE, PostgresDriver, connect
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.tables import tier
from gatelodge_server.store.trail import append_change

NOW = 1_000.0
SOME_SESSION = bytes(16)


# --- What one process knows -----------------------------------------------------------------------------------------------


@pytest.fixture
def clock():
    return Clock(NOW)


@pytest.fixture
def leader(clock):
    return Leader(monotonic=clock)


def test_nobody_has_proved_anything_before_somebody_has(leader):
    assert not leader.has_proved("a", since=float("-inf"))
    assert leader.is_due()
    assert not leader.has_lapsed()


@pytest.mark.parametrize("by", AROUND)
def test_a_proof_says_what_was_so_when_it_was_asked_for(leader, by):
    assert leader.note("a", asked_at=NOW) is False
    assert leader.has_proved("a", since=NOW + by) is (by <= 0)
    assert not leader.has_proved("b", since=NOW - 1)


@pytest.mark.parametrize("by", AROUND)
def test_a_proof_becomes_due_and_lapses(leader, clock, by):
    leader.note("a", asked_at=NOW)
    clock.now = NOW + RENEWAL + by / 1000
    assert leader.is_due() is (by >= 0)
    clock.now = NOW + MAX_STALENESS + by / 1000
    assert leader.has_lapsed() is (by >= 0)


def test_what_is_read_by_a_proof_is_over_before_that_is_too_old():
    assert TRUST + PATIENCE + 0.5 < MAX_STALENESS
    assert RENEWAL < TRUST
    assert PROOF_PATIENCE < PATIENCE


@pytest.mark.parametrize("by", AROUND)
def test_a_proof_of_another_takes_the_place_of_the_one_before_and_not_the_other_way_round(leader, by):
    leader.note("a", asked_at=NOW)
    assert leader.note("b", asked_at=NOW + by) is (by >= 0)
    assert leader.has_proved("b", since=NOW - 1) is (by >= 0)
    assert leader.has_proved("a", since=NOW - 1) is (by < 0)
    assert leader.is_doubted("a") is (by >= 0)


def test_a_server_is_doubted_until_it_proves_that_it_leads_and_how_often_is_not_forgotten(leader):
    for number in range(1, 4):
        leader.doubt("a")
        assert (leader.is_doubted("a"), leader.doubts("a")) == (True, number)
        leader.note("a", asked_at=NOW)
        assert (leader.is_doubted("a"), leader.doubts("a")) == (False, number)
    assert (leader.is_doubted("b"), leader.doubts("b")) == (False, 0)


# --- A leader and its standby ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    with Pair() as pair:
        yield pair


@pytest.fixture
def backend(pair):
    backend = Backend(pair.leader.create("lodge"))
    backend.database.upgrade(upgrade)
    return backend


@pytest.fixture
async def driver(pair, backend, clock):
    """A node's that knows both, the one that leads at first before the other."""
    driver = PostgresDriver(parse_address(pair.url("lodge")), on_fault=backend.faults.append, monotonic=clock)
    yield driver
    pair.standby.thaw()
    await driver.close()


@pytest.fixture
async def store(driver):
    return SqlStore(driver)


@pytest.fixture
async def key(store):
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    return key


async def to_the_other(pair, verb):
    """Let the standby lead, and do something there, as a node does that hears of it. The old leader goes on."""
    await asyncio.to_thread(pair.standby.promote)
    other = Backend(pair.standby.url("lodge")).open()
    try:
        return await verb(other)
    finally:
        await other.close()


def revoke(key):
    return lambda other: other.revoke_key(key.id, now=START, by="test")


def written(pair):
    """How many transactions have ever written something."""
    return int(pair.leader.run_sql("SELECT pg_snapshot_xmax(pg_current_snapshot())")[0][0])


def read_name(connection):
    return connection.execute(text(NAME)).scalar_one()


async def until_good(verb):
    async with asyncio.timeout(20):
        while True:
            try:
                return await verb()
            except Unavailable:
                await asyncio.sleep(0.01)


async def test_the_proof_waits_for_the_standby(pair, backend):
    connection = await connect(parse_address(backend.address))
    await connection.execute(PROOF)
    pair.standby.freeze()
    proving = asyncio.create_task(connection.execute(PROOF))
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    await until(lambda: pair.leader.run_sql(waits) == [["1"]])
    assert not proving.done()
    pair.standby.thaw()
    async with asyncio.timeout(10):
        await proving
    await connection.close()


async def test_a_reading_needs_a_proof_and_the_next_ones_use_it(pair, driver, backend):
    before = written(pair)
    for _ in range(3):
        await driver.read(lambda connection: connection.execute(select(tier)).all())
        assert written(pair) == before + 1
    assert backend.faults == []


@pytest.mark.parametrize("by", AROUND)
async def test_r72_what_is_remembered_is_believed_for_the_maximum_staleness_after_the_last_proof(pair, store, clock, by):
    """Not for that time after what was read last, which may have been read from a leader that was one no more."""
    await store.ping()
    pair.standby.freeze()
    clock.forward(TRUST - 1)
    follower = ChangeFollower(store=store, monotonic=clock, on_mistake=pytest.fail)
    await follower.catch_up()
    clock.now = NOW + MAX_STALENESS + by / 1000
    assert follower.is_current() is (by < 0)
    if by >= 0:
        with pytest.raises(Unavailable):
            await follower.catch_up()
        assert not follower.is_current()


async def test_r72_without_its_standby_a_leader_is_not_believed_and_with_it_again(pair, store, key, backend, clock):
    follower = ChangeFollower(store=store, monotonic=clock, on_mistake=pytest.fail)
    await follower.catch_up()
    pair.standby.freeze()
    assert (await store.find_key(key.id)).ends_at is None
    clock.forward(TRUST + 0.001)
    verbs = (store.ping(), store.find_key(key.id), store.list_changes(after=0, limit=1), store.last_change())
    refused = await asyncio.gather(*verbs, return_exceptions=True)
    assert [type(fault) for fault in refused] == [Unavailable] * 4
    assert "no standby confirms" in " ".join(backend.faults)
    pair.standby.thaw()
    assert (await until_good(lambda: store.find_key(key.id))).ends_at is None
    clock.forward(MAX_STALENESS)
    await until_good(follower.catch_up)
    assert follower.is_current()


async def test_r72_what_was_revoked_on_the_new_leader_is_not_looked_up_at_the_old_one(pair, store, driver, key, clock):
    follower, told = ChangeFollower(store=store, monotonic=clock, on_mistake=pytest.fail), []
    follower.tell(lambda *step: told.append(step))
    await follower.catch_up()
    assert (await store.find_key(key.id)).ends_at is None
    done = await to_the_other(pair, revoke(key))
    assert pair.leader.run_sql("SELECT count(*) FROM credential WHERE ends_at IS NULL", database="lodge") == [["1"]]
    clock.forward(TRUST + 0.001)
    assert (await until_good(lambda: store.find_key(key.id))).ends_at is not None
    assert not follower.is_current()  # since it is another that leads
    await follower.catch_up()
    assert told == [("credential", key.id)]
    assert (await store.last_change(), follower.is_current()) == (done.sequence, True)
    # And from there is no way back, though the old one goes on answering.
    names = await asyncio.gather(*(driver.read(read_name) for _ in range(30)))
    assert {*names} == {pair.standby.run_sql(NAME)[0][0]} != {pair.leader.run_sql(NAME)[0][0]}


async def test_r72_the_feed_tells_what_was_so_when_it_was_asked(pair, store, key, clock):
    """Whoever follows it dates what it hears by its own request."""
    before = await store.last_change()
    assert (await store.read_revocations(after=before, limit=10)).last.sequence == before
    done = await to_the_other(pair, revoke(key))
    clock.forward(0.001)
    tail = await until_good(lambda: store.read_revocations(after=before, limit=10))
    assert [one.sequence for one in tail.revocations] == [done.sequence]


async def test_r35_who_logs_out_of_a_session_that_the_old_leader_does_not_know_is_not_told_that_it_has_ended(pair, store):
    assert await store.end_session(SOME_SESSION, cause=SessionEnd.LOGOUT, now=START, by="test") is None
    pair.standby.freeze()
    with pytest.raises(Unavailable):
        await store.end_session(SOME_SESSION, cause=SessionEnd.LOGOUT, now=START, by="test")


async def test_what_is_read_after_a_change_is_read_from_where_it_was_made(pair, driver, clock):
    """A pool may still have connections to the leader before, which is believed for a while."""
    await driver.read(read_name)
    await asyncio.to_thread(pair.standby.promote)
    old, new = (server.run_sql(NAME)[0][0] for server in (pair.leader, pair.standby))
    there = PostgresDriver(parse_address(pair.standby.url("lodge")), on_fault=pytest.fail, monotonic=clock)
    there._leader = driver._leader
    clock.forward(0.001)
    await there.write(lambda connection: append_change(connection, "tier", "starter", START))
    await there.close()
    assert driver._leader.is_doubted(old)
    assert await until_good(lambda: driver.read(read_name)) == new


async def test_fifty_who_read_at_once_wait_for_one_proof(pair, driver, clock):
    await driver.read(read_name)
    clock.forward(TRUST + 0.001)
    before = written(pair)
    await asyncio.gather(*(driver.read(read_name) for _ in range(50)))
    assert written(pair) == before + 1


async def test_a_proof_is_renewed_while_nobody_waits_for_it(pair, driver, clock):
    await driver.read(read_name)
    clock.forward(RENEWAL)
    before = written(pair)
    await driver.read(read_name)
    await until(lambda: written(pair) == before + 1)
    pair.standby.freeze()
    clock.forward(TRUST)  # more than that after the first proof, and not after the second
    await driver.read(read_name)


async def test_who_waits_for_news_waits_at_the_one_that_leads(pair, store, driver, clock):
    listening = asyncio.create_task(store.listen())
    await driver.read(read_name)
    await asyncio.to_thread(pair.standby.promote)
    clock.forward(TRUST + 0.001)
    await until_good(lambda: driver.read(read_name))
    there = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'gatelodge-listen'"
    await until(lambda: pair.standby.run_sql(there) == [["1"]])
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
