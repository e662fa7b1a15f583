"""The verbs of signing keys. What a rotation and a retirement change is decided in the core; here it is kept."""

import asyncio

import pytest
from given import AROUND, START, a_key, a_partner, a_signing_key, a_token, changed, next_version

from gatelodge_server.core.model import DAY, HOUR, MINUTE, KeyPurpose, PartnerStatus
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import SigningKeyInUse, SigningKeyNotFound
from gatelodge_server.core.signing import GRACE

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


# --- The ring for access tokens ---


def an_access_key(kid=None, **changes):
    return a_signing_key(kid, purpose=KeyPurpose.ACCESS, **changes)


@pytest.fixture
async def access_ring(store, first):
    """Its first two keys, beside those for session JWTs."""
    keys = [an_access_key("4-access", signs_from=START), an_access_key("5-access-next")]
    assert await store.establish_signing_keys(keys, now=START) == keys
    return keys


async def rotated_access(store, *, now=START):
    candidate = an_access_key(published_at=now)
    assert isinstance(await store.rotate_signing_keys(candidate, lead=0, life=None, now=now, by="test"), Done)
    return candidate


async def state_of(store, kid, now):
    (key,) = [key for key in await store.list_signing_keys() if key.kid == kid]
    return key.state(now)


async def test_each_purpose_has_its_own_first_keys(store, first, access_ring):
    assert await store.list_signing_keys() == [*first, *access_ring]
    for ring in (first, access_ring):
        twin = [changed(key, kid=f"9-{key.kid}") for key in ring]
        assert await store.establish_signing_keys(twin, now=START + 1) == ring
    assert await store.list_signing_keys() == [*first, *access_ring]


async def test_nodes_that_start_at_once_agree_on_both_rings(store, other_node, backend):
    candidates = [
        [a_signing_key(signs_from=START, purpose=purpose), a_signing_key(purpose=purpose)]
        for _ in range(5)
        for purpose in KeyPurpose
    ]
    answers = await asyncio.gather(
        *((store, other_node)[at // 2 % 2].establish_signing_keys(keys, now=START) for at, keys in enumerate(candidates))
    )
    for at, purpose in enumerate(KeyPurpose):
        kept = {key.kid for key in await store.list_signing_keys() if key.purpose is purpose}
        assert [{key.kid for key in keys} for keys in answers[at::2]] == [kept] * 5
    assert backend.count("signing_key") == 4


async def test_a_rotation_leaves_the_other_ring_as_it_is(store, first, access_ring):
    candidate = await rotated_access(store)
    by_kid = {key.kid: key for key in await store.list_signing_keys()}
    assert [by_kid[key.kid] for key in first] == first
    assert by_kid["4-access"] == changed(access_ring[0], signs_until=START)
    assert by_kid["5-access-next"] == changed(access_ring[1], signs_from=START)
    assert by_kid[candidate.kid] == candidate
    await rotated(store, a_signing_key("3-candidate", published_at=START + HOUR), now=START + HOUR)
    assert await state_of(store, candidate.kid, START + HOUR) == "next"
    assert await state_of(store, "5-access-next", START + HOUR) == "current"


async def test_r20_a_key_for_access_tokens_has_no_day_on_which_it_goes(store, access_ring):
    await rotated_access(store)
    assert await state_of(store, "4-access", START + 999 * DAY) == "retiring"


async def test_rotations_of_a_ring_at_once_are_one_rotation_also_when_the_next_key_signs_at_once(
    store, other_node, access_ring, backend
):
    candidates = [an_access_key(published_at=START + 1) for _ in range(10)]
    await asyncio.gather(
        *(
            (store, other_node)[at % 2].rotate_signing_keys(candidate, lead=DAY, life=None, now=START + 1, by="test")
            for at, candidate in enumerate(candidates)
        )
    )
    assert backend.count("signing_key") == 5


# --- count_live_tokens ---


async def test_live_tokens_are_counted_by_the_key_that_signed_them(store, access_ring, key):
    assert await store.count_live_tokens(now=START) == {}
    await store.add_partner(a_partner("zeta"), a_key("zeta"), by="test")
    tokens = [a_token("4-access"), a_token("4-access"), a_token("4-access", "zeta"), a_token("5-access-next")]
    for token in tokens:
        await store.issue_token(token, by="test")
    assert await store.count_live_tokens(now=START) == {"4-access": 3, "5-access-next": 1}
    await store.revoke_token(tokens[3].id, now=START, by="test")
    await store.revoke_token(tokens[0].id, now=START + DAY, by="test")  # and a clock is set back
    assert await store.count_live_tokens(now=START) == {"4-access": 2}
    await store.set_partner_status("zeta", PartnerStatus.SUSPENDED, now=START, by="test")
    assert await store.count_live_tokens(now=START) == {"4-access": 2}  # it may be resumed
    await store.set_partner_status("zeta", PartnerStatus.DEACTIVATED, now=START, by="test")
    assert await store.count_live_tokens(now=START) == {"4-access": 1}


@pytest.mark.parametrize("offset", AROUND)
async def test_a_rotated_token_is_live_until_its_overlap_is_over(store, access_ring, key, offset):
    token = a_token("4-access")
    await store.issue_token(token, by="test")
    await store.roll_token(token.id, next_version(token), ends_at=START + HOUR, now=START, by="test")
    assert await store.count_live_tokens(now=START + HOUR + offset) == {"4-access": 2 if offset < 0 else 1}


# --- retire_unneeded_keys, and retiring by hand ---


@pytest.mark.parametrize("offset", AROUND)
async def test_a_key_that_no_token_needs_goes_when_no_node_can_sign_with_it_any_more(store, access_ring, trail, offset):
    await rotated_access(store, now=START + HOUR)
    now = START + HOUR + GRACE + offset
    gone = await store.retire_unneeded_keys(now=now)
    assert gone == ([] if offset < 0 else ["4-access"])
    assert await state_of(store, "4-access", now) == ("retiring" if offset < 0 else "gone")
    if gone:
        assert await trail("4-access") == (
            ["signing-key", "signing-key"],
            ["signing-key.established", "signing-key.retired"],
        )
        assert await store.retire_unneeded_keys(now=now + DAY) == []


@pytest.mark.parametrize("offset", AROUND)
async def test_r20_a_key_stays_for_as_long_as_one_token_lives_however_long_that_is(store, access_ring, key, offset):
    token = a_token("4-access")
    await store.issue_token(token, by="test")
    await rotated_access(store)
    assert await store.retire_unneeded_keys(now=START + 999 * DAY) == []
    replacement = changed(next_version(token), kid="5-access-next")
    end = START + 1_000 * DAY
    await store.roll_token(token.id, replacement, ends_at=end, now=end - HOUR, by="test")
    assert await store.retire_unneeded_keys(now=end + offset) == ([] if offset < 0 else ["4-access"])


async def test_what_signs_or_is_to_sign_or_is_for_sessions_never_goes_by_itself(store, access_ring):
    await rotated(store, a_signing_key(published_at=START + HOUR), now=START + HOUR)
    before = await store.list_signing_keys()
    assert await store.retire_unneeded_keys(now=START + HOUR + GRACE) == []
    assert await store.list_signing_keys() == before


async def test_of_many_who_keep_house_at_once_one_withdraws_a_key(store, other_node, access_ring, backend):
    await rotated_access(store)
    before = backend.count("change"), backend.count("audit")
    gone = await asyncio.gather(*((store, other_node)[at % 2].retire_unneeded_keys(now=START + DAY) for at in range(10)))
    assert sorted(gone) == [[]] * 9 + [["4-access"]]
    assert (backend.count("change"), backend.count("audit")) == (before[0] + 1, before[1] + 1)


async def test_a_key_that_live_tokens_need_is_not_retired_by_hand(store, access_ring, key, backend):
    tokens = [a_token("4-access") for _ in range(2)]
    for token in tokens:
        await store.issue_token(token, by="test")
    await rotated_access(store)
    await store.revoke_token(tokens[0].id, now=START, by="test")
    before = backend.count("change"), await store.list_signing_keys()
    assert await store.retire_signing_key("4-access", now=START, by="test") == Refused(SigningKeyInUse)
    assert (backend.count("change"), await store.list_signing_keys()) == before
    await store.revoke_token(tokens[1].id, now=START, by="test")
    assert isinstance(await store.retire_signing_key("4-access", now=START, by="test"), Done)
    assert await state_of(store, "4-access", START) == "gone"


async def test_a_rotation_of_one_ring_lets_no_key_of_the_other_go(store, first, access_ring):
    await rotated(store, a_signing_key(published_at=START + 1), now=START + 1)
    assert await store.retire_signing_key("4-access", now=START + 1, by="test") == Refused(SigningKeyInUse)
    assert await store.retire_signing_key("5-access-next", now=START + 1, by="test") == Refused(SigningKeyInUse)


async def test_of_an_issue_and_housekeeping_at_once_no_live_token_is_left_without_its_key(store, other_node, access_ring, key):
    kid = "4-access"
    for at in range(20):
        now = START + at * HOUR
        await rotated_access(store, now=now)
        token = a_token(kid, created_at=now + GRACE)
        nodes = (store, other_node)[:: 1 if at % 2 else -1]
        issued, gone = await asyncio.gather(
            nodes[0].issue_token(token, by="test"), nodes[1].retire_unneeded_keys(now=now + GRACE)
        )
        assert (kid in gone) is (issued == Refused(SigningKeyNotFound))
        kid = next(
            key.kid
            for key in await store.list_signing_keys()
            if key.purpose is KeyPurpose.ACCESS and key.state(now) == "current"
        )
