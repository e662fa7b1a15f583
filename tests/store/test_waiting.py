"""The line before the store's threads: one deadline for each job, and an end to its length."""

import asyncio
import threading

import pytest

from gatelodge.errors import Unavailable
from gatelodge_server.store.waiting import WaitingLine

PATIENCE = 0.2


@pytest.fixture
def late():
    return []


@pytest.fixture
async def line(late):
    line = WaitingLine(1, name="test", patience=PATIENCE, on_late=lambda: late.append(1), longest=3)
    yield line
    await line.close()


@pytest.fixture
async def held(line):
    """The only thread has a job that ends when this is set."""
    begun, enough = threading.Event(), threading.Event()

    def hold(_):
        begun.set()
        assert enough.wait(60)
        return "held"

    holding = asyncio.create_task(line(hold))
    await asyncio.to_thread(begun.wait)
    yield enough
    enough.set()
    assert await holding == "held"  # however long it took: it had begun


async def test_a_job_hears_how_much_of_its_time_is_left(line):
    assert 0 < await line(lambda left: left) <= PATIENCE


async def test_the_time_in_the_line_is_taken_off(late):
    line = WaitingLine(1, name="test", patience=60, on_late=lambda: late.append(1))
    first_ended, enough = [], threading.Event()
    loop = asyncio.get_running_loop()

    def hold(_):
        assert enough.wait(60)
        first_ended.append(loop.time())

    queued_at = loop.time()
    jobs = [asyncio.create_task(line(hold)), asyncio.create_task(line(lambda left: left))]
    await asyncio.sleep(0)
    enough.set()
    _, left = await asyncio.gather(*jobs)
    assert left <= 60 - (first_ended[0] - queued_at) + 0.05
    assert late == []
    await line.close()


async def test_a_job_whose_time_is_over_before_it_begins_never_begins(line, held, late):
    done = []
    outcomes = await asyncio.gather(*(line(done.append) for _ in range(2)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 2  # while the thread is still held
    assert len(late) == 2
    held.set()
    await line(lambda _: None)
    assert done == []


async def test_one_that_has_gone_is_not_run(line, held, late):
    done = []
    going = asyncio.create_task(line(done.append))
    await asyncio.sleep(0)
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    held.set()
    await line(lambda _: None)
    assert (done, late) == ([], [])


@pytest.mark.parametrize(("queued", "turned_away"), [(2, 0), (3, 0), (4, 1)])
async def test_no_more_than_the_longest_line_wait(line, held, queued, turned_away):
    jobs = [asyncio.create_task(line(lambda _: "done")) for _ in range(queued)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sum(job.done() for job in jobs) == turned_away
    held.set()
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert outcomes.count("done") == queued - turned_away
    assert sum(isinstance(outcome, Unavailable) for outcome in outcomes) == turned_away


async def test_the_line_has_room_again_once_a_thread_has_come_to_those_who_gave_up(line, held):
    given_up = await asyncio.gather(*(line(lambda _: None) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in given_up)
    with pytest.raises(Unavailable):
        await line(lambda _: None)  # their places are still taken
    held.set()
    while line._waiting:
        await asyncio.sleep(0)
    for _ in range(5):
        assert await line(lambda _: "done") == "done"


async def test_a_jobs_own_fault_is_its_callers(line):
    with pytest.raises(ZeroDivisionError):
        await line(lambda _: 1 / 0)
    assert await line(lambda _: "done") == "done"
