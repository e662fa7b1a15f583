"""R20: the key that signs is replaced while others verify with what they have kept, and nobody notices."""

import base64
import json
import threading
import time

import pytest
from nodes import on_database
from outside import add_partner, ask, command, log_in, outcome, refresh, run_sql, until, whoami

from gatelodge.keyset import StaticKeys
from gatelodge.tokens import TokenRules
from gatelodge.verify import Verifier
from gatelodge_server.core.refusals import SigningKeyInUse


def kid_of(jwt):
    return json.loads(base64.urlsafe_b64decode(jwt.split(".")[0] + "=="))["kid"]


def states(server):
    """Of the keys for session JWTs."""
    keys = ask("signing-key", "list", data=server.data)
    return {key["kid"]: key["state"] for key in keys if key["purpose"] == "session"}


def age_signing_keys(server, minutes):
    """As if so much time had passed since the keys were published."""
    run_sql(server.data, "UPDATE signing_key SET published_at = published_at - :time", time=minutes * 60_000)


class Follower:
    """Somebody elsewhere who fetched the key set once, and verifies each JWT that a session is given."""

    def __init__(self, server, key):
        self._client, self._key = server.client(), key
        rules = TokenRules.for_sessions(issuer="https://localhost:8443", audience="partner-api-uat")
        self._verifier = Verifier(StaticKeys.from_jwks(self._client.get("/.well-known/jwks.json").json()), rules)
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.faults, self.kids = [], []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._enough.set()
        self._thread.join(30)
        self._client.close()

    def _run(self):
        session = log_in(self._client, self._key)
        first = session
        while not self._enough.is_set():
            session = refresh(self._client, session["refreshToken"]).json()
            self.kids.append(kid_of(session["jwt"]))
            for jwt in (session["jwt"], first["jwt"]):
                try:
                    self._verifier.verify(jwt)
                except Exception as fault:  # noqa: BLE001 - each is one too many
                    self.faults.append(repr(fault))
                if whoami(self._client, jwt) != (200, None):
                    self.faults.append("the server refuses its own JWT")


@pytest.mark.each_database
def test_r20_a_rotation_disturbs_nobody_and_a_retired_key_takes_its_tokens_along(tmp_path, database):
    with on_database(database, tmp_path / "data") as server, server.client() as client:
        partner = add_partner(server.data)
        session = log_in(client, partner.key)
        old = kid_of(session["jwt"])
        assert states(server)[old] == "current"

        # A key that caches cannot know yet is given a date, not the pen; asking again changes nothing.
        first, second = (ask("signing-key", "rotate", data=server.data) for _ in range(2))
        assert first == second
        assert first["kid"] != old
        assert sorted(states(server).values()) == ["current", "next", "next"]
        assert states(server)[old] == "current"
        assert kid_of(log_in(client, partner.key)["jwt"]) == old

        # A date that has come: what the passage of time does, done by hand.
        with Follower(server, partner.key) as follower:
            until(lambda: len(follower.kids) > 3, "the follower verifies")
            bring_forward(server)
            until(lambda: first["kid"] in follower.kids, "the next key signs")
            until(lambda: follower.kids.count(first["kid"]) > 10, "the follower goes on")
        assert follower.faults == []
        assert set(follower.kids) == {old, first["kid"]}
        assert states(server) == {old: "retiring", first["kid"]: "current", third(server, old, first): "next"}
        assert whoami(client, session["jwt"]) == (200, None)
        published = {key["kid"] for key in client.get("/.well-known/jwks.json").json()["keys"]}
        assert published == {key["kid"] for key in ask("signing-key", "list", data=server.data)}

        # Retired: gone from the key set, and with it every token that it signed. Their sessions go on.
        refused = command("signing-key", "retire", first["kid"], data=server.data)
        assert (refused.exit_code, refused.stderr) == (1, f"{SigningKeyInUse.detail}\n")
        assert ask("signing-key", "retire", old, data=server.data)["state"] == "gone"
        until(lambda: whoami(client, session["jwt"]) == (401, "invalid_credential"), "tokens of a retired key are refused")
        assert old not in {key["kid"] for key in client.get("/.well-known/jwks.json").json()["keys"]}
        assert states(server)[old] == "gone"
        renewed = refresh(client, session["refreshToken"])
        assert outcome(renewed) == (200, None)
        assert kid_of(renewed.json()["jwt"]) == first["kid"]

        # A next key that every cache knows signs at once.
        age_signing_keys(server, 10)
        again = ask("signing-key", "rotate", data=server.data)
        until(lambda: kid_of(log_in(client, partner.key)["jwt"]) == again["kid"], "the next key signs at once")
        assert states(server)[first["kid"]] == "retiring"
        assert whoami(client, renewed.json()["jwt"]) == (200, None)


def bring_forward(server):
    for instant in ("signs_from", "signs_until"):
        run_sql(server.data, f"UPDATE signing_key SET {instant} = :now WHERE {instant} > :now", now=int(time.time() * 1000))


def third(server, *known):
    names = {known[0], known[1]["kid"]}
    return next(kid for kid in states(server) if kid not in names)


@pytest.mark.parametrize("kid", ["no-such-key", "-aafrKoY6TIQWpOv7B922tPp6GHrXN7iZH7gT0TXqdY", "--x", "-d"])
def test_a_signing_key_that_is_not_there_cannot_be_retired_whatever_its_id_begins_with(server, kid):
    refused = command("signing-key", "retire", kid, data=server.data)
    assert (refused.exit_code, refused.stderr) == (1, "There is no signing key with this id.\n")


def test_the_only_key_that_signs_cannot_be_retired(server):
    (current,) = (kid for kid, state in states(server).items() if state == "current")
    assert command("signing-key", "retire", current, data=server.data).exit_code == 1
    assert states(server)[current] == "current"
