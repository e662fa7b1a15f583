"""The change sequence and the audit trail, and whether the store answers."""

import asyncio

from given import START, a_key, a_partner

from gatelodge_server.core.model import PartnerStatus


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
