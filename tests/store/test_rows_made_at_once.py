"""A row that two nodes make at once: SQLite has one writer, so there the second finds it before it tries."""

import pytest
from backends import SqliteBackend
from sqlalchemy import select

from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.tables import tier


@pytest.fixture
def connection(tmp_path):
    engine = SqliteBackend.create(tmp_path).engine()
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def test_the_second_of_two_leaves_the_first_ones_row_and_its_own_transaction_as_they_are(connection):
    for limit in (1, 2):
        insert_unless_there(connection, tier, {"name": "gold", "requests_per_hour": limit, "requests_per_day": limit})
    insert_unless_there(connection, tier, {"name": "silver", "requests_per_hour": 3, "requests_per_day": 3})
    limits = dict(connection.execute(select(tier.c.name, tier.c.requests_per_hour)).all())
    assert (limits["gold"], limits["silver"]) == (1, 3)
