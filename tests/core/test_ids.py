"""Identifiers and keys: their shape, their order, and that their randomness arrives whole."""

import os
from collections import Counter
from uuid import UUID

import pytest
from given import START
from hypothesis import given
from hypothesis import strategies as st

from gatelodge.wire import BASE62, ApiKey
from gatelodge_server.core.ids import api_key, company_id, token_id, uuid7

instants = st.integers(0, 2**48 - 1)


@given(instants, st.binary(min_size=10, max_size=10))
def test_a_uuid7_has_the_bits_of_rfc_9562(now, random):
    id_ = UUID(bytes=uuid7(now, lambda _: random))
    assert id_.version == 7
    assert id_.variant == "specified in RFC 4122"
    assert id_.int >> 80 == now


@given(instants, instants)
def test_a_uuid7_of_a_later_millisecond_sorts_behind(now, later):
    before, after = uuid7(now, lambda size: b"\xff" * size), uuid7(later, bytes)
    assert (before < after) is (now < later)


def test_a_uuid7_keeps_seventy_four_random_bits():
    ones, zeros = uuid7(START, lambda size: b"\xff" * size), uuid7(START, bytes)
    assert (int.from_bytes(ones) ^ int.from_bytes(zeros)).bit_count() == 74
    single = {uuid7(START, lambda size, bit=bit: (1 << bit).to_bytes(size)) for bit in range(74)}
    assert len(single) == 74


def test_a_company_has_a_uuid7():
    id_ = company_id(START, os.urandom)
    assert id_.version == 7
    assert str(id_) == str(UUID(str(id_)))


def test_r13_a_million_token_ids_are_all_different():
    pool = os.urandom(16 * 1_000_000)
    at = iter(range(0, len(pool), 16))

    def entropy(size):
        assert size == 16
        start = next(at)
        return pool[start : start + 16]

    assert len({token_id(entropy) for _ in range(1_000_000)}) == 1_000_000


def test_r13_a_token_id_carries_its_128_bits_whole():
    """Whatever one bit of entropy changes shows in the id, so ids are different when the entropy is."""
    ids = {token_id(lambda size, bit=bit: (1 << bit).to_bytes(size)) for bit in range(128)}
    assert len(ids) == 128
    assert {len(id_) for id_ in ids} == {22}


@given(st.sampled_from(["pk", "ck"]))
def test_a_key_is_what_the_wire_takes_for_one(kind):
    key = api_key("gatelodge", "uat", kind, os.urandom)
    assert ApiKey.parse(key.text) == key
    assert (key.brand, key.environment, key.kind) == ("gatelodge", "uat", kind)
    assert (len(key.id), len(key.secret)) == (12, 30)


def test_r67_the_characters_of_keys_are_equally_likely():
    """Chi-square over 62 classes: 61 degrees of freedom, above 130 once in a million runs."""
    counts = Counter()
    total = 2_000
    for _ in range(total):
        key = api_key("gatelodge", "uat", "pk", os.urandom)
        counts.update(key.id + key.secret)
    expected = total * 42 / 62
    assert sum((counts[digit] - expected) ** 2 / expected for digit in BASE62) < 130


@pytest.mark.parametrize("part", ["id", "secret"])
def test_r67_no_place_of_a_key_favours_a_character(part):
    keys = [getattr(api_key("gatelodge", "uat", "pk", os.urandom), part) for _ in range(2_000)]
    for place in zip(*keys, strict=True):
        assert max(Counter(place).values()) < 80  # 32 on average


def test_r67_id_and_secret_are_drawn_apart_and_each_from_enough():
    asked = []

    def entropy(size):
        asked.append(size)
        return os.urandom(size)

    api_key("gatelodge", "uat", "pk", entropy)
    assert asked == [22, 40]
    assert len({api_key("gatelodge", "uat", "pk", os.urandom).text for _ in range(1_000)}) == 1_000
