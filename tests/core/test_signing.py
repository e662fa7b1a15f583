"""Signing keys: the plans as a state machine, and the ring that is never trusted for longer than a second."""

import asyncio
import json
import os
import sqlite3
from contextlib import closing

import pytest
from backends import SqliteBackend
from given import AROUND, START, a_signing_key, changed
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gatelodge.errors import InvalidCredential, Unavailable
from gatelodge.tokens import TokenRules, read_unverified, verify_token
from gatelodge_server.core.following import RESTORED
from gatelodge_server.core.model import DAY, HOUR, MINUTE, SECOND, KeyPurpose, SigningKey
from gatelodge_server.core.refusals import SigningKeyInUse, SigningKeyNotFound
from gatelodge_server.core.signing import (
    GRACE,
    KEY_SET_MAX_AGE,
    RING_MAX_AGE,
    SigningKeys,
    plan_retirement,
    plan_rotation,
    plan_withdrawals,
)
from gatelodge_server.vault import MasterKeys, Vault

LEAD, LIFE = KEY_SET_MAX_AGE, DAY
CURRENT = a_signing_key("current", signs_from=START)
NEXT = a_signing_key("next")


# --- States and plans ---


@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize(
    ("instants", "before", "after"),
    [
        ({"signs_from": START}, "next", "current"),
        ({"signs_from": 0, "signs_until": START}, "current", "retiring"),
        ({"signs_from": 0, "signs_until": 1, "gone_at": START}, "retiring", "gone"),
        ({"gone_at": START}, "next", "gone"),
    ],
)
def test_the_state_of_a_key_follows_from_its_instants(instants, before, after, offset):
    assert SigningKey("kid", "{}", b"", 0, **instants).state(START + offset) == (before if offset < 0 else after)


def test_a_key_that_was_told_nothing_is_next():
    assert NEXT.state(START + 99 * DAY) == "next"


@pytest.mark.parametrize("later", [0, LEAD - 1, LEAD, LEAD + 1])
def test_r20_a_rotation_waits_until_every_cache_can_know_the_next_key(later):
    candidate = a_signing_key("candidate", published_at=START + later)
    plan = plan_rotation([CURRENT, NEXT], candidate, lead=LEAD, life=LIFE, now=START + later)
    starts = START + max(later, LEAD)
    assert (plan.kid, plan.signs_from) == ("next", starts)
    assert list(plan.changed) == [
        changed(NEXT, signs_from=starts),
        candidate,
        changed(CURRENT, signs_until=starts, gone_at=starts + LIFE),
    ]


def test_a_rotation_under_way_is_not_overtaken():
    pending = changed(NEXT, signs_from=START + LEAD)
    plan = plan_rotation([CURRENT, pending, a_signing_key()], a_signing_key(), lead=LEAD, life=LIFE, now=START + LEAD - 1)
    assert (list(plan.changed), plan.kid, plan.signs_from) == ([], "next", START + LEAD)


@pytest.mark.parametrize(
    ("keys", "kid"),
    [([CURRENT, NEXT], "current"), ([CURRENT, NEXT], "next"), ([CURRENT, changed(NEXT, signs_from=START + 1)], "next")],
)
def test_the_only_key_that_could_sign_is_not_withdrawn(keys, kid):
    assert plan_retirement(keys, kid, live_tokens=0, now=START) is None


def test_a_withdrawn_current_key_is_followed_at_once():
    current = changed(CURRENT, signs_until=START + LEAD, gone_at=START + LEAD + LIFE)
    pending = changed(NEXT, signs_from=START + LEAD)
    assert plan_retirement([current, pending], "current", live_tokens=0, now=START + 1) == [
        changed(current, signs_until=START + 1, gone_at=START + 1),
        changed(pending, signs_from=START + 1),
    ]


def test_a_withdrawn_retiring_key_is_gone_and_one_that_is_gone_stays_as_it_is():
    retiring = changed(CURRENT, signs_until=START + 5, gone_at=START + LIFE)
    assert plan_retirement([retiring, NEXT], "current", live_tokens=0, now=START + 6) == [changed(retiring, gone_at=START + 6)]
    assert plan_retirement([retiring, NEXT], "current", live_tokens=0, now=START + LIFE) == []


class Rotations(RuleBasedStateMachine):
    """Whatever is rotated and withdrawn, and whenever: one key signs, and what it has signed stays verifiable."""

    def __init__(self):
        super().__init__()
        self.now = START
        self.keys = {CURRENT.kid: CURRENT, NEXT.kid: NEXT}
        self.last_signed = {}
        self.withdrawn = set()
        self.hurried = set()
        self.made = 0

    def write(self, keys):
        self.keys |= {key.kid: key for key in keys}

    @rule(later=st.sampled_from([0, 1, MINUTE, LEAD - 1, LEAD, HOUR, LIFE - 1, LIFE, 3 * LIFE]))
    def time_passes(self, later):
        self.now += later

    @rule()
    def rotate(self):
        self.made += 1
        candidate = a_signing_key(f"key-{self.made}", published_at=self.now)
        self.write(plan_rotation(list(self.keys.values()), candidate, lead=LEAD, life=LIFE, now=self.now).changed)

    @rule(at=st.integers(0, 9))
    def withdraw(self, at):
        kid = list(self.keys)[at % len(self.keys)]
        plan = plan_retirement(list(self.keys.values()), kid, live_tokens=0, now=self.now)
        if plan is not None:
            self.withdrawn.add(kid)
            self.hurried |= {key.kid for key in plan if key.kid != kid}
            self.write(plan)
            assert self.keys[kid].state(self.now) == "gone"

    @invariant()
    def one_key_signs_and_one_is_next(self):
        states = [key.state(self.now) for key in self.keys.values()]
        assert states.count("current") == 1
        assert states.count("next") >= 1

    @invariant()
    def what_was_signed_stays_verifiable(self):
        for key in self.keys.values():
            if key.state(self.now) == "current":
                self.last_signed[key.kid] = self.now
        for kid, signed in self.last_signed.items():
            if kid not in self.withdrawn and self.now < signed + LIFE:
                assert self.keys[kid].state(self.now) != "gone"

    @invariant()
    def no_key_signs_unannounced(self):
        for key in self.keys.values():
            if key.signs_from is not None and key is not CURRENT and key.kid not in self.hurried | {"current"}:
                assert key.signs_from >= key.published_at + LEAD


Rotations.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRotations = Rotations.TestCase


# --- The ring ---


CLAIMS = {"sub": "acme-motors"}


async def signed(lodge):
    """The kid of a token that is signed now."""
    return read_unverified((await lodge.signing_keys.signer(lodge.clock.now)).sign(CLAIMS, typ="at+jwt")).kid


def readings(lodge):
    return lodge.store.asked.count("list_signing_keys")


@pytest.mark.parametrize("offset", [-0.001, 0.0, 0.001])
async def test_the_ring_is_trusted_for_a_second_by_the_monotonic_clock(lodge, offset):
    await signed(lodge)
    before = readings(lodge)
    lodge.monotonic.now += RING_MAX_AGE + offset
    await signed(lodge)
    assert readings(lodge) - before == (0 if offset < 0 else 1)


async def test_the_wall_clock_makes_no_ring_older_or_younger(lodge):
    await signed(lodge)
    before = readings(lodge)
    lodge.clock.forward(DAY)
    await signed(lodge)
    lodge.clock.forward(-2 * HOUR)
    await signed(lodge)
    assert readings(lodge) == before


@pytest.mark.parametrize("offset", [-0.001, 0.0, 0.001])
async def test_r72_without_a_store_no_old_key_is_used_for_longer_than_a_second(lodge, offset):
    kid = await signed(lodge)
    lodge.store.cut_by = Unavailable()
    lodge.monotonic.now += RING_MAX_AGE + offset
    for ask in (lambda: signed(lodge), lambda: lodge.signing_keys.find_async(kid), lodge.signing_keys.key_set):
        if offset < 0:
            assert await ask()
        else:
            with pytest.raises(Unavailable):
                await ask()


async def test_r72_after_an_outage_the_keys_are_read_again(lodge):
    kid = await signed(lodge)
    lodge.monotonic.now += RING_MAX_AGE
    lodge.store.cut_by = Unavailable()
    with pytest.raises(Unavailable):
        await signed(lodge)
    lodge.store.cut_by = None
    assert await signed(lodge) == kid


async def test_many_who_need_the_keys_at_once_share_one_reading(lodge):
    before = readings(lodge)
    await asyncio.gather(*(signed(lodge) for _ in range(20)))
    assert readings(lodge) - before == 1


async def test_a_reading_is_as_old_as_its_beginning(lodge):
    """What is written while the keys are being read may not be in them."""
    store = lodge.store

    class Slow:
        async def list_signing_keys(self):
            keys = await store.list_signing_keys()
            lodge.monotonic.now += 0.4
            return keys

    keys = SigningKeys(
        purpose=KeyPurpose.SESSION, store=Slow(), sealer=lodge.vault, clock=lodge.clock, monotonic=lodge.monotonic, jwt_ttl=DAY
    )
    await keys.key_set()
    lodge.monotonic.now += 0.6
    before = readings(lodge)
    await keys.key_set()
    assert readings(lodge) - before == 1


async def test_a_withdrawn_key_signs_and_verifies_nothing_after_a_second(lodge):
    first = await signed(lodge)
    await lodge.signing_keys.rotate(by="test")
    await lodge.signing_keys.retire(first, by="test")
    lodge.monotonic.now += RING_MAX_AGE
    assert await signed(lodge) != first
    assert await lodge.signing_keys.find_async(first) is None
    assert first not in {jwk["kid"] for jwk in await lodge.signing_keys.key_set()}


async def test_r20_the_same_key_object_is_found_for_as_long_as_the_key_is_published(lodge):
    kid = await signed(lodge)
    found = await lodge.signing_keys.find_async(kid)
    for _ in range(5):
        lodge.monotonic.now += RING_MAX_AGE
        assert await lodge.signing_keys.find_async(kid) is found
    assert found.kid == kid


async def test_r20_the_next_key_is_published_before_it_signs_and_the_old_one_while_its_tokens_live(lodge):
    first = await signed(lodge)
    (second,) = [jwk["kid"] for jwk in await lodge.signing_keys.key_set() if jwk["kid"] != first]
    rotated = await lodge.signing_keys.rotate(by="test")
    assert (rotated.kid, rotated.signs_from) == (second, START + KEY_SET_MAX_AGE)
    lodge.monotonic.now += RING_MAX_AGE
    for offset in AROUND:
        lodge.clock.now = START + KEY_SET_MAX_AGE + offset
        assert await signed(lodge) == (first if offset < 0 else second)
    # A token of the first key lives for 24 hours; two minutes are added for clocks that differ.
    gone = START + KEY_SET_MAX_AGE + DAY + 2 * MINUTE
    for offset in AROUND:
        lodge.clock.now = gone + offset
        published = {jwk["kid"] for jwk in await lodge.signing_keys.key_set()}
        assert (first in published) is (offset < 0)
        assert (await lodge.signing_keys.find_async(first) is not None) is (offset < 0)


async def test_asking_for_a_rotation_again_gives_the_one_under_way(lodge):
    first = await lodge.signing_keys.rotate(by="test")
    lodge.clock.forward(MINUTE)
    assert await lodge.signing_keys.rotate(by="test") == first
    assert len(await lodge.signing_keys.list_keys()) == 3


async def test_a_kid_that_is_not_ours_is_not_found(lodge):
    assert await lodge.signing_keys.find_async("nobody") is None


async def test_the_keys_are_never_asked_for_without_the_store(lodge):
    with pytest.raises(NotImplementedError):
        lodge.signing_keys.find("kid")


async def test_r18_the_key_set_shows_public_members_only(lodge):
    for jwk in await lodge.signing_keys.key_set():
        assert set(jwk) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
        assert (jwk["kty"], jwk["crv"], jwk["use"], jwk["alg"]) == ("EC", "P-256", "sig", "ES256")


async def test_establishing_keys_again_changes_none(lodge):
    before = await lodge.signing_keys.list_keys()
    await lodge.signing_keys.establish()
    assert await lodge.signing_keys.list_keys() == before


async def test_p10_a_clock_set_back_behind_the_first_key_shuts_nobody_out(lodge):
    kid = await signed(lodge)
    await lodge.signing_keys.rotate(by="test")  # a second key is to sign from five minutes on
    lodge.monotonic.now += RING_MAX_AGE
    for back in (1, HOUR, 400 * DAY):
        lodge.clock.now = START - back
        assert await signed(lodge) == kid
        assert await lodge.signing_keys.find_async(kid) is not None


async def test_without_a_key_that_signs_nothing_is_signed(lodge):
    class OnlyNext:
        async def list_signing_keys(self):
            return [key for key in await lodge.store.list_signing_keys() if key.signs_from is None]

    keys = SigningKeys(
        purpose=KeyPurpose.SESSION,
        store=OnlyNext(),
        sealer=lodge.vault,
        clock=lodge.clock,
        monotonic=lodge.monotonic,
        jwt_ttl=DAY,
    )
    with pytest.raises(Unavailable):
        await keys.signer(START)


async def test_keys_that_cannot_be_withdrawn_say_why(lodge):
    with pytest.raises(SigningKeyNotFound):
        await lodge.signing_keys.retire("nobody", by="test")
    with pytest.raises(SigningKeyInUse):
        await lodge.signing_keys.retire(await signed(lodge), by="test")


async def test_the_private_half_is_stored_sealed_and_opens_only_as_itself(lodge):
    first, second = await lodge.signing_keys.list_keys()
    assert b"PRIVATE" not in first.wrapped
    assert json.loads(first.jwk)["kid"] == first.kid
    with pytest.raises(ValueError, match="seal"):
        lodge.vault.open(first.wrapped, label=b"signing-key:" + second.kid.encode())
    stranger = SigningKeys(
        purpose=KeyPurpose.SESSION,
        store=lodge.store,
        sealer=Vault(MasterKeys((os.urandom(32),)), os.urandom),
        clock=lodge.clock,
        monotonic=lodge.monotonic,
        jwt_ttl=DAY,
    )
    with pytest.raises(Unavailable):
        await stranger.signer(START)


async def test_a_key_sealed_under_a_newer_master_key_verifies_and_is_published_and_only_what_it_would_sign_is_refused(lodge):
    """A command reads a new line of `master.key` at once, a running server does not."""
    old, new, unopened = os.urandom(32), os.urandom(32), []

    def ring_of(*masters):
        return SigningKeys(
            purpose=KeyPurpose.SESSION,
            store=lodge.store,
            sealer=Vault(MasterKeys(masters), os.urandom),
            clock=lodge.clock,
            monotonic=lodge.monotonic,
            jwt_ttl=DAY,
            on_unopened=unopened.append,
        )

    async def turn(command, server):
        lodge.clock.forward(MINUTE)
        rotated = await command.rotate(by="test")
        lodge.clock.now = rotated.signs_from
        lodge.monotonic.now += RING_MAX_AGE
        assert {jwk["kid"] for jwk in await server.key_set()} >= {rotated.kid}
        assert (await server.find_async(rotated.kid)).kid == rotated.kid
        return rotated.kid

    with closing(sqlite3.connect(lodge.backend.path)) as database, database:
        database.execute("DELETE FROM signing_key WHERE purpose = 'session'")
    await ring_of(old).establish()
    server, command = ring_of(old), ring_of(new, old)
    first = (await server.signer(lodge.clock.now)).kid
    second = await turn(command, server)
    assert (await server.signer(lodge.clock.now)).kid == second
    third = await turn(command, server)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await server.signer(lodge.clock.now)
    assert (await command.signer(lodge.clock.now)).kid == third
    assert unopened == [third]
    # The old line has gone: what it sealed verifies still.
    restarted = ring_of(new)
    assert (await restarted.signer(lodge.clock.now)).kid == third
    for kid in (first, second):
        assert (await restarted.find_async(kid)).kid == kid


async def test_the_next_reading_begins_before_anybody_has_to_wait_for_it(lodge):
    await signed(lodge)
    before = readings(lodge)
    lodge.monotonic.now += RING_MAX_AGE * 0.6
    await signed(lodge)  # with the keys that are there; the reading that it begins goes on beside it
    async with asyncio.timeout(10):
        while readings(lodge) == before:
            await asyncio.sleep(0)


async def test_r35_a_refresh_that_could_not_be_signed_spends_nothing(lodge):
    _, key = await lodge.new_partner()
    opened = await lodge.sessions.log_in(key)
    lodge.monotonic.now += RING_MAX_AGE
    asked = len(lodge.store.asked)
    lodge.store.cut_by = Unavailable()
    with pytest.raises(Unavailable):
        await lodge.sessions.refresh(opened.refresh_token, idempotency_key=None)
    assert "advance_session" not in lodge.store.asked[asked:]
    lodge.store.cut_by = None
    assert (await lodge.sessions.refresh(opened.refresh_token, idempotency_key=None)).jwt.reveal()


async def test_a_key_that_is_gone_need_not_open_any_more(lodge):
    gone, *_ = await lodge.signing_keys.list_keys()

    class WithOldKey:
        async def list_signing_keys(self):
            sealed_long_ago = SigningKey("old", gone.jwk, b"sealed under a key that is no more", 0, 0, 1, 2)
            return [sealed_long_ago, *await lodge.store.list_signing_keys()]

    keys = SigningKeys(
        purpose=KeyPurpose.SESSION,
        store=WithOldKey(),
        sealer=lodge.vault,
        clock=lodge.clock,
        monotonic=lodge.monotonic,
        jwt_ttl=DAY,
    )
    assert (await keys.signer(lodge.clock.now)).kid
    assert "old" not in {jwk["kid"] for jwk in await keys.key_set()}


async def test_who_hears_of_a_changed_key_reads_the_keys_anew_and_of_other_changes_does_not(lodge):
    kid = await signed(lodge)
    found, before = await lodge.signing_keys.find_async(kid), readings(lodge)
    for kind in ("partner", "token", "credential", "session"):
        lodge.signing_keys.hear(kind, kid)
    assert await lodge.signing_keys.find_async(kid) is found
    assert readings(lodge) == before
    for number, kind in enumerate(("signing-key", RESTORED), 1):
        lodge.signing_keys.hear(kind, "another")
        assert await lodge.signing_keys.find_async(kid) is found
        assert readings(lodge) == before + number


async def test_a_withdrawn_key_verifies_nothing_once_it_was_heard_of_whatever_was_being_read(lodge):
    kid = await signed(lodge)
    await lodge.signing_keys.rotate(by="test")
    store, late, go_on = lodge.store, asyncio.Event(), asyncio.Event()

    class Slow:
        async def list_signing_keys(self):
            keys = await store.list_signing_keys()
            if not late.is_set():
                late.set()
                await go_on.wait()
            return keys

    keys = SigningKeys(
        purpose=KeyPurpose.SESSION, store=Slow(), sealer=lodge.vault, clock=lodge.clock, monotonic=lodge.monotonic, jwt_ttl=DAY
    )
    early = asyncio.create_task(keys.find_async(kid))
    await late.wait()
    await lodge.signing_keys.retire(kid, by="test")
    keys.hear("signing-key", kid)
    assert await keys.find_async(kid) is None
    go_on.set()
    assert (await early).kid == kid  # it had asked before
    assert await keys.find_async(kid) is None


# --- Two rings ---


async def test_r9_each_ring_signs_and_verifies_what_is_of_its_own_purpose_only(lodge):
    """A session JWT that a key of the other ring has signed is refused, and the other way round: no matter that both are ours."""
    issuer, audience = "https://uat.example.com", "partner-api-uat"
    sessions = TokenRules.for_sessions(issuer=issuer, audience=audience)
    access = TokenRules.for_access_tokens(issuer=issuer, audience=audience)
    _, key = await lodge.new_partner()
    session = read_unverified((await lodge.sessions.log_in(key)).jwt.reveal())
    issued = read_unverified((await lodge.access_tokens.issue("acme-motors", label="", by="test")).text.reveal())
    rings = {sessions: lodge.signing_keys, access: lodge.access_keys}
    for (rules, own), other in zip(rings.items(), reversed(rings.values()), strict=True):
        genuine = session if rules is sessions else issued
        claims = verify_token(genuine, key=await own.find_async(genuine.kid), rules=rules, now=START / SECOND)
        forged = read_unverified((await other.signer(START)).sign(claims, typ=genuine.type))
        assert await other.find_async(forged.kid) is not None
        with pytest.raises(InvalidCredential):
            verify_token(forged, key=await own.find_async(forged.kid), rules=rules, now=START / SECOND)


async def test_the_rings_share_no_key_and_are_rotated_apart(lodge):
    before = [key.kid for key in await lodge.access_keys.list_keys()]
    sessions = {key.kid for key in await lodge.signing_keys.list_keys()}
    assert (len(before), len(sessions), sessions & set(before)) == (2, 2, set())
    rotated = await lodge.signing_keys.rotate(by="test")
    assert rotated.kid in sessions
    assert [key.kid for key in await lodge.access_keys.list_keys()] == before
    assert (await lodge.access_keys.rotate(by="test")).kid in before
    for ring, purpose in ((lodge.signing_keys, KeyPurpose.SESSION), (lodge.access_keys, KeyPurpose.ACCESS)):
        assert {key.purpose for key in await ring.list_keys()} == {purpose}
        assert {jwk["kid"] for jwk in await ring.key_set()} == {key.kid for key in await ring.list_keys()}


async def test_establishing_one_ring_is_not_hindered_by_the_other(tmp_path, vault):
    store = SqliteBackend.create(tmp_path).open()
    rings = [
        SigningKeys(purpose=purpose, store=store, sealer=vault, clock=lambda: START, monotonic=lambda: 0.0, jwt_ttl=None)
        for purpose in KeyPurpose
    ]
    for ring in rings:
        await ring.establish()
        await ring.establish()
    assert [len(await ring.list_keys()) for ring in rings] == [2, 2]
    await store.close()


@pytest.mark.parametrize("life", [None, LIFE])
def test_a_key_that_signed_what_does_not_expire_has_no_day_on_which_it_goes(life):
    plan = plan_rotation([CURRENT, NEXT], a_signing_key(), lead=0, life=life, now=START)
    assert plan.changed[-1] == changed(CURRENT, signs_until=START, gone_at=life and START + life)


@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize(
    ("change", "live", "goes"),
    [
        ({}, {}, True),
        ({}, {"old": 0, "other": 5}, True),
        ({}, {"old": 1}, False),
        ({"purpose": KeyPurpose.SESSION}, {}, False),
        ({"gone_at": START}, {}, False),
        ({"signs_until": None}, {}, False),
        ({"signs_from": None, "signs_until": None}, {}, False),
    ],
)
def test_a_key_for_access_tokens_goes_when_it_signs_no_more_and_nobody_needs_it(change, live, goes, offset):
    old = a_signing_key("old", purpose=KeyPurpose.ACCESS, signs_from=0, signs_until=START)
    now = START + GRACE + offset
    key = changed(old, **change)
    assert plan_withdrawals([key], live, now=now) == ([changed(key, gone_at=now)] if goes and offset >= 0 else [])


def test_no_key_is_withdrawn_that_live_tokens_need_and_one_that_is_gone_is_no_ones_need():
    pending = changed(NEXT, signs_from=START + LEAD)
    retiring = changed(CURRENT, signs_until=START)
    for key in (CURRENT, retiring):
        assert plan_retirement([key, pending], "current", live_tokens=1, now=START) is None
        assert plan_retirement([key, pending], "current", live_tokens=0, now=START) is not None
    assert plan_retirement([changed(retiring, gone_at=START), pending], "current", live_tokens=1, now=START) == []
