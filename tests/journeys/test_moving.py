"""A deployment moves from SQLite to PostgreSQL while it serves."""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from conftest import GENEROUS
from harness import Server, run_command
from moving import run_of
from outside import add_partner, ask, bearer, create_company, log_in, outcome, refresh, until, whoami
from plans import ASKED, GOOD, SEARCH
from postgres import postgres

from gatelodge_server.store.address import parse_address

_names = itertools.count(1)
UNAVAILABLE = (503, "unavailable")
REUSED = (401, "refresh_token_reused")


@pytest.fixture
def url():
    """An empty database."""
    return postgres().create(f"moving_{os.getpid()}_{next(_names)}")


@pytest.fixture
def old(tmp_path):
    """A server on SQLite, with the sample API behind its gate."""
    with Server(tmp_path / "data", "--sample-api", environ=GENEROUS) as running:
        yield running


def search(client, credential):
    return outcome(client.post(SEARCH, json=ASKED, headers=bearer(credential)))


def test_what_was_handed_out_before_a_move_is_good_after_it(old, url):
    partner = add_partner(old.data)
    gone = add_partner(old.data)
    token = ask("token", "issue", partner.id, data=old.data)["token"]
    with old.client() as client:
        first = log_in(client, partner.key)
        second = refresh(client, first["refreshToken"]).json()
        company = create_company(client, partner.key)
        dead = log_in(client, gone.key)
        ask("partner", "suspend", gone.id, data=old.data)
        assert search(client, token) == GOOD
        trail = ask("audit", data=old.data)

        done = run_command("database", "copy", "--to", url, "--json", data=old.data)
        assert (done.returncode, done.stderr) == (0, "")

        # Whoever was left behind lets nobody in, and says no word of what is on record.
        until(lambda: whoami(client, second["jwt"]) == UNAVAILABLE, "the old server closes its gate")
        assert search(client, token) == UNAVAILABLE
        assert outcome(refresh(client, second["refreshToken"])) == UNAVAILABLE
        assert outcome(client.post("/auth/login", json={"apiKey": partner.key})) == UNAVAILABLE
    old.stop()
    with pytest.raises(AssertionError, match="has been moved"):
        old.start()

    with Server(old.data, "--sample-api", "--database", url, environ=GENEROUS) as new, new.client() as client:
        assert search(client, token) == GOOD
        assert whoami(client, first["jwt"]) == GOOD
        log_in(client, partner.key)
        log_in(client, company["apiKey"])
        third = refresh(client, second["refreshToken"])
        assert outcome(third) == GOOD
        assert outcome(refresh(client, second["refreshToken"])) == REUSED
        assert outcome(refresh(client, third.json()["refreshToken"])) == REUSED
        assert whoami(client, dead["jwt"]) == (403, "partner_suspended")
        there = ask("audit", "--database", url, data=old.data)
        assert there[: len(trail)] == trail
        assert [event["action"] for event in there[len(trail) :]] == ["session.reuse"]


@dataclass
class Chain:
    """A session that is refreshed again and again by one caller, who knows what was acknowledged."""

    acknowledged: list[str] = field(default_factory=list)


class Traffic:
    """Callers who log in and refresh until they are told to stop."""

    def __init__(self, server, key, callers=3):
        self.chains = []
        self.refused = 0
        self._server = server
        self._key = key
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._tasks = [self._pool.submit(self._call) for _ in range(callers)]

    def _call(self):
        with self._server.client() as client:
            while not self._over.is_set():
                answer = client.post("/auth/login", json={"apiKey": self._key})
                chain = Chain()
                self.chains.append(chain)
                while outcome(answer) == GOOD and not self._over.is_set():
                    chain.acknowledged.append(answer.json()["refreshToken"])
                    if len(chain.acknowledged) == 8:
                        break
                    answer = refresh(client, chain.acknowledged[-1])
                if outcome(answer) != GOOD:
                    assert outcome(answer) == UNAVAILABLE
                    self.refused += 1

    def count(self):
        return sum(len(chain.acknowledged) for chain in self.chains)

    def stop(self):
        self._over.set()
        for task in self._tasks:
            task.result()
        self._pool.shutdown()


@dataclass
class Place:
    """What a run of the copy is told of a database."""

    address: str


def test_of_what_is_acknowledged_during_a_move_nothing_is_lost_and_nothing_is_good_twice(old, url):
    traffic = Traffic(old, add_partner(old.data).key)
    waited = []

    def go_on(step):
        """Let callers get on by some requests in every part of it."""
        if step.name in waited:
            return
        waited.append(step.name)
        count, refused = traffic.count(), traffic.refused
        if step.name in {"begun", "copying", "copied"}:
            until(lambda: traffic.count() > count + 20, f"requests are answered: {step.name}")
        elif step.name != "complete":
            until(lambda: traffic.refused > refused + 3, f"requests are refused: {step.name}")

    try:
        until(lambda: traffic.count() > 20, "requests are answered")
        source = Place(f"sqlite:///{old.data / 'gatelodge.db'}")
        copied = run_of(source, Place(url), tell=go_on).run()
    finally:
        traffic.stop()
    assert copied.changed > 0
    old.stop()
    chains = [chain.acknowledged for chain in traffic.chains if len(chain.acknowledged) > 1]
    assert len(chains) > 6
    with Server(old.data, "--database", url, environ=GENEROUS) as new, new.client() as client:
        for number, chain in enumerate(chains):
            if number % 2:
                assert outcome(refresh(client, chain[-1])) == GOOD
                assert outcome(refresh(client, chain[-1])) == REUSED
            else:
                assert outcome(refresh(client, chain[-2])) == REUSED
                assert outcome(refresh(client, chain[-1])) == REUSED


def test_no_server_starts_between_the_two(old, url):
    add_partner(old.data)

    class Stopped(Exception):
        pass

    def stop_when_closed(step):
        if step.name == "closed":
            raise Stopped

    with pytest.raises(Stopped):
        run_of(Place(f"sqlite:///{old.data / 'gatelodge.db'}"), Place(url), tell=stop_when_closed).run()
    old.stop()
    with pytest.raises(AssertionError, match="takes no writes: run `gatelodge database copy --to postgresql://gatelodge@127"):
        old.start()
    with pytest.raises(AssertionError, match="is an incomplete copy of sqlite:///"):
        Server(old.data, "--database", url).start()
    for where in ((), ("--database", url)):
        done = run_command("partner", "list", *where, data=old.data)
        assert done.returncode == 1
        assert parse_address(url).password.reveal() not in done.stderr
    done = run_command("database", "copy", "--abandon", data=old.data)
    assert (done.returncode, done.stderr) == (0, "")
    old.start()
    with pytest.raises(AssertionError, match="is an incomplete copy of sqlite:///"):
        Server(old.data, "--database", url).start()
