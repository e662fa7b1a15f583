"""The partner's way through login, companies and refresh, as the published examples write it: with curl."""

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from outside import RFC3339, UUID, add_partner, company, create_company, log_in, outcome, refresh, until, whoami

pytestmark = pytest.mark.each_database
TOKENS = {"jwt", "expirationDate", "refreshToken", "refreshTokenExpiration"}


@dataclass
class Curl:
    """Runs curl against one server and gives status and body."""

    program: str
    authority: str
    url: str

    def __call__(self, *arguments: str) -> tuple[int, Any]:
        command = [self.program, "--silent", "--show-error", "--cacert", self.authority, "--write-out", "\n%{http_code}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        body, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(body) if body else None

    def post(self, path: str, body: str, *headers: str) -> tuple[int, Any]:
        """In the very words of the examples: --location, --header, --data-raw."""
        extra = [part for header in headers for part in ("--header", header)]
        return self("--location", f"{self.url}{path}", *extra, "--header", "Content-Type: application/json", "--data-raw", body)


@pytest.fixture
def program():
    found = shutil.which("curl")
    assert found, "curl is needed: the published examples are curl commands"
    return found


@pytest.fixture
def curl(program, server):
    return Curl(program, str(server.authority), server.url)


def in_lines(**fields: str) -> str:
    """JSON as the examples lay it out: a line for each brace and field."""
    return json.dumps(fields, indent=0)


def assert_tokens(answer, *, jwt_life, refresh_life):
    assert set(answer) == TOKENS
    now = datetime.now().astimezone()
    for name, life in (("expirationDate", jwt_life), ("refreshTokenExpiration", refresh_life)):
        assert RFC3339.fullmatch(answer[name]), answer[name]
        left = datetime.fromisoformat(answer[name]) - now
        assert life - timedelta(minutes=5) < left <= life
    assert answer["jwt"].count(".") == 2
    assert all(isinstance(answer[name], str) and answer[name] for name in TOKENS)


def test_a_partner_logs_in_creates_companies_and_they_log_in(curl, partner):
    status, session = curl.post("/auth/login", in_lines(apiKey=partner.key))
    assert status == 200
    assert_tokens(session, jwt_life=timedelta(hours=24), refresh_life=timedelta(days=30))

    for path in ("/companies", "/white-label-partner/create-company"):
        status, created = curl.post(path, json.dumps(company()), f"R-Auth: {session['jwt']}")
        assert status == 201
        assert set(created) == {"companyId", "apiKey"}
        assert UUID.fullmatch(created["companyId"])

        status, company_session = curl.post("/auth/login", in_lines(apiKey=created["apiKey"]))
        assert status == 200
        assert_tokens(company_session, jwt_life=timedelta(hours=24), refresh_life=timedelta(days=30))

        status, shown = curl(f"{curl.url}/companies/{created['companyId']}", "--header", f"R-Auth: {session['jwt']}")
        assert (status, shown["companyId"]) == (200, created["companyId"])


def test_a_refresh_gives_four_new_fields_and_kills_the_old_refresh_token(curl, partner):
    _, first = curl.post("/auth/login", json.dumps({"apiKey": partner.key}))
    status, second = curl.post("/auth/refresh", in_lines(refreshToken=first["refreshToken"]))
    assert status == 200
    assert_tokens(second, jwt_life=timedelta(hours=24), refresh_life=timedelta(days=30))
    assert second["jwt"] != first["jwt"]
    assert second["refreshToken"] != first["refreshToken"]

    status, refused = curl.post("/auth/refresh", json.dumps({"refreshToken": first["refreshToken"]}))
    assert (status, refused["code"]) == (401, "refresh_token_reused")
    # ... and the reuse has ended the session, its newest tokens included.
    status, refused = curl.post("/auth/refresh", json.dumps({"refreshToken": second["refreshToken"]}))
    assert (status, refused["code"]) == (401, "refresh_token_reused")
    status, refused = curl(f"{curl.url}/companies", "--header", f"R-Auth: {second['jwt']}")
    assert (status, refused["code"]) == (401, "credential_revoked")


def test_an_expired_jwt_is_told_so_and_a_refresh_gets_the_next(program, strict_server):
    curl = Curl(program, str(strict_server.authority), strict_server.url)
    partner = add_partner(strict_server.data)
    status, session = curl.post("/auth/login", json.dumps({"apiKey": partner.key}))
    assert status == 200

    def expired():
        status, answer = curl(f"{curl.url}/companies", "--header", f"R-Auth: {session['jwt']}")
        assert status in {200, 401}
        return answer if status == 401 else None

    assert until(expired, "the JWT expires")["code"] == "credential_expired"

    def good_again():
        nonlocal session
        status, session = curl.post("/auth/refresh", json.dumps({"refreshToken": session["refreshToken"]}))
        assert status == 200
        return curl(f"{curl.url}/companies", "--header", f"R-Auth: {session['jwt']}")[0] == 200

    until(good_again, "a fresh JWT is taken")


def test_a_jwt_expires_at_the_second_that_its_answer_names_and_not_before(strict_server):
    partner = add_partner(strict_server.data)
    with strict_server.client() as client:
        client.get("/healthz")
        session = log_in(client, partner.key)
        expiry = datetime.fromisoformat(session["expirationDate"]).timestamp()
        verdicts = []
        while not verdicts or verdicts[-1][1] == (200, None):
            began = time.time()
            verdicts.append((began, whoami(client, session["jwt"]), time.time()))
        assert verdicts[-1][1] == (401, "credential_expired")
        assert verdicts[-1][2] >= expiry
        assert all(began < expiry for began, verdict, _ in verdicts if verdict == (200, None))


def test_a_jwt_that_is_shown_for_the_first_time_after_its_end_has_expired(strict_server):
    with strict_server.client() as client:
        session = log_in(client, add_partner(strict_server.data).key)
        expiry = datetime.fromisoformat(session["expirationDate"])
        until(lambda: datetime.now().astimezone() >= expiry, "the time comes")
        assert whoami(client, session["jwt"]) == (401, "credential_expired")
        assert outcome(refresh(client, session["refreshToken"])) == (200, None)


def test_r23_a_chain_of_refreshes_never_repeats_a_token(client, tokens):
    seen = [tokens]
    for _ in range(10):
        answer = refresh(client, seen[-1]["refreshToken"])
        assert outcome(answer) == (200, None)
        seen.append(answer.json())
    assert len({answer["refreshToken"] for answer in seen}) == len(seen)
    assert len({answer["jwt"] for answer in seen}) == len(seen)
    assert whoami(client, seen[0]["jwt"]) == (200, None)


@pytest.mark.parametrize("old", [0, 1, 2], ids=["the-first", "the-second", "the-third"])
def test_r24_any_spent_token_of_a_chain_ends_the_whole_chain(client, tokens, old):
    chain = [tokens]
    for _ in range(3):
        chain.append(refresh(client, chain[-1]["refreshToken"]).json())
    assert outcome(refresh(client, chain[old]["refreshToken"])) == (401, "refresh_token_reused")
    for session in chain:
        assert outcome(refresh(client, session["refreshToken"])) == (401, "refresh_token_reused")
        assert whoami(client, session["jwt"]) == (401, "credential_revoked")


def test_reuse_in_one_session_leaves_the_partners_other_sessions_alone(client, partner, tokens):
    other = log_in(client, partner.key)
    refresh(client, tokens["refreshToken"])
    assert outcome(refresh(client, tokens["refreshToken"])) == (401, "refresh_token_reused")
    assert whoami(client, other["jwt"]) == (200, None)
    assert outcome(refresh(client, other["refreshToken"])) == (200, None)


def test_r53_a_login_answers_for_its_own_key_whatever_else_the_body_says(client, partner):
    extra = {"partnerId": "somebody-else", "companyId": "x", "tier": "gold", "env": "production", "scope": "everything"}
    answer = client.post("/auth/login", json={"apiKey": partner.key, **extra})
    assert set(answer.json()) == TOKENS
    own = create_company(client, partner.key)
    listed = client.get("/companies", headers={"R-Auth": answer.json()["jwt"]}).json()["companies"]
    assert [found["companyId"] for found in listed] == [own["companyId"]]
