"""The verbs of quotas and usage.

Most of them go by the clock of whoever asks, so that a test may say what time it is; those of the store's own clock are below.
"""

import asyncio
from random import Random

import pytest
from backends import by_the_asker
from given import AROUND, START, a_company, a_key, a_partner, a_replay, a_signing_key, a_token
from sqlalchemy import Engine, event, select

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import DAY, HOUR, KeyPurpose, Tier
from gatelodge_server.core.ports import UNHEARD, Done, LastUse, QuotaAsk, Refused, UsageMark
from gatelodge_server.core.refusals import IdempotencyKeySpent
from gatelodge_server.store.clock import going_by, store_now
from gatelodge_server.store.quotas import lease_quotas, note_usage
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.tables import quota

STARTER = Tier("starter", 100, 1_000)
HOUR_AT, DAY_AT = START - START % HOUR, START - START % DAY


@pytest.fixture
async def open_node(backend):
    """Opens another node's store, which goes by the asker's clock unless it is told otherwise."""
    nodes = []

    def open_node(store_now=by_the_asker):
        nodes.append(SqlStore(backend.driver(), store_now=store_now))
        return nodes[-1]

    yield open_node
    for node in nodes:
        await node.close()


@pytest.fixture
def store(open_node):
    return open_node()


@pytest.fixture
def other_node(open_node):
    return open_node()


def an_ask(want=1, *, now=START, partner_id="acme-motors", **unused):
    return QuotaAsk(partner_id, want, now, **unused)


def unused_of(lease, unused, **changes):
    """An ask that gives back a part of a lease."""
    given_back = {"unused": unused, "unused_hour_at": lease.hour_starts_at, "unused_day_at": lease.day_starts_at}
    return an_ask(**({"want": 0} | given_back | changes))


async def taken(store, now=START):
    """How much of the partner's hour and day is taken."""
    lease = await store.lease_quota(an_ask(0, now=now))
    return lease.hour_taken, lease.day_taken


# --- lease_quota ---


async def test_a_lease_says_what_was_granted_and_how_the_windows_stand(store, key):
    assert await store.lease_quota(an_ask(7)) == (7, STARTER, HOUR_AT, 7, DAY_AT, 7, START)
    assert await store.lease_quota(an_ask(3)) == (3, STARTER, HOUR_AT, 10, DAY_AT, 10, START)


async def test_nobody_leases_for_a_partner_that_is_not_there(store, key, backend):
    leases = await asyncio.gather(
        *(store.lease_quota(an_ask(partner_id=name)) for name in ("acme", "acme-motors", "ACME-MOTORS"))
    )
    assert [lease is None for lease in leases] == [True, False, True]
    assert backend.count("quota") == 1


@pytest.mark.parametrize("offset", AROUND)
async def test_no_more_is_granted_than_the_hour_has(store, key, offset):
    await store.lease_quota(an_ask(60))
    lease = await store.lease_quota(an_ask(40 + offset))
    assert (lease.granted, lease.hour_taken) == (min(40, 40 + offset), min(100, 100 + offset))


@pytest.mark.parametrize("offset", AROUND)
async def test_no_more_is_granted_than_the_day_has(store, key, offset):
    for hour in range(9):
        assert (await store.lease_quota(an_ask(100, now=DAY_AT + hour * HOUR))).granted == 100
    now = DAY_AT + 9 * HOUR
    assert (await store.lease_quota(an_ask(60, now=now))).granted == 60
    lease = await store.lease_quota(an_ask(40 + offset, now=now))
    assert (lease.granted, lease.day_taken) == (min(40, 40 + offset), min(1_000, 1_000 + offset))
    assert (await store.lease_quota(an_ask(100, now=now + HOUR))).granted == max(0, -offset)


@pytest.mark.parametrize(("length", "limit"), [(HOUR, 100), (DAY, 1_000)])
@pytest.mark.parametrize("offset", AROUND)
async def test_a_window_begins_anew_at_the_full_hour_and_day(store, key, length, limit, offset):
    await store.set_tier(Tier("starter", limit, limit), now=START, by="test")
    begins_at = DAY_AT + DAY
    assert (await store.lease_quota(an_ask(limit, now=begins_at - 1))).granted == limit
    assert (await store.lease_quota(an_ask(limit, now=begins_at + offset))).granted == (0 if offset < 0 else limit)


async def test_a_window_never_goes_back(store, key):
    """A clock that is behind is counted where the store is, so that two clocks have no two quotas."""
    ahead = HOUR_AT + HOUR
    assert (await store.lease_quota(an_ask(90, now=ahead))).granted == 90
    lease = await store.lease_quota(an_ask(100, now=ahead - 1))
    assert (lease.granted, lease.hour_starts_at, lease.hour_taken) == (10, ahead, 100)
    assert (await store.lease_quota(an_ask(1, now=ahead - DAY))).granted == 0


async def test_what_comes_back_can_be_leased_again(store, key):
    lease = await store.lease_quota(an_ask(100))
    assert (await store.lease_quota(an_ask(1))).granted == 0
    assert await store.lease_quota(unused_of(lease, 30)) == (0, STARTER, HOUR_AT, 70, DAY_AT, 70, START)
    assert (await store.lease_quota(unused_of(lease, 10, want=100))).granted == 40


async def test_what_comes_back_late_counts_only_for_the_window_that_it_was_taken_from(store, key):
    lease = await store.lease_quota(an_ask(50))
    await store.lease_quota(an_ask(30, now=HOUR_AT + HOUR))
    later = await store.lease_quota(unused_of(lease, 20, want=10, now=HOUR_AT + HOUR))
    assert (later.hour_taken, later.day_taken) == (40, 70)
    await store.lease_quota(an_ask(30, now=DAY_AT + DAY))
    tomorrow = await store.lease_quota(unused_of(lease, 20, want=10, now=DAY_AT + DAY))
    assert (tomorrow.hour_taken, tomorrow.day_taken) == (40, 40)


async def test_no_more_comes_back_than_was_taken(store, key):
    lease = await store.lease_quota(an_ask(5))
    assert (await store.lease_quota(unused_of(lease, 50, want=1_000))).granted == 100


async def test_r39_a_change_of_tier_counts_at_the_next_ask(store, other_node, key):
    await store.set_tier(Tier("growth", 500, 5_000), now=START, by="test")
    assert (await store.lease_quota(an_ask(1_000))).granted == 100
    await other_node.set_partner_tier("acme-motors", "growth", now=START, by="test")
    lease = await store.lease_quota(an_ask(1_000))
    assert (lease.granted, lease.tier) == (400, Tier("growth", 500, 5_000))
    await other_node.set_tier(Tier("growth", 600, 5_000), now=START, by="test")
    assert (await store.lease_quota(an_ask(1_000))).granted == 100


async def test_a_tier_below_what_is_taken_grants_nothing(store, key):
    await store.lease_quota(an_ask(50))
    await store.set_tier(Tier("starter", 10, 1_000), now=START, by="test")
    assert await store.lease_quota(an_ask(1)) == (0, Tier("starter", 10, 1_000), HOUR_AT, 50, DAY_AT, 50, START)


async def test_r78_fifty_asks_at_once_from_two_nodes_never_get_more_than_the_limit(store, other_node, key):
    leases = await asyncio.gather(*((store, other_node)[at % 2].lease_quota(an_ask(3)) for at in range(50)))
    assert sum(lease.granted for lease in leases) == 100
    assert await taken(store) == (100, 100)


async def test_r78_asks_and_returns_at_once_leave_what_is_used(store, other_node, key):
    """Each of two nodes leases four and gives back one, again and again: what is taken is what was not given back."""

    async def ask_and_return(node):
        lease = await node.lease_quota(an_ask(4))
        if lease.granted == 4:
            await node.lease_quota(unused_of(lease, 1))
            return 3
        return lease.granted

    used = await asyncio.gather(*(ask_and_return((store, other_node)[at % 2]) for at in range(50)))
    assert (await taken(store))[0] == sum(used) <= 100


async def test_partners_do_not_share_what_they_have(store, other_node, key):
    names = [f"partner-{at}" for at in range(10)]
    for name in names:
        await store.add_partner(a_partner(name), a_key(name), by="test")
    asks = [an_ask(30, partner_id=name) for name in names for _ in range(5)]
    leases = await asyncio.gather(*((store, other_node)[at % 2].lease_quota(ask) for at, ask in enumerate(asks)))
    for name in names:
        mine = [lease.granted for ask, lease in zip(asks, leases, strict=True) if ask.partner_id == name]
        assert sorted(mine) == [0, 10, 30, 30, 30]


async def test_what_is_taken_outlives_the_node(store, key, open_node):
    await store.lease_quota(an_ask(60))
    await store.close()
    assert (await open_node().lease_quota(an_ask(60))).granted == 40


async def test_p5_the_window_that_a_wrong_clock_left_is_known_when_it_comes_back(store, other_node, key):
    for ahead in (9 * DAY, 2 * HOUR, 9 * DAY):
        await store.lease_quota(an_ask(100))
        assert (await store.lease_quota(an_ask(1, now=START + ahead))).granted in {0, 1}
        assert (await other_node.lease_quota(an_ask(1))).granted == 0


# --- the order of locks ---


@pytest.fixture
def rows_at_once():
    """What statements are told that are for several rows."""
    told = []

    def listen(connection, statement, several, one, _):
        if len(several) > 1:
            told.append((str(statement).split()[:2], [next(iter(row.values())) for row in several]))

    event.listen(Engine, "before_execute", listen)
    yield told
    event.remove(Engine, "before_execute", listen)


async def test_whoever_locks_several_rows_locks_them_in_the_order_of_their_keys(store, key, backend, rows_at_once):
    """Else two nodes wait for each other in a circle."""
    names = ["partner-c", "partner-a", "partner-b"]
    for name in names:
        await store.add_partner(a_partner(name), a_key(name), by="test")
    ids = {name: (await store.list_keys(name))[0].id for name in names}
    await store.establish_signing_keys([a_signing_key("ring", signs_from=START, purpose=KeyPurpose.ACCESS)], now=START)
    tokens = [a_token("ring", name) for name in names]
    for token in tokens:
        await store.issue_token(token, by="test")
    driver = backend.driver()
    for want in (1, 2):  # the first makes the rows
        asks = [an_ask(want, partner_id=name, usage=[a_mark(1, 0, partner_id=name)]) for name in names]
        leases = await driver.write(going_by(by_the_asker, lease_quotas), asks)
        assert [lease.granted for lease in leases] == [want] * 3
    await driver.close()
    uses = [LastUse("token", token.id, START, "") for token in tokens] + [
        LastUse("key", ids[name], START, "") for name in names
    ]
    await store.note_usage([a_mark(1, 0, partner_id=name) for name in names], uses)
    assert {" ".join(words) for words, _ in rows_at_once} == {
        "UPDATE quota",
        "INSERT INTO",
        "UPDATE credential",
        "UPDATE access_token",
        "UPDATE verification",
        "UPDATE replay",
    }
    for words, keys in rows_at_once:
        assert keys == sorted(keys), words


async def test_nodes_that_lease_for_the_same_partners_and_note_their_usage_do_not_wait_in_a_circle(store, key, backend):
    names = [f"partner-{at}" for at in range(6)]
    for name in names:
        await store.add_partner(a_partner(name), a_key(name), by="test")
    keys = [(await store.list_keys(name))[0].id for name in names]
    drivers = [backend.driver() for _ in range(4)]

    async def work(at, driver):
        dice = Random(at)
        for _ in range(10):
            some = dice.sample(range(6), 4)
            asks = [an_ask(1, partner_id=names[which], usage=[a_mark(1, 0, partner_id=names[which])]) for which in some]
            await driver.write(going_by(by_the_asker, lease_quotas), asks)
            uses = [LastUse("key", keys[which], START, "") for which in some]
            await driver.write(note_usage, [a_mark(1, 0, partner_id=names[which]) for which in some], uses)

    await asyncio.gather(*(work(at, driver) for at, driver in enumerate(drivers)))
    for driver in drivers:
        await driver.close()
    counts = [(await store.list_usage(name, since=0))[0].accepted for name in names]
    taken_of = [(await store.lease_quota(an_ask(0, partner_id=name))).hour_taken for name in names]
    assert sum(counts) == 2 * 4 * 10 * 4
    assert [2 * each for each in taken_of] == counts
    assert backend.faults == []


# --- the store's clock ---


async def test_p5_the_time_is_read_when_the_row_is_locked(key, open_node):
    """A wait for another node may cross the end of an hour."""
    read = []

    def late_clock(connection):
        locked = connection.execute(select(quota.c.hour_taken)).scalar_one()
        read.append(locked)
        return store_now(connection)

    await asyncio.gather(*(open_node(late_clock).lease_quota(an_ask(1)) for _ in range(5)))
    assert sorted(read) == [0, 1, 2, 3, 4]


# --- note_usage, list_usage, forget_usage ---


def a_mark(accepted, refused, *, hour=HOUR_AT, partner_id="acme-motors"):
    return UsageMark(partner_id, hour, accepted, refused)


async def test_a_lease_adds_the_usage_that_comes_with_it(store, other_node, key):
    marks = [a_mark(2, 0, hour=HOUR_AT + HOUR), a_mark(5, 1)]
    lease = await store.lease_quota(an_ask(7, usage=marks))
    assert (lease.granted, await store.list_usage("acme-motors", since=0)) == (7, marks[::-1])
    await other_node.lease_quota(unused_of(lease, 3, usage=[a_mark(1, 1)]))
    assert await taken(store) == (4, 4)
    assert await store.list_usage("acme-motors", since=HOUR_AT) == [a_mark(6, 2), marks[0]]


async def test_usage_that_comes_with_leases_of_two_nodes_at_once_is_all_counted(store, other_node, key):
    await store.add_partner(a_partner("miller"), a_key("miller"), by="test")
    names = ("acme-motors", "miller")
    asks = [an_ask(1, partner_id=names[at % 2], usage=[a_mark(1, 2, partner_id=names[at % 2])]) for at in range(100)]
    marks = [a_mark(1, 0, partner_id=name) for name in names]
    await asyncio.gather(
        *((store, other_node)[at // 2 % 2].lease_quota(ask) for at, ask in enumerate(asks)),
        *((store, other_node)[at % 2].note_usage(marks[:: (-1) ** at], []) for at in range(10)),
    )
    for name in names:
        assert await store.list_usage(name, since=0) == [a_mark(60, 100, partner_id=name)]


async def test_a_lease_that_is_rolled_back_takes_its_usage_along(store, key, backend):
    def fail(connection):
        lease_quotas(connection, [an_ask(7, usage=[a_mark(5, 1)])])
        raise ZeroDivisionError

    driver = backend.driver()
    with pytest.raises(ZeroDivisionError):
        await driver.write(going_by(by_the_asker, fail))
    await driver.close()
    assert await taken(store) == (0, 0)
    assert await store.list_usage("acme-motors", since=0) == []


async def test_usage_of_a_partner_that_is_not_there_is_not_kept_and_keeps_nobody_from_a_lease(store, key):
    asks = [an_ask(1, partner_id=name, usage=[a_mark(1, 0, partner_id=name)]) for name in ("nobody", "acme-motors")]
    leases = await asyncio.gather(*(store.lease_quota(ask) for ask in asks))
    assert [lease is None for lease in leases] == [True, False]
    assert await store.list_usage("nobody", since=0) == []
    assert await store.list_usage("acme-motors", since=0) == [a_mark(1, 0)]


async def test_usage_adds_up_by_the_hour(store, other_node, key):
    await store.note_usage([a_mark(5, 1), a_mark(2, 0, hour=HOUR_AT + HOUR)], [])
    await other_node.note_usage([a_mark(10, 3), a_mark(1, 1)], [])
    assert await store.list_usage("acme-motors", since=0) == [a_mark(16, 5), a_mark(2, 0, hour=HOUR_AT + HOUR)]
    assert await store.list_usage("acme", since=0) == []


@pytest.mark.parametrize("offset", AROUND)
async def test_usage_is_listed_from_a_moment_on(store, key, offset):
    await store.note_usage([a_mark(1, 0)], [])
    assert len(await store.list_usage("acme-motors", since=HOUR_AT + offset)) == (0 if offset > 0 else 1)


async def test_usage_that_is_noted_at_once_is_all_counted(store, other_node, key):
    await store.add_partner(a_partner("miller"), a_key("miller"), by="test")
    marks = [a_mark(1, 2), a_mark(1, 0, partner_id="miller")]
    await asyncio.gather(*((store, other_node)[at % 2].note_usage(marks[:: (-1) ** at], []) for at in range(50)))
    assert await store.list_usage("acme-motors", since=0) == [a_mark(50, 100)]
    assert await store.list_usage("miller", since=0) == [a_mark(50, 0, partner_id="miller")]


@pytest.mark.parametrize("offset", AROUND)
async def test_usage_of_hours_that_began_too_long_ago_is_dropped(store, key, offset):
    await store.note_usage([a_mark(1, 0), a_mark(1, 0, hour=HOUR_AT + HOUR)], [])
    await store.forget_usage(before=HOUR_AT + offset)
    assert len(await store.list_usage("acme-motors", since=0)) == (1 if offset > 0 else 2)


@pytest.fixture
async def token(store, key):
    await store.establish_signing_keys([a_signing_key("ring", signs_from=START, purpose=KeyPurpose.ACCESS)], now=START)
    token = a_token("ring")
    assert isinstance(await store.issue_token(token, by="test"), Done)
    return token


@pytest.mark.parametrize("offset", AROUND)
async def test_the_last_use_of_a_key_only_moves_on(store, key, offset):
    await store.note_usage([], [LastUse("key", key.id, START, "192.0.2.1")])
    await store.note_usage([], [LastUse("key", key.id, START + offset, "192.0.2.2")])
    assert (await store.get_key(key.id)).last_used_at == max(START, START + offset)


@pytest.mark.parametrize("offset", AROUND)
async def test_the_last_use_of_a_token_only_moves_on(store, token, offset):
    await store.note_usage([], [LastUse("token", token.id, START, "192.0.2.1")])
    await store.note_usage([], [LastUse("token", token.id, START + offset, "192.0.2.2")])
    (found,) = await store.list_tokens("acme-motors")
    expected = (START + offset, "192.0.2.2") if offset > 0 else (START, "192.0.2.1")
    assert (found.last_used_at, found.last_used_from) == expected


async def test_a_key_and_a_token_of_one_name_are_two_things(store, key, token):
    await store.note_usage([], [LastUse("token", key.id, START, "192.0.2.1"), LastUse("key", token.id, START, "192.0.2.1")])
    assert (await store.get_key(key.id)).last_used_at is None
    assert (await store.list_tokens("acme-motors"))[0].last_used_at is None


async def test_an_address_that_is_too_long_is_cut_off(store, token):
    await store.note_usage([], [LastUse("token", token.id, START, "x" * 200)])
    assert (await store.list_tokens("acme-motors"))[0].last_used_from == "x" * 45


async def test_who_uses_a_key_has_it_so_the_answer_that_made_it_is_not_repeated(store, key):
    company, replay = a_company(), a_replay()
    company_key = a_key(company_id=company.id)
    await store.create_company(company, company_key, replay=replay, by="test")
    await store.note_usage([], [LastUse("key", company_key.id, START, "192.0.2.1")])
    assert await store.create_company(a_company(), a_key(), replay=replay, by="test") == Refused(IdempotencyKeySpent)


class DeafDriver:
    """The driver of a node that does not hear the end of what it has begun, or not its beginning either."""

    def __init__(self, driver, *, reaches):
        self._driver = driver
        self._reaches = reaches

    async def write(self, verb, *args, **kwargs):
        if self._reaches:
            await self._driver.write(verb, *args, **kwargs)
        raise Unavailable

    def __getattr__(self, name):
        return getattr(self._driver, name)


async def test_usage_that_may_have_been_written_is_not_told_as_a_failure(store, key, backend):
    """Else it would be added again."""
    deaf = SqlStore(DeafDriver(backend.driver(), reaches=True))
    await deaf.note_usage([a_mark(1, 0)], [])
    assert await store.list_usage("acme-motors", since=0) == [a_mark(1, 0)]
    await deaf.close()


async def test_usage_that_was_not_written_is_told_as_a_failure(store, key, backend):
    deaf = SqlStore(DeafDriver(backend.driver(), reaches=False))
    with pytest.raises(Unavailable):
        await deaf.note_usage([a_mark(1, 0)], [])
    assert await store.list_usage("acme-motors", since=0) == []
    await deaf.close()


async def test_a_lease_whose_commit_was_not_answered_is_told_as_such(store, key, backend):
    deaf = SqlStore(DeafDriver(backend.driver(), reaches=True), store_now=by_the_asker)
    assert await deaf.lease_quota(an_ask(7, usage=[a_mark(5, 1)])) is UNHEARD
    assert await taken(store) == (7, 7)
    assert await store.list_usage("acme-motors", since=0) == [a_mark(5, 1)]
    await deaf.close()


async def test_a_lease_that_was_not_written_is_told_as_a_failure(store, key, backend):
    deaf = SqlStore(DeafDriver(backend.driver(), reaches=False), store_now=by_the_asker)
    with pytest.raises(Unavailable):
        await deaf.lease_quota(an_ask(7, usage=[a_mark(5, 1)]))
    assert await taken(store) == (0, 0)
    assert await store.list_usage("acme-motors", since=0) == []
    await deaf.close()
