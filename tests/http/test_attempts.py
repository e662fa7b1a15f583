"""Failures are counted by address. They make guessing slow, and keep nobody out who has a credential."""

from contextlib import ExitStack, nullcontext

import httpx2
import pytest
from outside import add_partner, ask, log_in, outcome, problem, refresh

from gatelodge.wire import checksum
from gatelodge_server.core.refusals import TooManyRequests
from gatelodge_server.http.attempts import Attempts, Names, bucket_of
from gatelodge_server.http.problems import TooManyFailures

INVALID = (401, "invalid_credential")
LIMITED = (429, "too_many_failures")


@pytest.mark.parametrize(
    ("address", "bucket"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:0201", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("0:0:0:0:0:ffff:192.0.2.1", "192.0.2.1"),
        ("0000:0000:0000:0000:0000:ffff:c000:0201", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:ffff:ffff:ffff", "2001:db8::/64"),
        ("2001:db8:0:0:1::", "2001:db8::/64"),
        ("2001:DB8::A", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("fe80::1", "fe80::/64"),
        ("::1", "::/64"),
        ("", "unknown"),
        ("unix:", "unknown"),
        ("192.0.2.1:80", "unknown"),
    ],
)
def test_r77_an_address_is_counted_under_one_name_in_every_notation(address, bucket):
    assert bucket_of(address) == bucket


def test_a_sender_has_sixteen_under_way_at_once_and_those_past_that_take_nothing_from_others():
    requests = Attempts("100/hour", refusal=TooManyRequests)
    with ExitStack() as places:
        for last in range(16):
            places.enter_context(requests.place(f"2001:db8::{last}"))
        with pytest.raises(TooManyRequests) as refused, requests.place("2001:db8::9"):
            pass
        assert refused.value.retry_after == 1
        with requests.place("2001:db8:0:1::9"):
            pass
    with requests.place("2001:db8::9"):
        pass


async def test_a_sender_has_sixteen_attempts_under_way_at_once_and_the_next_is_not_judged():
    failures = Attempts("100/hour")
    with ExitStack() as places:
        for _ in range(16):
            places.enter_context(failures.place("192.0.2.1"))
        with pytest.raises(TooManyFailures):
            async with failures.attempt("192.0.2.1"):
                pytest.fail("it was let in")
        async with failures.attempt("192.0.2.2"):
            pass


@pytest.fixture
def at(strict_server):
    """A client at a loopback address of its own."""
    clients = []

    def client_at(address: str):
        transport = httpx2.HTTPTransport(verify=strict_server.tls(), local_address=address)
        clients.append(httpx2.Client(base_url=strict_server.url, transport=transport, timeout=30))
        return clients[-1]

    yield client_at
    for client in clients:
        client.close()


def guess(client, **headers):
    return client.post("/auth/login", json={"apiKey": "nonsense"}, headers=headers)


def test_r76_after_three_failures_a_minute_an_address_is_told_to_wait(at):
    client = at("127.0.1.1")
    assert [outcome(guess(client)) for _ in range(5)] == [INVALID, INVALID, INVALID, LIMITED, LIMITED]
    refused = guess(client)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "www-authenticate" not in refused.headers
    assert problem(refused)["title"] == "Too Many Requests"
    assert outcome(guess(at("127.0.1.2"))) == INVALID


def test_r76_failed_logins_refreshes_and_logouts_count_together(at, strict_server):
    client = at("127.0.2.1")
    failures = [
        guess(client),
        refresh(client, "nonsense"),
        client.post("/auth/logout", json={"refreshToken": "nonsense"}),
        refresh(client, "nonsense"),
        client.post("/auth/logout", json={"refreshToken": "nonsense"}),
        guess(client),
    ]
    assert [outcome(answer) for answer in failures] == [INVALID] * 3 + [LIMITED] * 3


def test_r48_another_forwarded_address_with_each_attempt_evades_nothing(at):
    client = at("127.0.3.1")
    names = ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "CF-Connecting-IP", "True-Client-IP")
    outcomes = []
    for number in range(1000):
        address = f"198.51.{number // 250}.{number % 250}"
        outcomes.append(
            outcome(guess(client, **{name: address if name != "Forwarded" else f"for={address}" for name in names}))
        )
    assert outcomes == [INVALID] * 3 + [LIMITED] * 997


def test_a_genuine_credential_gets_its_own_verdict_from_a_limited_address(at, strict_server):
    client, data = at("127.0.4.1"), strict_server.data
    good, revoked, suspended, elsewhere = (add_partner(data) for _ in range(4))
    session = log_in(client, good.key)
    ask("key", "revoke", revoked.key_id, data=data)
    ask("partner", "suspend", suspended.id, data=data)
    body = elsewhere.key[:-6].replace("_uat_", "_production_")
    while outcome(guess(client)) != LIMITED:
        pass
    assert outcome(client.post("/auth/login", json={"apiKey": good.key})) == (200, None)
    assert outcome(client.post("/auth/login", json={"apiKey": revoked.key})) == (401, "credential_revoked")
    assert outcome(client.post("/auth/login", json={"apiKey": suspended.key})) == (403, "partner_suspended")
    assert outcome(client.post("/auth/login", json={"apiKey": body + checksum(body)})) == (401, "wrong_environment")
    assert outcome(refresh(client, session["refreshToken"])) == (200, None)
    assert outcome(refresh(client, session["refreshToken"])) == (401, "refresh_token_reused")
    assert outcome(client.get("/companies", headers={"R-Auth": good.key})) == (200, None)
    assert outcome(guess(client)) == LIMITED


def test_a_limited_address_is_told_the_same_of_a_wrong_secret_and_an_unknown_key(at, strict_server):
    client = at("127.0.5.1")
    partner = add_partner(strict_server.data)
    while outcome(guess(client)) != LIMITED:
        pass
    for body in (partner.key[:-36] + "0" * 30, f"gatelodge_uat_pk_{'0' * 12}_{'0' * 30}"):
        assert outcome(client.post("/auth/login", json={"apiKey": body + checksum(body)})) == LIMITED


def test_successes_are_not_counted(at, strict_server):
    client = at("127.0.6.1")
    partner = add_partner(strict_server.data)
    for _ in range(10):
        session = log_in(client, partner.key)
        assert outcome(refresh(client, session["refreshToken"])) == (200, None)
    assert outcome(guess(client)) == INVALID


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_name_keeps_its_place_until_it_has_not_been_heard_for_so_long(offset):
    seconds = [0.0]
    names = Names(each=2, kept=10, monotonic=lambda: seconds[0])
    names.hear("192.0.2.1", "one")
    names.hear("192.0.2.1", "two")
    seconds[0] = 4
    names.hear("192.0.2.1", "one")
    for own in ("192.0.2.2", "2001:db8::1"):
        names.hear(own, "three")
    seconds[0] = 10 + offset
    # The one that was heard first, and not again.
    with pytest.raises(TooManyRequests) if offset < 0 else nullcontext():
        names.hear("192.0.2.1", "three")
    with pytest.raises(TooManyRequests) as refused:
        names.hear("192.0.2.1", "four")
    assert refused.value.retry_after == 10
    names.hear("192.0.2.1", "one")
    # Whoever was refused has not kept anybody's place.
    seconds[0] = 30
    names.hear("192.0.2.1", "four")
    names.hear("192.0.2.1", "five")


def test_a_name_that_two_addresses_say_has_a_place_at_each_and_a_household_is_one_address():
    names = Names(each=1, kept=10, monotonic=lambda: 0.0)
    names.hear("2001:db8::1", "one")
    names.hear("192.0.2.1", "one")
    names.hear("2001:db8::2", "one")
    with pytest.raises(TooManyRequests):
        names.hear("2001:db8::2", "two")
