"""The feed of revocations: where a reader stands, what it is told, how long it waits, and who has heard."""

import asyncio
import shutil

import pytest
from given import AROUND, START, Clock, a_key, a_login, a_partner

from gatelodge.errors import PartnerSuspended, Unavailable
from gatelodge_server.core.following import ChangeFollower
from gatelodge_server.core.model import DAY, HOUR, Change, PartnerStatus, SessionEnd
from gatelodge_server.core.ports import Done, Reach
from gatelodge_server.core.refusals import StepNotFound, TooManyRequests
from gatelodge_server.core.revocations import PAGE, VERIFIERS_MAX, Position, Revocations, mark_of

KEPT = DAY + HOUR
STEP = Change(7, "session", "5e55", START)


class Node:
    """One node's feed over a database that others write to as well. Time stands still, and a pause moves it on."""

    def __init__(self, backend):
        self.clock, self.monotonic = Clock(), Clock(1_000.0)
        self.store = backend.open()
        self.follower = ChangeFollower(store=self.store, monotonic=self.monotonic, on_mistake=self.fail)
        self.pauses = []
        self.on_pause = lambda: None
        self.revocations = Revocations(
            store=self.store,
            follower=self.follower,
            clock=self.clock,
            monotonic=self.monotonic,
            jwt_ttl=DAY,
            max_staleness=10.0,
            pause=self.pause,
        )
        self.follower.tell(self.revocations.hear)
        self.leave = asyncio.Event()

    def fail(self, mistake):
        raise AssertionError from mistake

    async def pause(self, seconds):
        self.pauses.append(seconds)
        self.monotonic.forward(seconds)
        await (self.on_pause() or asyncio.sleep(0))

    def follow(self, position, *, wait=1e9, **options):
        return asyncio.create_task(self.revocations.follow(position, wait=wait, leave=self.leave, **options))


@pytest.fixture
async def node(backend):
    node = Node(backend)
    yield node
    await node.store.close()


@pytest.fixture
async def other(backend):
    """Another node, which does what the first one is to hear of."""
    store = backend.open()
    yield store
    await store.close()


@pytest.fixture
async def key(other):
    key = a_key()
    assert isinstance(await other.add_partner(a_partner(), key, by="test"), Done)
    return key


async def end_sessions(store, key, count, *, now=START):
    """End so many sessions; their ids."""
    ended = []
    for _ in range(count):
        session = (await store.open_session(a_login(key))).session
        await store.end_session(session.id, cause=SessionEnd.LOGOUT, now=now, by="test")
        ended.append(session.id.hex())
    return ended


def subjects(page):
    return [told.revocation.subject for told in page.revocations]


# --- positions ---


@pytest.mark.parametrize(
    "position",
    [
        Position.behind(None),
        Position.behind(STEP),
        Position(7, mark_of(STEP), ("credential", "k3yk3yk3yk3y")),
        Position(7, mark_of(STEP), ("partner", "acme-motors")),
    ],
)
def test_a_position_is_read_as_it_was_written(position):
    assert Position.parse(str(position)) == position
    assert len(str(position)) < 128


def test_a_number_alone_is_a_position():
    assert Position.parse("0") == Position(0)
    assert Position.parse("41") == Position(41)


@pytest.mark.parametrize(
    "text",
    ["", "-1", "01", "1.5", " 1", "1\n", "1.ABCDEF0123456789", "1.0123", "9" * 19, "\uff11", "1~planet~mars", "1~partner~", "1~partner~a b"],
)  # fmt: skip
def test_what_is_no_position_is_none(text):
    with pytest.raises(ValueError, match="position"):
        Position.parse(text)


def test_a_position_holds_for_the_step_that_it_was_made_of_and_for_no_other_with_its_number():
    assert Position.behind(STEP).holds(STEP)
    for other in (STEP.__class__(7, "session", "5e55", START + 1), STEP.__class__(7, "session", "5e56", START)):
        assert not Position.behind(STEP).holds(other)
        assert Position(7).holds(other)
    assert not Position.behind(STEP).holds(None)
    assert not Position(7).holds(None)
    assert Position(0).holds(None)
    assert Position.behind(None).holds(None)


# --- what is told ---


async def test_whoever_begins_is_told_what_jwts_may_still_be_refused_for_and_goes_on_from_there(node, other, key):
    node.clock.now = START + KEPT
    old = await end_sessions(other, key, 1)
    new = await end_sessions(other, key, 1, now=START + 1)
    page = await node.revocations.read(None)
    assert page.is_reset
    assert not page.has_more
    assert subjects(page) == new
    assert old != new
    again = await node.revocations.read(page.position)
    assert (again.is_reset, again.is_news, subjects(again), again.position) == (False, False, [], page.position)
    more = await end_sessions(other, key, 2)
    assert subjects(await node.revocations.read(page.position)) == more
    assert subjects(await node.revocations.read(Position(page.position.sequence))) == more


@pytest.mark.parametrize("offset", AROUND)
async def test_it_is_told_for_as_long_as_a_jwt_of_it_may_be_good(node, other, key, offset):
    (session,) = await end_sessions(other, key, 1)
    page = await node.revocations.read(None)
    assert [told.until for told in page.revocations] == [START + KEPT]
    node.clock.now = START + KEPT + offset
    assert subjects(await node.revocations.read(None)) == ([session] if offset < 0 else [])


async def test_an_end_that_is_to_come_is_told_until_after_it(node, other, key):
    await other.roll_key(key.id, a_key(), ends_at=START + 9 * DAY, now=START, by="test")
    for now in (START, START + 5 * DAY, START + 9 * DAY + KEPT - 1):
        node.clock.now = now
        (told,) = (await node.revocations.read(None)).revocations
        assert (told.revocation.subject, told.until) == (key.id, START + 9 * DAY + KEPT)
    node.clock.now = START + 9 * DAY + KEPT
    assert (await node.revocations.read(None)).revocations == []


async def test_a_suspended_partner_is_told_for_as_long_as_it_is_suspended(node, other, key):
    await other.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    node.clock.now = START + 100 * DAY
    page = await node.revocations.read(None)
    assert [(told.revocation.reason, told.until) for told in page.revocations] == [(PartnerSuspended, None)]
    await other.set_partner_status("acme-motors", PartnerStatus.ACTIVE, now=node.clock.now, by="test")
    (told,) = (await node.revocations.read(page.position)).revocations
    assert (told.revocation.reason, told.revocation.epoch, told.until) == (None, 1, node.clock.now + KEPT)


async def test_a_long_tail_comes_in_pages(node, other, key):
    sessions = await end_sessions(other, key, PAGE + 2)
    first = await node.revocations.read(None)
    second = await node.revocations.read(first.position)
    assert [first.has_more, second.has_more] == [True, False]
    assert [first.is_reset, second.is_reset] == [True, False]
    assert subjects(first) + subjects(second) == sessions
    assert len(first.revocations) <= PAGE + 1


async def test_a_long_beginning_comes_in_pages_and_the_tail_after_it(node, other):
    keys = []
    for number in range(PAGE + 3):
        key = a_key(f"partner-{number}")
        keys.append(key.id)
        await other.add_partner(a_partner(key.partner_id), key, by="test")
        await other.roll_key(key.id, a_key(key.partner_id), ends_at=START + 9 * DAY, now=START, by="test")
    node.clock.now = START + 5 * DAY
    first = await node.revocations.read(None)
    assert (first.has_more, first.is_reset, len(first.revocations)) == (True, True, PAGE)
    await other.set_partner_status("partner-0", PartnerStatus.DEACTIVATED, now=node.clock.now, by="test")
    second = await node.revocations.read(Position.parse(str(first.position)))
    assert (second.has_more, second.is_reset) == (False, False)
    assert sorted(subjects(first) + subjects(second)) == sorted([*keys, "partner-0"])


@pytest.mark.parametrize("offset", AROUND)
async def test_whoever_is_too_far_behind_begins_anew(node, other, key, offset):
    position = (await node.revocations.read(None)).position
    await end_sessions(other, key, 1)
    node.clock.now = START + KEPT + DAY + offset
    assert (await node.revocations.read(position)).is_reset is (offset >= 0)


async def test_whoever_was_told_of_a_quiet_time_does_not_begin_anew_again_and_again(node, other, key):
    node.clock.now = START + 500 * DAY
    page = await node.revocations.read(None)
    assert not (await node.revocations.read(page.position)).is_reset


# --- a backup is restored ---


async def restored(backend, node):
    """The database as it was at ``backup``, under a node that knows nothing of it."""
    await node.store.close()
    for suffix in ("", "-wal", "-shm"):
        path = backend.path.with_name(backend.path.name + suffix)
        path.unlink(missing_ok=True)
    shutil.copyfile(backend.path.with_name("backup"), backend.path)
    return Node(backend)


async def test_whoever_knows_more_than_the_database_begins_anew(backend, node, other, key):
    await other.close()
    shutil.copyfile(backend.path, backend.path.with_name("backup"))
    (ended,) = await end_sessions(node.store, key, 1)
    page = await node.revocations.read(None)
    assert subjects(page) == [ended]
    after = await restored(backend, node)
    for position in (page.position, Position(page.position.sequence)):
        anew = await after.revocations.read(position)
        assert (anew.is_reset, subjects(anew)) == (True, [])
    await after.store.close()


async def test_whoever_knows_a_step_that_has_become_another_begins_anew(backend, node, other, key):
    """The numbers are given out again after a restore: the same one is not the same step."""
    await other.close()
    shutil.copyfile(backend.path, backend.path.with_name("backup"))
    await end_sessions(node.store, key, 1)
    position = (await node.revocations.read(None)).position
    after = await restored(backend, node)
    sessions = await end_sessions(after.store, key, 3)
    anew = await after.revocations.read(position)
    assert (anew.is_reset, subjects(anew)) == (True, sessions)
    await after.store.close()


# --- waiting ---


async def waiting(node):
    async with asyncio.timeout(10):
        while not node.revocations._waiting:
            await asyncio.sleep(0)
    await asyncio.sleep(0.02)  # it has read, and sleeps


async def test_whoever_waits_is_told_when_another_node_revokes_something(node, other, key):
    position = (await node.revocations.read(None)).position
    looking = asyncio.create_task(node.revocations.run())
    asked = [node.follow(position) for _ in range(20)]
    await waiting(node)
    (session,) = await end_sessions(other, key, 1)
    pages = await asyncio.wait_for(asyncio.gather(*asked), 10)
    assert [subjects(page) for page in pages] == [[session]] * 20
    looking.cancel()


async def test_a_change_that_revokes_nothing_moves_everybody_on(node, other, key):
    """Else nobody could acknowledge the step of a revocation that concerns no session JWT."""
    position = (await node.revocations.read(None)).position
    asked = node.follow(position)
    await waiting(node)
    await other.set_partner_tier("acme-motors", "starter", now=START, by="test")
    await node.follower.catch_up()
    page = await asyncio.wait_for(asked, 10)
    assert (subjects(page), page.is_news, page.position.sequence) == ([], True, position.sequence + 1)


async def test_a_change_between_the_reading_and_the_waiting_is_not_missed(node, other, key):
    position = (await node.revocations.read(None)).position
    for _ in range(30):
        asked = node.follow(position)
        await end_sessions(other, key, 1)
        await node.follower.catch_up()
        page = await asyncio.wait_for(asked, 10)
        assert page.is_news
        position = page.position


async def test_when_the_time_is_over_it_is_said_what_is_so_then(node, other, key):
    """Not what was so when the wait began: whoever hears "nothing new" believes that nothing was revoked meanwhile."""
    position = (await node.revocations.read(None)).position
    asked = node.follow(position, wait=0.05)
    await waiting(node)
    (session,) = await end_sessions(other, key, 1)  # and nobody has rung on this node
    node.monotonic.forward(1)
    assert subjects(await asyncio.wait_for(asked, 10)) == [session]


async def test_whoever_waits_is_let_go_when_the_process_is_about_to_stop(node, key):
    position = (await node.revocations.read(None)).position
    asked = node.follow(position)
    await waiting(node)
    node.leave.set()
    page = await asyncio.wait_for(asked, 10)
    assert (page.is_news, page.position) == (False, position)
    assert (await asyncio.wait_for(node.follow(position), 10)).position == position


async def test_whoever_goes_away_leaves_nothing_behind(node, key):
    position = (await node.revocations.read(None)).position
    asked = [node.follow(position) for _ in range(5)]
    await waiting(node)
    for one in asked:
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert node.revocations._waiting == 0
    assert not node.revocations._somebody_waits.is_set()


async def test_a_store_that_is_down_says_nothing_of_the_kind_that_all_is_well(node, key):
    position = (await node.revocations.read(None)).position
    asked = node.follow(position, wait=0.05)
    await waiting(node)

    async def down(**_):
        raise Unavailable

    node.store.read_revocations = down
    node.monotonic.forward(1)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(asked, 10)


async def test_nobody_looks_at_the_bell_while_nobody_waits_and_a_store_that_is_down_is_not_asked_all_the_time(node, key):
    looking = asyncio.create_task(node.revocations.run())
    await asyncio.sleep(0.02)
    assert node.pauses == []

    async def down():
        raise Unavailable

    asked = node.follow((await node.revocations.read(None)).position)
    await waiting(node)
    node.follower.catch_up = down
    node.pauses.clear()
    node.monotonic.forward(11)
    async with asyncio.timeout(10):
        while 0.5 not in node.pauses:
            await asyncio.sleep(0)
    asked.cancel()
    looking.cancel()


# --- who has heard ---


async def test_who_asks_for_what_comes_next_has_applied_what_came_before(node, key):
    position = (await node.revocations.read(None)).position
    assert await node.revocations.reach(position.sequence) == Reach(position.sequence, 0, 0)
    await node.follow(position, wait=0, verifier="verifier-1")
    assert await node.revocations.reach(position.sequence) == Reach(position.sequence, 1, 1)
    assert await node.revocations.reach(None) == Reach(position.sequence, 1, 1)


async def test_who_begins_or_knows_of_another_history_is_there_and_has_applied_nothing(node, other, key):
    """It believes the answer before it asks again: what is revoked in between has to wait for it."""
    last = await other.last_change()
    restated = Position(last, mark_of((await other.list_changes(after=last - 1, limit=1))[0]), ("partner", "acme"))
    for position in (None, Position(last + 1), Position(last, "0123456789abcdef"), restated):
        await node.revocations.acknowledge("verifier-1", last)
        await node.follow(position, wait=0, verifier="verifier-1")
        assert await node.revocations.reach(last) == Reach(last, 1, 0)


async def test_what_is_revoked_while_somebody_begins_is_told_to_it_or_waits_for_it(node, other, key):
    """Were the beginning read before its reader is counted, a revocation in between would go to nobody."""
    acknowledge, ended = node.revocations.acknowledge, []

    async def and_end_a_session(*said):
        await acknowledge(*said)
        ended.extend(await end_sessions(other, key, 1))

    node.revocations.acknowledge = and_end_a_session
    page = await node.follow(None, wait=0, verifier="verifier-1")
    assert subjects(page) == ended


@pytest.mark.parametrize("has_news", [False, True])
async def test_what_is_revoked_while_one_that_was_away_comes_back_is_told_to_it_or_waits_for_it(node, other, key, has_news):
    """It is counted only from its word on, and believes the answer: that must have been read later."""
    position = (await node.revocations.read(None)).position
    before = await end_sessions(other, key, 1) if has_news else []
    acknowledge, ended = node.revocations.acknowledge, []

    async def and_end_a_session_before(*said):
        ended.extend(await end_sessions(other, key, 1))
        await acknowledge(*said)

    node.revocations.acknowledge = and_end_a_session_before
    page = await node.follow(position, wait=0, verifier="verifier-1")
    assert subjects(page) == [*before, *ended]


async def test_a_step_that_is_not_there_cannot_be_acknowledged(node, key):
    with pytest.raises(StepNotFound):
        await node.revocations.acknowledge("verifier-1", 99)


async def test_there_is_not_room_for_any_number_of_verifiers(node, key):
    await asyncio.gather(*(node.revocations.acknowledge(f"verifier-{number}", 0) for number in range(VERIFIERS_MAX)))
    with pytest.raises(TooManyRequests) as refused:
        await node.follow(Position(1), wait=0, verifier="one-too-many")
    assert refused.value.retry_after == 10
    assert (await node.follow(Position(1), wait=0)).position.sequence == 1


async def test_a_revocation_waits_until_all_have_heard(node, key):
    await node.revocations.acknowledge("verifier-1", 1)
    await node.revocations.acknowledge("verifier-2", 0)
    hear = node.revocations.acknowledge
    node.on_pause = lambda: hear("verifier-2", 1) if len(node.pauses) == 3 else None
    assert await node.revocations.reach(1, wait=5) == Reach(1, 2, 2)
    assert len(node.pauses) == 3


async def test_a_revocation_waits_no_longer_than_it_was_told_to(node, key):
    await node.revocations.acknowledge("verifier-1", 0)
    began = node.monotonic.now
    assert await node.revocations.reach(1, wait=2) == Reach(1, 1, 0)
    assert node.monotonic.now - began == pytest.approx(2, abs=0.11)


async def test_a_revocation_waits_for_nobody_who_refuses_everything_by_then(node, key):
    await node.revocations.acknowledge("verifier-1", 0)
    node.on_pause = lambda: node.clock.forward(100)
    began = node.monotonic.now
    assert await node.revocations.reach(1, wait=1000) == Reach(1, 0, 0)
    assert node.monotonic.now - began == pytest.approx(10, abs=0.3)


async def test_a_revocation_waits_for_one_that_is_there_and_never_says_so_no_longer_than_the_maximum_staleness(node, key):
    await node.revocations.acknowledge("verifier-1", 0)
    began = node.monotonic.now
    assert await node.revocations.reach(1, wait=30) == Reach(1, 1, 0)
    assert node.monotonic.now - began == pytest.approx(10.1, abs=0.11)


async def test_a_revocation_does_not_wait_in_a_process_that_is_about_to_stop(node, key):
    await node.revocations.acknowledge("verifier-1", 0)
    assert await node.revocations.reach(1, wait=5, leave=lambda: True) == Reach(1, 1, 0)
    assert node.pauses == []


async def test_r69_nothing_that_is_secret_is_told(node, other, key):
    await other.revoke_key(key.id, now=START, by="test")
    said = repr(await node.revocations.read(None))
    assert key.id in said
    assert key.digest.hex() not in said
    assert repr(key.digest)[2:-1] not in said
