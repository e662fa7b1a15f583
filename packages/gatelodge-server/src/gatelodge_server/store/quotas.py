"""Quotas and usage. ``lease_quotas`` takes many asks and gives each its own lease, in order; ``batch.py`` collects them.

Many rows are locked at once here, by many nodes. Whoever locks several locks them in one order, by their keys, so that nodes
never wait for each other in a circle.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Table, and_, bindparam, delete, or_, select, update

from gatelodge_server.core.model import Instant, Tier
from gatelodge_server.core.ports import LastUse, Lease, QuotaAsk, UsageMark
from gatelodge_server.core.quotas import UNOPENED, Window, Windows, judge_ask
from gatelodge_server.store.clock import shared_now
from gatelodge_server.store.keys import forget_answers, note_first_use
from gatelodge_server.store.races import insert_or_add, insert_unless_there, unheld
from gatelodge_server.store.tables import access_token, credential, partner, quota, tier, usage

_ALLOWED = (
    select(partner.c.id, tier.c.name, tier.c.requests_per_hour, tier.c.requests_per_day, quota.c.partner_id)
    .select_from(partner.join(tier, tier.c.name == partner.c.tier).outerjoin(quota, quota.c.partner_id == partner.c.id))
    .where(partner.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(partner.c.id)
)
_WINDOWS: Final = (
    *("hour_starts_at", "hour_taken", "hour_left_at", "hour_left_taken"),
    *("day_starts_at", "day_taken", "day_left_at", "day_left_taken"),
)
"""The columns of ``Windows``, in their order."""
_LOCK = (
    select(quota.c.partner_id, *(quota.c[name] for name in _WINDOWS))
    .where(quota.c.partner_id.in_(bindparam("ids", expanding=True)))
    .order_by(quota.c.partner_id)
    .with_for_update()
)
_WRITE = (
    update(quota).where(quota.c.partner_id == bindparam("id")).values({name: bindparam(f"new_{name}") for name in _WINDOWS})
)
_LONGEST_ADDRESS: Final = 45

_ADD = insert_or_add(usage, usage.c.accepted, usage.c.refused)
_UNUSED = select(credential.c.id).where(
    credential.c.id.in_(bindparam("ids", expanding=True)), credential.c.first_used_at.is_(None)
)


def _move_last_use(table: Table) -> Any:  # noqa: ANN401 - SQLAlchemy's own name for it is generic in what nobody needs
    last = table.c.last_used_at
    return (
        update(table)
        .where(table.c.id == bindparam("used_id"), or_(last.is_(None), last < bindparam("at")))
        .values(last_used_at=bindparam("at"), last_used_from=bindparam("address"))
    )


_MOVE: Final = {"key": _move_last_use(credential), "token": _move_last_use(access_token)}


def lease_quotas(connection: Connection, asks: Sequence[QuotaAsk]) -> list[Lease | None]:
    """Lock the rows, see what time it is, judge the asks one after the other, write what has changed, add the usage.

    Two asks of one partner in one batch are judged in order, the second against what the first has made of the row.
    """
    ids = sorted({ask.partner_id for ask in asks})
    tiers: dict[str, Tier] = {}
    for partner_id, name, per_hour, per_day, has_row in connection.execute(_ALLOWED, {"ids": ids}).all():
        tiers[partner_id] = Tier(name, per_hour, per_day)
        if has_row is None:
            insert_unless_there(connection, quota, {"partner_id": partner_id, **_row_of(UNOPENED)})
    found = {row[0]: Windows(Window(*row[1:5]), Window(*row[5:])) for row in connection.execute(_LOCK, {"ids": ids})}
    now = shared_now(connection)
    leases: list[Lease | None] = []
    changed: dict[str, Windows] = {}
    for ask in asks:
        before = found.get(ask.partner_id)
        if before is None:
            leases.append(None)
            continue
        after, lease = judge_ask(before, ask, tiers[ask.partner_id], ask.now if now is None else now)
        if after != before:
            changed[ask.partner_id] = found[ask.partner_id] = after
        leases.append(lease)
    if changed:
        rows = [{"id": partner_id, **_row_of(windows, "new_")} for partner_id, windows in sorted(changed.items())]
        connection.execute(_WRITE, rows)
    _add(connection, [mark for ask, lease in zip(asks, leases, strict=True) if lease is not None for mark in ask.usage])
    return leases


def _row_of(windows: Windows, prefix: str = "") -> dict[str, object]:
    return {prefix + name: value for name, value in zip(_WINDOWS, (*windows.hour, *windows.day), strict=True)}


def _add(connection: Connection, marks: Sequence[UsageMark]) -> None:
    if marks:
        connection.execute(_ADD, [mark._asdict() for mark in sorted(marks)])


def note_usage(connection: Connection, marks: Sequence[UsageMark], last_uses: Sequence[LastUse]) -> None:
    """Add to the usage, and move the marks of last use on. The order of the locks is that of ``keys.py``."""
    keys = {use.credential_id: use.at for use in last_uses if use.kind == "key"}
    unused = connection.execute(_UNUSED, {"ids": list(keys)}).scalars().all() if keys else ()
    if unused:
        forget_answers(connection, unused)
    _add(connection, marks)
    for kind, statement in _MOVE.items():
        uses = [
            {"used_id": use.credential_id, "at": use.at, "address": use.address[:_LONGEST_ADDRESS]}
            for use in sorted(last_uses)
            if use.kind == kind
        ]
        if uses:
            connection.execute(statement, uses)
    if unused:
        note_first_use(connection, unused, max(keys[key_id] for key_id in unused))


def list_usage(connection: Connection, partner_id: str, since: Instant) -> Sequence[UsageMark]:
    """A partner's usage by the hour, oldest first."""
    query = (
        select(usage.c.partner_id, usage.c.hour_starts_at, usage.c.accepted, usage.c.refused)
        .where(and_(usage.c.partner_id == partner_id, usage.c.hour_starts_at >= since))
        .order_by(usage.c.hour_starts_at)
    )
    return [UsageMark(*row) for row in connection.execute(query)]


def forget_usage(connection: Connection, before: Instant) -> None:
    """Drop the usage of hours that began before a moment. By partner, so that the primary key finds them."""
    everybody = select(partner.c.id)
    over = unheld(usage, usage.c.partner_id.in_(everybody), usage.c.hour_starts_at < before)
    connection.execute(delete(usage).where(over))
