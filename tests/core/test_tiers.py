"""Tiers: what may be set, and that it is."""

import pytest
from backends import SqliteBackend
from given import AROUND, Clock

from gatelodge_server.core.model import Tier
from gatelodge_server.core.tiers import LARGEST_LIMIT, Tiers


@pytest.fixture
async def tiers(tmp_path):
    store = SqliteBackend.create(tmp_path).open()
    yield Tiers(store=store, clock=Clock())
    await store.close()


@pytest.mark.parametrize("edge", [1, LARGEST_LIMIT])
@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize("which", ["per_hour", "per_day"])
async def test_a_limit_is_at_least_one_and_can_be_counted(tiers, edge, offset, which):
    limits = {"per_hour": 10, "per_day": 10, which: edge + offset}
    before = await tiers.list_all()
    if 1 <= edge + offset <= LARGEST_LIMIT:
        assert await tiers.set_limits("edge", **limits, by="test") > 0
        assert Tier("edge", limits["per_hour"], limits["per_day"]) in await tiers.list_all()
    else:
        with pytest.raises(ValueError, match="a limit is"):
            await tiers.set_limits("edge", **limits, by="test")
        assert await tiers.list_all() == before
