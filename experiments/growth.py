"""Storage does not grow with refreshes: a million of them leave as many session rows as before.

The product's parts are put together in this process, without HTTP, and 256 sessions are refreshed in turn, with every commit
synced. Afterwards there are as many rows as before, and the file is no larger than it was once it had warmed up, but for a
bound. Then many sessions are opened and ended, and housekeeping with a clock two days on leaves none of them. The control opens
another session at every refresh.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

from experiments.ground import Experiment, Ground, Verdict, bounded
from experiments.variants import STORES
from gatelodge_server.app import Lodge, assemble, open_store
from gatelodge_server.core.housekeeping import Housekeeping
from gatelodge_server.core.model import DAY
from gatelodge_server.core.partners import NewPartner
from gatelodge_server.core.secrets import Secret
from gatelodge_server.deployment import load_master_keys, prepare, system_clock
from gatelodge_server.settings import Settings, load_settings
from gatelodge_server.store.address import SqliteAddress
from gatelodge_server.store.store import SqlStore
from gatelodge_server.vault import Vault, system_entropy

_SESSIONS = 256
_FILE_BOUND = 1 << 20
"""Bytes by which the database may grow after its warm-up."""
_LOG_BOUND = 64 << 20
"""Bytes that the write-ahead log may take: it is written back every 8 000 pages of 4 KiB."""


async def _grow(ground: Ground, name: str, store_of: Callable[[Settings], SqlStore], refreshes: int, logins: int) -> Verdict:
    settings = load_settings({"data": str(ground.root / name)}, {})
    prepare(settings, {})
    lodge = assemble(settings, Vault(load_master_keys(settings, {}), system_entropy), store_of=store_of)
    try:
        await lodge.signing_keys.establish()
        _, issued = await lodge.partners.add(NewPartner("Acme Motors", "dev@acme.example"), by="experiment")
        faults = await _refresh(lodge, issued.text, refreshes)
        faults += await _purge(lodge, issued.text, logins)
    finally:
        await lodge.close()
    return Verdict(f"{refreshes} refreshes of {_SESSIONS} sessions, {logins} sessions opened and ended", faults)


async def _refresh(lodge: Lodge, key: Secret, refreshes: int) -> list[str]:
    tokens = [(await lodge.sessions.log_in(key)).refresh_token for _ in range(_SESSIONS)]

    async def go_on(index: int, times: int) -> None:
        for _ in range(times):
            tokens[index] = (await lodge.sessions.refresh(tokens[index], idempotency_key=None)).refresh_token

    async def all_(times: int) -> None:
        await asyncio.gather(*(go_on(index, times) for index in range(_SESSIONS)))

    await all_(8)
    file = _file(lodge)
    rows, size = _rows(lodge), file.stat().st_size
    await all_(refreshes // _SESSIONS)
    faults = []
    if _rows(lodge) != rows:
        faults.append(f"rows: {_rows(lodge)} sessions where there were {rows}")
    if file.stat().st_size > size + _FILE_BOUND:
        faults.append(f"size: the database has grown from {size} to {file.stat().st_size} bytes")
    log = file.with_name(file.name + "-wal").stat().st_size
    if log > _LOG_BOUND:
        faults.append(f"size: the write-ahead log has {log} bytes")
    return faults


async def _purge(lodge: Lodge, key: Secret, logins: int) -> list[str]:
    before = _rows(lodge)

    async def come_and_go(times: int) -> None:
        for _ in range(times):
            await lodge.sessions.log_out((await lodge.sessions.log_in(key)).refresh_token)

    await asyncio.gather(*(come_and_go(logins // _SESSIONS) for _ in range(_SESSIONS)))
    kept = _rows(lodge)
    purged: list[int] = []
    later = Housekeeping(store=lodge.store, clock=lambda: system_clock() + 2 * DAY, on_purged=purged.append, on_mistake=print)
    deleted = await later.go_round()
    if kept - deleted != before or _rows(lodge) != before:
        return [f"rows: {_rows(lodge)} sessions after housekeeping, where {before} are alive and {kept} were there"]
    return []


def _file(lodge: Lodge) -> Path:
    assert isinstance(lodge.settings.database, SqliteAddress)
    return lodge.settings.database.path


def _rows(lodge: Lodge) -> int:
    connection = sqlite3.connect(_file(lodge))
    try:
        return int(connection.execute("SELECT count(*) FROM session").fetchone()[0])
    finally:
        connection.close()


def run(ground: Ground) -> Verdict:
    """Refresh on the product's store."""
    refreshes, logins = ground.scale(1_000_000, 20_000), ground.scale(100_000, 2_560)
    return bounded(_grow(ground, "growth", open_store, refreshes, logins), seconds=ground.scale(1200, 120))


def control(ground: Ground) -> Verdict:
    """Refresh on a store that opens another session every time."""
    return bounded(_grow(ground, "growth-control", STORES["hoarding"], 2_560, 0), seconds=60)


EXPERIMENT = Experiment(
    name="growth",
    promise="a million refreshes leave as many session rows as before, and what has ended is purged",
    run=run,
    control=control,
    control_says="a store with another row for every refresh",
    finds="rows: ",
)
