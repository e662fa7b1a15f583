"""The shape of an API key."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatelodge import wire
from gatelodge.wire import BASE62, ApiKey, checksum

base62 = st.text(alphabet=BASE62)
keys = st.builds(
    ApiKey,
    brand=st.from_regex(wire.BRAND_PATTERN, fullmatch=True),
    environment=st.from_regex(wire.ENVIRONMENT_PATTERN, fullmatch=True),
    kind=st.sampled_from(wire.KEY_KINDS),
    id=st.text(alphabet=BASE62, min_size=12, max_size=12),
    secret=st.text(alphabet=BASE62, min_size=30, max_size=30),
)
EXAMPLE = ApiKey("gl", "uat", "pk", "k3yk3yk3yk3y", "s" * 30)


@given(keys)
def test_a_key_comes_back_from_its_text(key):
    assert ApiKey.parse(key.text) == key


@given(keys, st.data())
def test_a_mistyped_character_is_noticed(key, data):
    """CRC-32 finds every burst of up to 32 bits, so a single wrong character never passes."""
    at = data.draw(st.integers(0, len(key.text) - 1))
    wrong = data.draw(st.sampled_from(BASE62 + "_-. \n").filter(lambda digit: digit != key.text[at]))
    assert ApiKey.parse(key.text[:at] + wrong + key.text[at + 1 :]) is None


@given(keys, st.integers(0, 48))
def test_two_neighbours_swapped_are_noticed(key, at):
    text = key.text
    swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    assert swapped == text or ApiKey.parse(swapped) is None


@given(st.text(max_size=140))
def test_any_text_is_a_key_or_none(text):
    assert ApiKey.parse(text) is None


@pytest.mark.parametrize("frame", ["{} ", " {}", "{}\n", "Bearer {}", "{}=", "{}\x00", "{}é", "\ufeff{}"])
def test_a_key_with_something_around_it_is_none(frame):
    assert ApiKey.parse(EXAMPLE.text)
    assert ApiKey.parse(frame.format(EXAMPLE.text)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "xk"},
        {"kind": "PK"},
        {"brand": "g"},
        {"brand": "GL"},
        {"brand": "9l"},
        {"environment": "UAT"},
        {"environment": ""},
        {"environment": "e" * 33},
        {"id": "k" * 11},
        {"id": "k" * 13},
        {"secret": "s" * 29},
        {"secret": "s" * 31},
        {"secret": "-" * 30},
    ],
)
def test_a_part_of_another_shape_is_refused_though_the_checksum_is_right(change):
    parts = {"brand": "gl", "environment": "uat", "kind": "pk", "id": "k" * 12, "secret": "s" * 30} | change
    assert ApiKey.parse(ApiKey(**parts).text) is None


def test_the_look_alike_digits_of_other_alphabets_are_none():
    assert ApiKey.parse(EXAMPLE.text.replace("3", "３")) is None  # noqa: RUF001 - the look-alike is the case


def test_a_very_long_text_is_refused_unread():
    assert ApiKey.parse("a" * 10_000_000) is None


def test_a_key_can_be_shown_without_its_secret():
    assert EXAMPLE.secret not in repr(EXAMPLE)
    assert EXAMPLE.masked == "gl_uat_pk_k3yk3yk3yk3y_…"
    assert EXAMPLE.text.startswith(EXAMPLE.masked[:-1])


@given(st.text(alphabet=string.printable))
def test_a_checksum_is_six_base62_characters(text):
    assert re.fullmatch("[0-9A-Za-z]{6}", checksum(text))


def test_the_checksum_is_the_crc_32_that_everybody_knows():
    """The check value of CRC-32 for these nine digits is 0xCBF43926."""
    assert sum(BASE62.index(digit) * 62**place for place, digit in enumerate(reversed(checksum("123456789")))) == 0xCBF43926
    assert checksum("") == "000000"
