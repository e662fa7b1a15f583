"""The change sequence and the audit trail, and whether the store answers."""

import asyncio

import pytest
from backends import until
from given import START, a_company, a_key, a_login, a_partner, a_refresh

from gatelodge_server.core.model import DAY, PartnerStatus, SessionEnd, Tier
from gatelodge_server.core.ports import Refused


async def test_the_sequence_goes_up_by_one_and_a_reader_goes_on_where_it_was(store, key):
    numbers = [(await store.revoke_key(key.id, now=START + at, by="test")).sequence for at in range(5)]
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    page = await store.list_changes(after=numbers[0], limit=2)
    assert [(change.sequence, change.at) for change in page] == [(numbers[1], START + 1), (numbers[2], START + 2)]
    page = await store.list_changes(after=page[-1].sequence, limit=2)
    assert [change.sequence for change in page] == numbers[3:]
    assert await store.list_changes(after=numbers[-1], limit=2) == []


async def test_no_step_of_the_sequence_is_given_twice_or_lost(store, other_node, key):
    done = await asyncio.gather(*((store, other_node)[at % 2].revoke_key(key.id, now=START, by="test") for at in range(20)))
    steps = sorted(one.sequence for one in done)
    assert [change.sequence for change in await store.list_changes(after=steps[0] - 1, limit=100)] == steps


async def test_the_audit_trail_is_read_by_partner_and_from_an_instant_on(store, key):
    await store.add_partner(a_partner("zeta", created_at=START + 1), a_key("zeta"), by="anna")
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START + 2, by="bert")
    everything = await store.list_audit(partner_id=None, since=None)
    assert [(event.action, event.actor, event.at) for event in everything] == [
        ("partner.added", "test", START),
        ("partner.added", "anna", START + 1),
        ("partner.suspended", "bert", START + 2),
    ]
    assert [event.sequence for event in everything] == sorted(event.sequence for event in everything)
    assert await store.list_audit(partner_id="zeta", since=None) == everything[1:2]
    assert await store.list_audit(partner_id="acme-motors", since=None) == [everything[0], everything[2]]
    for since, expected in ((START + 1, everything[1:]), (START + 2, everything[2:]), (START + 3, [])):
        assert await store.list_audit(partner_id=None, since=since) == expected
    assert await store.list_audit(partner_id="acme-motors", since=START + 1) == everything[2:]


async def test_r69_no_digest_and_no_sealed_key_is_in_the_trail(store, key, company_key):
    await store.roll_key(key.id, a_key(), ends_at=START, now=START, by="test")
    said = repr(await store.list_audit(partner_id=None, since=None)) + repr(await store.list_changes(after=0, limit=100))
    for secret in (key.digest, company_key.digest):
        assert secret.hex() not in said
        assert repr(secret)[2:-1] not in said


async def test_a_store_that_answers_answers(store):
    await store.ping()


async def test_what_a_verb_has_written_every_other_node_sees_when_it_returns(store, other_node):
    for at in range(50):
        name = f"partner-{at}"
        await store.add_partner(a_partner(name), a_key(name), by="test")
        assert await other_node.find_partner(name) == a_partner(name)


async def test_the_last_change_is_the_last_step_and_0_where_there_is_none(store, other_node):
    assert await store.last_change() == 0
    for number, name in enumerate(("acme", "zeta", "eta"), 1):
        done = await store.add_partner(a_partner(name), a_key(name), by="test")
        assert await store.last_change() == await other_node.last_change() == done.sequence == number


# --- The bell ---


async def changes_of(store, key):
    """Everything that changes something, in turn; what it is told by comes back with its number."""
    company = a_company()
    company_key = a_key(company_id=company.id)
    yield "create_company", (await store.create_company(company, company_key, replay=None, by="test")).sequence
    session = (await store.open_session(a_login(key))).session
    ended = await store.end_session(session.id, cause=SessionEnd.LOGOUT, now=START, by="test")
    yield "end_session", ended.sequence
    second = (await store.open_session(a_login(key))).session
    await store.advance_session(a_refresh(second))
    await store.advance_session(a_refresh(second))
    yield "advance_session, condemned", await store.last_change()
    successor = a_key()
    await store.roll_key(key.id, successor, ends_at=START, now=START, by="test")
    yield "roll_key", await store.last_change()
    yield "revoke_key", (await store.revoke_key(successor.id, now=START, by="test")).sequence
    yield "set_tier", (await store.set_tier(Tier("gold", 1, 1), now=START, by="test")).sequence
    yield "set_partner_tier", (await store.set_partner_tier("acme-motors", "gold", now=START, by="test")).sequence
    yield "delete_company", (await store.delete_company("acme-motors", company.id, now=START, by="test")).sequence
    for status in (PartnerStatus.SUSPENDED, PartnerStatus.ACTIVE, PartnerStatus.DEACTIVATED):
        yield status, (await store.set_partner_status("acme-motors", status, now=START, by="test")).sequence


@pytest.fixture
async def listening(backend, store, other_node):
    """The two nodes hear of each other's changes."""
    tasks = await backend.start_listening(store, other_node)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.usefixtures("listening")
async def test_r25_every_change_rings_on_its_node_before_its_verb_returns_and_on_every_other(store, other_node, key):
    heard, last, elsewhere = {store.bell()}, await store.last_change(), other_node.bell()
    async for verb, sequence in changes_of(store, key):
        assert sequence > last, verb
        assert store.bell() not in heard, verb
        before = elsewhere
        await until(lambda before=before: other_node.bell() != before)
        elsewhere = other_node.bell()
        heard.add(store.bell())
        last = sequence


async def test_what_changes_nothing_that_is_remembered_rings_nothing(store, other_node, key, listening):
    heard = store.bell(), other_node.bell()
    session = (await store.open_session(a_login(key))).session
    await store.advance_session(a_refresh(session))
    await store.find_session(session.id)
    await store.list_changes(after=0, limit=10)
    await store.ping()
    assert await store.end_session(bytes(16), cause=SessionEnd.LOGOUT, now=START, by="test") is None
    assert isinstance(await store.add_partner(a_partner(), a_key(), by="test"), Refused)
    assert isinstance(await store.revoke_key("nobody", now=START, by="test"), Refused)
    assert (store.bell(), other_node.bell()) == heard


@pytest.mark.usefixtures("listening")
async def test_of_many_changes_at_once_by_two_nodes_each_is_heard_by_whoever_waits_for_it(store, other_node):
    async def add(number):
        node, other = (store, other_node) if number % 2 else (other_node, store)
        before = other.bell()
        name = f"partner-{number}"
        done = await node.add_partner(a_partner(name), a_key(name), by="test")
        await until(lambda: other.bell() != before)
        return done.sequence

    outcomes = await asyncio.gather(*(add(number) for number in range(40)))
    assert sorted(outcomes) == list(range(1, 41))


async def test_a_store_tells_the_time_by_its_own_clock(backend):
    with_clock = backend.open(store_now=lambda _: START + DAY)
    assert await with_clock.tell_time() == START + DAY
    await with_clock.close()
