"""The store's clock: the database's own, where it has one that its nodes share."""

import asyncio

import pytest
from backends import PostgresBackend, SqliteBackend
from given import START, a_key, a_partner

from gatelodge_server.core.model import DAY, HOUR
from gatelodge_server.core.ports import QuotaAsk
from gatelodge_server.deployment import system_clock
from gatelodge_server.store.clock import store_now

WRONG = (START, system_clock() + 30_000, system_clock() - 30_000, START + 400 * DAY)
"""What the clocks of four nodes say."""


@pytest.fixture
def postgresql(tmp_path):
    return PostgresBackend.create(tmp_path)


@pytest.fixture
def sqlite(tmp_path):
    return SqliteBackend.create(tmp_path)


async def leases(backend):
    """What four nodes get at once, each by its own clock."""
    nodes = [backend.open() for _ in WRONG]
    await nodes[0].add_partner(a_partner(), a_key(), by="test")
    got = await asyncio.gather(
        *(node.lease_quota(QuotaAsk("acme-motors", 5, now)) for node, now in zip(nodes, WRONG, strict=True))
    )
    for node in nodes:
        await node.close()
    return got


async def test_p5_nodes_whose_clocks_are_wrong_are_counted_by_the_clock_of_the_database(postgresql):
    before = system_clock()
    got = await leases(postgresql)
    after = system_clock()
    for lease in got:
        assert before <= lease.now <= after
        assert (lease.hour_starts_at, lease.day_starts_at) == (lease.now - lease.now % HOUR, lease.now - lease.now % DAY)
    if before // HOUR == after // HOUR:
        assert sorted(lease.hour_taken for lease in got) == [5, 10, 15, 20]


async def test_processes_on_one_machine_have_one_clock_and_are_counted_by_it(sqlite):
    assert [lease.now for lease in await leases(sqlite)] == list(WRONG)


def test_the_time_goes_on_within_a_transaction(postgresql):
    def read(connection):
        first = now = store_now(connection)
        while now == first:
            now = store_now(connection)
        return first, now

    before = system_clock()
    first, later = postgresql.database.read(read)
    assert before <= first < later <= system_clock()


def test_a_database_without_a_clock_has_no_time(sqlite):
    assert sqlite.database.read(store_now) is None
