"""Ten million credentials and as many sessions are as fast as a thousand.

Two databases on one PostgreSQL are filled by the server itself, in the shape of ``store/tables.py``: one with a thousand of
each, one with ten million. The product's parts stand over each in this process, without HTTP, and take turns: logins of known
keys, refreshes of sessions, and verdicts on keys and session JWTs at first sight (nothing is remembered). Each turn of the one
is compared with the turn of the other beside it, and the median counts.

What is not a matter of time: the server is asked how it would run each statement that it was sent, and none may read a large
table from end to end; housekeeping walks through all sessions in small steps, deletes what is over and only that, makes the
server write no temporary files and this process no larger, while refreshes go on; a node that has verified more keys than it
remembers is under 200 MB. In the control the sessions have lost their index.
"""

import asyncio
import functools
import gc
import hashlib
import itertools
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
import psutil
from sqlalchemy import Engine, event
from tests import processes

from experiments.ground import Experiment, Ground, Verdict, bounded, dice
from experiments.servers import Node, PostgresServer, postgres_server
from gatelodge.tokens import TokenRules
from gatelodge.verify import Verifier
from gatelodge.wire import ApiKey
from gatelodge_server.app import Lodge, assemble
from gatelodge_server.core.model import DAY, SECOND
from gatelodge_server.core.records import StoreRecords
from gatelodge_server.core.refresh_tokens import RefreshTokens
from gatelodge_server.core.secrets import Secret
from gatelodge_server.deployment import load_master_keys, prepare, system_clock
from gatelodge_server.settings import load_settings
from gatelodge_server.vault import Vault, system_entropy

_SMALL: Final = 1_000
_QUICK: Final = 200_000
_CONTROL: Final = 20_000
"""Enough: without an index each refresh reads all of them."""
_TARGET: Final = 0.9
_AT_ONCE: Final = 64
_KEYS_A_PARTNER: Final = 100
_OVER: Final = 10
"""One in so many sessions was ended long ago."""
_SLICE: Final = 500
_MEMORY: Final = 200e6
_GROWTH: Final = 20e6
"""Bytes by which this process may grow while housekeeping walks through everything."""
_REMEMBERED: Final = 8192
"""How many credentials a node remembers."""
_PLANS: Final = "/api/v2/Partners/PlansSearchAsync/VIN"
_VEHICLE: Final = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}
_SETTINGS: Final = {
    # A quarter of the memory, as PostgreSQL's manual has it ("Resource Consumption").
    "shared_buffers": f"{psutil.virtual_memory().total // 4 // 2**20}MB",
    "max_wal_size": "8GB",
    "maintenance_work_mem": "512MB",
    # A table that is filled in the transaction that emptied it is then written once, and not to the log as well.
    "wal_level": "minimal",
    "max_wal_senders": "0",
}
_PARTNERS: Final = """
INSERT INTO partner (id, name, contact_email, tier, status, origin, created_at)
SELECT 'partner-' || g, 'Partner ' || g, 'dev@partner-' || g || '.example', 'starter', 'active', 'managed', $2
FROM generate_series(0, ($1::bigint - 1) / $3) g
"""
_CREDENTIALS: Final = """
INSERT INTO credential (id, kind, partner_id, digest, masked, created_at, first_used_at)
SELECT lpad(g::text, 12, '0'), 'pk', 'partner-' || g / $3, sha256(g::text::bytea), 'gatelodge_uat_pk_' || g || '_…', $2, $2
FROM generate_series(0, $1::bigint - 1) g
"""
_SESSIONS: Final = """
INSERT INTO session
    (id, credential_id, epoch, generation, started_at, rotated_at, expires_at, retires_at, ended_at, end_cause)
SELECT
    decode(
        lpad(to_hex($2 - $1 + g), 12, '0') || '7' || substr(md5(g::text), 1, 3) || '8' || substr(md5(g::text), 4, 15), 'hex'
    ),
    lpad((g * 7919 % $1)::text, 12, '0'), 0, 0, $2, $2, $2 + $3, $2 + $3,
    CASE WHEN g % $4 = 0 THEN $2 - $3 END, CASE WHEN g % $4 = 0 THEN 'logout' END
FROM generate_series(0, $1::bigint - 1) g
"""


def _key(number: int) -> ApiKey:
    return ApiKey("gatelodge", "uat", "pk", f"{number:012}", f"{number:030}")


def _session_id(number: int, *, count: int, now: int) -> bytes:
    """As the statement above makes it."""
    random = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
    return bytes.fromhex(f"{now - count + number:012x}7{random[:3]}8{random[3:18]}")


@dataclass(slots=True)
class _World:
    """The product over a database of a size, and what is presented to it."""

    count: int
    lodge: Lodge
    verifier: Verifier
    keys: "itertools.cycle[str]"
    tokens: "deque[Secret]"
    """Refresh tokens that are good."""
    jwts: list[str] = field(default_factory=list)

    async def log_in(self) -> None:
        """Log in with one of the known keys."""
        await self.lodge.sessions.log_in(Secret(next(self.keys)))

    async def refresh(self) -> None:
        """Refresh a session; the new token has its turn when all others have had theirs."""
        issued = await self.lodge.sessions.refresh(self.tokens.popleft(), idempotency_key=None)
        self.tokens.append(issued.refresh_token)
        self.jwts.append(issued.jwt.reveal())

    async def verify_key(self) -> None:
        """Verify a key."""
        await self.verifier.verify_async(next(self.keys))

    async def verify_session(self) -> None:
        """Verify a session JWT."""
        await self.verifier.verify_async(self.jwts.pop())


_WORKS: Final[Sequence[tuple[str, Callable[[_World], Awaitable[None]]]]] = (
    ("login", _World.log_in),
    ("refresh", _World.refresh),
    ("key", _World.verify_key),
    ("session", _World.verify_session),
)


async def _fill(server: PostgresServer, database: str, count: int, now: int, sample: Sequence[int]) -> None:
    """Make the rows; the digests of a sample of keys are those of the keys."""
    connection = await asyncpg.connect(server.url(database, role="administrator"))
    try:
        await connection.execute("SET session_replication_role = replica")  # whom a row refers to is there: we know
        async with connection.transaction():
            await connection.execute("TRUNCATE partner, credential, session CASCADE")
            await connection.execute(_PARTNERS, count, now, _KEYS_A_PARTNER)
            await connection.execute(_CREDENTIALS, count, now, _KEYS_A_PARTNER)
            await connection.execute(_SESSIONS, count, now, 10 * DAY, _OVER)
        await connection.execute("CREATE TEMP TABLE known (id text, digest bytea)")
        rows = [(key.id, hashlib.sha256(key.text.encode()).digest()) for key in map(_key, sample)]
        await connection.copy_records_to_table("known", records=rows)
        await connection.execute("UPDATE credential SET digest = known.digest FROM known WHERE known.id = credential.id")
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


@asynccontextmanager
async def _world(ground: Ground, name: str, server: PostgresServer, count: int) -> AsyncIterator[_World]:
    """Make a database of a size and put the product over it."""
    settings = load_settings({"data": str(ground.root / name), "database": server.create(name)}, {})
    prepare(settings, {})
    now, chance = system_clock(), dice()
    sample = chance.sample(range(count), min(count, 20_000))
    begun = time.monotonic()
    await _fill(server, name, count, now, sample)
    print(f"    {count} credentials and sessions were made in {time.monotonic() - begun:.0f} s", flush=True)
    vault = Vault(load_master_keys(settings, {}), system_entropy)
    lodge = assemble(settings, vault)
    writer = RefreshTokens(brand="gatelodge", environment="uat", make_mac=vault.make_mac, check_mac=vault.check_mac)
    alive = [number for number in chance.sample(range(count), min(count, 100_000)) if number % _OVER]
    rules = TokenRules.for_sessions(issuer=settings.public_url, audience=settings.audience)
    records = StoreRecords(store=lodge.store, credentials=lodge.credentials, follower=lodge.follower, clock=lodge.clock)
    await lodge.signing_keys.establish()
    beside = [asyncio.create_task(work()) for work in (lodge.store.listen, lodge.follower.run)]
    try:
        yield _World(
            count,
            lodge,
            Verifier(lodge.signing_keys, rules, records=records, remembered=0, clock=lambda: lodge.clock() / SECOND),
            itertools.cycle([_key(number).text for number in sample]),
            deque(writer.write(_session_id(number, count=count, now=now), 0) for number in alive),
        )
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await lodge.close()


async def _time(world: _World, work: Callable[[_World], Awaitable[None]], times: int) -> float:
    """How many a second, with so many under way."""

    async def some() -> None:
        for _ in range(times // _AT_ONCE):
            await work(world)

    begun = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(_AT_ONCE)))
    return times // _AT_ONCE * _AT_ONCE / (time.perf_counter() - begun)


async def _compare(small: _World, large: _World, rounds: int, times: int) -> tuple[str, list[str]]:
    """Let them take turns. What each came to, and where the large one is too slow."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in _WORKS}
    gc.freeze()  # what was made to be presented is not to be looked through again and again
    for number in range(rounds + 1):
        for name, work in _WORKS:
            pair = (small, large) if number % 2 else (large, small)
            found = {world.count: await _time(world, work, times) for world in pair}
            if number:  # the first round warms up
                rates[name].append((found[small.count], found[large.count]))
        for world in (small, large):
            world.jwts.clear()
    counts, faults = [], []
    for name, pairs in rates.items():
        ratio = statistics.median(after / before for before, after in pairs)
        counts.append(f"{name} {statistics.median(after for _, after in pairs):,.0f}/s = {ratio:.2f}")
        if ratio < _TARGET:
            faults.append(f"speed: {name} has {ratio:.2f} of its speed at {small.count}")
    return ", ".join(counts), faults


@contextmanager
def _listening() -> Iterator[dict[str, Any]]:
    """Every statement that is sent in this process meanwhile, with the values of one time."""
    heard: dict[str, Any] = {}

    def hear(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        heard.setdefault(statement, parameters[0] if isinstance(parameters, list) else parameters)

    event.listen(Engine, "before_cursor_execute", hear)
    try:
        yield heard
    finally:
        event.remove(Engine, "before_cursor_execute", hear)


async def _explain(server: PostgresServer, database: str, heard: dict[str, Any]) -> tuple[int, list[str]]:
    """How the server runs these statements: how many there are, and which of them read a large table from end to end."""
    connection = await asyncpg.connect(server.url(database, role="administrator"))
    faults, explained = [], 0
    try:
        await connection.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog")
        for statement, parameters in heard.items():
            if not statement.lstrip().startswith(("SELECT", "INSERT", "UPDATE", "DELETE")):
                continue
            explained += 1
            lines = await connection.fetch(f"EXPLAIN {statement}", *parameters)
            scans = [line[0].strip() for line in lines if "Seq Scan on" in line[0]]
            large = [scan for scan in scans if any(f" on {table} " in scan + " " for table in ("credential", "session"))]
            faults += [f"plan: {scan} in {' '.join(statement.split())[:120]}" for scan in large]
    finally:
        await connection.close()
    return explained, faults


async def _count_scans(server: PostgresServer, database: str) -> dict[str, int]:
    """How often each large table was read from end to end; under ``temporary``, the bytes of temporary files."""
    connection = await asyncpg.connect(server.url(database, role="administrator"))
    try:
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        rows = await connection.fetch(
            "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ('credential', 'session')"
        )
        temporary = await connection.fetchval("SELECT temp_bytes FROM pg_stat_database WHERE datname = current_database()")
    finally:
        await connection.close()
    return {**{str(name): int(count) for name, count in rows}, "temporary": int(temporary)}


async def _keep_house(world: _World) -> tuple[str, list[str]]:
    """Walk through all sessions as housekeeping does, without its pauses, while refreshes go on."""
    before, deleted, slices, after = psutil.Process().memory_info().rss, 0, 0, None
    over = asyncio.Event()

    async def go_on() -> int:
        refreshed = 0
        while not over.is_set():
            await world.refresh()
            world.jwts.clear()
            refreshed += 1
        return refreshed

    refreshing = asyncio.create_task(go_on())
    now = world.lodge.clock()
    while True:
        purged = await world.lodge.store.purge_sessions(after=after, limit=_SLICE, ended_before=now - DAY)
        deleted, slices, after = deleted + purged.deleted, slices + 1, purged.after
        if after is None:
            break
    over.set()
    refreshed = await refreshing
    grown = psutil.Process().memory_info().rss - before
    faults = []
    if deleted != (due := (world.count + _OVER - 1) // _OVER):
        faults.append(f"housekeeping: {deleted} sessions were deleted, where {due} are over")
    if grown > _GROWTH:
        faults.append(f"housekeeping: this process has grown by {grown / 1e6:.0f} MB")
    if not refreshed:
        faults.append("housekeeping: nobody could refresh meanwhile")
    return f"{deleted} purged in {slices} steps beside {refreshed} refreshes", faults


async def _weigh(world: _World, database: str, verified: int) -> tuple[str, list[str]]:
    """What a node takes that has verified so many keys over HTTP, and has kept house."""
    node = Node(world.lodge.settings.data, "--sample-api", environ={"GATELODGE_DATABASE": database})
    await asyncio.to_thread(node.start)
    try:
        async with node.async_client() as client:

            async def some(times: int) -> None:
                for _ in range(times):
                    headers = {"Authorization": f"Bearer {next(world.keys)}"}
                    answer = await client.post(_PLANS, headers=headers, json=_VEHICLE)
                    assert answer.status_code == 200, answer.text

            await asyncio.gather(*(some(verified // 16) for _ in range(16)))
        memory = sum(process.memory_info().rss for process in processes.family(node.pid))
    finally:
        await asyncio.to_thread(node.kill)
    faults = [f"memory: a node takes {memory / 1e6:.0f} MB"] if memory > _MEMORY else []
    return f"a node takes {memory / 1e6:.0f} MB", faults


async def _scale(ground: Ground, name: str, count: int, *, rounds: int, spoil: Sequence[str] = ()) -> Verdict:
    times = _AT_ONCE * 16
    with ExitStack() as stack:
        server = await asyncio.to_thread(stack.enter_context, postgres_server(settings=_SETTINGS))
        small_name, large_name = f"{name}_small", f"{name}_large"
        async with (
            _world(ground, small_name, server, _SMALL) as small,
            _world(ground, large_name, server, count) as large,
        ):
            if spoil:
                await asyncio.to_thread(functools.partial(server.run_sql, *spoil, database=large_name))
                said, faults = await _compare(small, large, rounds, times)
                return Verdict(said, faults)
            before = await _count_scans(server, large_name)
            with _listening() as heard:
                for _, work in _WORKS:
                    await _time(large, work, _AT_ONCE)
                await large.lodge.store.purge_sessions(after=None, limit=1, ended_before=0)
            explained, faults = await _explain(server, large_name, heard)
            compared, slow = await _compare(small, large, rounds, times)
            kept, untidy = await _keep_house(large)
            after = await _count_scans(server, large_name)
            faults += slow + untidy
            faults += [
                f"scan: {table} was read from end to end {after[table] - before[table]} times"
                for table in after
                if table != "temporary" and after[table] > before[table]
            ]
            if after["temporary"] > before["temporary"]:
                faults.append(f"scan: {after['temporary'] - before['temporary']} bytes of temporary files were written")
            weighed, heavy = await _weigh(large, server.url(large_name), ground.scale(_REMEMBERED + 1000, 800))
    return Verdict(f"{count}: {compared}; {explained} statements explained; {kept}; {weighed}", faults + heavy)


def run(ground: Ground) -> Verdict:
    """Compare a thousand with ten million."""
    count, rounds = ground.scale(10_000_000, _QUICK), ground.scale(20, 12)
    return bounded(_scale(ground, "scale", count, rounds=rounds), seconds=ground.scale(3600, 600))


def control(ground: Ground) -> Verdict:
    """Compare with a database whose sessions have no index."""
    spoil = ("ALTER TABLE session DROP CONSTRAINT pk_session",)
    return bounded(_scale(ground, "scale_control", _CONTROL, rounds=3, spoil=spoil), seconds=600)


EXPERIMENT = Experiment(
    name="scale",
    promise="ten million credentials and sessions are as fast as a thousand, in a node under 200 MB",
    run=run,
    control=control,
    control_says="sessions that have lost their index",
    finds="speed: ",
)
