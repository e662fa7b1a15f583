"""A process whose disk is full for a while: no file of it may grow beyond a limit. Prints what was acknowledged."""

import asyncio
import json
import resource
import sys
from pathlib import Path

from backends import backend_at
from given import a_key, a_login, a_partner

from gatelodge.errors import Unavailable
from gatelodge_server.core.ports import Opened


def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def log_in(store, key, times):
    attempts = [a_login(key) for _ in range(times)]
    outcomes = await asyncio.gather(*(store.open_session(attempt) for attempt in attempts), return_exceptions=True)
    assert all(isinstance(outcome, Opened | Unavailable) for outcome in outcomes)
    opened = [outcome.session.id for outcome in outcomes if isinstance(outcome, Opened)]
    return opened, times - len(opened)


async def fill(address):
    backend = backend_at(address)
    store = backend.open()
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    acknowledged, _ = await log_in(store, key, 10)
    allow(Path(f"{backend.path}-wal").stat().st_size + 60_000)
    tried = unavailable = 0
    while not unavailable:
        opened, refused = await log_in(store, key, 40)
        tried += 40
        unavailable += refused
        acknowledged += opened
    opened_while_full = tried - unavailable
    again, refused = await log_in(store, key, 400)
    acknowledged += again
    tried, unavailable, opened_while_full = tried + 400, unavailable + refused, opened_while_full + len(again)
    allow(resource.RLIM_INFINITY)
    afterwards, _ = await log_in(store, key, 10)
    acknowledged += afterwards
    missing = [id_.hex() for id_ in acknowledged if await store.find_session(id_) is None]
    await store.close()
    told = {
        "tried_while_full": tried,
        "opened_while_full": opened_while_full,
        "unavailable": unavailable,
        "opened_afterwards": len(afterwards),
        "acknowledged": len(acknowledged),
        "missing": missing,
        "faults": backend.faults,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(fill(sys.argv[1]))
