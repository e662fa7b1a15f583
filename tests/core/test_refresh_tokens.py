"""The refresh token: one spelling, one environment, and nothing that its holder could change."""

import hashlib
import hmac
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatelodge.errors import InvalidCredential, Rejected, WrongEnvironment
from gatelodge_server.core.refresh_tokens import RefreshClaim, RefreshTokens
from gatelodge_server.core.secrets import Secret

KEY = bytes(range(32))
session_ids = st.binary(min_size=16, max_size=16)
generations = st.integers(0, 2**40 - 1)
EXAMPLE = RefreshClaim(bytes(range(16)), 7)


def tokens(brand="gatelodge", environment="uat", key=KEY):
    def make(message):
        return hmac.digest(key, message, hashlib.sha256)

    def check(message, mac):
        return hmac.compare_digest(make(message)[: len(mac)], mac)

    return RefreshTokens(brand=brand, environment=environment, make_mac=make, check_mac=check)


def text_of(claim=EXAMPLE, **codec):
    return tokens(**codec).write(*claim).reveal()


def refused(text, **codec):
    with pytest.raises(Rejected) as caught:
        tokens(**codec).read(Secret(text))
    return type(caught.value)


@given(session_ids, generations)
def test_a_token_says_what_was_written(session_id, generation):
    text = text_of((session_id, generation))
    assert tokens().read(Secret(text)) == RefreshClaim(session_id, generation)


@given(session_ids, generations)
def test_r32_the_same_session_and_generation_have_the_same_token_always(session_id, generation):
    assert text_of((session_id, generation)) == text_of((session_id, generation))


@given(session_ids, generations, session_ids, generations)
def test_no_two_generations_have_one_token(session_id, generation, other_id, other):
    same = (session_id, generation) == (other_id, other)
    assert (text_of((session_id, generation)) == text_of((other_id, other))) is same


def test_a_token_is_recognisable_by_its_prefix_and_as_long_as_any_other():
    prefix, _, payload = text_of().rpartition("_rt_")
    assert prefix == "gatelodge_uat"
    assert len(payload) == 60
    assert set(payload) <= set(string.ascii_letters + string.digits + "-_")


@pytest.mark.parametrize("at", range(len(text_of())))
def test_r30_a_token_with_any_one_character_changed_is_refused(at):
    text = text_of()
    for character in string.ascii_letters + string.digits + "-_=. é\n":
        if character != text[at]:
            assert refused(text[:at] + character + text[at + 1 :]) in {InvalidCredential, WrongEnvironment}


@given(st.data(), session_ids, generations)
def test_r30_a_token_of_one_mac_and_another_body_is_refused(data, session_id, generation):
    other = data.draw(st.tuples(session_ids, generations).filter(lambda pair: pair != (session_id, generation)))
    mine, theirs = text_of((session_id, generation)), text_of(other)
    # 21 bytes of body are 28 characters of base64url, and the MAC begins with the next.
    assert refused(mine[:-32] + theirs[-32:]) is InvalidCredential


@pytest.mark.parametrize("cut", [*range(1, 61), 70])
def test_a_truncated_token_is_refused(cut):
    assert refused(text_of()[:-cut]) is InvalidCredential


@pytest.mark.parametrize("frame", ["{} ", " {}", "{}\n", "{}=", "{}A", "A{}", "Bearer {}", "{}\0", "{}\ud800"])
def test_a_token_with_something_around_it_is_refused(frame):
    assert refused(frame.format(text_of())) is InvalidCredential


@pytest.mark.parametrize("text", ["", "gatelodge_uat_rt_", "x" * 10_000, "gatelodge_uat_rt_" + "A" * 60, "_uat_rt_" + "A" * 60])
def test_what_is_no_token_is_refused(text):
    assert refused(text) is InvalidCredential


@given(st.text(max_size=200))
def test_any_text_is_refused(text):
    assert refused(text) is InvalidCredential


def test_r29_a_token_of_another_environment_says_so_by_its_own_marking():
    assert refused(text_of(), environment="production") is WrongEnvironment
    # The marking alone decides: even a forged one learns no more than what it claims to be.
    assert refused("gatelodge_production_rt_" + "A" * 60) is WrongEnvironment


def test_r29_a_token_cannot_be_carried_into_another_environment_by_rewriting_its_prefix():
    assert refused(text_of().replace("_uat_", "_production_"), environment="production") is InvalidCredential


def test_a_token_of_another_brand_is_invalid_and_cannot_be_carried_over():
    assert refused(text_of(), brand="other") is InvalidCredential
    assert refused(text_of().replace("gatelodge_", "other_"), brand="other") is InvalidCredential


def test_r30_a_token_under_another_key_is_invalid():
    assert refused(text_of(), key=bytes(32)) is InvalidCredential


def test_r30_the_mac_of_a_token_has_192_bits():
    asked = []
    codec = RefreshTokens(
        brand="gatelodge", environment="uat", make_mac=lambda _: bytes(32), check_mac=lambda _, mac: asked.append(mac) or False
    )
    with pytest.raises(InvalidCredential):
        codec.read(Secret(text_of()))
    assert [len(mac) for mac in asked] == [24]


@pytest.mark.parametrize("generation", [-1, 2**40])
def test_a_generation_that_does_not_fit_is_not_written(generation):
    with pytest.raises(OverflowError):
        tokens().write(bytes(16), generation)


def test_what_a_token_is_made_into_is_a_secret():
    assert isinstance(tokens().write(*EXAMPLE), Secret)
