"""The feed of revocations over the wire: long polls, event streams, acknowledgements, and the answers to revocations."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from harness import Server
from outside import add_partner, ask, bearer, connect, create_company, is_closed, log_in, outcome, problem, read_answer, until

FEED = "/auth/revocations"
LONG = 25
"""Seconds for which nobody who is told in time has to wait."""


def read(client, **query):
    answer = client.get(FEED, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


def now_at(client):
    """Where the feed stands."""
    page = read(client)
    while page["more"]:
        page = read(client, after=page["position"])
    return page["position"]


def told(page):
    return {(one["kind"], one["subject"]): one["code"] for one in page["revocations"]}


def end(client, partner):
    """End a session."""
    session = log_in(client, partner.key)
    assert client.post("/auth/logout", json={"refreshToken": session["refreshToken"]}).status_code == 204


def test_whoever_asks_first_is_told_all_that_counts_and_goes_on_from_there(server, client, partner):
    end(client, partner)
    page = read(client)
    assert page["reset"]
    assert page["maxStaleness"] == 10
    assert (page["issuer"], page["environment"]) == ("https://localhost:8443", "uat")
    position = now_at(client)
    assert read(client, after=position)["revocations"] == []
    ask("partner", "suspend", partner.id, data=server.data)
    page = read(client, after=position)
    assert told(page) == {("partner", partner.id): "partner_suspended"}
    assert read(client, after=page["sequence"])["revocations"] == []
    ask("partner", "resume", partner.id, data=server.data)
    assert told(read(client, after=page["position"])) == {("partner", partner.id): None}


def test_a_long_poll_is_answered_when_something_is_revoked_by_a_request_or_a_command(server, client, partner):
    with ThreadPoolExecutor(1) as pool, server.client() as reader:
        for revoke in (
            lambda: end(client, partner),
            lambda: ask("key", "rotate", partner.key_id, data=server.data),
        ):
            position = now_at(client)
            asked = pool.submit(read, reader, after=position, wait=LONG)
            revoke()
            began = time.monotonic()
            page = asked.result()
            # A bound against having slept through, and no measurement.
            assert time.monotonic() - began < LONG / 2
            assert len(page["revocations"]) == 1


def test_a_long_poll_without_news_is_answered_when_its_time_is_over(client):
    position = now_at(client)
    page = read(client, after=position, wait="0.05")
    assert (page["position"], page["revocations"], page["reset"]) == (position, [], False)


@pytest.mark.parametrize(
    "query",
    [{"after": "x"}, {"after": "-1"}, {"after": ""}, {"wait": "31"}, {"wait": "-1"}, {"wait": "1e1"}, {"wait": ""},
     {"verifier": "short"}, {"verifier": "x" * 65}, {"verifier": "with spaces"}],
)  # fmt: skip
def test_what_cannot_be_meant_is_told(client, query):
    answer = client.get(FEED, params=query)
    assert outcome(answer) == (422, "invalid_fields")
    assert [error["pointer"] for error in problem(answer)["errors"]] == [f"?{name}" for name in query]


# --- event streams ---


@contextlib.contextmanager
def stream(client, params=(), **headers):
    with client.stream("GET", FEED, params=dict(params), headers={"Accept": "text/event-stream", **headers}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        yield events(answer)


def events(answer):
    event = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        else:
            yield event["id"], event["event"], json.loads(event["data"])
            event = {}


def test_an_event_stream_begins_beats_and_tells(server, client, partner):
    with stream(client) as coming:
        id_, name, first = next(coming)
        assert (name, first["reset"], id_) == ("revocations", True, first["position"])
        while first["more"]:
            id_, _, first = next(coming)
        # Something is said well inside the maximum staleness, though nothing has happened.
        id_, _, beat = next(coming)
        assert (beat["revocations"], beat["position"]) == ([], id_)
        end(client, partner)
        _, _, news = next(coming)
        assert len(news["revocations"]) == 1


def test_an_event_stream_goes_on_behind_the_last_event_that_was_seen(client, partner):
    position = now_at(client)
    end(client, partner)
    with stream(client, **{"Last-Event-ID": position}) as coming:
        _, _, page = next(coming)
        assert (page["reset"], len(page["revocations"])) == (False, 1)
    answer = client.get(FEED, headers={"Accept": "text/event-stream", "Last-Event-ID": "x"})
    assert outcome(answer) == (422, "invalid_fields")


# --- who has heard ---


@pytest.fixture
def alone(tmp_path):
    """A server whom no other verifier follows."""
    with Server(tmp_path / "data") as running, running.client() as client:
        yield running, client


def suspend(server, partner, *flags):
    return ask("partner", "suspend", partner.id, *flags, data=server.data)


def test_the_answer_to_a_revocation_says_who_has_heard_and_waits_for_those_who_have_not(alone):
    server, client = alone
    partner = add_partner(server.data)
    assert {"verifiers": 0, "acknowledged": 0}.items() <= suspend(server, partner, "--wait", "5s").items()
    read(client, after=now_at(client), verifier="verifier-1")
    said = suspend(server, partner)
    assert (said["verifiers"], said["acknowledged"]) == (1, 0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(suspend, server, partner, "--wait", "10")
        page = read(client, after=said["sequence"], verifier="verifier-1", wait=LONG)
        assert not asked.done()
        read(client, after=page["position"], verifier="verifier-1")
        said = asked.result()
    assert (said["verifiers"], said["acknowledged"], said["sequence"]) == (1, 1, page["sequence"])


def test_the_reader_of_an_event_stream_acknowledges_by_itself(alone):
    server, client = alone
    partner = add_partner(server.data)
    sequence = suspend(server, partner)["sequence"]
    assert client.post(FEED, json={"verifier": "verifier-1", "sequence": sequence}).status_code == 204
    assert suspend(server, partner)["verifiers"] == 1
    assert outcome(client.post(FEED, json={"verifier": "verifier-1", "sequence": sequence + 100})) == (409, "step_not_found")
    for body in ({"verifier": "short", "sequence": 1}, {"verifier": "verifier-1", "sequence": -1}, {}):
        assert outcome(client.post(FEED, json=body)) == (422, "invalid_fields")


def test_the_reader_of_an_event_stream_counts_before_the_first_event_and_has_applied_what_it_names(alone):
    server, client = alone
    partner = add_partner(server.data)
    ended = {"refreshToken": log_in(client, partner.key)["refreshToken"]}
    client.post("/auth/logout", json=ended)
    with stream(client, params={"verifier": "verifier-1"}) as coming:
        position = next(coming)[0]
        said = client.post("/auth/logout", json=ended, params={"wait": "0"}).json()
        assert (said["verifiers"], said["acknowledged"]) == (1, 0)
    with stream(client, params={"verifier": "verifier-2", "after": position}) as coming:
        next(coming)
        # It was ended already: that is nothing new, and is among what was named.
        said = client.post("/auth/logout", json=ended, params={"wait": "0"}).json()
        assert (said["verifiers"], said["acknowledged"]) == (2, 1)


def test_requests_that_revoke_say_it_too_when_they_are_asked(client, partner):
    """Without being asked they answer as they always have."""
    session = log_in(client, partner.key)
    company = create_company(client, partner.key)
    path = f"/companies/{company['companyId']}"
    for wait in ("31", "x"):
        assert outcome(client.delete(path, headers=bearer(partner.key), params={"wait": wait})) == (422, "invalid_fields")
    answers = [
        client.delete(path, headers=bearer(partner.key), params={"wait": "0"}),
        client.post("/auth/logout", json={"refreshToken": session["refreshToken"]}, params={"wait": "0"}),
        client.post("/auth/logout", json={"refreshToken": session["refreshToken"]}, params={"wait": "0"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [set(answer.json()) for answer in answers] == [{"sequence", "verifiers", "acknowledged"}] * 3
    sequences = [answer.json()["sequence"] for answer in answers]
    assert sequences == sorted(sequences)


def test_rotations_say_it_too_when_they_are_asked(client, partner):
    company = create_company(client, partner.key)
    path, own = f"/companies/{company['companyId']}/key", "/api/v2/Partners/Register/Rotate"
    counts = {"sequence", "verifiers", "acknowledged"}

    def rotate(where, key, **sent):
        return client.post(where, headers={**bearer(key), **sent.pop("headers", {})}, **sent)

    for where in (path, own):
        assert outcome(rotate(where, partner.key, params={"wait": "31"})) == (422, "invalid_fields")
    assert set(rotate(path, partner.key).json()) == {"companyId", "apiKey"}
    again = {"params": {"wait": "0"}, "headers": {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}}
    first, second = (rotate(path, partner.key, **again).json() for _ in range(2))
    assert set(first) == {"companyId", "apiKey"} | counts
    assert second["apiKey"] == first["apiKey"]
    assert second["sequence"] >= first["sequence"]
    plain = rotate(own, partner.key).json()
    asked = rotate(own, plain["apiKey"], params={"wait": "0"}).json()
    assert set(asked) - set(plain) == counts
    assert asked["sequence"] > first["sequence"]


def test_a_rotation_waits_for_those_who_follow(alone):
    server, client = alone
    partner = add_partner(server.data)
    read(client, after=now_at(client), verifier="verifier-1")
    with ThreadPoolExecutor(1) as pool, server.client() as other:
        position = now_at(client)
        asked = pool.submit(other.post, "/api/v2/Partners/Register/Rotate", headers=bearer(partner.key), params={"wait": "10"})
        page = read(client, after=position, verifier="verifier-1", wait=LONG)
        assert not asked.done()
        read(client, after=page["position"], verifier="verifier-1")
        said = asked.result().json()
    assert (said["verifiers"], said["acknowledged"], said["sequence"]) == (1, 1, page["sequence"])


def test_commands_that_rotate_say_it_without_being_asked(server, partner):
    token = ask("token", "issue", partner.id, data=server.data)["tokenId"]
    for command in (("key", "rotate", partner.key_id), ("token", "rotate", token)):
        assert {"sequence", "verifiers", "acknowledged"} <= set(ask(*command, data=server.data))


# --- those who wait ---


def ask_and_wait(server, position):
    """A connection on which an answer is waited for."""
    connection = connect(server)
    request = f"GET {FEED}?after={position}&wait={LONG} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection.sendall(request.encode())
    return connection


def ask_for_events(server):
    """A connection on which events come for as long as it lasts."""
    connection = connect(server)
    connection.sendall(f"GET {FEED} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
    return connection


def test_one_address_keeps_so_many_waiting_and_who_goes_away_makes_room(alone):
    server, client = alone
    waiting = [ask_for_events(server) for _ in range(100)]
    try:
        until(lambda: client.get(FEED).status_code == 429, "the hundredth waits")
        assert outcome(client.get(FEED)) == (429, "too_many_requests")
        waiting.pop().close()
        until(lambda: client.get(FEED).status_code == 200, "there is room again")
    finally:
        for connection in waiting:
            connection.close()


def test_one_address_has_so_many_names_and_keeps_nobody_out_who_has_one(alone):
    """However it tells them: else anybody could take all places that there are for verifiers."""
    server, client = alone
    sequence = now_at(client).partition(".")[0]
    for number in range(99):
        assert client.get(FEED, params={"verifier": f"stranger-{number}"}).status_code == 200
    say = {"verifier": "stranger-99", "sequence": int(sequence)}
    assert client.post(FEED, json=say).status_code == 204
    refused = [
        client.get(FEED, params={"verifier": "stranger-100"}),
        client.get(FEED, params={"verifier": "stranger-100"}, headers={"Accept": "text/event-stream"}),
        client.post(FEED, json={**say, "verifier": "stranger-100"}),
    ]
    assert [outcome(answer) for answer in refused] == [(429, "too_many_requests")] * 3
    assert {answer.headers["retry-after"] for answer in refused} == {"10"}
    assert client.post(FEED, json=say).status_code == 204
    assert client.get(FEED, params={"verifier": "stranger-0"}).status_code == 200
    assert client.get(FEED).status_code == 200
    # From another address there is room.
    transport = httpx2.HTTPTransport(verify=server.tls(), local_address="127.0.0.2")
    with httpx2.Client(base_url=server.url, transport=transport) as other:
        assert other.get(FEED, params={"verifier": "my-own-service"}).status_code == 200


def test_sigterm_answers_those_who_wait_at_once_and_ends_event_streams(tmp_path):
    with Server(tmp_path / "data") as server, server.client() as client:
        position = now_at(client)
        with ask_and_wait(server, position) as polling, ask_for_events(server) as streaming:
            assert streaming.recv(12) == b"HTTP/1.1 200"
            read(client, after=position)  # both are there, and wait
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < LONG / 2
            answer = read_answer(polling)
            assert (answer.status, json.loads(answer.body)["position"]) == (200, position)
            rest = b""
            while part := streaming.recv(65536):
                rest += part
            assert rest.endswith(b"0\r\n\r\n")
            assert is_closed(polling)


def test_plain_http_gets_nothing_of_it(server):
    with connect(server, tls=False) as connection:
        connection.sendall(f"GET {FEED} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 403"


def test_many_who_wait_are_all_told(server, client, partner):
    position = now_at(client)
    waiting = [ask_and_wait(server, position) for _ in range(40)]
    end(client, partner)
    for connection in waiting:
        with connection:
            assert len(json.loads(read_answer(connection).body)["revocations"]) == 1
