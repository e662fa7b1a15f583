"""Following changes over real files: two nodes on one database, a bell between them, and everything that goes wrong with it."""

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from given import AROUND, START, Clock, a_key, a_partner

from gatelodge.errors import Unavailable
from gatelodge_server.core.following import _PAGE, MAX_STALENESS, RESTORED, ChangeFollower
from gatelodge_server.store.bell import Bell
from gatelodge_server.store.sqlite import SqliteDriver
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.trail import append_change


class Line:
    """The line of a follower to its store: it can be cut, and an answer can be held up on its way back."""

    def __init__(self, store):
        self._store = store
        self.is_cut = False
        self.asked = []
        self.holding = None
        self.arrived = asyncio.Event()

    def bell(self):
        return self._store.bell()

    def last_change(self):
        return self._over("last_change")

    def list_changes(self, **asked):
        return self._over("list_changes", **asked)

    def hold(self):
        """Hold up the next answer, as it is once it is read, until what is given is set."""
        self.arrived.clear()
        self.holding = asyncio.get_running_loop().create_future()
        return self.holding

    async def _over(self, verb, **asked):
        self.asked.append(verb)
        if self.is_cut:
            raise Unavailable
        answer = await getattr(self._store, verb)(**asked)
        holding, self.holding = self.holding, None
        if holding is not None:
            self.arrived.set()
            await holding
        return answer


class SilentBell(Bell):
    """The bell of a process that dies between its commit and the stroke."""

    def ring(self, sequence):
        pass


def following(store, monotonic, *, on_mistake=pytest.fail, **options):
    """A follower that meets no mistake."""
    return ChangeFollower(store=store, monotonic=monotonic, on_mistake=on_mistake, **options)


@pytest.fixture
async def node(backend):
    store = backend.open()
    yield store
    await store.close()


@pytest.fixture
async def other_driver(backend):
    """Another node's, for writing."""
    driver = backend.driver()
    yield driver
    await driver.close()


@pytest.fixture
async def dying_driver(backend):
    """One whose process dies before it can ring."""
    driver = SqliteDriver(backend.path, on_fault=backend.faults.append, bell_at=SilentBell)
    yield driver
    await driver.close()


@pytest.fixture
def line(node):
    return Line(node)


@pytest.fixture
def monotonic():
    return Clock(1_000.0)


@pytest.fixture
def told():
    return []


@pytest.fixture
async def follower(line, monotonic, told):
    follower = following(line, monotonic)
    follower.tell(lambda kind, subject: told.append((kind, subject)))
    await follower.catch_up()
    line.asked.clear()
    return follower


async def change(driver, *subjects):
    """Change something about each subject, in one transaction."""
    await driver.write(lambda connection: [append_change(connection, "partner", subject, START) for subject in subjects])


def steps(*subjects):
    return [("partner", subject) for subject in subjects]


# --- What is told ---


async def test_nothing_is_believed_before_the_first_reading(line, monotonic):
    follower = following(line, monotonic)
    assert not follower.is_current()
    await follower.catch_up()
    assert follower.is_current()


async def test_what_was_before_the_first_reading_is_not_told(other_driver, line, monotonic, told):
    await change(other_driver, "before")
    follower = following(line, monotonic)
    follower.tell(lambda *step: told.append(step))
    await follower.catch_up()
    await change(other_driver, "after")
    await follower.catch_up()
    assert told == steps("after")


async def test_r25_a_change_of_another_node_is_known_of_when_its_writer_returns_and_told_once(follower, other_driver, told):
    for number in range(5):
        assert follower.is_current()
        await change(other_driver, f"p{number}")
        assert not follower.is_current()
        assert told == steps(*(f"p{earlier}" for earlier in range(number)))
        await follower.catch_up()
        assert told == steps(*(f"p{earlier}" for earlier in range(number + 1)))


async def test_everybody_who_wants_to_hear_hears(follower, other_driver, told):
    second = []
    follower.tell(lambda *step: second.append(step))
    await change(other_driver, "a", "b")
    await follower.catch_up()
    assert told == second == steps("a", "b")


async def test_while_nothing_changes_nothing_is_read(follower, line):
    for _ in range(10):
        assert follower.is_current()
        await follower.catch_up()
    assert line.asked == []


@pytest.mark.parametrize("count", [_PAGE - 1, _PAGE, _PAGE + 1, 2 * _PAGE, 2 * _PAGE + 1])
async def test_more_changes_than_a_page_are_all_told_in_order(follower, other_driver, told, line, count):
    names = [f"p{number}" for number in range(count)]
    await change(other_driver, *names)
    await follower.catch_up()
    assert told == steps(*names)
    assert follower.is_current()
    assert len(line.asked) == count // _PAGE + 1


async def test_after_a_restore_everything_is_forgotten_and_followed_from_there(
    backend, follower, other_driver, monotonic, told, tmp_path
):
    """The store goes back underneath a process that lives on: what it remembers is of another past."""
    await change(other_driver, "a")
    copy(backend.path, tmp_path / "backup")
    await change(other_driver, "b", "c")
    await follower.catch_up()
    told.clear()
    copy(tmp_path / "backup", backend.path)
    monotonic.forward(MAX_STALENESS)
    await follower.catch_up()
    assert told == [(RESTORED, "")]
    assert follower.is_current()
    await change(other_driver, "d")
    assert not follower.is_current()  # although it is the very step that was heard of last but one
    await follower.catch_up()
    assert told == [(RESTORED, ""), *steps("d")]


async def test_what_follows_a_restore_at_once_is_read_too(backend, follower, other_driver, told, tmp_path):
    copy(backend.path, tmp_path / "backup")
    await change(other_driver, "a", "b")
    await follower.catch_up()
    told.clear()
    copy(tmp_path / "backup", backend.path)
    await change(other_driver, "c")  # the first step, again; the second one is known
    assert not follower.is_current()
    await follower.catch_up()
    assert told == [(RESTORED, "")]
    assert follower.is_current()


def copy(source, target):
    """Put a database, or a backup of it, in the place of what is in another file, underneath those who have it open."""
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as written:
        read.backup(written)


# --- How old what is known may be ---


@pytest.mark.parametrize("by", AROUND)
async def test_r72_what_was_read_is_trusted_for_less_than_the_staleness(follower, monotonic, by):
    monotonic.forward(MAX_STALENESS + by / 1000)
    assert follower.is_current() is (by < 0)


@pytest.mark.parametrize("by", AROUND)
async def test_the_age_of_a_reading_counts_from_its_beginning(follower, line, monotonic, by):
    monotonic.forward(MAX_STALENESS)
    holding = line.hold()
    reading = asyncio.create_task(follower.catch_up())
    await line.arrived.wait()
    monotonic.forward(MAX_STALENESS + by / 1000)
    holding.set_result(None)
    await reading
    assert follower.is_current() is (by < 0)


async def test_the_staleness_is_what_the_owner_says(line, monotonic):
    follower = following(line, monotonic, max_staleness=1.0)
    await follower.catch_up()
    monotonic.forward(0.999)
    assert follower.is_current()
    monotonic.forward(0.001)
    assert not follower.is_current()


async def test_a_change_whose_writer_died_before_the_stroke_is_found_by_the_next_reading(
    follower, dying_driver, monotonic, told
):
    await change(dying_driver, "orphan")
    assert follower.is_current()  # nobody can know
    monotonic.forward(MAX_STALENESS)
    assert not follower.is_current()
    await follower.catch_up()
    assert told == steps("orphan")


async def test_it_is_found_with_the_next_change_too(follower, dying_driver, other_driver, told):
    await change(dying_driver, "orphan")
    await change(other_driver, "next")
    await follower.catch_up()
    assert told == steps("orphan", "next")


async def test_r72_a_process_that_was_frozen_for_too_long_reads_first_or_believes_nothing(
    follower, dying_driver, monotonic, line, told
):
    await change(dying_driver, "orphan")
    monotonic.forward(3600)  # in which neither a task nor a request of this process went on
    assert not follower.is_current()
    line.is_cut = True
    with pytest.raises(Unavailable):
        await follower.catch_up()
    assert not follower.is_current()
    line.is_cut = False
    await follower.catch_up()
    assert told == steps("orphan")


# --- A store that is down ---


async def test_r72_a_store_that_is_down_is_not_missed_until_the_staleness_is_over(follower, line, monotonic):
    line.is_cut = True
    monotonic.forward(MAX_STALENESS - 0.001)
    assert follower.is_current()
    await follower.catch_up()
    monotonic.forward(0.001)
    for _ in range(3):
        assert not follower.is_current()
        with pytest.raises(Unavailable):
            await follower.catch_up()


async def test_r72_a_change_that_was_rung_but_cannot_be_read_stops_belief_at_once(follower, line, other_driver, told):
    line.is_cut = True
    await change(other_driver, "acme-motors")
    with pytest.raises(Unavailable):
        await follower.catch_up()
    assert not follower.is_current()
    line.is_cut = False
    await follower.catch_up()
    assert (told, follower.is_current()) == (steps("acme-motors"), True)


async def test_a_reading_that_failed_half_way_goes_on_where_it_was(follower, line, other_driver, told):
    names = [f"p{number}" for number in range(_PAGE + 10)]
    await change(other_driver, *names)
    holding = line.hold()
    reading = asyncio.create_task(follower.catch_up())
    await line.arrived.wait()
    line.is_cut = True
    holding.set_result(None)
    with pytest.raises(Unavailable):
        await reading
    assert told == steps(*names[:_PAGE])
    assert not follower.is_current()
    line.is_cut = False
    await follower.catch_up()
    assert told == steps(*names)


async def test_a_change_that_somebody_could_not_be_told_is_not_known(follower, other_driver, told):
    deaf = [True]

    def hear(*_):
        if deaf:
            raise ZeroDivisionError

    follower.tell(hear)
    await change(other_driver, "acme-motors")
    with pytest.raises(ZeroDivisionError):
        await follower.catch_up()
    assert not follower.is_current()
    deaf.clear()
    await follower.catch_up()
    assert follower.is_current()
    assert told == steps("acme-motors", "acme-motors")  # rather twice than not at all


# --- Many who ask ---


async def test_fifty_who_ask_at_once_share_one_reading(follower, line, other_driver, told):
    await change(other_driver, "acme-motors")
    await asyncio.gather(*(follower.catch_up() for _ in range(50)))
    assert (line.asked, told) == (["list_changes"], steps("acme-motors"))


async def test_whoever_asks_during_a_reading_waits_for_a_newer_one(follower, line, other_driver, told):
    """What was committed after the reading has read is not in it, and its writer may have returned already."""
    await change(other_driver, "early")
    holding = line.hold()
    first = asyncio.create_task(follower.catch_up())
    await line.arrived.wait()
    await change(other_driver, "late")
    second = asyncio.create_task(follower.catch_up())
    await asyncio.sleep(0)
    assert line.asked == ["list_changes"]
    holding.set_result(None)
    await second
    assert told == steps("early", "late")
    assert follower.is_current()
    await first


async def test_whoever_asks_when_a_reading_is_over_but_nobody_has_noticed_begins_another(follower, line, other_driver, told):
    """Between a task's last step and its callbacks the loop runs whatever was ready before."""
    await change(other_driver, "early")
    holding = line.hold()
    first = asyncio.create_task(follower.catch_up())
    await line.arrived.wait()
    await change(other_driver, "late")
    holding.set_result(None)  # now the reading's last step is next in the loop …
    second = asyncio.create_task(follower.catch_up())  # … and this comes right behind it
    await second
    assert told == steps("early", "late")
    assert follower.is_current()
    await first


async def test_who_goes_away_does_not_end_the_reading_of_the_others(follower, line, other_driver, told):
    await change(other_driver, "acme-motors")
    holding = line.hold()
    asking = [asyncio.create_task(follower.catch_up()) for _ in range(5)]
    await line.arrived.wait()
    for gone in (asking[0], asking[2]):
        gone.cancel()
    await asyncio.sleep(0)
    holding.set_result(None)
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [
        asyncio.CancelledError, type(None), asyncio.CancelledError, type(None), type(None)
    ]  # fmt: skip
    assert (line.asked, told) == (["list_changes"], steps("acme-motors"))


async def test_a_reading_that_everybody_has_left_is_finished_and_its_fault_is_nobodys(follower, line, other_driver, told):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    for is_cut in (True, False):
        await change(other_driver, "acme-motors")
        holding = line.hold()
        asking = asyncio.create_task(follower.catch_up())
        await line.arrived.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        if is_cut:
            holding.set_exception(Unavailable())
        else:
            holding.set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del holding, asking
        gc.collect()
    assert told == steps("acme-motors", "acme-motors")
    assert complaints == []


# --- All the while ---


async def test_what_nobody_has_rung_for_is_found_all_the_same_and_a_store_that_is_down_is_asked_again(
    line, monotonic, dying_driver, told
):
    follower, heard = following(line, monotonic), asyncio.Event()
    follower.tell(lambda *step: (told.append(step), heard.set()))
    await follower.catch_up()
    await change(dying_driver, "orphan")
    line.is_cut = True
    running = asyncio.create_task(follower.run())
    while line.asked[2:] != ["list_changes"]:
        await asyncio.sleep(0)
    line.is_cut = False
    await heard.wait()  # half a second
    assert told == steps("orphan")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_mistake_of_ours_is_told_and_does_not_end_the_following(line, monotonic, dying_driver):
    mistakes, heard = [], asyncio.Event()

    def hear(*_):
        if not mistakes:
            raise ZeroDivisionError
        heard.set()

    follower = following(line, monotonic, on_mistake=mistakes.append)
    follower.tell(hear)
    await follower.catch_up()
    await change(dying_driver, "orphan")
    running = asyncio.create_task(follower.run())
    await heard.wait()
    running.cancel()
    assert [type(mistake) for mistake in mistakes] == [ZeroDivisionError]


# --- Another process ---

WRITER = """
import asyncio, sys
from backends import backend_at
from given import START, a_key, a_partner

async def write():
    store = backend_at(sys.argv[1]).open()
    for line in sys.stdin:
        await store.add_partner(a_partner(line.strip()), a_key(line.strip()), by="test")
        print("done", flush=True)
    await store.close()

asyncio.run(write())
"""


async def test_r25_a_change_of_another_process_is_known_of_when_its_writer_returns(follower, backend, told):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", WRITER, backend.address]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        for number in range(1, 11):
            print(f"p{number}", file=writer.stdin, flush=True)
            assert await asyncio.to_thread(writer.stdout.readline) == "done\n"
            assert not follower.is_current()
            await follower.catch_up()
            assert told[-1] == ("partner", f"p{number}")
        writer.stdin.close()
    assert len(told) == 10


async def test_a_store_without_any_change_is_followed_from_its_beginning(node, monotonic, told):
    follower = following(node, monotonic)
    follower.tell(lambda *step: told.append(step))
    await follower.catch_up()
    assert await node.last_change() == 0
    await node.add_partner(a_partner(), a_key(), by="test")
    await follower.catch_up()
    assert told == steps("acme-motors")


async def test_two_nodes_hear_each_other(backend):
    stores = [SqlStore(backend.driver()) for _ in range(2)]
    heard = [[], []]
    followers = [following(store, Clock(0.0)) for store in stores]
    for follower, of in zip(followers, heard, strict=True):
        follower.tell(lambda _, subject, of=of: of.append(subject))
        await follower.catch_up()
    for number in range(10):
        await stores[number % 2].add_partner(a_partner(f"p{number}"), a_key(f"p{number}"), by="test")
        for follower in followers:
            assert not follower.is_current()
            await follower.catch_up()
    assert heard == [[f"p{number}" for number in range(10)]] * 2
    for store in stores:
        await store.close()
