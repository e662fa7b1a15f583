"""The verbs of access tokens."""

import asyncio

import pytest
from given import AROUND, START, a_key, a_partner, a_signing_key, a_token, changed, next_version

from gatelodge.errors import CredentialRevoked, CredentialRotated, PartnerSuspended
from gatelodge_server.core.access_tokens import judge_token
from gatelodge_server.core.model import DAY, HOUR, EndCause, Holder, KeyPurpose, PartnerStatus, Standing
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import (
    PartnerDeactivated,
    PartnerNotFound,
    SigningKeyNotFound,
    TokenEnded,
    TokenNotFound,
)

KID = "1-current"


@pytest.fixture(autouse=True)
async def ring(store):
    """The ring for access tokens: one key that signs, and the next."""
    keys = [
        a_signing_key(KID, signs_from=START, purpose=KeyPurpose.ACCESS),
        a_signing_key("2-next", purpose=KeyPurpose.ACCESS),
    ]
    await store.establish_signing_keys(keys, now=START)
    return keys


@pytest.fixture
async def token(store, key):
    """An access token of the partner ``acme-motors``."""
    token = a_token(KID)
    assert isinstance(await store.issue_token(token, by="test"), Done)
    return token


async def set_status(store, status, partner_id="acme-motors"):
    await store.set_partner_status(partner_id, status, now=START, by="test")


async def verdict(store, token, now=START):
    """With what the presenter of a token is refused; ``None`` if it may come in."""
    return judge_token(await store.find_token(token.id), token.digest, now)


# --- issue_token ---


async def test_a_token_is_kept_as_it_was_issued(store, key, trail):
    token = a_token(KID, label="Straße ☃", created_at=START + 5)
    done = await store.issue_token(token, by="manager")
    assert isinstance(done, Done)
    assert await store.get_token(token.id) == token
    assert await trail(token.id) == (["token"], ["token.issued"])
    (change,) = await store.list_changes(after=done.sequence - 1, limit=10)
    assert (change.kind, change.subject, change.at) == ("token", token.id, START + 5)
    event = (await store.list_audit(partner_id="acme-motors", since=START + 5))[-1]
    assert (event.actor, event.at, event.detail) == ("manager", START + 5, "Straße ☃")


async def test_nobody_and_no_deactivated_partner_is_issued_a_token(store, key, backend):
    assert await store.issue_token(a_token(KID, "nobody"), by="test") == Refused(PartnerNotFound)
    await set_status(store, PartnerStatus.DEACTIVATED)
    before = backend.count("change"), backend.count("audit")
    assert await store.issue_token(a_token(KID), by="test") == Refused(PartnerDeactivated)
    assert (backend.count("access_token"), backend.count("change"), backend.count("audit")) == (0, *before)


async def test_a_suspended_partner_is_issued_a_token_that_works_when_it_is_resumed(store, key):
    await set_status(store, PartnerStatus.SUSPENDED)
    token = a_token(KID)
    assert isinstance(await store.issue_token(token, by="test"), Done)
    assert await verdict(store, token) is PartnerSuspended
    await set_status(store, PartnerStatus.ACTIVE)
    assert await verdict(store, token) is None


@pytest.mark.parametrize("offset", AROUND)
async def test_no_token_is_issued_that_a_withdrawn_key_has_signed(store, key, offset):
    await store.rotate_signing_keys(a_signing_key(purpose=KeyPurpose.ACCESS), lead=0, life=None, now=START, by="test")
    await store.retire_signing_key(KID, now=START + HOUR, by="test")
    token = a_token(KID, created_at=START + HOUR + offset)
    outcome = await store.issue_token(token, by="test")
    if offset < 0:
        assert isinstance(outcome, Done)
    else:
        assert outcome == Refused(SigningKeyNotFound)
        assert await store.get_token(token.id) is None


async def test_no_token_is_issued_that_an_unknown_key_has_signed(store, key):
    assert await store.issue_token(a_token("3-nobody"), by="test") == Refused(SigningKeyNotFound)


# --- find_token, get_token, list_tokens, list_token_versions ---


async def test_a_standing_tells_all_that_decides(store, token):
    assert await store.find_token(token.id) == Standing(
        holder=Holder("acme-motors", None, "starter", token.id),
        digest=token.digest,
        ends_at=None,
        end_cause=None,
        partner_status=PartnerStatus.ACTIVE,
        session_epoch=0,
        company_gone=False,
        rotated_at=None,
    )
    await store.roll_token(token.id, next_version(token), ends_at=START + DAY, now=START + 5, by="test")
    standing = await store.find_token(token.id)
    assert (standing.rotated_at, standing.ends_at, standing.end_cause) == (START + 5, START + DAY, EndCause.ROTATED)


@pytest.mark.parametrize("status", PartnerStatus)
async def test_a_standing_follows_the_partners_status_at_once(store, token, status):
    await set_status(store, status)
    assert (await store.find_token(token.id)).partner_status is status


async def test_many_tokens_are_found_at_once_each_by_its_own_id(store, other_node, token):
    tokens = [token, *(a_token(KID) for _ in range(20))]
    for each in tokens[1:]:
        await store.issue_token(each, by="test")
    asked = [each.id for each in tokens] * 2 + ["nobody", token.id[:-1], token.id.swapcase()]
    found = await asyncio.gather(*(other_node.find_token(id_) for id_ in asked))
    assert [standing.digest for standing in found[:-3]] == [each.digest for each in tokens] * 2
    assert found[-3:] == [None, None, None]


async def test_a_token_that_is_not_there_is_not_found(store, token):
    assert await store.get_token(a_token(KID).id) is None
    assert await store.get_token(token.id.swapcase()) is None


async def test_tokens_are_listed_newest_first_by_partner_and_by_lineage(store, token):
    second = next_version(token, created_at=START + 1)
    await store.roll_token(token.id, second, ends_at=START + DAY, now=START + 1, by="test")
    other = a_token(KID, created_at=START + 2)
    await store.issue_token(other, by="test")
    third = next_version(second, created_at=START + 3)
    await store.roll_token(second.id, third, ends_at=START + DAY, now=START + 3, by="test")
    await store.add_partner(a_partner("zeta"), a_key("zeta"), by="test")
    stranger = a_token(KID, "zeta", created_at=START + 9)
    await store.issue_token(stranger, by="test")

    assert [each.id for each in await store.list_tokens("acme-motors")] == [third.id, other.id, second.id, token.id]
    assert await store.list_tokens("zeta") == [stranger]
    assert await store.list_tokens("nobody") == []
    versions = await store.list_token_versions(token.lineage_id)
    assert [(each.id, each.version) for each in versions] == [(third.id, 3), (second.id, 2), (token.id, 1)]
    assert await store.list_token_versions(other.lineage_id) == [other]
    assert await store.list_token_versions(second.id) == []


# --- roll_token ---


async def test_r40_a_rotated_token_ends_and_the_next_version_stands(store, token, trail):
    replacement = next_version(token, created_at=START + 5)
    done = await store.roll_token(token.id, replacement, ends_at=START + DAY, now=START + 5, by="manager")
    assert isinstance(done, Done)
    assert await store.get_token(token.id) == changed(
        token, rotated_at=START + 5, ends_at=START + DAY, end_cause=EndCause.ROTATED
    )
    assert await store.get_token(replacement.id) == replacement
    assert await trail(token.id) == (["token", "token"], ["token.issued", "token.rotated"])
    assert (await store.list_changes(after=done.sequence - 1, limit=10))[0].subject == token.id
    event = (await store.list_audit(partner_id="acme-motors", since=START + 5))[-1]
    assert (event.actor, event.detail) == ("manager", replacement.id)


@pytest.mark.parametrize("offset", AROUND)
async def test_r40_both_versions_work_during_the_overlap_and_then_only_the_new_one(store, token, offset):
    replacement = next_version(token)
    await store.roll_token(token.id, replacement, ends_at=START + HOUR, now=START, by="test")
    now = START + HOUR + offset
    assert await verdict(store, token, now) is (None if offset < 0 else CredentialRotated)
    assert await verdict(store, replacement, now) is None


async def test_r40_without_an_overlap_the_old_token_is_dead_at_once(store, token):
    await store.roll_token(token.id, next_version(token), ends_at=START, now=START, by="test")
    assert await verdict(store, token) is CredentialRotated


@pytest.mark.parametrize("offset", [-DAY, *AROUND])
async def test_a_token_that_was_rotated_is_not_rotated_again_even_in_its_overlap(store, token, offset):
    await store.roll_token(token.id, next_version(token), ends_at=START + DAY, now=START, by="test")
    replacement = next_version(token)
    refused = await store.roll_token(token.id, replacement, ends_at=START + 9, now=START + DAY + offset, by="test")
    assert refused == Refused(TokenEnded)
    assert await store.get_token(replacement.id) is None
    assert (await store.get_token(token.id)).ends_at == START + DAY


async def test_a_revoked_token_is_not_rotated_back_to_life(store, token):
    await store.revoke_token(token.id, now=START + HOUR, by="test")
    replacement = next_version(token)
    for now in (START, START + DAY):
        refused = await store.roll_token(token.id, replacement, ends_at=now + DAY, now=now, by="test")
        assert refused == Refused(TokenEnded)
    assert await store.get_token(replacement.id) is None


async def test_a_token_that_is_not_there_cannot_be_rotated(store, token, backend):
    before = backend.count("access_token"), backend.count("change")
    nobody = a_token(KID)
    refused = await store.roll_token(nobody.id, next_version(nobody), ends_at=START, now=START, by="test")
    assert refused == Refused(TokenNotFound)
    assert (backend.count("access_token"), backend.count("change")) == before


async def test_no_token_of_a_deactivated_partner_is_rotated_and_a_suspended_ones_is(store, token):
    await set_status(store, PartnerStatus.SUSPENDED)
    replacement = next_version(token)
    assert isinstance(await store.roll_token(token.id, replacement, ends_at=START, now=START, by="test"), Done)
    await set_status(store, PartnerStatus.DEACTIVATED)
    refused = await store.roll_token(replacement.id, next_version(replacement), ends_at=START, now=START, by="test")
    assert refused == Refused(PartnerDeactivated)


async def test_no_token_is_rotated_into_one_that_a_withdrawn_key_has_signed(store, token):
    replacement = next_version(token, kid="3-nobody")
    refused = await store.roll_token(token.id, replacement, ends_at=START, now=START, by="test")
    assert refused == Refused(SigningKeyNotFound)
    assert await store.get_token(token.id) == token


# --- revoke_token ---


async def test_a_revoked_token_is_dead_from_that_moment_on_and_for_good(store, token, trail):
    done = await store.revoke_token(token.id, now=START + 5, by="manager")
    assert isinstance(done, Done)
    assert await store.get_token(token.id) == changed(token, ends_at=START + 5, end_cause=EndCause.REVOKED)
    assert await trail(token.id) == (["token", "token"], ["token.issued", "token.revoked"])
    assert (await store.list_changes(after=done.sequence - 1, limit=10))[0].subject == token.id
    for now in (START - DAY, START + 4, START + 5, START + DAY):
        assert await verdict(store, token, now) is CredentialRevoked


async def test_revoking_a_token_twice_is_no_fault_and_changes_nothing(store, token):
    await store.revoke_token(token.id, now=START + 5, by="test")
    before = await store.get_token(token.id)
    again = await store.revoke_token(token.id, now=START + 6, by="test")
    assert isinstance(again, Done)
    assert again.sequence > 0
    assert await store.get_token(token.id) == before


@pytest.mark.parametrize("offset", AROUND)
async def test_a_rotated_token_can_be_revoked_whether_it_has_ended_or_not_and_no_clock_brings_it_back(store, token, offset):
    replacement = next_version(token)
    await store.roll_token(token.id, replacement, ends_at=START + DAY, now=START, by="test")
    now = START + DAY + offset
    await store.revoke_token(token.id, now=now, by="test")
    ended = await store.get_token(token.id)
    assert (ended.ends_at, ended.end_cause, ended.rotated_at) == (min(now, START + DAY), EndCause.REVOKED, START)
    for asked_at in (now + 1, START + HOUR, START - DAY):
        assert await verdict(store, token, asked_at) is CredentialRevoked
        assert await verdict(store, replacement, asked_at) is None


async def test_a_token_that_is_not_there_cannot_be_revoked(store, token, backend):
    before = backend.count("change")
    assert await store.revoke_token(a_token(KID).id, now=START, by="test") == Refused(TokenNotFound)
    assert backend.count("change") == before


# --- races ---


async def test_of_many_rotations_of_one_token_one_wins(store, other_node, token):
    replacements = [next_version(token) for _ in range(10)]
    outcomes = await asyncio.gather(
        *(
            (store, other_node)[at % 2].roll_token(token.id, replacement, ends_at=START + DAY, now=START, by="test")
            for at, replacement in enumerate(replacements)
        )
    )
    (winner,) = [at for at, outcome in enumerate(outcomes) if isinstance(outcome, Done)]
    assert outcomes.count(Refused(TokenEnded)) == 9
    versions = await store.list_token_versions(token.lineage_id)
    assert [(each.id, each.version) for each in versions] == [(replacements[winner].id, 2), (token.id, 1)]


async def test_of_a_rotation_and_a_revocation_at_once_the_token_is_dead_whoever_was_first(store, other_node, key):
    for at in range(20):
        old = a_token(KID)
        await store.issue_token(old, by="test")
        replacement = next_version(old)
        nodes = (store, other_node)[:: 1 if at % 2 else -1]
        rolled, revoked = await asyncio.gather(
            nodes[0].roll_token(old.id, replacement, ends_at=START + DAY, now=START, by="test"),
            nodes[1].revoke_token(old.id, now=START, by="test"),
        )
        assert isinstance(revoked, Done)
        assert await verdict(store, old) is CredentialRevoked
        # Whoever won, a manager is told what became of it: a replacement works exactly if it was handed out.
        stands = await store.get_token(replacement.id) is not None
        assert stands is isinstance(rolled, Done)
        assert stands or rolled == Refused(TokenEnded)


async def test_of_an_issue_and_a_deactivation_at_once_no_token_works_whoever_was_first(store, other_node):
    for at in range(20):
        name = f"partner-{at}"
        await store.add_partner(a_partner(name), a_key(name), by="test")
        token = a_token(KID, name)
        nodes = (store, other_node)[:: 1 if at % 2 else -1]
        issued, _ = await asyncio.gather(
            nodes[0].issue_token(token, by="test"), set_status(nodes[1], PartnerStatus.DEACTIVATED, name)
        )
        if isinstance(issued, Done):
            assert await verdict(store, token) is CredentialRevoked
        else:
            assert issued == Refused(PartnerDeactivated)
            assert await store.find_token(token.id) is None


async def test_of_an_issue_and_a_withdrawal_of_its_key_at_once_no_token_is_left_without_its_key(store, other_node, key, ring):
    kid = KID
    for at in range(20):
        now = START + at * HOUR
        candidate = a_signing_key(f"{at + 3}-candidate", published_at=now, purpose=KeyPurpose.ACCESS)
        await store.rotate_signing_keys(candidate, lead=0, life=None, now=now, by="test")
        token = a_token(kid, created_at=now)
        nodes = (store, other_node)[:: 1 if at % 2 else -1]
        issued, _ = await asyncio.gather(
            nodes[0].issue_token(token, by="test"), nodes[1].retire_signing_key(kid, now=now, by="test")
        )
        by_kid = {each.kid: each for each in await store.list_signing_keys()}
        assert (by_kid[kid].state(now) == "gone") is (issued == Refused(SigningKeyNotFound))
        kid = next(each.kid for each in by_kid.values() if each.state(now) == "current")
