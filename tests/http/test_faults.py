"""When it is the service that is at fault: nothing of it gets out but a number to ask about."""

import json
import sqlite3
from contextlib import contextmanager

import pytest
from outside import add_partner, company, log_in, outcome, problem, r_auth, refresh
from starlette.routing import Route, Router

from gatelodge_server.http.draining import Draining
from gatelodge_server.http.edge import Edge, TrustedProxies


def edge_over(endpoint):
    async def asgi(scope, receive, send):
        await endpoint(scope, receive, send)

    class Endpoint:
        async def __call__(self, scope, receive, send):
            await asgi(scope, receive, send)

    routes = [Route("/mistaken", Endpoint(), methods=["GET"])]
    return Edge(operations=[], router=Router(routes), proxies=TrustedProxies([]), draining=Draining(), boot_id="boot")


async def ask_edge(edge, path="/mistaken"):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "GET",
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("192.0.2.1", 1),
    }
    try:
        await edge(scope, receive, send)
    except RuntimeError as mistake:
        return sent, mistake
    return sent, None


async def test_r45_a_mistake_of_ours_is_a_problem_document_that_shows_nothing_of_it():
    async def mistaken(*_):
        raise RuntimeError("SELECT secret FROM credential -- hunter2")

    sent, raised = await ask_edge(edge_over(mistaken))
    assert raised is None
    start, body = sent
    headers = dict(start["headers"])
    assert start["status"] == 500
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"cache-control"] == b"no-store"
    told = json.loads(body["body"])
    assert set(told) == {"type", "title", "status", "detail", "code", "requestId"}
    assert (told["status"], told["code"]) == (500, "internal_error")
    assert told["requestId"].encode() == headers[b"x-request-id"]
    assert b"hunter2" not in body["body"]
    assert b"RuntimeError" not in body["body"]


async def test_r45_a_mistake_in_the_midst_of_an_answer_breaks_it_off():
    async def mistaken(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("too late to say anything else")

    sent, raised = await ask_edge(edge_over(mistaken))
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert str(raised) == "too late to say anything else"


async def test_a_path_that_the_router_does_not_know_is_a_problem_document():
    async def fine(*_):
        raise AssertionError("not asked for")

    sent, _ = await ask_edge(edge_over(fine), "/elsewhere")
    assert sent[0]["status"] == 404


@contextmanager
def somebody_who_writes(data):
    """Another process that holds the database's write lock and does not let go."""
    database = sqlite3.connect(data / "gatelodge.db", isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        yield
    finally:
        database.rollback()
        database.close()


def test_r72_while_nothing_can_be_written_the_answer_is_503_and_nothing_is_given_out(server, client, partner):
    session = log_in(client, partner.key)
    with somebody_who_writes(server.data):
        answer = client.post("/auth/login", json={"apiKey": partner.key})
        assert outcome(answer) == (503, "unavailable")
        assert set(problem(answer)) == {"type", "title", "status", "detail", "code", "requestId"}
        # Reading goes on.
        assert client.get("/companies", headers=r_auth(session["jwt"])).status_code == 200
        assert client.get("/readyz").status_code == 200
    assert outcome(refresh(client, session["refreshToken"])) == (200, None)
    assert client.post("/companies", json=company(), headers=r_auth(partner.key)).status_code == 201
    assert log_in(client, partner.key)


@pytest.mark.parametrize("damage", ["gone", "garbage"])
def test_r72_a_database_that_cannot_be_read_lets_nobody_in(strict_server, damage):
    # The tables go, under a server that runs: as after a disk that lost them.
    partner = add_partner(strict_server.data)
    with strict_server.client() as client:
        database = sqlite3.connect(strict_server.data / "gatelodge.db", isolation_level=None)
        change = {"gone": "ALTER TABLE {0} RENAME TO {1}", "garbage": "ALTER TABLE {0} RENAME COLUMN digest TO {1}"}[damage]
        back = {"gone": "ALTER TABLE {1} RENAME TO {0}", "garbage": "ALTER TABLE {0} RENAME COLUMN {1} TO digest"}[damage]
        try:
            database.execute(change.format("credential", "vanished"))
            for answer in (
                client.post("/auth/login", json={"apiKey": partner.key}),
                client.get("/companies", headers=r_auth(partner.key)),
            ):
                assert outcome(answer)[0] in {500, 503}
                assert "credential" not in answer.json()["detail"]
                assert "vanished" not in answer.text
        finally:
            database.execute(back.format("credential", "vanished"))
            database.close()
        assert log_in(client, partner.key)


@pytest.mark.parametrize("headers", [{}, {"headers": [(b"vary", b"accept"), (b"X-Request-Id", b"theirs")]}])
async def test_what_the_edge_says_is_said_once_and_the_answer_of_an_api_stays_its_own(headers):
    start = {"type": "http.response.start", "status": 204, **headers}
    before = {name: list(value) if name == "headers" else value for name, value in start.items()}

    async def fine(scope, receive, send):
        await send(start)
        await send({"type": "http.response.body", "body": b""})

    for _ in range(2):
        sent, raised = await ask_edge(edge_over(fine))
        assert raised is None
        names = [name.lower() for name, _ in sent[0]["headers"] if name != b"vary"]
        assert names == [b"x-request-id", b"x-content-type-options", b"strict-transport-security"]
        assert dict(sent[0]["headers"])[b"x-request-id"].startswith(b"boot-")
    assert start == before
