"""What the database knows of its deployment: how its credentials are marked, and under which names tokens were issued."""

import pytest
from given import START, a_key, a_partner

from gatelodge_server.store.deployment import Marking, find_issuer, find_marking, settle_marking

UAT = Marking("uat", "gatelodge", "partner-api-uat")
PRODUCTION = Marking("production", "acme", "plans")


@pytest.fixture
def within(backend):
    """Runs a function in a transaction."""
    return lambda work, *args: backend.run(lambda connection: work(connection, *args))


async def test_a_name_that_tokens_are_issued_under_is_known_to_every_node(store, other_node):
    assert not await other_node.is_issuer("https://one.example")
    await store.note_issuer("https://one.example", now=START)
    assert await other_node.is_issuer("https://one.example")
    assert not await other_node.is_issuer("https://one.example/")


async def test_the_name_that_was_used_last_is_the_one_that_others_take(store, within):
    assert within(find_issuer) is None
    await store.note_issuer("https://one.example", now=START)
    await store.note_issuer("https://two.example", now=START + 1)
    assert within(find_issuer) == "https://two.example"
    await store.note_issuer("https://one.example", now=START + 2)
    assert within(find_issuer) == "https://one.example"


async def test_a_database_without_partners_can_be_marked_anew(store, within):
    assert within(find_marking) is None
    assert within(settle_marking, UAT) == UAT
    assert within(settle_marking, PRODUCTION) == PRODUCTION
    assert within(find_marking) == PRODUCTION


async def test_once_there_is_a_partner_the_marking_stays(store, within):
    within(settle_marking, UAT)
    await store.add_partner(a_partner(), a_key(), by="test")
    assert within(settle_marking, PRODUCTION) == UAT
    assert within(find_marking) == UAT
