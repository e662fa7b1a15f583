"""What the service says of itself: key set, health, OpenAPI document, documentation."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from outside import (
    REGISTER,
    add_partner,
    ask,
    code_for,
    company,
    create_company,
    fresh,
    log_in,
    outcome,
    r_auth,
    refresh,
    registration,
)

from gatelodge.keyset import StaticKeys
from gatelodge.tokens import TokenRules
from gatelodge.verify import Verifier
from gatelodge_server.http.problems import STATUSES


def key_set(client):
    answer = client.get("/.well-known/jwks.json")
    assert answer.status_code == 200
    return answer


def test_r18_the_key_set_shows_public_members_only(client):
    keys = key_set(client).json()["keys"]
    for key in keys:
        assert set(key) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
        assert (key["kty"], key["crv"], key["use"], key["alg"]) == ("EC", "P-256", "sig", "ES256")
    assert len({key["kid"] for key in keys}) == len(keys)


def test_r19_a_kid_is_its_keys_thumbprint(client):
    for key in key_set(client).json()["keys"]:
        members = json.dumps({name: key[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":"), sort_keys=True)
        digest = base64.urlsafe_b64encode(hashlib.sha256(members.encode()).digest()).rstrip(b"=").decode()
        assert key["kid"] == digest


def test_the_next_key_is_published_before_it_signs(server, client, tokens):
    states = {key["kid"]: (key["purpose"], key["state"]) for key in ask("signing-key", "list", data=server.data)}
    assert sorted(states.values()) == [("access", "current"), ("access", "next"), ("session", "current"), ("session", "next")]
    assert {key["kid"] for key in key_set(client).json()["keys"]} == set(states)
    header = json.loads(base64.urlsafe_b64decode(tokens["jwt"].split(".")[0] + "=="))
    assert states[header["kid"]] == ("session", "current")


def test_a_jwt_is_verified_offline_with_the_published_keys(client, partner, tokens):
    rules = TokenRules.for_sessions(issuer="https://localhost:8443", audience="partner-api-uat")
    caller = Verifier(StaticKeys.from_jwks(key_set(client).json()), rules).verify(tokens["jwt"])
    assert (caller.partner, caller.company, caller.credential_id) == (partner.id, None, partner.key_id)
    assert caller.scopes == {"api", "companies"}


def test_the_key_set_may_be_kept_and_asked_for_again_cheaply(client):
    full = key_set(client)
    assert full.headers["content-type"] == "application/json"
    assert full.headers["cache-control"] == "public, max-age=300"
    tag = full.headers["etag"]
    assert re.fullmatch(r'"[^"]+"', tag)
    # RFC 9110 13.1.2: any member of a list, compared weakly; `*` is any.
    for known in (tag, f"W/{tag}", f'"x", {tag}', f'W/"x" , W/{tag}', "*"):
        again = client.get("/.well-known/jwks.json", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert again.headers["cache-control"] == full.headers["cache-control"]
        # RFC 9110 8.6: in a 304 it is the length that a 200 would have had, or it is left out.
        assert again.headers.get("content-length") in {None, full.headers["content-length"]}
    for unknown in ('"x"', tag.strip('"'), "", '"x", "y"'):
        assert client.get("/.well-known/jwks.json", headers={"If-None-Match": unknown}).status_code == 200


def test_health_and_readiness_are_told_fresh(client):
    for path, status in (("/healthz", "alive"), ("/readyz", "ready")):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": status})
        assert answer.headers["cache-control"] == "no-cache"


# --- the OpenAPI document -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(client):
    answer = client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def test_the_document_says_what_there_is_and_which_credential_each_call_needs(document, client):
    said = document["info"]["description"]
    for word in ("register", "API key", "access token", "session JWT", "gate"):
        assert word in said
    assert "access token" in document["components"]["securitySchemes"]["bearer"]["description"]
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    for operation in operations:
        assert ("Needs: " in operation["description"]) == ("security" in operation)
    usage = document["paths"]["/api/v2/Partners/Register/Usage"]["get"]
    assert usage["description"].endswith("Needs: the partner's own API key.")
    page = html.unescape(client.get("/docs").text)
    assert said in page
    for operation in operations:
        assert operation["description"] in page


def test_the_document_describes_the_fields_of_a_registration(document):
    schemas = document["components"]["schemas"]
    agreed = schemas["RegisterBody"]["properties"]["agreedToTerms"]
    assert (agreed["type"], agreed["const"]) == ("boolean", True)
    code = schemas["VerifyBody"]["properties"]["verificationCode"]
    assert (code["type"], code["pattern"]) == ("string", "^[0-9]{6}$")
    assert agreed["description"]
    assert code["description"]


def test_the_document_is_openapi_3_1(document):
    assert document["openapi"].startswith("3.1.")
    validate(document, cls=OpenAPIV31SpecValidator)
    assert document["servers"] == [{"url": "https://localhost:8443"}]
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


def test_the_document_tells_of_every_path_that_is_served_and_of_no_other(client, document):
    for path, methods in document["paths"].items():
        refused = client.request("PROPFIND", path.replace("{companyId}", "x"))
        assert outcome(refused) == (405, "method_not_allowed")
        assert set(refused.headers["allow"].lower().split(", ")) - {"head"} == set(methods)


class Conversation:
    """Sends requests and holds every answer to what the document says of it."""

    def __init__(self, client, document):
        self._client, self._document = client, document
        self.seen = set()

    def __call__(self, method, path, *, template=None, **options):
        answer = self._client.request(method, path, **options)
        template = template or path
        documented = self._document["paths"][template][method.lower()]["responses"]
        assert str(answer.status_code) in documented, (method, path, answer.text)
        described = documented[str(answer.status_code)]
        self.seen.add((method, template, answer.status_code))
        if not described.get("content"):
            assert answer.content == b""
            return answer
        ((media_type, content),) = described["content"].items()
        assert answer.headers["content-type"] == media_type
        schema = {**content["schema"], "components": self._document["components"]}
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(answer.json())
        name = content["schema"]["$ref"].split("/")[-1]
        assert set(answer.json()) <= set(self._document["components"]["schemas"][name]["properties"])
        if answer.status_code >= 400:
            assert f"`{answer.json()['code']}`" in described["description"], (method, template, answer.text)
        return answer


def test_every_answer_is_as_the_document_says(server, client, document, partner, another_partner):  # noqa: PLR0915 - one talk
    say = Conversation(client, document)
    me, session = r_auth(partner.key), log_in(client, partner.key)
    made = create_company(client, partner.key)
    one, key = f"/companies/{made['companyId']}", f"/companies/{made['companyId']}/key"
    idempotent = {**me, "Idempotency-Key": "documented"}
    revoked, suspended = add_partner(server.data), add_partner(server.data)
    ask("key", "revoke", revoked.key_id, data=server.data)
    ask("partner", "suspend", suspended.id, data=server.data)
    full = company(language="de", city="Köln", ibanNumber="DE89370400440532013000", email="a@b.example")

    for path in ("/healthz", "/readyz", "/.well-known/jwks.json"):
        say("GET", path)

    tag = key_set(client).headers["etag"]
    say("GET", "/.well-known/jwks.json", headers={"If-None-Match": tag})

    read = say("GET", "/auth/revocations").json()
    say("GET", "/auth/revocations", params={"after": read["position"], "wait": "0.01", "verifier": "documented-1"})
    for name, value in (("after", "x"), ("wait", "31"), ("verifier", "short")):
        say("GET", "/auth/revocations", params={name: value})
    for sequence in (read["sequence"], read["sequence"] + 1_000_000, -1):
        say("POST", "/auth/revocations", json={"verifier": "documented-1", "sequence": sequence})

    say("POST", "/auth/login", json={"apiKey": partner.key})
    for body in ({"apiKey": "x"}, {"apiKey": revoked.key}, {"apiKey": suspended.key}, {}):
        say("POST", "/auth/login", json=body)
    for path in ("/auth/login", "/auth/refresh", "/auth/logout"):
        say("POST", path, content=b"{", headers={"Content-Type": "application/json"})
        say("POST", path, content=b"{}", headers={"Content-Type": "text/plain"})
        say("POST", path, content=b" " * 70_000, headers={"Content-Type": "application/json"})
    spent = session["refreshToken"]
    session = say("POST", "/auth/refresh", json={"refreshToken": spent}).json()
    say("POST", "/auth/refresh", json={"refreshToken": spent}, headers={"Idempotency-Key": "x y"})
    say("POST", "/auth/refresh", json={"refreshToken": spent})
    say("POST", "/auth/refresh", json={"refreshToken": "x"})
    say("POST", "/auth/logout", json={"refreshToken": session["refreshToken"]})
    say("POST", "/auth/logout", json={"refreshToken": "x"})
    say("POST", "/auth/logout")
    say("POST", "/auth/logout", headers=r_auth(log_in(client, partner.key)["jwt"]))
    say("POST", "/auth/logout", json={"refreshToken": session["refreshToken"]}, params={"wait": "0"})
    say("POST", "/auth/logout", json={"refreshToken": session["refreshToken"]}, params={"wait": "x"})

    for path in ("/companies", "/white-label-partner/create-company"):
        say("POST", path, json=company(), headers=me)
        say("POST", path, json={}, headers=me)
        say("POST", path, json=company())
        say("POST", path, json=company(), headers=r_auth(made["apiKey"]))
        say("POST", path, json=company(), headers=r_auth(suspended.key))
        say("POST", path, content=b"{", headers={**me, "Content-Type": "application/json"})
        say("POST", path, json=company(), headers={**me, "Idempotency-Key": ""})
        say("POST", path, json=company(), headers={**bearer_and(me, another_partner)})
    said = say("POST", "/companies", json=full, headers=idempotent).json()
    say("POST", "/companies", json=full, headers=me)
    say("POST", "/companies", json={**full, "city": "Bonn"}, headers=idempotent)
    log_in(client, said["apiKey"])
    say("POST", "/companies", json=full, headers=idempotent)
    say("GET", f"/companies/{said['companyId']}", template="/companies/{companyId}", headers=me)

    say("GET", "/companies", headers=me)
    say("GET", "/companies", headers=me, params={"limit": "1"})
    say("GET", "/companies", headers=me, params={"limit": "0"})
    say("GET", "/companies", headers=r_auth("x"))
    say("GET", "/companies", headers=r_auth(made["apiKey"]))
    for method, path, template in (
        ("GET", one, "/companies/{companyId}"),
        ("POST", key, "/companies/{companyId}/key"),
        ("DELETE", one, "/companies/{companyId}"),
    ):
        options = {"template": template}
        say(method, path, **options)
        say(method, path, headers=r_auth(another_partner.key), **options)
        say(method, path, headers=r_auth(made["apiKey"]), **options)
        say(method, path, headers=me, **options)
    say("POST", key, template="/companies/{companyId}/key", json={"overlapSeconds": -1}, headers=me)
    say("DELETE", one, template="/companies/{companyId}", headers=me)
    another = f"/companies/{create_company(client, partner.key)['companyId']}"
    say("DELETE", another, template="/companies/{companyId}", headers=me, params={"wait": "soon"})
    say("DELETE", another, template="/companies/{companyId}", headers=me, params={"wait": "0"})

    _register(say, server, client)

    documented = {
        (method.upper(), path, int(status))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for status in operation["responses"]
    }
    assert {case for case in documented - say.seen if case[2] < 400} == set()


def _register(say, server, client):
    to = f"{fresh('documented')}@acme.example"
    asked = {"contactEmail": to, "verificationCode": code_for(server, client, to)}
    for path, body in ((REGISTER, registration(to)), (f"{REGISTER}/Verify", asked)):
        say("POST", path, json={})
        say("POST", path, content=b"{", headers={"Content-Type": "application/json"})
        say("POST", path, json={**body, "verificationCode": "x"})
    asked["verificationCode"] = code_for(server, client, to)
    say("POST", f"{REGISTER}/Verify", json=asked, params={"wait": "soon"})
    say("POST", f"{REGISTER}/Verify", json=asked)
    asked["verificationCode"] = code_for(server, client, to)
    key = say("POST", f"{REGISTER}/Verify", json=asked, params={"wait": "0"}).json()["apiKey"]
    jwt = log_in(client, key)["jwt"]
    for method, path in (("POST", f"{REGISTER}/Rotate"), ("GET", f"{REGISTER}/Usage"), ("DELETE", REGISTER)):
        say(method, path)
        say(method, path, headers=r_auth("x"))
        say(method, path, headers=r_auth(jwt))
    say("POST", f"{REGISTER}/Rotate", headers=r_auth(key), json={"overlapSeconds": -1})
    key, old = say("POST", f"{REGISTER}/Rotate", headers=r_auth(key), json={"overlapSeconds": 60}).json()["apiKey"], key
    say("POST", f"{REGISTER}/Rotate", headers=r_auth(old))
    say("GET", f"{REGISTER}/Usage", headers=r_auth(old))
    say("DELETE", REGISTER, headers=r_auth(key))
    to = f"{fresh('documented')}@acme.example"
    verified = {"contactEmail": to, "verificationCode": code_for(server, client, to)}
    key = say("POST", f"{REGISTER}/Verify", json=verified).json()["apiKey"]
    say("DELETE", REGISTER, headers=r_auth(key), params={"wait": "99"})
    say("DELETE", REGISTER, headers=r_auth(key), params={"wait": "0"})


def bearer_and(headers, other):
    return {**headers, "Authorization": f"Bearer {other.key}"}


def test_what_is_documented_of_a_field_is_what_is_checked(client, document, partner):
    rules = document["components"]["schemas"]["CompanyBody"]
    assert rules["required"] == ["companyName", "country", "taxNumber"]
    for name, rule in rules["properties"].items():
        longest = rule.get("maxLength") or rule["anyOf"][0]["maxLength"]
        answer = client.post("/companies", json=company(**{name: "x" * (longest + 1)}), headers=r_auth(partner.key))
        assert f"/{name}" in [error["pointer"] for error in answer.json()["errors"]]
    assert refresh(client, "x" * 9000).status_code == 401


# --- /docs ----------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.anchors, self.references, self.tags = set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                assert value not in self.anchors
                self.anchors.add(value)
            if name in {"href", "src", "action", "srcset", "data", "style"} or name.startswith("on"):
                self.references.append((tag, name, value))


def test_the_documentation_is_one_page_that_fetches_nothing(client):
    answer = client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Page(answer.text)
    assert page.references == [("a", "href", "/openapi.json")]
    assert page.tags.isdisjoint({"script", "img", "iframe", "link", "object", "form"})
    assert not re.search(r"url\(|@import", answer.text)


def test_every_problem_and_every_operation_has_its_place_in_the_documentation(client, document):
    page = Page(client.get("/docs").text)
    assert {f"problem-{code}" for code in STATUSES} <= page.anchors
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["operationId"] in page.anchors
            assert operation["summary"]
            codes = re.findall(r"`(\w+)`", " ".join(answer["description"] for answer in operation["responses"].values()))
            assert set(codes) <= set(STATUSES)
