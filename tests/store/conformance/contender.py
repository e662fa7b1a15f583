"""A node of its own process: it refreshes the sessions that it is told of as fast as it can, together with another.

Reads a line of JSON, says that it is ready, waits for a line, and prints what became of each attempt.
"""

import asyncio
import json
import sys

from backends import backend_at, by_the_asker
from given import START, WEEK

from gatelodge_server.core.ports import RefreshAttempt


def attempts(asked):
    for _ in range(asked["times"]):
        for id_ in asked["sessions"]:
            retry = bytes.fromhex(asked["retry"]) if asked["retry"] else None
            yield RefreshAttempt(bytes.fromhex(id_), 0, retry, START, START + WEEK)


async def contend(asked):
    store = backend_at(asked["address"]).open(store_now=by_the_asker)
    await store.ping()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    outcomes = await asyncio.gather(*(store.advance_session(attempt) for attempt in attempts(asked)))
    await store.close()
    names = [type(outcome).__name__ for outcome in outcomes]
    generations = [outcome.session.generation for outcome in outcomes if hasattr(outcome, "session")]
    print(json.dumps({"names": names, "generations": generations}), flush=True)


if __name__ == "__main__":
    asyncio.run(contend(json.loads(sys.stdin.readline())))
