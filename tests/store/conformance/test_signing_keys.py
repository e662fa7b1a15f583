"""The verbs of signing keys. What a rotation and a retirement change is decided in the core; here it is kept."""

import asyncio

import pytest
from given import START, a_signing_key, changed

from gatelodge_server.core.model import DAY, HOUR, MINUTE
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import SigningKeyInUse, SigningKeyNotFound

LEAD, LIFE = 5 * MINUTE, DAY


@pytest.fixture
async def first(store):
    """The first two keys: one that signs, and the next."""
    keys = [a_signing_key("1-current", signs_from=START), a_signing_key("2-next")]
    assert await store.establish_signing_keys(keys, now=START) == keys
    return keys


async def rotated(store, candidate, *, now):
    return await store.rotate_signing_keys(candidate, lead=LEAD, life=LIFE, now=now, by="test")


async def test_the_first_keys_are_kept_and_told(store, first, trail):
    assert await store.list_signing_keys() == first
    assert await trail("1-current") == (["signing-key"], ["signing-key.established"])


async def test_keys_are_established_once(store, first, backend):
    before = backend.count("change"), backend.count("audit")
    assert await store.establish_signing_keys([a_signing_key()], now=START + 1) == first
    assert await store.list_signing_keys() == first
    assert (backend.count("change"), backend.count("audit")) == before


async def test_nodes_that_start_at_once_agree_on_their_keys(store, other_node, backend):
    candidates = [[a_signing_key(signs_from=START), a_signing_key()] for _ in range(10)]
    answers = await asyncio.gather(
        *((store, other_node)[at % 2].establish_signing_keys(keys, now=START) for at, keys in enumerate(candidates))
    )
    kept = {key.kid for key in await other_node.list_signing_keys()}
    assert [{key.kid for key in keys} for keys in answers] == [kept] * 10
    assert backend.count("signing_key") == 2


async def test_there_are_no_keys_before_they_are_established(store):
    assert await store.list_signing_keys() == []


async def test_keys_are_listed_oldest_first(store, first):
    newer, older = a_signing_key(published_at=START + 2), a_signing_key(published_at=START + HOUR)
    await rotated(store, newer, now=START + 2)
    await rotated(store, older, now=START + HOUR)
    assert [key.kid for key in await store.list_signing_keys()] == ["1-current", "2-next", newer.kid, older.kid]


async def test_r20_a_rotation_lets_the_next_key_sign_and_publishes_another(store, first, trail):
    candidate = a_signing_key("3-candidate", published_at=START + HOUR)
    done = await rotated(store, candidate, now=START + HOUR)
    assert isinstance(done, Done)
    assert await store.list_signing_keys() == [
        changed(first[0], signs_until=START + HOUR, gone_at=START + HOUR + LIFE),
        changed(first[1], signs_from=START + HOUR),
        candidate,
    ]
    assert await trail("2-next") == (["signing-key"], ["signing-key.rotated"])
    assert (await store.list_changes(after=done.sequence - 1, limit=10))[0].subject == "2-next"


@pytest.mark.parametrize("later", [LEAD - 1, LEAD, LEAD + 1])
async def test_r20_no_key_signs_before_it_was_published_for_as_long_as_key_sets_are_cached(store, first, later):
    await rotated(store, a_signing_key(published_at=START + later), now=START + later)
    keys = {key.kid: key for key in await store.list_signing_keys()}
    starts = START + max(later, LEAD)
    assert keys["2-next"].signs_from == starts
    assert keys["1-current"].signs_until == starts
    assert keys["1-current"].gone_at == starts + LIFE


async def test_rotations_at_once_are_one_rotation(store, other_node, first, backend):
    candidates = [a_signing_key(published_at=START + 1) for _ in range(10)]
    await asyncio.gather(
        *(rotated((store, other_node)[at % 2], candidate, now=START + 1) for at, candidate in enumerate(candidates))
    )
    assert backend.count("signing_key") == 3
    assert sum(key.signs_from is None for key in await store.list_signing_keys()) == 1


async def test_a_key_is_withdrawn_at_once(store, first, trail):
    await rotated(store, a_signing_key("3-candidate", published_at=START + 1), now=START + 1)
    done = await store.retire_signing_key("1-current", now=START + 2, by="test")
    assert isinstance(done, Done)
    keys = {key.kid: key for key in await store.list_signing_keys()}
    assert keys["1-current"].state(START + 2) == "gone"
    assert keys["2-next"].state(START + 2) == "current"
    assert (await trail("1-current"))[1] == ["signing-key.established", "signing-key.retired"]
    assert (await store.list_changes(after=done.sequence - 1, limit=10))[0].subject == "1-current"


async def test_the_key_that_signs_is_not_withdrawn_without_a_successor(store, first, backend):
    before = backend.count("change")
    assert await store.retire_signing_key("1-current", now=START, by="test") == Refused(SigningKeyInUse)
    assert await store.retire_signing_key("2-next", now=START, by="test") == Refused(SigningKeyInUse)
    assert await store.list_signing_keys() == first
    assert backend.count("change") == before


async def test_a_key_that_is_not_there_cannot_be_withdrawn(store, first):
    assert await store.retire_signing_key("3-nobody", now=START, by="test") == Refused(SigningKeyNotFound)


async def test_withdrawing_a_key_twice_changes_nothing(store, first):
    await rotated(store, a_signing_key(published_at=START + HOUR), now=START + HOUR)
    await store.retire_signing_key("1-current", now=START + HOUR, by="test")
    before = await store.list_signing_keys()
    assert isinstance(await store.retire_signing_key("1-current", now=START + HOUR + 1, by="test"), Done)
    assert await store.list_signing_keys() == before
