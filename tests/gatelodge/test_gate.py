"""The gate's steps and their order, with nothing but the light package: who is let in, what is said to whom."""

import asyncio
import json
import logging
import re

import pytest
from gating import Api, Down, a_grant, bearer, caller, knock

from gatelodge import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    Gate,
    InvalidCredential,
    PartnerSuspended,
    QuotaExceeded,
    caller_of,
)
from gatelodge import gate as gate_module
from gatelodge.errors import HttpsRequired
from gatelodge.gate import CALLER, REQUEST_ID

KINDS = ["api-key", "access-token", "session"]
JSON = (b"content-type", b"application/json")
RATES = [(b"ratelimit", b'"hour";r=9;t=60')]


class Counter:
    """Counts whom it is asked to count, or refuses."""

    def __init__(self, refusal=None):
        self.counted = []
        self.refusal = refusal

    async def __call__(self, who, scope):
        self.counted.append((who, scope))
        if self.refusal is not None:
            raise self.refusal
        return RATES


@pytest.fixture
def api():
    return Api()


@pytest.fixture
def counter():
    return Counter()


@pytest.fixture
def gate(api, gatehouse, counter):
    return Gate(api, verifier=gatehouse.verifier, count=counter)


# --- Who is let in ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [b"Bearer ", b"bearer ", b"BEARER  ", None])
async def test_a_good_credential_of_each_kind_is_let_in_by_either_header(gate, api, gatehouse, kind, way):
    text = gatehouse.credentials[kind].encode()
    header = (b"r-auth", text) if way is None else (b"authorization", way + text)
    answer = await knock(gate, header)
    assert (answer.status, answer.body) == (200, b"hello")
    assert caller_of(api.scope) == caller(kind)


async def test_the_caller_is_in_the_scope_of_the_api_alone(gate, api, gatehouse):
    await knock(gate, bearer(gatehouse.KEY), **{CALLER: caller(partner="somebody-else")})
    assert caller_of(api.scope).partner == "acme-motors"


@pytest.mark.parametrize("there", [{}, {CALLER: None}, {CALLER: {"partner": "acme-motors"}}])
def test_without_a_gate_there_is_no_caller(there):
    with pytest.raises(LookupError, match="Gate"):
        caller_of({"type": "http"} | there)


async def test_a_refused_request_leaves_no_caller_behind(api, gatehouse):
    seen = []
    gate = Gate(api, verifier=gatehouse.verifier, on_refused=lambda scope, _, who: seen.append((CALLER in scope, who)))
    await knock(gate, bearer(gatehouse.KEY), JSON, body=b"{")
    assert seen == [(False, caller("api-key"))]


# --- Who is refused, and how it is told ---


async def test_r41_no_credential_is_a_401_without_an_error_code(gate, api, counter):
    answer = await knock(gate)
    assert (answer.status, answer.code) == (401, "credential_required")
    assert answer.header("www-authenticate") == 'Bearer realm="gatelodge"'
    assert (api.scopes, counter.counted) == ([], [])


@pytest.mark.parametrize("header", [(b"authorization", b"Basic YTpi"), (b"authorization", b"Bearer"), (b"cookie", b"r-auth=x")])
async def test_what_is_none_of_ours_is_no_credential(gate, header):
    assert (await knock(gate, header)).code == "credential_required"


@pytest.mark.parametrize("text", [b"", b"nonsense", b"a.b.c", "é".encode(), b"\xff\xfe", b"k" * 100_000])
async def test_r41_a_bad_credential_is_a_401_with_invalid_token(gate, api, text):
    answer = await knock(gate, (b"authorization", b"Bearer " + text))
    assert (answer.status, answer.code) == (401, "invalid_credential")
    challenge = answer.header("www-authenticate")
    assert challenge == 'Bearer realm="gatelodge", error="invalid_token", error_description="invalid_credential"'
    assert api.scopes == []


@pytest.mark.parametrize(
    ("reason", "status"),
    [(CredentialRevoked, 401), (CredentialRotated, 401), (CredentialExpired, 401), (PartnerSuspended, 403), (InvalidCredential, 401)],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
async def test_whoever_is_refused_is_told_why_and_the_api_never_hears_of_it(
    gate, api, gatehouse, counter, kind, reason, status
):
    assert (await knock(gate, bearer(gatehouse.credentials[kind]))).status == 200
    gatehouse.end(kind, reason)
    answer = await knock(gate, bearer(gatehouse.credentials[kind]))
    assert (answer.status, answer.code) == (status, reason.code)
    assert answer.problem["detail"] == reason.detail
    assert (answer.header("www-authenticate") is not None) == (status == 401)
    assert len(api.scopes) == len(counter.counted) == 1


async def test_r75_what_fails_to_authenticate_is_never_counted(gate, counter, gatehouse):
    for headers in [(), (bearer("x"),), (bearer("x"), (b"r-auth", b"y"))]:
        assert (await knock(gate, *headers)).status in {400, 401}
    assert (await knock(gate, bearer(gatehouse.KEY), scheme="http")).status == 403
    assert counter.counted == []


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ((b"authorization", b"Bearer KEY"), (b"r-auth", b"other"), False),
        ((b"r-auth", b"KEY"), (b"authorization", b"Bearer other"), False),
        ((b"authorization", b"Bearer KEY"), (b"authorization", b"Bearer other"), False),
        ((b"r-auth", b"KEY"), (b"r-auth", b"other"), False),
        ((b"r-auth", b"KEY"), (b"r-auth", b""), False),
        ((b"r-auth", b"KEY"), (b"r-auth", b"key"), False),
        ((b"authorization", b"Bearer KEY"), (b"r-auth", b"KEY"), True),
        ((b"authorization", b"Basic YTpi"), (b"r-auth", b"KEY"), True),
    ],
)
async def test_r43_two_credentials_are_refused_unless_they_are_one(gate, api, gatehouse, first, second, allowed):
    headers = [(name, value.replace(b"KEY", gatehouse.KEY.encode())) for name, value in (first, second)]
    answer = await knock(gate, *headers)
    if allowed:
        assert answer.status == 200
    else:
        assert (answer.status, answer.code, api.scopes, gatehouse.book.asked) == (400, "ambiguous_credentials", [], [])


@pytest.mark.parametrize("name", ["access_token", "token", "r-auth", "R-Auth", "Authorization", "api_key", "apiKey"])
async def test_r42_a_credential_in_the_query_string_is_none(gate, gatehouse, name):
    answer = await knock(gate, query_string=f"{name}={gatehouse.KEY}".encode())
    assert answer.code == "credential_required"
    assert gatehouse.KEY not in repr(answer.messages)


@pytest.mark.parametrize("scheme", ["http", "ws", "HTTPS", "", None])
async def test_r46_over_plain_http_nobody_looks_at_the_credential(gate, api, gatehouse, counter, scheme):
    gatehouse.book.is_current = None  # would fail if it were asked
    for headers in [(bearer(gatehouse.KEY),), (bearer("a"), bearer("b")), ()]:
        answer = await knock(gate, *headers, scheme=scheme)
        assert (answer.status, answer.code) == (403, "https_required")
        assert answer.all("location") == []
    assert (api.scopes, counter.counted, gatehouse.book.asked) == ([], [], [])


async def test_r46_a_connection_that_does_not_say_how_it_came_came_over_plain_http(gate, gatehouse):
    sent = []

    async def send(message):
        sent.append(message)

    await gate({"type": "http", "headers": [bearer(gatehouse.KEY)]}, None, send)
    assert sent[0]["status"] == 403


async def test_the_first_fault_by_the_order_of_the_steps_is_the_one_that_is_told(api, gatehouse):
    """Each request is at fault in everything from one step on; what is mended first shows the next."""
    full = QuotaExceeded(["hour"], 7)
    gate = Gate(api, verifier=gatehouse.verifier, count=Counter(full))
    wrong_body = {"body": b'{"partner":"zeta"}'}
    steps = [
        (await knock(gate, bearer("a"), bearer("b"), JSON, scheme="http", **wrong_body), "https_required"),
        (await knock(gate, bearer("a"), bearer("b"), JSON, **wrong_body), "ambiguous_credentials"),
        (await knock(gate, JSON, **wrong_body), "credential_required"),
        (await knock(gate, bearer("a"), JSON, **wrong_body), "invalid_credential"),
        (await knock(gate, bearer(gatehouse.KEY), JSON, **wrong_body), "partner_mismatch"),
        (await knock(gate, bearer(gatehouse.KEY), JSON, body=b"{}"), "quota_exceeded"),
    ]
    assert [answer.code for answer, _ in steps] == [code for _, code in steps]
    assert api.scopes == []


async def test_a_wrong_body_is_not_counted(gate, gatehouse, counter):
    assert (await knock(gate, bearer(gatehouse.KEY), JSON, body=b'{"partner":"zeta"}')).status == 401
    assert counter.counted == []


# --- Quotas ---


async def test_whoever_comes_in_is_counted_once_and_gets_the_rate_headers(gate, gatehouse, counter, api):
    answer = await knock(gate, bearer(gatehouse.KEY), JSON, body=b"{}")
    assert answer.header("ratelimit") == '"hour";r=9;t=60'
    ((who, scope),) = counter.counted
    assert who == caller("api-key")
    assert scope["path"] == "/api/plans"


async def test_without_a_count_there_are_no_rate_headers(api, gatehouse):
    answer = await knock(Gate(api, verifier=gatehouse.verifier), bearer(gatehouse.KEY))
    assert (answer.status, answer.header("ratelimit")) == (200, None)


async def test_r74_a_used_up_quota_is_a_429_that_says_which_and_until_when(api, gatehouse):
    full = QuotaExceeded(["hour", "day"], 1234, RATES)
    answer = await knock(Gate(api, verifier=gatehouse.verifier, count=Counter(full)), bearer(gatehouse.KEY))
    assert (answer.status, answer.code) == (429, "quota_exceeded")
    assert answer.problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert answer.problem["violated-policies"] == ["hour", "day"]
    assert answer.header("retry-after") == "1234"
    assert answer.header("ratelimit") == '"hour";r=9;t=60'
    assert answer.header("www-authenticate") is None
    assert api.scopes == []


async def test_a_count_that_cannot_be_had_is_a_503(api, gatehouse):
    answer = await knock(Gate(api, verifier=gatehouse.verifier, count=Counter(Down())), bearer(gatehouse.KEY))
    assert (answer.status, answer.code, answer.header("retry-after")) == (503, "unavailable", "1")
    assert api.scopes == []


@pytest.mark.parametrize("known", [True, False])
async def test_records_that_are_down_are_a_503_even_for_whom_we_have_seen(gate, api, gatehouse, known):
    if known:
        assert (await knock(gate, bearer(gatehouse.KEY))).status == 200
        gatehouse.book.change("partner", "somebody")
    gatehouse.book.fault = Down()
    answer = await knock(gate, bearer(gatehouse.KEY))
    assert (answer.status, answer.header("retry-after")) == (503, "1")
    assert len(api.scopes) == known


# --- Headers ---


SPELLINGS = [
    b"x-partner-id", b"x-company-id", b"x-partner-tier", b"x-credential-id", b"x-scopes",
    b"x_partner_id", b"x-partner_id", b"x_partner-tier", b"x_scopes", b"x_credential_id", b"x_company-id",
]  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"{}"])
@pytest.mark.parametrize("name", SPELLINGS)
async def test_r48_what_only_a_gate_may_say_the_api_does_not_hear_from_a_client(gate, api, gatehouse, name, body):
    others = [(b"x-partner", b"1"), (b"x-forwarded-for", b"10.0.0.1"), (b"x-scope", b"2"), JSON, bearer(gatehouse.KEY)]
    assert (await knock(gate, (name, b"zeta"), *others, (name, b"eta"), body=body)).status == 200
    framing = [(b"content-length", b"2")] if body else []
    assert api.scope["headers"] == others + framing


@pytest.mark.parametrize("given", [b"abc", b"A-Za-z0-9._:-", b"x" * 64])
async def test_a_sane_request_id_is_kept(gate, api, gatehouse, given):
    answer = await knock(gate, bearer(gatehouse.KEY), (b"x-request-id", given))
    assert answer.header("x-request-id") == api.scope[REQUEST_ID] == given.decode()
    answer = await knock(gate, (b"x-request-id", given))
    assert answer.header("x-request-id") == answer.problem["requestId"] == given.decode()


@pytest.mark.parametrize(
    "given", [None, b"", b"x" * 65, b"a b", b"a\r\nset-cookie: b", b"a\n", "é".encode(), b"<script>", b'"']
)
async def test_an_insane_request_id_or_none_becomes_one_of_ours(gate, api, gatehouse, given):
    headers = [] if given is None else [(b"x-request-id", given)]
    ids = set()
    for _ in range(2):
        answer = await knock(gate, bearer(gatehouse.KEY), *headers)
        assert answer.header("x-request-id") == api.scopes[-1][REQUEST_ID]
        ids.add(answer.header("x-request-id"))
    assert len(ids) == 2
    assert all(re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", id_) for id_ in ids)


def test_a_process_that_was_forked_gives_out_ids_of_its_own():
    ids = gate_module._RequestIds()
    before = ids.take()
    ids.begin()
    assert ids.take().partition(b"-")[0] != before.partition(b"-")[0]


async def test_a_request_that_has_an_id_already_keeps_it_and_whoever_gave_it_says_so(api, gatehouse):
    told = []
    gate = Gate(api, verifier=gatehouse.verifier, on_refused=lambda scope, *_: told.append(scope[REQUEST_ID]))
    answer = await knock(gate, (b"x-request-id", b"theirs"), **{REQUEST_ID: "ours"})
    assert answer.problem["requestId"] == "ours"
    assert (answer.header("x-request-id"), told) == (None, ["ours"])


async def test_a_credential_that_has_a_successor_is_told_so_in_every_answer(gate, gatehouse):
    leaving = caller("api-key", rotated_at=1_688_169_599, sunset_at=1_780_000_100)
    gatehouse.book.keys[gatehouse.KEY] = a_grant(leaving, 1_780_000_100, CredentialRotated)
    for _ in range(2):
        answer = await knock(gate, bearer(gatehouse.KEY))
        assert answer.header("deprecation") == "@1688169599"  # RFC 9745 2.1: a date as of RFC 9651 3.3.7
        assert answer.header("sunset") == "Thu, 28 May 2026 20:28:20 GMT"  # RFC 8594 3: an HTTP-date
    gatehouse.clock.now = 1_780_000_100
    answer = await knock(gate, bearer(gatehouse.KEY))
    assert (answer.code, answer.header("sunset")) == ("credential_rotated", None)


async def test_an_end_without_a_successor_is_a_sunset_only(gate, gatehouse):
    gatehouse.book.keys[gatehouse.KEY] = a_grant(caller("api-key", sunset_at=0), 1_780_000_100, CredentialExpired)
    answer = await knock(gate, bearer(gatehouse.KEY))
    assert (answer.header("sunset"), answer.header("deprecation")) == ("Thu, 01 Jan 1970 00:00:00 GMT", None)


async def test_a_lasting_credential_hears_nothing_of_an_end(gate, gatehouse):
    answer = await knock(gate, bearer(gatehouse.KEY))
    assert (answer.header("sunset"), answer.header("deprecation")) == (None, None)


async def test_the_apis_own_headers_stay_and_ours_come_after(gatehouse, counter):
    gate = Gate(Api(headers=[(b"vary", b"accept")]), verifier=gatehouse.verifier, count=counter)
    answer = await knock(gate, bearer(gatehouse.KEY), (b"x-request-id", b"one"))
    assert answer.start["headers"] == [(b"vary", b"accept"), (b"x-request-id", b"one"), *RATES]


async def test_a_refusal_has_one_shape(gate):
    answer = await knock(gate, (b"x-request-id", b"one"))
    assert json.loads(answer.body) == {
        "type": "/docs#problem-credential_required",
        "title": "Unauthorized",
        "status": 401,
        "detail": "Send an API key, an access token or a session JWT as `Authorization: Bearer …` or as `R-Auth: …`.",
        "code": "credential_required",
        "requestId": "one",
    }


# --- WebSockets, lifespan, others ---


async def test_a_websocket_of_a_known_caller_is_accepted_with_the_rate_headers(gate, api, gatehouse, counter):
    answer = await knock(gate, bearer(gatehouse.KEY), type="websocket", scheme="wss")
    (accepted,) = answer.messages
    assert accepted["type"] == "websocket.accept"
    assert [name for name, _ in accepted["headers"]] == [b"x-request-id", b"ratelimit"]
    assert caller_of(api.scope) == caller("api-key")
    assert len(counter.counted) == 1


async def test_a_websocket_of_a_stranger_is_closed_before_it_is_open(gate, api):
    answer = await knock(gate, bearer("x"), type="websocket", scheme="wss")
    assert answer.messages == [{"type": "websocket.close", "code": 1008, "reason": "invalid_credential"}]
    assert api.scopes == []


async def test_a_websocket_of_a_stranger_gets_a_whole_answer_where_the_server_can_give_it(gate, api):
    answer = await knock(gate, type="websocket", scheme="wss", extensions={"websocket.http.response": {}})
    assert [message["type"] for message in answer.messages] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert (answer.status, answer.code) == (401, "credential_required")
    assert answer.header("www-authenticate") == 'Bearer realm="gatelodge"'
    assert api.scopes == []


async def test_r46_a_websocket_without_tls_is_refused(gate, gatehouse):
    answer = await knock(gate, bearer(gatehouse.KEY), type="websocket", scheme="ws")
    assert answer.messages[0]["reason"] == "https_required"


async def test_an_api_that_denies_a_websocket_itself_does_so_with_the_rate_headers(gatehouse, counter):
    async def denying(scope, receive, send):
        await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b""})

    gate = Gate(denying, verifier=gatehouse.verifier, count=counter)
    answer = await knock(gate, bearer(gatehouse.KEY), type="websocket", scheme="wss")
    assert answer.header("ratelimit") == '"hour";r=9;t=60'


async def test_the_lifespan_is_the_apis_own(gate, api):
    answer = await knock(gate, type="lifespan")
    assert answer.messages == [{"type": "lifespan.startup.complete"}]
    assert api.scope["type"] == "lifespan"


async def test_a_connection_of_an_unknown_sort_is_let_through_by_nobody(gate, api):
    with pytest.raises(ValueError, match="http, websocket and lifespan"):
        await knock(gate, type="webtransport")
    assert api.scopes == []


# --- Who hears of refusals ---


async def test_a_refusal_is_told_to_whoever_asked_with_the_caller_if_it_was_known(api, gatehouse):
    told = []
    full = QuotaExceeded(["hour"], 1)
    gate = Gate(
        api, verifier=gatehouse.verifier, count=Counter(full), on_refused=lambda _, why, who: told.append((type(why), who))
    )
    await knock(gate, bearer(gatehouse.KEY), scheme="http", **{CALLER: caller(partner="of an outer gate")})
    await knock(gate, bearer("x"))
    await knock(gate, bearer(gatehouse.KEY))
    assert told == [(HttpsRequired, None), (InvalidCredential, None), (QuotaExceeded, caller("api-key"))]


async def test_r69_by_default_a_refusal_is_logged_without_the_credential(gate, gatehouse, caplog):
    with caplog.at_level(logging.INFO, logger="gatelodge.gate"):
        await knock(gate, bearer("s3cret"), (b"x-request-id", b"one"))
        await knock(gate, bearer(gatehouse.KEY), JSON, (b"x-request-id", b"two"), body=b'{"partner":"s3cret"}')
    assert [record.getMessage() for record in caplog.records] == [
        "refused invalid_credential: partner -, request one",
        "refused partner_mismatch: partner acme-motors, request two",
    ]


async def test_what_is_a_mistake_and_no_refusal_is_not_swallowed(gatehouse):
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    for app, count in [(broken, None), (Api(), Counter(ZeroDivisionError()))]:
        with pytest.raises(ZeroDivisionError):
            await knock(Gate(app, verifier=gatehouse.verifier, count=count), bearer(gatehouse.KEY))


async def test_fifty_at_once_are_fifty_callers_and_their_answers_are_their_own(gate, api, gatehouse):
    texts = [gatehouse.credentials[KINDS[number % 3]] if number % 5 else "stranger" for number in range(50)]
    answers = await asyncio.gather(
        *(knock(gate, bearer(text), (b"x-request-id", b"%d" % number)) for number, text in enumerate(texts))
    )
    assert [answer.header("x-request-id") for answer in answers] == [str(number) for number in range(50)]
    assert [answer.status for answer in answers] == [200 if number % 5 else 401 for number in range(50)]
    assert {scope[REQUEST_ID]: caller_of(scope).credential for scope in api.scopes} == {
        str(number): KINDS[number % 3] for number in range(50) if number % 5
    }


@pytest.mark.parametrize("kind", KINDS)
async def test_r25_whoever_is_revoked_while_the_request_is_counted_is_refused(api, gatehouse, kind):
    async def count_slowly(who, scope):
        await asyncio.sleep(0)
        gatehouse.end(kind, CredentialRevoked)
        return RATES

    answer = await knock(Gate(api, verifier=gatehouse.verifier, count=count_slowly), bearer(gatehouse.credentials[kind]))
    assert (answer.code, api.scopes) == ("credential_revoked", [])


async def test_the_api_hears_of_what_has_changed_while_the_request_was_counted(api, gatehouse):
    async def count_slowly(who, scope):
        gatehouse.book.keys[gatehouse.KEY] = a_grant(caller("api-key", tier="gold"))
        gatehouse.book.change("credential", "k3yk3yk3yk3y")
        return RATES

    await knock(Gate(api, verifier=gatehouse.verifier, count=count_slowly), bearer(gatehouse.KEY))
    assert caller_of(api.scope).tier == "gold"


# --- The API's own answer ---


async def test_what_the_gate_says_is_said_once_whatever_the_api_says_of_it(gatehouse, counter):
    theirs = [(b"x-request-id", b"theirs"), (b"RateLimit", b"theirs"), (b"sunset", b"theirs"), (b"vary", b"a"), (b"vary", b"b")]
    gate = Gate(Api(headers=theirs), verifier=gatehouse.verifier, count=counter)
    answer = await knock(gate, bearer(gatehouse.KEY), (b"x-request-id", b"one"))
    # A sunset of the API's own stays: the credential has none.
    assert answer.start["headers"] == [*theirs[2:], (b"x-request-id", b"one"), *RATES]


@pytest.mark.parametrize("headers", [{}, {"headers": []}, {"headers": [(b"vary", b"accept")]}])
async def test_an_answer_that_an_api_sends_again_and_again_stays_as_it_is(gatehouse, counter, headers):
    start = {"type": "http.response.start", "status": 204, **headers}
    before = {name: list(value) if name == "headers" else value for name, value in start.items()}

    async def app(scope, receive, send):
        await send(start)
        await send({"type": "http.response.body", "body": b""})

    gate = Gate(app, verifier=gatehouse.verifier, count=counter)
    for _ in range(2):
        answer = await knock(gate, bearer(gatehouse.KEY))
        assert answer.all("ratelimit") == ['"hour";r=9;t=60']
    assert start == before


def test_a_body_limit_is_a_number_of_bytes(api, gatehouse):
    with pytest.raises(ValueError, match="bytes"):
        Gate(api, verifier=gatehouse.verifier, body_limit=-1)
