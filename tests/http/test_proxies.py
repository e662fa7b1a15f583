"""Who may say where a request comes from: trusted proxies, and nobody else."""

import http.client
import ipaddress
import json

import pytest
from harness import Server
from outside import add_partner, connect, fresh, outcome, read_answer

from gatelodge_server.http.edge import TrustedProxies

PROXIES = TrustedProxies([ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8:aa::/48")])
PEER = "10.0.0.1"
UNKNOWN = (PEER, "http")

LOOKS = {
    "nothing": ([], UNKNOWN),
    "scheme-only": ([("x-forwarded-proto", "https")], (PEER, "https")),
    "address-only": ([("x-forwarded-for", "192.0.2.7")], ("192.0.2.7", "http")),
    "both": ([("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "scheme-in-capitals": ([("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", " HTTPS ")], ("192.0.2.7", "https")),
    "a-client-that-lies": ([("x-forwarded-for", "1.2.3.4, 192.0.2.7"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "a-client-that-names-a-proxy": ([("x-forwarded-for", "10.9.9.9, 192.0.2.7"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "two-proxies": ([("x-forwarded-for", "192.0.2.7, 10.0.0.2"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "two-proxies-two-schemes": ([("x-forwarded-for", "192.0.2.7, 10.0.0.2"), ("x-forwarded-proto", "https, http")], ("192.0.2.7", "https")),
    "the-outer-hop-is-plain": ([("x-forwarded-for", "192.0.2.7, 10.0.0.2"), ("x-forwarded-proto", "http, https")], ("192.0.2.7", "http")),
    "a-client-that-lies-about-the-scheme": ([("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https, http")], ("192.0.2.7", "http")),
    "two-lines": ([("x-forwarded-for", "1.2.3.4"), ("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "only-proxies": ([("x-forwarded-for", "10.0.0.3, 10.0.0.2"), ("x-forwarded-proto", "https")], ("10.0.0.3", "https")),
    "no-address": ([("x-forwarded-for", "unknown"), ("x-forwarded-proto", "https")], (PEER, "https")),
    "no-address-before-a-proxy": ([("x-forwarded-for", "1.2.3.4, ' or 1=1, 10.0.0.2"), ("x-forwarded-proto", "https")], ("10.0.0.2", "https")),
    "an-empty-list": ([("x-forwarded-for", ""), ("x-forwarded-proto", "https")], (PEER, "https")),
    "address-with-port": ([("x-forwarded-for", "192.0.2.7:4711"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "ipv6": ([("x-forwarded-for", "2001:db8::7"), ("x-forwarded-proto", "https")], ("2001:db8::7", "https")),
    "ipv6-long": ([("x-forwarded-for", "2001:0DB8:0:0:0:0:0:7"), ("x-forwarded-proto", "https")], ("2001:db8::7", "https")),
    "ipv6-with-port": ([("x-forwarded-for", "[2001:db8::7]:4711"), ("x-forwarded-proto", "https")], ("2001:db8::7", "https")),
    "ipv6-proxy": ([("x-forwarded-for", "192.0.2.7, 2001:db8:aa::1"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "ipv4-mapped": ([("x-forwarded-for", "::ffff:192.0.2.7"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "ipv4-mapped-proxy": ([("x-forwarded-for", "192.0.2.7, ::ffff:10.0.0.2"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "forwarded": ([("forwarded", "for=192.0.2.7;proto=https")], ("192.0.2.7", "https")),
    "forwarded-in-another-order": ([("forwarded", "Proto=HTTPS; by=10.0.0.1; For=192.0.2.7")], ("192.0.2.7", "https")),
    "forwarded-quoted": ([("forwarded", 'for="[2001:db8::7]:4711";proto="https"')], ("2001:db8::7", "https")),
    "forwarded-two-hops": ([("forwarded", "for=192.0.2.7;proto=https, for=10.0.0.2;proto=http")], ("192.0.2.7", "https")),
    "forwarded-a-client-that-lies": ([("forwarded", "for=1.2.3.4;proto=https, for=192.0.2.7;proto=http")], ("192.0.2.7", "http")),
    "forwarded-an-open-quote": ([("forwarded", 'for="1.2.3.4;proto=https, for=192.0.2.7;proto=http')], ("192.0.2.7", "http")),
    "forwarded-hidden": ([("forwarded", "for=_hidden;proto=https")], (PEER, "https")),
    "forwarded-unknown-before-a-proxy": ([("forwarded", "for=unknown, for=10.0.0.2;proto=https")], ("10.0.0.2", "https")),
    "forwarded-nonsense": ([("forwarded", ";;=,,=;")], UNKNOWN),
    "both-kinds-agree": ([("forwarded", "for=192.0.2.7;proto=https"), ("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https")], ("192.0.2.7", "https")),
    "both-kinds-differ-in-address": ([("forwarded", "for=192.0.2.8;proto=https"), ("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https")], UNKNOWN),
    "both-kinds-differ-in-scheme": ([("forwarded", "for=192.0.2.7;proto=http"), ("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https")], UNKNOWN),
    "the-clients-own-forwarded": ([("forwarded", "proto=https"), ("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "http")], UNKNOWN),
    "names-that-nobody-reads": ([("x-real-ip", "1.2.3.4"), ("x-forwarded-host", "x"), ("x-forwarded-scheme", "https"), ("x-forwarded-ssl", "on"), ("front-end-https", "on")], UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOKS)
def test_r48_behind_a_trusted_proxy_the_nearest_untrusted_hop_is_the_sender(case):
    headers, origin = LOOKS[case]
    assert PROXIES.look_behind([(name.encode(), value.encode()) for name, value in headers], PEER) == origin


@pytest.mark.parametrize(
    ("address", "trusted"),
    [("10.0.0.1", True), ("10.255.255.255", True), ("11.0.0.0", False), ("9.255.255.255", False), ("::ffff:10.0.0.1", True), ("::ffff:0a00:0001", True), ("2001:db8:aa::1", True), ("2001:db8:ab::1", False), ("2001:db8:aa::1%eth0", True), ("", False), ("unknown", False), ("10.0.0", False), ("010.0.0.1", False)],
)  # fmt: skip
def test_r48_a_peer_is_trusted_by_its_address_and_nothing_else(address, trusted):
    assert PROXIES.trusts(address) is trusted


# --- on the wire ----------------------------------------------------------------------------------------------------------

CLAIMS = {
    "X-Forwarded-For": "203.0.113.9",
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Port": "80",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-Uri": "/healthz",
    "X-Forwarded-Method": "GET",
    "X-Original-URI": "/healthz",
    "X-Rewrite-Url": "/healthz",
    "X-HTTP-Method-Override": "DELETE",
    "X-Real-IP": "203.0.113.9",
    "Forwarded": "for=203.0.113.9;proto=http;host=evil.example",
    "X-Partner-Id": "somebody-else",
    "X-Company-Id": "01a00000-0000-7000-8000-000000000000",
    "X-Partner-Tier": "gold",
    "X-Credential-Id": "x",
    "X-Scopes": "everything",
    "Host": "evil.example",
}


@pytest.mark.parametrize("name", CLAIMS)
def test_r48_what_a_client_says_of_itself_changes_nothing(server, client, partner, name):
    claim = {name: CLAIMS[name]}
    request_id = fresh("claim-")
    answer = client.get("/companies", headers={"R-Auth": partner.key, **claim})
    assert (answer.status_code, answer.json()) == (200, {"companies": [], "nextCursor": None})
    assert outcome(client.get("/companies", headers={"X-Request-Id": request_id, **claim})) == (401, "credential_required")
    (line,) = [json.loads(line) for line in server.log_path.read_text().splitlines() if request_id in line]
    assert line["address"] == "127.0.0.1"
    assert (line["method"], line["path"]) == ("GET", "/companies")
    assert "203.0.113.9" not in json.dumps(line)


@pytest.mark.parametrize("name", ["X-Forwarded-Proto", "Forwarded", "X-Forwarded-Ssl", "X-Forwarded-Scheme"])
def test_r48_plain_http_stays_plain_whatever_a_client_says(server, partner, name):
    claim = {"Forwarded": "for=127.0.0.1;proto=https", "X-Forwarded-Ssl": "on"}.get(name, "https")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/companies", headers={"R-Auth": partner.key, name: claim})
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["code"]) == (403, "https_required")
    connection.close()


class Behind:
    """Requests that come to a server from a proxy of its own, or from somebody who would like to be one."""

    def __init__(self, server: Server, source: str) -> None:
        self._server, self._source = server, source

    def __call__(self, path: str, *headers: tuple[str, str], body: dict[str, str] | None = None) -> tuple[int, str | None]:
        content = json.dumps(body) if body is not None else ""
        method = "GET" if body is None else "POST"
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in headers] + [f"Content-Length: {len(content)}", "", content]
        with connect(self._server, tls=False, source=self._source) as connection:
            connection.sendall("\r\n".join(lines).encode())
            answer = read_answer(connection)
        body = json.loads(answer.body) if answer.body else {}
        return answer.status, body.get("code")


HTTPS = ("X-Forwarded-Proto", "https")


@pytest.fixture
def proxy(hidden_server):
    return Behind(hidden_server, "127.0.0.5")


@pytest.fixture
def impostor(hidden_server):
    return Behind(hidden_server, "127.200.0.5")


@pytest.fixture(scope="module")
def hidden_partner(hidden_server):
    return add_partner(hidden_server.data)


def test_behind_a_proxy_a_request_that_came_over_https_is_served(proxy, hidden_partner):
    key = ("R-Auth", hidden_partner.key)
    assert proxy("/companies", HTTPS, key) == (200, None)
    assert proxy("/companies", ("Forwarded", "for=192.0.2.1;proto=https"), key) == (200, None)
    assert proxy("/auth/login", HTTPS, body={"apiKey": hidden_partner.key}) == (200, None)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("X-Forwarded-Proto", "http")],
        [("X-Forwarded-For", "192.0.2.1")],
        [("Forwarded", "for=192.0.2.1")],
        [HTTPS, ("Forwarded", "for=192.0.2.1;proto=http")],
        [("X-Forwarded-Proto", "https, http")],
        [("X-Forwarded-Proto", "https://")],
    ],
    ids=["none", "http", "address-only", "forwarded-without-proto", "contradiction", "client-wrote-https", "no-scheme"],
)
def test_behind_a_proxy_a_request_that_did_not_is_refused(proxy, hidden_partner, headers):
    assert proxy("/companies", *headers, ("R-Auth", hidden_partner.key)) == (403, "https_required")


def test_r48_a_peer_that_is_no_trusted_proxy_is_not_believed(impostor, hidden_partner):
    key = ("R-Auth", hidden_partner.key)
    assert impostor("/companies", HTTPS, key) == (403, "https_required")
    assert impostor("/companies", ("Forwarded", "for=127.0.0.5;proto=https"), key) == (403, "https_required")
    assert impostor("/companies", HTTPS, ("X-Forwarded-For", "127.0.0.5"), key) == (403, "https_required")


def test_r48_a_proxys_word_in_a_trailer_is_not_heard(hidden_server, hidden_partner):
    request = (
        f"POST /companies HTTP/1.1\r\nHost: x\r\nR-Auth: {hidden_partner.key}\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Forwarded-Proto: https\r\n\r\n"
    )
    with connect(hidden_server, tls=False, source="127.0.0.5") as connection:
        connection.sendall(request.encode())
        assert read_answer(connection).status == 403


def test_the_log_has_the_address_that_the_proxy_tells_of(hidden_server, proxy):
    request_id = fresh("seen-")
    proxy("/companies", HTTPS, ("X-Forwarded-For", "1.2.3.4, 192.0.2.77"), ("X-Request-Id", request_id))
    (line,) = [json.loads(line) for line in hidden_server.log_path.read_text().splitlines() if request_id in line]
    assert line["address"] == "192.0.2.77"


# --- failures -------------------------------------------------------------------------------------------------------------


def test_behind_a_proxy_failures_are_counted_by_the_senders_address(proxy):
    def fail(address: str) -> tuple[int, str | None]:
        return proxy("/auth/login", HTTPS, ("X-Forwarded-For", address), body={"apiKey": "nonsense"})

    limited, invalid = (429, "too_many_failures"), (401, "invalid_credential")
    assert [fail("192.0.2.1") for _ in range(4)] == [invalid, invalid, invalid, limited]
    assert fail("192.0.2.2") == invalid
    # Spellings of one address are one address, and an IPv6 network of 64 bits is one household (R77).
    assert fail("::ffff:192.0.2.1") == limited
    household = ["2001:db8:1:2::1", "2001:db8:1:2:ffff::", "2001:0DB8:1:2::3", "[2001:db8:1:2::4]:99"]
    assert [fail(address) for address in household] == [invalid, invalid, invalid, limited]
    assert fail("2001:db8:1:3::1") == invalid
    # What the sender wrote in front of what the proxy wrote does not count.
    assert fail("192.0.2.200, 192.0.2.1") == limited
