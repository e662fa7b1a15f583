"""The gate in applications of an API's owner: each example as a process of its own, beside a server on the same data."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import httpx2
import pytest
from harness import Server, clean_environment
from outside import (
    Partner,
    add_partner,
    ask,
    bearer,
    command,
    connect,
    create_company,
    fresh,
    log_in,
    outcome,
    problem,
    r_auth,
    until,
)

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("starlette", "fastapi", "litestar")
ORDER = {"part": "brake pad", "quantity": 4}
SAMPLE_CALL = "/api/v2/Partners/PlansSearchAsync/VIN"
SAMPLE_BODY = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}
IN_AN_HOUR, IN_A_DAY = 100, 1000
"""What the tier allows that partners have at first."""


class Example:
    """An example that uvicorn serves on a free loopback port, with the certificate that ``server`` has made or with none."""

    def __init__(self, name: str, server: Server, *, tls: bool = True, **environ: str) -> None:
        self._server = server
        self._scheme = "https" if tls else "http"
        directory = server.data / "tls"
        certificate = ("--ssl-certfile", directory / "server.pem", "--ssl-keyfile", directory / "server.key") if tls else ()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", f"examples.{name}_app:app", "--port", "0", *certificate],
            cwd=ROOT,
            env=clean_environment({"GATELODGE_DATA": str(server.data), **environ}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.port = 0
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._drain()

    def wait(self) -> Self:
        """Return once it listens."""
        for line in self.process.stderr:
            self._lines.append(line)
            if listening := re.search(r"running on https?://127\.0\.0\.1:(\d+)", line):
                self.port = int(listening[1])
                self._reader.start()
                return self
        raise AssertionError(f"it did not start: {''.join(self._lines)[-2000:]}")

    def client(self, **options: object) -> httpx2.Client:
        url = f"{self._scheme}://127.0.0.1:{self.port}"
        return httpx2.Client(base_url=url, verify=self.tls(), timeout=30, trust_env=False, **options)

    def tls(self):
        return self._server.tls()

    def stop(self) -> tuple[int, str]:
        """SIGTERM; its exit code and all that it has logged."""
        self.process.terminate()
        self._drain()
        return self.process.returncode, "".join(self._lines)

    def _drain(self) -> None:
        if self._reader.is_alive():
            self._reader.join(60)
        self.process.wait(60)
        self.process.stderr.close()

    def _read(self) -> None:
        self._lines.extend(self.process.stderr)


@pytest.fixture(scope="module")
def lodge(tmp_path_factory):
    """`gatelodge serve`, under the URL that it listens on, with the sample API."""
    environ = {"GATELODGE_PUBLIC_URL": "", "GATELODGE_LOGIN_FAILURE_LIMIT": "1000000/minute"}
    with Server(tmp_path_factory.mktemp("frameworks") / "data", "--sample-api", environ=environ) as running:
        yield running


@pytest.fixture(scope="module")
def lodge_client(lodge):
    with lodge.client() as client:
        yield client


@pytest.fixture(scope="module")
def desks(lodge):
    """The examples over the data of ``lodge``; all start at once."""
    with contextlib.ExitStack() as stack:
        desks = {name: stack.enter_context(Example(name, lodge)) for name in FRAMEWORKS}
        for desk in desks.values():
            desk.wait()
        yield desks


@pytest.fixture(params=FRAMEWORKS)
def framework(request) -> str:
    return request.param


@pytest.fixture
def desk(framework, desks):
    """A client of one of them."""
    with desks[framework].client() as client:
        yield client


@pytest.fixture
def acme(lodge) -> Partner:
    """A partner whom no other test knows."""
    return add_partner(lodge.data)


def order(client: httpx2.Client, headers: Mapping[str, str], **more: object) -> httpx2.Response:
    return client.post("/orders", json={**ORDER, **more}, headers=headers)


# --- who is let in --------------------------------------------------------------------------------------------------------


def test_every_kind_of_credential_lets_its_holder_in_and_the_handler_learns_who_that_is(desk, lodge, lodge_client, acme):
    token = ask("token", "issue", acme.id, data=lodge.data)["token"]
    company = create_company(lodge_client, acme.key)
    jwt = log_in(lodge_client, acme.key)["jwt"]
    company_jwt = log_in(lodge_client, company["apiKey"])["jwt"]
    of_partner = (bearer(acme.key), r_auth(acme.key), bearer(token), bearer(jwt), r_auth(jwt))
    of_company = (bearer(company["apiKey"]), r_auth(company_jwt))
    for headers, whose in [*((way, None) for way in of_partner), *((way, company["companyId"]) for way in of_company)]:
        answer = order(desk, headers)
        assert answer.status_code == 201, answer.text
        taken = answer.json()
        assert {**ORDER, "number": taken["number"], "partner": acme.id, "company": whose} == taken


def test_a_partner_sees_its_own_orders_only(desk, lodge, acme):
    other = add_partner(lodge.data)
    number = order(desk, bearer(acme.key)).json()["number"]
    order(desk, bearer(other.key))
    assert [taken["number"] for taken in desk.get("/orders", headers=r_auth(acme.key)).json()] == [number]


def test_who_has_no_credential_is_told_which_would_do(desk):
    answer = order(desk, {})
    assert outcome(answer) == (401, "credential_required")
    assert answer.headers["www-authenticate"] == 'Bearer realm="gatelodge"'
    assert "ratelimit" not in answer.headers


def test_who_has_a_wrong_credential_learns_nothing_but_that(desk):
    answer = order(desk, bearer("gatelodge_uat_x_y_z"))
    assert outcome(answer) == (401, "invalid_credential")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_a_body_that_names_another_partner_is_refused_and_the_handler_is_not_called(desk, lodge, acme):
    other = add_partner(lodge.data)
    before = order(desk, bearer(acme.key), partner=acme.id)
    refused = order(desk, bearer(acme.key), partner=other.id)
    after = order(desk, bearer(acme.key))
    assert outcome(refused) == (401, "partner_mismatch")
    assert after.json()["number"] == before.json()["number"] + 1  # each call of the handler takes a number
    assert other.id not in desk.get("/orders", headers=bearer(acme.key)).text


def test_a_key_that_a_command_has_revoked_is_refused_from_then_on(desk, lodge, lodge_client, acme):
    jwt = log_in(lodge_client, acme.key)["jwt"]
    assert order(desk, bearer(acme.key)).status_code == order(desk, bearer(jwt)).status_code == 201
    assert command("key", "revoke", acme.key_id, data=lodge.data).exit_code == 0
    assert outcome(order(desk, bearer(acme.key))) == (401, "credential_revoked")
    assert outcome(order(desk, bearer(jwt))) == (401, "credential_revoked")


# --- how much -------------------------------------------------------------------------------------------------------------


def test_every_answer_that_the_gate_lets_through_says_what_is_left(desk, acme):
    first, second = (order(desk, bearer(acme.key)).headers for _ in range(2))
    assert first["ratelimit-policy"] == f'"hour";q={IN_AN_HOUR};w=3600, "day";q={IN_A_DAY};w=86400'
    assert re.fullmatch(rf'"hour";r=\d+;t=\d+, "day";r={IN_A_DAY - 1};t=\d+', first["ratelimit"])
    assert re.fullmatch(rf'"hour";r=\d+;t=\d+, "day";r={IN_A_DAY - 2};t=\d+', second["ratelimit"])
    assert second["x-ratelimit-limit"] == str(IN_AN_HOUR)


def test_what_is_refused_is_not_counted(desk, lodge, acme):
    assert order(desk, bearer(acme.key), partner="somebody-else").status_code == 401
    assert f"r={IN_A_DAY - 1};" in order(desk, bearer(acme.key)).headers["ratelimit"]


def test_a_quota_is_one_over_this_process_and_the_server_beside_it(desk, lodge, lodge_client):
    limit, tier = 6, fresh("tier-")
    ask("tier", "set", tier, "--per-hour", str(limit), "--per-day", str(limit), data=lodge.data)
    added = ask("partner", "add", fresh("Small "), "--email", "a@b.example", "--tier", tier, data=lodge.data)
    headers = bearer(added["apiKey"])
    answers = []
    for _ in range(limit):
        answers.append(order(desk, headers))
        answers.append(lodge_client.post(SAMPLE_CALL, json=SAMPLE_BODY, headers=headers))
    assert [answer.status_code for answer in answers] == [201, 200] * (limit // 2) + [429] * limit
    for refused in answers[limit:]:
        assert refused.json()["code"] == "quota_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-ratelimit-remaining"] == "0"


# --- how it is served -----------------------------------------------------------------------------------------------------


def test_plain_http_gets_no_word_out_of_a_port_that_speaks_tls(framework, desks, acme):
    request = f"GET /orders HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {acme.key}\r\n\r\n"
    with connect(desks[framework], tls=False) as connection:
        connection.sendall(request.encode("ascii"))
        connection.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(4096):
                said += part
    assert b"HTTP/" not in said


def test_behind_a_proxy_that_ends_tls_its_word_decides_and_sigterm_ends_it_with_nothing_lost(
    framework, lodge, lodge_client, acme
):
    secure = {**bearer(acme.key), "X-Forwarded-Proto": "https"}
    with Example(framework, lodge, tls=False).wait() as plain:
        with plain.client() as client:
            assert outcome(order(client, bearer(acme.key))) == (403, "https_required")
            # The eighth makes this process lease more than it uses: it has to give that back.
            assert [order(client, secure).status_code for _ in range(8)] == [201] * 8
        code, log = plain.stop()
    assert code == -signal.SIGTERM  # uvicorn ends in order, and then as it was told to
    assert log.index("Application shutdown complete.") < log.index("Finished server process")
    assert "Traceback" not in log
    assert acme.key not in log
    usage = lodge_client.get("/api/v2/Partners/Register/Usage", headers=bearer(acme.key)).json()["usage"]
    assert usage["day"]["used"] == 8


# --- without the server package -------------------------------------------------------------------------------------------


def on_another_host(server: Server) -> Example:
    """The service that has nothing of the deployment but its URL."""
    environ = {"GATELODGE_ISSUER": f"https://localhost:{server.port}", "SSL_CERT_FILE": str(server.authority)}
    return Example("offline", server, GATELODGE_DATA="", **environ).wait()


@pytest.fixture(scope="module")
def stock(lodge):
    """A client of it."""
    with on_another_host(lodge) as running, running.client() as client:
        yield client


def test_offline_a_session_jwt_lets_its_holder_in_and_nothing_is_counted(stock, lodge_client, acme):
    answer = stock.get("/stock/brake-pad", headers=r_auth(log_in(lodge_client, acme.key)["jwt"]))
    assert (answer.status_code, answer.json()) == (200, {"part": "brake-pad", "stock": 112, "askedBy": acme.id})
    assert "ratelimit" not in answer.headers


def test_offline_api_keys_and_access_tokens_are_refused_since_only_their_issuer_knows_them(stock, lodge, acme):
    token = ask("token", "issue", acme.id, data=lodge.data)["token"]
    for credential in (acme.key, token):
        assert outcome(stock.get("/stock/brake-pad", headers=bearer(credential))) == (401, "invalid_credential")
    assert problem(stock.get("/stock/brake-pad"))["code"] == "credential_required"


def test_r25_offline_a_session_that_has_ended_is_refused_once_its_end_was_heard(stock, lodge_client, acme):
    session = log_in(lodge_client, acme.key)
    assert stock.get("/stock/brake-pad", headers=r_auth(session["jwt"])).status_code == 200
    ended = lodge_client.post("/auth/logout", json={"refreshToken": session["refreshToken"]}, params={"wait": "10"}).json()
    assert (ended["verifiers"], ended["acknowledged"]) == (1, 1)
    assert outcome(stock.get("/stock/brake-pad", headers=r_auth(session["jwt"]))) == (401, "credential_revoked")


def test_offline_the_feed_is_followed_before_anybody_has_asked_for_anything_and_until_sigterm(tmp_path):
    with (
        Server(tmp_path / "data", environ={"GATELODGE_PUBLIC_URL": ""}) as server,
        server.client() as client,
        on_another_host(server) as running,
    ):
        key = add_partner(server.data).key

        def is_followed():
            ended = client.post("/auth/logout", headers=r_auth(log_in(client, key)["jwt"]), params={"wait": "10"}).json()
            return (ended["verifiers"], ended["acknowledged"]) == (1, 1)

        until(is_followed, "the issuer hears of a verifier")
        code, log = running.stop()
    assert code == -signal.SIGTERM
    assert "Application shutdown complete." in log
    assert "Traceback" not in log
