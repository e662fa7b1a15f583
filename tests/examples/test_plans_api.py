"""The sample partner API behind a gate that has let the caller in: what it answers, and what it refuses and how."""

import asyncio
import json
from dataclasses import replace
from datetime import date
from http import HTTPStatus
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatelodge.verify import Caller
from plans_api import app as module
from plans_api.app import BODY_MAX, SEARCH_PATH, make_app

TODAY = date(2026, 6, 26)
ACME = Caller(
    partner="acme-motors",
    company=None,
    kind="partner",
    tier="starter",
    scopes=frozenset({"api"}),
    credential="api-key",
    credential_id="c1",
    session=None,
    token_id=None,
    environment="uat",
    expires_at=None,
)
SEED = {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}
"""The published example."""
YOUNG = "5YJ3E1EA4MF000001"
"""A Tesla of 2021."""
JSON = {"Content-Type": "application/json"}
CRITERIA = "/searchCriteria"


def send(method="POST", path=SEARCH_PATH, *, caller=ACME, today=TODAY, app=None, **request):
    """One request to the API; ``caller`` is whom the gate has let in, or ``None`` where there is no gate."""
    app = app or make_app(lambda: today)

    async def gate(scope, receive, send):
        told = {} if caller is None else {"gatelodge.caller": caller, "gatelodge.request_id": "r-1"}
        await app({**scope, **told}, receive, send)

    async def exchange():
        transport = httpx2.ASGITransport(gate, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="https://api.example") as client:
            return await client.request(method, path, **request)

    return asyncio.run(exchange())


def search(criteria, **more):
    return send(json={"searchCriteria": criteria}, **more)


def seed(**changes):
    """The published criteria with changes; a field that is changed to ``...`` is left out."""
    return {name: value for name, value in {**SEED, **changes}.items() if value is not ...}


def faults(response):
    """Where the faults are that a 422 tells."""
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert response.json()["code"] == "invalid_fields"
    return [error["pointer"] for error in response.json()["errors"]]


def codes(response):
    assert response.status_code == 200
    return [plan["code"] for plan in response.json()["plans"]]


def problem(response):
    assert response.headers["content-type"] == "application/problem+json"
    return response.status_code, response.json()["code"]


# What is answered


def test_the_published_example_is_answered_with_the_vehicle_and_a_plan():
    response = search(SEED)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    answer = response.json()
    assert answer["vehicle"] == {
        "vin": "1HGBH41JXMN109186",
        "wmi": "1HG",
        "make": "Honda",
        "manufacturer": "Honda",
        "country": "United States",
        "kind": "light",
        "modelYear": 1991,
        "age": 35,
        "plantCode": "N",
        "serial": "109186",
    }
    assert (answer["partner"], answer["company"], answer["mileage"], answer["state"]) == ("acme-motors", None, 55555, "TX")
    assert codes(response) == ["classic"]
    assert answer["plans"][0]["offers"]


def test_the_answer_that_the_readme_shows_is_the_answer():
    readme = (Path(__file__).parents[2] / "examples/plans_api/README.md").read_text("utf-8")
    shown = json.loads(readme.partition("```json")[2].partition("```")[0])
    answer = search(SEED).json()
    assert shown["plans"][0]["offers"] == answer["plans"][0]["offers"][:1]
    del shown["plans"][0]["offers"], answer["plans"][0]["offers"]
    assert shown == answer


def test_the_application_that_is_ready_made_answers_it_on_any_day():
    assert codes(search(SEED, app=module.app)) == ["classic"]


def test_the_answer_names_who_asked_as_the_gate_has_told_it():
    company = replace(ACME, partner="zenith", company="0b0c3c51-4f5e-4b7e-9a55-2f2f0f4f7a10", kind="company")
    answer = search(SEED, caller=company).json()
    assert (answer["partner"], answer["company"]) == (company.partner, company.company)


def test_no_header_with_a_credential_changes_a_byte_of_the_answer():
    without = search(SEED)
    for headers in ({"Authorization": "Bearer nonsense"}, {"R-Auth": "nonsense"}, {"Authorization": "Basic Og=="}):
        assert search(SEED, headers=headers).content == without.content


def test_without_a_gate_in_front_nobody_is_answered():
    for request in ({"json": {"searchCriteria": SEED}}, {"content": b"{", "headers": JSON}):
        response = send(caller=None, **request)
        assert problem(response) == (500, "internal_error")
        assert "Traceback" not in response.text
        assert "KeyError" not in response.text


def test_the_same_request_on_the_same_day_has_the_same_answer():
    assert search(SEED).content == search(SEED).content


def test_a_vehicle_is_a_year_older_after_new_year():
    new_year = date(2027, 1, 1)
    assert search(SEED, today=date(2026, 12, 31)).json()["vehicle"]["age"] == 35
    assert search(SEED, today=new_year).json()["vehicle"]["age"] == 36


def test_fields_that_nobody_knows_are_ignored():
    assert send(json={"searchCriteria": {**SEED, "colour": "red"}, "trace": [1]}).content == search(SEED).content


@pytest.mark.parametrize("partner", ["acme-motors", "somebody-else", None, 5])
def test_the_partner_in_the_body_has_been_judged_at_the_gate_and_is_not_looked_at(partner):
    assert send(json={"searchCriteria": SEED, "partner": partner}).content == search(SEED).content


def test_small_letters_are_taken_for_capitals():
    assert search(seed(vin="1hgbh41jxmn109186", stateShortName="tx")).content == search(SEED).content


def test_a_zip_code_says_the_state_as_well():
    assert search(seed(stateShortName=..., zip="75001")).content == search(SEED).content


def test_state_and_zip_code_may_both_be_given_if_they_agree():
    assert search(seed(zip="75001")).content == search(SEED).content
    assert search(seed(stateShortName="NY", zip="06390")).status_code == 200


@pytest.mark.parametrize("absent", ["stateShortName", "zip"])
def test_null_is_the_same_as_no_state_or_no_zip_code(absent):
    assert search({**SEED, "zip": "75001", absent: None}).content == search(SEED).content


# Which plans


def test_a_young_car_has_every_plan_but_the_one_for_classics():
    assert codes(search(seed(vin=YOUNG, mileage=20_000))) == ["comprehensive", "essential", "powertrain"]


@pytest.mark.parametrize(
    ("state", "sold"),
    [("CA", ["essential", "powertrain"]), ("FL", ["powertrain"]), ("NV", ["comprehensive", "essential", "powertrain"])],
)
def test_some_plans_are_not_sold_in_some_states(state, sold):
    assert codes(search(seed(vin=YOUNG, mileage=20_000, stateShortName=state))) == sold


@pytest.mark.parametrize(
    ("mileage", "sold"),
    [
        (99_999, ["comprehensive", "essential", "powertrain"]),
        (100_000, ["comprehensive", "essential", "powertrain"]),
        (100_001, ["essential", "powertrain"]),
        (200_000, ["powertrain"]),
        (200_001, []),
    ],
)
def test_a_vehicle_that_was_driven_far_has_fewer_plans(mileage, sold):
    assert codes(search(seed(vin=YOUNG, mileage=mileage))) == sold


@pytest.mark.parametrize(
    ("year", "sold"),
    [
        (2031, ["comprehensive", "essential", "powertrain"]),
        (2032, ["essential", "powertrain"]),
        (2036, ["essential", "powertrain"]),
        (2037, ["powertrain"]),
        (2041, ["powertrain"]),
        (2042, []),
        (2045, []),
        (2046, ["classic"]),
    ],
)
def test_the_years_take_plans_away_until_it_is_a_classic(year, sold):
    # It was built in 2021.
    assert codes(search(seed(vin=YOUNG, mileage=20_000), today=date(year, 6, 1))) == sold


def test_every_instalment_is_a_whole_cent_and_they_add_up():
    offers = [offer for plan in search(seed(vin=YOUNG)).json()["plans"] for offer in plan["offers"]]
    assert len(offers) == 27
    for offer in offers:
        assert all(type(value) is int and value >= 0 for value in offer.values())
        assert offer["monthlyCents"] * offer["months"] == offer["totalCents"]


# What is refused


def test_a_refusal_says_what_it_is_in_the_form_of_the_gate():
    response = search(seed(mileage=0))
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert response.json() == {
        "type": "/docs#problem-invalid_fields",
        "title": HTTPStatus(422).phrase,
        "status": 422,
        "detail": "Some fields are not valid; `errors` says which and why.",
        "code": "invalid_fields",
        "requestId": "r-1",
        "errors": [{"pointer": "/searchCriteria/mileage", "detail": "must be a whole number from 1 to 250000"}],
    }


def test_all_faults_are_told_at_once():
    bad = {"vin": "1HGBH41JXMN109187", "mileage": 0, "stateShortName": "XX", "zip": "7500"}
    assert faults(search(bad)) == [f"{CRITERIA}/{name}" for name in ("vin", "mileage", "stateShortName", "zip")]
    assert faults(search({})) == [f"{CRITERIA}/{name}" for name in ("vin", "mileage", "stateShortName")]


@pytest.mark.parametrize("body", [{}, *({"searchCriteria": value} for value in (None, 5, "x", [], True))])
def test_without_criteria_there_is_no_search(body):
    assert faults(send(json=body)) == [CRITERIA]


@pytest.mark.parametrize(
    "vin",
    [
        ...,
        None,
        5,
        ["1HGBH41JXMN109186"],
        "",
        "1HGBH41JXMN10918",
        "1HGBH41JXMN1091866",
        "1HGBH41JXMN109186\n",
        " 1HGBH41JXMN109186",
        "1HGBH41JXMN109187",
        "1HGBH41J0MN109186",
        "1HGBH41JXMN1O9186",
        "IHGBH41JXMN109186",
        "1HGBH41JXMNQ09186",
        "1HGBH41JXMN10918\u0666",
        "1HGBH41JXMN10918\uff16",
    ],
)
def test_what_is_no_vin_is_refused(vin):
    assert faults(search(seed(vin=vin))) == [f"{CRITERIA}/vin"]


def test_letters_outside_ascii_do_not_become_capitals_of_a_vin():
    # The long s and the sign of Kelvin have S and K as their other case.
    assert faults(search(seed(vin="\u017f" + "HGBH41JXMN109186"))) == [f"{CRITERIA}/vin"]
    assert faults(search(seed(vin="\u212a" + "HGBH41JXMN109186"))) == [f"{CRITERIA}/vin"]


@pytest.mark.parametrize("mileage", [1, 2, 249_999, 250_000])
def test_a_mileage_within_the_limits_is_taken(mileage):
    assert search(seed(mileage=mileage)).json()["mileage"] == mileage


@pytest.mark.parametrize("mileage", [..., None, -1, 0, 250_001, 10**30, True, "55555", 55555.0, 1e3, [1], {}])
def test_what_is_no_mileage_is_refused(mileage):
    assert faults(search(seed(mileage=mileage))) == [f"{CRITERIA}/mileage"]


@pytest.mark.parametrize("state", ["", "T", "TXX", "XX", "PR", "GU", "Texas", " TX", "TX\n", "\u017fc", 5, True, ["TX"]])
def test_what_is_no_state_is_refused(state):
    assert faults(search(seed(stateShortName=state))) == [f"{CRITERIA}/stateShortName"]


@pytest.mark.parametrize(
    "code", ["", "7500", "750011", "75001-1234", "7500x", "75001\n", "750\u0660\u0661", 75001, "00601", "09001", "00000"]
)
def test_what_is_no_zip_code_of_a_state_is_refused(code):
    assert faults(search(seed(stateShortName=..., zip=code))) == [f"{CRITERIA}/zip"]
    assert faults(search(seed(zip=code))) == [f"{CRITERIA}/zip"]


@pytest.mark.parametrize("nothing", [{}, {"stateShortName": None}, {"zip": None}, {"stateShortName": None, "zip": None}])
def test_without_state_and_zip_code_there_is_no_search(nothing):
    assert faults(search({**seed(stateShortName=...), **nothing})) == [f"{CRITERIA}/stateShortName"]


def test_state_and_zip_code_must_agree():
    assert faults(search(seed(zip="90210"))) == [f"{CRITERIA}/zip"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"{} {}", b'{"a":NaN}', b'{"a":1,"a":1}', b"\xff", b'{"a":"\\ud800"}', b"[" * 60_000],
    ids=range(11),
)
def test_what_is_not_one_json_object_is_refused(content):
    assert problem(send(content=content, headers=JSON)) == (400, "malformed_json")


def test_a_second_spelling_of_a_member_is_refused_since_the_gate_might_have_read_the_other():
    content = b'{"partner":"acme-motors","partner":"zenith","searchCriteria":' + json.dumps(SEED).encode() + b"}"
    assert problem(send(content=content, headers=JSON)) == (400, "malformed_json")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Content-Type", "text/plain")],
        [("Content-Type", "application/jsonp")],
        [("Content-Type", "application/x-www-form-urlencoded")],
        [("Content-Type", "application/json"), ("Content-Type", "text/plain")],
        [("Content-Type", "application/json"), ("Content-Encoding", "gzip")],
    ],
)
def test_what_is_not_said_to_be_json_is_refused(headers):
    response = send(content=json.dumps({"searchCriteria": SEED}).encode(), headers=headers)
    assert problem(response) == (415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_what_is_said_to_be_json_is_taken(media_type):
    headers = {"Content-Type": media_type, "Content-Encoding": "identity"}
    assert send(content=json.dumps({"searchCriteria": SEED}).encode(), headers=headers).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(BODY_MAX - 1, 200), (BODY_MAX, 200), (BODY_MAX + 1, 413)])
def test_a_body_has_at_most_64_kib(size, status):
    content = json.dumps({"searchCriteria": SEED}).encode().ljust(size)
    assert send(content=content, headers=JSON).status_code == status


def test_a_body_that_is_too_large_is_not_read_to_its_end():
    taken = []

    async def endless():
        while True:
            taken.append(1)
            yield b" " * 4096

    assert problem(send(content=endless(), headers=JSON)) == (413, "body_too_large")
    assert len(taken) <= BODY_MAX // 4096 + 2


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_another_method_is_refused_and_told_which_there_is(method):
    response = send(method)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    if method != "HEAD":
        assert problem(response) == (405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/", "/docs", SEARCH_PATH + "/", SEARCH_PATH.lower(), SEARCH_PATH + "/x", "/" + SEARCH_PATH])
def test_there_is_nothing_at_another_path(path):
    assert problem(send(path=path, json={"searchCriteria": SEED})) == (404, "not_found")


def test_a_client_that_goes_away_in_the_middle_of_its_body_makes_no_search():
    sent = []
    messages = [{"type": "http.request", "body": b'{"searchCriteria":', "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def collect(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": SEARCH_PATH,
        "headers": [(b"content-type", b"application/json")],
        "gatelodge.caller": ACME,
    }
    asyncio.run(make_app(lambda: TODAY)(scope, receive, collect))
    assert sent[0]["status"] == 400


def test_a_failure_of_the_api_itself_says_nothing_of_its_inside():
    def stopped():
        raise RuntimeError("the calendar fell off the wall")

    response = search(SEED, app=make_app(stopped))
    assert problem(response) == (500, "internal_error")
    assert "calendar" not in response.text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("vin", "mileage", "stateShortName", "zip"), ANYTHING)) | ANYTHING)
def test_whatever_the_criteria_are_they_are_answered_or_refused(criteria):
    content = json.dumps({"searchCriteria": criteria}).encode()
    assert send(content=content, headers=JSON).status_code in {200, 422}
