"""P5: of a partner's hour no more is let in than its tier allows, by any number of nodes whose clocks differ.

Four nodes on one PostgreSQL; 24 workers that send one request after the other, without a pause. The clock of the database is
the true one (libfaketime sets it to shortly before a full hour); those of the nodes are off by up to 30 s. Round by round the
clocks go on to the end of the hour, so each hour is seen at its beginning and at its end. In the rough rounds one node is
frozen with what it has leased until the hour is over, one is killed and started again, and the clock of one steps by a minute.

The workers write down when they sent and when they were answered. A 200 between whose two moments the hour ends may be of
either; all others are of one. None may be one too many, and none may speak of a window (``X-RateLimit-Reset``) that was over
when it was sent. Without faults an hour that is asked for five times what it has is used to the last hundredth. There must
be one such hour, or nothing of the kind was tried.
The control runs nodes that go by their own clocks.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from experiments.client import Link, Lost
from experiments.ground import Experiment, Ground, Verdict, bounded
from experiments.servers import FakeClock, Node, Nodes, before_hour, postgres_server
from experiments.variants import program

_SKEWS: Final = (-30.0, 30.0, -12.0, 0.0)
_WORKERS: Final = 24
_HOUR: Final = 3600.0
_DEMAND: Final = 5
_USED: Final = 0.99
_PLANS: Final = "/api/v2/Partners/PlansSearchAsync/VIN"
_VEHICLE: Final = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}
_SETTINGS: Final = {"GATELODGE_SAMPLE_API": "on", "GATELODGE_BEHIND_PROXY": "127.0.0.0/8"}
_PACE: Final = 0.02


class _Answered(NamedTuple):
    """A 200: when it was asked for and when it came, by the true clock, and when its window ends, as it says itself."""

    sent_at: float
    came_at: float
    ends_at: float

    @property
    def hours(self) -> tuple[int, int]:
        """The first and the last hour that it may be of."""
        return int(self.sent_at // _HOUR), int(self.came_at // _HOUR)


@dataclass(slots=True)
class _Load:
    """The workers, what they were answered, and the true clock."""

    nodes: Sequence[Node]
    key: str
    clock: FakeClock
    clocks: Sequence[FakeClock]
    ahead: float = 0.0
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    under_way: int = 0
    answered: list[_Answered] = field(default_factory=list)
    asked: Counter[int] = field(default_factory=Counter)
    refused: int = 0
    lost: int = 0
    other: Counter[int] = field(default_factory=Counter)

    def now(self) -> float:
        """The database's time, in seconds."""
        return time.time() + self.ahead

    def set_clocks(self, ahead: float) -> None:
        """Move the clocks of all. Nobody asks for anything meanwhile."""
        self.ahead = round(ahead, 3)
        self.clock.set(self.ahead)
        for clock, skew in zip(self.clocks, _SKEWS, strict=True):
            clock.set(self.ahead + skew)

    async def until(self, moment: float) -> None:
        """Wait for a moment of the true clock."""
        while (left := moment - self.now()) > 0:
            await asyncio.sleep(left)

    async def work(self, node: Node) -> None:
        """Send one request after the other, whenever they flow, to one node."""
        link: Link | None = None
        while not self.over:
            await self.flowing.wait()
            if link is None:
                try:
                    link = Link(*await asyncio.open_connection("127.0.0.1", node.port))
                except OSError:
                    await asyncio.sleep(_PACE)  # a pace: it is being started
                    continue
            self.under_way += 1
            if not await self._ask(link):
                link = None
            self.under_way -= 1
        if link is not None:
            link.close()

    async def _ask(self, link: Link) -> bool:
        headers = {"Authorization": f"Bearer {self.key}", "X_Forwarded_Proto": "https"}
        sent_at = self.now()
        try:
            answer = await link.call("POST", _PLANS, _VEHICLE, **headers)
        except Lost:
            self.lost += 1
            return False
        came_at = self.now()
        self.asked[int(sent_at // _HOUR)] += 1
        if answer.status == 200:
            self.answered.append(_Answered(sent_at, came_at, float(answer.headers["x-ratelimit-reset"])))
        elif answer.status == 429:
            self.refused += 1
        else:
            self.other[answer.status] += 1
        if answer.headers.get("connection") == "close":
            link.close()
            return False
        return True

    async def stop(self) -> None:
        """Let nobody send any more, and wait for the answers to what was sent."""
        self.flowing.clear()
        while self.under_way:
            await asyncio.sleep(_PACE)  # a pace


async def _be_rough(load: _Load, edge: float) -> None:
    """Freeze one node over the end of the hour, kill another before it and after it, and let the clock of a third step."""
    frozen, stepping, killed, _ = load.nodes
    for moment in (edge - 2.0, edge + 1.0):
        await load.until(moment)
        await asyncio.to_thread(killed.kill)
        starting = asyncio.create_task(asyncio.to_thread(killed.start))
        if moment < edge:
            await load.until(edge - 0.5)
            await asyncio.to_thread(frozen.freeze)
            load.clocks[1].set(load.ahead - 30.0)
            await load.until(edge + 0.7)
            await asyncio.to_thread(frozen.thaw)
        await starting
    load.clocks[1].set(load.ahead + 30.0)
    assert stepping.process is not None


async def _pass_hours(load: _Load, rounds: Sequence[bool], seconds: float) -> list[int]:
    """Let requests flow in each round, around the end of another hour. The hours that have begun without faults."""
    calm: list[int] = []
    for number, is_rough in enumerate(rounds):
        # The first begins with an hour; each other one ends the hour with which the one before began.
        lead = seconds if number else -0.05
        load.set_clocks(before_hour(lead, now=time.time()) + number * _HOUR)
        edge = round((load.now() + lead) / _HOUR) * _HOUR
        load.flowing.set()
        if is_rough:
            await _be_rough(load, edge)
        else:
            calm.append(int(edge // _HOUR))
        await load.until(edge + seconds)
        await load.stop()
    return calm


def _judge(load: _Load, calm: Sequence[int], limit: int) -> list[str]:
    """Everything that speaks against the promise."""
    sure, doubtful = Counter[int](), Counter[int]()
    faults: list[str] = []
    for answered in load.answered:
        first, last = answered.hours
        if first == last:
            sure[first] += 1
        else:
            doubtful[first] += 1
        if not answered.sent_at < answered.ends_at or answered.ends_at - _HOUR > math.ceil(answered.came_at):
            by = answered.sent_at - answered.ends_at
            faults.append(f"window: let in by a window that had ended {by:.3f} s before the request was sent")
    carried = 0
    for hour in sorted({*sure, *doubtful, *(each + 1 for each in doubtful)}):
        count = sure[hour] + carried
        if count > limit:
            faults.append(f"over: {count} let in of {limit} in the hour {hour}")
        # Those in doubt count for the earlier hour as far as it has room, and the rest for the next.
        carried = max(0, count + doubtful[hour] - max(limit, count))
    for hour in calm:
        used = sure[hour] + doubtful[hour] + doubtful[hour - 1]
        if load.asked[hour] >= _DEMAND * limit and used < _USED * limit:
            faults.append(f"under: {used} let in of {limit} in the hour {hour}, of {load.asked[hour]} that asked")
    if not any(load.asked[hour] >= _DEMAND * limit for hour in calm):
        most = max((load.asked[hour] for hour in calm), default=0)
        faults.append(f"demand: no calm hour was asked for {_DEMAND} times its {limit}: the busiest had {most} requests")
    return faults


async def _measure(
    ground: Ground, name: str, rounds: Sequence[bool], *, limit: int, seconds: float, variant: Sequence[str] | None
) -> Verdict:
    clock, clocks = FakeClock(), [FakeClock() for _ in _SKEWS]
    root = ground.root / name
    root.mkdir()
    with postgres_server(clock=clock) as database, Nodes(root, database.create("gatelodge"), environ=_SETTINGS) as nodes:
        nodes.run("tier", "set", "starter", "--per-hour", str(limit), "--per-day", str(100 * limit))
        key = str(nodes.run("partner", "add", "Acme Motors", "--email", "dev@acme.example")["apiKey"])
        running = [nodes.add(clock=own, program=variant) for own in clocks]
        for node in running:
            await asyncio.to_thread(node.start)
        load = _Load(running, key, clock, clocks)
        workers = [asyncio.create_task(load.work(running[at % len(running)])) for at in range(_WORKERS)]
        try:
            calm = await _pass_hours(load, rounds, seconds)
        finally:
            load.over = True
            load.flowing.set()
            for worker in workers:
                worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    asked = sum(load.asked.values())
    fewest = min((load.asked[hour] for hour in calm), default=0) / limit
    counts = f"{len(load.asked)} hours of {limit}, {asked} requests ({fewest:.1f} times an hour's or more), "
    counts += f"{len(load.answered)} let in, {load.refused} refused, {load.lost} lost, {dict(load.other) or 'none'} else"
    return Verdict(counts, _judge(load, calm, limit))


def run(ground: Ground) -> Verdict:
    """Calm rounds, then rough ones."""
    rounds = [False] * ground.scale(4, 2) + [True] * ground.scale(6, 1)
    limit = ground.scale(500, 100)
    work = _measure(ground, "quotas", rounds, limit=limit, seconds=ground.scale(8, 4), variant=None)
    return bounded(work, seconds=180 + 40 * len(rounds))


def control(ground: Ground) -> Verdict:
    """Calm rounds, on nodes that go by their own clocks."""
    work = _measure(ground, "quotas-control", [False] * 2, limit=100, seconds=4, variant=program("own-clock"))
    return bounded(work, seconds=300)


EXPERIMENT = Experiment(
    name="quotas",
    promise="P5: no hour has one request too many, on four nodes whose clocks differ, with kills and freezes at its end",
    run=run,
    control=control,
    control_says="nodes that go by their own clocks",
    finds="over: ",
)
