"""What the database knows of its deployment: how its credentials are marked, and under which names tokens were issued."""

import asyncio

import pytest
from given import START, a_confirmation, a_key, a_partner, a_registration, a_signing_key
from sqlalchemy import delete

from gatelodge.errors import Unavailable
from gatelodge_server.core.ports import Confirmed, Done, MailLimits
from gatelodge_server.store.deployment import Marking, find_issuer, find_marking, settle_marking
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.tables import audit, change, credential, partner

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


# --- a node that runs while somebody marks the database anew ---


@pytest.fixture
async def uat_node(backend):
    """A node that was started while the database was marked so; what it was told of is in ``faults``."""
    backend.run(lambda connection: settle_marking(connection, UAT))
    node = SqlStore(backend.driver(), marking=UAT, on_fault=backend.faults.append)
    yield node
    await node.close()


async def claimed(store, address="dev@acme.example"):
    """What a claimed code is judged by."""
    await store.begin_registration(a_registration(address), limits=MailLimits(100, 100, 100), recovery="on")
    return await store.claim_attempt(address, now=START)


async def test_a_node_makes_no_partner_and_signs_nothing_while_the_marking_is_not_its_own(uat_node, within, backend):
    challenge = await claimed(uat_node)
    await uat_node.establish_signing_keys([a_signing_key(signs_from=START)], now=START)
    within(settle_marking, PRODUCTION)
    for asked in (
        lambda: uat_node.add_partner(a_partner(), a_key(), by="test"),
        lambda: uat_node.confirm_registration(a_confirmation(challenge)),
        uat_node.list_signing_keys,
    ):
        before = len(backend.faults)
        with pytest.raises(Unavailable):
            await asked()
        (told,) = backend.faults[before:]
        assert "is marked as production, acme, plans" in told
        assert "started as uat, gatelodge, partner-api-uat" in told
    assert (backend.count("partner"), backend.count("credential")) == (0, 0)
    within(settle_marking, UAT)
    assert len(await uat_node.list_signing_keys()) == 1
    assert isinstance(await uat_node.confirm_registration(a_confirmation(challenge)), Confirmed)
    assert isinstance(await uat_node.add_partner(a_partner("zenith"), a_key("zenith"), by="test"), Done)


@pytest.mark.parametrize("field", Marking._fields)
async def test_one_word_of_the_marking_is_enough_to_be_another(uat_node, within, field):
    within(settle_marking, UAT._replace(**{field: "other"}))
    with pytest.raises(Unavailable):
        await uat_node.list_signing_keys()


async def test_a_database_that_is_not_marked_is_of_no_node(backend):
    node = SqlStore(backend.driver(), marking=UAT)
    with pytest.raises(Unavailable):
        await node.add_partner(a_partner(), a_key(), by="test")
    await node.close()


async def test_of_a_first_partner_and_a_new_marking_at_once_one_is_refused(uat_node, backend, within):
    async def add():
        try:
            return await uat_node.add_partner(a_partner(), a_key(), by="test")
        except Unavailable:
            return None

    def forget():
        for table in (credential, partner, audit, change):
            backend.run(lambda connection, table=table: connection.execute(delete(table)))

    for _ in range(25):
        added, known = await asyncio.gather(add(), asyncio.to_thread(within, settle_marking, PRODUCTION))
        assert within(find_marking) == known
        assert known == (UAT if isinstance(added, Done) else PRODUCTION)
        assert backend.count("partner") == (1 if isinstance(added, Done) else 0)
        forget()
        within(settle_marking, UAT)
