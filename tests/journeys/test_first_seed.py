"""The managed partner's way: a token that a partner manager hands over, the published call, and how the token ends."""

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime

import pytest
from harness import Server
from outside import add_partner, ask, bearer, command, create_company, exchange, log_in, outcome, r_auth, run_sql, until
from plans import (
    ASKED,
    GOOD,
    SEARCH,
    SEED,
    Curl,
    every_worker,
    issue_token,
    judged,
    rotate_token,
    search,
    used,
    within_an_hour,
)

from gatelodge.tokens import private_key_from_bytes, sign_token
from gatelodge_server.vault import MasterKeys, Vault, system_entropy

INVALID = (401, "invalid_credential")
REVOKED = (401, "credential_revoked")
ROTATED = (401, "credential_rotated")
ELSEWHERE = (401, "wrong_environment")
MISMATCH = (401, "partner_mismatch")


@pytest.fixture
def curl(tmp_path):
    return Curl(tmp_path)


@pytest.fixture
def plans_client(plans_server):
    with plans_server.client() as client:
        yield client


@pytest.fixture
def managed(plans_server):
    """A partner whom no other test knows."""
    return add_partner(plans_server.data)


@pytest.fixture
def token(plans_server, managed):
    return issue_token(plans_server.data, managed.id)


# --- the call -------------------------------------------------------------------------------------------------------------


@pytest.mark.each_database
def test_the_published_call_with_an_access_token_finds_plans(curl, plans_server, managed, token):
    said = curl(SEED, plans_server, token.text)
    assert said.status == 200
    assert said.body["partner"] == managed.id
    assert said.body["plans"]
    assert {"ratelimit", "ratelimit-policy", "x-ratelimit-remaining"} <= set(said.headers)


@pytest.mark.parametrize("line", [SEED, "\n".join(line for line in SEED.splitlines() if "Authorization" not in line)])
def test_the_published_call_without_a_token_is_told_what_is_wanted(curl, plans_server, line):
    said = curl(line, plans_server)
    assert said.status == 401
    assert said.headers["www-authenticate"][0].startswith("Bearer ")
    assert said.headers["content-type"] == ["application/problem+json"]
    assert said.body["code"] == ("invalid_credential" if "Authorization" in line else "credential_required")


def test_the_partner_of_the_body_may_be_the_tokens_own(curl, plans_server, managed, token):
    named = SEED.replace("-d '{", f'-d \'{{\n"partner": "{managed.id}",')
    said = curl(named, plans_server, token.text)
    assert (said.status, said.body["partner"]) == (200, managed.id)


@pytest.mark.parametrize("foreign", [{}, [], None, 7, True, "", "another", ["ID"], " ID", "ID ", "ID\u0000"])
def test_a_foreign_partner_in_the_body_is_refused_and_nothing_is_counted(plans_client, managed, token, foreign):
    if isinstance(foreign, str):
        foreign = foreign.replace("ID", managed.id)
    elif foreign == ["ID"]:
        foreign = [managed.id]

    def measure():
        assert judged(plans_client, token.text) == GOOD
        before = used(plans_client, managed.key)
        refused = search(plans_client, token.text, partner=foreign)
        assert outcome(refused) == MISMATCH
        assert "ratelimit" not in refused.headers
        # A search that the API would refuse is refused by the gate: so the API has not been asked.
        assert outcome(search(plans_client, token.text, partner=foreign, searchCriteria={})) == MISMATCH
        assert used(plans_client, managed.key) == before
        assert search(plans_client, token.text, partner=managed.id, searchCriteria={}).status_code == 422
        return before, used(plans_client, managed.key)

    before, after = within_an_hour(measure)
    assert after == (before[0] + 1, before[1] + 1)


def test_over_plain_http_even_a_good_token_is_refused_and_nothing_is_counted(plans_server, plans_client, managed, token):
    body = json.dumps(ASKED).encode()
    head = (
        f"POST {SEARCH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token.text}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )

    def measure():
        before = used(plans_client, managed.key)
        refused = exchange(plans_server, head.encode() + body, tls=False)
        assert (refused.status, json.loads(refused.body)["code"]) == (403, "https_required")
        return before, used(plans_client, managed.key)

    before, after = within_an_hour(measure)
    assert before == after
    assert exchange(plans_server, head.encode() + body).status == 200


@pytest.mark.each_database
def test_all_three_kinds_of_credential_open_the_same_call_in_either_header(plans_client, managed, token):
    session = log_in(plans_client, managed.key)
    made = create_company(plans_client, managed.key)
    companys = [made["apiKey"], log_in(plans_client, made["apiKey"])["jwt"]]
    for by in (bearer, r_auth):
        answers = [search(plans_client, credential, by) for credential in (token.text, managed.key, session["jwt"], *companys)]
        assert [outcome(answer) for answer in answers] == [GOOD] * 5
        assert [answer.json()["partner"] for answer in answers] == [managed.id] * 5
        assert [answer.json()["company"] for answer in answers] == [None] * 3 + [made["companyId"]] * 2


@pytest.mark.each_database
def test_an_access_token_opens_the_api_and_nothing_of_the_partners_own(plans_client, token):
    assert outcome(plans_client.get("/companies", headers=bearer(token.text))) == (403, "insufficient_scope")
    assert outcome(plans_client.post("/auth/login", json={"apiKey": token.text})) == INVALID


# --- two environments -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def production(tmp_path_factory):
    data = tmp_path_factory.mktemp("production") / "data"
    arguments = ("--sample-api", "--environment", "production")
    with Server(data, *arguments, public_url="https://production.example") as running:
        yield running


def credentials_of(server):
    """One of each kind, and each is good where it is from."""
    partner = add_partner(server.data, "Acme Motors")
    with server.client() as client:
        kinds = {
            "access token": issue_token(server.data, partner.id).text,
            "key": partner.key,
            "jwt": log_in(client, partner.key)["jwt"],
        }
        assert {kind: judged(client, credential) for kind, credential in kinds.items()} == dict.fromkeys(kinds, GOOD)
    return kinds


def test_r11_what_is_of_one_environment_is_refused_in_the_other_and_told_so(plans_server, production):
    of_uat, of_production = credentials_of(plans_server), credentials_of(production)
    for server, foreign in ((plans_server, of_production), (production, of_uat)):
        with server.client() as client:
            for by in (bearer, r_auth):
                verdicts = {kind: judged(client, credential, by) for kind, credential in foreign.items()}
                assert verdicts == dict.fromkeys(foreign, ELSEWHERE)


# --- rotation and revocation ----------------------------------------------------------------------------------------------


@pytest.mark.each_database
def test_a_rotated_token_works_beside_the_new_one_until_its_overlap_is_over(plans_server, plans_client, managed, token):
    # The tokens are asked for their end again and again: more often than a starter may in an hour.
    ask("tier", "set", "patient", "--per-hour", "100000", "--per-day", "100000", data=plans_server.data)
    ask("partner", "tier", managed.id, "patient", data=plans_server.data)
    before = search(plans_client, token.text)
    assert not {"deprecation", "sunset"} & set(before.headers)
    new = rotate_token(plans_server.data, token, "--overlap", "2s")
    (old_row, new_row) = sorted(ask("token", "show", token.id, data=plans_server.data), key=lambda row: row["version"])
    ends_at, rotated_at = (datetime.fromisoformat(old_row[name]) for name in ("endsAt", "rotatedAt"))
    assert ends_at - rotated_at == timedelta(seconds=2)
    assert (old_row["tokenId"], new_row["tokenId"]) == (token.id, new.id)

    def answer_of_the_old_one():
        answer = search(plans_client, token.text)
        if answer.status_code == 200:
            assert answer.headers["deprecation"] == f"@{int(rotated_at.timestamp())}"
            assert parsedate_to_datetime(answer.headers["sunset"]) == ends_at.replace(microsecond=0)
            fresh = search(plans_client, new.text)
            assert outcome(fresh) == GOOD
            assert not {"deprecation", "sunset"} & set(fresh.headers)
        else:
            assert datetime.now().astimezone() >= ends_at
        heard.append(outcome(answer))
        return answer.status_code != 200

    heard = []
    until(answer_of_the_old_one, "the overlap ends")
    assert set(heard[:-1]) == {GOOD}
    assert heard[-1] == judged(plans_client, token.text) == ROTATED
    assert judged(plans_client, new.text) == GOOD


@pytest.mark.each_database
def test_it_is_shown_when_and_from_where_each_version_was_last_used(plans_server, plans_client, token):
    def shown():
        found = ask("token", "show", token.id, data=plans_server.data)
        return {row["tokenId"]: (row["lastUsedAt"], row["lastUsedFrom"]) for row in found}

    assert shown() == {token.id: (None, None)}
    began = datetime.now().astimezone() - timedelta(seconds=1)
    assert judged(plans_client, token.text) == GOOD
    until(lambda: shown()[token.id][1], "the use is written down")
    new = rotate_token(plans_server.data, token, "--overlap", "1h")
    first_use = shown()[token.id]
    assert shown()[new.id] == (None, None), "nobody has taken the new one into use yet: that is to be seen"
    assert judged(plans_client, new.text) == GOOD
    until(lambda: shown()[new.id][1], "the use is written down")
    assert shown()[token.id] == first_use
    for at, address in shown().values():
        assert began < datetime.fromisoformat(at) <= datetime.now().astimezone()
        assert address == "127.0.0.1"


@pytest.mark.each_database
def test_a_rotation_without_overlap_ends_the_old_token_at_once_on_every_worker(plans_workers, heeded):
    partner = add_partner(plans_workers.data)
    token = issue_token(plans_workers.data, partner.id)
    with every_worker(plans_workers) as clients:
        assert [judged(client, token.text) for client in clients] == [GOOD] * 2
        new = rotate_token(plans_workers.data, token)
        heeded(lambda: [judged(client, token.text) for client in clients], [ROTATED] * 2)
        assert [judged(client, new.text) for client in clients] == [GOOD] * 2


@pytest.mark.each_database
@pytest.mark.parametrize("again", range(5))
def test_after_a_revocation_the_very_next_request_is_refused_on_every_worker(plans_workers, heeded, again):
    partner = add_partner(plans_workers.data)
    token, other = (issue_token(plans_workers.data, partner.id) for _ in range(2))
    with every_worker(plans_workers) as clients:
        # Twice: so that each worker has it among what it remembers as good.
        assert [judged(client, token.text) for client in clients * 2] == [GOOD] * 4
        ask("token", "revoke", token.id, data=plans_workers.data)
        heeded(lambda: [judged(client, token.text) for client in clients[:: -1 if again % 2 else 1]], [REVOKED] * 2)
        assert [judged(client, other.text) for client in clients] == [GOOD] * 2


@pytest.mark.each_database
@pytest.mark.parametrize(("doing", "verdict"), [("suspend", (403, "partner_suspended")), ("deactivate", REVOKED)])
def test_what_happens_to_the_partner_holds_for_its_tokens_at_once_on_every_worker(plans_workers, heeded, doing, verdict):
    partner = add_partner(plans_workers.data)
    token = issue_token(plans_workers.data, partner.id)
    with every_worker(plans_workers) as clients:
        assert [judged(client, token.text) for client in clients] == [GOOD] * 2
        ask("partner", doing, partner.id, data=plans_workers.data)
        heeded(lambda: [judged(client, token.text) for client in clients], [verdict] * 2)
        if doing == "suspend":
            ask("partner", "resume", partner.id, data=plans_workers.data)
            heeded(lambda: [judged(client, token.text) for client in clients], [GOOD] * 2)


# --- genuine signatures of what was never issued --------------------------------------------------------------------------


def signing_keys_of(server):
    """What signs at a server, out of its data directory, by purpose: id and private key."""
    vault = Vault(MasterKeys.load(server.data / "master.key"), system_entropy)
    query = "SELECT purpose, kid, wrapped FROM signing_key WHERE signs_from IS NOT NULL AND signs_until IS NULL"
    return {
        purpose: (kid, private_key_from_bytes(vault.open(wrapped, label=b"signing-key:" + kid.encode())))
        for purpose, kid, wrapped in run_sql(server.data, query)
    }


def taken_apart(jwt):
    """Header and claims."""
    return [json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in jwt.split(".")[:2]]


def forged(server, jwt, ring, **changes):
    """A JWT with the claims of another, signed by the key that signs in one of the server's rings."""
    header, claims = taken_apart(jwt)
    kid, key = signing_keys_of(server)[ring]
    return sign_token({**claims, **changes}, key=key, kid=kid, typ=header["typ"])


@pytest.mark.each_database
def test_a_token_that_was_never_issued_is_refused_although_its_signature_is_genuine(plans_server, plans_client, token):
    header, claims = taken_apart(token.text)
    assert header["kid"] == signing_keys_of(plans_server)["access"][0]
    never = forged(plans_server, token.text, "access", jti="0" * len(claims["jti"]))
    again = forged(plans_server, token.text, "access")  # the same claims under another signature: ECDSA has many
    assert again != token.text
    assert judged(plans_client, never) == judged(plans_client, again) == INVALID
    assert judged(plans_client, token.text) == GOOD


@pytest.mark.each_database
def test_r9_no_ring_signs_for_the_other(plans_server, plans_client, managed, token):
    jwt = log_in(plans_client, managed.key)["jwt"]
    # What is forged with the right key is let in: nothing else is wrong with it.
    assert judged(plans_client, forged(plans_server, jwt, "session")) == GOOD
    assert judged(plans_client, forged(plans_server, jwt, "access")) == INVALID

    # The database holds who has which text, so a forged token is refused for that alone. As if it had been issued:
    for ring, verdict in (("access", GOOD), ("session", INVALID)):
        text = forged(plans_server, token.text, ring)
        statement = "UPDATE access_token SET digest = :digest WHERE id = :id RETURNING id"
        digest = hashlib.sha256(text.encode()).digest()
        assert run_sql(plans_server.data, statement, digest=digest, id=token.id) == [(token.id,)]
        assert judged(plans_client, text) == verdict


# --- what a token outlives ------------------------------------------------------------------------------------------------


def rotate_signing_keys(server, token):
    """Let the next key for access tokens sign at once, as it would had it been published for long; its id."""
    run_sql(server.data, "UPDATE signing_key SET published_at = published_at - 600000")
    kid = ask("signing-key", "rotate", "--purpose", "access", data=server.data)["kid"]
    with server.client() as client:
        until(lambda: taken_apart(issue_token(server.data, token.partner).text)[0]["kid"] == kid, "the new key signs")
        assert judged(client, token.text) == GOOD
    return kid


@dataclass(frozen=True)
class Held:
    """A token in a partner's hands."""

    partner: str
    text: str


def published(client):
    return {key["kid"] for key in client.get("/.well-known/jwks.json").json()["keys"]}


def states(server):
    return {key["kid"]: key["state"] for key in ask("signing-key", "list", data=server.data) if key["purpose"] == "access"}


def test_a_token_outlives_kill_9_another_port_and_two_rotations_of_the_keys(tmp_path):
    # Nobody has said what the public URL is: so the issuer's name changes with the port.
    nameless = {"GATELODGE_PUBLIC_URL": ""}
    with Server(tmp_path / "data", "--sample-api", environ=nameless) as server, server.client() as client:
        partner = add_partner(server.data)
        issued = issue_token(server.data, partner.id)
        token = Held(partner.id, issued.text)
        assert judged(client, token.text) == GOOD
        first = taken_apart(token.text)[0]["kid"]
        issuer = taken_apart(token.text)[1]["iss"]
    with Server(tmp_path / "data", "--sample-api", environ=nameless) as again:
        assert again.port != server.port
        assert taken_apart(issue_token(again.data, partner.id).text)[1]["iss"] != issuer
        for kid in (rotate_signing_keys(again, token), rotate_signing_keys(again, token)):
            assert kid != first
        assert states(again)[first] == "retiring"
        assert sorted(states(again).values()) == ["current", "next", "retiring", "retiring"]

        again.kill()
        again.start()
        with again.client() as client:
            assert judged(client, token.text) == GOOD
            refused = command("signing-key", "retire", first, data=again.data)
            assert refused.exit_code == 1
            assert len(refused.stderr.splitlines()) == 1
            assert states(again)[first] == "retiring"
            assert first in published(client)
            assert judged(client, token.text) == GOOD

            # Whoever holds the token is told of its end before the key can go.
            ask("token", "revoke", issued.id, data=again.data)
            others = [row["tokenId"] for row in ask("token", "list", partner.id, data=again.data) if row["kid"] == first]
            for other in others:
                ask("token", "revoke", other, data=again.data)
            assert judged(client, token.text) == REVOKED
            assert ask("signing-key", "retire", first, data=again.data)["state"] == "gone"
            until(lambda: first not in published(client), "the key set is without it")
