"""P3: what is revoked is refused everywhere, soon, and what cannot know refuses.

Four nodes on one PostgreSQL, and four offline verifiers in processes of their own, each of which follows another node. API
keys, access tokens, sessions, partners and companies are revoked under load, by requests at any node and by a partner manager
beside them. What dies with each has been let in by every node and every verifier before, so all remember it. From the answer
on each is asked every 20 ms until it refuses; the time until it last let somebody in is what is measured, once as it is and
once with every connection that listens for notifications cut or dead, so that only the reading of every half second is left.

Then: a node and a verifier stand still for longer than the maximum staleness, and must not believe at their wake what they
remember. Verifiers are cut off from their nodes: they refuse everything once what they know is too old, and are right again
when the wire is whole. What answers say of who has heard is held against who has.

The control has a node that believes what it remembers for ten times as long, and verifiers that do not look at their age.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tests import processes

from experiments.client import Answer
from experiments.ground import Experiment, Ground, Verdict, bounded
from experiments.outsider import ACCEPTED
from experiments.servers import Cut, Node, PostgresServer, postgres_server, wait_for
from experiments.variants import program
from experiments.victims import (
    BY_HTTP,
    HEARD_OUTSIDE,
    KINDS,
    PACE,
    UNDECIDED,
    Deployment,
    Door,
    NodeDoor,
    Scene,
    Victim,
    Watch,
    scene_on,
    watch,
)

MAX_STALENESS: Final = 10.0
TARGET: Final = 1.0
"""Seconds, for 99 of 100."""
_TARGET_QUICK: Final = 3.0
"""Of a few dozen the last one decides, and the machine may be busy with other tests."""
_NODES: Final = 4
_PATIENCE: Final = 25.0
"""Seconds until whoever has not refused by then is given up."""
_CLIENTS: Final = 4


@dataclass(slots=True)
class _Lags:
    """Seconds from the answers to revocations to the last time that somebody was let in."""

    name: str
    target: float
    nodes: list[float] = field(default_factory=list)
    verifiers: list[float] = field(default_factory=list)
    undecided: int = 0
    """Answers by which somebody does not know at the moment."""

    def note(self, found: Watch) -> None:
        (self.nodes if isinstance(found.door, NodeDoor) else self.verifiers).append(found.last_in)
        self.undecided += found.undecided

    def __str__(self) -> str:
        outside = f", verifiers {_spread(self.verifiers)}" if self.verifiers else ""
        return f"{self.name}: nodes {_spread(self.nodes)}{outside} ms, {self.undecided} undecided"

    def faults(self) -> Iterator[str]:
        """What speaks against the target."""
        for who, lags in (("nodes", self.nodes), ("verifiers", self.verifiers)):
            if lags and (slow := _percentile(lags, 0.99)) > self.target:
                yield f"slow: {self.name}: of the {who} one in a hundred lets in for {slow * 1000:.0f} ms"


def _percentile(values: Sequence[float], part: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(part * len(ranked)))]


def _spread(values: Sequence[float]) -> str:
    """Median, 99th percentile and maximum, in milliseconds."""
    return "/".join(f"{1000 * value:.0f}" for value in (_percentile(values, 0.5), _percentile(values, 0.99), max(values)))


def _judge(victim: Victim, found: Watch, *, bound: float = MAX_STALENESS) -> Iterator[str]:
    """What speaks against a door."""
    name = found.door.name
    if found.last_in > bound:
        yield f"late: {name} lets a revoked {victim.kind} in {found.last_in * 1000:.0f} ms after the answer"
    if not found.code:
        yield f"undecided: {name} never refused a revoked {victim.kind}"
    elif found.code != victim.code:
        yield f"code: {name} refuses a {victim.kind} with {found.code}, not {victim.code}"


# --- as it is, and without notifications ----------------------------------------------------------------------------------


async def _revoke_many(
    scene: Scene, name: str, count: int, *, at_once: int, target: float = TARGET, patience: float = _PATIENCE
) -> tuple[_Lags, list[str]]:
    """Revoke ``count`` of all kinds in turn, ``at_once`` at a time, and watch each everywhere."""
    lags, faults, victims = _Lags(name, target), list[str](), list[Victim]()
    kinds = itertools.islice(itertools.cycle(KINDS), count)

    async def one_after_another() -> None:
        for kind in kinds:
            victim = await scene.victim(kind)
            await scene.warm(victim)
            await victim.revoke(scene, "")
            since = time.monotonic()
            for found in await _watch_all(victim, scene.doors, since=since, until=since + patience):
                lags.note(found)
                faults.extend(_judge(victim, found))
            victims.append(victim)

    async with _load(scene, faults):
        await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    faults += await _come_back(scene, victims)
    return lags, [*faults, *lags.faults()]


async def _watch_all(victim: Victim, doors: Sequence[Door], *, since: float, until: float) -> list[Watch]:
    return await asyncio.gather(*(watch(door, text, since=since, until=until) for door, text in victim.at(doors)))


async def _come_back(scene: Scene, victims: Iterable[Victim]) -> list[str]:
    """Ask everywhere once more."""
    faults: list[str] = []
    for victim in victims:
        asked = victim.at(scene.doors)
        answers = await asyncio.gather(*(door.ask(text) for door, text in asked))
        faults += [
            f"back: {door.name} lets a {victim.kind} in that it had refused"
            for (door, _), said in zip(asked, answers, strict=True)
            if said == ACCEPTED
        ]
    return faults


@asynccontextmanager
async def _load(scene: Scene, faults: list[str]) -> AsyncIterator[None]:
    """Clients whose credentials stand, at every door. Nobody may refuse them; who cannot know may say so."""

    async def client() -> None:
        while True:
            for door in scene.doors:
                if (said := await door.ask(scene.living)) not in {ACCEPTED, UNDECIDED}:
                    faults.append(f"stands: {door.name} answers a credential that stands with {said}")
                await asyncio.sleep(PACE)  # a pace

    clients = [asyncio.create_task(client()) for _ in range(_CLIENTS)]
    try:
        yield
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


# --- who has heard --------------------------------------------------------------------------------------------------------


async def _count_reach(scene: Scene, nodes: Deployment, count: int) -> tuple[str, list[str]]:
    """Revoke and be told who has heard: at once, after waiting, and by commands."""
    faults: list[str] = []
    took: list[float] = []
    for kind, wait in itertools.islice(itertools.cycle(itertools.product(BY_HTTP, (0, 10))), count):
        victim = await scene.victim(kind)
        await scene.warm(victim)
        begun = time.monotonic()
        answer = await victim.revoke(scene, f"?wait={wait}")
        assert isinstance(answer, Answer)
        faults += await _hold_to_reach(scene, victim, answer.body, all_must=wait > 0)
        if wait:
            took.append(time.monotonic() - begun)
    for kind, group in (("partner's key", "key"), ("partner", "partner")):
        victim = await scene.victim(kind)
        await scene.warm(victim)
        command = (group, "revoke" if group == "key" else "suspend", victim.id)
        said = await asyncio.to_thread(nodes.run, *command, "--wait", "10s")
        faults += await _hold_to_reach(scene, victim, said, all_must=True)
    return f"reach {count + 2} right, with wait {_spread(took)} ms", faults


async def _hold_to_reach(scene: Scene, victim: Victim, said: Any, *, all_must: bool) -> list[str]:
    """Hold what an answer says to what verifiers do at once."""
    refusing = sum([await door.ask(text) != ACCEPTED for door, text in victim.at(scene.outsiders)])
    there = len(scene.outsiders)
    [step] = await scene.manager.store.list_changes(after=said["sequence"] - 1, limit=1)
    checks = (
        (step.subject == victim.id, f"the step that is named is of a {step.kind}, not of the {victim.kind}"),
        (said["verifiers"] == there, f"{said['verifiers']} verifiers are counted, there are {there}"),
        (said["acknowledged"] <= refusing, f"{said['acknowledged']} have acknowledged, {refusing} refuse"),
        (not all_must or said["acknowledged"] == there, f"{said['acknowledged']} of {there} have acknowledged, after the wait"),
    )
    return [f"reach: {fault}" for holds, fault in checks if not holds]


# --- standing still -------------------------------------------------------------------------------------------------------


async def _stand_still(scene: Scene, seconds: float, count: int) -> tuple[str, list[str]]:
    """Freeze a node and a verifier, revoke, ask them, and wake them.

    Until the maximum staleness is over they may answer by what they remember. The verifier that follows the node hears nothing.
    """
    node, verifier, unhearing = scene.nodes[0], scene.outsiders[-1], scene.outsiders[0]
    victims = [await scene.victim(kind) for kind in itertools.islice(itertools.cycle(KINDS), count)]
    await asyncio.gather(*(scene.warm(victim) for victim in victims))
    pids = [node.node.pid, verifier.outsider.pid]
    for pid in pids:
        await asyncio.to_thread(processes.freeze, pid)
    frozen_at = time.monotonic()
    awake = replace(scene, nodes=scene.nodes[1:])
    watches: list[tuple[Victim, asyncio.Task[list[Watch]]]] = []
    for victim in victims:
        await victim.revoke(awake, "")
        since = time.monotonic()
        watching = _watch_all(victim, scene.doors, since=since, until=since + seconds + _PATIENCE)
        watches.append((victim, asyncio.create_task(watching)))
    await asyncio.sleep(max(0.0, frozen_at + seconds - time.monotonic()))  # that is how long they stand still
    for pid in pids:
        await asyncio.to_thread(processes.thaw, pid)
    faults: list[str] = []
    let_in: list[bool] = []
    deaf = 0.0
    for victim, task in watches:
        for found in await task:
            faults += _judge(victim, found)
            if found.door in (node, verifier):
                let_in.append(found.last_in > 0)
            elif found.door is unhearing:
                deaf = max(deaf, found.last_in)
    faults += await _come_back(scene, victims)
    counts = f"{seconds:.0f} s still: {sum(let_in)} of {len(let_in)} let in at wake, by who follows it for {deaf * 1000:.0f} ms"
    return counts, faults


# --- cut off --------------------------------------------------------------------------------------------------------------


async def _cut_off(scene: Scene, wires: Sequence[Cut], doors: Sequence[Door], max_staleness: float) -> tuple[str, list[str]]:
    """Cut one verifier off, let the other's wire fall silent; revoke; make both whole again."""
    victims = [await scene.victim(kind) for kind in HEARD_OUTSIDE]
    await asyncio.gather(*(scene.warm(victim) for victim in victims))
    faults: list[str] = []
    await asyncio.to_thread(wires[0].cut)
    await asyncio.to_thread(wires[1].freeze)
    cut_at = time.monotonic()
    answers = asyncio.create_task(_reach_without(scene, len(doors)))
    for victim in victims:
        await victim.revoke(scene, "")
    until = cut_at + max_staleness + 2
    texts = [victim.session or "" for victim in victims] + [scene.living]
    last = await asyncio.gather(*(_last_asked_in(door, text, until) for door in doors for text in texts))
    refused_after = max(last) - cut_at
    if refused_after > max_staleness:
        faults.append(f"late: a verifier that was cut off lets in for {refused_after * 1000:.0f} ms")
    faults += await answers
    for wire in wires:
        await asyncio.to_thread(wire.heal)
    healed = time.monotonic()
    back = await asyncio.gather(*(_until_in(door, scene.living, healed) for door in doors))
    faults += [f"stands: a verifier is not back {_PATIENCE:.0f} s after its wire is whole" for took in back if took is None]
    for victim in victims:
        for found in await _watch_all(victim, doors, since=healed, until=time.monotonic() + PACE):
            faults += _judge(victim, found, bound=0.0)
    counts = f"cut off: nobody let in after {refused_after * 1000:.0f}, back {_spread([took or _PATIENCE for took in back])} ms"
    return counts, faults


async def _last_asked_in(door: Door, text: str, until: float) -> float:
    """When somebody who was let in has asked for the last time."""
    last = float("-inf")
    while (begun := time.monotonic()) < until:
        if await door.ask(text) == ACCEPTED:
            last = begun
        await asyncio.sleep(max(0.0, begun + 2 * PACE - time.monotonic()))  # a pace
    return last


async def _until_in(door: Door, text: str, since: float) -> float | None:
    """After how many seconds somebody is let in again."""
    while time.monotonic() < since + _PATIENCE:
        if await door.ask(text) == ACCEPTED:
            return time.monotonic() - since
        await asyncio.sleep(PACE)  # a pace
    return None


async def _reach_without(scene: Scene, away: int) -> list[str]:
    """What an answer says at once, and once those that do not hear refuse everything."""
    there, faults = len(scene.outsiders), list[str]()
    for wait, verifiers in ((1, there), (15, there - away)):
        victim = await scene.victim("company")
        begun = time.monotonic()
        answer = await victim.revoke(scene, f"?wait={wait}")
        assert isinstance(answer, Answer)
        said, took = (answer.body["verifiers"], answer.body["acknowledged"]), time.monotonic() - begun
        if said != (verifiers, there - away):
            faults.append(f"reach: with {away} cut off, {said[1]} of {said[0]} are said to have heard after {took:.1f} s")
    return faults


# --- the rounds -----------------------------------------------------------------------------------------------------------


async def _as_it_is(ground: Ground, server: PostgresServer) -> tuple[list[str], list[str]]:
    """All that is done to nodes that hear of everything."""
    said: list[str] = []
    faults: list[str] = []
    target = TARGET if not ground.quick else _TARGET_QUICK
    max_staleness = float(ground.scale(10, 4))
    with Deployment(ground.root / "revocation", server.create("hearing")) as nodes:
        running = [nodes.add() for _ in range(_NODES)]
        await _start(running)
        with Cut(running[1].port) as one, Cut(running[2].port) as other:
            ports = [running[0].port, one.port, other.port, running[3].port]
            async with scene_on(nodes, running, ports=ports, max_staleness=max_staleness) as scene:
                lags, found = await _revoke_many(scene, "as it is", ground.scale(1000, 42), at_once=6, target=target)
                said.append(str(lags))
                faults += found
                for counts, found in (
                    await _count_reach(scene, nodes, ground.scale(40, 4)),
                    await _stand_still(scene, ground.scale(30, 5), ground.scale(28, 7)),
                    await _cut_off(scene, [one, other], scene.outsiders[1:3], max_staleness),
                ):
                    said.append(counts)
                    faults += found
    return said, faults


async def _unnotified(ground: Ground, server: PostgresServer) -> tuple[list[str], list[str]]:
    """The same revocations while no notification arrives: half the nodes cannot listen, the others do and hear nothing."""
    target = TARGET if not ground.quick else _TARGET_QUICK
    with ExitStack() as stack:
        address = server.create("deaf")
        wires = [stack.enter_context(Cut(server.port, only=b"LISTEN ")) for _ in range(ground.scale(_NODES, 2))]
        nodes = stack.enter_context(Deployment(ground.root / "revocation-unnotified", address))
        running = [nodes.add(database=address.replace(f":{server.port}/", f":{wire.port}/")) for wire in wires]
        await _start(running)
        for number, wire in enumerate(wires):
            await asyncio.to_thread(wait_for, "a node listens", functools.partial(_is_listening, wire))
            await asyncio.to_thread(wire.cut if number % 2 else wire.freeze)
        async with scene_on(nodes, running, ports=[node.port for node in running]) as scene:
            lags, faults = await _revoke_many(scene, "unnotified", ground.scale(200, 14), at_once=2, target=target)
            # Nothing but its age tells a node that wakes here what has become of its memory.
            still, found = await _stand_still(scene, ground.scale(30, 12), ground.scale(28, 7))
    return [str(lags), still], [*faults, *found]


async def _start(nodes: Sequence[Node]) -> None:
    """Start them at the same time, once the first has made the tables."""
    await asyncio.to_thread(nodes[0].start)
    await asyncio.gather(*(asyncio.to_thread(node.start) for node in nodes[1:]))


def _is_listening(wire: Cut) -> bool:
    return wire.connections > 0


async def _prove(ground: Ground) -> Verdict:
    with postgres_server() as server:
        said, faults = await _as_it_is(ground, server)
        more, other_faults = await _unnotified(ground, server)
    return Verdict("; ".join([*said, *more]), [*faults, *other_faults])


def run(ground: Ground) -> Verdict:
    """On the product."""
    return bounded(_prove(ground), seconds=ground.scale(1800, 600))


async def _believe_too_long(ground: Ground) -> Verdict:
    root, max_staleness = ground.root / "revocation-control", 4.0
    with postgres_server() as server, Deployment(root, server.create("gatelodge")) as nodes:
        running = [nodes.add(program=program("long-memory")), nodes.add()]
        await _start(running)
        with Cut(running[0].port) as one, Cut(running[1].port) as other:
            wires, ports = [one, other], [one.port, other.port]
            async with scene_on(nodes, running, ports=ports, max_staleness=max_staleness, looks_at_age=False) as scene:
                count, patience = len(KINDS), MAX_STALENESS + 1
                lags, of_node = await _revoke_many(scene, "the node", count, at_once=count, patience=patience)
                counts, of_verifier = await _cut_off(scene, wires, scene.outsiders, max_staleness)
    are_caught = all(any(fault.startswith("late: ") for fault in faults) for faults in (of_node, of_verifier))
    return Verdict(f"{lags}; {counts}", [*of_node, *of_verifier] if are_caught else [])


def control(ground: Ground) -> Verdict:
    """On a node and on a verifier that believe too long. Both must be caught."""
    return bounded(_believe_too_long(ground), seconds=300)


EXPERIMENT = Experiment(
    name="revocation",
    promise="P3: what is revoked is refused by every node and verifier within a second, and by whoever cannot know",
    run=run,
    control=control,
    control_says="a node that believes its memory ten times as long, and verifiers that do not look at their age",
    finds="late: ",
)
