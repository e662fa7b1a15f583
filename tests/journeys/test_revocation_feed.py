"""An offline verifier beside a real server: what is revoked is refused, and everything when nothing is heard."""

import shutil
import time

import pytest
from harness import Server
from outside import add_partner, ask, create_company, id_of, log_in, until

from gatelodge import (
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    Rejected,
    RemoteKeys,
    RemoteRevocations,
    RevocationsUnavailable,
    TokenRules,
    Verifier,
    https_fetch,
)

ISSUER = "https://localhost:8443"


class Clock:
    """The real monotonic clock, and what it is put on by."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead


class Outside:
    """A service on another host: a verifier that knows the server's URL and nothing else."""

    def __init__(self, server):
        self.clock = Clock()
        fetch = https_fetch(context=server.tls())
        url = f"https://localhost:{server.port}"
        self.revocations = RemoteRevocations(f"{url}/auth/revocations", fetch=fetch, clock=self.clock, cooldown=0.05)
        rules = TokenRules.for_sessions(issuer=ISSUER, audience="partner-api-uat")
        keys = RemoteKeys(f"{url}/.well-known/jwks.json", fetch=fetch)
        self.verifier = Verifier(keys, rules, revocations=self.revocations)

    def verdict(self, jwt):
        try:
            return self.verifier.verify(jwt).partner
        except (Rejected, RevocationsUnavailable) as refused:
            return type(refused)

    def refuses(self, jwt, reason):
        until(lambda: self.verdict(jwt) is reason, f"{reason.__name__}; it is {self.verdict(jwt)}")


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path / "data") as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
def outside(server):
    outside = Outside(server)
    yield outside
    outside.revocations.close()


def test_r25_whatever_ends_a_session_the_service_on_another_host_refuses_it_with_the_right_reason(server, client, outside):
    """The command returns when all who follow have heard, so the very next request is refused."""
    partner = add_partner(server.data)
    bystander = log_in(client, add_partner(server.data).key)["jwt"]
    first, second = log_in(client, partner.key), log_in(client, partner.key)
    company = create_company(client, partner.key)
    of_company = log_in(client, company["apiKey"])["jwt"]
    for jwt in (first["jwt"], second["jwt"], of_company):
        assert outside.verdict(jwt) == partner.id

    gone = client.post("/auth/logout", json={"refreshToken": first["refreshToken"]}, params={"wait": "10"}).json()
    assert (gone["verifiers"], gone["acknowledged"]) == (1, 1)
    assert outside.verdict(first["jwt"]) is CredentialRevoked
    assert outside.verdict(second["jwt"]) == partner.id

    done = client.delete(f"/companies/{company['companyId']}", headers={"R-Auth": partner.key}, params={"wait": "10"})
    assert done.json()["acknowledged"] == 1
    assert outside.verdict(of_company) is CredentialRevoked

    key = ask("key", "rotate", partner.key_id, "--wait", "10s", data=server.data)["apiKey"]
    assert outside.verdict(second["jwt"]) is CredentialRotated
    third = log_in(client, key)["jwt"]
    assert outside.verdict(third) == partner.id
    ask("partner", "suspend", partner.id, "--wait", "10s", data=server.data)
    assert outside.verdict(third) is PartnerSuspended
    ask("partner", "resume", partner.id, "--wait", "10s", data=server.data)
    assert outside.verdict(third) is CredentialRevoked
    fourth = log_in(client, key)["jwt"]
    assert outside.verdict(fourth) == partner.id

    ask("key", "revoke", id_of(key), "--wait", "10s", data=server.data)
    assert outside.verdict(fourth) is CredentialRevoked
    assert outside.verdict(bystander) not in {CredentialRevoked, RevocationsUnavailable}

    # The signing key of all of them, which may have got out.
    old = next(one["kid"] for one in ask("signing-key", "list", data=server.data) if one["state"] == "current")
    ask("signing-key", "rotate", "--purpose", "session", data=server.data)
    ask("signing-key", "retire", old, "--wait", "10s", data=server.data)
    assert outside.verdict(bystander) is InvalidCredential


def test_r25_a_verifier_that_starts_later_refuses_what_was_revoked_before(server, client):
    partner = add_partner(server.data)
    session = log_in(client, partner.key)
    client.post("/auth/logout", json={"refreshToken": session["refreshToken"]})
    late = Outside(server)
    assert late.verdict(session["jwt"]) is CredentialRevoked
    late.revocations.close()


@pytest.mark.parametrize("offset", [-1, 1])
def test_p7_a_server_that_is_gone_is_believed_for_the_maximum_staleness_and_believed_again_when_it_is_back(
    server, client, outside, offset
):
    partner = add_partner(server.data)
    jwt = log_in(client, partner.key)["jwt"]
    assert outside.verdict(jwt) == partner.id
    server.stop()
    outside.clock.ahead += 10 + offset
    # What was heard last was heard just now, but for the moment that the stop took.
    if offset > 0:
        assert outside.verdict(jwt) is RevocationsUnavailable
    else:
        outside.clock.ahead += 1 - 10
        assert outside.verdict(jwt) == partner.id
    server.start()
    until(lambda: outside.verdict(jwt) == partner.id, "it is heard again")


def test_p3_a_process_that_was_frozen_believes_nothing_until_it_has_heard(server, client, outside):
    partner = add_partner(server.data)
    session = log_in(client, partner.key)
    assert outside.verdict(session["jwt"]) == partner.id
    server.stop()
    outside.clock.ahead += 3600
    assert outside.verdict(session["jwt"]) is RevocationsUnavailable
    server.start()
    ask("key", "revoke", partner.key_id, data=server.data)
    outside.refuses(session["jwt"], CredentialRevoked)


def test_a_backup_that_is_restored_is_followed_from_its_own_beginning(server, client, outside):
    """What was revoked after the backup is not revoked any more, for the server as for those outside; what comes then is."""
    partner, other = add_partner(server.data), add_partner(server.data)
    jwts = [log_in(client, one.key)["jwt"] for one in (partner, other)]
    assert [outside.verdict(jwt) for jwt in jwts] == [partner.id, other.id]
    server.stop()
    database = server.data / "gatelodge.db"
    shutil.copyfile(database, server.data / "backup")
    server.start()
    ask("partner", "suspend", partner.id, data=server.data)
    outside.refuses(jwts[0], PartnerSuspended)
    server.stop()
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    shutil.copyfile(server.data / "backup", database)
    # The same step of the sequence, and another one.
    ask("partner", "suspend", other.id, data=server.data)
    server.start()
    outside.refuses(jwts[1], PartnerSuspended)
    until(lambda: outside.verdict(jwts[0]) == partner.id, "what the backup does not know is not refused")
