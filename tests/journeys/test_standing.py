"""How a credential is judged through its life, and what its presenter is told: much if it is genuine, else nothing."""

import asyncio
from datetime import datetime

import pytest
from outside import (
    add_partner,
    ask,
    bearer,
    create_company,
    id_of,
    log_in,
    outcome,
    problem,
    r_auth,
    refresh,
    run_sql,
    until,
    whoami,
)

from gatelodge.tokens import generate_private_key, public_jwk, sign_token
from gatelodge.wire import ApiKey, checksum
from gatelodge_server.app import assemble
from gatelodge_server.core.secrets import Secret
from gatelodge_server.deployment import load_master_keys, prepare
from gatelodge_server.settings import load_settings
from gatelodge_server.vault import Vault, system_entropy

pytestmark = pytest.mark.each_database
PRODUCTION_URL = "https://production.example"
GOOD = (200, None)
REVOKED = (401, "credential_revoked")
ROTATED = (401, "credential_rotated")
EXPIRED = (401, "credential_expired")
SUSPENDED = (403, "partner_suspended")
INVALID = (401, "invalid_credential")
ELSEWHERE = (401, "wrong_environment")
COMPANYS = (403, "insufficient_scope")


def login(client, key):
    return outcome(client.post("/auth/login", json={"apiKey": key}))


class World:
    """A partner with a session, and its company with one."""

    def __init__(self, client, partner):
        self.client, self.partner = client, partner
        self.session = log_in(client, partner.key)
        self.company = create_company(client, partner.key)
        self.company_session = log_in(client, self.company["apiKey"])

    def keys(self):
        """How the partner's key, and then the company's, is judged as a credential and at a login."""
        judged = [whoami(self.client, self.partner.key), login(self.client, self.partner.key)]
        judged += [whoami(self.client, self.company["apiKey"]), login(self.client, self.company["apiKey"])]
        return judged

    def sessions(self):
        """How the JWTs and the refresh tokens of both are judged. A good refresh is not tried."""
        judged = [whoami(self.client, self.session["jwt"]), whoami(self.client, self.company_session["jwt"])]
        if judged[0] != GOOD:
            judged += [
                outcome(refresh(self.client, session["refreshToken"])) for session in (self.session, self.company_session)
            ]
        return judged


@pytest.fixture
def world(client, partner):
    return World(client, partner)


def test_a_suspended_partner_is_told_so_and_after_resume_its_keys_work_and_its_sessions_stay_dead(server, world, heeded):
    assert world.keys() == [GOOD, GOOD, COMPANYS, GOOD]
    assert world.sessions() == [GOOD, COMPANYS]

    ask("partner", "suspend", world.partner.id, data=server.data)
    heeded(lambda: set(world.keys()), {SUSPENDED})
    heeded(lambda: set(world.sessions()), {SUSPENDED})

    ask("partner", "resume", world.partner.id, data=server.data)
    heeded(world.keys, [GOOD, GOOD, COMPANYS, GOOD])
    # Housekeeping may have deleted one by now: there is nothing left to tell of it.
    assert set(world.sessions()) <= {REVOKED, EXPIRED}


def test_r38_a_deactivated_partner_is_out_for_good_with_all_that_is_its_own(server, world, heeded):
    assert world.keys() == [GOOD, GOOD, COMPANYS, GOOD]
    assert world.sessions() == [GOOD, COMPANYS]
    ask("partner", "deactivate", world.partner.id, data=server.data)
    heeded(lambda: set(world.keys()), {REVOKED})
    heeded(lambda: set(world.sessions()), {REVOKED})


def test_r40_a_rotated_key_is_told_so_at_once_and_its_sessions_are_dead(server, client, world, heeded):
    assert whoami(client, world.partner.key) == whoami(client, world.session["jwt"]) == GOOD
    issued = ask("key", "rotate", world.partner.key_id, data=server.data)
    assert issued["keyId"] == id_of(issued["apiKey"])
    heeded(lambda: whoami(client, world.partner.key), ROTATED)
    heeded(lambda: whoami(client, world.session["jwt"]), ROTATED)
    assert login(client, world.partner.key) == outcome(refresh(client, world.session["refreshToken"])) == ROTATED
    assert login(client, issued["apiKey"]) == GOOD
    # The company has a key of its own: nothing has become of it.
    assert login(client, world.company["apiKey"]) == GOOD


def test_a_key_rotated_with_an_overlap_works_beside_the_new_one_until_it_is_over(server, client, partner):
    session = log_in(client, partner.key)
    issued = ask("key", "rotate", partner.key_id, "--overlap", "2s", data=server.data)
    assert login(client, issued["apiKey"]) == GOOD
    until(lambda: login(client, partner.key) == ROTATED, "the overlap ends")
    listed = {key["keyId"]: key for key in ask("key", "list", partner.id, data=server.data)}
    assert datetime.fromisoformat(listed[partner.key_id]["endsAt"]) <= datetime.now().astimezone()
    assert listed[partner.key_id]["status"] == "rotated"
    assert whoami(client, session["jwt"]) == outcome(refresh(client, session["refreshToken"])) == ROTATED
    assert login(client, issued["apiKey"]) == GOOD


def test_within_the_overlap_the_old_key_and_its_sessions_work(server, client, partner):
    session = log_in(client, partner.key)
    ask("key", "rotate", partner.key_id, "--overlap", "1h", data=server.data)
    assert login(client, partner.key) == whoami(client, session["jwt"]) == GOOD
    assert outcome(refresh(client, session["refreshToken"])) == GOOD


def test_a_revoked_key_is_told_so_at_once_and_its_sessions_are_dead(server, client, world, heeded):
    assert whoami(client, world.partner.key) == whoami(client, world.session["jwt"]) == GOOD
    ask("key", "revoke", world.partner.key_id, data=server.data)
    heeded(lambda: whoami(client, world.partner.key), REVOKED)
    heeded(lambda: whoami(client, world.session["jwt"]), REVOKED)
    assert login(client, world.partner.key) == outcome(refresh(client, world.session["refreshToken"])) == REVOKED


def test_a_key_revoked_during_its_overlap_ends_at_once(server, client, partner):
    ask("key", "rotate", partner.key_id, "--overlap", "1h", data=server.data)
    ask("key", "revoke", partner.key_id, data=server.data)
    assert login(client, partner.key) == REVOKED


def test_a_key_past_its_end_is_told_that_it_has_expired(server, client, partner):
    session = log_in(client, partner.key)
    expire = "UPDATE credential SET ends_at = created_at + 1, end_cause = 'expired' WHERE id = :id RETURNING id"
    assert run_sql(server.data, expire, id=partner.key_id) == [(partner.key_id,)]
    assert whoami(client, partner.key) == login(client, partner.key) == EXPIRED
    assert whoami(client, session["jwt"]) == outcome(refresh(client, session["refreshToken"])) == EXPIRED


@pytest.mark.parametrize("by", ["refresh-token", "jwt-in-r-auth", "jwt-as-bearer"])
def test_a_logout_ends_its_session_and_no_other(client, partner, by):
    session, other = log_in(client, partner.key), log_in(client, partner.key)
    ways = {
        "refresh-token": {"json": {"refreshToken": session["refreshToken"]}},
        "jwt-in-r-auth": {"headers": r_auth(session["jwt"])},
        "jwt-as-bearer": {"headers": bearer(session["jwt"]), "json": {}},
    }
    answer = client.post("/auth/logout", **ways[by])
    assert (answer.status_code, answer.content) == (204, b"")
    assert whoami(client, session["jwt"]) == REVOKED
    assert outcome(refresh(client, session["refreshToken"])) == REVOKED
    assert whoami(client, other["jwt"]) == GOOD


def test_a_logout_with_a_refresh_token_may_be_repeated(client, tokens):
    body = {"refreshToken": tokens["refreshToken"]}
    assert [client.post("/auth/logout", json=body).status_code for _ in range(2)] == [204, 204]


def test_a_logout_with_a_spent_refresh_token_ends_the_session_too(client, tokens):
    newer = refresh(client, tokens["refreshToken"]).json()
    assert client.post("/auth/logout", json={"refreshToken": tokens["refreshToken"]}).status_code == 204
    assert whoami(client, newer["jwt"]) == REVOKED


def test_a_logout_needs_a_session(client, partner):
    assert outcome(client.post("/auth/logout")) == (401, "credential_required")
    assert outcome(client.post("/auth/logout", json={})) == (401, "credential_required")
    assert outcome(client.post("/auth/logout", headers=bearer(partner.key))) == INVALID
    assert outcome(client.post("/auth/logout", json={"refreshToken": "nonsense"})) == INVALID
    assert login(client, partner.key) == GOOD


# --- the other environment ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def production(tmp_path_factory):
    """What another deployment gave out, for the environment `production`."""
    data = tmp_path_factory.mktemp("production") / "data"
    variables = {"GATELODGE_ENVIRONMENT": "production", "GATELODGE_PUBLIC_URL": PRODUCTION_URL}
    partner = add_partner(data, **variables)
    settings = load_settings({"data": str(data)}, variables)
    prepare(settings, {})

    async def open_session():
        lodge = assemble(settings, Vault(load_master_keys(settings, {}), system_entropy))
        try:
            return await lodge.sessions.log_in(Secret(partner.key))
        finally:
            await lodge.close()

    tokens = asyncio.run(open_session())
    return {"key": partner.key, "jwt": tokens.jwt.reveal(), "refreshToken": tokens.refresh_token.reveal()}


def test_r11_what_another_environment_gave_out_is_told_that_it_is_not_of_here(client, production):
    assert production["key"].startswith("gatelodge_production_pk_")
    assert login(client, production["key"]) == ELSEWHERE
    assert whoami(client, production["key"]) == ELSEWHERE
    assert whoami(client, production["jwt"]) == ELSEWHERE
    assert outcome(refresh(client, production["refreshToken"])) == ELSEWHERE
    assert outcome(client.post("/auth/logout", json={"refreshToken": production["refreshToken"]})) == ELSEWHERE
    assert outcome(client.post("/auth/logout", headers=r_auth(production["jwt"]))) == ELSEWHERE


def test_r11_the_other_environment_is_not_the_same_deployment_under_another_name(client, partner, tokens):
    # The marking is under the checksum and under the MAC: written over, it makes another credential, not an alias.
    key = ApiKey.parse(partner.key)
    assert key is not None
    renamed = ApiKey(key.brand, "production", key.kind, key.id, key.secret)
    assert login(client, renamed.text) == ELSEWHERE
    token = tokens["refreshToken"].replace("_uat_", "_production_", 1)
    assert outcome(refresh(client, token)) == ELSEWHERE
    assert outcome(refresh(client, tokens["refreshToken"])) == GOOD


def test_a_jwt_of_the_other_environment_signed_by_nobody_we_know_is_told_the_same(client):
    key = generate_private_key()
    claims = {"iss": PRODUCTION_URL, "aud": "partner-api-production", "env": "production", "iat": 1, "exp": 2}
    assert whoami(client, sign_token(claims, key=key, kid=public_jwk(key)["kid"], typ="at+jwt")) == ELSEWHERE


# --- what is no credential of ours ----------------------------------------------------------------------------------------


def with_checksum(body):
    return body + checksum(body)


def other_secret(key):
    """The key with another secret, its checksum right."""
    return with_checksum(key[:-36] + "0" * 30)


def unknown(kind):
    return with_checksum(f"gatelodge_uat_{kind}_{'0' * 12}_{'0' * 30}")


def invalid_keys(partner):
    good = partner.key
    flipped = good[:-1] + ("0" if good[-1] != "0" else "1")
    return {
        "empty": "",
        "a-word": "nonsense",
        "checksum-broken": flipped,
        "unknown-partner-key": unknown("pk"),
        "unknown-company-key": unknown("ck"),
        "wrong-secret": other_secret(good),
        "wrong-kind": with_checksum(good[:-6].replace("_pk_", "_ck_")),
        "another-brand": with_checksum("x" + good[1:-6]),
        "space-behind": good + " ",
        "newline-behind": good + "\n",
        "upper-case-prefix": good.replace("gatelodge", "Gatelodge"),
        "not-ascii": good[:-1] + "ö",
        "a-nul": good + "\0",
        "very-long": good * 100,
        "two-dots": "a.b.c",
    }


def telling(answer):
    """All of an answer that could tell one refusal from another."""
    body = {name: value for name, value in problem(answer).items() if name != "requestId"}
    headers = {name: value for name, value in answer.headers.items() if name not in {"x-request-id", "date", "content-length"}}
    return answer.status_code, body, headers, len(answer.content) - len(answer.headers["x-request-id"])


def test_whatever_is_no_credential_is_answered_in_the_very_same_words(client, partner, tokens):
    at_login = [client.post("/auth/login", json={"apiKey": key}) for key in invalid_keys(partner).values()]
    assert {outcome(answer) for answer in at_login} == {INVALID}
    first = telling(at_login[0])
    assert all(telling(answer) == first for answer in at_login)

    token = tokens["refreshToken"]
    forged = [token[:-1] + ("A" if token[-1] != "A" else "B"), token + "A", token[:-1], "x", "", tokens["jwt"], partner.key]
    at_refresh = [refresh(client, each) for each in forged]
    assert all(telling(answer) == first for answer in at_refresh)

    in_header = [
        client.get("/companies", headers={"R-Auth": key.encode()})
        for name, key in invalid_keys(partner).items()
        if name not in {"space-behind", "newline-behind", "a-nul"}  # no header can hold the difference
    ]
    assert all(telling(answer) == first for answer in in_header)
    assert outcome(refresh(client, token)) == GOOD


def test_r9_a_credential_of_one_kind_is_none_of_another(client, partner, tokens):
    assert whoami(client, tokens["refreshToken"]) == INVALID
    assert login(client, tokens["jwt"]) == INVALID
    assert login(client, tokens["refreshToken"]) == INVALID
    assert outcome(refresh(client, tokens["jwt"])) == INVALID
    assert outcome(refresh(client, partner.key)) == INVALID
    assert outcome(client.post("/auth/logout", json={"refreshToken": tokens["jwt"]})) == INVALID


def test_r29_a_refresh_token_needs_no_key_and_a_refused_one_is_not_spent(client, tokens):
    for headers in ({"Idempotency-Key": "two words"}, {"Content-Type": "text/plain"}):
        assert refresh(client, tokens["refreshToken"], **headers).status_code in {400, 415}
    assert outcome(refresh(client, tokens["refreshToken"])) == GOOD
