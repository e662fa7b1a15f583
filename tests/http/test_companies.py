"""`/companies…`: what is taken, what is refused and how it is said, who may see what."""

import pytest
from outside import (
    RFC3339,
    UUID,
    bearer,
    company,
    create_company,
    fresh,
    log_in,
    outcome,
    problem,
    r_auth,
    refresh,
    whoami,
)

FULL = {
    "companyName": "Zażółć Gęślą Jaźń / 株式会社 🚗",
    "country": "DE",
    "vatNumber": "DE136695976",
    "language": "pt-BR",
    "address": "Straße 1",
    "city": "Köln",
    "state": "Nordrhein-Westfalen",
    "postalCode": "50667",
    "email": "office@müller.example",
    "userEmail": "Anna@company.example",
    "ibanNumber": "DE89370400440532013000",
    "bicNumber": "DEUTDEFF",
}

REFUSED = {
    "companyName": ["", "   ", "x" * 201, "two\nlines", "bell\a", "nul\0", None, 5, ["x"], {}, True],
    "country": ["", "de", "DEU", "XX", "D", "\uff24\uff25", None, 49],
    "taxNumber": ["", " ", "-", "1", "1" * 65, None, 12345],
    "vatNumber": ["", "DE136695977", "DE1", "FR00", "!!", "x" * 65, 1],
    "language": ["", "german language", "xx", "de_DE", "qqq", "de-" + "a" * 33, 1],
    "address": ["", "x" * 501, " \n ", "nul\0", 1],
    "city": ["", "x" * 201, "tab\there", 1],
    "state": ["", "x" * 51, "line\u2028separator", 1],
    "postalCode": ["", "x" * 33, 50667],
    "email": ["", "nobody", "a@b", "a b@c.example", "a@c.example, d@e.example", "<a@c.example>", "x" * 256, 1],
    "userEmail": ["", "nobody", "@c.example", 1],
    "ibanNumber": ["", "DE89370400440532013001", "DE", "x" * 65, 1],
    "bicNumber": ["", "DEUT", "DEUTDEF", "1234DEFF", 1],
}

TAKEN = {
    "companyName": [("  Müller  ", "Müller"), ("x" * 200, "x" * 200), ("<b>&amp;</b>", "<b>&amp;</b>"), ("'; DROP TABLE", "'; DROP TABLE")],
    "country": [("US", "US"), (" US ", "US")],
    "vatNumber": [("DE 136 695 976", "DE136695976"), ("CHE-123.456.788", "CHE123456788"), (None, None)],
    "language": [("de", "de"), ("deu", "deu"), ("zh-Hant-TW", "zh-Hant-TW"), (None, None)],
    "address": [("Straße 1\n50667 Köln\r\n", "Straße 1, 50667 Köln"), ("x" * 500, "x" * 500), (None, None)],
    "city": [("x" * 200, "x" * 200)],
    "state": [("x" * 50, "x" * 50)],
    "postalCode": [("SW1A 1AA", "SW1A 1AA"), ("x" * 32, "x" * 32)],
    "email": [("office@MÜLLER.example", "office@müller.example"), ("a@c.example\n", "a@c.example")],
    "ibanNumber": [("de89 3704 0044 0532 0130 00", "DE89370400440532013000")],
    "bicNumber": [("deutdeff500", "DEUTDEFF500")],
}  # fmt: skip


def show(client, partner, company_id):
    return client.get(f"/companies/{company_id}", headers=r_auth(partner.key))


def create(client, partner, **changes):
    body = company(**changes)
    return client.post(
        "/companies", json={name: value for name, value in body.items() if value is not ...}, headers=r_auth(partner.key)
    )


def test_a_company_is_shown_as_it_was_said_to_be(client, partner):
    body = company(**FULL)
    made = client.post("/companies", json=body, headers=r_auth(partner.key)).json()
    shown = show(client, partner, made["companyId"]).json()
    assert shown.pop("companyId") == made["companyId"]
    assert RFC3339.fullmatch(shown.pop("createdAt"))
    assert shown == body


def test_what_was_not_said_is_not_shown(client, partner):
    made = create_company(client, partner.key)
    shown = show(client, partner, made["companyId"]).json()
    assert set(shown) == {"companyId", "createdAt", "companyName", "country", "taxNumber"}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in REFUSED.items() for value in values],
    ids=lambda value: ascii(value)[:24],
)
def test_a_field_that_is_not_valid_is_pointed_at(client, partner, field, value):
    refused = create(client, partner, **{field: value})
    assert outcome(refused) == (422, "invalid_fields")
    (error,) = problem(refused)["errors"]
    assert set(error) == {"pointer", "detail"}
    assert error["pointer"] == f"/{field}"
    assert error["detail"]
    assert client.get("/companies", headers=r_auth(partner.key)).json()["companies"] == []


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [(field, value, kept) for field, cases in TAKEN.items() for value, kept in cases],
    ids=lambda value: ascii(value)[:24],
)
def test_a_field_that_is_valid_is_kept_in_one_spelling(client, partner, field, value, kept):
    made = create(client, partner, **{field: value})
    assert outcome(made) == (201, None)
    assert show(client, partner, made.json()["companyId"]).json().get(field) == kept


@pytest.mark.parametrize("field", ["companyName", "country", "taxNumber"])
def test_a_required_field_is_missed(client, partner, field):
    refused = create(client, partner, **{field: ...})
    assert outcome(refused) == (422, "invalid_fields")
    assert problem(refused)["errors"] == [{"pointer": f"/{field}", "detail": "is required"}]


def test_all_faults_are_told_at_once(client, partner):
    body = {name: values[0] for name, values in REFUSED.items() if name != "country"}
    refused = client.post("/companies", json=body, headers=r_auth(partner.key))
    assert outcome(refused) == (422, "invalid_fields")
    assert sorted(error["pointer"] for error in problem(refused)["errors"]) == sorted(f"/{name}" for name in REFUSED)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("12/345/67890", "12/345/67890"),
        ("12/345", "12345"),
        ("12 345-6.7", "1234567"),
        ("ab1", "AB1"),
        ("\uff11\uff12\uff13", "123"),
    ],
)
def test_a_tax_number_in_another_spelling_is_the_same_company(client, partner, first, second):
    assert create(client, partner, taxNumber=first).status_code == 201
    assert outcome(create(client, partner, taxNumber=second)) == (409, "company_exists")
    assert create(client, partner, taxNumber=second, country="AT").status_code == 201


def test_two_partners_may_have_the_same_company(client, partner, another_partner):
    for each in (partner, another_partner):
        assert create(client, each, taxNumber="12/345").status_code == 201


def test_a_deleted_company_makes_room_for_a_new_one(client, partner):
    made = create(client, partner, taxNumber="12/345").json()
    assert client.delete(f"/companies/{made['companyId']}", headers=r_auth(partner.key)).status_code == 204
    again = create(client, partner, taxNumber="12/345")
    assert outcome(again) == (201, None)
    assert again.json()["companyId"] != made["companyId"]


def test_companies_are_listed_newest_first_over_several_pages(client, partner, another_partner):
    made = []
    for _ in range(7):
        made.append(create_company(client, partner.key)["companyId"])
        create_company(client, another_partner.key)
    listed, sizes, cursor = [], [], None
    while True:
        page = client.get(
            "/companies", params={"limit": "3"} | ({"cursor": cursor} if cursor else {}), headers=r_auth(partner.key)
        )
        assert set(page.json()) == {"companies", "nextCursor"}
        sizes.append(len(page.json()["companies"]))
        listed += [found["companyId"] for found in page.json()["companies"]]
        cursor = page.json()["nextCursor"]
        if cursor is None:
            break
        create_company(client, partner.key)  # what is added meanwhile shifts nothing
    assert listed == made[::-1]
    assert sizes == [3, 3, 1]


def test_a_last_page_that_is_full_says_that_it_is_the_last(client, partner):
    for _ in range(2):
        create_company(client, partner.key)
    page = client.get("/companies", params={"limit": "2"}, headers=r_auth(partner.key)).json()
    assert (len(page["companies"]), page["nextCursor"]) == (2, None)


@pytest.mark.parametrize(("limit", "status"), [("0", 422), ("1", 200), ("200", 200), ("201", 422), ("-1", 422), ("x", 422), ("", 422), ("1.0", 422), ("٣", 422), ("9" * 5000, 422)], ids=lambda v: str(v)[:5])  # fmt: skip
def test_a_limit_is_from_1_to_200(client, partner, limit, status):
    answer = client.get("/companies", params={"limit": limit}, headers=r_auth(partner.key))
    assert answer.status_code == status
    if status == 422:
        assert [error["pointer"] for error in problem(answer)["errors"]] == ["?limit"]


@pytest.mark.parametrize("cursor", ["", "x", "AAAA", "A" * 21, "A" * 23, "ö", "A" * 22 + "==", "AAAAAAAAAAAAAAAAAAAAAB"])
def test_a_cursor_that_was_never_given_out_is_refused(client, partner, cursor):
    answer = client.get("/companies", params={"cursor": cursor}, headers=r_auth(partner.key))
    assert outcome(answer) == (422, "invalid_fields")
    assert [error["pointer"] for error in problem(answer)["errors"]] == ["?cursor"]


def test_a_cursor_of_another_partner_shows_nothing_of_it(client, partner, another_partner):
    for _ in range(3):
        create_company(client, another_partner.key)
    cursor = client.get("/companies", params={"limit": "1"}, headers=r_auth(another_partner.key)).json()["nextCursor"]
    page = client.get("/companies", params={"cursor": cursor}, headers=r_auth(partner.key)).json()
    assert page == {"companies": [], "nextCursor": None}


def test_r52_another_partners_company_is_answered_as_one_that_is_not_there(client, partner, another_partner):
    theirs = create_company(client, another_partner.key)
    absent = "01a00000-0000-7000-8000-000000000000"

    def tell(method, path, **options):
        answer = client.request(method, path, headers=r_auth(partner.key), **options)
        assert outcome(answer) == (404, "company_not_found")
        body = {name: value for name, value in problem(answer).items() if name != "requestId"}
        return body, {
            name: value for name, value in answer.headers.items() if name not in {"x-request-id", "date", "content-length"}
        }

    for method, path, options in (
        ("GET", "/companies/{}", {}),
        ("DELETE", "/companies/{}", {}),
        ("POST", "/companies/{}/key", {"json": {}}),
        ("POST", "/companies/{}/key", {"json": {}, "content": None}),
    ):
        first = tell(method, path.format(absent), **options)
        for company_id in (theirs["companyId"], "x", theirs["companyId"].replace("-", ""), f"{{{absent}}}", "%00"):
            assert tell(method, path.format(company_id), **options) == first
    assert log_in(client, theirs["apiKey"])
    assert show(client, another_partner, theirs["companyId"]).status_code == 200


def test_a_companys_id_may_be_written_in_capitals(client, partner):
    made = create_company(client, partner.key)
    assert show(client, partner, made["companyId"].upper()).json()["companyId"] == made["companyId"]


@pytest.mark.parametrize("by", ["key", "jwt"])
def test_r41_a_companys_credential_may_do_nothing_here(client, partner, by):
    made = create_company(client, partner.key)
    credential = made["apiKey"] if by == "key" else log_in(client, made["apiKey"])["jwt"]
    own = f"/companies/{made['companyId']}"
    for method, path, body in (
        ("POST", "/companies", company()),
        ("POST", "/white-label-partner/create-company", company()),
        ("GET", "/companies", None),
        ("GET", own, None),
        ("POST", f"{own}/key", {}),
        ("DELETE", own, None),
        ("POST", "/companies", {"not": "valid"}),
    ):
        answer = client.request(method, path, json=body, headers=bearer(credential))
        assert outcome(answer) == (403, "insufficient_scope")
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
    assert show(client, partner, made["companyId"]).status_code == 200


def test_a_deleted_company_is_gone_with_its_keys_and_sessions(client, partner):
    made, other = create_company(client, partner.key), create_company(client, partner.key)
    session = log_in(client, made["apiKey"])
    path = f"/companies/{made['companyId']}"
    deleted = client.delete(path, headers=bearer(partner.key))
    assert (deleted.status_code, deleted.content) == (204, b"")

    assert whoami(client, made["apiKey"]) == (401, "credential_revoked")
    assert whoami(client, session["jwt"]) == (401, "credential_revoked")
    assert outcome(refresh(client, session["refreshToken"])) == (401, "credential_revoked")
    for method, each in (("GET", path), ("DELETE", path), ("POST", f"{path}/key")):
        assert outcome(client.request(method, each, headers=bearer(partner.key))) == (404, "company_not_found")
    listed = client.get("/companies", headers=bearer(partner.key)).json()["companies"]
    assert [found["companyId"] for found in listed] == [other["companyId"]]
    assert log_in(client, other["apiKey"])


@pytest.mark.parametrize(
    ("body", "old"),
    [
        (None, (401, "credential_rotated")),
        ({}, (401, "credential_rotated")),
        ({"overlapSeconds": 0}, (401, "credential_rotated")),
        ({"overlapSeconds": 86400}, (200, None)),
    ],
    ids=["no-body", "empty", "0", "86400"],
)
def test_a_companys_key_is_rotated_with_and_without_an_overlap(client, partner, body, old):
    made = create_company(client, partner.key)
    session = log_in(client, made["apiKey"])
    answer = client.post(f"/companies/{made['companyId']}/key", json=body, headers=r_auth(partner.key))
    assert outcome(answer) == (200, None)
    rotated = answer.json()
    assert set(rotated) == {"companyId", "apiKey"}
    assert rotated["companyId"] == made["companyId"]
    assert outcome(client.post("/auth/login", json={"apiKey": made["apiKey"]})) == old
    assert outcome(refresh(client, session["refreshToken"])) == old
    assert log_in(client, rotated["apiKey"])


@pytest.mark.parametrize("overlap", [-1, 86401, "1", 1.5, None, True, 10**30], ids=str)
def test_an_overlap_is_a_whole_number_of_seconds_up_to_a_day(client, partner, overlap):
    made = create_company(client, partner.key)
    path = f"/companies/{made['companyId']}/key"
    answer = client.post(path, json={"overlapSeconds": overlap}, headers=r_auth(partner.key))
    assert outcome(answer) == (422, "invalid_fields")
    assert [error["pointer"] for error in problem(answer)["errors"]] == ["/overlapSeconds"]
    assert log_in(client, made["apiKey"])


def test_r54_fields_that_nobody_asked_for_are_ignored_and_do_nothing(client, partner, another_partner):
    theirs = create_company(client, another_partner.key)
    extra = {
        "companyId": theirs["companyId"],
        "partnerId": another_partner.id,
        "partner": another_partner.id,
        "tier": "gold",
        "role": "admin",
        "env": "production",
        "apiKey": theirs["apiKey"],
        "createdAt": "2000-01-01T00:00:00.000+00:00",
        "company_name": "Snake",
    }
    made = client.post("/companies", json={**company(), **extra}, headers=r_auth(partner.key))
    assert outcome(made) == (201, None)
    shown = show(client, partner, made.json()["companyId"]).json()
    assert set(shown) == {"companyId", "createdAt", "companyName", "country", "taxNumber"}
    assert UUID.fullmatch(shown["companyId"])
    assert shown["companyId"] != theirs["companyId"]
    assert shown["companyName"] == company()["companyName"]
    assert not shown["createdAt"].startswith("2000")

    path = f"/companies/{made.json()['companyId']}/key"
    rotated = client.post(path, json={**extra, "overlapSeconds": 60}, headers=r_auth(partner.key)).json()
    assert rotated["apiKey"] != theirs["apiKey"]
    assert len(client.get("/companies", headers=r_auth(another_partner.key)).json()["companies"]) == 1


def test_a_company_may_have_one_name_with_another(client, partner):
    name = fresh("Same name ")
    assert {create(client, partner, companyName=name).status_code for _ in range(2)} == {201}
