"""The verbs of tiers."""

import asyncio

import pytest
from given import START, a_key, a_partner

from gatelodge_server.core.model import PartnerStatus, Tier
from gatelodge_server.core.ports import Done, Refused
from gatelodge_server.core.refusals import PartnerDeactivated, PartnerNotFound, TierNotFound

# --- set_tier, list_tiers ---


async def test_a_tier_is_added_and_told_to_everybody(store, trail):
    before = await store.list_tiers()
    done = await store.set_tier(Tier("huge", 2_000_000_000, 2_000_000_000), now=START, by="manager")
    assert await store.list_tiers() == [*before, Tier("huge", 2_000_000_000, 2_000_000_000)]
    assert await trail("huge") == (["tier"], ["tier.set"])
    (change,) = await store.list_changes(after=done.sequence - 1, limit=10)
    assert (change.kind, change.subject, change.at) == ("tier", "huge", START)
    (event,) = await store.list_audit(partner_id=None, since=None)
    assert (event.actor, event.at, event.partner_id) == ("manager", START, None)
    assert event.detail == "2000000000 an hour, 2000000000 a day"


async def test_what_a_tier_allows_can_be_changed(store, trail):
    await store.set_tier(Tier("starter", 7, 8), now=START, by="test")
    assert [tier for tier in await store.list_tiers() if tier.name == "starter"] == [Tier("starter", 7, 8)]
    assert await trail("starter") == (["tier"], ["tier.set"])


async def test_tiers_are_listed_with_the_smallest_first(store):
    for tier in (Tier("zz", 1, 2), Tier("b", 1, 1), Tier("a", 1, 1)):
        await store.set_tier(tier, now=START, by="test")
    assert [tier.name for tier in await store.list_tiers()][:4] == ["a", "b", "zz", "starter"]


async def test_a_tier_that_two_nodes_add_at_once_is_there_once(store, other_node, backend):
    before = backend.count("tier")
    tiers = [Tier("gold", at + 1, at + 1) for at in range(20)]
    done = await asyncio.gather(
        *((store, other_node)[at % 2].set_tier(tier, now=START, by="test") for at, tier in enumerate(tiers))
    )
    assert backend.count("tier") == before + 1
    last = max(range(20), key=lambda at: done[at].sequence)
    assert tiers[last] in await store.list_tiers()


# --- set_partner_tier ---


@pytest.fixture
async def gold(store):
    tier = Tier("gold", 5_000, 50_000)
    await store.set_tier(tier, now=START, by="test")
    return tier


async def test_a_partner_is_put_into_a_tier(store, key, gold, trail):
    done = await store.set_partner_tier("acme-motors", "gold", now=START + 1, by="manager")
    assert isinstance(done, Done)
    assert (await store.find_partner("acme-motors")).tier == "gold"
    assert (await store.find_key(key.id)).holder.tier == "gold"
    assert await trail("acme-motors") == (["partner", "partner"], ["partner.added", "partner.tier"])
    (change,) = await store.list_changes(after=done.sequence - 1, limit=10)
    assert (change.sequence, change.at) == (done.sequence, START + 1)
    event = (await store.list_audit(partner_id="acme-motors", since=None))[-1]
    assert (event.action, event.actor, event.detail) == ("partner.tier", "manager", "gold")


async def test_other_partners_and_sessions_stay_as_they_are(store, key, gold):
    await store.add_partner(a_partner("miller"), a_key("miller"), by="test")
    await store.set_partner_tier("acme-motors", "gold", now=START, by="test")
    assert (await store.find_partner("miller")).tier == "starter"
    assert (await store.find_key(key.id)).session_epoch == 0


async def test_what_is_refused_changes_nothing(store, key, gold, backend):
    before = backend.count("audit"), backend.count("change")
    for partner, tier, reason in (
        ("acme", "gold", PartnerNotFound),
        ("acme-motors", "silver", TierNotFound),
        ("acme-motors", "GOLD", TierNotFound),
    ):
        assert await store.set_partner_tier(partner, tier, now=START, by="test") == Refused(reason)
    assert (await store.find_partner("acme-motors")).tier == "starter"
    assert (backend.count("audit"), backend.count("change")) == before


async def test_a_suspended_partner_can_be_put_into_a_tier_and_a_deactivated_one_cannot(store, key, gold):
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    assert isinstance(await store.set_partner_tier("acme-motors", "gold", now=START, by="test"), Done)
    await store.set_partner_status("acme-motors", PartnerStatus.DEACTIVATED, now=START, by="test")
    assert await store.set_partner_tier("acme-motors", "starter", now=START, by="test") == Refused(PartnerDeactivated)
    assert (await store.find_partner("acme-motors")).tier == "gold"


async def test_of_a_deactivation_and_a_change_of_tier_at_once_both_are_done_or_the_change_is_refused(store, other_node, gold):
    for at in range(10):
        name = f"partner-{at}"
        await store.add_partner(a_partner(name), a_key(name), by="test")
        _, outcome = await asyncio.gather(
            store.set_partner_status(name, PartnerStatus.DEACTIVATED, now=START, by="test"),
            other_node.set_partner_tier(name, "gold", now=START, by="test"),
        )
        partner = await store.find_partner(name)
        assert partner.status is PartnerStatus.DEACTIVATED
        assert partner.tier == ("gold" if isinstance(outcome, Done) else "starter")
