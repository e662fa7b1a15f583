"""Two nodes whose clocks are wrong by an hour, one ahead and one behind: nobody but them knows."""

import base64
import json
import time

import pytest
from conftest import GENEROUS
from experiments.servers import FakeClock
from harness import Server
from nodes import TwoNodes, settle
from outside import add_partner, ask, log_in, refresh, until, whoami
from plans import GOOD, judged

HOUR = 3_600.0
TTL = 6
"""Seconds for which a JWT is good here: long enough for some requests on a busy machine."""
NEAR = 3.0
EXPIRED = (401, "credential_expired")


@pytest.fixture(scope="module")
def machine_clocks():
    return FakeClock(HOUR), FakeClock(-HOUR)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, machine_clocks):
    data = settle(tmp_path_factory.mktemp("clocks") / "data", "postgresql")
    of_each = [{**GENEROUS, **clock.environ, "GATELODGE_JWT_TTL": f"{TTL}s"} for clock in machine_clocks]
    running = TwoNodes(data, "--sample-api", environ=of_each[0])
    running.other = Server(running.other.data, "--sample-api", environ=of_each[1])
    with running:
        yield running.nodes


@pytest.fixture
def ahead(nodes, clients):
    return clients(nodes[0])


@pytest.fixture
def behind(nodes, clients):
    return clients(nodes[1])


@pytest.fixture
def acme(nodes):
    return add_partner(nodes[0].data)


def claims_of(jwt):
    payload = jwt.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def test_p10_a_session_jwt_is_dated_by_the_databases_clock_and_good_at_every_node_until_it_expires_there(ahead, behind, acme):
    jwts = [log_in(client, acme.key)["jwt"] for client in (ahead, behind)]
    assert [whoami(client, jwt) for client in (ahead, behind) for jwt in jwts] == [GOOD] * 4
    claims = [claims_of(jwt) for jwt in jwts]
    assert [abs(one["iat"] - time.time()) < NEAR for one in claims] == [True] * 2
    assert [one["exp"] - one["iat"] for one in claims] == [TTL] * 2
    until(lambda: time.time() > claims[-1]["exp"] + 0.5, "their end")
    assert [whoami(client, jwt) for client in (ahead, behind) for jwt in jwts] == [EXPIRED] * 4


def test_p10_what_a_node_gives_out_is_dated_rightly_while_its_clock_is_set(ahead, behind, acme, machine_clocks):
    session = log_in(ahead, acme.key)
    for offset in (-2 * HOUR, 0.0, HOUR):
        machine_clocks[0].set(offset)
        session = refresh(ahead, session["refreshToken"]).json()
        assert abs(claims_of(session["jwt"])["iat"] - time.time()) < NEAR
        assert [whoami(client, session["jwt"]) for client in (ahead, behind)] == [GOOD] * 2


def test_a_command_on_a_machine_whose_clock_is_wrong_dates_rightly_too(nodes, ahead, behind, acme, machine_clocks):
    for clock in machine_clocks:
        token = ask("token", "issue", acme.id, data=nodes[0].data, environ=clock.environ)["token"]
        assert abs(claims_of(token)["iat"] - time.time()) < NEAR
        assert [judged(client, token) for client in (ahead, behind)] == [GOOD] * 2
