"""A row that two nodes make at once: the second waits for the first one's commit and leaves it as it is."""

import asyncio
import threading

import pytest
from backends import BACKENDS, PostgresBackend, SqliteBackend
from given import START
from moving import Stopped, at, run_of, stop
from outside import until
from postgres import postgres
from sqlalchemy import func, insert, select

from gatelodge_server.store.deployment import Marking, settle_marking
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.tables import partner, quota, tier

LIMITS = {"requests_per_hour": 1, "requests_per_day": 1}
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
A_PARTNER = {
    "name": "Acme Motors",
    "contact_email": "dev@acme.example",
    "tier": "starter",
    "status": "active",
    "origin": "self-service",
    "created_at": START,
    "registered_address": "dev@acme.example",
}


@pytest.fixture(params=BACKENDS)
def backend(request, tmp_path):
    return BACKENDS[request.param].create(tmp_path)


def limits_of(backend):
    return dict(backend.rows("tier", "name", "requests_per_hour"))


def test_the_second_of_two_leaves_the_first_ones_row_and_its_own_transaction_as_they_are(backend):
    def work(connection):
        for limit in (1, 2):
            insert_unless_there(connection, tier, {"name": "gold", "requests_per_hour": limit, "requests_per_day": limit})
        insert_unless_there(connection, tier, {"name": "silver", "requests_per_hour": 3, "requests_per_day": 3})

    backend.run(work)
    assert (limits_of(backend)["gold"], limits_of(backend)["silver"]) == (1, 3)


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (quota, {"partner_id": "nobody", "hour_starts_at": 0, "hour_taken": 0, "day_starts_at": 0, "day_taken": 0}),
        (tier, {"name": "gold", "requests_per_hour": 1}),
        (partner, {"id": "another", **A_PARTNER}),
    ],
    ids=["refers to nothing", "has nothing in a column", "has what must be unique of another row"],
)
def test_a_row_that_breaks_another_rule_is_a_fault(backend, table, row):
    backend.run(lambda connection: connection.execute(insert(partner), {"id": "acme-motors", **A_PARTNER}))
    before = backend.count(table.name)
    with pytest.raises(DatabaseFault, match=r"violates|constraint failed"):
        backend.run(lambda connection: insert_unless_there(connection, table, row))
    assert backend.count(table.name) == before


@pytest.mark.parametrize("name", ["starter", "new"])
def test_a_database_that_is_closed_takes_no_such_row_either(backend, tmp_path, name):
    backend.run(lambda connection: settle_marking(connection, Marking("uat", "gatelodge", "partner-api-uat")))
    with pytest.raises(Stopped):
        run_of(backend, SqliteBackend(tmp_path / "target.db"), tell=at("closed", stop)).run()
    with pytest.raises(DatabaseFault, match="has moved to another database"):
        backend.run(lambda connection: insert_unless_there(connection, tier, {"name": name, **LIMITS}))


async def test_who_comes_second_waits_for_the_commit_and_reads_the_first_ones_row_and_the_log_says_nothing_of_it(tmp_path):
    """On PostgreSQL; SQLite has one writer, so there the second finds the row before it tries."""
    backend, before = PostgresBackend.create(tmp_path), postgres().log()
    driver, is_there = backend.driver(), threading.Event()

    def first(connection):
        connection.execute(insert(tier), {"name": "gold", **LIMITS})
        is_there.set()
        until(lambda: backend.database.read(lambda other: other.exec_driver_sql(WAITING).scalar_one()), "the second one waits")

    def second(connection):
        insert_unless_there(connection, tier, {"name": "gold", "requests_per_hour": 2, "requests_per_day": 2})
        return connection.execute(select(func.max(tier.c.requests_per_hour)).where(tier.c.name == "gold")).scalar_one()

    beginning = asyncio.create_task(asyncio.to_thread(backend.run, first))
    await asyncio.to_thread(is_there.wait, 10)
    assert await driver.write(second) == 1
    await beginning
    await driver.close()
    assert "gold" not in postgres().log().removeprefix(before)
    assert "duplicate key" not in postgres().log().removeprefix(before)
