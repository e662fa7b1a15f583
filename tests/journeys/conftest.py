"""Every journey is made on each database: what a partner sees does not depend on it."""

import itertools
import os

import pytest
from conftest import GENEROUS, PRODUCTION_URL
from harness import Server
from postgres import postgres

_names = itertools.count(1)


def _make_data(database, directory):
    """A data directory whose settings name a database: so commands beside a server need not be told."""
    data = directory / "data"
    data.mkdir(mode=0o700)
    if database == "postgresql":
        url = postgres().create(f"journey_{os.getpid()}_{next(_names)}")
        (data / "gatelodge.toml").write_text(f'database = "{url}"\n')
    return data


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database(request):
    """Which of the two."""
    return request.param


@pytest.fixture(scope="session")
def server(database, tmp_path_factory):
    """A server as it is by default, but for the failures that it puts up with."""
    data = _make_data(database, tmp_path_factory.mktemp("server"))
    with Server(data, environ={**GENEROUS, "GATELODGE_OTHER_ISSUERS": PRODUCTION_URL}) as running:
        yield running


@pytest.fixture(scope="session")
def plans_server(database, tmp_path_factory):
    """A server with the sample API behind its gate."""
    with Server(_make_data(database, tmp_path_factory.mktemp("plans")), "--sample-api", environ=GENEROUS) as running:
        yield running


@pytest.fixture(scope="session")
def plans_workers(database, tmp_path_factory):
    """The same, served by two processes."""
    data = _make_data(database, tmp_path_factory.mktemp("workers"))
    with Server(data, "--sample-api", "--workers", "2", environ=GENEROUS) as running:
        yield running
