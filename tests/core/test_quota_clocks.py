"""Quotas by the store's clock: the clocks of nodes are wrong, step and stand still, and no window gets one request too many."""

import asyncio

import pytest
from backends import SqliteBackend
from counting import ACME, MOMENT, a_node, accepted, held
from given import AROUND, START, Clock, a_key, a_partner

from gatelodge.errors import QuotaExceeded
from gatelodge_server.core.model import HOUR, SECOND, Tier
from gatelodge_server.core.ports import UsageMark
from gatelodge_server.core.quotas import STEADY
from gatelodge_server.http.turnstile import Turnstile
from gatelodge_server.store.store import SqlStore

ENDS_AT = START - START % HOUR + HOUR
"""When the present hour ends, by the store's clock."""
WRONG = (-30_000, 0, 30_000)


@pytest.fixture
def time():
    """The store's clock."""
    return Clock()


@pytest.fixture
async def store(tmp_path, time):
    """Of a partner of the tier ``starter``: 100 requests an hour. It has a clock, as PostgreSQL has."""
    store = SqlStore(SqliteBackend.create(tmp_path).driver(), store_now=lambda _: time())
    await store.add_partner(a_partner(), a_key(), by="test")
    yield store
    await store.close()


@pytest.fixture(params=WRONG)
def skew(request):
    """What a node's clock is ahead of the store's."""
    return request.param


@pytest.fixture
def node(store, skew):
    return a_node(store, Clock(START + skew))


@pytest.fixture
def passes(time, node):
    """Lets time pass, for all clocks."""

    def passes(milliseconds):
        time.forward(milliseconds)
        node.clock.forward(milliseconds)
        node.monotonic.forward(milliseconds / SECOND)

    return passes


async def hold_some(node):
    """Let the node lease more than it uses."""
    while not held(node):
        await node.let_in(10)
    return held(node)


def takes(node):
    """Whether the node lets one more in by what it holds."""
    return node.quotas.take(ACME, node.clock()) is not None


# --- how long a lease lasts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", AROUND)
async def test_p5_a_lease_ends_with_its_window_by_the_monotonic_clock_whatever_the_wall_clock_does(store, node, time, offset):
    """The store's time is told in whole milliseconds, and the monotonic clock is trusted to a thousandth."""
    time.now = ENDS_AT - 20_001
    node.clock.forward(ENDS_AT - 20_001 - START)
    await hold_some(node)
    node.clock.forward(-30_000)
    node.monotonic.now += 20 * STEADY + offset * MOMENT / 2
    assert takes(node) == (offset <= 0)


@pytest.mark.parametrize("offset", AROUND)
async def test_p5_so_it_does_for_who_has_waited_and_for_what_goes_back(store, node, time, offset):
    time.now = ENDS_AT - 20_001
    node.clock.forward(ENDS_AT - 20_001 - START)
    await hold_some(node)
    node.clock.forward(-30_000)
    node.monotonic.now += 20 * STEADY + offset * MOMENT / 2
    asked = len(node.line.asks)
    await node.quotas.count(ACME, node.clock())
    assert len(node.line.asks) == asked + (offset > 0)
    await node.quotas.go_round()
    assert len(node.line.asks) == asked + (offset > 0)
    await hold_some(node)
    node.monotonic.now += 21
    await node.quotas.go_round()
    assert not held(node)


async def test_p5_an_answer_that_comes_after_the_end_of_its_window_is_not_used(store, node, time):
    """The wall clock is put back meanwhile."""
    await store.set_tier(Tier("starter", 1, 1_000), now=START, by="test")
    time.now = ENDS_AT - 20_000
    node.line.slow, answered = asyncio.Event(), node.line.answered
    waiting = asyncio.create_task(node.try_one())
    while node.line.answered == answered:
        await asyncio.sleep(0)
    time.now = ENDS_AT
    node.clock.forward(-30_000)
    node.monotonic.now += 20
    node.line.slow.set()
    assert [(await waiting).hour.resets_at, await node.let_in(1)] == [ENDS_AT + HOUR, 0]


@pytest.mark.parametrize("offset", AROUND)
async def test_p5_the_time_that_an_answer_takes_is_not_added_to_the_lease(store, node, time, offset):
    time.now = ENDS_AT - 20_001
    node.clock.forward(ENDS_AT - 20_001 - START)
    await hold_some(node)
    node.line.slow, answered = asyncio.Event(), node.line.answered
    waiting = asyncio.create_task(node.let_in(held(node) + 1))
    while node.line.answered == answered:
        await asyncio.sleep(0)
    node.monotonic.now += 5
    node.line.slow.set()
    await waiting
    assert held(node) or await hold_some(node)
    asked = len(node.line.asks)
    node.clock.forward(-30_000)
    node.monotonic.now += 20 * STEADY - 5 + offset * MOMENT
    assert takes(node) == (offset <= 0)
    assert len(node.line.asks) == asked


@pytest.mark.parametrize("offset", AROUND)
async def test_p5_a_lease_ends_with_its_window_by_the_wall_clock_where_the_monotonic_one_stood_still(store, node, time, offset):
    """A machine was suspended."""
    await hold_some(node)
    node.clock.forward(ENDS_AT - START + offset)
    assert takes(node) == (offset < 0)


async def test_p5_a_process_that_was_frozen_does_not_use_what_it_holds_in_the_next_window(store, node, time, passes):
    used = await node.let_in(20)
    assert held(node) > 0
    passes(ENDS_AT - time.now + 1)
    assert not takes(node)
    assert await node.let_in(200) == 100
    assert used == 20


@pytest.mark.parametrize("step", [-2 * HOUR, -30_000, 30_000, 2 * HOUR])
async def test_p5_a_wall_clock_that_steps_costs_one_ask_at_most(store, node, time, step, passes):
    await store.set_tier(Tier("starter", 10_000, 10_000), now=START, by="test")
    passes(ENDS_AT - time.now - 20_000)
    await hold_some(node)
    node.clock.forward(step)
    let_in = 0
    asked = len(node.line.asks)
    for _ in range(19):
        passes(1_000)
        if takes(node):
            let_in += 1
        else:
            await hold_some(node)
    assert len(node.line.asks) - asked <= 6  # one after the step, and those that make its slice larger than one


async def test_a_node_whose_clock_is_ahead_does_not_ask_again_and_again_before_the_end_of_a_window(store, node, time, passes):
    await store.set_tier(Tier("starter", 10_000, 10_000), now=START, by="test")
    passes(ENDS_AT - time.now - 25_000)
    while held(node) < 30:
        await node.let_in(10)
    asked = len(node.line.asks)
    for _ in range(24):
        assert takes(node)
        passes(1_000)
    assert len(node.line.asks) == asked


# --- at the edge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", AROUND)
async def test_p5_a_window_ends_at_the_full_hour_of_the_store(store, node, time, passes, offset):
    passes(ENDS_AT - time.now - 10)
    assert await node.let_in(101) == 100
    passes(10 + offset)
    assert await node.let_in(101) == (0 if offset < 0 else 100)


@pytest.mark.parametrize("offset", AROUND)
async def test_p5_who_is_refused_at_the_end_of_a_window_is_let_in_at_the_beginning_of_the_next(
    store, node, time, passes, offset
):
    assert await node.let_in(100) == 100
    passes(ENDS_AT - time.now - 50)
    assert isinstance(await node.try_one(), QuotaExceeded)
    passes(50 + offset)
    assert len(accepted([await node.try_one()])) == (0 if offset < 0 else 1)


async def test_who_comes_in_the_new_window_is_not_refused_by_an_answer_of_the_old_one(store, node, time, passes):
    assert await node.let_in(100) == 100
    passes(ENDS_AT - time.now - 1)
    node.line.slow, answered = asyncio.Event(), node.line.answered
    early = asyncio.create_task(node.try_one())
    while node.line.answered == answered:
        await asyncio.sleep(0)
    passes(2)
    late = asyncio.create_task(node.try_one())
    await asyncio.sleep(0)
    node.line.slow.set()
    outcomes = await asyncio.gather(early, late)
    assert [outcome.hour.used for outcome in outcomes] == [1, 2]


async def test_p5_what_comes_back_after_the_end_of_a_window_is_not_credited_to_the_next(store, node, time, passes):
    left = await hold_some(node)
    used = 100 - (await node.quotas.status(ACME)).hour.remaining
    passes(ENDS_AT - time.now)
    await node.be_idle()
    status = await node.quotas.status(ACME)
    assert (status.hour.used, status.day.used) == (0, used)
    assert left > 0
    assert await node.let_in(200) == 100


# --- what is told ---------------------------------------------------------------------------------------------------------


async def test_headers_and_refusals_tell_the_seconds_that_are_left_by_the_store_s_clock(store, node, time, passes):
    await store.set_tier(Tier("starter", 5, 1_000), now=START, by="test")
    passes(ENDS_AT - time.now - 40_000)
    assert await node.let_in(5) == 5
    refused = await node.try_one()
    assert (refused.policies, refused.retry_after) == (("hour",), 40)
    await store.set_tier(Tier("starter", 1_000, 1_000), now=START, by="test")
    node.quotas.forget(ACME)
    await hold_some(node)
    headers = dict(node.quotas.take(ACME, node.clock()))
    assert b";t=40," in headers[b"ratelimit"]
    assert headers[b"x-ratelimit-reset"] == b"%d" % (ENDS_AT // SECOND)


async def test_who_waited_for_a_slice_is_told_the_time_of_the_answer(store, node, time, passes):
    turnstile = Turnstile(quotas=node.quotas, clock=node.clock)
    passes(ENDS_AT - time.now - 40_000)
    assert (await node.quotas.status(ACME)).now == time.now
    node.line.slow, answered = asyncio.Event(), node.line.answered
    waiting = asyncio.ensure_future(turnstile._wait(ACME, node.clock()))
    while node.line.answered == answered:
        await asyncio.sleep(0)
    passes(5_000)
    node.line.slow.set()
    assert b";t=35," in dict(await waiting)[b"ratelimit"]


async def test_usage_is_entered_under_the_hour_of_the_store(store, node, time, passes):
    passes(ENDS_AT - time.now - 1_000)
    await node.let_in(3)
    passes(2_000)
    await node.let_in(2)
    await node.quotas.close()
    assert await store.list_usage(ACME, since=0) == [UsageMark(ACME, ENDS_AT - HOUR, 3, 0), UsageMark(ACME, ENDS_AT, 2, 0)]
