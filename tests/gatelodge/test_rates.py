"""The rate headers: that they are what the draft says, and say what is so."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatelodge.rates import RateWindow, rate_headers, seconds_left

NOW = 1_780_000_000_000
AROUND = (-1, 0, 1)
HOUR = RateWindow("hour", 100, 3_600, NOW + 1_234_000, 57)
DAY = RateWindow("day", 1_000, 86_400, NOW + 40_000_000, 900)

ITEM = re.compile(r'"(?P<name>[\x20\x21\x23-\x5b\x5d-\x7e]*)"(?P<parameters>(?:;[a-z*][a-z0-9_.*-]*=-?[0-9]{1,15})*)')


def parsed(text):
    """A list of strings with parameters that are integers, by RFC 9651, 4.2.1 to 4.2.5: ``[(name, {parameter: value})]``."""
    members, at = [], 0
    while True:
        item = ITEM.match(text, at)
        assert item, text[at:]
        parameters = [parameter.split("=") for parameter in item["parameters"].split(";")[1:]]
        assert len(dict(parameters)) == len(parameters)
        members.append((item["name"], {key: int(value) for key, value in parameters}))
        at = item.end()
        if at == len(text):
            return members
        comma = re.compile(r"[ \t]*,[ \t]*").match(text, at)
        assert comma, text[at:]
        at = comma.end()


def headers_of(*windows, now=NOW):
    headers = rate_headers(windows, now)
    assert len(dict(headers)) == len(headers)
    return {name.decode("ascii"): value.decode("ascii") for name, value in headers}


def test_the_headers_look_as_they_do_in_the_draft():
    assert headers_of(HOUR, DAY) == {
        "ratelimit-policy": '"hour";q=100;w=3600, "day";q=1000;w=86400',
        "ratelimit": '"hour";r=57;t=1234, "day";r=900;t=40000',
        "x-ratelimit-limit": "100",
        "x-ratelimit-remaining": "57",
        "x-ratelimit-reset": str(NOW // 1_000 + 1_234),
    }


COUNTS = st.integers(0, 2_000_000_000)
WINDOWS = st.lists(
    st.builds(
        RateWindow,
        st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True),
        COUNTS,
        st.integers(1, 86_400),
        st.integers(NOW - 100_000, NOW + 86_400_000),
        COUNTS,
    ),
    min_size=1,
    max_size=4,
)


@given(WINDOWS)
def test_r73_the_headers_parse_as_lists_of_structured_fields(windows):
    headers = headers_of(*windows)
    policies, states = parsed(headers["ratelimit-policy"]), parsed(headers["ratelimit"])
    assert policies == [(window.name, {"q": window.limit, "w": window.seconds}) for window in windows]
    assert states == [(window.name, {"r": window.remaining, "t": seconds_left(window, NOW)}) for window in windows]
    assert all(state["r"] >= 0 and state["t"] >= 0 for _, state in states)
    assert all(policy["q"] >= 0 and policy["w"] > 0 for _, policy in policies)


@given(WINDOWS)
def test_older_clients_are_told_of_the_window_with_the_least_remaining(windows):
    headers = headers_of(*windows)
    tightest = min(windows, key=lambda window: window.remaining)
    assert headers["x-ratelimit-limit"] == str(tightest.limit)
    assert headers["x-ratelimit-remaining"] == str(tightest.remaining)
    assert 0 <= int(headers["x-ratelimit-reset"]) * 1_000 - tightest.ends_at < 1_000


@pytest.mark.parametrize("offset", AROUND)
def test_r73_nobody_is_told_to_come_back_before_the_window_has_ended(offset):
    window = HOUR._replace(ends_at=NOW + 5_000 + offset)
    told = seconds_left(window, NOW)
    assert told == (6 if offset > 0 else 5)
    assert NOW + told * 1_000 >= window.ends_at
    assert parsed(headers_of(window)["ratelimit"]) == [("hour", {"r": 57, "t": told})]


@pytest.mark.parametrize("offset", AROUND)
def test_a_window_that_has_ended_ends_in_no_time_and_not_before(offset):
    window = HOUR._replace(ends_at=NOW + offset)
    assert seconds_left(window, NOW) == (1 if offset > 0 else 0)
    assert parsed(headers_of(window)["ratelimit"])[0][1]["t"] == (1 if offset > 0 else 0)


def test_what_is_remembered_of_one_window_is_not_told_of_another():
    """All but what is left is made once for a window: each of its parts must count."""
    for change in ({"name": "week"}, {"limit": 7}, {"seconds": 60}, {"ends_at": NOW + 7_000}):
        assert headers_of(HOUR) != headers_of(HOUR._replace(**change))
