"""P2 and P4 on many nodes: a refresh token is spent at most once, wherever, and a reuse ends its session for good.

Three nodes on one PostgreSQL. Eight clients send every token two to four times at once, each copy to a node drawn by lot: half
of them with one Idempotency-Key for all copies, as honest clients do that retry too eagerly; half without, as thieves do. Every
two seconds a node is killed and started again; now and then one is stopped for five seconds; in the middle PostgreSQL is
restarted, and later it is killed. An honest client may lose an answer, but never its session.

Then all nodes and PostgreSQL are killed and started once more, and every token of the sessions that were ended by a reuse is
presented again: none is accepted. The control reads what it decides by without a lock: each node by itself does nothing wrong.

`postgres` kills PostgreSQL again and again, and asks whether everything is there that was acknowledged. Its control runs with
``synchronous_commit`` off.
"""

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tests.harness import PROGRAM

from experiments.fleet import Fleet, counts_of, fleet_on, in_parallel
from experiments.ground import Experiment, Ground, Verdict, bounded
from experiments.spending import Client
from experiments.variants import program

_NODES: Final = 3
_FEW_NODES: Final = 2
_CLIENTS: Final = 8
_GLANCE: Final = 0.005
_FREEZE: Final = 5.0
_PACE_OF_KILLS: Final = 2.0
_PACE_OF_FREEZES: Final = 15.0
_MOST_DESCENDANTS: Final = 2_000
_AT_ONCE: Final = 8
_NONE: Final[Mapping[str, str]] = MappingProxyType({})
_SLOW: Final = 300.0
"""Seconds that starts and the search for the dead may take on a machine that has other things to do."""
_BATCHED: Final = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}
"""With ``synchronous_commit`` off: what a crash may lose, which is otherwise over within a fifth of a second."""


@dataclass(slots=True)
class _Disturber:
    """What befalls nodes and their database."""

    fleet: Fleet
    until: float
    killed: int = 0
    frozen: int = 0
    database: int = 0

    async def kill_nodes(self) -> None:
        """Kill one every two seconds, and start it again."""
        starting: set[asyncio.Task[None]] = set()
        while time.monotonic() < self.until:
            await asyncio.sleep(_PACE_OF_KILLS)
            if self.fleet.up:
                victim = self.fleet.chance.choice(self.fleet.up)
                await self.fleet.kill(victim)
                starting.add(asyncio.create_task(self.fleet.revive(victim)))
                self.killed += 1
        await asyncio.gather(*starting)

    async def freeze_nodes(self) -> None:
        """Stop one for a while. It may be killed meanwhile."""
        while time.monotonic() + _FREEZE < self.until:
            await asyncio.sleep(1)
            if self.fleet.up:
                victim = self.fleet.chance.choice(self.fleet.up)
                await asyncio.to_thread(victim.freeze)
                await asyncio.sleep(_FREEZE)
                await asyncio.to_thread(victim.thaw)
                self.frozen += 1
            await asyncio.sleep(max(0.0, min(_PACE_OF_FREEZES, self.until - time.monotonic())))

    async def shake_database(self) -> None:
        """Restart PostgreSQL in the middle of the time, and kill it after three quarters of it."""
        begun = time.monotonic()
        for part, shake in ((0.5, self.fleet.server.restart), (0.75, functools.partial(_crash, self.fleet))):
            await asyncio.sleep(max(0.0, begun + part * (self.until - begun) - time.monotonic()))
            await asyncio.to_thread(shake)
            self.database += 1


def _crash(fleet: Fleet) -> None:
    fleet.server.kill()
    fleet.server.start()


async def _disturb(fleet: Fleet, seconds: float) -> str:
    disturber = _Disturber(fleet, time.monotonic() + seconds)
    await asyncio.gather(disturber.kill_nodes(), disturber.freeze_nodes(), disturber.shake_database())
    return f"{disturber.killed} nodes killed, {disturber.frozen} frozen, PostgreSQL restarted and killed"


async def _race(
    ground: Ground,
    name: str,
    seconds: float,
    *,
    command: Sequence[str] = PROGRAM,
    disturbed: bool,
) -> Verdict:
    with fleet_on(ground, name, program=command) as fleet:
        await fleet.start(_NODES)
        key, over = await asyncio.to_thread(fleet.partner), asyncio.Event()
        clients = [Client(fleet, key, fleet.chance, honest=number % 2 == 0) for number in range(_CLIENTS)]
        tasks = [asyncio.create_task(client.go_on(over)) for client in clients]
        if disturbed:
            disturbances = await _disturb(fleet, seconds)
        else:
            await asyncio.sleep(seconds)
            disturbances = "undisturbed"
        over.set()
        await asyncio.gather(*tasks)
        if disturbed:
            await fleet.kill_all()
            await asyncio.to_thread(_crash, fleet)
            for node in fleet.nodes.all:
                await fleet.revive(node)
        recovered_at = time.monotonic()
        descendants = await _present_again(fleet, clients)
        faults = await asyncio.to_thread(functools.partial(fleet.judge, recovered_at=recovered_at))
        forced = sum(len(client.sessions) - 1 for client in clients[::2])
        if forced > 0:
            faults.append(f"honest clients had to log in again {forced} times")
        return Verdict(f"{counts_of(fleet.book)}; {disturbances}; {descendants} tokens of dead sessions tried again", faults)


async def _crash_and_recover(
    ground: Ground, name: str, crashes: int, *, command: Sequence[str] = PROGRAM, settings: Mapping[str, str] = _NONE
) -> Verdict:
    with fleet_on(ground, name, settings=settings, program=command) as fleet:
        await fleet.start(_FEW_NODES)
        key, over = await asyncio.to_thread(fleet.partner), asyncio.Event()
        clients = [Client(fleet, key, fleet.chance, honest=True) for _ in range(_CLIENTS)]
        tasks = [asyncio.create_task(client.go_on(over)) for client in clients]
        for _ in range(crashes):
            goal = len(fleet.book.operations) + fleet.chance.randint(10, 200)
            while len(fleet.book.operations) < goal:
                await asyncio.sleep(_GLANCE)
            await asyncio.to_thread(_crash, fleet)
        over.set()
        await asyncio.gather(*tasks)
        recovered_at = time.monotonic()
        await _present_again(fleet, clients)
        faults = await asyncio.to_thread(functools.partial(fleet.judge, recovered_at=recovered_at))
        return Verdict(f"PostgreSQL killed {crashes} times; {counts_of(fleet.book)}", faults)


async def _present_again(fleet: Fleet, clients: list[Client]) -> int:
    """Present what should be alive, then all that descends from a login whose session was ended by a reuse."""
    caller = fleet.caller()
    for client in clients:
        if client.token is not None:
            await fleet.insist(functools.partial(caller.refresh, client.token))
    thieves = [client for client in clients if not client.honest]
    dead = [token for thief in thieves for session in thief.sessions for token in reversed(session)]
    chosen = dead[-_MOST_DESCENDANTS:]
    works = [functools.partial(fleet.insist, functools.partial(caller.refresh, token)) for token in chosen]
    await in_parallel(works, _AT_ONCE)
    caller.close()
    return len(chosen)


def run(ground: Ground) -> Verdict:
    """Race on the product."""
    seconds = ground.scale(180, 12)
    return bounded(_race(ground, "nodes", seconds, disturbed=True), seconds=3 * seconds + _SLOW)


def control(ground: Ground) -> Verdict:
    """Race on nodes that lock nothing."""
    return bounded(_race(ground, "nodes-control", 5, command=program("unlocked"), disturbed=False), seconds=_SLOW)


def run_crashes(ground: Ground) -> Verdict:
    """Kill the product's PostgreSQL."""
    crashes = ground.scale(60, 4)
    return bounded(_crash_and_recover(ground, "postgres", crashes), seconds=_SLOW + 10 * crashes)


def control_crashes(ground: Ground) -> Verdict:
    """Kill a PostgreSQL that acknowledges before it writes."""
    work = _crash_and_recover(ground, "postgres-control", 2, command=program("sync-commit-off"), settings=_BATCHED)
    return bounded(work, seconds=_SLOW)


CRASHES: Final = Experiment(
    name="postgres",
    promise="P1: what was acknowledged survives a PostgreSQL that is killed",
    run=run_crashes,
    control=control_crashes,
    control_says="synchronous_commit off",
    finds="honest: ",
)
EXPERIMENT: Final = Experiment(
    name="nodes",
    promise="P2, P4 on three nodes: a token is spent once, honest retries cost no session, a reuse ends it for good",
    run=run,
    control=control,
    control_says="nodes that read without FOR UPDATE",
    finds="spent-once: ",
)
