"""P11: an answer that never arrives is asked for again with the Idempotency-Key, and nothing happens twice."""

import pytest
from outside import (
    ask,
    bearer,
    company,
    connect,
    create_company,
    fresh,
    id_of,
    lose_answer,
    outcome,
    r_auth,
    refresh,
    until,
    whoami,
)

pytestmark = pytest.mark.each_database


def keys_of(server, partner, company_id):
    listed = ask("key", "list", partner.id, data=server.data)
    return [key for key in listed if key["companyId"] == company_id]


def test_r32_a_refresh_whose_answer_was_lost_gives_the_same_refresh_token_again(server, client, tokens):
    key = fresh("refresh-")
    body = {"refreshToken": tokens["refreshToken"]}
    lose_answer(server, "POST", "/auth/refresh", body, {"Idempotency-Key": key})

    again = [refresh(client, tokens["refreshToken"], **{"Idempotency-Key": key}) for _ in range(3)]
    assert {outcome(answer) for answer in again} == {(200, None)}
    successors = {answer.json()["refreshToken"] for answer in again}
    assert len(successors) == 1
    assert all(whoami(client, answer.json()["jwt"]) == (200, None) for answer in again)
    assert outcome(refresh(client, successors.pop())) == (200, None)


def test_r32_a_used_successor_makes_the_retry_a_reuse(client, tokens):
    key = fresh("refresh-")
    first = refresh(client, tokens["refreshToken"], **{"Idempotency-Key": key}).json()
    second = refresh(client, first["refreshToken"])
    assert outcome(refresh(client, tokens["refreshToken"], **{"Idempotency-Key": key})) == (401, "refresh_token_reused")
    assert whoami(client, second.json()["jwt"]) == (401, "credential_revoked")


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "another"}], ids=["no-key", "another-key"])
def test_r32_a_lost_refresh_asked_for_again_without_its_key_is_a_reuse(server, client, tokens, headers):
    body = {"refreshToken": tokens["refreshToken"]}
    lose_answer(server, "POST", "/auth/refresh", body, {"Idempotency-Key": fresh("refresh-")})
    assert outcome(refresh(client, tokens["refreshToken"], **headers)) == (401, "refresh_token_reused")


def test_r32_an_idempotency_key_means_nothing_to_another_session(client, partner, tokens):
    other = client.post("/auth/login", json={"apiKey": partner.key}).json()
    key = {"Idempotency-Key": fresh("refresh-")}
    mine = refresh(client, tokens["refreshToken"], **key).json()
    theirs = refresh(client, other["refreshToken"], **key).json()
    assert mine["refreshToken"] != theirs["refreshToken"]


@pytest.mark.parametrize("path", ["/companies", "/white-label-partner/create-company"])
def test_p11_a_company_whose_answer_was_lost_is_made_once_and_its_one_key_told_again(server, client, partner, path):
    body, headers = company(), {**bearer(partner.key), "Idempotency-Key": fresh("create-")}
    lose_answer(server, "POST", path, body, headers)

    again = [client.post(path, json=body, headers=headers) for _ in range(3)]
    assert {outcome(answer) for answer in again} == {(201, None)}
    made = again[0].json()
    assert all(answer.json() == made for answer in again)
    assert all(answer.headers["cache-control"] == "no-store" for answer in again)
    listed = client.get("/companies", headers=bearer(partner.key)).json()["companies"]
    assert [found["companyId"] for found in listed] == [made["companyId"]]
    assert [key["keyId"] for key in keys_of(server, partner, made["companyId"])] == [id_of(made["apiKey"])]

    # Whoever uses the key has it: from then on the answer is not repeated any more.
    assert whoami(client, made["apiKey"]) == (403, "insufficient_scope")
    assert client.post("/auth/login", json={"apiKey": made["apiKey"]}).status_code == 200
    assert outcome(client.post(path, json=body, headers=headers)) == (409, "idempotency_key_spent")


def test_p11_a_rotated_company_key_whose_answer_was_lost_is_made_once(server, client, partner):
    made = create_company(client, partner.key)
    path = f"/companies/{made['companyId']}/key"
    headers = {**bearer(partner.key), "Idempotency-Key": fresh("rotate-")}
    lose_answer(server, "POST", path, {"overlapSeconds": 3600}, headers)

    again = [client.post(path, json={"overlapSeconds": 3600}, headers=headers) for _ in range(3)]
    assert {outcome(answer) for answer in again} == {(200, None)}
    rotated = again[0].json()
    assert all(answer.json() == rotated for answer in again)
    assert rotated["companyId"] == made["companyId"]
    known = {id_of(made["apiKey"]), id_of(rotated["apiKey"])}
    assert {key["keyId"] for key in keys_of(server, partner, made["companyId"])} == known

    assert client.post("/auth/login", json={"apiKey": rotated["apiKey"]}).status_code == 200
    answer = client.post(path, json={"overlapSeconds": 3600}, headers=headers)
    assert outcome(answer) == (409, "idempotency_key_spent")


def test_p11_an_idempotency_key_goes_with_one_request_only(client, partner):
    body, headers = company(), {**bearer(partner.key), "Idempotency-Key": fresh("create-")}
    made = client.post("/companies", json=body, headers=headers).json()
    other = client.post("/companies", json={**body, "city": "Köln"}, headers=headers)
    assert outcome(other) == (422, "idempotency_key_reused")
    rotate = client.post(f"/companies/{made['companyId']}/key", json={}, headers=headers)
    assert outcome(rotate) == (422, "idempotency_key_reused")
    assert client.post("/companies", json=body, headers=headers).json() == made


def test_p11_another_partner_may_use_the_same_idempotency_key(server, client, partner, another_partner):
    key = {"Idempotency-Key": fresh("create-")}
    body = company()
    mine = client.post("/companies", json=body, headers={**r_auth(partner.key), **key})
    theirs = client.post("/companies", json=body, headers={**r_auth(another_partner.key), **key})
    assert {outcome(mine), outcome(theirs)} == {(201, None)}
    assert mine.json()["companyId"] != theirs.json()["companyId"]
    assert mine.json()["apiKey"] != theirs.json()["apiKey"]


@pytest.mark.parametrize(
    "headers",
    [
        [("Idempotency-Key", "")],
        [("Idempotency-Key", "two words")],
        [("Idempotency-Key", "k" * 256)],
        [("Idempotency-Key", "schlüssel".encode())],
        [("Idempotency-Key", "one"), ("Idempotency-Key", "two")],
        [("Idempotency-Key", "one"), ("Idempotency-Key", "one")],
    ],
    ids=["empty", "space", "256", "not-ascii", "two", "twice"],
)
def test_what_cannot_be_an_idempotency_key_is_refused_and_nothing_is_done(client, partner, tokens, headers):
    answer = client.post("/companies", json=company(), headers=[*r_auth(partner.key).items(), *headers])
    assert outcome(answer) == (400, "invalid_idempotency_key")
    assert client.get("/companies", headers=r_auth(partner.key)).json()["companies"] == []
    answer = client.post("/auth/refresh", json={"refreshToken": tokens["refreshToken"]}, headers=headers)
    assert outcome(answer) == (400, "invalid_idempotency_key")
    assert outcome(refresh(client, tokens["refreshToken"])) == (200, None)


def test_an_idempotency_key_of_255_visible_characters_is_taken(client, partner):
    headers = {**bearer(partner.key), "Idempotency-Key": fresh().ljust(255, "~")}
    assert client.post("/companies", json=company(), headers=headers).status_code == 201


@pytest.mark.parametrize(
    ("framing", "part"),
    [("Content-Length: 24", b'{"overlap'), ("Content-Length: 24", b""), ("Transfer-Encoding: chunked", b"zz\r\n")],
    ids=["cut-in-the-body", "cut-before-the-body", "bad-chunk"],
)
def test_a_rotation_whose_body_never_arrives_is_not_done(server, client, partner, framing, part):
    made = create_company(client, partner.key)
    before = keys_of(server, partner, made["companyId"])
    request_id = fresh("cut-")
    head = (
        f"POST /companies/{made['companyId']}/key HTTP/1.1\r\nHost: localhost\r\nR-Auth: {partner.key}\r\n"
        f"Content-Type: application/json\r\nX-Request-Id: {request_id}\r\n{framing}\r\n\r\n"
    )
    with connect(server) as connection:
        connection.sendall(head.encode() + part)

    def noticed():
        return request_id in server.log_path.read_text() or keys_of(server, partner, made["companyId"]) != before

    until(noticed, "the server has noticed")
    assert keys_of(server, partner, made["companyId"]) == before
    assert client.post("/auth/login", json={"apiKey": made["apiKey"]}).status_code == 200
