"""What is taken as a body: one strict JSON object of at most 64 KiB, said to be JSON. And methods: those that are declared."""

import json

import pytest
from outside import bearer, company, connect, create_company, exchange, fresh, outcome, problem, r_auth, read_answer

LIMIT = 64 * 1024
MALFORMED = (400, "malformed_json")
JSON = {"Content-Type": "application/json"}


def create(client, partner, content, **headers):
    return client.post("/companies", content=content, headers={**r_auth(partner.key), **JSON, **headers})


def text(**changes):
    return json.dumps(company(**changes))


def nested(depth):
    """A good body with an extra member, the whole nested so deep."""
    return json.dumps({**company(), "extra": 0})[:-2] + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"1",
        b"{} {}",
        b"{},",
        b"{'a': 1}",
        b'{"a": 1,}',
        b"{a: 1}",
        b'{"a": 01}',
        b'{"a": .5}',
        b'{"a": "\t"}',
        b'{"a": "\\x41"}',
        b"/* */ {}",
        b"companyName=x",
    ],
    ids=range(18),
)
def test_what_is_not_one_json_object_is_refused(client, partner, content):
    assert outcome(create(client, partner, content)) == MALFORMED


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", '"\\ud800"', '"\\udc00\\ud800"'])
def test_r50_what_json_cannot_say_is_refused_wherever_it_stands(client, partner, value):
    assert outcome(create(client, partner, text()[:-1] + f', "extra": {value}}}')) == MALFORMED
    assert outcome(create(client, partner, text()[:-1] + f', "extra": [{{"deep": {value}}}]}}')) == MALFORMED
    if value.startswith('"'):
        assert outcome(create(client, partner, text()[:-1] + f", {value}: 1}}")) == MALFORMED


def test_r50_a_member_that_is_named_twice_is_refused_at_any_depth(client, partner):
    for extra in ('"country": "DE"', '"x": 1, "x": 2', '"x": {"y": 1, "y": 1}', '"x": [{"y": 1, "\\u0079": 1}]'):
        assert outcome(create(client, partner, f"{text()[:-1]}, {extra}}}")) == MALFORMED


def test_r50_the_same_name_in_two_objects_is_no_repetition(client, partner):
    assert outcome(create(client, partner, text(x={"country": 1}, y={"country": 1}))) == (201, None)


@pytest.mark.parametrize(("depth", "expected"), [(15, (201, None)), (16, (201, None)), (17, MALFORMED), (60_000, MALFORMED)])
def test_r50_a_body_may_be_nested_sixteen_levels_deep(client, partner, depth, expected):
    content = nested(depth) if depth < 1000 else "[" * depth
    assert outcome(create(client, partner, content)) == expected


def test_brackets_in_a_string_are_not_nesting(client, partner):
    assert outcome(create(client, partner, text(extra='[{"\\' * 100))) == (201, None)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_r50_another_encoding_than_utf_8_is_refused(client, partner, encoding):
    content = json.dumps(company(city="Köln"), ensure_ascii=False).encode(encoding)
    assert outcome(create(client, partner, content)) == MALFORMED


def test_a_surrogate_pair_written_as_escapes_is_one_character(client, partner):
    made = create(client, partner, text(city="PLACE").replace("PLACE", "\\ud83d\\ude97"))
    assert outcome(made) == (201, None)
    shown = client.get(f"/companies/{made.json()['companyId']}", headers=bearer(partner.key)).json()
    assert shown["city"] == "🚗"


@pytest.mark.parametrize(
    "media_type",
    ["", "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", "json", "*/*", "application/problem+json"],
)  # fmt: skip
def test_r50_another_media_type_is_refused(client, partner, media_type):
    headers = {"Content-Type": media_type} if media_type else {}
    answer = client.post("/companies", content=text().encode(), headers={**r_auth(partner.key), **headers})
    assert outcome(answer) == (415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json;charset=utf-8", "APPLICATION/JSON", "application/json ; x=y"])
def test_the_media_type_may_be_written_in_any_case_and_with_parameters(client, partner, media_type):
    assert outcome(create(client, partner, text(), **{"Content-Type": media_type})) == (201, None)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
def test_a_compressed_body_is_refused_unread(client, partner, encoding):
    assert outcome(create(client, partner, text(), **{"Content-Encoding": encoding})) == (415, "unsupported_media_type")


@pytest.mark.parametrize(("size", "status"), [(LIMIT - 1, 201), (LIMIT, 201), (LIMIT + 1, 413), (10 * LIMIT, 413)])
@pytest.mark.parametrize("framing", ["content-length", "chunked"])
def test_r50_a_body_may_have_64_kib(client, partner, size, status, framing):
    content = padded(size)
    assert len(content) == size
    pieces = (content[start : start + 9000] for start in range(0, size, 9000))
    answer = create(client, partner, content if framing == "content-length" else pieces)
    assert outcome(answer) == ((201, None) if status == 201 else (413, "body_too_large"))


def padded(size: int) -> bytes:
    content = text().encode()
    return content + b" " * (size - len(content))


def test_r50_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(server, partner):
    head = (
        f"POST /companies HTTP/1.1\r\nHost: x\r\nR-Auth: {partner.key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {LIMIT + 1}\r\n\r\n"
    )
    with connect(server) as connection:
        connection.sendall(head.encode())
        assert read_answer(connection).status == 413


def test_expect_100_continue_is_answered_by_the_refusal_alone(server):
    head = "POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    with connect(server) as connection:
        connection.sendall(f"{head}Content-Length: {LIMIT + 1}\r\n\r\n".encode())
        assert read_answer(connection).status == 413
    with connect(server) as connection:
        connection.sendall(f"{head}Content-Length: 2\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert read_answer(connection).status == 422


def test_who_is_not_admitted_is_told_so_whatever_the_body_is(client):
    for content in (b"{", b"x" * (LIMIT + 1), b"{}"):
        answer = client.post("/companies", content=content, headers={"Content-Type": "text/plain"})
        assert outcome(answer) == (401, "credential_required")


def test_a_wrong_type_and_a_missing_field_are_pointed_at(client):
    for body in ({"apiKey": 1}, {"apiKey": None}, {"apiKey": ["x"]}, {}, {"apikey": "x"}, {"api_key": "x"}):
        answer = client.post("/auth/login", json=body)
        assert outcome(answer) == (422, "invalid_fields")
        assert [error["pointer"] for error in problem(answer)["errors"]] == ["/apiKey"]
    answer = client.post("/auth/refresh", json={"refreshToken": {}})
    assert [error["pointer"] for error in problem(answer)["errors"]] == ["/refreshToken"]


def test_no_answer_repeats_what_it_refuses(client, partner):
    secret = fresh("secret")
    for body in ({"apiKey": secret}, {"apiKey": [secret]}, {"apiKey": {secret: secret}}, {secret: 1}):
        assert secret not in client.post("/auth/login", json=body).text
    for content in (f'{{"apiKey": "{secret}', f"{secret}", f'{{"apiKey": "{secret}", "apiKey": "{secret}"}}'):
        assert secret not in client.post("/auth/login", content=content, headers=JSON).text
    assert secret not in client.post("/companies", json={secret: 1, "country": secret}, headers=r_auth(partner.key)).text
    assert secret not in client.get(f"/{secret}").text


# --- methods --------------------------------------------------------------------------------------------------------------

METHODS = {
    "/auth/login": "POST",
    "/auth/refresh": "POST",
    "/auth/logout": "POST",
    "/companies": "GET, HEAD, POST",
    "/white-label-partner/create-company": "POST",
    "/companies/{id}": "DELETE, GET, HEAD",
    "/companies/{id}/key": "POST",
    "/.well-known/jwks.json": "GET, HEAD",
    "/healthz": "GET, HEAD",
    "/readyz": "GET, HEAD",
    "/openapi.json": "GET, HEAD",
    "/docs": "GET, HEAD",
}


@pytest.mark.parametrize("path", METHODS)
def test_r50_a_method_that_is_not_declared_is_refused_and_allow_names_those_that_are(client, partner, path):
    allowed = METHODS[path]
    concrete = path.format(id=create_company(client, partner.key)["companyId"])
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
        if method in allowed.split(", "):
            continue
        answer = client.request(method, concrete, headers=r_auth(partner.key))
        assert outcome(answer) == (405, "method_not_allowed")
        assert answer.headers["allow"] == allowed
    assert outcome(client.get(concrete, headers=r_auth(partner.key)))[0] in {200, 405}


def test_r50_trace_echoes_nothing(client, partner):
    answer = client.request("TRACE", "/companies", headers=r_auth(partner.key))
    assert outcome(answer) == (405, "method_not_allowed")
    assert partner.key not in answer.text


def test_options_opens_nothing_to_browsers_of_other_sites(client):
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (client.options("/auth/login", headers=headers), client.get("/healthz", headers=headers)):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json", "/docs", "/.well-known/jwks.json"])
def test_head_is_answered_as_get_without_the_body(client, path):
    full, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(full.content))
    assert head.headers["content-type"] == full.headers["content-type"]


def test_head_needs_a_credential_where_get_does(client, partner):
    assert client.head("/companies").status_code == 401
    assert client.head("/companies", headers=r_auth(partner.key)).status_code == 200


def test_a_method_that_does_not_exist_is_refused(server):
    assert exchange(server, b"FETCH /healthz HTTP/1.1\r\nHost: x\r\n\r\n").status in {400, 405}


@pytest.mark.parametrize(
    "path",
    ["/", "/nowhere", "/auth", "/auth/login/", "/companies/", "/companies/x/key/", "/Auth/Login", "/auth//login", "/docs/../healthz", "/%2e%2e/healthz", "/admin", "/metrics"],
)  # fmt: skip
def test_a_path_that_is_not_there_is_a_problem_document_and_no_redirect(server, path):
    answer = exchange(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.status == 404
    assert json.loads(answer.body)["code"] == "not_found"
    assert answer.headers["content-type"] == "application/problem+json"
    assert "location" not in answer.headers
