"""Who is there to hear of a revocation, when another database with another clock takes the place of the first."""

import pytest
from backends import Backend, PostgresBackend
from experiments.servers import FakeClock
from given import START, a_key, a_partner
from sqlalchemy import select, update
from standby import Pair

from gatelodge_server.core.model import HOUR, SECOND
from gatelodge_server.core.ports import Acknowledgement, Reach, Refused
from gatelodge_server.core.refusals import TooManyRequests
from gatelodge_server.core.revocations import VERIFIERS_MAX
from gatelodge_server.store.migrate import upgrade
from gatelodge_server.store.tables import verifier

STALENESS = 10 * SECOND


async def hear(node, *names, sequence=1):
    for name in names:
        assert await node.acknowledge_step(Acknowledgement(name, sequence, START, STALENESS)) is None


async def reach(node, sequence=1):
    return await node.count_reach(sequence, within=STALENESS, now=START)


def seen_before(backend, name, by):
    """Let a verifier have been seen so much earlier."""
    earlier = update(verifier).where(verifier.c.id == name).values(seen_at=verifier.c.seen_at - by)
    backend.run(lambda connection: connection.execute(earlier))


def seen_by_another(backend):
    """Let all of them have been seen by the clock of another leader, an hour behind."""
    other = update(verifier).values(seen_at=verifier.c.seen_at - HOUR, clock="another")
    backend.run(lambda connection: connection.execute(other))


@pytest.fixture
def backend(tmp_path):
    return PostgresBackend.create(tmp_path)


@pytest.fixture
async def node(backend):
    node = backend.open()
    await node.add_partner(a_partner(), a_key(), by="test")
    yield node
    await node.close()


async def test_those_whom_another_clock_has_seen_last_count_until_they_are_seen_by_the_present_one(backend, node):
    await hear(node, "one", "two", "gone")
    seen_before(backend, "gone", 2 * STALENESS)
    assert await reach(node) == Reach(1, 2, 2)
    seen_by_another(backend)
    assert await reach(node) == Reach(1, 2, 2)
    assert await reach(node, 2) == Reach(2, 2, 0)
    await hear(node, "one")
    assert await reach(node) == Reach(1, 2, 2)
    seen_before(backend, "one", STALENESS)
    assert await reach(node) == Reach(1, 1, 1)


async def test_they_age_by_the_present_clock_from_the_next_round_of_housekeeping_on(backend, node):
    await hear(node, "one", "gone")
    seen_before(backend, "gone", 2 * STALENESS)
    seen_by_another(backend)
    assert await node.forget_verifiers(away_for=HOUR, now=START) == 0
    assert await reach(node) == Reach(1, 1, 1)
    seen_before(backend, "one", STALENESS)
    assert await reach(node) == Reach(1, 0, 0)
    seen_by_another(backend)
    seen_before(backend, "gone", 2 * HOUR)
    assert await node.forget_verifiers(away_for=HOUR, now=START) == 1


async def test_the_place_of_one_that_counts_by_another_clock_is_not_taken(backend, node):
    """The present clock says that it was seen an hour ago. It may have been seen a moment ago."""
    await hear(node, "gone", "one", *(f"known-{number}" for number in range(VERIFIERS_MAX - 2)))
    seen_by_another(backend)
    assert await node.acknowledge_step(Acknowledgement("new", 1, START, STALENESS)) == Refused(TooManyRequests)
    seen_before(backend, "gone", STALENESS)
    await hear(node, "new")
    assert await reach(node) == Reach(1, VERIFIERS_MAX, VERIFIERS_MAX)
    assert backend.run(lambda connection: connection.execute(select(verifier.c.id).where(verifier.c.id == "gone")).all()) == []


async def test_after_a_failover_to_a_database_whose_clock_is_ahead_nobody_is_forgotten():
    with Pair(environ=FakeClock(HOUR / SECOND).environ) as pair:
        old = Backend(pair.leader.create("lodge"))
        old.database.upgrade(upgrade)
        node = old.open()
        await node.add_partner(a_partner(), a_key(), by="test")
        await hear(node, "one", "two")
        assert await reach(node) == Reach(1, 2, 2)
        await node.close()
        pair.standby.promote()
        node = Backend(pair.standby.url("lodge")).open()
        assert await reach(node) == Reach(1, 2, 2)
        await hear(node, "one")
        assert await reach(node) == Reach(1, 2, 2)
        await node.close()
