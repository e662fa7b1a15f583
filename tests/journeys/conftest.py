"""Journeys that are marked ``each_database`` are made on each: what a partner sees does not depend on it.

Whatever depends on a server is handed out anew for each test, and the servers themselves are kept by what they run on. So
pytest has nothing to keep that would be of another database than the test.
"""

import time

import pytest
from nodes import DATABASES, HEARD_WITHIN, two_processes

_PACE = 0.02


def pytest_generate_tests(metafunc):
    if "database" in metafunc.fixturenames and metafunc.definition.get_closest_marker("each_database"):
        metafunc.parametrize("database", DATABASES, indirect=True, scope="module")


@pytest.fixture(scope="module")
def database(request):
    """On which database the journey is made."""
    return getattr(request, "param", "sqlite")


@pytest.fixture
def heeded(database):
    """Asserts that a change by another process is heeded: at the first look, or as soon as it must have been heard of."""

    def look(judge, verdict):
        deadline = time.monotonic() + HEARD_WITHIN[database]
        while (found := judge()) != verdict:
            assert time.monotonic() < deadline, found
            time.sleep(_PACE)  # a pace, and calls of the gate count against a quota

    return look


@pytest.fixture
def server(servers, database):
    return servers("default", database)


@pytest.fixture
def client(clients, server):
    return clients(server)


@pytest.fixture
def strict_server(servers, database):
    return servers("strict", database)


@pytest.fixture
def plans_server(servers, database):
    return servers("plans", database)


@pytest.fixture
def plans_workers(servers, database):
    """The same, served by two processes."""
    return servers("plans", database, two_processes)
