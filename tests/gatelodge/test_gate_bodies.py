"""What a body may say of its partner, how it may come, and that the API gets the very bytes that were judged."""

import json
import unicodedata

import pytest
from gating import Api, bearer, caller, knock
from hypothesis import given
from hypothesis import strategies as st

from gatelodge import Gate, PartnerMismatch, Rejected
from gatelodge.errors import MalformedJson
from gatelodge.gate import BODY_MAX, _judge, caller_of, named_partners

JSON = (b"content-type", b"application/json")
OURS = "acme-motors"


@pytest.fixture
def api():
    return Api()


@pytest.fixture
def gate(api, gatehouse):
    return Gate(api, verifier=gatehouse.verifier)


@pytest.fixture
def ask(gate, gatehouse):
    """Send a body as a known caller."""

    async def send(body=b"", *headers, content_type=b"application/json", **options):
        typed = [] if content_type is None else [(b"content-type", content_type)]
        return await knock(gate, bearer(gatehouse.KEY), *typed, *headers, body=body, **options)

    return send


def as_json(value):
    return value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()


# --- R51: the partner ---

NAMES_NOBODY_ELSE = [
    {}, [], [1, "partner", None], {"vin": "1"}, {"partner": OURS}, [{"partner": OURS}, {"partner": OURS}], [{}, {"a": 1}],
    b'{"\\u0070artner": "acme-motors"}', b'{"partner": "\\u0061cme-motors"}', b' \t\r\n{"partner"\n:"acme-motors" } \n',
    {"Partner": OURS}, {"PARTNER": OURS, "partner": OURS}, {"\uff50artner": OURS},
    # Not the field: it has another name, or belongs to something else in the body.
    {"search": {"partner": "zeta"}}, {"partners": "zeta"}, {"partnerId": "zeta"}, {"a": [{"partner": "zeta"}]},
    {"": "zeta"}, {"partner ": "zeta"}, {"p\u0430rtner": "zeta"},
]  # fmt: skip


@pytest.mark.parametrize("body", NAMES_NOBODY_ELSE, ids=repr)
async def test_r51_a_body_that_names_nobody_else_is_passed_on(ask, api, body):
    assert (await ask(as_json(body))).status == 200
    assert api.bodies == [as_json(body)]


FOREIGN = [
    "zeta", "", "acme", "acme-motors2", "ACME-MOTORS", "Acme-motors", "acme-motors ", " acme-motors", "acme-motors\n", "acme-motors\0",
    "acme\u2010motors", "acme\u00admotors", "acme_motors", "acme-m\u043etors", "\u0430cme-motors", "acme-motors\u200b",
    "\uff41cme-motors", "acme-motor\u017f", "\u1d43cme-motors", "acme-motors\u0301", "\ufeffacme-motors",
    None, True, False, 0, 1, 1.5, [], {}, [OURS], ["acme-motors", "zeta"], {"id": OURS}, {OURS: OURS},
]  # fmt: skip


@pytest.mark.parametrize(
    "field",
    ["partner", "Partner", "PARTNER", "pArtneR", "\uff50artner", "part\u207fer", "\u1d3e\u1d2c\u1d3f\u1d40\u1d3a\u1d31\u1d3f"],
)
@pytest.mark.parametrize("named", FOREIGN, ids=ascii)
async def test_r51_any_other_partner_is_refused_whatever_it_looks_like(ask, api, field, named):
    assert unicodedata.normalize("NFKC", field).casefold() == "partner"
    for body in ({field: named}, {"vin": "1", field: named, "z": {}}, [{field: named}], [{"partner": OURS}, 1, {field: named}]):
        answer = await ask(as_json(body))
        assert (answer.status, answer.code) == (401, "partner_mismatch")
        assert 'error_description="partner_mismatch"' in answer.header("www-authenticate")
    assert api.scopes == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\u0070artner":"zeta"}', b'{"p\\u0061\\u0072tner":"zeta"}', b'{"partner":"\\u007aeta"}',
        b'{"partner":"acme-motors","Partner":"zeta"}', b'{"Partner":"zeta","partner":"acme-motors"}',
    ],
)  # fmt: skip
async def test_r51_no_spelling_hides_another_partner(ask, api, body):
    assert (await ask(body)).code == "partner_mismatch"
    assert api.scopes == []


MALFORMED = {
    "twice": b'{"partner":"acme-motors","partner":"acme-motors"}',
    "twice, the good one last": b'{"partner":"zeta","partner":"acme-motors"}',
    "twice, one escaped": b'{"partner":"acme-motors","\\u0070artner":"zeta"}',
    "another member twice": b'{"a":1,"a":1}',
    "twice, further in": b'{"a":[{"b":1,"b":1}]}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "too large for a float": b'{"a":1e999}',
    "an endless number": b'{"a":' + b"9" * 5000 + b"}",
    "BOM": b'\xef\xbb\xbf{"partner":"acme-motors"}',
    "UTF-16": '{"partner":"acme-motors"}'.encode("utf-16"),
    "UTF-16 without a BOM": '{"partner":"acme-motors"}'.encode("utf-16-le"),
    "UTF-32": '{"partner":"acme-motors"}'.encode("utf-32"),
    "Latin-1": '{"a":"é"}'.encode("latin-1"),
    "overlong UTF-8": b'{"\xc1\xb0artner":"zeta"}',
    "a surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "half a surrogate pair": b'{"a":"\\ud800"}',
    "half a surrogate pair in a name": b'{"\\udc00":1}',
    "a string": b'"acme-motors"',
    "a number": b"1",
    "null": b"null",
    "nothing but space": b" \n",
    "NUL": b"\0",
    "cut off": b'{"partner":"zet',
    "two values": b'{"partner":"acme-motors"}{"partner":"zeta"}',
    "a comment": b'{"partner":"acme-motors"/*,"partner":"zeta"*/}',
    "a comma too many": b'{"partner":"acme-motors",}',
    "single quotes": b"{'partner':'zeta'}",
    "no quotes": b'{partner:"zeta"}',
    "a control character": b'{"a":"\n"}',
    "deep": b'{"a":' * 17 + b"1" + b"}" * 17,
    "very deep": b"[" * 30_000,
    "deep behind a string": b'{"a":"' + b"}" * 40 + b'","b":' + b"[" * 16 + b"]" * 16 + b"}",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
async def test_r51_what_two_readers_might_read_differently_is_refused(ask, api, body):
    answer = await ask(body)
    assert (answer.status, answer.code, api.scopes) == (400, "malformed_json", [])


@pytest.mark.parametrize(("depth", "good"), [(15, True), (16, True), (17, False)])
async def test_a_body_is_16_levels_deep_at_most(ask, depth, good):
    answer = await ask(b'{"a":' * (depth - 1) + b"[" + b"]" + b"}" * (depth - 1))
    assert (answer.status == 200) is good


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6) | st.just(OURS),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["partner", "Partner", "PARTNER", "\uff50artner", "parTner", "partner ", "vin"]) | st.text(max_size=3),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(value=json_values, escaped=st.booleans(), indent=st.sampled_from([None, 1]))
def test_r51_whatever_json_is_let_through_names_no_other_partner(value, escaped, indent):
    """Read again by the standard library, which knows nothing of the gate."""
    body = json.dumps(value, ensure_ascii=escaped, indent=indent).encode()
    again = json.loads(body)
    objects = (
        [again]
        if isinstance(again, dict)
        else [one for one in again if isinstance(one, dict)]
        if isinstance(again, list)
        else []
    )
    named = [
        said for one in objects for name, said in one.items() if unicodedata.normalize("NFKC", name).casefold() == "partner"
    ]
    try:
        _judge(body, caller())
    except PartnerMismatch:
        assert any(said != OURS for said in named)
    except MalformedJson:
        assert not isinstance(again, (dict, list))
    else:
        assert isinstance(again, (dict, list))
        assert all(isinstance(said, str) and said == OURS for said in named)


@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0partneacme-motrsz \n', max_size=60).map(str.encode))
def test_r51_no_bytes_whatever_are_an_accident(body):
    """Refused as what it is, or read by a lenient reader as naming nobody else."""
    try:
        _judge(body, caller())
    except (Rejected, MalformedJson):
        return
    again = json.loads(body.decode("utf-8"))
    assert named_partners(again) in ([], [OURS])


# --- How a body comes ---


@pytest.mark.parametrize("by", [-1, 0, 1])
@pytest.mark.parametrize("limit", [BODY_MAX, 100])
@pytest.mark.parametrize("way", ["announced", "chunked", "crumbs", "announced as less", "not announced by HTTP/2"])
async def test_a_body_is_as_large_as_the_limit_at_most(api, gatehouse, by, limit, way):
    gate = Gate(api, verifier=gatehouse.verifier, body_limit=limit)
    body = b'{"a":"' + b"x" * (limit - 8 + by) + b'"}'
    assert len(body) == limit + by
    options = {
        "announced": {"body": body},
        "chunked": {"chunks": [body[:50], body[50:]]},
        "crumbs": {"chunks": [body[at : at + 7] for at in range(0, len(body), 7)] + [b""]},
        "announced as less": {"body": body, "announced": False},
        "not announced by HTTP/2": {"chunks": [body], "announced": False, "http_version": "2"},
    }[way]
    headers = [(b"content-length", b"2")] if way == "announced as less" else []
    answer = await knock(gate, bearer(gatehouse.KEY), JSON, *headers, **options)
    if by <= 0:
        assert (answer.status, api.bodies) == (200, [body])
    else:
        assert (answer.status, answer.code, api.scopes) == (413, "body_too_large", [])


@pytest.mark.parametrize("length", [b"65537", b"99999999999999999999999999", b"065537"])
async def test_a_body_that_is_announced_as_too_large_is_not_even_read(gate, api, gatehouse, length):
    async def nothing_is_read():
        raise AssertionError("read")

    answer = await knock(
        gate, bearer(gatehouse.KEY), JSON, (b"content-length", length), body=b"{}", before_chunk=nothing_is_read
    )
    assert (answer.status, answer.code, api.scopes) == (413, "body_too_large", [])


@pytest.mark.parametrize("length", [b"-1", b"", b"2.0", b"2,2", b"0x2", b"+2", "٢".encode()])
async def test_a_length_that_is_no_number_is_refused(ask, api, length):
    answer = await ask(b"{}", (b"content-length", length))
    assert (answer.status, answer.code, api.scopes) == (400, "malformed_request", [])


async def test_two_lengths_are_refused_unless_they_are_one(ask, api):
    assert (await ask(b"{}", (b"content-length", b"2"), (b"content-length", b"3"))).code == "malformed_request"
    assert api.scopes == []
    assert (await ask(b"{}", (b"content-length", b"2"), (b"content-length", b"2"))).status == 200


@pytest.mark.parametrize(
    "options", [{}, {"chunks": [b""]}, {"chunks": [b"", b""]}, {"http_version": "2"}, {"http_version": "3"}]
)
@pytest.mark.parametrize("content_type", [None, b"application/json", b"text/plain"])
async def test_a_request_without_a_body_needs_no_media_type(ask, api, content_type, options):
    assert (await ask(content_type=content_type, **options)).status == 200
    assert api.bodies == [b""]


@pytest.mark.parametrize("pieces", [[b"{}"], [b"{", b"}"], [b'{"partner":', b'"zeta"}']])
async def test_a_body_that_is_cut_off_is_not_the_whole_body(ask, api, pieces):
    answer = await ask(chunks=[*pieces, b""], cut=True)
    assert (answer.code, api.scopes) == ("malformed_request", [])


@pytest.mark.parametrize("chunks", [[b'{"partner":"acme-motors"}'], [b'{"part', b"", b'ner":"acme-', b'motors"}']])
async def test_the_api_gets_the_very_bytes_and_hears_afterwards_that_the_client_has_gone(ask, api, chunks):
    assert (await ask(chunks=chunks)).status == 200
    assert api.bodies == [b"".join(chunks)]
    assert api.after == [{"type": "http.disconnect"}]


@pytest.mark.parametrize(
    "options", [{"body": b'{"partner":"zeta"}'}, {"chunks": [b"", b'{"partner":"zeta"}']}, {"chunks": [b"{", b"}"]}]
)
async def test_r51_a_body_that_nobody_announced_nobody_reads(ask, api, options):
    """HTTP/1.1 knows no such request, but what stands between it and ASGI may make one."""
    assert (await ask(**options, announced=False)).status == 200
    assert api.bodies == [b""]
    assert api.after == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS", "HEAD", "PATCH", "MADE-UP"])
async def test_r51_the_method_makes_no_difference(ask, method):
    assert (await ask(b'{"partner":"zeta"}', method=method)).code == "partner_mismatch"


@pytest.mark.parametrize("kind", ["api-key", "access-token", "session"])
async def test_r25_a_credential_that_is_revoked_while_the_body_is_on_its_way_is_refused(gate, api, gatehouse, kind):
    ended = []

    async def end():
        if not ended:
            ended.append(gatehouse.end(kind))

    answer = await knock(gate, bearer(gatehouse.credentials[kind]), JSON, chunks=[b"{", b"}"], before_chunk=end)
    assert (answer.status, answer.code, api.scopes) == (401, "credential_revoked", [])


async def test_r39_the_caller_is_as_it_is_when_the_body_has_come(gate, api, gatehouse):
    async def move():
        gatehouse.book.keys[gatehouse.KEY] = gatehouse.book.keys[gatehouse.KEY]._replace(caller=caller(tier="gold"))
        gatehouse.book.change("partner", OURS)

    await knock(gate, bearer(gatehouse.KEY), JSON, body=b"{}", before_chunk=move)
    assert caller_of(api.scope).tier == "gold"


# --- What a body is said to be ---

GOOD_TYPES = [
    b"application/json", b"Application/JSON", b"application/json; charset=utf-8", b'application/json;charset="UTF-8"',
    b"application/json ; CHARSET = us-ascii", b"application/vnd.acme.v1+json", b"application/merge-patch+json; charset=utf-8",
    b"application/json; profile=x", b" application/json ", b"application/json; charset=utf8", b'application/json; charset="UTF8"',
]  # fmt: skip
OTHER_TYPES = [
    None, b"", b"text/plain", b"text/json", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x",
    b"application/octet-stream", b"application/jsonp", b"application/json5", b"application/json-seq", b"application/ndjson",
    b"application/xjson", b"application/+json", b"application/json, text/plain", b"application/json charset=utf-8", b"json",
    b"application/json; charset=utf-16", b"application/json; charset=latin-1", b"application/json; charset=utf-8; charset=utf-16",
    b"application/json; charset=", b"application/json; charset*=utf-8''utf-16", b"application/json; charset='utf-8'", b"*/*",
]  # fmt: skip


@pytest.mark.parametrize("content_type", GOOD_TYPES)
async def test_json_in_utf_8_is_read_however_it_is_said(ask, api, content_type):
    assert (await ask(b'{"partner":"zeta"}', content_type=content_type)).code == "partner_mismatch"
    assert (await ask(b"{}", content_type=content_type)).status == 200


@pytest.mark.parametrize("content_type", OTHER_TYPES)
async def test_whatever_else_is_refused(ask, api, content_type):
    answer = await ask(b'{"partner":"acme-motors"}', content_type=content_type)
    assert (answer.status, answer.code, api.scopes) == (415, "unsupported_media_type", [])


async def test_two_media_types_are_refused_unless_they_are_one(ask, api):
    assert (await ask(b"{}", (b"content-type", b"text/plain"))).code == "malformed_request"
    assert api.scopes == []
    assert (await ask(b"{}", JSON)).status == 200


@pytest.mark.parametrize(
    ("encodings", "code"),
    [
        ([b"identity"], None), ([b"Identity"], None), ([b""], None), ([b"gzip"], "unsupported_media_type"),
        ([b"br"], "unsupported_media_type"), ([b"identity, gzip"], "unsupported_media_type"),
        ([b"identity", b"gzip"], "malformed_request"), ([b"gzip", b"gzip"], "unsupported_media_type"),
    ],
)  # fmt: skip
async def test_a_compressed_body_is_not_looked_into_and_so_refused(ask, api, encodings, code):
    answer = await ask(b"{}", *((b"content-encoding", encoding) for encoding in encodings))
    assert (None if answer.status == 200 else answer.code) == code


@pytest.mark.parametrize("content_type", [None, b"text/plain", b"multipart/form-data; boundary=x", b"application/jsonp"])
async def test_other_bodies_are_passed_on_unread_where_the_owner_said_so(api, gatehouse, content_type):
    gate = Gate(api, verifier=gatehouse.verifier, other_bodies="pass", body_limit=10)
    typed = [] if content_type is None else [(b"content-type", content_type)]
    pieces = [b'{"partner":"zeta"', b"}" * 100]
    answer = await knock(gate, bearer(gatehouse.KEY), *typed, chunks=pieces)
    assert (answer.status, api.bodies) == (200, [b"".join(pieces)])
    assert (await knock(gate, bearer(gatehouse.KEY), JSON, body=b'{"partner":"zeta"}')).code == "body_too_large"
    assert (await knock(gate, bearer(gatehouse.KEY), JSON, body=b'{"a":NaN}')).code == "malformed_json"


@pytest.mark.parametrize("mode", ["refuse", "pass"])
@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-type", b"application/json; charset=utf-16")],
        [(b"content-type", b"application/vnd.acme+json; charset=latin-1")],
        [(b"content-type", b"application/json; charset=utf-7; charset=utf-8")],
        [JSON, (b"content-encoding", b"gzip")],
        [JSON, (b"content-encoding", b"identity, br")],
    ],
)
async def test_json_that_we_do_not_read_is_never_passed_on_unread(api, gatehouse, mode, headers):
    gate = Gate(api, verifier=gatehouse.verifier, other_bodies=mode)
    for body in ('{"partner":"zeta"}'.encode("utf-16"), b'{"partner":"acme-motors"}'):
        answer = await knock(gate, bearer(gatehouse.KEY), *headers, body=body)
        assert (answer.status, answer.code, api.scopes) == (415, "unsupported_media_type", [])


async def test_another_body_may_be_compressed_where_it_is_passed_on(api, gatehouse):
    gate = Gate(api, verifier=gatehouse.verifier, other_bodies="pass")
    headers = [(b"content-type", b"text/plain"), (b"content-encoding", b"gzip")]
    assert (await knock(gate, bearer(gatehouse.KEY), *headers, body=b"\x1f\x8b")).status == 200
