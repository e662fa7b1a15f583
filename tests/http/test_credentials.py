"""How a credential is presented, and how a refusal says what is wanted."""

import base64
import hashlib
import hmac
import http.server
import json
import threading
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives import serialization
from jwt.algorithms import ECAlgorithm
from outside import bearer, company, create_company, exchange, log_in, outcome, problem, r_auth, refresh, whoami

from gatelodge.tokens import generate_private_key, public_jwk, sign_token

GOOD = (200, None)
INVALID = (401, "invalid_credential")
AMBIGUOUS = (400, "ambiguous_credentials")


def test_r41_without_a_credential_the_challenge_names_no_error(client):
    answer = client.get("/companies")
    assert outcome(answer) == (401, "credential_required")
    assert answer.headers.get_list("www-authenticate") == ['Bearer realm="gatelodge"']


def test_r41_a_bad_credential_is_an_invalid_token(client, server, partner):
    answer = client.get("/companies", headers=bearer("nonsense"))
    assert outcome(answer) == INVALID
    expected = 'Bearer realm="gatelodge", error="invalid_token", error_description="invalid_credential"'
    assert answer.headers.get_list("www-authenticate") == [expected]


@pytest.mark.parametrize("path", ["/auth/login", "/auth/refresh"])
def test_r41_a_401_without_a_header_has_its_challenge_too(client, path):
    answer = client.post(path, json={"apiKey": "nonsense", "refreshToken": "nonsense"})
    assert outcome(answer) == INVALID
    assert answer.headers["www-authenticate"].startswith('Bearer realm="gatelodge", error="invalid_token"')


@pytest.mark.parametrize("name", ["access_token", "token", "apiKey", "api_key", "R-Auth", "Authorization", "jwt"])
def test_r42_a_credential_in_the_query_string_is_none_and_is_not_logged(server, client, partner, tokens, name):
    for secret in (partner.key, tokens["jwt"]):
        assert outcome(client.get("/companies", params={name: secret})) == (401, "credential_required")
        assert outcome(client.get("/nowhere", params={name: secret})) == (404, "not_found")
        assert secret not in server.log_path.read_text()


def test_r42_a_credential_in_a_form_body_or_a_cookie_is_none(client, partner):
    answer = client.get("/companies", headers={"Cookie": f"R-Auth={partner.key}; Authorization=Bearer {partner.key}"})
    assert outcome(answer) == (401, "credential_required")
    form = client.post("/companies", data={"access_token": partner.key})
    assert outcome(form) == (401, "credential_required")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_read_in_any_case(client, partner, scheme):
    assert outcome(client.get("/companies", headers={"Authorization": f"{scheme} {partner.key}"})) == GOOD


@pytest.mark.parametrize("scheme", ["Basic", "Token", "ApiKey", "Bear", ""])
def test_another_scheme_is_no_credential(client, partner, scheme):
    answer = client.get("/companies", headers={"Authorization": f"{scheme} {partner.key}".strip()})
    assert outcome(answer) == (401, "credential_required")


def test_r43_the_same_credential_in_both_headers_is_one_credential(client, partner, tokens):
    for credential in (partner.key, tokens["jwt"]):
        assert outcome(client.get("/companies", headers={**bearer(credential), **r_auth(credential)})) == GOOD


def test_r43_two_credentials_are_refused_however_good_each_is(client, partner, tokens, another_partner):
    for first, second in (
        (partner.key, tokens["jwt"]),
        (tokens["jwt"], partner.key),
        (partner.key, another_partner.key),
        (partner.key, "nonsense"),
    ):
        both = [
            [("Authorization", f"Bearer {first}"), ("R-Auth", second)],
            [("Authorization", f"Bearer {first}"), ("Authorization", f"Bearer {second}")],
            [("R-Auth", first), ("R-Auth", second)],
        ]
        for headers in both:
            assert outcome(client.get("/companies", headers=headers)) == AMBIGUOUS
            assert outcome(client.post("/auth/logout", headers=headers)) == AMBIGUOUS
    assert whoami(client, tokens["jwt"]) == GOOD


def test_r43_the_same_credential_twice_in_one_header_is_refused_or_one_credential(client, partner):
    # As a list in one field line it is another text altogether, and no credential.
    joined = {"Authorization": f"Bearer {partner.key}, Bearer {partner.key}"}
    assert outcome(client.get("/companies", headers=joined)) == INVALID


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Bearer ", b"Bearer a b", "Bearer ö".encode(), b"Bearer \xff\xfe", b"Bearer " + b"x" * 9000, b"Bearer ..", b"Bearer a.b"],
    ids=["empty", "scheme-only", "no-token", "two-words", "utf-8", "latin-1", "long", "dots", "one-dot"],
)  # fmt: skip
def test_a_header_that_holds_no_credential_is_a_401_and_never_worse(server, value):
    answer = exchange(server, b"GET /companies HTTP/1.1\r\nHost: x\r\nAuthorization: " + value + b"\r\n\r\n")
    assert answer.status == 401
    assert problem_code(answer) in {"invalid_credential", "credential_required"}


def test_r43_an_empty_header_beside_a_credential_is_a_second_one(server, partner):
    head = f"GET /companies HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {partner.key}\r\nR-Auth:\r\n\r\n"
    answer = exchange(server, head.encode())
    assert (answer.status, problem_code(answer)) == (400, "ambiguous_credentials")


def test_r44_whatever_holds_a_secret_is_not_to_be_stored(client, partner):
    login = client.post("/auth/login", json={"apiKey": partner.key})
    created = client.post("/companies", json=company(), headers=r_auth(partner.key))
    aliased = client.post("/white-label-partner/create-company", json=company(), headers=r_auth(partner.key))
    rotated = client.post(f"/companies/{created.json()['companyId']}/key", headers=r_auth(partner.key))
    refreshed = refresh(client, login.json()["refreshToken"])
    for answer in (login, created, aliased, rotated, refreshed):
        assert answer.is_success
        assert answer.headers.get_list("cache-control") == ["no-store"]
        assert answer.headers["content-type"] == "application/json"


# --- tokens that we never signed ------------------------------------------------------------------------------------------


def encode(part) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(part: str):
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


@contextmanager
def listener():
    """Somebody who would gladly hand out a key, and counts who asks."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/keys", asked
        finally:
            httpd.shutdown()
            thread.join()


class Forger:
    """Takes a genuine JWT and makes others of it."""

    def __init__(self, client, jwt):
        self.head, self.claims = (decode(part) for part in jwt.split(".")[:2])
        self.jwk = next(key for key in client.get("/.well-known/jwks.json").json()["keys"] if key["kid"] == self.head["kid"])
        self.key = generate_private_key()

    def signed(self, *, head=None, **claims):
        """With a key of the forger's own."""
        signing_input = f"{encode({**self.head, **(head or {})})}.{encode({**self.claims, **claims})}"
        signature = ECAlgorithm(ECAlgorithm.SHA256).sign(signing_input.encode(), self.key)
        return f"{signing_input}.{encode(signature)}"

    def hashed(self, algorithm, secret):
        signing_input = f"{encode({**self.head, 'alg': algorithm})}.{encode(self.claims)}"
        return f"{signing_input}.{encode(hmac.digest(secret, signing_input.encode(), hashlib.sha256))}"

    def public_key_as_bytes(self):
        public = ECAlgorithm(ECAlgorithm.SHA256).from_jwk(self.jwk)
        formats = serialization.PublicFormat.SubjectPublicKeyInfo
        yield public.public_bytes(serialization.Encoding.PEM, formats)
        yield public.public_bytes(serialization.Encoding.DER, formats)
        yield json.dumps(self.jwk).encode()
        yield base64.urlsafe_b64decode(self.jwk["x"] + "==")


def test_r1_no_signature_at_all_and_a_signature_with_the_public_key_are_refused(client, tokens):
    forger = Forger(client, tokens["jwt"])
    _, claims, signature = tokens["jwt"].split(".")
    for name in ("none", "None", "NONE", "nOnE", "", "ES256 ", "es256", "ES384", "RS256", None, ["ES256"]):
        for tail in ("", signature, encode(b"\0" * 64)):
            assert whoami(client, f"{encode({**forger.head, 'alg': name})}.{claims}.{tail}") == INVALID
    for secret in forger.public_key_as_bytes():
        for name in ("HS256", "HS384", "HS512", "ES256"):
            assert whoami(client, forger.hashed(name, secret)) == INVALID
    assert whoami(client, tokens["jwt"]) == GOOD


def test_r3_a_key_that_a_token_brings_or_points_at_is_not_used_and_nobody_is_asked_for_it(client, tokens):
    forger = Forger(client, tokens["jwt"])
    jwk = public_jwk(forger.key)
    with listener() as (url, asked):
        for head in (
            {"jku": url},
            {"x5u": url},
            {"jwk": jwk},
            {"jwk": jwk, "kid": jwk["kid"]},
            {"jku": url, "kid": jwk["kid"]},
            {"kid": url},
            {"x5c": ["AA=="]},
            {"jku": url, "crit": ["jku"]},
        ):
            assert whoami(client, forger.signed(head=head)) == INVALID
            assert whoami(client, forger.signed(head=head, iss=url)) == INVALID
        assert asked == []


@pytest.mark.parametrize(
    "kid", ["", "' OR 1=1 --", "../../../../dev/null", "/dev/null", "|sleep 5", "k" * 5000, "a\0b", 1, None, ["x"]]
)
def test_r4_a_kid_that_is_none_of_ours_is_refused(client, tokens, kid):
    assert whoami(client, Forger(client, tokens["jwt"]).signed(head={"kid": kid})) == INVALID


def test_r17_a_token_with_a_bad_signature_is_told_nothing_of_the_partner_that_it_names(client, tokens, another_partner):
    forger = Forger(client, tokens["jwt"])
    for claims in ({}, {"partner": another_partner.id, "sub": another_partner.id}, {"exp": 1}, {"sid": "00" * 16}):
        answer = client.get("/companies", headers=bearer(forger.signed(**claims)))
        assert outcome(answer) == INVALID
        assert another_partner.id not in answer.text


def test_a_foreign_key_under_the_name_of_ours_is_refused(client, tokens):
    forger = Forger(client, tokens["jwt"])
    assert whoami(client, sign_token(forger.claims, key=forger.key, kid=forger.jwk["kid"], typ="at+jwt")) == INVALID
    assert whoami(client, sign_token(forger.claims, key=forger.key, kid=public_jwk(forger.key)["kid"], typ="at+jwt")) == INVALID


def test_r6_r7_a_genuine_token_has_exactly_one_spelling(client, tokens):
    jwt = tokens["jwt"]
    head, claims, signature = jwt.split(".")
    last = signature[-1]
    twins = [chr(ord(last) + step) for step in (1, 2, 3)]
    for other in (
        f"{jwt}=",
        f"{head}=.{claims}.{signature}",
        f"{jwt}.",
        f".{jwt}",
        f"{jwt}#",
        f"{head}..{signature}",
        f"{jwt}.x.y",
    ):
        assert whoami(client, other) == INVALID
    for twin in twins:
        assert whoami(client, jwt[:-1] + twin) == INVALID
    assert whoami(client, jwt) == GOOD


def test_a_genuine_token_says_what_rfc_9068_asks_for(client, partner, tokens):
    head, claims = (decode(part) for part in tokens["jwt"].split(".")[:2])
    assert head == {"alg": "ES256", "typ": "at+jwt", "kid": head["kid"]}
    assert set(claims) == {
        "iss",
        "sub",
        "aud",
        "iat",
        "exp",
        "jti",
        "client_id",
        "sid",
        "env",
        "kind",
        "partner",
        "tier",
        "scope",
        "epoch",
    }
    assert claims["sub"] == claims["partner"] == partner.id
    assert (claims["client_id"], claims["env"], claims["kind"]) == (partner.key_id, "uat", "partner")
    assert claims["exp"] - claims["iat"] == 24 * 3600

    made = create_company(client, partner.key)
    company_claims = decode(log_in(client, made["apiKey"])["jwt"].split(".")[1])
    assert set(company_claims) == {*claims, "company"}
    assert company_claims["sub"] == company_claims["company"] == made["companyId"]
    assert (company_claims["kind"], company_claims["partner"]) == ("company", partner.id)


def problem_code(answer) -> str:
    assert answer.headers["content-type"] == "application/problem+json"
    return json.loads(answer.body)["code"]


def test_a_refusal_is_a_problem_document_with_a_link_into_the_documentation(client):
    body = problem(client.get("/companies"))
    assert body["type"] == "/docs#problem-credential_required"
    assert body["title"] == "Unauthorized"
