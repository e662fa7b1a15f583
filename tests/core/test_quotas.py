"""Quotas: no more is let in than a tier allows, whatever happens to clocks, nodes and the store."""

import asyncio
from collections import Counter

import pytest
from backends import SqliteBackend
from counting import ACME, MOMENT, a_node, accepted, held
from given import AROUND, START, a_key, a_partner
from hypothesis import given
from hypothesis import strategies as st

from gatelodge.errors import InvalidCredential, QuotaExceeded, Unavailable
from gatelodge_server.core.following import RESTORED
from gatelodge_server.core.model import DAY, HOUR, Tier
from gatelodge_server.core.ports import QuotaAsk, UsageMark
from gatelodge_server.core.quotas import (
    BUSY,
    EXHAUSTED_KEPT,
    IDLE,
    UNOPENED,
    QuotaStatus,
    Window,
    Windows,
    judge_ask,
)
from gatelodge_server.core.refusals import PartnerNotFound
from gatelodge_server.core.tiers import LARGEST_LIMIT

HOUR_AT, DAY_AT = START - START % HOUR, START - START % DAY


# --- the decision ---------------------------------------------------------------------------------------------------------

# What nodes may do, in any order: ask by a clock that is wrong by up to two days, and give back a part of an earlier lease.
STEPS = st.lists(
    st.tuples(
        st.integers(0, 50),
        st.one_of(st.integers(-3, 3), st.integers(-2 * HOUR, 2 * HOUR), st.integers(-2 * DAY, 2 * DAY)),
        st.one_of(st.none(), st.integers(0, 100)),
        st.integers(0, 60),
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 40), st.integers(1, 120))
def test_r78_whatever_is_asked_and_given_back_no_window_is_overdrawn_unless_a_wrong_clock_was_put_right(
    steps, per_hour, per_day
):
    tier, taken, now = Tier("any", per_hour, per_day), UNOPENED, DAY_AT + DAY
    leases, held = [], []
    hours_left = days_left = 1  # how often a window can have been entered: once, and after each wrong clock
    for want, passing, returns, how_many in steps:
        now += passing
        unused = (0, 0, 0)
        if returns is not None and leases:
            at = returns % len(leases)
            back = min(held[at], how_many)
            held[at] -= back
            unused = (back, leases[at].hour_starts_at, leases[at].day_starts_at)
        before = taken
        taken, lease = judge_ask(before, QuotaAsk(ACME, want, 0, *unused), tier, now)
        hour, day = taken
        assert 0 <= lease.granted <= want
        assert lease[2:] == (*hour[:2], *day[:2], now)
        assert hour.starts_at % HOUR == day.starts_at % DAY == 0
        assert now - HOUR < hour.starts_at <= now + HOUR
        assert now - DAY < day.starts_at <= now + DAY
        if hour.starts_at < before.hour.starts_at:
            assert before.hour.starts_at > now + HOUR
            assert hour.taken - lease.granted >= before.hour.taken - unused[0]
            hours_left += 1
        if day.starts_at < before.day.starts_at:
            assert before.day.starts_at > now + DAY
            assert day.taken - lease.granted >= before.day.taken - unused[0]
            days_left += 1
        leases.append(lease)
        held.append(lease.granted)
        hours, days = Counter(), Counter()
        for each, out in zip(leases, held, strict=True):
            hours[each.hour_starts_at] += out
            days[each.day_starts_at] += out
        assert max(hours.values()) <= per_hour * hours_left
        assert max(days.values()) <= per_day * days_left


@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize("length", [HOUR, DAY])
def test_a_later_window_is_heeded_if_it_is_the_next_one_at_most(length, offset):
    """A clock that was days ahead for one request does not lock a partner out for days."""
    tier, now = Tier("any", 1_000, 1_000), DAY_AT + DAY - offset
    ahead = now + length + offset
    hour_at, day_at = (ahead, ahead - ahead % DAY) if length == HOUR else (now - now % HOUR, ahead)
    windows, lease = judge_ask(Windows(Window(hour_at, 7), Window(day_at, 7)), QuotaAsk(ACME, 3, 0), tier, now)
    window = windows.hour if length == HOUR else windows.day
    assert window.starts_at == (ahead if offset <= 0 else now - now % length)
    assert (window.taken, lease.granted) == (10, 3)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=40), st.sampled_from([2 * HOUR, 2 * DAY, 400 * DAY]))
def test_p5_a_clock_that_goes_ahead_and_back_again_and_again_lets_no_window_be_used_twice(steps, ahead):
    tier, windows = Tier("any", 100, 100), UNOPENED
    let_in = Counter()
    for is_ahead, want in steps:
        now = START + ahead * is_ahead
        windows, lease = judge_ask(windows, QuotaAsk(ACME, want, 0), tier, now)
        assert lease.hour_starts_at == now - now % HOUR
        let_in[is_ahead] += lease.granted
        assert all(taken <= 2**31 - 1 for window in windows for taken in (window.taken, window.left_taken))
    assert max(let_in.values(), default=0) <= 100


async def test_p5_after_a_clock_that_was_days_ahead_the_present_hour_is_not_begun_anew(node, store):
    assert await node.let_in(150) == 100
    node.clock.forward(9 * DAY)
    assert await node.let_in(3) == 3
    node.clock.forward(-9 * DAY)
    assert await node.let_in(150) == 0
    node.clock.forward(HOUR)
    assert await node.let_in(150) == 100


def test_what_a_wrong_clock_let_in_fits_into_a_number_of_the_database():
    far, limit = Window(START + 400 * DAY, LARGEST_LIMIT, START - START % HOUR, LARGEST_LIMIT), LARGEST_LIMIT
    windows, lease = judge_ask(Windows(far, Window(DAY_AT, 0)), QuotaAsk(ACME, 1, 0), Tier("any", limit, limit), START)
    assert (windows.hour.taken, lease.granted) == (LARGEST_LIMIT, 0)


async def test_r78_after_one_request_by_a_clock_that_was_days_ahead_each_hour_and_day_has_its_own_again(node, store):
    node.clock.forward(9 * DAY)
    assert await node.let_in(1) == 1
    node.clock.forward(-9 * DAY)
    await node.be_idle()
    for passed, allowed in ((0, 99), (HOUR, 100), (DAY, 100)):
        node.clock.now = START + passed
        node.monotonic.forward(1)
        assert await node.let_in(150) == allowed
        await node.be_idle()


def test_a_first_ask_opens_the_windows():
    tier = Tier("starter", 100, 1_000)
    assert judge_ask(UNOPENED, QuotaAsk(ACME, 3, 0), tier, START) == (
        Windows(Window(HOUR_AT, 3), Window(DAY_AT, 3)),
        (3, tier, HOUR_AT, 3, DAY_AT, 3, START),
    )


# --- nodes over a store ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def store(tmp_path):
    """Of a partner of the tier ``starter``: 100 requests an hour, 1,000 a day."""
    backend = SqliteBackend.create(tmp_path)
    store = backend.open()
    await store.add_partner(a_partner(), a_key(), by="test")
    yield store
    await store.close()


@pytest.fixture
async def start(store):
    """Starts a node."""
    return lambda: a_node(store)


@pytest.fixture
async def node(start):
    return start()


async def taken(store, now=START):
    """How much of the partner's hour and day is taken, in the eyes of the store."""
    lease = await store.lease_quota(QuotaAsk(ACME, 0, now))
    return lease.hour_taken, lease.day_taken


# --- never more, never fewer ----------------------------------------------------------------------------------------------


async def test_p5_of_a_thousand_requests_at_once_a_hundred_are_let_in(node, store):
    outcomes = await asyncio.gather(*(node.try_one() for _ in range(1_000)))
    assert len(accepted(outcomes)) == 100
    assert [type(outcome) for outcome in outcomes if outcome not in accepted(outcomes)] == [QuotaExceeded] * 900
    assert [status.hour.remaining for status in accepted(outcomes)] == list(range(99, -1, -1))
    assert await taken(store) == (100, 100)


async def test_p5_one_after_the_other_a_hundred_are_let_in(node):
    outcomes = [await node.try_one() for _ in range(200)]
    assert outcomes[:100] == accepted(outcomes)
    assert [status.hour.used for status in outcomes[:100]] == list(range(1, 101))


async def test_p5_two_nodes_together_let_a_hundred_in(start, store):
    nodes = [start(), start()]
    total, rounds = 0, []
    while not rounds or rounds[-1]:
        rounds.append(sum(await asyncio.gather(*(node.let_in(1_000) for node in nodes))))
        total += rounds[-1]
        assert total <= 100
        for node in nodes:
            await node.be_idle()
    assert total == 100
    assert await taken(store) == (100, 100)


async def test_p5_it_does_not_matter_when_slices_come_back(start, store):
    """Three nodes, one request at a time here and there, slices given back in between: in the end it is the limit."""
    nodes, total = [start() for _ in range(3)], 0
    for at in range(400):
        node = nodes[at % 7 % 3]
        total += await node.let_in(1)
        if at % 11 == 0:
            await nodes[at % 3].be_idle()
        node.monotonic.forward(EXHAUSTED_KEPT)
    for node in nodes:
        await node.be_idle()
    total += await nodes[0].let_in(100)
    assert total == 100


async def test_partners_do_not_share(node, store):
    await store.add_partner(a_partner("miller"), a_key("miller"), by="test")
    assert await asyncio.gather(node.let_in(150), node.let_in(50, "miller")) == [100, 50]
    assert (await node.quotas.status("miller")).hour.remaining == 50


@pytest.mark.parametrize(("length", "limits"), [(HOUR, (10, 1_000)), (DAY, (10, 10))])
@pytest.mark.parametrize("offset", AROUND)
async def test_a_window_ends_on_the_full_hour_and_day(node, store, length, limits, offset):
    await store.set_tier(Tier("starter", *limits), now=START, by="test")
    ends_at = DAY_AT + DAY
    node.clock.now = ends_at - 1
    assert await node.let_in(20) == 10
    node.clock.now = ends_at + offset
    assert await node.let_in(20) == (0 if offset < 0 else 10)


@pytest.mark.parametrize("offset", AROUND)
async def test_the_day_ends_what_the_hours_would_still_allow(node, store, offset):
    await store.set_tier(Tier("starter", 100, 100 + offset), now=START, by="test")
    assert await node.let_in(150) == min(100, 100 + offset)
    node.clock.forward(HOUR)
    assert await node.let_in(150) == max(0, offset)


async def test_a_refusal_names_what_is_used_up_and_when_it_ends(node, store):
    await store.set_tier(Tier("starter", 5, 5), now=START, by="test")
    node.clock.now = HOUR_AT + 1
    refused = [outcome for outcome in [await node.try_one() for _ in range(6)] if isinstance(outcome, QuotaExceeded)]
    assert [(each.policies, each.retry_after) for each in refused] == [(("hour", "day"), (DAY_AT + DAY - HOUR_AT) // 1_000)]
    node.clock.now = DAY_AT + DAY
    await store.set_tier(Tier("starter", 5, 6), now=START, by="test")
    refused = [outcome for outcome in [await node.try_one() for _ in range(7)] if isinstance(outcome, QuotaExceeded)]
    assert [(each.policies, each.retry_after) for each in refused] == [(("hour",), 3_600)] * 2
    assert dict(refused[0].headers)[b"ratelimit"] == b'"hour";r=0;t=3600, "day";r=1;t=86400'
    node.clock.forward(HOUR + 1)
    refused = [outcome for outcome in [await node.try_one() for _ in range(3)] if isinstance(outcome, QuotaExceeded)]
    assert [(each.policies, each.retry_after) for each in refused] == [(("day",), 23 * 3_600)] * 2


async def test_who_is_not_known_is_not_let_in(node):
    with pytest.raises(InvalidCredential):
        await node.quotas.count("acme", START)
    with pytest.raises(PartnerNotFound):
        await node.quotas.status("acme")


# --- in memory, or by the store -------------------------------------------------------------------------------------------


async def test_while_there_is_a_slice_a_request_is_counted_without_a_pause(node):
    await node.let_in(20)
    assert held(node) > 0
    asked = len(node.line.asks)
    counting = node.quotas.count(ACME, START)
    with pytest.raises(StopIteration) as returned:
        counting.send(None)
    assert isinstance(returned.value.value, QuotaStatus)
    assert len(node.line.asks) == asked


async def test_a_quiet_partner_leases_one_at_a_time(node):
    for at in range(10):
        assert await node.let_in(1) == 1
        assert (len(node.line.asks), held(node)) == (at + 1, 0)
        node.monotonic.forward(BUSY + MOMENT)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_slice_that_is_used_up_at_once_is_followed_by_a_larger_one(node, store, offset):
    await store.set_tier(Tier("starter", 1_000_000, 1_000_000), now=START, by="test")
    for _ in range(15):
        await node.quotas.count(ACME, START)
    assert [ask.want for ask in node.line.asks] == [1, 2, 4, 8]
    node.monotonic.now += BUSY + offset * MOMENT
    await node.quotas.count(ACME, START)
    assert node.line.asks[-1].want == (4 if offset > 0 else 16)


async def test_no_slice_is_larger_than_an_eighth_of_what_is_left(node):
    left = 100
    for _ in range(100):
        await node.quotas.count(ACME, START)
    for ask in node.line.asks:
        assert ask.want <= max(1, left // 8)
        left -= ask.want
    assert left == 0
    assert max(ask.want for ask in node.line.asks) > 4


async def test_all_who_wait_for_a_partner_wait_for_the_same_ask(node):
    node.line.slow = asyncio.Event()
    waiting = [asyncio.create_task(node.try_one()) for _ in range(50)]
    looking = [asyncio.create_task(node.quotas.status(ACME)) for _ in range(5)]
    while not node.line.asks:
        await asyncio.sleep(0)
    node.line.slow.set()
    assert len(accepted(await asyncio.gather(*waiting))) == 50
    await asyncio.gather(*looking)
    assert node.line.most_under_way == 1
    assert node.line.asks[0].want == 1
    assert len(node.line.asks) < 20


@pytest.mark.parametrize("offset", AROUND)
async def test_that_nothing_is_left_is_believed_for_a_tenth_of_a_second(start, store, offset):
    node, other = start(), start()
    assert await other.let_in(99) == 99
    await other.quotas.close()
    lease = await store.lease_quota(QuotaAsk(ACME, 1, START))
    assert await node.let_in(50) == 0
    asked = len(node.line.asks)
    assert await node.let_in(50) == 0
    assert len(node.line.asks) == asked
    await store.lease_quota(QuotaAsk(ACME, 0, START, 1, lease.hour_starts_at, lease.day_starts_at))
    node.monotonic.now += EXHAUSTED_KEPT + offset * MOMENT
    assert await node.let_in(50) == (0 if offset < 0 else 1)


async def test_a_new_window_is_seen_although_nothing_was_left_a_moment_ago(node):
    assert await node.let_in(101) == 100
    node.clock.now = HOUR_AT + HOUR
    assert await node.let_in(1) == 1


# --- giving back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", AROUND)
async def test_a_slice_that_is_idle_for_a_quarter_of_a_second_is_given_back(node, store, offset):
    await node.let_in(20)
    assert held(node) > 0
    await node.quotas.go_round()
    node.monotonic.now += IDLE + offset * MOMENT
    await node.quotas.go_round()
    assert (held(node) == 0) == (offset >= 0)
    assert (await taken(store) == (20, 20)) == (offset >= 0)


async def test_a_partner_that_is_idle_takes_no_room(node):
    await node.let_in(150)
    for _ in range(3):
        await node.be_idle()
    assert node.quotas._books == {}


async def test_a_partner_that_goes_on_keeps_its_slice(node):
    await node.let_in(20)
    for _ in range(5):
        await node.quotas.go_round()
        node.monotonic.forward(IDLE - MOMENT)
        await node.let_in(1)
    assert sum(ask.unused for ask in node.line.asks) == 0


@pytest.mark.parametrize("offset", AROUND)
async def test_what_a_window_leaves_over_comes_back_to_the_day(node, store, offset):
    await node.let_in(20)
    node.clock.now = HOUR_AT + HOUR + offset
    await node.quotas.go_round()
    assert (held(node) == 0) == (offset >= 0)
    if offset >= 0:
        assert await taken(store, node.clock.now) == (0, 20)


async def test_a_process_that_was_frozen_does_not_use_an_old_slice(node, store):
    await node.let_in(20)
    assert held(node) > 0
    node.clock.now = HOUR_AT + HOUR
    outcomes = await asyncio.gather(*(node.try_one() for _ in range(200)))
    assert len(accepted(outcomes)) == 100
    assert await taken(store, node.clock.now) == (100, 120)


async def test_an_old_slice_is_not_used_where_the_new_window_is_used_up_by_others(start, store):
    node, other = start(), start()
    await node.let_in(20)
    assert held(node) > 0
    node.clock.now = other.clock.now = HOUR_AT + HOUR
    assert await other.let_in(101) == 100
    assert [await node.let_in(1) for _ in range(3)] == [0, 0, 0]


async def test_a_process_that_was_frozen_while_it_asked_does_not_use_the_answer(node, store):
    node.line.slow = asyncio.Event()
    waiting = asyncio.create_task(node.try_one())
    while not node.line.under_way:
        await asyncio.sleep(0)
    node.clock.now = HOUR_AT + HOUR
    node.line.slow.set()
    status = await waiting
    assert status.hour.resets_at == HOUR_AT + 2 * HOUR
    assert await taken(store, node.clock.now) == (1, 1)


async def test_closing_gives_everything_back_and_tells_what_was_counted(node, store):
    await store.add_partner(a_partner("miller"), a_key("miller"), by="test")
    running = asyncio.create_task(node.quotas.run())
    await asyncio.gather(node.let_in(20), node.let_in(150, "miller"))
    assert held(node) > 0
    await node.quotas.close()
    await running
    assert await taken(store) == (20, 20)
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 20, 0)]
    assert await store.list_usage("miller", since=0) == [UsageMark("miller", HOUR_AT, 100, 50)]


async def test_closing_waits_for_those_who_ask(node, store):
    node.line.slow = asyncio.Event()
    waiting = asyncio.create_task(node.let_in(20))
    while not node.line.under_way:
        await asyncio.sleep(0)
    closing = asyncio.create_task(node.quotas.close())
    node.line.slow.set()
    assert await waiting == 20
    await closing
    assert await taken(store) == (20, 20)


async def test_a_restart_keeps_what_is_used(start):
    node = start()
    assert await node.let_in(60) == 60
    await node.quotas.close()
    assert await start().let_in(60) == 40


async def test_a_crash_takes_one_slice_along(start):
    node = start()
    assert await node.let_in(20) == 20
    lost = held(node)
    assert 0 < lost <= 100 // 8
    assert await start().let_in(1_000) == 80 - lost


# --- the store is away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["there", "back"])
async def test_r72_without_the_store_nobody_is_let_in(node, store, cut):
    node.line.cut = cut
    outcomes = await asyncio.gather(*(node.try_one() for _ in range(10)))
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 10
    with pytest.raises(Unavailable):
        await node.quotas.status(ACME)
    node.line.cut = None
    lost = (await taken(store))[0]
    assert lost <= 1
    assert await node.let_in(200) == 100 - lost


@pytest.mark.parametrize("cut", ["there", "back"])
async def test_what_may_have_been_given_back_is_not_given_back_again(node, store, cut):
    assert await node.let_in(20) == 20
    lost = held(node)
    assert lost > 0
    await node.quotas.go_round()
    node.line.cut = cut
    await node.be_idle()
    node.line.cut = None
    await node.be_idle()
    assert await taken(store) == (20 + (lost if cut == "there" else 0),) * 2
    assert sum(ask.unused for ask in node.line.asks) == lost


async def test_what_is_held_is_used_while_the_store_is_away(node):
    await node.let_in(20)
    node.line.cut, left = "there", held(node)
    assert await node.let_in(left + 5) == left


async def test_looking_does_not_cost_what_is_held(node):
    await node.let_in(20)
    left = held(node)
    node.line.cut = "there"
    with pytest.raises(Unavailable):
        await node.quotas.status(ACME)
    assert held(node) == left > 0


async def test_a_mistake_is_told_to_those_who_wait_and_ends_nothing(node):
    node.line.cut = "mistaken"
    with pytest.raises(ZeroDivisionError):
        await node.quotas.count(ACME, START)
    assert [type(mistake) for mistake in node.mistakes] == [ZeroDivisionError]
    node.line.cut = None
    assert await node.let_in(1) == 1


async def test_who_goes_away_is_not_counted(node, store):
    node.line.slow = asyncio.Event()
    waiting = [asyncio.create_task(node.try_one()) for _ in range(20)]
    while not node.line.under_way:
        await asyncio.sleep(0)
    for task in waiting[:10]:
        task.cancel()
    await asyncio.wait(waiting[:10])
    node.line.slow.set()
    assert len(accepted(await asyncio.gather(*waiting[10:]))) == 10
    await node.quotas.close()
    assert await taken(store) == (10, 10)


@pytest.mark.parametrize("cut", [None, "back"])
async def test_who_goes_away_does_not_keep_the_others_from_their_answer(node, cut):
    node.line.slow = asyncio.Event()
    calls = [node.try_one, node.try_one, lambda: node.quotas.status(ACME), lambda: node.quotas.status(ACME)]
    gone, stays, gone_too, stays_too = (asyncio.create_task(call()) for call in calls)
    while not node.line.under_way:
        await asyncio.sleep(0)
    gone.cancel()
    gone_too.cancel()
    node.line.cut = cut
    node.line.slow.set()
    outcomes = await asyncio.gather(stays, stays_too, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [QuotaStatus if cut is None else Unavailable] * 2


# --- a change of tier -----------------------------------------------------------------------------------------------------


async def test_r39_a_higher_tier_counts_at_once(node, store):
    await store.set_tier(Tier("gold", 500, 5_000), now=START, by="test")
    assert await node.let_in(150) == 100
    await store.set_partner_tier(ACME, "gold", now=START, by="test")
    node.quotas.forget(ACME)
    assert await node.let_in(1_000) == 400


async def test_r39_a_lower_tier_counts_at_once(node, store):
    await node.let_in(20)
    assert held(node) > 0
    await store.set_tier(Tier("starter", 10, 1_000), now=START, by="test")
    node.quotas.forget_all()
    assert held(node) == 0
    assert await node.let_in(10) == 0
    assert await taken(store) == (20, 20)
    refused = await node.try_one()
    assert dict(refused.headers)[b"ratelimit-policy"] == b'"hour";q=10;w=3600, "day";q=1000;w=86400'


async def test_r39_what_was_asked_for_before_a_change_is_not_used_after_it(node, store):
    """The store has granted it, but its answer comes after the change."""
    node.line.slow = asyncio.Event()
    waiting = asyncio.create_task(node.try_one())
    while not node.line.under_way:
        await asyncio.sleep(0)
    lease = await store.lease_quota(QuotaAsk(ACME, 0, START))
    while not lease.hour_taken:
        lease = await store.lease_quota(QuotaAsk(ACME, 0, START))
    await store.lease_quota(QuotaAsk(ACME, 50, START))
    await store.set_tier(Tier("starter", 10, 1_000), now=START, by="test")
    node.quotas.forget(ACME)
    node.line.slow.set()
    assert isinstance(await waiting, QuotaExceeded)
    assert await taken(store) == (50, 50)


@pytest.mark.parametrize(
    ("kind", "subject", "heeded"),
    [
        ("partner", ACME, True),
        ("tier", "starter", True),
        (RESTORED, "", True),
        ("partner", "miller", False),
        ("credential", ACME, False),
    ],
)
async def test_changes_that_concern_quotas_are_heeded(node, kind, subject, heeded):
    await node.let_in(20)
    node.quotas.hear(kind, subject)
    assert (held(node) == 0) == heeded


# --- status ---------------------------------------------------------------------------------------------------------------


async def test_a_status_is_exact_for_the_node_that_is_asked(start, store):
    node, other = start(), start()
    assert (await node.quotas.status(ACME)).hour == (100, 0, 100, HOUR_AT + HOUR)
    await other.let_in(5)
    await other.be_idle()
    await node.let_in(20)
    assert held(node) > 0
    status = await node.quotas.status(ACME)
    assert status == (Tier("starter", 100, 1_000), (100, 25, 75, HOUR_AT + HOUR), (1_000, 25, 975, DAY_AT + DAY), START)
    left = held(node)
    assert await node.let_in(left) == left
    assert (await node.quotas.status(ACME)).hour.used == 25 + left


async def test_a_status_tells_of_a_change_that_the_node_has_not_heard_of(node, store):
    await node.let_in(20)
    await store.set_tier(Tier("starter", 10, 1_000), now=START, by="test")
    status = await node.quotas.status(ACME)
    assert (status.tier, status.hour) == (Tier("starter", 10, 1_000), (10, 20, 0, HOUR_AT + HOUR))
    await node.quotas.go_round()
    assert await taken(store) == (20, 20)
    assert await node.let_in(1) == 0


async def test_a_status_of_later_windows_does_not_count_what_is_held_of_earlier_ones(node, store):
    """Another node's clock is ahead, and has begun the next hour."""
    await node.let_in(20)
    lost = held(node)
    await store.lease_quota(QuotaAsk(ACME, 7, HOUR_AT + HOUR))
    status = await node.quotas.status(ACME)
    assert status.hour == (100, 7, 93, HOUR_AT + 2 * HOUR)
    await node.quotas.go_round()
    assert await taken(store) == (7, 27)
    assert lost > 0


async def test_a_status_after_a_refusal_makes_nobody_wait_for_nothing(start):
    """What comes back is seen by the look, and so by the next request."""
    node, other = start(), start()
    await other.let_in(20)
    await node.let_in(100)
    assert isinstance(await node.try_one(), QuotaExceeded)
    left = held(other)
    await other.be_idle()
    assert (await node.quotas.status(ACME)).hour.remaining == left > 0
    assert await node.let_in(50) == left


# --- usage ----------------------------------------------------------------------------------------------------------------


def along(node):
    """The counts that went along with asks."""
    return [mark for ask in node.line.asks for mark in ask.usage]


async def test_usage_that_does_not_go_along_is_told_about_once_a_second(node, store):
    await node.quotas.go_round()
    await node.let_in(120)
    await node.quotas.go_round()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, sum(mark.accepted for mark in along(node)), 0)]
    assert "note_usage" not in node.line.asked
    node.monotonic.forward(1)
    await node.quotas.go_round()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 100, 20)]
    node.monotonic.forward(1)
    await node.quotas.go_round()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 100, 20)]


async def test_what_goes_along_is_all_that_was_counted_and_is_not_told_again(node, store):
    await node.let_in(20)
    await node.be_idle()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 20, 0)]
    node.monotonic.forward(2)
    await node.quotas.go_round()
    await node.quotas.close()
    assert sum(mark.accepted for mark in along(node)) == 20
    assert "note_usage" not in node.line.asked
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 20, 0)]


async def test_a_partner_for_whom_is_asked_again_and_again_costs_no_transaction_of_usage(node, store):
    await store.set_tier(Tier("starter", 10_000, 100_000), now=START, by="test")
    for _ in range(20):
        await node.let_in(held(node) + 1)
        node.monotonic.forward(IDLE / 2)
        await node.quotas.go_round()
    assert "note_usage" not in node.line.asked
    await node.quotas.close()
    assert "note_usage" not in node.line.asked
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, sum(mark.accepted for mark in along(node)), 0)]


async def test_what_is_served_from_a_slice_that_lasts_is_told_all_the_same(node, store):
    await store.set_tier(Tier("starter", 10_000, 100_000), now=START, by="test")
    used = 0
    while held(node) < 20:
        used += await node.let_in(held(node) + 1)
    asked = len(node.line.asks)
    for _ in range(20):
        assert node.quotas.take(ACME, START) is not None
        used += 1
        node.monotonic.forward(IDLE / 2)
        await node.quotas.go_round()
    assert len(node.line.asks) == asked
    (told,) = await store.list_usage(ACME, since=0)
    assert used - 1 / IDLE * 2 <= told.accepted <= used


async def test_a_look_takes_no_counts_along(node):
    await node.let_in(20)
    await node.quotas.status(ACME)
    assert node.line.asks[-1].usage == ()


async def test_who_is_refused_again_and_again_costs_no_more_writes(node, store):
    await node.let_in(120)
    asked = len(node.line.asks)
    for _ in range(5):
        node.monotonic.forward(EXHAUSTED_KEPT)
        await node.let_in(2)
    assert [ask.usage for ask in node.line.asks[asked:]] == [()] * 5
    await node.quotas.close()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 100, 30)]


@pytest.mark.parametrize("cut", ["there", "back", "mistaken"])
async def test_r72_what_went_along_is_told_again_only_if_it_is_known_not_to_be_written(node, store, cut):
    await node.let_in(20)
    await node.quotas.go_round()
    assert held(node) > 0
    node.line.cut = cut
    await node.be_idle()
    assert node.line.asks[-1].unused
    assert node.line.asks[-1].usage
    node.line.cut = None
    await node.quotas.close()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 20, 0)]


async def test_what_is_counted_while_an_ask_is_under_way_is_kept_beside_what_went_along(node, store):
    await store.set_tier(Tier("starter", 10_000, 100_000), now=START, by="test")
    await node.let_in(99)
    refused = asyncio.create_task(node.let_in(held(node) + 1))
    node.line.cut = "there"
    used = 99 + await refused
    node.line.cut = None
    used += await node.let_in(5)
    await node.quotas.close()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, used, 0)]


async def test_usage_is_entered_under_the_hour_that_it_fell_into(node, store):
    await node.let_in(120)
    node.clock.now = HOUR_AT + HOUR
    await node.let_in(30)
    await node.quotas.close()
    assert await store.list_usage(ACME, since=0) == [
        UsageMark(ACME, HOUR_AT, 100, 20),
        UsageMark(ACME, HOUR_AT + HOUR, 30, 0),
    ]


async def test_r72_usage_that_could_not_be_told_is_told_later_and_once(node, store):
    await node.let_in(10)
    key = (await store.list_keys(ACME))[0]
    node.quotas.note_use("key", key.id, "192.0.2.1", START)
    node.line.cut = "there"
    with pytest.raises(Unavailable):
        await node.quotas.go_round()
    node.line.cut = None
    await node.let_in(5)
    node.quotas.note_use("key", key.id, "192.0.2.1", START + 1)
    await node.quotas.close()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, HOUR_AT, 15, 0)]
    assert (await store.get_key(key.id)).last_used_at == START + 1


async def test_a_use_that_is_noted_while_an_older_one_cannot_be_told_is_the_one_that_is_kept(node, store):
    key = (await store.list_keys(ACME))[0]
    node.quotas.note_use("key", key.id, "192.0.2.1", START)
    node.line.slow, node.line.cut = asyncio.Event(), "back"
    telling = asyncio.create_task(node.quotas.go_round())
    while not node.line.under_way:
        await asyncio.sleep(0)
    node.quotas.note_use("key", key.id, "192.0.2.1", START + 1)
    node.line.slow.set()
    with pytest.raises(Unavailable):
        await telling
    node.line.cut = None
    await node.quotas.close()
    assert (await store.get_key(key.id)).last_used_at == START + 1


async def test_r72_it_goes_on_without_the_store_and_after_mistakes(node, store):
    node.line.cut = "there"
    running = asyncio.create_task(node.quotas.run())
    node.quotas.note_use("token", "unknown", "192.0.2.1", START)
    while "note_usage" not in node.line.asked:
        node.monotonic.forward(1)
        await asyncio.sleep(0)
    node.line.cut = "mistaken"
    while not node.mistakes:
        node.monotonic.forward(1)
        await asyncio.sleep(0)
    node.line.cut = None
    assert not running.done()
    await node.quotas.close()
    await running
