"""Servers for the tests of the outside: each started when it is first asked for, once in a process of tests."""

import pytest
from harness import Server
from outside import Partner, add_partner, log_in

GENEROUS = {
    "GATELODGE_LOGIN_FAILURE_LIMIT": "1000000/minute",
    "GATELODGE_REGISTRATION_LIMIT": "1000000/hour",
    "GATELODGE_VERIFICATION_FAILURE_LIMIT": "1000000/minute",
    "GATELODGE_MAILS_OVERALL": "100000",
}
PRODUCTION_URL = "https://production.example"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server as it is by default, but for the failures that it puts up with."""
    environ = {**GENEROUS, "GATELODGE_OTHER_ISSUERS": PRODUCTION_URL}
    with Server(tmp_path_factory.mktemp("server") / "data", environ=environ) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def strict_server(tmp_path_factory):
    """A server whose session JWTs live for a second, and which puts up with three failures a minute."""
    environ = {"GATELODGE_JWT_TTL": "1s", "GATELODGE_LOGIN_FAILURE_LIMIT": "3/minute"}
    with Server(tmp_path_factory.mktemp("strict") / "data", environ=environ) as running:
        yield running


@pytest.fixture(scope="session")
def hidden_server(tmp_path_factory):
    """A server that trusts proxies on 127.0.0.0/9, and puts up with three failures a minute."""
    environ = {"GATELODGE_LOGIN_FAILURE_LIMIT": "3/minute"}
    arguments = ("--behind-proxy", "127.0.0.0/9")
    with Server(tmp_path_factory.mktemp("hidden") / "data", *arguments, environ=environ) as running:
        yield running


@pytest.fixture(scope="session")
def plans_server(tmp_path_factory):
    """A server with the sample API behind its gate."""
    with Server(tmp_path_factory.mktemp("plans") / "data", "--sample-api", environ=GENEROUS) as running:
        yield running


@pytest.fixture(scope="session")
def plans_workers(tmp_path_factory):
    """The same, served by two processes."""
    arguments = ("--sample-api", "--workers", "2")
    with Server(tmp_path_factory.mktemp("workers") / "data", *arguments, environ=GENEROUS) as running:
        yield running


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
