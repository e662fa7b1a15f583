"""Micro-batching: who shares a flush, and who must not hear of whom."""

import asyncio

import pytest

from gatelodge.errors import Unavailable
from gatelodge_server.store.batch import BUSY, Batch, UnheardError


class Flushes:
    """A verb that answers each request with itself in capitals, so many flushes at once, and only while its gate is open."""

    def __init__(self, at_once=1):
        self.at_once = at_once
        self.batches = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = asyncio.Event()
        self.running = 0

    async def __call__(self, requests):
        self.running += 1
        assert self.running <= self.at_once
        self.begun.set()
        try:
            await self.gate.wait()
            self.batches.append(list(requests))
            for request in requests:
                if request == "poison":
                    raise ZeroDivisionError
                if request == "down":
                    raise Unavailable
                if request == "unheard":
                    raise UnheardError
            return [request.upper() for request in requests]
        finally:
            self.running -= 1


@pytest.fixture
async def flushes():
    return Flushes()


async def held(flushes, batch):
    """A request whose flush is under way and waits at the gate."""
    flushes.gate.clear()
    first = asyncio.create_task(batch("first"))
    await flushes.begun.wait()
    return first


async def queued(batch, *requests):
    """Tasks that have got as far as the queue."""
    tasks = [asyncio.create_task(batch(request)) for request in requests]
    await asyncio.sleep(0)
    return tasks


async def test_a_lone_request_is_flushed_at_once(flushes):
    assert await Batch(flushes)("a") == "A"
    assert flushes.batches == [["a"]]


async def test_requests_of_one_moment_share_a_flush_in_their_order(flushes):
    batch = Batch(flushes)
    assert await asyncio.gather(*(batch(letter) for letter in "abcde")) == list("ABCDE")
    assert flushes.batches == [list("abcde")]


async def test_who_comes_during_a_flush_waits_for_the_next(flushes):
    batch = Batch(flushes)
    first = await held(flushes, batch)
    others = await queued(batch, *"abc")
    flushes.gate.set()
    assert await asyncio.gather(first, *others) == ["FIRST", "A", "B", "C"]
    assert flushes.batches == [["first"], ["a", "b", "c"]]


async def test_flushes_never_overlap_and_lose_nobody(flushes):
    batch = Batch(flushes, largest=7)

    async def caller(name):
        return [await batch(f"{name}{at}") for at in range(5)]

    answers = await asyncio.gather(*(caller(name) for name in "abcdefghijklmnopqrst"))
    assert answers == [[f"{name}{at}".upper() for at in range(5)] for name in "abcdefghijklmnopqrst"]
    assert sum(map(len, flushes.batches)) == 100
    assert max(map(len, flushes.batches)) == 7


@pytest.mark.parametrize(
    ("many", "shares"),
    [(1, [1]), (31, [31]), (32, [16, 16]), (33, [17, 16]), (47, [24, 23]), (48, [16, 16, 16]), (100, [34, 33, 33])],
)
async def test_many_are_spread_over_several_flushes_and_few_are_not(many, shares):
    flushes = Flushes(at_once=3)
    batch = Batch(flushes, at_once=3)
    flushes.gate.clear()
    tasks = await queued(batch, *(f"a{at}" for at in range(many)))
    await flushes.begun.wait()
    await asyncio.sleep(0)
    assert flushes.running == len(shares)
    flushes.gate.set()
    assert await asyncio.gather(*tasks) == [f"A{at}" for at in range(many)]
    assert [len(flush) for flush in flushes.batches] == shares


@pytest.mark.parametrize("at_once", [1, 2, 3])
async def test_as_many_flushes_overlap_as_may_and_nobody_is_lost(at_once):
    flushes = Flushes(at_once)
    batch = Batch(flushes, at_once=at_once, largest=7)
    flushes.gate.clear()
    tasks = await queued(batch, *(f"a{at}" for at in range(100)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert flushes.running == at_once
    later = await queued(batch, "b", "c")
    flushes.gate.set()
    assert await asyncio.gather(*tasks, *later) == [*(f"A{at}" for at in range(100)), "B", "C"]
    assert max(map(len, flushes.batches)) == 7
    # And whoever comes the moment that the last of them has ended is waited for too.
    for _ in range(3):
        assert await asyncio.gather(*(batch(letter) for letter in "ab")) == ["A", "B"]


async def test_a_flush_that_hangs_holds_up_those_in_it_only():
    flushes = Flushes(at_once=2)
    batch = Batch(flushes, at_once=2)
    first = await held(flushes, batch)
    flushes.gate, gate = asyncio.Event(), flushes.gate
    flushes.gate.set()
    assert await asyncio.gather(batch("a"), batch("b")) == ["A", "B"]
    assert not first.done()
    gate.set()
    assert await first == "FIRST"


async def test_a_batch_after_a_rest_works_like_the_first(flushes):
    batch = Batch(flushes)
    for _ in range(3):
        assert await batch("a") == "A"
    assert flushes.batches == [["a"]] * 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
async def test_no_flush_is_larger_than_allowed(flushes, count):
    batch = Batch(flushes, largest=2)
    await asyncio.gather(*(batch(letter) for letter in "abcdef"[:count]))
    assert [len(flush) for flush in flushes.batches] == [2] * (count // 2) + [1] * (count % 2)


@pytest.mark.parametrize("at", range(4))
async def test_a_poisoned_request_harms_nobody_but_its_caller(flushes, at):
    requests = list("abc")
    requests.insert(at, "poison")
    batch = Batch(flushes)
    answers = await asyncio.gather(*(batch(request) for request in requests), return_exceptions=True)
    assert isinstance(answers.pop(at), ZeroDivisionError)
    assert answers == ["A", "B", "C"]


async def test_each_of_two_poisoned_requests_has_its_own_exception(flushes):
    batch = Batch(flushes)
    answers = await asyncio.gather(*(batch(request) for request in ("poison", "a", "poison")), return_exceptions=True)
    assert answers[1] == "A"
    assert [type(answers[0]), type(answers[2])] == [ZeroDivisionError] * 2
    assert answers[0] is not answers[2]


async def test_a_lone_poisoned_request_is_run_once(flushes):
    with pytest.raises(ZeroDivisionError):
        await Batch(flushes)("poison")
    assert flushes.batches == [["poison"]]


async def test_a_store_that_is_down_is_unavailable_for_everybody_and_asked_once(flushes):
    batch = Batch(flushes)
    answers = await asyncio.gather(*(batch(request) for request in ("a", "down", "b")), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    assert len({id(answer) for answer in answers}) == 3
    assert flushes.batches == [["a", "down", "b"]]


async def test_a_store_that_goes_down_beside_a_poisoned_request_is_unavailable(flushes):
    batch = Batch(flushes)
    answers = await asyncio.gather(*(batch(request) for request in ("poison", "down", "a")), return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [ZeroDivisionError, Unavailable]
    assert answers[2] == "A"


async def test_a_failed_flush_is_followed_by_one_that_works(flushes):
    batch = Batch(flushes, largest=2)
    answers = await asyncio.gather(*(batch(request) for request in ("a", "down", "b", "c")), return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [Unavailable] * 2
    assert answers[2:] == ["B", "C"]
    assert await batch("d") == "D"


async def test_who_stands_behind_a_flush_that_waited_in_vain_is_told_so_and_does_not_wait_as_long_again(flushes):
    batch = Batch(flushes, vain=0)
    flushes.gate.clear()
    (first,) = await queued(batch, "down")
    await flushes.begun.wait()
    behind = await queued(batch, "a", "b")
    flushes.gate.set()
    answers = await asyncio.gather(first, *behind, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    assert flushes.batches == [["down"]]  # nothing of theirs was begun
    assert await batch("c") == "C"


async def test_who_stands_behind_a_flush_that_failed_soon_has_a_turn(flushes):
    batch = Batch(flushes, vain=60)
    flushes.gate.clear()
    (first,) = await queued(batch, "down")
    await flushes.begun.wait()
    behind = await queued(batch, "a", "b")
    flushes.gate.set()
    answers = await asyncio.gather(first, *behind, return_exceptions=True)
    assert isinstance(answers[0], Unavailable)
    assert answers[1:] == ["A", "B"]


@pytest.mark.parametrize("backlog", [1, 2, 3])
async def test_r72_more_than_the_backlog_are_turned_away_at_once(flushes, backlog):
    batch = Batch(flushes, backlog=backlog)
    first = await held(flushes, batch)
    waiting = await queued(batch, *"abc"[:backlog])
    (turned_away,) = await queued(batch, "too many")
    assert turned_away.done()
    assert isinstance(turned_away.exception(), Unavailable)
    assert not any(task.done() for task in waiting)
    flushes.gate.set()
    assert await asyncio.gather(first, *waiting) == ["FIRST", *"ABC"[:backlog]]
    assert await batch("d") == "D"
    assert ["too many"] not in flushes.batches


@pytest.mark.parametrize("others", [["a", "b"], ["a", "poison"], ["a", "down"]])
async def test_a_caller_that_has_gone_takes_nobody_along(flushes, others):
    batch = Batch(flushes)
    first = await held(flushes, batch)
    gone, *waiting = await queued(batch, "gone", *others)
    first.cancel()
    gone.cancel()
    await asyncio.wait([first, gone])
    flushes.gate.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    kinds = {"a": "A", "b": "B", "poison": ZeroDivisionError, "down": Unavailable}
    expected = [kinds[other] for other in others] if "down" not in others else [Unavailable, Unavailable]
    assert [answer if isinstance(answer, str) else type(answer) for answer in answers] == expected
    assert first.cancelled()
    assert gone.cancelled()


@pytest.mark.parametrize("request_", ["a", "poison", "down"])
async def test_a_batch_whose_every_caller_has_gone_goes_on_working(flushes, request_):
    batch = Batch(flushes)
    first = await held(flushes, batch)
    waiting = await queued(batch, request_)
    for task in (first, *waiting):
        task.cancel()
    await asyncio.wait([first, *waiting])
    flushes.gate.set()
    await asyncio.gather(batch("b"), return_exceptions=True)  # it may share the flush of those who have gone
    assert await batch("c") == "C"


# --- What somebody else holds ---


class Held:
    """A verb of which some requests cannot be done as long as somebody else holds what they need."""

    def __init__(self, *held):
        self.held = set(held)
        self.batches = []
        self.asked = asyncio.Event()

    async def __call__(self, requests):
        self.batches.append(list(requests))
        self.asked.set()
        return [BUSY if request in self.held else request.upper() for request in requests]


async def test_who_needs_what_is_held_keeps_nobody_waiting_and_is_served_when_it_is_let_go():
    held = Held("b")
    batch = Batch(held)
    waiting = asyncio.create_task(batch("b"))
    assert await asyncio.gather(*(batch(letter) for letter in "acd")) == ["A", "C", "D"]
    assert not waiting.done()
    held.held.clear()
    assert await waiting == "B"
    assert held.batches[0] == ["b", "a", "c", "d"]


async def test_who_needs_what_is_held_comes_again_with_those_of_a_later_flush():
    held = Held("b")
    batch = Batch(held)
    waiting = asyncio.create_task(batch("b"))
    while len(held.batches) < 3:
        held.asked.clear()
        await held.asked.wait()
    held.held.clear()
    assert await waiting == "B"
    assert set(map(tuple, held.batches)) == {("b",)}


async def test_who_needs_what_is_held_for_too_long_is_told_so_and_nobody_else():
    held = Held("b")
    batch = Batch(held, patience=0)
    answers = await asyncio.gather(*(batch(letter) for letter in "abc"), return_exceptions=True)
    assert isinstance(answers.pop(1), Unavailable)
    assert answers == ["A", "C"]
    assert held.batches == [["a", "b", "c"]]
    held.held.clear()
    assert await batch("b") == "B"


async def test_whose_commit_was_not_answered_hears_that_and_those_behind_only_that_nothing_was_done(flushes):
    batch = Batch(flushes, vain=0)
    flushes.gate.clear()
    first = asyncio.create_task(batch("unheard"))
    await flushes.begun.wait()
    behind = await queued(batch, "a", "b")
    flushes.gate.set()
    outcomes = await asyncio.gather(first, *behind, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [UnheardError, Unavailable, Unavailable]
