"""The commands for tiers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gatelodge_server.commands import BY, GROUPS, PartnerId, Record, command, slug
from gatelodge_server.core.model import Tier
from gatelodge_server.core.tiers import LARGEST_LIMIT

if TYPE_CHECKING:
    from gatelodge_server.app import Lodge

TierName = Annotated[str, typer.Argument(metavar="TIER", help="the tier's name", parser=slug)]


def _tier_record(tier: Tier) -> Record:
    return {"tier": tier.name, "requestsPerHour": tier.requests_per_hour, "requestsPerDay": tier.requests_per_day}


@command(GROUPS["tier"], "list")
async def tier_list(lodge: "Lodge") -> Sequence[Record]:
    """All tiers, the smallest first."""
    return [_tier_record(tier) for tier in await lodge.tiers.list_all()]


@command(GROUPS["tier"], "set")
async def tier_set(
    lodge: "Lodge",
    tier: TierName,
    per_hour: Annotated[int, typer.Option(help="requests in an hour by UTC", min=1, max=LARGEST_LIMIT)],
    per_day: Annotated[int, typer.Option(help="requests in a day by UTC", min=1, max=LARGEST_LIMIT)],
) -> Record:
    """Add a tier, or change what it allows: for all partners in it, at once."""
    if per_day < per_hour:
        raise typer.BadParameter("--per-day must not be less than --per-hour: the day would run out within an hour")
    sequence = await lodge.tiers.set_limits(tier, per_hour=per_hour, per_day=per_day, by=BY)
    return {**_tier_record(Tier(tier, per_hour, per_day)), "sequence": sequence}


@command(GROUPS["partner"], "tier")
async def partner_tier(lodge: "Lodge", partner: PartnerId, tier: TierName) -> Record:
    """Put a partner into a tier. What it has used already counts there too."""
    return {"partnerId": partner, "tier": tier, "sequence": await lodge.partners.set_tier(partner, tier, by=BY)}
