"""What `gatelodge doctor` tries on a PostgreSQL server: what nodes rely on, done once as they do it. Nothing is changed."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import asyncpg

from gatelodge_server.store.address import PostgresAddress
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.leading import PROOF, PROOF_PATIENCE
from gatelodge_server.store.postgres import FAULTS, ServerConnection, connect, say

_HEARD_WITHIN: Final = 1.0
_CHANNEL: Final = "gatelodge_probe"
_STANDBYS: Final = "SELECT current_setting('synchronous_standby_names')"
_GRANT: Final = """
SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I', oid::regprocedure, current_user) FROM pg_proc
WHERE proname = 'pg_logical_emit_message' AND proargtypes[2] = 'text'::regtype
"""
"""The function has one more parameter since PostgreSQL 17."""


def prove(address: PostgresAddress) -> float:
    """Seconds until the server proves that it leads (``store/leading.py``). Raises ``DatabaseFault`` if it does not in time."""
    return asyncio.run(_prove(address))


def hear(address: PostgresAddress) -> float:
    """Seconds until one connection hears what another says. Raises ``DatabaseFault`` if that is not within one."""
    return asyncio.run(_hear(address))


async def _prove(address: PostgresAddress) -> float:
    async with _connected(address) as connection:
        standbys = await connection.fetchval(_STANDBYS)
        begun = time.monotonic()
        try:
            is_proved = await _commits(connection, PROOF, within=PROOF_PATIENCE)
        except asyncpg.InsufficientPrivilegeError as fault:
            remedy = await connection.fetchval(_GRANT)
            raise DatabaseFault(
                f"the database's user may not prove by a commit that the server leads ({say(fault)}), and without that nodes "
                f"refuse everything: run `{remedy}` in the database"
            ) from fault
        if is_proved:
            return time.monotonic() - begun
    without = f"and without that nodes refuse everything (tried for {PROOF_PATIENCE:.0f} s)"
    if standbys:
        raise DatabaseFault(
            f"no standby confirms a commit, {without}: is one of synchronous_standby_names ({standbys}) running and in step, "
            "or does another server lead by now?"
        )
    raise DatabaseFault(f"a commit is not done, {without}: does the server's disk keep up?")


async def _hear(address: PostgresAddress) -> float:
    async with _connected(address) as listener, _connected(address) as speaker:
        heard, said = asyncio.Event(), f"doctor {os.getpid()}"
        await listener.add_listener(_CHANNEL, lambda *given: heard.set() if given[-1] == said else None)
        begun = time.monotonic()
        if await _commits(speaker, "SELECT pg_notify($1, $2)", _CHANNEL, said, within=_HEARD_WITHIN):
            try:
                async with asyncio.timeout(_HEARD_WITHIN):
                    await heard.wait()
            except TimeoutError:
                pass
            else:
                return time.monotonic() - begun
    raise DatabaseFault("what one connection says by NOTIFY, another does not hear within a second")


@asynccontextmanager
async def _connected(address: PostgresAddress) -> AsyncIterator[ServerConnection]:
    try:
        connection = await connect(address)
        try:
            yield connection
        finally:
            connection.terminate()
    except FAULTS as fault:
        raise DatabaseFault(say(fault)) from fault


async def _commits(connection: ServerConnection, statement: str, *args: object, within: float) -> bool:
    """Whether a statement is done and committed in time. If not, hang up: it is not cancelled, as in ``postgres.commit``."""
    asking = asyncio.create_task(connection.execute(statement, *args))
    await asyncio.wait((asking,), timeout=within)
    if not asking.done():
        connection.terminate()
        await asyncio.gather(asking, return_exceptions=True)
        return False
    asking.result()
    return True
