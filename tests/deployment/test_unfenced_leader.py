"""A leader that nobody has fenced, or whose standby is away, and a node that asks it: it refuses, and comes back by itself."""

import time

import pytest
from harness import Server, add_partner, run_command
from plans import search
from standby import Pair, wait_until

from gatelodge_server.core.following import MAX_STALENESS


@pytest.fixture
def pair():
    with Pair() as pair:
        pair.leader.create("lodge")
        yield pair


@pytest.fixture
def node(pair, tmp_path):
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    (data / "gatelodge.toml").write_text(f'database = "{pair.url("lodge")}"\n')
    with Server(data, "--sample-api") as node:
        yield node
        pair.standby.thaw()


@pytest.fixture
def ask(node):
    """Present a new partner's key: to the gate, which lets in whom it remembers, and for what has to be read. The statuses."""
    partner_id, key = add_partner(node.data)
    done = run_command("partner", "tier", partner_id, "enterprise", data=node.data)
    assert done.returncode == 0, done.stderr
    with node.client() as client:
        bearer = {"Authorization": f"Bearer {key}"}
        ask = lambda: {search(client, key).status_code, client.get("/companies", headers=bearer).status_code}  # noqa: E731
        wait_until(lambda: ask() == {200})
        yield ask


def when(begun, condition):
    """After how many seconds it was so."""
    wait_until(condition)
    return time.monotonic() - begun


def test_r72_a_node_refuses_while_the_standby_is_away_and_goes_on_when_it_is_back(pair, node, ask):
    begun = time.monotonic()
    pair.standby.freeze()
    assert when(begun, lambda: ask() == {503}) < MAX_STALENESS + 1  # in which it was asked
    with node.client() as client:
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        pair.standby.thaw()
        wait_until(lambda: ask() == {200})
        wait_until(lambda: client.get("/readyz").status_code == 200)
    assert "no standby confirms" in node.log_path.read_text()


def test_r72_what_the_new_leader_has_revoked_is_refused_by_a_node_that_asks_the_old_one(pair, node, ask):
    partner_id = "acme-motors"
    pair.standby.promote()
    address = pair.standby.url("lodge")
    done = run_command("partner", "suspend", partner_id, "--database", address, data=node.data)
    begun = time.monotonic()
    assert done.returncode == 0, done.stderr
    assert pair.leader.run_sql("SELECT status FROM partner", database="lodge") == [["active"]]
    assert when(begun, lambda: 200 not in ask()) < MAX_STALENESS
    assert when(begun, lambda: ask() == {403}) < 2 * MAX_STALENESS
    assert pair.leader.run_sql("SELECT status FROM partner", database="lodge") == [["active"]]
