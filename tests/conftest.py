"""Servers for the tests of the outside: each started when it is first asked for, once in a process of tests."""

import contextlib
import functools

import pytest
from nodes import on_database
from outside import Partner, add_partner, log_in

GENEROUS = {
    "GATELODGE_LOGIN_FAILURE_LIMIT": "1000000/minute",
    "GATELODGE_REGISTRATION_LIMIT": "1000000/hour",
    "GATELODGE_VERIFICATION_FAILURE_LIMIT": "1000000/minute",
    "GATELODGE_MAILS_OVERALL": "100000",
}
PRODUCTION_URL = "https://production.example"


KINDS = {
    "default": ((), {**GENEROUS, "GATELODGE_OTHER_ISSUERS": PRODUCTION_URL}),
    "strict": ((), {"GATELODGE_JWT_TTL": "1s", "GATELODGE_LOGIN_FAILURE_LIMIT": "3/minute"}),
    "hidden": (("--behind-proxy", "127.0.0.0/9"), {"GATELODGE_LOGIN_FAILURE_LIMIT": "3/minute"}),
    "plans": (("--sample-api",), GENEROUS),
}
"""What servers are started with: flags and settings."""


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """The server of a kind, on a database, made by one of `nodes`."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def running(kind, database, make=on_database):
            arguments, environ = KINDS[kind]
            data = tmp_path_factory.mktemp(kind) / "data"
            return stack.enter_context(make(database, data, *arguments, environ=environ))

        yield running


@pytest.fixture(scope="session")
def clients():
    """The client of a server that tests share."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda server: stack.enter_context(server.client()))


@pytest.fixture(scope="session")
def server(servers):
    """A server as it is by default, but for the failures that it puts up with."""
    return servers("default", "sqlite")


@pytest.fixture(scope="session")
def client(clients, server):
    return clients(server)


@pytest.fixture(scope="session")
def strict_server(servers):
    """A server whose session JWTs live for a second, and which puts up with three failures a minute."""
    return servers("strict", "sqlite")


@pytest.fixture(scope="session")
def hidden_server(servers):
    """A server that trusts proxies on 127.0.0.0/9, and puts up with three failures a minute."""
    return servers("hidden", "sqlite")


@pytest.fixture(scope="session")
def plans_server(servers):
    """A server with the sample API behind its gate."""
    return servers("plans", "sqlite")


@pytest.fixture
def partner(server) -> Partner:
    """A partner whom no other test knows."""
    return add_partner(server.data)


@pytest.fixture
def another_partner(server) -> Partner:
    """A second one."""
    return add_partner(server.data)


@pytest.fixture
def tokens(client, partner):
    """The four fields of the partner's login."""
    return log_in(client, partner.key)
