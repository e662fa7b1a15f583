"""The clock of a node: the store's, carried on by the monotonic clock."""

import asyncio

import pytest
from given import START, Clock

from gatelodge.errors import Unavailable
from gatelodge_server.core import timekeeping
from gatelodge_server.core.model import HOUR, MINUTE, SECOND
from gatelodge_server.core.timekeeping import NodeClock


class Store:
    """Its clock is so far ahead of the monotonic one; how long a look takes on its way there and back, in seconds."""

    def __init__(self, monotonic, *, ahead=START):
        self.monotonic = monotonic
        self.ahead = ahead
        self.there = self.back = 0.0
        self.answers = True
        self.asked = 0

    async def tell_time(self):
        self.asked += 1
        if not self.answers:
            raise Unavailable
        self.monotonic.now += self.there
        now = None if self.ahead is None else int(self.ahead + self.monotonic.now * SECOND)
        self.monotonic.now += self.back
        return now


@pytest.fixture
def monotonic():
    return Clock(1_000.0)


@pytest.fixture
def store(monotonic):
    return Store(monotonic)


@pytest.fixture
def own():
    return Clock(START - HOUR)


@pytest.fixture
def clock(store, own, monotonic):
    return NodeClock(store=store, own=own, monotonic=monotonic)


def off(clock, store, monotonic):
    """By how many milliseconds it is wrong."""
    return clock() - (store.ahead + monotonic.now * SECOND)


async def test_before_the_first_look_it_is_the_machines_own(clock, own):
    assert clock() == own.now


async def test_on_a_store_without_a_clock_it_stays_the_machines_own_and_there_is_nothing_to_look_at(clock, store, own):
    store.ahead = None
    await clock.run()
    assert store.asked == 1
    own.forward(MINUTE)
    assert clock() == own.now


async def test_from_then_on_it_is_the_stores_whatever_happens_to_the_machines(clock, store, own, monotonic):
    assert await clock.look()
    for step in (-HOUR, 3 * HOUR):
        own.forward(step)
        monotonic.now += 30
        assert abs(off(clock, store, monotonic)) <= 1


@pytest.mark.parametrize(("there", "back"), [(0.2, 0.0), (0.0, 0.2), (0.1, 0.1)])
async def test_it_is_wrong_by_half_of_what_a_look_took_at_most(clock, store, monotonic, there, back):
    store.there, store.back = there, back
    await clock.look()
    assert abs(off(clock, store, monotonic)) <= 101


async def test_a_quick_look_is_believed_and_slow_ones_after_it_change_nothing(clock, store, monotonic):
    await clock.look()
    store.back = 4.0
    for _ in range(5):
        await clock.look()
        assert abs(off(clock, store, monotonic)) <= 25, "as far as clocks drift apart meanwhile"


async def test_slow_looks_that_took_long_on_different_ways_bound_it_from_both_sides(clock, store, monotonic):
    store.there, store.back = 1.0, 0.0
    await clock.look()
    store.there, store.back = 0.0, 1.0
    await clock.look()
    assert abs(off(clock, store, monotonic)) <= 2


async def test_clocks_that_go_at_different_speeds_are_followed(clock, store, monotonic):
    await clock.look()
    for _ in range(1_000):
        monotonic.now += 1
        store.ahead += 0.5  # 500 ppm
        store.there, store.back = 0.001, 0.001
        await clock.look()
    assert abs(off(clock, store, monotonic)) <= 4


@pytest.mark.parametrize("step", [-HOUR, HOUR, 100, -100])
async def test_a_store_whose_clock_is_set_or_that_another_takes_the_place_of_is_followed_at_the_next_look(
    clock, store, monotonic, step
):
    await clock.look()
    store.ahead += step
    await clock.look()
    assert abs(off(clock, store, monotonic)) <= 1


async def test_a_store_that_is_away_is_asked_again_and_the_time_goes_on(clock, store, monotonic, monkeypatch):
    monkeypatch.setattr(timekeeping, "_PAUSE", 0)
    await clock.look()
    store.answers = False
    running = asyncio.create_task(clock.run())
    while store.asked < 4:
        await asyncio.sleep(0)
    monotonic.now += 3_600
    assert abs(off(clock, store, monotonic)) <= 1
    store.ahead += HOUR
    store.answers = True
    seen = store.asked
    while store.asked < seen + 2:
        await asyncio.sleep(0)
    assert abs(off(clock, store, monotonic)) <= 1
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
