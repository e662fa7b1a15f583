"""The feed of revocations, and who follows it."""

import asyncio

import pytest
from given import AROUND, START, a_company, a_key, a_login, a_partner, a_signing_key
from sqlalchemy import delete, insert, select

from gatelodge.errors import CredentialRevoked, CredentialRotated, InvalidCredential, PartnerSuspended
from gatelodge_server.core.model import DAY, HOUR, SECOND, KeyPurpose, PartnerStatus, SessionEnd
from gatelodge_server.core.ports import Acknowledgement, Reach, Refused
from gatelodge_server.core.refusals import StepNotFound, TooManyRequests
from gatelodge_server.core.revocations import VERIFIERS_MAX
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.tables import verifier

ALL = 1000
STALENESS = 10 * SECOND


@pytest.fixture
async def node(backend):
    """A node that goes by the clock of whoever asks, so that boundaries can be looked at."""
    node = SqlStore(backend.driver(), store_now=lambda _: None)
    yield node
    await node.close()


def told(one):
    return one.sequence, one.kind, one.subject, one.reason, one.ends_at, one.epoch


async def tail(store, after=0, limit=ALL):
    return await store.read_revocations(after=after, limit=limit)


async def test_what_is_ended_is_told_with_its_step_its_reason_and_its_time(store, key, company_key):
    session = (await store.open_session(a_login(key))).session
    second, third = a_key(), a_key()
    before = await store.last_change()
    ended = (await store.end_session(session.id, cause=SessionEnd.LOGOUT, now=START + 1, by="test")).sequence
    rolled = (await store.roll_key(key.id, second, ends_at=START + HOUR, now=START + 2, by="test")).sequence
    cut = (await store.roll_key(second.id, third, ends_at=START + 3, now=START + 3, by="test")).sequence
    revoked = (await store.revoke_key(third.id, now=START + 4, by="test")).sequence
    company_id = company_key.company_id
    deleted = (await store.delete_company("acme-motors", company_id, now=START + 5, by="test")).sequence
    suspended = (await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START + 6, by="test")).sequence
    found = await tail(store, before)
    assert [told(one) for one in found.revocations] == [
        (ended, "session", session.id.hex(), CredentialRevoked, None, None),
        (rolled, "credential", key.id, CredentialRotated, START + HOUR, None),
        (cut, "credential", second.id, CredentialRotated, None, None),
        (revoked, "credential", third.id, CredentialRevoked, None, None),
        (deleted - 1, "credential", company_key.id, CredentialRevoked, None, None),
        (deleted, "company", str(company_id), CredentialRevoked, None, None),
        (suspended, "partner", "acme-motors", PartnerSuspended, None, 1),
    ]
    assert [one.at for one in found.revocations] == [START + at for at in (1, 2, 3, 4, 5, 5, 6)]
    assert (found.step.sequence, found.oldest.sequence, found.last.sequence) == (before, before + 1, suspended)
    assert not found.has_more


async def test_a_partner_that_is_resumed_lifts_what_was_told_and_keeps_its_epoch_and_one_that_is_deactivated_is_revoked(
    store, key
):
    before = await store.last_change()
    for status, reason, epoch in (
        (PartnerStatus.SUSPENDED, PartnerSuspended, 1),
        (PartnerStatus.ACTIVE, None, 1),
        (PartnerStatus.DEACTIVATED, CredentialRevoked, 2),
    ):
        sequence = (await store.set_partner_status("acme-motors", status, now=START, by="test")).sequence
        found = await tail(store, before)
        # Once each, as it stands: who reads all of it need not hear how it came about.
        assert [told(one) for one in found.revocations] == [(sequence, "partner", "acme-motors", reason, None, epoch)]


async def test_a_signing_key_of_sessions_that_is_withdrawn_is_told_and_one_of_access_tokens_is_not(store):
    for purpose in KeyPurpose:
        retiring = a_signing_key(signs_from=START, signs_until=START + 1, purpose=purpose)
        current = a_signing_key(published_at=START + 1, signs_from=START + 1, purpose=purpose)
        await store.establish_signing_keys([retiring, current], now=START)
        before = await store.last_change()
        assert (await tail(store, before - 1)).revocations == []
        done = await store.retire_signing_key(retiring.kid, now=START + 5, by="test")
        assert [told(one) for one in (await tail(store, before)).revocations] == (
            [(done.sequence, "signing-key", retiring.kid, InvalidCredential, START + 5, None)]
            if purpose is KeyPurpose.SESSION
            else []
        )


async def test_what_lets_somebody_in_is_not_told(store, key, company_key):
    await store.set_partner_tier("acme-motors", "starter", now=START, by="test")
    await store.create_company(a_company(), a_key(company_id=None), replay=None, by="test")
    found = await tail(store)
    assert found.revocations == []
    assert found.last.sequence == await store.last_change()


async def test_the_feed_is_read_page_by_page_and_nothing_is_lost_between_them(store, key):
    sessions = [(await store.open_session(a_login(key))).session for _ in range(7)]
    after = await store.last_change()
    for session in sessions:
        await store.end_session(session.id, cause=SessionEnd.LOGOUT, now=START, by="test")
    seen, pages = [], 0
    while True:
        page = await tail(store, after, limit=3)
        seen += [one.subject for one in page.revocations]
        after, pages = page.last.sequence, pages + 1
        if not page.has_more:
            break
    assert seen == [session.id.hex() for session in sessions]
    assert pages == 3


async def test_readers_at_different_places_ask_at_once_and_each_gets_its_own(store, key):
    for at in range(5):
        await store.revoke_key(key.id, now=START + at, by="test")
    last = await store.last_change()
    found = await asyncio.gather(*(tail(store, after) for after in (0, last - 1, last, last + 1, 0)))
    assert [[one.sequence for one in page.revocations] for page in found] == [[last], [last], [], [], [last]]
    assert found[3].step is None
    assert found[3].last is None
    assert found[2].last == found[2].step


# --- beginning ---


@pytest.mark.parametrize("offset", AROUND)
async def test_the_beginning_is_behind_the_last_step_before_the_oldest_one_that_counts(store, key, offset):
    for at in (1, 2, 3):
        await store.revoke_key(key.id, now=START + at * HOUR, by="test")
    first = await store.last_change() - 2
    begun = await store.begin_revocations(since=START + 2 * HOUR + offset, after=None, limit=ALL)
    assert begun.step.sequence == (first if offset < 0 else first + 1)


async def test_a_step_with_a_wrong_clock_does_not_hide_those_after_it(store, key):
    await store.revoke_key(key.id, now=START + DAY, by="test")
    await store.revoke_key(key.id, now=START, by="test")
    last = await store.last_change()
    begun = await store.begin_revocations(since=START + HOUR, after=None, limit=ALL)
    assert begun.step.sequence == last - 2


async def test_the_beginning_restates_suspended_partners_and_keys_whose_overlap_is_long(store, key):
    old, new = a_key("zeta"), a_key("zeta")
    await store.add_partner(a_partner("zeta"), old, by="test")
    await store.roll_key(old.id, new, ends_at=START + 9 * DAY, now=START, by="test")
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    last = await store.last_change()
    begun = await store.begin_revocations(since=START + 8 * DAY, after=None, limit=ALL)
    assert [told(one) for one in begun.revocations] == [
        (last, "credential", old.id, CredentialRotated, START + 9 * DAY, None),
        (last, "partner", "acme-motors", PartnerSuspended, None, 1),
    ]
    assert begun.next is None
    # Those that have ended before concern no JWT any more; those that were rolled later are told by their step.
    later = await store.begin_revocations(since=START + 9 * DAY, after=None, limit=ALL)
    assert [one.subject for one in later.revocations] == ["acme-motors"]
    earlier = await store.begin_revocations(since=START - 1, after=None, limit=ALL)
    assert [one.subject for one in earlier.revocations] == ["acme-motors"]
    assert earlier.step is None


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
async def test_a_long_beginning_is_told_in_pages_that_miss_nothing_and_repeat_nothing(store, limit):
    keys = []
    for name in ("acme", "beta", "zeta"):
        old = a_key(name)
        keys.append(old.id)
        await store.add_partner(a_partner(name), old, by="test")
        await store.roll_key(old.id, a_key(name), ends_at=START + 9 * DAY, now=START, by="test")
        await store.set_partner_status(name, PartnerStatus.SUSPENDED, now=START, by="test")
    seen, after = [], None
    while True:
        page = await store.begin_revocations(since=START + DAY, after=after, limit=limit)
        assert len(page.revocations) <= limit
        seen += [one.subject for one in page.revocations]
        after = page.next
        if after is None:
            break
    assert sorted(seen[:3]) == sorted(keys)
    assert seen[3:] == ["acme", "beta", "zeta"]


async def test_an_empty_database_begins_before_its_first_step(store):
    begun = await store.begin_revocations(since=START, after=None, limit=ALL)
    assert (begun.step, list(begun.revocations), begun.next) == (None, [], None)
    assert await tail(store) == await tail(store, 0)


# --- those who follow ---


def heard(verifier, sequence, now=START):
    return Acknowledgement(verifier, sequence, now, STALENESS)


async def test_a_step_is_acknowledged_by_those_who_have_applied_it(node, other_node, key):
    for _ in range(2):
        await node.revoke_key(key.id, now=START, by="test")
    last = await node.last_change()
    assert await node.count_reach(last, within=10 * SECOND, now=START) == Reach(last, 0, 0)
    assert await node.acknowledge_step(heard("verifier-1", last - 1)) is None
    assert await node.acknowledge_step(heard("verifier-2", last)) is None
    for sequence, acknowledged in ((last - 1, 2), (last, 1), (last + 1, 0)):
        assert await node.count_reach(sequence, within=10 * SECOND, now=START) == Reach(sequence, 2, acknowledged)
    assert await node.acknowledge_step(heard("verifier-1", last)) is None
    assert await node.count_reach(last, within=10 * SECOND, now=START) == Reach(last, 2, 2)
    # What it said last counts: it may have begun anew.
    assert await node.acknowledge_step(heard("verifier-1", last - 1)) is None
    assert await node.count_reach(last, within=10 * SECOND, now=START) == Reach(last, 2, 1)


@pytest.mark.parametrize("offset", AROUND)
async def test_one_that_was_not_seen_for_the_whole_staleness_does_not_count(node, key, offset):
    await node.acknowledge_step(heard("verifier-1", 1))
    assert await node.count_reach(1, within=10 * SECOND, now=START + 10 * SECOND + offset) == (
        Reach(1, 1, 1) if offset < 0 else Reach(1, 0, 0)
    )


async def test_a_step_that_is_not_there_is_acknowledged_by_nobody(node, key):
    last = await node.last_change()
    assert await node.acknowledge_step(heard("verifier-1", last + 1)) == Refused(StepNotFound)
    assert await node.count_reach(0, within=DAY, now=START) == Reach(0, 0, 0)


@pytest.mark.parametrize("offset", AROUND)
async def test_one_that_is_long_gone_is_forgotten(node, key, offset):
    await node.acknowledge_step(heard("verifier-1", 1))
    assert await node.forget_verifiers(away_for=HOUR, now=START + HOUR + offset) == (1 if offset > 0 else 0)
    assert await node.count_reach(0, within=DAY, now=START + HOUR) == (Reach(0, 0, 0) if offset > 0 else Reach(0, 1, 1))


async def test_there_is_room_for_so_many_and_those_who_are_there_stay(node, key):
    words = [heard(f"verifier-{number}", 0) for number in range(VERIFIERS_MAX + 1)]
    outcomes = await asyncio.gather(*map(node.acknowledge_step, words))
    assert outcomes.count(None) == VERIFIERS_MAX
    assert outcomes.count(Refused(TooManyRequests)) == 1
    assert await node.acknowledge_step(heard("verifier-0", 1)) is None
    assert (await node.count_reach(1, within=DAY, now=START)).acknowledged == 1


async def test_for_the_last_place_that_many_ask_for_at_several_nodes_there_is_one(node, other_node, key, backend):
    known = [{"id": f"known-{number}", "sequence": 0, "seen_at": START} for number in range(VERIFIERS_MAX - 1)]
    backend.run(lambda connection: connection.execute(insert(verifier), known))
    for number in range(20):
        # Before and behind those who are there already, whose rows are locked: nobody waits for each other in a circle.
        words = [(node, heard(f"a-{number}", 1)), (other_node, heard(f"{'az'[number % 2]}-other-{number}", 1))]
        words += [(one, heard(f"known-{at}", 1)) for one in (node, other_node) for at in range(10)]
        outcomes = await asyncio.gather(*(one.acknowledge_step(word) for one, word in words))
        assert outcomes[:2].count(None) == 1
        assert outcomes[:2].count(Refused(TooManyRequests)) == 1
        assert outcomes[2:] == [None] * 20
        assert backend.count("verifier") == VERIFIERS_MAX
        backend.run(lambda connection: connection.execute(delete(verifier).where(verifier.c.id.not_like("known-%"))))


def let_in(backend, **seen_at):
    """Fill all places: those who are named were seen then, the others now."""
    rows = [{"id": name.replace("_", "-"), "sequence": 1, "seen_at": at} for name, at in seen_at.items()]
    rows += [{"id": f"known-{number}", "sequence": 1, "seen_at": START} for number in range(VERIFIERS_MAX - len(rows))]
    backend.run(lambda connection: connection.execute(insert(verifier), rows))


def names(backend):
    return set(backend.run(lambda connection: connection.execute(select(verifier.c.id)).scalars().all()))


@pytest.mark.parametrize("offset", AROUND)
async def test_one_more_takes_the_place_of_one_that_is_not_there_any_more(node, key, backend, offset):
    let_in(backend, away_one=START - STALENESS + offset)
    before = await node.count_reach(1, within=STALENESS, now=START)
    outcome = await node.acknowledge_step(heard("one-more", 0))
    if offset > 0:
        assert outcome == Refused(TooManyRequests)
        assert (before.verifiers, "away-one" in names(backend)) == (VERIFIERS_MAX, True)
        return
    assert outcome is None
    # It was not counted, and who takes its place is: as one that has applied what it says itself.
    assert before == Reach(1, VERIFIERS_MAX - 1, VERIFIERS_MAX - 1)
    assert await node.count_reach(1, within=STALENESS, now=START) == Reach(1, VERIFIERS_MAX, VERIFIERS_MAX - 1)
    assert {"one-more"} == names(backend) - {f"known-{number}" for number in range(VERIFIERS_MAX)}
    assert await node.acknowledge_step(heard("away-one", 1)) == Refused(TooManyRequests)


async def test_whoever_has_been_away_longest_goes_first_and_in_one_transaction_as_many_as_are_new(node, key, backend):
    let_in(backend, b=START - 3 * STALENESS, a=START - 2 * STALENESS, c=START - 4 * STALENESS)
    assert await node.acknowledge_step(heard("new-1", 1)) is None
    assert {"a", "b", "c"} & names(backend) == {"a", "b"}
    words = [heard("new-2", 0), heard("new-2", 1), heard("new-3", 1), heard("new-4", 1), heard("known-1", 0)]
    outcomes = await asyncio.gather(*map(node.acknowledge_step, words))
    assert outcomes == [None, None, None, Refused(TooManyRequests), None]
    assert {"a", "b", "new-1", "new-2", "new-3", "new-4"} & names(backend) == {"new-1", "new-2", "new-3"}
    assert await node.count_reach(1, within=STALENESS, now=START) == Reach(1, VERIFIERS_MAX, VERIFIERS_MAX - 1)


async def test_for_the_place_of_one_that_is_away_that_many_want_at_several_nodes_there_is_one(node, other_node, key, backend):
    for number in range(20):
        let_in(backend, zz_away=START - STALENESS)
        # Behind the row whose place is taken, and before it, are rows that the same transactions and others change.
        words = [(node, heard(f"a-{number}", 1)), (other_node, heard(f"{'az'[number % 2]}-other-{number}", 1))]
        words += [(one, heard(f"known-{at}", 1)) for one in (node, other_node) for at in range(10)]
        outcomes = await asyncio.gather(*(one.acknowledge_step(word) for one, word in words))
        assert outcomes[:2].count(None) == 1
        assert outcomes[:2].count(Refused(TooManyRequests)) == 1
        assert outcomes[2:] == [None] * 20
        assert (backend.count("verifier"), "zz-away" in names(backend)) == (VERIFIERS_MAX, False)
        backend.run(lambda connection: connection.execute(delete(verifier)))


async def test_one_that_comes_back_while_its_place_is_taken_is_there_or_is_not_and_nobody_waits_in_a_circle(
    node, other_node, key, backend
):
    for number in range(20):
        let_in(backend, **{"a_away" if number % 2 else "zz_away": START - STALENESS})
        away = "a-away" if number % 2 else "zz-away"
        words = [(node, heard("mm-new", 1)), (other_node, heard(away, 1))]
        words += [(one, heard(f"known-{at}", 1)) for one in (node, other_node) for at in range(10)]
        outcomes = await asyncio.gather(*(one.acknowledge_step(word) for one, word in words))
        assert outcomes[:2].count(None) == 1
        assert outcomes[:2].count(Refused(TooManyRequests)) == 1
        assert outcomes[2:] == [None] * 20
        assert names(backend) & {"mm-new", away} == ({"mm-new"} if outcomes[0] is None else {away})
        assert backend.count("verifier") == VERIFIERS_MAX
        backend.run(lambda connection: connection.execute(delete(verifier)))


async def test_one_that_asks_two_nodes_at_once_is_one_and_is_there(node, other_node, key):
    """Its first two words may arrive at the same moment."""
    for number in range(20):
        name = f"verifier-{number}"
        asked = [one.acknowledge_step(heard(name, 1)) for one in (node, other_node)]
        assert await asyncio.gather(*asked) == [None, None]
    assert (await node.count_reach(0, within=DAY * 36_500, now=START)).verifiers == 20


async def test_all_nodes_count_by_one_clock_where_the_database_has_one(store, other_node, key):
    """A node whose own clock is wrong sees and counts as the others do; where there is no such clock the asker's has to do."""
    await store.acknowledge_step(heard("verifier-1", 1))
    assert await store.count_reach(1, within=10 * SECOND, now=START) == Reach(1, 1, 1)
    assert await other_node.count_reach(1, within=10 * SECOND, now=START) == Reach(1, 1, 1)
