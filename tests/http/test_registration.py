"""Registration over the wire: what is answered to whom, and what is told to nobody."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from harness import Server
from outside import (
    REGISTER,
    RFC3339,
    add_partner,
    ask,
    bearer,
    code_for,
    code_in,
    create_company,
    fresh,
    log_in,
    mails_to,
    next_mail_to,
    outcome,
    problem,
    r_auth,
    register,
    registration,
    until,
)

INVALID = (401, "invalid_verification_code")
LIMITED = (429, "too_many_failures")
NOT_ALLOWED = (403, "insufficient_scope")
KEY = re.compile(r"gatelodge_uat_pk_[0-9A-Za-z]{12}_[0-9A-Za-z]{36}")


def address():
    """One that nobody has used before."""
    return f"{fresh('dev')}@acme.example"


def verify(client, to, code):
    return client.post(f"{REGISTER}/Verify", json={"contactEmail": to, "verificationCode": code})


def registered(server, client, to=None, **changes):
    """The answer to a Verify."""
    to = to or address()
    answer = verify(client, to, code_for(server, client, to, **changes))
    assert answer.status_code == 200, answer.text
    return answer.json()


def other_than(code):
    return f"{(int(code) + 1) % 10**6:06}"


# --- Register ---


def test_a_registration_is_accepted_and_a_code_comes_by_mail(server, client):
    to = address()
    before = datetime.now(UTC)
    answer = register(client, to)
    assert answer.status_code == 202
    assert answer.headers["cache-control"] == "no-store"
    said = answer.json()
    assert set(said) == {"contactEmail", "expiresAt"}
    assert said["contactEmail"] == to
    assert RFC3339.fullmatch(said["expiresAt"])
    left = datetime.fromisoformat(said["expiresAt"]) - before
    assert timedelta(minutes=10) <= left + timedelta(milliseconds=1) < timedelta(minutes=11)
    mail = next_mail_to(server, to, 0)
    assert code_in(mail)
    assert f"curl --cacert {server.data / 'tls' / 'ca.pem'} https://" in mail.get_body(("plain",)).get_content()


def test_an_address_is_answered_as_it_was_normalised(client):
    local = fresh("Dev")
    assert register(client, f"  {local}@ACME.Example ").json()["contactEmail"] == f"{local}@acme.example"


def test_r54_whatever_else_is_said_has_no_effect(server, client):
    said = {"tier": "business", "role": "admin", "env": "production", "verified": True, "companyId": "1", "partnerId": "root"}
    said |= {"status": "active", "origin": "managed", "requestsPerHour": 10**6}
    to, name = address(), fresh("Firm ")
    code = code_for(server, client, to, organizationName=name, **said)
    answer = client.post(f"{REGISTER}/Verify", json={"contactEmail": to, "verificationCode": code, **said})
    key = answer.json()
    assert (key["partnerId"], key["tier"]) == (name.lower().replace(" ", "-"), "starter")
    assert key["rateLimits"] == {"requestsPerHour": 100, "requestsPerDay": 1000}
    rotated = client.post(f"{REGISTER}/Rotate", json=said, headers=bearer(key["apiKey"])).json()
    assert (rotated["partnerId"], rotated["tier"], rotated["rateLimits"]) == (key["partnerId"], "starter", key["rateLimits"])


@pytest.mark.parametrize("field", ["contactEmail", "displayName", "agreedToTerms"])
def test_what_is_required_must_be_there(client, field):
    asked = registration(address())
    del asked[field]
    answer = client.post(REGISTER, json=asked)
    assert outcome(answer) == (422, "invalid_fields")
    assert problem(answer)["errors"] == [{"pointer": f"/{field}", "detail": "is required"}]


LONG = "a" * 200
BAD = {
    "contactEmail": [
        "",
        "nobody",
        "a@b",
        "@acme.example",
        "dev@",
        "dev@acme..example",
        "dev@@acme.example",
        "dev@acme.example\r\nBcc: all@acme.example",
        "dev\x00@acme.example",
        "dev@[127.0.0.1]",
        "a" * 250 + "@acme.example",
        "\ufdfa" * 19 + "@acme.example",
        "Dev <dev@acme.example>",
        7,
        None,
        ["dev@acme.example"],
    ],
    "displayName": ["", "  ", "a" * 201, "Acme\nMotors", "Acme\x07", "Acme\u2028Motors", None, 7],
    "agreedToTerms": [False, None, "true", 1, "yes", [True]],
    "organizationName": ["", "a" * 201, "Acme\r\nMotors", "\x1b[31m", 7],
    "websiteUrl": [
        "",
        "acme.example",
        "ftp://acme.example",
        "javascript:alert(1)",
        "https://",
        "https:///path",
        "https://acme.example/ x",
        "https://acme.example/\nx",
        "https://user:password@acme.example/",
        "https://acme.example:99999/",
        "http://[::1",
        "https://acme.example/" + "a" * 480,
        7,
    ],
    "intendedUse": ["", "a" * 1001, "to\nsell", "to\tsell", 7],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_field_that_is_not_valid_is_told_by_its_pointer(client, field, value):
    content = json.dumps(registration(address()) | {field: value})  # in ASCII: it can say what is no text at all
    answer = client.post(REGISTER, content=content, headers={"Content-Type": "application/json"})
    assert outcome(answer) == (422, "invalid_fields")
    (error,) = problem(answer)["errors"]
    assert error["pointer"] == f"/{field}"
    assert re.fullmatch(r"[^A-Z\n][^\n]*", error["detail"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("displayName", "a" * 200),
        ("organizationName", None),
        ("organizationName", "a" * 200),
        ("websiteUrl", "http://acme.example"),
        ("websiteUrl", "HTTPS://acme.example:8443/a?b#c"),
        ("websiteUrl", "https://acme.example/" + "a" * 479),
        ("intendedUse", "a" * 1000),
        ("intendedUse", None),
    ],
)
def test_a_field_at_the_limit_of_what_is_valid_is_accepted(client, field, value):
    assert register(client, address(), **{field: value}).status_code == 202


def test_all_that_is_wrong_is_told_at_once(client):
    answer = client.post(REGISTER, json={"contactEmail": "x", "agreedToTerms": False, "websiteUrl": "x"})
    pointers = [error["pointer"] for error in problem(answer)["errors"]]
    assert sorted(pointers) == ["/agreedToTerms", "/contactEmail", "/displayName", "/websiteUrl"]


@pytest.mark.parametrize(
    ("content", "media_type", "refused"),
    [
        (b"{", "application/json", (400, "malformed_json")),
        (b"[]", "application/json", (400, "malformed_json")),
        (b'{"a":1,"a":2}', "application/json", (400, "malformed_json")),
        (b"{}", "text/plain", (415, "unsupported_media_type")),
        (b'{"a":"' + b"a" * 65536 + b'"}', "application/json", (413, "body_too_large")),
    ],
)
@pytest.mark.parametrize("path", [REGISTER, f"{REGISTER}/Verify"])
def test_a_body_that_cannot_be_read_is_refused(client, path, content, media_type, refused):
    assert outcome(client.post(path, content=content, headers={"Content-Type": media_type})) == refused


def test_r62_nothing_tells_what_is_known_of_an_address(server, client):
    """The same status, headers and shape for an address that is new, pending, active, suspended or deactivated."""
    new, pending, active, suspended, deactivated = (address() for _ in range(5))
    register(client, pending)
    registered(server, client, active)
    for to, command in ((suspended, "suspend"), (deactivated, "deactivate")):
        ask("partner", command, registered(server, client, to)["partnerId"], data=server.data)

    def shape(answer, to):
        headers = {name: value for name, value in answer.headers.items() if name not in {"date", "x-request-id"}}
        told = {name: value for name, value in answer.json().items() if name not in {"expiresAt", "requestId"}}
        if "contactEmail" in told:
            assert told.pop("contactEmail") == to
            headers["content-length"] = str(int(headers["content-length"]) - len(to))
        return answer.status_code, headers, told

    addresses = (new, pending, active, suspended, deactivated)
    for asked in (register, lambda client, to: verify(client, to, "no-code")):
        shapes = [shape(asked(client, to), to) for to in addresses]
        assert all(one == shapes[0] for one in shapes)
    kinds = [next_mail_to(server, to, len(mails_to(server, to)) - 1)["Subject"] for to in addresses]
    assert len(set(kinds)) == 3  # only the mails tell: a code, a code for a new key, no code


# --- Verify ---


def test_a_code_is_exchanged_for_a_key_that_works(server, client):
    to = address()
    answer = verify(client, to, code_for(server, client, to, organizationName=(name := fresh("Motors "))))
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    key = answer.json()
    assert KEY.fullmatch(key.pop("apiKey"))
    assert key == {
        "partnerId": name.lower().replace(" ", "-"),
        "tier": "starter",
        "rateLimits": {"requestsPerHour": 100, "requestsPerDay": 1000},
        "expiresAt": None,
    }
    assert log_in(client, answer.json()["apiKey"])
    assert ask("partner", "show", key["partnerId"], data=server.data)["origin"] == "self-service"


def test_p11_a_lost_answer_to_a_verification_is_given_again_until_the_key_is_used(server, client):
    to = address()
    code = code_for(server, client, to)
    first = verify(client, to, code)
    assert verify(client, to.upper(), code).json() == first.json()
    assert outcome(verify(client, to, other_than(code))) == INVALID
    assert verify(client, to, code).json() == first.json()
    log_in(client, first.json()["apiKey"])
    assert outcome(verify(client, to, code)) == INVALID


def test_r59_the_sixth_attempt_is_refused_even_if_right(server, client):
    to = address()
    code = code_for(server, client, to)
    assert [outcome(verify(client, to, other_than(code))) for _ in range(5)] == [INVALID] * 5
    assert outcome(verify(client, to, code)) == INVALID


def test_r59_of_many_guesses_at_once_no_more_than_five_are_judged(server, client):
    to = address()
    code = code_for(server, client, to)
    guesses = [other_than(code)] * 12
    with ThreadPoolExecutor(12) as pool:
        assert {outcome(answer) for answer in pool.map(lambda guess: verify(client, to, guess), guesses)} == {INVALID}
    assert outcome(verify(client, to, code)) == INVALID


def test_r55_nothing_is_verified_before_it_is_registered(client):
    for code in ("000000", "", "x"):
        assert outcome(verify(client, address(), code)) == INVALID


@pytest.mark.parametrize(
    ("asked", "pointer"),
    [
        ({"contactEmail": "nobody", "verificationCode": "000000"}, "/contactEmail"),
        ({"contactEmail": "dev@acme.example"}, "/verificationCode"),
        ({"contactEmail": "dev@acme.example", "verificationCode": 123456}, "/verificationCode"),
        ({"contactEmail": "dev@acme.example", "verificationCode": None}, "/verificationCode"),
        ({"verificationCode": "000000"}, "/contactEmail"),
    ],
)
def test_a_verification_that_is_not_valid_is_told_by_its_pointer(client, asked, pointer):
    answer = client.post(f"{REGISTER}/Verify", json=asked)
    assert outcome(answer) == (422, "invalid_fields")
    assert [error["pointer"] for error in problem(answer)["errors"]] == [pointer]


def test_an_active_partner_gets_a_new_key_by_mail_and_the_old_one_ends(server, client):
    to = address()
    old = registered(server, client, to)
    new = registered(server, client, to, organizationName="Evil", displayName="Mallory")
    assert (new["partnerId"], new["tier"]) == (old["partnerId"], old["tier"])
    assert outcome(client.post("/auth/login", json={"apiKey": old["apiKey"]})) == (401, "credential_rotated")
    assert log_in(client, new["apiKey"])
    subjects = until(lambda: (found := [m["Subject"] for m in mails_to(server, to)])[2:] and found, "the notice of the new key")
    assert len(set(subjects)) == 3


COUNTS = {"sequence", "verifiers", "acknowledged"}


def test_a_recovery_says_who_has_heard_of_it_when_it_is_asked_and_a_first_registration_never(server, client):
    to = address()

    def verify_and_wait(wait, **said):
        return client.post(f"{REGISTER}/Verify", json={"contactEmail": to, **said}, params={"wait": wait})

    first = {"verificationCode": code_for(server, client, to)}
    answers = [verify_and_wait("0", **first).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert not COUNTS & set(answers[0])
    recovered = {"verificationCode": code_for(server, client, to)}
    # What cannot be meant costs no attempt: there are five.
    assert [outcome(verify_and_wait("31", **recovered)) for _ in range(6)] == [(422, "invalid_fields")] * 6
    asked, again = (verify_and_wait("0", **recovered).json() for _ in range(2))
    assert set(asked) == set(again) == set(answers[0]) | COUNTS
    assert asked["apiKey"] == again["apiKey"] != answers[0]["apiKey"]
    assert again["sequence"] >= asked["sequence"]
    # Without being asked it answers as it always has, also to a repetition.
    assert set(verify(client, to, recovered["verificationCode"]).json()) == set(answers[0])
    assert set(registered(server, client, to)) == set(answers[0])


def test_a_recovery_waits_for_those_who_follow(tmp_path):
    with Server(tmp_path / "data") as server, server.client() as client, server.client() as other:
        to, feed = address(), "/auth/revocations"
        old = registered(server, client, to)
        code = code_for(server, client, to)
        position = client.get(feed).json()["position"]
        client.get(feed, params={"after": position, "verifier": "verifier-1"})
        asked = {"contactEmail": to, "verificationCode": code}
        with ThreadPoolExecutor(1) as pool:
            recovered = pool.submit(other.post, f"{REGISTER}/Verify", json=asked, params={"wait": "10"})
            told = set()
            while ("credential", old["apiKey"].split("_")[3], "credential_rotated") not in told:
                page = client.get(feed, params={"after": position, "verifier": "verifier-1", "wait": "25"}).json()
                position = page["position"]
                told |= {(one["kind"], one["subject"], one["code"]) for one in page["revocations"]}
            assert not recovered.done()
            client.get(feed, params={"after": position, "verifier": "verifier-1"})
            said = recovered.result().json()
        assert (said["verifiers"], said["acknowledged"]) == (1, 1)
        assert said["sequence"] <= page["sequence"]


def test_no_code_and_no_key_is_in_the_log(server, client):
    to = address()
    code = code_for(server, client, to)
    key = verify(client, to, code).json()["apiKey"]
    verify(client, to, other_than(code))
    logged = server.log_path.read_text()
    assert key not in logged
    assert code not in re.findall(r"(?<![\w.:-])\d{6}(?![\w.:-])", logged)
    assert to not in logged


# --- Rotate ---


def rotate(client, key, asked=None, **headers):
    content = {"json": asked} if asked is not None else {}
    return client.post(f"{REGISTER}/Rotate", headers={**bearer(key), **headers}, **content)


def test_a_partner_rotates_its_key(server, client):
    old = registered(server, client)
    answer = rotate(client, old["apiKey"])
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    new = answer.json()
    assert {**new, "apiKey": ""} == {**old, "apiKey": ""}
    assert outcome(rotate(client, old["apiKey"])) == (401, "credential_rotated")
    assert outcome(client.get(f"{REGISTER}/Usage", headers=bearer(old["apiKey"]))) == (401, "credential_rotated")
    assert client.get(f"{REGISTER}/Usage", headers=bearer(new["apiKey"])).status_code == 200


def test_a_partner_that_rotates_its_key_too_often_is_told_when_it_may_again(client, partner):
    key = partner.key
    for _ in range(29):
        key = rotate(client, key).json()["apiKey"]
    refused = rotate(client, key)
    assert outcome(refused) == (429, "too_many_requests")
    assert 3000 < int(refused.headers["retry-after"]) <= 3600
    assert log_in(client, key)


def test_a_managed_partner_rotates_its_key_too(client, partner):
    new = rotate(client, partner.key, {"overlapSeconds": 3600}).json()
    assert new["partnerId"] == partner.id
    for key in (partner.key, new["apiKey"]):
        assert client.get(f"{REGISTER}/Usage", headers=r_auth(key)).status_code == 200
    assert outcome(rotate(client, partner.key)) == (409, "key_ended")


def test_p11_a_lost_answer_to_a_rotation_is_given_again(client, partner):
    again = {"Idempotency-Key": fresh()}
    first = rotate(client, partner.key, **again)
    assert rotate(client, partner.key, **again).json() == first.json()
    assert outcome(rotate(client, partner.key)) == (401, "credential_rotated")
    assert outcome(rotate(client, partner.key, {"overlapSeconds": 1}, **again)) == (422, "idempotency_key_reused")
    log_in(client, first.json()["apiKey"])
    spent = rotate(client, partner.key, **again)
    assert outcome(spent) == (409, "idempotency_key_spent")
    # The one who asks may hold the dead key only.
    assert "or ask for a recovery code" in problem(spent)["detail"]


@pytest.mark.parametrize("seconds", [-1, 86_401, 0.5, "1", True, None])
def test_an_overlap_that_is_none_is_refused_and_rotates_nothing(client, partner, seconds):
    answer = rotate(client, partner.key, {"overlapSeconds": seconds})
    assert outcome(answer) == (422, "invalid_fields")
    said = {"pointer": "/overlapSeconds", "detail": "must be a whole number from 0 to 86400"}
    assert problem(answer)["errors"] == [said]
    assert log_in(client, partner.key)


@pytest.mark.parametrize("seconds", [0, 1, 86_400])
def test_an_overlap_at_its_limits_is_accepted(client, partner, seconds):
    assert rotate(client, partner.key, {"overlapSeconds": seconds}).status_code == 200


def test_an_idempotency_key_that_is_none_is_refused(client, partner):
    assert outcome(rotate(client, partner.key, **{"Idempotency-Key": "a b"})) == (400, "invalid_idempotency_key")
    assert log_in(client, partner.key)


# --- Usage and DELETE ---


def test_a_partner_sees_itself_and_its_usage(server, client):
    to, name = address(), fresh("Motors ")
    key = registered(server, client, to, organizationName=name, displayName="Eva Muster")
    answer = client.get(f"{REGISTER}/Usage", headers=bearer(key["apiKey"]))
    assert answer.status_code == 200
    said = answer.json()
    usage, used_key = said.pop("usage"), said.pop("key")
    assert RFC3339.fullmatch(said.pop("registeredAt"))
    assert said == {
        "partnerId": key["partnerId"],
        "displayName": "Eva Muster",
        "contactEmail": to,
        "tier": "starter",
        "status": "active",
        "rateLimits": {"requestsPerHour": 100, "requestsPerDay": 1000},
    }
    assert set(used_key) == {"masked", "createdAt", "expiresAt", "lastUsedAt"}
    assert used_key["masked"].startswith(key["apiKey"][:29])
    assert key["apiKey"] not in answer.text
    assert RFC3339.fullmatch(used_key["createdAt"])
    assert used_key["expiresAt"] is None
    for window, length in (("hour", 100), ("day", 1000)):
        resets_at = usage[window].pop("resetsAt")
        assert RFC3339.fullmatch(resets_at)
        assert datetime.fromisoformat(resets_at) > datetime.now(UTC)
        assert usage[window] == {"used": 0, "remaining": length}


def test_the_key_in_an_overlap_sees_when_it_ends(client, partner):
    rotate(client, partner.key, {"overlapSeconds": 60})
    ends_at = client.get(f"{REGISTER}/Usage", headers=bearer(partner.key)).json()["key"]["expiresAt"]
    assert timedelta(0) < datetime.fromisoformat(ends_at) - datetime.now(UTC) <= timedelta(seconds=61)


def test_a_partner_that_deactivates_itself_is_gone_for_good_and_its_address_registers_anew(server, client):
    to = address()
    old = registered(server, client, to)
    company = create_company(client, old["apiKey"])
    tokens = log_in(client, old["apiKey"])
    answer = client.delete(REGISTER, headers=bearer(old["apiKey"]))
    assert (answer.status_code, answer.content) == (204, b"")
    for key in (old["apiKey"], company["apiKey"]):
        assert outcome(client.post("/auth/login", json={"apiKey": key})) == (401, "credential_revoked")
    assert outcome(client.get("/companies", headers=r_auth(tokens["jwt"]))) == (401, "credential_revoked")
    assert outcome(client.delete(REGISTER, headers=bearer(old["apiKey"]))) == (401, "credential_revoked")
    new = registered(server, client, to)
    assert new["partnerId"] != old["partnerId"]
    assert outcome(rotate(client, old["apiKey"])) == (401, "credential_revoked")


def test_a_partner_that_a_manager_has_made_is_not_ended_by_one_api_key(client, partner):
    answer = client.delete(REGISTER, headers=bearer(partner.key))
    assert outcome(answer) == NOT_ALLOWED
    assert log_in(client, partner.key)
    described = client.get("/openapi.json").json()["paths"][REGISTER]["delete"]["description"]
    assert "insufficient_scope" in described


CALLS = [("POST", f"{REGISTER}/Rotate"), ("GET", f"{REGISTER}/Usage"), ("DELETE", REGISTER)]


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_only_the_partners_own_key_is_for_these_calls(server, client, partner, method, path):
    company = create_company(client, partner.key)
    token = ask("token", "issue", partner.id, data=server.data)["token"]
    others = [log_in(client, partner.key)["jwt"], company["apiKey"], log_in(client, company["apiKey"])["jwt"], token]
    for credential in others:
        answer = client.request(method, path, headers=bearer(credential))
        assert outcome(answer) == NOT_ALLOWED
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
    assert log_in(client, partner.key)


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_r55_no_call_of_a_partner_is_made_without_its_key(client, partner, method, path):
    assert outcome(client.request(method, path)) == (401, "credential_required")
    for nonsense in ("nonsense", "a.b.c", partner.key[:-1] + ("a" if partner.key[-1] != "a" else "b")):
        assert outcome(client.request(method, path, headers=bearer(nonsense))) == (401, "invalid_credential")
    production = partner.key.replace("_uat_", "_production_")
    assert outcome(client.request(method, path, headers=bearer(production)))[0] == 401
    both = {**bearer(partner.key), **r_auth("another")}
    assert outcome(client.request(method, path, headers=both)) == (400, "ambiguous_credentials")


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_suspended_partner_can_do_nothing(server, client, partner, method, path):
    ask("partner", "suspend", partner.id, data=server.data)
    assert outcome(client.request(method, path, headers=bearer(partner.key))) == (403, "partner_suspended")


def test_other_methods_are_not_for_these_paths(client):
    answer = client.get(REGISTER)
    assert outcome(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, POST"


# --- Limits and switches ---


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory):
    """A server with narrow limits, and no recovery."""
    environ = {
        "GATELODGE_REGISTRATION_LIMIT": "4/hour",
        "GATELODGE_VERIFICATION_FAILURE_LIMIT": "3/minute",
        "GATELODGE_REGISTRATION_TIER": "business",
        "GATELODGE_RECOVERY": "off",
        "GATELODGE_MAILS_PER_ADDRESS": "2",
    }
    data = tmp_path_factory.mktemp("narrow") / "data"
    add_partner(data)  # makes the database
    ask("tier", "set", "business", "--per-hour", "7", "--per-day", "70", data=data)
    with Server(data, environ=environ) as running:
        yield running


@pytest.fixture
def at(narrow_server):
    """A client at a loopback address of its own."""
    clients = []

    def client_at(source):
        transport = httpx2.HTTPTransport(verify=narrow_server.tls(), local_address=source)
        clients.append(httpx2.Client(base_url=narrow_server.url, transport=transport, timeout=30))
        return clients[-1]

    yield client_at
    for client in clients:
        client.close()


def test_r63_a_sender_registers_so_many_times_an_hour(at):
    client = at("127.0.3.1")
    assert [register(client, address()).status_code for _ in range(4)] == [202] * 4
    refused = register(client, address())
    assert outcome(refused) == (429, "too_many_requests")
    assert 1 <= int(refused.headers["retry-after"]) <= 3600
    assert register(at("127.0.3.2"), address()).status_code == 202


def test_r76_past_the_limit_of_failures_nothing_is_judged_and_no_attempt_spent(narrow_server, at):
    to, client = address(), at("127.0.4.1")
    code = code_for(narrow_server, client, to)
    assert [outcome(verify(client, to, other_than(code))) for _ in range(5)] == [INVALID] * 3 + [LIMITED] * 2
    assert outcome(verify(client, to, code)) == LIMITED
    elsewhere = at("127.0.4.2")
    assert outcome(verify(elsewhere, to, other_than(code))) == INVALID  # the fourth
    assert verify(elsewhere, to, code).json()["tier"] == "business"


def test_r76_a_crowd_of_guesses_at_once_gets_no_further_than_one_after_the_other(narrow_server, at):
    to, client = address(), at("127.0.5.1")
    code = code_for(narrow_server, client, to)
    with ThreadPoolExecutor(10) as pool:
        outcomes = list(pool.map(lambda guess: outcome(verify(client, to, guess)), [other_than(code)] * 10))
    assert outcomes.count(INVALID) == 3
    assert outcomes.count(LIMITED) == 7
    assert verify(at("127.0.5.2"), to, code).status_code == 200  # of the five attempts at it, three are spent


def test_without_recovery_a_partner_gets_no_code_and_is_answered_as_ever(narrow_server, at):
    to, client = address(), at("127.0.6.1")
    key = registered(narrow_server, client, to)
    assert key["rateLimits"] == {"requestsPerHour": 7, "requestsPerDay": 70}
    assert register(client, to).status_code == 202
    other = address()
    code_for(narrow_server, client, other)  # by now the mailer has been at work again
    assert len(mails_to(narrow_server, to)) == 1
    assert log_in(client, key["apiKey"])


def test_r63_an_address_is_sent_so_many_mails_an_hour(narrow_server, at):
    to, client = address(), at("127.0.7.1")
    assert [register(client, to).status_code for _ in range(3)] == [202] * 3
    code_for(narrow_server, client, address())
    assert len(mails_to(narrow_server, to)) == 2
    lines = [json.loads(line) for line in narrow_server.log_path.read_text().splitlines() if "registration.limited" in line]
    (limited,) = [line for line in lines if line["address"] == "127.0.7.1"]
    assert (limited["event"], limited["limit"]) == ("registration.limited", "mails_per_address")


def test_a_crowd_from_one_address_keeps_nobody_else_from_registering(server):
    def client_at(source):
        transport = httpx2.HTTPTransport(verify=server.tls(), local_address=source)
        return httpx2.Client(base_url=server.url, transport=transport, timeout=30)

    with client_at("127.0.8.1") as crowd, client_at("127.0.8.2") as other, ThreadPoolExecutor(81) as pool:
        answers = [pool.submit(register, crowd, address()) for _ in range(80)]
        assert register(other, address()).status_code == 202
        outcomes = Counter(outcome(answer.result())[1] for answer in answers)
        assert set(outcomes) == {None, "too_many_requests"}
        # Whoever was refused so has spent nothing: as many as the limit allows are let in all the same.
        assert outcomes["too_many_requests"] > 0
        assert register(crowd, address()).status_code == 202


def test_where_registration_is_switched_off_nothing_is_there_but_for_partners(tmp_path):
    with Server(tmp_path / "data", environ={"GATELODGE_REGISTRATION": "off"}) as server, server.client() as client:
        assert outcome(register(client, "dev@acme.example")) == (404, "not_found")
        assert outcome(client.post(REGISTER, content=b"{")) == (404, "not_found")
        assert outcome(verify(client, "dev@acme.example", "000000")) == (404, "not_found")
        partner = add_partner(server.data)
        assert client.get(f"{REGISTER}/Usage", headers=bearer(partner.key)).status_code == 200
        assert outcome(client.delete(REGISTER, headers=bearer(partner.key))) == NOT_ALLOWED
        paths = client.get("/openapi.json").json()["paths"]
        assert "requestBody" not in paths[REGISTER]["post"]
        assert f"{REGISTER}/Verify" not in paths
